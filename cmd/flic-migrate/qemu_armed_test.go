package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// armed is the main function of the armed process, on a file system with a fault if its
// environment says so.
func armed() {
	if os.Getenv(faultEnv) == "" {
		os.Exit(armedMain(vfs.OS))
	}
	os.Exit(armedMain(faultyFS()))
}

// armedNote is the note of VM "vm", nil if there is none, and whether its process lives.
func (l *lab) armedNote(t *testing.T) (*store.Armed, bool) {
	t.Helper()
	st, err := store.Open(t.Context(), vfs.OS, l.store, false)
	ok(t, err)
	note, lives, err := st.ArmedFor(t.Context(), "vm")
	ok(t, err)
	return note, lives
}

// isArmed waits until the process holds its stream, and returns its note: QEMU sends
// nothing more.
func (l *lab) isArmed(t *testing.T, vm *qemutest.VM) *store.Armed {
	t.Helper()
	note, lives := l.armedNote(t)
	if note == nil || !lives {
		t.Fatalf("not armed: %+v", note)
	}
	last, since := int64(-1), time.Now()
	until(t, "the hold", func() bool {
		info, err := migration.Query(t.Context(), vm.QMP)
		ok(t, err)
		if info.RAM == nil || info.RAM.Remaining != last {
			since = time.Now()
		}
		if info.RAM != nil {
			last = info.RAM.Remaining
		}
		return time.Since(since) > 300*time.Millisecond
	})
	return note
}

// notArmed fails if anything is left of an armed checkpoint.
func (l *lab) notArmed(t *testing.T, what string, note *store.Armed) {
	t.Helper()
	until(t, what+": the armed process's end", func() bool { return note == nil || !alive(note.PID) })
	if now, _ := l.armedNote(t); now != nil {
		t.Errorf("%s: there is a note of process %d", what, now.PID)
	}
	if note != nil {
		if _, err := os.Stat(filepath.Dir(note.Control)); err == nil {
			t.Errorf("%s: %s is there", what, note.Control)
		}
	}
	unfinished, err := filepath.Glob(l.store + "/tmp/*")
	ok(t, err)
	if len(unfinished) > 0 {
		t.Errorf("%s: %q", what, unfinished)
	}
}

// shadow compares a checkpoint with the guest that it was made of, which has not run
// since: pages that were not sent again too.
func (l *lab) shadow(t *testing.T, ctx context.Context, vm *qemutest.VM, name string) {
	t.Helper()
	cmd := exec.Command("flic-migrate", "restore", "--store", l.store, name)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v", cmd, err)
	}
	guest, err := tiertest.Load(bytes.NewReader(out))
	ok(t, err)
	saved := make(map[string][]byte)
	for i, b := range guest.Blocks {
		content := make([]byte, b.Used)
		for page := range b.Used / uint64(guest.PageSize) {
			copy(content[page*uint64(guest.PageSize):], guest.Pages[tiertest.PageID{Block: i, Page: page}])
		}
		saved[b.Name] = content
	}
	want := ram(t, ctx, vm)
	for name := range saved {
		if _, ok := want[name]; !ok {
			delete(saved, name) // a block that can't be read from outside
		}
	}
	if diff := qemutest.DiffRAM(want, saved); diff != "" {
		t.Errorf("%s is not the guest: %s", name, diff)
	}
}

