package tier_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/digest"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/pagemap"
	"github.com/flic-migrate/flic-migrate/tier/restore"
	"github.com/flic-migrate/flic-migrate/tier/source"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/tiertest/chain"
	"github.com/flic-migrate/flic-migrate/tier/vfs/crashfs"
)

// generations are the streams of a guest that goes on running: each has some pages more
// that have changed, many of them a little. The first one's are deflated in part.
func generations(seed uint64, n int, blocks []tiertest.Block) (list []tiertest.Options) {
	for i := range n {
		o := tiertest.Options{Seed: seed, Blocks: blocks, Passes: i + 1, Resend: 0.3, Fill: true}
		if i == 0 {
			o.Compress = 0.3
		}
		list = append(list, o)
	}
	return list
}

var chainBlocks = []tiertest.Block{{Name: "pc.ram", Size: 1 << 20}, {Name: "rom", Size: 40 << 10}}

// chained makes a chain of three generations, with everything in it.
func chained(t testing.TB, seed uint64) (*lab, []chain.Checkpoint) {
	t.Helper()
	l := newLab(t, crashfs.New(0), "/")
	list := chain.Build(t, l.st, chain.Options{Seed: seed, Streams: generations(seed, 3, chainBlocks), Codec: image.LZ4,
		NVRAM: l.nvram, Deltas: 0.9, Scattered: 0.1, Disk: filepath.Join(t.TempDir(), "disk")})
	return l, list
}

// TestReferences restores checkpoints whose pages are in everything that there is, and
// looks that they really are.
func TestReferences(t *testing.T) {
	for seed := range uint64(4) {
		l, list := chained(t, seed)
		for _, c := range list {
			l.holds(t, c.Ref, c.Stream)
		}
		last := list[len(list)-1]
		for k := pagemap.Absent; k <= pagemap.ForeignDelta; k++ {
			if k != pagemap.Absent && last.Kinds[k] == 0 {
				t.Errorf("seed %d: no page is %v: %v", seed, k, last.Kinds)
			}
		}
		if len(last.Needs) != 2 {
			t.Errorf("the last generation refers to %v", last.Needs)
		}
		l.noLeaks(t)
	}
}

// TestReads counts the places that the pages of a chain are in, and what a restore says
// that it has read.
func TestReads(t *testing.T) {
	l, list := chained(t, 2)
	for i, want := range list {
		got, err := l.st.Reads(t.Context(), want.Ref)
		if err != nil {
			t.Fatal(err)
		}
		c, err := l.st.OpenCheckpoint(t.Context(), want.Ref, checkpoint.Options{})
		if err != nil {
			t.Fatal(err)
		}
		needs := map[source.Need]bool{}
		pages := int64(0)
		set := c.Sources()
		var room [source.MaxNeeds]source.Need
		for block := range c.PageMap.Blocks() {
			for page := range c.PageMap.Pages(block) {
				r, err := c.PageMap.Find(block, page)
				if err != nil {
					t.Fatal(err)
				}
				list, _ := set.Stretch(r, room[:])
				for _, n := range list {
					needs[n] = true
				}
				switch r.Kind {
				case pagemap.Absent, pagemap.Fill, pagemap.ZeroData:
				default:
					pages++
				}
			}
		}
		if got.Reads != source.NewReads(int64(len(needs)), pages, 4096) || got.PerMB < 1 {
			t.Errorf("generation %d: %+v, and it needs %d segments for %d pages", i, got, len(needs), pages)
		}
		rep, err := restore.Run(t.Context(), c.Checkpoint, io.Discard, restore.Options{})
		if err != nil || rep.Reads == nil || *rep.Reads != got.Reads {
			t.Errorf("generation %d: a restore says %+v, %v, and the plan %+v", i, rep.Reads, err, got)
		}
		c.Close()
	}
	if r := source.NewReads(0, 0, 4096); r.PerMB != 0 {
		t.Errorf("nothing at all: %+v", r)
	}
	l.noLeaks(t)
}

