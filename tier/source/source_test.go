package source_test

import (
	"bytes"
	"compress/zlib"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/tier/delta"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
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

// spaces are the images: the checkpoint's own and those of two references. Segments
// have pages, records or deltas, as the letters say; NVRAM parts have 10 slots.
var spaces = []struct {
	per      int
	segments string
}{
	{per, strings.Repeat("p", segments) + "ddd"},
	{8, "ppdrppd"},
	{2, "prpdpppppp"},
}

// diskSlots is how many disk slots there are: a whole segment of them, and a part of one.
const diskSlots = source.DiskSegment + 9

// held is what is in a slot of a space, NVRAM slots counting from 5000 on. It differs
// from slot to slot, and in each word from that of space 0.
func held(space int, slot uint64) []byte {
	return fill(slot + uint64(space)*10000)
}

// word is the one that the delta in a slot changes, and to what.
func word(space int, slot uint64) (at int, value byte) {
	return int(slot) % (pageSize / 8), byte(slot) ^ byte(space) | 0x80
}

// base is what the delta in a slot is against: anything that is no delta.
func base(space int, slot uint64) pagemap.Entry {
	switch slot % 6 {
	case 0:
		return pagemap.Make(pagemap.NVRAM, slot%9)
	case 5:
		return pagemap.Make(pagemap.Disk, slot%diskSlots)
	case 1:
		return pagemap.Make(pagemap.Flash, slot%(segments*per))
	case 2:
		return pagemap.MakeForeign(pagemap.Foreign, 0, slot%16)
	case 3: // of the records
		return pagemap.MakeForeign(pagemap.Foreign, 1, 2+slot%2)
	}
	return pagemap.MakeForeign(pagemap.ForeignNVRAM, 1, slot%9)
}

// open is the image of a space.
func open(t testing.TB, space int) *image.Image {
	t.Helper()
	f, err := crashfs.New(0).Create(fmt.Sprintf("/image%d", space))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	sp := spaces[space]
	w, err := image.NewWriter(f, image.Header{PageSize: pageSize, SegmentPages: sp.per, Features: image.Features{Incompat: image.HasDeltas}}, image.LZ4, 1)
	if err != nil {
		t.Fatal(err)
	}
	for n, letter := range sp.segments {
		kind := map[rune]image.Kind{'p': image.Pages, 'r': image.Records, 'd': image.Deltas}[letter]
		b := w.NewBuffer(kind)
		lengths, payloads := binary.BigEndian.AppendUint32(nil, uint32(sp.per)), []byte(nil)
		for i := range sp.per {
			slot := uint64(n*sp.per + i)
			page := held(space, slot)
			var payload []byte
			switch kind {
			case image.Pages:
				b.Data = append(b.Data, page...)
				continue
			case image.Records:
				payload = deflate(page)
			case image.Deltas:
				changed := make([]byte, pageSize)
				at, v := word(space, slot)
				for j := range 8 {
					changed[8*at+j] = v
				}
				// The base is zero where nothing changes.
				var ok bool
				if payload, ok = delta.Encode(nil, changed, make([]byte, pageSize)); !ok {
					t.Fatal("no delta")
				}
			}
			lengths = binary.BigEndian.AppendUint32(lengths, uint32(len(payload)))
			payloads = append(payloads, payload...)
		}
		if kind != image.Pages {
			b.Data = append(append(b.Data, lengths...), payloads...)
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

func deflate(page []byte) []byte {
	var b bytes.Buffer
	w := zlib.NewWriter(&b)
	w.Write(page)
	w.Close()
	return b.Bytes()
}

// backing has the images and NVRAM parts. It checks what comes from references.
type backing struct {
	im      []*image.Image
	fetched atomic.Int64
	checked atomic.Int64
	// segments were checked as a whole; with refuse that finds nothing right.
	segments atomic.Int64
	refuse   bool
	fail     atomic.Pointer[error]
	guarded  int
	dropped  []uint64
}

func (b *backing) Fetch(st *image.Stored, n source.Need) error {
	b.fetched.Add(1)
	if err := b.fail.Load(); err != nil {
		return *err
	}
	if int(n.Space) == len(spaces) {
		first := uint64(n.Number) * source.DiskSegment
		k := min(source.DiskSegment, diskSlots-first)
		room := st.Pages("/disk", n.Number, pageSize, int(k))
		for i := range k {
			copy(room[i*pageSize:], held(len(spaces), first+i))
		}
		return nil
	}
	return b.im[n.Space].FetchSegment(st, n.Number)
}

func (b *backing) CheckSegment(n source.Need, _ *image.Stored, s *image.Segment) error {
	b.segments.Add(1)
	if b.refuse {
		return errRefused
	}
	per := source.DiskSegment
	if int(n.Space) < len(spaces) {
		per = spaces[n.Space].per
	}
	for i := range s.Len() {
		page, err := s.Page(i)
		if n.Space == 0 || err != nil || !bytes.Equal(page, held(int(n.Space), uint64(int(n.Number)*per+i))) {
			return fmt.Errorf("%v has other digests, %v", n, err)
		}
	}
	return nil
}

func (b *backing) Slot(space source.Space, slot uint64, want source.Page) ([]byte, error) {
	if b.guarded == 0 {
		return nil, errors.New("not guarded")
	}
	if slot == 9 {
		return nil, fmt.Errorf("slot 9 for page %d", want.Number)
	}
	return held(int(space), 5000+slot), nil
}

func (b *backing) CheckPage(space source.Space, slot uint64, page []byte) error {
	if space == 0 {
		return nil
	}
	b.checked.Add(1)
	sp := spaces[space]
	must := held(int(space), slot)
	if sp.segments[int(slot)/sp.per] == 'd' {
		must = want(pagemap.MakeForeign(pagemap.ForeignDelta, int(space)-1, slot))
	}
	if !bytes.Equal(page, must) {
		return fmt.Errorf("slot %d of space %d has another digest", slot, space)
	}
	return nil
}

func (b *backing) CheckSlot(space source.Space, slot uint64, _ source.Page, page []byte) error {
	b.checked.Add(1)
	if space == 0 || !bytes.Equal(page, held(int(space), 5000+slot)) {
		return fmt.Errorf("NVRAM slot %d of space %d has another digest", slot, space)
	}
	return nil
}

func (b *backing) Guard(fn func() error) error {
	b.guarded++
	defer func() { b.guarded-- }()
	return fn()
}

func (b *backing) Drop(_ source.Space, first, n uint64) { b.dropped = append(b.dropped, first, n) }

// xor is a toy with two needs: the page is that of one flash slot, in the lower bits
// of the value, against that of another.
var xor = source.Row{
	Kind: 41, Name: "xor", Form: source.Whole,
	Needs: func(f *source.Facts, r pagemap.Run, dst []source.Need) ([]source.Need, uint64) {
		a, b := r.First&0xff/per, r.First>>8/per
		return append(dst, source.Segment(uint32(a)), source.Segment(uint32(b))), 1
	},
	Content: func(rd *source.Reader, e pagemap.Entry) (source.Content, error) {
		s, i := rd.InSegment(0, e.Value()&0xff)
		a, err := s.Page(i)
		if err != nil {
			return source.Content{}, err
		}
		s, i = rd.InSegment(0, e.Value()>>8)
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
	b := new(backing)
	f := source.Facts{PageSize: pageSize}
	var slots []uint64
	for i, sp := range spaces {
		b.im = append(b.im, open(t, i))
		n := uint32(len(sp.segments))
		s := source.SpaceFacts{SegmentPages: uint64(sp.per), Slots: source.Below(10), Segments: source.Below(n)}
		if i == 2 {
			s.Segments = source.Ranges{{First: 0, Count: 5}, {First: 7, Count: n - 7}} // it needs no more
		}
		f.Spaces = append(f.Spaces, s)
		slots = append(slots, uint64(len(sp.segments)*sp.per))
	}
	f.AddDisk(diskSlots)
	bases, err := pagemap.New(slots)
	if err != nil {
		t.Fatal(err)
	}
	for i, sp := range spaces {
		for slot := range slots[i] {
			if sp.segments[int(slot)/sp.per] == 'd' {
				bases.Set(i, slot, base(i, slot))
			}
		}
	}
	f.Bases = stored(t, bases, slots, func(r pagemap.Run) error { return f.CheckBase(r) })
	return &source.Set{Facts: f, Table: source.Default.With(xor), Backing: b, Checker: b}, b
}

// stored is a map as it is read.
func stored(t testing.TB, b *pagemap.Builder, pages []uint64, check func(pagemap.Run) error) *pagemap.Map {
	t.Helper()
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
		Check: func(_ int, r pagemap.Run) error { return check(r) },
		Bad:   func(_ int, err error) error { return err }})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// want is what a page with entry e holds.
func want(e pagemap.Entry) []byte {
	v := e.Value()
	space := 0
	switch e.Kind() {
	case pagemap.Foreign, pagemap.ForeignNVRAM, pagemap.ForeignDelta:
		space, v = pagemap.SplitForeign(v)
		space++
	}
	switch e.Kind() {
	case pagemap.Fill:
		return bytes.Repeat([]byte{byte(v)}, pageSize)
	case pagemap.NVRAM, pagemap.ForeignNVRAM:
		return held(space, 5000+v)
	case pagemap.Flash, pagemap.Foreign:
		return held(space, v)
	case pagemap.Disk:
		return held(len(spaces), v)
	case pagemap.Delta, pagemap.ForeignDelta:
		b := want(base(space, v))
		at, c := word(space, v)
		for i := range 8 {
			b[8*at+i] = c
		}
		return b
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
func random(t testing.TB, seed uint64, check func(pagemap.Run) error) (*pagemap.Map, [][]pagemap.Entry) {
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
			kind := []pagemap.Kind{pagemap.Absent, pagemap.Fill, pagemap.ZeroData, pagemap.NVRAM, pagemap.Flash, pagemap.Flash, xor.Kind,
				pagemap.Delta, pagemap.Foreign, pagemap.ForeignNVRAM, pagemap.ForeignDelta, pagemap.Disk}[rng.IntN(12)]
			first, step, count := uint64(0), uint64(0), 1+rng.Uint64N(12)
			switch kind {
			case pagemap.Fill:
				first = rng.Uint64N(256)
			case pagemap.NVRAM:
				first = rng.Uint64N(9)
			case pagemap.Flash:
				step = rng.Uint64N(2)
				first = rng.Uint64N(segments*per - 12)
			case pagemap.Disk:
				step, first = rng.Uint64N(2), rng.Uint64N(diskSlots)
				count = min(count, diskSlots-first)
			case xor.Kind:
				first = rng.Uint64N(segments*per) | rng.Uint64N(segments*per)<<8
			case pagemap.Delta:
				step, first = rng.Uint64N(2), segments*per+rng.Uint64N(12)
				count = min(count, (segments+3)*per-first)
			case pagemap.Foreign:
				// The first ones, pages and records, up to the deltas.
				step = rng.Uint64N(2)
				at, end := rng.Uint64N(16), uint64(16)
				ref := rng.IntN(2)
				if ref == 1 {
					at, end = rng.Uint64N(6), 6
				} else if rng.IntN(2) == 0 {
					at, end = 24+rng.Uint64N(24), 48
				}
				count = min(count, end-at)
				first = uint64(pagemap.MakeForeign(0, ref, at))
			case pagemap.ForeignNVRAM:
				first = uint64(pagemap.MakeForeign(0, 1, rng.Uint64N(9)))
			case pagemap.ForeignDelta:
				step = rng.Uint64N(2)
				slots := [][2]uint64{{16, 24}, {48, 56}, {6, 8}}[rng.IntN(3)]
				at := slots[0] + rng.Uint64N(slots[1]-slots[0])
				count = min(count, slots[1]-at)
				if slots[0] == 6 {
					first = uint64(pagemap.MakeForeign(0, 1, at))
				} else {
					first = uint64(pagemap.MakeForeign(0, 0, at))
				}
			}
			for i := uint64(0); i < count && p < n; i++ {
				model[blk][p] = pagemap.Make(kind, first+i*step)
				b.Set(blk, p, model[blk][p])
				p++
			}
		}
	}
	m := stored(t, b, pages, check)
	return m, model
}

// TestReader reads every page of maps with all kinds, run by run and one by one.
func TestReader(t *testing.T) {
	set, b := newSet(t)
	rd := set.NewReader(source.NewCache(b, source.MaxNeeds))
	defer rd.Close()
	page := make([]byte, pageSize)
	for seed := range uint64(30) {
		m, model := random(t, seed, func(r pagemap.Run) error { return set.Table.Check(&set.Facts, r) })
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
	if b.checked.Load() == 0 || b.segments.Load() == 0 {
		t.Error("nothing of a reference was checked")
	}
	for _, k := range []pagemap.Kind{40, 63} {
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
		m, model := random(t, seed, func(r pagemap.Run) error { return set.Table.Check(&set.Facts, r) })
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
		cache := source.NewCache(b, source.MaxNeeds)
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
	cache := source.NewCache(b, 4)
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
		m, model := random(t, seed, func(r pagemap.Run) error { return set.Table.Check(&set.Facts, r) })
		o, err := set.NewOrder(m)
		if err != nil {
			t.Fatal(err)
		}
		if o.Things() != segments+3+7+8+2 {
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
				switch e.Kind() {
				case pagemap.Flash, xor.Kind, pagemap.Delta, pagemap.Foreign, pagemap.ForeignDelta, pagemap.Disk:
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
	c := source.NewCache(b, most)
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
	c := source.NewCache(b, 2)
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
	rd := set.NewReader(source.NewCache(b, source.MaxNeeds))
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

// TestCheck refuses entries that name what is not there, or what this checkpoint does
// not say that it needs.
func TestCheck(t *testing.T) {
	set, _ := newSet(t)
	per2 := uint64(spaces[2].per)
	for _, c := range []struct {
		e     pagemap.Entry
		count uint64
		says  string
	}{
		{pagemap.MakeForeign(pagemap.Foreign, 0, 55), 1, ""},
		{pagemap.MakeForeign(pagemap.Foreign, 0, 55), 2, "flash slot 56 is not among those that are needed of reference 0"},
		{pagemap.MakeForeign(pagemap.Foreign, 0, 1<<40-1), 1, "is not among those"},
		{pagemap.MakeForeign(pagemap.Foreign, 0, 1<<40-1), 2, "a run from reference 0 into the next"},
		{pagemap.MakeForeign(pagemap.Foreign, 1, 5*per2-1), 1, ""},
		{pagemap.MakeForeign(pagemap.Foreign, 1, 5*per2-1), 2, "flash slot 10 is not among those"},
		{pagemap.MakeForeign(pagemap.Foreign, 1, 5*per2-1), 2*per2 + 2, "is not among those"}, // both ends are needed
		{pagemap.MakeForeign(pagemap.Foreign, 2, 0), 1, "reference 2 does not exist"},
		{pagemap.MakeForeign(pagemap.Foreign, 65535, 0), 1, "reference 65535 does not exist"},
		{pagemap.MakeForeign(pagemap.ForeignNVRAM, 1, 9), 1, ""},
		{pagemap.MakeForeign(pagemap.ForeignNVRAM, 1, 9), 2, "NVRAM slot 10 is not among those"},
		{pagemap.MakeForeign(pagemap.ForeignNVRAM, 7, 0), 1, "reference 7 does not exist"},
		{pagemap.MakeForeign(pagemap.ForeignDelta, 0, 16), 8, ""},
		{pagemap.MakeForeign(pagemap.ForeignDelta, 0, 16), 9, "the delta in slot 24 has no base"},
		{pagemap.MakeForeign(pagemap.ForeignDelta, 0, 15), 1, "the delta in slot 15 has no base"},
		{pagemap.MakeForeign(pagemap.ForeignDelta, 0, 56), 1, "flash slot 56"},
		{pagemap.Make(pagemap.Delta, segments*per), 12, ""},
		{pagemap.Make(pagemap.Delta, segments*per-1), 1, "has no base"},
		{pagemap.Make(pagemap.Delta, (segments+3)*per), 1, "flash slot 92 does not exist"},
		{pagemap.Make(pagemap.NVRAM, 9), 2, "NVRAM slot 10 does not exist"},
		{pagemap.Make(pagemap.Flash, pagemap.MaxValue), 1, "does not exist"},
		{pagemap.Make(pagemap.Disk, 0), diskSlots, ""},
		{pagemap.Make(pagemap.Disk, 1), diskSlots, "disk slot 41 does not exist"},
		{pagemap.Make(pagemap.Disk, pagemap.MaxValue), 1, "does not exist"},
	} {
		r := pagemap.Run{Count: c.count, Kind: c.e.Kind(), First: c.e.Value(), Step: 1}
		err := set.Table.Check(&set.Facts, r)
		if c.says == "" && err != nil || c.says != "" && (err == nil || !strings.Contains(err.Error(), c.says)) {
			t.Errorf("%d pages of %v %#x: %v", c.count, r.Kind, r.First, err)
		}
	}
	for _, c := range []struct {
		e    pagemap.Entry
		says string
	}{
		{0, ""},
		{pagemap.Make(pagemap.Flash, 5), ""},
		{pagemap.Make(pagemap.Delta, segments*per), "against a page of kind delta"},
		{pagemap.MakeForeign(pagemap.ForeignDelta, 0, 16), "against a page of kind foreign delta"},
		{pagemap.Make(pagemap.Fill, 1), "against a page of kind fill"},
		{pagemap.Make(60, 1), "against a page of kind source kind 60"},
		{pagemap.Make(pagemap.Disk, 5), ""},
		{pagemap.Make(pagemap.Disk, 5000), "base of the delta in slot 7: disk slot 5000 does not exist"},
		{pagemap.Make(pagemap.Flash, 5000), "base of the delta in slot 7: flash slot 5000 does not exist"},
		{pagemap.MakeForeign(pagemap.ForeignNVRAM, 0, 77), "NVRAM slot 77 is not among"},
	} {
		err := set.CheckBase(pagemap.Run{Page: 7, Count: 1, Kind: c.e.Kind(), First: c.e.Value()})
		if c.says == "" && err != nil || c.says != "" && (err == nil || !strings.Contains(err.Error(), c.says)) {
			t.Errorf("base of %v %#x: %v", c.e.Kind(), c.e.Value(), err)
		}
	}
	// Without a map of bases there are no deltas.
	set.Bases = nil
	if err := set.Table.Check(&set.Facts, pagemap.Run{Count: 1, Kind: pagemap.Delta, First: segments * per}); err == nil || !strings.Contains(err.Error(), "has no base") {
		t.Errorf("no bases at all: %v", err)
	}
}

// TestDigests: what comes from a reference is checked, and refused if it is wrong; what
// is the checkpoint's own has checksums.
func TestDigests(t *testing.T) {
	set, b := newSet(t)
	page := make([]byte, pageSize)
	foreign := pagemap.Make(pagemap.Delta, segments*per+2) // its base is
	for _, e := range []pagemap.Entry{
		pagemap.MakeForeign(pagemap.Foreign, 0, 3), pagemap.MakeForeign(pagemap.Foreign, 1, 2), pagemap.MakeForeign(pagemap.ForeignNVRAM, 1, 3),
		pagemap.MakeForeign(pagemap.ForeignDelta, 0, 16), foreign,
	} {
		rd := set.NewReader(source.NewCache(b, source.MaxNeeds))
		before := b.checked.Load() + b.segments.Load()
		if err := rd.Copy(t.Context(), page, source.Page{}, e); err != nil || b.checked.Load()+b.segments.Load() == before {
			t.Errorf("%v %#x: %v, and no check", e.Kind(), e.Value(), err)
		}
		rd.Close()
		b.refuse = true
		wrong := &source.Set{Facts: set.Facts, Table: set.Table, Backing: b, Checker: refuser{}}
		rd = wrong.NewReader(source.NewCache(b, source.MaxNeeds))
		if err := rd.Copy(t.Context(), page, source.Page{}, e); !errors.Is(err, errRefused) {
			t.Errorf("%v %#x, wrong: %v", e.Kind(), e.Value(), err)
		}
		rd.Close()
		b.refuse = false
	}
	// Foreign records are inflated: a stream may have to do without such records.
	rd := set.NewReader(source.NewCache(b, source.MaxNeeds))
	defer rd.Close()
	_, record := pagemap.SplitForeign(pagemap.MakeForeign(pagemap.Foreign, 1, 2).Value())
	run := pagemap.Run{Count: 1, Kind: pagemap.Foreign, First: uint64(1)<<40 | record}
	if err := rd.Read(t.Context(), run, func(_, _ uint64, c source.Content) error {
		if c.Form != source.Whole {
			t.Errorf("a foreign record has form %d", c.Form)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}

// TestDamagedRecord: who inflates an own record, which a reader gives as it is, is told
// where the damage is.
func TestDamagedRecord(t *testing.T) {
	f, err := crashfs.New(0).Create("/image")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	w, err := image.NewWriter(f, image.Header{PageSize: pageSize, SegmentPages: 1}, image.None, 1)
	if err != nil {
		t.Fatal(err)
	}
	for _, payload := range [][]byte{deflate(fill(0)), []byte("no zlib")} {
		b := w.NewBuffer(image.Records)
		b.Data = binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(b.Data, 1), uint32(len(payload)))
		b.Data = append(b.Data, payload...)
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
	set, b := newSet(t)
	set.Spaces[0].SegmentPages = 1
	b.im[0] = im
	rd := set.NewReader(source.NewCache(b, source.MaxNeeds))
	defer rd.Close()
	err = rd.Copy(t.Context(), make([]byte, pageSize), source.Page{}, pagemap.Make(pagemap.Flash, 1))
	var damage *integrity.CorruptError
	if !errors.As(err, &damage) || damage.File != im.Name() || damage.Offset != im.SegmentOffset(1) {
		t.Errorf("damage at %d: %v", im.SegmentOffset(1), err)
	}
}

var errRefused = errors.New("refused")

// refuser finds nothing right.
type refuser struct{}

func (refuser) CheckPage(source.Space, uint64, []byte) error              { return errRefused }
func (refuser) CheckSlot(source.Space, uint64, source.Page, []byte) error { return errRefused }

// TestInOrder: what is kept follows from the longest segment, and is never too little to
// go on, nor more than there is.
func TestInOrder(t *testing.T) {
	facts := func(segments uint32, per ...uint64) *source.Facts {
		f := &source.Facts{PageSize: 4096}
		for _, n := range per {
			f.Spaces = append(f.Spaces, source.SpaceFacts{SegmentPages: n, Segments: source.Below(segments)})
		}
		return f
	}
	for _, c := range []struct {
		f    *source.Facts
		want int
	}{
		{facts(1000, 32), 64}, {facts(1000, 32, 64), 32}, {facts(1000, 32, 256, 1), 8}, {facts(7, 32, 32), 14}, {facts(0, 32), 1},
		{&source.Facts{PageSize: 64 << 10, Spaces: []source.SpaceFacts{{SegmentPages: 256, Segments: source.Below(1 << 20)}}}, 4},
	} {
		if got := c.f.InOrder(8 << 20); got != c.want {
			t.Errorf("%+v: %d segments, want %d", c.f, got, c.want)
		}
	}
}
