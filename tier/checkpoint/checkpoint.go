package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/flic-migrate/flic-migrate/stream"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/moved"
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

	name  string // Options.Name
	src   Source
	table *source.Table
	facts source.Facts
	moved *moved.Set   // what is in .moved pieces
	part  *Part        // nil: it has none
	refs  []*reference // opened, in the order in which entries count them
	disks *openDisks   // nil: no page is on one
	check checker
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
	// Moved is what has been moved to flash of the checkpoint's NVRAM part. Open closes
	// it.
	Moved []moved.Source
	// Lent are pages of disks that pieces of images have which the checkpoint refers to; nil:
	// none are. Lenders opens such an image's pieces, while that stays whole.
	Lent    *moved.Lent
	Lenders func(ctx context.Context, r *Reference) ([]moved.Source, error)
	// Images opens the image that a reference names, which then stays whole until it
	// is closed, and if slots of its NVRAM part are needed what has been moved of that;
	// nil: there is no place to look.
	Images func(ctx context.Context, r *Reference) (Source, []moved.Source, error)
	// Disks is how to deal with the disks that pages are on.
	Disks DiskOptions
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
	err := c.load(ctx, fsys, &o)
	for _, m := range o.Moved {
		m.Close()
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

func (c *Checkpoint) load(ctx context.Context, fsys vfs.FS, o *Options) error {
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
	if len(c.Meta.Kept) > 0 && im.Features.Incompat&image.HasKept == 0 {
		return im.Tail.Corrupt(image.Identity, errors.New("disks are kept with it, and its header does not say so"))
	}
	refs, err := c.Meta.references(im)
	if err != nil {
		return err
	}
	disks, err := c.Meta.disks(im)
	if err != nil {
		return err
	}
	if c.PageMap, err = c.Meta.pageMap(im, refs, disks, &c.facts, c.table); err != nil {
		return err
	}
	cache, err := c.openChecker(refs, disks)
	if err != nil {
		return err
	}
	if err := c.openReferences(ctx, fsys, refs, cache, o); err != nil {
		return err
	}
	if err := c.openMoved(ctx, o); err != nil {
		return err
	}
	if err := c.openNVRAM(ctx, fsys, o); err != nil {
		return err
	}
	// It can take its time, and is done when nothing else is wrong.
	return c.openDisks(ctx, disks, cache, o.Disks)
}

// pageMap opens the page map, and finds out what its entries are checked against, for
// which it reads nothing but this image.
func (m *Meta) pageMap(im *image.Image, refs References, disks *disks, f *source.Facts, table *source.Table) (*pagemap.Map, error) {
	slots := 0
	if m.NVRAM != nil {
		slots = m.NVRAM.Slots
	}
	f.PageSize = im.PageSize
	f.Spaces = []source.SpaceFacts{{
		SegmentPages: uint64(im.SegmentPages), Segments: source.Below(uint32(im.Segments())), Slots: source.Below(uint32(slots)),
	}}
	// A delta's slot is a page of this map.
	sizes := []uint64{uint64(im.Segments()) * uint64(im.SegmentPages)}
	for i := range refs {
		r := &refs[i]
		f.Spaces = append(f.Spaces, source.SpaceFacts{SegmentPages: uint64(r.SegmentPages), Segments: r.NeedSegments, Slots: r.NeedSlots})
		sizes = append(sizes, uint64(r.Segments)*uint64(r.SegmentPages))
	}
	if disks != nil {
		f.AddDisk(disks.slots)
	}
	var err error
	if len(m.Bases) > 0 || im.Chunks(image.Bases) > 0 {
		if f.Bases, err = openMap(im, image.Bases, sizes, m.Bases, f.CheckBase); err != nil {
			return nil, err
		}
	}
	return openMap(im, image.PageMap, m.BlockPages(), m.MapChunks, func(r pagemap.Run) error {
		if err := table.Check(f, r); err != nil {
			return fmt.Errorf("page %s: %w", m.PageName(r.Block, r.Page), err)
		}
		return nil
	})
}

// openMap opens a page map that is in chunks of a kind. check may refuse its runs.
func openMap(im *image.Image, k image.Kind, pages []uint64, starts []pagemap.Start, check func(pagemap.Run) error) (*pagemap.Map, error) {
	if im.Chunks(k) != len(starts) {
		return nil, im.Corrupt(image.Meta, 0, fmt.Errorf("%d %v chunks, %d in the image", len(starts), k, im.Chunks(k)))
	}
	m, err := pagemap.NewMap(pagemap.Source{
		Pages: pages, Starts: starts,
		Read:  func(i int) ([]byte, error) { return im.Chunk(k, i) },
		Check: func(_ int, r pagemap.Run) error { return check(r) },
		Bad: func(i int, err error) error {
			if integrity.IsCorrupt(err) {
				return err // of BASES, which says of itself where it is
			}
			return im.Corrupt(k, i, err)
		},
	})
	if err != nil {
		return nil, im.Corrupt(image.Meta, 0, fmt.Errorf("%v: %w", k, err))
	}
	return m, nil
}

// Reads is what a restore of a checkpoint has to read.
type Reads struct {
	source.Reads
	// DiskPlaces is how many stretches of disk images are read, each in one go, and
	// DiskBytes how long they are together, with what is read in vain between two pages.
	DiskPlaces int64 `json:"disk_places,omitempty"`
	DiskBytes  int64 `json:"disk_bytes,omitempty"`
}

// ReadsOf counts what a restore of an image's checkpoint has to read, here and in the
// images and disks that it refers to. It reads what the image says of itself, and no pages.
func ReadsOf(src image.Source) (r Reads, err error) {
	im, err := image.Open(src)
	if err != nil {
		return Reads{}, err
	}
	m, err := metaOf(im.Tail)
	if err != nil {
		return Reads{}, err
	}
	refs, err := m.references(im)
	if err != nil {
		return Reads{}, err
	}
	disks, err := m.disks(im)
	if err != nil {
		return Reads{}, err
	}
	set := source.Set{Table: source.Default}
	pages, err := m.pageMap(im, refs, disks, &set.Facts, set.Table)
	if err != nil {
		return Reads{}, err
	}
	r.Reads, err = set.Reads(pages)
	if err == nil && disks != nil && m.NeedsDisks() > 0 {
		err = disks.stretches(0, disks.slots, func(_ int, _, n int64) {
			r.DiskPlaces++
			r.DiskBytes += n
		})
	}
	return r, err
}

// openMoved opens what is in .moved pieces, its own and those that others lend.
func (c *Checkpoint) openMoved(ctx context.Context, o *Options) (err error) {
	id := &c.Meta.Identity
	if id.PieceSlots() == 0 {
		return nil
	}
	pieces := o.Moved
	o.Moved = nil // the set closes them
	c.moved, err = moved.Open(pieces, id.UUID, id.PageSize, id.PieceSlots())
	if err == nil && o.Lent != nil {
		err = c.borrow(ctx, o)
	}
	return err
}

// borrow finds the pages of disks that others lend. Those are images that it refers to, which
// are open and stay what they are. The pages are checked like others that were on disks.
func (c *Checkpoint) borrow(ctx context.Context, o *Options) (err error) {
	l, id := o.Lent, &c.Meta.Identity
	slots := source.Ranges{{First: uint32(id.FirstDiskSlot()), Count: uint32(id.DiskSlots)}}
	if l.UUID != id.UUID || id.DiskSlots == 0 || len(l.Slots().Minus(slots)) > 0 {
		return l.Corrupt("they are of other slots than the checkpoint has on disks")
	}
	lenders := make([]*moved.Set, len(l.Images))
	defer func() {
		if err != nil {
			for _, s := range lenders {
				s.Close() // again, if the set has it
			}
		}
	}()
	for i, by := range l.Images {
		k := slices.IndexFunc(c.refs, func(r *reference) bool { return r.UUID == by })
		if k < 0 {
			return l.Corrupt("image %v, which the checkpoint does not refer to", by)
		}
		theirs, err := identityOf(c.refs[k].im.Tail)
		if err != nil {
			return err
		}
		pieces, err := o.Lenders(ctx, c.refs[k].Reference)
		if err != nil {
			return err
		}
		if lenders[i], err = moved.Open(pieces, by, id.PageSize, theirs.PieceSlots()); err != nil {
			return err
		}
	}
	c.moved, err = moved.Borrow(c.moved, l, id.PageSize, lenders)
	return err
}

func (c *Checkpoint) openNVRAM(ctx context.Context, fsys vfs.FS, o *Options) (err error) {
	if c.Meta.NVRAM == nil {
		return nil
	}
	c.part, err = openPart(ctx, fsys, c.Image, &c.Meta.Identity, o.NVRAM, source.Below(uint32(c.Meta.NVRAM.Slots)), c.moved)
	if err != nil {
		return fmt.Errorf("NVRAM part of checkpoint %s: %w", c.name, err)
	}
	if err := c.part.check(c.Meta.BlockPages()); err != nil {
		return c.Image.Corrupt(image.NVRAM, 0, err)
	}
	return nil
}

// Sources are the sources of the checkpoint's pages, for readers of them.
func (c *Checkpoint) Sources() *source.Set {
	return &source.Set{Facts: c.facts, Table: c.table, Backing: backing{c}, Checker: &c.check}
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
func (c *Checkpoint) NewCache(max int) *source.Cache { return source.NewCache(backing{c}, max) }

// orderCache is how many bytes of decoded segments are kept for who reads pages in their
// order: bytes of pages that follow each other are in several segments.
const orderCache = 8 << 20

// InOrder returns a reader for who goes through the pages in the order of the page map.
func (c *Checkpoint) InOrder() *source.Reader {
	return c.Sources().NewReader(c.NewCache(c.facts.InOrder(orderCache) + 2*source.MaxNeeds))
}

// backing is a Checkpoint as a source.Backing.
type backing struct{ c *Checkpoint }

// Fetch implements source.Segments.
func (b backing) Fetch(st *image.Stored, n source.Need) error {
	switch {
	case n.Space == 0:
	case n.Space == b.c.facts.Disk:
		return b.c.disks.fetch(st, n.Number)
	default:
		// What others have is checked by a digest anyway.
		return b.c.refs[n.Space-1].im.FetchSegmentBy(st, n.Number, func(st *image.Stored) bool {
			ok, err := b.c.check.stored(n, st)
			return ok && err == nil // CheckSegment meets the error again
		})
	}
	return b.c.Image.FetchSegment(st, n.Number)
}

// CheckSegment implements source.Segments.
func (b backing) CheckSegment(n source.Need, st *image.Stored, s *image.Segment) error {
	if st.Known() {
		return nil
	}
	if ok, err := b.c.check.stored(n, st); ok || err != nil {
		return err
	}
	return b.c.check.segment(n, s)
}

// Slot implements source.Backing. What is a reference's is checked by its digest, and
// not here.
func (b backing) Slot(space source.Space, slot uint64, want source.Page) ([]byte, error) {
	if space > 0 {
		return b.c.refs[space-1].part.page(slot), nil
	}
	// From the mapping, without a copy.
	return b.c.part.checked(slot, "page "+b.c.PageName(want.Block, want.Number))
}

// Guard implements source.Backing.
func (b backing) Guard(fn func() error) error { return b.c.guard(fn) }

// Drop implements source.Backing.
func (b backing) Drop(space source.Space, first, n uint64) {
	part := b.c.part
	if space > 0 {
		part = b.c.refs[space-1].part
	}
	part.drop(first, n)
}

// PageName names a page for messages: block name and byte offset in it.
func (c *Checkpoint) PageName(block int, page uint64) string { return c.Meta.PageName(block, page) }

// PageName names a page for messages: block name and byte offset in it.
func (m *Meta) PageName(block int, page uint64) string {
	return fmt.Sprintf("%s:%#x", m.Blocks[block].Name, page*uint64(m.PageSize))
}

// Close releases the checkpoint and everything it mapped.
func (c *Checkpoint) Close() error {
	c.part.Close()
	c.moved.Close() // again, if there is a part
	for _, r := range c.refs {
		r.close()
	}
	if c.disks != nil {
		c.disks.close()
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

// DeviceTail is the stored stream from the first device section behind RAM on. It is
// nil if there is none, or if the stream was not understood that far (OpaqueBytes).
func (c *Checkpoint) DeviceTail() ([]byte, error) {
	t := &tailPlayer{c: c}
	err := c.SkeletonChunks(c.Meta.TailChunk, c.Image.Chunks(image.Skeleton), t)
	return t.b, err
}

// tailPlayer collects the device tail.
type tailPlayer struct {
	c *Checkpoint
	b []byte
}

// Literal implements skeleton.Player.
func (t *tailPlayer) Literal(b []byte) error {
	if len(b) > stream.MaxTail-len(t.b) {
		return t.c.Image.Corrupt(image.Skeleton, t.c.Meta.TailChunk, stream.ErrTooLong)
	}
	t.b = append(t.b, b...)
	return nil
}

// Pages implements skeleton.Player.
func (t *tailPlayer) Pages(int, uint64, uint64, bool) error {
	return t.c.Image.Corrupt(image.Skeleton, t.c.Meta.TailChunk, errors.New("pages among the device state"))
}

// guard runs fn, which reads NVRAM pages in the calling goroutine, and turns a fault
// of a mapping into an error.
func (c *Checkpoint) guard(fn func() error) error {
	if c.part == nil && len(c.refs) == 0 {
		return fn()
	}
	err := vfs.CatchFault(fn)
	if err == nil {
		return nil
	}
	// Each part knows its own faults.
	passOn := func() error { return err }
	if c.part != nil {
		err = c.part.guard(passOn)
	}
	for _, r := range c.refs {
		if r.part != nil {
			err = r.part.guard(passOn)
		}
	}
	return err
}

// NVRAMSlots describes the NVRAM part's slots, in prefetch order.
func (c *Checkpoint) NVRAMSlots() []NVRAMSlot {
	if c.part == nil {
		return nil
	}
	return c.part.Slots
}

// HotPages calls fn with the pages that NVRAM was taken for, in prefetch order: those
// of this checkpoint's own part, and then those of what it needs of other parts. A page
// may have its bytes elsewhere by now, and may not exist.
func (c *Checkpoint) HotPages(fn func(block int, page uint64) error) error {
	for _, s := range c.NVRAMSlots() {
		if err := fn(int(s.Block), s.Page); err != nil {
			return err
		}
	}
	for _, r := range c.refs {
		err := r.NeedSlots.Each(func(slot uint32) error {
			s := r.part.Slots[slot]
			return fn(int(s.Block), s.Page)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// Moved tells whether the bytes at a location are in an NVRAM part no more, but were moved
// from there to flash.
func (c *Checkpoint) Moved(at source.Location) bool {
	if at.Tier != source.InNVRAM {
		return false
	}
	part := c.part
	if at.Space > 0 {
		part = c.refs[at.Space-1].part
	}
	return part.moved.Has(at.Slot)
}
