package stream

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
)

// A tail as QEMU makes one: timer; a device with an array, a struct and nested
// subsections; one that saves itself; globalstate.
const (
	tailTimer = `04 00000000 05 'timer' 00000000 00000002 '8 bytes.8 bytes.8 bytes.' 7e 00000000`
	tailDev   = `04 00000007 08 '0:1f/dev' 00000000 00000003
		'head' 'array of sixteen' 'struct' 'array2'
		05 07 'dev/sub' 00000001 'sub' 05 0b 'dev/sub/sub' 00000001 'nested'
		7e 00000007`
	tailOld   = `04 00000008 04 'slow' 00000001 00000001 'sixteen bytes...' 7e 00000008`
	tailState = `04 00000009 0b 'globalstate' 00000000 00000001 00000007 'paused' 00`
	tailJSON  = `{"page_size": 4096, "devices": [
		{"name": "timer", "instance_id": 0, "vmsd_name": "timer", "version": 2, "fields": [
			{"name": "ticks", "type": "int64", "size": 8}, {"name": "offset", "type": "int64", "size": 8},
			{"name": "clock", "type": "int64", "size": 8}]},
		{"name": "0:1f/dev", "instance_id": 0, "vmsd_name": "dev", "version": 3, "fields": [
			{"name": "head", "type": "buffer", "size": 4},
			{"name": "array", "array_len": 8, "type": "uint16", "size": 2},
			{"name": "inner", "type": "struct", "size": 6, "struct": {
				"vmsd_name": "inner", "version": 1, "fields": [{"name": "x", "type": "buffer", "size": 6}]}},
			{"name": "few", "index": 0, "type": "uint8", "size": 3}, {"name": "few", "index": 1, "type": "uint8", "size": 3}],
		 "subsections": [{"vmsd_name": "dev/sub", "version": 1,
			"fields": [{"name": "s", "type": "buffer", "size": 3}],
			"subsections": [{"vmsd_name": "dev/sub/sub", "version": 1, "fields": [{"name": "n", "type": "buffer", "size": 6}]}]}]},
		{"name": "slow", "instance_id": 1, "size": 16, "fields": [{"name": "data", "size": 16, "type": "buffer"}]},
		{"name": "globalstate", "instance_id": 0, "vmsd_name": "globalstate", "version": 1, "fields": [
			{"name": "size", "type": "uint32", "size": 4}, {"name": "runstate", "type": "buffer", "size": 100}]}]}`
)

// goldenTail returns the tail without its end, so that the tests can put one on.
func goldenTail(t testing.TB) []byte {
	return unhex(t, tailTimer+tailDev+tailOld+tailState+strings.Repeat("00", 93)+`7e 00000009`)
}

var goldenSections = []TailSection{
	{Section{0, "timer", 0, 2}, 19, 24, []TailField{{"ticks", 19, 8, 1}, {"offset", 27, 8, 1}, {"clock", 35, 8, 1}}},
	{Section{7, "0:1f/dev", 0, 3}, 70, 4 + 16 + 6 + 6 + 13 + 3 + 17 + 6,
		[]TailField{{"head", 70, 4, 1}, {"array", 74, 2, 8}, {"inner", 90, 6, 1}, {"few", 96, 3, 2}}},
	{Section{8, "slow", 1, 1}, 164, 16, []TailField{{"data", 164, 16, 1}}},
	{Section{9, "globalstate", 0, 1}, 210, 104, []TailField{{"size", 210, 4, 1}, {"runstate", 214, 100, 1}}},
}

// withoutFooters is what machine types before 2.4 make of the golden tail.
func withoutFooters(t testing.TB) []byte {
	tail := goldenTail(t)
	var out []byte
	at := 0
	for _, s := range goldenSections {
		out = append(out, tail[at:s.Offset+s.Length]...)
		at = s.Offset + s.Length + 5
	}
	return out
}

func TestParseTail(t *testing.T) {
	full := AppendDescription(AppendEOF(goldenTail(t)), []byte(tailJSON))
	got, err := ParseTail(full)
	if err != nil {
		t.Fatal(err)
	}
	want := Tail{Sections: goldenSections, PageSize: 4096, RunState: "paused", Description: []byte(tailJSON)}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("\n got %+v\nwant %+v", got, want)
	}

	got, err = ParseTail(AppendEOF(goldenTail(t)))
	if err != nil || !reflect.DeepEqual(got, Tail{RunState: "paused"}) {
		t.Errorf("without vmdescription: %+v, %v; want the run state only", got, err)
	}

	got, err = ParseTail(AppendDescription(AppendEOF(withoutFooters(t)), []byte(tailJSON)))
	if err != nil || len(got.Sections) != len(goldenSections) || got.RunState != "paused" {
		t.Errorf("without footers: %+v, %v", got, err)
	}
	for i, s := range got.Sections {
		if s.Section != goldenSections[i].Section || s.Length != goldenSections[i].Length {
			t.Errorf("without footers: %+v; want %+v", s, goldenSections[i])
		}
	}
}

