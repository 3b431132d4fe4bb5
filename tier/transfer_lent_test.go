package tier_test

import (
	"bytes"
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/dedup"
	"github.com/flic-migrate/flic-migrate/tier/digest"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/vfs/crashfs"
)

// guestOnDisk saves a guest so often, with a disk that has every second of its pages and stays
// as it is: of these the guest changes few.
func guestOnDisk(t *testing.T, times int, size uint64) (l *lab, saved map[store.Ref]*tiertest.Stream, list []store.Ref) {
	t.Helper()
	l = newLab(t, crashfs.New(0), "/")
	o := tiertest.Options{Seed: 1, Blocks: []tiertest.Block{{Name: "pc.ram", Size: size}}}
	disk := newRawDisk(t, filepath.Join(t.TempDir(), "a"), digest.Fresh(), 2, generation(o, 1)).open(t)
	saved = make(map[store.Ref]*tiertest.Stream)
	for n := range times {
		s := generation(o, n+1)
		ref, _ := l.save(t, s, save.Options{Energy: dedup.EnergyFull, DiskEnough: 1, Disks: []save.Disk{disk}})
		saved[ref] = s
		list = append(list, ref)
	}
	return l, saved, list
}

// ending are a store's files whose names end so, with their lengths.
func (l *lab) ending(t *testing.T, suffixes ...string) (names []string, bytes int64) {
	t.Helper()
	for _, name := range l.tree(t) {
		if !slices.Contains(suffixes, filepath.Ext(name)) {
			continue
		}
		fi, err := l.fs.Stat(filepath.Join(l.dir, name))
		if err != nil {
			t.Fatal(err)
		}
		names, bytes = append(names, name), bytes+fi.Size()
	}
	return names, bytes
}

