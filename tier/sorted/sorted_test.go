package sorted

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"testing"

	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// made writes records behind so many bytes of something else, and maps the file.
func made(t testing.TB, base int64, record int, list [][]byte) (name string, b []byte) {
	t.Helper()
	name = filepath.Join(t.TempDir(), "table")
	f, err := vfs.OS.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	w := NewWriter(f, base, record)
	for _, r := range list {
		if err := w.Add(r); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.End(); err != nil {
		t.Fatal(err)
	}
	if w.Records() != int64(len(list)) {
		t.Fatalf("%d records of %d", w.Records(), len(list))
	}
	b, err = vfs.ReadFile(vfs.OS, name, 1<<30)
	if err != nil {
		t.Fatal(err)
	}
	return name, b[base:]
}

// random makes records, some of which begin alike.
func random(seed uint64, n, record int) [][]byte {
	r := rand.New(rand.NewPCG(seed, 1))
	var list [][]byte
	for len(list) < n {
		b := make([]byte, record)
		binary.BigEndian.PutUint64(b, r.Uint64())
		for range 1 + r.IntN(3)*r.IntN(200) {
			binary.BigEndian.PutUint16(b[record-2:], uint16(r.Uint32()))
			list = append(list, bytes.Clone(b))
		}
	}
	slices.SortFunc(list[:n], bytes.Compare)
	return list[:n]
}

// TestEach looks for what is there and for what is not, in tables of all lengths around a
// leaf's.
func TestEach(t *testing.T) {
	for _, record := range []int{10, 14, 20, 4092} {
		per := PerLeaf(record)
		for _, n := range []int{0, 1, per - 1, per, per + 1, 5*per + 3} {
			list := random(uint64(n), n, record)
			name, b := made(t, 100, record, list)
			x, err := Open(name, 100, b, record, int64(n))
			if err != nil {
				t.Fatalf("%d records of %d: %v", n, record, err)
			}
			if x.Records() != int64(n) || x.Leaves() != Leaves(record, int64(n)) {
				t.Errorf("%d records of %d: %d in %d leaves", n, record, x.Records(), x.Leaves())
			}
			keys := [][]byte{make([]byte, 8), bytes.Repeat([]byte{255}, 8)}
			for _, r := range list {
				keys = append(keys, r[:8])
			}
			for _, k := range keys {
				var want, got [][]byte
				for _, r := range list {
					if bytes.HasPrefix(r, k) {
						want = append(want, r)
					}
				}
				if err := x.Each(k, func(r []byte) bool { got = append(got, r); return true }); err != nil {
					t.Fatal(err)
				}
				if !slices.EqualFunc(got, want, bytes.Equal) {
					t.Fatalf("%d records of %d: %d begin with %x, want %d", n, record, len(got), k, len(want))
				}
				if len(want) > 1 {
					n := 0
					x.Each(k, func([]byte) bool { n++; return false })
					if n != 1 {
						t.Errorf("it went on %d times", n)
					}
				}
			}
		}
	}
}

// TestDamage changes each byte of a table: nothing that is not a record is given out.
func TestDamage(t *testing.T) {
	list := random(7, 40, 14)
	name, good := made(t, 0, 14, list)
	for at := range good {
		b := bytes.Clone(good)
		b[at] ^= 0x20
		x, err := Open(name, 0, b, 14, int64(len(list)))
		if err == nil {
			for _, r := range list {
				if err = x.Each(r, func(got []byte) bool { return bytes.Equal(got, r) }); err != nil {
					break
				}
			}
		}
		if !integrity.IsCorrupt(err) {
			t.Fatalf("byte %d: %v", at, err)
		}
	}
	for _, n := range []int64{0, 39, 1 << 40} {
		if _, err := Open(name, 0, good[:len(good)-1], 14, n); !integrity.IsCorrupt(err) {
			t.Errorf("cut, as of %d records: %v", n, err)
		}
	}
}
