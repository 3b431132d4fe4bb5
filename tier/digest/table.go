package digest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"

	"github.com/zeebo/blake3"
)

// The digests of an image are stored in DIGESTS frames. Frame 0 is the table:
//
//	u32 version, 3; u32 0; u64 F, flash slots; u64 N, NVRAM slots; u64 D, disk slots
//	u64 S, segments
//	32 B for each chunk: the BLAKE3-256 of its bytes
//
// The chunks follow, frame k+1 being chunk k: first those of the flash slots, 16384
// digests each and the rest in the last, then likewise those of the NVRAM slots, of the
// disk slots, and of the segments as they are stored: by one of those all pages of a
// segment are known, for less. A slot that does not exist has a digest of zeros, and so
// has a segment. Version 2 had no S, and version 1 neither that nor D.
const (
	// PerChunk is how many digests are in a chunk, but for the last of its kind.
	PerChunk = 16384

	tableVersion  = 3
	tableWithDisk = 2 // the version of a table with disk slots, but no segments
	tablePlain    = 1 // and of one without either
	plainHeadLen  = 24
	diskHeadLen   = plainHeadLen + 8
	tableHeadLen  = diskHeadLen + 8
	hashLen       = 32
	// maxChunks is how many a table lists that fits into a frame of 256 KiB: enough
	// for 134 million different pages.
	maxChunks = (256<<10 - tableHeadLen) / hashLen

	// MaxPages is how many pages a table lists for certain, whatever they are.
	MaxPages = (maxChunks - 3) * PerChunk
)

// ErrTooMany: an image has more slots than a table can list. It does without digests.
var ErrTooMany = errors.New("more pages than digests can be kept of")

// Chunk is a DIGESTS frame to be written.
type Chunk struct {
	Number uint32 // of the frame
	Data   []byte
}

// Builder collects the digests of an image that is being written, segment by segment,
// and gives out each chunk when the last of its slots is known: what is kept in memory
// is what lies around the segments that are still open. It has one owner at a time.
type Builder struct {
	slots uint64 // in a full segment
	open  map[uint64]*openChunk
	hash  [][hashLen]byte // of the chunks so far
	full  []Chunk
	flash uint64 // slots, up to the end of the last segment
	segs  []Sum  // of the segments as they are stored
}

type openChunk struct {
	data  []byte
	known uint64 // slots
}

// NewBuilder returns a Builder for an image with so many slots in a full segment.
func NewBuilder(slots int) *Builder {
	return &Builder{slots: uint64(slots), open: make(map[uint64]*openChunk)}
}

// Segment takes the digests of segment n's pages, of which there may be fewer than
// slots, and of the segment as it is stored; each segment comes once, in any order.
func (b *Builder) Segment(n uint32, sums []Sum, stored Sum) {
	for uint64(len(b.segs)) <= uint64(n) {
		b.segs = append(b.segs, Sum{})
	}
	b.segs[n] = stored
	first := uint64(n) * b.slots
	b.flash = max(b.flash, first+b.slots)
	for i := uint64(0); i < b.slots; {
		k, at := (first+i)/PerChunk, (first+i)%PerChunk
		c := b.open[k]
		if c == nil {
			c = &openChunk{data: make([]byte, PerChunk*Size)}
			b.open[k] = c
		}
		m := min(b.slots-i, PerChunk-at)
		for j := i; j < min(i+m, uint64(len(sums))); j++ {
			copy(c.data[(at+j-i)*Size:], sums[j][:])
		}
		if c.known += m; c.known == PerChunk {
			b.close(k, c.data)
			delete(b.open, k)
		}
		i += m
	}
}

// close hands out a chunk.
func (b *Builder) close(k uint64, data []byte) {
	for uint64(len(b.hash)) <= k {
		b.hash = append(b.hash, [hashLen]byte{})
	}
	b.hash[k] = sum256(data)
	b.full = append(b.full, Chunk{uint32(k + 1), data})
}

// Next is a chunk to be written, if there is one.
func (b *Builder) Next() (c Chunk, ok bool) {
	if len(b.full) == 0 {
		return c, false
	}
	c, b.full = b.full[0], b.full[1:]
	return c, true
}

