// Package checkpoint is the read side of a stored checkpoint: what it says
// about itself, its page map, and the content of its pages from whichever
// tier they are in.
package checkpoint

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/tier/digest"
	"github.com/flic-migrate/flic-migrate/tier/disk"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/pagemap"
	"github.com/flic-migrate/flic-migrate/tier/source"
	"github.com/flic-migrate/flic-migrate/tier/workingset"
)

// Meta is all that a checkpoint says about itself. It is stored in two parts, so
// that those who look at many checkpoints read little of each.
type Meta struct {
	Identity
	Bulk
}

// Identity is the JSON document in a flash image's IDENTITY frame: what a store must
// know to list the checkpoint, to remove it and to tell what belongs to it.
type Identity struct {
	VM     string    `json:"vm"`
	Number int       `json:"number,omitempty"` // in its store; of an image outside of one, 0
	UUID   uuid.UUID `json:"uuid"`
	// Origin is the UUID of the image that was there first, if this one has taken the place
	// of another of the same checkpoint (flatten, absorb, unite); zero: it is the first.
	Origin   uuid.UUID `json:"origin,omitzero"`
	Created  time.Time `json:"created"`
	Machine  string    `json:"machine,omitempty"`   // QEMU's machine type
	RunState string    `json:"run_state,omitempty"` // what the guest did when it was saved, or stopped for that
	PageSize int       `json:"page_size"`           // bytes
	RAMBytes uint64    `json:"ram_bytes"`           // of all RAM blocks
	NVRAM    *NVRAM    `json:"nvram,omitempty"`
	// TrustDomain is whose pages it may have in common with others; empty: its own VM's
	// alone, as of earlier versions.
	TrustDomain string `json:"trust_domain,omitempty"`

	// References are the checkpoints whose images have bytes of this one's pages,
	// in the order of the REFERENCES frame, which says which bytes.
	References refList `json:"references,omitempty"`
	// Disks is how many disk images have bytes of this one's pages; DISKS lists them.
	Disks int `json:"disks,omitempty"`
	// DiskSlots is how many pages DISKS lists, if they were copied from the disks: they are
	// in .moved pieces, numbered behind the slots of the NVRAM part, and no disk is needed.
	DiskSlots int `json:"disk_slots,omitempty"`
	// Kept are the disk images that the store keeps with the checkpoint, by the UUIDs that
	// name their files: VMDisks says what they are, and pages may be on them. They are this
	// checkpoint's alone, and go with it.
	Kept keptList `json:"kept,omitempty"`
	// Digests tells how to check the image's pages by its DIGESTS; nil: it has none,
	// and nobody can refer to it.
	Digests *Digests `json:"digests,omitempty"`
}

// First is the UUID of the checkpoint's first image, by which two images can be known to be
// of one checkpoint. Their bytes need not be in the same places.
func (id *Identity) First() uuid.UUID {
	if id.Origin != uuid.Nil {
		return id.Origin
	}
	return id.UUID
}

// Digests is what must be known to check a page by its digest (package digest).
type Digests struct {
	Algorithm digest.Algorithm `json:"algorithm"`
	// Key is the trust domain's when a VM begins, and handed on, so that digests compare.
	Key  digest.Key  `json:"key,omitzero"`
	Root digest.Root `json:"root"` // of the table of DIGESTS
}

// Bulk is the JSON document in a flash image's META frame.
type Bulk struct {
	GuestUUID    string    `json:"guest_uuid,omitempty"`    // configuration/uuid
	Capabilities nameList  `json:"capabilities,omitempty"`  // configuration/capabilities
	IgnoreShared bool      `json:"ignore_shared,omitempty"` // x-ignore-shared was set
	Blocks       blockList `json:"blocks"`                  // in the stream's order
	OpaqueBytes  int64     `json:"opaque_bytes,omitempty"`  // kept verbatim because not understood
	Foreign      nameList  `json:"foreign,omitempty"`       // names of other iterable sections
	Footers      bool      `json:"footers,omitempty"`       // sections have footers
	Libvirt      *Libvirt  `json:"libvirt,omitempty"`       // if the VM is one of libvirt's

	// VMDisks are the VM's disks as they were, whose state belongs to this memory; nil if
	// they are not known.
	VMDisks vmDisks `json:"vm_disks,omitempty"`

	// PageTables are the pages of the guest's own page tables that have
	// entries, the top ones first: what its MMU reads before it can touch anything else.
	PageTables runList `json:"page_tables,omitempty"`
	// TailChunk is the skeleton chunk with which the device tail begins.
	TailChunk int `json:"tail_chunk"`
	// MapChunks lists where the page map's chunks start.
	MapChunks startList `json:"table"`
	// Bases lists where the chunks of the map from deltas to their bases start:
	// block 0 are the slots of this image, block i+1 those of reference i.
	Bases startList `json:"bases,omitempty"`

	Report Report `json:"report"`
}

