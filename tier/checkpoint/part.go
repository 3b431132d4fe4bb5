package checkpoint

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/moved"
	"github.com/flic-migrate/flic-migrate/tier/nvram"
	"github.com/flic-migrate/flic-migrate/tier/source"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// NVRAMPart is the content of the NVRAM frames: which extents of the NVRAM
// file belong to the checkpoint, in slot order, and for each slot in use, which
// is the prefetch order, its CRC-32C and the page it was taken for. Stored
// little-endian, cut into chunks anywhere:
//
//	u32 version, 1; u32 number of extents; u32 number of slots; u32 0
//	u32 for each extent
//	for each slot: u32 CRC-32C, u32 block, u64 page
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

const (
	nvramVersion = 1
	nvramHeadLen = 16
	nvramSlotLen = 16
)

// Append appends the stored form.
func (p *NVRAMPart) Append(dst []byte) []byte {
	le := binary.LittleEndian
	dst = le.AppendUint32(dst, nvramVersion)
	dst = le.AppendUint32(dst, uint32(len(p.Extents)))
	dst = le.AppendUint32(dst, uint32(len(p.Slots)))
	dst = le.AppendUint32(dst, 0)
	for _, e := range p.Extents {
		dst = le.AppendUint32(dst, e)
	}
	for _, s := range p.Slots {
		dst = le.AppendUint32(dst, s.CRC)
		dst = le.AppendUint32(dst, s.Block)
		dst = le.AppendUint64(dst, s.Page)
	}
	return dst
}

// parseNVRAMPart reads the stored form.
func parseNVRAMPart(b []byte) (*NVRAMPart, error) {
	le := binary.LittleEndian
	if len(b) < nvramHeadLen {
		return nil, errors.New("too short")
	}
	version, extents, slots := le.Uint32(b), int(le.Uint32(b[4:])), int(le.Uint32(b[8:]))
	if version != nvramVersion || le.Uint32(b[12:]) != 0 {
		return nil, fmt.Errorf("it is in version %d, which this flic-migrate does not know", version)
	}
	b = b[nvramHeadLen:]
	if want := 4*extents + nvramSlotLen*slots; len(b) != want {
		return nil, fmt.Errorf("%d extents and %d slots in %d bytes", extents, slots, len(b))
	}
	p := &NVRAMPart{Extents: make([]uint32, extents), Slots: make([]NVRAMSlot, slots)}
	for i := range p.Extents {
		p.Extents[i] = le.Uint32(b[4*i:])
	}
	b = b[4*extents:]
	for i := range p.Slots {
		s := b[nvramSlotLen*i:]
		p.Slots[i] = NVRAMSlot{le.Uint32(s), le.Uint32(s[4:]), le.Uint64(s[8:])}
	}
	return p, nil
}

// check refuses slots of pages that do not exist; pages gives the size of each block.
func (p *NVRAMPart) check(pages []uint64) error {
	for i, s := range p.Slots {
		if int64(s.Block) >= int64(len(pages)) || s.Page >= pages[s.Block] {
			return fmt.Errorf("slot %d is for page %d of block %d", i, s.Page, s.Block)
		}
	}
	return nil
}

// Part is the NVRAM part of an image, opened for reading: what is in the NVRAM file, and
// what has been moved from there to flash.
type Part struct {
	*NVRAMPart
	file   *nvram.File   // nil: nothing of it is needed
	region *nvram.Region // likewise
	moved  *moved.Set
}

// ReadPart reads the description of an image's NVRAM part, for which IDENTITY says that
// there is one.
func ReadPart(im *image.Image, id *Identity) (*NVRAMPart, error) {
	var b []byte
	for i := range im.Chunks(image.NVRAM) {
		chunk, err := im.Chunk(image.NVRAM, i)
		if err != nil {
			return nil, err
		}
		b = append(b, chunk...)
	}
	desc, err := parseNVRAMPart(b)
	if err == nil && len(desc.Slots) != id.NVRAM.Slots {
		err = fmt.Errorf("describes %d slots, %d in use", len(desc.Slots), id.NVRAM.Slots)
	}
	if err != nil {
		return nil, im.Corrupt(image.NVRAM, 0, err)
	}
	return desc, nil
}

// OpenPart opens the NVRAM part that an image describes, in the file whose path IDENTITY
// says, unless another is given; of it the slots that are needed, because the others may
// have been given back. Those that have been moved are read where they are now, and if
// all are, there need be no NVRAM file. The part closes the pieces, if it can't be opened
// too.
func OpenPart(ctx context.Context, fsys vfs.FS, im *image.Image, id *Identity, path string, need source.Ranges, pieces []moved.Source) (*Part, error) {
	set, err := moved.Open(pieces, id.UUID, id.PageSize, id.PieceSlots())
	if err != nil {
		return nil, err
	}
	return openPart(ctx, fsys, im, id, path, need, set)
}

