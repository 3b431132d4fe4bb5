package disk

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
)

const (
	// maxSize is the largest disk: 2³² blocks are what an index can number.
	maxSize = 1 << 32 * BlockSize
	// maxDepth is how many layers a disk may stand on. libvirt takes 200, and nobody
	// has a tenth of that: each is a lookup more for what lies below.
	maxDepth = 64
)

// Image is one layer of a disk, open for reading: a file, and what it stands on. It may
// be used by several goroutines.
type Image struct {
	file    *os.File
	name    string // as it was opened: relative names of backing files count from it
	id      Identity
	qcow2   *qcow2 // nil: it is raw
	backing *Image
}

// Open opens the layer path and all those below it. format may be "", then a file that
// begins as qcow2 files do is one, and any other is raw; a backing file's format must
// stand in the header of the layer above, as QEMU wants it too, because a guest can
// write whatever header it likes to a raw disk.
//
// Nothing is written and no lock is taken; the only files that are opened are regular
// ones. So QEMU can have the image open, with all its locks, and take no notice.
func Open(ctx context.Context, path string, format Format) (*Image, error) {
	var above []File
	top, err := openLayer(path, format)
	for i := top; err == nil; i = i.backing {
		if err = context.Cause(ctx); err != nil {
			break
		}
		// A file that stands on itself is found by its inode, whatever its names; one of
		// two file systems' with the same number, size and times is none that anybody has.
		if slices.Contains(above, i.id.File) {
			err = fmt.Errorf("%s: the backing files stand on each other in a ring", i.id.Path)
			break
		}
		if above = append(above, i.id.File); len(above) > maxDepth {
			err = fmt.Errorf("%s: it stands on more than %d backing files", path, maxDepth)
			break
		}
		var name string
		var f Format
		if name, f, err = i.backingName(); name == "" || err != nil {
			break
		}
		if i.backing, err = openLayer(name, f); err != nil {
			err = fmt.Errorf("backing file of %s: %w", i.id.Path, err)
		}
	}
	if err != nil {
		if top != nil {
			top.Close()
		}
		return nil, err
	}
	return top, nil
}

// OpenLayer opens the one file, and nothing that it stands on: where it has no bytes of
// its own, reads give zeros. format is as for Open.
func OpenLayer(path string, format Format) (*Image, error) { return openLayer(path, format) }

func openLayer(path string, format Format) (_ *Image, err error) {
	full, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	i := &Image{name: full}
	if i.id.Path, err = filepath.EvalSymlinks(full); err != nil {
		return nil, err
	}
	if i.file, err = openRegular(i.id.Path); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			i.file.Close()
		}
	}()
	if i.id.File, err = fileOf(i.file); err != nil {
		return nil, err
	}
	if format == "" {
		if format, err = looksLike(i.file); err != nil {
			return nil, err
		}
	}
	i.id.Format = format
	switch format {
	case Raw:
		// QEMU fills the last sector up.
		i.id.Size = (i.id.File.Size + SectorSize - 1) / SectorSize * SectorSize
	case Qcow2:
		if i.qcow2, err = openQcow2(i.file, i.id.File.Size); err != nil {
			return nil, fmt.Errorf("%s: %w", i.id.Path, err)
		}
		i.id.Size = i.qcow2.size
	}
	if err := i.id.Check(); err != nil {
		return nil, err
	}
	return i, nil
}

// openRegular opens a regular file for reading. O_NONBLOCK makes the open of a FIFO
// return, to be refused.
func openRegular(path string) (*os.File, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return nil, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		unix.Close(fd)
		return nil, &fs.PathError{Op: "open", Path: path, Err: errors.New("not a regular file: of others nobody can tell whether they have changed")}
	}
	return os.NewFile(uintptr(fd), path), nil
}

func looksLike(f io.ReaderAt) (Format, error) {
	var b [len(qcow2Magic)]byte
	if _, err := f.ReadAt(b[:], 0); err != nil && err != io.EOF {
		return "", err
	}
	if string(b[:]) == qcow2Magic {
		return Qcow2, nil
	}
	return Raw, nil
}

// Path is the file's name: absolute, links resolved.
func (i *Image) Path() string { return i.id.Path }

// Format is the layer's.
func (i *Image) Format() Format { return i.id.Format }

// Size is the disk's, in bytes, as the guest has it.
func (i *Image) Size() int64 { return i.id.Size }

// Backing is the layer that this one stands on; nil if there is none, and if this one
// was opened alone. It is closed with this one.
func (i *Image) Backing() *Image { return i.backing }

// BackingName is what the layer itself calls the file that it stands on; "" if there is none.
func (i *Image) BackingName() string {
	if i.qcow2 == nil {
		return ""
	}
	return i.qcow2.backing
}

// Identity is what the layer was when it was opened.
func (i *Image) Identity() Identity { return i.id }

// Now is what the open layer is now. A file that has taken its name is not looked at.
func (i *Image) Now() (Identity, error) {
	id := i.id
	var err error
	id.File, err = fileOf(i.file)
	if err == nil && id.Format == Raw {
		id.Size = (id.File.Size + SectorSize - 1) / SectorSize * SectorSize
	}
	return id, err
}

// Sync makes what the layer holds durable: a program that copies an image, and a QEMU with
// cache=unsafe, leave it to the kernel's page cache. Where nothing can be written nothing is
// left there.
func (i *Image) Sync() error {
	err := i.file.Sync()
	if errors.Is(err, unix.EROFS) || errors.Is(err, unix.EINVAL) {
		return nil
	}
	return err
}

