package tiertest

import (
	"bytes"
	"encoding/binary"
)

// Kind is what a page holds.
type Kind uint8

// The kinds of pages.
const (
	Absent    Kind = iota // never sent
	Zero                  // a ZERO record
	ZeroData              // zeros, sent as data
	Duplicate             // one of Options.Pool contents that many pages have
	Random                // nothing that compresses
	Text                  // compresses to about a third
	Sparse                // zeros but for 64 bytes, no two pages alike
	Alike                 // one content for all pages but for one word
	kinds
)

// Mix gives the kinds' weights. Only their proportions count.
type Mix [kinds]float64

// DefaultMix has some of everything but pages that are never sent.
var DefaultMix = Mix{Zero: 3, ZeroData: 1, Duplicate: 2, Random: 2, Text: 4, Sparse: 1, Alike: 1}

// pick chooses a kind by a hash.
func (m *Mix) pick(h uint64) Kind {
	var sum float64
	for _, w := range m {
		sum += w
	}
	x := unit(h) * sum
	for k, w := range m {
		if x -= w; x < 0 {
			return Kind(k)
		}
	}
	return Zero
}

// unit maps a hash to [0, 1).
func unit(h uint64) float64 { return float64(h>>11) / (1 << 53) }

// mix64 is the finalizer of SplitMix64: every decision of a stream is a hash of
// what it is about, so that nothing of it needs to be remembered.
func mix64(x uint64) uint64 {
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

func hash(parts ...uint64) uint64 {
	var h uint64
	for _, p := range parts {
		h = mix64(h + p + 0x9e3779b97f4a7c15)
	}
	return h
}

// What hashes are about.
const (
	aboutKind = iota + 1
	aboutFill
	aboutContent
	aboutPool
	aboutResend
	aboutFlip
	aboutRecord
	aboutName
	aboutPart
	aboutOrder
	aboutTail
	aboutPatch
)

// fillRandom fills b, whose length is a multiple of 8, from a hash.
func fillRandom(b []byte, h uint64) {
	for i := 0; i < len(b); i += 8 {
		h += 0x9e3779b97f4a7c15
		binary.LittleEndian.PutUint64(b[i:], mix64(h))
	}
}

// phrases is what Text pages are made of.
var phrases = func() (p [64][24]byte) {
	const letters = "etaoin shrdlu\ncmfwyp"
	for i := range p {
		for j := range p[i] {
			p[i][j] = letters[hash(uint64(i), uint64(j))%uint64(len(letters))]
		}
	}
	return p
}()

func fillText(b []byte, h uint64) {
	for len(b) > 0 {
		h += 0x9e3779b97f4a7c15
		b = b[copy(b, phrases[mix64(h)%uint64(len(phrases))][:]):]
	}
}

// state is a page after a pass in which it was sent.
type state struct {
	kind Kind
	fill byte   // Zero
	seed uint64 // of the content
	// patched is the pass whose few changed bytes lie over the content of
	// seed; 0 is none.
	patched uint64
}

// state returns what a page is after the given pass, in which it is sent.
func (s *Stream) state(pass int, block int, page uint64) state {
	id := hash(s.o.Seed, uint64(block), (page+s.o.Move)%s.Pages(block))
	st := state{kind: s.o.Mix.pick(hash(id, aboutKind)), seed: hash(id, aboutContent)}
	if pass > 0 && st.kind != Absent {
		// Between passes a guest clears pages, fills cleared ones, moves
		// content from page to page, and most often changes a few bytes.
		h := hash(id, aboutFlip, uint64(pass))
		switch u := unit(h); {
		case u < 0.1:
			st.kind = Zero
		case u < 0.15:
			st.kind = ZeroData
		case u < 0.35:
			st.kind, st.seed = Duplicate, h
		case u < 0.45 || st.kind == Zero || st.kind == ZeroData:
			st.kind, st.seed = Text, h
		default:
			st.patched = uint64(pass)
		}
	}
	if st.kind == Zero && s.o.Fill {
		if h := hash(id, aboutFill, uint64(pass)); h%4 == 0 {
			st.fill = byte(h >> 8)
		}
	}
	return st
}

// content writes what a page holds in a state.
func (s *Stream) content(dst []byte, st state) {
	switch st.kind {
	case Absent, ZeroData:
		clear(dst)
	case Zero:
		for i := range dst {
			dst[i] = st.fill
		}
	case Duplicate:
		fillText(dst, hash(s.o.Seed, aboutPool, 1+st.seed%uint64(s.o.Pool)))
	case Random:
		fillRandom(dst, st.seed)
	case Text:
		fillText(dst, st.seed)
		// So that no two are alike by chance.
		binary.LittleEndian.PutUint64(dst[len(dst)/2:], st.seed)
	case Sparse:
		clear(dst)
		at := st.seed % uint64(len(dst)/64) * 64
		fillRandom(dst[at:at+64], st.seed)
	case Alike:
		copy(dst, s.alike)
		at := st.seed % uint64(len(dst)/8) * 8
		binary.LittleEndian.PutUint64(dst[at:], st.seed)
	}
	if s.o.Slide > 0 && (st.kind == Random || st.kind == Text) {
		turned := append(bytes.Clone(dst[s.o.Slide:]), dst[:s.o.Slide]...)
		copy(dst, turned)
	}
	if st.patched != 0 {
		for i := range 3 {
			h := hash(st.seed, aboutPatch, st.patched, uint64(i))
			at := h % uint64(len(dst)/16) * 16
			binary.LittleEndian.PutUint64(dst[at:], mix64(h))
		}
	}
}
