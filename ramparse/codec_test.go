package ramparse

import (
	"bytes"
	"compress/zlib"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/flic-migrate/flic-migrate/stream"
)

// deflate makes the payload of a Compressed record, with the standard
// library's zlib, which is not the one that reads it.
func deflate(page []byte) []byte {
	var out bytes.Buffer
	z := zlib.NewWriter(&out)
	z.Write(page)
	z.Close()
	return out.Bytes()
}

// xbzrle makes the delta from old to new, of the same length.
func xbzrle(old, new []byte) (delta []byte) {
	number := func(n int) {
		if n >= 0x80 {
			delta = append(delta, byte(n)|0x80)
			n >>= 7
		}
		delta = append(delta, byte(n))
	}
	for i := 0; i < len(new); {
		same := i
		for i < len(new) && old[i] == new[i] {
			i++
		}
		if i == len(new) {
			break
		}
		number(i - same)
		changed := i
		for i < len(new) && old[i] != new[i] {
			i++
		}
		number(i - changed)
		delta = append(delta, new[changed:i]...)
	}
	return delta
}

func TestApplyXBZRLE(t *testing.T) {
	zeros := bytes.Repeat([]byte{0}, 4096)
	tests := []struct {
		name  string
		delta []byte
		want  func(page []byte)
	}{
		{"nothing", nil, func([]byte) {}},
		{"first byte", []byte{0, 1, 'x'}, func(p []byte) { p[0] = 'x' }},
		{"last byte", []byte{0xff, 0x1f, 1, 'x'}, func(p []byte) { p[4095] = 'x' }},
		{"two runs", []byte{2, 2, 'a', 'b', 0x80, 0x01, 1, 'c'}, func(p []byte) { copy(p[2:], "ab"); p[132] = 'c' }},
		{"all", append([]byte{0, 0x80, 0x20}, bytes.Repeat([]byte{7}, 4096)...), func(p []byte) { copy(p, bytes.Repeat([]byte{7}, 4096)) }},
	}
	for _, tt := range tests {
		got, want := bytes.Clone(zeros), bytes.Clone(zeros)
		tt.want(want)
		if err := ApplyXBZRLE(got, tt.delta); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %v, or the page differs", tt.name, err)
		}
	}
}

func TestApplyXBZRLERandom(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 500 {
		old := make([]byte, 4096)
		for i := range old {
			old[i] = byte(rng.Uint32())
		}
		page := bytes.Clone(old)
		for range rng.IntN(20) {
			at := rng.IntN(len(page))
			for i := at; i < min(len(page), at+rng.IntN(600)); i++ {
				page[i] = byte(rng.Uint32())
			}
		}
		got := bytes.Clone(old)
		if err := ApplyXBZRLE(got, xbzrle(old, page)); err != nil || !bytes.Equal(got, page) {
			t.Fatalf("%v, or the page differs", err)
		}
	}
}

func TestApplyXBZRLEErrors(t *testing.T) {
	for name, delta := range map[string][]byte{
		"unchanged run beyond the page":       {0x81, 0x20, 1, 'x'},
		"changed run beyond the page":         {0xff, 0x1f, 2, 'x', 'y'},
		"changed run beyond the delta":        {0, 2, 'x'},
		"changed run is missing":              {5},
		"changed run is empty":                {5, 0},
		"second unchanged run is empty":       {0, 1, 'x', 0, 1, 'y'},
		"number is cut":                       {0x80},
		"number of three bytes":               {0x80, 0x80, 0x01},
		"changed run's number is cut":         {0, 0x80},
		"changed run's number of three bytes": {0, 0x80, 0x80, 0x01, 'x'},
	} {
		if err := ApplyXBZRLE(make([]byte, 4096), delta); !errors.Is(err, stream.ErrDamaged) {
			t.Errorf("%s: %v; want ErrDamaged", name, err)
		}
	}
}

