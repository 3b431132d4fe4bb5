package vfs

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// How osFS gets from a name to a descriptor. Every name goes through at, every
// file through openFile, every directory through openDir.

// place is a name in a directory that is open.
type place struct {
	dir    int // unix.AT_FDCWD: the name has not been looked at yet
	base   string
	nofoll int // unix.O_NOFOLLOW or 0
}

func (p place) close() {
	if p.dir != unix.AT_FDCWD {
		unix.Close(p.dir)
	}
}

// at finds the directory that holds name. Below o.guarded it opens one
// directory after the other, each without following a link, so that nobody can
// put one in between the check and the use.
func (o osFS) at(name string) (place, error) {
	parts, err := o.below(name)
	if err != nil || len(parts) == 0 {
		return place{dir: unix.AT_FDCWD, base: name}, err
	}
	// A store may itself be named by a link.
	p := place{dir: unix.AT_FDCWD, base: o.guarded}
	for _, next := range parts {
		dir, err := p.open(unix.O_PATH | unix.O_DIRECTORY)
		p.close()
		if err != nil {
			return place{}, err
		}
		p = place{dir: dir, base: next, nofoll: unix.O_NOFOLLOW}
	}
	return p, nil
}

// below returns the components that lead from the guarded directory to name;
// none for that directory itself and for what is not below it.
func (o osFS) below(name string) ([]string, error) {
	if o.guarded == "" {
		return nil, nil
	}
	abs, err := filepath.Abs(name)
	if err != nil {
		return nil, err
	}
	rel, err := filepath.Rel(o.guarded, abs)
	if err != nil || rel == "." || rel == ".." || strings.HasPrefix(rel, "../") {
		return nil, nil
	}
	return strings.Split(rel, "/"), nil
}

// open opens the place. A link that is not followed is ErrLink, whichever errno
// the kernel has for it.
func (p place) open(flag int) (fd int, err error) {
	err = ignoringEINTR(func() error {
		fd, err = unix.Openat(p.dir, p.base, flag|p.nofoll|unix.O_CLOEXEC, 0o600)
		return err
	})
	if p.nofoll != 0 && (err == unix.ELOOP || err == unix.ENOTDIR) {
		var st unix.Stat_t
		if unix.Fstatat(p.dir, p.base, &st, unix.AT_SYMLINK_NOFOLLOW) == nil && st.Mode&unix.S_IFMT == unix.S_IFLNK {
			err = fmt.Errorf("%s: %w", p.base, ErrLink)
		}
	}
	return fd, err
}

// owner is who is to have a file that root makes in the place: below a guarded
// directory, whoever has the directory. What root does in another user's store would
// otherwise be of no use to him.
func (p place) owner() (uid, gid int, ok bool) {
	var st unix.Stat_t
	if p.dir == unix.AT_FDCWD || os.Geteuid() != 0 || unix.Fstat(p.dir, &st) != nil {
		return 0, 0, false
	}
	return int(st.Uid), int(st.Gid), st.Uid != 0
}

func openError(name string, err error) error {
	if err == nil {
		return nil
	}
	return &fs.PathError{Op: "open", Path: name, Err: err}
}

