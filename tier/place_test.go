package tier_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
	"github.com/flic-migrate/flic-migrate/tier/vfs/crashfs"
)

// image is the path of a checkpoint's image.
func (l *lab) image(vm, number string) string {
	return filepath.Join(l.dir, "vms", vm, number+".flic")
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err == nil {
		err = os.WriteFile(to, b, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestMisplacedImage puts a checkpoint's image where it does not belong. All who
// look at it there notice, and nobody frees anything of the checkpoint that it is.
func TestMisplacedImage(t *testing.T) {
	s := small(1)
	for name, to := range map[string]store.Ref{
		"another VM's": {VM: "b", N: 1}, "another number": {VM: "a", N: 7}, "another VM, same number": {VM: "c", N: 1},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t, vfs.OS, t.TempDir())
			o := smallOptions(t, s)
			o.VM = "a"
			a, _ := l.save(t, s, o)
			free := l.nvramFree(t)
			o.VM, o.WorkingSet = "c", nil
			c, _ := l.save(t, s, o)
			if to == c {
				if err := os.Remove(l.image("c", "00000001")); err != nil {
					t.Fatal(err)
				}
			}
			number := map[int]string{1: "00000001", 7: "00000007"}[to.N]
			os.MkdirAll(filepath.Join(l.dir, "vms", to.VM), 0o700)
			copyFile(t, l.image("a", "00000001"), l.image(to.VM, number))

			wrong := func(what string, err error) {
				t.Helper()
				if !integrity.IsCorrupt(err) || !strings.Contains(err.Error(), "checkpoint a@1 in the place of "+to.String()) {
					t.Errorf("%s: %v", what, err)
				}
			}
			wrong("restore", l.restore(to, io.Discard))
			if found := l.verify(to); len(found) != 1 {
				t.Errorf("verify: %v", found)
			} else {
				wrong("verify", found[0])
			}
			_, err := l.st.Describe(t.Context(), to)
			wrong("describe", err)
			list, err := l.st.Identities(t.Context(), "")
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range list {
				if (e.Err != nil) != (e.Ref == to) {
					t.Errorf("list of %v: %v", e.Ref, e.Err)
				}
			}
			if rep, err := l.st.GC(t.Context()); err != nil || rep.NVRAMExtents != 0 {
				t.Errorf("gc: %+v, %v", rep, err)
			}
			rm, err := l.st.Remove(t.Context(), to)
			if err != nil || rm.NVRAMBytes != 0 {
				t.Errorf("remove: %+v, %v", rm, err)
			}
			wrong("remove", rm.Left)
			if rep, err := l.st.GC(t.Context()); err != nil || rep.NVRAMExtents != 0 {
				t.Errorf("gc: %+v, %v", rep, err)
			}
			l.holds(t, a, s)
			if got := l.nvramFree(t); got != free {
				t.Errorf("%d bytes of NVRAM are free, %d were", got, free)
			}
			if err := l.remove(a); err != nil {
				t.Fatal(err)
			}
			if got := l.nvramFree(t); got <= free {
				t.Errorf("removed, and %d bytes of NVRAM are free, %d were", got, free)
			}
		})
	}
}

