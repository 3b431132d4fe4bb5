package store

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/digest"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/pagemap"
	"github.com/flic-migrate/flic-migrate/tier/progress"
	"github.com/flic-migrate/flic-migrate/tier/source"
)

// CopyOptions of Copy.
type CopyOptions struct {
	Codec   image.Codec
	Workers int // compressing threads; 0: one for each CPU
	// Disks is how Flatten deals with the disks that pages are on.
	Disks    checkpoint.DiskOptions
	Progress func(progress.State) // called a few times a second; may be nil
}

// copyChunk is how many bytes of the page map are decoded to find one page, as in
// a save.
const copyChunk = 32 << 10

// Copy makes the next checkpoint of c's VM in this store, which says and holds all that
// c does and needs nothing beside its own image. It goes from image to image, and every
// byte of c is checked on the way: segments keep their numbers, so that what is in
// them keeps its place, and pages whose bytes are anywhere else follow in segments of
// their own, each different one once.
//
// What users say of it is copied with it. So is what resumes have learned, as well as can be:
// it is a hint. After an error there is no copy, unless [IsUncertain] says so.
func (s *Store) Copy(ctx context.Context, c *Checkpoint, o CopyOptions) (Ref, *checkpoint.Meta, error) {
	tx, err := s.Begin(ctx, c.Ref.VM)
	if err != nil {
		return Ref{}, nil, err
	}
	defer tx.Abort()
	meta, err := tx.fill(ctx, c.Checkpoint, o)
	if err != nil {
		return Ref{}, nil, err
	}
	// What can't be read is verify's to say.
	if tx.label, err = c.store.Label(ctx, c.Ref); err != nil && !integrity.IsCorrupt(err) {
		return Ref{}, nil, err
	}
	ref, err := tx.Commit(ctx)
	if err != nil {
		return Ref{}, nil, err
	}
	s.noteShare(ctx, &meta.Identity)
	if t, err := c.store.Touched(ctx, c.Ref); err == nil && len(t.Runs) > 0 {
		s.AddTouched(ctx, ref, t.PageSize, t.Blocks, t.Runs)
	}
	return ref, meta, nil
}

// fill writes all of another checkpoint into the transaction's image.
func (t *Tx) fill(ctx context.Context, c *checkpoint.Checkpoint, o CopyOptions) (meta *checkpoint.Meta, err error) {
	k := &copier{c: c, o: o, begin: time.Now(), moved: make(map[pagemap.Entry]*movedSlots)}
	if k.hash, err = hasherOf(c.Meta); err != nil {
		return nil, err
	}
	im, features := c.Image, image.Features{Compat: image.HasDigests}
	if t.again && len(c.Meta.Kept) > 0 {
		features.Incompat = image.HasKept
	}
	k.w, err = image.NewWriter(t.Image(), image.Header{
		PageSize: im.PageSize, SegmentPages: im.SegmentPages, UUID: t.UUID(), Created: c.Meta.Created, Features: features,
	}, o.Codec, o.Workers)
	if err != nil {
		return nil, err
	}
	defer k.w.Abort() // nothing after Finish
	k.w.KeepDigests(k.hash)
	for _, step := range []func(context.Context) error{k.segments, k.pages, k.skeleton} {
		if err := step(ctx); err != nil {
			return nil, err
		}
	}
	if meta, err = k.finish(t); err == nil {
		err = context.Cause(ctx)
	}
	return meta, err
}

// hasherOf makes digests that compare with a checkpoint's, if it has some.
func hasherOf(m *checkpoint.Meta) (*digest.Hasher, error) {
	if m.Digests == nil {
		return digest.Fresh(), nil
	}
	return m.Digests.Hasher()
}

// movedSlots are the slots that the pages of neighbouring entries have in the copy, and
// one more, because 0 is none.
type movedSlots [512]uint64

// copier is one Copy.
type copier struct {
	c     *checkpoint.Checkpoint
	hash  *digest.Hasher
	o     CopyOptions
	begin time.Time
	w     *image.Writer
	table *pagemap.Builder

	// buf is the segment that fills with pages from elsewhere; nil: none.
	buf   *image.Buffer
	moved map[pagemap.Entry]*movedSlots // by what the map said of them
	page  []byte                        // a page inflated
	tick  time.Time
	done  int64 // pages
}

// segments copies the image's segments.
func (k *copier) segments(ctx context.Context) error {
	var sr image.SegmentReader
	for n := range k.c.Image.Segments() {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		if kind := k.c.Image.SegmentKind(uint32(n)); kind != image.Pages && kind != image.Records {
			// A number that the save has not used is not used here, and pages that are
			// deltas are moved as a whole.
			k.w.Discard(k.w.NewBuffer(image.Pages))
			continue
		}
		seg, err := k.c.Image.Segment(&sr, uint32(n))
		if err != nil {
			return err
		}
		b := k.w.NewBuffer(seg.Kind)
		b.Data = seg.Append(b.Data)
		if seg.Kind == image.Records {
			if b.Sums, err = k.digests(b.Sums, seg); err != nil {
				return err
			}
		}
		n := seg.Len()
		sr.Recycle(seg)
		if err := k.w.Submit(b); err != nil {
			return err
		}
		k.progress(int64(n))
	}
	return nil
}

// digests appends those of the pages of a segment of records.
func (k *copier) digests(sums []digest.Sum, seg *image.Segment) ([]digest.Sum, error) {
	if k.page == nil {
		k.page = make([]byte, k.c.Image.PageSize)
	}
	for i := range seg.Len() {
		b, err := seg.Record(i)
		if err != nil {
			return nil, err
		}
		if err := ramparse.Inflate(k.page, b); err != nil {
			return nil, seg.Corrupt(fmt.Errorf("record %d: %w", i, err))
		}
		sums = append(sums, k.hash.Sum(k.page))
	}
	return sums, nil
}

