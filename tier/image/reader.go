package image

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/digest"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
)

// Source is where an image is read from: a file, a part of one, or an object that
// is read by ranges. ReadAt may be called from several goroutines.
type Source interface {
	io.ReaderAt
	// Size is the length of the image in bytes.
	Size() (int64, error)
	// Name is what messages call it.
	Name() string
}

// Tail is the end of an image: its footer and what that says where to find. It is
// read in one piece as a rule, and costs the same for an image of any size.
type Tail struct {
	UUID uuid.UUID
	// Identity is the IDENTITY document, at most MaxIdentity bytes.
	Identity []byte

	src    Source
	length int64
	foot   footer
}

// tailLen is how much is read of an image's end at once: a footer and an IDENTITY
// of the usual length, in a block of the disk.
const tailLen = 4 << 10

// ReadTail reads and checks the footer and IDENTITY of an image, and nothing else of
// it. Errors are CorruptErrors and UnsupportedErrors that name the file.
func ReadTail(src Source) (*Tail, error) {
	size, err := src.Size()
	if err != nil {
		return nil, err
	}
	t := &Tail{src: src, length: size}
	b := make([]byte, min(size, tailLen))
	if err := readFull(src, b, size-int64(len(b)), "footer"); err != nil {
		return nil, err
	}
	foot := size - FooterLen
	if t.foot, err = parseFooter(b); err != nil {
		return nil, t.fail(max(0, foot), "footer", err)
	}
	t.UUID = t.foot.uuid
	if err := t.foot.checkPlaces(size); err != nil {
		return nil, t.fail(foot, "footer", err)
	}
	at := frameAt{frameEntry{kind: Identity, stored: t.foot.identityStored}, foot - FrameHeaderLen - int64(t.foot.identityStored)}
	var st Stored
	if skip := at.off - (size - int64(len(b))); skip >= 0 {
		err = st.take(src.Name(), Header{}, at, b[skip:len(b)-FooterLen])
	} else {
		err = st.fetch(src, Header{}, at)
	}
	if err != nil {
		return nil, err
	}
	if st.head.codec != None {
		return nil, st.fail(fmt.Errorf("it has codec %v", st.head.codec))
	}
	t.Identity, err = new(Decoder).bytes(&st, nil)
	return t, err
}

// checkPlaces checks that what the footer says adds up to a file of so many bytes.
func (f *footer) checkPlaces(size int64) error {
	index := int64(f.indexOffset)
	switch {
	case f.length != uint64(size):
		return fmt.Errorf("footer says %d bytes, file has %d", f.length, size)
	case f.indexOffset > uint64(size) || index+FrameHeaderLen+int64(f.indexStored)+FrameHeaderLen+int64(f.identityStored) != size-FooterLen:
		return errors.New("index is not where the footer says")
	case index-int64(f.metaStored) < HeaderLen+FrameHeaderLen:
		return errors.New("META is not where the footer says")
	case uint64(f.indexStored) != uint64(f.frames)*indexEntryLen || int64(f.frames) > index/FrameHeaderLen:
		return fmt.Errorf("index of %d bytes for %d frames", f.indexStored, f.frames)
	}
	return nil
}

// Meta reads the META document.
func (t *Tail) Meta() ([]byte, error) {
	at := frameAt{frameEntry{kind: Meta, stored: t.foot.metaStored}, t.metaOffset()}
	var st Stored
	if err := st.fetch(t.src, Header{}, at); err != nil {
		return nil, err
	}
	return new(Decoder).bytes(&st, nil)
}

func (t *Tail) metaOffset() int64 {
	return int64(t.foot.indexOffset) - FrameHeaderLen - int64(t.foot.metaStored)
}

