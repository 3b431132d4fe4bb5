package disk

import (
	"context"
	"encoding/binary"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/tier/digest"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// terabyte is a disk of 1 TB with data in 256 places of 4 MiB each, no two blocks of
// them alike.
type terabyte struct{}

const (
	terabytes  = 1 << 40
	every      = terabytes / 256
	placeBytes = 4 << 20
)

func (terabyte) Size() int64 { return terabytes }

func (terabyte) ownRun(_ context.Context, off int64) (from, to int64, err error) {
	if off%every >= placeBytes {
		off = (off + every - 1) / every * every
	}
	if off >= terabytes {
		return 0, 0, io.EOF
	}
	return off, off/every*every + placeBytes, nil
}

func (terabyte) ReadAt(p []byte, off int64) (int, error) {
	clear(p)
	for i := 0; i+8 <= len(p); i += 512 {
		if at := off + int64(i); at%every < placeBytes && at > 1<<20 {
			binary.LittleEndian.PutUint64(p[i:], uint64(at))
		}
	}
	return len(p), nil
}

// TestTerabyte indexes a disk of 1 TB with as many runs to merge as one that is full has,
// each shorter by as much as the disk is emptier, and looks at the memory that this takes
// while it goes on: merging is what a large disk needs more memory for than a small one.
func TestTerabyte(t *testing.T) {
	const runs = terabytes / BlockSize / runRecords // 256
	name := filepath.Join(t.TempDir(), "index")
	f, err := vfs.OS.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := &builder{src: terabyte{}, hasher: digest.Fresh(), head: header{id: Identity{Path: "/disk", Format: Raw, Size: terabytes}}}
	b.sort.limit = 256 * placeBytes / BlockSize / runs
	b.sort.scratch = func() (vfs.File, error) { return vfs.OS.Create(name + "x") }

	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	before, most := m.HeapInuse, uint64(0)
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			most = max(most, m.HeapInuse)
			select {
			case <-stop:
				return
			case <-time.After(5 * time.Millisecond):
			}
		}
	}()
	err = b.write(t.Context(), f)
	close(stop)
	<-stopped
	if err != nil {
		t.Fatal(err)
	}
	if len(b.sort.runs) < runs-2 {
		t.Errorf("%d runs, where a full disk has %d", len(b.sort.runs), runs)
	}
	// What runs of their full length take is there beside.
	got, full := int64(most)-int64(before), int64(3*runRecords*24)
	t.Logf("%d MiB, and %d MiB for three runs of a full disk", got>>20, full>>20)
	if got > 64<<20 {
		t.Errorf("%d bytes of memory beside the runs", got)
	}
	x, err := openIndex(vfs.OS, name)
	if err != nil {
		t.Fatal(err)
	}
	defer x.Close()
	p := make([]byte, BlockSize)
	for off := int64(1 << 20); off < terabytes; off += every/3 + BlockSize {
		at := off / BlockSize * BlockSize
		terabyte{}.ReadAt(p, at)
		zero := at%every >= placeBytes || at < 1<<20
		if s, ok := x.Lookup(b.hasher.Sum(p)); ok == zero || ok && s != at/SectorSize {
			t.Errorf("offset %d: sector %d, %v", at, s, ok)
		}
	}
}

// BenchmarkBuild indexes FLIC_BENCH_DISK, or a disk of 1 GiB: MB/s to be compared with
// cat's of the same file.
func BenchmarkBuild(b *testing.B) {
	img := benchImage(b)
	for b.Loop() {
		if _, err := catalog(b).Build(b.Context(), img, BuildOptions{}); err != nil {
			b.Fatal(err)
		}
	}
	b.SetBytes(img.Size())
}

// BenchmarkCat reads the same file as cat does, and does nothing with it.
func BenchmarkCat(b *testing.B) {
	img := benchImage(b)
	p := make([]byte, 128<<10)
	for b.Loop() {
		for off := int64(0); off < img.Size(); off += int64(len(p)) {
			img.file.ReadAt(p, off)
		}
	}
	b.SetBytes(img.Size())
}

// BenchmarkLookup looks for digests half of which are there.
func BenchmarkLookup(b *testing.B) {
	img := benchImage(b)
	_, x := build(b, catalog(b), img)
	p := make([]byte, BlockSize)
	sums := make([]digest.Sum, 1<<14)
	for i := range sums {
		if _, err := img.ReadAt(p, int64(i)*7919%(img.Size()/BlockSize)*BlockSize); err != nil {
			b.Fatal(err)
		}
		p[0] ^= byte(i & 1)
		sums[i] = x.Digester().Sum(p)
	}
	i := 0
	for b.Loop() {
		x.Lookup(sums[i%len(sums)])
		i++
	}
}

func benchImage(b *testing.B) *Image {
	b.Helper()
	path := os.Getenv("FLIC_BENCH_DISK")
	if path == "" {
		path = old(b, write(b, filepath.Join(b.TempDir(), "disk"), content(1<<30, 1)))
	}
	return mustOpen(b, path)
}