func TestSectionsEnd(t *testing.T) {
	sections := goldenTail(t)
	bare := AppendEOF(slices.Clone(sections))
	full := AppendDescription(slices.Clone(bare), []byte(tailJSON))
	for _, tc := range []struct {
		tail []byte
		want int
	}{
		{bare, len(sections)}, {full, len(sections)},
		// What is in the description does not matter, its length does.
		{AppendDescription(slices.Clone(bare), []byte(`{"devices": nothing of the kind`)), len(sections)},
		{full[:len(full)-1], -1}, {sections, -1}, {[]byte{0}, 0}, {nil, -1},
	} {
		if got := SectionsEnd(tc.tail); got != tc.want {
			t.Errorf("%d bytes: %d, want %d", len(tc.tail), got, tc.want)
		}
	}
}

func TestParseTailErrors(t *testing.T) {
	swap := func(old, new string) string {
		if !strings.Contains(tailJSON, old) {
			t.Fatalf("no %s in the description", old)
		}
		return strings.Replace(tailJSON, old, new, 1)
	}
	tests := map[string]string{
		"length: too long":             swap(`"type": "buffer", "size": 4`, `"type": "buffer", "size": 5`),
		"length: too short":            swap(`"type": "buffer", "size": 4`, `"type": "buffer", "size": 3`),
		"length: negative field":       swap(`"data", "size": 16`, `"data", "size": -16`),
		"length: negative array":       swap(`"array_len": 8`, `"array_len": -8`),
		"length: overflow":             swap(`"array_len": 8`, `"array_len": 4611686018427387904`),
		"not a number":                 swap(`"array_len": 8`, `"array_len": "8"`),
		"other name":                   swap(`"slow"`, `"slov"`),
		"other instance":               swap(`"name": "slow", "instance_id": 1`, `"name": "slow", "instance_id": 2`),
		"length: long subsection name": swap(`"dev/sub"`, `"`+strings.Repeat("n", 1000)+`"`),
		"a device too few":             swap(`"devices": [`, `"devices": [], "other": [`),
		"a device too many":            swap(`"runstate", "type": "buffer", "size": 100}]}`, `"runstate", "type": "buffer", "size": 100}]}, {"name": "x"}`),
	}
	for name, description := range tests {
		got, err := ParseTail(AppendDescription(AppendEOF(withoutFooters(t)), []byte(description)))
		if !errors.Is(err, ErrDamaged) || got.RunState != "paused" {
			t.Errorf("%s: %v, %q; want ErrDamaged and the run state", name, err, got.RunState)
		}
		got, err = ParseTail(AppendDescription(AppendEOF(goldenTail(t)), []byte(description)))
		if strings.HasPrefix(name, "length:") {
			// The section whose length is wrong is found, its fields are not.
			want := slices.Clone(goldenSections)
			for i := range want {
				if i < len(got.Sections) && got.Sections[i].Fields == nil {
					want[i].Fields = nil
				}
			}
			if err != nil || !reflect.DeepEqual(got.Sections, want) || reflect.DeepEqual(want, goldenSections) {
				t.Errorf("%s: %+v, %v; want the sections found by their footers", name, got.Sections, err)
			}
		} else if !errors.Is(err, ErrDamaged) {
			t.Errorf("%s with footers: %v; want ErrDamaged", name, err)
		}
	}
	// Without the footer there is nothing to find the section's end by.
	bad := AppendDescription(AppendEOF(goldenTail(t)), []byte(tailJSON))
	bad[goldenSections[0].Offset+goldenSections[0].Length+4]++
	if _, err := ParseTail(bad); !errors.Is(err, ErrDamaged) {
		t.Errorf("wrong footer: %v; want ErrDamaged", err)
	}
}

func TestField(t *testing.T) {
	s := &goldenSections[1]
	if f, ok := s.Field("array"); !ok || f != (TailField{"array", 74, 2, 8}) {
		t.Errorf("%+v, %v", f, ok)
	}
	// A subsection's field is none of the section's.
	for _, name := range []string{"x", "s", ""} {
		if f, ok := s.Field(name); ok {
			t.Errorf("field %q: %+v", name, f)
		}
	}
}

