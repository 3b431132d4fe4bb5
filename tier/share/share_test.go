package share

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/digest"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// sumOf is the digest of a made-up page.
func sumOf(seed uint64) (s digest.Sum) {
	r := rand.New(rand.NewPCG(seed, 7))
	binary.BigEndian.PutUint64(s[:], r.Uint64())
	binary.BigEndian.PutUint64(s[8:], r.Uint64())
	return s
}

// made is an image of n pages, of which slot i has page first+i.
func made(name string, first, n uint64) Source {
	return Source{Image{uuid.NewSHA1(uuid.Nil, []byte(name)), name, 1}, func(fn func(digest.Sum, uint64) error) error {
		for i := range n {
			if err := fn(sumOf(first+i), i); err != nil {
				return err
			}
		}
		return nil
	}}
}

type lab struct {
	t   testing.TB
	c   *Catalog
	key KeyID
}

func newLab(t testing.TB) *lab {
	return &lab{t, NewCatalog(vfs.OS, t.TempDir()), NewKeyID(digest.Fresh())}
}

func (l *lab) locked(fn func(c *Locked) error) {
	l.t.Helper()
	c, err := l.c.Lock(l.t.Context())
	if err != nil {
		l.t.Fatal(err)
	}
	defer c.Unlock()
	if err := fn(c); err != nil {
		l.t.Fatal(err)
	}
}

func (l *lab) add(list ...Source) {
	l.t.Helper()
	l.locked(func(c *Locked) error {
		failed, err := c.Add(l.t.Context(), l.key, list)
		return errors.Join(failed, err, c.Seal(l.key))
	})
}

func (l *lab) open() *Index {
	l.t.Helper()
	x, err := l.c.Open(l.t.Context(), l.key)
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { x.Close() })
	return x
}

// in is where a page may be, as VM/slot.
func in(x *Index, page uint64) (list []string) {
	x.Each(sumOf(page), func(image int, slot uint64) bool {
		list = append(list, fmt.Sprint(x.Images()[image].VM, "/", slot))
		return true
	})
	slices.Sort(list)
	return list
}

func all(Image) bool { return true }

// TestIndex adds images in several ways, merges them, and drops some: what is there is found
// in all its places, and nothing else is.
func TestIndex(t *testing.T) {
	was := sortRecords
	defer func() { sortRecords = was }()
	for _, sortRecords = range []int{was, 100} { // the second cuts images into several runs
		l := newLab(t)
		if s, err := l.c.State(l.open(), l.key); s != Unknown || err != nil {
			t.Errorf("state %v, %v", s, err)
		}
		l.add(made("a", 0, 1000), made("b", 500, 1000))
		l.add(made("c", 900, 10))
		check := func(x *Index, gone ...string) {
			t.Helper()
			for page := range uint64(1600) {
				var want []string
				for _, m := range []struct {
					vm       string
					first, n uint64
				}{{"a", 0, 1000}, {"b", 500, 1000}, {"c", 900, 10}} {
					if page >= m.first && page < m.first+m.n && !slices.Contains(gone, m.vm) {
						want = append(want, fmt.Sprint(m.vm, "/", page-m.first))
					}
				}
				if got := in(x, page); !slices.Equal(got, want) {
					t.Fatalf("page %d is in %v, want %v", page, got, want)
				}
			}
			if err := x.Err(); err != nil {
				t.Error(err)
			}
		}
		before := l.open()
		check(before)
		if s, err := l.c.State(before, l.key); s != Complete || err != nil {
			t.Errorf("state %v, %v", s, err)
		}
		l.locked(func(c *Locked) error { return c.Merge(t.Context(), l.key, 1<<40, all) })
		l.locked(func(c *Locked) error { return c.Seal(l.key) })
		x := l.open()
		if x.Runs() > 2 || x.Records() != 2010 {
			t.Errorf("%d runs of %d records", x.Runs(), x.Records())
		}
		check(x)
		check(before) // it stays as it was
		if !x.Has(made("a", 0, 0).UUID) || x.Has(uuid.New()) {
			t.Error("it does not know what it has")
		}
		// One of another key is not looked in, and of no use.
		if y, err := l.c.Open(t.Context(), NewKeyID(digest.Fresh())); err != nil || y.Records() != 0 {
			t.Error(y.Records(), err)
		}
		notA := func(im Image) bool { return im.VM == "c" }
		l.locked(func(c *Locked) error { return c.Merge(t.Context(), l.key, 1<<40, notA) })
		l.locked(func(c *Locked) error { return c.Drop(t.Context(), l.key, notA) })
		check(l.open(), "a", "b")
	}
}

