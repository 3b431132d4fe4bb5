package nvram

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"slices"
	"sync"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// maxBuffers bounds the memory of a region that is being written: 16 extents
// are 4 MiB. Slots are handed out in heat order while pages come in address
// order, so there are a few fronts that move on at the same time, one a heat.
const maxBuffers = 16

var errClosed = errors.New("nvram: region is closed")

// Region is the page slots of one checkpoint: from Reserve for writing, from
// OpenSome for reading. Slot s of n slots an extent is in Extents()[s/n].
//
// Pages are collected to whole extents and then written with one system call,
// not stored through the mapping. On DAX the kernel copies them with
// non-temporal stores either way; on any other file system a store through a
// mapping costs a page fault for each page (a third of the throughput, measured
// on ext4), and a medium error or a full disk there would be a SIGBUS where a
// write has an error.
type Region struct {
	f         *File
	owner     uuid.UUID
	extents   []uint32
	pageSize  int
	perExtent int // slots
	writable  bool

	// m maps everything from the first extent to the last, for Page and for
	// Sync. What lies between and is not ours costs address space only.
	m    vfs.Mapping
	base int64 // file offset of m

	mu      sync.Mutex
	closed  bool
	failed  error // of a write or sync: nothing can be trusted from then on
	open    []*buffer
	clock   uint64
	recycle *buffer
}

// buffer holds slots of one extent that are not written to the file yet.
type buffer struct {
	index int // of the extent in Region.extents
	data  []byte
	slots []uint64 // bitmap of the slots that data has
	count int
	used  uint64 // by the region's clock
}

func (f *File) newRegion(pageSize int) *Region {
	return &Region{f: f, pageSize: pageSize, perExtent: int(f.h.extentSize) / pageSize}
}

// mapExtents maps the extents of a list, which are to be used.
func (r *Region) mapExtents(list []uint32) error {
	if len(list) == 0 {
		return nil
	}
	r.base = r.f.h.offset(slices.Min(list))
	end := r.f.h.offset(slices.Max(list)) + r.f.h.extentSize
	var err error
	r.m, err = r.f.f.Map(r.base, end-r.base, false)
	return err
}

// Slots is the number of page slots.
func (r *Region) Slots() int { return len(r.extents) * r.perExtent }

// PageSize is the size of a slot in bytes.
func (r *Region) PageSize() int { return r.pageSize }

// Extents are the numbers of the extents, in order, to be kept in the flash
// image.
func (r *Region) Extents() []uint32 { return slices.Clone(r.extents) }

// Offset is the file offset of a slot, for messages.
func (r *Region) Offset(slot int) int64 {
	return r.f.h.offset(r.extents[slot/r.perExtent]) + int64(slot%r.perExtent*r.pageSize)
}

// check says what is wrong with a slot, or with using the region at all.
func (r *Region) check(slot, page int) error {
	switch {
	case r.closed:
		return errClosed
	case slot < 0 || slot >= r.Slots():
		return fmt.Errorf("nvram: slot %d of %d", slot, r.Slots())
	case page != r.pageSize:
		return fmt.Errorf("nvram: page of %d bytes for slots of %d", page, r.pageSize)
	}
	return r.failed
}

// Write puts a page into its slot. It copies the page, which may be reused at
// once. A slot can be written again, also after Sync, which it then needs once
// more. Several goroutines may write. After an error the region can only be
// released.
func (r *Region) Write(slot int, page []byte) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.check(slot, len(page)); err != nil {
		return err
	}
	if !r.writable {
		return errors.New("nvram: region is open for reading")
	}
	b, err := r.buffer(slot / r.perExtent)
	if err != nil {
		return err
	}
	i := slot % r.perExtent
	copy(b.data[i*r.pageSize:], page)
	if b.slots[i/64]>>(i%64)&1 == 0 {
		b.slots[i/64] |= 1 << (i % 64)
		if b.count++; b.count == r.perExtent {
			return r.flush(b)
		}
	}
	return nil
}

// find returns the buffer of an extent, or nil.
func (r *Region) find(index int) *buffer {
	for _, b := range r.open {
		if b.index == index {
			r.clock++
			b.used = r.clock
			return b
		}
	}
	return nil
}

// buffer finds or makes the buffer of an extent. The one that has not been used
// for the longest time makes room.
func (r *Region) buffer(index int) (*buffer, error) {
	if b := r.find(index); b != nil {
		return b, nil
	}
	if len(r.open) == maxBuffers {
		oldest := slices.MinFunc(r.open, func(a, b *buffer) int { return int(int64(a.used) - int64(b.used)) })
		if err := r.flush(oldest); err != nil {
			return nil, err
		}
	}
	b := r.recycle
	r.recycle = nil
	if b == nil {
		b = &buffer{data: make([]byte, r.perExtent*r.pageSize), slots: make([]uint64, (r.perExtent+63)/64)}
	}
	r.clock++
	b.index, b.used = index, r.clock
	r.open = append(r.open, b)
	return b, nil
}

// flush writes what a buffer has to the file, in as few writes as it has runs,
// and drops it.
func (r *Region) flush(b *buffer) error {
	has := func(i int) bool { return b.slots[i/64]>>(i%64)&1 != 0 }
	off := r.f.h.offset(r.extents[b.index])
	for i := 0; i < r.perExtent; {
		if b.slots[i/64]>>(i%64) == 0 {
			i = (i/64 + 1) * 64
			continue
		}
		i += bits.TrailingZeros64(b.slots[i/64] >> (i % 64))
		j := i + 1
		for j < r.perExtent && has(j) {
			j++
		}
		if _, err := r.f.f.WriteAt(b.data[i*r.pageSize:j*r.pageSize], off+int64(i*r.pageSize)); err != nil {
			r.failed = err
			return err
		}
		i = j
	}
	// The disk can start now on what Sync will wait for.
	r.f.f.StartWriteback(off, r.f.h.extentSize)
	r.drop(b)
	return nil
}

