package replay

import (
	"bytes"
	"errors"
	"os"
	"testing"

	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/stream"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
)

// What a destination has does not depend on how the pages were sent, and
// nothing of it is left on disk.
func TestMemoryEqual(t *testing.T) {
	for name, o := range tiertest.Shapes {
		if o.Unknown != tiertest.Nothing {
			continue // has no Expected; see TestMemoryOpaque
		}
		dir := t.TempDir()
		s := tiertest.New(o)
		m, err := loadMemory(s.Reader(), dir, 0)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if err := m.compare(s.Expected()); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if again := !bytes.Equal(s.Bytes(), s.ExpectedBytes()); again != (m.resent > 0) {
			t.Errorf("%s: %d records repeat a page, and the streams' being different is %v", name, m.resent, again)
		}
		m.close()
		if left, _ := os.ReadDir(dir); len(left) > 0 {
			t.Errorf("%s: %s is left", name, left[0].Name())
		}
	}
}

func TestMemoryOpaque(t *testing.T) {
	s := tiertest.New(tiertest.Shapes["unknown"])
	m, err := loadMemory(s.Reader(), t.TempDir(), 0)
	if err != nil {
		t.Fatal(err)
	}
	defer m.close()
	if err := m.compare(s.Reader()); err != nil {
		t.Error(err)
	}
	b := s.Bytes()
	b[len(b)-1] ^= 1
	if err := m.compare(bytes.NewReader(b)); !errors.Is(err, errDiffers) {
		t.Errorf("with the last byte changed: %v", err)
	}
}

// small makes streams of a few records by hand.
type small struct {
	records func(b []byte) []byte
	machine string
	blocks  []ramparse.Block
	tail    byte
}

func (s small) bytes() []byte {
	if s.machine == "" {
		s.machine = "pc"
	}
	if s.blocks == nil {
		s.blocks = []ramparse.Block{{Name: "m", Used: 4 << 12}}
	}
	b := stream.AppendConfiguration(stream.AppendHeader(nil), s.machine)
	b = stream.AppendStart(b, stream.Section{ID: 2, Name: ramparse.SectionName, Version: ramparse.SectionVersion})
	setup := ramparse.Setup{Blocks: s.blocks}
	for _, blk := range s.blocks {
		setup.Total += blk.Used
	}
	b = ramparse.AppendEOS(ramparse.AppendSetup(b, &setup))
	b = stream.AppendFooter(b, 2)
	b = stream.AppendEnd(b, 2)
	b = ramparse.AppendEOS(s.records(b))
	b = stream.AppendFooter(b, 2)
	b = append(stream.AppendFull(b, stream.Section{ID: 3, Name: "timer", Version: 2}), 1, 2, 3, s.tail)
	return stream.AppendEOF(stream.AppendFooter(b, 3))
}

// Each way in which a restore could be wrong is found.
func TestMemoryDifferences(t *testing.T) {
	page := bytes.Repeat([]byte("abcd"), 1024)
	other := bytes.Clone(page)
	other[4095] ^= 0x80
	right := func(b []byte) []byte {
		b = ramparse.AppendPage(b, "m", 0, other)
		b = ramparse.AppendZero(b, "", 0x1000, 0)
		b = ramparse.AppendZero(b, "", 0x2000, 0x55)
		b = ramparse.AppendPage(b, "", 0, page)
		return ramparse.AppendZero(b, "", 0x1000, 0)
	}
	m, err := loadMemory(bytes.NewReader(small{records: right}.bytes()), t.TempDir(), 4096)
	if err != nil {
		t.Fatal(err)
	}
	defer m.close()
	if m.pages != 3 || m.resent != 2 {
		t.Fatalf("%d pages, %d records that repeat one; want 3 and 2", m.pages, m.resent)
	}
	restored := func(p0, p1, p2 func(b []byte) []byte) func([]byte) []byte {
		return func(b []byte) []byte { return p2(p1(p0(b))) }
	}
	p0 := func(b []byte) []byte { return ramparse.AppendPage(b, "m", 0, page) }
	p1 := func(b []byte) []byte { return ramparse.AppendZero(b, "m", 0x1000, 0) }
	p2 := func(b []byte) []byte { return ramparse.AppendZero(b, "", 0x2000, 0x55) }
	nothing := func(b []byte) []byte { return b }
	for _, c := range []struct {
		name string
		s    small
		same bool
	}{
		{"right", small{records: restored(p0, p1, p2)}, true},
		{"another order", small{records: restored(p1, p0, p2)}, true},
		{"an old version", small{records: restored(func(b []byte) []byte { return ramparse.AppendPage(b, "m", 0, other) }, p1, p2)}, false},
		{"another fill byte", small{records: restored(p0, p1, func(b []byte) []byte { return ramparse.AppendZero(b, "", 0x2000, 0x54) })}, false},
		{"fill for zero", small{records: restored(p0, func(b []byte) []byte { return ramparse.AppendZero(b, "", 0x1000, 1) }, p2)}, false},
		{"a page too few", small{records: restored(p0, nothing, p2)}, false},
		{"a zero page too many", small{records: restored(p0, p1, func(b []byte) []byte { return ramparse.AppendZero(p2(b), "", 0x3000, 0) })}, false},
		{"a page twice", small{records: restored(p0, func(b []byte) []byte { return p0(p1(b)) }, p2)}, false},
		{"a difference", small{records: restored(p0, func(b []byte) []byte { return ramparse.AppendXBZRLE(b, "m", 0x1000, []byte{0, 1, 0}) }, p2)}, false},
		{"another machine", small{records: restored(p0, p1, p2), machine: "q35"}, false},
		{"another device tail", small{records: restored(p0, p1, p2), tail: 9}, false},
		{"another block size", small{records: restored(p0, p1, p2), blocks: []ramparse.Block{{Name: "m", Used: 5 << 12}}}, false},
		{"another block more", small{records: restored(p0, p1, p2), blocks: []ramparse.Block{{Name: "m", Used: 4 << 12}, {Name: "n", Used: 1 << 12}}}, false},
	} {
		err := m.compare(bytes.NewReader(c.s.bytes()))
		if c.same && err != nil || !c.same && !errors.Is(err, errDiffers) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	if err := m.compare(bytes.NewReader(small{records: restored(p0, p1, p2)}.bytes()[:200])); !errors.Is(err, stream.ErrTruncated) {
		t.Errorf("cut: %v", err)
	}
}

func TestComparer(t *testing.T) {
	for _, c := range []struct{ want, got, err string }{
		{"abcdef", "abcdef", ""},
		{"", "", ""},
		{"abcdef", "abcdeX", "the restored stream differs at byte 5"},
		{"abcdef", "Xbcdef", "the restored stream differs at byte 0"},
		{"abcdef", "abcde", "the restored stream differs: it ends at byte 5"},
		{"abcde", "abcdef", "the restored stream differs: it goes on after byte 5"},
		{"abcde", "abXdef", "the restored stream differs at byte 2"},
	} {
		for cut := 0; cut <= len(c.got); cut++ {
			cmp := &comparer{r: bytes.NewReader([]byte(c.want))}
			for _, part := range []string{c.got[:cut], c.got[cut:]} {
				if n, err := cmp.Write([]byte(part)); n != len(part) || err != nil {
					t.Fatalf("%q: %d, %v", part, n, err)
				}
			}
			got := ""
			if err := cmp.end(); err != nil {
				got = err.Error()
			}
			if got != c.err {
				t.Errorf("%q for %q, cut at %d: %q, want %q", c.got, c.want, cut, got, c.err)
			}
		}
	}
}
