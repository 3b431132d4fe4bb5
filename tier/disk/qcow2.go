package disk

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/bits"

	"github.com/klauspost/compress/zstd"
	"github.com/lima-vm/go-qcow2reader/image"
	lib "github.com/lima-vm/go-qcow2reader/image/qcow2"
	"github.com/lima-vm/go-qcow2reader/log"

	"github.com/flic-migrate/flic-migrate/tier/rescue"
)

// The library reads a qcow2 layer's tables and clusters. It takes memory for whatever
// number of L1 entries the header names, opens whatever backing file it names, and
// stumbles over ranges that begin and end within one cluster. So it sees of a file only
// what has been checked here:
//
//	file ─► checkHeader ─► masked: no backing file ─► library ─► whole clusters ─► here
//
// What stands on what is image.go's.

const qcow2Magic = lib.Magic

// qcow2 is one layer, alone.
type qcow2 struct {
	lib           *lib.Qcow2
	size          int64 // of the disk, in bytes
	cluster       int64 // bytes
	backing       string
	backingFormat string
	tables        clusterTables
}

const (
	// maxL1 is QEMU's own limit of the L1 table, in bytes (QCOW_MAX_L1_SIZE).
	maxL1 = 32 << 20
	// maxBackingName is QEMU's limit of a backing file's name, in bytes.
	maxBackingName = 1023
)

// The incompatible features that can be read. "Dirty" says that reference counts are
// out of date, which are not used in reading; "compression type", that it is in the
// header.
const qcow2Known = 1<<lib.IncompatibleFeaturesDirtyBit | 1<<lib.IncompatibleFeaturesCompressionTypeBit

func init() {
	// Its warnings would go to stderr, which is the user's.
	log.SetWarnFunc(nil)
	lib.SetDecompressor(lib.CompressionTypeZstd, func(r io.Reader) (io.ReadCloser, error) {
		// A window larger than the largest cluster is nothing that QEMU writes.
		d, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(8<<20), zstd.WithDecoderMaxMemory(16<<20))
		if err != nil {
			return nil, err
		}
		return d.IOReadCloser(), nil
	})
}

