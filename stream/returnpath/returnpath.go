// Package returnpath encodes and decodes the messages that the destination of
// a migration sends back to its source: on exec: the standard output of the
// save's child, and the standard input of the restore's.
//
// Each message has a head; numbers are big-endian:
//
//	be16 type, be16 length, payload of that length
//
//	type  name            payload
//	1     SHUT            be32 value, 0 = all is well
//	2     PONG            be32 value of the PING it answers
//	3     REQ_PAGES_ID    be64 start, be32 length, u8 n, block name
//	4     REQ_PAGES       be64 start, be32 length; block of the last type 3
//	5     RECV_BITMAP     u8 n, block name; then, not counted in length:
//	                      be64 size, size bytes, be64 0123456789abcdef
//	6     RESUME_ACK      be32 1
//	7     SWITCHOVER_ACK  - (QEMU 8.1)
//
// A save answers with SHUT and PONG; a lazy restore gets the rest.
//
// Sources: QEMU's migration/migration.c (migrate_send_rp_*, rp_cmd_args,
// source_return_path_thread) and migration/ram.c (ramblock_recv_bitmap_send).
package returnpath

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"io"

	"github.com/flic-migrate/flic-migrate/stream"
)

// Type is a message's type.
type Type uint16

// The message types.
const (
	Shut          Type = 1
	Pong          Type = 2
	ReqPagesID    Type = 3
	ReqPages      Type = 4
	RecvBitmap    Type = 5
	ResumeAck     Type = 6
	SwitchoverAck Type = 7
)

var typeNames = [...]string{
	Shut: "SHUT", Pong: "PONG", ReqPagesID: "REQ_PAGES_ID", ReqPages: "REQ_PAGES",
	RecvBitmap: "RECV_BITMAP", ResumeAck: "RESUME_ACK", SwitchoverAck: "SWITCHOVER_ACK",
}

// String returns QEMU's name for the type.
func (t Type) String() string {
	if int(t) < len(typeNames) && typeNames[t] != "" {
		return typeNames[t]
	}
	return "unknown message"
}

// lengths are the payload lengths by type, -1 for any (rp_cmd_args).
var lengths = [...]int{Shut: 4, Pong: 4, ReqPagesID: -1, ReqPages: 12, RecvBitmap: -1, ResumeAck: 4, SwitchoverAck: 0}

const (
	// MaxBitmap caps a received bitmap, in bytes: 2 TiB in pages of 4 KiB.
	MaxBitmap = 64 << 20

	resumeAckValue = 1
	bitmapEnd      = 0x0123456789abcdef
)

// Message is one message. Only the fields of its Type are set.
type Message struct {
	Type   Type
	Value  uint32 // SHUT, PONG, RESUME_ACK
	Block  string // REQ_PAGES_ID, REQ_PAGES, RECV_BITMAP
	Start  uint64 // REQ_PAGES_ID, REQ_PAGES: byte offset within the block
	Length uint32 // REQ_PAGES_ID, REQ_PAGES: bytes
	Bitmap []byte // RECV_BITMAP: bit i%8 of byte i/8 set = page i received; padded to 8 bytes
}

// A Reader reads messages. It is for one goroutine.
type Reader struct {
	r      *bufio.Reader
	offset int64
	block  string // of the last REQ_PAGES_ID
	buf    []byte
}

// NewReader returns a Reader of r.
func NewReader(r io.Reader) *Reader { return &Reader{r: bufio.NewReader(r)} }

// Next blocks until the next message is there and returns it. Between messages
// the end of the input is io.EOF; elsewhere it gives stream.ErrTruncated. A
// type it does not know gives stream.ErrUnknown, a message that contradicts
// itself stream.ErrDamaged; the messages after it cannot be found then. The
// offsets of errors count from the beginning of the return path.
func (r *Reader) Next() (Message, error) {
	start := r.offset
	damaged := func(format string, args ...any) (Message, error) {
		return Message{}, stream.Damaged("return path", start, format, args...)
	}
	head, err := r.read(4)
	if err == io.EOF {
		return Message{}, io.EOF
	} else if err != nil {
		return Message{}, stream.Wrap("return path", start, err)
	}
	m := Message{Type: Type(binary.BigEndian.Uint16(head))}
	n := int(binary.BigEndian.Uint16(head[2:]))
	if m.Type == 0 || int(m.Type) >= len(lengths) {
		return Message{}, stream.Unknown("return path", start, "message type %d", m.Type)
	}
	if want := lengths[m.Type]; want >= 0 && n != want {
		return damaged("%v with %d bytes", m.Type, n)
	}
	b, err := r.read(n)
	if err != nil {
		return Message{}, stream.Wrap("return path", start, err)
	}
	name := func(b []byte) bool {
		if len(b) < 2 || len(b) != 1+int(b[0]) {
			return false
		}
		m.Block = string(b[1:])
		return true
	}
	switch m.Type {
	case Shut, Pong, ResumeAck:
		m.Value = binary.BigEndian.Uint32(b)
		if m.Type == ResumeAck && m.Value != resumeAckValue {
			return damaged("RESUME_ACK with value %d", m.Value)
		}
	case ReqPagesID:
		if n < 12 || !name(b[12:]) {
			return damaged("%v with %d bytes", m.Type, n)
		}
		r.block = m.Block
	case ReqPages:
		if r.block == "" {
			return damaged("REQ_PAGES before the first REQ_PAGES_ID")
		}
		m.Block = r.block
	case RecvBitmap:
		if !name(b) {
			return damaged("%v with %d bytes", m.Type, n)
		}
		return r.bitmap(start, m)
	}
	if m.Type == ReqPages || m.Type == ReqPagesID {
		m.Start = binary.BigEndian.Uint64(b)
		m.Length = binary.BigEndian.Uint32(b[8:])
	}
	return m, nil
}

