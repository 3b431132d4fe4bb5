package tier_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"testing"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/vfs/crashfs"
)

// generation is a guest after so many rounds of changes.
func generation(o tiertest.Options, n int) *tiertest.Stream {
	o.Passes, o.Resend = n, 0.2
	return tiertest.New(o)
}

// TestIncremental saves guests that go on from one checkpoint to the next, of all
// shapes: what is restored is what was saved, whichever checkpoint has the bytes.
func TestIncremental(t *testing.T) {
	blocks := []tiertest.Block{{Name: "pc.ram", Size: 1 << 20}, {Name: "rom", Size: 40 << 10}}
	for name, o := range map[string]tiertest.Options{
		"plain":      {Seed: 1, Blocks: blocks},
		"live":       {Seed: 2, Blocks: blocks, XBZRLE: true, Shuffle: true},
		"compressed": {Seed: 3, Blocks: blocks, Compress: 0.4, Fill: true},
		"1 KiB":      {Seed: 4, Blocks: blocks, PageSize: 1 << 10, PageBits: true, XBZRLE: true},
		"16 KiB":     {Seed: 5, Blocks: []tiertest.Block{{Name: "ram", Size: 4 << 20}}, PageSize: 16 << 10, Advise: true},
	} {
		for _, hot := range []uint64{0, 3} {
			for _, energy := range energies() {
				t.Run(fmt.Sprint(name, hot, energy), func(t *testing.T) {
					t.Parallel()
					l := newLab(t, crashfs.New(0), "/")
					saved := map[store.Ref]*tiertest.Stream{}
					for n := 1; n <= 6; n++ {
						s := generation(o, n)
						so := save.Options{Energy: energy, SegmentPages: 5 + n, Codec: image.Codec(n % 4)}
						if hot > 0 {
							// Not the same pages each time.
							so.WorkingSet, so.NVRAMSize = hotSet(t, s, every(hot+uint64(n%2))), 4<<20
						}
						ref, meta := l.save(t, s, so)
						saved[ref] = s
						r := meta.Report
						if n == 1 {
							if r.Parent != "" || r.Unchanged+r.Delta != 0 {
								t.Errorf("the first has parent %q: %+v", r.Parent, r)
							}
							continue
						}
						if want := fmt.Sprint("vm@", n-1); r.Parent != want || r.Unchanged == 0 || r.Delta == 0 && hot == 0 || r.Delta > 0 && r.DeltaBytes == 0 || len(meta.References) == 0 {
							t.Errorf("%v: parent %q, %d unchanged, %d deltas of %d bytes, %d references", ref, r.Parent, r.Unchanged, r.Delta, r.DeltaBytes, len(meta.References))
						}
						if pages := r.Zero + r.Hot + r.Cold + r.Unchanged + r.Delta; name == "plain" && pages != r.Pages {
							t.Errorf("%v: %d pages of %d are counted: %+v", ref, pages, r.Pages, r)
						}
					}
					for ref, s := range saved {
						l.holds(t, ref, s)
					}
					l.noLeaks(t)
				})
			}
		}
	}
}

// TestMoved saves guests in which pages are elsewhere than before, and in which bytes are
// elsewhere in pages, of all shapes: the first cost an entry each, and the others are
// pieces. A page that comes again while it waits for others is what came last.
func TestMoved(t *testing.T) {
	blocks := []tiertest.Block{{Name: "pc.ram", Size: 1 << 20}, {Name: "rom", Size: 40 << 10}}
	mix := tiertest.Mix{tiertest.Zero: 1, tiertest.Random: 6, tiertest.Text: 3}
	for name, o := range map[string]tiertest.Options{
		"plain":      {Seed: 1, Blocks: blocks},
		"live":       {Seed: 2, Blocks: blocks, XBZRLE: true, Shuffle: true, Passes: 3, Resend: 0.3},
		"compressed": {Seed: 3, Blocks: blocks, Compress: 0.2},
		"1 KiB":      {Seed: 4, Blocks: blocks, PageSize: 1 << 10, PageBits: true, XBZRLE: true, Passes: 2, Resend: 0.1},
		"64 KiB":     {Seed: 5, Blocks: []tiertest.Block{{Name: "ram", Size: 8 << 20}}, PageSize: 64 << 10, Advise: true},
	} {
		o.Mix = mix
		for _, hot := range []uint64{0, 5} {
			for _, energy := range energies() {
				t.Run(fmt.Sprint(name, hot, energy), func(t *testing.T) {
					t.Parallel()
					o := o // it is changed below
					l := newLab(t, crashfs.New(0), "/")
					saved := map[store.Ref]*tiertest.Stream{}
					for n, c := range []struct {
						move  uint64
						slide int
					}{{0, 0}, {9, 0}, {9, 13}, {30, 20}, {30, 20}, {3, 100}} {
						o.Move, o.Slide = c.move, c.slide
						s := tiertest.New(o)
						so := save.Options{Energy: energy, SegmentPages: 5 + n, Codec: image.Codec(n % 4)}
						if hot > 0 {
							so.WorkingSet, so.NVRAMSize = hotSet(t, s, every(hot+uint64(n%2))), 4<<20
						}
						ref, meta := l.save(t, s, so)
						saved[ref] = s
						r := meta.Report
						if (n == 1) && r.Moved <= r.Pages/5 || (n == 2 || n == 3 || n == 5) && r.Similar <= r.Pages/5 || (n == 0 || n == 4) && r.Similar > 0 || n == 0 && r.Moved > 0 || n == 4 && r.Moved > r.Pages/20 {
							t.Errorf("%v: %d unchanged, %d of them moved, %d deltas, %d of them similar, %d cold", ref, r.Unchanged, r.Moved, r.Delta, r.Similar, r.Cold)
						}
					}
					for ref, s := range saved {
						l.holds(t, ref, s)
					}
					l.noLeaks(t)
				})
			}
		}
	}
}

