package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
)

// null is a disk of nothing.
func null(id string) []string {
	return []string{"-drive", "if=none,format=raw,file=null-co://,id=" + id}
}

// devices are many kinds of them: on the root bus, behind bridges, on buses of their
// own.
func devices(list ...string) (args []string) {
	for _, d := range list {
		args = append(args, "-device", d)
	}
	return args
}

// full is a machine with something of everything that a check looks at.
func full() qemutest.Config {
	c := qemutest.Config{Memory: "64M", CPUs: 2}
	c.Args = slices.Concat(null("d0"), null("d1"), null("d2"), []string{"-vga", "std"}, devices(
		"e1000,addr=2", "pcie-root-port,id=rp1,addr=3", "virtio-net-pci,bus=rp1,id=net0",
		"virtio-blk-pci,drive=d0,addr=4", "nec-usb-xhci,id=x1,addr=5", "usb-hub,bus=x1.0,port=1", "usb-tablet,bus=x1.0,port=1.2",
		"virtio-scsi-pci,id=sc,addr=6", "scsi-hd,drive=d1,bus=sc.0,scsi-id=3", "virtio-serial-pci,addr=7",
		"virtio-balloon-pci,addr=8", "virtio-rng-pci,addr=9", "virtio-gpu-pci,addr=a", "virtio-keyboard-pci,addr=b",
		"e1000e,addr=c", "rtl8139,addr=d", "pci-bridge,chassis_nr=2,id=pb,addr=e", "virtio-rng-pci,bus=pb,addr=3",
		"ich9-intel-hda,addr=f", "ide-hd,drive=d2", "qemu-xhci,addr=10", "cirrus-vga,addr=11",
		"pxb-pcie,id=pxb,bus_nr=80,addr=12", "pcie-root-port,bus=pxb,id=rp2,chassis=9", "virtio-net-pci,bus=rp2"))
	return c
}

// plug is a command by which a test adds an object or a device.
type plug struct {
	command string
	args    map[string]any
}

// stopped saves a guest that has not run, with what is plugged in before.
func (l *lab) stopped(t *testing.T, c qemutest.Config, plugged ...plug) {
	t.Helper()
	c.Paused = true
	vm := qemutest.Start(t, c)
	set(t, vm, fast)
	for _, p := range plugged {
		ok(t, vm.QMP.Execute(t.Context(), p.command, p.args, nil))
	}
	saved(t, limit(t), vm, l.save())
	vm.Kill()
}

