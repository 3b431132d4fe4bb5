package ramparse

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/stream"
)

// ram builds a RAM section's payload for a page size.
type ram struct {
	size uint64
	b    []byte
}

func newRAM(size int) *ram {
	r := &ram{size: uint64(size)}
	r.b = AppendSetup(nil, &Setup{Total: 1<<30 + 1<<16, Blocks: []Block{{Name: "ram", Used: 1 << 30}, {Name: "rom", Used: 1 << 16}}})
	return r
}

func (r *ram) zero(name string, pages ...uint64) *ram {
	for _, p := range pages {
		r.b = AppendZero(r.b, name, p*r.size, 0)
		name = ""
	}
	return r
}

// run appends zero pages in order.
func (r *ram) run(name string, from, to uint64) *ram {
	for p := from; p < to; p++ {
		r.zero(name, p)
		name = ""
	}
	return r
}

// page appends a Page record with content that is not all alike.
func (r *ram) page(name string, n uint64) *ram {
	rng := rand.New(rand.NewPCG(n, 1))
	data := make([]byte, r.size)
	for i := range data {
		data[i] = byte(rng.Uint32())
	}
	r.b = AppendPage(r.b, name, n*r.size, data)
	return r
}

// fill appends a Page record of one byte repeated.
func (r *ram) fill(name string, n uint64, pattern []byte) *ram {
	r.b = AppendPage(r.b, name, n*r.size, bytes.Repeat(pattern, int(r.size)/len(pattern)))
	return r
}

// part ends the section and begins the next PART.
func (r *ram) part() *ram {
	r.b = AppendEOS(r.b)
	r.b = stream.AppendPart(stream.AppendFooter(r.b, 2), 2)
	return r
}

func (r *ram) compressed(name string, n uint64) *ram {
	r.b = AppendCompressed(r.b, name, n*r.size, deflate(make([]byte, r.size)))
	return r
}

// TestInfer decodes sections of all page sizes without being told, and
// compares with what a decoder makes of them that is.
func TestInfer(t *testing.T) {
	builds := []struct {
		name  string
		build func(*ram)
	}{
		{"page first", func(r *ram) { r.page("ram", 0).page("", 1) }},
		{"single page", func(r *ram) { r.page("ram", 0) }},
		{"last page of a block", func(r *ram) { r.page("rom", 1<<16/r.size-1).page("ram", 7) }},
		{"page later", func(r *ram) { r.zero("ram", 0).page("", 1).zero("", 2) }},
		{"zeros, then a page", func(r *ram) { r.run("ram", 0, 5000).page("", 5000).run("", 5001, 5010) }},
		{"zeros around a page", func(r *ram) { r.zero("ram", 0).page("", 1).run("", 2, 20) }},
		{"zeros only", func(r *ram) { r.run("ram", 0, 100) }},
		{"zeros beyond the window", func(r *ram) { r.run("ram", 0, 16384).page("rom", 0) }},
		{"zeros over blocks", func(r *ram) { r.zero("rom", 0).run("ram", 0, 30).page("", 30) }},
		{"zeros at the front of each block", func(r *ram) { r.zero("ram", 0).zero("rom", 0).page("ram", 1) }},
		{"page of zeros", func(r *ram) { r.fill("ram", 0, []byte{0}).fill("", 1, []byte{0}) }},
		{"page like text", func(r *ram) { r.fill("ram", 0, []byte("text")).zero("", 1) }},
		{"page like little-endian numbers", func(r *ram) { r.fill("ram", 0, []byte{0x22, 0, 0, 0, 0, 0, 0, 0}).zero("", 1) }},
		{"flush between", func(r *ram) { r.b = AppendFlush(r.b); r.page("ram", 0); r.b = AppendFlush(r.b); r.zero("", 1) }},
		{"next part", func(r *ram) { r.zero("ram", 0, 1).part().run("", 2, 40).page("", 40) }},
		{"page in the next part", func(r *ram) { r.zero("ram", 0).part().part().page("", 1) }},
		{"page out of order", func(r *ram) { r.zero("ram", 64).page("", 3).zero("", 0, 128) }},
		{"compressed first", func(r *ram) { r.compressed("ram", 0).compressed("", 1) }},
		{"compressed later", func(r *ram) { r.zero("ram", 0, 2, 4, 6).compressed("", 1).compressed("", 3).page("", 5) }},
		{"xbzrle first", func(r *ram) { r.b = AppendXBZRLE(r.b, "ram", 0, []byte{0, 1, 'x'}); r.page("", 1) }},
	}
	for _, size := range candidates {
		for _, tt := range builds {
			t.Run(fmt.Sprintf("%d/%s", size, tt.name), func(t *testing.T) {
				r := newRAM(size)
				tt.build(r)
				in := append(AppendEOS(r.b), 0x7e, 0, 0, 0, 2, 4)
				want, err := decodeParts(NewDecoder(Options{PageSize: size}), exact(in))
				if err != nil {
					t.Fatal(err)
				}
				d := NewDecoder(Options{})
				got, err := decodeParts(d, exact(in))
				if err != nil || d.PageSize() != size {
					t.Fatalf("%v; pages of %d bytes", err, d.PageSize())
				}
				if fmt.Sprint(got) != fmt.Sprint(want) {
					t.Errorf("records differ")
				}
			})
		}
	}
}

