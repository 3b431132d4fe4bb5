package tier_test

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/dedup"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/nvram"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
	"github.com/flic-migrate/flic-migrate/tier/vfs/crashfs"
)

// demote moves what all but the newest checkpoints need to flash, and must succeed.
func (l *lab) demote(t testing.TB, keep int) store.Demoted {
	t.Helper()
	d, err := l.st.Demote(t.Context(), keep)
	if err != nil || d.Left != nil {
		t.Fatalf("demotion: %+v, %v", d, err)
	}
	return d
}

// pieces are the files of what has been moved from NVRAM.
func (l *lab) pieces(t testing.TB) []string {
	return slices.DeleteFunc(l.tree(t), func(name string) bool { return !strings.HasSuffix(name, ".moved") })
}

// hotGenerations saves generations of a guest with so much memory, of which every other
// page is hot, and so many pages change from one to the next.
func (l *lab) hotGenerations(t testing.TB, vm string, n int, size uint64, resend float64) map[store.Ref]*tiertest.Stream {
	t.Helper()
	model := map[store.Ref]*tiertest.Stream{}
	for g := 1; g <= n; g++ {
		s := tiertest.New(tiertest.Options{Seed: 1, Blocks: []tiertest.Block{{Name: "pc.ram", Size: size}}, Passes: g, Resend: resend})
		ref, _ := l.save(t, s, save.Options{VM: vm, Energy: dedup.EnergyFull, SegmentPages: 8, WorkingSet: hotSet(t, s, every(2)), NVRAMSize: 64 << 20})
		model[ref] = s
	}
	return model
}

// TestDemote moves what older checkpoints need from NVRAM to flash. All of them restore as
// before, NVRAM has what the newest need and no more than a third beside it, and when all
// is removed all is free.
func TestDemote(t *testing.T) {
	for name, newFS := range labs(t) {
		t.Run(name, func(t *testing.T) {
			l := newFS(t)
			model := l.hotGenerations(t, "vm", 6, 2<<20, 0.7)
			_, before := l.taken(t)
			first := l.demote(t, 1)
			_, after := l.taken(t)
			if first.Images == 0 || first.Bytes == 0 || before-after != first.NVRAMBytes || first.NVRAMBytes < first.Bytes/2 {
				t.Errorf("%+v; NVRAM %d, then %d", first, before, after)
			}
			if d := l.demote(t, 1); d != (store.Demoted{}) {
				t.Errorf("a second time: %+v", d)
			}
			for ref, s := range model {
				l.holds(t, ref, s)
			}
			// What is saved now is against pages that are on flash, and hot ones of them go to
			// NVRAM again.
			for ref, s := range l.hotGenerations(t, "other", 1, 2<<20, 0.7) {
				model[ref] = s
			}
			s := model[store.Ref{VM: "vm", N: 2}]
			ref, meta := l.save(t, s, save.Options{Parent: "vm@2", WorkingSet: hotSet(t, s, every(2)), NVRAMSize: 64 << 20})
			if meta.Report.Unchanged == 0 || meta.Report.Hot == 0 {
				t.Errorf("against a moved parent: %+v", meta.Report)
			}
			model[ref] = s
			for ref, s := range model {
				l.holds(t, ref, s)
			}
			l.demote(t, 1)
			to, _, err := l.copy(store.Ref{VM: "vm", N: 1}, 0)
			if err != nil {
				t.Fatal(err)
			}
			model[to] = model[store.Ref{VM: "vm", N: 1}]
			if old, _, err := l.flatten(store.Ref{VM: "vm", N: 3}); err != nil || old.Left != nil {
				t.Fatalf("%+v, %v", old, err)
			}
			for _, n := range []int{2, 4, 1, 3, 7, 6, 5} {
				ref := store.Ref{VM: "vm", N: n}
				if err := l.remove(ref); err != nil {
					t.Fatal(err)
				}
				delete(model, ref)
				if n%2 == 0 {
					l.demote(t, 1)
				}
				for ref, s := range model {
					l.holds(t, ref, s)
				}
			}
			for ref := range model {
				if err := l.remove(ref); err != nil {
					t.Fatal(err)
				}
			}
			if rep, err := l.st.GC(t.Context()); err != nil || len(rep.Warnings) > 0 {
				t.Errorf("%+v, %v", rep, err)
			}
			if _, hot := l.taken(t); hot != 0 || len(l.pieces(t)) > 0 {
				t.Errorf("%d bytes of NVRAM are not free, and %v is left", hot, l.pieces(t))
			}
			l.noLeaks(t)
		})
	}
}

