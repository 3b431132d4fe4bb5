package tier_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/digest"
	"github.com/flic-migrate/flic-migrate/tier/disk"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/restore"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
	"github.com/flic-migrate/flic-migrate/tier/vfs/crashfs"
)

// diskImage is a disk image on the file system of a lab, with bytes and holes in it.
const diskImage = "/disk.img"

// imageBytes is what is in it at first.
func imageBytes() []byte {
	b := make([]byte, 2<<20+5000)
	for _, at := range []int{0, 3 << 18, len(b) - 3000} {
		for i := range 2000 {
			b[at+i] = byte(at + i*7 + 1)
		}
	}
	return b
}

// writeImage makes the image.
func writeImage(t testing.TB, fsys vfs.FS, name string) {
	t.Helper()
	f, err := fsys.Create(name)
	if err == nil {
		_, err = f.Write(imageBytes())
	}
	if err == nil {
		err = errors.Join(f.Sync(), fsys.SyncDir(filepath.Dir(name)), f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
}

// saveKept saves a stream with a copy of the image, as a session does.
func (l *lab) saveKept(s *tiertest.Stream, o save.Options, name string) (ref store.Ref, meta *checkpoint.Meta, err error) {
	ctx := context.Background()
	f, err := l.st.Freeze(ctx, name, store.FreezeOptions{Copy: true})
	if err != nil {
		return ref, nil, err
	}
	defer func() {
		if err == nil {
			f.Close()
		} else {
			f.Discard(ctx) // gc does it otherwise
		}
	}()
	fi, err := l.fs.Stat(name)
	if err != nil {
		return ref, nil, err
	}
	o.Keeps = true
	o.VMDisks = func() []checkpoint.VMDisk {
		return []checkpoint.VMDisk{{Name: "vd", Kept: f.UUID, Layers: []disk.Identity{
			{Path: name, Format: disk.Raw, Size: fi.Size(), File: disk.File{Size: fi.Size(), Mtime: fi.ModTime().UnixNano()}}}}}
	}
	return l.trySave(s, o)
}

// frozen are the copies that there are in the store; their digests are among them if no copy
// belongs to them.
func (l *lab) frozen(t testing.TB) map[string]bool {
	t.Helper()
	names := make(map[string]bool)
	tree := l.tree(t)
	for _, name := range tree {
		rest, ok := strings.CutPrefix(name, "frozen/")
		if copied, is := strings.CutSuffix(name, ".digests"); ok && !(is && slices.Contains(tree, copied)) {
			names[rest] = true
		}
	}
	return names
}

// checkKept fails unless each checkpoint that there is has its copy, whole, and after a gc
// there is no other. It returns how many checkpoints there are.
func (l *lab) checkKept(t testing.TB) (n int) {
	t.Helper()
	refs, err := l.st.List(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	want := make(map[string]bool)
	for _, ref := range refs {
		for _, err := range l.verify(ref) {
			t.Errorf("%v: %v", ref, err)
		}
		d, err := l.st.Describe(t.Context(), ref)
		if err != nil {
			t.Fatal(err)
		}
		for _, k := range l.st.KeptDisks(t.Context(), d.Meta) {
			n++
			want[k.UUID.String()] = true
			if err := l.checkDigests(t, ref); err != nil {
				t.Errorf("%v: %v", ref, err)
			}
			if b, err := vfs.ReadFile(l.fs, k.File, 8<<20); err != nil || !bytes.Equal(b, imageBytes()) {
				t.Errorf("%v: the copy has %d bytes, or is another; %v", ref, len(b), err)
			}
		}
	}
	rep, err := l.st.GC(t.Context())
	if err != nil || len(rep.Warnings) > 0 {
		t.Errorf("gc: %+v, %v", rep, err)
	}
	if have := l.frozen(t); fmt.Sprint(have) != fmt.Sprint(want) {
		t.Errorf("after gc there are the copies %v, and checkpoints have %v", have, want)
	}
	if rep, err := l.st.GC(t.Context()); err != nil || rep.FrozenDisks != 0 {
		t.Errorf("a second gc found more: %+v, %v", rep, err)
	}
	l.noLeaks(t)
	return n
}

// checkDigests compares the copies of a checkpoint with their digests, of those that have some,
// as verify does. It returns what is found.
func (l *lab) checkDigests(t testing.TB, ref store.Ref) (found error) {
	t.Helper()
	c, err := l.st.OpenCheckpoint(t.Context(), ref, checkpoint.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.VerifyKept(t.Context(), func(err error) { found = errors.Join(found, err) }); err != nil {
		t.Fatal(err)
	}
	return found
}

// digests are how many files of digests there are in the store.
func (l *lab) digests(t testing.TB) (n int) {
	t.Helper()
	for _, name := range l.tree(t) {
		if strings.HasSuffix(name, ".digests") {
			n++
		}
	}
	return n
}

// TestKeptDigests: bits of a copy that have gone bad, with its times as they were, are found by
// verify, and no file is made of it.
func TestKeptDigests(t *testing.T) {
	k := newKeptPages(t)
	at := func() store.KeptDisk {
		t.Helper()
		d, err := k.st.Describe(t.Context(), k.ref)
		if err != nil {
			t.Fatal(err)
		}
		return k.st.KeptDisks(t.Context(), d.Meta)[0]
	}
	to := filepath.Join(t.TempDir(), "thawed")
	thaw := func(o store.ThawOptions) error {
		t.Helper()
		err := k.st.Thaw(t.Context(), at(), to, o)
		if rerr := os.Remove(to); (rerr == nil) != (err == nil) {
			t.Errorf("thawed: %v, and the file: %v", err, rerr)
		}
		return err
	}
	if !at().NotChecked {
		t.Error("it has digests, and nobody has made them")
	}
	c, err := k.st.OpenCheckpoint(t.Context(), k.ref, checkpoint.Options{})
	if err != nil {
		t.Fatal(err)
	}
	left, err := c.VerifyKept(t.Context(), func(err error) { t.Error(err) })
	if c.Close(); err != nil || len(left) != 1 || left[0].File != k.file() {
		t.Errorf("not checked: %+v, %v", left, err)
	}
	if err := thaw(store.ThawOptions{}); err != nil {
		t.Error(err)
	}
	done, bad, err := k.st.DigestAllKept(t.Context())
	if err != nil || len(bad) > 0 || done.Disks != 1 || done.Read == 0 || at().NotChecked || k.digests(t) != 1 {
		t.Fatalf("%+v, %v, %v", done, bad, err)
	}
	if done, err := k.st.DigestKept(t.Context(), k.ref); err != nil || done.Disks != 0 {
		t.Errorf("again: %+v, %v", done, err)
	}
	if err := errors.Join(k.checkDigests(t, k.ref), thaw(store.ThawOptions{})); err != nil {
		t.Error(err)
	}
	// A bit of the copy that no page of the guest's is on.
	was, err := os.Stat(k.file())
	if err != nil {
		t.Fatal(err)
	}
	flip := func(name string, at int64) {
		t.Helper()
		edit(t, name, func(b []byte) []byte { b[at] ^= 1; return b })
		if err := os.Chtimes(name, was.ModTime(), was.ModTime()); err != nil {
			t.Fatal(err)
		}
	}
	last := was.Size() - 1
	flip(k.file(), last)
	where := fmt.Sprintf("%s: offset %d", k.file(), last>>20<<20)
	if err := k.checkDigests(t, k.ref); !integrity.IsCorrupt(err) || !strings.Contains(err.Error(), where) {
		t.Errorf("verify: %v", err)
	}
	if err := thaw(store.ThawOptions{}); !integrity.IsCorrupt(err) || !strings.Contains(err.Error(), where) {
		t.Errorf("thaw: %v", err)
	}
	if err := thaw(store.ThawOptions{SkipCheck: true}); err != nil {
		t.Error(err)
	}
	flip(k.file(), last)
	if err := errors.Join(k.checkDigests(t, k.ref), thaw(store.ThawOptions{})); err != nil {
		t.Error(err)
	}
	// Digests that are damaged are damage too, and of no other copy.
	flip(k.file()+".digests", 5000)
	if err := k.checkDigests(t, k.ref); !integrity.IsCorrupt(err) || !strings.Contains(err.Error(), ".digests: offset 4096") {
		t.Errorf("verify: %v", err)
	}
	if err := thaw(store.ThawOptions{}); !integrity.IsCorrupt(err) || !strings.Contains(err.Error(), ".digests: offset 4096") {
		t.Errorf("thaw: %v", err)
	}
	// What was written to gets none.
	if err := errors.Join(os.Remove(k.file()+".digests"), os.Truncate(k.file(), last)); err != nil {
		t.Fatal(err)
	}
	if done, bad, err := k.st.DigestAllKept(t.Context()); err != nil || len(bad) != 1 || done.Disks != 0 || k.digests(t) != 0 || at().NotChecked {
		t.Errorf("%+v, %v, %v", done, bad, err)
	}
	if err := k.remove(k.ref); err != nil || len(k.frozen(t)) != 0 {
		t.Errorf("%v, %v", err, k.frozen(t))
	}
	k.noLeaks(t)
}

// TestKillDigests ends the process at every operation of making digests, and lets each fail:
// they are there, whole, or the copy has none.
func TestKillDigests(t *testing.T) {
	disk, l := newFrozenLab(t, true)
	ref, _, err := l.saveKept(small(1), save.Options{}, diskImage)
	if err != nil {
		t.Fatal(err)
	}
	check := func(l *lab, made error) {
		t.Helper()
		if n := l.digests(t); made == nil && n != 1 || n > 1 {
			t.Errorf("made with %v, and there are %d digests", made, n)
		}
		if n := l.checkKept(t); n != 1 {
			t.Errorf("%d copies", n)
		}
		if _, left, err := l.st.DigestAllKept(t.Context()); err != nil || len(left) > 0 || l.digests(t) != 1 {
			t.Errorf("afterwards: %v, %v", left, err)
		}
		if err := l.checkDigests(t, ref); err != nil {
			t.Error(err)
		}
	}
	everyOp(t, func(t *testing.T, n int) bool {
		disk := disk.CrashClone(3)
		l := l.on(t, disk)
		disk.KillAt(n)
		_, err := l.st.DigestKept(context.Background(), ref)
		l.after(t, disk, func(l *lab) { check(l, err) })
		return disk.Killed()
	})
	for kind, fault := range faultsAt {
		t.Run(kind, func(t *testing.T) {
			everyOp(t, func(t *testing.T, n int) bool {
				disk := disk.CrashClone(3)
				l := l.on(t, disk)
				before := len(disk.Ops())
				fault.arm(disk, n)
				_, err := l.st.DigestKept(context.Background(), ref)
				hit := len(disk.Ops())-before > n
				disk.Heal()
				if err != nil && !errors.Is(err, fault.err) {
					t.Errorf("failed with %v", err)
				}
				l.after(t, disk, func(l *lab) { check(l, err) })
				return hit
			})
		})
	}
}

// after checks what the next process finds, and what is there after a power cut.
func (l *lab) after(t *testing.T, disk *crashfs.FS, check func(l *lab)) {
	t.Helper()
	for seed := range uint64(4) {
		check(l.on(t, disk.CrashClone(seed)))
	}
	check(l.on(t, disk.Fork()))
}

// newFrozenLab is a lab with an image, in which disk blocks can be shared or can't.
func newFrozenLab(t *testing.T, clones bool) (*crashfs.FS, *lab) {
	t.Helper()
	disk := crashfs.New(0)
	disk.SetNoClones(!clones)
	l := newLab(t, disk, "/")
	writeImage(t, disk, diskImage)
	return disk, l
}

var waysToKeep = map[string]bool{"reflink": true, "copy": false}

// TestKillFreeze ends the process at every operation of a save with which a disk is kept.
func TestKillFreeze(t *testing.T) {
	for name, clones := range waysToKeep {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := small(1)
			n := everyOp(t, func(t *testing.T, n int) bool {
				disk, l := newFrozenLab(t, clones)
				disk.KillAt(n)
				_, _, err := l.saveKept(s, save.Options{}, diskImage)
				l.after(t, disk, func(l *lab) {
					if n := l.checkKept(t); err == nil && n != 1 {
						t.Errorf("saved, and there are %d copies", n)
					}
				})
				return disk.Killed()
			})
			if n < 20 {
				t.Errorf("the save had only %d operations", n)
			}
		})
	}
}

// TestFailFreeze lets every operation of such a save fail: it fails, or has its copy, and
// nothing is left that gc does not find.
func TestFailFreeze(t *testing.T) {
	for name, clones := range waysToKeep {
		for kind, fault := range faultsAt {
			t.Run(name+" "+kind, func(t *testing.T) {
				t.Parallel()
				s := small(1)
				everyOp(t, func(t *testing.T, n int) bool {
					disk, l := newFrozenLab(t, clones)
					before := len(disk.Ops())
					fault.arm(disk, n)
					_, _, err := l.saveKept(s, save.Options{}, diskImage)
					hit := len(disk.Ops())-before > n
					disk.Heal()
					if err != nil && !errors.Is(err, fault.err) {
						t.Errorf("save: %v", err)
					}
					l.noLeaks(t)
					l.after(t, disk, func(l *lab) {
						if n := l.checkKept(t); err == nil && n != 1 {
							t.Errorf("saved, and there are %d copies", n)
						} else if err != nil && n != 0 && !store.IsUncertain(err) {
							t.Errorf("failed with %v, and there are %d copies", err, n)
						}
					})
					return hit
				})
			})
		}
	}
}

// TestKillRemoveKept ends the process at every operation of a removal, and of the gc of what
// a dead save has left: a checkpoint that is there has its copy.
func TestKillRemoveKept(t *testing.T) {
	disk, l := newFrozenLab(t, true)
	for i := range 2 {
		ref, _, err := l.saveKept(small(uint64(i)), save.Options{}, diskImage)
		if err == nil {
			_, err = l.st.DigestKept(t.Context(), ref)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	// As a process leaves it that has died before its save.
	dead, err := l.st.Freeze(t.Context(), diskImage, store.FreezeOptions{})
	if err != nil {
		t.Fatal(err)
	}
	dead.Close()
	for name, do := range map[string]func(l *lab) error{
		"rm": func(l *lab) error { return l.remove(store.Ref{VM: "vm", N: 1}) },
		"gc": func(l *lab) error { _, err := l.st.GC(context.Background()); return err },
	} {
		t.Run(name, func(t *testing.T) {
			everyOp(t, func(t *testing.T, n int) bool {
				disk := disk.CrashClone(3)
				l := l.on(t, disk)
				disk.KillAt(n)
				err := do(l)
				l.after(t, disk, func(l *lab) {
					if n := l.checkKept(t); n < 1 || n < 2 && name == "gc" || n > 1 && name == "rm" && err == nil {
						t.Errorf("%d copies are there; %v", n, err)
					}
				})
				return disk.Killed()
			})
		})
	}
}

// TestFrozen follows copies through what is done with checkpoints: each is there for as long
// as its checkpoint is listed, whoever else needs that one's image.
func TestFrozen(t *testing.T) {
	_, l := newFrozenLab(t, true)
	s := small(7)
	ref, meta, err := l.saveKept(s, save.Options{}, diskImage)
	if err != nil || len(meta.Kept) != 1 {
		t.Fatal(meta, err)
	}
	// A copy of a save that goes on is nobody's garbage.
	f, err := l.st.Freeze(t.Context(), diskImage, store.FreezeOptions{})
	if err != nil || !f.Shared || f.Bytes == 0 {
		t.Fatal(f, err)
	}
	if rep, err := l.st.GC(t.Context()); err != nil || rep.FrozenDisks != 0 || len(l.frozen(t)) != 2 {
		t.Errorf("%+v, %v", rep, err)
	}
	f.Close()
	if rep, err := l.st.GC(t.Context()); err != nil || rep.FrozenDisks != 1 || rep.FrozenBytes != f.Bytes || len(l.frozen(t)) != 1 {
		t.Errorf("%+v, %v", rep, err)
	}
	if u, err := l.st.Unite(t.Context(), ref, store.UniteOptions{}); err != nil || !strings.Contains(u.Why, "disks are kept") {
		t.Errorf("united: %+v, %v", u, err)
	}
	// A child that refers to it has none, and an image in another store has none either.
	child, cmeta := l.save(t, grown(7), save.Options{})
	if len(cmeta.Kept) != 0 || len(cmeta.References) == 0 {
		t.Errorf("%+v", cmeta.Identity)
	}
	totals, left, err := l.st.Totals(t.Context())
	if err != nil || left != nil || totals[0].Frozen != f.Bytes {
		t.Errorf("%+v, %v, %v", totals, left, err)
	}
	other := newLab(t, l.fs, "/other")
	c, err := l.st.OpenCheckpoint(t.Context(), ref, checkpoint.Options{})
	if err != nil {
		t.Fatal(err)
	}
	copied, m, err := other.st.Copy(t.Context(), c, store.CopyOptions{})
	if err != nil || len(m.Kept) != 0 || m.VMDisks[0].Kept != uuid.Nil {
		t.Errorf("%+v, %v", m, err)
	}
	c.Close()
	other.holds(t, copied, s)
	// Flattened it has the same one. This one refers to nothing, so it is made to.
	again, gmeta, err := l.saveKept(grown(7), save.Options{}, diskImage)
	if err != nil || len(gmeta.References) == 0 {
		t.Fatal(gmeta, err)
	}
	if _, flat, err := l.st.Flatten(t.Context(), again, store.CopyOptions{}); err != nil || len(flat.Kept) != 1 || flat.Kept[0] != gmeta.Kept[0] || flat.UUID == gmeta.UUID {
		t.Errorf("%+v, %v", flat, err)
	}
	l.checkKept(t)
	// The image stays for the child, and the copy goes.
	rm, err := l.st.Remove(t.Context(), ref)
	if err != nil || rm.Left != nil || len(rm.Kept) == 0 || rm.FrozenBytes != f.Bytes || len(l.frozen(t)) != 1 {
		t.Errorf("%+v, %v; %v", rm, err, l.frozen(t))
	}
	l.holds(t, child, grown(7))
	if rm, err := l.st.Remove(t.Context(), again); err != nil || rm.FrozenBytes != f.Bytes || len(l.frozen(t)) != 0 {
		t.Errorf("%+v, %v; %v", rm, err, l.frozen(t))
	}
	l.noLeaks(t)
}

// TestFreezeRefused: what can't be kept is refused, and leaves nothing.
func TestFreezeRefused(t *testing.T) {
	disk, l := newFrozenLab(t, false)
	_, err := l.st.Freeze(t.Context(), diskImage, store.FreezeOptions{})
	if !errors.Is(err, store.ErrNoReflink) || !strings.Contains(err.Error(), diskImage) {
		t.Errorf("a file system without reflink: %v", err)
	}
	if err := l.st.TryFreeze(t.Context(), []string{diskImage}, store.FreezeOptions{}); !errors.Is(err, store.ErrNoReflink) {
		t.Errorf("tried: %v", err)
	}
	if err := l.st.TryFreeze(t.Context(), []string{diskImage, diskImage}, store.FreezeOptions{Copy: true}); err != nil {
		t.Errorf("tried: %v", err)
	}
	for _, name := range []string{"/gone", "/store"} {
		if _, err := l.st.Freeze(t.Context(), name, store.FreezeOptions{Copy: true}); err == nil {
			t.Errorf("%s is kept", name)
		}
	}
	ended, cancel := context.WithCancelCause(t.Context())
	why := errors.New("it takes too long")
	cancel(why)
	if _, err := l.st.Freeze(ended, diskImage, store.FreezeOptions{Copy: true}); !errors.Is(err, why) && !errors.Is(err, context.Canceled) {
		t.Errorf("beyond its time: %v", err)
	}
	if have := l.frozen(t); len(have) != 0 {
		t.Errorf("left: %v", have)
	}
	disk.SetNoClones(false)
	if err := l.st.TryFreeze(t.Context(), []string{diskImage}, store.FreezeOptions{}); err != nil || len(l.frozen(t)) != 0 {
		t.Errorf("tried: %v; %v", err, l.frozen(t))
	}
	l.noLeaks(t)

	small := crashfs.New(3 << 20)
	small.SetNoClones(true)
	l = newLab(t, small, "/")
	writeImage(t, small, diskImage)
	if err := l.st.TryFreeze(t.Context(), []string{diskImage}, store.FreezeOptions{Copy: true}); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("a copy that does not fit: %v", err)
	}
}

// keptPages is a checkpoint on a real file system that has pages on a disk image which is
// kept with it.
type keptPages struct {
	*lab
	s     *tiertest.Stream
	image string
	ref   store.Ref
	meta  *checkpoint.Meta
}

func newKeptPages(t *testing.T) *keptPages {
	t.Helper()
	k := &keptPages{lab: newLab(t, vfs.OS, t.TempDir()), s: generation(tiertest.Options{Seed: 1}, 1)}
	k.image = filepath.Join(t.TempDir(), "image")
	newRawDisk(t, k.image, digest.Fresh(), 2, k.s)
	k.ref, k.meta = k.keep(t, k.s)
	if r := k.meta.Report; r.Disk < 30 || len(r.Disks) != 1 || r.Disks[0].Path != k.image || !r.Disks[0].Kept {
		t.Fatalf("%+v", r)
	}
	return k
}

// keep saves a stream with a copy of the image, and looks for pages in that.
func (k *keptPages) keep(t *testing.T, s *tiertest.Stream) (store.Ref, *checkpoint.Meta) {
	t.Helper()
	f, err := k.st.Freeze(t.Context(), k.image, store.FreezeOptions{Copy: true})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	catalog, err := k.st.Disks()
	if err != nil {
		t.Fatal(err)
	}
	i, err := disk.OpenLayer(f.Path(), disk.Raw)
	if err != nil {
		t.Fatal(err)
	}
	_, err = catalog.Build(t.Context(), i, disk.BuildOptions{Frozen: true})
	if err = errors.Join(err, i.Close()); err != nil {
		t.Fatal(err)
	}
	was, err := disk.OpenLayer(k.image, disk.Raw)
	if err != nil {
		t.Fatal(err)
	}
	was.Close()
	opened := save.OpenDisks(t.Context(), catalog, []save.DiskFile{{Path: f.Path(), Format: disk.Raw, Kept: f.UUID, Of: k.image}})
	defer opened.Close()
	ref, meta := k.save(t, s, save.Options{Disks: opened.Disks, UnusedDisks: opened.Unused, Keeps: true, VMDisks: func() []checkpoint.VMDisk {
		return []checkpoint.VMDisk{{Name: "vd", Kept: f.UUID, Layers: []disk.Identity{was.Identity()}}}
	}})
	if err := f.Unindex(t.Context()); err != nil {
		t.Error(err)
	}
	if list, err := catalog.List(t.Context()); err != nil || len(list) != 0 {
		t.Errorf("%+v, %v", list, err)
	}
	return ref, meta
}

func (k *keptPages) file() string { return filepath.Join(k.dir, "frozen", k.meta.Kept[0].String()) }

// TestKeptPages: pages that are on a disk image as it was need no more than the store, and no
// later checkpoint relies on them.
func TestKeptPages(t *testing.T) {
	k := newKeptPages(t)
	k.holds(t, k.ref, k.s)
	// The guest goes on to write to its disk, and nothing of it is left in the end.
	edit(t, k.image, func(b []byte) []byte { clear(b); return b })
	k.holds(t, k.ref, k.s)
	if err := os.Remove(k.image); err != nil {
		t.Fatal(err)
	}
	k.holds(t, k.ref, k.s)
	next := generation(tiertest.Options{Seed: 1}, 2)
	child, meta := k.save(t, next, save.Options{})
	if meta.Disks != 0 || len(meta.Kept) != 0 || meta.Report.Disk != 0 || meta.Report.Unchanged == 0 && meta.Report.Delta == 0 {
		t.Errorf("the child has %+v", meta.Report)
	}
	// In another store it has the pages themselves, and no disk.
	other := newLab(t, vfs.OS, t.TempDir())
	stream, _, err := k.sent(nil, k.ref)
	if err == nil {
		_, err = other.takes(stream, store.Ref{})
	}
	if err != nil {
		t.Fatal(err)
	}
	other.holds(t, k.ref, k.s)
	if d, err := other.st.Describe(t.Context(), k.ref); err != nil || len(d.Meta.Kept) != 0 || len(other.frozen(t)) != 0 {
		t.Errorf("%+v, %v", d.Meta.Identity, err)
	}
	// The store goes somewhere else, by a rename and as a copy.
	was := k.dir
	k.dir += "-moved"
	if err := os.Rename(was, k.dir); err != nil {
		t.Fatal(err)
	}
	k.open(t)
	k.holds(t, k.ref, k.s)
	to := filepath.Join(t.TempDir(), "copy")
	if err := os.CopyFS(to, os.DirFS(k.dir)); err != nil {
		t.Fatal(err)
	}
	copied := &lab{fs: k.fs, dir: to, nvram: k.nvram}
	copied.open(t)
	var b bytes.Buffer
	if err := copied.restore(k.ref, &b); err != nil || !bytes.Equal(b.Bytes(), k.s.ExpectedBytes()) {
		t.Errorf("from a copy of the store: %d bytes, %v", b.Len(), err)
	}
	// Absorbed it has no pages there any more, and the disk is still what it goes with.
	_, flat, err := copied.st.Flatten(t.Context(), k.ref, store.CopyOptions{})
	if err != nil || flat.Disks != 0 || len(flat.Kept) != 1 {
		t.Errorf("%+v, %v", flat, err)
	}
	if rm, err := copied.st.Remove(t.Context(), k.ref); err != nil || rm.FrozenBytes == 0 || len(copied.frozen(t)) != 0 {
		t.Errorf("%+v, %v", rm, err)
	}
	if rm, err := k.st.Remove(t.Context(), k.ref); err != nil || rm.FrozenBytes == 0 || len(k.frozen(t)) != 0 {
		t.Errorf("%+v, %v", rm, err)
	}
	k.holds(t, child, next)
	k.noLeaks(t)
}

// TestKeptChanged: a copy that is not what it was costs the checkpoint that has pages on it,
// and is named. Nothing is restored.
func TestKeptChanged(t *testing.T) {
	elsewhere := filepath.Join(t.TempDir(), "elsewhere")
	for name, c := range map[string]struct {
		change func(t *testing.T, path string)
		says   string
	}{
		"missing": {func(t *testing.T, path string) {
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		}, "no such file"},
		"cut": {func(t *testing.T, path string) { edit(t, path, func(b []byte) []byte { return b[:len(b)/2] }) }, "was made smaller"},
		"changed": {func(t *testing.T, path string) {
			edit(t, path, func(b []byte) []byte {
				for i := 0; i < len(b); i += disk.SectorSize {
					b[i] ^= 1
				}
				return b
			})
		}, "was written to"},
		"a link": {func(t *testing.T, path string) {
			if err := errors.Join(os.Rename(path, elsewhere), os.Symlink(elsewhere, path)); err != nil {
				t.Fatal(err)
			}
		}, "no file of a store's"},
	} {
		t.Run(name, func(t *testing.T) {
			k := newKeptPages(t)
			c.change(t, k.file())
			var b bytes.Buffer
			err := k.restore(k.ref, &b)
			if err == nil || b.Len() > 0 || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), k.meta.Kept[0].String()) {
				t.Errorf("%d bytes were restored; %v", b.Len(), err)
			}
			damages := fmt.Sprint(k.verify(k.ref))
			if !strings.Contains(damages, k.meta.Kept[0].String()) {
				t.Errorf("verify finds %s", damages)
			}
			d, err := k.st.Describe(t.Context(), k.ref)
			if err != nil {
				t.Fatal(err)
			}
			kept := k.st.KeptDisks(t.Context(), d.Meta)
			if len(kept) != 1 || kept[0].Wrong == "" || kept[0].Image != k.image || kept[0].Disk != "vd" {
				t.Errorf("%+v", kept)
			}
			to := filepath.Join(t.TempDir(), "thawed")
			if err := k.st.Thaw(t.Context(), kept[0], to, store.ThawOptions{}); err == nil {
				t.Error("a file was made of it")
			}
			if _, err := os.Stat(to); !errors.Is(err, os.ErrNotExist) {
				t.Error(err)
			}
			k.noLeaks(t)
		})
	}
}

// TestThaw makes files of copies.
func TestThaw(t *testing.T) {
	k := newKeptPages(t)
	was, err := os.Stat(k.image)
	if err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile(k.image)
	if err != nil {
		t.Fatal(err)
	}
	edit(t, k.image, func(b []byte) []byte { clear(b); return b })
	c, err := k.st.OpenCheckpoint(t.Context(), k.ref, checkpoint.Options{})
	if err != nil {
		t.Fatal(err)
	}
	kept := c.KeptDisks(t.Context())
	if _, err := restore.Run(t.Context(), c.Checkpoint, io.Discard, restore.Options{}); err != nil {
		t.Error(err)
	}
	c.Close()
	to := filepath.Join(t.TempDir(), "thawed")
	if err := k.st.Thaw(t.Context(), kept[0], to, store.ThawOptions{}); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(to)
	fi, serr := os.Stat(to)
	if err != nil || serr != nil || !bytes.Equal(b, want) || !fi.ModTime().Equal(was.ModTime()) || fi.Mode().Perm() != 0o600 {
		t.Errorf("%d bytes, %v; %v, %v", len(b), fi, err, serr)
	}
	if err := k.st.Thaw(t.Context(), kept[0], to, store.ThawOptions{}); !errors.Is(err, os.ErrExist) {
		t.Errorf("over a file that is there: %v", err)
	}
	k.noLeaks(t)
	if list, err := k.st.Listing(t.Context(), ""); err != nil || len(list) != 1 || list[0].Lacks != nil {
		t.Errorf("%+v, %v", list, err)
	}
	if err := os.Remove(kept[0].File); err != nil {
		t.Fatal(err)
	}
	list, err := k.st.Listing(t.Context(), "")
	if err != nil || len(list) != 1 || !integrity.IsCorrupt(list[0].Lacks) || !strings.Contains(list[0].Lacks.Error(), kept[0].File) {
		t.Errorf("%+v, %v", list, err)
	}
}
