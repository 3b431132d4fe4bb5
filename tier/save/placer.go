package save

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/dedup"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/loose"
	"github.com/flic-migrate/flic-migrate/tier/nvram"
	"github.com/flic-migrate/flic-migrate/tier/pagemap"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/workingset"
)

// placer decides where a page's content goes, once for each record:
//
//	zero ───────────────────────────► page map
//	equal to a stored page (dedup) ─► page map: that page's slot
//	in the working set ─────────────► NVRAM slot
//	else ───────────────────────────► flash segment
//
// It owns the page map's entries, the open segments and the NVRAM region.
type placer struct {
	s        *saver
	pageSize int
	zero     []byte

	seg     *image.Buffer // open PAGES segment
	records *image.Buffer // open RECORDS segment: its payloads
	lengths []uint32      // of those payloads

	hot       hotSet
	nvfile    *nvram.File
	region    *nvram.Region
	slots     []checkpoint.NVRAMSlot // those given out
	rewritten []bool                 // slots whose content was replaced
	users     []uint32               // by slot: pages that have it
	free      []int                  // slots given out that no page has any more

	index      *dedup.Index
	chunkPages int
	last       placed // the page before, for chunks of two
	recent     segmentCache
	pairBuf    []byte // the chunk in hand
	fetchBuf   []byte // the stored one that Find compares it with
}

// placed remembers where the last page went.
type placed struct {
	block int
	page  uint64
	entry pagemap.Entry
	ok    bool // it took a slot of its own
}

// newPlacer returns a placer that still has to open its NVRAM.
func newPlacer(s *saver) *placer {
	p := &placer{s: s, pageSize: s.meta.PageSize, zero: make([]byte, s.meta.PageSize)}
	battery := s.o.Battery
	if battery == 0 {
		battery = dedup.DefaultBatteryThreshold
	}
	energy := s.o.Energy
	if energy == "" {
		energy = dedup.EnergyAuto
	}
	sample := s.o.SampleSize
	if sample == 0 {
		sample = dedup.DefaultSampleSize
	}
	p.chunkPages = energy.ChunkPages(dedup.PowerSupplyDir, battery)
	chunk := p.chunkPages * p.pageSize
	p.pairBuf, p.fetchBuf = make([]byte, chunk), make([]byte, chunk)
	// A full hash costs about 100 B; one for every eighth page at most keeps
	// the promise of 32 B a page.
	p.index = dedup.New(chunk, sample, max(1<<16, int(s.rep.Pages/8)), p)
	s.rep.ChunkSize, s.rep.SampleSize = chunk, sample
	return p
}

// workingSet is the set that the save was given, and with it, as hot as its
// hottest, the pages that resumes of the VM's newest checkpoint had to wait for.
// It is nil if there is neither. Otherwise it has, hotter than all, what were the
// guest's page tables in that checkpoint: most still are, and where they are now
// is not known before everything has been placed (findTables).
func (p *placer) workingSet() (*workingset.Set, error) {
	blocks := p.s.meta.WorkingSetBlocks()
	var given *workingset.Set
	if p.s.o.WorkingSet != nil {
		var err error
		if given, err = p.s.o.WorkingSet.Bind(p.pageSize, blocks); err != nil {
			return nil, fmt.Errorf("working set: %w", err)
		}
	}
	touched := p.learned(blocks)
	if len(touched) == 0 && given == nil {
		return nil, nil
	}
	tables := p.formerTables(blocks)
	if len(touched) == 0 && len(tables) == 0 {
		return given, nil
	}
	ws, err := workingset.New(p.pageSize, blocks)
	if err != nil {
		return nil, err
	}
	hottest := uint8(1)
	if given != nil {
		if err := ws.Merge(given); err != nil {
			return nil, err
		}
		for heat, n := range given.Histogram() {
			if n > 0 && heat > 0 {
				hottest = uint8(heat)
			}
		}
	}
	ws.AddTouched(touched, hottest)
	ws.AddTouched(tables, 255)
	return ws, nil
}

