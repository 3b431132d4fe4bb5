package moved

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/source"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// Set is all pieces of an image, opened. It may be used from several goroutines. A nil
// Set has nothing.
type Set struct {
	pageSize int64
	slots    source.Ranges
	files    []*file
	places   []place // by their slots
	lenders  []*Set  // whose files places can be in, too
}

// file is a piece that is mapped.
type file struct {
	name string
	m    vfs.Mapping
}

// place is where slots are that follow each other.
type place struct {
	source.Range
	file  *file
	off   int64     // of the first, in the file and in its mapping
	owner uuid.UUID // of the piece
	there uint32    // the first one's slot in it
}

// Open opens the pieces of an image whose NVRAM part has so many slots. It closes the
// sources: a mapping needs no open file.
func Open(sources []Source, id uuid.UUID, pageSize, slots int) (s *Set, err error) {
	defer func() {
		for _, src := range sources {
			src.Close()
		}
		if err != nil {
			s.Close()
			s = nil
		}
	}()
	if len(sources) == 0 {
		return nil, nil
	}
	s = &Set{pageSize: int64(pageSize)}
	for _, src := range sources {
		if err := s.add(src, id, slots); err != nil {
			return s, err
		}
	}
	s.sort()
	return s, nil
}

func (s *Set) sort() {
	slices.SortFunc(s.places, func(a, b place) int { return cmp.Compare(a.First, b.First) })
}

// add maps a piece.
func (s *Set) add(src Source, id uuid.UUID, slots int) error {
	p, err := Read(src)
	if err != nil {
		return err
	}
	bad := func(format string, args ...any) error {
		return &integrity.CorruptError{File: src.Name(), What: "header", Err: fmt.Errorf(format, args...)}
	}
	switch {
	case p.UUID != id:
		return bad("it has pages of checkpoint %v", p.UUID)
	case int64(p.PageSize) != s.pageSize:
		return bad("it has pages of %d bytes and not of %d", p.PageSize, s.pageSize)
	case len(p.Slots) > 0 && p.Slots[len(p.Slots)-1].End() > uint64(slots):
		return bad("it has slot %d of %d", p.Slots[len(p.Slots)-1].End()-1, slots)
	case slices.ContainsFunc(p.Slots, func(r source.Range) bool { return s.slots.Meets(uint64(r.First), r.End()-1) }):
		return bad("it has pages that another one has")
	}
	m, err := src.Map(0, p.Bytes(), false)
	if err != nil {
		return err
	}
	f := &file{src.Name(), m}
	s.files = append(s.files, f)
	off := headerLen(len(p.Slots))
	for _, r := range p.Slots {
		s.places = append(s.places, place{r, f, off, id, r.First})
		off += int64(r.Count) * s.pageSize
	}
	s.slots = s.slots.Union(p.Slots)
	return nil
}

// Slots are those that have been moved, and those that others lend.
func (s *Set) Slots() source.Ranges {
	if s == nil {
		return nil
	}
	return s.slots
}

// Has tells whether a slot has been moved.
func (s *Set) Has(slot uint64) bool { return s != nil && s.slots.Has(slot, slot) }

// find is the place of a slot, which has been moved.
func (s *Set) find(slot uint64) (p *place, off int64) {
	i, _ := slices.BinarySearchFunc(s.places, slot, func(p place, slot uint64) int {
		switch {
		case p.End() <= slot:
			return -1
		case uint64(p.First) > slot:
			return 1
		}
		return 0
	})
	p = &s.places[i]
	return p, p.off + int64(slot-uint64(p.First))*s.pageSize
}

// Page is the content of a slot, which has been moved, in the mapping: read only, valid
// until Close. Touching the bytes can fault: do it within Guard. The caller checks them.
func (s *Set) Page(slot uint64) []byte {
	p, off := s.find(slot)
	return p.file.m.Bytes()[off:][:s.pageSize:s.pageSize]
}

// Where is the file and the offset in it of a slot that has been moved, for messages.
func (s *Set) Where(slot uint64) (name string, off int64) {
	p, off := s.find(slot)
	return p.file.name, off
}

// Owner is the image that has the page of a slot in its pieces, and which slot it is there.
func (s *Set) Owner(slot uint64) (id uuid.UUID, there uint64) {
	p, _ := s.find(slot)
	return p.owner, uint64(p.there) + slot - uint64(p.First)
}

// Guard runs fn, in which pages may be touched, and turns a fault in a mapping of the
// set's into an integrity.CorruptError. It covers the calling goroutine only.
func (s *Set) Guard(fn func() error) error {
	err := vfs.CatchFault(fn)
	var fault *vfs.FaultError
	if s == nil || !errors.As(err, &fault) {
		return err
	}
	for _, f := range s.files {
		if i, ok := fault.Within(f.m.Bytes()); ok {
			return &integrity.CorruptError{File: f.name, Offset: i, What: "moved pages",
				Err: errors.New("they can't be read: the file has been cut short or the medium has an error")}
		}
	}
	for _, l := range s.lenders {
		if lerr := l.Guard(func() error { return err }); !errors.Is(lerr, err) {
			return lerr
		}
	}
	return err
}

// Drop takes slots [first, first+n) out of the process's memory, as far as they have
// been moved.
func (s *Set) Drop(first, n uint64) {
	if s == nil {
		return
	}
	for _, r := range s.slots.Within(first, first+n-1) {
		for at := uint64(r.First); at < r.End(); {
			p, off := s.find(at)
			end := min(p.End(), r.End())
			p.file.m.DontNeed(off, int64(end-at)*s.pageSize)
			at = end
		}
	}
}

// Close unmaps all pieces.
func (s *Set) Close() error {
	if s == nil {
		return nil
	}
	var err error
	for _, f := range s.files {
		err = errors.Join(err, f.m.Close())
	}
	for _, l := range s.lenders {
		err = errors.Join(err, l.Close())
	}
	s.files, s.lenders = nil, nil
	return err
}
