package main

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

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

// diskGuest is a tiny guest with a disk that it has for itself.
func diskGuest(t *testing.T, file, format string) qemutest.Config {
	c := q35.tiny(t, "32M", varied(256), 4)
	c.Args = append(c.Args, "-drive", "file="+file+",format="+format+",if=none,id=d", "-device", "virtio-blk-pci,drive=d,id=vd")
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
	vm := qemutest.Start(t, diskGuest(t, file, "qcow2"))
	vm.WaitFor(t, `tick (\w+)\r`)
	var rep struct {
		Snapshots []struct{ Disk, Frozen, Now string }
	}
	ok(t, json.Unmarshal([]byte(l.run(t, "checkpoint", "--json", "--disks", "snapshot", "--qmp", vm.Socket, "vm")), &rep))
	if len(rep.Snapshots) != 1 || rep.Snapshots[0].Frozen != file || !strings.HasPrefix(rep.Snapshots[0].Now, filepath.Join(l.dir, "disk.flic-")) {
		t.Fatalf("%+v", rep)
	}
	runsOn(t, vm)
	// The guest writes.
	var answer string
	ok(t, vm.QMP.Execute(ctx, "human-monitor-command", map[string]string{"command-line": `qemu-io -d vd/virtio-backend "write -P 9 0 64k"`}, &answer))
	l.run(t, "checkpoint", "--disks", "snapshot", "--qmp", vm.Socket, "vm")
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