// learned is what resumes of the VM's newest checkpoint had to wait for. That
// it is missing or damaged costs a hint and no save.
func (p *placer) learned(blocks []workingset.Block) []workingset.PageRun {
	if p.s.st == nil {
		return nil
	}
	newest, err := p.s.st.Resolve(p.s.ctx, store.Ref{VM: p.s.o.VM})
	if err != nil {
		return nil
	}
	t, err := p.s.st.Touched(p.s.ctx, newest)
	if err != nil {
		p.s.o.Log.Warn("what resumes have learned can't be used", "error", err)
		return nil
	}
	return t.Bind(p.pageSize, blocks)
}

// formerTables are the page tables that the VM's newest checkpoint had.
func (p *placer) formerTables(blocks []workingset.Block) []workingset.PageRun {
	m := p.s.parent
	if m == nil {
		return nil
	}
	t := workingset.Touched{PageSize: m.PageSize, Runs: m.PageTables}
	for _, b := range m.Blocks {
		t.Blocks = append(t.Blocks, b.Name)
	}
	return t.Bind(p.pageSize, blocks)
}

// openNVRAM reserves room for the working set, if there is one.
func (p *placer) openNVRAM() error {
	o := &p.s.o
	if o.NVRAM == "" || p.s.st == nil {
		return nil
	}
	ws, err := p.workingSet()
	if err != nil || ws == nil {
		return err
	}
	var hot int64
	for heat, n := range ws.Histogram() {
		if heat > 0 {
			hot += n
		}
	}
	if hot == 0 {
		return nil
	}
	want := (hot + p.expectTables()) * int64(p.pageSize)
	p.region, p.nvfile, err = p.s.tx.Reserve(p.s.ctx, store.Reservation{
		Path: o.NVRAM, Capacity: o.NVRAMSize, Format: o.NVRAMFormat, Volatile: o.VolatileNVRAM, Bytes: want, PageSize: p.pageSize,
	})
	if err != nil {
		return err
	}
	p.hot = newHotSet(ws, int64(p.region.Slots()))
	p.s.rep.Surplus = max(0, hot-int64(p.region.Slots()))
	n := p.region.Slots()
	p.rewritten, p.users = make([]bool, n), make([]uint32, n)
	return nil
}

// set replaces a page's entry. It is the only one who does, so that it is known
// who uses a slot.
func (p *placer) set(block int, page uint64, e pagemap.Entry) {
	old := p.s.table.Set(block, page, e)
	if old == e {
		return
	}
	if e.Kind() == pagemap.NVRAM {
		p.users[e.Value()]++
	}
	switch old.Kind() {
	case pagemap.NVRAM:
		p.s.rep.Superseded++
		// Slots that were taken back are not there any more.
		if p.users[old.Value()]--; p.users[old.Value()] == 0 && old.Value() < uint64(len(p.slots)) {
			p.free = append(p.free, int(old.Value()))
		}
	case pagemap.Flash:
		p.s.rep.Superseded++
		p.s.rep.SupersededFlash++
	}
}

// fill places a ZERO record.
func (p *placer) fill(block int, page uint64, fill byte) {
	p.last.ok = false
	p.set(block, page, pagemap.Make(pagemap.Fill, uint64(fill)))
}

// page places a page's content.
func (p *placer) page(block int, page uint64, data []byte) error {
	if data[0] == 0 && bytes.Equal(data, p.zero) {
		p.last.ok = false
		p.set(block, page, pagemap.Make(pagemap.ZeroData, 0))
		return nil
	}
	p.s.rep.NonZeroBytes += int64(len(data))
	hot := p.hot.has(block, page)
	if hot {
		if done, err := p.rewrite(block, page, data); done || err != nil {
			return err
		}
	}
	if p.chunkPages == 1 {
		return p.single(block, page, data, hot)
	}
	return p.paired(block, page, data, hot)
}

// rewrite puts a page that has an NVRAM slot of its own into it again.
func (p *placer) rewrite(block int, page uint64, data []byte) (done bool, err error) {
	e := p.s.table.Get(block, page)
	if e.Kind() != pagemap.NVRAM || p.users[e.Value()] > 1 {
		return false, nil
	}
	p.last.ok = false
	p.rewritten[e.Value()] = true
	p.slots[e.Value()].CRC = integrity.Checksum(data)
	return true, p.region.Write(int(e.Value()), data)
}

