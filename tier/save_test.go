package tier_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/stream"
	"github.com/flic-migrate/flic-migrate/stream/returnpath"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/dedup"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/pagemap"
	"github.com/flic-migrate/flic-migrate/tier/progress"
	"github.com/flic-migrate/flic-migrate/tier/restore"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
	"github.com/flic-migrate/flic-migrate/tier/vfs/crashfs"
)

// TestOpaque saves streams with something in them that nobody knows: what
// follows it is given back as it came, and the guest is the same.
func TestOpaque(t *testing.T) {
	two := []tiertest.Block{{Name: "pc.ram", Size: 1 << 20}, {Name: "rom", Size: 8 << 10}}
	for name, o := range map[string]tiertest.Options{
		"record":                {Unknown: tiertest.Record, Blocks: two},
		"section":               {Unknown: tiertest.Section, Blocks: two},
		"section, pages of 64K": {Unknown: tiertest.Section, PageSize: 64 << 10, PageBits: true},
		"record, no footers":    {Unknown: tiertest.Record, NoConfiguration: true},
		"record, no vmdesc":     {Unknown: tiertest.Record, NoDescription: true, Tail: 100 << 10},
		"live, record":          {Unknown: tiertest.Record, UnknownPass: 2, Passes: 4, Resend: 0.3, XBZRLE: true, Blocks: two},
		"live, section":         {Unknown: tiertest.Section, UnknownPass: 2, Passes: 4, Resend: 0.3, XBZRLE: true, Blocks: two},
		"live, no footers":      {Unknown: tiertest.Record, UnknownPass: 2, Passes: 4, Resend: 0.3, NoConfiguration: true, Blocks: two},
		"at the first page":     {Unknown: tiertest.Record, Mix: tiertest.Mix{tiertest.Absent: 1}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for seed := range uint64(6) {
				o.Seed = seed
				s := tiertest.New(o)
				l := newLab(t, crashfs.New(0), "/")
				so := save.Options{Energy: dedup.EnergyFull, Codec: image.LZ4}
				if seed%2 == 1 {
					so.WorkingSet = hotSet(t, s, every(3))
				}
				ref, meta := l.save(t, s, so)
				if meta.OpaqueBytes == 0 {
					t.Error("nothing is said to be opaque")
				}
				for _, err := range l.verify(ref) {
					t.Error(err)
				}
				saved, got := s.Bytes(), l.restored(t, ref)
				if o.Passes < 2 && !bytes.Equal(saved, got) {
					t.Fatalf("seed %d: a stream of one pass came back different", seed)
				}
				sameGuest(t, cut(t, saved, s.UnknownBytes()), cut(t, got, s.UnknownBytes()))
				l.noLeaks(t)
			}
		})
	}
}

// cut removes the one occurrence of what.
func cut(t *testing.T, b, what []byte) []byte {
	t.Helper()
	if bytes.Count(b, what) != 1 {
		t.Fatal("the unknown thing is not there once")
	}
	return bytes.Replace(b, what, nil, 1)
}

// sameGuest loads two streams and compares the guests.
func sameGuest(t *testing.T, a, b []byte) {
	t.Helper()
	ga, err := tiertest.Load(bytes.NewReader(a))
	if err != nil {
		t.Fatalf("the saved stream does not load: %v", err)
	}
	gb, err := tiertest.Load(bytes.NewReader(b))
	if err != nil {
		t.Fatalf("the restored stream does not load: %v", err)
	}
	if err := ga.SamePages(gb); err != nil {
		t.Errorf("saved and restored guest: %v", err)
	}
}

// TestLateRAM has more than a skeleton chunk before the first page, whose size
// is then not known when the image begins.
func TestLateRAM(t *testing.T) {
	for _, o := range []tiertest.Options{
		{BlocksFirst: 3},
		{BlocksFirst: 1, PageSize: 8 << 10, Mix: tiertest.Mix{tiertest.Random: 2, tiertest.Zero: 1}},
		{BlocksFirst: 1, PageSize: 64 << 10, Passes: 2, Resend: 0.5, Mix: tiertest.Mix{tiertest.Random: 1}},
		{BlocksFirst: 1, PageSize: 1 << 10, Mix: tiertest.Mix{tiertest.Text: 1}},
	} {
		t.Run(fmt.Sprint(o.PageSize), func(t *testing.T) {
			s := tiertest.New(o)
			b := s.Bytes()
			if s.PageSize() > 4096 {
				// Data where a page of 4096 bytes would end that looks like a
				// record of a damaged stream.
				page := make([]byte, s.PageSize())
				for p := uint64(0); !s.Page(page, 0, p) || bytes.Count(b, page[:256]) != 1; p++ {
				}
				copy(b[bytes.Index(b, page[:256])+4096:], "\x00\x00\x00\x00\x00\x00\x00\x08\x04ram?")
			}
			l := newLab(t, crashfs.New(0), "/")
			ref, _, err := l.run(context.Background(), bytes.NewReader(b), save.Options{VM: "vm"})
			if err != nil {
				t.Fatal(err)
			}
			for _, err := range l.verify(ref) {
				t.Error(err)
			}
			sameGuest(t, b, l.restored(t, ref))
			l.noLeaks(t)
		})
	}
}

