package tier_test

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/progress"
	"github.com/flic-migrate/flic-migrate/tier/restore"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/tiertest/chain"
	"github.com/flic-migrate/flic-migrate/tier/vfs/crashfs"
)

// onDisks makes a chain of three generations whose pages are on a disk each as well.
func onDisks(t *testing.T) (l *lab, list []chain.Checkpoint, disks []string) {
	t.Helper()
	l = newLab(t, crashfs.New(0), "/")
	dir := t.TempDir()
	list = chain.Build(t, l.st, chain.Options{Seed: 5, Streams: generations(5, 3, chainBlocks), Codec: image.LZ4,
		NVRAM: l.nvram, Deltas: 0.9, Scattered: 0.1, Disk: filepath.Join(dir, "disk")})
	for _, name := range []string{"disk0", "disk1", "disk2"} {
		disks = append(disks, filepath.Join(dir, name))
	}
	return l, list, disks
}

// restoreWith restores a checkpoint with its disks as o says.
func (l *lab) restoreWith(t *testing.T, ref store.Ref, o checkpoint.DiskOptions) ([]byte, error) {
	t.Helper()
	c, err := l.st.OpenCheckpoint(t.Context(), ref, checkpoint.Options{Disks: o})
	if err != nil {
		return nil, err
	}
	defer c.Close()
	var b bytes.Buffer
	_, err = restore.Run(t.Context(), c.Checkpoint, &b, restore.Options{})
	return b.Bytes(), err
}

