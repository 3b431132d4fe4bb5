package main

import (
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
)

// TestCheckpointDemote checkpoints a guest with a working set: each checkpoint moves from
// NVRAM to flash what only those before it need. The guest goes on from every one of them,
// eagerly and lazily, and after a flattening, with the memory that it had.
func TestCheckpointDemote(t *testing.T) {
	t.Parallel()
	ctx, l := limit(t), newLab(t)
	c := q35.tiny(t, qemutest.LiveMemory, varied(4096), 60)
	vm := qemutest.Start(t, c)
	vm.WaitFor(t, `tick 00000002\r`)
	set := strings.Fields(strings.Join(l.hot(t, vm), " "))
	next := func(flags ...string) (checkpointReport, map[string][]byte, int) {
		t.Helper()
		rep := l.checkpoint(t, vm, append(append(flags, "--then", "pause"), set...)...)
		memory, tick := ram(t, ctx, vm), lastTick(t, vm.Console(), 16)
		ok(t, qmp.Cont(ctx, vm.QMP))
		runsOn(t, vm)
		return rep, memory, tick
	}
	first, memory1, tick1 := next()
	if first.Demoted != nil || first.Save.Hot < 100 {
		t.Errorf("%+v, %+v", first.Demoted, first.Save)
	}
	// What a child has in its parent's NVRAM stays there.
	second, memory2, tick2 := next()
	if second.Demoted != nil || second.Save.Unchanged == 0 {
		t.Errorf("%+v, %+v", second.Demoted, second.Save)
	}
	third, _, _ := next("--parent", "none")
	if d := third.Demoted; d == nil || d.Images == 0 || d.Bytes == 0 || d.NVRAMBytes < d.Bytes {
		t.Errorf("%+v", d)
	}
	vm.Kill()
	l.holds(t, first.Checkpoint, second.Checkpoint, third.Checkpoint)
	var list []listEntry
	ok(t, json.Unmarshal([]byte(l.run(t, "list", "--json", "vm")), &list))
	if list[0].MovedBytes == 0 || list[0].NVRAMBytes != 0 || list[2].MovedBytes != 0 || list[2].NVRAMBytes == 0 {
		t.Errorf("%+v", list)
	}
	// The file with the newest alone is enough, and not even that is needed.
	l.run(t, "rm", third.Checkpoint)
	goesOnFrom := func(name string, memory map[string][]byte, tick int) {
		t.Helper()
		vm := restored(t, ctx, c, l.restore(name), memory)
		goesOn(t, ctx, vm, tick, 16)
		vm.Kill()
		vm = qemutest.Start(t, destination(c, "defer"))
		l.resume(t, vm, "--lazy", "always", "--paused", name)
		if diff := qemutest.DiffRAM(memory, ram(t, ctx, vm)); diff != "" {
			t.Errorf("%s: lazily restored RAM differs: %s", name, diff)
		}
		goesOn(t, ctx, vm, tick, 16)
		vm.Kill()
	}
	goesOnFrom(first.Checkpoint, memory1, tick1)
	goesOnFrom(second.Checkpoint, memory2, tick2)
	l.run(t, "flatten", second.Checkpoint)
	l.run(t, "rm", first.Checkpoint)
	if left, err := filepath.Glob(l.store + "/vms/vm/*.moved"); err != nil || len(left) > 0 {
		t.Errorf("%v is left: %v", left, err)
	}
	goesOnFrom(second.Checkpoint, memory2, tick2)
	l.holds(t, second.Checkpoint)
}