// The lists of both documents have types of their own because each has its limit,
// which is checked while it is decoded: {} is short and what it stands for is not.
type (
	blockList []ramparse.Block
	nameList  []string
	runList   []workingset.PageRun
	startList []pagemap.Start
	refList   []uuid.UUID
	diskUses  []DiskUse
	keptList  []uuid.UUID

	unusedDisks []DiskUnused
	vmDisks     []VMDisk
	layerList   []disk.Identity
)

const (
	// MaxBlocks caps the number of RAM blocks, here as in the stream.
	MaxBlocks = 4096
	// MaxTableRuns caps the list of the guest's page tables.
	MaxTableRuns = 1 << 16
	maxNames     = 4096
	maxMapChunks = 1 << 19
	maxRefs      = 1024
	maxUnused    = 1024 // disks that a save did not look in
	maxVMDisks   = 256
	maxLayers    = 64
)

func (l *blockList) UnmarshalJSON(b []byte) error { return integrity.DecodeList(l, b, MaxBlocks) }
func (l *nameList) UnmarshalJSON(b []byte) error  { return integrity.DecodeList(l, b, maxNames) }
func (l *runList) UnmarshalJSON(b []byte) error   { return integrity.DecodeList(l, b, MaxTableRuns) }
func (l *startList) UnmarshalJSON(b []byte) error { return integrity.DecodeList(l, b, maxMapChunks) }
func (l *refList) UnmarshalJSON(b []byte) error   { return integrity.DecodeList(l, b, maxRefs) }
func (l *keptList) UnmarshalJSON(b []byte) error  { return integrity.DecodeList(l, b, maxVMDisks) }
func (l *unusedDisks) UnmarshalJSON(b []byte) error {
	return integrity.DecodeList(l, b, maxUnused)
}
func (l *vmDisks) UnmarshalJSON(b []byte) error   { return integrity.DecodeList(l, b, maxVMDisks) }
func (l *layerList) UnmarshalJSON(b []byte) error { return integrity.DecodeList(l, b, maxLayers) }
func (l *diskUses) UnmarshalJSON(b []byte) error  { return integrity.DecodeList(l, b, MaxDisks) }

// NVRAM names the file that holds the NVRAM part.
type NVRAM struct {
	Path     string    `json:"path"`
	UUID     uuid.UUID `json:"uuid"`
	Slots    int       `json:"slots"`              // pages in use
	Bytes    int64     `json:"bytes"`              // what they hold
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
	Parent     string `json:"parent,omitempty"` // NAME@N of the checkpoint that it refers to
	BytesIn    int64  `json:"bytes_in"`         // of the stream
	Pages      int64  `json:"pages"`            // of all RAM blocks
	Zero       int64  `json:"zero"`             // zero, however they were sent
	ZeroAsData int64  `json:"zero_data"`        // those of them that QEMU sent as data
	Duplicate  int64  `json:"duplicate"`        // equal to another page of this checkpoint
	Hot        int64  `json:"hot"`              // in the NVRAM part
	Cold       int64  `json:"cold"`             // in the flash image
	Disk       int64  `json:"disk"`             // equal to a block of a disk image
	Isolated   int64  `json:"isolated"`         // found elsewhere, but stored: to be read there alone would have cost more
	Delta      int64  `json:"delta"`            // stored as what has changed of another page
	DeltaBytes int64  `json:"delta_bytes"`      // of those, before they are compressed
	Similar    int64  `json:"similar"`          // of those, against a page at another place, in pieces
	Unchanged  int64  `json:"unchanged"`        // as in an earlier checkpoint, which has them
	Moved      int64  `json:"moved"`            // of those, were at another place there
	Shared     int64  `json:"shared"`           // in another checkpoint that is not the parent, nor one that this refers to
	Resent     int64  `json:"resent"`           // records of pages that had come before
	Superseded int64  `json:"superseded"`       // stored, then replaced by a later version
	// SupersededFlash is those of them that were on flash: written there in vain.
	SupersededFlash int64 `json:"superseded_flash"`
	Surplus         int64 `json:"surplus"`     // hot, but the NVRAM file had no room
	PageTables      int64 `json:"page_tables"` // that hold the guest's page tables

	Peers int64 `json:"peers"` // in another checkpoint that was made with this one
	// ShareVM: pages were looked for in checkpoints of its own VM alone.
	ShareVM bool `json:"share_vm,omitempty"`
	// Beside is how many other checkpoints there were in the end that it could have had pages
	// in common with, and that were not there, or not known, when it began.
	Beside int64 `json:"beside"`
	// NotShared is why pages were not looked for in other checkpoints, if they were not.
	NotShared string `json:"not_shared,omitempty"`

	NoPageTables string `json:"no_page_tables,omitempty"` // why they were not found, or not all

	NVRAMBytes   int64 `json:"nvram_bytes"`   // page content in NVRAM
	FlashBytes   int64 `json:"flash_bytes"`   // size of the image file
	SampledBytes int64 `json:"sampled_bytes"` // read for partial hashes
	HashedBytes  int64 `json:"hashed_bytes"`  // read for full hashes
	NonZeroBytes int64 `json:"nonzero_bytes"` // what full hashing of every non-zero page would have read

	ChunkSize  int    `json:"chunk_size"`  // bytes, of deduplication
	SampleSize int    `json:"sample_size"` // bytes of a chunk
	Codec      string `json:"codec"`

	// Disks are the disk images that the pages in Disk equal.
	Disks diskUses `json:"disks,omitempty"`
	// UnusedDisks are those that the save was told of and could not look in.
	UnusedDisks unusedDisks `json:"unused_disks,omitempty"`

	Seconds Seconds `json:"seconds"`
}

