package store

import (
	"context"
	"fmt"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
)

// A checkpoint can refer to others whose images have bytes of its pages; its
// IDENTITY names them by UUID. No save of this version makes such a checkpoint. The
// rules hold already: what is referred to stays when it is removed, unlisted
// (.gone), until nobody refers to it any more, and gc then frees it.

// sharing is the content of sharing.json, which is written before the first
// reference is: without it nobody has to look for any.
type sharing struct {
	References bool `json:"references"`
}

// shares tells whether there may be references.
func (s *Store) shares(ctx context.Context) (bool, error) {
	var doc sharing
	err := s.readSealed(ctx, sharingFile, "note of references", maxSealed, &doc)
	if gone(err) {
		return false, nil
	}
	return doc.References, err
}

// stored is an image that is there, listed or not.
type stored struct {
	ref  Ref
	gone bool // removed, and kept for others
	id   *checkpoint.Identity
}

func (st stored) object() string {
	if st.gone {
		return st.ref.object(removedSuffix)
	}
	return st.ref.object(imageSuffix)
}

// images calls fn for each image that has content. One that can't say who it is
// ends it: what it refers to must not be freed.
func (s *Store) images(ctx context.Context, fn func(stored) error) error {
	vms, err := s.folders(ctx)
	if err != nil {
		return err
	}
	for _, vm := range vms {
		o, err := s.objects(ctx, vm)
		if err != nil {
			return err
		}
		for removed, numbers := range map[bool][]int{false: o.images, true: o.removed} {
			for _, n := range numbers {
				if err := context.Cause(ctx); err != nil {
					return err
				}
				st := stored{ref: Ref{vm, n}, gone: removed}
				f, err := s.dir.Open(ctx, st.object(), Unlocked)
				if gone(err) {
					continue
				}
				if err != nil {
					return err
				}
				size, err := f.Size()
				if err == nil && size > 0 {
					st.id, err = checkpoint.ReadIdentity(f)
				}
				f.Close()
				if err != nil {
					return fmt.Errorf("it can't be told what refers to what: %w", err)
				}
				if st.id == nil {
					continue
				}
				if err := fn(st); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// References tells which checkpoints the images of a checkpoint's pages are in,
// by UUID, and which checkpoints refer to it.
func (s *Store) References(ctx context.Context, r Ref) (to []uuid.UUID, by []Ref, err error) {
	if r, err = s.Resolve(ctx, r); err != nil {
		return nil, nil, err
	}
	id, _, err := s.identity(ctx, r)
	if err != nil {
		return nil, nil, err
	}
	by, err = s.referring(ctx, id.UUID)
	return id.References, by, err
}

// referring names the checkpoints that refer to the image id.
func (s *Store) referring(ctx context.Context, id uuid.UUID) (by []Ref, err error) {
	if some, err := s.shares(ctx); err != nil || !some {
		return nil, err
	}
	err = s.images(ctx, func(st stored) error {
		// What is removed and kept for others needs nothing for itself: a
		// reference names bytes, never another reference.
		for _, to := range st.id.References {
			if to == id && !st.gone {
				by = append(by, st.ref)
			}
		}
		return nil
	})
	return by, err
}

// hold locks the images with these UUIDs, removed ones too, so that they stay as
// long as they are open.
func (s *Store) hold(ctx context.Context, ids []uuid.UUID) (held []Object, err error) {
	if len(ids) == 0 {
		return nil, nil
	}
	want := make(map[uuid.UUID]bool)
	for _, id := range ids {
		want[id] = true
	}
	done := false
	defer func() {
		if !done {
			for _, f := range held {
				f.Close()
			}
		}
	}()
	err = s.images(ctx, func(st stored) error {
		if !want[st.id.UUID] {
			return nil
		}
		f, err := s.dir.Open(ctx, st.object(), Shared)
		if err != nil {
			return err
		}
		held = append(held, f)
		// Between the look and the lock it may have been freed.
		if now, err := checkpoint.ReadIdentity(f); err != nil || now.UUID != st.id.UUID {
			return fmt.Errorf("image %v, which it refers to, is going away: %w", st.id.UUID, ErrInUse)
		}
		delete(want, st.id.UUID)
		return nil
	})
	if err != nil {
		return nil, err
	}
	for id := range want {
		return nil, fmt.Errorf("image %v, which it refers to: %w", id, ErrNotFound)
	}
	done = true
	return held, nil
}
