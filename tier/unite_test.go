package tier_test

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/dedup"
	"github.com/flic-migrate/flic-migrate/tier/digest"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
	"github.com/flic-migrate/flic-migrate/tier/vfs/crashfs"
)

// together saves streams for VMs vm0, vm1, … at once, each by a process of its own: no save
// commits before all have placed their pages.
func together(t *testing.T, disk *crashfs.FS, l *lab, streams []*tiertest.Stream, o func(i int) save.Options) []*checkpoint.Meta {
	t.Helper()
	metas := make([]*checkpoint.Meta, len(streams))
	var all, placed sync.WaitGroup
	placed.Add(len(streams))
	for i, s := range streams {
		at := l.on(t, disk.Fork())
		all.Go(func() {
			so := o(i)
			so.VM = fmt.Sprint("vm", i)
			so.Commit = func(ctx context.Context, tx *store.Tx) (store.Ref, error) {
				placed.Done()
				placed.Wait()
				return tx.Commit(ctx)
			}
			var err error
			if _, metas[i], err = at.trySave(s, so); err != nil {
				t.Error(err)
			}
			at.noLeaks(t)
		})
	}
	all.Wait()
	if t.Failed() {
		t.FailNow()
	}
	return metas
}

// flash is what all images take, in bytes.
func (l *lab) flash(t *testing.T) (bytes int64) {
	t.Helper()
	for _, name := range l.tree(t) {
		if strings.HasPrefix(name, "vms/") {
			fi, err := l.fs.Stat(filepath.Join(l.dir, name))
			if err != nil {
				t.Fatal(err)
			}
			bytes += fi.Size()
		}
	}
	return bytes
}

// TestUnite saves equal and nearly equal guests by several processes at once, of all shapes:
// afterwards a page that several have is stored once, each checkpoint is what was saved, and
// so it is when others are removed, in either order.
func TestUnite(t *testing.T) {
	blocks := []tiertest.Block{{Name: "pc.ram", Size: 2 << 20}, {Name: "rom", Size: 40 << 10}}
	for name, o := range map[string]tiertest.Options{
		"plain":      {Seed: 1, Blocks: blocks},
		"live":       {Seed: 2, Blocks: blocks, XBZRLE: true, Shuffle: true},
		"compressed": {Seed: 3, Blocks: blocks, Compress: 0.4, Fill: true},
		"1 KiB":      {Seed: 4, Blocks: blocks, PageSize: 1 << 10, PageBits: true, XBZRLE: true},
		"16 KiB":     {Seed: 5, Blocks: []tiertest.Block{{Name: "ram", Size: 8 << 20}}, PageSize: 16 << 10, Advise: true},
	} {
		for _, equal := range []bool{true, false} {
			t.Run(fmt.Sprint(name, equal), func(t *testing.T) {
				t.Parallel()
				const n = 4
				disk := crashfs.New(0)
				l := newLab(t, disk, "/")
				var streams []*tiertest.Stream
				for i := range n {
					s := generation(o, 1)
					if !equal {
						s = generation(o, 1+i)
					}
					streams = append(streams, s)
				}
				metas := together(t, disk, l, streams, func(i int) save.Options {
					return save.Options{SegmentPages: 6 + i, Codec: image.Codec(i % 4), Energy: dedup.EnergyFull}
				})
				before, one, beside, pages := l.flash(t), int64(0), int64(0), int64(0)
				for i, m := range metas {
					one = max(one, m.Report.FlashBytes)
					beside += m.Report.Beside
					u, err := l.st.Unite(t.Context(), store.Ref{VM: fmt.Sprint("vm", i), N: 1}, store.UniteOptions{})
					if err != nil {
						t.Fatal(err)
					}
					pages += u.Pages
				}
				for i, m := range metas {
					d, err := l.st.Describe(t.Context(), store.Ref{VM: fmt.Sprint("vm", i), N: 1})
					if err != nil || d.Meta.First() != m.UUID {
						t.Errorf("vm%d was %v at first, and says %v, %v", i, m.UUID, d.Meta.First(), err)
					}
				}
				after := l.flash(t)
				// As much as if they had been saved one after the other.
				ideal := newLab(t, crashfs.New(0), "/")
				for i, s := range streams {
					ideal.save(t, s, save.Options{VM: fmt.Sprint("vm", i), SegmentPages: 6 + i, Codec: image.Codec(i % 4), Energy: dedup.EnergyFull})
				}
				switch want := ideal.flash(t); {
				case after > want*13/10:
					t.Errorf("%d bytes; one after the other they take %d", after, want)
				case beside == 0:
					t.Error("nobody has seen another")
				case equal && name != "compressed" && after > one*12/10:
					t.Errorf("%d guests that are equal take %d bytes, one %d", n, after, one)
				case after >= before || pages == 0:
					t.Errorf("%d bytes, and %d before; %d pages", after, before, pages)
				}
				for i, s := range streams {
					ref := store.Ref{VM: fmt.Sprint("vm", i), N: 1}
					l.holds(t, ref, s)
					// Once more there is nothing to do.
					if u, err := l.st.Unite(t.Context(), ref, store.UniteOptions{}); err != nil || u.Why == "" {
						t.Errorf("%v: again %+v, %v", ref, u, err)
					}
				}
				// A save finds what is left of them.
				ref, _ := l.save(t, streams[0], save.Options{VM: "later", SegmentPages: 7})
				l.holds(t, ref, streams[0])
				if err := l.remove(ref); err != nil {
					t.Fatal(err)
				}
				order := []int{0, 1, 2, 3}
				if equal {
					slices.Reverse(order)
				}
				for k, i := range order {
					if err := l.remove(store.Ref{VM: fmt.Sprint("vm", i), N: 1}); err != nil {
						t.Fatal(err)
					}
					if rep, err := l.st.GC(t.Context()); err != nil || len(rep.Warnings) > 0 {
						t.Fatal(rep, err)
					}
					for _, j := range order[k+1:] {
						l.holds(t, store.Ref{VM: fmt.Sprint("vm", j), N: 1}, streams[j])
					}
				}
				if flash, _ := l.taken(t); flash != 0 {
					t.Errorf("%d bytes are not free: %v", flash, l.tree(t))
				}
				l.noLeaks(t)
			})
		}
	}
}