// bitmap reads the uncounted part of a RECV_BITMAP message.
func (r *Reader) bitmap(start int64, m Message) (Message, error) {
	b, err := r.read(8)
	if err != nil {
		return Message{}, stream.Wrap("return path", start, err)
	}
	n := binary.BigEndian.Uint64(b)
	if n > MaxBitmap || n%8 != 0 {
		return Message{}, stream.Damaged("return path", start, "bitmap of %d bytes", n)
	}
	// The buffer grows with what comes, so that a mere length allocates nothing.
	var bits bytes.Buffer
	k, err := io.CopyN(&bits, r.r, int64(n))
	r.offset += k
	if err == nil {
		b, err = r.read(8)
	}
	if err != nil {
		return Message{}, stream.Wrap("return path", start, err)
	}
	if end := binary.BigEndian.Uint64(b); end != bitmapEnd {
		return Message{}, stream.Damaged("return path", start, "bitmap ends in %#016x", end)
	}
	m.Bitmap = bits.Bytes()
	return m, nil
}

// read returns the next n bytes, valid until the next call.
func (r *Reader) read(n int) ([]byte, error) {
	if n > cap(r.buf) {
		r.buf = make([]byte, n)
	}
	b := r.buf[:n]
	k, err := io.ReadFull(r.r, b)
	r.offset += int64(k)
	return b, err
}

func appendHead(dst []byte, t Type, n int) []byte {
	dst = binary.BigEndian.AppendUint16(dst, uint16(t))
	return binary.BigEndian.AppendUint16(dst, uint16(n))
}

// appendName appends a counted string. A name over 255 bytes has no encoding
// and is the caller's mistake.
func appendName(dst []byte, name string) []byte {
	if len(name) > 255 {
		panic("returnpath: block name longer than 255 bytes")
	}
	return append(append(dst, byte(len(name))), name...)
}

// AppendShut appends SHUT. With value 0 the source's migration is completed,
// with another it fails and the guest runs on.
func AppendShut(dst []byte, value uint32) []byte {
	return binary.BigEndian.AppendUint32(appendHead(dst, Shut, 4), value)
}

// AppendPong appends PONG, the answer to a PING with the same value.
func AppendPong(dst []byte, value uint32) []byte {
	return binary.BigEndian.AppendUint32(appendHead(dst, Pong, 4), value)
}

// AppendReqPages appends REQ_PAGES_ID, or REQ_PAGES if block is empty.
func AppendReqPages(dst []byte, block string, start uint64, length uint32) []byte {
	if block == "" {
		dst = appendHead(dst, ReqPages, 12)
	} else {
		dst = appendHead(dst, ReqPagesID, 12+1+len(block))
	}
	dst = binary.BigEndian.AppendUint64(dst, start)
	dst = binary.BigEndian.AppendUint32(dst, length)
	if block == "" {
		return dst
	}
	return appendName(dst, block)
}

// AppendRecvBitmap appends RECV_BITMAP and pads the bitmap to a multiple of 8
// bytes.
func AppendRecvBitmap(dst []byte, block string, bitmap []byte) []byte {
	dst = appendName(appendHead(dst, RecvBitmap, 1+len(block)), block)
	pad := -len(bitmap) & 7
	dst = binary.BigEndian.AppendUint64(dst, uint64(len(bitmap)+pad))
	dst = append(dst, bitmap...)
	dst = append(dst, make([]byte, pad)...)
	return binary.BigEndian.AppendUint64(dst, bitmapEnd)
}

// AppendResumeAck appends RESUME_ACK.
func AppendResumeAck(dst []byte) []byte {
	return binary.BigEndian.AppendUint32(appendHead(dst, ResumeAck, 4), resumeAckValue)
}

// AppendSwitchoverAck appends SWITCHOVER_ACK.
func AppendSwitchoverAck(dst []byte) []byte { return appendHead(dst, SwitchoverAck, 0) }
