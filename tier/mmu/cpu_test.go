package mmu

import (
	"encoding/binary"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"

	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/stream"
)

// device makes a section for a tail and its description.
type device struct {
	name     string
	instance uint32
	fields   []field
}

type field struct {
	name  string
	size  int
	array []uint64
}

func num(name string, v uint64) field { return field{name, 8, []uint64{v}} }

// makeTail is a device tail of these devices and what it is parsed into.
func makeTail(t testing.TB, devices ...device) ([]byte, *stream.Tail) {
	t.Helper()
	var tail []byte
	var desc []string
	for i, d := range devices {
		tail = append(tail, 4)
		tail = binary.BigEndian.AppendUint32(tail, uint32(i))
		tail = append(tail, byte(len(d.name)))
		tail = append(tail, d.name...)
		tail = binary.BigEndian.AppendUint32(tail, d.instance)
		tail = binary.BigEndian.AppendUint32(tail, 1)
		var fields []string
		for _, f := range d.fields {
			for _, v := range f.array {
				var b [8]byte
				binary.BigEndian.PutUint64(b[:], v)
				tail = append(tail, b[8-f.size:]...)
			}
			fields = append(fields, fmt.Sprintf(`{"name": %q, "size": %d, "array_len": %d}`, f.name, f.size, len(f.array)))
		}
		tail = stream.AppendFooter(tail, uint32(i))
		desc = append(desc, fmt.Sprintf(`{"name": %q, "instance_id": %d, "fields": [%s]}`, d.name, d.instance, strings.Join(fields, ",")))
	}
	tail = stream.AppendEOF(tail)
	tail = stream.AppendDescription(tail, []byte(`{"page_size": 4096, "devices": [`+strings.Join(desc, ",")+`]}`))
	p, err := stream.ParseTail(tail)
	if err != nil {
		t.Fatal(err)
	}
	return tail, &p
}

func x86CPU(n uint32, cr0, cr3, cr4, efer uint64) device {
	return device{"cpu", n, []field{{"env.regs", 8, make([]uint64, 16)}, num("env.cr[0]", cr0), num("env.cr[2]", 7),
		num("env.cr[3]", cr3), num("env.cr[4]", cr4), num("env.efer", efer)}}
}

func armCPU(n uint32, pstate uint64, regs map[uint64]uint64) device {
	index, value := field{"cpreg_vmstate_indexes", 8, []uint64{1, 2, 3}}, field{"cpreg_vmstate_values", 8, []uint64{4, 5, 6}}
	for k, v := range regs {
		index.array, value.array = append(index.array, k), append(value.array, v)
	}
	return device{"cpu", n, []field{{"env.regs", 4, make([]uint64, 16)}, {"cpsr", 4, []uint64{pstate}}, index, value}}
}

const on86 = cr0PG | 1