// TestDemoteKeeps: the newest so many of each VM stay in NVRAM, and what they refer to.
func TestDemoteKeeps(t *testing.T) {
	l := newLab(t, crashfs.New(0), "/")
	model := l.hotGenerations(t, "a", 4, 2<<20, 0.95)
	for ref, s := range l.hotGenerations(t, "b", 4, 2<<20, 0.95) {
		model[ref] = s
	}
	if d := l.demote(t, 4); d != (store.Demoted{}) {
		t.Errorf("nothing is old: %+v", d)
	}
	last := int64(0)
	for _, keep := range []int{3, 2, 1} {
		d := l.demote(t, keep)
		if d.NVRAMBytes == 0 {
			t.Errorf("keep %d: %+v", keep, d)
		}
		last += d.NVRAMBytes
		for _, vm := range []string{"a", "b"} {
			for n := 4 - keep + 1; n <= 4; n++ {
				for _, name := range l.pieces(t) {
					if strings.HasPrefix(name, fmt.Sprintf("vms/%s/%08d.", vm, n)) {
						t.Errorf("keep %d: %s", keep, name)
					}
				}
			}
		}
		for ref, s := range model {
			l.holds(t, ref, s)
		}
	}
}

// TestDemoteSpace: what show and removals say of space is so where pages have been moved.
func TestDemoteSpace(t *testing.T) {
	for _, order := range [][]int{{1, 2, 3, 4}, {4, 3, 2, 1}, {2, 4, 1, 3}} {
		l := newLab(t, crashfs.New(0), "/")
		model := l.hotGenerations(t, "vm", 4, 2<<20, 0.7)
		l.demote(t, 1)
		for _, n := range order {
			ref := store.Ref{VM: "vm", N: n}
			flash, hot := l.taken(t)
			says, err := l.st.Sharing(t.Context(), ref)
			if err != nil {
				t.Fatal(err)
			}
			rm, err := l.st.Remove(t.Context(), ref)
			if err != nil || rm.Left != nil {
				t.Fatalf("%v: %+v, %v", order, rm, err)
			}
			if d := says.RmFrees.Flash - rm.FlashBytes; d < -8*4096 || d > 8*4096 || says.RmFrees.NVRAM != rm.NVRAMBytes {
				t.Errorf("%v: of %d it was said %+v, and it is %+v", order, n, says, rm)
			}
			nowFlash, nowHot := l.taken(t)
			if got := flash - nowFlash; got < rm.FlashBytes || got > rm.FlashBytes+8*4096 || hot-nowHot != rm.NVRAMBytes {
				t.Errorf("%v: removal of %d says %d and %d bytes, and %d and %d are free", order, n, rm.FlashBytes, rm.NVRAMBytes, got, hot-nowHot)
			}
			rep, err := l.st.GC(t.Context())
			if err != nil || rep.Removed+rep.Trimmed+rep.NVRAMExtents != 0 || len(rep.Warnings) != 0 {
				t.Errorf("%v: gc after the removal of %d: %+v, %v", order, n, rep, err)
			}
			delete(model, ref)
			l.listed(t, model)
		}
		if flash, hot := l.taken(t); flash != 0 || hot != 0 {
			t.Errorf("%v: %d bytes of flash and %d of NVRAM are not free: %v", order, flash, hot, l.tree(t))
		}
	}
}

// TestDemoteTwin: a second name of a listed image, as a flattening that was cut off leaves
// it, takes nothing from that one.
func TestDemoteTwin(t *testing.T) {
	l := newLab(t, crashfs.New(0), "/")
	model := l.hotGenerations(t, "vm", 2, 2<<20, 0.7)
	for ref := range model {
		c, err := l.st.OpenCheckpoint(t.Context(), ref, checkpoint.Options{})
		if err != nil {
			t.Fatal(err)
		}
		id := c.Meta.UUID
		c.Close()
		if err := l.fs.Link(l.image("vm", fmt.Sprintf("%08d", ref.N)), fmt.Sprintf("%s/vms/vm/%08d.%v.gone", l.dir, ref.N, id)); err != nil {
			t.Fatal(err)
		}
	}
	l.demote(t, 1)
	for ref, s := range model {
		l.holds(t, ref, s)
	}
	for _, name := range l.pieces(t) {
		if strings.Contains(name, "/00000002.") {
			t.Errorf("of the newest: %s", name)
		}
	}
}

