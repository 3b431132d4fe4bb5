package main

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
	"github.com/flic-migrate/flic-migrate/tier/coredump"
)

// A PC shows its firmware in the first MiB, where the RAM below is another one.
const (
	shadowFrom = 640 << 10
	shadowTo   = 1 << 20
)

// dumped is QEMU's own core file of a VM.
func dumped(t *testing.T, ctx context.Context, vm *qemutest.VM) *elf.File {
	t.Helper()
	name := filepath.Join(t.TempDir(), "qemu.core")
	ok(t, vm.QMP.Execute(ctx, "dump-guest-memory", map[string]any{"paging": false, "protocol": "file:" + name}, nil))
	return openCore(t, name)
}

func openCore(t *testing.T, name string) *elf.File {
	t.Helper()
	f, err := elf.Open(name)
	ok(t, err)
	t.Cleanup(func() { f.Close() })
	return f
}

// notesOf are the notes of a core file, by name and kind.
func notesOf(t *testing.T, f *elf.File) (notes map[string][]byte) {
	t.Helper()
	notes = make(map[string][]byte)
	for _, p := range f.Progs {
		if p.Type != elf.PT_NOTE {
			continue
		}
		b, err := io.ReadAll(p.Open())
		ok(t, err)
		for len(b) > 0 {
			u32 := func(i int) int { return int(f.ByteOrder.Uint32(b[4*i:])) }
			pad := func(n int) int { return (n + 3) &^ 3 }
			name, size := u32(0), u32(1)
			body := 12 + pad(name)
			key := fmt.Sprintf("%s %d", b[12:12+name-1], u32(2))
			notes[key] = append(notes[key], b[body:body+size]...)
			b = b[body+pad(size):]
		}
	}
	return notes
}

// physical reads guest-physical memory from a core file.
func physical(t *testing.T, f *elf.File, at uint64, n int) []byte {
	t.Helper()
	for _, p := range f.Progs {
		if p.Type == elf.PT_LOAD && at >= p.Paddr && at+uint64(n) <= p.Paddr+p.Memsz {
			b := make([]byte, n)
			_, err := p.ReadAt(b, int64(at-p.Paddr))
			ok(t, err)
			return b
		}
	}
	t.Fatalf("%#x is not in the core file", at)
	return nil
}

// A core file has the registers and the memory that QEMU's own has, and gdb reads them.
func TestMemoryELF(t *testing.T) {
	for name, c := range map[string]struct {
		config qemutest.Config
		notes  []string
		from   uint64
		size   int
	}{
		"q35":  {q35.linux("128M", "flic.fill=16"), []string{"CORE 1", "QEMU 0"}, shadowTo, 127 << 20},
		"virt": {virt.tiny(t, "64M", varied(1024), 60), []string{"CORE 1"}, 1 << 30, 64 << 20},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx, l := limit(t), newLab(t)
			c.config.CPUs = 2
			vm := qemutest.Start(t, c.config)
			vm.WaitFor(t, map[bool]string{true: `flic ready`, false: `tick 00000002\r`}[c.config.Guest == qemutest.Linux])
			l.checkpoint(t, vm, "--then", "pause")
			want := dumped(t, ctx, vm)
			file := filepath.Join(t.TempDir(), "ours.core")
			var rep coredump.Report
			ok(t, json.Unmarshal([]byte(l.run(t, "memory", "--format", "elf", "--json", "-o", file, "vm@1")), &rep))
			if rep.VCPUs != 2 || rep.Format != coredump.ELF {
				t.Errorf("%+v", rep)
			}
			got := openCore(t, file)
			if got.Machine != want.Machine || got.Type != elf.ET_CORE {
				t.Errorf("a file of type %v for %v, QEMU's for %v", got.Type, got.Machine, want.Machine)
			}
			theirs, ours := notesOf(t, want), notesOf(t, got)
			if name == "virt" {
				// QEMU's says at the end that another note has floating-point registers.
				for _, b := range [][]byte{theirs["CORE 1"], ours["CORE 1"]} {
					for ; len(b) >= 392; b = b[392:] {
						clear(b[384:392])
					}
				}
			}
			for _, note := range c.notes {
				if len(theirs[note]) == 0 || !bytes.Equal(theirs[note], ours[note]) {
					t.Errorf("note %s:\n%x, QEMU's\n%x", note, ours[note], theirs[note])
				}
			}
			if !bytes.Equal(physical(t, got, c.from, c.size), physical(t, want, c.from, c.size)) {
				t.Error("the memory is not what QEMU's file has")
			}
			if name == "q35" {
				if !bytes.Equal(physical(t, got, 0, shadowFrom), physical(t, want, 0, shadowFrom)) {
					t.Error("the lowest memory is not what QEMU's file has")
				}
				readByGDB(t, ctx, vm, file)
			}
		})
	}
}

