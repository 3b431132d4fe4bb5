package lazy_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/stream"
	"github.com/flic-migrate/flic-migrate/stream/pipe"
	"github.com/flic-migrate/flic-migrate/stream/postcopy"
	"github.com/flic-migrate/flic-migrate/stream/returnpath"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/lazy"
	"github.com/flic-migrate/flic-migrate/tier/pagemap"
	"github.com/flic-migrate/flic-migrate/tier/rescue"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/workingset"
)

// threeBlocks are of sizes that fill no word of a bitmap.
var threeBlocks = []tiertest.Block{
	{Name: "vga.vram", Size: 1 << 20}, {Name: "pc.ram", Size: 4<<20 - 12<<10}, {Name: "pc.bios", Size: 20 << 10},
}

// shapes are checkpoints with all that a page map can say.
var shapes = []struct {
	name string
	o    tiertest.Options
	hot  uint64
	so   save.Options
}{
	{"cold", tiertest.Options{Seed: 1, Blocks: threeBlocks}, 0, save.Options{}},
	{"nvram", tiertest.Options{Seed: 2, Blocks: threeBlocks}, 1, save.Options{}},
	{"some in nvram", tiertest.Options{Seed: 3, Blocks: threeBlocks, Fill: true, Named: 0.2}, 7, save.Options{Codec: image.Zstd}},
	{"live", tiertest.Options{Seed: 4, Blocks: threeBlocks, Passes: 4, Resend: 0.4, XBZRLE: true, Fill: true}, 3, save.Options{}},
	{"compressed records", tiertest.Options{Seed: 5, Blocks: threeBlocks, Compress: 0.5, Shuffle: true}, 5, save.Options{}},
	{"absent", tiertest.Options{Seed: 6, Blocks: threeBlocks, Mix: tiertest.Mix{4, 1, 1, 1, 1, 1, 1, 1}}, 4, save.Options{}},
	{"duplicates", tiertest.Options{Seed: 7, Blocks: threeBlocks, Mix: tiertest.Mix{0, 1, 0, 20, 1}, Pool: 3}, 11, save.Options{Codec: image.LZ4}},
	{"one page a segment", tiertest.Options{Seed: 8, Blocks: threeBlocks}, 9, save.Options{SegmentPages: 1}},
	{"with a return path", tiertest.Options{Seed: 9, ReturnPath: true, Advise: true}, 2, save.Options{ReturnPath: io.Discard}},
}

// TestWire restores every shape with demands at random moments.
func TestWire(t *testing.T) {
	for _, tc := range shapes {
		t.Run(tc.name, func(t *testing.T) {
			s := newSaved(t, tc.o, tc.hot, tc.so)
			for round := range uint64(4) {
				synctest.Test(t, func(t *testing.T) {
					r := rand.New(rand.NewPCG(round, 1))
					d := newFakeQEMU(s)
					demands := 0
					ask := func(n int) {
						for range n {
							// Some pages twice, as two vCPUs do.
							id := s.random(r)
							for range 1 + r.IntN(2) {
								check(t, d.ask(id))
								demands++
							}
						}
					}
					d.onRun = func() { ask(int(round) * 10) }
					d.afterPart = func(int) {
						if round > 0 && r.IntN(3) == 0 {
							ask(1 + r.IntN(3))
						}
					}
					rep := d.run(t, t.Context(), lazy.Serve, lazy.Options{}).ok(t)
					if !d.ended || rep.Pages != int64(len(d.order)) {
						t.Errorf("ended is %v, %d pages reported, %d came", d.ended, rep.Pages, len(d.order))
					}
					// What was asked for after the last page may stay unread.
					if rep.Demands > int64(demands) || round > 0 && rep.Demands == 0 || rep.Waited > rep.Demands {
						t.Errorf("asked %d times, reported %+v", demands, rep)
					}
				})
			}
		})
	}
}

// TestOpeningBytes compares the opening with one put together by hand.
func TestOpeningBytes(t *testing.T) {
	s := newSaved(t, tiertest.Options{Blocks: threeBlocks[1:]}, 0, save.Options{})
	all, layout := s.Bytes(), s.Layout()
	setup, err := s.setup()
	check(t, err)
	synctest.Test(t, func(t *testing.T) {
		// Behind each device a PING, with a number of its own.
		tail, devices := all[layout.Tail:], ""
		parsed, err := stream.ParseTail(tail)
		check(t, err)
		at := 0
		for i, s := range parsed.Sections {
			end := s.Offset + s.Length + 5
			devices += string(tail[at:end]) + "\x08\x00\x02\x00\x04\x00\x00\x10" + string(rune(i))
			at = end
		}
		pack := "\x08\x00\x04\x00\x00" + devices + "\x08\x00\x02\x00\x04\x00\x00\x00\x03" + "\x08\x00\x05\x00\x00"
		want := string(all[:layout.RAM]) +
			"\x08\x00\x01\x00\x00" + // OPEN_RETURN_PATH
			"\x08\x00\x03\x00\x10\x00\x00\x00\x00\x00\x00\x10\x00\x00\x00\x00\x00\x00\x00\x10\x00" + // ADVISE
			string(setup[layout.RAM:]) +
			"\x08\x00\x06\x00\x19\x00\x06pc.ram\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x3f\xd0\x00" +
			"\x08\x00\x06\x00\x1a\x00\x07pc.bios\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x50\x00" +
			"\x08\x00\x07\x00\x04" + string(binary.BigEndian.AppendUint32(nil, uint32(len(pack)))) + pack
		var out bytes.Buffer
		in := lasting{bytes.NewReader(returnpath.AppendPong(nil, 3)), make(chan struct{})}
		defer close(in.end)
		_, err = lazy.Serve(t.Context(), s.ck, in, &out, lazy.Options{})
		check(t, err)
		got := out.String()
		if !strings.HasPrefix(got, want) {
			n := 0
			for n < len(want) && n < len(got) && want[n] == got[n] {
				n++
			}
			t.Errorf("differs at byte %d of %d: % x, expected % x", n, len(want), got[n:min(n+20, len(got))], want[n:min(n+20, len(want))])
		}
		if end := "\x03\x00\x00\x00\x02\x00\x00\x00\x00\x00\x00\x00\x10\x7e\x00\x00\x00\x02\x00"; !strings.HasSuffix(got, end) {
			t.Errorf("ends in % x", got[len(got)-30:])
		}
	})
}

// TestOpeningEarly: device sections that stand around RAM's setup stay there, behind
// the advice, and do not get into the package.
func TestOpeningEarly(t *testing.T) {
	for _, behind := range []bool{false, true} {
		s := newSaved(t, tiertest.Options{Early: 2, EarlyBehind: behind, ReturnPath: behind, Blocks: threeBlocks[1:]}, 3, save.Options{ReturnPath: io.Discard})
		all := s.Bytes()
		// The sections are all that is between the configuration, with its
		// commands, and the first PART.
		var config, sections []byte
		rd := stream.NewReader(stream.NewCursor(bytes.NewReader(all), 0))
		for {
			f, err := rd.Next()
			check(t, err)
			raw := bytes.Clone(f.Raw)
			if f.Kind == stream.SectionPart {
				break
			}
			switch f.Kind {
			case stream.Header, stream.Configuration:
				config = append(config, raw...)
			case stream.SectionStart:
				dec := ramparse.NewDecoder(ramparse.Options{PageSize: 4096})
				for rec := (ramparse.Record{}); rec.Kind != ramparse.EOS; raw = append(raw, rec.Raw...) {
					check(t, dec.Next(rd.Cursor(), &rec))
				}
				sections = append(sections, raw...)
			case stream.SectionEarly, stream.Footer:
				sections = append(sections, raw...)
			}
		}
		synctest.Test(t, func(t *testing.T) {
			var out bytes.Buffer
			in := lasting{bytes.NewReader(returnpath.AppendPong(nil, 3)), make(chan struct{})}
			defer close(in.end)
			_, err := lazy.Serve(t.Context(), s.ck, in, &out, lazy.Options{})
			check(t, err)
			advice := postcopy.AppendAdvise(postcopy.AppendOpenReturnPath(nil), postcopy.Advise{PageSizes: 4096, Target: 4096})
			want := slices.Concat(config, advice, sections, stream.AppendCommand(nil, stream.CommandPostcopyDiscard, nil)[:3])
			if !bytes.HasPrefix(out.Bytes(), want) {
				t.Errorf("behind %v: the opening is not as it should be", behind)
			}
			if n := bytes.Count(out.Bytes(), []byte("virtio-mem-device-early")); n != 1 {
				t.Errorf("behind %v: the early section came %d times", behind, n)
			}
		})
	}
}