// openPart is OpenPart with the pieces opened, which the part closes.
func openPart(ctx context.Context, fsys vfs.FS, im *image.Image, id *Identity, path string, need source.Ranges, set *moved.Set) (_ *Part, err error) {
	p := &Part{moved: set}
	defer func() {
		if err != nil {
			p.Close()
		}
	}()
	if p.NVRAMPart, err = ReadPart(im, id); err != nil {
		return nil, err
	}
	if need = need.Minus(p.moved.Slots()); len(need) == 0 && p.moved != nil {
		return p, nil
	}
	if !id.InNVRAM() {
		return nil, im.Corrupt(image.NVRAM, 0, fmt.Errorf("%d slots are in no .moved piece, and the checkpoint, which was copied from another store, has no NVRAM file", need.Count()))
	}
	if path == "" {
		path = id.NVRAM.Path
	}
	if p.file, err = nvram.Open(ctx, fsys, path, nvram.Options{ReadOnly: true}); err != nil {
		return nil, err
	}
	if p.file.UUID() != id.NVRAM.UUID {
		return nil, &integrity.CorruptError{File: path, What: "header", Err: errOtherNVRAM}
	}
	per := uint64(p.file.PerExtent(id.PageSize))
	p.region, err = p.file.OpenSome(id.UUID, p.Extents, id.PageSize, func(index int) bool {
		return need.Meets(uint64(index)*per, uint64(index+1)*per-1)
	})
	if err != nil {
		return nil, err
	}
	if len(p.Slots) > p.region.Slots() {
		return nil, im.Corrupt(image.NVRAM, 0, fmt.Errorf("%d slots in extents for %d", len(p.Slots), p.region.Slots()))
	}
	return p, nil
}

var errOtherNVRAM = errors.New("not the NVRAM file that the checkpoint was saved to")

// isNVRAM tells whether a path is that of the NVRAM file with a UUID.
func isNVRAM(ctx context.Context, fsys vfs.FS, path string, id uuid.UUID) (bool, error) {
	f, err := nvram.Open(ctx, fsys, path, nvram.Options{ReadOnly: true})
	if err != nil {
		return false, err
	}
	defer f.Close()
	return f.UUID() == id, nil
}

// page is the content of a slot that is needed, in a mapping, not checked: read only, and
// touched within Guard.
func (p *Part) page(slot uint64) []byte {
	if p.moved.Has(slot) {
		return p.moved.Page(slot)
	}
	return p.region.Page(int(slot))
}

// damaged is the error that says where a slot is, and what is wrong with it.
func (p *Part) damaged(slot uint64, what string, err error) error {
	e := &integrity.CorruptError{What: what, Err: err}
	if p.moved.Has(slot) {
		e.File, e.Offset = p.moved.Where(slot)
	} else {
		e.File, e.Offset = p.file.Path(), p.region.Offset(int(slot))
	}
	return e
}

// checked is page, if the slot's checksum is right; what is wanted there is for the
// error.
func (p *Part) checked(slot uint64, what string) ([]byte, error) {
	b := p.page(slot)
	if integrity.Checksum(b) != p.Slots[slot].CRC {
		return nil, p.damaged(slot, what, integrity.ErrChecksum)
	}
	return b, nil
}

// Copy puts the content of a slot that is needed into dst, checked.
func (p *Part) Copy(dst []byte, slot uint32) error {
	return p.guard(func() error {
		b, err := p.checked(uint64(slot), fmt.Sprintf("NVRAM slot %d", slot))
		copy(dst, b)
		return err
	})
}

// guard runs fn, in which pages may be touched, and turns a fault in the part's mappings
// into an integrity.CorruptError.
func (p *Part) guard(fn func() error) error {
	err := p.moved.Guard(fn)
	if p.region != nil {
		err = p.region.Guard(func() error { return err })
	}
	return err
}

// drop takes slots [first, first+n) out of the process's memory.
func (p *Part) drop(first, n uint64) {
	p.moved.Drop(first, n)
	if p.region != nil {
		p.region.DontNeed(int(first), int(n))
	}
}

// Close closes the part. One that is nil was never opened.
func (p *Part) Close() {
	if p == nil {
		return
	}
	p.moved.Close()
	if p.region != nil {
		p.region.Close()
	}
	if p.file != nil {
		p.file.Close()
	}
}
