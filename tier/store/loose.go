package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/loose"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// Loose is what the store keeps about an image outside of it whose hot pages are
// in an NVRAM file: without it nobody could tell when they may be given away.
//
//	DIR/loose/UUID.json       locked by the save that writes the image, and by
//	                          those who restore it
//
// The pages are given away when the image's file is gone: at once if the save was
// cut off or if the image was restored since (libvirt removes a managed save that
// it has started), and otherwise only a grace period after that was noticed,
// because the file may have been moved to another file system, where a restore
// takes note of it.
type Loose struct {
	UUID     uuid.UUID   `json:"uuid"`
	Place    loose.Place `json:"place"`
	Created  time.Time   `json:"created"`
	Whole    bool        `json:"whole"`         // the save was not cut off
	Restored bool        `json:"restored"`      // at least once
	Gone     time.Time   `json:"gone,omitzero"` // when it was first noticed
}

// DefaultGrace is how long hot pages are kept after their image's file was found
// to be gone.
const DefaultGrace = 24 * time.Hour

func (s *Store) loosePath(id uuid.UUID) string { return s.path("loose", id.String()+".json") }

// writeLoose stores an entry. The caller holds the store lock.
func (s *Store) writeLoose(l Loose) error {
	b, err := seal(l)
	if err != nil {
		return err
	}
	return s.writeSmall(s.loosePath(l.UUID), b)
}

func (s *Store) readLoose(id uuid.UUID) (Loose, error) {
	var l Loose
	b, err := readSmall(s.fs, s.loosePath(id))
	if err != nil {
		return l, err
	}
	if err = unseal(b, &l); err == nil && l.UUID != id {
		err = errors.New("it is another image's")
	}
	if err != nil {
		return l, &integrity.CorruptError{File: s.loosePath(id), What: "place of an image", Err: err}
	}
	return l, nil
}

// BeginLoose starts a save into a file outside of the store, as BeginFile does,
// whose hot pages go to NVRAM. path is the file's, which exists.
func (s *Store) BeginLoose(ctx context.Context, f vfs.File, path string) (*Tx, error) {
	place, err := loose.Locate(path)
	if err != nil {
		return nil, err
	}
	t := BeginFile(f)
	t.s = s
	t.loose = &Loose{UUID: t.uuid, Place: place, Created: time.Now()}
	t.path = s.loosePath(t.uuid)
	if err := s.fs.MkdirAll(s.path("loose")); err != nil {
		return nil, err
	}
	unlock, err := s.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := s.writeLoose(*t.loose); err != nil {
		return nil, err
	}
	if t.entry, err = s.fs.Open(t.path); err == nil {
		err = t.entry.TryLock(vfs.Exclusive)
	}
	if err != nil {
		if t.entry != nil {
			t.entry.Close()
		}
		s.fs.Remove(t.path)
		return nil, err
	}
	return t, nil
}

// commitLoose notes that the image is whole, as far as it is this save's.
func (t *Tx) commitLoose(ctx context.Context) error {
	unlock, err := t.s.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	t.loose.Whole = true
	if err := t.s.writeLoose(*t.loose); err != nil {
		return err
	}
	t.entry.Close()
	return nil
}

// UseLoose keeps GC from the hot pages of an image that is being restored, until
// done is called. path is the image's file, empty if not known; restored says
// whether the guest has been given back. An image that the store knows nothing of
// is no error.
func (s *Store) UseLoose(ctx context.Context, id uuid.UUID, path string) (done func(restored bool) error, err error) {
	unlock, err := s.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	f, err := s.fs.Open(s.loosePath(id))
	if errors.Is(err, fs.ErrNotExist) {
		return func(bool) error { return nil }, nil
	}
	if err != nil {
		return nil, err
	}
	if err := f.TryLock(vfs.Shared); err != nil {
		f.Close()
		return nil, err
	}
	return func(restored bool) error {
		unlock, err := s.lock(ctx)
		if err != nil {
			f.Close()
			return err
		}
		defer unlock()
		defer f.Close()
		l, err := s.readLoose(id)
		if err != nil {
			return err
		}
		if place, err := loose.Locate(path); path != "" && err == nil {
			l.Place, l.Gone = place, time.Time{}
		}
		l.Restored = l.Restored || restored
		return s.writeLoose(l)
	}, nil
}

// Loose lists the images outside of the store that have hot pages in NVRAM.
func (s *Store) Loose(ctx context.Context) ([]Loose, error) {
	entries, err := s.fs.ReadDir(s.path("loose"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var list []Loose
	for _, e := range entries {
		id, err := uuid.Parse(strings.TrimSuffix(e.Name(), ".json"))
		if err != nil {
			continue
		}
		l, err := s.readLoose(id)
		if err != nil {
			return nil, err
		}
		list = append(list, l)
	}
	return list, nil
}

// gcLoose adds to live whoever has an image, or may have one, and removes the
// entries of the others. The caller holds the store lock. A damaged entry stops
// GC: hot pages must not be given away because of it.
func (s *Store) gcLoose(ctx context.Context, grace time.Duration, live map[uuid.UUID]bool, rep *GCReport) error {
	list, err := s.Loose(ctx)
	if err != nil {
		return fmt.Errorf("gc stops, because it can't tell who owns what in NVRAM: %w", err)
	}
	for _, l := range list {
		dead, err := s.looseIsDead(&l, grace, rep)
		if err != nil {
			return err
		}
		if !dead {
			live[l.UUID] = true
			continue
		}
		if err := s.fs.Remove(s.loosePath(l.UUID)); err != nil {
			return err
		}
	}
	if len(list) > 0 {
		return s.fs.SyncDir(s.path("loose"))
	}
	return nil
}

func (s *Store) looseIsDead(l *Loose, grace time.Duration, rep *GCReport) (bool, error) {
	f, err := s.fs.Open(s.loosePath(l.UUID))
	if err != nil {
		return false, err
	}
	defer f.Close()
	if err := f.TryLock(vfs.Exclusive); errors.Is(err, vfs.ErrLocked) {
		return false, nil // being saved or restored
	} else if err != nil {
		return false, err
	}
	was := l.Gone
	switch l.Place.Find(l.UUID, s.LooseHeader) {
	case loose.Unknown:
		rep.Warnings = append(rep.Warnings, fmt.Sprintf("can't tell whether %s still needs its hot pages in NVRAM; they are kept", l.Place.Path))
		return false, nil
	case loose.Present:
		l.Gone = time.Time{}
	case loose.Gone:
		if !l.Whole || l.Restored {
			return true, nil
		}
		if l.Gone.IsZero() {
			l.Gone = time.Now()
		}
		if time.Since(l.Gone) >= grace {
			return true, nil
		}
		rep.GoneFiles++
	}
	if l.Gone.Equal(was) {
		return false, nil
	}
	return false, s.writeLoose(*l)
}