// Renamed is the end of the same image with another IDENTITY document, from the offset at
// on.
func (t *Tail) Renamed(identity []byte) (at int64, end []byte, err error) {
	if len(identity) > MaxIdentity {
		return 0, nil, fmt.Errorf("IDENTITY of %d bytes", len(identity))
	}
	at = t.length - FooterLen - FrameHeaderLen - int64(t.foot.identityStored)
	end = appendFrame(nil, Identity, 0, identity)
	foot := t.foot
	foot.identityStored, foot.length = uint32(len(identity)), uint64(at)+uint64(len(end))+FooterLen
	return at, foot.append(end), nil
}

// Len is the size of the image in bytes.
func (t *Tail) Len() int64 { return t.length }

// Corrupt reports that what META or IDENTITY says can't be.
func (t *Tail) Corrupt(k Kind, err error) error {
	off := t.metaOffset()
	if k == Identity {
		off = t.length - FooterLen - FrameHeaderLen - int64(t.foot.identityStored)
	}
	return t.fail(off, fmt.Sprintf("%v 0", k), err)
}

func (t *Tail) fail(off int64, what string, err error) error {
	return failure(t.src.Name(), off, what, err)
}

// failure gives an error its file, and if the error says what is damaged, its place.
func failure(file string, off int64, what string, err error) error {
	var u *UnsupportedError
	if errors.As(err, &u) {
		u.File = file
		return u
	}
	return &integrity.CorruptError{File: file, Offset: off, What: what, Err: err}
}

// Image is a whole image opened for reading. It is safe for concurrent use:
// all per-reader state is in SegmentReader.
type Image struct {
	Header
	Tail   *Tail
	src    Source
	frames []frameAt
	// segments and chunks give a frame's place in frames, by number; -1 where
	// a number was never written.
	segments []int32
	chunks   [256][]int32
}

// Open checks header, footer and index of an image and returns it. Frames are
// checked when they are read. Errors are CorruptErrors and UnsupportedErrors that
// name the file.
func Open(src Source) (*Image, error) {
	im := &Image{src: src}
	var err error
	// The header first: it says of which version a file is, cut short or not.
	if im.Header, err = ReadHeader(src); err != nil {
		return nil, err
	}
	if im.Tail, err = ReadTail(src); err != nil {
		return nil, err
	}
	switch {
	case im.Tail.UUID != im.UUID:
		err = errors.New("header and footer name different checkpoints")
	case im.Tail.foot.features != im.Features:
		err = errors.New("header and footer name different features")
	default:
		return im, im.readIndex()
	}
	return nil, im.corrupt(im.Len()-FooterLen, "footer", err)
}

// indexStep is how much of an index is read at once: all of it as a rule.
const indexStep = (64 << 10) * indexEntryLen

// readIndex reads the index in steps and takes memory for its frames, of which a hole has none: a
// file that was received has holes, and one of some KB can say that its index has 4 GiB.
func (im *Image) readIndex() error {
	ft := &im.Tail.foot
	off := int64(ft.indexOffset)
	left := int(ft.indexStored)
	b := make([]byte, FrameHeaderLen+min(left, indexStep))
	if err := readFull(im.src, b, off, "INDEX"); err != nil {
		return err
	}
	h, err := parseFrameHeader(b)
	if err == nil && (h.kind != Index || h.codec != None || h.stored != ft.indexStored || h.raw != h.stored || h.number != 0) {
		err = errors.New("not the index frame")
	}
	if err != nil {
		return im.corrupt(off, "INDEX", err)
	}
	im.frames = make([]frameAt, 0, min(ft.frames, indexStep/indexEntryLen))
	at := int64(HeaderLen)
	crc := integrity.Hash()
	var odd error // of a frame, if the checksum is right
	for part := b[FrameHeaderLen:]; left > 0; {
		part = part[:min(left, len(part))]
		if left < int(ft.indexStored) { // the first came with the header
			if err := readFull(im.src, part, off+FrameHeaderLen+int64(ft.indexStored)-int64(left), "INDEX"); err != nil {
				return err
			}
		}
		left -= len(part)
		crc.Write(part)
		for i := 0; i < len(part) && odd == nil; i += indexEntryLen {
			e := frameEntry{
				kind:   Kind(part[i]),
				number: binary.LittleEndian.Uint32(part[i+1:]),
				stored: binary.LittleEndian.Uint32(part[i+5:]),
			}
			odd = im.addFrame(e, at)
			at += FrameHeaderLen + int64(e.stored)
		}
	}
	if crc.Sum32() != h.crc {
		return im.corrupt(off, "INDEX", integrity.ErrChecksum)
	}
	if odd != nil {
		return failure(im.src.Name(), off, "INDEX", odd)
	}
	if at != off {
		return im.corrupt(off, "INDEX", fmt.Errorf("its frames end at offset %d, not where it starts", at))
	}
	if n := len(im.frames); n == 0 || im.frames[n-1].frameEntry != (frameEntry{Meta, 0, ft.metaStored}) {
		return im.corrupt(off, "INDEX", errors.New("the last frame is not the META that the footer tells of"))
	}
	return nil
}