// Finish is told the digests of the NVRAM slots and of the disk slots when all segments
// have come. After it Next gives out what is left, the table last, of which it returns
// the root.
func (b *Builder) Finish(nvram, disk []Sum) (Root, error) {
	flash, hot, onDisk := chunks(b.flash), chunks(uint64(len(nvram))), chunks(uint64(len(disk)))
	if flash+hot+onDisk > maxChunks {
		return Root{}, ErrTooMany
	}
	if flash+hot+onDisk+chunks(uint64(len(b.segs))) > maxChunks {
		b.segs = nil // their pages have digests
	}
	for k := range flash {
		if c := b.open[k]; c != nil {
			b.close(k, c.data[:min(PerChunk, b.flash-k*PerChunk)*Size])
		}
	}
	b.open = nil
	b.list(flash, nvram)
	b.list(flash+hot, disk)
	b.list(flash+hot+onDisk, b.segs)
	le := binary.LittleEndian
	t := le.AppendUint32(nil, tableVersion)
	t = le.AppendUint32(t, 0)
	t = le.AppendUint64(t, b.flash)
	t = le.AppendUint64(t, uint64(len(nvram)))
	t = le.AppendUint64(t, uint64(len(disk)))
	t = le.AppendUint64(t, uint64(len(b.segs)))
	for _, h := range b.hash {
		t = append(t, h[:]...)
	}
	b.full = append(b.full, Chunk{0, t})
	return sum256(t), nil
}

// list makes chunks of digests that are all there, from the given one on.
func (b *Builder) list(first uint64, sums []Sum) {
	for k := range chunks(uint64(len(sums))) {
		part := sums[k*PerChunk : min(uint64(len(sums)), (k+1)*PerChunk)]
		data := make([]byte, 0, len(part)*Size)
		for _, s := range part {
			data = append(data, s[:]...)
		}
		b.close(first+k, data)
	}
}

// chunks is how many hold so many digests.
func chunks(n uint64) uint64 { return n/PerChunk + min(1, n%PerChunk) }

// Table is what an image's digests are found by. It is safe for concurrent use, but for one
// that One has made.
type Table struct {
	// Flash, NVRAM and Disk are how many slots have digests, Segments how many segments
	// have.
	Flash, NVRAM, Disk, Segments uint64

	hash []byte // of the chunks
	read func(frame int) ([]byte, error)
	bad  func(frame int, err error) error
	keep *Cache
	of   *Table // by which keep knows the chunks
	near *Near  // of a table that One has made
}

// Near is the chunk that one goroutine has found a digest in last, in whatever table. The zero
// value is none.
type Near struct {
	key  chunkKey
	data []byte
}

// Open reads the table of an image's digests, which must have the given root. read
// gives a DIGESTS frame, its checksum verified; bad makes an error of what is wrong
// inside one. keep may be shared with other tables.
func Open(root Root, keep *Cache, read func(frame int) ([]byte, error), bad func(frame int, err error) error) (*Table, error) {
	b, err := read(0)
	if err != nil {
		return nil, err
	}
	if sum256(b) != root {
		return nil, bad(0, ErrMismatch)
	}
	le := binary.LittleEndian
	if len(b) < plainHeadLen {
		return nil, bad(0, errors.New("too short"))
	}
	v := le.Uint32(b)
	head := map[uint32]int{tablePlain: plainHeadLen, tableWithDisk: diskHeadLen, tableVersion: tableHeadLen}[v]
	switch {
	case head == 0 || le.Uint32(b[4:]) != 0:
		return nil, bad(0, fmt.Errorf("it is in version %d, which this flic-migrate does not know", v))
	case len(b) < head:
		return nil, bad(0, errors.New("too short"))
	}
	t := &Table{Flash: le.Uint64(b[8:]), NVRAM: le.Uint64(b[16:]), hash: b[head:], read: read, bad: bad, keep: keep}
	t.of = t
	if v >= tableWithDisk {
		t.Disk = le.Uint64(b[plainHeadLen:])
	}
	if v >= tableVersion {
		t.Segments = le.Uint64(b[diskHeadLen:])
	}
	// Each fits into what is there before they are added.
	n := uint64(len(t.hash)) / hashLen
	if len(t.hash)%hashLen != 0 || chunks(t.Flash) > n || chunks(t.NVRAM) > n || chunks(t.Disk) > n || chunks(t.Segments) > n ||
		chunks(t.Flash)+chunks(t.NVRAM)+chunks(t.Disk)+chunks(t.Segments) != n || v == tableWithDisk && t.Disk == 0 {
		return nil, bad(0, fmt.Errorf("%d flash slots, %d NVRAM slots, %d disk slots and %d segments in a table of %d bytes", t.Flash, t.NVRAM, t.Disk, t.Segments, len(b)))
	}
	return t, nil
}

// Keep is the same table, which keeps its chunks where another one does.
func (t *Table) Keep(where *Table) *Table {
	n := *t
	n.keep, n.of = where.keep, &n
	return &n
}

