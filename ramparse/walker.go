package ramparse

import (
	"encoding/binary"
	"errors"
	"io"
	"slices"

	"github.com/flic-migrate/flic-migrate/stream"
)

// A Visitor is told what a stream consists of, in the stream's order. Functions
// that are nil are not called; an error ends the walk and is returned as it is.
// Slices are valid during the call.
type Visitor struct {
	// Frame has every frame before the device tail, without the payload that
	// follows it.
	Frame func(*stream.Frame) error
	// Record has every record of the RAM section, EOS included. The decoder knows
	// blocks and page size.
	Record func(*Decoder, *Record) error
	// Bytes has what is not taken apart, piece by piece: payloads of other
	// sections and of packaged commands.
	Bytes func([]byte) error
	// Opaque has the rest of the stream from the first thing in it that is not
	// understood, piece by piece; cause says what that was. Only All calls it.
	Opaque func(b []byte, cause error) error
	// Tail has the device tail, QEMU_VM_EOF and all that follows it. Only All
	// calls it.
	Tail func([]byte) error
}

// A Walker goes through a stream frame by frame and record by record. It knows
// what earlier parts of the stream say about later ones.
type Walker struct {
	cur *stream.Cursor
	rd  *stream.Reader
	dec *Decoder
	v   Visitor

	// PageSize is what the configuration or POSTCOPY_ADVISE said, in bytes, or
	// what NewWalker was given; 0: neither. See Decoder.PageSize for what the
	// records said.
	PageSize int
	// IgnoreShared: x-ignore-shared is among the capabilities.
	IgnoreShared bool
	// Mapped: mapped-ram is. Of such a stream RAM is not understood.
	Mapped bool
	// Early is the number of device sections so far that stand before RAM's pages.
	Early int
	// Absent is how many bytes of RAM are listed and will not come: memory of
	// virtio-mem that is not plugged. Uncertain is set if there may be more.
	Absent    uint64
	Uncertain bool
	// NoDevices is set when QEMU_VM_EOF came, consumed, in place of a device
	// section.
	NoDevices bool
	// RAMSection is the id of RAM's section.
	RAMSection uint32
	// InRAM is set inside the payload of a RAM section.
	InRAM bool
	// InForeign is set inside that of another section, of which a part was
	// understood and handed out.
	InForeign bool

	header []byte // of a section of which nothing has been handed out yet
}

// The capabilities that change the format of RAM's section.
const (
	ignoreShared = "x-ignore-shared"
	mappedRAM    = "mapped-ram"
)

// NewWalker returns a walker that tells v what comes from c. pageSize is the
// guest's in bytes if it is known from elsewhere, or 0.
func NewWalker(c *stream.Cursor, pageSize int, v Visitor) *Walker {
	return &Walker{cur: c, rd: stream.NewReader(c), v: v, PageSize: pageSize}
}

// Decoder returns the decoder of RAM's records; nil before RAM's first section.
func (w *Walker) Decoder() *Decoder { return w.dec }

// Footers reports whether the stream has section footers, as far as is known.
func (w *Walker) Footers() bool { return w.rd.Footers() }

// Header returns the header of a section of whose payload nothing is understood:
// after such an ErrUnknown it is consumed, and no Visitor has seen it. It is empty
// otherwise.
func (w *Walker) Header() []byte { return w.header }

// RAM walks up to the device tail, of which it consumes nothing, or to QEMU_VM_EOF
// in its place. An input that ends before that gives ErrTruncated. ErrUnknown
// leaves what is unknown, and all that follows, at the cursor.
func (w *Walker) RAM() error {
	for {
		f, err := w.rd.Next()
		if err != nil {
			return err
		}
		switch f.Kind {
		case stream.SectionFull:
			return nil
		case stream.EOF:
			w.NoDevices = true
			return nil
		case stream.SectionStart, stream.SectionPart, stream.SectionEnd:
			if f.Section.Name != SectionName {
				err = w.foreign(&f)
				break
			}
			w.RAMSection = f.Section.ID
			if err = w.frame(&f); err == nil {
				err = w.records()
			}
		default:
			w.note(&f)
			err = w.frame(&f)
			if err == nil && f.Kind == stream.CommandFrame && f.Command.Number == stream.CommandPackaged {
				err = w.rd.CopyPackage(w.bytes)
			}
		}
		if err != nil {
			return err
		}
	}
}