// TestPageSizeLate begins with a lone zero page, which has any size, and a
// command behind which a reader can't look.
func TestPageSizeLate(t *testing.T) {
	var opaque int
	for seed := range uint64(30) {
		s := tiertest.New(tiertest.Options{Seed: seed, PageSize: 8 << 10, ReturnPath: true, PartLen: 1,
			Blocks: []tiertest.Block{{Name: "m", Size: 256 << 10}}, Mix: tiertest.Mix{tiertest.Zero: 3, tiertest.Text: 1}})
		l := newLab(t, crashfs.New(0), "/")
		ref, meta := l.save(t, s, save.Options{ReturnPath: io.Discard})
		if meta.OpaqueBytes > 0 {
			opaque++
		}
		l.holds(t, ref, s)
	}
	if opaque == 0 || opaque == 30 {
		t.Errorf("in %d of 30 streams the page size came late", opaque)
	}
}

// TestDiskBeforeRAM has a disk's data in front of the RAM section.
func TestDiskBeforeRAM(t *testing.T) {
	s := tiertest.New(tiertest.Options{BlocksFirst: 1, BlockMigration: true})
	b := s.Bytes()
	at := s.Layout().RAM
	disk := stream.AppendStart(nil, stream.Section{ID: 99, Name: "block", Version: 1})
	for range 3 {
		disk = append(disk, 0, 0, 0, 0, 0, 0, 2, 1, 2, 'h', 'd')
		disk = append(disk, bytes.Repeat([]byte("disk"), 1<<18)...)
	}
	disk = append(disk, 0, 0, 0, 0, 0, 0, 0, 2)
	disk = stream.AppendFooter(disk, 99)
	b = slices.Insert(b, int(at), disk...)
	l := newLab(t, crashfs.New(0), "/")
	ref, _, err := l.run(context.Background(), bytes.NewReader(b), save.Options{VM: "vm"})
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(l.restored(t, ref), b) {
		t.Error("restored stream differs")
	}
	for _, err := range l.verify(ref) {
		t.Error(err)
	}
}

// TestBudget gives the working set less NVRAM than it wants: the coldest pages
// go to flash, and of equally hot ones those with the higher addresses.
func TestBudget(t *testing.T) {
	s := tiertest.New(tiertest.Options{Mix: tiertest.Mix{tiertest.Text: 1}, Blocks: []tiertest.Block{
		{Name: "a", Size: 1 << 20}, {Name: "b", Size: 1 << 20}}})
	// A file of three extents has room for two of 64 pages each.
	const room = 128
	for name, heat := range map[string]func(int, uint64) uint8{
		"ties":         func(int, uint64) uint8 { return 7 },
		"rising":       func(_ int, p uint64) uint8 { return uint8(p) },
		"two heats":    func(b int, p uint64) uint8 { return uint8(1 + 4*b*int(p%4/3)) },
		"hottest last": func(b int, p uint64) uint8 { return uint8(1 + b) },
	} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t, crashfs.New(0), "/")
			ref, meta := l.save(t, s, save.Options{WorkingSet: hotSet(t, s, heat), NVRAMSize: 3 << 18, Energy: dedup.EnergyFull})
			l.holds(t, ref, s)
			var hot int64
			type place struct {
				block int
				page  uint64
			}
			var want []place
			for h := 255; h > 0; h-- {
				for b := range 2 {
					for p := range s.Pages(b) {
						if int(heat(b, p)) == h {
							hot++
							want = append(want, place{b, p})
						}
					}
				}
			}
			if meta.Report.Hot != room || meta.Report.Surplus != hot-room || meta.Report.NVRAMBytes != room*4096 {
				t.Errorf("%d hot, %d over, want %d and %d", meta.Report.Hot, meta.Report.Surplus, room, hot-room)
			}
			c, err := l.st.OpenCheckpoint(context.Background(), ref, checkpoint.Options{})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			for i, w := range want {
				run, err := c.PageMap.Find(w.block, w.page)
				if err != nil || (run.Kind == pagemap.NVRAM) != (i < room) {
					t.Fatalf("page %v, number %d by heat, is in %v (%v)", w, i, run.Kind, err)
				}
			}
		})
	}
}

