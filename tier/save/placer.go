package save

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/stream"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/dedup"
	"github.com/flic-migrate/flic-migrate/tier/digest"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/nvram"
	"github.com/flic-migrate/flic-migrate/tier/pagemap"
	"github.com/flic-migrate/flic-migrate/tier/source"
)

// placer decides where a page's content goes, once for each record:
//
//	zero ───────────────────────────► page map
//	the parent's (matcher) ─────────► page map: where that is
//	a disk's (matcher) ─────────────► page map: where that is
//	another image's (matcher) ──────► page map: where that is
//	equal to a stored page (dedup) ─► page map: that page's slot
//	in the working set ─────────────► NVRAM slot
//	the parent's, with changes ─────► delta in a flash segment
//	else ───────────────────────────► flash segment
//
// It reads back what it has placed where a later record needs it: a difference
// (XBZRLE), and a chunk that may be equal.
type placer struct {
	to       target
	pageSize int
	zero     []byte
	scratch  []byte // a page in the making: of a difference, or on its way to another tier

	seg     *image.Buffer // open PAGES segment
	records packed        // open RECORDS segment
	deltas  packed        // open DELTAS segment
	bases   []deltaBase   // of all deltas so far, by rising slot

	disk diskPages // pages that are on disks, and bases

	slots     []checkpoint.NVRAMSlot // those given out
	sums      []digest.Sum           // of their pages, if digests are kept
	rewritten []bool                 // slots whose content was replaced
	users     []uint32               // by slot: pages that have it
	free      []int                  // slots given out that no page has any more

	index      *dedup.Index
	chunkPages int
	last       placed // the page before, for chunks of two
	back       *readback
	pairBuf    []byte // the chunk in hand
	fetchBuf   []byte // a stored one, for its digest

	count counts
}

// target is where a placer puts pages. All of it is the placer's own while it works.
type target struct {
	pages  *pagemap.Builder
	par    *parent   // what was compared with; nil: there is none
	disks  *disks    // that pages may be on; nil: there are none
	shared *shared   // other images that pages may be in; nil: there are none
	refs   *refs     // that are referred to; nil: none can be
	peers  *peerRefs // nil: it has none
	img    *image.Writer
	hash   *digest.Hasher // nil: no digests are kept
	region *nvram.Region  // nil: every page is cold
	hot    hotSet         // the pages that the region is for
}

// counts is what a placer has done so far, as the report has it.
type counts struct {
	NonZeroBytes, Duplicate, Superseded, SupersededFlash, Surplus, DeltaBytes, Moved, Similar, Shared, Peers int64
}

// placed remembers where the last page went.
type placed struct {
	block int
	page  uint64
	entry pagemap.Entry
	ok    bool // it took a slot of its own
}

// newPlacer returns a placer into t. Pages are compared in chunks of chunkPages, 1 or
// 2, by a sample of so many bytes, and confirmed by at most maxHashes full hashes.
func newPlacer(t target, pageSize, chunkPages, sample, maxHashes int) *placer {
	p := &placer{
		to: t, pageSize: pageSize, chunkPages: chunkPages,
		zero: make([]byte, pageSize), scratch: make([]byte, pageSize),
		pairBuf: make([]byte, chunkPages*pageSize), fetchBuf: make([]byte, chunkPages*pageSize),
	}
	p.back = newReadback(p)
	hash := t.hash
	if hash == nil {
		hash = digest.Fresh() // for this save only
	}
	p.index = dedup.New(chunkPages*pageSize, sample, maxHashes, hash, p)
	if t.region != nil {
		n := t.region.Slots()
		p.rewritten, p.users = make([]bool, n), make([]uint32, n)
	}
	return p
}

// has tells whether a page has come.
func (p *placer) has(block int, page uint64) bool {
	return p.to.pages.Get(block, page).Kind() != pagemap.Absent
}

