package source

import (
	"github.com/flic-migrate/flic-migrate/tier/pagemap"
)

// SegmentBytes is the length of the longest segment that pages may need.
func (f *Facts) SegmentBytes() int {
	n := 1
	for _, s := range f.Spaces {
		n = max(n, int(s.SegmentPages)*f.PageSize)
	}
	return n
}

// InOrder is how many decoded segments to keep, of so many bytes together, for who goes
// through the pages in their order: it goes on in each image from where it was there.
// It is 4 at the least.
func (f *Facts) InOrder(bytes int) int {
	all := uint64(0)
	for _, s := range f.Spaces {
		all += s.Segments.Count()
	}
	n := max(4, bytes/f.SegmentBytes())
	return int(min(uint64(n), max(1, all)))
}

// Order lists the pages of a page map by what they need, so that whoever wants all of
// them has each thing decoded once and reads the image from front to back. It takes
// 8 bytes a stretch and 4 for each thing. One goroutine uses it.
type Order struct {
	set    *Set
	m      *pagemap.Map
	before [][]uint64 // of each space and each of its ranges of segments: things in all before it
	starts []uint32   // of each thing, its first stretch, and the number of all
	pages  []uint64   // of each stretch, its first page
	room   [MaxNeeds]Need
}

// NewOrder looks at the whole page map, twice.
func (s *Set) NewOrder(m *pagemap.Map) (*Order, error) {
	o := &Order{set: s, m: m, before: make([][]uint64, len(s.Spaces))}
	things := uint64(0)
	for i := range s.Spaces {
		o.before[i] = append(o.before[i], things)
		for _, r := range s.Spaces[i].Segments {
			things += uint64(r.Count)
			o.before[i] = append(o.before[i], things)
		}
	}
	o.starts = make([]uint32, things+1)
	// First how many each thing has, one place further on.
	err := o.each(func(thing uint64, _ pagemap.Run) { o.starts[thing+1]++ })
	if err != nil {
		return nil, err
	}
	for i := 1; i < len(o.starts); i++ {
		o.starts[i] += o.starts[i-1]
	}
	// Then each where the last of its thing was; that moves every start to the end,
	// which is the next one's start.
	o.pages = make([]uint64, o.starts[len(o.starts)-1])
	err = o.each(func(thing uint64, r pagemap.Run) {
		o.pages[o.starts[thing]] = m.Number(r.Block, r.Page)
		o.starts[thing]++
	})
	copy(o.starts[1:], o.starts)
	o.starts[0] = 0
	return o, err
}

// Reads is what the pages of a checkpoint take to be read: the read budget. A medium
// that seeks is as slow as there are places, and one that does not as there are bytes.
type Reads struct {
	// Places is how many different segments are needed, of all images together.
	Places int64 `json:"places"`
	// Bytes is what the pages hold whose bytes are in them or in NVRAM.
	Bytes int64 `json:"bytes"`
	// PerMB is Places for each million of Bytes; 0 if there are none.
	PerMB float64 `json:"per_mb"`
}

// NewReads is a budget of so many places and pages.
func NewReads(places, pages int64, pageSize int) Reads {
	r := Reads{Places: places, Bytes: pages * int64(pageSize)}
	if r.Bytes > 0 {
		r.PerMB = float64(r.Places) / (float64(r.Bytes) / 1e6)
	}
	return r
}

// Reads counts what the pages of a page map need. It reads none of them.
func (s *Set) Reads(m *pagemap.Map) (Reads, error) {
	needed := make(map[Need]struct{})
	var pages int64
	var last Need
	room := make([]Need, 0, MaxNeeds)
	err := m.Runs(func(r pagemap.Run) error {
		if s.Row(r.Kind).Form != Whole {
			return nil
		}
		pages += int64(r.Count)
		for {
			needs, n := s.Stretch(r, room)
			for _, need := range needs {
				if need != last || len(needed) == 0 {
					needed[need] = struct{}{}
					last = need
				}
			}
			if n == r.Count {
				return nil
			}
			r = r.From(n)
		}
	})
	return NewReads(int64(len(needed)), pages, s.PageSize), err
}

// each calls fn with the first of every stretch's needs, if it has some, and the run
// that begins with it.
func (o *Order) each(fn func(thing uint64, r pagemap.Run)) error {
	return o.m.Runs(func(r pagemap.Run) error {
		for {
			needs, n := o.set.Stretch(r, o.room[:])
			if len(needs) > 0 {
				fn(o.Thing(needs[0]), r)
			}
			if n == r.Count {
				return nil
			}
			r = r.From(n)
		}
	})
}

// Things is how many things there are that pages may need.
func (o *Order) Things() uint64 { return uint64(len(o.starts)) - 1 }

// Thing numbers what can be needed through all spaces. What no page may need has the
// number of what comes next.
func (o *Order) Thing(n Need) uint64 {
	ranges := o.set.Spaces[n.Space].Segments
	i, ok := ranges.find(uint64(n.Number))
	thing := o.before[n.Space][i]
	if ok {
		thing += uint64(n.Number - ranges[i].First)
	}
	return thing
}

// Stretches calls fn with each stretch whose first need is a thing, in page order.
func (o *Order) Stretches(thing uint64, fn func(r pagemap.Run) error) error {
	for _, page := range o.pages[o.starts[thing]:o.starts[thing+1]] {
		r, err := o.m.At(page)
		if err != nil {
			return err
		}
		_, r.Count = o.set.Stretch(r, o.room[:])
		if err := fn(r); err != nil {
			return err
		}
	}
	return nil
}
