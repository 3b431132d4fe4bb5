package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
)

// keptLab is a lab with a guest that has a disk of its own, a MiB of which is in its memory.
type keptLab struct {
	*lab
	vm   *qemutest.VM
	c    qemutest.Config
	file string // the disk
	how  string // keep: disk blocks are shared, or copy
}

// newKeptLab makes one, in which disk blocks can be shared if that can be had here.
func newKeptLab(t *testing.T, memory string, reflink bool) *keptLab {
	t.Helper()
	k := &keptLab{lab: newLab(t), how: "copy"}
	if reflink {
		if dir := tiertest.ReflinkDir(t); dir != "" {
			k.how, k.dir, k.store = "keep", dir, filepath.Join(dir, "store")
		}
	}
	content := noise(768)
	k.file = filepath.Join(k.dir, "disk.qcow2")
	ok(t, os.WriteFile(k.part("first"), content[:1<<20], 0o600))
	ok(t, os.WriteFile(k.part("second"), content[1<<20:2<<20], 0o600))
	img(t, "qemu-img", "create", "-q", "-f", "qcow2", k.file, "8M")
	img(t, "qemu-io", "-f", "qcow2", "-c", "write -s "+k.part("first")+" 0 1M", k.file)
	k.c = q35.tiny(t, memory, content, 1)
	k.vm = qemutest.Start(t, k.with(k.file))
	k.vm.WaitFor(t, `tick (\w+)\r`)
	return k
}

func (k *keptLab) part(name string) string { return filepath.Join(k.dir, name) }

// with is the guest with another file for its disk.
func (k *keptLab) with(file string) qemutest.Config {
	c := k.c
	c.Args = append(slices.Clone(c.Args), "-drive", "file="+file+",format=qcow2,if=none,id=d", "-device", "virtio-blk-pci,drive=d,id=vd")
	return c
}

// writes has QEMU write to the disk, as a guest does.
func (k *keptLab) writes(t *testing.T, what string) {
	t.Helper()
	_, err := qmp.HumanMonitor(t.Context(), k.vm.QMP, `qemu-io -d vd/virtio-backend "write `+what+`"`)
	ok(t, err)
}

// has fails unless a file is a disk with both parts, and nothing else.
func (k *keptLab) has(t *testing.T, file string) {
	t.Helper()
	want := k.part("want")
	b, err := os.ReadFile(k.part("first"))
	ok(t, err)
	second, err := os.ReadFile(k.part("second"))
	ok(t, err)
	ok(t, os.WriteFile(want, append(b, second...), 0o600))
	ok(t, os.Truncate(want, 8<<20))
	img(t, "qemu-img", "compare", "-f", "qcow2", "-F", "raw", file, want)
}

// resumed resumes a checkpoint with a file for the guest's disk, and returns what is said.
func (k *keptLab) resumed(t *testing.T, file, name string, flags ...string) (string, error) {
	t.Helper()
	vm := qemutest.Start(t, destination(k.with(file), "defer"))
	defer vm.Kill()
	out, err := exec.Command("flic-migrate", append([]string{"resume", "--store", k.store, "--qmp", vm.Socket, name}, flags...)...).CombinedOutput()
	return string(out), err
}

// kept are the files of copies in the store.
func (k *keptLab) kept(t *testing.T) []string {
	t.Helper()
	list, err := filepath.Glob(filepath.Join(k.store, "frozen", "*"))
	ok(t, err)
	return slices.DeleteFunc(list, func(name string) bool { return strings.HasSuffix(name, ".digests") })
}

