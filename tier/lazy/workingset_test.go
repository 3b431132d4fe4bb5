package lazy_test

import (
	"context"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
	"github.com/flic-migrate/flic-migrate/tier/workingset"
)

// TestWorkingSets has nothing, a twentieth and all of a guest with two CPUs and
// a virtio disk in NVRAM.
func TestWorkingSets(t *testing.T) {
	ctx := context.Background()
	disk, pages := newDisk(t)
	config := qemutest.Config{Guest: qemutest.Linux, Machine: "pc", CPUs: 2, Memory: "128M", Disk: disk, Kernel: "flic.fill=16 flic.read=boot"}
	src := boot(t, config)
	for _, share := range []float64{0, 0.05, 1} {
		c := newChild(t)
		if share > 0 {
			c.NVRAM = filepath.Join(filepath.Dir(c.Store), "nvram")
			c.WorkingSet = filepath.Join(filepath.Dir(c.Store), "set")
			writeWorkingSet(t, src, c.WorkingSet, share)
		}
		ram := saveGuest(t, src, c)

		c.Op = "serve"
		vm, _ := destination(t, config, uri(t, c))
		completed(t, vm)
		after, err := vm.RAM(ctx)
		check(t, err)
		if diff := qemutest.DiffRAM(ram, after); diff != "" {
			t.Errorf("share %v in NVRAM: %s", share, diff)
		}
		rep := readReport(t, c.Report)
		t.Logf("share %v in NVRAM: %+v", share, rep)
		if rep.HotPages < int64(share*float64(rep.Pages)/2) {
			t.Errorf("share %v in NVRAM, but only %d of %d pages were sent as hot", share, rep.HotPages, rep.Pages)
		}
		vm.Kill()

		c.Hold = 300 * time.Millisecond // so that there is something to wait for
		vm, _ = destination(t, config, uri(t, c))
		check(t, qmp.Cont(ctx, vm.QMP))
		busy, done := context.WithCancel(ctx)
		ended := make(chan error)
		go func() { ended <- load(busy, vm) }()
		completed(t, vm)
		done()
		check(t, <-ended)
		readAll(t, vm)
		guestOK(t, vm)
		diskOK(t, vm, pages)
		t.Logf("under load: %+v", readReport(t, c.Report))
		vm.Kill()
		check(t, qmp.Cont(ctx, src.QMP))
	}
}

// writeWorkingSet writes a set of a random share of all pages of a VM.
func writeWorkingSet(t *testing.T, vm *qemutest.VM, name string, share float64) {
	t.Helper()
	list, err := vm.Blocks(context.Background())
	check(t, err)
	var blocks []workingset.Block
	for _, b := range list {
		blocks = append(blocks, workingset.Block{Name: b.Name, Pages: int64(b.Used / 4096)})
	}
	ws, err := workingset.New(4096, blocks)
	check(t, err)
	r := rand.New(rand.NewPCG(1, 5))
	for i, b := range blocks {
		for p := range b.Pages {
			if r.Float64() < share {
				ws.SetHeat(i, p, uint8(1+r.IntN(3)))
			}
		}
	}
	f, err := os.Create(name)
	check(t, err)
	defer f.Close()
	_, err = ws.WriteTo(f)
	check(t, err)
}