func TestSpacesX86(t *testing.T) {
	tail, p := makeTail(t,
		device{"timer", 0, []field{num("x", 1)}},
		x86CPU(0, on86, 0x8000_0000_0123_4abc, cr4PAE, eferLMA),
		x86CPU(1, 1, 0x777000, 0, 0), // not started
		x86CPU(2, on86, 0x2000, cr4PAE|cr4LA57, eferLMA))
	got, err := Spaces(tail, p)
	want := []Space{
		{CPU: 0, Root: 0x1234000, Levels: 4, Granule: 12, TopBits: 9},
		{CPU: 2, Root: 0x2000, Levels: 5, Granule: 12, TopBits: 9},
	}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestSpacesArm(t *testing.T) {
	// As Linux sets them: 48 bits, 4 KiB below and above; ASID in TTBR0.
	tail, p := makeTail(t, armCPU(0, 0x3c5, map[uint64]uint64{
		sctlrEL1: 0x34d5d91d, ttbr0EL1: 0x00ab_0000_4123_4000, ttbr1EL1: 0x4a2b_0001,
		tcrEL1: 16 | 16<<16 | 2<<30,
	}), armCPU(1, 0x3c5, map[uint64]uint64{sctlrEL1: 0x34d5d91c}))
	got, err := Spaces(tail, p)
	want := []Space{
		{Root: 0x4a2b_0000, Levels: 4, Granule: 12, TopBits: 9, Base: 0xffff_0000_0000_0000, arm: true},
		{Root: 0x4123_4000, Levels: 4, Granule: 12, TopBits: 9, arm: true},
	}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, %v", got, err)
	}
	// 16 KiB above with 47 bits, 64 KiB below with 42.
	tail, p = makeTail(t, armCPU(0, 5, map[uint64]uint64{
		sctlrEL1: 1, ttbr0EL1: 0x5000_0000, ttbr1EL1: 0x6000_0000, tcrEL1: 22 | 1<<14 | 17<<16 | 1<<30,
	}))
	got, err = Spaces(tail, p)
	want = []Space{
		{Root: 0x6000_0000, Levels: 3, Granule: 14, TopBits: 11, Base: 0xffff_8000_0000_0000, arm: true},
		{Root: 0x5000_0000, Levels: 2, Granule: 16, TopBits: 13, arm: true},
	}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, %v", got, err)
	}
	// Walks switched off by EPD0 and EPD1; reserved granules; no address bits.
	for _, tcr := range []uint64{1<<7 | 1<<23, 3<<14 | 16 | 16<<16, 63 | 63<<16 | 2<<30, 0} {
		tail, p = makeTail(t, armCPU(0, 5, map[uint64]uint64{sctlrEL1: 1, tcrEL1: tcr}))
		if got, err = Spaces(tail, p); err != nil || len(got) != 0 {
			t.Errorf("TCR %#x: %+v, %v", tcr, got, err)
		}
	}
}

// What is left out says so.
func TestSpacesUnsupported(t *testing.T) {
	for want, devices := range map[string][]device{
		"vCPU 0 uses PAE page tables":            {x86CPU(0, on86, 0, cr4PAE, 0)},
		"vCPU 3 uses 32-bit page tables":         {x86CPU(0, 1, 0, 0, 0), x86CPU(3, on86, 0, 0, 0)},
		"vCPU 0 runs 32-bit code":                {armCPU(0, 0x1d3, map[uint64]uint64{sctlrEL1: 1})},
		"vCPU 0 is no aarch64 one":               {armCPU(0, 5, nil)},
		"vCPU 0 is of no known architecture":     {{"cpu", 0, []field{num("env.satp", 1)}}},
		"no vCPU's state was found":              {{"timer", 0, []field{num("x", 1)}}},
		"vCPU 0 has no register env.cr[0]":       {{"cpu", 0, []field{num("env.cr[3]", 1)}}},
		"vCPU 0 has no register env.cr[4]":       {{"cpu", 0, []field{num("env.cr[0]", 1), num("env.cr[3]", 1), {"env.cr[4]", 2, []uint64{1}}}}},
		"vCPU 0 has no list of system registers": {{"cpu", 0, []field{num("cpsr", 5), num("cpreg_vmstate_indexes", 1)}}},
		"vCPU 0 has no register cpsr":            {{"cpu", 0, []field{num("cpreg_vmstate_indexes", 1), num("cpreg_vmstate_values", 1)}}},
		"vCPU 1 has no list of system registers": {armCPU(0, 5, map[uint64]uint64{sctlrEL1: 0}), {"cpu", 1, []field{num("cpreg_vmstate_indexes", 1), {"cpreg_vmstate_values", 8, []uint64{1, 2}}}}},
		"the stream has no vmdescription":        nil,
	} {
		tail, p := []byte{0}, new(stream.Tail)
		if devices != nil {
			tail, p = makeTail(t, devices...)
		}
		got, err := Spaces(tail, p)
		if !errors.Is(err, ErrUnsupported) || !strings.HasSuffix(err.Error(), ": "+want) || got != nil {
			t.Errorf("%+v, %v; want %s", got, err, want)
		}
	}
	// A QEMU for 32-bit guests only has no EFER.
	tail, p := makeTail(t, device{"cpu", 0, []field{{"env.cr[0]", 4, []uint64{on86}}, {"env.cr[3]", 4, []uint64{1}}, {"env.cr[4]", 4, []uint64{0}}}})
	if _, err := Spaces(tail, p); err == nil || !strings.Contains(err.Error(), "32-bit page tables") {
		t.Error(err)
	}
}

