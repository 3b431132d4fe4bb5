package image

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"sync"

	"github.com/flic-migrate/flic-migrate/tier/digest"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/rescue"
)

// Sink is what an image is written to, front to back: a file, or a pipe that
// remembers what went into it last. Write is called by one goroutine; ReadAt, which
// reads back what was written, by several.
type Sink interface {
	io.Writer
	io.ReaderAt
	// Name is what messages call it.
	Name() string
	// Sync makes all that was written durable.
	Sync() error
	// StartWriteback asks for [off, off+n) to be written out soon. It promises
	// nothing, so it has no error.
	StartWriteback(off, n int64)
}

// writebackEvery is how much is written before the kernel is asked to start
// writing it out: often enough that the fsync before the device tail finds
// little left to do, in pieces large enough to stay sequential on flash.
const writebackEvery = 4 << 20

// Writer appends frames to an image. Compression and checksums run on worker
// goroutines; frames reach the file in the order of Submit, written by one
// goroutine. All methods but FetchSegment are for one caller at a time.
//
//	NewBuffer ─► caller fills ─► Submit ─┬─► worker: compress, checksum ─┐
//	    ▲                                └─► order ─────────────────► appender ─► file
//	    └────────────────────── recycled buffers ◄────────────────────────┘
type Writer struct {
	f     Sink
	hdr   Header
	codec Codec

	free    chan *Buffer // bounds the memory in flight
	jobs    chan *Buffer // to the workers
	order   chan *Buffer // to the appender, in Submit's order
	workers sync.WaitGroup
	done    chan struct{} // closed when the appender has ended
	closed  bool

	nextSegment uint32
	all         []*Buffer
	nextChunk   [256]uint32

	hash *digest.Hasher // nil: no digests are kept

	mu       sync.Mutex
	cond     *sync.Cond
	err      error        // first failure; sticky
	pending  int          // submitted, not yet appended
	off      int64        // file offset of the next frame
	flushed  int64        // writeback has been started up to here
	frames   []frameEntry // appended so far, in file order
	segments []frameAt    // by number; offset 0 if not appended

	sumsMu sync.Mutex
	sums   *digest.Builder // nil: no digests are kept
}

// frameEntry is one entry of INDEX: kind u8, number u32, stored length u32.
type frameEntry struct {
	kind   Kind
	number uint32
	stored uint32
}

// frameAt is a frame and its offset in the file.
type frameAt struct {
	frameEntry
	off int64
}

func (e frameEntry) String() string { return fmt.Sprintf("%v %d", e.kind, e.number) }

// Buffer is a frame in the making: the caller appends raw bytes to Data, at
// most the capacity it came with, and gives the Buffer back through Submit or
// Discard, after which it must not be touched.
type Buffer struct {
	Kind   Kind
	Number uint32
	Data   []byte
	// Sums are the digests of a segment's pages, if the Writer keeps digests: the caller
	// appends one for each slot. Those of PAGES that are zero, or not there, the Writer
	// makes itself.
	Sums []digest.Sum

	out    []byte     // frame header and stored bytes
	stored digest.Sum // of out, if it is a segment and digests are kept
	codec  Codec
	err    error
	ready  chan struct{}
}

// NewWriter writes the header to f, to which nothing has been written, and starts workers
// (GOMAXPROCS of them if 0).
func NewWriter(f Sink, h Header, codec Codec, workers int) (*Writer, error) {
	if err := h.check(); err != nil {
		return nil, fmt.Errorf("image header: %w", err)
	}
	if workers <= 0 {
		workers = runtime.GOMAXPROCS(0)
	}
	if _, err := f.Write(h.append(nil)); err != nil {
		return nil, err
	}
	n := 4*workers + 8
	w := &Writer{
		f: f, hdr: h, codec: codec, off: HeaderLen,
		free: make(chan *Buffer, n), jobs: make(chan *Buffer, n), order: make(chan *Buffer, n),
		done: make(chan struct{}),
	}
	w.cond = sync.NewCond(&w.mu)
	for range n {
		b := &Buffer{ready: make(chan struct{}, 1)}
		w.all = append(w.all, b)
		w.free <- b
	}
	w.workers.Add(workers)
	for range workers {
		go w.work()
	}
	go w.append()
	return w, nil
}

