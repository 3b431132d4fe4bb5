package store

import (
	"context"
	"slices"

	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/workingset"
)

// maxTouched caps the object in bytes: each of its runs takes at most 50, and names
// of RAM blocks are short.
const maxTouched = 4 << 20

// Touched returns what resumes of a checkpoint have learned; empty if there is
// nothing.
func (s *Store) Touched(ctx context.Context, r Ref) (*workingset.Touched, error) {
	t := new(workingset.Touched)
	err := s.readSealed(ctx, r.object(touchedSuffix), "touched pages", maxTouched, t)
	if gone(err) {
		return new(workingset.Touched), nil
	}
	if err != nil {
		return nil, err
	}
	return t, nil
}

// AddTouched adds what a resume has learned. Several resumes of one checkpoint
// may do so. What can't be read is replaced: it is a hint, not data.
func (s *Store) AddTouched(ctx context.Context, r Ref, pageSize int, blocks []string, runs []workingset.PageRun) error {
	unlock, err := s.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	if _, err := s.Resolve(ctx, r); err != nil {
		return err
	}
	t, err := s.Touched(ctx, r)
	if err != nil || t.PageSize != pageSize || !slices.Equal(t.Blocks, blocks) {
		t = &workingset.Touched{PageSize: pageSize, Blocks: blocks}
	}
	t.Add(runs)
	b, err := integrity.Seal(t)
	for err == nil && len(b) > maxTouched && len(t.Runs) > 0 {
		t.Runs = t.Runs[:len(t.Runs)/2] // the first ones are the best
		b, err = integrity.Seal(t)
	}
	if err != nil || len(b) > maxTouched {
		return err
	}
	return s.dir.Write(ctx, r.object(touchedSuffix), spare(), b)
}
