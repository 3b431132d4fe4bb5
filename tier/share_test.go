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
	"testing"

	"github.com/flic-migrate/flic-migrate/tier/digest"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/share"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
	"github.com/flic-migrate/flic-migrate/tier/vfs/crashfs"
)

// TestShare saves VMs that have pages in common, of all shapes: what one has the others
// refer to, and each is what was saved.
func TestShare(t *testing.T) {
	blocks := []tiertest.Block{{Name: "pc.ram", Size: 2 << 20}, {Name: "rom", Size: 40 << 10}}
	for name, o := range map[string]tiertest.Options{
		"plain":      {Seed: 1, Blocks: blocks},
		"live":       {Seed: 2, Blocks: blocks, XBZRLE: true, Shuffle: true},
		"compressed": {Seed: 3, Blocks: blocks, Compress: 0.4, Fill: true},
		"1 KiB":      {Seed: 4, Blocks: blocks, PageSize: 1 << 10, PageBits: true, XBZRLE: true},
		"16 KiB":     {Seed: 5, Blocks: []tiertest.Block{{Name: "ram", Size: 8 << 20}}, PageSize: 16 << 10, Advise: true},
	} {
		for _, energy := range energies() {
			t.Run(fmt.Sprint(name, energy), func(t *testing.T) {
				t.Parallel()
				l := newLab(t, crashfs.New(0), "/")
				saved := map[store.Ref]*tiertest.Stream{}
				for n := 1; n <= 5; n++ {
					// Each VM goes on from the same guest, by one round more.
					s := generation(o, n)
					so := save.Options{VM: fmt.Sprint("vm", n), Energy: energy, SegmentPages: 5 + n, Codec: image.Codec(n % 4)}
					if n == 4 {
						so.WorkingSet, so.NVRAMSize = hotSet(t, s, every(3)), 8<<20
					}
					ref, meta := l.save(t, s, so)
					saved[ref] = s
					r := meta.Report
					if n == 1 && (r.Shared != 0 || len(meta.References) > 0) || n > 1 && n != 4 && r.Shared*4 < r.Pages-r.Zero || r.NotShared != "" {
						t.Errorf("%v: %d of %d pages shared (%d zero), %d references, %q", ref, r.Shared, r.Pages, r.Zero, len(meta.References), r.NotShared)
					}
					if r.Parent != "" || r.Unchanged != 0 {
						t.Errorf("%v has parent %q and %d unchanged", ref, r.Parent, r.Unchanged)
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

// TestShareOnly looks at which other checkpoints pages are looked for in.
func TestShareOnly(t *testing.T) {
	l := newLab(t, crashfs.New(0), "/")
	s := tiertest.New(tiertest.Options{Seed: 1})
	shared := func(o save.Options) int64 {
		t.Helper()
		ref, meta := l.save(t, s, o)
		l.holds(t, ref, s)
		none := o.Share == save.ShareNone || o.Share == "" && o.Parent == save.ParentNone
		if none != (meta.Report.NotShared != "") {
			t.Errorf("%v: not shared: %q", ref, meta.Report.NotShared)
		}
		return meta.Report.Shared
	}
	shared(save.Options{VM: "a"})
	all := shared(save.Options{VM: "b"})
	if all == 0 {
		t.Fatal("nothing is shared")
	}
	for _, c := range []struct {
		name string
		o    save.Options
		want int64
	}{
		{"none", save.Options{VM: "c", Share: save.ShareNone}, 0},
		{"all anew", save.Options{VM: "c", Parent: save.ParentNone}, 0},
		{"another domain", save.Options{VM: "d", TrustDomain: "d's"}, 0},
		{"the same of that domain", save.Options{VM: "e", TrustDomain: "d's"}, all},
		{"a VM's first", save.Options{VM: "f", Share: save.ShareVM}, 0},
		{"its second, without a parent", save.Options{VM: "f", Share: save.ShareVM, Parent: save.ParentNone}, all},
	} {
		if n := shared(c.o); n != c.want {
			t.Errorf("%s: %d pages shared, want %d", c.name, n, c.want)
		}
	}
	l.noLeaks(t)
}

// TestShareIndexLost takes the index away, damages it, and puts another one in its place:
// less is found, or as much, and never a wrong page.
func TestShareIndexLost(t *testing.T) {
	for name, harm := range map[string]func(t *testing.T, l *lab, run string){
		"gone":      func(t *testing.T, l *lab, run string) { os.Remove(run) },
		"all gone":  func(t *testing.T, l *lab, run string) { os.RemoveAll(filepath.Dir(run)) },
		"header":    func(t *testing.T, l *lab, run string) { edit(t, run, func(b []byte) []byte { b[20] ^= 1; return b }) },
		"cut":       func(t *testing.T, l *lab, run string) { edit(t, run, func(b []byte) []byte { return b[:len(b)/2] }) },
		"empty":     func(t *testing.T, l *lab, run string) { edit(t, run, func(b []byte) []byte { return nil }) },
		"leaf":      func(t *testing.T, l *lab, run string) { edit(t, run, func(b []byte) []byte { b[8200] ^= 1; return b }) },
		"a folder":  func(t *testing.T, l *lab, run string) { os.Remove(run); os.Mkdir(run, 0o700) },
		"nothing":   func(t *testing.T, l *lab, run string) {},
		"read-only": func(t *testing.T, l *lab, run string) { os.Chmod(run, 0o400) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := newLab(t, vfs.OS, t.TempDir())
			s := tiertest.New(tiertest.Options{Seed: 1})
			l.save(t, s, save.Options{VM: "a"})
			_, meta := l.save(t, s, save.Options{VM: "b"})
			want := meta.Report.Shared
			runs, err := filepath.Glob(filepath.Join(l.dir, "share", "default", "*.run"))
			if err != nil || len(runs) != 1 || want == 0 {
				t.Fatal(runs, want, err)
			}
			harm(t, l, runs[0])
			ref, _ := l.save(t, s, save.Options{VM: "c"})
			l.holds(t, ref, s)
			if rep, err := l.st.GC(t.Context()); err != nil || len(rep.Warnings) > 0 && !strings.Contains(rep.Warnings[0], "index") {
				t.Errorf("gc: %+v, %v", rep, err)
			}
			ref, meta = l.save(t, s, save.Options{VM: "d"})
			l.holds(t, ref, s)
			if meta.Report.Shared != want && name != "a folder" {
				t.Errorf("after gc %d pages are shared, want %d", meta.Report.Shared, want)
			}
			l.noLeaks(t)
		})
	}
}

// TestShareLeafDropped damages a leaf of a run that is written again because half of its images
// are gone: it is made again from those that are there, and nobody need be told.
func TestShareLeafDropped(t *testing.T) {
	l := newLab(t, vfs.OS, t.TempDir())
	s := tiertest.New(tiertest.Options{Seed: 1})
	l.save(t, s, save.Options{VM: "a"})
	gone, _ := l.save(t, tiertest.New(tiertest.Options{Seed: 2}), save.Options{VM: "b"})
	l.save(t, s, save.Options{VM: "c"})
	if _, err := l.st.GC(t.Context()); err != nil {
		t.Fatal(err)
	}
	_, meta := l.save(t, s, save.Options{VM: "d"})
	want := meta.Report.Shared
	if err := l.remove(gone); err != nil {
		t.Fatal(err)
	}
	for _, vm := range []string{"c", "d"} {
		if err := l.remove(store.Ref{VM: vm, N: 1}); err != nil {
			t.Fatal(err)
		}
	}
	runs, err := filepath.Glob(filepath.Join(l.dir, "share", "default", "*.run"))
	if err != nil || len(runs) == 0 || want == 0 {
		t.Fatal(runs, want, err)
	}
	for _, run := range runs {
		edit(t, run, func(b []byte) []byte { b[8200] ^= 1; return b })
	}
	if rep, err := l.st.GC(t.Context()); err != nil || len(rep.Warnings) > 0 {
		t.Errorf("gc: %+v, %v", rep, err)
	}
	ref, meta := l.save(t, s, save.Options{VM: "e"})
	l.holds(t, ref, s)
	if meta.Report.Shared != want {
		t.Errorf("after gc %d pages are shared, want %d", meta.Report.Shared, want)
	}
	l.noLeaks(t)
}

// TestShareForged gives a save an index that says of every page that it is where it is not:
// nothing is believed.
func TestShareForged(t *testing.T) {
	l := newLab(t, vfs.OS, t.TempDir())
	s, other := tiertest.New(tiertest.Options{Seed: 1}), tiertest.New(tiertest.Options{Seed: 2})
	l.save(t, other, save.Options{VM: "a"})
	_, meta := l.save(t, s, save.Options{VM: "b"}) // adds a's pages to the index
	h, err := l.st.Trust(t.Context(), store.DefaultDomain)
	if err != nil {
		t.Fatal(err)
	}
	c, err := l.st.Share(store.DefaultDomain)
	if err != nil {
		t.Fatal(err)
	}
	a, err := l.st.Describe(t.Context(), store.Ref{VM: "a", N: 1})
	if err != nil {
		t.Fatal(err)
	}
	// The digests of b's pages, as they would be found in a, in slots that are there, in
	// those that are not, and in an image that is not a's.
	locked, err := c.Lock(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var list []share.Source
	for _, im := range []share.Image{{UUID: a.UUID, VM: "a", Number: 1}, {UUID: meta.UUID, VM: "a", Number: 1}, {UUID: a.UUID, VM: "../a", Number: -1}} {
		list = append(list, share.Source{Image: im, Each: func(fn func(digest.Sum, uint64) error) error {
			page := make([]byte, s.PageSize())
			for i := range s.Pages(0) {
				if s.Page(page, 0, i) {
					slot := i
					if i%3 == 0 {
						slot = 1<<32 - 1 - i
					}
					if err := fn(h.Sum(page), slot); err != nil {
						return err
					}
				}
			}
			return nil
		}})
	}
	if _, err := locked.Add(t.Context(), share.NewKeyID(h), list); err != nil {
		t.Fatal(err)
	}
	if err := locked.Seal(share.NewKeyID(h)); err != nil {
		t.Fatal(err)
	}
	locked.Unlock()
	ref, meta := l.save(t, s, save.Options{VM: "c"})
	l.holds(t, ref, s)
	for _, to := range meta.References {
		if to == a.UUID {
			t.Error("it refers to what does not have its pages")
		}
	}
	l.noLeaks(t)
}

// TestShareDamage damages an image that others refer to: each of them says so, and what is
// saved after it does not depend on what is damaged.
func TestShareDamage(t *testing.T) {
	l := newLab(t, vfs.OS, t.TempDir())
	s := tiertest.New(tiertest.Options{Seed: 1, Mix: tiertest.Mix{tiertest.Random: 1}})
	first, _ := l.save(t, s, save.Options{VM: "a"})
	var refs []store.Ref
	for _, vm := range []string{"b", "c", "d"} {
		ref, meta := l.save(t, s, save.Options{VM: vm})
		if meta.Report.Shared == 0 {
			t.Fatalf("%v shares nothing", ref)
		}
		refs = append(refs, ref)
	}
	path := filepath.Join(l.dir, "vms", "a", "00000001.flic")
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	edit(t, path, func(b []byte) []byte { b[len(b)/3] ^= 1; return b })
	for _, ref := range append(refs, first) {
		if found := l.verify(ref); len(found) == 0 || !strings.Contains(errors.Join(found...).Error(), path) {
			t.Errorf("verify of %v: %v", ref, found)
		}
		if err := l.restore(ref, io.Discard); !integrity.IsCorrupt(err) {
			t.Errorf("restore of %v: %v", ref, err)
		}
	}
	// Its digests and its description, of which a save depends.
	for at := len(good) - 1; at > len(good)-6000; at -= 531 {
		edit(t, path, func([]byte) []byte { b := bytes.Clone(good); b[at] ^= 1; return b })
		o := save.Options{VM: fmt.Sprint("e", at), Share: save.ShareStore}
		ref, _, err := l.trySave(s, o)
		if err != nil {
			t.Errorf("byte %d: %v", at, err)
			continue
		}
		os.WriteFile(path, good, 0o600)
		l.holds(t, ref, s)
	}
	l.noLeaks(t)
}

// TestShareGone shares with what others keep of a checkpoint that was removed, and with
// nothing that may have been freed of it.
func TestShareGone(t *testing.T) {
	l := newLab(t, crashfs.New(0), "/")
	o := tiertest.Options{Seed: 1, Blocks: []tiertest.Block{{Name: "pc.ram", Size: 4 << 20}}, Mix: tiertest.Mix{tiertest.Random: 1}}
	s := tiertest.New(o)
	l.save(t, s, save.Options{VM: "a"})
	// It needs about half of a, in some segments more than in others.
	o.Blocks[0].Size = 2 << 20
	half := tiertest.New(o)
	kept, meta := l.save(t, half, save.Options{VM: "b"})
	if meta.Report.Shared < meta.Report.Pages*3/4 {
		t.Fatalf("%d of %d pages shared", meta.Report.Shared, meta.Report.Pages)
	}
	if err := l.remove(store.Ref{VM: "a", N: 1}); err != nil {
		t.Fatal(err)
	}
	if _, err := l.st.GC(t.Context()); err != nil {
		t.Fatal(err)
	}
	ref, meta := l.save(t, s, save.Options{VM: "c"})
	if n := meta.Report.Shared; n < 300 || n > 600 {
		t.Errorf("%d pages are shared with what is left", n)
	}
	l.holds(t, ref, s)
	if err := l.remove(kept); err != nil {
		t.Fatal(err)
	}
	if _, err := l.st.GC(t.Context()); err != nil {
		t.Fatal(err)
	}
	l.holds(t, ref, s)
	if err := l.remove(ref); err != nil {
		t.Fatal(err)
	}
	for _, name := range l.tree(t) {
		if fi, err := l.fs.Stat(filepath.Join(l.dir, name)); err == nil && strings.HasSuffix(name, ".gone") && fi.Size() > 0 {
			t.Errorf("%s is kept for nobody", name)
		}
	}
	// What stands for the highest number of a VM is no image that has pages.
	if _, err := l.st.GC(t.Context()); err != nil {
		t.Fatal(err)
	}
	h, err := l.st.Trust(t.Context(), store.DefaultDomain)
	if err != nil {
		t.Fatal(err)
	}
	c, err := l.st.Share(store.DefaultDomain)
	if err != nil {
		t.Fatal(err)
	}
	x, err := c.Open(t.Context(), share.NewKeyID(h))
	if err != nil {
		t.Fatal(err)
	}
	if n := x.Records(); n > 0 {
		t.Errorf("%d records of images that are gone are left in the index", n)
	}
	x.Close()
	l.noLeaks(t)
}

// TestTotals counts what VMs take, and what they have in common.
func TestTotals(t *testing.T) {
	l := newLab(t, crashfs.New(0), "/")
	s := tiertest.New(tiertest.Options{Seed: 1, Mix: tiertest.Mix{tiertest.Random: 1}})
	of := func(vm string) (n store.Total) {
		t.Helper()
		list, left, err := l.st.Totals(t.Context())
		if err != nil || left != nil {
			t.Fatal(left, err)
		}
		for _, e := range list {
			if e.VM == vm {
				n = e
			}
		}
		return n
	}
	l.save(t, s, save.Options{VM: "a"})
	l.save(t, s, save.Options{VM: "a"})
	l.save(t, s, save.Options{VM: "b"})
	l.save(t, s, save.Options{VM: "c"})
	l.save(t, s, save.Options{VM: "d", TrustDomain: "other"})
	a, b, d := of("a"), of("b"), of("d")
	if a.Checkpoints != 2 || a.Lent == 0 || a.Lent > a.Flash || a.Borrowed != 0 || a.Kept != 0 || a.TrustDomain != store.DefaultDomain {
		t.Errorf("a: %+v", a)
	}
	if b.Borrowed == 0 || b.Borrowed > a.Lent || b.Flash > a.Flash/4 || b.Lent != 0 {
		t.Errorf("b: %+v", b)
	}
	if d.Lent+d.Borrowed != 0 || d.TrustDomain != "other" || d.Flash < a.Lent {
		t.Errorf("d: %+v", d)
	}
	if all := of(""); all.TrustDomain != "other" || all.Flash != d.Flash { // the last of the domains
		t.Errorf("domain: %+v", all)
	}
	for n := 1; n <= 2; n++ {
		if err := l.remove(store.Ref{VM: "a", N: n}); err != nil {
			t.Fatal(err)
		}
	}
	if e := of("a"); e.Checkpoints != 0 || e.Flash != 0 || e.Kept == 0 || e.Lent != a.Lent {
		t.Errorf("a, removed: %+v, and was %+v", e, a)
	}
	if bytes := of("b").Borrowed; bytes != b.Borrowed {
		t.Errorf("b borrows %d, and borrowed %d", bytes, b.Borrowed)
	}
	l.noLeaks(t)
}

// TestReplacedWhileSaved: an image that a save holds to refer to is replaced before the commit,
// as by what a receive has of it. What has its name now nobody holds: the checkpoint is not made,
// alone and in a group, also where a snapshot of the store still has the one that was held.
func TestReplacedWhileSaved(t *testing.T) {
	s := tiertest.New(tiertest.Options{Seed: 1})
	image := func(suffix string) string { return "/vms/vm/00000001" + suffix }
	for what, so := range map[string]save.Options{
		"the parent":             {VM: "vm"},
		"another VM's":           {VM: "other"},
		"another VM's, unlisted": {VM: "third"},
	} {
		for _, group := range []bool{false, true} {
			l := newLab(t, crashfs.New(0), "/")
			ref, _ := l.save(t, s, save.Options{})
			name := image(".flic")
			if so.VM == "third" {
				l.save(t, s, save.Options{VM: "other"})
				if err := l.remove(ref); err != nil {
					t.Fatal(err)
				}
				name = image(".gone")
			}
			so.Commit = func(ctx context.Context, tx *store.Tx) (store.Ref, error) {
				b := l.file(t, name)
				if err := l.fs.Link(l.dir+name, l.dir+"/snapshot"); err != nil {
					t.Error(err)
				}
				l.write(t, name, b)
				if group {
					_, err := l.st.CommitGroup(ctx, store.Group{Name: "g", Mode: "stop"}, []*store.Tx{tx})
					return tx.Ref(), err
				}
				return tx.Commit(ctx)
			}
			before, err := l.st.List(t.Context(), "")
			if err != nil {
				t.Fatal(err)
			}
			if _, _, err := l.trySave(s, so); !errors.Is(err, store.ErrInUse) {
				t.Errorf("%s, group %v: %v", what, group, err)
			}
			if now, err := l.st.List(t.Context(), ""); err != nil || !slices.Equal(now, before) {
				t.Errorf("%s, group %v: %v, %v", what, group, now, err)
			}
			l.noLeaks(t)
		}
	}
}

// TestShareLater finds pages in images that have come in other ways than by a save.
func TestShareLater(t *testing.T) {
	s := tiertest.New(tiertest.Options{Seed: 1})
	a, b := store.Ref{VM: "a", N: 1}, store.Ref{VM: "b", N: 1}
	for name, change := range map[string]func(l *lab) error{
		"flatten": func(l *lab) error {
			_, _, err := l.flatten(b) // which referred to a
			return errors.Join(err, l.remove(a))
		},
		"persist": func(l *lab) error {
			_, _, err := l.copy(a, image.MinLZ)
			return errors.Join(err, l.remove(b), l.remove(a))
		},
		"receive": func(l *lab) error {
			other := newLab(t, crashfs.New(0), "/")
			l.ships(t, other, a)
			err := errors.Join(l.remove(b), l.remove(a))
			if err == nil {
				_, err = l.st.GC(t.Context())
			}
			other.ships(t, l, a)
			return err
		},
	} {
		l := newLab(t, crashfs.New(0), "/")
		l.save(t, s, save.Options{VM: "a"})
		_, meta := l.save(t, s, save.Options{VM: "b"}) // makes the index
		want := meta.Report.Shared
		if err := change(l); err != nil || want == 0 {
			t.Errorf("%s: %v; %d pages were shared", name, err, want)
		}
		ref, meta := l.save(t, s, save.Options{VM: "c"})
		if meta.Report.Shared < want {
			t.Errorf("%s: %d pages are shared, not %d", name, meta.Report.Shared, want)
		}
		l.holds(t, ref, s)
		l.noLeaks(t)
	}
}
