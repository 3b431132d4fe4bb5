package checkpoint

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/tier/digest"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/pagemap"
	"github.com/flic-migrate/flic-migrate/tier/source"
)

// Verify reads and checks every byte of the checkpoint: all frames, all NVRAM
// slots, what it needs of other checkpoints, that each page's bytes can be had, and that
// the skeleton places every page that was saved exactly once. found is called for each
// damage, in order of files; Verify goes on after it and returns an error only if it
// could not go on.
func (c *Checkpoint) Verify(ctx context.Context, found func(error)) error {
	v := &verifier{c: c, ctx: ctx, found: found, set: c.Sources(), cache: c.NewCache(c.facts.InOrder(verifyCache) + 2*source.MaxNeeds), bad: make(map[source.Need]bool), seen: make(map[source.Need]bool)}
	v.check = c.check
	if err := v.report(v.openDigests()); err != nil {
		return err
	}
	v.set.Checker = &v.check
	v.slots = &slotChecker{Backing: v.set.Backing, checked: make([]bool, len(c.NVRAMSlots())), check: &v.check, part: c.part}
	v.set.Backing = v.slots
	v.reader = v.set.NewReader(v.cache)
	defer v.reader.Close()
	for _, step := range []func() error{v.frames, v.references, v.disks, v.nvram, v.elsewhere, v.unused, v.skeleton} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// verifyCache is how many bytes of decoded segments a Verify keeps: pages are read by
// the segments of their bases, and several segments of deltas may be against one.
const verifyCache = 2 << 20

// verifier is one Verify.
type verifier struct {
	c      *Checkpoint
	ctx    context.Context
	found  func(error)
	set    *source.Set
	cache  *source.Cache
	reader *source.Reader
	slots  *slotChecker
	check  checker
	page   []byte // inflated
	decode image.SegmentReader
	order  *source.Order        // nil: the page map is damaged, and elsewhere reports it
	bad    map[source.Need]bool // segments that can't be decoded
	seen   map[source.Need]bool // own segments whose digests were compared
	room   [source.MaxNeeds]source.Need
}

// openDigests has what the image says of its own pages checked as well: others may come
// to refer to them.
func (v *verifier) openDigests() error {
	m, im := v.c.Meta, v.c.Image
	if m.Digests == nil {
		return nil
	}
	hasher, err := m.Digests.Hasher()
	if err != nil {
		return nil // a later version's, for which it need not be known
	}
	t, err := openDigests(im, m.Digests.Root, digest.NewCache(4))
	if err != nil {
		return err
	}
	v.check.hasher, v.check.own = hasher, &ownDigests{im, t}
	// Those of segments say nothing that those of their pages do not. They are read.
	for n := uint64(0); n < t.Segments && err == nil; n += digest.PerChunk {
		_, err = t.Segment(uint32(n))
	}
	return err
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
// pages that need it first.
func (v *verifier) frames() (err error) {
	if v.order, err = v.set.NewOrder(v.c.PageMap); err != nil {
		if !integrity.IsCorrupt(err) {
			return err
		}
		v.order = nil
	}
	return v.c.Image.Frames(func(k image.Kind, n uint32, _ int64) error {
		if v.ctx.Err() != nil {
			return context.Cause(v.ctx)
		}
		if k.IsSegment() {
			return v.segment(source.Segment(n))
		}
		_, err := v.c.Image.Chunk(k, int(n))
		return v.report(err)
	})
}

// references reads what this checkpoint needs of the images of others, and nothing else
// of them, each from front to back.
func (v *verifier) references() error {
	for i, r := range v.c.refs {
		err := r.NeedSegments.Each(func(n uint32) error {
			if v.ctx.Err() != nil {
				return context.Cause(v.ctx)
			}
			if r.im.SegmentOffset(n) < 0 {
				return nil // a number that was not used; a page that names it says so
			}
			return v.segment(source.Need{Space: source.Space(i + 1), Number: n})
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// disks reads the pages that are on disks, in the order in which they lie there.
func (v *verifier) disks() error {
	if v.set.Disk == 0 {
		return nil
	}
	return v.set.Spaces[v.set.Disk].Segments.Each(func(n uint32) error {
		if v.ctx.Err() != nil {
			return context.Cause(v.ctx)
		}
		return v.segment(source.Need{Space: v.set.Disk, Number: n})
	})
}

// segment reads a segment, and the pages that need it first.
func (v *verifier) segment(n source.Need) error {
	ok, err := v.sound(n)
	if err != nil || !ok || v.order == nil {
		return err
	}
	return v.order.Stretches(v.order.Thing(n), v.pages)
}

// sound tells whether a segment can be decoded. Once it reports why not.
func (v *verifier) sound(n source.Need) (bool, error) {
	if v.bad[n] {
		return false, nil
	}
	h, err := v.cache.Get(v.ctx, n, &v.decode)
	if err != nil {
		if n.Space > 0 && n.Space != v.set.Disk {
			err = fmt.Errorf("it needs checkpoint %s: %w", v.c.refs[n.Space-1].Name(), err)
		}
		err = v.report(err)
		v.bad[n] = err == nil
		return false, err
	}
	defer v.cache.Release(h)
	if n.Space == 0 && v.check.own != nil && !v.seen[n] {
		v.seen[n] = true
		s, err := h.Wait(v.ctx)
		if err == nil {
			err = v.digests(n, s)
		}
		return true, v.report(err)
	}
	return true, nil
}

// digests compares the pages of an own segment with their digests. Those of deltas are
// compared as they are read.
func (v *verifier) digests(n source.Need, s *image.Segment) error {
	switch s.Kind {
	case image.Pages:
		return v.check.segment(n, s)
	case image.Records:
		if v.page == nil {
			v.page = make([]byte, v.set.PageSize)
		}
		for i := range s.Len() {
			b, err := s.Record(i)
			if err != nil {
				return err
			}
			if err := ramparse.Inflate(v.page, b); err != nil {
				return s.Corrupt(fmt.Errorf("record %d: %w", i, err))
			}
			slot := uint64(n.Number)*uint64(v.c.Image.SegmentPages) + uint64(i)
			if err := v.check.CheckPage(0, slot, v.page); err != nil {
				return err
			}
		}
	}
	return nil
}

// pages reads the pages of a stretch. Of damaged ones the first is reported, and none
// where a segment is damaged: that was.
func (v *verifier) pages(r pagemap.Run) error {
	if r.Step == 0 {
		r.Count = 1 // they are all in one place
	}
	needs, _ := v.set.Stretch(r, v.room[:])
	for _, n := range needs {
		if ok, err := v.sound(n); !ok {
			return err
		}
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
	if v.c.part == nil || v.c.part.file == nil {
		return nil
	}
	// Of the file's two headers one is enough to read it, so nobody else
	// notices when the other is lost. What else Check finds is either this
	// checkpoint's, and was found by Open, or another's.
	damage, err := v.c.part.file.Check(v.ctx)
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
			_, err := v.slots.Slot(0, uint64(slot), source.Page{Block: int(owner.Block), Number: owner.Page})
			return err
		})
		if err := v.report(err); err != nil {
			return err
		}
		v.c.part.drop(uint64(slot), 1)
	}
	return nil
}

// slotChecker is a Backing that remembers which of the own NVRAM slots were checked,
// and compares them with their digests.
type slotChecker struct {
	source.Backing
	checked []bool
	check   *checker
	part    *Part
}

// Slot implements source.Backing.
func (s *slotChecker) Slot(space source.Space, slot uint64, want source.Page) ([]byte, error) {
	b, err := s.Backing.Slot(space, slot, want)
	if err == nil && space == 0 && !s.checked[slot] && s.check.own != nil {
		var sum digest.Sum
		if sum, err = s.check.own.table.NVRAMSlot(slot); err == nil && s.check.hasher.Sum(b) != sum {
			err = s.part.damaged(slot, fmt.Sprintf("NVRAM slot %d", slot), digest.ErrMismatch)
		}
	}
	if space == 0 {
		s.checked[slot] = true
	}
	return b, err
}

// placement is where a chunk of the skeleton places pages, numbered through all blocks.
type placement struct {
	first, count uint64
	chunk        int
}

// placements collects them. There are as many as the skeleton has runs, however many
// pages those claim.
type placements struct {
	m     *pagemap.Map
	chunk int // that is played
	list  []placement
}

// Literal implements skeleton.Player.
func (p *placements) Literal([]byte) error { return nil }

// Pages implements skeleton.Player.
func (p *placements) Pages(block int, page, count uint64, _ bool) error {
	p.list = append(p.list, placement{p.m.Number(block, page), count, p.chunk})
	return nil
}

// skeleton checks that every page that was saved has exactly one place, and no other
// page has one.
func (v *verifier) skeleton() error {
	p := placements{m: v.c.PageMap}
	for ; p.chunk < v.c.Image.Chunks(image.Skeleton); p.chunk++ {
		if err := v.c.SkeletonChunks(p.chunk, p.chunk+1, &p); err != nil {
			return v.report(err)
		}
	}
	slices.SortFunc(p.list, func(a, b placement) int {
		return cmp.Or(cmp.Compare(a.first, b.first), cmp.Compare(a.chunk, b.chunk))
	})
	// What is placed twice is reported and then left out, so that the list is one of
	// different pages.
	end := uint64(0)
	for i := range p.list {
		a := &p.list[i]
		if a.first < end {
			v.misplaced(a.chunk, "places page %s twice", a.first)
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
				v.misplaced(0, "has no place for page %s, which was saved", at)
			}
			if at = next; at == end {
				break
			}
			if !saved {
				v.misplaced(list[0].chunk, "places page %s, which was never saved", at)
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

func (v *verifier) misplaced(chunk int, format string, number uint64) {
	block, page := v.c.PageMap.Page(number)
	v.found(v.c.Image.Corrupt(image.Skeleton, chunk, fmt.Errorf(format, v.c.PageName(block, page))))
}
