package checkpoint

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
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

// openPart is the NVRAM part of an image, opened for reading.
type openPart struct {
	*NVRAMPart
	file   *nvram.File
	region *nvram.Region
}

// open opens the NVRAM part that an image describes, in the file whose path IDENTITY
// says, unless another is given; of it the slots that are needed, because the others may
// have been given back. After an error it is to be closed too.
func (p *openPart) open(ctx context.Context, fsys vfs.FS, im *image.Image, id *Identity, path string, need source.Ranges) error {
	var b []byte
	for i := range im.Chunks(image.NVRAM) {
		chunk, err := im.Chunk(image.NVRAM, i)
		if err != nil {
			return err
		}
		b = append(b, chunk...)
	}
	desc, err := parseNVRAMPart(b)
	if err == nil && len(desc.Slots) != id.NVRAM.Slots {
		err = fmt.Errorf("describes %d slots, %d in use", len(desc.Slots), id.NVRAM.Slots)
	}
	if err != nil {
		return im.Corrupt(image.NVRAM, 0, err)
	}
	p.NVRAMPart = desc
	if path == "" {
		path = id.NVRAM.Path
	}
	if p.file, err = nvram.Open(ctx, fsys, path, nvram.Options{ReadOnly: true}); err != nil {
		return err
	}
	if p.file.UUID() != id.NVRAM.UUID {
		return &integrity.CorruptError{File: path, What: "header", Err: errOtherNVRAM}
	}
	per := uint64(p.file.PerExtent(id.PageSize))
	p.region, err = p.file.OpenSome(id.UUID, desc.Extents, id.PageSize, func(index int) bool {
		return need.Meets(uint64(index)*per, uint64(index+1)*per-1)
	})
	if err != nil {
		return err
	}
	if len(desc.Slots) > p.region.Slots() {
		return im.Corrupt(image.NVRAM, 0, fmt.Errorf("%d slots in extents for %d", len(desc.Slots), p.region.Slots()))
	}
	return nil
}

var errOtherNVRAM = errors.New("not the NVRAM file that the checkpoint was saved to")

func (p *openPart) close() {
	if p.region != nil {
		p.region.Close()
	}
	if p.file != nil {
		p.file.Close()
	}
}
