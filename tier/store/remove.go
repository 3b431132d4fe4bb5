package store

import (
	"context"
	"errors"
	"fmt"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/nvram"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// Removed says what a removal has freed.
type Removed struct {
	Ref        Ref
	FlashBytes int64
	NVRAMBytes int64
	// NVRAM is why NVRAM was not freed, if it was not. The checkpoint is gone all
	// the same, and gc can repeat it.
	NVRAM error
}

// Remove removes a checkpoint, which nobody may have open (ErrInUse), durably, and
// then gives its NVRAM back.
func (s *Store) Remove(ctx context.Context, r Ref) (rm Removed, err error) {
	unlock, err := s.lock(ctx)
	if err != nil {
		return rm, err
	}
	defer unlock()
	if r, err = s.Resolve(ctx, r); err != nil {
		return rm, err
	}
	rm.Ref = r
	f, err := s.fs.Open(s.imagePath(r))
	if err != nil {
		return rm, err
	}
	defer f.Close()
	if err := f.TryLock(vfs.Exclusive); errors.Is(err, vfs.ErrLocked) {
		return rm, fmt.Errorf("checkpoint %v: %w", r, ErrInUse)
	} else if err != nil {
		return rm, err
	}
	if rm.FlashBytes, err = f.Size(); err != nil {
		return rm, err
	}
	id, err := checkpoint.ReadIdentity(f)
	if err != nil && !integrity.IsCorrupt(err) {
		return rm, err
	}
	rm.NVRAM = err
	last, err := s.lastNumber(r.VM)
	if err != nil {
		return rm, err
	}
	if r.N == last {
		b, err := seal(r.N)
		if err != nil {
			return rm, err
		}
		if err := s.writeSmall(s.path("vms", r.VM, "last"), b); err != nil {
			return rm, err
		}
	}
	if err := s.fs.Remove(s.imagePath(r)); err != nil {
		return rm, err
	}
	// Without its image it is nothing to anybody; GC would remove it too.
	s.fs.Remove(s.touchedPath(r))
	if err := s.fs.SyncDir(s.path("vms", r.VM)); err != nil {
		return rm, err
	}
	if id != nil && id.NVRAM != nil {
		rm.NVRAMBytes, rm.NVRAM = s.freeNVRAM(ctx, id)
	}
	return rm, nil
}

func (s *Store) freeNVRAM(ctx context.Context, id *checkpoint.Identity) (bytes int64, err error) {
	f, err := nvram.Open(ctx, s.fs, id.NVRAM.Path, nvram.Options{})
	if err != nil {
		return 0, err
	}
	defer f.Close()
	if f.UUID() != id.NVRAM.UUID {
		return 0, fmt.Errorf("%s is not the file the checkpoint was saved to", id.NVRAM.Path)
	}
	freed, err := f.FreeOwner(ctx, id.UUID)
	return int64(freed) * nvram.ExtentSize, err
}
