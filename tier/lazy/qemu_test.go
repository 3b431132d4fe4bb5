package lazy_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
	"github.com/flic-migrate/flic-migrate/stream/pipe"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/lazy"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
	"github.com/flic-migrate/flic-migrate/tier/workingset"
)

// The test binary is its own exec: child: with childEnv set it is a save or a
// restore, so that what is tested is what QEMU talks to.
const childEnv = "FLIC_LAZY_TEST_CHILD"

// child says what a child does.
type child struct {
	Op         string // save, serve, recover
	Store, VM  string
	NVRAM      string
	WorkingSet string
	Report     string // file for the outcome
	UseLearned bool
	Hold       time.Duration // HoldBackground
	ZeroRest   bool

	// Kill says when the child dies as by kill -9: "start", before its first
	// byte; "opening", after KillBytes of it; "run", when the opening (or a
	// recovery's handshake) is out and then KillBytes have been written or
	// KillAfter has passed. Never if empty.
	Kill      string
	KillBytes int64
	KillAfter time.Duration
	// Armed is a file that says that the guest runs: written is not yet run.
	// Empty for a recovery, whose guest does.
	Armed string
}

func TestMain(m *testing.M) {
	if spec := os.Getenv(childEnv); spec != "" {
		if err := runChild(spec); err != nil {
			fmt.Fprintln(os.Stderr, "child:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if dir := os.Getenv(memoryEnv); dir != "" {
		os.Exit(memoryMain(dir))
	}
	os.Exit(m.Run())
}

func runChild(spec string) error {
	b, err := os.ReadFile(spec)
	if err != nil {
		return err
	}
	var c child
	if err := json.Unmarshal(b, &c); err != nil {
		return err
	}
	ctx := context.Background()
	st, err := store.Open(context.Background(), vfs.OS, c.Store, true)
	if err != nil {
		return err
	}
	in, err := pipe.New(ctx, 0)
	if err != nil {
		return err
	}
	if c.Op == "save" {
		o := save.Options{VM: c.VM, Codec: image.MinLZ, NVRAM: c.NVRAM, ReturnPath: os.Stdout}
		if c.WorkingSet != "" {
			f, err := os.Open(c.WorkingSet)
			if err != nil {
				return err
			}
			if o.WorkingSet, err = workingset.Read(f); err != nil {
				return err
			}
		}
		_, _, err := save.Run(ctx, vfs.OS, st, in, o)
		return err
	}
	ref := store.Ref{VM: c.VM}
	ck, err := st.OpenCheckpoint(context.Background(), ref, checkpoint.Options{})
	if err != nil {
		return err
	}
	o := lazy.Options{HoldBackground: c.Hold, MaxHold: 20 * time.Second, ZeroRest: c.ZeroRest}
	if c.UseLearned {
		t, err := st.Touched(context.Background(), ck.Ref)
		if err != nil {
			return err
		}
		o.First = func() []workingset.PageRun { return t.Bind(ck.Meta.PageSize, blocks(ck.Meta)) }
	}
	out := &dyingWriter{child: c, opening: 1}
	if c.Op == "recover" {
		out.opening = len(ck.Meta.Blocks) + 1 // writes of the handshake
	}
	if c.Kill == "start" {
		die()
	}
	var rep *lazy.Report
	if c.Op == "recover" {
		rep, err = lazy.Recover(ctx, ck.Checkpoint, in, out, o)
	} else {
		rep, err = lazy.Serve(ctx, ck.Checkpoint, in, out, o)
	}
	if rep != nil {
		var names []string
		for _, b := range ck.Meta.Blocks {
			names = append(names, b.Name)
		}
		err = errors.Join(err, st.AddTouched(context.Background(), ck.Ref, ck.Meta.PageSize, names, rep.Touched))
		if err == nil {
			err = rep.Wait(ctx)
		}
		b, _ := json.Marshal(rep)
		err = errors.Join(err, os.WriteFile(c.Report+".new", b, 0o600), os.Rename(c.Report+".new", c.Report))
	}
	return err
}

func blocks(m *checkpoint.Meta) []workingset.Block {
	var list []workingset.Block
	for i, n := range m.BlockPages() {
		list = append(list, workingset.Block{Name: m.Blocks[i].Name, Pages: int64(n)})
	}
	return list
}

// dyingWriter is stdout until the child is to die.
type dyingWriter struct {
	child
	opening int // writes until RUN, or RESUME, is out
	armed   bool
}

func (w *dyingWriter) Write(b []byte) (int, error) {
	if w.Kill == "opening" || w.Kill == "run" && w.armed {
		if w.KillBytes -= int64(len(b)); w.KillBytes <= 0 {
			os.Stdout.Write(b[:len(b)+int(max(w.KillBytes, -int64(len(b))))])
			die()
		}
	}
	n, err := os.Stdout.Write(b)
	if w.opening--; w.Kill == "run" && w.opening <= 0 && !w.armed {
		w.arm()
	}
	return n, err
}

// arm starts the countdown once the guest runs. Until then pages go out slowly,
// so that some are left.
func (w *dyingWriter) arm() {
	if w.KillBytes == 0 && w.KillAfter == 0 {
		die()
	}
	if w.Armed != "" {
		if _, err := os.Stat(w.Armed); err != nil {
			time.Sleep(2 * time.Millisecond)
			return
		}
	}
	w.armed = true
	time.AfterFunc(w.KillAfter, die)
}

func die() {
	p, _ := os.FindProcess(os.Getpid())
	p.Kill()
	select {}
}

// uri makes the exec: URI of a child.
func uri(t *testing.T, c child) string {
	t.Helper()
	b, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.CreateTemp(t.TempDir(), "child")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	f.Write(b)
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("exec:%s=%s exec %s", childEnv, f.Name(), exe)
}

// destination starts a QEMU that restores lazily from c.
func destination(t *testing.T, config qemutest.Config, u string) (*qemutest.VM, time.Duration) {
	t.Helper()
	ctx := context.Background()
	config.Incoming, config.Paused = "defer", true
	vm := qemutest.Start(t, config)
	check(t, migration.SetCapabilities(ctx, vm.QMP, map[string]bool{"events": true}))
	check(t, migration.SetCapabilities(ctx, vm.QMP, map[string]bool{"postcopy-ram": true}))
	start := time.Now()
	check(t, migration.Incoming(ctx, vm.QMP, u))
	waitFor(t, vm, func(s qmp.RunState) bool { return s.Status != "inmigrate" })
	return vm, time.Since(start)
}

func waitFor(t *testing.T, vm *qemutest.VM, ok func(qmp.RunState) bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		s, err := qmp.QueryStatus(context.Background(), vm.QMP)
		check(t, err)
		if ok(s) {
			return
		}
	}
	t.Fatalf("the VM does not get there:\n%s", vm.Output())
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func completed(t *testing.T, vm *qemutest.VM) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	if _, err := migration.Wait(ctx, vm.QMP); err != nil {
		t.Fatalf("%v\n%s", err, vm.Output())
	}
}

// boot starts a Linux guest, waits until it runs, and returns it.
func boot(t *testing.T, config qemutest.Config) *qemutest.VM {
	t.Helper()
	vm := qemutest.Start(t, config)
	vm.WaitFor(t, `flic ready`)
	vm.WaitFor(t, `tick \d+`)
	check(t, migration.SetParameters(context.Background(), vm.QMP, map[string]any{"max-bandwidth": int64(100 << 30)}))
	return vm
}

// saveGuest stops a guest, saves it, and returns its RAM.
func saveGuest(t *testing.T, vm *qemutest.VM, c child) map[string][]byte {
	t.Helper()
	ctx := context.Background()
	c.Op = "save"
	check(t, qmp.Stop(ctx, vm.QMP))
	ram, err := vm.RAM(ctx)
	check(t, err)
	if _, err := vm.Save(ctx, uri(t, c)); err != nil {
		t.Fatalf("%v\n%s", err, vm.Output())
	}
	// Without a return path QEMU may be done before the checkpoint is.
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		st, err := store.Open(context.Background(), vfs.OS, c.Store, false)
		if err == nil {
			if _, err = st.Describe(context.Background(), store.Ref{VM: c.VM}); err == nil {
				return ram
			}
		}
		if time.Now().After(end) {
			t.Fatalf("%v\n%s", err, vm.Output())
		}
	}
}

