// Package skeleton keeps everything of a migration stream that is not page
// content, in the stream's order: bytes to be repeated verbatim, and runs that
// say where page records stood. Played back with the page map's content it
// gives the stream again.
//
// The log is a sequence of operations:
//
//	0x01  uvarint n, n bytes           literal: bytes of the stream
//	0x02  uvarint block, page, count   page records of count pages, one after
//	                                   the other; all with RAM_SAVE_FLAG_CONTINUE
//	0x03  the same                     likewise, but the first record carries
//	                                   its block's name
//
// A page stands in the log once, where it first appeared in the stream; which
// form its record has (ZERO, PAGE, COMPRESS_PAGE) follows from its entry in the
// page map. The log is cut into chunks between operations; a literal may be
// split in two for that.
package skeleton

import (
	"encoding/binary"
	"errors"
	"fmt"
)

const (
	opLiteral = 0x01
	opPages   = 0x02
	opNamed   = 0x03

	// maxOpHead is the most that an operation takes besides a literal's bytes.
	maxOpHead = 1 + 3*binary.MaxVarintLen64
)

// Writer builds the log. Emit gets chunk after chunk, each at most Limit bytes
// (Limit ≥ 64); the slice is emit's only until it returns.
type Writer struct {
	Limit int
	Emit  func(chunk []byte) error

	buf []byte
	lit []byte // literal not yet in buf
	run run
}

type run struct {
	named              bool
	block, page, count uint64
}

// Literal adds bytes of the stream.
func (w *Writer) Literal(b []byte) error {
	if len(b) == 0 {
		return nil
	}
	if err := w.endRun(); err != nil {
		return err
	}
	for len(b) > 0 {
		// Short literals, such as a section's end and the next one's start,
		// are put together into one operation.
		n := min(len(b), w.Limit-maxOpHead-len(w.lit))
		w.lit = append(w.lit, b[:n]...)
		b = b[n:]
		if len(w.lit) == w.Limit-maxOpHead {
			if err := w.endLiteral(); err != nil {
				return err
			}
		}
	}
	return nil
}

// Page adds the place of a page's record.
func (w *Writer) Page(block int, page uint64, named bool) error {
	r := &w.run
	if r.count > 0 && !named && uint64(block) == r.block && page == r.page+r.count {
		r.count++
		return nil
	}
	if err := w.endRun(); err != nil {
		return err
	}
	if err := w.endLiteral(); err != nil {
		return err
	}
	*r = run{named, uint64(block), page, 1}
	return nil
}

func (w *Writer) endRun() error {
	r := w.run
	if r.count == 0 {
		return nil
	}
	w.run = run{}
	if err := w.room(maxOpHead); err != nil {
		return err
	}
	op := byte(opPages)
	if r.named {
		op = opNamed
	}
	w.buf = append(w.buf, op)
	w.buf = binary.AppendUvarint(w.buf, r.block)
	w.buf = binary.AppendUvarint(w.buf, r.page)
	w.buf = binary.AppendUvarint(w.buf, r.count)
	return nil
}

func (w *Writer) endLiteral() error {
	if len(w.lit) == 0 {
		return nil
	}
	if err := w.room(maxOpHead + len(w.lit)); err != nil {
		return err
	}
	w.buf = append(w.buf, opLiteral)
	w.buf = binary.AppendUvarint(w.buf, uint64(len(w.lit)))
	w.buf = append(w.buf, w.lit...)
	w.lit = w.lit[:0]
	return nil
}

func (w *Writer) room(n int) error {
	if len(w.buf) > 0 && len(w.buf)+n > w.Limit {
		return w.emit()
	}
	return nil
}

func (w *Writer) emit() error {
	err := w.Emit(w.buf)
	w.buf = w.buf[:0]
	return err
}

// Flush ends the log.
func (w *Writer) Flush() error {
	if err := w.endRun(); err != nil {
		return err
	}
	if err := w.endLiteral(); err != nil {
		return err
	}
	if len(w.buf) == 0 {
		return nil
	}
	return w.emit()
}

// Player is told the operations of a log, in order.
type Player interface {
	Literal(b []byte) error
	Pages(block int, page, count uint64, named bool) error
}

// ErrDamaged is wrapped by Play's own errors, and by those of a Player that is played
// what can't be.
var ErrDamaged = errors.New("skeleton log damaged")

// Play decodes one chunk. pages gives the number of pages of each RAM block,
// against which every run is checked.
func Play(chunk []byte, pages []uint64, p Player) error {
	for b := chunk; len(b) > 0; {
		at := len(chunk) - len(b)
		op := b[0]
		b = b[1:]
		var v [3]uint64
		want := 3
		if op == opLiteral {
			want = 1
		}
		for i := range want {
			x, n := binary.Uvarint(b)
			if n <= 0 {
				return fmt.Errorf("%w at byte %d: ends inside an operation", ErrDamaged, at)
			}
			v[i], b = x, b[n:]
		}
		var err error
		switch op {
		case opLiteral:
			if v[0] > uint64(len(b)) {
				return fmt.Errorf("%w at byte %d: literal of %d bytes", ErrDamaged, at, v[0])
			}
			err = p.Literal(b[:v[0]])
			b = b[v[0]:]
		case opPages, opNamed:
			if v[0] >= uint64(len(pages)) || v[2] == 0 || v[1] > pages[v[0]] || v[2] > pages[v[0]]-v[1] {
				return fmt.Errorf("%w at byte %d: %d pages at block %d page %d", ErrDamaged, at, v[2], v[0], v[1])
			}
			err = p.Pages(int(v[0]), v[1], v[2], op == opNamed)
		default:
			return fmt.Errorf("%w at byte %d: operation %#x", ErrDamaged, at, op)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
