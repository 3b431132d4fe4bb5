package skeleton

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
)

// log is a Player that writes down what it is told, page by page.
type log struct {
	ops []string
	lit []byte // of the literals that come one after the other
}

func (l *log) Literal(b []byte) error {
	l.lit = append(l.lit, b...)
	return nil
}

func (l *log) flush() {
	if len(l.lit) > 0 {
		l.ops = append(l.ops, string(l.lit))
		l.lit = nil
	}
}

func (l *log) Pages(block int, page, count uint64, named bool) error {
	l.flush()
	for i := range count {
		l.ops = append(l.ops, fmt.Sprintf("page %d/%d %v", block, page+i, named && i == 0))
	}
	return nil
}

// write plays a random stream into a Writer and a log.
func write(t testing.TB, w *Writer, want *log, seed uint64, pages []uint64) {
	t.Helper()
	rng := rand.New(rand.NewPCG(seed, 1))
	must := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	for range 300 {
		switch rng.IntN(3) {
		case 0:
			b := make([]byte, rng.IntN(1+rng.IntN(200)))
			for i := range b {
				b[i] = byte(rng.Uint32())
			}
			must(w.Literal(b))
			must(want.Literal(b))
		case 1:
			block := rng.IntN(len(pages))
			first := rng.Uint64N(pages[block])
			for p := first; p < min(pages[block], first+rng.Uint64N(40)); p++ {
				named := p == first && rng.IntN(2) == 0
				must(w.Page(block, p, named))
				must(want.Pages(block, p, 1, named))
			}
		case 2:
			// Named in the middle of what would be a run.
			must(w.Page(0, 5, false))
			must(w.Page(0, 6, true))
			must(want.Pages(0, 5, 1, false))
			must(want.Pages(0, 6, 1, true))
		}
	}
	must(w.Flush())
	want.flush()
}

// TestRoundTrip plays back what was written, whatever the length of a chunk.
func TestRoundTrip(t *testing.T) {
	pages := []uint64{1000, 1 << 30, 7}
	for _, limit := range []int{64, 77, 500, 1 << 18} {
		for seed := range uint64(5) {
			var chunks [][]byte
			w := &Writer{Limit: limit, Emit: func(b []byte) error {
				if len(b) == 0 || len(b) > limit {
					t.Errorf("chunk of %d bytes, limit %d", len(b), limit)
				}
				chunks = append(chunks, bytes.Clone(b))
				return nil
			}}
			var want, got log
			write(t, w, &want, seed, pages)
			for _, c := range chunks {
				if err := Play(c, pages, &got); err != nil {
					t.Fatal(err)
				}
			}
			got.flush()
			if !slices.Equal(got.ops, want.ops) {
				t.Errorf("limit %d, seed %d: played back otherwise", limit, seed)
			}
		}
	}
}

// TestSmall checks that runs and neighbouring literals become one operation.
func TestSmall(t *testing.T) {
	var n int
	w := &Writer{Limit: 1 << 18, Emit: func(b []byte) error { n += len(b); return nil }}
	for p := range uint64(1 << 20) {
		if err := w.Page(1, p, p == 0); err != nil {
			t.Fatal(err)
		}
	}
	for range 10 {
		w.Literal([]byte("0123456789"))
	}
	w.Literal(nil)
	w.Page(0, 0, true)
	if err := w.Flush(); err != nil {
		t.Fatal(err)
	}
	if n > 6+102+4 {
		t.Errorf("a run, a literal of 100 bytes and a page take %d bytes", n)
	}
	if n = 0; w.Flush() != nil || n != 0 {
		t.Error("a second Flush emits something")
	}
}

