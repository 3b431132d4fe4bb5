package tier_test

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/nvram"
	"github.com/flic-migrate/flic-migrate/tier/restore"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/source"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/tiertest/chain"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
	"github.com/flic-migrate/flic-migrate/tier/vfs/crashfs"
)

// taken is what the files of a store take, but for the documents in it, and what is
// taken of NVRAM.
func (l *lab) taken(t testing.TB) (flash, hot int64) {
	t.Helper()
	for _, name := range l.tree(t) {
		if !strings.HasPrefix(name, "vms/") && !strings.HasPrefix(name, "tmp/") {
			continue
		}
		f, err := l.fs.Open(filepath.Join(l.dir, name))
		if err != nil {
			t.Fatal(err)
		}
		n, err := f.Allocated()
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		flash += n
	}
	if _, err := l.fs.Stat(l.nvram); err != nil {
		return flash, 0
	}
	f, err := nvram.Open(t.Context(), l.fs, l.nvram, nvram.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	owners, err := f.Owners(t.Context(), l.st.UUID())
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range owners {
		hot += int64(o.Extents) * nvram.ExtentSize
	}
	return flash, hot
}

// listed holds each listed checkpoint to what a model says of it, and each of the model
// that must be there.
func (l *lab) listed(t testing.TB, model map[store.Ref]*tiertest.Stream, must ...store.Ref) {
	t.Helper()
	refs, err := l.st.List(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	for _, ref := range refs {
		if model[ref] == nil {
			t.Fatalf("%v came from nowhere", ref)
		}
		l.holds(t, ref, model[ref])
	}
	for _, ref := range must {
		if !slices.Contains(refs, ref) {
			t.Errorf("%v is gone", ref)
		}
	}
}

// chainModel is what a chain's checkpoints hold.
func chainModel(list []chain.Checkpoint) map[store.Ref]*tiertest.Stream {
	model := map[store.Ref]*tiertest.Stream{}
	for _, c := range list {
		model[c.Ref] = c.Stream
	}
	return model
}

// TestSpaceBack removes the checkpoints of a chain in every order. What removals say
// that they have freed is what the disk has more, gc finds nothing to do after them, and
// in the end all is free.
func TestSpaceBack(t *testing.T) {
	trimmed := false
	for _, order := range [][]int{{0, 1, 2, 3}, {3, 2, 1, 0}, {1, 3, 0, 2}, {2, 0, 3, 1}, {0, 3, 1, 2}} {
		l := newLab(t, crashfs.New(0), "/")
		list := chain.Build(t, l.st, chain.Options{Seed: 3, Streams: generations(3, 4, chainBlocks), Codec: image.None, NVRAM: l.nvram, Deltas: 0.5, Scattered: 0.1})
		model := chainModel(list)
		for _, i := range order {
			flash, hot := l.taken(t)
			says, err := l.st.Sharing(t.Context(), list[i].Ref)
			if err != nil {
				t.Fatal(err)
			}
			rm, err := l.st.Remove(t.Context(), list[i].Ref)
			if err != nil || rm.Left != nil {
				t.Fatalf("%v: %+v, %v", order, rm, err)
			}
			if d := says.RmFrees.Flash - rm.FlashBytes; d < -8*4096 || d > 8*4096 || says.RmFrees.NVRAM != rm.NVRAMBytes || len(says.HeldFor) != len(rm.Kept) {
				t.Errorf("%v: of %d it was said %+v, and it is %+v", order, i, says, rm)
			}
			if len(rm.Kept) > 0 && (says.Held.Flash == 0 || says.Held.Flash > flash) || len(says.RefersTo) != len(list[i].Needs) {
				t.Errorf("%v: %d: %+v", order, i, says)
			}
			delete(model, list[i].Ref)
			nowFlash, nowHot := l.taken(t)
			// A file's last block is not full.
			if got := flash - nowFlash; got < rm.FlashBytes || got > rm.FlashBytes+4*4096 {
				t.Errorf("%v: removal of %d says %d bytes, and %d are free", order, i, rm.FlashBytes, got)
			}
			if hot-nowHot != rm.NVRAMBytes {
				t.Errorf("%v: removal of %d says %d bytes of NVRAM, and %d are free", order, i, rm.NVRAMBytes, hot-nowHot)
			}
			trimmed = trimmed || len(rm.Kept) > 0 && rm.FlashBytes > 0
			rep, err := l.st.GC(t.Context())
			if err != nil || rep.Removed+rep.Trimmed+rep.NVRAMExtents != 0 || len(rep.Warnings) != 0 {
				t.Errorf("%v: gc after the removal of %d: %+v, %v", order, i, rep, err)
			}
			l.listed(t, model)
		}
		if flash, hot := l.taken(t); flash != 0 || hot != 0 {
			t.Errorf("%v: %d bytes of flash and %d of NVRAM are not free: %v", order, flash, hot, l.tree(t))
		}
		l.noLeaks(t)
	}
	if !trimmed {
		t.Error("no removal has freed a part of an image")
	}
}

// smallChain makes a chain that is soon restored, in a scene of its own.
func smallChain(t *testing.T) (*crashfs.FS, *lab, []chain.Checkpoint) {
	t.Helper()
	disk := crashfs.New(0)
	l := newLab(t, disk, "/")
	blocks := []tiertest.Block{{Name: "pc.ram", Size: 160 << 10}, {Name: "rom", Size: 32 << 10}}
	streams := generations(5, 3, blocks)
	for i := range streams {
		// Much changes, so that there is something in each that nobody needs.
		streams[i].Passes, streams[i].Resend = 1+2*i, 0.5
	}
	list := chain.Build(t, l.st, chain.Options{Seed: 5, Streams: streams, Codec: image.None, NVRAM: l.nvram, Deltas: 0.2, Segment: func(int) int { return 2 }})
	return disk, l, list
}

// everyCrash does something on copies of a disk that dies, or fails, at each of its
// operations, and calls check with what the next process finds, at once and after a power
// cut; err is what was done came to.
func everyCrash(t *testing.T, disk *crashfs.FS, l *lab, do func(l *lab) error, check func(t *testing.T, l *lab, err error)) {
	t.Helper()
	n := everyOp(t, func(t *testing.T, n int) bool {
		disk := disk.CrashClone(1)
		at := l.on(t, disk)
		disk.KillAt(n)
		err := do(at)
		for seed := range uint64(3) {
			check(t, l.on(t, disk.CrashClone(seed)), err)
		}
		check(t, l.on(t, disk.Fork()), err)
		return disk.Killed()
	})
	if n < 3 {
		t.Errorf("only %d operations", n)
	}
	for _, name := range []string{"EIO", "EIO for good", "ENOSPC", "short write"} {
		fault := faultsAt[name]
		t.Run(name, func(t *testing.T) {
			everyOp(t, func(t *testing.T, n int) bool {
				disk := disk.CrashClone(1)
				at := l.on(t, disk)
				before := len(disk.Ops())
				fault.arm(disk, n)
				err := do(at)
				hit := len(disk.Ops())-before > n
				disk.Heal()
				at.noLeaks(t)
				check(t, l.on(t, disk.CrashClone(2)), err)
				check(t, at, err)
				return hit
			})
		})
	}
}

// TestCrashRemoveReferred ends and fails removals of checkpoints that others refer to,
// and of the last that refers to removed ones.
func TestCrashRemoveReferred(t *testing.T) {
	disk, l, list := smallChain(t)
	model := chainModel(list)
	for _, before := range [][]int{nil, {0}, {0, 1}} {
		t.Run(fmt.Sprint(before), func(t *testing.T) {
			disk := disk.CrashClone(1)
			l := l.on(t, disk)
			left := []store.Ref{list[0].Ref, list[1].Ref, list[2].Ref}
			for _, i := range before {
				if err := l.remove(list[i].Ref); err != nil {
					t.Fatal(err)
				}
				left = left[1:]
			}
			everyCrash(t, disk, l, func(l *lab) error {
				_, err := l.st.Remove(t.Context(), left[0])
				return err
			}, func(t *testing.T, l *lab, err error) {
				t.Helper()
				l.listed(t, model, left[1:]...)
				if rep, err := l.st.GC(t.Context()); err != nil || len(rep.Warnings) > 0 {
					t.Errorf("gc: %+v, %v", rep, err)
				}
				l.listed(t, model, left[1:]...)
				if rep, err := l.st.GC(t.Context()); err != nil || rep.Removed+rep.Trimmed+rep.NVRAMExtents > 0 {
					t.Errorf("a second gc: %+v, %v", rep, err)
				}
				refs, _ := l.st.List(t.Context(), "")
				if err == nil && slices.Contains(refs, left[0]) {
					t.Error("removed, and there again")
				}
				if flash, hot := l.taken(t); len(refs) == 0 && (flash != 0 || hot != 0) {
					t.Errorf("%d bytes of flash and %d of NVRAM are not free", flash, hot)
				}
			})
		})
	}
}

// TestCrashFreeReferred ends and fails gc when a removal that was cut off has left it
// something to free of what others need.
func TestCrashFreeReferred(t *testing.T) {
	disk, l, list := smallChain(t)
	model := chainModel(list)
	// The removal dies when the image is not listed any more.
	probe := disk.CrashClone(1)
	at := l.on(t, probe)
	before := len(probe.Ops())
	if err := at.remove(list[0].Ref); err != nil {
		t.Fatal(err)
	}
	punch := slices.IndexFunc(probe.Ops()[before:], func(op crashfs.Op) bool { return op.Kind == crashfs.Punch && strings.HasSuffix(op.Name, ".gone") })
	if punch < 0 {
		t.Fatalf("the removal punches nothing: %v", probe.Ops()[before:])
	}
	dead := disk.CrashClone(1)
	at = l.on(t, dead)
	dead.KillAt(punch)
	at.st.Remove(t.Context(), list[0].Ref)
	scene := dead.Fork()
	if rep, err := l.on(t, scene.CrashClone(1)).st.GC(t.Context()); err != nil || rep.Trimmed != 1 || rep.TrimmedBytes == 0 {
		t.Fatalf("there is nothing for gc to do: %+v, %v", rep, err)
	}
	left := []store.Ref{list[1].Ref, list[2].Ref}
	everyCrash(t, scene, l, func(l *lab) error {
		_, err := l.st.GC(t.Context())
		return err
	}, func(t *testing.T, l *lab, _ error) {
		t.Helper()
		l.listed(t, model, left...)
		if rep, err := l.st.GC(t.Context()); err != nil || len(rep.Warnings) > 0 {
			t.Errorf("gc: %+v, %v", rep, err)
		}
		l.listed(t, model, left...)
	})
}

// unpunched is a file system that can't punch holes.
type unpunched struct{ vfs.FS }

func (u unpunched) NoLinks(dir string) (vfs.FS, error) {
	fsys, err := u.FS.NoLinks(dir)
	return unpunched{fsys}, err
}

func (u unpunched) OpenRW(name string) (vfs.File, error) {
	f, err := u.FS.OpenRW(name)
	if err != nil {
		return nil, err
	}
	return unpunchedFile{f}, nil
}

type unpunchedFile struct{ vfs.File }

func (unpunchedFile) Punch(int64, int64) error {
	return fmt.Errorf("%w (%w)", errors.ErrUnsupported, syscall.EOPNOTSUPP)
}

// TestNoHoles: where no holes can be punched an image stays as a whole until nobody
// needs it, and nothing is lost.
func TestNoHoles(t *testing.T) {
	disk, l, list := smallChain(t)
	model := chainModel(list)
	l = l.on(t, unpunched{disk})
	for i, c := range list {
		rm, err := l.st.Remove(t.Context(), c.Ref)
		if err != nil || rm.Left != nil || i < 2 && rm.FlashBytes != 0 {
			t.Errorf("%d: %+v, %v", i, rm, err)
		}
		delete(model, c.Ref)
		if rep, err := l.st.GC(t.Context()); err != nil || len(rep.Warnings) > 0 || rep.Trimmed > 0 {
			t.Errorf("%d: %+v, %v", i, rep, err)
		}
		l.listed(t, model)
	}
	if flash, hot := l.taken(t); flash != 0 || hot != 0 {
		t.Errorf("%d bytes of flash and %d of NVRAM are not free", flash, hot)
	}
}

// TestHeldNVRAM: gc gives away no NVRAM of a removed checkpoint while somebody has it
// open, who is about to refer to it.
func TestHeldNVRAM(t *testing.T) {
	disk, l, list := smallChain(t)
	for _, c := range list[:2] {
		if err := l.remove(c.Ref); err != nil {
			t.Fatal(err)
		}
	}
	_, was := l.taken(t)
	tx, err := l.on(t, disk.Fork()).st.Begin(t.Context(), "other")
	if err != nil {
		t.Fatal(err)
	}
	if err := tx.Refer(t.Context(), list[0].UUID, list[1].UUID); err != nil {
		t.Fatal(err)
	}
	rm, err := l.st.Remove(t.Context(), list[2].Ref)
	if err != nil || rm.Left != nil {
		t.Fatal(rm, err)
	}
	if rep, err := l.st.GC(t.Context()); err != nil || rep.Removed != 0 {
		t.Errorf("%+v, %v", rep, err)
	}
	if _, hot := l.taken(t); hot != was-rm.NVRAMBytes || hot == 0 {
		t.Errorf("%d bytes of NVRAM are taken, and were %d", hot, was)
	}
	tx.Abort()
	if _, err := l.st.GC(t.Context()); err != nil {
		t.Error(err)
	}
	if flash, hot := l.taken(t); flash != 0 || hot != 0 {
		t.Errorf("%d bytes of flash and %d of NVRAM are not free", flash, hot)
	}
}

// TestOpenWhileFreed opens a checkpoint while a process has what it refers to locked for
// the moment that a removal takes.
func TestOpenWhileFreed(t *testing.T) {
	disk, l, list := smallChain(t)
	if err := l.remove(list[0].Ref); err != nil {
		t.Fatal(err)
	}
	f, err := disk.Fork().Open(l.dir + "/vms/vm/00000001.gone")
	if err != nil {
		t.Fatal(err)
	}
	if err := f.TryLock(vfs.Exclusive); err != nil {
		t.Fatal(err)
	}
	opened := make(chan error)
	go func() {
		c, err := l.st.OpenCheckpoint(t.Context(), list[2].Ref, checkpoint.Options{})
		if err == nil {
			err = c.Close()
		}
		opened <- err
	}()
	select {
	case err := <-opened:
		t.Fatalf("open of what is locked: %v", err)
	default:
	}
	f.Close()
	if err := <-opened; err != nil {
		t.Error(err)
	}
}

// flatten makes a checkpoint independent.
func (l *lab) flatten(ref store.Ref) (store.Removed, *checkpoint.Meta, error) {
	return l.st.Flatten(context.Background(), ref, store.CopyOptions{Codec: image.LZ4, Workers: 1})
}

// hookedFS is a process that stops for a moment where a test wants it to.
type hookedFS struct {
	vfs.FS
	locking func() // before the store lock is taken
	listed  func() // after a folder of images was listed
}

func (h *hookedFS) NoLinks(dir string) (vfs.FS, error) {
	fsys, err := h.FS.NoLinks(dir)
	h.FS = fsys
	return h, err
}

func (h *hookedFS) Lock(ctx context.Context, name string, mode vfs.LockMode) (vfs.Locked, error) {
	if h.locking != nil && strings.HasSuffix(name, "/store/lock") {
		h.locking()
	}
	return h.FS.Lock(ctx, name, mode)
}

func (h *hookedFS) ReadStamps(dir string, look func(string) bool) ([]vfs.Stamped, error) {
	list, err := h.FS.ReadStamps(dir, look)
	if h.listed != nil && strings.Contains(dir, "/vms/") {
		h.listed()
	}
	return list, err
}

// nth calls fn at the n-th call of what it returns.
func nth(n int, fn func()) func() {
	return func() {
		if n--; n == 0 {
			fn()
		}
	}
}

// TestRemoveWhileFlattened has a removal lock an image that a flattening then puts another
// in the place of: the removal is not of that one, which somebody reads.
func TestRemoveWhileFlattened(t *testing.T) {
	disk, l, list := smallChain(t)
	ref, want := list[2].Ref, chainModel(list)[list[2].Ref]
	locked, flattened, removed := make(chan struct{}), make(chan struct{}), make(chan error)
	remover := l.on(t, &hookedFS{FS: disk.Fork()})
	flattener := l.on(t, &hookedFS{FS: disk.Fork()})
	remover.fs.FS.(*hookedFS).locking = nth(2, func() { // it has the image, and goes to take its name away
		close(locked)
		<-flattened
	})
	flattener.fs.FS.(*hookedFS).locking = nth(3, func() { // the copy is made, and goes to its place
		go func() {
			_, err := remover.st.Remove(t.Context(), ref)
			removed <- err
		}()
		<-locked
	})
	if _, _, err := flattener.flatten(ref); err != nil {
		t.Fatal(err)
	}
	c, err := l.st.OpenCheckpoint(t.Context(), ref, checkpoint.Options{})
	if err != nil {
		t.Fatal(err)
	}
	close(flattened)
	if err := <-removed; !errors.Is(err, store.ErrInUse) {
		t.Errorf("removal of what somebody reads: %v", err)
	}
	cmp := &tiertest.Compare{R: want.Expected()}
	if _, err := restore.Run(t.Context(), c.Checkpoint, cmp, restore.Options{}); err != nil {
		t.Error(err)
	} else if err := cmp.Close(); err != nil {
		t.Error(err)
	}
	c.Close()
	for _, c := range list {
		if err := l.remove(c.Ref); err != nil {
			t.Error(err)
		}
	}
	if rep, err := l.st.GC(t.Context()); err != nil || len(rep.Warnings) > 0 {
		t.Errorf("gc: %+v, %v", rep, err)
	}
	if flash, hot := l.taken(t); flash != 0 || hot != 0 {
		t.Errorf("%d bytes of flash and %d of NVRAM are not free", flash, hot)
	}
}

// TestGCWhileFlattened flattens a checkpoint while gc looks for who owns what is in NVRAM:
// the old image, which others need, is then neither where it was nor among those that
// were removed before.
func TestGCWhileFlattened(t *testing.T) {
	disk, l, list := smallChain(t)
	model := chainModel(list)
	h := &hookedFS{FS: disk.Fork()}
	collector := l.on(t, h)
	h.listed = nth(1, func() {
		if _, _, err := l.flatten(list[1].Ref); err != nil {
			t.Error(err)
		}
	})
	if rep, err := collector.st.GC(t.Context()); err != nil || len(rep.Warnings) > 0 {
		t.Errorf("%+v, %v", rep, err)
	}
	l.listed(t, model)
}

// TestSharingLost loses the note that there are references, as a backup of the images alone
// does, or finds it damaged: what others need stays all the same, and nothing else fails.
func TestSharingLost(t *testing.T) {
	name := func(l *lab) string { return filepath.Join(l.dir, "sharing.json") }
	t.Run("lost", func(t *testing.T) {
		testSharingLost(t, func(l *lab) error { return l.fs.Remove(name(l)) })
	})
	t.Run("damaged", func(t *testing.T) {
		testSharingLost(t, func(l *lab) error {
			if err := l.fs.Remove(name(l)); err != nil {
				return err
			}
			f, err := l.fs.Create(name(l))
			if err != nil {
				return err
			}
			_, err = f.WriteAt([]byte("garbage"), 0)
			return errors.Join(err, f.Close())
		})
	})
}

func testSharingLost(t *testing.T, loseIt func(*lab) error) {
	_, l, list := smallChain(t)
	model := chainModel(list)
	lose := func() {
		t.Helper()
		if err := loseIt(l); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.remove(list[0].Ref); err != nil {
		t.Fatal(err)
	}
	delete(model, list[0].Ref)
	lose()
	if rep, err := l.st.GC(t.Context()); err != nil || len(rep.Warnings) > 0 {
		t.Errorf("gc: %+v, %v", rep, err)
	}
	l.listed(t, model, list[1].Ref, list[2].Ref)
	if err := l.remove(list[1].Ref); err != nil {
		t.Fatal(err)
	}
	delete(model, list[1].Ref)
	l.listed(t, model, list[2].Ref)
	if err := l.remove(list[2].Ref); err != nil {
		t.Fatal(err)
	}
	if rep, err := l.st.GC(t.Context()); err != nil || len(rep.Warnings) > 0 {
		t.Errorf("gc: %+v, %v", rep, err)
	}
	if flash, hot := l.taken(t); flash != 0 || hot != 0 {
		t.Errorf("%d bytes of flash and %d of NVRAM are not free", flash, hot)
	}
}

// TestReferredBesideRemains has, where an image that others refer to once was, what a power
// cut leaves of another one that was being emptied: the one that is referred to is found.
func TestReferredBesideRemains(t *testing.T) {
	_, l, list := smallChain(t)
	if _, _, err := l.flatten(list[0].Ref); err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(l.dir, "vms", list[0].Ref.VM, fmt.Sprintf("%08d.gone", list[0].Ref.N))
	f, err := l.fs.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteAt(make([]byte, 8<<10), 0)
	if err := errors.Join(err, f.Sync(), f.Close(), l.fs.SyncDir(filepath.Dir(name))); err != nil {
		t.Fatal(err)
	}
	for _, c := range list {
		for _, err := range l.verify(c.Ref) {
			t.Errorf("%v: %v", c.Ref, err)
		}
	}
	if err := l.remove(list[0].Ref); err != nil {
		t.Fatal(err)
	}
	if rep, err := l.st.GC(t.Context()); err != nil || len(rep.Warnings) > 0 {
		t.Errorf("gc: %+v, %v", rep, err)
	}
	l.listed(t, chainModel(list), list[1].Ref, list[2].Ref)
}

// TestBorrowFlattened borrows an image of which something was freed that a replaced image
// needed. That somebody has that one open brings nothing back.
func TestBorrowFlattened(t *testing.T) {
	_, l, list := smallChain(t)
	ctx := t.Context()
	needs := func(i int) source.Ranges {
		t.Helper()
		c, err := l.st.OpenCheckpoint(ctx, list[i].Ref, checkpoint.Options{})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		for _, r := range c.References() {
			if r.UUID == list[0].UUID {
				return r.NeedSegments
			}
		}
		t.Fatalf("%v does not refer to the first", list[i].Ref)
		return nil
	}
	second, third := needs(1), needs(2)
	if len(second.Minus(third)) == 0 {
		t.Fatal("the second needs nothing that the third does not need")
	}
	if _, _, err := l.flatten(list[1].Ref); err != nil {
		t.Fatal(err)
	}
	if err := l.remove(list[0].Ref); err != nil {
		t.Fatal(err)
	}
	if rep, err := l.st.GC(ctx); err != nil || len(rep.Warnings) > 0 {
		t.Fatalf("gc: %+v, %v", rep, err)
	}
	tx, err := l.st.Begin(ctx, "other")
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Abort()
	if _, err := tx.Borrow(ctx, list[1].Ref, list[1].UUID); err != nil {
		t.Fatal(err)
	}
	b, err := tx.Borrow(ctx, list[0].Ref, list[0].UUID)
	if err != nil {
		t.Fatal(err)
	}
	if b.Whole || !slices.Equal(b.Segments, third) {
		t.Errorf("segments %v of a removed image (whole: %v) can be had, want %v", b.Segments, b.Whole, third)
	}
}

// TestFlatten flattens checkpoints that refer to others and that others refer to, in
// every order: all restore as before, and in the end none needs another.
func TestFlatten(t *testing.T) {
	for _, order := range [][]int{{0, 1, 2}, {2, 1, 0}, {1, 0, 2}, {1, 2, 0}} {
		_, l, list := smallChain(t)
		model := chainModel(list)
		for _, i := range order {
			old, meta, err := l.flatten(list[i].Ref)
			if err != nil || old.Left != nil {
				t.Fatalf("%v: %d: %+v, %v", order, i, old, err)
			}
			if meta.UUID == list[i].UUID || meta.Number != list[i].Ref.N || len(meta.References) > 0 || meta.NVRAM != nil {
				t.Errorf("%v: %d: it says %+v", order, i, meta.Identity)
			}
			l.listed(t, model, list[0].Ref, list[1].Ref, list[2].Ref)
			if rep, err := l.st.GC(t.Context()); err != nil || rep.Removed+rep.Trimmed+rep.NVRAMExtents != 0 || len(rep.Warnings) != 0 {
				t.Errorf("%v: gc after %d: %+v, %v", order, i, rep, err)
			}
			if again, same, err := l.flatten(list[i].Ref); err != nil || again.FlashBytes != 0 || same.UUID != meta.UUID {
				t.Errorf("%v: %d again: %+v, %v", order, i, again, err)
			}
		}
		for _, name := range l.tree(t) {
			if strings.HasSuffix(name, ".gone") {
				t.Errorf("%v: %s is left", order, name)
			}
		}
		if _, hot := l.taken(t); hot != 0 {
			t.Errorf("%v: %d bytes of NVRAM are not free", order, hot)
		}
		// A flattened one is removed as any other, its number not used again.
		for _, c := range list {
			if err := l.remove(c.Ref); err != nil {
				t.Error(err)
			}
		}
		if flash, _ := l.taken(t); flash != 0 {
			t.Errorf("%v: %d bytes of flash are not free", order, flash)
		}
		if ref, _ := l.save(t, list[0].Stream, save.Options{}); ref.N != 4 {
			t.Errorf("the next is %v", ref)
		}
		l.noLeaks(t)
	}
}

// TestFlattenRead: who has the old image open reads on, and a save that is about to
// refer to it can.
func TestFlattenRead(t *testing.T) {
	disk, l, list := smallChain(t)
	other := l.on(t, disk.Fork())
	c, err := other.st.OpenCheckpoint(t.Context(), list[1].Ref, checkpoint.Options{})
	if err != nil {
		t.Fatal(err)
	}
	tx, err := other.st.Begin(t.Context(), "other")
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Abort()
	if err := tx.Refer(t.Context(), list[2].UUID); err != nil {
		t.Fatal(err)
	}
	for _, i := range []int{2, 1} {
		if _, _, err := l.flatten(list[i].Ref); err != nil {
			t.Fatal(err)
		}
		if rep, err := l.st.GC(t.Context()); err != nil || len(rep.Warnings) > 0 || rep.Removed > 0 {
			t.Errorf("%+v, %v", rep, err)
		}
	}
	if err := c.Verify(t.Context(), func(err error) { t.Error(err) }); err != nil {
		t.Error(err)
	}
	c.Close()
	if err := tx.Refer(t.Context(), list[2].UUID); err != nil {
		t.Error(err)
	}
	tx.Abort()
	l.listed(t, chainModel(list), list[0].Ref, list[1].Ref, list[2].Ref)
	if rep, err := l.st.GC(t.Context()); err != nil || len(rep.Warnings) > 0 || rep.Removed != 2 {
		t.Errorf("%+v, %v", rep, err)
	}
	l.listed(t, chainModel(list), list[0].Ref, list[1].Ref, list[2].Ref)
}

// TestFlattenOpened: who has opened the old image, and not yet what it refers to, finds that.
func TestFlattenOpened(t *testing.T) {
	disk, l, list := smallChain(t)
	for _, c := range list[:2] {
		if err := l.remove(c.Ref); err != nil {
			t.Fatal(err)
		}
	}
	gone := func() (names []string) {
		for _, name := range l.tree(t) {
			if strings.HasSuffix(name, ".gone") {
				names = append(names, name)
			}
		}
		return names
	}
	needed := gone()
	if len(needed) != 2 {
		t.Fatalf("%q", needed)
	}
	f, err := l.on(t, disk.Fork()).fs.Open(filepath.Join(l.dir, "vms/vm/00000003.flic"))
	if err == nil {
		err = f.TryLock(vfs.Shared)
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := l.flatten(list[2].Ref); err != nil {
		t.Fatal(err)
	}
	for _, name := range needed {
		if !slices.Contains(gone(), name) {
			t.Errorf("%s is gone", name)
		}
	}
	f.Close()
	if rep, err := l.st.GC(t.Context()); err != nil || len(rep.Warnings) > 0 || rep.Removed != 3 {
		t.Errorf("%+v, %v", rep, err)
	}
	if left := gone(); len(left) > 0 {
		t.Errorf("%q", left)
	}
	l.holds(t, list[2].Ref, list[2].Stream)
	l.noLeaks(t)
}

// TestGroupCutOff: what the checkpoints of a group need stays, also while a killed process has
// committed it and given them no names yet: who has had the store open all the time removes
// or flattens.
func TestGroupCutOff(t *testing.T) {
	streams := generations(3, 2, []tiertest.Block{{Name: "pc.ram", Size: 160 << 10}})
	first, second := store.Ref{VM: "vm", N: 1}, store.Ref{VM: "vm", N: 2}
	other := store.Ref{VM: "other", N: 1}
	for name, c := range map[string]struct {
		parent store.Ref
		act    func(l *lab) error
	}{
		"rm":      {first, func(l *lab) error { return l.remove(first) }},
		"flatten": {other, func(l *lab) error { _, _, err := l.flatten(other); return err }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for n, committed := 0, 0; ; n++ {
				disk := crashfs.New(0)
				l := newLab(t, disk, "/")
				l.save(t, tiertest.New(streams[0]), save.Options{VM: first.VM})
				if c.parent == other { // which alone needs the first
					l.save(t, tiertest.New(streams[1]), save.Options{VM: other.VM, Parent: first.String()})
					if err := l.remove(first); err != nil {
						t.Fatal(err)
					}
				}
				process := disk.Fork()
				saver := l.on(t, process)
				saver.trySave(tiertest.New(streams[1]), save.Options{VM: first.VM, Parent: c.parent.String(), Commit: func(ctx context.Context, tx *store.Tx) (store.Ref, error) {
					process.KillAt(n)
					_, err := saver.st.CommitGroup(ctx, store.Group{Name: "g", Mode: "stop"}, []*store.Tx{tx})
					return tx.Ref(), err
				}})
				if err := c.act(l); err != nil && !strings.Contains(err.Error(), "the commit of group g@1 was cut off") {
					t.Errorf("operation %d: %v", n, err)
				}
				next := l.on(t, disk.Fork())
				refs, err := next.st.List(t.Context(), first.VM)
				if err != nil {
					t.Fatal(err)
				}
				if slices.Contains(refs, second) {
					committed++
					next.holds(t, second, tiertest.New(streams[1]))
				}
				if rep, err := next.st.GC(t.Context()); err != nil || len(rep.Warnings) > 0 {
					t.Errorf("operation %d: gc: %+v, %v", n, rep, err)
				}
				next.noLeaks(t)
				if t.Failed() {
					t.Fatalf("at operation %d", n)
				}
				if !process.Killed() {
					if n < 8 || committed < 3 {
						t.Errorf("%d operations, %d times it was committed", n, committed)
					}
					return
				}
			}
		})
	}
}

// TestCrashFlatten ends and fails flattenings at each of their operations.
func TestCrashFlatten(t *testing.T) {
	disk, l, list := smallChain(t)
	model := chainModel(list)
	all := []store.Ref{list[0].Ref, list[1].Ref, list[2].Ref}
	for _, i := range []int{1, 2} {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			everyCrash(t, disk, l, func(l *lab) error {
				_, _, err := l.flatten(list[i].Ref)
				return err
			}, func(t *testing.T, l *lab, _ error) {
				t.Helper()
				l.listed(t, model, all...)
				if rep, err := l.st.GC(t.Context()); err != nil || len(rep.Warnings) > 0 {
					t.Errorf("gc: %+v, %v", rep, err)
				}
				l.listed(t, model, all...)
				for _, ref := range all {
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

// TestTwin: of an image that others need a part is there too, under each of the names that it can
// have, as a power cut brings it back after the whole one was received; or its whole file, as a
// flattening that was cut off leaves it. The checkpoint is flattened, or removed: the others are
// whole, and what they need is there once.
func TestTwin(t *testing.T) {
	for name, end := range map[string]func(l *lab, ref store.Ref) error{
		"flatten": func(l *lab, ref store.Ref) error {
			_, _, err := l.flatten(ref)
			return err
		},
		"rm": func(l *lab, ref store.Ref) error { return l.remove(ref) },
	} {
		for _, kept := range []bool{false, true} {
			for _, part := range []bool{false, true} {
				_, l, list := smallChain(t)
				// It refers to nothing, and the others to it.
				first := list[0]
				own := fmt.Sprintf("/vms/%s/%08d", first.Ref.VM, first.Ref.N)
				twin := own + ".gone"
				if kept {
					twin = fmt.Sprintf("%s.%v.gone", own, first.UUID)
				}
				if part {
					c, err := l.st.OpenCheckpoint(t.Context(), first.Ref, checkpoint.Options{})
					if err != nil {
						t.Fatal(err)
					}
					b := l.file(t, own+".flic")
					clear(b[c.Image.SegmentOffset(0):c.Image.SegmentOffset(uint32(c.Image.Segments()-1))])
					c.Close()
					l.write(t, twin, b)
				} else if err := l.fs.Link(l.dir+own+".flic", l.dir+twin); err != nil {
					t.Fatal(err)
				}
				what := fmt.Sprintf("%s, kept %v, part %v", name, kept, part)
				if err := end(l, first.Ref); err != nil {
					t.Errorf("%s: %v", what, err)
				}
				if rep, err := l.st.GC(t.Context()); err != nil || len(rep.Warnings) > 0 {
					t.Errorf("%s: gc: %+v, %v", what, rep, err)
				}
				for _, c := range list[1:] {
					for _, err := range l.verify(c.Ref) {
						t.Errorf("%s: %v: %v", what, c.Ref, err)
					}
				}
				gone := slices.DeleteFunc(l.tree(t), func(name string) bool { return !strings.HasSuffix(name, ".gone") })
				if len(gone) != 1 {
					t.Errorf("%s: %v", what, gone)
				}
			}
		}
	}
}