// TestSharedNVRAM keeps many checkpoints of several VMs and two stores in one
// NVRAM file, removes some, and sees their space used again.
func TestSharedNVRAM(t *testing.T) {
	fsys := crashfs.New(0)
	a := newLab(t, fsys, "/")
	b := &lab{fs: a.fs, dir: "/other/store", nvram: a.nvram}
	b.open(t)
	stream := func(seed uint64) *tiertest.Stream {
		return tiertest.New(tiertest.Options{Seed: seed, Passes: 2, Resend: 0.2, XBZRLE: true})
	}
	type saved struct {
		l   *lab
		ref store.Ref
		s   *tiertest.Stream
	}
	var all []saved
	put := func(l *lab, vm string, seed uint64) {
		t.Helper()
		s := stream(seed)
		ref, _ := l.save(t, s, save.Options{VM: vm, WorkingSet: hotSet(t, s, every(2)), NVRAMSize: 40 << 18, Parent: save.ParentNone})
		all = append(all, saved{l, ref, s})
	}
	for i := range uint64(3) {
		put(a, "one", 10+i)
		put(b, "one", 20+i)
		put(a, "two", 30+i)
	}
	free, used := a.nvramFree(t), int64(0)
	if size, err := a.fs.Stat(a.nvram); err == nil {
		used = size.Size()
	}
	check := func() {
		t.Helper()
		for _, x := range all {
			x.l.holds(t, x.ref, x.s)
		}
	}
	check()
	// gc of one store must not touch what is the other's, nor what is live.
	for _, l := range []*lab{a, b} {
		if rep, err := l.st.GC(context.Background()); err != nil || rep.NVRAMExtents != 0 || rep.Parts != 0 || len(rep.Warnings) != 0 {
			t.Errorf("gc of a store in order: %+v, %v", rep, err)
		}
	}
	check()
	for _, i := range []int{1, 3, 8} {
		if err := all[i].l.remove(all[i].ref); err != nil {
			t.Fatal(err)
		}
	}
	all = slices.Delete(slices.Delete(slices.Delete(all, 8, 9), 3, 4), 1, 2)
	check()
	if now := a.nvramFree(t); now <= free {
		t.Errorf("%d bytes free, %d before three checkpoints were removed", now, free)
	}
	put(b, "one", 41)
	put(a, "one", 42)
	put(a, "two", 43)
	check()
	if size, err := a.fs.Stat(a.nvram); err != nil || size.Size() != used {
		t.Errorf("the file had %d bytes, now %d: removed space was not used again", used, size.Size())
	}
	// Removed with the other checkpoints gone too, all is free again.
	for _, x := range all {
		if err := x.l.remove(x.ref); err != nil {
			t.Fatal(err)
		}
	}
	if now := a.nvramFree(t); now != 39<<18 {
		t.Errorf("%d bytes free in an empty file of 40 extents", now)
	}
	a.noLeaks(t)
}

// TestDuplicates counts what deduplication finds and what it costs.
func TestDuplicates(t *testing.T) {
	s := tiertest.New(tiertest.Options{Mix: tiertest.Mix{tiertest.Duplicate: 1, tiertest.Text: 1}, Pool: 4,
		Blocks: []tiertest.Block{{Name: "m", Size: 8 << 20}}})
	l := newLab(t, crashfs.New(0), "/")
	ref, meta := l.save(t, s, save.Options{Energy: dedup.EnergyFull, Codec: image.None, SampleSize: 64})
	l.holds(t, ref, s)
	var dup int64
	for p := range s.Pages(0) {
		if s.Kind(0, p) == tiertest.Duplicate {
			dup++
		}
	}
	r := meta.Report
	if r.Duplicate != dup-4 {
		t.Errorf("%d duplicates found, there are %d", r.Duplicate, dup-4)
	}
	// Every duplicate is hashed, the first of each content once more.
	if want := dup * 4096; r.HashedBytes != want {
		t.Errorf("%d bytes hashed, want %d", r.HashedBytes, want)
	}
	if want := int64(s.Pages(0)) * 64; r.SampledBytes != want || r.SampleSize != 64 || r.ChunkSize != 4096 {
		t.Errorf("%d bytes sampled, want %d", r.SampledBytes, want)
	}
	if r.NonZeroBytes != 8<<20 {
		t.Errorf("full hashing would have read %d bytes, want all", r.NonZeroBytes)
	}
	if limit := 8<<20 - r.Duplicate*4096 + 200<<10; r.FlashBytes > limit {
		t.Errorf("the image has %d bytes, more than %d: duplicates were stored", r.FlashBytes, limit)
	}
}

// TestNoStalePage sends pages that are equal, changes one of them in place, and
// then sends its old and its new content as other pages: a duplicate must never
// be a place that has been written again.
func TestNoStalePage(t *testing.T) {
	for _, energy := range []dedup.Energy{dedup.EnergyFull, dedup.EnergyLow} {
		for seed := range uint64(40) {
			s := tiertest.New(tiertest.Options{Seed: seed, Passes: 8, Resend: 0.7, Pool: 2, XBZRLE: seed%2 == 0,
				Blocks: []tiertest.Block{{Name: "m", Size: 128 << 10}},
				Mix:    tiertest.Mix{tiertest.Duplicate: 4, tiertest.Zero: 1, tiertest.Alike: 1}})
			l := newLab(t, crashfs.New(0), "/")
			heat := every(1 + seed%3)
			ref, _ := l.save(t, s, save.Options{WorkingSet: hotSet(t, s, heat), Energy: energy, SegmentPages: 2 + int(seed%5)})
			l.holds(t, ref, s)
			if t.Failed() {
				t.Fatalf("seed %d, energy %s", seed, energy)
			}
		}
	}
}

