// Package crashfs is a file system in memory that loses what was not synced and
// fails on demand. Tests run a save on it, cut it off at each of its operations,
// and look at what a reader finds afterwards.
//
// # What survives a power cut
//
// [FS.CrashClone] makes the disk as a power cut would leave it. The model is
// what ext4, XFS and the drives beneath them may do at their worst, not what
// they usually do:
//
//   - Data. A synced sector (512 bytes) has its synced content. A sector written
//     since has the old content, the new, or any content that it had in between
//     and that the kernel happened to write back; neighbours are independent, in
//     sectors or in pages of 4 KiB. That holds for writes through a mapping too.
//   - Size. Anything between the synced and the current length; bytes that never
//     reached the disk read as zero.
//   - Names. Operations in one directory survive in order: if one is lost, so
//     are all later ones there. Different directories are independent, but a
//     rename between two of them happens in both or in neither. (A journal keeps
//     one order for the whole file system; POSIX promises none. The order in one
//     directory is what commit protocols rely on, so it is kept and no more.)
//     Syncing a file does not sync its name.
//   - A failed sync loses for good what was dirty: a second one reports success
//     and writes nothing but what has changed since, as Linux does.
//
// # What survives a process
//
// [FS.KillAt] ends a process at one of its operations. All it wrote is there
// for the next process ([FS.Fork]), synced or not; its locks are gone, and
// stores to its mappings no longer reach the file.
//
// Writing through a mapping to blocks that were not allocated panics: on a full
// disk it would have been a SIGBUS.
package crashfs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// ErrKilled is what every operation of a killed process returns.
var ErrKilled = errors.New("process killed")

// disk is what all processes share. Its mutex covers everything, the inodes and
// the processes' own state included: tests need order, not speed.
type disk struct {
	mu        sync.Mutex
	capacity  int64 // bytes; 0 is no limit
	used      int64
	volatile  bool
	noClones  bool
	noUnnamed bool
	root      *inode
	pending   []dirOp    // name changes not synced, oldest first
	rnd       *rand.Rand // the kernel's mood: write-back, how far a killed write got
}

// dirOp is one atomic change of one or two directory entries.
type dirOp []edit

type edit struct {
	dir   *inode
	name  string
	inode *inode // nil removes the entry
}

// FS is one process's view of a simulated disk.
type FS struct {
	d        *disk
	files    map[*file]bool
	mappings map[*mapping]bool
	faults   faults
}

var _ vfs.FS = (*FS)(nil)

// New returns an empty disk of a capacity in bytes (0: no limit), as seen by its
// first process. The root directory is "/"; relative names start there.
func New(capacity int64) *FS {
	d := &disk{
		capacity: capacity,
		root:     newInode(fs.ModeDir | 0o700),
		rnd:      rand.New(rand.NewPCG(1, 2)),
	}
	return d.process()
}

func (d *disk) process() *FS {
	return &FS{d: d, files: map[*file]bool{}, mappings: map[*mapping]bool{}}
}

// Fork returns another process's view of the same disk: with its own open
// files, locks, operation count and faults. After a kill it is the process that
// comes next.
func (f *FS) Fork() *FS { return f.d.process() }

// SetVolatile makes StatFS call the disk a tmpfs.
func (f *FS) SetVolatile(v bool) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	f.d.volatile = v
}

// SetNoUnnamed makes it a file system without nameless files, as NFS is one.
func (f *FS) SetNoUnnamed(v bool) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	f.d.noUnnamed = v
}

// SetNoClones makes it a file system whose files share no blocks.
func (f *FS) SetNoClones(v bool) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	f.d.noClones = v
}

