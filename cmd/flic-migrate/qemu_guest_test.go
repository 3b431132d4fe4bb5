package main

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest/guestmem"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
)

// The main promise: a Linux guest is saved and goes on in another QEMU, from
// flash alone and from both tiers, on every machine type.
func TestLinuxGuests(t *testing.T) {
	for _, m := range []machine{q35, pc, virt} {
		t.Run(m.name, func(t *testing.T) {
			t.Parallel()
			ctx, l := limit(t), newLab(t)
			c := m.linux("112M", "flic.fill=24 flic.dirty=20")
			source := qemutest.Start(t, c)
			source.WaitFor(t, `flic ready`)
			source.WaitFor(t, `tick 3\r`)
			set(t, source, fast)

			// Below 1 MiB a PC's guest sees ROM and video memory in place of
			// its RAM.
			const from = 1 << 20
			physical := func(vm *qemutest.VM) []byte {
				b, err := vm.PhysicalMemory(ctx, m.base+from, 112<<20-from)
				ok(t, err)
				return b
			}
			again := func(name string) {
				before, seen := stop(t, ctx, source), physical(source)
				flags := []string{}
				if name == "vm@2" {
					flags = l.hot(t, source)
				}
				saved(t, ctx, source, l.save(flags...))
				tick := lastTick(t, source.Console(), 10)

				vm := restored(t, ctx, c, l.restore(name), before)
				defer vm.Kill()
				if !bytes.Equal(seen, physical(vm)) {
					t.Error("pmemsave differs, which reads what the guest sees")
				}
				goesOn(t, ctx, vm, tick, 10)
				checks(t, vm)
				// The counter and the sums must be the guest's own work, not
				// what was restored.
				if answer := vm.Ask(t, "fill 9"); answer != "9" {
					t.Errorf("fill: %s", answer)
				}
				checks(t, vm)
			}
			again("vm@1")
			ok(t, qmp.Cont(ctx, source.QMP))
			runsOn(t, source)
			again("vm@2")

			l.holds(t, "vm@1", "vm@2")
			cold, both := l.show(t, "vm@1"), l.show(t, "vm@2")
			if cold.Report.Hot != 0 || cold.Report.Cold < 4000 {
				t.Errorf("without a working set: %d hot, %d cold pages", cold.Report.Hot, cold.Report.Cold)
			}
			if r := both.Report; r.Hot < 2000 || r.Parent != "vm@1" || r.Unchanged < 2000 || r.Cold > 2000 {
				t.Errorf("with a working set and a parent %q: %d hot, %d cold, %d unchanged pages", r.Parent, r.Hot, r.Cold, r.Unchanged)
			}
			// The kernel's tables are much the same in both saves.
			for _, c := range []*checkpoint.Report{&cold.Report, &both.Report} {
				late := strings.Contains(c.NoPageTables, "could be read in") // a busy host
				if !late && (c.PageTables < 25 || c.PageTables > 400 || c.NoPageTables != "") {
					t.Errorf("%d guest page tables found %s", c.PageTables, c.NoPageTables)
				}
			}
			if cold.RunState != "paused" || cold.OpaqueBytes != 0 || cold.Report.Resent != 0 {
				t.Errorf("saved as %s, %d bytes not understood, %d pages sent again", cold.RunState, cold.OpaqueBytes, cold.Report.Resent)
			}
		})
	}
}

// A guest lives through many restores: each cycle saves what the last one
// restored, alternately with both tiers and with flash alone.
func TestChainOfRestores(t *testing.T) {
	t.Parallel()
	ctx, l := limit(t), newLab(t)
	c := q35.linux("104M", "flic.fill=16 flic.dirty=40")
	vm := qemutest.Start(t, c)
	vm.WaitFor(t, `flic ready`)
	for cycle := 1; cycle <= 3; cycle++ {
		vm.WaitFor(t, `tick \d+\r`)
		before := stop(t, ctx, vm)
		set(t, vm, fast)
		var flags []string
		if cycle%2 == 1 {
			flags = l.hot(t, vm)
		}
		saved(t, ctx, vm, l.save(flags...))
		tick := lastTick(t, vm.Console(), 10)
		vm.Kill()
		vm = restored(t, ctx, c, l.restore("vm"), before)
		goesOn(t, ctx, vm, tick, 10)
		checks(t, vm)
	}
	l.holds(t, "vm@1", "vm@2", "vm@3")
}

// Two processors and a disk: the guest has read one file from it before the save
// and reads the other one after the restore. Both must be in its page cache then,
// with the disk's content.
func TestTwoProcessorsAndDisk(t *testing.T) {
	t.Parallel()
	ctx, l := limit(t), newLab(t)
	files := filepath.Join(l.dir, "files")
	content := make(map[string][]byte)
	for i, name := range []string{"before", "after"} {
		b := make([]byte, 3<<20)
		rand.NewChaCha8([32]byte{byte(i + 1)}).Read(b)
		content[name] = b
		ok(t, os.MkdirAll(filepath.Join(files, name), 0o755))
		ok(t, os.WriteFile(filepath.Join(files, name, "file"), b, 0o644))
	}
	disk := filepath.Join(l.dir, "disk")
	if out, err := exec.Command("/sbin/mkfs.ext4", "-q", "-d", files, disk, "16M").CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v\n%s", err, out)
	}
	c := q35.linux("112M", "flic.fill=8 flic.dirty=20 flic.read=/before")
	c.CPUs, c.Disk = 2, disk

	source := qemutest.Start(t, c)
	source.WaitFor(t, fmt.Sprintf(`flic read %d\r`, 3<<20))
	source.WaitFor(t, `flic ready`)
	source.WaitFor(t, `tick 2\r`)
	set(t, source, fast)
	before := stop(t, ctx, source)
	saved(t, ctx, source, l.save(l.hot(t, source)...))
	tick := lastTick(t, source.Console(), 10)
	source.Kill()

	vm := restored(t, ctx, c, l.restore("vm@1"), before)
	goesOn(t, ctx, vm, tick, 10)
	checks(t, vm)
	if answer := vm.Ask(t, "read after"); answer != fmt.Sprint(3<<20) {
		t.Errorf("read from the disk: %s", answer)
	}
	checks(t, vm)
	after := stop(t, ctx, vm)
	for _, test := range []struct {
		file string
		ram  []byte
		want int
	}{
		{"before", before[q35.ram], 768}, {"after", before[q35.ram], 0},
		{"before", after[q35.ram], 768}, {"after", after[q35.ram], 768},
	} {
		if n := cached(test.ram, content[test.file]); n != test.want {
			t.Errorf("%d pages of %s are in the page cache, want %d", n, test.file, test.want)
		}
	}
	l.holds(t, "vm@1")
}

// cached counts the pages of a file that are anywhere in RAM.
func cached(ram, file []byte) (n int) {
	have := make(map[string]bool)
	for at := 0; at+guestmem.PageSize <= len(ram); at += guestmem.PageSize {
		have[string(ram[at:at+guestmem.PageSize])] = true
	}
	for at := 0; at < len(file); at += guestmem.PageSize {
		if have[string(file[at:at+guestmem.PageSize])] {
			n++
		}
	}
	return n
}
