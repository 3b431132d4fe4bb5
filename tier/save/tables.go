package save

import (
	"context"
	"fmt"
	"time"

	"github.com/flic-migrate/flic-migrate/stream"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/mmu"
	"github.com/flic-migrate/flic-migrate/tier/pagemap"
	"github.com/flic-migrate/flic-migrate/tier/workingset"
)

const (
	// tablesTime is short because without its page tables a guest only
	// resumes less quickly.
	tablesTime = 250 * time.Millisecond
	// maxTableRuns bounds what META lists of them.
	maxTableRuns = checkpoint.MaxTableRuns
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
			for page := offset / size; page <= (offset+uint64(n)-1)/size; page++ {
				// A table without entries is a page of zeros: there is nothing
				// to store, and nobody waits long for it.
				if e := s.table.Get(block, page); e.Kind() == pagemap.NVRAM || e.Kind() == pagemap.Flash {
					runs = appendPage(runs, block, page)
				}
			}
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

// appendPage lists a page. On aarch64 two tables can be in one page.
func appendPage(runs []workingset.PageRun, block int, page uint64) []workingset.PageRun {
	if n := len(runs); n > 0 && runs[n-1].Block == block {
		switch r := &runs[n-1]; page {
		case r.Page + r.Count:
			r.Count++
			return runs
		case r.Page + r.Count - 1:
			return runs
		}
	}
	return append(runs, workingset.PageRun{Block: block, Page: page, Count: 1})
}

// promote moves pages from flash to NVRAM. Their flash slots stay, for nobody or
// for pages that share them. If there is no room, pages of the lowest heat that
// is in NVRAM make some.
func (p *placer) promote(runs []workingset.PageRun) error {
	if p.region == nil {
		return nil
	}
	p.last.ok = false
	victim := len(p.slots)
	moved := false
	for _, r := range runs {
		for page := r.Page; page < r.Page+r.Count; page++ {
			e := p.s.table.Get(r.Block, page)
			if e.Kind() != pagemap.Flash {
				continue
			}
			if !p.room() {
				var err error
				if victim, err = p.demote(victim); err != nil {
					return err
				}
				if victim < 0 {
					break
				}
			}
			if err := p.content(p.s.scratch, e); err != nil {
				return err
			}
			slot := p.takeSlot()
			p.slots[slot] = checkpoint.NVRAMSlot{CRC: integrity.Checksum(p.s.scratch), Block: uint32(r.Block), Page: page}
			if err := p.region.Write(slot, p.s.scratch); err != nil {
				return err
			}
			p.set(r.Block, page, pagemap.Make(pagemap.NVRAM, uint64(slot)))
			moved = true
		}
	}
	if !moved {
		return nil
	}
	if err := p.flush(); err != nil {
		return err
	}
	return p.syncNVRAM()
}

// demote frees an NVRAM slot below `before` by moving its page to flash, and
// returns the slot, or -1 if there is none whose page is as cold as the coldest.
func (p *placer) demote(before int) (int, error) {
	for slot := before - 1; slot >= 0; slot-- {
		s := p.slots[slot]
		block, page := int(s.Block), s.Page
		e := pagemap.Make(pagemap.NVRAM, uint64(slot))
		if p.users[slot] != 1 || p.s.table.Get(block, page) != e || p.hot.ws.Heat(block, int64(page)) > p.hot.min {
			continue
		}
		if err := p.content(p.s.scratch, e); err != nil {
			return 0, err
		}
		e, err := p.store(block, page, p.s.scratch, false)
		if err != nil {
			return 0, err
		}
		p.set(block, page, e)
		p.s.rep.Surplus++
		return slot, nil
	}
	return -1, nil
}