// CrashClone returns a new disk as a power cut would leave this one, which is
// not changed. What survives of the unsynced is decided by seed.
func (f *FS) CrashClone(seed uint64) *FS {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	rnd := rand.New(rand.NewPCG(seed, 3))
	// How eager the kernel was: nothing, about half, or everything.
	keep := [...]float64{0, 0.5, 0.9, 1}[rnd.IntN(4)]

	names := map[*inode]map[string]*inode{}
	entries := func(dir *inode) map[string]*inode {
		if names[dir] == nil {
			names[dir] = map[string]*inode{}
			for n, i := range dir.durableEntries {
				names[dir][n] = i
			}
		}
		return names[dir]
	}
	stopped := map[*inode]bool{} // directories that have lost an operation
	for _, op := range f.d.pending {
		lost := rnd.Float64() >= keep
		for _, e := range op {
			lost = lost || stopped[e.dir]
		}
		for _, e := range op {
			if lost {
				stopped[e.dir] = true
			} else if e.inode == nil {
				delete(entries(e.dir), e.name)
			} else {
				entries(e.dir)[e.name] = e.inode
			}
		}
	}

	clone := New(f.d.capacity)
	clone.d.volatile, clone.d.noClones, clone.d.noUnnamed = f.d.volatile, f.d.noClones, f.d.noUnnamed
	clone.d.root.number = f.d.root.number
	clone.d.rnd = rand.New(rand.NewPCG(seed, 4))
	files := map[*inode]*inode{} // a file that has two names is one
	var copyDir func(from, to *inode)
	copyDir = func(from, to *inode) {
		// In order, so that one seed gives one disk.
		for _, name := range sortedNames(entries(from)) {
			i := entries(from)[name]
			c := files[i]
			if c != nil {
				c.nlink++
				to.entries[name] = c
				to.durableEntries[name] = c
				continue
			}
			c = newInode(i.mode)
			files[i] = c
			c.number = i.number
			c.nlink = 1
			if i.isDir() {
				copyDir(i, c)
			} else {
				c.data = i.crash(rnd)
				c.durable = slices.Clone(c.data)
				c.blocks = i.blocks.clone()
				c.blocks.truncate(c.size())
				c.backContent()
				c.modTime = i.modTime
				clone.d.used += c.blocks.bytes()
			}
			to.entries[name] = c
			to.durableEntries[name] = c
		}
	}
	copyDir(f.d.root, clone.d.root)
	return clone
}

// Kill ends the process now.
func (f *FS) Kill() {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	f.kill()
}

func (f *FS) kill() {
	f.faults.killed = true
	for m := range f.mappings {
		m.detach()
	}
	for h := range f.files {
		f.closeFile(h)
	}
}

// lookup finds the directory that holds name, and the inode (nil if missing).
func (f *FS) lookup(name string) (dir *inode, base string, i *inode, err error) {
	p := path.Clean("/" + name)
	if p == "/" {
		return nil, "/", f.d.root, nil
	}
	dir = f.d.root
	parts := strings.Split(p[1:], "/")
	for _, part := range parts[:len(parts)-1] {
		next := dir.entries[part]
		if next == nil {
			return nil, "", nil, syscall.ENOENT
		}
		if !next.isDir() {
			return nil, "", nil, syscall.ENOTDIR
		}
		dir = next
	}
	base = parts[len(parts)-1]
	return dir, base, dir.entries[base], nil
}

// change does a name operation now and remembers it for the next crash.
func (f *FS) change(op dirOp) {
	for _, e := range op {
		if old := e.dir.entries[e.name]; old != nil {
			old.nlink--
			f.d.reclaim(old)
		}
		if e.inode == nil {
			delete(e.dir.entries, e.name)
			continue
		}
		e.dir.entries[e.name] = e.inode
		e.inode.nlink++
	}
	f.d.pending = append(f.d.pending, op)
}

// reclaim gives the blocks of a file back once nobody can reach it. Its content
// stays: a crash may bring the name back.
func (d *disk) reclaim(i *inode) {
	if i.nlink == 0 && i.opens == 0 {
		d.used -= i.blocks.bytes()
	}
}

