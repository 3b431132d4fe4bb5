package pagemap

import (
	"errors"
	"fmt"
	"sort"
	"sync"
)

// Map is a page map as read from an image. Its chunks are decoded when they
// are first needed, and kept as runs, 16 B each: the memory a map takes
// follows from what is stored and not from how much RAM an image claims, and
// finding a page costs the same at any size. Safe for concurrent use.
type Map struct {
	pages  []uint64
	base   []uint64 // pages in all blocks before each, and in all
	starts []Start
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
	at    uint64 // number of its first page in the whole map; bit 63: values count up
	first Entry
}

const mapStep = 1 << 63

func (r mapRun) page() uint64 { return r.at &^ mapStep }

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

// NewMap returns a Map of what is in s. The only errors are Starts that can't
// be: those of chunks come when they are used.
func NewMap(s Source) (*Map, error) {
	m := &Map{
		pages: s.Pages, starts: s.Starts, read: s.Read, check: s.Check, bad: s.Bad,
		base: make([]uint64, len(s.Pages)+1), chunks: make([]mapChunk, len(s.Starts)),
	}
	for b, n := range s.Pages {
		m.base[b+1] = m.base[b] + n
		if n > MaxPages || m.base[b+1] > MaxPages {
			return nil, fmt.Errorf("%d pages of RAM in block %d: more than the %d that a page map holds", n, b, uint64(MaxPages))
		}
	}
	first, end := Start{}.normal(s.Pages), m.end()
	if len(s.Starts) == 0 && first != end || len(s.Starts) > 0 && s.Starts[0] != first {
		return nil, errors.New("page map does not start at the first page")
	}
	for i, at := range s.Starts {
		if at.Block < 0 || at.Block >= len(s.Pages) || at.Page >= s.Pages[at.Block] || i > 0 && !s.Starts[i-1].less(at) {
			return nil, fmt.Errorf("page map chunk %d starts at %v", i, at)
		}
	}
	return m, nil
}

func (m *Map) end() Start { return Start{len(m.pages), 0} }

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
	end := m.end()
	if i+1 < len(m.starts) {
		end = m.starts[i+1]
	}
	// Runs take two bytes or more, mostly four.
	runs := make([]mapRun, 0, len(b)/4)
	err = decode(b, m.pages, m.starts[i], end, func(r Run) error {
		runs = append(runs, mapRun{m.base[r.Block] + r.Page | r.Step*mapStep, Make(r.Kind, r.First)})
		return m.check(i, r)
	})
	if err != nil {
		return nil, m.bad(i, err)
	}
	// Pages far apart in the image take more, and would leave half of the room empty
	// for as long as the map is there.
	if len(runs) < cap(runs)*7/8 {
		runs = append(make([]mapRun, 0, len(runs)), runs...)
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
	g := m.base[b] + page
	j := sort.Search(len(runs), func(j int) bool { return g < runs[j].page() }) - 1
	return m.run(i, runs, j, b, page), nil
}

// Number is a page's number in the whole map, in block and page order.
func (m *Map) Number(b int, page uint64) uint64 { return m.base[b] + page }

// Page is the block and the page that have a number.
func (m *Map) Page(number uint64) (b int, page uint64) {
	b = sort.Search(len(m.pages), func(b int) bool { return number < m.base[b+1] })
	return b, number - m.base[b]
}

// At is Find by a page's number.
func (m *Map) At(number uint64) (Run, error) { return m.Find(m.Page(number)) }

// run returns the j-th run of chunk i, which is in block b, from page on.
func (m *Map) run(i int, runs []mapRun, j, b int, page uint64) Run {
	r := runs[j]
	// Runs and chunks end where the next begins, and no run crosses a block's end.
	end := m.pages[b]
	switch {
	case j+1 < len(runs):
		end = min(end, runs[j+1].page()-m.base[b])
	case i+1 < len(m.starts) && m.starts[i+1].Block == b:
		end = m.starts[i+1].Page
	}
	step := r.at / mapStep
	return Run{
		Block: b, Page: page, Count: end - page, Kind: r.first.Kind(),
		First: r.first.Value() + step*(m.base[b]+page-r.page()), Step: step,
	}
}

// Runs calls fn for every run in block and page order.
func (m *Map) Runs(fn func(Run) error) error {
	for i := range m.starts {
		runs, err := m.chunk(i)
		if err != nil {
			return err
		}
		b := m.starts[i].Block
		for j := range runs {
			for runs[j].page() >= m.base[b+1] {
				b++
			}
			if err := fn(m.run(i, runs, j, b, runs[j].page()-m.base[b])); err != nil {
				return err
			}
		}
	}
	return nil
}