func (w *Walker) frame(f *stream.Frame) error {
	if w.v.Frame == nil {
		return nil
	}
	return w.v.Frame(f)
}

// note keeps what a frame says about the frames to come.
func (w *Walker) note(f *stream.Frame) {
	switch f.Kind {
	case stream.SectionEarly:
		w.Early++
		v, ok := ParseVirtioMem(f)
		w.Absent += v.Absent()
		w.Uncertain = w.Uncertain || !ok
	case stream.CommandFrame:
		// be64 page sizes of the blocks, be64 target page size; or nothing.
		if p := f.Command.Payload; f.Command.Number == stream.CommandPostcopyAdvise && len(p) == 16 && w.PageSize == 0 {
			if n := binary.BigEndian.Uint64(p[8:]); n <= MaxPageSize && validPageSize(int(n)) {
				w.PageSize = int(n)
			}
		}
	case stream.Subsection:
		switch s := &f.Subsection; s.Name {
		case stream.SubsectionTargetPageBits:
			if w.PageSize == 0 {
				w.PageSize = 1 << (s.TargetPageBits & 31)
			}
		case stream.SubsectionCapabilities:
			w.IgnoreShared = slices.Contains(s.Capabilities, ignoreShared)
			w.Mapped = slices.Contains(s.Capabilities, mappedRAM)
			w.Uncertain = w.Uncertain || w.IgnoreShared // shared blocks are listed too
		}
	}
}

// foreign takes a section that is not RAM's. Its frame is handed out when
// something of its payload is understood.
func (w *Walker) foreign(f *stream.Frame) error {
	w.header = append(w.header[:0], f.Raw...)
	f.Raw = w.header
	err := w.rd.CopyForeign(func(b []byte) error {
		if !w.InForeign {
			w.InForeign, w.header = true, nil
			if err := w.frame(f); err != nil {
				return err
			}
		}
		return w.bytes(b)
	})
	if err == nil {
		w.InForeign = false
		w.header = f.Raw[:0]
	}
	return err
}

func (w *Walker) records() error {
	if w.dec == nil {
		w.dec = NewDecoder(Options{PageSize: w.PageSize, IgnoreShared: w.IgnoreShared, Mapped: w.Mapped})
	}
	w.InRAM = true
	var rec Record
	for {
		if err := w.dec.Next(w.cur, &rec); err != nil {
			return err
		}
		w.InRAM = rec.Kind != EOS
		if w.v.Record != nil {
			if err := w.v.Record(w.dec, &rec); err != nil {
				return err
			}
		}
		if !w.InRAM {
			return nil
		}
	}
}

func (w *Walker) bytes(b []byte) error {
	if w.v.Bytes == nil {
		return nil
	}
	return w.v.Bytes(b)
}

// Rest hands out all that is left of the stream, to the end of the input.
func (w *Walker) Rest(fn func([]byte) error) error {
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

// Walk walks the whole of a recorded stream. See Walker.All and NewWalker.
func Walk(r io.Reader, pageSize int, v Visitor) error {
	return NewWalker(stream.NewCursor(r, 0), pageSize, v).All()
}

// All walks a whole stream whose input ends with it: RAM, and then the device tail,
// or what is not understood. It ends with nil only if the stream is whole as far as
// it is understood.
func (w *Walker) All() error {
	err := w.RAM()
	if errors.Is(err, stream.ErrUnknown) {
		return w.opaque(err)
	}
	if err != nil {
		return err
	}
	ts := stream.NewTailScanner(w.rd.Footers())
	if w.NoDevices {
		ts.Write(stream.AppendEOF(nil))
	}
	err = w.Rest(func(b []byte) error {
		_, err := ts.Write(b)
		return err
	})
	if err != nil {
		return err
	}
	// QEMU_VM_EOF straight after RAM is a whole stream of a machine without
	// devices.
	if ts.Complete() == stream.Incomplete && !(w.NoDevices && len(ts.Bytes()) == 1) {
		return stream.Wrap("device tail", w.cur.Offset(), io.ErrUnexpectedEOF)
	}
	if w.v.Tail == nil {
		return nil
	}
	return w.v.Tail(ts.Bytes())
}

// opaque hands out what follows something that is not understood.
func (w *Walker) opaque(cause error) error {
	give := func(b []byte) error {
		if w.v.Opaque == nil || len(b) == 0 {
			return nil
		}
		return w.v.Opaque(b, cause)
	}
	if err := give(w.header); err != nil {
		return err
	}
	return w.Rest(give)
}