// put places the page of a record.
func (p *placer) put(rec *ramparse.Record) error {
	switch rec.Kind {
	case ramparse.Zero:
		p.fill(rec.Block, rec.Page, rec.Fill)
		return nil
	case ramparse.Page:
		return p.page(rec.Block, rec.Page, rec.Data, digest.Sum{})
	case ramparse.Compressed:
		return p.record(rec.Block, rec.Page, rec.Data)
	}
	return p.difference(rec)
}

// difference places a page as an XBZRLE record changes it.
func (p *placer) difference(rec *ramparse.Record) error {
	data, err := p.changed(rec)
	if err != nil {
		return err
	}
	return p.page(rec.Block, rec.Page, data, digest.Sum{})
}

// changed is a page as an XBZRLE record changes it, wherever its last content is by now;
// valid until the next page is placed. A page that has not come has none: ROM is not
// zero in a destination.
func (p *placer) changed(rec *ramparse.Record) ([]byte, error) {
	if !p.has(rec.Block, rec.Page) {
		return nil, stream.Damaged("xbzrle page", rec.Offset, "a difference to a page that has not come")
	}
	if err := p.read(p.scratch, rec.Block, rec.Page); err != nil {
		return nil, err
	}
	if err := ramparse.ApplyXBZRLE(p.scratch, rec.Data); err != nil {
		return nil, stream.Damaged("xbzrle page", rec.Offset, "%v", err)
	}
	return p.scratch, nil
}

// set replaces a page's entry. It is the only one who does, so that it is known
// who uses a slot.
func (p *placer) set(block int, page uint64, e pagemap.Entry) {
	old := p.to.pages.Set(block, page, e)
	if old == e {
		return
	}
	if inNVRAM(e) {
		p.users[e.Value()]++
	}
	switch {
	case inNVRAM(old):
		p.count.Superseded++
		// Slots that were taken back are not there any more.
		if p.users[old.Value()]--; p.users[old.Value()] == 0 && old.Value() < uint64(len(p.slots)) {
			p.free = append(p.free, int(old.Value()))
		}
	case inFlash(old) || isDelta(old):
		p.count.Superseded++
		p.count.SupersededFlash++
	}
}

// fill places a ZERO record.
func (p *placer) fill(block int, page uint64, fill byte) {
	p.last.ok = false
	p.set(block, page, pagemap.Make(pagemap.Fill, uint64(fill)))
}

// page places a page's content, whose digest is given if it is known, zero otherwise.
func (p *placer) page(block int, page uint64, data []byte, sum digest.Sum) error {
	if data[0] == 0 && bytes.Equal(data, p.zero) {
		p.last.ok = false
		p.set(block, page, pagemap.Make(pagemap.ZeroData, 0))
		return nil
	}
	p.count.NonZeroBytes += int64(len(data))
	hot := p.to.hot.has(block, page)
	if hot {
		if done, err := p.rewrite(block, page, data); done || err != nil {
			return err
		}
	}
	if p.chunkPages == 1 {
		return p.single(block, page, data, hot, sum)
	}
	return p.paired(block, page, data, hot, sum)
}

// rewrite puts a page that has an NVRAM slot of its own into it again.
func (p *placer) rewrite(block int, page uint64, data []byte) (done bool, err error) {
	e := p.to.pages.Get(block, page)
	if !inNVRAM(e) || p.users[e.Value()] > 1 {
		return false, nil
	}
	p.last.ok = false
	p.rewritten[e.Value()] = true
	return true, p.write(int(e.Value()), block, page, data)
}

// write puts a page into a slot that has been given out.
func (p *placer) write(slot, block int, page uint64, data []byte) error {
	p.slots[slot] = checkpoint.NVRAMSlot{CRC: integrity.Checksum(data), Block: uint32(block), Page: page}
	if p.to.hash != nil {
		p.to.hash.Put(&p.sums[slot], data)
	}
	return p.to.region.Write(slot, data)
}

