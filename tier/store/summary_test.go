package store

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
	"github.com/flic-migrate/flic-migrate/tier/vfs/crashfs"
)

// chained is a store with so many checkpoints of VM "vm", each of which refers to some of
// those before it, as increments do. Each is summarized as a save does it.
func chained(t testing.TB, fsys vfs.FS, dir string, n int) *Store {
	t.Helper()
	s, err := Open(t.Context(), fsys, dir, true)
	if err != nil {
		t.Fatal(err)
	}
	grow(t, s, n)
	return s
}

// grow makes so many checkpoints more.
func grow(t testing.TB, s *Store, n int) {
	t.Helper()
	var ids []uuid.UUID
	list, err := s.Identities(t.Context(), "vm")
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range list {
		ids = append(ids, l.Identity.UUID)
	}
	for range n {
		last := ids[max(0, len(ids)-8):]
		r := refer(t, s, "vm", slices.Clone(last)...)
		id, _, err := s.identity(t.Context(), r)
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, id.UUID)
		s.Summarize(t.Context(), r)
	}
}

// TestReadsOfOne bounds what list, rm and gc read of a VM with 1000 checkpoints: not the
// others' images, but for those that refer to what is removed. Each looks at each file once,
// and lists the folder a second time at most.
func TestReadsOfOne(t *testing.T) {
	const n = 1000
	c := newReadCounter(crashfs.New(0))
	c.removed = true
	s := chained(t, c, "/store", n)
	time.Sleep(2 * youngFile)
	// A save now and then brings the summary up to date, and so does this.
	s.summarize(t.Context(), "vm")
	expect := func(what string, opens, listed, looks int64) {
		t.Helper()
		if c.listed.Load() > listed || c.looks.Load() > looks {
			t.Errorf("%s of %d listed the folder %d times, and looked at %d files; at most %d and %d", what, n, c.listed.Load(), c.looks.Load(), listed, looks)
		}
		if c.opens.Load() > opens {
			t.Errorf("%s of %d opened %d images and read %d times, %d bytes; at most %d", what, n, c.opens.Load(), c.reads.Load(), c.bytes.Load(), opens)
		}
		c.reset()
	}
	c.reset()
	if list, err := s.Identities(t.Context(), "vm"); err != nil || len(list) != n {
		t.Fatalf("%d checkpoints, %v", len(list), err)
	}
	expect("list", 0, 1, n)
	// Eight refer to it: they are looked up, and their REFERENCES read.
	if rm, err := s.Remove(t.Context(), Ref{"vm", n / 2}); err != nil || rm.Left != nil || len(rm.Kept) != 8 {
		t.Fatalf("%+v, %v", rm, err)
	}
	expect("rm", 40, 2, n+10)
	if rm, err := s.Remove(t.Context(), Ref{"vm", n}); err != nil || rm.Left != nil || len(rm.Kept) != 0 {
		t.Fatalf("%+v, %v", rm, err)
	}
	expect("rm of the newest", 10, 2, n+10)
	if rep, err := s.GC(t.Context()); err != nil || len(rep.Warnings) > 0 {
		t.Fatalf("%+v, %v", rep, err)
	}
	expect("gc", 30, 2, n+10)
	// The next save finds its number, and opens the one before.
	grow(t, s, 1)
	expect("the next one", 30, 10, 3*n)
}