// TestDemoteCopy: a copy of an image under another VM's name, or number, takes nothing from
// the original.
func TestDemoteCopy(t *testing.T) {
	l := newLab(t, crashfs.New(0), "/")
	model := l.hotGenerations(t, "vm", 2, 2<<20, 0.7)
	for ref, s := range l.hotGenerations(t, "a", 2, 2<<20, 0.7) {
		model[ref] = s
	}
	image := l.file(t, "/vms/vm/00000002.flic")
	for _, name := range []string{"/vms/a/00000001.flic", "/vms/a/00000003.gone", "/vms/vm/00000003.gone"} {
		l.fs.Remove(l.dir + name)
		l.write(t, name, image)
	}
	delete(model, store.Ref{VM: "a", N: 1})
	delete(model, store.Ref{VM: "a", N: 2}) // which refers to it
	l.demote(t, 1)
	if rep, err := l.st.GC(t.Context()); err != nil {
		t.Errorf("%+v, %v", rep, err)
	}
	for ref, s := range model {
		l.holds(t, ref, s)
	}
}

// lockWatch is a file system on which the store lock is looked at whenever something is done
// with the NVRAM file.
type lockWatch struct {
	*crashfs.FS
	nvram, lock string
	looks, held atomic.Int64
}

func (w *lockWatch) NoLinks(string) (vfs.FS, error) { return w, nil }

func (w *lockWatch) Open(name string) (vfs.File, error)   { return w.file(name)(w.FS.Open(name)) }
func (w *lockWatch) OpenRW(name string) (vfs.File, error) { return w.file(name)(w.FS.OpenRW(name)) }

func (w *lockWatch) file(name string) func(vfs.File, error) (vfs.File, error) {
	return func(f vfs.File, err error) (vfs.File, error) {
		if err == nil && name == w.nvram {
			f = watchedNVRAM{f, w}
		}
		return f, err
	}
}

func (w *lockWatch) look() {
	w.looks.Add(1)
	l, err := w.Fork().TryLock(w.lock, vfs.Exclusive)
	if err != nil {
		w.held.Add(1)
		return
	}
	l.Close()
}

type watchedNVRAM struct {
	vfs.File
	w *lockWatch
}

func (f watchedNVRAM) ReadAt(b []byte, off int64) (int, error) {
	f.w.look()
	return f.File.ReadAt(b, off)
}

func (f watchedNVRAM) WriteAt(b []byte, off int64) (int, error) {
	f.w.look()
	return f.File.WriteAt(b, off)
}

func (f watchedNVRAM) Lock(ctx context.Context, mode vfs.LockMode) error {
	f.w.look()
	return f.File.Lock(ctx, mode)
}

func (f watchedNVRAM) Punch(off, n int64) error {
	f.w.look()
	return f.File.Punch(off, n)
}

func (f watchedNVRAM) Truncate(size int64) error {
	f.w.look()
	return f.File.Truncate(size)
}

