// Package moved is the form of hot pages that are no longer in NVRAM: a checkpoint's
// pages that only older checkpoints need go to flash, to make room for newer ones, and
// whoever names them by their slots in the NVRAM part finds them here. They are raw, as
// they were there, so that a page of them is read like one of NVRAM, through a mapping.
//
// What has been moved of an image at one time is a piece, a file that never changes:
//
//	0 ┌─────────────────────────────────────────────┐
//	  │ magic, version, page size, UUID of the      │
//	  │ image, number of ranges, length of header   │
//	  │ ranges of slots                             │
//	  │ zeros …                           CRC-32C   │
//	H ├─────────────────────────────────────────────┤
//	  │ page of the lowest slot │ of the next │ …   │
//	  └─────────────────────────────────────────────┘
//
// The pages have their checksums and digests where those of the NVRAM part are, in the
// image. docs/format.md has every byte.
package moved

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/source"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

const (
	magic   = "FLICMOV\x00"
	version = 1

	fixedLen = 48 // before the ranges
	rangeLen = 8
	crcLen   = 4
	// unit is what the header's length is a multiple of, so that pages are where a
	// mapping wants them.
	unit = 4 << 10

	// MaxBytes is how much a piece has of pages, so that writing one is not long.
	MaxBytes = 64 << 20
	// maxRanges is as many as that can be of the smallest pages, of which every other
	// is moved.
	maxRanges = MaxBytes / 256
)

// headerLen is the length of the header of a piece with so many ranges.
func headerLen(ranges int) int64 {
	return (fixedLen + int64(ranges)*rangeLen + crcLen + unit - 1) / unit * unit
}

// Piece says what is in a piece.
type Piece struct {
	UUID     uuid.UUID // of the image whose NVRAM part the slots are of
	PageSize int       // bytes
	Slots    source.Ranges
}

// Bytes is the length of the piece's file.
func (p *Piece) Bytes() int64 {
	return headerLen(len(p.Slots)) + int64(p.Slots.Count())*int64(p.PageSize)
}

// header is the stored form of what is before the pages.
func (p *Piece) header() []byte {
	b := make([]byte, headerLen(len(p.Slots)))
	le := binary.LittleEndian
	copy(b, magic)
	le.PutUint32(b[8:], version)
	le.PutUint32(b[12:], uint32(p.PageSize))
	copy(b[16:], p.UUID[:])
	le.PutUint32(b[32:], uint32(len(p.Slots)))
	le.PutUint32(b[36:], uint32(len(b)))
	for i, r := range p.Slots {
		le.PutUint32(b[fixedLen+rangeLen*i:], r.First)
		le.PutUint32(b[fixedLen+rangeLen*i+4:], r.Count)
	}
	le.PutUint32(b[len(b)-crcLen:], integrity.Checksum(b[:len(b)-crcLen]))
	return b
}

// Write writes a whole piece, of at most MaxBytes of pages, and makes its content
// durable; page fills in the content of a slot.
func Write(ctx context.Context, dst image.Sink, p *Piece, page func(slot uint32, dst []byte) error) error {
	if len(p.Slots) > maxRanges {
		return fmt.Errorf("%d ranges of slots to move at once", len(p.Slots))
	}
	if _, err := dst.Write(p.header()); err != nil {
		return err
	}
	const chunk = 256 << 10
	buf := make([]byte, 0, max(chunk, p.PageSize))
	written := headerLen(len(p.Slots))
	flush := func() error {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		n, err := dst.Write(buf)
		dst.StartWriteback(written, int64(n))
		written += int64(n)
		buf = buf[:0]
		return err
	}
	err := p.Slots.Each(func(slot uint32) error {
		at := len(buf)
		buf = buf[:at+p.PageSize]
		err := page(slot, buf[at:])
		if err == nil && len(buf)+p.PageSize > cap(buf) {
			err = flush()
		}
		return err
	})
	if err == nil && len(buf) > 0 {
		err = flush()
	}
	if err != nil {
		return err
	}
	return dst.Sync()
}

// Read reads what is in a piece, and no page of it. A piece that does not have all its
// pages is damaged.
func Read(src image.Source) (*Piece, error) {
	bad := func(format string, args ...any) error {
		return &integrity.CorruptError{File: src.Name(), What: "header", Err: fmt.Errorf(format, args...)}
	}
	size, err := src.Size()
	if err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	var fixed [fixedLen]byte
	if size < unit {
		return nil, bad("%d bytes are too few", size)
	}
	if err := readAt(src, fixed[:], 0); err != nil {
		return nil, err
	}
	n, length := int(le.Uint32(fixed[32:])), int64(le.Uint32(fixed[36:]))
	if string(fixed[:8]) != magic {
		return nil, bad("it is no file of moved pages")
	}
	if n > maxRanges || length != headerLen(n) || length > size {
		return nil, bad("%d ranges in a header of %d bytes, in %d", n, length, size)
	}
	b := make([]byte, length)
	if err := readAt(src, b, 0); err != nil {
		return nil, err
	}
	if integrity.Checksum(b[:length-crcLen]) != le.Uint32(b[length-crcLen:]) {
		return nil, bad("%w", integrity.ErrChecksum)
	}
	if v := le.Uint32(b[8:]); v != version {
		return nil, &image.UnsupportedError{File: src.Name(), Version: v, Why: fmt.Sprintf("moved pages in version %d are not known here", v)}
	}
	p := &Piece{PageSize: int(le.Uint32(b[12:]))}
	copy(p.UUID[:], b[16:])
	next := uint64(0) // the lowest that a range may begin with
	for i := range n {
		r := source.Range{First: le.Uint32(b[fixedLen+rangeLen*i:]), Count: le.Uint32(b[fixedLen+rangeLen*i+4:])}
		if uint64(r.First) < next || r.Count == 0 {
			return nil, bad("range %d: %d slots from %d on", i, r.Count, r.First)
		}
		p.Slots, next = append(p.Slots, r), r.End()+1
	}
	if p.PageSize < 256 || p.PageSize > 64<<10 || p.Bytes() != size {
		return nil, bad("%d pages of %d bytes in a file of %d", p.Slots.Count(), p.PageSize, size)
	}
	return p, nil
}

// readAt fills b, or says why not.
func readAt(src image.Source, b []byte, off int64) error {
	n, err := src.ReadAt(b, off)
	if n == len(b) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		return &integrity.CorruptError{File: src.Name(), Offset: off, What: "header", Err: io.ErrUnexpectedEOF}
	}
	return err
}

// Unneeded calls fn with the ranges of bytes, from off up to end, of pages that are not
// among those needed.
func (p *Piece) Unneeded(need source.Ranges, fn func(off, end int64)) {
	at := headerLen(len(p.Slots))
	size := int64(p.PageSize)
	for _, r := range p.Slots {
		for _, hole := range (source.Ranges{r}).Minus(need) {
			from := at + int64(hole.First-r.First)*size
			fn(from, from+int64(hole.Count)*size)
		}
		at += int64(r.Count) * size
	}
}

// Offset is where in the file the page of a slot is that the piece has.
func (p *Piece) Offset(slot uint32) int64 {
	at := headerLen(len(p.Slots))
	for _, r := range p.Slots {
		if uint64(slot) < r.End() {
			return at + int64(slot-r.First)*int64(p.PageSize)
		}
		at += int64(r.Count) * int64(p.PageSize)
	}
	return at
}

// Source is a piece's file.
type Source interface {
	image.Source
	Map(off, n int64, writable bool) (vfs.Mapping, error)
	io.Closer
}
