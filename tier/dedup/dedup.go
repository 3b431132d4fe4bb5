// Package dedup finds pages of equal content as FLIC's Algorithm III.1 does:
// a partial hash over fixed sample positions for every chunk, a full hash only
// for chunks whose partial hashes meet.
//
//	chunk ─► partial hash ─┬─ seen by nobody ─► remember its place; done
//	                       └─ met ─► full hash ─┬─ known ─► same content
//	                                            └─ new ─► remember
//
// The paper has all of RAM before it when two partial hashes meet. A save has
// only the page in hand: the first chunk with that partial hash has left for
// its tier. It is fetched back once, hashed, and from then on its full hash is
// known, so that a group of n equal chunks costs one fetch and n full hashes.
//
// The full hash is the digest by which pages are known elsewhere too (package digest),
// with a key that nobody inside the guest knows: who could find collisions could make
// pages be called equal that are not. It is four times as fast as a hash that
// needs no key.
package dedup

import (
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"slices"

	"github.com/cespare/xxhash/v2"

	"github.com/flic-migrate/flic-migrate/tier/digest"
)

// DefaultSampleSize is the number of bytes that a partial hash looks at.
// docs/lab/performance.md has the measurement: below it, pages that merely look
// alike cost more in full hashes than the shorter sample saves.
const DefaultSampleSize = 256

const wordLen = 8

// Sampler computes partial hashes of chunks of one size.
type Sampler struct {
	offsets []int // of 8-byte words, rising
	buf     []byte
}

// NewSampler returns a Sampler that takes sampleSize bytes (rounded to 8-byte
// words, at least one, at most the chunk) from each chunk of chunkSize bytes.
// The positions are the same for every save: fixed, but spread without a
// pattern that a data structure's stride could hide behind.
func NewSampler(chunkSize, sampleSize int) *Sampler {
	words := chunkSize / wordLen
	n := max(1, min(sampleSize/wordLen, words))
	rng := rand.New(rand.NewPCG(0x464c4943, uint64(chunkSize)))
	// One position out of each of n equal stretches: a chunk that differs
	// from another over more than two stretches can't escape the sample.
	s := &Sampler{offsets: make([]int, n), buf: make([]byte, n*wordLen)}
	for i := range s.offsets {
		lo, hi := i*words/n, (i+1)*words/n
		s.offsets[i] = (lo + rng.IntN(hi-lo)) * wordLen
	}
	slices.Sort(s.offsets)
	return s
}

// Size is the number of bytes sampled from a chunk.
func (s *Sampler) Size() int { return len(s.buf) }

// Sum is the partial hash of a chunk of the Sampler's chunk size. Not safe for
// concurrent use.
func (s *Sampler) Sum(chunk []byte) uint64 {
	for i, off := range s.offsets {
		binary.NativeEndian.PutUint64(s.buf[i*wordLen:], binary.NativeEndian.Uint64(chunk[off:]))
	}
	return xxhash.Sum64(s.buf)
}

// Place is where a stored chunk is: a number of the caller's, up to MaxPlace.
type Place uint64

const (
	placeBits = 34
	// MaxPlace is the largest Place an Index keeps.
	MaxPlace = 1<<placeBits - 1
	hashBits = 64 - placeBits
)

// ErrGone is Fetch's answer if a stored chunk can't be read back. The Index
// then takes the chunk in hand for a new one.
var ErrGone = errors.New("stored chunk can't be read back")

// Source is where an Index finds stored chunks again.
type Source interface {
	// Fetch returns the content of a stored chunk, valid until the next call.
	Fetch(Place) ([]byte, error)
	// Stale tells whether a place holds something else than when it was
	// added, such as an NVRAM slot whose page was sent again.
	Stale(Place) bool
}

// Index finds the place of a chunk that equals one in hand. It has one owner.
//
// Memory: 8 B at a load of 0.53 to 0.8, so at most 15 B for each chunk added,
// and besides that full hashes for the chunks whose partial hashes met, of
// which it keeps no more than the maximum given to New; chunks beyond that are
// not found again, which costs space and never correctness.
type Index struct {
	sampler *Sampler
	digest  *digest.Hasher
	src     Source

	// partial is an open-addressed table of hashBits bits of the partial hash
	// above placeBits bits of the place. 0 is a free bucket: sum avoids it.
	partial []uint64
	used    int
	full    map[digest.Sum]Place
	maxFull int
	// hashed marks the places in partial whose chunk is in full as well.
	hashed map[Place]struct{}

	// Counters for the report.
	SampledBytes, HashedBytes, Met, Fetched int64
}

