package stream

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"testing"
	"testing/iotest"
)

// counting notes how many bytes were asked for and got.
type counting struct {
	r   io.Reader
	got int64
}

func (c *counting) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.got += int64(n)
	return n, err
}

// pattern returns n bytes of which no two near pieces are equal.
func pattern(n int) []byte {
	rng := rand.New(rand.NewPCG(1, 2))
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	return b
}

func TestCursorEnd(t *testing.T) {
	c := NewCursor(bytes.NewReader([]byte("abc")), 0)
	if b, err := c.Peek(4); string(b) != "abc" || err != io.ErrUnexpectedEOF {
		t.Errorf("Peek(4) of 3 = %q, %v; want what is left and io.ErrUnexpectedEOF", b, err)
	}
	if b, err := c.Next(4); b != nil || err != io.ErrUnexpectedEOF || c.Offset() != 0 {
		t.Errorf("Next(4) of 3 = %q, %v at %d; want nothing consumed", b, err, c.Offset())
	}
	if b, err := c.Next(3); string(b) != "abc" || err != nil {
		t.Errorf("Next(3) = %q, %v", b, err)
	}
	if b, err := c.Peek(1); len(b) != 0 || err != io.EOF {
		t.Errorf("Peek at the end = %q, %v; want io.EOF", b, err)
	}
	if b, err := c.Peek(0); len(b) != 0 || err != nil {
		t.Errorf("Peek(0) at the end = %q, %v; want nil", b, err)
	}
	if err := c.Copy(1, func([]byte) error { return nil }); err != io.ErrUnexpectedEOF {
		t.Errorf("Copy at the end: %v; want io.ErrUnexpectedEOF", err)
	}
	if err := c.Discard(0); err != nil {
		t.Errorf("Discard(0) at the end: %v", err)
	}
}

func TestCursorReadError(t *testing.T) {
	broken := errors.New("broken")
	c := NewCursor(io.MultiReader(bytes.NewReader([]byte("ab")), iotest.ErrReader(broken)), 0)
	for range 2 { // the error stays
		if b, err := c.Peek(3); string(b) != "ab" || err != broken {
			t.Errorf("Peek = %q, %v; want the reader's error", b, err)
		}
	}
	// A reader may return bytes and its error at once.
	c = NewCursor(iotest.DataErrReader(bytes.NewReader([]byte("abc"))), 0)
	if b, err := c.Peek(3); string(b) != "abc" || err != nil {
		t.Errorf("Peek with data and error at once = %q, %v", b, err)
	}
	c = NewCursor(stuck{}, 0)
	if _, err := c.Peek(1); err != io.ErrNoProgress {
		t.Errorf("Peek of a reader that returns nothing: %v; want io.ErrNoProgress", err)
	}
}

type stuck struct{}

func (stuck) Read([]byte) (int, error) { return 0, nil }

func TestCursorTooLong(t *testing.T) {
	c := NewCursor(bytes.NewReader(pattern(MaxPeek+1)), 0)
	if b, err := c.Peek(MaxPeek); len(b) != MaxPeek || err != nil {
		t.Errorf("Peek(MaxPeek) = %d bytes, %v", len(b), err)
	}
	if _, err := c.Peek(MaxPeek + 1); err != ErrTooLong {
		t.Errorf("Peek(MaxPeek+1): %v; want ErrTooLong", err)
	}
	if len(c.buf) > MaxPeek {
		t.Errorf("buffer grew to %d bytes; want at most MaxPeek", len(c.buf))
	}
}

func TestCursorSkipPanics(t *testing.T) {
	c := NewCursor(bytes.NewReader([]byte("abc")), 0)
	c.Peek(2)
	for _, n := range []int{-1, 4} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("Skip(%d) of at most 3 buffered bytes did not panic", n)
				}
			}()
			c.Skip(n)
		}()
	}
}