// single deduplicates pages one by one.
func (p *placer) single(block int, page uint64, data []byte, hot bool) error {
	at, found, pending, err := p.index.Find(data)
	if err != nil {
		return err
	}
	e := placeEntry(at)
	// A hot page that equals a cold one is stored a second time: what the
	// guest waits for must not be on flash.
	if found && !(hot && e.Kind() == pagemap.Flash) {
		p.share(block, page, e)
		return nil
	}
	if e, err = p.store(block, page, data, hot); err != nil {
		return err
	}
	p.set(block, page, e)
	if !found {
		p.index.Add(pending, entryPlace(e))
	}
	return nil
}

func (p *placer) share(block int, page uint64, e pagemap.Entry) {
	p.s.rep.Duplicate++
	p.set(block, page, e)
}

// paired deduplicates aligned pairs of pages that come one after the other. A
// page is stored as it comes; when its pair is whole and known, both are taken
// back out of the open segment.
func (p *placer) paired(block int, page uint64, data []byte, hot bool) error {
	e, err := p.store(block, page, data, hot)
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
	at, found, pending, err := p.index.Find(chunk)
	if err != nil {
		return err
	}
	known := placeEntry(at)
	switch {
	case !found:
		p.index.Add(pending, entryPlace(first.entry))
	case known.Kind() == pagemap.NVRAM || e.Kind() == pagemap.Flash:
		p.takeBack()
		for i, pg := range []uint64{first.page, page} {
			p.s.rep.Superseded-- // nothing was stored after all
			if e.Kind() == pagemap.Flash {
				p.s.rep.SupersededFlash--
			}
			p.share(block, pg, known+pagemap.Entry(i))
		}
	}
	return nil
}

// canTakeBack tells whether the pair that starts at e can still be removed.
func (p *placer) canTakeBack(e pagemap.Entry) bool {
	if e.Kind() == pagemap.NVRAM {
		return e.Value()+2 == uint64(len(p.slots)) // and not slots used again
	}
	return p.seg != nil && e.Value() >= uint64(p.seg.Number)*uint64(p.segmentPages())
}

// takeBack frees the two slots that were given out last.
func (p *placer) takeBack() {
	if p.last.entry.Kind() == pagemap.NVRAM {
		p.slots = p.slots[:len(p.slots)-2]
		return
	}
	p.seg.Data = p.seg.Data[:len(p.seg.Data)-2*p.pageSize]
}

// pair is the content of the two slots from e on.
func (p *placer) pair(e pagemap.Entry) ([]byte, error) {
	for i := range 2 {
		if err := p.content(p.pairBuf[i*p.pageSize:(i+1)*p.pageSize], e+pagemap.Entry(i)); err != nil {
			return nil, err
		}
	}
	return p.pairBuf, nil
}

// store gives content a slot of its own.
func (p *placer) store(block int, page uint64, data []byte, hot bool) (pagemap.Entry, error) {
	if hot && p.room() {
		slot := p.takeSlot()
		p.slots[slot] = checkpoint.NVRAMSlot{CRC: integrity.Checksum(data), Block: uint32(block), Page: page}
		return pagemap.Make(pagemap.NVRAM, uint64(slot)), p.region.Write(slot, data)
	}
	// A full segment leaves when the next page comes, so that a pair in it
	// can be taken back until then.
	if p.seg != nil && len(p.seg.Data) == p.segmentPages()*p.pageSize {
		if err := p.submitSegment(); err != nil {
			return 0, err
		}
	}
	if p.seg == nil {
		p.seg = p.s.img.NewBuffer(image.Pages)
	}
	slot := uint64(p.seg.Number)*uint64(p.segmentPages()) + uint64(len(p.seg.Data)/p.pageSize)
	p.seg.Data = append(p.seg.Data, data...)
	return pagemap.Make(pagemap.Flash, slot), nil
}

// room tells whether there is an NVRAM slot for one more page.
func (p *placer) room() bool {
	return p.region != nil && (len(p.free) > 0 || len(p.slots) < p.region.Slots())
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
	return len(p.slots) - 1
}

