package lazy

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"github.com/flic-migrate/flic-migrate/tier/bitmap"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/pagemap"
	"github.com/flic-migrate/flic-migrate/tier/source"
	"github.com/flic-migrate/flic-migrate/tier/workingset"
)

// loader brings what nobody has asked for, in four phases: the guest's page
// tables, which its MMU reads before anything else; the pages that earlier
// resumes asked for, roughly in their order; the NVRAM part in its prefetch order;
// and all the rest, first what needs no decoding, then what does, in the order in
// which it lies in the image, so that flash sees one sequential read.
type loader struct {
	c       *checkpoint.Checkpoint
	set     *source.Set
	cache   *source.Cache
	first   func() []workingset.PageRun
	loaded  <-chan struct{} // QEMU has loaded the devices
	busy    func() bool     // demands are waiting
	reader  image.SegmentReader
	room    [source.MaxNeeds]source.Need
	batch   *batch      // that is being made, or nil
	batches chan *batch // closed when all is loaded
	free    chan *batch
	next    atomic.Uint64 // place that loadAll is to go on with, or 0
}

// batch is pages that need the same, and what they need, decoded.
type batch struct {
	needs []source.Need
	held  []*source.Held // of needs
	runs  []pagemap.Run
	// zero tells that pages without content are to be sent as well.
	zero bool
	// hotEnd marks, without any pages, that what follows is cold.
	hotEnd bool
}

const (
	// aheadBatches is how many batches are made before the pump has asked for
	// them. More would only put more reads before a demanded one's on slow flash.
	aheadBatches = 2
	// allBatches are those, the one that the pump sends and the one that is made.
	allBatches = aheadBatches + 2
	// mostRuns is how many runs go into a batch.
	mostRuns = 256
	// firstWindow is how many pages of the first phases are looked at together, so
	// that a segment that holds several of them is decoded once. It begins with
	// few, because the guest asks for the first of them at once, and doubles.
	firstWindow, mostWindow = 64, 1024
)

func newLoader(c *checkpoint.Checkpoint, set *source.Set, cache *source.Cache, first func() []workingset.PageRun, loaded <-chan struct{}, busy func() bool) *loader {
	l := &loader{
		c: c, set: set, cache: cache, first: first, loaded: loaded, busy: busy,
		batches: make(chan *batch, aheadBatches), free: make(chan *batch, allBatches),
	}
	for range allBatches {
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
	if err := l.loadBare(ctx); err != nil {
		return err
	}
	if err := l.loadAll(ctx); err != nil {
		return err
	}
	close(l.batches)
	return nil
}

// stretch is pages of one run that need the same.
type stretch struct {
	place uint64 // of what they need first
	run   pagemap.Run
}

// place is a need's place in the order in which flash is read, from 1 on.
func place(n source.Need) uint64 { return 1 + (uint64(n.Space)<<32 | uint64(n.Number)) }

// loadFirst brings the pages of a list, zero ones included. The list is not
// trusted.
func (l *loader) loadFirst(ctx context.Context, first []workingset.PageRun) error {
	var window []stretch
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
			needs, n := l.set.Stretch(run, l.room[:])
			s := stretch{run: run}
			if s.run.Count = n; len(needs) > 0 {
				s.place = place(needs[0])
			}
			window = append(window, s)
			page += n
			if pages += n; pages >= most {
				if err := l.load(ctx, window); err != nil {
					return err
				}
				window, pages = window[:0], 0
				most = min(2*most, mostWindow)
			}
		}
	}
	return l.load(ctx, window)
}

// load brings a window of loadFirst, in the order in which flash is read.
func (l *loader) load(ctx context.Context, window []stretch) error {
	slices.SortFunc(window, func(a, b stretch) int {
		return cmp.Or(cmp.Compare(a.place, b.place), cmp.Compare(a.run.Block, b.run.Block), cmp.Compare(a.run.Page, b.run.Page))
	})
	for _, s := range window {
		if err := l.add(ctx, s.run, true); err != nil {
			return err
		}
	}
	return l.end(ctx)
}

// loadNVRAM brings the pages that the NVRAM part was made for, in its order. One
// that a live save sent again later may have left its slot: what is elsewhere is
// not in reach here.
func (l *loader) loadNVRAM(ctx context.Context) error {
	err := l.c.HotPages(func(block int, page uint64) error {
		if block >= l.c.PageMap.Blocks() || page >= l.c.PageMap.Pages(block) {
			return nil // another checkpoint's
		}
		run, err := l.c.PageMap.Find(block, page)
		if err != nil {
			return err
		}
		if run.Count = 1; !l.bare(run) {
			return nil
		}
		return l.add(ctx, run, false)
	})
	if err != nil {
		return err
	}
	return l.end(ctx)
}

