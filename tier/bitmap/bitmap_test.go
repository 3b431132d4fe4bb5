package bitmap

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
)

// bitByBit is the scan that Runs is measured against and checked with: a test
// of each page's bit.
func bitByBit(b Bitmap, yield func(Run) bool) {
	start := int64(-1)
	for page := int64(0); page < b.pages; page++ {
		set := b.words[page/64]>>(page%64)&1 != 0
		switch {
		case set && start < 0:
			start = page
		case !set && start >= 0:
			if !yield(Run{start, page - start}) {
				return
			}
			start = -1
		}
	}
	if start >= 0 {
		yield(Run{start, b.pages - start})
	}
}

// Kinds of bitmaps, by what a guest does: nothing much, a program's data
// structures, and everything at random.

// sparse has single pages, one in 2000.
func sparse(b Bitmap, r *rand.Rand) {
	for range b.pages / 2000 {
		b.Set(r.Int64N(b.pages))
	}
}

// clustered has 5 % of the pages in runs of 16 to 400 pages.
func clustered(b Bitmap, r *rand.Rand) {
	for n := b.pages / 20; n > 0; {
		first, length := r.Int64N(b.pages), 16+r.Int64N(385)
		for page := first; page < min(first+length, b.pages); page++ {
			b.Set(page)
		}
		n -= length
	}
}

// dense has half of the pages, each by the toss of a coin.
func dense(b Bitmap, r *rand.Rand) {
	for page := range b.pages {
		if r.IntN(2) == 0 {
			b.Set(page)
		}
	}
}

// full has all pages but one in 1000.
func full(b Bitmap, r *rand.Rand) {
	for page := range b.pages {
		if r.IntN(1000) != 0 {
			b.Set(page)
		}
	}
}

var kinds = []struct {
	name string
	fill func(Bitmap, *rand.Rand)
}{{"sparse", sparse}, {"clustered", clustered}, {"dense", dense}, {"full", full}, {"empty", func(Bitmap, *rand.Rand) {}}}

func collect(scan func(yield func(Run) bool)) (runs []Run) {
	scan(func(r Run) bool {
		runs = append(runs, r)
		return true
	})
	return runs
}

// Whatever the bits are, the words' scan finds what the bits' scan finds.
func TestRuns(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for _, kind := range kinds {
		for _, pages := range []int64{0, 1, 63, 64, 65, 127, 128, 1000, 4096, 24578} {
			for range 20 {
				b := New(pages)
				kind.fill(b, r)
				got, want := collect(b.Runs()), collect(func(y func(Run) bool) { bitByBit(b, y) })
				if !slices.Equal(got, want) {
					t.Fatalf("%s, %d pages: %v, want %v", kind.name, pages, got, want)
				}
				var n int64
				for _, run := range got {
					n += run.N
				}
				if n != b.Count() {
					t.Fatalf("%s, %d pages: %d in runs, %d set", kind.name, pages, n, b.Count())
				}
			}
		}
	}
}

// All bitmaps of 12 pages across the border between two words.
func TestRunsExhaustive(t *testing.T) {
	for pattern := range uint64(1 << 12) {
		for _, last := range []int64{70, 128} {
			b := New(last)
			for i := range int64(12) {
				if pattern>>i&1 != 0 {
					b.Set(58 + i)
				}
			}
			got, want := collect(b.Runs()), collect(func(y func(Run) bool) { bitByBit(b, y) })
			if !slices.Equal(got, want) {
				t.Fatalf("pattern %012b of %d pages: %v, want %v", pattern, last, got, want)
			}
		}
	}
}

// A scan ends where it is told to, wherever that is.
func TestRunsStop(t *testing.T) {
	b := New(300)
	for _, page := range []int64{3, 4, 63, 64, 65, 100, 190, 191, 192, 299} {
		b.Set(page)
	}
	all := collect(b.Runs())
	for n := 1; n <= len(all); n++ {
		var got []Run
		for r := range b.Runs() {
			if got = append(got, r); len(got) == n {
				break
			}
		}
		if !slices.Equal(got, all[:n]) {
			t.Errorf("the first %d: %v of %v", n, got, all)
		}
	}
}

