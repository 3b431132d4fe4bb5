// Package chain makes, for tests of the reading side, checkpoints that refer to one
// another, with pages of every kind that a page map can name:
//
//	stream 0 ─► generation 0: flash, records, NVRAM
//	stream 1 ─► generation 1: what is new likewise; what is as before is generation 0's;
//	                          what has changed a little is a delta
//	stream 2 ─► generation 2: likewise, against both
//
// What is written follows from a seed. It is more mixed than anything that a save would
// write: a delta may be against any page that is somewhere as a whole, in any
// generation.
package chain

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/delta"
	"github.com/flic-migrate/flic-migrate/tier/digest"
	"github.com/flic-migrate/flic-migrate/tier/disk"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/nvram"
	"github.com/flic-migrate/flic-migrate/tier/pagemap"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/source"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/vfs/crashfs"
)

// Options shape a chain.
type Options struct {
	Seed    uint64
	Streams []tiertest.Options // one for each generation, with the same RAM blocks
	Codec   image.Codec
	// NVRAM is the path of an NVRAM file; "": there is none.
	NVRAM string
	// Disk is the path, on the real file system, of raw disk images: one for each
	// generation, whose number is appended. "": there are none.
	Disk string
	// Segment gives the pages in a full segment of a generation's image; nil: 4, 5, 6…
	Segment func(generation int) int
	// Deltas is how many of the pages that are not as before are tried as deltas,
	// Scattered how many of those are against any page instead of what was there.
	Deltas, Scattered float64
}

// Checkpoint is a generation of a chain.
type Checkpoint struct {
	Ref    store.Ref
	UUID   uuid.UUID
	Stream *tiertest.Stream
	// Kinds is how many pages there are of each kind.
	Kinds map[pagemap.Kind]uint64
	// Needs are the generations that it refers to.
	Needs []int
}

// place is where a page is: in a generation, as a whole or as a delta, or on its disk.
type place struct {
	generation int
	kind       pagemap.Kind // as that generation itself calls it
	slot       uint64       // on a disk, the sector
	base       *place       // of a delta: a whole page
	page       []byte
}

// whole is what a delta against the page can be against.
func (p *place) whole() *place {
	if p.base != nil {
		return p.base
	}
	return p
}

type pageID struct {
	block int
	page  uint64
}

// made is what the generations so far have.
type made struct {
	t       testing.TB
	o       Options
	rng     *rand.Rand
	hasher  *digest.Hasher
	last    map[pageID]*place // in the generation before
	wholes  []*place
	images  []*checkpoint.Reference // what a reference to each generation says, but for its needs
	disks   []checkpoint.Disk       // of each generation
	session context.Context
}

// Build makes a chain in a store. The last generation's image is the newest of VM "vm".
func Build(t testing.TB, st *store.Store, o Options) []Checkpoint {
	t.Helper()
	if o.Segment == nil {
		o.Segment = func(generation int) int { return 4 + generation }
	}
	m := &made{t: t, o: o, rng: rand.New(rand.NewPCG(o.Seed, 1)), hasher: digest.Fresh(), session: context.Background()}
	var list []Checkpoint
	for n := range o.Streams {
		list = append(list, m.generation(st, n))
	}
	return list
}

func (m *made) check(err error) {
	m.t.Helper()
	if err != nil {
		m.t.Fatal(err)
	}
}

