package stream

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strings"
	"testing"
)

// unhex decodes hex digits; spaces and line breaks are for the eye, and 'text'
// stands for its bytes.
func unhex(t testing.TB, s string) []byte {
	t.Helper()
	var out []byte
	for i, part := range strings.Split(s, "'") {
		if i%2 == 1 {
			out = append(out, part...)
			continue
		}
		b, err := hex.DecodeString(strings.Join(strings.Fields(part), ""))
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, b...)
	}
	return out
}

const (
	goldenHeader = `51 45 56 4d 00000003`
	goldenConfig = `07 0000000a 'pc-q35-7.2'`
	// Section 2 is called test and has the payload 'p', then more of it.
	goldenStart = `01 00000002 04 'test' 00000000 00000004 'p' 7e 00000002`
	goldenPart  = `02 00000002 'p' 7e 00000002`
	goldenEnd   = `03 00000002 'p' 7e 00000002`
	goldenFull  = `04 00000000 05 'timer' 00000000 00000002 'body' 7e 00000000 00`
)

var section2 = Section{ID: 2, Name: "test", Version: 4}

// frames reads all frames of a stream whose payloads are one byte long, up to
// the device tail, QEMU_VM_EOF or an error. Raw must be what the frame's bytes
// are, and is dropped then, as are the payloads of commands.
func frames(t testing.TB, in []byte) ([]Frame, *Reader, error) {
	t.Helper()
	c := NewCursor(bytes.NewReader(in), 0)
	c.SetReadAhead(0)
	r := NewReader(c)
	var all []Frame
	for {
		f, err := r.Next()
		if err == io.EOF {
			return all, r, nil
		} else if err != nil {
			return all, r, err
		}
		raw, _ := bytes.CutPrefix(in, in[:f.Offset])
		if !bytes.HasPrefix(raw, f.Raw) || c.Offset() != f.Offset+int64(len(f.Raw)) {
			t.Errorf("%v at %d: Raw %x does not stand there", f.Kind, f.Offset, f.Raw)
		}
		f.Raw = nil
		f.Command.Payload = bytes.Clone(f.Command.Payload)
		all = append(all, f)
		switch f.Kind {
		case SectionFull:
			return all, r, nil
		case SectionStart, SectionPart, SectionEnd:
			if err := c.Discard(1); err != nil {
				return all, r, Wrap("payload", c.Offset(), err)
			}
		case CommandFrame:
			if f.Command.Number == CommandPackaged {
				if err := r.CopyPackage(func([]byte) error { return nil }); err != nil {
					return all, r, err
				}
			}
		}
	}
}

