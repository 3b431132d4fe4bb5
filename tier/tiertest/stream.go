// Package tiertest makes synthetic migration streams for tests of package tier
// and loads streams as a destination would.
//
// A stream is a pure function of its Options: pages and their order follow from
// hashes, so it can have any length without being held in memory, can be read
// again, and says for each page what a guest must have after it.
package tiertest

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"iter"
	"math/bits"
	"strings"

	"github.com/klauspost/compress/zlib"

	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/stream"
)

// Block is a RAM block.
type Block struct {
	Name     string
	Size     uint64 // bytes, a multiple of 1024
	HostPage uint64 // host page size to be written into the setup; 0: none
	Shared   bool   // listed and never sent; with Options.IgnoreShared, or Early: unplugged
}

// Unknown is something in the middle of a stream that no version so far sends.
type Unknown uint8

// The unknown things.
const (
	Nothing Unknown = iota
	Record          // a RAM record with an unknown flag
	Section         // an iterable section that can't be delimited
)

// Options shape a stream. The zero value is a plain one of a stopped guest
// with 1 MiB of RAM: header, configuration, one pass, device tail,
// vmdescription.
type Options struct {
	Seed     uint64
	Machine  string  // machine type; "": pc-q35-7.2
	Blocks   []Block // nil: pc.ram of 1 MiB
	PageSize int     // bytes; 0: 4096
	// PageBits writes the subsection configuration/target-page-bits, Advise
	// a POSTCOPY_ADVISE command. Without either a reader has to infer a page
	// size.
	PageBits, Advise bool

	Mix  Mix  // zero: DefaultMix
	Pool int  // contents of Duplicate pages; 0: 8
	Fill bool // fill bytes other than 0 in a quarter of the ZERO records
	// Move has each page be what is so many pages further on without it, and Slide
	// turns the bytes in Random and Text pages round by so many.
	Move  uint64
	Slide int

	Passes   int     // 0: 1
	Resend   float64 // share of the pages that come again in each later pass
	XBZRLE   bool    // as a difference where that is short
	Compress float64 // share of data records that are COMPRESS_PAGE
	Shuffle  bool    // addresses do not rise within a pass
	Named    float64 // share of records with a name where CONTINUE would do
	PartLen  int     // mean number of records in a section; 0: 100
	Flush    bool    // MULTIFD_FLUSH records

	ReturnPath     bool // OPEN_RETURN_PATH, and PINGs here and there
	IgnoreShared   bool // the capability, and addresses in the setup
	DirtyBitmap    bool // interleaved dirty-bitmap sections
	BlockMigration bool // interleaved block sections
	BlocksFirst    int  // MiB of block sections before the first page
	// Early is how many early device sections there are. The first is virtio-mem's: of a
	// block with the name of EarlyDevice before it, or else of all Shared ones.
	Early           int
	EarlyBehind     bool // they stand behind ram's START, as on QEMU 10, not before it
	NoConfiguration bool // as machine types before 2.4, which have no footers either
	NoEnd           bool // no ram END, as a background snapshot
	NoDescription   bool // suppress-vmdesc
	Tail            int  // bytes of device state, about; 1000 at the least
	EmptyTail       bool // QEMU_VM_EOF straight after RAM

	// Unknown comes at the start of pass UnknownPass, or in the middle of the
	// first if that is 0.
	Unknown     Unknown
	UnknownPass int
}

// UnknownBytes is what a stream with Options.Unknown has and a Load of it must
// be told to skip.
func (s *Stream) UnknownBytes() []byte {
	switch s.o.Unknown {
	case Record:
		return []byte("unknown\x01")
	case Section:
		b := stream.AppendStart(nil, stream.Section{ID: idUnknown, Name: "vendor/mystery", Version: 9})
		b = append(b, "a payload of no known length"...)
		return stream.AppendFooter(b, idUnknown)
	}
	return nil
}

// Stream is a synthetic stream. It is safe for concurrent use.
type Stream struct {
	o     Options
	alike []byte
}

// The sections' ids.
const (
	idRAM     = 2
	idBitmap  = 3
	idBlock   = 4
	idUnknown = 9
	idEarly   = 12 // the first
	idDevices = 20 // the first
)

