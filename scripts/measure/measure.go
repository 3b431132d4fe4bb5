// Package measure is what the benchmarks of real guests have in common: a guest with a
// workload, saved through exec:, and restored into nothing or resumed.
package measure

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/source"
)

// SQLite is a workload, as a command of the guest's console: 20 000 rows, random UPDATE
// and SELECT by key, WAL.
const SQLite = "run sqlite3 /tmp/d 'PRAGMA journal_mode=WAL; CREATE TABLE t(id INTEGER PRIMARY KEY, n INT, s TEXT); " +
	"WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM c WHERE x<20000) INSERT INTO t SELECT x, 0, hex(randomblob(100)) FROM c;' >/dev/null; " +
	"echo flic warm >/dev/console; " +
	"yes 'UPDATE t SET n=n+1 WHERE id=1+abs(random())%20000; SELECT s FROM t WHERE id=1+abs(random())%20000;' | sqlite3 /tmp/d >/dev/null"

// Boot starts a guest and its workload: a command of its console that says "flic warm"
// when it is under way, and then runs for so long; empty: none.
func Boot(ctx context.Context, c qemutest.Config, start string, warm time.Duration) (*qemutest.VM, error) {
	vm, err := qemutest.Launch(ctx, c)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	if _, err = vm.Expect(ctx, `flic ready`); err == nil {
		_, err = vm.Expect(ctx, `tick \d`)
	}
	if err == nil && start != "" {
		if err = vm.Send(start); err == nil {
			_, err = vm.Expect(ctx, `flic warm`)
		}
	}
	if err == nil {
		// Nothing but the consumer of the stream is to be the limit.
		err = migration.SetParameters(ctx, vm.QMP, map[string]any{"max-bandwidth": int64(100 << 30)})
	}
	if err != nil {
		vm.Kill()
		return nil, fmt.Errorf("%w\n%s", err, vm.Output())
	}
	time.Sleep(warm)
	return vm, nil
}

// Save saves a guest that stands still through exec: with a command, and returns how long
// that took. The guest stands still afterwards, too, and can be saved again: for that it
// has run for an instant.
func Save(ctx context.Context, vm *qemutest.VM, command string) (time.Duration, error) {
	start := time.Now()
	if _, err := vm.Save(ctx, "exec:"+command); err != nil {
		return 0, err
	}
	took := time.Since(start)
	return took, errors.Join(qmp.Cont(ctx, vm.QMP), qmp.Stop(ctx, vm.QMP))
}

// Report is what a save of flic-migrate's has said with --report.
func Report(name string) (r checkpoint.Report, err error) {
	doc, err := os.ReadFile(name)
	if err == nil {
		err = json.Unmarshal(doc, &r)
	}
	return r, err
}

// Restore has the program restore the newest checkpoint of VM "vm" of a store into
// nothing, and returns how long that took.
func Restore(binary, store string) (time.Duration, error) { return RestoreOf(binary, store, "vm") }

// RestoreOf is Restore of another VM.
func RestoreOf(binary, store, vm string) (time.Duration, error) {
	cmd := exec.Command(binary, "restore", "--quiet", "--store", store, vm)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return 0, err
	}
	start := time.Now()
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	// QEMU reads 32 KiB at a time; a plain Copy would splice.
	if _, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{out}, make([]byte, 32<<10)); err != nil {
		return 0, err
	}
	err = cmd.Wait()
	return time.Since(start), err
}

// Reads is what a restore of the newest checkpoint of VM "vm" of a store has to read, as
// the program counts it.
func Reads(binary, store string) (source.Reads, error) {
	var doc struct{ Reads *source.Reads }
	cmd := exec.Command(binary, "show", "--json", "--store", store, "vm")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err == nil {
		err = json.Unmarshal(out, &doc)
	}
	if err == nil && doc.Reads == nil {
		err = errors.New("show says nothing of reads")
	}
	if err != nil {
		return source.Reads{}, err
	}
	return *doc.Reads, nil
}

// Resume has the program resume the newest checkpoint of VM "vm" of a store in a new QEMU
// with a configuration, and waits until all memory is there. The guest stays paused. It
// returns what the program reports, and how long it took from its start until the guest
// might have run.
func Resume(ctx context.Context, binary, store string, c qemutest.Config) (rep migration.ResumeReport, running time.Duration, err error) {
	c.Incoming, c.Paused = "defer", true
	vm, err := qemutest.Launch(ctx, c)
	if err != nil {
		return rep, 0, err
	}
	defer vm.Kill()
	// The kernel still takes back the memory of the one before.
	time.Sleep(500 * time.Millisecond)
	cmd := exec.CommandContext(ctx, binary, "resume", "--store", store, "--qmp", vm.Socket, "--quiet", "--json", "--paused", "vm")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, os.Stderr
	start := time.Now()
	if err := cmd.Start(); err != nil {
		return rep, 0, err
	}
	err = UntilRunning(ctx, vm)
	running = time.Since(start)
	if err = errors.Join(err, cmd.Wait()); err == nil {
		err = json.Unmarshal(out.Bytes(), &rep)
	}
	return rep, running, err
}

// UntilRunning waits until a QEMU has loaded what its guest needs to run.
func UntilRunning(ctx context.Context, vm *qemutest.VM) error {
	for {
		state, err := qmp.QueryStatus(ctx, vm.QMP)
		if err != nil {
			return fmt.Errorf("%w\n%s", err, vm.Output())
		}
		if state.Status != "inmigrate" {
			return nil
		}
		time.Sleep(500 * time.Microsecond)
	}
}

// Median is the middle one of some values, the upper one of two.
func Median[T cmp.Ordered](v []T) T {
	v = slices.Sorted(slices.Values(v))
	return v[len(v)/2]
}