// TestHotResent: hot pages that come again and again, many of them equal to others
// for a while, never reach flash, and need no more NVRAM than there are of them.
func TestHotResent(t *testing.T) {
	resent := int64(0)
	for seed := range uint64(20) {
		s := tiertest.New(tiertest.Options{Seed: seed, Passes: 8, Resend: 0.7, Pool: 2,
			Blocks: []tiertest.Block{{Name: "m", Size: 256 << 10}},
			Mix:    tiertest.Mix{tiertest.Duplicate: 4, tiertest.Zero: 1, tiertest.Alike: 2}})
		l := newLab(t, crashfs.New(0), "/")
		for _, energy := range []dedup.Energy{dedup.EnergyFull, dedup.EnergyLow} {
			ref, m := l.save(t, s, save.Options{WorkingSet: hotSet(t, s, every(1)), Energy: energy})
			l.holds(t, ref, s)
			if r := m.Report; r.Cold != 0 || r.SupersededFlash != 0 || r.NVRAMBytes > int64(s.Pages(0))*int64(s.PageSize()) {
				t.Errorf("seed %d, energy %s: %d of %d pages on flash, %d written there in vain, %d bytes of NVRAM",
					seed, energy, r.Cold, r.Pages, r.SupersededFlash, r.NVRAMBytes)
			}
			resent += m.Report.Resent
		}
		// Cold ones are written in vain, and that is said.
		ref, m := l.save(t, s, save.Options{Energy: dedup.EnergyFull})
		l.holds(t, ref, s)
		if r := m.Report; r.SupersededFlash == 0 || r.SupersededFlash != r.Superseded || r.SupersededFlash > r.Resent {
			t.Errorf("seed %d, cold: %+v", seed, r)
		}
	}
	if resent < 1000 {
		t.Errorf("%d pages came again, which shows little", resent)
	}
}

// TestReturnPath answers a source that waits: SWITCHOVER_ACK at once, if it knows that,
// PONG with the value of each PING, in order, and SHUT once, last.
func TestReturnPath(t *testing.T) {
	for _, machine := range []string{"pc-q35-8.0", "pc-q35-8.1"} {
		returnPathOf(t, machine, machine == "pc-q35-8.1")
	}
}

func returnPathOf(t *testing.T, machine string, acknowledged bool) {
	s := tiertest.New(tiertest.Options{Machine: machine, ReturnPath: true, PartLen: 10})
	l := newLab(t, crashfs.New(0), "/")
	var answers bytes.Buffer
	l.save(t, s, save.Options{ReturnPath: &answers})
	r := returnpath.NewReader(&answers)
	if acknowledged {
		if m, err := r.Next(); err != nil || m.Type != returnpath.SwitchoverAck {
			t.Errorf("%s: %v, %v", machine, m.Type, err)
		}
	}
	var pongs int
	for {
		m, err := r.Next()
		if err != nil {
			t.Fatalf("after %d PONGs: %v", pongs, err)
		}
		if m.Type == returnpath.Shut {
			if m.Value != 0 {
				t.Errorf("SHUT with %d", m.Value)
			}
			break
		}
		if pongs++; m.Type != returnpath.Pong || pongs == 1 && m.Value != 1 {
			t.Errorf("answer %v", m)
		}
	}
	if _, err := r.Next(); err != io.EOF {
		t.Errorf("something after SHUT: %v", err)
	}
	if pongs < 5 {
		t.Errorf("only %d PONGs", pongs)
	}

	// Without the capability nothing may be written: nobody reads there.
	answers.Reset()
	l.save(t, tiertest.New(tiertest.Options{}), save.Options{ReturnPath: &answers})
	if answers.Len() != 0 {
		t.Errorf("%d bytes to a source without return path", answers.Len())
	}
}

// openPipe is a pipe whose other end stays open after the stream, as that of a
// source with a return path does.
type openPipe struct {
	io.Reader
	ended bool
}

func (p *openPipe) Read(b []byte) (int, error) {
	n, err := p.Reader.Read(b)
	if err == io.EOF {
		if p.ended {
			panic("read of a pipe in which nothing will ever come")
		}
		p.ended = true
		if n == 0 {
			select {} // as the real one would
		}
		err = nil
	}
	return n, err
}

func (p *openPipe) Ready(time.Duration) bool {
	b := p.Reader.(*bytes.Reader)
	return b.Len() > 0
}
func (p *openPipe) Capacity() int         { return 64 << 10 }
func (p *openPipe) SetCapacity(n int) int { return n }

// TestEndWithoutEOF ends a save although the source keeps the pipe open until
// it is answered.
func TestEndWithoutEOF(t *testing.T) {
	for name, o := range map[string]tiertest.Options{
		"description":        {ReturnPath: true},
		"no description":     {ReturnPath: true, NoDescription: true},
		"no devices":         {ReturnPath: true, EmptyTail: true, NoDescription: true},
		"opaque":             {ReturnPath: true, Unknown: tiertest.Record},
		"opaque, no vmdesc":  {ReturnPath: true, Unknown: tiertest.Section, NoDescription: true},
		"background, opaque": {ReturnPath: true, Unknown: tiertest.Section, NoEnd: true, Shuffle: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := tiertest.New(o)
			l := newLab(t, crashfs.New(0), "/")
			b := s.Bytes()
			ref, _, err := l.run(context.Background(), &openPipe{Reader: bytes.NewReader(b)},
				save.Options{VM: "vm", ReturnPath: io.Discard})
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(l.restored(t, ref), b) {
				t.Error("restored stream differs")
			}
		})
	}
}

