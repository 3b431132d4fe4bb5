package lazy_test

import (
	"bytes"
	"context"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// monitor is a second connection to a VM whose commands go out of band: as soon
// as QEMU's main loop touches a page that nobody brings, it answers no others.
type monitor struct {
	*qmp.Monitor
	vm *qemutest.VM
	// states are those in which a migration is over or paused.
	states chan migration.Status
}

func newMonitor(t *testing.T, vm *qemutest.VM) *monitor {
	t.Helper()
	m, err := qmp.Dial(context.Background(), vm.Socket, qmp.Options{OOB: true})
	check(t, err)
	t.Cleanup(func() { m.Close() })
	events, err := m.Events(context.Background())
	check(t, err)
	states := make(chan migration.Status, 64)
	go func() {
		defer close(states)
		for e := range events {
			text, _ := e.Data["status"].(string)
			if s := migration.Status(text); e.Event == "MIGRATION" && (s.Ended() || s == migration.StatusPostcopyPaused) {
				states <- s
			}
		}
	}()
	return &monitor{m, vm, states}
}

// end waits until the migration is completed, paused or failed.
func (m *monitor) end(t *testing.T) migration.Status {
	t.Helper()
	select {
	case s, ok := <-m.states:
		if !ok {
			t.Fatalf("QEMU has ended: %s", m.vm.Output())
		}
		return s
	case <-time.After(time.Minute):
		t.Fatalf("the migration does not end: %s", m.vm.Output())
		panic("unreachable")
	}
}

func (m *monitor) recover(t *testing.T, u string) {
	t.Helper()
	check(t, m.ExecuteOOB(context.Background(), "migrate-recover", map[string]any{"uri": u}, nil))
}

// incoming starts a QEMU that waits for a lazy restore.
func incoming(t *testing.T, config qemutest.Config) (*qemutest.VM, *monitor) {
	t.Helper()
	ctx := context.Background()
	config.Incoming, config.Paused = "defer", true
	vm := qemutest.Start(t, config)
	check(t, migration.SetCapabilities(ctx, vm.QMP, map[string]bool{"events": true}))
	check(t, migration.SetCapabilities(ctx, vm.QMP, map[string]bool{"postcopy-ram": true}))
	return vm, newMonitor(t, vm)
}

// verified checks that a checkpoint is untouched.
func verified(t *testing.T, c child) {
	t.Helper()
	st, err := store.Open(context.Background(), vfs.OS, c.Store, false)
	check(t, err)
	ck, err := st.OpenCheckpoint(context.Background(), store.Ref{VM: c.VM}, checkpoint.Options{})
	check(t, err)
	defer ck.Close()
	check(t, ck.Verify(context.Background(), func(err error) { t.Error(err) }))
}

// TestKills kills the server five times in each of five restores, at random
// moments after RUN, in four of them with the guest under load, and recovers
// each time.
func TestKills(t *testing.T) {
	const kills = 5
	ctx := context.Background()
	disk, pages := newDisk(t)
	config := qemutest.Config{Guest: qemutest.Linux, Machine: "pc", CPUs: 2, Memory: "128M", Disk: disk, Kernel: "flic.fill=24 flic.read=boot"}
	c := newChild(t)
	src := boot(t, config)
	ram := saveGuest(t, src, c)
	src.Kill()
	for round := range 5 {
		r := rand.New(rand.NewPCG(uint64(round), 6))
		next := func(op string) child {
			c.Op, c.Hold, c.Kill = op, 0, "run"
			if r.IntN(2) == 0 {
				c.Hold = 300 * time.Millisecond // dies while it serves demands alone
			}
			// In bytes and time, so that it dies before it is done.
			c.KillBytes, c.KillAfter = 1+r.Int64N(12<<20), time.Duration(1+r.Int64N(300))*time.Millisecond
			return c
		}
		paused := round == 0 // RAM is compared with the source's
		vm, m := incoming(t, config)
		first := next("serve")
		first.Armed = filepath.Join(t.TempDir(), "armed")
		check(t, migration.Incoming(ctx, vm.QMP, uri(t, first)))
		waitFor(t, vm, func(s qmp.RunState) bool { return s.Status != "inmigrate" })
		check(t, os.WriteFile(first.Armed, nil, 0o600))
		busy, done := context.WithCancel(ctx)
		ended := make(chan error, 1)
		if paused {
			ended <- nil
		} else {
			// The first kill may come before: cont is answered when it can be.
			go func() {
				if err := qmp.Cont(ctx, vm.QMP); err != nil {
					ended <- err
					return
				}
				ended <- load(busy, vm)
			}()
		}
		for kill := range kills {
			if s := m.end(t); s != migration.StatusPostcopyPaused {
				t.Fatalf("restore %d, kill %d: %s", round, kill, s)
			}
			if paused {
				// Were it never recovered: what the guest has by now is right.
				loadedPages(t, vm, ram)
			}
			if kill == 2 {
				// Not recovered for a while: the guest waits and sees
				// nothing wrong.
				time.Sleep(time.Second)
			}
			if kill == kills-1 {
				c.Op, c.Kill, c.Hold = "recover", "", 0
				m.recover(t, uri(t, c))
			} else {
				m.recover(t, uri(t, next("recover")))
			}
		}
		if s := m.end(t); s != migration.StatusCompleted {
			t.Fatalf("restore %d: %s", round, s)
		}
		rep := readReport(t, c.Report)
		t.Logf("restore %d, the last of %d servers: %+v", round, kills+1, rep)
		if rep.Recovered == 0 {
			t.Error("QEMU had nothing when the last server came")
		}
		done()
		check(t, <-ended)
		if paused {
			after, err := vm.RAM(ctx)
			check(t, err)
			if diff := qemutest.DiffRAM(ram, after); diff != "" {
				t.Error(diff)
			}
		} else {
			readAll(t, vm)
			guestOK(t, vm)
			diskOK(t, vm, pages)
		}
		vm.Kill()
	}
	verified(t, c)
}

// loadedPages compares what has reached a VM that still loads with the source.
func loadedPages(t *testing.T, vm *qemutest.VM, ram map[string][]byte) {
	t.Helper()
	pages, wrong := 0, 0
	check(t, vm.Loaded(context.Background(), func(block string, offset uint64, content []byte) {
		pages++
		if !bytes.Equal(content, ram[block][offset:][:len(content)]) {
			wrong++
		}
	}))
	t.Logf("%d pages have come", pages)
	if pages == 0 || wrong > 0 {
		t.Errorf("of %d pages that have come, %d are wrong", pages, wrong)
	}
}

// TestKillsBeforeRun: what becomes of QEMU if the server dies early. Nothing is
// lost but that QEMU.
func TestKillsBeforeRun(t *testing.T) {
	ctx := context.Background()
	file := t.TempDir() + "/content"
	content := make([]byte, 4<<20)
	rand.NewChaCha8([32]byte{1}).Read(content)
	check(t, os.WriteFile(file, content, 0o600))
	config := qemutest.Config{Guest: qemutest.Tiny, Memory: "32M", Args: qemutest.Load(file, 8<<20)}
	src := qemutest.Start(t, config)
	src.WaitFor(t, `tick 00000002`)
	c := newChild(t)
	ram := saveGuest(t, src, c)
	src.Kill()
	config.Args = nil // not again after the restore

	restores := func(t *testing.T) {
		t.Helper()
		c.Op, c.Kill = "serve", ""
		vm, _ := destination(t, config, uri(t, c))
		completed(t, vm)
		after, err := vm.RAM(ctx)
		check(t, err)
		if diff := qemutest.DiffRAM(ram, after); diff != "" {
			t.Error(diff)
		}
		readReport(t, c.Report)
		verified(t, c)
	}
	for _, tc := range []struct {
		name  string
		kill  string
		bytes int64
		after func(t *testing.T, vm *qemutest.VM, m *monitor)
	}{
		{"before the first byte", "start", 0, func(t *testing.T, vm *qemutest.VM, m *monitor) {
			time.Sleep(300 * time.Millisecond)
			if s, err := qmp.QueryStatus(ctx, vm.QMP); err != nil || s.Status != "inmigrate" {
				t.Errorf("QEMU is %+v, %v", s, err)
			}
		}},
		{"in the header", "opening", 5, exits},
		{"in the setup", "opening", 150, exits},
		{"in the package", "opening", 20000, exits},
		{"after the package", "run", 0, func(t *testing.T, vm *qemutest.VM, m *monitor) {
			// The devices of this machine touch RAM while they load, so RUN is
			// not reached. Which of QEMU's threads finds out first decides
			// whether it then hangs or ends; nothing can be recovered.
			select {
			case <-vm.Exited():
			case s, ok := <-m.states:
				if ok && s != migration.StatusFailed {
					t.Errorf("the migration is %s", s)
				}
			case <-time.After(20 * time.Second):
				t.Error("QEMU does not notice")
			}
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c.Op, c.Kill, c.KillBytes = "serve", tc.kill, tc.bytes
			vm, m := incoming(t, config)
			check(t, migration.Incoming(ctx, vm.QMP, uri(t, c)))
			tc.after(t, vm, m)
			vm.Kill()
			restores(t)
		})
	}
}

func exits(t *testing.T, vm *qemutest.VM, _ *monitor) {
	t.Helper()
	select {
	case <-vm.Exited():
		if vm.ExitError() == nil || !strings.Contains(vm.Output(), "load of migration failed") {
			t.Errorf("exit %v: %s", vm.ExitError(), vm.Output())
		}
	case <-time.After(20 * time.Second):
		t.Error("QEMU lives on")
	}
}
