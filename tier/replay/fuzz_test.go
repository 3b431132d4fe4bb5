package replay

import (
	"bytes"
	"io"
	"testing"

	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/stream"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
)

// FuzzWalk: whatever comes, a walk that ends well has handed out every byte,
// and the memory it makes equals itself.
func FuzzWalk(f *testing.F) {
	for _, o := range tiertest.Shapes {
		// Short, or the fuzzer spends its time on pages' content.
		o.BlockMigration, o.Early = false, min(o.Early, 1)
		o.PageSize, o.PageBits, o.Advise = 1024, !o.NoConfiguration, false
		blocks := []tiertest.Block{{Name: "pc.ram", Size: 6 * uint64(o.PageSize)}}
		for _, b := range o.Blocks[min(1, len(o.Blocks)):] {
			b.Size = 2 * uint64(o.PageSize)
			blocks = append(blocks, b)
		}
		o.Blocks, o.Tail = blocks, 1000
		f.Add(tiertest.New(o).Bytes())
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var out bytes.Buffer
		if err := ramparse.Walk(bytes.NewReader(b), 0, verbatim(&out)); err != nil {
			return
		}
		if !bytes.Equal(out.Bytes(), b) {
			t.Fatalf("%d bytes were handed out of %d", out.Len(), len(b))
		}
		m, err := loadMemory(bytes.NewReader(b), t.TempDir(), 0)
		if err != nil {
			return // a record that can't be applied
		}
		defer m.close()
		if m.resent > 0 {
			return
		}
		if err := m.compare(bytes.NewReader(b)); err != nil {
			t.Fatalf("differs from itself: %v", err)
		}
	})
}

// verbatim collects all that a walk hands out, in order.
func verbatim(out *bytes.Buffer) ramparse.Visitor {
	write := func(b []byte) error { out.Write(b); return nil }
	return ramparse.Visitor{
		Frame:  func(f *stream.Frame) error { return write(f.Raw) },
		Record: func(_ *ramparse.Decoder, r *ramparse.Record) error { return write(r.Raw) },
		Bytes:  write,
		Opaque: func(b []byte, _ error) error { return write(b) },
		Tail:   write,
	}
}

// FuzzDecompress: bounded output for the first MiB, no panic.
func FuzzDecompress(f *testing.F) {
	for _, b := range packed(f, bytes.Repeat([]byte("QEVM and so on "), 1000)) {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r, done, err := Decompress(bytes.NewReader(b))
		if err != nil {
			return
		}
		defer done()
		io.Copy(io.Discard, io.LimitReader(r, 1<<20))
	})
}
