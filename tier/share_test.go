package tier_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/flic-migrate/flic-migrate/tier/dedup"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/save"
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
		for _, energy := range []dedup.Energy{dedup.EnergyFull, dedup.EnergyLow} {
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
		if none := o.Share == save.ShareNone; none != (meta.Report.NotShared != "") {
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
