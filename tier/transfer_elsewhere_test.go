package tier_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/nvram"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/tiertest/chain"
	"github.com/flic-migrate/flic-migrate/tier/transfer"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
	"github.com/flic-migrate/flic-migrate/tier/vfs/crashfs"
)

// onSmallDisks is onDisks with little in it, for tests that end at every operation.
func onSmallDisks(t *testing.T) (l *lab, list []chain.Checkpoint) {
	t.Helper()
	blocks := []tiertest.Block{{Name: "pc.ram", Size: 160 << 10}, {Name: "rom", Size: 32 << 10}}
	l = newLab(t, crashfs.New(0), "/")
	list = chain.Build(t, l.st, chain.Options{Seed: 7, Streams: generations(7, 2, blocks), Codec: image.LZ4,
		NVRAM: l.nvram, Deltas: 0.5, Scattered: 0.1, Disk: filepath.Join(t.TempDir(), "disk")})
	return l, list
}

// everything is what a store has, byte by byte.
func (l *lab) everything(t *testing.T) map[string]string {
	t.Helper()
	all := make(map[string]string)
	for _, name := range l.tree(t) {
		all[name] = string(l.content(t, filepath.Join(l.dir, name)))
	}
	return all
}

// TestTransferDisks: what a checkpoint has on disks goes with it. The copy needs none, holds
// what the original does, can be sent on, flattened and referred to, and when it is removed
// nothing is left. The original stays as it was.
func TestTransferDisks(t *testing.T) {
	a, list, disks := onDisks(t)
	b, c := newLab(t, crashfs.New(0), "/"), newLab(t, crashfs.New(0), "/")
	before := a.everything(t)
	for _, one := range list {
		s, r := a.ships(t, b, one.Ref)
		if s.FromDisks == 0 || r.DiskBytes != s.FromDisks || r.DiskBytes >= r.Bytes {
			t.Errorf("%v: sent %+v, received %+v", one.Ref, s, r)
		}
	}
	if after := a.everything(t); !maps.Equal(before, after) {
		t.Error("sending has changed the store")
	}
	for _, path := range disks {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	for _, one := range list {
		b.holds(t, one.Ref, one.Stream)
		d, err := b.st.Describe(t.Context(), one.Ref)
		if err != nil || d.Meta.NeedsDisks() != 0 || d.Meta.Disks == 0 {
			t.Errorf("%v: %d disks, needs %d, %v", one.Ref, d.Meta.Disks, d.Meta.NeedsDisks(), err)
		}
	}
	// It is there already, whatever has become of the disks.
	if s, r := a.ships(t, b, list[2].Ref); s.Bytes != 0 || !r.Already {
		t.Errorf("%+v, %+v", s, r)
	}
	// Without them it can't be sent again, but a copy can.
	if _, _, err := a.sent(nil, list[2].Ref); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), disks[0]) && !strings.Contains(err.Error(), disks[1]) && !strings.Contains(err.Error(), disks[2]) {
		t.Errorf("sent without its disks: %v", err)
	}
	s, _ := b.ships(t, c, list[2].Ref)
	if s.FromDisks != 0 {
		t.Errorf("%+v: from disks that are not there", s)
	}
	c.holds(t, list[2].Ref, list[2].Stream)
	// What is listed says where it is.
	listed, err := b.st.Identities(t.Context(), "vm")
	if err != nil || len(listed) != 3 || listed[2].DiskBytes == 0 {
		t.Fatalf("%+v, %v", listed, err)
	}
	// Of the removed one's pages that were on disks those go that it lends to nobody.
	sh, err := b.st.Sharing(t.Context(), list[0].Ref)
	if err != nil || sh.Held.Flash == 0 || sh.RmFrees.Flash == 0 {
		t.Fatalf("%+v, %v", sh, err)
	}
	took := func() int64 { n, _ := b.taken(t); return n }
	was := took()
	if err := b.remove(list[0].Ref); err != nil {
		t.Fatal(err)
	}
	if freed := was - took(); freed < sh.RmFrees.Flash {
		t.Errorf("%d bytes freed of %d, %d were on disks", freed, sh.RmFrees.Flash, listed[0].DiskBytes)
	}
	b.holds(t, list[2].Ref, list[2].Stream)
	// And it comes back.
	a2, _, err := c.sent(b.has(t), list[2].Ref)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := b.takes(a2, store.Ref{}); err != nil || !got[0].Already {
		t.Errorf("%+v, %v", got, err)
	}
	if _, meta, err := b.st.Flatten(t.Context(), list[2].Ref, store.CopyOptions{}); err != nil || meta.Disks != 0 || meta.DiskSlots != 0 {
		t.Fatalf("%+v, %v", meta, err)
	}
	b.holds(t, list[2].Ref, list[2].Stream)
	for l, refs := range map[*lab][]store.Ref{b: {list[1].Ref, list[2].Ref}, c: {list[2].Ref}} {
		for _, ref := range refs {
			if err := l.remove(ref); err != nil {
				t.Error(err)
			}
		}
		l.noLeaks(t)
		l.empty(t)
	}
	a.noLeaks(t)
}

