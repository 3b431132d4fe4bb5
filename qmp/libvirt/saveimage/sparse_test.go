package saveimage

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/stream"
)

// layout says how a sparse file is made.
type layout struct {
	order    binary.ByteOrder // of the bitmap's longs
	relative bool             // offsets count from the stream's beginning
	gpa      bool             // with x-ignore-shared
	caps     []string
	early    bool // a device section between RAM's START and what follows, as QEMU 10.0 has it
	small    bool // two pages, and the pages right behind the bitmaps
}

const (
	ramID    = 2
	pageSize = 4096
)

// content is block b's page i; every third is zero.
func content(b, i int) []byte {
	if i%3 == 1 {
		return make([]byte, pageSize)
	}
	return bytes.Repeat([]byte{byte(b + 1), byte(i), byte(i >> 8), 7}, pageSize/4)
}

// testBlocks are two blocks with pages, whose bitmaps end within a long and beyond
// one, and between them one that is not in the stream.
var testBlocks = []testBlock{{"pc.ram", 70, false}, {"shm", 3, true}, {"/rom@etc/acpi", 5, false}}

type testBlock struct {
	name    string
	pages   int
	ignored bool
}

// sparseFile makes a sparse save file, and the stream that it stands for.
func sparseFile(t testing.TB, l layout) (file []byte, start int64, h *Header, plain []byte) {
	t.Helper()
	h, err := New(domain, "<cookie/>", true)
	if err != nil {
		t.Fatal(err)
	}
	h.SetFormat(Sparse)
	h.order = l.order // the host's, which decides about bitmaps
	file = h.Bytes()
	start = int64(len(file))
	both := func(b []byte) { file, plain = append(file, b...), append(plain, b...) }
	be := binary.BigEndian

	both(stream.AppendConfiguration(stream.AppendHeader(nil), "pc-q35-10.0"))
	caps := func(names []string) []byte {
		return stream.AppendConfigSubsection(nil, stream.ConfigSubsection{Name: stream.SubsectionCapabilities, Version: 1, Capabilities: names})
	}
	if l.caps != nil {
		file = append(file, caps(l.caps)...)
		if rest := slices.DeleteFunc(slices.Clone(l.caps), func(s string) bool { return s == "mapped-ram" }); len(rest) > 0 {
			plain = append(plain, caps(rest)...)
		}
	}
	both(stream.AppendStart(nil, stream.Section{ID: ramID, Name: "ram", Version: 4}))
	total, blocks, align := 0, testBlocks, 1<<20
	if l.small {
		blocks, align = []testBlock{{"m", 2, false}, {"s", 1, true}}, 8
	}
	for _, b := range blocks {
		total += b.pages * pageSize
	}
	both(be.AppendUint64(nil, uint64(total)|4))
	pages := stream.AppendPart(nil, ramID)
	for n, b := range blocks {
		both(append([]byte{byte(len(b.name))}, b.name...))
		both(be.AppendUint64(nil, uint64(b.pages*pageSize)))
		if l.gpa {
			both(be.AppendUint64(nil, uint64(n)<<32))
		}
		file = be.AppendUint32(file, 1)
		file = be.AppendUint64(file, pageSize)
		if b.ignored {
			file = append(file, make([]byte, 16)...)
			continue
		}
		base := 0
		if l.relative {
			base = int(start)
		}
		bitmapAt := len(file) + 16 - base
		pagesAt := (bitmapAt + (b.pages+63)/64*8 + align - 1) / align * align
		file = be.AppendUint64(file, uint64(bitmapAt))
		file = be.AppendUint64(file, uint64(pagesAt))
		longs := make([]uint64, (b.pages+63)/64)
		data := make([]byte, 0, b.pages*pageSize)
		name := b.name
		for i := range b.pages {
			p := content(n, i)
			data = append(data, p...)
			if i%3 == 1 {
				pages = ramparse.AppendZero(pages, name, uint64(i*pageSize), 0)
			} else {
				longs[i/64] |= 1 << (i % 64)
				pages = ramparse.AppendPage(pages, name, uint64(i*pageSize), p)
			}
			name = ""
		}
		for _, v := range longs {
			long := make([]byte, 8)
			l.order.PutUint64(long, v)
			file = append(file, long...)
		}
		file = append(file, make([]byte, pagesAt+base-len(file))...)
		file = append(file, data...)
	}
	both(stream.AppendFooter(ramparse.AppendEOS(nil), ramID))
	if l.early {
		both(stream.AppendFooter(append(stream.AppendFull(nil, stream.Section{ID: 9, Name: "virtio-mem"}), "early"...), 9))
	}
	plain = append(plain, stream.AppendFooter(ramparse.AppendEOS(pages), ramID)...)
	both(stream.AppendFooter(ramparse.AppendEOS(stream.AppendPart(nil, ramID)), ramID))
	both(stream.AppendFooter(ramparse.AppendEOS(stream.AppendEnd(nil, ramID)), ramID))
	both(stream.AppendEOF(stream.AppendFooter(append(stream.AppendFull(nil, stream.Section{ID: 3, Name: "timer"}), "state"...), 3)))
	return file, start, h, plain
}

