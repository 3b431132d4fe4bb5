package save

import (
	"strings"

	"github.com/flic-migrate/flic-migrate/ramparse"
)

// ahead tells how much of the first pass over RAM is still to come, at least. That is
// not what has not come: QEMU lists memory of which it never sends a page, such as what
// a guest has not plugged in of a virtio-mem device, or has called free. Only QEMU 8 and
// later say how much that is, and not of all of it.
//
// QEMU goes over the blocks in the order in which it lists them, and over each from its
// beginning. So pages behind the last one are counted, as long as there are reasons to
// believe in them:
//
//   - not in a block of a device, whose name has the device's path before it
//     (qemu_ram_set_idstr): it may be plugged in part. (What begins with a slash is
//     the machine's own, as /rom@etc/acpi/tables or, of old, /objects/ram-node0.)
//   - in the block at hand only if none of its pages has been left out;
//   - and none any more once QEMU begins again with the first block.
//
// With compression threads and in a background snapshot pages come out of order, and
// there all pages come that are listed.
type ahead struct {
	pages   []uint64 // of each block
	counted []bool   // whether pages of it are
	behind  []uint64 // pages of the counted blocks that come after it

	block   int    // the farthest that has come, and
	page    uint64 // its farthest page
	begun   bool
	holes   bool // pages of that block have been left out
	shuffle bool // a page came that had been left out
	over    bool
}

func newAhead(blocks []ramparse.Block, pages []uint64) *ahead {
	a := &ahead{pages: pages, counted: make([]bool, len(pages)), behind: make([]uint64, len(pages))}
	var n uint64
	for i := len(pages) - 1; i >= 0; i-- {
		a.behind[i] = n
		if a.counted[i] = strings.Index(blocks[i].Name, "/") <= 0; a.counted[i] {
			n += pages[i]
		}
	}
	return a
}

// add is told of each page record; again, if the page has come before.
func (a *ahead) add(block int, page uint64, again bool) {
	last := len(a.pages) - 1
	switch {
	case a.over || a.shuffle:
	case again || a.begun && (block < a.block || block == a.block && page < a.page):
		// ROM comes last, and nobody writes to it.
		if a.over = again || a.block == last; !a.over {
			a.shuffle = true
		}
	case !a.begun || block > a.block:
		a.begun, a.block, a.page, a.holes = true, block, page, page > 0
	default:
		a.holes = a.holes || page > a.page+1
		a.page = page
	}
}

// left is how many pages are certain to come, if unseen have not come in all.
func (a *ahead) left(unseen uint64) uint64 {
	switch {
	case a.over:
		return 0
	case a.shuffle:
		return unseen
	case !a.begun:
		n := a.behind[0]
		if a.counted[0] {
			n += a.pages[0]
		}
		return min(unseen, n)
	}
	n := a.behind[a.block]
	if a.counted[a.block] && !a.holes {
		n += a.pages[a.block] - 1 - a.page
	}
	return min(unseen, n)
}
