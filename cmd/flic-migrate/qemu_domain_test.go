package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/libvirt/domain"
	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/qmp/migration/rounds"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
)

// libvirtUser is whom the domain's QEMU runs as: anybody but the user of the
// tests, and with none of its rights.
const libvirtUser = 64055

// domainLab is a libvirtd with a domain, and a store.
type domainLab struct {
	*host
	*lab
	name string
}

// newDomainLab starts a domain whose QEMU is this user's, with what more says of it. libvirt's
// saves of it wait for the file slow/go.
func newDomainLab(t *testing.T, name string, guest qemutest.Guest, kernel string, user int, more ...func(*qemutest.Domain)) *domainLab {
	t.Helper()
	d := &domainLab{newHost(t, qemutest.LibvirtConfig{QEMU: ourFormats, Path: []string{"slow"}}), newLab(t), name}
	ok(t, os.Mkdir(d.path("slow"), 0o755))
	script := fmt.Sprintf("#!/bin/sh\ncase $1 in -c) while [ ! -e %s ]; do /bin/sleep 0.1; done ;; esac\nexec %s \"$@\"\n", d.path("slow/go"), d.path("bin/lzop"))
	ok(t, os.WriteFile(d.path("slow/lzop"), []byte(script), 0o755))
	config := qemutest.Domain{Name: name, Guest: guest, Memory: strings.TrimSuffix(qemutest.LiveMemory, "K"), Kernel: kernel}
	for _, fn := range more {
		fn(&config)
	}
	ok(t, d.Define(t.Context(), config))
	// That user has no way to this one's files.
	ok(t, os.Chmod(d.Dir, 0o711))
	text := d.Do(t, "dumpxml", "--inactive", name)
	for _, tag := range []string{"kernel", "initrd"} {
		m := regexp.MustCompile("<" + tag + ">(.*)</" + tag + ">").FindStringSubmatch(text)
		b, err := os.ReadFile(m[1])
		ok(t, err)
		file := "var/lib/libvirt/" + filepath.Base(m[1])
		ok(t, os.WriteFile(d.path(file), b, 0o644))
		text = strings.ReplaceAll(text, m[1], "/"+file)
	}
	label := fmt.Sprintf("<seclabel type='static' model='dac' relabel='yes'><label>+%d:+%d</label></seclabel></domain>", user, user)
	text = strings.Replace(text, "</domain>", label, 1)
	file := d.path("domain.xml")
	ok(t, os.WriteFile(file, []byte(text), 0o600))
	d.Do(t, "define", file)
	d.Do(t, "start", name)
	return d
}

func (d *domainLab) uri() string {
	return "qemu:///system?socket=" + d.path("run/libvirt/libvirt-sock")
}

// attach is the running domain, with a monitor through libvirt.
func (d *domainLab) attach(t *testing.T) *qemutest.VM {
	t.Helper()
	vm := d.Attach(t, d.name)
	d.dial(t, vm)
	return vm
}

// dial gives vm a monitor through libvirt.
func (d *domainLab) dial(t *testing.T, vm *qemutest.VM) {
	t.Helper()
	var err error
	vm.QMP, err = domain.Dial(t.Context(), d.uri(), d.name)
	ok(t, err)
	t.Cleanup(func() { vm.QMP.Close() })
}

// command is a command about the domain.
func (d *domainLab) command(verb string, args ...string) *exec.Cmd {
	return exec.Command("flic-migrate", append([]string{verb, "--store", d.store, "--connect", d.uri(), "--domain", d.name}, args...)...)
}

func (d *domainLab) on(t *testing.T, verb string, args ...string) string {
	t.Helper()
	return d.run(t, verb, append([]string{"--connect", d.uri(), "--domain", d.name}, args...)...)
}

// starts is how often libvirt has started the domain's QEMU.
func (d *domainLab) starts(t *testing.T) int {
	t.Helper()
	b, err := os.ReadFile(d.path("var/log/libvirt/qemu/" + d.name + ".log"))
	ok(t, err)
	return strings.Count(string(b), ": starting up")
}

