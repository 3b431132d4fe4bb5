package saveimage

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/bits"
	"slices"

	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/stream"
)

// A sparse save file (libvirt 11.2 and later) is written by QEMU itself, past any
// program, with the migration capability mapped-ram (QEMU's
// docs/devel/migration/mapped-ram.rst): every page has a place of its own in the
// file, and one that is zero leaves a hole there.
//
//	┌─────────────────────────────────────────────────────────┐
//	│ save file's header                                      │
//	├─────────────────────────────────────────────────────────┤
//	│ stream as usual, up to the sum in the RAM section's     │
//	│ START                                                   │
//	├─────────────────────────────────────────────────────────┤
//	│ u8 len, name, be64 used length                          │ for each
//	│ be64 page size, if huge; be64 address, if               │ RAM block
//	│ x-ignore-shared                                         │
//	│ be32 version 1, be64 page size, be64 offset of the      │
//	│ bitmap, be64 offset of the pages                        │
//	│ bitmap: longs of the host's, one bit a page, 0 = zero   │
//	│ … up to a multiple of 1 MiB                             │
//	│ pages, used length: the page at address a at a          │
//	├─────────────────────────────────────────────────────────┤
//	│ rest of the stream, in which RAM has no records: EOS,   │
//	│ footer, other sections, device tail                     │
//	└─────────────────────────────────────────────────────────┘
//
// A block that is not in the stream (x-ignore-shared) has both offsets 0 and neither
// bitmap nor pages. Offsets count from the beginning of the file.

const (
	mappedVersion   = 1
	mappedHeaderLen = 4 + 8 + 8 + 8
	mappedRAM       = "mapped-ram"

	// bitmapChunk is how much of a bitmap is read at once, a multiple of a long.
	bitmapChunk = 64 << 10
	// maxBlocks is far above what machines have.
	maxBlocks = 4096
)

// mappedBlock is a RAM block of a sparse file.
type mappedBlock struct {
	name     string
	used     int64 // bytes
	pageSize int64
	bitmap   int64 // offsets in the file; both 0 if the block is not in the stream
	pages    int64
}

// CopySparse writes the stream of a sparse save file, which begins at the offset
// start of f and goes to size, as QEMU would have sent it through a pipe: the RAM
// section has its pages as records, and the capability mapped-ram is not asked of
// the QEMU that reads it. Pages are read once, in order. h is the file's header.
//
// Errors of what is in the file are stream's, with the offset in the file.
func CopySparse(w io.Writer, f io.ReaderAt, start, size int64, h *Header) error {
	s := &sparse{f: f, start: start, size: size, order: h.order, w: w}
	flat, payload, err := s.flatten()
	if err != nil {
		return err
	}
	return s.copy(stream.NewReader(stream.NewCursor(flat, 0)), payload)
}

type sparse struct {
	f           io.ReaderAt
	start, size int64
	order       binary.ByteOrder // the host's that wrote it
	w           io.Writer
	blocks      []mappedBlock
}

const opSparse = "sparse save file"

// flatten reads the front of the stream up to the blocks, and the blocks, and returns
// the stream without holes, pages and what stands for them, and the length of the
// START's payload in it.
func (s *sparse) flatten() (flat io.Reader, payload int, err error) {
	section := io.NewSectionReader(s.f, s.start, s.size-s.start)
	r := stream.NewReader(stream.NewCursor(section, 0))
	for {
		f, err := r.Next()
		switch {
		case err != nil:
			return nil, 0, err
		case f.Kind == stream.SectionStart && f.Section.Name == "ram":
			at := s.start + r.Cursor().Offset()
			front := at
			setup, at, err := s.setup(at)
			if err != nil {
				return nil, 0, err
			}
			return io.MultiReader(io.NewSectionReader(s.f, s.start, front-s.start), bytes.NewReader(setup),
				io.NewSectionReader(s.f, at, s.size-at)), len(setup) + 8, nil
		case f.Kind == stream.SectionStart:
			err = r.CopyForeign(func([]byte) error { return nil })
		case f.Kind == stream.SectionFull:
			err = stream.Damaged(opSparse, s.start+f.Offset, "the devices come before the RAM section")
		}
		if err != nil {
			return nil, 0, err
		}
	}
}

