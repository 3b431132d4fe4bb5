package restore

import (
	"context"
	"errors"
	"runtime"
	"sync/atomic"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/pagemap"
)

// prefetcher decompresses segments ahead of a replayer. The whole restore is
// known before it starts, so this is a plan carried out, not a guess:
//
//	planner ─┬─ accesses, in the replayer's order ──────────► replayer
//	         └─ those not in the cache ─► workers ─ ready ──►    │
//	   ▲                                                         │
//	   └───────────── buffers nobody needs any more ◄────────────┘
//
// A page that equals an earlier one lies in an earlier segment, so a segment
// can be needed again long after its turn. The planner keeps the segments it
// used last; what it had to drop is decompressed a second time.
type prefetcher struct {
	c        *checkpoint.Checkpoint
	workers  int
	accesses chan *access
	jobs     chan *access
	free     chan *access

	last      int64 // segment of the planner's last access; -1 before the first
	cache     map[uint32]*access
	clock     uint64
	planErr   error // what a replayer that wants more than was planned gets
	refetched int64
	seen      []bool
}

// access is a decoded segment, or one to be. It returns to free when neither
// the cache nor an outstanding access holds it.
type access struct {
	number  uint32
	ready   chan struct{} // closed by the worker
	segment *image.Segment
	err     error
	refs    atomic.Int32
	used    uint64 // the planner's clock at the last access
}

const (
	cacheBytes   = 8 << 20
	lookaheadMin = 16
)

func newPrefetcher(c *checkpoint.Checkpoint, workers int) *prefetcher {
	if workers <= 0 {
		workers = runtime.GOMAXPROCS(0)
	}
	segment := max(1, c.Image.SegmentPages*c.Image.PageSize)
	cached := min(max(4, cacheBytes/segment), c.Image.Segments())
	ahead := max(2*workers, lookaheadMin)
	p := &prefetcher{
		c: c, workers: workers, last: -1,
		accesses: make(chan *access, ahead), jobs: make(chan *access, ahead),
		free:  make(chan *access, cached+ahead+2),
		cache: make(map[uint32]*access), seen: make([]bool, c.Image.Segments()),
	}
	for range cap(p.free) {
		p.free <- new(access)
	}
	return p
}

// plan runs through the skeleton as the replayer will.
func (p *prefetcher) plan(ctx context.Context) error {
	defer close(p.accesses)
	defer close(p.jobs)
	err := p.c.Skeleton(&planner{p, ctx})
	if p.planErr = err; err == nil {
		p.planErr = errors.New("restore needs a segment that was not planned")
	}
	return err
}

// planner is the prefetcher's skeleton.Player.
type planner struct {
	*prefetcher
	ctx context.Context
}

func (p *planner) Literal([]byte) error { return nil }

func (p *planner) Pages(block int, page, count uint64, _ bool) error {
	for count > 0 {
		run, err := p.c.PageMap.Find(block, page)
		if err != nil {
			return err
		}
		run.Count = min(run.Count, count)
		page += run.Count
		count -= run.Count
		if run.Kind != pagemap.Flash {
			continue
		}
		per := uint64(p.c.Image.SegmentPages)
		for n := run.First / per; n <= run.Entry(run.Count-1).Value()/per; n++ {
			if err := p.access(p.ctx, uint32(n)); err != nil {
				return err
			}
		}
	}
	return nil
}

// access plans the next use of segment n.
func (p *prefetcher) access(ctx context.Context, n uint32) error {
	if p.last == int64(n) {
		return nil
	}
	p.last = int64(n)
	p.clock++
	a := p.cache[n]
	if a == nil {
		if p.seen[n] {
			p.refetched++
		}
		p.seen[n] = true
		var err error
		if a, err = p.take(ctx); err != nil {
			return err
		}
		a.number, a.ready, a.err = n, make(chan struct{}), nil
		a.refs.Store(1) // the cache's
		p.cache[n] = a
		select {
		case p.jobs <- a:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	a.used = p.clock
	a.refs.Add(1)
	select {
	case p.accesses <- a:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// take returns a free access, if need be by dropping the cached segment that
// was not used for longest.
func (p *prefetcher) take(ctx context.Context) (*access, error) {
	for {
		select {
		case a := <-p.free:
			return a, nil
		default:
		}
		var oldest *access
		for _, a := range p.cache {
			if oldest == nil || a.used < oldest.used {
				oldest = a
			}
		}
		if oldest == nil {
			break
		}
		delete(p.cache, oldest.number)
		p.release(oldest)
	}
	select {
	case a := <-p.free:
		return a, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func (p *prefetcher) release(a *access) {
	if a.refs.Add(-1) == 0 {
		p.free <- a // never blocks: it has room for all there are
	}
}

// work decompresses planned segments.
func (p *prefetcher) work(ctx context.Context) error {
	var reader image.SegmentReader
	for a := range p.jobs {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		reader.Recycle(a.segment) // what the access was for before
		a.segment, a.err = p.c.Image.Segment(&reader, a.number)
		close(a.ready)
	}
	return nil
}

// next gives the replayer its next segment and takes the one before back.
func (p *prefetcher) next(ctx context.Context, before *access) (*access, error) {
	if before != nil {
		p.release(before)
	}
	select {
	case a, ok := <-p.accesses:
		if !ok {
			return nil, p.planErr
		}
		select {
		case <-a.ready:
			return a, a.err
		case <-ctx.Done():
		}
	case <-ctx.Done():
	}
	return nil, context.Cause(ctx)
}
