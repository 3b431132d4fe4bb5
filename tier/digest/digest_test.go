package digest

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
)

// The empty message of GCM's test case 1 (McGrew and Viega, The Galois/Counter Mode of
// Operation) and of BLAKE3's keyed test vectors.
func TestVectors(t *testing.T) {
	for _, c := range []struct {
		a         Algorithm
		key, want string
	}{
		{GMAC, strings.Repeat("\x00", KeyLen), "58e2fccefa7e3061367f1d57a4e7455a"},
		{BLAKE3, "whats the Elvish word for friend", "92b2b75604ed3c761f9d6f62392c8a92"},
	} {
		h, err := New(c.a, Key([]byte(c.key)))
		if err != nil {
			t.Fatal(err)
		}
		for range 2 { // a hasher that is used again begins anew
			h.Sum([]byte("something else"))
			if got := h.Sum(nil); hex.EncodeToString(got[:]) != c.want {
				t.Errorf("%s: %x, want %s", c.a, got, c.want)
			}
		}
	}
	if h, err := New("md5", Key{}); err == nil {
		t.Errorf("%v", h)
	}
}

func TestHasher(t *testing.T) {
	page := make([]byte, 4096)
	for _, a := range []Algorithm{GMAC, BLAKE3} {
		key := NewKey()
		h, err := New(a, key)
		if err != nil {
			t.Fatal(err)
		}
		seen := map[Sum]int{h.Sum(page): -1}
		for i := range page {
			page[i] ^= 1
			s := h.Sum(page)
			page[i] ^= 1
			if j, ok := seen[s]; ok {
				t.Errorf("%s: changes of bytes %d and %d have one digest", a, i, j)
			}
			seen[s] = i
		}
		same, _ := New(a, key)
		other, _ := New(a, NewKey())
		if same.Sum(page) != h.Sum(page) || !same.Same(h) || h.Algorithm() != a || h.Key() != key {
			t.Errorf("%s: a hasher of the same key makes other digests", a)
		}
		if other.Sum(page) == h.Sum(page) || other.Same(h) {
			t.Errorf("%s: the key makes no difference", a)
		}
		// Hashing takes no memory: a save does it for each page.
		var s Sum
		if n := testing.AllocsPerRun(100, func() { h.Put(&s, page) }); n > 1 {
			t.Errorf("%s: %v allocations a page", a, n)
		}
	}
	if Fresh().Same(Fresh()) || Fresh().Algorithm() != Best() {
		t.Error("keys are not fresh")
	}
}

func TestText(t *testing.T) {
	type doc struct {
		Key  Key
		Root Root
	}
	d := doc{Key: NewKey()}
	d.Root[3] = 7
	b, err := json.Marshal(d)
	if err != nil {
		t.Fatal(err)
	}
	var back doc
	if err := json.Unmarshal(b, &back); err != nil || back != d {
		t.Errorf("%s: %v, %v", b, back, err)
	}
	for _, bad := range []string{`{"Key":"00"}`, `{"Root":"zz` + strings.Repeat("0", 62) + `"}`, `{"Root":"` + strings.Repeat("0", 66) + `"}`} {
		if err := json.Unmarshal([]byte(bad), &back); err == nil {
			t.Errorf("%s is taken", bad)
		}
	}
}

// frames is what a Builder gives out.
type frames map[int][]byte

func (f frames) take(b *Builder) {
	for {
		c, ok := b.Next()
		if !ok {
			return
		}
		f[int(c.Number)] = c.Data
	}
}

func (f frames) read(n int) ([]byte, error) {
	if f[n] == nil {
		return nil, fmt.Errorf("no frame %d", n)
	}
	return f[n], nil
}

type badFrame struct {
	n   int
	err error
}

func (b *badFrame) Error() string { return fmt.Sprintf("frame %d: %v", b.n, b.err) }
func (b *badFrame) Unwrap() error { return b.err }

func bad(n int, err error) error { return &badFrame{n, err} }

