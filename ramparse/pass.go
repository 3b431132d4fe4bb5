package ramparse

import "math/bits"

// A PassCounter tells the passes of a save apart. Within a pass of a plain
// precopy (block, page) rises strictly; a step back to a page that was sent
// before begins the next pass. A step back to a page that was never sent shows
// a save out of order (compression threads, background snapshot): from then on
// a pass ends only where a page comes that was sent in it already.
//
// It takes 2 bits of memory for each page of RAM.
type PassCounter struct {
	first     []uint64 // number of each block's first page
	ever      []uint64 // bitmap: pages sent at all
	current   []uint64 // bitmap: pages sent in the current pass
	last      uint64
	passes    int
	unordered bool
}

// NewPassCounter returns a counter for the given blocks. pageSize is in bytes.
func NewPassCounter(s *Setup, pageSize int) *PassCounter {
	p := &PassCounter{first: make([]uint64, len(s.Blocks))}
	var n uint64
	shift := bits.TrailingZeros(uint(pageSize))
	for i, b := range s.Blocks {
		p.first[i] = n
		n += (b.Used + uint64(pageSize) - 1) >> shift // of a part of a page none is sent
	}
	p.ever = make([]uint64, (n+63)/64)
	p.current = make([]uint64, (n+63)/64)
	return p
}

// Add notes a page record and reports whether a new pass begins with it: true
// for the very first. block and page must lie within the setup, as those of
// a Decoder's records do.
func (p *PassCounter) Add(block int, page uint64) bool {
	n := p.first[block] + page
	word, bit := n/64, uint64(1)<<(n%64)
	begins := p.passes == 0
	if !begins && n <= p.last && !p.unordered {
		begins = p.ever[word]&bit != 0
		p.unordered = !begins
	}
	if p.current[word]&bit != 0 {
		begins = true
	}
	if begins {
		p.passes++
		clear(p.current)
	}
	p.ever[word] |= bit
	p.current[word] |= bit
	p.last = n
	return begins
}

// Passes returns the number of passes so far.
func (p *PassCounter) Passes() int { return p.passes }