// meteredPipe is a pipe that knows how far it was read. What is in the pipe, up
// to its capacity, counts as read: the source thinks so.
type meteredPipe struct {
	b        []byte
	off      int
	capacity int
	taken    int // of b, by reader or pipe
}

func (p *meteredPipe) Read(b []byte) (int, error) {
	p.fill()
	n := copy(b, p.b[p.off:p.taken])
	p.off += n
	if n == 0 {
		return 0, io.EOF
	}
	return n, nil
}

// fill is the source, which is faster than we are, but not so fast that it
// writes between a read and the change of the capacity that follows it.
func (p *meteredPipe) fill()                    { p.taken = max(p.taken, min(len(p.b), p.off+p.capacity)) }
func (p *meteredPipe) Ready(time.Duration) bool { return true }
func (p *meteredPipe) Capacity() int            { return p.capacity }
func (p *meteredPipe) SetCapacity(n int) int {
	// The kernel refuses to make a pipe smaller than what is in it.
	if n >= p.taken-p.off {
		p.capacity = n
	}
	return p.capacity
}

// syncWatch calls fn before each sync of a file or mapping.
type syncWatch struct {
	vfs.FS
	fn func()
}

type watchedFile struct {
	vfs.File
	w *syncWatch
}

func (w *syncWatch) NoLinks(dir string) (_ vfs.FS, err error) {
	w.FS, err = w.FS.NoLinks(dir)
	return w, err
}

func (w *syncWatch) Create(name string) (vfs.File, error) {
	f, err := w.FS.Create(name)
	if err != nil {
		return nil, err
	}
	return &watchedFile{f, w}, nil
}

func (f *watchedFile) Sync() error {
	if strings.HasSuffix(f.Name(), ".part") {
		f.w.fn()
	}
	return f.File.Sync()
}

// TestSaveNoMemory: a stream that lists RAM and has none of it, as of QEMU's migration
// modes that hand memory over on one host, is no checkpoint; a single page makes the
// rest absent, as free pages are.
func TestSaveNoMemory(t *testing.T) {
	for name, test := range map[string]struct {
		o    tiertest.Options
		want error
	}{
		"none":             {tiertest.Options{Mix: tiertest.Mix{tiertest.Absent: 1}}, save.ErrNoMemory},
		"no END":           {tiertest.Options{Mix: tiertest.Mix{tiertest.Absent: 1}, NoEnd: true}, save.ErrNoMemory},
		"no devices":       {tiertest.Options{Mix: tiertest.Mix{tiertest.Absent: 1}, EmptyTail: true}, save.ErrNoMemory},
		"partly unplugged": {tiertest.Options{Early: 1, Mix: tiertest.Mix{tiertest.Absent: 1}}, save.ErrNoMemory},
		"some":             {tiertest.Options{Seed: 3, Mix: tiertest.Mix{tiertest.Absent: 50, tiertest.Zero: 1}}, nil},
	} {
		l := newLab(t, crashfs.New(0), "/")
		_, _, err := l.run(context.Background(), bytes.NewReader(tiertest.New(test.o).Bytes()), save.Options{VM: "vm"})
		if !errors.Is(err, test.want) {
			t.Errorf("%s: %v, want %v", name, err, test.want)
		}
		if refs, err := l.st.List(context.Background(), ""); (len(refs) == 0) != (test.want != nil) || err != nil {
			t.Errorf("%s: %v, %v", name, refs, err)
		}
	}
}

