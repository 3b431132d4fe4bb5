package main

import (
	"encoding/json"
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
)

// guests are three small ones.
type guests struct {
	names   []string
	configs []qemutest.Config
	vms     []*qemutest.VM
}

func newGuests(t *testing.T, perTick int) *guests {
	t.Helper()
	g := &guests{names: []string{"db", "web", "www"}}
	for i := range g.names {
		g.configs = append(g.configs, q35.tiny(t, qemutest.LiveMemory, append(varied(1024), noise(256*(i+1))...), perTick))
		g.vms = append(g.vms, qemutest.Start(t, g.configs[i]))
	}
	for _, vm := range g.vms {
		vm.WaitFor(t, `tick 00000002\r`)
	}
	return g
}

// destinations are QEMUs that the guests can be resumed into.
func (g *guests) destinations(t *testing.T) *guests {
	t.Helper()
	to := &guests{names: g.names, configs: g.configs}
	for _, c := range g.configs {
		to.vms = append(to.vms, qemutest.Start(t, destination(c, "defer")))
	}
	return to
}

// members are the group's arguments.
func (g *guests) members() (args []string) {
	for i, vm := range g.vms {
		args = append(args, g.names[i]+"="+vm.Socket)
	}
	return args
}

func (l *lab) group(t *testing.T, g *guests, flags ...string) (rep groupReport) {
	t.Helper()
	out := l.run(t, "checkpoint", slices.Concat([]string{"--group", "shop", "--json"}, flags, g.members())...)
	ok(t, json.Unmarshal([]byte(out), &rep))
	return rep
}

func (l *lab) groups(t *testing.T, args ...string) (list []groupEntry) {
	t.Helper()
	if l.none() {
		return nil
	}
	ok(t, json.Unmarshal([]byte(l.run(t, "list", append([]string{"--group", "--json"}, args...)...)), &list))
	return list
}

// Guests that are saved as a group, stopped and live: they stand still at one moment and go
// on, settings stay, and what was saved are their memories at that moment. list, show and
// rm know the group.
func TestGroupModes(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	g := newGuests(t, 20)
	set(t, g.vms[1], map[string]any{"max-bandwidth": int64(33 << 20), "downtime-limit": 250}, "xbzrle")
	var before []string
	for _, vm := range g.vms {
		before = append(before, settings(t, vm))
	}
	for i, mode := range []string{"stop", "live"} {
		rep := l.group(t, g, "--mode", mode)
		t.Logf("%s: stopped within %v, stood still for %v at most, %v in all", mode, rep.Skew, rep.Downtime, rep.Total)
		for j, vm := range g.vms {
			runsOn(t, vm)
			if after := settings(t, vm); after != before[j] {
				t.Errorf("%s: settings were\n%s\nand are\n%s", mode, before[j], after)
			}
		}
		name := fmt.Sprintf("shop@%d", i+1)
		if rep.Group != name || rep.SkewBy != "events" || rep.Skew <= 0 || rep.Skew > 10*time.Second || rep.Downtime <= 0 || rep.ExitCode != 0 || string(rep.Mode) != mode {
			t.Errorf("%+v", rep)
		}
		for j, m := range rep.Members {
			if m.VM != g.names[j] || m.Checkpoint != fmt.Sprintf("%s@%d", g.names[j], i+1) || m.State != "running" || m.Downtime <= 0 || len(m.Warnings) > 0 || m.Stopped.IsZero() {
				t.Errorf("%s: %+v", mode, m)
			}
			if string(m.Mode) != mode || mode == "live" && m.Save.Resent+m.Save.Superseded == 0 {
				t.Errorf("%s: %+v, %+v", mode, m, m.Save)
			}
		}
		// Most of what they have in common is stored once.
		var peers int64
		for _, m := range rep.Members {
			peers += m.Save.Peers
		}
		if i == 0 && peers < 1500 {
			t.Errorf("%s: %d pages are another member's", mode, peers)
		}
		if meta := l.show(t, fmt.Sprintf("web@%d", i+1)); meta.RunState != "running" {
			t.Errorf("%s: saved as %s", mode, meta.RunState)
		}
	}
	l.holds(t, "db@1", "db@2", "web@1", "web@2", "www@1", "www@2")
	list := l.groups(t)
	if len(list) != 2 || list[1].Group != "shop@2" || list[1].Mode != "live" || len(list[1].Members) != 3 || list[1].FlashBytes == 0 ||
		list[0].Members[2].Checkpoint != "www@1" || list[0].Members[2].Group != "shop@1" {
		t.Errorf("%+v", list)
	}
	if text := l.run(t, "show", "web@2"); !strings.Contains(text, "shop@2") {
		t.Errorf("show says nothing of the group:\n%s", text)
	}
	if text := l.run(t, "list", "web"); !strings.Contains(text, "in shop@1") {
		t.Errorf("list says nothing of the group:\n%s", text)
	}

	// Each is a checkpoint like any other.
	for _, vm := range g.vms {
		vm.Kill()
	}
	vm := qemutest.Start(t, destination(g.configs[1], "defer"))
	l.resume(t, vm, "web@2")
	runsOn(t, vm)
	vm.Kill()
	// And all of them are resumed as one, both ways.
	for i, lazy := range []string{"always", "never"} {
		to := g.destinations(t)
		name := fmt.Sprintf("shop@%d", i+1)
		var rep groupResumeReport
		file := filepath.Join(l.dir, "shop.prom")
		ok(t, json.Unmarshal([]byte(l.run(t, "resume", slices.Concat([]string{"--group", name, "--json", "--lazy", lazy, "--metrics", file}, to.members())...)), &rep))
		for _, vm := range g.names {
			// The member's server writes it, without the one that has started it.
			of := metricsBeside(file, vm)
			until(t, "the metrics of "+vm, func() bool {
				b, err := os.ReadFile(of)
				return err == nil && strings.Contains(string(b), "exit_code")
			})
			if got := lintMetrics(t, of); got["flic_migrate_pages_sent verb=restore vm="+vm] == 0 {
				t.Errorf("metrics of %s: %v", vm, got)
			}
			ok(t, os.Remove(of))
		}
		t.Logf("%s, lazy %s: running after %v, resident after %v", name, lazy, rep.Running, rep.Resident)
		for j, row := range rep.Members {
			runsOn(t, to.vms[j])
			if row.VM != g.names[j] || row.State != "running" || row.Lazy != (lazy == "always") || row.Error != "" || len(row.Warnings) > 0 || row.Running > rep.Running {
				t.Errorf("%+v", row)
			}
		}
		if rep.Group != name || rep.Running <= 0 || rep.Resident < rep.Running || rep.ExitCode != 0 {
			t.Errorf("%+v", rep)
		}
	}
	l.run(t, "rm", "db@1", "db@2")
	l.run(t, "verify", "web@1", "www@1", "web@2", "www@2") // with bytes that the removed one had
	if text := l.run(t, "show", "--group", "shop"); !strings.Contains(text, "removed") || !strings.Contains(l.run(t, "list", "--group"), "2 of 3") {
		t.Errorf("a member is missing:\n%s", text)
	}
	l.run(t, "rm", "--group", "shop@2")
	l.holds(t, "web@1", "www@1")
	l.run(t, "rm", "--group", "--all", "shop")
	l.nothing(t)
	if list := l.groups(t); len(list) > 0 {
		t.Errorf("%+v", list)
	}
}

