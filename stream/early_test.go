package stream

import (
	"bytes"
	"errors"
	"io"
	"testing"
)

// An early section as virtio-mem writes one, and ram's START and a PART behind it.
const (
	goldenEarly = `04 00000026 07 'v/early' 00000000 00000001 'body' 7e 00000026`
	goldenRAM   = `01 00000002 04 'test' 00000000 00000004 'p' 7e 00000002`
)

var early38 = Section{ID: 0x26, Name: "v/early", Version: 1}

func TestEarly(t *testing.T) {
	second := `04 00000027 01 'w' 00000000 00000001 7e 00000027` // without a body
	start := Frame{Kind: SectionStart, Section: section2}
	early := Frame{Kind: SectionEarly, Section: early38}
	foot := func(s Section) Frame { return Frame{Kind: Footer, Section: s} }
	tail := Frame{Kind: SectionFull}
	header, config := Frame{Kind: Header}, Frame{Kind: Configuration, MachineType: "pc-q35-7.2"}
	w := Section{ID: 0x27, Name: "w", Version: 1}
	tests := map[string]struct {
		in   string
		want []Frame
	}{
		"before ram's START": {goldenConfig + goldenEarly + goldenRAM + goldenPart + goldenFull,
			[]Frame{config, early, foot(early38), start, foot(section2), {Kind: SectionPart, Section: section2}, foot(section2), tail}},
		"behind it": {goldenConfig + goldenRAM + goldenEarly + goldenPart + goldenFull,
			[]Frame{config, start, foot(section2), early, foot(early38), {Kind: SectionPart, Section: section2}, foot(section2), tail}},
		"two of them": {goldenConfig + goldenEarly + second + goldenRAM + goldenEnd + goldenFull,
			[]Frame{config, early, foot(early38), {Kind: SectionEarly, Section: w}, foot(w), start, foot(section2),
				{Kind: SectionEnd, Section: section2}, foot(section2), tail}},
		"before a command": {goldenConfig + goldenEarly + `08 0002 0004 00000001` + goldenRAM + goldenFull,
			[]Frame{config, early, foot(early38), {Kind: CommandFrame, Command: Command{Number: CommandPing, Payload: []byte{0, 0, 0, 1}}},
				start, foot(section2), tail}},
		"a footer in the body": {goldenConfig + `04 00000026 07 'v/early' 00000000 00000001 7e 00000026 7e 00000026 01 00000002 00 7e 00000026` + goldenRAM + goldenPart,
			[]Frame{config, early, foot(early38), start, foot(section2), {Kind: SectionPart, Section: section2}, foot(section2)}},
		"a section that was never started in the body": {goldenConfig + `04 00000026 07 'v/early' 00000000 00000001 7e 00000026 02 00000009 7e 00000026` + goldenRAM + goldenPart,
			[]Frame{config, early, foot(early38), start, foot(section2), {Kind: SectionPart, Section: section2}, foot(section2)}},

		// The device tail looks the same but for its end.
		"devices and no RAM":       {goldenConfig + goldenEarly + goldenFull, []Frame{config, tail}},
		"devices behind the START": {goldenConfig + goldenRAM + goldenEarly + goldenFull, []Frame{config, start, foot(section2), tail}},
		"devices behind a PART": {goldenConfig + goldenRAM + goldenPart + goldenEarly + goldenEnd,
			[]Frame{config, start, foot(section2), {Kind: SectionPart, Section: section2}, foot(section2), tail}},
		"devices behind a switchover": {goldenConfig + goldenRAM + `08 000b 0000` + goldenEarly + goldenEnd,
			[]Frame{config, start, foot(section2), {Kind: CommandFrame, Command: Command{Number: CommandSwitchoverStart, Payload: []byte{}}}, tail}},
		"no footers": {`01 00000002 04 'test' 00000000 00000004 'p' 04 00000026 01 'v' 00000000 00000001 'body' 02 00000002 'p'`,
			[]Frame{start, tail}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			in := unhex(t, goldenHeader+tt.in)
			got, _, err := frames(t, in)
			if err != nil && !errors.Is(err, ErrTruncated) {
				t.Fatal(err)
			}
			want := append([]Frame{header}, tt.want...)
			if len(got) != len(want) {
				t.Fatalf("%d frames, want %d: %+v", len(got), len(want), got)
			}
			for i, g := range got {
				if w := want[i]; g.Kind != w.Kind || g.Section != w.Section {
					t.Errorf("frame %d: %+v, want %+v", i, g, w)
				}
			}
		})
	}
}

