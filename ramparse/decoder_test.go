package ramparse

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"

	"github.com/flic-migrate/flic-migrate/stream"
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

// exact returns a cursor that takes nothing it does not need.
func exact(in []byte) *stream.Cursor {
	c := stream.NewCursor(bytes.NewReader(in), 0)
	c.SetReadAhead(0)
	return c
}

// decode decodes records until the input ends or an error. Data and Raw are
// copied.
func decode(d *Decoder, c *stream.Cursor) (all []Record, err error) {
	for {
		if _, err := c.Peek(1); err != nil {
			return all, nil
		}
		var rec Record
		if err := d.Next(c, &rec); err != nil {
			return all, err
		}
		rec.Data, rec.Raw = bytes.Clone(rec.Data), bytes.Clone(rec.Raw)
		all = append(all, rec)
	}
}

const (
	pageX     = "0123456789abcdef"
	twoBlocks = `0000000000007004  06 'pc.ram' 0000000000004000  02 'm0' 0000000000003000`
	eos       = `0000000000000010`
)

var twoBlocksSetup = &Setup{Total: 0x7000, Blocks: []Block{{Name: "pc.ram", Used: 0x4000}, {Name: "m0", Used: 0x3000}}}

func TestDecode(t *testing.T) {
	page := strings.Repeat(pageX, 256)
	in := unhex(t, twoBlocks+eos+`
		0000000000000008 06 'pc.ram' '`+page+`'
		0000000000001022 00
		0000000000002062 ff`+ // no such combination: replaced below
		`0000000000001002 02 'm0' 00
		0000000000002028 '`+page+`'
		0000000000000200
		0000000000000080
		0000000000002060 01 0003 '`+"\x00\x01"+`x'
		0000000000000100 06 'pc.ram' 00000004 'zlib'
		0000000000001120 00000000
		0000000000003040 06 'pc.ram' 01 0000
		0000000000000010`)
	in = bytes.Replace(in, []byte("\x00\x00\x20\x62\xff"), []byte("\x00\x00\x20\x22\xff"), 1)
	d := NewDecoder(Options{PageSize: 4096})
	got, err := decode(d, exact(in))
	if err != nil {
		t.Fatal(err)
	}
	want := []Record{
		{Kind: MemSize},
		{Kind: EOS},
		{Kind: Page, Named: true, Block: 0, Data: []byte(page)},
		{Kind: Zero, Block: 0, Addr: 0x1000, Page: 1},
		{Kind: Zero, Block: 0, Addr: 0x2000, Page: 2, Fill: 0xff},
		{Kind: Zero, Named: true, Block: 1, Addr: 0x1000, Page: 1},
		{Kind: Page, Block: 1, Addr: 0x2000, Page: 2, Data: []byte(page)},
		{Kind: Flush},
		{Kind: Hook},
		{Kind: XBZRLE, Block: 1, Addr: 0x2000, Page: 2, Data: []byte("\x00\x01x")},
		{Kind: Compressed, Named: true, Block: 0, Data: []byte("zlib")},
		{Kind: Compressed, Block: 0, Addr: 0x1000, Page: 1, Data: []byte{}},
		{Kind: XBZRLE, Named: true, Block: 0, Addr: 0x3000, Page: 3, Data: []byte{}},
		{Kind: EOS},
	}
	if !reflect.DeepEqual(d.Setup(), twoBlocksSetup) {
		t.Errorf("setup %+v; want %+v", d.Setup(), twoBlocksSetup)
	}
	at := 0
	for i := range want {
		if i >= len(got) {
			t.Fatalf("%d records; want %d", len(got), len(want))
		}
		g := got[i]
		if g.Offset != int64(at) || !bytes.HasPrefix(in[at:], g.Raw) {
			t.Errorf("record %d: %d raw bytes at %d do not stand there", i, len(g.Raw), g.Offset)
		}
		at += len(g.Raw)
		if out := appendRecord(nil, d.Setup(), &g); !bytes.Equal(out, g.Raw) {
			t.Errorf("record %d is encoded as %x; want %x", i, out, g.Raw)
		}
		g.Raw, g.Offset = nil, 0
		if !reflect.DeepEqual(g, want[i]) {
			t.Errorf("record %d: %+v; want %+v", i, g, want[i])
		}
	}
	if len(got) != len(want) || at != len(in) {
		t.Errorf("%d records of %d bytes; want %d of %d", len(got), at, len(want), len(in))
	}
}

