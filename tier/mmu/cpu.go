package mmu

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/flic-migrate/flic-migrate/stream"
)

// ErrUnsupported is wrapped by errors that say why page tables, or memory at all, can't
// be found.
var ErrUnsupported = errors.New("the guest can't be looked into")

func unsupported(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrUnsupported, fmt.Sprintf(format, args...))
}

// maxSpaces caps the vCPUs that are looked at: QEMU's own limits are below.
const maxSpaces = 4096

// Spaces reads the vCPUs' registers from a device tail as stream.ParseTail has
// taken it apart. vCPUs whose paging is off have no space. Errors wrap
// ErrUnsupported.
func Spaces(tail []byte, t *stream.Tail) ([]Space, error) {
	if t.Sections == nil {
		return nil, unsupported("the stream has no vmdescription")
	}
	var spaces []Space
	cpus := 0
	for i := range t.Sections {
		sec := &t.Sections[i]
		if sec.Name != "cpu" {
			continue
		}
		if cpus++; cpus > maxSpaces {
			return nil, unsupported("more than %d vCPUs", maxSpaces)
		}
		c := cpu{tail, sec}
		var err error
		if _, ok := sec.Field("env.cr[3]"); ok {
			spaces, err = c.x86(spaces)
		} else if _, ok := sec.Field("cpreg_vmstate_indexes"); ok {
			spaces, err = c.arm(spaces)
		} else {
			err = unsupported("vCPU %d is of no known architecture", sec.Instance)
		}
		if err != nil {
			return nil, err
		}
	}
	if cpus == 0 {
		return nil, unsupported("no vCPU's state was found")
	}
	return spaces, nil
}

// cpu is a vCPU's section.
type cpu struct {
	tail []byte
	sec  *stream.TailSection
}

// number reads a field that is one number, big-endian as all are.
func (c cpu) number(name string) (uint64, error) {
	f, ok := c.sec.Field(name)
	if ok && f.Count == 1 {
		switch b := c.tail[f.Offset:]; f.Size {
		case 4:
			return uint64(binary.BigEndian.Uint32(b)), nil
		case 8:
			return binary.BigEndian.Uint64(b), nil
		}
	}
	return 0, unsupported("vCPU %d has no register %s", c.sec.Instance, name)
}

// x86 control register bits (Intel SDM vol. 3, 2.5).
const (
	cr0PG   = 1 << 31
	cr4PAE  = 1 << 5
	cr4LA57 = 1 << 12
	eferLMA = 1 << 10
)

// x86 reads the registers of target/i386/machine.c's vmstate_x86_cpu.
func (c cpu) x86(spaces []Space) ([]Space, error) {
	var r [4]uint64
	for i, name := range []string{"env.cr[0]", "env.cr[3]", "env.cr[4]", "env.efer"} {
		var err error
		// A QEMU without long mode has no EFER.
		if r[i], err = c.number(name); err != nil && name != "env.efer" {
			return nil, err
		}
	}
	cr0, cr3, cr4, efer := r[0], r[1], r[2], r[3]
	switch {
	case cr0&cr0PG == 0:
		return spaces, nil
	case efer&eferLMA == 0 && cr4&cr4PAE != 0:
		return nil, unsupported("vCPU %d uses PAE page tables", c.sec.Instance)
	case efer&eferLMA == 0:
		return nil, unsupported("vCPU %d uses 32-bit page tables", c.sec.Instance)
	}
	levels := 4
	if cr4&cr4LA57 != 0 {
		levels = 5
	}
	return append(spaces, Space{CPU: c.sec.Instance, Root: cr3 & (1<<52 - 1) &^ (1<<12 - 1), Levels: levels, Granule: 12, TopBits: 9}), nil
}

// Register numbers as KVM has them (Documentation/virt/kvm/api.rst,
// KVM_REG_ARM64 | size 64 | KVM_REG_ARM64_SYSREG), which QEMU stores with TCG
// as well (target/arm/kvm-consts.h).
const (
	sctlrEL1 = 0x6030_0000_0013_c080
	ttbr0EL1 = 0x6030_0000_0013_c100
	ttbr1EL1 = 0x6030_0000_0013_c101
	tcrEL1   = 0x6030_0000_0013_c102
)

// arm reads the registers of target/arm/machine.c's vmstate_arm_cpu: the system
// registers are two lists of equal length, numbers and values.
func (c cpu) arm(spaces []Space) ([]Space, error) {
	index, _ := c.sec.Field("cpreg_vmstate_indexes")
	value, ok := c.sec.Field("cpreg_vmstate_values")
	if !ok || index.Size != 8 || value.Size != 8 || index.Count != value.Count {
		return nil, unsupported("vCPU %d has no list of system registers", c.sec.Instance)
	}
	pstate, err := c.number("cpsr")
	if err != nil {
		return nil, err
	}
	if pstate&(1<<4) != 0 { // nRW
		return nil, unsupported("vCPU %d runs 32-bit code", c.sec.Instance)
	}
	regs := make(map[uint64]uint64)
	for i := range index.Count {
		regs[binary.BigEndian.Uint64(c.tail[index.Offset+8*i:])] = binary.BigEndian.Uint64(c.tail[value.Offset+8*i:])
	}
	sctlr, ok := regs[sctlrEL1]
	if !ok {
		return nil, unsupported("vCPU %d is no aarch64 one", c.sec.Instance)
	}
	if sctlr&1 == 0 { // M
		return spaces, nil
	}
	tcr := regs[tcrEL1]
	// Arm ARM D17.2.131: TxSZ, EPDx and the granules, whose encodings differ.
	lower := armHalf{regs[ttbr0EL1], tcr & 63, tcr>>7&1 != 0, [4]int{12, 16, 14, 0}[tcr>>14&3], 0}
	upper := armHalf{regs[ttbr1EL1], tcr >> 16 & 63, tcr>>23&1 != 0, [4]int{0, 14, 12, 16}[tcr>>30&3], ^uint64(0)}
	for _, h := range []armHalf{upper, lower} {
		if s, ok := h.space(c.sec.Instance); ok {
			spaces = append(spaces, s)
		}
	}
	return spaces, nil
}

// armHalf is one half of an address space: a TTBR and its part of TCR.
type armHalf struct {
	ttbr    uint64
	tsz     uint64
	off     bool
	granule int // 0: reserved
	base    uint64
}

// space computes the number of levels and the size of the top table from the
// size of the half (Arm ARM D8.2.6).
func (h armHalf) space(cpu uint32) (Space, bool) {
	va := 64 - int(h.tsz)
	if h.off || h.granule == 0 || va < h.granule+1 || va > 52 {
		return Space{}, false
	}
	index := h.granule - 3
	levels := (va - h.granule + index - 1) / index
	s := Space{
		CPU: cpu, Levels: levels, Granule: h.granule, TopBits: va - h.granule - (levels-1)*index,
		arm: true,
	}
	if h.base != 0 {
		s.Base = h.base << va
	}
	// The top table is aligned to its size; what is below are other fields,
	// and above bit 47 the ASID.
	s.Root = h.ttbr & (1<<48 - 1) &^ (8<<s.TopBits - 1)
	return s, true
}
