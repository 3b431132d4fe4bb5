package vfs

import (
	"errors"
	"fmt"
	"io"
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

type osFS struct {
	guarded string // the directory of NoLinks, absolute; empty for none
}

func (o osFS) NoLinks(dir string) (FS, error) {
	abs, err := filepath.Abs(dir)
	return osFS{guarded: abs}, err
}

type osFile struct {
	*os.File
	fs osFS   // that has opened it; of no use to a lock file
	of string // the directory of a file without a name
}

func (f *osFile) Name() string {
	if f.of != "" {
		return Unnamed(f.of)
	}
	return f.File.Name()
}

func (o osFS) open(name string, flag int) (File, error) {
	f, err := o.openFile(name, flag)
	if err != nil {
		return nil, err
	}
	return &osFile{File: f, fs: o}, nil
}

func (o osFS) Create(name string) (File, error) {
	return o.open(name, os.O_RDWR|os.O_CREATE|os.O_EXCL)
}
func (o osFS) Open(name string) (File, error)   { return o.open(name, os.O_RDONLY) }
func (o osFS) OpenRW(name string) (File, error) { return o.open(name, os.O_RDWR) }

func (o osFS) CreateUnnamed(dir string) (File, error) {
	file, err := o.openFile(dir, os.O_RDWR|unix.O_TMPFILE)
	// EISDIR is of a kernel, or a file system, that does not know the flag.
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EISDIR) || errors.Is(err, unix.EINVAL) {
		err = openError(dir, fmt.Errorf("%w (%w)", errors.ErrUnsupported, err))
	}
	if err != nil {
		return nil, err
	}
	f := &osFile{file, o, dir}
	err = f.control(func(fd int) error {
		if _, err := os.Lstat(selfFd(fd)); err != nil { // it could get no name later
			return fmt.Errorf("%w (%w)", errors.ErrUnsupported, err)
		}
		return unix.Fchmod(fd, 0o600) // whatever umask takes away
	})
	if err == nil {
		err = o.give(f, dir)
	}
	if err != nil {
		f.Close()
		return nil, openError(dir, err)
	}
	return f, nil
}

// give makes the owner of dir the file's, if root has made it in a guarded directory.
func (o osFS) give(f *osFile, dir string) error {
	p, err := o.at(filepath.Join(dir, "any"))
	if err != nil {
		return err
	}
	defer p.close()
	if uid, gid, ok := p.owner(); ok {
		return f.Chown(uid, gid)
	}
	return nil
}

// selfFd is a name that an open file has for its process.
func selfFd(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }

func (f *osFile) LinkAs(name string) error {
	p, err := f.fs.at(name)
	if err == nil {
		defer p.close()
		err = f.control(func(fd int) error {
			return ignoringEINTR(func() error {
				return unix.Linkat(unix.AT_FDCWD, selfFd(fd), p.dir, p.base, unix.AT_SYMLINK_FOLLOW)
			})
		})
	}
	if err != nil {
		return &os.LinkError{Op: "link", Old: f.Name(), New: name, Err: err}
	}
	return nil
}

func (o osFS) MkdirAll(dir string) error {
	dir = filepath.Clean(dir)
	// Down from the deepest directory that exists: whoever sees a directory
	// then knows that its parents were synced before it was made.
	fi, err := o.Stat(dir)
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
	if err := o.mkdir(dir); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return o.SyncDir(parent)
}

func (o osFS) StatFS(name string) (FSInfo, error) {
	var st unix.Statfs_t
	f, err := o.lookAt(name, 0)
	if err == nil {
		defer f.Close()
		err = ignoringEINTR(func() error { return unix.Fstatfs(int(f.Fd()), &st) })
	}
	if err != nil {
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

func (f *osFile) Links() (int, error) {
	fi, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return int(fi.Sys().(*syscall.Stat_t).Nlink), nil
}

func (f *osFile) Inode() (uint64, error) {
	fi, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return fi.Sys().(*syscall.Stat_t).Ino, nil
}

func (f *osFile) Restrict() error {
	fi, err := f.Stat()
	if err != nil || !fi.Mode().IsRegular() || fi.Mode().Perm()&0o077 == 0 {
		return err
	}
	err = f.control(func(fd int) error { return unix.Fchmod(fd, 0o600) })
	if err != nil {
		err = fmt.Errorf("mode %04o lets other users in, and is not changed to 0600: %w", fi.Mode().Perm(), err)
	}
	return f.pathError("chmod", err)
}

func (f *osFile) GiveTo(dir fs.FileInfo) error {
	st, ok := dir.Sys().(*syscall.Stat_t)
	if !ok || os.Geteuid() != 0 || st.Uid == 0 {
		return nil
	}
	return f.pathError("chown", f.control(func(fd int) error { return unix.Fchown(fd, int(st.Uid), int(st.Gid)) }))
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

func (f *osFile) Punch(off, n int64) error {
	err := f.control(func(fd int) error {
		return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	})
	if err == unix.EOPNOTSUPP || err == unix.ENOSYS || err == unix.ENODEV {
		err = fmt.Errorf("%w (%w)", errors.ErrUnsupported, err)
	}
	return f.pathError("punch", err)
}

func (f *osFile) Clone(name string) error {
	src, err := osFS{}.openFile(name, os.O_RDONLY)
	if err != nil {
		return err
	}
	defer src.Close()
	// The descriptor is used while src is open: it is closed behind this.
	err = f.control(func(fd int) error { return unix.IoctlFileClone(fd, int(src.Fd())) })
	switch err {
	case unix.EOPNOTSUPP, unix.ENOSYS, unix.ENOTTY, unix.EXDEV, unix.EINVAL:
		err = fmt.Errorf("%w (%w)", errors.ErrUnsupported, err)
	}
	return f.pathError("clone", err)
}

func (f *osFile) SetModified(at time.Time) error {
	ts := unix.NsecToTimespec(at.UnixNano())
	times := []unix.Timespec{{Nsec: unix.UTIME_OMIT}, ts}
	return f.pathError("utimens", f.control(func(fd int) error {
		// The descriptor's own file, whatever has its name: no path is looked up.
		return unix.UtimesNanoAt(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd), times, 0)
	}))
}

func (f *osFile) Allocated() (int64, error) {
	fi, err := f.Stat()
	if err != nil {
		return 0, err
	}
	if fi.Mode().IsRegular() {
		return fi.Sys().(*syscall.Stat_t).Blocks * 512, nil // stat(2): whatever the block size is
	}
	return f.Size() // a device has no holes
}

func (f *osFile) Data(off int64) (int64, error) {
	var at int64
	err := f.control(func(fd int) (err error) {
		at, err = unix.Seek(fd, off, unix.SEEK_DATA)
		return err
	})
	switch err {
	case unix.ENXIO: // nothing but a hole from off to the end
		return 0, io.EOF
	case unix.EINVAL, unix.EOPNOTSUPP, unix.ENOTTY: // it does not know: all may be data
		return off, nil
	}
	return at, f.pathError("seek", err)
}

func (f *osFile) StartWriteback(off, n int64) {
	f.control(func(fd int) error {
		return unix.SyncFileRange(fd, off, n, unix.SYNC_FILE_RANGE_WRITE)
	})
}

func (f *osFile) DropCache() {
	f.control(func(fd int) error { return unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED) })
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
