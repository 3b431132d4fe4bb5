package nvram

import (
	"bytes"
	"context"
	"errors"
	"syscall"
	"time"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

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
// true for, and which he has since the time that Owned gave: meanwhile they can have been
// freed, and others reserved for him, at an earlier time if the clock was set back. Nobody may need what is in them any more,
// nor have them open.
func (f *File) FreeSome(ctx context.Context, owner uuid.UUID, since time.Time, which func(index int) bool) (freed int, err error) {
	return f.freeIf(ctx, owner, func(e entry) bool { return e.since.Equal(since) && which(int(e.index)) })
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
