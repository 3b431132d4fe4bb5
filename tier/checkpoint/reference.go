package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/digest"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/moved"
	"github.com/flic-migrate/flic-migrate/tier/source"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// reference is the image of another checkpoint, and its NVRAM part if that is needed,
// opened.
type reference struct {
	*Reference
	src     Source
	im      *image.Image
	digests *digest.Table
	part    *Part // nil: not needed
}

func (r *reference) close() {
	r.part.Close()
	if r.src != nil {
		r.src.Close()
	}
}

// ErrAlone: a checkpoint refers to others, and there is no store to look for them in.
var ErrAlone = errors.New("it has pages in the images of other checkpoints, and is outside of their store")

// references reads what a checkpoint refers to, and compares it with what IDENTITY says
// of it, by which a store keeps it.
func (m *Meta) references(im *image.Image) (References, error) {
	refs, err := ReferencesOf(im)
	if err != nil {
		return nil, err
	}
	if !slices.EqualFunc(refs, m.References, func(r Reference, id uuid.UUID) bool { return r.UUID == id }) {
		return nil, im.Corrupt(image.References, 0, errors.New("IDENTITY lists other references"))
	}
	if len(refs) > 0 && m.Digests == nil {
		return nil, im.Tail.Corrupt(image.Identity, errors.New("it refers to others, and has no key to check their pages with"))
	}
	return refs, nil
}

// openChecker makes what pages are checked with that lie outside of the image, and the
// cache for their digests.
func (c *Checkpoint) openChecker(refs References, disks *disks) (cache *digest.Cache, err error) {
	if len(refs) == 0 && disks == nil {
		return nil, nil
	}
	if c.check.hasher, err = c.Meta.Digests.Hasher(); err != nil {
		return nil, &image.UnsupportedError{File: c.Image.Name(), Why: err.Error()}
	}
	c.check.meta, c.check.disk = c.Meta, c.facts.Disk
	// A demand of a lazy restore that misses takes half a millisecond longer. 8 bytes
	// a page, for half of the digests, are within what a restore may take, and so is a
	// chunk of each image that an eager restore goes on in.
	keep := 8 + min(len(refs), 32)
	for _, n := range c.Meta.BlockPages() {
		keep += int(n / (2 * digest.PerChunk))
	}
	return digest.NewCache(keep), nil
}

// openReferences opens all that the checkpoint refers to.
func (c *Checkpoint) openReferences(ctx context.Context, fsys vfs.FS, refs References, cache *digest.Cache, o *Options) error {
	if len(refs) > 0 && o.Images == nil {
		return fmt.Errorf("%s: %w, of which it names %s", c.Image.Name(), ErrAlone, refs[0].Name())
	}
	for i := range refs {
		r := &reference{Reference: &refs[i]}
		c.refs = append(c.refs, r)
		if err := r.open(ctx, fsys, c.Meta, cache, o); err != nil {
			return fmt.Errorf("checkpoint %s: it needs pages of checkpoint %s: %w", c.name, r.Name(), err)
		}
	}
	c.check.refs = c.refs
	return nil
}

// open opens the reference of a checkpoint m, and finds out whether it is what it was
// when that one was saved, as far as that can be told without reading pages.
func (r *reference) open(ctx context.Context, fsys vfs.FS, m *Meta, cache *digest.Cache, o *Options) (err error) {
	var pieces []moved.Source
	if r.src, pieces, err = o.Images(ctx, r.Reference); err != nil {
		return err
	}
	defer func() {
		for _, p := range pieces {
			p.Close()
		}
	}()
	if r.im, err = image.Open(r.src); err != nil {
		return err
	}
	id, err := identityOf(r.im.Tail)
	if err != nil {
		return err
	}
	wrong := func(format string, args ...any) error {
		return r.im.Tail.Corrupt(image.Identity, fmt.Errorf(format, args...))
	}
	switch d := id.Digests; {
	case id.UUID != r.UUID:
		return wrong("it is checkpoint %v", id.UUID)
	case r.im.PageSize != m.PageSize || id.PageSize != m.PageSize:
		return wrong("it has pages of %d bytes and not of %d", r.im.PageSize, m.PageSize)
	case r.im.SegmentPages != r.SegmentPages || r.im.Segments() != int(r.Segments):
		return wrong("it has %d segments of %d pages, and had %d of %d", r.im.Segments(), r.im.SegmentPages, r.Segments, r.SegmentPages)
	case d == nil:
		return wrong("it has no digests of its pages")
	case d.Algorithm != m.Digests.Algorithm || d.Key != m.Digests.Key || d.Root != r.Root:
		return wrong("its pages have other digests than when it was referred to")
	}
	r.digests, err = openDigests(r.im, r.Root, cache)
	if err != nil || len(r.NeedSlots) == 0 {
		return err
	}
	if id.NVRAM == nil || id.NVRAM.Slots != int(r.Slots) {
		return wrong("its NVRAM part is not the one of %d slots that it had", r.Slots)
	}
	path := ""
	if o.NVRAM != "" {
		// It takes the place of this checkpoint's file, which as a rule is the other's.
		switch same, err := isNVRAM(ctx, fsys, o.NVRAM, id.NVRAM.UUID); {
		case err != nil:
			return err
		case same:
			path = o.NVRAM
		}
	}
	theirs := pieces
	pieces = nil // the part closes them
	r.part, err = OpenPart(ctx, fsys, r.im, id, path, r.NeedSlots, theirs)
	return err
}

