package pagetable

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// On disk a table is a row of chunks, each decodable on its own:
//
//	uvarint  block     of the first run
//	uvarint  page      of the first run
//	then runs, following one another in block and page order:
//	  u8       kind | 0x80 if the values count up by one from page to page
//	  uvarint  count
//	  varint   first value − the value that would follow the last run of the
//	           same kind in this chunk (0 before the first); absent for
//	           kinds without a value (Absent, ZeroData)
//
// A run never crosses the end of a block. The chunks together cover every page
// once, in order.

const stepFlag = 0x80

func (k Kind) hasValue() bool { return k != Absent && k != ZeroData }

// Encode calls emit with chunk after chunk, each at most limit bytes long
// (limit ≥ 64). The slice is emit's only until it returns.
func (t *Table) Encode(limit int, emit func([]byte) error) error {
	const maxRun = 1 + 2*binary.MaxVarintLen64
	var buf []byte
	var next [numKinds]uint64
	err := t.Runs(func(r Run) error {
		if len(buf) > 0 && len(buf)+maxRun > limit {
			if err := emit(buf); err != nil {
				return err
			}
			buf = buf[:0]
		}
		if len(buf) == 0 {
			buf = binary.AppendUvarint(buf, uint64(r.Block))
			buf = binary.AppendUvarint(buf, r.Page)
			next = [numKinds]uint64{}
		}
		tag := byte(r.Kind)
		if r.Step == 1 {
			tag |= stepFlag
		}
		buf = append(buf, tag)
		buf = binary.AppendUvarint(buf, r.Count)
		if r.Kind.hasValue() {
			buf = binary.AppendVarint(buf, int64(r.First-next[r.Kind]))
			next[r.Kind] = r.First + r.Step*r.Count
		}
		return nil
	})
	if err == nil && len(buf) > 0 {
		err = emit(buf)
	}
	return err
}

// Decoder reads the runs of a table's chunks in order and checks that they
// cover every page of the blocks exactly once.
type Decoder struct {
	pages []uint64
	block int
	page  uint64 // next page expected in block
}

// NewDecoder returns a decoder for blocks with the given numbers of pages.
func NewDecoder(pages []uint64) *Decoder {
	d := &Decoder{pages: pages}
	d.skipEmpty()
	return d
}

func (d *Decoder) skipEmpty() {
	for d.block < len(d.pages) && d.page == d.pages[d.block] {
		d.block, d.page = d.block+1, 0
	}
}

var errShort = errors.New("ends inside a run")

// Chunk decodes the next chunk and calls fn for each of its runs.
func (d *Decoder) Chunk(b []byte, fn func(Run) error) error {
	block, n := binary.Uvarint(b)
	if n <= 0 {
		return errShort
	}
	b = b[n:]
	page, n := binary.Uvarint(b)
	if n <= 0 {
		return errShort
	}
	b = b[n:]
	if block != uint64(d.block) || page != d.page {
		return fmt.Errorf("starts at block %d page %d instead of block %d page %d", block, page, d.block, d.page)
	}
	var next [numKinds]uint64
	for len(b) > 0 {
		r := Run{Block: d.block, Page: d.page, Kind: Kind(b[0] &^ stepFlag), Step: uint64(b[0] >> 7)}
		if r.Kind >= numKinds || r.Step == 1 && !r.Kind.hasSlots() {
			return fmt.Errorf("unknown run tag %#x", b[0])
		}
		b = b[1:]
		if r.Count, n = binary.Uvarint(b); n <= 0 {
			return errShort
		}
		b = b[n:]
		if d.block >= len(d.pages) || r.Count == 0 || r.Count > d.pages[d.block]-d.page {
			return fmt.Errorf("run of %d pages at block %d page %d leaves its block", r.Count, d.block, d.page)
		}
		if r.Kind.hasValue() {
			delta, n := binary.Varint(b)
			if n <= 0 {
				return errShort
			}
			b = b[n:]
			r.First = next[r.Kind] + uint64(delta)
			last, ok := checkedAdd(r.First, r.Step*(r.Count-1))
			if !ok || last > MaxValue || r.Kind == Fill && r.First > 0xff {
				return fmt.Errorf("run of %v with value %d", r.Kind, r.First)
			}
			next[r.Kind] = r.First + r.Step*r.Count
		}
		if err := fn(r); err != nil {
			return err
		}
		d.page += r.Count
		d.skipEmpty()
	}
	return nil
}

// Done returns an error unless the chunks so far covered every page.
func (d *Decoder) Done() error {
	if d.block < len(d.pages) {
		return fmt.Errorf("page table ends at block %d page %d", d.block, d.page)
	}
	return nil
}
