package workingset

import "github.com/flic-migrate/flic-migrate/tier/integrity"

// PageRun is Count pages of a RAM block from Page on.
type PageRun struct {
	Block int    `json:"b"` // index into Touched.Blocks
	Page  uint64 `json:"p"`
	Count uint64 `json:"n"`
}

// Touched is what lazy restores of a checkpoint have learned: the pages that
// the guest had to wait for, in the order in which it first did. Unlike a Set
// it keeps that order, which is the best one to send them in.
type Touched struct {
	PageSize int      `json:"page_size"` // bytes
	Blocks   nameList `json:"blocks"`    // names of the RAM blocks
	Runs     runList  `json:"runs"`
}

// The lists have types of their own because each has its limit, which is checked
// while it is decoded: {} is short, and what it stands for is not.
type (
	nameList []string
	runList  []PageRun
)

func (l *nameList) UnmarshalJSON(b []byte) error { return integrity.DecodeList(l, b, maxTouchedBlocks) }
func (l *runList) UnmarshalJSON(b []byte) error  { return integrity.DecodeList(l, b, MaxTouched) }

// MaxTouched caps the runs that are kept: a guest that has touched more pages
// than this one by one has no working set to speak of.
const MaxTouched = 1 << 16

// maxTouchedBlocks is how many RAM blocks a guest can have (ramparse).
const maxTouchedBlocks = 4096

// Add appends runs that a later restore had to wait for.
func (t *Touched) Add(runs []PageRun) {
	t.Runs = append(t.Runs, runs...)
	t.Runs = t.Runs[:min(len(t.Runs), MaxTouched)]
}

// Bind returns the runs with block numbers as in blocks. What does not exist
// there, in whole or in part, is left out; it returns nothing for another page
// size.
func (t *Touched) Bind(pageSize int, blocks []Block) []PageRun {
	if t.PageSize != pageSize {
		return nil
	}
	index := make(map[string]int)
	for i, b := range blocks {
		index[b.Name] = i
	}
	var out []PageRun
	for _, r := range t.Runs {
		if r.Block < 0 || r.Block >= len(t.Blocks) {
			continue
		}
		i, ok := index[t.Blocks[r.Block]]
		if n := uint64(0); ok {
			if n = uint64(blocks[i].Pages); r.Page < n && r.Count > 0 {
				out = append(out, PageRun{i, r.Page, min(r.Count, n-r.Page)})
			}
		}
	}
	return out
}

// AddTouched makes the pages of runs, bound to s's blocks, at least as hot as
// heat. They are known to be read, which tracking by dirty bits can't see.
func (s *Set) AddTouched(runs []PageRun, heat uint8) {
	for _, r := range runs {
		for i := range r.Count {
			if page := int64(r.Page + i); s.Heat(r.Block, page) < heat {
				s.SetHeat(r.Block, page, heat)
			}
		}
	}
}