// gone ends the domain and forgets it.
func (d *domainLab) gone(t *testing.T) {
	t.Helper()
	if s := d.state(t, d.name); s == "running" || s == "paused" {
		d.Do(t, "destroy", d.name)
	}
	d.Do(t, "undefine", d.name)
}

// A domain is watched, saved and started again, eagerly and lazily, and libvirt
// always knows what it does.
func TestDomain(t *testing.T) {
	t.Parallel()
	d := newDomainLab(t, "web1", qemutest.Linux, "flic.fill=16 flic.dirty=10", libvirtUser)
	vm := d.attach(t)
	vm.WaitFor(t, `flic ready`)
	before := settings(t, vm)
	unchanged := func(what string) {
		t.Helper()
		if after := settings(t, vm); after != before {
			t.Errorf("%s: settings were\n%s\nand are\n%s", what, before, after)
		}
		if s := d.state(t, d.name); s != "running" {
			t.Errorf("%s: the domain is %s", what, s)
		}
		runsOn(t, vm)
	}

	var track rounds.Report
	ok(t, json.Unmarshal([]byte(d.on(t, "track", "--out", d.ws, "--interval", "1s", "--json")), &track))
	// Ten pages ten times a second, and what the kernel writes.
	if track.Hot < 60 || track.Hot > track.Pages/4 {
		t.Errorf("tracked: %+v", track)
	}
	unchanged("tracked")

	saves := [][]string{
		{"--mode", "stop", "--working-set", d.ws, "--nvram", d.nvram, "--nvram-size", "64M"},
		{"--mode", "live"},
	}
	for i, flags := range saves {
		var rep checkpointReport
		ok(t, json.Unmarshal([]byte(d.on(t, "checkpoint", append(flags, "--json", "vm")...)), &rep))
		unchanged(flags[1])
		m := d.show(t, rep.Checkpoint)
		if string(rep.Mode) != flags[1] || rep.State != "running" || m.RunState != "running" || i == 0 && m.Report.Hot < 60 {
			t.Errorf("%+v, %s", rep, m.RunState)
		}
		// libvirt does not pass on when it stops and runs.
		if !rep.Ran || rep.Downtime <= 0 || rep.Downtime > rep.Total {
			t.Errorf("it ran: %v, and stood still for %v of %v", rep.Ran, rep.Downtime, rep.Total)
		}
		if l := m.Libvirt; l == nil || !l.Persistent || !strings.Contains(l.XML, "<name>web1</name>") || !strings.Contains(l.Cookie, "<cpu") {
			t.Errorf("libvirt: %+v", l)
		}
	}
	checks(t, vm)
	// libvirt's own save still works.
	ok(t, os.WriteFile(d.path("slow/go"), nil, 0o644))
	file := d.path("web1.save")
	d.Do(t, "save", d.name, file)
	d.run(t, "import", "--vm", "imported", file)
	d.Do(t, "restore", file)
	vm = d.attach(t)
	checks(t, vm)
	d.on(t, "checkpoint", "--then", "pause", "vm")
	if s := d.state(t, d.name); s != "paused" {
		t.Errorf("after --then pause the domain is %s", s)
	}
	d.Do(t, "resume", d.name)
	runsOn(t, vm)
	d.on(t, "checkpoint", "--then", "quit", "vm")
	if s := d.Do(t, "domstate", d.name, "--reason"); s != "shut off (destroyed)" {
		t.Errorf("after --then quit the domain is %s", s)
	}
	if names := d.list(t); len(names) != 5 {
		t.Errorf("checkpoints: %v", names)
	}

	for name, args := range map[string][]string{
		"vm@1":       {"--lazy", "never"},
		"vm@2":       {"--lazy", "never", "--paused"},
		"imported@1": {},
	} {
		d.gone(t)
		var rep resumeReport
		started := d.starts(t)
		file := filepath.Join(t.TempDir(), "resume.prom")
		ok(t, json.Unmarshal([]byte(d.on(t, "resume", append(args, "--json", "--metrics", file, name)...)), &rep))
		of, _, _ := strings.Cut(name, "@")
		if got := lintMetrics(t, file); got["flic_migrate_pages_sent verb=restore vm="+of] == 0 || got["flic_migrate_duration_seconds verb=restore vm="+of] == 0 ||
			got["flic_migrate_running verb=restore vm="+of] != 0 || got["flic_migrate_exit_code verb=restore vm="+of] != 0 {
			t.Errorf("metrics of %s: %v", name, got)
		}
		// Where its user may not use userfaultfd no QEMU is started to find that out.
		if n := d.starts(t) - started; n != 1 {
			t.Errorf("%s: libvirt has started %d QEMUs; %+v", name, n, rep)
		}
		want := "running"
		if len(args) > 2 {
			want = "paused"
		}
		if s := d.state(t, d.name); s != want || rep.State != want {
			t.Errorf("%s: resumed, the domain is %s; %+v", name, s, rep)
		}
		vm = d.attach(t)
		if want == "paused" {
			d.Do(t, "resume", d.name)
		}
		runsOn(t, vm)
		checks(t, vm)
		// It is defined again, if the checkpoint says that it was.
		out := d.Do(t, "list", "--all", "--persistent", "--name")
		if defined := strings.TrimSpace(out) == d.name; defined == (name == "imported@1") {
			t.Errorf("%s: defined are %q", name, out)
		}
		d.Do(t, "define", d.path("domain.xml"))
		t.Logf("%s: lazy %v (%s), running after %v", name, rep.Lazy, rep.Reason, rep.Running)
	}
	d.on(t, "checkpoint", "vm")
	unchanged("resumed and saved")

	// A running domain stays what it is.
	out, err := d.command("resume", "vm@1").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "running already") {
		t.Errorf("resumed beside itself: %v, %s", err, out)
	}
	runsOn(t, vm)
}

