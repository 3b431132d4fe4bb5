package dedup

import (
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/flic-migrate/flic-migrate/tier/digest"
)

// chunks is a Source of chunks by place.
type chunks struct {
	at      map[Place][]byte
	stale   map[Place]bool
	fetched []Place
	err     error
}

func (c *chunks) Fetch(p Place) ([]byte, error) {
	c.fetched = append(c.fetched, p)
	return c.at[p], c.err
}

func (c *chunks) Stale(p Place) bool { return c.stale[p] }

func newIndex(chunk, sample, maxFull int) (*Index, *chunks) {
	c := &chunks{at: map[Place][]byte{}, stale: map[Place]bool{}}
	return New(chunk, sample, maxFull, digest.Fresh(), c), c
}

// put finds or adds a chunk as a save does, and tells where it is.
func put(t testing.TB, x *Index, c *chunks, b []byte, at Place) (place Place, found bool) {
	t.Helper()
	place, found, pending, err := x.Find(b, digest.Sum{})
	if err != nil {
		t.Fatal(err)
	}
	if found {
		return place, true
	}
	c.at[at] = b
	x.Add(pending, at)
	return at, false
}

func randomChunk(n int, seed uint64) []byte {
	rng := rand.New(rand.NewPCG(seed, 9))
	b := make([]byte, n)
	for i := 0; i < n; i += 8 {
		binary.LittleEndian.PutUint64(b[i:], rng.Uint64())
	}
	return b
}

// TestSamplePositions holds the positions fixed: they may change only on
// purpose, with the measurement in docs/lab/performance.md.
func TestSamplePositions(t *testing.T) {
	s := NewSampler(4096, 64)
	want := []int{136, 1016, 1416, 1896, 2320, 2664, 3280, 3680}
	if !slices.Equal(s.offsets, want) {
		t.Errorf("positions of 64 bytes in 4096: %v", s.offsets)
	}
	if again := NewSampler(4096, 64); !slices.Equal(again.offsets, s.offsets) {
		t.Error("another Sampler has other positions")
	}
	// One in each of as many equal stretches, whatever the sizes.
	for _, c := range []struct{ chunk, sample, size int }{
		{4096, 256, 256}, {8192, 256, 256}, {1024, 8, 8}, {4096, 1, 8}, {4096, 0, 8}, {4096, 20, 16},
		{1024, 4096, 1024}, {4096, 4096, 4096}, {65536, 1000, 1000},
	} {
		s := NewSampler(c.chunk, c.sample)
		if s.Size() != c.size {
			t.Errorf("sample of %d in %d: %d bytes", c.sample, c.chunk, s.Size())
		}
		n := len(s.offsets)
		for i, off := range s.offsets {
			word, words := off/8, c.chunk/8
			if off%8 != 0 || word < i*words/n || word >= (i+1)*words/n {
				t.Errorf("sample of %d in %d: position %d is %d", c.sample, c.chunk, i, off)
			}
		}
	}
}

// TestSampleSees changes each byte: within the sample the sum changes, outside
// it does not.
func TestSampleSees(t *testing.T) {
	s := NewSampler(1024, 128)
	b := randomChunk(1024, 1)
	sum := s.Sum(b)
	for i := range b {
		sampled := slices.Contains(s.offsets, i&^7)
		b[i] ^= 0x10
		if (s.Sum(b) != sum) != sampled {
			t.Errorf("byte %d, sampled %v: sum %x and %x", i, sampled, s.Sum(b), sum)
		}
		b[i] ^= 0x10
	}
}

// TestEqualChunks counts what a group of equal chunks costs: the first is
// fetched and hashed once, each other is hashed.
func TestEqualChunks(t *testing.T) {
	x, c := newIndex(4096, 256, 100)
	a, b := randomChunk(4096, 1), randomChunk(4096, 2)
	for i := range 10 {
		if at, found := put(t, x, c, slices.Clone(a), Place(100+i)); found != (i > 0) || at != 100 {
			t.Errorf("chunk %d: found %v at %d", i, found, at)
		}
		if _, found := put(t, x, c, randomChunk(4096, uint64(50+i)), Place(200+i)); found {
			t.Error("found a chunk that was never there")
		}
	}
	put(t, x, c, b, 300)
	if len(c.fetched) != 1 || x.Fetched != 1 || x.Met != 9 || x.HashedBytes != 10*4096 || x.SampledBytes != 21*256 {
		t.Errorf("fetched %v, met %d, %d bytes hashed, %d sampled", c.fetched, x.Met, x.HashedBytes, x.SampledBytes)
	}
}

// TestFalseMeet has chunks that agree in the sample and nowhere else.
func TestFalseMeet(t *testing.T) {
	x, c := newIndex(4096, 64, 100)
	base := randomChunk(4096, 1)
	outside := 0
	for slices.Contains(x.sampler.offsets, outside) {
		outside += 8
	}
	variant := func(i int) []byte {
		b := slices.Clone(base)
		b[outside] = byte(i)
		return b
	}
	for i := range 20 {
		if _, found := put(t, x, c, variant(i), Place(i)); found {
			t.Fatalf("variant %d taken for another", i)
		}
	}
	if x.Met != 19 || x.Fetched != 1 {
		t.Errorf("met %d, fetched %d", x.Met, x.Fetched)
	}
	for i := range 20 {
		if at, found := put(t, x, c, variant(i), 999); !found || at != Place(i) {
			t.Errorf("variant %d found %v at %d", i, found, at)
		}
	}
}

