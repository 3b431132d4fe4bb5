package store

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// ErrChanged: a checkpoint was removed, or replaced, while it was copied.
var ErrChanged = errors.New("it has been removed or replaced meanwhile")

// Flatten makes a checkpoint independent: in its place comes an image that has every
// page on flash and refers to no other. It has the same number, and a UUID of its own,
// because those who refer to the old one by its UUID need that one's bytes where they
// are:
//
//	vms/VM/00000002.flic          old                 new
//	vms/VM/00000002.OLD.gone             old   old    old     if others need it
//	tmp/VM@2.NEW.part       new   new    new
//	                        copy  keep          replace
//
// Each step is durable before the next, and whenever it is cut off the checkpoint is
// there, as the old image or as the new one. Who has the old one open reads on. What
// nobody needs of the old one is freed, as a removal does. One that refers to nothing,
// and has nothing in NVRAM or on disks, stays as it is: Meta is then its own.
func (s *Store) Flatten(ctx context.Context, r Ref, o CopyOptions) (Removed, *checkpoint.Meta, error) {
	c, err := s.OpenCheckpoint(ctx, r, checkpoint.Options{Disks: o.Disks})
	if err != nil {
		return Removed{}, nil, err
	}
	open := true
	defer func() {
		if open {
			c.Close()
		}
	}()
	old := Removed{Ref: c.Ref, As: c.Meta.UUID}
	was := c.Meta
	if len(was.References) == 0 && was.NVRAM == nil && was.Disks == 0 {
		return old, was, nil
	}
	tx, err := s.beginAgain(ctx, c.Ref)
	if err != nil {
		return old, nil, err
	}
	defer tx.Abort()
	meta, err := tx.fill(ctx, c.Checkpoint, o)
	if err != nil {
		return old, nil, err
	}
	// Its lock would keep the old image in use.
	open = false
	if err := c.Close(); err != nil {
		return old, nil, err
	}
	if err := tx.replace(ctx, &was.Identity, &old); err != nil {
		return old, nil, err
	}
	s.noteShare(ctx, &meta.Identity)
	return old, meta, nil
}

// beginAgain starts another image of a checkpoint that there is.
func (s *Store) beginAgain(ctx context.Context, r Ref) (*Tx, error) {
	t := &Tx{s: s, uuid: uuid.New(), ref: r, known: true, again: true}
	unlock, err := s.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	t.name = partName(t.ref, t.uuid)
	t.image, err = s.dir.Create(ctx, t.name)
	return t, err
}

// replace puts the image in the place of the one that says it is was, and frees what
// nobody needs of that one.
func (t *Tx) replace(ctx context.Context, was *checkpoint.Identity, old *Removed) error {
	s := t.s
	look := s.lookup()
	theirs, err := look.unlistedAmong(ctx, was.References)
	if err != nil {
		return err
	}
	v := look.survey(append(slices.Clone(theirs), was.UUID)...)
	v.leave = was.UUID
	if err := v.update(ctx); err != nil {
		return err
	}
	had, err := look.reservedBy(ctx, was, theirs)
	if err != nil {
		return err
	}
	kept, err := t.swap(ctx, was, v, old, true)
	if err != nil {
		return err
	}
	t.ended = true
	if err := t.close(); err != nil {
		return err
	}
	var own []idle
	switch {
	case kept:
		theirs = append(theirs, was.UUID)
		// Who has opened it has perhaps not opened yet what it refers to (countOpen).
		v.leave = uuid.Nil
		delete(v.open, was.UUID)
	case was.InNVRAM():
		own = []idle{{id: was, had: had[was.UUID]}}
	}
	var fr freed
	var left error
	unlock, err := look.lock(ctx)
	if err == nil {
		fr, left, err = s.freeUnlisted(ctx, v, theirs, had)
		unlock()
	}
	old.FlashBytes += fr.flash
	old.Left = errors.Join(old.Left, left, err)
	old.NVRAMBytes, err = s.freeNVRAM(ctx, append(own, fr.idle...)...)
	old.Left = errors.Join(old.Left, err)
	return nil
}

// errNeeded: an image is in use, or others need it, and so it is not replaced.
var errNeeded = errors.New("it is in use, or others need it")

// swap puts the image in the place of the one that says it is was, under the store lock.
// kept tells whether that one is there under another name, because others need it; with
// keep false nothing is replaced then (errNeeded), and the new image may need more of others
// than the old one. v is of was.
func (t *Tx) swap(ctx context.Context, was *checkpoint.Identity, v *survey, old *Removed, keep bool) (kept bool, err error) {
	s := t.s
	unlock, err := s.lock(ctx)
	if err != nil {
		return false, err
	}
	defer unlock()
	name := t.ref.object(imageSuffix)
	f, err := s.dir.Open(ctx, name, Exclusive)
	// A reader needs no name, but a save may be about to refer to it.
	used := errors.Is(err, vfs.ErrLocked)
	if used {
		f, err = s.dir.Open(ctx, name, Unlocked)
	}
	if gone(err) {
		return false, fmt.Errorf("checkpoint %v: %w", t.ref, ErrChanged)
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	h, err := image.ReadHeader(f)
	if err == nil && h.UUID != was.UUID {
		err = fmt.Errorf("checkpoint %v: %w", t.ref, ErrChanged)
	}
	if err == nil {
		err = v.update(ctx)
	}
	if err != nil {
		return false, err
	}
	if err := t.stillNamed(ctx); err != nil {
		return false, err
	}
	old.Kept = v.of[was.UUID].by
	kept = used || v.needed(was.UUID)
	if kept && !keep {
		return false, errNeeded
	}
	if !keep {
		// Who has looked at the old one looks again.
		if err := s.noteUnited(ctx); err != nil {
			return false, err
		}
	}
	if kept {
		if _, err = s.dropTwins(ctx, t.ref, was.UUID); err == nil {
			err = s.dir.Keep(ctx, name, t.ref.keptObject(was.UUID))
		}
		if errors.Is(err, errors.ErrUnsupported) {
			err = fmt.Errorf("others need the old image, which can't be kept beside the new one: %w", err)
		}
	} else if old.FlashBytes, err = occupied(f); err == nil {
		// Who needed it and is not there must not come back.
		err = s.settle(ctx)
	}
	if err != nil {
		return false, err
	}
	if err := s.dir.Replace(ctx, t.name, name); err != nil || kept {
		return kept, err
	}
	o, err := s.objects(ctx, t.ref.VM)
	if err != nil {
		old.Left = err
		return false, nil
	}
	moved, err := s.dropMoved(ctx, t.ref, was.UUID, o)
	old.FlashBytes += moved
	old.Left = err // gc will
	return false, nil
}