// TestCarry checks that CONTINUE means the block of the last page record,
// whatever stood between.
func TestCarry(t *testing.T) {
	d := NewDecoder(Options{PageSize: 4096})
	for _, section := range []string{
		twoBlocks + eos,
		`0000000000000002 02 'm0' 00` + eos,
		eos,
		`0000000000001022 00` + eos,
	} {
		got, err := decode(d, exact(unhex(t, section)))
		if err != nil {
			t.Fatal(err)
		}
		for _, rec := range got {
			if rec.Kind == Zero && rec.Block != 1 {
				t.Errorf("page at %#x in block %d; want 1", rec.Addr, rec.Block)
			}
		}
	}
}

func TestSetup(t *testing.T) {
	const pre = `0000000000007004  06 'pc.ram' 0000000000004000 `
	const huge = ` 0000000000200000 `
	b0, b1 := Block{Name: "pc.ram", Used: 0x4000}, Block{Name: "m0", Used: 0x3000}
	with := func(b Block, pageSize uint64, gpa ...uint64) Block {
		b.PageSize = pageSize
		if len(gpa) > 0 {
			b.GPA = &gpa[0]
		}
		return b
	}
	tests := []struct {
		name         string
		in           string // without the record that follows
		ignoreShared bool
		want         []Block
	}{
		{"plain", pre + `02 'm0' 0000000000003000`, false, []Block{b0, b1}},
		{"first has a page size", pre + huge + `02 'm0' 0000000000003000`, false, []Block{with(b0, 2<<20), b1}},
		{"last has a page size", pre + `02 'm0' 0000000000003000` + huge, false, []Block{b0, with(b1, 2<<20)}},
		{"both", pre + huge + `02 'm0' 0000000000003000` + huge, false, []Block{with(b0, 2<<20), with(b1, 2<<20)}},
		{"addresses", pre + `0000000100000000 02 'm0' 0000000000003000 0000000000000000`, true,
			[]Block{with(b0, 0, 1<<32), with(b1, 0, 0)}},
		{"addresses and page sizes", pre + huge + `0000000100000000 02 'm0' 0000000000003000` + huge + `00000000fffc0000`, true,
			[]Block{with(b0, 2<<20, 1<<32), with(b1, 2<<20, 0xfffc0000)}},
		{"address like a page size", pre + `0000000000200000 02 'm0' 0000000000003000` + `0000000000100000`, true,
			[]Block{with(b0, 0, 2<<20), with(b1, 0, 1<<20)}},
		{"an empty block", `0000000000007004 06 'pc.ram' 0000000000004000 01 'e' 0000000000000000 02 'm0' 0000000000003000`, false,
			[]Block{b0, {Name: "e"}, b1}},
	}
	for _, tt := range tests {
		for _, next := range []string{eos, `0000000000000200`, `0000000000000002 02 'm0' 00`} {
			in := unhex(t, tt.in)
			d := NewDecoder(Options{PageSize: 4096, IgnoreShared: tt.ignoreShared})
			got, err := decode(d, exact(append(in[:len(in):len(in)], unhex(t, next)...)))
			if err != nil || len(got) != 2 {
				t.Errorf("%s: %d records, %v; want 2", tt.name, len(got), err)
				continue
			}
			if !reflect.DeepEqual(d.Setup().Blocks, tt.want) || d.Setup().Total != 0x7000 {
				t.Errorf("%s: %+v; want %+v", tt.name, d.Setup(), tt.want)
			}
			if out := AppendSetup(nil, d.Setup()); !bytes.Equal(out, in) || !bytes.Equal(got[0].Raw, in) {
				t.Errorf("%s: encoded as %x, raw %x; want %x", tt.name, out, got[0].Raw, in)
			}
		}
	}
	d := NewDecoder(Options{})
	if _, err := decode(d, exact(unhex(t, `0000000000000004`))); err != nil || d.Setup() == nil || len(d.Setup().Blocks) != 0 {
		t.Errorf("no RAM: %+v, %v", d.Setup(), err)
	}
}

