package tier_test

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/dedup"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/pagemap"
	"github.com/flic-migrate/flic-migrate/tier/restore"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/skeleton"
	"github.com/flic-migrate/flic-migrate/tier/source"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/vfs/crashfs"
)

// forgery is how an image is written again: with all checksums right.
type forgery struct {
	segment func(data []byte)                                               // of whole pages
	entry   func(block int, page uint64, e pagemap.Entry) pagemap.Entry     // of the page map
	place   func(block int, page uint64, add func(page uint64) error) error // of the skeleton
	chunk   int                                                             // bytes of the skeleton in each; 0 means as ever
}

// forge replaces the image of a checkpoint.
func (l *lab) forge(t *testing.T, ref store.Ref, f forgery) {
	t.Helper()
	c, err := l.st.OpenCheckpoint(t.Context(), ref, checkpoint.Options{})
	ok := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	ok(err)
	name := c.Image.Name()
	file, err := l.fs.Create(name + ".new")
	ok(err)
	w, err := image.NewWriter(file, c.Image.Header, image.None, 1)
	ok(err)
	chunk := func(k image.Kind, b []byte) error {
		buf := w.NewBuffer(k)
		buf.Data = append(buf.Data, b...)
		return w.Submit(buf)
	}
	var sr image.SegmentReader
	for n := range uint32(c.Image.Segments()) {
		s, err := c.Image.Segment(&sr, n)
		ok(err)
		var b []byte
		for i := range s.Len() {
			page, err := s.Page(i)
			ok(err)
			b = append(b, page...)
		}
		if f.segment != nil {
			f.segment(b)
		}
		ok(chunk(image.Pages, b))
	}
	meta := *c.Meta
	meta.Digests = nil // they would be others'
	chunks := 0
	skel := forgedSkeleton{f: f, Writer: skeleton.Writer{Limit: cmp.Or(f.chunk, image.MaxChunk), Emit: func(b []byte) error {
		chunks++
		return chunk(image.Skeleton, b)
	}}}
	ok(c.SkeletonChunks(0, meta.TailChunk, &skel))
	ok(skel.Flush())
	meta.TailChunk, chunks = chunks, 0
	ok(c.SkeletonChunks(c.Meta.TailChunk, c.Image.Chunks(image.Skeleton), &skel))
	ok(skel.Flush())
	m, err := pagemap.New(meta.BlockPages())
	ok(err)
	ok(c.PageMap.Runs(func(r pagemap.Run) error {
		for i := range r.Count {
			e := r.Entry(i)
			if f.entry != nil {
				e = f.entry(r.Block, r.Page+i, e)
			}
			m.Set(r.Block, r.Page+i, e)
		}
		return nil
	}))
	meta.MapChunks = nil
	ok(m.Encode(4096, func(at pagemap.Start, b []byte) error {
		meta.MapChunks = append(meta.MapChunks, at)
		return chunk(image.PageMap, b)
	}))
	for i := range c.Image.Chunks(image.NVRAM) {
		b, err := c.Image.Chunk(image.NVRAM, i)
		ok(err)
		ok(chunk(image.NVRAM, b))
	}
	doc, identity, err := meta.Documents()
	ok(err)
	ok(w.Finish(doc, identity))
	ok(file.Close())
	ok(c.Close())
	ok(l.fs.Replace(name+".new", name))
}

// forgedSkeleton writes a skeleton again.
type forgedSkeleton struct {
	skeleton.Writer
	f forgery
}

func (s *forgedSkeleton) Pages(block int, page, count uint64, named bool) error {
	for p := page; p < page+count; p++ {
		add := func(p uint64) error {
			err := s.Page(block, p, named)
			named = false
			return err
		}
		if s.f.place == nil {
			if err := add(p); err != nil {
				return err
			}
		} else if err := s.f.place(block, p, add); err != nil {
			return err
		}
	}
	return nil
}