// Whatever goes wrong with one member, there is no group and nothing of one, and all the
// other guests run on.
func TestGroupFailures(t *testing.T) {
	t.Parallel()
	ctx, l := limit(t), newLab(t)
	g := newGuests(t, 10)
	var before []string
	for _, vm := range g.vms {
		before = append(before, settings(t, vm))
	}
	args := func(flags ...string) []string {
		return slices.Concat([]string{"--group", "shop"}, flags, g.members())
	}
	unchanged := func(what string) {
		t.Helper()
		for i, vm := range g.vms {
			runsOn(t, vm)
			if after := settings(t, vm); after != before[i] {
				t.Errorf("%s: settings were\n%s\nand are\n%s", what, before[i], after)
			}
		}
		l.nothing(t)
		if list := l.groups(t); len(list) > 0 {
			t.Errorf("%s: %+v", what, list)
		}
		if freed := l.gc(t); freed.Saves > 0 {
			t.Errorf("%s: this was left for gc: %+v", what, freed)
		}
	}
	slow := func() *fault { return &fault{op: "write", n: 5, stall: time.Second} }
	for _, mode := range []string{"stop", "live"} {
		// Interrupted.
		a := l.attemptsWith(t, slow(), args("--mode", mode)...)
		ok(t, a.cmd.Process.Signal(syscall.SIGTERM))
		a.fails(exitFailed, "stopped by signal: terminated")
		unchanged("terminated in mode " + mode)
		// The store is full: early in one, and when all are to get their names.
		for _, f := range []fault{{op: "write", n: 2, errno: unix.ENOSPC}, {op: "write", n: 7, errno: unix.ENOSPC}, {op: "rename", n: 2, errno: unix.ENOSPC}, {op: "syncdir", n: 3, errno: unix.EIO}} {
			code, says := exitNoSpace, unix.ENOSPC.Error()
			if f.errno == unix.EIO {
				code, says = exitFailed, f.errno.Error()
			}
			l.attemptsWith(t, &f, args("--mode", mode)...).fails(code, says, "no group was made")
			unchanged(fmt.Sprintf("%s %d fails in mode %s", f.op, f.n, mode))
		}
		// One migration is cancelled by somebody.
		a = l.attemptsWith(t, slow(), args("--mode", mode)...)
		ok(t, migration.Cancel(ctx, g.vms[1].QMP))
		a.fails(exitFailed, "web: ")
		unchanged("one is cancelled in mode " + mode)
		// Killed, the others let all guests run.
		a = l.attemptsWith(t, slow(), args("--mode", mode)...)
		ok(t, a.cmd.Process.Kill())
		_ = a.cmd.Wait()
		for i, vm := range g.vms {
			// QEMU sees the end of its stream, or is told by who guards the process; who is first.
			_, err := migration.Wait(ctx, vm.QMP, migration.StatusFailed, migration.StatusCancelled)
			ok(t, err)
			runsOn(t, vm)
			until(t, "the settings", func() bool { return settings(t, vm) == before[i] })
		}
		l.gc(t)
		unchanged("killed in mode " + mode)
	}
	// One is no QEMU, one is busy.
	l.attemptsWith(t, nil, append(args(), "x="+filepath.Join(l.dir, "none"))...).fails(exitNotFound, "x: ")
	unchanged("no QEMU")
	ok(t, migration.Start(ctx, g.vms[2].QMP, "exec:exec sleep 1"))
	l.attemptsWith(t, nil, args()...).fails(exitFailed, "www: ", "already running")
	ended(t, ctx, g.vms[2], migration.StatusFailed)
	unchanged("one is migrated")

	// Killed when all is committed and only some have their names: all are there.
	a := l.attemptsWith(t, &fault{op: "rename", n: 2, stall: time.Minute}, args()...)
	ok(t, a.cmd.Process.Kill())
	_ = a.cmd.Wait()
	for _, vm := range g.vms {
		_, err := migration.Wait(ctx, vm.QMP, migration.StatusFailed, migration.StatusCancelled)
		ok(t, err)
		runsOn(t, vm)
	}
	l.holds(t, "db@1", "web@1", "www@1")
	if list := l.groups(t); len(list) != 1 || list[0].removed() > 0 {
		t.Errorf("%+v", list)
	}
	l.run(t, "rm", "--group", "shop@1")

	// A QEMU ends, in both modes.
	for i, mode := range []string{"stop", "live"} {
		a := l.attemptsWith(t, slow(), args("--mode", mode)...)
		g.vms[0].Kill()
		// Its monitor is lost, or its stream has ended; who sees it first.
		_ = a.cmd.Wait()
		if code := a.cmd.ProcessState.ExitCode(); code != exitFailed && code != exitStream || !strings.Contains(a.stderr.String(), "no group was made: "+g.names[0]+": ") {
			t.Errorf("exit code %d: %s", code, a.stderr.String())
		}
		g.names, g.vms, before = g.names[1:], g.vms[1:], before[1:]
		unchanged(fmt.Sprintf("QEMU %d was killed in mode %s", i, mode))
	}
	// What was armed is disarmed for it.
	l.run(t, "checkpoint", "--arm", "--qmp", g.vms[0].Socket, g.names[0])
	if rep := l.group(t, g); rep.Group == "" || rep.Members[0].Armed || rep.Members[0].State != "running" {
		t.Errorf("%+v", rep)
	}
	unarmed := exec.Command("flic-migrate", "disarm", "--store", l.store, g.names[0])
	if out, _ := unarmed.CombinedOutput(); unarmed.ProcessState.ExitCode() != exitNotFound {
		t.Errorf("still armed: %s", out)
	}
	runsOn(t, g.vms[0])
	if after := settings(t, g.vms[0]); after != before[0] {
		t.Errorf("settings were\n%s\nand are\n%s", before[0], after)
	}
}

