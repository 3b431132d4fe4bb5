package saveimage

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/flic-migrate/flic-migrate/stream"
)

const domain = "<domain type='qemu'>\n  <name>web &amp; 1</name>\n  <uuid>c1ce425f-9cad-4404-91ca-45d819a4805d</uuid>\n</domain>\n"

// file makes a header as libvirt writes it (virQEMUSaveDataWrite).
func file(order binary.ByteOrder, version, running uint32, format Format, xml, cookie string, pad int) []byte {
	b := make([]byte, HeaderLen)
	copy(b, "LibvirtQemudSave")
	data := []byte(xml + "\x00")
	offset := 0
	if cookie != "" {
		offset = len(data)
		data = append(data, cookie+"\x00"...)
	}
	data = append(data, make([]byte, pad)...)
	for i, v := range []uint32{version, uint32(len(data)), running, uint32(format), uint32(offset)} {
		order.PutUint32(b[16+4*i:], v)
	}
	return append(b, data...)
}

// TestRead reads headers of both byte orders, and gives every byte back.
func TestRead(t *testing.T) {
	orders := map[string]binary.ByteOrder{"little": binary.LittleEndian, "big": binary.BigEndian}
	for name, order := range orders {
		for _, version := range []uint32{1, 2} {
			for _, cookie := range []string{"", "<cookie/>\n"} {
				for _, pad := range []int{0, 1, 70000} {
					raw := file(order, version, 1, Lzop, domain, cookie, pad)
					r := bytes.NewReader(append(bytes.Clone(raw), "stream"...))
					h, err := Read(r)
					if err != nil {
						t.Fatalf("%s endian, version %d: %v", name, version, err)
					}
					if h.Version != version || h.Running != 1 || h.Format != Lzop || h.XML() != domain || h.Cookie() != cookie {
						t.Errorf("%s endian: %+v", name, h)
					}
					if !bytes.Equal(h.Bytes(), raw) {
						t.Errorf("%s endian: other bytes", name)
					}
					if rest, _ := io.ReadAll(r); string(rest) != "stream" {
						t.Errorf("%s endian: it leaves %q", name, rest)
					}
					if vm, uuid, err := h.Domain(); vm != "web & 1" || uuid != "c1ce425f-9cad-4404-91ca-45d819a4805d" || err != nil {
						t.Errorf("domain %q, %q, %v", vm, uuid, err)
					}
					h.SetFormat(Raw)
					if want := file(order, version, 1, Raw, domain, cookie, pad); !bytes.Equal(h.Bytes(), want) || h.Format != Raw {
						t.Errorf("%s endian: SetFormat changes something else", name)
					}
				}
			}
		}
	}
}

// TestDamage refuses what can't be, naming the place.
func TestDamage(t *testing.T) {
	good := file(binary.LittleEndian, 2, 0, Raw, domain, "<cookie/>", 5)
	change := func(at int, v uint32) []byte {
		b := bytes.Clone(good)
		binary.LittleEndian.PutUint32(b[at:], v)
		return b
	}
	part := append([]byte("LibvirtQemudPart"), good[16:]...)
	for name, c := range map[string]struct {
		b    []byte
		want error
		text string
	}{
		"nothing":        {nil, stream.ErrNotStream, "no save file"},
		"another file":   {bytes.Repeat([]byte("x"), 200), stream.ErrNotStream, "no save file"},
		"partial":        {part, ErrPartial, "did not finish"},
		"version 0":      {change(atVersion, 0), stream.ErrDamaged, "16"},
		"version 3":      {change(atVersion, 3), stream.ErrDamaged, "version 3"},
		"version 3 big":  {change(atVersion, 3<<24), stream.ErrDamaged, "version 3"},
		"no XML":         {change(atLength, 0), stream.ErrDamaged, "20"},
		"endless XML":    {change(atLength, MaxData+1), stream.ErrDamaged, "20"},
		"cookie outside": {change(atCookie, 1<<20), stream.ErrDamaged, "32"},
		"empty XML":      {file(binary.LittleEndian, 2, 0, Raw, "", "<cookie/>", 5), stream.ErrDamaged, "92"},
		"cut header":     {good[:50], stream.ErrTruncated, "50"},
		"cut XML":        {good[:120], stream.ErrTruncated, "120"},
	} {
		_, err := Read(bytes.NewReader(c.b))
		if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for n := range good {
		if _, err := Read(bytes.NewReader(good[:n])); err == nil {
			t.Fatalf("cut to %d bytes of %d", n, len(good))
		}
	}
	if _, err := Parse(append(bytes.Clone(good), 0)); !errors.Is(err, stream.ErrDamaged) {
		t.Errorf("a byte more: %v", err)
	}
	h, err := Parse(file(binary.LittleEndian, 2, 0, Raw, "<other/>", "", 0))
	if err != nil {
		t.Fatal(err)
	}
	if name, _, err := h.Domain(); err == nil {
		t.Errorf("%q is the name of no domain", name)
	}
}

func TestNew(t *testing.T) {
	for _, running := range []bool{false, true} {
		cookie := ""
		if running {
			cookie = "<cookie/>"
		}
		h, err := New(domain, cookie, running)
		if err != nil {
			t.Fatal(err)
		}
		again, err := Parse(h.Bytes())
		if err != nil || again.XML() != domain || again.Cookie() != cookie || (again.Running == 1) != running || again.Format != Raw || again.Version != 2 {
			t.Errorf("%+v, %v", again, err)
		}
	}
	if _, err := New(strings.Repeat("x", MaxData), "", false); err == nil {
		t.Error("an XML that Read refuses")
	}
}

// TestFormats: the names are those of the programs.
func TestFormats(t *testing.T) {
	for f, want := range map[Format]string{Raw: "raw", Gzip: "gzip", Bzip2: "bzip2", XZ: "xz", Lzop: "lzop", Zstd: "zstd", Sparse: "sparse", 77: "format 77"} {
		if f.String() != want {
			t.Errorf("%d is %s", uint32(f), f)
		}
	}
}

// FuzzRead reads anything. What is accepted is given back byte for byte.
func FuzzRead(f *testing.F) {
	for _, order := range []binary.ByteOrder{binary.LittleEndian, binary.BigEndian} {
		f.Add(append(file(order, 2, 1, Gzip, domain, "<cookie/>", 3), "stream"...))
		f.Add(file(order, 1, 0, Raw, domain, "", 0))
	}
	h, err := New(domain, "<cookie/>", true)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(h.Bytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		h, err := Read(r)
		if err != nil {
			return
		}
		if !bytes.Equal(h.Bytes(), b[:len(b)-r.Len()]) {
			t.Error("other bytes")
		}
		h.Domain()
		if !bytes.Contains(b, []byte(h.XML())) || !bytes.Contains(b, []byte(h.Cookie())) {
			t.Error("made up text")
		}
	})
}
