package vfs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// OS is the operating system's file system.
var OS FS = osFS{}

type osFS struct{}

type osFile struct {
	*os.File
}

func open(name string, flag int) (File, error) {
	f, err := os.OpenFile(name, flag, 0o600)
	if err != nil {
		return nil, err
	}
	return &osFile{f}, nil
}

func (osFS) Create(name string) (File, error) {
	return open(name, os.O_RDWR|os.O_CREATE|os.O_EXCL)
}
func (osFS) Open(name string) (File, error)   { return open(name, os.O_RDONLY) }
func (osFS) OpenRW(name string) (File, error) { return open(name, os.O_RDWR) }

func (o osFS) MkdirAll(dir string) error {
	dir = filepath.Clean(dir)
	// Down from the deepest directory that exists: whoever sees a directory
	// then knows that its parents were synced before it was made.
	fi, err := os.Stat(dir)
	if err == nil {
		if !fi.IsDir() {
			return &fs.PathError{Op: "mkdir", Path: dir, Err: syscall.ENOTDIR}
		}
		err = o.SyncDir(filepath.Dir(dir))
		// A parent that we may not read is not one in which somebody like
		// us has just made a directory.
		if errors.Is(err, fs.ErrPermission) {
			err = nil
		}
		return err
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	parent := filepath.Dir(dir)
	if err := o.MkdirAll(parent); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return o.SyncDir(parent)
}

func (osFS) Rename(oldname, newname string) error {
	err := unix.Renameat2(unix.AT_FDCWD, oldname, unix.AT_FDCWD, newname, unix.RENAME_NOREPLACE)
	if err == unix.EINVAL || err == unix.ENOSYS {
		// NFS and a few FUSE file systems. A hard link is the other
		// operation that is atomic and never replaces.
		if err = unix.Link(oldname, newname); err == nil {
			err = unix.Unlink(oldname)
		}
	}
	if err != nil {
		return &os.LinkError{Op: "rename", Old: oldname, New: newname, Err: err}
	}
	return nil
}

func (osFS) Replace(oldname, newname string) error     { return os.Rename(oldname, newname) }
func (osFS) Remove(name string) error                  { return os.Remove(name) }
func (osFS) ReadDir(dir string) ([]fs.DirEntry, error) { return os.ReadDir(dir) }
func (osFS) Stat(name string) (fs.FileInfo, error)     { return os.Stat(name) }

func (osFS) SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	err = d.Sync()
	if errors.Is(err, syscall.EINVAL) {
		err = nil // a file system without directory sync has nothing to lose
	}
	return errors.Join(err, d.Close())
}

func (o osFS) Lock(ctx context.Context, name string, mode LockMode) (Locked, error) {
	return WaitLock(ctx, name, func() (Locked, error) { return o.TryLock(name, mode) })
}

func (osFS) TryLock(name string, mode LockMode) (Locked, error) {
	for {
		f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
		if errors.Is(err, syscall.EROFS) || errors.Is(err, fs.ErrPermission) {
			// flock needs no write permission, so a store can be read by
			// those who may only read it.
			f, err = os.Open(name)
		}
		if err != nil {
			return nil, err
		}
		if err := flock(f, mode); err != nil {
			f.Close()
			return nil, err
		}
		// Between open and flock the holder before us may have removed the
		// file: then this lock is on a file that nobody else will open.
		have, err := f.Stat()
		if err != nil {
			f.Close()
			return nil, err
		}
		if now, err := os.Stat(name); err == nil && os.SameFile(have, now) {
			return f, nil
		}
		f.Close()
	}
}

