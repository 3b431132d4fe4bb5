package store

import (
	"context"
	"fmt"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
)

// Checkpoint is a checkpoint of a store, opened for reading. As long as it is open
// it can't be removed.
type Checkpoint struct {
	*checkpoint.Checkpoint
	Ref   Ref
	store *Store
}

// OpenCheckpoint opens a checkpoint as checkpoint.Open does; r without a number
// is the VM's newest. An error that wraps ErrNotFound says what is missing.
func (s *Store) OpenCheckpoint(ctx context.Context, r Ref, o checkpoint.Options) (*Checkpoint, error) {
	f, r, err := s.openImage(ctx, r)
	if err != nil {
		return nil, err
	}
	o.Name = r.String()
	c, err := checkpoint.Open(ctx, s.fs, f, o)
	if err != nil {
		return nil, err
	}
	if c.Meta.VM != r.VM {
		c.Close()
		return nil, c.Image.Tail.Corrupt(image.Identity, fmt.Errorf("it is a checkpoint of VM %q in place of %v", c.Meta.VM, r))
	}
	return &Checkpoint{c, r, s}, nil
}

// Verify is checkpoint.Checkpoint's, and checks what resumes have learned.
func (c *Checkpoint) Verify(ctx context.Context, found func(error)) error {
	if err := c.Checkpoint.Verify(ctx, found); err != nil {
		return err
	}
	// Without this hint a guest is as whole, and only slower to resume. But what
	// is damaged here may be the disk's first sign.
	_, err := c.store.Touched(ctx, c.Ref)
	if integrity.IsCorrupt(err) {
		found(err)
		return nil
	}
	return err
}

// Description is what a checkpoint says about itself, and where it is.
type Description struct {
	Ref        Ref
	ImageBytes int64
	*checkpoint.Meta
}

// Describe reads only what a checkpoint says about itself. Ref and ImageBytes are
// set if only that can't be read.
func (s *Store) Describe(ctx context.Context, r Ref) (d Description, err error) {
	f, r, err := s.openImage(ctx, r)
	d.Ref = r
	if err != nil {
		return d, err
	}
	defer f.Close()
	if d.ImageBytes, err = f.Size(); err != nil {
		return d, err
	}
	d.Meta, err = checkpoint.ReadMeta(f)
	return d, err
}