// TestStale never returns a place whose content has changed, and finds the
// content again once it is somewhere else.
func TestStale(t *testing.T) {
	a := randomChunk(4096, 1)
	for _, hashedBefore := range []bool{false, true} {
		x, c := newIndex(4096, 256, 100)
		put(t, x, c, a, 1)
		if hashedBefore {
			if at, found := put(t, x, c, a, 99); !found || at != 1 {
				t.Fatal("not found")
			}
		}
		c.at[1], c.stale[1] = randomChunk(4096, 2), true
		if at, found := put(t, x, c, a, 2); found {
			t.Errorf("found at %d, which has changed", at)
		}
		if at, found := put(t, x, c, a, 3); !found || at != 2 {
			t.Errorf("found %v at %d, want 2", found, at)
		}
		for _, p := range c.fetched {
			if hashedBefore == false && p == 1 {
				t.Error("a stale place was fetched")
			}
		}
	}
}

// TestLimits keeps no more full hashes than it may, and finds less then.
func TestLimits(t *testing.T) {
	x, c := newIndex(1024, 8, 5)
	base := randomChunk(1024, 1)
	variant := func(i int) []byte {
		b := slices.Clone(base)
		for x.sampler.offsets[0] == 0 {
			t.Fatal("the first word is sampled")
		}
		b[0], b[1] = byte(i), byte(i>>8)
		return b
	}
	for i := range 300 {
		put(t, x, c, variant(i), Place(i))
	}
	if len(x.full) > 5 || len(x.hashed) > 5 {
		t.Errorf("%d full hashes, %d places", len(x.full), len(x.hashed))
	}
	if at, found := put(t, x, c, variant(0), 999); !found || at != 0 {
		t.Errorf("the first is found %v at %d", found, at)
	}
	if _, found := put(t, x, c, variant(299), 999); found {
		t.Error("found beyond the limit")
	}
	// A place that an entry has no room for is not kept.
	x, c = newIndex(1024, 64, 5)
	put(t, x, c, base, MaxPlace+1)
	if _, found := put(t, x, c, base, 7); found {
		t.Error("found at a place that can't be kept")
	}
	if at, found := put(t, x, c, base, 8); !found || at != 7 {
		t.Errorf("found %v at %d", found, at)
	}
	x, c = newIndex(1024, 64, 5)
	put(t, x, c, base, MaxPlace)
	if at, found := put(t, x, c, base, 1); !found || at != MaxPlace {
		t.Errorf("the last place: found %v at %d", found, at)
	}
}

// TestMany fills the table far beyond its first size and finds everything, with
// no more memory than promised.
func TestMany(t *testing.T) {
	const n = 200_000
	x, c := newIndex(64, 64, n)
	chunk := func(i int) []byte { return randomChunk(64, uint64(i)) }
	for i := range n {
		if at, found := put(t, x, c, chunk(i), Place(i)); found {
			t.Fatalf("chunk %d found at %d", i, at)
		}
	}
	if per := float64(8*len(x.partial)) / n; per > 15.1 || x.used > n {
		t.Errorf("%.1f bytes a chunk", per)
	}
	for i := 0; i < n; i += 37 {
		if at, found := put(t, x, c, chunk(i), 0); !found || at != Place(i) {
			t.Fatalf("chunk %d: found %v at %d", i, found, at)
		}
	}
}

// TestFetchFails passes the source's error on.
func TestFetchFails(t *testing.T) {
	x, c := newIndex(1024, 64, 5)
	a := randomChunk(1024, 1)
	put(t, x, c, a, 1)
	c.err = errors.New("medium error")
	if _, _, _, err := x.Find(a, digest.Sum{}); err != c.err {
		t.Errorf("Find: %v", err)
	}
}

// TestZeroSum has a partial hash whose kept bits are zero, which marks a free
// bucket.
func TestZeroSum(t *testing.T) {
	x, c := newIndex(8, 8, 10)
	b := binary.LittleEndian.AppendUint64(nil, 0x1e5e1707)
	if x.sampler.Sum(b)>>placeBits != 0 {
		t.Fatal("the partial hash is another one now")
	}
	put(t, x, c, b, 0)
	if at, found := put(t, x, c, b, 5); !found || at != 0 {
		t.Errorf("found %v at %d", found, at)
	}
}

func BenchmarkFindNew(b *testing.B) {
	x, _ := newIndex(4096, DefaultSampleSize, 1000)
	page := randomChunk(4096, 1)
	b.SetBytes(4096)
	for i := 0; b.Loop(); i++ {
		binary.LittleEndian.PutUint64(page[x.sampler.offsets[0]:], uint64(i))
		if _, _, p, err := x.Find(page, digest.Sum{}); err != nil {
			b.Fatal(err)
		} else if x.used < 1<<20 {
			x.Add(p, Place(i))
		}
	}
}

// TestKnownDigest has a digest that the caller knows: it is not made again.
func TestKnownDigest(t *testing.T) {
	x, c := newIndex(4096, 256, 100)
	a := randomChunk(4096, 1)
	sum := x.digest.Sum(a)
	for i := range 3 {
		at, found, pending, err := x.Find(a, sum)
		if err != nil || found != (i > 0) || pending.Digest != sum {
			t.Fatalf("chunk %d: found %v, digest %x, %v", i, found, pending.Digest, err)
		}
		if !found {
			c.at[at] = a
			x.Add(pending, at)
		}
	}
	if x.HashedBytes != 4096 || len(c.fetched) != 1 { // of the stored one
		t.Errorf("%d bytes hashed, fetched %v", x.HashedBytes, c.fetched)
	}
}
