package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/libvirt/saveimage"
	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest/guestmem"
)

// condition is a kind of machine that users have, with a Linux guest.
type condition struct {
	name   string
	memory string // -m
	kernel string // added to the kernel's command line
	// machine adds to c what the machine is made of. It is called for the source and,
	// with the same dir, which is empty at first, for each destination.
	machine func(t *testing.T, dir string, c *qemutest.Config)
	// begin brings a source that has just been started into the condition; nil: the
	// machine's arguments do.
	begin func(t *testing.T, vm *qemutest.VM)
	// ready waits for the guest, if it is none that ticks; nil: it is.
	ready func(t *testing.T, vm *qemutest.VM)
	// works uses what is special, in the source before it is saved and in each guest
	// that was resumed, and in that once more after the next checkpoint. It returns
	// what it sees, and is given that of before the save; empty: there is nothing to
	// compare with. Nil: what is special is memory, which is compared anyway.
	works func(t *testing.T, ctx context.Context, vm *qemutest.VM, seen string) string
}

// conditions are those that users have reported of, of this and of other tools.
var conditions = []condition{
	{
		// No node holds what the guest fills.
		name: "NUMA", memory: "192M", kernel: "flic.fill=56",
		machine: func(t *testing.T, dir string, c *qemutest.Config) {
			// The file must be on a file system that userfaultfd serves.
			shm, err := os.MkdirTemp("/dev/shm", "flic-test-")
			ok(t, err)
			t.Cleanup(func() { os.RemoveAll(shm) })
			c.CPUs = 4
			for i, backend := range []string{"memory-backend-ram", "memory-backend-memfd", "memory-backend-file,share=on,mem-path=" + shm, "memory-backend-ram,share=on"} {
				c.Args = append(c.Args, "-object", fmt.Sprintf("%s,size=48M,id=n%d", backend, i), "-numa", fmt.Sprintf("node,memdev=n%d,cpus=%d", i, i))
			}
		},
	},
	{
		// Without it the guest could not fill so much.
		name: "hot-added DIMM", memory: "112M,slots=2,maxmem=1G", kernel: "loglevel=6 memhp_default_state=online flic.memory=160 flic.fill=64",
		machine: func(t *testing.T, _ string, c *qemutest.Config) {
			if c.Incoming != "" {
				c.Args = append(c.Args, "-object", "memory-backend-ram,id=m1,size=128M", "-device", "pc-dimm,id=dimm1,memdev=m1")
			}
		},
		begin: func(t *testing.T, vm *qemutest.VM) {
			vm.WaitFor(t, `Key type encrypted registered`) // the kernel is nearly up
			ok(t, vm.QMP.Execute(t.Context(), "object-add", map[string]any{"qom-type": "memory-backend-ram", "id": "m1", "size": 128 << 20}, nil))
			ok(t, vm.QMP.Execute(t.Context(), "device_add", map[string]any{"driver": "pc-dimm", "id": "dimm1", "memdev": "m1"}, nil))
		},
	},
	{
		name: "balloon", memory: "160M", kernel: "flic.fill=16",
		machine: func(t *testing.T, _ string, c *qemutest.Config) {
			c.Args = append(c.Args, "-device", "virtio-balloon-pci,id=balloon0,free-page-reporting=on")
		},
		works: func(t *testing.T, _ context.Context, vm *qemutest.VM, seen string) string {
			// It stays as it was, gives back, and takes again.
			if n := balloon(t, vm); seen != "" && n != 120<<20 {
				t.Errorf("the guest has %d bytes", n)
			}
			for _, size := range []int64{160 << 20, 120 << 20} {
				ok(t, vm.QMP.Execute(t.Context(), "balloon", map[string]any{"value": size}, nil))
				until(t, "the balloon", func() bool { return balloon(t, vm) == size })
			}
			return "120 MiB"
		},
	},
	{
		name: "TPM", memory: "112M", kernel: "flic.fill=16",
		machine: swtpm,
		works: func(t *testing.T, _ context.Context, vm *qemutest.VM, seen string) string {
			if now := vm.Ask(t, "tpm"); seen != "" && now != seen {
				t.Errorf("PCR 16 is %s, and was %s", now, seen)
			}
			old, err := hex.DecodeString(vm.Ask(t, "tpm"))
			ok(t, err)
			for i := range byte(32) {
				old = append(old, i+1)
			}
			now := vm.Ask(t, "tpm extend")
			if want := fmt.Sprintf("%x", sha256.Sum256(old)); now != want {
				t.Errorf("PCR 16 extended is %s, want %s", now, want)
			}
			return now
		},
	},
	{
		// The firmware's shell, on a display and on the serial port.
		name: "OVMF and virtio-gpu", memory: "128M",
		machine: func(t *testing.T, dir string, c *qemutest.Config) {
			c.Guest = qemutest.Firmware
			code, vars := filepath.Join(dir, "code"), filepath.Join(t.TempDir(), "vars")
			copied(t, "/usr/share/OVMF/OVMF_CODE_4M.fd", code)
			copied(t, "/usr/share/OVMF/OVMF_VARS_4M.fd", vars)
			c.Args = append(c.Args, "-drive", "if=pflash,unit=0,format=raw,readonly=on,file="+code,
				"-drive", "if=pflash,unit=1,format=raw,file="+vars, "-device", "virtio-gpu-pci")
		},
		ready: func(t *testing.T, vm *qemutest.VM) { vm.WaitFor(t, `Shell> `) },
		works: func(t *testing.T, ctx context.Context, vm *qemutest.VM, seen string) string {
			const variable = "setvar flic -guid 11111111-2222-3333-4444-555555555555"
			if seen == "" {
				ok(t, vm.Send(variable+" -nv -bs =0x7856\r"))
				vm.WaitFor(t, `Shell> `)
			} else if now := screen(t, vm); now != seen {
				t.Errorf("the screen was %s and is %s", seen, now)
			}
			ok(t, vm.Send("cls\r"))
			vm.WaitFor(t, `Shell> `)
			// What was written to the flash is there, also when it is read anew.
			if seen != "" {
				ok(t, vm.QMP.Execute(ctx, "system_reset", nil, nil))
				vm.WaitFor(t, `Shell> `)
			}
			ok(t, vm.Send(variable+"\r"))
			vm.WaitFor(t, `56 78 `)
			vm.WaitFor(t, `Shell> `)
			return screen(t, vm)
		},
	},
	{
		name: "20 disks", memory: "112M", kernel: "flic.fill=16",
		machine: func(t *testing.T, dir string, c *qemutest.Config) {
			for i := range disks {
				file := filepath.Join(dir, fmt.Sprint(i))
				if _, err := os.Stat(file); err != nil {
					b := make([]byte, 16*guestmem.PageSize)
					rand.NewChaCha8([32]byte{byte(i)}).Read(b)
					ok(t, os.WriteFile(file, b, 0o600))
				}
				c.Args = append(c.Args, "-drive", fmt.Sprintf("if=none,id=d%d,format=raw,file=%s", i, file), "-device", fmt.Sprintf("virtio-blk-pci,drive=d%d,addr=%x", i, 2+i))
			}
		},
		works: func(t *testing.T, _ context.Context, vm *qemutest.VM, seen string) string {
			for i := range disks {
				b := make([]byte, 16*guestmem.PageSize)
				rand.NewChaCha8([32]byte{byte(i)}).Read(b)
				page := b[(i%16)*guestmem.PageSize:][:guestmem.PageSize]
				if answer, want := vm.Ask(t, fmt.Sprintf("block /dev/vd%c %d", 'a'+i, i%16)), fmt.Sprintf("%x", sha256.Sum256(page)); answer != want {
					t.Errorf("disk %d has %s, want %s", i, answer, want)
				}
			}
			return "20 disks"
		},
	},
}

