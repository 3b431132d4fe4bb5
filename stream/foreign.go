package stream

import (
	"encoding/binary"
	"errors"
	"io"
)

// Iterable sections other than RAM carry no length either. Those of disks, and
// those that every guest of a kind has, can be delimited by their own records:
//
//	dirty-bitmap, version 1 (migration/block-dirty-bitmap.c):
//	    u8 flags, [08: u8 n, device], [04: u8 n, bitmap], then by flag
//	    10 START     be32 granularity, u8 flags
//	    20 COMPLETE  -
//	    40 BITS      be64 sector, be32 count, [without 02 ZEROES: be64 n, n bytes]
//	    01 EOS       ends the payload
//	    80           extra flags, reserved
//	block, version 1 (migration/block.c):
//	    be64 sector<<9 | flags, then by flag
//	    01 DEVICE_BLOCK  u8 n, device, [without 08 ZERO_BLOCK: 1 MiB]
//	    04 PROGRESS      - (the sector is the percentage)
//	    02 EOS           ends the payload
//	spapr/htab, version 1 (hw/ppc/spapr.c):
//	    be32 0: then be32 index, be16 n, be16 m, n entries of 16 bytes; until
//	            index, n and m are 0
//	    be32 other: nothing follows (START: the table's size; -1: no table)
//	s390-storage_attributes, version 0 (hw/s390x/s390-stattrib.c):
//	    be64 address | flags, then by flag
//	    01 EOS   ends the payload
//	    02 MORE  be64 n, n bytes
//	    08 DONE  -
const (
	bitmapEOS        = 0x01
	bitmapZeroes     = 0x02
	bitmapName       = 0x04
	bitmapDeviceName = 0x08
	bitmapStart      = 0x10
	bitmapComplete   = 0x20
	bitmapBits       = 0x40

	blockDevice   = 0x01
	blockEOS      = 0x02
	blockProgress = 0x04
	blockZero     = 0x08
	blockFlags    = 0x1ff
	blockSize     = 1 << 20

	htabEntry = 16

	attributesEOS   = 0x01
	attributesMore  = 0x02
	attributesDone  = 0x08
	attributesFlags = 0xfff

	// maxChunk is far above the pieces that QEMU makes: 1 KiB of a bitmap,
	// 512 KiB of attributes.
	maxChunk = 64 << 20
)

// CopyForeign consumes the payload of the section whose START, PART or END
// frame was returned last, and hands its bytes to sink verbatim, in pieces
// valid during the call. It knows dirty-bitmap, block, spapr/htab and
// s390-storage_attributes. Others give ErrUnknown with nothing consumed; within a known section what sink has
// seen is consumed and the unknown piece is not. An error of sink is returned
// as it is.
func (r *Reader) CopyForeign(sink func([]byte) error) error {
	if r.state != atPayload {
		return errors.New("stream: CopyForeign without a section")
	}
	// next looks at the next record and returns the length of its head, which
	// is peeked then, that of what follows, and whether the payload ends.
	var next func(first bool) (head int, body int64, last bool, err error)
	type kind struct {
		name    string
		version uint32
	}
	switch (kind{r.current.Name, r.current.Version}) {
	case kind{"dirty-bitmap", 1}:
		next = r.bitmapRecord
	case kind{"block", 1}:
		next = r.blockRecord
	case kind{"spapr/htab", 1}:
		next = r.htabRecord
	case kind{"s390-storage_attributes", 0}:
		next = r.attributesRecord
	default:
		return Unknown("section", r.c.Offset(), "%q version %d", r.current.Name, r.current.Version)
	}
	for first := true; ; first = false {
		head, body, last, err := next(first)
		if err != nil {
			return err
		}
		if err := r.c.Copy(int64(head)+body, sink); err != nil {
			if err == io.ErrUnexpectedEOF {
				err = Wrap(r.current.Name, r.c.Offset(), err)
			}
			return err
		}
		if last {
			return nil
		}
	}
}

func (r *Reader) bitmapRecord(bool) (head int, body int64, last bool, err error) {
	const op = "dirty-bitmap"
	b, err := r.peek(op, 1)
	if err != nil {
		return 0, 0, false, err
	}
	flags := b[0]
	head = 1
	for _, name := range []byte{bitmapDeviceName, bitmapName} {
		if flags&name == 0 {
			continue
		}
		if b, err = r.peek(op, head+1); err != nil {
			return 0, 0, false, err
		}
		head += 1 + int(b[head])
	}
	switch flags &^ (bitmapDeviceName | bitmapName | bitmapZeroes) {
	case bitmapEOS:
		last = true
	case bitmapComplete:
	case bitmapStart:
		head += 5
	case bitmapBits:
		head += 12
		if flags&bitmapZeroes == 0 {
			head += 8
			if b, err = r.peek(op, head); err != nil {
				return 0, 0, false, err
			}
			n := binary.BigEndian.Uint64(b[head-8:])
			if n > maxChunk {
				return 0, 0, false, r.damaged(op, "%d bytes of bits", n)
			}
			body = int64(n)
		}
	default:
		return 0, 0, false, Unknown(op, r.c.Offset(), "flags %#02x", flags)
	}
	_, err = r.peek(op, head)
	return head, body, last, err
}

func (r *Reader) blockRecord(bool) (head int, body int64, last bool, err error) {
	const op = "block"
	b, err := r.peek(op, 8)
	if err != nil {
		return 0, 0, false, err
	}
	head = 8
	switch flags := binary.BigEndian.Uint64(b) & blockFlags; flags {
	case blockEOS:
		last = true
	case blockProgress:
	case blockDevice, blockDevice | blockZero:
		if b, err = r.peek(op, 9); err != nil {
			return 0, 0, false, err
		}
		head = 9 + int(b[8])
		if flags == blockDevice {
			body = blockSize
		}
	default:
		return 0, 0, false, Unknown(op, r.c.Offset(), "flags %#03x", flags)
	}
	_, err = r.peek(op, head)
	return head, body, last, err
}

func (r *Reader) htabRecord(first bool) (head int, body int64, last bool, err error) {
	const op = "spapr/htab"
	if first {
		b, err := r.peek(op, 4)
		if err != nil {
			return 0, 0, false, err
		}
		return 4, 0, binary.BigEndian.Uint32(b) != 0, nil
	}
	b, err := r.peek(op, 8)
	if err != nil {
		return 0, 0, false, err
	}
	n := int64(binary.BigEndian.Uint16(b[4:]))
	return 8, n * htabEntry, binary.BigEndian.Uint64(b) == 0, nil
}

func (r *Reader) attributesRecord(bool) (head int, body int64, last bool, err error) {
	const op = "s390-storage_attributes"
	b, err := r.peek(op, 8)
	if err != nil {
		return 0, 0, false, err
	}
	switch flags := binary.BigEndian.Uint64(b) & attributesFlags; flags {
	case attributesEOS:
		return 8, 0, true, nil
	case attributesDone:
		return 8, 0, false, nil
	case attributesMore:
		if b, err = r.peek(op, 16); err != nil {
			return 0, 0, false, err
		}
		n := binary.BigEndian.Uint64(b[8:])
		if n > maxChunk {
			return 0, 0, false, r.damaged(op, "%d bytes of attributes", n)
		}
		return 16, int64(n), false, nil
	default:
		return 0, 0, false, Unknown(op, r.c.Offset(), "flags %#03x", flags)
	}
}
