package save

import (
	"math/bits"

	"github.com/flic-migrate/flic-migrate/tier/pagemap"
)

// A page that was found outside of the checkpoint need not be stored, but a restore has to
// read it where it is. Where nothing else is read, that costs as much as a good deal that is
// read in one go, and the page had better be stored anew. docs/lab/disks.md says what it costs.
//
//	matcher ─► found elsewhere ─► budget ─┬─ enough beside it ──────► referred to ─┐
//	                                      └─ waits ─┬─ others come ─► referred to ─┼─► placer
//	                                                └─ none do ─────► stored anew ─┘
//
// What is read together is a cell: of a disk a stretch, of an image a segment. Cells with
// neighbouring numbers follow each other there. Whether others come near a page is known
// only when they have come, so it waits, with its bytes: nothing is read for it.
type budget struct {
	pageSize int
	// pages counts those that were found, by the hash of their cell. Where cells share a
	// counter something is referred to that had better be stored, and that is all.
	pages []uint8
	shift int
	// wait are the pages that wait, and some that do no more: a ring, which has those
	// numbered from first up to next.
	wait        []waiting
	first, next int
	room        [][]byte       // for pages that wait: what others have left
	by          map[uint64]int // by cell, the number of its last
	at          map[pageAt]int // numbers
	stored      int64          // pages that were stored anew
}

// spot is where the bytes of a page are, outside of the checkpoint.
type spot struct {
	// cell numbers what is read together: the upper bits say in which disk or image it
	// is, those below where there.
	cell uint64
	// enough is how many pages must be in the cell and those on both sides of it for that
	// to be worth reading, 1 or more.
	enough int
}

// waiting is a page that waits.
type waiting struct {
	item
	spot
	waits  bool
	before int // the number of the one before it of its cell; -1: there is none
}

// waitBytes is how much waits at most: what was read together from a disk lies together in
// the guest's memory too, by and large.
const waitBytes = 8 << 20

// newBudget is that of a save of so many pages.
func newBudget(pages uint64, pageSize int) *budget {
	n := bits.Len64(max(pages/4, 1<<12) - 1)
	return &budget{
		pageSize: pageSize, pages: make([]uint8, 1<<n), shift: 64 - n,
		by: make(map[uint64]int), at: make(map[pageAt]int),
	}
}

func (b *budget) counter(cell uint64) *uint8 { return &b.pages[cell*0x9e3779b97f4a7c15>>b.shift] }

// pays tells whether what is at a spot is worth reading.
func (b *budget) pays(s spot) bool {
	return int(*b.counter(s.cell - 1))+int(*b.counter(s.cell))+int(*b.counter(s.cell + 1)) >= s.enough
}

// put takes a page that was found at a spot. It calls fn for each page that is decided with
// it: this one, others that have waited, or none. A page that is to be stored anew is as one
// that was found nowhere. fn must not keep the item.
func (b *budget) put(it *item, s spot, fn func(it *item) error) error {
	n := b.counter(s.cell)
	*n = min(*n, 254) + 1
	if b.pays(s) {
		for cell := s.cell - 1; cell != s.cell+2; cell++ {
			if last, ok := b.by[cell]; ok {
				delete(b.by, cell)
				if err := b.release(last, fn); err != nil {
					return err
				}
			}
		}
		return fn(it)
	}
	if b.next-b.first == b.most() {
		if err := b.expire(fn); err != nil {
			return err
		}
	}
	if len(b.wait) < b.most() {
		b.wait = append(b.wait, waiting{})
	}
	w := b.number(b.next)
	var data []byte
	if n := len(b.room); n > 0 {
		data, b.room = b.room[n-1], b.room[:n-1]
	} else {
		data = make([]byte, b.pageSize)
	}
	copy(data, it.data)
	*w = waiting{item: *it, spot: s, waits: true, before: -1}
	w.data, w.marks = data, nil
	if last, ok := b.by[s.cell]; ok {
		w.before = last
	}
	b.by[s.cell], b.at[pageAt{it.block, it.page}] = b.next, b.next
	b.next++
	return nil
}

// most is how many pages wait at most.
func (b *budget) most() int { return max(1, waitBytes/b.pageSize) }

func (b *budget) number(n int) *waiting { return &b.wait[n%b.most()] }

// release refers to what waits in a cell, of which n is the last.
func (b *budget) release(n int, fn func(it *item) error) error {
	if n < b.first {
		return nil
	}
	w := b.number(n)
	if err := b.release(w.before, fn); err != nil || !w.waits {
		return err
	}
	b.done(w)
	return fn(&w.item)
}

// done says that a page waits no more. Its bytes are good until the next one waits.
func (b *budget) done(w *waiting) {
	w.waits = false
	b.room = append(b.room, w.data)
	delete(b.at, pageAt{w.block, w.page})
}

// expire decides about the page that has waited for longest.
func (b *budget) expire(fn func(it *item) error) error {
	w := b.number(b.first)
	if b.by[w.cell] == b.first {
		delete(b.by, w.cell)
	}
	b.first++
	if !w.waits {
		return nil
	}
	b.done(w)
	if !b.pays(w.spot) {
		b.forget(w.cell)
		b.stored++
		w.found, w.entry, w.cold, w.moved = isNew, pagemap.Entry(0), false, false
	}
	return fn(&w.item)
}

// forget takes a page out of a cell's count, which stays if it has become too high for that.
func (b *budget) forget(cell uint64) {
	if n := b.counter(cell); *n < 255 {
		*n--
	}
}

// flush decides about all that wait.
func (b *budget) flush(fn func(it *item) error) error {
	for b.first < b.next {
		if err := b.expire(fn); err != nil {
			return err
		}
	}
	return nil
}

// find is a page that waits; nil: it does not. It is valid until the next put.
func (b *budget) find(block int, page uint64) *item {
	n, ok := b.at[pageAt{block, page}]
	if !ok {
		return nil
	}
	return &b.number(n).item
}

// take is find for a page that has come again: it waits no more, and is not counted.
func (b *budget) take(block int, page uint64) *item {
	it := b.find(block, page)
	if it != nil {
		w := b.number(b.at[pageAt{block, page}])
		b.forget(w.cell)
		b.done(w)
	}
	return it
}
