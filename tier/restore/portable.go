package restore

import (
	"bytes"
	"errors"
	"fmt"
	"slices"

	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/stream"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/skeleton"
)

// A stream of an old QEMU can have in it what a newer one no longer loads, and what
// even its own loads only with the right capabilities set. A portable restore puts
// what every QEMU loads in its place:
//
//	saved                                  refused              portable
//	COMPRESS_PAGE record                   9.1 on; before,      PAGE, the same page
//	                                       without compress
//	ZERO record, fill not 0                8.2 on               PAGE
//	COLO enable, command 8                 without COLO         left out
//	POSTCOPY_ADVISE of 16 bytes, command 3 without postcopy-ram left out, and with it the
//	                                                            page sizes in RAM's setup
//	block section, a disk's content        9.1 on               none: ErrNotPortable
//
// (migration/ram.c, ram_load_precopy, ram_handle_zero; migration/savevm.c,
// loadvm_process_command.) Records keep their place and their CONTINUE flag. Where
// nothing of the kind is in the stream it stays the one that was saved, byte for byte.

// ErrNotPortable: the stream has something in it that can't be put in another form.
var ErrNotPortable = errors.New("the checkpoint can't be restored in a portable form")

// BlockSection is the section that block migration (migrate with blk, HMP's -b) makes
// of a disk. QEMU 9.1 removed it.
const BlockSection = "block"

// Portable tells whether c can be restored in a portable form; the error wraps
// ErrNotPortable and says why not. A lazy restore is always portable.
func Portable(c *checkpoint.Checkpoint) error {
	switch m := c.Meta; {
	case m.OpaqueBytes > 0:
		return fmt.Errorf("%w: a part of its stream is kept without being understood", ErrNotPortable)
	case slices.Contains(m.Foreign, BlockSection):
		return fmt.Errorf("%w: its stream has the content of a disk (a %q section), which only QEMUs before 9.1 can load", ErrNotPortable, BlockSection)
	}
	return nil
}

// maxHead is where rewriting gives up to find the end of RAM's setup. The setup of
// 4096 blocks with long names takes 1 MiB, an early device section as much.
const maxHead = 8 << 20

// head rewrites what stands before RAM's first page and hands all else on.
type head struct {
	skeleton.Player
	c       *checkpoint.Checkpoint
	buf     []byte
	done    bool
	changed int64 // commands that are left out
}

// Literal implements skeleton.Player.
func (h *head) Literal(b []byte) error {
	if h.done {
		return h.Player.Literal(b)
	}
	if h.buf = append(h.buf, b...); len(h.buf) < maxHead {
		return nil
	}
	return h.end()
}

// Pages implements skeleton.Player.
func (h *head) Pages(block int, page, count uint64, named bool) error {
	if err := h.end(); err != nil {
		return err
	}
	return h.Player.Pages(block, page, count, named)
}

// end rewrites what has come, if that was not done.
func (h *head) end() error {
	if h.done {
		return nil
	}
	h.done = true
	b, err := h.rewrite()
	if err != nil {
		// When it was saved all of it was understood.
		return h.c.Image.Corrupt(image.Skeleton, 0, err)
	}
	h.buf = nil
	return h.Player.Literal(b)
}

// rewrite goes as far as RAM's setup: no command that matters stands behind it.
func (h *head) rewrite() (out []byte, err error) {
	cur := stream.NewCursor(bytes.NewReader(h.buf), len(h.buf))
	rd := stream.NewReader(cur)
	keep := func(b []byte) error { out = append(out, b...); return nil }
	advised := false
	for {
		f, err := rd.Next()
		if err != nil {
			return nil, err
		}
		switch f.Kind {
		case stream.CommandFrame:
			switch c := f.Command; {
			case c.Number == stream.CommandPostcopyAdvise && len(c.Payload) > 0:
				advised = true
				fallthrough
			case c.Number == stream.CommandEnableColo:
				h.changed++
				continue
			}
		case stream.SectionStart:
			if f.Section.Name == ramparse.SectionName {
				out = append(out, f.Raw...)
				if out, err = h.setup(cur, out, advised); err != nil {
					return nil, err
				}
				return append(out, h.buf[cur.Offset():]...), nil
			}
			out = append(out, f.Raw...)
			if err := rd.CopyForeign(keep); err != nil {
				return nil, err
			}
			continue
		case stream.SectionFull, stream.EOF: // no RAM
			return append(out, h.buf[f.Offset:]...), nil
		}
		out = append(out, f.Raw...)
	}
}

// setup rewrites the payload of RAM's START.
func (h *head) setup(cur *stream.Cursor, out []byte, advised bool) ([]byte, error) {
	dec := ramparse.NewDecoder(ramparse.Options{PageSize: h.c.Meta.PageSize, IgnoreShared: h.c.Meta.IgnoreShared})
	var rec ramparse.Record
	for rec.Kind != ramparse.EOS {
		if err := dec.Next(cur, &rec); err != nil {
			return nil, err
		}
		if rec.Kind != ramparse.MemSize || !advised {
			out = append(out, rec.Raw...)
			continue
		}
		// Only after the advice does a destination read page sizes
		// (migration/ram.c, parse_ramblock).
		s := ramparse.Setup{Total: dec.Setup().Total, Blocks: slices.Clone(dec.Setup().Blocks)}
		for i := range s.Blocks {
			s.Blocks[i].PageSize = 0
		}
		out = ramparse.AppendSetup(out, &s)
	}
	return out, nil
}
