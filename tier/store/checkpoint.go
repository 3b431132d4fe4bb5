package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/moved"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// Checkpoint is a checkpoint of a store, opened for reading. As long as it is open
// it can't be removed, nor can what it refers to.
type Checkpoint struct {
	*checkpoint.Checkpoint
	Ref Ref

	store *Store
	// images are its own and those that it refers to, which it has open.
	images []heldImage
}

// errMisplaced: an image is another checkpoint than its place says.
var errMisplaced = errors.New("it is not in its place")

// checkPlace compares who an image says it is with where it lies.
func checkPlace(file string, r Ref, id *checkpoint.Identity) error {
	if own := (Ref{id.VM, id.Number}); own != r {
		return &integrity.CorruptError{File: file, What: "IDENTITY",
			Err: fmt.Errorf("it is checkpoint %v in the place of %v: %w", own, r, errMisplaced)}
	}
	return nil
}

// open opens a checkpoint's image and locks it until it is closed: Shared keeps it
// from being removed, Exclusive is for who removes it. r without a number is the VM's
// newest.
func (s *Store) open(ctx context.Context, r Ref, lock Locking) (Object, Ref, error) {
	unlock, err := s.lock(ctx)
	if err != nil {
		return nil, r, err
	}
	defer unlock()
	if r, err = s.newest(ctx, r); err != nil {
		return nil, r, err
	}
	f, err := s.dir.Open(ctx, r.object(imageSuffix), lock)
	switch {
	case gone(err):
		err = s.notThere(r)
	case errors.Is(err, vfs.ErrLocked):
		err = fmt.Errorf("checkpoint %v: %w", r, ErrInUse)
	}
	return f, r, err
}

// OpenCheckpoint opens a checkpoint as checkpoint.Open does, and what it refers to; r
// without a number is the VM's newest. An error that wraps ErrNotFound says what is
// missing. Who has it for himself, to remove or replace it, is waited for.
func (s *Store) OpenCheckpoint(ctx context.Context, r Ref, o checkpoint.Options) (_ *Checkpoint, err error) {
	var f Object
	asked := r
	_, err = soon(ctx, openLimit, func() (again bool, err error) {
		f, r, err = s.open(ctx, asked, Shared)
		return errors.Is(err, ErrInUse), err
	})
	if err != nil {
		return nil, err
	}
	c := &Checkpoint{Ref: r, store: s}
	o.Name = r.String()
	o.Disks.Kept = func(id uuid.UUID) (string, error) { return s.frozenPath(ctx, id) }
	o.Images = func(ctx context.Context, ref *checkpoint.Reference) (checkpoint.Source, []moved.Source, error) {
		f, at, err := s.openReferred(ctx, Ref{ref.VM, ref.Number}, ref.UUID)
		if err != nil {
			return nil, nil, err
		}
		c.images = append(c.images, heldImage{f, at, ref.UUID})
		if len(ref.NeedSlots) == 0 {
			return f, nil, nil
		}
		pieces, err := s.openMoved(ctx, at, ref.UUID)
		return f, sources(pieces), err
	}
	// What can't say who it is is refused below.
	if h, err := image.ReadHeader(f); err == nil {
		pieces, err := s.openMoved(ctx, r, h.UUID)
		if err != nil {
			f.Close()
			return nil, err
		}
		o.Moved = sources(pieces)
		if o.Lent, err = s.lent(ctx, r, h.UUID); err != nil {
			for _, p := range pieces {
				p.Close()
			}
			f.Close()
			return nil, err
		}
		o.Lenders = s.lenders
	}
	if c.Checkpoint, err = checkpoint.Open(ctx, s.fs, f, o); err != nil {
		return nil, err
	}
	if err := checkPlace(f.Name(), r, &c.Meta.Identity); err != nil {
		c.Close()
		return nil, err
	}
	c.images = append(c.images, heldImage{f, r, c.Meta.UUID})
	return c, nil
}

// openReferred opens the image with a UUID, listed or not, and locks it until it is
// closed; at is where it is. Where it was when it was referred to is looked at first,
// because to look everywhere takes a read of each image. That there is none is damage.
func (s *Store) openReferred(ctx context.Context, was Ref, id uuid.UUID) (found Object, at Ref, err error) {
	var damage error
	if CheckVM(was.VM) == nil && was.N >= 1 && was.N <= MaxNumber {
		for _, name := range was.imageObjects(id) {
			f, err := s.openWith(ctx, name, id)
			if integrity.IsCorrupt(err) {
				// What a power cut has left of another one that was emptied, perhaps.
				damage = cmp.Or(damage, err)
				continue
			}
			if f != nil || err != nil {
				return f, was, err
			}
		}
	}
	err = s.images(ctx, map[uuid.UUID]bool{id: true}, func(st stored) (done bool, err error) {
		if found, err = s.openWith(ctx, st.name, id); found == nil && err == nil {
			err = errMoved
		}
		at = st.ref
		return found != nil, err
	})
	if found == nil && damage != nil && ctx.Err() == nil {
		return nil, was, damage
	}
	if err == nil && found == nil {
		// The checkpoint that refers to it is there, and not whole.
		err = s.noImage(was, id)
	}
	if err != nil && found != nil {
		found.Close()
		found = nil
	}
	return found, at, err
}

