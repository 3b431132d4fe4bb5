package save

import (
	"bytes"
	"context"
	"runtime"
	"sync"

	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/tier/delta"
	"github.com/flic-migrate/flic-migrate/tier/digest"
	"github.com/flic-migrate/flic-migrate/tier/pagemap"
	"github.com/flic-migrate/flic-migrate/tier/rescue"
	"github.com/flic-migrate/flic-migrate/tier/source"
)

// matcher is the stage before the placer if there is anything that pages can be in already. It
// compares pages with what the parent has at their place, looks for them on disks and in
// other images of the store, and hands them on in their order:
//
//	parser ─► digest ─┬─ as it was, or on a disk ───────────────────────────┐
//	                  └─ else ─► batch ─┬─► worker: delta ─┐    ┌─► later ─┐ ├─► placer
//	                                    │                  │    ├──────────┼─┤
//	                                    └─► flight ────────┴────┘  budget ◄┴─┘
//
// The digest of a page tells whether it is as it was, or on a disk, and then nothing is
// read, and the page is not even copied: by far most pages of an increment, which on their
// way to another CPU would take longer than their digest does. Only of others the parent's
// bytes are read, for the delta, many at a time on all CPUs. A page that has come is
// known to have come at once, and stands for nothing until it is placed.
type matcher struct {
	next   *placer
	par    *parent
	known  *parentReader // of the goroutine that calls put
	item   item          // that put has in hand
	beside bool          // there is something for workers to do
	batch  *batch        // that fills; nil: none
	flight []*batch      // with the workers, in order
	free   []*batch
	most   int // batches in flight
	later  later
	budget *budget
	enough int       // pages near each other on a disk
	work   chan task // nil: the workers have been told to end
	alive  sync.WaitGroup
}

// batchBytes is the size of the pages of a batch: large against the cost of handing it
// on, and small enough for a CPU's cache.
const batchBytes = 256 << 10

// batch is some page records that came one after the other.
type batch struct {
	items  []item
	data   []byte // of items, page after page
	deltas []byte // of items
	marks  []uint64
	marked bool // marks are wanted
	done   chan error
}

// task is something for a worker to do.
type task struct {
	run  func(r *parentReader)
	done chan error
}

// item is a page record, and what a worker has found out about it.
type item struct {
	block int
	page  uint64
	fill  int    // the byte of a ZERO record; -1: there is content
	data  []byte // of the page
	hot   bool

	found finding
	// entry is where an equal page is, and what a delta is against.
	entry  pagemap.Entry
	cold   bool // what entry names is on flash
	delta  []byte
	pieces bool       // that is what delta is
	moved  bool       // entry is that of another page of the parent's
	sum    digest.Sum // of the page, unless it is new
	// base is the page of the parent's that marks are of, and later the one that the
	// page resembles, if it does.
	base      source.Location
	marks     []uint64
	resembles bool
	searched  bool // it has been looked for elsewhere in the parent
	// spotAt is where it is in another image that is not the parent's.
	spotAt spot
	// baseSum is the digest of what a delta is against, if that is on a disk.
	baseSum digest.Sum
}

// finding is what the parent has to do with a page.
type finding uint8

const (
	isNew     finding = iota // nothing
	isZero                   // nothing, nor has any other: it is all zeros
	isEqual                  // it has the same page
	isChanged                // it has one that makes a delta pay
	isOnDisk                 // nothing, but a disk has the same page
	isShared                 // nothing, but another image has the same page
)

// newMatcher starts workers, which end with stop. Pages that are on disks are referred to where
// enough of them are near each other.
func newMatcher(ctx context.Context, next *placer, par *parent, workers, enough int) *matcher {
	m := &matcher{next: next, par: par, enough: enough, most: 2*workers + 1, work: make(chan task, 2*workers+1)}
	m.known = &parentReader{parent: par, ctx: ctx, disks: next.to.disks} // it reads digests only
	if par != nil {
		m.known.sums = par.sums.One()
	}
	m.beside = par != nil || next.to.shared != nil || next.to.peers != nil
	if !m.beside {
		workers = 0
	}
	m.later.at, m.later.most = make(map[pageAt]int), laterBytes
	pages := uint64(0)
	for b := range next.to.pages.Blocks() {
		pages += next.to.pages.Pages(b)
	}
	m.budget = newBudget(pages, next.pageSize)
	m.later.noMoved, m.later.noSimilar = par == nil, par == nil
	for range workers {
		r, work := par.reader(ctx), m.work
		r.shared = next.to.shared
		if next.to.peers != nil {
			r.hash = next.to.hash
		}
		m.alive.Go(func() { r.work(work) })
	}
	return m
}