// TestParseTailFooterInBody checks that a footer's bytes in a body do not end a
// section whose length is wrong.
// TestParseTailMany: what a vmdescription of many values, of a few bytes each, would take in
// memory is not taken.
func TestParseTailMany(t *testing.T) {
	sections := AppendEOF(goldenTail(t))
	full := AppendDescription(slices.Clone(sections), []byte(`{"devices": [`+strings.Repeat("null,", maxDescribed+1)+`null]}`))
	if got, err := ParseTail(full); !errors.Is(err, ErrDamaged) || len(got.Sections) > 0 {
		t.Errorf("%d sections, %v; want ErrDamaged", len(got.Sections), err)
	}
	if list := Described(full); list != nil {
		t.Errorf("%d sections are described", len(list))
	}
}

func TestParseTailFooterInBody(t *testing.T) {
	sections := unhex(t, `04 00000001 01 'a' 00000000 00000001 'x' 7e 00000001 7e 00000001 7e 00000001
		04 00000002 01 'b' 00000000 00000001 'y' 7e 00000002 7e 00000002`)
	description := `{"devices": [{"name": "a", "fields": [{"size": 1}]}, {"name": "b", "fields": [{"size": 1}]}]}`
	got, err := ParseTail(AppendDescription(AppendEOF(sections), []byte(description)))
	want := []TailSection{{Section: Section{1, "a", 0, 1}, Offset: 15, Length: 11}, {Section: Section{2, "b", 0, 1}, Offset: 46, Length: 6}}
	if err != nil || !reflect.DeepEqual(got.Sections, want) {
		t.Errorf("%+v, %v; want %+v", got.Sections, err, want)
	}
}

// TestComplete feeds a tail byte by byte and asks after each, as one would
// whose reads come in any pieces.
func TestComplete(t *testing.T) {
	sections := goldenTail(t)
	eof := len(sections) + 1
	full := AppendDescription(AppendEOF(sections), []byte(tailJSON))
	s := NewTailScanner(true)
	for i := range full {
		s.Write(full[i : i+1])
		want := Incomplete
		switch i + 1 {
		case eof:
			want = WithFooter
		case len(full):
			want = WithDescription
		}
		if got := s.Complete(); got != want {
			t.Fatalf("after %d of %d bytes: %v; want %v", i+1, len(full), got, want)
		}
	}
	if !bytes.Equal(s.Bytes(), full) {
		t.Error("Bytes is not what was written")
	}

	s = NewTailScanner(false)
	full = AppendDescription(AppendEOF(withoutFooters(t)), []byte(tailJSON))
	for i, b := range full {
		s.Write(full[i : i+1])
		want := Incomplete
		switch {
		case i+1 == len(full):
			want = WithDescription
		case b == 0:
			want = Weak
		}
		if got := s.Complete(); got != want {
			t.Fatalf("without footers, after %d bytes: %v; want %v", i+1, got, want)
		}
	}
}

func TestCompleteEnds(t *testing.T) {
	tests := []struct {
		name string
		end  string // after the golden tail's last footer
		want Completion
	}{
		{"description", `00 06 00000002 '{}'`, WithDescription},
		// Lengths that hold bytes which look like the head themselves.
		{"length with 00 06", `00 06 00060003 '{"a":"` + strings.Repeat("x", 0x60003-8) + `"}'`, WithDescription},
		{"length ends in 00", `00 06 00000100 '{"a":"` + strings.Repeat("x", 0x100-8) + `"}'`, WithDescription},
		{"no JSON", `00 06 00000002 '{]'`, Incomplete},
		{"JSON but no object", `00 06 00000002 '12'`, Incomplete},
		{"empty description", `00 06 00000000`, Incomplete},
		{"shorter than said", `00 06 00000003 '{}'`, Incomplete},
		{"longer than said", `00 06 00000001 '{}'`, Incomplete},
		{"footer alone", ``, Incomplete},
		{"footer of no section", `7e 00000005 00`, Incomplete},
		{"second eof", `00 00`, Incomplete},
	}
	for _, tt := range tests {
		s := NewTailScanner(true)
		s.Write(goldenTail(t))
		s.Write(unhex(t, tt.end))
		if got := s.Complete(); got != tt.want {
			t.Errorf("%s: %v; want %v", tt.name, got, tt.want)
		}
	}
	if got := NewTailScanner(true).Complete(); got != Incomplete {
		t.Errorf("empty tail: %v", got)
	}
	// A header's bytes in a body are no header: no footer stands before them.
	s := NewTailScanner(true)
	s.Write(unhex(t, `04 00000001 01 'a' 00000000 00000001 'x' 04 00000003 01 'b' 00000000 00000001 7e 00000003 00`))
	if got := s.Complete(); got != Incomplete {
		t.Errorf("footer of a header within a body: %v", got)
	}
}

