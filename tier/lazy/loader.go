package lazy

import (
	"cmp"
	"context"
	"fmt"
	"slices"
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
	reader  image.SegmentReader
	batches chan *batch // closed when all is loaded
	free    chan *batch
	next    atomic.Int64 // 1 + the segment that loadAll is to go on with, or 0
}

// batch is a decoded segment and the pages whose content it holds, or, without
// a segment, pages whose content is elsewhere.
type batch struct {
	segment *image.Segment
	pages   []slotRun
	// zero tells that pages without content are to be sent as well.
	zero bool
	// hotEnd marks, without any pages, that what follows is cold.
	hotEnd bool
}

// slotRun is a stretch of pages and where their content is.
type slotRun struct {
	slot  pagemap.Entry // of the first page
	step  uint64
	block int
	page  uint64
	count uint64
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
		c: c, first: first, loaded: loaded, busy: busy,
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
	// The whole table is looked at only now, when the guest runs already.
	var runs []slotRun
	err = l.c.PageMap.Runs(func(r pagemap.Run) error {
		switch {
		case r.Kind == pagemap.Absent, r.Kind == pagemap.ZeroData, r.Kind == pagemap.Fill && r.First == 0:
			return nil
		}
		runs = append(runs, slotRun{r.Entry(0), r.Step, r.Block, r.Page, r.Count})
		return nil
	})
	if err != nil {
		return err
	}
	if err := l.loadAll(ctx, runs); err != nil {
		return err
	}
	close(l.batches)
	return nil
}

func (l *loader) loadFirst(ctx context.Context, first []workingset.PageRun) error {
	var window []slotRun
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
			n := min(run.Count, end-page, most)
			window = append(window, slotRun{run.Entry(0), run.Step, r.Block, page, n})
			page += n
			if pages += n; pages >= most {
				if err := l.load(ctx, window, true); err != nil {
					return err
				}
				window, pages = window[:0], 0
				most = min(2*most, mostWindow)
			}
		}
	}
	return l.load(ctx, window, true)
}

func (l *loader) loadNVRAM(ctx context.Context) error {
	slots := l.c.NVRAMSlots()
	for len(slots) > 0 {
		b, err := l.take(ctx)
		if err != nil {
			return err
		}
		n := min(len(slots), l.c.Image.SegmentPages)
		for _, s := range slots[:n] {
			run, err := l.c.PageMap.Find(int(s.Block), s.Page)
			if err != nil {
				return err
			}
			// A page that a live save sent again as zero has left its slot, and
			// what is elsewhere is not in reach here.
			if run.Kind == pagemap.NVRAM {
				b.pages = append(b.pages, slotRun{run.Entry(0), 0, int(s.Block), s.Page, 1})
			}
		}
		slots = slots[n:]
		if err := l.put(ctx, b); err != nil {
			return err
		}
	}
	return nil
}

// load brings runs in the order in which their content lies in the image.
func (l *loader) load(ctx context.Context, runs []slotRun, zero bool) error {
	runs = l.cut(runs)
	for len(runs) > 0 {
		n := l.together(runs)
		if err := l.one(ctx, runs[:n], zero); err != nil {
			return err
		}
		runs = runs[n:]
	}
	return nil
}

// loadAll is load for what makes up most of a checkpoint: it goes round through
// the image and goes on elsewhere when follow says so.
func (l *loader) loadAll(ctx context.Context, runs []slotRun) error {
	runs = l.cut(runs)
	// The pieces of segment i of those that are needed are runs[at[i]:at[i+1]].
	var at []int
	for i := 0; i < len(runs); i += l.together(runs[i:]) {
		at = append(at, i)
	}
	parts := len(at)
	at = append(at, len(runs))
	loaded := make([]bool, parts)
	for i, left := 0, parts; left > 0; i = (i + 1) % parts {
		if n := l.next.Swap(0); n > 0 {
			slot := pagemap.Make(pagemap.Flash, uint64(n-1)*uint64(l.c.Image.SegmentPages))
			i = sort.Search(parts, func(i int) bool { return runs[at[i]].slot >= slot }) % parts
		}
		if loaded[i] {
			continue
		}
		loaded[i] = true
		left--
		if err := l.one(ctx, runs[at[i]:at[i+1]], false); err != nil {
			return err
		}
	}
	return nil
}

// follow has loadAll go on with a segment. The pump calls it.
func (l *loader) follow(segment uint32) { l.next.Store(int64(segment) + 1) }

// cut sorts runs by where their content lies, and cuts those in two that lie in
// two segments.
func (l *loader) cut(runs []slotRun) []slotRun {
	per := uint64(l.c.Image.SegmentPages)
	for i := 0; i < len(runs); i++ { // also those that are appended
		r := runs[i]
		if room := per - r.slot.Value()%per; r.slot.Kind() == pagemap.Flash && r.step == 1 && r.count > room {
			runs[i].count = room
			runs = append(runs, slotRun{r.slot + pagemap.Entry(room), 1, r.block, r.page + room, r.count - room})
		}
	}
	slices.SortFunc(runs, func(a, b slotRun) int { return cmp.Compare(a.slot, b.slot) })
	return runs
}

// together is how many of the runs at the beginning go into one batch.
func (l *loader) together(runs []slotRun) int {
	first, n := runs[0].slot, 1
	if first.Kind() != pagemap.Flash {
		return n
	}
	per := uint64(l.c.Image.SegmentPages)
	for end := pagemap.Make(pagemap.Flash, (first.Value()/per+1)*per); n < len(runs) && runs[n].slot < end; {
		n++
	}
	return n
}

// one makes a batch of runs that go together.
func (l *loader) one(ctx context.Context, runs []slotRun, zero bool) error {
	b, err := l.take(ctx)
	if err != nil {
		return err
	}
	b.zero = zero
	b.pages = append(b.pages, runs...)
	if runs[0].slot.Kind() == pagemap.Flash {
		if b.segment, err = l.c.Image.Segment(&l.reader, segmentOf(l.c, runs[0].slot)); err != nil {
			return fmt.Errorf("page %s: %w", l.c.PageName(runs[0].block, runs[0].page), err)
		}
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
		*b = batch{pages: b.pages[:0]}
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
