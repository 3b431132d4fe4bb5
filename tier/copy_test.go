package tier_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/vfs/crashfs"
	"github.com/flic-migrate/flic-migrate/tier/workingset"
)

func (l *lab) copy(ref store.Ref, codec image.Codec) (store.Ref, *checkpoint.Meta, error) {
	c, err := l.st.OpenCheckpoint(context.Background(), ref, checkpoint.Options{})
	if err != nil {
		return store.Ref{}, nil, err
	}
	defer c.Close()
	return l.st.Copy(context.Background(), c, store.CopyOptions{Codec: codec, Workers: 1})
}

// TestCopy copies checkpoints of all that streams can have: the copy gives the same
// stream byte by byte, says the same of itself, and has all on flash.
func TestCopy(t *testing.T) {
	for name, so := range map[string]tiertest.Options{
		"plain":       {Seed: 1, Blocks: []tiertest.Block{{Name: "pc.ram", Size: 2 << 20}, {Name: "rom", Size: 64 << 10}}},
		"resent":      {Seed: 2, Passes: 3, Resend: 0.4, XBZRLE: true},
		"compressed":  {Seed: 3, Compress: 0.5},
		"absent":      {Seed: 4, Mix: tiertest.Mix{tiertest.Absent: 1, tiertest.Text: 1, tiertest.Zero: 1}},
		"small pages": {Seed: 5, PageSize: 1 << 10},
	} {
		for _, hot := range []uint64{0, 1, 3} {
			t.Run(fmt.Sprint(name, hot), func(t *testing.T) {
				l := newLab(t, crashfs.New(0), "/")
				s := tiertest.New(so)
				o := save.Options{RunState: "running", Libvirt: &checkpoint.Libvirt{XML: "<domain/>", SaveFile: []byte("head")}, SegmentPages: 6}
				if hot > 0 {
					o.WorkingSet = hotSet(t, s, every(hot))
				}
				ref, was := l.save(t, s, o)
				want := l.restored(t, ref)
				for i, codec := range []image.Codec{image.None, image.LZ4, image.MinLZ, image.Zstd} {
					to, meta, err := l.copy(ref, codec)
					if err != nil || to.N != i+2 {
						t.Fatalf("copy to %v: %v", to, err)
					}
					if got := l.restored(t, to); !bytes.Equal(got, want) {
						t.Errorf("%v: the copy gives another stream", codec)
					}
					for _, err := range l.verify(to) {
						t.Errorf("%v: verify: %v", codec, err)
					}
					d, err := l.st.Describe(t.Context(), to)
					if err != nil {
						t.Fatal(err)
					}
					if d.NVRAM != nil || d.Report.Hot != 0 || d.Report.NVRAMBytes != 0 || d.Report.Cold != was.Report.Hot+was.Report.Cold || d.UUID != meta.UUID || d.UUID == was.UUID {
						t.Errorf("%v: the copy says %+v", codec, d.Identity)
					}
					// All else is as it was.
					same, orig := *d.Meta, *was
					for _, m := range []*checkpoint.Meta{&same, &orig} {
						m.UUID, m.Number, m.NVRAM, m.Digests, m.MapChunks, m.Report, m.Created = orig.UUID, 0, nil, nil, nil, checkpoint.Report{}, m.Created.UTC().Round(0)
					}
					if !reflect.DeepEqual(same, orig) {
						t.Errorf("%v: the copy says\n%+v, and the original\n%+v", codec, same, orig)
					}
				}
				l.noLeaks(t)
			})
		}
	}
}

// TestCopyNeedsNoNVRAM restores a copy when the NVRAM file is gone.
func TestCopyNeedsNoNVRAM(t *testing.T) {
	l := newLab(t, crashfs.New(0), "/")
	s := small(1)
	ref, _ := l.save(t, s, smallOptions(t, s))
	learned := []workingset.PageRun{{Page: 1, Count: 2}}
	if err := l.st.AddTouched(t.Context(), ref, 4096, []string{"pc.ram", "rom"}, learned); err != nil {
		t.Fatal(err)
	}
	to, _, err := l.copy(ref, image.MinLZ)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := l.st.Touched(t.Context(), to); err != nil || !slices.Equal(got.Runs, learned) {
		t.Errorf("what resumes have learned: %v, %v", got.Runs, err)
	}
	if err := l.fs.Remove(l.nvram); err != nil {
		t.Fatal(err)
	}
	l.holds(t, to, s)
}

