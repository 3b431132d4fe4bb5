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
	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
	"github.com/flic-migrate/flic-migrate/stream/pipe"
	"github.com/flic-migrate/flic-migrate/tier"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/lazy"
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
	DieAfter   int64         // bytes written, 0 = never
	Hold       time.Duration // HoldBackground
}

func TestMain(m *testing.M) {
	if spec := os.Getenv(childEnv); spec != "" {
		if err := runChild(spec); err != nil {
			fmt.Fprintln(os.Stderr, "child:", err)
			os.Exit(1)
		}
		os.Exit(0)
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
	st, err := store.Open(vfs.OS, c.Store, true)
	if err != nil {
		return err
	}
	in, err := pipe.New(ctx, 0)
	if err != nil {
		return err
	}
	if c.Op == "save" {
		o := tier.SaveOptions{VM: c.VM, Codec: image.S2, NVRAM: c.NVRAM, ReturnPath: os.Stdout}
		if c.WorkingSet != "" {
			f, err := os.Open(c.WorkingSet)
			if err != nil {
				return err
			}
			if o.WorkingSet, err = workingset.Read(f); err != nil {
				return err
			}
		}
		_, _, err := tier.Save(ctx, vfs.OS, st, in, o)
		return err
	}
	ref := store.Ref{VM: c.VM}
	ck, err := checkpoint.Open(vfs.OS, st, ref, checkpoint.Options{})
	if err != nil {
		return err
	}
	o := lazy.Options{HoldBackground: c.Hold, MaxHold: 20 * time.Second}
	if c.UseLearned {
		t, err := st.Touched(ck.Ref)
		if err != nil {
			return err
		}
		o.First = t.Bind(ck.Meta.PageSize, blocks(ck.Meta))
	}
	out := &dyingWriter{left: c.DieAfter}
	var rep *lazy.Report
	if c.Op == "recover" {
		rep, err = lazy.Recover(ctx, ck, in, out, o)
	} else {
		rep, err = lazy.Serve(ctx, ck, in, out, o)
	}
	if rep != nil {
		var names []string
		for _, b := range ck.Meta.Blocks {
			names = append(names, b.Name)
		}
		err = errors.Join(err, st.AddTouched(ck.Ref, ck.Meta.PageSize, names, rep.Touched))
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

// dyingWriter is stdout until so many bytes have been written; then the process
// is killed as by kill -9.
type dyingWriter struct{ left int64 }

func (w *dyingWriter) Write(b []byte) (int, error) {
	if w.left > 0 {
		if w.left -= int64(len(b)); w.left <= 0 {
			os.Stdout.Write(b[:len(b)/2])
			p, _ := os.FindProcess(os.Getpid())
			p.Kill()
			select {}
		}
	}
	return os.Stdout.Write(b)
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
	check(t, qmp.SetCapabilities(ctx, vm.QMP, map[string]bool{"events": true}))
	check(t, qmp.SetCapabilities(ctx, vm.QMP, map[string]bool{"postcopy-ram": true}))
	start := time.Now()
	check(t, qmp.MigrateIncoming(ctx, vm.QMP, u))
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
	if _, err := qmp.WaitMigration(ctx, vm.QMP); err != nil {
		t.Fatalf("%v\n%s", err, vm.Output())
	}
}

// source boots a guest, saves it stopped, and returns its RAM.
func source(t *testing.T, config qemutest.Config, c child) map[string][]byte {
	t.Helper()
	ctx := context.Background()
	vm := qemutest.Start(t, config)
	vm.WaitFor(t, `flic ready`)
	vm.WaitFor(t, `tick \d+`)
	check(t, qmp.Stop(ctx, vm.QMP))
	ram, err := vm.RAM(ctx)
	check(t, err)
	check(t, qmp.SetParameters(ctx, vm.QMP, map[string]any{"max-bandwidth": int64(100 << 30)}))
	if _, err := vm.Save(ctx, uri(t, c)); err != nil {
		t.Fatalf("%v\n%s", err, vm.Output())
	}
	check(t, vm.Quit(ctx))
	return ram
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

func TestServe(t *testing.T) {
	for _, tc := range []struct {
		name   string
		config qemutest.Config
	}{
		{"q35", qemutest.Config{Guest: qemutest.Linux, Memory: "256M", Kernel: "flic.fill=64"}},
		{"pc-2cpus", qemutest.Config{Guest: qemutest.Linux, Machine: "pc", CPUs: 2, Memory: "256M", Kernel: "flic.fill=64"}},
		{"arm64", qemutest.Config{Guest: qemutest.Linux, Arch: "arm64", Memory: "256M", Kernel: "flic.fill=64"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := t.TempDir()
			c := child{Op: "save", Store: filepath.Join(dir, "store"), VM: "vm", Report: filepath.Join(dir, "report")}
			ram := source(t, tc.config, c)

			// Stopped: every byte of RAM is that of the source.
			c.Op = "serve"
			vm, running := destination(t, tc.config, uri(t, c))
			completed(t, vm)
			after, err := vm.RAM(context.Background())
			check(t, err)
			if diff := qemutest.DiffRAM(ram, after); diff != "" {
				t.Fatal(diff)
			}
			t.Logf("restored after %v: %+v", running, readReport(t, c.Report))
			vm.Kill()

			// Running on it while it loads.
			c.Hold = 500 * time.Millisecond
			vm, running = destination(t, tc.config, uri(t, c))
			check(t, qmp.Cont(context.Background(), vm.QMP))
			vm.WaitFor(t, `tick \d+`)
			if s := vm.Ask(t, "check"); !strings.HasPrefix(s, "ok ") {
				t.Fatal(s)
			}
			completed(t, vm)
			if s := vm.Ask(t, "check"); !strings.HasPrefix(s, "ok ") {
				t.Fatal(s)
			}
			first := readReport(t, c.Report)
			t.Logf("running after %v: %+v", running, first)
			vm.Kill()

			// Again, with what was learned.
			c.UseLearned = true
			vm, running = destination(t, tc.config, uri(t, c))
			check(t, qmp.Cont(context.Background(), vm.QMP))
			vm.WaitFor(t, `tick \d+`)
			if s := vm.Ask(t, "check"); !strings.HasPrefix(s, "ok ") {
				t.Fatal(s)
			}
			completed(t, vm)
			second := readReport(t, c.Report)
			t.Logf("running after %v: %+v", running, second)
			if first.Waited == 0 || second.Waited*20 > first.Waited {
				t.Errorf("the first resume waited for %d pages, the second for %d", first.Waited, second.Waited)
			}
		})
	}
}
