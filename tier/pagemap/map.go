package pagemap

import (
	"errors"
	"fmt"
	"sort"
	"sync"
)

// Map is a page table as read from an image. Its chunks are decoded when they
// are first needed, and kept as runs, 16 B each: the memory a table takes
// follows from what is stored and not from how much RAM an image claims, and
// finding a page costs the same at any size. Safe for concurrent use.
type Map struct {
	pages  []uint64
	starts []Start
	end    Start
	read   func(i int) ([]byte, error)
	check  func(i int, r Run) error
	bad    func(i int, err error) error
	chunks []mapChunk
}

type mapChunk struct {
	once sync.Once
	runs []mapRun
	err  error
}

// mapRun is a run without its length, which the next one's start gives.
type mapRun struct {
	block uint32
	page  uint64 // of its first page; bit 63: values count up
	first Entry
}

const mapStep = 1 << 63

// Source is where a Map gets its chunks.
type Source struct {
	Pages  []uint64 // of each RAM block
	Starts []Start  // of each chunk
	// Read returns a chunk. Its errors are passed on as they are.
	Read func(i int) ([]byte, error)
	// Check may refuse a run of chunk i.
	Check func(i int, r Run) error
	// Bad makes an error of what is wrong inside chunk i.
	Bad func(i int, err error) error
}

// NewMap returns a Map of the table in s. The only errors are Starts that can't
// be: those of chunks come when they are used, or all with LoadAll.
func NewMap(s Source) (*Map, error) {
	m := &Map{
		pages: s.Pages, starts: s.Starts, read: s.Read, check: s.Check, bad: s.Bad,
		chunks: make([]mapChunk, len(s.Starts)),
	}
	m.end = Start{len(s.Pages), 0}
	first := Start{}.normal(s.Pages)
	if len(s.Starts) == 0 && first != m.end || len(s.Starts) > 0 && s.Starts[0] != first {
		return nil, errors.New("page table does not start at the first page")
	}
	for i, at := range s.Starts {
		if at.Block < 0 || at.Block >= len(s.Pages) || at.Page >= s.Pages[at.Block] || i > 0 && !s.Starts[i-1].less(at) {
			return nil, fmt.Errorf("page table chunk %d starts at %v", i, at)
		}
	}
	return m, nil
}

func (s Start) less(o Start) bool {
	return s.Block < o.Block || s.Block == o.Block && s.Page < o.Page
}

// chunk returns chunk i's runs.
func (m *Map) chunk(i int) ([]mapRun, error) {
	c := &m.chunks[i]
	c.once.Do(func() { c.runs, c.err = m.load(i) })
	return c.runs, c.err
}

func (m *Map) load(i int) ([]mapRun, error) {
	b, err := m.read(i)
	if err != nil {
		return nil, err
	}
	end := m.end
	if i+1 < len(m.starts) {
		end = m.starts[i+1]
	}
	// Runs take two bytes or more, mostly four; growing would cost more than the
	// room that is left.
	runs := make([]mapRun, 0, len(b)/4)
	err = decode(b, m.pages, m.starts[i], end, func(r Run) error {
		runs = append(runs, mapRun{uint32(r.Block), r.Page | r.Step*mapStep, Make(r.Kind, r.First)})
		return m.check(i, r)
	})
	if err != nil {
		return nil, m.bad(i, err)
	}
	return runs, nil
}

// Blocks is the number of RAM blocks.
func (m *Map) Blocks() int { return len(m.pages) }

// Pages is the number of pages of a block.
func (m *Map) Pages(b int) uint64 { return m.pages[b] }

// Find returns the rest of the run that a page, which must exist, is in,
// starting at the page. Runs end at the end of a chunk.
func (m *Map) Find(b int, page uint64) (Run, error) {
	at := Start{b, page}
	i := sort.Search(len(m.starts), func(i int) bool { return at.less(m.starts[i]) }) - 1
	runs, err := m.chunk(i)
	if err != nil {
		return Run{}, err
	}
	j := sort.Search(len(runs), func(j int) bool { return at.less(runs[j].start()) }) - 1
	return m.run(i, runs, j, page), nil
}

func (r mapRun) start() Start { return Start{int(r.block), r.page &^ mapStep} }

// run returns the j-th run of chunk i from page on.
func (m *Map) run(i int, runs []mapRun, j int, page uint64) Run {
	r := runs[j]
	b := int(r.block)
	end := m.pages[b]
	switch {
	case j+1 < len(runs):
		if next := runs[j+1].start(); next.Block == b {
			end = next.Page
		}
	case i+1 < len(m.starts) && m.starts[i+1].Block == b:
		end = m.starts[i+1].Page
	}
	step := r.page / mapStep
	return Run{
		Block: b, Page: page, Count: end - page, Kind: r.first.Kind(),
		First: r.first.Value() + step*(page-r.page&^mapStep), Step: step,
	}
}

// Runs calls fn for every run in block and page order.
func (m *Map) Runs(fn func(Run) error) error {
	for i := range m.starts {
		runs, err := m.chunk(i)
		if err != nil {
			return err
		}
		for j := range runs {
			if err := fn(m.run(i, runs, j, runs[j].start().Page)); err != nil {
				return err
			}
		}
	}
	return nil
}

// LoadAll decodes and checks the whole table.
func (m *Map) LoadAll() error { return m.Runs(func(Run) error { return nil }) }
