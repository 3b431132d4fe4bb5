package vfs

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"

	"github.com/google/uuid"
)

// ErrTooLarge: a file is larger than what ReadFile was told to take.
var ErrTooLarge = errors.New("larger than such a file can be")

// ReadFile reads a whole regular file of at most limit bytes, and refuses a
// larger one (ErrTooLarge) before it takes any memory.
func ReadFile(fsys FS, name string, limit int64) ([]byte, error) {
	f, err := fsys.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	n, err := f.Size()
	if err != nil {
		return nil, err
	}
	if n > limit {
		return nil, &fs.PathError{Op: "read", Path: name, Err: fmt.Errorf("%d bytes are %w (%d)", n, ErrTooLarge, limit)}
	}
	b := make([]byte, n)
	got, err := f.ReadAt(b, 0)
	if err == io.EOF { // an empty file, or one that has been cut meanwhile
		err = nil
	}
	return b[:got], err
}

// Writing says how WriteFile writes.
type Writing struct {
	// Temporary is the name that the file has until it is whole: of no file
	// that there is, on the same file system. A store passes one in its tmp
	// directory, where gc finds what a killed process has left. Empty: it has
	// none, so that a killed process leaves nothing, where nobody would look
	// for a guest's memory; or, on a file system without nameless files (NFS),
	// one beside the target that begins with ".flic-".
	Temporary string
	// New refuses to replace a file (fs.ErrExist).
	New bool
	// NoSync leaves the time of the writing to the kernel. Other processes
	// still see the old file or the whole new one; a power cut can leave an
	// empty or torn one. It is for what is worth less than the time of an
	// fsync: the caller says why.
	NoSync bool
}

// WriteFile makes or replaces a file, of mode 0600, whole or not at all. write
// fills it. When WriteFile has returned, the file is durable, unless o.NoSync
// says otherwise; after an error the old one is still there (only if the sync of
// the directory failed can it be the new one). What name has now must be a
// regular file or nothing: a device, a FIFO or a link is never replaced
// (ErrNotRegular, ErrLink).
func WriteFile(fsys FS, name string, o Writing, write func(f File) error) (err error) {
	if err := replaceable(fsys, name, o.New); err != nil {
		return err
	}
	dir := filepath.Dir(name)
	f, tmp, err := o.begin(fsys, dir)
	if err != nil {
		return err
	}
	open := true
	defer func() {
		// Also when write panics: nothing is left.
		if open {
			f.Close()
		}
		if tmp != "" {
			fsys.Remove(tmp)
		}
	}()
	if err := write(f); err != nil {
		return err
	}
	if !o.NoSync {
		if err := f.Sync(); err != nil {
			return err
		}
	}
	if tmp == "" {
		as := name
		if !o.New {
			as = beside(dir) // what replaces a file must have a name
		}
		if err := f.LinkAs(as); err != nil {
			return err
		}
		tmp = as
	}
	open = false
	if err := f.Close(); err != nil {
		return err
	}
	if tmp != name {
		rename := fsys.Replace
		if o.New {
			rename = fsys.Rename
		}
		if err := rename(tmp, name); err != nil {
			return err
		}
	}
	tmp = ""
	if o.NoSync {
		return nil
	}
	return fsys.SyncDir(dir)
}

// begin makes the file that is to become one in dir, and says which name it has: "" for none.
func (o *Writing) begin(fsys FS, dir string) (f File, tmp string, err error) {
	tmp = o.Temporary
	if tmp == "" {
		if f, err = fsys.CreateUnnamed(dir); err == nil || !errors.Is(err, errors.ErrUnsupported) {
			return f, "", err
		}
		tmp = beside(dir)
	}
	f, err = fsys.Create(tmp)
	return f, tmp, err
}

// beside is a new name in dir.
func beside(dir string) string { return filepath.Join(dir, ".flic-"+uuid.NewString()) }

// replaceable refuses a name that WriteFile must leave alone.
func replaceable(fsys FS, name string, newOnly bool) error {
	fi, err := fsys.Lstat(name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case newOnly:
		err = fs.ErrExist
	case fi.Mode()&fs.ModeSymlink != 0:
		err = ErrLink
	case !fi.Mode().IsRegular():
		err = ErrNotRegular
	default:
		return nil
	}
	return &fs.PathError{Op: "replace", Path: name, Err: err}
}

// Bytes is a write function of WriteFile for content that is in memory.
func Bytes(b []byte) func(File) error {
	return func(f File) error {
		_, err := f.Write(b)
		return err
	}
}