// TestUniteIncrement unites checkpoints that have a parent, deltas, and pages on disks: all of
// that stays, and what is the same in both is stored once.
func TestUniteIncrement(t *testing.T) {
	disk := crashfs.New(0)
	l := newLab(t, disk, "/")
	grown := func(passes int) *tiertest.Stream {
		return tiertest.New(tiertest.Options{Seed: 7, Passes: passes, Resend: 0.4, Fill: true,
			Blocks: []tiertest.Block{{Name: "pc.ram", Size: 4 << 20}, {Name: "rom", Size: 32 << 10}}})
	}
	on := newRawDisk(t, filepath.Join(t.TempDir(), "disk"), digest.Fresh(), 1, grown(5))
	for i := range 2 {
		l.save(t, grown(1), save.Options{VM: fmt.Sprint("vm", i), SegmentPages: 5, Parent: save.ParentNone})
	}
	last := []*tiertest.Stream{grown(3), grown(3)}
	metas := together(t, disk, l, last, func(i int) save.Options {
		o := save.Options{SegmentPages: 8, Codec: image.LZ4}
		if i == 0 {
			o.Disks = []save.Disk{on.open(t)}
		}
		return o
	})
	var u store.United
	for i, m := range metas {
		if m.Report.Parent == "" || m.Report.Delta == 0 {
			t.Fatalf("vm%d: %+v", i, m.Report)
		}
		got, err := l.st.Unite(t.Context(), store.Ref{VM: fmt.Sprint("vm", i), N: 2}, store.UniteOptions{Workers: 1})
		if err != nil {
			t.Fatal(err)
		}
		if got.Pages > 0 {
			u = got
		}
	}
	if u.Pages == 0 || u.Bytes <= 0 {
		t.Errorf("nothing was united: %+v", u)
	}
	for i, s := range last {
		ref := store.Ref{VM: fmt.Sprint("vm", i), N: 2}
		l.holds(t, ref, s)
		c, err := l.st.OpenCheckpoint(t.Context(), ref, checkpoint.Options{})
		if err != nil {
			t.Fatal(err)
		}
		if was := metas[i].Report; c.Meta.Report.Delta != was.Delta || c.Meta.Report.Disk != was.Disk || c.Meta.Report.Cold+c.Meta.Report.Shared != was.Cold+was.Shared {
			t.Errorf("%v: %+v, and was %+v", ref, c.Meta.Report, was)
		}
		c.Close()
	}
	for i := range 2 {
		if err := l.remove(store.Ref{VM: fmt.Sprint("vm", i), N: 1}); err != nil {
			t.Fatal(err)
		}
	}
	for i, s := range last {
		l.holds(t, store.Ref{VM: fmt.Sprint("vm", i), N: 2}, s)
	}
	l.noLeaks(t)
}