func edit(t *testing.T, path string, fn func(b []byte) []byte) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err == nil {
		err = os.WriteFile(path, fn(b), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestDiskChanged: whatever has become of a disk, a checkpoint that has pages on it is
// restored as it was or refused before the first byte, with the disk, what happened to it
// and the place of the first block that is wrong.
func TestDiskChanged(t *testing.T) {
	// Where the first block is of disk 1 that the last generation has a page on.
	const first = 5632
	flip := func(at int) func(b []byte) []byte {
		return func(b []byte) []byte { b[at] ^= 1; return b }
	}
	replace := func(t *testing.T, path string, b []byte) {
		if err := os.WriteFile(path+"x", b, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(path+"x", path); err != nil {
			t.Fatal(err)
		}
	}
	for name, c := range map[string]struct {
		change func(t *testing.T, path string)
		says   []string // nothing: the checkpoint is as it was
		off    int64    // of the wrong block, in the disk
	}{
		"written to":            {func(t *testing.T, p string) { edit(t, p, flip(first)) }, []string{"disk1", "was written to", "digest mismatch"}, first},
		"written to, elsewhere": {func(t *testing.T, p string) { edit(t, p, flip(5)) }, nil, 0},
		"made larger":           {func(t *testing.T, p string) { edit(t, p, func(b []byte) []byte { return append(b, 1) }) }, nil, 0},
		"written the same":      {func(t *testing.T, p string) { edit(t, p, flip(0)); edit(t, p, flip(0)) }, nil, 0},
		"another file": {func(t *testing.T, p string) {
			b, err := os.ReadFile(p)
			if err != nil {
				t.Fatal(err)
			}
			replace(t, p, flip(first)(b))
		}, []string{"disk1", "is another file now", "digest mismatch"}, first},
		"a copy": {func(t *testing.T, p string) {
			b, err := os.ReadFile(p)
			if err != nil {
				t.Fatal(err)
			}
			replace(t, p, b)
		}, nil, 0},
		"cut":   {func(t *testing.T, p string) { edit(t, p, func(b []byte) []byte { return b[:100] }) }, []string{"disk1", "was made smaller", "ends before it"}, first},
		"empty": {func(t *testing.T, p string) { edit(t, p, func(b []byte) []byte { return nil }) }, []string{"disk1", "ends before it"}, first},
		"gone": {func(t *testing.T, p string) {
			if err := os.Remove(p); err != nil {
				t.Fatal(err)
			}
		}, []string{"disk1", "no such file"}, -1},
		"a directory": {func(t *testing.T, p string) {
			if err := errors.Join(os.Remove(p), os.Mkdir(p, 0o700)); err != nil {
				t.Fatal(err)
			}
		}, []string{"disk1"}, -1},
		// Only a look at all of it can tell.
		"hidden": {func(t *testing.T, p string) {
			fi, err := os.Stat(p)
			if err != nil {
				t.Fatal(err)
			}
			edit(t, p, flip(first))
			if err := os.Chtimes(p, time.Time{}, fi.ModTime()); err != nil {
				t.Fatal(err)
			}
		}, []string{"disk1", "digest mismatch"}, first},
	} {
		t.Run(name, func(t *testing.T) {
			l, list, disks := onDisks(t)
			last := list[2]
			c.change(t, disks[1])
			out, err := l.restoreWith(t, last.Ref, checkpoint.DiskOptions{})
			if c.says == nil {
				if err != nil {
					t.Error(err)
				}
				l.holds(t, last.Ref, last.Stream)
				l.noLeaks(t)
				return
			}
			if name == "hidden" {
				// It goes wrong when the block is read, and nothing wrong comes out.
				if !integrity.IsCorrupt(err) {
					t.Errorf("eagerly: %v", err)
				}
				if out, err = l.restoreWith(t, last.Ref, checkpoint.DiskOptions{Check: checkpoint.CheckAll}); err == nil {
					t.Error("a comparison of all finds nothing")
				}
			}
			for _, says := range c.says {
				if err == nil || !strings.Contains(err.Error(), says) {
					t.Errorf("it does not say %q: %v", says, err)
				}
			}
			if len(out) > 0 {
				t.Errorf("%d bytes were restored", len(out))
			}
			var corrupt *integrity.CorruptError
			if is := errors.As(err, &corrupt); is != (c.off >= 0) || is && (corrupt.File != disks[1] || corrupt.Offset != c.off) {
				t.Errorf("place: %+v", corrupt)
			}
			if name == "gone" && !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("it is not missing: %v", err)
			}
			if found := l.verify(last.Ref); len(found) == 0 || !strings.Contains(found[0].Error(), disks[1]) {
				t.Errorf("verify: %v", found)
			}
			// Who needs nothing of that disk is as whole as before.
			l.holds(t, list[0].Ref, list[0].Stream)
			l.noLeaks(t)
		})
	}
}

// TestDiskMoved restores with a disk at another path, and compares all when that is asked
// for.
func TestDiskMoved(t *testing.T) {
	l, list, disks := onDisks(t)
	last := list[2]
	want := l.restored(t, last.Ref)
	moved := disks[0] + "-moved"
	if err := os.Rename(disks[0], moved); err != nil {
		t.Fatal(err)
	}
	if _, err := l.restoreWith(t, last.Ref, checkpoint.DiskOptions{}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("it is not there: %v", err)
	}
	looked := 0
	o := checkpoint.DiskOptions{Moved: map[string]string{disks[0]: moved}, Check: checkpoint.CheckAll, Progress: func(p progress.State) {
		if looked++; p.Phase != "disks" || p.Pages > p.PagesAll {
			t.Errorf("%+v", p)
		}
	}}
	got, err := l.restoreWith(t, last.Ref, o)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	if looked == 0 {
		t.Error("no progress")
	}
	l.noLeaks(t)
}

// TestDiskCopies: a copy and a flattened checkpoint need no disk any more, and a disk that
// has gone wrong before costs the copy and not the checkpoint.
func TestDiskCopies(t *testing.T) {
	l, list, disks := onDisks(t)
	last := list[2]
	edit(t, disks[2], func(b []byte) []byte { b[len(b)-1] ^= 1; return b })
	if _, _, err := l.copy(last.Ref, image.LZ4); !integrity.IsCorrupt(err) {
		t.Errorf("copied from a wrong disk: %v", err)
	}
	if _, _, err := l.st.Flatten(t.Context(), last.Ref, store.CopyOptions{}); !integrity.IsCorrupt(err) {
		t.Errorf("flattened from a wrong disk: %v", err)
	}
	edit(t, disks[2], func(b []byte) []byte { b[len(b)-1] ^= 1; return b })
	l.holds(t, last.Ref, last.Stream)
	to, meta, err := l.copy(last.Ref, image.LZ4)
	if err != nil || meta.Disks != 0 || meta.Report.Disk != 0 {
		t.Fatalf("%+v, %v", meta, err)
	}
	// The first refers to no other checkpoint, and has pages on its disk.
	if _, meta, err = l.st.Flatten(t.Context(), list[0].Ref, store.CopyOptions{}); err != nil || meta.Disks != 0 || meta.Report.Disk != 0 {
		t.Fatalf("%+v, %v", meta, err)
	}
	for _, path := range disks {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	l.holds(t, to, last.Stream)
	l.holds(t, list[0].Ref, list[0].Stream)
	if err := l.restore(last.Ref, new(bytes.Buffer)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without its disks: %v", err)
	}
	// Pages that are nowhere else are missed one by one, if that is asked for.
	c, err := l.st.OpenCheckpoint(t.Context(), last.Ref, checkpoint.Options{Disks: checkpoint.DiskOptions{Missing: true, Check: checkpoint.CheckRead}})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if states := c.Disks(); len(states) != 3 || states[0].Missing == "" || states[0].Path != disks[0] {
		t.Errorf("%+v", states)
	}
	if _, err := restore.Run(t.Context(), c.Checkpoint, new(bytes.Buffer), restore.Options{}); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}

// TestSaveOnDisks: a checkpoint whose parent has pages on disks is right, and so is one
// whose parent's disks are not what they were.
func TestSaveOnDisks(t *testing.T) {
	for name, change := range map[string]func(t *testing.T, path string){
		"as it was":  func(*testing.T, string) {},
		"written to": func(t *testing.T, p string) { edit(t, p, func(b []byte) []byte { clear(b); return b }) },
		"gone": func(t *testing.T, p string) {
			if err := os.Remove(p); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			l, list, disks := onDisks(t)
			change(t, disks[1])
			o := generations(5, 3, chainBlocks)[2]
			o.Passes = 4
			s := tiertest.New(o)
			ref, meta := l.save(t, s, save.Options{Parent: list[2].Ref.String()})
			if meta.Report.Parent == "" {
				t.Error("nothing is as in the parent")
			}
			l.holds(t, ref, s)
			l.noLeaks(t)
		})
	}
}
