package replay

import (
	"encoding/binary"
	"errors"
	"io"

	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/stream"
)

// A Visitor is told what a stream consists of, in its order. Functions that
// are nil are not called; an error ends the walk. Slices are valid during the
// call.
type Visitor struct {
	// Frame has every frame before the device tail.
	Frame func(stream.Frame) error
	// Record has every record of the RAM section, EOS included. The decoder
	// knows blocks and page size.
	Record func(*ramparse.Decoder, *ramparse.Record) error
	// Bytes has what is not taken apart: payloads of other sections and of
	// packaged commands, piece by piece.
	Bytes func([]byte) error
	// Opaque has the rest of the stream from the first thing in it that is
	// not understood, piece by piece; cause says what that was.
	Opaque func(b []byte, cause error) error
	// Tail has the device tail, QEMU_VM_EOF and all that follows it. footers
	// tells whether its sections have them.
	Tail func(b []byte, footers bool) error
}

// Walk takes a stream apart. It ends with nil only if the stream is whole as
// far as it is understood. pageSize is that of the guest in bytes, or 0 to find
// it out.
func Walk(r io.Reader, pageSize int, v Visitor) error {
	w := walker{cur: stream.NewCursor(r, 0), v: v, o: ramparse.Options{PageSize: pageSize}}
	w.rd = stream.NewReader(w.cur)
	err := w.frames()
	if errors.Is(err, stream.ErrUnknown) {
		return w.rest(err)
	}
	return err
}

type walker struct {
	cur *stream.Cursor
	rd  *stream.Reader
	dec *ramparse.Decoder
	o   ramparse.Options
	v   Visitor
}

func (w *walker) frames() error {
	for {
		f, err := w.rd.Next()
		if err != nil {
			return err
		}
		switch f.Kind {
		case stream.SectionFull:
			return w.tail(nil)
		case stream.EOF: // a machine without devices
			return w.tail(f.Raw)
		}
		if w.v.Frame != nil {
			if err := w.v.Frame(f); err != nil {
				return err
			}
		}
		switch f.Kind {
		case stream.Subsection:
			w.subsection(f.Subsection)
		case stream.CommandFrame:
			err = w.command(f.Command)
		case stream.SectionStart, stream.SectionPart, stream.SectionEnd:
			if f.Section.Name == ramparse.SectionName {
				err = w.records()
			} else {
				err = w.rd.CopyForeign(w.bytes)
			}
		}
		if err != nil {
			return err
		}
	}
}

func (w *walker) subsection(s stream.ConfigSubsection) {
	if s.Name == stream.SubsectionTargetPageBits && w.o.PageSize == 0 {
		w.o.PageSize = 1 << (s.TargetPageBits & 31)
	}
	for _, name := range s.Capabilities {
		w.o.IgnoreShared = w.o.IgnoreShared || name == "x-ignore-shared"
	}
}

func (w *walker) command(c stream.Command) error {
	switch {
	case c.Number == stream.CommandPackaged:
		return w.rd.CopyPackage(w.bytes)
	case c.Number == stream.CommandPostcopyAdvise && len(c.Payload) == 16 && w.o.PageSize == 0:
		// be64 page sizes of the blocks, be64 target page size.
		n := binary.BigEndian.Uint64(c.Payload[8:])
		if n >= ramparse.MinPageSize && n <= ramparse.MaxPageSize && n&(n-1) == 0 {
			w.o.PageSize = int(n)
		}
	}
	return nil
}

func (w *walker) records() error {
	if w.dec == nil {
		w.dec = ramparse.NewDecoder(w.o)
	}
	var rec ramparse.Record
	for {
		if err := w.dec.Next(w.cur, &rec); err != nil {
			return err
		}
		if w.v.Record != nil {
			if err := w.v.Record(w.dec, &rec); err != nil {
				return err
			}
		}
		if rec.Kind == ramparse.EOS {
			return nil
		}
	}
}

func (w *walker) bytes(b []byte) error {
	if w.v.Bytes == nil {
		return nil
	}
	return w.v.Bytes(b)
}

// tail collects the device tail, of which start has been consumed.
func (w *walker) tail(start []byte) error {
	ts := stream.NewTailScanner(w.rd.Footers())
	ts.Write(start)
	err := w.each(func(b []byte) error {
		_, err := ts.Write(b)
		return err
	})
	if err != nil {
		return err
	}
	// QEMU_VM_EOF straight after RAM is a whole stream of a machine without
	// devices.
	noDevices := len(start) == 1 && len(ts.Bytes()) == 1
	if !noDevices && ts.Complete() == stream.Incomplete {
		return stream.Wrap("device tail", w.cur.Offset(), io.ErrUnexpectedEOF)
	}
	if w.v.Tail == nil {
		return nil
	}
	return w.v.Tail(ts.Bytes(), w.rd.Footers())
}

// rest hands out what follows something that is not understood.
func (w *walker) rest(cause error) error {
	return w.each(func(b []byte) error {
		if w.v.Opaque == nil {
			return nil
		}
		return w.v.Opaque(b, cause)
	})
}

// each hands out the stream from here to its end.
func (w *walker) each(fn func([]byte) error) error {
	for {
		if _, err := w.cur.Peek(1); err == io.EOF {
			return nil
		} else if err != nil {
			return stream.Wrap("stream", w.cur.Offset(), err)
		}
		b, err := w.cur.Next(w.cur.Buffered())
		if err != nil {
			return err
		}
		if err := fn(b); err != nil {
			return err
		}
	}
}