const disks = 20

// TestConditions: a guest in each condition is saved, and goes on eagerly and lazily
// with the same memory, and with what is special about it in use.
func TestConditions(t *testing.T) {
	for _, condition := range conditions {
		t.Run(condition.name, func(t *testing.T) {
			t.Parallel()
			ctx, l := limit(t), newLab(t)
			dir := t.TempDir()
			machine := func(incoming string) qemutest.Config {
				c := q35.linux(condition.memory, "flic.dirty=20 "+condition.kernel)
				if incoming != "" {
					c = destination(c, incoming)
				}
				condition.machine(t, dir, &c)
				return c
			}
			source := qemutest.Start(t, machine(""))
			if condition.begin != nil {
				condition.begin(t, source)
			}
			if condition.ready != nil {
				condition.ready(t, source)
			} else {
				source.WaitFor(t, `flic ready`)
				source.WaitFor(t, `tick 2\r`)
			}
			works := func(vm *qemutest.VM, seen string) string {
				if condition.works == nil {
					return ""
				}
				return condition.works(t, ctx, vm, seen)
			}
			seen := works(source, "")
			rep := l.checkpoint(t, source, "--then", "pause")
			if len(rep.Warnings) > 0 {
				t.Errorf("checkpoint warns: %q", rep.Warnings)
			}
			before, console := ram(t, ctx, source), source.Console()
			source.Kill()

			for _, lazy := range []string{"never", "always"} {
				vm := qemutest.Start(t, machine("defer"))
				doc, _ := l.resume(t, vm, "--paused", "--lazy", lazy, "vm@1")
				if doc.Lazy != (lazy == "always") || len(doc.Warnings) > 0 {
					t.Errorf("lazy %s: %+v", lazy, doc)
				}
				if diff := qemutest.DiffRAM(before, ram(t, ctx, vm)); diff != "" {
					t.Errorf("lazy %s: %s", lazy, diff)
				}
				if condition.ready == nil {
					goesOn(t, ctx, vm, lastTick(t, console, 10), 10)
					checks(t, vm)
				} else {
					ok(t, qmp.Cont(ctx, vm.QMP))
				}
				works(vm, seen)
				// It can be saved again while it runs, and goes on.
				again := l.checkpoint(t, vm, "--mode", map[string]string{"never": "live", "always": "background"}[lazy])
				if again.State != "running" || len(again.Warnings) > 0 {
					t.Errorf("the next checkpoint: %+v", again)
				}
				works(vm, "")
				if condition.ready == nil {
					checks(t, vm)
				}
				l.run(t, "verify", again.Checkpoint)
				l.run(t, "rm", again.Checkpoint)
				vm.Kill()
			}
			l.holds(t, "vm@1")
		})
	}
}