// TestErrors also checks that nothing of the failing record is consumed, that
// its offset is in the error, and that the decoder's state is as before.
func TestErrors(t *testing.T) {
	setup := twoBlocks + eos
	named := `0000000000000002 06 'pc.ram' 00`
	tests := []struct {
		name  string
		front string // decodes well
		in    string
		want  error
	}{
		{"no flag", setup, `0000000000001000`, stream.ErrUnknown},
		{"obsolete flag", setup, `0000000000000001`, stream.ErrUnknown},
		{"two kinds", setup, `000000000000000a`, stream.ErrUnknown},
		{"flag beyond those known", setup + named, `0000000000000422 00`, stream.ErrUnknown},
		{"flag at the page size", setup + named, `0000000000000822 00`, stream.ErrUnknown},
		{"end with address", setup, `0000000000001010`, stream.ErrUnknown},
		{"flush with address", setup, `0000000000001200`, stream.ErrUnknown},
		{"hook and continue", setup, `00000000000000a0`, stream.ErrUnknown},
		{"xbzrle encoding", setup + named, `0000000000000060 02 0000`, stream.ErrUnknown},
		{"page before blocks", ``, `0000000000000002 06 'pc.ram' 00`, stream.ErrDamaged},
		{"continue before a name", setup, `0000000000000022 00`, stream.ErrDamaged},
		{"unknown block", setup, `0000000000000002 06 'pc.rom' 00`, stream.ErrDamaged},
		{"empty name", setup, `0000000000000002 00 00`, stream.ErrDamaged},
		{"outside its block", setup + named, `0000000000004022 00`, stream.ErrDamaged},
		{"outside by far", setup + named, `fffffffffffff022 00`, stream.ErrDamaged},
		{"outside the other block", setup + named, `0000000000003002 02 'm0' 00`, stream.ErrDamaged},
		{"xbzrle too long", setup + named, `0000000000000060 01 1001`, stream.ErrDamaged},
		{"compressed too long", setup + named, `0000000000000120 0000100f`, stream.ErrDamaged},
		{"compressed without end", setup + named, `0000000000000120 ffffffff`, stream.ErrDamaged},
		{"second list", setup, twoBlocks, stream.ErrDamaged},
		{"more than the total", ``, `0000000000001004 01 'a' 0000000000001001`, stream.ErrDamaged},
		{"more than the total later", ``, `0000000000003004 01 'a' 0000000000002000 01 'b' ffffffffffffffff`, stream.ErrDamaged},
		{"too much RAM", ``, `0000400000000404`, stream.ErrDamaged},
		{"two of a name", ``, `0000000000003004 01 'a' 0000000000001000 01 'a' 0000000000001000`, stream.ErrDamaged},
		{"no name", ``, `0000000000001004 00 0000000000001000`, stream.ErrDamaged},
		{"odd page size", ``, `0000000000003004 01 'a' 0000000000002000 0000000000003000 01 'b' 0000000000001000`, stream.ErrDamaged},
		{"zero page size", ``, `0000000000003004 01 'a' 0000000000002000 0000000000000000 01 'b' 0000000000001000`, stream.ErrDamaged},
		{"tiny page size", ``, `0000000000003004 01 'a' 0000000000002000 0000000000000100 01 'b' 0000000000001000`, stream.ErrDamaged},
		{"huge page size", ``, `0000000000001004 01 'a' 0000000000001000 8000000000000000`, stream.ErrDamaged},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			front := unhex(t, tt.front)
			c := exact(append(front, unhex(t, tt.in)...))
			d := NewDecoder(Options{PageSize: 4096})
			_, err := decode(d, c)
			var e *stream.Error
			if !errors.Is(err, tt.want) || !errors.As(err, &e) || e.Offset != int64(len(front)) {
				t.Errorf("%v; want %v at offset %d", err, tt.want, len(front))
			}
			if c.Offset() != int64(len(front)) {
				t.Errorf("cursor at %d; want %d", c.Offset(), len(front))
			}
			var rec Record
			if again := d.Next(c, &rec); again == nil || again.Error() != err.Error() {
				t.Errorf("second call: %v; first: %v", again, err)
			}
		})
	}
}

// TestTooManyBlocks checks both caps on the list of blocks.
func TestTooManyBlocks(t *testing.T) {
	s := &Setup{}
	for i := range MaxBlocks + 1 {
		s.Blocks = append(s.Blocks, Block{Name: fmt.Sprint(i), Used: 4096})
		s.Total += 4096
	}
	if _, err := decode(NewDecoder(Options{}), exact(AppendEOS(AppendSetup(nil, s)))); !errors.Is(err, stream.ErrDamaged) {
		t.Errorf("%d blocks: %v; want ErrDamaged", len(s.Blocks), err)
	}
	s.Blocks, s.Total = s.Blocks[:MaxBlocks], s.Total-4096
	if _, err := decode(NewDecoder(Options{}), exact(AppendEOS(AppendSetup(nil, s)))); err != nil {
		t.Errorf("%d blocks: %v", len(s.Blocks), err)
	}
	for i := range s.Blocks {
		s.Blocks[i].Name = fmt.Sprintf("%0250d", i)
	}
	if _, err := decode(NewDecoder(Options{}), exact(AppendEOS(AppendSetup(nil, s)))); !errors.Is(err, stream.ErrDamaged) {
		t.Errorf("a list longer than MaxPeek: %v; want ErrDamaged", err)
	}
}

