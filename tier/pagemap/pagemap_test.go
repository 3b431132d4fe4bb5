package pagemap

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"unsafe"
)

// random fills a table with runs and single pages of every kind that a save
// makes, and returns what it holds.
func random(t testing.TB, pages []uint64, seed uint64) (*Builder, [][]Entry) {
	t.Helper()
	table, err := New(pages)
	if err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(seed, 1))
	model := make([][]Entry, len(pages))
	for b, n := range pages {
		model[b] = make([]Entry, n)
		for range 200 {
			if n == 0 {
				break
			}
			// The last is one that nobody knows.
			kind := Kind(rng.IntN(int(Disk) + 2))
			value := rng.Uint64N(1000)
			if kind == Fill {
				value %= 256
			}
			if !kind.hasValue() {
				value = 0
			}
			step := uint64(0)
			if kind.hasSlots() {
				step = rng.Uint64N(2)
				if rng.IntN(10) == 0 {
					value = MaxValue - 100
				}
			}
			first := rng.Uint64N(n)
			for p := first; p < min(n, first+rng.Uint64N(50)); p++ {
				e := Make(kind, value+(p-first)*step)
				if old := table.Set(b, p, e); old != model[b][p] {
					t.Fatalf("Set returned %x, page had %x", old, model[b][p])
				}
				model[b][p] = e
			}
		}
	}
	return table, model
}

// encoded is a table as an image keeps it.
type encoded struct {
	pages  []uint64
	starts []Start
	chunks [][]byte
}

