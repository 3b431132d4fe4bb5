package tier_test

import (
	"bytes"
	"context"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/pagemap"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/vfs/crashfs"
	"github.com/flic-migrate/flic-migrate/tier/workingset"
)

// recordedLinux is the stream of a Linux guest.
func recordedLinux(t testing.TB) []byte {
	t.Helper()
	f, err := os.Open("../testdata/q35-linux-stopped.stream.zst")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := zstd.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	var b bytes.Buffer
	if _, err := b.ReadFrom(z); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// A guest's page tables are found in a stream of a real one, and are in NVRAM
// although no working set knows of them.
func TestPageTables(t *testing.T) {
	b := recordedLinux(t)
	l := newLab(t, crashfs.New(0), "/")
	put := func(o save.Options) (store.Ref, *checkpoint.Meta) {
		t.Helper()
		o.VM, o.TablesTime = "vm", time.Minute // on a host that is busy with other tests
		ref, m, err := l.run(context.Background(), bytes.NewReader(b), o)
		if err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		if err := l.restore(ref, &out); err != nil || !bytes.Equal(out.Bytes(), b) {
			t.Fatalf("restored %d bytes of %d: %v", out.Len(), len(b), err)
		}
		if bad := l.verify(ref); len(bad) > 0 {
			t.Fatal(bad)
		}
		return ref, m
	}
	// places counts the page tables of a checkpoint by where they are.
	places := func(ref store.Ref) (count map[pagemap.Kind]int) {
		t.Helper()
		c, err := l.st.OpenCheckpoint(context.Background(), ref, checkpoint.Options{})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		count = make(map[pagemap.Kind]int)
		seen := map[workingset.PageRun]bool{}
		for _, r := range c.Meta.PageTables {
			for page := r.Page; page < r.Page+r.Count; page++ {
				run, err := c.PageMap.Find(r.Block, page)
				if err != nil {
					t.Fatal(err)
				}
				count[run.Entry(0).Kind()]++
				if one := (workingset.PageRun{Block: r.Block, Page: page, Count: 1}); seen[one] {
					t.Errorf("%+v is listed twice", one)
				} else {
					seen[one] = true
				}
			}
		}
		return count
	}

	cold, m := put(save.Options{})
	if m.Report.PageTables < 30 || m.Report.PageTables > 1000 || m.Report.NoPageTables != "" || m.Report.Hot != 0 {
		t.Fatalf("%+v", m.Report)
	}
	if n := places(cold); n[pagemap.NVRAM] != 0 || int64(n[pagemap.Flash]) != m.Report.PageTables {
		t.Errorf("without NVRAM: %v", n)
	}
	ws, err := workingset.New(m.PageSize, m.WorkingSetBlocks())
	if err != nil {
		t.Fatal(err)
	}
	for page := int64(5000); page < 5400; page++ {
		ws.SetHeat(0, page, 3)
	}
	// The first with NVRAM of a VM that nothing is known of, and the next.
	if err := l.remove(cold); err != nil {
		t.Fatal(err)
	}
	o := save.Options{NVRAM: l.nvram, WorkingSet: ws}
	first, m := put(o)
	if n := places(first); n[pagemap.Flash] != 0 || n[pagemap.NVRAM] == 0 {
		t.Errorf("first: %v", n)
	}
	if m.Report.Hot < m.Report.PageTables || m.Report.Superseded == 0 {
		t.Errorf("first: %+v", m.Report)
	}
	next, m := put(o)
	if n := places(next); n[pagemap.Flash] != 0 || m.Report.Superseded != 0 {
		t.Errorf("next: %v, %+v", n, m.Report)
	}

	// In an NVRAM file that is too small for the working set they take the room
	// of its coldest pages: at the end of the first save, and from the start of
	// the next.
	for page := int64(5000); page < 5010; page++ {
		ws.SetHeat(0, page, 7)
	}
	l = newLab(t, l.fs.FS, "/small")
	o.NVRAMSize, o.NVRAM = 1<<20, l.nvram
	for i := range 2 {
		ref, m := put(o)
		if n := places(ref); n[pagemap.Flash] != 0 || m.Report.Surplus < 200 || m.Report.Hot != 192 || (m.Report.Superseded == 0) != (i == 1) {
			t.Errorf("small, %d: %v, %+v", i, n, m.Report)
		}
		c, err := l.st.OpenCheckpoint(context.Background(), ref, checkpoint.Options{})
		if err != nil {
			t.Fatal(err)
		}
		for page := uint64(5000); page < 5010; page++ {
			if run, err := c.PageMap.Find(0, page); err != nil || run.Entry(0).Kind() == pagemap.Flash {
				t.Errorf("small, %d: the hottest page %d is in flash, %v", i, page, err)
			}
		}
		c.Close()
		if err := l.remove(ref); i == 0 && err == nil {
			// Its page tables are what the next save knows.
			_, _ = put(save.Options{})
		}
	}
}

// A search that takes too long is given up, and the save is not.
func TestPageTablesTime(t *testing.T) {
	b := recordedLinux(t)
	l := newLab(t, crashfs.New(0), "/")
	_, m, err := l.run(context.Background(), bytes.NewReader(b), save.Options{VM: "vm", TablesTime: 1})
	if err != nil || !strings.Contains(m.Report.NoPageTables, "could be read in 1ns") || m.Report.PageTables > 0 {
		t.Errorf("%v, %+v", err, m.Report)
	}
}

// A stream that does not tell is saved all the same, and the report says why.
func TestPageTablesUnknown(t *testing.T) {
	l := newLab(t, crashfs.New(0), "/")
	s := tiertest.New(tiertest.Options{})
	_, m := l.save(t, s, save.Options{NVRAM: l.nvram, WorkingSet: hotSet(t, s, every(3))})
	if m.PageTables != nil || m.Report.PageTables != 0 || !strings.Contains(m.Report.NoPageTables, "no vCPU") {
		t.Errorf("%+v", m.Report)
	}
}