// KeepDigests has the image keep digests of its pages (DIGESTS), made by h. It is called
// before the first segment.
func (w *Writer) KeepDigests(h *digest.Hasher) {
	w.hash, w.sums = h, digest.NewBuilder(w.hdr.SegmentPages)
}

// NewBuffer hands out the next buffer for a frame of kind k, numbered at once
// so that slots are known while the segment fills. It waits while too many
// frames are in flight, which is how a slow file slows the producer down.
func (w *Writer) NewBuffer(k Kind) *Buffer {
	b := <-w.free
	b.Kind = k
	need := int(w.hdr.maxRaw(k))
	if k == Meta {
		need = 0 // there is one, of a length that is known by then
	}
	if cap(b.Data) < need {
		b.Data = make([]byte, 0, need)
	}
	b.Data, b.Sums = b.Data[:0], b.Sums[:0]
	if k.IsSegment() {
		b.Number = w.nextSegment
		w.nextSegment++
	} else {
		b.Number = w.nextChunk[k]
		w.nextChunk[k]++
	}
	return b
}

// Recent returns the raw bytes of PAGES segment n if it was submitted so lately
// that its buffer has not been handed out again, or nil. They are valid until
// the next NewBuffer, and only for NewBuffer's caller.
func (w *Writer) Recent(n uint32) []byte {
	for _, b := range w.all {
		if b.Kind == Pages && b.Number == n {
			return b.Data
		}
	}
	return nil
}

// SegmentPages is the number of pages in a full segment.
func (w *Writer) SegmentPages() int { return w.hdr.SegmentPages }

// Segments is one more than the highest number of a segment that has been appended:
// after a Drain, what a reader of the image will find.
func (w *Writer) Segments() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.segments)
}

// Discard gives back a buffer that is not to be written. Its number stays
// unused.
func (w *Writer) Discard(b *Buffer) {
	if w.sums != nil && b.Kind.IsSegment() {
		w.sumsMu.Lock()
		w.sums.Segment(b.Number, nil, digest.Sum{})
		w.sumsMu.Unlock()
	}
	w.free <- b
}

// Submit queues b to be compressed and appended. It returns the first failure
// of any earlier frame.
func (w *Writer) Submit(b *Buffer) error {
	w.mu.Lock()
	err := w.err
	if err == nil {
		w.pending++
	}
	w.mu.Unlock()
	if err != nil {
		w.free <- b
		return err
	}
	w.order <- b
	w.jobs <- b
	return nil
}

func (w *Writer) work() {
	defer w.workers.Done()
	var c compressor
	for b := range w.jobs {
		// A panic ends the save like a failed write. This goroutine goes on: the
		// appender waits for each buffer.
		b.err = rescue.Call(func() error { return w.encode(&c, b) })
		b.ready <- struct{}{}
	}
}

// encode makes b.out of b.Data.
func (w *Writer) encode(c *compressor, b *Buffer) (err error) {
	if w.hash != nil && b.Kind == Pages {
		n := len(b.Data) / w.hdr.PageSize
		known := len(b.Sums)
		b.Sums = slices.Grow(b.Sums, n-known)[:n]
		clear(b.Sums[known:])
		for i := range b.Sums {
			if b.Sums[i] == (digest.Sum{}) {
				w.hash.Put(&b.Sums[i], b.Data[i*w.hdr.PageSize:(i+1)*w.hdr.PageSize])
			}
		}
	}
	b.out = grow(b.out[:0], FrameHeaderLen)[:FrameHeaderLen]
	if b.out, b.codec, err = c.compress(w.codecFor(b.Kind), b.out, b.Data); err != nil {
		return err
	}
	payload := b.out[FrameHeaderLen:]
	frameHeader{
		kind: b.Kind, codec: b.codec, raw: uint32(len(b.Data)),
		stored: uint32(len(payload)), number: b.Number, crc: integrity.Checksum(payload),
	}.put(b.out)
	if w.hash != nil && b.Kind.IsSegment() {
		w.hash.Put(&b.stored, b.out)
	}
	return nil
}

