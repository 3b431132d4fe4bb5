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