// TestDemandedFirst: what is asked for comes before what is not, in the order
// of asking, however much of it is waiting.
func TestDemandedFirst(t *testing.T) {
	s := newSaved(t, tiertest.Options{Seed: 10, Blocks: threeBlocks, Mix: tiertest.Mix{0, 1, 0, 0, 4, 4}}, 8, save.Options{})
	synctest.Test(t, func(t *testing.T) {
		for round := range uint64(8) {
			r := rand.New(rand.NewPCG(round, 2))
			d := newFakeQEMU(s)
			var asked []tiertest.PageID
			at := -1
			ask := func() {
				for len(asked) < 6 {
					id := s.random(r)
					if d.got[id] || d.asked[id] {
						continue
					}
					check(t, d.ask(id))
					asked = append(asked, id)
				}
				at = len(d.order)
				synctest.Wait()
			}
			when := int(round) * 5
			if when == 0 {
				d.onRun = ask
			}
			d.afterPart = func(n int) {
				if n == when {
					ask()
				}
			}
			d.run(t, t.Context(), lazy.Serve, lazy.Options{}).ok(t)
			// One write may have been under way, and its section's end finds the
			// next one in the making. Seven neighbours come with each demanded page,
			// each in a section of its own.
			last := at
			for i, id := range asked {
				n, section := d.position(id)
				limit := when + 2 + 8*i
				if n < 0 || section > limit {
					t.Errorf("round %d: demand %d, made after section %d, came as page %d in section %d", round, i, when, n, section)
				}
				if n < last && n >= at {
					// A neighbour of an earlier one.
					continue
				}
				last = n
			}
		}
	})
}

// TestZeroOnDemand asks for pages without content, twice each.
func TestZeroOnDemand(t *testing.T) {
	s := newSaved(t, tiertest.Options{Seed: 11, Blocks: threeBlocks, Mix: tiertest.Mix{3, 3, 3, 1}}, 4, save.Options{})
	synctest.Test(t, func(t *testing.T) {
		d := newFakeQEMU(s)
		zeros := 0
		d.onRun = func() {
			for p := range s.Pages(1) {
				// Fewer than the server's queue holds: nobody reads pages meanwhile.
				if id := (tiertest.PageID{Block: 1, Page: p}); s.page(id) == nil && zeros < 400 {
					zeros++
					check(t, d.ask(id))
					check(t, d.ask(id))
				}
			}
			synctest.Wait()
		}
		rep := d.run(t, t.Context(), lazy.Serve, lazy.Options{}).ok(t)
		// Some come with others that were asked for before.
		if zeros < 400 || rep.Zero == 0 || rep.Zero > int64(zeros) || rep.Waited != rep.Zero || rep.Demands != int64(2*zeros) {
			t.Errorf("%d zero pages, each asked for twice: %+v", zeros, rep)
		}
		for id := range d.asked {
			if !d.got[id] {
				t.Errorf("page %v has not come", id)
			}
		}
	})
}

// list makes an Options.First.
func list(runs []workingset.PageRun) func() []workingset.PageRun {
	return func() []workingset.PageRun { return runs }
}

// TestLearned: what one resume had to wait for comes first in the next, zero
// pages included, and the list is not trusted.
func TestLearned(t *testing.T) {
	s := newSaved(t, tiertest.Options{Seed: 12, Blocks: threeBlocks, Mix: tiertest.Mix{1, 1, 1, 1, 4}}, 0, save.Options{})
	synctest.Test(t, func(t *testing.T) {
		r := rand.New(rand.NewPCG(1, 3))
		d := newFakeQEMU(s)
		var asked []tiertest.PageID
		d.onRun = func() {
			for range 40 {
				id := s.random(r)
				asked = append(asked, id)
				check(t, d.ask(id))
			}
			synctest.Wait()
		}
		// Held back, so that no page is on its way before it is asked for.
		first := d.run(t, t.Context(), lazy.Serve, lazy.Options{HoldBackground: 100 * time.Millisecond}).ok(t)
		learned := 0
		for _, run := range first.Touched {
			learned += int(run.Count)
		}
		for _, id := range asked {
			found := false
			for _, run := range first.Touched {
				found = found || run.Block == id.Block && run.Page <= id.Page && id.Page < run.Page+run.Count
			}
			if !found {
				t.Errorf("page %v was asked for and not learned", id)
			}
		}

		d = newFakeQEMU(s)
		for _, run := range first.Touched {
			for i := range run.Count {
				d.mayZero[tiertest.PageID{Block: run.Block, Page: run.Page + i}] = true
			}
		}
		runs := append([]workingset.PageRun{{Block: -1, Page: 0, Count: 1}, {Block: 3, Page: 0, Count: 1},
			{Block: 2, Page: 5, Count: 1}, {Block: 2, Page: 1 << 60, Count: 1 << 60}}, first.Touched...)
		d.run(t, t.Context(), lazy.Serve, lazy.Options{First: list(append(runs, first.Touched...))}).ok(t)
		for _, id := range asked {
			if n, _ := d.position(id); n < 0 || n >= learned {
				t.Errorf("learned page %v came as number %d of %d learned ones", id, n, learned)
			}
		}
	})
}

// TestOrder: NVRAM in prefetch order, then flash as it lies in the image.
func TestOrder(t *testing.T) {
	s := newSaved(t, tiertest.Options{Seed: 13, Blocks: threeBlocks, Mix: tiertest.Mix{0, 1, 0, 0, 4, 4}}, 8, save.Options{})
	synctest.Test(t, func(t *testing.T) {
		d := newFakeQEMU(s)
		rep := d.run(t, t.Context(), lazy.Serve, lazy.Options{}).ok(t)
		slots := s.ck.NVRAMSlots()
		if rep.HotPages != int64(len(slots)) || len(slots) < 100 {
			t.Fatalf("%d slots, %+v", len(slots), rep)
		}
		var last pagemap.Entry
		for i, a := range d.order {
			if i < len(slots) {
				if int(slots[i].Block) != a.Block || slots[i].Page != a.Page {
					t.Fatalf("page %d is %v, the slot's is %d:%d", i, a.PageID, slots[i].Block, slots[i].Page)
				}
				continue
			}
			run, err := s.ck.PageMap.Find(a.Block, a.Page)
			check(t, err)
			if e := run.Entry(0); e < last {
				t.Fatalf("page %v is out of the image's order", a.PageID)
			} else {
				last = e
			}
		}
	})
}

