package tier_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/flic-migrate/flic-migrate/stream/returnpath"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/dedup"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/vfs/crashfs"
)

// These tests run a save, a removal and a gc on a disk that dies or fails at
// each of its operations, and look at what is left. A scene is the disk before.
type scene struct {
	disk *crashfs.FS
	lab  *lab
	// before is what the store holds, by checkpoint number.
	before map[int]*tiertest.Stream
	free   int64 // bytes of NVRAM
}

// small is a stream with everything that reaches both tiers, in 48 pages.
func small(seed uint64) *tiertest.Stream {
	return tiertest.New(tiertest.Options{Seed: seed, Passes: 2, Resend: 0.3, XBZRLE: true, ReturnPath: true,
		Blocks: []tiertest.Block{{Name: "pc.ram", Size: 160 << 10}, {Name: "rom", Size: 32 << 10}}})
}

// grown is what small(seed) has become some time later: most pages are as they were, and
// many of the others have changed a little.
func grown(seed uint64) *tiertest.Stream {
	return tiertest.New(tiertest.Options{Seed: seed, Passes: 3, Resend: 0.3, XBZRLE: true, ReturnPath: true,
		Blocks: []tiertest.Block{{Name: "pc.ram", Size: 160 << 10}, {Name: "rom", Size: 32 << 10}}})
}

func smallOptions(t testing.TB, s *tiertest.Stream) save.Options {
	return save.Options{WorkingSet: hotSet(t, s, every(2)), NVRAMSize: 10 << 18, SegmentPages: 6, Energy: dedup.EnergyFull, Codec: image.LZ4, Workers: 1}
}

// newScene makes a store with checkpoints 1 to n of "vm".
func newScene(t *testing.T, n int) *scene {
	t.Helper()
	disk := crashfs.New(0)
	sc := &scene{disk: disk, lab: newLab(t, disk, "/"), before: map[int]*tiertest.Stream{}}
	for i := 1; i <= n; i++ {
		s := small(uint64(i))
		ref, _ := sc.lab.save(t, s, smallOptions(t, s))
		sc.before[ref.N] = s
	}
	sc.free = sc.lab.nvramFree(t)
	return sc
}

// run returns a copy of the scene with a process of its own.
func (sc *scene) run(t *testing.T) (*crashfs.FS, *lab) {
	t.Helper()
	disk := sc.disk.CrashClone(1)
	return disk, sc.lab.on(t, disk)
}

// check looks at a store as the next process finds it: each visible checkpoint
// must be one of may, and each of must be visible, verify and restore; what is
// not visible must leave no space taken once gc has run. It returns the numbers
// of the visible checkpoints.
func (sc *scene) check(t *testing.T, l *lab, may map[int]*tiertest.Stream, must ...int) []int {
	t.Helper()
	visible := func() (ns []int) {
		refs, err := l.st.List(context.Background(), "")
		if err != nil {
			t.Fatalf("list: %v", err)
		}
		for _, ref := range refs {
			s := may[ref.N]
			if s == nil || ref.VM != "vm" {
				t.Fatalf("checkpoint %v came from nowhere", ref)
			}
			l.holds(t, ref, s)
			ns = append(ns, ref.N)
		}
		return ns
	}
	ns := visible()
	for _, n := range must {
		if !slices.Contains(ns, n) {
			t.Errorf("checkpoint %d is gone", n)
		}
	}
	if rep, err := l.st.GC(context.Background()); err != nil || len(rep.Warnings) > 0 {
		t.Errorf("gc: %+v, %v", rep, err)
	}
	if after := visible(); !slices.Equal(ns, after) {
		t.Errorf("checkpoints %v, after gc %v", ns, after)
	}
	if rep, err := l.st.GC(context.Background()); err != nil || rep.Parts+rep.NVRAMExtents != 0 {
		t.Errorf("a second gc found more: %+v, %v", rep, err)
	}
	needed := map[string]bool{}
	for _, n := range ns {
		c, err := l.st.OpenCheckpoint(context.Background(), store.Ref{VM: "vm", N: n}, checkpoint.Options{})
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range c.References() {
			needed[fmt.Sprintf("vms/vm/%08d.gone", r.Number)] = true
		}
		c.Close()
	}
	for _, name := range l.tree(t) {
		if fi, err := l.fs.Stat(filepath.Join(l.dir, name)); err == nil && strings.HasSuffix(name, ".gone") && (fi.Size() == 0 || needed[name]) {
			continue // it stands for a number, or others refer to it
		}
		if !strings.HasPrefix(name, "nvram/") && name != "lock" && name != "store.json" && name != "sharing.json" && !strings.HasPrefix(name, "share/default/") &&
			!slices.ContainsFunc(ns, func(n int) bool { return name == fmt.Sprintf("vms/vm/%08d.flic", n) }) {
			t.Errorf("left behind after gc: %s", name)
		}
	}
	// Each of these checkpoints has one extent.
	if sc.free >= 0 {
		if want, got := sc.free-int64(len(ns)-len(sc.before))<<18, l.nvramFree(t); got != want {
			t.Errorf("%d bytes of NVRAM free, want %d", got, want)
		}
	}
	l.noLeaks(t)
	return ns
}

