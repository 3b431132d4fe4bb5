// Package sums is the digests of a disk image that a store keeps with a checkpoint, by which
// it is known that the image is what it was, bit for bit:
//
//	image ─► Each: blocks that are not zero ─► Make ─► frozen/UUID.digests
//	image ─► Each ─────────────────────────► Check ◄──────────┘
//
// The file is in leaves that are checked one by one, so that the memory it takes to check
// an image does not grow with the image:
//
//	0      ┌────────────────────────────────┐
//	       │ header                   4 KiB │
//	4096   ├────────────────────────────────┤
//	       │ leaf                     4 KiB │  102 records each, the last one
//	       │ …                              │  perhaps fewer
//	       └────────────────────────────────┘
//
// A record is a block's number and its BLAKE3-256. A block without one is zero, whether it is
// a hole or not: what copies a store may make the one of the other. docs/format.md has the
// offsets.
package sums

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/google/uuid"
	"github.com/zeebo/blake3"

	"github.com/flic-migrate/flic-migrate/tier/integrity"
)

// BlockSize is what has a digest of its own, in bytes. The last block of an image may be
// shorter.
const BlockSize = 1 << 20

const (
	version    = 1
	pageLen    = 4096 // of the header, and of a leaf
	recordLen  = 8 + hashLen
	hashLen    = 32
	perLeaf    = 102
	crcAt      = pageLen - 4
	sizeAt     = 32
	recordsAt  = 40
	reservedAt = 48
)

var magic = [8]byte{'F', 'L', 'I', 'C', 'K', 'P', 'T', 0}

var (
	// ErrZero: where an image had bytes, it has zeros.
	ErrZero = errors.New("zeros in place of what was there")
	// ErrNotZero: where an image had zeros, it has something else.
	ErrNotZero = errors.New("something in place of zeros")
	// ErrDigest: a block has other bytes than it had.
	ErrDigest = errors.New("digest mismatch")
)

// Image is an image as it is read. Data is as of vfs.File.
type Image interface {
	io.ReaderAt
	Size() (int64, error)
	Data(off int64) (int64, error)
}

// ReadError is the failure of reading an image.
type ReadError struct {
	Offset int64 // of the block, in bytes
	Err    error
}

func (e *ReadError) Error() string { return fmt.Sprintf("offset %d: %v", e.Offset, e.Err) }
func (e *ReadError) Unwrap() error { return e.Err }

// Each calls fn with the blocks of an image that are not zero, in order; b is fn's until it
// returns. Holes are not read. It returns how many bytes were read. The error is fn's, the
// context's or a *ReadError.
func Each(ctx context.Context, f Image, fn func(off int64, b []byte) error) (read int64, err error) {
	size, err := f.Size()
	if err != nil {
		return 0, &ReadError{0, err}
	}
	block, zeros := make([]byte, min(BlockSize, size)), make([]byte, min(BlockSize, size))
	for off := int64(0); off < size; off += BlockSize {
		if err := context.Cause(ctx); err != nil {
			return read, err
		}
		at, err := f.Data(off)
		if err == io.EOF {
			break
		}
		if err != nil {
			return read, &ReadError{off, err}
		}
		off = at / BlockSize * BlockSize
		b := block[:max(0, min(BlockSize, size-off))]
		n, err := f.ReadAt(b, off)
		read += int64(n)
		if n < len(b) {
			if err == nil || err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return read, &ReadError{off, err}
		}
		if bytes.Equal(b, zeros[:len(b)]) {
			continue
		}
		if err := fn(off, b); err != nil {
			return read, err
		}
	}
	return read, nil
}

// Make reads an image, and returns the file of its digests: 40 bytes for each block that is
// not zero. id is the image's UUID, which the digests are of no use to any other.
func Make(ctx context.Context, f Image, id uuid.UUID) (file []byte, read int64, err error) {
	size, err := f.Size()
	if err != nil {
		return nil, 0, &ReadError{0, err}
	}
	file = make([]byte, pageLen)
	records := uint64(0)
	read, err = Each(ctx, f, func(off int64, b []byte) error {
		if records%perLeaf == 0 {
			seal(file[len(file)-pageLen:]) // the header has its own at the end
			file = append(file, make([]byte, pageLen)...)
		}
		r := file[len(file)-pageLen+int(records%perLeaf)*recordLen:]
		binary.LittleEndian.PutUint64(r, uint64(off/BlockSize))
		sum := blake3.Sum256(b)
		copy(r[8:], sum[:])
		records++
		return nil
	})
	if err != nil {
		return nil, read, err
	}
	seal(file[len(file)-pageLen:])
	h := file[:pageLen]
	copy(h, magic[:])
	binary.LittleEndian.PutUint32(h[8:], version)
	binary.LittleEndian.PutUint32(h[12:], BlockSize)
	copy(h[16:], id[:])
	binary.LittleEndian.PutUint64(h[sizeAt:], uint64(size))
	binary.LittleEndian.PutUint64(h[recordsAt:], records)
	seal(h)
	return file, read, nil
}

// seal sets the checksum of the header, or of a leaf.
func seal(page []byte) {
	binary.LittleEndian.PutUint32(page[crcAt:], integrity.Checksum(page[:crcAt]))
}

// Digests is an open file of digests.
type Digests struct {
	f       io.ReaderAt
	name    string
	size    int64  // of the image
	records uint64 // that there are

	leaf [pageLen]byte // of the records around next
	next uint64        // the record that comes next
	last int64         // block of the one before; -1: there is none
}

