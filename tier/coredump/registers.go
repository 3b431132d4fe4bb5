package coredump

import (
	"encoding/binary"
	"fmt"

	"github.com/flic-migrate/flic-migrate/stream"
	"github.com/flic-migrate/flic-migrate/tier/mmu"
)

// maxCPUs caps the vCPUs that are looked at: QEMU's own limits are below.
const maxCPUs = 4096

// vcpu is what a core file says of a vCPU.
type vcpu struct {
	id   uint32
	regs []uint64 // in the order of Linux's user_regs_struct for the architecture
	qemu []byte   // QEMU's own note: control and segment registers; nil on aarch64
}

// registers reads those of all vCPUs. Errors wrap mmu.ErrUnsupported.
func registers(tail []byte, t *stream.Tail) (cpus []vcpu, machine machineID, err error) {
	for i := range t.Sections {
		sec := &t.Sections[i]
		if sec.Name != "cpu" {
			continue
		}
		if len(cpus) == maxCPUs {
			return nil, 0, fmt.Errorf("%w: more than %d vCPUs", mmu.ErrUnsupported, maxCPUs)
		}
		s := state{tail: tail, sec: sec}
		var c vcpu
		kind := amd64
		if _, ok := sec.Field("env.xregs"); ok {
			kind, c = arm64, s.arm64()
		} else {
			c = s.amd64()
		}
		if s.missing != "" {
			return nil, 0, fmt.Errorf("%w: vCPU %d has no register %s of x86-64 or aarch64 in the checkpoint; --format raw needs none",
				mmu.ErrUnsupported, sec.Instance, s.missing)
		}
		if machine != 0 && machine != kind {
			return nil, 0, fmt.Errorf("%w: vCPUs of two architectures", mmu.ErrUnsupported)
		}
		machine = kind
		c.id = sec.Instance
		cpus = append(cpus, c)
	}
	if len(cpus) == 0 {
		return nil, 0, fmt.Errorf("%w: no vCPU's registers were found; --format raw needs none", mmu.ErrUnsupported)
	}
	return cpus, machine, nil
}

// state is a vCPU's section, whose fields are big-endian.
type state struct {
	tail    []byte
	sec     *stream.TailSection
	missing string // the first field that was asked for and is not there
}

// field is the bytes of a field, zeros if it is not there with this size and count.
func (s *state) field(name string, size, count int) []byte {
	f, ok := s.sec.Field(name)
	if !ok || f.Size != size || f.Count != count {
		if s.missing == "" {
			s.missing = name
		}
		return make([]byte, size*count)
	}
	return s.tail[f.Offset : f.Offset+size*count]
}

func (s *state) u64(name string) uint64 { return binary.BigEndian.Uint64(s.field(name, 8, 1)) }

// list is a field of 8-byte registers.
func (s *state) list(name string, count int) []uint64 {
	b := s.field(name, 8, count)
	list := make([]uint64, count)
	for i := range list {
		list[i] = binary.BigEndian.Uint64(b[8*i:])
	}
	return list
}

// segment is a segment register as vmstate_segment of target/i386/machine.c has it.
type segment struct {
	selector uint32
	base     uint64
	limit    uint32
	flags    uint32
}

const segmentLen = 20

func (s *state) segments(name string, count int) []segment {
	b := s.field(name, segmentLen, count)
	be := binary.BigEndian
	list := make([]segment, count)
	for i := range list {
		v := b[segmentLen*i:]
		list[i] = segment{be.Uint32(v), be.Uint64(v[4:]), be.Uint32(v[12:]), be.Uint32(v[16:])}
	}
	return list
}

// The numbers of registers in env.regs and env.segs (target/i386/cpu.h).
const (
	rax = iota
	rcx
	rdx
	rbx
	rsp
	rbp
	rsi
	rdi
)
const (
	es = iota
	cs
	ss
	ds
	fs
	gs
)

// amd64 reads vmstate_x86_cpu.
func (s *state) amd64() vcpu {
	r, seg := s.list("env.regs", 16), s.segments("env.segs", 6)
	rip, flags := s.u64("env.eip"), s.u64("env.eflags")
	c := vcpu{regs: []uint64{
		r[15], r[14], r[13], r[12], r[rbp], r[rbx], r[11], r[10], r[9], r[8],
		r[rax], r[rcx], r[rdx], r[rsi], r[rdi], 0, // of a system call
		rip, uint64(seg[cs].selector), flags, r[rsp], uint64(seg[ss].selector), seg[fs].base, seg[gs].base,
		uint64(seg[ds].selector), uint64(seg[es].selector), uint64(seg[fs].selector), uint64(seg[gs].selector),
	}}
	// QEMUCPUState of target/i386/arch_dump.c, which crash and others look for to find
	// the kernel's page tables.
	le := binary.LittleEndian
	q := le.AppendUint32(nil, 1) // version
	q = le.AppendUint32(q, qemuNoteLen)
	for _, v := range append([]uint64{r[rax], r[rbx], r[rcx], r[rdx], r[rsi], r[rdi], r[rsp], r[rbp]}, r[8:]...) {
		q = le.AppendUint64(q, v)
	}
	q = le.AppendUint64(le.AppendUint64(q, rip), flags)
	others := []segment{seg[cs], seg[ds], seg[es], seg[fs], seg[gs], seg[ss]}
	for _, name := range []string{"env.ldt", "env.tr", "env.gdt", "env.idt"} {
		others = append(others, s.segments(name, 1)...)
	}
	for _, g := range others {
		for _, v := range []uint32{g.selector, g.limit, g.flags, 0} {
			q = le.AppendUint32(q, v)
		}
		q = le.AppendUint64(q, g.base)
	}
	for _, v := range []uint64{s.u64("env.cr[0]"), 0, s.u64("env.cr[2]"), s.u64("env.cr[3]"), s.u64("env.cr[4]"), s.u64("env.kernelgsbase")} {
		q = le.AppendUint64(q, v)
	}
	c.qemu = q
	return c
}

// qemuNoteLen is 8 of version and size, 18 registers, 10 segments, 5 control registers
// and the kernel's GS.
const qemuNoteLen = 8 + 18*8 + 10*24 + 6*8

// arm64 reads vmstate_arm_cpu: in 64-bit state cpsr is PSTATE.
func (s *state) arm64() vcpu {
	pstate := uint64(binary.BigEndian.Uint32(s.field("cpsr", 4, 1)))
	if pstate&(1<<4) != 0 && s.missing == "" { // nRW
		s.missing = "pstate"
	}
	return vcpu{regs: append(s.list("env.xregs", 32), s.u64("env.pc"), pstate)}
}
