package save

import (
	"cmp"
	"context"
	"runtime"
	"slices"

	"github.com/flic-migrate/flic-migrate/tier/pagemap"
	"github.com/flic-migrate/flic-migrate/tier/rescue"
	"github.com/flic-migrate/flic-migrate/tier/source"
)

// While a save is held the guest runs, and there is time for what would be done for the pages
// that are still to come when it stands still. Those that have changed lately are likely to
// change again: what they are compared with is read, decoded and marked now, and kept. And what
// pages resemble that wait already is looked for now; if they come again that was for nothing.
//
//	while the guest runs                                    when it stands still
//	changed in pass 1, or by the parent ─► kept, marks ───► compare, compareSimilar
//	pages that wait ─────────────────────► pieces ────────► settleLater
//
// It is done by one worker, so that the guest has the other CPUs, in pieces of some pages, after
// each of which it can be told to end.

// A save that is held has less for other things in turn for what is kept of what pages are
// compared with, because 64 MiB and 32 B a page are promised.
const (
	heldBaseBytes = 2 << 20 // for baseBytes
	// heldBytes is for what is kept and for the pages that wait, and minLaterBytes for those
	// at the least.
	heldBytes     = 18 << 20
	minLaterBytes = 8 << 20
)

// prepareWhile prepares as long as wait waits.
func (s *saver) prepareWhile(wait func() error) error {
	if s.match == nil {
		return wait()
	}
	ctx, cancel := context.WithCancel(s.ctx)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- rescue.Call(func() error { return s.match.prepare(ctx) }) }()
	err := wait()
	cancel()
	return cmp.Or(<-done, err)
}

// prepare does what can be done before the pages come that a save is held before. It ends early
// with ctx, which is no error. Nothing is in flight, nor is anything else done with the matcher
// meanwhile.
func (m *matcher) prepare(ctx context.Context) error {
	if m.par == nil {
		return nil
	}
	if err := m.keep(ctx); err != nil {
		return err
	}
	err := m.search(m.later.open(), func(items []*item, fn func(r *parentReader, it *item)) error {
		return alone(ctx, m.work, items, fn)
	})
	if err == nil && ctx.Err() == nil {
		// There will be garbage again, but not before the pages have come.
		runtime.GC()
	}
	return err
}

// keep keeps what pages will be compared with, and takes its marks.
func (m *matcher) keep(ctx context.Context) error {
	l, p := &m.later, m.par
	p.kept = make(map[source.Location][]byte)
	slabs := l.spare(m.next.pageSize)
	room := (heldBytes - max(l.bytes, minLaterBytes)) / m.next.pageSize
	// Of those that pages of pass 1 were compared with the marks are known.
	marked := make(map[source.Location]bool)
	for _, at := range l.marks.bases {
		marked[at] = true
	}
	var list []source.Location
	seen := make(map[source.Location]bool)
	for _, at := range append(slices.Clone(l.marks.bases), p.changed(room)...) {
		// In NVRAM, and on disks, nothing is to be decoded.
		if at.Tier == source.OnFlash && !seen[at] && len(list) < room {
			seen[at] = true
			list = append(list, at)
		}
	}
	l.most = heldBytes - len(list)*m.next.pageSize
	// Each segment that they are in is decoded once.
	slices.SortFunc(list, compareLocations)
	var slab []byte // what is left of the one in use
	return alone(ctx, m.work, list, func(r *parentReader, at source.Location) {
		page, err := r.content(at, 0, 0)
		if err != nil {
			r.damaged(err)
			return
		}
		if len(slab) == 0 {
			if n := len(slabs); n > 0 {
				slab, slabs = slabs[n-1], slabs[:n-1]
			} else {
				slab = make([]byte, max(1, slabBytes/len(page))*len(page))
			}
		}
		p.kept[at], slab = slab[:len(page):len(page)], slab[len(page):]
		copy(p.kept[at], page)
		if !l.noSimilar && !marked[at] {
			r.marks = appendMarks(r.marks[:0], page)
			l.marks.add(at, r.marks)
		}
	})
}

// changed are the places of what pages are compared with that have changed in the parent or
// in those before it, the latest first: a few times most at most.
func (p *parent) changed(most int) (list []source.Location) {
	if len(p.set.Spaces) == 1 {
		return nil // all of it is its own, whether it changed or not
	}
	by := make([][]source.Location, len(p.set.Spaces))
	err := p.c.PageMap.Runs(func(r pagemap.Run) error {
		at, ok := p.set.Locate(r.Entry(0))
		for i := uint64(0); ok && i < r.Count; i++ {
			base := source.Location{Space: at.Space, Slot: at.Slot + i*r.Step, Tier: at.Tier}
			switch {
			case at.Tier == source.AsDelta:
				if base, ok = p.base(base); !ok {
					return nil
				}
			case at.Space > 0 || at.Tier != source.OnFlash:
				return nil // as all of the run
			}
			if _, ok := p.here(base); ok && len(by[at.Space]) < most {
				by[at.Space] = append(by[at.Space], base)
			}
		}
		return nil
	})
	if err != nil {
		p.damaged(err)
	}
	return slices.Concat(by...)
}

// alone has one worker after the other do something for each item, so that never two do it at
// the same time. It ends early with ctx, which is no error.
func alone[T any](ctx context.Context, work chan<- task, items []T, fn func(r *parentReader, it T)) error {
	done := make(chan error, 1)
	for some := range slices.Chunk(items, inTask) {
		if ctx.Err() != nil {
			return nil
		}
		work <- task{func(r *parentReader) {
			for _, it := range some {
				fn(r, it)
			}
		}, done}
		if err := <-done; err != nil {
			return err
		}
	}
	return nil
}