// One is the same table for the goroutine that has near: digests in the chunk that it found one
// in last are found without a lock. That chunk, of 256 KiB, is held, whether the Cache still has
// it or not.
func (t *Table) One(near *Near) *Table {
	n := *t
	n.near = near
	return &n
}

// FlashSlot is the digest of a flash slot's page.
func (t *Table) FlashSlot(slot uint64) (Sum, error) { return t.get(0, slot, t.Flash) }

// NVRAMSlot is the digest of an NVRAM slot's page.
func (t *Table) NVRAMSlot(slot uint64) (Sum, error) { return t.get(chunks(t.Flash), slot, t.NVRAM) }

// DiskSlot is the digest of a disk slot's page.
func (t *Table) DiskSlot(slot uint64) (Sum, error) {
	return t.get(chunks(t.Flash)+chunks(t.NVRAM), slot, t.Disk)
}

// Segment is the digest of a segment as it is stored, frame header and payload; the zero
// Sum if it has none, and its pages alone have.
func (t *Table) Segment(n uint32) (Sum, error) {
	if uint64(n) >= t.Segments {
		return Sum{}, nil
	}
	return t.get(chunks(t.Flash)+chunks(t.NVRAM)+chunks(t.Disk), uint64(n), t.Segments)
}

// get finds digest number slot of n, which begin with the given chunk.
func (t *Table) get(first, slot, n uint64) (Sum, error) {
	if slot >= n {
		return Sum{}, t.bad(0, fmt.Errorf("slot %d of %d has no digest", slot, n))
	}
	key := chunkKey{t.of, first + slot/PerChunk}
	if t.near != nil && t.near.key == key {
		return Sum(t.near.data[slot%PerChunk*Size:]), nil
	}
	b, err := t.keep.get(key, min(PerChunk, n-slot/PerChunk*PerChunk))
	if err != nil {
		return Sum{}, err
	}
	if t.near != nil {
		*t.near = Near{key, b}
	}
	return Sum(b[slot%PerChunk*Size:]), nil
}

// load reads chunk k, of n digests.
func (t *Table) load(k, n uint64) ([]byte, error) {
	frame := int(k) + 1
	b, err := t.read(frame)
	switch {
	case err != nil:
		return nil, err
	case uint64(len(b)) != n*Size:
		return nil, t.bad(frame, fmt.Errorf("%d bytes for %d digests", len(b), n))
	case sum256(b) != [hashLen]byte(t.hash[k*hashLen:]):
		return nil, t.bad(frame, ErrMismatch)
	}
	return b, nil
}

// Cache keeps the chunks that were used last, of any number of tables. It is safe for
// concurrent use.
type Cache struct {
	max int

	mu    sync.Mutex
	kept  map[chunkKey]*keptChunk
	clock uint64
}

type chunkKey struct {
	t *Table
	k uint64
}

// keptChunk is one that is there, or that somebody is loading.
type keptChunk struct {
	load sync.Once
	data []byte
	err  error
	used uint64 // clock
}

// NewCache returns a Cache of at most so many chunks, of 256 KiB each.
func NewCache(max int) *Cache { return &Cache{max: max, kept: make(map[chunkKey]*keptChunk)} }

var errNotLoaded = errors.New("reading a chunk of digests was broken off")

// get is a chunk, of n digests. Who wants another one does not wait until it has been read.
func (c *Cache) get(key chunkKey, n uint64) ([]byte, error) {
	e := c.entry(key)
	e.load.Do(func() {
		e.err = errNotLoaded // if it ends in a panic
		e.data, e.err = key.t.load(key.k, n)
	})
	if e.err != nil {
		c.forget(key, e)
	}
	return e.data, e.err
}

// entry is that of a chunk, in place of the one that was used least lately if there are enough.
func (c *Cache) entry(key chunkKey) *keptChunk {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.clock++
	e := c.kept[key]
	if e == nil {
		if len(c.kept) >= c.max {
			var oldest chunkKey
			least := c.clock
			for o, e := range c.kept {
				if e.used < least {
					oldest, least = o, e.used
				}
			}
			delete(c.kept, oldest)
		}
		e = new(keptChunk)
		c.kept[key] = e
	}
	e.used = c.clock
	return e
}

// forget has a chunk that could not be read be read again.
func (c *Cache) forget(key chunkKey, e *keptChunk) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.kept[key] == e {
		delete(c.kept, key)
	}
}

func sum256(b []byte) [hashLen]byte { return blake3.Sum256(b) }