// TestTransferDisksChanged: a disk that is not what it was is refused by name, and nothing of
// the checkpoint is sent; one that is somewhere else is named.
func TestTransferDisksChanged(t *testing.T) {
	a, list, disks := onDisks(t)
	last := list[2].Ref
	whole, err := os.ReadFile(disks[2])
	if err != nil {
		t.Fatal(err)
	}
	edit(t, disks[2], func(b []byte) []byte { b[len(b)-1] ^= 1; return b })
	out, _, err := a.sent(nil, last)
	if !integrity.IsCorrupt(err) || !strings.Contains(err.Error(), disks[2]) || !strings.Contains(err.Error(), "was written to") || len(out) > 16 {
		t.Errorf("%d bytes, %v", len(out), err)
	}
	moved := disks[2] + "-moved"
	if err := errors.Join(os.WriteFile(moved, whole, 0o600), os.Remove(disks[2])); err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	w, err := transfer.NewWriter(&b)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.st.Send(t.Context(), last, w, transfer.NewHave(), store.SendOptions{Disks: map[string]string{disks[2]: moved}}); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	to := newLab(t, crashfs.New(0), "/")
	if _, err := to.takes(b.Bytes(), store.Ref{}); err != nil {
		t.Fatal(err)
	}
	to.holds(t, last, list[2].Stream)
	a.noLeaks(t)
	to.noLeaks(t)
}

// TestTransferDisksLittle: pages of disks that the receiver has of a checkpoint that it is
// told of are not sent again.
func TestTransferDisksLittle(t *testing.T) {
	for seed := range uint64(6) {
		a := newLab(t, crashfs.New(0), "/")
		list := chain.Build(t, a.st, chain.Options{Seed: seed, Streams: generations(seed, 3, chainBlocks), Codec: image.LZ4,
			Deltas: 0.2, Disk: filepath.Join(t.TempDir(), "disk")})
		b, c := newLab(t, crashfs.New(0), "/"), newLab(t, crashfs.New(0), "/")
		alone, _ := a.ships(t, c, list[2].Ref)
		a.ships(t, b, list[1].Ref)
		// Both in one stream: what the first brings the second need not.
		after, _ := a.ships(t, b, list[2].Ref)
		if after.FromDisks >= alone.FromDisks {
			t.Errorf("seed %d: %d bytes from disks behind its parent, %d alone", seed, after.FromDisks, alone.FromDisks)
		}
		d := newLab(t, crashfs.New(0), "/")
		both, sent, err := a.sent(nil, list[1].Ref, list[2].Ref)
		if err != nil || sent[1].FromDisks != after.FromDisks {
			t.Errorf("%+v, %v; behind its parent %+v", sent, err, after)
		}
		if _, err := d.takes(both, store.Ref{}); err != nil {
			t.Error(err)
		}
		for _, l := range []*lab{b, c, d} {
			l.holds(t, list[2].Ref, list[2].Stream)
			l.noLeaks(t)
		}
		// A receiver that has lost what it said it had says so.
		e := newLab(t, crashfs.New(0), "/")
		have := e.has(t)
		have.Whole[list[1].UUID], have.Disks[list[1].UUID] = true, true
		lacks, _, err := a.sent(have, list[2].Ref)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := e.takes(lacks, store.Ref{}); !errors.Is(err, store.ErrLacks) {
			t.Errorf("%v", err)
		}
		e.noLeaks(t)
	}
}

