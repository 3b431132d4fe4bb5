package stream

import (
	"io"
)

const (
	// MaxPeek is the largest number of bytes a Cursor holds at once. What is
	// longer goes through Copy.
	MaxPeek = 1 << 20

	// minBuffer holds the largest RAM record: a 64 KiB page with its header
	// and block name.
	minBuffer = 128 << 10
)

// A Cursor reads a stream through a buffer whose read-ahead is under control.
// That matters because a save must not take the device tail out of QEMU's pipe
// before its RAM is durable: while the tail is in the pipe, the save can still
// fail and QEMU will notice.
//
// Slices returned by Peek and Next point into the buffer and are valid until
// the next call of any method that reads. A Cursor is for one goroutine.
type Cursor struct {
	r     io.Reader
	buf   []byte
	pos   int // next byte to hand out
	end   int // end of what has been read
	base  int64
	ahead int
	err   error
}

// NewCursor returns a cursor with a buffer of size bytes (128 KiB at least).
// Its read-ahead is not limited until SetReadAhead is called.
func NewCursor(r io.Reader, size int) *Cursor {
	return &Cursor{r: r, buf: make([]byte, max(size, minBuffer)), ahead: -1}
}

// SetReadAhead limits how much the cursor asks its reader for: what the caller
// needs now and at most n bytes more. With n = 0 it takes exactly what is
// needed; a negative n lifts the limit. Bytes already buffered stay.
func (c *Cursor) SetReadAhead(n int) { c.ahead = n }

// Offset returns the stream offset of the next byte.
func (c *Cursor) Offset() int64 { return c.base + int64(c.pos) }

// Buffered returns how many bytes can be had without reading.
func (c *Cursor) Buffered() int { return c.end - c.pos }

// Peek returns the next n bytes without consuming them and blocks until they
// are there. If the input ends first it returns what is left, with io.EOF when
// that is nothing and io.ErrUnexpectedEOF otherwise. n must not be negative;
// more than MaxPeek gives ErrTooLong.
func (c *Cursor) Peek(n int) ([]byte, error) {
	if n <= c.end-c.pos {
		return c.buf[c.pos : c.pos+n : c.pos+n], nil
	}
	return c.fill(n)
}

// Next returns the next n bytes and consumes them. On an error nothing is
// consumed.
func (c *Cursor) Next(n int) ([]byte, error) {
	b, err := c.Peek(n)
	if err != nil {
		return nil, err
	}
	c.pos += n
	return b, nil
}

// Skip consumes n bytes that a Peek has returned. It panics if fewer than n
// are buffered.
func (c *Cursor) Skip(n int) {
	if n < 0 || n > c.end-c.pos {
		panic("stream: Skip beyond the buffered bytes")
	}
	c.pos += n
}

// Discard consumes n bytes, reading them if need be. The error is that of
// Copy.
func (c *Cursor) Discard(n int64) error {
	return c.Copy(n, func([]byte) error { return nil })
}

// Copy hands the next n bytes to sink, in pieces which are valid during the
// call. If the input ends first, the error is io.ErrUnexpectedEOF. A piece is
// consumed when sink has returned nil for it; an error of sink ends the copy
// and is returned as it is.
func (c *Cursor) Copy(n int64, sink func([]byte) error) error {
	for n > 0 {
		if c.pos == c.end {
			// One byte is what is needed to go on; the rest of the piece comes
			// with it as far as it belongs to the n bytes.
			if err := c.read(int(min(n, int64(len(c.buf))))); err != nil {
				if err == io.EOF {
					err = io.ErrUnexpectedEOF
				}
				return err
			}
		}
		k := int(min(n, int64(c.end-c.pos)))
		if err := sink(c.buf[c.pos : c.pos+k : c.pos+k]); err != nil {
			return err
		}
		c.pos += k
		n -= int64(k)
	}
	return nil
}

// fill reads until n bytes are buffered.
func (c *Cursor) fill(n int) ([]byte, error) {
	if n > MaxPeek {
		return nil, ErrTooLong
	}
	for c.end-c.pos < n {
		if err := c.read(n - (c.end - c.pos)); err != nil {
			b := c.buf[c.pos:c.end:c.end]
			if err == io.EOF && len(b) > 0 {
				err = io.ErrUnexpectedEOF
			}
			return b, err
		}
	}
	return c.buf[c.pos : c.pos+n : c.pos+n], nil
}

// read makes one successful call of the reader's Read, for need bytes and the
// read-ahead. The buffer must be able to hold need bytes more: read makes room
// by moving what is left to the front, or by growing towards MaxPeek.
func (c *Cursor) read(need int) error {
	if c.err != nil {
		return c.err
	}
	if c.pos == c.end || len(c.buf)-c.end < need {
		c.base += int64(c.pos)
		c.end = copy(c.buf, c.buf[c.pos:c.end])
		c.pos = 0
	}
	if c.end+need > len(c.buf) {
		grown := make([]byte, max(c.end+need, min(2*len(c.buf), MaxPeek)))
		copy(grown, c.buf[:c.end])
		c.buf = grown
	}
	limit := len(c.buf)
	if c.ahead >= 0 && c.ahead < limit-c.end-need {
		limit = c.end + need + c.ahead
	}
	// A reader may return (0, nil); one that keeps doing so is broken.
	for range 100 {
		k, err := c.r.Read(c.buf[c.end:limit])
		c.end += k
		if err != nil {
			c.err = err
		}
		if k > 0 {
			return nil
		}
		if err != nil {
			return err
		}
	}
	c.err = io.ErrNoProgress
	return c.err
}
