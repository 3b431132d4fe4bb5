package disk

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"sync/atomic"
	"time"

	"github.com/zeebo/blake3"

	"github.com/flic-migrate/flic-migrate/tier/digest"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/sorted"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// An index file, which docs/format.md draws too:
//
//	0        header                16 KiB   identity, partitions, counts; CRC-32C
//	16384    leaf                   4 KiB   up to 204 records; CRC-32C
//	         leaf
//	         …
//	         fences                 8 B a leaf: the first eight bytes of its first digest
//	         CRC-32C of the fences  4 B
//
// A record is a digest and the number of its block, and records rise by both. Leaves and
// fences are package sorted's.
const (
	indexMagic   = "FLICDIX\x00"
	indexVersion = 1

	headerSize = 16 << 10
	recordSize = digest.Size + 4

	headerFixed   = 128     // before the identity
	maxIdentity   = 8 << 10 // JSON, of a path of 4096 bytes too
	regionSize    = 16
	headerRegions = headerFixed + maxIdentity
	maxRecords    = maxSize / BlockSize
)

// maxCopies is how many blocks of one content an index knows. More would be of no use:
// a page needs one of them.
const maxCopies = 16

var (
	// ErrNoIndex: the layer has no index.
	ErrNoIndex = errors.New("no index")
	// ErrStale: the layer's index was made when it was another, or is damaged, or has
	// another key than the store's. It is of no use until it is built again.
	ErrStale = errors.New("its index can't be used")
)

// Index is an open index of one layer. It may be used by several goroutines. An index
// that is removed or replaced meanwhile stays as it was.
type Index struct {
	file   *sorted.File
	hasher *digest.Hasher
	head   header
	table  *sorted.Table
	damage atomic.Pointer[integrity.CorruptError]
}

// header is what an index file says of itself.
type header struct {
	records int64
	content [32]byte // BLAKE3-256 of all blocks, by number and digest, in disk order
	keyID   [16]byte
	built   int64 // ns since 1970
	data    int64 // bytes of the layer's own that were read
	regions []region
	id      Identity
}

// size is the file's length.
func (h *header) size() int64 { return headerSize + sorted.Size(recordSize, h.records) }

// keyID tells keys from each other, and says nothing of them.
func keyID(h *digest.Hasher) (id [16]byte) {
	k := h.Key()
	sum := blake3.Sum256(append([]byte("flic-migrate disk index key "+string(h.Algorithm())+" "), k[:]...))
	copy(id[:], sum[:])
	return id
}

// encode makes the header's bytes.
func (h *header) encode() ([]byte, error) {
	id, err := json.Marshal(h.id)
	if err != nil {
		return nil, err
	}
	if len(id) > maxIdentity {
		return nil, fmt.Errorf("%s: the path is too long to be stored", h.id.Path)
	}
	b := make([]byte, headerSize)
	le := binary.LittleEndian
	copy(b, indexMagic)
	le.PutUint32(b[8:], indexVersion)
	le.PutUint32(b[12:], uint32(len(id)))
	le.PutUint64(b[16:], uint64(h.records))
	le.PutUint64(b[24:], uint64(h.built))
	le.PutUint64(b[32:], uint64(h.data))
	copy(b[40:], h.content[:])
	copy(b[72:], h.keyID[:])
	le.PutUint32(b[88:], uint32(len(h.regions)))
	copy(b[headerFixed:], id)
	for i, r := range h.regions {
		le.PutUint64(b[headerRegions+i*regionSize:], uint64(r.start))
		le.PutUint64(b[headerRegions+i*regionSize+8:], uint64(r.end))
	}
	le.PutUint32(b[headerSize-4:], integrity.Checksum(b[:headerSize-4]))
	return b, nil
}

// errVersion: an index of a version that is not known.
var errVersion = errors.New("not an index of this version")

