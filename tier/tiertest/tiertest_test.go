package tiertest

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"slices"
	"testing"

	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/stream"
)

// shapes are streams that use every option.
func shapes() map[string]Options {
	two := []Block{{Name: "vga.vram", Size: 64 << 10}, {Name: "pc.ram", Size: 600 << 10}, {Name: "rom", Size: 4 << 10}}
	return map[string]Options{
		"plain":     {Seed: 1},
		"blocks":    {Seed: 2, Blocks: two, Fill: true, Named: 0.1, Mix: Mix{Absent: 1, Zero: 1, Random: 1}},
		"live":      {Seed: 3, Blocks: two, Passes: 4, Resend: 0.3, XBZRLE: true, Fill: true, Flush: true},
		"compress":  {Seed: 4, Passes: 2, Resend: 0.2, Compress: 0.7, Shuffle: true, NoEnd: true},
		"page bits": {Seed: 5, PageSize: 64 << 10, PageBits: true, ReturnPath: true},
		"advise":    {Seed: 6, PageSize: 1024, Advise: true, ReturnPath: true},
		"old":       {Seed: 7, NoConfiguration: true},
		"shared":    {Seed: 8, IgnoreShared: true, Blocks: []Block{{Name: "a", Size: 64 << 10, Shared: true}, {Name: "b", Size: 64 << 10, HostPage: 2 << 20}}},
		"foreign":   {Seed: 9, DirtyBitmap: true, BlockMigration: true, PartLen: 20},
		"early":     {Seed: 10, BlocksFirst: 2},
		"long tail": {Seed: 11, Tail: 300 << 10, NoDescription: true},
		"no tail":   {Seed: 12, EmptyTail: true},
		"record":    {Seed: 13, Unknown: Record},
		"section":   {Seed: 14, Unknown: Section, UnknownPass: 1, Passes: 2, Resend: 0.1},
	}
}

// TestLoad loads each shape and compares the guest with what Page says, and
// counts that the shape has what its options ask for.
func TestLoad(t *testing.T) {
	for name, o := range shapes() {
		t.Run(name, func(t *testing.T) {
			s := New(o)
			b := s.Bytes()
			if u := s.UnknownBytes(); u != nil {
				if bytes.Count(b, u) != 1 {
					t.Fatal("the unknown thing is not in the stream once")
				}
				if _, err := Load(bytes.NewReader(b)); !errors.Is(err, stream.ErrUnknown) {
					t.Fatalf("Load of an unknown thing: %v", err)
				}
				b = bytes.Replace(b, u, nil, 1)
			}
			g, err := Load(bytes.NewReader(b))
			if err != nil {
				t.Fatal(err)
			}
			if err := matches(s, g); err != nil {
				t.Error(err)
			}
			if u := s.UnknownBytes(); u != nil {
				return
			}
			// The expected stream is the same guest, each page once.
			e, err := Load(s.Expected())
			if err != nil {
				t.Fatal(err)
			}
			if err := e.SamePages(g); err != nil {
				t.Error(err)
			}
			if e.Records != len(g.Pages) || !bytes.Equal(e.Rest, g.Rest) {
				t.Errorf("expected stream has %d records for %d pages, other bytes equal: %v",
					e.Records, len(g.Pages), bytes.Equal(e.Rest, g.Rest))
			}
			if o.Passes < 2 && !bytes.Equal(b, s.ExpectedBytes()) {
				t.Error("a stream of one pass is not its own expectation")
			}
			if err := s.Check(s.Expected()); err != nil {
				t.Error(err)
			}
			if err := s.Check(bytes.NewReader(b)); (err != nil) != (o.Passes > 1) {
				t.Errorf("Check of the stream itself: %v", err)
			}
			if tail, err := stream.ParseTail(b[s.Layout().Tail:]); err != nil || !o.EmptyTail && tail.RunState != "paused" {
				t.Errorf("device tail: %v, %q", err, tail.RunState)
			}
		})
	}
}

// matches compares a guest with a stream's model.
func matches(s *Stream, g *Guest) error {
	want := make([]byte, s.PageSize())
	var pages int
	for b := range s.Blocks() {
		for p := range s.Pages(b) {
			if !s.Page(want, b, p) {
				continue
			}
			pages++
			if !bytes.Equal(g.Pages[PageID{b, p}], want) {
				return fmt.Errorf("page %d of block %d, %v, is not what Page says", p, b, s.Kind(b, p))
			}
		}
	}
	if pages != len(g.Pages) {
		return fmt.Errorf("%d pages, Page has %d", len(g.Pages), pages)
	}
	return nil
}