// If one member can't be resumed, none of the others runs; they have all of their memory,
// and can be let run.
func TestGroupResumeFails(t *testing.T) {
	t.Parallel()
	ctx, l := limit(t), newLab(t)
	g := newGuests(t, 20)
	l.group(t, g)
	for _, vm := range g.vms {
		vm.Kill()
	}
	for _, lazy := range []string{"always", "never"} {
		to := g.destinations(t)
		to.vms[1].Kill()
		other := g.configs[1]
		other.Memory = "90112K"
		to.vms[1] = qemutest.Start(t, destination(other, "defer"))
		cmd := exec.Command("flic-migrate", slices.Concat([]string{"resume", "--store", l.store, "--group", "shop", "--json", "--lazy", lazy}, to.members())...)
		out, _ := cmd.Output()
		var rep groupResumeReport
		ok(t, json.Unmarshal(out, &rep))
		if cmd.ProcessState.ExitCode() != exitFailed || rep.ExitCode != exitFailed || !strings.Contains(rep.Error, "web: ") || rep.Members[1].Error == "" {
			t.Errorf("%+v", rep)
		}
		for _, j := range []int{0, 2} {
			if row := rep.Members[j]; row.State != "paused" || row.Error != "" || len(row.Warnings) != 1 || !strings.Contains(row.Warnings[0], "stays paused: web: ") {
				t.Errorf("%+v", row)
			}
			ok(t, qmp.Cont(ctx, to.vms[j].QMP))
			runsOn(t, to.vms[j])
		}
		for _, vm := range to.vms {
			vm.Kill()
		}
	}
	// What is in no group, or not given, is said before any QEMU is touched.
	to := g.destinations(t)
	for _, args := range [][]string{{"x=" + to.vms[0].Socket}, {"--recover", "db=" + to.vms[0].Socket}, {"--print", "db=" + to.vms[0].Socket}, {"--qmp", "/none", "db=" + to.vms[0].Socket}} {
		cmd := exec.Command("flic-migrate", slices.Concat([]string{"resume", "--store", l.store, "--group", "shop"}, args)...)
		if out, _ := cmd.CombinedOutput(); cmd.ProcessState.ExitCode() != exitUsage {
			t.Errorf("%v: %s", args, out)
		}
	}
	l.run(t, "rm", "web@1")
	cmd := exec.Command("flic-migrate", slices.Concat([]string{"resume", "--store", l.store, "--group", "shop"}, to.members())...)
	if out, _ := cmd.CombinedOutput(); cmd.ProcessState.ExitCode() != exitNotFound || !strings.Contains(string(out), "web@1") {
		t.Errorf("%s", out)
	}
	// Without it the others are resumed.
	cmd = exec.Command("flic-migrate", slices.Concat([]string{"resume", "--store", l.store, "--group", "shop"}, to.members()[:1], to.members()[2:])...)
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "2 guests run") {
		t.Errorf("%v\n%s", err, out)
	}
	runsOn(t, to.vms[0])
	runsOn(t, to.vms[2])
}

