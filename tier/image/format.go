// Package image reads and writes the flash image: the one append-only,
// self-describing file that holds a checkpoint's cold pages, its skeleton and
// its page table (FLIC §III-C, the flash tier).
//
//	0      ┌──────────────────────────────┐
//	       │ header (64 B)                │ magic, version, page size, UUID
//	64     ├──────────────────────────────┤
//	       │ frame: PAGES     segment 0   │ 24 B frame header + payload,
//	       │ frame: SKELETON  chunk 0     │ in the order of writing; kinds
//	       │ frame: PAGES     segment 1   │ may interleave
//	       │ …                            │
//	       │ frame: PAGE TABLE chunks     │
//	       │ frame: NVRAM                 │ extents and slot checksums
//	       │ frame: META                  │ JSON: VM, blocks, report
//	       ├──────────────────────────────┤
//	       │ frame: INDEX                 │ kind, number, stored length of
//	       │                              │ every frame before it
//	       ├──────────────────────────────┤
//	L-64   │ footer (64 B)                │ where INDEX is; image length
//	L      └──────────────────────────────┘
//
// All integers are little-endian. Header and footer end in a CRC-32C of their
// other bytes; a frame header carries one CRC-32C for itself and one for its
// payload, and repeats kind and number, so that a frame read from the wrong
// place is told from a damaged one. No byte of the file is outside a checksum.
// An image without a valid footer is not a checkpoint.
//
// A segment holds up to SegmentPages pages and is the unit of compression and
// of random access. A page's address in the image is its slot:
// segment number × SegmentPages + position.
//
// docs/format.md has the tables; the two change together.
package image

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/integrity"
)

// Version is the format version this package writes. Readers accept the
// versions listed here and refuse all others:
//
//	1: first version
const Version = 1

const (
	// Magic begins an image.
	Magic = "FLICIMG\x00"

	footerMagic = "FLICEND\x00"

	// HeaderLen and FooterLen are the fixed sizes of both ends, in bytes.
	HeaderLen = 64
	FooterLen = 64
	// FrameHeaderLen is the size of a frame header in bytes.
	FrameHeaderLen = 24
	indexEntryLen  = 9

	// MaxSegmentPages caps the header's field.
	MaxSegmentPages = 256

	minPageSize = 1 << 8
	maxPageSize = 1 << 16
	// MaxChunk caps the raw length of a skeleton, page-table or NVRAM chunk.
	MaxChunk = 256 << 10
	// maxRecord is how much longer than a page a deflated one may be, with
	// its length: zlib's bound for 64 KiB is 47 bytes.
	maxRecord = 64
	// maxMeta caps the META document.
	maxMeta = 16 << 20
)

// Kind says what a frame holds.
type Kind uint8

// The kinds of frame. Numbers are part of the format.
const (
	// Pages is a segment of whole guest pages, one after the other.
	Pages Kind = 1
	// Records is a segment of COMPRESS_PAGE payloads, kept as QEMU deflated
	// them so that the restored stream is the saved one byte for byte: be32
	// count, then count × be32 length, then the payloads. Numbered together
	// with Pages.
	Records Kind = 2
	// Skeleton is a chunk of the skeleton log (package skeleton).
	Skeleton Kind = 3
	// PageTable is a chunk of the page table (package pagemap).
	PageTable Kind = 4
	// NVRAM lists the NVRAM part's extents and the CRC-32C of each slot.
	NVRAM Kind = 5
	// Meta is the JSON document that describes the checkpoint.
	Meta Kind = 6
	// Index is the list of all frames; the footer points at it.
	Index Kind = 7
)

func (k Kind) String() string {
	switch k {
	case Pages:
		return "PAGES"
	case Records:
		return "RECORDS"
	case Skeleton:
		return "SKELETON"
	case PageTable:
		return "PAGE TABLE"
	case NVRAM:
		return "NVRAM"
	case Meta:
		return "META"
	case Index:
		return "INDEX"
	}
	return fmt.Sprintf("kind %d", uint8(k))
}

// IsSegment tells whether frames of this kind hold page content and are
// numbered as segments.
func (k Kind) IsSegment() bool { return k == Pages || k == Records }

// Header is the first 64 bytes of an image.
type Header struct {
	PageSize     int       // bytes of a guest page (TARGET_PAGE_SIZE)
	SegmentPages int       // pages in a full segment
	UUID         uuid.UUID // the checkpoint's identity; owner of its NVRAM extents
	Created      time.Time // start of the save
}

func (h Header) append(dst []byte) []byte {
	b := make([]byte, HeaderLen)
	copy(b, Magic)
	le := binary.LittleEndian
	le.PutUint32(b[8:], Version)
	le.PutUint32(b[12:], uint32(h.PageSize))
	le.PutUint32(b[16:], uint32(h.SegmentPages))
	copy(b[24:40], h.UUID[:])
	le.PutUint64(b[40:], uint64(h.Created.UnixNano()))
	le.PutUint32(b[60:], integrity.Checksum(b[:60]))
	return append(dst, b...)
}

