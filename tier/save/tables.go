package save

import (
	"context"
	"fmt"
	"time"

	"github.com/flic-migrate/flic-migrate/stream"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/digest"
	"github.com/flic-migrate/flic-migrate/tier/mmu"
	"github.com/flic-migrate/flic-migrate/tier/pagemap"
	"github.com/flic-migrate/flic-migrate/tier/source"
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

// findTables finds the pages of the guest's page tables by the vCPUs' registers
// in the device tail, and puts those into NVRAM that are in flash, as far as
// there is room: that they belong to the working set is known only now. It is
// called after everything has been placed. That nothing is found is no error,
// and the report says why.
func (s *saver) findTables(tail []byte, t *stream.Tail) error {
	if s.placer == nil {
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
	moved, err := s.placer.promote(runs)
	if err != nil || !moved {
		return err
	}
	return s.out.syncNVRAM()
}

func (s *saver) walkTables(tail []byte, t *stream.Tail) (runs []workingset.PageRun, err error) {
	spaces, err := mmu.Spaces(tail, t)
	if err != nil || len(spaces) == 0 {
		return nil, err
	}
	layout, err := mmu.NewLayout(s.meta.Machine, s.meta.Blocks, tail, t)
	if err != nil {
		return nil, err
	}
	size := uint64(s.meta.PageSize)
	page := make([]byte, size)
	w := mmu.Walker{
		Max: maxTables(s.rep.Pages),
		Read: func(gpa uint64, buf []byte) (bool, error) {
			block, offset, ok := layout.Find(gpa, uint64(len(buf)))
			if !ok {
				return false, nil
			}
			for n := 0; n < len(buf); {
				at := offset + uint64(n)
				if err := s.placer.read(page, block, at/size); err != nil {
					return false, err
				}
				n += copy(buf[n:], page[at%size:])
			}
			return true, nil
		},
		Table: func(gpa uint64, n int) error {
			block, offset, ok := layout.Find(gpa, uint64(n))
			if !ok {
				return nil
			}
			for page := offset / size; page <= (offset+uint64(n)-1)/size; page++ {
				// A table without entries is a page of zeros: there is nothing
				// to store, and nobody waits long for it.
				if s.placer.stored(block, page) {
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
func (p *placer) promote(runs []workingset.PageRun) (moved bool, err error) {
	if p.to.region == nil {
		return false, nil
	}
	p.last.ok = false
	victim := len(p.slots)
	for _, r := range runs {
		for page := r.Page; page < r.Page+r.Count; page++ {
			e := p.to.pages.Get(r.Block, page)
			if at, ok := source.Default.Locate(e); !ok || at.Tier == source.InNVRAM {
				continue
			}
			if !p.room() {
				if victim, err = p.demote(victim); err != nil {
					return moved, err
				}
				if victim < 0 {
					break
				}
			}
			if err := p.read(p.scratch, r.Block, page); err != nil {
				switch {
				case inFlash(e):
					return moved, err
				case onDisk(e):
					p.to.disks.damaged(err)
				case p.to.peers.of(locate(e).Space) != nil:
				case p.to.par != nil:
					p.to.par.damaged(err)
				default:
					p.to.shared.damaged(err)
				}
				continue // where it is, it is as safe as it was
			}
			slot := p.takeSlot()
			if err := p.write(slot, r.Block, page, p.scratch); err != nil {
				return moved, err
			}
			p.set(r.Block, page, pagemap.Make(pagemap.NVRAM, uint64(slot)))
			moved = true
		}
	}
	if !moved {
		return false, nil
	}
	return true, p.flush()
}

// demote frees an NVRAM slot below `before` by moving its page to flash, and
// returns the slot, or -1 if there is none whose page is as cold as the coldest.
func (p *placer) demote(before int) (int, error) {
	for slot := before - 1; slot >= 0; slot-- {
		s := p.slots[slot]
		block, page := int(s.Block), s.Page
		e := pagemap.Make(pagemap.NVRAM, uint64(slot))
		if p.users[slot] != 1 || p.to.pages.Get(block, page) != e || p.to.hot.ws.Heat(block, int64(page)) > p.to.hot.min {
			continue
		}
		if err := p.read(p.scratch, block, page); err != nil {
			return 0, err
		}
		e, err := p.store(block, page, p.scratch, false, digest.Sum{})
		if err != nil {
			return 0, err
		}
		p.set(block, page, e)
		p.count.Surplus++
		return slot, nil
	}
	return -1, nil
}

// locate is where the bytes of an entry are.
func locate(e pagemap.Entry) source.Location {
	at, _ := source.Default.Locate(e)
	return at
}
