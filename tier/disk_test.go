package tier_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/dedup"
	"github.com/flic-migrate/flic-migrate/tier/digest"
	"github.com/flic-migrate/flic-migrate/tier/disk"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/lazy"
	"github.com/flic-migrate/flic-migrate/tier/pagemap"
	"github.com/flic-migrate/flic-migrate/tier/progress"
	"github.com/flic-migrate/flic-migrate/tier/restore"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/tiertest/chain"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
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

// firstOnDisk is where the first block is of disk 1 that the last generation has.
func firstOnDisk(t *testing.T) int {
	l, list, disks := onDisks(t)
	c, err := l.st.OpenCheckpoint(t.Context(), list[2].Ref, checkpoint.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for slot := uint64(0); ; slot++ {
		at, err := c.DiskSlot(slot)
		if err != nil {
			t.Fatal(err)
		}
		if c.Disks()[at.Disk()].Path == disks[1] {
			return int(at.Sector()) * disk.SectorSize
		}
	}
}

// TestDiskChanged: whatever has become of a disk, a checkpoint that has pages on it is
// restored as it was or refused before the first byte, with the disk, what happened to it
// and the place of the first block that is wrong.
func TestDiskChanged(t *testing.T) {
	first := firstOnDisk(t)
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
		off    int      // of the wrong block, in the disk
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
			if is := errors.As(err, &corrupt); is != (c.off >= 0) || is && (corrupt.File != disks[1] || corrupt.Offset != int64(c.off)) {
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

// rawDisk is a raw disk image with pages of guests, and an index of it.
type rawDisk struct {
	path   string
	hasher *digest.Hasher
	at     map[digest.Sum][]int64
}

func (d *rawDisk) Digester() *digest.Hasher { return d.hasher }

func (d *rawDisk) LookupNear(sum digest.Sum, near int64) (sector int64, ok bool) {
	list := d.at[sum]
	if len(list) == 0 {
		return 0, false
	}
	if slices.Contains(list, near) {
		return near, true
	}
	return list[0], true
}

// newRawDisk makes one with every n-th page that streams have, some of them twice, and not
// all where a sector of 4 KiB begins.
func newRawDisk(t testing.TB, path string, h *digest.Hasher, n uint64, streams ...*tiertest.Stream) *rawDisk {
	t.Helper()
	d := &rawDisk{path: path, hasher: h, at: make(map[digest.Sum][]int64)}
	var b []byte
	for _, s := range streams {
		page := make([]byte, s.PageSize())
		for block := range s.Blocks() {
			for p := range s.Pages(block) {
				if p%n != 0 || !s.Page(page, block, p) || !slices.ContainsFunc(page, func(c byte) bool { return c != 0 }) {
					continue
				}
				if p%5 == 0 {
					b = append(b, make([]byte, disk.SectorSize*(1+p%9))...)
				}
				for range 1 + p%3/2 {
					sum := h.Sum(page)
					d.at[sum] = append(d.at[sum], int64(len(b)/disk.SectorSize))
					b = append(b, page...)
				}
			}
		}
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return d
}

// open is the disk for a save.
func (d *rawDisk) open(t testing.TB) save.Disk {
	t.Helper()
	f, err := disk.OpenLayer(d.path, disk.Raw)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return save.Disk{Disk: checkpoint.Disk{Identity: f.Identity()}, File: f, Index: d}
}

// TestSaveDisks saves guests whose pages are on disks in part, from one generation to the
// next, with the disks at hand in some of them and not in others.
func TestSaveDisks(t *testing.T) {
	blocks := []tiertest.Block{{Name: "pc.ram", Size: 1 << 20}, {Name: "rom", Size: 40 << 10}}
	for name, o := range map[string]tiertest.Options{
		"plain":      {Seed: 1, Blocks: blocks},
		"live":       {Seed: 2, Blocks: blocks, XBZRLE: true, Shuffle: true},
		"compressed": {Seed: 3, Blocks: blocks, Compress: 0.4, Fill: true},
		"16 KiB":     {Seed: 5, Blocks: []tiertest.Block{{Name: "ram", Size: 4 << 20}}, PageSize: 16 << 10, Advise: true},
	} {
		for _, hot := range []uint64{0, 3} {
			t.Run(fmt.Sprint(name, hot), func(t *testing.T) {
				t.Parallel()
				l := newLab(t, crashfs.New(0), "/")
				dir, h := t.TempDir(), digest.Fresh()
				disks := []save.Disk{
					newRawDisk(t, filepath.Join(dir, "a"), h, 2, generation(o, 1)).open(t),
					newRawDisk(t, filepath.Join(dir, "b"), h, 3, generation(o, 2), generation(o, 4)).open(t),
				}
				saved := map[store.Ref]*tiertest.Stream{}
				var bases int
				for n := 1; n <= 6; n++ {
					s := generation(o, n)
					so := save.Options{Energy: dedup.EnergyFull, SegmentPages: 5 + n, Codec: image.Codec(n % 4), DiskEnough: 1}
					if hot > 0 {
						so.WorkingSet, so.NVRAMSize = hotSet(t, s, every(hot+uint64(n%2))), 4<<20
					}
					// Not at first; then one, both in another order, and none.
					switch n {
					case 2:
						so.Disks = disks[:1]
					case 3, 4:
						so.Disks = []save.Disk{disks[1], disks[0]}
					}
					ref, meta := l.save(t, s, so)
					saved[ref] = s
					r := meta.Report
					if small := o.PageSize == 0; (r.Disk > 0) != (small && n > 1) || (meta.Disks > 0) != (r.Disk > 0) || len(r.Disks) != meta.Disks {
						t.Errorf("generation %d: %d pages on %d disks: %+v", n, r.Disk, meta.Disks, r.Disks)
					}
					var pages int64
					for _, d := range r.Disks {
						if pages += d.Pages; d.Bytes == 0 {
							t.Errorf("%+v", d)
						}
					}
					if pages != r.Disk {
						t.Errorf("generation %d: %d pages on disks, and %d in the list", n, r.Disk, pages)
					}
					bases += onDiskBases(t, l, ref)
					for ref, s := range saved {
						l.holds(t, ref, s)
					}
				}
				if o.PageSize == 0 && hot == 0 && o.Compress == 0 && bases == 0 {
					t.Error("no delta is against a page on a disk")
				}
				l.noLeaks(t)
			})
		}
	}
}

// TestDiskEnough: pages that are near each other on a disk are referred to, and those that a
// restore would have to read one by one are stored, in the first checkpoint and in the next.
func TestDiskEnough(t *testing.T) {
	l := newLab(t, crashfs.New(0), "/")
	dir, h := t.TempDir(), digest.Fresh()
	o := tiertest.Options{Seed: 7, Blocks: []tiertest.Block{{Name: "pc.ram", Size: 1 << 20}}, Mix: tiertest.Mix{tiertest.Text: 1}}
	s := tiertest.New(o)
	near := newRawDisk(t, filepath.Join(dir, "near"), h, 2, s)
	// The same pages, 256 KiB from each other.
	const apart = 256 << 10
	far := &rawDisk{path: filepath.Join(dir, "far"), hasher: h, at: make(map[digest.Sum][]int64)}
	b, err := os.ReadFile(near.path)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(far.path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	at := int64(apart)
	for sum, list := range near.at {
		if _, err := f.WriteAt(b[list[0]*disk.SectorSize:][:4096], at); err != nil {
			t.Fatal(err)
		}
		far.at[sum] = []int64{at / disk.SectorSize}
		at += apart
	}
	all := int64(len(near.at))
	for _, c := range []struct {
		name   string
		on     *rawDisk
		enough int
		disk   int64
	}{
		{"near", near, 0, all},
		{"far", far, 0, 0},
		{"far, and all the same", far, 1, all},
	} {
		ref, meta := l.save(t, s, save.Options{Parent: save.ParentNone, Disks: []save.Disk{c.on.open(t)}, DiskEnough: c.enough})
		// Those at the ends of the disk have others on one side only.
		if r := meta.Report; max(r.Disk-c.disk, c.disk-r.Disk) > all/32 || r.Disk+r.Isolated != all {
			t.Errorf("%s: %d pages on the disk, %d stored of %d", c.name, r.Disk, r.Isolated, all)
		}
		l.holds(t, ref, s)
	}
	// What a parent has there is looked at likewise.
	ref, meta := l.save(t, s, save.Options{})
	if r := meta.Report; r.Disk != 0 || r.Isolated != all || r.Unchanged+all < r.Pages-r.Zero {
		t.Errorf("in the next checkpoint %+v", r)
	}
	l.holds(t, ref, s)
	l.noLeaks(t)
}

// onDiskBases is how many deltas of a checkpoint are against pages on disks.
func onDiskBases(t *testing.T, l *lab, ref store.Ref) (n int) {
	t.Helper()
	c, err := l.st.OpenCheckpoint(t.Context(), ref, checkpoint.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if bases := c.Sources().Bases; bases != nil {
		if err := bases.Runs(func(r pagemap.Run) error {
			if r.Kind == pagemap.Disk {
				n += int(r.Count)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	return n
}

// TestDiskChangesMeanwhile: a disk that is written to while pages are found on it fails
// the save, and leaves nothing.
func TestDiskChangesMeanwhile(t *testing.T) {
	l := newLab(t, crashfs.New(0), "/")
	s := generation(tiertest.Options{Seed: 1}, 1)
	d := newRawDisk(t, filepath.Join(t.TempDir(), "disk"), digest.Fresh(), 1, s)
	o := save.Options{Disks: []save.Disk{d.open(t)}, Progress: func(p progress.State) {
		if p.Phase == "tail" {
			edit(t, d.path, func(b []byte) []byte { b[len(b)-1] ^= 1; return b })
		}
	}}
	if _, _, err := l.trySave(s, o); err == nil || !strings.Contains(err.Error(), d.path+" was written to") {
		t.Errorf("saved: %v", err)
	}
	if refs, err := l.st.List(t.Context(), ""); err != nil || len(refs) > 0 {
		t.Errorf("%v, %v", refs, err)
	}
	l.noLeaks(t)
}

// TestDiskOften has one page come again and again, each time as another block of the
// disk: what is kept of it has a bound, and the last one counts.
func TestDiskOften(t *testing.T) {
	l := newLab(t, crashfs.New(0), "/")
	o := tiertest.Options{Seed: 9, Blocks: []tiertest.Block{{Name: "ram", Size: 4 << 20}}, Passes: 80, Resend: 0.95,
		Mix: tiertest.Mix{tiertest.Text: 1}}
	s := tiertest.New(o)
	first := o
	first.Passes = 1
	d := newRawDisk(t, filepath.Join(t.TempDir(), "disk"), digest.Fresh(), 1, tiertest.New(first), s)
	ref, meta := l.save(t, s, save.Options{Disks: []save.Disk{d.open(t)}})
	if r := meta.Report; r.Disk < 800 || r.Resent < 65536 {
		t.Errorf("%+v", r)
	}
	l.holds(t, ref, s)
}

// TestOpenDisks saves with real indexes: of layers that can't be used the report says why,
// and the others are looked in.
func TestOpenDisks(t *testing.T) {
	l := newLab(t, vfs.OS, t.TempDir())
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	s := generation(tiertest.Options{Seed: 1}, 1)
	for _, name := range []string{"good", "plain", "stale", "open"} {
		newRawDisk(t, path(name), digest.Fresh(), 2, s)
	}
	catalog, err := l.st.Disks()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"good", "stale", "open"} {
		i, err := disk.Open(t.Context(), path(name), disk.Raw)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := catalog.Build(t.Context(), i, disk.BuildOptions{}); err != nil {
			t.Fatal(err)
		}
		i.Close()
	}
	edit(t, path("stale"), func(b []byte) []byte { b[0] ^= 1; return b })
	// As QEMU holds one that it writes to.
	writer, err := os.OpenFile(path("open"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer writer.Close()
	lock := unix.Flock_t{Type: unix.F_RDLCK, Start: 101, Len: 1}
	if err := unix.FcntlFlock(writer.Fd(), unix.F_OFD_SETLK, &lock); err != nil {
		t.Fatal(err)
	}
	var files []save.DiskFile
	for _, name := range []string{"good", "plain", "stale", "open", "gone", "good"} {
		files = append(files, save.DiskFile{Path: path(name), Format: disk.Raw})
	}
	o := save.OpenDisks(t.Context(), catalog, files)
	ref, meta := l.save(t, s, save.Options{Disks: o.Disks, UnusedDisks: o.Unused})
	o.Close()
	var why []string
	for _, u := range meta.Report.UnusedDisks {
		why = append(why, filepath.Base(u.Path)+" "+u.Why)
	}
	for i, want := range []string{"plain .*no index", "stale .*can't be used", "open somebody", "gone .*no such file"} {
		if len(why) != 4 || !regexp.MustCompile(want).MatchString(why[i]) {
			t.Errorf("unused: %q", why)
		}
	}
	if r := meta.Report; r.Disk < 30 || len(r.Disks) != 1 || r.Disks[0].Path != path("good") || meta.Disks != 1 {
		t.Errorf("%+v", r)
	}
	l.holds(t, ref, s)
	l.noLeaks(t)
}

// TestTouchedDisk saves with the index of a disk that was written to since, and whose times
// were set back: only what the disk still has is taken from it, with or without a parent.
func TestTouchedDisk(t *testing.T) {
	l := newLab(t, vfs.OS, t.TempDir())
	path := filepath.Join(t.TempDir(), "disk")
	o := tiertest.Options{Seed: 1, Blocks: []tiertest.Block{{Name: "ram", Size: 4 << 20}}, Mix: tiertest.Mix{tiertest.Text: 1}}
	s := generation(o, 1)
	newRawDisk(t, path, digest.Fresh(), 1, s)
	catalog, err := l.st.Disks()
	if err != nil {
		t.Fatal(err)
	}
	i, err := disk.Open(t.Context(), path, disk.Raw)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := catalog.Build(t.Context(), i, disk.BuildOptions{}); err != nil {
		t.Fatal(err)
	}
	i.Close()
	saved := func(o save.Options) (store.Ref, int64) {
		t.Helper()
		d := save.OpenDisks(t.Context(), catalog, []save.DiskFile{{Path: path, Format: disk.Raw}})
		defer d.Close()
		if len(d.Disks) != 1 {
			t.Fatalf("unused: %v", d.Unused)
		}
		o.Disks, o.Share = d.Disks, save.ShareNone
		ref, meta := l.save(t, s, o)
		return ref, meta.Report.Disk
	}
	_, before := saved(save.Options{})
	// The last blocks but one of the disk: a few records that the index's samples, of the
	// first of each leaf, are unlikely to be, and if they are this test says so.
	fi, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	edit(t, path, func(b []byte) []byte {
		for at := 100 * disk.BlockSize; at < 104*disk.BlockSize; at += disk.BlockSize {
			b[at+disk.BlockSize/2] ^= 1
		}
		return b
	})
	if err := os.Chtimes(path, fi.ModTime(), fi.ModTime()); err != nil {
		t.Fatal(err)
	}
	for _, parent := range []string{save.ParentAuto, save.ParentNone} {
		ref, now := saved(save.Options{Parent: parent})
		if now == 0 || now >= before {
			t.Errorf("parent %s: %d pages on the disk, and %d before it was written to", parent, now, before)
		}
		l.holds(t, ref, s)
	}
}

// aheadFile remembers what it is told to read into the page cache.
type aheadFile struct {
	checkpoint.DiskFile
	mu    *sync.Mutex
	reads *[][2]int64
}

func (f aheadFile) ReadIn(off, n int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	*f.reads = append(*f.reads, [2]int64{off, off + n})
}

// patient takes nothing before ready.
type patient struct{ ready func() bool }

func (p patient) Write(b []byte) (int, error) {
	for start := time.Now(); !p.ready() && time.Since(start) < 10*time.Second; {
		time.Sleep(time.Millisecond)
	}
	return len(b), nil
}

// readsIn is a checkpoint whose disks remember what is read of them into the page cache.
type readsIn struct {
	*store.Checkpoint
	t     *testing.T
	disks []string
	mu    sync.Mutex
	read  [][][2]int64 // by disk
}

func openReadsIn(t *testing.T, l *lab, ref store.Ref, disks []string) *readsIn {
	t.Helper()
	r := &readsIn{t: t, disks: disks, read: make([][][2]int64, len(disks))}
	var err error
	r.Checkpoint, err = l.st.OpenCheckpoint(t.Context(), ref, checkpoint.Options{Disks: checkpoint.DiskOptions{Open: func(path string, f disk.Format) (checkpoint.DiskFile, error) {
		i, err := disk.OpenLayer(path, f)
		return aheadFile{i, &r.mu, &r.read[slices.Index(disks, path)]}, err
	}}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

// missing is a slot that was not read.
func (r *readsIn) missing() (slot uint64, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for n := range r.Sources().DiskSlots {
		at, err := r.DiskSlot(n)
		if err != nil {
			r.t.Error(err)
			return 0, false
		}
		off := at.Sector() * disk.SectorSize
		k := slices.Index(r.disks, r.Disks()[at.Disk()].Path)
		if !slices.ContainsFunc(r.read[k], func(a [2]int64) bool { return a[0] <= off && off+4096 <= a[1] }) {
			return n, true
		}
	}
	return 0, false
}

// inOrder checks that all was read, from the beginning of each disk to its end, in few pieces.
func (r *readsIn) inOrder() {
	r.t.Helper()
	if n, ok := r.missing(); ok {
		r.t.Errorf("slot %d was not read ahead", n)
	}
	pieces := 0
	for i := range r.read {
		pieces += len(r.read[i])
		if !slices.IsSortedFunc(r.read[i], func(a, b [2]int64) int { return int(a[0] - b[0]) }) {
			r.t.Errorf("disk %d is read in the order %v", i, r.read[i])
		}
	}
	if pieces == 0 || uint64(pieces)*4 > r.Sources().DiskSlots {
		r.t.Errorf("%d pieces for %d slots", pieces, r.Sources().DiskSlots)
	}
}

// TestDisksAhead: while nobody takes the stream yet, a restore reads all that it will need of
// disks.
func TestDisksAhead(t *testing.T) {
	l, list, disks := onDisks(t)
	r := openReadsIn(t, l, list[2].Ref, disks)
	out := patient{func() bool { _, ok := r.missing(); return !ok }}
	if _, err := restore.Run(t.Context(), r.Checkpoint.Checkpoint, out, restore.Options{}); err != nil {
		t.Fatal(err)
	}
	r.inOrder()
}

// TestDisksAheadLazily: so does the background of a lazy restore.
func TestDisksAheadLazily(t *testing.T) {
	l, list, disks := onDisks(t)
	r := openReadsIn(t, l, list[2].Ref, disks)
	in, rp := io.Pipe()
	stream, out := io.Pipe()
	served := make(chan error, 1)
	go func() {
		_, err := lazy.Serve(t.Context(), r.Checkpoint.Checkpoint, in, out, lazy.Options{})
		out.Close()
		served <- err
	}()
	q := &sequence{t: t, rng: rand.New(rand.NewPCG(1, 2))}
	_, err := q.load(tiertest.New(generations(5, 3, chainBlocks)[2]), stream, rp)
	stream.CloseWithError(io.ErrClosedPipe)
	rp.Close()
	if serr := <-served; err != nil || serr != nil {
		t.Fatalf("server: %v; destination: %v", serr, err)
	}
	in.Close()
	if n, ok := r.missing(); ok {
		t.Errorf("slot %d was not read ahead", n)
	}
}