// TestUniteNot looks at what is left as it is.
func TestUniteNot(t *testing.T) {
	s := tiertest.New(tiertest.Options{Seed: 1, Mix: tiertest.Mix{tiertest.Random: 1}})
	for name, c := range map[string]struct {
		o    func(i int) save.Options
		then func(t *testing.T, l *lab) (end func())
		same bool // look in the VM's own images alone
	}{
		"another domain": {o: func(i int) save.Options { return save.Options{TrustDomain: fmt.Sprint("d", i)} }},
		"the VM alone":   {o: func(int) save.Options { return save.Options{Share: save.ShareVM} }, same: true},
		"not shared":     {o: func(int) save.Options { return save.Options{Share: save.ShareNone} }, same: true},
		"in NVRAM": {o: func(i int) save.Options {
			return save.Options{WorkingSet: hotSet(t, s, every(2)), NVRAMSize: 64 << 18}
		}},
		"needed": {then: func(t *testing.T, l *lab) func() {
			for _, vm := range []string{"vm0", "vm1"} {
				l.save(t, tiertest.New(tiertest.Options{Seed: 1, Passes: 3, Resend: 0.2, Mix: tiertest.Mix{tiertest.Random: 1}}), save.Options{VM: vm, Share: save.ShareNone})
			}
			return func() {}
		}},
		"read": {then: func(t *testing.T, l *lab) func() {
			var open []*store.Checkpoint
			for _, vm := range []string{"vm0", "vm1"} {
				c, err := l.st.OpenCheckpoint(t.Context(), store.Ref{VM: vm}, checkpoint.Options{})
				if err != nil {
					t.Fatal(err)
				}
				open = append(open, c)
			}
			return func() { open[0].Close(); open[1].Close() }
		}},
	} {
		t.Run(name, func(t *testing.T) {
			disk := crashfs.New(0)
			l := newLab(t, disk, "/")
			if c.o == nil {
				c.o = func(int) save.Options { return save.Options{} }
			}
			metas := together(t, disk, l, []*tiertest.Stream{s, s}, c.o)
			end := func() {}
			if c.then != nil {
				end = c.then(t, l)
			}
			before := l.flash(t)
			for i, m := range metas {
				if c.same && m.Report.Beside != 0 {
					t.Errorf("it has seen %d others", m.Report.Beside)
				}
				u, err := l.st.Unite(t.Context(), store.Ref{VM: fmt.Sprint("vm", i), N: 1}, store.UniteOptions{SameVM: c.same})
				if err != nil || u.Why == "" {
					t.Errorf("%+v, %v", u, err)
				}
			}
			end()
			if after := l.flash(t); after != before {
				t.Errorf("%d bytes, and %d before", after, before)
			}
			for i := range metas {
				l.holds(t, store.Ref{VM: fmt.Sprint("vm", i), N: 1}, s)
			}
			l.noLeaks(t)
		})
	}
}

