package store

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/loose"
	"github.com/flic-migrate/flic-migrate/tier/rescue"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// Loose is what the store keeps about an image outside of it whose hot pages are
// in an NVRAM file: without it nobody could tell when they may be given away.
//
//	DIR/loose/UUID.json
//	DIR/loose/UUID.lock       empty; locked by the save that writes the image, and by
//	                          those who restore it
//
// The lock is a file of its own because it must stay the same file while several restore
// the image: the entry is replaced when one of them ends. What an earlier flic-migrate has
// left is an entry without one, and gets it when it is first restored.
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

// looseLook is how long one image's file is looked for: it can be on a file system
// whose server does not answer.
const looseLook = 10 * time.Second

func looseObject(id uuid.UUID) string { return looseFolder + "/" + id.String() + looseSuffix }

func looseLock(id uuid.UUID) string { return looseFolder + "/" + id.String() + looseLockSuffix }

const (
	looseSuffix     = ".json"
	looseLockSuffix = ".lock"
)

// removeLoose removes an entry, and then its lock, which nobody else has. A lock that is left
// is gc's.
func (s *Store) removeLoose(ctx context.Context, id uuid.UUID) error {
	err := s.dir.Remove(ctx, looseObject(id))
	if err == nil || gone(err) {
		_ = s.dir.Remove(ctx, looseLock(id))
	}
	return err
}

// writeLoose stores an entry. The caller holds the store lock.
func (s *Store) writeLoose(ctx context.Context, l Loose) error {
	return s.writeSealed(ctx, looseObject(l.UUID), l)
}

func (s *Store) readLoose(ctx context.Context, id uuid.UUID) (Loose, error) {
	var l Loose
	err := s.readSealed(ctx, looseObject(id), "place of an image", maxSealed, &l)
	if err == nil && l.UUID != id {
		err = &integrity.CorruptError{File: s.dir.Path(looseObject(id)), What: "place of an image", Err: errors.New("it is another image's")}
	}
	return l, err
}

// BeginLoose starts a save into a file outside of the store, as BeginFile does,
// whose hot pages go to NVRAM. path is the file's, which exists.
func (s *Store) BeginLoose(ctx context.Context, f Sink, path string) (*Tx, error) {
	place, err := loose.Locate(path)
	if err != nil {
		return nil, err
	}
	t := BeginFile(f)
	t.s = s
	t.loose = &Loose{UUID: t.uuid, Place: place, Created: time.Now()}
	unlock, err := s.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := s.dir.Mkdir(ctx, looseFolder); err != nil {
		return nil, err
	}
	begun := false
	defer func() {
		if !begun { // also while panicking
			if t.entry != nil {
				t.entry.Close()
			}
			s.removeLoose(ctx, t.uuid)
		}
	}()
	if t.entry, err = s.dir.Create(ctx, looseLock(t.uuid)); err != nil {
		return nil, err
	}
	if err := s.writeLoose(ctx, *t.loose); err != nil {
		return nil, err
	}
	begun = true
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
	return t.s.writeLoose(ctx, *t.loose)
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
	if _, err := s.readLoose(ctx, id); gone(err) {
		return func(bool) error { return nil }, nil
	}
	f, err := s.dir.Open(ctx, looseLock(id), Shared)
	if gone(err) { // an earlier flic-migrate's
		if f, err = s.dir.Create(ctx, looseLock(id)); err == nil {
			f.Close()
			f, err = s.dir.Open(ctx, looseLock(id), Shared)
		}
	}
	if err != nil {
		return nil, err
	}
	return func(restored bool) error {
		defer f.Close()
		unlock, err := s.lock(ctx)
		if err != nil {
			return err
		}
		defer unlock()
		l, err := s.readLoose(ctx, id)
		if err != nil {
			return err
		}
		if place, err := loose.Locate(path); path != "" && err == nil {
			l.Place, l.Gone = place, time.Time{}
		}
		l.Restored = l.Restored || restored
		return s.writeLoose(ctx, l)
	}, nil
}

// Loose lists the images outside of the store that have hot pages in NVRAM.
func (s *Store) Loose(ctx context.Context) ([]Loose, error) {
	ids, err := s.looseNamed(ctx, looseSuffix)
	if err != nil {
		return nil, err
	}
	var list []Loose
	for _, id := range ids {
		l, err := s.readLoose(ctx, id)
		if gone(err) {
			continue // given up since
		}
		if err != nil {
			return nil, err
		}
		list = append(list, l)
	}
	return list, nil
}