// TestPreflightSame: a QEMU with the arguments of the one that was saved is what was
// saved, whatever it is made of. A warning would be a false one.
func TestPreflightSame(t *testing.T) {
	withMemory := qemutest.Config{Memory: "32M,slots=4,maxmem=1G", CPUs: 3, Args: slices.Concat(
		[]string{"-object", "memory-backend-ram,id=m1,size=16M"}, devices("pc-dimm,memdev=m1,id=dimm1"))}
	hotplug := qemutest.Config{Machine: "q35", Memory: "32M", CPUs: 1, Args: []string{"-smp", "2,maxcpus=4"}}
	arm := virt.Config
	arm.Memory, arm.CPUs = "64M", 2
	arm.Args = slices.Concat(null("d0"), devices("virtio-blk-device,drive=d0", "virtio-net-pci", "pcie-root-port,id=rp1", "virtio-rng-pci,bus=rp1"))
	small := microvm.Config
	small.Memory = "32M"
	small.Args = slices.Concat(null("d0"), devices("virtio-blk-device,drive=d0", "virtio-rng-device"))
	old := pc.Config
	old.Memory, old.CPUs = "32M", 2
	old.Args = []string{"-vga", "cirrus", "-device", "virtio-net-pci", "-device", "piix3-usb-uhci,id=u", "-device", "usb-kbd"}
	// Nodes of memory of all kinds, and what goes with it: -smp as well.
	shm, err := os.MkdirTemp("/dev/shm", "flic-test-")
	ok(t, err)
	t.Cleanup(func() { os.RemoveAll(shm) })
	numa := qemutest.Config{Memory: "64M", CPUs: 4}
	for i, backend := range []string{"memory-backend-ram", "memory-backend-memfd", "memory-backend-file,share=on,mem-path=" + shm, "memory-backend-ram,share=on"} {
		numa.Args = append(numa.Args, "-object", fmt.Sprintf("%s,size=16M,id=n%d", backend, i), "-numa", fmt.Sprintf("node,memdev=n%d,cpus=%d", i, i))
	}
	disks := qemutest.Config{Memory: "32M"}
	for i := range 20 {
		id := fmt.Sprintf("d%d", i)
		disks.Args = slices.Concat(disks.Args, null(id), devices(fmt.Sprintf("%s,drive=%s", []string{"virtio-blk-pci", "scsi-hd"}[i%2], id)))
		if i == 0 {
			disks.Args = append(disks.Args, "-device", "virtio-scsi-pci")
		}
	}
	for name, c := range map[string]qemutest.Config{"full": full(), "memory": withMemory, "hotplug": hotplug, "arm": arm, "microvm": small, "pc": old,
		"numa": numa, "20 disks": disks} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			l.stopped(t, c)
			l.isSame(t, c)
		})
	}
	t.Run("plugged in", func(t *testing.T) {
		t.Parallel()
		l := newLab(t)
		c := qemutest.Config{Memory: "32M,slots=4,maxmem=1G", CPUs: 1, Args: []string{"-smp", "1,maxcpus=2", "-device", "pcie-root-port,id=rp1,addr=3"}}
		l.stopped(t, c, plug{"object-add", map[string]any{"qom-type": "memory-backend-ram", "id": "m1", "size": 128 << 20}},
			plug{"device_add", map[string]any{"driver": "pc-dimm", "id": "dimm1", "memdev": "m1"}},
			plug{"device_add", map[string]any{"driver": "virtio-rng-pci", "id": "rng", "bus": "rp1"}},
			plug{"device_add", map[string]any{"driver": "qemu64-x86_64-cpu", "id": "cpu1", "socket-id": 0, "core-id": 1, "thread-id": 0}})
		vm := qemutest.Start(t, destination(c, "defer"))
		l.fails(t, "flic-migrate", vm, exitFailed, []string{"m1 of 134217728 bytes is missing", "has 1 vCPU, and 2 when", "virtio-rng at PCI address 00:03.0:00.0"}, "vm@1")
		vm.Kill()
		c.Args = append(c.Args, "-object", "memory-backend-ram,id=m1,size=128M")
		c.Args = append(c.Args, devices("pc-dimm,id=dimm1,memdev=m1", "virtio-rng-pci,bus=rp1", "qemu64-x86_64-cpu,socket-id=0,core-id=1,thread-id=0")...)
		l.isSame(t, c)
	})
}

// isSame resumes vm@1 into a QEMU that is what was saved, without a word about it.
func (l *lab) isSame(t *testing.T, c qemutest.Config) {
	t.Helper()
	for _, lazy := range []string{"auto", "never"} {
		vm := qemutest.Start(t, destination(c, "defer"))
		doc, _ := l.resume(t, vm, "--lazy", lazy, "vm@1")
		if len(doc.Warnings) > 0 || doc.Reason != "" || doc.Lazy != (lazy == "auto") {
			t.Errorf("%s: %+v", lazy, doc)
		}
		vm.Kill()
	}
}

