// Package source is the one place that knows where the bytes of a page can be. An
// entry of the page map is a kind and a value; a [Row] for each kind says what must
// be read before the bytes are there, and makes them of it:
//
//	page map ─► entry ─► Row.Check    does what it names exist?
//	                     Row.Needs    which segments must be decoded first
//	                       │              └─► Cache: Reserve, Fill, Wait, Release
//	                       └─► Row.Content ◄──────┘ ─► record form and bytes
//
// Eager and lazy restore, verify, copies and a save that reads back what it has
// stored all go through it, and nothing else looks at an entry's kind. So a new
// source of page bytes is one row more. A kind without a row refuses the pages that
// are of it when their bytes are asked for, and nothing else.
//
// A restore is planned and then executed: [Set.Stretch] tells what any stretch of
// pages needs without reading anything, so that a planner can have it decoded ahead,
// and a [Reader] then wants it in the same order.
package source

import (
	"fmt"

	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/pagemap"
)

// Form is how a page stands in a migration stream.
type Form uint8

const (
	Nothing  Form = iota // it was never in the stream, and reads as zero
	Filled               // a ZERO record: all bytes are Content.Fill
	Zeros                // a PAGE record of zero bytes
	Whole                // a PAGE record of Content.Data
	Deflated             // a COMPRESS_PAGE record with the payload Content.Data
)

// Content is what a page holds. Data is read only, and valid until the Reader that
// gave it is asked for another page.
type Content struct {
	Form Form
	Fill byte
	Data []byte
}

// Zero tells whether the page reads as zero, as far as that is known without
// looking at its bytes.
func (c Content) Zero() bool {
	return c.Form == Nothing || c.Form == Zeros || c.Form == Filled && c.Fill == 0
}

// Copy puts the page's bytes into dst, which has the length of a page.
func (c Content) Copy(dst []byte) error {
	switch c.Form {
	case Whole:
		copy(dst, c.Data)
	case Deflated:
		return ramparse.Inflate(dst, c.Data)
	default:
		clear(dst)
		for i := range dst {
			if c.Fill == 0 {
				break
			}
			dst[i] = c.Fill
		}
	}
	return nil
}

// Space is a numbering of things that must be fetched. 0 are the segments of the
// checkpoint's own image; a source that reads something else has a space of its own.
type Space uint16

// Need names one thing that must be fetched and decoded.
type Need struct {
	Space  Space
	Number uint32
}

// Segment is the need of a segment of the checkpoint's own image.
func Segment(n uint32) Need { return Need{Number: n} }

func (n Need) String() string {
	if n.Space == 0 {
		return fmt.Sprintf("segment %d", n.Number)
	}
	return fmt.Sprintf("object %d of space %d", n.Number, n.Space)
}

// Facts are what a row must know of a checkpoint.
type Facts struct {
	PageSize     int      // bytes
	SegmentPages uint64   // pages in a full segment
	Slots        uint64   // of the NVRAM part in use
	Objects      []uint32 // of each space: one more than the highest number
}

// MaxNeeds is how many needs one page can have: a delta and its base.
const MaxNeeds = 2

// Row is all that is known of a kind.
type Row struct {
	Kind pagemap.Kind
	Name string
	// Form tells without reading anything how pages of the kind stand in the
	// stream. Whole stands for Deflated as well: that is seen in the segment.
	Form Form
	// Mapped is set if Content.Data lies in a mapping, which can fault.
	Mapped bool
	// Count adds a run to the column of a save's report where it belongs. nil: none.
	Count func(c *Counts, r pagemap.Run)
	// Check refuses a run that names what does not exist; the reader of a page map
	// calls it for every run, before any page is given out. nil: all exist.
	Check func(f *Facts, r pagemap.Run) error
	// Needs appends to dst what the run's first page needs, at most MaxNeeds, and
	// returns how many of the run's pages, at least 1, need exactly that. nil: nothing.
	Needs func(f *Facts, r pagemap.Run, dst []Need) ([]Need, uint64)
	// Content is the content of a page with entry e. Its needs are at hand:
	// Reader.Segment gives them. Errors need not name the page.
	Content func(rd *Reader, e pagemap.Entry) (Content, error)

	unknown bool
}

// Known tells whether pages of the kind can be read at all.
func (r *Row) Known() bool { return !r.unknown }

// Saved tells whether pages of the kind have a record in the stream.
func (r *Row) Saved() bool { return r.Form != Nothing }

// Zero tells whether all pages of a run read as zero, as far as its entries say.
func (r *Row) Zero(run pagemap.Run) bool {
	return r.Form == Nothing || r.Form == Zeros || r.Form == Filled && run.First == 0
}

