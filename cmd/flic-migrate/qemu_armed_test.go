package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

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
		runsOn(t, vm)
		rep = l.checkpoint(t, vm, "--then", "pause")
		if !rep.Armed || rep.ArmedProcess != 0 || rep.State != "postmigrate" || rep.Save.Resent == 0 || len(rep.Warnings) > 0 {
			t.Errorf("round %d: %+v, %+v", round, rep, rep.Save)
		}
		t.Logf("round %d: %v in all, %v of it saving; %d pages came again", round, rep.Total, rep.Save.Seconds.Total, rep.Save.Resent)
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
	vm = restored(t, ctx, c, l.restore(rep.Checkpoint), want)
	goesOn(t, ctx, vm, tick, 16)
	vm.Kill()
	vm = qemutest.Start(t, destination(c, "defer"))
	l.resume(t, vm, "--lazy", "always", "--paused", rep.Checkpoint)
	if diff := qemutest.DiffRAM(want, ram(t, ctx, vm)); diff != "" {
		t.Errorf("lazily restored RAM differs: %s", diff)
	}
	goesOn(t, ctx, vm, tick, 16)
}
