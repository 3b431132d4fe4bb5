package disk

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// Identity tells a layer from what it was at another time. It is stored, as JSON, in
// indexes and in checkpoints.
type Identity struct {
	Path   string `json:"path"` // of the file: absolute, links resolved
	Format Format `json:"format"`
	Size   int64  `json:"size"` // of the disk, in bytes, as the guest has it
	File   File   `json:"file"`
}

// File is what the file system says of a layer's file.
type File struct {
	Size  int64  `json:"size"`  // in bytes
	Mtime int64  `json:"mtime"` // when its content was changed, ns since 1970
	Ctime int64  `json:"ctime"` // when anything of it was, the owner too
	Inode uint64 `json:"inode"`
}

// maxPath is PATH_MAX, without which no file can be opened by its name.
const maxPath = 4096

// Check refuses an identity, which was read from somewhere, that is none of a layer's.
func (id Identity) Check() error {
	if !filepath.IsAbs(id.Path) || len(id.Path) > maxPath {
		return errors.New("the path of a disk image is not absolute, or too long")
	}
	if id.Format != Raw && id.Format != Qcow2 {
		return fmt.Errorf("%s: disk images of format %.40q are not known here", id.Path, string(id.Format))
	}
	if id.Size < 0 || id.Size > maxSize || id.File.Size < 0 {
		return fmt.Errorf("%s: %d bytes are no size of a disk image", id.Path, id.Size)
	}
	return nil
}

// Differs says in what now is another than id, in a user's words and to follow a file's
// name; "" if it is the same. Paths are not compared: a file that was moved is the same
// one.
//
// Nor is when the file's attributes were changed: libvirt sets a backing file's owner
// and labels whenever it starts a domain. Touched tells that.
func (id Identity) Differs(now Identity) string {
	switch {
	case id.Format != now.Format:
		return fmt.Sprintf("is %s now, and was %s", now.Format, id.Format)
	case id.File.Inode != now.File.Inode:
		return "is another file now, which has taken the place of the one that was there"
	case id.Size < now.Size:
		return fmt.Sprintf("was made larger: the disk has %d bytes now, and had %d", now.Size, id.Size)
	case id.Size > now.Size:
		return fmt.Sprintf("was made smaller: the disk has %d bytes now, and had %d", now.Size, id.Size)
	case id.File.Size > now.File.Size:
		return fmt.Sprintf("was cut: the file has %d bytes now, and had %d", now.File.Size, id.File.Size)
	case id.File.Mtime != now.File.Mtime || id.File.Size != now.File.Size:
		return fmt.Sprintf("was written to, last at %s", time.Unix(0, now.File.Mtime).UTC().Format(time.RFC3339Nano))
	}
	return ""
}

// Touched tells whether attributes of the file were changed since, as its owner: or
// the time of the last change was set by hand, to hide one.
func (id Identity) Touched(now Identity) bool { return id.File.Ctime != now.File.Ctime }

// fileOf asks the file system.
func fileOf(f *os.File) (File, error) {
	fi, err := f.Stat()
	if err != nil {
		return File{}, err
	}
	st := fi.Sys().(*syscall.Stat_t)
	return File{fi.Size(), st.Mtim.Nano(), st.Ctim.Nano(), st.Ino}, nil
}
