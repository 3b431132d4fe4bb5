package ramparse

import (
	"encoding/binary"
	"math/bits"

	"github.com/flic-migrate/flic-migrate/stream"
)

const op = "ram section"

// Options say what the rest of the stream has told about RAM.
type Options struct {
	PageSize     int  // target page size in bytes; 0: infer it
	IgnoreShared bool // x-ignore-shared is among the configuration's capabilities
	Mapped       bool // mapped-ram is
}

// A Decoder decodes the payloads of the RAM section. It lives as long as the
// stream: the current block is carried from section to section.
type Decoder struct {
	pageSize     int
	ignoreShared bool
	mapped       bool
	setup        *Setup
	index        map[string]int // block name to index
	block        int            // of the last page record; -1 before the first
	sizes        uint64         // OR of the blocks' used sizes
	ahead        lookedAhead    // in vain, for the page size
}

// NewDecoder returns a Decoder. A page size that is not a power of two from
// MinPageSize to MaxPageSize makes its Next return ErrUnknown.
func NewDecoder(o Options) *Decoder {
	return &Decoder{pageSize: o.PageSize, ignoreShared: o.IgnoreShared, mapped: o.Mapped, block: -1}
}

// Setup returns what the MemSize record said; nil before one was decoded.
func (d *Decoder) Setup() *Setup { return d.setup }

// PageSize returns the target page size in bytes, 0 as long as it is not
// known. It is known once a Page record was decoded, or a record with an
// address other than 0.
func (d *Decoder) PageSize() int { return d.pageSize }

func validPageSize(n int) bool {
	return n >= MinPageSize && n <= MaxPageSize && n&(n-1) == 0
}

// Next decodes the record at the cursor into rec and consumes it. The
// section's payload ends with a record of Kind EOS. On an error nothing is
// consumed, and rec's content is undefined.
func (d *Decoder) Next(c *stream.Cursor, rec *Record) error {
	b, err := c.Peek(8)
	if err != nil {
		return stream.Wrap(op, c.Offset(), err)
	}
	v := binary.BigEndian.Uint64(b)
	switch v & flagMask {
	case flagPage | flagContinue, flagZero | flagContinue, flagXBZRLE | flagContinue, flagCompress | flagContinue,
		flagPage, flagZero, flagXBZRLE, flagCompress:
		return d.nextPage(c, rec, v)
	case flagMemSize:
		return d.nextMemSize(c, rec, v)
	}
	// The rest have neither address nor body.
	*rec = Record{Offset: c.Offset()}
	switch v {
	case flagEOS:
		rec.Kind = EOS
	case flagFlush:
		rec.Kind = Flush
	case flagHook:
		rec.Kind = Hook
	default:
		return stream.Unknown(op, c.Offset(), "record %#x", v)
	}
	rec.Raw, _ = c.Next(8)
	return nil
}

// nextPage decodes the page record that begins with v.
func (d *Decoder) nextPage(c *stream.Cursor, rec *Record, v uint64) error {
	offset := c.Offset()
	h, err := d.pageHeader(c, 0, v, d.block)
	if err != nil {
		return err
	}
	size := d.pageSize
	block := &d.setup.Blocks[h.block]
	outside := h.addr >= block.Used || block.Used-h.addr < uint64(size)
	switch {
	case size != 0 && !validPageSize(size):
		return stream.Unknown(op, offset, "target page size %d", size)
	case outside:
		return stream.Damaged(op, offset, "page at %#x of block %q, which has %#x bytes", h.addr, block.Name, block.Used)
	case size == 0:
		if size, err = d.infer(c); err != nil {
			return err
		}
	case h.addr&uint64(size-1) != 0:
		// Either a damaged address or a flag above those known.
		return stream.Unknown(op, offset, "record %#x with pages of %d bytes", v, size)
	}

	*rec = Record{Kind: h.kind, Named: h.named, Block: h.block, Addr: h.addr, Offset: offset}
	if size != 0 {
		rec.Page = h.addr >> bits.TrailingZeros(uint(size))
	}
	head, body, err := d.body(c, h, size)
	if err != nil {
		return err
	}
	if rec.Raw, err = c.Next(head + body); err != nil {
		return stream.Wrap(op, offset, err)
	}
	if h.kind == Zero {
		rec.Fill = rec.Raw[head]
	} else {
		rec.Data = rec.Raw[head:]
	}
	d.block = h.block
	d.pageSize = size
	return nil
}

// header is the front of a page record: address, flags and block.
type header struct {
	kind  Kind
	named bool
	block int
	addr  uint64
	at    int // where the record begins, in bytes from the cursor
	len   int // of the header, bytes
}

// pageHeader reads the header of the page record that begins with v, at bytes
// from the cursor, without consuming it. block is the one CONTINUE means.
func (d *Decoder) pageHeader(c *stream.Cursor, at int, v uint64, block int) (header, error) {
	h := header{block: block, addr: v &^ flagMask, at: at, len: 8}
	switch v & flagMask &^ flagContinue {
	case flagPage:
		h.kind = Page
	case flagZero:
		h.kind = Zero
	case flagXBZRLE:
		h.kind = XBZRLE
	case flagCompress:
		h.kind = Compressed
	}
	offset := c.Offset() + int64(at)
	if d.setup == nil {
		return h, stream.Damaged(op, offset, "%v record before the blocks", h.kind)
	}
	if v&flagContinue != 0 {
		if block < 0 {
			return h, stream.Damaged(op, offset, "first page record has no block name")
		}
		return h, nil
	}
	b, err := c.Peek(at + 9)
	if err != nil {
		return h, stream.Wrap(op, offset, err)
	}
	h.len += 1 + int(b[at+8])
	if b, err = c.Peek(at + h.len); err != nil {
		return h, stream.Wrap(op, offset, err)
	}
	name := b[at+9 : at+h.len]
	i, ok := d.index[string(name)]
	if !ok {
		return h, stream.Damaged(op, offset, "unknown block %q", name)
	}
	h.block, h.named = i, true
	return h, nil
}