// TestTransferLent: of a guest's pages on a disk what an earlier copy has is stored once, for
// all of them, as long as one needs it, whichever goes first; what it is lent a copy sends on;
// and when all are removed nothing is left.
func TestTransferLent(t *testing.T) {
	a, saved, list := guestOnDisk(t, 4, 2<<20)
	b, c := newLab(t, crashfs.New(0), "/"), newLab(t, crashfs.New(0), "/")
	whole := func(l *lab) {
		t.Helper()
		refs, err := l.st.List(t.Context(), "")
		if err != nil {
			t.Fatal(err)
		}
		for _, ref := range refs {
			l.holds(t, ref, saved[ref])
		}
	}
	gc := func(l *lab) {
		t.Helper()
		if rep, err := l.st.GC(t.Context()); err != nil || len(rep.Warnings) > 0 {
			t.Errorf("gc: %+v, %v", rep, err)
		}
		whole(l)
	}
	var was, first int64
	for n, ref := range list {
		_, r := a.ships(t, b, ref)
		_, now := b.ending(t, ".moved", ".lent")
		took := now - was
		was = now
		d, err := b.st.Describe(t.Context(), ref)
		if err != nil {
			t.Fatal(err)
		}
		pages := int64(d.Meta.DiskSlots) * int64(d.Meta.PageSize)
		t.Logf("%v: %d bytes of pages on disks, %d sent, %d stored", ref, pages, r.DiskBytes, took)
		if n == 0 {
			first = took
		} else if took > r.DiskBytes+8<<10 || took > first/10 || pages < first/2 {
			t.Errorf("%v: %d bytes of disks were sent, and took %d; all are %d", ref, r.DiskBytes, took, pages)
		}
	}
	if lent, _ := b.ending(t, ".lent"); len(lent) != 3 {
		t.Errorf("lent: %q", lent)
	}
	whole(b)
	sh, err := b.st.Sharing(t.Context(), list[0])
	if err != nil || sh.Held.Flash < first/2 || sh.RmFrees.Flash > first {
		t.Errorf("%+v, %v: pieces of %d bytes", sh, err, first)
	}
	// Alone it is whole there, and what b was lent it sends.
	if s, _ := b.ships(t, c, list[3]); s.FromDisks > 0 {
		t.Errorf("%+v", s)
	}
	whole(c)
	// The one that lends most goes, and what nobody needs of it.
	before, _ := b.taken(t)
	if err := b.remove(list[0]); err != nil {
		t.Fatal(err)
	}
	gc(b)
	if after, _ := b.taken(t); before-after < sh.RmFrees.Flash {
		t.Errorf("%d bytes were freed of %d", before-after, sh.RmFrees.Flash)
	}
	// It comes back, under another name, and takes the place of what was left.
	back, _, err := a.sent(b.has(t), list[0])
	if err != nil {
		t.Fatal(err)
	}
	got, err := b.takes(back, store.Ref{VM: "x"})
	if err != nil {
		t.Fatal(err)
	}
	saved[got[0].Ref] = saved[list[0]]
	gc(b)
	if names := b.tree(t); slices.ContainsFunc(names, func(n string) bool { return strings.HasSuffix(n, "vm/00000001.gone") }) {
		t.Errorf("left: %q", names)
	}
	if err := b.remove(got[0].Ref); err != nil {
		t.Fatal(err)
	}
	gc(b)
	// One that borrows is flattened while somebody has it open.
	open, err := b.st.OpenCheckpoint(t.Context(), list[2], checkpoint.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := b.flatten(list[2]); err != nil {
		t.Fatal(err)
	}
	gc(b)
	var damage []error
	if err := open.Verify(t.Context(), func(err error) { damage = append(damage, err) }); err != nil || len(damage) > 0 {
		t.Errorf("open while it was flattened: %v, %v", damage, err)
	}
	open.Close()
	gc(b)
	if lent, _ := b.ending(t, ".lent"); len(lent) != 2 {
		t.Errorf("lent: %q", lent)
	}
	for _, ref := range []store.Ref{list[1], list[2], list[3]} {
		if err := b.remove(ref); err != nil {
			t.Error(err)
		}
		whole(b)
	}
	b.noLeaks(t)
	b.empty(t)
	if lent, _ := b.ending(t, ".lent"); len(lent) > 0 {
		t.Errorf("lent: %q", lent)
	}
}

// TestTransferLentDamage: a byte that is wrong in what a copy is lent, or in what says where
// that is, is found in each that borrows, with its file; and if what is lent is not there it is
// refused.
func TestTransferLentDamage(t *testing.T) {
	a, saved, list := guestOnDisk(t, 2, 256<<10)
	b := newLab(t, crashfs.New(0), "/")
	for _, ref := range list {
		a.ships(t, b, ref)
	}
	verify := func() []error {
		c, err := b.st.OpenCheckpoint(t.Context(), list[1], checkpoint.Options{})
		if err != nil {
			return []error{err}
		}
		defer c.Close()
		var found []error
		if err := c.Verify(t.Context(), func(err error) { found = append(found, err) }); err != nil {
			found = append(found, err)
		}
		return found
	}
	lent, _ := b.ending(t, ".lent")
	if len(lent) != 1 {
		t.Fatalf("lent: %q", lent)
	}
	path := filepath.Join(b.dir, lent[0])
	for off := range len(b.content(t, path)) {
		found := b.flipped(t, path, int64(off), verify)
		if len(found) == 0 || !integrity.IsCorrupt(found[0]) || !strings.Contains(found[0].Error(), lent[0]) {
			t.Fatalf("byte %d of %s: %v", off, lent[0], found)
		}
	}
	pieces := b.pieces(t)
	path = filepath.Join(b.dir, pieces[0])
	damaged := 0
	for off := 4096; off < len(b.content(t, path)); off += 4096 {
		found := b.flipped(t, path, int64(off+17), verify)
		if len(found) > 0 {
			damaged++
			if !integrity.IsCorrupt(found[0]) || !strings.Contains(found[0].Error(), pieces[0]) {
				t.Fatalf("byte %d of %s: %v", off, pieces[0], found)
			}
		}
	}
	if damaged < 5 {
		t.Errorf("%d pages of %s are needed", damaged, pieces[0])
	}
	was := b.content(t, path)
	if err := b.fs.Remove(path); err != nil {
		t.Fatal(err)
	}
	if found := verify(); len(found) == 0 || !integrity.IsCorrupt(found[0]) {
		t.Errorf("without %s: %v", pieces[0], found)
	}
	b.write(t, "/"+pieces[0], was)
	b.holds(t, list[1], saved[list[1]])
	// Nothing is freed of what may be lent as long as it can't be told.
	if found := b.flipped(t, filepath.Join(b.dir, lent[0]), 50, func() []error {
		if err := b.remove(list[0]); err != nil {
			return []error{err}
		}
		_, err := b.st.GC(t.Context())
		return []error{err}
	}); !integrity.IsCorrupt(found[0]) {
		t.Errorf("gc beside a damaged list: %v", found)
	}
	b.holds(t, list[1], saved[list[1]])
	b.noLeaks(t)
}

// TestTransferLentKilled ends a receiver that borrows, and those who free what lends, at every
// operation, and lets each fail: what is listed is whole, and in the end nothing is left.
func TestTransferLentKilled(t *testing.T) {
	a, saved, list := guestOnDisk(t, 2, 128<<10)
	one, two := list[0], list[1]
	first, _, err := a.sent(nil, one)
	if err != nil {
		t.Fatal(err)
	}
	check := func(t *testing.T, b *lab, must ...store.Ref) {
		t.Helper()
		refs, err := b.st.List(t.Context(), "")
		if err != nil {
			t.Fatal(err)
		}
		for _, ref := range must {
			if !slices.Contains(refs, ref) {
				t.Fatalf("%v is not there: %v", ref, refs)
			}
		}
		whole := func() {
			t.Helper()
			for _, ref := range refs {
				b.holds(t, ref, saved[ref])
			}
		}
		whole()
		if rep, err := b.st.GC(t.Context()); err != nil || len(rep.Warnings) > 0 {
			t.Errorf("gc: %+v, %v", rep, err)
		}
		whole()
		for len(refs) > 0 {
			if err := b.remove(refs[0]); err != nil {
				t.Fatal(err)
			}
			refs = refs[1:]
			whole()
		}
		if _, err := b.st.GCAfter(t.Context(), 0, 0); err != nil {
			t.Error(err)
		}
		b.empty(t)
		if lent, _ := b.ending(t, ".lent"); len(lent) > 0 {
			t.Errorf("left: %q", lent)
		}
		b.noLeaks(t)
	}
	for name, what := range map[string]struct {
		both bool
		do   func(b *lab, second []byte) error
		must []store.Ref
	}{
		"receive":             {false, func(b *lab, second []byte) error { _, err := b.takes(second, store.Ref{}); return err }, []store.Ref{one}},
		"rm of a lender":      {true, func(b *lab, _ []byte) error { return b.remove(one) }, []store.Ref{two}},
		"rm of a borrower":    {true, func(b *lab, _ []byte) error { return b.remove(two) }, []store.Ref{one}},
		"flatten of a lender": {true, func(b *lab, _ []byte) error { _, _, err := b.flatten(one); return err }, []store.Ref{one, two}},
		"flatten of a borrower": {true, func(b *lab, _ []byte) error {
			_, _, err := b.flatten(two)
			if err == nil {
				_, err = b.st.GC(t.Context())
			}
			return err
		}, []store.Ref{one, two}},
	} {
		begin := func(t *testing.T) (*crashfs.FS, *lab, []byte) {
			disk := crashfs.New(0)
			b := newLab(t, disk, "/")
			if _, err := b.takes(first, store.Ref{}); err != nil {
				t.Fatal(err)
			}
			second, _, err := a.sent(b.has(t), two)
			if err == nil && what.both {
				_, err = b.takes(second, store.Ref{})
			}
			if err != nil {
				t.Fatal(err)
			}
			return disk, b, second
		}
		t.Run(name, func(t *testing.T) {
			ops := everyOp(t, func(t *testing.T, n int) bool {
				disk, b, second := begin(t)
				disk.KillAt(n)
				_ = what.do(b, second)
				for seed := range uint64(2) {
					check(t, b.on(t, disk.CrashClone(seed)), what.must...)
				}
				check(t, b.on(t, disk.Fork()), what.must...)
				return disk.Killed()
			})
			if ops < 5 {
				t.Errorf("only %d operations", ops)
			}
			for _, fault := range faultsAt {
				everyOp(t, func(t *testing.T, n int) bool {
					disk, b, second := begin(t)
					before := len(disk.Ops())
					fault.arm(disk, n)
					err := what.do(b, second)
					hit := len(disk.Ops())-before > n
					if err != nil && !errors.Is(err, fault.err) {
						t.Errorf("%v", err)
					}
					disk.Heal()
					b.noLeaks(t)
					check(t, b, what.must...)
					return hit
				})
			}
		})
	}
}

// TestTransferLentRemoved: what lends can't go while a receiver borrows from it.
func TestTransferLentRemoved(t *testing.T) {
	a, saved, list := guestOnDisk(t, 2, 256<<10)
	b := newLab(t, crashfs.New(0), "/")
	a.ships(t, b, list[0])
	second, _, err := a.sent(b.has(t), list[1])
	if err != nil {
		t.Fatal(err)
	}
	var rm error
	err = b.st.Receive(t.Context(), atEnd(bytes.Clone(second), func() {
		rm = b.remove(list[0])
		if _, err := b.st.GC(t.Context()); err != nil {
			t.Error(err)
		}
	}), store.ReceiveOptions{})
	if err != nil || !errors.Is(rm, store.ErrInUse) {
		t.Errorf("receive: %v; rm meanwhile: %v", err, rm)
	}
	if err := b.remove(list[0]); err != nil {
		t.Fatal(err)
	}
	b.holds(t, list[1], saved[list[1]])
	b.noLeaks(t)
}
