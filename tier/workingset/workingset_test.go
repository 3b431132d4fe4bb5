package workingset

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/flic-migrate/flic-migrate/tier/integrity"
)

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// naive is a working set as anybody would write it first: what Set computes on
// words is compared with it page by page.
type naive [][]uint8

// random makes a set whose heats come in clumps, as a guest's do, in blocks of
// awkward sizes, with heats up to top.
func random(seed uint64, top int) (*Set, naive) {
	rnd := rand.New(rand.NewPCG(seed, 1))
	var blocks []Block
	var n naive
	for i, pages := range []int64{1000, 0, 1, 63, 64, 65, 128, 4096 + 17} {
		blocks = append(blocks, Block{fmt.Sprintf("block%d", i), pages})
		n = append(n, make([]uint8, pages))
	}
	s := must(New(4096, blocks))
	for b, heats := range n {
		for p := 0; p < len(heats); {
			h := uint8(0)
			if rnd.IntN(2) == 0 {
				h = uint8(rnd.IntN(top + 1))
			}
			for range 1 + rnd.IntN(150) {
				if p < len(heats) {
					heats[p] = h
					s.SetHeat(b, int64(p), h)
					p++
				}
			}
		}
	}
	return s, n
}

// equal compares a set with a naive one through Heat.
func equal(t *testing.T, what string, s *Set, n naive) {
	t.Helper()
	if len(s.Blocks()) != len(n) {
		t.Fatalf("%s: %d blocks, want %d", what, len(s.Blocks()), len(n))
	}
	for b, heats := range n {
		if got := s.Blocks()[b].Pages; got != int64(len(heats)) {
			t.Fatalf("%s: block %d has %d pages, want %d", what, b, got, len(heats))
		}
		for p, h := range heats {
			if got := s.Heat(b, int64(p)); got != h {
				t.Fatalf("%s: block %d page %d has heat %d, want %d", what, b, p, got, h)
			}
		}
	}
}

var tops = []int{0, 1, 2, 3, 7, 8, 100, 255}

func TestHeat(t *testing.T) {
	for i, top := range tops {
		s, n := random(uint64(i), top)
		equal(t, fmt.Sprint("top ", top), s, n)
		// Cooler again.
		rnd := rand.New(rand.NewPCG(9, 9))
		for b := range n {
			for p := range n[b] {
				h := uint8(rnd.IntN(int(n[b][p]) + 1))
				n[b][p] = h
				s.SetHeat(b, int64(p), h)
			}
		}
		equal(t, "cooled", s, n)
	}
	s, _ := random(0, 1)
	for _, p := range []int64{-1, 1000} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("SetHeat of page %d of 1000", p)
				}
			}()
			s.SetHeat(0, p, 1)
		}()
	}
}

func TestHistogramAndThreshold(t *testing.T) {
	for i, top := range tops {
		s, n := random(uint64(i), top)
		var want [256]int64
		hot := int64(0)
		for _, heats := range n {
			for _, h := range heats {
				want[h]++
				if h > 0 {
					hot++
				}
			}
		}
		if got := s.Histogram(); got != want {
			t.Fatalf("top %d: histogram %v, want %v", top, got, want)
		}
		for _, budget := range []int64{-5, 0, 1, 2, 100, hot / 2, hot - 1, hot, hot + 1, 1 << 40} {
			lowest, atLowest := s.Threshold(budget)
			in, left := int64(0), atLowest
			cut := false // a page that is hot was left out
			for _, heats := range n {
				for _, h := range heats {
					switch {
					case h == 0:
					case h > lowest:
						in++
					case h == lowest && left > 0:
						in++
						left--
					default:
						cut = true
					}
				}
			}
			if in != min(max(budget, 0), hot) || left != 0 || cut != (in < hot) || lowest == 0 {
				t.Errorf("top %d, budget %d of %d hot: %d in; lowest %d, %d of it", top, budget, hot, in, lowest, atLowest)
			}
		}
	}
	// Hottest first, and of the last heat only some.
	s := must(New(4096, []Block{{"a", 10}}))
	for p, h := range []uint8{0, 5, 5, 9, 1, 5, 9, 0, 1, 2} {
		s.SetHeat(0, int64(p), h)
	}
	for budget, want := range []string{"255 0", "9 1", "9 2", "5 1", "5 2", "5 3", "2 1", "1 1", "1 2", "1 2"} {
		lowest, atLowest := s.Threshold(int64(budget))
		if got := fmt.Sprint(lowest, " ", atLowest); got != want {
			t.Errorf("budget %d: %s, want %s", budget, got, want)
		}
	}
}

