// Package measure is what the benchmarks of real guests have in common: a guest with a
// workload, saved through exec: and restored into nothing.
package measure

import (
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
func Restore(binary, store string) (time.Duration, error) {
	cmd := exec.Command(binary, "restore", "--quiet", "--store", store, "vm")
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

// Median is the middle one of some values, the upper one of two.
func Median[T cmp.Ordered](v []T) T {
	v = slices.Sorted(slices.Values(v))
	return v[len(v)/2]
}
