package nvram

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"slices"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// ErrNotBlank: a file that is to become an NVRAM file holds something else, or
// may do so. Options.Format overwrites it.
var ErrNotBlank = errors.New("it holds something else")

// lookLimit bounds how much of a file is read to find out that it is all zero.
// Holes are not read.
var lookLimit = int64(1 << 30)

// Options of Open.
type Options struct {
	// Capacity caps the whole file in bytes, tables included. A new file
	// keeps it, and a larger value raises the cap of an existing one. A
	// smaller value limits only what this File takes. 0 is the cap that the
	// file has; for a new file, no cap but the file system's.
	Capacity int64
	// Create makes the file if it is missing, and formats it if it is empty
	// or zero from its beginning to its end. Anything else that is not an NVRAM
	// file is refused (ErrNotBlank), and so is one that would take too long to
	// read. A file that has all its disk blocks when it is formatted keeps them
	// for good; of any other, freed extents give theirs back.
	Create bool
	// Format has Create overwrite what is no NVRAM file, whatever it holds. One
	// that has been an NVRAM file is left alone, damaged or not: it may have
	// checkpoints.
	Format bool
	// Beside is a directory whose owner gets a file that root has Create make: he
	// could open it for nothing otherwise. Empty: it stays root's.
	Beside string
	// ReadOnly opens for OpenSome, Owners, Free and Check only.
	ReadOnly bool
}

// File is an open NVRAM file. Its methods may be called from several
// goroutines.
type File struct {
	fs       vfs.FS
	path     string
	f        vfs.File
	device   bool // fixed size, always fully backed
	volatile bool
	limit    int64 // Options.Capacity in extents; 0 is no limit

	// h is the header as Open found it; its capacity may be old.
	h header

	// turn is the lock within the process: all goroutines share one open file
	// and so one flock. Whoever has put something in has it.
	turn     chan struct{}
	capacity atomic.Int64 // the header's when the file was last locked
}

// Open opens the NVRAM file at path. If it had to be made, it is durable, and after an
// error it is not there. ctx ends
// the wait for the file's lock, here and in every method that has one.
func Open(ctx context.Context, fsys vfs.FS, path string, o Options) (*File, error) {
	return open(ctx, fsys, path, o, geometry{ExtentSize, groupExtents})
}

// open is Open with the geometry for new files; tests use a smaller one.
func open(ctx context.Context, fsys vfs.FS, path string, o Options, g geometry) (f *File, err error) {
	for range 3 {
		if f, err = tryOpen(ctx, fsys, path, o, g); !errors.Is(err, errUnmade) {
			break
		}
	}
	return f, err
}

// errUnmade: the file that was opened is there no more, because whoever had made it could
// not format it.
var errUnmade = errors.New("it has been removed while it was opened")

func tryOpen(ctx context.Context, fsys vfs.FS, path string, o Options, g geometry) (_ *File, err error) {
	if o.Capacity < 0 || o.Capacity > 0 && o.Capacity < 2*g.extentSize {
		return nil, fmt.Errorf("%s: an NVRAM file has at least %d bytes, not %d", path, 2*g.extentSize, o.Capacity)
	}
	f := &File{fs: fsys, path: path, turn: make(chan struct{}, 1)}
	made := false
	if o.ReadOnly {
		f.f, err = fsys.Open(path)
	} else {
		f.f, err = fsys.OpenRW(path)
		if o.Create && errors.Is(err, fs.ErrNotExist) {
			f.f, err = create(fsys, path, o.Beside)
			made = err == nil
			if errors.Is(err, fs.ErrExist) { // another process was faster
				f.f, err = fsys.OpenRW(path)
			}
		}
	}
	if errors.Is(err, vfs.ErrNotRegular) && character(fsys, path) {
		// A device-DAX node can be mapped only: no read, write or fsync, and its
		// lines must be flushed by user code. Its file-system or block form does
		// all this in the kernel.
		return nil, fmt.Errorf("%w (an NVRAM file can be on /dev/pmem*, or on a file system mounted with -o dax)", err)
	}
	if err != nil {
		return nil, err
	}
	opened := false
	defer func() {
		if opened {
			return
		}
		if made { // also while panicking
			f.unmake()
		}
		f.f.Close()
	}()
	info, err := fsys.StatFS(path)
	if err != nil {
		return nil, err
	}
	f.volatile = info.Volatile
	fi, err := fsys.Stat(path)
	if err != nil {
		return nil, err
	}
	f.device = fi.Mode()&fs.ModeDevice != 0
	if f.device {
		f.volatile = false // that was the file system of the device node
	}
	if !o.ReadOnly && !f.device {
		// Not only after Create: the one who made the file may not have got
		// to this yet, and we are going to rely on the name. A directory
		// that we can't read is no place where one of us makes files.
		err := fsys.SyncDir(filepath.Dir(path))
		if err != nil && !errors.Is(err, fs.ErrPermission) {
			return nil, err
		}
	}
	mode := vfs.Exclusive
	if o.ReadOnly {
		mode = vfs.Shared
	}
	err = f.locked(ctx, mode, func() error { return f.loadOrFormat(ctx, o, g) })
	if err != nil {
		return nil, err
	}
	opened = true
	return f, nil
}