func TestRuns(t *testing.T) {
	for i, top := range tops {
		s, n := random(uint64(i), top)
		for _, r := range [][2]uint8{{0, 0}, {1, 255}, {0, 255}, {1, 1}, {2, 3}, {3, 2}, {4, 200}, {255, 255}, {0, 7}} {
			for b, heats := range n {
				var want []Run
				in := false
				for p, h := range heats {
					switch hit := h >= r[0] && h <= r[1]; {
					case hit && in:
						want[len(want)-1].N++
					case hit:
						want = append(want, Run{First: int64(p), N: 1})
						in = true
					default:
						in = false
					}
				}
				if got := slices.Collect(s.Runs(b, r[0], r[1])); !slices.Equal(got, want) {
					t.Fatalf("top %d, heats %d-%d, block %d: %v, want %v", top, r[0], r[1], b, got, want)
				}
				for range s.Runs(b, r[0], r[1]) {
					break // the iterator must take no for an answer
				}
			}
		}
	}
	s := must(New(4096, []Block{{"huge", 1 << 39}}))
	if got := slices.Collect(s.Runs(0, 0, 3)); !slices.Equal(got, []Run{{First: 0, N: 1 << 39}}) {
		t.Errorf("%v", got)
	}
	if got := s.Histogram(); got[0] != 1<<39 {
		t.Errorf("%d cold", got[0])
	}
}

func TestBind(t *testing.T) {
	s, n := random(3, 9)
	v, err := s.Bind(4096, []Block{{"other", 5}, {"block7", 4096 + 17}, {"block0", 100}, {"block3", 200}, {"block5", 64}})
	if err != nil {
		t.Fatal(err)
	}
	want := naive{make([]uint8, 5), n[7], n[0][:100], append(slices.Clone(n[3]), make([]uint8, 200-63)...), n[5][:64]}
	equal(t, "bound", v, want)
	equal(t, "unbound", s, n)
	var pages, counted int64
	for _, b := range v.Blocks() {
		pages += b.Pages
	}
	for _, c := range v.Histogram() {
		counted += c
	}
	if pages != counted {
		t.Errorf("histogram has %d pages of %d: heat beyond the end of a block that shrank", counted, pages)
	}
	if _, err := s.Bind(8192, nil); err == nil {
		t.Error("another page size")
	}
	if _, err := s.Bind(4096, []Block{{"x", 1}, {"x", 1}}); err == nil {
		t.Error("two blocks of one name")
	}
}

// Sums of 64 heats at once are what sums of single heats are.
func TestAdd(t *testing.T) {
	for i, top := range tops {
		for _, by := range []uint8{0, 1, 2, 3, 7, 16, 100, 255} {
			a, heats := random(uint64(i), top)
			b, more := random(uint64(i)+50, 3)
			if err := a.Add(b, by); err != nil {
				t.Fatal(err)
			}
			for n := range heats {
				for p := range heats[n] {
					want := int(heats[n][p])
					if more[n][p] > 0 {
						want = min(want+int(by), 255)
					}
					if got := int(a.Heat(n, int64(p))); got != want {
						t.Fatalf("top %d, block %d, page %d: %d and %d make %d, want %d", top, n, p, heats[n][p], by, got, want)
					}
				}
			}
		}
	}
	a := must(New(4096, []Block{{"x", 70}, {"short", 3}}))
	b := must(New(4096, []Block{{"unknown", 5}, {"short", 100}, {"x", 10}}))
	b.SetHeat(0, 1, 1)
	b.SetHeat(1, 2, 1)
	b.SetHeat(1, 3, 1)
	b.SetHeat(2, 9, 200)
	if err := a.Add(b, 5); err != nil || a.Heat(0, 9) != 5 || a.Heat(1, 2) != 5 {
		t.Error(err, a.Heat(0, 9), a.Heat(1, 2))
	}
	if h := a.Histogram(); h[0] != 71 || h[5] != 2 {
		t.Errorf("%v", h)
	}
	if err := a.Add(must(New(8192, nil)), 1); err == nil {
		t.Error("another page size was taken")
	}
}

