// Package pagemap keeps, for every guest page of a checkpoint, where its
// content comes from.
//
// While a checkpoint is saved the page map is a [Builder]: one Entry (8 B) a page, in
// leaves that are allocated when a page in them is first set, so that what a stream
// merely claims to hold takes no memory. On disk it is runs: neighbouring pages have
// neighbouring slots, so a run of any length takes a few bytes. A [Map] is what is
// read back, and keeps the runs.
//
// The package knows how many pages a run has whatever its kind is, because a run says
// itself whether a value follows. What a kind means is known in one place, package
// source.
//
// A page whose content equals another page's (FLIC Alg. III.1, the redundant
// vector) has the same slot as that page. The vector is resolved while saving,
// so that a reader, a lazy one above all, never follows a chain.
package pagemap

import "fmt"

// Kind is the kind of source a page's content has, at most MaxKind. Numbers are part
// of the format; a reader that does not know a kind refuses the page, and no other.
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
	// Delta pages are some changed words and a base; the value is the slot of the
	// delta in this image's segments.
	Delta Kind = 5
	// Foreign pages are in another image, an ancestor's or another VM's; the value
	// is the reference in bits 40–55 and the flash slot there in bits 0–39.
	Foreign Kind = 6
	// ForeignNVRAM pages are likewise in another checkpoint's NVRAM part.
	ForeignNVRAM Kind = 7
	// Disk pages are on a disk; the value is the disk slot, whose place the checkpoint's DISKS
	// says, and during a save the place itself (checkpoint.DiskSlot).
	Disk Kind = 8
	// ForeignDelta pages are some changed words in another image and a base, which
	// this checkpoint says itself; the value is as Foreign's, with the delta's slot.
	ForeignDelta Kind = 9

	// MaxKind is the largest that the format has room for.
	MaxKind Kind = 63

	numKinds = int(MaxKind) + 1
)

var kindNames = []string{"absent", "fill", "zero data", "nvram", "flash", "delta", "foreign", "foreign nvram", "disk", "foreign delta"}

func (k Kind) String() string {
	if int(k) < len(kindNames) {
		return kindNames[k]
	}
	return fmt.Sprintf("source kind %d", uint8(k))
}

// hasSlots tells whether a kind's values count up with the pages in a typical
// run.
func (k Kind) hasSlots() bool { return k >= NVRAM }

// hasValue tells whether a run of this kind has a value to it.
func (k Kind) hasValue() bool { return k != Absent && k != ZeroData }

// known tells whether this version knows how runs of this kind look. Those of any
// other are taken as they describe themselves.
func (k Kind) known() bool { return int(k) < len(kindNames) }

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

// The value of a foreign kind is the number of a reference and a slot there, in so
// many bits each.
const (
	refBits  = 16
	slotBits = 40

	// MaxSlots is how many slots of a reference there is room for.
	MaxSlots = 1 << slotBits
)

// MakeForeign is the entry of a foreign kind: a slot in the image, or the NVRAM part,
// of reference ref.
func MakeForeign(k Kind, ref int, slot uint64) Entry { return Make(k, uint64(ref)<<slotBits|slot) }

// SplitForeign takes the value of an entry of a foreign kind apart.
func SplitForeign(value uint64) (ref int, slot uint64) {
	return int(value >> slotBits), value & (MaxSlots - 1)
}

// leafPages is how many pages' entries are allocated together: 32 KiB. A hostile
// stream that touches one page of each leaf costs that much for 9 bytes.
const leafPages = 1 << 12

type leaf [leafPages]Entry

// MaxPages caps a block's and so a page map's size: 64 TiB of 4 KiB pages is
// more than any guest has.
const MaxPages = 1 << 34

// Builder is the page map of a checkpoint that is being saved. It has one owner; it
// is not safe for concurrent writing.
type Builder struct {
	blocks []block
}

type block struct {
	pages  uint64
	leaves []*leaf
}

