// Package sorted has the part that is the same in all index files: records of one length,
// sorted, in a file that is mapped and never changes.
//
//	0      leaf                 4 KiB   as many records as fit; CRC-32C in the last 4 bytes
//	       leaf
//	       …
//	       fences               8 B a leaf: the first eight bytes of its first record
//	       CRC-32C of the fences
//
// Records rise, as strings of bytes, and begin with what is spread evenly, as a digest is.
// So a record's place can be reckoned: the fences, which stay in the processor's cache, say
// which one leaf it is in. A leaf is checked when it is first used: an index of gigabytes is
// opened in no time, and a lookup reads one leaf.
//
// What stands before the leaves, and what a record says, is its user's.
package sorted

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"sync/atomic"

	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

const (
	// LeafSize is the length of a leaf in bytes.
	LeafSize = 4 << 10

	fenceSize = 8
	checkSize = 4
)

// PerLeaf is how many records of so many bytes, 8 or more, are in a full leaf.
func PerLeaf(record int) int { return (LeafSize - checkSize) / record }

// Leaves is how many leaves so many records take.
func Leaves(record int, records int64) int64 {
	per := int64(PerLeaf(record))
	return (records + per - 1) / per
}

// Size is how many bytes so many records take, all told.
func Size(record int, records int64) int64 {
	return Leaves(record, records)*(LeafSize+fenceSize) + checkSize
}

// Table is the sorted part of an open file. It is safe for concurrent use, and reads a
// mapping: whoever calls its methods does so in vfs.CatchFault.
type Table struct {
	file    string
	base    int64 // of the first leaf in the file
	record  int
	per     int64
	records int64
	leaves  []byte
	fences  []byte          // checked
	checked []atomic.Uint32 // a bit for each leaf
}

// Open opens the table of so many records, each of record bytes, that begins at offset base
// of a file; b is all that is mapped of the file from there on. Damage is an
// integrity.CorruptError.
func Open(file string, base int64, b []byte, record int, records int64) (*Table, error) {
	t := &Table{file: file, base: base, record: record, per: int64(PerLeaf(record)), records: records}
	n := Leaves(record, records)
	if int64(len(b)) != Size(record, records) {
		return nil, &integrity.CorruptError{File: file, Offset: base, What: "leaves", Err: fmt.Errorf("%d bytes in place of %d", len(b), Size(record, records))}
	}
	t.leaves, t.fences = b[:n*LeafSize], b[n*LeafSize:][:n*fenceSize]
	t.checked = make([]atomic.Uint32, (n+31)/32)
	err := vfs.CatchFault(func() error {
		if integrity.Checksum(t.fences) != binary.LittleEndian.Uint32(b[n*(LeafSize+fenceSize):]) {
			return integrity.ErrChecksum
		}
		for p := int64(1); p < n; p++ {
			if t.fence(p) < t.fence(p-1) {
				return errors.New("not in order")
			}
		}
		return nil
	})
	if err != nil {
		return nil, &integrity.CorruptError{File: file, Offset: base + n*LeafSize, What: "fences", Err: err}
	}
	return t, nil
}

// Records is how many there are.
func (t *Table) Records() int64 { return t.records }

// Leaves is how many leaves they are in.
func (t *Table) Leaves() int64 { return int64(len(t.leaves) / LeafSize) }

// fence is the first eight bytes of leaf p's first record.
func (t *Table) fence(p int64) uint64 { return binary.BigEndian.Uint64(t.fences[p*fenceSize:]) }

// Leaf returns leaf p's records, checked. One that the medium does not give is damage as one
// that is wrong: who keeps a cache in a table makes it again then.
func (t *Table) Leaf(p int64) ([]byte, error) {
	b := t.leaves[p*LeafSize:][:LeafSize]
	word, bit := &t.checked[p/32], uint32(1)<<(p%32)
	if word.Load()&bit == 0 {
		err := vfs.CatchFault(func() error {
			if binary.LittleEndian.Uint32(b[LeafSize-checkSize:]) != integrity.Checksum(b[:LeafSize-checkSize]) {
				return integrity.ErrChecksum
			}
			return nil
		})
		if err != nil {
			return nil, &integrity.CorruptError{File: t.file, Offset: t.base + p*LeafSize, What: fmt.Sprintf("leaf %d", p), Err: err}
		}
		word.Or(bit)
	}
	return b[:min(t.per, t.records-p*t.per)*int64(t.record)], nil
}