func (im *Image) addFrame(e frameEntry, at int64) error {
	if !e.kind.readable() {
		if kindNames[e.kind] == "" && e.kind != 0 {
			return &UnsupportedError{Why: fmt.Sprintf("it has frames of %v, which this flic-migrate does not know", e.kind)}
		}
		return fmt.Errorf("%v frame before the index", e.kind)
	}
	if need := e.kind.announced(); im.Features.Incompat&need != need {
		return fmt.Errorf("%v frame in an image whose features do not tell of it", e.kind)
	}
	where := &im.chunks[e.kind]
	if e.kind.IsSegment() {
		where = &im.segments
	}
	// Numbers are handed out in order, and few stay unused, so a number far
	// from the count of frames is damage and must not size an allocation.
	if int64(e.number) > 2*int64(len(im.frames))+1024 {
		return fmt.Errorf("%v frame numbered %d", e.kind, e.number)
	}
	for len(*where) <= int(e.number) {
		*where = append(*where, -1)
	}
	if (*where)[e.number] != -1 {
		return fmt.Errorf("two %v frames numbered %d", e.kind, e.number)
	}
	(*where)[e.number] = int32(len(im.frames))
	im.frames = append(im.frames, frameAt{e, at})
	return nil
}

// Len is the size of the image file in bytes.
func (im *Image) Len() int64 { return im.Tail.length }

// Name is the path of the image file.
func (im *Image) Name() string { return im.src.Name() }

// Segments is one more than the highest segment number.
func (im *Image) Segments() int { return len(im.segments) }

// Chunks is the number of chunks of kind k.
func (im *Image) Chunks(k Kind) int { return len(im.chunks[k]) }

// SegmentOffset is the file offset of segment n's frame, or -1 if there is no
// such segment.
func (im *Image) SegmentOffset(n uint32) int64 {
	if int64(n) >= int64(len(im.segments)) || im.segments[n] < 0 {
		return -1
	}
	return im.frames[im.segments[n]].off
}

// SegmentKind is the kind of segment n, or 0 if there is no such segment.
func (im *Image) SegmentKind(n uint32) Kind {
	if im.SegmentOffset(n) < 0 {
		return 0
	}
	return im.frames[im.segments[n]].kind
}

// StoredBytes is what the frames of a kind take in the file, with their
// headers.
func (im *Image) StoredBytes(k Kind) int64 {
	var n int64
	for _, e := range im.frames {
		if e.kind == k {
			n += FrameHeaderLen + int64(e.stored)
		}
	}
	return n
}

// Chunk reads and checks chunk n of kind k.
func (im *Image) Chunk(k Kind, n int) ([]byte, error) {
	if n < 0 || n >= len(im.chunks[k]) || im.chunks[k][n] < 0 {
		return nil, im.corrupt(0, fmt.Sprintf("%v %d", k, n), errors.New("no such chunk"))
	}
	var st Stored
	if err := st.fetch(im.src, im.Header, im.frames[im.chunks[k][n]]); err != nil {
		return nil, err
	}
	return new(Decoder).bytes(&st, nil)
}