// noImage says that an image is missing which another checkpoint refers to, and where it was.
func (s *Store) noImage(was Ref, id uuid.UUID) error {
	at := s.root
	if CheckVM(was.VM) == nil {
		at = s.dir.Path(was.object(imageSuffix))
	}
	return &integrity.CorruptError{File: at, What: "image", Err: fmt.Errorf("%v, which was %v: %w", id, was, ErrNotFound)}
}

// openMoved opens the pieces of what was moved from NVRAM of the image with a UUID in r's
// place. While the image is locked pieces may come, but what they have is in NVRAM too.
func (s *Store) openMoved(ctx context.Context, r Ref, id uuid.UUID) (list []Object, err error) {
	for k := 1; k <= maxPieces; k++ {
		f, err := s.dir.Open(ctx, movedName{r.N, id, k}.object(r.VM), Unlocked)
		if gone(err) {
			break
		}
		if err != nil {
			for _, m := range list {
				m.Close()
			}
			return nil, err
		}
		list = append(list, f)
	}
	return list, nil
}

// sources is pieces for who reads pages of them.
func sources(pieces []Object) (list []moved.Source) {
	for _, p := range pieces {
		list = append(list, p)
	}
	return list
}

// openLimit is how long who opens a checkpoint, or an image that others need, waits for a
// removal, a flattening or gc, which lock one for a moment to free what nobody needs of it.
// It is a variable for tests.
var openLimit = vfs.LockLimit

// openWith opens an image that has a UUID, and locks it: nil if what is there is
// another's, or nothing.
func (s *Store) openWith(ctx context.Context, name string, id uuid.UUID) (Object, error) {
	var f Object
	_, err := soon(ctx, openLimit, func() (again bool, err error) {
		f, err = s.dir.Open(ctx, name, Shared)
		return errors.Is(err, vfs.ErrLocked), err
	})
	switch {
	case gone(err):
		return nil, nil
	case errors.Is(err, vfs.ErrLocked):
		return nil, fmt.Errorf("%s, which is going away: %w", s.dir.Path(name), ErrInUse)
	case err != nil:
		return nil, err
	}
	size, err := f.Size()
	if err == nil && size > 0 {
		var h image.Header
		if h, err = image.ReadHeader(f); err == nil && h.UUID == id {
			return f, nil
		}
	}
	f.Close()
	return nil, err
}

// Verify is checkpoint.Checkpoint's, and checks what resumes have learned and users have said.
func (c *Checkpoint) Verify(ctx context.Context, found func(error)) error {
	if err := c.Checkpoint.Verify(ctx, found); err != nil {
		return err
	}
	c.verifyKept(ctx, found)
	// Without these a guest is as whole, and only slower to resume. But what
	// is damaged here may be the disk's first sign.
	_, err := c.store.Touched(ctx, c.Ref)
	_, lerr := c.store.Label(ctx, c.Ref)
	for _, err := range []error{err, lerr} {
		switch {
		case integrity.IsCorrupt(err):
			found(err)
		case err != nil:
			return err
		}
	}
	return nil
}

// Description is all that a checkpoint says about itself, and where it is.
type Description struct {
	Ref        Ref
	ImageBytes int64
	*checkpoint.Meta
}

// Reads counts what a restore of a checkpoint has to read: it looks at the page map. It
// takes no lock.
func (s *Store) Reads(ctx context.Context, r Ref) (checkpoint.Reads, error) {
	f, err := s.dir.Open(ctx, r.object(imageSuffix), Unlocked)
	if err != nil {
		return checkpoint.Reads{}, err
	}
	defer f.Close()
	return checkpoint.ReadsOf(f)
}

// Describe reads only what a checkpoint says about itself. Ref and ImageBytes are
// set also if only that can't be read. It takes no lock.
func (s *Store) Describe(ctx context.Context, r Ref) (d Description, err error) {
	d.Ref = r
	if d.Ref, err = s.Resolve(ctx, r); err != nil {
		return d, err
	}
	f, err := s.dir.Open(ctx, d.Ref.object(imageSuffix), Unlocked)
	if gone(err) {
		err = fmt.Errorf("checkpoint %v in store %s: %w", d.Ref, s.root, ErrNotFound)
	}
	if err != nil {
		return d, err
	}
	defer f.Close()
	if d.ImageBytes, err = f.Size(); err != nil {
		return d, err
	}
	m, err := checkpoint.ReadMeta(f)
	if err == nil {
		err = checkPlace(f.Name(), d.Ref, &m.Identity)
	}
	if err == nil {
		d.Meta = m
	}
	return d, err
}
