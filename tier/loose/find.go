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
	f, err := os.Open(p.Path)
	if err == nil {
		s := holds(f, id, header)
		f.Close()
		if s != Gone {
			return s
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return Unknown
	}
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
	if len(p.Handle) == 0 {
		return Gone
	}
	d, err := os.Open(dir)
	if err != nil {
		return Unknown
	}
	defer d.Close()
	fd, err := unix.OpenByHandleAt(int(d.Fd()), unix.NewFileHandle(p.HandleType, p.Handle), unix.O_RDONLY|unix.O_CLOEXEC)
	switch {
	case errors.Is(err, unix.ESTALE), errors.Is(err, unix.ENOENT):
		return Gone
	case err != nil:
		return Unknown // such as EPERM: not root
	}
	f = os.NewFile(uintptr(fd), p.Path)
	defer f.Close()
	fi, err := f.Stat()
	if err != nil || !fi.Mode().IsRegular() {
		return Unknown
	}
	// A file without a name is gone as soon as those are who have it open.
	if fi.Sys().(*syscall.Stat_t).Nlink == 0 {
		return Gone
	}
	return holds(f, id, header)
}

// holds tells whether f, an image alone or behind somebody's header, holds image
// id. A file that can't be read, or is being written, is Unknown.
func holds(f *os.File, id uuid.UUID, header Header) State {
	other := Unknown // what a file is that holds no image
	if header != nil {
		n, err := header(f)
		if err != nil {
			return Unknown
		}
		if _, err := f.Seek(n, io.SeekStart); err != nil {
			return Unknown
		}
		other = Gone
	}
	in, err := NewIn(f, nil, "")
	if err != nil {
		return Unknown
	}
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
