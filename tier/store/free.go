package store

import (
	"context"
	"errors"
	"slices"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/nvram"
	"github.com/flic-migrate/flic-migrate/tier/source"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// freed is what was given back, in bytes.
type freed struct {
	flash, nvram int64
	removed      bool // the image is no more
}

// free frees what nobody needs of an image that is not listed: all of it, or the
// segments and the extents in NVRAM that no listed checkpoint names. The caller holds
// the store lock, and the image exclusively as f; v is up to date, and what is not there
// is durably so. left is what could not be freed and does no harm.
func (s *Store) free(ctx context.Context, st stored, f Object, o vmObjects, v *survey) (fr freed, left, err error) {
	id := st.id
	// What a copy in another place says is in NVRAM, or in pieces, is the original's; sweep
	// knows whether that one is there.
	home := id != nil && checkPlace(f.Name(), st.ref, id) == nil
	owner := home && id.InNVRAM()
	size, err := taken(f)
	if err != nil {
		return fr, nil, err
	}
	if !v.needed(st.uuid) {
		if err := s.drop(ctx, st, o); err != nil {
			return fr, nil, err
		}
		fr.removed = true
		if fr.flash, err = s.dropMoved(ctx, st.ref, st.uuid, o); err != nil {
			return fr, nil, err
		}
		fr.flash += size
		if owner {
			fr.nvram, left = s.freeNVRAM(ctx, id, nil)
		}
		return fr, left, nil
	}
	if v.unclear != nil || v.of[st.uuid] == nil {
		return fr, v.unclear, nil
	}
	u := v.of[st.uuid]
	ranges, err := unused(f, u.segments)
	if integrity.IsCorrupt(err) || isUnsupported(err) {
		return fr, err, nil
	}
	if err != nil {
		return fr, nil, err
	}
	if fr.flash, err = s.dir.Punch(ctx, st.name, ranges); err != nil {
		return fr, nil, err
	}
	if !home || id.PieceSlots() == 0 {
		return fr, nil, nil
	}
	there, err := s.movedSlots(ctx, st.ref, st.uuid)
	if integrity.IsCorrupt(err) || isUnsupported(err) {
		return fr, err, nil
	}
	var holes int64
	if err == nil {
		holes, err = s.punchMoved(ctx, st.ref, st.uuid, u.slots)
		fr.flash += holes
	}
	if err != nil || !owner {
		return fr, nil, err
	}
	fr.nvram, left = s.freeNVRAM(ctx, id, u.slots.Minus(there))
	return fr, left, nil
}

// isTwin tells whether an unlisted image may be one that is listed under its number, of
// which it is a second name.
func (s *Store) isTwin(ctx context.Context, st stored) bool {
	listed, err := s.owner(ctx, st.ref.object(imageSuffix))
	return err == nil && listed == st.uuid || err != nil && !gone(err)
}

// untwin takes an unlisted image's name away if the same is listed under its number, as a
// flattening that was cut off leaves it. What it owns is the listed one's. The caller
// holds the store lock.
func (s *Store) untwin(ctx context.Context, st stored) (bool, error) {
	if st.uuid == uuid.Nil {
		return false, nil
	}
	listed, err := s.owner(ctx, st.ref.object(imageSuffix))
	if gone(err) || cannotTell(err) || err == nil && listed != st.uuid {
		return false, nil
	}
	if err == nil {
		err = s.dir.Remove(ctx, st.name)
	}
	return true, err
}

// taken is what an image takes: its length, less the holes in it.
func taken(f Object) (int64, error) {
	size, err := f.Size()
	if err != nil {
		return 0, err
	}
	allocated, err := f.Allocated()
	return min(size, allocated), err
}

// drop removes what is left of an image that nobody needs. The highest number of a VM is
// remembered by what is left of it.
func (s *Store) drop(ctx context.Context, st stored, o vmObjects) error {
	_, listed := slices.BinarySearch(o.images, st.ref.N)
	if st.name == st.ref.object(removedSuffix) && st.ref.N == o.last() && !listed {
		return s.dir.Empty(ctx, st.name, spare())
	}
	return s.dir.Remove(ctx, st.name)
}

// unused are the ranges of an unlisted image in which nothing is that others need, if
// they need these segments. What describes their pages stays, and what the image says
// of itself; its own page map and skeleton go.
func unused(src image.Source, segments source.Ranges) (list []byteRange, err error) {
	im, err := image.Open(src)
	if err != nil {
		return nil, err
	}
	open := false // the last range goes on
	err = im.Frames(func(k image.Kind, number uint32, off int64) error {
		switch {
		case k.IsSegment() && !segments.Has(uint64(number), uint64(number)),
			k == image.Skeleton, k == image.PageMap, k == image.Bases, k == image.References:
			if !open {
				list = append(list, byteRange{off: off})
			}
			open = true
		default:
			if open {
				list[len(list)-1].end = off
			}
			open = false
		}
		return nil // META is the last, and stays
	})
	return list, err
}

// freeNVRAM gives an image's NVRAM back, but for the extents with slots that others
// need.
func (s *Store) freeNVRAM(ctx context.Context, id *checkpoint.Identity, need source.Ranges) (bytes int64, err error) {
	if err := s.CheckHome(ctx); err != nil {
		return 0, err
	}
	f, err := s.openNVRAM(ctx, nvramFile{id.NVRAM.Path, id.NVRAM.UUID})
	if err != nil {
		return 0, err
	}
	defer f.Close()
	idle := idleExtents(f, id, need)
	if len(need) > 0 {
		// Most looks find nothing, and need not keep others from the file.
		owned, err := f.Owned(ctx, id.UUID)
		if err != nil || !slices.ContainsFunc(owned, idle) {
			return 0, err
		}
	}
	n, err := f.FreeSome(ctx, id.UUID, idle)
	return int64(n) * nvram.ExtentSize, err
}

// idleExtents tells of an image's extents, by their numbers among its own, which of them
// have no slots that are needed.
func idleExtents(f *nvram.File, id *checkpoint.Identity, need source.Ranges) func(index int) bool {
	per := uint64(f.PerExtent(id.PageSize))
	return func(index int) bool { return !need.Meets(uint64(index)*per, uint64(index+1)*per-1) }
}

// unlistedAmong are those of some images that are there and not listed. It takes no lock, and
// looks at all folders: a survey that begins now need not.
func (l *lookup) unlistedAmong(ctx context.Context, ids []uuid.UUID) (there []uuid.UUID, err error) {
	some, _, err := l.shares(ctx)
	if err != nil || !some {
		return nil, err
	}
	err = l.eachVM(ctx, "", func(vm string, o vmObjects) error {
		for _, st := range o.unlisted(vm) {
			// gc says what can't be read.
			if empty, err := l.unlistedIs(ctx, &st); err == nil && !empty && slices.Contains(ids, st.uuid) {
				there = append(there, st.uuid)
			}
		}
		return nil
	})
	return there, err
}

// freeUnlisted frees what nobody needs of the unlisted images with these UUIDs. v is of
// them, and its lookup has the store lock.
func (s *Store) freeUnlisted(ctx context.Context, v *survey, ids []uuid.UUID) (all freed, left error, err error) {
	some, _, err := v.look.shares(ctx)
	if err != nil || !some || len(ids) == 0 {
		return all, nil, err
	}
	settled := false
	err = v.look.eachVMAgain(ctx, func(vm string, o vmObjects) error {
		for _, st := range o.unlisted(vm) {
			empty, err := v.look.unlistedIs(ctx, &st)
			if err != nil || empty || !slices.Contains(ids, st.uuid) {
				continue // gc says what can't be read
			}
			if !settled {
				if err := v.update(ctx); err != nil {
					return err
				}
				if err := s.settle(ctx); err != nil {
					return err
				}
				settled = true
			}
			done, err := s.untwin(ctx, st)
			if err != nil {
				return err
			}
			if done {
				continue
			}
			f, err := s.dir.Open(ctx, st.name, Exclusive)
			if errors.Is(err, vfs.ErrLocked) || gone(err) {
				continue // gc will
			}
			if err != nil {
				return err
			}
			fr, why, err := s.free(ctx, st, f, o, v)
			f.Close()
			all.flash, all.nvram = all.flash+fr.flash, all.nvram+fr.nvram
			left = errors.Join(left, why)
			if err != nil {
				return err
			}
		}
		return nil
	})
	return all, left, err
}
