package stream

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
)

// Caps on what a stream may announce, each far above what QEMU sends, so that
// a hostile stream cannot make its reader allocate or wait without end.
const (
	maxMachineType  = 255
	maxCapabilities = 256
	maxSections     = 4096      // started at the same time
	maxPackage      = 256 << 20 // bytes
)

// The target page sizes there are, as powers of two: 1 KiB is the least that
// leaves room for the flags of RAM records.
const (
	minPageBits = 10
	maxPageBits = 16
)

// state is what the Reader expects next.
type state uint8

const (
	atHeader  state = iota
	atConfig        // configuration, or the first section if there is none
	atSubs          // subsections of the configuration, or the first section
	atFrame         // section or command
	atPayload       // the caller has to consume a section's payload, then a footer
	atPackage       // the caller has to consume a package
	atTail          // a FULL section
	atEOF
)

// A Reader takes a stream apart into frames. Between a START, PART or END
// frame and its footer the payload belongs to the caller, who consumes it from
// the same Cursor: the RAM section with package ramparse, others with
// CopyForeign. A SectionEarly frame has its payload in Raw.
type Reader struct {
	c        *Cursor
	state    state
	sections map[uint32]Section // by id
	current  Section            // whose payload or footer comes next
	pack     int64              // bytes of the package that comes next
	footers  footers
	setup    bool  // no PART, END or switchover yet: FULL sections may be early
	ahead    []int // lengths of the early sections that come next
}

// footers says whether the stream has section footers. The first section
// tells, and the rest has to do likewise.
type footers uint8

const (
	footersUnknown footers = iota
	footersAbsent
	footersPresent
)

// NewReader returns a Reader that takes its bytes from c.
func NewReader(c *Cursor) *Reader {
	return &Reader{c: c, sections: make(map[uint32]Section), setup: true}
}

// Cursor returns the cursor the reader works on.
func (r *Reader) Cursor() *Cursor { return r.c }

// Footers reports whether the stream has section footers: false until the
// first one has been read, and for machine types before 2.4.
func (r *Reader) Footers() bool { return r.footers == footersPresent }

// Next returns the next frame. After an EOF frame it returns io.EOF and
// consumes nothing more. A SectionFull frame consumes nothing: the device tail
// begins at the cursor, Next has looked at its type byte only and returns the
// same frame again if called again.
//
// On an error nothing of the failing element has been consumed. ErrUnknown
// then allows the rest to be kept verbatim; an input that ends, at a frame
// boundary too, gives ErrTruncated.
func (r *Reader) Next() (Frame, error) {
	switch r.state {
	case atHeader:
		return r.header()
	case atPackage:
		return Frame{}, errors.New("stream: package not consumed before the next frame")
	case atTail:
		return Frame{Kind: SectionFull, Offset: r.c.Offset()}, nil
	case atEOF:
		return Frame{}, io.EOF
	}
	b, err := r.peek("frame", 1)
	if err != nil {
		return Frame{}, err
	}
	typ := b[0]
	if r.state == atPayload {
		if typ == typeFooter {
			return r.footer()
		}
		if r.footers == footersPresent {
			return Frame{}, r.damaged("footer", "type byte %#02x where the footer of section %d should be", typ, r.current.ID)
		}
		r.footers = footersAbsent
		r.state = atFrame
	}
	switch typ {
	case typeStart:
		return r.start()
	case typePart:
		return r.continued(SectionPart)
	case typeEnd:
		return r.continued(SectionEnd)
	case typeFull:
		if len(r.ahead) == 0 {
			r.ahead = r.early()
		}
		if len(r.ahead) > 0 {
			return r.full()
		}
		r.state = atTail
		return Frame{Kind: SectionFull, Offset: r.c.Offset()}, nil
	case typeCommand:
		return r.command()
	case typeEOF:
		f := Frame{Kind: EOF, Offset: r.c.Offset()}
		f.Raw, _ = r.c.Next(1)
		r.state = atEOF
		return f, nil
	case typeConfiguration:
		if r.state == atConfig {
			return r.configuration()
		}
	case typeSubsection:
		if r.state == atSubs {
			return r.subsection()
		}
	case typeDescription, typeFooter:
	default:
		return Frame{}, Unknown("frame", r.c.Offset(), "section type %#02x", typ)
	}
	return Frame{}, r.damaged("frame", "section type %#02x out of place", typ)
}