func TestMerge(t *testing.T) {
	for i, tops := range [][2]int{{1, 1}, {3, 200}, {200, 3}, {0, 5}, {5, 0}, {255, 255}} {
		a, na := random(uint64(i), tops[0])
		b, nb := random(uint64(i+100), tops[1])
		// Sizes and blocks that differ: b is short of one, and has one more.
		b = must(b.Bind(4096, []Block{{"new", 10}, {"block7", 5000}, {"block0", 500}, {"block6", 128}}))
		b.SetHeat(0, 3, uint8(tops[1]))
		heat := func(n naive, block, p int) uint8 {
			if p < len(n[block]) {
				return n[block][p]
			}
			return 0
		}
		want := naive{}
		for k := range na {
			size := len(na[k])
			if k == 7 {
				size = 5000
			}
			h := make([]uint8, size)
			for p := range h {
				h[p] = heat(na, k, p)
				if k == 7 || k == 6 || k == 0 && p < 500 {
					h[p] = max(h[p], heat(nb, k, p))
				}
			}
			want = append(want, h)
		}
		want = append(want, make([]uint8, 10))
		want[8][3] = uint8(tops[1])
		if err := a.Merge(b); err != nil {
			t.Fatal(err)
		}
		equal(t, fmt.Sprint("merged ", tops), a, want)
		if a.Blocks()[8].Name != "new" {
			t.Error("the new block has lost its name")
		}
	}
	a, na := random(1, 1)
	if err := a.Merge(must(New(8192, []Block{{"x", 1}}))); err == nil {
		t.Error("another page size")
	}
	equal(t, "after a refused merge", a, na)
}

func TestNew(t *testing.T) {
	for _, size := range []int{0, -4096, 512, 4095, 128 << 10} {
		if _, err := New(size, nil); err == nil {
			t.Errorf("page size %d", size)
		}
	}
	many := make([]Block, maxBlocks+1)
	for i := range many {
		many[i] = Block{fmt.Sprint(i), 1}
	}
	for name, blocks := range map[string][]Block{
		"no name":        {{"", 1}},
		"long name":      {{strings.Repeat("x", 256), 1}},
		"negative":       {{"x", -1}},
		"too large":      {{"x", maxPages + 1}},
		"one name twice": {{"x", 1}, {"y", 1}, {"x", 1}},
		"too many":       many,
	} {
		if _, err := New(4096, blocks); err == nil {
			t.Error(name)
		}
	}
	s, err := New(16384, []Block{{strings.Repeat("x", 255), 0}, {"y", 7}})
	if err != nil || s.PageSize() != 16384 || s.Blocks()[1] != (Block{"y", 7}) {
		t.Errorf("%v, %v", s, err)
	}
}

func encode(s *Set) []byte {
	var b bytes.Buffer
	if n := must(s.WriteTo(&b)); n != int64(b.Len()) {
		panic("WriteTo miscounts")
	}
	return b.Bytes()
}

func TestWriteRead(t *testing.T) {
	for i, top := range tops {
		s, n := random(uint64(i), top)
		b := encode(s)
		got, err := Read(iotest.OneByteReader(bytes.NewReader(b)))
		if err != nil {
			t.Fatal(err)
		}
		equal(t, fmt.Sprint("top ", top), got, n)
		if got.PageSize() != 4096 || !slices.Equal(got.Blocks(), s.Blocks()) {
			t.Errorf("%d, %v", got.PageSize(), got.Blocks())
		}
		if !bytes.Equal(encode(got), b) {
			t.Error("written again it is another file")
		}
	}
	// Heats that went down again leave no plane behind.
	s := must(New(4096, []Block{{"a", 800}}))
	before := len(encode(s))
	s.SetHeat(0, 1, 255)
	s.SetHeat(0, 1, 1)
	if got := len(encode(s)) - before; got != 100 {
		t.Errorf("one plane of 800 pages takes %d bytes", got)
	}
}

// TestFormat compares the file with its bytes as docs/format-workingset.md gives
// them.
func TestFormat(t *testing.T) {
	s := must(New(4096, []Block{{"pc.ram", 10}, {"rom", 3}}))
	for p, h := range []uint8{0, 3, 3, 1, 0, 0, 2, 3, 0, 1} {
		s.SetHeat(0, int64(p), h)
	}
	const want = "464c494357534554" + "01000000" + "00100000" + "02000000" + "0000000000000000" + "6fbd7032" +
		"0600" + "02" + "00" + "0a00000000000000" + "70632e72616d" + "8e02" + "c600" + "b6ac8a98" +
		"0300" + "00" + "00" + "0300000000000000" + "726f6d" + "a11904e7"
	if got := fmt.Sprintf("%x", encode(s)); got != want {
		t.Errorf("\n%s, want\n%s", got, want)
	}
}