// TestMovedMany saves a guest of which more has moved than waits at one time, and one
// that has nothing in common with the one before, for which that is no gain.
func TestMovedMany(t *testing.T) {
	l := newLab(t, crashfs.New(0), "/")
	o := tiertest.Options{Seed: 1, Blocks: []tiertest.Block{{Name: "pc.ram", Size: 40 << 20}}, Mix: tiertest.Mix{tiertest.Random: 1}}
	for n, c := range []struct {
		seed, move uint64
		slide      int
	}{{1, 0, 0}, {1, 600, 0}, {1, 600, 24}, {2, 0, 0}} {
		o.Seed, o.Move, o.Slide = c.seed, c.move, c.slide
		s := tiertest.New(o)
		ref, meta := l.save(t, s, save.Options{})
		if r := meta.Report; (n == 1) != (r.Moved > r.Pages*9/10) || (n == 2) != (r.Similar > r.Pages*9/10) {
			t.Errorf("%v: %d moved, %d similar", ref, r.Moved, r.Similar)
		}
		l.holds(t, ref, s)
	}
	l.noLeaks(t)
}

// TestUnchanged saves a guest twice that has done nothing: the second costs its page
// map, skeleton and descriptions.
func TestUnchanged(t *testing.T) {
	l := newLab(t, crashfs.New(0), "/")
	s := tiertest.New(tiertest.Options{Blocks: []tiertest.Block{{Name: "ram", Size: 8 << 20}}})
	_, first := l.save(t, s, save.Options{})
	for range 3 {
		ref, meta := l.save(t, s, save.Options{})
		if r := meta.Report; r.Cold+r.Hot+r.Delta+r.Duplicate != 0 || r.Unchanged != first.Report.Cold || r.FlashBytes > first.Report.FlashBytes/100 || len(meta.References) != 1 {
			t.Errorf("%+v, %d references", r, len(meta.References))
		}
		l.holds(t, ref, s)
	}
	// One that refers to nothing any more has no parent to speak of.
	last := store.Ref{VM: "vm", N: 4}
	if _, meta, err := l.flatten(last); err != nil || meta.Report.Parent != "" || meta.Report.Cold != first.Report.Cold {
		t.Errorf("flattened: %+v, %v", meta, err)
	}
	l.holds(t, last, s)
}

// TestParent asks for parents by name, and for none.
func TestParent(t *testing.T) {
	l := newLab(t, crashfs.New(0), "/")
	o := tiertest.Options{Seed: 1}
	s := generation(o, 2)
	l.save(t, generation(o, 1), save.Options{})                        // vm@1
	l.save(t, tiertest.New(tiertest.Options{Seed: 9}), save.Options{}) // vm@2, quite another
	for _, c := range []struct{ vm, parent, want string }{
		{"vm", "vm@1", "vm@1"}, {"vm", save.ParentNone, ""}, {"vm", save.ParentAuto, "vm@4"}, {"vm", "", "vm@5"}, {"other", "vm@1", "vm@1"},
	} {
		ref, meta := l.save(t, s, save.Options{VM: c.vm, Parent: c.parent})
		if r := meta.Report; r.Parent != c.want || (r.Unchanged > 0) != (c.want != "") {
			t.Errorf("parent %q: %q, %d unchanged", c.parent, r.Parent, r.Unchanged)
		}
		l.holds(t, ref, s)
	}
	for parent, want := range map[string]error{"vm@77": store.ErrNotFound, "nobody@1": store.ErrNotFound, "vm@x": store.ErrName} {
		if _, _, err := l.trySave(s, save.Options{Parent: parent}); !errors.Is(err, want) {
			t.Errorf("parent %s: %v", parent, err)
		}
	}
	// A guest with other pages, as after a change of architecture.
	other := tiertest.New(tiertest.Options{PageSize: 16 << 10, PageBits: true})
	var log bytes.Buffer
	ref, meta := l.save(t, other, save.Options{Log: slog.New(slog.NewTextHandler(&log, nil))})
	if meta.Report.Unchanged != 0 || !bytes.Contains(log.Bytes(), []byte("pages of 4096 bytes")) {
		t.Errorf("%+v, %s", meta.Report, log.String())
	}
	l.holds(t, ref, other)
	// An image outside of a store refers to nothing.
	f, err := l.fs.Create("/alone")
	if err != nil {
		t.Fatal(err)
	}
	if meta, err := save.To(t.Context(), l.fs, nil, store.BeginFile(f), s.Reader(), save.Options{VM: "vm"}); err != nil || len(meta.References) != 0 || meta.Digests != nil {
		t.Errorf("%+v, %v", meta, err)
	}
	f.Close()
	l.noLeaks(t)
}

