package store

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"syscall"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/nvram"
)

// Removed says what a removal has freed.
type Removed struct {
	Ref        Ref
	FlashBytes int64
	NVRAMBytes int64
	// Kept names the checkpoints that need bytes of its image, which is not free
	// before they are removed too.
	Kept []Ref
	// Left is why something of it was not freed, if so. The checkpoint is gone all
	// the same, and gc frees what belongs to nobody.
	Left error
}

// Remove removes a checkpoint, which nobody may have open (ErrInUse), durably, and
// then gives back what it took. It needs no space for that: the store may be full.
//
// An image that is not in its place is removed there, and no more: the checkpoint
// that it is, and that one's NVRAM, are another's.
func (s *Store) Remove(ctx context.Context, r Ref) (rm Removed, err error) {
	rm.Ref = r
	f, r, err := s.open(ctx, r, Exclusive)
	if errors.Is(err, errNotObject) {
		rm.Ref, rm.Left = r, err
		return rm, s.removeOdd(ctx, r)
	}
	if err != nil {
		return rm, err
	}
	defer f.Close()
	rm.Ref = r
	size, err := f.Size()
	if err != nil {
		return rm, err
	}
	id, err := checkpoint.ReadIdentity(f)
	if err == nil {
		err = checkPlace(f.Name(), r, id)
	}
	if err != nil && !integrity.IsCorrupt(err) && !isUnsupported(err) {
		return rm, err
	}
	rm.Left = err
	// Nobody can begin to refer to it while it is locked; who does so already holds
	// a lock on it, or is committed.
	if err == nil {
		if rm.Kept, err = s.referring(ctx, id.UUID); err != nil {
			return rm, err
		}
	}
	if err := s.unlist(ctx, r, len(rm.Kept) > 0); err != nil {
		return rm, err
	}
	if len(rm.Kept) > 0 {
		return rm, nil
	}
	rm.FlashBytes = size
	if rm.Left == nil && id.NVRAM != nil {
		rm.NVRAMBytes, rm.Left = s.freeNVRAM(ctx, id)
	}
	rm.Left = errors.Join(rm.Left, s.tidy(ctx, r))
	return rm, nil
}

// removeOdd removes what stands in an image's place and is no file: its name, and
// nothing that it leads to.
func (s *Store) removeOdd(ctx context.Context, r Ref) error {
	unlock, err := s.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	o, err := s.objects(ctx, r.VM)
	if err != nil {
		return err
	}
	if !slices.Contains(o.odd, r.N) {
		return fmt.Errorf("checkpoint %v in store %s: %w", r, s.root, ErrNotFound)
	}
	if r.N == o.last() && !slices.Contains(o.removed, r.N) {
		// It can't be what remembers the number.
		if err := s.dir.Write(ctx, r.object(removedSuffix), spare(), nil); err != nil {
			return err
		}
	}
	if err := s.dir.Remove(ctx, r.object(imageSuffix)); err != nil {
		return err
	}
	if err := s.dir.Sync(ctx, vmFolder(r.VM)); err != nil {
		return err
	}
	if slices.Contains(o.touched, r.N) {
		s.dir.Remove(ctx, r.object(touchedSuffix)) // as gc would
	}
	return nil
}

func isUnsupported(err error) bool {
	var u *image.UnsupportedError
	return errors.As(err, &u)
}