// guestOK has the guest compare its buffer with what it knows of it.
func guestOK(t *testing.T, vm *qemutest.VM) {
	t.Helper()
	if s := vm.Ask(t, "check"); !strings.HasPrefix(s, "ok ") {
		t.Fatal(s)
	}
}

// newChild is a child for a store of the test's own.
func newChild(t *testing.T) child {
	dir := t.TempDir()
	return child{Store: filepath.Join(dir, "store"), VM: "vm", Report: filepath.Join(dir, "report")}
}

// readReport waits for a child's report, which comes a moment after QEMU has
// the last page, and takes it away.
func readReport(t *testing.T, name string) lazy.Report {
	t.Helper()
	var b []byte
	var err error
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if b, err = os.ReadFile(name); err == nil {
			break
		}
	}
	check(t, err)
	check(t, os.Remove(name))
	var r lazy.Report
	check(t, json.Unmarshal(b, &r))
	return r
}

// TestServe restores a stopped guest, a running one, and one with what was
// learned from that.
func TestServe(t *testing.T) {
	for _, tc := range []struct {
		name   string
		config qemutest.Config
	}{
		{"q35", qemutest.Config{Guest: qemutest.Linux, Memory: "192M", Kernel: "flic.fill=32"}},
		{"arm64", qemutest.Config{Guest: qemutest.Linux, Arch: "arm64", Memory: "192M", Kernel: "flic.fill=32"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := newChild(t)
			vm := boot(t, tc.config)
			ram := saveGuest(t, vm, c)
			vm.Kill()

			// Stopped: every byte of RAM is that of the source, whether pages
			// without content are sent or not.
			for _, c.ZeroRest = range []bool{true, false} {
				c.Op = "serve"
				vm, running := destination(t, tc.config, uri(t, c))
				completed(t, vm)
				after, err := vm.RAM(context.Background())
				check(t, err)
				if diff := qemutest.DiffRAM(ram, after); diff != "" {
					t.Fatal(diff)
				}
				rep := readReport(t, c.Report)
				if (rep.ZeroRest > 0) != c.ZeroRest {
					t.Errorf("%d pages were the rest", rep.ZeroRest)
				}
				t.Logf("restored after %v: %+v", running, rep)
				vm.Kill()
			}

			// The second comes again, with what the first has learned and no more: what
			// else this machine is busy with can only add to the guest's waits.
			var waited [4]int64
			var learned []byte
			touched := filepath.Join(c.Store, "vms", c.VM, "00000001.touched")
			for i := range waited {
				if i > 1 {
					check(t, os.WriteFile(touched, learned, 0o600))
				}
				// Running on it while it loads; again, with what was learned.
				c.Hold, c.UseLearned = 500*time.Millisecond, i > 0
				vm, running := destination(t, tc.config, uri(t, c))
				check(t, qmp.Cont(context.Background(), vm.QMP))
				vm.WaitFor(t, `tick \d+`)
				guestOK(t, vm)
				completed(t, vm)
				guestOK(t, vm)
				rep := readReport(t, c.Report)
				waited[i] = rep.Waited
				t.Logf("running after %v: %+v", running, rep)
				vm.Kill()
				switch {
				case waited[0] == 0:
					t.Fatal("the first resume waited for nothing")
				case i == 0:
					var err error
					learned, err = os.ReadFile(touched)
					check(t, err)
				case waited[i]*20 <= waited[0]:
					return
				}
			}
			t.Errorf("the first resume waited for %d pages, the second for %d", waited[0], waited[1:])
		})
	}
}
