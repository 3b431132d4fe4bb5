package lazy_test

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// TestClones resumes one checkpoint eight times at once. As long as they load
// it can't be removed, and a garbage collection does them no harm.
func TestClones(t *testing.T) {
	const clones = 8
	ctx := context.Background()
	config := qemutest.Config{Guest: qemutest.Linux, Memory: "96M", Kernel: "flic.fill=16"}
	c := newChild(t)
	src := boot(t, config)
	c.NVRAM, c.WorkingSet = filepath.Join(filepath.Dir(c.Store), "nvram"), filepath.Join(filepath.Dir(c.Store), "set")
	writeWorkingSet(t, src, c.WorkingSet, 0.2)
	saveGuest(t, src, c)
	src.Kill()
	st, err := store.Open(context.Background(), vfs.OS, c.Store, false)
	check(t, err)

	var vms []*qemutest.VM
	var monitors []*monitor
	var reports []string
	for i := range clones {
		c.Op, c.Report = "serve", filepath.Join(filepath.Dir(c.Store), fmt.Sprint("report", i))
		c.Hold, c.KillAfter = 3*time.Second, 0 // they load at least so long
		vm, m := incoming(t, config)
		check(t, migration.Incoming(ctx, vm.QMP, uri(t, c)))
		vms, monitors, reports = append(vms, vm), append(monitors, m), append(reports, c.Report)
	}
	for _, vm := range vms {
		waitFor(t, vm, func(s qmp.RunState) bool { return s.Status != "inmigrate" })
		check(t, qmp.Cont(ctx, vm.QMP))
	}
	if _, err := st.Remove(ctx, store.Ref{VM: "vm", N: 1}); !errors.Is(err, store.ErrInUse) {
		t.Errorf("removed while eight restores read it: %v", err)
	}
	if rep, err := st.GC(context.Background()); err != nil || rep.Parts != 0 || rep.NVRAMExtents != 0 {
		t.Errorf("garbage collection: %+v, %v", rep, err)
	}
	for _, vm := range vms {
		vm.WaitFor(t, `tick \d+`)
		check(t, vm.Send("check"))
	}
	for i, vm := range vms {
		vm.WaitFor(t, `check ok 4096 0\r`)
		if s := monitors[i].end(t); s != migration.StatusCompleted {
			t.Fatalf("clone %d: %s", i, s)
		}
		guestOK(t, vm)
		t.Logf("clone %d: %+v", i, readReport(t, reports[i]))
	}
	verified(t, c)
	// Servers end a moment after QEMU has the last byte.
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if _, err = st.Remove(ctx, store.Ref{VM: "vm", N: 1}); err == nil || time.Now().After(end) {
			break
		}
	}
	check(t, err)
}
