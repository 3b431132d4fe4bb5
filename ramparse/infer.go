package ramparse

import (
	"encoding/binary"

	"github.com/flic-migrate/flic-migrate/stream"
)

// The page size matters where a Page record ends and what an address means as
// an index. If the stream does not say it, the Decoder looks ahead over the
// records that can be delimited without it, to the first that gives it away:
//
//   - Page: of the sizes in candidates the first after which a record follows
//     that makes sense;
//   - Compressed: what it decompresses to.
//
// Zero pages alone give only hints. All addresses and block sizes are multiples
// of the page size, and in a run in order the steps are the page size. A page
// at address 0 has index 0 with any size, so the decision can wait until
// another address comes.
//
// While it waits, the look-ahead goes on where it has stopped before, so that each byte
// is looked at once however many such records come.
//
// The look-ahead stays within the RAM section. It goes over a section's end
// only if footer and type byte say that the next is a part of RAM too, so the
// most of the device tail that it can see is the first type byte.

// candidates are the page sizes of QEMU's targets, the commonest first.
var candidates = [...]int{4096, 8192, 16384, 65536, 2048, 1024}

const (
	// inferWindow bounds the look-ahead: 7000 zero pages.
	inferWindow = 64 << 10
	// steadySteps is how many equal steps between zero pages make a page size
	// other than 4096 credible. Saves out of order can have a few by chance.
	steadySteps = 8
	// plausibleRecords is how many records after a page are looked at, as long
	// as they are small ones.
	plausibleRecords = 8
)

// lookedAhead is how far a look-ahead has come over records of address 0 alone.
type lookedAhead struct {
	offset int64  // in the stream, where it goes on; 0: nothing was looked at
	block  int    // that CONTINUE means there
	prev   header // of the page record before it
}

// infer returns the page size, or 0 if the record at the cursor is a zero page
// at address 0 and nothing better is known. A Page record gets a size or an
// error.
func (d *Decoder) infer(c *stream.Cursor) (int, error) {
	var (
		ahead  = lookedAhead{offset: c.Offset(), block: d.block}
		mask   = d.sizes // OR of everything that is a multiple of the page size
		seen   bool      // an address other than 0
		step   uint64
		steady int
	)
	if d.ahead.offset > ahead.offset {
		ahead = d.ahead // what it passed over changes neither mask nor step
	}
	block, prev := ahead.block, ahead.prev
	at := int(ahead.offset - c.Offset())
scan:
	for at < inferWindow {
		b, err := c.Peek(at + 8)
		if err != nil {
			break
		}
		v := binary.BigEndian.Uint64(b[at:])
		switch v {
		case flagFlush, flagHook:
			at += 8
			continue
		case flagEOS:
			n := nextPart(c, at+8)
			if n == 0 {
				break scan
			}
			at += 8 + n
			continue
		}
		if !isPage(v) {
			break
		}
		h, err := d.pageHeader(c, at, v, block)
		if err != nil {
			break
		}
		if h.addr >= d.setup.Blocks[h.block].Used {
			break
		}
		mask |= h.addr
		seen = seen || h.addr != 0
		switch h.kind {
		case Page:
			size, err := d.inferPage(c, h, mask)
			if err != nil && at > 0 {
				break scan // its turn will come
			}
			return size, err
		case Zero:
			switch s := h.addr - prev.addr; {
			case prev.kind != Zero || h.block != prev.block || h.addr <= prev.addr:
			case s == step:
				steady++
			default:
				step, steady = s, 1
			}
		}
		head, body, err := d.body(c, h, 0)
		if err != nil {
			break
		}
		if h.kind == Compressed {
			if size := inferCompressed(c, at+head, body); size != 0 {
				return size, nil
			}
		}
		block, prev = h.block, h
		at += head + body
	}
	if !seen {
		d.ahead = lookedAhead{c.Offset() + int64(at), block, prev}
		return 0, nil
	}
	if steady >= steadySteps && step > 4096 && step&(step-1) == 0 && step <= MaxPageSize && mask&(step-1) == 0 {
		return int(step), nil
	}
	for _, size := range candidates {
		// Larger sizes than 4096 are multiples of it and would not come up here.
		if mask&uint64(size-1) == 0 {
			return size, nil
		}
	}
	return 0, stream.Unknown(op, c.Offset(), "no page size fits the addresses")
}

// inferPage finds the length of the Page record with header h.
func (d *Decoder) inferPage(c *stream.Cursor, h header, mask uint64) (int, error) {
	used := d.setup.Blocks[h.block].Used
	var short error
	for _, size := range candidates {
		if mask&uint64(size-1) != 0 || used-h.addr < uint64(size) {
			continue
		}
		ok, err := d.plausible(c, h.at+h.len+size, size, h.block)
		if ok {
			return size, nil
		}
		if short == nil {
			short = err
		}
	}
	// An input that ends within the smallest page is cut, not unknown.
	if short != nil {
		return 0, stream.Wrap(op, c.Offset(), short)
	}
	return 0, stream.Unknown(op, c.Offset(), "no page size fits the first page")
}

// plausible says whether a record begins at bytes from the cursor. The error
// is the cursor's if it has not got that far.
func (d *Decoder) plausible(c *stream.Cursor, at, size, block int) (bool, error) {
	for range plausibleRecords {
		b, err := c.Peek(at + 8)
		if err != nil {
			return false, err
		}
		v := binary.BigEndian.Uint64(b[at:])
		switch v {
		case flagFlush, flagHook:
			at += 8
			continue
		case flagEOS:
			b, err := c.Peek(at + 9)
			// A footer, or without footers any type up to a command.
			return err == nil && (b[at+8] == 0x7e || b[at+8] <= 0x08), err
		}
		if !isPage(v) {
			return false, nil
		}
		h, err := d.pageHeader(c, at, v, block)
		if err != nil {
			return false, nil
		}
		used := d.setup.Blocks[h.block].Used
		if h.addr&uint64(size-1) != 0 || h.addr >= used || used-h.addr < uint64(size) {
			return false, nil
		}
		if h.kind != Zero {
			return true, nil
		}
		at += h.len + 1
		block = h.block
	}
	return true, nil
}

// inferCompressed returns the length of the page that the n bytes of zlib
// stream, at bytes from the cursor, decompress to; 0 if that is no page size.
func inferCompressed(c *stream.Cursor, at, n int) int {
	b, err := c.Peek(at + n)
	if err != nil {
		return 0
	}
	size, err := inflate(make([]byte, MaxPageSize), b[at:])
	if err != nil || !validPageSize(size) {
		return 0
	}
	return size
}

// nextPart returns the length of footer and header, at bytes from the cursor,
// if a section's footer and then a PART or END of the same section are there;
// otherwise 0.
func nextPart(c *stream.Cursor, at int) int {
	const footer, header = 5, 5
	b, err := c.Peek(at + footer + 1)
	if err != nil || b[at] != 0x7e || b[at+footer] != 0x02 && b[at+footer] != 0x03 {
		return 0
	}
	id := binary.BigEndian.Uint32(b[at+1:])
	if b, err = c.Peek(at + footer + header); err != nil || binary.BigEndian.Uint32(b[at+footer+1:]) != id {
		return 0
	}
	return footer + header
}

// isPage says whether v begins a page record.
func isPage(v uint64) bool {
	switch v & flagMask &^ flagContinue {
	case flagPage, flagZero, flagXBZRLE, flagCompress:
		return true
	}
	return false
}
