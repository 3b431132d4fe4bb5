package nvram

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

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
