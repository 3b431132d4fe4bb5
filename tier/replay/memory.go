package replay

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/zeebo/blake3"

	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/stream"
)

// memory is what a destination has after it has loaded a stream: the last
// content of every page that was sent, and a hash of all the rest. Pages are
// in a sparse file, since differences (XBZRLE) need the content itself, and RAM
// may be larger than this machine's.
type memory struct {
	dir      string
	file     *os.File
	pageSize int // 0: to be found out
	blocks   []ramparse.Block
	base     []int64 // of each block in the file
	seen     pageSet
	pages    int64    // that were sent
	resent   int64    // records of pages that had come before
	rest     [32]byte // BLAKE3 of everything that is not a page record

	page, old []byte
}

// loadMemory loads the stream from r. Its file is in dir, without a name.
func loadMemory(r io.Reader, dir string, pageSize int) (*memory, error) {
	m := &memory{dir: dir, pageSize: pageSize, seen: make(pageSet)}
	rest := blake3.New()
	err := ramparse.Walk(r, pageSize, restVisitor(rest, m.record))
	if err != nil {
		m.close()
		return nil, err
	}
	rest.Sum(m.rest[:0])
	return m, nil
}

// restVisitor hashes everything but page records, which go to page.
func restVisitor(rest *blake3.Hasher, page func(*ramparse.Decoder, *ramparse.Record) error) ramparse.Visitor {
	write := func(b []byte) error { _, err := rest.Write(b); return err }
	return ramparse.Visitor{
		Frame: func(f *stream.Frame) error { return write(f.Raw) },
		Record: func(d *ramparse.Decoder, rec *ramparse.Record) error {
			switch rec.Kind {
			case ramparse.Zero, ramparse.Page, ramparse.XBZRLE, ramparse.Compressed:
				return page(d, rec)
			}
			return write(rec.Raw)
		},
		Bytes:  write,
		Opaque: func(b []byte, _ error) error { return write(b) },
		Tail:   write,
	}
}

func (m *memory) close() {
	if m.file != nil {
		m.file.Close()
	}
}

// setup makes the file once the page size is known.
func (m *memory) setup(d *ramparse.Decoder) error {
	m.blocks = d.Setup().Blocks
	m.pageSize = max(m.pageSize, d.PageSize())
	if m.pageSize == 0 {
		// Only a page at address 0 has come, and it was a ZERO record.
		m.pageSize = 4096
	}
	m.page, m.old = make([]byte, m.pageSize), make([]byte, m.pageSize)
	var end int64
	for _, b := range m.blocks {
		m.base = append(m.base, end)
		// No part of a page is ever sent, but such a block may be listed.
		end += (int64(b.Used) + int64(m.pageSize) - 1) / int64(m.pageSize) * int64(m.pageSize)
	}
	f, err := os.CreateTemp(m.dir, "memory-*")
	if err != nil {
		return err
	}
	m.file = f
	os.Remove(f.Name())
	return f.Truncate(end)
}

// pageSet is a bitmap of pages, by number in the file: a map of words, because
// a few hostile bytes can announce RAM of any size.
type pageSet map[int64]uint64

func (s pageSet) has(page int64) bool { return s[page/64]&(1<<(page%64)) != 0 }

// add adds a page and tells whether it was there already.
func (s pageSet) add(page int64) bool {
	again := s.has(page)
	s[page/64] |= 1 << (page % 64)
	return again
}

func (m *memory) record(d *ramparse.Decoder, rec *ramparse.Record) error {
	if m.file == nil {
		if err := m.setup(d); err != nil {
			return err
		}
	}
	off := m.base[rec.Block] + int64(rec.Page)*int64(m.pageSize)
	again := m.seen.add(off / int64(m.pageSize))
	if again {
		m.resent++
	} else {
		m.pages++
	}
	if rec.Kind == ramparse.Zero && rec.Fill == 0 && !again {
		return nil // the file is zero there
	}
	if rec.Kind == ramparse.XBZRLE && !again {
		// ROM is not zero in a destination, so there is nothing it could change.
		return stream.Damaged("xbzrle page", rec.Offset, "a difference to a page that has not come")
	}
	content, err := m.content(rec, off)
	if err != nil {
		return err
	}
	_, err = m.file.WriteAt(content, off)
	return err
}

// content is what a page holds after a record, valid until the next call. Only
// a difference looks at what the file has.
func (m *memory) content(rec *ramparse.Record, off int64) ([]byte, error) {
	var err error
	switch rec.Kind {
	case ramparse.Page:
		return rec.Data, nil
	case ramparse.Zero:
		for i := range m.page {
			m.page[i] = rec.Fill
		}
	case ramparse.Compressed:
		err = ramparse.Inflate(m.page, rec.Data)
	case ramparse.XBZRLE:
		if _, err = m.file.ReadAt(m.page, off); err == nil {
			err = ramparse.ApplyXBZRLE(m.page, rec.Data)
		}
	}
	if err != nil {
		return nil, stream.Wrap("page record", rec.Offset, err)
	}
	return m.page, nil
}

// errDiffers is wrapped by what compare finds.
var errDiffers = errors.New("the restored stream differs")

// compare checks that the stream from r makes the same memory, sends each page
// once, and is otherwise the same.
func (m *memory) compare(r io.Reader) error {
	rest := blake3.New()
	seen := make(pageSet)
	var pages int64
	err := ramparse.Walk(r, m.pageSize, restVisitor(rest, func(d *ramparse.Decoder, rec *ramparse.Record) error {
		where := func() string { return fmt.Sprintf("%s:%#x", d.Setup().Blocks[rec.Block].Name, rec.Addr) }
		if rec.Block >= len(m.base) || !m.blocks[rec.Block].Equal(d.Setup().Blocks[rec.Block]) {
			return fmt.Errorf("%w: block of page %s", errDiffers, where())
		}
		off := m.base[rec.Block] + int64(rec.Page)*int64(m.pageSize)
		n := off / int64(m.pageSize)
		if !m.seen.has(n) {
			return fmt.Errorf("%w: page %s was never saved", errDiffers, where())
		}
		if seen.add(n) {
			return fmt.Errorf("%w: page %s comes twice", errDiffers, where())
		}
		if rec.Kind == ramparse.XBZRLE {
			return fmt.Errorf("%w: page %s is a difference to nothing", errDiffers, where())
		}
		pages++
		got, err := m.content(rec, off)
		if err != nil {
			return err
		}
		if _, err := m.file.ReadAt(m.old, off); err != nil {
			return err
		}
		if !bytes.Equal(got, m.old) {
			return fmt.Errorf("%w: page %s", errDiffers, where())
		}
		return nil
	}))
	if err != nil {
		return err
	}
	// None that was not saved, and none twice, so the number tells.
	if pages != m.pages {
		return fmt.Errorf("%w: %d pages, %d were saved", errDiffers, pages, m.pages)
	}
	var sum [32]byte
	rest.Sum(sum[:0])
	if sum != m.rest {
		return fmt.Errorf("%w outside of RAM: BLAKE3 %x, %x was saved", errDiffers, sum[:8], m.rest[:8])
	}
	return nil
}