// TestNVRAMWithoutStoreLock: the store lock is free while an NVRAM file is searched and
// extents are freed, whatever frees them: a commit with a stopped guest waits for that lock.
func TestNVRAMWithoutStoreLock(t *testing.T) {
	disk := crashfs.New(0)
	l := newLab(t, disk, "/")
	all := l.hotGenerations(t, "vm", 5, 2<<20, 0.7)
	remove := func(l *lab, numbers ...int) error {
		for _, n := range numbers {
			if err := l.remove(store.Ref{VM: "vm", N: n}); err != nil {
				return err
			}
		}
		return nil
	}
	type step struct {
		name  string
		do    func(l *lab) error
		frees bool
	}
	demote := step{"demote", func(l *lab) error {
		d, err := l.st.Demote(t.Context(), 1)
		return errors.Join(err, d.Left)
	}, true}
	gc := step{"gc", func(l *lab) error {
		rep, err := l.st.GC(t.Context())
		if len(rep.Warnings) > 0 {
			t.Error(rep.Warnings)
		}
		return err
	}, false}
	some := step{"rm of what others need", func(l *lab) error { return remove(l, 1, 2) }, false}
	for name, steps := range map[string][]step{
		"listed":          {demote, some, gc},
		"kept for others": {some, demote, gc},
		"flattened": {some, {"flatten", func(l *lab) error {
			_, _, err := l.flatten(store.Ref{VM: "vm", N: 3})
			return err
		}, false}, gc},
	} {
		t.Run(name, func(t *testing.T) {
			w := &lockWatch{FS: disk.CrashClone(1), nvram: "/nvram.img", lock: "/store/lock"}
			l := l.on(t, w)
			for _, step := range append(steps, step{"rm", func(l *lab) error { return remove(l, 4, 3, 5) }, true}) {
				w.looks.Store(0)
				w.held.Store(0)
				_, before := l.taken(t)
				if err := step.do(l); err != nil {
					t.Fatalf("%s: %v", step.name, err)
				}
				if looks, held := w.looks.Load(), w.held.Load(); looks == 0 || held > 0 {
					t.Errorf("%s: something is done with NVRAM %d times, %d times with the store lock taken", step.name, looks, held)
				}
				if _, after := l.taken(t); step.frees && after >= before {
					t.Errorf("%s has freed nothing", step.name)
				}
				refs, err := l.st.List(t.Context(), "")
				if err != nil {
					t.Fatal(err)
				}
				for _, ref := range refs {
					l.holds(t, ref, all[ref])
				}
			}
			if flash, hot := l.taken(t); flash != 0 || hot != 0 {
				t.Errorf("%d bytes of flash and %d of NVRAM are not free: %v", flash, hot, l.tree(t))
			}
		})
	}
}

// TestDemoteInUse: what somebody has open is read on where it was, and freed later.
func TestDemoteInUse(t *testing.T) {
	l := newLab(t, crashfs.New(0), "/")
	model := l.hotGenerations(t, "vm", 3, 2<<20, 0.7)
	c, err := l.st.OpenCheckpoint(t.Context(), store.Ref{VM: "vm", N: 3}, checkpoint.Options{})
	if err != nil {
		t.Fatal(err)
	}
	d := l.demote(t, 1)
	if d.Bytes == 0 || d.NVRAMBytes != 0 {
		t.Errorf("%+v", d)
	}
	if err := c.Verify(t.Context(), func(err error) { t.Error(err) }); err != nil {
		t.Error(err)
	}
	c.Close()
	if d := l.demote(t, 1); d.Bytes != 0 || d.NVRAMBytes == 0 {
		t.Errorf("%+v", d)
	}
	for ref, s := range model {
		l.holds(t, ref, s)
	}
}

// TestDemoteDamage: damaged pages in NVRAM are not moved, and reported; and each byte of
// what was moved is under a checksum that is looked at.
func TestDemoteDamage(t *testing.T) {
	l := newLab(t, crashfs.New(0), "/")
	model := l.hotGenerations(t, "vm", 2, 2<<20, 0.95)
	old := store.Ref{VM: "vm", N: 1}
	// The first byte of a page of each extent, but the tables.
	for off := int64(nvram.ExtentSize); off < 4*nvram.ExtentSize; off += nvram.ExtentSize {
		l.flipped(t, l.nvram, off, func() []error {
			d, err := l.st.Demote(t.Context(), 1)
			if off == nvram.ExtentSize && (err != nil || !integrity.IsCorrupt(d.Left) || !strings.Contains(d.Left.Error(), l.nvram) || len(l.pieces(t)) != 0) {
				t.Errorf("%+v, %v", d, err)
			}
			return nil
		})
	}
	l.demote(t, 1)
	for _, name := range l.pieces(t) {
		file := filepath.Join(l.dir, name)
		size := int64(len(l.file(t, "/"+name)))
		for off := int64(0); off < size; off += 1 + size/97 {
			found := l.flipped(t, file, off, func() []error { return l.verify(old) })
			if len(found) == 0 || !strings.Contains(found[0].Error(), file) && !integrity.IsCorrupt(found[0]) {
				t.Errorf("%s, offset %d: %v", name, off, found)
			}
		}
	}
	for ref, s := range model {
		l.holds(t, ref, s)
	}
}