// create makes the file, which belongs to the owner of the directory beside.
func create(fsys vfs.FS, path, beside string) (_ vfs.File, err error) {
	f, err := fsys.Create(path)
	if err != nil || beside == "" {
		return f, err
	}
	fi, err := fsys.Stat(beside)
	if err == nil {
		err = f.GiveTo(fi)
	}
	if err != nil {
		f.Close()
		fsys.Remove(path)
		return nil, err
	}
	return f, nil
}

// unmake removes the file, which this Open has made, if it has no header. Another process
// may have found it, and may be waiting for its lock: that one sees that it is gone.
func (f *File) unmake() {
	if f.f.TryLock(vfs.Exclusive) != nil {
		return // it is the other's now
	}
	defer f.f.Unlock()
	if _, _, err := f.readHeader(); integrity.IsCorrupt(err) {
		f.fs.Remove(f.path)
	}
}

// character tells whether path is a character device.
func character(fsys vfs.FS, path string) bool {
	fi, err := fsys.Stat(path)
	return err == nil && fi.Mode()&fs.ModeCharDevice != 0
}

// Close closes the file. Its regions must have been closed before.
func (f *File) Close() error { return f.f.Close() }

// UUID identifies the file, so that a checkpoint can tell its own NVRAM file
// from another one put in its place.
func (f *File) UUID() uuid.UUID { return f.h.id }

// Path is the name the file was opened with.
func (f *File) Path() string { return f.path }

// Volatile tells if the file's content is lost at a power cut because it is on
// tmpfs or ramfs.
func (f *File) Volatile() bool { return f.volatile }

// Capacity is the cap on the file in bytes, tables included, as far as it was
// known when it was last locked; 0 if there is none.
func (f *File) Capacity() int64 {
	return f.capacity.Load() * f.h.extentSize
}

func (f *File) corrupt(off int64, format string, args ...any) error {
	return &integrity.CorruptError{File: f.path, Offset: off, Err: fmt.Errorf(format, args...)}
}

// locked runs fn with the file locked against other goroutines and processes,
// and the header read anew. It waits until ctx is done, and for vfs.LockLimit at
// most: whoever has the lock has it for one change of a table and its sync.
func (f *File) locked(ctx context.Context, mode vfs.LockMode, fn func() error) (err error) {
	select {
	case f.turn <- struct{}{}:
		defer func() { <-f.turn }()
	case <-ctx.Done():
		return fmt.Errorf("%s: waited for its lock: %w", f.path, context.Cause(ctx))
	case <-time.After(vfs.LockLimit):
		return fmt.Errorf("%s: waited %v for this process's own use of it: %w", f.path, vfs.LockLimit, vfs.ErrLocked)
	}
	if err := f.f.Lock(ctx, mode); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.f.Unlock()) }()
	if f.h.extentSize != 0 {
		// Another process may have raised the capacity.
		h, _, err := f.readHeader()
		if err != nil {
			return err
		}
		if h.id != f.h.id || h.geometry != f.h.geometry {
			return f.corrupt(0, "the file has been formatted anew while it was open")
		}
		f.capacity.Store(h.capacity)
	}
	return fn()
}

// readAt reads b, with zeros for what is beyond the end of the file.
func (f *File) readAt(b []byte, off int64) error {
	n, err := f.f.ReadAt(b, off)
	if err == io.EOF {
		clear(b[n:])
		err = nil
	}
	return err
}

// syncRange makes a range durable without waiting for the pages that others
// have dirty in the file.
func (f *File) syncRange(off, n int64) error {
	start := off &^ (64<<10 - 1) // whatever the machine's page size is
	m, err := f.f.Map(start, off+n-start, false)
	if err != nil {
		return err
	}
	err = m.Sync(off-start, n)
	return errors.Join(err, m.Close())
}

// readHeader returns the newer valid copy, and if both are valid.
func (f *File) readHeader() (h header, both bool, err error) {
	b := make([]byte, headerCopy+headerSize)
	if err := f.readAt(b, 0); err != nil {
		return header{}, false, err
	}
	h1, err1 := decodeHeader(b)
	h2, err2 := decodeHeader(b[headerCopy:])
	switch {
	case err1 != nil && err2 != nil:
		return header{}, false, f.corrupt(0, "%v; second copy at %d: %v", err1, headerCopy, err2)
	case err1 != nil || err2 == nil && h2.generation > h1.generation:
		return h2, err1 == nil, nil
	}
	return h1, err2 == nil, nil
}

