package disk

import (
	"os"
	"path/filepath"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// unwritten tells whether the file system has put off to decide where parts of a file go:
// then they are in no disk yet (ioctl_fiemap(2)). One that does not say has none.
func unwritten(t *testing.T, path string) bool {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var m struct {
		start, length                   uint64
		flags, mapped, count, reserved0 uint32
		extents                         [64]struct {
			logical, physical, length uint64
			reserved64                [2]uint64
			flags                     uint32
			reserved                  [3]uint32
		}
	}
	m.length, m.count = 1<<62, uint32(len(m.extents))
	const fiemap, delayed = 0xc020660b, 4 // FS_IOC_FIEMAP, FIEMAP_EXTENT_DELALLOC
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), fiemap, uintptr(unsafe.Pointer(&m))); errno != 0 {
		if errno == unix.EOPNOTSUPP || errno == unix.ENOTTY {
			return false
		}
		t.Fatal(errno)
	}
	for _, e := range m.extents[:m.mapped] {
		if e.flags&delayed != 0 {
			return true
		}
	}
	return false
}

// TestDurable: an image that was written a moment ago is durable when it has an index:
// checkpoints that refer to it say that they are.
func TestDurable(t *testing.T) {
	path := write(t, filepath.Join(t.TempDir(), "disk"), content(4<<20, 3))
	if before := unwritten(t, path); !before {
		t.Log("this file system does not tell what it has not written yet, or has written it already")
	}
	if _, err := catalog(t).Build(t.Context(), mustOpen(t, path), BuildOptions{Frozen: true}); err != nil {
		t.Fatal(err)
	}
	if unwritten(t, path) {
		t.Error("the index is there, and what it is of is not written")
	}
}
