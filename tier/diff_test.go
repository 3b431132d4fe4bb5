package tier_test

import (
	"bytes"
	"context"
	"fmt"
	"testing"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/diff"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/vfs/crashfs"
)

func (l *lab) diff(t *testing.T, a, b store.Ref) (*diff.Report, error) {
	t.Helper()
	var sides [2]*checkpoint.Checkpoint
	for i, ref := range []store.Ref{a, b} {
		c, err := l.st.OpenCheckpoint(context.Background(), ref, checkpoint.Options{})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		sides[i] = c.Checkpoint
	}
	return diff.Compare(context.Background(), sides[0], sides[1])
}

// differs counts what a comparison has to find between two streams of equal blocks.
func differs(a, b *tiertest.Stream) (changed, zeroed int64) {
	pa, pb := make([]byte, a.PageSize()), make([]byte, a.PageSize())
	for i := range a.Blocks() {
		for page := range a.Pages(i) {
			clear(pa)
			clear(pb)
			a.Page(pa, i, page)
			b.Page(pb, i, page)
			if bytes.Equal(pa, pb) {
				continue
			}
			changed++
			if len(bytes.TrimLeft(pb, "\x00")) == 0 {
				zeroed++
			}
		}
	}
	return changed, zeroed
}

// TestDiff compares checkpoints of a guest, some of which refer to others, in both
// directions, with what their streams have.
func TestDiff(t *testing.T) {
	for name, o := range map[string]tiertest.Options{
		"plain":      {Seed: 1, Blocks: []tiertest.Block{{Name: "pc.ram", Size: 1 << 20}, {Name: "rom", Size: 40 << 10}}},
		"compressed": {Seed: 3, Compress: 0.4, Fill: true},
		"16 KiB":     {Seed: 5, Blocks: []tiertest.Block{{Name: "ram", Size: 4 << 20}}, PageSize: 16 << 10, Advise: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := newLab(t, crashfs.New(0), "/")
			var refs []store.Ref
			var streams []*tiertest.Stream
			for n := 1; n <= 5; n++ {
				s := generation(o, n)
				so := save.Options{SegmentPages: 6, Codec: image.LZ4}
				if n == 3 {
					so.WorkingSet, so.NVRAMSize = hotSet(t, s, every(3)), 4<<20
				}
				if n == 4 {
					so.Parent = "none"
				}
				ref, _ := l.save(t, s, so)
				refs, streams = append(refs, ref), append(streams, s)
			}
			for i := range refs {
				for j := range refs {
					rep, err := l.diff(t, refs[i], refs[j])
					if err != nil {
						t.Fatal(err)
					}
					changed, zeroed := differs(streams[i], streams[j])
					if rep.Changed != changed || rep.Zeroed != zeroed || len(rep.Blocks) != len(o.Blocks) && o.Blocks != nil || rep.OnlyA != nil || rep.OnlyB != nil {
						t.Errorf("%v and %v: %d pages changed, %d of them zero; found %+v", refs[i], refs[j], changed, zeroed, rep)
					}
					var sources, pages int64
					for _, b := range rep.Blocks {
						pages += b.Pages
						for _, n := range b.Sources {
							sources += n
						}
					}
					if sources != changed || pages != rep.Pages {
						t.Errorf("%v and %v: the blocks do not add up: %+v", refs[i], refs[j], rep)
					}
					// What is in one place is known to be the same. (Pages that QEMU has
					// compressed are stored anew each time.)
					if i == j && rep.Read != 0 || i == 0 && j == 1 && name == "plain" && rep.Read > changed+changed/4 {
						t.Errorf("%v and %v: %d of %d pages were read", refs[i], refs[j], rep.Read, rep.Pages)
					}
				}
			}
			l.noLeaks(t)
		})
	}
}

// TestDiffOther: blocks that one has alone are named, other page sizes are refused, and
// damage is told.
func TestDiffOther(t *testing.T) {
	l := newLab(t, crashfs.New(0), "/")
	put := func(o tiertest.Options) store.Ref {
		ref, _ := l.save(t, tiertest.New(o), save.Options{Parent: "none", SegmentPages: 4})
		return ref
	}
	a := put(tiertest.Options{Seed: 1, Blocks: []tiertest.Block{{Name: "ram", Size: 1 << 20}, {Name: "vga", Size: 64 << 10}}})
	b := put(tiertest.Options{Seed: 1, Blocks: []tiertest.Block{{Name: "net", Size: 64 << 10}, {Name: "ram", Size: 2 << 20}}})
	c := put(tiertest.Options{Seed: 1, PageSize: 1 << 10, PageBits: true, Blocks: []tiertest.Block{{Name: "ram", Size: 1 << 20}}})
	rep, err := l.diff(t, a, b)
	if err != nil || fmt.Sprint(rep.OnlyA, rep.OnlyB) != "[vga] [net]" || rep.Pages != 256 || rep.Blocks[0].Name != "ram" {
		t.Errorf("%+v, %v", rep, err)
	}
	if _, err := l.diff(t, a, c); err == nil {
		t.Error("pages of 4096 and 1024 bytes were compared")
	}
	const name = "/vms/vm/00000001.flic"
	file := l.file(t, name)
	file[len(file)/2] ^= 1
	l.write(t, name, file)
	if _, err := l.diff(t, a, b); !integrity.IsCorrupt(err) {
		t.Errorf("damaged: %v", err)
	}
}