// loadOrFormat reads the header, makes it if the file is blank, and writes a new
// one if a copy is not valid or the capacity is to be raised.
func (f *File) loadOrFormat(ctx context.Context, o Options, g geometry) error {
	h, both, err := f.readHeader()
	format := err != nil
	if format {
		if !o.Create || o.ReadOnly || !integrity.IsCorrupt(err) {
			return err
		}
		if err := f.mayFormat(ctx, err, o.Format, g); err != nil {
			return err
		}
	}
	// Guest memory goes in here. What is not to be an NVRAM file keeps its mode.
	if !o.ReadOnly {
		if err := f.f.Restrict(); err != nil {
			return err
		}
	}
	if format {
		if links, err := f.f.Links(); err != nil || links == 0 {
			return errors.Join(err, fmt.Errorf("%s: %w", f.path, errUnmade))
		}
		both = true
		h, err = f.format(o, g)
		if err != nil {
			return fmt.Errorf("format: %w", err)
		}
	}
	limit := o.Capacity / h.extentSize
	raise := h.capacity > 0 && limit > h.capacity
	if (raise || !both) && !o.ReadOnly {
		if raise {
			h.capacity = min(limit, maxExtents)
		}
		h.generation++ // which takes it to the place of the older copy
		if _, err := f.f.WriteAt(h.encode(), h.copyOffset()); err != nil {
			return err
		}
		if err := f.syncRange(h.copyOffset(), headerSize); err != nil {
			return err
		}
	}
	f.h, f.limit = h, limit
	f.capacity.Store(h.capacity)
	return nil
}

// mayFormat returns nil if the file, whose header is no header for the reason
// given, can be made an NVRAM file without harm, or with force.
func (f *File) mayFormat(ctx context.Context, reason error, force bool, g geometry) error {
	b := make([]byte, tableOffset)
	if err := f.readAt(b, 0); err != nil {
		return err
	}
	if bytes.HasPrefix(b, magic[:]) || bytes.HasPrefix(b[headerCopy:], magic[:]) {
		return reason
	}
	if force {
		return nil
	}
	return f.blank(ctx, g)
}

// blank returns nil if the file is as zeros or an interrupted format leave it: all
// zero but for headers without their magic number.
func (f *File) blank(ctx context.Context, g geometry) error {
	b := make([]byte, max(g.extentSize, 1<<20))
	zeros := make([]byte, len(b))
	read := int64(0)
	for next := int64(0); ; next += int64(len(b)) {
		off, err := f.f.Data(next)
		if err == io.EOF {
			return nil
		}
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return err
		}
		if read += int64(len(b)); read > lookLimit {
			return f.corrupt(off, "no NVRAM file, and larger than what is looked through for zeros, %d MiB: %w", lookLimit>>20, ErrNotBlank)
		}
		if err := f.readAt(b, off); err != nil {
			return err
		}
		for _, at := range [...]int64{0, headerCopy} {
			if at >= off {
				clear(b[at-off+int64(len(magic)) : at-off+headerSize])
			}
		}
		if !bytes.Equal(b, zeros) {
			i := slices.IndexFunc(b, func(c byte) bool { return c != 0 })
			return f.corrupt(off+int64(i), "no NVRAM file (no magic number at 0 and %d), and not blank: %w", headerCopy, ErrNotBlank)
		}
		next = off
	}
}