// TestCopiedStore copies a store with all that is in it. The copy can be read, but
// what is in NVRAM is the original's, until the copy takes it over.
func TestCopiedStore(t *testing.T) {
	s := small(1)
	dir := t.TempDir()
	l := newLab(t, vfs.OS, dir)
	o := smallOptions(t, s)
	first, _ := l.save(t, s, o)
	second, _ := l.save(t, s, o)
	free := l.nvramFree(t)
	if out, err := exec.Command("cp", "-a", l.dir, filepath.Join(dir, "copy")).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	c := &lab{fs: newCountingFS(vfs.OS), dir: filepath.Join(dir, "copy"), nvram: l.nvram}
	c.open(t)
	c.holds(t, first, s)
	if _, _, err := c.trySave(s, o); !errors.Is(err, store.ErrCopied) || !strings.Contains(err.Error(), l.dir) || !strings.Contains(err.Error(), "gc --adopt") {
		t.Errorf("save with NVRAM in a copy: %v", err)
	}
	flash := o
	flash.WorkingSet = nil
	if _, _, err := c.trySave(s, flash); err != nil {
		t.Errorf("save without NVRAM in a copy: %v", err)
	}
	if rm, err := c.st.Remove(t.Context(), second); err != nil || !errors.Is(rm.Left, store.ErrCopied) || rm.NVRAMBytes != 0 {
		t.Errorf("remove in a copy: %+v, %v", rm, err)
	}
	if rep, err := c.st.GC(t.Context()); err != nil || rep.NVRAMExtents != 0 || len(rep.Warnings) != 1 || !strings.Contains(rep.Warnings[0], "copy") {
		t.Errorf("gc in a copy: %+v, %v", rep, err)
	}
	l.holds(t, second, s)
	if got := l.nvramFree(t); got != free {
		t.Errorf("%d bytes of NVRAM are free, %d were", got, free)
	}
	// Put back in its own place, it is a copy of what was there, and not of itself.
	for _, args := range [][]string{{"mv", l.dir, l.dir + ".old"}, {"cp", "-a", l.dir + ".old", l.dir}} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	l.open(t)
	if err := l.st.CheckHome(t.Context()); !errors.Is(err, store.ErrCopied) || !strings.Contains(err.Error(), "of the one that was here before it,") {
		t.Errorf("a store that was put back: %v", err)
	}
	if err := errors.Join(os.RemoveAll(l.dir), os.Rename(l.dir+".old", l.dir)); err != nil {
		t.Fatal(err)
	}
	// A store that is only renamed is no copy.
	moved := filepath.Join(dir, "moved")
	if err := os.Rename(l.dir, moved); err != nil {
		t.Fatal(err)
	}
	l.dir = moved
	l.open(t)
	if err := l.st.CheckHome(t.Context()); err != nil {
		t.Errorf("a renamed store: %v", err)
	}
	if rep, err := l.st.GC(t.Context()); err != nil || rep.NVRAMExtents != 0 || len(rep.Warnings) != 0 {
		t.Errorf("gc in a renamed store: %+v, %v", rep, err)
	}
	// The original is lost, and the copy becomes the owner.
	if err := os.RemoveAll(moved); err != nil {
		t.Fatal(err)
	}
	if err := c.st.Adopt(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.open(t)
	if rep, err := c.st.GC(t.Context()); err != nil || rep.NVRAMExtents == 0 || len(rep.Warnings) != 0 {
		t.Errorf("gc after the adoption: %+v, %v", rep, err)
	}
	c.holds(t, first, s)
	if err := c.remove(first); err != nil {
		t.Error(err)
	}
}

// fullable is a small file system and a directory of it: a tmpfs where the test may
// mount one, and else one that is simulated.
func fullable(t *testing.T) (vfs.FS, string) {
	dir := t.TempDir()
	if exec.Command("mount", "-t", "tmpfs", "-o", "size=2m", "flic-test", dir).Run() != nil {
		return crashfs.New(2 << 20), "/"
	}
	t.Cleanup(func() { exec.Command("umount", dir).Run() })
	return vfs.OS, dir
}

// TestRemoveFull removes from a file system without a free block: what removal
// needs must be there already.
func TestRemoveFull(t *testing.T) {
	fsys, dir := fullable(t)
	l := newLab(t, fsys, dir)
	s := small(1)
	for range 3 {
		l.save(t, s, save.Options{Parent: save.ParentNone})
	}
	f, err := fsys.Create(filepath.Join(dir, "fill"))
	if err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = f.Write(make([]byte, 4096))
	}
	f.Close()
	if _, _, err := l.trySave(s, save.Options{Parent: save.ParentNone}); err == nil {
		t.Fatal("the file system is not full")
	}
	for _, n := range []int{3, 1, 2} {
		if err := l.remove(store.Ref{VM: "vm", N: n}); err != nil {
			t.Errorf("remove of %d: %v", n, err)
		}
	}
	if ref, _ := l.save(t, s, save.Options{Parent: save.ParentNone}); ref.N != 4 {
		t.Errorf("the next checkpoint is %v", ref)
	}
}

// TestLinksInStore puts symbolic links where the store has folders and files of its
// own. None is followed: what they lead to stays as it is.
func TestLinksInStore(t *testing.T) {
	ctx := context.Background()
	s := small(1)
	for _, name := range []string{"tmp", "lock", "nvram", "vms/vm", "vms", "loose", "store.json"} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			l := newLab(t, vfs.OS, dir)
			ref, _ := l.save(t, s, save.Options{})
			outside := filepath.Join(dir, "outside")
			if err := os.Rename(filepath.Join(l.dir, name), outside); err != nil && !os.IsNotExist(err) {
				t.Fatal(err)
			}
			if err := os.MkdirAll(outside, 0o700); name == "loose" && err != nil {
				t.Fatal(err)
			}
			if fi, err := os.Stat(outside); err == nil && fi.IsDir() {
				if err := os.WriteFile(outside+"/00000000-0000-4000-8000-000000000000.new", nil, 0o600); err != nil {
					t.Fatal(err)
				}
			} else if name == "lock" {
				os.Remove(outside)
			}
			before := listing(t, dir, outside)
			if err := os.Symlink(outside, filepath.Join(l.dir, name)); err != nil {
				t.Fatal(err)
			}
			if st, err := store.Open(ctx, vfs.OS, l.dir, true); err == nil {
				st.Identities(ctx, "")
				st.Identities(ctx, "vm")
				st.GC(ctx)
				st.Remove(ctx, ref)
				if tx, err := st.Begin(ctx, "vm"); err == nil {
					tx.Commit(ctx)
				}
			}
			if after := listing(t, dir, outside); !bytes.Equal(before, after) {
				t.Errorf("outside was:\n%s\nand is:\n%s", before, after)
			}
		})
	}
}

func listing(t *testing.T, dir, name string) []byte {
	t.Helper()
	cmd := exec.Command("ls", "-laR", "--time-style=full-iso", name)
	cmd.Dir = dir
	out, _ := cmd.CombinedOutput()
	return out
}
