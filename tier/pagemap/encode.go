package pagemap

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// On disk a page map is a row of chunks, each decodable on its own:
//
//	uvarint  block     of the first run
//	uvarint  page      of the first run
//	then runs, following one another in block and page order:
//	  u8       tag: kind in bits 0–5; 0x40: a value follows; 0x80: it counts up by
//	           one from page to page (only with 0x40)
//	  uvarint  count
//	  varint   with 0x40: first value − the value that would follow the last run of
//	           the same kind in this chunk (0 before the first)
//
// So a reader that does not know a kind still knows which pages it is about. A run
// never crosses the end of a block. The chunks together cover every page once, in
// order.

const (
	kindBits  = 0x3f
	valueFlag = 0x40
	stepFlag  = 0x80
)

// Start is the first page that a chunk covers. The list of all chunks' Starts
// is kept beside them (in META), so that a lazy restore finds a page by
// decoding one chunk, however large the map is.
type Start struct {
	Block int    `json:"b"`
	Page  uint64 `json:"p"`
}

// Encode calls emit with chunk after chunk, each at most limit bytes long
// (limit ≥ 64), and where it starts. The slice is emit's only until it returns.
func (t *Builder) Encode(limit int, emit func(at Start, chunk []byte) error) error {
	return Encode(t.Runs, limit, emit)
}

// Encode is Builder.Encode of a map that is nowhere as a whole: runs calls its argument
// with every run, Absent ones included, in block and page order.
func Encode(runs func(func(Run) error) error, limit int, emit func(at Start, chunk []byte) error) error {
	const maxRun = 1 + 2*binary.MaxVarintLen64
	var buf []byte
	var at Start
	var next [numKinds]uint64
	err := runs(func(r Run) error {
		if len(buf) > 0 && len(buf)+maxRun > limit {
			if err := emit(at, buf); err != nil {
				return err
			}
			buf = buf[:0]
		}
		if len(buf) == 0 {
			at = Start{r.Block, r.Page}
			buf = binary.AppendUvarint(buf, uint64(r.Block))
			buf = binary.AppendUvarint(buf, r.Page)
			next = [numKinds]uint64{}
		}
		tag := byte(r.Kind)
		if r.Kind.hasValue() {
			tag |= valueFlag
		}
		if r.Step == 1 {
			tag |= stepFlag
		}
		buf = append(buf, tag)
		buf = binary.AppendUvarint(buf, r.Count)
		if tag&valueFlag != 0 {
			buf = binary.AppendVarint(buf, int64(r.First-next[r.Kind]))
			next[r.Kind] = r.First + r.Step*r.Count
		}
		return nil
	})
	if err == nil && len(buf) > 0 {
		err = emit(at, buf)
	}
	return err
}

var errShort = errors.New("ends inside a run")

// decode decodes a chunk that must cover the pages from start up to end and
// calls fn for each of its runs.
func decode(b []byte, pages []uint64, start, end Start, fn func(Run) error) error {
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
	if block != uint64(start.Block) || page != start.Page {
		return fmt.Errorf("starts at block %d page %d instead of %v", block, page, start)
	}
	at := start
	var next [numKinds]uint64
	for len(b) > 0 {
		tag := b[0]
		r := Run{Block: at.Block, Page: at.Page, Kind: Kind(tag & kindBits), Step: uint64(tag >> 7)}
		value := tag&valueFlag != 0
		if r.Step == 1 && !value || r.Kind.known() && (value != r.Kind.hasValue() || r.Step == 1 && !r.Kind.hasSlots()) {
			return fmt.Errorf("run tag %#x can't be", tag)
		}
		b = b[1:]
		if r.Count, n = binary.Uvarint(b); n <= 0 {
			return errShort
		}
		b = b[n:]
		if at.Block >= len(pages) || r.Count == 0 || r.Count > pages[at.Block]-at.Page {
			return fmt.Errorf("run of %d pages at %v leaves its block", r.Count, at)
		}
		if value {
			delta, n := binary.Varint(b)
			if n <= 0 {
				return errShort
			}
			b = b[n:]
			r.First = next[r.Kind] + uint64(delta)
			// No overflow: Step is at most 1 and Count at most MaxPages.
			if r.First > MaxValue || r.First+r.Step*(r.Count-1) > MaxValue || r.Kind == Fill && r.First > 0xff {
				return fmt.Errorf("run of %v with value %d", r.Kind, r.First)
			}
			next[r.Kind] = r.First + r.Step*r.Count
		}
		if err := fn(r); err != nil {
			return err
		}
		at.Page += r.Count
		at = at.normal(pages)
	}
	if at != end {
		return fmt.Errorf("ends at %v instead of %v", at, end)
	}
	return nil
}

// normal moves a Start behind the end of its block to the next block with
// pages.
func (s Start) normal(pages []uint64) Start {
	for s.Block < len(pages) && s.Page == pages[s.Block] {
		s = Start{s.Block + 1, 0}
	}
	return s
}

func (s Start) String() string { return fmt.Sprintf("block %d page %d", s.Block, s.Page) }
