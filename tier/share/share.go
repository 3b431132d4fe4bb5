// Package share finds pages that other checkpoints have, by an index of a store's images
// that is kept on disk:
//
//	images' DIGESTS ─► Add ─► run ─┐
//	                   Add ─► run ─┼─► Merge ─► run, larger
//	                          run ─┘
//	page ─► digest ─► Index.Each: which slots of which images may have it
//
// What Each names is a candidate and no more. An image may be gone, the index may be
// damaged or forged: whoever wants the page's bytes opens the image, and believes its
// DIGESTS, which have all of a digest and are checked up to their root (package
// checkpoint). So nothing depends on the index, and one that is lost is made again.
//
// # A run
//
//	0          header                4 KiB   counts, name of the key; CRC-32C
//	4096       images                        UUID, VM and number of each
//	           leaves, fences                package sorted
//
// A record is the first 8 bytes of a page's digest, big-endian, the number of its image in
// the run, and its slot there: 14 bytes, 0.34 % of a page of 4 KiB. Runs never change. New
// images get a run of their own, and runs that have become alike are merged, as in any
// log-structured merge tree: there are few, and what a record costs to be kept grows with
// the logarithm of their number.
//
// The digests of a trust domain have one key, so that a domain has an index of its own
// and none of it says anything of a page in another.
package share

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/google/uuid"
	"github.com/zeebo/blake3"

	"github.com/flic-migrate/flic-migrate/tier/digest"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/sorted"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

const (
	runMagic   = "FLICSHR\x00"
	runVersion = 1

	headerSize = 4 << 10
	prefixSize = 8
	recordSize = prefixSize + 2 + 4
	imageFixed = 16 + 4 + 2 // of an entry in the table of images, without the VM's name

	// maxImages is how many images a run can number.
	maxImages = 1 << 16
	maxVMName = 128
	// maxTable is what their names take at most.
	maxTable = maxImages * (imageFixed + maxVMName)
	// maxRecords is a bound on what a header can ask for: 4 PiB of pages of 4 KiB.
	maxRecords = 1 << 40
)

// maxCopies is how many places of one page a run keeps. There are several only where it
// was stored before it could be found.
const maxCopies = 4

// Image is an image whose pages the index knows.
type Image struct {
	UUID   uuid.UUID
	VM     string
	Number int // of the checkpoint
}

// KeyID tells keys from each other, and says nothing of them.
type KeyID [16]byte

func (k KeyID) String() string { return hex.EncodeToString(k[:]) }

// NewKeyID names the key of a Hasher.
func NewKeyID(h *digest.Hasher) (id KeyID) {
	k := h.Key()
	sum := blake3.Sum256(append([]byte("flic-migrate share index key "+string(h.Algorithm())+" "), k[:]...))
	copy(id[:], sum[:])
	return id
}

// header is what a run says of itself.
type header struct {
	images, table int // how many; length of their table in bytes
	records       int64
	key           KeyID
	sum           uint32 // CRC-32C of the table
}

// leaves is where the leaves begin.
func (h *header) leaves() int64 { return headerSize + (int64(h.table)+4095)/4096*4096 }

func (h *header) size() int64 { return h.leaves() + sorted.Size(recordSize, h.records) }

func (h *header) encode() []byte {
	b := make([]byte, headerSize)
	le := binary.LittleEndian
	copy(b, runMagic)
	le.PutUint32(b[8:], runVersion)
	le.PutUint32(b[12:], uint32(h.images))
	le.PutUint64(b[16:], uint64(h.records))
	le.PutUint32(b[24:], uint32(h.table))
	le.PutUint32(b[28:], h.sum)
	copy(b[32:], h.key[:])
	le.PutUint32(b[headerSize-4:], integrity.Checksum(b[:headerSize-4]))
	return b
}

var errVersion = errors.New("not a run of this version")

func decodeHeader(b []byte) (h header, err error) {
	le := binary.LittleEndian
	if len(b) < headerSize || string(b[:8]) != runMagic || le.Uint32(b[8:]) != runVersion {
		return h, errVersion
	}
	if le.Uint32(b[headerSize-4:]) != integrity.Checksum(b[:headerSize-4]) {
		return h, integrity.ErrChecksum
	}
	images, records, table := le.Uint32(b[12:]), le.Uint64(b[16:]), le.Uint32(b[24:])
	if images > maxImages || records > maxRecords || table > maxTable {
		return h, fmt.Errorf("%d images in a table of %d bytes, %d records", images, table, records)
	}
	h.images, h.records, h.table, h.sum = int(images), int64(records), int(table), le.Uint32(b[28:])
	copy(h.key[:], b[32:])
	return h, nil
}

// appendImage appends an image's entry in the table.
func appendImage(b []byte, im *Image) []byte {
	b = append(b, im.UUID[:]...)
	b = binary.LittleEndian.AppendUint32(b, uint32(im.Number))
	b = binary.LittleEndian.AppendUint16(b, uint16(len(im.VM)))
	return append(b, im.VM...)
}

