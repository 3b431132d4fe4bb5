package ramparse_test

import (
	"bytes"
	"errors"
	"io"
	"testing"
	"testing/iotest"

	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/stream"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
)

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

// A walk hands out every byte once.
func TestWalkIsComplete(t *testing.T) {
	for name, o := range tiertest.Shapes {
		want := tiertest.New(o).Bytes()
		var got bytes.Buffer
		if err := ramparse.Walk(iotest.HalfReader(bytes.NewReader(want)), 0, verbatim(&got)); err != nil {
			t.Errorf("%s: %v", name, err)
		} else if !bytes.Equal(got.Bytes(), want) {
			t.Errorf("%s: %d bytes of %d were handed out, or not in order", name, got.Len(), len(want))
		}
		if err := ramparse.Walk(bytes.NewReader(want), 0, ramparse.Visitor{}); err != nil {
			t.Errorf("%s, without functions: %v", name, err)
		}
	}
}

// No beginning of a stream passes for a whole one, but where QEMU could have
// stopped there: before the vmdescription.
func TestWalkTruncated(t *testing.T) {
	s := tiertest.New(tiertest.Options{Blocks: []tiertest.Block{{Name: "pc.ram", Size: 64 << 10}}})
	b, l := s.Bytes(), s.Layout()
	for n := range b {
		err := ramparse.Walk(bytes.NewReader(b[:n]), 0, ramparse.Visitor{})
		if int64(n) == l.EOF+1 {
			if err != nil {
				t.Errorf("without vmdescription: %v", err)
			}
			continue
		}
		if !errors.Is(err, stream.ErrTruncated) {
			t.Errorf("cut at %d of %d: %v", n, len(b), err)
		}
	}
}

func TestWalkStops(t *testing.T) {
	stop := errors.New("stop")
	b := tiertest.New(tiertest.Options{DirtyBitmap: true}).Bytes()
	unknown := tiertest.New(tiertest.Options{Unknown: tiertest.Record}).Bytes()
	for name, c := range map[string]struct {
		in []byte
		v  ramparse.Visitor
	}{
		"frame":  {b, ramparse.Visitor{Frame: func(*stream.Frame) error { return stop }}},
		"record": {b, ramparse.Visitor{Record: func(*ramparse.Decoder, *ramparse.Record) error { return stop }}},
		"bytes":  {b, ramparse.Visitor{Bytes: func([]byte) error { return stop }}},
		"tail":   {b, ramparse.Visitor{Tail: func([]byte) error { return stop }}},
		"opaque": {unknown, ramparse.Visitor{Opaque: func([]byte, error) error { return stop }}},
	} {
		if err := ramparse.Walk(bytes.NewReader(c.in), 0, c.v); !errors.Is(err, stop) {
			t.Errorf("%s: %v", name, err)
		}
	}
	broken := io.MultiReader(bytes.NewReader(b[:len(b)/2]), iotest.ErrReader(stop))
	if err := ramparse.Walk(broken, 0, ramparse.Visitor{}); !errors.Is(err, stop) {
		t.Errorf("reader: %v", err)
	}
}
