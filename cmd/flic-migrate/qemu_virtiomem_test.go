package main

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
	"github.com/flic-migrate/flic-migrate/tier/replay"
)

// virtioMem is a machine of 112 MiB with a device that can plug in 128 more, of which
// 64 are. It counts pages of the size that Linux plugs in at least: 4 MiB.
func virtioMem(kernel string) qemutest.Config {
	// Linux is to have the memory online before its first process fills it, and takes
	// pages that it can move from there first.
	c := q35.linux("112M,maxmem=1G", "memhp_default_state=online_movable flic.memory=140 "+kernel)
	c.Args = []string{"-object", "memory-backend-ram,id=vm0,size=128M",
		"-device", "virtio-mem-pci,id=mem0,memdev=vm0,requested-size=64M"}
	return c
}

const virtioMemBlock = "0000:00:01.0/vm0" // or what a later machine type calls it

// plugged is how much of a virtio-mem's memory its guest has, in bytes.
func plugged(t *testing.T, ctx context.Context, vm *qemutest.VM) (n int64) {
	t.Helper()
	ok(t, vm.QMP.Execute(ctx, "qom-get", map[string]any{"path": "/machine/peripheral/mem0", "property": "size"}, &n))
	return n
}

// A virtio-mem's memory is saved as far as it is plugged, with both tiers and what is
// stored once, whatever section QEMU saves its state in: ahead of RAM's setup, between
// that and the pages, or among the devices. It comes back eagerly and lazily, and the
// rest stays empty.
func TestVirtioMem(t *testing.T) {
	t.Parallel()
	ctx, l := limit(t), newLab(t)
	c := virtioMem("flic.fill=72 flic.dirty=20")
	source := qemutest.Start(t, c)
	source.WaitFor(t, `flic ready`)
	source.WaitFor(t, `tick 3\r`)
	set(t, source, fast)
	before := stop(t, ctx, source)
	if n := plugged(t, ctx, source); n != 64<<20 {
		t.Fatalf("the guest has plugged in %d bytes", n)
	}
	saved(t, ctx, source, l.save(l.hot(t, source)...))
	tick := lastTick(t, source.Console(), 10)
	m := l.show(t, "vm@1")
	source.Kill()

	if m.OpaqueBytes != 0 || m.Report.Hot < 5000 || m.Report.Cold < 5000 || m.Report.Duplicate == 0 {
		t.Errorf("%d bytes not understood; %+v", m.OpaqueBytes, m.Report)
	}
	// The unplugged half has no pages at all.
	if m.Report.Absent != 64<<20/4096 {
		t.Errorf("%d pages are absent, want %d", m.Report.Absent, 64<<20/4096)
	}
	l.holds(t, "vm@1")

	for _, lazy := range []string{"never", "always"} {
		vm := qemutest.Start(t, destination(c, "defer"))
		doc, server := l.resume(t, vm, "--paused", "--lazy", lazy, "vm@1")
		if doc.Lazy != (lazy == "always") {
			t.Errorf("%+v", doc)
		}
		if diff := qemutest.DiffRAM(before, ram(t, ctx, vm)); diff != "" {
			t.Errorf("lazy %s: %s", lazy, diff)
		}
		if n := plugged(t, ctx, vm); n != 64<<20 {
			t.Errorf("lazy %s: %d bytes are plugged in", lazy, n)
		}
		// What QEMU is given before it runs are devices, and not the memory.
		if r := server.LazyReport; r != nil && (r.OpeningBytes > 4<<20 || r.Pages < 10000) {
			t.Errorf("%+v", r)
		}
		goesOn(t, ctx, vm, tick, 10)
		checks(t, vm)
		if answer := vm.Ask(t, "fill 9"); answer != "9" {
			t.Errorf("fill: %s", answer)
		}
		// The guest still gives back, and takes, what it is told to.
		ok(t, vm.QMP.Execute(ctx, "qom-set", map[string]any{"path": "/machine/peripheral/mem0", "property": "requested-size", "value": 96 << 20}, nil))
		until(t, "more memory", func() bool { return plugged(t, ctx, vm) == 96<<20 })
		checks(t, vm)
		vm.Kill()
	}
}