// Armed checkpoints of a guest that writes are exact, round after round: pages that QEMU
// did not send again are what they were.
func TestArmed(t *testing.T) {
	t.Parallel()
	ctx, l := limit(t), newLab(t)
	c := q35.tiny(t, qemutest.LiveMemory, varied(4096), 60)
	vm := qemutest.Start(t, c)
	vm.WaitFor(t, `tick 00000002\r`)
	set(t, vm, map[string]any{"max-bandwidth": int64(33 << 20), "downtime-limit": 250}, "xbzrle")
	before := settings(t, vm)

	rep := l.checkpoint(t, vm, "--arm")
	for round := range 5 {
		if rep.Armed || rep.ArmedProcess == 0 {
			t.Fatalf("round %d: %+v", round, rep)
		}
		note := l.isArmed(t, vm)
		if list := l.run(t, "list"); !strings.HasSuffix(list, ", next armed\n") || strings.Count(list, "armed") != 1 {
			t.Errorf("round %d: %s", round, list)
		}
		// What it refers to stays.
		out, err := exec.Command("flic-migrate", "rm", "--store", l.store, note.Parent).CombinedOutput()
		if err == nil || !strings.Contains(string(out), "disarm vm") {
			t.Errorf("round %d: rm of the parent: %v, %s", round, err, out)
		}
		runsOn(t, vm)
		rep = l.checkpoint(t, vm, "--then", "pause")
		if !rep.Armed || rep.ArmedProcess != 0 || rep.State != "postmigrate" || rep.Save.Resent == 0 || len(rep.Warnings) > 0 {
			t.Errorf("round %d: %+v, %+v", round, rep, rep.Save)
		}
		if r := rep.Save; r.Parent != note.Parent || r.Unchanged < 2000 {
			t.Errorf("round %d: %d pages are as in %q, armed after %s", round, r.Unchanged, r.Parent, note.Parent)
		}
		t.Logf("round %d: %v in all, %v of it saving; %d pages came again, %d are unchanged, %d deltas", round, rep.Total,
			rep.Save.Seconds.Total, rep.Save.Resent, rep.Save.Unchanged, rep.Save.Delta)
		if m := l.show(t, rep.Checkpoint); m.RunState != "running" || time.Since(m.Created) > 30*time.Second {
			t.Errorf("round %d: %s, of %v", round, m.RunState, m.Created)
		}
		l.notArmed(t, fmt.Sprint("round ", round), note)
		if after := settings(t, vm); after != before {
			t.Errorf("settings were\n%s\nand are\n%s", before, after)
		}
		l.shadow(t, ctx, vm, rep.Checkpoint)
		ok(t, qmp.Cont(ctx, vm.QMP))
		runsOn(t, vm)
		rep = l.checkpoint(t, vm, "--arm")
	}
	l.run(t, "disarm", "vm")
	if after := settings(t, vm); after != before {
		t.Errorf("settings were\n%s\nand are\n%s", before, after)
	}
	runsOn(t, vm)
}

// bothWays restores a checkpoint eagerly and lazily: the memory is what it was, and the
// guest, a tiny one, goes on from its tick.
func (l *lab) bothWays(t *testing.T, ctx context.Context, c qemutest.Config, name string, want map[string][]byte, tick int) {
	t.Helper()
	vm := restored(t, ctx, c, l.restore(name), want)
	goesOn(t, ctx, vm, tick, 16)
	vm.Kill()
	vm = qemutest.Start(t, destination(c, "defer"))
	l.resume(t, vm, "--lazy", "always", "--paused", name)
	if diff := qemutest.DiffRAM(want, ram(t, ctx, vm)); diff != "" {
		t.Errorf("lazily restored RAM differs: %s", diff)
	}
	goesOn(t, ctx, vm, tick, 16)
}