// allocate gives blocks to [off, end) as far as the disk has them and returns
// where it stopped.
func (d *disk) allocate(i *inode, off, end int64) (int64, error) {
	for b := off / blockSize; b*blockSize < end; b++ {
		if i.blocks.has(b) {
			continue
		}
		if d.capacity > 0 && d.used+blockSize > d.capacity {
			return max(off, b*blockSize), syscall.ENOSPC
		}
		i.blocks.set(b)
		d.used += blockSize
	}
	return end, nil
}

func pathErr(op, name string, err error) error {
	if err == nil {
		return nil
	}
	return &fs.PathError{Op: op, Path: name, Err: err}
}

func linkErr(oldname, newname string, err error) error {
	return &os.LinkError{Op: "rename", Old: oldname, New: newname, Err: err}
}

// NoLinks implements vfs.FS. There are no links.
func (f *FS) NoLinks(string) (vfs.FS, error) { return f, nil }

// Create implements vfs.FS.
func (f *FS) Create(name string) (vfs.File, error) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	if err := f.begin(Create, name); err != nil {
		return nil, pathErr("open", name, err)
	}
	dir, base, i, err := f.lookup(name)
	if err == nil && i != nil {
		err = syscall.EEXIST
	}
	if err != nil {
		return nil, pathErr("open", name, err)
	}
	return f.create(dir, base, name), nil
}

// CreateUnnamed implements vfs.FS.
func (f *FS) CreateUnnamed(name string) (vfs.File, error) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	err := f.begin(Create, name)
	var dir *inode
	if err == nil {
		_, _, dir, err = f.lookup(name)
	}
	switch {
	case err != nil:
	case dir == nil:
		err = syscall.ENOENT
	case !dir.isDir():
		err = syscall.ENOTDIR
	case f.d.noUnnamed:
		err = errors.ErrUnsupported
	}
	if err != nil {
		return nil, pathErr("open", name, err)
	}
	i := newInode(0o600)
	i.modTime = time.Now()
	return f.openInode(i, vfs.Unnamed(name), true), nil
}

func (f *FS) create(dir *inode, base, name string) *file {
	i := newInode(0o600)
	i.modTime = time.Now()
	f.change(dirOp{{dir, base, i}})
	return f.openInode(i, name, true)
}

func (f *FS) openInode(i *inode, name string, writable bool) *file {
	i.opens++
	h := &file{fs: f, i: i, name: name, writable: writable}
	f.files[h] = true
	return h
}

func (f *FS) open(name string, writable bool) (vfs.File, error) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	err := f.begin(Open, name)
	var i *inode
	if err == nil {
		_, _, i, err = f.lookup(name)
	}
	switch {
	case err != nil:
	case i == nil:
		err = syscall.ENOENT
	case i.isDir():
		err = syscall.EISDIR
	}
	if err != nil {
		return nil, pathErr("open", name, err)
	}
	return f.openInode(i, name, writable), nil
}

// Open implements vfs.FS.
func (f *FS) Open(name string) (vfs.File, error) { return f.open(name, false) }

// OpenRW implements vfs.FS.
func (f *FS) OpenRW(name string) (vfs.File, error) { return f.open(name, true) }

