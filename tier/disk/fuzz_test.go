package disk

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

// small is a qcow2 image of a few clusters, as qemu-img writes it.
func small(t testing.TB, name string, options ...string) []byte {
	t.Helper()
	dir := t.TempDir()
	raw := write(t, filepath.Join(dir, "raw"), content(48<<10, 5))
	path := filepath.Join(dir, name)
	qemu(t, append(append([]string{"qemu-img", "convert", "-f", "raw", "-O", "qcow2"}, options...), raw, path)...)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// walk looks at all of a layer, and reads what it has. An image may say what it likes:
// it is refused, or gives some bytes for each range that it says to have.
func walk(t testing.TB, b []byte) error {
	q, err := openQcow2(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		return err
	}
	p := make([]byte, 64<<10)
	for off, steps := int64(0), 0; off < q.size && steps < 1000; steps++ {
		kind, n, err := q.extent(off, min(q.size-off, 1<<20))
		if err != nil {
			return err
		}
		if n <= 0 || n > q.size-off {
			t.Fatalf("%d bytes from %d of %d", n, off, q.size)
		}
		if from, to := q.tables.find(off, min(n, q.cluster-off%q.cluster)); from < 0 || to < from || to-from > 3*q.cluster || from > int64(len(b)) {
			t.Fatalf("what is at %d would be read ahead from %d to %d of a file of %d bytes", off, from, to, len(b))
		}
		if kind == ownData {
			if err := q.read(p[:min(n, int64(len(p)))], off+max(0, n-int64(len(p)))); err != nil {
				return err
			}
		}
		off += n
	}
	return nil
}

func FuzzQcow2(f *testing.F) {
	f.Add(small(f, "plain", "-o", "cluster_size=512"))
	f.Add(small(f, "deflate", "-c", "-o", "cluster_size=4096"))
	f.Add(small(f, "zstd", "-c", "-o", "cluster_size=4096,compression_type=zstd"))
	f.Add(small(f, "old", "-o", "cluster_size=1024,compat=0.10"))
	f.Fuzz(func(t *testing.T, b []byte) {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		walk(t, b)
		runtime.ReadMemStats(&after)
		// L2 tables of 2 MiB each, a thousand steps.
		if got := after.TotalAlloc - before.TotalAlloc; got > 4<<30 {
			t.Errorf("%d bytes of memory taken", got)
		}
	})
}

// TestHostileHeaders changes one field of a good image at a time. What the library takes
// on trust is among them: an L1 table of 32 GB.
func TestHostileHeaders(t *testing.T) {
	good := small(t, "good", "-o", "cluster_size=4096")
	if err := walk(t, good); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		what string
		at   int
		n    int // bytes of the field
		v    uint64
		want string
	}{
		{"magic", 0, 4, 0x51464900, "version 2 or 3"},
		{"version", 4, 4, 4, "version 2 or 3"},
		{"clusters too small", 20, 4, 8, "clusters of 2^8"},
		{"clusters too large", 20, 4, 22, "clusters of 2^22"},
		{"no disk", 24, 8, 0, "a disk of 0 bytes"},
		{"huge disk", 24, 8, 1 << 62, "a disk of"},
		{"negative disk", 24, 8, 1 << 63, "a disk of"},
		{"half a sector", 24, 8, 1000, "a disk of 1000"},
		{"encrypted", 32, 4, 1, "encrypted"},
		{"L1 table of 32 GB", 36, 4, 0xffffffff, "an L1 table of 4294967295"},
		{"L1 table too short", 36, 4, 0, "an L1 table of 0"},
		{"L1 table beyond the end", 36, 4, 1 << 20, "no L1 table at"},
		{"L1 table nowhere", 40, 8, 0, "no L1 table at 0"},
		{"L1 table at an odd place", 40, 8, 4097, "no L1 table at 4097"},
		{"L1 table behind the file", 40, 8, 1 << 60, "no L1 table at"},
		{"corrupt", 72, 8, 2, "corrupt bit"},
		{"external data", 72, 8, 4, "external data file"},
		{"extended L2", 72, 8, 16, "extended L2"},
		{"of the future", 72, 8, 1 << 40, "feature 40"},
		{"short header", 100, 4, 80, "a header of 80 bytes"},
		{"long header", 100, 4, 1 << 31, "a header of"},
		{"name out of the header", 8, 8, 1 << 40, "out of the header"},
		{"compression of the future", 104, 1, 9, "compression type"},
	} {
		b := bytes.Clone(good)
		var v [8]byte
		binary.BigEndian.PutUint64(v[:], c.v)
		copy(b[c.at:], v[8-c.n:])
		if err := walk(t, b); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v; want %q", c.what, err, c.want)
		}
	}
	// An L1 entry that points behind the file has no clusters; QEMU sees zeros there.
	b := bytes.Clone(good)
	l1 := binary.BigEndian.Uint64(b[40:])
	binary.BigEndian.PutUint64(b[l1:], 1<<50)
	if err := walk(t, b); err != nil {
		t.Error(err)
	}
	// Cut in its clusters it can be opened: what is missing is zero.
	if err := walk(t, good[:l1+4096]); err != nil {
		t.Error(err)
	}
	if err := walk(t, good[:100]); err == nil {
		t.Error("a header alone is an image")
	}
}
