package lazy

import (
	"context"
	"fmt"
	"sort"
	"sync/atomic"
	"time"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/pagemap"
	"github.com/flic-migrate/flic-migrate/tier/workingset"
)

// loader brings what nobody has asked for, in four phases: the guest's page
// tables, which its MMU reads before anything else; the pages that earlier
// resumes asked for, roughly in their order; the NVRAM part in its prefetch order;
// and all the rest in the order in which it lies in the image, so that flash sees
// one sequential read.
type loader struct {
	c       *checkpoint.Checkpoint
	first   func() []workingset.PageRun
	loaded  <-chan struct{} // QEMU has loaded the devices
	busy    func() bool     // demands are waiting
	row     row
	reader  image.SegmentReader
	batches chan *batch // closed when all is loaded
	free    chan *batch
	next    atomic.Int64 // 1 + the segment that loadAll is to go on with, or 0
}

// batch is a decoded segment and the pages whose content it holds, or, without
// a segment, pages whose content is elsewhere.
type batch struct {
	segment *image.Segment
	pages   []piece // may be a part of a longer list
	// zero tells that pages without content are to be sent as well.
	zero bool
	// hotEnd marks, without any pages, that what follows is cold.
	hotEnd bool
	// NVRAM slots [first, end), which are read for these pages for the last time.
	first, end uint64
}

const (
	// aheadBatches is how many segments are decoded before the pump has asked
	// for them. More would only put more reads before a demanded one's on
	// slow flash.
	aheadBatches = 2
	// firstWindow is how many pages of the first phases are looked at together, so
	// that a segment that holds several of them is decoded once. It begins with
	// few, because the guest asks for the first of them at once, and doubles.
	firstWindow, mostWindow = 64, 1024
)

func newLoader(c *checkpoint.Checkpoint, first func() []workingset.PageRun, loaded <-chan struct{}, busy func() bool) *loader {
	l := &loader{
		c: c, first: first, loaded: loaded, busy: busy, row: newRow(c.Meta.BlockPages()),
		batches: make(chan *batch, aheadBatches), free: make(chan *batch, aheadBatches+2),
	}
	for range cap(l.free) {
		l.free <- new(batch)
	}
	return l
}

// done gives a batch back.
func (l *loader) done(b *batch) { l.free <- b }