// TestDamagedParent flips a bit of each frame of the newest checkpoint and of the one
// that it refers to, and saves: that never fails. What is saved is what came; where it
// refers to damaged bytes, a restore says so, and is right again when they are.
func TestDamagedParent(t *testing.T) {
	l := newLab(t, crashfs.New(0), "/")
	o := tiertest.Options{Seed: 1, Blocks: []tiertest.Block{{Name: "ram", Size: 512 << 10}}}
	so := save.Options{SegmentPages: 8, Parent: save.ParentAuto}
	l.save(t, generation(o, 1), so)
	l.save(t, generation(o, 3), so)
	s := generation(o, 4)
	want := s.ExpectedBytes()
	var warned, referred int
	for n := 1; n <= 2; n++ {
		d := &damaged{lab: l, ref: store.Ref{VM: "vm", N: n}}
		for i, at := range d.units(t) {
			for _, off := range []int64{at, at + int64(image.FrameHeaderLen) + int64(i%5)} {
				back := d.flip(t, d.image(), off, i%8)
				var log bytes.Buffer
				so.Log = slog.New(slog.NewTextHandler(&log, nil))
				ref, _, err := l.trySave(s, so)
				if err != nil {
					t.Fatalf("byte %d of %v: %v", off, d.ref, err)
				}
				if log.Len() > 0 {
					warned++
				}
				var got bytes.Buffer
				if err := l.restore(ref, &got); err == nil && !bytes.Equal(got.Bytes(), want) {
					t.Fatalf("byte %d of %v: another stream is restored", off, d.ref)
				} else if err != nil {
					if referred++; !integrity.IsCorrupt(err) || !bytes.HasPrefix(want, got.Bytes()) {
						t.Errorf("byte %d of %v: %v", off, d.ref, err)
					}
				}
				back()
				l.holds(t, ref, s)
				if err := l.remove(ref); err != nil {
					t.Fatal(err)
				}
				if t.Failed() {
					t.Fatalf("byte %d of %v: %s", off, d.ref, log.String())
				}
			}
		}
	}
	if warned < 10 || referred < 3 {
		t.Errorf("%d saves warned, %d restores failed", warned, referred)
	}
	l.noLeaks(t)
}

// TestSparse has a guest change for long: what little is left in use of a segment is
// stored again, and a checkpoint refers to no more than 48 others.
func TestSparse(t *testing.T) {
	l := newLab(t, crashfs.New(0), "/")
	o := tiertest.Options{Seed: 3, Blocks: []tiertest.Block{{Name: "ram", Size: 1 << 20}}, Mix: tiertest.Mix{tiertest.Text: 1, tiertest.Random: 1}}
	const rounds = 60
	so := save.Options{SegmentPages: 8}
	var last *tiertest.Stream
	var ref store.Ref
	for n := range rounds {
		o.Passes, o.Resend = 1+n, 0.02
		last = tiertest.New(o)
		// Only what the guest has in the end counts.
		r := last.Expected()
		var err error
		var meta *checkpoint.Meta
		ref, meta, err = l.run(context.Background(), io.Reader(r), save.Options{VM: "vm", SegmentPages: so.SegmentPages})
		r.Close()
		if err != nil {
			t.Fatal(err)
		}
		if len(meta.References) > 48 {
			t.Fatalf("%v refers to %d others", ref, len(meta.References))
		}
	}
	l.holds(t, ref, last)
	c, err := l.st.OpenCheckpoint(t.Context(), ref, checkpoint.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var segments, refs int
	for _, r := range c.References() {
		segments += int(r.NeedSegments.Count())
		refs++
	}
	// 256 pages in segments of 8 are 32 of them if all are full; of each at least one
	// page is in use.
	if refs < 10 || segments > 256 {
		t.Errorf("%d segments of %d references", segments, refs)
	}
	t.Logf("%d segments of %d references", segments, refs)
}
