// Package bitmap keeps one bit for each page of a RAM block and finds the set
// ones fast.
//
// Guests touch memory in clusters: of a dirty bitmap, most words have no bit
// set, and where there is one its neighbours are set as well (the observation
// that FITDOC's scanning rests on). So a scan goes by machine words: it steps
// over words that are all zero or all one, finds the borders in the others by
// counting trailing bits, and hands out runs of pages instead of pages.
//
//	word      0                1                2
//	bits      0000000000000000 0000011111111111 1111111100000000 …
//	          └─ one compare ─┘└─ 5 zeros, then a run of 19 ──┘
//
// docs/lab/performance.md has what that saves against testing bit by bit.
package bitmap

import (
	"encoding/binary"
	"fmt"
	"iter"
	"math/bits"
)

// Run is pages [First, First+N) of a block.
type Run struct{ First, N int64 }

// Words is the number of 64-bit words that n bits take.
func Words(n int64) int64 { return (n + 63) / 64 }

// Bitmap has a bit for each of a fixed number of pages. Bit i%64 of word i/64
// is page i's; bits behind the last page are zero. Reading is safe from several
// goroutines. The zero value has no pages.
type Bitmap struct {
	words []uint64
	pages int64
}

// New returns a bitmap of so many pages, none set.
func New(pages int64) Bitmap { return Bitmap{make([]uint64, Words(pages)), pages} }

// Pages is how many pages the bitmap has, set or not.
func (b Bitmap) Pages() int64 { return b.pages }

// Bytes is the size of the bitmap in whole words, which is the form in which
// QEMU sends one (RECV_BITMAP).
func (b Bitmap) Bytes() int { return 8 * len(b.words) }

// Has tells whether page is set. It must be within the bitmap.
func (b Bitmap) Has(page int64) bool { return b.words[uint64(page)/64]>>(uint64(page)%64)&1 != 0 }

// Set sets a page and tells whether it was not set before.
func (b Bitmap) Set(page int64) bool {
	if page >= b.pages {
		panic(fmt.Sprintf("bitmap: page %d of %d", page, b.pages))
	}
	w, bit := &b.words[uint64(page)/64], uint64(1)<<(uint64(page)%64)
	fresh := *w&bit == 0
	*w |= bit
	return fresh
}

// Count is the number of pages that are set.
func (b Bitmap) Count() (n int64) {
	for _, w := range b.words {
		n += int64(bits.OnesCount64(w))
	}
	return n
}

// Fill takes a bitmap over from bytes: bit i%8 of byte i/8 is page i's. raw has
// Bytes() of them; bits behind the last page are ignored.
func (b Bitmap) Fill(raw []byte) error {
	if len(raw) != b.Bytes() {
		return fmt.Errorf("bitmap of %d bytes for %d pages", len(raw), b.pages)
	}
	for i := range b.words {
		b.words[i] = binary.LittleEndian.Uint64(raw[8*i:])
	}
	if rest := uint64(b.pages) % 64; rest != 0 {
		b.words[len(b.words)-1] &= 1<<rest - 1
	}
	return nil
}

// Runs yields the maximal runs of set pages, in rising order.
func (b Bitmap) Runs() iter.Seq[Run] {
	return func(yield func(Run) bool) {
		s := NewScanner(yield)
		if s.Add(b.words) {
			s.End()
		}
	}
}

// Scanner finds the runs in words that are made as the scan goes, of which the
// whole need not be in memory at once.
type Scanner struct {
	yield func(Run) bool
	at    int64 // pages that have been added
	start int64 // of the run that is open, or -1
}

// NewScanner returns a Scanner that hands each run to yield until that returns
// false.
func NewScanner(yield func(Run) bool) Scanner { return Scanner{yield: yield, start: -1} }

// Add scans the next words. It returns false when the scan is over because
// yield said so; the Scanner is then not to be used any more.
func (s *Scanner) Add(words []uint64) bool {
	for i := 0; i < len(words); i++ {
		w := words[i]
		if s.start < 0 && w == 0 {
			// The usual case by far: as many as are empty, with nothing else
			// in the loop.
			n := i + 1
			for n < len(words) && words[n] == 0 {
				n++
			}
			s.at += 64 * int64(n-i)
			i = n - 1
			continue
		}
		if !s.word(w) {
			return false
		}
		s.at += 64
	}
	return true
}

// word scans one word that is not known to be empty. The pages are those from
// s.at on.
func (s *Scanner) word(w uint64) bool {
	if s.start >= 0 {
		n := bits.TrailingZeros64(^w)
		if n == 64 {
			return true
		}
		if !s.yield(Run{s.start, s.at + int64(n) - s.start}) {
			return false
		}
		s.start = -1
		w &^= 1<<n - 1
	}
	for w != 0 {
		first := bits.TrailingZeros64(w)
		// Adding its lowest bit carries through a run and clears it: what is
		// left of the sum's trailing zeros is where the run ends.
		end := bits.TrailingZeros64(w + w&-w)
		if end == 64 {
			s.start = s.at + int64(first)
			return true
		}
		if !s.yield(Run{s.at + int64(first), int64(end - first)}) {
			return false
		}
		w &^= 1<<end - 1
	}
	return true
}

// End ends the scan: a run that reaches the last word's last bit is yielded.
func (s *Scanner) End() {
	if s.start >= 0 {
		s.yield(Run{s.start, s.at - s.start})
		s.start = -1
	}
}
