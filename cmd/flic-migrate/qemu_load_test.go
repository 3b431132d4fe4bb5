package main

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
)

// answered is how soon a resume must end whose QEMU can't load.
const answered = 5 * time.Second

// TestResumeDeviceFails: a QEMU that can't load a device, as it does not have it or has
// another one. Each version does something else then, and it is said soon what is
// wrong, as far as that QEMU says it.
func TestResumeDeviceFails(t *testing.T) {
	t.Parallel()
	ctx, l := limit(t), newLab(t)
	c := q35.tiny(t, "64M", varied(8<<20/4096), 10)
	serial := []string{"-device", "virtio-serial-pci,id=serial"}
	from := c
	from.Args = slices.Concat(c.Args, serial, []string{"-chardev", "null,id=null", "-device", "virtconsole,chardev=null"})
	source := qemutest.Start(t, from)
	source.WaitFor(t, `tick 00000003\r`)
	set(t, source, fast)
	before := stop(t, ctx, source)
	saved(t, ctx, source, l.save())
	source.Kill()

	const device = "virtio-console"
	for _, tc := range []struct {
		name string
		args []string
	}{{"missing", nil}, {"another", serial}} {
		for _, lazy := range []string{"always", "never"} {
			to := destination(c, "defer")
			to.Args = append(slices.Clone(to.Args), tc.args...)
			vm := qemutest.Start(t, to)
			begin := time.Now()
			doc := l.fails(t, "flic-migrate", vm, exitFailed, []string{"failed before the guest could run", "the checkpoint is untouched"},
				"--force", "--lazy", lazy, "--stalled", "1s", "vm@1")
			took := time.Since(begin)
			t.Logf("%s, lazy %s: after %v: %s", tc.name, lazy, took, doc.Error)
			if took > answered {
				t.Errorf("%s, lazy %s: that took %v", tc.name, lazy, took)
			}
			select {
			case <-vm.Exited():
			case <-time.After(time.Minute):
				t.Errorf("%s, lazy %s: QEMU has not ended", tc.name, lazy)
			}
			// Lazily our own PINGs say where QEMU stopped; eagerly it is what QEMU says,
			// over its monitor (10.2 and later) or in its output.
			named := strings.Contains(doc.Error, device)
			v := vm.QMP.Version().QEMU
			if later := v.Major > 10 || v.Major == 10 && v.Minor >= 2; !named && (lazy == "always" || later) {
				t.Errorf("%s, lazy %s: the device is not named: %s", tc.name, lazy, doc.Error)
			}
			if !named && !(strings.Contains(doc.Error, "output") && strings.Contains(vm.Output(), device)) {
				t.Errorf("%s, lazy %s: %s\n%s", tc.name, lazy, doc.Error, vm.Output())
			}
			vm.Kill()
		}
	}
	l.run(t, "verify", "--all")
	vm := qemutest.Start(t, destination(from, "defer"))
	l.resume(t, vm, "vm@1")
	if diff := qemutest.DiffRAM(before, ram(t, ctx, vm)); diff != "" {
		t.Error(diff)
	}
	l.tidy(t)
}
