// Package mmu finds the pages that hold a guest's page tables, from a stopped
// guest's saved state and memory. FLIC (section III-B) counts them in the
// working set always: whatever a guest touches first, its MMU reads these
// before.
//
//	device tail, vmdescription                       RAM
//	cpu: CR3 or TTBR0/1, TCR  ──► Space: top table ──► table ──► table ──► page
//	mc146818rtc: memory sizes ──► Layout: address ──► RAM block and offset
//
// x86-64 with 4 and 5 levels and aarch64 with granules of 4, 16 and 64 KiB are
// known. With other vCPUs (32-bit, PAE, other architectures) and machines an error
// says why nothing is found. All of it comes from the guest or from a file, so none
// of it is believed: a walk visits each address once and ends after a given number
// of tables, and only places within RAM are named.
//
// Only what the vCPUs' registers lead to is found: the kernel's tables, and
// those of the processes that ran when the guest was stopped. The tables of
// processes that did not run are ordinary memory to anybody who does not know
// the guest's kernel, and so are the kernel's while Linux's page-table isolation
// has them switched off (a vCPU stopped in user mode).
package mmu

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
)

// Space is an address space of a vCPU, or the half of one that has a register
// of its own.
type Space struct {
	CPU    uint32 // number of the vCPU
	Root   uint64 // guest-physical address of the top table
	Levels int    // of tables, 1 to 5
	// Granule is the binary logarithm of a table's size in bytes, and of the
	// size of the pages that the lowest tables name.
	Granule int
	// TopBits is the binary logarithm of the top table's number of entries,
	// which on aarch64 can be fewer than the others have.
	TopBits int
	Base    uint64 // lowest virtual address
	arm     bool
}

// index is the number of address bits that a table other than the top one
// decides.
func (s *Space) index() int { return s.Granule - 3 }

// entry takes an entry of a table apart. Level 1 is the lowest. addr is the
// guest-physical address of the next table or of the page, of which leaf tells
// which it is.
func (s *Space) entry(e uint64, level int) (addr uint64, leaf, ok bool) {
	if e&1 == 0 {
		return 0, false, false
	}
	if s.arm {
		// Arm ARM D8.3: bit 1 tells tables from blocks, and is set in a page.
		table := e&2 != 0
		if level == 1 && !table {
			return 0, false, false
		}
		// Bits 47 up. With LPA2 and 64 KiB granules more bits of the address
		// are elsewhere in the entry, which no RAM of QEMU needs.
		return e & (1<<48 - 1) &^ (1<<s.Granule - 1), level == 1 || !table, true
	}
	// Intel SDM vol. 3, 4.5: bit 7 is the page size, in levels that can have
	// large pages.
	return e & (1<<52 - 1) &^ (1<<12 - 1), level == 1 || level <= 3 && e&(1<<7) != 0, true
}

// Walker says what to do at a walk.
type Walker struct {
	// Read reads a table, which does not cross a page of its granule's size.
	// It returns false if there is no RAM. Those of the lowest level, which are by far
	// most of them, are read for Leaf only.
	Read func(gpa uint64, buf []byte) (bool, error)
	// Table is called for each table once, those of the highest level first and those
	// of one level by address. size is in bytes. It is in RAM if it was read.
	Table func(gpa uint64, size int) error
	// Leaf is called for each page or block that a table names; may be nil. The
	// pages of a table that address spaces share are told once.
	Leaf func(va, pa, size uint64)
	// Max is how many tables are visited at most.
	Max int
}

// widest is how many bits a virtual address can have: with x86's five levels.
const widest = 57

// ErrTooMany: there are more tables than a guest can have use for, so what is
// found is not what was meant. What has been visited before may be.
var ErrTooMany = errors.New("too many page tables to be true")

// Walk visits the tables of all spaces.
func (w *Walker) Walk(ctx context.Context, spaces []Space) error {
	// By level: what is needed first comes first, and a table that is reached
	// on two levels (a table that names itself is a way to map all tables) is
	// taken for what it is on the higher one.
	v := walk{Walker: w, seen: make(map[uint64]bool)}
	for i := range spaces {
		s := &spaces[i]
		if s.Levels < 1 || s.Levels > 5 || s.Granule < 12 || s.Granule > 16 || s.TopBits < 0 || s.TopBits > s.index() ||
			s.Granule+(s.Levels-1)*s.index()+s.TopBits > widest {
			return fmt.Errorf("mmu: impossible address space %+v", *s)
		}
	}
	for level := 5; level >= 1; level-- {
		for i := range spaces {
			if s := &spaces[i]; s.Levels == level {
				if err := v.queue(table{s, s.Root, s.Base}); err != nil {
					return err
				}
			}
		}
		slices.SortFunc(v.next, func(a, b table) int { return cmp.Compare(a.gpa, b.gpa) })
		tables := v.next
		v.next = nil
		for _, t := range tables {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if err := v.table(t, level); err != nil {
				return err
			}
		}
	}
	return nil
}

// walk is one walk.
type walk struct {
	*Walker
	seen map[uint64]bool // tables by address, queued or visited
	next []table         // of the level below
	buf  [64 << 10]byte
}

type table struct {
	space *Space
	gpa   uint64
	va    uint64 // the first that the table decides
}

func (w *walk) queue(t table) error {
	if w.seen[t.gpa] {
		return nil
	}
	if len(w.seen) >= w.Max {
		return fmt.Errorf("mmu: %w: more than %d", ErrTooMany, w.Max)
	}
	w.seen[t.gpa] = true
	w.next = append(w.next, t)
	return nil
}

// table visits a table and queues those that it names.
func (w *walk) table(t table, level int) error {
	s := t.space
	b := w.buf[:1<<s.Granule]
	if level == s.Levels {
		b = b[:8<<s.TopBits]
	}
	if level == 1 && w.Leaf == nil {
		return w.Table(t.gpa, len(b))
	}
	ok, err := w.Read(t.gpa, b)
	if err != nil {
		return fmt.Errorf("mmu: table at %#x: %w", t.gpa, err)
	}
	if !ok {
		return nil
	}
	if err := w.Table(t.gpa, len(b)); err != nil {
		return err
	}
	shift := s.Granule + (level-1)*s.index()
	for i := 0; i < len(b); i += 8 {
		addr, leaf, ok := s.entry(binary.LittleEndian.Uint64(b[i:]), level)
		if !ok || leaf && w.Leaf == nil {
			continue
		}
		va := t.va | uint64(i/8)<<shift
		if !s.arm && level == s.Levels && i >= len(b)/2 {
			va |= ^uint64(0) << (shift + s.index()) // canonical form
		}
		if leaf {
			w.Leaf(va, addr&^(1<<shift-1), 1<<shift)
		} else if err := w.queue(table{s, addr, va}); err != nil {
			return err
		}
	}
	return nil
}
