package moved

import (
	"bytes"
	"errors"
	"fmt"
	"reflect"
	"testing"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/source"
	"github.com/flic-migrate/flic-migrate/tier/vfs/crashfs"
)

var (
	lenderA = uuid.MustParse("aaaaaaaa-2222-4333-8444-555555555555")
	lenderB = uuid.MustParse("bbbbbbbb-2222-4333-8444-555555555555")
)

// lentList is one of two images.
func lentList() *Lent {
	l := &Lent{UUID: owner}
	l.Add(7, lenderA, 3)
	l.Add(8, lenderA, 4)
	l.Add(9, lenderB, 5)
	l.Add(11, lenderA, 0)
	return l
}

// TestLentBytes has the bytes of docs/format.md, which every later version reads.
func TestLentBytes(t *testing.T) {
	l := lentList()
	want := "FLICLNT\x00" + "\x01\x00\x00\x00" + "\x02\x00\x00\x00" +
		"\x11\x11\x11\x11\x22\x22\x43\x33\x84\x44\x55\x55\x55\x55\x55\x55" +
		"\x03\x00\x00\x00" + "\x00\x00\x00\x00" +
		"\xaa\xaa\xaa\xaa\x22\x22\x43\x33\x84\x44\x55\x55\x55\x55\x55\x55" +
		"\xbb\xbb\xbb\xbb\x22\x22\x43\x33\x84\x44\x55\x55\x55\x55\x55\x55" +
		"\x07\x00\x00\x00\x02\x00\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00" +
		"\x09\x00\x00\x00\x01\x00\x00\x00\x01\x00\x00\x00\x05\x00\x00\x00" +
		"\x0b\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	b := l.Append(nil)
	if got := string(b[:len(b)-4]); got != want {
		t.Errorf("stored as\n%x\nand should be\n%x", got, want)
	}
	back, err := ParseLent("list", b)
	if err != nil {
		t.Fatal(err)
	}
	if back.file = ""; !reflect.DeepEqual(back, l) {
		t.Errorf("%+v came as %+v", l, back)
	}
	if got := l.Needs(lenderA); fmt.Sprint(got) != "[{0 1} {3 2}]" {
		t.Errorf("needs %v", got)
	}
	if got := l.Slots(); fmt.Sprint(got) != "[{7 3} {11 1}]" {
		t.Errorf("slots %v", got)
	}
	for off := range b {
		bad := bytes.Clone(b)
		bad[off] ^= 1
		if _, err := ParseLent("list", bad); !integrity.IsCorrupt(err) {
			t.Errorf("byte %d: %v", off, err)
		}
		if _, err := ParseLent("list", b[:off]); !integrity.IsCorrupt(err) {
			t.Errorf("cut at %d: %v", off, err)
		}
	}
}

// TestLentForged: what a list can't say is refused, though its checksum is right.
func TestLentForged(t *testing.T) {
	for name, change := range map[string]func(l *Lent){
		"none":          func(l *Lent) { l.Runs[1].Count = 0 },
		"backwards":     func(l *Lent) { l.Runs[1].First = 8 },
		"no such image": func(l *Lent) { l.Runs[0].Image = 2 },
		"too high":      func(l *Lent) { l.Runs[2].Count = 1<<32 - 1 },
		"too high there": func(l *Lent) {
			l.Runs[2].Count, l.Runs[2].There = 1<<20, 1<<32-1
		},
		"its own": func(l *Lent) { l.Images[0] = owner },
		"twice":   func(l *Lent) { l.Images[0] = lenderB },
	} {
		l := lentList()
		change(l)
		if _, err := ParseLent("list", l.Append(nil)); !integrity.IsCorrupt(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	b := lentList().Append(nil)
	b[8] = 2
	le32(b[len(b)-4:], integrity.Checksum(b[:len(b)-4]))
	var u *image.UnsupportedError
	if _, err := ParseLent("list", b); !errors.As(err, &u) || u.Version != 2 {
		t.Errorf("version 2: %v", err)
	}
}

func le32(b []byte, n uint32) {
	for i := range b {
		b[i] = byte(n >> (8 * i))
	}
}

// TestLentFull: what does not fit is not lent.
func TestLentFull(t *testing.T) {
	l := &Lent{UUID: owner}
	n := uint32(0)
	for ; l.Add(2*n, lenderA, 2*n); n++ {
	}
	if b := l.Append(nil); n != maxLentRuns || len(b) > MaxLent {
		t.Errorf("%d runs in %d bytes", n, len(b))
	}
	if !l.Add(2*n-1, lenderA, 2*n-1) {
		t.Error("a run can't grow")
	}
}

// TestBorrow: a slot that is lent is read where it is, and one that the image has itself there.
func TestBorrow(t *testing.T) {
	fsys := crashfs.New(0)
	open := func(name string, id uuid.UUID, pieces ...source.Ranges) *Set {
		var list []Source
		for i, slots := range pieces {
			list = append(list, write(t, fsys, name+string(rune('0'+i)), &Piece{id, 4096, slots}))
		}
		s, err := Open(list, id, 4096, 100)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	own := open("own", owner, source.Ranges{{First: 12, Count: 1}, {First: 20, Count: 2}})
	a := open("a", lenderA, source.Ranges{{First: 0, Count: 1}, {First: 2, Count: 2}}, source.Ranges{{First: 4, Count: 6}})
	b := open("b", lenderB, source.Ranges{{First: 5, Count: 1}})
	l := lentList()
	l.Add(12, lenderA, 1) // which it has itself, and that one does not
	s, err := Borrow(own, l, 4096, []*Set{a, b})
	if err != nil {
		t.Fatal(err)
	}
	page := make([]byte, 4096)
	for slot, at := range map[uint64]struct {
		id    uuid.UUID
		there uint64
		file  string
	}{7: {lenderA, 3, "a0"}, 8: {lenderA, 4, "a1"}, 9: {lenderB, 5, "b0"}, 11: {lenderA, 0, "a0"}, 12: {owner, 12, "own0"}, 21: {owner, 21, "own0"}} {
		content(uint32(at.there), page)
		id, there := s.Owner(slot)
		name, _ := s.Where(slot)
		if id != at.id || there != at.there || name != at.file || !bytes.Equal(s.Page(slot), page) {
			t.Errorf("slot %d is slot %d of %v in %s", slot, there, id, name)
		}
	}
	if got := fmt.Sprint(s.Slots()); got != "[{7 3} {11 2} {20 2}]" {
		t.Errorf("slots %v", got)
	}
	s.Drop(0, 100)
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	// And what nobody has.
	for _, lenders := range [][]*Set{{nil, nil}, {open("a2", lenderA, source.Ranges{{First: 3, Count: 1}}), nil}} {
		s, err := Borrow(nil, l, 4096, lenders)
		if !integrity.IsCorrupt(err) {
			t.Errorf("lent by nobody: %v", err)
		}
		s.Close()
	}
}