// Ten in a row, each armed by the one before, and the last restored both ways.
func TestArmedAgain(t *testing.T) {
	t.Parallel()
	ctx, l := limit(t), newLab(t)
	c := q35.tiny(t, qemutest.LiveMemory, varied(4096), 60)
	vm := qemutest.Start(t, c)
	vm.WaitFor(t, `tick 00000002\r`)
	before := settings(t, vm)
	for round := range 10 {
		rep := l.checkpoint(t, vm, "--arm")
		if rep.Armed != (round > 0) || rep.ArmedProcess == 0 || rep.State != "running" || len(rep.Warnings) > 0 || rep.Downtime <= 0 {
			t.Fatalf("round %d: %+v", round, rep)
		}
		t.Logf("round %d: %v in all, the guest stood still for %v", round, rep.Total, rep.Downtime)
		runsOn(t, vm)
	}
	note := l.isArmed(t, vm)
	rep := l.checkpoint(t, vm, "--then", "pause")
	l.notArmed(t, "at the end", note)
	if after := settings(t, vm); after != before {
		t.Errorf("settings were\n%s\nand are\n%s", before, after)
	}
	want, tick := ram(t, ctx, vm), lastTick(t, vm.Console(), 16)
	vm.Kill()
	l.run(t, "verify", "--all")
	l.bothWays(t, ctx, c, rep.Checkpoint, want, tick)
}

// Whatever ends an armed checkpoint, the guest runs on, settings are as they were, and
// nothing is left.
func TestArmedEnds(t *testing.T) {
	t.Parallel()
	ctx, l := limit(t), newLab(t)
	c := q35.tiny(t, qemutest.LiveMemory, varied(4096), 20)
	vm := qemutest.Start(t, c)
	vm.WaitFor(t, `tick 00000002\r`)
	set(t, vm, map[string]any{"max-bandwidth": int64(33 << 20), "downtime-limit": 250}, "xbzrle")
	before := settings(t, vm)
	names := []string{}
	arm := func(flags ...string) *store.Armed {
		t.Helper()
		rep := l.checkpoint(t, vm, append([]string{"--arm"}, flags...)...)
		if rep.ArmedProcess == 0 {
			t.Fatalf("%+v", rep)
		}
		names = append(names, rep.Checkpoint)
		note, _ := l.armedNote(t)
		return note
	}
	held := func() *store.Armed {
		t.Helper()
		arm()
		return l.isArmed(t, vm)
	}
	// unchanged is called when the process has ended, or is dead.
	unchanged := func(what string, note *store.Armed) {
		t.Helper()
		l.notArmed(t, what, note)
		if after := settings(t, vm); after != before {
			t.Errorf("%s: settings were\n%s\nand are\n%s", what, before, after)
		}
		runsOn(t, vm)
		if have := l.list(t); fmt.Sprint(have) != fmt.Sprint(names) {
			t.Errorf("%s: the store lists %v, want %v", what, have, names)
		}
	}
	kill := func(note *store.Armed, s syscall.Signal) {
		t.Helper()
		ok(t, syscall.Kill(note.PID, s))
		until(t, "the armed process's end", func() bool { return !alive(note.PID) })
	}

	note := held()
	// What else wants to migrate says why it can't.
	out, err := exec.Command("flic-migrate", "track", "--qmp", vm.Socket, "--out", l.ws, "--interval", "1s").CombinedOutput()
	if err == nil || !strings.Contains(string(out), migration.ErrArmed.Error()) {
		t.Errorf("track: %v, %s", err, out)
	}
	other := newLab(t)
	other.attempts(t, nil, vm.Socket).fails(exitFailed, migration.ErrArmed.Error())
	l.gc(t)
	if now, lives := l.armedNote(t); now == nil || !lives || now.Part != note.Part {
		t.Errorf("after gc: %+v, %v", now, lives)
	}
	l.run(t, "disarm", "vm")
	unchanged("disarm by name", note)
	out, err = exec.Command("flic-migrate", "disarm", "--store", l.store, "vm").CombinedOutput()
	if code := err.(*exec.ExitError).ExitCode(); code != exitNotFound {
		t.Errorf("disarm of what is not armed: exit code %d, %s", code, out)
	}
	note = arm("--arm-rate", "4M") // far from the hold
	l.run(t, "disarm", "--qmp", vm.Socket)
	unchanged("disarm by monitor, in the first pass", note)
	note = held()
	other.run(t, "disarm", "--qmp", vm.Socket)
	until(t, "the end of the process", func() bool { return !alive(note.PID) })
	unchanged("disarm from another store", note)

	note = held()
	kill(note, syscall.SIGTERM)
	unchanged("SIGTERM", note)
	note = arm("--arm-rate", "4M")
	kill(note, syscall.SIGTERM)
	unchanged("SIGTERM in the first pass", note)
	note = held()
	ok(t, migration.Cancel(ctx, vm.QMP))
	until(t, "the armed process's end", func() bool { return !alive(note.PID) })
	unchanged("migrate_cancel", note)
	note = arm("--arm-rate", "4M")
	ok(t, migration.Cancel(ctx, vm.QMP))
	until(t, "the armed process's end", func() bool { return !alive(note.PID) })
	unchanged("migrate_cancel in the first pass", note)

	// Killed: the guest runs, and the next one puts settings back.
	for _, flags := range [][]string{nil, {"--arm-rate", "4M"}} {
		note = arm(flags...)
		if flags == nil {
			l.isArmed(t, vm)
		}
		kill(note, syscall.SIGKILL)
		ended(t, ctx, vm, migration.StatusFailed)
		runsOn(t, vm)
		rep := l.checkpoint(t, vm)
		names = append(names, rep.Checkpoint)
		if rep.Armed || len(rep.Warnings) > 0 {
			t.Errorf("after a kill: %+v", rep)
		}
		l.gc(t)
		unchanged("killed", note)
	}
	note = held()
	kill(note, syscall.SIGKILL)
	l.run(t, "disarm", "vm")
	l.gc(t)
	unchanged("killed, and disarmed", note)

	// Asked for otherwise: disarmed, and made anew.
	note = held()
	rep := l.checkpoint(t, vm, "--mode", "live")
	names = append(names, rep.Checkpoint)
	if rep.Armed || rep.Mode != migration.ModeLive {
		t.Errorf("live: %+v", rep)
	}
	unchanged("live", note)

	// The guest is paused by its user, and stays so.
	note = held()
	ok(t, qmp.Stop(ctx, vm.QMP))
	rep = l.checkpoint(t, vm)
	names = append(names, rep.Checkpoint)
	if !rep.Armed || rep.State != "postmigrate" || rep.Downtime != 0 || l.show(t, rep.Checkpoint).RunState != "paused" {
		t.Errorf("paused: %+v", rep)
	}
	l.shadow(t, ctx, vm, rep.Checkpoint)
	ok(t, qmp.Cont(ctx, vm.QMP))
	unchanged("paused", note)

	// QEMU ends.
	note = held()
	vm.Kill()
	l.notArmed(t, "QEMU killed", note)
	if have := l.list(t); fmt.Sprint(have) != fmt.Sprint(names) {
		t.Errorf("QEMU killed: the store lists %v, want %v", have, names)
	}
}

