package main

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
)

// virtioMem is a machine of 120 MiB with a device that can plug in 128 more, of which
// 64 are.
func virtioMem(kernel string) qemutest.Config {
	// Linux is to have all of the memory online, 116 MiB with what the kernel leaves of
	// the 120, before its first process fills it, and takes pages that it can move from
	// there first. It takes the memory in by pieces, and slower with later QEMUs: a
	// process that does not wait for the last one runs into its end.
	c := q35.linux("120M,maxmem=1G", "memhp_default_state=online_movable flic.memory=114 "+kernel)
	c.Args = virtioMemArgs
	return c
}

var virtioMemArgs = []string{"-object", "memory-backend-ram,id=vm0,size=128M",
	"-device", "virtio-mem-pci,id=mem0,memdev=vm0,requested-size=64M"}

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
	c := virtioMem("flic.fill=64 flic.dirty=20")
	source := qemutest.Start(t, c)
	source.WaitFor(t, `flic ready`)
	source.WaitFor(t, `tick 3\r`)
	set(t, source, fast)

	// A store that has no room, over plain exec:. QEMU calls that a failure, also when
	// it has sent all of the memory.
	for _, f := range []fault{{op: "write", n: 3, errno: unix.ENOSPC}, {op: "sync", n: 1, errno: unix.ENOSPC}} {
		f.mark = filepath.Join(l.dir, "mark")
		ok(t, migration.Start(ctx, source.QMP, f.uri(l, "--report", l.report())))
		ended(t, ctx, source, migration.StatusFailed)
		runsOn(t, source)
		if o := l.outcome(t); o.ExitCode != exitNoSpace {
			t.Errorf("the save says %+v", o)
		}
		ok(t, os.Remove(f.mark+".end"))
		l.nothing(t)
	}

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
	l.holds(t, "vm@1")

	for _, lazy := range []string{"never", "always"} {
		vm := qemutest.Start(t, destination(c, "defer"))
		doc, server := l.resume(t, vm, "--paused", "--lazy", lazy, "vm@1")
		if doc.Lazy != (lazy == "always") {
			t.Errorf("%+v", doc)
		}
		// The other half has no pages, not even of zeros.
		present := 0
		ok(t, vm.Loaded(ctx, func(block string, _ uint64, _ []byte) {
			if strings.HasSuffix(block, "vm0") {
				present++
			}
		}))
		if present > 64<<20/4096 {
			t.Errorf("lazy %s: of the device's memory %d pages are there, and %d plugged in", lazy, present, 64<<20/4096)
		}
		if diff := qemutest.DiffRAM(before, ram(t, ctx, vm)); diff != "" {
			t.Errorf("lazy %s: %s", lazy, diff)
		}
		if n := plugged(t, ctx, vm); n != 64<<20 {
			t.Errorf("lazy %s: %d bytes are plugged in", lazy, n)
		}
		// What QEMU is given before it runs are devices, and not the memory.
		if r := server.LazyReport; doc.Lazy && (r == nil || r.Pages-r.ZeroRest < 20000) {
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

// A guest with memory that is not plugged in can be armed too, also on machine types whose
// streams don't tell how much of it comes.
func TestVirtioMemArmed(t *testing.T) {
	for _, machine := range []string{"q35", "pc-q35-7.2"} {
		t.Run(machine, func(t *testing.T) {
			t.Parallel()
			ctx, l := limit(t), newLab(t)
			c := virtioMem("flic.fill=64 flic.dirty=20")
			c.Machine = machine
			vm := qemutest.Start(t, c)
			vm.WaitFor(t, `flic ready`)
			vm.WaitFor(t, `tick 3\r`)
			l.checkpoint(t, vm, "--arm")
			l.isArmed(t, vm)
			runsOn(t, vm)
			rep := l.checkpoint(t, vm, "--then", "pause")
			if !rep.Armed || len(rep.Warnings) > 0 || rep.Save.Resent == 0 {
				t.Errorf("%+v, %+v", rep, rep.Save)
			}
			before := ram(t, ctx, vm)
			tick := lastTick(t, vm.Console(), 10)
			vm.Kill()
			l.holds(t, "vm@1", "vm@2")
			vm = qemutest.Start(t, destination(c, "defer"))
			l.resume(t, vm, "--paused", "vm")
			if diff := qemutest.DiffRAM(before, ram(t, ctx, vm)); diff != "" {
				t.Error(diff)
			}
			goesOn(t, ctx, vm, tick, 10)
			checks(t, vm)
			vm.Kill()
		})
	}
}