// generation saves a stream by itself, and then puts its pages where they are to be.
func (m *made) generation(st *store.Store, n int) Checkpoint {
	m.t.Helper()
	disk := crashfs.New(0)
	scratch, err := store.Open(m.session, disk, "/scratch", true)
	m.check(err)
	s := tiertest.New(m.o.Streams[n])
	r := s.Reader()
	defer r.Close()
	ref, _, err := save.Run(m.session, disk, scratch, r, save.Options{VM: "vm"})
	m.check(err)
	c, err := scratch.OpenCheckpoint(m.session, ref, checkpoint.Options{})
	m.check(err)
	defer c.Close()

	tx, err := st.Begin(m.session, "vm")
	m.check(err)
	defer tx.Abort()
	b := &builder{made: m, n: n, c: c.Checkpoint, per: m.o.Segment(n), at: make(map[pageID]*place), refs: make(map[int]int)}
	h := image.Header{PageSize: s.PageSize(), SegmentPages: b.per, UUID: tx.UUID(), Created: time.Unix(1700000000+int64(n), 0)}
	h.Features.Compat = image.HasDigests
	if n > 0 {
		h.Features.Incompat = image.HasDeltas | image.HasReferences | image.HasPieces
	}
	if m.o.Disk != "" {
		h.Features.Incompat |= image.HasDisks
	}
	b.w, err = image.NewWriter(tx.Image(), h, m.o.Codec, 1)
	m.check(err)
	defer b.w.Abort()
	b.w.KeepDigests(m.hasher)
	var file *nvram.File
	if m.o.NVRAM != "" {
		b.region, file, err = tx.Reserve(m.session, store.Reservation{Path: m.o.NVRAM, Volatile: true, Bytes: 1 << 20, PageSize: s.PageSize(), Capacity: 64 << 20})
		m.check(err)
	}
	b.pages()
	meta := *c.Meta
	meta.VM, meta.Number, meta.UUID, meta.Created = tx.Ref().VM, tx.Ref().N, tx.UUID(), h.Created
	meta.TrustDomain = "" // as of earlier versions: the key is nobody else's
	if b.region != nil && len(b.slots) > 0 {
		m.check(b.region.Sync())
		part := checkpoint.NVRAMPart{Extents: b.region.Extents(), Slots: b.slots}
		b.chunks(image.NVRAM, part.Append(nil))
		meta.NVRAM = &checkpoint.NVRAM{Path: file.Path(), UUID: file.UUID(), Slots: len(b.slots), Bytes: int64(len(b.slots) * s.PageSize()), Volatile: true}
	}
	for i := range c.Image.Chunks(image.Skeleton) {
		chunk, err := c.Image.Chunk(image.Skeleton, i)
		m.check(err)
		b.chunks(image.Skeleton, chunk)
	}
	b.writeDisk()
	kinds := b.maps(&meta)
	meta.Digests, err = checkpoint.WriteDigests(b.w, m.hasher, b.sums, b.diskSums)
	m.check(err)
	doc, id, err := meta.Documents()
	m.check(err)
	m.check(b.w.Finish(doc, id))
	m.check(tx.Refer(m.session, meta.References...))
	ref, err = tx.Commit(m.session)
	m.check(err)

	m.images = append(m.images, &checkpoint.Reference{UUID: meta.UUID, Root: meta.Digests.Root, VM: ref.VM, Number: ref.N,
		SegmentPages: b.per, Segments: uint32(b.w.Segments()), Slots: uint32(len(b.slots))})
	m.last, m.wholes = b.at, append(m.wholes, b.own...)
	needs := make([]int, len(b.refs))
	for generation, i := range b.refs {
		needs[i] = generation
	}
	return Checkpoint{Ref: ref, UUID: meta.UUID, Stream: s, Kinds: kinds, Needs: needs}
}

// builder makes one generation's image.
type builder struct {
	*made
	n      int
	c      *checkpoint.Checkpoint // the stream, saved by itself
	w      *image.Writer
	per    int
	region *nvram.Region
	slots  []checkpoint.NVRAMSlot
	sums   []digest.Sum // of the NVRAM slots
	own    []*place     // whole pages
	disk   []byte       // of this generation
	// diskSums are the digests of the disk slots that this generation has.
	diskSums []digest.Sum
	at       map[pageID]*place
	refs     map[int]int // number of the reference to a generation

	pagesBuf                 *image.Buffer
	recordsBuf, deltasBuf    *image.Buffer
	recordsParts, deltaParts []part
}

// part is a payload, and the bit in its length.
type part struct {
	data []byte
	mark uint32
}