// workers is how many goroutines do what can be done beside one another.
func (o *Options) workers() int {
	if o.Workers > 0 {
		return o.Workers
	}
	return runtime.GOMAXPROCS(0)
}

// stop ends the workers. What is in flight is lost.
func (m *matcher) stop() {
	if m.work == nil {
		return
	}
	close(m.work)
	m.work = nil
	m.alive.Wait()
}

// has tells whether a page has come.
func (m *matcher) has(block int, page uint64) bool { return m.next.has(block, page) }

// read copies what a page holds so far into dst.
func (m *matcher) read(dst []byte, block int, page uint64) error {
	if err := m.drain(); err != nil {
		return err
	}
	if i, ok := m.later.at[pageAt{block, page}]; ok {
		copy(dst, m.later.items[i].data)
		return nil
	}
	if it := m.budget.find(block, page); it != nil {
		copy(dst, it.data)
		return nil
	}
	return m.next.read(dst, block, page)
}

// put takes a page record.
func (m *matcher) put(rec *ramparse.Record) error {
	m.item = item{block: rec.Block, page: rec.Page, fill: -1}
	it, again := &m.item, m.has(rec.Block, rec.Page)
	switch rec.Kind {
	case ramparse.Zero:
		if !again {
			return m.next.put(rec) // nothing that is in a batch is before it
		}
		it.fill = int(rec.Fill)
	case ramparse.Page:
		it.data = rec.Data
	case ramparse.XBZRLE:
		err := m.settle(rec)
		if err == nil {
			it.data, err = m.next.changed(rec)
		}
		if err != nil {
			return err
		}
	default:
		// A page that QEMU compressed is to be given back as it was, which the
		// parent's might not be.
		if err := m.settle(rec); err != nil {
			return err
		}
		return m.next.put(rec)
	}
	if !again {
		m.next.to.pages.Set(rec.Block, rec.Page, pagemap.Make(pagemap.Fill, 0))
	}
	if it.fill < 0 {
		it.hot = m.next.to.hot.has(rec.Block, rec.Page)
		m.known.byDigest(it)
	}
	// One that comes again must not overtake itself.
	if !m.beside || !again && it.found != isNew {
		return m.hand(it, again)
	}
	if m.batch == nil {
		m.batch = m.newBatch()
	}
	b := m.batch
	if it.fill < 0 {
		at := len(b.data)
		b.data = append(b.data, it.data...)
		it.data = b.data[at:len(b.data):len(b.data)]
	}
	b.items = append(b.items, *it)
	if len(b.data)+m.next.pageSize > cap(b.data) || len(b.items) == cap(b.items) {
		return m.submit()
	}
	return nil
}

// settle sees to it that the page of a record is placed, if it has come.
func (m *matcher) settle(rec *ramparse.Record) error {
	for _, b := range append(m.flight, m.batch) {
		if b == nil {
			continue
		}
		for i := range b.items {
			if it := &b.items[i]; it.page == rec.Page && it.block == rec.Block {
				if err := m.drain(); err != nil {
					return err
				}
			}
		}
	}
	it := m.later.take(rec.Block, rec.Page)
	if it == nil {
		it = m.budget.take(rec.Block, rec.Page)
	}
	if it == nil {
		return nil
	}
	return m.next.matched(it)
}

func (m *matcher) newBatch() *batch {
	if n := len(m.free); n > 0 {
		b := m.free[n-1]
		m.free = m.free[:n-1]
		b.items, b.data, b.deltas, b.marks = b.items[:0], b.data[:0], b.deltas[:0], b.marks[:0]
		return b
	}
	pages := max(4, batchBytes/m.next.pageSize)
	return &batch{items: make([]item, 0, 2*pages), data: make([]byte, 0, pages*m.next.pageSize), done: make(chan error, 1)}
}

// submit hands the open batch to the workers, and places what is done.
func (m *matcher) submit() error {
	b := m.batch
	m.batch, b.marked = nil, !m.later.noSimilar
	m.work <- task{b.compare, b.done}
	m.flight = append(m.flight, b)
	for len(m.flight) == m.most {
		if err := m.place(); err != nil {
			return err
		}
	}
	return nil
}