// uniteScene is a disk with two checkpoints that are equal, and share nothing.
func uniteScene(t *testing.T) (*scene, *tiertest.Stream) {
	t.Helper()
	s := tiertest.New(tiertest.Options{Seed: 3, Passes: 2, Resend: 0.3, Blocks: []tiertest.Block{{Name: "pc.ram", Size: 160 << 10}, {Name: "rom", Size: 32 << 10}}})
	sc := &scene{disk: crashfs.New(0), before: map[int]*tiertest.Stream{1: s, 2: s}, free: -1}
	sc.lab = newLab(t, sc.disk, "/")
	for range 2 {
		sc.lab.save(t, s, save.Options{Share: save.ShareNone, Parent: save.ParentNone, SegmentPages: 6, Workers: 1, Energy: dedup.EnergyFull})
	}
	return sc, s
}

// TestKillUnite ends the process at every operation of a uniting, and TestFailUnite lets each
// fail: both checkpoints are there, whole, and nothing else is.
func TestKillUnite(t *testing.T) {
	sc, _ := uniteScene(t)
	united := 0
	n := everyOp(t, func(t *testing.T, n int) bool {
		disk, l := sc.run(t)
		disk.KillAt(n)
		if u, err := l.st.Unite(t.Context(), store.Ref{VM: "vm", N: 2}, store.UniteOptions{Workers: 1}); err == nil && u.Why == "" {
			united++
		}
		sc.survives(t, disk, sc.before, 1, 2)
		return disk.Killed()
	})
	if n < 20 || united == 0 {
		t.Errorf("%d operations, %d times united", n, united)
	}
}

// TestUniteLeft ends the process that is to unite two checkpoints at one operation after the
// other: what it has not done is done later, once, and then nobody looks again.
func TestUniteLeft(t *testing.T) {
	s := tiertest.New(tiertest.Options{Seed: 5, Fill: true, Blocks: []tiertest.Block{{Name: "pc.ram", Size: 256 << 10}}})
	domain := store.DefaultDomain
	for kill, killed := 0, true; killed; kill += 9 {
		disk := crashfs.New(0)
		l := newLab(t, disk, "/")
		together(t, disk, l, []*tiertest.Stream{s, s}, func(int) save.Options { return save.Options{Energy: dedup.EnergyFull, Workers: 1} })
		before := l.flash(t)
		disk.KillAt(kill)
		for i := range 2 {
			l.st.Unite(t.Context(), store.Ref{VM: fmt.Sprint("vm", i), N: 1}, store.UniteOptions{Workers: 1})
		}
		killed = disk.Killed()
		l = l.on(t, disk.Fork())
		if _, n, err := l.st.UniteLeft(t.Context(), time.Minute, store.UniteOptions{Workers: 1}); err != nil || n > 0 && !killed || n == 0 && kill == 0 {
			t.Errorf("killed at %d: %d were left, %v", kill, n, err)
		}
		if now := l.flash(t); now > before*3/4 {
			t.Errorf("killed at %d: %d bytes of %d are left", kill, now, before)
		}
		if _, n, err := l.st.UniteLeft(t.Context(), time.Minute, store.UniteOptions{Workers: 1}); err != nil || n > 0 {
			t.Errorf("killed at %d: %d are left again, %v", kill, n, err)
		}
		c, err := l.st.Share(domain)
		if err != nil {
			t.Fatal(err)
		}
		if left, err := c.Beside(); err != nil || len(left) > 0 {
			t.Errorf("killed at %d: notes of %v, %v", kill, left, err)
		}
		for i := range 2 {
			l.holds(t, store.Ref{VM: fmt.Sprint("vm", i), N: 1}, s)
		}
		l.noLeaks(t)
	}
}

