package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
)

// allowed are the capabilities that QEMU lets a user turn on alone, of those that it has.
func allowed(t *testing.T, ctx context.Context, vm *qemutest.VM) (names []string) {
	t.Helper()
	was, err := migration.Capabilities(ctx, vm.QMP)
	ok(t, err)
	for _, name := range slices.Sorted(maps.Keys(was)) {
		var refused *qmp.Error
		switch err := migration.SetCapabilities(ctx, vm.QMP, map[string]bool{name: true}); {
		case errors.As(err, &refused): // it needs another one, or something of the host's
		default:
			ok(t, err)
			names = append(names, name)
			ok(t, migration.SetCapabilities(ctx, vm.QMP, map[string]bool{name: was[name]}))
		}
	}
	if len(names) < 8 {
		t.Fatalf("QEMU has %v", names)
	}
	return names
}

// letGo fails if a QEMU whose memory is whole still has userfaultfd on it: whoever
// touches a page that the guest gives back would wait for ever.
func letGo(t *testing.T, vm *qemutest.VM) {
	t.Helper()
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", vm.Pid()))
	ok(t, err)
	for _, fd := range fds {
		if to, err := os.Readlink(fd); err == nil && to == "anon_inode:[userfaultfd]" {
			t.Errorf("QEMU still has %s", to)
		}
	}
}

// TestResumeCapabilities: whatever the user has left on in a QEMU that is to load, it
// loads, and it is as it was afterwards. With postcopy-ram alone it could not be saved
// again.
func TestResumeCapabilities(t *testing.T) {
	t.Parallel()
	ctx, l := limit(t), newLab(t)
	c, before, _, _ := saveTwice(t, ctx, l, q35)
	vm := qemutest.Start(t, destination(c, "defer"))
	names := allowed(t, ctx, vm)
	vm.Kill()
	t.Logf("%v", names)
	preempt := "postcopy-ram postcopy-preempt" // with its channel a restore would hang
	for _, name := range append(names, preempt) {
		for _, lazy := range []string{"always", "never"} {
			vm := qemutest.Start(t, destination(c, "defer"))
			set(t, vm, nil, strings.Fields(name)...)
			was := settings(t, vm)
			doc, _ := l.resume(t, vm, "--lazy", lazy, "vm@1")
			if diff := qemutest.DiffRAM(before, ram(t, ctx, vm)); diff != "" || doc.Lazy != (lazy == "always") || doc.Warnings != nil {
				t.Errorf("%s, lazy %s: %s, %+v", name, lazy, diff, doc)
			}
			for _, off := range strings.Fields(preempt) {
				was = strings.ReplaceAll(was, `"`+off+`":true`, `"`+off+`":false`)
			}
			if is := settings(t, vm); is != was {
				t.Errorf("%s, lazy %s: settings were\n%s\nand are\n%s", name, lazy, was, is)
			}
			letGo(t, vm)
			vm.Kill()
		}
	}
}

// TestCheckpointCapabilities: the same for a QEMU that is saved, with its guest running.
func TestCheckpointCapabilities(t *testing.T) {
	t.Parallel()
	ctx, l := limit(t), newLab(t)
	vm := qemutest.Start(t, q35.tiny(t, qemutest.LiveMemory, varied(256), 10))
	vm.WaitFor(t, `tick 00000002\r`)
	names := allowed(t, ctx, vm)
	for i, name := range names {
		ok(t, migration.SetCapabilities(ctx, vm.QMP, map[string]bool{name: true}))
		was := settings(t, vm)
		rep := l.checkpoint(t, vm, "--mode", []string{"stop", "live"}[i%2])
		if rep.State != "running" || len(rep.Warnings) > 0 {
			t.Errorf("%s: %+v", name, rep)
		}
		if is := settings(t, vm); is != was {
			t.Errorf("%s: settings were\n%s\nand are\n%s", name, was, is)
		}
		ok(t, migration.SetCapabilities(ctx, vm.QMP, map[string]bool{name: false}))
	}
	l.run(t, "verify", "--all")
}

// TestSwitchoverAck: a source that waits to be told that it may stop its guest is told
// so by a bare save, if its machine type says that it understands; one that would fail
// at it is not. Where nothing can be known it is said what to do.
func TestSwitchoverAck(t *testing.T) {
	t.Parallel()
	ctx := limit(t)
	for _, typ := range []string{"q35", "pc-q35-8.1", "pc-q35-7.2", "microvm"} {
		for _, asks := range []bool{false, true} {
			l := newLab(t)
			m := q35
			if m.Machine = typ; typ == "microvm" {
				m = microvm
			}
			c := m.tiny(t, qemutest.LiveMemory, varied(256), 10)
			vm, err := qemutest.Launch(ctx, c)
			if err != nil {
				t.Logf("%s: %v", typ, err) // QEMU 7.2 has no later type
				continue
			}
			t.Cleanup(vm.Kill)
			vm.WaitFor(t, `tick 00000002\r`)
			has, err := migration.Capabilities(ctx, vm.QMP)
			ok(t, err)
			capabilities := []string{"return-path"}
			if _, knows := has["switchover-ack"]; asks && knows {
				capabilities = append(capabilities, "switchover-ack")
			}
			set(t, vm, fast, capabilities...)
			ok(t, migration.Start(ctx, vm.QMP, l.withPid(l.save())))
			save := l.pid(t)
			// QEMU counts what there is to wait for with the types of 11.1, and microvm is
			// always the newest.
			v := vm.QMP.Version().QEMU
			counts := typ == "microvm" && (v.Major > 11 || v.Major == 11 && v.Minor >= 1)
			if len(capabilities) == 2 && (typ == "microvm" || typ == "pc-q35-7.2") && !counts {
				until(t, "what to do", func() bool { return strings.Contains(vm.Output(), "switchover-ack") })
				runsOn(t, vm)
				ok(t, syscall.Kill(save, syscall.SIGTERM))
				ended(t, ctx, vm, migration.StatusFailed)
				runsOn(t, vm)
				l.nothing(t)
			} else {
				ended(t, ctx, vm, migration.StatusCompleted)
				l.holds(t, "vm@1")
				restored(t, ctx, c, l.restore("vm"), ram(t, ctx, vm))
			}
			vm.Kill()
		}
	}
}
