package save

import (
	"context"
	"fmt"
	"log/slog"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/workingset"
)

// past is what the VM's newest checkpoint says about the one in the making. All of
// it is hints: that it is missing or damaged costs no save.
type past struct {
	meta    *checkpoint.Meta    // nil: there is none
	touched *workingset.Touched // what resumes of it had to wait for; may be nil
}

// newPast asks the store. The pages that resumes touched are looked at only if they
// will be used.
func newPast(ctx context.Context, st *store.Store, vm string, touched bool, log *slog.Logger) past {
	newest, err := st.Describe(ctx, store.Ref{VM: vm})
	if err != nil {
		return past{}
	}
	p := past{meta: newest.Meta}
	if touched {
		if p.touched, err = st.Touched(ctx, newest.Ref); err != nil {
			log.Warn("what resumes have learned can't be used", "error", err)
			p.touched = nil
		}
	}
	return p
}

// learned is what resumes had to wait for, by this save's blocks.
func (p *past) learned(pageSize int, blocks []workingset.Block) []workingset.PageRun {
	if p.touched == nil {
		return nil
	}
	return p.touched.Bind(pageSize, blocks)
}

// tables are the guest's page tables then.
func (p *past) tables(pageSize int, blocks []workingset.Block) []workingset.PageRun {
	if p.meta == nil {
		return nil
	}
	t := workingset.Touched{PageSize: p.meta.PageSize, Runs: []workingset.PageRun(p.meta.PageTables)}
	for _, b := range p.meta.Blocks {
		t.Blocks = append(t.Blocks, b.Name)
	}
	return t.Bind(pageSize, blocks)
}

// expectTables is the room that is reserved for page tables in NVRAM beside the
// working set: as many as the VM had last time and some more, or a guess.
func (p *past) expectTables(pages int64) int64 {
	if p.meta != nil && p.meta.Report.PageTables > 0 {
		return p.meta.Report.PageTables + p.meta.Report.PageTables/8
	}
	return pages/512 + 64
}

// workingSet is the set that the save was given, and with it, as hot as its
// hottest, the pages that resumes of the VM's newest checkpoint had to wait for.
// It is nil if there is neither. Otherwise it has, hotter than all, what were the
// guest's page tables in that checkpoint: most still are, and where they are now
// is not known before everything has been placed (findTables).
func (p *past) workingSet(set *workingset.Set, pageSize int, blocks []workingset.Block) (*workingset.Set, error) {
	var given *workingset.Set
	if set != nil {
		var err error
		if given, err = set.Bind(pageSize, blocks); err != nil {
			return nil, fmt.Errorf("working set: %w", err)
		}
	}
	touched := p.learned(pageSize, blocks)
	if len(touched) == 0 && given == nil {
		return nil, nil
	}
	tables := p.tables(pageSize, blocks)
	if len(touched) == 0 && len(tables) == 0 {
		return given, nil
	}
	ws, err := workingset.New(pageSize, blocks)
	if err != nil {
		return nil, err
	}
	hottest := uint8(1)
	if given != nil {
		if err := ws.Merge(given); err != nil {
			return nil, err
		}
		for heat, n := range given.Histogram() {
			if n > 0 && heat > 0 {
				hottest = uint8(heat)
			}
		}
	}
	ws.AddTouched(touched, hottest)
	ws.AddTouched(tables, 255)
	return ws, nil
}

// hotPages is how many pages of a set are hot at all.
func hotPages(ws *workingset.Set) (n int64) {
	for heat, k := range ws.Histogram() {
		if heat > 0 {
			n += k
		}
	}
	return n
}

// hotSet is the part of a working set that the NVRAM region has room for: all
// pages hotter than min, and those of heat min up to a boundary in block and
// address order.
type hotSet struct {
	ws       *workingset.Set
	min      uint8
	boundary struct {
		block int
		page  int64 // the first that is out
	}
}

func newHotSet(ws *workingset.Set, room int64) hotSet {
	h := hotSet{ws: ws}
	var left int64
	h.min, left = ws.Threshold(room)
	for b := range ws.Blocks() {
		for r := range ws.Runs(b, h.min, h.min) {
			h.boundary.block = b
			if r.N > left {
				h.boundary.page = r.First + left
				return h
			}
			left -= r.N
			h.boundary.page = r.First + r.N
		}
	}
	h.boundary.block = len(ws.Blocks())
	return h
}

func (h *hotSet) has(block int, page uint64) bool {
	if h.ws == nil {
		return false
	}
	heat := h.ws.Heat(block, int64(page))
	return heat > 0 && (heat > h.min || heat == h.min &&
		(block < h.boundary.block || block == h.boundary.block && int64(page) < h.boundary.page))
}