// An armed checkpoint that fails when it is made, or whose command or process is killed
// then, lets the guest run and leaves nothing.
func TestArmedFails(t *testing.T) {
	t.Parallel()
	ctx, l := limit(t), newLab(t)
	c := q35.tiny(t, qemutest.LiveMemory, varied(4096), 20)
	vm := qemutest.Start(t, c)
	vm.WaitFor(t, `tick 00000002\r`)
	before := settings(t, vm)
	// arm has the armed process, and none but it, on a file system with a fault.
	arm := func(f *fault) *store.Armed {
		t.Helper()
		f.mark = filepath.Join(l.dir, "mark")
		cmd := exec.Command("flic-migrate", "checkpoint", "--store", l.store, "--qmp", vm.Socket, "--arm", "vm")
		cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%s %d %d %d %s", faultEnv, f.op, f.n, f.stall, f.errno, f.mark))
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return l.isArmed(t, vm)
	}
	unchanged := func(what string, note *store.Armed, names ...string) {
		t.Helper()
		runsOn(t, vm)
		l.notArmed(t, what, note)
		if after := settings(t, vm); after != before {
			t.Errorf("%s: settings were\n%s\nand are\n%s", what, before, after)
		}
		l.holds(t, names...)
	}

	note := arm(&fault{op: "rename", n: 1, errno: unix.ENOSPC})
	l.attempts(t, nil, vm.Socket).fails(exitNoSpace, unix.ENOSPC.Error())
	unchanged("no space", note, "vm@1")

	stalled := func() *fault { return &fault{op: "rename", n: 1, stall: 2 * time.Second} }
	atGo := func(f *fault) *attempt {
		t.Helper()
		ok(t, os.RemoveAll(f.mark))
		a := l.attempts(t, nil, vm.Socket)
		waitForFile(t, f.mark)
		if s, err := qmp.QueryStatus(ctx, vm.QMP); err != nil || s.Running {
			t.Errorf("%+v, %v: the guest runs, so this shows nothing", s, err)
		}
		return a
	}

	// The command is asked to end.
	f := stalled()
	note = arm(f)
	a := atGo(f)
	ok(t, a.cmd.Process.Signal(syscall.SIGTERM))
	_ = a.cmd.Wait()
	names := l.list(t) // it may have been too late
	if code := a.cmd.ProcessState.ExitCode(); (code == 0) != (len(names) == 3) {
		t.Errorf("SIGTERM: exit code %d, %v\n%s", code, names, a.stderr.String())
	}
	unchanged("SIGTERM", note, names...)

	// The command is killed: the process lets the guest run.
	f = stalled()
	note = arm(f)
	a = atGo(f)
	ok(t, a.cmd.Process.Kill())
	_ = a.cmd.Wait()
	until(t, "the armed process's end", func() bool { return !alive(note.PID) })
	unchanged("the command killed", note, l.list(t)...)

	// The process is killed: an ordinary checkpoint is made.
	f = stalled()
	note = arm(f)
	a = atGo(f)
	ok(t, syscall.Kill(note.PID, syscall.SIGKILL))
	if err := a.cmd.Wait(); err != nil || !strings.Contains(a.stderr.String(), "ordinary") {
		t.Errorf("the process killed: %v, %s", err, a.stderr.String())
	}
	l.gc(t)
	unchanged("the process killed", note, l.list(t)...)

	// The process is stopped: it is killed, and an ordinary checkpoint is made.
	f = stalled()
	note = arm(f)
	a = atGo(f)
	ok(t, syscall.Kill(note.PID, syscall.SIGSTOP))
	if err := a.cmd.Wait(); err != nil || !strings.Contains(a.stderr.String(), "ordinary") || !strings.Contains(a.stderr.String(), "was killed") {
		t.Errorf("the process stopped: %v, %s", err, a.stderr.String())
	}
	l.gc(t)
	unchanged("the process stopped", note, l.list(t)...)

	// Likewise if it does not even say hello.
	note = arm(stalled())
	ok(t, syscall.Kill(note.PID, syscall.SIGSTOP))
	a = l.attempts(t, nil, vm.Socket)
	if err := a.cmd.Wait(); err != nil || !strings.Contains(a.stderr.String(), "ordinary") {
		t.Errorf("stopped before: %v, %s", err, a.stderr.String())
	}
	l.gc(t)
	unchanged("stopped before", note, l.list(t)...)

	// Both are killed: the next checkpoint lets the guest run.
	f = stalled()
	note = arm(f)
	a = atGo(f)
	ok(t, a.cmd.Process.Kill())
	ok(t, syscall.Kill(note.PID, syscall.SIGKILL))
	_ = a.cmd.Wait()
	ended(t, ctx, vm, migration.StatusFailed)
	l.gc(t) // and nobody knows the settings any more, which are QEMU's own here
	if rep := l.checkpoint(t, vm); rep.State != "running" || l.show(t, rep.Checkpoint).RunState != "running" {
		t.Errorf("both killed: %+v", rep)
	}
	ok(t, os.RemoveAll(filepath.Dir(note.Control)))
	unchanged("both killed", note, l.list(t)...)
}