// parseImages reads the table of n images.
func parseImages(b []byte, n int) ([]Image, error) {
	if n > len(b)/imageFixed {
		return nil, fmt.Errorf("%d images in %d bytes", n, len(b))
	}
	list := make([]Image, n)
	for i := range list {
		im := &list[i]
		if len(b) < imageFixed {
			return nil, errors.New("it ends inside an image's entry")
		}
		copy(im.UUID[:], b)
		im.Number = int(binary.LittleEndian.Uint32(b[16:]))
		name := int(binary.LittleEndian.Uint16(b[20:]))
		b = b[imageFixed:]
		if name > maxVMName || name > len(b) {
			return nil, fmt.Errorf("VM name of %d bytes", name)
		}
		im.VM, b = string(b[:name]), b[name:]
	}
	if len(b) > 0 {
		return nil, fmt.Errorf("%d bytes behind the last image", len(b))
	}
	return list, nil
}

// record is a page's digest, cut, and a place where it is.
type record struct {
	prefix uint64
	image  uint16
	slot   uint32
}

func (r *record) put(b []byte) {
	binary.BigEndian.PutUint64(b, r.prefix)
	binary.BigEndian.PutUint16(b[8:], r.image)
	binary.BigEndian.PutUint32(b[10:], r.slot)
}

func getRecord(b []byte) record {
	return record{binary.BigEndian.Uint64(b), binary.BigEndian.Uint16(b[8:]), binary.BigEndian.Uint32(b[10:])}
}

// run is an open run.
type run struct {
	file   *sorted.File
	head   header
	images []Image
	table  *sorted.Table
	first  int // number of its first image in the Index
	damage atomic.Pointer[error]
}

// openRun opens a run. Damage is an integrity.CorruptError.
func openRun(fsys vfs.FS, name string) (_ *run, err error) {
	f, b, err := sorted.OpenFile(fsys, name, headerSize)
	if err != nil {
		return nil, err
	}
	r := &run{file: f}
	defer func() {
		if err != nil {
			r.close()
		}
	}()
	corrupt := func(err error) error {
		return &integrity.CorruptError{File: name, What: "index of shared pages", Err: err}
	}
	if r.head, err = decodeHeader(b); err == nil && f.Length != r.head.size() {
		err = fmt.Errorf("%d bytes in place of %d", f.Length, r.head.size())
	}
	if err != nil {
		return nil, corrupt(err)
	}
	table := make([]byte, r.head.table)
	if _, err := f.ReadAt(table, headerSize); err != nil {
		return nil, err
	}
	if integrity.Checksum(table) != r.head.sum {
		return nil, corrupt(integrity.ErrChecksum)
	}
	if r.images, err = parseImages(table, r.head.images); err != nil {
		return nil, corrupt(err)
	}
	r.table, err = f.Table(r.head.leaves(), recordSize, r.head.records)
	return r, err
}

func (r *run) close() error { return r.file.Close() }

// Index is an open index. It is safe for concurrent use, and stays as it was, whatever
// becomes of its files, until it is closed.
type Index struct {
	runs   []*run
	images []Image
	known  map[uuid.UUID]bool
	// Broken is why some of the index could not be opened; nil: all could.
	Broken error
}

// Close gives up what Open took.
func (x *Index) Close() error {
	var err error
	for _, r := range x.runs {
		err = errors.Join(err, r.close())
	}
	return err
}

// Images are those that the index knows, by the numbers that Each gives. One can be there
// twice, and need not exist any more.
func (x *Index) Images() []Image { return x.images }

// Has tells whether the index knows an image.
func (x *Index) Has(id uuid.UUID) bool { return x.known[id] }

// Records is how many places of pages the index knows.
func (x *Index) Records() (n int64) {
	for _, r := range x.runs {
		n += r.head.records
	}
	return n
}

// Bytes is what its files take.
func (x *Index) Bytes() (n int64) {
	for _, r := range x.runs {
		n += r.head.size()
	}
	return n
}

// Runs is how many files the index is in: so many places are looked at for a page.
func (x *Index) Runs() int { return len(x.runs) }

// Each calls fn with what may have the page with a digest, until fn returns false. The
// slots are numbers that the index has, of nothing that need exist.
func (x *Index) Each(s digest.Sum, fn func(image int, slot uint64) bool) {
	goOn := true
	for _, r := range x.runs {
		err := vfs.CatchFault(func() error {
			return r.table.Each(s[:prefixSize], func(b []byte) bool {
				rec := getRecord(b)
				if int(rec.image) < len(r.images) {
					goOn = fn(r.first+int(rec.image), uint64(rec.slot))
				}
				return goOn
			})
		})
		if err != nil {
			r.damage.CompareAndSwap(nil, &err)
		}
		if !goOn {
			return
		}
	}
}

// Err is the first damage that a lookup has met, if any has: what the damaged part knows
// is not found.
func (x *Index) Err() error {
	for _, r := range x.runs {
		if e := r.damage.Load(); e != nil {
			return *e
		}
	}
	return nil
}
