package coredump

import (
	"debug/elf"
	"encoding/binary"

	"github.com/flic-migrate/flic-migrate/tier/mmu"
)

// machineID is the architecture of a core file.
type machineID = elf.Machine

const (
	amd64 = elf.EM_X86_64
	arm64 = elf.EM_AARCH64
)

const (
	elfHeaderLen  = 64
	elfProgramLen = 56
	// loadAlign is what the memory begins at in the file, so that the pages of both are
	// pages, and holes are holes.
	loadAlign = 64 << 10

	noteStatus = 1 // NT_PRSTATUS
	// Of Linux's elf_prstatus: where the process number and the registers are, and what
	// follows these.
	statusPID  = 32
	statusRegs = 112
	statusRest = 8
)

// header is a core file up to its memory, which follows in the order of the layout.
func header(machine machineID, cpus []vcpu, layout mmu.Layout) []byte {
	notes := notes(cpus)
	programs := uint64(1 + len(layout))
	notesAt := elfHeaderLen + programs*elfProgramLen
	memoryAt := (notesAt + uint64(len(notes)) + loadAlign - 1) &^ (loadAlign - 1)

	le := binary.LittleEndian
	b := append([]byte(elf.ELFMAG), byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT))
	b = append(b, make([]byte, elf.EI_NIDENT-len(b))...)
	b = le.AppendUint16(b, uint16(elf.ET_CORE))
	b = le.AppendUint16(b, uint16(machine))
	b = le.AppendUint32(b, uint32(elf.EV_CURRENT))
	b = le.AppendUint64(b, 0) // entry
	b = le.AppendUint64(b, elfHeaderLen)
	b = le.AppendUint64(b, 0) // sections
	b = le.AppendUint32(b, 0) // flags
	for _, v := range []uint16{elfHeaderLen, elfProgramLen, uint16(programs), 0, 0, 0} {
		b = le.AppendUint16(b, v)
	}
	program := func(kind elf.ProgType, at, address, size uint64) {
		b = le.AppendUint32(b, uint32(kind))
		b = le.AppendUint32(b, 0) // flags
		for _, v := range []uint64{at, address, address, size, size, 0} {
			b = le.AppendUint64(b, v)
		}
	}
	program(elf.PT_NOTE, notesAt, 0, uint64(len(notes)))
	at := memoryAt
	for _, r := range layout {
		program(elf.PT_LOAD, at, r.GPA, r.Size)
		at += r.Size
	}
	b = append(b, notes...)
	return append(b, make([]byte, memoryAt-uint64(len(b)))...)
}

// notes are first the registers of all vCPUs as of processes, and then as QEMU adds them.
func notes(cpus []vcpu) (b []byte) {
	for _, c := range cpus {
		s := make([]byte, statusRegs, statusRegs+8*len(c.regs)+statusRest)
		binary.LittleEndian.PutUint32(s[statusPID:], c.id+1) // none is process 0
		for _, v := range c.regs {
			s = binary.LittleEndian.AppendUint64(s, v)
		}
		b = note(b, "CORE", noteStatus, s[:len(s)+statusRest])
	}
	for _, c := range cpus {
		if c.qemu != nil {
			b = note(b, "QEMU", 0, c.qemu)
		}
	}
	return b
}

// note appends one; its name ends in a zero, and both parts have multiples of 4 bytes.
func note(b []byte, name string, kind uint32, body []byte) []byte {
	le := binary.LittleEndian
	b = le.AppendUint32(b, uint32(len(name)+1))
	b = le.AppendUint32(b, uint32(len(body)))
	b = le.AppendUint32(b, kind)
	for _, part := range [][]byte{append([]byte(name), 0), body} {
		b = append(b, part...)
		for len(b)%4 != 0 {
			b = append(b, 0)
		}
	}
	return b
}
