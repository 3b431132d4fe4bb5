package store

import (
	"context"
	"errors"
	"fmt"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/nvram"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// Health is what GC would find to do, and what keeps it from it.
type Health struct {
	Parts     int // images in the making that nobody makes any more
	PartBytes int64
	Strays    []string // as Store.Strays
	NVRAM     []NVRAMHealth
	// Unknown is what could not be found out.
	Unknown []error
}

// NVRAMHealth is what is to be said of an NVRAM file that saves of a store have used.
type NVRAMHealth struct {
	Path string
	// Err is why it can't be looked at; all else is then zero.
	Err            error
	Damage         []error // of its headers and owner tables, *integrity.CorruptError
	Capacity, Free int64   // in bytes, as of nvram.File; a capacity of 0 is none
	Volatile       bool
	// Leaked is how many bytes belong to no checkpoint that is known: what killed saves
	// have left. It is 0 if it can't be told.
	Leaked int64
}

// Health looks at a store and its NVRAM files. Nothing is changed: the store lock is taken
// for moments, and each image in the making is locked for a moment if nobody else has it.
// An error is one of ctx.
func (s *Store) Health(ctx context.Context) (h Health, err error) {
	note := func(err error) {
		if err != nil {
			h.Unknown = append(h.Unknown, err)
		}
	}
	// In the order of GCAfter: owners in NVRAM first, then who is live.
	owners, err := s.lookAtNVRAM(ctx, &h)
	note(err)
	live := make(map[uuid.UUID]bool)
	known := true
	for _, find := range []func(context.Context, *Health, map[uuid.UUID]bool) error{s.liveLoose, s.liveParts, s.liveImages} {
		if err := find(ctx, &h, live); err != nil {
			known = false
			note(err)
		}
	}
	h.Strays, err = s.Strays(ctx, "")
	note(err)
	if known && len(h.Strays) == 0 {
		for i, list := range owners {
			for _, o := range list {
				if !live[o.UUID] {
					h.NVRAM[i].Leaked += int64(o.Extents) * nvram.ExtentSize
				}
			}
		}
	}
	return h, context.Cause(ctx)
}

// lookAtNVRAM fills h.NVRAM, and returns the owners of the store's extents in each file.
func (s *Store) lookAtNVRAM(ctx context.Context, h *Health) (owners [][]nvram.Owner, err error) {
	list, err := s.dir.List(ctx, nvramFolder)
	for _, e := range list {
		var nf nvramFile
		if err := s.readSealed(ctx, nvramFolder+"/"+e.Name, "NVRAM file's name", maxSealed, &nf); err != nil {
			h.Unknown = append(h.Unknown, err)
			continue
		}
		at, its := lookAtNVRAM(ctx, s.fs, nf, s.doc.UUID)
		h.NVRAM = append(h.NVRAM, at)
		owners = append(owners, its)
	}
	return owners, err
}

func lookAtNVRAM(ctx context.Context, fsys vfs.FS, nf nvramFile, store uuid.UUID) (h NVRAMHealth, owners []nvram.Owner) {
	h.Path = nf.Path
	f, err := nvram.Open(ctx, fsys, nf.Path, nvram.Options{ReadOnly: true})
	if err != nil {
		h.Err = err
		return h, nil
	}
	defer f.Close()
	if f.UUID() != nf.UUID {
		h.Err = fmt.Errorf("NVRAM file %s is another one now", nf.Path)
		return h, nil
	}
	if h.Damage, err = f.Check(ctx); err == nil {
		if h.Free, err = f.Free(ctx); err == nil {
			owners, err = f.Owners(ctx, store)
		}
	}
	if err != nil {
		return NVRAMHealth{Path: nf.Path, Err: err}, nil
	}
	h.Capacity, h.Volatile = f.Capacity(), f.Volatile()
	return h, owners
}

func (s *Store) liveLoose(ctx context.Context, _ *Health, live map[uuid.UUID]bool) error {
	list, err := s.Loose(ctx)
	for _, l := range list {
		live[l.UUID] = true
	}
	return err
}

// liveParts finds the images in the making: those that a process has locked are live.
func (s *Store) liveParts(ctx context.Context, h *Health, live map[uuid.UUID]bool) error {
	unlock, err := s.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	list, err := s.dir.List(ctx, tmpFolder)
	for _, e := range list {
		_, id, suffix, ok := parseTmp(e.Name)
		if !ok || e.Folder {
			continue
		}
		f, err := s.dir.Open(ctx, tmpFolder+"/"+e.Name, Exclusive)
		switch {
		case errors.Is(err, vfs.ErrLocked):
			live[id] = true
		case gone(err):
		case err != nil:
			return err
		default:
			if suffix == partSuffix {
				h.Parts++
			}
			if size, err := f.Size(); err == nil {
				h.PartBytes += size
			}
			f.Close()
		}
	}
	return err
}

// liveImages finds the images that have their names, those of removed checkpoints too.
func (s *Store) liveImages(ctx context.Context, _ *Health, live map[uuid.UUID]bool) error {
	if _, err := s.dir.List(ctx, vmsFolder); err != nil {
		return err
	}
	return s.eachVM(ctx, "", func(vm string, o vmObjects) error {
		for _, st := range o.all(vm) {
			id, err := s.owner(ctx, st.name)
			// What has been removed and emptied says nothing any more.
			if err != nil && !gone(err) && !st.gone {
				return err
			}
			live[id] = true
		}
		return nil
	})
}
