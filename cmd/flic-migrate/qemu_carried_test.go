package main

import (
	"path/filepath"
	"testing"

	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
)

// suites are the Debian suites whose QEMUs a guest is carried to from the one in PATH,
// the older first.
var suites = []string{"trixie", "forky"}

// A guest is carried from QEMU to QEMU by checkpoints, to later ones and back, eagerly
// and lazily: it runs on each, and goes on. Where QEMU itself refuses what another one
// has written, which it may do on the way back, there is nothing to carry. (On aarch64
// under TCG it does so on the way there, too: each version has more CPU registers.)
func TestCarried(t *testing.T) {
	t.Parallel()
	ctx, l := limit(t), newLab(t)
	c := q35.linux("112M", "flic.fill=16 flic.dirty=20")
	c.Machine = "pc-q35-7.2" // Debian 12's, which all of them have
	vm := qemutest.Start(t, c)
	vm.WaitFor(t, `flic ready`)
	vm.WaitFor(t, `tick 2\r`)
	for _, suite := range append(suites, "") {
		set(t, vm, fast)
		before := stop(t, ctx, vm)
		file := filepath.Join(l.dir, "stream")
		saved(t, ctx, vm, "exec:tee "+file+" | "+l.saveCommand(l.hot(t, vm)...))
		tick := lastTick(t, vm.Console(), 10)
		from := vm.QMP.Version()
		vm.Kill()

		c.Suite = suite
		itself := qemutest.Start(t, destination(c, "defer"))
		to := itself.QMP.Version()
		ok(t, migration.Incoming(ctx, itself.QMP, "exec:cat "+file))
		_, refused := migration.Wait(ctx, itself.QMP)
		itself.Kill()
		if refused != nil && suite == "" {
			t.Logf("QEMU %v does not take what %v has written: %v", to, from, refused)
			return
		}
		ok(t, refused)
		vm = restored(t, ctx, c, l.restore("vm"), before)
		goesOn(t, ctx, vm, tick, 10)
		checks(t, vm)
		vm.Kill()

		vm = qemutest.Start(t, destination(c, "defer"))
		if doc, _ := l.resume(t, vm, "--lazy", "always", "vm"); !doc.Lazy || len(doc.Warnings) > 0 {
			t.Errorf("%+v", doc)
		}
		if diff := qemutest.DiffRAM(before, ram(t, ctx, vm)); diff != "" {
			t.Errorf("QEMU %v from %v, lazily: %s", to, from, diff)
		}
		goesOn(t, ctx, vm, tick, 10)
		checks(t, vm)
		t.Logf("carried from QEMU %v to %v", from, to)
	}
}