// flat saves a stream of 24 pages, of which the first 8 are hot.
func flat(t *testing.T) (*lab, store.Ref, *tiertest.Stream) {
	s := tiertest.New(tiertest.Options{Seed: 3, Mix: tiertest.Mix{tiertest.Random: 1},
		Blocks: []tiertest.Block{{Name: "pc.ram", Size: 20 << 12}, {Name: "rom", Size: 4 << 12}}})
	l := newLab(t, crashfs.New(0), "/")
	ref, meta := l.save(t, s, save.Options{SegmentPages: 4, Energy: dedup.EnergyFull,
		WorkingSet: hotSet(t, s, func(b int, p uint64) uint8 { return uint8((1 - b)) * uint8(1-min(p/8, 1)) })})
	if meta.Report.Hot != 8 || meta.Report.Cold != 16 {
		t.Fatalf("%d hot, %d cold", meta.Report.Hot, meta.Report.Cold)
	}
	return l, ref, s
}

// TestForgedSkeleton: each page has one place. A restore of what verify passes must
// not be refused, nor give the guest pages that are not its own.
func TestForgedSkeleton(t *testing.T) {
	for name, c := range map[string]struct {
		place func(block int, page uint64, add func(uint64) error) error
		says  []string
	}{
		"as it was": {func(_ int, page uint64, add func(uint64) error) error { return add(page) }, nil},
		"one twice, another never": {func(block int, page uint64, add func(uint64) error) error {
			if block == 0 && page == 9 {
				page = 10
			}
			return add(page)
		}, []string{"places page pc.ram:0xa000 twice", "has no place for page pc.ram:0x9000"}},
		"one in another's place": {func(block int, page uint64, add func(uint64) error) error {
			if block == 1 && page == 0 {
				page = 3
			}
			return add(page)
		}, []string{"places page rom:0x3000 twice", "has no place for page rom:0x0"}},
		"the last never": {func(block int, page uint64, add func(uint64) error) error {
			if block == 1 && page == 3 {
				return nil
			}
			return add(page)
		}, []string{"has no place for page rom:0x3000"}},
		"all twice": {func(_ int, page uint64, add func(uint64) error) error {
			if err := add(page); err != nil {
				return err
			}
			return add(page)
		}, []string{"places page pc.ram:0x0 twice", "places page rom:0x3000 twice"}},
	} {
		t.Run(name, func(t *testing.T) {
			l, ref, s := flat(t)
			l.forge(t, ref, forgery{place: c.place})
			found := l.verify(ref)
			if c.says == nil {
				l.holds(t, ref, s)
				return
			}
			for _, says := range c.says {
				if !contains(found, says) {
					t.Errorf("verify does not say %q: %v", says, found)
				}
			}
			if name != "all twice" && len(found) != len(c.says) {
				t.Errorf("verify found %v", found)
			}
		})
	}
	t.Run("one that was never saved", func(t *testing.T) {
		l, ref, _ := flat(t)
		l.forge(t, ref, forgery{entry: func(block int, page uint64, e pagemap.Entry) pagemap.Entry {
			if block == 0 && (page == 4 || page == 19) {
				return 0
			}
			return e
		}, place: func(block int, page uint64, add func(uint64) error) error {
			if block == 0 && page < 19 { // from 4 downwards: as single pages they fill chunks
				page = (19 + 4 - page) % 19
			}
			return add(page)
		}, chunk: 64})
		found := l.verify(ref)
		if !contains(found, "places page pc.ram:0x4000, which was never saved") || !contains(found, "places page pc.ram:0x13000, which was never saved") || len(found) != 2 {
			t.Errorf("verify found %v", found)
		}
		// Each with the chunk that says so.
		if at := offsets(found); len(at) != 2 || at[0] == at[1] {
			t.Errorf("they are at %v", at)
		}
		if err := l.restore(ref, io.Discard); err == nil || !strings.Contains(err.Error(), "pc.ram:0x4000, which was never saved") {
			t.Errorf("restore: %v", err)
		}
	})
}

func offsets(found []error) (list []int64) {
	for _, err := range found {
		if damage := (*integrity.CorruptError)(nil); errors.As(err, &damage) {
			list = append(list, damage.Offset)
		}
	}
	return list
}

func contains(found []error, says string) bool {
	for _, err := range found {
		if strings.Contains(err.Error(), says) {
			return true
		}
	}
	return false
}

// inverted is a toy: a kind of source whose pages are those of flash slots with every
// bit the other way. The whole of it is this row.
var inverted = source.Row{
	Kind: 40, Name: "inverted", Form: source.Whole,
	Count: func(c *source.Counts, r pagemap.Run) { c.Cold += int64(r.Count) },
	Check: source.Default.Row(pagemap.Flash).Check,
	Needs: source.Default.Row(pagemap.Flash).Needs,
	Content: func(rd *source.Reader, e pagemap.Entry) (source.Content, error) {
		s, i := rd.InSegment(0, e.Value())
		b, err := s.Page(i)
		b = bytes.Clone(b)
		invert(b)
		return source.Content{Form: source.Whole, Data: b}, err
	},
}

