package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/workingset"
)

// From here on a transfer can't be gone on with: what was staged gets the name of an image in
// the making, which takes its number (reserve), and its end is written, durably (settle).
// The commit is one hold of the store lock:
//
//	pieces ─► NNNNNNNN.UUID.K.moved     referred images ─► ….gone
//	.lent, .label, .touched             the checkpoint ─► NNNNNNNN.flic, and it is there

// settle makes of what was staged the image that it is to be, durably. From here on it can't
// be gone on with: it has the name of an image in the making.
func (r *receiving) settle(ctx context.Context, i *received) error {
	if err := i.f.Sync(); err != nil {
		return err
	}
	name, err := r.reserve(ctx, i)
	if err != nil {
		return err
	}
	i.name = name
	if err = i.f.Truncate(i.end.at); err == nil {
		_, err = i.f.WriteAt(i.end.end, i.end.at)
	}
	for _, w := range i.end.frames {
		if err == nil {
			_, err = i.f.WriteAt(w.b, w.at)
		}
	}
	if err == nil {
		err = i.f.Sync()
	}
	return err
}

// reserve gives what was staged the name of an image in the making, and with it a number to
// the checkpoint's own.
func (r *receiving) reserve(ctx context.Context, i *received) (name string, err error) {
	unlock, err := r.s.lock(ctx)
	if err != nil {
		return "", err
	}
	defer unlock()
	if i == r.images[0] {
		// A number is taken by a group that is committed, too: by parts that nobody locks once
		// its save was killed.
		if err := r.s.placeGroups(ctx); err != nil && !integrity.IsCorrupt(err) {
			return "", err
		}
		if r.ref.N > 0 {
			err = r.checkName(ctx)
		} else {
			var o vmObjects
			if o, err = r.s.objects(ctx, r.ref.VM); err == nil {
				r.ref.N = o.last()
				err = r.s.skipNumbers(ctx, &r.ref)
				r.ref.N++
			}
			if err == nil {
				err = r.s.dropOrphansLocked(ctx, r.ref, i.UUID)
			}
		}
		if err == nil && r.ref.N > MaxNumber {
			err = fmt.Errorf("VM %q has used up its checkpoint numbers", r.ref.VM)
		}
		if err != nil {
			return "", err
		}
		i.id.Number = r.ref.N
		t, err := image.ReadTail(limited{i.f, i.Length})
		if err == nil {
			err = i.rename(t)
		}
		if err != nil {
			return "", err
		}
	}
	name = partName(Ref{i.id.VM, i.id.Number}, i.UUID)
	// What a receiver that was killed has left under that name is gc's, and in the way.
	if f, err := r.s.dir.Open(ctx, name, Exclusive); err == nil {
		err = r.s.dir.Remove(ctx, name)
		f.Close()
		if err != nil {
			return "", err
		}
	}
	if err := r.s.dir.Commit(ctx, i.name, name); err != nil {
		return "", err
	}
	i.part = true
	return name, nil
}

// commit gives all of it its names.
func (r *receiving) commit(ctx context.Context) error {
	s := r.s
	unlock, err := s.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	if err := s.stillNamed(ctx, r.lasts); err != nil {
		return fmt.Errorf("checkpoint %v needs %w", r.got.Sent, err)
	}
	own := r.images[0]
	o, err := s.objects(ctx, r.ref.VM)
	if err != nil {
		return err
	}
	if slices.Contains(o.images, r.ref.N) {
		return fmt.Errorf("checkpoint %v: %w", r.ref, ErrTaken)
	}
	if r.ref.N <= o.last() && (len(r.images) > 1 || len(r.head.Has) > 0) {
		// What had the number before may be known by it to who is looking for references.
		if err := s.noteUnited(ctx); err != nil {
			return err
		}
	}
	for _, i := range slices.Concat(r.images[1:], r.images[:1]) {
		if i.drop {
			continue
		}
		at := Ref{i.id.VM, i.id.Number}
		if err := s.dir.Mkdir(ctx, vmFolder(at.VM)); err != nil {
			return err
		}
		if o, err := s.objects(ctx, at.VM); err != nil || len(o.pieces(at.N, i.UUID)) != i.first {
			return errors.Join(err, fmt.Errorf("what %v has in moved pieces: %w", at, errOutdated))
		}
		for k, name := range i.pieces {
			if err := s.dir.Commit(ctx, name, movedName{at.N, i.UUID, i.first + k + 1}.object(at.VM)); err != nil {
				return err
			}
		}
		if i == own {
			break
		}
		// In the place of the one that has less of it, if there is one.
		if err := s.dir.Replace(ctx, i.name, r.unlistedName(ctx, at, i.UUID)); err != nil {
			return err
		}
	}
	if own.hot != nil {
		own.hot.keep = true // a panic, too, leaves it open whether the image is there
	}
	err = s.place(ctx, own.name, r.ref, r.label(), func() error { return r.beside(ctx) })
	if own.hot != nil && err != nil {
		own.hot.keep = IsUncertain(err)
	}
	if err != nil {
		return err
	}
	// What others needed of it is here twice now. If it stays, gc removes it.
	if some, err := s.dropTwins(ctx, r.ref, own.UUID); some && err == nil {
		_ = s.dir.Sync(ctx, vmFolder(r.ref.VM))
	}
	r.got.Ref = r.ref
	for _, i := range r.images {
		if !i.drop {
			s.noteShare(ctx, i.id)
		}
	}
	return nil
}

// unlistedName is the name of an unlisted image: the one that it has, or a new one.
func (r *receiving) unlistedName(ctx context.Context, at Ref, id uuid.UUID) string {
	if have, err := r.s.owner(ctx, at.object(removedSuffix)); err == nil && have == id {
		return at.object(removedSuffix)
	}
	return at.keptObject(id)
}

// label is what users say of it; nothing if that is not in order, because the checkpoint is
// worth more.
func (r *receiving) label() (l Label) {
	if len(r.head.Label) > 0 && (json.Unmarshal(r.head.Label, &l) != nil || l.check() != nil) {
		l = Label{}
	}
	return l
}

// beside writes what else lies beside the image. The caller holds the store lock.
func (r *receiving) beside(ctx context.Context) error {
	if err := r.lend(ctx); err != nil {
		return err
	}
	var t workingset.Touched
	if len(r.head.Touched) > 0 && json.Unmarshal(r.head.Touched, &t) == nil {
		if b, err := integrity.Seal(&t); err == nil && len(b) <= maxTouched {
			_ = r.s.dir.Write(ctx, r.ref.object(touchedSuffix), spare(), b) // a hint, and worth no failure
		}
	}
	return nil
}