func (p *placer) segmentPages() int { return p.s.img.SegmentPages() }

func (p *placer) submitSegment() error {
	b := p.seg
	p.seg = nil
	if b == nil {
		return nil
	}
	if len(b.Data) == 0 {
		p.s.img.Discard(b)
		return nil
	}
	return p.s.img.Submit(b)
}

// record places a COMPRESS_PAGE record's payload as it is.
func (p *placer) record(block int, page uint64, payload []byte) error {
	if err := ramparse.Inflate(p.s.scratch, payload); err != nil {
		return fmt.Errorf("compressed page %d of block %d: %w", page, block, err)
	}
	p.last.ok = false
	p.s.rep.NonZeroBytes += int64(p.pageSize)
	if p.records != nil && (len(p.lengths) == p.segmentPages() ||
		4+4*(len(p.lengths)+1)+len(p.records.Data)+len(payload) > cap(p.records.Data)) {
		if err := p.submitRecords(); err != nil {
			return err
		}
	}
	if p.records == nil {
		p.records = p.s.img.NewBuffer(image.Records)
	}
	slot := uint64(p.records.Number)*uint64(p.segmentPages()) + uint64(len(p.lengths))
	p.lengths = append(p.lengths, uint32(len(payload)))
	p.records.Data = append(p.records.Data, payload...)
	p.set(block, page, pagemap.Make(pagemap.Flash, slot))
	return nil
}

// submitRecords puts the lengths before the payloads and hands the segment on.
func (p *placer) submitRecords() error {
	b := p.records
	p.records = nil
	if b == nil {
		return nil
	}
	payloads := append([]byte(nil), b.Data...)
	b.Data = binary.BigEndian.AppendUint32(b.Data[:0], uint32(len(p.lengths)))
	for _, n := range p.lengths {
		b.Data = binary.BigEndian.AppendUint32(b.Data, n)
	}
	b.Data = append(b.Data, payloads...)
	p.lengths = p.lengths[:0]
	return p.s.img.Submit(b)
}

// flush hands on whatever is still open.
func (p *placer) flush() error {
	p.last.ok = false
	if err := p.submitSegment(); err != nil {
		return err
	}
	return p.submitRecords()
}

func (p *placer) syncNVRAM() error {
	if p.region == nil {
		return nil
	}
	return p.region.Sync()
}

