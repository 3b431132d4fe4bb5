package delta

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"testing"
)

func pageOf(n int, seed uint64) []byte {
	r := rand.New(rand.NewPCG(seed, uint64(n)))
	b := make([]byte, n)
	for i := 0; i < n; i += 8 {
		binary.LittleEndian.PutUint64(b[i:], r.Uint64())
	}
	return b
}

// TestRoundTrip changes any number of words of pages of each size.
func TestRoundTrip(t *testing.T) {
	for n := 256; n <= 64<<10; n *= 2 {
		base := pageOf(n, 1)
		for changes := 0; changes <= n/8; changes = changes*2 + 1 {
			page := bytes.Clone(base)
			for _, i := range rand.New(rand.NewPCG(2, uint64(changes))).Perm(n / 8)[:changes] {
				page[8*i+i%8] ^= 1
			}
			head := []byte("what was there before")
			d, ok := Encode(bytes.Clone(head), page, base)
			if !bytes.HasPrefix(d, head) {
				t.Fatalf("%d bytes: what was in dst is gone", n)
			}
			d = d[len(head):]
			want := n/64 + 8*changes
			if ok != (want <= MaxLen(n)) {
				t.Fatalf("%d changes in %d bytes: taken: %v", changes, n, ok)
			}
			if !ok {
				if len(d) != 0 {
					t.Fatalf("%d changes in %d bytes: %d bytes of a delta that is none", changes, n, len(d))
				}
				continue
			}
			if len(d) != want {
				t.Fatalf("%d changes in %d bytes: a delta of %d bytes, want %d", changes, n, len(d), want)
			}
			got := make([]byte, n)
			if err := Apply(got, base, d); err != nil || !bytes.Equal(got, page) {
				t.Fatalf("%d changes in %d bytes: %v", changes, n, err)
			}
			copy(got, base)
			if err := Apply(got, got, d); err != nil || !bytes.Equal(got, page) {
				t.Fatalf("%d changes in %d bytes, in place: %v", changes, n, err)
			}
		}
	}
}

// Each bit of the bitmap is a word of its own.
func TestEachWord(t *testing.T) {
	base := pageOf(512, 1)
	for i := range 64 {
		page := bytes.Clone(base)
		page[8*i+7] ^= 0x80
		d, ok := Encode(nil, page, base)
		want := make([]byte, 8)
		want[i/8] = 1 << (i % 8)
		want = append(want, page[8*i:8*i+8]...)
		if !ok || !bytes.Equal(d, want) {
			t.Errorf("word %d: %x, want %x", i, d, want)
		}
	}
}

func TestDamage(t *testing.T) {
	base, page := pageOf(4096, 1), pageOf(4096, 1)
	copy(page[100:], "changed")
	d, _ := Encode(nil, page, base)
	dst := make([]byte, 4096)
	more, fewer := bytes.Clone(d), bytes.Clone(d)
	more[3] |= 1
	fewer[1] = 0
	for name, c := range map[string]struct{ dst, base, d []byte }{
		"nothing":          {dst, base, nil},
		"a bitmap's half":  {dst, base, d[:32]},
		"the bitmap alone": {dst, base, d[:64]},
		"one byte less":    {dst, base, d[:len(d)-1]},
		"one byte more":    {dst, base, append(bytes.Clone(d), 0)},
		"one word less":    {dst, base, d[:len(d)-8]},
		"a bit more":       {dst, base, more},
		"a bit less":       {dst, base, fewer},
		"a smaller page":   {dst[:2048], base[:2048], d},
		"another length":   {dst[:2048], base, d},
		"no page's length": {dst[:100], base[:100], d},
	} {
		if err := Apply(c.dst, c.base, c.d); !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// FuzzApply holds Apply against Encode from both sides: what Encode has made gives the
// page back, and of what anybody else has made only what has the right length is taken.
func FuzzApply(f *testing.F) {
	base := pageOf(256, 1)
	d, _ := Encode(nil, append(bytes.Clone(base[:248]), "changed!"...), base)
	f.Add(base, append(bytes.Clone(base[:200]), make([]byte, 56)...), d)
	f.Add(base, base, []byte{1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8})
	f.Fuzz(func(t *testing.T, base, page, d []byte) {
		n := min(len(base), len(page)) / 64 * 64
		base, page = base[:n], page[:n]
		got := make([]byte, n)
		if own, ok := Encode(nil, page, base); ok {
			if err := Apply(got, base, own); err != nil || !bytes.Equal(got, page) {
				t.Fatalf("%x of %x: %x, %v", page, base, got, err)
			}
		}
		if Apply(got, base, d) != nil {
			return
		}
		// It was taken, so it says which words it changes, and no others.
		at := n / 64
		for i := range n / 8 {
			want := base[8*i : 8*i+8]
			if d[i/8]>>(i%8)&1 != 0 {
				want = d[at : at+8]
				at += 8
			}
			if !bytes.Equal(got[8*i:8*i+8], want) {
				t.Fatalf("word %d is %x, want %x", i, got[8*i:8*i+8], want)
			}
		}
	})
}

func BenchmarkEncode(b *testing.B) {
	base := pageOf(4096, 1)
	for name, every := range map[string]int{"equal": 4096, "a word in 64": 64 * 8, "a word in 4": 4 * 8} {
		page := bytes.Clone(base)
		for i := every - 1; i < len(page); i += every {
			page[i] ^= 1
		}
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(page)))
			var d []byte
			for b.Loop() {
				d, _ = Encode(d[:0], page, base)
			}
		})
	}
}

func BenchmarkApply(b *testing.B) {
	base := pageOf(4096, 1)
	page := bytes.Clone(base)
	for i := 0; i < len(page); i += 64 {
		page[i] ^= 1
	}
	d, _ := Encode(nil, page, base)
	dst := make([]byte, len(page))
	b.SetBytes(int64(len(page)))
	for b.Loop() {
		if err := Apply(dst, base, d); err != nil {
			b.Fatal(err)
		}
	}
}