// drain places all that has come, but for what waits for others to come.
func (m *matcher) drain() error {
	if m.batch != nil {
		if err := m.submit(); err != nil {
			return err
		}
	}
	for len(m.flight) > 0 {
		if err := m.place(); err != nil {
			return err
		}
	}
	return nil
}

// flush places all that has come, and hands on whatever is still open. Nothing comes
// after it.
func (m *matcher) flush() error {
	err := m.drain()
	if err == nil {
		err = m.settleLater()
	}
	if err == nil {
		err = m.budget.flush(m.next.matched)
	}
	m.stop()
	if err != nil {
		return err
	}
	return m.next.flush()
}

// place waits for the oldest batch in flight and hands its pages on.
func (m *matcher) place() error {
	b := m.flight[0]
	m.flight = append(m.flight[:0], m.flight[1:]...)
	if err := <-b.done; err != nil {
		return err
	}
	for i := range b.items {
		if err := m.hand(&b.items[i], true); err != nil {
			return err
		}
	}
	m.free = append(m.free, b)
	if m.later.full() {
		return m.settleLater()
	}
	return nil
}

// hand hands a page on of which all is known; again, if it may have come before. It keeps
// nothing of the item.
func (m *matcher) hand(it *item, again bool) error {
	m.later.marks.add(it.base, it.marks)
	if again {
		// What it was before is nothing now.
		m.later.take(it.block, it.page)
		m.budget.take(it.block, it.page)
	}
	if at, ok := m.spot(it); ok {
		return m.budget.put(it, at, m.next.matched)
	}
	if m.later.wants(it, m.next.pageSize) {
		m.later.put(it)
		return nil
	}
	return m.next.matched(it)
}

// work is a worker.
func (r *parentReader) work(tasks <-chan task) {
	defer r.close()
	for t := range tasks {
		// A panic ends the save; the stage waits for each task.
		t.done <- rescue.Call(func() error { t.run(r); return nil })
	}
}

// compare finds out what can be done with the pages of a batch that are not known by their
// digest.
func (b *batch) compare(r *parentReader) {
	for i := range b.items {
		if it := &b.items[i]; it.fill < 0 && it.found == isNew {
			r.compare(it, b)
			r.shared.lookUp(it, &r.last)
			if r.hash != nil && it.found == isNew && it.sum == (digest.Sum{}) {
				r.hash.Put(&it.sum, it.data)
			}
		}
	}
}

// byDigest finds out whether a page is zero, what the parent has at its place, or on a disk.
func (r *parentReader) byDigest(it *item) {
	it.found, it.sum = isNew, digest.Sum{}
	if it.data[0] == 0 && bytes.Equal(it.data[1:], it.data[:len(it.data)-1]) {
		it.found = isZero
		return
	}
	if at, ok := r.find(it.block, it.page); ok {
		want, err := r.sums.Sum(at)
		if err != nil {
			r.damaged(err)
		} else if r.sums.Hasher.Put(&it.sum, it.data); it.sum == want {
			if it.entry, ok = r.here(at); ok {
				it.found, it.cold = isEqual, at.Tier != source.InNVRAM || r.c.Moved(at)
				return
			}
		}
	}
	r.disks.lookUp(it, &r.near)
}

// compare makes a delta of a page of a batch against what the parent has at its place.
func (r *parentReader) compare(it *item, b *batch) {
	if it.hot {
		return // what the guest waits for has no base to wait for
	}
	if it.sum == (digest.Sum{}) {
		return // what the parent has there can't be known, or nothing is there
	}
	at, ok := r.find(it.block, it.page)
	if !ok {
		return
	}
	if at.Tier == source.AsDelta {
		if at, ok = r.base(at); !ok {
			return
		}
	}
	if it.entry, ok = r.here(at); !ok {
		return
	}
	base, err := r.content(at, it.block, it.page)
	if err == nil && at.Tier == source.OnDisk {
		it.baseSum, err = r.sums.Sum(at)
	}
	if err != nil {
		r.damaged(err)
		return
	}
	if _, known := r.kept[at]; b.marked && !known {
		head := len(b.marks)
		b.marks = appendMarks(b.marks, base)
		it.base, it.marks = at, b.marks[head:len(b.marks):len(b.marks)]
	}
	head := len(b.deltas)
	if b.deltas, ok = delta.Encode(b.deltas, it.data, base); ok {
		it.found, it.delta = isChanged, b.deltas[head:len(b.deltas):len(b.deltas)]
	}
}