// survives checks the state after a dead process: for the next one, and after a
// power cut at that moment.
func (sc *scene) survives(t *testing.T, disk *crashfs.FS, may map[int]*tiertest.Stream, must ...int) {
	t.Helper()
	for seed := range uint64(4) {
		sc.check(t, sc.lab.on(t, disk.CrashClone(seed)), may, must...)
	}
	sc.check(t, sc.lab.on(t, disk.Fork()), may, must...)
}

// with is a set of checkpoints and one more.
func with(m map[int]*tiertest.Stream, n int, s *tiertest.Stream) map[int]*tiertest.Stream {
	c := map[int]*tiertest.Stream{n: s}
	for k, v := range m {
		c[k] = v
	}
	return c
}

// everyOp calls fn with 0, 1, … until it says that the operation with this
// number does not come any more, and returns how many there are.
func everyOp(t *testing.T, fn func(t *testing.T, n int) (more bool)) int {
	t.Helper()
	for n := 0; ; n++ {
		var more bool
		t.Run(fmt.Sprint(n), func(t *testing.T) { more = fn(t, n) })
		if t.Failed() || !more {
			return n
		}
	}
}

// TestKillSave ends the process at every operation of a save.
func TestKillSave(t *testing.T) {
	for name, earlier := range map[string]int{"first": 0, "second": 1} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			sc := newScene(t, earlier)
			s := small(50)
			if earlier > 0 {
				s = grown(1) // which refers to the first
			}
			may := with(sc.before, earlier+1, s)
			o := smallOptions(t, s)
			n := everyOp(t, func(t *testing.T, n int) bool {
				disk, l := sc.run(t)
				disk.KillAt(n)
				var answers bytes.Buffer
				o.ReturnPath = &answers
				_, _, err := l.trySave(s, o)
				must := []int{1}[:earlier]
				if err == nil {
					must = append(must, earlier+1)
				}
				if saidYes(answers.Bytes()) != (err == nil) {
					t.Errorf("save: %v; SHUT with 0: %v", err, saidYes(answers.Bytes()))
				}
				sc.survives(t, disk, may, must...)
				return disk.Killed()
			})
			if n < 25 {
				t.Errorf("the save had only %d operations", n)
			}
		})
	}
}

// saidYes tells whether answers on a return path end in SHUT with value 0.
func saidYes(b []byte) bool { return bytes.HasSuffix(b, returnpath.AppendShut(nil, 0)) }

// TestKillOpen ends the process at every operation of making a store.
func TestKillOpen(t *testing.T) {
	everyOp(t, func(t *testing.T, n int) bool {
		disk := crashfs.New(0)
		disk.KillAt(n)
		_, err := store.Open(context.Background(), disk, "/store", true)
		for seed := range uint64(4) {
			next := disk.CrashClone(seed)
			if err == nil {
				if _, err := store.Open(context.Background(), next, "/store", false); err != nil {
					t.Errorf("a store that was there is not: %v", err)
				}
			}
			// What is half made can be made.
			l := newLab(t, next, "/")
			if rep, err := l.st.GC(context.Background()); err != nil {
				t.Errorf("gc: %+v, %v", rep, err)
			}
			l.save(t, small(1), save.Options{})
		}
		return disk.Killed()
	})
}

