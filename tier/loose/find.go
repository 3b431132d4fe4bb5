package loose

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/flic-migrate/flic-migrate/tier/image"
)

// Place says where a loose image's file is, so that it can be found again after
// it was renamed, and told from one that was removed. It is stored as JSON.
type Place struct {
	Path string `json:"path"` // absolute
	// Handle is the file's handle (name_to_handle_at(2)), which stays its own
	// under every name; missing on file systems that have none.
	HandleType int32  `json:"handle_type,omitempty"`
	Handle     []byte `json:"handle,omitempty"`
	// FSID is the file system's (statfs(2)): of another one in its place, such
	// as the directory that it is mounted upon, nothing follows.
	FSID [2]int32 `json:"fsid"`
}

// State is what is known of a loose image.
type State int

const (
	Unknown State = iota // it can't be told now
	Present              // its file is there and holds it
	Gone                 // its file is removed, or holds something else
)

// Locate describes the file at path, which must be there.
func Locate(path string) (Place, error) {
	p := Place{Path: path}
	var st unix.Statfs_t
	if err := unix.Statfs(filepath.Dir(path), &st); err != nil {
		return p, &fs.PathError{Op: "statfs", Path: path, Err: err}
	}
	p.FSID = st.Fsid.Val
	if h, _, err := unix.NameToHandleAt(unix.AT_FDCWD, path, 0); err == nil {
		p.HandleType, p.Handle = h.Type(), h.Bytes()
	}
	_, err := os.Stat(path)
	return p, err
}

// Header reads what somebody else has put before an image, and returns its length
// in bytes, 0 if the image is alone or there is none. An error means that the file
// is being written.
type Header func(io.Reader) (int64, error)

// Find tells whether the image id is still where it was, under whatever name.
// Doubt is Unknown: the caller is about to give the image's hot pages away. So is,
// without a header (nil), every file that does not begin with an image.
func (p Place) Find(id uuid.UUID, header Header) State {
	f, err := openImage(unix.Open(p.Path, readOnly, 0))
	if err == nil {
		s := holds(f, id, header)
		f.Close()
		if s != Gone {
			return s
		}
	} else if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, errNoImage) {
		return Unknown
	}
	odd := errors.Is(err, errNoImage)
	// Under its name it is not. Is the file system there at all? What of the
	// path is left must be on it.
	var st unix.Statfs_t
	dir := filepath.Dir(p.Path)
	for dir != "/" && errors.Is(unix.Statfs(dir, &st), unix.ENOENT) {
		dir = filepath.Dir(dir)
	}
	if unix.Statfs(dir, &st) != nil || st.Fsid.Val != p.FSID {
		return Unknown
	}
	switch {
	case len(p.Handle) > 0:
	case odd:
		return Unknown // it may be what the image was written to
	default:
		return Gone
	}
	d, err := os.Open(dir)
	if err != nil {
		return Unknown
	}
	defer d.Close()
	f, err = openImage(unix.OpenByHandleAt(int(d.Fd()), unix.NewFileHandle(p.HandleType, p.Handle), readOnly))
	switch {
	case errors.Is(err, unix.ESTALE), errors.Is(err, unix.ENOENT):
		return Gone
	case err != nil:
		return Unknown // such as EPERM: not root
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return Unknown
	}
	// A file without a name is gone as soon as those are who have it open.
	if fi.Sys().(*syscall.Stat_t).Nlink == 0 {
		return Gone
	}
	return holds(f, id, header)
}

// readOnly opens what may be anything without waiting for its other end, as a FIFO does, and
// without taking a terminal.
const readOnly = unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NONBLOCK | unix.O_NOCTTY

// errNoImage: it is nothing that an image could be found in.
var errNoImage = errors.New("neither a regular file nor a block device")

// openImage is the file fd, unless err is not nil. Only a regular file is read: a user can put
// a device, or a link to one, where his file was, and that has no end.
func openImage(fd int, err error) (*os.File, error) {
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err = unix.Fstat(fd, &st); err == nil {
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			return os.NewFile(uintptr(fd), ""), nil
		case unix.S_IFBLK:
			err = errors.ErrUnsupported // an image may be on it, which is not looked for
		default:
			err = errNoImage
		}
	}
	unix.Close(fd)
	return nil, err
}

// file is an image in a regular file, from an offset to its end.
type file struct{ *io.SectionReader }

func (f file) Name() string         { return "" }
func (f file) Size() (int64, error) { return f.SectionReader.Size(), nil }

// holds tells whether f, a regular file with an image alone or behind somebody's header, holds
// image id. A file that can't be read, or is being written, is Unknown.
func holds(f *os.File, id uuid.UUID, header Header) State {
	other := Unknown // what a file is that holds no image
	var begin int64
	if header != nil {
		var err error
		if begin, err = header(f); err != nil {
			return Unknown
		}
		other = Gone
	}
	fi, err := f.Stat()
	if err != nil {
		return Unknown
	}
	in := file{io.NewSectionReader(f, begin, max(0, fi.Size()-begin))}
	head := make([]byte, len(image.Magic))
	if _, err := in.ReadAt(head, 0); err != nil && !errors.Is(err, io.EOF) {
		return Unknown
	} else if err != nil || string(head) != image.Magic {
		return other
	}
	ih, err := image.ReadHeader(in)
	switch {
	case err != nil:
		return Unknown
	case ih.UUID == id:
		return Present
	}
	return Gone
}
