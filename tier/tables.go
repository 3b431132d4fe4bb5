package tier

import (
	"context"
	"fmt"
	"time"

	"github.com/flic-migrate/flic-migrate/stream"
	"github.com/flic-migrate/flic-migrate/tier/mmu"
	"github.com/flic-migrate/flic-migrate/tier/pagetable"
	"github.com/flic-migrate/flic-migrate/tier/workingset"
)

const (
	// tablesTime is short because without its page tables a guest only
	// resumes less quickly.
	tablesTime = 250 * time.Millisecond
	// maxTableRuns bounds what META lists of them.
	maxTableRuns = 1 << 16
)

// maxTables is how many page tables are believed: eight times as many as it
// takes to map all of memory once.
func maxTables(pages int64) int { return int(min(4096+pages/64, maxTableRuns)) }

// expectTables is the room that is reserved for them in NVRAM beside the
// working set: as many as the VM had last time and some more, or a guess.
func (p *placer) expectTables() int64 {
	if p.s.parent != nil && p.s.parent.Report.PageTables > 0 {
		return p.s.parent.Report.PageTables + p.s.parent.Report.PageTables/8
	}
	return p.s.rep.Pages/512 + 64
}

// findTables finds the pages of the guest's page tables by the vCPUs' registers
// in the device tail, and puts those into NVRAM that are in flash, as far as
// there is room: that they belong to the working set is known only now. It is
// called after everything has been placed. That nothing is found is no error,
// and the report says why.
func (s *saver) findTables(tail []byte, t *stream.Tail) error {
	if s.place == nil {
		return nil
	}
	runs, err := s.walkTables(tail, t)
	if err != nil {
		if s.ctx.Err() != nil {
			return context.Cause(s.ctx)
		}
		s.rep.NoPageTables = err.Error()
		s.o.Log.Debug("no guest page tables, or not all", "reason", err)
	}
	s.meta.PageTables = runs
	for _, r := range runs {
		s.rep.PageTables += int64(r.Count)
	}
	return s.place.promote(runs)
}

func (s *saver) walkTables(tail []byte, t *stream.Tail) (runs []workingset.PageRun, err error) {
	spaces, err := mmu.Spaces(tail, t)
	if err != nil || len(spaces) == 0 {
		return nil, err
	}
	blocks := make([]mmu.Block, len(s.meta.Blocks))
	for i, b := range s.meta.Blocks {
		blocks[i] = mmu.Block{Name: b.Name, Used: b.Used}
	}
	layout, err := mmu.NewLayout(s.meta.Machine, blocks, tail, t)
	if err != nil {
		return nil, err
	}
	size := uint64(s.meta.PageSize)
	w := mmu.Walker{
		Max: maxTables(s.rep.Pages),
		Read: func(gpa uint64, buf []byte) (bool, error) {
			block, offset, ok := layout.Find(gpa, uint64(len(buf)))
			if !ok {
				return false, nil
			}
			for n := 0; n < len(buf); {
				at := offset + uint64(n)
				if err := s.place.content(s.scratch, s.table.Get(block, at/size)); err != nil {
					return false, err
				}
				n += copy(buf[n:], s.scratch[at%size:])
			}
			return true, nil
		},
		Table: func(gpa uint64, n int) error {
			block, offset, _ := layout.Find(gpa, uint64(n))
			first, last := offset/size, (offset+uint64(n)-1)/size
			if k := len(runs) - 1; k >= 0 && runs[k].Block == block && first-runs[k].Page <= runs[k].Count {
				// Next to the one before, or in the same page.
				runs[k].Count = max(runs[k].Count, last+1-runs[k].Page)
				return nil
			}
			runs = append(runs, workingset.PageRun{Block: block, Page: first, Count: last + 1 - first})
			return nil
		},
	}
	limit := s.o.TablesTime
	if limit == 0 {
		limit = tablesTime
	}
	ctx, cancel := context.WithTimeoutCause(s.ctx, limit, fmt.Errorf("more page tables than could be read in %v", limit))
	defer cancel()
	return runs, w.Walk(ctx, spaces)
}

// promote moves pages from flash to NVRAM. Their flash slots stay, for nobody or
// for pages that share them.
func (p *placer) promote(runs []workingset.PageRun) error {
	if p.region == nil {
		return nil
	}
	moved := false
	for _, r := range runs {
		for page := r.Page; page < r.Page+r.Count; page++ {
			e := p.s.table.Get(r.Block, page)
			if e.Kind() != pagetable.Flash || len(p.slots) >= p.region.Slots() {
				continue
			}
			if err := p.content(p.s.scratch, e); err != nil {
				return err
			}
			e, err := p.store(r.Block, page, p.s.scratch, true)
			if err != nil {
				return err
			}
			p.set(r.Block, page, e)
			moved = true
		}
	}
	if !moved {
		return nil
	}
	return p.syncNVRAM()
}
