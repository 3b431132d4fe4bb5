package pagetable

import "sort"

// Map is a page table as read from an image: its runs, 16 B each, so that the
// memory it takes follows from what is stored and not from how much RAM an
// image claims. It is safe for concurrent use once it is loaded.
type Map struct {
	pages  []uint64
	blocks [][]mapRun
}

type mapRun struct {
	page  uint64 // first page; bit 63: values count up
	first Entry
}

const mapStep = 1 << 63

// ReadMap decodes a whole table of blocks with the given numbers of pages from
// its n chunks, as chunk(0) … chunk(n-1) return them. Errors of chunk are
// passed on; bad(i, err) wraps what is wrong inside chunk i.
func ReadMap(pages []uint64, n int, chunk func(i int) ([]byte, error), bad func(i int, err error) error) (*Map, error) {
	m := &Map{pages: pages, blocks: make([][]mapRun, len(pages))}
	d := NewDecoder(pages)
	for i := range n {
		b, err := chunk(i)
		if err != nil {
			return nil, err
		}
		if err := d.Chunk(b, func(r Run) error { m.add(r); return nil }); err != nil {
			return nil, bad(i, err)
		}
	}
	if err := d.Done(); err != nil {
		return nil, bad(max(n-1, 0), err)
	}
	return m, nil
}

func (m *Map) add(r Run) {
	runs := m.blocks[r.Block]
	m.blocks[r.Block] = append(runs, mapRun{r.Page | r.Step*mapStep, Make(r.Kind, r.First)})
}

// Blocks is the number of RAM blocks.
func (m *Map) Blocks() int { return len(m.blocks) }

// Pages is the number of pages of a block.
func (m *Map) Pages(b int) uint64 { return m.pages[b] }

// Find returns the rest of the run that page is in, starting at page.
func (m *Map) Find(b int, page uint64) Run {
	runs := m.blocks[b]
	i := sort.Search(len(runs), func(i int) bool { return runs[i].page&^mapStep > page }) - 1
	return m.run(b, i, page)
}

// run returns block b's i-th run from page on.
func (m *Map) run(b, i int, page uint64) Run {
	runs := m.blocks[b]
	r := runs[i]
	end := m.pages[b]
	if i+1 < len(runs) {
		end = runs[i+1].page &^ mapStep
	}
	step := r.page / mapStep
	return Run{
		Block: b, Page: page, Count: end - page, Kind: r.first.Kind(),
		First: r.first.Value() + step*(page-r.page&^mapStep), Step: step,
	}
}

// Runs calls fn for every run in block and page order.
func (m *Map) Runs(fn func(Run) error) error {
	for b, runs := range m.blocks {
		for i := range runs {
			if err := fn(m.run(b, i, runs[i].page&^mapStep)); err != nil {
				return err
			}
		}
	}
	return nil
}