func FuzzApplyXBZRLE(f *testing.F) {
	old, page := make([]byte, 4096), bytes.Repeat([]byte("changed and \x00\x00\x00\x00 not "), 200)[:4096]
	f.Add(xbzrle(old, page))
	f.Add(xbzrle(page, old))
	f.Fuzz(func(t *testing.T, delta []byte) {
		// The page lies between guards that must stay as they are.
		buf := bytes.Repeat([]byte{0xa5}, 3*4096)
		err := ApplyXBZRLE(buf[4096:8192], delta)
		if err != nil && !errors.Is(err, stream.ErrDamaged) {
			t.Errorf("error of no kind: %v", err)
		}
		guard := bytes.Repeat([]byte{0xa5}, 4096)
		if !bytes.Equal(buf[:4096], guard) || !bytes.Equal(buf[8192:], guard) {
			t.Error("bytes outside the page were changed")
		}
	})
}

func TestInflate(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	noise := make([]byte, 4096)
	for i := range noise {
		noise[i] = byte(rng.Uint32())
	}
	for name, page := range map[string][]byte{
		"zeros": make([]byte, 4096),
		"text":  bytes.Repeat([]byte("text"), 1024),
		"noise": noise,
		"64 K":  bytes.Repeat(noise, 16),
	} {
		payload := deflate(page)
		got := make([]byte, len(page))
		if err := Inflate(got, payload); err != nil || !bytes.Equal(got, page) {
			t.Errorf("%s: %v, or the page differs", name, err)
		}
	}
}

// TestCompressBound pins zlib's bound, over which QEMU refuses a page.
func TestCompressBound(t *testing.T) {
	for n, want := range map[int]int{1024: 1037, 4096: 4110, 65536: 65569} {
		if got := compressBound(n); got != want {
			t.Errorf("%d bytes: %d; want %d", n, got, want)
		}
	}
}

func TestInflateErrors(t *testing.T) {
	page := bytes.Repeat([]byte("text"), 1024)
	good := deflate(page)
	sum := bytes.Clone(good)
	sum[len(sum)-1] ^= 1
	tests := map[string][]byte{
		"empty":        {},
		"no zlib":      []byte("no zlib stream at all"),
		"short page":   deflate(page[:4095]),
		"empty page":   deflate(nil),
		"long page":    deflate(append(page[:4096:4096], 'x')),
		"checksum":     sum,
		"cut":          good[:len(good)/2],
		"cut checksum": good[:len(good)-1],
	}
	for name, payload := range tests {
		for range 2 { // also with a decompressor that is used again
			if err := Inflate(make([]byte, 4096), payload); !errors.Is(err, stream.ErrDamaged) {
				t.Errorf("%s: %v; want ErrDamaged", name, err)
			}
		}
		if err := Inflate(make([]byte, 4096), good); err != nil {
			t.Errorf("after %s: %v", name, err)
		}
	}
}

// TestInflateConcurrent gives the race detector something to look at.
func TestInflateConcurrent(t *testing.T) {
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			page := bytes.Repeat([]byte{byte(g), 1, 2, 3}, 1024)
			payload := deflate(page)
			got := make([]byte, len(page))
			for range 100 {
				if err := Inflate(got, payload); err != nil || !bytes.Equal(got, page) {
					t.Errorf("%v, or the page differs", err)
				}
			}
		})
	}
	wg.Wait()
}

func FuzzInflate(f *testing.F) {
	f.Add(deflate(make([]byte, 4096)))
	f.Add(deflate(bytes.Repeat([]byte("text"), 1024)))
	f.Fuzz(func(t *testing.T, payload []byte) {
		page := make([]byte, 4096)
		if err := Inflate(page, payload); err != nil {
			if !errors.Is(err, stream.ErrDamaged) {
				t.Errorf("error of no kind: %v", err)
			}
			return
		}
		// What decompresses well is the same for the standard library.
		z, err := zlib.NewReader(bytes.NewReader(payload))
		if err != nil {
			t.Fatal(err)
		}
		var want bytes.Buffer
		if _, err := want.ReadFrom(z); err != nil || !bytes.Equal(page, want.Bytes()) {
			t.Errorf("standard library: %v, or the page differs", err)
		}
	})
}
