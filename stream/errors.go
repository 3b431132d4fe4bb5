package stream

import (
	"errors"
	"fmt"
	"io"
)

// The kinds of failure. Test for them with errors.Is; the chain also holds an
// *Error with the stream offset.
var (
	// ErrNotStream: the bytes are not a version 3 migration stream at all.
	ErrNotStream = errors.New("not a QEMU migration stream")
	// ErrTruncated: the stream ends where more has to follow.
	ErrTruncated = errors.New("migration stream is truncated")
	// ErrDamaged: the stream contradicts itself.
	ErrDamaged = errors.New("migration stream is damaged")
	// ErrUnknown: well-formed as far as can be told, but in a form this package
	// has no knowledge of. Nothing of the unknown thing has been consumed, so
	// that the rest of the stream can be kept verbatim.
	ErrUnknown = errors.New("unknown element in migration stream")
	// ErrTooLong: more bytes were asked for at once than MaxPeek.
	ErrTooLong = errors.New("more bytes than a cursor can hold")
)

// Error says what was being read (Op) and where: Offset counts bytes from the
// beginning of the stream.
type Error struct {
	Op     string
	Offset int64
	Err    error
}

func (e *Error) Error() string {
	return fmt.Sprintf("%s at offset %d: %v", e.Op, e.Offset, e.Err)
}

func (e *Error) Unwrap() error { return e.Err }

// Wrap makes an *Error of a cursor's error: an end of input becomes
// ErrTruncated, every other read error stays what it is.
func Wrap(op string, offset int64, err error) error {
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		err = ErrTruncated
	}
	return &Error{Op: op, Offset: offset, Err: err}
}

// Damaged reports a contradiction, described as by fmt.Sprintf.
func Damaged(op string, offset int64, format string, args ...any) error {
	return &Error{Op: op, Offset: offset, Err: fmt.Errorf("%w: %s", ErrDamaged, fmt.Sprintf(format, args...))}
}

// Unknown reports something outside this package's knowledge, described as by
// fmt.Sprintf.
func Unknown(op string, offset int64, format string, args ...any) error {
	return &Error{Op: op, Offset: offset, Err: fmt.Errorf("%w: %s", ErrUnknown, fmt.Sprintf(format, args...))}
}
