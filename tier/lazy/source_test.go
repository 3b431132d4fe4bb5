package lazy_test

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/lazy"
	"github.com/flic-migrate/flic-migrate/tier/pagemap"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/source"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
)

// toyKind is a source of page bytes that no version has: of a flash slot, of which
// the bytes are there when the image's first segment is decoded as well.
const toyKind pagemap.Kind = 60

var toy = source.Row{
	Kind: toyKind, Name: "toy", Form: source.Whole,
	Needs: func(f *source.Facts, r pagemap.Run, dst []source.Need) ([]source.Need, uint64) {
		dst, n := source.Default.Row(pagemap.Flash).Needs(f, r, dst)
		return append(dst, source.Segment(0)), n
	},
	Content: func(rd *source.Reader, e pagemap.Entry) (source.Content, error) {
		if _, err := rd.Segment(source.Segment(0)).Page(0); err != nil {
			return source.Content{}, err
		}
		per := rd.Facts().Spaces[0].SegmentPages
		b, err := rd.Segment(source.Segment(uint32(e.Value() / per))).Page(int(e.Value() % per))
		return source.Content{Form: source.Whole, Data: b}, err
	},
}

// withToys opens a checkpoint once more, every third of whose flash pages are of
// toyKind then.
func withToys(t *testing.T, s *saved, table *source.Table) (*saved, []tiertest.PageID) {
	t.Helper()
	c, err := s.st.OpenCheckpoint(t.Context(), store.Ref{VM: "vm"}, checkpoint.Options{Sources: table})
	check(t, err)
	t.Cleanup(func() { check(t, c.Close()) })
	m, err := pagemap.New(c.Meta.BlockPages())
	check(t, err)
	var toys []tiertest.PageID
	n := 0
	check(t, c.PageMap.Runs(func(r pagemap.Run) error {
		for i := range r.Count {
			e := r.Entry(i)
			if r.Kind == pagemap.Flash {
				if n++; n%3 == 0 {
					e = pagemap.Make(toyKind, e.Value())
					toys = append(toys, tiertest.PageID{Block: r.Block, Page: r.Page + i})
				}
			}
			m.Set(r.Block, r.Page+i, e)
		}
		return nil
	}))
	src := pagemap.Source{
		Pages: c.Meta.BlockPages(),
		Check: func(int, pagemap.Run) error { return nil },
		Bad:   func(_ int, err error) error { return err },
	}
	var chunks [][]byte
	check(t, m.Encode(256, func(at pagemap.Start, b []byte) error {
		src.Starts, chunks = append(src.Starts, at), append(chunks, append([]byte(nil), b...))
		return nil
	}))
	src.Read = func(i int) ([]byte, error) { return chunks[i], nil }
	c.PageMap, err = pagemap.NewMap(src)
	check(t, err)
	return &saved{Stream: s.Stream, dir: s.dir, st: s.st, ck: c.Checkpoint}, toys
}

// TestNewSource: a kind that is nothing but a row is served as all others are.
func TestNewSource(t *testing.T) {
	s := newSaved(t, tiertest.Options{Seed: 27, Blocks: threeBlocks}, 5, save.Options{SegmentPages: 8})
	s, toys := withToys(t, s, source.Default.With(toy))
	for round := range uint64(3) {
		synctest.Test(t, func(t *testing.T) {
			r := rand.New(rand.NewPCG(round, 7))
			d := newFakeQEMU(s)
			d.afterPart = func(int) {
				if round > 0 && r.IntN(4) == 0 {
					check(t, d.ask(toys[r.IntN(len(toys))]))
				}
			}
			rep := d.run(t, t.Context(), lazy.Serve, lazy.Options{}).ok(t)
			if round > 0 && rep.Waited == 0 {
				t.Errorf("%+v", rep)
			}
			for _, id := range toys {
				if !d.got[id] {
					t.Errorf("page %v has not come", id)
				}
			}
		})
	}
}

// TestUnknownSource: a page whose source this version does not know is refused by
// name, as soon as it is its turn, and none before it.
func TestUnknownSource(t *testing.T) {
	s := newSaved(t, tiertest.Options{Seed: 27, Blocks: threeBlocks}, 5, save.Options{SegmentPages: 8})
	s, toys := withToys(t, s, nil)
	name := func(id tiertest.PageID) string {
		return fmt.Sprintf("page %s:%#x", s.Blocks()[id.Block].Name, id.Page*4096)
	}
	isToy := make(map[tiertest.PageID]bool)
	for _, id := range toys {
		isToy[id] = true
	}
	t.Run("beside a demanded page", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			d := newFakeQEMU(s)
			var asked []tiertest.PageID
			d.onRun = func() {
				for _, id := range toys[:20] {
					if id.Page ^= 1; !isToy[id] {
						asked = append(asked, id)
						check(t, d.ask(id))
					}
				}
				synctest.Wait()
			}
			d.run(t, t.Context(), lazy.Serve, lazy.Options{HoldBackground: time.Hour, MaxHold: time.Minute})
			if len(asked) < 5 {
				t.Fatalf("only %d pages were asked for", len(asked))
			}
			for _, id := range asked {
				if !d.got[id] {
					t.Errorf("page %v has not come", id)
				}
			}
		})
	})
	for _, asked := range []tiertest.PageID{{Block: -1}, toys[0], toys[len(toys)-1]} {
		synctest.Test(t, func(t *testing.T) {
			d := newFakeQEMU(s)
			d.onRun = func() {
				if asked.Block >= 0 {
					check(t, d.ask(asked))
					synctest.Wait()
				}
			}
			res := d.run(t, t.Context(), lazy.Serve, lazy.Options{})
			if res.server == nil || !strings.Contains(res.server.Error(), "source kind 60") || !strings.Contains(res.server.Error(), "page ") {
				t.Fatalf("%v", res.server)
			}
			if asked.Block >= 0 && !strings.Contains(res.server.Error(), name(asked)) {
				t.Errorf("%v does not name %s", res.server, name(asked))
			}
			if d.ended {
				t.Error("the restore ended well")
			}
			for _, a := range d.order {
				if isToy[a.PageID] {
					t.Errorf("page %v came", a.PageID)
				}
			}
			if asked.Block < 0 && len(d.order) < len(s.ck.NVRAMSlots()) {
				t.Errorf("only %d pages came before it", len(d.order))
			}
		})
	}
}