// checker is a source.Checker of what references have, and for a Verify of what the
// image has itself.
type checker struct {
	meta   *Meta
	hasher *digest.Hasher
	refs   []*reference
	own    *ownDigests // nil: not checked
	disk   source.Space
	disks  *openDisks // of space disk
}

// ownDigests are the digests that an image has of its own pages, for others.
type ownDigests struct {
	im    *image.Image
	table *digest.Table
}

// openDigests opens the table of an image's digests.
func openDigests(im *image.Image, root digest.Root, cache *digest.Cache) (*digest.Table, error) {
	return digest.Open(root, cache,
		func(frame int) ([]byte, error) { return im.Chunk(image.Digests, frame) },
		func(frame int, err error) error { return im.Corrupt(image.Digests, frame, err) })
}

// stored tells whether a segment of a reference is stored as it was when that was
// written, which says the same of all its pages in less time. If it is not, those tell
// what is wrong, if anything is.
func (c *checker) stored(n source.Need, st *image.Stored) (bool, error) {
	if n.Space == 0 || int(n.Space) > len(c.refs) {
		return false, nil
	}
	want, err := c.refs[n.Space-1].digests.Segment(n.Number)
	return err == nil && want != digest.Sum{} && st.Sum(c.hasher) == want, err
}

// segment checks the pages of a PAGES segment: all of them, whichever are
// needed. A segment with a page that is not what it was is not the one that was
// referred to.
func (c *checker) segment(n source.Need, s *image.Segment) error {
	per := 0
	if n.Space > 0 && n.Space == c.disk {
		return c.disks.check(n.Number, s)
	}
	if n.Space > 0 {
		per = c.refs[n.Space-1].SegmentPages
	} else if c.own != nil {
		per = c.own.im.SegmentPages
	}
	first := uint64(n.Number) * uint64(per)
	for i := range s.Len() {
		page, err := s.Page(i)
		if err == nil {
			err = c.CheckPage(n.Space, first+uint64(i), page)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// CheckPage implements source.Checker.
func (c *checker) CheckPage(space source.Space, slot uint64, page []byte) error {
	if space > 0 {
		r := c.refs[space-1]
		return checkPage(c.hasher, r.digests, r.im, slot, page)
	}
	if c.own != nil {
		return checkPage(c.hasher, c.own.table, c.own.im, slot, page)
	}
	return nil
}

// checkPage compares the page of a flash slot with its digest.
func checkPage(hasher *digest.Hasher, t *digest.Table, im *image.Image, slot uint64, page []byte) error {
	want, err := t.FlashSlot(slot)
	if err == nil && hasher.Sum(page) != want {
		per := uint64(im.SegmentPages)
		n := uint32(slot / per)
		err = &integrity.CorruptError{File: im.Name(), Offset: im.SegmentOffset(n),
			What: fmt.Sprintf("page %d of segment %d", slot%per, n), Err: digest.ErrMismatch}
	}
	return err
}

// CheckSlot implements source.Checker.
func (c *checker) CheckSlot(space source.Space, slot uint64, want source.Page, content []byte) error {
	r := c.refs[space-1]
	sum, err := r.digests.NVRAMSlot(slot)
	if err == nil && c.hasher.Sum(content) != sum {
		err = r.part.damaged(slot, fmt.Sprintf("page %s, of checkpoint %s", c.meta.PageName(want.Block, want.Number), r.Name()), digest.ErrMismatch)
	}
	return err
}
