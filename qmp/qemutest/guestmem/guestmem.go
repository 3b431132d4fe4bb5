// Package guestmem makes the memory content of test guests: pages of the kinds a
// real guest has, known in advance from a seed. The test guests' first process
// fills its buffer with it, and recorded streams of guests without an operating
// system get it as their memory.
package guestmem

import (
	"encoding/binary"
	"math/rand/v2"
	"strconv"
)

// PageSize is the size in bytes of the pages that Fill writes.
const PageSize = 4096

// words make the text pages: few enough that text compresses about as well as
// the text of a real guest.
var words = [...]string{
	"page", "block", "memory", "guest", "the", "of", "and", "read", "write", "device",
	"error", "=", "return", "(", ")", ";", "\n", "\n\t", "if", "for", "int", "0x", "flash",
	"checkpoint", "stream", "a", "to", "in", "is", "lib", "usr", "/", ".so", "kernel",
}

// Page writes page i of the fill of seed: by turns zeros, random bytes, text,
// tables of numbers, and duplicates. A real guest's memory has all of these, and
// each takes another path through a save. About a third of the bytes remain
// after compression. The page is of any size that is a multiple of 16 bytes and
// at least 1024.
func Page(page []byte, seed uint64, i int) {
	clear(page)
	r := rand.New(rand.NewPCG(seed, uint64(i)+1<<32))
	switch kind := r.IntN(16); {
	case kind < 2: // zero
	case kind < 4: // random
		for b := page; len(b) > 0; b = b[8:] {
			binary.LittleEndian.PutUint64(b, r.Uint64())
		}
	case kind < 8:
		text(page, r)
	case kind < 11: // duplicates of one of 32 texts, the same for every seed
		text(page, rand.New(rand.NewPCG(0, r.Uint64N(32))))
	case kind < 13: // mostly zero: a few words at the start, as in page tables
		for j := range 4 + r.IntN(64) {
			binary.LittleEndian.PutUint64(page[j*8:], uint64(i)<<12|uint64(j))
		}
	default: // table: pointers that rise, and small numbers
		at := uint64(0xffff888000000000) + r.Uint64N(1<<30)
		for j := 0; j < len(page); j += 16 {
			at += 64 + 8*r.Uint64N(16)
			binary.LittleEndian.PutUint64(page[j:], at)
			binary.LittleEndian.PutUint64(page[j+8:], r.Uint64N(512))
		}
	}
}

func text(page []byte, r *rand.Rand) {
	for n := 0; n < len(page); {
		if r.IntN(24) == 0 {
			n += copy(page[n:], strconv.FormatUint(r.Uint64N(1<<20), 10))
		}
		n += copy(page[n:], words[r.IntN(len(words))])
		n += copy(page[n:], " ")
	}
}

// Fill writes the fill of seed into buf, page by page; the bytes of an
// incomplete last page are left as they are.
func Fill(buf []byte, seed uint64) {
	for i := range len(buf) / PageSize {
		Page(buf[i*PageSize:(i+1)*PageSize], seed, i)
	}
}

// Change writes n random bytes at a random place of the page: the little changes
// that XBZRLE is made for, or with n of a whole page a new page.
func Change(page []byte, r *rand.Rand, n int) {
	n = min(max(n, 1), len(page))
	at := r.IntN(len(page) - n + 1)
	for j := range n {
		page[at+j] = byte(r.Uint32())
	}
}