// pages puts every page that has bytes somewhere.
func (b *builder) pages() {
	set := b.c.Sources()
	rd := set.NewReader(b.c.NewCache(8))
	defer rd.Close()
	page := make([]byte, set.PageSize)
	b.check(b.c.PageMap.Runs(func(r pagemap.Run) error {
		if set.Row(r.Kind).Form != source.Whole {
			return nil
		}
		return rd.Read(b.session, r, func(i, n uint64, c source.Content) error {
			if err := c.Copy(page); err != nil {
				return err
			}
			var record []byte
			if c.Form == source.Deflated {
				record = bytes.Clone(c.Data)
			}
			for j := range n {
				id := pageID{r.Block, r.Page + i + j}
				b.at[id] = b.put(id, bytes.Clone(page), record)
			}
			return nil
		})
	}))
	if b.pagesBuf != nil {
		b.check(b.w.Submit(b.pagesBuf))
	}
	b.flush(&b.recordsBuf, &b.recordsParts)
	b.flush(&b.deltasBuf, &b.deltaParts)
}

// put decides where a page goes. One that came deflated stays so, or the stream would not
// come back byte for byte.
func (b *builder) put(id pageID, page, record []byte) *place {
	if record != nil {
		slot := b.payload(&b.recordsBuf, &b.recordsParts, image.Records, part{data: record}, page)
		return b.whole(&place{generation: b.n, kind: pagemap.Flash, slot: slot, page: page})
	}
	was := b.last[id]
	if was != nil && bytes.Equal(was.page, page) {
		return was
	}
	if len(b.wholes) > 0 && b.rng.Float64() < b.o.Deltas {
		base := b.wholes[b.rng.IntN(len(b.wholes))]
		if all := len(b.wholes) + len(b.own); b.rng.Float64() < 0.2 && all > len(b.wholes) {
			base = b.own[b.rng.IntN(len(b.own))]
		}
		if was != nil && b.rng.Float64() >= b.o.Scattered {
			base = was.whole()
		}
		if p := b.delta(page, base); p != nil {
			return p
		}
	}
	if b.o.Disk != "" && b.rng.IntN(3) == 0 {
		return b.onDisk(page)
	}
	if b.region != nil && b.rng.IntN(4) == 0 && len(b.slots) < b.region.Slots() {
		return b.hot(id, page)
	}
	return b.cold(page)
}

func (b *builder) whole(p *place) *place {
	b.own = append(b.own, p)
	return p
}

func (b *builder) cold(page []byte) *place {
	if b.pagesBuf == nil {
		b.pagesBuf = b.w.NewBuffer(image.Pages)
	}
	at := len(b.pagesBuf.Data) / len(page)
	slot := uint64(int(b.pagesBuf.Number)*b.per + at)
	b.pagesBuf.Data = append(b.pagesBuf.Data, page...)
	if at+1 == b.per {
		b.check(b.w.Submit(b.pagesBuf))
		b.pagesBuf = nil
	}
	return b.whole(&place{generation: b.n, kind: pagemap.Flash, slot: slot, page: page})
}

func (b *builder) hot(id pageID, page []byte) *place {
	slot := len(b.slots)
	b.slots = append(b.slots, checkpoint.NVRAMSlot{CRC: integrity.Checksum(page), Block: uint32(id.block), Page: id.page})
	b.sums = append(b.sums, b.hasher.Sum(page))
	b.check(b.region.Write(slot, page))
	return b.whole(&place{generation: b.n, kind: pagemap.NVRAM, slot: uint64(slot), page: page})
}

// onDisk puts a page on the generation's disk, most often behind the one before.
func (b *builder) onDisk(page []byte) *place {
	if b.rng.IntN(4) == 0 {
		b.disk = append(b.disk, make([]byte, disk.SectorSize*(1+b.rng.IntN(20)))...)
	}
	sector := uint64(len(b.disk)) / disk.SectorSize
	b.disk = append(b.disk, page...)
	return b.whole(&place{generation: b.n, kind: pagemap.Disk, slot: sector, page: page})
}

