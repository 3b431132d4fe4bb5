package postcopy

import (
	"bytes"
	"encoding/hex"
	"errors"
	"reflect"
	"strings"
	"testing"

	"github.com/flic-migrate/flic-migrate/stream"
)

// unhex decodes hex digits; spaces are for the eye.
func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestGolden pins each command's bytes. 6d30 is m0.
func TestGolden(t *testing.T) {
	tests := []struct {
		name string
		got  []byte
		want string
	}{
		{"OPEN_RETURN_PATH", AppendOpenReturnPath(nil), `08 0001 0000`},
		{"PING", AppendPing(nil, 100), `08 0002 0004 00000064`},
		{"ADVISE", AppendAdvise(nil, Advise{0x201000, 0x1000}), `08 0003 0010 0000000000201000 0000000000001000`},
		{"LISTEN", AppendListen(nil), `08 0004 0000`},
		{"RUN", AppendRun(nil), `08 0005 0000`},
		{"RAM_DISCARD", AppendDiscard(nil, "m0", []Range{{0, 0x1000}, {0x3000, 0x2000}}),
			`08 0006 0025 00 02 6d30 00 0000000000000000 0000000000001000 0000000000003000 0000000000002000`},
		{"no RAM_DISCARD", AppendDiscard(nil, "m0", nil), ``},
		{"PACKAGED", AppendPackage(nil, AppendListen(nil)), `08 0007 0004 00000005 08 0004 0000`},
		{"RESUME", AppendResume(nil), `08 0009 0000`},
		{"RECV_BITMAP", AppendRecvBitmap(nil, "m0"), `08 000a 0003 02 6d30`},
	}
	for _, tt := range tests {
		if want := unhex(t, tt.want); !bytes.Equal(tt.got, want) {
			t.Errorf("%s: %x; want %x", tt.name, tt.got, want)
		}
	}
}

// commands takes commands apart with the frame reader, so that both agree.
func commands(t testing.TB, in []byte) (all []stream.Command) {
	t.Helper()
	r := stream.NewReader(stream.NewCursor(bytes.NewReader(append(stream.AppendHeader(nil), in...)), 0))
	for {
		f, err := r.Next()
		if errors.Is(err, stream.ErrTruncated) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		if f.Kind == stream.CommandFrame {
			f.Command.Payload = bytes.Clone(f.Command.Payload)
			all = append(all, f.Command)
			if f.Command.Number == stream.CommandPackaged {
				r.CopyPackage(func([]byte) error { return nil })
			}
		}
	}
}

func TestDiscard(t *testing.T) {
	for _, n := range []int{1, 11, 12, 13, 25} {
		var want, got []Range
		for i := range n {
			want = append(want, Range{uint64(i) << 13, 4096})
		}
		cmds := commands(t, AppendDiscard(nil, "pc.ram", want))
		if len(cmds) != (n+11)/12 {
			t.Errorf("%d ranges in %d commands", n, len(cmds))
		}
		for _, c := range cmds {
			block, ranges, err := ParseDiscard(c.Payload)
			if err != nil || block != "pc.ram" || len(ranges) > 12 {
				t.Errorf("%d ranges: block %q, %d ranges, %v", n, block, len(ranges), err)
			}
			got = append(got, ranges...)
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%d ranges: %v; want %v", n, got, want)
		}
	}
}

func TestParse(t *testing.T) {
	cmds := commands(t, AppendRecvBitmap(AppendAdvise(nil, Advise{4096, 4096}), "m0"))
	if a, err := ParseAdvise(cmds[0].Payload); err != nil || a != (Advise{4096, 4096}) {
		t.Errorf("ADVISE: %+v, %v", a, err)
	}
	if block, err := ParseRecvBitmap(cmds[1].Payload); err != nil || block != "m0" {
		t.Errorf("RECV_BITMAP: %q, %v", block, err)
	}
	if a, err := ParseAdvise(nil); err != nil || a != (Advise{}) {
		t.Errorf("ADVISE for dirty bitmaps: %+v, %v", a, err)
	}
}

func TestParseErrors(t *testing.T) {
	for _, in := range []string{`00`, `0000000000001000`, `0000000000001000 0000000000001000 00`} {
		if _, err := ParseAdvise(unhex(t, in)); !errors.Is(err, stream.ErrDamaged) {
			t.Errorf("ADVISE %s: %v", in, err)
		}
	}
	pair := ` 0000000000000000 0000000000001000`
	for _, in := range []string{``, `01 02 6d30 00` + pair, `00`, `00 00 00` + pair, `00 02 6d`, `00 02 6d30`, `00 02 6d30 01` + pair,
		`00 02 6d30 00`, `00 02 6d30 00 00`, `00 02 6d30 00` + strings.Repeat(pair, 13)} {
		if _, _, err := ParseDiscard(unhex(t, in)); !errors.Is(err, stream.ErrDamaged) {
			t.Errorf("RAM_DISCARD %s: %v", in, err)
		}
	}
	for _, in := range []string{``, `00`, `02 6d`, `02 6d30 00`} {
		if _, err := ParseRecvBitmap(unhex(t, in)); !errors.Is(err, stream.ErrDamaged) {
			t.Errorf("RECV_BITMAP %s: %v", in, err)
		}
	}
}

func TestLongName(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("a name of 256 bytes was encoded")
		}
	}()
	AppendRecvBitmap(nil, strings.Repeat("n", 256))
}

// FuzzParse checks that what is parsed comes out of the encoder as it went in.
func FuzzParse(f *testing.F) {
	for _, c := range commands(f, AppendRecvBitmap(AppendDiscard(AppendAdvise(nil, Advise{4096, 4096}), "m0", []Range{{0, 4096}, {8192, 4096}}), "pc.ram")) {
		f.Add(c.Payload)
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		// A payload longer than a command can have has no encoding.
		if len(in) > 65535 {
			return
		}
		if a, err := ParseAdvise(in); err == nil && len(in) > 0 {
			if out := AppendAdvise(nil, a)[5:]; !bytes.Equal(in, out) {
				t.Errorf("ADVISE %x became %x", in, out)
			}
		}
		if block, ranges, err := ParseDiscard(in); err == nil {
			if out := AppendDiscard(nil, block, ranges)[5:]; !bytes.Equal(in, out) {
				t.Errorf("RAM_DISCARD %x became %x", in, out)
			}
		}
		if block, err := ParseRecvBitmap(in); err == nil {
			if out := AppendRecvBitmap(nil, block)[5:]; !bytes.Equal(in, out) {
				t.Errorf("RECV_BITMAP %x became %x", in, out)
			}
		}
	})
}