func TestReader(t *testing.T) {
	tests := []struct {
		name string
		in   string
		want []Frame
	}{
		{"shortest", goldenHeader + goldenFull, []Frame{
			{Kind: Header},
			{Kind: SectionFull, Offset: 8},
		}},
		{"precopy", goldenHeader + goldenConfig + goldenStart + goldenPart + goldenEnd + goldenFull, []Frame{
			{Kind: Header},
			{Kind: Configuration, Offset: 8, MachineType: "pc-q35-7.2"},
			{Kind: SectionStart, Offset: 23, Section: section2},
			{Kind: Footer, Offset: 42, Section: section2},
			{Kind: SectionPart, Offset: 47, Section: section2},
			{Kind: Footer, Offset: 53, Section: section2},
			{Kind: SectionEnd, Offset: 58, Section: section2},
			{Kind: Footer, Offset: 64, Section: section2},
			{Kind: SectionFull, Offset: 69},
		}},
		{"machine type before 2.4", goldenHeader + `01 00000002 04 'test' 00000000 00000004 'p' 02 00000002 'p' 03 00000002 'p'` + goldenFull, []Frame{
			{Kind: Header},
			{Kind: SectionStart, Offset: 8, Section: section2},
			{Kind: SectionPart, Offset: 27, Section: section2},
			{Kind: SectionEnd, Offset: 33, Section: section2},
			{Kind: SectionFull, Offset: 39},
		}},
		{"no device state", goldenHeader + `00 'anything'`, []Frame{
			{Kind: Header},
			{Kind: EOF, Offset: 8},
		}},
		{"target page bits", goldenHeader + goldenConfig + `05 1e 'configuration/target-page-bits' 00000001 0000000c` + goldenFull, []Frame{
			{Kind: Header},
			{Kind: Configuration, Offset: 8, MachineType: "pc-q35-7.2"},
			{Kind: Subsection, Offset: 23, Subsection: ConfigSubsection{Name: SubsectionTargetPageBits, Version: 1, TargetPageBits: 12}},
			{Kind: SectionFull, Offset: 63},
		}},
		{"capabilities and uuid", goldenHeader + goldenConfig + `
			05 1a 'configuration/capabilities' 00000001 00000002 0f 'x-ignore-shared' 01 'y'
			05 12 'configuration/uuid' 00000001 '0123456789abcdef'` + goldenFull, []Frame{
			{Kind: Header},
			{Kind: Configuration, Offset: 8, MachineType: "pc-q35-7.2"},
			{Kind: Subsection, Offset: 23, Subsection: ConfigSubsection{Name: SubsectionCapabilities, Version: 1, Capabilities: []string{"x-ignore-shared", "y"}}},
			{Kind: Subsection, Offset: 77, Subsection: ConfigSubsection{Name: SubsectionUUID, Version: 1, UUID: [16]byte([]byte("0123456789abcdef"))}},
			{Kind: SectionFull, Offset: 117},
		}},
		{"commands", goldenHeader + goldenConfig + `
			08 0001 0000
			08 0002 0004 00000001
			08 0003 0010 0000000000001000 0000000000001000
			08 0003 0000` + goldenStart + `08 0004 0000 08 000b 0000` + goldenFull, []Frame{
			{Kind: Header},
			{Kind: Configuration, Offset: 8, MachineType: "pc-q35-7.2"},
			{Kind: CommandFrame, Offset: 23, Command: Command{Number: CommandOpenReturnPath, Payload: []byte{}}},
			{Kind: CommandFrame, Offset: 28, Command: Command{Number: CommandPing, Payload: []byte{0, 0, 0, 1}}},
			{Kind: CommandFrame, Offset: 37, Command: Command{Number: CommandPostcopyAdvise, Payload: []byte{0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 16, 0}}},
			{Kind: CommandFrame, Offset: 58, Command: Command{Number: CommandPostcopyAdvise, Payload: []byte{}}},
			{Kind: SectionStart, Offset: 63, Section: section2},
			{Kind: Footer, Offset: 82, Section: section2},
			{Kind: CommandFrame, Offset: 87, Command: Command{Number: CommandPostcopyListen, Payload: []byte{}}},
			{Kind: CommandFrame, Offset: 92, Command: Command{Number: CommandSwitchoverStart, Payload: []byte{}}},
			{Kind: SectionFull, Offset: 97},
		}},
		{"package", goldenHeader + goldenStart + `08 0007 0004 00000007 'package'` + goldenPart + `00`, []Frame{
			{Kind: Header},
			{Kind: SectionStart, Offset: 8, Section: section2},
			{Kind: Footer, Offset: 27, Section: section2},
			{Kind: CommandFrame, Offset: 32, Command: Command{Number: CommandPackaged, Payload: []byte{0, 0, 0, 7}}},
			{Kind: SectionPart, Offset: 48, Section: section2},
			{Kind: Footer, Offset: 54, Section: section2},
			{Kind: EOF, Offset: 59},
		}},
		{"two sections interleaved", goldenHeader + goldenStart + `01 00000003 01 'b' 00000001 00000001 'p' 7e 00000003` + goldenPart + `02 00000003 'p' 7e 00000003` + `00`, []Frame{
			{Kind: Header},
			{Kind: SectionStart, Offset: 8, Section: section2},
			{Kind: Footer, Offset: 27, Section: section2},
			{Kind: SectionStart, Offset: 32, Section: Section{3, "b", 1, 1}},
			{Kind: Footer, Offset: 48, Section: Section{3, "b", 1, 1}},
			{Kind: SectionPart, Offset: 53, Section: section2},
			{Kind: Footer, Offset: 59, Section: section2},
			{Kind: SectionPart, Offset: 64, Section: Section{3, "b", 1, 1}},
			{Kind: Footer, Offset: 70, Section: Section{3, "b", 1, 1}},
			{Kind: EOF, Offset: 75},
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, _, err := frames(t, unhex(t, tt.in))
			if err != nil {
				t.Fatal(err)
			}
			for i := range max(len(got), len(tt.want)) {
				var g, w Frame
				if i < len(got) {
					g = got[i]
				}
				if i < len(tt.want) {
					w = tt.want[i]
				}
				if !reflect.DeepEqual(g, w) {
					t.Errorf("frame %d:\n got %+v\nwant %+v", i, g, w)
				}
			}
		})
	}
}

