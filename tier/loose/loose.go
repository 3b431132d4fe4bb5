// Package loose reads and writes flash images that lie in no store: a single
// file, or a part of one, that somebody else has opened, will name and will
// remove. libvirt's save files are such: a header of libvirt's, then whatever
// its compressor has written.
//
//	save:    image.Writer ─► Out ─► descriptor (a pipe, or a file at an offset)
//	                          └─► window: the last bytes written, for reading back
//	restore: descriptor ─► In: from the offset to the end, as a file of its own
//	                       (a pipe is copied to a nameless file first)
package loose

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flic-migrate/flic-migrate/stream/pipe"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// ErrGone: bytes that were written long ago can't be read back from a
// descriptor that is only written to.
var ErrGone = errors.New("written too long ago to be read back")

// DefaultWindow is how much an Out keeps in memory, in bytes: some 100 MB of
// guest pages. A save finds duplicates of pages that are in it, and beyond it
// those whose hash it knows.
const DefaultWindow = 32 << 20

// unsupported is all of vfs.File that makes no sense for a borrowed descriptor.
type unsupported struct{ name string }

func (u unsupported) fail(op string) error {
	return &fs.PathError{Op: op, Path: u.name, Err: errors.ErrUnsupported}
}

func (u unsupported) Name() string                             { return u.name }
func (u unsupported) Write([]byte) (int, error)                { return 0, u.fail("write") }
func (u unsupported) WriteAt([]byte, int64) (int, error)       { return 0, u.fail("write") }
func (u unsupported) Truncate(int64) error                     { return u.fail("truncate") }
func (u unsupported) Allocate(int64, int64) error              { return u.fail("fallocate") }
func (u unsupported) Restrict() error                          { return u.fail("chmod") }
func (u unsupported) GiveTo(fs.FileInfo) error                 { return u.fail("chown") }
func (u unsupported) LinkAs(string) error                      { return u.fail("link") }
func (u unsupported) Punch(int64, int64) error                 { return u.fail("punch") }
func (u unsupported) Clone(string) error                       { return u.fail("clone") }
func (u unsupported) SetModified(time.Time) error              { return u.fail("utimens") }
func (u unsupported) Data(off int64) (int64, error)            { return off, nil }
func (u unsupported) Allocated() (int64, error)                { return 0, u.fail("stat") }
func (u unsupported) Links() (int, error)                      { return 0, u.fail("stat") }
func (u unsupported) Inode() (uint64, error)                   { return 0, u.fail("stat") }
func (u unsupported) StartWriteback(int64, int64)              {}
func (u unsupported) DropCache()                               {}
func (u unsupported) Lock(context.Context, vfs.LockMode) error { return u.fail("lock") }
func (u unsupported) TryLock(vfs.LockMode) error               { return u.fail("lock") }
func (u unsupported) Unlock() error                            { return u.fail("unlock") }
func (u unsupported) Map(int64, int64, bool) (vfs.Mapping, error) {
	return nil, u.fail("mmap")
}

// Out is an image that is being written to a descriptor which need not be
// seekable. Offsets count from its first byte.
type Out struct {
	unsupported
	f *os.File

	mu   sync.Mutex
	size int64
	// window has the byte at offset i at i modulo its length. Pages of it that
	// a small image never reaches take no memory.
	window []byte
}

// NewOut writes to f, which stays the caller's to close, and keeps the last
// bytes, window of them, for ReadAt.
func NewOut(f *os.File, window int) *Out {
	return &Out{unsupported: unsupported{f.Name()}, f: f, window: make([]byte, window)}
}

// Write appends b.
func (o *Out) Write(b []byte) (int, error) {
	n, err := o.f.Write(b)
	o.mu.Lock()
	defer o.mu.Unlock()
	for kept := b[max(0, n-len(o.window)):n]; len(kept) > 0; {
		c := copy(o.window[(o.size+int64(n-len(kept)))%int64(len(o.window)):], kept)
		kept = kept[c:]
	}
	o.size += int64(n)
	return n, err
}

// ReadAt reads what was written; ErrGone if that is no longer in the window.
func (o *Out) ReadAt(b []byte, off int64) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	switch {
	case off < 0 || off > o.size:
		return 0, io.EOF
	case off < o.size-int64(len(o.window)):
		return 0, &fs.PathError{Op: "read", Path: o.name, Err: ErrGone}
	}
	n := 0
	for end := min(o.size, off+int64(len(b))); off+int64(n) < end; {
		at := (off + int64(n)) % int64(len(o.window))
		n += copy(b[n:end-off], o.window[at:])
	}
	if n < len(b) {
		return n, io.EOF
	}
	return n, nil
}

// Size is the number of bytes written.
func (o *Out) Size() (int64, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.size, nil
}

// Sync makes a file durable. What went into a pipe is its reader's to make so.
func (o *Out) Sync() error {
	err := o.f.Sync()
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EROFS) {
		return nil
	}
	return err
}

// Close leaves the descriptor open.
func (o *Out) Close() error { return nil }

// In is an image in a file that is open for reading.
type In struct {
	unsupported
	f         *os.File
	base, end int64
	spooled   bool
}

// NewIn reads the image that begins at f's offset and ends with the file. What
// can't be read twice, such as a pipe, is read to its end now, or until ctx is done, into a
// file without a name in the directory spool (os.TempDir's if empty); head is what
// has been taken from it before. f stays the caller's to close; such a one may be in
// non-blocking mode then.
func NewIn(ctx context.Context, f *os.File, head []byte, spool string) (*In, error) {
	in := &In{unsupported: unsupported{f.Name()}, f: f}
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if fi.Mode().IsRegular() {
		if in.base, err = f.Seek(0, io.SeekCurrent); err != nil {
			return nil, err
		}
		in.end = fi.Size()
		return in, nil
	}
	once, err := pipe.New(ctx, int(f.Fd()))
	if err != nil {
		return nil, err
	}
	defer once.Close()
	tmp, err := os.CreateTemp(spool, ".flic-spool-*") // mode 0600
	if err != nil {
		return nil, err
	}
	// Without a name it is gone when this process is, however that ends.
	if err = os.Remove(tmp.Name()); err == nil {
		_, err = tmp.Write(head)
	}
	if err == nil {
		in.end, err = io.Copy(tmp, once)
		in.end += int64(len(head))
	}
	if err != nil {
		tmp.Close()
		return nil, fmt.Errorf("copy of the input, which can be read only once: %w", err)
	}
	in.f, in.spooled = tmp, true
	return in, nil
}

// ReadAt implements io.ReaderAt; offset 0 is the image's first byte.
func (in *In) ReadAt(b []byte, off int64) (int, error) {
	if off < 0 {
		return 0, in.fail("read")
	}
	n, err := in.f.ReadAt(b[:max(0, min(int64(len(b)), in.end-in.base-off))], in.base+off)
	if err == nil && n < len(b) {
		err = io.EOF
	}
	return n, err
}

// Size is the image's length.
func (in *In) Size() (int64, error) { return max(0, in.end-in.base), nil }

// Sync has nothing to do.
func (in *In) Sync() error { return nil }

// Close gives up a copy; the caller's descriptor stays open.
func (in *In) Close() error {
	if in.spooled {
		return in.f.Close()
	}
	return nil
}