// TestTransferDisksForged: a page of a disk that is none of the checkpoint's is found.
func TestTransferDisksForged(t *testing.T) {
	a, list, _ := onDisks(t)
	whole, _, err := a.sent(nil, list[0].Ref)
	if err != nil {
		t.Fatal(err)
	}
	out, _ := forged(t, whole, -1)
	b := newLab(t, crashfs.New(0), "/")
	if _, err := b.takes(out, store.Ref{}); !integrity.IsCorrupt(err) {
		t.Errorf("taken: %v", err)
	}
	b.noLeaks(t)
	a.ships(t, b, list[0].Ref)
	b.holds(t, list[0].Ref, list[0].Stream)
}

// TestTransferDisksSaved: a guest that goes on from a copy is saved against it, and the new
// checkpoint needs neither disk nor a page of one.
func TestTransferDisksSaved(t *testing.T) {
	a, list, disks := onDisks(t)
	b := newLab(t, crashfs.New(0), "/")
	a.ships(t, b, list[2].Ref)
	for _, path := range disks {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	o := generations(5, 4, chainBlocks)[3]
	s := tiertest.New(o)
	ref, meta := b.save(t, s, save.Options{SegmentPages: 8})
	if meta.Report.Parent != list[2].Ref.String() || meta.Report.Unchanged == 0 || meta.Disks != 0 {
		t.Errorf("%+v, %d disks", meta.Report, meta.Disks)
	}
	b.holds(t, ref, s)
	if err := b.remove(list[2].Ref); err != nil {
		t.Fatal(err)
	}
	b.holds(t, ref, s)
	b.noLeaks(t)
}

// hotIn is how much of a checkpoint is in the NVRAM file.
func (l *lab) hotIn(t *testing.T, id fmt.Stringer) (bytes int64) {
	t.Helper()
	f, err := nvram.Open(t.Context(), l.fs, l.nvram, nvram.Options{ReadOnly: true})
	if errors.Is(err, fs.ErrNotExist) {
		return 0
	}
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	owners, err := f.Owners(t.Context(), l.st.UUID())
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range owners {
		if o.UUID.String() == id.String() {
			bytes += int64(o.Extents) * nvram.ExtentSize
		}
	}
	return bytes
}

// TestTransferHot: hot pages go to the receiver's NVRAM file, as far as there is room, and the
// checkpoint is there as one that was saved: it is moved to flash, removed, sent on.
func TestTransferHot(t *testing.T) {
	for _, room := range []int64{0, 3} { // extents; 0: for all
		a, b, c := newLab(t, crashfs.New(0), "/"), newLab(t, crashfs.New(0), "/"), newLab(t, crashfs.New(0), "/")
		model := a.hotGenerations(t, "vm", 4, 4<<20, 0.4)
		o := b.hot()
		if room > 0 {
			o.NVRAM.Capacity = (1 + room) * nvram.ExtentSize
		}
		for n := 1; n <= 4; n++ {
			ref := store.Ref{VM: "vm", N: n}
			whole, _, err := a.sent(b.has(t), ref)
			if err != nil {
				t.Fatal(err)
			}
			got, err := b.takesWith(whole, o)
			if err != nil {
				t.Fatal(err)
			}
			d, err := b.st.Describe(t.Context(), ref)
			if err != nil {
				t.Fatal(err)
			}
			in := b.hotIn(t, d.Meta.UUID)
			hot := int64(0)
			if d.Meta.NVRAM != nil {
				hot = d.Meta.NVRAM.Bytes
			}
			switch {
			case room == 0 && got[0].NVRAMBytes != hot, in < got[0].NVRAMBytes, in > 0 != d.Meta.InNVRAM(), n == 1 && in == 0:
				t.Errorf("room %d, %v: %d bytes of %d in NVRAM, in extents of %d", room, ref, got[0].NVRAMBytes, hot, in)
			case in > 0 && d.Meta.NVRAM.Path != b.nvram:
				t.Errorf("%+v", d.Meta.NVRAM)
			}
			b.holds(t, ref, model[ref])
		}
		if room > 0 && len(b.pieces(t)) == 0 || room == 0 && len(b.pieces(t)) > 0 {
			t.Errorf("room %d: pieces %q", room, b.pieces(t))
		}
		if rep, err := b.st.GC(t.Context()); err != nil || len(rep.Warnings) > 0 || rep.NVRAMExtents > 0 {
			t.Errorf("gc: %+v, %v", rep, err)
		}
		// On, and back under the same UUID, where some of it is left for others.
		b.ships(t, c, store.Ref{VM: "vm", N: 4})
		c.holds(t, store.Ref{VM: "vm", N: 4}, model[store.Ref{VM: "vm", N: 4}])
		first := store.Ref{VM: "vm", N: 1}
		if err := b.remove(first); err != nil {
			t.Fatal(err)
		}
		back, _, err := a.sent(b.has(t), first)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := b.takesWith(back, o); err != nil {
			t.Fatal(err)
		}
		b.demote(t, 1)
		for ref, s := range model {
			b.holds(t, ref, s)
		}
		for ref := range model {
			if err := b.remove(ref); err != nil {
				t.Error(err)
			}
		}
		b.noLeaks(t)
		b.empty(t)
		if left, err := leftIn(t, b); err != nil || left > 0 {
			t.Errorf("room %d: %d extents are left, %v", room, left, err)
		}
	}
}

func leftIn(t *testing.T, l *lab) (n int, err error) {
	f, err := nvram.Open(t.Context(), l.fs, l.nvram, nvram.Options{ReadOnly: true})
	if err != nil {
		return 0, err
	}
	defer f.Close()
	owners, err := f.Owners(t.Context(), l.st.UUID())
	for _, o := range owners {
		n += o.Extents
	}
	return n, err
}

// TestTransferHotShared: in an NVRAM file in which another store has the checkpoint's pages it
// can't have any, because each would give back what the other needs. That is said before
// anything is received.
func TestTransferHotShared(t *testing.T) {
	disk := crashfs.New(0)
	a, b := newLab(t, disk, "/a"), newLab(t, disk, "/b")
	b.nvram = a.nvram
	s := small(1)
	ref, _ := a.save(t, s, smallOptions(t, s))
	whole, _, err := a.sent(nil, ref)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.takesWith(whole, b.hot()); !errors.Is(err, store.ErrOtherOwner) {
		t.Errorf("%v", err)
	}
	if left := slices.DeleteFunc(b.tree(t), func(n string) bool { return !strings.HasPrefix(n, "tmp/") }); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
	a.holds(t, ref, s)
	if _, err := b.takes(whole, store.Ref{}); err != nil {
		t.Error(err)
	}
	b.holds(t, ref, s)
	if err := b.remove(ref); err != nil {
		t.Error(err)
	}
	a.holds(t, ref, s)
}

// TestTransferElsewhereKilled ends a receiver at every operation that is given pages of disks
// and puts hot ones into NVRAM, and lets each fail: what was there is there, nothing leaks in
// NVRAM behind a gc, and it can be sent again.
func TestTransferElsewhereKilled(t *testing.T) {
	a, list := onSmallDisks(t)
	last := list[1]
	whole, _, err := a.sent(nil, last.Ref)
	if err != nil {
		t.Fatal(err)
	}
	begin := func(t *testing.T) (*crashfs.FS, *lab) {
		disk := crashfs.New(0)
		return disk, newLab(t, disk, "/")
	}
	check := func(t *testing.T, b *lab, must, cut bool) {
		t.Helper()
		refs, err := b.st.List(t.Context(), "")
		if err != nil || must && !slices.Contains(refs, last.Ref) {
			t.Fatalf("listed %v, %v", refs, err)
		}
		if len(refs) > 0 {
			b.holds(t, last.Ref, last.Stream)
		}
		if cut {
			again, _, err := a.sent(b.has(t), last.Ref)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := b.takesWith(again, b.hot()); err != nil && !integrity.IsCorrupt(err) {
				t.Fatal(err)
			}
		}
		again, _, err := a.sent(b.has(t), last.Ref)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := b.takesWith(again, b.hot()); err != nil {
			t.Fatal(err)
		}
		b.holds(t, last.Ref, last.Stream)
		if rep, err := b.st.GC(t.Context()); err != nil || len(rep.Warnings) > 0 {
			t.Errorf("gc: %+v, %v", rep, err)
		}
		b.holds(t, last.Ref, last.Stream)
		if err := b.remove(last.Ref); err != nil {
			t.Error(err)
		}
		b.empty(t)
		if left, err := leftIn(t, b); err != nil || left > 0 {
			t.Errorf("%d extents are left, %v", left, err)
		}
		b.noLeaks(t)
	}
	ops := everyOp(t, func(t *testing.T, n int) bool {
		disk, b := begin(t)
		disk.KillAt(n)
		_, err := b.takesWith(whole, b.hot())
		for seed := range uint64(2) {
			check(t, b.on(t, disk.CrashClone(seed)), err == nil, true)
		}
		check(t, b.on(t, disk.Fork()), err == nil, false)
		return disk.Killed()
	})
	if ops < 40 {
		t.Errorf("only %d operations", ops)
	}
	for name, fault := range faultsAt {
		t.Run(name, func(t *testing.T) {
			everyOp(t, func(t *testing.T, n int) bool {
				disk, b := begin(t)
				before := len(disk.Ops())
				fault.arm(disk, n)
				_, err := b.takesWith(whole, b.hot())
				hit := len(disk.Ops())-before > n
				if err != nil && !errors.Is(err, fault.err) {
					t.Errorf("receive: %v", err)
				}
				disk.Heal()
				b.noLeaks(t)
				check(t, b, err == nil, false)
				return hit
			})
		})
	}
}

// TestTransferElsewhereDamage: a byte of what a receiver has put beside the image is found,
// with its file.
func TestTransferElsewhereDamage(t *testing.T) {
	a, list, _ := onDisks(t)
	b := newLab(t, crashfs.New(0), "/")
	a.ships(t, b, list[0].Ref)
	pieces := b.pieces(t)
	if len(pieces) == 0 {
		t.Fatal("no pieces")
	}
	name := pieces[len(pieces)-1]
	was := b.file(t, "/"+name)
	bad := bytes.Clone(was)
	bad[len(bad)-7] ^= 1
	b.write(t, "/"+name, bad)
	found := b.verify(list[0].Ref)
	if len(found) == 0 || !strings.Contains(found[0].Error(), name) {
		t.Errorf("verify: %v", found)
	}
	var out bytes.Buffer
	if err := b.restore(list[0].Ref, &out); !integrity.IsCorrupt(err) {
		t.Errorf("restored: %v", err)
	}
	// And none at all.
	if err := b.fs.Remove(b.dir + "/" + name); err != nil {
		t.Fatal(err)
	}
	if c, err := b.st.OpenCheckpoint(context.Background(), list[0].Ref, checkpoint.Options{}); !integrity.IsCorrupt(err) {
		t.Errorf("opened without its pieces: %v, %v", c, err)
	}
}

// TestTransferElsewhere copies checkpoints with pages on disks and in NVRAM, in any order, into
// a store that puts hot ones into NVRAM or not, while there some are removed, moved, flattened
// and saved, and the disks are gone in the end. Each restores as it was saved, and when all is
// removed all is free.
func TestTransferElsewhere(t *testing.T) {
	var lent atomic.Int64
	t.Cleanup(func() {
		if n := lent.Load(); n < int64(fewer(20)) {
			t.Errorf("lent %d times", n)
		}
	})
	for seed := range uint64(fewer(10)) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			rnd := rand.New(rand.NewPCG(seed, 2))
			a, b := newLab(t, crashfs.New(0), "/"), newLab(t, crashfs.New(0), "/")
			list := chain.Build(t, a.st, chain.Options{Seed: seed, Streams: generations(seed, 4, chainBlocks), Codec: image.LZ4,
				NVRAM: a.nvram, Deltas: 0.5, Scattered: 0.1, Disk: filepath.Join(t.TempDir(), "disk")})
			model := map[store.Ref]*tiertest.Stream{}
			flat := map[store.Ref]bool{}
			for step := range 30 {
				one := list[rnd.IntN(len(list))]
				_, there := model[one.Ref]
				what := ""
				switch op := rnd.IntN(8); {
				case op < 4:
					if flat[one.Ref] {
						break // another image has its name
					}
					var o store.ReceiveOptions
					if what = "received"; rnd.IntN(3) > 0 {
						o, what = b.hot(), "received into NVRAM"
					}
					whole, _, err := a.sent(b.has(t), one.Ref)
					if err != nil {
						t.Fatalf("step %d: %v", step, err)
					}
					if got, err := b.takesWith(whole, o); err != nil || got[0].Already != there {
						t.Fatalf("step %d: %v %s: %+v, %v", step, one.Ref, what, got, err)
					}
					model[one.Ref] = one.Stream
				case op == 4 && there:
					what = "removed"
					if err := b.remove(one.Ref); err != nil {
						t.Fatalf("step %d: %v", step, err)
					}
					delete(model, one.Ref)
					delete(flat, one.Ref)
				case op == 5:
					what = "moved"
					b.demote(t, rnd.IntN(3))
				case op == 6:
					what = "gc"
					if rep, err := b.st.GC(t.Context()); err != nil || len(rep.Warnings) > 0 {
						t.Fatalf("step %d: gc: %+v, %v", step, rep, err)
					}
				case op == 7 && there && rnd.IntN(3) == 0:
					what = "flattened"
					if _, _, err := b.st.Flatten(t.Context(), one.Ref, store.CopyOptions{}); err != nil {
						t.Fatalf("step %d: %v", step, err)
					}
					flat[one.Ref] = true
				}
				for ref, s := range model {
					b.holds(t, ref, s)
				}
				names, _ := b.ending(t, ".lent")
				lent.Add(int64(len(names)))
				if t.Failed() {
					t.Fatalf("after step %d: %v %s", step, one.Ref, what)
				}
			}
			for ref := range model {
				if err := b.remove(ref); err != nil {
					t.Error(err)
				}
			}
			b.noLeaks(t)
			b.empty(t)
			if left, err := leftIn(t, b); err != nil && !errors.Is(err, fs.ErrNotExist) || left > 0 {
				t.Errorf("%d extents are left, %v", left, err)
			}
		})
	}
}