// TestUniteLeftDamaged: checkpoints that can't be united are not in the way of others; who
// takes too long is not tried again.
func TestUniteLeftDamaged(t *testing.T) {
	blocks := []tiertest.Block{{Name: "pc.ram", Size: 256 << 10}}
	a := tiertest.New(tiertest.Options{Seed: 5, Fill: true, Blocks: blocks})
	b := tiertest.New(tiertest.Options{Seed: 6, Fill: true, Blocks: blocks})
	disk := crashfs.New(0)
	l := newLab(t, disk, "/")
	together(t, disk, l, []*tiertest.Stream{a, a, b, b}, func(int) save.Options { return save.Options{Energy: dedup.EnergyFull, Workers: 1} })
	notes := func() int {
		t.Helper()
		c, err := l.st.Share(store.DefaultDomain)
		if err != nil {
			t.Fatal(err)
		}
		left, err := c.Beside()
		if err != nil {
			t.Fatal(err)
		}
		return len(left)
	}
	had := notes()
	o := store.UniteOptions{Workers: 1}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := l.st.UniteLeft(ctx, time.Minute, o); !errors.Is(err, context.Canceled) || notes() != had || had < 3 {
		t.Errorf("cancelled: %v, %d notes of %d", err, notes(), had)
	}
	// Both of a pair: neither can be united with the other.
	var back []func()
	for _, vm := range []string{"vm0", "vm1"} {
		d := &damaged{lab: l, ref: store.Ref{VM: vm, N: 1}}
		file := l.dir + "/vms/" + vm + "/00000001.flic"
		back = append(back, d.flip(t, file, digestsOf(t, l, file), 2))
	}
	before := l.flash(t)
	for range 2 {
		if _, _, err := l.st.UniteLeft(t.Context(), time.Minute, o); !integrity.IsCorrupt(err) {
			t.Errorf("with damage: %v", err)
		}
	}
	if now := l.flash(t); now > before*4/5 || notes() == 0 || notes() > 2 {
		t.Errorf("with damage: %d bytes of %d are left, %d notes", now, before, notes())
	}
	for _, f := range back {
		f()
	}
	// A limit that nothing keeps.
	left := notes()
	if _, n, err := l.st.UniteLeft(t.Context(), 0, o); err == nil || n != left || notes() != 0 {
		t.Errorf("no time: %d of %d, %d notes, %v", n, left, notes(), err)
	}
	if _, n, err := l.st.UniteLeft(t.Context(), time.Minute, o); err != nil || n != 0 {
		t.Errorf("again: %d, %v", n, err)
	}
	for i, s := range []*tiertest.Stream{a, a, b, b} {
		l.holds(t, store.Ref{VM: fmt.Sprint("vm", i), N: 1}, s)
	}
}

// digestsOf is where an image has a byte of its digests.
func digestsOf(t *testing.T, l *lab, file string) (at int64) {
	t.Helper()
	f, err := l.fs.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	im, err := image.Open(f)
	if err == nil {
		err = im.Frames(func(k image.Kind, _ uint32, off int64) error {
			if k == image.Digests {
				at = off + 64
			}
			return nil
		})
	}
	if err != nil || at == 0 {
		t.Fatal(at, err)
	}
	return at
}

// TestFailUnite: see TestKillUnite.
func TestFailUnite(t *testing.T) {
	for name, fault := range faultsAt {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			sc, _ := uniteScene(t)
			everyOp(t, func(t *testing.T, n int) bool {
				disk, l := sc.run(t)
				before := len(disk.Ops())
				fault.arm(disk, n)
				_, err := l.st.Unite(t.Context(), store.Ref{VM: "vm", N: 2}, store.UniteOptions{Workers: 1})
				hit := len(disk.Ops())-before > n
				if err != nil && !errors.Is(err, fault.err) {
					t.Errorf("unite: %v", err)
				}
				disk.Heal()
				l.noLeaks(t)
				sc.survives(t, disk, sc.before, 1, 2)
				return hit
			})
		})
	}
}

// atLock calls fn before somebody takes the store lock for the n-th time.
type atLock struct {
	vfs.FS
	n  int
	fn func()
}

func (a *atLock) NoLinks(dir string) (_ vfs.FS, err error) {
	a.FS, err = a.FS.NoLinks(dir)
	return a, err
}