// Open opens the digests of the image id, of length bytes. name is for errors. What is not
// what Make made is an *integrity.CorruptError.
func Open(f io.ReaderAt, length int64, name string, id uuid.UUID) (*Digests, error) {
	d := &Digests{f: f, name: name}
	h := d.leaf[:]
	if err := d.read(h, 0, "header"); err != nil {
		return nil, err
	}
	d.size = int64(binary.LittleEndian.Uint64(h[sizeAt:]))
	d.records = binary.LittleEndian.Uint64(h[recordsAt:])
	blocks := (uint64(max(0, d.size)) + BlockSize - 1) / BlockSize
	var wrong error
	switch v := binary.LittleEndian.Uint32(h[8:]); {
	case !bytes.Equal(h[:8], magic[:]):
		wrong = errors.New("no digests of a disk")
	case v != version:
		wrong = fmt.Errorf("version %d, and this program reads %d", v, version)
	case binary.LittleEndian.Uint32(h[12:]) != BlockSize:
		wrong = fmt.Errorf("blocks of %d bytes", binary.LittleEndian.Uint32(h[12:]))
	case !bytes.Equal(h[16:32], id[:]):
		wrong = errors.New("the digests of another disk")
	case !zero(h[reservedAt:crcAt]):
		wrong = errors.New("bytes in place of zeros")
	case d.size < 0 || d.records > blocks:
		wrong = fmt.Errorf("%d digests of a disk of %d bytes", d.records, d.size)
	case uint64(length) != pageLen*(1+(d.records+perLeaf-1)/perLeaf):
		wrong = fmt.Errorf("%d bytes with %d digests", length, d.records)
	}
	if wrong != nil {
		return nil, d.corrupt(0, "header", wrong)
	}
	return d, nil
}

func (d *Digests) corrupt(off int64, what string, err error) error {
	return &integrity.CorruptError{File: d.name, Offset: off, What: what, Err: err}
}

// read reads the header or a leaf.
func (d *Digests) read(page []byte, off int64, what string) error {
	if n, err := d.f.ReadAt(page, off); n < len(page) {
		if err == nil || err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return d.corrupt(off, what, err)
	}
	if binary.LittleEndian.Uint32(page[crcAt:]) != integrity.Checksum(page[:crcAt]) {
		return d.corrupt(off, what, integrity.ErrChecksum)
	}
	return nil
}

// peek returns the record that comes next; false: there is none any more.
func (d *Digests) peek() (block int64, sum []byte, ok bool, err error) {
	if d.next == d.records {
		return 0, nil, false, nil
	}
	i := int(d.next % perLeaf)
	at := pageLen * int64(1+d.next/perLeaf)
	if i == 0 {
		if err := d.read(d.leaf[:], at, "leaf"); err != nil {
			return 0, nil, false, err
		}
	}
	r := d.leaf[i*recordLen:][:recordLen]
	block = int64(binary.LittleEndian.Uint64(r))
	switch {
	case block <= d.last || block > (d.size-1)/BlockSize:
		err = d.corrupt(at+int64(i*recordLen), "leaf", fmt.Errorf("block %d after block %d", block, d.last))
	case d.next == d.records-1 && !zero(d.leaf[(i+1)*recordLen:crcAt]), i == perLeaf-1 && !zero(d.leaf[perLeaf*recordLen:crcAt]):
		err = d.corrupt(at, "leaf", errors.New("bytes in place of zeros"))
	}
	return block, r[8:], err == nil, err
}

// take goes on to the record behind that of a block.
func (d *Digests) take(block int64) { d.next, d.last = d.next+1, block }

// Check reads an image and calls found, which may be called many times, with an
// *integrity.CorruptError for each of its blocks that is not what it was; name is what that
// calls the image. each is called, unless it is nil, with all blocks that are not zero, after
// found. Check ends with an error of either: that of digests or an image that can't be read
// is an *integrity.CorruptError, too. It returns how many bytes of the image were read.
func (d *Digests) Check(ctx context.Context, f Image, name string, found func(error) error, each func(off int64, b []byte) error) (read int64, err error) {
	d.next, d.last = 0, -1
	wrong := func(block int64, err error) error {
		return found(&integrity.CorruptError{File: name, Offset: block * BlockSize, What: "disk that is kept", Err: err})
	}
	size, err := f.Size()
	if err == nil && size != d.size {
		return 0, wrong(0, fmt.Errorf("it has %d bytes, and had %d", size, d.size))
	}
	// gap takes the records up to a block: of these, the image has zeros.
	gap := func(end int64) error {
		for {
			block, _, ok, err := d.peek()
			if err != nil || !ok || block >= end {
				return err
			}
			d.take(block)
			if err := wrong(block, ErrZero); err != nil {
				return err
			}
		}
	}
	read, err = Each(ctx, f, func(off int64, b []byte) error {
		this := off / BlockSize
		if err := gap(this); err != nil {
			return err
		}
		block, sum, ok, err := d.peek()
		if err != nil {
			return err
		}
		now := blake3.Sum256(b)
		switch {
		case !ok || block > this:
			err = wrong(this, ErrNotZero)
		case !bytes.Equal(now[:], sum):
			d.take(block)
			err = wrong(this, ErrDigest)
		default:
			d.take(block)
		}
		if err == nil && each != nil {
			err = each(off, b)
		}
		return err
	})
	var unread *ReadError
	if errors.As(err, &unread) {
		err = &integrity.CorruptError{File: name, Offset: unread.Offset, What: "disk that is kept", Err: unread.Err}
	}
	if err != nil {
		return read, err
	}
	return read, gap((d.size + BlockSize - 1) / BlockSize)
}

// zero tells whether all bytes are zero.
func zero(b []byte) bool {
	for _, x := range b {
		if x != 0 {
			return false
		}
	}
	return true
}