func (osFS) StatFS(name string) (FSInfo, error) {
	var st unix.Statfs_t
	if err := ignoringEINTR(func() error { return unix.Statfs(name, &st) }); err != nil {
		return FSInfo{}, &fs.PathError{Op: "statfs", Path: name, Err: err}
	}
	info := FSInfo{
		Total: int64(st.Blocks) * st.Frsize,
		Free:  int64(st.Bavail) * st.Frsize,
	}
	// The types that matter to a user of a store or NVRAM file; statfs(2).
	switch uint32(st.Type) {
	case unix.EXT4_SUPER_MAGIC:
		info.Type = "ext4" // and ext2, ext3
	case unix.XFS_SUPER_MAGIC:
		info.Type = "xfs"
	case unix.BTRFS_SUPER_MAGIC:
		info.Type = "btrfs"
	case unix.F2FS_SUPER_MAGIC:
		info.Type = "f2fs"
	case unix.NFS_SUPER_MAGIC:
		info.Type = "nfs"
	case unix.OVERLAYFS_SUPER_MAGIC:
		info.Type = "overlay"
	case unix.FUSE_SUPER_MAGIC:
		info.Type = "fuse"
	case 0x2fc12fc1:
		info.Type = "zfs"
	case unix.TMPFS_MAGIC:
		info.Type, info.Volatile = "tmpfs", true
	case unix.RAMFS_MAGIC:
		info.Type, info.Volatile = "ramfs", true
	case unix.HUGETLBFS_MAGIC:
		info.Type, info.Volatile = "hugetlbfs", true
	default:
		info.Type = fmt.Sprintf("%#x", uint32(st.Type))
	}
	return info, nil
}

func (f *osFile) pathError(op string, err error) error {
	if err == nil {
		return nil
	}
	return &fs.PathError{Op: op, Path: f.Name(), Err: err}
}

func (f *osFile) Size() (int64, error) {
	fi, err := f.Stat()
	if err != nil {
		return 0, err
	}
	if fi.Mode().IsRegular() {
		return fi.Size(), nil
	}
	if fi.Mode()&fs.ModeCharDevice != 0 {
		// A device-DAX node can be mapped only: no read, write or fsync,
		// and its lines must be flushed by user code. Its file-system or
		// block form does all this in the kernel.
		return 0, f.pathError("size", fmt.Errorf("a character device can't hold an NVRAM file (use /dev/pmem* or a file on a file system mounted with -o dax): %w", errors.ErrUnsupported))
	}
	var size uint64
	err = f.control(func(fd int) error {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.BLKGETSIZE64, uintptr(unsafe.Pointer(&size)))
		if errno != 0 {
			return errno
		}
		return nil
	})
	return int64(size), f.pathError("size", err)
}

// control runs fn with the file descriptor, which stays open meanwhile. It keeps
// the file in the runtime's poller, which File.Fd would not.
func (f *osFile) control(fn func(fd int) error) error {
	c, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var fnErr error
	err = c.Control(func(fd uintptr) {
		fnErr = ignoringEINTR(func() error { return fn(int(fd)) })
	})
	if err != nil {
		return err
	}
	return fnErr
}

func ignoringEINTR(fn func() error) error {
	for {
		if err := fn(); err != unix.EINTR {
			return err
		}
	}
}

func (f *osFile) Allocate(off, n int64) error {
	err := f.control(func(fd int) error { return unix.Fallocate(fd, 0, off, n) })
	if err == unix.EOPNOTSUPP || err == unix.ENOSYS || err == unix.ENODEV {
		err = fmt.Errorf("%w (%w)", errors.ErrUnsupported, err)
	}
	return f.pathError("fallocate", err)
}

func (f *osFile) StartWriteback(off, n int64) {
	f.control(func(fd int) error {
		return unix.SyncFileRange(fd, off, n, unix.SYNC_FILE_RANGE_WRITE)
	})
}

func (f *osFile) DropCache() {
	f.control(func(fd int) error { return unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED) })
}

func (f *osFile) Lock(ctx context.Context, mode LockMode) error {
	_, err := WaitLock(ctx, f.Name(), func() (struct{}, error) {
		return struct{}{}, f.TryLock(mode)
	})
	return err
}

func (f *osFile) TryLock(mode LockMode) error { return flock(f.File, mode) }

func (f *osFile) Unlock() error {
	return f.pathError("unlock", f.control(func(fd int) error { return unix.Flock(fd, unix.LOCK_UN) }))
}

func flock(f *os.File, mode LockMode) error {
	how := unix.LOCK_SH
	if mode == Exclusive {
		how = unix.LOCK_EX
	}
	of := &osFile{f}
	err := of.control(func(fd int) error { return unix.Flock(fd, how|unix.LOCK_NB) })
	if err == unix.EWOULDBLOCK {
		err = ErrLocked
	}
	return of.pathError("lock", err)
}

