package nvram

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/bits"
	"time"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/integrity"
)

// The layout of the file; docs/format-nvram.md draws it. All integers are
// little-endian.
const (
	ExtentSize = 256 << 10 // bytes; what new files are made with

	version      = 2
	headerSize   = 64
	headerCopy   = 4096 // offset of the second header copy
	tableOffset  = 8192 // of the owner table, from the start of its group
	entrySize    = 64   // one cache line, which persistent memory writes back as a whole
	groupExtents = 1024 // extents a group in new files, the first holding the table
	kindPages    = 1    // the only kind of extent so far: slots with guest pages

	// featureKeep is a compatible feature: the file was made with its disk
	// blocks beforehand, so they are its owner's, and freeing leaves them.
	featureKeep = 1 << 0

	// Limits for what a header may claim.
	minExtentSize = 16 << 10
	maxExtentSize = 16 << 20
	maxExtents    = 1 << 32 // extent numbers are 32 bits
)

var magic = [8]byte{'F', 'L', 'I', 'C', 'N', 'V', 'M', '1'}

// geometry is how a file is divided. Group g is the extents g*group up to
// (g+1)*group; the first of them holds the owner table, of `group` entries.
type geometry struct {
	extentSize int64
	group      int64
}

func (g geometry) offset(extent uint32) int64 { return int64(extent) * g.extentSize }

// tableOffset is the file offset of the owner table of a group.
func (g geometry) tableOffset(group int64) int64 {
	return group*g.group*g.extentSize + tableOffset
}

func (g geometry) tableSize() int64 { return g.group * entrySize }

// entryOffset is the file offset of an extent's table entry.
func (g geometry) entryOffset(extent int64) int64 {
	return g.tableOffset(extent/g.group) + extent%g.group*entrySize
}

func (g geometry) check() error {
	pow2 := func(n int64) bool { return n&(n-1) == 0 }
	if g.extentSize < minExtentSize || g.extentSize > maxExtentSize || !pow2(g.extentSize) {
		return fmt.Errorf("extent size %d", g.extentSize)
	}
	if g.group < 2 || !pow2(g.group) || tableOffset+g.tableSize() > g.extentSize {
		return fmt.Errorf("%d extents a group of %d bytes each", g.group, g.extentSize)
	}
	return nil
}

// header is what the file says about itself. Two copies are written in turn, so
// that one that tears leaves the other.
type header struct {
	geometry
	generation uint64 // of two valid copies the higher one counts
	id         uuid.UUID
	capacity   int64 // extents in the whole file at most; 0 is no cap
	// compatible features; a program keeps those that it does not know. Of the
	// incompatible ones there are none yet.
	compatible uint32
}

// copyOffset is where the header of this generation goes: odd ones first.
func (h header) copyOffset() int64 { return int64((h.generation-1)%2) * headerCopy }

func (h header) encode() []byte {
	b := make([]byte, headerSize)
	copy(b, magic[:])
	binary.LittleEndian.PutUint32(b[8:], version)
	binary.LittleEndian.PutUint32(b[12:], uint32(h.extentSize))
	binary.LittleEndian.PutUint32(b[16:], uint32(h.group))
	binary.LittleEndian.PutUint64(b[24:], h.generation)
	copy(b[32:48], h.id[:])
	binary.LittleEndian.PutUint64(b[48:], uint64(h.capacity))
	binary.LittleEndian.PutUint32(b[56:], h.compatible)
	binary.LittleEndian.PutUint32(b[60:], integrity.Checksum(b[:60]))
	return b
}