// DiskUse is what a checkpoint has on one disk image.
type DiskUse struct {
	Path  string `json:"path"`
	Kept  bool   `json:"kept,omitempty"` // it is the copy of it that the store keeps
	Pages int64  `json:"pages"`          // that equal a block of it
	Bytes int64  `json:"bytes"`          // what they hold, each different one once
}

// VMDisk is a disk of the VM, when the checkpoint was made.
type VMDisk struct {
	Name     string `json:"name"` // the path of its device in QEMU's object tree
	ReadOnly bool   `json:"read_only,omitempty"`
	// Frozen: a snapshot was taken. The guest writes to an overlay on the first layer.
	Frozen bool `json:"frozen,omitempty"`
	// Kept is the copy of the first layer that the store keeps, if IDENTITY lists it.
	Kept uuid.UUID `json:"kept,omitzero"`
	// Layers are the files that could be looked at, from the one that the guest wrote to
	// down; none if that can't be.
	Layers layerList `json:"layers"`
}

// DiskUnused is a disk image, or a layer of one, that a save could not look in.
type DiskUnused struct {
	Path string `json:"path"`
	Why  string `json:"why"`
}

// Seconds are wall times by phase, in order.
type Seconds struct {
	RAM    float64 `json:"ram"`    // reading and placing pages
	Sync   float64 `json:"sync"`   // making them durable, the device tail held back
	Tail   float64 `json:"tail"`   // reading the device tail
	Commit float64 `json:"commit"` // page map, footer, fsync, rename, directory fsync
	Total  float64 `json:"total"`
}

// BlockPages is the number of pages of each RAM block. Where pages come it is exact: a block of
// a part of a page has no page that could be sent (package ramparse).
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

// Documents are the stored forms, for image.Writer.Finish. It sets RAMBytes.
func (m *Meta) Documents() (meta, identity []byte, err error) {
	m.RAMBytes = 0
	for _, b := range m.Blocks {
		m.RAMBytes += b.Used
	}
	// Nobody asks for the rest of their names.
	m.Foreign = m.Foreign[:min(len(m.Foreign), maxNames)]
	if meta, err = encode(&m.Bulk); err != nil {
		return nil, nil, err
	}
	if identity, err = encode(&m.Identity); err != nil {
		return nil, nil, err
	}
	// What is too long to be read must not be written.
	if _, err = parseMeta(meta, identity); err != nil {
		err = fmt.Errorf("description of the checkpoint: %w", err)
	}
	return meta, identity, err
}

// encode is json.Marshal without its escapes for HTML, which would make the XML in
// it half as long again.
func encode(v any) ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	err := e.Encode(v)
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), err
}

// ReadIdentity reads what an image says about itself at its end, and no more of it:
// one or two reads of some KB. Errors are image.Open's.
func ReadIdentity(src image.Source) (*Identity, error) {
	t, err := image.ReadTail(src)
	if err != nil {
		return nil, err
	}
	return identityOf(t)
}

func identityOf(t *image.Tail) (*Identity, error) {
	id, err := parseIdentity(t.Identity)
	if err == nil && id.UUID != t.UUID {
		err = errors.New("it describes another checkpoint")
	}
	if err != nil {
		return nil, t.Corrupt(image.Identity, err)
	}
	return id, nil
}

