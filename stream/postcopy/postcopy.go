// Package postcopy encodes and decodes the commands by which the source of a
// postcopy migration leads its destination.
//
// A lazy restore plays that source. After the stream's configuration it sends
// OPEN_RETURN_PATH and ADVISE, the RAM setup, RAM_DISCARD for each block, the
// PACKAGED device state between LISTEN and RUN, and then pages. After a break
// the next source sends RECV_BITMAP for each block and RESUME instead.
//
//	ADVISE       be64 OR of the blocks' page sizes, be64 target page size;
//	             or nothing, if only dirty bitmaps are in postcopy
//	LISTEN, RUN, RESUME, OPEN_RETURN_PATH  nothing
//	PING         be32 value
//	RAM_DISCARD  u8 0, u8 n, block name, u8 0, 1 to 12 pairs of be64 start, be64 length
//	PACKAGED     be32 n; n bytes of sections follow outside the command
//	RECV_BITMAP  u8 n, block name
//
// Sources: QEMU's migration/savevm.c (qemu_savevm_send_*, loadvm_*) and
// migration/postcopy-ram.c (MAX_DISCARDS_PER_COMMAND).
package postcopy

import (
	"encoding/binary"
	"fmt"

	"github.com/flic-migrate/flic-migrate/stream"
)

// maxDiscards is the most ranges QEMU takes in a RAM_DISCARD.
const maxDiscards = 12

// Advise is the payload of POSTCOPY_ADVISE.
type Advise struct {
	PageSizes uint64 // OR of the blocks' host page sizes, bytes
	Target    uint64 // target page size, bytes
}

// Range is a piece of a RAM block, in bytes.
type Range struct {
	Start, Length uint64
}

// AppendOpenReturnPath appends OPEN_RETURN_PATH.
func AppendOpenReturnPath(dst []byte) []byte {
	return stream.AppendCommand(dst, stream.CommandOpenReturnPath, nil)
}

// AppendPing appends PING.
func AppendPing(dst []byte, value uint32) []byte {
	return stream.AppendCommand(dst, stream.CommandPing, binary.BigEndian.AppendUint32(nil, value))
}

// AppendAdvise appends ADVISE for RAM.
func AppendAdvise(dst []byte, a Advise) []byte {
	b := binary.BigEndian.AppendUint64(nil, a.PageSizes)
	return stream.AppendCommand(dst, stream.CommandPostcopyAdvise, binary.BigEndian.AppendUint64(b, a.Target))
}

// ParseAdvise parses ADVISE's payload. An empty one, for dirty bitmaps alone,
// gives the zero Advise.
func ParseAdvise(payload []byte) (Advise, error) {
	switch len(payload) {
	case 0:
		return Advise{}, nil
	case 16:
		return Advise{binary.BigEndian.Uint64(payload), binary.BigEndian.Uint64(payload[8:])}, nil
	}
	return Advise{}, fmt.Errorf("%w: ADVISE with %d bytes", stream.ErrDamaged, len(payload))
}

// AppendListen appends LISTEN.
func AppendListen(dst []byte) []byte {
	return stream.AppendCommand(dst, stream.CommandPostcopyListen, nil)
}

// AppendRun appends RUN.
func AppendRun(dst []byte) []byte {
	return stream.AppendCommand(dst, stream.CommandPostcopyRun, nil)
}

// AppendDiscard appends as many RAM_DISCARDs as the ranges need.
func AppendDiscard(dst []byte, block string, ranges []Range) []byte {
	for len(ranges) > 0 {
		n := min(len(ranges), maxDiscards)
		b := append(appendName([]byte{0}, block), 0)
		for _, r := range ranges[:n] {
			b = binary.BigEndian.AppendUint64(b, r.Start)
			b = binary.BigEndian.AppendUint64(b, r.Length)
		}
		dst = stream.AppendCommand(dst, stream.CommandPostcopyDiscard, b)
		ranges = ranges[n:]
	}
	return dst
}

// ParseDiscard parses RAM_DISCARD's payload.
func ParseDiscard(payload []byte) (block string, ranges []Range, err error) {
	damaged := func(what string) (string, []Range, error) {
		return "", nil, fmt.Errorf("%w: RAM_DISCARD %s", stream.ErrDamaged, what)
	}
	if len(payload) < 1 || payload[0] != 0 {
		return damaged("of an unknown version")
	}
	block, rest, ok := cutName(payload[1:])
	if !ok || len(rest) < 1 || rest[0] != 0 {
		return damaged("without a block name")
	}
	if rest = rest[1:]; len(rest) == 0 || len(rest)%16 != 0 || len(rest)/16 > maxDiscards {
		return damaged(fmt.Sprintf("with %d bytes of ranges", len(rest)))
	}
	for ; len(rest) > 0; rest = rest[16:] {
		ranges = append(ranges, Range{binary.BigEndian.Uint64(rest), binary.BigEndian.Uint64(rest[8:])})
	}
	return block, ranges, nil
}

// AppendPackage appends PACKAGED and the package, which must be shorter than
// 4 GiB.
func AppendPackage(dst, pack []byte) []byte {
	n := binary.BigEndian.AppendUint32(nil, uint32(len(pack)))
	return append(stream.AppendCommand(dst, stream.CommandPackaged, n), pack...)
}

// AppendRecvBitmap appends RECV_BITMAP, which asks for a block's bitmap of
// received pages.
func AppendRecvBitmap(dst []byte, block string) []byte {
	return stream.AppendCommand(dst, stream.CommandRecvBitmap, appendName(nil, block))
}

// ParseRecvBitmap parses RECV_BITMAP's payload.
func ParseRecvBitmap(payload []byte) (block string, err error) {
	block, rest, ok := cutName(payload)
	if !ok || len(rest) > 0 {
		return "", fmt.Errorf("%w: RECV_BITMAP %q", stream.ErrDamaged, payload)
	}
	return block, nil
}

// AppendResume appends POSTCOPY_RESUME.
func AppendResume(dst []byte) []byte {
	return stream.AppendCommand(dst, stream.CommandPostcopyResume, nil)
}

// appendName appends a counted string. A name over 255 bytes has no encoding
// and is the caller's mistake.
func appendName(dst []byte, name string) []byte {
	if len(name) > 255 {
		panic("postcopy: block name longer than 255 bytes")
	}
	return append(append(dst, byte(len(name))), name...)
}

// cutName takes a counted, non-empty string off the front of b.
func cutName(b []byte) (name string, rest []byte, ok bool) {
	if len(b) < 2 || b[0] == 0 || len(b) < 1+int(b[0]) {
		return "", nil, false
	}
	n := 1 + int(b[0])
	return string(b[1:n]), b[n:], true
}
