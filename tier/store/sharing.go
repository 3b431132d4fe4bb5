package store

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/moved"
	"github.com/flic-migrate/flic-migrate/tier/nvram"
	"github.com/flic-migrate/flic-migrate/tier/source"
)

// Space is bytes in both tiers.
type Space struct {
	Flash int64 `json:"flash_bytes"`
	NVRAM int64 `json:"nvram_bytes"`
}

// Referred is what a checkpoint needs of another.
type Referred struct {
	Checkpoint string    `json:"checkpoint"` // NAME@N
	UUID       uuid.UUID `json:"uuid"`
	// Removed is set if it is not listed, and only kept for others.
	Removed bool `json:"removed,omitempty"`
	// Missing says why its image can't be read, if so.
	Missing string `json:"missing,omitempty"`
	Space          // segments as they are stored, and pages of NVRAM parts, where they are now
}

// Sharing is what a checkpoint has to do with others.
type Sharing struct {
	// RefersTo are the checkpoints that have bytes of its pages.
	RefersTo []Referred `json:"refers_to,omitempty"`
	// HeldFor are the checkpoints that need bytes of it, NAME@N, and Held what they need.
	HeldFor []string `json:"held_for,omitempty"`
	Held    Space    `json:"held"`
	// Moved is how much of its NVRAM part has been moved to flash, in bytes, and FromDisks how
	// much was copied there from disk images.
	Moved     int64 `json:"moved_bytes"`
	FromDisks int64 `json:"disk_bytes,omitempty"`
	// RmFrees is what its removal would free now: what nobody else needs, of it and of
	// unlisted images that only it needs.
	RmFrees Space `json:"rm_frees"`
}

// Sharing looks at the references of all checkpoints. It takes no lock, so what others
// change meanwhile may count or not.
func (s *Store) Sharing(ctx context.Context, r Ref) (sh Sharing, err error) {
	name := r.object(imageSuffix)
	f, err := s.dir.Open(ctx, name, Unlocked)
	if err != nil {
		return sh, err
	}
	defer f.Close()
	im, err := image.Open(f)
	if err != nil {
		return sh, err
	}
	id, err := checkpoint.ReadIdentity(f)
	if err != nil {
		return sh, err
	}
	refs, err := checkpoint.ReferencesOf(im)
	if err != nil {
		return sh, err
	}
	ids := append(slices.Clone([]uuid.UUID(id.References)), id.UUID)
	look := s.lookup()
	with, without := look.survey(ids...), look.survey(ids...)
	without.leave = id.UUID
	for _, v := range []*survey{with, without} {
		if err := v.update(ctx); err != nil {
			return sh, err
		}
		if v.unclear != nil {
			return sh, v.unclear
		}
	}
	own := without.of[id.UUID]
	for _, by := range own.by {
		sh.HeldFor = append(sh.HeldFor, by.String())
	}
	there, err := s.movedSlots(ctx, r, id.UUID)
	if err != nil {
		return sh, err
	}
	sh.Moved, sh.FromDisks = id.PieceBytes(there)
	sh.Held = spaceOf(im, own.segments, own.slots, there)
	if sh.RmFrees, err = s.frees(ctx, f, r, id, own); err != nil {
		return sh, err
	}
	lent, err := s.lent(ctx, r, id.UUID)
	if err != nil {
		return sh, err
	}
	for i := range refs {
		ref := &refs[i]
		ref.NeedSlots = ref.NeedSlots.Union(lent.Needs(ref.UUID))
		to := Referred{Checkpoint: Ref{ref.VM, ref.Number}.String(), UUID: ref.UUID}
		frees, err := s.refersTo(ctx, ref, &to, with.of[ref.UUID], without.of[ref.UUID])
		switch {
		case cannotTell(err) || gone(err) || errors.Is(err, ErrNotFound):
			to.Missing = err.Error()
		case err != nil:
			return sh, err
		}
		sh.RmFrees.Flash += frees.Flash
		sh.RmFrees.NVRAM += frees.NVRAM
		sh.RefersTo = append(sh.RefersTo, to)
	}
	return sh, nil
}