// TestKept: the store keeps the disk as it is while the guest stands still, and pages that are
// on it are not stored; the guest goes on to write to its own. Later the checkpoint is resumed
// with what was kept, exactly, though the disk and the store's place are others.
func TestKept(t *testing.T) {
	t.Parallel()
	for name, reflink := range map[string]bool{"copy": false, "reflink": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx, k := limit(t), newKeptLab(t, "32M", reflink)
			shared := k.how == "keep"
			freeze := []string{"--disks", k.how, "--freeze"}
			if !shared {
				out, err := exec.Command("flic-migrate", "checkpoint", "--store", k.store, "--qmp", k.vm.Socket, "--freeze", "vm").CombinedOutput()
				if err == nil || !strings.Contains(string(out), k.file) || !strings.Contains(string(out), "reflink") {
					t.Errorf("on a file system without reflink: %v: %s", err, out)
				}
				runsOn(t, k.vm)
				k.nothing(t)
			}
			k.writes(t, "-s "+k.part("second")+" 1M 1M")
			rep := k.checkpoint(t, k.vm, append(freeze, "--then", "pause")...)
			s := rep.Save
			if s.Disk != 512 || len(s.Disks) != 1 || s.Disks[0].Path != k.file || !s.Disks[0].Kept || len(rep.Warnings) > 0 || len(rep.Snapshots) > 0 {
				t.Fatalf("%+v, %+v", rep, s)
			}
			files := k.kept(t)
			if len(rep.Kept) != 1 || len(files) != 1 || rep.Kept[0].Image != k.file || rep.Kept[0].File != files[0] || rep.Kept[0].Shared != shared || rep.KeptTime == 0 {
				t.Fatalf("%+v; there are %v", rep.Kept, files)
			}
			if fi, err := os.Stat(files[0]); err != nil || fi.Mode().Perm() != 0o600 {
				t.Errorf("%v, %v", fi, err)
			}
			want, tick := ram(t, ctx, k.vm), lastTick(t, k.vm.Console(), 16)
			ok(t, k.vm.QMP.Execute(ctx, "cont", nil, nil))
			runsOn(t, k.vm)
			k.writes(t, "-P 1 0 2M")
			k.has(t, files[0])

			// What refers to it has no page on its disk, and one with a copy of its own has that.
			if rep := k.checkpoint(t, k.vm); rep.Save.Disk != 0 || rep.Save.Parent != "vm@1" || len(rep.Kept) != 0 {
				t.Errorf("%+v, %+v", rep, rep.Save)
			}
			if rep := k.checkpoint(t, k.vm, freeze...); rep.Save.Disk != 0 || len(rep.Kept) != 1 || len(k.kept(t)) != 2 {
				t.Errorf("%+v, %+v", rep, rep.Save)
			}
			ok(t, k.vm.Quit(ctx))
			k.run(t, "verify", "--all")
			if out := k.run(t, "show", "vm@1"); !strings.Contains(out, "kept in "+files[0]) || !strings.Contains(out, "kept copy of "+k.file+": 512 pages") {
				t.Errorf("show: %s", out)
			}
			if out := k.run(t, "list"); strings.Count(out, "with 1 disk") != 2 {
				t.Errorf("list: %s", out)
			}
			if out := k.run(t, "disk", "list"); strings.Contains(out, "frozen") {
				t.Errorf("indexes that nobody needs: %s", out)
			}

			// With the disk as it has become; with the copy itself.
			if out, err := k.resumed(t, k.file, "vm@1"); err == nil || !strings.Contains(out, "was written to") || !strings.Contains(out, "disk thaw vm@1") {
				t.Errorf("%v: %s", err, out)
			}
			if out, err := k.resumed(t, files[0], "vm@1", "--force"); err == nil || !strings.Contains(out, "would be written to") {
				t.Errorf("%v: %s", err, out)
			}
			// The store goes somewhere else, and the disk away.
			was := k.store
			k.store += "-moved"
			ok(t, os.Rename(was, k.store))
			ok(t, os.Remove(k.file))
			var thawed []struct{ Path, Image, Format string }
			ok(t, json.Unmarshal([]byte(k.run(t, "disk", "thaw", "--json", "vm@1")), &thawed))
			if len(thawed) != 1 || thawed[0].Path != k.file+".vm@1" || thawed[0].Image != k.file || thawed[0].Format != "qcow2" {
				t.Fatalf("%+v", thawed)
			}
			k.has(t, thawed[0].Path)
			t.Run("resumed", func(t *testing.T) { k.bothWays(t, ctx, k.with(thawed[0].Path), "vm@1", want, tick) }) // which ends its QEMUs
			if out, err := exec.Command("flic-migrate", "disk", "thaw", "--store", k.store, "vm@1").CombinedOutput(); err == nil {
				t.Errorf("thawed over a file: %s", out)
			}
			if out, err := exec.Command("flic-migrate", "disk", "thaw", "--store", k.store, "vm@2").CombinedOutput(); err == nil || !strings.Contains(string(out), "keeps no disks") {
				t.Errorf("%v: %s", err, out)
			}

			var removed []struct {
				Frozen int64 `json:"frozen_bytes"`
			}
			ok(t, json.Unmarshal([]byte(k.run(t, "rm", "--json", "vm@1")), &removed))
			if len(removed) != 1 || removed[0].Frozen < 2<<20 || len(k.kept(t)) != 1 {
				t.Errorf("%+v; %v", removed, k.kept(t))
			}
			k.run(t, "verify", "--all")
			// A bit of it has gone bad, and its times are as they were.
			bad := k.kept(t)[0]
			fi, err := os.Stat(bad)
			ok(t, err)
			flip := func() {
				t.Helper()
				b, err := os.ReadFile(bad)
				ok(t, err)
				b[len(b)-1] ^= 1
				ok(t, os.WriteFile(bad, b, 0o600))
				ok(t, os.Chtimes(bad, fi.ModTime(), fi.ModTime()))
			}
			flip()
			where := fmt.Sprintf("%s: offset %d: ", bad, (fi.Size()-1)>>20<<20)
			for _, args := range [][]string{{"verify", "vm@3"}, {"disk", "thaw", "vm@3"}} {
				cmd := exec.Command("flic-migrate", append(args, "--store", k.store)...)
				out, _ := cmd.CombinedOutput()
				if cmd.ProcessState.ExitCode() != 4 || !strings.Contains(string(out), where) {
					t.Errorf("%v: %v: %s", args, cmd.ProcessState, out)
				}
			}
			if _, err := os.Lstat(k.file + ".vm@3"); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the file that is not what it was: %v", err)
			}
			if out := k.run(t, "verify", "--skip-disks", "vm@3"); !strings.Contains(out, bad+", which is a disk that is kept with it, is not checked: --skip-disks") {
				t.Errorf("verify --skip-disks: %s", out)
			}
			if out := k.run(t, "disk", "thaw", "--skip-check", "vm@3"); !strings.Contains(out, "; not checked: --skip-check") || strings.Contains(out, "as it was") {
				t.Errorf("disk thaw --skip-check: %s", out)
			}
			ok(t, os.Remove(k.file+".vm@3"))
			flip()
			k.run(t, "verify", "vm@3")
			// Without digests nobody can tell, until gc makes them.
			ok(t, os.Remove(bad+".digests"))
			var verified []struct {
				OK         bool
				NotChecked []string `json:"not_checked"`
			}
			ok(t, json.Unmarshal([]byte(k.run(t, "verify", "--json", "vm@3")), &verified))
			if len(verified) != 1 || !verified[0].OK || !slices.Equal(verified[0].NotChecked, []string{bad}) {
				t.Errorf("verify: %+v", verified)
			}
			if out := k.run(t, "show", "vm@3"); !strings.Contains(out, "not checked") {
				t.Errorf("show: %s", out)
			}
			k.run(t, "gc", "--skip-digests")
			if out := k.run(t, "verify", "vm@3"); !strings.Contains(out, bad+", which is a disk that is kept with it, is not checked: it has no digests yet") {
				t.Errorf("verify: %s", out)
			}
			if out := k.run(t, "gc"); !strings.Contains(out, "1 disk that is kept has digests now") {
				t.Errorf("gc: %s", out)
			}
			if out := k.run(t, "verify", "vm@3"); strings.Contains(out, "not checked") {
				t.Errorf("verify: %s", out)
			}
			// A copy that is not what it was.
			ok(t, os.Truncate(k.kept(t)[0], 100))
			for _, args := range [][]string{{"verify", "vm@3"}, {"disk", "thaw", "vm@3"}} {
				out, err := exec.Command("flic-migrate", append(args, "--store", k.store)...).CombinedOutput()
				if err == nil || !strings.Contains(string(out), "it was cut") || !strings.Contains(string(out), k.kept(t)[0]) {
					t.Errorf("%v: %v: %s", args, err, out)
				}
			}
		})
	}
}