// New returns a page map for RAM blocks with the given numbers of pages, all
// Absent.
func New(pages []uint64) (*Builder, error) {
	t := &Builder{blocks: make([]block, len(pages))}
	var sum uint64
	for i, n := range pages {
		if n > MaxPages || sum+n > MaxPages {
			return nil, fmt.Errorf("%d pages of RAM in block %d: more than the %d that a page map holds", n, i, uint64(MaxPages))
		}
		sum += n
		t.blocks[i] = block{pages: n, leaves: make([]*leaf, (n+leafPages-1)/leafPages)}
	}
	return t, nil
}

// Grow makes a block longer: it has so many pages from now on, the new ones Absent. It
// is for numberings whose end is not known at first, such as the slots of an image.
func (t *Builder) Grow(b int, pages uint64) {
	blk := &t.blocks[b]
	for uint64(len(blk.leaves))*leafPages < pages {
		blk.leaves = append(blk.leaves, nil)
	}
	blk.pages = max(blk.pages, pages)
}

// Blocks is the number of RAM blocks.
func (t *Builder) Blocks() int { return len(t.blocks) }

// Pages is the number of pages of a block.
func (t *Builder) Pages(b int) uint64 { return t.blocks[b].pages }

// Get returns the entry of a page inside its block.
func (t *Builder) Get(b int, page uint64) Entry {
	l := t.blocks[b].leaves[page/leafPages]
	if l == nil {
		return 0
	}
	return l[page%leafPages]
}

// Set replaces the entry of a page inside its block and returns the one it had.
func (t *Builder) Set(b int, page uint64, e Entry) (old Entry) {
	p := &t.blocks[b].leaves[page/leafPages]
	if *p == nil {
		*p = new(leaf)
	}
	old = (*p)[page%leafPages]
	(*p)[page%leafPages] = e
	return old
}

// Change replaces each entry of a block by what fn makes of it.
func (t *Builder) Change(b int, fn func(Entry) Entry) {
	for _, l := range t.blocks[b].leaves {
		if l == nil {
			continue
		}
		for i := range l {
			l[i] = fn(l[i])
		}
	}
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

// Last is the value of the run's last page.
func (r Run) Last() uint64 { return r.First + r.Step*(r.Count-1) }

// From is the run without its first n pages.
func (r Run) From(n uint64) Run {
	r.Page, r.Count, r.First = r.Page+n, r.Count-n, r.First+n*r.Step
	return r
}

// Runs calls fn for every run of the map, Absent ones included, in block and
// page order: every page is in exactly one.
func (t *Builder) Runs(fn func(Run) error) error {
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

// runAt is the run that begins at a page. It goes over a leaf at a time: a save does this for
// every page of the guest while that stands still.
func (t *Builder) runAt(b int, page uint64) Run {
	blk := &t.blocks[b]
	first := t.Get(b, page)
	r := Run{Block: b, Page: page, Count: 1, Kind: first.Kind(), First: first.Value()}
	for next := page + 1; next < blk.pages; next = page + r.Count {
		in := next % leafPages
		n := min(leafPages-in, blk.pages-next)
		l := blk.leaves[next/leafPages]
		if l == nil {
			if r.Kind != Absent {
				return r
			}
			r.Count += n
			continue
		}
		rest := l[in : in+n]
		if r.Count == 1 && r.Kind.hasSlots() && rest[0] == first+1 {
			r.Step = 1
		}
		want, step := r.Entry(r.Count), Entry(r.Step)
		for i, e := range rest {
			if e != want {
				r.Count += uint64(i)
				return r
			}
			want += step
		}
		r.Count += n
	}
	return r
}

// Count returns how many pages there are of each kind.
func (t *Builder) Count() map[Kind]uint64 {
	m := make(map[Kind]uint64)
	t.Runs(func(r Run) error { m[r.Kind] += r.Count; return nil })
	return m
}