// TestEarlyBody: the body of an early section, and where it is.
func TestEarlyBody(t *testing.T) {
	r := NewReader(NewCursor(bytes.NewReader(unhex(t, goldenHeader+goldenConfig+goldenEarly+goldenRAM)), 0))
	for {
		f, err := r.Next()
		if err != nil {
			t.Fatal(err)
		}
		if f.Kind == SectionEarly {
			if body, at := f.Body(); string(body) != "body" || at != f.Offset+21 || !bytes.HasSuffix(f.Raw, body) {
				t.Errorf("body %q at %d of the section at %d", body, at, f.Offset)
			}
			return
		}
	}
}

// TestEarlyWaits gives the stream byte by byte: the Reader decides as soon as it
// can, and never waits for what a source that waits for an answer will not send.
func TestEarlyWaits(t *testing.T) {
	for name, in := range map[string]string{
		"early":             goldenHeader + goldenConfig + goldenEarly + goldenRAM,
		"the whole machine": goldenHeader + goldenConfig + goldenRAM + goldenEarly + goldenFull,
	} {
		t.Run(name, func(t *testing.T) {
			b := unhex(t, in)
			c := NewCursor(&dripping{b}, 0)
			r := NewReader(c)
			for {
				f, err := r.Next()
				if err != nil {
					t.Fatal(err)
				}
				if f.Kind == SectionStart {
					c.Next(1)
				}
				if f.Kind == SectionFull || f.Kind == Footer && c.Offset() == int64(len(b)) {
					return
				}
			}
		})
	}
}

// dripping gives one byte at a time, and has no end: a read behind its last byte
// would wait for ever.
type dripping struct{ b []byte }

func (d *dripping) Read(p []byte) (int, error) {
	if len(d.b) == 0 {
		panic("read of what will never come")
	}
	p[0], d.b = d.b[0], d.b[1:]
	return 1, nil
}

// TestEarlyCap: what has no end within MaxPeek bytes is the device tail, and no
// more than that is looked at.
func TestEarlyCap(t *testing.T) {
	for _, n := range []int{MaxPeek - 200, MaxPeek + 1} {
		in := AppendFull(AppendConfiguration(AppendHeader(nil), "q35"), early38)
		in = append(in, make([]byte, n)...)
		in = AppendFooter(in, early38.ID)
		in = append(AppendStart(in, Section{ID: 2, Name: "ram", Version: 4}), 'p')
		in = AppendPart(AppendFooter(in, 2), 2)
		source := &counting{r: io.MultiReader(bytes.NewReader(in), bytes.NewReader(make([]byte, 4<<20)))}
		r := NewReader(NewCursor(source, 0))
		want := SectionEarly
		if n > MaxPeek {
			want = SectionFull
		}
		for i, kind := range []Kind{Header, Configuration, want} {
			if f, err := r.Next(); err != nil || f.Kind != kind {
				t.Fatalf("frame %d of %d bytes: %v, %v; want %v", i, n, f.Kind, err, kind)
			}
		}
		if source.got > 2*MaxPeek {
			t.Errorf("%d bytes were read", source.got)
		}
	}
}

// TestParseTailEarly: the vmdescription lists early sections first, and they are
// not in the tail.
func TestParseTailEarly(t *testing.T) {
	early := `{"name": "v/early", "instance_id": 0, "fields": [{"name": "size", "type": "uint64", "size": 8}]}, `
	json := bytes.Replace([]byte(tailJSON), []byte(`{"name": "timer"`), []byte(early+`{"name": "timer"`), 1)
	got, err := ParseTail(AppendDescription(AppendEOF(goldenTail(t)), json))
	if err != nil || got.Early != 1 || len(got.Sections) != len(goldenSections) || got.Sections[0].Name != "timer" {
		t.Errorf("%+v, %v", got, err)
	}
	if got, err := ParseTail(AppendDescription(AppendEOF(goldenTail(t)), []byte(tailJSON))); err != nil || got.Early != 0 {
		t.Errorf("without early sections: %+v, %v", got, err)
	}
}
