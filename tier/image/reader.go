package image

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// Image is a whole image opened for reading. It is safe for concurrent use:
// all per-reader state is in SegmentReader.
type Image struct {
	Header
	f      vfs.File
	length int64
	frames []frameAt
	// segments and chunks give a frame's place in frames, by number; -1 where
	// a number was never written.
	segments []int32
	chunks   [Index + 1][]int32
}

// Open checks header, footer and index of f and returns the image. Frames are
// checked when they are read. Errors are CorruptErrors that name the file.
func Open(f vfs.File) (*Image, error) {
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	im := &Image{f: f, length: size}
	if size < HeaderLen+FrameHeaderLen+FooterLen {
		return nil, im.corrupt(0, "image", fmt.Errorf("%d bytes: the image is not whole", size))
	}
	if im.Header, err = ReadHeader(f); err != nil {
		return nil, err
	}
	b := make([]byte, FooterLen)
	foot := size - FooterLen
	if err := im.readAt(b, foot, "footer"); err != nil {
		return nil, err
	}
	ft, err := parseFooter(b)
	switch {
	case err != nil:
	case ft.length != uint64(size):
		err = fmt.Errorf("footer says %d bytes, file has %d", ft.length, size)
	case ft.uuid != im.UUID:
		err = errors.New("header and footer name different checkpoints")
	case ft.indexOffset+FrameHeaderLen+uint64(ft.indexStored) != uint64(foot) || ft.indexOffset < HeaderLen:
		err = errors.New("index is not where the footer says")
	case uint64(ft.indexStored) != uint64(ft.frames)*indexEntryLen:
		err = fmt.Errorf("index of %d bytes for %d frames", ft.indexStored, ft.frames)
	}
	if err != nil {
		return nil, im.corrupt(foot, "footer", err)
	}
	return im, im.readIndex(ft)
}

func (im *Image) readIndex(ft footer) error {
	off := int64(ft.indexOffset)
	// Its length is bounded by the file's, checked above.
	raw := make([]byte, FrameHeaderLen+int(ft.indexStored))
	if err := im.readAt(raw, off, "INDEX"); err != nil {
		return err
	}
	h, err := parseFrameHeader(raw)
	payload := raw[FrameHeaderLen:]
	switch {
	case err != nil:
	case h.kind != Index || h.codec != None || h.stored != ft.indexStored || h.raw != h.stored || h.number != 0:
		err = errors.New("not the index frame")
	case h.crc != integrity.Checksum(payload):
		err = integrity.ErrChecksum
	}
	if err != nil {
		return im.corrupt(off, "INDEX", err)
	}
	im.frames = make([]frameAt, 0, ft.frames)
	at := int64(HeaderLen)
	for i := 0; i < len(payload); i += indexEntryLen {
		e := frameEntry{
			kind:   Kind(payload[i]),
			number: binary.LittleEndian.Uint32(payload[i+1:]),
			stored: binary.LittleEndian.Uint32(payload[i+5:]),
		}
		if err := im.addFrame(e, at); err != nil {
			return im.corrupt(off, "INDEX", err)
		}
		at += FrameHeaderLen + int64(e.stored)
	}
	if at != off {
		return im.corrupt(off, "INDEX", fmt.Errorf("its frames end at offset %d, not where it starts", at))
	}
	return nil
}