// unlist takes a checkpoint's name away, durably. It is locked.
func (s *Store) unlist(ctx context.Context, r Ref, keep bool) error {
	unlock, err := s.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	o, err := s.objects(ctx, r.VM)
	if err != nil {
		return err
	}
	old := r.object(imageSuffix)
	if _, ok := slices.BinarySearch(o.images, r.N); !ok {
		return fmt.Errorf("checkpoint %v in store %s: %w", r, s.root, ErrNotFound)
	}
	// The highest number is remembered by what is left of its image. A new name
	// of the same length fits where the old one was, so that a full disk is no
	// reason to fail.
	if keep || r.N == o.last() {
		removed := r.object(removedSuffix)
		if slices.Contains(o.removed, r.N) {
			// Somebody has put the image back under a number that was gone.
			if err := s.dir.Remove(ctx, removed); err != nil {
				return err
			}
		}
		err := s.dir.Commit(ctx, old, removed)
		if errors.Is(err, syscall.ENOSPC) && s.dir.Remove(ctx, r.object(touchedSuffix)) == nil {
			err = s.dir.Commit(ctx, old, removed) // in the place of the hint's name
		}
		if err != nil {
			return err
		}
	} else {
		if err := s.dir.Remove(ctx, old); err != nil {
			return err
		}
		if err := s.dir.Sync(ctx, vmFolder(r.VM)); err != nil {
			return err
		}
	}
	// Without its image it is nothing to anybody; gc would remove it too.
	if slices.Contains(o.touched, r.N) {
		s.dir.Remove(ctx, r.object(touchedSuffix))
	}
	return nil
}

// tidy frees what is left of a removed image that nobody needs, and what stood for
// lower numbers. The image is locked.
func (s *Store) tidy(ctx context.Context, r Ref) error {
	unlock, err := s.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	o, err := s.objects(ctx, r.VM)
	if err != nil {
		return err
	}
	if slices.Contains(o.removed, r.N) {
		if err := s.dir.Empty(ctx, r.object(removedSuffix), spare()); err != nil {
			return err
		}
	}
	for _, n := range o.removed {
		if n == o.last() {
			break
		}
		if err := s.removeEmpty(ctx, Ref{r.VM, n}); err != nil {
			return err
		}
	}
	return nil
}

// removeEmpty removes what stands for a number that need not be remembered any
// more. The caller holds the store lock.
func (s *Store) removeEmpty(ctx context.Context, r Ref) error {
	f, err := s.dir.Open(ctx, r.object(removedSuffix), Unlocked)
	if errors.Is(err, errNotObject) {
		return nil // a stray
	}
	if err != nil {
		return err
	}
	size, err := f.Size()
	f.Close()
	if err != nil || size > 0 {
		return err // an image that others may need: gc looks
	}
	return s.dir.Remove(ctx, r.object(removedSuffix))
}

// freeNVRAM gives a checkpoint's NVRAM back.
func (s *Store) freeNVRAM(ctx context.Context, id *checkpoint.Identity) (bytes int64, err error) {
	if err := s.CheckHome(ctx); err != nil {
		return 0, err
	}
	f, err := s.openNVRAM(ctx, nvramFile{id.NVRAM.Path, id.NVRAM.UUID})
	if err != nil {
		return 0, err
	}
	defer f.Close()
	freed, err := f.FreeOwner(ctx, id.UUID)
	return int64(freed) * nvram.ExtentSize, err
}

// nvramFile is the content of nvram/UUID.json.
type nvramFile struct {
	Path string    `json:"path"`
	UUID uuid.UUID `json:"uuid"`
}

// openNVRAM opens an NVRAM file and refuses another one in its place.
func (s *Store) openNVRAM(ctx context.Context, nf nvramFile) (*nvram.File, error) {
	f, err := nvram.Open(ctx, s.fs, nf.Path, nvram.Options{})
	if err != nil {
		return nil, err
	}
	if f.UUID() != nf.UUID {
		f.Close()
		return nil, fmt.Errorf("NVRAM file %s is another one now", nf.Path)
	}
	return f, nil
}

func nvramObject(id uuid.UUID) string { return nvramFolder + "/" + id.String() + ".json" }

// useNVRAM records, before any extent of it is reserved, that saves of this
// store use an NVRAM file, so that GC finds what a killed save has left there.
func (s *Store) useNVRAM(ctx context.Context, path string, id uuid.UUID) error {
	want := nvramFile{path, id}
	var have nvramFile
	if s.readSealed(ctx, nvramObject(id), "NVRAM file's name", maxSealed, &have) == nil && have == want {
		return nil
	}
	unlock, err := s.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	return s.writeSealed(ctx, nvramObject(id), want)
}