// TestSummaryIsNoMore has summaries that are old, damaged, another's or no summaries at
// all: nothing that anybody says depends on them.
func TestSummaryIsNoMore(t *testing.T) {
	disk := crashfs.New(0)
	s := chained(t, disk, "/store", 40)
	time.Sleep(2 * youngFile)
	s.summarize(t.Context(), "vm")
	good, err := vfs.ReadFile(disk, "/store/summaries/vm", maxSummary)
	if err != nil {
		t.Fatal(err)
	}
	if entries, err := parseSummary(good); err != nil || len(entries) != 40 {
		t.Fatalf("%d entries, %v", len(entries), err)
	}
	if err := disk.Remove("/store/summaries/vm"); err != nil {
		t.Fatal(err)
	}
	want, err := s.Identities(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	check := func(what string) {
		t.Helper()
		got, err := s.Identities(t.Context(), "")
		if err != nil || len(got) != len(want) {
			t.Fatalf("%s: %d checkpoints, %v", what, len(got), err)
		}
		for i := range got {
			g, w := got[i], want[i]
			if g.Ref != w.Ref || g.ImageBytes != w.ImageBytes || g.Err != nil || !sameIdentity(t, g.Identity, w.Identity) {
				t.Fatalf("%s: %+v in place of %+v", what, g, w)
			}
		}
	}
	rng := rand.New(rand.NewPCG(3, 4))
	for i := range 300 {
		b := bytes.Clone(good)
		switch i % 4 {
		case 0:
			b = b[:rng.IntN(len(b))]
		case 1:
			b[rng.IntN(len(b))] ^= 1 << rng.IntN(8)
		case 2:
			clear(b[rng.IntN(len(b)):])
		case 3:
			b = append(b, b[:rng.IntN(100)]...)
		}
		put(t, disk, "/store/summaries/vm", b)
		check(fmt.Sprintf("damage %d", i))
	}
	put(t, disk, "/store/summaries/vm", good)
	check("as it was")
	// Another image in the place of one, of the same length: whatever was known of that
	// place is not so any more.
	old, err := vfs.ReadFile(disk, "/store/vms/vm/00000003.flic", 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	put(t, disk, "/store/vms/vm/00000003.flic", bytes.Repeat([]byte{1}, len(old)))
	got, err := s.Identities(t.Context(), "vm")
	if err != nil || got[2].Err == nil {
		t.Errorf("a damaged image: %+v, %v", got[2], err)
	}
	// Nor is anything freed that it may need.
	if rm, err := s.Remove(t.Context(), Ref{"vm", 1}); err != nil || rm.Left == nil || rm.FlashBytes != 0 {
		t.Errorf("removal beside it: %+v, %v", rm, err)
	}
	put(t, disk, "/store/vms/vm/00000003.flic", old)
	if err := disk.Remove("/store/summaries/vm"); err != nil {
		t.Fatal(err)
	}
	if err := disk.MkdirAll("/store/summaries/vm"); err != nil { // what stands there is no summary
		t.Fatal(err)
	}
	want = want[1:]
	check("a folder in its place")
	s.summarize(t.Context(), "vm")
	if rep, err := s.GC(t.Context()); err != nil || len(rep.Warnings) > 0 {
		t.Errorf("gc: %+v, %v", rep, err)
	}
}

// sameIdentity compares two as JSON has them: times are equal in more than one form.
func sameIdentity(t *testing.T, a, b *checkpoint.Identity) bool {
	t.Helper()
	x, y := *a, *b
	same := x.Created.Equal(y.Created)
	x.Created, y.Created = time.Time{}, time.Time{}
	return same && reflect.DeepEqual(x, y)
}

// TestSummaryGoes: that of a VM of which nothing is left goes with gc.
func TestSummaryGoes(t *testing.T) {
	disk := crashfs.New(0)
	s := chained(t, disk, "/store", 3)
	time.Sleep(2 * youngFile)
	s.summarize(t.Context(), "vm")
	if _, err := disk.Stat("/store/summaries/vm"); err != nil {
		t.Fatal(err)
	}
	rm := s.Remover()
	for n := 3; n > 0; n-- {
		if _, err := rm.Remove(t.Context(), Ref{"vm", n}); err != nil {
			t.Fatal(err)
		}
		if _, err := s.GC(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	// What remembers the highest number is no image.
	if fi, err := disk.Stat("/store/summaries/vm"); err == nil {
		t.Errorf("%d bytes are left", fi.Size())
	}
}

// FuzzSummary parses what is no summary: whatever it is, it takes no more memory than it
// has bytes, some times over.
func FuzzSummary(f *testing.F) {
	s := chained(f, crashfs.New(0), "/store", 3)
	time.Sleep(2 * youngFile)
	s.summarize(f.Context(), "vm")
	b, err := s.dir.Read(f.Context(), summaryObject("vm"), maxSummary)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		entries, err := parseSummary(b)
		if err == nil {
			for _, e := range entries {
				checkpoint.ParseCompact(e.stored)
			}
		}
		// Checksums would keep what is behind them from being looked at.
		checkpoint.ParseCompact(b)
	})
}

// BenchmarkCheckpoints is what list, gc of a store of which nothing was removed, rm of the one
// in the middle, gc after some 20 of these, each of which eight others need, and
// what a save does in the store besides writing take of a VM with 10, 100 and 1000
// checkpoints. On a busy machine the CPU time says more than the other.
//
//	go test ./tier/store -run '^$' -bench Checkpoints -benchtime 20x
func BenchmarkCheckpoints(b *testing.B) {
	for _, n := range []int{10, 100, 1000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			s := chained(b, vfs.OS, b.TempDir()+"/store", n)
			time.Sleep(2 * youngFile)
			s.summarize(b.Context(), "vm")
			var middle Ref
			nothing := func() {}
			for _, op := range []struct {
				name          string
				before, after func() // are not measured
				do            func() error
			}{
				{"list", nothing, nothing, func() error { _, err := s.Listing(b.Context(), "vm"); return err }},
				{"begin", nothing, nothing, func() error {
					p, err := s.Begin(b.Context(), "vm")
					if err == nil {
						err = p.Abort()
					}
					return err
				}},
				{"summarize", nothing, nothing, func() error { s.Summarize(b.Context(), Ref{"vm", n}); return nil }},
				{"gc-whole", nothing, nothing, func() error { _, err := s.GC(b.Context()); return err }},
				{"rm", func() {
					refs, err := s.List(b.Context(), "vm")
					if err != nil {
						b.Fatal(err)
					}
					middle = refs[len(refs)/2]
				}, func() { grow(b, s, 1) }, func() error {
					_, err := s.Remove(b.Context(), middle)
					return err
				}},
				{"gc", nothing, nothing, func() error { _, err := s.GC(b.Context()); return err }},
			} {
				b.Run(op.name, func(b *testing.B) {
					var cpu, wall time.Duration
					for b.Loop() {
						op.before()
						had, begin := cpuTime(b), time.Now()
						if err := op.do(); err != nil {
							b.Fatal(err)
						}
						cpu, wall = cpu+cpuTime(b)-had, wall+time.Since(begin)
						op.after()
					}
					b.ReportMetric(0, "ns/op") // of what is not measured, too
					b.ReportMetric(float64(cpu.Microseconds())/1e3/float64(b.N), "cpu-ms/op")
					b.ReportMetric(float64(wall.Microseconds())/1e3/float64(b.N), "ms/op")
				})
			}
		})
	}
}

// cpuTime is what the process has had so far.
func cpuTime(t testing.TB) time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