// TestCrashDemote ends and fails demotions at each operation: of checkpoints that are
// listed, and of one that is only kept for others. Every checkpoint is whole whenever that
// happens, a later demotion does what was left to do, and all space comes back.
func TestCrashDemote(t *testing.T) {
	disk := crashfs.New(0)
	l := newLab(t, disk, "/")
	model := l.hotGenerations(t, "vm", 3, 512<<10, 0.85)
	ref := func(n int) store.Ref { return store.Ref{VM: "vm", N: n} }
	for name, removed := range map[string][]int{"listed": nil, "kept for others": {1, 2}} {
		t.Run(name, func(t *testing.T) {
			disk := disk.CrashClone(1)
			l := l.on(t, disk)
			left := []store.Ref{ref(1), ref(2), ref(3)}
			for _, n := range removed {
				if err := l.remove(ref(n)); err != nil {
					t.Fatal(err)
				}
				left = slices.DeleteFunc(left, func(r store.Ref) bool { return r.N == n })
			}
			whole := l.on(t, disk.CrashClone(1))
			want := whole.demote(t, 1)
			_, hot := whole.taken(t)
			if want.Bytes == 0 || want.NVRAMBytes == 0 {
				t.Fatalf("nothing to move: %+v", want)
			}
			everyCrash(t, disk, l, func(l *lab) error {
				d, err := l.st.Demote(t.Context(), 1)
				return errors.Join(err, d.Left)
			}, func(t *testing.T, l *lab, _ error) {
				t.Helper()
				l.listed(t, model, left...)
				l.demote(t, 1)
				if rep, err := l.st.GC(t.Context()); err != nil || len(rep.Warnings) > 0 {
					t.Errorf("gc: %+v, %v", rep, err)
				}
				if _, now := l.taken(t); now != hot {
					t.Errorf("%d bytes of NVRAM are in use, and without a crash %d", now, hot)
				}
				l.listed(t, model, left...)
				for _, ref := range left {
					if err := l.remove(ref); err != nil {
						t.Error(err)
					}
				}
				if flash, hot := l.taken(t); flash != 0 || hot != 0 {
					t.Errorf("%d bytes of flash and %d of NVRAM are not free: %v", flash, hot, l.tree(t))
				}
			})
		})
	}
}

// TestCrashMovedRemoved ends and fails removals and flattenings of a checkpoint of whose
// pages some have been moved: it is there, whole, or gone with all that it took.
func TestCrashMovedRemoved(t *testing.T) {
	disk := crashfs.New(0)
	l := newLab(t, disk, "/")
	model := l.hotGenerations(t, "vm", 3, 512<<10, 0.85)
	l.demote(t, 1)
	if len(l.pieces(t)) == 0 {
		t.Fatal("nothing was moved")
	}
	for name, do := range map[string]func(l *lab) error{
		"rm of all": func(l *lab) error {
			for n := 1; n <= 3; n++ {
				if _, err := l.st.Remove(t.Context(), store.Ref{VM: "vm", N: n}); err != nil {
					return err
				}
			}
			return nil
		},
		"flatten": func(l *lab) error {
			_, _, err := l.flatten(store.Ref{VM: "vm", N: 1})
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			everyCrash(t, disk, l, do, func(t *testing.T, l *lab, _ error) {
				t.Helper()
				l.listed(t, model)
				if rep, err := l.st.GC(t.Context()); err != nil || len(rep.Warnings) > 0 {
					t.Errorf("gc: %+v, %v", rep, err)
				}
				l.listed(t, model)
				refs, err := l.st.List(t.Context(), "")
				if err != nil {
					t.Error(err)
				}
				for _, ref := range refs {
					if err := l.remove(ref); err != nil {
						t.Error(err)
					}
				}
				if flash, hot := l.taken(t); flash != 0 || hot != 0 {
					t.Errorf("%d bytes of flash and %d of NVRAM are not free: %v", flash, hot, l.tree(t))
				}
			})
		})
	}
}
