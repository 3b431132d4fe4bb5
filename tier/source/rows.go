package source

import (
	"fmt"

	"github.com/flic-migrate/flic-migrate/tier/delta"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/pagemap"
)

// A slot of a space is what all stored pages have in their entries; locate takes it out
// of a value. The kinds that differ in nothing else share their rows' code.
type locate func(value uint64) (space int, slot uint64)

func own(value uint64) (int, uint64) { return 0, value }

func foreign(value uint64) (int, uint64) {
	ref, slot := pagemap.SplitForeign(value)
	return ref + 1, slot
}

// stored has the kinds whose bytes are somewhere as a whole: a delta's base is of one of
// them, and of no other.
var stored = newTable().With(
	nvramRow(Row{
		Kind: pagemap.NVRAM, Name: "nvram",
		Count: func(c *Counts, r pagemap.Run) { c.Hot += int64(r.Count) },
	}, own),
	nvramRow(Row{
		Kind: pagemap.ForeignNVRAM, Name: "foreign nvram",
		Count: func(c *Counts, r pagemap.Run) { c.Unchanged += int64(r.Count) },
	}, foreign),
	flashRow(Row{
		Kind: pagemap.Flash, Name: "flash",
		Count: func(c *Counts, r pagemap.Run) { c.Cold += int64(r.Count) },
	}, own),
	flashRow(Row{
		Kind: pagemap.Foreign, Name: "foreign",
		Count: func(c *Counts, r pagemap.Run) { c.Unchanged += int64(r.Count) },
	}, foreign),
	diskRow,
)

var deltas = []Row{
	deltaRow(Row{
		Kind: pagemap.Delta, Name: "delta",
		Count: func(c *Counts, r pagemap.Run) { c.Delta += int64(r.Count) },
	}, own),
	deltaRow(Row{
		Kind: pagemap.ForeignDelta, Name: "foreign delta",
		Count: func(c *Counts, r pagemap.Run) { c.Unchanged += int64(r.Count) },
	}, foreign),
}

// nvramRow makes a row of pages that are in an NVRAM part.
func nvramRow(row Row, at locate) Row {
	row.Form, row.Mapped = Whole, true
	row.at, row.tier = at, InNVRAM
	row.Check = func(f *Facts, r pagemap.Run) error {
		return f.check(r, at, "NVRAM slot", func(s *SpaceFacts, first, last uint64) bool { return s.Slots.Has(first, last) })
	}
	row.bytes = func(rd *Reader, e pagemap.Entry) ([]byte, error) {
		space, slot := at(e.Value())
		b, err := rd.slot(space, slot)
		if err == nil && space > 0 {
			err = rd.set.CheckSlot(Space(space), slot, rd.page, b)
		}
		return b, err
	}
	row.Content = row.wholeContent
	return row
}

// flashRow makes a row of whole pages that are in segments.
func flashRow(row Row, at locate) Row {
	row.Form = Whole
	row.at, row.tier = at, OnFlash
	row.Check = func(f *Facts, r pagemap.Run) error { return f.checkFlash(r, at) }
	row.Needs = func(f *Facts, r pagemap.Run, dst []Need) ([]Need, uint64) {
		need, n := f.segment(r, at)
		return append(dst, need), n
	}
	row.bytes = func(rd *Reader, e pagemap.Entry) ([]byte, error) {
		space, slot := at(e.Value())
		seg, i := rd.InSegment(Space(space), slot)
		b, err := rd.inflated(seg, i)
		if err == nil && space > 0 && seg.Kind != image.Pages { // those the Cache has checked
			err = rd.set.CheckPage(Space(space), slot, b)
		}
		return b, err
	}
	// How the other checkpoint's stream had the page is nothing to this one's: a
	// COMPRESS_PAGE record that it did not have is one that QEMU need not take.
	row.Content = row.wholeContent
	if space, _ := at(0); space == 0 {
		row.Content = func(rd *Reader, e pagemap.Entry) (Content, error) {
			_, slot := at(e.Value())
			return ofSegment(rd.InSegment(0, slot))
		}
	}
	return row
}

// diskRow is the row of pages that equal a block of a disk image. Whoever decodes them has
// checked them.
var diskRow = Row{
	Kind: pagemap.Disk, Name: "disk", Form: Whole, at: own, tier: OnDisk,
	Count: func(c *Counts, r pagemap.Run) { c.Disk += int64(r.Count) },
	Check: func(f *Facts, r pagemap.Run) error {
		if last := r.Last(); last >= f.DiskSlots {
			return fmt.Errorf("disk slot %d does not exist", last)
		}
		return nil
	},
	Needs: func(f *Facts, r pagemap.Run, dst []Need) ([]Need, uint64) {
		n := r.Count
		if r.Step != 0 {
			n = min(n, DiskSegment-r.First%DiskSegment)
		}
		return append(dst, Need{f.Disk, uint32(r.First / DiskSegment)}), n
	},
	bytes: diskPage,
	Content: func(rd *Reader, e pagemap.Entry) (Content, error) {
		b, err := diskPage(rd, e)
		return Content{Form: Whole, Data: b}, err
	},
}

func diskPage(rd *Reader, e pagemap.Entry) ([]byte, error) {
	seg, i := rd.InSegment(rd.set.Disk, e.Value())
	return seg.Page(i)
}