// TestHoldBack checks that a source without a return path keeps its device tail
// until the RAM is durable, so that a failure up to then is one of the
// migration: of the tail no more than a few KB may be in the pipe or in the
// process when the first sync begins.
func TestHoldBack(t *testing.T) {
	for name, o := range map[string]tiertest.Options{
		"text":           {Blocks: []tiertest.Block{{Name: "m", Size: 4 << 20}}},
		"zero":           {Mix: tiertest.Mix{tiertest.Zero: 1}, Blocks: []tiertest.Block{{Name: "m", Size: 64 << 20}}},
		"small":          {Blocks: []tiertest.Block{{Name: "m", Size: 64 << 10}}},
		"live":           {Passes: 3, Resend: 0.3, XBZRLE: true},
		"shuffled":       {Shuffle: true, NoEnd: true},
		"inferred pages": {PageSize: 16 << 10},
		"virtio-mem":     {Early: 1, Blocks: []tiertest.Block{{Name: "vm0", Size: 32 << 20, Shared: true}, {Name: "m", Size: 4 << 20}}},
		"of QEMU 7":      {Blocks: []tiertest.Block{{Name: "0000:00:01.0/vm0", Size: 32 << 20, Shared: true}, {Name: "m", Size: 4 << 20}}},
		"free pages":     {Mix: tiertest.Mix{tiertest.Absent: 9, tiertest.Text: 1}, Blocks: []tiertest.Block{{Name: "m", Size: 64 << 20}, {Name: "bios", Size: 64 << 10}}},
		"early device":   {Early: 2, EarlyBehind: true, Blocks: []tiertest.Block{{Name: "vm0", Size: 32 << 20, Shared: true}, {Name: "m", Size: 4 << 20}}},
	} {
		t.Run(name, func(t *testing.T) {
			o.Tail = 300 << 10
			s := tiertest.New(o)
			layout := s.Layout()
			p := &meteredPipe{b: s.Bytes(), capacity: 64 << 10}
			synced := -1
			fsys := &syncWatch{FS: crashfs.New(0), fn: func() {
				if synced < 0 {
					p.fill()
					synced = p.taken
				}
			}}
			l := newLab(t, fsys, "/")
			ref, _, err := l.run(context.Background(), p, save.Options{VM: "vm"})
			if err != nil {
				t.Fatal(err)
			}
			l.holds(t, ref, s)
			// Only a guest smaller than the pipe that the source made is taken
			// further: emptying it is how it can be made smaller at all.
			limit := 5 << 10
			if name == "small" {
				limit = 32 << 10
			}
			if over := synced - int(layout.Tail); synced < 0 || over > limit {
				t.Errorf("at the first sync %d bytes of the device tail had been taken", over)
			}
		})
	}
}

// TestSyncs counts how often an image is made durable: once for the RAM of a source whose
// device tail is held back until then, and once in the end. One that waits for an answer, and
// one that is held, waits for the end alone.
func TestSyncs(t *testing.T) {
	for name, c := range map[string]struct {
		o    tiertest.Options
		want int
	}{
		"no return path": {tiertest.Options{Blocks: []tiertest.Block{{Name: "m", Size: 4 << 20}}}, 2},
		"return path":    {tiertest.Options{Blocks: []tiertest.Block{{Name: "m", Size: 4 << 20}}, ReturnPath: true}, 1},
		"held":           {tiertest.Options{Blocks: []tiertest.Block{{Name: "m", Size: 64 << 20}}, Mix: tiertest.Mix{tiertest.Zero: 60, tiertest.Text: 1}}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			s := tiertest.New(c.o)
			synced := 0
			l := newLab(t, &syncWatch{FS: crashfs.New(0), fn: func() { synced++ }}, "/")
			o := save.Options{VM: "vm", ReturnPath: io.Discard}
			if name == "held" {
				o.Hold = &save.Hold{Wait: func(context.Context) (string, error) {
					synced = 0 // what came before the guest stands still
					return "running", nil
				}}
			}
			ref, _, err := l.run(t.Context(), s.Reader(), o)
			if err != nil {
				t.Fatal(err)
			}
			if synced != c.want {
				t.Errorf("it was synced %d times, want %d", synced, c.want)
			}
			l.holds(t, ref, s)
		})
	}
}

// TestCancel cancels a save in the middle: nothing stays, and a source that
// waits is told.
func TestCancel(t *testing.T) {
	s := tiertest.New(tiertest.Options{ReturnPath: true, Blocks: []tiertest.Block{{Name: "m", Size: 64 << 20}}})
	l := newLab(t, crashfs.New(0), "/")
	r := s.Reader()
	defer r.Close()
	ctx, cancel := context.WithCancelCause(context.Background())
	why := errors.New("operator's wish")
	var answers bytes.Buffer
	half := &atOffset{r: r, left: s.Layout().Len / 2, fn: func() { cancel(why) }}
	_, _, err := l.run(ctx, half, save.Options{VM: "vm", ReturnPath: &answers,
		WorkingSet: hotSet(t, s, every(2)), NVRAM: l.nvram})
	if !errors.Is(err, why) {
		t.Fatalf("save: %v", err)
	}
	if left := s.Layout().Len - half.read; left < s.Layout().Len/4 {
		t.Errorf("the save went on after it was cancelled: %d bytes were left", left)
	}
	if !bytes.HasSuffix(answers.Bytes(), returnpath.AppendShut(nil, 1)) {
		t.Error("no SHUT with value 1")
	}
	nothingLeft(t, l)
}

// atOffset calls fn once after a number of bytes.
type atOffset struct {
	r    io.Reader
	left int64
	read int64
	fn   func()
}

func (a *atOffset) Read(b []byte) (int, error) {
	n, err := a.r.Read(b)
	a.read += int64(n)
	if a.fn != nil && a.read >= a.left {
		a.fn()
		a.fn = nil
	}
	return n, err
}

