package main

import (
	"encoding/json"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
)

// checkpoint saves VM "vm" through the monitor, which must succeed.
func (l *lab) checkpoint(t *testing.T, vm *qemutest.VM, flags ...string) (rep checkpointReport) {
	t.Helper()
	out := l.run(t, "checkpoint", append([]string{"--qmp", vm.Socket, "--json", "vm"}, flags...)...)
	ok(t, json.Unmarshal([]byte(out), &rep))
	return rep
}

// pulse watches a guest's counter from outside.
type pulse struct {
	stop chan struct{}
	done chan struct{}
	// longest is the longest time between two ticks; late is by how much this
	// process itself was late at worst: what a busy host does to all of us.
	longest, late time.Duration
	ticks         int
}

func pulseOf(vm *qemutest.VM) *pulse {
	p := &pulse{stop: make(chan struct{}), done: make(chan struct{})}
	const every = 5 * time.Millisecond
	go func() {
		defer close(p.done)
		count := func() int { return strings.Count(vm.Console(), "tick ") }
		seen, at := count(), time.Now()
		for last := at; ; {
			select {
			case <-p.stop:
				return
			case <-time.After(every):
			}
			now := time.Now()
			p.late = max(p.late, now.Sub(last)-every)
			last = now
			if n := count(); n != seen {
				p.longest = max(p.longest, now.Sub(at))
				p.ticks += n - seen
				seen, at = n, now
			}
		}
	}()
	return p
}

func (p *pulse) end() *pulse {
	close(p.stop)
	<-p.done
	return p
}

// A running guest of 512 MiB in each mode: it goes on, its counter stands still
// for no longer than the report says, settings stay, and what was saved runs.
func TestCheckpointModes(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	c := q35.linux("524296K", "flic.fill=96 flic.dirty=20") // 512 MiB and a little: see LiveMemory
	vm := qemutest.Start(t, c)
	vm.WaitFor(t, `flic ready`)
	vm.WaitFor(t, `tick 3\r`)
	set(t, vm, map[string]any{"max-bandwidth": int64(33 << 20), "downtime-limit": 250}, "xbzrle")
	before := settings(t, vm)
	usual := pulseOf(vm)
	time.Sleep(2 * time.Second)
	usual.end()

	for i, mode := range []string{"stop", "live", "background"} {
		p := pulseOf(vm)
		rep := l.checkpoint(t, vm, "--mode", mode, "--nvram", l.nvram, "--nvram-size", "256M", "--timer", "1500ms")
		runsOn(t, vm)
		p.end()
		r := rep.Save
		t.Logf("%s: downtime %v (QEMU: %v), longest pause of the counter %v (usually %v, this process %v), total %v, tracking %v, %d passes; %d hot, %d resent, %d superseded, flash %d, NVRAM %d bytes",
			mode, rep.Downtime, rep.QEMUDowntime, p.longest, usual.longest, p.late, rep.Total, rep.Tracking.Watched, rep.Passes, r.Hot, r.Resent, r.Superseded, r.FlashBytes, r.NVRAMBytes)
		// A tick comes each 100 ms, and some work with it, which takes longer
		// while the host saves.
		noise := usual.longest + p.late + 500*time.Millisecond
		if mode == "stop" {
			// No upper bound: in a guest's first migration, which is the
			// tracking's, TCG holds everything up for as long as it takes to
			// look at each page of a RAM of such a size.
			if p.longest < rep.Downtime {
				t.Errorf("%s: the counter stood still for %v only, the report says %v", mode, p.longest, rep.Downtime)
			}
		} else if p.longest > rep.Downtime+noise {
			t.Errorf("%s: the counter stood still for %v, the report says %v", mode, p.longest, rep.Downtime)
		}
		if rep.Downtime <= 0 || rep.Downtime > rep.Total || mode != "stop" && rep.Downtime < rep.QEMUDowntime-50*time.Millisecond {
			t.Errorf("%s: %+v", mode, rep)
		}
		if string(rep.Mode) != mode || rep.State != "running" || !rep.Converged || len(rep.Warnings) > 0 {
			t.Errorf("%s: %+v", mode, rep)
		}
		if r.Hot < 100 || r.Hot > r.Pages/4 || r.Cold+r.Unchanged < 10000 || rep.Tracking.Hot == 0 {
			t.Errorf("%s: %+v", mode, r)
		}
		if after := settings(t, vm); after != before {
			t.Errorf("%s: settings were\n%s\nand are\n%s", mode, before, after)
		}
		if m := l.show(t, rep.Checkpoint); m.RunState != "running" || rep.Checkpoint != []string{"vm@1", "vm@2", "vm@3"}[i] {
			t.Errorf("%s: %s of a guest that is %s", mode, rep.Checkpoint, m.RunState)
		}
	}
	checks(t, vm)
	vm.Kill()
	l.holds(t, "vm@1", "vm@2", "vm@3")
	for _, name := range []string{"vm@1", "vm@2", "vm@3"} {
		vm := qemutest.Start(t, destination(c, "defer"))
		// The devices of vm@1 say that the guest was paused; either way it is
		// to run.
		lazy := map[bool]string{true: "always", false: "never"}[name == "vm@1"]
		if doc, _ := l.resume(t, vm, "--lazy", lazy, name); doc.State != "running" {
			t.Errorf("%s: %+v", name, doc)
		}
		runsOn(t, vm)
		checks(t, vm)
		vm.Kill()
	}
}

