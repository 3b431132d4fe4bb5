package tiertest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/stream"
)

// Guest is what a destination has after it has loaded a stream.
type Guest struct {
	PageSize int // 0: no page told it
	Blocks   []ramparse.Block
	Pages    map[PageID][]byte // pages that were sent
	Records  int               // page records
	Rest     []byte            // the stream without its page records
}

// PageID is a page's block and index.
type PageID struct {
	Block int
	Page  uint64
}

// Load loads a stream as QEMU's destination does: the last version of a page
// counts, and a difference applies to what the page held.
func Load(r io.Reader) (*Guest, error) {
	g := &Guest{Pages: make(map[PageID][]byte)}
	w := walker{rest: func(b []byte) error { g.Rest = append(g.Rest, b...); return nil }}
	w.record = func(rec *ramparse.Record) error {
		g.Records++
		id := PageID{rec.Block, rec.Page}
		page := g.Pages[id]
		size := w.dec.PageSize()
		if rec.Kind == ramparse.Zero && size == 0 {
			// A page at address 0 before the page size is known.
			g.Pages[id] = []byte{rec.Fill}
			return nil
		}
		if len(page) != size {
			page = make([]byte, size)
			g.Pages[id] = page
		}
		return apply(page, rec)
	}
	err := w.walk(r)
	if w.dec != nil && w.dec.Setup() != nil {
		g.PageSize, g.Blocks = w.dec.PageSize(), w.dec.Setup().Blocks
	}
	for id, page := range g.Pages {
		if len(page) == 1 && g.PageSize != 0 {
			g.Pages[id] = bytes.Repeat(page, g.PageSize)
		}
	}
	return g, err
}

// apply does what a record does to a page.
func apply(page []byte, rec *ramparse.Record) error {
	switch rec.Kind {
	case ramparse.Zero:
		for i := range page {
			page[i] = rec.Fill
		}
	case ramparse.Page:
		copy(page, rec.Data)
	case ramparse.XBZRLE:
		return ramparse.ApplyXBZRLE(page, rec.Data)
	case ramparse.Compressed:
		return ramparse.Inflate(page, rec.Data)
	}
	return nil
}

// SamePages compares the RAM of two guests.
func (g *Guest) SamePages(o *Guest) error {
	if g.PageSize != o.PageSize || len(g.Pages) != len(o.Pages) {
		return fmt.Errorf("%d pages of %d bytes and %d pages of %d bytes", len(g.Pages), g.PageSize, len(o.Pages), o.PageSize)
	}
	for id, page := range g.Pages {
		other, ok := o.Pages[id]
		if !ok {
			return fmt.Errorf("page %v was sent to one only", id)
		}
		if !bytes.Equal(page, other) {
			return fmt.Errorf("page %v differs", id)
		}
	}
	return nil
}

// Check reads a restored stream and compares every page with what the guest
// must have, as it comes; a page that comes twice is an error. It takes one bit
// of memory a page.
func (s *Stream) Check(r io.Reader) error {
	seen := make([][]uint64, len(s.o.Blocks))
	for b := range seen {
		seen[b] = make([]uint64, (s.Pages(b)+63)/64)
	}
	got, want := make([]byte, s.o.PageSize), make([]byte, s.o.PageSize)
	w := walker{pageSize: s.o.PageSize, rest: func([]byte) error { return nil }}
	w.record = func(rec *ramparse.Record) error {
		word, bit := &seen[rec.Block][rec.Page/64], uint64(1)<<(rec.Page%64)
		if *word&bit != 0 {
			return fmt.Errorf("offset %d: page %d of block %d comes twice", rec.Offset, rec.Page, rec.Block)
		}
		*word |= bit
		if rec.Kind == ramparse.XBZRLE {
			return fmt.Errorf("offset %d: XBZRLE in a restored stream", rec.Offset)
		}
		if err := apply(got, rec); err != nil {
			return err
		}
		s.Page(want, rec.Block, rec.Page)
		if !bytes.Equal(got, want) {
			return fmt.Errorf("offset %d: page %d of block %d is not what was saved", rec.Offset, rec.Page, rec.Block)
		}
		return nil
	}
	if err := w.walk(r); err != nil {
		return err
	}
	for b := range seen {
		for page := range s.Pages(b) {
			if sent := s.last(s.o.Passes-1, b, page) >= 0; sent != (seen[b][page/64]>>(page%64)&1 != 0) {
				return fmt.Errorf("page %d of block %d: saved %v, restored %v", page, b, sent, !sent)
			}
		}
	}
	return nil
}

