package save

import (
	"context"
	"errors"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/dedup"
	"github.com/flic-migrate/flic-migrate/tier/delta"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/loose"
	"github.com/flic-migrate/flic-migrate/tier/pagemap"
	"github.com/flic-migrate/flic-migrate/tier/source"
)

// cachedSegments is how many segments that were read back are kept.
const cachedSegments = 16

// readback gives a placer what it has placed. It is the sources of a checkpoint that
// is still being written: what lies in the placer's and the writer's buffers comes
// from there, and all else by way of the file.
//
// A page that is not whole in this checkpoint is what the parent has somewhere, or a
// delta against that, so the parent gives it; or another image has it.
type readback struct {
	p      *placer
	reader *source.Reader
	lent   image.Segment
	slot   []byte // a page from NVRAM

	parent *parentReader // nil: nothing is referred to
	disk   []byte        // a page from a disk; nil: there are none
	result []byte        // a page made of a delta
}

func newReadback(p *placer) *readback {
	b := &readback{p: p, slot: make([]byte, p.pageSize)}
	table := source.Default
	if p.to.refs != nil {
		// The reader's waits have an end: nobody else fills its cache.
		b.parent, b.result = p.to.par.reader(context.Background()), make([]byte, p.pageSize)
		for _, k := range []pagemap.Kind{pagemap.Foreign, pagemap.ForeignNVRAM, pagemap.ForeignDelta} {
			table = table.With(source.Row{Kind: k, Name: k.String(), Form: source.Whole, Content: b.elsewhere})
		}
		table = table.With(source.Row{Kind: pagemap.Delta, Name: "delta", Form: source.Whole, Needs: ownSegment, Content: b.delta})
	}
	if p.to.disks != nil {
		b.disk = make([]byte, p.pageSize)
		table = table.With(source.Row{Kind: pagemap.Disk, Name: "disk", Form: source.Whole, Content: b.disks})
	}
	set := &source.Set{
		Facts: source.Facts{PageSize: p.pageSize, Spaces: []source.SpaceFacts{{SegmentPages: uint64(p.segmentPages())}}},
		Table: table, Backing: b,
	}
	b.reader = set.NewReader(source.NewCache(b, cachedSegments))
	return b
}

// ownSegment is Row.Needs of a page in a segment of this image.
func ownSegment(f *source.Facts, r pagemap.Run, dst []source.Need) ([]source.Need, uint64) {
	return append(dst, source.Segment(uint32(r.First/f.Spaces[0].SegmentPages))), 1
}

// Lend implements source.Lender: most segments that are asked for are still in a
// buffer.
func (b *readback) Lend(n source.Need) *image.Segment {
	var data []byte
	if seg := b.p.seg; seg != nil && n.Number == seg.Number {
		data = seg.Data
	} else if data = b.p.to.img.Recent(n.Number); data == nil {
		return nil
	}
	b.lent.Lend(n.Number, data, b.p.pageSize)
	return &b.lent
}

// elsewhere is Row.Content of a page that is as it is in the parent, or in another image.
func (b *readback) elsewhere(rd *source.Reader, e pagemap.Entry) (source.Content, error) {
	page := rd.Page()
	at, _ := source.Default.Locate(e)
	if m := b.p.to.peers.of(at.Space); m != nil {
		err := m.read(context.Background(), b.result, at.Slot)
		return source.Content{Form: source.Whole, Data: b.result}, err
	}
	if int(at.Space) > b.p.to.refs.parents {
		err := b.p.to.shared.read(b.result, at)
		return source.Content{Form: source.Whole, Data: b.result}, err
	}
	theirs, ok := b.parent.there(e)
	if !ok {
		return source.Content{}, errors.New("the parent has lost it")
	}
	data, err := b.parent.content(theirs, page.Block, page.Number)
	return source.Content{Form: source.Whole, Data: data}, err
}

// disks is Row.Content of a page that is on a disk.
func (b *readback) disks(_ *source.Reader, e pagemap.Entry) (source.Content, error) {
	err := b.p.readDisk(b.disk, checkpoint.DiskSlot(e.Value()))
	return source.Content{Form: source.Whole, Data: b.disk}, err
}