// New returns the stream with options o.
func New(o Options) *Stream {
	if o.Machine == "" {
		o.Machine = "pc-q35-7.2"
	}
	if o.Blocks == nil {
		o.Blocks = []Block{{Name: "pc.ram", Size: 1 << 20}}
	}
	if o.PageSize == 0 {
		o.PageSize = 4096
	}
	if o.Mix == (Mix{}) {
		o.Mix = DefaultMix
	}
	o.Pool = cmpOr(o.Pool, 8)
	o.Passes = cmpOr(o.Passes, 1)
	o.PartLen = cmpOr(o.PartLen, 100)
	s := &Stream{o: o, alike: make([]byte, o.PageSize)}
	fillText(s.alike, hash(o.Seed, aboutPool))
	return s
}

func cmpOr(n, otherwise int) int {
	if n == 0 {
		return otherwise
	}
	return n
}

// PageSize is the target page size in bytes.
func (s *Stream) PageSize() int { return s.o.PageSize }

// Blocks returns the RAM blocks in the stream's order.
func (s *Stream) Blocks() []Block { return s.o.Blocks }

// Pages is the number of whole pages of a block.
func (s *Stream) Pages(block int) uint64 { return s.o.Blocks[block].Size / uint64(s.o.PageSize) }

// sent tells whether a page is sent in a pass.
func (s *Stream) sent(pass, block int, page uint64) bool {
	if s.o.Blocks[block].Shared || s.state(0, block, page).kind == Absent {
		return false
	}
	return pass == 0 || unit(hash(s.o.Seed, uint64(block), page, aboutResend, uint64(pass))) < s.o.Resend
}

// last is the last of the passes up to the given one in which a page is sent;
// -1 if there is none.
func (s *Stream) last(pass, block int, page uint64) int {
	for ; pass >= 0; pass-- {
		if s.sent(pass, block, page) {
			return pass
		}
	}
	return -1
}

// Page writes what a page holds after the whole stream, and tells whether it
// was sent at all.
func (s *Stream) Page(dst []byte, block int, page uint64) bool {
	pass := s.last(s.o.Passes-1, block, page)
	if pass < 0 {
		clear(dst)
		return false
	}
	s.content(dst, s.state(pass, block, page))
	return true
}

// Kind is the kind of a page after the whole stream.
func (s *Stream) Kind(block int, page uint64) Kind {
	if pass := s.last(s.o.Passes-1, block, page); pass >= 0 {
		return s.state(pass, block, page).kind
	}
	return Absent
}

// Layout says where in a stream things are, in bytes from its start.
type Layout struct {
	RAM  int64 // the ram START
	Tail int64 // the first device section, or QEMU_VM_EOF
	EOF  int64 // QEMU_VM_EOF
	Len  int64
}

// Layout goes through the stream once.
func (s *Stream) Layout() Layout {
	g := s.generator(false)
	for b := range g.chunks {
		g.layout.Len += int64(len(b))
	}
	return g.layout
}

// Reader returns a reader of the stream.
func (s *Stream) Reader() *Reader { return newReader(s.generator(false)) }

// Expected returns a reader of the stream that a save and a restore of this one
// give: each page once, where it first came, in its last version. A stream with
// Unknown keeps later versions behind that point and has no Expected.
func (s *Stream) Expected() *Reader { return newReader(s.generator(true)) }

// Bytes returns the whole stream.
func (s *Stream) Bytes() []byte { return s.generator(false).bytes() }

// ExpectedBytes is all of Expected.
func (s *Stream) ExpectedBytes() []byte { return s.generator(true).bytes() }

func (g *generator) bytes() []byte {
	var all []byte
	for b := range g.chunks {
		all = append(all, b...)
	}
	return all
}

// Reader reads a stream as it is made. Close must be called unless it was read
// to its end.
type Reader struct {
	next func() ([]byte, bool)
	stop func()
	rest []byte
}

func newReader(g *generator) *Reader {
	next, stop := iter.Pull(iter.Seq[[]byte](g.chunks))
	return &Reader{next: next, stop: stop}
}

