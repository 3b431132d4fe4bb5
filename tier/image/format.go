// Package image reads and writes the flash image: the one append-only,
// self-describing file that holds a checkpoint's cold pages, its skeleton and
// its page map (FLIC §III-C, the flash tier).
//
//	0      ┌──────────────────────────────┐
//	       │ header (128 B)               │ magic, version, features, page size, UUID
//	128    ├──────────────────────────────┤
//	       │ frame: PAGES     segment 0   │ 24 B frame header + payload,
//	       │ frame: SKELETON  chunk 0     │ in the order of writing; kinds
//	       │ frame: PAGES     segment 1   │ may interleave
//	       │ …                            │
//	       │ frame: PAGE MAP chunks       │
//	       │ frame: NVRAM                 │ extents and slot checksums
//	       │ frame: META                  │ JSON: blocks, report
//	       ├──────────────────────────────┤
//	       │ frame: INDEX                 │ kind, number, stored length of
//	       │                              │ every frame before it
//	       │ frame: IDENTITY              │ JSON, about 1 KB: VM, UUID, NVRAM file
//	       ├──────────────────────────────┤
//	L-128  │ footer (128 B)               │ lengths of IDENTITY, INDEX and META
//	L      └──────────────────────────────┘
//
// All integers are little-endian. Header and footer end in a CRC-32C of their
// other bytes; a frame header carries one CRC-32C for itself and one for its
// payload, and repeats kind and number, so that a frame read from the wrong
// place is told from a damaged one. No byte of the file is outside a checksum,
// and reserved bytes must be zero. An image without a valid footer is not a
// checkpoint.
//
// A segment holds up to SegmentPages pages and is the unit of compression and
// of random access. A page's address in the image is its slot:
// segment number × SegmentPages + position.
//
// What the last 4 KiB hold is all that list, rm and gc want to know ([ReadTail]).
//
// docs/format.md has the tables; the two change together.
package image

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/integrity"
)

// Version is the format version that this package writes, and the only one that
// it reads:
//
//	1: before the format was fixed; nobody has data in it
//	2: feature words, IDENTITY, self-describing runs in the page map
const Version = 2

const (
	// Magic begins an image.
	Magic = "FLICIMG\x00"

	footerMagic = "FLICEND\x00"

	// HeaderLen and FooterLen are the fixed sizes of both ends, in bytes.
	HeaderLen = 128
	FooterLen = 128
	// FrameHeaderLen is the size of a frame header in bytes.
	FrameHeaderLen = 24
	indexEntryLen  = 9

	// MaxSegmentPages caps the header's field.
	MaxSegmentPages = 256

	minPageSize = 1 << 8
	maxPageSize = 1 << 16
	// MaxChunk caps the raw length of a chunk of every kind that is neither a
	// segment nor META nor IDENTITY.
	MaxChunk = 256 << 10
	// maxRecord is how much longer than a page a deflated one may be, with
	// its length: zlib's bound for 64 KiB is 47 bytes.
	maxRecord = 64
	// MaxIdentity caps the IDENTITY document. What it holds is a VM's name of at
	// most 128 bytes, the path of an NVRAM file, and a line for each of at most
	// some hundred references.
	MaxIdentity = 64 << 10
	// MaxMeta caps the META document: 4 MiB for each of libvirt's two texts, 2 MiB
	// for what stood before the stream in its save file, 4 MiB for 65536 runs of
	// the guest's page tables, and 2 MiB for 4096 RAM blocks and the list of the
	// page map's chunks.
	MaxMeta = 16 << 20
)

// Kind says what a frame holds.
type Kind uint8