// TestGrowth adds as many small images as it takes for runs to be merged again and again:
// there are few runs, and they are not written often.
func TestGrowth(t *testing.T) {
	l := newLab(t)
	written := int64(0)
	for i := range uint64(200) {
		l.add(made(fmt.Sprint(i), 100*i, 100))
		before := l.open()
		sizes := map[int64]int{}
		for _, r := range before.runs {
			sizes[r.head.records]++
		}
		l.locked(func(c *Locked) error { return c.Merge(t.Context(), l.key, 1<<40, all) })
		x := l.open()
		for _, r := range x.runs {
			if sizes[r.head.records]--; sizes[r.head.records] < 0 {
				written += r.head.records
			}
		}
		if x.Records() != int64(100*(i+1)) || x.Runs() > 6 {
			t.Fatalf("after %d: %d records in %d runs", i, x.Records(), x.Runs())
		}
		x.Close()
		before.Close()
	}
	if most := int64(200 * 100 * 12); written > most {
		t.Errorf("%d records were written, at most %d", written, most)
	}
}

// TestCopies keeps a few places of a page that many images have.
func TestCopies(t *testing.T) {
	l := newLab(t)
	var list []Source
	for i := range 30 {
		list = append(list, made(fmt.Sprint(i), 0, 3))
	}
	l.add(list...)
	l.add(list[:3]...)
	l.locked(func(c *Locked) error { return c.Merge(t.Context(), l.key, 1<<40, all) })
	if got := in(l.open(), 1); len(got) != maxCopies {
		t.Errorf("%v", got)
	}
}

// TestNotes looks at notes of new images, which go when these are added, or are gone.
func TestNotes(t *testing.T) {
	l := newLab(t)
	a, b := made("a", 0, 3), made("b.c ä", 3, 3)
	for _, im := range []Image{a.Image, b.Image, b.Image} {
		if err := l.c.Note(im); err != nil {
			t.Fatal(err)
		}
	}
	news, err := l.c.News()
	if err != nil || len(news) != 2 || !slices.Contains(news, a.Image) || !slices.Contains(news, b.Image) {
		t.Fatal(news, err)
	}
	l.add(a)
	l.locked(func(c *Locked) error {
		_, err := c.Clean(l.key, func(im Image) bool { return im.VM == "a" })
		return err
	})
	if news, err = l.c.News(); err != nil || len(news) != 0 {
		t.Error(news, err)
	}
	for _, name := range []string{"x", ".new", "x.1.vm.new", uuid.NewString() + ".0.vm.new", uuid.NewString() + ".1..new"} {
		os.WriteFile(filepath.Join(l.c.dir, name), nil, 0o600)
	}
	if news, err = l.c.News(); err != nil || len(news) != 0 {
		t.Error(news, err)
	}
}

