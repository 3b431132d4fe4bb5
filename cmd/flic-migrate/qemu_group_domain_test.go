package main

import (
	"encoding/json"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flic-migrate/flic-migrate/qmp/libvirt/domain"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
)

// groupedDomains are two domains of one libvirtd, each with a disk, and a QEMU of nobody's.
type groupedDomains struct {
	*domainLab
	names []string
	vms   []*qemutest.VM // db, web; www is the last, and no domain
	free  qemutest.Config
}

func newGroupedDomains(t *testing.T) *groupedDomains {
	t.Helper()
	g := &groupedDomains{domainLab: &domainLab{host: newHost(t, qemutest.LibvirtConfig{}), lab: newLab(t)}, names: []string{"db", "web"}}
	for _, name := range g.names {
		disk := g.path(name + ".disk.qcow2")
		out, err := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", disk, "16M").CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		ok(t, g.Define(t.Context(), qemutest.Domain{Name: name, Guest: qemutest.Linux, Disk: disk,
			Memory: strings.TrimSuffix(qemutest.LiveMemory, "K"), Kernel: "flic.fill=8 flic.dirty=10"}))
		g.Do(t, "start", name)
	}
	for _, name := range g.names {
		g.vms = append(g.vms, g.domain(t, name))
	}
	g.free = q35.tiny(t, qemutest.LiveMemory, varied(1024), 20)
	g.vms = append(g.vms, qemutest.Start(t, g.free))
	for i, what := range []string{`flic ready`, `flic ready`, `tick 00000002\r`} {
		g.vms[i].WaitFor(t, what)
	}
	return g
}

// domain is a running domain, with a monitor through libvirt.
func (g *groupedDomains) domain(t *testing.T, name string) *qemutest.VM {
	t.Helper()
	vm := g.Attach(t, name)
	var err error
	vm.QMP, err = domain.Dial(t.Context(), g.uri(), name)
	ok(t, err)
	t.Cleanup(func() { vm.QMP.Close() })
	return vm
}

// args are those of a verb for the group.
func (g *groupedDomains) args(name string, www *qemutest.VM, flags ...string) []string {
	args := slices.Concat([]string{"--group", name, "--connect", g.uri()}, flags)
	for _, name := range g.names {
		args = append(args, name+"=domain:"+name)
	}
	if www != nil {
		args = append(args, "www="+www.Socket)
	}
	return args
}

// run on, and libvirt knows it.
func (g *groupedDomains) runOn(t *testing.T, what string) {
	t.Helper()
	for i, vm := range g.vms {
		runsOn(t, vm)
		if i < len(g.names) {
			if s := g.state(t, g.names[i]); s != "running" {
				t.Errorf("%s: %s is %s", what, g.names[i], s)
			}
		}
	}
}

