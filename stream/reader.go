package stream

// A Reader takes a stream apart into frames. Between a START, PART or END
// frame and its footer the payload belongs to the caller, who consumes it from
// the same Cursor: the RAM section with package ramparse, others with
// CopyForeign.
type Reader struct {
	c *Cursor
}

// NewReader returns a Reader that takes its bytes from c.
func NewReader(c *Cursor) *Reader { return &Reader{c: c} }

// Cursor returns the cursor the reader works on.
func (r *Reader) Cursor() *Cursor { return r.c }

// Next returns the next frame. After an EOF frame it returns io.EOF and
// consumes nothing more. A SectionFull frame consumes nothing: the device tail
// begins at the cursor, Next has looked at its type byte only and returns the
// same frame again if called again.
//
// On an error nothing of the failing element has been consumed. ErrUnknown
// then allows the rest to be kept verbatim; an input that ends, at a frame
// boundary too, gives ErrTruncated.
func (r *Reader) Next() (Frame, error) { panic("unfinished") }

// CopyForeign consumes the payload of the section whose START, PART or END
// frame was returned last, and hands its bytes to sink verbatim, in pieces
// valid during the call. It knows dirty-bitmap and block, version 1. Others
// give ErrUnknown with nothing consumed; within a known section what sink has
// seen is consumed and the unknown piece is not.
func (r *Reader) CopyForeign(sink func([]byte) error) error { panic("unfinished") }

// CopyPackage consumes the bytes that follow a PACKAGED command frame and
// hands them to sink, in pieces valid during the call.
func (r *Reader) CopyPackage(sink func([]byte) error) error { panic("unfinished") }

// Footers reports whether the stream has section footers: false until the
// first one has been read, and for machine types before 2.4.
func (r *Reader) Footers() bool { panic("unfinished") }