func invert(b []byte) {
	for i := range b {
		b[i] = ^b[i]
	}
}

// TestNewSource: a kind of source is added by one row. Without it, pages that are of
// the kind are refused by name, and no others.
func TestNewSource(t *testing.T) {
	l, ref, s := flat(t)
	toy := func(block int, page uint64, e pagemap.Entry) pagemap.Entry {
		if e.Kind() == pagemap.Flash && e.Value() < 8 {
			return pagemap.Make(inverted.Kind, e.Value())
		}
		return e
	}
	half := func() func(data []byte) { // the first two segments
		n := 0
		return func(data []byte) {
			if n++; n <= 2 {
				invert(data)
			}
		}
	}
	l.forge(t, ref, forgery{entry: toy, segment: half()})
	open := func(table *source.Table) *store.Checkpoint {
		c, err := l.st.OpenCheckpoint(t.Context(), ref, checkpoint.Options{Sources: table})
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	t.Run("known", func(t *testing.T) {
		c := open(source.Default.With(inverted))
		defer c.Close()
		if err := c.Verify(t.Context(), func(err error) { t.Errorf("verify: %v", err) }); err != nil {
			t.Error(err)
		}
		r := s.Expected()
		defer r.Close()
		cmp := &tiertest.Compare{R: r}
		if _, err := restore.Run(t.Context(), c.Checkpoint, cmp, restore.Options{}); err != nil {
			t.Error(err)
		} else if err := cmp.Close(); err != nil {
			t.Error(err)
		}
		var counts source.Counts
		table := c.Sources().Table
		if err := c.PageMap.Runs(func(r pagemap.Run) error { table.Count(&counts, r); return nil }); err != nil || counts.Cold != 16 || counts.Hot != 8 {
			t.Errorf("counts %+v, %v", counts, err)
		}
	})
	t.Run("unknown", func(t *testing.T) {
		c := open(nil)
		defer c.Close()
		var found []error
		if err := c.Verify(t.Context(), func(err error) { found = append(found, err) }); err != nil {
			t.Error(err)
		}
		const says = "page pc.ram:0x8000: its source, source kind 40, is not known"
		if len(found) != 1 || !contains(found, says) {
			t.Errorf("verify found %v", found)
		}
		var b bytes.Buffer
		if _, err := restore.Run(t.Context(), c.Checkpoint, &b, restore.Options{}); err == nil || !strings.Contains(err.Error(), says) || b.Len() > 0 {
			t.Errorf("restore wrote %d bytes: %v", b.Len(), err)
		}
		// All other pages are there.
		set := c.Sources()
		rd := set.NewReader(c.NewCache(source.MaxNeeds))
		defer rd.Close()
		got, want := make([]byte, s.PageSize()), make([]byte, s.PageSize())
		for block := range s.Blocks() {
			for page := range s.Pages(block) {
				run, err := c.PageMap.Find(block, page)
				if err != nil {
					t.Fatal(err)
				}
				s.Page(want, block, page)
				err = rd.Copy(context.Background(), got, source.Page{Block: block, Number: page}, run.Entry(0))
				if run.Kind == inverted.Kind {
					if err == nil {
						t.Errorf("page %d of block %d was read", page, block)
					}
				} else if err != nil || !bytes.Equal(got, want) {
					t.Errorf("page %d of block %d: %v", page, block, err)
				}
			}
		}
	})
	t.Run("out of reach", func(t *testing.T) {
		l.forge(t, ref, forgery{entry: func(_ int, page uint64, e pagemap.Entry) pagemap.Entry {
			if e.Kind() == inverted.Kind && page == 9 {
				return pagemap.Make(inverted.Kind, 1000)
			}
			return e
		}})
		c := open(source.Default.With(inverted))
		defer c.Close()
		if _, err := restore.Run(t.Context(), c.Checkpoint, io.Discard, restore.Options{}); err == nil || !strings.Contains(err.Error(), "page pc.ram:0x9000: flash slot 1000 does not exist") {
			t.Errorf("restore: %v", err)
		}
	})
}
