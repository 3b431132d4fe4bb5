package tier_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/dedup"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/restore"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
	"github.com/flic-migrate/flic-migrate/tier/vfs/crashfs"
	"github.com/flic-migrate/flic-migrate/tier/workingset"
)

// makeGolden writes testdata/golden-N, N being the version of the image format. What
// is there is never changed: later versions must read it as it is.
var makeGolden = flag.Bool("make-golden", false, "write the golden store of this version, which must not be there yet")

// golden is a store that a version of this program has written, and what it gave back
// then. In testdata/golden-N lie the store's files and the NVRAM file, which the
// store knows by goldenNVRAM.
type golden struct {
	Format      int                `json:"format"` // version of the image
	Checkpoints []goldenCheckpoint `json:"checkpoints"`
}

type goldenCheckpoint struct {
	Name   string           `json:"name"`
	Bytes  int64            `json:"bytes"` // of the restored stream
	SHA256 string           `json:"sha256"`
	Meta   *checkpoint.Meta `json:"meta"`
	// Touched is what resumes have learned of it.
	Touched []workingset.PageRun `json:"touched,omitempty"`
}

const (
	goldenDir   = "../testdata/golden-%d"
	goldenNVRAM = "/nvram.img"
)

// TestGolden verifies and restores what earlier versions have stored, bit by bit.
func TestGolden(t *testing.T) {
	if *makeGolden {
		writeGolden(t, fmt.Sprintf(goldenDir, image.Version))
	}
	for _, format := range []int{2} {
		t.Run(fmt.Sprint(format), func(t *testing.T) { readGolden(t, fmt.Sprintf(goldenDir, format), format) })
	}
}

func readGolden(t *testing.T, dir string, format int) {
	b, err := os.ReadFile(filepath.Join(dir, "golden.json"))
	if err != nil {
		t.Fatal(err)
	}
	var want golden
	if err := json.Unmarshal(b, &want); err != nil {
		t.Fatal(err)
	}
	if want.Format != format || len(want.Checkpoints) < 5 {
		t.Fatalf("%d checkpoints of format %d", len(want.Checkpoints), want.Format)
	}
	l := newLab(t, crashfs.New(0), "/")
	loadGolden(t, l.fs, dir, l.dir)
	l.open(t)
	refs, err := l.st.List(t.Context(), "")
	if err != nil || len(refs) != len(want.Checkpoints) {
		t.Fatalf("%v, %v", refs, err)
	}
	for _, w := range want.Checkpoints {
		ref, err := store.ParseRef(w.Name)
		if err != nil {
			t.Fatal(err)
		}
		for _, err := range l.verify(ref) {
			t.Errorf("verify of %s: %v", w.Name, err)
		}
		if got := l.goldenCheckpoint(t, ref); asJSON(t, got) != asJSON(t, w) {
			t.Errorf("%s is\n%s\nand was\n%s", w.Name, asJSON(t, got), asJSON(t, w))
		}
	}
	// All that the store does with it works as well, once it is no copy any more.
	if err := l.st.Adopt(t.Context()); err != nil {
		t.Fatal(err)
	}
	if rep, err := l.st.GC(t.Context()); err != nil || rep.Parts+rep.NVRAMExtents != 0 || len(rep.Warnings) > 0 {
		t.Errorf("gc: %+v, %v", rep, err)
	}
	for _, ref := range refs {
		if err := l.remove(ref); err != nil {
			t.Errorf("rm of %v: %v", ref, err)
		}
	}
	s := small(1)
	ref, _ := l.save(t, s, smallOptions(t, s))
	l.holds(t, ref, s)
	l.noLeaks(t)
}