// TestImpossiblePageSize: pages of no size that a target can have are not understood.
func TestImpossiblePageSize(t *testing.T) {
	in := unhex(t, twoBlocks+`0000000000000002 06 'pc.ram' 00`)
	for _, n := range []int{-4096, 512, 3000, 128 << 10} {
		if _, err := decode(NewDecoder(Options{PageSize: n}), exact(in)); !errors.Is(err, stream.ErrUnknown) {
			t.Errorf("pages of %d bytes: %v; want ErrUnknown", n, err)
		}
	}
}

// sample makes the payload of one RAM section that has every kind of record.
func sample(pageSize int) []byte {
	size := uint64(pageSize)
	s := &Setup{Total: 96 * size, Blocks: []Block{{Name: "pc.ram", Used: 64 * size}, {Name: "vga.vram", Used: 32 * size}}}
	page := bytes.Repeat([]byte("page"), pageSize/4)
	in := AppendSetup(nil, s)
	in = AppendZero(in, "pc.ram", 0, 0)
	for i := uint64(1); i < 4; i++ {
		in = AppendPage(in, "", i*size, page)
		in = AppendZero(in, "", (i+8)*size, 0)
	}
	in = AppendFlush(AppendHook(in))
	in = AppendCompressed(in, "vga.vram", size, deflate(page))
	in = AppendPage(in, "", 2*size, page)
	in = AppendXBZRLE(in, "pc.ram", 2*size, []byte{4, 2, 'x', 'y'})
	return AppendEOS(in)
}

// TestTruncated cuts a section everywhere, with the page size known and not.
func TestTruncated(t *testing.T) {
	in := append(sample(1024), 0x7e)
	for _, o := range []Options{{PageSize: 1024}, {}} {
		for n := range in {
			c := exact(in[:n])
			d := NewDecoder(o)
			var rec Record
			var err error
			for err == nil && rec.Kind != EOS {
				err = d.Next(c, &rec)
			}
			var e *stream.Error
			if n < len(in)-1 && (!errors.Is(err, stream.ErrTruncated) || !errors.As(err, &e) || e.Offset > int64(n)) {
				t.Fatalf("%+v: cut at %d: %v; want ErrTruncated", o, n, err)
			} else if n == len(in)-1 && err != nil {
				t.Fatalf("%+v: whole: %v", o, err)
			}
		}
	}
}

// TestReadError checks that an error of the input is not taken for its end.
func TestReadError(t *testing.T) {
	broken := errors.New("broken")
	in := sample(4096)
	for n := range 200 {
		c := stream.NewCursor(&failing{in[:n], broken}, 0)
		if _, err := decode(NewDecoder(Options{}), c); err != nil && !errors.Is(err, broken) {
			t.Fatalf("after %d bytes: %v; want the reader's error", n, err)
		}
	}
}

// failing returns its bytes and then its error.
type failing struct {
	b   []byte
	err error
}

func (f *failing) Read(p []byte) (int, error) {
	if len(f.b) == 0 {
		return 0, f.err
	}
	n := copy(p, f.b)
	f.b = f.b[n:]
	return n, nil
}

// TestAllocs holds Next to its promise: nothing is allocated for a record.
func TestAllocs(t *testing.T) {
	const pages = 1 << 12
	in := AppendSetup(nil, &Setup{Total: pages << 12, Blocks: []Block{{Name: "pc.ram", Used: pages << 12}}})
	page := make([]byte, 4096)
	for i := range uint64(pages) {
		if i%2 == 0 {
			in = AppendPage(in, "pc.ram", i<<12, page)
		} else {
			in = AppendZero(in, "", i<<12, 0)
		}
	}
	c := stream.NewCursor(bytes.NewReader(in), 0)
	d := NewDecoder(Options{PageSize: 4096})
	var rec Record
	if err := d.Next(c, &rec); err != nil {
		t.Fatal(err)
	}
	n := testing.AllocsPerRun(pages/2, func() {
		if err := d.Next(c, &rec); err != nil {
			t.Fatal(err)
		}
	})
	if n != 0 {
		t.Errorf("%v allocations a record; want none", n)
	}
}

