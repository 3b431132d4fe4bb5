package main

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
)

// TestDiskPages saves Linux guests that have read a file from their disk: the pages that
// have it are on the disk and not stored, whether the guest has the image itself, read
// only, or a layer on it that it writes to. Restored eagerly and lazily its memory is what
// it was. Once the image has changed it is not restored, and a checkpoint that has
// absorbed what it needs is.
func TestDiskPages(t *testing.T) {
	t.Parallel()
	for _, overlay := range []bool{false, true} {
		t.Run(fmt.Sprintf("overlay %v", overlay), func(t *testing.T) {
			ctx, l := limit(t), newLab(t)
			files, base := filepath.Join(l.dir, "files"), filepath.Join(l.dir, "base")
			file := make([]byte, 6<<20)
			rand.NewChaCha8([32]byte{5}).Read(file)
			ok(t, os.MkdirAll(filepath.Join(files, "some"), 0o755))
			ok(t, os.WriteFile(filepath.Join(files, "some", "file"), file, 0o644))
			if out, err := exec.Command("/sbin/mkfs.ext4", "-q", "-b", "4096", "-d", files, base, "16M").CombinedOutput(); err != nil {
				t.Fatalf("mkfs.ext4: %v\n%s", err, out)
			}
			c := q35.linux("112M", "flic.fill=8 flic.dirty=20 flic.read=/some")
			disk := base
			if overlay {
				disk = filepath.Join(l.dir, "top.qcow2")
				if out, err := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", disk).CombinedOutput(); err != nil {
					t.Fatalf("qemu-img: %v\n%s", err, out)
				}
				c.Args = []string{"-drive", "if=virtio,format=qcow2,file=" + disk}
			} else {
				c.Disk = base
			}
			indexed(t, l, disk)

			vm := qemutest.Start(t, c)
			vm.WaitFor(t, fmt.Sprintf(`flic read %d\r`, len(file)))
			vm.WaitFor(t, `tick 2\r`)
			set(t, vm, fast)
			before := stop(t, ctx, vm)
			saved(t, ctx, vm, l.save("--disk", disk))
			first := l.show(t, "vm@1").Report
			if pages := int64(len(file) / 4096); first.Disk < pages*9/10 || len(first.Disks) != 1 || first.Disks[0].Path != base || first.FlashBytes > 40<<20 {
				t.Errorf("of %d pages %d are on disk: %+v", pages, first.Disk, first)
			}
			unused := fmt.Sprint(first.UnusedDisks)
			if strings.Contains(unused, "top.qcow2 somebody") != overlay {
				t.Errorf("not looked in: %s", unused)
			}
			// The next one has them there still.
			ok(t, qmp.Cont(ctx, vm.QMP))
			runsOn(t, vm)
			after := stop(t, ctx, vm)
			saved(t, ctx, vm, l.save("--disk", disk))
			if second := l.show(t, "vm@2").Report; second.Disk < first.Disk*9/10 || second.Unchanged == 0 {
				t.Errorf("of the next one %d are on disk: %+v", second.Disk, second)
			}
			tick := lastTick(t, vm.Console(), 10)
			vm.Kill()
			l.holds(t, "vm@1", "vm@2")

			vm = restored(t, ctx, c, l.restore("--check-disks", "vm@1"), before)
			vm.Kill()
			vm = qemutest.Start(t, destination(c, "defer"))
			if doc, _ := l.resume(t, vm, "vm@2"); !doc.Lazy {
				t.Errorf("%+v", doc)
			}
			if diff := qemutest.DiffRAM(after, ram(t, ctx, vm)); diff != "" {
				t.Error(diff)
			}
			goesOn(t, ctx, vm, tick, 10)
			checks(t, vm)
			vm.Kill()

			l.run(t, "absorb", "vm@2")
			// Somebody writes to the base, as a commit does, to a block of the file.
			b, err := os.ReadFile(base)
			ok(t, err)
			at := bytes.Index(b, file[1<<20:1<<20+4096])
			b[at] ^= 1
			ok(t, os.WriteFile(base, b, 0o600))
			vm = qemutest.Start(t, destination(c, "defer"))
			defer vm.Kill()
			l.fails(t, "flic-migrate", vm, exitCorrupt, []string{base, "was written to", fmt.Sprint(at), "digest mismatch"}, "vm@1")
			state(t, vm, "inmigrate")
			l.resume(t, vm, "vm@2")
			if diff := qemutest.DiffRAM(after, ram(t, ctx, vm)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// indexed makes an index of a disk image.
func indexed(t *testing.T, l *lab, path string) {
	t.Helper()
	if out, err := exec.Command("flic-migrate", "disk", "index", "--quiet", "--store", l.store, path).CombinedOutput(); err != nil {
		t.Fatalf("disk index: %v\n%s", err, out)
	}
}