// A monitor that carries no files, and a guest that is too small for what sockets take.
func TestArmedOverSockets(t *testing.T) {
	t.Parallel()
	ctx, l := limit(t), newLab(t)
	for _, memory := range []string{qemutest.LiveMemory, "327688K"} {
		port := freePort(t)
		c := q35.tiny(t, memory, varied(2048), 20)
		c.Args = append(c.Args, "-qmp", "tcp:"+port+",server=on,wait=off")
		vm := qemutest.Start(t, c)
		vm.WaitFor(t, `tick 00000002\r`)
		before := settings(t, vm)
		if memory == qemutest.LiveMemory {
			l.attempts(t, nil, port, "--arm").fails(exitFailed, "vm@1 is saved", "too little memory")
		} else {
			cmd := exec.Command("flic-migrate", "checkpoint", "--store", l.store, "--qmp", port, "--arm", "vm")
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			note := l.isArmed(t, vm)
			runsOn(t, vm)
			out := l.run(t, "checkpoint", "--qmp", port, "--then", "pause", "--json", "vm")
			if !strings.Contains(out, `"armed": true`) {
				t.Error(out)
			}
			l.notArmed(t, "made", note)
			l.shadow(t, ctx, vm, "vm")
			ok(t, qmp.Cont(ctx, vm.QMP))
		}
		runsOn(t, vm)
		if after := settings(t, vm); after != before {
			t.Errorf("settings were\n%s\nand are\n%s", before, after)
		}
		l.notArmed(t, memory, nil)
		vm.Kill()
	}
}