const firstTable = 1 << 10

// New returns an empty Index for chunks of chunkSize bytes which keeps at most
// maxFull full hashes, made by h.
func New(chunkSize, sampleSize, maxFull int, h *digest.Hasher, src Source) *Index {
	return &Index{
		sampler: NewSampler(chunkSize, sampleSize), digest: h, src: src, maxFull: maxFull,
		partial: make([]uint64, firstTable),
		full:    make(map[digest.Sum]Place), hashed: make(map[Place]struct{}),
	}
}

// Pending is a chunk that Find did not know. Add gives it a place.
type Pending struct {
	// Digest is the chunk's full hash if it was given or made, else zero.
	Digest digest.Sum

	sum uint64
	met bool
}

// Find looks for a stored chunk that equals the one in hand, whose full hash is given if
// it is known, zero otherwise. If there is none, the caller stores the chunk and calls Add
// with the place and what Find returned.
func (x *Index) Find(chunk []byte, known digest.Sum) (Place, bool, Pending, error) {
	p := Pending{Digest: known, sum: x.sum(chunk)}
	first, met := x.lookup(p.sum)
	if !met {
		return 0, false, p, nil
	}
	x.Met++
	p.met = true
	if _, done := x.hashed[first]; !done {
		if err := x.hashStored(first); err != nil {
			return 0, false, p, err
		}
	}
	if p.Digest == (digest.Sum{}) {
		x.hash(&p.Digest, chunk)
	}
	place, ok := x.full[p.Digest]
	if ok && x.src.Stale(place) {
		delete(x.full, p.Digest)
		ok = false
	}
	return place, ok, p, nil
}

// Add says where the chunk of a Find without success has been stored.
func (x *Index) Add(p Pending, place Place) {
	if place > MaxPlace {
		return
	}
	if p.met {
		x.remember(p.Digest, place)
		return
	}
	if 5*(x.used+1) > 4*len(x.partial) {
		old := x.partial
		x.partial = make([]uint64, len(old)+len(old)/2)
		for _, e := range old {
			if e != 0 {
				x.insert(e)
			}
		}
	}
	x.insert(p.sum<<placeBits | uint64(place))
	x.used++
}

// sum is the partial hash, cut to the bits that the table keeps.
func (x *Index) sum(chunk []byte) uint64 {
	x.SampledBytes += int64(x.sampler.Size())
	if s := x.sampler.Sum(chunk) >> placeBits; s != 0 {
		return s
	}
	return 1
}

func (x *Index) hashStored(place Place) error {
	if len(x.hashed) >= x.maxFull {
		return nil
	}
	x.hashed[place] = struct{}{}
	if x.src.Stale(place) {
		return nil
	}
	x.Fetched++
	b, err := x.src.Fetch(place)
	switch {
	case errors.Is(err, ErrGone):
		return nil
	case err == nil:
		var h digest.Sum
		x.hash(&h, b)
		x.remember(h, place)
	}
	return err
}

func (x *Index) hash(h *digest.Sum, b []byte) {
	x.HashedBytes += int64(len(b))
	x.digest.Put(h, b)
}

func (x *Index) remember(h digest.Sum, place Place) {
	if _, ok := x.full[h]; !ok && len(x.full) < x.maxFull {
		x.full[h] = place
	}
}

// bucket maps the kept bits of a partial hash to a table of any length.
func (x *Index) bucket(sum uint64) int {
	return int(sum * uint64(len(x.partial)) >> hashBits)
}

func (x *Index) lookup(sum uint64) (Place, bool) {
	for i := x.bucket(sum); ; {
		e := x.partial[i]
		if e == 0 {
			return 0, false
		}
		if e>>placeBits == sum {
			return Place(e & MaxPlace), true
		}
		if i++; i == len(x.partial) {
			i = 0
		}
	}
}

func (x *Index) insert(e uint64) {
	i := x.bucket(e >> placeBits)
	for x.partial[i] != 0 {
		if i++; i == len(x.partial) {
			i = 0
		}
	}
	x.partial[i] = e
}
