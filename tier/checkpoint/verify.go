package checkpoint

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/pagemap"
	"github.com/flic-migrate/flic-migrate/tier/source"
)

// Verify reads and checks every byte of the checkpoint: all frames, all NVRAM
// slots, that each page's bytes can be had, and that the skeleton places every page
// that was saved exactly once. found is called for each damage, in order of files;
// Verify goes on after it and returns an error only if it could not go on.
func (c *Checkpoint) Verify(ctx context.Context, found func(error)) error {
	v := &verifier{c: c, ctx: ctx, found: found, set: c.Sources(), cache: c.NewCache(2 * source.MaxNeeds)}
	v.slots = &slotChecker{Backing: v.set.Backing, checked: make([]bool, len(c.NVRAMSlots()))}
	v.set.Backing = v.slots
	v.reader = v.set.NewReader(v.cache)
	defer v.reader.Close()
	for _, step := range []func() error{v.frames, v.nvram, v.elsewhere, v.unused, v.skeleton} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// verifier is one Verify.
type verifier struct {
	c      *Checkpoint
	ctx    context.Context
	found  func(error)
	set    *source.Set
	cache  *source.Cache
	reader *source.Reader
	slots  *slotChecker
	decode image.SegmentReader
}

// report passes damage to found and anything else on.
func (v *verifier) report(err error) error {
	var unsupported *image.UnsupportedError
	if integrity.IsCorrupt(err) || errors.As(err, &unsupported) {
		v.found(err)
		return nil
	}
	return err
}

// frames reads the image from front to back: each segment once, and with it the
// pages that are in it.
func (v *verifier) frames() error {
	order, err := v.set.NewOrder(v.c.PageMap)
	if err != nil {
		if !integrity.IsCorrupt(err) {
			return err
		}
		order = nil // elsewhere reports it
	}
	return v.c.Image.Frames(func(k image.Kind, n uint32, _ int64) error {
		if v.ctx.Err() != nil {
			return context.Cause(v.ctx)
		}
		if k.IsSegment() {
			return v.segment(order, source.Segment(n))
		}
		_, err := v.c.Image.Chunk(k, int(n))
		return v.report(err)
	})
}

func (v *verifier) segment(order *source.Order, n source.Need) error {
	h, err := v.cache.Get(v.ctx, n, &v.decode)
	if err != nil {
		return v.report(err)
	}
	defer v.cache.Release(h)
	if order == nil {
		return nil
	}
	return order.Stretches(order.Thing(n), v.pages)
}

// pages reads the pages of a stretch. Of damaged ones the first is reported.
func (v *verifier) pages(r pagemap.Run) error {
	if r.Step == 0 {
		r.Count = 1 // they are all in one place
	}
	at := r.Page
	err := v.reader.Read(v.ctx, r, func(i, n uint64, _ source.Content) error {
		at = r.Page + i + n
		return nil
	})
	if integrity.IsCorrupt(err) {
		err = fmt.Errorf("page %s: %w", v.c.PageName(r.Block, at), err)
	}
	return v.report(err)
}

// nvramHeaders is where an NVRAM file's headers end (docs/format-nvram.md).
const nvramHeaders = 8 << 10

// nvram checks the NVRAM file's own headers.
func (v *verifier) nvram() error {
	if v.c.part == nil {
		return nil
	}
	// Of the file's two headers one is enough to read it, so nobody else
	// notices when the other is lost. What else Check finds is either this
	// checkpoint's, and was found by Open, or another's.
	damage, err := v.c.nvfile.Check(v.ctx)
	if err != nil {
		return err
	}
	for _, err := range damage {
		if e := (*integrity.CorruptError)(nil); errors.As(err, &e) && e.Offset < nvramHeaders {
			v.found(err)
		}
	}
	return nil
}

// elsewhere reads the pages that need no segment.
func (v *verifier) elsewhere() error {
	err := v.c.PageMap.Runs(func(r pagemap.Run) error {
		if v.ctx.Err() != nil {
			return context.Cause(v.ctx)
		}
		if err := v.c.Readable(r); err != nil {
			return v.report(err)
		}
		if v.set.Row(r.Kind).Needs != nil {
			return nil
		}
		return v.pages(r)
	})
	return v.report(err)
}

// unused reads the NVRAM slots that no page has any more.
func (v *verifier) unused() error {
	for slot, owner := range v.c.NVRAMSlots() {
		if v.slots.checked[slot] {
			continue
		}
		if v.ctx.Err() != nil {
			return context.Cause(v.ctx)
		}
		err := v.c.guard(func() error {
			_, err := v.c.slot(uint64(slot), int(owner.Block), owner.Page)
			return err
		})
		if err := v.report(err); err != nil {
			return err
		}
		v.c.region.DontNeed(slot, 1)
	}
	return nil
}

// slotChecker is a Backing that checks each NVRAM slot once, however many pages have
// it. Its bytes are for nobody.
type slotChecker struct {
	source.Backing
	checked []bool
}

// Slot implements source.Backing.
func (s *slotChecker) Slot(slot uint64, want source.Page) ([]byte, error) {
	if s.checked[slot] {
		return nil, nil
	}
	s.checked[slot] = true
	return s.Backing.Slot(slot, want)
}

// placement is where the skeleton places pages, numbered through all blocks.
type placement struct{ first, count uint64 }

// placements collects them. There are as many as the skeleton has runs, however many
// pages those claim.
type placements struct {
	m    *pagemap.Map
	list []placement
}

// Literal implements skeleton.Player.
func (p *placements) Literal([]byte) error { return nil }

// Pages implements skeleton.Player.
func (p *placements) Pages(block int, page, count uint64, _ bool) error {
	p.list = append(p.list, placement{p.m.Number(block, page), count})
	return nil
}

// skeleton checks that every page that was saved has exactly one place, and no other
// page has one.
func (v *verifier) skeleton() error {
	p := placements{m: v.c.PageMap}
	if err := v.c.Skeleton(&p); err != nil {
		return v.report(err)
	}
	slices.SortFunc(p.list, func(a, b placement) int { return cmp.Compare(a.first, b.first) })
	// What is placed twice is reported and then left out, so that the list is one of
	// different pages.
	end := uint64(0)
	for i := range p.list {
		a := &p.list[i]
		if a.first < end {
			v.misplaced("places page %s twice", a.first)
			skip := min(end-a.first, a.count)
			a.first, a.count = a.first+skip, a.count-skip
		}
		end = max(end, a.first+a.count)
	}
	list := slices.DeleteFunc(p.list, func(a placement) bool { return a.count == 0 })
	err := v.c.PageMap.Runs(func(r pagemap.Run) error {
		at := v.c.PageMap.Number(r.Block, r.Page)
		saved := v.set.Row(r.Kind).Saved()
		for end := at + r.Count; at < end; {
			for len(list) > 0 && list[0].first+list[0].count <= at {
				list = list[1:]
			}
			next := end // up to there no page has a place
			if len(list) > 0 {
				next = min(end, max(at, list[0].first))
			}
			if saved && next > at {
				v.misplaced("has no place for page %s, which was saved", at)
			}
			if at = next; at == end {
				break
			}
			if !saved {
				v.misplaced("places page %s, which was never saved", at)
			}
			at = min(end, list[0].first+list[0].count)
		}
		return nil
	})
	if integrity.IsCorrupt(err) {
		return nil // elsewhere has reported it
	}
	return err
}

func (v *verifier) misplaced(format string, number uint64) {
	block, page := v.c.PageMap.Page(number)
	v.found(v.c.Image.Corrupt(image.Skeleton, 0, fmt.Errorf(format, v.c.PageName(block, page))))
}