// MkdirAll implements vfs.FS. Each directory and each sync is an operation.
func (f *FS) MkdirAll(name string) error {
	p := path.Clean("/" + name)
	if p == "/" {
		return nil
	}
	parent := path.Dir(p)
	if fi, err := f.Stat(p); err == nil {
		if !fi.IsDir() {
			return pathErr("mkdir", name, syscall.ENOTDIR)
		}
		return f.SyncDir(parent)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := f.MkdirAll(parent); err != nil {
		return err
	}
	if err := f.mkdir(p); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return f.SyncDir(parent)
}

func (f *FS) mkdir(name string) error {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	err := f.begin(Mkdir, name)
	if err != nil {
		return pathErr("mkdir", name, err)
	}
	dir, base, i, err := f.lookup(name)
	if err == nil && i != nil {
		err = syscall.EEXIST
	}
	if err != nil {
		return pathErr("mkdir", name, err)
	}
	i = newInode(fs.ModeDir | 0o700)
	i.modTime = time.Now()
	f.change(dirOp{{dir, base, i}})
	return nil
}

// Rename implements vfs.FS.
func (f *FS) Rename(oldname, newname string) error { return f.rename(oldname, newname, false) }

// Replace implements vfs.FS.
func (f *FS) Replace(oldname, newname string) error { return f.rename(oldname, newname, true) }

func (f *FS) rename(oldname, newname string, replace bool) error {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	if err := f.begin(Rename, newname); err != nil {
		return linkErr(oldname, newname, err)
	}
	dir, base, i, err := f.lookup(oldname)
	if err == nil && (i == nil || dir == nil) {
		err = syscall.ENOENT
	}
	if err != nil {
		return linkErr(oldname, newname, err)
	}
	toDir, toBase, old, err := f.lookup(newname)
	switch {
	case err != nil:
	case old != nil && !replace:
		err = syscall.EEXIST
	case old != nil && old.isDir():
		err = syscall.EISDIR
	}
	if err != nil {
		return linkErr(oldname, newname, err)
	}
	if old == i {
		return nil
	}
	i.nlink++ // so that the first edit does not reclaim it
	f.change(dirOp{{dir, base, nil}, {toDir, toBase, i}})
	i.nlink--
	return nil
}

// Link implements vfs.FS.
func (f *FS) Link(oldname, newname string) error {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	if err := f.begin(Link, newname); err != nil {
		return linkErr(oldname, newname, err)
	}
	dir, _, i, err := f.lookup(oldname)
	if err == nil && (i == nil || dir == nil || i.isDir()) {
		err = syscall.ENOENT
	}
	if err == nil {
		var to *inode
		var base string
		if dir, base, to, err = f.lookup(newname); err == nil && to != nil {
			err = syscall.EEXIST
		}
		if err == nil {
			f.change(dirOp{{dir, base, i}})
		}
	}
	if err != nil {
		err = linkErr(oldname, newname, err)
	}
	return err
}

// Remove implements vfs.FS.
func (f *FS) Remove(name string) error {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	if err := f.begin(Remove, name); err != nil {
		return pathErr("remove", name, err)
	}
	dir, base, i, err := f.lookup(name)
	switch {
	case err != nil:
	case dir == nil:
		err = syscall.EBUSY
	case i == nil:
		err = syscall.ENOENT
	case i.isDir() && len(i.entries) > 0:
		err = syscall.ENOTEMPTY
	}
	if err != nil {
		return pathErr("remove", name, err)
	}
	f.change(dirOp{{dir, base, nil}})
	return nil
}

func sortedNames(m map[string]*inode) []string {
	names := make([]string, 0, len(m))
	for n := range m {
		names = append(names, n)
	}
	slices.Sort(names)
	return names
}

// ReadDir implements vfs.FS.
func (f *FS) ReadDir(name string) ([]fs.DirEntry, error) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	i, err := f.find(name)
	if err == nil && !i.isDir() {
		err = syscall.ENOTDIR
	}
	if err != nil {
		return nil, pathErr("readdir", name, err)
	}
	var list []fs.DirEntry
	for _, n := range sortedNames(i.entries) {
		list = append(list, fs.FileInfoToDirEntry(i.entries[n].info(n)))
	}
	return list, nil
}

// ReadStamps implements vfs.FS.
func (f *FS) ReadStamps(name string, look func(string) bool) ([]vfs.Stamped, error) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	i, err := f.find(name)
	if err == nil && !i.isDir() {
		err = syscall.ENOTDIR
	}
	if err != nil {
		return nil, pathErr("readdir", name, err)
	}
	var list []vfs.Stamped
	for _, n := range sortedNames(i.entries) {
		e := i.entries[n]
		s := vfs.Stamped{Name: n, Type: e.mode.Type()}
		if look == nil || look(n) {
			at := e.modTime.UnixNano()
			s.Stamp = vfs.Stamp{Size: e.size(), Mtime: at, Ctime: at, Inode: e.number}
		}
		list = append(list, s)
	}
	return list, nil
}