func (a *atLock) Lock(ctx context.Context, name string, mode vfs.LockMode) (vfs.Locked, error) {
	if strings.HasSuffix(name, "/store/lock") {
		if a.n--; a.n == 0 {
			a.fn()
		}
	}
	return a.FS.Lock(ctx, name, mode)
}

// TestUniteSurvey has a flattening look at what refers to what, without the store lock, before
// a uniting, and go on after it: what the new image needs, and the old one did not, stays.
func TestUniteSurvey(t *testing.T) {
	o := tiertest.Options{Seed: 1, Mix: tiertest.Mix{tiertest.Random: 1}, Resend: 0.5}
	done := 0
	for n, more := 1, true; more; n++ {
		disk := crashfs.New(0)
		l := newLab(t, disk, "/")
		o.Passes = 1
		l.save(t, tiertest.New(o), save.Options{VM: "a"})
		// b needs some of a, and c has all that b has, too.
		o.Passes = 3
		s := tiertest.New(o)
		l.save(t, s, save.Options{VM: "b"})
		l.save(t, s, save.Options{VM: "c", Share: save.ShareNone})
		hook := &atLock{FS: disk.Fork()}
		flattening, other := l.on(t, hook), l.on(t, disk.Fork())
		more = false
		hook.n, hook.fn = n, func() {
			more = true
			u, err := other.st.Unite(t.Context(), store.Ref{VM: "c", N: 1}, store.UniteOptions{})
			if err != nil {
				t.Errorf("lock %d: %v", n, err)
			}
			if u.Why == "" {
				done++
			}
		}
		if _, _, err := flattening.flatten(store.Ref{VM: "b", N: 1}); err != nil {
			t.Error(err)
		}
		if rep, err := l.st.GC(t.Context()); err != nil || len(rep.Warnings) > 0 {
			t.Errorf("gc: %+v, %v", rep, err)
		}
		for _, vm := range []string{"b", "c"} {
			l.holds(t, store.Ref{VM: vm, N: 1}, s)
		}
		l.noLeaks(t)
		if t.Failed() {
			t.Fatalf("lock %d", n)
		}
	}
	if done < 3 {
		t.Errorf("%d times united", done)
	}
}

// TestUniteReplaced replaces an image that a uniting is to refer to, by a copy that goes away at
// once, at each moment: both checkpoints are whole after it.
func TestUniteReplaced(t *testing.T) {
	s := tiertest.New(tiertest.Options{Seed: 5, Fill: true, Blocks: []tiertest.Block{{Name: "pc.ram", Size: 256 << 10}}})
	united, told := 0, 0
	for n, more := 1, true; more; n++ {
		disk := crashfs.New(0)
		l := newLab(t, disk, "/")
		for _, vm := range []string{"a", "b"} {
			l.save(t, s, save.Options{VM: vm, Share: save.ShareNone})
		}
		hook := &atLock{FS: disk.Fork()}
		uniting, other := l.on(t, hook), l.on(t, disk.Fork())
		more = false
		hook.n, hook.fn = n, func() {
			more = true
			name := "/vms/a/00000001.flic"
			other.write(t, name, other.file(t, name))
			if err := other.remove(store.Ref{VM: "a", N: 1}); err != nil && !errors.Is(err, store.ErrInUse) {
				t.Error(err)
			}
		}
		u, err := uniting.st.Unite(t.Context(), store.Ref{VM: "b", N: 1}, store.UniteOptions{})
		if err != nil {
			t.Errorf("lock %d: %v", n, err)
		}
		if u.Why == "" {
			united++
		} else if strings.Contains(u.Why, "replaced") {
			told++
		}
		l.holds(t, store.Ref{VM: "b", N: 1}, s)
		if !more {
			l.holds(t, store.Ref{VM: "a", N: 1}, s)
		}
		l.noLeaks(t)
		if t.Failed() {
			t.Fatalf("lock %d: %+v", n, u)
		}
	}
	if united == 0 || told == 0 {
		t.Errorf("%d times united, %d times replaced", united, told)
	}
}