// single deduplicates pages one by one.
func (p *placer) single(block int, page uint64, data []byte, hot bool, sum digest.Sum) error {
	at, found, pending, err := p.index.Find(data, sum)
	if err != nil {
		return err
	}
	sum = pending.Digest
	e := placeEntry(at)
	// A hot page that equals a cold one is stored a second time: what the
	// guest waits for must not be on flash.
	if found && !(hot && inFlash(e)) {
		p.share(block, page, e)
		return nil
	}
	if p.to.peers != nil && !(hot && p.room()) {
		if e, theirs, err := p.inPeer(data, &sum); err != nil {
			return err
		} else if theirs {
			p.set(block, page, e)
			return nil
		}
	}
	if e, err = p.store(block, page, data, hot, sum); err != nil {
		return err
	}
	p.set(block, page, e)
	if !found {
		p.index.Add(pending, entryPlace(e))
	}
	return nil
}

func (p *placer) share(block int, page uint64, e pagemap.Entry) {
	p.count.Duplicate++
	p.set(block, page, e)
}

// paired deduplicates aligned pairs of pages that come one after the other. A
// page is stored as it comes; when its pair is whole and known, both are taken
// back out of the open segment.
func (p *placer) paired(block int, page uint64, data []byte, hot bool, sum digest.Sum) error {
	e, err := p.store(block, page, data, hot, sum)
	if err != nil {
		return err
	}
	p.set(block, page, e)
	first := p.last
	p.last = placed{block, page, e, true}
	if page%2 == 0 || !first.ok || first.block != block || first.page+1 != page || first.entry+1 != e ||
		!p.canTakeBack(first.entry) {
		return nil
	}
	p.last.ok = false
	chunk, err := p.pair(first.entry)
	if err != nil {
		return err
	}
	at, found, pending, err := p.index.Find(chunk, digest.Sum{})
	if err != nil {
		return err
	}
	known := placeEntry(at)
	switch {
	case !found:
		p.index.Add(pending, entryPlace(first.entry))
	case inNVRAM(known) || inFlash(e):
		p.takeBack()
		for i, pg := range []uint64{first.page, page} {
			p.count.Superseded-- // nothing was stored after all
			if inFlash(e) {
				p.count.SupersededFlash--
			}
			p.share(block, pg, known+pagemap.Entry(i))
		}
	}
	return nil
}

// canTakeBack tells whether the pair that starts at e can still be removed.
func (p *placer) canTakeBack(e pagemap.Entry) bool {
	if inNVRAM(e) {
		return e.Value()+2 == uint64(len(p.slots)) // and not slots used again
	}
	return p.seg != nil && e.Value() >= uint64(p.seg.Number)*uint64(p.segmentPages())
}

// takeBack frees the two slots that were given out last.
func (p *placer) takeBack() {
	if inNVRAM(p.last.entry) {
		p.slots = p.slots[:len(p.slots)-2]
		if p.to.hash != nil {
			p.sums = p.sums[:len(p.slots)]
		}
		return
	}
	p.seg.Data = p.seg.Data[:len(p.seg.Data)-2*p.pageSize]
	p.seg.Sums = p.seg.Sums[:len(p.seg.Sums)-2]
}

// pair is the content of the two slots from e on.
func (p *placer) pair(e pagemap.Entry) ([]byte, error) {
	if inFlash(e) {
		// It can be taken back, so it is in the open segment.
		i := int(e.Value()-uint64(p.seg.Number)*uint64(p.segmentPages())) * p.pageSize
		return p.seg.Data[i : i+2*p.pageSize], nil
	}
	for i := range 2 {
		if err := p.back.content(p.pairBuf[i*p.pageSize:(i+1)*p.pageSize], source.Page{}, e+pagemap.Entry(i)); err != nil {
			return nil, err
		}
	}
	return p.pairBuf, nil
}

// store gives content a slot of its own.
func (p *placer) store(block int, page uint64, data []byte, hot bool, sum digest.Sum) (pagemap.Entry, error) {
	if hot && p.room() {
		slot := p.takeSlot()
		return pagemap.Make(pagemap.NVRAM, uint64(slot)), p.write(slot, block, page, data)
	}
	slot, err := p.nextSlot()
	if err != nil {
		return 0, err
	}
	p.seg.Data, p.seg.Sums = append(p.seg.Data, data...), append(p.seg.Sums, sum)
	return pagemap.Make(pagemap.Flash, slot), nil
}