// decodeParts decodes the parts of a RAM section and returns a line for each
// record.
func decodeParts(d *Decoder, c *stream.Cursor) (all []string, err error) {
	for {
		var rec Record
		if err := d.Next(c, &rec); err != nil {
			return all, err
		}
		all = append(all, fmt.Sprint(rec.Kind, rec.Block, rec.Addr, rec.Page, len(rec.Data), rec.Offset))
		if rec.Kind == EOS {
			c.Next(5)
			if typ, err := c.Peek(1); err != nil || typ[0] != 2 {
				return all, err
			}
			c.Next(5)
		}
	}
}

// TestInferWeak covers what zero pages alone can say.
func TestInferWeak(t *testing.T) {
	tests := []struct {
		name string
		size int // of the builder's pages
		make func(*ram)
		want int
	}{
		{"only address 0", 8192, func(r *ram) { r.zero("ram", 0).zero("rom", 0) }, 0},
		{"few in steps of 16 K", 16384, func(r *ram) { r.zero("ram", 0, 1, 2, 3) }, 4096},
		{"many in steps of 16 K", 16384, func(r *ram) { r.run("ram", 0, 9) }, 16384},
		{"many in steps of 128 K", 128 << 10, func(r *ram) { r.run("ram", 0, 20) }, 4096},
		{"many in steps of 12 K", 12 << 10, func(r *ram) { r.run("ram", 0, 20) }, 4096},
		{"out of order", 4096, func(r *ram) { r.zero("ram", 124, 8, 64) }, 4096},
		{"steps of 1 K", 1024, func(r *ram) { r.zero("ram", 1, 2) }, 1024},
		{"steps of 2 K", 2048, func(r *ram) { r.zero("ram", 1, 2) }, 2048},
	}
	for _, tt := range tests {
		r := newRAM(tt.size)
		tt.make(r)
		d := NewDecoder(Options{})
		if _, err := decodeParts(d, exact(append(AppendEOS(r.b), 0x7e, 0, 0, 0, 2, 4))); err != nil || d.PageSize() != tt.want {
			t.Errorf("%s: pages of %d bytes, %v; want %d", tt.name, d.PageSize(), err, tt.want)
		}
	}
}

// TestInferImpossible checks that a wrong guess is not made up.
func TestInferImpossible(t *testing.T) {
	odd := &Setup{Total: 3 << 9 << 10, Blocks: []Block{{Name: "a", Used: 1<<9 | 1<<12}, {Name: "b", Used: 3<<19 - 1<<9 - 1<<12}}}
	tests := []struct {
		name string
		in   []byte
		want error
	}{
		{"no record after the page", append(newRAM(4096).page("ram", 0).b, bytes.Repeat([]byte{0xff}, 100<<10)...), stream.ErrUnknown},
		{"unknown type after the end", append(AppendEOS(newRAM(4096).page("ram", 0).b), bytes.Repeat([]byte{0xff}, 100<<10)...), stream.ErrUnknown},
		{"cut in the page", newRAM(4096).page("ram", 0).b[:1000], stream.ErrTruncated},
		{"no size fits the blocks", AppendPage(AppendSetup(nil, odd), "a", 0, make([]byte, 100<<10)), stream.ErrUnknown},
		{"no size fits the addresses", AppendEOS(AppendZero(AppendSetup(nil, odd), "a", 1024, 0)), stream.ErrUnknown},
		{"outside the block", AppendEOS(AppendPage(newRAM(4096).b, "rom", 1<<16, make([]byte, 4096))), stream.ErrDamaged},
	}
	for _, tt := range tests {
		d := NewDecoder(Options{})
		all, err := decode(d, exact(tt.in))
		if !errors.Is(err, tt.want) || len(all) != 1 || d.PageSize() != 0 {
			t.Errorf("%s: %v after %d records, pages of %d bytes; want %v", tt.name, err, len(all), d.PageSize(), tt.want)
		}
	}
}