// TestKeptArmed: a checkpoint that was armed with --disks keep has the disk as it is when the
// guest stands still. One that was armed without is not used.
func TestKeptArmed(t *testing.T) {
	t.Parallel()
	ctx, k := limit(t), newKeptLab(t, "96M", true)
	k.checkpoint(t, k.vm, "--disks", k.how, "--arm")
	k.isArmed(t, k.vm)
	k.writes(t, "-s "+k.part("second")+" 1M 1M")
	rep := k.checkpoint(t, k.vm, "--disks", k.how, "--then", "pause")
	if !rep.Armed || len(rep.Kept) != 1 || rep.Save.Disk != 0 || len(k.kept(t)) != 2 {
		t.Fatalf("%+v, %+v", rep, rep.Save)
	}
	k.has(t, rep.Kept[0].File)
	if m := k.show(t, "vm@2"); len(m.Kept) != 1 || m.VMDisks[0].Kept != m.Kept[0] || !strings.HasSuffix(rep.Kept[0].File, m.Kept[0].String()) {
		t.Errorf("%+v, %+v", m.Identity, m.VMDisks)
	}
	want, tick := ram(t, ctx, k.vm), lastTick(t, k.vm.Console(), 16)
	ok(t, k.vm.QMP.Execute(ctx, "cont", nil, nil))
	k.writes(t, "-P 1 0 2M")
	k.checkpoint(t, k.vm, "--arm")
	k.isArmed(t, k.vm)
	if rep := k.checkpoint(t, k.vm, "--disks", k.how); rep.Armed || len(rep.Kept) != 1 {
		t.Errorf("%+v", rep)
	}
	ok(t, k.vm.Quit(ctx))
	k.run(t, "verify", "--all")
	ok(t, os.Remove(k.file))
	k.run(t, "disk", "thaw", "--to", k.dir, "vm@2")
	t.Run("resumed", func(t *testing.T) { k.bothWays(t, ctx, k.with(k.file), "vm@2", want, tick) })
	k.run(t, "rm", "--all", "vm")
	if left := k.kept(t); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}