// loadBare brings whatever needs no decoding; the pump knows what has come by now.
func (l *loader) loadBare(ctx context.Context) error {
	err := l.c.PageMap.Runs(func(r pagemap.Run) error {
		if !l.bare(r) {
			return nil
		}
		return l.add(ctx, r, false)
	})
	if err != nil {
		return err
	}
	return l.end(ctx)
}

// bare tells whether a run's pages have content and need nothing for it.
func (l *loader) bare(r pagemap.Run) bool {
	row := l.set.Row(r.Kind)
	return row.Needs == nil && !row.Zero(r)
}

// loadAll brings what makes up most of a checkpoint: it goes round through the image
// and goes on elsewhere when follow says so.
func (l *loader) loadAll(ctx context.Context) error {
	order, err := l.set.NewOrder(l.c.PageMap)
	if err != nil {
		return err
	}
	things := order.Things()
	disks := l.diskAhead(ctx, order)
	loaded := bitmap.New(int64(things))
	add := func(r pagemap.Run) error { return l.add(ctx, r, false) }
	for i, left := uint64(0), things; left > 0; i = (i + 1) % things {
		if next := l.next.Swap(0); next > 0 {
			i = order.Thing(needAt(next)) % things
		}
		if !loaded.Set(int64(i)) {
			continue
		}
		left--
		disks(i)
		if err := order.Stretches(i, add); err != nil {
			return err
		}
		if err := l.end(ctx); err != nil {
			return err
		}
	}
	return nil
}

// aheadSegments is how many segments of disk slots are read in one go, 2 MiB: as much as a
// disk needs to be fast, and little for a page that is demanded meanwhile to wait for.
const aheadSegments = 16

// diskAhead returns what loadAll calls with each thing that comes next: if that is on disks,
// which are the last, it reads what follows there into the page cache.
func (l *loader) diskAhead(ctx context.Context, order *source.Order) func(thing uint64) {
	first, things := order.Thing(source.Need{Space: l.set.Disk}), order.Things()
	from, to := things, things // what was read last
	return func(thing uint64) {
		if l.set.Disk == 0 || thing < first || from <= thing && thing < to {
			return
		}
		from, to = thing, min(thing+aheadSegments, things)
		var list []uint32
		for i := from; i < to; i++ {
			list = append(list, uint32(i-first))
		}
		l.c.ReadDisksIn(ctx, list)
	}
}

// follow has loadAll go on with what needs n. The pump calls it.
func (l *loader) follow(n source.Need) { l.next.Store(place(n)) }

// needAt is the need with a place.
func needAt(place uint64) source.Need {
	return source.Need{Space: source.Space((place - 1) >> 32), Number: uint32(place - 1)}
}

// add puts pages that need the same into the batch that is being made, or into
// another if they do not fit in.
func (l *loader) add(ctx context.Context, r pagemap.Run, zero bool) error {
	needs, _ := l.set.Stretch(r, l.room[:])
	if b := l.batch; b != nil && (len(b.runs) == mostRuns || !slices.Equal(needs, b.needs)) {
		if err := l.end(ctx); err != nil {
			return err
		}
	}
	if l.batch == nil {
		b, err := l.take(ctx)
		if err != nil {
			return err
		}
		b.zero, b.needs = zero, append(b.needs, needs...)
		l.batch = b
	}
	b := l.batch
	if n := len(b.runs); n > 0 && r.Count == 1 {
		last := &b.runs[n-1]
		if last.Block == r.Block && last.Kind == r.Kind && last.Page+last.Count == r.Page &&
			last.First+last.Count == r.First && (last.Count == 1 || last.Step == 1) {
			last.Count, last.Step = last.Count+1, 1
			return nil
		}
	}
	b.runs = append(b.runs, r)
	return nil
}

// end decodes what the batch that is being made needs, and hands it on.
func (l *loader) end(ctx context.Context) error {
	b := l.batch
	if b == nil {
		return nil
	}
	l.batch = nil
	for _, need := range b.needs {
		h, err := l.cache.Get(ctx, need, &l.reader)
		if err != nil {
			return fmt.Errorf("page %s: %w", l.c.PageName(b.runs[0].Block, b.runs[0].Page), err)
		}
		b.held = append(b.held, h)
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
		for _, h := range b.held {
			l.cache.Release(h)
		}
		*b = batch{needs: b.needs[:0], held: b.held[:0], runs: b.runs[:0]}
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
