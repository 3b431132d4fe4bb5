package lazy_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
)

const (
	diskFiles     = 8
	diskFilePages = 256
)

// newDisk makes an ext4 image with small files below /boot and the files
// /data/0, /data/1 … of pages that are all different. The guest reads them
// through virtio-blk, whose DMA goes to RAM that may not be there yet.
func newDisk(t *testing.T) (image string, pages map[uint64][]byte) {
	t.Helper()
	dir := t.TempDir()
	tree := filepath.Join(dir, "tree")
	check(t, os.MkdirAll(filepath.Join(tree, "boot"), 0o755))
	check(t, os.MkdirAll(filepath.Join(tree, "data"), 0o755))
	check(t, os.WriteFile(filepath.Join(tree, "boot", "x"), []byte("x"), 0o644))
	pages = make(map[uint64][]byte)
	r := rand.New(rand.NewPCG(99, 99))
	for i := range diskFiles {
		var file []byte
		for range diskFilePages {
			page := make([]byte, 0, 4096)
			for len(page) < 4096 {
				page = binary.LittleEndian.AppendUint64(page, r.Uint64())
			}
			pages[binary.LittleEndian.Uint64(page)] = page
			file = append(file, page...)
		}
		check(t, os.WriteFile(filepath.Join(tree, "data", fmt.Sprint(i)), file, 0o644))
	}
	image = filepath.Join(dir, "disk.ext4")
	// /usr/sbin is not in everyone's PATH.
	cmd := exec.Command("/usr/sbin/mkfs.ext4", "-q", "-b", "4096", "-O", "^has_journal", "-d", tree, image, "32M")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v: %s", err, out)
	}
	return image, pages
}

// diskOK fails unless every page of the disk's files is in the guest's page
// cache as it is on the disk. It stops the guest.
func diskOK(t *testing.T, vm *qemutest.VM, pages map[uint64][]byte) {
	t.Helper()
	check(t, qmp.Stop(context.Background(), vm.QMP))
	ram, err := vm.RAM(context.Background())
	check(t, err)
	found, wrong := make(map[uint64]bool), 0
	main := ram["pc.ram"]
	for at := 0; at+4096 <= len(main); at += 4096 {
		key := binary.LittleEndian.Uint64(main[at:])
		if page, ok := pages[key]; ok {
			if bytes.Equal(page, main[at:at+4096]) {
				found[key] = true
			} else {
				wrong++
			}
		}
	}
	if len(found) != len(pages) || wrong > 0 {
		t.Errorf("of the %d pages the guest read from its disk, %d are right in its page cache, %d begin right and go on wrong", len(pages), len(found), wrong)
	}
}

// load keeps a guest busy until ctx ends: it changes pages, reads its disk and
// checks its memory. It returns an error of what the guest says.
func load(ctx context.Context, vm *qemutest.VM) error {
	// A serial port can lose what it is sent before its guest runs again.
	if _, err := vm.Expect(ctx, `tick \d+`); err != nil {
		return ignoreEnd(ctx, err)
	}
	if err := vm.Send("dirty 200 64"); err != nil {
		return err
	}
	for i := 0; ; i++ {
		command, answer := fmt.Sprintf("read data/%d", i%diskFiles), fmt.Sprintf(`read %d\r`, diskFilePages*4096)
		if i%4 == 3 {
			command, answer = "check", `check ok \d+`
		}
		if err := vm.Send(command); err != nil {
			return err
		}
		if _, err := vm.Expect(ctx, `(?:error: |check bad)[^\r]*\r|`+answer); err != nil {
			return ignoreEnd(ctx, err)
		}
		if s := lastWrong(vm.Console()); s != "" {
			return fmt.Errorf("the guest says: %s", s)
		}
	}
}

// ignoreEnd drops the error of a wait that ctx has ended.
func ignoreEnd(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// readAll has the guest read all files of its disk and stop changing pages.
func readAll(t *testing.T, vm *qemutest.VM) {
	t.Helper()
	// Whatever load was answered last may still be on its way.
	vm.Ask(t, "tick?")
	vm.Ask(t, "dirty 0")
	for i := range diskFiles {
		if s := vm.Ask(t, fmt.Sprintf("read data/%d", i)); s != fmt.Sprint(diskFilePages*4096) {
			t.Fatalf("reading the disk: %s", s)
		}
	}
	if s := lastWrong(vm.Console()); s != "" {
		t.Fatalf("the guest says: %s", s)
	}
}

// lastWrong finds what a guest may never say.
func lastWrong(console string) string {
	for _, bad := range []string{"error:", "check bad", "I/O error", "Oops", "BUG:", "EXT4-fs error"} {
		if i := bytes.LastIndex([]byte(console), []byte(bad)); i >= 0 {
			return console[i:min(i+200, len(console))]
		}
	}
	return ""
}
