package save

import (
	"cmp"
	"encoding/binary"
	"slices"

	"github.com/flic-migrate/flic-migrate/tier/digest"
	"github.com/flic-migrate/flic-migrate/tier/pagemap"
	"github.com/flic-migrate/flic-migrate/tier/source"
)

// later are pages that have little in common with what the parent has at their place.
// They wait until many have come, and are looked for elsewhere in the parent then: a
// file that was read again, a log's copy of a page, a page in which records have moved.
//
//	matcher ─► later ─┬─ the same digest ─► entry of the page that has it ─┐
//	                  └─ marks in common ─► pieces of that page ───────────┴─► placer
//
// Where a page has gone something else stands now, as a rule. So what is looked at are
// the parent's pages that were read for comparing: their marks cost no reading.
type later struct {
	items []item
	at    map[pageAt]int // in items; what has come again is gone from here
	gone  []int          // items that are, whose room is free
	slabs [][]byte       // that the items' pages are copied to
	bytes int            // of the items' pages and deltas
	most  int            // of these
	marks marks

	// What does not pay is not tried again.
	noMoved, noSimilar bool
}

// pageAt names a page.
type pageAt struct {
	block int
	page  uint64
}

const (
	// laterBytes is how much waits at most. The more there is, the more of what it
	// could resemble has been read, and memory is promised: 64 MiB and 32 B a page.
	laterBytes = 16 << 20
	slabBytes  = 256 << 10
	// pays is the share of the pages that were looked for, 1/pays, that must be found
	// for more to be looked for.
	pays = 32
)

// wants tells whether a page had better wait.
func (l *later) wants(it *item, pageSize int) bool {
	return !(l.noMoved && l.noSimilar) && it.fill < 0 && !it.hot &&
		(it.found == isNew || it.found == isChanged && len(it.delta) > pageSize/8)
}

// put copies an item.
func (l *later) put(it *item) {
	size := len(it.data)
	n := len(l.items)
	if last := len(l.gone) - 1; last >= 0 {
		n, l.gone = l.gone[last], l.gone[:last]
		l.bytes -= size + len(l.items[n].delta)
	} else {
		l.items = append(l.items, item{})
	}
	per := max(1, slabBytes/size)
	if n/per == len(l.slabs) {
		l.slabs = append(l.slabs, make([]byte, per*size))
	}
	room := l.slabs[n/per][n%per*size:][:size]
	copy(room, it.data)
	kept := &l.items[n]
	*kept = *it
	kept.data, kept.delta, kept.marks = room, slices.Clone(it.delta), nil
	l.bytes += size + len(it.delta)
	l.at[pageAt{it.block, it.page}] = n
}

// spare gives away slabs that nothing is in, for pages of so many bytes.
func (l *later) spare(pageSize int) (slabs [][]byte) {
	per := max(1, slabBytes/pageSize)
	n := (len(l.items) + per - 1) / per
	slabs = slices.Clone(l.slabs[n:])
	clear(l.slabs[n:])
	l.slabs = l.slabs[:n]
	return slabs
}

// full tells whether no more can wait.
func (l *later) full() bool { return l.bytes >= l.most }

// empty forgets all items.
func (l *later) empty() {
	l.items, l.gone, l.bytes = l.items[:0], l.gone[:0], 0
	clear(l.at)
}

// take is a page that waits, which does so no more; nil: it does not. It is valid until the
// next one waits.
func (l *later) take(block int, page uint64) *item {
	i, ok := l.at[pageAt{block, page}]
	if !ok {
		return nil
	}
	delete(l.at, pageAt{block, page})
	l.gone = append(l.gone, i)
	return &l.items[i]
}

// open are the pages that wait.
func (l *later) open() (items []*item) {
	for i := range l.items {
		if j, ok := l.at[pageAt{l.items[i].block, l.items[i].page}]; ok && i == j {
			items = append(items, &l.items[i])
		}
	}
	return items
}

// settleLater looks for the pages that wait, and places them.
func (m *matcher) settleLater() error {
	l := &m.later
	items := l.open()
	if len(items) == 0 {
		l.empty()
		return nil
	}
	if err := m.search(items, m.each); err != nil {
		return err
	}
	moved, similar := 0, 0
	for _, it := range items {
		switch {
		case it.moved:
			moved++
		case it.pieces:
			similar++
		}
	}
	l.noMoved = l.noMoved || moved*pays < len(items)
	l.noSimilar = l.noSimilar || similar*pays < len(items)-moved
	for _, it := range items {
		if err := m.next.matched(it); err != nil {
			return err
		}
	}
	l.empty()
	return nil
}