// nextSlot is the flash slot of the page that is stored next.
func (p *placer) nextSlot() (uint64, error) {
	// A full segment leaves when the next page comes, so that a pair in it
	// can be taken back until then.
	if p.seg != nil && len(p.seg.Data) == p.segmentPages()*p.pageSize {
		if err := p.submitSegment(); err != nil {
			return 0, err
		}
	}
	if p.seg == nil {
		p.seg = p.to.img.NewBuffer(image.Pages)
	}
	return uint64(p.seg.Number)*uint64(p.segmentPages()) + uint64(len(p.seg.Data)/p.pageSize), nil
}

// inPeer is where another member of the group has a page. If none has, the others will look
// for it where this one stores it next.
func (p *placer) inPeer(data []byte, sum *digest.Sum) (e pagemap.Entry, theirs bool, err error) {
	slot, err := p.nextSlot()
	if err != nil {
		return 0, false, err
	}
	if *sum == (digest.Sum{}) {
		p.to.hash.Put(sum, data)
	}
	member, at, theirs := p.to.peers.self.place(*sum, slot)
	if !theirs {
		return 0, false, nil
	}
	return p.to.peers.entry(member, at), true, nil
}

// room tells whether there is an NVRAM slot for one more page.
func (p *placer) room() bool {
	return p.to.region != nil && (len(p.free) > 0 || len(p.slots) < p.to.region.Slots())
}

// takeSlot gives out a slot that has been freed, or else the next: hot pages that
// come again and again must not use up what is reserved for the others.
func (p *placer) takeSlot() int {
	if n := len(p.free); n > 0 {
		slot := p.free[n-1]
		p.free = p.free[:n-1]
		p.rewritten[slot] = true
		return slot
	}
	p.slots = append(p.slots, checkpoint.NVRAMSlot{})
	if p.to.hash != nil {
		p.sums = append(p.sums, digest.Sum{})
	}
	return len(p.slots) - 1
}

func (p *placer) segmentPages() int { return p.to.img.SegmentPages() }

func (p *placer) submitSegment() error {
	b := p.seg
	p.seg = nil
	if b == nil {
		return nil
	}
	if len(b.Data) == 0 {
		p.to.img.Discard(b)
		return nil
	}
	return p.to.img.Submit(b)
}

// record places a COMPRESS_PAGE record's payload as it is.
func (p *placer) record(block int, page uint64, payload []byte) error {
	if err := ramparse.Inflate(p.scratch, payload); err != nil {
		return fmt.Errorf("compressed page %d of block %d: %w", page, block, err)
	}
	p.last.ok = false
	p.count.NonZeroBytes += int64(p.pageSize)
	var sum digest.Sum
	if p.to.hash != nil {
		sum = p.to.hash.Sum(p.scratch)
	}
	slot, err := p.pack(&p.records, image.Records, payload, 0, sum)
	if err == nil {
		p.set(block, page, pagemap.Make(pagemap.Flash, slot))
	}
	return err
}

// deltaBase is what the delta in a slot is against.
type deltaBase struct {
	slot uint64
	base pagemap.Entry
}

// base is what the delta in a slot is against.
func (p *placer) base(slot uint64) pagemap.Entry {
	i, _ := slices.BinarySearchFunc(p.bases, slot, func(b deltaBase, slot uint64) int { return cmp.Compare(b.slot, slot) })
	return p.bases[i].base
}

