package vfs

import "os"

// OpenPlain opens a file that belongs to no store for reading, for who needs it as the
// operating system has it. It must be a regular file or a block device: at anything else,
// which could be read once only and be waited for without end, it is ErrNotRegular.
func OpenPlain(name string) (*os.File, error) { return osFS{}.openFile(name, os.O_RDONLY) }
