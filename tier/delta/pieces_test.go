package delta

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"testing"
)

// movedPage is base with its stretches in another order and at other distances.
func movedPage(base []byte, seed uint64) []byte {
	rng := rand.New(rand.NewPCG(seed, 3))
	var page []byte
	for len(page) < len(base) {
		from := rng.IntN(len(base) - 64)
		page = append(page, base[from:from+64+rng.IntN(len(base)-64-from+1)/2]...)
		page = append(page, "between"[:rng.IntN(8)]...)
	}
	return page[:len(base)]
}

// TestPieces codes pages of each size that resemble others, more and less.
func TestPieces(t *testing.T) {
	var d Differ
	for n := 256; n <= 64<<10; n *= 2 {
		base := pageOf(n, 1)
		shifted := append([]byte("ten bytes!"), base[:n-10]...)
		changed := bytes.Clone(shifted)
		changed[n/2] ^= 1
		for name, c := range map[string]struct {
			page  []byte
			least int // what it must be shorter than; 0: no pieces
		}{
			"the same":      {base, 16},
			"shifted":       {shifted, 32},
			"and changed":   {changed, 48},
			"moved":         {movedPage(base, uint64(n)), n * 3 / 4},
			"something new": {pageOf(n, 2), 0},
			"zeros":         {make([]byte, n), 0},
		} {
			got, ok := d.Encode([]byte("head"), c.page, base, n*3/4)
			if ok != (c.least > 0) || !bytes.HasPrefix(got, []byte("head")) {
				t.Fatalf("%s of %d bytes: taken: %v", name, n, ok)
			}
			if got = got[4:]; !ok {
				if len(got) != 0 {
					t.Errorf("%s of %d bytes: %d bytes of what is not taken", name, n, len(got))
				}
				continue
			}
			if len(got) >= c.least {
				t.Errorf("%s of %d bytes: %d bytes", name, n, len(got))
			}
			made := make([]byte, n)
			if err := ApplyPieces(made, base, got); err != nil || !bytes.Equal(made, c.page) {
				t.Errorf("%s of %d bytes: %v", name, n, err)
			}
		}
	}
}

// What is moved by any distance is found behind many bytes that are in no copy, from its first
// byte on.
func TestPiecesBehindMuch(t *testing.T) {
	base := pageOf(4096, 1)
	for by := range 16 {
		page := pageOf(4096, 2)
		copy(page[2000:2032], base[1000+by:]) // the shortest that is sure to be found
		pieces, ok := new(Differ).Encode(nil, page, base, 4096)
		if !ok {
			t.Fatal("the copy is not found")
		}
		if n := 4096 - 32 + 8; len(pieces) > n {
			t.Errorf("moved by %d: %d bytes, want %d at most", by, len(pieces), n)
		}
	}
}

func TestDamagedPieces(t *testing.T) {
	base := pageOf(256, 1)
	number := func(v ...int64) (b []byte) {
		for i, n := range v {
			if i%3 == 0 && i > 0 { // where in the base
				b = binary.AppendVarint(b, n)
			} else {
				b = binary.AppendUvarint(b, uint64(n))
			}
		}
		return b
	}
	for name, pieces := range map[string][]byte{
		"nothing":                   nil,
		"half a number":             {0x80},
		"more pieces than bytes":    number(257),
		"pieces that are not there": number(2, 0, 256, 0),
		"half a piece":              number(1, 0, 256),
		"own bytes too many":        append(number(1, 0, 256, 0), 1),
		"own bytes too few":         append(number(1, 0, 254, 0), 1),
		"own bytes before missing":  number(1, 4, 252, 0),
		"a piece of nothing":        number(1, 0, 0, 0),
		"longer than the page":      number(1, 0, 257, 0),
		"before the base":           number(1, 0, 256, -1),
		"behind the base":           number(1, 0, 256, 1),
		"far behind":                number(1, 0, 256, 1<<62),
		"far before":                number(1, 0, 256, -1<<62),
		"own bytes beyond all":      number(1, -1, 1, 0),
		"a length beyond all":       number(1, 1, -1, 0),
	} {
		if err := ApplyPieces(make([]byte, 256), base, pieces); !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := ApplyPieces(make([]byte, 128), base, number(1, 0, 128, 0)); !errors.Is(err, ErrDamaged) {
		t.Errorf("another length: %v", err)
	}
	if err := ApplyPieces(make([]byte, 256), base, number(1, 0, 256, 0)); err != nil {
		t.Errorf("what is no damage: %v", err)
	}
}

// FuzzPieces holds ApplyPieces against Encode: what that has made gives the page back,
// and of what anybody else has made nothing is read or written outside of pages.
func FuzzPieces(f *testing.F) {
	base := pageOf(256, 1)
	var d Differ
	pieces, _ := d.Encode(nil, append([]byte("moved"), base[:251]...), base, 200)
	f.Add(base, append([]byte("moved"), base[:251]...), pieces)
	f.Add(base, base, []byte{1, 0, 0x80, 2, 0})
	f.Fuzz(func(t *testing.T, base, page, pieces []byte) {
		n := min(len(base), len(page), 64<<10) / 64 * 64
		if n == 0 {
			return
		}
		base, page = base[:n:n], page[:n:n]
		got := make([]byte, n)
		if own, ok := new(Differ).Encode(nil, page, base, 2*n); !ok {
			t.Fatalf("%x of %x: longer than twice a page", page, base)
		} else if err := ApplyPieces(got, base, own); err != nil || !bytes.Equal(got, page) {
			t.Fatalf("%x of %x: %x, %v", page, base, got, err)
		}
		if err := ApplyPieces(got, base, pieces); err != nil && !errors.Is(err, ErrDamaged) {
			t.Fatal(err)
		}
	})
}

func BenchmarkDiffer(b *testing.B) {
	base := pageOf(4096, 1)
	for name, page := range map[string][]byte{"moved": movedPage(base, 1), "new": pageOf(4096, 2)} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(page)))
			var d Differ
			var out []byte
			for b.Loop() {
				out, _ = d.Encode(out[:0], page, base, 3072)
			}
		})
	}
}