// The kinds of frame. Numbers are part of the format. 1 to 15 are segments, 16 to 31
// chunks that pages need, 32 to 127 what describes the image; a reader refuses an
// image with a kind of these ranges that it does not know. It passes over frames of
// the kinds from 128 on, which nothing may need that is in the image.
const (
	// Pages is a segment of whole guest pages, one after the other.
	Pages Kind = 1
	// Records is a segment of COMPRESS_PAGE payloads, kept as QEMU deflated
	// them so that the restored stream is the saved one byte for byte: be32
	// count, then count × be32 length, then the payloads.
	Records Kind = 2
	// Deltas is a segment of pages as changed words against a base each (package
	// delta), laid out as Records are. BASES says which bytes the bases are. With
	// HasPieces bit 31 of a length says that its payload is pieces in place of words.
	Deltas Kind = 3

	// Skeleton is a chunk of the skeleton log (package skeleton).
	Skeleton Kind = 16
	// PageMap is a chunk of the page map (package pagemap).
	PageMap Kind = 17
	// NVRAM lists the NVRAM part's extents and the CRC-32C of each slot.
	NVRAM Kind = 18
	// References lists the checkpoints whose images have bytes of this one's pages,
	// and what of them is needed (package checkpoint).
	References Kind = 19
	// Digests are hashes of the pages in this image and in its NVRAM part, by which
	// others that refer to them check what they get (package digest).
	Digests Kind = 20
	// Disks lists the disk images that have bytes of this one's pages, and where those
	// are in them (package checkpoint).
	Disks Kind = 21
	// Bases is a chunk of the map from deltas to what they are against.
	Bases Kind = 22

	// Meta is the JSON document that describes the checkpoint.
	Meta Kind = 32
	// Index is the list of all frames before it; the footer points at it.
	Index Kind = 33
	// Identity is the small JSON document that says what a store must know.
	Identity Kind = 34

	firstOptional Kind = 128
)

// InPieces is the bit of a length in a Deltas segment that says what its payload is.
const InPieces = 1 << 31

var kindNames = map[Kind]string{
	Pages: "PAGES", Records: "RECORDS", Deltas: "DELTAS", Skeleton: "SKELETON", PageMap: "PAGE MAP", NVRAM: "NVRAM",
	References: "REFERENCES", Digests: "DIGESTS", Disks: "DISKS", Bases: "BASES", Meta: "META", Index: "INDEX", Identity: "IDENTITY",
}

func (k Kind) String() string {
	if name := kindNames[k]; name != "" {
		return name
	}
	return fmt.Sprintf("kind %d", uint8(k))
}

// IsSegment tells whether frames of this kind hold page content and are
// numbered together as segments.
func (k Kind) IsSegment() bool { return k >= Pages && k <= Deltas }

// readable tells whether a frame of this kind may stand before the index.
func (k Kind) readable() bool {
	return k >= firstOptional || kindNames[k] != "" && k != Index && k != Identity
}

// Features are the feature words, which are in the header and again in the footer.
// A reader refuses an image with a bit in Incompat that it does not know, and may
// take no notice of one in Compat. A writer sets a bit in Incompat if a reader that
// knows nothing of it would give wrong bytes, or remove what others need.
type Features struct{ Incompat, Compat uint64 }

// Bits of Incompat. Those that this version does not understand have names too, so
// that it can say what a later one's image needs.
const (
	// HasDeltas: pages may be in DELTAS segments.
	HasDeltas = 1 << iota
	// HasReferences: there is a REFERENCES frame, and the images that it lists must
	// be kept.
	HasReferences
	// HasDisks: there are DISKS frames, and pages may be in the disk images that they
	// list.
	HasDisks
	// HasPieces: pages in DELTAS segments may be pieces of their base.
	HasPieces
	// HasKept: the store may keep copies of disk images with the checkpoint, which
	// IDENTITY lists, and pages may be on them.
	HasKept

	knownIncompat = HasDeltas | HasReferences | HasDisks | HasPieces | HasKept
)

var incompatNames = []string{"deltas", "references", "disks", "pieces", "kept disks"}

// HasDigests is a bit of Compat: there are DIGESTS, so that other checkpoints can
// refer to this one.
const HasDigests = 1 << 0

