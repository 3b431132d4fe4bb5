package checkpoint

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/digest"
	"github.com/flic-migrate/flic-migrate/tier/disk"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
)

// Disk is a disk image that has bytes of a checkpoint's pages: one layer, which is one
// file. JSON field names are part of the format.
type Disk struct {
	disk.Identity // when the checkpoint was saved
	// Kept, unless it is zero, names the file that the image is in: one that the store
	// keeps with the checkpoint. Identity is that file's, and its Path that of the image
	// which it is a copy of.
	Kept    uuid.UUID   `json:"kept,omitzero"`
	Content digest.Root `json:"content,omitzero"` // what its index said that it holds
}

// DiskSlot is where a page of disk slots is: the number of a disk in the list, and the
// sector of 512 bytes of it at which the page begins.
type DiskSlot uint64

const (
	sectorBits = 48
	// MaxSector is the highest that a DiskSlot holds.
	MaxSector = 1<<sectorBits - 1
	// MaxDisks caps the list of disks: its JSON has to fit into one frame.
	MaxDisks = 32

	diskSlotLen   = 8
	slotsPerChunk = 16384
	disksVersion  = 1
)

// MakeDiskSlot names a sector of a disk. They rise in the order of disks and sectors.
func MakeDiskSlot(disk int, sector int64) DiskSlot {
	return DiskSlot(uint64(disk)<<sectorBits | uint64(sector)&MaxSector)
}

// Disk is the number of the disk.
func (s DiskSlot) Disk() int { return int(s >> sectorBits) }

// Sector is the first sector of the page.
func (s DiskSlot) Sector() int64 { return int64(s & MaxSector) }

// offset is the page's in the disk, as its guest sees it.
func (s DiskSlot) offset() int64 { return s.Sector() * disk.SectorSize }

// diskTable is the JSON document in DISKS 0.
type diskTable struct {
	Version int      `json:"version"`
	Slots   uint64   `json:"slots"`
	Disks   diskList `json:"disks"`
}

type diskList []Disk

func (l *diskList) UnmarshalJSON(b []byte) error { return integrity.DecodeList(l, b, MaxDisks) }

// DiskChunks are the payloads of DISKS frames, in order: the table, and then the slots,
// which rise and are each there once. Each slot is little-endian: sector u48, disk u16.
func DiskChunks(disks []Disk, slots []DiskSlot) ([][]byte, error) {
	if len(disks) == 0 || len(disks) > MaxDisks || len(slots) == 0 {
		return nil, fmt.Errorf("%d disk slots in %d disks", len(slots), len(disks))
	}
	table, err := encode(diskTable{disksVersion, uint64(len(slots)), disks})
	if err == nil && len(table) > image.MaxChunk {
		err = fmt.Errorf("list of disks of %d bytes", len(table))
	}
	if err != nil {
		return nil, err
	}
	chunks := [][]byte{table}
	for len(slots) > 0 {
		n := min(len(slots), slotsPerChunk)
		b := make([]byte, 0, n*diskSlotLen)
		for _, s := range slots[:n] {
			b = binary.LittleEndian.AppendUint64(b, uint64(s))
		}
		chunks, slots = append(chunks, b), slots[n:]
	}
	return chunks, nil
}

// disks are the DISKS of an image. Chunks of slots are read when they are first needed,
// and kept: 8 bytes a page that is on a disk. Safe for concurrent use.
type disks struct {
	im     *image.Image
	list   []Disk
	slots  uint64
	page   int // bytes
	chunks []slotChunk
}

type slotChunk struct {
	once  sync.Once
	slots []DiskSlot
	err   error
}

// disks reads the table of an image's DISKS, and compares it with what IDENTITY says; nil
// if it has none.
func (m *Meta) disks(im *image.Image) (*disks, error) {
	n := im.Chunks(image.Disks)
	if n == 0 && m.Disks == 0 {
		return nil, nil
	}
	if n == 0 {
		return nil, im.Tail.Corrupt(image.Identity, fmt.Errorf("%d disks, and the image lists none", m.Disks))
	}
	b, err := im.Chunk(image.Disks, 0)
	if err != nil {
		return nil, err
	}
	t, err := parseDisks(b, n-1)
	switch {
	case err != nil:
	case len(t.Disks) != m.Disks:
		err = fmt.Errorf("%d disks, and IDENTITY says %d", len(t.Disks), m.Disks)
	case m.DiskSlots > 0 && t.Slots != uint64(m.DiskSlots):
		err = fmt.Errorf("%d pages, and IDENTITY says %d", t.Slots, m.DiskSlots)
	case m.Digests == nil:
		return nil, im.Tail.Corrupt(image.Identity, errors.New("it has pages on disks, and no key to check them with"))
	}
	if err == nil && m.DiskSlots == 0 {
		for i := range t.Disks {
			if k := t.Disks[i].Kept; k != uuid.Nil && !slices.Contains(m.Kept, k) {
				err = fmt.Errorf("disk %d is kept as %v, which IDENTITY does not list", i, k)
			}
		}
	}
	if err != nil {
		return nil, im.Corrupt(image.Disks, 0, err)
	}
	return &disks{im: im, list: t.Disks, slots: t.Slots, page: im.PageSize, chunks: make([]slotChunk, n-1)}, nil
}