// TestReaderErrors also checks that the offset is that of the failing frame
// and that the cursor still stands there.
func TestReaderErrors(t *testing.T) {
	tests := []struct {
		name   string
		in     string
		offset int64
		want   error
	}{
		{"empty", ``, 0, ErrTruncated},
		{"text", `'Not a stream'`, 0, ErrNotStream},
		{"short text", `'no'`, 0, ErrNotStream},
		{"old version", `51 45 56 4d 00000002`, 0, ErrNotStream},
		{"header only", goldenHeader, 8, ErrTruncated},
		{"long machine type", goldenHeader + `07 00000100`, 8, ErrDamaged},
		{"second configuration", goldenHeader + goldenConfig + goldenConfig, 23, ErrDamaged},
		{"configuration later", goldenHeader + goldenStart + goldenConfig, 32, ErrDamaged},
		{"unknown subsection", goldenHeader + goldenConfig + `05 01 'x' 00000001 'body'`, 23, ErrUnknown},
		{"subsection version", goldenHeader + goldenConfig + `05 12 'configuration/uuid' 00000002`, 23, ErrUnknown},
		{"tiny pages", goldenHeader + goldenConfig + `05 1e 'configuration/target-page-bits' 00000001 00000009`, 23, ErrUnknown},
		{"huge pages", goldenHeader + goldenConfig + `05 1e 'configuration/target-page-bits' 00000001 00000040`, 23, ErrUnknown},
		{"capabilities without end", goldenHeader + goldenConfig + `05 1a 'configuration/capabilities' 00000001 ffffffff`, 23, ErrDamaged},
		{"subsection without configuration", goldenHeader + `05 12 'configuration/uuid' 00000001`, 8, ErrDamaged},
		{"subsection later", goldenHeader + goldenConfig + goldenStart + `05 12 'configuration/uuid' 00000001`, 47, ErrDamaged},
		{"unknown type", goldenHeader + `09`, 8, ErrUnknown},
		{"vmdescription alone", goldenHeader + `06`, 8, ErrDamaged},
		{"footer alone", goldenHeader + `7e 00000000`, 8, ErrDamaged},
		{"part of nothing", goldenHeader + `02 00000001`, 8, ErrDamaged},
		{"end of nothing", goldenHeader + `03 00000001`, 8, ErrDamaged},
		{"started twice", goldenHeader + goldenStart + goldenStart, 32, ErrDamaged},
		{"wrong footer", goldenHeader + `01 00000002 04 'test' 00000000 00000004 'p' 7e 00000003`, 27, ErrDamaged},
		{"footer missing later", goldenHeader + goldenStart + `02 00000002 'p' 03 00000002`, 38, ErrDamaged},
		{"footer only later", goldenHeader + `01 00000002 04 'test' 00000000 00000004 'p'` + goldenPart, 33, ErrDamaged},
		{"command 0", goldenHeader + `08 0000 0000`, 8, ErrUnknown},
		{"unknown command", goldenHeader + `08 000c 0000`, 8, ErrUnknown},
		{"command too long", goldenHeader + `08 0001 0001 00`, 8, ErrDamaged},
		{"command too short", goldenHeader + `08 0002 0003 000000`, 8, ErrDamaged},
		{"huge package", goldenHeader + `08 0007 0004 10000001`, 8, ErrDamaged},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, r, err := frames(t, unhex(t, tt.in))
			var e *Error
			if !errors.Is(err, tt.want) || !errors.As(err, &e) || e.Offset != tt.offset {
				t.Errorf("error %v; want %v at offset %d", err, tt.want, tt.offset)
			}
			if at := r.Cursor().Offset(); at != tt.offset {
				t.Errorf("cursor at %d; want %d", at, tt.offset)
			}
			// Asking again gives the same answer.
			if _, again := r.Next(); again == nil || again.Error() != err.Error() {
				t.Errorf("second call: %v; first: %v", again, err)
			}
		})
	}
}