// ReadMeta reads all that an image says about itself, with one read more.
func ReadMeta(src image.Source) (*Meta, error) {
	t, err := image.ReadTail(src)
	if err != nil {
		return nil, err
	}
	return metaOf(t)
}

func metaOf(t *image.Tail) (*Meta, error) {
	id, err := identityOf(t)
	if err != nil {
		return nil, err
	}
	b, err := t.Meta()
	if err != nil {
		return nil, err
	}
	m := &Meta{Identity: *id}
	if err := m.parseBulk(b); err != nil {
		return nil, t.Corrupt(image.Meta, err)
	}
	return m, nil
}

func parseIdentity(b []byte) (*Identity, error) {
	var id Identity
	if err := json.Unmarshal(b, &id); err != nil {
		return nil, err
	}
	return &id, id.check()
}

// check refuses an Identity, which was read from somewhere, that can be nobody's.
func (id *Identity) check() error {
	if id.PageSize <= 0 || id.PageSize&(id.PageSize-1) != 0 || id.PageSize > 1<<16 {
		return fmt.Errorf("page size %d", id.PageSize)
	}
	if n := id.NVRAM; n != nil && (n.Slots < 0 || n.Bytes != int64(n.Slots)*int64(id.PageSize)) {
		return fmt.Errorf("%d NVRAM slots of %d bytes together", n.Slots, n.Bytes)
	}
	if id.DiskSlots < 0 || id.DiskSlots > 0 && id.Disks == 0 || id.PieceSlots() > 1<<32 {
		return fmt.Errorf("%d pages of %d disks", id.DiskSlots, id.Disks)
	}
	return nil
}

// InNVRAM tells whether pages of its NVRAM part may still be in an NVRAM file. Of a
// checkpoint that was copied from another store all are in .moved pieces, and the file of
// that store is none of this one's.
func (id *Identity) InNVRAM() bool { return id.NVRAM != nil && id.NVRAM.UUID != uuid.Nil }

// NeedsDisks is how many disk images a restore needs.
func (id *Identity) NeedsDisks() int {
	if id.DiskSlots > 0 {
		return 0
	}
	return id.Disks
}

// FirstDiskSlot is the number that the page of disk slot 0 has in .moved pieces.
func (id *Identity) FirstDiskSlot() int {
	if id.NVRAM == nil {
		return 0
	}
	return id.NVRAM.Slots
}

// PieceSlots is one more than the highest number that a page can have in .moved pieces.
func (id *Identity) PieceSlots() int { return id.FirstDiskSlot() + id.DiskSlots }

// PieceBytes is how much .moved pieces with these slots have of the NVRAM part, and of disks.
func (id *Identity) PieceBytes(slots source.Ranges) (nvram, disks int64) {
	all := int64(slots.Count()) * int64(id.PageSize)
	if n := id.FirstDiskSlot(); n > 0 {
		nvram = int64(slots.Within(0, uint64(n-1)).Count()) * int64(id.PageSize)
	}
	return nvram, all - nvram
}

// Document is the stored form.
func (id *Identity) Document() ([]byte, error) {
	b, err := encode(id)
	if err == nil {
		_, err = parseIdentity(b)
	}
	return b, err
}

// parseMeta parses both documents.
func parseMeta(meta, identity []byte) (*Meta, error) {
	id, err := parseIdentity(identity)
	if err != nil {
		return nil, err
	}
	m := &Meta{Identity: *id}
	return m, m.parseBulk(meta)
}

// parseBulk parses META; the Identity is there already.
func (m *Meta) parseBulk(b []byte) error {
	if err := json.Unmarshal(b, &m.Bulk); err != nil {
		return err
	}
	var ram uint64
	for _, blk := range m.Blocks {
		if blk.Name == "" || len(blk.Name) > 255 || blk.Used > 1<<46 {
			return fmt.Errorf("RAM block %q of %d bytes", blk.Name, blk.Used)
		}
		ram += blk.Used
	}
	if ram != m.RAMBytes {
		return fmt.Errorf("RAM blocks of %d bytes, IDENTITY says %d", ram, m.RAMBytes)
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
			return fmt.Errorf("%d guest page tables at page %d of RAM block %d", r.Count, r.Page, r.Block)
		}
		if tables += r.Count; tables > all {
			return errors.New("more guest page tables than pages")
		}
	}
	if l := m.Libvirt; l != nil && (l.XML == "" || len(l.XML) > MaxLibvirt || len(l.Cookie) > MaxLibvirt) {
		return fmt.Errorf("libvirt domain of %d bytes, cookie of %d", len(l.XML), len(l.Cookie))
	}
	return nil
}