// TestPageTablesFirst: the guest's page tables, then what was learned, then
// NVRAM. A list that a damaged or foreign checkpoint has does no harm.
func TestPageTablesFirst(t *testing.T) {
	s := newSaved(t, tiertest.Options{Seed: 17, Blocks: threeBlocks, Mix: tiertest.Mix{0, 0, 0, 0, 1}}, 8, save.Options{})
	synctest.Test(t, func(t *testing.T) {
		tables := []workingset.PageRun{{Block: 2, Page: 3, Count: 1}, {Block: 0, Page: 100, Count: 5}, {Block: 1, Page: 1, Count: 1}}
		s.ck.Meta.PageTables = append([]workingset.PageRun{{Block: -1, Count: 1}, {Block: 9, Count: 1}, {Page: 1 << 63, Count: 1 << 63}}, tables...)
		learned := []workingset.PageRun{{Block: 0, Page: 50, Count: 3}}
		d := newFakeQEMU(s)
		rep := d.run(t, t.Context(), lazy.Serve, lazy.Options{First: list(learned)}).ok(t)
		at := func(runs []workingset.PageRun) (first, last, pages int) {
			first = 1 << 30
			for _, r := range runs {
				for i := range r.Count {
					n, _ := d.position(tiertest.PageID{Block: r.Block, Page: r.Page + i})
					first, last, pages = min(first, n), max(last, n), pages+1
				}
			}
			return first, last, pages
		}
		if first, last, n := at(tables); first != 0 || last != n-1 {
			t.Errorf("page tables came as numbers %d to %d of %d", first, last, n)
		}
		if first, last, n := at(learned); first != 7 || last != 7+n-1 {
			t.Errorf("learned pages came as numbers %d to %d", first, last)
		}
		if hot := int64(len(s.ck.NVRAMSlots())); rep.HotPages < hot || rep.HotPages > hot+10 {
			t.Errorf("%d hot pages, %d in NVRAM", rep.HotPages, hot)
		}
	})
}

// TestFollow: the background goes on where a guest reads on, in either
// direction, and comes back for the rest.
func TestFollow(t *testing.T) {
	s := newSaved(t, tiertest.Options{Seed: 30, Blocks: []tiertest.Block{{Name: "m", Size: 16 << 20}}, Mix: tiertest.Mix{0, 0, 0, 0, 1}}, 0, save.Options{SegmentPages: 8})
	synctest.Test(t, func(t *testing.T) {
		position := func(asked ...uint64) func(uint64) int {
			d := newFakeQEMU(s)
			d.afterPart = func(n int) {
				if n == 10 {
					for _, p := range asked {
						check(t, d.ask(tiertest.PageID{Page: p}))
					}
					synctest.Wait()
				}
			}
			d.run(t, t.Context(), lazy.Serve, lazy.Options{}).ok(t)
			return func(p uint64) int { n, _ := d.position(tiertest.PageID{Page: p}); return n }
		}
		for _, tc := range []struct {
			asked []uint64
			then  []uint64 // pages that come next
		}{
			{[]uint64{3000}, []uint64{3008, 3015, 3100}}, // one is enough to go there
			{[]uint64{3000, 3010, 3030}, []uint64{3064, 3100}},
			{[]uint64{3070, 3060, 3050}, []uint64{3044, 3040}},
			{[]uint64{3000, 2000, 3010, 2010}, []uint64{2064, 2100}}, // two vCPUs
		} {
			at := position(tc.asked...)
			for _, p := range tc.then {
				if at(p) > at(1000) || at(p) > at(3900) {
					t.Errorf("asked for %v: page %d came as number %d, page 1000 as %d, 3900 as %d", tc.asked, p, at(p), at(1000), at(3900))
				}
			}
		}
		// Nobody asked: from the beginning to the end.
		if at := position(); at(1000) > at(3000) || at(3000) > at(3900) {
			t.Error("not in order")
		}
	})
}

// TestResize: the pipe is small while the guest asks, and the server waits a little
// if the kernel refuses, but not for ever.
func TestResize(t *testing.T) {
	for _, refusals := range []int{2, 1 << 30} {
		s := newSaved(t, tiertest.Options{Seed: 31, Blocks: []tiertest.Block{{Name: "m", Size: 16 << 20}}}, 0, save.Options{})
		synctest.Test(t, func(t *testing.T) {
			var asked []int
			d := newFakeQEMU(s)
			d.afterPart = func(n int) {
				switch n {
				case 100:
					check(t, d.ask(tiertest.PageID{Page: 4000}))
					synctest.Wait()
				case 120:
					time.Sleep(600 * time.Millisecond) // longer than a guest is taken to be asking
				}
			}
			refused := 0
			d.run(t, t.Context(), lazy.Serve, lazy.Options{Resize: func(n int) int {
				if len(asked) == 0 || asked[len(asked)-1] != n {
					asked = append(asked, n)
				}
				if n < 64<<10 && refused < refusals {
					refused++
					return 64 << 10
				}
				return n
			}}).ok(t)
			if want := []int{64 << 10, 16 << 10, 64 << 10}; !slices.Equal(asked, want) {
				t.Errorf("asked for %v, want %v", asked, want)
			}
			if refusals == 2 && refused != 2 {
				t.Errorf("asked again %d times", refused)
			}
		})
	}
}

// TestCrowded: a QEMU that waits for a CPU after each write, as it does beside other guests that
// run, finds more in the pipe when it has got one, also if its guest is asking; and one that
// is only slow, or waits once, does not.
func TestCrowded(t *testing.T) {
	s := newSaved(t, tiertest.Options{Seed: 31, Blocks: []tiertest.Block{{Name: "m", Size: 16 << 20}}}, 0, save.Options{})
	for name, c := range map[string]struct {
		wait func(part int) time.Duration
		want []int
	}{
		"crowded": {func(part int) time.Duration { return 4 * time.Millisecond }, []int{64 << 10, 1 << 20}},
		"for a while": {func(part int) time.Duration {
			if part < 40 {
				return 4 * time.Millisecond
			}
			return 300 * time.Microsecond
		}, []int{64 << 10, 1 << 20, 64 << 10}},
		"slow": {func(part int) time.Duration { return time.Millisecond }, []int{64 << 10}},
		"now and then": {func(part int) time.Duration {
			if part%4 == 0 {
				return 40 * time.Millisecond
			}
			return 300 * time.Microsecond
		}, []int{64 << 10}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var asked []int
				d := newFakeQEMU(s)
				most := 0
				d.afterPart = func(n int) {
					most = n
					time.Sleep(c.wait(n))
				}
				d.run(t, t.Context(), lazy.Serve, lazy.Options{Resize: func(n int) int {
					if len(asked) == 0 || asked[len(asked)-1] != n {
						asked = append(asked, n)
					}
					return n
				}}).ok(t)
				if !slices.Equal(asked, c.want) {
					t.Errorf("asked for %v, want %v; %d parts", asked, c.want, most)
				}
			})
		})
	}
}

// TestHold: nothing cold comes as long as the guest keeps asking, at most for
// MaxHold.
func TestHold(t *testing.T) {
	s := newSaved(t, tiertest.Options{Seed: 14, Blocks: threeBlocks}, 0, save.Options{})
	synctest.Test(t, func(t *testing.T) {
		d := newFakeQEMU(s)
		d.onRun = func() {
			for p := range uint64(5) {
				check(t, d.ask(tiertest.PageID{Block: 1, Page: p * 64}))
				time.Sleep(60 * time.Millisecond)
			}
		}
		start := time.Now()
		rep := d.run(t, t.Context(), lazy.Serve, lazy.Options{HoldBackground: 200 * time.Millisecond}).ok(t)
		if took := time.Since(start); took != 500*time.Millisecond || rep.Waited != 5 {
			t.Errorf("took %v, %+v", took, rep)
		}

		// A guest that asks on and on is not waited for for ever.
		d = newFakeQEMU(s)
		stop, stopped := make(chan struct{}), make(chan struct{})
		d.onRun = func() {
			go func() {
				defer close(stopped)
				for p := uint64(0); ; p++ {
					select {
					case <-stop:
						return
					case <-time.After(5 * time.Millisecond):
					}
					if d.ask(tiertest.PageID{Block: 1, Page: p % s.Pages(1)}) != nil {
						return
					}
				}
			}()
		}
		start = time.Now()
		d.run(t, t.Context(), lazy.Serve, lazy.Options{HoldBackground: 10 * time.Second, MaxHold: 300 * time.Millisecond}).ok(t)
		close(stop)
		<-stopped
		if took := time.Since(start); took < 300*time.Millisecond || took > 310*time.Millisecond {
			t.Errorf("took %v", took)
		}
	})
}