func TestTailScannerLimit(t *testing.T) {
	s := NewTailScanner(true)
	s.buf = make([]byte, MaxTail-1, MaxTail)
	if n, err := s.Write([]byte("ab")); n != 0 || err != ErrTooLong {
		t.Errorf("Write over the limit: %d, %v; want ErrTooLong", n, err)
	}
	if n, err := s.Write([]byte("a")); n != 1 || err != nil {
		t.Errorf("Write up to the limit: %d, %v", n, err)
	}
}

func TestRunState(t *testing.T) {
	body := func(n byte, text string) string {
		return fmt.Sprintf(`04 00000001 0b 'globalstate' 00000000 00000001 000000%02x '%s' 00`, n, text)
	}
	pad := strings.Repeat("00", 100)
	tests := []struct {
		name, in, want string
	}{
		{"running", body(8, "running") + pad, "running"},
		{"cut", body(8, "running"), ""},
		{"length differs", body(9, "running") + pad, ""},
		{"name in a body", body(8, "running") + pad + `'x' 0b 'globalstate' ` + pad, "running"},
		{"name at the start", `0b 'globalstate'`, ""},
		{"none", pad, ""},
	}
	for _, tt := range tests {
		if got, _ := ParseTail(unhex(t, tt.in)); got.RunState != tt.want {
			t.Errorf("%s: %q; want %q", tt.name, got.RunState, tt.want)
		}
	}
}

func TestCompletionNames(t *testing.T) {
	for c, want := range map[Completion]string{Incomplete: "incomplete", Weak: "weak", WithFooter: "with footer", WithDescription: "with description", 9: "unknown completion"} {
		if got := c.String(); got != want {
			t.Errorf("%d is %q; want %q", c, got, want)
		}
	}
}

// FuzzTail checks what callers count on: a section lies within the tail and
// after the one before, and a complete tail with a description has one.
func FuzzTail(f *testing.F) {
	f.Add(AppendDescription(AppendEOF(goldenTail(f)), []byte(tailJSON)), true)
	f.Add(AppendEOF(goldenTail(f)), true)
	f.Add(AppendDescription(AppendEOF(withoutFooters(f)), []byte(tailJSON)), false)
	f.Add(AppendDescription(AppendEOF(nil), []byte(`{}`)), true)
	f.Fuzz(func(t *testing.T, in []byte, footers bool) {
		s := NewTailScanner(footers)
		s.Write(in)
		complete := s.Complete()
		tail, err := ParseTail(in)
		if err != nil && !errors.Is(err, ErrDamaged) {
			t.Fatalf("error of no kind: %v", err)
		}
		if (complete == WithDescription) != (tail.Description != nil) || tail.Description != nil && !json.Valid(tail.Description) {
			t.Fatalf("%v with description %q", complete, tail.Description)
		}
		at := 0
		for _, s := range tail.Sections {
			if s.Offset <= at || s.Length < 0 || s.Offset+s.Length > len(in) {
				t.Fatalf("section %+v after %d in a tail of %d", s, at, len(in))
			}
			at = s.Offset + s.Length
			field := s.Offset
			for _, f := range s.Fields {
				if f.Offset != field || f.Size < 0 || f.Count < 0 || f.Size > 0 && f.Count > (at-field)/f.Size {
					t.Fatalf("field %+v at %d of section %+v", f, field, s)
				}
				field += f.Size * f.Count
			}
		}
	})
}

// BenchmarkComplete asks about a PC's tail that lacks its last byte.
func BenchmarkComplete(b *testing.B) {
	s := NewTailScanner(true)
	s.Write(bytes.Repeat([]byte("device\x00\x06state"), 20_000))
	full := AppendDescription(nil, []byte(`{"a":"`+strings.Repeat("x", 100_000)+`"}`))
	s.Write(full[:len(full)-1])
	for b.Loop() {
		if s.Complete() != Incomplete {
			b.Fatal("complete")
		}
	}
}