// TestTransferTwins: of what has come with another, in part, nothing is left once it has come
// as a whole under another name, or from when nobody has it open any more: a part in the place
// where one that comes later looks is not enough for that one.
func TestTransferTwins(t *testing.T) {
	for _, how := range []string{"at once", "when one comes", "gc"} {
		t.Run(how, func(t *testing.T) {
			a, b := newLab(t, crashfs.New(0), "/"), newLab(t, crashfs.New(0), "/")
			model := a.hotGenerations(t, "vm", 4, 1<<20, 0.4)
			needs, twice, last := store.Ref{VM: "vm", N: 3}, store.Ref{VM: "vm", N: 2}, store.Ref{VM: "vm", N: 4}
			a.ships(t, b, last)
			parts := func() (list []string) {
				for _, name := range b.tree(t) {
					if strings.HasPrefix(name, "vms/vm/00000002.") {
						list = append(list, name)
					}
				}
				return list
			}
			if len(parts()) < 2 {
				t.Fatalf("%v: not a part with pieces", parts())
			}
			var open io.Closer
			if how != "at once" {
				for _, name := range parts() {
					if strings.HasSuffix(name, ".gone") {
						f, err := b.fs.Open(filepath.Join(b.dir, name))
						if err == nil {
							err = f.TryLock(vfs.Shared)
						}
						if err != nil {
							t.Fatal(err)
						}
						open = f
					}
				}
			}
			whole, _, err := a.sent(b.has(t), twice)
			if err == nil {
				_, err = b.takes(whole, store.Ref{VM: "other"})
			}
			if err != nil {
				t.Fatal(err)
			}
			if open != nil {
				if len(parts()) == 0 {
					t.Error("what somebody has open is gone")
				}
				open.Close()
			}
			if how == "gc" {
				if rep, err := b.st.GC(t.Context()); err != nil || rep.Removed != 1 || len(rep.Warnings) > 0 {
					t.Errorf("%+v, %v", rep, err)
				}
			}
			if how != "when one comes" && len(parts()) > 0 {
				t.Errorf("left: %v", parts())
			}
			a.ships(t, b, needs)
			if left := parts(); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
			other := store.Ref{VM: "other", N: 1}
			b.holds(t, other, model[twice])
			if err := b.remove(other); err != nil {
				t.Fatal(err)
			}
			for _, ref := range []store.Ref{needs, last} {
				b.holds(t, ref, model[ref])
				if err := b.remove(ref); err != nil {
					t.Fatal(err)
				}
			}
			b.empty(t)
			b.noLeaks(t)
		})
	}
}