// TestRefused: what QEMU never asks for ends the restore with a reason.
func TestRefused(t *testing.T) {
	s := newSaved(t, tiertest.Options{Seed: 15, Blocks: threeBlocks}, 3, save.Options{})
	page := func(name string, start uint64, n uint32) []byte {
		return returnpath.AppendReqPages(nil, name, start, n)
	}
	for name, tc := range map[string]struct {
		b    []byte
		says string
	}{
		"behind the block":     {page("pc.bios", 20<<10, 4096), "pc.bios:0x5000"},
		"far behind":           {page("pc.bios", 1<<63, 4096), "pc.bios:0x8000000000000000"},
		"over the block's end": {page("pc.bios", 16<<10, 8192), "8192 bytes at pc.bios:0x4000"},
		"inside a page":        {page("pc.ram", 100, 4096), "pc.ram:0x64"},
		"unknown block":        {page("pc.rom", 0, 4096), "pc.rom:0x0"},
		"no block yet":         {page("", 0, 4096), ""},
		"failed":               {returnpath.AppendShut(nil, 1), "SHUT 1"},
		"unknown message":      {[]byte{0, 99, 0, 0}, ""},
		"cut off":              {[]byte{0, 1, 0}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := newFakeQEMU(s)
				d.onRun = func() {
					_, err := d.rp.Write(tc.b)
					check(t, err)
					if name == "cut off" {
						d.rp.(io.Closer).Close()
					}
					synctest.Wait()
				}
				res := d.run(t, t.Context(), lazy.Serve, lazy.Options{})
				if res.server == nil || !strings.Contains(res.server.Error(), tc.says) {
					t.Errorf("error %v does not say %q", res.server, tc.says)
				}
				if d.ended || !errors.Is(res.loaded, stream.ErrTruncated) {
					t.Errorf("the destination: ended is %v, %v", d.ended, res.loaded)
				}
			})
		})
	}
}

// TestHarmless: messages that say nothing to a restore do not disturb it.
func TestHarmless(t *testing.T) {
	s := newSaved(t, tiertest.Options{Seed: 16, Blocks: threeBlocks}, 3, save.Options{})
	synctest.Test(t, func(t *testing.T) {
		d := newFakeQEMU(s)
		d.onRun = func() {
			b := returnpath.AppendPong(nil, 7)
			b = returnpath.AppendRecvBitmap(b, "pc.ram", make([]byte, 8))
			b = returnpath.AppendResumeAck(b)
			b = returnpath.AppendSwitchoverAck(b)
			b = returnpath.AppendShut(b, 0)
			b = returnpath.AppendReqPages(b, "pc.ram", 0, 0) // counts as one page
			_, err := d.rp.Write(b)
			check(t, err)
			d.allowZero(tiertest.PageID{Block: 1})
			synctest.Wait()
		}
		if rep := d.run(t, t.Context(), lazy.Serve, lazy.Options{}).ok(t); rep.Demands != 1 {
			t.Errorf("%d demands", rep.Demands)
		}
	})
}

// TestDevicesFirst: until the devices are loaded there is nothing but what they
// touch, and no END.
func TestDevicesFirst(t *testing.T) {
	s := newSaved(t, tiertest.Options{Seed: 24, Blocks: threeBlocks, Mix: tiertest.Mix{1, 1, 1, 1, 4}}, 3, save.Options{})
	synctest.Test(t, func(t *testing.T) {
		d := newFakeQEMU(s)
		d.loading = true
		var late []tiertest.PageID
		for p := uint64(0); len(late) < 5; p++ {
			if id := (tiertest.PageID{Block: 1, Page: p}); s.page(id) == nil {
				late = append(late, id)
				p |= 63 // none that comes with this one
			}
		}
		devices, before := make(chan struct{}), 0
		var answered atomic.Bool
		d.afterPart = func(int) {
			if !answered.Load() {
				before = len(d.order)
			}
		}
		d.onRun = func() {
			go func() {
				defer close(devices)
				time.Sleep(100 * time.Millisecond) // all else could be sent meanwhile
				for _, id := range late {
					d.ask(id)
					d.rp.Write(returnpath.AppendPong(nil, 1)) // another PING's
					synctest.Wait()
				}
				synctest.Wait()
				answered.Store(true)
				d.pong()
				d.pong() // once more does no harm
			}()
		}
		rep := d.run(t, t.Context(), lazy.Serve, lazy.Options{}).ok(t)
		<-devices
		if rep.Zero != int64(len(late)) || rep.Waited != rep.Zero || rep.Loaded < 100*time.Millisecond {
			t.Errorf("%+v", rep)
		}
		for _, id := range late {
			if n, _ := d.position(id); n >= before {
				t.Errorf("page %v came as number %d, the devices were loaded after %d", id, n, before)
			}
		}
		// Each of them and the seven behind it.
		if before > 8*len(late) {
			t.Errorf("%d pages came before the devices were loaded", before)
		}
	})
}

// TestManyPages: one request for a stretch of pages, longer than the queue.
func TestManyPages(t *testing.T) {
	s := newSaved(t, tiertest.Options{Seed: 17, Blocks: []tiertest.Block{{Name: "m", Size: 16 << 20}}}, 3, save.Options{})
	synctest.Test(t, func(t *testing.T) {
		d := newFakeQEMU(s)
		d.mayZeroAll()
		d.onRun = func() {
			_, err := d.rp.Write(returnpath.AppendReqPages(nil, "m", 0, 16<<20))
			check(t, err)
			synctest.Wait()
		}
		if rep := d.run(t, t.Context(), lazy.Serve, lazy.Options{}).ok(t); rep.Demands != 4096 {
			t.Errorf("%d demands", rep.Demands)
		}
	})
}

// TestGone: QEMU's end, seen on the return path or on writing.
func TestGone(t *testing.T) {
	s := newSaved(t, tiertest.Options{Seed: 18, Blocks: threeBlocks}, 3, save.Options{})
	synctest.Test(t, func(t *testing.T) {
		d := newFakeQEMU(s)
		d.onRun = func() {
			d.rp.(io.Closer).Close()
			synctest.Wait()
		}
		if res := d.run(t, t.Context(), lazy.Serve, lazy.Options{}); !errors.Is(res.server, lazy.ErrGone) {
			t.Errorf("the return path has ended: %v", res.server)
		}
		for _, left := range []int{0, 100, 30000, 300000} {
			in, rp := io.Pipe()
			go rp.Write(returnpath.AppendPong(nil, 3))
			failure := errors.New("broken pipe")
			_, err := lazy.Serve(t.Context(), s.ck, in, &failingWriter{left, failure}, lazy.Options{})
			if !errors.Is(err, failure) {
				t.Errorf("write failed after %d bytes: %v", left, err)
			}
			rp.Close()
		}
	})
}