// cmos is a PC's RTC with memory sizes as pc_cmos_init writes them.
func cmos(low, high uint64) device {
	var b [cmosSize]uint64
	put := func(at int, v uint64, n int) {
		for i := range n {
			b[at+i] = v >> (8 * i) & 0xff
		}
	}
	if low > 1<<20 {
		put(cmosFrom1, min((low-1<<20)>>10, 0xffff), 2)
	}
	if low > 16<<20 {
		put(cmosFrom16, min((low-16<<20)>>16, 0xffff), 2)
	}
	put(cmosHigh, high>>16, 3)
	return device{"mc146818rtc", 0, []field{{"cmos_data", 1, b[:]}, {"cmos_index", 1, []uint64{0}}}}
}

func TestLayout(t *testing.T) {
	const mib, gib = 1 << 20, 1 << 30
	vga := ramparse.Block{Name: "vga.vram", Used: 16 * mib}
	for name, test := range map[string]struct {
		machine string
		blocks  []ramparse.Block
		rtc     device
		want    Layout
	}{
		"small":            {"pc-q35-7.2", []ramparse.Block{vga, {Name: "pc.ram", Used: 128 * mib}}, cmos(128*mib, 0), Layout{{0, 128 * mib, 1, 0}}},
		"odd size":         {"pc-q35-7.2", []ramparse.Block{{Name: "m0", Used: 98312 << 10}, vga}, cmos(98312<<10, 0), Layout{{0, 98312 << 10, 0, 0}}},
		"16 MiB":           {"pc-i440fx-7.2", []ramparse.Block{{Name: "pc.ram", Used: 16 * mib}, {Name: "x", Used: 8 * mib}}, cmos(16*mib, 0), Layout{{0, 16 * mib, 0, 0}}},
		"4 MiB":            {"microvm", []ramparse.Block{{Name: "x", Used: 8 * mib}, {Name: "microvm.ram", Used: 4 * mib}}, cmos(4*mib, 0), Layout{{0, 4 * mib, 1, 0}}},
		"4 GiB, q35":       {"pc-q35-7.2", []ramparse.Block{{Name: "pc.ram", Used: 4 * gib}}, cmos(2*gib, 2*gib), Layout{{0, 2 * gib, 0, 0}, {4 * gib, 2 * gib, 0, 2 * gib}}},
		"4 GiB, i440fx":    {"pc-i440fx-7.2", []ramparse.Block{{Name: "pc.ram", Used: 4 * gib}}, cmos(3*gib, 1*gib), Layout{{0, 3 * gib, 0, 0}, {4 * gib, 1 * gib, 0, 3 * gib}}},
		"odd size, 5 GiB":  {"pc-i440fx-7.2", []ramparse.Block{{Name: "pc.ram", Used: 5*gib + 8192}}, cmos(3*gib, 2*gib+8192), Layout{{0, 3 * gib, 0, 0}, {4 * gib, 2*gib + 8192, 0, 3 * gib}}},
		"virt":             {"virt-7.2", []ramparse.Block{{Name: "virt.flash0", Used: 64 * mib}, {Name: "mach-virt.ram", Used: 48 * mib}}, device{}, Layout{{gib, 48 * mib, 1, 0}}},
		"virt, own name":   {"virt-7.2", []ramparse.Block{{Name: "virt.flash0", Used: 64 * mib}, vga, {Name: "m0", Used: 48 * mib}}, device{}, Layout{{gib, 48 * mib, 2, 0}}},
		"two blocks":       {"pc-q35-7.2", []ramparse.Block{{Name: "m0", Used: 64 * mib}, {Name: "m1", Used: 64 * mib}}, cmos(128*mib, 0), nil},
		"guest wrote CMOS": {"pc-q35-7.2", []ramparse.Block{{Name: "pc.ram", Used: 128 * mib}}, cmos(127*mib, 0), nil},
		"no RTC":           {"pc-q35-7.2", []ramparse.Block{{Name: "pc.ram", Used: 128 * mib}}, device{}, nil},
		"virt, no RAM":     {"virt-7.2", []ramparse.Block{{Name: "virt.flash0", Used: 64 * mib}}, device{}, nil},
	} {
		devices := []device{{"timer", 0, []field{num("x", 1)}}}
		if test.rtc.name != "" {
			devices = append(devices, test.rtc)
		}
		tail, p := makeTail(t, devices...)
		got, err := NewLayout(test.machine, test.blocks, tail, p)
		if !reflect.DeepEqual(got, test.want) || (err == nil) != (test.want != nil) || err != nil && !errors.Is(err, ErrUnsupported) {
			t.Errorf("%s: %+v, %v; want %+v", name, got, err, test.want)
		}
	}
}