// find is lookup for operations that only read.
func (f *FS) find(name string) (*inode, error) {
	if err := f.begin(Read, name); err != nil {
		return nil, err
	}
	_, _, i, err := f.lookup(name)
	if err == nil && i == nil {
		err = syscall.ENOENT
	}
	return i, err
}

// Stat implements vfs.FS.
func (f *FS) Stat(name string) (fs.FileInfo, error) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	i, err := f.find(name)
	if err != nil {
		return nil, pathErr("stat", name, err)
	}
	return i.info(path.Base(name)), nil
}

// ID implements vfs.FS.
func (f *FS) ID(name string) (string, error) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	i, err := f.find(name)
	if err != nil {
		return "", pathErr("stat", name, err)
	}
	return fmt.Sprint(i.number), nil
}

// Lstat implements vfs.FS.
func (f *FS) Lstat(name string) (fs.FileInfo, error) { return f.Stat(name) }

// SyncDir implements vfs.FS.
func (f *FS) SyncDir(name string) error {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	if err := f.begin(SyncDir, name); err != nil {
		return pathErr("sync", name, err)
	}
	_, _, dir, err := f.lookup(name)
	switch {
	case err != nil:
	case dir == nil:
		err = syscall.ENOENT
	case !dir.isDir():
		err = syscall.ENOTDIR
	}
	if err != nil {
		return pathErr("sync", name, err)
	}
	// A rename into dir takes what came before it in its other directory
	// along, or the order there would be broken.
	need := map[*inode]bool{dir: true}
	synced := make([]bool, len(f.d.pending))
	for n := len(f.d.pending) - 1; n >= 0; n-- {
		op := f.d.pending[n]
		if slices.ContainsFunc(op, func(e edit) bool { return need[e.dir] }) {
			synced[n] = true
			for _, e := range op {
				need[e.dir] = true
			}
		}
	}
	var rest []dirOp
	for n, op := range f.d.pending {
		if !synced[n] {
			rest = append(rest, op)
			continue
		}
		for _, e := range op {
			if e.inode == nil {
				delete(e.dir.durableEntries, e.name)
			} else {
				e.dir.durableEntries[e.name] = e.inode
			}
		}
	}
	f.d.pending = rest
	return nil
}

// Lock implements vfs.FS.
func (f *FS) Lock(ctx context.Context, name string, mode vfs.LockMode) (vfs.Locked, error) {
	return vfs.WaitLock(ctx, name, func() (vfs.Locked, error) { return f.TryLock(name, mode) })
}

// TryLock implements vfs.FS.
func (f *FS) TryLock(name string, mode vfs.LockMode) (vfs.Locked, error) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	if err := f.begin(Lock, name); err != nil {
		return nil, pathErr("lock", name, err)
	}
	dir, base, i, err := f.lookup(name)
	if err != nil {
		return nil, pathErr("lock", name, err)
	}
	var h *file
	if i == nil {
		h = f.create(dir, base, name)
	} else {
		h = f.openInode(i, name, true)
	}
	if err := h.tryLock(mode); err != nil {
		f.closeFile(h)
		return nil, pathErr("lock", name, err)
	}
	return h, nil
}

// StatFS implements vfs.FS.
func (f *FS) StatFS(name string) (vfs.FSInfo, error) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	if _, err := f.find(name); err != nil {
		return vfs.FSInfo{}, pathErr("statfs", name, err)
	}
	info := vfs.FSInfo{Type: "crashfs", Total: f.d.capacity, Volatile: f.d.volatile}
	if f.d.volatile {
		info.Type = "tmpfs"
	}
	if info.Total == 0 {
		info.Total = 1 << 50
	}
	info.Free = info.Total - f.d.used
	return info, nil
}