// TestCopyLabel: a copy is there with what users say of the original, or not at all.
func TestCopyLabel(t *testing.T) {
	s := small(1)
	n := everyOp(t, func(t *testing.T, n int) bool {
		disk := crashfs.New(0)
		l := newLab(t, disk, "/")
		ref, _ := l.save(t, s, smallOptions(t, s))
		want := store.Label{Tags: []string{"golden"}, Note: "n"}
		if _, _, _, err := l.st.ChangeLabel(t.Context(), ref, func(l *store.Label) { *l = want }); err != nil {
			t.Fatal(err)
		}
		before := len(disk.Ops())
		disk.FailAt(n, syscall.ENOSPC)
		_, _, err := l.copy(ref, image.None)
		hit := len(disk.Ops())-before > n
		disk.Heal()
		refs, lerr := l.st.List(t.Context(), "")
		if lerr != nil || err != nil && len(refs) != 1 && !store.IsUncertain(err) || err == nil && len(refs) != 2 {
			t.Errorf("copy: %v, and there is %v, %v", err, refs, lerr)
		}
		for _, r := range refs {
			if have, err := l.st.Label(t.Context(), r); err != nil || !reflect.DeepEqual(have, want) {
				t.Errorf("of %v users say %+v, %v", r, have, err)
			}
		}
		return hit
	})
	if n < 8 {
		t.Errorf("the copy had only %d operations", n)
	}
}

// TestKillCopy ends the process at every operation of a copy, and lets every one
// fail.
func TestKillCopy(t *testing.T) {
	sc := newScene(t, 1)
	may := with(sc.before, 2, sc.before[1])
	// The copy has no extent in NVRAM, as the other checkpoints of a scene have.
	sc.free = -1
	from := store.Ref{VM: "vm", N: 1}
	n := everyOp(t, func(t *testing.T, n int) bool {
		disk, l := sc.run(t)
		disk.KillAt(n)
		_, _, err := l.copy(from, image.LZ4)
		must := []int{1}
		if err == nil {
			must = append(must, 2)
		}
		sc.survives(t, disk, may, must...)
		return disk.Killed()
	})
	if n < 8 {
		t.Errorf("the copy had only %d operations", n)
	}
	for name, fault := range faultsAt {
		t.Run(name, func(t *testing.T) {
			everyOp(t, func(t *testing.T, n int) bool {
				disk, l := sc.run(t)
				before := len(disk.Ops())
				fault.arm(disk, n)
				_, _, err := l.copy(from, image.LZ4)
				hit := len(disk.Ops())-before > n
				if err != nil && !errors.Is(err, fault.err) {
					t.Errorf("copy: %v", err)
				}
				disk.Heal()
				l.noLeaks(t)
				if err == nil {
					sc.check(t, l, may, 1, 2)
				} else if store.IsUncertain(err) {
					sc.survives(t, disk, may, 1)
				} else {
					sc.survives(t, disk, sc.before, 1)
				}
				return hit
			})
		})
	}
}

// TestCopyDamaged copies no damage.
func TestCopyDamaged(t *testing.T) {
	d := newDamaged(t, tiny(tiertest.Options{Seed: 4}), image.LZ4)
	file := d.image()
	var refused int
	for off := int64(128); off < d.size(t, file); off += 37 {
		back := d.flip(t, file, off, 2)
		to, _, err := d.copy(d.ref, image.LZ4)
		back()
		if err != nil {
			refused++
			if !strings.Contains(err.Error(), file) {
				t.Errorf("byte %d: %v", off, err)
			}
			continue
		}
		// What a copy does not need it need not notice.
		if got := d.restored(t, to); !bytes.Equal(got, d.want) {
			t.Fatalf("byte %d: copied with the damage", off)
		}
		if err := d.remove(to); err != nil {
			t.Fatal(err)
		}
	}
	if refused < 10 {
		t.Errorf("only %d copies were refused", refused)
	}
	if refs, err := d.st.List(t.Context(), "vm"); err != nil || !slices.Equal(refs, []store.Ref{d.ref}) {
		t.Errorf("left: %v, %v", refs, err)
	}
}
