package mmu

import (
	"encoding/binary"
	"math"
	"strings"

	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/stream"
)

// Range is guest-physical memory [GPA, GPA+Size), and which part of which RAM
// block it is.
type Range struct {
	GPA, Size uint64
	Block     int
	Offset    uint64
}

// Layout is where main memory is. Devices' memory and hotplugged memory are not
// in it.
type Layout []Range

// Find returns the block and the offset in it of n bytes of guest-physical
// memory. They must be within one range.
func (l Layout) Find(gpa, n uint64) (block int, offset uint64, ok bool) {
	for _, r := range l {
		if gpa >= r.GPA && gpa-r.GPA < r.Size && n <= r.Size-(gpa-r.GPA) {
			return r.Block, r.Offset + (gpa - r.GPA), true
		}
	}
	return 0, 0, false
}

const (
	fourGiB  = 4 << 30
	virtRAM  = 1 << 30 // hw/arm/virt.c, base_memmap
	cmosUnit = 64 << 10
)

// NewLayout finds out where main memory is. The stream gives RAM blocks no
// addresses, so that is what each kind of machine says. Errors wrap
// ErrUnsupported.
func NewLayout(machine string, blocks []ramparse.Block, tail []byte, t *stream.Tail) (Layout, error) {
	if strings.HasPrefix(machine, "virt-") {
		return virtLayout(blocks)
	}
	for i := range t.Sections {
		s := &t.Sections[i]
		if f, ok := s.Field("cmos_data"); ok && s.Name == "mc146818rtc" && f.Size*f.Count == cmosSize {
			return pcLayout(blocks, tail[f.Offset:f.Offset+cmosSize])
		}
	}
	return nil, unsupported("it is not known where machine type %q has its memory", machine)
}

// virtLayout is that of Arm's virt machine: all of the block, in one piece.
func virtLayout(blocks []ramparse.Block) (Layout, error) {
	main := -1
	for i, b := range blocks {
		// With a memory backend the block has the backend's name.
		if b.Name == "mach-virt.ram" {
			main = i
			break
		}
		if !strings.HasPrefix(b.Name, "virt.flash") && (main < 0 || b.Used > blocks[main].Used) {
			main = i
		}
	}
	if main < 0 {
		return nil, unsupported("no RAM block")
	}
	return Layout{{GPA: virtRAM, Size: min(blocks[main].Used, math.MaxInt64), Block: main}}, nil
}

// cmosSize and the places of memory sizes in CMOS, which is where QEMU tells
// the firmware of a PC or microvm about them (hw/i386/pc.c, pc_cmos_init):
// below 4 GiB from 16 MiB on, or from 1 MiB on, and above 4 GiB.
const (
	cmosSize   = 128
	cmosFrom1  = 0x30 // u16, KiB
	cmosFrom16 = 0x34 // u16, 64 KiB
	cmosHigh   = 0x5b // u24, 64 KiB
)

// pcLayout is that of a PC: the block begins at 0 and what does not fit below
// the PCI hole goes on at 4 GiB. The border depends on machine type and options,
// CMOS has it. A guest can write there; the block whose size is the sum
// confirms it.
func pcLayout(blocks []ramparse.Block, cmos []byte) (Layout, error) {
	le := binary.LittleEndian
	low := uint64(le.Uint16(cmos[cmosFrom16:]))*cmosUnit + 16<<20
	if low == 16<<20 {
		low = uint64(le.Uint16(cmos[cmosFrom1:]))<<10 + 1<<20
	}
	high := uint64(le.Uint32(cmos[cmosHigh:])&0xffffff) * cmosUnit
	for i, b := range blocks {
		// CMOS counts whole units.
		if b.Used < low+high || b.Used-low-high >= cmosUnit {
			continue
		}
		if high == 0 {
			return Layout{{GPA: 0, Size: b.Used, Block: i}}, nil
		}
		return Layout{{GPA: 0, Size: low, Block: i}, {GPA: fourGiB, Size: b.Used - low, Block: i, Offset: low}}, nil
	}
	return nil, unsupported("no RAM block is as large as the %d + %d MiB that the machine has", low>>20, high>>20)
}