// pages makes the page map, and moves what is not in the image into it.
func (k *copier) pages(ctx context.Context) (err error) {
	if k.table, err = pagemap.New(k.c.Meta.BlockPages()); err != nil {
		return err
	}
	set := k.c.Sources()
	rd := k.c.InOrder()
	defer rd.Close()
	err = k.c.PageMap.Runs(func(r pagemap.Run) error {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		if set.Row(r.Kind).Form != source.Whole || r.Kind == pagemap.Flash {
			for i := range r.Count {
				k.table.Set(r.Block, r.Page+i, pagemap.Make(r.Kind, r.First+i*r.Step))
			}
			return nil
		}
		return rd.Read(ctx, r, func(i, n uint64, content source.Content) error {
			slot, err := k.move(pagemap.Make(r.Kind, r.First+i*r.Step), content)
			for j := range n {
				k.table.Set(r.Block, r.Page+i+j, pagemap.Make(pagemap.Flash, slot))
			}
			return err
		})
	})
	if err == nil && k.buf != nil {
		err = k.w.Submit(k.buf)
	}
	return err
}

// move gives a page from elsewhere a slot in the image, if what it was found under
// has none yet.
func (k *copier) move(e pagemap.Entry, content source.Content) (slot uint64, err error) {
	near := k.moved[e/pagemap.Entry(len(movedSlots{}))]
	if near == nil {
		near = new(movedSlots)
		k.moved[e/pagemap.Entry(len(near))] = near
	}
	known := &near[e%pagemap.Entry(len(near))]
	if *known > 0 {
		return *known - 1, nil
	}
	if slot, err = k.store(content); err == nil {
		*known = slot + 1
	}
	k.progress(1)
	return slot, err
}

// store gives a page the next slot in the image.
func (k *copier) store(content source.Content) (slot uint64, err error) {
	size, per := k.c.Image.PageSize, k.w.SegmentPages()
	if k.buf == nil {
		k.buf = k.w.NewBuffer(image.Pages)
	}
	at := len(k.buf.Data)
	slot = uint64(k.buf.Number)*uint64(per) + uint64(at/size)
	k.buf.Data = k.buf.Data[:at+size]
	if err := content.Copy(k.buf.Data[at:]); err != nil {
		return 0, fmt.Errorf("%s: %w", k.c.Image.Name(), err)
	}
	if len(k.buf.Data) == per*size {
		full := k.buf
		k.buf = nil
		err = k.w.Submit(full)
	}
	return slot, err
}

// skeleton copies the skeleton log, chunk by chunk: META knows where the tail begins.
func (k *copier) skeleton(ctx context.Context) error {
	for i := range k.c.Image.Chunks(image.Skeleton) {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		b, err := k.c.Image.Chunk(image.Skeleton, i)
		if err != nil {
			return err
		}
		if err := k.chunk(image.Skeleton, b); err != nil {
			return err
		}
	}
	return nil
}

func (k *copier) chunk(kind image.Kind, b []byte) error {
	buf := k.w.NewBuffer(kind)
	buf.Data = append(buf.Data, b...)
	return k.w.Submit(buf)
}

// finish writes the page map and what the copy says about itself: what the original
// says, but for where its bytes are.
func (k *copier) finish(tx *Tx) (*checkpoint.Meta, error) {
	m := *k.c.Meta
	m.VM, m.Number, m.UUID = tx.Ref().VM, tx.Ref().N, tx.UUID()
	m.NVRAM, m.References, m.Disks, m.DiskSlots, m.Digests, m.MapChunks, m.Bases = nil, nil, 0, 0, nil, nil, nil
	m.Origin = uuid.Nil
	if tx.again {
		m.Origin = k.c.Meta.First()
	} else {
		// They are the original's alone.
		m.Kept, m.VMDisks = nil, slices.Clone(m.VMDisks)
		for i := range m.VMDisks {
			m.VMDisks[i].Kept = uuid.Nil
		}
	}
	err := k.table.Encode(copyChunk, func(at pagemap.Start, b []byte) error {
		m.MapChunks = append(m.MapChunks, at)
		return k.chunk(image.PageMap, b)
	})
	if err != nil {
		return nil, err
	}
	if m.Digests, err = checkpoint.WriteDigests(k.w, k.hash, nil, nil); err != nil {
		return nil, err
	}
	if err := k.w.Drain(); err != nil {
		return nil, err
	}
	var counts source.Counts
	err = k.table.Runs(func(r pagemap.Run) error {
		source.Default.Count(&counts, r)
		return nil
	})
	if err != nil {
		return nil, err
	}
	rep := &m.Report
	rep.Parent, rep.Disks = "", nil // nothing is referred to
	rep.DeltaBytes, rep.Similar, rep.Moved = 0, 0, 0
	rep.Hot, rep.Cold, rep.Disk, rep.Delta, rep.Unchanged = counts.Hot, counts.Cold, counts.Disk, counts.Delta, counts.Unchanged
	rep.NVRAMBytes, rep.FlashBytes, rep.Codec = 0, k.w.Len(), k.o.Codec.String()
	rep.Seconds = checkpoint.Seconds{Total: time.Since(k.begin).Seconds()}
	doc, id, err := m.Documents()
	if err == nil {
		err = k.w.Finish(doc, id)
	}
	rep.FlashBytes = k.w.Len()
	return &m, err
}

func (k *copier) progress(pages int64) {
	k.done += pages
	if now := time.Now(); k.o.Progress != nil && now.Sub(k.tick) >= progress.Every {
		k.tick = now
		k.o.Progress(progress.State{Phase: "copy", Pages: k.done, BytesOut: k.w.Len()})
	}
}