// nothingLeft fails if a failed save left anything: a checkpoint, a file, NVRAM.
func nothingLeft(t *testing.T, l *lab) {
	t.Helper()
	if refs, err := l.st.List(context.Background(), ""); err != nil || len(refs) != 0 {
		t.Errorf("checkpoints %v, %v", refs, err)
	}
	for _, name := range l.tree(t) {
		if name != "lock" && name != "store.json" && !strings.HasPrefix(name, "share/default/") && !strings.HasPrefix(name, "nvram/") {
			t.Errorf("left behind: %s", name)
		}
	}
	before := l.nvramFree(t)
	if rep, err := l.st.GC(context.Background()); err != nil || rep.NVRAMExtents != 0 || rep.Parts != 0 || len(rep.Warnings) > 0 {
		t.Errorf("gc found %+v, %v", rep, err)
	}
	if now := l.nvramFree(t); now != before {
		t.Errorf("NVRAM: %d bytes free, after gc %d", before, now)
	}
	l.noLeaks(t)
}

// TestRelativeNVRAM saves with a relative path, as QEMU's exec: child may, and
// restores from another directory.
func TestRelativeNVRAM(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	l := newLab(t, vfs.OS, dir)
	s := tiertest.New(tiertest.Options{})
	ref, _ := l.save(t, s, save.Options{NVRAM: "nvram.img", WorkingSet: hotSet(t, s, every(2)), VolatileNVRAM: true})
	t.Chdir(t.TempDir())
	l.holds(t, ref, s)
}

// TestVolatile refuses NVRAM that power-off empties unless the user says so.
func TestVolatile(t *testing.T) {
	fsys := crashfs.New(0)
	fsys.SetVolatile(true)
	l := newLab(t, fsys, "/")
	s := tiertest.New(tiertest.Options{})
	if _, _, err := l.trySave(s, save.Options{WorkingSet: hotSet(t, s, every(2))}); !errors.Is(err, store.ErrVolatile) {
		t.Fatalf("save to volatile NVRAM: %v", err)
	}
	if _, err := fsys.Stat(l.nvram); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the file was refused, and has been made: %v", err)
	}
	nothingLeft(t, l)
	ref, meta := l.save(t, s, save.Options{WorkingSet: hotSet(t, s, every(2)), VolatileNVRAM: true})
	if meta.NVRAM == nil || !meta.NVRAM.Volatile {
		t.Error("META does not say that the NVRAM is volatile")
	}
	l.holds(t, ref, s)
}

// TestNoSpaceForeseen fails at once when not half of what the last checkpoint
// took is free, unless what has not changed since need not be stored.
func TestNoSpaceForeseen(t *testing.T) {
	fsys := crashfs.New(6 << 20)
	l := newLab(t, fsys, "/")
	s := tiertest.New(tiertest.Options{Blocks: []tiertest.Block{{Name: "m", Size: 8 << 20}},
		Mix: tiertest.Mix{tiertest.Random: 1, tiertest.Zero: 1}})
	l.save(t, s, save.Options{Codec: image.LZ4})
	r := s.Reader()
	defer r.Close()
	counted := &atOffset{r: r}
	_, _, err := l.run(context.Background(), counted, save.Options{VM: "vm", Parent: save.ParentNone})
	var space *save.SpaceError
	if !errors.As(err, &space) {
		t.Fatalf("save without space: %v", err)
	}
	if counted.read > 1<<20 {
		t.Errorf("%d bytes were read before it was noticed", counted.read)
	}
	l.noLeaks(t)
	if _, meta := l.save(t, s, save.Options{}); meta.Report.Unchanged == 0 {
		t.Errorf("an increment: %+v", meta.Report)
	}
}