// answered is a return path that knows what the disk had done when SHUT came.
type answered struct {
	bytes.Buffer
	disk *crashfs.FS
	ops  []crashfs.Op
}

func (a *answered) Write(b []byte) (int, error) {
	a.ops = a.disk.Ops()
	return a.Buffer.Write(b)
}

// durable tells whether the last rename to a checkpoint's name was followed by
// a sync of its directory.
func durable(ops []crashfs.Op) bool {
	renamed := -1
	for i, op := range ops {
		if op.Kind == crashfs.Rename && strings.HasSuffix(op.Name, ".flic") {
			renamed = i
		}
		if op.Kind == crashfs.SyncDir && strings.HasSuffix(op.Name, "vms/vm") && renamed >= 0 {
			return true
		}
	}
	return false
}

// TestShutAfterCommit checks the order of a save that goes well.
func TestShutAfterCommit(t *testing.T) {
	sc := newScene(t, 1)
	disk, l := sc.run(t)
	s := small(2)
	o := smallOptions(t, s)
	a := &answered{disk: disk}
	o.ReturnPath = a
	l.save(t, s, o)
	if !saidYes(a.Bytes()) || !durable(a.ops) {
		t.Errorf("SHUT came before the commit: %v", a.ops)
	}
	// The commit itself comes after all data.
	var synced, renamed int
	for i, op := range a.ops {
		switch {
		case op.Kind == crashfs.Sync && strings.HasSuffix(op.Name, ".part"), op.Kind == crashfs.MapSync:
			synced = i
		case op.Kind == crashfs.Write && strings.HasSuffix(op.Name, ".part") && renamed == 0:
			if synced > i {
				t.Errorf("%v after the sync", op)
			}
		case op.Kind == crashfs.Rename && strings.HasSuffix(op.Name, ".flic"):
			renamed = i
		}
	}
	if renamed == 0 || synced > renamed {
		t.Errorf("renamed at %d, synced at %d: %v", renamed, synced, a.ops)
	}
}

// faultsAt are the ways in which the n-th operation can fail.
var faultsAt = map[string]struct {
	err error
	arm func(disk *crashfs.FS, n int)
}{
	"EIO":          {syscall.EIO, func(d *crashfs.FS, n int) { d.FailAt(n, syscall.EIO) }},
	"EIO for good": {syscall.EIO, func(d *crashfs.FS, n int) { d.FailFrom(n, syscall.EIO) }},
	"EIO twice": {syscall.EIO, func(d *crashfs.FS, n int) {
		d.FailAt(n, syscall.EIO)
		d.FailAt(n+1, syscall.EIO)
	}},
	"ENOSPC":          {syscall.ENOSPC, func(d *crashfs.FS, n int) { d.FailAt(n, syscall.ENOSPC) }},
	"ENOSPC for good": {syscall.ENOSPC, func(d *crashfs.FS, n int) { d.FailFrom(n, syscall.ENOSPC) }},
	"short write":     {syscall.ENOSPC, func(d *crashfs.FS, n int) { d.ShortWriteAt(n) }},
}

