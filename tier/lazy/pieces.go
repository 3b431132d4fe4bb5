package lazy

import (
	"cmp"
	"slices"
	"sort"

	"github.com/flic-migrate/flic-migrate/tier/pagemap"
)

// piece is a stretch of pages whose content lies in one segment, or in none. A
// guest can have as many as it has pages, and the loader keeps them all while it
// works, so it is packed into 16 bytes:
//
//	entry  source of the first page's content
//	where  bits 0–33   number of the first page, all RAM blocks being one row
//	       bit 34      the sources of the pages count up; otherwise all have one
//	       bits 35–63  pages
type piece struct {
	entry pagemap.Entry
	where uint64
}

const (
	pageBits  = 34 // pagemap.MaxPages is 1 << 34
	mostPages = 1<<(64-pageBits-1) - 1
)

func makePiece(page uint64, e pagemap.Entry, step, count uint64) piece {
	return piece{e, page | step<<pageBits | count<<(pageBits+1)}
}

func (p piece) page() uint64                  { return p.where & (1<<pageBits - 1) }
func (p piece) step() uint64                  { return p.where >> pageBits & 1 }
func (p piece) count() uint64                 { return p.where >> (pageBits + 1) }
func (p piece) source(i uint64) pagemap.Entry { return p.entry + pagemap.Entry(i*p.step()) }

// sortPieces puts pieces in the order in which their content lies in the image.
func sortPieces(p []piece) {
	slices.SortFunc(p, func(a, b piece) int {
		if a.entry != b.entry {
			return cmp.Compare(a.entry, b.entry)
		}
		return cmp.Compare(a.where&(1<<pageBits-1), b.where&(1<<pageBits-1))
	})
}

// row numbers the pages of all RAM blocks as one row. It has the number of each
// block's first page, and at the end that of all pages.
type row []uint64

func newRow(blockPages []uint64) row {
	r := make(row, 1, len(blockPages)+1)
	for i, n := range blockPages {
		r = append(r, r[i]+n)
	}
	return r
}

// number is the number of a page of a block.
func (r row) number(block int, page uint64) uint64 { return r[block] + page }

// page is the page with a number, and its block.
func (r row) page(number uint64) (block int, page uint64) {
	block = sort.Search(len(r)-1, func(i int) bool { return number < r[i+1] })
	return block, number - r[block]
}
