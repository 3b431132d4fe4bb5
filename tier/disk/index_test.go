package disk

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/tier/digest"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/progress"
	"github.com/flic-migrate/flic-migrate/tier/sorted"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
	"github.com/flic-migrate/flic-migrate/tier/vfs/crashfs"
)

// old makes a file one that was left alone for long, so that no build waits.
func old(t testing.TB, path string) string {
	t.Helper()
	past := time.Now().Add(-time.Hour)
	if err := os.Chtimes(path, past, past); err != nil {
		t.Fatal(err)
	}
	return path
}

func mustOpen(t testing.TB, path string) *Image {
	t.Helper()
	i, err := Open(t.Context(), path, "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { i.Close() })
	return i
}

func catalog(t testing.TB) *Catalog {
	return NewCatalog(vfs.OS, filepath.Join(t.TempDir(), "store", "disks"))
}

func build(t testing.TB, c *Catalog, i *Image) (*Built, *Index) {
	t.Helper()
	b, err := c.Build(t.Context(), i, BuildOptions{})
	if err != nil {
		t.Fatal(err)
	}
	x, err := c.Open(t.Context(), i)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { x.Close() })
	return b, x
}

// knows checks that the index has exactly the blocks of own that begin at these sectors
// (phase, in sectors, of each position) and are not zero.
func knows(t *testing.T, x *Index, disk []byte, starts []int64) {
	t.Helper()
	n := int64(0)
	for _, s := range starts {
		block := disk[s*SectorSize:][:BlockSize]
		at, ok := x.LookupNear(x.Digester().Sum(block), s)
		if zero := bytes.Equal(block, zeroBlock[:]); zero {
			if ok {
				t.Fatalf("sector %d: a block of zeros is in the index", s)
			}
			continue
		}
		n++
		if !ok || at != s {
			t.Fatalf("sector %d: found at %d, %v", s, at, ok)
		}
		at, ok = x.Lookup(x.Digester().Sum(block))
		if !ok || !bytes.Equal(disk[at*SectorSize:][:BlockSize], block) {
			t.Fatalf("sector %d: found at %d, %v", s, at, ok)
		}
	}
	if x.Blocks() != n {
		t.Errorf("%d blocks in place of %d", x.Blocks(), n)
	}
	other := make([]byte, BlockSize)
	for i := range 1000 {
		binary.LittleEndian.PutUint64(other, uint64(i)+1)
		if at, ok := x.Lookup(x.Digester().Sum(other)); ok {
			t.Fatalf("what is nowhere is found at %d", at)
		}
	}
	if err := x.Err(); err != nil {
		t.Error(err)
	}
}

func sectors(n int64) (all []int64) {
	for s := int64(0); s+sectorsPerBlock <= n; s += sectorsPerBlock {
		all = append(all, s)
	}
	return all
}

// perLeaf is how many records are in a leaf.
var perLeaf = sorted.PerLeaf(recordSize)

func TestIndex(t *testing.T) {
	for _, c := range []struct {
		name string
		n    int
	}{{"no block", 512}, {"one block", 4096}, {"one leaf", perLeaf * BlockSize}, {"and one more", (perLeaf + 1) * BlockSize}, {"many", 11<<20 + 1024}} {
		t.Run(c.name, func(t *testing.T) {
			disk := make([]byte, c.n)
			r := rand.New(rand.NewPCG(1, uint64(c.n)))
			for i := 0; i < c.n; i += 512 {
				if i/(64<<10)%5 != 3 { // some runs of zeros
					binary.LittleEndian.PutUint64(disk[i:], r.Uint64())
				}
			}
			img := mustOpen(t, old(t, write(t, filepath.Join(t.TempDir(), "disk"), disk)))
			b, x := build(t, catalog(t), img)
			knows(t, x, disk, sectors(int64(c.n)/SectorSize))
			if b.Blocks != x.Blocks() || b.Data != int64(c.n/BlockSize*BlockSize) || b.Kept || b.Why != "" || x.Identity() != img.Identity() {
				t.Errorf("%+v", b)
			}
			if limit := int64(c.n)/200 + headerSize + sorted.LeafSize + 8; b.Bytes > limit {
				t.Errorf("%d bytes of index; at most %d", b.Bytes, limit)
			}
		})
	}
}