// What can't be meant is refused, and asks no QEMU.
func TestGroupUsage(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := filepath.Join(dir, "members")
	ok(t, os.WriteFile(file, []byte("# one\n\n a=/none \n"), 0o600))
	for _, test := range []struct {
		args []string
		code int
	}{
		{[]string{"checkpoint", "--group", "g"}, exitUsage},
		{[]string{"checkpoint", "--group", "", "a=/none"}, exitUsage},
		{[]string{"checkpoint", "--group", "g@1", "a=/none"}, exitUsage},
		{[]string{"checkpoint", "--group", "g", "a"}, exitUsage},
		{[]string{"checkpoint", "--group", "g", "a="}, exitUsage},
		{[]string{"checkpoint", "--group", "g", "a/b=/none"}, exitUsage},
		{[]string{"checkpoint", "--group", "g", "a=/none", "a=/other"}, exitUsage},
		{[]string{"checkpoint", "--group", "g", "--members", file, "a=/other"}, exitUsage},
		{[]string{"checkpoint", "--members", file, "--qmp", "/none", "a"}, exitUsage},
		{[]string{"checkpoint", "--group", "g", "--qmp", "/none", "a=/none"}, exitUsage},
		{[]string{"checkpoint", "--group", "g", "--mode", "background", "a=/none"}, exitUsage},
		{[]string{"checkpoint", "--group", "g", "--arm", "a=/none"}, exitUsage},
		{[]string{"checkpoint", "--group", "g", "--guest-sync", "a=/none"}, exitUsage},
		{[]string{"checkpoint", "--group", "g", "--members", file}, exitNotFound},
		{[]string{"checkpoint", "--group", "g", "a=/none", "b=/none"}, exitFailed}, // the same QEMU twice
		{[]string{"list", "--group", "g"}, exitNotFound},
		{[]string{"show", "--group", "g"}, exitNotFound},
		{[]string{"rm", "--group", "g"}, exitUsage},
		{[]string{"rm", "--group", "g@1"}, exitNotFound},
		{[]string{"rm", "--group", "--all", "g@1"}, exitUsage},
	} {
		cmd := exec.Command("flic-migrate", append(test.args, "--store", filepath.Join(dir, "store"))...)
		out, _ := cmd.CombinedOutput()
		if code := cmd.ProcessState.ExitCode(); code != test.code {
			t.Errorf("%v: exit code %d, want %d\n%s", test.args, code, test.code, out)
		}
	}
}