// parseDisks reads a table that chunks of slots belong to.
func parseDisks(b []byte, chunks int) (*diskTable, error) {
	t := new(diskTable)
	if err := json.Unmarshal(b, t); err != nil {
		return nil, err
	}
	switch {
	case t.Version != disksVersion:
		return nil, fmt.Errorf("it is in version %d, which this flic-migrate does not know", t.Version)
	case len(t.Disks) == 0 || t.Slots == 0 || t.Slots > uint64(chunks)*slotsPerChunk || t.Slots <= uint64(chunks-1)*slotsPerChunk:
		return nil, fmt.Errorf("%d disk slots of %d disks in %d chunks", t.Slots, len(t.Disks), chunks)
	}
	for i := range t.Disks {
		if err := t.Disks[i].Check(); err != nil {
			return nil, fmt.Errorf("disk %d: %w", i, err)
		}
	}
	return t, nil
}

// slot is where the page of a slot is, which must exist.
func (d *disks) slot(n uint64) (DiskSlot, error) {
	k := n / slotsPerChunk
	c := &d.chunks[k]
	c.once.Do(func() { c.slots, c.err = d.load(int(k)) })
	if c.err != nil {
		return 0, c.err
	}
	return c.slots[n%slotsPerChunk], nil
}

// load reads chunk k of slots.
func (d *disks) load(k int) ([]DiskSlot, error) {
	b, err := d.im.Chunk(image.Disks, 1+k)
	if err != nil {
		return nil, err
	}
	bad := func(format string, args ...any) ([]DiskSlot, error) {
		return nil, d.im.Corrupt(image.Disks, 1+k, fmt.Errorf(format, args...))
	}
	first := uint64(k) * slotsPerChunk
	if n := min(slotsPerChunk, d.slots-first); uint64(len(b)) != n*diskSlotLen {
		return bad("%d bytes for %d disk slots", len(b), n)
	}
	slots := make([]DiskSlot, len(b)/diskSlotLen)
	for i := range slots {
		s := DiskSlot(binary.LittleEndian.Uint64(b[diskSlotLen*i:]))
		switch {
		case s.Disk() >= len(d.list):
			return bad("disk slot %d is on disk %d of %d", first+uint64(i), s.Disk(), len(d.list))
		case s.offset()+int64(d.page) > d.list[s.Disk()].Size:
			return bad("disk slot %d is at %#x of a disk of %d bytes", first+uint64(i), s.offset(), d.list[s.Disk()].Size)
		case i > 0 && s <= slots[i-1]:
			return bad("disk slot %d is not behind the one before", first+uint64(i))
		}
		slots[i] = s
	}
	return slots, nil
}

const (
	// aheadGap is what is read in vain rather than to make two reads of it, and aheadMost
	// how much is asked for at once: what the kernel reads in one go.
	aheadGap  = 64 << 10
	aheadMost = 2 << 20
)

// stretches calls fn with what is read of disks for the slots from first up to end, those
// that there are: what lies near each other in one go.
func (d *disks) stretches(first, end uint64, fn func(disk int, off, n int64)) error {
	on, begin, to := -1, int64(0), int64(0)
	for n := first; n < min(end, d.slots); n++ {
		at, err := d.slot(n)
		if err != nil {
			return err
		}
		if off := at.offset(); at.Disk() != on || off > to+aheadGap || off-begin >= aheadMost {
			if on >= 0 {
				fn(on, begin, to-begin)
			}
			on, begin = at.Disk(), off
		}
		to = at.offset() + int64(d.page)
	}
	if on >= 0 {
		fn(on, begin, to-begin)
	}
	return nil
}