// WaitLock repeats try until it doesn't say ErrLocked any more, or until ctx is
// done. It is for implementations of FS and File. A blocking flock
// would be fairer, but can be neither cancelled nor timed out. The pauses grow
// to 20 ms: locks here are held for milliseconds (allocation) or for a whole
// save, and neither is worth more wake-ups.
func WaitLock[T any](ctx context.Context, name string, try func() (T, error)) (T, error) {
	pause := 500 * time.Microsecond
	for {
		l, err := try()
		if !errors.Is(err, ErrLocked) {
			return l, err
		}
		select {
		case <-ctx.Done():
			return l, &fs.PathError{Op: "lock", Path: name, Err: context.Cause(ctx)}
		case <-time.After(pause):
			pause = min(2*pause, 20*time.Millisecond)
		}
	}
}

func addrOf(b []byte) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(b))) }

// osMapping is a shared mapping. The mutex keeps Close from unmapping under a
// Sync or an advice of another goroutine.
type osMapping struct {
	mu   sync.RWMutex
	name string
	b    []byte
}

func (f *osFile) Map(off, n int64, writable bool) (Mapping, error) {
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	if off < 0 || n <= 0 || off%int64(os.Getpagesize()) != 0 || n > size-off || n != int64(int(n)) {
		return nil, f.pathError("mmap", fmt.Errorf("range %d+%d of %d bytes: %w", off, n, size, syscall.EINVAL))
	}
	prot := unix.PROT_READ
	if writable {
		prot |= unix.PROT_WRITE
	}
	var b []byte
	err = f.control(func(fd int) error {
		// MAP_SYNC: on DAX a page that can be written has its metadata on
		// the medium already, so that the write-back of cache lines alone
		// makes data durable. Elsewhere the kernel refuses it.
		var err error
		if writable {
			b, err = unix.Mmap(fd, off, int(n), prot, unix.MAP_SHARED_VALIDATE|unix.MAP_SYNC)
			if err == nil {
				return nil
			}
		}
		b, err = unix.Mmap(fd, off, int(n), prot, unix.MAP_SHARED)
		return err
	})
	if err != nil {
		return nil, f.pathError("mmap", err)
	}
	return &osMapping{name: f.Name(), b: b}, nil
}

func (m *osMapping) Bytes() []byte { return m.b }

// pages returns the mapped bytes of [off, off+n) widened to whole pages, as
// msync and madvise want them.
func (m *osMapping) pages(off, n int64) []byte {
	page := int64(os.Getpagesize())
	first := max(off, 0) &^ (page - 1)
	end := min(off+n, int64(len(m.b)))
	if first >= end {
		return nil
	}
	return m.b[first:end]
}

func (m *osMapping) Sync(off, n int64) error {
	m.mu.RLock()
	defer m.mu.RUnlock()
	err := error(unix.EINVAL)
	if m.b != nil && off >= 0 && n >= 0 && n <= int64(len(m.b))-off {
		if n == 0 {
			return nil
		}
		// On DAX this writes back the CPU's cache lines, in the kernel,
		// which knows the right instruction.
		err = unix.Msync(m.pages(off, n), unix.MS_SYNC)
	}
	if err != nil {
		return &fs.PathError{Op: "msync", Path: m.name, Err: err}
	}
	return nil
}

func (m *osMapping) advise(off, n int64, advice int) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if b := m.pages(off, n); len(b) > 0 {
		unix.Madvise(b, advice) // advice: a refusal costs speed, not data
	}
}

func (m *osMapping) WillNeed(off, n int64) { m.advise(off, n, unix.MADV_WILLNEED) }
func (m *osMapping) DontNeed(off, n int64) { m.advise(off, n, unix.MADV_DONTNEED) }

func (m *osMapping) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.b == nil {
		return nil
	}
	err := unix.Munmap(m.b)
	m.b = nil
	if err != nil {
		return &fs.PathError{Op: "munmap", Path: m.name, Err: err}
	}
	return nil
}
