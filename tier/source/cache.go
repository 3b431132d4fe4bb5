package source

import (
	"context"
	"sync"

	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/rescue"
)

// Segments are what a Cache keeps. Both methods may be called from several goroutines.
type Segments interface {
	// Fetch reads what n names as it is stored, and checks it.
	Fetch(st *image.Stored, n Need) error
	// CheckSegment checks, by its digest or by those of its pages, a PAGES segment of a
	// reference that has been decoded. All that a restore decodes ahead is checked
	// ahead, too: beside the goroutine that writes the stream, and once.
	CheckSegment(n Need, st *image.Stored, s *image.Segment) error
}

// Cache keeps decoded segments. All who read one checkpoint can share it: who wants
// to have one decoded reserves it, one of those who did fills it, all wait for that,
// and release it when they are done with its bytes. What nobody holds stays until its
// memory is needed for another; that of the one not used for longest goes first.
type Cache struct {
	from  Segments
	max   int
	freed chan struct{} // has an element if somebody who waits for room may look again

	mu       sync.Mutex
	held     map[Need]*Held
	idle     []*Held // hold nothing but memory
	made     int
	clock    uint64
	seen     map[Need]struct{} // decoded before; nil: not counted
	refilled int64
}

// Held is a decoded segment, or one to be.
type Held struct {
	Need Need

	ready   chan struct{} // closed by Fill
	segment *image.Segment
	err     error
	filled  bool // under the Cache's lock, as all that follows
	refs    int
	used    uint64 // the clock at the last Reserve
}

// NewCache returns a cache of at most max segments, 1 or more: those that are held
// and those that are kept. A holder of several must be sure that so many fit beside
// those of all others.
func NewCache(from Segments, max int) *Cache {
	return &Cache{from: from, max: max, freed: make(chan struct{}, 1), held: make(map[Need]*Held)}
}

// CountRefills has the cache count what is decoded again.
func (c *Cache) CountRefills() { c.seen = make(map[Need]struct{}) }

// Filled is how many different segments were decoded, since CountRefills.
func (c *Cache) Filled() int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return int64(len(c.seen))
}

// Refilled is how many segments were decoded again, since CountRefills.
func (c *Cache) Refilled() int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.refilled
}

// Reserve holds n. With fill it is the caller who must see to it that Fill is called.
// It waits for room if all are held.
func (c *Cache) Reserve(ctx context.Context, n Need) (h *Held, fill bool, err error) {
	for {
		if h, fill := c.reserve(n); h != nil {
			return h, fill, nil
		}
		select {
		case <-c.freed:
		case <-ctx.Done():
			return nil, false, context.Cause(ctx)
		}
	}
}

// reserve is Reserve without waiting: nil if there is no room.
func (c *Cache) reserve(n Need) (h *Held, fill bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.clock++
	if h = c.held[n]; h != nil {
		h.refs++
		h.used = c.clock
		return h, false
	}
	switch {
	case len(c.idle) > 0:
		h = c.idle[len(c.idle)-1]
		c.idle = c.idle[:len(c.idle)-1]
	case c.made < c.max:
		h = new(Held)
		c.made++
	default:
		if h = c.oldest(); h == nil {
			return nil, false
		}
		delete(c.held, h.Need)
		// Others may wait for room as well, and there may be more of it.
		defer c.wake()
	}
	h.Need, h.ready, h.err, h.filled, h.refs, h.used = n, make(chan struct{}), nil, false, 1, c.clock
	c.held[n] = h
	if c.seen != nil {
		if _, ok := c.seen[n]; ok {
			c.refilled++
		}
		c.seen[n] = struct{}{}
	}
	return h, true
}

// oldest is what has not been used for longest of all that nobody holds.
func (c *Cache) oldest() (h *Held) {
	for _, o := range c.held {
		if o.refs == 0 && o.filled && (h == nil || o.used < h.used) {
			h = o
		}
	}
	return h
}

func (c *Cache) wake() {
	select {
	case c.freed <- struct{}{}:
	default:
	}
}

// Have holds n if it is decoded already, and is nil otherwise.
func (c *Cache) Have(n Need) *Held {
	c.mu.Lock()
	defer c.mu.Unlock()
	h := c.held[n]
	if h == nil || !h.filled || h.err != nil {
		return nil
	}
	c.clock++
	h.refs++
	h.used = c.clock
	return h
}

// Fill fetches and decodes what was reserved, with the caller's buffers.
func (c *Cache) Fill(h *Held, sr *image.SegmentReader) {
	sr.Recycle(h.segment)
	h.segment = nil
	// Whatever becomes of it, others may wait for it: a panic is an error to them too.
	err := rescue.Call(func() (err error) {
		if err = c.from.Fetch(&sr.Stored, h.Need); err != nil {
			return err
		}
		if h.segment, err = sr.Decode(&sr.Stored); err != nil {
			return err
		}
		if h.Need.Space > 0 && h.segment.Kind == image.Pages {
			err = c.from.CheckSegment(h.Need, &sr.Stored, h.segment)
		}
		return err
	})
	c.mu.Lock()
	h.err, h.filled = err, true
	if h.refs == 0 {
		c.unused(h)
	}
	c.mu.Unlock()
	close(h.ready)
}

// Get reserves n, fills it if nobody else does, and waits for it.
func (c *Cache) Get(ctx context.Context, n Need, sr *image.SegmentReader) (*Held, error) {
	h, fill, err := c.Reserve(ctx, n)
	if err != nil {
		return nil, err
	}
	if fill {
		c.Fill(h, sr)
	}
	if _, err := h.Wait(ctx); err != nil {
		c.Release(h)
		return nil, err
	}
	return h, nil
}

// Wait waits for Fill. The segment is valid until the caller's Release.
func (h *Held) Wait(ctx context.Context) (*image.Segment, error) {
	select {
	case <-h.ready:
		return h.segment, h.err
	default:
	}
	select {
	case <-h.ready:
		return h.segment, h.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// Release gives up what one Reserve, Have or Get held.
func (c *Cache) Release(h *Held) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if h.refs--; h.refs == 0 && h.filled {
		c.unused(h)
	}
}

// unused is told of what nobody holds any more. What could not be decoded is
// forgotten, so that the next who wants it tries again.
func (c *Cache) unused(h *Held) {
	if h.err != nil {
		delete(c.held, h.Need)
		c.idle = append(c.idle, h)
	}
	c.wake()
}