// made builds the digests of an image whose segments come out of order, some of them
// short and some never.
func made(t testing.TB, perSegment, segments, nvram, disk int) (frames, Root, func(slot uint64) Sum, []Sum) {
	t.Helper()
	of := func(slot uint64) (s Sum) {
		n := slot / uint64(perSegment)
		if n%7 == 3 || n%5 == 2 && slot%uint64(perSegment) > 2 {
			return Sum{}
		}
		copy(s[:], fmt.Sprintf("%016d", slot+1))
		return s
	}
	b := NewBuilder(perSegment)
	f := frames{}
	order := rand.New(rand.NewPCG(1, 2)).Perm(segments)
	for _, n := range order {
		var sums []Sum
		for i := range perSegment {
			if s := of(uint64(n*perSegment + i)); s != (Sum{}) {
				sums = append(sums, s)
			}
		}
		b.Segment(uint32(n), sums, segmentSum(n))
		f.take(b)
	}
	slots := make([]Sum, nvram)
	for i := range slots {
		slots[i][0], slots[i][1], slots[i][2] = 1, byte(i), byte(i>>8)
	}
	root, err := b.Finish(slots, diskSums(disk))
	if err != nil {
		t.Fatal(err)
	}
	f.take(b)
	return f, root, of, slots
}

// segmentSum is the digest of a segment as it is stored. Each tenth has none.
func segmentSum(n int) (s Sum) {
	if n%10 != 9 {
		s[0], s[1], s[2] = 3, byte(n), byte(n>>8)
	}
	return s
}

// diskSums are the digests of n disk slots.
func diskSums(n int) []Sum {
	sums := make([]Sum, n)
	for i := range sums {
		sums[i][0], sums[i][1], sums[i][2] = 2, byte(i), byte(i>>8)
	}
	return sums
}

func TestTable(t *testing.T) {
	for _, c := range []struct{ perSegment, segments, nvram, disk int }{
		{32, 0, 0, 0}, {32, 1, 0, 0}, {32, 512, 1, 0}, {32, 1300, 20000, 0}, {6, 3000, 16384, 0}, {256, 65, 5, 0}, {1, 1, 1, 0},
		{32, 0, 0, 1}, {32, 1300, 20000, 40000}, {256, 65, 0, 16384},
	} {
		f, root, of, slots := made(t, c.perSegment, c.segments, c.nvram, c.disk)
		tab, err := Open(root, NewCache(2), f.read, bad)
		if err != nil {
			t.Fatalf("%+v: %v", c, err)
		}
		if tab.Flash != uint64(c.perSegment*c.segments) || tab.NVRAM != uint64(c.nvram) {
			t.Fatalf("%+v: %d and %d slots", c, tab.Flash, tab.NVRAM)
		}
		for slot := range tab.Flash {
			if got, err := tab.FlashSlot(slot); err != nil || got != of(slot) {
				t.Fatalf("%+v: slot %d: %x, %v", c, slot, got, err)
			}
		}
		for i := range tab.NVRAM {
			if got, err := tab.NVRAMSlot(i); err != nil || got != slots[i] {
				t.Fatalf("%+v: NVRAM slot %d: %x, %v", c, i, got, err)
			}
		}
		if v := f[0][0]; tab.Disk != uint64(c.disk) || tab.Segments != uint64(c.segments) || v != 3 {
			t.Errorf("%+v: %d disk slots, %d segments in version %d", c, tab.Disk, tab.Segments, v)
		}
		for i, want := range diskSums(c.disk) {
			if got, err := tab.DiskSlot(uint64(i)); err != nil || got != want {
				t.Fatalf("%+v: disk slot %d: %x, %v", c, i, got, err)
			}
		}
		for n := range c.segments + 1 {
			if got, err := tab.Segment(uint32(n)); err != nil || n < c.segments && got != segmentSum(n) || n == c.segments && got != (Sum{}) {
				t.Fatalf("%+v: segment %d: %x, %v", c, n, got, err)
			}
		}
		if _, err := tab.DiskSlot(tab.Disk); err == nil {
			t.Errorf("%+v: a disk slot that does not exist has a digest", c)
		}
		if _, err := tab.FlashSlot(tab.Flash); err == nil {
			t.Errorf("%+v: a slot that does not exist has a digest", c)
		}
		if _, err := tab.NVRAMSlot(1 << 60); err == nil {
			t.Errorf("%+v: an NVRAM slot that does not exist has a digest", c)
		}
	}
}

// TestChunksLeave looks at what a Builder keeps while a long image is written with one
// segment open from its beginning: a chunk for that one, and one for those of now.
func TestChunksLeave(t *testing.T) {
	b := NewBuilder(32)
	f := frames{}
	sums := make([]Sum, 32)
	for n := uint32(1); n < 5000; n++ {
		b.Segment(n, sums, Sum{})
		if len(b.open) > 2 {
			t.Fatalf("%d chunks are kept", len(b.open))
		}
		f.take(b)
	}
	if len(f) != 8 {
		t.Errorf("%d chunks have left", len(f))
	}
}