// TestReaderTruncated cuts a stream with every kind of frame everywhere.
func TestReaderTruncated(t *testing.T) {
	in := unhex(t, goldenHeader+goldenConfig+`
		05 1e 'configuration/target-page-bits' 00000001 0000000c
		05 1a 'configuration/capabilities' 00000001 00000001 01 'y'
		05 12 'configuration/uuid' 00000001 '0123456789abcdef'
		08 0003 0010 0000000000001000 0000000000001000`+
		goldenStart+`08 0007 0004 00000003 'abc'`+goldenPart+goldenEnd)
	for n := range len(in) + 1 {
		_, _, err := frames(t, in[:n])
		var e *Error
		if !errors.Is(err, ErrTruncated) || !errors.As(err, &e) || e.Offset > int64(n) {
			t.Fatalf("cut at %d: %v; want ErrTruncated", n, err)
		}
	}
}

// TestReaderSections checks that a stream cannot make the reader collect
// sections without end.
func TestReaderSections(t *testing.T) {
	in := AppendHeader(nil)
	for id := range uint32(maxSections + 1) {
		in = AppendFooter(append(AppendStart(in, Section{ID: id, Name: "s"}), 'p'), id)
	}
	if _, _, err := frames(t, in); !errors.Is(err, ErrDamaged) {
		t.Errorf("%d sections: %v; want ErrDamaged", maxSections+1, err)
	}
}

// TestReaderHoldsBack checks that nothing of the device tail but its first
// byte is taken from the input, however often Next is called.
func TestReaderHoldsBack(t *testing.T) {
	front := unhex(t, goldenHeader+goldenConfig+goldenStart+goldenEnd)
	in := &counting{r: bytes.NewReader(append(front[:len(front):len(front)], unhex(t, goldenFull)...))}
	c := NewCursor(in, 0)
	c.SetReadAhead(0)
	r := NewReader(c)
	for tails := 0; tails < 3; {
		f, err := r.Next()
		if err != nil {
			t.Fatal(err)
		}
		switch f.Kind {
		case SectionStart, SectionEnd:
			c.Next(1)
		case SectionFull:
			tails++
			if f.Offset != int64(len(front)) || c.Offset() != f.Offset {
				t.Fatalf("tail at %d, cursor at %d; want %d", f.Offset, c.Offset(), len(front))
			}
		}
	}
	if in.got != int64(len(front))+1 {
		t.Errorf("%d bytes taken; want the %d before the tail and its first", in.got, len(front))
	}
	if rest, err := c.Peek(5); err != nil || rest[0] != typeFull {
		t.Errorf("tail begins with %x, %v", rest, err)
	}
}

