package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/flic-migrate/flic-migrate/qmp"
	vmdisks "github.com/flic-migrate/flic-migrate/qmp/disks"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
)

// TestQEMUDisks saves a guest whose memory holds what is on its disk, an overlay on an
// image that has an index. QEMU says which image that is.
func TestQEMUDisks(t *testing.T) {
	ctx := limit(t)
	l := newLab(t)
	// Noise, so that no page is found to equal one elsewhere in memory.
	content := noise(2048)
	base, top := filepath.Join(l.dir, "base"), filepath.Join(l.dir, "top")
	ok(t, os.WriteFile(base, content, 0o600))
	if out, err := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", top).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	c := q35.tiny(t, "32M", content, 4)
	c.Args = append(c.Args, "-drive", "file="+top+",format=qcow2,if=virtio,id=disk")
	vm := qemutest.Start(t, c)
	vm.WaitFor(t, `tick (\w+)\r`)

	// It is indexed while a QEMU has it open, and all that the guest can write to is not.
	var layers []struct {
		Path, State, Why string
		Blocks           int
	}
	ok(t, json.Unmarshal([]byte(l.run(t, "disk", "index", "--json", top)), &layers))
	if len(layers) != 2 || layers[0].State != "skipped" || layers[1].State != "built" || layers[1].Path != base || layers[1].Blocks != 2048 {
		t.Fatalf("%+v", layers)
	}

	var without, with struct {
		Save struct {
			Disk       int   `json:"disk"`
			FlashBytes int64 `json:"flash_bytes"`
			Disks      []struct {
				Path  string
				Pages int
			}
		}
	}
	ok(t, json.Unmarshal([]byte(l.run(t, "checkpoint", "--json", "--qmp", vm.Socket, "--no-disks", "plain")), &without))
	ok(t, json.Unmarshal([]byte(l.run(t, "checkpoint", "--json", "--qmp", vm.Socket, "--then", "pause", "vm")), &with))
	s := with.Save
	// The guest changes the last quarter.
	if s.Disk < 1536 || len(s.Disks) != 1 || s.Disks[0].Path != base || s.Disks[0].Pages != s.Disk || without.Save.Disk != 0 {
		t.Fatalf("with %+v, without %+v", with, without)
	}
	if saved := without.Save.FlashBytes - s.FlashBytes; saved < int64(s.Disk)*4000 {
		t.Errorf("%d bytes less for %d pages", saved, s.Disk)
	}
	want := ram(t, ctx, vm)
	ok(t, vm.Quit(ctx))

	restored(t, ctx, c, l.restore("vm"), want)

	// A disk that has changed is no wrong page.
	f, err := os.OpenFile(base, os.O_WRONLY, 0)
	ok(t, err)
	_, err = f.WriteAt([]byte{content[5<<20] + 1}, 5<<20)
	ok(t, err)
	ok(t, f.Close())
	out, err := exec.Command("flic-migrate", "restore", "--store", l.store, "vm").CombinedOutput()
	if err == nil || !strings.Contains(string(out), base) {
		t.Errorf("%v, %.300s", err, out)
	}
}

// diskGuest is a tiny guest with a disk that it has for itself, and whose device a user calls
// as a machine calls its flash.
func diskGuest(t *testing.T, file, format string) qemutest.Config {
	c := q35.tiny(t, "32M", varied(256), 4)
	c.Args = append(c.Args, "-drive", "file="+file+",format="+format+",if=none,id=d", "-device", "virtio-blk-pci,drive=d,id=flash1")
	return c
}

// img runs qemu-img or qemu-io.
func img(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%v: %v: %s", args, err, out)
	}
}

// resumes resumes a checkpoint into a new QEMU with this disk, and returns what it says.
func resumes(t *testing.T, l *lab, file, format, name string, flags ...string) (string, error) {
	t.Helper()
	vm := qemutest.Start(t, destination(diskGuest(t, file, format), "defer"))
	defer vm.Kill()
	out, err := exec.Command("flic-migrate", append([]string{"resume", "--store", l.store, "--qmp", vm.Socket, name}, flags...)...).CombinedOutput()
	if err == nil {
		runsOn(t, vm)
	}
	return string(out), err
}