// Domains, and a QEMU beside them, are saved as a group, stopped and live, and with their
// disks frozen; and resumed as one. If one fails there is no group, and the others run on.
func TestDomainGroup(t *testing.T) {
	t.Parallel()
	g := newGroupedDomains(t)
	var before []string
	for _, vm := range g.vms {
		before = append(before, settings(t, vm))
	}
	unchanged := func(what string) {
		t.Helper()
		g.runOn(t, what)
		for i, vm := range g.vms {
			if after := settings(t, vm); after != before[i] {
				t.Errorf("%s: settings were\n%s\nand are\n%s", what, before[i], after)
			}
		}
	}
	for i, mode := range []string{"stop", "live"} {
		var rep groupReport
		ok(t, json.Unmarshal([]byte(g.run(t, "checkpoint", g.args("shop", g.vms[2], "--mode", mode, "--json")...)), &rep))
		t.Logf("%s: stopped within %v (%s), stood still for %v at most, %v in all", mode, rep.Skew, rep.SkewBy, rep.Downtime, rep.Total)
		unchanged(mode)
		if rep.SkewBy != "commands" || rep.Skew <= 0 || rep.Downtime <= 0 || rep.ExitCode != 0 {
			t.Errorf("%+v", rep)
		}
		for j, m := range rep.Members {
			meta := g.show(t, m.Checkpoint)
			if m.State != "running" || meta.RunState != "running" || len(m.Warnings) > 0 || m.Downtime <= 0 || string(m.Mode) != mode {
				t.Errorf("%s: %+v", mode, m)
			}
			if is := meta.Libvirt != nil; is != (j < len(g.names)) || is && !strings.Contains(meta.Libvirt.XML, "<name>"+g.names[j]+"</name>") {
				t.Errorf("%s: libvirt: %+v", m.VM, meta.Libvirt)
			}
		}
		if list := g.groups(t); len(list) != i+1 || len(list[i].Members) != 3 {
			t.Errorf("%+v", list)
		}
	}

	// One member fails: it is not there, there is no room in the store, or somebody asks for
	// the end.
	held := g.list(t)
	failed := func(what string) {
		t.Helper()
		unchanged(what)
		if now := g.list(t); !slices.Equal(now, held) {
			t.Errorf("%s: checkpoints are %v, and were %v", what, now, held)
		}
		if freed := g.gc(t); freed.Saves > 0 {
			t.Errorf("%s: this was left for gc: %+v", what, freed)
		}
	}
	slow := func() *fault { return &fault{op: "write", n: 5, stall: time.Second} }
	g.attemptsWith(t, nil, append(g.args("shop", g.vms[2]), "x=domain:x")...).fails(exitNotFound, "x: ", "no such domain", "no group was made")
	failed("no domain")
	for _, mode := range []string{"stop", "live"} {
		args := g.args("shop", g.vms[2], "--mode", mode, "--parent", "none", "--share", "none")
		g.attemptsWith(t, &fault{op: "write", n: 2, errno: unix.ENOSPC}, args...).fails(exitNoSpace, "no group was made")
		failed("no room in mode " + mode)
		a := g.attemptsWith(t, slow(), args...)
		ok(t, a.cmd.Process.Signal(syscall.SIGTERM))
		a.fails(exitFailed, "stopped by signal: terminated")
		failed("terminated in mode " + mode)
	}

	// The disks go with it, and the report says which files they are.
	cmd := exec.Command("flic-migrate", append([]string{"checkpoint", "--store", g.store}, g.args("disks", nil, "--disks", "snapshot")...)...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, name := range g.names {
		if !strings.Contains(string(out), ": "+g.path(name+".disk.qcow2")+" has the disk as it was; the guest goes on in "+g.Dir) {
			t.Errorf("nothing of the disk of %s:\n%s", name, out)
		}
	}
	unchanged("with disks")

	// A domain ends amid it: the others run on.
	held = g.list(t)
	a := g.attemptsWith(t, slow(), g.args("shop", g.vms[2], "--parent", "none", "--share", "none")...)
	g.Do(t, "destroy", "web")
	// Its monitor is lost, or its stream has ended; who sees it first.
	_ = a.cmd.Wait()
	if code := a.cmd.ProcessState.ExitCode(); code != exitFailed && code != exitStream && code != exitNotFound || !strings.Contains(a.stderr.String(), "no group was made: web: ") {
		t.Errorf("exit code %d: %s", code, a.stderr.String())
	}
	if now := g.list(t); !slices.Equal(now, held) {
		t.Errorf("a domain has ended: checkpoints are %v, and were %v", now, held)
	}
	runsOn(t, g.vms[0])
	runsOn(t, g.vms[2])
	g.Do(t, "start", "web")

	// All of them are started again: what stands still was saved at one moment.
	for i, lazy := range []string{"never", "auto"} {
		for _, name := range g.names {
			g.Do(t, "destroy", name)
			g.Do(t, "undefine", name, "--snapshots-metadata")
		}
		g.vms[2].Kill()
		www := qemutest.Start(t, destination(g.free, "defer"))
		var rep groupResumeReport
		name := []string{"shop@1", "shop@2"}[i]
		ok(t, json.Unmarshal([]byte(g.run(t, "resume", g.args(name, www, "--lazy", lazy, "--force", "--json")...)), &rep))
		t.Logf("%s, lazy %s: running after %v, resident after %v", name, lazy, rep.Running, rep.Resident)
		g.vms = []*qemutest.VM{g.domain(t, "db"), g.domain(t, "web"), www}
		for _, row := range rep.Members {
			if row.State != "running" || row.Error != "" || row.Running <= 0 || row.Running > rep.Running {
				t.Errorf("%+v", row)
			}
		}
		g.runOn(t, "resumed from "+name)
		for _, vm := range g.vms[:2] {
			checks(t, vm)
		}
	}
	// One is running already: none of the others is let run, and what was started of it says so.
	g.vms[2].Kill()
	www := qemutest.Start(t, destination(g.free, "defer"))
	cmd = exec.Command("flic-migrate", append([]string{"resume", "--store", g.store}, g.args("shop@1", www, "--lazy", "never", "--force")...)...)
	if out, _ = cmd.CombinedOutput(); cmd.ProcessState.ExitCode() != exitFailed || !strings.Contains(string(out), "running already") || !strings.Contains(string(out), "stays paused") {
		t.Errorf("resumed beside themselves: %s", out)
	}
}