// file is an open file.
type file struct {
	fs       *FS
	i        *inode
	name     string
	writable bool
	closed   bool
	off      int64
}

// Restrict and GiveTo have nothing to do: all files are one user's, of mode 0600.
func (f *file) Restrict() error          { return nil }
func (f *file) GiveTo(fs.FileInfo) error { return nil }

func (f *FS) closeFile(h *file) {
	if h.closed {
		return
	}
	h.closed = true
	delete(f.files, h)
	delete(h.i.locks, h)
	h.i.opens--
	f.d.reclaim(h.i)
}

// begin counts an operation on the open file.
func (h *file) begin(kind Kind) error {
	if h.closed && !h.fs.faults.killed {
		return fs.ErrClosed
	}
	if !h.writable && (kind == Write || kind == Truncate || kind == Allocate || kind == Punch || kind == Clone || kind == SetTime) {
		return syscall.EBADF
	}
	return h.fs.begin(kind, h.name)
}

func (h *file) Name() string { return h.name }

func (h *file) Close() error {
	h.fs.d.mu.Lock()
	defer h.fs.d.mu.Unlock()
	if h.fs.faults.killed {
		return pathErr("close", h.name, ErrKilled)
	}
	if h.closed {
		return pathErr("close", h.name, fs.ErrClosed)
	}
	h.fs.closeFile(h)
	return nil
}

func (h *file) ReadAt(b []byte, off int64) (int, error) {
	h.fs.d.mu.Lock()
	defer h.fs.d.mu.Unlock()
	if err := h.begin(Read); err != nil {
		return 0, pathErr("read", h.name, err)
	}
	if off < 0 {
		return 0, pathErr("read", h.name, syscall.EINVAL)
	}
	if off >= h.i.size() {
		return 0, io.EOF
	}
	n := copy(b, h.i.data[off:])
	if n < len(b) {
		return n, io.EOF
	}
	return n, nil
}

func (h *file) Write(b []byte) (int, error) {
	h.fs.d.mu.Lock()
	defer h.fs.d.mu.Unlock()
	n, err := h.writeAt(b, h.off)
	h.off += int64(n)
	return n, err
}

func (h *file) WriteAt(b []byte, off int64) (int, error) {
	h.fs.d.mu.Lock()
	defer h.fs.d.mu.Unlock()
	return h.writeAt(b, off)
}

func (h *file) writeAt(b []byte, off int64) (int, error) {
	if off < 0 || off+int64(len(b)) > maxFile {
		return 0, pathErr("write", h.name, syscall.EFBIG)
	}
	fault := h.begin(Write)
	n := len(b)
	var short shortWrite
	switch {
	case errors.As(fault, &short):
		fault = short.err
		n /= 2
		if fault == ErrKilled {
			// The kernel looks for a fatal signal between pages.
			n = h.fs.d.rnd.IntN(len(b) + 1)
			n = max(0, n-int((off+int64(n))%blockSize))
		}
	case fault != nil:
		return 0, pathErr("write", h.name, fault)
	}
	end, err := h.fs.d.allocate(h.i, off, off+int64(n))
	if n = max(0, int(end-off)); n > 0 {
		h.i.resize(max(h.i.size(), end))
		copy(h.i.data[off:end], b[:n])
		h.i.redirty(off, end)
		h.i.modTime = time.Now()
	}
	h.i.writeBack(h.fs.d.rnd)
	if fault != nil {
		err = fault
	}
	return n, pathErr("write", h.name, err)
}

func (h *file) Size() (int64, error) {
	h.fs.d.mu.Lock()
	defer h.fs.d.mu.Unlock()
	if err := h.begin(Read); err != nil {
		return 0, pathErr("stat", h.name, err)
	}
	return h.i.size(), nil
}