// body returns the lengths of a page record's head (everything before its
// data) and data. size is the page size, 0 if not known.
func (d *Decoder) body(c *stream.Cursor, h header, size int) (head, body int, err error) {
	offset := c.Offset() + int64(h.at)
	limit := size
	if limit == 0 {
		limit = MaxPageSize
	}
	switch h.kind {
	case Zero:
		return h.len, 1, nil
	case Page:
		return h.len, size, nil
	case XBZRLE:
		b, err := c.Peek(h.at + h.len + 3)
		if err != nil {
			return 0, 0, stream.Wrap(op, offset, err)
		}
		b = b[h.at+h.len:]
		if b[0] != xbzrleEncoding {
			return 0, 0, stream.Unknown(op, offset, "XBZRLE encoding %#x", b[0])
		}
		n := int(binary.BigEndian.Uint16(b[1:]))
		if n > limit {
			return 0, 0, stream.Damaged(op, offset, "XBZRLE data of %d bytes", n)
		}
		return h.len + 3, n, nil
	default: // Compressed
		b, err := c.Peek(h.at + h.len + 4)
		if err != nil {
			return 0, 0, stream.Wrap(op, offset, err)
		}
		n := binary.BigEndian.Uint32(b[h.at+h.len:])
		if n > uint32(compressBound(limit)) {
			return 0, 0, stream.Damaged(op, offset, "compressed page of %d bytes", n)
		}
		return h.len + 4, int(n), nil
	}
}

// nextMemSize decodes the list of blocks. It has no count and no end mark: it
// ends when the sizes add up.
func (d *Decoder) nextMemSize(c *stream.Cursor, rec *Record, v uint64) error {
	offset := c.Offset()
	damaged := func(format string, args ...any) error {
		return stream.Damaged("ram setup", offset, format, args...)
	}
	if d.setup != nil {
		return damaged("a second list of blocks")
	}
	if d.mapped {
		return stream.Unknown("ram setup", offset, "mapped-ram: the pages are not sent, but lie at fixed places in a file")
	}
	s := &Setup{Total: v &^ flagMask}
	if s.Total > MaxTotal {
		return damaged("%d bytes of RAM", s.Total)
	}
	at := 8 // bytes from the cursor
	peek := func(n int) ([]byte, error) {
		b, err := c.Peek(at + n)
		if err == stream.ErrTooLong {
			return nil, damaged("list of blocks is longer than %d bytes", stream.MaxPeek)
		} else if err != nil {
			return nil, stream.Wrap("ram setup", offset, err)
		}
		return b[at:], nil
	}
	index := make(map[string]int)
	var sum, sizes uint64
	for sum < s.Total {
		if len(s.Blocks) == MaxBlocks {
			return damaged("more than %d blocks", MaxBlocks)
		}
		b, err := peek(1)
		if err != nil {
			return err
		}
		n := int(b[0])
		if b, err = peek(1 + n + 8); err != nil {
			return err
		}
		block := Block{Name: string(b[1 : 1+n]), Used: binary.BigEndian.Uint64(b[1+n:])}
		at += 1 + n + 8
		if n == 0 {
			return damaged("block %d has no name", len(s.Blocks))
		}
		if _, ok := index[block.Name]; ok {
			return damaged("two blocks %q", block.Name)
		}
		if block.Used > s.Total-sum {
			return damaged("block %q makes more than the total of %d bytes", block.Name, s.Total)
		}
		sum += block.Used
		sizes |= block.Used
		if block.PageSize, err = d.blockPageSize(peek, sum == s.Total); err != nil {
			return err
		}
		if n := block.PageSize; n != 0 && (n < MinPageSize || n&(n-1) != 0 || n > MaxTotal) {
			return damaged("block %q has host pages of %#x bytes", block.Name, n)
		}
		if block.PageSize != 0 {
			at += 8
		}
		if d.ignoreShared {
			if b, err = peek(8); err != nil {
				return err
			}
			gpa := binary.BigEndian.Uint64(b)
			block.GPA = &gpa
			at += 8
		}
		index[block.Name] = len(s.Blocks)
		s.Blocks = append(s.Blocks, block)
	}
	*rec = Record{Kind: MemSize, Offset: offset}
	rec.Raw, _ = c.Next(at)
	d.setup, d.index, d.sizes = s, index, sizes
	return nil
}

// blockPageSize looks whether a block's optional host page size comes next,
// and returns it or 0. There is no mark for it. Between blocks a 00 where the
// next name's length would be tells, since a name is never empty. After the
// last block the next record tells, since a record has flags in its low bits
// and neither a page size nor a guest-physical address has.
func (d *Decoder) blockPageSize(peek func(int) ([]byte, error), last bool) (uint64, error) {
	gpa := 0
	if d.ignoreShared {
		gpa = 8
	}
	need := gpa + 1 // up to the next name's length or, if there is a page size, the first byte after it
	if last {
		need = gpa + 8
	}
	b, err := peek(need)
	if err != nil {
		return 0, err
	}
	if last && binary.BigEndian.Uint64(b[gpa:])&flagMask != 0 || !last && b[gpa] != 0 {
		return 0, nil
	}
	if b, err = peek(8); err != nil {
		return 0, err
	}
	return binary.BigEndian.Uint64(b), nil
}
