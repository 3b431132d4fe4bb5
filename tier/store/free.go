package store

import (
	"context"
	"errors"
	"slices"
	"time"

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
	flash   int64
	idle    []idle // what is to be given back of NVRAM, without the store lock (freeNVRAM)
	removed bool   // the image is no more
}

// reservations tell since when images have their extents in NVRAM. Who is going to free some
// looks before he takes the store lock, under which no table is searched. What an owner has
// reserved after that look is not what was decided about: a checkpoint that was removed can
// have come back, from another store.
type reservations map[uuid.UUID]reservation

// reservation is one of them: zero is none.
type reservation struct {
	since time.Time
	err   error // why it is not known, if so
}

// idle is NVRAM of an image that nobody needs.
type idle struct {
	id   *checkpoint.Identity
	had  reservation
	need source.Ranges // slots of it that others need
	// image is locked exclusively until its extents are free, so that nobody begins to need
	// them; nil if nobody can.
	image Object
}

// free frees what nobody needs of an image that is not listed: all of it, or the
// segments that no listed checkpoint names, and decides which extents in NVRAM are idle. The
// caller holds the store lock, and the image exclusively as f, which is closed, or belongs to
// what is idle; v is up to date, and what is not there is durably so. had is from before the
// lock. left is what could not be freed and does no harm.
func (s *Store) free(ctx context.Context, st stored, f Object, o vmObjects, v *survey, had reservations) (fr freed, left, err error) {
	keep := false
	defer func() {
		if !keep {
			f.Close()
		}
	}()
	id := st.id
	// What a copy in another place says is in NVRAM, or in pieces, is the original's; sweep
	// knows whether that one is there.
	home := id != nil && checkPlace(f.Name(), st.ref, id) == nil
	owner := home && id.InNVRAM()
	size, err := occupied(f)
	if err != nil {
		return fr, nil, err
	}
	needed := v.needed(st.uuid)
	if needed && v.unclear == nil {
		elsewhere, err := s.isElsewhere(ctx, st, v.listed[st.uuid])
		if err != nil {
			return fr, nil, err
		}
		needed = !elsewhere
	}
	if !needed {
		if err := s.drop(ctx, st, o); err != nil {
			return fr, nil, err
		}
		fr.removed = true
		if fr.flash, err = s.dropMoved(ctx, st.ref, st.uuid, o); err != nil {
			return fr, nil, err
		}
		fr.flash += size
		if owner {
			fr.idle = []idle{{id: id, had: had[st.uuid]}}
		}
		return fr, nil, nil
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
	fr.idle, keep = []idle{{id, had[st.uuid], u.slots.Minus(there), f}}, true
	return fr, nil, nil
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

// dropTwins takes their names away from unlisted images that say they are the listed one in r's
// place, which has this UUID and gets one of their names: a second name of it that a flattening
// which was cut off has left, or a part of it that a power cut has brought back. Who looks for
// the image must not find that part. The caller holds the store lock.
func (s *Store) dropTwins(ctx context.Context, r Ref, id uuid.UUID) (some bool, err error) {
	for _, name := range r.imageObjects(id)[1:] {
		there, err := s.owner(ctx, name)
		if gone(err) || cannotTell(err) || err == nil && there != id {
			continue
		}
		if err == nil {
			err = s.dir.Remove(ctx, name)
		}
		if err != nil {
			return some, err
		}
		some = true
	}
	return some, nil
}

// isElsewhere tells whether all of an unlisted image is listed at r, as one that was removed
// is once it has been received again under another name. Who refers to it finds that one when
// this is gone, and not before: of this one perhaps a part is left, which is not enough for
// who comes to refer to the whole. What both may own in NVRAM can't be told apart, and is a
// reason to let them be. The caller holds the store lock.
func (s *Store) isElsewhere(ctx context.Context, st stored, r Ref) (bool, error) {
	if r.VM == "" {
		return false, nil
	}
	id, err := s.whoIs(ctx, r.object(imageSuffix))
	if gone(err) || cannotTell(err) || errors.Is(err, errNotObject) {
		return false, nil
	}
	return err == nil && id != nil && id.UUID == st.uuid && checkPlace("", r, id) == nil &&
		!(id.InNVRAM() && st.id != nil && st.id.InNVRAM()), err
}

// freeTwins frees the unlisted ones of the images with these UUIDs that are listed elsewhere
// (isElsewhere), unless they are in use: then gc does.
func (s *Store) freeTwins(ctx context.Context, ids []uuid.UUID) error {
	if len(ids) == 0 {
		return nil
	}
	look := s.lookup()
	there, err := look.unlistedAmong(ctx, ids)
	if err != nil || len(there) == 0 {
		return err
	}
	v := look.survey(there...)
	if err := v.update(ctx); err != nil {
		return err
	}
	had, err := look.reservedBy(ctx, new(checkpoint.Identity), there)
	if err != nil {
		return err
	}
	unlock, err := look.lock(ctx)
	if err != nil {
		return err
	}
	all, _, err := s.freeUnlisted(ctx, v, there, had) // gc says what is left
	unlock()
	_, _ = s.freeNVRAM(ctx, all.idle...)
	return err
}

// occupied is what an image takes: its length, less the holes in it.
func occupied(f Object) (int64, error) {
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

// reserved is an image's reservation.
func (s *Store) reserved(ctx context.Context, id *checkpoint.Identity) (r reservation) {
	if !id.InNVRAM() {
		return r
	}
	f, err := nvram.Open(ctx, s.fs, id.NVRAM.Path, nvram.Options{ReadOnly: true})
	if err != nil {
		return reservation{err: err}
	}
	defer f.Close()
	if f.UUID() == id.NVRAM.UUID { // or else freeNVRAM says that it is another
		_, r.since, r.err = f.Owned(ctx, id.UUID)
	}
	return r
}

// reservedBy are the reservations of an image, and of the unlisted ones with these UUIDs.
func (l *lookup) reservedBy(ctx context.Context, id *checkpoint.Identity, unlisted []uuid.UUID) (reservations, error) {
	had := reservations{id.UUID: l.s.reserved(ctx, id)}
	if len(unlisted) == 0 {
		return had, nil
	}
	err := l.eachVMSeen(ctx, func(vm string, o vmObjects) error {
		for _, st := range o.unlisted(vm) {
			empty, err := l.unlistedIs(ctx, &st)
			if err == nil && !empty && st.id != nil && slices.Contains(unlisted, st.uuid) {
				had[st.uuid] = l.s.reserved(ctx, st.id)
			}
		}
		return nil
	})
	return had, err
}

// freeNVRAM gives idle extents back, and closes their images. Nobody waits for it: the caller
// does not hold the store lock.
func (s *Store) freeNVRAM(ctx context.Context, list ...idle) (bytes int64, left error) {
	said := make(map[string]bool)
	for _, i := range list {
		freed, err := s.freeIdle(ctx, i)
		bytes += freed
		if err != nil && !said[err.Error()] { // of one file it is the same for all
			said[err.Error()] = true
			left = errors.Join(left, err)
		}
	}
	return bytes, left
}

func (s *Store) freeIdle(ctx context.Context, i idle) (bytes int64, err error) {
	if i.image != nil {
		defer i.image.Close()
	}
	if err := s.CheckHome(ctx); err != nil {
		return 0, err
	}
	f, err := s.openNVRAM(ctx, nvramFile{i.id.NVRAM.Path, i.id.NVRAM.UUID})
	if err != nil {
		return 0, err
	}
	defer f.Close()
	if i.had.err != nil || i.had.since.IsZero() {
		return 0, i.had.err
	}
	idle := idleExtents(f, i.id, i.need)
	if len(i.need) > 0 {
		// Most looks find nothing, and need not keep others from the file.
		owned, _, err := f.Owned(ctx, i.id.UUID)
		if err != nil || !slices.ContainsFunc(owned, idle) {
			return 0, err
		}
	}
	n, err := f.FreeSome(ctx, i.id.UUID, i.had.since, idle)
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
// them, and its lookup has the store lock; had is from before. What is idle of NVRAM is the
// caller's to free, also after an error.
func (s *Store) freeUnlisted(ctx context.Context, v *survey, ids []uuid.UUID, had reservations) (all freed, left error, err error) {
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
			fr, why, err := s.free(ctx, st, f, o, v, had)
			all.flash, all.idle = all.flash+fr.flash, append(all.idle, fr.idle...)
			left = errors.Join(left, why)
			if err != nil {
				return err
			}
		}
		return nil
	})
	return all, left, err
}