// TestTransferMends: when what a store has of an image with another is damaged, one that needs
// it is refused until the other is removed, and then comes with all that it needs.
func TestTransferMends(t *testing.T) {
	a, b := newLab(t, crashfs.New(0), "/"), newLab(t, crashfs.New(0), "/")
	model := a.hotGenerations(t, "vm", 4, 1<<20, 0.1)
	one, next := store.Ref{VM: "vm", N: 3}, store.Ref{VM: "vm", N: 4}
	a.ships(t, b, one)
	hurt := 0
	for _, name := range b.tree(t) {
		if strings.HasSuffix(name, ".gone") {
			b.rewrite(t, "/"+name, "", func(c []byte) []byte {
				for i := len(c) / 8; i < len(c)/2; i += 256 {
					c[i] ^= 1
				}
				return c
			})
			hurt++
		}
	}
	if hurt == 0 {
		t.Fatal("nothing came with it")
	}
	whole, _, err := a.sent(b.has(t), next)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.takes(whole, store.Ref{}); !integrity.IsCorrupt(err) || !strings.Contains(err.Error(), "verify --all") {
		t.Errorf("%v", err)
	}
	if len(b.verify(one)) == 0 {
		t.Errorf("%v is whole", one)
	}
	if err := b.remove(one); err != nil {
		t.Fatal(err)
	}
	if s, _ := a.ships(t, b, next); s.Images < 2 || s.Skipped == 0 {
		t.Errorf("%+v", s)
	}
	a.ships(t, b, one)
	for _, ref := range []store.Ref{one, next} {
		b.holds(t, ref, model[ref])
	}
	b.noLeaks(t)
}
