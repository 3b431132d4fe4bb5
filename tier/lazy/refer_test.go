package lazy_test

import (
	"context"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/lazy"
	"github.com/flic-migrate/flic-migrate/tier/pagemap"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/tiertest/chain"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
	"github.com/flic-migrate/flic-migrate/tier/workingset"
)

// newChained is the last of three checkpoints, with pages of all kinds in all of them.
func newChained(t testing.TB, seed uint64, codec image.Codec) *saved {
	t.Helper()
	s := &saved{dir: t.TempDir()}
	var err error
	s.st, err = store.Open(context.Background(), vfs.OS, filepath.Join(s.dir, "store"), true)
	check(t, err)
	var streams []tiertest.Options
	for i := range 3 {
		streams = append(streams, tiertest.Options{Seed: seed, Blocks: threeBlocks, Passes: i + 1, Resend: 0.3, Fill: true})
	}
	list := chain.Build(t, s.st, chain.Options{Seed: seed, Streams: streams, Codec: codec, NVRAM: filepath.Join(s.dir, "nvram"), Deltas: 0.9, Scattered: 0.1})
	s.Stream = list[2].Stream
	s.ck = s.open(t)
	return s
}

// TestReferences serves a checkpoint whose pages are in others, with demands at random
// moments; fakeQEMU compares each page.
func TestReferences(t *testing.T) {
	s := newChained(t, 31, image.MinLZ)
	for round := range uint64(4) {
		synctest.Test(t, func(t *testing.T) {
			r := rand.New(rand.NewPCG(round, 2))
			d := newFakeQEMU(s)
			ask := func(n int) {
				for range n {
					check(t, d.ask(s.random(r)))
				}
			}
			d.onRun = func() { ask(int(round) * 10) }
			d.afterPart = func(int) {
				if round > 0 && r.IntN(3) == 0 {
					ask(1 + r.IntN(3))
				}
			}
			rep := d.run(t, t.Context(), lazy.Serve, lazy.Options{}).ok(t)
			saved := s.ck.Meta.Report
			if all := saved.Hot + saved.Cold + saved.Delta + saved.Unchanged; !d.ended || rep.Pages < all || saved.Unchanged == 0 || saved.Delta == 0 {
				t.Errorf("%d pages of %d came, of %+v", rep.Pages, all, saved)
			}
			// It has read what the page map says that it must.
			if want, err := s.ck.Sources().Reads(s.ck.PageMap); err != nil || rep.Reads.Places != want.Places || rep.Reads.Bytes < want.Bytes || want.Places == 0 {
				t.Errorf("%+v was read, in place of %+v, %v", rep.Reads, want, err)
			}
			// What was in NVRAM comes first, whosever it was.
			if round > 0 {
				return
			}
			hot := 0
			for i, a := range d.order {
				run, err := s.ck.PageMap.Find(a.Block, a.Page)
				check(t, err)
				if k := run.Kind; k == pagemap.NVRAM || k == pagemap.ForeignNVRAM {
					if hot++; int64(i) > rep.HotPages {
						t.Errorf("page %v, which is %v, comes as number %d, behind the %d hot ones", a.PageID, k, i, rep.HotPages)
						break
					}
				}
			}
			if hot == 0 {
				t.Error("no page is in NVRAM")
			}
		})
	}
}

// TestReferenceDamaged: a page that is damaged in another checkpoint's image is refused
// by name, and none of what it gives comes.
func TestReferenceDamaged(t *testing.T) {
	s := newChained(t, 32, image.None)
	refs, err := checkpoint.ReferencesOf(s.ck.Image)
	check(t, err)
	name := filepath.Join(s.dir, "store/vms/vm/00000001.flic")
	f, err := vfs.OS.OpenRW(name)
	check(t, err)
	defer f.Close()
	im, err := image.Open(f)
	check(t, err)
	var ref int
	for refs[ref].UUID != im.UUID {
		ref++
	}
	needed := refs[ref].NeedSegments[0].First
	var b [1]byte
	at := im.SegmentOffset(needed) + image.FrameHeaderLen + 100
	_, err = f.ReadAt(b[:], at)
	check(t, err)
	b[0]++
	_, err = f.WriteAt(b[:], at)
	check(t, err)
	synctest.Test(t, func(t *testing.T) {
		d := newFakeQEMU(s)
		res := d.run(t, t.Context(), lazy.Serve, lazy.Options{})
		if !integrity.IsCorrupt(res.server) || !strings.Contains(res.server.Error(), "00000001.flic: offset") || !strings.Contains(res.server.Error(), "page ") || d.ended {
			t.Errorf("%v", res.server)
		}
	})
}