// announced is the bit of Incompat without which an image has no frame of a kind: a
// reader that knows nothing of it must have been warned by the header.
func (k Kind) announced() uint64 {
	switch k {
	case Deltas, Bases:
		return HasDeltas
	case References:
		return HasReferences
	case Disks:
		return HasDisks
	}
	return 0
}

func (f Features) check() error {
	unknown := f.Incompat &^ knownIncompat
	if unknown == 0 {
		return nil
	}
	var names []string
	for bit := range 64 {
		switch {
		case unknown>>bit&1 == 0:
		case bit < len(incompatNames):
			names = append(names, fmt.Sprintf("%s (bit %d)", incompatNames[bit], bit))
		default:
			names = append(names, fmt.Sprintf("bit %d", bit))
		}
	}
	return &UnsupportedError{Why: "it needs features that this flic-migrate does not have: " + strings.Join(names, ", ")}
}

// UnsupportedError says that an image, which may be whole, is not one that this
// package can read.
type UnsupportedError struct {
	File    string
	Why     string
	Version uint32 // of the format, if that is why; otherwise 0
}

func (e *UnsupportedError) Error() string { return e.File + ": " + e.Why }

// unsupportedVersion is what is said of a version that is not this package's.
func unsupportedVersion(v uint32) error {
	if v < Version {
		return &UnsupportedError{Version: v, Why: fmt.Sprintf("an earlier flic-migrate wrote it, in version %d of the format; this one reads version %d", v, Version)}
	}
	return &UnsupportedError{Version: v, Why: fmt.Sprintf("it is in version %d of the format; this flic-migrate reads version %d", v, Version)}
}

// Header is the first 128 bytes of an image:
//
//	0  magic 8 B             24 incompatible features u64   56 start of the save u64, ns
//	8  u32 version           32 compatible features u64     64 0, 60 B
//	12 u32 page size         40 UUID 16 B                   124 u32 CRC-32C
//	16 u32 pages in a segment
//	20 u32 0
type Header struct {
	PageSize     int // bytes of a guest page (TARGET_PAGE_SIZE)
	SegmentPages int // pages in a full segment
	Features     Features
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
	le.PutUint64(b[24:], h.Features.Incompat)
	le.PutUint64(b[32:], h.Features.Compat)
	copy(b[40:56], h.UUID[:])
	le.PutUint64(b[56:], uint64(h.Created.UnixNano()))
	le.PutUint32(b[HeaderLen-4:], integrity.Checksum(b[:HeaderLen-4]))
	return append(dst, b...)
}

func parseHeader(b []byte) (Header, error) {
	le := binary.LittleEndian
	if len(b) < lenOfOne || string(b[:8]) != Magic {
		return Header{}, errors.New("not a flash image")
	}
	if err := checkEnd(b, HeaderLen, b[:lenOfOne]); err != nil {
		return Header{}, err
	}
	h := Header{
		PageSize:     int(le.Uint32(b[12:])),
		SegmentPages: int(le.Uint32(b[16:])),
		Features:     Features{le.Uint64(b[24:]), le.Uint64(b[32:])},
		UUID:         uuid.UUID(b[40:56]),
		Created:      time.Unix(0, int64(le.Uint64(b[56:]))),
	}
	if err := h.Features.check(); err != nil {
		return h, err
	}
	if !allZero(b[20:24]) || !allZero(b[64:HeaderLen-4]) {
		return h, errReserved
	}
	return h, h.check()
}

// lenOfOne is the length of header and footer in version 1.
const lenOfOne = 64