// writeDisk writes the generation's disk, which stays as it is from then on.
func (b *builder) writeDisk() {
	if b.o.Disk == "" {
		return
	}
	path := fmt.Sprint(b.o.Disk, b.n)
	b.check(os.WriteFile(path, b.disk, 0o600))
	f, err := disk.OpenLayer(path, disk.Raw)
	b.check(err)
	b.made.disks = append(b.made.disks, checkpoint.Disk{Identity: f.Identity()})
	b.check(f.Close())
}

// diskSlots numbers the disk slots of all places on disks that the generation has, and
// writes them.
func (b *builder) diskSlots(meta *checkpoint.Meta) map[*place]uint64 {
	meta.Disks = 0
	used := make(map[int]bool)
	var on []*place
	for _, p := range b.at {
		for _, p := range []*place{p, p.base} {
			if p != nil && p.kind == pagemap.Disk {
				on, used[p.generation] = append(on, p), true
			}
		}
	}
	if len(on) == 0 {
		return nil
	}
	var list []checkpoint.Disk
	number := make(map[int]int) // of a generation's disk in the list
	for generation := range b.made.disks {
		if used[generation] {
			number[generation] = len(list)
			list = append(list, b.made.disks[generation])
		}
	}
	slices.SortFunc(on, func(p, q *place) int {
		return cmp.Or(cmp.Compare(p.generation, q.generation), cmp.Compare(p.slot, q.slot))
	})
	at := make(map[*place]uint64)
	var slots []checkpoint.DiskSlot
	for i, p := range slices.Compact(on) {
		at[p] = uint64(i)
		slots = append(slots, checkpoint.MakeDiskSlot(number[p.generation], int64(p.slot)))
		b.diskSums = append(b.diskSums, b.hasher.Sum(p.page))
	}
	chunks, err := checkpoint.DiskChunks(list, slots)
	b.check(err)
	for _, chunk := range chunks {
		b.chunks(image.Disks, chunk)
	}
	meta.Disks = len(list)
	return at
}

func (b *builder) delta(page []byte, base *place) *place {
	d, ok := delta.Encode(nil, page, base.page)
	if !ok {
		return nil
	}
	p := part{data: d}
	if len(b.deltaParts)%2 == 1 { // of two neighbours one is pieces
		if d, ok := new(delta.Differ).Encode(nil, page, base.page, len(page)); ok {
			p = part{d, image.InPieces}
		}
	}
	slot := b.payload(&b.deltasBuf, &b.deltaParts, image.Deltas, p, page)
	return &place{generation: b.n, kind: pagemap.Delta, slot: slot, base: base, page: page}
}

// payload adds one to a segment of payloads, and returns its slot.
func (b *builder) payload(buf **image.Buffer, parts *[]part, k image.Kind, p part, page []byte) uint64 {
	if *buf == nil {
		*buf = b.w.NewBuffer(k)
	}
	slot := uint64(int((*buf).Number)*b.per + len(*parts))
	*parts = append(*parts, p)
	(*buf).Sums = append((*buf).Sums, b.hasher.Sum(page))
	if len(*parts) == b.per {
		b.flush(buf, parts)
	}
	return slot
}

func (b *builder) flush(buf **image.Buffer, parts *[]part) {
	if *buf == nil {
		return
	}
	data := binary.BigEndian.AppendUint32((*buf).Data, uint32(len(*parts)))
	for _, p := range *parts {
		data = binary.BigEndian.AppendUint32(data, uint32(len(p.data))|p.mark)
	}
	for _, p := range *parts {
		data = append(data, p.data...)
	}
	(*buf).Data = data
	b.check(b.w.Submit(*buf))
	*buf, *parts = nil, nil
}

// chunks writes a document in as many frames as it takes.
func (b *builder) chunks(k image.Kind, doc []byte) {
	for len(doc) > 0 {
		n := min(len(doc), image.MaxChunk)
		buf := b.w.NewBuffer(k)
		buf.Data = append(buf.Data, doc[:n]...)
		b.check(b.w.Submit(buf))
		doc = doc[n:]
	}
}