// TestIncrements serves what saves really write: the third of three checkpoints of a guest
// that goes on running, each of which refers to the one before, with a part in NVRAM.
func TestIncrements(t *testing.T) {
	o := tiertest.Options{Seed: 33, Blocks: threeBlocks, Fill: true, Resend: 0.3}
	s := newSaved(t, o, 5, save.Options{})
	for passes := 2; passes <= 3; passes++ {
		o.Passes = passes
		s.Stream = tiertest.New(o)
		so := save.Options{VM: "vm", NVRAM: filepath.Join(s.dir, "nvram"), VolatileNVRAM: true}
		var err error
		so.WorkingSet, err = workingset.New(s.PageSize(), s.blocks())
		check(t, err)
		for b := range s.Blocks() {
			for p := uint64(0); p < s.Pages(b); p += 5 {
				so.WorkingSet.SetHeat(b, int64(p), 1)
			}
		}
		r := s.Reader()
		_, _, err = save.Run(context.Background(), vfs.OS, s.st, r, so)
		r.Close()
		check(t, err)
	}
	s.ck = s.open(t)
	if rep := s.ck.Meta.Report; rep.Unchanged == 0 || len(s.ck.Meta.References) == 0 {
		t.Fatalf("it refers to %v: %+v", s.ck.Meta.References, rep)
	}
	for round := range uint64(3) {
		synctest.Test(t, func(t *testing.T) {
			r := rand.New(rand.NewPCG(round, 3))
			d := newFakeQEMU(s)
			d.afterPart = func(int) {
				if round > 0 && r.IntN(3) == 0 {
					check(t, d.ask(s.random(r)))
				}
			}
			d.run(t, t.Context(), lazy.Serve, lazy.Options{}).ok(t)
		})
	}
}

// TestMoved serves checkpoints whose hot pages have been moved from NVRAM to flash, their
// own and those of a checkpoint that they refer to, with demands at random moments. The
// NVRAM file is not there any more.
func TestMoved(t *testing.T) {
	o := tiertest.Options{Seed: 41, Blocks: threeBlocks, Passes: 1, Resend: 0.3}
	s := newSaved(t, o, 3, save.Options{SegmentPages: 8})
	again := func(o tiertest.Options, so save.Options) *tiertest.Stream {
		t.Helper()
		stream := tiertest.New(o)
		r := stream.Reader()
		defer r.Close()
		so.VM = "vm"
		_, _, err := save.Run(t.Context(), vfs.OS, s.st, r, so)
		check(t, err)
		return stream
	}
	o.Passes = 2
	second := again(o, save.Options{})
	again(o, save.Options{Parent: save.ParentNone})
	d, err := s.st.Demote(t.Context(), 1)
	check(t, err)
	check(t, d.Left)
	if d.Images != 1 || d.NVRAMBytes != 0 { // s has it open
		t.Fatalf("%+v", d)
	}
	check(t, os.Remove(filepath.Join(s.dir, "nvram")))
	for n, stream := range map[int]*tiertest.Stream{1: s.Stream, 2: second} {
		c, err := s.st.OpenCheckpoint(t.Context(), store.Ref{VM: "vm", N: n}, checkpoint.Options{})
		check(t, err)
		at := &saved{Stream: stream, dir: s.dir, st: s.st, ck: c.Checkpoint}
		for round := range uint64(3) {
			synctest.Test(t, func(t *testing.T) {
				r := rand.New(rand.NewPCG(round, 3))
				d := newFakeQEMU(at)
				d.afterPart = func(int) {
					if round > 0 && r.IntN(3) == 0 {
						check(t, d.ask(at.random(r)))
					}
				}
				if rep := d.run(t, t.Context(), lazy.Serve, lazy.Options{}).ok(t); !d.ended || rep.HotPages == 0 {
					t.Errorf("vm@%d: %+v", n, rep)
				}
			})
		}
		check(t, c.Close())
	}
}
