package lazy

import (
	"fmt"

	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/pagemap"
)

// sender takes a page. data is nil if the page reads as zero, and otherwise
// the sender's until it returns.
type sender func(block int, page uint64, data []byte) error

// pageSource finds single pages for the pump. It keeps the segments it decoded
// last, because a guest that touches a page touches its neighbours.
type pageSource struct {
	c      *checkpoint.Checkpoint
	cache  [demandSegments]*image.Segment
	reader image.SegmentReader
	next   int
	page   []byte // for pages that lie nowhere as they are
	nvram  uint64 // 1 + the slot that was read last, or 0
}

const (
	demandSegments = 32
	// dropSlots is how many slots around one that has been read are no longer to
	// be mapped then. A kernel maps up to a whole folio, 512 KiB have been seen,
	// around a page that is touched, and all of that counts as this process's
	// memory.
	dropSlots = 512
)

// leave is called when the page that was visited last and those around it have
// been sent: now nobody waits.
func (s *pageSource) leave() {
	if s.nvram > 0 {
		slot := s.nvram - 1
		s.c.DropNVRAM(slot-slot%dropSlots, dropSlots)
		s.nvram = 0
	}
}

func newPageSource(c *checkpoint.Checkpoint) *pageSource {
	return &pageSource{c: c, page: make([]byte, c.Meta.PageSize)}
}

// visit hands a page's content to send and tells which segment it is in, -1 if
// in none.
func (s *pageSource) visit(block int, page uint64, send sender) (segment int64, err error) {
	run, err := s.c.PageMap.Find(block, page)
	if err != nil {
		return -1, err
	}
	e := run.Entry(0)
	var seg *image.Segment
	segment = -1
	switch e.Kind() {
	case pagemap.NVRAM:
		s.nvram = 1 + e.Value()
	case pagemap.Flash:
		n := segmentOf(s.c, e)
		segment = int64(n)
		if seg, err = s.segment(n); err != nil {
			return segment, fmt.Errorf("page %s: %w", s.c.PageName(block, page), err)
		}
	}
	return segment, content(s.c, seg, s.page, block, page, e, send)
}

// around hands the other pages of the aligned n pages around a page that visit was
// asked for to send, those behind it first, as far as they cost no more decoding.
func (s *pageSource) around(block int, page uint64, n uint64, send sender) error {
	first := page &^ (n - 1)
	end := min(first+n, s.c.PageMap.Pages(block))
	for i := uint64(1); i < end-first; i++ {
		other := first + (page-first+i)%(end-first)
		run, err := s.c.PageMap.Find(block, other)
		if err != nil {
			return err
		}
		e := run.Entry(0)
		var seg *image.Segment
		switch e.Kind() {
		case pagemap.NVRAM:
			s.nvram = 1 + e.Value()
		case pagemap.Flash:
			if seg = s.cached(segmentOf(s.c, e)); seg == nil {
				continue
			}
		}
		if err := content(s.c, seg, s.page, block, other, e, send); err != nil {
			return err
		}
	}
	return nil
}

func segmentOf(c *checkpoint.Checkpoint, e pagemap.Entry) uint32 {
	return uint32(e.Value() / uint64(c.Image.SegmentPages))
}

func (s *pageSource) cached(n uint32) *image.Segment {
	for _, seg := range s.cache {
		if seg != nil && seg.Number == n {
			return seg
		}
	}
	return nil
}

func (s *pageSource) segment(n uint32) (*image.Segment, error) {
	if seg := s.cached(n); seg != nil {
		return seg, nil
	}
	i := s.next
	s.next = (i + 1) % demandSegments
	s.reader.Recycle(s.cache[i])
	seg, err := s.c.Image.Segment(&s.reader, n)
	s.cache[i] = seg // nil if it failed
	return seg, err
}

// content hands the content of a page with entry e to send; seg is its decoded
// segment if it is in flash, buf is room for one page.
func content(c *checkpoint.Checkpoint, seg *image.Segment, buf []byte, block int, page uint64, e pagemap.Entry, send sender) error {
	switch e.Kind() {
	case pagemap.Absent, pagemap.ZeroData:
		return send(block, page, nil)
	case pagemap.Fill:
		if e.Value() == 0 {
			return send(block, page, nil)
		}
		for i := range buf {
			buf[i] = byte(e.Value())
		}
		return send(block, page, buf)
	case pagemap.NVRAM:
		return c.GuardNVRAM(func() error {
			data, err := c.NVRAMPage(e.Value(), block, page)
			if err != nil {
				return err
			}
			return send(block, page, data)
		})
	}
	i := int(e.Value() % uint64(c.Image.SegmentPages))
	var err error
	if seg.Kind == image.Records {
		var payload []byte
		if payload, err = seg.Record(i); err == nil {
			err = ramparse.Inflate(buf, payload)
		}
	} else {
		buf, err = seg.Page(i)
	}
	if err != nil {
		return fmt.Errorf("page %s: %w", c.PageName(block, page), err)
	}
	return send(block, page, buf)
}