// TestDamage flips every bit and cuts at every byte.
func TestDamage(t *testing.T) {
	s, _ := random(1, 3)
	b := encode(s)
	for bit := range len(b) * 8 {
		c := bytes.Clone(b)
		c[bit/8] ^= 1 << (bit % 8)
		_, err := Read(bytes.NewReader(c))
		var ce *integrity.CorruptError
		if !errors.As(err, &ce) || !integrity.IsCorrupt(err) {
			t.Fatalf("bit %d of byte %d: %v", bit%8, bit/8, err)
		}
		if ce.Offset < 0 || ce.Offset > int64(len(b)) || !strings.Contains(err.Error(), fmt.Sprintf("offset %d", ce.Offset)) {
			t.Fatalf("bit %d: %v", bit, err)
		}
	}
	for cut := range b {
		_, err := Read(bytes.NewReader(b[:cut]))
		var ce *integrity.CorruptError
		if !errors.As(err, &ce) || ce.Offset != int64(cut) {
			t.Fatalf("cut at %d: %v", cut, err)
		}
	}
	if _, err := Read(bytes.NewReader(append(bytes.Clone(b), 0))); !integrity.IsCorrupt(err) {
		t.Errorf("a byte more: %v", err)
	}
	broken := errors.New("broken")
	for _, at := range []int{0, 10, len(b) / 2, len(b)} {
		_, err := Read(io.MultiReader(bytes.NewReader(b[:at]), iotest.ErrReader(broken)))
		if !errors.Is(err, broken) || integrity.IsCorrupt(err) {
			t.Errorf("read error at %d: %v", at, err)
		}
	}
}

// seal makes the checksum at the end of b right.
func seal(b []byte) []byte {
	n := len(b) - 4
	binary.LittleEndian.PutUint32(b[n:], integrity.Checksum(b[:n]))
	return b
}

// TestLies has headers with the right checksum that claim too much.
func TestLies(t *testing.T) {
	header := func(version, pageSize, blocks uint32) []byte {
		b := append([]byte(magic), make([]byte, headerSize-8)...)
		binary.LittleEndian.PutUint32(b[8:], version)
		binary.LittleEndian.PutUint32(b[12:], pageSize)
		binary.LittleEndian.PutUint32(b[16:], blocks)
		return seal(b)
	}
	block := func(nameLen, planes int, pages uint64, rest string) []byte {
		b := binary.LittleEndian.AppendUint16(nil, uint16(nameLen))
		b = append(b, byte(planes), 0)
		b = binary.LittleEndian.AppendUint64(b, pages)
		return seal(append(append(b, rest...), 0, 0, 0, 0))
	}
	one := header(1, 4096, 1)
	for name, c := range map[string]struct {
		b   []byte
		off int64
	}{
		"version":       {header(2, 4096, 0), 8},
		"page size":     {header(1, 5000, 0), 12},
		"blocks":        {header(1, 4096, 1<<32-1), 16},
		"reserved":      {seal(append(append(bytes.Clone(one[:20]), 0, 0, 0, 0, 0, 0, 0, 1), 0, 0, 0, 0)), 20},
		"reserved byte": {append(one[:headerSize:headerSize], seal([]byte("\x01\x00\x00\x01\x03\x00\x00\x00\x00\x00\x00\x00x1234"))...), headerSize},
		"no block":      {one, headerSize},
		"name length":   {append(one[:headerSize:headerSize], block(256, 0, 1, strings.Repeat("x", 256))...), headerSize},
		"no name":       {append(one[:headerSize:headerSize], block(0, 0, 1, "")...), headerSize},
		"planes":        {append(one[:headerSize:headerSize], block(1, 9, 1, "x123456789")...), headerSize},
		"pages":         {append(one[:headerSize:headerSize], block(1, 1, 1<<63, "x")...), headerSize},
		"missing pages": {append(one[:headerSize:headerSize], block(1, 1, 1<<40, "x1234")...), headerSize + blockHeader + 1 + 4 + 4},
		"beyond end":    {append(one[:headerSize:headerSize], block(1, 1, 3, "x\x08")...), headerSize + blockHeader + 1},
		"beyond end 2":  {append(one[:headerSize:headerSize], block(1, 2, 70, "x12345678\x3f12345678\x40")...), headerSize + blockHeader + 1 + 17},
		"twice": {append(append(header(1, 4096, 2), block(1, 0, 3, "x")...), block(1, 0, 3, "x")...),
			headerSize + blockHeader + 1 + 4},
	} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err := Read(bytes.NewReader(c.b))
		runtime.ReadMemStats(&after)
		var ce *integrity.CorruptError
		if !errors.As(err, &ce) || ce.Offset != c.off {
			t.Errorf("%s: %v, want offset %d", name, err, c.off)
		}
		if got := after.TotalAlloc - before.TotalAlloc; got > 1<<20 {
			t.Errorf("%s: %d bytes allocated for a file of %d", name, got, len(c.b))
		}
	}
	if s, err := Read(bytes.NewReader(append(one[:headerSize:headerSize], block(1, 8, 3, "x12345678")[:]...))); !integrity.IsCorrupt(err) || s != nil {
		t.Errorf("heat beyond the end: %v", err)
	}
	if s, err := Read(bytes.NewReader(append(one[:headerSize:headerSize], block(1, 1, 6, "x\x3f")...))); err != nil || s.Heat(0, 5) != 1 {
		t.Errorf("a plain bitmap: %v", err)
	}
}

