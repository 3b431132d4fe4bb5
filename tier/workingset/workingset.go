// Package workingset says how hot each guest page is: how likely the guest is to
// touch it while it recovers (the working set of FLIC, section III-B). A save
// puts the hot pages into NVRAM, hottest first, and the others into flash.
//
// Heat is a number from 0, cold, to 255. It is kept, in memory and in the file
// of --working-set, as bit planes: plane j of a RAM block has bit j of each
// page's heat. A recording that only knows hot and cold is one plane, and that
// is a plain bitmap; counting and searching go by machine words.
//
//	heat of page   0  1  2  3  4  5  6  7
//	               0  3  3  1  0  0  2  3
//	plane 0        0  1  1  1  0  0  0  1     byte 0x8e
//	plane 1        0  1  1  0  0  0  1  1     byte 0xc6
package workingset

import (
	"fmt"
	"iter"
	"math/bits"
	"slices"

	"github.com/flic-migrate/flic-migrate/tier/bitmap"
)

const (
	maxPlanes = 8
	maxBlocks = 1 << 12
	maxName   = 255     // QEMU sends a name with a length of one byte
	maxPages  = 1 << 40 // of a block
)

// Block is a RAM block's name (QEMU's idstr) and its size in pages.
type Block struct {
	Name  string
	Pages int64
}

// Run is pages [First, First+N) of a block.
type Run = bitmap.Run

// Set is the heat of every page of some RAM blocks. Blocks are numbered in the
// order of New. Reading is safe from several goroutines, SetHeat and Merge are
// not.
type Set struct {
	pageSize int
	blocks   []block
}

type block struct {
	Block
	// planes are the lowest bits of the heats; the bits that no page has set
	// are left out. Bit i%64 of word i/64 is page i's. Bits beyond the last
	// page are zero.
	planes [][]uint64
}

