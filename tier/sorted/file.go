package sorted

import (
	"errors"
	"syscall"

	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// File is an open file that ends with a table.
type File struct {
	vfs.File
	Length int64 // in bytes
	mapped vfs.Mapping
}

// OpenFile opens a file and reads the head of it, of so many bytes: zeros if the file is
// shorter.
func OpenFile(fsys vfs.FS, name string, head int) (_ *File, b []byte, err error) {
	file, err := fsys.Open(name)
	if err != nil {
		return nil, nil, err
	}
	f := &File{File: file}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	if f.Length, err = f.Size(); err != nil {
		return nil, nil, err
	}
	b = make([]byte, head)
	if f.Length >= int64(head) {
		if _, err := f.ReadAt(b, 0); err != nil {
			return nil, nil, err
		}
	}
	return f, b, nil
}

// ReadAt is vfs.File's. What the medium does not give is damage, as what is wrong.
func (f *File) ReadAt(b []byte, off int64) (int, error) {
	n, err := f.File.ReadAt(b, off)
	if errors.Is(err, syscall.EIO) {
		err = &integrity.CorruptError{File: f.Name(), Offset: off, What: "index", Err: err}
	}
	return n, err
}

// Table maps the file, once, and opens the table that begins at an offset and goes to its
// end: so many records of record bytes. The table is of use until the file is closed.
func (f *File) Table(at int64, record int, records int64) (t *Table, err error) {
	if f.mapped, err = f.Map(0, f.Length, false); err != nil {
		return nil, err
	}
	return Open(f.Name(), at, f.mapped.Bytes()[at:], record, records)
}

// Close gives up the file and its table.
func (f *File) Close() error {
	var err error
	if f.mapped != nil {
		err = f.mapped.Close()
	}
	return errors.Join(err, f.File.Close())
}
