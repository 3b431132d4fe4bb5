package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"time"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// Receivers that have parts of one image make, each, a copy of it with the parts that the
// store has, and put that in the place of what there is. Two of them at a time would lose each
// other's. So who puts an image together has its claim, from before it looks at what the store
// has until its copy has its name or is given up:
//
//	tmp/UUID.new    locked by the one receiver that puts image UUID together
//
// It makes the image's extents in NVRAM live, too, for gc. Who moves an image's pages from NVRAM
// to flash has its claim, too, and waits for none: a receiver that has found these pieces would
// have to begin again.

// claimLimit is how long a receiver waits for one that has an image's claim: as long as it
// may take to check all of a checkpoint that has come.
const claimLimit = time.Hour

// claim is an image that nobody else puts together.
type claim struct {
	name string
	lock Object
}

func (c claim) close(ctx context.Context, s *Store) {
	s.dir.Remove(ctx, c.name) // before it is free, or it could be another's
	c.lock.Close()
}

// claim waits until nobody else puts together one of the images that are received. All do so
// in the same order.
func (r *receiving) claim(ctx context.Context) error {
	var ids []uuid.UUID
	for _, i := range r.images {
		if !i.drop {
			ids = append(ids, i.UUID)
		}
	}
	slices.SortFunc(ids, func(a, b uuid.UUID) int { return bytes.Compare(a[:], b[:]) })
	for _, id := range ids {
		c, err := r.s.claim(ctx, id)
		if err != nil {
			return fmt.Errorf("image %v: %w", id, err)
		}
		r.claims = append(r.claims, c)
	}
	return nil
}

func (s *Store) claim(ctx context.Context, id uuid.UUID) (claim, error) {
	var c claim
	_, err := soon(ctx, claimLimit, func() (again bool, err error) {
		c, err = s.tryClaim(ctx, id)
		return errors.Is(err, vfs.ErrLocked), err
	})
	if errors.Is(err, vfs.ErrLocked) {
		err = fmt.Errorf("another receiver has it, or a process that moves pages of it from NVRAM: %w", ErrInUse)
	}
	return c, err
}

// tryClaim makes a claim, or finds that another has it (vfs.ErrLocked). The store lock keeps
// two from taking the place of one that a receiver which was killed has left.
func (s *Store) tryClaim(ctx context.Context, id uuid.UUID) (c claim, err error) {
	unlock, err := s.lock(ctx)
	if err != nil {
		return c, err
	}
	defer unlock()
	c.name = tmpFolder + "/" + id.String() + newSuffix
	c.lock, err = s.dir.Create(ctx, c.name)
	if !errors.Is(err, fs.ErrExist) {
		return c, err
	}
	old, err := s.dir.Open(ctx, c.name, Exclusive)
	if err == nil {
		err = s.dir.Remove(ctx, c.name)
		old.Close()
	}
	if err != nil && !gone(err) {
		return c, err
	}
	c.lock, err = s.dir.Create(ctx, c.name)
	return c, err
}