// drop forgets a buffer.
func (r *Region) drop(b *buffer) {
	r.open = slices.DeleteFunc(r.open, func(o *buffer) bool { return o == b })
	clear(b.slots)
	b.count = 0
	r.recycle = b
}

func (r *Region) flushAll() error {
	for len(r.open) > 0 {
		if err := r.flush(r.open[0]); err != nil {
			return err
		}
	}
	return nil
}

// Sync makes all written pages durable. It waits for this region's extents only,
// not for what others have dirty in the file. If it fails the region must be
// released: a second Sync would prove nothing.
func (r *Region) Sync() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return errClosed
	}
	if r.failed != nil || !r.writable {
		return r.failed
	}
	if err := r.flushAll(); err != nil {
		return err
	}
	r.failed = r.eachRange(0, r.Slots(), func(off, n int64) error { return r.m.Sync(off, n) })
	return r.failed
}

// eachRange calls fn for the ranges of the mapping that slots [first, first+n)
// lie in, as few as possible.
func (r *Region) eachRange(first, n int, fn func(off, n int64) error) error {
	end := min(first+n, r.Slots())
	for s := max(first, 0); s < end; {
		start := s
		s = min((s/r.perExtent+1)*r.perExtent, end)
		for s < end && r.extents[s/r.perExtent] == r.extents[s/r.perExtent-1]+1 {
			s = min(s+r.perExtent, end)
		}
		if err := fn(r.Offset(start)-r.base, int64(s-start)*int64(r.pageSize)); err != nil {
			return err
		}
	}
	return nil
}

// ReadPage copies the content of a slot, written or not, to page. Unlike Page it
// can be used while the region is being written, and a medium error is an error,
// not a fault.
func (r *Region) ReadPage(slot int, page []byte) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.check(slot, len(page)); err != nil {
		return err
	}
	i := slot % r.perExtent
	if b := r.find(slot / r.perExtent); b != nil && b.slots[i/64]>>(i%64)&1 != 0 {
		copy(page, b.data[i*r.pageSize:])
		return nil
	}
	if n, err := r.f.f.ReadAt(page, r.Offset(slot)); n < len(page) {
		return fmt.Errorf("%s: offset %d: read of %d bytes gave %d: %w", r.f.path, r.Offset(slot), len(page), n, err)
	}
	return nil
}

// Page returns the content of a slot in the mapping, without a copy: read only,
// and valid until Close. In a region that is being written it shows what has
// been synced, and perhaps more. Touching the bytes can fault if the medium
// fails or the file has been cut: do it within Guard.
func (r *Region) Page(slot int) []byte {
	off := r.Offset(slot) - r.base
	return r.m.Bytes()[off:][:r.pageSize:r.pageSize]
}

// Guard runs fn, in which pages may be touched, and turns a fault in the
// region's mapping into an integrity.CorruptError with the file offset. It covers the
// calling goroutine only.
func (r *Region) Guard(fn func() error) error {
	err := vfs.CatchFault(fn)
	var fault *vfs.FaultError
	if errors.As(err, &fault) && r.m != nil {
		if i, ok := fault.Within(r.m.Bytes()); ok {
			return r.f.corrupt(r.base+i, "can't be read: the file has been cut short or the medium has an error")
		}
	}
	return err
}

// DontNeed takes slots [first, first+n) out of the process's resident memory.
// They can still be read.
func (r *Region) DontNeed(first, n int) {
	r.eachRange(first, n, func(off, n int64) error { r.m.DontNeed(off, n); return nil })
}

// Trim gives back, durably, the extents beyond the first slotsUsed slots. Call
// it before the commit: later nobody can know that they are unused.
func (r *Region) Trim(ctx context.Context, slotsUsed int) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if slotsUsed < 0 || slotsUsed > r.Slots() {
		return fmt.Errorf("nvram: trim to slot %d of %d", slotsUsed, r.Slots())
	}
	keep := (slotsUsed + r.perExtent - 1) / r.perExtent
	return r.giveBack(ctx, keep)
}

// giveBack frees all extents but the first `keep`.
func (r *Region) giveBack(ctx context.Context, keep int) error {
	switch {
	case r.closed:
		return errClosed
	case !r.writable:
		return errors.New("nvram: region is open for reading")
	}
	for _, b := range slices.Clone(r.open) {
		if b.index >= keep {
			r.drop(b)
		}
	}
	// They rise, and they are ours: no need to search the tables.
	list := r.extents[keep:]
	r.extents = r.extents[:keep]
	if len(list) == 0 {
		return nil
	}
	if err := r.f.locked(ctx, vfs.Exclusive, func() error { return r.f.clearEntries(list) }); err != nil {
		return err
	}
	return r.f.giveBack(ctx, r.f.groupsOf(list))
}

// Release gives all extents back and closes the region: the save has failed.
// What it can't give back is left to Sweep. A ctx that has been cancelled, which
// may be why the save failed, is not one to release with.
func (r *Region) Release(ctx context.Context) error {
	r.mu.Lock()
	err := r.giveBack(ctx, 0)
	r.mu.Unlock()
	return errors.Join(err, r.Close())
}

// Close unmaps the region and leaves its extents taken. Pages that were not
// synced may be lost.
func (r *Region) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nil
	}
	r.closed = true
	r.open, r.recycle = nil, nil
	if r.m == nil {
		return nil
	}
	return r.m.Close()
}
