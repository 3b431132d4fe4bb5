package checkpoint

import (
	"sort"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/digest"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/source"
)

// DiskSlots is how many pages the checkpoint has on disks, or copied from them.
func (c *Checkpoint) DiskSlots() uint64 {
	if c.disks == nil {
		return 0
	}
	return c.disks.slots
}

// DiskSlotsOf is DiskSlots of an image.
func DiskSlotsOf(src image.Source) (uint64, error) {
	d, _, err := openDiskTable(src)
	if err != nil || d == nil {
		return 0, err
	}
	return d.slots, nil
}

// DiskPages reads the pages of a checkpoint's disk slots, each compared with its digest. It
// is for one goroutine, and quickest in the order of the slots.
type DiskPages struct {
	d       *openDisks
	sr      image.SegmentReader
	segment *image.Segment // the last that was read; nil: none
	number  uint32
}

// DiskPages returns a reader, which is good until the checkpoint is closed.
func (c *Checkpoint) DiskPages() *DiskPages { return &DiskPages{d: c.disks} }

// Page is the page of a slot, which must exist, until the next call. An error names the disk
// and the place in it.
func (p *DiskPages) Page(slot uint64) ([]byte, error) {
	n := uint32(slot / source.DiskSegment)
	if p.segment == nil || p.number != n {
		if p.segment != nil {
			p.sr.Recycle(p.segment)
			p.segment = nil
		}
		if err := p.d.fetch(&p.sr.Stored, n); err != nil {
			return nil, err
		}
		s, err := p.sr.Decode(&p.sr.Stored)
		if err != nil {
			return nil, err
		}
		if err := p.d.check(n, s); err != nil {
			return nil, err
		}
		p.segment, p.number = s, n
	}
	return p.segment.Page(int(slot % source.DiskSegment))
}

// DiskPiece tells in which image's pieces the page of a disk slot is, and which slot it is
// there: the checkpoint's own, or one that lends it. It is in none as long as a disk has it.
func (c *Checkpoint) DiskPiece(slot uint64) (id uuid.UUID, there uint64, ok bool) {
	if c.disks == nil || c.disks.here == nil {
		return id, 0, false
	}
	id, there = c.disks.here.Owner(c.disks.base + slot)
	return id, there, true
}

// DiskTwins finds the pages of an image's disk slots among those of another: of the same
// disk as it was, at the same place, with the same digest.
type DiskTwins struct {
	own, other *diskIndex
	disks      []int // the other's number of each own disk; -1: it has none
}

// diskIndex is the disk slots of an image with their digests.
type diskIndex struct {
	*disks
	sums *digest.Table
}

func openDiskTable(src image.Source) (*diskIndex, *Digests, error) {
	im, err := image.Open(src)
	if err != nil {
		return nil, nil, err
	}
	m, err := metaOf(im.Tail)
	if err != nil {
		return nil, nil, err
	}
	d, err := m.disks(im)
	if err != nil || d == nil {
		return nil, nil, err
	}
	sums, err := openDigests(im, m.Digests.Root, digest.NewCache(8))
	return &diskIndex{d, sums}, m.Digests, err
}

// OpenDiskTwins compares two images; nil if they have no disk in common, or no digests that
// compare.
func OpenDiskTwins(own, other image.Source) (*DiskTwins, error) {
	a, ad, err := openDiskTable(own)
	if err != nil || a == nil {
		return nil, err
	}
	b, bd, err := openDiskTable(other)
	if err != nil || b == nil || ad.Algorithm != bd.Algorithm || ad.Key != bd.Key || a.page != b.page {
		return nil, err
	}
	t := &DiskTwins{own: a, other: b}
	common := false
	for i := range a.list {
		t.disks = append(t.disks, -1)
		for k := range b.list {
			if a.list[i].Path == b.list[k].Path && a.list[i].Differs(b.list[k].Identity) == "" {
				t.disks[i], common = k, true
			}
		}
	}
	if !common {
		return nil, nil
	}
	return t, nil
}

// DiskTwins is OpenDiskTwins of an open checkpoint.
func (c *Checkpoint) DiskTwins(other image.Source) (*DiskTwins, error) {
	return OpenDiskTwins(c.src, other)
}

// Find returns the other image's slot with the page of an own one.
func (t *DiskTwins) Find(slot uint64) (twin uint64, ok bool, err error) {
	if slot >= t.own.slots {
		return 0, false, nil
	}
	at, err := t.own.slot(slot)
	if err != nil || t.disks[at.Disk()] < 0 {
		return 0, false, err
	}
	want := MakeDiskSlot(t.disks[at.Disk()], at.Sector())
	n := sort.Search(int(t.other.slots), func(i int) bool {
		s, serr := t.other.slot(uint64(i))
		if serr != nil {
			err = serr
		}
		return s >= want
	})
	if err != nil || n == int(t.other.slots) {
		return 0, false, err
	}
	s, err := t.other.slot(uint64(n))
	if err != nil || s != want {
		return 0, false, err
	}
	a, err := t.own.sums.DiskSlot(slot)
	if err != nil {
		return 0, false, err
	}
	b, err := t.other.sums.DiskSlot(uint64(n))
	return uint64(n), err == nil && a == b, err
}

// DiskSums tells by their digests which pages an image's disk slots have.
type DiskSums struct {
	sums *digest.Table
	hash *digest.Hasher
}

// OpenDiskSums returns an image's; nil if it has nothing on disks.
func OpenDiskSums(src image.Source) (*DiskSums, error) {
	d, of, err := openDiskTable(src)
	if err != nil || d == nil {
		return nil, err
	}
	hash, err := of.Hasher()
	return &DiskSums{d.sums, hash}, err
}

// Is tells whether a page is that of a slot.
func (d *DiskSums) Is(slot uint64, page []byte) (bool, error) {
	want, err := d.sums.DiskSlot(slot)
	return err == nil && d.hash.Sum(page) == want, err
}