// setup reads the blocks of the START whose payload is at the offset at. It returns
// that payload as it would be without mapped-ram, up to the end-of-section record,
// and the offset of that record.
func (s *sparse) setup(at int64) (plain []byte, next int64, err error) {
	const flags = 0xfff
	total, err := s.read(at, 8)
	if err != nil {
		return nil, 0, err
	}
	left := binary.BigEndian.Uint64(total) &^ flags
	plain = append(plain, total...)
	at += 8
	for left > 0 {
		if len(s.blocks) == maxBlocks {
			return nil, 0, stream.Damaged(opSparse, at, "more than %d RAM blocks", maxBlocks)
		}
		b, head, next, err := s.block(at)
		if err != nil {
			return nil, 0, err
		}
		if uint64(b.used) > left {
			return nil, 0, stream.Damaged(opSparse, at, "RAM block %q has %d bytes, and %d are left", b.name, b.used, left)
		}
		left -= uint64(b.used)
		plain = append(plain, head...)
		s.blocks = append(s.blocks, b)
		at = next
	}
	end, err := s.read(at, 8)
	if err != nil {
		return nil, 0, err
	}
	if !bytes.Equal(end, ramparse.AppendEOS(nil)) {
		return nil, 0, stream.Unknown(opSparse, at, "%x where the setup of RAM should end", end)
	}
	return plain, at, nil
}

// block reads one. head are its bytes without what mapped-ram has added.
func (s *sparse) block(at int64) (b mappedBlock, head []byte, next int64, err error) {
	fail := func(format string, args ...any) (mappedBlock, []byte, int64, error) {
		return mappedBlock{}, nil, 0, stream.Damaged(opSparse, at, format, args...)
	}
	n, err := s.read(at, 1)
	if err != nil {
		return b, nil, 0, err
	}
	fixed := 1 + int(n[0]) + 8
	raw, err := s.read(at, fixed+16+mappedHeaderLen)
	if err != nil {
		return b, nil, 0, err
	}
	be := binary.BigEndian
	b.name = string(raw[1 : fixed-8])
	used := be.Uint64(raw[fixed-8:])
	// Nothing says whether a page size and an address stand before the header; the
	// header does itself, because it has its own place.
	for extra := 0; extra <= 16; extra += 8 {
		m := raw[fixed+extra:]
		own := at + int64(fixed+extra+mappedHeaderLen)
		size, bitmap, pages := be.Uint64(m[4:]), be.Uint64(m[12:]), be.Uint64(m[20:])
		if be.Uint32(m) != mappedVersion || bits.OnesCount64(size) != 1 || size < 1<<10 || size > 1<<16 {
			continue
		}
		b.pageSize = int64(size)
		head = slices.Clone(raw[:fixed+extra])
		if bitmap == 0 && pages == 0 {
			b.used = int64(min(used, uint64(1<<62)))
			return b, head, own, nil
		}
		// QEMU counts from the beginning of the file that it was given.
		base := s.start
		if bitmap == uint64(own) {
			base = 0
		} else if bitmap != uint64(own-s.start) {
			continue
		}
		limit := uint64(s.size)
		switch {
		case len(b.name) == 0 || used%size != 0 || used > limit || pages > limit || uint64(base)+pages+used > limit:
			return fail("RAM block %q of %d bytes at %d does not fit into %d bytes", b.name, used, pages, s.size)
		case pages < bitmap+(used/size+63)/64*8:
			return fail("RAM block %q: the pages at %d overlap the bitmap at %d", b.name, pages, bitmap)
		}
		b.used, b.bitmap, b.pages = int64(used), base+int64(bitmap), base+int64(pages)
		return b, head, b.pages + b.used, nil
	}
	return fail("RAM block %q has no header of mapped-ram", b.name)
}