// TestInferLinear: records that never tell the page size are looked at once each. A
// look-ahead that began anew at every one of them took hundreds of times as long.
func TestInferLinear(t *testing.T) {
	for name, add := range map[string]func(*ram){
		"zero":       func(r *ram) { r.zero("", 0) },
		"xbzrle":     func(r *ram) { r.b = AppendXBZRLE(r.b, "", 0, []byte{0, 1, 'x'}) },
		"compressed": func(r *ram) { r.b = AppendCompressed(r.b, "", 0, []byte("no zlib")) },
		"parts":      func(r *ram) { r.part().zero("", 0) },
		"flush":      func(r *ram) { r.b = AppendFlush(r.b); r.zero("", 0) },
	} {
		n := 100000
		if name == "compressed" {
			n /= 10
		}
		r := newRAM(4096).zero("ram", 0)
		for range n {
			add(r)
		}
		in := append(AppendEOS(r.run("", 1, 20).b), 0x7e, 0, 0, 0, 2, 4)
		d, c := NewDecoder(Options{}), stream.NewCursor(bytes.NewReader(in), 0)
		start := time.Now()
		all, err := decodeParts(d, c)
		if err != nil || len(all) < n || d.PageSize() != 4096 {
			t.Fatalf("%s: %d records, pages of %d bytes, %v", name, len(all), d.PageSize(), err)
		}
		if took := time.Since(start); took > 5*time.Second {
			t.Errorf("%s: %v for %d records", name, took, n)
		}
	}
}

// TestInferReadAhead checks how far the look-ahead goes: while the decoder
// works on a section that is the last, at most the type byte after its footer
// is taken from the input, and while it knows the page size, nothing.
func TestInferReadAhead(t *testing.T) {
	for _, size := range candidates {
		for name, build := range map[string]func(*ram){
			"zeros": func(r *ram) { r.zero("ram", 0, 1, 2, 3) },
			"page":  func(r *ram) { r.zero("ram", 0).page("", 1) },
			"parts": func(r *ram) { r.zero("ram", 0).part().zero("", 1).part().page("", 2) },
		} {
			r := newRAM(size)
			build(r)
			payload := AppendEOS(r.b)
			in := append(payload[:len(payload):len(payload)], 0x7e, 0, 0, 0, 2, 4)
			in = append(in, make([]byte, 200<<10)...) // the device tail
			counted := &counter{r: bytes.NewReader(in)}
			c := stream.NewCursor(counted, 0)
			c.SetReadAhead(0)
			if _, err := decodeParts(NewDecoder(Options{}), c); err != nil {
				t.Fatalf("%d %s: %v", size, name, err)
			}
			// decodeParts itself takes footer and type byte.
			limit := len(payload) + 6
			if size < 4096 && name != "zeros" {
				// The commonest size is tried first.
				limit = len(payload) - size + 4096 + 8
			}
			if counted.n > limit {
				t.Errorf("%d %s: %d bytes taken; want at most %d", size, name, counted.n, limit)
			}
		}
	}
	in := append(newRAM(4096).page("ram", 0).zero("", 1).b, 0xff)
	counted := &counter{r: bytes.NewReader(in)}
	c := stream.NewCursor(counted, 0)
	c.SetReadAhead(0)
	d := NewDecoder(Options{PageSize: 4096})
	var rec Record
	for range 3 {
		if err := d.Next(c, &rec); err != nil {
			t.Fatal(err)
		}
		if rec.Kind != MemSize && int64(counted.n) != c.Offset() {
			t.Errorf("after %v: %d bytes taken; want %d", rec.Kind, counted.n, c.Offset())
		}
	}
}

type counter struct {
	r io.Reader
	n int
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += n
	return n, err
}