// TestPreflightOther: what a QEMU would find out while it loads is found before, and
// leaves it as it was.
func TestPreflightOther(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	c := full()
	l.stopped(t, c)
	without := func(c *qemutest.Config, device string) {
		i := slices.Index(c.Args, device)
		if i < 0 {
			t.Fatal(device)
		}
		c.Args = slices.Delete(slices.Clone(c.Args), i-1, i+1)
	}
	instead := func(c *qemutest.Config, device, other string) {
		c.Args = slices.Clone(c.Args)
		c.Args[slices.Index(c.Args, device)] = other
	}
	for _, tc := range []struct {
		name   string
		change func(*qemutest.Config)
		words  []string // and --force, unless its RAM is missing as well
	}{
		{"fewer vCPUs", func(c *qemutest.Config) { c.CPUs = 1 }, []string{"has 1 vCPU, and 2 when", "-smp 2"}},
		// A disk has a queue for each vCPU, and would not load.
		{"more vCPUs", func(c *qemutest.Config) { c.CPUs = 4 }, []string{"has 4 vCPUs, and 2 when"}},
		{"no NIC", func(c *qemutest.Config) { without(c, "virtio-net-pci,bus=rp1,id=net0") }, []string{"virtio-net at PCI address 00:03.0:00.0"}},
		{"another NIC", func(c *qemutest.Config) { instead(c, "e1000e,addr=c", "virtio-net-pci,addr=c") }, []string{"e1000e at PCI address 00:0c.0, where this QEMU has virtio-net-pci"}},
		{"elsewhere", func(c *qemutest.Config) { instead(c, "virtio-rng-pci,addr=9", "virtio-rng-pci,addr=19") }, []string{"virtio-rng at PCI address 00:09.0"}},
		{"no SCSI disk", func(c *qemutest.Config) { without(c, "scsi-hd,drive=d1,bus=sc.0,scsi-id=3") }, []string{"scsi-disk at SCSI 0:3:0 of PCI address 00:06.0"}},
		{"no tablet", func(c *qemutest.Config) { without(c, "usb-tablet,bus=x1.0,port=1.2") }, []string{"USB port 1.2 of PCI address 00:05.0"}},
	} {
		other := destination(c, "defer")
		tc.change(&other)
		vm := qemutest.Start(t, other)
		doc := l.fails(t, "flic-migrate", vm, exitFailed, append(tc.words, "not the machine that was saved"), "vm@1")
		t.Logf("%s: %s", tc.name, doc.Error)
		if offers := strings.Contains(doc.Error, "--force"); offers == strings.Contains(doc.Error, "RAM block") {
			t.Errorf("%s: %s", tc.name, doc.Error)
		}
		state(t, vm, "inmigrate")
		if postcopy(t, vm) {
			t.Errorf("%s: postcopy-ram is on", tc.name)
		}
		vm.Kill()
	}

	// What the guest knows nothing of is a warning.
	l = newLab(t)
	c = qemutest.Config{Memory: "32M", CPUs: 2}
	l.stopped(t, c)
	other := destination(c, "defer")
	other.Args = append(slices.Clone(c.Args), "-device", "virtio-rng-pci,addr=1d")
	vm := qemutest.Start(t, other)
	if doc, _ := l.resume(t, vm, "vm@1"); len(doc.Warnings) != 1 || !strings.Contains(doc.Warnings[0], "virtio-rng-pci at PCI address 00:1d.0") {
		t.Errorf("%+v", doc)
	}
	vm.Kill()

	// So is what is forced. Whether it loads is QEMU's to say: 11.1 refuses more vCPUs
	// on a q35, 7.2 and 10.0 take them if no device has a queue for each.
	other = destination(c, "defer")
	other.CPUs = 4
	vm = qemutest.Start(t, other)
	doc, _ := l.resumes(t, "flic-migrate", vm, "--force", "--lazy", "never", "vm@1").outcome(t)
	if len(doc.Warnings) != 1 || !strings.Contains(doc.Warnings[0], "as --force says") ||
		doc.ExitCode != 0 && !strings.Contains(doc.Error, "failed before the guest could run") {
		t.Errorf("%+v", doc)
	}
	vm.Kill()
}

// TestPreflightBackends: memory in a file that userfaultfd does not serve restores
// eagerly, and a QEMU that can't look for itself is not lost.
func TestPreflightBackends(t *testing.T) {
	t.Parallel()
	ctx := limit(t)
	dir, err := os.MkdirTemp("/dev/shm", "flic-test-")
	ok(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	for _, share := range []string{"on", "off"} {
		for _, disk := range []bool{false, true} {
			t.Run(fmt.Sprintf("share-%s-disk-%v", share, disk), func(t *testing.T) {
				l := newLab(t)
				c := q35.tiny(t, "32M", varied(512), 0)
				c.Machine = "q35,memory-backend=m0"
				file := filepath.Join(dir, "m0")
				if disk {
					file = filepath.Join(l.dir, "m0")
				}
				c.Args = append(c.Args, "-object", "memory-backend-file,id=m0,size=32M,share="+share+",mem-path="+file)
				source := qemutest.Start(t, c)
				source.WaitFor(t, `tick 00000002\r`)
				set(t, source, fast)
				before := stop(t, ctx, source)
				saved(t, ctx, source, l.save())
				source.Kill()
				ok(t, os.Remove(file))
				if disk {
					vm := qemutest.Start(t, destination(c, "defer"))
					l.fails(t, "flic-migrate", vm, exitFailed, []string{"memory backend m0", file}, "--lazy", "always", "vm@1")
					state(t, vm, "inmigrate")
					vm.Kill()
				}
				vm := qemutest.Start(t, destination(c, "defer"))
				doc, _ := l.resume(t, vm, "vm@1")
				if doc.Lazy == disk || strings.Contains(doc.Reason, file) != disk {
					t.Errorf("%+v", doc)
				}
				if _, err := migration.Wait(ctx, vm.QMP); err != nil {
					t.Error(err)
				}
				if diff := qemutest.DiffRAM(before, ram(t, ctx, vm)); diff != "" {
					t.Error(diff)
				}
				vm.Kill()
			})
		}
	}
}