// TestDeviceFails: a QEMU that can't load a device says so, ends, or, from 10.2 on, says
// nothing any more. Which device it was is known in each case, as far as it is described.
func TestDeviceFails(t *testing.T) {
	for _, described := range []bool{true, false} {
		s := newSaved(t, tiertest.Options{Seed: 18, Blocks: threeBlocks, NoDescription: !described}, 3, save.Options{})
		parsed, err := stream.ParseTail(s.Bytes()[s.Layout().Tail:])
		check(t, err)
		if described == (len(parsed.Sections) < 3) {
			t.Fatalf("%d devices", len(parsed.Sections))
		}
		for name, tc := range map[string]struct {
			last func(rp io.WriteCloser)
			err  error
		}{
			"says so": {func(rp io.WriteCloser) { rp.Write(returnpath.AppendShut(nil, 1)) }, lazy.ErrFailed},
			"ends":    {func(rp io.WriteCloser) { rp.Close() }, lazy.ErrGone},
			"waits":   {func(io.WriteCloser) {}, lazy.ErrNotLoaded},
		} {
			for loaded := range max(1, len(parsed.Sections)) {
				synctest.Test(t, func(t *testing.T) {
					d := newFakeQEMU(s)
					d.loading = true
					d.onRun = func() {
						for i := range loaded {
							time.Sleep(time.Second) // slow, but it goes on
							d.rp.Write(returnpath.AppendPong(nil, uint32(0x1000+i)))
						}
						tc.last(d.rp.(io.WriteCloser))
					}
					begin := time.Now()
					res := d.run(t, t.Context(), lazy.Serve, lazy.Options{LoadTime: 2 * time.Second})
					if !errors.Is(res.server, tc.err) || described != strings.Contains(res.server.Error(), "device ") {
						t.Errorf("%s: %v", name, res.server)
					}
					if took := time.Since(begin) - time.Duration(loaded)*time.Second; took > 3*time.Second {
						t.Errorf("%s: noticed after %v", name, took)
					}
					if described && (d.pings != len(parsed.Sections) || !strings.Contains(res.server.Error(), strconv.Quote(parsed.Sections[loaded].Name))) {
						t.Errorf("%s: %d of %d devices have a PING; %v", name, d.pings, len(parsed.Sections), res.server)
					}
				})
			}
		}
	}
}

// TestWait: a server ends when QEMU has said that it has everything, and not before,
// whatever it still asks for. Without that word it fails: nobody knows whether the
// guest is whole.
func TestWait(t *testing.T) {
	s := newSaved(t, tiertest.Options{Seed: 18, Blocks: threeBlocks}, 3, save.Options{})
	enough := errors.New("the user has had enough")
	for name, tc := range map[string]struct {
		last  func(rp *io.PipeWriter, cancel context.CancelCauseFunc)
		err   error         // that Wait returns
		says  string        // if there is no such value
		after time.Duration // that it takes
	}{
		"done": {last: func(rp *io.PipeWriter, _ context.CancelCauseFunc) { rp.Write(returnpath.AppendShut(nil, 0)) }},
		"done and gone": {last: func(rp *io.PipeWriter, _ context.CancelCauseFunc) {
			rp.Write(returnpath.AppendShut(nil, 0))
			rp.Close()
		}},
		"gone":     {last: func(rp *io.PipeWriter, _ context.CancelCauseFunc) { rp.Close() }, err: lazy.ErrGone},
		"failed":   {last: func(rp *io.PipeWriter, _ context.CancelCauseFunc) { rp.Write(returnpath.AppendShut(nil, 1)) }, says: "SHUT 1"},
		"silent":   {last: func(*io.PipeWriter, context.CancelCauseFunc) {}, err: lazy.ErrNoShut, after: 10 * time.Second},
		"too late": {last: func(_ *io.PipeWriter, cancel context.CancelCauseFunc) { cancel(enough) }, err: enough},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				in, rp := io.Pipe()
				defer rp.Close()
				go rp.Write(returnpath.AppendPong(nil, 3))
				rep, err := lazy.Serve(t.Context(), s.ck, in, io.Discard, lazy.Options{})
				check(t, err)
				ctx, cancel := context.WithCancelCause(t.Context())
				defer cancel(nil)
				start := time.Now()
				var waited error
				ended := make(chan struct{})
				go func() { waited = rep.Wait(ctx); close(ended) }()
				// More than the server has room for: nobody takes them any more.
				for range 3000 {
					rp.Write(returnpath.AppendReqPages(nil, "pc.ram", 4096, 4096))
				}
				time.Sleep(time.Second)
				select {
				case <-ended:
					t.Errorf("ended before QEMU had everything: %v", waited)
				default:
				}
				tc.last(rp, cancel)
				<-ended
				switch {
				case tc.says != "":
					if waited == nil || !strings.Contains(waited.Error(), tc.says) {
						t.Errorf("ended with %v, which does not say %q", waited, tc.says)
					}
				case !errors.Is(waited, tc.err):
					t.Errorf("ended with %v, want %v", waited, tc.err)
				}
				if took := time.Since(start); took != max(tc.after, time.Second) {
					t.Errorf("ended after %v, want %v", took, tc.after)
				}
				if (rep.Taken > rep.Resident) != (waited == nil) {
					t.Errorf("%+v", rep)
				}
			})
		})
	}
}

// TestStuck: a QEMU that stops reading, or that does not answer, does not keep a
// server that is to end, whatever carries the stream. What has been written by then
// is the beginning of a stream.
func TestStuck(t *testing.T) {
	s := newSaved(t, tiertest.Options{Seed: 19, Blocks: threeBlocks}, 3, save.Options{})
	enough := errors.New("the user has had enough")
	socket := func(t *testing.T) (server, qemu *net.UnixConn) {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		check(t, err)
		var ends [2]*net.UnixConn
		for i, fd := range fds {
			f := os.NewFile(uintptr(fd), "socket")
			c, err := net.FileConn(f)
			check(t, err)
			f.Close()
			t.Cleanup(func() { c.Close() })
			ends[i] = c.(*net.UnixConn)
		}
		return ends[0], ends[1]
	}
	for name, open := range map[string]func(t *testing.T) (in io.Reader, out io.Writer, qemu net.Conn){
		"pipe": func(t *testing.T) (io.Reader, io.Writer, net.Conn) {
			in, qemu := socket(t) // the return path alone
			r, w, err := os.Pipe()
			check(t, err)
			out, err := pipe.NewWriter(w)
			check(t, err)
			t.Cleanup(func() { out.Close(); r.Close(); w.Close() })
			return in, out, readsFrom{qemu, r}
		},
		"socket": func(t *testing.T) (io.Reader, io.Writer, net.Conn) {
			server, qemu := socket(t)
			f, err := server.File()
			check(t, err)
			out, err := pipe.NewWriter(f)
			check(t, err)
			t.Cleanup(func() { out.Close(); f.Close() })
			return server, out, qemu
		},
		"connection": func(t *testing.T) (io.Reader, io.Writer, net.Conn) {
			server, qemu := socket(t)
			return server, server, qemu
		},
	} {
		for _, running := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, guest runs %v", name, running), func(t *testing.T) {
				in, out, qemu := open(t)
				if running {
					_, err := qemu.Write(returnpath.AppendPong(nil, 3))
					check(t, err)
				}
				ctx, cancel := context.WithCancelCause(t.Context())
				time.AfterFunc(100*time.Millisecond, func() { cancel(enough) })
				start := time.Now()
				rep, err := lazy.Serve(ctx, s.ck, in, out, lazy.Options{})
				if took := time.Since(start); !errors.Is(err, enough) || took > 5*time.Second {
					t.Fatalf("after %v: %v", took, err)
				}
				got := make([]byte, rep.BytesOut)
				_, err = io.ReadFull(qemu, got)
				check(t, err)
				check(t, qemu.SetReadDeadline(time.Now().Add(10*time.Millisecond)))
				if n, err := qemu.Read(make([]byte, 1)); n > 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
					t.Errorf("more than the %d bytes reported was written: %v", rep.BytesOut, err)
				}
				d := newFakeQEMU(s)
				d.rp = io.Discard
				if err := d.load(bytes.NewReader(got)); !errors.Is(err, stream.ErrTruncated) {
					t.Errorf("what was written is no stream's beginning: %v", err)
				}
			})
		}
	}
	t.Run("no answer to a recovery", func(t *testing.T) {
		server, qemu := socket(t)
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(50*time.Millisecond, func() { cancel(enough) })
		if _, err := lazy.Recover(ctx, s.ck, server, server, lazy.Options{}); !errors.Is(err, enough) {
			t.Error(err)
		}
		qemu.Close()
	})
}