func (l *loader) run(ctx context.Context) error {
	// Putting a large guest's pages in order takes a CPU for some 20 ms, which
	// QEMU needs for its devices: the guest would run later, the more RAM it has.
	select {
	case <-l.loaded:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if err := l.loadFirst(ctx, l.c.Meta.PageTables); err != nil {
		return err
	}
	if l.first != nil {
		if err := l.loadFirst(ctx, l.first()); err != nil {
			return err
		}
	}
	if err := l.loadNVRAM(ctx); err != nil {
		return err
	}
	b, err := l.take(ctx)
	if err != nil {
		return err
	}
	b.hotEnd = true
	if err := l.put(ctx, b); err != nil {
		return err
	}
	rest, err := l.rest()
	if err != nil {
		return err
	}
	if err := l.loadAll(ctx, rest); err != nil {
		return err
	}
	close(l.batches)
	return nil
}

// rest is all that loadAll brings, in order. It looks at the whole page map, twice,
// so that what it returns takes no more memory than it must.
func (l *loader) rest() (list []piece, err error) {
	for _, fill := range []bool{false, true} {
		n := 0
		err := l.c.PageMap.Runs(func(r pagemap.Run) error {
			l.worth(r, func(r pagemap.Run) {
				l.pieces(r, func(p piece) {
					if n++; fill {
						list = append(list, p)
					}
				})
			})
			return nil
		})
		if err != nil {
			return nil, err
		}
		if !fill {
			list = make([]piece, 0, n)
		}
	}
	sortPieces(list)
	return list, nil
}

// worth hands on what of a run loadAll has to bring: pages with content that are
// not the owners of a slot in NVRAM, which loadNVRAM brings.
func (l *loader) worth(r pagemap.Run, fn func(pagemap.Run)) {
	switch {
	case r.Kind == pagemap.Absent, r.Kind == pagemap.ZeroData, r.Kind == pagemap.Fill && r.First == 0:
	case r.Kind == pagemap.NVRAM:
		slots := l.c.NVRAMSlots()
		for i := range r.Count {
			one := pagemap.Run{Block: r.Block, Page: r.Page + i, Count: 1, Kind: r.Kind, First: r.First + i*r.Step}
			if s := slots[one.First]; int(s.Block) != one.Block || s.Page != one.Page {
				fn(one)
			}
		}
	default:
		fn(r)
	}
}

// pieces hands on a run's pieces.
func (l *loader) pieces(r pagemap.Run, fn func(piece)) {
	per := uint64(l.c.Image.SegmentPages)
	for i := uint64(0); i < r.Count; {
		e := r.Entry(i)
		n := min(r.Count-i, mostPages)
		if r.Kind == pagemap.Flash && r.Step == 1 {
			n = min(n, per-e.Value()%per)
		}
		fn(makePiece(l.row.number(r.Block, r.Page+i), e, r.Step, n))
		i += n
	}
}

func (l *loader) loadFirst(ctx context.Context, first []workingset.PageRun) error {
	var window []piece
	var pages uint64
	most := uint64(firstWindow)
	for _, r := range first {
		if r.Block < 0 || r.Block >= l.c.PageMap.Blocks() || r.Page >= l.c.PageMap.Pages(r.Block) {
			continue
		}
		end := r.Page + min(r.Count, l.c.PageMap.Pages(r.Block)-r.Page)
		for page := r.Page; page < end; {
			run, err := l.c.PageMap.Find(r.Block, page)
			if err != nil {
				return err
			}
			run.Count = min(run.Count, end-page, most)
			l.pieces(run, func(p piece) { window = append(window, p) })
			page += run.Count
			if pages += run.Count; pages >= most {
				if err := l.load(ctx, window, true); err != nil {
					return err
				}
				window, pages = nil, 0 // it is in batches now
				most = min(2*most, mostWindow)
			}
		}
	}
	return l.load(ctx, window, true)
}

func (l *loader) loadNVRAM(ctx context.Context) error {
	slots := l.c.NVRAMSlots()
	for first := 0; first < len(slots); {
		b, err := l.take(ctx)
		if err != nil {
			return err
		}
		end := min(first+l.c.Image.SegmentPages, len(slots))
		b.pages = make([]piece, 0, end-first)
		for _, s := range slots[first:end] {
			run, err := l.c.PageMap.Find(int(s.Block), s.Page)
			if err != nil {
				return err
			}
			// A page that a live save sent again as zero has left its slot, and
			// what is elsewhere is not in reach here.
			if run.Kind == pagemap.NVRAM {
				b.pages = append(b.pages, makePiece(l.row.number(int(s.Block), s.Page), run.Entry(0), 0, 1))
			}
		}
		b.first, b.end = uint64(first), uint64(end)
		first = end
		if err := l.put(ctx, b); err != nil {
			return err
		}
	}
	return nil
}

// load brings pieces in the order in which their content lies in the image.
func (l *loader) load(ctx context.Context, pieces []piece, zero bool) error {
	sortPieces(pieces)
	for len(pieces) > 0 {
		n := l.together(pieces)
		if err := l.one(ctx, pieces[:n], zero); err != nil {
			return err
		}
		pieces = pieces[n:]
	}
	return nil
}

// loadAll is load for what makes up most of a checkpoint, and is in order already:
// it goes round through the image and goes on elsewhere when follow says so.
func (l *loader) loadAll(ctx context.Context, pieces []piece) error {
	// The pieces of part i, most often a segment, are pieces[at[i]:at[i+1]].
	var at []int
	for i := 0; i < len(pieces); i += l.together(pieces[i:]) {
		at = append(at, i)
	}
	parts := len(at)
	at = append(at, len(pieces))
	loaded := make([]bool, parts)
	for i, left := 0, parts; left > 0; i = (i + 1) % parts {
		if n := l.next.Swap(0); n > 0 {
			slot := pagemap.Make(pagemap.Flash, uint64(n-1)*uint64(l.c.Image.SegmentPages))
			i = sort.Search(parts, func(i int) bool { return pieces[at[i]].entry >= slot }) % parts
		}
		if loaded[i] {
			continue
		}
		loaded[i] = true
		left--
		if err := l.one(ctx, pieces[at[i]:at[i+1]], false); err != nil {
			return err
		}
	}
	return nil
}

// follow has loadAll go on with a segment. The pump calls it.
func (l *loader) follow(segment uint32) { l.next.Store(int64(segment) + 1) }

// together is how many of the pieces at the beginning go into one batch.
func (l *loader) together(pieces []piece) int {
	first, n := pieces[0].entry, 1
	per := uint64(l.c.Image.SegmentPages)
	if first.Kind() != pagemap.Flash {
		for n < min(len(pieces), int(per)) && pieces[n].entry.Kind() == first.Kind() {
			n++
		}
		return n
	}
	for end := pagemap.Make(pagemap.Flash, (first.Value()/per+1)*per); n < len(pieces) && pieces[n].entry < end; {
		n++
	}
	return n
}

// one makes a batch of pieces that go together.
func (l *loader) one(ctx context.Context, pieces []piece, zero bool) error {
	b, err := l.take(ctx)
	if err != nil {
		return err
	}
	b.zero = zero
	b.pages = pieces
	switch first, last := pieces[0], pieces[len(pieces)-1]; first.entry.Kind() {
	case pagemap.Flash:
		if b.segment, err = l.c.Image.Segment(&l.reader, segmentOf(l.c, first.entry)); err != nil {
			block, page := l.row.page(first.page())
			return fmt.Errorf("page %s: %w", l.c.PageName(block, page), err)
		}
	case pagemap.NVRAM:
		b.first, b.end = first.entry.Value(), last.entry.Value()+1
	}
	return l.put(ctx, b)
}

// take waits for a free batch, and then a little for demands to be served,
// whose reads of the same device would otherwise queue behind this one.
func (l *loader) take(ctx context.Context) (*batch, error) {
	select {
	case b := <-l.free:
		for i := 0; i < 20 && l.busy(); i++ {
			time.Sleep(100 * time.Microsecond)
		}
		l.reader.Recycle(b.segment)
		if b.end > b.first {
			// What is mapped counts as this process's memory.
			l.c.DropNVRAM(b.first, b.end-b.first)
		}
		*b = batch{}
		return b, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func (l *loader) put(ctx context.Context, b *batch) error {
	select {
	case l.batches <- b:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