func TestLayoutFind(t *testing.T) {
	l := Layout{{0, 0x3000, 2, 0}, {fourGiB, 0x1000, 2, 0x3000}}
	for _, test := range []struct {
		gpa, n, offset uint64
		ok             bool
	}{
		{0, 0x1000, 0, true}, {0x2000, 0x1000, 0x2000, true}, {0x2000, 0x1001, 0, false}, {0x3000, 1, 0, false},
		{fourGiB, 0x1000, 0x3000, true}, {fourGiB + 0xfff, 1, 0x3fff, true}, {fourGiB + 0x1000, 1, 0, false},
		{^uint64(0), 1, 0, false}, {0, ^uint64(0), 0, false},
	} {
		block, offset, ok := l.Find(test.gpa, test.n)
		if ok != test.ok || offset != test.offset || ok && block != 2 {
			t.Errorf("%#x+%#x: block %d, %#x, %v", test.gpa, test.n, block, offset, ok)
		}
	}
}

// Nothing that a tail says makes Spaces or NewLayout fail otherwise than with
// ErrUnsupported, or name memory that is not there.
func FuzzTail(f *testing.F) {
	tail, _ := makeTail(f, x86CPU(0, on86, 0x1000, cr4PAE, eferLMA), cmos(128<<20, 0))
	f.Add(tail, "pc-q35-7.2", uint64(128<<20))
	tail, _ = makeTail(f, armCPU(0, 5, map[uint64]uint64{sctlrEL1: 1, ttbr1EL1: 1 << 30, tcrEL1: 16 | 16<<16 | 2<<30}))
	f.Add(tail, "virt-7.2", uint64(48<<20))
	f.Fuzz(func(t *testing.T, tail []byte, machine string, used uint64) {
		p, err := stream.ParseTail(tail)
		if err != nil && p.Sections == nil {
			return
		}
		spaces, err := Spaces(tail, &p)
		if err != nil && !errors.Is(err, ErrUnsupported) {
			t.Fatal(err)
		}
		w := Walker{Read: func(uint64, []byte) (bool, error) { return false, nil }, Max: 1 << 14}
		if err := w.Walk(t.Context(), spaces); err != nil {
			t.Fatalf("%+v: %v", spaces, err)
		}
		l, err := NewLayout(machine, []ramparse.Block{{Name: "a", Used: used}, {Name: "mach-virt.ram", Used: used / 2}}, tail, &p)
		if err != nil && !errors.Is(err, ErrUnsupported) {
			t.Fatal(err)
		}
		for _, r := range l {
			if limit := []uint64{used, used / 2}[r.Block]; r.Offset > limit || r.Size > limit-r.Offset || r.GPA+r.Size < r.GPA {
				t.Fatalf("%+v of blocks of %d and %d bytes", l, used, used/2)
			}
		}
	})
}