// format writes the first two headers. The magic numbers come last: whatever a
// crash leaves before them is blank, so the next Open formats again.
func (f *File) format(o Options, g geometry) (_ header, err error) {
	size, err := f.f.Size()
	if err != nil {
		return header{}, err
	}
	if f.device && size < 2*g.extentSize {
		return header{}, fmt.Errorf("%s: a device of %d bytes is too small: %w", f.path, size, syscall.ENOSPC)
	}
	keep, err := f.preallocated(size, g)
	if err != nil {
		return header{}, err
	}
	if err := f.allocate(0, g.extentSize, size); err != nil {
		return header{}, err
	}
	if o.Format {
		// Also a header's place, so that all of it is blank if this goes no further.
		if _, err := f.f.WriteAt(make([]byte, g.extentSize), 0); err != nil {
			return header{}, err
		}
	}
	// A device is not zero where it has never been an NVRAM file, and what is
	// no free line of a table would be lost for good.
	zeros := make([]byte, g.tableSize())
	for off := g.tableOffset(1); off < size; off += g.group * g.extentSize {
		b := make([]byte, min(g.tableSize(), size-off))
		if err := f.readAt(b, off); err != nil {
			return header{}, err
		}
		if bytes.Equal(b, zeros[:len(b)]) {
			continue // writing would give a hole its blocks
		}
		if _, err := f.f.WriteAt(zeros[:len(b)], off); err != nil {
			return header{}, err
		}
	}
	id, err := uuid.NewRandom()
	if err != nil {
		return header{}, err
	}
	h := header{geometry: g, generation: 1, id: id, capacity: min(o.Capacity/g.extentSize, maxExtents)}
	if keep {
		h.compatible |= featureKeep
	}
	second := h
	second.generation++
	defer func() {
		if err != nil {
			// A header that the sync has not made durable would still be
			// believed by the next Open, as long as the power lasts.
			f.f.WriteAt(zeroEntry[:], 0)
			f.f.WriteAt(zeroEntry[:], headerCopy)
		}
	}()
	for _, from := range []int{len(magic), 0} {
		for _, h := range []header{h, second} {
			if _, err := f.f.WriteAt(h.encode()[from:], h.copyOffset()+int64(from)); err != nil {
				return header{}, err
			}
		}
		if err := f.f.Sync(); err != nil {
			return header{}, err
		}
	}
	return second, nil
}

// preallocated tells if a file of size bytes, which is about to be formatted, has
// the disk blocks already that its extents will need: somebody wants them to be
// there whatever else fills the disk.
func (f *File) preallocated(size int64, g geometry) (bool, error) {
	if f.device || size < 2*g.extentSize {
		return false, nil
	}
	blocks, err := f.f.Allocated()
	return blocks >= size-g.extentSize, err
}

// allocate gives a range disk blocks, so that a full disk is noticed here and
// not in the middle of a save. size is the file's length. Where there are holes
// in the range nobody owns what it holds.
func (f *File) allocate(off, end, size int64) error {
	if f.device {
		return nil
	}
	err := f.f.Allocate(off, end-off)
	if !errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	// No fallocate: zeros do it as well.
	holes, err := f.holes()
	if err != nil {
		return err
	}
	if !holes {
		off = max(off, size)
	}
	zeros := make([]byte, min(1<<20, max(end-off, 0)))
	for ; off < end; off += int64(len(zeros)) {
		if _, err := f.f.WriteAt(zeros[:min(int64(len(zeros)), end-off)], off); err != nil {
			return err
		}
	}
	return nil
}

// holes tells if a part of the file has no disk blocks. On a file system that
// compresses it may say so of one that has them all.
func (f *File) holes() (bool, error) {
	if f.device {
		return false, nil
	}
	size, err := f.f.Size()
	if err != nil {
		return false, err
	}
	blocks, err := f.f.Allocated()
	return blocks < size, err
}

// table reads the owner table of a group; zeros if the file does not reach it.
func (f *File) table(group int64) ([]byte, error) {
	b := make([]byte, f.h.tableSize())
	return b, f.readAt(b, f.h.tableOffset(group))
}

// extents is the number of whole extents in the file now.
func (f *File) extents() (int64, error) {
	size, err := f.f.Size()
	return min(size/f.h.extentSize, maxExtents), err
}

// bound is the number of extents that the file may have, for this File.
func (f *File) bound(now int64) int64 {
	n := int64(maxExtents)
	if capacity := f.capacity.Load(); capacity > 0 {
		n = min(n, capacity)
	}
	if f.limit > 0 {
		n = min(n, f.limit)
	}
	if f.device {
		n = min(n, now)
	}
	return n
}

// forEach calls fn for every entry that is not free, of every table of which the
// file has at least a part: a crash while the file grew can leave it so. fn must
// not keep b. The file is locked.
func (f *File) forEach(fn func(extent uint32, b []byte, e entry, s entryState) error) error {
	size, err := f.f.Size()
	if err != nil {
		return err
	}
	for group := int64(0); f.h.tableOffset(group) < size; group++ {
		first := group * f.h.group
		table, err := f.table(group)
		if err != nil {
			return err
		}
		for i := range f.h.group {
			b := table[i*entrySize:][:entrySize]
			extent := uint32(first + i)
			e, s := f.h.decodeEntry(b, extent)
			if s == free {
				continue
			}
			if err := fn(extent, b, e, s); err != nil {
				return err
			}
		}
	}
	return nil
}

// space is the number of extents that the disk has room for. The file is locked.
func (f *File) space() (int64, error) {
	if f.device {
		return 0, nil
	}
	info, err := f.fs.StatFS(f.path)
	return info.Free / f.h.extentSize, err
}

