package returnpath

import (
	"bytes"
	"encoding/hex"
	"errors"
	"io"
	"reflect"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/flic-migrate/flic-migrate/stream"
)

// unhex decodes hex digits; spaces and line breaks are for the eye.
func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.Join(strings.Fields(s), ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// golden holds a message of each type, one after the other. 70632e72616d is
// pc.ram.
const golden = `
	0001 0004 00000000
	0002 0004 00000064
	0003 0013 00000000000c0000 00001000 06 70632e72616d
	0004 000c 0000000000001000 00002000
	0005 0007 06 70632e72616d  0000000000000008 ff01000000000000 0123456789abcdef
	0006 0004 00000001
	0007 0000
	0001 0004 00000001`

var goldenMessages = []Message{
	{Type: Shut},
	{Type: Pong, Value: 100},
	{Type: ReqPagesID, Block: "pc.ram", Start: 0xc0000, Length: 4096},
	{Type: ReqPages, Block: "pc.ram", Start: 4096, Length: 8192},
	{Type: RecvBitmap, Block: "pc.ram", Bitmap: []byte{0xff, 1, 0, 0, 0, 0, 0, 0}},
	{Type: ResumeAck, Value: 1},
	{Type: SwitchoverAck},
	{Type: Shut, Value: 1},
}

// readAll reads messages up to the end or an error.
func readAll(r io.Reader) (all []Message, err error) {
	in := NewReader(r)
	for {
		m, err := in.Next()
		if err == io.EOF {
			return all, nil
		} else if err != nil {
			return all, err
		}
		all = append(all, m)
	}
}

// appendMessage encodes a message.
func appendMessage(dst []byte, m Message) []byte {
	switch m.Type {
	case Shut:
		return AppendShut(dst, m.Value)
	case Pong:
		return AppendPong(dst, m.Value)
	case ReqPagesID:
		return AppendReqPages(dst, m.Block, m.Start, m.Length)
	case ReqPages:
		return AppendReqPages(dst, "", m.Start, m.Length)
	case RecvBitmap:
		return AppendRecvBitmap(dst, m.Block, m.Bitmap)
	case ResumeAck:
		return AppendResumeAck(dst)
	}
	return AppendSwitchoverAck(dst)
}

func TestGolden(t *testing.T) {
	in := unhex(t, golden)
	for name, r := range map[string]io.Reader{
		"whole":    bytes.NewReader(in),
		"one byte": iotest.OneByteReader(bytes.NewReader(in)),
	} {
		got, err := readAll(r)
		if err != nil || !reflect.DeepEqual(got, goldenMessages) {
			t.Errorf("%s:\n got %+v, %v\nwant %+v", name, got, err, goldenMessages)
		}
	}
	var out []byte
	for _, m := range goldenMessages {
		out = appendMessage(out, m)
	}
	if !bytes.Equal(out, in) {
		t.Errorf("encoded\n%x; want\n%x", out, in)
	}
}

func TestRecvBitmapPads(t *testing.T) {
	for n, want := range map[int]int{0: 0, 1: 8, 8: 8, 9: 16} {
		got, err := readAll(bytes.NewReader(AppendRecvBitmap(nil, "m0", bytes.Repeat([]byte{0xff}, n))))
		if err != nil || len(got) != 1 || len(got[0].Bitmap) != want {
			t.Errorf("%d bytes: %+v, %v; want %d", n, got, err, want)
		}
	}
}

// TestTruncated cuts the messages everywhere: between two of them is a plain
// end, elsewhere an error.
func TestTruncated(t *testing.T) {
	in := unhex(t, golden)
	ends := map[int]int{0: 0} // messages by length
	n := 0
	for i, m := range goldenMessages {
		n += len(appendMessage(nil, m))
		ends[n] = i + 1
	}
	for cut := range in {
		got, err := readAll(bytes.NewReader(in[:cut]))
		if want, ok := ends[cut]; ok {
			if err != nil || len(got) != want {
				t.Errorf("cut at %d: %d messages, %v; want %d", cut, len(got), err, want)
			}
		} else if !errors.Is(err, stream.ErrTruncated) {
			t.Errorf("cut at %d: %v; want ErrTruncated", cut, err)
		}
	}
}

func TestErrors(t *testing.T) {
	tests := []struct {
		name string
		in   string
		want error
	}{
		{"type 0", `0000 0000`, stream.ErrUnknown},
		{"unknown type", `0008 0000`, stream.ErrUnknown},
		{"junk", `ffff ffff`, stream.ErrUnknown},
		{"short SHUT", `0001 0003 000000`, stream.ErrDamaged},
		{"long PONG", `0002 0005 0000000000`, stream.ErrDamaged},
		{"REQ_PAGES first", `0004 000c 0000000000001000 00002000`, stream.ErrDamaged},
		{"REQ_PAGES_ID without name", `0003 000c 0000000000001000 00002000`, stream.ErrDamaged},
		{"REQ_PAGES_ID with empty name", `0003 000d 0000000000001000 00002000 00`, stream.ErrDamaged},
		{"REQ_PAGES_ID with short name", `0003 000e 0000000000001000 00002000 02 61`, stream.ErrDamaged},
		{"REQ_PAGES_ID of 3 bytes", `0003 0003 000000`, stream.ErrDamaged},
		{"RESUME_ACK with 0", `0006 0004 00000000`, stream.ErrDamaged},
		{"bitmap without name", `0005 0000`, stream.ErrDamaged},
		{"bitmap not padded", `0005 0002 01 61 0000000000000004`, stream.ErrDamaged},
		{"bitmap without end", `0005 0002 01 61 0000000004000008`, stream.ErrDamaged},
		{"bitmap end", `0005 0002 01 61 0000000000000000 0123456789abcdee`, stream.ErrDamaged},
	}
	for _, tt := range tests {
		// An error later in the path carries its offset.
		in := append(AppendPong(nil, 1), unhex(t, tt.in)...)
		got, err := readAll(bytes.NewReader(in))
		var e *stream.Error
		if len(got) != 1 || !errors.Is(err, tt.want) || !errors.As(err, &e) || e.Offset != 8 {
			t.Errorf("%s: %v after %d messages; want %v at offset 8", tt.name, err, len(got), tt.want)
		}
	}
	broken := errors.New("broken")
	if _, err := readAll(iotest.ErrReader(broken)); !errors.Is(err, broken) {
		t.Errorf("%v; want the reader's error", err)
	}
}

// TestBitmapAllocation checks that a length alone makes nothing be allocated.
func TestBitmapAllocation(t *testing.T) {
	in := unhex(t, `0005 0002 01 61 0000000004000000`)
	n := testing.Benchmark(func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := readAll(bytes.NewReader(in)); !errors.Is(err, stream.ErrTruncated) {
				b.Fatal(err)
			}
		}
	}).AllocedBytesPerOp()
	if n > 64<<10 {
		t.Errorf("%d bytes allocated for a bitmap that never came", n)
	}
}