func TestKindNames(t *testing.T) {
	for k := MemSize; k <= EOS; k++ {
		if k.String() == "unknown record" {
			t.Errorf("kind %d has no name", k)
		}
	}
	if Kind(0).String() != "unknown record" || Kind(99).String() != "unknown record" {
		t.Error("an unknown kind has a name")
	}
	defer func() {
		if recover() == nil {
			t.Error("a name of 256 bytes was encoded")
		}
	}()
	AppendZero(nil, strings.Repeat("n", 256), 0, 0)
}

// FuzzDecoder decodes anything. Records that it accepts have to come out of
// the encoder as they went in, lie within their blocks and be aligned.
func FuzzDecoder(f *testing.F) {
	// Short seeds are what makes fuzzing fast, so pages are small and few.
	f.Add(sample(1024), uint32(0), false)
	f.Add(sample(1024), uint32(1024), false)
	for _, size := range []uint64{1024, 4096} {
		s := &Setup{Total: 2 * size, Blocks: []Block{{Name: "a", Used: size}, {Name: "b", Used: size}}}
		f.Add(AppendEOS(AppendPage(AppendZero(AppendSetup(nil, s), "a", 0, 0), "b", 0, make([]byte, size))), uint32(0), false)
		f.Add(AppendEOS(AppendCompressed(AppendSetup(nil, s), "b", 0, deflate(make([]byte, size)))), uint32(0), false)
		f.Add(AppendEOS(AppendXBZRLE(AppendSetup(nil, s), "b", 0, []byte{0, 1, 'x'})), uint32(size), false)
		f.Add(AppendEOS(AppendZero(AppendZero(AppendSetup(nil, s), "b", 0, 0), "a", 0, 9)), uint32(size), false)
	}
	shared := &Setup{Total: 8192, Blocks: []Block{{Name: "a", Used: 4096, PageSize: 2 << 20, GPA: new(uint64(1 << 32))}, {Name: "b", Used: 4096, GPA: new(uint64)}}}
	f.Add(AppendEOS(AppendZero(AppendSetup(nil, shared), "b", 0, 1)), uint32(4096), true)
	f.Fuzz(func(t *testing.T, in []byte, pageSize uint32, ignoreShared bool) {
		c := exact(in)
		d := NewDecoder(Options{PageSize: int(pageSize), IgnoreShared: ignoreShared})
		all, err := decode(d, c)
		if err != nil && !errors.Is(err, stream.ErrTruncated) && !errors.Is(err, stream.ErrDamaged) && !errors.Is(err, stream.ErrUnknown) {
			t.Fatalf("error of no kind: %v", err)
		}
		at := 0
		for _, rec := range all {
			if out := appendRecord(nil, d.Setup(), &rec); !bytes.Equal(out, rec.Raw) || !bytes.HasPrefix(in[at:], out) {
				t.Fatalf("%+v is encoded as %x", rec, out)
			}
			at += len(rec.Raw)
			if rec.Kind < Zero || rec.Kind > Compressed {
				continue
			}
			size := uint64(d.PageSize())
			if rec.Addr >= d.Setup().Blocks[rec.Block].Used || size == 0 && rec.Addr != 0 || rec.Page*size != rec.Addr {
				t.Fatalf("%+v with pages of %d bytes in %+v", rec, size, d.Setup())
			}
		}
		if c.Offset() != int64(at) {
			t.Fatalf("cursor at %d after %d bytes of records", c.Offset(), at)
		}
	})
}

func TestBlockEqual(t *testing.T) {
	a := Block{Name: "a", Used: 4096, GPA: new(uint64(1 << 32))}
	for _, c := range []struct {
		b    Block
		want bool
	}{
		{Block{Name: "a", Used: 4096, GPA: new(uint64(1 << 32))}, true},
		{Block{Name: "a", Used: 4096, GPA: new(uint64(1 << 33))}, false},
		{Block{Name: "a", Used: 4096}, false},
		{Block{Name: "b", Used: 4096, GPA: a.GPA}, false},
	} {
		if a.Equal(c.b) != c.want || c.b.Equal(a) != c.want {
			t.Errorf("%+v and %+v: equal is not %v", a, c.b, c.want)
		}
	}
}