// With userfaultfd, which root may use, the guest runs before its memory is there.
// If what serves it fails, the guest waits, and goes on with another server.
func TestDomainLazy(t *testing.T) {
	t.Parallel()
	d := newDomainLab(t, "web1", qemutest.Debian, "flic.fill=8 flic.dirty=10 flic.read=etc", 0)
	vm := d.attach(t)
	vm.WaitFor(t, `flic ready`)
	before := settings(t, vm)
	var saved checkpointReport
	ok(t, json.Unmarshal([]byte(d.on(t, "checkpoint", "--mode", "background", "--then", "quit", "--json", "vm")), &saved))
	if saved.Mode != "background" || len(saved.Warnings) > 0 {
		t.Errorf("%+v", saved)
	}
	d.gone(t)
	var rep resumeReport
	measures := filepath.Join(t.TempDir(), "resume.prom")
	ok(t, json.Unmarshal([]byte(d.on(t, "resume", "--lazy", "always", "--json", "--metrics", measures, "vm")), &rep))
	if got := lintMetrics(t, measures); rep.Server != nil && rep.Server.LazyReport != nil && got["flic_migrate_demanded_pages verb=restore vm=vm"] != float64(rep.Server.LazyReport.Demands) {
		t.Errorf("metrics: %v", got)
	}
	if !rep.Lazy || rep.State != "running" || rep.Server == nil || rep.Server.LazyReport == nil || rep.Server.LazyReport.Demands == 0 {
		t.Errorf("%+v", rep)
	}
	t.Logf("running after %v, all there after %v", rep.Running, rep.Resident)
	vm = d.attach(t)
	// Of these files it has nothing in its memory: its disk is there, too.
	if n, err := strconv.Atoi(vm.Ask(t, "read usr/sbin")); err != nil || n < 1000 {
		t.Errorf("read %d bytes, %v", n, err)
	}
	if after := settings(t, vm); after != before {
		t.Errorf("settings were\n%s\nand are\n%s", before, after)
	}
	runsOn(t, vm)
	checks(t, vm)
	if out := d.Do(t, "domjobinfo", d.name); !strings.Contains(out, "None") {
		t.Errorf("libvirt's job: %s", out)
	}

	// --learn makes the server wait with what the guest does not ask for.
	file, err := os.Create(d.path("stderr"))
	ok(t, err)
	defer file.Close()
	said := func(what string) bool {
		b, err := os.ReadFile(file.Name())
		ok(t, err)
		return strings.Contains(string(b), what)
	}
	d.gone(t)
	cmd := d.command("resume", "--lazy", "always", "--learn", "1m", "vm")
	cmd.Stderr = file
	ok(t, cmd.Start())
	until(t, "the guest to run", func() bool { return said("running after") })
	// With what it needs for interrupts: a QEMU whose lock is held while it waits for
	// a page does not hear libvirt.
	vm = d.Attach(t, d.name)
	until(t, "three ticks", func() bool { return strings.Count(vm.Console(), "tick ") >= 3 })
	ok(t, cmd.Process.Signal(syscall.SIGTERM))
	if err := cmd.Wait(); err == nil || !said("--recover") {
		t.Errorf("the server ended: %v, and --recover is not mentioned", err)
	}
	if s := d.Do(t, "domstate", d.name, "--reason"); s != "running (post-copy failed)" {
		t.Errorf("the server ended, the domain is %s", s)
	}
	if out, err := d.command("resume", "--recover", "vm@1").CombinedOutput(); err == nil {
		d.dial(t, vm)
		runsOn(t, vm)
		checks(t, vm)
		if s := d.Do(t, "domstate", d.name, "--reason"); !strings.HasPrefix(s, "running") || strings.Contains(s, "fail") {
			t.Errorf("recovered, the domain is %s", s)
		}
		d.on(t, "checkpoint", "vm")
	} else {
		// libvirt 11.3 crashes of it. The next daemon finds the domain as it was.
		until(t, "the next libvirtd", func() bool { _, err := d.Virsh("version"); return err == nil })
		if version := d.Do(t, "version", "--daemon"); !strings.Contains(string(out), "libvirt's daemon has ended") || !strings.Contains(version, "Running against daemon: 11.") {
			t.Errorf("not recovered: %v, %s; %s", err, out, version)
		}
		if s := d.Do(t, "domstate", d.name, "--reason"); s != "running (post-copy failed)" {
			t.Errorf("libvirt's daemon has crashed, the domain is %s", s)
		}
	}

	out, err := d.command("resume", "--lazy", "always", "--paused", "vm").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "stay paused") {
		t.Errorf("lazy and paused: %v, %s", err, out)
	}
}

