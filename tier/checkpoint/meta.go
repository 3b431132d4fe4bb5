// Package checkpoint is the read side of a stored checkpoint: what it says
// about itself, its page table, and the content of its pages from whichever
// tier they are in.
package checkpoint

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"
)

// Meta is the JSON document in a flash image's META frame.
type Meta struct {
	VM           string    `json:"vm"`
	UUID         uuid.UUID `json:"uuid"`
	Created      time.Time `json:"created"`
	Machine      string    `json:"machine,omitempty"`       // QEMU's machine type
	GuestUUID    string    `json:"guest_uuid,omitempty"`    // configuration/uuid
	Capabilities []string  `json:"capabilities,omitempty"`  // configuration/capabilities
	RunState     string    `json:"run_state,omitempty"`     // globalstate when saved
	PageSize     int       `json:"page_size"`               // bytes
	IgnoreShared bool      `json:"ignore_shared,omitempty"` // x-ignore-shared was set
	Blocks       []Block   `json:"blocks"`                  // in the stream's order
	OpaqueBytes  int64     `json:"opaque_bytes,omitempty"`  // kept verbatim because not understood
	NVRAM        *NVRAM    `json:"nvram,omitempty"`
	Report       Report    `json:"report"`
}

// Block is a RAM block.
type Block struct {
	Name     string  `json:"name"`
	Used     uint64  `json:"used"`                // bytes
	PageSize uint64  `json:"page_size,omitempty"` // host page size, if the stream gave it
	GPA      *uint64 `json:"gpa,omitempty"`       // guest-physical address, if the stream gave it
}

// NVRAM names the file that holds the NVRAM part.
type NVRAM struct {
	Path     string    `json:"path"`
	UUID     uuid.UUID `json:"uuid"`
	Slots    int       `json:"slots"`              // pages in use
	Volatile bool      `json:"volatile,omitempty"` // lost at power-off
}

// Report is what a save did. Counts are pages unless they say otherwise.
type Report struct {
	BytesIn    int64 `json:"bytes_in"`   // of the stream
	Pages      int64 `json:"pages"`      // of all RAM blocks
	Zero       int64 `json:"zero"`       // zero, however they were sent
	ZeroAsData int64 `json:"zero_data"`  // those of them that QEMU sent as data
	Duplicate  int64 `json:"duplicate"`  // equal to another page of this checkpoint
	Hot        int64 `json:"hot"`        // in the NVRAM part
	Cold       int64 `json:"cold"`       // in the flash image
	Disk       int64 `json:"disk"`       // equal to a block of a disk image
	Delta      int64 `json:"delta"`      // stored against the parent's page
	Resent     int64 `json:"resent"`     // records of pages that had come before
	Superseded int64 `json:"superseded"` // stored, then replaced by a later version
	Surplus    int64 `json:"surplus"`    // hot, but the NVRAM file had no room

	NVRAMBytes   int64 `json:"nvram_bytes"`   // page content in NVRAM
	FlashBytes   int64 `json:"flash_bytes"`   // size of the image file
	SampledBytes int64 `json:"sampled_bytes"` // read for partial hashes
	HashedBytes  int64 `json:"hashed_bytes"`  // read for full hashes
	NonZeroBytes int64 `json:"nonzero_bytes"` // what full hashing of every non-zero page would have read

	ChunkSize  int    `json:"chunk_size"`  // bytes, of deduplication
	SampleSize int    `json:"sample_size"` // bytes of a chunk
	Codec      string `json:"codec"`

	Seconds Seconds `json:"seconds"`
}

// Seconds are wall times by phase, in order.
type Seconds struct {
	RAM    float64 `json:"ram"`    // reading and placing pages
	Sync   float64 `json:"sync"`   // making them durable, the device tail held back
	Tail   float64 `json:"tail"`   // reading the device tail
	Commit float64 `json:"commit"` // table, footer, fsync, rename, directory fsync
	Total  float64 `json:"total"`
}

// BlockPages is the number of pages of each RAM block. A block's last page may
// be a part of one.
func (m *Meta) BlockPages() []uint64 {
	n := make([]uint64, len(m.Blocks))
	for i, b := range m.Blocks {
		n[i] = (b.Used + uint64(m.PageSize) - 1) / uint64(m.PageSize)
	}
	return n
}

// MaxBlocks caps the number of RAM blocks, here as in the stream.
const MaxBlocks = 4096

func parseMeta(b []byte) (*Meta, error) {
	var m Meta
	if err := json.Unmarshal(b, &m); err != nil {
		return nil, err
	}
	if m.PageSize <= 0 || m.PageSize&(m.PageSize-1) != 0 {
		return nil, fmt.Errorf("page size %d", m.PageSize)
	}
	if len(m.Blocks) > MaxBlocks {
		return nil, fmt.Errorf("%d RAM blocks", len(m.Blocks))
	}
	for _, blk := range m.Blocks {
		if blk.Name == "" || len(blk.Name) > 255 || blk.Used > 1<<46 {
			return nil, fmt.Errorf("RAM block %q of %d bytes", blk.Name, blk.Used)
		}
	}
	if m.NVRAM != nil && m.NVRAM.Slots < 0 {
		return nil, errors.New("negative number of NVRAM slots")
	}
	return &m, nil
}

// NVRAMPart is the content of the NVRAM frames: which extents of the NVRAM
// file belong to the checkpoint, in slot order, and the CRC-32C of each slot
// in use. Stored little-endian, cut into chunks anywhere:
//
//	u32 number of extents, u32 each;  u32 number of slots, u32 CRC-32C each
type NVRAMPart struct {
	Extents []uint32
	CRC     []uint32
}

// Append appends the stored form.
func (p *NVRAMPart) Append(dst []byte) []byte {
	for _, list := range [][]uint32{p.Extents, p.CRC} {
		dst = binary.LittleEndian.AppendUint32(dst, uint32(len(list)))
		for _, v := range list {
			dst = binary.LittleEndian.AppendUint32(dst, v)
		}
	}
	return dst
}

func parseNVRAMPart(b []byte) (*NVRAMPart, error) {
	var lists [2][]uint32
	for i := range lists {
		if len(b) < 4 {
			return nil, errors.New("too short")
		}
		n := int(binary.LittleEndian.Uint32(b))
		b = b[4:]
		if n > len(b)/4 {
			return nil, fmt.Errorf("list of %d numbers in %d bytes", n, len(b))
		}
		lists[i] = make([]uint32, n)
		for j := range lists[i] {
			lists[i][j] = binary.LittleEndian.Uint32(b[4*j:])
		}
		b = b[4*n:]
	}
	if len(b) != 0 {
		return nil, errors.New("bytes behind its end")
	}
	return &NVRAMPart{lists[0], lists[1]}, nil
}