// maps writes the page map, the bases and the references.
func (b *builder) maps(meta *checkpoint.Meta) map[pagemap.Kind]uint64 {
	b.check(b.w.Drain())
	table, err := pagemap.New(meta.BlockPages())
	b.check(err)
	// Which generations are referred to, in the order in which they are met.
	type need struct{ segments, slots map[uint32]bool }
	needs := make(map[int]*need)
	refs := checkpoint.References{}
	onDisk := b.diskSlots(meta)
	entry := func(p *place) pagemap.Entry {
		if p.kind == pagemap.Disk {
			return pagemap.Make(pagemap.Disk, onDisk[p])
		}
		if p.generation == b.n {
			return pagemap.Make(p.kind, p.slot)
		}
		ref, ok := b.refs[p.generation]
		if !ok {
			ref = len(refs)
			b.refs[p.generation] = ref
			refs = append(refs, *b.images[p.generation])
			needs[p.generation] = &need{make(map[uint32]bool), make(map[uint32]bool)}
		}
		k, set, n := pagemap.Foreign, needs[p.generation].segments, uint32(p.slot/uint64(refs[ref].SegmentPages))
		switch p.kind {
		case pagemap.NVRAM:
			k, set, n = pagemap.ForeignNVRAM, needs[p.generation].slots, uint32(p.slot)
		case pagemap.Delta:
			k = pagemap.ForeignDelta
		}
		set[n] = true
		return pagemap.MakeForeign(k, ref, p.slot)
	}
	bases, err := pagemap.New(make([]uint64, 1+b.n))
	b.check(err)
	withBases := false
	b.check(b.c.PageMap.Runs(func(r pagemap.Run) error {
		for i := range r.Count {
			p := b.at[pageID{r.Block, r.Page + i}]
			if p == nil {
				table.Set(r.Block, r.Page+i, r.Entry(i))
				continue
			}
			table.Set(r.Block, r.Page+i, entry(p))
			if p.base == nil {
				continue
			}
			withBases = true
			base, space := entry(p.base), 0
			if p.generation != b.n {
				space = 1 + b.refs[p.generation]
			}
			bases.Grow(space, p.slot+1)
			bases.Set(space, p.slot, base)
		}
		return nil
	}))
	for generation, ref := range b.refs {
		r := &refs[ref]
		for n := range r.Segments {
			if needs[generation].segments[n] {
				r.NeedSegments = r.NeedSegments.Add(n)
			}
		}
		for n := range r.Slots {
			if needs[generation].slots[n] {
				r.NeedSlots = r.NeedSlots.Add(n)
			}
		}
	}
	meta.MapChunks, meta.Bases, meta.References = nil, nil, nil
	for i := range refs {
		meta.References = append(meta.References, refs[i].UUID)
	}
	if len(refs) > 0 {
		b.chunks(image.References, refs.Append(nil))
	}
	b.check(table.Encode(1000, func(at pagemap.Start, chunk []byte) error {
		meta.MapChunks = append(meta.MapChunks, at)
		b.chunks(image.PageMap, chunk)
		return nil
	}))
	if withBases {
		sizes := []uint64{uint64(b.w.Segments() * b.per)}
		for i := range refs {
			sizes = append(sizes, uint64(refs[i].Segments)*uint64(refs[i].SegmentPages))
		}
		sized, err := pagemap.New(sizes)
		b.check(err)
		for block, n := range sizes {
			for slot := range min(n, bases.Pages(block)) {
				sized.Set(block, slot, bases.Get(block, slot))
			}
		}
		b.check(sized.Encode(500, func(at pagemap.Start, chunk []byte) error {
			meta.Bases = append(meta.Bases, at)
			b.chunks(image.Bases, chunk)
			return nil
		}))
	}
	var counts source.Counts
	b.check(table.Runs(func(r pagemap.Run) error { source.Default.Count(&counts, r); return nil }))
	rep := &meta.Report
	rep.Hot, rep.Cold, rep.Disk, rep.Delta, rep.Unchanged = counts.Hot, counts.Cold, counts.Disk, counts.Delta, counts.Unchanged
	return table.Count()
}