// Armed checkpoints with a working set put hot pages into NVRAM, and those that the guest
// writes while it is armed are what they were when it stood still. What is disarmed, or
// killed and collected, keeps no NVRAM.
func TestArmedNVRAM(t *testing.T) {
	t.Parallel()
	ctx, l := limit(t), newLab(t)
	c := q35.tiny(t, qemutest.LiveMemory, varied(4096), 60)
	vm := qemutest.Start(t, c)
	vm.WaitFor(t, `tick 00000002\r`)
	before := settings(t, vm)
	// Split, because l.hot makes words of an exec: URI.
	set := strings.Fields(strings.Join(l.hot(t, vm), " "))
	file := set[:4] // without the working set, which the armed process has

	l.checkpoint(t, vm, slices.Concat(set, []string{"--arm"})...)
	note := l.isArmed(t, vm)
	l.run(t, "disarm", "vm")
	l.notArmed(t, "disarmed", note)
	if freed := l.gc(t); freed.NVRAM != 0 || freed.Saves != 0 {
		t.Errorf("disarmed: gc has freed %+v", freed)
	}
	l.checkpoint(t, vm, slices.Concat(set, []string{"--arm"})...)
	note = l.isArmed(t, vm)
	ok(t, syscall.Kill(note.PID, syscall.SIGKILL))
	until(t, "the armed process's end", func() bool { return !alive(note.PID) })
	ended(t, ctx, vm, migration.StatusFailed)
	l.run(t, "disarm", "vm")
	if freed := l.gc(t); freed.NVRAM == 0 || freed.Saves != 1 {
		t.Errorf("killed: gc has freed %+v", freed)
	}

	l.checkpoint(t, vm, slices.Concat(set, []string{"--arm"})...)
	for round := range 4 {
		note := l.isArmed(t, vm)
		runsOn(t, vm)
		flags := [][]string{file, set}[round%2]
		rep := l.checkpoint(t, vm, slices.Concat(flags, []string{"--then", "pause"})...)
		if !rep.Armed || len(rep.Warnings) > 0 || rep.Tracking != nil {
			t.Errorf("round %d: %+v", round, rep)
		}
		r := rep.Save
		t.Logf("round %d: %d pages came again; %d hot, %d cold, %d unchanged, %d deltas, %d bytes to NVRAM", round, r.Resent, r.Hot, r.Cold, r.Unchanged, r.Delta, r.NVRAMBytes)
		if r.Resent == 0 || r.Hot == 0 || r.NVRAMBytes == 0 || r.Parent != note.Parent || r.Unchanged < 2000 {
			t.Errorf("round %d: %+v, armed after %s", round, r, note.Parent)
		}
		l.notArmed(t, fmt.Sprint("round ", round), note)
		l.shadow(t, ctx, vm, rep.Checkpoint)
		ok(t, qmp.Cont(ctx, vm.QMP))
		runsOn(t, vm)
		rep = l.checkpoint(t, vm, slices.Concat(set, []string{"--arm"})...)
		if rep.Armed || rep.ArmedProcess == 0 || len(rep.Warnings) > 0 {
			t.Errorf("round %d: %+v", round, rep)
		}
	}
	l.isArmed(t, vm)
	rep := l.checkpoint(t, vm, slices.Concat(file, []string{"--then", "pause"})...)
	if after := settings(t, vm); after != before {
		t.Errorf("settings were\n%s\nand are\n%s", before, after)
	}
	want, tick := ram(t, ctx, vm), lastTick(t, vm.Console(), 16)
	vm.Kill()
	l.run(t, "verify", "--all")
	// Nothing that the last one refers to goes with the others.
	for _, name := range l.list(t) {
		if name != rep.Checkpoint {
			l.run(t, "rm", name)
		}
	}
	l.gc(t)
	l.bothWays(t, ctx, c, rep.Checkpoint, want, tick)
}