// balloon is how much memory the balloon leaves the guest, in bytes.
func balloon(t *testing.T, vm *qemutest.VM) int64 {
	t.Helper()
	var b struct {
		Actual int64 `json:"actual"`
	}
	ok(t, vm.QMP.Execute(t.Context(), "query-balloon", nil, &b))
	return b.Actual
}

// swtpm gives each QEMU a TPM of its own, which ends with the test.
func swtpm(t *testing.T, _ string, c *qemutest.Config) {
	t.Helper()
	dir, err := os.MkdirTemp("", "tpm") // a socket's path is short of space
	ok(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket := filepath.Join(dir, "socket")
	cmd := exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+dir, "--ctrl", "type=unixio,path="+socket, "--terminate")
	var stderr strings.Builder
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatalf("%v; run: scripts/deps qemu", err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	until(t, "swtpm's socket", func() bool { _, err := os.Stat(socket); return err == nil })
	c.Args = append(c.Args, "-chardev", "socket,id=tpm,path="+socket, "-tpmdev", "emulator,id=tpm0,chardev=tpm", "-device", "tpm-tis,tpmdev=tpm0")
}

// copied makes to a copy of from.
func copied(t *testing.T, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err != nil {
		t.Fatalf("%v; run: scripts/deps qemu", err)
	}
	ok(t, os.WriteFile(to, b, 0o600))
}

// screen is what a VM's display shows, its size and a checksum, when it has shown the same
// for a while: the firmware writes to the serial port first.
func screen(t *testing.T, vm *qemutest.VM) (now string) {
	t.Helper()
	last, same := "", 0
	until(t, "the screen", func() bool {
		if now = shown(t, vm); now != last {
			last, same = now, 0
		}
		same++
		time.Sleep(100 * time.Millisecond)
		return same > 5
	})
	return now
}

// shown is what a VM's display shows at this moment.
func shown(t *testing.T, vm *qemutest.VM) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "screen")
	ok(t, vm.QMP.Execute(t.Context(), "screendump", map[string]any{"filename": file}, nil))
	b, err := os.ReadFile(file)
	ok(t, err)
	lines := bytes.SplitN(b, []byte("\n"), 4)
	if len(lines) != 4 || len(bytes.Trim(lines[3], "\x00")) == 0 {
		t.Errorf("nothing is on the screen: %.40q", b)
	}
	return fmt.Sprintf("%s %x", lines[1], sha256.Sum256(b))
}

