package save

import (
	"errors"

	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/tier/dedup"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/loose"
	"github.com/flic-migrate/flic-migrate/tier/pagemap"
)

// read copies what a page holds so far into dst; zeros if it has not come.
func (p *placer) read(dst []byte, block int, page uint64) error {
	return p.content(dst, p.to.pages.Get(block, page))
}

// content copies the content of a page with entry e into dst.
func (p *placer) content(dst []byte, e pagemap.Entry) error {
	switch e.Kind() {
	case pagemap.Absent, pagemap.ZeroData:
		clear(dst)
		return nil
	case pagemap.Fill:
		for i := range dst {
			dst[i] = byte(e.Value())
		}
		return nil
	case pagemap.NVRAM:
		return p.to.region.ReadPage(int(e.Value()), dst)
	}
	n, i := uint32(e.Value()/uint64(p.segmentPages())), int(e.Value()%uint64(p.segmentPages()))
	if data := p.inMemory(n); data != nil {
		copy(dst, data[i*p.pageSize:(i+1)*p.pageSize])
		return nil
	}
	if p.records != nil && n == p.records.Number {
		if err := p.submitRecords(); err != nil {
			return err
		}
	}
	seg, err := p.recent.get(p.to.img, n)
	if err != nil {
		return err
	}
	if seg.Kind == image.Records {
		payload, err := seg.Record(i)
		if err != nil {
			return err
		}
		return ramparse.Inflate(dst, payload)
	}
	b, err := seg.Page(i)
	copy(dst, b)
	return err
}

// inMemory is the content of a PAGES segment that is open or whose buffer has
// not been used again, which spares most fetches the way over the file.
func (p *placer) inMemory(n uint32) []byte {
	if p.seg != nil && n == p.seg.Number {
		return p.seg.Data
	}
	return p.to.img.Recent(n)
}

// Fetch implements dedup.Source.
func (p *placer) Fetch(at dedup.Place) ([]byte, error) {
	e := placeEntry(at)
	for i := range p.chunkPages {
		err := p.content(p.fetchBuf[i*p.pageSize:(i+1)*p.pageSize], e+pagemap.Entry(i))
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
	if e.Kind() != pagemap.NVRAM {
		return false
	}
	for i := range uint64(p.chunkPages) {
		if slot := e.Value() + i; p.rewritten[slot] || p.users[slot] == 0 {
			return true
		}
	}
	return false
}

// A dedup.Place is a slot and, in bit 0, whether it is one of flash.

func entryPlace(e pagemap.Entry) dedup.Place {
	at := dedup.Place(e.Value() << 1)
	if e.Kind() == pagemap.Flash {
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

// segmentCache keeps the segments that were read back last. What get returns is
// valid until the next get.
type segmentCache struct {
	reader image.SegmentReader
	slots  [cachedSegments]*image.Segment
	next   int
}

const cachedSegments = 16

func (c *segmentCache) get(w *image.Writer, n uint32) (*image.Segment, error) {
	for _, s := range c.slots {
		if s != nil && s.Number == n {
			return s, nil
		}
	}
	oldest := &c.slots[c.next]
	c.next = (c.next + 1) % len(c.slots)
	c.reader.Recycle(*oldest)
	s, err := w.ReadSegment(&c.reader, n)
	*oldest = s // nil if it failed
	return s, err
}
