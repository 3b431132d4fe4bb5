// Package diff compares the guest memory of two checkpoints, page by page, through the
// resolver: each page that is read is checked as at a restore.
//
//	page map of A ─┐            same place, or both zero ─► same, nothing is read
//	               ├─► page ─►
//	page map of B ─┘            read both, compare ─► same or changed
package diff

import (
	"bytes"
	"context"
	"fmt"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/pagemap"
	"github.com/flic-migrate/flic-migrate/tier/source"
)

// Report says what differs. JSON field names are the command line's; counts are pages.
type Report struct {
	PageSize int     `json:"page_size"` // bytes
	Pages    int64   `json:"pages"`     // that both have
	Changed  int64   `json:"changed"`
	Zeroed   int64   `json:"zeroed"` // of those changed, pages that are zero in B
	Read     int64   `json:"read"`   // that had to be read to know
	Blocks   []Block `json:"blocks"` // in B's order
	// OnlyA and OnlyB are RAM blocks that the other has not.
	OnlyA []string `json:"only_a,omitempty"`
	OnlyB []string `json:"only_b,omitempty"`
}

// Block is a RAM block that both have. Where one has more pages than the other, these
// are left out.
type Block struct {
	Name    string `json:"name"`
	Pages   int64  `json:"pages"`
	Changed int64  `json:"changed"`
	Zeroed  int64  `json:"zeroed"`
	// Sources says where B has the pages that changed, by source.
	Sources map[string]int64 `json:"sources"`
}

// between is how many pages are compared between two looks at the context.
const between = 4096

// Compare compares B with A.
func Compare(ctx context.Context, a, b *checkpoint.Checkpoint) (*Report, error) {
	if a.Meta.PageSize != b.Meta.PageSize {
		return nil, fmt.Errorf("pages of %d bytes can't be compared with pages of %d", a.Meta.PageSize, b.Meta.PageSize)
	}
	c := &comparison{ctx: ctx, a: newSide(a), b: newSide(b), rep: &Report{PageSize: a.Meta.PageSize, Blocks: []Block{}}}
	defer c.a.reader.Close()
	defer c.b.reader.Close()
	place := make(map[string]int)
	for i, block := range a.Meta.Blocks {
		place[block.Name] = i
	}
	for i, block := range b.Meta.Blocks {
		j, ok := place[block.Name]
		if !ok {
			c.rep.OnlyB = append(c.rep.OnlyB, block.Name)
			continue
		}
		delete(place, block.Name)
		if err := c.block(block.Name, j, i); err != nil {
			return nil, err
		}
	}
	for _, block := range a.Meta.Blocks {
		if _, ok := place[block.Name]; ok {
			c.rep.OnlyA = append(c.rep.OnlyA, block.Name)
		}
	}
	return c.rep, nil
}

// side is one of the checkpoints.
type side struct {
	c      *checkpoint.Checkpoint
	set    *source.Set
	refs   checkpoint.References
	reader *source.Reader
	page   []byte
}

func newSide(c *checkpoint.Checkpoint) *side {
	return &side{c: c, set: c.Sources(), refs: c.References(), reader: c.InOrder(), page: make([]byte, c.Meta.PageSize)}
}

// stored names bytes whoever refers to them: an image, and where in it.
type stored struct {
	image uuid.UUID
	slot  uint64
	tier  source.Tier
}

// stored is where the first page of a run is; not ok, if that does not tell what it is.
func (s *side) stored(r pagemap.Run) (st stored, ok bool) {
	at, ok := s.set.Locate(r.Entry(0))
	if !ok || at.Tier == source.OnDisk || int(at.Space) > len(s.refs) {
		return st, false
	}
	id := s.c.Meta.UUID
	if at.Space > 0 {
		id = s.refs[at.Space-1].UUID
	}
	return stored{id, at.Slot, at.Tier}, true
}

// fill is the byte that the pages of a run are filled with, if its entry says so.
func (s *side) fill(r pagemap.Run) (fill byte, ok bool) {
	switch s.set.Row(r.Kind).Form {
	case source.Nothing, source.Zeros:
		return 0, true
	case source.Filled:
		return byte(r.First), r.Step == 0 || r.Count == 1
	}
	return 0, false
}

// comparison is one Compare.
type comparison struct {
	ctx  context.Context
	a, b *side
	rep  *Report
}

// block compares block i of A with block j of B.
func (c *comparison) block(name string, i, j int) error {
	pages := min(c.a.c.PageMap.Pages(i), c.b.c.PageMap.Pages(j))
	d := Block{Name: name, Pages: int64(pages), Sources: make(map[string]int64)}
	for page := uint64(0); page < pages; {
		if err := context.Cause(c.ctx); err != nil {
			return err
		}
		ra, err := c.a.c.PageMap.Find(i, page)
		if err != nil {
			return err
		}
		rb, err := c.b.c.PageMap.Find(j, page)
		if err != nil {
			return err
		}
		n := min(ra.Count, rb.Count, pages-page, between)
		ra.Count, rb.Count = n, n
		if err := c.run(&d, ra, rb); err != nil {
			return err
		}
		page += n
	}
	c.rep.Pages += d.Pages
	c.rep.Changed += d.Changed
	c.rep.Zeroed += d.Zeroed
	c.rep.Blocks = append(c.rep.Blocks, d)
	return nil
}

// run compares two runs of equal length.
func (c *comparison) run(d *Block, ra, rb pagemap.Run) error {
	fa, filledA := c.a.fill(ra)
	fb, filledB := c.b.fill(rb)
	if filledA && filledB {
		if fa != fb {
			c.changed(d, rb, int64(rb.Count), fb == 0)
		}
		return nil
	}
	for ; ra.Count > 0; ra, rb = ra.From(1), rb.From(1) {
		// Both runs as a whole, or, where their values rise differently, each page.
		if sa, ok := c.a.stored(ra); ok {
			if sb, ok := c.b.stored(rb); ok && sa == sb {
				if ra.Step == rb.Step {
					return nil
				}
				continue
			}
		}
		c.rep.Read++
		if err := c.a.reader.Copy(c.ctx, c.a.page, source.Page{Block: ra.Block, Number: ra.Page}, ra.Entry(0)); err != nil {
			return err
		}
		if err := c.b.reader.Copy(c.ctx, c.b.page, source.Page{Block: rb.Block, Number: rb.Page}, rb.Entry(0)); err != nil {
			return err
		}
		if !bytes.Equal(c.a.page, c.b.page) {
			c.changed(d, rb, 1, filledB && fb == 0)
		}
	}
	return nil
}

// changed counts n pages of a run of B.
func (c *comparison) changed(d *Block, r pagemap.Run, n int64, zero bool) {
	d.Changed += n
	d.Sources[c.b.set.Row(r.Kind).Name] += n
	if zero {
		d.Zeroed += n
	}
}