func (r *Reader) peek(op string, n int) ([]byte, error) {
	b, err := r.c.Peek(n)
	if err != nil {
		return b, Wrap(op, r.c.Offset(), err)
	}
	return b, nil
}

// take consumes n peeked bytes as the Raw of a frame.
func (r *Reader) take(f *Frame, n int, next state) Frame {
	f.Offset = r.c.Offset()
	f.Raw, _ = r.c.Next(n)
	r.state = next
	return *f
}

func (r *Reader) damaged(op, format string, args ...any) error {
	return Damaged(op, r.c.Offset(), format, args...)
}

func (r *Reader) header() (Frame, error) {
	want := AppendHeader(nil)
	b, err := r.peek("header", len(want))
	if !bytes.HasPrefix(want, b) {
		return Frame{}, &Error{Op: "header", Offset: r.c.Offset(), Err: ErrNotStream}
	}
	if err != nil {
		return Frame{}, err
	}
	return r.take(&Frame{Kind: Header}, len(want), atConfig), nil
}

func (r *Reader) configuration() (Frame, error) {
	b, err := r.peek("configuration", 5)
	if err != nil {
		return Frame{}, err
	}
	n := binary.BigEndian.Uint32(b[1:])
	if n > maxMachineType {
		return Frame{}, r.damaged("configuration", "machine type of %d bytes", n)
	}
	if b, err = r.peek("configuration", 5+int(n)); err != nil {
		return Frame{}, err
	}
	return r.take(&Frame{Kind: Configuration, MachineType: string(b[5:])}, len(b), atSubs), nil
}

func (r *Reader) subsection() (Frame, error) {
	const op = "configuration subsection"
	b, err := r.peek(op, 2)
	if err != nil {
		return Frame{}, err
	}
	head := 2 + int(b[1]) + 4
	if b, err = r.peek(op, head); err != nil {
		return Frame{}, err
	}
	s := ConfigSubsection{Name: string(b[2 : head-4]), Version: binary.BigEndian.Uint32(b[head-4:])}
	// Its body has no length, so only a known one of a known version can be
	// delimited.
	if s.Version != 1 {
		return Frame{}, Unknown(op, r.c.Offset(), "%q version %d", s.Name, s.Version)
	}
	n := head
	switch s.Name {
	case SubsectionTargetPageBits:
		n += 4
		if b, err = r.peek(op, n); err != nil {
			return Frame{}, err
		}
		s.TargetPageBits = binary.BigEndian.Uint32(b[head:])
		if s.TargetPageBits < minPageBits || s.TargetPageBits > maxPageBits {
			return Frame{}, Unknown(op, r.c.Offset(), "target pages of 2^%d bytes", s.TargetPageBits)
		}
	case SubsectionUUID:
		n += len(s.UUID)
		if b, err = r.peek(op, n); err != nil {
			return Frame{}, err
		}
		copy(s.UUID[:], b[head:])
	case SubsectionCapabilities:
		n += 4
		if b, err = r.peek(op, n); err != nil {
			return Frame{}, err
		}
		count := binary.BigEndian.Uint32(b[head:])
		if count > maxCapabilities {
			return Frame{}, r.damaged(op, "%d capabilities", count)
		}
		for range count {
			if b, err = r.peek(op, n+1); err != nil {
				return Frame{}, err
			}
			k := int(b[n])
			if b, err = r.peek(op, n+1+k); err != nil {
				return Frame{}, err
			}
			s.Capabilities = append(s.Capabilities, string(b[n+1:n+1+k]))
			n += 1 + k
		}
	default:
		return Frame{}, Unknown(op, r.c.Offset(), "%q", s.Name)
	}
	return r.take(&Frame{Kind: Subsection, Subsection: s}, n, atSubs), nil
}

func (r *Reader) start() (Frame, error) {
	b, err := r.peek("section start", 6)
	if err != nil {
		return Frame{}, err
	}
	n := 6 + int(b[5])
	if b, err = r.peek("section start", n+8); err != nil {
		return Frame{}, err
	}
	s := Section{
		ID:       binary.BigEndian.Uint32(b[1:]),
		Name:     string(b[6:n]),
		Instance: binary.BigEndian.Uint32(b[n:]),
		Version:  binary.BigEndian.Uint32(b[n+4:]),
	}
	if old, ok := r.sections[s.ID]; ok {
		return Frame{}, r.damaged("section start", "section %d is %q and again %q", s.ID, old.Name, s.Name)
	}
	if len(r.sections) == maxSections {
		return Frame{}, r.damaged("section start", "more than %d sections", maxSections)
	}
	r.sections[s.ID] = s
	r.current = s
	return r.take(&Frame{Kind: SectionStart, Section: s}, n+8, atPayload), nil
}

