package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/nvram"
	"github.com/flic-migrate/flic-migrate/tier/pagemap"
	"github.com/flic-migrate/flic-migrate/tier/skeleton"
	"github.com/flic-migrate/flic-migrate/tier/source"
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
	src    Source
	table  *source.Table
	facts  source.Facts
	nvfile *nvram.File
	part   *NVRAMPart
	region *nvram.Region
}

// Source is where a checkpoint's image is: in a file, or in a part of one.
type Source interface {
	image.Source
	io.Closer
}

// Options of Open.
type Options struct {
	// NVRAM is the path of the NVRAM file if it is no longer where the
	// checkpoint says.
	NVRAM string
	// Name is what messages call the checkpoint; if empty, its UUID.
	Name string
	// Sources are the kinds of source that are known; nil: source.Default.
	Sources *source.Table
}

// Open opens the checkpoint whose image is src, and checks everything but page
// content, which is checked as it is read: integrity.CorruptErrors name file and
// offset, an error that wraps fs.ErrNotExist says which NVRAM file is missing, which
// is looked for in fsys. src is closed with the Checkpoint, or at once if that can't
// be opened. Who opens a checkpoint of a store does so through the store, which keeps
// it from being removed.
func Open(ctx context.Context, fsys vfs.FS, src Source, o Options) (*Checkpoint, error) {
	c := &Checkpoint{name: o.Name, src: src, table: o.Sources}
	if c.table == nil {
		c.table = source.Default
	}
	if err := c.load(ctx, fsys, o); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

func (c *Checkpoint) load(ctx context.Context, fsys vfs.FS, o Options) error {
	im, err := image.Open(c.src)
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
	c.facts = source.Facts{PageSize: im.PageSize, SegmentPages: uint64(im.SegmentPages), Objects: []uint32{uint32(im.Segments())}}
	c.PageMap, err = pagemap.NewMap(pagemap.Source{
		Pages: c.Meta.BlockPages(), Starts: c.Meta.MapChunks,
		Read:  func(i int) ([]byte, error) { return im.Chunk(image.PageMap, i) },
		Check: func(_ int, r pagemap.Run) error { return c.checkRun(r) },
		Bad:   func(i int, err error) error { return im.Corrupt(image.PageMap, i, err) },
	})
	if err != nil {
		return im.Corrupt(image.Meta, 0, err)
	}
	return c.openNVRAM(ctx, fsys, o)
}

func (c *Checkpoint) openNVRAM(ctx context.Context, fsys vfs.FS, o Options) error {
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
	c.part, c.facts.Slots = part, uint64(len(part.Slots))
	path := m.Path
	if o.NVRAM != "" {
		path = o.NVRAM
	}
	if c.nvfile, err = nvram.Open(ctx, fsys, path, nvram.Options{ReadOnly: true}); err != nil {
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
func (c *Checkpoint) checkRun(r pagemap.Run) error {
	if err := c.table.Check(&c.facts, r); err != nil {
		return fmt.Errorf("page %s: %w", c.PageName(r.Block, r.Page), err)
	}
	return nil
}

// Sources are the sources of the checkpoint's pages, for readers of them.
func (c *Checkpoint) Sources() *source.Set {
	return &source.Set{Facts: c.facts, Table: c.table, Backing: backing{c}}
}

// Readable tells whether a run's pages can be read at all: the error, which names the
// page, says that their kind is not known.
func (c *Checkpoint) Readable(r pagemap.Run) error {
	if c.table.Row(r.Kind).Known() {
		return nil
	}
	return &image.UnsupportedError{File: c.Image.Name(),
		Why: fmt.Sprintf("page %s: %v", c.PageName(r.Block, r.Page), &source.UnknownError{Kind: r.Kind})}
}

// NewCache returns a cache of decoded segments for readers of the checkpoint, of at
// most max. All may share one.
func (c *Checkpoint) NewCache(max int) *source.Cache { return source.NewCache(backing{c}.Fetch, max) }

// backing is a Checkpoint as a source.Backing.
type backing struct{ c *Checkpoint }

// Fetch implements source.Backing.
func (b backing) Fetch(st *image.Stored, n source.Need) error {
	if n.Space != 0 {
		return fmt.Errorf("%s: %v can't be fetched", b.c.Image.Name(), n)
	}
	return b.c.Image.FetchSegment(st, n.Number)
}

// Slot implements source.Backing.
func (b backing) Slot(slot uint64, want source.Page) ([]byte, error) {
	return b.c.slot(slot, want.Block, want.Number)
}

// Guard implements source.Backing.
func (b backing) Guard(fn func() error) error { return b.c.guard(fn) }

// Drop implements source.Backing.
func (b backing) Drop(first, n uint64) { b.c.region.DontNeed(int(first), int(n)) }

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
	return c.src.Close()
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

// slot returns the content of an NVRAM slot from the mapping, checked, without a copy:
// read only, valid until Close. The page is the one it is wanted for, for the error.
// It is called, and the content used, inside guard.
func (c *Checkpoint) slot(slot uint64, block int, page uint64) ([]byte, error) {
	b := c.region.Page(int(slot))
	if integrity.Checksum(b) != c.part.Slots[slot].CRC {
		return nil, &integrity.CorruptError{File: c.nvfile.Path(), Offset: c.region.Offset(int(slot)),
			What: "page " + c.PageName(block, page), Err: integrity.ErrChecksum}
	}
	return b, nil
}

// guard runs fn, which reads NVRAM pages in the calling goroutine, and turns a fault
// of the mapping into an error.
func (c *Checkpoint) guard(fn func() error) error {
	if c.region == nil {
		return fn()
	}
	return c.region.Guard(fn)
}

// NVRAMSlots describes the NVRAM part's slots, in prefetch order.
func (c *Checkpoint) NVRAMSlots() []NVRAMSlot {
	if c.part == nil {
		return nil
	}
	return c.part.Slots
}