// TestFailSave lets every operation of a save fail: the save fails with that
// error, the source is told if it waits for an answer, nothing is visible, and
// the space comes back.
func TestFailSave(t *testing.T) {
	for name, fault := range faultsAt {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			sc := newScene(t, 1)
			s := grown(1)
			o := smallOptions(t, s)
			n := everyOp(t, func(t *testing.T, n int) bool {
				disk, l := sc.run(t)
				before := len(disk.Ops())
				fault.arm(disk, n)
				a := &answered{disk: disk}
				o.ReturnPath = a
				ref, _, err := l.trySave(s, o)
				if err == nil {
					// Only what is done with the checkpoint before may fail without
					// consequences: its NVRAM part is mapped, and that of the new one
					// is not. So may what is done with the index of shared pages.
					if ops := disk.Ops()[before:]; len(ops) > n && !strings.Contains(ops[n].Name, "/share/") && fault.err != syscall.ENOSPC && ops[n].Kind != crashfs.Lock && ops[n].Kind != crashfs.Map {
						t.Errorf("%v failed and the save did not", ops[n])
					}
					disk.Heal()
					sc.check(t, l, with(sc.before, ref.N, s), 1, ref.N)
					return len(disk.Ops())-before > n
				}
				if !errors.Is(err, fault.err) {
					t.Errorf("save: %v", err)
				}
				if opened := a.Len() > 0; saidYes(a.Bytes()) || opened && !bytes.HasSuffix(a.Bytes(), returnpath.AppendShut(nil, 1)) {
					t.Errorf("answers to the source: %x", a.Bytes())
				}
				disk.Heal()
				l.noLeaks(t)
				if store.IsUncertain(err) {
					// Nobody can say what a power cut will show, but it is whole.
					sc.survives(t, disk, with(sc.before, 2, s), 1)
				} else {
					sc.survives(t, disk, sc.before, 1)
				}
				return true
			})
			if n < 25 {
				t.Errorf("the save had only %d operations", n)
			}
		})
	}
}

// TestFailRead lets every read of a save fail.
func TestFailRead(t *testing.T) {
	sc := newScene(t, 1)
	s := grown(1)
	o := smallOptions(t, s)
	var failed int
	for n := range 200 {
		disk, l := sc.run(t)
		disk.FailReadAt(n, syscall.EIO)
		ref, _, err := l.trySave(s, o)
		may := sc.before
		if err == nil {
			may = with(may, ref.N, s)
		} else if failed++; !errors.Is(err, syscall.EIO) {
			t.Errorf("read %d: %v", n, err)
		}
		disk.Heal()
		sc.check(t, l, may, 1)
		if t.Failed() {
			t.Fatalf("read %d", n)
		}
	}
	if failed < 10 {
		t.Errorf("only %d reads made the save fail", failed)
	}
}

// TestKillRemove ends the process at every operation of a removal. Whatever
// became of it, the number is not given out again.
func TestKillRemove(t *testing.T) {
	for _, victim := range []int{1, 2} {
		t.Run(fmt.Sprint(victim), func(t *testing.T) {
			t.Parallel()
			sc := newScene(t, 2)
			next := small(60)
			everyOp(t, func(t *testing.T, n int) bool {
				disk, l := sc.run(t)
				disk.KillAt(n)
				err := l.remove(store.Ref{VM: "vm", N: victim})
				after := func(fsys *crashfs.FS) {
					t.Helper()
					l := sc.lab.on(t, fsys)
					ns := sc.check(t, l, sc.before, 3-victim)
					if err == nil && len(ns) != 1 {
						t.Errorf("removed, and back again: %v", ns)
					}
					ref, _ := l.save(t, next, save.Options{})
					if ref.N != 3 {
						t.Errorf("the next checkpoint is %v", ref)
					}
				}
				for seed := range uint64(4) {
					after(disk.CrashClone(seed))
				}
				after(disk.Fork())
				return disk.Killed()
			})
		})
	}
}

// TestFailRemove lets every operation of a removal fail.
func TestFailRemove(t *testing.T) {
	sc := newScene(t, 2)
	for name, fault := range faultsAt {
		t.Run(name, func(t *testing.T) {
			everyOp(t, func(t *testing.T, n int) bool {
				disk, l := sc.run(t)
				before := len(disk.Ops())
				fault.arm(disk, n)
				err := l.remove(store.Ref{VM: "vm", N: 2})
				ops := disk.Ops()[before:]
				hit := len(ops) > n
				if err != nil && !errors.Is(err, fault.err) ||
					err == nil && hit && fault.err == syscall.EIO && !strings.HasSuffix(ops[n].Name, ".touched") {
					t.Errorf("remove: %v", err)
				}
				disk.Heal()
				sc.survives(t, disk, sc.before, 1)
				return hit
			})
		})
	}
}

