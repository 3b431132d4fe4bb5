// Package coredump writes the guest memory of a checkpoint as tools for the memory of
// crashed machines read it: raw, or as an ELF core file with the vCPUs' registers.
//
//	device tail ──► mmu.Layout: address ─► block ─┐
//	            └─► registers ──► notes           ├─► file
//	page map ─► resolver ─► page by page ─────────┘
//
// Nothing is written for pages of zeros: they are holes, where the file system has some.
package coredump

import (
	"context"
	"fmt"
	"time"

	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/stream"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/mmu"
	"github.com/flic-migrate/flic-migrate/tier/pagemap"
	"github.com/flic-migrate/flic-migrate/tier/progress"
	"github.com/flic-migrate/flic-migrate/tier/source"
)

// Format is what is written.
type Format string

const (
	// Raw has each byte at its guest-physical address; what is no main memory reads as
	// zero. It is what QEMU's pmemsave writes.
	Raw Format = "raw"
	// ELF is a core file as QEMU's dump-guest-memory writes it, without paging: a
	// segment for each range of main memory, in which virtual and physical addresses are
	// the guest-physical one, and the registers of each vCPU in notes.
	ELF Format = "elf"
)

// Report says what was written. JSON field names are the command line's.
type Report struct {
	Format Format `json:"format"`
	Bytes  int64  `json:"bytes"`  // length of the file, holes included
	Memory int64  `json:"memory"` // bytes of main memory in it
	VCPUs  int    `json:"vcpus"`  // whose registers are in it
	// LeftOut are the RAM blocks that are no main memory, or whose address is not
	// known: those of devices, and hotplugged memory.
	LeftOut []string `json:"left_out"`
	Seconds float64  `json:"seconds"`
}

// File is what is written to: a file, empty and without holes filled.
type File interface {
	WriteAt(b []byte, off int64) (int, error)
	Truncate(size int64) error
}

// Options of a Write.
type Options struct {
	Format   Format
	Progress func(progress.State)
}

// chunkBytes are written at once.
const chunkBytes = 1 << 20

// Write writes the guest's memory into f, which the caller makes durable. Each page is
// checked as at a restore. Errors wrap mmu.ErrUnsupported if it can't be told where the
// guest has its memory, or what its registers are.
func Write(ctx context.Context, c *checkpoint.Checkpoint, f File, o Options) (*Report, error) {
	begin := time.Now()
	tail, err := c.DeviceTail()
	if err != nil {
		return nil, err
	}
	t, err := stream.ParseTail(tail)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", mmu.ErrUnsupported, err)
	}
	layout, err := mmu.NewLayout(c.Meta.Machine, c.Meta.Blocks, tail, &t)
	if err != nil {
		return nil, err
	}
	w := &writer{c: c, f: f, o: o, rep: &Report{Format: o.Format}}
	var head []byte
	switch o.Format {
	case Raw:
		for _, r := range layout {
			w.add(r, int64(r.GPA))
		}
	case ELF:
		cpus, machine, err := registers(tail, &t)
		if err != nil {
			return nil, err
		}
		w.rep.VCPUs = len(cpus)
		head = header(machine, cpus, layout)
		at := int64(len(head))
		for _, r := range layout {
			w.add(r, at)
			at += int64(r.Size)
		}
	default:
		return nil, fmt.Errorf("coredump: no format %q", o.Format)
	}
	w.leftOut(c.Meta.Blocks, layout)
	if err := f.Truncate(w.rep.Bytes); err != nil {
		return nil, err
	}
	if len(head) > 0 {
		if _, err := f.WriteAt(head, 0); err != nil {
			return nil, err
		}
	}
	if err := w.pages(ctx); err != nil {
		return nil, err
	}
	w.rep.Seconds = time.Since(begin).Seconds()
	return w.rep, nil
}

// piece is a range of main memory and where it is in the file.
type piece struct {
	mmu.Range
	at int64
}

// writer is one Write.
type writer struct {
	c      *checkpoint.Checkpoint
	f      File
	o      Options
	rep    *Report
	pieces []piece

	// buf is what is to be written at off.
	buf  []byte
	off  int64
	done int64
	tick time.Time
}

func (w *writer) add(r mmu.Range, at int64) {
	w.pieces = append(w.pieces, piece{r, at})
	w.rep.Memory += int64(r.Size)
	w.rep.Bytes = max(w.rep.Bytes, at+int64(r.Size))
}

func (w *writer) leftOut(blocks []ramparse.Block, layout mmu.Layout) {
	w.rep.LeftOut = []string{}
	main := make(map[int]bool)
	for _, r := range layout {
		main[r.Block] = true
	}
	for i, b := range blocks {
		if !main[i] {
			w.rep.LeftOut = append(w.rep.LeftOut, b.Name)
		}
	}
}

// pages writes all pages of main memory, in the order of the page map.
func (w *writer) pages(ctx context.Context) error {
	rd := w.c.InOrder()
	defer rd.Close()
	size := uint64(w.c.Meta.PageSize)
	err := w.c.PageMap.Runs(func(r pagemap.Run) error {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		w.progress(int64(r.Count))
		for _, p := range w.pieces {
			part, ok := clip(r, p.Range, size)
			if !ok {
				continue
			}
			at := p.at + int64(part.Page*size-p.Offset)
			err := rd.Read(ctx, part, func(i, n uint64, c source.Content) error {
				return w.page(at+int64(i*size), n, c)
			})
			if err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return w.flush()
}

// clip is what of a run is in a range of main memory. Ranges begin and end with pages.
func clip(r pagemap.Run, in mmu.Range, size uint64) (pagemap.Run, bool) {
	if r.Block != in.Block {
		return r, false
	}
	first, end := in.Offset/size, (in.Offset+in.Size)/size
	if r.Page < first {
		if first-r.Page >= r.Count {
			return r, false
		}
		r = r.From(first - r.Page)
	}
	if r.Page >= end {
		return r, false
	}
	r.Count = min(r.Count, end-r.Page)
	return r, true
}

// page writes n pages that are alike.
func (w *writer) page(at int64, n uint64, c source.Content) error {
	if c.Zero() {
		return nil
	}
	size := w.c.Meta.PageSize
	for range n {
		if at != w.off+int64(len(w.buf)) || len(w.buf)+size > chunkBytes {
			if err := w.flush(); err != nil {
				return err
			}
			w.off = at
		}
		if w.buf == nil {
			w.buf = make([]byte, 0, chunkBytes)
		}
		w.buf = w.buf[:len(w.buf)+size]
		if err := c.Copy(w.buf[len(w.buf)-size:]); err != nil {
			return fmt.Errorf("%s: %w", w.c.Image.Name(), err)
		}
		at += int64(size)
	}
	return nil
}

func (w *writer) flush() error {
	if len(w.buf) == 0 {
		return nil
	}
	_, err := w.f.WriteAt(w.buf, w.off)
	w.buf = w.buf[:0]
	return err
}

func (w *writer) progress(pages int64) {
	w.done += pages
	if now := time.Now(); w.o.Progress != nil && now.Sub(w.tick) >= progress.Every {
		w.tick = now
		w.o.Progress(progress.State{Phase: "memory", Pages: w.done, BytesOut: w.off})
	}
}