func (h *file) Links() (int, error) {
	h.fs.d.mu.Lock()
	defer h.fs.d.mu.Unlock()
	if err := h.begin(Read); err != nil {
		return 0, pathErr("stat", h.name, err)
	}
	return h.i.nlink, nil
}

// Inode implements vfs.File.
func (h *file) Inode() (uint64, error) {
	h.fs.d.mu.Lock()
	defer h.fs.d.mu.Unlock()
	if err := h.begin(Read); err != nil {
		return 0, pathErr("stat", h.name, err)
	}
	return h.i.number, nil
}

// LinkAs implements vfs.File.
func (h *file) LinkAs(name string) error {
	h.fs.d.mu.Lock()
	defer h.fs.d.mu.Unlock()
	err := h.fs.begin(Link, name)
	if err == nil && h.closed {
		err = fs.ErrClosed
	}
	var dir, to *inode
	var base string
	if err == nil {
		if dir, base, to, err = h.fs.lookup(name); err == nil && to != nil {
			err = syscall.EEXIST
		}
	}
	if err != nil {
		return &os.LinkError{Op: "link", Old: h.name, New: name, Err: err}
	}
	h.fs.change(dirOp{{dir, base, h.i}})
	return nil
}

func (h *file) Sync() error {
	h.fs.d.mu.Lock()
	defer h.fs.d.mu.Unlock()
	return pathErr("sync", h.name, h.sync(Sync, 0, h.i.size()))
}

// sync makes a range durable, or poisons it if the operation is to fail.
func (h *file) sync(kind Kind, off, n int64) error {
	if err := h.begin(kind); err != nil {
		if err != ErrKilled && err != fs.ErrClosed {
			h.i.writeBack(h.fs.d.rnd)
			h.i.poison(off, off+n)
		}
		return err
	}
	h.i.sync(off, off+n)
	if kind == Sync {
		h.i.durable = resized(h.i.durable, h.i.size())
	}
	return nil
}

func (h *file) Truncate(size int64) error {
	h.fs.d.mu.Lock()
	defer h.fs.d.mu.Unlock()
	err := h.begin(Truncate)
	if err == nil && (size < 0 || size > maxFile) {
		err = syscall.EFBIG
	}
	if err != nil {
		return pathErr("truncate", h.name, err)
	}
	before := h.i.blocks.bytes()
	h.i.blocks.truncate(size)
	h.fs.d.used -= before - h.i.blocks.bytes()
	h.i.resize(size)
	h.i.modTime = time.Now()
	return nil
}

func (h *file) Allocate(off, n int64) error {
	h.fs.d.mu.Lock()
	defer h.fs.d.mu.Unlock()
	err := h.begin(Allocate)
	if err == nil && (off < 0 || n <= 0 || off+n > maxFile) {
		err = syscall.EINVAL
	}
	if err == nil {
		// Like fallocate, a failed one leaves behind what it got so far.
		_, err = h.fs.d.allocate(h.i, off, off+n)
	}
	if err != nil {
		return pathErr("fallocate", h.name, err)
	}
	h.i.resize(max(h.i.size(), off+n))
	return nil
}

// Punch clears the range. Its blocks are free at once. That it is not durable
// before a sync is as with a write of zeros; where a crash brings content back,
// it brings its blocks back too.
func (h *file) Punch(off, n int64) error {
	h.fs.d.mu.Lock()
	defer h.fs.d.mu.Unlock()
	err := h.begin(Punch)
	if err == nil && (off < 0 || n <= 0) {
		err = syscall.EINVAL
	}
	if err != nil {
		return pathErr("punch", h.name, err)
	}
	end := min(off+n, h.i.size())
	if off >= end {
		return nil
	}
	clear(h.i.data[off:end])
	h.i.redirty(off, end)
	// A block goes when all of it does; the last one of the file ends with it.
	before := h.i.blocks.bytes()
	first, last := (off+blockSize-1)/blockSize, end/blockSize
	if end == h.i.size() {
		last = (end + blockSize - 1) / blockSize
	}
	for b := first; b < last; b++ {
		h.i.blocks.clear(b)
	}
	h.fs.d.used -= before - h.i.blocks.bytes()
	h.i.modTime = time.Now()
	h.i.writeBack(h.fs.d.rnd)
	return nil
}