// TestKillGC leaves a dead save behind and ends the gc that cleans up after it
// at every operation.
func TestKillGC(t *testing.T) {
	sc := newScene(t, 1)
	s := small(50)
	disk, l := sc.run(t)
	// The save dies when all its data is there and only the rename is missing.
	ops := len(disk.Ops())
	l.save(t, s, smallOptions(t, s))
	rename := slices.IndexFunc(disk.Ops()[ops:], func(op crashfs.Op) bool {
		return op.Kind == crashfs.Rename && strings.HasSuffix(op.Name, ".flic")
	})
	disk, l = sc.run(t)
	disk.KillAt(rename)
	if _, _, err := l.trySave(s, smallOptions(t, s)); !errors.Is(err, crashfs.ErrKilled) {
		t.Fatal(err)
	}
	dead := disk.Fork()
	rep, err := sc.lab.on(t, dead.CrashClone(7)).st.GC(context.Background())
	if err != nil || rep.NVRAMExtents == 0 {
		t.Fatalf("there is nothing for gc to do: %+v, %v", rep, err)
	}
	n := everyOp(t, func(t *testing.T, n int) bool {
		disk := dead.CrashClone(7)
		l := sc.lab.on(t, disk)
		disk.KillAt(n)
		l.st.GC(context.Background())
		sc.survives(t, disk, sc.before, 1)
		return disk.Killed()
	})
	if n < 5 {
		t.Errorf("gc had only %d operations", n)
	}
	for name, fault := range faultsAt {
		t.Run(name, func(t *testing.T) {
			everyOp(t, func(t *testing.T, n int) bool {
				disk := dead.CrashClone(7)
				l := sc.lab.on(t, disk)
				before := len(disk.Ops())
				fault.arm(disk, n)
				rep, err := l.st.GC(context.Background())
				ops := disk.Ops()[before:]
				hit := len(ops) > n
				// What can't be locked is left alone, whatever the reason.
				if hit && err == nil && len(rep.Warnings) == 0 && fault.err == syscall.EIO && ops[n].Kind != crashfs.Lock {
					t.Errorf("nothing was said of the failed %v", ops[n])
				}
				disk.Heal()
				sc.survives(t, disk, sc.before, 1)
				return hit
			})
		})
	}
}

// TestReferToUnsynced has a save of one VM refer to a checkpoint of another's that a killed
// process has left, visible and not durable: after a power cut that the second one survives
// what it refers to is there, too.
func TestReferToUnsynced(t *testing.T) {
	begin := func() (*crashfs.FS, *lab) {
		disk := crashfs.New(0)
		l := newLab(t, disk, "/")
		l.save(t, small(3), save.Options{VM: "a"}) // the folder is there, and durable
		return disk, l
	}
	parent := save.Options{VM: "a", Parent: save.ParentNone}
	disk, l := begin()
	ops := len(disk.Ops())
	l.save(t, small(1), parent)
	rename := slices.IndexFunc(disk.Ops()[ops:], func(op crashfs.Op) bool {
		return op.Kind == crashfs.Rename && strings.HasSuffix(op.Name, ".flic")
	})
	disk, l = begin()
	disk.KillAt(rename + 1)
	if _, _, err := l.trySave(small(1), parent); !errors.Is(err, crashfs.ErrKilled) {
		t.Fatal(err)
	}
	disk = disk.Fork()
	l = l.on(t, disk)
	s := grown(1)
	ops = len(disk.Ops())
	ref, meta := l.save(t, s, save.Options{VM: "b", Parent: "a@2"})
	if len(meta.References) == 0 {
		t.Fatal("it refers to nothing")
	}
	// Of two names that went from the same folder to others a file system keeps the first, as
	// a rule, if it keeps the second. None has to.
	done := disk.Ops()[ops:]
	synced := slices.IndexFunc(done, func(op crashfs.Op) bool { return op.Kind == crashfs.SyncDir && op.Name == "/store/vms/a" })
	commit := slices.IndexFunc(done, func(op crashfs.Op) bool {
		return op.Kind == crashfs.Rename && op.Name == "/store/vms/b/00000001.flic"
	})
	if synced < 0 || synced > commit {
		t.Errorf("the name of what it refers to is not durable when it gets its own: %v", done)
	}
	for seed := range uint64(32) {
		l := l.on(t, disk.CrashClone(seed))
		l.holds(t, ref, s)
		l.noLeaks(t)
	}
}