// Read implements io.Reader.
func (r *Reader) Read(p []byte) (int, error) {
	for len(r.rest) == 0 {
		var ok bool
		if r.rest, ok = r.next(); !ok {
			return 0, io.EOF
		}
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

// Close ends the reader.
func (r *Reader) Close() error { r.stop(); return nil }

// generator makes one pass over the stream.
type generator struct {
	*Stream
	expected bool // once, in its last version
	layout   Layout

	yield   func([]byte) bool
	stopped bool
	buf     []byte
	made    int64 // bytes before buf

	block    int // of the last record; -1 before the first
	page     []byte
	old      []byte
	zbuf     bytes.Buffer
	zw       *zlib.Writer
	sections int // of RAM so far
	left     int // records until the section ends
}

const chunkLen = 64 << 10

func (s *Stream) generator(expected bool) *generator {
	return &generator{Stream: s, expected: expected, block: -1,
		page: make([]byte, s.o.PageSize), old: make([]byte, s.o.PageSize)}
}

// chunks is an iter.Seq of the stream's pieces, each valid until the next.
func (g *generator) chunks(yield func([]byte) bool) {
	g.yield = yield
	g.head()
	g.setup()
	for range g.o.BlocksFirst {
		g.blockSection()
	}
	for pass := range g.o.Passes {
		if g.stopped {
			return
		}
		g.pass(pass)
	}
	g.endRAM()
	g.tail()
	g.flush()
}

func (g *generator) flush() {
	if len(g.buf) > 0 && !g.stopped {
		g.stopped = !g.yield(g.buf)
	}
	g.made += int64(len(g.buf))
	g.buf = g.buf[:0]
}

func (g *generator) offset() int64 { return g.made + int64(len(g.buf)) }

func (g *generator) head() {
	o := &g.o
	g.buf = stream.AppendHeader(g.buf)
	if !o.NoConfiguration {
		g.buf = stream.AppendConfiguration(g.buf, o.Machine)
		if o.PageBits {
			g.buf = stream.AppendConfigSubsection(g.buf, stream.ConfigSubsection{
				Name: stream.SubsectionTargetPageBits, Version: 1, TargetPageBits: uint32(bits.TrailingZeros(uint(o.PageSize)))})
		}
		if o.IgnoreShared {
			g.buf = stream.AppendConfigSubsection(g.buf, stream.ConfigSubsection{
				Name: stream.SubsectionCapabilities, Version: 1, Capabilities: []string{"x-ignore-shared"}})
		}
	}
	if o.ReturnPath {
		g.buf = stream.AppendCommand(g.buf, stream.CommandOpenReturnPath, nil)
		g.ping(1)
	}
	if o.Advise {
		b := binary.BigEndian.AppendUint64(nil, 4096)
		b = binary.BigEndian.AppendUint64(b, uint64(o.PageSize))
		g.buf = stream.AppendCommand(g.buf, stream.CommandPostcopyAdvise, b)
	}
}

func (g *generator) ping(n uint32) {
	g.buf = stream.AppendCommand(g.buf, stream.CommandPing, binary.BigEndian.AppendUint32(nil, n))
}

// EarlyDevice is the path of the virtio-mem device of Options.Early.
const EarlyDevice = "0000:00:00.0"

// earlyBody is what virtio-mem saves ahead of RAM (vmstate_virtio_mem_device_early):
// be64 address, region, size of its parts, be32 node, be64 plugged, and the bitmap of
// the parts. The others are large, and full of what looks like a footer.
func (g *generator) earlyBody(i int) []byte {
	if i > 0 {
		body := make([]byte, 70<<10)
		fillRandom(body, hash(g.o.Seed, aboutTail, uint64(i)))
		footer := stream.AppendFooter(nil, idEarly+uint32(i))
		for at := 0; at < len(body)-1<<10; at += 1 << 10 {
			copy(body[at:], append(footer, byte(at>>10)|0x10))
		}
		return body
	}
	var hidden uint64
	for _, b := range g.o.Blocks {
		if b.Shared {
			hidden += b.Size
		}
	}
	// A megabyte is plugged, at the end. Bits are those of 64-bit words, the lowest first.
	const part = 64 << 10
	region := 1<<20 + hidden
	for _, b := range g.o.Blocks {
		if strings.HasPrefix(b.Name, EarlyDevice+"/") {
			region, hidden = b.Size, b.Size-1<<20
		}
	}
	body := binary.BigEndian.AppendUint64(nil, 1<<32)
	body = binary.BigEndian.AppendUint64(body, region)
	body = binary.BigEndian.AppendUint64(body, part)
	body = binary.BigEndian.AppendUint32(body, 0)
	body = binary.BigEndian.AppendUint64(body, 1<<20)
	words := make([]uint64, (region/part+63)/64)
	for i := hidden / part; i < region/part; i++ {
		words[i/64] |= 1 << (i % 64)
	}
	for _, w := range words {
		body = binary.BigEndian.AppendUint64(body, w)
	}
	return body
}

func (g *generator) earlySection(i int) stream.Section {
	name := fmt.Sprintf("0000:00:%02x.0/early", i)
	if i == 0 {
		name = EarlyDevice + "/virtio-mem-device-early"
	}
	return stream.Section{ID: idEarly + uint32(i), Name: name, Version: 1}
}

// early appends the early sections, if they stand here.
func (g *generator) early(behind bool) {
	if behind != g.o.EarlyBehind {
		return
	}
	for i := range g.o.Early {
		s := g.earlySection(i)
		g.buf = stream.AppendFull(g.buf, s)
		g.buf = append(g.buf, g.earlyBody(i)...)
		g.footer(s.ID)
	}
}

func (g *generator) setup() {
	g.early(false)
	g.layout.RAM = g.offset()
	g.buf = stream.AppendStart(g.buf, stream.Section{ID: idRAM, Name: ramparse.SectionName, Version: ramparse.SectionVersion})
	var su ramparse.Setup
	for i, b := range g.o.Blocks {
		su.Total += b.Size
		block := ramparse.Block{Name: b.Name, Used: b.Size, PageSize: b.HostPage}
		if g.o.IgnoreShared {
			block.GPA = new(uint64(i) << 32)
		}
		su.Blocks = append(su.Blocks, block)
	}
	g.buf = ramparse.AppendSetup(g.buf, &su)
	g.buf = ramparse.AppendEOS(g.buf)
	g.footer(idRAM)
	g.early(true)
	if g.o.DirtyBitmap {
		g.buf = stream.AppendStart(g.buf, stream.Section{ID: idBitmap, Name: "dirty-bitmap", Version: 1})
		g.buf = append(g.buf, 0x18, 6)
		g.buf = append(g.buf, "drive0"...)
		g.buf = append(g.buf, 0, 1, 0, 0, 0, 0x01)
		g.footer(idBitmap)
	}
	if g.o.BlockMigration || g.o.BlocksFirst > 0 {
		g.buf = stream.AppendStart(g.buf, stream.Section{ID: idBlock, Name: "block", Version: 1})
		g.buf = binary.BigEndian.AppendUint64(g.buf, 0x02)
		g.footer(idBlock)
	}
}

func (g *generator) footer(id uint32) {
	if !g.o.NoConfiguration {
		g.buf = stream.AppendFooter(g.buf, id)
	}
}

// bitmapSection appends a PART of the dirty bitmaps.
func (g *generator) bitmapSection() {
	g.buf = stream.AppendPart(g.buf, idBitmap)
	g.buf = append(g.buf, 0x40|0x04, 4)
	g.buf = append(g.buf, "map0"...)
	g.buf = binary.BigEndian.AppendUint64(g.buf, 128)
	g.buf = binary.BigEndian.AppendUint32(g.buf, 64)
	g.buf = binary.BigEndian.AppendUint64(g.buf, 24)
	g.buf = append(g.buf, bytes.Repeat([]byte{0x7e, 0x02}, 12)...)
	g.buf = append(g.buf, 0x01)
	g.footer(idBitmap)
}

// blockSection appends a PART of block migration: 1 MiB of a disk and a zero
// block.
func (g *generator) blockSection() {
	g.buf = stream.AppendPart(g.buf, idBlock)
	sector := hash(g.o.Seed, uint64(g.sections)) >> 12 << 9
	for _, flags := range []uint64{0x01, 0x09} {
		g.buf = binary.BigEndian.AppendUint64(g.buf, sector|flags)
		g.buf = append(append(g.buf, 6), "drive0"...)
		if flags == 0x01 {
			data := make([]byte, 1<<20)
			fillText(data, sector)
			g.buf = append(g.buf, data...)
		}
	}
	g.buf = binary.BigEndian.AppendUint64(g.buf, 100<<9|0x04)
	g.buf = binary.BigEndian.AppendUint64(g.buf, 0x02)
	g.footer(idBlock)
	g.flush()
}

// pass appends the records of a pass, in sections.
func (g *generator) pass(pass int) {
	if pass > 0 && pass == g.o.UnknownPass {
		g.unknown()
	}
	for b := range g.o.Blocks {
		n := g.Pages(b)
		order := newOrder(n, hash(g.o.Seed, aboutOrder, uint64(pass), uint64(b)), g.o.Shuffle)
		for i := range n {
			if pass == 0 && g.o.UnknownPass == 0 && b == len(g.o.Blocks)/2 && i == n/2 {
				g.unknown()
			}
			page := order.at(i)
			if !g.sent(pass, b, page) {
				continue
			}
			g.record(pass, b, page)
			if g.stopped {
				return
			}
		}
	}
}

func (g *generator) unknown() {
	if g.o.Unknown == Record {
		g.inSection()
	} else if g.o.Unknown == Section {
		g.endSection()
	}
	g.buf = append(g.buf, g.UnknownBytes()...)
}

// inSection sees to it that a section of RAM is open.
func (g *generator) inSection() {
	if g.left > 0 {
		return
	}
	g.between()
	g.buf = stream.AppendPart(g.buf, idRAM)
	g.sections++
	g.left = 1 + int(hash(g.o.Seed, aboutPart, uint64(g.sections))%uint64(2*g.o.PartLen))
	if g.o.Flush && g.sections%3 == 0 {
		g.buf = ramparse.AppendFlush(g.buf)
	}
}

// between appends what stands between sections of RAM now and then.
func (g *generator) between() {
	if g.o.ReturnPath && g.sections%4 == 1 {
		g.ping(uint32(g.sections))
	}
	if g.o.DirtyBitmap && g.sections%3 == 1 {
		g.bitmapSection()
	}
	if g.o.BlockMigration && g.sections%5 == 1 {
		g.blockSection()
	}
}

// endSection ends the open section of RAM, if there is one.
func (g *generator) endSection() {
	if g.left == 0 {
		return
	}
	g.left = 0
	g.buf = ramparse.AppendEOS(g.buf)
	g.footer(idRAM)
}

// record appends the record of a page that is sent in a pass.
func (g *generator) record(pass, block int, page uint64) {
	g.inSection()
	if g.expected {
		if pass == 0 {
			g.put(g.last(g.o.Passes-1, block, page), block, page, pass)
		}
	} else {
		g.put(pass, block, page, pass)
	}
	if g.left--; g.left == 0 {
		g.left = 1
		g.endSection()
	}
	if len(g.buf) >= chunkLen {
		g.flush()
	}
}

// put appends the record of a page in the version of pass. Where it stands, and
// so whether it has a name, is up to the pass `at`.
func (g *generator) put(pass, block int, page uint64, at int) {
	st := g.state(pass, block, page)
	h := hash(g.o.Seed, uint64(block), page, aboutRecord, uint64(pass))
	addr := page * uint64(g.o.PageSize)
	name := ""
	if block != g.block || unit(hash(g.o.Seed, uint64(block), page, aboutName, uint64(at))) < g.o.Named {
		name = g.o.Blocks[block].Name
	}
	g.block = block
	if st.kind == Zero {
		g.buf = ramparse.AppendZero(g.buf, name, addr, st.fill)
		return
	}
	g.content(g.page, st)
	switch {
	case st.kind != ZeroData && unit(h) < g.o.Compress:
		g.buf = ramparse.AppendCompressed(g.buf, name, addr, g.deflate(g.page))
		return
	case g.o.XBZRLE && pass > 0 && !g.expected:
		g.content(g.old, g.state(g.last(pass-1, block, page), block, page))
		if delta, ok := EncodeXBZRLE(g.old, g.page); ok {
			g.buf = ramparse.AppendXBZRLE(g.buf, name, addr, delta)
			return
		}
	}
	g.buf = ramparse.AppendPage(g.buf, name, addr, g.page)
}

func (g *generator) deflate(b []byte) []byte {
	g.zbuf.Reset()
	if g.zw == nil {
		g.zw, _ = zlib.NewWriterLevel(&g.zbuf, zlib.BestSpeed)
	}
	g.zw.Reset(&g.zbuf)
	g.zw.Write(b)
	g.zw.Close()
	return g.zbuf.Bytes()
}

// EncodeXBZRLE returns the difference that makes b of a, or false if there is
// none or if it has no room in a record (migration/xbzrle.c).
func EncodeXBZRLE(a, b []byte) ([]byte, bool) {
	var d []byte
	for i := 0; i < len(b); {
		same := i
		for same < len(b) && a[same] == b[same] {
			same++
		}
		if same == len(b) {
			break
		}
		changed := same
		for changed < len(b) && a[changed] != b[changed] {
			changed++
		}
		// A length has at most two bytes of seven bits.
		if same-i >= 1<<14 || changed-same >= 1<<14 {
			return nil, false
		}
		d = binary.AppendUvarint(d, uint64(same-i))
		d = binary.AppendUvarint(d, uint64(changed-same))
		d = append(d, b[same:changed]...)
		i = changed
	}
	return d, len(d) > 0 && len(d) < len(b) && len(d) < 1<<16
}

// endRAM appends the END sections.
func (g *generator) endRAM() {
	g.endSection()
	if g.o.DirtyBitmap {
		g.buf = stream.AppendEnd(g.buf, idBitmap)
		g.buf = append(g.buf, 0x20|0x04, 4)
		g.buf = append(g.buf, "map0\x01"...)
		g.footer(idBitmap)
	}
	if g.o.BlockMigration || g.o.BlocksFirst > 0 {
		g.buf = stream.AppendEnd(g.buf, idBlock)
		g.buf = binary.BigEndian.AppendUint64(g.buf, 0x02)
		g.footer(idBlock)
	}
	if !g.o.NoEnd {
		g.buf = stream.AppendEnd(g.buf, idRAM)
		g.buf = ramparse.AppendEOS(g.buf)
		g.footer(idRAM)
	}
}

// tail appends the device tail.
func (g *generator) tail() {
	g.layout.Tail = g.offset()
	bodies := []struct {
		name string
		body []byte
	}{{"timer", make([]byte, 24)}}
	left := g.o.Tail
	for i := 0; i < 3 || left > 0; i++ {
		h := hash(g.o.Seed, aboutTail, uint64(i))
		body := make([]byte, 8*(1+h%64))
		if i >= 3 {
			body = make([]byte, min((left+7)&^7, 200<<10))
		}
		left -= len(body)
		fillRandom(body, h)
		bodies = append(bodies, struct {
			name string
			body []byte
		}{fmt.Sprintf("0000:00:%02x.0/device", i), body})
	}
	state := make([]byte, 104)
	binary.BigEndian.PutUint32(state, uint32(len("paused"))+1)
	copy(state[4:], "paused")
	bodies = append(bodies, struct {
		name string
		body []byte
	}{"globalstate", state})
	if g.o.EmptyTail {
		bodies = nil
	}
	desc := fmt.Appendf(nil, `{"page_size":%d,"devices":[`, g.o.PageSize)
	describe := func(name string, instance, size int) {
		if desc[len(desc)-1] == '}' {
			desc = append(desc, ',')
		}
		desc = fmt.Appendf(desc, `{"name":%q,"instance_id":%d,"fields":[{"name":"state","type":"buffer","size":%d}]}`, name, instance, size)
	}
	for i := range g.o.Early {
		describe(g.earlySection(i).Name, 0, len(g.earlyBody(i)))
	}
	for i, d := range bodies {
		s := stream.Section{ID: idDevices + uint32(i), Name: d.name, Instance: uint32(i), Version: 1}
		g.buf = stream.AppendFull(g.buf, s)
		g.buf = append(g.buf, d.body...)
		g.footer(s.ID)
		describe(d.name, i, len(d.body))
		g.flush()
	}
	g.layout.EOF = g.offset()
	g.buf = stream.AppendEOF(g.buf)
	if !g.o.NoDescription {
		g.buf = stream.AppendDescription(g.buf, append(desc, "]}"...))
	}
}

// order is a permutation of n pages.
type order struct {
	n, step, start uint64
}

func newOrder(n, h uint64, shuffle bool) order {
	o := order{n: n, step: 1}
	if shuffle && n > 2 {
		// Any step without a common factor visits every page once.
		o.start = h % n
		o.step = (h>>20)%n | 1
		for gcd(o.step, n) != 1 {
			o.step += 2
		}
	}
	return o
}

func (o order) at(i uint64) uint64 {
	hi, lo := bits.Mul64(i, o.step)
	_, r := bits.Div64(hi%max(o.n, 1), lo, max(o.n, 1))
	return (r + o.start) % max(o.n, 1)
}

func gcd(a, b uint64) uint64 {
	for b != 0 {
		a, b = b, a%b
	}
	return a
}