// TestKeptFails: a save that fails or is killed leaves no copy, and the guest runs on.
func TestKeptFails(t *testing.T) {
	t.Parallel()
	ctx, k := limit(t), newKeptLab(t, "32M", false)
	try := func(what, says string, flags ...string) {
		t.Helper()
		args := append([]string{"checkpoint", "--store", k.store, "--qmp", k.vm.Socket, "vm"}, flags...)
		out, err := exec.Command("flic-migrate", args...).CombinedOutput()
		if err == nil || !strings.Contains(string(out), says) {
			t.Errorf("%s: %v: %s", what, err, out)
		}
		runsOn(t, k.vm)
		if left := k.kept(t); len(left) != 0 {
			t.Errorf("%s: left: %v", what, left)
		}
	}
	// A mirror that has nothing more to do waits, and would write if the guest did.
	mirror := k.part("mirror")
	ok(t, k.vm.QMP.Execute(ctx, "drive-mirror", map[string]any{"device": "d", "target": mirror, "sync": "full", "format": "qcow2"}, nil))
	try("a block job", "block jobs at work", "--disks", "copy")
	ok(t, k.vm.QMP.Execute(ctx, "block-job-cancel", map[string]any{"device": "d", "force": true}, nil))
	until(t, "the end of the job", func() bool {
		var jobs []any
		ok(t, k.vm.QMP.Execute(ctx, "query-block-jobs", nil, &jobs))
		return len(jobs) == 0
	})
	try("with --mode live", "--mode is live", "--freeze", "--mode", "live")
	try("with --no-disks", "--no-disks forbids", "--disks", "keep", "--freeze", "--no-disks")
	// A parent that is not there fails the save, when the copy has been made.
	k.checkpoint(t, k.vm)
	try("a save that fails", "vm@7", "--disks", "copy", "--parent", "vm@7")
	for n := range 4 {
		cmd := exec.Command("flic-migrate", "checkpoint", "--store", k.store, "--qmp", k.vm.Socket, "vm", "--disks", "copy", "--freeze")
		ok(t, cmd.Start())
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		before := len(k.kept(t))
		until(t, "a copy, or the end", func() bool { return len(k.kept(t)) > before || len(ended) > 0 })
		time.Sleep(time.Duration(n) * 20 * time.Millisecond)
		_ = cmd.Process.Kill() // it may have ended
		<-ended
		until(t, "the guest to run", func() bool {
			s, err := qmp.QueryStatus(ctx, k.vm.QMP)
			return err == nil && s.Running
		})
		runsOn(t, k.vm)
		k.run(t, "gc")
		if have, listed := len(k.kept(t)), strings.Count(k.run(t, "list"), "with 1 disk"); have != listed {
			t.Errorf("killed, %d: %d copies, and %d checkpoints have some", n, have, listed)
		}
	}
	k.run(t, "verify", "--all")
	if rep := k.checkpoint(t, k.vm, "--disks", "copy"); len(rep.Kept) != 1 || rep.Kept[0].Image != k.file || rep.Save.Disk != 0 {
		t.Errorf("%+v", rep)
	}
	ok(t, k.vm.Quit(ctx))
}