// Free is the number of bytes that Reserve could give out now: free extents,
// and what the file may still grow within its capacity and the space left on
// the file system.
func (f *File) Free(ctx context.Context) (bytes int64, err error) {
	err = f.locked(ctx, vfs.Shared, func() error {
		now, err := f.extents()
		if err != nil {
			return err
		}
		space, err := f.space()
		if err != nil {
			return err
		}
		holes, err := f.holes()
		if err != nil {
			return err
		}
		tables := func(extents int64) int64 { return (extents + f.h.group - 1) / f.h.group }
		bound := f.bound(now)
		n := min(now, bound)
		n -= tables(n)
		err = f.forEach(func(extent uint32, _ []byte, _ entry, _ entryState) error {
			if int64(extent) < min(now, bound) {
				n--
			}
			return nil
		})
		if holes {
			n = min(n, space)
			space -= n
		}
		if grow := min(space, bound-now); grow > 0 {
			n += grow - (tables(now+grow) - tables(now))
		}
		bytes = n * f.h.extentSize
		return err
	})
	return bytes, err
}

// pick chooses up to want free extents, lowest first: those in the file as it
// is, of `now` extents, then those that it can get by growing. It fails if owner
// has extents already. The file is locked.
func (f *File) pick(want, now int64, owner uuid.UUID) ([]uint32, error) {
	space, err := f.space()
	if err != nil {
		return nil, err
	}
	// Which free extents have no blocks is not known: if any, all are counted.
	holes, err := f.holes()
	if err != nil {
		return nil, err
	}
	var list []uint32
	bound := f.bound(now)
	for first := int64(0); first < bound; first += f.h.group {
		if first >= now {
			space-- // for the new table
			if space <= 0 || int64(len(list)) == want {
				break
			}
		}
		// A group that is not there can still have a line in its table: if a
		// crash cut the file short, or somebody did.
		table, err := f.table(first / f.h.group)
		if err != nil {
			return nil, err
		}
		for i := int64(1); i < f.h.group; i++ {
			e, s := f.h.decodeEntry(table[i*entrySize:], uint32(first+i))
			if s == taken && e.owner == owner {
				return nil, fmt.Errorf("%s: checkpoint %v already has extents", f.path, owner)
			}
			if s != free || first+i >= bound || int64(len(list)) == want {
				continue
			}
			if holes || first+i >= now {
				if space <= 0 {
					continue
				}
				space--
			}
			list = append(list, uint32(first+i))
		}
	}
	return list, nil
}

// runs calls fn for each stretch of consecutive numbers in list that lies in one
// group: list[i:j].
func (g geometry) runs(list []uint32, fn func(i, j int) error) error {
	for i := 0; i < len(list); {
		j := i + 1
		for j < len(list) && list[j] == list[j-1]+1 && int64(list[j])%g.group != 0 {
			j++
		}
		if err := fn(i, j); err != nil {
			return err
		}
		i = j
	}
	return nil
}

// setEntries writes the table entries of the extents in list, rising, durably.
// fill makes one of zeros. The file is locked.
func (f *File) setEntries(list []uint32, fill func(b []byte, i int)) error {
	err := f.h.runs(list, func(i, j int) error {
		b := make([]byte, (j-i)*entrySize)
		for k := i; k < j; k++ {
			fill(b[(k-i)*entrySize:][:entrySize], k)
		}
		_, err := f.f.WriteAt(b, f.h.entryOffset(int64(list[i])))
		return err
	})
	if err != nil {
		return err
	}
	for i := 0; i < len(list); {
		j := i + 1
		for j < len(list) && int64(list[j])/f.h.group == int64(list[i])/f.h.group {
			j++
		}
		first, last := f.h.entryOffset(int64(list[i])), f.h.entryOffset(int64(list[j-1]))
		if err := f.syncRange(first, last+entrySize-first); err != nil {
			return err
		}
		i = j
	}
	return nil
}

// clearEntries frees the extents in list, rising, durably. The file is locked.
func (f *File) clearEntries(list []uint32) error {
	return f.setEntries(list, func([]byte, int) {})
}

