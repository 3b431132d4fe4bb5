package restore

import (
	"context"
	"errors"
	"runtime"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/rescue"
	"github.com/flic-migrate/flic-migrate/tier/source"
)

// prefetcher decompresses segments ahead of a replayer. The whole restore is
// known before it starts, so this is a plan carried out, not a guess:
//
//	planner ─┬─ what is needed, in the replayer's order ──────► replayer
//	         └─ what of it is not in the cache ─► workers ──►      │
//	   ▲                                                           │
//	   └──────────── segments nobody needs any more ◄──────────────┘
//
// A page that equals an earlier one lies in an earlier segment, so a segment
// can be needed again long after its turn. The cache keeps the segments that were
// used last; what it had to drop is decompressed a second time.
type prefetcher struct {
	c       *checkpoint.Checkpoint
	set     *source.Set
	cache   *source.Cache
	workers int
	wanted  chan *source.Held
	jobs    chan *source.Held
	planned source.Planned
	planErr error         // what a replayer that wants more than was planned gets
	ahead   chan struct{} // segments of disk slots that were asked for ahead
}

const (
	// cacheBytes have room for more than two segments of 128 KiB in each of the 48 images
	// that a save refers to at most. With half of it a sixth increment of a SQLite guest
	// decoded 158 of 1640 segments a second time, and 108 with this; a full checkpoint, 114
	// and 103.
	cacheBytes   = 16 << 20
	lookaheadMin = 16
)

func newPrefetcher(c *checkpoint.Checkpoint, set *source.Set, workers int) *prefetcher {
	if workers <= 0 {
		workers = runtime.GOMAXPROCS(0)
	}
	cached := set.InOrder(cacheBytes)
	ahead := max(2*workers, lookaheadMin)
	p := &prefetcher{
		c: c, set: set, workers: workers, cache: c.NewCache(cached + ahead + 2*source.MaxNeeds),
		wanted: make(chan *source.Held, ahead), jobs: make(chan *source.Held, ahead),
		ahead: make(chan struct{}, aheadMost),
	}
	p.cache.CountRefills()
	return p
}

// plan runs through the skeleton as the replayer will.
func (p *prefetcher) plan(ctx context.Context) error {
	defer close(p.wanted)
	defer close(p.jobs)
	want := func(n source.Need) error { return p.want(ctx, n) }
	// A panic, too, is what the replayer is told.
	err := rescue.Call(func() error {
		return p.c.Skeleton(&walk{prefetcher: p, each: func(needs []source.Need) error { return p.planned.Next(needs, want) }})
	})
	if p.planErr = err; err == nil {
		p.planErr = errors.New("restore needs a segment that was not planned")
	}
	return err
}

// walk is a skeleton.Player that finds out what the replayer will need: each is called for
// each stretch of pages, with what has to be read for it.
type walk struct {
	*prefetcher
	each func(needs []source.Need) error
	room [source.MaxNeeds]source.Need
}

func (w *walk) Literal([]byte) error { return nil }

func (w *walk) Pages(block int, page, count uint64, _ bool) error {
	for count > 0 {
		run, err := w.c.PageMap.Find(block, page)
		if err != nil {
			return err
		}
		run.Count = min(run.Count, count)
		page += run.Count
		count -= run.Count
		for run.Count > 0 {
			needs, n := w.set.Stretch(run, w.room[:])
			if err := w.each(needs); err != nil {
				return err
			}
			run = run.From(n)
		}
	}
	return nil
}

// want plans the next use of a segment.
func (p *prefetcher) want(ctx context.Context, n source.Need) error {
	h, fill, err := p.cache.Reserve(ctx, n)
	if err != nil {
		return err
	}
	if fill {
		select {
		case p.jobs <- h:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	select {
	case p.wanted <- h:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// work decompresses planned segments.
func (p *prefetcher) work(ctx context.Context) error {
	var reader image.SegmentReader
	for h := range p.jobs {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		n := h.Need // who waits for it may be done with it at once
		p.cache.Fill(h, &reader)
		p.arrived(n)
	}
	return nil
}

// next gives the replayer's Reader what it needs next.
func (p *prefetcher) next(ctx context.Context, _ source.Need) (*source.Held, error) {
	select {
	case h, ok := <-p.wanted:
		if !ok {
			return nil, p.planErr
		}
		return h, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}