// search looks for those pages that have not been looked for. What is done for each each does,
// which may leave some out; they are looked for again.
func (m *matcher) search(items []*item, each func([]*item, func(r *parentReader, it *item)) error) error {
	l := &m.later
	items = slices.DeleteFunc(slices.Clone(items), func(it *item) bool { return it.searched })
	// What they are, and what they may resemble.
	err := each(items, func(r *parentReader, it *item) {
		if it.sum == (digest.Sum{}) {
			r.sums.Hasher.Put(&it.sum, it.data)
		}
		if !l.noSimilar {
			r.marks = appendMarks(r.marks[:0], it.data)
			it.base, it.resembles = l.marks.most(r.marks)
		}
	})
	if err != nil {
		return err
	}
	if !l.noMoved {
		m.par.findMoved(items)
	}
	// Each segment that bases are in is decoded once.
	slices.SortFunc(items, func(a, b *item) int { return compareLocations(a.base, b.base) })
	return each(items, func(r *parentReader, it *item) {
		if !l.noSimilar {
			r.compareSimilar(it)
		}
		it.searched = true
	})
}

// compareLocations orders places as they follow each other in images.
func compareLocations(a, b source.Location) int {
	return cmp.Or(cmp.Compare(a.Space, b.Space), cmp.Compare(a.Slot, b.Slot))
}

// inTask is how many items a worker has in hand at a time.
const inTask = 32

// each has the workers do something for each item.
func (m *matcher) each(items []*item, fn func(r *parentReader, it *item)) error {
	var done []chan error
	for some := range slices.Chunk(items, inTask) {
		t := task{func(r *parentReader) {
			for _, it := range some {
				fn(r, it)
			}
		}, make(chan error, 1)}
		m.work <- t
		done = append(done, t.done)
	}
	var first error
	for _, d := range done {
		if err := <-d; err != nil && first == nil {
			first = err
		}
	}
	return first
}

// findMoved looks in all of the parent for pages by their digests, and returns how many
// it has found. It reads digests only.
func (p *parent) findMoved(items []*item) (found int) {
	wanted := make(map[digest.Sum][]*item, len(items))
	for _, it := range items {
		wanted[it.sum] = append(wanted[it.sum], it)
	}
	sums := p.sums.One()
	err := p.c.PageMap.Runs(func(r pagemap.Run) error {
		for i := range r.Count {
			at, ok := p.set.Locate(r.Entry(i))
			if !ok {
				return nil // as all of the run
			}
			sum, err := sums.Sum(at)
			if err != nil {
				return err
			}
			list := wanted[sum]
			if list == nil {
				continue
			}
			e, ok := p.here(at)
			if !ok {
				continue
			}
			for _, it := range list {
				it.found, it.entry, it.cold, it.moved = isEqual, e, at.Tier != source.InNVRAM, true
				found++
			}
			delete(wanted, sum)
		}
		return nil
	})
	if err != nil {
		p.damaged(err)
	}
	return found
}

// compareSimilar makes pieces of a page that resembles another one, if that is shorter
// than what there is.
func (r *parentReader) compareSimilar(it *item) {
	if !it.resembles || it.found == isEqual {
		return
	}
	e, ok := r.here(it.base)
	if !ok {
		return
	}
	var sum digest.Sum
	base, err := r.content(it.base, it.block, it.page)
	if err == nil && it.base.Tier == source.OnDisk {
		sum, err = r.sums.Sum(it.base)
	}
	if err != nil {
		r.damaged(err)
		return
	}
	// A restore has to read the other page too, at another place than those around it.
	most := len(it.data) / 2
	if it.found == isChanged {
		most = min(most, len(it.delta)*3/4)
	}
	if d, ok := r.differ.Encode(nil, it.data, base, most); ok {
		it.found, it.entry, it.baseSum, it.delta, it.pieces = isChanged, e, sum, d, true
	}
}

// marks find a page that has stretches of bytes in common with one in hand, wherever in
// the pages they are. A mark is the hash of 32 bytes; which stretches of a page are
// marked is told by their first 8 bytes, so that the same ones are in any page.
type marks struct {
	table []uint64 // by a mark's upper bits: its lower 32 bits, and the number of a base plus 1
	bases []source.Location
}

