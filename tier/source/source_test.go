package source_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/pagemap"
	"github.com/flic-migrate/flic-migrate/tier/source"
	"github.com/flic-migrate/flic-migrate/tier/vfs/crashfs"
)

const (
	pageSize = 256
	per      = 4  // pages in a segment
	segments = 20 // of the image
)

// fill is the content of a flash slot.
func fill(slot uint64) []byte { return bytes.Repeat([]byte{byte(slot), byte(slot >> 4)}, pageSize/2) }

// open is an image with segments of those pages.
func open(t testing.TB) *image.Image {
	t.Helper()
	f, err := crashfs.New(0).Create("/image")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	w, err := image.NewWriter(f, image.Header{PageSize: pageSize, SegmentPages: per}, image.LZ4, 1)
	if err != nil {
		t.Fatal(err)
	}
	for n := range uint64(segments) {
		b := w.NewBuffer(image.Pages)
		for i := range uint64(per) {
			b.Data = append(b.Data, fill(n*per+i)...)
		}
		if err := w.Submit(b); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Finish(nil, nil); err != nil {
		t.Fatal(err)
	}
	im, err := image.Open(f)
	if err != nil {
		t.Fatal(err)
	}
	return im
}

// backing has an image and an NVRAM part of 10 slots.
type backing struct {
	im      *image.Image
	fetched atomic.Int64
	fail    atomic.Pointer[error]
	guarded int
	dropped []uint64
}

func (b *backing) Fetch(st *image.Stored, n source.Need) error {
	b.fetched.Add(1)
	if err := b.fail.Load(); err != nil {
		return *err
	}
	return b.im.FetchSegment(st, n.Number)
}

func (b *backing) Slot(slot uint64, want source.Page) ([]byte, error) {
	if b.guarded == 0 {
		return nil, errors.New("not guarded")
	}
	if slot == 9 {
		return nil, fmt.Errorf("slot 9 for page %d", want.Number)
	}
	return fill(1000 + slot), nil
}

func (b *backing) Guard(fn func() error) error {
	b.guarded++
	defer func() { b.guarded-- }()
	return fn()
}

func (b *backing) Drop(first, n uint64) { b.dropped = append(b.dropped, first, n) }

// xor is a toy with two needs: the page is that of one flash slot, in the lower bits
// of the value, against that of another.
var xor = source.Row{
	Kind: 41, Name: "xor", Form: source.Whole,
	Needs: func(f *source.Facts, r pagemap.Run, dst []source.Need) ([]source.Need, uint64) {
		a, b := r.First&0xff/f.SegmentPages, r.First>>8/f.SegmentPages
		return append(dst, source.Segment(uint32(a)), source.Segment(uint32(b))), 1
	},
	Content: func(rd *source.Reader, e pagemap.Entry) (source.Content, error) {
		s, i := rd.InSegment(e.Value() & 0xff)
		a, err := s.Page(i)
		if err != nil {
			return source.Content{}, err
		}
		s, i = rd.InSegment(e.Value() >> 8)
		b, err := s.Page(i)
		if err != nil {
			return source.Content{}, err
		}
		out := bytes.Clone(a)
		for i := range out {
			out[i] ^= b[i]
		}
		return source.Content{Form: source.Whole, Data: out}, nil
	},
}

func newSet(t testing.TB) (*source.Set, *backing) {
	b := &backing{im: open(t)}
	return &source.Set{
		Facts: source.Facts{PageSize: pageSize, SegmentPages: per, Slots: 10, Objects: []uint32{segments}},
		Table: source.Default.With(xor), Backing: b,
	}, b
}

// want is what a page with entry e holds.
func want(e pagemap.Entry) []byte {
	v := e.Value()
	switch e.Kind() {
	case pagemap.Fill:
		return bytes.Repeat([]byte{byte(v)}, pageSize)
	case pagemap.NVRAM:
		return fill(1000 + v)
	case pagemap.Flash:
		return fill(v)
	case xor.Kind:
		b := fill(v & 0xff)
		for i, c := range fill(v >> 8) {
			b[i] ^= c
		}
		return b
	}
	return make([]byte, pageSize)
}

// random is a map of runs of all kinds, and its entries.
func random(t testing.TB, seed uint64) (*pagemap.Map, [][]pagemap.Entry) {
	t.Helper()
	pages := []uint64{300, 0, 70}
	rng := rand.New(rand.NewPCG(seed, 7))
	b, err := pagemap.New(pages)
	if err != nil {
		t.Fatal(err)
	}
	model := make([][]pagemap.Entry, len(pages))
	for blk, n := range pages {
		model[blk] = make([]pagemap.Entry, n)
		for p := uint64(0); p < n; {
			kind := []pagemap.Kind{pagemap.Absent, pagemap.Fill, pagemap.ZeroData, pagemap.NVRAM, pagemap.Flash, pagemap.Flash, xor.Kind}[rng.IntN(7)]
			first, step, count := uint64(0), uint64(0), 1+rng.Uint64N(12)
			switch kind {
			case pagemap.Fill:
				first = rng.Uint64N(256)
			case pagemap.NVRAM:
				first = rng.Uint64N(9)
			case pagemap.Flash:
				step = rng.Uint64N(2)
				first = rng.Uint64N(segments*per - 12)
			case xor.Kind:
				first = rng.Uint64N(segments*per) | rng.Uint64N(segments*per)<<8
			}
			for i := uint64(0); i < count && p < n; i++ {
				model[blk][p] = pagemap.Make(kind, first+i*step)
				b.Set(blk, p, model[blk][p])
				p++
			}
		}
	}
	var starts []pagemap.Start
	var chunks [][]byte
	if err := b.Encode(64, func(at pagemap.Start, c []byte) error {
		starts, chunks = append(starts, at), append(chunks, bytes.Clone(c))
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	m, err := pagemap.NewMap(pagemap.Source{Pages: pages, Starts: starts,
		Read:  func(i int) ([]byte, error) { return chunks[i], nil },
		Check: func(int, pagemap.Run) error { return nil },
		Bad:   func(_ int, err error) error { return err }})
	if err != nil {
		t.Fatal(err)
	}
	return m, model
}

// TestReader reads every page of maps with all kinds, run by run and one by one.
func TestReader(t *testing.T) {
	set, b := newSet(t)
	rd := set.NewReader(source.NewCache(b.Fetch, source.MaxNeeds))
	defer rd.Close()
	page := make([]byte, pageSize)
	for seed := range uint64(20) {
		m, model := random(t, seed)
		next := uint64(0)
		err := m.Runs(func(r pagemap.Run) error {
			next = 0
			return rd.Read(t.Context(), r, func(i, n uint64, c source.Content) error {
				if i != next || n == 0 || n > 1 && r.Step != 0 {
					t.Fatalf("%d pages from %d on of %+v come in place of %d", n, i, r, next)
				}
				next += n
				e := model[r.Block][r.Page+i]
				if err := c.Copy(page); err != nil || !bytes.Equal(page, want(e)) {
					t.Fatalf("%v %d: wrong content, %v", e.Kind(), e.Value(), err)
				}
				if c.Zero() != (e.Kind() == pagemap.Absent || e.Kind() == pagemap.ZeroData || e == pagemap.Make(pagemap.Fill, 0)) {
					t.Errorf("%v %d: zero is %v", e.Kind(), e.Value(), c.Zero())
				}
				return nil
			})
		})
		if err != nil {
			t.Fatal(err)
		}
		for blk := range model {
			for p, e := range model[blk] {
				if err := rd.Copy(t.Context(), page, source.Page{Block: blk, Number: uint64(p)}, e); err != nil || !bytes.Equal(page, want(e)) {
					t.Fatalf("page %d of block %d: %v", p, blk, err)
				}
			}
		}
	}
	if err := rd.Copy(t.Context(), page, source.Page{Number: 77}, pagemap.Make(pagemap.NVRAM, 9)); err == nil || !strings.Contains(err.Error(), "page 77") {
		t.Errorf("a page that can't be read: %v", err)
	}
	if len(b.dropped) == 0 {
		t.Error("NVRAM slots stay mapped")
	}
	for _, k := range []pagemap.Kind{pagemap.Delta, pagemap.Foreign, pagemap.ForeignNVRAM, pagemap.Disk, 63} {
		var unknown *source.UnknownError
		if err := rd.Copy(t.Context(), page, source.Page{}, pagemap.Make(k, 1)); !errors.As(err, &unknown) || unknown.Kind != k || set.Row(k).Known() {
			t.Errorf("%v: %v", k, err)
		}
	}
}

// TestPlanned: a plan says what the Reader will ask for, in that order.
func TestPlanned(t *testing.T) {
	set, b := newSet(t)
	for seed := range uint64(20) {
		m, model := random(t, seed)
		var runs []pagemap.Run
		if err := m.Runs(func(r pagemap.Run) error { runs = append(runs, r); return nil }); err != nil {
			t.Fatal(err)
		}
		rand.New(rand.NewPCG(seed, 3)).Shuffle(len(runs), func(i, j int) { runs[i], runs[j] = runs[j], runs[i] })
		var plan []source.Need
		var planned source.Planned
		for _, r := range runs {
			for r.Count > 0 {
				needs, n := set.Stretch(r, make([]source.Need, source.MaxNeeds))
				if err := planned.Next(needs, func(n source.Need) error { plan = append(plan, n); return nil }); err != nil {
					t.Fatal(err)
				}
				r = r.From(n)
			}
		}
		cache := source.NewCache(b.Fetch, source.MaxNeeds)
		var sr image.SegmentReader
		rd := set.NewPlannedReader(cache, func(ctx context.Context, n source.Need) (*source.Held, error) {
			if len(plan) == 0 || plan[0] != n {
				t.Fatalf("wants %v, of the plan is left %v", n, plan)
			}
			plan = plan[1:]
			return cache.Get(ctx, n, &sr)
		})
		page := make([]byte, pageSize)
		for _, r := range runs {
			err := rd.Read(t.Context(), r, func(i, _ uint64, c source.Content) error {
				if err := c.Copy(page); err != nil || !bytes.Equal(page, want(model[r.Block][r.Page+i])) {
					t.Fatalf("wrong content, %v", err)
				}
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
		}
		if rd.Close(); len(plan) > 0 {
			t.Errorf("planned and never wanted: %v", plan)
		}
	}
	// A plan for something else is found out.
	cache := source.NewCache(b.Fetch, 4)
	var sr image.SegmentReader
	rd := set.NewPlannedReader(cache, func(ctx context.Context, n source.Need) (*source.Held, error) {
		return cache.Get(ctx, source.Segment(n.Number+1), &sr)
	})
	defer rd.Close()
	if err := rd.Copy(t.Context(), make([]byte, pageSize), source.Page{}, pagemap.Make(pagemap.Flash, 4)); err == nil || !strings.Contains(err.Error(), "segment 2 was planned where segment 1 is needed") {
		t.Errorf("another segment than planned: %v", err)
	}
}

// TestOrder lists every stretch once, with its segment.
func TestOrder(t *testing.T) {
	set, _ := newSet(t)
	for seed := range uint64(20) {
		m, model := random(t, seed)
		o, err := set.NewOrder(m)
		if err != nil {
			t.Fatal(err)
		}
		if o.Things() != segments {
			t.Errorf("%d things", o.Things())
		}
		seen := make([][]int, len(model))
		for blk := range model {
			seen[blk] = make([]int, len(model[blk]))
		}
		for thing := range o.Things() {
			last := -1
			err := o.Stretches(thing, func(r pagemap.Run) error {
				needs, n := set.Stretch(r, make([]source.Need, source.MaxNeeds))
				if n != r.Count || o.Thing(needs[0]) != thing {
					t.Errorf("%+v, which needs %v, is listed under %d", r, needs, thing)
				}
				if at := int(m.Number(r.Block, r.Page)); at <= last {
					t.Errorf("%+v is out of order", r)
				} else {
					last = at
				}
				for i := range r.Count {
					seen[r.Block][r.Page+i]++
				}
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
		}
		for blk := range model {
			for p, e := range model[blk] {
				times := 0
				if e.Kind() == pagemap.Flash || e.Kind() == xor.Kind {
					times = 1
				}
				if seen[blk][p] != times {
					t.Fatalf("page %d of block %d, %v, is listed %d times", p, blk, e.Kind(), seen[blk][p])
				}
			}
		}
	}
}

// TestCache shares a cache that is too small among goroutines.
func TestCache(t *testing.T) {
	_, b := newSet(t)
	const goroutines, most = 6, 8
	c := source.NewCache(b.Fetch, most)
	c.CountRefills()
	var wg sync.WaitGroup
	for g := range uint64(goroutines) {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(g, 1))
			var sr image.SegmentReader
			for range 2000 {
				n := rng.Uint32N(segments)
				h, err := c.Get(t.Context(), source.Segment(n), &sr)
				if err != nil {
					t.Error(err)
					return
				}
				s, err := h.Wait(t.Context())
				if err != nil {
					t.Error(err)
				}
				if b, err := s.Page(2); err != nil || !bytes.Equal(b, fill(uint64(n)*per+2)) {
					t.Errorf("segment %d: wrong page, %v", n, err)
				}
				if o := c.Have(source.Segment((n + 1) % segments)); o != nil {
					c.Release(o)
				}
				c.Release(h)
			}
		})
	}
	wg.Wait()
	if n := b.fetched.Load(); c.Refilled() != n-segments || n >= goroutines*2000*9/10 {
		t.Errorf("%d fetched, %d of them again", n, c.Refilled())
	}
}

// TestCacheFull waits for room, and not for ever.
func TestCacheFull(t *testing.T) {
	_, b := newSet(t)
	c := source.NewCache(b.Fetch, 2)
	var sr image.SegmentReader
	var held []*source.Held
	for n := range uint32(2) {
		h, err := c.Get(t.Context(), source.Segment(n), &sr)
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, h)
	}
	ctx, cancel := context.WithTimeoutCause(t.Context(), 10*time.Millisecond, errors.New("no room"))
	defer cancel()
	if _, err := c.Get(ctx, source.Segment(2), &sr); err == nil || err.Error() != "no room" {
		t.Errorf("a full cache: %v", err)
	}
	// Two wait, and both get theirs when both places are free.
	var wg sync.WaitGroup
	for n := range uint32(2) {
		wg.Go(func() {
			var sr image.SegmentReader
			h, err := c.Get(t.Context(), source.Segment(2+n), &sr)
			if err != nil {
				t.Error(err)
				return
			}
			time.Sleep(time.Millisecond)
			c.Release(h)
		})
	}
	c.Release(held[0])
	c.Release(held[1])
	wg.Wait()
	// A failure is not kept.
	broken := errors.New("broken")
	b.fail.Store(&broken)
	if _, err := c.Get(t.Context(), source.Segment(7), &sr); err != broken {
		t.Errorf("broken: %v", err)
	}
	b.fail.Store(nil)
	h, err := c.Get(t.Context(), source.Segment(7), &sr)
	if err != nil {
		t.Fatal(err)
	}
	c.Release(h)
	// Who reserves and does not fill holds up who waits, no longer than that wants.
	h, fill, err := c.Reserve(t.Context(), source.Segment(9))
	if err != nil || !fill {
		t.Fatal(fill, err)
	}
	if c.Have(source.Segment(9)) != nil {
		t.Error("what is not filled is had")
	}
	if _, err := h.Wait(ctx); err == nil || err.Error() != "no room" {
		t.Errorf("wait for what nobody fills: %v", err)
	}
	c.Release(h)
	c.Fill(h, &sr)
	if o := c.Have(source.Segment(9)); o == nil {
		t.Error("what was filled late is not had")
	} else {
		c.Release(o)
	}
}

// lender has a segment in memory.
type lender struct {
	*backing
	n int
}

func (l *lender) Lend(n source.Need) *image.Segment {
	if n.Number != 3 {
		return nil
	}
	l.n++
	s := new(image.Segment)
	s.Lend(3, slices.Concat(fill(500), fill(501), fill(502), fill(503)), pageSize)
	return s
}

// TestLender prefers what is in memory, and never keeps it.
func TestLender(t *testing.T) {
	set, b := newSet(t)
	l := &lender{backing: b}
	set.Backing = l
	rd := set.NewReader(source.NewCache(b.Fetch, source.MaxNeeds))
	defer rd.Close()
	page := make([]byte, pageSize)
	for i := range uint64(3) {
		e := pagemap.Make(pagemap.Flash, 12+i)
		if err := rd.Copy(t.Context(), page, source.Page{}, e); err != nil || !bytes.Equal(page, fill(500+i)) {
			t.Errorf("lent page %d: %v", i, err)
		}
	}
	if err := rd.Copy(t.Context(), page, source.Page{}, pagemap.Make(pagemap.Flash, 16)); err != nil || !bytes.Equal(page, fill(16)) {
		t.Errorf("page of the image: %v", err)
	}
	if l.n != 3 || b.fetched.Load() != 1 {
		t.Errorf("lent %d times, fetched %d", l.n, b.fetched.Load())
	}
}