// Whatever goes wrong, the guest goes on, libvirt knows it, and nothing is left.
func TestDomainFailures(t *testing.T) {
	t.Parallel()
	d := newDomainLab(t, "web1", qemutest.Linux, "flic.fill=16 flic.dirty=10", libvirtUser)
	vm := d.attach(t)
	vm.WaitFor(t, `flic ready`)
	before := settings(t, vm)
	fails := func(what string, cmd *exec.Cmd, code int, want string) {
		t.Helper()
		out, err := cmd.CombinedOutput()
		if cmd.ProcessState.ExitCode() != code || !strings.Contains(string(out), want) {
			t.Errorf("%s: %v, %s; want %q", what, err, out, want)
		}
	}
	unchanged := func(what string) {
		t.Helper()
		if after := settings(t, vm); after != before {
			t.Errorf("%s: settings were\n%s\nand are\n%s", what, before, after)
		}
		if s := d.state(t, d.name); s != "running" {
			t.Errorf("%s: the domain is %s", what, s)
		}
		runsOn(t, vm)
		d.nothing(t)
		if _, err := os.Stat(d.ws); err == nil {
			t.Errorf("%s: a working set was written", what)
		}
	}
	other := *d
	other.name = "web2"
	fails("unknown", other.command("checkpoint", "vm"), exitNotFound, "no such domain")
	fails("elsewhere", exec.Command("flic-migrate", "track", "--connect", "qemu+ssh://host/system", "--domain", "web1", "--out", d.ws), exitFailed, "another machine")
	fails("two", d.command("checkpoint", "--qmp", "/x", "vm"), exitUsage, "--qmp and --domain")
	var refused *qmp.Error
	if err := migration.Start(t.Context(), vm.QMP, "exec:cat"); err == nil || !strings.Contains(err.Error(), "spawn=deny") {
		t.Errorf("exec: %v, %v", err, refused)
	}
	unchanged("refused")

	// libvirt saves it, slowly: not now.
	file := d.path("web1.save")
	save := exec.Command("virsh", "-c", "qemu+unix:///system?socket="+d.path("run/libvirt/libvirt-sock"), "save", d.name, file)
	ok(t, save.Start())
	until(t, "libvirt's job", func() bool { return !strings.Contains(d.Do(t, "domjobinfo", d.name), "None") })
	fails("being saved", d.command("track", "--out", d.ws, "--interval", "1s"), exitFailed, "job running")
	ok(t, os.WriteFile(d.path("slow/go"), nil, 0o644))
	ok(t, save.Wait())
	d.Do(t, "restore", file)
	vm = d.attach(t)
	unchanged("saved by libvirt")

	// libvirtd is killed while the guest is watched, and while it is saved: the
	// guest and the stream do not notice.
	var err error
	for what, cmd := range map[string]*exec.Cmd{
		"track":                 d.command("track", "--out", d.ws, "--interval", "1m"),
		"checkpoint's tracking": d.command("checkpoint", "--timer", "1m", "vm"),
	} {
		var stderr strings.Builder
		cmd.Stderr = &stderr
		ok(t, cmd.Start())
		until(t, "the first pass", func() bool {
			info, err := migration.Query(t.Context(), vm.QMP)
			ok(t, err)
			return info.Status == migration.StatusActive && info.RAM.Remaining < 32<<20
		})
		time.Sleep(300 * time.Millisecond) // into the hold
		d.Restart(t)
		if err := cmd.Wait(); err == nil || !strings.Contains(stderr.String(), "lost") {
			t.Errorf("%s, libvirtd killed: %v, %s", what, err, stderr.String())
		}
		vm.QMP.Close()
		d.dial(t, vm)
		unchanged(what + ", libvirtd killed")
	}
	// Or while the guest is stopped for a save, which is held up meanwhile.
	cmd := d.command("checkpoint", "vm")
	var stderr strings.Builder
	cmd.Stderr = &stderr
	ok(t, cmd.Start())
	until(t, "the stop", func() bool { return d.state(t, d.name) == "paused" })
	ok(t, cmd.Process.Signal(syscall.SIGSTOP))
	d.Restart(t)
	ok(t, cmd.Process.Signal(syscall.SIGCONT))
	if err := cmd.Wait(); err == nil || !strings.Contains(stderr.String(), "lost") {
		t.Errorf("saving, libvirtd killed: %v, %s", err, stderr.String())
	}
	vm.QMP.Close()
	d.dial(t, vm)
	unchanged("saving, libvirtd killed")
	checks(t, vm)

	// A checkpoint that is damaged starts no domain.
	d.on(t, "checkpoint", "--then", "quit", "vm")
	d.Do(t, "undefine", d.name)
	images, err := filepath.Glob(d.store + "/vms/*/*.flic")
	ok(t, err)
	b, err := os.ReadFile(images[0])
	ok(t, err)
	damaged := append([]byte(nil), b...)
	damaged[len(b)/2] ^= 1
	ok(t, os.Chmod(images[0], 0o600))
	ok(t, os.WriteFile(images[0], damaged, 0o600))
	fails("damaged", d.command("resume", "--lazy", "never", "vm"), exitCorrupt, "")
	if out := d.Do(t, "list", "--all", "--name"); strings.TrimSpace(out) != "" {
		t.Errorf("a damaged checkpoint has started %s", out)
	}
	ok(t, os.WriteFile(images[0], b, 0o600))
	other.name = "web2"
	fails("another", other.command("resume", "vm"), exitFailed, "of the domain web1")
	fails("shut off", d.command("track", "--out", d.ws), exitNotFound, "no such domain")
	d.on(t, "resume", "--lazy", "never", "vm")
	fails("running", d.command("resume", "vm"), exitFailed, "running already")
	vm = d.attach(t)
	checks(t, vm)
	d.Do(t, "destroy", d.name)
	fails("shut off", d.command("track", "--out", d.ws), exitFailed, "not running")
}