// delta is Row.Content of a page that is a delta against the parent's whole bytes.
func (b *readback) delta(rd *source.Reader, e pagemap.Entry) (c source.Content, err error) {
	seg, i := rd.InSegment(0, e.Value())
	d, pieces, err := seg.Delta(i)
	if err != nil {
		return c, err
	}
	var base []byte
	if is := b.p.base(e.Value()); onDisk(is) {
		base, err = b.disk, b.p.readDisk(b.disk, checkpoint.DiskSlot(is.Value()))
	} else {
		at, ok := b.parent.there(is)
		if !ok {
			return c, errors.New("the parent has lost what it is a delta against")
		}
		page := rd.Page()
		base, err = b.parent.content(at, page.Block, page.Number)
	}
	switch {
	case err != nil:
	case pieces:
		err = delta.ApplyPieces(b.result, base, d)
	default:
		err = delta.Apply(b.result, base, d)
	}
	return source.Content{Form: source.Whole, Data: b.result}, err
}

// Fetch implements source.Backing. An open segment of records or deltas has to leave
// first.
func (b *readback) Fetch(st *image.Stored, n source.Need) error {
	for _, k := range []*packed{&b.p.records, &b.p.deltas} {
		if k.buf != nil && n.Number == k.buf.Number {
			if err := b.p.submitPacked(k); err != nil {
				return err
			}
		}
	}
	return b.p.to.img.FetchSegment(st, n.Number)
}

// CheckSegment implements source.Segments: all segments are the image's own.
func (b *readback) CheckSegment(source.Need, *image.Stored, *image.Segment) error { return nil }

// Slot implements source.Backing. What is being written is read with read(2): its
// checksum is not durable yet, and a fault in a mapping would be a read error.
func (b *readback) Slot(_ source.Space, slot uint64, _ source.Page) ([]byte, error) {
	return b.slot, b.p.to.region.ReadPage(int(slot), b.slot)
}

// Guard implements source.Backing: nothing is mapped.
func (b *readback) Guard(fn func() error) error { return fn() }

// Drop implements source.Backing.
func (b *readback) Drop(source.Space, uint64, uint64) {}

// content copies what entry e stands for into dst; if that is in the parent, the page
// that has the entry must be given. It never waits for anything but the image's writer,
// which has an end.
func (b *readback) content(dst []byte, of source.Page, e pagemap.Entry) error {
	return b.reader.Copy(context.Background(), dst, of, e)
}

// read copies what a page holds so far into dst; zeros if it has not come.
func (p *placer) read(dst []byte, block int, page uint64) error {
	return p.back.content(dst, source.Page{Block: block, Number: page}, p.to.pages.Get(block, page))
}

// stored tells whether a page has content in a tier: its source is not the entry
// alone.
func (p *placer) stored(block int, page uint64) bool {
	e := p.to.pages.Get(block, page)
	return source.Default.Row(e.Kind()).Form == source.Whole
}

// Fetch implements dedup.Source.
func (p *placer) Fetch(at dedup.Place) ([]byte, error) {
	e := placeEntry(at)
	for i := range p.chunkPages {
		err := p.back.content(p.fetchBuf[i*p.pageSize:(i+1)*p.pageSize], source.Page{}, e+pagemap.Entry(i))
		if errors.Is(err, loose.ErrGone) {
			err = dedup.ErrGone
		}
		if err != nil {
			return nil, err
		}
	}
	return p.fetchBuf, nil
}

// Stale implements dedup.Source: an NVRAM slot that was written again holds
// something else, and one that nobody uses will.
func (p *placer) Stale(at dedup.Place) bool {
	e := placeEntry(at)
	if !inNVRAM(e) {
		return false
	}
	for i := range uint64(p.chunkPages) {
		if slot := e.Value() + i; p.rewritten[slot] || p.users[slot] == 0 {
			return true
		}
	}
	return false
}

// The placer gives out slots of two tiers, and keeps books of each. What an entry of
// any kind stands for is the sources' to say.

func inNVRAM(e pagemap.Entry) bool { return e.Kind() == pagemap.NVRAM }
func inFlash(e pagemap.Entry) bool { return e.Kind() == pagemap.Flash }
func isDelta(e pagemap.Entry) bool { return e.Kind() == pagemap.Delta }

// A dedup.Place is a slot and, in bit 0, whether it is one of flash.

func entryPlace(e pagemap.Entry) dedup.Place {
	at := dedup.Place(e.Value() << 1)
	if inFlash(e) {
		at |= 1
	}
	return at
}

func placeEntry(at dedup.Place) pagemap.Entry {
	if at&1 != 0 {
		return pagemap.Make(pagemap.Flash, uint64(at>>1))
	}
	return pagemap.Make(pagemap.NVRAM, uint64(at>>1))
}