// readsFrom is a connection whose other direction is a pipe.
type readsFrom struct {
	net.Conn
	r *os.File
}

func (c readsFrom) Read(b []byte) (int, error)        { return c.r.Read(b) }
func (c readsFrom) SetReadDeadline(t time.Time) error { return c.r.SetReadDeadline(t) }

// TestLoadedLate: QEMU says that the devices are loaded while the server fails for
// another reason. For the race detector: the receiver is still at work then.
func TestLoadedLate(t *testing.T) {
	s := newSaved(t, tiertest.Options{Seed: 18, Blocks: threeBlocks}, 3, save.Options{})
	failure := errors.New("broken pipe")
	for range 20 {
		in, rp := io.Pipe()
		go rp.Write(returnpath.AppendPong(returnpath.AppendReqPages(nil, "pc.ram", 0, 4096), 3))
		writes := 0 // the first is the opening
		out := writerFunc(func(b []byte) (int, error) {
			if writes++; writes > 1 {
				return 0, failure
			}
			return len(b), nil
		})
		if _, err := lazy.Serve(t.Context(), s.ck, in, out, lazy.Options{}); !errors.Is(err, failure) {
			t.Fatal(err)
		}
		rp.Close()
	}
}

// TestZeroRest: with it every page comes, those without content last, and what is
// asked for meanwhile does not wait for them.
func TestZeroRest(t *testing.T) {
	s := newSaved(t, tiertest.Options{Seed: 26, Blocks: []tiertest.Block{{Name: "m", Size: 64 << 20}, {Name: "b", Size: 20 << 10}}, Mix: tiertest.Mix{200, 0, 0, 1}}, 5, save.Options{})
	synctest.Test(t, func(t *testing.T) {
		all := func() *fakeQEMU {
			d := newFakeQEMU(s)
			d.mayZeroAll()
			return d
		}
		content := 0
		for b := range s.Blocks() {
			for p := range s.Pages(b) {
				if s.page(tiertest.PageID{Block: b, Page: p}) != nil {
					content++
				}
			}
		}
		total := int(s.Pages(0) + s.Pages(1))

		d := all()
		var asked []tiertest.PageID
		var when []int
		d.afterPart = func(n int) {
			if len(d.order) < content+1000*(len(asked)+1) || len(asked) == 5 {
				return
			}
			id := tiertest.PageID{Block: 0, Page: s.Pages(0) - 1 - uint64(1000*len(asked))}
			asked, when = append(asked, id), append(when, d.sections)
			check(t, d.ask(id))
			synctest.Wait()
		}
		var last lazy.Progress
		rep := d.run(t, t.Context(), lazy.Serve, lazy.Options{ZeroRest: true, Progress: func(p lazy.Progress) { last = p }}).ok(t)
		if len(d.got) != total || rep.Pages != int64(total) || last.PagesAll != int64(total) {
			t.Errorf("%d of %d pages came, %+v, %+v", len(d.got), total, rep, last)
		}
		if min, max := total-content-8*len(asked), total-content; rep.ZeroRest < int64(min) || rep.ZeroRest > int64(max) {
			t.Errorf("%d pages were the rest, not %d to %d", rep.ZeroRest, min, max)
		}
		if len(asked) != 5 {
			t.Fatalf("asked for %d pages", len(asked))
		}
		for i, id := range asked {
			if _, section := d.position(id); section > when[i]+3 {
				t.Errorf("page %v, asked for after section %d, came in section %d", id, when[i], section)
			}
		}

		// After a recovery: only what QEMU does not have.
		d = all()
		had := 0
		for b := range s.Blocks() {
			m := make(map[uint64]bool)
			for p := uint64(0); p < s.Pages(b); p += 3 {
				m[p] = true
				had++
			}
			d.had = append(d.had, m)
		}
		rep = d.run(t, t.Context(), lazy.Recover, lazy.Options{ZeroRest: true}).ok(t)
		if len(d.got) != total || rep.Pages != int64(total-had) {
			t.Errorf("recovery: %d of %d pages are there, %d were: %+v", len(d.got), total, had, rep)
		}
	})
}

// TestZeroRestUnplugged: what a guest has not plugged in of a virtio-mem device does not
// come, although everything else does.
func TestZeroRestUnplugged(t *testing.T) {
	const hidden = 8 << 20
	device := tiertest.Block{Name: tiertest.EarlyDevice + "/vm0", Size: hidden + 1<<20, Shared: true}
	s := newSaved(t, tiertest.Options{Seed: 31, Early: 1, Blocks: []tiertest.Block{device, {Name: "m", Size: 1 << 20}}}, 3, save.Options{})
	synctest.Test(t, func(t *testing.T) {
		d := newFakeQEMU(s)
		d.mayZeroAll()
		var last lazy.Progress
		rep := d.run(t, t.Context(), lazy.Serve, lazy.Options{ZeroRest: true, Progress: func(p lazy.Progress) { last = p }}).ok(t)
		for id := range d.got {
			if id.Block == 0 && id.Page < hidden/4096 {
				t.Fatalf("page %d of the device's block came, which is not plugged in", id.Page)
			}
		}
		if want := int64(1<<20/4096 + 1<<20/4096); int64(len(d.got)) != want || last.PagesAll != want || rep.ZeroRest < 1<<20/4096 {
			t.Errorf("%d pages came, want %d; %+v, %+v", len(d.got), want, last, rep)
		}
	})
}

// TestBegin: nothing is read or written before Begin, and if it fails nothing at all.
func TestBegin(t *testing.T) {
	s := newSaved(t, tiertest.Options{Seed: 18, Blocks: threeBlocks}, 3, save.Options{})
	for name, serve := range map[string]server{"serve": lazy.Serve, "recover": lazy.Recover} {
		failure := errors.New("too late")
		var out bytes.Buffer
		_, err := serve(t.Context(), s.ck, nil, &out, lazy.Options{Begin: func() error { return failure }})
		if !errors.Is(err, failure) || out.Len() > 0 {
			t.Errorf("%s: %v, %d bytes written", name, err, out.Len())
		}
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(b []byte) (int, error) { return f(b) }

type failingWriter struct {
	left int
	err  error
}

func (w *failingWriter) Write(b []byte) (int, error) {
	if w.left -= len(b); w.left < 0 {
		return 0, w.err
	}
	return len(b), nil
}

func TestCancel(t *testing.T) {
	s := newSaved(t, tiertest.Options{Seed: 19, Blocks: threeBlocks}, 3, save.Options{})
	reason := errors.New("the user has had enough")
	for _, o := range []lazy.Options{{}, {HoldBackground: time.Hour}} {
		for _, after := range []int{1, 10, 40} {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancelCause(t.Context())
				d := newFakeQEMU(s)
				d.afterPart = func(n int) {
					if n == after {
						cancel(reason)
					}
				}
				if o.HoldBackground != 0 {
					time.AfterFunc(100*time.Millisecond, func() { cancel(reason) })
				}
				res := d.run(t, ctx, lazy.Serve, o)
				if !errors.Is(res.server, reason) || d.ended || !errors.Is(res.loaded, stream.ErrTruncated) {
					t.Errorf("cancelled after section %d: server %v, ended %v, %v", after, res.server, d.ended, res.loaded)
				}
				cancel(nil)
			})
		}
	}
}