// TestCache has many goroutines look for digests, some of them beside each other and each with
// a table of its own: of a chunk that is kept none waits for another chunk to be read, and what
// they all want is read once.
func TestCache(t *testing.T) {
	f, root, of, _ := made(t, 32, 1300, 0, 0)
	var mu sync.Mutex
	reads := make(map[int]int)
	slow, goOn := make(chan struct{}), make(chan struct{})
	tab, err := Open(root, NewCache(2), func(frame int) ([]byte, error) {
		mu.Lock()
		reads[frame]++
		mu.Unlock()
		if frame == 2 {
			close(slow)
			<-goOn
		}
		return f.read(frame)
	}, bad)
	if err != nil {
		t.Fatal(err)
	}
	check := func(tab *Table, slot uint64) {
		if s, err := tab.FlashSlot(slot); err != nil || s != of(slot) {
			t.Errorf("slot %d: %x, %v", slot, s, err)
		}
	}
	var wg sync.WaitGroup
	for i := range uint64(4) {
		wg.Go(func() { check(tab, PerChunk+i) })
	}
	<-slow
	for i := range uint64(100) {
		check(tab, i)
	}
	close(goOn)
	wg.Wait()
	for range 4 {
		wg.Go(func() {
			one := tab.One(new(Near))
			for i := range uint64(1000) {
				check(one, i*37%(2*PerChunk))
			}
		})
	}
	wg.Wait()
	if reads[1] != 1 || reads[2] != 1 {
		t.Errorf("chunks were read so often: %v", reads)
	}
	// What is held is right, too, when the cache has others.
	one := tab.One(new(Near))
	check(one, 5)
	check(tab, PerChunk)
	check(tab, 2*PerChunk)
	check(one, 6)
	check(one, PerChunk+6)
}

// TestBrokenOff has reading a chunk end in a panic: it is an error for who waits for it, and is
// tried again.
func TestBrokenOff(t *testing.T) {
	f, root, of, _ := made(t, 32, 1300, 0, 0)
	broken := true
	tab, err := Open(root, NewCache(2), func(frame int) ([]byte, error) {
		if frame == 1 && broken {
			panic("as the medium has an error")
		}
		return f.read(frame)
	}, bad)
	if err != nil {
		t.Fatal(err)
	}
	func() {
		defer func() {
			if recover() == nil {
				t.Error("no panic")
			}
		}()
		tab.FlashSlot(0)
	}()
	if _, err := tab.FlashSlot(0); !errors.Is(err, errNotLoaded) {
		t.Error(err)
	}
	broken = false
	if s, err := tab.FlashSlot(0); err != nil || s != of(0) {
		t.Errorf("%x, %v", s, err)
	}
}

