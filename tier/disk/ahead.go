package disk

import (
	"encoding/binary"
	"io"
	"sync"

	"golang.org/x/sys/unix"
)

// WillNeed tells the kernel that a stretch of the disk will be read soon, so that it is
// read now, beside other things that are. It promises nothing: what can't be told, as of a
// damaged layer, is found out by who reads it. What is below the layer is not looked at.
func (i *Image) WillNeed(off, n int64) {
	i.stored(off, n, func(at, n int64) { unix.Fadvise(int(i.file.Fd()), at, n, unix.FADV_WILLNEED) })
}

// readInSize is how much ReadIn reads at a time, in bytes.
const readInSize = 1 << 20

// scratch are buffers for what nobody wants yet.
var scratch = sync.Pool{New: func() any { return new([readInSize]byte) }}

// ReadIn reads what the layer itself has of a stretch of the disk into the kernel's page
// cache, unless it is there already. It promises as little as WillNeed, but returns when it
// is there. A file that is read as one reads files comes in larger folios than with WILLNEED,
// and from a fast disk at twice the speed.
func (i *Image) ReadIn(off, n int64) {
	buf := scratch.Get().(*[readInSize]byte)
	defer scratch.Put(buf)
	i.stored(off, n, func(at, n int64) {
		for ; n > 0; at, n = at+readInSize, n-readInSize {
			b := buf[:min(n, readInSize)]
			if !i.cached(at) || !i.cached(at+int64(len(b))-1) {
				i.file.ReadAt(b, at)
			}
		}
	})
}

// cached tells whether the byte at an offset of the file is in the page cache.
func (i *Image) cached(at int64) bool {
	var b [1]byte
	n, err := unix.Preadv2(int(i.file.Fd()), [][]byte{b[:]}, at, unix.RWF_NOWAIT)
	return n == 1 && err == nil
}

// stored calls fn with each range of the file that has what the layer itself has of a
// stretch of the disk, in the disk's order. Ranges that follow each other are one.
func (i *Image) stored(off, n int64, fn func(at, n int64)) {
	off, n = max(off, 0), min(n, i.id.Size-off)
	if n <= 0 {
		return
	}
	if i.qcow2 == nil {
		fn(off, n)
		return
	}
	var at, end int64 // of the range so far
	for n > 0 {
		part := min(n, i.qcow2.cluster-off%i.qcow2.cluster)
		from, to := i.qcow2.tables.find(off, part)
		if from != end || to == from {
			if end > at {
				fn(at, end-at)
			}
			at = from
		}
		end = to
		off, n = off+part, n-part
	}
	if end > at {
		fn(at, end-at)
	}
}

// clusterTables tell where in a qcow2 file its clusters are, which the library keeps to
// itself. They are for reading ahead: of what makes no sense they say nothing.
//
//	L1, in memory here as far as it was needed ─► L2, some of them kept ─► cluster
type clusterTables struct {
	file     io.ReaderAt
	fileSize int64
	bits     uint  // of the size of a cluster
	l1At     int64 // in the file, in bytes
	l1Size   int64 // entries

	mu sync.Mutex
	l2 map[int64][]byte // by number; nil: there is none
}

const (
	// keptTables is how many L2 tables are kept: of clusters of 64 KiB each stands for
	// 512 MiB of the disk, and who reads in the order of the guest's memory needs several.
	keptTables = 16

	entrySize = 8
	// offsetMask is where an entry of either table has an offset in the file.
	offsetMask = 0x00fffffffffffe00
	// compressedBit marks a cluster that is compressed.
	compressedBit = 1 << 62
)

// find is the range of the file that has n bytes of the disk from off on, which are in one
// cluster; empty if there is none. One that is compressed is read as a whole.
func (t *clusterTables) find(off, n int64) (from, to int64) {
	perTable := int64(1) << (t.bits - 3)
	number := off >> t.bits
	table := t.table(number / perTable)
	if table == nil {
		return 0, 0
	}
	e := binary.BigEndian.Uint64(table[number%perTable*entrySize:])
	if e&compressedBit != 0 {
		// An offset of 62-(bits-8) bits, and how many sectors follow the one that it is in.
		split := 62 - (t.bits - 8)
		from = int64(e & (1<<split - 1))
		sectors := int64(e&(compressedBit-1)>>split) + 1
		to = from/SectorSize*SectorSize + sectors*SectorSize
	} else if from = int64(e & offsetMask); from > 0 && e&1 == 0 { // bit 0: it reads as zeros
		from += off & (1<<t.bits - 1)
		to = from + n
	}
	if from <= 0 || from >= t.fileSize || to <= from {
		return 0, 0
	}
	return from, to
}

// table is an L2 table; nil if there is none, or none that can be read.
func (t *clusterTables) table(number int64) []byte {
	t.mu.Lock()
	defer t.mu.Unlock()
	if b, ok := t.l2[number]; ok {
		return b
	}
	if len(t.l2) >= keptTables || t.l2 == nil {
		t.l2 = make(map[int64][]byte, keptTables)
	}
	b := t.read(number)
	t.l2[number] = b
	return b
}

func (t *clusterTables) read(number int64) []byte {
	var e [entrySize]byte
	if number >= t.l1Size || readFilled(t.file, e[:], t.l1At+number*entrySize) != nil {
		return nil
	}
	at := int64(binary.BigEndian.Uint64(e[:]) & offsetMask)
	if at == 0 || at >= t.fileSize {
		return nil
	}
	b := make([]byte, 1<<t.bits)
	if readFilled(t.file, b, at) != nil {
		return nil
	}
	return b
}