// decodeHeader reads what encode makes, and nothing else.
func decodeHeader(b []byte) (h header, err error) {
	le := binary.LittleEndian
	if len(b) < headerSize || string(b[:8]) != indexMagic || le.Uint32(b[8:]) != indexVersion {
		return h, errVersion
	}
	if le.Uint32(b[headerSize-4:]) != integrity.Checksum(b[:headerSize-4]) {
		return h, integrity.ErrChecksum
	}
	records, regions, id := le.Uint64(b[16:]), le.Uint32(b[88:]), le.Uint32(b[12:])
	if records > maxRecords || regions > maxRegions || id > maxIdentity {
		return h, errors.New("counts that can't be")
	}
	h.records, h.built, h.data = int64(records), int64(le.Uint64(b[24:])), int64(le.Uint64(b[32:]))
	copy(h.content[:], b[40:])
	copy(h.keyID[:], b[72:])
	if err := json.Unmarshal(b[headerFixed:headerFixed+id], &h.id); err != nil {
		return h, err
	}
	if err := h.id.Check(); err != nil {
		return h, err
	}
	at := int64(0)
	for i := range int(regions) {
		r := region{int64(le.Uint64(b[headerRegions+i*regionSize:])), int64(le.Uint64(b[headerRegions+i*regionSize+8:]))}
		if r.start < at || r.end < r.start+sectorsPerBlock || r.end > h.id.Size/SectorSize || r.start%sectorsPerBlock == 0 {
			return h, errors.New("partitions that can't be")
		}
		h.regions, at = append(h.regions, r), r.end
	}
	return h, nil
}

// openIndex opens an index file. Damage is an integrity.CorruptError.
func openIndex(fsys vfs.FS, name string) (_ *Index, err error) {
	f, b, err := sorted.OpenFile(fsys, name, headerSize)
	if err != nil {
		return nil, err
	}
	x := &Index{file: f}
	defer func() {
		if err != nil {
			x.Close()
		}
	}()
	if x.head, err = decodeHeader(b); err == nil && f.Length != x.head.size() {
		err = fmt.Errorf("%d bytes in place of %d", f.Length, x.head.size())
	}
	if err != nil {
		return nil, &integrity.CorruptError{File: name, What: "disk index", Err: err}
	}
	if x.table, err = f.Table(headerSize, recordSize, x.head.records); err != nil {
		return nil, err
	}
	return x, nil
}

// Close gives up what Open took.
func (x *Index) Close() error { return x.file.Close() }

// Identity is the layer's, as it was when it was read.
func (x *Index) Identity() Identity { return x.head.id }

// ContentID stands for all of what the index says that the layer has: it is the same for
// a copy of it, and under another store's key another one.
func (x *Index) ContentID() [32]byte { return x.head.content }

// Blocks is how many blocks the index knows.
func (x *Index) Blocks() int64 { return x.head.records }

// Digester makes the digests that Lookup knows: the same for all indexes of a store.
func (x *Index) Digester() *digest.Hasher { return x.hasher }

// Built is when the index was.
func (x *Index) Built() time.Time { return time.Unix(0, x.head.built) }

// Err is the first damage that a lookup has met, if any has: what the damaged part
// knows is not found.
func (x *Index) Err() error {
	if e := x.damage.Load(); e != nil {
		return e
	}
	return nil
}

// Lookup returns the sector at which the layer has a block with this digest.
func (x *Index) Lookup(s digest.Sum) (sector int64, ok bool) {
	return x.LookupNear(s, math.MinInt64)
}

// LookupNear is Lookup, but of several blocks with this digest it takes the one at
// sector near, if there is one: blocks that are read together should lie together.
func (x *Index) LookupNear(s digest.Sum, near int64) (sector int64, ok bool) {
	err := vfs.CatchFault(func() error {
		return x.table.Each(s[:], func(r []byte) bool {
			at := sectorOf(x.head.regions, binary.LittleEndian.Uint32(r[digest.Size:]))
			if !ok || at == near {
				sector, ok = at, true
			}
			return at != near
		})
	})
	if err != nil {
		x.damaged(0, err)
		return 0, false
	}
	return sector, ok
}

// damaged keeps the first damage.
func (x *Index) damaged(off int64, err error) {
	var c *integrity.CorruptError
	if !errors.As(err, &c) {
		c = &integrity.CorruptError{File: x.file.Name(), Offset: off, What: "disk index", Err: err}
	}
	x.damage.CompareAndSwap(nil, c)
}