// New returns a set of cold pages. pageSize is a power of two, in bytes.
func New(pageSize int, blocks []Block) (*Set, error) {
	if pageSize < 1<<10 || pageSize > 1<<16 || pageSize&(pageSize-1) != 0 {
		return nil, fmt.Errorf("working set: page size %d", pageSize)
	}
	s := &Set{pageSize: pageSize}
	for _, b := range blocks {
		if err := s.add(b); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// add appends a block of cold pages.
func (s *Set) add(b Block) error {
	switch {
	case len(b.Name) == 0 || len(b.Name) > maxName:
		return fmt.Errorf("working set: RAM block name of %d bytes", len(b.Name))
	case b.Pages < 0 || b.Pages > maxPages:
		return fmt.Errorf("working set: RAM block %q of %d pages", b.Name, b.Pages)
	case len(s.blocks) == maxBlocks:
		return fmt.Errorf("working set: more than %d RAM blocks", maxBlocks)
	case s.find(b.Name) >= 0:
		return fmt.Errorf("working set: two RAM blocks %q", b.Name)
	}
	s.blocks = append(s.blocks, block{Block: b})
	return nil
}

// find returns a block's number, or -1. There are a dozen blocks, and a file
// with thousands of them is read once.
func (s *Set) find(name string) int {
	return slices.IndexFunc(s.blocks, func(b block) bool { return b.Name == name })
}

// PageSize in bytes.
func (s *Set) PageSize() int { return s.pageSize }

// Blocks returns names and sizes by number.
func (s *Set) Blocks() []Block {
	list := make([]Block, len(s.blocks))
	for i, b := range s.blocks {
		list[i] = b.Block
	}
	return list
}

// Bind returns the set as a VM with these blocks sees it: block numbers are
// those of the argument, what the set does not know is cold, what the VM does
// not have is left out. It fails if the page sizes differ. The new set may
// share memory with s, neither of which must be changed any more.
func (s *Set) Bind(pageSize int, blocks []Block) (*Set, error) {
	if pageSize != s.pageSize {
		return nil, fmt.Errorf("working set: recorded with pages of %d bytes, the VM has %d", s.pageSize, pageSize)
	}
	t, err := New(pageSize, blocks)
	if err != nil {
		return nil, err
	}
	for i := range t.blocks {
		if n := s.find(t.blocks[i].Name); n >= 0 {
			t.blocks[i].planes = resized(s.blocks[n].planes, s.blocks[n].Pages, t.blocks[i].Pages)
		}
	}
	return t, nil
}

// resized returns the planes of a block that has `pages` pages now: the same
// ones if it had as many, else a copy.
func resized(planes [][]uint64, had, pages int64) [][]uint64 {
	if had == pages {
		return planes
	}
	list := make([][]uint64, len(planes))
	for j, p := range planes {
		list[j] = make([]uint64, bitmap.Words(pages))
		copy(list[j], p)
		if pages < had && pages%64 != 0 {
			list[j][pages/64] &= 1<<(pages%64) - 1
		}
	}
	return list
}

// Heat of a page, by block number. The page must be within the block.
func (s *Set) Heat(block int, page int64) uint8 {
	var h uint8
	i := uint64(page)
	for j, p := range s.blocks[block].planes {
		h |= uint8(p[i/64]>>(i%64)&1) << j
	}
	return h
}

// SetHeat sets the heat of a page.
func (s *Set) SetHeat(block int, page int64, heat uint8) {
	b := &s.blocks[block]
	if page < 0 || page >= b.Pages {
		panic(fmt.Sprintf("workingset: page %d of %d in RAM block %q", page, b.Pages, b.Name))
	}
	for heat>>len(b.planes) != 0 {
		b.planes = append(b.planes, make([]uint64, bitmap.Words(b.Pages)))
	}
	for j, p := range b.planes {
		p[page/64] = p[page/64]&^(1<<(page%64)) | uint64(heat>>j&1)<<(page%64)
	}
}

// Histogram counts the pages of each heat.
func (s *Set) Histogram() (count [256]int64) {
	for _, b := range s.blocks {
		cold := b.Pages
		for w := range bitmap.Words(b.Pages) {
			var any uint64
			for _, p := range b.planes {
				any |= p[w]
			}
			cold -= int64(bits.OnesCount64(any))
			if len(b.planes) == 1 {
				count[1] += int64(bits.OnesCount64(any))
				continue
			}
			for ; any != 0; any &= any - 1 {
				i := bits.TrailingZeros64(any)
				h := 0
				for j, p := range b.planes {
					h |= int(p[w]>>i&1) << j
				}
				count[h]++
			}
			if len(b.planes) == 0 {
				break // all cold, and perhaps very many
			}
		}
		count[0] += cold
	}
	return count
}

// Threshold tells which pages are in if only budget of them fit, hottest first,
// ties by block number and address: all whose heat is above lowest, and of those
// whose heat is lowest the first atLowest. Cold pages are never in.
func (s *Set) Threshold(budget int64) (lowest uint8, atLowest int64) {
	left := max(budget, 0)
	count := s.Histogram()
	for h := 255; h > 1; h-- {
		if count[h] >= left {
			return uint8(h), left
		}
		left -= count[h]
	}
	return 1, min(count[1], left)
}

// atLeast returns the pages of word w whose heat is at least heat, as a bitmap.
func (b *block) atLeast(w int64, heat int) uint64 {
	if heat>>len(b.planes) != 0 {
		return 0
	}
	// From the highest bit down, as numbers are compared; `equal` are those
	// that are not decided yet.
	var above uint64
	equal := ^uint64(0)
	for j := len(b.planes) - 1; j >= 0; j-- {
		if p := b.planes[j][w]; heat>>j&1 != 0 {
			equal &= p
		} else {
			above |= equal & p
			equal &^= p
		}
	}
	if rest := b.Pages - w*64; rest < 64 {
		equal &= 1<<rest - 1 // only heat 0 can be beyond the end
	}
	return above | equal
}

// Runs yields the maximal runs of pages with lo <= heat <= hi of a block, in
// rising order.
func (s *Set) Runs(block int, lo, hi uint8) iter.Seq[Run] {
	b := &s.blocks[block]
	return func(yield func(Run) bool) {
		if len(b.planes) == 0 {
			if lo == 0 && b.Pages > 0 {
				yield(Run{First: 0, N: b.Pages})
			}
			return
		}
		scan := bitmap.NewScanner(yield)
		if len(b.planes) == 1 && lo == 1 {
			// A plain bitmap is its own answer.
			if scan.Add(b.planes[0]) {
				scan.End()
			}
			return
		}
		var buf [64]uint64
		for w, n := int64(0), bitmap.Words(b.Pages); w < n; {
			k := min(n-w, int64(len(buf)))
			for i := range k {
				buf[i] = b.atLeast(w+i, int(lo)) &^ b.atLeast(w+i, int(hi)+1)
			}
			if !scan.Add(buf[:k]) {
				return
			}
			w += k
		}
		scan.End()
	}
}

// Merge raises each page's heat to that in o, matching blocks by name. Blocks
// that s does not have are added, shorter ones grow. It fails, with s unchanged,
// if the page sizes differ.
func (s *Set) Merge(o *Set) error {
	if o.pageSize != s.pageSize {
		return fmt.Errorf("working set: pages of %d and of %d bytes", s.pageSize, o.pageSize)
	}
	for i := range o.blocks {
		from := &o.blocks[i]
		n := s.find(from.Name)
		if n < 0 {
			if err := s.add(from.Block); err != nil {
				return err
			}
			n = len(s.blocks) - 1
		}
		to := &s.blocks[n]
		if from.Pages > to.Pages {
			to.planes = resized(to.planes, to.Pages, from.Pages)
			to.Pages = from.Pages
		}
		for len(to.planes) < len(from.planes) {
			to.planes = append(to.planes, make([]uint64, bitmap.Words(to.Pages)))
		}
		for w := range bitmap.Words(from.Pages) {
			if len(from.planes) == 0 {
				break
			}
			var hotter uint64 // pages that are hotter in from
			equal := ^uint64(0)
			for j := len(to.planes) - 1; j >= 0; j-- {
				p := from.word(j, w)
				hotter |= equal & p &^ to.planes[j][w]
				equal &^= p ^ to.planes[j][w]
			}
			for j := range to.planes {
				to.planes[j][w] = to.planes[j][w]&^hotter | from.word(j, w)&hotter
			}
		}
	}
	return nil
}

// word is a word of plane j, which may be one that the block has left out.
func (b *block) word(j int, w int64) uint64 {
	if j >= len(b.planes) {
		return 0
	}
	return b.planes[j][w]
}

// Add makes every page that is hot in o hotter by so much, up to 255, matching
// blocks by name; what s does not have is left out. It fails, with s unchanged,
// if the page sizes differ.
func (s *Set) Add(o *Set, by uint8) error {
	if o.pageSize != s.pageSize {
		return fmt.Errorf("working set: pages of %d and of %d bytes", s.pageSize, o.pageSize)
	}
	for i := range o.blocks {
		n := s.find(o.blocks[i].Name)
		if n < 0 {
			continue
		}
		from, to := &o.blocks[i], &s.blocks[n]
		if len(from.planes) == 0 {
			continue
		}
		// Room for the largest sum there can be. Only that of 8 bits overflows.
		need := bits.Len(1<<len(to.planes) - 1 + uint(by))
		for len(to.planes) < min(need, maxPlanes) {
			to.planes = append(to.planes, make([]uint64, bitmap.Words(to.Pages)))
		}
		for w := range bitmap.Words(min(from.Pages, to.Pages)) {
			hot := from.atLeast(w, 1)
			if rest := to.Pages - w*64; rest < 64 {
				hot &= 1<<rest - 1
			}
			if hot != 0 {
				to.add(w, hot, by)
			}
		}
	}
	return nil
}

// add adds to the heat of the pages in hot, bits of word w: 64 sums at once, as
// an adder makes them, plane by plane with the carries in a word.
func (b *block) add(w int64, hot uint64, by uint8) {
	var carry uint64
	for j, p := range b.planes {
		var y uint64
		if by>>j&1 != 0 {
			y = hot
		}
		x := p[w]
		p[w] = x ^ y ^ carry
		carry = x&y | carry&(x^y)
	}
	for _, p := range b.planes {
		p[w] |= carry
	}
}