// refersTo completes what is said of a reference, and returns what is free of it if the
// checkpoint that refers goes away.
func (s *Store) refersTo(ctx context.Context, ref *checkpoint.Reference, to *Referred, with, without *uses) (free Space, err error) {
	st, err := s.find(ctx, Ref{ref.VM, ref.Number}, ref.UUID)
	if err != nil {
		return free, err
	}
	to.Removed = st.gone
	f, err := s.dir.Open(ctx, st.name, Unlocked)
	if err != nil {
		return free, err
	}
	defer f.Close()
	im, err := image.Open(f)
	if err != nil {
		return free, err
	}
	there, err := s.movedSlots(ctx, st.ref, ref.UUID)
	if err != nil {
		return free, err
	}
	to.Space = spaceOf(im, ref.NeedSegments, ref.NeedSlots, there)
	if !st.gone {
		return free, nil
	}
	free, err = s.frees(ctx, f, st.ref, st.id, without)
	if err == nil && len(without.by) > 0 {
		var now Space
		now, err = s.frees(ctx, f, st.ref, st.id, with)
		// Of these as much as could be is free already.
		free.Flash -= now.Flash
	}
	return free, err
}

// find looks for the image with a UUID as openReferred does.
func (s *Store) find(ctx context.Context, was Ref, id uuid.UUID) (found stored, err error) {
	if CheckVM(was.VM) == nil && was.N >= 1 && was.N <= MaxNumber {
		for i, name := range was.imageObjects(id) {
			who, err := s.whoIs(ctx, name)
			if err == nil && who != nil && who.UUID == id {
				return stored{ref: was, name: name, gone: i > 0, id: who}, nil
			}
		}
	}
	err = s.images(ctx, map[uuid.UUID]bool{id: true}, func(st stored) (bool, error) {
		if st.id != nil {
			found = st
		}
		return st.id != nil, nil
	})
	if err == nil && found.id == nil {
		err = s.noImage(was, id)
	}
	return found, err
}

// spaceOf is what segments of an image take, and pages of its NVRAM part, of which some
// have been moved.
func spaceOf(im *image.Image, segments, slots, there source.Ranges) Space {
	hot := slots.Minus(there).Count()
	size := int64(im.PageSize)
	return Space{storedBytes(im, segments) + int64(slots.Count()-hot)*size, int64(hot) * size}
}

// storedBytes is what segments of an image take in it.
func storedBytes(im *image.Image, segments source.Ranges) (bytes int64) {
	start := int64(-1)
	im.Frames(func(k image.Kind, number uint32, off int64) error {
		if start >= 0 {
			bytes += off - start
		}
		if start = -1; k.IsSegment() && segments.Has(uint64(number), uint64(number)) {
			start = off
		}
		return nil
	})
	return bytes
}

// frees is what is free of an image in r's place that goes away, if others need so much
// of it.
func (s *Store) frees(ctx context.Context, f Object, r Ref, id *checkpoint.Identity, u *uses) (free Space, err error) {
	need := source.Ranges(nil)
	if len(u.by) == 0 {
		free.Flash, err = occupied(f)
	} else {
		need = u.slots
		var ranges []byteRange
		ranges, err = unused(f, u.segments)
		for _, r := range ranges {
			if r = r.whole(); r.end > r.off {
				free.Flash += r.end - r.off
			}
		}
	}
	if err != nil || id.PieceSlots() == 0 {
		return free, err
	}
	pieces, err := s.openMoved(ctx, r, id.UUID)
	if err != nil {
		return free, err
	}
	for _, src := range pieces {
		p, rerr := moved.Read(src)
		switch {
		case rerr != nil:
			err = errors.Join(err, rerr)
		case len(u.by) == 0:
			n, terr := occupied(src)
			free.Flash, err = free.Flash+n, errors.Join(err, terr)
		default:
			p.Unneeded(need, func(off, end int64) {
				if r := (byteRange{off, end}).whole(); r.end > r.off {
					free.Flash += r.end - r.off
				}
			})
			need = need.Minus(p.Slots)
		}
		src.Close()
	}
	if err != nil {
		return free, err
	}
	// An NVRAM file that is not there gives nothing back.
	if s.CheckHome(ctx) != nil || !id.InNVRAM() {
		return free, nil
	}
	nv, err := nvram.Open(ctx, s.fs, id.NVRAM.Path, nvram.Options{ReadOnly: true})
	if err != nil {
		return free, nil
	}
	defer nv.Close()
	if nv.UUID() != id.NVRAM.UUID {
		return free, nil
	}
	owned, _, err := nv.Owned(ctx, id.UUID)
	if err != nil {
		return free, fmt.Errorf("NVRAM of %v: %w", Ref{id.VM, id.Number}, err)
	}
	idle := idleExtents(nv, id, need)
	for _, index := range owned {
		if idle(index) {
			free.NVRAM += nvram.ExtentSize
		}
	}
	return free, nil
}