// Segment fetches and decodes segment n with sr's buffers.
func (im *Image) Segment(sr *SegmentReader, n uint32) (*Segment, error) {
	if err := im.FetchSegment(&sr.Stored, n); err != nil {
		return nil, err
	}
	return sr.Decode(&sr.Stored)
}

// FetchSegment reads segment n as it is stored, and checks it, into st. It is what
// waits for the medium; decoding it takes a CPU and nothing else.
func (im *Image) FetchSegment(st *Stored, n uint32) error { return im.FetchSegmentBy(st, n, nil) }

// FetchSegmentBy is FetchSegment for who may know the segment: if known says of the frame,
// by its digest, that it is as it was stored, its checksum has nothing to add. Stored.Known
// then tells so. Of a frame that is another the checksum says what is wrong.
func (im *Image) FetchSegmentBy(st *Stored, n uint32, known func(*Stored) bool) error {
	if im.SegmentOffset(n) < 0 {
		return im.corrupt(0, fmt.Sprintf("segment %d", n), errors.New("no such segment"))
	}
	return st.fetchBy(im.src, im.Header, im.frames[im.segments[n]], known)
}

// Frames calls fn for every frame in file order with its kind, number and
// offset, for a reader that checks them all.
func (im *Image) Frames(fn func(k Kind, number uint32, off int64) error) error {
	for _, e := range im.frames {
		if err := fn(e.kind, e.number, e.off); err != nil {
			return err
		}
	}
	return nil
}

// Raw calls fn for the bytes of the image as they are stored, checked, in file order: those
// of its header, of the frames that are wanted, and of its end from the INDEX on. They are
// good until fn returns.
func (im *Image) Raw(want func(k Kind, number uint32) bool, fn func(off int64, b []byte) error) error {
	head := make([]byte, HeaderLen)
	if err := readFull(im.src, head, 0, "header"); err != nil {
		return err
	}
	if err := fn(0, head); err != nil {
		return err
	}
	var st Stored
	for _, e := range im.frames {
		if !want(e.kind, e.number) {
			continue
		}
		if err := st.fetch(im.src, im.Header, e); err != nil {
			return err
		}
		if err := fn(e.off, st.b); err != nil {
			return err
		}
	}
	// Who has opened the image has checked these.
	off := int64(im.Tail.foot.indexOffset)
	end := make([]byte, im.Len()-off)
	if err := readFull(im.src, end, off, "INDEX 0"); err != nil {
		return err
	}
	return fn(off, end)
}

