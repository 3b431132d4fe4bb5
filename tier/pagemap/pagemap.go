// Package pagemap keeps, for every guest page of a checkpoint, where its
// content comes from.
//
// In memory the table is one Entry (8 B) a page, in leaves that are allocated
// when a page in them is first set: what a stream merely claims to hold takes
// no memory. On disk it is runs: neighbouring pages have neighbouring slots,
// so a run of any length takes a few bytes.
//
// A page whose content equals another page's (FLIC Alg. III.1, the redundant
// vector) has the same slot as that page. The vector is resolved while saving,
// so that a reader, a lazy one above all, never follows a chain.
package pagemap

import "fmt"

// Kind is the kind of source a page's content has. Numbers are part of the
// format; a reader that does not know a kind refuses the page, not the image.
type Kind uint8

// The kinds and what an Entry's value means for each.
const (
	// Absent pages were never in the stream; a destination that never
	// received them reads zero.
	Absent Kind = 0
	// Fill pages were ZERO records; the value is their fill byte.
	Fill Kind = 1
	// ZeroData pages were PAGE records of nothing but zero bytes.
	ZeroData Kind = 2
	// NVRAM pages are in the NVRAM part; the value is their slot there.
	NVRAM Kind = 3
	// Flash pages are in this image's segments; the value is
	// segment number × SegmentPages + position.
	Flash Kind = 4
	// Delta pages are stored as a difference against the parent checkpoint's
	// page; the value is an index into the image's delta objects.
	Delta Kind = 5
	// Disk pages equal a block of a disk image; value: disk index in bits
	// 40–55, block number (in units of the page size) in bits 0–39.
	Disk Kind = 6
	// Store pages are pages of another checkpoint in the store; value:
	// checkpoint index in bits 40–55, its flash slot in bits 0–39.
	Store Kind = 7

	numKinds = 8
)

func (k Kind) String() string {
	names := [numKinds]string{"absent", "fill", "zero data", "nvram", "flash", "delta", "disk", "store"}
	if k < numKinds {
		return names[k]
	}
	return fmt.Sprintf("source kind %d", uint8(k))
}

// hasSlots tells whether a kind's values count up with the pages in a typical
// run.
func (k Kind) hasSlots() bool { return k >= NVRAM }

// Entry is a page's source: the kind in the top 8 bits, its value below.
type Entry uint64

// MaxValue is the largest value an Entry holds.
const MaxValue = 1<<56 - 1

// Make returns the entry of the given kind and value.
func Make(k Kind, value uint64) Entry { return Entry(uint64(k)<<56 | value&MaxValue) }

// Kind is the kind of source.
func (e Entry) Kind() Kind { return Kind(e >> 56) }

// Value is the kind's value, such as a slot.
func (e Entry) Value() uint64 { return uint64(e) & MaxValue }

// leafPages is how many pages' entries are allocated together: 32 KiB. A hostile
// stream that touches one page of each leaf costs that much for 9 bytes.
const leafPages = 1 << 12

type leaf [leafPages]Entry

// MaxPages caps a block's and so a table's size: 64 TiB of 4 KiB pages is
// more than any guest has.
const MaxPages = 1 << 34

// Table is the page table of one checkpoint. It has one owner; it is not safe
// for concurrent writing.
type Table struct {
	blocks []block
}

type block struct {
	pages  uint64
	leaves []*leaf
}

// New returns a table for RAM blocks with the given numbers of pages, all
// Absent.
func New(pages []uint64) (*Table, error) {
	t := &Table{blocks: make([]block, len(pages))}
	var sum uint64
	for i, n := range pages {
		if n > MaxPages || sum+n > MaxPages {
			return nil, fmt.Errorf("%d pages of RAM in block %d: more than the %d that a page table holds", n, i, uint64(MaxPages))
		}
		sum += n
		t.blocks[i] = block{pages: n, leaves: make([]*leaf, (n+leafPages-1)/leafPages)}
	}
	return t, nil
}

// Blocks is the number of RAM blocks.
func (t *Table) Blocks() int { return len(t.blocks) }

// Pages is the number of pages of a block.
func (t *Table) Pages(b int) uint64 { return t.blocks[b].pages }

// Get returns the entry of a page inside its block.
func (t *Table) Get(b int, page uint64) Entry {
	l := t.blocks[b].leaves[page/leafPages]
	if l == nil {
		return 0
	}
	return l[page%leafPages]
}

// Set replaces the entry of a page inside its block and returns the one it had.
func (t *Table) Set(b int, page uint64, e Entry) (old Entry) {
	p := &t.blocks[b].leaves[page/leafPages]
	if *p == nil {
		*p = new(leaf)
	}
	old = (*p)[page%leafPages]
	(*p)[page%leafPages] = e
	return old
}

// Run is a stretch of pages of one kind in a block. Values are First,
// First+Step, First+2·Step … with Step 0 or 1.
type Run struct {
	Block int
	Page  uint64
	Count uint64
	Kind  Kind
	First uint64
	Step  uint64
}

// Entry is the entry of the run's i-th page.
func (r Run) Entry(i uint64) Entry { return Make(r.Kind, r.First+i*r.Step) }

// Runs calls fn for every run of the table, Absent ones included, in block and
// page order: every page is in exactly one.
func (t *Table) Runs(fn func(Run) error) error {
	for b := range t.blocks {
		blk := &t.blocks[b]
		for page := uint64(0); page < blk.pages; {
			r := t.runAt(b, page)
			if err := fn(r); err != nil {
				return err
			}
			page += r.Count
		}
	}
	return nil
}

func (t *Table) runAt(b int, page uint64) Run {
	blk := &t.blocks[b]
	first := t.Get(b, page)
	r := Run{Block: b, Page: page, Count: 1, Kind: first.Kind(), First: first.Value()}
	for next := page + 1; next < blk.pages; {
		l := blk.leaves[next/leafPages]
		if l == nil {
			if r.Kind != Absent {
				return r
			}
			n := min(leafPages-next%leafPages, blk.pages-next)
			r.Count += n
			next += n
			continue
		}
		e := l[next%leafPages]
		if r.Count == 1 && r.Kind.hasSlots() && e == first+1 {
			r.Step = 1
		}
		if e != r.Entry(r.Count) {
			return r
		}
		r.Count++
		next++
	}
	return r
}

// Count returns how many pages there are of each kind.
func (t *Table) Count() map[Kind]uint64 {
	m := make(map[Kind]uint64)
	t.Runs(func(r Run) error { m[r.Kind] += r.Count; return nil })
	return m
}
