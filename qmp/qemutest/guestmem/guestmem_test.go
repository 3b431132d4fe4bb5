package guestmem

import (
	"bytes"
	"compress/flate"
	"hash/crc32"
	"math/rand/v2"
	"testing"
)

// The content must be of all kinds, and compress about as a guest's does: tests
// on placement and on recorded streams rely on it.
func TestFill(t *testing.T) {
	const pages = 4096
	buf := make([]byte, pages*PageSize+100)
	Fill(buf, 1)
	if !bytes.Equal(buf[pages*PageSize:], make([]byte, 100)) {
		t.Error("the incomplete page was written")
	}
	seen := make(map[string]int)
	zero := string(make([]byte, PageSize))
	var packed bytes.Buffer
	w, err := flate.NewWriter(&packed, flate.BestSpeed)
	if err != nil {
		t.Fatal(err)
	}
	incompressible := 0
	for i := range pages {
		page := buf[i*PageSize : (i+1)*PageSize]
		seen[string(page)]++
		before := packed.Len()
		if _, err := w.Write(page); err != nil {
			t.Fatal(err)
		}
		if err := w.Flush(); err != nil {
			t.Fatal(err)
		}
		if packed.Len()-before > PageSize*9/10 {
			incompressible++
		}
	}
	duplicates := 0
	for page, n := range seen {
		if page != zero {
			duplicates += n - 1
		}
	}
	for name, share := range map[string][2]float64{
		"zero":             {float64(seen[zero]) / pages, 1. / 8},
		"duplicate":        {float64(duplicates) / pages, 3. / 16},
		"incompressible":   {float64(incompressible) / pages, 1. / 8},
		"left when flated": {float64(packed.Len()) / float64(pages*PageSize), 0.36},
	} {
		if d := share[0] - share[1]; d < -0.05 || d > 0.05 {
			t.Errorf("%s: %.3f of the pages or bytes, want about %.3f", name, share[0], share[1])
		}
	}
}

// A guest fills its memory by itself and tests compute the same: the content
// must depend on nothing but seed and page number, on every architecture.
func TestFillIsTheSameEverywhere(t *testing.T) {
	const wantSum = 0xb39f1f44
	buf := make([]byte, 64*PageSize)
	Fill(buf, 7)
	if sum := crc32.ChecksumIEEE(buf); sum != wantSum {
		t.Errorf("checksum %#x, want %#x", sum, wantSum)
	}
	page := bytes.Repeat([]byte{0xff}, PageSize)
	Page(page, 7, 33)
	if !bytes.Equal(page, buf[33*PageSize:34*PageSize]) {
		t.Error("a page alone differs from the same page of a fill")
	}
}

func TestChange(t *testing.T) {
	for _, n := range []int{0, 1, 64, PageSize, 2 * PageSize} {
		page := make([]byte, PageSize)
		Change(page, rand.New(rand.NewPCG(1, 1)), n)
		first, last := -1, -1
		for i, b := range page {
			if b != 0 {
				if first < 0 {
					first = i
				}
				last = i
			}
		}
		if span := last - first + 1; first < 0 || span > max(n, 1) {
			t.Errorf("%d bytes: changed %d from %d", n, span, first)
		}
	}
}
