package moved

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/source"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
	"github.com/flic-migrate/flic-migrate/tier/vfs/crashfs"
)

var owner = uuid.MustParse("11111111-2222-4333-8444-555555555555")

// content is what a slot has in these tests.
func content(slot uint32, dst []byte) error {
	for i := range dst {
		dst[i] = byte(slot) ^ byte(i*3)
	}
	return nil
}

// write makes a piece and opens it.
func write(t *testing.T, fsys vfs.FS, name string, p *Piece) vfs.File {
	t.Helper()
	f, err := fsys.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := Write(t.Context(), f, p, content); err != nil {
		t.Fatal(err)
	}
	if n, err := f.Size(); err != nil || n != p.Bytes() {
		t.Errorf("%s has %d bytes, want %d: %v", name, n, p.Bytes(), err)
	}
	return f
}

// TestSet writes pieces of several page sizes and reads every slot of them.
func TestSet(t *testing.T) {
	for _, size := range []int{256, 4096, 64 << 10} {
		fsys := crashfs.New(0)
		// More ranges than a header of 4 KiB has room for.
		var many source.Ranges
		for n := range uint32(700) {
			many = append(many, source.Range{First: 100 + 3*n, Count: 2})
		}
		pieces := []*Piece{
			{owner, size, source.Ranges{{First: 3, Count: 4}, {First: 9, Count: 1}}},
			{owner, size, many[:min(700, 8<<20/size/2)]},
			{owner, size, source.Ranges{{First: 0, Count: 2}}},
		}
		var sources []Source
		var all source.Ranges
		for i, p := range pieces {
			sources = append(sources, write(t, fsys, string(rune('a'+i)), p))
			all = all.Union(p.Slots)
		}
		s, err := Open(sources, owner, size, 3000)
		if err != nil {
			t.Fatal(err)
		}
		want := make([]byte, size)
		for slot := range uint32(3000) {
			if s.Has(uint64(slot)) != all.Has(uint64(slot), uint64(slot)) {
				t.Fatalf("slot %d of pages of %d: %v", slot, size, s.Has(uint64(slot)))
			}
			if !s.Has(uint64(slot)) {
				continue
			}
			content(slot, want)
			if !bytes.Equal(s.Page(uint64(slot)), want) {
				t.Fatalf("slot %d of pages of %d has another content", slot, size)
			}
			name, off := s.Where(uint64(slot))
			f, err := fsys.Open(name)
			if err != nil {
				t.Fatal(err)
			}
			got := make([]byte, size)
			if _, err := f.ReadAt(got, off); err != nil || !bytes.Equal(got, want) {
				t.Errorf("slot %d is not in %s at %d: %v", slot, name, off, err)
			}
			f.Close()
		}
		s.Drop(0, 3000)
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestBytes has the bytes of docs/format.md, which every later version reads.
func TestBytes(t *testing.T) {
	b := stored(t, &Piece{owner, 256, source.Ranges{{First: 3, Count: 2}, {First: 0x10, Count: 1}}})
	want := "FLICMOV\x00" + "\x01\x00\x00\x00" + "\x00\x01\x00\x00" +
		"\x11\x11\x11\x11\x22\x22\x43\x33\x84\x44\x55\x55\x55\x55\x55\x55" +
		"\x02\x00\x00\x00" + "\x00\x10\x00\x00" + "\x00\x00\x00\x00\x00\x00\x00\x00" +
		"\x03\x00\x00\x00\x02\x00\x00\x00" + "\x10\x00\x00\x00\x01\x00\x00\x00"
	want += strings.Repeat("\x00", 4092-len(want)) + "\xa7\x82\xaf\x96"
	if got := string(b[:4096]); got != want {
		t.Errorf("the header is\n%x\nand should be\n%x", got[:64]+got[4092:], want[:64]+want[4092:])
	}
	page := make([]byte, 256)
	for i, slot := range []uint32{3, 4, 0x10} {
		content(slot, page)
		if !bytes.Equal(b[4096+256*i:][:256], page) {
			t.Errorf("slot %d is not page %d", slot, i)
		}
	}
	if len(b) != 4096+3*256 {
		t.Errorf("%d bytes", len(b))
	}
}

// TestUnneeded: what is punched is all of what nobody needs, and nothing else.
func TestUnneeded(t *testing.T) {
	p := &Piece{owner, 4096, source.Ranges{{First: 3, Count: 4}, {First: 9, Count: 1}, {First: 20, Count: 5}}}
	f := write(t, crashfs.New(0), "a", p)
	need := source.Ranges{{First: 4, Count: 2}, {First: 9, Count: 1}, {First: 24, Count: 100}}
	total := int64(0)
	p.Unneeded(need, func(off, end int64) {
		total += end - off
		if err := f.Punch(off, end-off); err != nil {
			t.Fatal(err)
		}
	})
	if total != 6*4096 {
		t.Errorf("%d bytes are not needed", total)
	}
	s, err := Open([]Source{f}, owner, 4096, 100)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	want := make([]byte, 4096)
	for _, slot := range []uint32{4, 5, 9, 24} {
		content(slot, want)
		if !bytes.Equal(s.Page(uint64(slot)), want) {
			t.Errorf("slot %d is gone", slot)
		}
	}
}

// memory is a piece in memory.
type memory struct{ *bytes.Reader }

func (memory) Name() string           { return "piece" }
func (memory) Close() error           { return nil }
func (m memory) Size() (int64, error) { return m.Reader.Size(), nil }
func (m memory) Map(_, n int64, _ bool) (vfs.Mapping, error) {
	b := make([]byte, n)
	_, err := m.ReadAt(b, 0)
	return mapping(b), err
}

type mapping []byte

func (m mapping) Bytes() []byte         { return m }
func (mapping) Sync(off, n int64) error { return nil }
func (mapping) WillNeed(off, n int64)   {}
func (mapping) DontNeed(off, n int64)   {}
func (mapping) Close() error            { return nil }

// sink collects what is written.
type sink struct{ bytes.Buffer }

func (s *sink) Name() string                      { return "piece" }
func (s *sink) Sync() error                       { return nil }
func (s *sink) StartWriteback(off, n int64)       {}
func (s *sink) ReadAt([]byte, int64) (int, error) { return 0, errors.ErrUnsupported }

func stored(t testing.TB, p *Piece) []byte {
	var s sink
	if err := Write(context.Background(), &s, p, content); err != nil {
		t.Fatal(err)
	}
	return s.Bytes()
}

// TestRefused: what is no piece of this image, or not whole, is refused.
func TestRefused(t *testing.T) {
	slots := source.Ranges{{First: 1, Count: 3}}
	open := func(b []byte, more ...[]byte) error {
		var list []Source
		for _, b := range append([][]byte{b}, more...) {
			list = append(list, memory{bytes.NewReader(b)})
		}
		s, err := Open(list, owner, 4096, 10)
		s.Close()
		return err
	}
	good := stored(t, &Piece{owner, 4096, slots})
	if err := open(good); err != nil {
		t.Fatal(err)
	}
	for i := range headerLen(1) {
		b := bytes.Clone(good)
		b[i] ^= 0x40
		if err := open(b); !integrity.IsCorrupt(err) {
			t.Errorf("byte %d changed: %v", i, err)
		}
	}
	for n := range len(good) {
		if n%1000 == 0 || n == len(good)-1 {
			if err := open(good[:n]); !integrity.IsCorrupt(err) {
				t.Errorf("cut to %d: %v", n, err)
			}
		}
	}
	for name, err := range map[string]error{
		"another image":   open(stored(t, &Piece{uuid.New(), 4096, slots})),
		"page size":       open(stored(t, &Piece{owner, 8192, slots})),
		"too high a slot": open(stored(t, &Piece{owner, 4096, source.Ranges{{First: 8, Count: 3}}})),
		"twice":           open(good, good),
		"not rising":      open(stored(t, &Piece{owner, 4096, source.Ranges{{First: 5, Count: 1}, {First: 5, Count: 1}}})),
		"longer":          open(append(bytes.Clone(good), 0)),
	} {
		if !integrity.IsCorrupt(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	later := bytes.Clone(good)
	later[8] = 2
	reseal(later)
	var unsupported *image.UnsupportedError
	if err := open(later); !errors.As(err, &unsupported) || unsupported.Version != 2 {
		t.Errorf("a later version: %v", err)
	}
}

// reseal puts the header's checksum right, if it is where the header says.
func reseal(b []byte) {
	if len(b) < unit {
		return
	}
	n := int64(uint32(b[36]) | uint32(b[37])<<8 | uint32(b[38])<<16 | uint32(b[39])<<24)
	if n < crcLen || n > int64(len(b)) {
		return
	}
	c := integrity.Checksum(b[:n-crcLen])
	copy(b[n-crcLen:n], []byte{byte(c), byte(c >> 8), byte(c >> 16), byte(c >> 24)})
}

// FuzzRead reads any file, with its checksum put right and as it is.
func FuzzRead(f *testing.F) {
	f.Add(stored(f, &Piece{owner, 4096, source.Ranges{{First: 1, Count: 3}}}))
	f.Add(stored(f, &Piece{owner, 256, source.Ranges{{First: 1, Count: 3}, {First: 9, Count: 1}}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		sealed := bytes.Clone(b)
		reseal(sealed)
		for _, b := range [][]byte{b, sealed} {
			s, err := Open([]Source{memory{bytes.NewReader(b)}}, owner, 4096, 1<<20)
			if err != nil {
				continue
			}
			for _, r := range s.Slots() {
				for n := uint64(r.First); n < r.End(); n++ {
					if page := s.Page(n); len(page) != 4096 {
						t.Fatalf("slot %d has %d bytes", n, len(page))
					}
				}
			}
			s.Close()
		}
	})
}

// TestGuard: a piece that is cut while it is read is damage, with its name.
func TestGuard(t *testing.T) {
	dir := t.TempDir()
	p := &Piece{owner, 4096, source.Ranges{{First: 0, Count: 8}}}
	f := write(t, vfs.OS, dir+"/a", p)
	s, err := Open([]Source{f}, owner, 4096, 8)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	rw, err := vfs.OS.OpenRW(dir + "/a")
	if err != nil {
		t.Fatal(err)
	}
	if err := rw.Truncate(4096); err != nil {
		t.Fatal(err)
	}
	rw.Close()
	err = s.Guard(func() error {
		if s.Page(7)[0] == 1 {
			return io.EOF
		}
		return nil
	})
	var c *integrity.CorruptError
	if !errors.As(err, &c) || c.File != dir+"/a" || c.Offset < 4096+7*4096 {
		t.Errorf("%v", err)
	}
}
