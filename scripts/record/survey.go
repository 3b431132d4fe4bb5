package main

import (
	"errors"
	"io"

	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/stream"
)

// survey is what a stream turns out to have. Offsets are those of the stream.
type survey struct {
	machine     string // machine type, empty without a configuration section
	footers     bool
	subsections []string
	commands    []uint16
	blocks      []string       // RAM blocks in order
	gpas        bool           // their guest-physical addresses are there
	kinds       map[string]int // RAM records by QEMU's name of the flag
	sent        map[string]int // pages by block, each time they came
	again       int            // page records for a page that was sent before
	stepsBack   int            // page records below the one before them
	passes      int
	foreign     map[string]int // sections of others between RAM's START and the tail
	early       []string       // device sections before RAM's pages; with "behind" if RAM has begun
	ramEnd      bool
	unknown     error // why the stream is not understood from RAM on
	tail        stream.Tail
	tailLen     int

	somePage int64 // a record of a page's content, well inside the stream
	footerAt int64 // the footer of the section before the last of RAM
	tailAt   int64
	eofAt    int64
}

// surveyStream reads a stream up to its last byte and not beyond, so that it can
// serve a QEMU that waits to be told that its stream has arrived.
func surveyStream(r io.Reader) (*survey, error) {
	s := &survey{kinds: make(map[string]int), sent: make(map[string]int), foreign: make(map[string]int)}
	c := stream.NewCursor(r, 0)
	frames := stream.NewReader(c)
	options := ramparse.Options{}
	var pages *pages
	var d *ramparse.Decoder
	for {
		f, err := frames.Next()
		if err != nil {
			return s, err
		}
		switch f.Kind {
		case stream.Configuration:
			s.machine = f.MachineType
		case stream.Subsection:
			s.subsections = append(s.subsections, f.Subsection.Name)
			for _, name := range f.Subsection.Capabilities {
				options.IgnoreShared = options.IgnoreShared || name == "x-ignore-shared"
				options.Mapped = options.Mapped || name == "mapped-ram"
			}
			if bits := f.Subsection.TargetPageBits; bits != 0 {
				options.PageSize = 1 << bits
			}
		case stream.CommandFrame:
			s.commands = append(s.commands, f.Command.Number)
		case stream.Footer:
			if f.Section.Name == ramparse.SectionName {
				s.footerAt = f.Offset
			}
		case stream.SectionEarly:
			name := f.Section.Name
			if d != nil {
				name = "behind " + name
			}
			s.early = append(s.early, name)
		case stream.SectionFull:
			s.tailAt = f.Offset
			s.footers = frames.Footers()
			return s, s.readTail(c)
		case stream.SectionStart, stream.SectionPart, stream.SectionEnd:
			if f.Section.Name != ramparse.SectionName {
				s.foreign[f.Section.Name]++
				if err := frames.CopyForeign(func([]byte) error { return nil }); err != nil {
					return s, err
				}
				continue
			}
			s.ramEnd = f.Kind == stream.SectionEnd
			if d == nil {
				d = ramparse.NewDecoder(options)
			}
			pages, err = s.readRAM(c, d, pages)
			if errors.Is(err, stream.ErrUnknown) {
				s.unknown = err
				return s, nil
			}
			if err != nil {
				return s, err
			}
		}
	}
}

// pages remembers which pages have come.
type pages struct {
	seen    map[[2]uint64]bool
	last    [2]uint64
	counter *ramparse.PassCounter
}

func (s *survey) readRAM(c *stream.Cursor, d *ramparse.Decoder, p *pages) (*pages, error) {
	var rec ramparse.Record
	for {
		if err := d.Next(c, &rec); err != nil {
			return p, err
		}
		s.kinds[rec.Kind.String()]++
		switch rec.Kind {
		case ramparse.EOS:
			return p, nil
		case ramparse.MemSize:
			for _, b := range d.Setup().Blocks {
				s.blocks = append(s.blocks, b.Name)
				s.gpas = s.gpas || b.GPA != nil
			}
		case ramparse.Zero, ramparse.Page, ramparse.XBZRLE, ramparse.Compressed:
			if p == nil {
				p = &pages{seen: make(map[[2]uint64]bool)}
			}
			// The page size is known with the first address that is not 0.
			if p.counter == nil && d.PageSize() != 0 {
				p.counter = ramparse.NewPassCounter(d.Setup(), d.PageSize())
			}
			at := [2]uint64{uint64(rec.Block), rec.Addr}
			s.sent[d.Setup().Blocks[rec.Block].Name]++
			if p.seen[at] {
				s.again++
			}
			p.seen[at] = true
			if at[0] < p.last[0] || at[0] == p.last[0] && at[1] < p.last[1] {
				s.stepsBack++
			}
			p.last = at
			if p.counter != nil {
				p.counter.Add(rec.Block, rec.Page)
				s.passes = p.counter.Passes()
			}
			// Neither first nor last, and one that follows another.
			if rec.Kind == ramparse.Page && !rec.Named && s.kinds["PAGE"] == 100 {
				s.somePage = rec.Offset
			}
		}
	}
}

func (s *survey) readTail(c *stream.Cursor) error {
	scanner := stream.NewTailScanner(s.footers)
	for scanner.Complete() != stream.WithDescription {
		if _, err := c.Peek(1); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return err
		}
		b, err := c.Next(c.Buffered())
		if err != nil {
			return err
		}
		if _, err := scanner.Write(b); err != nil {
			return err
		}
	}
	s.tailLen = len(scanner.Bytes())
	if scanner.Complete() == stream.Incomplete {
		return stream.Wrap("device tail", c.Offset(), io.ErrUnexpectedEOF)
	}
	var err error
	if s.tail, err = stream.ParseTail(scanner.Bytes()); err != nil {
		return err
	}
	end := s.tailLen
	if n := len(s.tail.Description); n > 0 {
		end -= n + 5 // 06, be32 length
	}
	s.eofAt = s.tailAt + int64(end) - 1
	return nil
}