// Words that come in pieces make the same runs.
func TestScannerPieces(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	for range 200 {
		b := New(64 * 40)
		clustered(b, r)
		sparse(b, r)
		var got []Run
		s := NewScanner(func(run Run) bool { got = append(got, run); return true })
		for rest := b.words; len(rest) > 0; {
			n := 1 + r.IntN(len(rest))
			if !s.Add(rest[:n]) {
				t.Fatal("stopped")
			}
			rest = rest[n:]
		}
		s.End()
		if want := collect(b.Runs()); !slices.Equal(got, want) {
			t.Fatalf("%v, want %v", got, want)
		}
	}
}

func TestSetHasCount(t *testing.T) {
	b := New(130)
	if !b.Set(129) || b.Set(129) || !b.Set(0) || !b.Set(64) {
		t.Error("Set does not tell what is new")
	}
	for page := range b.Pages() {
		if want := page == 129 || page == 0 || page == 64; b.Has(page) != want {
			t.Errorf("page %d: %v", page, !want)
		}
	}
	if b.Count() != 3 || b.Bytes() != 24 {
		t.Errorf("%d pages, %d bytes", b.Count(), b.Bytes())
	}
	defer func() {
		if recover() == nil {
			t.Error("a page beyond the last one was set")
		}
	}()
	b.Set(130)
}

func TestFill(t *testing.T) {
	raw := make([]byte, 24)
	for i := range raw {
		raw[i] = byte(37 * (i + 1))
	}
	b := New(130)
	if err := b.Fill(raw); err != nil {
		t.Fatal(err)
	}
	for page := range b.Pages() {
		if want := raw[page/8]>>(page%8)&1 != 0; b.Has(page) != want {
			t.Errorf("page %d is %v", page, !want)
		}
	}
	// Bits behind the last page would make a scan yield pages that are not.
	if got := b.words[2]; got != binary.LittleEndian.Uint64(raw[16:])&3 {
		t.Errorf("last word %#x", got)
	}
	for _, n := range []int{0, 23, 25, 32} {
		if err := b.Fill(make([]byte, n)); err == nil {
			t.Errorf("%d bytes were taken", n)
		}
	}
}

// The bits of any bytes are the pages of the runs.
func FuzzFill(f *testing.F) {
	f.Add([]byte{1, 2, 3, 0xff, 0xff, 0, 0, 0x80}, uint8(64))
	f.Add(make([]byte, 16), uint8(65))
	f.Fuzz(func(t *testing.T, raw []byte, n uint8) {
		b := New(int64(n))
		if err := b.Fill(raw); err != nil {
			if len(raw) == b.Bytes() {
				t.Fatal(err)
			}
			return
		}
		for run := range b.Runs() {
			for page := run.First; page < run.First+run.N; page++ {
				if raw[page/8]>>(page%8)&1 == 0 || page >= int64(n) {
					t.Fatalf("page %d of %x is in a run", page, raw)
				}
				raw[page/8] &^= 1 << (page % 8)
			}
		}
		for page := range int64(n) {
			if raw[page/8]>>(page%8)&1 != 0 {
				t.Fatalf("page %d is in no run", page)
			}
		}
	})
}

// BenchmarkScan compares the scans on bitmaps of a 4 GiB guest. Both hand out
// runs, to the same function.
func BenchmarkScan(b *testing.B) {
	const pages = 1 << 20
	for _, kind := range kinds {
		m := New(pages)
		kind.fill(m, rand.New(rand.NewPCG(5, 6)))
		for _, scan := range []struct {
			name string
			runs func(yield func(Run) bool)
		}{{"bits", func(y func(Run) bool) { bitByBit(m, y) }}, {"words", m.Runs()}} {
			b.Run(fmt.Sprint(kind.name, "/", scan.name), func(b *testing.B) {
				var n int64
				for b.Loop() {
					scan.runs(func(r Run) bool {
						n += r.N
						return true
					})
				}
				if n != m.Count()*int64(b.N) {
					b.Fatalf("%d pages in %d scans, of %d", n, b.N, m.Count())
				}
			})
		}
	}
}