// A domain of libvirt's, whose monitor nobody holds.
func TestDomainArmed(t *testing.T) {
	d := newDomainLab(t, "web1", qemutest.Linux, "flic.fill=16 flic.dirty=10", libvirtUser)
	vm := d.attach(t)
	vm.WaitFor(t, `tick 3\r`)
	before := settings(t, vm)
	flags := []string{"--domain", d.name, "--connect", d.uri()}
	for _, disarm := range []bool{true, false} {
		d.run(t, "checkpoint", append(flags, "--arm", "vm")...)
		note := d.isArmed(t, vm)
		runsOn(t, vm)
		if disarm {
			d.run(t, "disarm", "vm")
		} else {
			out := d.run(t, "checkpoint", append(flags, "--then", "pause", "--json", "vm")...)
			if !strings.Contains(out, `"armed": true`) {
				t.Error(out)
			}
			ok(t, qmp.Cont(t.Context(), vm.QMP))
		}
		d.notArmed(t, fmt.Sprint("disarmed ", disarm), note)
		runsOn(t, vm)
		if after := settings(t, vm); after != before {
			t.Errorf("settings were\n%s\nand are\n%s", before, after)
		}
	}
	d.run(t, "verify", "--all")
	d.Do(t, "destroy", d.name)
	d.run(t, "resume", append(flags, "vm")...)
	vm = d.attach(t)
	runsOn(t, vm)
	checks(t, vm)
}

