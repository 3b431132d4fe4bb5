package chain

import (
	"context"
	"encoding/binary"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/delta"
	"github.com/flic-migrate/flic-migrate/tier/digest"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/pagemap"
	"github.com/flic-migrate/flic-migrate/tier/source"
	"github.com/flic-migrate/flic-migrate/tier/store"
)

// Scatter makes the next checkpoint of a VM, in which nothing that a reader has to keep
// is short: each of its pages is any of the parent's flash slots, or any of its own
// deltas, which are one for every second page and each against any of those slots. It is
// no guest's: it is for what it takes to read it. The parent must have digests.
func Scatter(t testing.TB, st *store.Store, parent store.Ref) store.Ref {
	t.Helper()
	ctx := context.Background()
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	c, err := st.OpenCheckpoint(ctx, parent, checkpoint.Options{})
	check(err)
	defer c.Close()
	hasher, err := c.Meta.Digests.Hasher()
	check(err)
	tx, err := st.Begin(ctx, parent.VM)
	check(err)
	defer tx.Abort()
	check(tx.Refer(ctx, c.Meta.UUID))
	size, per := c.Image.PageSize, c.Image.SegmentPages
	w, err := image.NewWriter(tx.Image(), image.Header{PageSize: size, SegmentPages: per, UUID: tx.UUID(), Created: time.Unix(1700000000, 0),
		Features: image.Features{Incompat: image.HasDeltas | image.HasReferences, Compat: image.HasDigests}}, image.MinLZ, 0)
	check(err)
	defer w.Abort()
	w.KeepDigests(hasher)
	chunk := func(k image.Kind, b []byte) {
		buf := w.NewBuffer(k)
		buf.Data = append(buf.Data, b...)
		check(w.Submit(buf))
	}

	// What there is in the parent: of a page that is nowhere no delta can be made.
	set, rng := c.Sources(), rand.New(rand.NewPCG(1, 3))
	var slots []uint64
	seen := map[uint64]bool{}
	pages := 0
	check(c.PageMap.Runs(func(r pagemap.Run) error {
		for i := range r.Count {
			if e := r.Entry(i); e.Kind() == pagemap.Flash {
				if pages++; !seen[e.Value()] {
					seen[e.Value()] = true
					slots = append(slots, e.Value())
				}
			}
		}
		return nil
	}))
	foreign := func() pagemap.Entry {
		return pagemap.MakeForeign(pagemap.Foreign, 0, slots[rng.IntN(len(slots))])
	}
	base, page := make([]byte, size), make([]byte, size)
	page[8]++
	d, ok := delta.Encode(nil, page, base)
	if !ok {
		t.Fatal("no delta")
	}
	segments := (pages/2 + per - 1) / per
	bases, err := pagemap.New([]uint64{uint64(segments * per), uint64(c.Image.Segments() * per)})
	check(err)
	for n := range segments {
		buf := w.NewBuffer(image.Deltas)
		buf.Data = binary.BigEndian.AppendUint32(buf.Data, uint32(per))
		for range per {
			buf.Data = binary.BigEndian.AppendUint32(buf.Data, uint32(len(d)))
		}
		for i := range per {
			buf.Data = append(buf.Data, d...)
			buf.Sums = append(buf.Sums, digest.Sum{1})
			bases.Set(0, uint64(n*per+i), foreign())
		}
		check(w.Submit(buf))
	}
	table, err := pagemap.New(c.Meta.BlockPages())
	check(err)
	check(c.PageMap.Runs(func(r pagemap.Run) error {
		for i := range r.Count {
			e := r.Entry(i)
			if set.Row(r.Kind).Form == source.Whole {
				e = foreign()
				if rng.IntN(2) == 0 {
					e = pagemap.Make(pagemap.Delta, rng.Uint64N(uint64(segments*per)))
				}
			}
			table.Set(r.Block, r.Page+i, e)
		}
		return nil
	}))
	meta := *c.Meta
	meta.VM, meta.Number, meta.UUID, meta.NVRAM = tx.Ref().VM, tx.Ref().N, tx.UUID(), nil
	refs := checkpoint.References{{UUID: c.Meta.UUID, Root: c.Meta.Digests.Root, VM: parent.VM, Number: c.Ref.N,
		SegmentPages: per, Segments: uint32(c.Image.Segments()), NeedSegments: source.Below(uint32(c.Image.Segments()))}}
	meta.References = nil
	for _, r := range refs {
		meta.References = append(meta.References, r.UUID)
	}
	chunk(image.References, refs.Append(nil))
	for i := range c.Image.Chunks(image.Skeleton) {
		b, err := c.Image.Chunk(image.Skeleton, i)
		check(err)
		chunk(image.Skeleton, b)
	}
	meta.MapChunks, meta.Bases = nil, nil
	check(table.Encode(32<<10, func(at pagemap.Start, b []byte) error {
		meta.MapChunks = append(meta.MapChunks, at)
		chunk(image.PageMap, b)
		return nil
	}))
	check(bases.Encode(32<<10, func(at pagemap.Start, b []byte) error {
		meta.Bases = append(meta.Bases, at)
		chunk(image.Bases, b)
		return nil
	}))
	meta.Digests, err = checkpoint.WriteDigests(w, hasher, nil, nil)
	check(err)
	doc, id, err := meta.Documents()
	check(err)
	check(w.Finish(doc, id))
	ref, err := tx.Commit(ctx)
	check(err)
	return ref
}