// TestCursorReadAhead checks the promise that a save's hold-back stands on:
// never more is read than what is needed and the read-ahead.
func TestCursorReadAhead(t *testing.T) {
	for _, ahead := range []int{0, 1, 100, 200_000} {
		r := &counting{r: bytes.NewReader(pattern(1 << 20))}
		c := NewCursor(r, 0)
		c.SetReadAhead(ahead)
		rng := rand.New(rand.NewPCG(3, 4))
		for need := int64(0); need < 900<<10; {
			n := rng.IntN(9000)
			switch rng.IntN(4) {
			case 0:
				c.Peek(n)
				need = max(need, c.Offset()+int64(n))
			case 1:
				c.Next(n)
				need = max(need, c.Offset())
			case 2:
				c.Discard(int64(n))
				need = max(need, c.Offset())
			case 3:
				c.Skip(min(n, c.Buffered()))
			}
			if r.got > need+int64(ahead) {
				t.Fatalf("read-ahead %d: %d bytes read when %d were needed", ahead, r.got, need)
			}
		}
	}
}

// TestCursorUnlimited checks that without a limit a buffer is filled at once.
func TestCursorUnlimited(t *testing.T) {
	r := &counting{r: bytes.NewReader(pattern(1 << 20))}
	c := NewCursor(r, 300_000)
	c.Peek(1)
	if r.got != 300_000 || c.Buffered() != 300_000 {
		t.Errorf("%d bytes read, %d buffered; want the size of the buffer", r.got, c.Buffered())
	}
}

// TestCursorContent compares what comes out with what went in, for random
// calls over readers that return pieces of any size.
func TestCursorContent(t *testing.T) {
	in := pattern(1 << 20)
	readers := map[string]func() io.Reader{
		"whole":    func() io.Reader { return bytes.NewReader(in) },
		"half":     func() io.Reader { return iotest.HalfReader(bytes.NewReader(in)) },
		"one byte": func() io.Reader { return iotest.OneByteReader(bytes.NewReader(in)) },
	}
	for name, reader := range readers {
		t.Run(name, func(t *testing.T) {
			c := NewCursor(reader(), 0)
			rng := rand.New(rand.NewPCG(5, 6))
			at := 0
			for at < len(in) {
				n := min(rng.IntN(20_000), len(in)-at)
				c.SetReadAhead(rng.IntN(300_000) - 1)
				switch rng.IntN(3) {
				case 0:
					b, err := c.Peek(n)
					if err != nil || !bytes.Equal(b, in[at:at+n]) {
						t.Fatalf("Peek(%d) at %d differs (%v)", n, at, err)
					}
				case 1:
					b, err := c.Next(n)
					if err != nil || !bytes.Equal(b, in[at:at+n]) {
						t.Fatalf("Next(%d) at %d differs (%v)", n, at, err)
					}
					at += n
				case 2:
					var got []byte
					err := c.Copy(int64(n), func(p []byte) error { got = append(got, p...); return nil })
					if err != nil || !bytes.Equal(got, in[at:at+n]) {
						t.Fatalf("Copy(%d) at %d differs (%v)", n, at, err)
					}
					at += n
				}
				if c.Offset() != int64(at) {
					t.Fatalf("Offset %d, want %d", c.Offset(), at)
				}
			}
		})
	}
}

func TestCursorCopySinkError(t *testing.T) {
	full := errors.New("full")
	c := NewCursor(iotest.HalfReader(bytes.NewReader(pattern(100))), 0)
	c.SetReadAhead(0)
	pieces := 0
	err := c.Copy(100, func(p []byte) error {
		if pieces++; pieces == 2 {
			return full
		}
		return nil
	})
	if err != full || c.Offset() != 50 {
		t.Errorf("Copy returned %v at %d; want the sink's error with its piece not consumed", err, c.Offset())
	}
}

// TestCursorAllocs holds the reader to its buffer.
func TestCursorAllocs(t *testing.T) {
	c := NewCursor(zeros{}, 0)
	if n := testing.AllocsPerRun(1000, func() { c.Peek(5000); c.Next(5000) }); n != 0 {
		t.Errorf("%v allocations for a read of 5000 bytes; want none", n)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }
