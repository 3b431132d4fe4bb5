package image_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"go.uber.org/goleak"

	"github.com/flic-migrate/flic-migrate/tier/digest"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
	"github.com/flic-migrate/flic-migrate/tier/vfs/crashfs"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const pageSize = 1024

var identity = []byte(`{"vm":"name"}`)

var header = image.Header{PageSize: pageSize, SegmentPages: 4, UUID: uuid.UUID{1, 2, 3}, Created: time.Unix(1700000000, 42)}

// frame is what a test puts into an image and expects to find there.
type frame struct {
	kind   image.Kind
	number uint32
	data   []byte
}

// create makes a file on a disk of its own.
func create(t testing.TB) vfs.File {
	t.Helper()
	f, err := crashfs.New(0).Create("/image")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func content(f vfs.File) []byte {
	n, _ := f.Size()
	b := make([]byte, n)
	f.ReadAt(b, 0)
	return b
}

// pages is so many pages: random ones, or such that compress.
func pages(n int, seed uint64, compressible bool) []byte {
	b := make([]byte, n*pageSize)
	rng := rand.New(rand.NewPCG(seed, 1))
	for i := range b {
		b[i] = byte(rng.Uint32())
		if compressible {
			b[i] = "abcd"[b[i]%4]
		}
	}
	return b
}

// records is a RECORDS segment with so many payloads.
func records(n int) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(n))
	for i := range n {
		b = binary.BigEndian.AppendUint32(b, uint32(i*i))
	}
	for i := range n {
		b = append(b, bytes.Repeat([]byte{byte(i)}, i*i)...)
	}
	return b
}

// write writes an image with frames of every kind and returns them.
func write(t testing.TB, f vfs.File, codec image.Codec, workers int) []frame {
	t.Helper()
	w, err := image.NewWriter(f, header, codec, workers)
	if err != nil {
		t.Fatal(err)
	}
	var frames []frame
	add := func(k image.Kind, data []byte) {
		b := w.NewBuffer(k)
		b.Data = append(b.Data, data...)
		frames = append(frames, frame{k, b.Number, data})
		if err := w.Submit(b); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 20 {
		add(image.Pages, pages(1+i%4, uint64(i), i%3 != 0))
		if i%4 == 0 {
			add(image.Skeleton, []byte(strings.Repeat("skeleton ", 1+i*50)))
		}
		if i%7 == 0 {
			add(image.Records, records(1+i%4))
		}
		if i == 5 {
			w.Discard(w.NewBuffer(image.Pages)) // a number that stays unused
		}
	}
	add(image.PageMap, []byte("table"))
	add(image.PageMap, bytes.Repeat([]byte("x"), image.MaxChunk))
	add(image.NVRAM, []byte("extents"))
	meta := []byte(`{"a":"document"}`)
	if err := w.Finish(meta, identity); err != nil {
		t.Fatal(err)
	}
	frames = append(frames, frame{image.Meta, 0, meta})
	w.Abort() // does nothing any more
	return frames
}

// TestRoundTrip reads back every frame of images of every codec.
func TestRoundTrip(t *testing.T) {
	for name, codec := range image.Codecs {
		for _, workers := range []int{0, 1, 5} {
			t.Run(fmt.Sprint(name, workers), func(t *testing.T) {
				f := create(t)
				want := write(t, f, codec, workers)
				im, err := image.Open(f)
				if err != nil {
					t.Fatal(err)
				}
				if !im.Created.Equal(header.Created) || im.UUID != header.UUID || im.PageSize != pageSize || im.SegmentPages != 4 {
					t.Errorf("header %+v", im.Header)
				}
				if n, _ := f.Size(); im.Len() != n || im.Name() != f.Name() {
					t.Errorf("%s of %d bytes", im.Name(), im.Len())
				}
				// In the order of Submit.
				i := 0
				stored := map[image.Kind]int64{}
				next := int64(image.HeaderLen)
				err = im.Frames(func(k image.Kind, n uint32, off int64) error {
					if k != want[i].kind || n != want[i].number {
						t.Errorf("frame %d is %v %d, want %v %d", i, k, n, want[i].kind, want[i].number)
					}
					if off < next {
						t.Errorf("frame %d is at %d", i, off)
					}
					next = off + image.FrameHeaderLen
					stored[k]++
					i++
					return nil
				})
				if err != nil || i != len(want) {
					t.Errorf("%d frames of %d, %v", i, len(want), err)
				}
				var sr, reused image.SegmentReader
				var segments int
				for _, w := range want {
					if !w.kind.IsSegment() {
						b, err := im.Chunk(w.kind, int(w.number))
						if err != nil || !bytes.Equal(b, w.data) {
							t.Errorf("%v %d: %v", w.kind, w.number, err)
						}
						continue
					}
					segments = max(segments, int(w.number)+1)
					for _, sr := range []*image.SegmentReader{&sr, &reused} {
						s, err := im.Segment(sr, w.number)
						if err != nil {
							t.Fatalf("segment %d: %v", w.number, err)
						}
						check(t, s, w)
						if sr == &reused {
							sr.Recycle(s)
						}
					}
				}
				if im.Segments() != segments || im.Chunks(image.Skeleton) != 5 || im.Chunks(image.PageMap) != 2 {
					t.Errorf("%d segments, %d and %d chunks", im.Segments(), im.Chunks(image.Skeleton), im.Chunks(image.PageMap))
				}
				if im.StoredBytes(image.Skeleton) < stored[image.Skeleton]*image.FrameHeaderLen {
					t.Errorf("skeleton takes %d bytes", im.StoredBytes(image.Skeleton))
				}
				missing(t, im, want)
			})
		}
	}
}

// check compares a segment with what was written.
func check(t *testing.T, s *image.Segment, want frame) {
	t.Helper()
	if s.Number != want.number || s.Kind != want.kind {
		t.Errorf("segment %d is %v %d", want.number, s.Kind, s.Number)
	}
	if s.Kind == image.Records {
		if !bytes.Equal(want.data, records(s.Len())) {
			t.Errorf("%d records", s.Len())
		}
		for i := range s.Len() {
			if b, err := s.Record(i); err != nil || !bytes.Equal(b, bytes.Repeat([]byte{byte(i)}, i*i)) {
				t.Errorf("record %d: %v, %v", i, b, err)
			}
		}
		if _, err := s.Page(0); !integrity.IsCorrupt(err) {
			t.Errorf("page of a segment of records: %v", err)
		}
		if _, err := s.Record(s.Len()); !integrity.IsCorrupt(err) {
			t.Errorf("record behind the last: %v", err)
		}
		return
	}
	if s.Len()*pageSize != len(want.data) || s.Bytes() != len(want.data) {
		t.Errorf("%d pages of %d bytes", s.Len(), len(want.data))
	}
	for i := range s.Len() {
		if b, err := s.Page(i); err != nil || !bytes.Equal(b, want.data[i*pageSize:(i+1)*pageSize]) {
			t.Errorf("page %d: %v", i, err)
		} else if cap(b) != pageSize {
			t.Errorf("page %d could be appended to over the next", i)
		}
	}
	if _, err := s.Page(s.Len()); !integrity.IsCorrupt(err) {
		t.Errorf("page behind the last: %v", err)
	}
	if _, err := s.Record(0); !integrity.IsCorrupt(err) {
		t.Errorf("record of a segment of pages: %v", err)
	}
}

// missing asks for what is not there.
func missing(t *testing.T, im *image.Image, want []frame) {
	t.Helper()
	has := map[uint32]bool{}
	for _, w := range want {
		if w.kind.IsSegment() {
			has[w.number] = true
		}
	}
	var sr image.SegmentReader
	var gaps int
	for n := range uint32(im.Segments() + 2) {
		if has[n] != (im.SegmentOffset(n) > 0) {
			t.Errorf("segment %d is at %d", n, im.SegmentOffset(n))
		}
		if !has[n] {
			gaps++
			if _, err := im.Segment(&sr, n); !integrity.IsCorrupt(err) {
				t.Errorf("segment %d, which is not there: %v", n, err)
			}
		}
	}
	if gaps != 3 { // the discarded one and the two behind the end
		t.Errorf("%d numbers without a segment", gaps)
	}
	for _, n := range []int{-1, 2} {
		if _, err := im.Chunk(image.PageMap, n); !integrity.IsCorrupt(err) {
			t.Errorf("chunk %d: %v", n, err)
		}
	}
}

// TestRemainsEnds: who is to end looks at no further frame, whether they are whole or not.
func TestRemainsEnds(t *testing.T) {
	f := create(t)
	write(t, f, image.None, 1)
	im, err := image.Open(f)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	asked, got := 0, 0
	err = im.Remains(ctx, func(image.Kind, uint32) bool {
		if asked++; asked == 3 {
			cancel()
		}
		return true
	}, func(image.Kind, uint32, int64, []byte) error {
		got++
		return nil
	})
	if !errors.Is(err, context.Canceled) || asked != 3 || got != 2 {
		t.Errorf("%v after %d frames of %d", err, got, asked)
	}
}

// TestIncompressible keeps random pages as they are.
func TestIncompressible(t *testing.T) {
	for name, codec := range image.Codecs {
		f := create(t)
		w, err := image.NewWriter(f, header, codec, 1)
		if err != nil {
			t.Fatal(err)
		}
		for _, compressible := range []bool{false, true} {
			b := w.NewBuffer(image.Pages)
			b.Data = append(b.Data, pages(4, 1, compressible)...)
			if err := w.Submit(b); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Finish(nil, nil); err != nil {
			t.Fatal(err)
		}
		b := content(f)
		first := b[image.HeaderLen:]
		if image.Codec(first[1]) != image.None {
			t.Errorf("%s: random pages are stored as %v", name, image.Codec(first[1]))
		}
		second := first[image.FrameHeaderLen+4*pageSize:]
		if got := image.Codec(second[1]); got != codec {
			t.Errorf("%s: text is stored as %v", name, got)
		}
		if n := binary.LittleEndian.Uint32(second[8:]); codec != image.None && n > 3*pageSize {
			t.Errorf("%s: 4 pages of text take %d bytes", name, n)
		}
	}
}

// TestReadSegment reads segments back while the image is being written, as soon
// as they are submitted, from several goroutines.
func TestReadSegment(t *testing.T) {
	f := create(t)
	w, err := image.NewWriter(f, header, image.LZ4, 2)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Abort()
	var sr image.SegmentReader
	if _, err := w.ReadSegment(&sr, 0); err == nil {
		t.Error("read a segment that was not submitted")
	}
	submitted := make(chan uint32, 200)
	var readers sync.WaitGroup
	for range 3 {
		readers.Go(func() {
			var sr image.SegmentReader
			for n := range submitted {
				s, err := w.ReadSegment(&sr, n)
				if err != nil {
					t.Errorf("segment %d: %v", n, err)
					return
				}
				if b, err := s.Page(1); err != nil || !bytes.Equal(b, pages(2, uint64(n), true)[pageSize:]) {
					t.Errorf("segment %d: wrong page (%v)", n, err)
				}
			}
		})
	}
	var recent int
	for n := range uint32(200) {
		b := w.NewBuffer(image.Pages)
		b.Data = append(b.Data, pages(2, uint64(n), true)...)
		if err := w.Submit(b); err != nil {
			t.Fatal(err)
		}
		submitted <- n
		if got := w.Recent(n); got != nil {
			recent++
			if !bytes.Equal(got, pages(2, uint64(n), true)) {
				t.Fatalf("Recent(%d) is something else", n)
			}
		}
	}
	close(submitted)
	readers.Wait()
	if recent != 200 || w.Recent(0) != nil || w.Recent(1000) != nil {
		t.Errorf("%d of 200 segments were at hand after Submit, segment 0 still: %v", recent, w.Recent(0) != nil)
	}
	if err := w.Drain(); err != nil {
		t.Fatal(err)
	}
	if n, _ := f.Size(); w.Len() != n {
		t.Errorf("Len %d, the file has %d", w.Len(), n)
	}
}

// TestWriteFails stops at the first failure and says so to every later call.
func TestWriteFails(t *testing.T) {
	for n := range 12 {
		disk := crashfs.New(0)
		f, err := disk.Create("/image")
		if err != nil {
			t.Fatal(err)
		}
		disk.FailAt(n, syscall.ENOSPC)
		w, err := image.NewWriter(f, header, image.LZ4, 2)
		if err != nil {
			if n > 0 || !errors.Is(err, syscall.ENOSPC) {
				t.Errorf("write %d: NewWriter: %v", n, err)
			}
			continue
		}
		for range 8 {
			b := w.NewBuffer(image.Pages)
			b.Data = append(b.Data, pages(4, 1, false)...)
			if err = w.Submit(b); err != nil {
				break
			}
			if err = w.Drain(); err != nil {
				break
			}
		}
		if err == nil {
			err = w.Sync()
		}
		if err == nil {
			err = w.Finish([]byte("{}"), nil)
		} else {
			for what, later := range map[string]error{"Drain": w.Drain(), "Sync": w.Sync(), "Finish": w.Finish(nil, nil)} {
				if !errors.Is(later, syscall.ENOSPC) {
					t.Errorf("write %d: %s: %v", n, what, later)
				}
			}
			var sr image.SegmentReader
			if _, err := w.ReadSegment(&sr, 0); !errors.Is(err, syscall.ENOSPC) {
				t.Errorf("write %d: ReadSegment: %v", n, err)
			}
		}
		if !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("write %d: %v", n, err)
		}
		w.Abort()
		w.Abort()
		if _, err := image.Open(f); !integrity.IsCorrupt(err) {
			t.Errorf("write %d: the image can be opened: %v", n, err)
		}
		f.Close()
	}
}

// TestAbort ends a Writer that has frames in flight.
func TestAbort(t *testing.T) {
	f := create(t)
	w, err := image.NewWriter(f, header, image.Zstd, 2)
	if err != nil {
		t.Fatal(err)
	}
	for range 10 {
		b := w.NewBuffer(image.Pages)
		b.Data = append(b.Data, pages(4, 1, true)...)
		if err := w.Submit(b); err != nil {
			t.Fatal(err)
		}
	}
	w.Abort()
	if err := w.Drain(); err == nil {
		t.Error("Drain after Abort")
	}
}

// TestBadHeader refuses headers that no image may have.
func TestBadHeader(t *testing.T) {
	for _, h := range []image.Header{
		{PageSize: 0, SegmentPages: 4}, {PageSize: 1000, SegmentPages: 4}, {PageSize: 1 << 17, SegmentPages: 4},
		{PageSize: 4096, SegmentPages: 0}, {PageSize: 4096, SegmentPages: image.MaxSegmentPages + 1}, {PageSize: -4096, SegmentPages: 4},
	} {
		if _, err := image.NewWriter(create(t), h, image.None, 1); err == nil {
			t.Errorf("%+v was taken", h)
		}
	}
}

// builder makes images of frames that no Writer makes, with right checksums.
type builder struct {
	b     []byte
	index []byte
	n     uint32
}

func newBuilder(t testing.TB) *builder {
	f := create(t)
	w, err := image.NewWriter(f, header, image.None, 1)
	if err != nil {
		t.Fatal(err)
	}
	w.Abort()
	return &builder{b: content(f)}
}

// frame adds a frame; raw is its raw length, or the payload's if negative.
func (b *builder) frame(k image.Kind, codec image.Codec, number uint32, raw int, payload []byte) *builder {
	if raw < 0 {
		raw = len(payload)
	}
	b.b = append(b.b, frameHead(k, codec, number, uint32(raw), payload)...)
	b.b = append(b.b, payload...)
	return b.entry(k, number, uint32(len(payload)))
}

// entry adds an entry to the index.
func (b *builder) entry(k image.Kind, number, stored uint32) *builder {
	b.index = append(b.index, byte(k))
	b.index = binary.LittleEndian.AppendUint32(b.index, number)
	b.index = binary.LittleEndian.AppendUint32(b.index, stored)
	b.n++
	return b
}

func frameHead(k image.Kind, codec image.Codec, number, raw uint32, payload []byte) []byte {
	le := binary.LittleEndian
	h := []byte{byte(k), byte(codec), 0, 0}
	h = le.AppendUint32(h, raw)
	h = le.AppendUint32(h, uint32(len(payload)))
	h = le.AppendUint32(h, number)
	h = le.AppendUint32(h, integrity.Checksum(payload))
	return le.AppendUint32(h, integrity.Checksum(h))
}

// done adds META, index, IDENTITY and footer.
func (b *builder) done() []byte { return b.frame(image.Meta, image.None, 0, -1, nil).end() }

// end is done without META.
func (b *builder) end() []byte {
	le := binary.LittleEndian
	at := len(b.b)
	b.b = append(append(b.b, frameHead(image.Index, image.None, 0, uint32(len(b.index)), b.index)...), b.index...)
	b.b = append(append(b.b, frameHead(image.Identity, image.None, 0, uint32(len(identity)), identity)...), identity...)
	foot := make([]byte, image.FooterLen)
	le.PutUint32(foot[8:], image.Version)
	le.PutUint64(foot[32:], uint64(at))
	b.b = append(b.b, foot...)
	tiertest.Reseal(b.b)
	return b.b
}

// read opens an image and reads all of it.
func read(b []byte) error {
	disk := crashfs.New(0)
	f, err := disk.Create("/image")
	if err != nil {
		return err
	}
	defer f.Close()
	f.WriteAt(b, 0)
	im, err := image.Open(f)
	if err != nil {
		return err
	}
	var sr image.SegmentReader
	return im.Frames(func(k image.Kind, n uint32, _ int64) error {
		if k.IsSegment() {
			s, err := im.Segment(&sr, n)
			if err != nil {
				return err
			}
			for i := range s.Len() {
				if s.Kind == image.Records {
					_, err = s.Record(i)
				} else {
					_, err = s.Page(i)
				}
				if err != nil {
					return err
				}
			}
			sr.Recycle(s)
			if s.Len() != 0 {
				return errors.New("a recycled segment has pages")
			}
			return nil
		}
		_, err := im.Chunk(k, int(n))
		return err
	})
}

// TestContradictions reads images whose checksums are right and whose fields
// are not.
func TestContradictions(t *testing.T) {
	page := pages(1, 1, false)
	be := binary.BigEndian.AppendUint32
	whole := func(t testing.TB) []byte { return newBuilder(t).frame(image.Pages, image.None, 0, -1, page).done() }
	if err := read(whole(t)); err != nil {
		t.Fatalf("an image in order: %v", err)
	}
	field := func(off int, v uint32, end bool) func(t testing.TB) []byte {
		return func(t testing.TB) []byte {
			b := whole(t)
			if end {
				foot := b[len(b)-image.FooterLen:]
				binary.LittleEndian.PutUint32(foot[off:], v)
				tiertest.SealEnd(foot)
				return b
			}
			binary.LittleEndian.PutUint32(b[off:], v)
			tiertest.Reseal(b)
			return b
		}
	}
	one := func(k image.Kind, codec image.Codec, number uint32, raw int, payload []byte) func(testing.TB) []byte {
		return func(t testing.TB) []byte { return newBuilder(t).frame(k, codec, number, raw, payload).done() }
	}
	for name, c := range map[string]struct {
		image func(testing.TB) []byte
		says  string
	}{
		"page size":                {field(12, 1000, false), "page size"},
		"huge page size":           {field(12, 1<<31, false), "page size"},
		"no pages in a segment":    {field(16, 0, false), "in a segment"},
		"many pages in a segment":  {field(16, 1<<20, false), "in a segment"},
		"header's reserved bytes":  {field(20, 1, false), "reserved"},
		"header's last reserved":   {field(120, 1<<31, false), "reserved"},
		"footer's reserved bytes":  {field(12, 1, true), "reserved"},
		"footer's last reserved":   {field(120, 1<<24, true), "reserved"},
		"features of the footer":   {field(24, 2, true), "different features"},
		"index elsewhere":          {field(32, 64, true), "index is not where"},
		"index before the start":   {field(32, 0, true), "index is not where"},
		"index far away":           {field(36, 1<<31, true), "index is not where"},
		"index of another length":  {field(40, 27, true), "index is not where"},
		"more frames":              {field(44, 3, true), "frames"},
		"META of another length":   {field(48, 1, true), "last frame is not the META"},
		"META before the start":    {field(48, 1<<31, true), "META is not where"},
		"IDENTITY of no length":    {field(52, 0, true), "index is not where"},
		"longer file":              {field(56, 1<<20, true), "footer says"},
		"footer of another":        {field(64, 99, true), "different checkpoints"},
		"kind 0":                   {one(0, image.None, 0, -1, page), "kind 0 frame"},
		"index within":             {one(image.Index, image.None, 0, -1, page), "INDEX frame before"},
		"identity within":          {one(image.Identity, image.None, 0, -1, page), "IDENTITY frame before"},
		"far number":               {one(image.Pages, image.None, 1<<31, -1, page), "numbered"},
		"no META":                  {func(t testing.TB) []byte { return newBuilder(t).frame(image.Pages, image.None, 0, -1, page).end() }, "META"},
		"unknown codec":            {one(image.Pages, 9, 0, -1, page), "unknown codec 9"},
		"raw and stored differ":    {one(image.Pages, image.None, 0, 2*pageSize, page), "raw length"},
		"raw beyond a segment":     {one(image.Pages, image.None, 0, 5*pageSize, page), "too large"},
		"raw of 4 GiB":             {one(image.Pages, image.Zstd, 0, 1<<32-1, page), "too large"},
		"stored beyond a segment":  {one(image.Pages, image.None, 0, pageSize, pages(5, 1, false)), "too large"},
		"no whole pages":           {one(image.Pages, image.None, 0, -1, page[:1000]), "no whole pages"},
		"empty segment":            {one(image.Pages, image.None, 0, -1, nil), "no whole pages"},
		"bad LZ4":                  {one(image.Pages, image.LZ4, 0, pageSize, page), ""},
		"bad MinLZ":                {one(image.Pages, image.MinLZ, 0, pageSize, page), ""},
		"MinLZ that claims 1 GiB":  {one(image.Pages, image.MinLZ, 0, pageSize, []byte{0, 0x80, 0x80, 0x80, 0x80, 4, 0}), ""},
		"bad Zstandard":            {one(image.Pages, image.Zstd, 0, pageSize, page), ""},
		"empty Zstandard":          {one(image.Pages, image.Zstd, 0, pageSize, nil), ""},
		"LZ4 of nothing":           {one(image.Skeleton, image.LZ4, 0, 0, page[:25]), "stand for nothing"},
		"records too short":        {one(image.Records, image.None, 0, -1, []byte{0, 0, 1}), "too short"},
		"no records":               {one(image.Records, image.None, 0, -1, be(nil, 0)), "0 records"},
		"more records than fit":    {one(image.Records, image.None, 0, -1, be(nil, 5)), "5 records"},
		"records without lengths":  {one(image.Records, image.None, 0, -1, be(nil, 2)), "2 records"},
		"record beyond the end":    {one(image.Records, image.None, 0, -1, be(be(nil, 1), 7)), "ends behind"},
		"record of 4 GiB":          {one(image.Records, image.None, 0, -1, be(be(be(nil, 2), 1<<32-1), 1)), "ends behind"},
		"bytes behind the records": {one(image.Records, image.None, 0, -1, append(be(be(nil, 1), 1), "ab"...)), "behind the last record"},
		"bytes behind the deltas":  {withDeltas(one(image.Deltas, image.None, 0, -1, append(be(be(nil, 1), 1), "ab"...))), "behind the last delta"},
		"no deltas":                {withDeltas(one(image.Deltas, image.None, 0, -1, be(nil, 0))), "0 deltas"},
		"delta beyond the end":     {withDeltas(one(image.Deltas, image.None, 0, -1, be(be(nil, 1), 7))), "delta 0 ends behind"},
		"pieces untold":            {withDeltas(one(image.Deltas, image.None, 0, -1, be(be(nil, 1), image.InPieces))), "delta 0 ends behind"},
		"deltas untold":            {one(image.Deltas, image.None, 0, -1, be(be(nil, 1), 0)), "DELTAS frame in an image whose features do not tell of it"},
		"bases untold":             {one(image.Bases, image.None, 0, -1, page), "BASES frame in an image whose features"},
		"references untold":        {one(image.References, image.None, 0, -1, page), "REFERENCES frame in an image whose features"},
		"two of one number": {func(t testing.TB) []byte {
			return newBuilder(t).frame(image.Pages, image.None, 0, -1, page).frame(image.Records, image.None, 0, -1, page).done()
		}, "two"},
		"frame of another number": {func(t testing.TB) []byte {
			b := newBuilder(t)
			b.b = append(append(b.b, frameHead(image.Pages, image.None, 3, pageSize, page)...), page...)
			return b.entry(image.Pages, 0, pageSize).done()
		}, "found PAGES 3"},
		"frame of another kind": {func(t testing.TB) []byte {
			b := newBuilder(t)
			b.b = append(append(b.b, frameHead(image.Pages, image.None, 0, pageSize, page)...), page...)
			return b.entry(image.Skeleton, 0, pageSize).done()
		}, "found PAGES 0"},
		"index that ends early": {func(t testing.TB) []byte {
			b := newBuilder(t).frame(image.Pages, image.None, 0, -1, page)
			b.b = append(b.b, "between"...)
			return b.done()
		}, ""},
		"index that goes too far": {func(t testing.TB) []byte {
			return newBuilder(t).frame(image.Pages, image.None, 0, -1, page).entry(image.Pages, 1, 1<<31).done()
		}, "frames end at"},
	} {
		err := read(c.image(t))
		var corrupt *integrity.CorruptError
		if !errors.As(err, &corrupt) || !strings.Contains(err.Error(), c.says) || corrupt.File != "/image" || corrupt.What == "" {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// holes is a file of which little was written. It notes the longest read.
type holes struct {
	size    int64
	written map[int64][]byte
	longest int
}

func (h *holes) Name() string         { return "/holes" }
func (h *holes) Size() (int64, error) { return h.size, nil }

func (h *holes) ReadAt(b []byte, off int64) (int, error) {
	h.longest = max(h.longest, len(b))
	n := int(min(int64(len(b)), h.size-off))
	clear(b[:n])
	for at, w := range h.written {
		if from, to := max(at, off), min(at+int64(len(w)), off+int64(n)); from < to {
			copy(b[from-off:to-off], w[from-at:])
		}
	}
	if n < len(b) {
		return n, io.EOF
	}
	return n, nil
}

// TestIndexInHoles: what a file of some KB says of the length of its index takes no memory,
// whether the checksum of the zeros is right or not.
func TestIndexInHoles(t *testing.T) {
	const frames = 8 << 20
	var zeros [9 << 10]byte
	crc := integrity.Hash()
	for range frames / 1024 {
		crc.Write(zeros[:])
	}
	for _, right := range []bool{true, false} {
		le := binary.LittleEndian
		h := &holes{written: map[int64][]byte{0: newBuilder(t).b}}
		index := int64(frames * (image.FrameHeaderLen + 1))
		head := frameHead(image.Index, image.None, 0, 0, nil)
		le.PutUint32(head[4:], frames*9)
		le.PutUint32(head[8:], frames*9)
		if le.PutUint32(head[16:], crc.Sum32()); !right {
			head[16] ^= 1
		}
		le.PutUint32(head[20:], integrity.Checksum(head[:20]))
		h.written[index] = head
		// A whole image has the footer's other fields.
		end := newBuilder(t).done()
		foot := end[len(end)-image.FooterLen:]
		le.PutUint64(foot[32:], uint64(index))
		le.PutUint32(foot[40:], frames*9)
		le.PutUint32(foot[44:], frames)
		last := append(frameHead(image.Identity, image.None, 0, uint32(len(identity)), identity), identity...)
		h.size = index + int64(len(head)) + frames*9 + int64(len(last)) + image.FooterLen
		le.PutUint64(foot[56:], uint64(h.size))
		tiertest.SealEnd(foot)
		h.written[h.size-image.FooterLen-int64(len(last))] = append(last, foot...)

		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err := image.Open(h)
		runtime.ReadMemStats(&after)
		says := "kind 0 frame"
		if !right {
			says = integrity.ErrChecksum.Error()
		}
		if !integrity.IsCorrupt(err) || !strings.Contains(err.Error(), says) {
			t.Errorf("checksum right %v: %v", right, err)
		}
		if n := after.TotalAlloc - before.TotalAlloc; n > 8<<20 || h.longest > 1<<20 {
			t.Errorf("checksum right %v: %d bytes of memory, and %d are read at once", right, n, h.longest)
		}
	}
}

// TestUnsupported refuses images of other versions, with features or with frames
// that nobody here knows, and says so: they are not damaged.
func TestUnsupported(t *testing.T) {
	page := pages(1, 1, false)
	whole := newBuilder(t).frame(image.Pages, image.None, 0, -1, page).done()
	changed := func(off int, v uint32) []byte {
		b := bytes.Clone(whole)
		binary.LittleEndian.PutUint32(b[off:], v)
		tiertest.ResealEnds(b)
		return b
	}
	one := func(end bool) []byte { // as version 1 began and ended
		b := bytes.Clone(whole)
		at, magic := 0, image.Magic
		if end {
			at, magic = len(b)-64, "FLICEND\x00"
		}
		clear(b[at : at+64])
		copy(b[at:], magic)
		b[at+8] = 1
		tiertest.SealEnd(b[at : at+64])
		return b
	}
	for name, c := range map[string]struct {
		b    []byte
		says string
	}{
		"version 1":             {one(false), "/image: an earlier flic-migrate wrote it, in version 1 of the format; this one reads version 2"},
		"version 1, the footer": {one(true), "an earlier flic-migrate wrote it, in version 1"},
		"short of version 1":    {one(false)[:70], "an earlier flic-migrate wrote it, in version 1"},
		"version 3":             {changed(8, 3), "version 3 of the format; this flic-migrate reads version 2"},
		"version of the footer": {changed(len(whole)-image.FooterLen+8, 7), "version 7"},
		"another feature":       {changed(24, 1<<9), "does not have: bit 9"},
		"far features":          {changed(28, 1<<31|1), "does not have: bit 32, bit 63"},
		"unknown segments":      {newBuilder(t).frame(9, image.None, 0, -1, page).done(), "frames of kind 9"},
		"unknown chunks":        {newBuilder(t).frame(23, image.None, 0, -1, page).done(), "frames of kind 23"},
		"unknown description":   {newBuilder(t).frame(127, image.None, 0, -1, page).done(), "frames of kind 127"},
	} {
		err := read(c.b)
		var u *image.UnsupportedError
		if !errors.As(err, &u) || integrity.IsCorrupt(err) || !strings.Contains(err.Error(), c.says) || u.File != "/image" {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Version 1's sentence is for whole headers: a flipped bit in this one's version
	// is damage.
	b := bytes.Clone(whole)
	b[8] ^= 3
	if err := read(b); !errors.Is(err, integrity.ErrChecksum) {
		t.Errorf("flipped version: %v", err)
	}
}

// TestOptional reads images with what a later version may add without harm to this
// one: compatible features, and frames of optional kinds. Their bytes are checked like
// all others.
func TestOptional(t *testing.T) {
	page := pages(1, 1, false)
	b := newBuilder(t).frame(200, image.None, 0, -1, page).frame(image.Pages, image.None, 1, -1, page).done()
	b[32] = 0xff // compatible features
	tiertest.ResealEnds(b)
	if err := read(b); err != nil {
		t.Fatal(err)
	}
	b[image.HeaderLen+image.FrameHeaderLen] ^= 1
	if err := read(b); !errors.Is(err, integrity.ErrChecksum) {
		t.Errorf("damage in a frame of an unknown kind: %v", err)
	}
}

// withDeltas is an image with the feature that DELTAS need.
func withDeltas(b func(testing.TB) []byte) func(testing.TB) []byte {
	return func(t testing.TB) []byte {
		b := b(t)
		b[24] |= image.HasDeltas
		tiertest.ResealEnds(b)
		return b
	}
}

// TestPieces reads back deltas of both kinds.
func TestPieces(t *testing.T) {
	f := create(t)
	h := header
	h.Features.Incompat = image.HasDeltas | image.HasPieces
	w, err := image.NewWriter(f, h, image.MinLZ, 1)
	if err != nil {
		t.Fatal(err)
	}
	b := w.NewBuffer(image.Deltas)
	b.Data = append(b.Data, records(4)...)
	b.Data[4+4*2] |= 0x80 // of the third's length
	if err := w.Submit(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Finish(nil, nil); err != nil {
		t.Fatal(err)
	}
	im, err := image.Open(f)
	if err != nil {
		t.Fatal(err)
	}
	var sr image.SegmentReader
	s, err := im.Segment(&sr, 0)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 4 {
		if d, pieces, err := s.Delta(i); err != nil || pieces != (i == 2) || !bytes.Equal(d, bytes.Repeat([]byte{byte(i)}, i*i)) {
			t.Errorf("delta %d: %x, %v, %v", i, d, pieces, err)
		}
	}
}

// TestDeltas reads back what a Deltas segment was filled with, and that it has
// neither pages nor records.
func TestDeltas(t *testing.T) {
	f := create(t)
	h := header
	h.Features = image.Features{Incompat: image.HasDeltas | image.HasReferences, Compat: image.HasDigests}
	w, err := image.NewWriter(f, h, image.MinLZ, 1)
	if err != nil {
		t.Fatal(err)
	}
	for k, data := range map[image.Kind][]byte{image.Deltas: records(4), image.Bases: []byte("bases"), image.References: []byte("references"), image.Digests: []byte("digests")} {
		b := w.NewBuffer(k)
		b.Data = append(b.Data, data...)
		if err := w.Submit(b); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Finish(nil, nil); err != nil {
		t.Fatal(err)
	}
	im, err := image.Open(f)
	if err != nil {
		t.Fatal(err)
	}
	if im.Features != h.Features {
		t.Errorf("features %+v", im.Features)
	}
	var sr image.SegmentReader
	s, err := im.Segment(&sr, 0)
	if err != nil || s.Len() != 4 {
		t.Fatal(s, err)
	}
	for i := range 4 {
		if d, pieces, err := s.Delta(i); err != nil || pieces || !bytes.Equal(d, bytes.Repeat([]byte{byte(i)}, i*i)) {
			t.Errorf("delta %d: %x, %v, %v", i, d, pieces, err)
		}
	}
	_, _, none := s.Delta(4)
	_, page := s.Page(0)
	_, record := s.Record(0)
	for says, err := range map[string]error{"no delta 4": none, "no page 0": page, "no record 0": record} {
		if !integrity.IsCorrupt(err) || !strings.Contains(err.Error(), "DELTAS segment 0: it has "+says) {
			t.Errorf("%s: %v", says, err)
		}
	}
	for k, want := range map[image.Kind]string{image.Bases: "bases", image.References: "references", image.Digests: "digests"} {
		if b, err := im.Chunk(k, 0); err != nil || string(b) != want {
			t.Errorf("%v: %q, %v", k, b, err)
		}
	}
}

// counting counts the reads of a Source.
type counting struct {
	image.Source
	reads, bytes int
}

func (c *counting) ReadAt(b []byte, off int64) (int, error) {
	c.reads++
	c.bytes += len(b)
	return c.Source.ReadAt(b, off)
}

// TestReadTail reads IDENTITY with one read, or two if it is long, however large the
// image is, and META with one more.
func TestReadTail(t *testing.T) {
	for _, c := range []struct{ identity, meta, reads int }{{1000, 100, 1}, {0, 0, 1}, {3900, 5000, 1}, {4000, 300 << 10, 2}, {image.MaxIdentity, image.MaxMeta, 2}} {
		f := create(t)
		w, err := image.NewWriter(f, header, image.LZ4, 1)
		if err != nil {
			t.Fatal(err)
		}
		for range 200 {
			b := w.NewBuffer(image.Pages)
			b.Data = append(b.Data, pages(4, 1, false)...)
			if err := w.Submit(b); err != nil {
				t.Fatal(err)
			}
		}
		identity, meta := bytes.Repeat([]byte("i"), c.identity), bytes.Repeat([]byte("m"), c.meta)
		if err := w.Finish(meta, identity); err != nil {
			t.Fatal(err)
		}
		src := &counting{Source: f}
		tail, err := image.ReadTail(src)
		if err != nil {
			t.Fatal(err)
		}
		if n, _ := f.Size(); tail.UUID != header.UUID || !bytes.Equal(tail.Identity, identity) || tail.Len() != n {
			t.Errorf("%d bytes of IDENTITY are %d, of checkpoint %v in %d bytes", c.identity, len(tail.Identity), tail.UUID, tail.Len())
		}
		if src.reads != c.reads || src.bytes > 4096+image.FrameHeaderLen+c.identity {
			t.Errorf("IDENTITY of %d bytes: %d reads of %d bytes", c.identity, src.reads, src.bytes)
		}
		if got, err := tail.Meta(); err != nil || !bytes.Equal(got, meta) || src.reads != c.reads+1 {
			t.Errorf("META of %d bytes: %v after %d reads", c.meta, err, src.reads)
		}
		for k, end := range map[image.Kind]int64{image.Identity: tail.Len() - image.FooterLen, image.Meta: tail.Len() - image.FooterLen - int64(image.FrameHeaderLen+c.identity)} {
			var damage *integrity.CorruptError
			if err := tail.Corrupt(k, errors.New("odd")); !errors.As(err, &damage) || damage.Offset >= end || damage.Offset < end-8<<10-int64(c.identity+c.meta) {
				t.Errorf("damage of %v: %v", k, err)
			}
		}
	}
	w, err := image.NewWriter(create(t), header, image.LZ4, 1)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Abort()
	if err := w.Finish(nil, make([]byte, image.MaxIdentity+1)); err == nil {
		t.Error("an IDENTITY that is too long")
	}
	if err := w.Finish(make([]byte, image.MaxMeta+1), nil); err == nil {
		t.Error("a META that is too long")
	}
}

// TestReadErrors passes on what is the file system's fault: it is no damage.
func TestReadErrors(t *testing.T) {
	disk := crashfs.New(0)
	f, err := disk.Create("/image")
	if err != nil {
		t.Fatal(err)
	}
	write(t, f, image.LZ4, 1)
	for n := range 4 {
		disk.FailReadAt(n, syscall.EIO)
		im, err := image.Open(f)
		if err == nil {
			_, err = im.Chunk(image.Meta, 0)
		}
		if !errors.Is(err, syscall.EIO) || integrity.IsCorrupt(err) {
			t.Errorf("read %d: %v", n, err)
		}
	}
}

func TestNames(t *testing.T) {
	for k, want := range map[fmt.Stringer]string{
		image.Pages: "PAGES", image.Records: "RECORDS", image.Skeleton: "SKELETON", image.PageMap: "PAGE MAP", image.NVRAM: "NVRAM",
		image.Deltas: "DELTAS", image.References: "REFERENCES", image.Digests: "DIGESTS", image.Disks: "DISKS", image.Bases: "BASES",
		image.Meta: "META", image.Index: "INDEX", image.Identity: "IDENTITY", image.Kind(77): "kind 77",
		image.None: "none", image.LZ4: "lz4", image.MinLZ: "minlz", image.Zstd: "zstd", image.Codec(77): "codec 77",
	} {
		if k.String() != want {
			t.Errorf("%s, want %s", k, want)
		}
	}
}

// FuzzOpen opens and reads any file, with its checksums put right and as it is.
func FuzzOpen(f *testing.F) {
	for _, codec := range image.Codecs {
		file := create(f)
		w, err := image.NewWriter(file, image.Header{PageSize: 256, SegmentPages: 2, Features: image.Features{Incompat: image.HasDeltas | image.HasReferences | image.HasDisks}}, codec, 1)
		if err != nil {
			f.Fatal(err)
		}
		for i, k := range []image.Kind{image.Pages, image.Skeleton, image.Records, image.Pages, image.Deltas, image.PageMap, image.NVRAM, image.Bases, image.References, image.Disks} {
			b := w.NewBuffer(k)
			switch k {
			case image.Pages:
				b.Data = append(b.Data, bytes.Repeat([]byte("page"), 64*(1+i%2))...)
			case image.Records, image.Deltas:
				b.Data = append(b.Data, records(2)...)
			default:
				b.Data = append(b.Data, "a chunk, a chunk, a chunk, a chunk, a chunk"...)
			}
			if err := w.Submit(b); err != nil {
				f.Fatal(err)
			}
		}
		if err := w.Finish([]byte(`{"meta":1}`), identity); err != nil {
			f.Fatal(err)
		}
		f.Add(content(file))
	}
	f.Add(newBuilder(f).done())
	f.Fuzz(func(t *testing.T, b []byte) {
		for range 2 {
			if err := read(b); err != nil && !integrity.IsCorrupt(err) && !errors.As(err, new(*image.UnsupportedError)) {
				t.Fatalf("%v", err)
			}
			b = bytes.Clone(b)
			tiertest.Reseal(b)
		}
	})
}

// TestDigests has the digests of all slots in the image: workers make those of PAGES,
// and segments that are discarded, short, or left open for long keep none from leaving.
func TestDigests(t *testing.T) {
	h := digest.Fresh()
	f := create(t)
	w, err := image.NewWriter(f, header, image.LZ4, 2)
	if err != nil {
		t.Fatal(err)
	}
	w.KeepDigests(h)
	want := map[uint64]digest.Sum{}
	late := w.NewBuffer(image.Records)
	late.Data = append(late.Data, records(2)...)
	late.Sums = append(late.Sums, digest.Sum{1}, digest.Sum{2})
	want[0], want[1] = late.Sums[0], late.Sums[1]
	per := uint64(header.SegmentPages)
	n := int(2*digest.PerChunk/per) + 3
	for i := range n {
		b := w.NewBuffer(image.Pages)
		if i%7 == 0 {
			w.Discard(b)
			continue
		}
		b.Data = append(b.Data, pages(1+i%int(per), uint64(i), true)...)
		for j := range 1 + i%int(per) {
			want[uint64(b.Number)*per+uint64(j)] = h.Sum(b.Data[j*header.PageSize : (j+1)*header.PageSize])
		}
		if err := w.Submit(b); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Submit(late); err != nil {
		t.Fatal(err)
	}
	root, err := w.Digests([]digest.Sum{{7}, {8}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Finish([]byte("{}"), []byte("{}")); err != nil {
		t.Fatal(err)
	}
	im, err := image.Open(f)
	if err != nil {
		t.Fatal(err)
	}
	tab, err := digest.Open(root, digest.NewCache(8), func(i int) ([]byte, error) { return im.Chunk(image.Digests, i) },
		func(i int, err error) error { return im.Corrupt(image.Digests, i, err) })
	if err != nil {
		t.Fatal(err)
	}
	if tab.Flash != uint64(n+1)*per || tab.NVRAM != 2 || im.Chunks(image.Digests) != 6 {
		t.Errorf("%d flash slots, %d NVRAM slots, %d frames", tab.Flash, tab.NVRAM, im.Chunks(image.Digests))
	}
	for slot := range tab.Flash {
		if got, err := tab.FlashSlot(slot); err != nil || got != want[slot] {
			t.Fatalf("slot %d: %x, want %x, %v", slot, got, want[slot], err)
		}
	}
	if got, err := tab.NVRAMSlot(1); err != nil || got != (digest.Sum{8}) {
		t.Errorf("NVRAM slot: %x, %v", got, err)
	}
	var sr image.SegmentReader
	for i := range im.Segments() {
		want, err := tab.Segment(uint32(i))
		if err != nil {
			t.Fatal(err)
		}
		if ok := want != (digest.Sum{}); ok != (im.SegmentOffset(uint32(i)) >= 0) {
			t.Errorf("segment %d has a digest: %v", i, ok)
		} else if ok {
			if err := im.FetchSegment(&sr.Stored, uint32(i)); err != nil || sr.Sum(h) != want {
				t.Errorf("segment %d is not stored as its digest says: %v", i, err)
			}
			// Of one that is known by its digest the checksum is not looked at, of any
			// other it is.
			by := func(st *image.Stored) bool { return st.Sum(h) == want }
			if err := im.FetchSegmentBy(&sr.Stored, uint32(i), by); err != nil || !sr.Known() {
				t.Errorf("segment %d is not known by its digest: %v", i, err)
			}
			if err := im.FetchSegment(&sr.Stored, uint32(i)); err != nil || sr.Known() {
				t.Errorf("segment %d is known by nothing: %v", i, err)
			}
			at := im.SegmentOffset(uint32(i)) + image.FrameHeaderLen
			flip := func() {
				b := make([]byte, 1)
				_, rerr := f.ReadAt(b, at)
				b[0] ^= 1
				if _, err := f.WriteAt(b, at); rerr != nil || err != nil {
					t.Fatal(rerr, err)
				}
			}
			flip()
			if err := im.FetchSegmentBy(&sr.Stored, uint32(i), by); !errors.Is(err, integrity.ErrChecksum) || sr.Known() {
				t.Errorf("segment %d with another byte: %v", i, err)
			}
			flip()
		}
	}
	// They leave while segments come, all but those that wait for one.
	var order []image.Kind
	im.Frames(func(k image.Kind, number uint32, _ int64) error {
		if len(order) == 0 || order[len(order)-1] != k {
			order = append(order, k)
		}
		return nil
	})
	if !slices.Equal(order[:4], []image.Kind{image.Pages, image.Digests, image.Pages, image.Records}) {
		t.Errorf("frames in the order %v", order)
	}
}