// readByGDB compares what gdb finds in a core file with what QEMU says.
func readByGDB(t *testing.T, ctx context.Context, vm *qemutest.VM, file string) {
	t.Helper()
	out, err := exec.Command("gdb", "-batch", "-nx", "-ex", "core-file "+file, "-ex", "printf \"rip %lx\\n\", $rip", "-ex", "info threads", "-ex", "x/4xg 0x1000000").CombinedOutput()
	if err != nil {
		t.Fatalf("gdb: %v\n%s", err, out)
	}
	text, err := qmp.HumanMonitor(ctx, vm.QMP, "info registers")
	ok(t, err)
	rip := regexp.MustCompile(`RIP=0*([0-9a-f]+)`).FindStringSubmatch(text)
	if rip == nil || !strings.Contains(string(out), "rip "+rip[1]+"\n") {
		t.Errorf("gdb:\n%s\nQEMU: %v", out, rip)
	}
	b, err := vm.PhysicalMemory(ctx, 0x1000000, 16)
	ok(t, err)
	if word := fmt.Sprintf("0x%x:\t0x%016x\t0x%016x", 0x1000000, binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint64(b[8:])); !strings.Contains(string(out), word) {
		t.Errorf("gdb:\n%s\nand not %q", out, word)
	}
	if strings.Count(string(out), "LWP") < 2 {
		t.Errorf("gdb does not see two vCPUs:\n%s", out)
	}
}

// A raw file is what pmemsave writes, below the PCI hole and above 4 GiB.
func TestMemoryRaw(t *testing.T) {
	t.Parallel()
	ctx, l := limit(t), newLab(t)
	vm := qemutest.Start(t, q35.linux("3G", "flic.fill=64"))
	vm.WaitFor(t, `flic ready`)
	l.checkpoint(t, vm, "--then", "pause")
	file := filepath.Join(t.TempDir(), "raw")
	out := l.run(t, "memory", "-o", file, "vm")
	if !strings.Contains(out, "3.0 GiB of memory of vm@1; not in it: ") || !strings.Contains(out, "pc.bios") {
		t.Errorf("%q", out)
	}
	f, err := os.Open(file)
	ok(t, err)
	defer f.Close()
	fi, err := f.Stat()
	ok(t, err)
	// q35 has 2 GiB below the hole if it has more than 2.75.
	if fi.Size() != 5<<30 || fi.Mode().Perm() != 0o600 {
		t.Errorf("%d bytes, mode %v", fi.Size(), fi.Mode())
	}
	other := 0
	for _, r := range [][2]uint64{{0, shadowFrom}, {shadowTo, 256 << 20}, {2<<30 - 128<<20, 2 << 30}, {4 << 30, 4<<30 + 64<<20}, {5<<30 - 512<<20, 5 << 30}} {
		want, err := vm.PhysicalMemory(ctx, r[0], r[1]-r[0])
		ok(t, err)
		got := make([]byte, len(want))
		_, err = f.ReadAt(got, int64(r[0]))
		ok(t, err)
		if !bytes.Equal(got, want) {
			t.Errorf("from %#x on it is not what pmemsave writes", r[0])
		}
		if r[0] >= 4<<30 && len(bytes.Trim(want, "\x00")) > 0 {
			other++
		}
	}
	if other == 0 {
		t.Error("the guest has used nothing above 4 GiB, so that nothing is shown")
	}
	// Never over a file that is there.
	if out, err := exec.Command("flic-migrate", "memory", "--store", l.store, "-o", file, "vm").CombinedOutput(); err == nil || !strings.Contains(string(out), "file already exists") {
		t.Errorf("%v: %s", err, out)
	}
}