// TestKinds checks that what the kinds promise holds.
func TestKinds(t *testing.T) {
	s := New(Options{Blocks: []Block{{Name: "m", Size: 8 << 20}}, Mix: Mix{1, 1, 1, 1, 1, 1, 1, 1}, Pool: 5})
	content := map[Kind]map[[32]byte]int{}
	count := map[Kind]int{}
	page := make([]byte, s.PageSize())
	for p := range s.Pages(0) {
		k := s.Kind(0, p)
		count[k]++
		if s.Page(page, 0, p) != (k != Absent) {
			t.Fatalf("page %d of kind %d", p, k)
		}
		if content[k] == nil {
			content[k] = map[[32]byte]int{}
		}
		content[k][sha256.Sum256(page)]++
	}
	for k := range kinds {
		if n := count[k]; n < 150 {
			t.Errorf("kind %d: %d of 2048 pages", k, n)
		}
		want := count[k]
		switch k {
		case Absent, Zero, ZeroData:
			want = 1
		case Duplicate:
			want = 5
		}
		if got := len(content[k]); got != want {
			t.Errorf("kind %d: %d contents in %d pages, want %d", k, got, count[k], want)
		}
	}
}

// TestRecords counts the kinds of records that the options for them bring.
func TestRecords(t *testing.T) {
	count := func(o Options) map[ramparse.Kind]int {
		m := map[ramparse.Kind]int{}
		w := walker{rest: func([]byte) error { return nil }}
		w.record = func(r *ramparse.Record) error { m[r.Kind]++; return nil }
		r := New(o).Reader()
		defer r.Close()
		if err := w.walk(r); err != nil {
			t.Fatal(err)
		}
		return m
	}
	if m := count(Options{Passes: 3, Resend: 0.5, XBZRLE: true}); m[ramparse.XBZRLE] < 20 || m[ramparse.Zero] < 20 {
		t.Errorf("records of a live stream with XBZRLE: %v", m)
	}
	if m := count(Options{Compress: 0.5}); m[ramparse.Compressed] < 40 || m[ramparse.Page] < 40 {
		t.Errorf("records of a stream with compression: %v", m)
	}
}

// TestOrder checks that a shuffled pass has each page once and does not rise.
func TestOrder(t *testing.T) {
	for _, n := range []uint64{1, 2, 3, 30, 256, 1 << 20, 12345} {
		o := newOrder(n, hash(n), true)
		var list []uint64
		for i := range n {
			list = append(list, o.at(i))
		}
		if n > 3 && slices.IsSorted(list) {
			t.Errorf("%d pages: in order", n)
		}
		slices.Sort(list)
		for i := range n {
			if list[i] != i {
				t.Fatalf("%d pages: %d is missing", n, i)
			}
		}
	}
}

// TestReader reads in odd pieces, ends early, and compares.
func TestReader(t *testing.T) {
	s := New(Options{Seed: 1})
	want := s.Bytes()
	r := s.Reader()
	var got []byte
	for i := 1; ; i = i*7%4099 + 1 {
		b := make([]byte, i)
		n, err := r.Read(b)
		got = append(got, b[:n]...)
		if err == io.EOF {
			break
		}
	}
	if !bytes.Equal(got, want) || s.Layout().Len != int64(len(want)) {
		t.Error("Reader and Bytes differ")
	}
	early := s.Reader()
	early.Read(make([]byte, 10))
	early.Close()

	same := &Compare{R: s.Reader()}
	if _, err := same.Write(want); err != nil || same.Close() != nil {
		t.Errorf("comparison with itself: %v", err)
	}
	want[len(want)/2] ^= 1
	other := &Compare{R: s.Reader()}
	if _, err := other.Write(want); !errors.Is(err, ErrDiffer) {
		t.Errorf("comparison with a changed one: %v", err)
	}
	short := &Compare{R: s.Reader()}
	short.Write(s.Bytes()[:10])
	if err := short.Close(); !errors.Is(err, ErrDiffer) {
		t.Errorf("comparison with its beginning: %v", err)
	}
}

// TestXBZRLE applies differences to what they were made against.
func TestXBZRLE(t *testing.T) {
	s := New(Options{Passes: 3, Resend: 1})
	a, b := make([]byte, 4096), make([]byte, 4096)
	var made int
	for p := range s.Pages(0) {
		s.content(a, s.state(0, 0, p))
		s.content(b, s.state(2, 0, p))
		d, ok := EncodeXBZRLE(a, b)
		if !ok {
			continue
		}
		made++
		if err := ramparse.ApplyXBZRLE(a, d); err != nil || !bytes.Equal(a, b) {
			t.Errorf("page %d: %v", p, err)
		}
	}
	if made < 50 {
		t.Errorf("only %d differences", made)
	}
}

func BenchmarkZeroAndRepeated(b *testing.B) {
	s := New(Options{Blocks: []Block{{Name: "m", Size: 1 << 30}}, Mix: Mix{Zero: 8, ZeroData: 1, Duplicate: 1}})
	b.SetBytes(1 << 30)
	for b.Loop() {
		r := s.Reader()
		io.Copy(io.Discard, r)
	}
}
