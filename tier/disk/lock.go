package disk

import (
	"io/fs"

	"golang.org/x/sys/unix"
)

// QEMU's image locks (block/file-posix.c): who has a permission on an image holds a
// shared lock on the byte 100 + its number.
const (
	permissionByte   = 100
	permissionWrite  = 1 // BLK_PERM_WRITE
	permissionResize = 3 // BLK_PERM_RESIZE
)

// Writer tells whether a QEMU, qemu-nbd or qemu-img has the layer open with the right to
// change it. It takes no lock to find out. Others that write, and QEMUs that were told
// to lock nothing, are not seen.
func (i *Image) Writer() (bool, error) {
	for _, p := range []int64{permissionWrite, permissionResize} {
		lk := unix.Flock_t{Type: unix.F_WRLCK, Start: permissionByte + p, Len: 1}
		if err := unix.FcntlFlock(i.file.Fd(), unix.F_OFD_GETLK, &lk); err != nil {
			return false, &fs.PathError{Op: "look for locks", Path: i.id.Path, Err: err}
		}
		if lk.Type != unix.F_UNLCK {
			return true, nil
		}
	}
	return false, nil
}