// TestCopyReferences copies checkpoints that refer to others: the copies are whole by
// themselves, and of others' bytes each different one is there once.
func TestCopyReferences(t *testing.T) {
	for seed := range uint64(2) {
		l, list := chained(t, seed)
		want := map[store.Ref]chain.Checkpoint{}
		for _, c := range list {
			to, meta, err := l.copy(c.Ref, image.MinLZ)
			if err != nil {
				t.Fatal(err)
			}
			if r := meta.Report; len(meta.References) > 0 || meta.NVRAM != nil || r.Unchanged+r.Delta+r.Hot > 0 || len(meta.Bases) > 0 || meta.Digests == nil {
				t.Errorf("the copy of %v says %+v", c.Ref, meta)
			}
			want[to] = c
		}
		for _, c := range list {
			if err := l.remove(c.Ref); err != nil {
				t.Fatal(err)
			}
		}
		if err := l.fs.Remove(l.nvram); err != nil {
			t.Fatal(err)
		}
		if rep, err := l.st.GC(t.Context()); err != nil {
			t.Errorf("%+v, %v", rep, err)
		}
		for to, c := range want {
			l.holds(t, to, c.Stream)
			ck, err := l.st.OpenCheckpoint(t.Context(), to, checkpoint.Options{})
			if err != nil {
				t.Fatal(err)
			}
			// No page twice, but for what deduplication has missed.
			if pages, slots := ck.Meta.Report.Cold, int64(ck.Image.Segments()*ck.Image.SegmentPages); slots > pages+2*int64(ck.Image.SegmentPages)+int64(c.Kinds[pagemap.Delta]) {
				t.Errorf("%d slots for %d pages", slots, pages)
			}
			ck.Close()
		}
		l.noLeaks(t)
	}
}

