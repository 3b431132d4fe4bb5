package workingset

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"slices"

	"github.com/flic-migrate/flic-migrate/tier/integrity"
)

// The file, little-endian; docs/format-workingset.md has it in full.
//
//	header: magic 8, version 4, page size 4, blocks 4, zero 8, CRC-32C 4
//	block:  name length 2, planes 1, zero 1, pages 8, name,
//	        planes of ceil(pages/8) bytes, CRC-32C 4
const (
	magic       = "FLICWSET"
	version     = 1
	headerSize  = 32
	blockHeader = 12
)

// WriteTo writes the set in the format of docs/format-workingset.md.
func (s *Set) WriteTo(w io.Writer) (int64, error) {
	out := &counter{w: w}
	buf := bufio.NewWriterSize(out, 64<<10)
	h := make([]byte, 0, headerSize)
	h = append(h, magic...)
	h = binary.LittleEndian.AppendUint32(h, version)
	h = binary.LittleEndian.AppendUint32(h, uint32(s.pageSize))
	h = binary.LittleEndian.AppendUint32(h, uint32(len(s.blocks)))
	h = append(h, make([]byte, 8)...)
	h = binary.LittleEndian.AppendUint32(h, integrity.Checksum(h))
	buf.Write(h) // bufio keeps the first error for Flush
	for _, b := range s.blocks {
		crc := crc32.New(integrity.Castagnoli)
		w := io.MultiWriter(buf, crc)
		planes := b.planes
		for len(planes) > 0 && !slices.ContainsFunc(planes[len(planes)-1], func(x uint64) bool { return x != 0 }) {
			planes = planes[:len(planes)-1]
		}
		h := binary.LittleEndian.AppendUint16(nil, uint16(len(b.Name)))
		h = append(h, byte(len(planes)), 0)
		h = binary.LittleEndian.AppendUint64(h, uint64(b.Pages))
		w.Write(append(h, b.Name...))
		var chunk [8 << 10]byte
		for _, p := range planes {
			left := (b.Pages + 7) / 8
			for len(p) > 0 {
				n := min(len(p), len(chunk)/8)
				for i, x := range p[:n] {
					binary.LittleEndian.PutUint64(chunk[i*8:], x)
				}
				w.Write(chunk[:min(int64(n*8), left)])
				left -= int64(n * 8)
				p = p[n:]
			}
		}
		buf.Write(binary.LittleEndian.AppendUint32(nil, crc.Sum32()))
	}
	err := buf.Flush()
	return out.n, err
}

type counter struct {
	w io.Writer
	n int64
}

func (c *counter) Write(b []byte) (int, error) {
	n, err := c.w.Write(b)
	c.n += int64(n)
	return n, err
}

// reader counts and sums what it reads.
type reader struct {
	r   *bufio.Reader
	off int64
	crc hash.Hash32
}

func (r *reader) corrupt(off int64, format string, args ...any) error {
	return &integrity.CorruptError{File: "working set", Offset: off, Err: fmt.Errorf(format, args...)}
}

// full reads all of b; the end of the file is a damage.
func (r *reader) full(b []byte) error {
	n, err := io.ReadFull(r.r, b)
	r.off += int64(n)
	r.crc.Write(b[:n])
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return r.corrupt(r.off, "the file ends in the middle")
	}
	return err
}

// checksum reads a CRC-32C and compares it with that of all bytes read since
// the last one.
func (r *reader) checksum(what string) error {
	want, at := r.crc.Sum32(), r.off
	var b [4]byte
	if err := r.full(b[:]); err != nil {
		return err
	}
	if got := binary.LittleEndian.Uint32(b[:]); got != want {
		return r.corrupt(at, "checksum mismatch in %s: %08x, computed %08x", what, got, want)
	}
	r.crc.Reset()
	return nil
}

// Read reads a set up to the end of r. Damage is an integrity.CorruptError. Memory grows
// with the bytes really read, not with what a header claims.
func Read(r io.Reader) (*Set, error) {
	in := &reader{r: bufio.NewReaderSize(r, 64<<10), crc: crc32.New(integrity.Castagnoli)}
	h := make([]byte, headerSize-4)
	if err := in.full(h); err != nil {
		return nil, err
	}
	if string(h[:8]) != magic {
		return nil, in.corrupt(0, "not a working set (no magic number)")
	}
	if err := in.checksum("header"); err != nil {
		return nil, err
	}
	if v := binary.LittleEndian.Uint32(h[8:]); v != version {
		return nil, in.corrupt(8, "format version %d is not known to this program", v)
	}
	s, err := New(int(binary.LittleEndian.Uint32(h[12:])), nil)
	if err != nil {
		return nil, in.corrupt(12, "%v", err)
	}
	if zero := binary.LittleEndian.Uint64(h[20:]); zero != 0 {
		return nil, in.corrupt(20, "reserved field is %#x", zero)
	}
	n := binary.LittleEndian.Uint32(h[16:])
	if n > maxBlocks {
		return nil, in.corrupt(16, "%d RAM blocks", n)
	}
	for range n {
		if err := s.readBlock(in); err != nil {
			return nil, err
		}
	}
	if _, err := in.r.ReadByte(); err != io.EOF {
		if err == nil {
			err = in.corrupt(in.off, "data after the last RAM block")
		}
		return nil, err
	}
	return s, nil
}

func (s *Set) readBlock(in *reader) error {
	start := in.off
	var h [blockHeader]byte
	if err := in.full(h[:]); err != nil {
		return err
	}
	n, k := binary.LittleEndian.Uint16(h[0:]), int(h[2])
	pages := binary.LittleEndian.Uint64(h[4:])
	if n > maxName || k > maxPlanes || h[3] != 0 || pages > maxPages {
		return in.corrupt(start, "RAM block with a name of %d bytes, %d planes, reserved byte %#x and %d pages", n, k, h[3], pages)
	}
	name := make([]byte, n)
	if err := in.full(name); err != nil {
		return err
	}
	b := Block{string(name), int64(pages)}
	planes := make([][]uint64, k)
	for j := range planes {
		p, err := in.plane(b)
		if err != nil {
			return err
		}
		planes[j] = p
	}
	if err := in.checksum(fmt.Sprintf("RAM block %q", name)); err != nil {
		return err
	}
	if err := s.add(b); err != nil {
		return in.corrupt(start, "%v", err)
	}
	s.blocks[len(s.blocks)-1].planes = planes
	return nil
}

// plane reads one bit plane. It grows as the bytes come in: a size that is a lie
// must not cost memory.
func (in *reader) plane(b Block) ([]uint64, error) {
	var p []uint64
	var chunk [8 << 10]byte
	for left := (b.Pages + 7) / 8; left > 0; {
		n := min(left, int64(len(chunk)))
		if err := in.full(chunk[:n]); err != nil {
			return nil, err
		}
		clear(chunk[n:])
		for i := int64(0); i < n; i += 8 {
			p = append(p, binary.LittleEndian.Uint64(chunk[i:]))
		}
		left -= n
	}
	if b.Pages%64 != 0 && p[len(p)-1]>>(b.Pages%64) != 0 {
		return nil, in.corrupt(in.off-1, "heat beyond the last page of RAM block %q", b.Name)
	}
	return p, nil
}
