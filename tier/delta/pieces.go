package delta

import (
	"encoding/binary"
	"fmt"
	"math/bits"
)

// A page that resembles another one, but for what has been moved in it, is stored as
// pieces: bytes of its own and copies from the base in turn. As all that LZ codecs do
// with a dictionary of one page, but for the coding: the codec of the image does that,
// for many pages at a time.
//
//	uvarint k                 pieces
//	k × uvarint               bytes of the page's own before it
//	    uvarint               bytes copied, 1 or more
//	    varint                where in the base they begin, less where the piece before
//	                          it ended there (0 at first)
//	bytes of the page's own   those before each piece, and those behind the last
//
// The length follows from the pieces, and any other is damage.

const (
	// seed is how many bytes are looked up in the base, seedStep the distance of those
	// that are found there: copies of seed + seedStep - 1 bytes and more are found, but for
	// those that end within seedStep strides (see stride).
	seed     = 8
	seedStep = 8
	// minCopy is the shortest copy that is made: a piece takes 3 to 5 bytes.
	minCopy = 12
	// maxBehind is how far a copy may begin before the seed that it was found by, for a page
	// that may be too long.
	maxBehind = 64
)

// Differ finds the pieces of pages. One goroutine uses it; the zero value is ready.
type Differ struct {
	places []uint16 // by hash of seed bytes: where they are in the base, in steps, plus 1
	pieces []byte
	own    []byte
}

// Encode appends to dst the pieces of page, with copies from base, which has the same
// length. It returns dst as it was, and false, if more than most bytes would be added.
func (d *Differ) Encode(dst, page, base []byte, most int) ([]byte, bool) {
	n := len(page)
	base = base[:n]
	shift := 64 - bits.Len(uint(n/2))
	if size := 1 << (64 - shift); len(d.places) != size {
		d.places = make([]uint16, size)
	} else {
		clear(d.places)
	}
	at := func(b []byte, i int) uint64 { return binary.LittleEndian.Uint64(b[i : i+seed]) }
	for i := n - n%seedStep - seed; i >= 0; i -= seedStep {
		d.places[at(base, i)*hashFactor>>shift] = uint16(i/seedStep + 1)
	}
	count, end, done := 0, 0, 0 // pieces; where the last ended in base; bytes of page that are coded
	d.pieces, d.own = d.pieces[:0], d.own[:0]
	// Behind limit it would be too long, unless a copy began far before its first seed: that
	// is rare, and most pages that are given up are so before half of them has been looked at.
	limit := most + maxBehind
	for i := 0; i+seed <= n; {
		if i > limit {
			return dst, false
		}
		v := at(page, i)
		// What stands where it stood needs no search.
		from := i
		if at(base, from) != v {
			p := d.places[v*hashFactor>>shift]
			if p != 0 {
				from = int(p-1) * seedStep
			}
			if p == 0 || at(base, from) != v {
				i += stride(i - done)
				continue
			}
		}
		first, to := i, i+seed
		for first > done && from > 0 && page[first-1] == base[from-1] {
			first, from = first-1, from-1
		}
		to += alike(page[to:], base[from+to-first:])
		if to-first < minCopy {
			i++
			continue
		}
		d.pieces = binary.AppendUvarint(d.pieces, uint64(first-done))
		d.pieces = binary.AppendUvarint(d.pieces, uint64(to-first))
		d.pieces = binary.AppendVarint(d.pieces, int64(from-end))
		d.own = append(d.own, page[done:first]...)
		count, end, done, i = count+1, from+to-first, to, to
		limit = done + most + maxBehind - len(d.pieces) - len(d.own)
	}
	d.own = append(d.own, page[done:]...)
	head := len(dst)
	dst = binary.AppendUvarint(dst, uint64(count))
	dst = append(append(dst, d.pieces...), d.own...)
	if len(dst)-head > most {
		return dst[:head], false
	}
	return dst, true
}

// stride is how far to go on after so many bytes that are in no copy: more may follow, and to
// look up each of them is most of what a page takes. It is odd, so that seedStep strides
// come upon a seed wherever in the base the bytes stand; what is before that is found backwards.
func stride(missed int) int {
	if missed < 32 {
		return 1
	}
	return 3
}

// alike is how many bytes a and b have in common at their beginning.
func alike(a, b []byte) (n int) {
	m := min(len(a), len(b))
	for ; n+8 <= m; n += 8 {
		if x := binary.LittleEndian.Uint64(a[n:]) ^ binary.LittleEndian.Uint64(b[n:]); x != 0 {
			return n + bits.TrailingZeros64(x)/8
		}
	}
	for n < m && a[n] == b[n] {
		n++
	}
	return n
}

// hashFactor spreads what it multiplies over the upper bits.
const hashFactor = 0x9e3779b97f4a7c15

// ApplyPieces makes in dst the page that pieces make of base. Both have the length of a
// page, and are different memory. Pieces that are none of a page of that length are an
// error that wraps ErrDamaged, and leave dst in no particular state.
func ApplyPieces(dst, base, pieces []byte) error {
	n := uint64(len(dst))
	if len(base) != len(dst) {
		return fmt.Errorf("%w: pages of %d and %d bytes", ErrDamaged, len(base), n)
	}
	count, b, ok := uvarint(pieces)
	if !ok || count > n {
		return fmt.Errorf("%w: no number of pieces", ErrDamaged)
	}
	// The page's own bytes stand behind the pieces, so those are passed over first.
	list, own := b, b
	for range 3 * count {
		if _, own, ok = uvarint(own); !ok {
			return fmt.Errorf("%w: %d pieces in %d bytes", ErrDamaged, count, len(pieces))
		}
	}
	done, end := uint64(0), uint64(0)
	for i := range count {
		var lead, length, step uint64
		lead, list, _ = uvarint(list)
		length, list, _ = uvarint(list)
		step, list, _ = uvarint(list)
		// A sum that goes round is out of the page too.
		from := end + (step>>1 ^ -(step & 1))
		if lead > n-done || lead > uint64(len(own)) || length == 0 || length > n-done-lead || from > n || length > n-from {
			return fmt.Errorf("%w: piece %d reaches out of the page", ErrDamaged, i)
		}
		done += uint64(copy(dst[done:done+lead], own))
		done += uint64(copy(dst[done:done+length], base[from:]))
		own, end = own[lead:], from+length
	}
	if uint64(len(own)) != n-done {
		return fmt.Errorf("%w: %d bytes for %d", ErrDamaged, len(own), n-done)
	}
	copy(dst[done:], own)
	return nil
}

// uvarint is the number that b begins with, and what is behind it.
func uvarint(b []byte) (v uint64, rest []byte, ok bool) {
	v, n := binary.Uvarint(b)
	if n <= 0 {
		return 0, nil, false
	}
	return v, b[n:], true
}