// Each calls fn with each record that begins with key, of 8 bytes at least and no longer
// than a record, in order, until fn returns false.
func (t *Table) Each(key []byte, fn func(record []byte) bool) error {
	if len(t.fences) == 0 {
		return nil
	}
	v := binary.BigEndian.Uint64(key)
	for p := t.leafOf(v); p < t.Leaves(); p++ {
		if t.fence(p) > v {
			return nil
		}
		leaf, err := t.Leaf(p)
		if err != nil {
			return err
		}
		for at := t.firstIn(leaf, key); at < len(leaf); at += t.record {
			r := leaf[at : at+t.record]
			if !bytes.Equal(r[:len(key)], key) || !fn(r) {
				return nil
			}
		}
		// Only what is at a leaf's end goes on in the next one.
	}
	return nil
}

// leafOf is the first leaf that may have records that begin with v.
func (t *Table) leafOf(v uint64) int64 {
	n := t.Leaves()
	// They are spread evenly, so leaf p begins at about p/n of all values. The last leaf
	// with a lower fence is wanted: look around with growing steps, then halve.
	g, _ := bits.Mul64(v, uint64(n))
	lo, hi := int64(0), n // fence(lo) < v unless lo is 0; fence(hi) ≥ v unless hi is n
	at, step := int64(g), int64(1)
	if t.fence(at) < v {
		for lo = at; ; lo, step = lo+step, step*2 {
			if lo+step >= n {
				break
			}
			if t.fence(lo+step) >= v {
				hi = lo + step
				break
			}
		}
	} else {
		for hi = at; ; hi, step = hi-step, step*2 {
			if hi-step <= 0 {
				break
			}
			if t.fence(hi-step) < v {
				lo = hi - step
				break
			}
		}
	}
	for hi-lo > 1 {
		if mid := (lo + hi) / 2; t.fence(mid) < v {
			lo = mid
		} else {
			hi = mid
		}
	}
	return lo
}

// firstIn is where in a leaf the first record is that is not below key; its end if there is
// none.
func (t *Table) firstIn(leaf, key []byte) int {
	first := binary.BigEndian.Uint64(key) // which decides, but where keys are the same
	lo, hi := 0, len(leaf)/t.record
	for lo < hi {
		mid := (lo + hi) / 2
		r := leaf[mid*t.record:]
		if v := binary.BigEndian.Uint64(r); v < first || v == first && bytes.Compare(r[:len(key)], key) < 0 {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	return lo * t.record
}

// Writer writes records, which come in order, as leaves, and then the fences.
type Writer struct {
	file    vfs.File
	record  int
	buf     []byte // whole leaves but for the last, not written yet
	at      int64  // where they go in the file
	in      int    // bytes of records in the last leaf; 0: it is full
	records int64
	fences  []byte
}

// bufSize is how much is written at a time.
const bufSize = 1 << 20

// NewWriter returns a Writer of records of so many bytes, from an offset of f on.
func NewWriter(f vfs.File, base int64, record int) *Writer {
	return &Writer{file: f, record: record, buf: make([]byte, 0, bufSize), at: base}
}

// Records is how many have been added.
func (w *Writer) Records() int64 { return w.records }

// Add takes one more record, which is copied.
func (w *Writer) Add(record []byte) error {
	if w.in == 0 {
		if len(w.buf) == cap(w.buf) {
			if err := w.flush(); err != nil {
				return err
			}
		}
		w.buf = w.buf[:len(w.buf)+LeafSize]
		clear(w.buf[len(w.buf)-LeafSize:])
		w.fences = append(w.fences, record[:fenceSize]...)
	}
	leaf := w.buf[len(w.buf)-LeafSize:]
	copy(leaf[w.in:], record[:w.record])
	w.records++
	if w.in += w.record; w.in == PerLeaf(w.record)*w.record {
		w.seal(leaf)
	}
	return nil
}

// seal ends the last leaf.
func (w *Writer) seal(leaf []byte) {
	binary.LittleEndian.PutUint32(leaf[LeafSize-checkSize:], integrity.Checksum(leaf[:LeafSize-checkSize]))
	w.in = 0
}

func (w *Writer) flush() error {
	_, err := w.file.WriteAt(w.buf, w.at)
	w.file.StartWriteback(w.at, int64(len(w.buf)))
	w.at += int64(len(w.buf))
	w.buf = w.buf[:0]
	return err
}

// End writes what is left. The file then has Size bytes from the base on; none is synced.
func (w *Writer) End() error {
	if w.in > 0 {
		w.seal(w.buf[len(w.buf)-LeafSize:])
	}
	if err := w.flush(); err != nil {
		return err
	}
	w.fences = binary.LittleEndian.AppendUint32(w.fences, integrity.Checksum(w.fences))
	_, err := w.file.WriteAt(w.fences, w.at)
	return err
}