// Counts are pages by the columns of a save's report.
type Counts struct {
	Zero       int64 // zero, however they were sent
	ZeroAsData int64 // those of them that QEMU sent as data
	Hot        int64 // in the NVRAM part
	Cold       int64 // in the flash image
	Disk       int64 // equal to a block of a disk image
	Delta      int64 // stored against another page
}

// Table has the rows by kind. It does not change once it is made.
type Table struct {
	rows [int(pagemap.MaxKind) + 1]Row
}

// Default is the table of this version's kinds.
var Default = newTable().With(rows...)

func newTable() *Table {
	t := new(Table)
	for i := range t.rows {
		k := pagemap.Kind(i)
		t.rows[i] = Row{Kind: k, Name: k.String(), Form: Whole, unknown: true, Content: func(*Reader, pagemap.Entry) (Content, error) {
			return Content{}, &UnknownError{k}
		}}
	}
	return t
}

// With returns a table that has these rows as well, or in place of t's.
func (t *Table) With(rows ...Row) *Table {
	n := *t
	for _, r := range rows {
		n.rows[r.Kind] = r
	}
	return &n
}

// Row is the row of a kind. One that nobody knows has one too, whose pages can't be
// read.
func (t *Table) Row(k pagemap.Kind) *Row { return &t.rows[k&pagemap.MaxKind] }

// Check refuses a run that names what does not exist.
func (t *Table) Check(f *Facts, r pagemap.Run) error {
	if row := t.Row(r.Kind); row.Check != nil {
		return row.Check(f, r)
	}
	return nil
}

// Count adds a run to the columns of a save's report.
func (t *Table) Count(c *Counts, r pagemap.Run) {
	if row := t.Row(r.Kind); row.Count != nil {
		row.Count(c, r)
	}
}

// UnknownError is what a page of an unknown kind gives in place of its bytes.
type UnknownError struct{ Kind pagemap.Kind }

func (e *UnknownError) Error() string {
	return fmt.Sprintf("its source, %v, is not known to this flic-migrate", e.Kind)
}

// rows are the kinds of this version.
var rows = []Row{
	{
		Kind: pagemap.Absent, Name: "absent", Form: Nothing,
		Content: func(*Reader, pagemap.Entry) (Content, error) { return Content{}, nil },
	},
	{
		Kind: pagemap.Fill, Name: "fill", Form: Filled,
		Count: func(c *Counts, r pagemap.Run) {
			if r.First == 0 {
				c.Zero += int64(r.Count)
			}
		},
		Content: func(_ *Reader, e pagemap.Entry) (Content, error) {
			return Content{Form: Filled, Fill: byte(e.Value())}, nil
		},
	},
	{
		Kind: pagemap.ZeroData, Name: "zero data", Form: Zeros,
		Count: func(c *Counts, r pagemap.Run) {
			c.Zero += int64(r.Count)
			c.ZeroAsData += int64(r.Count)
		},
		Content: func(*Reader, pagemap.Entry) (Content, error) { return Content{Form: Zeros}, nil },
	},
	{
		Kind: pagemap.NVRAM, Name: "nvram", Form: Whole, Mapped: true,
		Count: func(c *Counts, r pagemap.Run) { c.Hot += int64(r.Count) },
		Check: func(f *Facts, r pagemap.Run) error {
			if last := r.Last(); last >= f.Slots {
				return fmt.Errorf("NVRAM slot %d does not exist", last)
			}
			return nil
		},
		Content: func(rd *Reader, e pagemap.Entry) (Content, error) {
			b, err := rd.slot(e.Value())
			return Content{Form: Whole, Data: b}, err
		},
	},
	{
		Kind: pagemap.Flash, Name: "flash", Form: Whole,
		Count: func(c *Counts, r pagemap.Run) { c.Cold += int64(r.Count) },
		Check: func(f *Facts, r pagemap.Run) error {
			if last := r.Last(); last/f.SegmentPages >= uint64(f.Objects[0]) {
				return fmt.Errorf("flash slot %d does not exist", last)
			}
			return nil
		},
		Needs: SlotNeeds,
		Content: func(rd *Reader, e pagemap.Entry) (Content, error) {
			return ofSegment(rd.InSegment(e.Value()))
		},
	},
}

// SlotNeeds is Row.Needs of kinds whose value is a flash slot.
func SlotNeeds(f *Facts, r pagemap.Run, dst []Need) ([]Need, uint64) {
	n, at := r.First/f.SegmentPages, r.First%f.SegmentPages
	count := r.Count
	if r.Step != 0 {
		count = min(count, f.SegmentPages-at)
	}
	return append(dst, Segment(uint32(n))), count
}

// ofSegment is the content at a position of a decoded segment.
func ofSegment(s *image.Segment, i int) (Content, error) {
	if s.Kind == image.Records {
		b, err := s.Record(i)
		return Content{Form: Deflated, Data: b}, err
	}
	b, err := s.Page(i)
	return Content{Form: Whole, Data: b}, err
}