// read returns n bytes at an offset.
func (s *sparse) read(at int64, n int) ([]byte, error) {
	if at > s.size-int64(n) {
		return nil, stream.Wrap(opSparse, at, io.ErrUnexpectedEOF)
	}
	b := make([]byte, n)
	if _, err := s.f.ReadAt(b, at); err != nil {
		return nil, stream.Wrap(opSparse, at, err)
	}
	return b, nil
}

// copy writes the flat stream, with the pages as a section before RAM's next. There
// can be device sections ahead of that, which must stay ahead of the pages.
func (s *sparse) copy(r *stream.Reader, payload int) error {
	var ram uint32
	write := func(b []byte) error { _, err := s.w.Write(b); return err }
	for {
		f, err := r.Next()
		if err != nil {
			return err
		}
		raw := f.Raw
		switch {
		case f.Kind == stream.Subsection && f.Subsection.Name == stream.SubsectionCapabilities:
			raw = nil
			c := f.Subsection
			if c.Capabilities = slices.DeleteFunc(c.Capabilities, func(name string) bool { return name == mappedRAM }); len(c.Capabilities) > 0 {
				raw = stream.AppendConfigSubsection(nil, c)
			}
		case f.Kind == stream.SectionFull,
			(f.Kind == stream.SectionPart || f.Kind == stream.SectionEnd) && f.Section.Name == "ram":
			if err := s.pages(ram); err != nil {
				return err
			}
			if err := write(raw); err != nil {
				return err
			}
			err := r.Cursor().Copy(1<<62, write)
			if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
				err = nil
			}
			return err
		}
		if err := write(raw); err != nil {
			return err
		}
		switch {
		case f.Kind == stream.SectionStart && f.Section.Name == "ram":
			ram = f.Section.ID
			err = r.Cursor().Copy(int64(payload), write)
		case f.Kind == stream.SectionStart, f.Kind == stream.SectionPart, f.Kind == stream.SectionEnd:
			err = r.CopyForeign(write)
		case f.Kind == stream.EOF:
			err = stream.Damaged(opSparse, s.start+f.Offset, "the stream ends in its RAM section")
		}
		if err != nil {
			return err
		}
	}
}

// pages writes all pages as a section of RAM's.
func (s *sparse) pages(ram uint32) error {
	out := stream.AppendPart(nil, ram)
	for _, b := range s.blocks {
		if b.pages == 0 {
			continue
		}
		name := b.name // of the block's first record; the others go on with it
		bitmap := make([]byte, 0, bitmapChunk)
		page := make([]byte, b.pageSize)
		for i := int64(0); i < b.used/b.pageSize; i++ {
			if i%(bitmapChunk*8) == 0 {
				left := (b.used/b.pageSize - i + 63) / 64 * 8
				var err error
				if bitmap, err = s.read(b.bitmap+i/8, int(min(left, bitmapChunk))); err != nil {
					return err
				}
			}
			if long := s.order.Uint64(bitmap[i/64*8%bitmapChunk:]); long>>(i%64)&1 == 0 {
				out = ramparse.AppendZero(out, name, uint64(i*b.pageSize), 0)
			} else {
				if _, err := s.f.ReadAt(page, b.pages+i*b.pageSize); err != nil {
					return stream.Wrap(opSparse, b.pages+i*b.pageSize, err)
				}
				out = append(ramparse.AppendPageHeader(out, name, uint64(i*b.pageSize)), page...)
			}
			name = ""
			if len(out) >= 1<<20 {
				if _, err := s.w.Write(out); err != nil {
					return err
				}
				out = out[:0]
			}
		}
	}
	out = stream.AppendFooter(ramparse.AppendEOS(out), ram)
	_, err := s.w.Write(out)
	return err
}
