package main

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
)

// recorded saves a stream that a QEMU 7.2 has written, and returns RAM as it was.
func (l *lab) recorded(t *testing.T, name string) map[string][]byte {
	t.Helper()
	root, err := qemutest.ModuleRoot()
	ok(t, err)
	f, err := os.Open(filepath.Join(root, "testdata", name+".stream.zst"))
	ok(t, err)
	defer f.Close()
	z, err := zstd.NewReader(f)
	ok(t, err)
	defer z.Close()
	b, err := io.ReadAll(z)
	ok(t, err)
	cmd := exec.Command("flic-migrate", "save", "--store", l.store, "--vm", "vm", "--quiet")
	cmd.Stdin = bytes.NewReader(b)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	guest, err := tiertest.Load(bytes.NewReader(b))
	ok(t, err)
	ram := make(map[string][]byte)
	for i, block := range guest.Blocks {
		content := make([]byte, block.Used)
		for page := range block.Used / uint64(guest.PageSize) {
			copy(content[page*uint64(guest.PageSize):], guest.Pages[tiertest.PageID{Block: i, Page: page}])
		}
		ram[block.Name] = content
	}
	return ram
}

// TestPortableRestores: checkpoints that QEMU 7.2 has written with capabilities that
// newer ones no longer have, or that this one has not set, restore into whatever QEMU
// is here, eagerly and lazily. Without --portable they are refused.
func TestPortableRestores(t *testing.T) {
	for _, tc := range []struct{ stream, memory string }{
		{"q35-compress", "32M"},
		{"q35-postcopy-ram", qemutest.LiveMemory},
	} {
		t.Run(tc.stream, func(t *testing.T) {
			t.Parallel()
			ctx, l := limit(t), newLab(t)
			want := l.recorded(t, tc.stream)
			c := qemutest.Config{Machine: l.show(t, "vm@1").Machine, Memory: tc.memory}
			equal := func(vm *qemutest.VM) {
				t.Helper()
				// Not all blocks can be read from outside, but main memory can.
				have := ram(t, ctx, vm)
				if len(have["pc.ram"]) != len(want["pc.ram"]) {
					t.Fatalf("pc.ram has %d bytes, %d were saved", len(have["pc.ram"]), len(want["pc.ram"]))
				}
				saved := make(map[string][]byte)
				for name := range have {
					saved[name] = want[name]
				}
				if diff := qemutest.DiffRAM(saved, have); diff != "" {
					t.Error(diff)
				}
				vm.Kill()
			}

			vm := qemutest.Start(t, destination(c, "defer"))
			if err := migration.Incoming(ctx, vm.QMP, l.restore("vm@1")); err == nil {
				if _, err := migration.Wait(ctx, vm.QMP); err == nil {
					t.Error("it is loaded as it was saved: this test shows nothing")
				} else if failed := new(migration.Error); !errors.As(err, &failed) {
					t.Logf("as it was saved: %v", err)
				}
			}
			vm.Kill()

			vm = qemutest.Start(t, destination(c, l.restore("--portable", "vm@1")))
			_, err := migration.Wait(ctx, vm.QMP)
			ok(t, err)
			equal(vm)
			for _, lazy := range []string{"never", "always"} {
				vm := qemutest.Start(t, destination(c, "defer"))
				doc, server := l.resume(t, vm, "--lazy", lazy, "--paused", "vm@1")
				if doc.Lazy != (lazy == "always") || !doc.Lazy && server.Rewritten == 0 {
					t.Errorf("%s: %+v, server %+v", lazy, doc, server)
				}
				equal(vm)
			}
		})
	}
}

// TestPortableDisks: a checkpoint with the content of a disk in its stream can't be
// rewritten; nothing of it goes to QEMU.
func TestPortableDisks(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	want := l.recorded(t, "q35-block")
	cmd := exec.Command("flic-migrate", "restore", "--store", l.store, "--portable", "--quiet", "vm@1")
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err == nil || strings.HasPrefix(string(out), "QEVM") || !strings.Contains(stderr.String(), "content of a disk") {
		t.Errorf("%v, %d bytes, %s", err, len(out), stderr.String())
	}

	// A QEMU that still has block migration takes it as it is; another is told so.
	disk := filepath.Join(l.dir, "disk")
	ok(t, os.WriteFile(disk, nil, 0o600))
	ok(t, os.Truncate(disk, 6<<20))
	c := qemutest.Config{Machine: l.show(t, "vm@1").Machine, Memory: qemutest.LiveMemory, Args: []string{
		"-drive", "if=none,id=disk0,format=raw,file=" + disk, "-device", "virtio-blk-pci,drive=disk0,id=virtio0"}}
	vm := qemutest.Start(t, destination(c, "defer"))
	known, err := migration.Capabilities(t.Context(), vm.QMP)
	ok(t, err)
	if _, takes := known["block"]; !takes {
		l.fails(t, "flic-migrate", vm, exitFailed, []string{"content of its disks", "up to 9.0"}, "vm@1")
		state(t, vm, "inmigrate")
		return
	}
	if doc, _ := l.resume(t, vm, "--paused", "vm@1"); doc.Lazy || !strings.Contains(doc.Reason, "block") {
		t.Errorf("%+v", doc)
	}
	if have := ram(t, limit(t), vm)["pc.ram"]; !bytes.Equal(have, want["pc.ram"]) {
		t.Error("RAM differs")
	}
	if content, err := os.ReadFile(disk); err != nil || !bytes.ContainsFunc(content, func(r rune) bool { return r != 0 }) {
		t.Errorf("the disk has nothing of what was saved: %v", err)
	}
}
