package lazy

import (
	"context"
	"fmt"
	"sort"
	"time"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/pagetable"
)

// loader reads what nobody has asked for, in the order in which it lies in the
// image, so that flash sees one sequential read.
type loader struct {
	c       *checkpoint.Checkpoint
	start   chan struct{} // closed by begin
	batches chan *batch   // closed when all is loaded
	free    chan *batch
	busy    func() bool // demands are waiting
}

// batch is a decoded segment and the pages whose content it holds, or, without
// a segment, pages whose content is elsewhere.
type batch struct {
	segment *image.Segment
	reader  image.SegmentReader
	pages   []slotRun
}

// slotRun is a page table run that has content.
type slotRun struct {
	slot  pagetable.Entry // of the first page
	step  uint64
	block int
	page  uint64
	count uint64
}

// aheadBatches is how many segments are decoded before the pump has asked for
// them. More would only put more reads before a demanded one's on slow flash.
const aheadBatches = 2

func newLoader(c *checkpoint.Checkpoint, busy func() bool) *loader {
	l := &loader{
		c: c, busy: busy, start: make(chan struct{}),
		batches: make(chan *batch, aheadBatches), free: make(chan *batch, aheadBatches+2),
	}
	for range cap(l.free) {
		l.free <- &batch{reader: image.SegmentReader{Reuse: true}}
	}
	return l
}

// begin lets the loader start. Called once, by the pump.
func (l *loader) begin() { close(l.start) }

// done gives a batch back.
func (l *loader) done(b *batch) { l.free <- b }

func (l *loader) run(ctx context.Context) error {
	select {
	case <-l.start:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	runs, err := l.runs()
	if err != nil {
		return err
	}
	per := uint64(l.c.Image.SegmentPages)
	for len(runs) > 0 {
		b, err := l.take(ctx)
		if err != nil {
			return err
		}
		b.segment, b.pages = nil, b.pages[:0]
		if runs[0].slot.Kind() == pagetable.Flash {
			n := runs[0].slot.Value() / per
			runs = b.cut(runs, pagetable.Make(pagetable.Flash, (n+1)*per))
			if b.segment, err = l.c.Image.Segment(&b.reader, uint32(n)); err != nil {
				return fmt.Errorf("page %s: %w", l.c.PageName(b.pages[0].block, b.pages[0].page), err)
			}
		} else {
			b.pages = append(b.pages, runs[0])
			runs = runs[1:]
		}
		select {
		case l.batches <- b:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	close(l.batches)
	return nil
}

// take waits for a free batch, and then a little for demands to be served,
// whose reads of the same device would otherwise queue behind this one.
func (l *loader) take(ctx context.Context) (*batch, error) {
	select {
	case b := <-l.free:
		for i := 0; i < 20 && l.busy(); i++ {
			time.Sleep(100 * time.Microsecond)
		}
		return b, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// runs lists the runs with content, sorted by where it lies.
func (l *loader) runs() ([]slotRun, error) {
	var runs []slotRun
	err := l.c.Table.Runs(func(r pagetable.Run) error {
		switch {
		case r.Kind == pagetable.Absent, r.Kind == pagetable.ZeroData, r.Kind == pagetable.Fill && r.First == 0:
			return nil
		}
		runs = append(runs, slotRun{r.Entry(0), r.Step, r.Block, r.Page, r.Count})
		return nil
	})
	sort.Slice(runs, func(i, j int) bool { return runs[i].slot < runs[j].slot })
	return runs, err
}

// cut moves what lies before end from runs to the batch and returns the rest,
// still sorted: the rest of a run that was cut in two starts at end, which is
// where the next segment's runs start too.
func (b *batch) cut(runs []slotRun, end pagetable.Entry) []slotRun {
	var rest []slotRun
	i := 0
	for ; i < len(runs) && runs[i].slot < end; i++ {
		r := runs[i]
		if n := uint64(end - r.slot); r.step == 1 && r.count > n {
			rest = append(rest, slotRun{end, 1, r.block, r.page + n, r.count - n})
			r.count = n
		}
		b.pages = append(b.pages, r)
	}
	// There are no more rests than runs taken, so they fit in their place.
	i -= len(rest)
	copy(runs[i:], rest)
	return runs[i:]
}