func TestNames(t *testing.T) {
	for typ := Shut; typ <= SwitchoverAck; typ++ {
		if typ.String() == "unknown message" {
			t.Errorf("type %d has no name", typ)
		}
	}
	if Type(0).String() != "unknown message" || Type(99).String() != "unknown message" {
		t.Error("an unknown type has a name")
	}
	defer func() {
		if recover() == nil {
			t.Error("a name of 256 bytes was encoded")
		}
	}()
	AppendReqPages(nil, strings.Repeat("n", 256), 0, 0)
}

// FuzzReader checks that what is read comes out of the encoder as it went in.
func FuzzReader(f *testing.F) {
	for i, m := range goldenMessages {
		f.Add(appendMessage(AppendReqPages(nil, "a", 0, 1), m))
		f.Add(appendMessage(nil, goldenMessages[i]))
	}
	f.Add(unhex(f, golden))
	f.Fuzz(func(t *testing.T, in []byte) {
		all, err := readAll(bytes.NewReader(in))
		if err != nil && !errors.Is(err, stream.ErrTruncated) && !errors.Is(err, stream.ErrDamaged) && !errors.Is(err, stream.ErrUnknown) {
			t.Fatalf("error of no kind: %v", err)
		}
		var out []byte
		for _, m := range all {
			out = appendMessage(out, m)
		}
		if !bytes.HasPrefix(in, out) || err == nil && len(in) != len(out) {
			t.Fatalf("%x was read as %+v, which is %x", in, all, out)
		}
	})
}

// TestReqPagesID pins that a request names the block of the last one named,
// over messages between.
func TestReqPagesID(t *testing.T) {
	in := AppendReqPages(nil, "a", 0, 4096)
	in = AppendReqPages(in, "", 4096, 4096)
	in = AppendReqPages(in, "b", 0, 4096)
	in = AppendRecvBitmap(in, "c", nil)
	in = AppendReqPages(in, "", 8192, 4096)
	all, err := readAll(bytes.NewReader(in))
	if err != nil {
		t.Fatal(err)
	}
	var blocks string
	for _, m := range all {
		blocks += m.Block
	}
	if blocks != "aabcb" {
		t.Errorf("blocks %q; want aabcb", blocks)
	}
}