// full returns the early section at the cursor.
func (r *Reader) full() (Frame, error) {
	n := r.ahead[0]
	b, err := r.peek("early section", n)
	if err != nil {
		return Frame{}, err
	}
	r.ahead = r.ahead[1:]
	r.current, _, _ = parseFull(b, 0)
	return r.take(&Frame{Kind: SectionEarly, Section: r.current}, n, atPayload), nil
}

func (r *Reader) continued(kind Kind) (Frame, error) {
	r.setup = false
	b, err := r.peek(kind.String(), 5)
	if err != nil {
		return Frame{}, err
	}
	id := binary.BigEndian.Uint32(b[1:])
	s, ok := r.sections[id]
	if !ok {
		return Frame{}, r.damaged(kind.String(), "section %d was not started", id)
	}
	r.current = s
	return r.take(&Frame{Kind: kind, Section: s}, 5, atPayload), nil
}

func (r *Reader) footer() (Frame, error) {
	b, err := r.peek("footer", 5)
	if err != nil {
		return Frame{}, err
	}
	if r.footers == footersAbsent {
		return Frame{}, r.damaged("footer", "footer in a stream without footers")
	}
	if id := binary.BigEndian.Uint32(b[1:]); id != r.current.ID {
		return Frame{}, r.damaged("footer", "footer of section %d ends section %d", id, r.current.ID)
	}
	r.footers = footersPresent
	return r.take(&Frame{Kind: Footer, Section: r.current}, 5, atFrame), nil
}

// commandLengths are the lengths of the commands' payloads, -1 for any
// (mig_cmd_args, migration/savevm.c).
var commandLengths = [...]int{
	CommandOpenReturnPath:  0,
	CommandPing:            4,
	CommandPostcopyAdvise:  -1,
	CommandPostcopyListen:  0,
	CommandPostcopyRun:     0,
	CommandPostcopyDiscard: -1,
	CommandPackaged:        4,
	CommandEnableColo:      0,
	CommandPostcopyResume:  0,
	CommandRecvBitmap:      -1,
	CommandSwitchoverStart: 0,
}

func (r *Reader) command() (Frame, error) {
	b, err := r.peek("command", 5)
	if err != nil {
		return Frame{}, err
	}
	number := binary.BigEndian.Uint16(b[1:])
	n := int(binary.BigEndian.Uint16(b[3:]))
	if number == 0 || int(number) >= len(commandLengths) {
		return Frame{}, Unknown("command", r.c.Offset(), "command %d", number)
	}
	if want := commandLengths[number]; want >= 0 && n != want {
		return Frame{}, r.damaged("command", "command %d with %d bytes", number, n)
	}
	if b, err = r.peek("command", 5+n); err != nil {
		return Frame{}, err
	}
	if number == CommandPostcopyListen || number == CommandSwitchoverStart {
		r.setup = false
	}
	f := Frame{Kind: CommandFrame, Command: Command{Number: number, Payload: b[5:]}}
	next := atFrame
	if number == CommandPackaged {
		r.pack = int64(binary.BigEndian.Uint32(b[5:]))
		if r.pack > maxPackage {
			return Frame{}, r.damaged("command", "package of %d bytes", r.pack)
		}
		next = atPackage
	}
	return r.take(&f, 5+n, next), nil
}

// CopyPackage consumes the bytes that follow a PACKAGED command frame and
// hands them to sink, in pieces valid during the call. An error of sink is
// returned as it is.
func (r *Reader) CopyPackage(sink func([]byte) error) error {
	if r.state != atPackage {
		return errors.New("stream: CopyPackage without a PACKAGED command")
	}
	start := r.c.Offset()
	err := r.c.Copy(r.pack, sink)
	r.pack -= r.c.Offset() - start
	if err != nil {
		if err == io.ErrUnexpectedEOF {
			err = Wrap("package", r.c.Offset(), err)
		}
		return err
	}
	r.state = atFrame
	return nil
}