// TestProgress is told about every phase, and never runs backwards.
func TestProgress(t *testing.T) {
	s := tiertest.New(tiertest.Options{Blocks: []tiertest.Block{{Name: "m", Size: 16 << 20}}})
	l := newLab(t, vfs.OS, t.TempDir())
	var phases []string
	var last progress.State
	ref, _ := l.save(t, s, save.Options{Progress: func(p progress.State) {
		if len(phases) == 0 || phases[len(phases)-1] != p.Phase {
			phases = append(phases, p.Phase)
		}
		if p.Pages < last.Pages || p.BytesIn < last.BytesIn || p.BytesOut < last.BytesOut || p.Pages > p.PagesAll && p.PagesAll > 0 {
			t.Errorf("%+v after %+v", p, last)
		}
		last = p
	}})
	if got := strings.Join(phases, " "); got != "ram sync tail commit" {
		t.Errorf("phases: %s", got)
	}
	if last.Pages != 4096 || last.PagesAll != 4096 {
		t.Errorf("at the end: %+v", last)
	}
	c, err := l.st.OpenCheckpoint(context.Background(), ref, checkpoint.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var calls int
	rep, err := restore.Run(context.Background(), c.Checkpoint, io.Discard, restore.Options{Workers: 1, Progress: func(p progress.State) {
		if calls++; p.Phase != "restore" || p.PagesAll != 4096 {
			t.Errorf("%+v", p)
		}
	}})
	if err != nil || calls == 0 || rep.Pages != 4096 || rep.BytesOut != s.Layout().Len {
		t.Errorf("restore: %+v, %v, %d calls", rep, err, calls)
	}
}

// TestRestoreStops ends a restore whose reader goes away, and one that is
// cancelled.
func TestRestoreStops(t *testing.T) {
	s := tiertest.New(tiertest.Options{Blocks: []tiertest.Block{{Name: "m", Size: 64 << 20}}, Mix: tiertest.Mix{tiertest.Sparse: 1}})
	l := newLab(t, vfs.OS, t.TempDir())
	ref, _ := l.save(t, s, save.Options{Codec: image.LZ4})
	c, err := l.st.OpenCheckpoint(context.Background(), ref, checkpoint.Options{})
	if err != nil {
		t.Fatal(err)
	}
	gone := errors.New("reader is gone")
	w := &failingWriter{left: 20 << 20, err: gone}
	if _, err := restore.Run(context.Background(), c.Checkpoint, w, restore.Options{}); !errors.Is(err, gone) {
		t.Errorf("restore to a writer that fails: %v", err)
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	w = &failingWriter{left: 20 << 20, fn: func() { cancel(gone) }}
	if _, err := restore.Run(ctx, c.Checkpoint, w, restore.Options{}); !errors.Is(err, gone) {
		t.Errorf("restore that was cancelled: %v", err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	l.noLeaks(t)
}

// failingWriter takes so many bytes and then fails or calls fn.
type failingWriter struct {
	left int
	err  error
	fn   func()
}

func (w *failingWriter) Write(b []byte) (int, error) {
	if w.left -= len(b); w.left < 0 {
		if w.fn != nil {
			w.fn()
		}
		return 0, w.err
	}
	return len(b), nil
}

// TestRefetch restores a checkpoint whose duplicates lie far apart: their
// segments have left the cache by then and are decompressed again.
func TestRefetch(t *testing.T) {
	s := tiertest.New(tiertest.Options{Blocks: []tiertest.Block{{Name: "m", Size: 128 << 20}}, Pool: 200, Shuffle: true,
		Mix: tiertest.Mix{tiertest.Duplicate: 1, tiertest.Sparse: 3}})
	l := newLab(t, vfs.OS, t.TempDir())
	ref, _ := l.save(t, s, save.Options{Codec: image.LZ4, SegmentPages: 64})
	for _, workers := range []int{1, 2, 7} {
		c, err := l.st.OpenCheckpoint(context.Background(), ref, checkpoint.Options{})
		if err != nil {
			t.Fatal(err)
		}
		r := s.Expected()
		cmp := &tiertest.Compare{R: r}
		rep, err := restore.Run(context.Background(), c.Checkpoint, cmp, restore.Options{Workers: workers})
		if err != nil || rep.Refetch == 0 {
			t.Errorf("%d workers: %+v, %v", workers, rep, err)
		} else if err := cmp.Close(); err != nil {
			t.Error(err)
		}
		r.Close()
		c.Close()
	}
}

// TestSecrets checks that nobody but the owner can read a stored guest.
func TestSecrets(t *testing.T) {
	dir := t.TempDir()
	l := newLab(t, vfs.OS, dir)
	s := tiertest.New(tiertest.Options{})
	ref, _ := l.save(t, s, save.Options{WorkingSet: hotSet(t, s, every(2)), VolatileNVRAM: true})
	if err := l.remove(ref); err != nil {
		t.Fatal(err)
	}
	l.save(t, s, save.Options{WorkingSet: hotSet(t, s, every(2)), VolatileNVRAM: true})
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		want := os.FileMode(0o600)
		if d.IsDir() {
			want = 0o700
		}
		if fi.Mode().Perm() != want {
			t.Errorf("%s has mode %v", path, fi.Mode())
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestUnknownAmidForeign breaks off understanding in the middle of a foreign
// section, where nothing can be put before what is kept verbatim. The save then
// keeps the guest exact or fails; it never moves pages to another block.
func TestUnknownAmidForeign(t *testing.T) {
	bits := bytes.Repeat([]byte{0x7e, 0x02}, 12)
	known, unknown := append(bits[:24:24], 0x01), append(bits[:24:24], 0x80)
	var saved, refused int
	for seed := range uint64(12) {
		s := tiertest.New(tiertest.Options{Seed: seed, Passes: 3, Resend: 0.2, DirtyBitmap: true, PartLen: 25,
			Blocks: []tiertest.Block{{Name: "pc.ram", Size: 512 << 10}, {Name: "rom", Size: 32 << 10}}})
		b := s.Bytes()
		at := bytes.LastIndex(b, known)
		broken := slices.Concat(b[:at], unknown, b[at+len(known):])
		l := newLab(t, crashfs.New(0), "/")
		ref, meta, err := l.run(context.Background(), bytes.NewReader(broken), save.Options{VM: "vm"})
		if err != nil {
			if refused++; !errors.Is(err, stream.ErrUnknown) {
				t.Error(err)
			}
			nothingLeft(t, l)
			continue
		}
		if saved++; meta.OpaqueBytes == 0 {
			t.Error("nothing is said to be opaque")
		}
		sameGuest(t, b, bytes.Replace(l.restored(t, ref), unknown, known, 1))
	}
	if saved == 0 || refused == 0 {
		t.Errorf("%d saved, %d refused: the test does not see both", saved, refused)
	}
}