// openFile opens what must be a regular file or, outside of a guarded directory,
// a block device. O_NONBLOCK makes the open of anything else return, to be
// refused: a FIFO would wait for its other end, and no signal ends that.
func (o osFS) openFile(name string, flag int) (*os.File, error) {
	p, err := o.at(name)
	if err != nil {
		return nil, openError(name, err)
	}
	defer p.close()
	p.nofoll |= flag & unix.O_NOFOLLOW
	fd, err := p.open(flag | unix.O_NONBLOCK | unix.O_NOCTTY)
	if err != nil {
		if err == unix.ENXIO { // a socket, or a device without a driver
			err = fmt.Errorf("%w (%w)", ErrNotRegular, err)
		}
		return nil, openError(name, err)
	}
	var st unix.Stat_t
	err = unix.Fstat(fd, &st)
	if err == nil {
		err = checkKind(st.Mode, p.nofoll == 0)
	}
	if err == nil {
		err = unix.SetNonblock(fd, false)
	}
	// Whatever umask takes away, a file of ours is its owner's to read.
	if err == nil && flag&unix.O_CREAT != 0 && st.Mode&0o600 != 0o600 && int(st.Uid) == os.Geteuid() {
		err = unix.Fchmod(fd, 0o600)
	}
	// A file of several names may be there under one that is no business of this
	// directory's owner.
	if err == nil && flag&unix.O_CREAT != 0 && st.Uid == 0 && st.Nlink == 1 {
		if uid, gid, ok := p.owner(); ok {
			err = unix.Fchown(fd, uid, gid)
		}
	}
	if err != nil {
		unix.Close(fd)
		return nil, openError(name, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// checkKind refuses a file of st_mode that can't be a store's or an NVRAM file.
func checkKind(mode uint32, device bool) error {
	var what string
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		return nil
	case unix.S_IFBLK:
		if device {
			return nil
		}
		what = "a block device"
	case unix.S_IFDIR:
		return syscall.EISDIR
	case unix.S_IFCHR:
		what = "a character device"
	case unix.S_IFIFO:
		what = "a FIFO"
	case unix.S_IFSOCK:
		what = "a socket"
	default:
		what = "something else"
	}
	return fmt.Errorf("%w but %s", ErrNotRegular, what)
}

// openDir opens a directory to list or sync it.
func (o osFS) openDir(name string) (*os.File, error) {
	p, err := o.at(name)
	if err != nil {
		return nil, openError(name, err)
	}
	defer p.close()
	fd, err := p.open(unix.O_RDONLY | unix.O_DIRECTORY)
	if err != nil {
		return nil, openError(name, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// lookAt opens a name only to ask about it: nothing happens to a FIFO or device.
func (o osFS) lookAt(name string, nofollow int) (*os.File, error) {
	p, err := o.at(name)
	if err != nil {
		return nil, err
	}
	defer p.close()
	p.nofoll |= nofollow
	fd, err := p.open(unix.O_PATH)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

func (o osFS) stat(name string, nofollow int) (fs.FileInfo, error) {
	f, err := o.lookAt(name, nofollow)
	if err != nil {
		return nil, &fs.PathError{Op: "stat", Path: name, Err: err}
	}
	defer f.Close()
	return f.Stat()
}

func (o osFS) Stat(name string) (fs.FileInfo, error) {
	fi, err := o.stat(name, 0)
	if err == nil && fi.Mode()&fs.ModeSymlink != 0 { // O_PATH and O_NOFOLLOW open the link itself
		return nil, &fs.PathError{Op: "stat", Path: name, Err: ErrLink}
	}
	return fi, err
}

func (o osFS) Lstat(name string) (fs.FileInfo, error) { return o.stat(name, unix.O_NOFOLLOW) }

// ID is the file's handle (name_to_handle_at(2)), which has beside the inode's
// number one of its generation, so that it is nobody's who gets the number later;
// of a file system without handles, the inode's number alone.
func (o osFS) ID(name string) (string, error) {
	f, err := o.lookAt(name, 0)
	if err != nil {
		return "", &fs.PathError{Op: "stat", Path: name, Err: err}
	}
	defer f.Close()
	if h, _, err := unix.NameToHandleAt(int(f.Fd()), "", unix.AT_EMPTY_PATH); err == nil {
		return fmt.Sprintf("handle %d %x", h.Type(), h.Bytes()), nil
	}
	fi, err := f.Stat()
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("inode %d", fi.Sys().(*syscall.Stat_t).Ino), nil
}

func (o osFS) ReadDir(dir string) ([]fs.DirEntry, error) {
	d, err := o.openDir(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	list, err := d.ReadDir(-1)
	slices.SortFunc(list, func(a, b fs.DirEntry) int { return cmp.Compare(a.Name(), b.Name()) })
	return list, err
}

func (o osFS) ReadStamps(dir string, look func(name string) bool) ([]Stamped, error) {
	d, err := o.openDir(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	entries, err := d.ReadDir(-1)
	if err != nil {
		return nil, err
	}
	slices.SortFunc(entries, func(a, b fs.DirEntry) int { return cmp.Compare(a.Name(), b.Name()) })
	list := make([]Stamped, 0, len(entries))
	fd := int(d.Fd())
	for _, e := range entries {
		name := e.Name()
		if look != nil && !look(name) {
			list = append(list, Stamped{Name: name, Type: e.Type()})
			continue
		}
		var st unix.Stat_t
		err := ignoringEINTR(func() error { return unix.Fstatat(fd, name, &st, unix.AT_SYMLINK_NOFOLLOW) })
		if err == unix.ENOENT {
			continue
		}
		if err != nil {
			return nil, &fs.PathError{Op: "stat", Path: filepath.Join(dir, name), Err: err}
		}
		list = append(list, Stamped{name, fileType(st.Mode), Stamp{st.Size, st.Mtim.Nano(), st.Ctim.Nano(), st.Ino}})
	}
	return list, nil
}

// fileType is the type in st_mode. The store knows regular files and directories; all
// else is the same to it.
func fileType(mode uint32) fs.FileMode {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		return 0
	case unix.S_IFDIR:
		return fs.ModeDir
	}
	return fs.ModeIrregular
}

func (o osFS) SyncDir(dir string) error {
	d, err := o.openDir(dir)
	if err != nil {
		return err
	}
	err = d.Sync()
	if errors.Is(err, syscall.EINVAL) {
		err = nil // a file system without directory sync has nothing to lose
	}
	return errors.Join(err, d.Close())
}

// mkdir makes one directory, of mode 0700 whatever umask takes away: one that
// its owner can't enter would be of no use to anybody.
func (o osFS) mkdir(name string) error {
	p, err := o.at(name)
	if err == nil {
		defer p.close()
		err = unix.Mkdirat(p.dir, p.base, 0o700)
	}
	var st unix.Stat_t
	if err == nil {
		err = unix.Fstatat(p.dir, p.base, &st, unix.AT_SYMLINK_NOFOLLOW)
	}
	if err == nil && st.Mode&0o700 != 0o700 {
		err = unix.Fchmodat(p.dir, p.base, 0o700, unix.AT_SYMLINK_NOFOLLOW)
		if err == unix.EOPNOTSUPP || err == unix.ENOSYS { // before Linux 6.6
			err = unix.Fchmodat(p.dir, p.base, 0o700, 0)
		}
	}
	if err == nil {
		if uid, gid, ok := p.owner(); ok {
			err = unix.Fchownat(p.dir, p.base, uid, gid, unix.AT_SYMLINK_NOFOLLOW)
		}
	}
	if err != nil {
		return &fs.PathError{Op: "mkdir", Path: name, Err: err}
	}
	return nil
}

func (o osFS) Remove(name string) error {
	p, err := o.at(name)
	if err == nil {
		defer p.close()
		err = ignoringEINTR(func() error { return unix.Unlinkat(p.dir, p.base, 0) })
	}
	if err == unix.EISDIR || err == unix.EPERM { // POSIX has EPERM for a directory
		if derr := unix.Unlinkat(p.dir, p.base, unix.AT_REMOVEDIR); derr != unix.ENOTDIR {
			err = derr
		}
	}
	if err != nil {
		return &fs.PathError{Op: "remove", Path: name, Err: err}
	}
	return nil
}

func (o osFS) Rename(oldname, newname string) error {
	return o.rename(oldname, newname, func(from, to place) error {
		err := unix.Renameat2(from.dir, from.base, to.dir, to.base, unix.RENAME_NOREPLACE)
		if err == unix.EINVAL || err == unix.ENOSYS {
			// NFS and a few FUSE file systems.
			err = linkAndUnlink(from, to, unix.Unlinkat)
		}
		return err
	})
}

// linkAndUnlink is Rename with a hard link, which is the other operation that is atomic and
// never replaces. If unlink fails, the new name is taken back; if that fails as well, the file
// has both. An NFS client may send again what was carried out and not answered, and is then
// told that the new name is there, or the old one gone: so it is looked whose it is.
func linkAndUnlink(from, to place, unlink func(dir int, base string, flags int) error) error {
	err := unix.Linkat(from.dir, from.base, to.dir, to.base, 0)
	if err == unix.EEXIST && isSecondName(from, to) {
		err = nil
	}
	if err != nil {
		return err
	}
	if err = unlink(from.dir, from.base, 0); err == nil || err == unix.ENOENT {
		return nil
	}
	_ = unlink(to.dir, to.base, 0)
	return err
}

// isSecondName tells whether a and b are two names of one file.
func isSecondName(a, b place) bool {
	var x, y unix.Stat_t
	return unix.Fstatat(a.dir, a.base, &x, unix.AT_SYMLINK_NOFOLLOW) == nil &&
		unix.Fstatat(b.dir, b.base, &y, unix.AT_SYMLINK_NOFOLLOW) == nil &&
		x.Dev == y.Dev && x.Ino == y.Ino && x.Nlink > 1
}

func (o osFS) Link(oldname, newname string) error {
	err := o.rename(oldname, newname, func(from, to place) error {
		err := unix.Linkat(from.dir, from.base, to.dir, to.base, 0)
		if err == unix.EPERM || err == unix.EOPNOTSUPP || err == unix.ENOSYS || err == unix.EMLINK {
			err = fmt.Errorf("%w (%w)", errors.ErrUnsupported, err)
		}
		return err
	})
	var le *os.LinkError
	if errors.As(err, &le) {
		le.Op = "link"
	}
	return err
}

func (o osFS) Replace(oldname, newname string) error {
	return o.rename(oldname, newname, func(from, to place) error {
		return unix.Renameat(from.dir, from.base, to.dir, to.base)
	})
}

func (o osFS) rename(oldname, newname string, do func(from, to place) error) error {
	from, err := o.at(oldname)
	if err == nil {
		defer from.close()
		var to place
		if to, err = o.at(newname); err == nil {
			defer to.close()
			err = ignoringEINTR(func() error { return do(from, to) })
		}
	}
	if err != nil {
		return &os.LinkError{Op: "rename", Old: oldname, New: newname, Err: err}
	}
	return nil
}