// back makes sure that the extents in list have disk blocks, with the table of
// each group that begins among them. After an error nothing has been taken from the
// disk, and until the extents have an owner, undo gives back what was. The file is locked.
func (f *File) back(list []uint32, now int64) (undo func() error, err error) {
	size, err := f.f.Size()
	if err != nil {
		return nil, err
	}
	inFile := list
	for len(inFile) > 0 && int64(inFile[len(inFile)-1]) >= now {
		inFile = inFile[:len(inFile)-1]
	}
	grows := len(inFile) < len(list)
	undo = func() (err error) {
		if grows {
			err = f.f.Truncate(size)
		}
		if !f.keeps() {
			err = errors.Join(err, f.h.runs(inFile, func(i, j int) error { return f.punch(int64(list[i]), int64(list[j-1])+1) }))
		}
		return err
	}
	err = f.h.runs(inFile, func(i, j int) error {
		return f.allocate(f.h.offset(list[i]), f.h.offset(list[j-1])+f.h.extentSize, now*f.h.extentSize)
	})
	if err == nil && grows {
		err = f.allocate(now*f.h.extentSize, f.h.offset(list[len(list)-1])+f.h.extentSize, size)
	}
	if err != nil {
		return nil, errors.Join(err, undo())
	}
	return undo, nil
}