// Remains calls fn for the frames that are wanted and are there as they were written, as Raw
// does. An image of which others need a part can have lost all else.
func (im *Image) Remains(ctx context.Context, want func(k Kind, number uint32) bool, fn func(k Kind, number uint32, off int64, b []byte) error) error {
	var st Stored
	for _, e := range im.frames {
		if !want(e.kind, e.number) {
			continue
		}
		if err := context.Cause(ctx); err != nil {
			return err
		}
		err := st.fetch(im.src, im.Header, e)
		if integrity.IsCorrupt(err) {
			continue
		}
		if err == nil {
			err = fn(e.kind, e.number, e.off, st.b)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// Alike tells whether two images can be copies of one, each with a part of it perhaps: they
// have the same frames in the same places, and META, which vouches for the pages, is the same.
// Who they say they are in IDENTITY may differ.
func (im *Image) Alike(other *Image) (bool, error) {
	a, err := im.Tail.Meta()
	if err != nil {
		return false, err
	}
	b, err := other.Tail.Meta()
	return bytes.Equal(im.Header.append(nil), other.Header.append(nil)) && slices.Equal(im.frames, other.frames) && bytes.Equal(a, b), err
}

// Rewritten calls fn with the frames of a kind of chunk, each as it is stored and where, as
// they are with another payload: all of theirs together, of the same length. Their kind must
// be one that is not compressed. The bytes are good until fn returns.
func (im *Image) Rewritten(k Kind, payload []byte, fn func(off int64, frame []byte) error) error {
	for n, at := range im.chunks[k] {
		b, err := im.Chunk(k, n)
		if err != nil {
			return err
		}
		e := im.frames[at]
		if int(e.stored) != len(b) || len(b) > len(payload) {
			return fmt.Errorf("%s: %v can't be written in place", im.Name(), e)
		}
		if err := fn(e.off, appendFrame(nil, k, uint32(n), payload[:len(b)])); err != nil {
			return err
		}
		payload = payload[len(b):]
	}
	if len(payload) > 0 {
		return fmt.Errorf("%s: %d bytes more of %v than it has", im.Name(), len(payload), k)
	}
	return nil
}

func (im *Image) corrupt(off int64, what string, err error) error {
	return &integrity.CorruptError{File: im.src.Name(), Offset: off, What: what, Err: err}
}

// fetcher is what frames are read from: a Source, or the Sink of an image that is
// still being written.
type fetcher interface {
	io.ReaderAt
	Name() string
}

// readFull reads len(b) bytes. A file that ends early is damage; any other
// failure is the file system's and is passed on as it is.
func readFull(f fetcher, b []byte, off int64, what string) error {
	_, err := f.ReadAt(b, off)
	if isEOF(err) {
		return &integrity.CorruptError{File: f.Name(), Offset: off, What: what, Err: errEndsInside}
	}
	return err
}

var errEndsInside = errors.New("the file ends inside it")

func isEOF(err error) bool { return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) }

// Segment is a decoded segment. Its pages are valid until it is recycled.
type Segment struct {
	Number uint32
	Kind   Kind
	data   []byte
	size   int         // page size
	ends   []uint32    // Records and Deltas: end of each payload in data
	reader frameSource // for errors
}

type frameSource struct {
	name string
	off  int64
}

// Len is the number of pages in the segment.
func (s *Segment) Len() int {
	if s.Kind == Pages {
		return len(s.data) / s.size
	}
	return len(s.ends)
}

// Page is the content of the page at position i of a Pages segment. An
// address outside the segment, or in one of another kind, is damage of the page
// map.
func (s *Segment) Page(i int) ([]byte, error) {
	if s.Kind != Pages || i >= s.Len() {
		return nil, s.Corrupt(fmt.Errorf("it has no page %d", i))
	}
	return s.data[i*s.size : (i+1)*s.size : (i+1)*s.size], nil
}

// Record is the deflated payload at position i of a Records segment.
func (s *Segment) Record(i int) ([]byte, error) { return s.payload(Records, i) }

// Delta is the delta at position i of a Deltas segment, and whether it is pieces.
func (s *Segment) Delta(i int) (b []byte, pieces bool, err error) {
	if b, err = s.payload(Deltas, i); err == nil {
		pieces = binary.BigEndian.Uint32(s.data[4+4*i:])&InPieces != 0
	}
	return b, pieces, err
}

func (s *Segment) payload(k Kind, i int) ([]byte, error) {
	if s.Kind != k || i >= s.Len() {
		return nil, s.Corrupt(fmt.Errorf("it has no %v %d", payloadNames[k], i))
	}
	start := uint32(4 + 4*len(s.ends))
	if i > 0 {
		start = s.ends[i-1]
	}
	return s.data[start:s.ends[i]], nil
}

var payloadNames = map[Kind]string{Records: "record", Deltas: "delta"}

// Corrupt reports that what the segment holds can't be.
func (s *Segment) Corrupt(err error) error {
	return &integrity.CorruptError{File: s.reader.name, Offset: s.reader.off,
		What: fmt.Sprintf("%v segment %d", s.Kind, s.Number), Err: err}
}

// Lend makes s the PAGES segment whose pages, one after the other, are in memory
// already, such as in a Writer's buffer. They stay the caller's.
func (s *Segment) Lend(number uint32, pages []byte, pageSize int) {
	*s = Segment{Number: number, Kind: Pages, data: pages, size: pageSize, reader: frameSource{name: "memory"}}
}

// Append appends the segment's payload, as a Buffer of its kind has it.
func (s *Segment) Append(dst []byte) []byte { return append(dst, s.data...) }

// Bytes is the memory the segment's content takes.
func (s *Segment) Bytes() int { return len(s.data) }

// Stored is a frame as it lies in the image, fetched and checked. It keeps its
// memory for the next frame. The zero value is ready.
type Stored struct {
	at   frameAt
	file string
	hdr  Header
	head frameHeader
	b    []byte // frame header and payload

	known bool
}

// Known tells whether the frame is known by its digest (FetchSegmentBy).
func (st *Stored) Known() bool { return st.known }

func (st *Stored) payload() []byte { return st.b[FrameHeaderLen:] }

// Sum is the digest of the frame as it is stored, header and payload.
func (st *Stored) Sum(h *digest.Hasher) digest.Sum { return h.Sum(st.b) }

func (st *Stored) fail(err error) error {
	return &integrity.CorruptError{File: st.file, Offset: st.at.off, What: st.at.String(), Err: err}
}

// fetch reads the frame that the index, the footer or the Writer has at a place.
func (st *Stored) fetch(f fetcher, h Header, at frameAt) error { return st.fetchBy(f, h, at, nil) }

// fetchBy is fetch as FetchSegmentBy has it.
func (st *Stored) fetchBy(f fetcher, h Header, at frameAt, known func(*Stored) bool) error {
	st.at, st.file, st.hdr, st.known = at, f.Name(), h, false
	if int64(at.stored) > h.maxRaw(at.kind) {
		return st.fail(fmt.Errorf("%d bytes stored: too large", at.stored))
	}
	n := FrameHeaderLen + int(at.stored)
	st.b = grow(st.b[:0], n)[:n]
	if _, err := f.ReadAt(st.b, at.off); err != nil {
		if isEOF(err) {
			err = st.fail(errEndsInside)
		}
		return err
	}
	st.known = known != nil && known(st)
	return st.check()
}

// take is fetch of a frame that has been read already. The bytes stay the caller's.
func (st *Stored) take(file string, h Header, at frameAt, b []byte) error {
	st.at, st.file, st.hdr, st.b, st.known = at, file, h, b, false
	if int64(at.stored) > h.maxRaw(at.kind) {
		return st.fail(fmt.Errorf("%d bytes stored: too large", at.stored))
	}
	return st.check()
}

// Pages makes st a segment of n pages that lie in no image, such as those of a disk, and
// returns the room for them, which the caller fills. Who decodes it checks the pages.
func (st *Stored) Pages(file string, number uint32, pageSize, n int) []byte {
	size := n * pageSize
	st.at = frameAt{frameEntry{Pages, number, uint32(size)}, 0}
	st.file, st.hdr, st.known = file, Header{PageSize: pageSize, SegmentPages: n}, false
	st.head = frameHeader{kind: Pages, codec: None, raw: uint32(size), stored: uint32(size), number: number}
	st.b = grow(st.b[:0], FrameHeaderLen+size)[:FrameHeaderLen+size]
	return st.payload()
}

// check verifies both checksums, that of the payload if it is not known, and that it is the frame that was looked for.
func (st *Stored) check() error {
	var err error
	if st.head, err = parseFrameHeader(st.b); err != nil {
		return st.fail(err)
	}
	h, at := &st.head, &st.at
	switch {
	case h.kind != at.kind || h.number != at.number || h.stored != at.stored:
		return st.fail(fmt.Errorf("found %v %d of %d bytes in its place", h.kind, h.number, h.stored))
	case int64(h.raw) > st.hdr.maxRaw(h.kind):
		return st.fail(fmt.Errorf("%d bytes raw: too large", h.raw))
	case !st.known && integrity.Checksum(st.payload()) != h.crc:
		return st.fail(integrity.ErrChecksum)
	case h.raw == 0 && h.codec != None:
		// The LZ4 decoder does not survive a destination without a byte.
		return st.fail(fmt.Errorf("%d bytes of %v that stand for nothing", h.stored, h.codec))
	}
	return nil
}

// Decoder holds the codec state and the memory of one goroutine that decodes
// segments. The zero value is ready.
type Decoder struct {
	dec  decompressor
	free []byte // for the next segment's content
}

// Recycle gives the memory of a segment that nobody uses any more to the next one
// that is decoded. It may come from another Decoder; nil is none. After that the
// segment has no pages.
func (d *Decoder) Recycle(s *Segment) {
	if s != nil {
		d.free, s.data, s.ends = s.data, nil, nil
	}
}

// Decode decodes a segment that has been fetched. st can be used again after it.
func (d *Decoder) Decode(st *Stored) (*Segment, error) {
	data, err := d.bytes(st, d.free)
	if err != nil {
		return nil, err
	}
	d.free = nil
	h := &st.hdr
	s := &Segment{Number: st.at.number, Kind: st.at.kind, data: data, size: h.PageSize, reader: frameSource{st.file, st.at.off}}
	switch {
	case s.Kind == Records || s.Kind == Deltas:
		err = s.parsePayloads(*h)
	case s.Kind == Pages && (len(data) == 0 || len(data)%h.PageSize != 0):
		err = s.Corrupt(fmt.Errorf("%d bytes are no whole pages", len(data)))
	}
	if err != nil {
		return nil, err
	}
	return s, nil
}

// bytes decodes a frame, into dst if that is large enough.
func (d *Decoder) bytes(st *Stored, dst []byte) ([]byte, error) {
	dst = grow(dst[:0], int(st.head.raw))[:st.head.raw]
	if err := d.dec.decompress(st.head.codec, dst, st.payload()); err != nil {
		return nil, st.fail(err)
	}
	return dst, nil
}

// SegmentReader fetches and decodes in one go, for one goroutine. The zero value
// is ready.
type SegmentReader struct {
	Stored
	Decoder
}

// parsePayloads finds the payloads of a segment of Records or Deltas.
func (s *Segment) parsePayloads(h Header) error {
	if len(s.data) < 4 {
		return s.Corrupt(errors.New("too short"))
	}
	be := binary.BigEndian
	n := int(be.Uint32(s.data))
	if n < 1 || n > h.SegmentPages || len(s.data) < 4+4*n {
		return s.Corrupt(fmt.Errorf("%d %vs", n, payloadNames[s.Kind]))
	}
	s.ends = make([]uint32, n)
	end := uint64(4 + 4*n)
	for i := range s.ends {
		length := be.Uint32(s.data[4+4*i:])
		if s.Kind == Deltas && h.Features.Incompat&HasPieces != 0 {
			length &^= InPieces
		}
		end += uint64(length)
		if end > uint64(len(s.data)) {
			return s.Corrupt(fmt.Errorf("%v %d ends behind the segment", payloadNames[s.Kind], i))
		}
		s.ends[i] = uint32(end)
	}
	if end != uint64(len(s.data)) {
		return s.Corrupt(fmt.Errorf("bytes behind the last %v", payloadNames[s.Kind]))
	}
	return nil
}

// ReadHeader reads and checks the header of an image alone.
func ReadHeader(src Source) (Header, error) {
	size, err := src.Size()
	if err != nil {
		return Header{}, err
	}
	b := make([]byte, min(size, HeaderLen))
	if err := readFull(src, b, 0, "header"); err != nil {
		return Header{}, err
	}
	h, err := parseHeader(b)
	if err != nil {
		err = failure(src.Name(), 0, "header", err)
	}
	return h, err
}

// Corrupt reports that what chunk n of kind k says can't be.
func (im *Image) Corrupt(k Kind, n int, err error) error {
	var off int64
	if n < len(im.chunks[k]) && im.chunks[k][n] >= 0 {
		off = im.frames[im.chunks[k][n]].off
	}
	return im.corrupt(off, fmt.Sprintf("%v %d", k, n), err)
}