// A process that can have the monitor holds the first pass near its end, but not where the guest
// has zeroed what is under way. If the guest has zeroed what comes after that, QEMU may come to
// the end of its pass: the guest runs, and nothing is armed. So it is if the process is killed on
// its way.
func TestArmedLater(t *testing.T) {
	t.Parallel()
	ctx := limit(t)
	const size = 98312 << 10 // qemutest.LiveMemory
	for name, c := range map[string]struct {
		args   []string
		zeroed int64 // so many of the last pages, after the parent was made
		left   int64 // at most
		gone   bool  // nothing may be armed in the end
	}{
		"full":        {left: 6000},                                   // some 600, but a busy host runs out of time
		"vga":         {args: []string{"-device", "VGA"}, left: 7200}, // its memory is all zeros, and behind the guest's
		"zeroed":      {zeroed: 9000, left: 7500},
		"end zeroed":  {zeroed: 1500, left: 7500, gone: true},
		"killed then": {left: 7500, gone: true},
	} {
		l := newLab(t)
		config := q35.tiny(t, qemutest.LiveMemory, varied((size-contentAt)/4096), 60)
		config.Args = append(config.Args, c.args...)
		vm := qemutest.Start(t, config)
		vm.WaitFor(t, `tick 00000002\r`)
		p, err := migration.Parameters(ctx, vm.QMP)
		ok(t, err)
		if p["avail-switchover-bandwidth"] != nil {
			// With that QEMU would take the pass for finished where it first stops.
			set(t, vm, map[string]any{"avail-switchover-bandwidth": int64(100 << 30)})
		}
		before := settings(t, vm)
		log := filepath.Join(l.dir, "log")
		rate := "100M"
		if c.zeroed > 0 {
			rate = "40M"
		}
		rep := l.checkpoint(t, vm, "--arm", "--arm-log", log, "--arm-rate", rate)
		note, lives := l.armedNote(t)
		if rep.ArmedProcess == 0 || !lives {
			t.Fatalf("%s: %+v", name, rep)
		}
		if c.zeroed > 0 {
			zero(t, ctx, vm, size-c.zeroed*4096, (c.zeroed-10)*4096)
		}
		if name == "killed then" {
			until(t, "the last part of the way", func() bool {
				info, err := migration.Query(ctx, vm.QMP)
				ok(t, err)
				return info.RAM != nil && info.RAM.Remaining/4096 < 7000
			})
			ok(t, syscall.Kill(note.PID, syscall.SIGKILL))
		}
		held := false
		until(t, "the hold", func() bool {
			text, err := os.ReadFile(log)
			ok(t, err)
			held = strings.Contains(string(text), "held in the first pass")
			return held || !alive(note.PID)
		})
		text, err := os.ReadFile(log)
		ok(t, err)
		info, err := migration.Query(ctx, vm.QMP)
		ok(t, err)
		t.Logf("%s: held is %v, %s", name, held, text)
		runsOn(t, vm)
		if held {
			if left := info.RAM.Remaining / 4096; info.Status != migration.StatusActive || info.RAM.DirtySyncCount != 1 || left < 128 || left > c.left {
				t.Errorf("%s: %s, %+v", name, info.Status, info.RAM)
			}
		} else if !c.gone {
			t.Errorf("%s: nothing is armed", name)
		}
		rep = l.checkpoint(t, vm, "--then", "pause")
		if rep.Armed != held || len(rep.Warnings) > 0 {
			t.Errorf("%s: %+v", name, rep)
		}
		l.gc(t)
		l.notArmed(t, name, note)
		if c.zeroed == 0 || !held { // it was zeroed behind QEMU's back
			l.shadow(t, ctx, vm, rep.Checkpoint)
		}
		if after := settings(t, vm); after != before {
			t.Errorf("%s: settings were\n%s\nand are\n%s", name, before, after)
		}
		vm.Kill()
	}
}

// zero overwrites guest memory from outside.
func zero(t *testing.T, ctx context.Context, vm *qemutest.VM, at, size int64) {
	t.Helper()
	text, err := qmp.HumanMonitor(ctx, vm.QMP, fmt.Sprintf("gpa2hva %#x", at))
	ok(t, err)
	var host int64
	_, err = fmt.Sscanf(text[strings.LastIndex(text, "0x"):], "%v", &host)
	ok(t, err)
	mem, err := os.OpenFile(fmt.Sprintf("/proc/%d/mem", vm.Pid()), os.O_WRONLY, 0)
	ok(t, err)
	defer mem.Close()
	_, err = mem.WriteAt(make([]byte, size), host)
	ok(t, err)
}