func encode(t testing.TB, table *Builder, pages []uint64, limit int) *encoded {
	t.Helper()
	e := &encoded{pages: pages}
	err := table.Encode(limit, func(at Start, chunk []byte) error {
		if len(chunk) > limit || len(chunk) == 0 {
			t.Errorf("chunk of %d bytes, limit %d", len(chunk), limit)
		}
		e.starts = append(e.starts, at)
		e.chunks = append(e.chunks, bytes.Clone(chunk))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return e
}

var errBad = errors.New("bad chunk")

// open returns a Map of what is stored; check may be nil.
func (e *encoded) open(check func(int, Run) error) (*Map, error) {
	if check == nil {
		check = func(int, Run) error { return nil }
	}
	return NewMap(Source{Pages: e.pages, Starts: e.starts, Check: check,
		Read: func(i int) ([]byte, error) { return e.chunks[i], nil },
		Bad:  func(i int, err error) error { return fmt.Errorf("%w %d: %w", errBad, i, err) }})
}

// loadAll decodes and checks all of a map.
func loadAll(m *Map) error { return m.Runs(func(Run) error { return nil }) }

// TestRoundTrip encodes maps and finds every page again, whatever the length
// of a chunk.
func TestRoundTrip(t *testing.T) {
	for _, pages := range [][]uint64{nil, {0}, {1}, {0, 7, 0, 0, 5, 0}, {3 * leafPages, 100, 2*leafPages + 1}, {5000, 5000}} {
		for _, limit := range []int{64, 100, 4096, 1 << 18} {
			table, model := random(t, pages, uint64(limit))
			m, err := encode(t, table, pages, limit).open(nil)
			if err != nil {
				t.Fatalf("%v: %v", pages, err)
			}
			if err := loadAll(m); err != nil {
				t.Fatalf("%v: %v", pages, err)
			}
			if m.Blocks() != len(pages) {
				t.Errorf("%d blocks of %d", m.Blocks(), len(pages))
			}
			for b := range pages {
				if m.Pages(b) != pages[b] {
					t.Errorf("block %d has %d pages", b, m.Pages(b))
				}
				for p, want := range model[b] {
					if got := table.Get(b, uint64(p)); got != want {
						t.Fatalf("page %d of block %d is %x, want %x", p, b, got, want)
					}
					r, err := m.Find(b, uint64(p))
					if err != nil || r.Entry(0) != want || r.Page != uint64(p) || r.Block != b {
						t.Fatalf("page %d of block %d found as %+v, want %x (%v)", p, b, r, want, err)
					}
					for i := range r.Count {
						if model[b][uint64(p)+i] != r.Entry(i) {
							t.Fatalf("run %+v: page %d is not so", r, i)
						}
					}
				}
			}
			// Runs of the map cover what runs of the table do.
			if a, b := flat(t, table.Runs), flat(t, m.Runs); !slices.Equal(a, b) {
				t.Errorf("%v, limit %d: runs differ", pages, limit)
			}
			count := table.Count()
			for _, want := range model {
				for _, e := range want {
					count[e.Kind()]--
				}
			}
			for k, n := range count {
				if n != 0 {
					t.Errorf("Count of %v is off by %d", k, n)
				}
			}
		}
	}
}

// flat lists the pages of runs, which must be in order.
func flat(t *testing.T, runs func(func(Run) error) error) (list []Entry) {
	block, page := 0, uint64(0)
	err := runs(func(r Run) error {
		if r.Block != block {
			block, page = r.Block, 0
		}
		if r.Page != page || r.Count == 0 {
			t.Errorf("run %+v instead of one at page %d", r, page)
		}
		for i := range r.Count {
			list = append(list, r.Entry(i))
		}
		page += r.Count
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// TestRunsAreLong checks the two shapes that make a table small: equal pages,
// and pages in consecutive slots.
func TestRunsAreLong(t *testing.T) {
	pages := []uint64{1 << 20}
	table, err := New(pages)
	if err != nil {
		t.Fatal(err)
	}
	for p := range uint64(1 << 20) {
		switch {
		case p < 1<<18:
			table.Set(0, p, Make(Flash, 77+p))
		case p < 1<<19:
			table.Set(0, p, Make(Fill, 0))
		case p < 1<<19+1<<18:
			table.Set(0, p, Make(Flash, 5)) // one duplicate for all
		}
	}
	e := encode(t, table, pages, 4096)
	if len(e.chunks) != 1 || len(e.chunks[0]) > 40 {
		t.Errorf("four runs take %d chunks, the first of %d bytes", len(e.chunks), len(e.chunks[0]))
	}
}

// TestAbsentTakesNothing claims the most that there can be.
func TestAbsentTakesNothing(t *testing.T) {
	table, err := New([]uint64{MaxPages - 10, 10})
	if err != nil {
		t.Fatal(err)
	}
	table.Set(0, MaxPages-20, Make(ZeroData, 0))
	var leaves int
	for _, b := range table.blocks {
		for _, l := range b.leaves {
			if l != nil {
				leaves++
			}
		}
	}
	if leaves != 1 {
		t.Errorf("%d leaves for one page", leaves)
	}
	e := encode(t, table, []uint64{MaxPages - 10, 10}, 4096)
	m, err := e.open(nil)
	if err != nil {
		t.Fatal(err)
	}
	if r, err := m.Find(0, 12345678901); err != nil || r.Kind != Absent || r.Count != MaxPages-20-12345678901 {
		t.Errorf("found %+v, %v", r, err)
	}
	for _, pages := range [][]uint64{{MaxPages + 1}, {MaxPages, 1}, {1 << 63, 1 << 63}, {1, 1<<64 - 1}} {
		if _, err := New(pages); err == nil {
			t.Errorf("a table of %v pages", pages)
		}
	}
}

// TestRunSize: a map in which every page is a run of its own is what a large guest's
// lazy restore keeps in memory.
func TestRunSize(t *testing.T) {
	if n := unsafe.Sizeof(mapRun{}); n != 16 {
		t.Errorf("a run takes %d bytes", n)
	}
}

// TestStop checks that errors of callbacks end the work and come back.
func TestStop(t *testing.T) {
	pages := []uint64{1000}
	table, _ := random(t, pages, 1)
	stop := errors.New("stop")
	if err := table.Encode(64, func(Start, []byte) error { return stop }); err != stop {
		t.Errorf("Encode: %v", err)
	}
	if err := table.Runs(func(Run) error { return stop }); err != stop {
		t.Errorf("Runs: %v", err)
	}
	e := encode(t, table, pages, 64)
	m, err := e.open(func(i int, r Run) error {
		if i == 1 {
			return stop
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := loadAll(m); !errors.Is(err, stop) || !errors.Is(err, errBad) {
		t.Errorf("refused run: %v", err)
	}
	if _, err := m.Find(0, e.starts[1].Page); !errors.Is(err, stop) {
		t.Errorf("Find in a refused chunk: %v", err)
	}
	if _, err := m.Find(0, 0); err != nil {
		t.Errorf("Find in another chunk: %v", err)
	}
	unread := errors.New("unreadable")
	m, err = NewMap(Source{Pages: pages, Starts: e.starts, Read: func(int) ([]byte, error) { return nil, unread }})
	if err != nil {
		t.Fatal(err)
	}
	if err := loadAll(m); err != unread {
		t.Errorf("unreadable chunk: %v", err)
	}
}

// TestDamaged decodes what no Encode makes.
func TestDamaged(t *testing.T) {
	u := func(v ...uint64) (b []byte) {
		for _, x := range v {
			b = binary.AppendUvarint(b, x)
		}
		return b
	}
	run := func(tag byte, count uint64, value ...int64) []byte {
		b := append([]byte{tag}, u(count)...)
		for _, v := range value {
			b = binary.AppendVarint(b, v)
		}
		return b
	}
	cat := slices.Concat[[]byte]
	const fill, flash = byte(Fill) | valueFlag, byte(Flash) | valueFlag
	whole := cat(u(0, 0), run(byte(ZeroData), 10))
	for name, c := range map[string]struct {
		chunk []byte
		bad   bool
	}{
		"whole":               {whole, false},
		"empty":               {nil, true},
		"half a start":        {u(0), true},
		"endless number":      {bytes.Repeat([]byte{0xff}, 11), true},
		"another start":       {cat(u(0, 1), run(byte(ZeroData), 9)), true},
		"another block":       {cat(u(1, 0), run(byte(ZeroData), 10)), true},
		"no runs":             {u(0, 0), true},
		"too few pages":       {cat(u(0, 0), run(byte(ZeroData), 9)), true},
		"too many pages":      {cat(u(0, 0), run(byte(ZeroData), 11)), true},
		"far too many":        {cat(u(0, 0), run(byte(ZeroData), 1<<63)), true},
		"run of nothing":      {cat(u(0, 0), run(byte(ZeroData), 0), run(byte(ZeroData), 10)), true},
		"behind the end":      {cat(whole, run(byte(ZeroData), 1)), true},
		"unknown kind":        {cat(u(0, 0), run(33|valueFlag, 10, 0)), false},
		"without value":       {cat(u(0, 0), run(33, 10)), false},
		"with steps":          {cat(u(0, 0), run(33|valueFlag|stepFlag, 10, 5)), false},
		"steps of nothing":    {cat(u(0, 0), run(33|stepFlag, 10)), true},
		"unknown, too many":   {cat(u(0, 0), run(33, 11)), true},
		"absent with value":   {cat(u(0, 0), run(byte(Absent)|valueFlag, 10, 0)), true},
		"flash without value": {cat(u(0, 0), run(byte(Flash), 10)), true},
		"steps without slots": {cat(u(0, 0), run(fill|stepFlag, 10, 0)), true},
		"no count":            {cat(u(0, 0), []byte{byte(ZeroData)}), true},
		"no value":            {cat(u(0, 0), run(flash, 10)), true},
		"fill of 256":         {cat(u(0, 0), run(fill, 10, 256)), true},
		"fill of 255":         {cat(u(0, 0), run(fill, 10, 255)), false},
		"negative value":      {cat(u(0, 0), run(flash, 10, -1)), true},
		"largest value":       {cat(u(0, 0), run(flash, 10, MaxValue)), false},
		"larger value":        {cat(u(0, 0), run(flash, 10, MaxValue+1)), true},
		"steps too far":       {cat(u(0, 0), run(flash|stepFlag, 10, MaxValue-8)), true},
		"steps just enough":   {cat(u(0, 0), run(flash|stepFlag, 10, MaxValue-9)), false},
	} {
		e := &encoded{pages: []uint64{10}, starts: []Start{{0, 0}}, chunks: [][]byte{c.chunk}}
		m, err := e.open(nil)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if err := loadAll(m); errors.Is(err, errBad) != c.bad {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestStarts refuses lists of chunks that can't be.
func TestStarts(t *testing.T) {
	for _, c := range []struct {
		pages  []uint64
		starts []Start
		ok     bool
	}{
		{nil, nil, true},
		{[]uint64{0, 0}, nil, true},
		{[]uint64{5}, nil, false},
		{[]uint64{5}, []Start{{0, 0}}, true},
		{[]uint64{5}, []Start{{0, 1}}, false},
		{[]uint64{5}, []Start{{0, 0}, {0, 5}}, false},
		{[]uint64{5}, []Start{{0, 0}, {0, 3}, {0, 3}}, false},
		{[]uint64{5}, []Start{{0, 0}, {0, 3}, {0, 2}}, false},
		{[]uint64{5}, []Start{{0, 0}, {1, 0}}, false},
		{[]uint64{5}, []Start{{-1, 0}}, false},
		{[]uint64{0, 5}, []Start{{1, 0}, {1, 4}}, true},
		{[]uint64{0, 5}, []Start{{0, 0}}, false},
		{nil, []Start{{0, 0}}, false},
	} {
		if _, err := NewMap(Source{Pages: c.pages, Starts: c.starts}); (err == nil) != c.ok {
			t.Errorf("%v of %v: %v", c.starts, c.pages, err)
		}
	}
}

// TestConcurrentFind reads one Map from many goroutines before any chunk is
// decoded.
func TestConcurrentFind(t *testing.T) {
	pages := []uint64{20000, 300}
	table, model := random(t, pages, 3)
	m, err := encode(t, table, pages, 64).open(nil)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	for g := range uint64(8) {
		go func() {
			rng := rand.New(rand.NewPCG(g, 2))
			for range 2000 {
				b := rng.IntN(2)
				p := rng.Uint64N(pages[b])
				if r, err := m.Find(b, p); err != nil || r.Entry(0) != model[b][p] {
					done <- fmt.Errorf("page %d of block %d: %+v, %v", p, b, r, err)
					return
				}
			}
			done <- nil
		}()
	}
	for range 8 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

func TestStrings(t *testing.T) {
	if Flash.String() != "flash" || Kind(99).String() != "source kind 99" {
		t.Error(Flash.String(), Kind(99).String())
	}
	if e := Make(Disk, MaxValue); e.Kind() != Disk || e.Value() != MaxValue {
		t.Errorf("%x", e)
	}
}

// FuzzMap decodes any two chunks of a table of two blocks. What is accepted
// covers each page once, and encodes to the same table again.
func FuzzMap(f *testing.F) {
	pages := []uint64{70, 30}
	for seed := range uint64(4) {
		table, _ := random(f, pages, seed)
		e := encode(f, table, pages, 64)
		for i := range len(e.chunks) - 1 {
			f.Add(e.chunks[i], e.chunks[i+1], byte(e.starts[i+1].Block), byte(e.starts[i+1].Page))
		}
	}
	f.Add([]byte{0, 0, 2, 70, 2, 30}, []byte{}, byte(2), byte(0))
	f.Add([]byte{0, 0, 2, 70}, []byte{1, 0, 0xc4, 30, 0}, byte(1), byte(0))
	f.Fuzz(func(t *testing.T, first, second []byte, block, page byte) {
		e := &encoded{pages: pages, starts: []Start{{0, 0}, {int(block), uint64(page)}}, chunks: [][]byte{first, second}}
		if block == 2 {
			e.starts, e.chunks = e.starts[:1], e.chunks[:1]
		}
		m, err := e.open(nil)
		if err != nil {
			return
		}
		if err := loadAll(m); err != nil {
			if !errors.Is(err, errBad) {
				t.Fatalf("error without a chunk's number: %v", err)
			}
			return
		}
		list := flat(t, m.Runs)
		if len(list) != 100 {
			t.Fatalf("%d pages", len(list))
		}
		table, err := New(pages)
		if err != nil {
			t.Fatal(err)
		}
		for i, entry := range list {
			if i < 70 {
				table.Set(0, uint64(i), entry)
			} else {
				table.Set(1, uint64(i)-70, entry)
			}
		}
		again, err := encode(t, table, pages, 64).open(nil)
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(flat(t, again.Runs), list) {
			t.Fatal("encoded again the table is another")
		}
	})
}

// TestMapMemory: a run takes 16 bytes in memory, however many it takes on disk.
func TestMapMemory(t *testing.T) {
	const pages = 1 << 18
	b, err := New([]uint64{pages})
	if err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(1, 1))
	for p := range uint64(pages) {
		b.Set(0, p, Make(Flash, r.Uint64N(1<<40))) // seven bytes or more
	}
	src := Source{Pages: []uint64{pages}, Check: func(int, Run) error { return nil }, Bad: func(_ int, err error) error { return err }}
	var chunks [][]byte
	err = b.Encode(64<<10, func(at Start, c []byte) error {
		src.Starts, chunks = append(src.Starts, at), append(chunks, bytes.Clone(c))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	src.Read = func(i int) ([]byte, error) { return chunks[i], nil }
	m, err := NewMap(src)
	if err == nil {
		err = m.Runs(func(Run) error { return nil })
	}
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for i := range m.chunks {
		n += cap(m.chunks[i].runs)
	}
	if n > pages+pages/7 {
		t.Errorf("room for %d runs, there are %d", n, pages)
	}
}

// TestForeign: a reference and a slot there, as large as they may be, make an entry.
func TestForeign(t *testing.T) {
	for _, k := range []Kind{Foreign, ForeignNVRAM, ForeignDelta} {
		for _, ref := range []int{0, 1, 1<<refBits - 1} {
			for _, slot := range []uint64{0, 77, MaxSlots - 1} {
				e := MakeForeign(k, ref, slot)
				if r, s := SplitForeign(e.Value()); e.Kind() != k || r != ref || s != slot {
					t.Errorf("%v of slot %d of reference %d is %v %d %d", k, slot, ref, e.Kind(), r, s)
				}
			}
		}
	}
}

// TestGrow: a block that has become longer keeps what it had, and is Absent behind it.
func TestGrow(t *testing.T) {
	b, err := New([]uint64{0, 3})
	if err != nil {
		t.Fatal(err)
	}
	want := map[Start]Entry{}
	for i, n := range []uint64{1, 5, leafPages, 3 * leafPages, 3*leafPages + 1} {
		b.Grow(0, n)
		b.Grow(1, 2) // no shorter
		at := Start{0, n - 1}
		want[at] = Make(Flash, uint64(i))
		b.Set(at.Block, at.Page, want[at])
	}
	if b.Pages(0) != 3*leafPages+1 || b.Pages(1) != 3 {
		t.Errorf("%d and %d pages", b.Pages(0), b.Pages(1))
	}
	for block := range 2 {
		for page := range b.Pages(block) {
			if got := b.Get(block, page); got != want[Start{block, page}] {
				t.Errorf("page %d of block %d: %v", page, block, got)
			}
		}
	}
}