// TestCopySparse: the stream is what QEMU would have sent, whatever host wrote it and
// whatever its offsets count from.
func TestCopySparse(t *testing.T) {
	for name, l := range map[string]layout{
		"plain":         {order: binary.LittleEndian},
		"relative":      {order: binary.LittleEndian, relative: true},
		"big endian":    {order: binary.BigEndian},
		"addresses":     {order: binary.LittleEndian, gpa: true, caps: []string{"mapped-ram", "x-ignore-shared"}},
		"capabilities":  {order: binary.LittleEndian, caps: []string{"mapped-ram"}},
		"early section": {order: binary.LittleEndian, early: true},
	} {
		file, start, h, want := sparseFile(t, l)
		var got bytes.Buffer
		if err := CopySparse(&got, bytes.NewReader(file), start, int64(len(file)), h); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if !bytes.Equal(got.Bytes(), want) {
			t.Errorf("%s: %d bytes, want %d", name, got.Len(), len(want))
		}
	}
}

// TestCopySparseDamage refuses what can't be, and never reads beyond the file.
func TestCopySparseDamage(t *testing.T) {
	file, start, h, _ := sparseFile(t, layout{order: binary.LittleEndian})
	at := start + int64(bytes.Index(file[start:], []byte("\x06pc.ram"))) // of the first block
	change := func(offset int64, v byte) []byte {
		b := bytes.Clone(file)
		b[at+offset] ^= v
		return b
	}
	for name, c := range map[string]struct {
		b    []byte
		want error
		text string
	}{
		"name's length":    {change(0, 1), stream.ErrDamaged, "no header"},
		"longest name":     {change(0, 6^255), stream.ErrDamaged, "no header"},
		"used length":      {change(7, 0x40), stream.ErrDamaged, "does not fit"},
		"part of a page":   {change(14, 1), stream.ErrDamaged, "does not fit"},
		"mapped version":   {change(18, 2), stream.ErrDamaged, "no header"},
		"page size":        {change(26, 1), stream.ErrDamaged, "no header"},
		"bitmap's place":   {change(34, 1), stream.ErrDamaged, "no header"},
		"pages far away":   {change(35, 0x40), stream.ErrDamaged, "does not fit"},
		"pages on bitmap":  {change(40, 0x10), stream.ErrDamaged, "overlap"},
		"more than in all": {change(-2, 0x20), stream.ErrDamaged, "are left"},
		"less than in all": {change(-3, 0x01), stream.ErrDamaged, "no header"},
		"no stream":        {append(bytes.Clone(file[:start]), "QEVX0123456789"...), stream.ErrNotStream, ""},
		"no RAM": {stream.AppendFull(append(bytes.Clone(file[:start]), stream.AppendConfiguration(stream.AppendHeader(nil), "q35")...),
			stream.Section{ID: 1, Name: "timer"}), stream.ErrDamaged, "before the RAM"},
	} {
		err := CopySparse(io.Discard, bytes.NewReader(c.b), start, int64(len(c.b)), h)
		if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, n := range []int64{0, 5, 40, at - start, at - start + 20, 1 << 20, int64(len(file)) - start - 80} {
		if err := CopySparse(io.Discard, bytes.NewReader(file), start, start+n, h); err == nil {
			t.Errorf("cut to %d bytes", n)
		}
	}
}

// FuzzCopySparse reads anything without reading or allocating beyond what is there.
func FuzzCopySparse(f *testing.F) {
	for _, l := range []layout{
		{order: binary.LittleEndian, small: true},
		{order: binary.BigEndian, relative: true, gpa: true, caps: []string{"mapped-ram"}, early: true, small: true},
	} {
		file, start, _, _ := sparseFile(f, l)
		f.Add(file[start:], l.order == binary.BigEndian)
	}
	f.Fuzz(func(t *testing.T, b []byte, big bool) {
		h := &Header{order: binary.ByteOrder(binary.LittleEndian)}
		if big {
			h.order = binary.BigEndian
		}
		if err := CopySparse(io.Discard, bytes.NewReader(b), 0, int64(len(b)), h); err != nil && err.Error() == "" {
			t.Error("an error without words")
		}
	})
}