// deltaRow makes a row of pages that are deltas in segments against bases.
func deltaRow(row Row, at locate) Row {
	row.Form, row.Mapped = Whole, true
	row.at, row.tier = at, AsDelta
	row.Check = func(f *Facts, r pagemap.Run) error {
		if err := f.checkFlash(r, at); err != nil {
			return err
		}
		space, first := at(r.First)
		_, last := at(r.Last())
		return f.checkBases(space, first, last)
	}
	row.Needs = func(f *Facts, r pagemap.Run, dst []Need) ([]Need, uint64) {
		need, n := f.segment(r, at)
		base, err := f.base(at(r.First))
		if err != nil {
			return append(dst, need), 1 // and Content says so
		}
		if base.Count = min(base.Count, n); r.Step == 0 {
			base.Count = 1
		}
		// The base comes first. Its segment is the larger, and as a rule has the bytes
		// of other pages too: who goes through all pages by their first need decodes
		// it once.
		if needs := stored.Row(base.Kind).Needs; needs != nil {
			dst, base.Count = needs(f, base, dst)
		}
		if r.Step != 0 {
			n = base.Count
		}
		return append(dst, need), n
	}
	row.bytes = func(rd *Reader, e pagemap.Entry) ([]byte, error) {
		space, slot := at(e.Value())
		seg, i := rd.InSegment(Space(space), slot)
		d, pieces, err := seg.Delta(i)
		if err != nil {
			return nil, err
		}
		run, err := rd.set.base(space, slot)
		if err != nil {
			return nil, err
		}
		base, err := stored.Row(run.Kind).bytes(rd, run.Entry(0))
		if err != nil {
			return nil, fmt.Errorf("the base of its delta: %w", err)
		}
		out := rd.buffer(&rd.result)
		apply := delta.Apply
		if pieces {
			apply = delta.ApplyPieces
		}
		if err := apply(out, base, d); err != nil {
			return nil, seg.Corrupt(fmt.Errorf("delta %d: %w", i, err))
		}
		if rd.set.Checker != nil {
			err = rd.set.CheckPage(Space(space), slot, out)
		}
		return out, err
	}
	row.Content = row.wholeContent
	return row
}

// wholeContent is Row.Content of pages that are had as a whole.
func (r *Row) wholeContent(rd *Reader, e pagemap.Entry) (Content, error) {
	b, err := r.bytes(rd, e)
	return Content{Form: Whole, Data: b}, err
}

// ofSegment is the content at a position of a decoded segment.
func ofSegment(s *image.Segment, i int) (Content, error) {
	if s.Kind == image.Records {
		b, err := s.Record(i)
		return Content{Form: Deflated, Data: b, seg: s, record: i}, err
	}
	b, err := s.Page(i)
	return Content{Form: Whole, Data: b}, err
}

// check refuses a run whose slots are not all there, as has tells of those from first
// to last of a space.
func (f *Facts) check(r pagemap.Run, at locate, what string, has func(s *SpaceFacts, first, last uint64) bool) error {
	space, first := at(r.First)
	end, last := at(r.Last())
	switch {
	case space >= len(f.Images()):
		return fmt.Errorf("reference %d does not exist", space-1)
	case end != space:
		return fmt.Errorf("a run from reference %d into the next", space-1)
	case !has(&f.Spaces[space], first, last) && space == 0:
		return fmt.Errorf("%s %d does not exist", what, last)
	case !has(&f.Spaces[space], first, last):
		return fmt.Errorf("%s %d is not among those that are needed of reference %d", what, last, space-1)
	}
	return nil
}

func (f *Facts) checkFlash(r pagemap.Run, at locate) error {
	return f.check(r, at, "flash slot", func(s *SpaceFacts, first, last uint64) bool {
		return s.Segments.Has(first/s.SegmentPages, last/s.SegmentPages)
	})
}

// segment is the need of a run's first page, and how many of the run's pages have it.
func (f *Facts) segment(r pagemap.Run, at locate) (Need, uint64) {
	space, slot := at(r.First)
	per := f.Spaces[space].SegmentPages
	n := r.Count
	if r.Step != 0 {
		n = min(n, per-slot%per)
	}
	return Need{Space(space), uint32(slot / per)}, n
}

// CheckBase refuses a run of Facts.Bases that names what does not exist, or what is no
// base.
func (f *Facts) CheckBase(r pagemap.Run) error {
	row := stored.Row(r.Kind)
	switch {
	case r.Kind == pagemap.Absent:
		return nil
	case !row.Known():
		return fmt.Errorf("the delta in slot %d is against a page of kind %v", r.Page, r.Kind)
	}
	if err := row.Check(f, r); err != nil {
		return fmt.Errorf("base of the delta in slot %d: %w", r.Page, err)
	}
	return nil
}

// checkBases refuses deltas of which one has no base, or one that can't be read.
func (f *Facts) checkBases(space int, first, last uint64) error {
	for slot := first; slot <= last; {
		r, err := f.base(space, slot)
		if err != nil {
			return err
		}
		slot += r.Count
	}
	return nil
}

// base is what the delta in a slot, which exists, is against, and the deltas that
// follow it against what follows that.
func (f *Facts) base(space int, slot uint64) (pagemap.Run, error) {
	if f.Bases == nil || space >= f.Bases.Blocks() || slot >= f.Bases.Pages(space) {
		return pagemap.Run{}, fmt.Errorf("the delta in slot %d has no base", slot)
	}
	r, err := f.Bases.Find(space, slot)
	if err == nil && r.Kind == pagemap.Absent {
		err = fmt.Errorf("the delta in slot %d has no base", slot)
	}
	return r, err
}