func parseHeader(b []byte) (Header, error) {
	le := binary.LittleEndian
	if len(b) != HeaderLen || string(b[:8]) != Magic {
		return Header{}, errors.New("not a flash image")
	}
	if le.Uint32(b[60:]) != integrity.Checksum(b[:60]) {
		return Header{}, integrity.ErrChecksum
	}
	if v := le.Uint32(b[8:]); v != Version {
		return Header{}, fmt.Errorf("format version %d is not known here", v)
	}
	h := Header{
		PageSize:     int(le.Uint32(b[12:])),
		SegmentPages: int(le.Uint32(b[16:])),
		Created:      time.Unix(0, int64(le.Uint64(b[40:]))),
	}
	copy(h.UUID[:], b[24:40])
	return h, h.check()
}

func (h Header) check() error {
	if h.PageSize < minPageSize || h.PageSize > maxPageSize || h.PageSize&(h.PageSize-1) != 0 {
		return fmt.Errorf("page size %d", h.PageSize)
	}
	if h.SegmentPages < 1 || h.SegmentPages > MaxSegmentPages {
		return fmt.Errorf("%d pages in a segment", h.SegmentPages)
	}
	return nil
}

// maxRaw caps the decoded length of a frame of this kind.
func (h Header) maxRaw(k Kind) int64 {
	switch k {
	case Pages:
		return int64(h.SegmentPages) * int64(h.PageSize)
	case Records:
		return 4 + int64(h.SegmentPages)*(int64(h.PageSize)+maxRecord)
	case Meta:
		return maxMeta
	}
	return MaxChunk
}

// frameHeader precedes every payload:
//
//	0  u8  kind      4  u32 raw length      16 u32 CRC-32C of the payload
//	1  u8  codec     8  u32 stored length   20 u32 CRC-32C of bytes 0–19
//	2  u16 0         12 u32 number
type frameHeader struct {
	kind   Kind
	codec  Codec
	raw    uint32
	stored uint32
	number uint32
	crc    uint32
}

func (f frameHeader) put(b []byte) {
	le := binary.LittleEndian
	b[0], b[1], b[2], b[3] = byte(f.kind), byte(f.codec), 0, 0
	le.PutUint32(b[4:], f.raw)
	le.PutUint32(b[8:], f.stored)
	le.PutUint32(b[12:], f.number)
	le.PutUint32(b[16:], f.crc)
	le.PutUint32(b[20:], integrity.Checksum(b[:20]))
}

func parseFrameHeader(b []byte) (frameHeader, error) {
	le := binary.LittleEndian
	if le.Uint32(b[20:]) != integrity.Checksum(b[:20]) {
		return frameHeader{}, fmt.Errorf("frame header: %w", integrity.ErrChecksum)
	}
	if b[2] != 0 || b[3] != 0 {
		return frameHeader{}, errors.New("frame header: reserved bytes in use")
	}
	return frameHeader{
		kind: Kind(b[0]), codec: Codec(b[1]),
		raw: le.Uint32(b[4:]), stored: le.Uint32(b[8:]),
		number: le.Uint32(b[12:]), crc: le.Uint32(b[16:]),
	}, nil
}

// footer is the last 64 bytes: magic, version u32, 0 u32, offset of the INDEX
// frame u64, its stored length u32, number of frames before it u32, length of
// the image u64, UUID 16 B, 0 u32, CRC-32C u32.
type footer struct {
	indexOffset uint64
	indexStored uint32
	frames      uint32
	length      uint64
	uuid        uuid.UUID
}

func (f footer) append(dst []byte) []byte {
	b := make([]byte, FooterLen)
	copy(b, footerMagic)
	le := binary.LittleEndian
	le.PutUint32(b[8:], Version)
	le.PutUint64(b[16:], f.indexOffset)
	le.PutUint32(b[24:], f.indexStored)
	le.PutUint32(b[28:], f.frames)
	le.PutUint64(b[32:], f.length)
	copy(b[40:56], f.uuid[:])
	le.PutUint32(b[60:], integrity.Checksum(b[:60]))
	return append(dst, b...)
}

func parseFooter(b []byte) (footer, error) {
	le := binary.LittleEndian
	if len(b) != FooterLen || string(b[:8]) != footerMagic {
		return footer{}, errors.New("no footer: the image is not whole")
	}
	if le.Uint32(b[60:]) != integrity.Checksum(b[:60]) {
		return footer{}, integrity.ErrChecksum
	}
	if v := le.Uint32(b[8:]); v != Version {
		return footer{}, fmt.Errorf("format version %d is not known here", v)
	}
	f := footer{
		indexOffset: le.Uint64(b[16:]),
		indexStored: le.Uint32(b[24:]),
		frames:      le.Uint32(b[28:]),
		length:      le.Uint64(b[32:]),
	}
	copy(f.uuid[:], b[40:56])
	return f, nil
}
