// Package source is the one place that knows where the bytes of a page can be. An
// entry of the page map is a kind and a value; a [Row] for each kind says what must
// be read before the bytes are there, and makes them of it:
//
//	page map ─► entry ─► Row.Check    does what it names exist?
//	                     Row.Needs    which segments must be decoded first
//	                       │              └─► Cache: Reserve, Fill, Wait, Release
//	                       └─► Row.Content ◄──────┘ ─► record form and bytes
//
//	kind            bytes are                                        checked by
//	nvram           in this checkpoint's NVRAM part                  CRC-32C
//	flash           in a segment of its image                        CRC-32C
//	foreign nvram   in another's NVRAM part                          digest
//	foreign         in a segment of another's image                  digest
//	disk            in a disk image that does not change             digest
//	delta           words here, and a base that is one of the above  as its parts
//	foreign delta   words there, likewise                            digest of the page
//
// Eager and lazy restore, verify, copies and a save that reads back what it has
// stored all get bytes through it, and for that nothing else looks at an entry's kind. So a
// new source of page bytes is one row more to all who read. Who makes a page map decides by
// kind what is stored where: tier/save, and of tier/store flatten (copy.go) and unite
// (unite.go), which has a new slot for each page of its own. A kind without a row refuses the
// pages that are of it when their bytes are asked for, and to be written into another page map
// (Row.Known).
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

	// seg and record are where Data is deflated, for whoever finds that it is damaged.
	seg    *image.Segment
	record int
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
		if err := ramparse.Inflate(dst, c.Data); err != nil {
			return c.seg.Corrupt(fmt.Errorf("record %d: %w", c.record, err))
		}
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

// Space is an image, whose segments are numbered, and the NVRAM part that goes with it.
// 0 is the checkpoint's own, i+1 that of its reference i. One more, Facts.Disk, has what
// is in disk images.
type Space uint16

// Need names one thing that must be fetched and decoded: a segment of an image.
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
	return fmt.Sprintf("segment %d of reference %d", n.Number, n.Space-1)
}

// Facts are what a row must know of a checkpoint.
type Facts struct {
	PageSize int // bytes
	Spaces   []SpaceFacts
	// Disk is the last space if there are disk slots: a segment of it is DiskSegment
	// slots that follow each other, wherever on disks their pages lie. 0: there are none.
	Disk      Space
	DiskSlots uint64
	// Bases is the entry of each delta's base: block i is space i, a page a slot there.
	// It is checked with CheckBase. nil: there are no deltas.
	Bases *pagemap.Map
}

// DiskSegment is how many pages of disk images are read together. Disk slots are in the
// order of disks and sectors, so that they lie as near to each other as can be: 128 KiB
// at the least, as much as a segment of an image has.
const DiskSegment = 32

// AddDisk adds the space of so many disk slots, 1 or more, to those of images.
func (f *Facts) AddDisk(slots uint64) {
	f.Disk, f.DiskSlots = Space(len(f.Spaces)), slots
	f.Spaces = append(f.Spaces, SpaceFacts{SegmentPages: DiskSegment, Segments: Below(uint32((slots + DiskSegment - 1) / DiskSegment))})
}

// Images are the spaces that are images.
func (f *Facts) Images() []SpaceFacts {
	if f.Disk > 0 {
		return f.Spaces[:f.Disk]
	}
	return f.Spaces
}

// SpaceFacts are what a row must know of an image.
type SpaceFacts struct {
	SegmentPages uint64 // pages in a full segment
	Segments     Ranges // that pages may need
	Slots        Ranges // of its NVRAM part, likewise
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
	// Reader.Segment and Reader.InSegment give them. Errors need not name the page.
	Content func(rd *Reader, e pagemap.Entry) (Content, error)

	// bytes is Content as a whole page, of kinds whose bytes are stored.
	bytes   func(rd *Reader, e pagemap.Entry) ([]byte, error)
	at      locate // of kinds whose bytes are stored
	tier    Tier
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
	Delta      int64 // stored here, against another page
	Unchanged  int64 // in another checkpoint, whole or against another page
}

// Table has the rows by kind. It does not change once it is made.
type Table struct {
	rows [int(pagemap.MaxKind) + 1]Row
}

// Default is the table of this version's kinds.
var Default = stored.With(bare...).With(deltas...)

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

// bare are the kinds whose entries say it all.
var bare = []Row{
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
}