// TestLayers indexes each layer of a chain by itself: what it has of its own, and no
// more.
func TestLayers(t *testing.T) {
	dir := t.TempDir()
	disk := make([]byte, 4<<20)
	r := rand.New(rand.NewPCG(3, 4))
	for i := 0; i < len(disk); i += 8 {
		binary.LittleEndian.PutUint64(disk[i:], r.Uint64())
	}
	base := old(t, write(t, filepath.Join(dir, "base"), disk))
	over := filepath.Join(dir, "over")
	// Clusters smaller than a block: of a block that is half here and half below, the
	// index has nothing.
	qemu(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=2048", "-b", base, "-F", "raw", over)
	qemu(t, "qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 64k", "-c", "write -P 9 2050k 2k", "-c", "write -z 3M 64k", over)
	old(t, over)
	img := mustOpen(t, over)
	c := catalog(t)
	_, top := build(t, c, img)
	if top.Blocks() != maxCopies {
		t.Errorf("%d blocks of one content", top.Blocks())
	}
	seven := bytes.Repeat([]byte{7}, BlockSize)
	for s := int64(2048); s < 2048+maxCopies*8; s += 8 {
		if at, ok := top.LookupNear(top.Digester().Sum(seven), s); !ok || at != s {
			t.Errorf("sector %d: %d, %v", s, at, ok)
		}
	}
	if at, ok := top.LookupNear(top.Digester().Sum(seven), 5); !ok || at < 2048 || at >= 2048+128 {
		t.Errorf("%d, %v", at, ok)
	}
	_, below := build(t, c, img.Backing())
	knows(t, below, disk, sectors(8192))
	if !top.Digester().Same(below.Digester()) {
		t.Error("two indexes of a store have two keys")
	}
	h, err := c.Hasher(t.Context())
	if err != nil || !h.Same(top.Digester()) {
		t.Error(err)
	}
	if top.ContentID() == below.ContentID() {
		t.Error("two disks have one content")
	}
}

// TestPartitions has blocks at odd offsets.
func TestPartitions(t *testing.T) {
	put := func(b []byte, at int, kind byte, start, n uint32) {
		e := b[at:]
		e[4] = kind
		binary.LittleEndian.PutUint32(e[8:], start)
		binary.LittleEndian.PutUint32(e[12:], n)
	}
	mark := func(b []byte, sector int) { b[sector*512+510], b[sector*512+511] = 0x55, 0xaa }
	noise := func() []byte {
		disk := make([]byte, 4<<20)
		r := rand.New(rand.NewPCG(3, 4))
		for i := 34 * 512; i < len(disk); i += 8 {
			binary.LittleEndian.PutUint64(disk[i:], r.Uint64())
		}
		disk[4000] = 1
		return disk
	}
	const total = 8192
	for _, c := range []struct {
		name string
		disk func() []byte
		want []region
	}{
		{"none", noise, nil},
		{"aligned", func() []byte { d := noise(); put(d, 446, 0x83, 2048, 4096); mark(d, 0); return d }, nil},
		{"DOS", func() []byte {
			d := noise()
			put(d, 446, 0x83, 63, 2000)
			put(d, 462, 0x83, 2063, total-2063)
			mark(d, 0)
			return d
		}, []region{{63, 2063}, {2063, total}}},
		{"logical", func() []byte {
			d := noise()
			put(d, 446, 0x83, 63, 937)
			put(d, 462, 0x0f, 1000, total-1000)
			mark(d, 0)
			put(d, 1000*512+446, 0x83, 63, 1000)
			put(d, 1000*512+462, 0x05, 2000, 5192)
			clear(d[1000*512+478 : 1000*512+512])
			mark(d, 1000)
			put(d, 3000*512+446, 0x83, 65, 3000)
			clear(d[3000*512+462 : 3000*512+512])
			mark(d, 3000)
			return d
		}, []region{{63, 1000}, {1063, 2063}, {3065, 6065}}},
		{"GPT", func() []byte {
			d := noise()
			put(d, 446, 0xee, 1, total-1)
			mark(d, 0)
			copy(d[512:], "EFI PART")
			le := binary.LittleEndian
			le.PutUint64(d[512+72:], 2)
			le.PutUint32(d[512+80:], 128)
			le.PutUint32(d[512+84:], 128)
			for i, r := range []region{{2048, 4000}, {35, 1234}, {5001, total - 1}} {
				e := d[1024+i*128:]
				e[0] = 1
				le.PutUint64(e[32:], uint64(r.start))
				le.PutUint64(e[40:], uint64(r.end-1))
			}
			return d
		}, []region{{35, 1234}, {5001, total - 1}}},
		{"nonsense", func() []byte {
			d := noise()
			put(d, 446, 0x83, 63, 0xffffffff) // behind the end
			put(d, 462, 0x83, 0xffffffff, 9)
			put(d, 478, 0x83, 99, 3)   // shorter than a block
			put(d, 494, 0x05, 1001, 1) // a ring
			mark(d, 0)
			put(d, 1001*512+446, 0x83, 10, 100)
			put(d, 1001*512+462, 0x05, 0, 100)
			mark(d, 1001)
			return d
		}, []region{{1011, 1111}}},
		{"overlapping", func() []byte {
			d := noise()
			put(d, 446, 0x83, 63, 1000)
			put(d, 462, 0x83, 999, 1000)
			mark(d, 0)
			return d
		}, []region{{63, 1063}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			disk := c.disk()
			got := regions(bytes.NewReader(disk), int64(len(disk)))
			if !slices.Equal(got, c.want) {
				t.Fatalf("%v in place of %v", got, c.want)
			}
			// What lies in a partition counts from its begin, all else from the disk's.
			var starts []int64
			for s := int64(0); s+8 <= total; s++ {
				phase, inside := int64(0), true
				for _, r := range got {
					if s < r.end && s+8 > r.start {
						phase, inside = r.start, s >= r.start && s+8 <= r.end
						break
					}
				}
				if inside && (s-phase)%8 == 0 {
					starts = append(starts, s)
				}
			}
			img := mustOpen(t, old(t, write(t, filepath.Join(t.TempDir(), "disk"), disk)))
			_, x := build(t, catalog(t), img)
			knows(t, x, disk, starts)
		})
	}
}

// TestSpill sorts with so little memory that there are many runs.
func TestSpill(t *testing.T) {
	dir := t.TempDir()
	disk := make([]byte, 3<<20)
	r := rand.New(rand.NewPCG(3, 4))
	for i := 0; i < len(disk); i += BlockSize {
		binary.LittleEndian.PutUint64(disk[i:], r.Uint64N(500)) // many have one content
	}
	img := mustOpen(t, old(t, write(t, filepath.Join(dir, "disk"), disk)))
	c := catalog(t)
	_, x := build(t, c, img)
	want, err := os.ReadFile(filepath.Join(c.dir, ID(img.id)+indexSuffix))
	if err != nil {
		t.Fatal(err)
	}
	for _, limit := range []int{1, 7, 100, 767, 768} {
		f, err := vfs.OS.Create(filepath.Join(dir, fmt.Sprint("index", limit)))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		b := &builder{src: img, hasher: x.Digester(), head: header{id: img.id, built: x.head.built, keyID: x.head.keyID}}
		b.sort.limit, b.sort.scratch = limit, func() (vfs.File, error) { return vfs.OS.Create(f.Name() + "x") }
		if err := b.write(t.Context(), f); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(f.Name()); err != nil || !bytes.Equal(got, want) {
			t.Errorf("runs of %d: %d bytes, %d wanted, %v", limit, len(got), len(want), err)
		}
	}
}

// TestCatalog goes through an index's life.
func TestCatalog(t *testing.T) {
	ctx := t.Context()
	dir := t.TempDir()
	disk := content(2<<20, 5)
	path := old(t, write(t, filepath.Join(dir, "disk"), disk))
	c := catalog(t)
	img := mustOpen(t, path)

	// Nothing is there, and nothing is made by looking.
	if list, err := c.List(ctx); err != nil || len(list) != 0 {
		t.Error(list, err)
	}
	if n, err := c.Sweep(ctx); n != 0 || err != nil {
		t.Error(n, err)
	}
	if _, err := c.Open(ctx, img); !errors.Is(err, ErrNoIndex) {
		t.Error(err)
	}
	if _, err := c.Hasher(ctx); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	if err := c.Remove(ctx, ID(img.id)); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	if _, err := os.Stat(c.dir); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}

	var shown int
	first, err := c.Build(ctx, img, BuildOptions{Progress: func(progress.State) { shown++ }})
	if err != nil || first.Kept {
		t.Fatal(first, err)
	}
	if fi, err := os.Stat(c.dir); err != nil || fi.Mode().Perm() != 0o700 {
		t.Error(fi.Mode(), err)
	}
	again, err := c.Build(ctx, img, BuildOptions{})
	if err != nil || !again.Kept || again.Blocks != first.Blocks || again.Bytes != first.Bytes || again.Data != first.Data {
		t.Errorf("%+v, %v", again, err)
	}
	if b, err := c.Build(ctx, img, BuildOptions{Again: true}); err != nil || b.Kept || b.Why != "" {
		t.Errorf("%+v, %v", b, err)
	}
	state := func(want State, why string) {
		t.Helper()
		list, err := c.List(ctx)
		if err != nil || len(list) != 1 || list[0].State != want || !strings.Contains(list[0].Why, why) || (why == "") != (list[0].Why == "") {
			t.Errorf("%+v, %v; want %s, %q", list, err, want, why)
		}
	}
	state(Current, "")

	// An open index outlives its name.
	x, err := c.Open(ctx, img)
	if err != nil {
		t.Fatal(err)
	}
	defer x.Close()

	// A change of the owner is none of the content; one that hides another is found.
	if err := os.Chmod(path, 0o640); err != nil {
		t.Fatal(err)
	}
	state(Current, "")
	if y, err := c.Open(ctx, img); err != nil {
		t.Error(err)
	} else {
		y.Close()
	}
	was := time.Unix(0, img.id.File.Mtime)
	other := bytes.Clone(disk)
	for i := 0; i < len(other); i += BlockSize {
		other[i]++
	}
	write(t, path, other)
	if err := os.Chtimes(path, was, was); err != nil {
		t.Fatal(err)
	}
	state(Stale, "although its times are as they were")

	// What was written to is stale, and built anew.
	old(t, path)
	state(Stale, "the image was written to")
	img = mustOpen(t, path)
	if _, err := c.Open(ctx, img); !errors.Is(err, ErrStale) {
		t.Error(err)
	}
	b, err := c.Build(ctx, img, BuildOptions{})
	if err != nil || b.Kept || !strings.Contains(b.Why, "was written to") {
		t.Errorf("%+v, %v", b, err)
	}
	state(Current, "")
	if x.Blocks() != first.Blocks {
		t.Error("an open index has changed")
	}

	// A copy has the same content, under the same key.
	twin := mustOpen(t, old(t, write(t, filepath.Join(dir, "twin"), other)))
	_, y := build(t, c, twin)
	z, err := c.Open(ctx, img)
	if err != nil || z.ContentID() != y.ContentID() || z.ContentID() == x.ContentID() {
		t.Error("content", err)
	}
	z.Close()

	find := func(path string) []string {
		t.Helper()
		list, err := c.List(ctx)
		if err != nil {
			t.Fatal(err)
		}
		return Find(list, path)
	}
	if ids := find(twin.Path()); len(ids) != 1 || c.Remove(ctx, ids[0]) != nil {
		t.Error(ids)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	state(Missing, "no such file")

	// Without its key it is of no use.
	write(t, path, other)
	old(t, path)
	img = mustOpen(t, path)
	if _, err := c.Build(ctx, img, BuildOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(c.path(keyName)); err != nil {
		t.Fatal(err)
	}
	state(Stale, "key of the store's indexes is lost")
	if _, err := c.Build(ctx, twin, BuildOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Open(ctx, img); !errors.Is(err, ErrStale) || !strings.Contains(err.Error(), "another key") {
		t.Error(err)
	}
	if ids := find(ID(img.id)); len(ids) != 1 || ids[0] != ID(img.id) {
		t.Error(ids)
	}
	entries, err := os.ReadDir(c.dir)
	if err != nil || len(entries) != 4 { // two indexes, the key and the lock
		t.Error(entries, err)
	}
}

// TestBuildRefuses leaves nothing where it can't build.
func TestBuildRefuses(t *testing.T) {
	ctx := t.Context()
	dir := t.TempDir()
	left := func(c *Catalog) {
		t.Helper()
		list, err := os.ReadDir(c.dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
		for _, e := range list {
			if strings.HasSuffix(e.Name(), partSuffix) || strings.HasSuffix(e.Name(), indexSuffix) {
				t.Errorf("%s is left", e.Name())
			}
		}
	}

	// Somebody can write to it.
	path := filepath.Join(dir, "qcow2")
	qemu(t, "qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
	old(t, path)
	c := catalog(t)
	img := mustOpen(t, path)
	stop := hold(t, path, "-n")
	if _, err := c.Build(ctx, img, BuildOptions{}); !errors.Is(err, ErrWriter) {
		t.Error(err)
	}
	stop()
	left(c)

	// It was changed since it was opened.
	path = old(t, write(t, filepath.Join(dir, "disk"), content(8<<20, 9)))
	img = mustOpen(t, path)
	if err := os.Truncate(path, 4096); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Build(ctx, img, BuildOptions{}); !errors.Is(err, ErrChanging) {
		t.Error(err)
	}
	left(c)

	// It is changed while it is read.
	old(t, write(t, path, content(8<<20, 9)))
	img = mustOpen(t, path)
	changing := changes{img, func() {
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err == nil {
			f.WriteAt([]byte{1}, 12345)
			f.Close()
		}
	}}
	h := digest.Fresh()
	f, err := vfs.OS.Create(filepath.Join(dir, "x"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := &builder{src: changing, hasher: h, head: header{id: img.id}, sort: sorter{limit: 100000}}
	if err := b.write(ctx, f); err != nil {
		t.Fatal(err)
	}
	if err := unchanged(img); !errors.Is(err, ErrChanging) {
		t.Error(err)
	}

	// A change of a moment ago is waited for, and no longer than the context lives.
	write(t, path, content(8<<20, 9))
	img = mustOpen(t, path)
	short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	start := time.Now()
	if _, err := c.Build(short, img, BuildOptions{}); !errors.Is(err, context.DeadlineExceeded) || time.Since(start) > racily {
		t.Error(err, time.Since(start))
	}
	if _, err := c.Build(ctx, img, BuildOptions{}); err != nil || time.Since(time.Unix(0, img.id.File.Mtime)) < racily {
		t.Error(err, time.Since(start))
	}
	// But not if it is known that nobody writes to it any more. A busy machine may be slow
	// once, and where it is waited for no attempt is quick.
	quick := false
	for range 5 {
		now := time.Now()
		if err := os.Chtimes(path, now, now); err != nil {
			t.Fatal(err)
		}
		img = mustOpen(t, path)
		if built, err := c.Build(ctx, img, BuildOptions{Again: true, Frozen: true}); err != nil || built.Blocks == 0 {
			t.Error(built, err)
		}
		quick = quick || time.Since(now) < racily
	}
	if !quick {
		t.Error("a layer that is frozen is waited for")
	}
	c = catalog(t)

	// Cancelled while it reads.
	old(t, path)
	img = mustOpen(t, path)
	cancelled, stopIt := context.WithCancelCause(ctx)
	cause := errors.New("enough")
	stopIt(cause)
	if _, err := c.Build(cancelled, img, BuildOptions{}); !errors.Is(err, cause) {
		t.Error(err)
	}
	left(c)

	// Somebody else builds it. What a killed build has left is nobody's.
	if err := os.MkdirAll(c.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	part := c.path(ID(img.id) + ".8b0a0a3e-7d1c-4c11-9d2e-1a6f3c6f0b11" + partSuffix)
	g, err := vfs.OS.Create(part)
	if err != nil {
		t.Fatal(err)
	}
	if err := g.TryLock(vfs.Exclusive); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Build(ctx, img, BuildOptions{}); !errors.Is(err, vfs.ErrLocked) {
		t.Error(err)
	}
	if n, err := c.Sweep(ctx); n != 0 || err != nil {
		t.Error(n, err)
	}
	g.Close()
	if n, err := c.Sweep(ctx); n != 1 || err != nil {
		t.Error(n, err)
	}
	write(t, part, nil)
	if _, err := c.Build(ctx, img, BuildOptions{}); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(part); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}

	// No room.
	small := NewCatalog(crashfs.New(48<<10), "/disks")
	if _, err := small.Build(ctx, img, BuildOptions{}); !errors.Is(err, syscall.ENOSPC) {
		t.Error(err)
	}
}

// changes is an image that is changed while it is read.
type changes struct {
	*Image
	change func()
}

func (c changes) ReadAt(p []byte, off int64) (int, error) {
	c.change()
	return c.Image.ReadAt(p, off)
}

// TestDamage changes each part of an index file: what it says is never taken for true.
func TestDamage(t *testing.T) {
	disk := content(4<<20, 11)
	img := mustOpen(t, old(t, write(t, filepath.Join(t.TempDir(), "disk"), disk)))
	c := catalog(t)
	_, x := build(t, c, img)
	name := c.path(ID(img.id) + indexSuffix)
	good, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(5, 6))
	for i := range 400 {
		b := bytes.Clone(good)
		at := r.IntN(len(b))
		if i < 150 {
			at = []int{0, 8, 12, 16, 24, 32, 40, 72, 88, 100, headerFixed + 3, headerRegions, headerSize - 1, len(b) - 1, len(b) - 5}[i%15]
		}
		b[at] ^= byte(1 + r.IntN(255))
		if i%50 == 49 {
			b = b[:at]
		}
		write(t, name, b)
		y, err := c.Open(t.Context(), img)
		if err != nil {
			if !errors.Is(err, ErrStale) {
				t.Fatalf("byte %d: %v", at, err)
			}
			continue
		}
		if at < headerSize || at >= len(good)-4-int(x.table.Leaves())*8 {
			t.Errorf("byte %d is not checked when the index is opened", at)
		}
		for _, s := range sectors(int64(len(disk)) / SectorSize) {
			block := disk[s*SectorSize:][:BlockSize]
			if got, ok := y.Lookup(y.Digester().Sum(block)); ok && !bytes.Equal(disk[got*SectorSize:][:BlockSize], block) {
				t.Fatalf("byte %d: a wrong block", at)
			}
		}
		if err := y.Err(); !integrity.IsCorrupt(err) {
			t.Errorf("byte %d: damage is not told: %v", at, err)
		}
		y.Close()
	}
	// A file that is cut while it is in use costs matches, and not the process.
	write(t, name, good)
	y, err := c.Open(t.Context(), img)
	if err != nil {
		t.Fatal(err)
	}
	defer y.Close()
	if err := os.Truncate(name, headerSize); err != nil {
		t.Fatal(err)
	}
	if _, ok := y.Lookup(y.Digester().Sum(disk[:BlockSize])); ok || !integrity.IsCorrupt(y.Err()) {
		t.Error(ok, y.Err())
	}
	if b, err := c.Build(t.Context(), img, BuildOptions{}); err != nil || b.Kept || b.Why == "" {
		t.Error(b, err)
	}
}

// TestPowerCut cuts a build off at each of its operations: what is found then is no
// index, or the whole one; and killed ones are swept.
func TestPowerCut(t *testing.T) {
	disk := content(1<<20, 11)
	img := mustOpen(t, old(t, write(t, filepath.Join(t.TempDir(), "disk"), disk)))
	for at := 1; ; at++ {
		disk := crashfs.New(0)
		disk.KillAt(at)
		_, err := NewCatalog(disk, "/store/disks").Build(t.Context(), img, BuildOptions{})
		done := err == nil
		for seed := range uint64(4) {
			after := disk.CrashClone(seed)
			if seed == 0 {
				after = disk.Fork() // the process alone
			}
			c := NewCatalog(after, "/store/disks")
			x, err := c.Open(t.Context(), img)
			switch {
			case err == nil:
				if _, ok := x.Lookup(x.Digester().Sum(bytes.Repeat([]byte{1}, BlockSize))); ok || x.Err() != nil || x.Blocks() == 0 {
					t.Fatalf("cut at %d: %v", at, x.Err())
				}
				x.Close()
			case !errors.Is(err, ErrNoIndex) && !errors.Is(err, ErrStale):
				t.Fatalf("cut at %d: %v", at, err)
			case done:
				t.Fatalf("cut at %d: the index is lost although it was done: %v", at, err)
			}
			if _, err := c.Sweep(t.Context()); err != nil {
				t.Fatal(err)
			}
			list, _ := after.ReadDir("/store/disks")
			for _, e := range list {
				if strings.HasSuffix(e.Name(), partSuffix) {
					t.Fatalf("cut at %d: %s stays", at, e.Name())
				}
			}
			if _, err := c.Build(t.Context(), img, BuildOptions{}); err != nil {
				t.Fatalf("cut at %d: %v", at, err)
			}
		}
		if done {
			break
		}
	}
}