// TestRecover goes on with any set of pages received, and the first server's
// requests still on their way.
func TestRecover(t *testing.T) {
	for _, tc := range shapes[:7] {
		t.Run(tc.name, func(t *testing.T) {
			s := newSaved(t, tc.o, tc.hot, tc.so)
			for round, share := range []float64{0, 0.01, 0.5, 0.99, 1} {
				synctest.Test(t, func(t *testing.T) {
					r := rand.New(rand.NewPCG(uint64(round), 4))
					d := newFakeQEMU(s)
					had := 0
					for b := range s.Blocks() {
						m := make(map[uint64]bool)
						for p := range s.Pages(b) {
							if r.Float64() < share {
								m[p] = true
								had++
							}
						}
						d.had = append(d.had, m)
					}
					d.onRun = func() {
						for range 20 {
							check(t, d.ask(s.random(r)))
						}
					}
					rep := d.run(t, t.Context(), lazy.Recover, lazy.Options{}).ok(t)
					if rep.Recovered != int64(had) || rep.Pages != int64(len(d.order)) || share == 1 && rep.Pages != 0 {
						t.Errorf("%d pages were there, %d came: %+v", had, len(d.order), rep)
					}
				})
			}
		})
	}
}

// TestRecoverRefused: answers to the handshake that are not QEMU's. A bitmap
// that is not the block's would make a page come twice.
func TestRecoverRefused(t *testing.T) {
	s := newSaved(t, tiertest.Options{Seed: 20, Blocks: threeBlocks[1:]}, 3, save.Options{})
	bitmap := func(b []byte, name string, pages uint64) []byte {
		return returnpath.AppendRecvBitmap(b, name, make([]byte, (pages+7)/8))
	}
	both := func(b []byte) []byte {
		return bitmap(bitmap(b, "pc.ram", s.Pages(0)), "pc.bios", s.Pages(1))
	}
	for name, tc := range map[string]struct {
		answer []byte
		says   string
	}{
		"other block":     {bitmap(nil, "pc.rom", 8), `"pc.rom"`},
		"wrong order":     {bitmap(nil, "pc.bios", s.Pages(1)), `"pc.bios"`},
		"too short":       {bitmap(nil, "pc.ram", 64), "bitmap of 8 bytes"},
		"too long":        {bitmap(nil, "pc.ram", s.Pages(0)+64), "bitmap of 136 bytes"},
		"another message": {returnpath.AppendPong(nil, 1), "PONG"},
		"ack too early":   {returnpath.AppendResumeAck(nil), "RESUME_ACK"},
		"no ack":          {both(nil), lazy.ErrGone.Error()},
		"a bitmap as ack": {bitmap(both(nil), "pc.ram", s.Pages(0)), "RECV_BITMAP"},
		"shut":            {returnpath.AppendShut(nil, 1), "SHUT"},
		"nothing":         {nil, lazy.ErrGone.Error()},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var out bytes.Buffer
				_, err := lazy.Recover(t.Context(), s.ck, bytes.NewReader(tc.answer), &out, lazy.Options{})
				if err == nil || !strings.Contains(err.Error(), tc.says) {
					t.Errorf("error %v does not say %q", err, tc.says)
				}
				if bytes.Contains(out.Bytes(), []byte("\x02\x00\x00\x00\x02")) {
					t.Error("a page was sent all the same")
				}
			})
		})
	}
	// Nor does one that says no more keep the server, which holds the checkpoint.
	for says, answer := range map[string][]byte{
		`RAM block "pc.ram"`:  nil,
		`RAM block "pc.bios"`: bitmap(nil, "pc.ram", s.Pages(0)),
		"RESUME_ACK":          both(nil),
	} {
		synctest.Test(t, func(t *testing.T) {
			in, rp := io.Pipe()
			defer rp.Close()
			go rp.Write(answer)
			limit, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			end := context.AfterFunc(limit, func() { rp.Close() })
			defer end()
			_, err := lazy.Recover(limit, s.ck, in, io.Discard, lazy.Options{LoadTime: 2 * time.Second})
			if !errors.Is(err, lazy.ErrNotLoaded) || !strings.Contains(err.Error(), says) {
				t.Errorf("a QEMU that says nothing: error %v does not say %q", err, says)
			}
		})
	}
	// Requests that were on their way are repeated after RESUME.
	answer := both(returnpath.AppendReqPages(nil, "pc.ram", 0, 4096))
	answer = returnpath.AppendReqPages(answer, "pc.ram", 4096, 4096)
	answer = returnpath.AppendResumeAck(answer)
	synctest.Test(t, func(t *testing.T) {
		in, rp := io.Pipe()
		go rp.Write(answer)
		if _, err := lazy.Recover(t.Context(), s.ck, in, io.Discard, lazy.Options{}); err != nil {
			t.Errorf("with a request before RESUME: %v", err)
		}
		rp.Close()
	})
}

// TestDamage changes a byte of every page's place in turn: the server ends with
// an error that names file, offset and page, and a wrong byte is never sent.
func TestDamage(t *testing.T) {
	s := newSaved(t, tiertest.Options{Seed: 21, Blocks: threeBlocks, Compress: 0.3}, 6, save.Options{})
	synctest.Test(t, func(t *testing.T) {
		files := []string{s.ck.Image.Name(), s.ck.Meta.NVRAM.Path}
		names := map[string]bool{}
		damage := func(t *testing.T, file string, at int64, d *fakeQEMU, o lazy.Options) {
			t.Helper()
			f, err := os.OpenFile(file, os.O_RDWR, 0)
			check(t, err)
			defer f.Close()
			b := make([]byte, 1)
			_, err = f.ReadAt(b, at)
			check(t, err)
			_, err = f.WriteAt([]byte{b[0] ^ 1}, at)
			check(t, err)
			res := d.run(t, t.Context(), lazy.Serve, o)
			_, err = f.WriteAt(b, at)
			check(t, err)
			if e := (*integrity.CorruptError)(nil); !errors.As(res.server, &e) || e.File != file || e.Offset > at || e.Offset < at-300<<10 {
				t.Fatalf("byte %d of %s damaged: %v", at, file, res.server)
			}
			if !strings.Contains(res.server.Error(), "page vga.vram:0x") && !strings.Contains(res.server.Error(), "page pc.ram:0x") &&
				!strings.Contains(res.server.Error(), "page pc.bios:0x") {
				t.Errorf("names no page: %v", res.server)
			}
			// load has compared every page that came.
			if d.ended || !errors.Is(res.loaded, stream.ErrTruncated) {
				t.Fatalf("byte %d of %s damaged: the destination: ended %v, %v", at, file, d.ended, res.loaded)
			}
			names[file] = true
		}
		for n := range uint32(s.ck.Image.Segments()) {
			if off := s.ck.Image.SegmentOffset(n); off >= 0 {
				damage(t, files[0], off+image.FrameHeaderLen+77, newFakeQEMU(s), lazy.Options{})
			}
		}
		// An NVRAM page lies wherever its extent is: found by its content.
		nv, err := os.ReadFile(files[1])
		check(t, err)
		tried := 0
		for b := range s.Blocks() {
			for p := range s.Pages(b) {
				id := tiertest.PageID{Block: b, Page: p}
				run, err := s.ck.PageMap.Find(b, p)
				check(t, err)
				content := s.page(id)
				if run.Kind != pagemap.NVRAM || p%25 != 0 || content == nil || bytes.Count(nv, content) != 1 {
					continue
				}
				tried++
				at := int64(bytes.Index(nv, content))
				damage(t, files[1], at+100, newFakeQEMU(s), lazy.Options{})
				// The same when it is asked for or was learned.
				d := newFakeQEMU(s)
				d.onRun = func() { check(t, d.ask(id)); synctest.Wait() }
				damage(t, files[1], at+4095, d, lazy.Options{})
				if d.got[id] {
					t.Errorf("damaged page %v was sent", id)
				}
				damage(t, files[1], at, newFakeQEMU(s), lazy.Options{First: list([]workingset.PageRun{{Block: b, Page: p, Count: 1}})})
			}
		}
		if tried < 5 || len(names) != 2 {
			t.Fatalf("%d NVRAM pages tried, files %v", tried, names)
		}
		// And none of this has changed anything.
		newFakeQEMU(s).run(t, t.Context(), lazy.Serve, lazy.Options{}).ok(t)
	})
}

