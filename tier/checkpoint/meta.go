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

	"github.com/flic-migrate/flic-migrate/tier/pagemap"
	"github.com/flic-migrate/flic-migrate/tier/workingset"
)

// Meta is the JSON document in a flash image's META frame.
type Meta struct {
	VM           string    `json:"vm"`
	UUID         uuid.UUID `json:"uuid"`
	Created      time.Time `json:"created"`
	Machine      string    `json:"machine,omitempty"`       // QEMU's machine type
	GuestUUID    string    `json:"guest_uuid,omitempty"`    // configuration/uuid
	Capabilities []string  `json:"capabilities,omitempty"`  // configuration/capabilities
	RunState     string    `json:"run_state,omitempty"`     // what the guest did when it was saved, or stopped for that
	PageSize     int       `json:"page_size"`               // bytes
	IgnoreShared bool      `json:"ignore_shared,omitempty"` // x-ignore-shared was set
	Blocks       []Block   `json:"blocks"`                  // in the stream's order
	OpaqueBytes  int64     `json:"opaque_bytes,omitempty"`  // kept verbatim because not understood
	Foreign      []string  `json:"foreign,omitempty"`       // names of other iterable sections
	Footers      bool      `json:"footers,omitempty"`       // sections have footers
	NVRAM        *NVRAM    `json:"nvram,omitempty"`
	Libvirt      *Libvirt  `json:"libvirt,omitempty"` // if the VM is one of libvirt's

	// PageTables are the pages of the guest's own page tables that have
	// entries, the top ones first: what its MMU reads before it can touch anything else.
	PageTables []workingset.PageRun `json:"page_tables,omitempty"`
	// TailChunk is the skeleton chunk with which the device tail begins.
	TailChunk int `json:"tail_chunk"`
	// Table lists where the page table's chunks start.
	Table []pagemap.Start `json:"table"`

	Report Report `json:"report"`
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

// Libvirt is what libvirt needs to start the VM again. The texts are those that a
// save file of its own holds (src/qemu/qemu_saveimage.c).
type Libvirt struct {
	XML    string `json:"xml"`              // the domain; it may hold passwords
	Cookie string `json:"cookie,omitempty"` // <cookie>, with the exact CPU model
	// Persistent is set if the domain was defined and not only running.
	Persistent bool `json:"persistent,omitempty"`
	// SaveFile is all that stood before the stream in the save file that the
	// checkpoint was imported from, verbatim (package saveimage).
	SaveFile []byte `json:"save_file,omitempty"`
}

// MaxLibvirt caps the length of each of Libvirt's texts: libvirt sends and takes
// none that are longer (VIR_NET_MESSAGE_STRING_MAX).
const MaxLibvirt = 4 << 20

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
	// SupersededFlash is those of them that were on flash: written there in vain.
	SupersededFlash int64 `json:"superseded_flash"`
	Surplus         int64 `json:"surplus"`     // hot, but the NVRAM file had no room
	PageTables      int64 `json:"page_tables"` // that hold the guest's page tables

	NoPageTables string `json:"no_page_tables,omitempty"` // why they were not found, or not all

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

// WorkingSetBlocks are the RAM blocks as package workingset wants them.
func (m *Meta) WorkingSetBlocks() []workingset.Block {
	blocks := make([]workingset.Block, len(m.Blocks))
	for i, n := range m.BlockPages() {
		blocks[i] = workingset.Block{Name: m.Blocks[i].Name, Pages: int64(n)}
	}
	return blocks
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
	// More of them than pages would cost the next save of the VM time without
	// end.
	pages := m.BlockPages()
	var all, tables uint64
	for _, n := range pages {
		all += n
	}
	for _, r := range m.PageTables {
		if r.Block < 0 || r.Block >= len(pages) || r.Page >= pages[r.Block] || r.Count > pages[r.Block]-r.Page {
			return nil, fmt.Errorf("%d guest page tables at page %d of RAM block %d", r.Count, r.Page, r.Block)
		}
		if tables += r.Count; tables > all {
			return nil, errors.New("more guest page tables than pages")
		}
	}
	if m.NVRAM != nil && m.NVRAM.Slots < 0 {
		return nil, errors.New("negative number of NVRAM slots")
	}
	if l := m.Libvirt; l != nil && (l.XML == "" || len(l.XML) > MaxLibvirt || len(l.Cookie) > MaxLibvirt) {
		return nil, fmt.Errorf("libvirt domain of %d bytes, cookie of %d", len(l.XML), len(l.Cookie))
	}
	return &m, nil
}

// NVRAMPart is the content of the NVRAM frames: which extents of the NVRAM
// file belong to the checkpoint, in slot order, and for each slot in use, which
// is the prefetch order, its CRC-32C and the page it was taken for. Stored
// little-endian, cut into chunks anywhere:
//
//	u32 number of extents, u32 each
//	u32 number of slots, for each: u32 CRC-32C, u32 block, u64 page
type NVRAMPart struct {
	Extents []uint32
	Slots   []NVRAMSlot
}

// NVRAMSlot describes a slot of the NVRAM part.
type NVRAMSlot struct {
	CRC   uint32
	Block uint32
	Page  uint64
}

const nvramSlotLen = 16

// Append appends the stored form.
func (p *NVRAMPart) Append(dst []byte) []byte {
	le := binary.LittleEndian
	dst = le.AppendUint32(dst, uint32(len(p.Extents)))
	for _, e := range p.Extents {
		dst = le.AppendUint32(dst, e)
	}
	dst = le.AppendUint32(dst, uint32(len(p.Slots)))
	for _, s := range p.Slots {
		dst = le.AppendUint32(dst, s.CRC)
		dst = le.AppendUint32(dst, s.Block)
		dst = le.AppendUint64(dst, s.Page)
	}
	return dst
}

// parseNVRAMPart reads the stored form; pages gives the size of each block.
func parseNVRAMPart(b []byte, pages []uint64) (*NVRAMPart, error) {
	le := binary.LittleEndian
	count := func(size int) (int, error) {
		if len(b) < 4 {
			return 0, errors.New("too short")
		}
		n := int(le.Uint32(b))
		if b = b[4:]; n > len(b)/size {
			return 0, fmt.Errorf("list of %d in %d bytes", n, len(b))
		}
		return n, nil
	}
	n, err := count(4)
	if err != nil {
		return nil, err
	}
	p := &NVRAMPart{Extents: make([]uint32, n)}
	for i := range p.Extents {
		p.Extents[i] = le.Uint32(b[4*i:])
	}
	b = b[4*n:]
	if n, err = count(nvramSlotLen); err != nil {
		return nil, err
	}
	p.Slots = make([]NVRAMSlot, n)
	for i := range p.Slots {
		s := b[nvramSlotLen*i:]
		p.Slots[i] = NVRAMSlot{le.Uint32(s), le.Uint32(s[4:]), le.Uint64(s[8:])}
		if blk := p.Slots[i].Block; int64(blk) >= int64(len(pages)) || p.Slots[i].Page >= pages[blk] {
			return nil, fmt.Errorf("slot %d is for page %d of block %d", i, p.Slots[i].Page, blk)
		}
	}
	if len(b) != nvramSlotLen*n {
		return nil, errors.New("bytes behind its end")
	}
	return p, nil
}
