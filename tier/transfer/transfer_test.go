package transfer

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strings"
	"testing"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/source"
)

func example() *Checkpoint {
	id := uuid.UUID{1}
	return &Checkpoint{
		VM: "vm", Number: 3, UUID: id,
		Images: sentList{
			{UUID: id, VM: "vm", Number: 3, Length: 5000, PageSize: 4096, All: true, Slots: source.Ranges{{First: 2, Count: 3}}, Start: 100},
			{UUID: uuid.UUID{2}, VM: "vm", Number: 1, Length: 4096, PageSize: 4096, Segments: source.Ranges{{First: 0, Count: 1}, {First: 7, Count: 2}}},
		},
		Has: idList{{3}},
	}
}

// stream is a whole one.
func stream(t testing.TB) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := NewWriter(&b)
	if err == nil {
		err = errors.Join(w.Group(&GroupHead{Name: "g", Number: 7, UUID: uuid.UUID{4}, Members: memberList{{VM: "vm", Number: 3, UUID: uuid.UUID{1}, Origin: uuid.UUID{2}}}}), w.Begin(example()), w.Image(0), w.Data(100, make([]byte, MaxData+5)), w.Image(1), w.Data(7, []byte("seven")), w.End(), w.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// read is what a stream says, a word for each record, and why it ends.
func read(b []byte) (words []string, err error) {
	r, err := NewReader(bytes.NewReader(b))
	if err != nil {
		return nil, err
	}
	for {
		k, p, err := r.Next()
		if err != nil {
			return words, err
		}
		switch k {
		case Group:
			g, err := r.ParseGroup(p)
			if err != nil {
				return words, err
			}
			words = append(words, fmt.Sprintf("group %s@%d of %d", g.Name, g.Number, len(g.Members)))
		case Begin:
			c, err := r.ParseBegin(p)
			if err != nil {
				return words, err
			}
			words = append(words, fmt.Sprintf("begin %s@%d", c.VM, c.Number))
		case Image:
			n, err := r.ParseImage(p, 2)
			if err != nil {
				return words, err
			}
			words = append(words, fmt.Sprint("image ", n))
		case Data:
			pos, d, err := r.ParseData(p, 0, 1<<20)
			if err != nil {
				return words, err
			}
			words = append(words, fmt.Sprintf("data %d+%d", pos, len(d)))
		case End:
			words = append(words, "end")
		}
	}
}

func TestStream(t *testing.T) {
	b := stream(t)
	words, err := read(b)
	want := []string{"group g@7 of 1", "begin vm@3", "image 0", "data 100+262144", "data 262244+5", "image 1", "data 7+5", "end"}
	if err != io.EOF || !reflect.DeepEqual(words, want) {
		t.Errorf("%q, %v", words, err)
	}
	// Cut anywhere it is known to be.
	for n := range b {
		if n > 1000 && n < len(b)-200 && n%997 != 0 {
			continue
		}
		words, err := read(b[:n])
		var at *Error
		if !errors.As(err, &at) || at.Offset > int64(n) || !errors.Is(err, ErrTruncated) && !errors.Is(err, ErrNotStream) || len(words) > len(want) {
			t.Fatalf("cut at %d: %q, %v", n, words, err)
		}
	}
	// Each bit counts.
	for n := 0; n < len(b); n++ {
		if n > 1000 && n < len(b)-200 && n%991 != 0 {
			continue
		}
		bad := bytes.Clone(b)
		bad[n] ^= 0x10
		if words, err := read(bad); err == io.EOF {
			t.Fatalf("byte %d: %q, %v", n, words, err)
		}
	}
}

// What can't be is refused, by who sends and by who receives.
func TestChecks(t *testing.T) {
	for name, spoil := range map[string]func(c *Checkpoint){
		"length":     func(c *Checkpoint) { c.Images[0].Length = 1 << 60 },
		"no length":  func(c *Checkpoint) { c.Images[0].Length = -1 },
		"page size":  func(c *Checkpoint) { c.Images[0].PageSize = 4097 },
		"overlap":    func(c *Checkpoint) { c.Images[1].Segments = source.Ranges{{First: 0, Count: 5}, {First: 3, Count: 1}} },
		"touching":   func(c *Checkpoint) { c.Images[0].Slots = source.Ranges{{First: 0, Count: 5}, {First: 5, Count: 1}} },
		"no count":   func(c *Checkpoint) { c.Images[0].Slots = source.Ranges{{First: 4}} },
		"too far":    func(c *Checkpoint) { c.Images[0].Slots = source.Ranges{{First: 1 << 31, Count: 1<<31 + 1}} },
		"start":      func(c *Checkpoint) { c.Images[0].Start = c.Images[0].End() + 1 },
		"twice":      func(c *Checkpoint) { c.Images[1].UUID = c.Images[0].UUID },
		"another":    func(c *Checkpoint) { c.UUID = uuid.UUID{9} },
		"had part":   func(c *Checkpoint) { c.Images[1].Had = source.Ranges{{First: 0, Count: 1}} },
		"had twice":  func(c *Checkpoint) { c.Images[0].Had = source.Ranges{{First: 0, Count: 2}, {First: 1, Count: 1}} },
		"not all":    func(c *Checkpoint) { c.Images[0].All = false },
		"no uuid":    func(c *Checkpoint) { c.Images[1].UUID = uuid.Nil },
		"too little": func(c *Checkpoint) { c.Images[1].Length = 100 },
	} {
		c := example()
		spoil(c)
		w, err := NewWriter(io.Discard)
		if err != nil {
			t.Fatal(err)
		}
		if err := w.Begin(c); err == nil {
			t.Errorf("%s: sent", name)
		}
	}
	r, err := NewReader(bytes.NewReader(stream(t)))
	if err != nil {
		t.Fatal(err)
	}
	for _, body := range []string{"", "{", "[]", `{"images":[` + strings.Repeat("{},", 1<<20) + `{}]}`, `{"has":[` + strings.Repeat(`"",`, 2000) + `""]}`, `{"images":[{}]}`} {
		if c, err := r.ParseBegin([]byte(body)); !errors.Is(err, ErrDamaged) {
			t.Errorf("%.40q: %v, %v", body, c, err)
		}
	}
	member := `{"uuid":"00000000-0000-0000-0000-000000000001"}`
	for _, members := range []string{"", member + "," + member, "{}", strings.Repeat("{},", 1<<20) + "{}"} {
		body := `{"uuid":"00000000-0000-0000-0000-000000000002","members":[` + members + `]}`
		if g, err := r.ParseGroup([]byte(body)); !errors.Is(err, ErrDamaged) {
			t.Errorf("group %.40q: %v, %v", body, g, err)
		}
	}
	if w, err := NewWriter(io.Discard); err != nil || w.Group(&GroupHead{UUID: uuid.UUID{1}}) == nil {
		t.Errorf("a group of none is sent: %v", err)
	}
	for _, b := range [][]byte{nil, {0, 0, 0}, {2, 0, 0, 0}, {255, 255, 255, 255}} {
		if _, err := r.ParseImage(b, 2); !errors.Is(err, ErrDamaged) {
			t.Errorf("image %x: %v", b, err)
		}
	}
	for _, b := range []string{"", "\x00\x00\x00\x00\x00\x00\x00\x00", "\x09\x00\x00\x00\x00\x00\x00\x00a", "\x13\x00\x00\x00\x00\x00\x00\x00ab", "\xff\xff\xff\xff\xff\xff\xff\xffa", "\x15\x00\x00\x00\x00\x00\x00\x00a"} {
		if _, _, err := r.ParseData([]byte(b), 10, 20); !errors.Is(err, ErrDamaged) {
			t.Errorf("data %q: %v", b, err)
		}
	}
}

// The key is of all that decides which bytes come, and of nothing else.
func TestKey(t *testing.T) {
	base := example().Images[0]
	same := base
	same.Start = 4000
	if same.Key() != base.Key() {
		t.Error("the key is another where it goes on")
	}
	for name, change := range map[string]func(s *Sent){
		"uuid":   func(s *Sent) { s.UUID = uuid.UUID{8} },
		"length": func(s *Sent) { s.Length++ },
		"all":    func(s *Sent) { s.All = false },
		"had":    func(s *Sent) { s.Had = source.Ranges{{First: 0, Count: 1}} },
		"slots":  func(s *Sent) { s.Slots = source.Ranges{{First: 2, Count: 4}} },
	} {
		s := base
		change(&s)
		if s.Key() == base.Key() {
			t.Errorf("%s is not in the key", name)
		}
	}
	if base.Base() != 8192 || base.End() != 8192+3*4096 {
		t.Errorf("%d, %d", base.Base(), base.End())
	}
}

func TestHave(t *testing.T) {
	for _, text := range []string{
		"", "flic-migrate have 2\nend\n", "flic-migrate have 1\n", "flic-migrate have 1\nwhole\nend\n",
		"flic-migrate have 1\nwhole x\nend\n", "flic-migrate have 1\nfoo 00000000-0000-0000-0000-000000000001\nend\n",
		"flic-migrate have 1\npart 00000000-0000-0000-0000-000000000001 5-3 -\nend\n",
		"flic-migrate have 1\npart 00000000-0000-0000-0000-000000000001 0-5,3 -\nend\n",
		"flic-migrate have 1\npart 00000000-0000-0000-0000-000000000001 0-4294967295 -\nend\n",
		"flic-migrate have 1\npart 00000000-0000-0000-0000-000000000001 1\nend\n",
		"flic-migrate have 1\nstaged 00000000-0000-0000-0000-000000000001 -1\nend\n",
		"flic-migrate have 1\nstaged 00000000-0000-0000-0000-000000000001 99999999999999999999\nend\n",
		"flic-migrate have 1\n" + strings.Repeat("x", maxLine+1) + "\nend\n",
	} {
		if h, err := ReadHave(bufio.NewReader(strings.NewReader(text))); err == nil {
			t.Errorf("%.80q: %+v", text, h)
		}
	}
}

// TestHaveLarge: lines that are each as long as they may be are too much together.
func TestHaveLarge(t *testing.T) {
	line := "whole 00000000-0000-0000-0000-000000000001" + strings.Repeat(" ", maxLine-100) + "\n"
	text := func(n int) io.Reader {
		all := []io.Reader{strings.NewReader("flic-migrate have 1\n")}
		for range n {
			all = append(all, strings.NewReader(line))
		}
		return io.MultiReader(append(all, strings.NewReader("end\n"))...)
	}
	if _, err := ReadHave(bufio.NewReader(text(maxText/maxLine - 1))); err != nil {
		t.Error(err)
	}
	if _, err := ReadHave(bufio.NewReader(text(maxText/maxLine + 1))); err == nil || !strings.Contains(err.Error(), "line 66: more than") {
		t.Errorf("all of them: %v", err)
	}
}

// TestHaveScattered: what a reader would refuse is not written.
func TestHaveScattered(t *testing.T) {
	scattered, one := uuid.New(), uuid.New()
	h := NewHave()
	var all source.Ranges
	for i := range uint32(1 << 20) {
		all = append(all, source.Range{First: 2 * i, Count: 1})
	}
	h.Parts[scattered] = Part{Segments: all}
	h.Parts[one] = Part{Slots: all[:100]}
	for range 40 { // together more than there is room for
		h.Parts[uuid.New()] = Part{Segments: all[:500000]}
	}
	var b bytes.Buffer
	if err := h.Write(&b); err != nil {
		t.Fatal(err)
	}
	back, err := ReadHave(bufio.NewReader(&b))
	if err != nil {
		t.Fatal(err)
	}
	if _, has := back.Parts[scattered]; has || !reflect.DeepEqual(back.Parts[one], h.Parts[one]) || len(back.Parts) < 30 {
		t.Errorf("%d of %d parts came back, the scattered one: %v", len(back.Parts), len(h.Parts), has)
	}
}

// FuzzReader: whatever comes ends in an error or in io.EOF, and never in much memory.
func FuzzReader(f *testing.F) {
	f.Add(stream(f))
	f.Add([]byte(magic))
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, err := read(b); err == nil {
			t.Error("it has no end")
		}
	})
}

// FuzzHave: what is read is written as it was understood.
func FuzzHave(f *testing.F) {
	f.Add("flic-migrate have 1\nwhole 00000000-0000-0000-0000-000000000001\nfirst 00000000-0000-0000-0000-000000000004\npart 00000000-0000-0000-0000-000000000002 0-5,7 -\nstaged 00000000-0000-0000-0000-000000000003 77\nend\n")
	f.Fuzz(func(t *testing.T, text string) {
		h, err := ReadHave(bufio.NewReader(strings.NewReader(text)))
		if err != nil {
			return
		}
		var b bytes.Buffer
		if err := h.Write(&b); err != nil {
			t.Fatal(err)
		}
		back, err := ReadHave(bufio.NewReader(&b))
		if err != nil || !reflect.DeepEqual(h, back) {
			t.Errorf("%+v came back as %+v, %v", h, back, err)
		}
	})
}
