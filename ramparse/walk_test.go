package ramparse

import (
	"bytes"
	"errors"
	"fmt"
	"io"

	"github.com/flic-migrate/flic-migrate/stream"
)

// walked is what walk has seen of a stream.
type walked struct {
	kinds    [EOS + 1]int // records by kind
	commands []uint16
	foreign  int64 // bytes of payloads other than RAM's
	setup    *Setup
	pageSize int
	passes   int
	tail     stream.Tail
	complete stream.Completion
	footers  bool
}

// walk takes the stream from r apart, makes each element anew with the Append
// functions and compares it with the bytes it came from. Whatever it has no
// encoder for is compared verbatim, so a nil error means that every byte of
// the stream was accounted for.
func walk(r io.Reader, readAhead int) (w walked, err error) {
	// All of the input passes through seen, in order.
	var pending bytes.Buffer
	c := stream.NewCursor(io.TeeReader(r, &pending), 0)
	c.SetReadAhead(readAhead)
	sr := stream.NewReader(c)
	d := NewDecoder(Options{})
	o := Options{}
	var passes *PassCounter
	ram := make(map[[2]uint64][]byte) // last content by block and page
	var out []byte
	check := func(what string) error {
		if got := pending.Next(len(out)); !bytes.Equal(got, out) {
			return fmt.Errorf("%s before offset %d: %x was encoded as %x", what, c.Offset(), got, out)
		}
		out = out[:0]
		return nil
	}
	// There is no encoder for these.
	verbatim := func(b []byte) error { w.foreign += int64(len(b)); pending.Next(len(b)); return nil }
	for {
		f, err := sr.Next()
		if err == io.EOF {
			return w, errors.New("EOF without a device tail")
		} else if err != nil {
			return w, err
		}
		switch f.Kind {
		case stream.Header:
			out = stream.AppendHeader(out)
		case stream.Configuration:
			out = stream.AppendConfiguration(out, f.MachineType)
		case stream.Subsection:
			out = stream.AppendConfigSubsection(out, f.Subsection)
			for _, name := range f.Subsection.Capabilities {
				o.IgnoreShared = o.IgnoreShared || name == "x-ignore-shared"
				o.Mapped = o.Mapped || name == "mapped-ram"
			}
			if b := f.Subsection.TargetPageBits; b != 0 {
				o.PageSize = 1 << (b & 31)
			}
			d = NewDecoder(o)
		case stream.SectionStart:
			out = stream.AppendStart(out, f.Section)
		case stream.SectionPart:
			out = stream.AppendPart(out, f.Section.ID)
		case stream.SectionEnd:
			out = stream.AppendEnd(out, f.Section.ID)
		case stream.Footer:
			out = stream.AppendFooter(out, f.Section.ID)
		case stream.CommandFrame:
			out = stream.AppendCommand(out, f.Command.Number, f.Command.Payload)
			w.commands = append(w.commands, f.Command.Number)
		case stream.SectionEarly:
			body, _ := f.Body()
			out = append(stream.AppendFull(out, f.Section), body...)
		case stream.EOF:
			out = stream.AppendEOF(out)
		}
		if f.Kind != stream.SectionFull && !bytes.Equal(out, f.Raw) {
			return w, fmt.Errorf("raw %v at offset %d is %x, encoded as %x", f.Kind, f.Offset, f.Raw, out)
		}
		if err := check(f.Kind.String()); err != nil {
			return w, err
		}
		switch f.Kind {
		case stream.CommandFrame:
			if f.Command.Number == stream.CommandPackaged {
				if err := sr.CopyPackage(verbatim); err != nil {
					return w, err
				}
			}
			continue
		case stream.SectionFull:
			w.footers = sr.Footers()
			return w, walkTail(&w, c)
		case stream.SectionStart, stream.SectionPart, stream.SectionEnd:
		default:
			continue
		}
		if f.Section.Name != SectionName {
			if err := sr.CopyForeign(verbatim); err != nil {
				return w, err
			}
			continue
		}
		for {
			var rec Record
			if err := d.Next(c, &rec); err != nil {
				return w, err
			}
			w.kinds[rec.Kind]++
			w.setup, w.pageSize = d.Setup(), d.PageSize()
			out = appendRecord(out, d.Setup(), &rec)
			if !bytes.Equal(out, rec.Raw) {
				return w, fmt.Errorf("raw %v at offset %d is %x, encoded as %x", rec.Kind, rec.Offset, rec.Raw, out)
			}
			if err := check(rec.Kind.String()); err != nil {
				return w, err
			}
			if rec.Kind == EOS {
				break
			}
			if rec.Kind >= Zero && rec.Kind <= Compressed && d.PageSize() != 0 {
				if passes == nil {
					passes = NewPassCounter(d.Setup(), d.PageSize())
				}
				passes.Add(rec.Block, rec.Page)
				w.passes = passes.Passes()
			}
			at := [2]uint64{uint64(rec.Block), rec.Page}
			switch rec.Kind {
			case Zero:
				ram[at] = bytes.Repeat([]byte{rec.Fill}, d.PageSize())
			case Page:
				ram[at] = bytes.Clone(rec.Data)
			case Compressed:
				ram[at] = make([]byte, d.PageSize())
				err = Inflate(ram[at], rec.Data)
			case XBZRLE:
				err = ApplyXBZRLE(ram[at], rec.Data)
			}
			if err != nil {
				return w, fmt.Errorf("%v at offset %d: %w", rec.Kind, rec.Offset, err)
			}
		}
	}
}

func walkTail(w *walked, c *stream.Cursor) error {
	s := stream.NewTailScanner(w.footers)
	for {
		if _, err := c.Peek(1); err == io.EOF {
			break
		} else if err != nil {
			return err
		}
		b, _ := c.Next(c.Buffered())
		if _, err := s.Write(b); err != nil {
			return err
		}
	}
	w.complete = s.Complete()
	var err error
	w.tail, err = stream.ParseTail(s.Bytes())
	return err
}

// appendRecord encodes a record.
func appendRecord(dst []byte, s *Setup, r *Record) []byte {
	name := ""
	if r.Named {
		name = s.Blocks[r.Block].Name
	}
	switch r.Kind {
	case MemSize:
		return AppendSetup(dst, s)
	case Zero:
		return AppendZero(dst, name, r.Addr, r.Fill)
	case Page:
		return AppendPage(dst, name, r.Addr, r.Data)
	case XBZRLE:
		return AppendXBZRLE(dst, name, r.Addr, r.Data)
	case Compressed:
		return AppendCompressed(dst, name, r.Addr, r.Data)
	case Flush:
		return AppendFlush(dst)
	case Hook:
		return AppendHook(dst)
	}
	return AppendEOS(dst)
}