func TestDamage(t *testing.T) {
	f, root, of, _ := made(t, 32, 1300, 20000, 0)
	want := func(err error, frame int) {
		t.Helper()
		var b *badFrame
		if !errors.As(err, &b) || b.n != frame {
			t.Errorf("%v in place of damage in frame %d", err, frame)
		}
	}
	// A root that is not the table's, as of another image with the same UUID.
	other := root
	other[9] ^= 1
	_, err := Open(other, NewCache(1), f.read, bad)
	want(err, 0)
	if !errors.Is(err, ErrMismatch) {
		t.Error(err)
	}
	// A chunk whose checksum was put right again.
	f[2][77] ^= 1
	tab, err := Open(root, NewCache(8), f.read, bad)
	if err != nil {
		t.Fatal(err)
	}
	if s, err := tab.FlashSlot(5); err != nil || s != of(5) {
		t.Error(s, err)
	}
	_, err = tab.FlashSlot(PerChunk + 5)
	want(err, 2)
	f[2][77] ^= 1
	if s, err := tab.FlashSlot(PerChunk + 5); err != nil || s != of(PerChunk+5) {
		t.Error("damage is remembered:", s, err)
	}
	f[3] = f[3][:len(f[3])-Size]
	_, err = tab.FlashSlot(2*PerChunk + 5)
	want(err, 3)
	delete(f, 4)
	if _, err = tab.NVRAMSlot(0); err == nil {
		t.Error("a chunk that is missing is not missed")
	}
	// Tables that lie, with the root to them.
	withDisk, _, _, _ := made(t, 32, 1300, 20000, 40000)
	le := map[bool][]byte{false: f[0], true: withDisk[0]}
	for name, change := range map[string]func(b []byte) []byte{
		"empty":       func(b []byte) []byte { return nil },
		"short":       func(b []byte) []byte { return b[:tableHeadLen-1] },
		"version":     func(b []byte) []byte { b[0] = 4; return b },
		"disk slots":  func(b []byte) []byte { b[0] = 2; return b },
		"disk, short": func(b []byte) []byte { return append([]byte{2}, b[1:diskHeadLen-1]...) },
		"disk, none":  func(b []byte) []byte { clear(b[24:32]); return b },
		"disk, fewer": func(b []byte) []byte { return b[:len(b)-hashLen] },
		"disk, more":  func(b []byte) []byte { b[31] = 0xff; return b },
		"disk, as 1":  func(b []byte) []byte { b[0] = 1; return b },
		"reserved":    func(b []byte) []byte { b[4] = 1; return b },
		"cut":         func(b []byte) []byte { return b[:len(b)-1] },
		"fewer":       func(b []byte) []byte { return b[:len(b)-hashLen] },
		"more":        func(b []byte) []byte { return append(b, make([]byte, hashLen)...) },
		"many slots":  func(b []byte) []byte { b[15] = 0xff; return b },
		"many nvram":  func(b []byte) []byte { b[23] = 0xff; return b },
		"segments":    func(b []byte) []byte { b[32]++; b[34] = 1; return b },
		"end of head": func(b []byte) []byte { return b[:tableHeadLen] },
		"more, of 64": func(b []byte) []byte { b[15], b[23] = 0x80, 0x80; return b },
	} {
		b := change(append([]byte(nil), le[strings.HasPrefix(name, "disk,")]...))
		_, err := Open(sum256(b), NewCache(1), func(int) ([]byte, error) { return b, nil }, bad)
		if err == nil {
			t.Errorf("%s: taken", name)
			continue
		}
		want(err, 0)
	}
}

// TestOlder reads tables of earlier versions.
func TestOlder(t *testing.T) {
	for version, disk := range map[byte]int{tablePlain: 0, tableWithDisk: 5} {
		f, _, of, slots := made(t, 32, 3, 2, disk)
		now := f[0]
		old := append([]byte{version}, now[1:plainHeadLen]...)
		if version == tableWithDisk {
			old = append(old, now[plainHeadLen:diskHeadLen]...)
		}
		old = append(old, now[tableHeadLen:len(now)-hashLen]...) // without the segments' chunk
		f[0] = old
		tab, err := Open(sum256(old), NewCache(2), f.read, bad)
		if err != nil {
			t.Fatalf("version %d: %v", version, err)
		}
		if s, err := tab.FlashSlot(5); err != nil || s != of(5) {
			t.Errorf("version %d: %x, %v", version, s, err)
		}
		if s, err := tab.NVRAMSlot(1); err != nil || s != slots[1] || tab.Disk != uint64(disk) {
			t.Errorf("version %d: %x, %d disk slots, %v", version, s, tab.Disk, err)
		}
		if s, err := tab.Segment(0); err != nil || s != (Sum{}) {
			t.Errorf("version %d: a segment has digest %x, %v", version, s, err)
		}
	}
}

func TestTooMany(t *testing.T) {
	b := NewBuilder(256)
	b.flash = (maxChunks + 1) * PerChunk
	if _, err := b.Finish(nil, nil); !errors.Is(err, ErrTooMany) {
		t.Error(err)
	}
}

func FuzzOpen(f *testing.F) {
	fr, _, _, _ := made(f, 32, 3, 2, 5)
	f.Add(fr[0], uint64(3))
	old, _, _, _ := made(f, 32, 3, 2, 0)
	f.Add(old[0], uint64(3))
	f.Fuzz(func(t *testing.T, table []byte, slot uint64) {
		tab, err := Open(sum256(table), NewCache(1), func(n int) ([]byte, error) {
			if n == 0 {
				return table, nil
			}
			return fr.read(n)
		}, bad)
		if err != nil {
			return
		}
		tab.FlashSlot(slot)
		tab.NVRAMSlot(slot)
		tab.DiskSlot(slot)
	})
}

func BenchmarkSum(b *testing.B) {
	page := make([]byte, 4096)
	for _, a := range []Algorithm{GMAC, BLAKE3} {
		b.Run(string(a), func(b *testing.B) {
			h, err := New(a, NewKey())
			if err != nil {
				b.Fatal(err)
			}
			var s Sum
			b.SetBytes(int64(len(page)))
			for b.Loop() {
				h.Put(&s, page)
			}
		})
	}
}