func decodeHeader(b []byte) (header, error) {
	if !bytes.Equal(b[:8], magic[:]) {
		return header{}, errors.New("not an NVRAM file (no magic number)")
	}
	if integrity.Checksum(b[:60]) != binary.LittleEndian.Uint32(b[60:]) {
		return header{}, errors.New("header checksum mismatch")
	}
	switch v := binary.LittleEndian.Uint32(b[8:]); {
	case v < version:
		return header{}, fmt.Errorf("an earlier flic-migrate has made this NVRAM file, in format version %d; this one reads version %d", v, version)
	case v > version:
		return header{}, fmt.Errorf("a later flic-migrate has made this NVRAM file, in format version %d; this one reads version %d", v, version)
	}
	if f := binary.LittleEndian.Uint32(b[20:]); f != 0 {
		return header{}, fmt.Errorf("feature %d of the NVRAM file is not known to this program", bits.TrailingZeros32(f))
	}
	h := header{
		geometry: geometry{
			extentSize: int64(binary.LittleEndian.Uint32(b[12:])),
			group:      int64(binary.LittleEndian.Uint32(b[16:])),
		},
		generation: binary.LittleEndian.Uint64(b[24:]),
		id:         uuid.UUID(b[32:48]),
		capacity:   int64(binary.LittleEndian.Uint64(b[48:])),
		compatible: binary.LittleEndian.Uint32(b[56:]),
	}
	if err := h.check(); err != nil {
		return header{}, err
	}
	if h.capacity < 0 || h.capacity > maxExtents {
		return header{}, fmt.Errorf("capacity of %d extents", uint64(h.capacity))
	}
	return h, nil
}

// entry is one extent's line in the owner table.
type entry struct {
	owner, store uuid.UUID
	index        uint32    // of this extent among the owner's
	pageSize     uint32    // bytes a slot
	since        time.Time // to the second
}

// entryState is what a table entry turns out to be.
type entryState int

const (
	free entryState = iota // all zero
	taken
	// torn is an entry that was being written, over zeros, when the power
	// failed: persistent memory is written in words of 8 bytes, and one that
	// a full entry never has zero is zero. It was not synced, so it belongs
	// to no committed checkpoint.
	torn
	// damaged is any other that can't be believed. It may well belong to a
	// committed checkpoint, of this store or another, so nobody may take it.
	damaged
)

// checksum covers the entry and its place, so that a table copied from another
// file, or misplaced within this one, is not believed.
func (h header) checksum(b []byte, extent uint32) uint32 {
	var place [20]byte
	copy(place[:], h.id[:])
	binary.LittleEndian.PutUint32(place[16:], extent)
	return crc32.Update(integrity.Checksum(b[:60]), integrity.Castagnoli, place[:])
}

func (h header) encodeEntry(b []byte, extent uint32, e entry) {
	clear(b[:entrySize])
	copy(b, e.owner[:])
	copy(b[16:], e.store[:])
	binary.LittleEndian.PutUint32(b[32:], e.index)
	b[36] = byte(bits.TrailingZeros32(e.pageSize))
	b[37] = kindPages
	binary.LittleEndian.PutUint64(b[40:], uint64(e.since.Unix()))
	binary.LittleEndian.PutUint32(b[60:], h.checksum(b, extent))
}

var zeroEntry [entrySize]byte

func (h header) decodeEntry(b []byte, extent uint32) (entry, entryState) {
	b = b[:entrySize]
	if bytes.Equal(b, zeroEntry[:]) {
		return entry{}, free
	}
	e := entry{
		owner:    uuid.UUID(b[:16]),
		store:    uuid.UUID(b[16:32]),
		index:    binary.LittleEndian.Uint32(b[32:]),
		pageSize: 1 << (b[36] & 31),
		since:    time.Unix(int64(binary.LittleEndian.Uint64(b[40:])), 0),
	}
	if h.checksum(b, extent) == binary.LittleEndian.Uint32(b[60:]) {
		// What this program does not know a later one has written, and the
		// extent is that one's.
		if b[37] != kindPages || !bytes.Equal(b[38:40], zeroEntry[:2]) || !bytes.Equal(b[48:60], zeroEntry[:12]) {
			return e, damaged
		}
		return e, taken
	}
	// Words 0-5 are UUID halves, index with kind, and time, 7 is the checksum.
	// None of them is zero, nor becomes zero by one flipped bit.
	for _, word := range [...]int{0, 8, 16, 24, 32, 40, 56} {
		if binary.LittleEndian.Uint64(b[word:]) == 0 {
			return e, torn
		}
	}
	return e, damaged
}

// validPageSize tells if a guest page size can be a slot size in extents of
// this geometry: QEMU's targets have 1 KiB to 64 KiB.
func (g geometry) validPageSize(n int) bool {
	return n >= 1<<10 && n <= 64<<10 && n&(n-1) == 0 && int64(n) <= g.extentSize
}