// TestReaderOrder checks that calls out of order are refused and harmless.
func TestReaderOrder(t *testing.T) {
	in := unhex(t, goldenHeader+`08 0007 0004 00000003 'abc' 00`)
	r := NewReader(NewCursor(bytes.NewReader(in), 0))
	none := func([]byte) error { t.Error("sink was called"); return nil }
	if r.CopyPackage(none) == nil || r.CopyForeign(none) == nil {
		t.Error("Copy before any frame did not fail")
	}
	r.Next()
	r.Next()
	if _, err := r.Next(); err == nil || errors.Is(err, ErrDamaged) {
		t.Errorf("Next with an unread package: %v; want an error that does not blame the stream", err)
	}
	full := errors.New("full")
	if err := r.CopyPackage(func([]byte) error { return full }); err != full {
		t.Errorf("CopyPackage: %v; want the sink's error", err)
	}
	var got []byte
	if err := r.CopyPackage(func(p []byte) error { got = append(got, p...); return nil }); err != nil || string(got) != "abc" {
		t.Errorf("CopyPackage again: %q, %v", got, err)
	}
	if f, err := r.Next(); f.Kind != EOF || err != nil {
		t.Errorf("after the package: %v, %v", f.Kind, err)
	}
}

func TestErrorText(t *testing.T) {
	err := fmt.Errorf("save: %w", Damaged("footer", 42, "section %d", 7))
	if got, want := err.Error(), "save: footer at offset 42: migration stream is damaged: section 7"; got != want {
		t.Errorf("%q; want %q", got, want)
	}
	for k := Header; k <= EOF; k++ {
		if k.String() == "unknown frame" {
			t.Errorf("kind %d has no name", k)
		}
	}
	if Kind(99).String() != "unknown frame" {
		t.Error("kind 99 has a name")
	}
}

// FuzzReader reads frames of anything. Those it accepts have to come out of
// the Append functions as they went in.
func FuzzReader(f *testing.F) {
	config := AppendConfiguration(AppendHeader(nil), "virt-7.2")
	f.Add(config)
	for _, s := range []ConfigSubsection{
		{Name: SubsectionTargetPageBits, Version: 1, TargetPageBits: 12},
		{Name: SubsectionCapabilities, Version: 1, Capabilities: []string{"x-ignore-shared"}},
		{Name: SubsectionUUID, Version: 1, UUID: [16]byte{1, 2, 3}},
	} {
		f.Add(AppendConfigSubsection(config[:len(config):len(config)], s))
	}
	ping := AppendCommand(config, CommandPing, []byte{0, 0, 0, 1})
	start := AppendFooter(append(AppendStart(ping, section2), 'p'), 2)
	f.Add(AppendEOF(AppendFooter(append(AppendEnd(AppendFooter(append(AppendPart(start, 2), 'p'), 2), 2), 'p'), 2)))
	f.Add(append(AppendCommand(start, CommandPackaged, []byte{0, 0, 0, 3}), "abc"...))
	f.Add(AppendFull(start, Section{ID: 1, Name: "timer", Version: 2}))
	early := AppendFooter(append(AppendFull(config, early38), "body"...), early38.ID)
	f.Add(append(AppendStart(early, section2), 'p'))
	f.Fuzz(func(t *testing.T, in []byte) {
		all, r, err := frames(t, in)
		if err != nil && !errors.Is(err, ErrNotStream) && !errors.Is(err, ErrTruncated) && !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrUnknown) {
			t.Fatalf("error of no kind: %v", err)
		}
		for _, fr := range all {
			var out []byte
			switch fr.Kind {
			case Header:
				out = AppendHeader(out)
			case Configuration:
				out = AppendConfiguration(out, fr.MachineType)
			case Subsection:
				out = AppendConfigSubsection(out, fr.Subsection)
			case SectionStart:
				out = AppendStart(out, fr.Section)
			case SectionPart:
				out = AppendPart(out, fr.Section.ID)
			case SectionEnd:
				out = AppendEnd(out, fr.Section.ID)
			case Footer:
				out = AppendFooter(out, fr.Section.ID)
			case CommandFrame:
				out = AppendCommand(out, fr.Command.Number, fr.Command.Payload)
			case SectionEarly:
				out = AppendFull(out, fr.Section)
			case EOF:
				out = AppendEOF(out)
			}
			if !bytes.HasPrefix(in[fr.Offset:], out) {
				t.Fatalf("%v at %d is encoded as %x", fr.Kind, fr.Offset, out)
			}
		}
		if at := r.Cursor().Offset(); at > int64(len(in)) {
			t.Fatalf("cursor at %d of %d", at, len(in))
		}
	})
}