// Close closes the layer, and those below it.
func (i *Image) Close() error {
	err := i.file.Close()
	if i.backing != nil {
		err = errors.Join(err, i.backing.Close())
	}
	return err
}

// backingName is the name and format of the file that the layer stands on; "" if there
// is none.
func (i *Image) backingName() (string, Format, error) {
	if i.qcow2 == nil || i.qcow2.backing == "" {
		return "", "", nil
	}
	name := i.qcow2.backing
	if protocol(name) {
		return "", "", fmt.Errorf("%s: its backing file %.200q is no path", i.id.Path, name)
	}
	f, err := ParseFormat(i.qcow2.backingFormat)
	if err == nil && f == "" {
		err = fmt.Errorf("its header does not say which format its backing file has, which can be told by \"qemu-img rebase -u -b %s -F FORMAT\"", name)
	}
	if err != nil {
		return "", "", fmt.Errorf("%s: %w", i.id.Path, err)
	}
	if !filepath.IsAbs(name) {
		name = filepath.Join(filepath.Dir(i.name), name)
	}
	return name, f, nil
}

// protocol tells whether QEMU takes a name for something else than a path, as nbd://
// and json: are (path_has_protocol).
func protocol(name string) bool {
	for _, c := range []byte(name) {
		switch c {
		case '/':
			return false
		case ':':
			return true
		}
	}
	return false
}

// ReadAt reads what the guest sees of this layer and those below it: where none has
// anything, zeros. Beyond Size is io.EOF.
func (i *Image) ReadAt(p []byte, off int64) (n int, err error) {
	if off < 0 {
		return 0, &fs.PathError{Op: "read", Path: i.id.Path, Err: errors.New("negative offset")}
	}
	want := len(p)
	p = p[:max(0, min(int64(want), i.id.Size-off))]
	for n < len(p) {
		rest := p[n:]
		at := off + int64(n)
		kind, length := ownData, int64(len(rest))
		if i.qcow2 != nil {
			if kind, length, err = i.qcow2.extent(at, length); err != nil {
				return n, i.readError(at, err)
			}
		}
		rest = rest[:length]
		switch {
		case kind == ownData:
			err = i.readOwn(rest, at)
		case kind == unallocated && i.backing != nil:
			var m int
			m, err = i.backing.ReadAt(rest, at)
			if err == io.EOF { // it may be shorter
				err = nil
			}
			clear(rest[m:])
		default:
			clear(rest)
		}
		if err != nil {
			return n, i.readError(at, err)
		}
		n += len(rest)
	}
	if n < want {
		return n, io.EOF
	}
	return n, nil
}

// readOwn reads what is in the layer itself.
func (i *Image) readOwn(p []byte, off int64) error {
	if i.qcow2 != nil {
		return i.qcow2.read(p, off)
	}
	return readFilled(i.file, p, off)
}

func (i *Image) readError(off int64, err error) error {
	var pe *fs.PathError
	if errors.As(err, &pe) {
		return err
	}
	return fmt.Errorf("%s: offset %d of the disk: %w", i.id.Path, off, err)
}

// readFilled reads from a file what QEMU sees of it: zeros where it has ended.
func readFilled(f io.ReaderAt, p []byte, off int64) error {
	n, err := f.ReadAt(p, off)
	if err == io.EOF {
		clear(p[n:])
		err = nil
	}
	return err
}

// what a layer itself has of a range of the disk
type ownKind int

const (
	unallocated ownKind = iota // nothing: what is below shows through
	ownZero                    // that it is zero
	ownData                    // bytes
)

// ownRun returns the next range [from, to) of the disk, at or after off, of which the
// layer itself has bytes; io.EOF if there is none.
func (i *Image) ownRun(ctx context.Context, off int64) (from, to int64, err error) {
	if i.qcow2 == nil {
		return i.rawRun(off)
	}
	for off < i.id.Size {
		if err := context.Cause(ctx); err != nil {
			return 0, 0, err
		}
		kind, n, err := i.qcow2.extent(off, min(i.id.Size-off, runLimit))
		if err != nil {
			return 0, 0, i.readError(off, err)
		}
		if kind == ownData {
			return off, off + n, nil
		}
		off += n
	}
	return 0, 0, io.EOF
}

// runLimit bounds how much of a disk is looked at in one step.
const runLimit = 1 << 30

// Empty tells whether the layer has no bytes of its own: all that is read from it comes
// from below.
func (i *Image) Empty(ctx context.Context) (bool, error) {
	if i.qcow2 == nil {
		return i.id.Size == 0, nil
	}
	for off := int64(0); off < i.id.Size; {
		if err := context.Cause(ctx); err != nil {
			return false, err
		}
		kind, n, err := i.qcow2.extent(off, min(i.id.Size-off, runLimit))
		if err != nil || kind != unallocated {
			return false, err
		}
		off += n
	}
	return true, nil
}

// rawRun asks the file system where a raw file has bytes.
func (i *Image) rawRun(off int64) (from, to int64, err error) {
	from, err = unix.Seek(int(i.file.Fd()), off, unix.SEEK_DATA)
	if err == unix.ENXIO {
		return 0, 0, io.EOF
	}
	if err == nil {
		to, err = unix.Seek(int(i.file.Fd()), from, unix.SEEK_HOLE)
	}
	if err != nil {
		return 0, 0, &fs.PathError{Op: "seek", Path: i.id.Path, Err: err}
	}
	if to >= i.id.File.Size {
		to = i.id.Size // QEMU fills the last sector up
	}
	return from, to, nil
}