// TestReferenceRemoved: what others refer to stays readable for them when it is removed.
func TestReferenceRemoved(t *testing.T) {
	l, list := chained(t, 1)
	last := list[len(list)-1]
	for _, c := range list[:len(list)-1] {
		rm, err := l.st.Remove(t.Context(), c.Ref)
		if err != nil || len(rm.Kept) == 0 {
			t.Fatalf("%+v, %v", rm, err)
		}
		if _, err := l.st.GC(t.Context()); err != nil {
			t.Fatal(err)
		}
		l.holds(t, last.Ref, last.Stream)
		if _, err := l.st.OpenCheckpoint(t.Context(), c.Ref, checkpoint.Options{}); !errors.Is(err, store.ErrNotFound) {
			t.Errorf("%v is there: %v", c.Ref, err)
		}
	}
	// While it is open, nothing of it goes away.
	c, err := l.st.OpenCheckpoint(t.Context(), last.Ref, checkpoint.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := l.st.Remove(t.Context(), last.Ref); !errors.Is(err, store.ErrInUse) {
		t.Errorf("remove of what is open: %v", err)
	}
}

// TestReferenceMissing refuses a checkpoint before anything is restored if one that it
// refers to is not what it was, and names both.
func TestReferenceMissing(t *testing.T) {
	for name, c := range map[string]struct {
		change func(t *testing.T, l *lab, list []chain.Checkpoint)
		says   string
	}{
		"gone": {func(t *testing.T, l *lab, list []chain.Checkpoint) {
			if err := l.fs.Remove(l.dir + "/vms/vm/00000001.flic"); err != nil {
				t.Fatal(err)
			}
		}, "not found"},
		"emptied": {func(t *testing.T, l *lab, list []chain.Checkpoint) {
			l.rewrite(t, "/vms/vm/00000001.flic", "/vms/vm/00000001.gone", func([]byte) []byte { return nil })
		}, "not found"},
		"cut": {func(t *testing.T, l *lab, list []chain.Checkpoint) {
			l.rewrite(t, "/vms/vm/00000001.flic", "", func(b []byte) []byte { return b[:len(b)-1] })
		}, "00000001.flic: offset"},
		"another in its place": {func(t *testing.T, l *lab, list []chain.Checkpoint) {
			if err := l.fs.Replace(l.dir+"/vms/vm/00000002.flic", l.dir+"/vms/vm/00000001.flic"); err != nil {
				t.Fatal(err)
			}
		}, "not found"},
		"NVRAM gone": {func(t *testing.T, l *lab, list []chain.Checkpoint) {
			if err := l.fs.Remove(l.nvram); err != nil {
				t.Fatal(err)
			}
		}, "nvram.img"},
	} {
		t.Run(name, func(t *testing.T) {
			l, list := chained(t, 3)
			c.change(t, l, list)
			last := list[len(list)-1]
			var b bytes.Buffer
			err := l.restore(last.Ref, &b)
			if err == nil || b.Len() > 0 || !strings.Contains(err.Error(), c.says) {
				t.Fatalf("%d bytes, %v", b.Len(), err)
			}
			if name != "NVRAM gone" {
				if !integrity.IsCorrupt(err) {
					t.Errorf("it is no damage: %v", err)
				}
				for _, says := range []string{"checkpoint vm@3: it needs pages of checkpoint vm@1", list[0].UUID.String()} {
					if !strings.Contains(err.Error(), says) {
						t.Errorf("%v does not say %q", err, says)
					}
				}
			}
			if found := l.verify(last.Ref); len(found) != 1 {
				t.Errorf("verify: %v", found)
			}
			l.noLeaks(t)
		})
	}
	t.Run("moved", func(t *testing.T) {
		// It is looked for by its UUID, wherever it is.
		l, list := chained(t, 3)
		b := l.file(t, "/vms/vm/00000001.flic")
		if err := l.fs.Remove(l.dir + "/vms/vm/00000001.flic"); err != nil {
			t.Fatal(err)
		}
		l.write(t, "/vms/vm/00000009.gone", b)
		l.holds(t, list[2].Ref, list[2].Stream)
	})
	t.Run("outside of a store", func(t *testing.T) {
		l, _ := chained(t, 3)
		f, err := l.fs.Open(l.dir + "/vms/vm/00000003.flic")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := checkpoint.Open(t.Context(), l.fs, f, checkpoint.Options{}); !errors.Is(err, checkpoint.ErrAlone) || !strings.Contains(err.Error(), "vm@1") && !strings.Contains(err.Error(), "vm@2") {
			t.Errorf("%v", err)
		}
		if f, err = l.fs.Open(l.dir + "/vms/vm/00000001.flic"); err != nil {
			t.Fatal(err)
		}
		c, err := checkpoint.Open(t.Context(), l.fs, f, checkpoint.Options{})
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
		l.noLeaks(t)
	})
}

// file is the content of a file of the store.
func (l *lab) file(t testing.TB, name string) []byte {
	t.Helper()
	f, err := l.fs.Open(l.dir + name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	n, err := f.Size()
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, n)
	if _, err := f.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

// write makes or replaces a file of the store.
func (l *lab) write(t testing.TB, name string, b []byte) {
	t.Helper()
	f, err := l.fs.Create(l.dir + "/tmp/new")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(b, 0); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if err := l.fs.Replace(l.dir+"/tmp/new", l.dir+name); err != nil {
		t.Fatal(err)
	}
}

// rewrite changes a file of the store, and gives it another name if to is not empty.
func (l *lab) rewrite(t testing.TB, name, to string, change func([]byte) []byte) {
	t.Helper()
	b := change(l.file(t, name))
	if to == "" {
		to = name
	}
	if err := l.fs.Remove(l.dir + name); err != nil {
		t.Fatal(err)
	}
	l.write(t, to, b)
}

// TestReferenceDamage flips a bit in every frame of every image of a chain, and in every
// NVRAM slot, and looks at the last generation: each page is what it was or the restore
// is refused with the file and the place, and verify has found what a restore finds. What
// the last generation needs of the others is found, and what it does not need does it no
// harm.
func TestReferenceDamage(t *testing.T) {
	l := newLab(t, crashfs.New(0), "/")
	blocks := []tiertest.Block{{Name: "pc.ram", Size: 160 << 10}}
	list := chain.Build(t, l.st, chain.Options{Seed: 5, Streams: generations(5, 3, blocks), Codec: image.None, NVRAM: l.nvram, Deltas: 0.9, Scattered: 0.2})
	last := list[len(list)-1]
	l.holds(t, last.Ref, last.Stream)
	want := l.restored(t, last.Ref)
	c, err := l.st.OpenCheckpoint(t.Context(), last.Ref, checkpoint.Options{})
	if err != nil {
		t.Fatal(err)
	}
	refs, err := checkpoint.ReferencesOf(c.Image)
	if err != nil || len(refs) != 2 {
		t.Fatalf("%d references, %v", len(refs), err)
	}
	c.Close()
	// damage flips a bit of a file, which must be found, must not, or may be.
	damage := func(path string, off int64, must, mustNot bool, what string) {
		t.Helper()
		f, err := l.fs.OpenRW(path)
		if err != nil {
			t.Fatal(err)
		}
		flip := func() {
			var b [1]byte
			if _, err := f.ReadAt(b[:], off); err != nil {
				t.Fatal(err)
			}
			b[0] ^= 4
			if _, err := f.WriteAt(b[:], off); err != nil {
				t.Fatal(err)
			}
		}
		flip()
		found := l.verify(last.Ref)
		var b bytes.Buffer
		failed := l.restore(last.Ref, &b)
		switch {
		case failed == nil && !bytes.Equal(b.Bytes(), want):
			t.Errorf("%s: the restore gives something else", what)
		case failed != nil && len(found) == 0:
			t.Errorf("%s: verify finds nothing, and a restore is refused: %v", what, failed)
		case must && len(found) == 0:
			t.Errorf("%s: verify finds nothing", what)
		case mustNot && len(found) > 0:
			t.Errorf("%s: verify finds %v", what, found)
		}
		for _, err := range append(found, failed) {
			var damage *integrity.CorruptError
			if err != nil && (!errors.As(err, &damage) || damage.File != path || damage.Offset > off) {
				t.Errorf("%s, offset %d: %v", what, off, err)
			}
		}
		flip()
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
	for i, c := range list {
		var needs source.Ranges
		for _, r := range refs {
			if r.UUID == c.UUID {
				needs = r.NeedSegments
			}
		}
		path := fmt.Sprintf("%s/vms/vm/%08d.flic", l.dir, c.Ref.N)
		f, err := l.fs.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		im, err := image.Open(f)
		if err != nil {
			t.Fatal(err)
		}
		own := i == len(list)-1
		var frames int
		if err := im.Frames(func(k image.Kind, n uint32, off int64) error {
			frames++
			needed := k.IsSegment() && needs.Has(uint64(n), uint64(n))
			// The table of DIGESTS is read, and its chunks as far as they are needed; of
			// a chain so small that is all. NVRAM frames are read where slots are needed.
			mayRead := k == image.Digests || k == image.NVRAM
			for _, at := range []int64{off + 5, off + image.FrameHeaderLen} {
				damage(path, at, own || needed, !own && !needed && !mayRead, fmt.Sprintf("generation %d, %v %d", i, k, n))
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		for _, at := range []int64{9, 70, im.Len() - 70, im.Len() - 200} {
			damage(path, at, true, false, fmt.Sprintf("generation %d, an end", i))
		}
		f.Close()
		if frames < 10 {
			t.Errorf("generation %d has %d frames", i, frames)
		}
	}
	// In NVRAM, every page of every owner.
	f, err := l.fs.Open(l.nvram)
	if err != nil {
		t.Fatal(err)
	}
	size, err := f.Size()
	f.Close()
	if err != nil {
		t.Fatal(err)
	}
	pages := 0
	for off := int64(0); off < size; off += 4096 {
		at := off + 4000
		if l.byteAt(t, l.nvram, at) == 0 {
			continue // nobody's, or a page's zeros; there are enough others
		}
		damage(l.nvram, at, false, false, "NVRAM")
		flipped := l.flipped(t, l.nvram, at, func() []error { return l.verify(last.Ref) })
		for _, err := range flipped {
			if err != nil && !strings.Contains(err.Error(), "page pc.ram:0x") {
				t.Errorf("damage in NVRAM names no page: %v", err)
			}
		}
		pages++
	}
	if pages < 5 {
		t.Errorf("only %d pages in NVRAM", pages)
	}
	l.noLeaks(t)
}

// flipped does something while a byte of a file is another.
func (l *lab) flipped(t *testing.T, path string, off int64, fn func() []error) []error {
	t.Helper()
	f, err := l.fs.OpenRW(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	was := []byte{l.byteAt(t, path, off)}
	if _, err := f.WriteAt([]byte{^was[0]}, off); err != nil {
		t.Fatal(err)
	}
	defer f.WriteAt(was, off)
	return fn()
}

func (l *lab) byteAt(t *testing.T, path string, off int64) byte {
	t.Helper()
	f, err := l.fs.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var b [1]byte
	f.ReadAt(b[:], off)
	return b[0]
}

// TestReferenceForged changes what a checkpoint needs of another, and puts all checksums
// right: whatever the file says of itself, it is not what was referred to.
func TestReferenceForged(t *testing.T) {
	l := newLab(t, crashfs.New(0), "/")
	blocks := []tiertest.Block{{Name: "pc.ram", Size: 160 << 10}}
	list := chain.Build(t, l.st, chain.Options{Seed: 6, Streams: generations(6, 3, blocks), Codec: image.None, Deltas: 0.9, Scattered: 0.2})
	last := list[len(list)-1]
	c, err := l.st.OpenCheckpoint(t.Context(), last.Ref, checkpoint.Options{})
	if err != nil {
		t.Fatal(err)
	}
	refs, err := checkpoint.ReferencesOf(c.Image)
	c.Close()
	if err != nil || len(refs) != 2 {
		t.Fatalf("%d references, %v", len(refs), err)
	}
	for _, r := range refs {
		name := fmt.Sprintf("/vms/vm/%08d.flic", r.Number)
		was := l.file(t, name)
		f, err := l.fs.Open(l.dir + name)
		if err != nil {
			t.Fatal(err)
		}
		im, err := image.Open(f)
		if err != nil {
			t.Fatal(err)
		}
		digests := 0
		if err := im.Frames(func(k image.Kind, n uint32, off int64) error {
			needed := k.IsSegment() && r.NeedSegments.Has(uint64(n), uint64(n))
			if !needed && k != image.Digests {
				return nil
			}
			b := bytes.Clone(was)
			// Behind counts and lengths, something of every page.
			end := off + image.FrameHeaderLen + int64(binary.LittleEndian.Uint32(b[off+8:]))
			for i := off + image.FrameHeaderLen + 30; i < end; i += 7 {
				b[i] ^= 0x81
			}
			tiertest.Reseal(b)
			l.write(t, name, b)
			what := fmt.Sprintf("vm@%d, %v %d", r.Number, k, n)
			found := l.verify(last.Ref)
			failed := l.restore(last.Ref, io.Discard)
			if len(found) == 0 || failed == nil {
				t.Errorf("%s: verify %v, restore %v", what, found, failed)
			}
			for _, err := range append(found, failed) {
				if err != nil && (!integrity.IsCorrupt(err) || !strings.Contains(err.Error(), name)) {
					t.Errorf("%s: %v", what, err)
				}
				if errors.Is(err, digest.ErrMismatch) {
					digests++
				}
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		f.Close()
		if digests < 5 {
			t.Errorf("of vm@%d only %d digests were wrong", r.Number, digests)
		}
		l.write(t, name, was)
	}
	l.holds(t, last.Ref, last.Stream)
	// An image that says that it is the one, and is another's.
	o := newLab(t, crashfs.New(0), "/")
	other := chain.Build(t, o.st, chain.Options{Seed: 6, Streams: generations(6, 1, blocks), Codec: image.None})
	b := o.file(t, "/vms/vm/00000001.flic")
	b = bytes.ReplaceAll(b, other[0].UUID[:], list[0].UUID[:])
	b = bytes.ReplaceAll(b, []byte(other[0].UUID.String()), []byte(list[0].UUID.String()))
	tiertest.Reseal(b)
	l.write(t, "/vms/vm/00000001.flic", b)
	var out bytes.Buffer
	if err := l.restore(last.Ref, &out); !integrity.IsCorrupt(err) || out.Len() > 0 || !strings.Contains(err.Error(), "other digests than when it was referred to") {
		t.Errorf("another with its UUID: %v", err)
	}
}

// fit is how an image that refers to others is written again, with all checksums right.
type fit struct {
	refs  func(rs checkpoint.References) checkpoint.References
	meta  func(m *checkpoint.Meta)
	entry func(block int, page uint64, e pagemap.Entry) pagemap.Entry
	base  func(block int, slot uint64, e pagemap.Entry) pagemap.Entry
	// disks changes what is in the frames of DISKS.
	disks func(chunks [][]byte) [][]byte
}

// refit replaces the image of a checkpoint.
func (l *lab) refit(t *testing.T, ref store.Ref, f fit) {
	t.Helper()
	ok := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	name := fmt.Sprintf("/vms/vm/%08d.flic", ref.N)
	in, err := l.fs.Open(l.dir + name)
	ok(err)
	defer in.Close()
	im, err := image.Open(in)
	ok(err)
	meta, err := checkpoint.ReadMeta(in)
	ok(err)
	refs, err := checkpoint.ReferencesOf(im)
	ok(err)
	sizes := []uint64{uint64(im.Segments() * im.SegmentPages)}
	for i := range refs {
		sizes = append(sizes, uint64(refs[i].Segments)*uint64(refs[i].SegmentPages))
	}
	if f.refs != nil {
		refs = f.refs(refs)
	}
	meta.References = nil
	for i := range refs {
		meta.References = append(meta.References, refs[i].UUID)
	}
	out, err := l.fs.Create(l.dir + "/tmp/new")
	ok(err)
	h := im.Header
	h.Features.Incompat |= image.HasReferences | image.HasDeltas
	w, err := image.NewWriter(out, h, image.None, 1)
	ok(err)
	chunk := func(k image.Kind, n uint32, b []byte) {
		buf := w.NewBuffer(k)
		buf.Data = append(buf.Data, b...)
		buf.Number = n
		ok(w.Submit(buf))
	}
	remap := func(k image.Kind, pages []uint64, starts []pagemap.Start, change func(int, uint64, pagemap.Entry) pagemap.Entry) (list []pagemap.Start) {
		m, err := pagemap.NewMap(pagemap.Source{Pages: pages, Starts: starts,
			Read:  func(i int) ([]byte, error) { return im.Chunk(k, i) },
			Check: func(int, pagemap.Run) error { return nil }, Bad: func(_ int, err error) error { return err }})
		ok(err)
		b, err := pagemap.New(pages)
		ok(err)
		ok(m.Runs(func(r pagemap.Run) error {
			for i := range r.Count {
				e := r.Entry(i)
				if change != nil {
					e = change(r.Block, r.Page+i, e)
				}
				b.Set(r.Block, r.Page+i, e)
			}
			return nil
		}))
		ok(b.Encode(1000, func(at pagemap.Start, b []byte) error {
			chunk(k, uint32(len(list)), b)
			list = append(list, at)
			return nil
		}))
		return list
	}
	var sr image.SegmentReader
	ok(im.Frames(func(k image.Kind, n uint32, _ int64) error {
		switch {
		case k.IsSegment():
			seg, err := im.Segment(&sr, n)
			ok(err)
			chunk(k, n, seg.Append(nil))
		case k == image.Skeleton || k == image.Digests || k == image.NVRAM:
			b, err := im.Chunk(k, int(n))
			ok(err)
			chunk(k, n, b)
		}
		return nil
	}))
	if len(refs) > 0 {
		chunk(image.References, 0, refs.Append(nil))
	}
	var disks [][]byte
	for i := range im.Chunks(image.Disks) {
		b, err := im.Chunk(image.Disks, i)
		ok(err)
		disks = append(disks, bytes.Clone(b))
	}
	if f.disks != nil {
		disks = f.disks(disks)
	}
	for i, b := range disks {
		chunk(image.Disks, uint32(i), b)
	}
	meta.MapChunks = remap(image.PageMap, meta.BlockPages(), meta.MapChunks, f.entry)
	if len(meta.Bases) > 0 {
		meta.Bases = remap(image.Bases, sizes, meta.Bases, f.base)
	}
	if f.meta != nil {
		f.meta(meta)
	}
	doc, id, err := meta.Documents()
	ok(err)
	ok(w.Finish(doc, id))
	ok(out.Close())
	ok(l.fs.Replace(l.dir+"/tmp/new", l.dir+name))
}

// TestReferenceHostile refuses what no save writes: before anything is restored if it can
// be told without reading pages, and in no case with more than it takes to tell.
func TestReferenceHostile(t *testing.T) {
	kind := func(k pagemap.Kind, to pagemap.Entry) func(int, uint64, pagemap.Entry) pagemap.Entry {
		return func(_ int, _ uint64, e pagemap.Entry) pagemap.Entry {
			if e.Kind() == k {
				return to
			}
			return e
		}
	}
	every := func(to pagemap.Entry) func(int, uint64, pagemap.Entry) pagemap.Entry {
		return func(_ int, _ uint64, e pagemap.Entry) pagemap.Entry {
			if e.Kind() != pagemap.Absent {
				return to
			}
			return e
		}
	}
	refs := func(change func(r *checkpoint.Reference)) func(checkpoint.References) checkpoint.References {
		return func(rs checkpoint.References) checkpoint.References { change(&rs[0]); return rs }
	}
	table := func(old, to string) func([][]byte) [][]byte {
		return func(chunks [][]byte) [][]byte {
			was := chunks[0]
			if chunks[0] = regexp.MustCompile(old).ReplaceAll(was, []byte(to)); bytes.Equal(chunks[0], was) {
				t.Fatalf("%s is not in %s", old, was)
			}
			return chunks
		}
	}
	slots := func(change func(b []byte) []byte) func([][]byte) [][]byte {
		return func(chunks [][]byte) [][]byte { chunks[1] = change(chunks[1]); return chunks }
	}
	var own uuid.UUID
	for name, c := range map[string]struct {
		f    fit
		says string
	}{
		"as it was":     {fit{}, ""},
		"itself":        {fit{refs: refs(func(r *checkpoint.Reference) { r.UUID = own })}, "it refers to itself"},
		"one too few":   {fit{meta: func(m *checkpoint.Meta) { m.References = m.References[1:] }}, "IDENTITY lists other references"},
		"another order": {fit{meta: func(m *checkpoint.Meta) { slices.Reverse(m.References) }}, "IDENTITY lists other references"},
		"no list": {fit{refs: func(checkpoint.References) checkpoint.References { return nil }, meta: func(m *checkpoint.Meta) { m.Bases = nil }},
			""}, // below
		"no key":              {fit{meta: func(m *checkpoint.Meta) { m.Digests = nil }}, "no key to check their pages with"},
		"another key":         {fit{meta: func(m *checkpoint.Meta) { m.Digests.Key[0]++ }}, "other digests than when it was referred to"},
		"unknown digests":     {fit{meta: func(m *checkpoint.Meta) { m.Digests.Algorithm = "md5" }}, "which this flic-migrate does not know"},
		"another root":        {fit{refs: refs(func(r *checkpoint.Reference) { r.Root[0]++ })}, "other digests than when it was referred to"},
		"other segments":      {fit{refs: refs(func(r *checkpoint.Reference) { r.Segments++ })}, "segments of"},
		"endless segments":    {fit{refs: refs(func(r *checkpoint.Reference) { r.Segments, r.SegmentPages = 1<<32-1, 256 })}, "more than"},
		"other segment size":  {fit{refs: refs(func(r *checkpoint.Reference) { r.SegmentPages++ })}, ""},
		"other slots":         {fit{refs: refs(func(r *checkpoint.Reference) { r.Slots++ })}, "its NVRAM part is not the one of"},
		"needs nothing":       {fit{refs: refs(func(r *checkpoint.Reference) { r.NeedSegments = nil })}, "is not among those that are needed of reference 0"},
		"needs no slots":      {fit{refs: refs(func(r *checkpoint.Reference) { r.NeedSlots = nil })}, "is not among those that are needed of reference 0"},
		"reference 7":         {fit{entry: kind(pagemap.Foreign, pagemap.MakeForeign(pagemap.Foreign, 7, 0))}, "reference 7 does not exist"},
		"last reference":      {fit{entry: kind(pagemap.ForeignNVRAM, pagemap.Make(pagemap.ForeignNVRAM, pagemap.MaxValue))}, "reference 65535 does not exist"},
		"far slot":            {fit{entry: kind(pagemap.Foreign, pagemap.MakeForeign(pagemap.Foreign, 0, 1<<40-1))}, "flash slot 1099511627775 is not among"},
		"far delta":           {fit{entry: kind(pagemap.Delta, pagemap.Make(pagemap.Delta, pagemap.MaxValue))}, "does not exist"},
		"delta of a page":     {fit{entry: kind(pagemap.Delta, pagemap.Make(pagemap.Delta, 0))}, "has no base"},
		"base is a delta":     {fit{base: every(pagemap.Make(pagemap.Delta, 1))}, "against a page of kind delta"},
		"base is theirs":      {fit{base: every(pagemap.MakeForeign(pagemap.ForeignDelta, 0, 1))}, "against a page of kind foreign delta"},
		"base is zero":        {fit{base: every(pagemap.Make(pagemap.ZeroData, 0))}, "against a page of kind zero data"},
		"base of a later one": {fit{base: every(pagemap.Make(44, 0))}, "against a page of kind source kind 44"},
		"far base":            {fit{base: every(pagemap.Make(pagemap.Flash, pagemap.MaxValue))}, "base of the delta in slot"},
		"far NVRAM base":      {fit{base: every(pagemap.Make(pagemap.NVRAM, 1<<33))}, "base of the delta in slot"},
		"base of reference 9": {fit{base: every(pagemap.MakeForeign(pagemap.Foreign, 9, 1))}, "reference 9 does not exist"},
		"no bases":            {fit{base: every(0)}, "has no base"},
		"bases not listed":    {fit{meta: func(m *checkpoint.Meta) { m.Bases = nil }}, "0 BASES chunks"},
		"far disk slot":       {fit{entry: kind(pagemap.Disk, pagemap.Make(pagemap.Disk, pagemap.MaxValue))}, "disk slot 72057594037927935 does not exist"},
		"base off disk":       {fit{base: every(pagemap.Make(pagemap.Disk, 1<<20))}, "base of the delta in slot"},
		"no disks":            {fit{disks: func([][]byte) [][]byte { return nil }}, "3 disks, and the image lists none"},
		"other disks":         {fit{meta: func(m *checkpoint.Meta) { m.Disks-- }}, "3 disks, and IDENTITY says 2"},
		"disks unsaid":        {fit{meta: func(m *checkpoint.Meta) { m.Disks = 0 }}, "3 disks, and IDENTITY says 0"},
		"disks, version 2":    {fit{disks: table(`"version":1`, `"version":2`)}, "it is in version 2"},
		"disks, garbage":      {fit{disks: table(`"version":1`, `"version":`)}, "DISKS 0"},
		"disks, none of them": {fit{disks: table(`"disks":\[.*\]`, `"disks":[]`)}, "disk slots of 0 disks"},
		"disks, many":         {fit{disks: table(`"disks":\[`, `"disks":[`+strings.Repeat("{},", 5000))}, "DISKS 0"},
		"disk without a path": {fit{disks: table(`"path":"[^"]*"`, `"path":""`)}, "disk 0: "},
		"disk of no format":   {fit{disks: table(`"raw"`, `"vmdk"`)}, "disk 0: "},
		"more disk slots":     {fit{disks: table(`"slots":`, `"slots":9`)}, "disk slots, and 50 have digests"},
		"endless disk slots":  {fit{disks: table(`"slots":[0-9]*`, `"slots":18446744073709551615`)}, "in 1 chunks"},
		"no disk slots":       {fit{disks: table(`"slots":[0-9]*`, `"slots":0`)}, "0 disk slots of 3 disks"},
		"a disk slot less":    {fit{disks: table(`"slots":[0-9]*`, `"slots":1`)}, ""},
		"disk slots cut":      {fit{disks: slots(func(b []byte) []byte { return b[:len(b)-8] })}, "disk slots"},
		"half a disk slot":    {fit{disks: slots(func(b []byte) []byte { return b[:len(b)-3] })}, "disk slots"},
		"disk slot on disk 9": {fit{disks: slots(func(b []byte) []byte { b[6] = 9; return b })}, "disk slot 0 is on disk 9 of 3"},
		"disk slot behind":    {fit{disks: slots(func(b []byte) []byte { b[5] = 9; return b })}, "of a disk of"},
		"disk slots twice":    {fit{disks: slots(func(b []byte) []byte { copy(b[8:16], b); return b })}, "disk slot 1 is not behind the one before"},
		"bases from later on": {fit{meta: func(m *checkpoint.Meta) { m.Bases[0].Page = 1 }}, "BASES: page map does not start at the first page"},
	} {
		t.Run(name, func(t *testing.T) {
			l, list := chained(t, 3)
			last := list[len(list)-1]
			own = last.UUID
			l.refit(t, last.Ref, c.f)
			if name == "as it was" {
				l.holds(t, last.Ref, last.Stream)
				return
			}
			before := allocated()
			found := l.verify(last.Ref)
			var b bytes.Buffer
			err := l.restore(last.Ref, &b)
			if n := allocated() - before; n > 32<<20 {
				t.Errorf("%d MiB allocated", n>>20)
			}
			if b.Len() > 0 {
				t.Errorf("%d bytes were restored", b.Len())
			}
			if err == nil || len(found) == 0 || !strings.Contains(err.Error(), c.says) || !strings.Contains(fmt.Sprint(found), c.says) {
				t.Errorf("restore: %v\nverify: %v", err, found)
			}
			for _, err := range append(found, err) {
				var u *image.UnsupportedError
				if !integrity.IsCorrupt(err) && !errors.As(err, &u) {
					t.Errorf("it is no damage: %v", err)
				}
			}
			l.noLeaks(t)
		})
	}
	t.Run("each other", func(t *testing.T) {
		l, list := chained(t, 3)
		l.refit(t, list[0].Ref, fit{refs: func(checkpoint.References) checkpoint.References {
			c, err := l.st.OpenCheckpoint(t.Context(), list[2].Ref, checkpoint.Options{})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			return checkpoint.References{{UUID: list[2].UUID, Root: c.Meta.Digests.Root, VM: "vm", Number: 3,
				SegmentPages: c.Image.SegmentPages, Segments: uint32(c.Image.Segments())}}
		}})
		for _, c := range list {
			l.holds(t, c.Ref, c.Stream)
		}
	})
}

// TestOwnDigests: verify compares an image's pages with what it says of them to others,
// whatever the checksums say.
func TestOwnDigests(t *testing.T) {
	l := newLab(t, crashfs.New(0), "/")
	blocks := []tiertest.Block{{Name: "pc.ram", Size: 160 << 10}}
	list := chain.Build(t, l.st, chain.Options{Seed: 7, Streams: generations(7, 2, blocks), Codec: image.None, NVRAM: l.nvram, Deltas: 0.9, Scattered: 0.2})
	seen := map[image.Kind]int{}
	for _, c := range list {
		name := fmt.Sprintf("/vms/vm/%08d.flic", c.Ref.N)
		was := l.file(t, name)
		f, err := l.fs.Open(l.dir + name)
		if err != nil {
			t.Fatal(err)
		}
		im, err := image.Open(f)
		if err != nil {
			t.Fatal(err)
		}
		if err := im.Frames(func(k image.Kind, n uint32, off int64) error {
			if k != image.Pages && k != image.Deltas && k != image.Digests {
				return nil
			}
			b := bytes.Clone(was)
			// The last byte of a page, of the words of the last delta, of digests.
			b[off+image.FrameHeaderLen+int64(binary.LittleEndian.Uint32(b[off+8:]))-1] ^= 0x81
			tiertest.Reseal(b)
			l.write(t, name, b)
			found := l.verify(c.Ref)
			if len(found) == 0 || !errors.Is(found[0], digest.ErrMismatch) || !integrity.IsCorrupt(found[0]) {
				t.Errorf("%v: %v %d: %v", c.Ref, k, n, found)
			}
			seen[k]++
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		f.Close()
		l.write(t, name, was)
		l.holds(t, c.Ref, c.Stream)
	}
	if len(seen) != 3 {
		t.Errorf("of frames there were only %v", seen)
	}
}