// goldenCheckpoint is what can be read of a checkpoint.
func (l *lab) goldenCheckpoint(t *testing.T, ref store.Ref) (g goldenCheckpoint) {
	t.Helper()
	c, err := l.st.OpenCheckpoint(t.Context(), ref, checkpoint.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	h := sha256.New()
	rep, err := restore.Run(t.Context(), c.Checkpoint, h, restore.Options{})
	if err != nil {
		t.Errorf("restore of %v: %v", ref, err)
	}
	touched, err := l.st.Touched(t.Context(), ref)
	if err != nil {
		t.Error(err)
	}
	return goldenCheckpoint{ref.String(), rep.BytesOut, hex.EncodeToString(h.Sum(nil)), c.Meta, touched.Runs}
}

func asJSON(t *testing.T, v any) string {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// loadGolden copies the files in dir to a disk.
func loadGolden(t *testing.T, disk vfs.FS, dir, to string) {
	t.Helper()
	put := func(name string, b []byte) {
		t.Helper()
		disk.Remove(name)
		err := disk.MkdirAll(filepath.Dir(name))
		if err != nil {
			t.Fatal(err)
		}
		f, err := disk.Create(name)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.Write(b); err != nil {
			t.Fatal(err)
		}
	}
	src := filepath.Join(dir, "store")
	err := filepath.WalkDir(src, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		put(filepath.Join(to, strings.TrimPrefix(path, src)), b)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(dir, "nvram.img.zst"))
	if err != nil {
		t.Fatal(err)
	}
	z, err := zstd.NewReader(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	if b, err = io.ReadAll(z); err != nil {
		t.Fatal(err)
	}
	put(goldenNVRAM, b)
}

// goldenSaves are the checkpoints of a golden store: with every kind of frame, source
// and record, every codec, and all that META can say.
func goldenSaves(t *testing.T) (list []struct {
	s *tiertest.Stream
	o save.Options
}) {
	add := func(o tiertest.Options, so save.Options, heat func(block int, page uint64) uint8) {
		o.PageSize, o.PageBits = 1<<10, true
		if o.Blocks == nil {
			o.Blocks = []tiertest.Block{{Name: "pc.ram", Size: 40 << 10}, {Name: "0000:00:02.0/vga.vram", Size: 8 << 10}, {Name: "/rom@etc/acpi/tables", Size: 4 << 10}}
		}
		s := tiertest.New(o)
		if heat != nil {
			so.WorkingSet = hotSet(t, s, heat)
		}
		list = append(list, struct {
			s *tiertest.Stream
			o save.Options
		}{s, so})
	}
	libvirt := &checkpoint.Libvirt{XML: "<domain type='kvm'><name>vm</name></domain>", Cookie: "<cookie/>", Persistent: true, SaveFile: []byte("what stood before")}
	add(tiertest.Options{Seed: 1}, save.Options{Codec: image.LZ4, Energy: dedup.EnergyFull, SegmentPages: 4}, every(3))
	add(tiertest.Options{Seed: 2, Passes: 3, Resend: 0.4, XBZRLE: true, Flush: true, Fill: true, Named: 0.2},
		save.Options{Codec: image.MinLZ, Energy: dedup.EnergyLow, SegmentPages: 5}, func(_ int, p uint64) uint8 { return uint8(p / 4 % 2) })
	add(tiertest.Options{Seed: 3, Compress: 0.6, Shuffle: true, NoEnd: true, NoDescription: true},
		save.Options{Codec: image.None, SegmentPages: 3, RunState: "running", Libvirt: libvirt}, nil)
	add(tiertest.Options{Seed: 4, ReturnPath: true, DirtyBitmap: true, Pool: 2, Mix: tiertest.Mix{tiertest.Absent: 1, tiertest.Zero: 1, tiertest.ZeroData: 1, tiertest.Text: 2, tiertest.Duplicate: 2}},
		save.Options{Codec: image.Zstd, Energy: dedup.EnergyFull, SegmentPages: 16}, every(5))
	add(tiertest.Options{Seed: 5, Unknown: tiertest.Section}, save.Options{Codec: image.LZ4, SegmentPages: 4}, nil)
	add(tiertest.Options{Seed: 6, IgnoreShared: true, Blocks: []tiertest.Block{{Name: "shm", Size: 16 << 10, Shared: true}, {Name: "pc.ram", Size: 24 << 10, HostPage: 2 << 20}}},
		save.Options{Codec: image.LZ4, VM: "other", SegmentPages: 4}, nil)
	return list
}

// writeGolden makes the golden store.
func writeGolden(t *testing.T, dir string) {
	if _, err := os.Stat(filepath.Join(dir, "golden.json")); err == nil {
		t.Fatalf("%s is there; later versions must read it as it is", dir)
	}
	l := newLab(t, crashfs.New(0), "/")
	g := golden{Format: image.Version}
	for i, c := range goldenSaves(t) {
		c.o.ReturnPath, c.o.Workers, c.o.NVRAMSize = io.Discard, 1, 12<<18
		ref, _ := l.save(t, c.s, c.o)
		l.holds(t, ref, c.s)
		if i == 0 {
			if err := l.st.AddTouched(t.Context(), ref, c.s.PageSize(), []string{"pc.ram"}, []workingset.PageRun{{Page: 3, Count: 2}, {Page: 17, Count: 1}}); err != nil {
				t.Fatal(err)
			}
		}
		g.Checkpoints = append(g.Checkpoints, l.goldenCheckpoint(t, ref))
	}
	// A number that was given away again.
	s := tiny(tiertest.Options{Seed: 9})
	ref, _ := l.save(t, s, save.Options{VM: "other"})
	if err := l.remove(ref); err != nil {
		t.Fatal(err)
	}
	out := func(name string, b []byte) {
		t.Helper()
		name = filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	b, err := json.MarshalIndent(g, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	out("golden.json", append(b, '\n'))
	for _, name := range l.tree(t) {
		out(filepath.Join("store", name), l.content(t, filepath.Join(l.dir, name)))
	}
	z, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedBestCompression))
	if err != nil {
		t.Fatal(err)
	}
	out("nvram.img.zst", z.EncodeAll(l.content(t, l.nvram), nil))
}

// content is what a file holds.
func (l *lab) content(t *testing.T, name string) []byte {
	t.Helper()
	f, err := l.fs.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	n, err := f.Size()
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, n)
	if _, err := f.ReadAt(b, 0); err != nil && n > 0 {
		t.Fatal(err)
	}
	return b
}