// checkEnd checks version and checksum of b, which should be n bytes of header or
// footer; one is what it would be in version 1, which had its checksum elsewhere.
func checkEnd(b []byte, n int, one []byte) error {
	le := binary.LittleEndian
	if string(one[:4]) == Magic[:4] && le.Uint32(one[8:]) == 1 && le.Uint32(one[lenOfOne-4:]) == integrity.Checksum(one[:lenOfOne-4]) {
		return unsupportedVersion(1)
	}
	switch {
	case len(b) != n:
		return errEndsInside
	case le.Uint32(b[n-4:]) != integrity.Checksum(b[:n-4]):
		return integrity.ErrChecksum
	case le.Uint32(b[8:]) != Version:
		return unsupportedVersion(le.Uint32(b[8:]))
	}
	return nil
}

var errReserved = errors.New("reserved bytes are in use")

func allZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
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
	case Records, Deltas:
		return 4 + int64(h.SegmentPages)*(int64(h.PageSize)+maxRecord)
	case Meta:
		return MaxMeta
	case Identity:
		return MaxIdentity
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
		return frameHeader{}, fmt.Errorf("frame header: %w", errReserved)
	}
	return frameHeader{
		kind: Kind(b[0]), codec: Codec(b[1]),
		raw: le.Uint32(b[4:]), stored: le.Uint32(b[8:]),
		number: le.Uint32(b[12:]), crc: le.Uint32(b[16:]),
	}, nil
}

// footer is the last 128 bytes:
//
//	0  magic 8 B             24 compatible features u64    56 length of the image u64
//	8  u32 version           32 offset of the INDEX u64    64 UUID 16 B
//	12 u32 0                 40 its stored length u32      80 0, 44 B
//	16 incompatible features 44 frames before it u32       124 u32 CRC-32C
//	   u64                   48 META's stored length u32
//	                         52 IDENTITY's u32
//
// META is the last frame before the INDEX, IDENTITY the one between it and the footer.
type footer struct {
	features       Features
	indexOffset    uint64
	indexStored    uint32
	frames         uint32
	metaStored     uint32
	identityStored uint32
	length         uint64
	uuid           uuid.UUID
}

func (f footer) append(dst []byte) []byte {
	b := make([]byte, FooterLen)
	copy(b, footerMagic)
	le := binary.LittleEndian
	le.PutUint32(b[8:], Version)
	le.PutUint64(b[16:], f.features.Incompat)
	le.PutUint64(b[24:], f.features.Compat)
	le.PutUint64(b[32:], f.indexOffset)
	le.PutUint32(b[40:], f.indexStored)
	le.PutUint32(b[44:], f.frames)
	le.PutUint32(b[48:], f.metaStored)
	le.PutUint32(b[52:], f.identityStored)
	le.PutUint64(b[56:], f.length)
	copy(b[64:80], f.uuid[:])
	le.PutUint32(b[FooterLen-4:], integrity.Checksum(b[:FooterLen-4]))
	return append(dst, b...)
}

// parseFooter reads the footer at the end of b.
func parseFooter(b []byte) (footer, error) {
	le := binary.LittleEndian
	one := b[max(0, len(b)-lenOfOne):]
	b = b[max(0, len(b)-FooterLen):]
	if len(one) < lenOfOne || string(b[:8]) != footerMagic && string(one[:8]) != footerMagic {
		return footer{}, errors.New("no footer: the image is not whole")
	}
	if err := checkEnd(b, FooterLen, one); err != nil {
		return footer{}, err
	}
	f := footer{
		features:       Features{le.Uint64(b[16:]), le.Uint64(b[24:])},
		indexOffset:    le.Uint64(b[32:]),
		indexStored:    le.Uint32(b[40:]),
		frames:         le.Uint32(b[44:]),
		metaStored:     le.Uint32(b[48:]),
		identityStored: le.Uint32(b[52:]),
		length:         le.Uint64(b[56:]),
		uuid:           uuid.UUID(b[64:80]),
	}
	if err := f.features.check(); err != nil {
		return f, err
	}
	if !allZero(b[12:16]) || !allZero(b[80:FooterLen-4]) {
		return f, errReserved
	}
	return f, nil
}