// looseNamed are the images that have an object with this suffix; none if there is no folder.
func (s *Store) looseNamed(ctx context.Context, suffix string) (ids []uuid.UUID, err error) {
	entries, err := s.dir.List(ctx, looseFolder)
	if gone(err) {
		return nil, nil
	}
	for _, e := range entries {
		stem, ok := strings.CutSuffix(e.Name, suffix)
		id, err := uuid.Parse(stem)
		if ok && err == nil && id.String() == stem {
			ids = append(ids, id)
		}
	}
	return ids, err
}

// FindLoose tells whether a loose image is still there. A file system that does not
// answer is as good as none.
func (s *Store) FindLoose(ctx context.Context, l Loose) loose.State {
	found := make(chan loose.State, 1)
	go func() {
		state := loose.Unknown
		// What is read is a user's.
		_ = rescue.Call(func() error {
			state = l.Place.Find(l.UUID, s.LooseHeader)
			return nil
		})
		found <- state
	}()
	select {
	case state := <-found:
		return state
	case <-ctx.Done():
	case <-time.After(looseLook):
	}
	return loose.Unknown
}

// loose finds out which images outside of the store live, and removes the entries
// of the others. A damaged entry stops GC: hot pages must not be given away because
// of it. Files are looked for without the store lock.
func (g *gc) loose(ctx context.Context, grace time.Duration) error {
	list, err := g.Loose(ctx)
	if err != nil {
		return fmt.Errorf("gc stops, because it can't tell who owns what in NVRAM: %w", err)
	}
	for _, l := range list {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		state := g.FindLoose(ctx, l)
		dead, err := g.judge(ctx, l.UUID, state, grace)
		if err != nil {
			return err
		}
		if !dead {
			g.live[l.UUID] = true
		}
	}
	left, err := g.looseLocks(ctx)
	if err == nil && (len(list) > 0 || left) {
		err = g.dir.Sync(ctx, looseFolder)
	}
	return err
}

// looseLocks removes the locks of entries that there are not: who removes one can be killed
// in between. It tells whether there were any.
func (g *gc) looseLocks(ctx context.Context) (left bool, err error) {
	ids, err := g.looseNamed(ctx, looseLockSuffix)
	if err != nil || len(ids) == 0 {
		return false, err
	}
	unlock, err := g.lock(ctx)
	if err != nil {
		return false, err
	}
	defer unlock()
	have, err := g.looseNamed(ctx, looseSuffix)
	for _, id := range ids {
		if err == nil && !slices.Contains(have, id) {
			left = true
			if err = g.dir.Remove(ctx, looseLock(id)); gone(err) {
				err = nil
			}
		}
	}
	return left, err
}

// judge updates one entry, whose file is in that state, or removes it.
func (g *gc) judge(ctx context.Context, id uuid.UUID, state loose.State, grace time.Duration) (dead bool, err error) {
	unlock, err := g.lock(ctx)
	if err != nil {
		return false, err
	}
	defer unlock()
	l, err := g.readLoose(ctx, id)
	if gone(err) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	f, err := g.dir.Open(ctx, looseLock(id), Exclusive)
	if gone(err) { // an earlier flic-migrate's, which locked the entry
		f, err = g.dir.Open(ctx, looseObject(id), Exclusive)
	}
	if errors.Is(err, vfs.ErrLocked) {
		return false, nil // being saved or restored
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	was := l.Gone
	switch state {
	case loose.Unknown:
		g.rep.Warnings = append(g.rep.Warnings, fmt.Sprintf("can't tell whether %s still needs its hot pages in NVRAM; they are kept", l.Place.Path))
		return false, nil
	case loose.Present:
		l.Gone = time.Time{}
	case loose.Gone:
		if l.Gone.IsZero() {
			l.Gone = time.Now()
		}
		if !l.Whole || l.Restored || time.Since(l.Gone) >= grace {
			return true, g.removeLoose(ctx, id)
		}
		g.rep.GoneFiles++
	}
	if l.Gone.Equal(was) {
		return false, nil
	}
	return false, g.writeLoose(ctx, l)
}