type failingWriter struct{ left int }

func (w *failingWriter) Write(b []byte) (int, error) {
	if len(b) > w.left {
		return w.left, io.ErrShortWrite
	}
	w.left -= len(b)
	return len(b), nil
}

func TestWriteError(t *testing.T) {
	s := must(New(4096, []Block{{"a", 1 << 20}}))
	s.SetHeat(0, 5, 1)
	for _, n := range []int{0, 100, 100_000} {
		if got, err := s.WriteTo(&failingWriter{n}); err == nil || got > int64(n) {
			t.Errorf("%d bytes accepted: %d, %v", n, got, err)
		}
	}
}

func FuzzRead(f *testing.F) {
	for i, top := range []int{0, 1, 3, 255} {
		s, _ := random(uint64(i), top)
		f.Add(encode(must(s.Bind(4096, []Block{{"block0", 100}, {"block4", 64}, {"r", 3}}))), false)
	}
	f.Add([]byte(magic), true)
	f.Fuzz(func(t *testing.T, b []byte, fix bool) {
		if fix {
			// Right checksums, or nearly nothing would get past them.
			b = bytes.Clone(b)
			if len(b) >= headerSize {
				seal(b[:headerSize])
			}
			for at := headerSize; at+blockHeader <= len(b); {
				pages := binary.LittleEndian.Uint64(b[at+4:])
				if pages > 1<<20 {
					break
				}
				n := blockHeader + int(binary.LittleEndian.Uint16(b[at:])) + int(b[at+2])*int((pages+7)/8) + 4
				if n > len(b)-at {
					break
				}
				seal(b[at:][:n])
				at += n
			}
		}
		s, err := Read(bytes.NewReader(b))
		if err != nil {
			if !integrity.IsCorrupt(err) {
				t.Fatal(err)
			}
			return
		}
		// What is accepted is consistent, and can be written and read again.
		var hot, counted, pages int64
		for i, blk := range s.Blocks() {
			pages += blk.Pages
			for r := range s.Runs(i, 1, 255) {
				if r.N <= 0 || r.First < 0 || r.First+r.N > blk.Pages {
					t.Fatalf("run %v of %d pages", r, blk.Pages)
				}
				hot += r.N
			}
		}
		h := s.Histogram()
		for _, c := range h {
			counted += c
		}
		if counted != pages || counted-h[0] != hot {
			t.Fatalf("%d pages, %d counted, %d hot, %d in runs", pages, counted, counted-h[0], hot)
		}
		again, err := Read(bytes.NewReader(encode(s)))
		if err != nil {
			t.Fatal(err)
		}
		if again.Histogram() != h {
			t.Fatal("another histogram after writing and reading")
		}
		if err := again.Merge(s); err != nil || again.Histogram() != h {
			t.Fatalf("merged with itself: %v", err)
		}
	})
}

func BenchmarkHeat(b *testing.B) {
	s, _ := random(1, 3)
	var sum int
	i := int64(0)
	for b.Loop() {
		sum += int(s.Heat(7, i&4095))
		i++
	}
	_ = sum
}
