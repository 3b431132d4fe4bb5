package source

import (
	"context"
	"fmt"

	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/pagemap"
)

// Page names a page: its block and its number there.
type Page struct {
	Block  int
	Number uint64
}

// Backing is where the bytes of one checkpoint's sources come from: its image and
// its NVRAM part, whole or while they are written, and those of its references.
type Backing interface {
	Segments
	// Slot is the content of an NVRAM slot, which is wanted for a page; one of space 0
	// is checked. The bytes may lie in a mapping: they are touched within Guard only,
	// and only until the next call or Drop.
	Slot(space Space, slot uint64, want Page) ([]byte, error)
	// Guard runs fn and turns a fault of a mapping into an error.
	Guard(fn func() error) error
	// Drop takes slots [first, first+n) out of the process's memory.
	Drop(space Space, first, n uint64)
}

// Checker checks by its digest what comes from a reference when it is used. An error
// says which bytes are wrong.
type Checker interface {
	// CheckPage is for the page that is made of what is in a flash slot, a record or a
	// delta. Of space 0 it need check nothing: what the page is made of was checked.
	CheckPage(space Space, slot uint64, page []byte) error
	// CheckSlot is for the content of a reference's NVRAM slot, which is wanted for a
	// page, as Backing.Slot is asked for it.
	CheckSlot(space Space, slot uint64, want Page, content []byte) error
}

// Lender is a Backing that has some of what is to be fetched in memory, decoded.
type Lender interface {
	// Lend returns it, valid until the Reader is asked for another page, or nil.
	Lend(n Need) *image.Segment
}

// Set is all sources of one checkpoint. It may be used from several goroutines, each
// with a Reader of its own.
type Set struct {
	Facts
	*Table
	Backing
	Checker // nil: there are no references, and own deltas need no check
}

// Stretch tells what the first pages of a run need, and how many of them, at least 1,
// need exactly that. dst is room for the needs, MaxNeeds of them.
func (s *Set) Stretch(r pagemap.Run, dst []Need) (needs []Need, n uint64) {
	if row := s.Row(r.Kind); row.Needs != nil {
		return row.Needs(&s.Facts, r, dst[:0])
	}
	return nil, r.Count
}

// Reader gives one goroutine the content of pages.
type Reader struct {
	set    *Set
	cache  *Cache
	lender Lender // nil: none
	get    func(ctx context.Context, n Need) (*Held, error)

	at     [MaxNeeds]hand // the first n of them
	n      int
	room   [MaxNeeds]Need
	decode image.SegmentReader

	// The stretch that is being read, and what its pages are handed to.
	row   *Row
	run   pagemap.Run
	done  uint64 // pages of the whole run before it
	page  Page
	fn    func(i, n uint64, c Content) error
	pages func() error // readPages

	slots []slotReads // by space

	// Pages in the making: one inflated, and one of a base and a delta.
	unpacked, result []byte
}

// slotReads is what was read of an NVRAM part since slots were let go.
type slotReads struct{ reads, first, last uint64 }

// hand is what a Reader has at hand.
type hand struct {
	need    Need
	held    *Held // nil: it is lent, for one page
	segment *image.Segment
	first   uint64 // its first slot
}

// NewReader returns a Reader that has what it needs decoded when it needs it, by
// itself unless somebody else does. The cache must have room for MaxNeeds beside what
// others hold. Close it.
func (s *Set) NewReader(c *Cache) *Reader {
	r := s.NewPlannedReader(c, nil)
	r.lender, _ = s.Backing.(Lender)
	r.get = func(ctx context.Context, n Need) (*Held, error) { return c.Get(ctx, n, &r.decode) }
	return r
}

// NewPlannedReader returns a Reader that is handed what it needs by a planner, in the
// order in which Planned says that it will ask. get may not return another than n.
func (s *Set) NewPlannedReader(c *Cache, get func(ctx context.Context, n Need) (*Held, error)) *Reader {
	r := &Reader{set: s, cache: c, get: get}
	r.pages = r.readPages
	return r
}

// Close gives up what the Reader holds.
func (rd *Reader) Close() { rd.want(context.Background(), nil) }

// Planned tells what a Reader will ask for, in order, if it is given stretch after
// stretch: what the one before has needed is at hand.
type Planned struct {
	last [MaxNeeds]Need
	n    int
}

// Next calls fn for each of a stretch's needs that must be got for it.
func (p *Planned) Next(needs []Need, fn func(Need) error) error {
	if p.n == 1 && len(needs) == 1 && p.last[0] == needs[0] {
		return nil // which is most often so
	}
	for i, n := range needs {
		if find(p.last[:p.n], n) >= 0 || find(needs[:i], n) >= 0 {
			continue
		}
		if err := fn(n); err != nil {
			return err
		}
	}
	if len(needs) > 0 {
		p.n = copy(p.last[:], needs)
	}
	return nil
}

func find(list []Need, n Need) int {
	for i, o := range list {
		if o == n {
			return i
		}
	}
	return -1
}

// Read calls fn with the content of all pages of a run, in order: that of n pages, all
// alike, from the run's i-th on. fn must not ask this Reader for more.
func (rd *Reader) Read(ctx context.Context, r pagemap.Run, fn func(i, n uint64, c Content) error) error {
	rd.row, rd.fn, rd.done = rd.set.Row(r.Kind), fn, 0
	for {
		needs, n := rd.set.Stretch(r, rd.room[:])
		rd.run = r
		rd.run.Count = n
		rd.page = Page{r.Block, r.Page}
		if len(needs) > 0 {
			if err := rd.want(ctx, needs); err != nil {
				return err
			}
		}
		var err error
		if rd.row.Mapped {
			err = rd.set.Guard(rd.pages)
		} else {
			err = rd.readPages()
		}
		if err != nil || n == r.Count {
			return err
		}
		r = r.From(n)
		rd.done += n
	}
}