// openQcow2 opens a file of fileSize bytes.
func openQcow2(f io.ReaderAt, fileSize int64) (*qcow2, error) {
	q, err := checkHeader(f, fileSize)
	if err != nil {
		return nil, err
	}
	err = rescue.Call(func() error {
		q.lib, err = lib.Open(masked{f}, noBacking)
		if err == nil {
			err = q.lib.Readable()
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("not a qcow2 image that can be read: %w", err)
	}
	q.backingFormat = string(q.lib.BackingFileFormat)
	return q, nil
}

// noBacking is never asked: the masked header names no backing file.
func noBacking(io.ReaderAt, image.Type) (image.Image, error) {
	return nil, errors.New("a backing file was not to be opened")
}

// checkHeader reads the header and refuses what QEMU refuses, or what can't be read
// here.
func checkHeader(f io.ReaderAt, fileSize int64) (*qcow2, error) {
	b := make([]byte, 112)
	if err := readFilled(f, b, 0); err != nil {
		return nil, err
	}
	be := binary.BigEndian
	version := be.Uint32(b[4:])
	backingAt, backingLen := be.Uint64(b[8:]), be.Uint32(b[16:])
	clusterBits, size := be.Uint32(b[20:]), be.Uint64(b[24:])
	l1Size, l1At := be.Uint32(b[36:]), be.Uint64(b[40:])
	if string(b[:4]) != qcow2Magic || version != 2 && version != 3 {
		return nil, errors.New("not a qcow2 image of version 2 or 3")
	}
	if clusterBits < 9 || clusterBits > 21 {
		return nil, fmt.Errorf("qcow2 header: clusters of 2^%d bytes can't be", clusterBits)
	}
	q := &qcow2{size: int64(size), cluster: 1 << clusterBits}
	if size == 0 || size > maxSize || size%SectorSize != 0 {
		return nil, fmt.Errorf("qcow2 header: a disk of %d bytes is none that can be read here", size)
	}
	if be.Uint32(b[32:]) != 0 {
		return nil, errors.New("the image is encrypted")
	}
	if version == 3 {
		if unknown := be.Uint64(b[72:]) &^ qcow2Known; unknown != 0 {
			return nil, fmt.Errorf("qcow2 header: its feature %s can't be read here", featureName(bits.TrailingZeros64(unknown)))
		}
		if n := int64(be.Uint32(b[100:])); n < 104 || n > q.cluster {
			return nil, fmt.Errorf("qcow2 header: a header of %d bytes can't be", n)
		}
	}
	// Each L2 table fills a cluster, with eight bytes for each cluster of data.
	perL1 := uint64(q.cluster) * uint64(q.cluster/8)
	if need := (size + perL1 - 1) / perL1; uint64(l1Size) < need || uint64(l1Size)*8 > maxL1 {
		return nil, fmt.Errorf("qcow2 header: an L1 table of %d entries, where the disk needs %d", l1Size, need)
	}
	if l1At == 0 || l1At%uint64(q.cluster) != 0 || l1At > uint64(fileSize) || uint64(l1Size)*8 > uint64(fileSize)-l1At {
		return nil, fmt.Errorf("qcow2 header: no L1 table at %d", l1At)
	}
	q.tables = clusterTables{file: f, fileSize: fileSize, bits: uint(clusterBits), l1At: int64(l1At), l1Size: int64(l1Size)}
	if backingAt != 0 {
		if backingLen == 0 || backingLen > maxBackingName || backingAt > uint64(q.cluster)-uint64(min(backingLen, uint32(q.cluster))) {
			return nil, errors.New("qcow2 header: the backing file's name is out of the header")
		}
		name := make([]byte, backingLen)
		if err := readFilled(f, name, int64(backingAt)); err != nil {
			return nil, err
		}
		if bytes.IndexByte(name, 0) >= 0 {
			return nil, errors.New("qcow2 header: a backing file's name with a zero byte")
		}
		q.backing = string(name)
	}
	return q, nil
}

// featureName is what an incompatible feature is called.
func featureName(bit int) string {
	if bit < len(lib.IncompatibleFeaturesNames) {
		return lib.IncompatibleFeaturesNames[bit]
	}
	return fmt.Sprint(bit)
}

// masked is a file as the library is to see it: its header names no backing file, and
// behind its end are zeros, as QEMU sees it.
type masked struct{ io.ReaderAt }

// The header's fields for the backing file's name.
const maskFrom, maskTo = 8, 20

func (m masked) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, errors.New("negative offset")
	}
	if err := readFilled(m.ReaderAt, p, off); err != nil {
		return 0, err
	}
	if from, to := max(off, maskFrom), min(off+int64(len(p)), maskTo); from < to {
		clear(p[from-off : to-off])
	}
	return len(p), nil
}

// extent says what the layer has of the disk from off on, and for how many bytes, at
// most n, that holds. The range must lie within the disk.
func (q *qcow2) extent(off, n int64) (kind ownKind, length int64, err error) {
	// Whole clusters, up to the disk's end.
	from := off / q.cluster * q.cluster
	to := min((off+n+q.cluster-1)/q.cluster*q.cluster, q.size)
	var e image.Extent
	err = rescue.Call(func() error {
		e, err = q.lib.Extent(from, to-from)
		return err
	})
	if err == nil && (e.Start != from || e.Length <= off-from) {
		err = errors.New("the image's tables make no sense")
	}
	if err != nil {
		return 0, 0, err
	}
	switch {
	case !e.Allocated:
		kind = unallocated
	case e.Zero:
		kind = ownZero
	default:
		kind = ownData
	}
	return kind, min(from+e.Length-off, n), nil
}

// read reads a range of which the layer has bytes.
func (q *qcow2) read(p []byte, off int64) error {
	return rescue.Call(func() error {
		for len(p) > 0 {
			n, err := q.lib.ReadAt(p, off)
			// It may stop at any end of a compressed cluster's decoder, with an error
			// that says EOF: what has come is right.
			if n <= 0 || n > len(p) {
				if err == nil || err == io.EOF {
					err = io.ErrUnexpectedEOF
				}
				return err
			}
			if err != nil && !errors.Is(err, io.EOF) {
				return err
			}
			p, off = p[n:], off+int64(n)
		}
		return nil
	})
}