// Reserve takes extents for bytes of page slots of pageSize (a power of two,
// 1 KiB to 64 KiB) in the name of the checkpoint owner of store. It gives fewer,
// down to none, if capacity or disk have no room for more: look at Region.Slots.
// The extents are durably the owner's when it returns, and nobody else's until
// Release, Trim, FreeOwner or Sweep. If it fails (ENOSPC: the disk filled up in
// this moment), nothing has been taken. An owner can reserve only once.
func (f *File) Reserve(ctx context.Context, owner, store uuid.UUID, bytes int64, pageSize int) (*Region, error) {
	if owner == uuid.Nil || store == uuid.Nil {
		return nil, errors.New("nvram: an owner needs a UUID")
	}
	if bytes < 0 || !f.h.validPageSize(pageSize) {
		return nil, fmt.Errorf("nvram: can't reserve %d bytes in pages of %d", bytes, pageSize)
	}
	r := f.newRegion(pageSize)
	r.owner, r.writable = owner, true
	want := bytes / f.h.extentSize
	if bytes%f.h.extentSize != 0 {
		want++
	}
	err := f.locked(ctx, vfs.Exclusive, func() error {
		now, err := f.extents()
		if err != nil {
			return err
		}
		list, err := f.pick(want, now, owner)
		if err != nil {
			return err
		}
		undo, err := f.back(list, now)
		if err != nil {
			return err
		}
		since := time.Now()
		err = f.setEntries(list, func(b []byte, i int) {
			f.h.encodeEntry(b, list[i], entry{owner, store, uint32(i), uint32(pageSize), since})
		})
		if err == nil {
			r.extents = list
			err = r.mapExtents(list)
		}
		if err != nil {
			// If this fails too, Sweep will find them: they have an owner, and are left alone.
			if cerr := f.clearEntries(list); cerr != nil {
				err = errors.Join(err, cerr)
			} else {
				err = errors.Join(err, undo())
			}
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return r, nil
}

// OpenSome opens the extents of a committed checkpoint for reading, of those the ones whose
// numbers among the owner's need is true for (nil: all): the others may have been given back
// by FreeSome, and their slots can't be read. It checks that each of them has been taken by
// this owner as that number, with that page size, and lies within the file; an
// integrity.CorruptError otherwise. The content of the pages is covered by the caller's own
// checksums.
func (f *File) OpenSome(owner uuid.UUID, extents []uint32, pageSize int, need func(index int) bool) (*Region, error) {
	if !f.h.validPageSize(pageSize) {
		return nil, fmt.Errorf("nvram: no page can have %d bytes", pageSize)
	}
	now, err := f.extents()
	if err != nil {
		return nil, err
	}
	// No lock: entries of an owner that is not being removed don't change.
	var table []byte
	group := int64(-1)
	var opened []uint32
	for i, extent := range extents {
		if need != nil && !need(i) {
			continue
		}
		opened = append(opened, extent)
		at := f.h.entryOffset(int64(extent))
		if int64(extent)%f.h.group == 0 {
			return nil, f.corrupt(f.h.offset(extent), "extent %d holds an owner table, not pages of checkpoint %v", extent, owner)
		}
		if int64(extent) >= now {
			return nil, f.corrupt(f.h.offset(extent), "the file ends before extent %d of checkpoint %v", extent, owner)
		}
		if g := int64(extent) / f.h.group; g != group {
			group = g
			if table, err = f.table(group); err != nil {
				return nil, err
			}
		}
		e, s := f.h.decodeEntry(table[int64(extent)%f.h.group*entrySize:], extent)
		switch {
		case s == free:
			return nil, f.corrupt(at, "extent %d should belong to checkpoint %v but is free", extent, owner)
		case s != taken:
			return nil, f.corrupt(at, "checksum mismatch in the owner table entry of extent %d", extent)
		case e.owner != owner || e.index != uint32(i):
			return nil, f.corrupt(at, "extent %d should be number %d of checkpoint %v but is number %d of %v", extent, i, owner, e.index, e.owner)
		case e.pageSize != uint32(pageSize):
			return nil, f.corrupt(at, "extent %d has pages of %d bytes, not %d", extent, e.pageSize, pageSize)
		}
	}
	r := f.newRegion(pageSize)
	r.owner, r.extents = owner, slices.Clone(extents)
	if err := r.mapExtents(opened); err != nil {
		return nil, err
	}
	return r, nil
}

// keeps tells if free extents keep their disk blocks.
func (f *File) keeps() bool { return f.device || f.h.compatible&featureKeep != 0 }

// punch gives the blocks of extents [first, end), which are free, back to the file
// system. What a full disk or a file system that can't keeps from it is left as it
// is: the extents can be reserved either way. The file is locked.
func (f *File) punch(first, end int64) error {
	err := f.f.Punch(first*f.h.extentSize, (end-first)*f.h.extentSize)
	if errors.Is(err, errors.ErrUnsupported) || errors.Is(err, syscall.ENOSPC) {
		return nil
	}
	return err
}

// giveBack gives the disk blocks of free extents back: it cuts the file after the
// last extent that is taken, and punches the free ones of the given groups (nil:
// of all). The extents' table entries have been cleared durably before, so nobody
// thinks any more that they are his. It takes the lock anew for each group, and
// looks at the table again under it: an extent that has been reserved meanwhile is
// not hit, and nobody waits for longer than 256 MiB take (some 70 ms on ext4).
func (f *File) giveBack(ctx context.Context, groups map[int64]bool) error {
	if f.keeps() {
		return nil
	}
	rested := time.Now()
	step := func(fn func() error) error {
		if time.Since(rested) > 200*time.Millisecond {
			// Other processes only look from time to time whether the lock is free.
			select {
			case <-time.After(2 * vfs.LockPause):
			case <-ctx.Done():
				return context.Cause(ctx)
			}
			rested = time.Now()
		}
		return f.locked(ctx, vfs.Exclusive, fn)
	}
	for more := true; more; {
		err := step(func() (err error) {
			more, err = f.cutTail()
			return err
		})
		if err != nil {
			return err
		}
	}
	end, err := f.extents()
	for group := int64(0); err == nil && group*f.h.group < end; group++ {
		if groups != nil && !groups[group] {
			continue
		}
		err = step(func() error { return f.punchGroup(group) })
	}
	return err
}

// cutTail ends the file after the last extent that is taken, or a group's length
// before its end, and then there may be more to cut. The first extent stays. Whoever
// has the file mapped touches extents that are his, which lie before the cut. The
// file is locked.
func (f *File) cutTail() (more bool, err error) {
	size, err := f.f.Size()
	if err != nil {
		return false, err
	}
	whole := size / f.h.extentSize
	least := max(whole-f.h.group, 1)
	end := least
	// A table can reach beyond the last whole extent.
	for group := whole / f.h.group; end == least && (group+1)*f.h.group > least; group-- {
		table, err := f.table(group)
		if err != nil {
			return false, err
		}
		for i := f.h.group - 1; i >= 0; i-- {
			if !bytes.Equal(table[i*entrySize:][:entrySize], zeroEntry[:]) {
				end = max(end, group*f.h.group+i+1)
				break
			}
		}
	}
	if end*f.h.extentSize >= size {
		return false, nil
	}
	return end == least && least > 1, f.f.Truncate(end * f.h.extentSize)
}

// punchGroup punches the free extents of a group. The file is locked.
func (f *File) punchGroup(group int64) error {
	end, err := f.extents()
	first := group * f.h.group
	if err != nil || first >= end {
		return err
	}
	table, err := f.table(group)
	if err != nil {
		return err
	}
	last := min(f.h.group, end-first)
	for i := int64(1); i < last; i++ {
		j := i
		for j < last && bytes.Equal(table[j*entrySize:][:entrySize], zeroEntry[:]) {
			j++
		}
		if j > i {
			if err := f.punch(first+i, first+j); err != nil {
				return err
			}
			i = j
		}
	}
	return nil
}

// groupsOf are the groups that extents lie in.
func (f *File) groupsOf(list []uint32) map[int64]bool {
	groups := make(map[int64]bool)
	for _, extent := range list {
		groups[int64(extent)/f.h.group] = true
	}
	return groups
}

// release frees, durably, the extents for which match says so, and returns them.
func (f *File) release(ctx context.Context, match func(entry, entryState) bool) (list []uint32, err error) {
	err = f.locked(ctx, vfs.Exclusive, func() error {
		err := f.forEach(func(extent uint32, _ []byte, e entry, s entryState) error {
			if match(e, s) {
				list = append(list, extent)
			}
			return nil
		})
		if err != nil {
			return err
		}
		return f.clearEntries(list)
	})
	if err != nil {
		return nil, err
	}
	return list, nil
}

// FreeOwner frees all extents of a checkpoint, durably, and returns how many.
// None is no error: freeing can be repeated after a crash. An error that comes with
// a number is one of giving disk blocks back, which Sweep tries again. Call it only
// when the checkpoint's removal is durable, and no reader has it open.
func (f *File) FreeOwner(ctx context.Context, owner uuid.UUID) (freed int, err error) {
	return f.freeIf(ctx, owner, func(entry) bool { return true })
}

// FreeSome is FreeOwner of those extents only whose numbers among the owner's which is
// true for, and which he has since the time that Owned gave, or for longer: meanwhile they
// can have been freed, and others reserved for him. Nobody may need what is in them any more,
// nor have them open.
func (f *File) FreeSome(ctx context.Context, owner uuid.UUID, since time.Time, which func(index int) bool) (freed int, err error) {
	return f.freeIf(ctx, owner, func(e entry) bool { return !e.since.After(since) && which(int(e.index)) })
}

func (f *File) freeIf(ctx context.Context, owner uuid.UUID, which func(entry) bool) (freed int, err error) {
	if owner == uuid.Nil {
		return 0, nil
	}
	list, err := f.release(ctx, func(e entry, s entryState) bool { return e.owner == owner && which(e) })
	if err != nil || len(list) == 0 {
		return 0, err
	}
	return len(list), f.giveBack(ctx, f.groupsOf(list))
}

// PerExtent is how many slots of a page size an extent has.
func (f *File) PerExtent(pageSize int) int { return int(f.h.extentSize) / pageSize }

// Owned lists the numbers, among the owner's, of the extents that an owner has now, and tells
// since when, to the second.
func (f *File) Owned(ctx context.Context, owner uuid.UUID) (indexes []int, since time.Time, err error) {
	err = f.locked(ctx, vfs.Shared, func() error {
		return f.forEach(func(_ uint32, _ []byte, e entry, s entryState) error {
			if s == taken && e.owner == owner {
				indexes, since = append(indexes, int(e.index)), e.since
			}
			return nil
		})
	})
	return indexes, since, err
}

// Sweep frees, durably, the extents of store whose owner is not live, and those
// whose table entry was cut off by a power failure (nobody can have committed
// them); it returns how many. Extents of other stores are not touched, nor are
// entries that are damaged in another way: they may be somebody's, and Check
// reports them. live must say true for a save that is under way, too; it must
// not call methods of the File. Sweep also gives back the disk blocks of all that
// is free, by whomever; an error of that comes with the number that was freed.
func (f *File) Sweep(ctx context.Context, store uuid.UUID, live func(owner uuid.UUID) bool) (freed int, err error) {
	return f.SweepSince(ctx, store, func(owner uuid.UUID, _ time.Time) bool { return live(owner) })
}

// SweepSince is Sweep for who was told by Owners, some time ago, who is not live, and since
// when he had his extents: meanwhile these can have been freed, and reserved anew for the same
// owner.
func (f *File) SweepSince(ctx context.Context, store uuid.UUID, live func(owner uuid.UUID, since time.Time) bool) (freed int, err error) {
	list, err := f.release(ctx, func(e entry, s entryState) bool {
		return s == torn || s == taken && e.store == store && !live(e.owner, e.since)
	})
	if err != nil {
		return 0, err
	}
	return len(list), f.giveBack(ctx, nil)
}

// Owner is a checkpoint that has extents in the file.
type Owner struct {
	UUID    uuid.UUID // of the checkpoint
	Store   uuid.UUID
	Since   time.Time // of the reservation, to the second
	Extents int
}

// Owners lists the checkpoints of a store that have extents (of all stores for
// the zero UUID), ordered by UUID. They may be committed or not.
func (f *File) Owners(ctx context.Context, store uuid.UUID) ([]Owner, error) {
	owners := map[uuid.UUID]*Owner{}
	err := f.locked(ctx, vfs.Shared, func() error {
		return f.forEach(func(_ uint32, _ []byte, e entry, s entryState) error {
			if s != taken || store != uuid.Nil && e.store != store {
				return nil
			}
			o := owners[e.owner]
			if o == nil {
				o = &Owner{UUID: e.owner, Store: e.store, Since: e.since}
				owners[e.owner] = o
			}
			o.Extents++
			return nil
		})
	})
	if err != nil {
		return nil, err
	}
	list := make([]Owner, 0, len(owners))
	for _, o := range owners {
		list = append(list, *o)
	}
	slices.SortFunc(list, func(a, b Owner) int { return bytes.Compare(a.UUID[:], b.UUID[:]) })
	return list, nil
}