// walker takes a stream apart.
type walker struct {
	pageSize int
	dec      *ramparse.Decoder
	record   func(*ramparse.Record) error // page records
	rest     func([]byte) error           // all else
}

func (w *walker) walk(r io.Reader) error {
	cur := stream.NewCursor(r, 256<<10)
	rd := stream.NewReader(cur)
	o := ramparse.Options{PageSize: w.pageSize}
	for {
		f, err := rd.Next()
		if err != nil {
			return err
		}
		if err := w.rest(f.Raw); err != nil {
			return err
		}
		switch f.Kind {
		case stream.SectionFull, stream.EOF:
			for {
				if _, err := cur.Peek(1); err == io.EOF {
					return nil
				} else if err != nil {
					return err
				}
				b, _ := cur.Next(cur.Buffered())
				if err := w.rest(b); err != nil {
					return err
				}
			}
		case stream.Subsection:
			if f.Subsection.TargetPageBits != 0 {
				o.PageSize = 1 << f.Subsection.TargetPageBits
			}
			for _, c := range f.Subsection.Capabilities {
				o.IgnoreShared = o.IgnoreShared || c == "x-ignore-shared"
			}
		case stream.CommandFrame:
			switch f.Command.Number {
			case stream.CommandPackaged:
				err = rd.CopyPackage(w.rest)
			case stream.CommandPostcopyAdvise:
				if p := f.Command.Payload; len(p) == 16 && o.PageSize == 0 {
					o.PageSize = int(binary.BigEndian.Uint64(p[8:]))
				}
			}
		case stream.SectionStart, stream.SectionPart, stream.SectionEnd:
			if f.Section.Name != ramparse.SectionName {
				err = rd.CopyForeign(w.rest)
				break
			}
			if w.dec == nil {
				w.dec = ramparse.NewDecoder(o)
			}
			err = w.records(cur)
		}
		if err != nil {
			return err
		}
	}
}

func (w *walker) records(cur *stream.Cursor) error {
	var rec ramparse.Record
	for {
		if err := w.dec.Next(cur, &rec); err != nil {
			return err
		}
		var err error
		switch rec.Kind {
		case ramparse.Zero, ramparse.Page, ramparse.XBZRLE, ramparse.Compressed:
			err = w.record(&rec)
		default:
			err = w.rest(rec.Raw)
		}
		if err != nil || rec.Kind == ramparse.EOS {
			return err
		}
	}
}

// ErrDiffer is what Equal returns for streams that differ.
var ErrDiffer = errors.New("streams differ")

// Compare is a writer that compares what is written to it with what r reads,
// for streams too long to be held. Close reports what is missing.
type Compare struct {
	R   io.Reader
	buf []byte
	off int64
}

// Write implements io.Writer.
func (c *Compare) Write(b []byte) (int, error) {
	if len(c.buf) < len(b) {
		c.buf = make([]byte, len(b))
	}
	n, err := io.ReadFull(c.R, c.buf[:len(b)])
	for i := range n {
		if b[i] != c.buf[i] {
			return 0, fmt.Errorf("%w at offset %d", ErrDiffer, c.off+int64(i))
		}
	}
	if err != nil {
		return 0, fmt.Errorf("%w at offset %d: it goes on (%v)", ErrDiffer, c.off+int64(n), err)
	}
	c.off += int64(n)
	return n, nil
}

// Close tells whether the other stream ends here too.
func (c *Compare) Close() error {
	var one [1]byte
	if n, err := c.R.Read(one[:]); n > 0 || err != io.EOF {
		return fmt.Errorf("%w: one ends at offset %d", ErrDiffer, c.off)
	}
	return nil
}