// codecFor spares deflated records a second compression, and digests one in vain. The chunks always get
// MinLZ: they are small beside the pages, and setting up the tables of Zstandard's
// encoder takes a third of a small guest's save.
func (w *Writer) codecFor(k Kind) Codec {
	switch {
	case w.codec == None || k == Records || k == NVRAM:
		return None
	case k == Pages || k == Deltas:
		return w.codec
	}
	return MinLZ
}

func (w *Writer) append() {
	defer close(w.done)
	for b := range w.order {
		<-b.ready
		err := b.err
		if err == nil && w.failed() == nil {
			err = rescue.Call(func() error { _, err := w.f.Write(b.out); return err })
		}
		w.appended(b, err)
		if err == nil && w.sums != nil && b.Kind.IsSegment() {
			w.fail(rescue.Call(func() error { return w.digested(b) }))
		}
		w.finished()
		w.free <- b
	}
}

// digested takes the digests of a segment that was appended, and appends the chunks of
// DIGESTS that are complete with it.
func (w *Writer) digested(b *Buffer) error {
	w.sumsMu.Lock()
	defer w.sumsMu.Unlock()
	w.sums.Segment(b.Number, b.Sums, b.stored)
	for {
		c, ok := w.sums.Next()
		if !ok || w.failed() != nil {
			return nil
		}
		out := appendFrame(nil, Digests, c.Number, c.Data)
		if _, err := w.f.Write(out); err != nil {
			return err
		}
		w.appended(&Buffer{Kind: Digests, Number: c.Number, out: out}, nil)
	}
}

// finished is told when a submitted frame, and what came with it, has been appended.
func (w *Writer) finished() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.pending--
	w.cond.Broadcast()
}

// Digests writes what is left of DIGESTS, when all segments have been submitted: nvram
// are the digests of the NVRAM part's slots, disk those of the disk slots. The root, which IDENTITY holds, stands for
// all of them. digest.ErrTooMany says that the image has to do without.
func (w *Writer) Digests(nvram, disk []digest.Sum) (root digest.Root, err error) {
	if err := w.Drain(); err != nil {
		return root, err
	}
	w.sumsMu.Lock()
	defer w.sumsMu.Unlock()
	if root, err = w.sums.Finish(nvram, disk); err != nil {
		return root, err
	}
	for {
		c, ok := w.sums.Next()
		if !ok {
			return root, nil
		}
		b := w.NewBuffer(Digests)
		b.Number, b.Data = c.Number, append(b.Data, c.Data...)
		if err := w.Submit(b); err != nil {
			return root, err
		}
	}
}

func (w *Writer) appended(b *Buffer, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err != nil && w.err == nil {
		w.err = err
	}
	if w.err == nil {
		e := frameEntry{b.Kind, b.Number, uint32(len(b.out) - FrameHeaderLen)}
		if b.Kind.IsSegment() {
			for len(w.segments) <= int(b.Number) {
				w.segments = append(w.segments, frameAt{})
			}
			w.segments[b.Number] = frameAt{e, w.off}
		}
		w.frames = append(w.frames, e)
		w.off += int64(len(b.out))
		if w.off-w.flushed >= writebackEvery {
			// Advisory: a failure to write shows up in Sync.
			w.err = rescue.Call(func() error { w.f.StartWriteback(w.flushed, w.off-w.flushed); return nil })
			w.flushed = w.off
		}
	}
	w.cond.Broadcast()
}

func (w *Writer) failed() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.err
}

// Len is the number of bytes appended so far.
func (w *Writer) Len() int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.off
}

// Drain waits until every submitted frame has been handed to the file system.
func (w *Writer) Drain() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.pending > 0 {
		w.cond.Wait()
	}
	return w.err
}

// Sync drains and makes everything appended so far durable.
func (w *Writer) Sync() error {
	if err := w.Drain(); err != nil {
		return err
	}
	return w.fail(w.f.Sync())
}

