package checkpoint

import (
	"context"
	"errors"
	"fmt"

	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/nvram"
	"github.com/flic-migrate/flic-migrate/tier/pagemap"
	"github.com/flic-migrate/flic-migrate/tier/skeleton"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// Checkpoint is a checkpoint opened for reading. It is safe for concurrent use;
// each goroutine that reads pages has a Reader of its own.
type Checkpoint struct {
	Meta  *Meta
	Image *image.Image
	// PageMap says where each page's bytes are.
	PageMap *pagemap.Map

	name   string // Options.Name
	file   vfs.File
	nvfile *nvram.File
	part   *NVRAMPart
	region *nvram.Region
}

// Options of Open.
type Options struct {
	// NVRAM is the path of the NVRAM file if it is no longer where the
	// checkpoint says.
	NVRAM string
	// Name is what messages call the checkpoint; if empty, its UUID.
	Name string
}

// Open opens the checkpoint whose image is f, and checks everything but page
// content, which is checked as it is read: integrity.CorruptErrors name file and
// offset, an error that wraps fs.ErrNotExist says which NVRAM file is missing.
// f is closed with the Checkpoint, or at once if that can't be opened. Who opens
// a checkpoint of a store does so through the store, which keeps it from being
// removed.
func Open(fsys vfs.FS, f vfs.File, o Options) (*Checkpoint, error) {
	c := &Checkpoint{name: o.Name, file: f}
	if err := c.load(fsys, o); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

func (c *Checkpoint) load(fsys vfs.FS, o Options) error {
	im, err := image.Open(c.file)
	if err != nil {
		return err
	}
	c.Image = im
	if c.Meta, err = metaOf(im.Tail); err != nil {
		return err
	}
	if c.Meta.PageSize != im.PageSize {
		return im.Tail.Corrupt(image.Identity, fmt.Errorf("page size %d in an image of %d", c.Meta.PageSize, im.PageSize))
	}
	if c.name == "" {
		c.name = c.Meta.UUID.String()
	}
	if c.Meta.TailChunk < 0 || c.Meta.TailChunk > im.Chunks(image.Skeleton) {
		return im.Corrupt(image.Meta, 0, fmt.Errorf("device tail in skeleton chunk %d of %d", c.Meta.TailChunk, im.Chunks(image.Skeleton)))
	}
	if im.Chunks(image.PageMap) != len(c.Meta.MapChunks) {
		return im.Corrupt(image.Meta, 0, fmt.Errorf("%d page map chunks, %d in the image", len(c.Meta.MapChunks), im.Chunks(image.PageMap)))
	}
	c.PageMap, err = pagemap.NewMap(pagemap.Source{
		Pages: c.Meta.BlockPages(), Starts: c.Meta.MapChunks,
		Read:  func(i int) ([]byte, error) { return im.Chunk(image.PageMap, i) },
		Check: c.checkRun,
		Bad:   func(i int, err error) error { return im.Corrupt(image.PageMap, i, err) },
	})
	if err != nil {
		return im.Corrupt(image.Meta, 0, err)
	}
	return c.openNVRAM(fsys, o)
}

func (c *Checkpoint) openNVRAM(fsys vfs.FS, o Options) error {
	m := c.Meta.NVRAM
	if m == nil {
		return nil
	}
	im := c.Image
	var b []byte
	for i := range im.Chunks(image.NVRAM) {
		chunk, err := im.Chunk(image.NVRAM, i)
		if err != nil {
			return err
		}
		b = append(b, chunk...)
	}
	part, err := parseNVRAMPart(b, c.Meta.BlockPages())
	if err == nil && len(part.Slots) != m.Slots {
		err = fmt.Errorf("describes %d slots, %d in use", len(part.Slots), m.Slots)
	}
	if err != nil {
		return im.Corrupt(image.NVRAM, 0, err)
	}
	c.part = part
	path := m.Path
	if o.NVRAM != "" {
		path = o.NVRAM
	}
	if c.nvfile, err = nvram.Open(context.Background(), fsys, path, nvram.Options{ReadOnly: true}); err != nil {
		return fmt.Errorf("NVRAM part of checkpoint %s: %w", c.name, err)
	}
	if c.nvfile.UUID() != m.UUID {
		return &integrity.CorruptError{File: path, What: fmt.Sprintf("NVRAM part of checkpoint %s", c.name),
			Err: errors.New("not the file it was saved to")}
	}
	if c.region, err = c.nvfile.OpenRegion(c.Meta.UUID, part.Extents, c.Meta.PageSize); err != nil {
		return fmt.Errorf("NVRAM part of checkpoint %s: %w", c.name, err)
	}
	if len(part.Slots) > c.region.Slots() {
		return im.Corrupt(image.NVRAM, 0, fmt.Errorf("%d slots in extents for %d", len(part.Slots), c.region.Slots()))
	}
	return nil
}

// checkRun finds pages whose source can't exist before any page is given out.
func (c *Checkpoint) checkRun(chunk int, r pagemap.Run) error {
	last := r.First + r.Step*(r.Count-1)
	var err error
	switch r.Kind {
	case pagemap.Absent, pagemap.Fill, pagemap.ZeroData:
		return nil
	case pagemap.NVRAM:
		if c.part == nil || last >= uint64(len(c.part.Slots)) {
			err = fmt.Errorf("NVRAM slot %d does not exist", last)
		}
	case pagemap.Flash:
		if last/uint64(c.Image.SegmentPages) >= uint64(c.Image.Segments()) {
			err = fmt.Errorf("flash slot %d does not exist", last)
		}
	default:
		err = fmt.Errorf("its source, %v, is not known to this version", r.Kind)
	}
	if err != nil {
		err = fmt.Errorf("page %s: %w", c.PageName(r.Block, r.Page), err)
	}
	return err
}

// PageName names a page for messages: block name and byte offset in it.
func (c *Checkpoint) PageName(block int, page uint64) string {
	return fmt.Sprintf("%s:%#x", c.Meta.Blocks[block].Name, page*uint64(c.Meta.PageSize))
}

// Close releases the checkpoint and everything it mapped.
func (c *Checkpoint) Close() error {
	if c.region != nil {
		c.region.Close()
	}
	if c.nvfile != nil {
		c.nvfile.Close()
	}
	return c.file.Close()
}

// Skeleton plays the skeleton log.
func (c *Checkpoint) Skeleton(p skeleton.Player) error {
	return c.SkeletonChunks(0, c.Image.Chunks(image.Skeleton), p)
}

// SkeletonChunks plays the skeleton log from chunk first up to end.
func (c *Checkpoint) SkeletonChunks(first, end int, p skeleton.Player) error {
	pages := c.Meta.BlockPages()
	for i := first; i < end; i++ {
		b, err := c.Image.Chunk(image.Skeleton, i)
		if err != nil {
			return err
		}
		if err := skeleton.Play(b, pages, p); errors.Is(err, skeleton.ErrDamaged) {
			return c.Image.Corrupt(image.Skeleton, i, err)
		} else if err != nil {
			return err
		}
	}
	return nil
}

// NVRAMPage returns the content of an NVRAM slot from the mapping, checked,
// without a copy: read only, valid until Close. The page is the one it is
// wanted for, for the error. Who uses the content later than at once does so
// inside GuardNVRAM.
func (c *Checkpoint) NVRAMPage(slot uint64, block int, page uint64) (b []byte, err error) {
	err = c.region.Guard(func() error {
		b = c.region.Page(int(slot))
		if integrity.Checksum(b) != c.part.Slots[slot].CRC {
			return &integrity.CorruptError{File: c.nvfile.Path(), Offset: c.region.Offset(int(slot)),
				What: "page " + c.PageName(block, page), Err: integrity.ErrChecksum}
		}
		return nil
	})
	return b, err
}

// GuardNVRAM runs fn, which reads NVRAM pages in the calling goroutine, and
// turns a fault of the mapping into an error.
func (c *Checkpoint) GuardNVRAM(fn func() error) error {
	if c.region == nil {
		return fn()
	}
	return c.region.Guard(fn)
}

// DropNVRAM takes slots that have been used out of the process's memory.
func (c *Checkpoint) DropNVRAM(first, n uint64) { c.region.DontNeed(int(first), int(n)) }

// NVRAMSlots describes the NVRAM part's slots, in prefetch order.
func (c *Checkpoint) NVRAMSlots() []NVRAMSlot {
	if c.part == nil {
		return nil
	}
	return c.part.Slots
}

// Verify reads and checks every byte of the checkpoint: all frames, all NVRAM
// slots, that each page's source exists, and that the skeleton places every page
// that was saved exactly once. found is called for each damage, in order of files;
// Verify goes on after it and returns an error only if it could not go on.
func (c *Checkpoint) Verify(ctx context.Context, found func(error)) error {
	kinds := make([]image.Kind, c.Image.Segments())
	sizes := make([]int, c.Image.Segments())
	var sr image.SegmentReader
	err := c.Image.Frames(func(k image.Kind, n uint32, off int64) error {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		var err error
		if k.IsSegment() {
			var s *image.Segment
			if s, err = c.Image.Segment(&sr, n); err == nil {
				kinds[n], sizes[n] = s.Kind, s.Len()
				sr.Recycle(s)
			}
		} else {
			_, err = c.Image.Chunk(k, int(n))
		}
		return report(err, found)
	})
	if err != nil {
		return err
	}
	if err := c.verifyNVRAM(ctx, found); err != nil {
		return err
	}
	if err := c.verifyMap(kinds, sizes, found); err != nil {
		return err
	}
	return c.verifySkeleton(found)
}

// verifyMap checks that each page's position in its segment exists.
func (c *Checkpoint) verifyMap(kinds []image.Kind, sizes []int, found func(error)) error {
	per := uint64(c.Image.SegmentPages)
	err := c.PageMap.Runs(func(r pagemap.Run) error {
		if r.Kind != pagemap.Flash {
			return nil
		}
		// The pages of a run without steps are all in one place; a run with
		// them is no longer than the segments have pages.
		for i := range 1 + (r.Count-1)*r.Step {
			v := r.First + i*r.Step
			n := v / per
			var err error
			switch {
			case c.Image.SegmentOffset(uint32(n)) < 0:
				err = fmt.Errorf("there is no segment %d", n)
			case kinds[n] != 0 && v%per >= uint64(sizes[n]): // 0: reported already
				err = fmt.Errorf("segment %d has no page %d", n, v%per)
			}
			if err != nil {
				found(c.Image.Corrupt(image.PageMap, 0, fmt.Errorf("page %s: %w", c.PageName(r.Block, r.Page+i), err)))
				return nil
			}
		}
		return nil
	})
	return report(err, found)
}

// report passes damage to found and anything else on.
func report(err error, found func(error)) error {
	if integrity.IsCorrupt(err) {
		found(err)
		return nil
	}
	return err
}

// nvramHeaders is where an NVRAM file's headers end (docs/format-nvram.md).
const nvramHeaders = 8 << 10

func (c *Checkpoint) verifyNVRAM(ctx context.Context, found func(error)) error {
	if c.part == nil {
		return nil
	}
	// Of the file's two headers one is enough to read it, so nobody else
	// notices when the other is lost. What else Check finds is either this
	// checkpoint's, and was found by Open, or another's.
	damage, err := c.nvfile.Check(ctx)
	if err != nil {
		return err
	}
	for _, err := range damage {
		if e := (*integrity.CorruptError)(nil); errors.As(err, &e) && e.Offset < nvramHeaders {
			found(err)
		}
	}
	for slot, owner := range c.part.Slots {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		_, err := c.NVRAMPage(uint64(slot), int(owner.Block), owner.Page)
		if err != nil {
			found(err)
		}
		c.DropNVRAM(uint64(slot), 1)
	}
	return nil
}

type pageCounter struct{ n uint64 }

func (p *pageCounter) Literal([]byte) error { return nil }
func (p *pageCounter) Pages(_ int, _, count uint64, _ bool) error {
	p.n += count
	return nil
}

func (c *Checkpoint) verifySkeleton(found func(error)) error {
	var placed pageCounter
	if err := c.Skeleton(&placed); err != nil {
		return report(err, found)
	}
	var saved uint64
	err := c.PageMap.Runs(func(r pagemap.Run) error {
		if r.Kind != pagemap.Absent {
			saved += r.Count
		}
		return nil
	})
	if err == nil && placed.n != saved {
		err = c.Image.Corrupt(image.Skeleton, 0, fmt.Errorf("places %d pages, %d were saved", placed.n, saved))
	}
	return report(err, found)
}