// writeNVRAMPart gives surplus extents back and describes the others.
func (p *placer) writeNVRAMPart() error {
	if p.region == nil {
		return nil
	}
	if err := p.region.Trim(p.s.ctx, len(p.slots)); err != nil {
		return err
	}
	if len(p.slots) == 0 {
		return nil
	}
	p.s.meta.NVRAM = &checkpoint.NVRAM{
		Path: p.nvfile.Path(), UUID: p.nvfile.UUID(), Slots: len(p.slots), Bytes: p.nvramBytes(), Volatile: p.nvfile.Volatile(),
	}
	part := checkpoint.NVRAMPart{Extents: p.region.Extents(), Slots: p.slots}
	for b := part.Append(nil); len(b) > 0; {
		n := min(len(b), image.MaxChunk)
		if err := p.s.chunk(image.NVRAM, b[:n]); err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

func (p *placer) nvramBytes() int64 { return int64(len(p.slots)) * int64(p.pageSize) }

func (p *placer) report(r *checkpoint.Report) {
	r.NVRAMBytes = p.nvramBytes()
	r.SampledBytes, r.HashedBytes = p.index.SampledBytes, p.index.HashedBytes
}

// content copies the content of a page with entry e into dst.
func (p *placer) content(dst []byte, e pagemap.Entry) error {
	switch e.Kind() {
	case pagemap.Absent, pagemap.ZeroData:
		clear(dst)
		return nil
	case pagemap.Fill:
		for i := range dst {
			dst[i] = byte(e.Value())
		}
		return nil
	case pagemap.NVRAM:
		return p.region.ReadPage(int(e.Value()), dst)
	}
	n, i := uint32(e.Value()/uint64(p.segmentPages())), int(e.Value()%uint64(p.segmentPages()))
	if data := p.inMemory(n); data != nil {
		copy(dst, data[i*p.pageSize:(i+1)*p.pageSize])
		return nil
	}
	if p.records != nil && n == p.records.Number {
		if err := p.submitRecords(); err != nil {
			return err
		}
	}
	seg, err := p.recent.get(p.s.img, n)
	if err != nil {
		return err
	}
	if seg.Kind == image.Records {
		payload, err := seg.Record(i)
		if err != nil {
			return err
		}
		return ramparse.Inflate(dst, payload)
	}
	b, err := seg.Page(i)
	copy(dst, b)
	return err
}

// inMemory is the content of a PAGES segment that is open or whose buffer has
// not been used again, which spares most fetches the way over the file.
func (p *placer) inMemory(n uint32) []byte {
	if p.seg != nil && n == p.seg.Number {
		return p.seg.Data
	}
	return p.s.img.Recent(n)
}

// Fetch implements dedup.Source.
func (p *placer) Fetch(at dedup.Place) ([]byte, error) {
	e := placeEntry(at)
	for i := range p.chunkPages {
		err := p.content(p.fetchBuf[i*p.pageSize:(i+1)*p.pageSize], e+pagemap.Entry(i))
		if errors.Is(err, loose.ErrGone) {
			err = dedup.ErrGone
		}
		if err != nil {
			return nil, err
		}
	}
	return p.fetchBuf, nil
}

// Stale implements dedup.Source: an NVRAM slot that was written again holds
// something else, and one that nobody uses will.
func (p *placer) Stale(at dedup.Place) bool {
	e := placeEntry(at)
	if e.Kind() != pagemap.NVRAM {
		return false
	}
	for i := range uint64(p.chunkPages) {
		if slot := e.Value() + i; p.rewritten[slot] || p.users[slot] == 0 {
			return true
		}
	}
	return false
}

// A dedup.Place is a slot and, in bit 0, whether it is one of flash.

func entryPlace(e pagemap.Entry) dedup.Place {
	at := dedup.Place(e.Value() << 1)
	if e.Kind() == pagemap.Flash {
		at |= 1
	}
	return at
}

func placeEntry(at dedup.Place) pagemap.Entry {
	if at&1 != 0 {
		return pagemap.Make(pagemap.Flash, uint64(at>>1))
	}
	return pagemap.Make(pagemap.NVRAM, uint64(at>>1))
}

// hotSet is the part of a working set that the NVRAM region has room for: all
// pages hotter than min, and those of heat min up to a boundary in block and
// address order.
type hotSet struct {
	ws       *workingset.Set
	min      uint8
	boundary struct {
		block int
		page  int64 // the first that is out
	}
}

func newHotSet(ws *workingset.Set, room int64) hotSet {
	h := hotSet{ws: ws}
	var left int64
	h.min, left = ws.Threshold(room)
	for b := range ws.Blocks() {
		for r := range ws.Runs(b, h.min, h.min) {
			h.boundary.block = b
			if r.N > left {
				h.boundary.page = r.First + left
				return h
			}
			left -= r.N
			h.boundary.page = r.First + r.N
		}
	}
	h.boundary.block = len(ws.Blocks())
	return h
}

func (h *hotSet) has(block int, page uint64) bool {
	if h.ws == nil {
		return false
	}
	heat := h.ws.Heat(block, int64(page))
	return heat > 0 && (heat > h.min || heat == h.min &&
		(block < h.boundary.block || block == h.boundary.block && int64(page) < h.boundary.page))
}

// segmentCache keeps the segments that were read back last. What get returns is
// valid until the next get.
type segmentCache struct {
	reader image.SegmentReader
	slots  [cachedSegments]*image.Segment
	next   int
}

const cachedSegments = 16

func (c *segmentCache) get(w *image.Writer, n uint32) (*image.Segment, error) {
	for _, s := range c.slots {
		if s != nil && s.Number == n {
			return s, nil
		}
	}
	oldest := &c.slots[c.next]
	c.next = (c.next + 1) % len(c.slots)
	c.reader.Recycle(*oldest)
	s, err := w.ReadSegment(&c.reader, n)
	*oldest = s // nil if it failed
	return s, err
}