// TestEmitFails gives the emitter's error back from whatever call meets it.
func TestEmitFails(t *testing.T) {
	full := errors.New("full")
	for name, fn := range map[string]func(w *Writer) error{
		"literal": func(w *Writer) error { return w.Literal(make([]byte, 1000)) },
		"page": func(w *Writer) error {
			for p := range uint64(1000) {
				if err := w.Page(0, 2*p, false); err != nil {
					return err
				}
			}
			return nil
		},
		"flush": func(w *Writer) error { w.Literal([]byte("x")); return w.Flush() },
	} {
		if err := fn(&Writer{Limit: 64, Emit: func([]byte) error { return full }}); err != full {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestDamaged plays what no Writer makes.
func TestDamaged(t *testing.T) {
	pages := []uint64{10, 0}
	op := func(op byte, v ...uint64) []byte {
		b := []byte{op}
		for _, x := range v {
			b = binary.AppendUvarint(b, x)
		}
		return b
	}
	for name, c := range map[string]struct {
		chunk []byte
		ok    bool
	}{
		"nothing":           {nil, true},
		"whole block":       {op(opPages, 0, 0, 10), true},
		"last page":         {op(opNamed, 0, 9, 1), true},
		"unknown operation": {op(0x04, 0, 0, 1), false},
		"operation 0":       {op(0), false},
		"literal too long":  {append(op(opLiteral, 3), "ab"...), false},
		"literal far":       {append(op(opLiteral, 1<<63), "ab"...), false},
		"cut in a number":   {[]byte{opPages, 0, 0x80}, false},
		"no count":          {op(opPages, 0, 1), false},
		"endless number":    {append([]byte{opLiteral}, bytes.Repeat([]byte{0x80}, 12)...), false},
		"no pages":          {op(opPages, 0, 0, 0), false},
		"no such block":     {op(opPages, 2, 0, 1), false},
		"no such page":      {op(opPages, 0, 10, 1), false},
		"empty block":       {op(opPages, 1, 0, 1), false},
		"past the end":      {op(opPages, 0, 5, 6), false},
		"overflow":          {op(opPages, 0, 5, 1<<64-2), false},
		"far block":         {op(opNamed, 1<<63, 0, 1), false},
	} {
		err := Play(c.chunk, pages, &log{})
		if (err == nil) != c.ok || err != nil && !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// failing fails at its n-th call.
type failing struct {
	n   int
	err error
}

func (f *failing) Literal([]byte) error {
	if f.n--; f.n == 0 {
		return f.err
	}
	return nil
}
func (f *failing) Pages(int, uint64, uint64, bool) error { return f.Literal(nil) }

// TestPlayerFails ends where the player does, with its error and no other.
func TestPlayerFails(t *testing.T) {
	chunk := []byte{opLiteral, 1, 'x', opPages, 0, 0, 1, opNamed, 0, 1, 1}
	stop := errors.New("stop")
	for n := 1; n <= 3; n++ {
		if err := Play(chunk, []uint64{2}, &failing{n, stop}); err != stop {
			t.Errorf("call %d: %v", n, err)
		}
	}
}

// rewriter writes again what it is told.
type rewriter struct{ *Writer }

func (r rewriter) Pages(block int, page, count uint64, named bool) error {
	for i := range min(count, 1000) {
		if err := r.Page(block, page+i, named && i == 0); err != nil {
			return err
		}
	}
	return nil
}

// FuzzPlay plays any chunk. What is accepted says the same when it is written
// again.
func FuzzPlay(f *testing.F) {
	pages := []uint64{1000, 300}
	for seed := range uint64(4) {
		w := &Writer{Limit: 200, Emit: func(b []byte) error { f.Add(bytes.Clone(b)); return nil }}
		write(f, w, &log{}, seed, pages)
	}
	f.Fuzz(func(t *testing.T, chunk []byte) {
		var first, again log
		if err := Play(chunk, pages, &first); err != nil {
			if !errors.Is(err, ErrDamaged) {
				t.Fatal(err)
			}
			return
		}
		first.flush()
		w := &Writer{Limit: 128, Emit: func(b []byte) error { return Play(b, pages, &again) }}
		if err := Play(chunk, pages, rewriter{w}); err != nil {
			t.Fatal(err)
		}
		if err := w.Flush(); err != nil {
			t.Fatal(err)
		}
		again.flush()
		if !slices.Equal(first.ops, again.ops) {
			t.Fatal("written again it says something else")
		}
	})
}