const (
	markBytes = 32
	// markShift: of 128 stretches one is marked, 32 to a page of 4 KiB.
	markShift = 57
	// maxMarks are looked at in a page.
	maxMarks = 64
	markBits = 18
	// maxBases of 4 KiB are 256 MiB of pages that have changed.
	maxBases = 1 << 16
)

// appendMarks appends the marks of a page to dst. By far most stretches are not marked, so
// those that begin with one of eight bytes in a row are looked at together: no branch is
// taken but for a mark or where there are zeros.
func appendMarks(dst []uint64, page []byte) []uint64 {
	head, last := len(dst), uint64(0)
	i := 0
	for ; i+markBytes+7 <= len(page); i += 8 {
		b := (*[16]byte)(page[i:])
		v0, v8 := binary.LittleEndian.Uint64(b[0:]), binary.LittleEndian.Uint64(b[8:])
		if v0|v8 == 0 {
			continue
		}
		const limit = 1 << markShift
		if v0*markFactor < limit ||
			binary.LittleEndian.Uint64(b[1:9])*markFactor < limit ||
			binary.LittleEndian.Uint64(b[2:10])*markFactor < limit ||
			binary.LittleEndian.Uint64(b[3:11])*markFactor < limit ||
			binary.LittleEndian.Uint64(b[4:12])*markFactor < limit ||
			binary.LittleEndian.Uint64(b[5:13])*markFactor < limit ||
			binary.LittleEndian.Uint64(b[6:14])*markFactor < limit ||
			binary.LittleEndian.Uint64(b[7:15])*markFactor < limit {
			if dst, last = appendMarked(dst, page[i:i+markBytes+7], last, head+maxMarks); len(dst) == head+maxMarks {
				return dst
			}
		}
	}
	dst, _ = appendMarked(dst, page[i:], last, head+maxMarks)
	return dst
}

// markFactor spreads the first 8 bytes of a stretch over the upper bits of the product.
const markFactor = 0x9e3779b97f4a7c15

// appendMarked appends the marks of a part of a page to dst, up to a length of most. It takes
// the first bytes of the last stretch that was marked, and returns those of the last now.
func appendMarked(dst []uint64, part []byte, last uint64, most int) ([]uint64, uint64) {
	const f1, f2, f3, f4 = markFactor, 0xc2b2ae3d27d4eb4f, 0x165667b19e3779f9, 0xd6e8feb86659fd93
	for ; len(part) >= markBytes && len(dst) < most; part = part[1:] {
		b := (*[markBytes]byte)(part)
		v := binary.LittleEndian.Uint64(b[0:])
		if v*f1>>markShift != 0 || v == 0 || v == last {
			continue // and runs of one byte or word are in many pages
		}
		last = v
		h := v*f2 ^ binary.LittleEndian.Uint64(b[8:])*f3 ^ binary.LittleEndian.Uint64(b[16:])*f4
		h ^= h >> 29
		h = h*f1 ^ binary.LittleEndian.Uint64(b[24:])*f2
		h ^= h >> 32
		dst = append(dst, h*f3)
	}
	return dst, last
}

// add takes the marks of a page of the parent's.
func (m *marks) add(at source.Location, list []uint64) {
	if len(list) == 0 || len(m.bases) == maxBases {
		return
	}
	if m.table == nil {
		m.table = make([]uint64, 1<<markBits)
	}
	m.bases = append(m.bases, at)
	for _, h := range list {
		m.table[h>>(64-markBits)] = h<<32 | uint64(len(m.bases))
	}
}

// most is the page that has most marks in common with a list, if it is enough of them
// to be worth a look.
func (m *marks) most(list []uint64) (at source.Location, ok bool) {
	if m.table == nil || len(list) == 0 {
		return at, false
	}
	var seen [maxMarks]uint32
	n := 0
	for _, h := range list {
		if e := m.table[h>>(64-markBits)]; e>>32 == h&(1<<32-1) && uint32(e) != 0 {
			seen[n] = uint32(e)
			n++
		}
	}
	slices.Sort(seen[:n])
	best, count := uint32(0), 0
	for i := 0; i < n; {
		j := i
		for j < n && seen[j] == seen[i] {
			j++
		}
		if j-i > count {
			best, count = seen[i], j-i
		}
		i = j
	}
	if count*8 < len(list) || count == 0 {
		return at, false
	}
	return m.bases[best-1], true
}
