package moved

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/source"
)

// Lent says which slots of an image have their pages in pieces of other images: pages of a
// disk that an earlier checkpoint, which was received too, has already. It names where the
// bytes are, and never another list like it, so that one who has borrowed is not lent from.
//
//	0 ┌─────────────────────────────────────────────┐
//	  │ magic, version, number of images, UUID of   │
//	  │ the image, number of runs                   │
//	  │ UUIDs of the images that lend               │
//	  │ runs: slot, count, image, slot there        │
//	  │                                   CRC-32C   │
//	  └─────────────────────────────────────────────┘
//
// docs/format.md has every byte.
type Lent struct {
	UUID   uuid.UUID   // of the image whose slots these are
	Images []uuid.UUID // that lend
	Runs   []LentRun   // they rise, and no slot is in two

	file string // for messages
}

// LentRun is slots that follow each other, in the image and in the one that lends.
type LentRun struct {
	source.Range
	Image int    // an index into Images
	There uint32 // the first one's slot in that image's pieces
}

const (
	lentMagic   = "FLICLNT\x00"
	lentVersion = 1

	lentFixedLen = 40
	lentRunLen   = 16
	maxLentRuns  = 1 << 18
	maxLenders   = 1024 // as many as a checkpoint refers to

	// MaxLent is the longest stored form.
	MaxLent = lentFixedLen + maxLenders*uuidLen + maxLentRuns*lentRunLen + crcLen
	uuidLen = 16
)

// Corrupt is the error of what is wrong with it.
func (l *Lent) Corrupt(format string, args ...any) error {
	return &integrity.CorruptError{File: l.file, What: "lent pages", Err: fmt.Errorf(format, args...)}
}

// Add adds a slot, which is higher than those that there are, as lent by an image, where it is
// slot there. It tells whether there was room for it.
func (l *Lent) Add(slot uint32, by uuid.UUID, there uint32) bool {
	k := slices.Index(l.Images, by)
	if n := len(l.Runs); n > 0 && k >= 0 {
		last := &l.Runs[n-1]
		if last.Image == k && last.End() == uint64(slot) && uint64(last.There)+uint64(last.Count) == uint64(there) {
			last.Count++
			return true
		}
	}
	if len(l.Runs) == maxLentRuns || k < 0 && len(l.Images) == maxLenders {
		return false
	}
	if k < 0 {
		k, l.Images = len(l.Images), append(l.Images, by)
	}
	l.Runs = append(l.Runs, LentRun{source.Range{First: slot, Count: 1}, k, there})
	return true
}

// Slots are those that are lent to the image.
func (l *Lent) Slots() (slots source.Ranges) {
	if l == nil {
		return nil
	}
	for _, r := range l.Runs {
		slots = joined(slots, r.Range)
	}
	return slots
}

// joined is a set with a range that begins no lower than its last.
func joined(s source.Ranges, r source.Range) source.Ranges {
	if n := len(s); n > 0 && s[n-1].End() >= uint64(r.First) {
		s[n-1].Count = uint32(max(s[n-1].End(), r.End()) - uint64(s[n-1].First))
		return s
	}
	return append(s, r)
}

// Needs are the slots of an image that lends.
func (l *Lent) Needs(by uuid.UUID) (slots source.Ranges) {
	if l == nil {
		return nil
	}
	k := slices.Index(l.Images, by)
	var runs source.Ranges
	for _, r := range l.Runs {
		if r.Image == k {
			runs = append(runs, source.Range{First: r.There, Count: r.Count})
		}
	}
	slices.SortFunc(runs, func(a, b source.Range) int { return int(int64(a.First) - int64(b.First)) })
	for _, r := range runs {
		slots = joined(slots, r)
	}
	return slots
}

// Append appends the stored form.
func (l *Lent) Append(dst []byte) []byte {
	le, start := binary.LittleEndian, len(dst)
	dst = append(dst, lentMagic...)
	dst = le.AppendUint32(dst, lentVersion)
	dst = le.AppendUint32(dst, uint32(len(l.Images)))
	dst = append(dst, l.UUID[:]...)
	dst = le.AppendUint32(dst, uint32(len(l.Runs)))
	dst = le.AppendUint32(dst, 0)
	for _, id := range l.Images {
		dst = append(dst, id[:]...)
	}
	for _, r := range l.Runs {
		for _, n := range []uint32{r.First, r.Count, uint32(r.Image), r.There} {
			dst = le.AppendUint32(dst, n)
		}
	}
	return le.AppendUint32(dst, integrity.Checksum(dst[start:]))
}