func (im *Image) addFrame(e frameEntry, at int64) error {
	if e.kind < Pages || e.kind >= Index {
		return fmt.Errorf("frame of unknown %v", e.kind)
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
func (im *Image) Len() int64 { return im.length }

// Name is the path of the image file.
func (im *Image) Name() string { return im.f.Name() }

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
	var sr SegmentReader
	var fh frameHeader
	return sr.frame(im.f, im.Header, im.frames[im.chunks[k][n]], nil, &fh)
}

// Segment reads and checks segment n with sr's buffers.
func (im *Image) Segment(sr *SegmentReader, n uint32) (*Segment, error) {
	if im.SegmentOffset(n) < 0 {
		return nil, im.corrupt(0, fmt.Sprintf("segment %d", n), errors.New("no such segment"))
	}
	return sr.read(im.f, im.Header, im.frames[im.segments[n]])
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

func (im *Image) corrupt(off int64, what string, err error) error {
	return &integrity.CorruptError{File: im.f.Name(), Offset: off, What: what, Err: err}
}

func (im *Image) readAt(b []byte, off int64, what string) error {
	return readFull(im.f, b, off, what)
}

// readFull reads len(b) bytes. A file that ends early is damage; any other
// failure is the file system's and is passed on as it is.
func readFull(f vfs.File, b []byte, off int64, what string) error {
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
	ends   []uint32    // Records: end of each payload in data
	reader frameSource // for errors
}

type frameSource struct {
	name string
	off  int64
}

// Len is the number of pages in the segment.
func (s *Segment) Len() int {
	if s.Kind == Records {
		return len(s.ends)
	}
	return len(s.data) / s.size
}

// Page is the content of the page at position i of a Pages segment. An
// address outside the segment, or a segment of Records, is damage of the page
// table.
func (s *Segment) Page(i int) ([]byte, error) {
	if s.Kind != Pages || i >= s.Len() {
		return nil, s.corrupt(fmt.Errorf("it has no page %d", i))
	}
	return s.data[i*s.size : (i+1)*s.size : (i+1)*s.size], nil
}

// Record is the deflated payload at position i of a Records segment.
func (s *Segment) Record(i int) ([]byte, error) {
	if s.Kind != Records || i >= s.Len() {
		return nil, s.corrupt(fmt.Errorf("it has no record %d", i))
	}
	start := uint32(4 + 4*len(s.ends))
	if i > 0 {
		start = s.ends[i-1]
	}
	return s.data[start:s.ends[i]], nil
}

func (s *Segment) corrupt(err error) error {
	return &integrity.CorruptError{File: s.reader.name, Offset: s.reader.off,
		What: fmt.Sprintf("%v segment %d", s.Kind, s.Number), Err: err}
}

// Bytes is the memory the segment's content takes.
func (s *Segment) Bytes() int { return len(s.data) }

// SegmentReader holds the buffers and codec state of one goroutine that reads
// frames. The zero value is ready.
type SegmentReader struct {
	stored []byte
	dec    decompressor
	free   []byte // for the next segment's content
}

// Recycle gives the memory of a segment that nobody uses any more to the next one
// that is read. It may come from another reader; nil is none. After that the segment
// has no pages.
func (sr *SegmentReader) Recycle(s *Segment) {
	if s != nil {
		sr.free, s.data, s.ends = s.data, nil, nil
	}
}

func (sr *SegmentReader) read(f vfs.File, h Header, at frameAt) (*Segment, error) {
	var fh frameHeader
	data, err := sr.frame(f, h, at, sr.free, &fh)
	if err != nil {
		return nil, err
	}
	sr.free = nil
	s := &Segment{Number: at.number, Kind: at.kind, data: data, size: h.PageSize, reader: frameSource{f.Name(), at.off}}
	if s.Kind == Records {
		err = s.parseRecords(h)
	} else if len(data) == 0 || len(data)%h.PageSize != 0 {
		err = s.corrupt(fmt.Errorf("%d bytes are no whole pages", len(data)))
	}
	if err != nil {
		return nil, err
	}
	return s, nil
}

func (s *Segment) parseRecords(h Header) error {
	if len(s.data) < 4 {
		return s.corrupt(errors.New("too short"))
	}
	be := binary.BigEndian
	n := int(be.Uint32(s.data))
	if n < 1 || n > h.SegmentPages || len(s.data) < 4+4*n {
		return s.corrupt(fmt.Errorf("%d records", n))
	}
	s.ends = make([]uint32, n)
	end := uint64(4 + 4*n)
	for i := range s.ends {
		end += uint64(be.Uint32(s.data[4+4*i:]))
		if end > uint64(len(s.data)) {
			return s.corrupt(fmt.Errorf("record %d ends behind the segment", i))
		}
		s.ends[i] = uint32(end)
	}
	if end != uint64(len(s.data)) {
		return s.corrupt(errors.New("bytes behind the last record"))
	}
	return nil
}

// frame reads the frame that the index, or the Writer, has at a place, and
// decodes it into dst if that is large enough. Both checksums are verified
// before a byte is decoded.
func (sr *SegmentReader) frame(f vfs.File, h Header, at frameAt, dst []byte, fh *frameHeader) ([]byte, error) {
	fail := func(err error) error {
		return &integrity.CorruptError{File: f.Name(), Offset: at.off, What: at.String(), Err: err}
	}
	if int64(at.stored) > h.maxRaw(at.kind) {
		return nil, fail(fmt.Errorf("%d bytes stored: too large", at.stored))
	}
	n := FrameHeaderLen + int(at.stored)
	sr.stored = grow(sr.stored[:0], n)[:n]
	if _, err := f.ReadAt(sr.stored, at.off); err != nil {
		if isEOF(err) {
			err = fail(errEndsInside)
		}
		return nil, err
	}
	var err error
	if *fh, err = parseFrameHeader(sr.stored); err != nil {
		return nil, fail(err)
	}
	payload := sr.stored[FrameHeaderLen:]
	switch {
	case fh.kind != at.kind || fh.number != at.number || fh.stored != at.stored:
		return nil, fail(fmt.Errorf("found %v %d of %d bytes in its place", fh.kind, fh.number, fh.stored))
	case int64(fh.raw) > h.maxRaw(fh.kind):
		return nil, fail(fmt.Errorf("%d bytes raw: too large", fh.raw))
	case integrity.Checksum(payload) != fh.crc:
		return nil, fail(integrity.ErrChecksum)
	case fh.raw == 0 && fh.codec != None:
		// The LZ4 decoder does not survive a destination without a byte.
		return nil, fail(fmt.Errorf("%d bytes of %v that stand for nothing", fh.stored, fh.codec))
	}
	dst = grow(dst[:0], int(fh.raw))[:fh.raw]
	if err := sr.dec.decompress(fh.codec, dst, payload); err != nil {
		return nil, fail(err)
	}
	return dst, nil
}

// ReadHeader reads and checks the header of f alone.
func ReadHeader(f vfs.File) (Header, error) {
	b := make([]byte, HeaderLen)
	if err := readFull(f, b, 0, "header"); err != nil {
		return Header{}, err
	}
	h, err := parseHeader(b)
	if err != nil {
		err = &integrity.CorruptError{File: f.Name(), What: "header", Err: err}
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
