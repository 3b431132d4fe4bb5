package store

import (
	"io/fs"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/flic-migrate/flic-migrate/tier/vfs"
	"github.com/flic-migrate/flic-migrate/tier/vfs/crashfs"
)

// readCounter counts what is read of images.
type readCounter struct {
	vfs.FS
	opens, reads, bytes *atomic.Int64
	listed, looks       *atomic.Int64 // listings of VMs' folders, and files of them that were looked at
	removed             bool          // those of removed checkpoints count too
}

func newReadCounter(fsys vfs.FS) readCounter {
	n := func() *atomic.Int64 { return new(atomic.Int64) }
	return readCounter{FS: fsys, opens: n(), reads: n(), bytes: n(), listed: n(), looks: n()}
}

func (c readCounter) reset() {
	for _, n := range []*atomic.Int64{c.opens, c.reads, c.bytes, c.listed, c.looks} {
		n.Store(0)
	}
}

func (c readCounter) ReadDir(dir string) ([]fs.DirEntry, error) {
	if strings.Contains(dir, "/vms/") {
		c.listed.Add(1)
	}
	return c.FS.ReadDir(dir)
}

func (c readCounter) ReadStamps(dir string, look func(string) bool) ([]vfs.Stamped, error) {
	list, err := c.FS.ReadStamps(dir, look)
	if strings.Contains(dir, "/vms/") {
		c.listed.Add(1)
		for _, e := range list {
			if e.Stamp != (vfs.Stamp{}) {
				c.looks.Add(1)
			}
		}
	}
	return list, err
}

func (c readCounter) NoLinks(dir string) (vfs.FS, error) {
	fsys, err := c.FS.NoLinks(dir)
	c.FS = fsys
	return c, err
}

func (c readCounter) Open(name string) (vfs.File, error) {
	f, err := c.FS.Open(name)
	if err != nil || !strings.HasSuffix(name, imageSuffix) && !(c.removed && strings.HasSuffix(name, removedSuffix)) {
		return f, err
	}
	c.opens.Add(1)
	return &countedReads{f, c}, nil
}

type countedReads struct {
	vfs.File
	c readCounter
}

func (f *countedReads) ReadAt(b []byte, off int64) (int, error) {
	n, err := f.File.ReadAt(b, off)
	f.c.reads.Add(1)
	f.c.bytes.Add(int64(n))
	return n, err
}

// TestReads bounds what list and gc read of a store with 1000 checkpoints.
func TestReads(t *testing.T) {
	const vms, each = 50, 20
	disk := crashfs.New(0)
	c := newReadCounter(disk)
	s, err := Open(t.Context(), c, "/store", true)
	if err != nil {
		t.Fatal(err)
	}
	name := func(i int) string { return "vm" + strings.Repeat("x", i) }
	for i := range vms {
		for n := 1; n <= each; n++ {
			p, err := s.Begin(t.Context(), name(i))
			if err != nil {
				t.Fatal(err)
			}
			if n == each { // the newest has NVRAM
				if _, _, err := p.Reserve(t.Context(), Reservation{Path: "/nvram.img", Bytes: 4096, PageSize: 4096}); err != nil {
					t.Fatal(err)
				}
			}
			if err := finish(p); err != nil {
				t.Fatal(err)
			}
			if _, err := p.Commit(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
	}
	expect := func(what string, opens, bytes int64) {
		t.Helper()
		if c.opens.Load() > opens || c.reads.Load() > opens || c.bytes.Load() > bytes {
			t.Errorf("%s opened %d images and read %d times, %d bytes; at most %d, and %d bytes",
				what, c.opens.Load(), c.reads.Load(), c.bytes.Load(), opens, bytes)
		}
		c.reset()
	}
	c.reset()
	ops := len(disk.Ops())
	list, err := s.Identities(t.Context(), "")
	if err != nil || len(list) != vms*each {
		t.Fatalf("%d checkpoints, %v", len(list), err)
	}
	expect("list", vms*each, vms*each*4096)
	if more := disk.Ops()[ops:]; len(more) > 0 {
		t.Errorf("list is no reading: %v", more)
	}
	// The newest of each VM owns what is in NVRAM.
	if rep, err := s.GC(t.Context()); err != nil || rep.NVRAMExtents != 0 {
		t.Fatalf("%+v, %v", rep, err)
	}
	expect("gc", vms, vms*128)
	for _, op := range disk.Ops()[ops:] {
		if op.Kind == crashfs.SyncDir && strings.HasPrefix(op.Name, "/store") {
			t.Errorf("gc with nothing to do: %v", op)
		}
	}
	for i := range vms {
		if rm, err := s.Remove(t.Context(), Ref{name(i), each}); err != nil || rm.Left != nil || rm.NVRAMBytes == 0 {
			t.Fatalf("%+v, %v", rm, err)
		}
	}
	c.reset()
	if _, err := s.GC(t.Context()); err != nil {
		t.Fatal(err)
	}
	expect("gc without anything in NVRAM", 0, 0)
}