// What becomes of the guest afterwards, and that what was saved is its memory,
// byte for byte. QEMU may start no processes, and the monitors are of both kinds.
func TestCheckpointThen(t *testing.T) {
	for _, test := range []struct {
		name   string
		paused bool // before
		flags  []string
		state  string
	}{
		{"stop, pause", false, []string{"--then", "pause"}, "postmigrate"},
		{"live, pause", false, []string{"--mode", "live", "--downtime", "20ms", "--then", "pause"}, "postmigrate"},
		{"impatient, pause", false, []string{"--mode", "live", "--patience", "1ns", "--then", "pause"}, "postmigrate"},
		{"paused, background", true, []string{"--mode", "background"}, "postmigrate"},
		{"live, quit", false, []string{"--mode", "live", "--then", "quit"}, "ended"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			ctx, l := limit(t), newLab(t)
			c := q35.tiny(t, qemutest.LiveMemory, varied(2048), 60)
			source := c
			port := freePort(t)
			source.Args = append(slices.Clone(c.Args), "-sandbox", "on,spawn=deny", "-qmp", "tcp:"+port+",server=on,wait=off")
			vm := qemutest.Start(t, source)
			vm.WaitFor(t, `tick 00000002\r`)
			flags := append(test.flags, l.hot(t, vm)...)
			if test.paused {
				ok(t, qmp.Stop(ctx, vm.QMP))
				flags = append(flags, "--qmp", port)
			}
			// Split, because l.hot makes words of an exec: URI.
			rep := l.checkpoint(t, vm, strings.Fields(strings.Join(flags, " "))...)
			if rep.State != test.state || rep.Downtime != 0 || rep.Ran == test.paused {
				t.Errorf("%+v", rep)
			}
			if impatient := strings.HasPrefix(test.name, "impatient"); rep.Converged == impatient || (len(rep.Warnings) > 0) != impatient {
				t.Errorf("%+v", rep)
			}
			tick := lastTick(t, vm.Console(), 16)
			if test.state == "ended" {
				ok(t, vm.ExitError())
				vm = qemutest.Start(t, destination(c, "defer"))
				l.resume(t, vm, "--lazy", "never", "vm")
				runsOn(t, vm)
				if now := lastTick(t, vm.Console(), 16); now <= tick {
					t.Errorf("the counter was at %d and is at %d", tick, now)
				}
				return
			}
			want := ram(t, ctx, vm)
			// It has not run since, and QEMU does not save it again.
			l.attempts(t, nil, vm.Socket).fails(exitFailed, migration.ErrPostmigrate.Error())
			l.holds(t, "vm@1")
			before := "running"
			if test.paused {
				before = "paused"
			}
			if m := l.show(t, "vm@1"); m.RunState != before {
				t.Errorf("saved as %s, was %s", m.RunState, before)
			}
			vm.Kill()
			vm = restored(t, ctx, c, l.restore("vm"), want)
			goesOn(t, ctx, vm, tick, 16)
		})
	}
}

// Checkpoints that --keep-last does not keep go when the new one is made; what is being
// restored stays until the next time, and the checkpoint has succeeded all the same.
func TestCheckpointKeepLast(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	vm := qemutest.Start(t, q35.tiny(t, qemutest.LiveMemory, varied(1024), 60))
	vm.WaitFor(t, `tick 00000002\r`)
	left := func(want string) {
		t.Helper()
		var list []listEntry
		ok(t, json.Unmarshal([]byte(l.run(t, "list", "--json")), &list))
		var names []string
		for _, e := range list {
			names = append(names, e.Checkpoint)
		}
		if got := strings.Join(names, " "); got != want {
			t.Errorf("there are %s, want %s", got, want)
		}
	}
	l.checkpoint(t, vm)
	l.checkpoint(t, vm, "--keep-last", "2")
	left("vm@1 vm@2")
	// A reader that has begun: nobody takes what it writes.
	r, w, err := os.Pipe()
	ok(t, err)
	reader := exec.Command("flic-migrate", "restore", "--store", l.store, "vm@1")
	reader.Stdout = w
	ok(t, reader.Start())
	w.Close()
	_, err = r.Read(make([]byte, 1))
	ok(t, err)
	l.checkpoint(t, vm, "--keep-last", "1")
	left("vm@1 vm@3")
	r.Close()
	reader.Wait()
	l.checkpoint(t, vm, "--keep-last", "1")
	left("vm@4")
	l.holds(t, "vm@4")
	// What is armed then has nothing open that is to go.
	l.checkpoint(t, vm, "--keep-last", "1", "--arm")
	left("vm@5")
	shown := func(want bool) {
		t.Helper()
		var doc showDoc
		ok(t, json.Unmarshal([]byte(l.run(t, "show", "--json", "vm")), &doc))
		if text := l.run(t, "show", "vm@5"); doc.Armed != want || regexp.MustCompile(`(?m)^next +armed$`).MatchString(text) != want {
			t.Errorf("armed: %v, want %v\n%s", doc.Armed, want, text)
		}
	}
	shown(true)
	l.run(t, "disarm", "vm")
	shown(false)
	l.holds(t, "vm@5")
	runsOn(t, vm)
}