// TestNotPossible: checkpoints that can't be played to postcopy are refused
// before the first byte.
func TestNotPossible(t *testing.T) {
	for _, tc := range []struct {
		o    tiertest.Options
		says string
	}{
		{tiertest.Options{Unknown: tiertest.Record}, "without being understood"},
		{tiertest.Options{DirtyBitmap: true}, `"dirty-bitmap" section`},
		{tiertest.Options{IgnoreShared: true}, "x-ignore-shared"},
		{tiertest.Options{PageSize: 16384, PageBits: true}, "16384"},
		{tiertest.Options{NoConfiguration: true}, "footers"},
		{tiertest.Options{Blocks: []tiertest.Block{{Name: "huge", Size: 4 << 20, HostPage: 2 << 20}}, Advise: true}, `"huge" has pages of 2097152`},
	} {
		s := newSaved(t, tc.o, 0, save.Options{})
		for name, serve := range map[string]server{"serve": lazy.Serve, "recover": lazy.Recover} {
			var out bytes.Buffer
			_, err := serve(t.Context(), s.ck, bytes.NewReader(nil), &out, lazy.Options{})
			if !errors.Is(err, lazy.ErrNotPossible) || !strings.Contains(err.Error(), tc.says) || out.Len() != 0 {
				t.Errorf("%s: %v, not %q; %d bytes written", name, err, tc.says, out.Len())
			}
		}
	}
}

func TestProgress(t *testing.T) {
	s := newSaved(t, tiertest.Options{Seed: 22, Blocks: threeBlocks}, 3, save.Options{})
	synctest.Test(t, func(t *testing.T) {
		var seen []lazy.Progress
		d := newFakeQEMU(s)
		d.loading = true
		d.onRun = func() { time.Sleep(time.Millisecond); d.pong() }
		d.afterPart = func(int) { time.Sleep(20 * time.Millisecond) }
		rep := d.run(t, t.Context(), lazy.Serve, lazy.Options{
			Begin:    func() error { time.Sleep(time.Millisecond); return nil },
			Progress: func(p lazy.Progress) { seen = append(seen, p) },
		}).ok(t)
		if len(seen) < 2 {
			t.Fatalf("%d calls", len(seen))
		}
		for i, p := range seen {
			if !p.Running || p.Pages > p.PagesAll || i > 0 && p.Pages < seen[i-1].Pages {
				t.Errorf("call %d: %+v", i, p)
			}
		}
		if last := seen[len(seen)-1]; last.PagesAll < rep.Pages || rep.Opening != time.Millisecond || rep.Loaded != 2*time.Millisecond || rep.Hot <= rep.Loaded || rep.Resident <= rep.Hot {
			t.Errorf("%+v after %+v", rep, last)
		}
	})
}

// fuzzed are the parts of FuzzServe and FuzzRecover that are made once.
func fuzzed(f *testing.F) (*saved, [][]byte) {
	s := newSaved(f, tiertest.Options{Seed: 23, Blocks: []tiertest.Block{{Name: "a", Size: 128 << 10}, {Name: "b", Size: 12 << 10}}, Fill: true}, 4, save.Options{})
	b := returnpath.AppendReqPages(nil, "a", 0x3000, 4096)
	b = returnpath.AppendReqPages(b, "", 0x4000, 4096)
	b = returnpath.AppendReqPages(b, "b", 0, 4096)
	resumed := returnpath.AppendRecvBitmap(nil, "a", []byte{0xff, 1, 0x80, 0})
	resumed = returnpath.AppendRecvBitmap(resumed, "b", []byte{0xff})
	resumed = returnpath.AppendResumeAck(resumed)
	return s, [][]byte{b, append(bytes.Clone(b), b...), returnpath.AppendShut(b, 0), returnpath.AppendShut(nil, 1), resumed, append(bytes.Clone(resumed), b...)}
}

// lasting is a return path that stays open when all of it has been read.
type lasting struct {
	io.Reader
	end chan struct{}
}

func (l lasting) Read(b []byte) (int, error) {
	n, err := l.Reader.Read(b)
	if err == io.EOF {
		<-l.end
	}
	return n, err
}

// FuzzServe: whatever QEMU says, what is sent keeps to the rules.
func FuzzServe(f *testing.F) {
	s, seeds := fuzzed(f)
	for _, b := range seeds {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		in := lasting{bytes.NewReader(append(returnpath.AppendPong(nil, 3), b...)), make(chan struct{})}
		defer close(in.end)
		var out bytes.Buffer
		_, err := lazy.Serve(t.Context(), s.ck, in, &out, lazy.Options{})
		d := newFakeQEMU(s)
		d.mayZeroAll()
		d.loading = true // the PONG has been said
		loaded := d.load(&out)
		if err == nil && loaded != nil || err != nil && !errors.Is(loaded, stream.ErrTruncated) {
			t.Errorf("server: %v; destination: %v", err, loaded)
		}
	})
}

// FuzzRecover: the same for a handshake, whose bitmaps are QEMU's word.
func FuzzRecover(f *testing.F) {
	s, seeds := fuzzed(f)
	for _, b := range seeds {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		in := lasting{bytes.NewReader(b), make(chan struct{})}
		time.AfterFunc(50*time.Millisecond, func() { close(in.end) })
		var out bytes.Buffer
		rep, err := lazy.Recover(t.Context(), s.ck, in, &out, lazy.Options{})
		if err == nil && rep.Recovered+rep.Pages > 35 {
			t.Errorf("%d pages received, %d sent, there are 35", rep.Recovered, rep.Pages)
		}
		if !bytes.HasPrefix(out.Bytes(), []byte("\x08\x00\x0a\x00\x02\x01a")) {
			t.Errorf("begins with % x", out.Bytes()[:min(20, out.Len())])
		}
		_ = fmt.Sprint(err) // may quote anything
	})
}

// TestPanic has what a lazy restore calls panic: its output in the opening's and in the pump's
// goroutine, the return path in the receiver's, the list of first pages in the loader's,
// progress in the pump's. The panic is the restore's error, and not the process's end, which
// would leave the guest waiting for pages without a word.
func TestPanic(t *testing.T) {
	s := newSaved(t, tiertest.Options{Seed: 31, Blocks: threeBlocks[1:]}, 3, save.Options{})
	calls := 0
	for name, tc := range map[string]struct {
		o       lazy.Options
		in, out func()
	}{
		"list":        {o: lazy.Options{First: func() []workingset.PageRun { panic("bomb") }}},
		"progress":    {o: lazy.Options{Progress: func(p lazy.Progress) { panic("bomb") }}},
		"return path": {in: func() { panic("bomb") }},
		"output": {out: func() {
			if calls++; calls > 4 {
				panic("bomb")
			}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			serve := func(ctx context.Context, c *checkpoint.Checkpoint, in io.Reader, out io.Writer, o lazy.Options) (rep *lazy.Report, err error) {
				defer in.(io.Closer).Close() // as by the end of the process
				err = rescue.Call(func() error {
					rep, err = lazy.Serve(ctx, c, calling{in, out, tc.in}, calling{in, out, tc.out}, o)
					return err
				})
				return rep, err
			}
			res := newFakeQEMU(s).run(t, t.Context(), serve, tc.o)
			var bug *rescue.Error
			if !errors.As(res.server, &bug) || bug.Value != "bomb" {
				t.Errorf("the server's error is %v", res.server)
			}
		})
	}
}

// calling calls fn, which may be nil, before each read and write.
type calling struct {
	io.Reader
	io.Writer
	fn func()
}

func (c calling) Read(b []byte) (int, error) {
	if c.fn != nil {
		c.fn()
	}
	return c.Reader.Read(b)
}

func (c calling) Write(b []byte) (int, error) {
	if c.fn != nil {
		c.fn()
	}
	return c.Writer.Write(b)
}