// TestDomainKept: the store keeps the disk of a domain with its checkpoints, ordinary and armed
// ones. libvirt hears nothing of it: the domain goes on with its own file, and is started again
// with what was kept in its place.
func TestDomainKept(t *testing.T) {
	t.Parallel()
	dir, how := tiertest.ReflinkDir(t), "keep"
	if dir == "" {
		dir, how = t.TempDir(), "copy"
	}
	file := filepath.Join(dir, "disk.qcow2")
	img(t, "qemu-img", "create", "-q", "-f", "qcow2", file, "4M")
	img(t, "qemu-io", "-f", "qcow2", "-c", "write -P 5 0 64k", file)
	d := newDomainLab(t, "web1", qemutest.Linux, "flic.fill=8 flic.dirty=10", 0, func(c *qemutest.Domain) { c.Disk = file })
	d.store = filepath.Join(dir, "store")
	vm := d.attach(t)
	vm.WaitFor(t, `flic ready`)
	before, described := settings(t, vm), d.Do(t, "dumpxml", "--inactive", d.name)
	has := func(path string, pattern int) {
		t.Helper()
		img(t, "qemu-io", "-r", "-U", "-f", "qcow2", "-c", fmt.Sprintf("read -P %d 0 64k", pattern), path)
	}
	var kept []string // with each checkpoint
	for _, arm := range [][]string{nil, {"--arm"}, {"--then", "pause"}} {
		var rep checkpointReport
		ok(t, json.Unmarshal([]byte(d.on(t, "checkpoint", append([]string{"--disks", how, "--json", "vm"}, arm...)...)), &rep))
		if len(rep.Kept) != 1 || rep.Kept[0].Image != file || rep.Kept[0].Shared != (how == "keep") || len(rep.Snapshots)+len(rep.Warnings) > 0 || rep.Armed != (len(kept) == 2) {
			t.Fatalf("%v: %+v", arm, rep)
		}
		kept = append(kept, rep.Kept[0].File)
		if m := d.show(t, rep.Checkpoint); len(m.Kept) != 1 || m.VMDisks[0].Kept != m.Kept[0] || m.Libvirt == nil || !strings.Contains(m.Libvirt.XML, file) {
			t.Errorf("%v: %+v", arm, m.Identity)
		}
		if rep.ArmedProcess > 0 {
			d.isArmed(t, vm)
		}
		if len(kept) < 3 {
			runsOn(t, vm)
			d.Do(t, "qemu-monitor-command", d.name, "--hmp", fmt.Sprintf(`qemu-io -d virtio-disk0/virtio-backend "write -P %d 0 64k"`, 5+len(kept)))
		}
	}
	if now := d.Do(t, "dumpxml", "--inactive", d.name); now != described {
		t.Errorf("the domain was\n%s\nand is\n%s", described, now)
	}
	if after := settings(t, vm); after != before {
		t.Errorf("settings were\n%s\nand are\n%s", before, after)
	}
	d.gone(t)
	if out := d.run(t, "verify", "--all"); strings.Contains(out, "not checked") {
		t.Errorf("verify: %s", out)
	}
	for n, path := range kept {
		name := fmt.Sprintf("vm@%d", n+1)
		has(path, 5+n)
		if n < len(kept)-1 {
			out, err := d.command("resume", name).CombinedOutput()
			if err == nil || !strings.Contains(string(out), file+" was written to") || !strings.Contains(string(out), "disk thaw "+name) {
				t.Errorf("%s: %v: %s", name, err, out)
			}
		}
		ok(t, os.Remove(file))
		d.run(t, "disk", "thaw", "--to", dir, name)
		d.on(t, "resume", name)
		vm = d.attach(t)
		runsOn(t, vm)
		checks(t, vm)
		has(file, 5+n)
		d.Do(t, "qemu-monitor-command", d.name, "--hmp", `qemu-io -d virtio-disk0/virtio-backend "write -P 1 0 64k"`)
		d.gone(t)
		has(file, 1)
		has(path, 5+n)
	}
	if out := d.run(t, "verify", "--all"); strings.Contains(out, "not checked") {
		t.Errorf("verify: %s", out)
	}
}
