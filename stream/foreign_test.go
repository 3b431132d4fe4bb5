package stream

import (
	"bytes"
	"errors"
	"strings"
	"testing"
)

// foreign starts a section with the given name and payload and copies it.
func foreign(t testing.TB, name string, version uint32, payload []byte) (got []byte, c *Cursor, err error) {
	t.Helper()
	in := AppendStart(AppendHeader(nil), Section{ID: 3, Name: name, Version: version})
	front := len(in)
	in = append(in, payload...)
	c = NewCursor(bytes.NewReader(in), 0)
	c.SetReadAhead(0)
	r := NewReader(c)
	for range 2 {
		if _, err := r.Next(); err != nil {
			t.Fatal(err)
		}
	}
	err = r.CopyForeign(func(p []byte) error { got = append(got, p...); return nil })
	if !bytes.Equal(in[front:c.Offset()], got) {
		t.Errorf("sink got %d bytes, cursor moved by %d", len(got), c.Offset()-int64(front))
	}
	return got, c, err
}

// The payloads are as QEMU makes them.
var foreignPayloads = []struct {
	name    string
	section string
	payload string // without what follows the section's EOS
}{
	{"htab of 2 MiB", "spapr/htab", `00000015`},
	{"no htab", "spapr/htab", `ffffffff`},
	{"htab", "spapr/htab", `00000000 00000000 0001 0002 'sixteen bytes...' 00000003 0000 0001
		00000004 0002 0000 'sixteen bytes...sixteen bytes...' 00000000 0000 0000`},
	{"htab without changes", "spapr/htab", `00000000 00000000 0000 0000`},
	{"no attributes", "s390-storage_attributes", `0000000000000001`},
	{"attributes", "s390-storage_attributes", `0000000000001002 0000000000000004 'attr' 0000000000002002 0000000000000000
		0000000000000008 0000000000000001`},

	{"bitmap start", "dirty-bitmap", `1c 05 'drive' 07 'bitmap0' 00010000 03  01`},
	{"bitmap of nothing", "dirty-bitmap", `01`},
	{"bits", "dirty-bitmap", `4c 05 'drive' 07 'bitmap0' 0000000000000000 00000080 0000000000000004 'bits'
		42 0000000000000080 00000080
		20 01`},
	{"bits without names", "dirty-bitmap", `40 0000000000000000 00000080 0000000000000000  01`},
	{"progress", "block", `0000000000000c04 0000000000000002`},
	{"zero block", "block", `0000000000000009 06 'drive0' 0000000000000002`},
	{"blocks", "block", `0000000000000001 06 'drive0' '` + strings.Repeat("data", blockSize/4) + `'
		0000000000100001 06 'drive0' '` + strings.Repeat("more", blockSize/4) + `'
		0000000000000002`},
}

var foreignVersions = map[string]uint32{"dirty-bitmap": 1, "block": 1, "spapr/htab": 1, "s390-storage_attributes": 0}

func TestCopyForeign(t *testing.T) {
	for _, tt := range foreignPayloads {
		t.Run(tt.name, func(t *testing.T) {
			payload := unhex(t, tt.payload)
			got, c, err := foreign(t, tt.section, foreignVersions[tt.section], append(payload[:len(payload):len(payload)], 0x7e))
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, payload) {
				t.Errorf("got %d bytes, want %d", len(got), len(payload))
			}
			if b, err := c.Next(1); err != nil || b[0] != 0x7e {
				t.Errorf("after the payload %x, %v; want the footer", b, err)
			}
		})
	}
}

func TestCopyForeignTruncated(t *testing.T) {
	for _, tt := range foreignPayloads {
		payload := unhex(t, tt.payload)
		step := max(1, len(payload)/50) // the long ones hold mostly data
		for n := 0; n < len(payload); n += step {
			if _, _, err := foreign(t, tt.section, foreignVersions[tt.section], payload[:n]); !errors.Is(err, ErrTruncated) {
				t.Fatalf("%s cut at %d: %v; want ErrTruncated", tt.name, n, err)
			}
		}
	}
}

func TestCopyForeignErrors(t *testing.T) {
	tests := []struct {
		name    string
		section string
		version uint32
		payload string
		copied  int // bytes that the sink gets before
		want    error
	}{
		{"unknown section", "0000:00:01.0/vfio", 1, `00`, 0, ErrUnknown},
		{"unknown version", "block", 2, `0000000000000002`, 0, ErrUnknown},
		{"extra flags", "dirty-bitmap", 1, `80 01`, 0, ErrUnknown},
		{"no flag", "dirty-bitmap", 1, `00`, 0, ErrUnknown},
		{"two flags", "dirty-bitmap", 1, `30`, 0, ErrUnknown},
		{"unknown later", "dirty-bitmap", 1, `20 80`, 1, ErrUnknown},
		{"bits without end", "dirty-bitmap", 1, `20 40 0000000000000000 00000080 ffffffffffffffff`, 1, ErrDamaged},
		{"attributes version", "s390-storage_attributes", 1, `0000000000000001`, 0, ErrUnknown},
		{"attributes are incomplete", "s390-storage_attributes", 0, `0000000000000008 0000000000000004`, 8, ErrUnknown},
		{"attributes without end", "s390-storage_attributes", 0, `0000000000000002 0000000004000001`, 0, ErrDamaged},
		{"unknown block flag", "block", 1, `0000000000000c04 0000000000000010`, 8, ErrUnknown},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, _, err := foreign(t, tt.section, tt.version, unhex(t, tt.payload))
			if !errors.Is(err, tt.want) || len(got) != tt.copied {
				t.Errorf("%v after %d bytes; want %v after %d", err, len(got), tt.want, tt.copied)
			}
		})
	}
}

func TestCopyForeignSinkError(t *testing.T) {
	full := errors.New("full")
	in := append(AppendStart(AppendHeader(nil), Section{ID: 3, Name: "dirty-bitmap", Version: 1}), 1)
	r := NewReader(NewCursor(bytes.NewReader(in), 0))
	r.Next()
	r.Next()
	if err := r.CopyForeign(func([]byte) error { return full }); err != full {
		t.Errorf("%v; want the sink's error as it is", err)
	}
}

// FuzzCopyForeign checks that every byte that is consumed reaches the sink,
// which foreign does, and that there is no other outcome than the four errors.
func FuzzCopyForeign(f *testing.F) {
	for _, tt := range foreignPayloads {
		if payload := unhex(f, tt.payload); len(payload) < 1000 { // long seeds make fuzzing slow
			f.Add(tt.section, foreignVersions[tt.section], payload)
		}
	}
	f.Fuzz(func(t *testing.T, name string, version uint32, payload []byte) {
		if len(name) > 255 {
			return // has no encoding
		}
		_, _, err := foreign(t, name, version, payload)
		if err != nil && !errors.Is(err, ErrTruncated) && !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrUnknown) {
			t.Errorf("error of no kind: %v", err)
		}
	})
}