// TestQEMUDiskState resumes with the disk as it was, and as it was not.
func TestQEMUDiskState(t *testing.T) {
	ctx := limit(t)
	l := newLab(t)
	base, top := filepath.Join(l.dir, "base"), filepath.Join(l.dir, "top")
	ok(t, os.WriteFile(base, noise(256), 0o600))
	img(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", top)
	vm := qemutest.Start(t, diskGuest(t, top, "qcow2"))
	vm.WaitFor(t, `tick (\w+)\r`)
	l.run(t, "checkpoint", "--qmp", vm.Socket, "vm")
	ok(t, vm.Quit(ctx))

	meta := l.show(t, "vm")
	if len(meta.VMDisks) != 1 || len(meta.VMDisks[0].Layers) != 2 || meta.VMDisks[0].Layers[0].Path != top || meta.VMDisks[0].Frozen || meta.VMDisks[0].ReadOnly {
		t.Fatalf("%+v", meta.VMDisks)
	}
	if out, err := resumes(t, l, top, "qcow2", "vm"); err != nil {
		t.Fatalf("with its own disk: %v: %s", err, out)
	}
	refused := func(file, format, want string) {
		t.Helper()
		if out, err := resumes(t, l, file, format, "vm"); err == nil || !strings.Contains(out, want) || !strings.Contains(out, "--force") {
			t.Errorf("%v: %s; want %q", err, out, want)
		}
	}
	// Another one that stands on the same, and one that is a copy.
	over := filepath.Join(l.dir, "over")
	img(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", over)
	refused(over, "qcow2", over+" is not "+top)
	img(t, "cp", "--preserve=timestamps", top, filepath.Join(l.dir, "copy"))
	if out, err := resumes(t, l, filepath.Join(l.dir, "copy"), "qcow2", "vm"); err != nil {
		t.Errorf("with a copy of its disk: %v: %s", err, out)
	}
	// An overlay on it that nobody has written to, and one that somebody has.
	on := filepath.Join(l.dir, "on")
	img(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", top, "-F", "qcow2", on)
	if out, err := resumes(t, l, on, "qcow2", "vm"); err != nil {
		t.Errorf("with an overlay: %v: %s", err, out)
	}
	img(t, "qemu-io", "-f", "qcow2", "-c", "write -P 1 64k 4k", on)
	refused(on, "qcow2", on+" is not "+top)
	// The VM was booted between.
	img(t, "qemu-io", "-f", "qcow2", "-c", "write -P 1 64k 4k", top)
	refused(top, "qcow2", top+" was written to")
	out, err := resumes(t, l, top, "qcow2", "vm", "--force")
	if err != nil || !strings.Contains(out, "resumed with other disks than were saved: "+top) {
		t.Errorf("%v: %s", err, out)
	}
}

// TestQEMUDiskSnapshot freezes the disk with the checkpoint. The guest goes on, with its
// disk changing, and the checkpoint is resumed on the disk as it was.
func TestQEMUDiskSnapshot(t *testing.T) {
	ctx := limit(t)
	l := newLab(t)
	file := filepath.Join(l.dir, "disk.qcow2")
	img(t, "qemu-img", "create", "-q", "-f", "qcow2", file, "1M")
	img(t, "qemu-io", "-f", "qcow2", "-c", "write -P 5 0 64k", file)
	ok(t, os.Chmod(file, 0o600))
	vm := qemutest.Start(t, diskGuest(t, file, "qcow2"))
	vm.WaitFor(t, `tick (\w+)\r`)
	var rep struct {
		Snapshots []struct{ Disk, Frozen, Now string }
	}
	ok(t, json.Unmarshal([]byte(l.run(t, "checkpoint", "--json", "--disks", "snapshot", "--qmp", vm.Socket, "vm")), &rep))
	if len(rep.Snapshots) != 1 || rep.Snapshots[0].Frozen != file || !strings.HasPrefix(rep.Snapshots[0].Now, filepath.Join(l.dir, "disk.flic-")) {
		t.Fatalf("%+v", rep)
	}
	if fi, err := os.Stat(rep.Snapshots[0].Now); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("the overlay on a file of mode 0600: %v, %v", fi, err)
	}
	runsOn(t, vm)
	// The guest writes.
	var answer string
	ok(t, vm.QMP.Execute(ctx, "human-monitor-command", map[string]string{"command-line": `qemu-io -d flash1/virtio-backend "write -P 9 0 64k"`}, &answer))
	l.run(t, "checkpoint", "--disks", "snapshot", "--qmp", vm.Socket, "vm")
	// Who reads JSON must know of overlays without a checkpoint. A parent that is not there
	// fails the save, when they are in use.
	var failed failedCheckpoint
	out, err := exec.Command("flic-migrate", "checkpoint", "--store", l.store, "--qmp", vm.Socket, "vm", "--json", "--disks", "snapshot", "--parent", "vm@7").Output()
	ok(t, json.Unmarshal(out, &failed))
	layers, ferr := vmdisks.Find(ctx, vm.QMP)
	ok(t, ferr)
	if err == nil || failed.ExitCode != exitNotFound || failed.Error == "" || failed.Checkpoint != "" || len(failed.Snapshots) != 1 || failed.Snapshots[0].Now != layers[0].Layers[0].Path {
		t.Errorf("%v: %s; the VM's disks: %+v", err, out, layers)
	}
	runsOn(t, vm)
	ok(t, vm.Quit(ctx))

	first, second := l.show(t, "vm@1").VMDisks, l.show(t, "vm@2").VMDisks
	if len(first) != 1 || !first[0].Frozen || first[0].Layers[0].Path != file || len(second) != 1 || len(second[0].Layers) != 2 || second[0].Layers[0].Path != rep.Snapshots[0].Now {
		t.Fatalf("%+v, %+v", first, second)
	}
	holds := func(path string, pattern string) {
		t.Helper()
		img(t, "qemu-io", "-r", "-f", "qcow2", "-c", "read -P "+pattern+" 0 64k", path)
	}
	holds(file, "5")
	holds(rep.Snapshots[0].Now, "9")
	// What is frozen is not written to again: each resume gets an overlay.
	if out, err := resumes(t, l, file, "qcow2", "vm@1"); err == nil || !strings.Contains(out, "put an overlay on it (qemu-img create -f qcow2 -b "+file) {
		t.Errorf("%v: %s", err, out)
	}
	for n, on := range []string{file, rep.Snapshots[0].Now} {
		over := filepath.Join(l.dir, "over"+string(rune('1'+n)))
		img(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", on, "-F", "qcow2", over)
		if out, err := resumes(t, l, over, "qcow2", "vm@"+string(rune('1'+n))); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	}
	if out, err := resumes(t, l, filepath.Join(l.dir, "over2"), "qcow2", "vm@1"); err == nil {
		t.Errorf("the disk of the second goes with the first: %s", out)
	}
}

// writerDisk is the image of a file system with a shell, and a file of so many MiB in the
// folder some.
func writerDisk(t *testing.T, l *lab, mib int) (base string) {
	t.Helper()
	root := filepath.Join(l.dir, "root")
	for _, dir := range []string{"bin", "tmp", "proc", "dev", "some"} {
		ok(t, os.MkdirAll(filepath.Join(root, dir), 0o755))
	}
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Fatalf("%v; run: scripts/deps guest", err)
	}
	img(t, "cp", busybox, filepath.Join(root, "bin/busybox"))
	for _, name := range []string{"sh", "mount", "dd", "sync", "sleep"} {
		ok(t, os.Symlink("busybox", filepath.Join(root, "bin", name)))
	}
	ok(t, os.WriteFile(filepath.Join(root, "some/file"), noise(mib<<20/4096), 0o644))
	base = filepath.Join(l.dir, "base")
	img(t, "/sbin/mkfs.ext4", "-q", "-b", "4096", "-d", root, base, "48M")
	return base
}

// writing makes a guest with a writerDisk write to it, on and on.
const writing = "run mount -o remount,rw /dev/vda /; while :; do dd if=/dev/urandom of=/some/written bs=64k count=32 conv=fsync; done"

// TestQEMUDiskWrites saves a guest that writes to its disk all the time, live: what is on
// the image under its disk is left out, memory and disk belong together, and the guest goes
// on writing. Once it has run on, or was booted between, its memory is refused.
func TestQEMUDiskWrites(t *testing.T) {
	t.Parallel()
	ctx, l := limit(t), newLab(t)
	base, top := writerDisk(t, l, 4), filepath.Join(l.dir, "top")
	img(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", top)
	indexed(t, l, top)
	c := q35.linux(qemutest.LiveMemory, "flic.fill=8 flic.dirty=20 flic.read=/some")
	c.Args = []string{"-drive", "if=virtio,format=qcow2,file=" + top}
	written := func() (at int64) {
		fi, err := os.Stat(top)
		ok(t, err)
		return fi.ModTime().UnixNano()
	}
	writes := func(vm *qemutest.VM) {
		t.Helper()
		for range 2 {
			before := written()
			until(t, "the guest's writing", func() bool { return written() != before })
		}
	}
	vm := qemutest.Start(t, c)
	vm.WaitFor(t, `flic ready`)
	if answer := vm.Ask(t, writing); answer != "ok" {
		t.Fatal(answer)
	}
	writes(vm)
	l.run(t, "checkpoint", "--qmp", vm.Socket, "--mode", "live", "--then", "pause", "vm")
	want, tick := ram(t, ctx, vm), lastTick(t, vm.Console(), 10)
	m := l.show(t, "vm")
	if m.Report.Disk < 900 || len(m.Report.Disks) != 1 || m.Report.Disks[0].Path != base {
		t.Errorf("%d pages are on disk: %+v", m.Report.Disk, m.Report.Disks)
	}
	ok(t, vm.Quit(ctx))

	resume := func() *qemutest.VM {
		t.Helper()
		vm := qemutest.Start(t, destination(c, "defer"))
		l.run(t, "resume", "--qmp", vm.Socket, "--paused", "vm")
		if diff := qemutest.DiffRAM(want, ram(t, ctx, vm)); diff != "" {
			t.Error(diff)
		}
		return vm
	}
	told := func(what string) {
		t.Helper()
		vm := qemutest.Start(t, destination(c, "defer"))
		defer vm.Kill()
		out, err := exec.Command("flic-migrate", "resume", "--store", l.store, "--qmp", vm.Socket, "vm").CombinedOutput()
		if err == nil || !strings.Contains(string(out), top+" was written to") || !strings.Contains(string(out), "--force") {
			t.Errorf("%s: %v: %s", what, err, out)
		}
		state(t, vm, "inmigrate")
	}
	// What was being written goes on being written.
	vm = resume()
	goesOn(t, ctx, vm, tick, 10)
	writes(vm)
	checks(t, vm)
	// It has not lost what it has of its disk either.
	if answer := vm.Ask(t, "read some/file"); answer != "4194304" {
		t.Errorf("read %s", answer)
	}
	l.run(t, "checkpoint", "--qmp", vm.Socket, "--then", "pause", "vm")
	want = ram(t, ctx, vm)
	ok(t, vm.Quit(ctx))
	vm = resume()
	goesOn(t, ctx, vm, tick, 10)
	writes(vm)
	ok(t, vm.Quit(ctx))
	told("it ran on")

	vm = qemutest.Start(t, c)
	vm.WaitFor(t, `flic ready`)
	l.run(t, "checkpoint", "--qmp", vm.Socket, "--then", "quit", "vm")
	vm = qemutest.Start(t, c)
	vm.WaitFor(t, `flic ready`)
	vm.Ask(t, writing)
	writes(vm)
	ok(t, vm.Quit(ctx))
	told("it was booted")
}

// TestArmedDisks: the armed process looks for pages on the disks, records what they are, and
// has them frozen when that is asked for. If an image changes while it waits, an ordinary
// checkpoint is made.
func TestArmedDisks(t *testing.T) {
	t.Parallel()
	ctx, l := limit(t), newLab(t)
	content := noise(2048)
	base, top := filepath.Join(l.dir, "base"), filepath.Join(l.dir, "top")
	ok(t, os.WriteFile(base, content, 0o600))
	img(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", top)
	indexed(t, l, top)
	c := q35.tiny(t, qemutest.LiveMemory, content, 4)
	c.Args = append(c.Args, "-drive", "file="+top+",format=qcow2,if=none,id=d", "-device", "virtio-blk-pci,drive=d,id=vd")
	vm := qemutest.Start(t, c)
	vm.WaitFor(t, `tick 00000002\r`)
	// All pages are placed anew each time.
	all := []string{"--parent", "none"}
	rep := l.checkpoint(t, vm, append(all, "--arm")...)
	for _, how := range [][]string{{"--arm"}, {"--disks", "snapshot", "--arm"}, {"--disks", "snapshot", "--then", "pause"}} {
		note := l.isArmed(t, vm)
		runsOn(t, vm)
		rep = l.checkpoint(t, vm, append(all, how...)...)
		// The guest changes the last quarter.
		if !rep.Armed || rep.Save.Disk < 1536 || len(rep.Save.Disks) != 1 || rep.Save.Disks[0].Path != base || len(rep.Warnings) > 0 {
			t.Fatalf("%v: %+v, %+v", how, rep, rep.Save)
		}
		m := l.show(t, rep.Checkpoint)
		snapshot := how[0] == "--disks"
		if len(m.VMDisks) != 1 || m.VMDisks[0].Layers[0].Path != top || m.VMDisks[0].Frozen != snapshot || len(rep.Snapshots) == 1 != snapshot {
			t.Errorf("%v: %+v, and snapshots %+v", how, m.VMDisks, rep.Snapshots)
		}
		if snapshot {
			top = rep.Snapshots[0].Now
		}
		if note.PID == rep.ArmedProcess {
			t.Errorf("%v: process %d has the next one as well", how, note.PID)
		}
	}
	l.shadow(t, ctx, vm, rep.Checkpoint)
	ok(t, qmp.Cont(ctx, vm.QMP))
	runsOn(t, vm)

	rep = l.checkpoint(t, vm, append(all, "--arm")...)
	l.isArmed(t, vm)
	f, err := os.OpenFile(base, os.O_WRONLY, 0)
	ok(t, err)
	_, err = f.WriteAt([]byte{content[0] + 1}, 0)
	ok(t, err)
	ok(t, f.Close())
	out, err := exec.Command("flic-migrate", "checkpoint", "--store", l.store, "--qmp", vm.Socket, "--then", "pause", "--parent", "none", "vm").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "disk image "+base+" was written to") {
		t.Errorf("%v: %s", err, out)
	}
	if m := l.show(t, "vm"); m.Report.Disk != 0 {
		t.Errorf("pages on a disk that has changed: %+v", m.Report)
	}
	l.shadow(t, ctx, vm, "vm")
}

// TestDomainSnapshot has libvirt freeze the disks of a domain with its checkpoints, ordinary
// and armed ones, and goes back to the first on an overlay.
func TestDomainSnapshot(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := filepath.Join(dir, "disk.qcow2")
	img(t, "qemu-img", "create", "-q", "-f", "qcow2", file, "4M")
	img(t, "qemu-io", "-f", "qcow2", "-c", "write -P 5 0 64k", file)
	d := newDomainLab(t, "web1", qemutest.Linux, "flic.fill=8 flic.dirty=10", 0, func(c *qemutest.Domain) { c.Disk = file })
	vm := d.attach(t)
	vm.WaitFor(t, `flic ready`)
	before := settings(t, vm)
	on := func() string {
		t.Helper()
		return strings.Fields(d.Do(t, "domblklist", d.name))[1]
	}
	writes := func(pattern int) {
		t.Helper()
		d.Do(t, "qemu-monitor-command", d.name, "--hmp", fmt.Sprintf(`qemu-io -d virtio-disk0/virtio-backend "write -P %d 0 64k"`, pattern))
	}
	has := func(path string, pattern int) {
		t.Helper()
		img(t, "qemu-io", "-r", "-U", "-f", "qcow2", "-c", fmt.Sprintf("read -P %d 0 64k", pattern), path)
	}
	var files []string // what each checkpoint goes with
	for _, how := range []string{"", "--arm", "--then=pause"} {
		was := on()
		args := []string{"--disks", "snapshot", "--json", "vm"}
		if how != "" {
			args = append(args, how)
		}
		var rep checkpointReport
		ok(t, json.Unmarshal([]byte(d.on(t, "checkpoint", args...)), &rep))
		if len(rep.Snapshots) != 1 || rep.Snapshots[0].Frozen != was || rep.Snapshots[0].Now != on() || rep.Armed != (how == "--then=pause") {
			t.Fatalf("%s: %+v; the domain writes to %s", how, rep, on())
		}
		if m := d.show(t, rep.Checkpoint); len(m.VMDisks) != 1 || !m.VMDisks[0].Frozen || m.VMDisks[0].Layers[0].Path != was || !strings.Contains(m.Libvirt.XML, was) {
			t.Errorf("%s: %+v", how, m.VMDisks)
		}
		files = append(files, was)
		if how == "--arm" {
			d.isArmed(t, vm)
		}
		if how != "--then=pause" {
			runsOn(t, vm)
			writes(5 + len(files))
		}
	}
	if after := settings(t, vm); after != before {
		t.Errorf("settings were\n%s\nand are\n%s", before, after)
	}
	if names := d.Do(t, "snapshot-list", d.name, "--name"); names != "" {
		t.Errorf("libvirt has snapshots: %s", names)
	}
	d.run(t, "verify", "--all")

	for n, path := range files {
		name := fmt.Sprintf("vm@%d", n+1)
		d.gone(t)
		out, err := d.command("resume", name).CombinedOutput()
		if err == nil || !strings.Contains(string(out), path+" was frozen with the checkpoint") {
			t.Errorf("%s: %v: %s", name, err, out)
		}
		var rep resumeReport
		ok(t, json.Unmarshal([]byte(d.on(t, "resume", "--overlay", "--json", name)), &rep))
		if len(rep.Overlays) != 1 || rep.Overlays[0].Frozen != path || rep.Overlays[0].Now != on() {
			t.Fatalf("%s: %+v; the domain writes to %s", name, rep, on())
		}
		vm = d.attach(t)
		runsOn(t, vm)
		checks(t, vm)
		has(on(), 5+n)
		writes(1)
		there, err := filepath.Glob(dir + "/*")
		ok(t, err)
		out, err = d.command("resume", "--overlay", name).CombinedOutput()
		if now, gerr := filepath.Glob(dir + "/*"); err == nil || !strings.Contains(string(out), "runs already") || gerr != nil || len(now) != len(there) {
			t.Errorf("while it runs: %v: %s\nthere are %q, and there were %q", err, out, now, there)
		}
		if n == len(files)-1 {
			d.on(t, "checkpoint", "vm")
		}
		d.Do(t, "destroy", d.name)
		has(rep.Overlays[0].Now, 1)
		has(path, 5+n)
	}
	// The last has frozen nothing. An overlay that is made in vain does not stay.
	d.gone(t)
	have, err := filepath.Glob(dir + "/*")
	ok(t, err)
	for name, says := range map[string]string{"vm@4": "no disk was frozen with the checkpoint", "vm@1": "another domain"} {
		if name == "vm@1" {
			// libvirt can't start it.
			ok(t, os.Rename(file, file+".gone"))
			says = file
		}
		out, err := d.command("resume", "--overlay", name).CombinedOutput()
		if err == nil || !strings.Contains(string(out), says) {
			t.Errorf("%s: %v: %s", name, err, out)
		}
	}
	ok(t, os.Rename(file+".gone", file))
	if now, err := filepath.Glob(dir + "/*"); err != nil || len(now) != len(have) {
		t.Errorf("there are %q, and there were %q; %v", now, have, err)
	}
}

// TestFreeze: what the guest itself has written to its disk, up to the moment at which it
// stands still, is not stored if the disk is frozen with the checkpoint, and no page is
// looked for there otherwise. The guest writes on, to an overlay.
func TestFreeze(t *testing.T) {
	t.Parallel()
	ctx, l := limit(t), newLab(t)
	content := noise(768)
	file, first, second := filepath.Join(l.dir, "disk.qcow2"), filepath.Join(l.dir, "first"), filepath.Join(l.dir, "second")
	ok(t, os.WriteFile(first, content[:1<<20], 0o600))
	ok(t, os.WriteFile(second, content[1<<20:2<<20], 0o600))
	img(t, "qemu-img", "create", "-q", "-f", "qcow2", file, "8M")
	img(t, "qemu-io", "-f", "qcow2", "-c", "write -s "+first+" 0 1M", file)
	c := q35.tiny(t, "32M", content, 1)
	c.Args = append(c.Args, "-drive", "file="+file+",format=qcow2,if=none,id=d", "-device", "virtio-blk-pci,drive=d,id=vd")
	vm := qemutest.Start(t, c)
	vm.WaitFor(t, `tick (\w+)\r`)
	writes := func(what string) {
		t.Helper()
		_, err := qmp.HumanMonitor(ctx, vm.QMP, `qemu-io -d vd/virtio-backend "write `+what+`"`)
		ok(t, err)
	}
	if rep := l.checkpoint(t, vm); rep.Save.Disk != 0 {
		t.Errorf("%+v", rep.Save)
	}
	writes("-s " + second + " 1M 1M")
	rep := l.checkpoint(t, vm, "--parent", "none", "--disks", "snapshot", "--freeze")
	if rep.Save.Disk != 512 || len(rep.Save.Disks) != 1 || rep.Save.Disks[0].Path != file || len(rep.Snapshots) != 1 || len(rep.Warnings) > 0 {
		t.Fatalf("%+v, %+v", rep, rep.Save)
	}
	top := rep.Snapshots[0].Now
	writes("-P 1 0 2M")
	// Once more, of what has been written since; the first file has an index already.
	rep = l.checkpoint(t, vm, "--disks", "snapshot", "--freeze", "--then", "pause")
	if rep.Save.Disk != 512 || len(rep.Save.Disks) != 1 || rep.Save.Disks[0].Path != file || rep.Snapshots[0].Frozen != top {
		t.Errorf("%+v, %+v", rep, rep.Save)
	}
	want, tick := ram(t, ctx, vm), lastTick(t, vm.Console(), 16)
	ok(t, vm.Quit(ctx))
	l.run(t, "verify", "--all")

	over := filepath.Join(l.dir, "over")
	img(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", top, "-F", "qcow2", over)
	c.Args = append(slices.Clone(c.Args[:len(c.Args)-4]), "-drive", "file="+over+",format=qcow2,if=none,id=d", "-device", "virtio-blk-pci,drive=d,id=vd")
	t.Run("resumed", func(t *testing.T) { l.bothWays(t, ctx, c, "vm@3", want, tick) }) // which ends its QEMUs

	// Overlays that are put together go into what pages are on.
	img(t, "qemu-img", "commit", "-q", top)
	for _, name := range []string{"vm@2", "vm@3"} {
		out, err := exec.Command("flic-migrate", "restore", "--store", l.store, name).CombinedOutput()
		if err == nil || !strings.Contains(string(out), file+" was written to") || !strings.Contains(string(out), "digest mismatch") {
			t.Errorf("%s: %v, %.300s", name, err, out)
		}
	}
}