// Clone copies the content. The blocks count twice, which is more than they take.
func (h *file) Clone(name string) error {
	h.fs.d.mu.Lock()
	defer h.fs.d.mu.Unlock()
	err := h.begin(Clone)
	var src *inode
	if err == nil {
		if _, _, src, err = h.fs.lookup(name); err == nil && src == nil {
			err = syscall.ENOENT
		}
	}
	if err == nil && h.fs.d.noClones {
		err = errors.ErrUnsupported
	}
	if err == nil {
		_, err = h.fs.d.allocate(h.i, 0, src.size())
	}
	if err != nil {
		return pathErr("clone", h.name, err)
	}
	h.i.resize(src.size())
	copy(h.i.data, src.data)
	h.i.redirty(0, src.size())
	h.i.modTime = time.Now()
	return nil
}

func (h *file) SetModified(at time.Time) error {
	h.fs.d.mu.Lock()
	defer h.fs.d.mu.Unlock()
	if err := h.begin(SetTime); err != nil {
		return pathErr("utimens", h.name, err)
	}
	h.i.modTime = at
	return nil
}

// Allocated counts the blocks.
func (h *file) Allocated() (int64, error) {
	h.fs.d.mu.Lock()
	defer h.fs.d.mu.Unlock()
	if err := h.begin(Read); err != nil {
		return 0, pathErr("stat", h.name, err)
	}
	return h.i.blocks.bytes(), nil
}

// Data looks for a block.
func (h *file) Data(off int64) (int64, error) {
	h.fs.d.mu.Lock()
	defer h.fs.d.mu.Unlock()
	if err := h.begin(Read); err != nil {
		return 0, pathErr("seek", h.name, err)
	}
	if off < 0 {
		return 0, pathErr("seek", h.name, syscall.EINVAL)
	}
	for ; off < h.i.size(); off = (off/blockSize + 1) * blockSize {
		if h.i.blocks.has(off / blockSize) {
			return off, nil
		}
	}
	return 0, io.EOF
}

// StartWriteback writes back some sectors at random, which is as much as the
// real call promises. It is no operation: it can't fail.
func (h *file) StartWriteback(off, n int64) {
	h.fs.d.mu.Lock()
	defer h.fs.d.mu.Unlock()
	if !h.fs.faults.killed && !h.closed {
		h.i.writeBack(h.fs.d.rnd)
	}
}

// DropCache does nothing: there is no cache.
func (h *file) DropCache() {}

func (h *file) Lock(ctx context.Context, mode vfs.LockMode) error {
	_, err := vfs.WaitLock(ctx, h.name, func() (struct{}, error) {
		return struct{}{}, h.TryLock(mode)
	})
	return err
}

func (h *file) TryLock(mode vfs.LockMode) error {
	h.fs.d.mu.Lock()
	defer h.fs.d.mu.Unlock()
	if err := h.begin(Lock); err != nil {
		return pathErr("lock", h.name, err)
	}
	return pathErr("lock", h.name, h.tryLock(mode))
}

func (h *file) tryLock(mode vfs.LockMode) error {
	for other, m := range h.i.locks {
		if other != h && (m == vfs.Exclusive || mode == vfs.Exclusive) {
			return vfs.ErrLocked
		}
	}
	h.i.locks[h] = mode
	return nil
}

func (h *file) Unlock() error {
	h.fs.d.mu.Lock()
	defer h.fs.d.mu.Unlock()
	if h.fs.faults.killed {
		return pathErr("unlock", h.name, ErrKilled)
	}
	delete(h.i.locks, h)
	return nil
}