// TestChangedNIC: a network card that offers less than the guest's driver uses is
// refused in words and soon, and one that offers more is taken.
func TestChangedNIC(t *testing.T) {
	t.Parallel()
	ctx, l := limit(t), newLab(t)
	c := q35.linux("104M", "flic.fill=8")
	nic := func(c qemutest.Config, properties string) qemutest.Config {
		c.Args = append(slices.Clone(c.Args), "-netdev", "hubport,id=n0,hubid=0", "-device", "virtio-net-pci,netdev=n0,addr=5"+properties)
		return c
	}
	source := qemutest.Start(t, nic(c, ""))
	source.WaitFor(t, `flic ready`)
	source.WaitFor(t, `tick 2\r`)
	l.checkpoint(t, source, "--then", "pause")
	before, tick := ram(t, ctx, source), lastTick(t, source.Console(), 10)
	source.Kill()

	for _, lazy := range []string{"always", "never"} {
		vm := qemutest.Start(t, nic(destination(c, "defer"), ",mrg_rxbuf=off"))
		words := []string{"failed before the guest could run", "the checkpoint is untouched"}
		if lazy == "always" {
			words = append(words, `"0000:00:05.0/virtio-net"`) // eagerly QEMU's output has it
		}
		begin := time.Now()
		l.fails(t, "flic-migrate", vm, exitFailed, words, "--lazy", lazy, "vm@1")
		if took := time.Since(begin); took > answered {
			t.Errorf("lazy %s: that took %v", lazy, took)
		}
		vm.Kill()

		vm = qemutest.Start(t, nic(destination(c, "defer"), ",host_mtu=1400"))
		l.resume(t, vm, "--paused", "--lazy", lazy, "vm@1")
		if diff := qemutest.DiffRAM(before, ram(t, ctx, vm)); diff != "" {
			t.Errorf("lazy %s: %s", lazy, diff)
		}
		goesOn(t, ctx, vm, tick, 10)
		checks(t, vm)
		vm.Kill()
	}
	l.holds(t, "vm@1")
}

// TestParallelSparseFile: a save file that QEMU has written through several channels at
// once, as virsh save --parallel-channels has it do, is imported, and its memory restored.
// Such files came with QEMU 9.0.
func TestParallelSparseFile(t *testing.T) {
	t.Parallel()
	ctx, l := limit(t), newLab(t)
	c := q35.tiny(t, "64M", varied(4096), 10)
	source := qemutest.Start(t, c)
	source.WaitFor(t, `tick 00000002\r`)
	has, err := migration.Capabilities(ctx, source.QMP)
	ok(t, err)
	if _, is := has["mapped-ram"]; !is {
		if v := source.QMP.Version().QEMU; v.Major >= 9 {
			t.Errorf("QEMU %v has no mapped-ram", v)
		}
		return
	}
	set(t, source, map[string]any{"multifd-channels": 4}, "mapped-ram", "multifd")
	h, err := saveimage.New("<domain type='qemu'><name>vm</name><uuid>11111111-2222-3333-4444-555555555555</uuid></domain>", "", false)
	ok(t, err)
	h.SetFormat(saveimage.Sparse)
	file := filepath.Join(l.dir, "vm.save")
	ok(t, os.WriteFile(file, h.Bytes(), 0o600))
	before := stop(t, ctx, source)
	saved(t, ctx, source, fmt.Sprintf("file:%s,offset=%d", file, len(h.Bytes())))
	tick := lastTick(t, source.Console(), 16)
	source.Kill()

	l.run(t, "import", "--vm", "vm", file)
	l.holds(t, "vm@1")
	vm := restored(t, ctx, c, l.restore("vm"), before)
	goesOn(t, ctx, vm, tick, 16)
}