// matched places a page record that has been compared with the parent and looked for on
// disks.
func (p *placer) matched(it *item) error {
	if it.fill >= 0 {
		p.fill(it.block, it.page, byte(it.fill))
		return nil
	}
	// What the guest waits for must not be on flash.
	if it.found == isNew || it.found == isZero || it.hot && it.cold && p.room() {
		return p.page(it.block, it.page, it.data, it.sum)
	}
	p.last.ok = false
	p.count.NonZeroBytes += int64(p.pageSize)
	// Of a page that is on a disk, and of a base, the digest is kept.
	if onDisk(it.entry) {
		sum := it.sum
		if it.found == isChanged {
			sum = it.baseSum
		}
		p.disk.add(checkpoint.DiskSlot(it.entry.Value()), sum)
	}
	if it.found == isEqual || it.found == isOnDisk || it.found == isShared {
		if it.moved {
			p.count.Moved++
		}
		p.set(it.block, it.page, it.entry)
		return nil
	}
	mark := uint32(0)
	if it.pieces {
		mark = image.InPieces
		p.count.Similar++
	}
	slot, err := p.pack(&p.deltas, image.Deltas, it.delta, mark, it.sum)
	if err != nil {
		return err
	}
	p.count.DeltaBytes += int64(len(it.delta))
	p.bases = append(p.bases, deltaBase{slot, it.entry})
	p.set(it.block, it.page, pagemap.Make(pagemap.Delta, slot))
	return nil
}

// packed is an open segment of payloads of any length, RECORDS or DELTAS.
type packed struct {
	buf     *image.Buffer // the payloads; nil: none is open
	lengths []uint32
}

// pack puts a payload, which stands for a page with the given digest, into an open
// segment, and returns its slot. mark is put to its length.
func (p *placer) pack(k *packed, kind image.Kind, payload []byte, mark uint32, sum digest.Sum) (slot uint64, err error) {
	if k.buf != nil && (len(k.lengths) == p.segmentPages() ||
		4+4*(len(k.lengths)+1)+len(k.buf.Data)+len(payload) > cap(k.buf.Data)) {
		if err := p.submitPacked(k); err != nil {
			return 0, err
		}
	}
	if k.buf == nil {
		k.buf = p.to.img.NewBuffer(kind)
	}
	slot = uint64(k.buf.Number)*uint64(p.segmentPages()) + uint64(len(k.lengths))
	k.lengths = append(k.lengths, uint32(len(payload))|mark)
	k.buf.Data = append(k.buf.Data, payload...)
	if p.to.hash != nil {
		k.buf.Sums = append(k.buf.Sums, sum)
	}
	return slot, nil
}

// submitPacked puts the lengths before the payloads and hands the segment on.
func (p *placer) submitPacked(k *packed) error {
	b := k.buf
	k.buf = nil
	if b == nil {
		return nil
	}
	payloads := append([]byte(nil), b.Data...)
	b.Data = binary.BigEndian.AppendUint32(b.Data[:0], uint32(len(k.lengths)))
	for _, n := range k.lengths {
		b.Data = binary.BigEndian.AppendUint32(b.Data, n)
	}
	b.Data = append(b.Data, payloads...)
	k.lengths = k.lengths[:0]
	return p.to.img.Submit(b)
}

// flush hands on whatever is still open.
func (p *placer) flush() error {
	p.last.ok = false
	if err := p.submitSegment(); err != nil {
		return err
	}
	if err := p.submitPacked(&p.records); err != nil {
		return err
	}
	return p.submitPacked(&p.deltas)
}

func (p *placer) nvramBytes() int64 { return int64(len(p.slots)) * int64(p.pageSize) }

// report adds what was done to a save's report.
func (p *placer) report(r *checkpoint.Report) {
	r.NVRAMBytes = p.nvramBytes()
	r.SampledBytes, r.HashedBytes = p.index.SampledBytes, p.index.HashedBytes
	c := &p.count
	r.NonZeroBytes, r.Duplicate, r.Surplus, r.DeltaBytes = c.NonZeroBytes, c.Duplicate, c.Surplus, c.DeltaBytes
	r.Superseded, r.SupersededFlash, r.Moved, r.Similar = c.Superseded, c.SupersededFlash, c.Moved, c.Similar
	var n source.Counts
	p.to.pages.Runs(func(run pagemap.Run) error {
		source.Default.Count(&n, run)
		return nil
	})
	r.Zero, r.ZeroAsData, r.Hot, r.Cold = n.Zero, n.ZeroAsData, n.Hot, n.Cold
	r.Disk, r.Delta, r.Unchanged, r.Shared, r.Peers = n.Disk, n.Delta, n.Unchanged-c.Shared-c.Peers, c.Shared, c.Peers
}
