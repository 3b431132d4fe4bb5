package crashfs

import (
	"bytes"
	"fmt"
	"io/fs"
	"math/bits"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

const (
	sectorSize = 512
	blockSize  = 4096
	maxFile    = 1 << 30 // address space set aside for a file that is mapped
)

// inode is a file or directory. A file's data is what processes see; durable is
// what is on the disk for sure. The two are compared sector by sector, which
// finds stores through mappings as well as writes.
type inode struct {
	number  uint64 // kept over a power cut
	mode    fs.FileMode
	modTime time.Time
	nlink   int
	opens   int
	locks   map[*file]vfs.LockMode

	entries        map[string]*inode
	durableEntries map[string]*inode

	data    []byte           // in arena once the file has been mapped
	durable []byte           // what a crash can't take away
	blocks  bitmap           // blocks with disk space
	lost    map[int64][]byte // sectors that a failed sync has marked clean, by offset
	memfd   *os.File
	arena   []byte
}

// inodes numbers the inodes of all disks.
var inodes atomic.Uint64

func newInode(mode fs.FileMode) *inode {
	i := &inode{mode: mode, number: inodes.Add(1)}
	if i.isDir() {
		i.entries = map[string]*inode{}
		i.durableEntries = map[string]*inode{}
	} else {
		i.locks = map[*file]vfs.LockMode{}
	}
	return i
}

func (i *inode) isDir() bool { return i.mode.IsDir() }
func (i *inode) size() int64 { return int64(len(i.data)) }

func resized(b []byte, size int64) []byte {
	if n := int64(len(b)); size > n {
		return append(b, make([]byte, size-n)...)
	}
	return b[:size]
}

func (i *inode) resize(size int64) {
	if i.arena != nil {
		if size < i.size() {
			clear(i.data[size:])
		}
		i.data = i.arena[:size]
		return
	}
	i.data = resized(i.data, size)
}

// sectorAt returns sector s of b, shorter at the end of the file, or nil.
func sectorAt(b []byte, off int64) []byte {
	if off >= int64(len(b)) {
		return nil
	}
	return b[off:min(off+sectorSize, int64(len(b)))]
}

// same compares two sectors, taking what is beyond the end of one as zero.
func same(a, b []byte) bool {
	if len(a) > len(b) {
		a, b = b, a
	}
	return bytes.Equal(a, b[:len(a)]) && isZero(b[len(a):])
}

var zeroBlock [blockSize]byte

func isZero(b []byte) bool { return bytes.Equal(b, zeroBlock[:len(b)]) }

// dirty calls fn with the offset of each sector in [off, end) whose content is
// not on the disk.
func (i *inode) dirty(off, end int64, fn func(off int64)) {
	off -= off % sectorSize
	end = min(end, max(i.size(), int64(len(i.durable))))
	// In large steps where nothing has changed, which is nearly everywhere.
	for ; off < end; off += sectorSize {
		if off%(64<<10) == 0 && end-off >= 64<<10 && off+64<<10 <= min(i.size(), int64(len(i.durable))) &&
			bytes.Equal(i.data[off:off+64<<10], i.durable[off:off+64<<10]) {
			off += 64<<10 - sectorSize
			continue
		}
		if !same(sectorAt(i.data, off), sectorAt(i.durable, off)) {
			fn(off)
		}
	}
}

// persist writes one sector to the disk, and the file size up to its end.
func (i *inode) persist(off int64) {
	s := sectorAt(i.data, off)
	if end := off + int64(len(s)); end > int64(len(i.durable)) {
		i.durable = slices.Grow(i.durable, max(0, len(i.data)-len(i.durable))) // the rest follows mostly
		i.durable = resized(i.durable, end)
	}
	if off < int64(len(i.durable)) {
		clear(i.durable[off:min(off+sectorSize, int64(len(i.durable)))])
		copy(i.durable[off:], s)
	}
}

// sync makes [off, end) durable, but for what an earlier failed sync has lost.
func (i *inode) sync(off, end int64) {
	i.dirty(off, end, func(off int64) {
		if l, ok := i.lost[off]; ok {
			if same(l, sectorAt(i.data, off)) {
				return
			}
			delete(i.lost, off)
		}
		i.persist(off)
	})
	if e := min(end, i.size()); e > int64(len(i.durable)) {
		i.durable = resized(i.durable, e)
	}
}

// poison is a failed sync: the dirty pages are marked clean.
func (i *inode) poison(off, end int64) {
	i.dirty(off, end, func(off int64) {
		if i.lost == nil {
			i.lost = map[int64][]byte{}
		}
		i.lost[off] = slices.Clone(sectorAt(i.data, off))
	})
}

// redirty is a write to pages of which a failed sync has lost sectors: now they
// will be written again, whole.
func (i *inode) redirty(off, end int64) {
	for s := range i.lost {
		if s+sectorSize > off/blockSize*blockSize && s < (end+blockSize-1)/blockSize*blockSize {
			delete(i.lost, s)
		}
	}
}

// writeBack is the kernel writing back what it likes, now and then. It lets
// content that is overwritten later reach the disk.
func (i *inode) writeBack(rnd *rand.Rand) {
	if rnd.IntN(8) != 0 {
		return
	}
	keep := rnd.Float64()
	i.dirty(0, i.size(), func(off int64) {
		if _, ok := i.lost[off]; !ok && rnd.Float64() < keep {
			i.persist(off)
		}
	})
}

// crash returns the file's content after a power cut.
func (i *inode) crash(rnd *rand.Rand) []byte {
	c := slices.Clone(i.durable)
	size := int64(len(c))
	if i.size() != size {
		lo, hi := min(size, i.size()), max(size, i.size())
		size = [...]int64{lo, hi, lo + rnd.Int64N(hi-lo+1)}[rnd.IntN(3)]
	}
	keep := [...]float64{0, 0.5, 1}[rnd.IntN(3)]
	unit := [...]int64{sectorSize, blockSize}[rnd.IntN(2)]
	c = resized(c, max(size, int64(len(c))))
	last, kept := int64(-1), false
	i.dirty(0, maxFile, func(off int64) {
		if off/unit != last {
			last, kept = off/unit, rnd.Float64() < keep
		}
		if _, ok := i.lost[off]; ok || !kept || off >= int64(len(c)) {
			return
		}
		s := c[off:min(off+sectorSize, int64(len(c)))]
		clear(s)
		copy(s, sectorAt(i.data, off))
	})
	return c[:size:size]
}

// backContent gives blocks to content that a crash has brought back: a hole that
// was punched without a sync is one on the disk or is not.
func (i *inode) backContent() {
	for off := int64(0); off < i.size(); off += blockSize {
		if b := off / blockSize; !i.blocks.has(b) && !isZero(i.data[off:min(off+blockSize, i.size())]) {
			i.blocks.set(b)
		}
	}
}

type fileInfo struct {
	name string
	size int64
	mode fs.FileMode
	mod  time.Time
}

func (i *inode) info(name string) fs.FileInfo {
	return fileInfo{name, i.size(), i.mode, i.modTime}
}

func (fi fileInfo) Name() string       { return fi.name }
func (fi fileInfo) Size() int64        { return fi.size }
func (fi fileInfo) Mode() fs.FileMode  { return fi.mode }
func (fi fileInfo) ModTime() time.Time { return fi.mod }
func (fi fileInfo) IsDir() bool        { return fi.mode.IsDir() }
func (fi fileInfo) Sys() any           { return nil }

// bitmap is the set of allocated blocks.
type bitmap []uint64

func (m bitmap) has(b int64) bool { return b/64 < int64(len(m)) && m[b/64]>>(b%64)&1 != 0 }

func (m *bitmap) set(b int64) {
	for int64(len(*m)) <= b/64 {
		*m = append(*m, 0)
	}
	(*m)[b/64] |= 1 << (b % 64)
}

func (m bitmap) clear(b int64) {
	if b/64 < int64(len(m)) {
		m[b/64] &^= 1 << (b % 64)
	}
}

// truncate drops the blocks beyond a file of size bytes.
func (m bitmap) truncate(size int64) {
	first := (size + blockSize - 1) / blockSize
	for b := first; b/64 < int64(len(m)); b++ {
		m[b/64] &^= 1 << (b % 64)
	}
}

func (m bitmap) clone() bitmap { return slices.Clone(m) }

func (m bitmap) bytes() int64 {
	n := 0
	for _, w := range m {
		n += bits.OnesCount64(w)
	}
	return int64(n) * blockSize
}

// mapping is a real mapping of a memfd that holds the file's data, so that
// stores through it are seen by everyone else at once, and so that they can be
// cut off from the file when the process is killed.
type mapping struct {
	h      *file
	off    int64
	b      []byte
	unmap  runtime.Cleanup // for a killed process, which never calls Close
	closed bool
}

// moveToMemory gives the file's data an address that never changes.
func (i *inode) moveToMemory() error {
	if i.arena != nil {
		return nil
	}
	fd, err := unix.MemfdCreate("crashfs", unix.MFD_CLOEXEC)
	if err != nil {
		return err
	}
	memfd := os.NewFile(uintptr(fd), "crashfs")
	if err := memfd.Truncate(maxFile); err != nil {
		return err
	}
	arena, err := unix.Mmap(fd, 0, maxFile, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_NORESERVE)
	if err != nil {
		return err
	}
	copy(arena, i.data)
	i.data = arena[:len(i.data)]
	i.memfd, i.arena = memfd, arena
	// os.File closes itself; the address space must be given back by hand.
	runtime.AddCleanup(i, func(b []byte) { unix.Munmap(b) }, arena)
	return nil
}

func (h *file) Map(off, n int64, writable bool) (vfs.Mapping, error) {
	h.fs.d.mu.Lock()
	defer h.fs.d.mu.Unlock()
	err := h.begin(Map)
	prot := unix.PROT_READ
	switch {
	case err != nil:
	case off < 0 || n <= 0 || off%int64(os.Getpagesize()) != 0 || n > h.i.size()-off:
		err = fmt.Errorf("range %d+%d of %d bytes: %w", off, n, h.i.size(), syscall.EINVAL)
	case writable && !h.writable:
		err = syscall.EACCES
	default:
		err = h.i.moveToMemory()
	}
	if writable {
		prot |= unix.PROT_WRITE
	}
	var b []byte
	if err == nil {
		b, err = unix.Mmap(int(h.i.memfd.Fd()), off, int(n), prot, unix.MAP_SHARED|unix.MAP_NORESERVE)
	}
	if err != nil {
		return nil, pathErr("mmap", h.name, err)
	}
	m := &mapping{h: h, off: off, b: b}
	m.unmap = runtime.AddCleanup(m, func(b []byte) { unix.Munmap(b) }, b)
	h.fs.mappings[m] = true
	return m, nil
}

func (m *mapping) Bytes() []byte { return m.b }

// detach replaces the mapping by private memory, under the feet of whoever is
// writing to it: the process is dead and nothing it does may reach the file.
func (m *mapping) detach() {
	m.checkHoles()
	_, err := unix.MmapPtr(-1, 0, unsafe.Pointer(unsafe.SliceData(m.b)), uintptr(len(m.b)),
		unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_FIXED|unix.MAP_NORESERVE)
	if err != nil {
		panic(fmt.Sprintf("crashfs: detach mapping of %s: %v", m.h.name, err))
	}
}

// checkHoles panics if a store through a mapping has hit a block without disk
// space.
func (m *mapping) checkHoles() {
	i := m.h.i
	for off := m.off / blockSize * blockSize; off < min(m.off+int64(len(m.b)), i.size()); off += blockSize {
		if i.blocks.has(off / blockSize) {
			continue
		}
		if !isZero(i.data[off:min(off+blockSize, i.size())]) {
			panic(fmt.Sprintf("crashfs: %s: mapping written at offset %d, which has no disk block: would be SIGBUS on a full disk", m.h.name, off))
		}
	}
}

func (m *mapping) Sync(off, n int64) error {
	m.h.fs.d.mu.Lock()
	defer m.h.fs.d.mu.Unlock()
	if m.closed || off < 0 || n < 0 || off+n > int64(len(m.b)) {
		return pathErr("msync", m.h.name, syscall.EINVAL)
	}
	m.checkHoles()
	// A mapping outlives its file descriptor, so the file may be closed.
	if err := m.h.fs.begin(MapSync, m.h.name); err != nil {
		if err != ErrKilled {
			m.h.i.poison(m.off+off, m.off+off+n)
		}
		return pathErr("msync", m.h.name, err)
	}
	m.h.i.sync(m.off+off, m.off+off+n)
	return nil
}

func (m *mapping) WillNeed(off, n int64) {}

// DontNeed is when the kernel is likely to write pages back.
func (m *mapping) DontNeed(off, n int64) {
	m.h.fs.d.mu.Lock()
	defer m.h.fs.d.mu.Unlock()
	if !m.h.fs.faults.killed {
		m.h.i.writeBack(m.h.fs.d.rnd)
	}
}

func (m *mapping) Close() error {
	m.h.fs.d.mu.Lock()
	defer m.h.fs.d.mu.Unlock()
	if m.closed {
		return nil
	}
	m.closed = true
	m.unmap.Stop()
	delete(m.h.fs.mappings, m)
	if !m.h.fs.faults.killed {
		m.checkHoles()
	}
	return pathErr("munmap", m.h.name, unix.Munmap(m.b))
}