// readPages reads the pages of the stretch.
func (rd *Reader) readPages() error {
	n := uint64(1)
	if rd.run.Step == 0 {
		n = rd.run.Count
	}
	for i := uint64(0); i < rd.run.Count; i += n {
		rd.page.Number = rd.run.Page + i
		c, err := rd.row.Content(rd, rd.run.Entry(i))
		if err != nil {
			return err
		}
		if err := rd.fn(rd.done+i, n, c); err != nil {
			return err
		}
	}
	return nil
}

// Copy puts the bytes of a page with entry e into dst.
func (rd *Reader) Copy(ctx context.Context, dst []byte, p Page, e pagemap.Entry) error {
	run := pagemap.Run{Block: p.Block, Page: p.Number, Count: 1, Kind: e.Kind(), First: e.Value()}
	return rd.Read(ctx, run, func(_, _ uint64, c Content) error { return c.Copy(dst) })
}

// Have tells whether a page's bytes can be had without decoding anything.
func (rd *Reader) Have(r pagemap.Run) bool {
	needs, _ := rd.set.Stretch(r, rd.room[:])
	for _, n := range needs {
		if rd.find(n) != nil {
			continue
		}
		h := rd.cache.Have(n)
		if h == nil {
			return false
		}
		rd.cache.Release(h)
	}
	return true
}

// Page is the page that is being read, for Row.Content.
func (rd *Reader) Page() Page { return rd.page }

// Facts are those of the checkpoint, for Row.Content.
func (rd *Reader) Facts() *Facts { return &rd.set.Facts }

// Segment is what the page that is being read needs, for Row.Content.
func (rd *Reader) Segment(n Need) *image.Segment {
	return rd.find(n).segment
}

// InSegment is the segment and the position in it of a flash slot that the page that
// is being read needs.
func (rd *Reader) InSegment(space Space, slot uint64) (*image.Segment, int) {
	for i := range rd.at[:rd.n] {
		h := &rd.at[i]
		if n := slot - h.first; h.need.Space == space && n < rd.set.Spaces[space].SegmentPages {
			return h.segment, int(n)
		}
	}
	panic("source: a row wants what it does not need")
}

// inflated is the page at a position of a segment, deflated there or not.
func (rd *Reader) inflated(s *image.Segment, i int) ([]byte, error) {
	c, err := ofSegment(s, i)
	if err != nil || c.Form != Deflated {
		return c.Data, err
	}
	page := rd.buffer(&rd.unpacked)
	return page, c.Copy(page)
}

// buffer is a page's length of memory, made when it is first needed.
func (rd *Reader) buffer(b *[]byte) []byte {
	if *b == nil {
		*b = make([]byte, rd.set.PageSize)
	}
	return *b
}

func (rd *Reader) find(n Need) *hand {
	for i := range rd.at[:rd.n] {
		if rd.at[i].need == n {
			return &rd.at[i]
		}
	}
	return nil
}

// want has needs at hand and gives up all else.
func (rd *Reader) want(ctx context.Context, needs []Need) error {
	if rd.n == 1 && len(needs) == 1 && rd.at[0].need == needs[0] && rd.at[0].held != nil {
		return nil
	}
	kept := 0
	for _, h := range rd.at[:rd.n] {
		switch {
		case h.held == nil: // lent, and that is over
		case find(needs, h.need) >= 0:
			rd.at[kept] = h
			kept++
		default:
			rd.cache.Release(h.held)
		}
	}
	rd.n = kept
	for _, n := range needs {
		if rd.find(n) != nil {
			continue
		}
		if rd.lender != nil {
			if s := rd.lender.Lend(n); s != nil {
				rd.at[rd.n] = hand{n, nil, s, uint64(n.Number) * rd.set.Spaces[n.Space].SegmentPages}
				rd.n++
				continue
			}
		}
		h, err := rd.get(ctx, n)
		if err != nil {
			return err
		}
		if h.Need != n {
			rd.cache.Release(h)
			return fmt.Errorf("%v was planned where %v is needed", h.Need, n)
		}
		s, err := h.Wait(ctx)
		if err != nil {
			rd.cache.Release(h)
			return err
		}
		rd.at[rd.n] = hand{n, h, s, uint64(n.Number) * rd.set.Spaces[n.Space].SegmentPages}
		rd.n++
	}
	return nil
}

// LetGo takes what has been read from NVRAM since the last time out of the process's
// memory, for a reader of single pages: with each one that is touched the kernel maps
// a whole folio, and 512 KiB have been seen.
func (rd *Reader) LetGo() {
	const around = 512
	for space := range rd.slots {
		if v := &rd.slots[space]; v.reads > 0 {
			first := v.first - min(v.first, around)
			rd.set.Drop(Space(space), first, v.last+around-first)
			v.reads = 0
		}
	}
}

// dropEvery is how many slots are read from NVRAM before they are let go. Mapped
// pages count as the process's memory as long as they are mapped.
const dropEvery = 1024

// slot is the content of an NVRAM slot for the page that is being read.
func (rd *Reader) slot(space int, n uint64) ([]byte, error) {
	for len(rd.slots) <= space {
		rd.slots = append(rd.slots, slotReads{})
	}
	v := &rd.slots[space]
	if v.reads == dropEvery {
		rd.set.Drop(Space(space), v.first, v.last-v.first+1)
		v.reads = 0
	}
	if v.reads == 0 {
		v.first, v.last = n, n
	}
	v.reads, v.first, v.last = v.reads+1, min(v.first, n), max(v.last, n)
	return rd.set.Slot(Space(space), n, rd.page)
}