// TestFailed adds images of which one can't be read: the others are there.
func TestFailed(t *testing.T) {
	l := newLab(t)
	bad := made("bad", 100, 50)
	each := bad.Each
	bad.Each = func(fn func(digest.Sum, uint64) error) error {
		if err := each(fn); err != nil {
			return err
		}
		return errors.New("damaged")
	}
	l.locked(func(c *Locked) error {
		failed, err := c.Add(t.Context(), l.key, []Source{made("a", 0, 10), bad, made("b", 10, 10)})
		if failed == nil {
			t.Error("nothing is said of the one that failed")
		}
		return err
	})
	x := l.open()
	if x.Records() != 20 || len(in(x, 15)) != 1 || len(in(x, 110)) != 0 {
		t.Errorf("%d records, page 15 in %v, 110 in %v", x.Records(), in(x, 15), in(x, 110))
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	l.locked(func(c *Locked) error {
		if _, err := c.Add(ctx, l.key, []Source{made("c", 0, 10)}); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		return nil
	})
}

// TestDamage changes bytes all over a run: it is said, what is found is what was there, and
// after Discard or Clean the index is known to be broken and can be made again.
func TestDamage(t *testing.T) {
	l := newLab(t)
	l.add(made("a", 0, 1000))
	name := filepath.Join(l.c.dir, runName(1))
	good, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < 300; i++ {
		at := i * len(good) / 300
		if at >= 48 && at < 4090 && i%5 > 0 {
			continue
		}
		b := slices.Clone(good)
		b[at] ^= 0x10
		if i%20 == 19 {
			b = b[:at]
		}
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
		x := l.open()
		n := 0
		for page := range uint64(1000) {
			if got := in(x, page); len(got) > 0 {
				n++
				if len(got) > 1 || got[0] != fmt.Sprint("a/", page) {
					t.Fatalf("byte %d: page %d is in %v", at, page, got)
				}
			}
		}
		if at < 8192-4096+26 && x.Broken == nil {
			t.Errorf("byte %d of what describes the run is not checked", at)
		}
		if x.Broken != nil && !integrity.IsCorrupt(x.Broken) {
			t.Error(x.Broken)
		}
		if x.Broken == nil && n == 1000 && x.Err() == nil && at >= 8192 {
			t.Errorf("byte %d: nobody has noticed", at)
		}
		if x.Broken == nil && x.Err() != nil {
			if err := l.c.Discard(x); err != nil {
				t.Fatal(err)
			}
		}
		if x.Broken != nil || x.Err() != nil {
			y := l.open()
			if s, err := l.c.State(y, l.key); s != Broken || err != nil {
				t.Fatalf("byte %d: state %v, %v", at, s, err)
			}
			y.Close()
		}
		x.Close()
		os.WriteFile(name, good, 0o600)
	}
	os.WriteFile(name, good[:100], 0o600)
	l.locked(func(c *Locked) error { _, err := c.Clean(l.key, all); return err })
	l.add(made("a", 0, 1000))
	if x := l.open(); len(in(x, 77)) != 1 || x.Broken != nil {
		t.Error(in(x, 77), x.Broken)
	}
}

// TestUnreadable has the medium lose what was written: a leaf while two runs are merged, which
// is a fault of a mapping, and a header. The run is damaged, and no error that comes again for
// ever: it goes, and can be made again.
func TestUnreadable(t *testing.T) {
	l := newLab(t)
	l.add(made("a", 0, 1000))
	l.locked(func(c *Locked) error {
		_, err := c.Add(t.Context(), l.key, []Source{made("b", 500, 1000)})
		return err
	})
	name := filepath.Join(l.c.dir, runName(1))
	l.locked(func(c *Locked) error {
		err := c.Merge(t.Context(), l.key, 1<<30, func(Image) bool {
			if err := os.Truncate(name, 8192); err != nil {
				t.Fatal(err)
			}
			return true
		})
		var damage *integrity.CorruptError
		if !errors.As(err, &damage) || damage.File != name || damage.Offset < 4096 {
			t.Errorf("the merge ended with %v", err)
		}
		return nil
	})
	if _, err := os.Stat(name); !errors.Is(err, fs.ErrNotExist) {
		t.Error("the run is still there:", err)
	}
	if x := l.open(); len(in(x, 1200)) != 1 {
		t.Error("the other run has gone as well")
	}
	l.c.fs = badHeader{l.c.fs}
	if x := l.open(); x.Records() != 0 || !integrity.IsCorrupt(x.Broken) {
		t.Errorf("%d records, broken: %v", x.Records(), x.Broken)
	}
}

// badHeader is a file system of which no file's first byte can be read.
type badHeader struct{ vfs.FS }

func (d badHeader) Open(name string) (vfs.File, error) {
	f, err := d.FS.Open(name)
	return badHeaderFile{f}, err
}

type badHeaderFile struct{ vfs.File }

func (f badHeaderFile) ReadAt(b []byte, off int64) (int, error) {
	if off == 0 {
		return 0, syscall.EIO
	}
	return f.File.ReadAt(b, off)
}

func FuzzRun(f *testing.F) {
	dir := f.TempDir()
	l := &lab{f, NewCatalog(vfs.OS, dir), NewKeyID(digest.Fresh())}
	l.add(made("a", 0, 300))
	good, err := os.ReadFile(filepath.Join(dir, runName(1)))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(good[:4096])
	f.Fuzz(func(t *testing.T, b []byte) {
		name := filepath.Join(t.TempDir(), "x")
		if len(b) >= headerSize { // forged: with the right checksum
			b = slices.Clone(b)
			binary.LittleEndian.PutUint32(b[headerSize-4:], integrity.Checksum(b[:headerSize-4]))
		}
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
		r, err := openRun(vfs.OS, name)
		if err != nil {
			return
		}
		x := &Index{runs: []*run{r}, images: r.images}
		defer x.Close()
		x.Each(sumOf(1), func(image int, _ uint64) bool { _ = x.Images()[image]; return true })
	})
}