// Start drains, and asks for everything appended so far to be written out soon. It is durable
// after Sync or Finish.
func (w *Writer) Start() error {
	if err := w.Drain(); err != nil {
		return err
	}
	w.mu.Lock()
	off, n := w.flushed, w.off-w.flushed
	w.flushed = w.off
	w.mu.Unlock()
	return w.fail(rescue.Call(func() error { w.f.StartWriteback(off, n); return nil }))
}

func (w *Writer) fail(err error) error {
	if err != nil {
		w.mu.Lock()
		if w.err == nil {
			w.err = err
		}
		w.mu.Unlock()
	}
	return err
}

// FetchSegment reads segment n, which must have been submitted, as it is stored, and checks
// it, while the image is still being written: XBZRLE needs a page's last content, and
// deduplication the digests of candidates. It waits for a segment in flight. Safe for
// several goroutines.
func (w *Writer) FetchSegment(st *Stored, n uint32) error {
	w.mu.Lock()
	for w.err == nil && (int(n) >= len(w.segments) || w.segments[n].off == 0) && w.pending > 0 {
		w.cond.Wait()
	}
	if w.err != nil {
		w.mu.Unlock()
		return w.err
	}
	if int(n) >= len(w.segments) || w.segments[n].off == 0 {
		w.mu.Unlock()
		return fmt.Errorf("segment %d was never submitted", n)
	}
	at := w.segments[n]
	w.mu.Unlock()
	return st.fetch(w.f, w.hdr, at)
}

// Finish appends META, INDEX, IDENTITY and the footer and makes the image durable.
// The image is a checkpoint once its file has its final name.
func (w *Writer) Finish(meta, identity []byte) error {
	if len(meta) > MaxMeta || len(identity) > MaxIdentity {
		return fmt.Errorf("META document of %d bytes, IDENTITY of %d", len(meta), len(identity))
	}
	b := w.NewBuffer(Meta)
	b.Data = append(b.Data, meta...)
	if err := w.Submit(b); err != nil {
		return err
	}
	if err := w.Drain(); err != nil {
		return err
	}
	if err := w.stop(); err != nil {
		return err
	}
	index := make([]byte, 0, len(w.frames)*indexEntryLen)
	for _, e := range w.frames {
		index = append(index, byte(e.kind))
		index = binary.LittleEndian.AppendUint32(index, e.number)
		index = binary.LittleEndian.AppendUint32(index, e.stored)
	}
	end := appendFrame(nil, Index, 0, index)
	end = appendFrame(end, Identity, 0, identity)
	end = footer{
		features:    w.hdr.Features,
		indexOffset: uint64(w.off), indexStored: uint32(len(index)), frames: uint32(len(w.frames)),
		metaStored: w.frames[len(w.frames)-1].stored, identityStored: uint32(len(identity)),
		length: uint64(w.off) + uint64(len(end)) + FooterLen, uuid: w.hdr.UUID,
	}.append(end)
	if _, err := w.f.Write(end); err != nil {
		return w.fail(err)
	}
	w.off += int64(len(end))
	return w.fail(w.f.Sync())
}

// appendFrame appends a frame that is stored as it is.
func appendFrame(dst []byte, k Kind, number uint32, payload []byte) []byte {
	head := len(dst)
	dst = slices.Grow(dst, FrameHeaderLen+len(payload))[:head+FrameHeaderLen]
	frameHeader{
		kind: k, raw: uint32(len(payload)), stored: uint32(len(payload)), number: number, crc: integrity.Checksum(payload),
	}.put(dst[head:])
	return append(dst, payload...)
}

// errAborted is what later calls get after Abort.
var errAborted = errors.New("image: aborted")

// Abort stops the workers without finishing the image. The caller removes the
// file. It may be called after Finish, and then does nothing.
func (w *Writer) Abort() {
	w.fail(errAborted)
	w.stop()
}

// stop ends all goroutines; what was submitted is appended first.
func (w *Writer) stop() error {
	if !w.closed {
		w.closed = true
		close(w.order)
		close(w.jobs)
		w.workers.Wait()
		<-w.done
	}
	return w.failed()
}
