package checkpoint

import (
	"github.com/flic-migrate/flic-migrate/tier/digest"
	"github.com/flic-migrate/flic-migrate/tier/image"
)

// EachDigest calls fn with the digest of each page that an image has whole in a PAGES
// segment, and its slot: what another checkpoint can refer to without more. It reads
// IDENTITY, the index and DIGESTS. Errors are image.Open's, damage, and fn's.
func EachDigest(src image.Source, fn func(sum digest.Sum, slot uint64) error) error {
	im, err := image.Open(src)
	if err != nil {
		return err
	}
	id, err := identityOf(im.Tail)
	if err != nil || id.Digests == nil {
		return err
	}
	t, err := openDigests(im, id.Digests.Root, digest.NewCache(1))
	if err != nil {
		return err
	}
	per := uint64(im.SegmentPages)
	for n := range uint64(im.Segments()) {
		if im.SegmentKind(uint32(n)) != image.Pages {
			continue
		}
		for slot := n * per; slot < min((n+1)*per, t.Flash); slot++ {
			sum, err := t.FlashSlot(slot)
			if err != nil {
				return err
			}
			if sum == (digest.Sum{}) {
				break // the segment is not full
			}
			if err := fn(sum, slot); err != nil {
				return err
			}
		}
	}
	return nil
}

// Lent is an image that pages of a new checkpoint may be in, by digests that compare with
// that one's. It is safe for concurrent use.
type Lent struct {
	Reference // that the new checkpoint will have; nothing of it is needed yet
	image     *image.Image
	table     *digest.Table
	hasher    *digest.Hasher
}

// Lend opens an image for others. It is nil if nobody with digests of h can refer to it, or
// if it has pages of another size. keep is for chunks of digests.
func Lend(src image.Source, h *digest.Hasher, pageSize int, keep *digest.Cache) (*Lent, error) {
	im, err := image.Open(src)
	if err != nil {
		return nil, err
	}
	id, err := identityOf(im.Tail)
	if err != nil {
		return nil, err
	}
	d := id.Digests
	if d == nil || d.Algorithm != h.Algorithm() || d.Key != h.Key() || im.PageSize != pageSize {
		return nil, nil
	}
	l := &Lent{image: im, hasher: h, Reference: Reference{
		UUID: id.UUID, Root: d.Root, VM: id.VM, Number: id.Number,
		SegmentPages: im.SegmentPages, Segments: uint32(im.Segments()),
	}}
	if id.NVRAM != nil {
		l.Slots = uint32(id.NVRAM.Slots)
	}
	l.table, err = openDigests(im, d.Root, keep)
	return l, err
}

// Has tells whether the image has the page with a digest whole in a slot. Any slot may be
// asked about.
func (l *Lent) Has(slot uint64, sum digest.Sum) (bool, error) {
	n := slot / uint64(l.SegmentPages)
	if n >= uint64(l.Segments) || l.image.SegmentKind(uint32(n)) != image.Pages || slot >= l.table.Flash || sum == (digest.Sum{}) {
		return false, nil
	}
	is, err := l.table.FlashSlot(slot)
	return err == nil && is == sum, err
}

// Page copies the page in a slot into dst, checked by its digest.
func (l *Lent) Page(dst []byte, slot uint64) error {
	var sr image.SegmentReader
	seg, err := l.image.Segment(&sr, uint32(slot/uint64(l.SegmentPages)))
	if err != nil {
		return err
	}
	b, err := seg.Page(int(slot % uint64(l.SegmentPages)))
	if err == nil {
		err = checkPage(l.hasher, l.table, l.image, slot, b)
	}
	if err == nil {
		copy(dst, b)
	}
	return err
}