// IsLentTo tells whether a stored list says at its beginning, which is not checked, that it is
// of that image.
func IsLentTo(src image.Source, id uuid.UUID) bool {
	var b [lentFixedLen]byte
	n, _ := src.ReadAt(b[:], 0)
	return n == len(b) && uuid.UUID(b[16:32]) == id
}

// ParseLent reads the stored form, which is in a file of that name. No number in it makes it
// take more memory than it has bytes, twice over.
func ParseLent(file string, b []byte) (*Lent, error) {
	bad := func(off int, format string, args ...any) error {
		return &integrity.CorruptError{File: file, Offset: int64(off), What: "lent pages", Err: fmt.Errorf(format, args...)}
	}
	le := binary.LittleEndian
	if len(b) < lentFixedLen+crcLen || string(b[:8]) != lentMagic {
		return nil, bad(0, "it is no list of lent pages")
	}
	end := len(b) - crcLen
	if integrity.Checksum(b[:end]) != le.Uint32(b[end:]) {
		return nil, bad(0, "%w", integrity.ErrChecksum)
	}
	if v := le.Uint32(b[8:]); v != lentVersion {
		return nil, &image.UnsupportedError{File: file, Version: v, Why: fmt.Sprintf("lent pages in version %d are not known here", v)}
	}
	images, runs := int(le.Uint32(b[12:])), int(le.Uint32(b[32:]))
	if images > maxLenders || runs > maxLentRuns || le.Uint32(b[36:]) != 0 || lentFixedLen+images*uuidLen+runs*lentRunLen != end {
		return nil, bad(12, "%d images and %d runs in %d bytes", images, runs, len(b))
	}
	l := &Lent{Images: make([]uuid.UUID, images), Runs: make([]LentRun, runs), file: file}
	copy(l.UUID[:], b[16:])
	at := lentFixedLen
	for i := range l.Images {
		copy(l.Images[i][:], b[at:])
		if l.Images[i] == l.UUID || slices.Contains(l.Images[:i], l.Images[i]) {
			return nil, bad(at, "image %v, twice or its own", l.Images[i])
		}
		at += uuidLen
	}
	next := uint64(0)
	for i := range l.Runs {
		r := LentRun{source.Range{First: le.Uint32(b[at:]), Count: le.Uint32(b[at+4:])}, int(le.Uint32(b[at+8:])), le.Uint32(b[at+12:])}
		if uint64(r.First) < next || r.Count == 0 || r.End() > 1<<32 || r.Image >= images || uint64(r.There)+uint64(r.Count) > 1<<32 {
			return nil, bad(at, "run %d: %d slots from %d on, of image %d from %d on", i, r.Count, r.First, r.Image, r.There)
		}
		l.Runs[i], next = r, r.End()
		at += lentRunLen
	}
	return l, nil
}

// Borrow adds to what an image has in pieces, nil if nothing, what others lend it: lenders are
// their pieces, in the order of l.Images, nil where there are none. The set closes them, also
// if that fails. What the image has itself counts.
func Borrow(s *Set, l *Lent, pageSize int, lenders []*Set) (*Set, error) {
	if s == nil {
		s = &Set{pageSize: int64(pageSize)}
	}
	s.lenders = append(s.lenders, lenders...)
	var more []place
	for _, r := range l.Runs {
		lacks := source.Ranges{r.Range}
		if s.slots.Meets(uint64(r.First), r.End()-1) {
			lacks = lacks.Minus(s.slots)
		}
		for _, own := range lacks {
			from := uint64(r.There) + uint64(own.First-r.First)
			lender, end := lenders[r.Image], from+uint64(own.Count)
			if !lender.Slots().Has(from, end-1) {
				return s, l.Corrupt("of %d slots from %d on of image %v some are in no .moved piece of it", own.Count, from, l.Images[r.Image])
			}
			for at := from; at < end; {
				p, off := lender.find(at)
				n := min(p.End(), end) - at
				more = append(more, place{source.Range{First: own.First + uint32(at-from), Count: uint32(n)}, p.file, off, p.owner, uint32(at)})
				at += n
			}
		}
	}
	s.places = append(s.places, more...)
	s.slots = s.slots.Union(l.Slots())
	s.sort()
	return s, nil
}
