package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
)

// promptly is how soon the command is gone once it has nothing left to do, and how
// soon QEMU's monitor answers where neither QEMU nor the command has a reason to
// keep it waiting.
const promptly = 100 * time.Millisecond

// A busy machine can delay any process by more than that, and other tests run
// beside this one. What hangs does so every time.
const tries = 10

// watch asks QEMU every few milliseconds how its guest is, over a monitor of its
// own, and notes how long it had to wait for an answer.
type watch struct {
	mu      sync.Mutex
	answers int
	longest time.Duration
	err     error // why it has ended
}

func newWatch(t *testing.T, ctx context.Context, vm *qemutest.VM) *watch {
	t.Helper()
	monitor, err := qmp.Dial(ctx, vm.Socket, qmp.Options{Greeting: time.Minute})
	ok(t, err)
	t.Cleanup(func() { monitor.Close() })
	w := new(watch)
	go func() {
		for w.err == nil {
			asked := time.Now()
			_, err := qmp.QueryStatus(ctx, monitor)
			w.mu.Lock()
			w.answers++
			w.longest, w.err = max(w.longest, time.Since(asked)), err
			w.mu.Unlock()
			time.Sleep(5 * time.Millisecond)
		}
	}()
	return w
}

// wait returns the longest wait for an answer since it was called last.
func (w *watch) wait(t *testing.T) (longest time.Duration) {
	t.Helper()
	w.mu.Lock()
	asked := w.answers
	w.mu.Unlock()
	// The question that is open now, and the first one that is asked from now on.
	until(t, "QEMU's monitor", func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		if ok(t, w.err); w.answers < asked+2 {
			return false
		}
		longest, w.longest = w.longest, 0
		return true
	})
	return longest
}

// endOf tells when a process ends. That it is QEMU's child, and nobody but QEMU can
// wait for it, does not matter.
func endOf(t *testing.T, pid int) <-chan time.Time {
	t.Helper()
	at := make(chan time.Time, 1)
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		at <- time.Now()
		return at
	}
	ok(t, err)
	go func() {
		defer unix.Close(fd)
		for {
			n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, -1)
			if n > 0 || err != nil && !errors.Is(err, unix.EINTR) {
				break
			}
		}
		at <- time.Now()
	}()
	return at
}

// ending waits for the event that says how a migration ended, and returns the time
// in it. The capability events must be on.
func ending(t *testing.T, ctx context.Context, events <-chan qmp.Event) (migration.Status, time.Time) {
	t.Helper()
	for {
		select {
		case e := <-events:
			if status, _ := e.Data["status"].(string); e.Event == "MIGRATION" && migration.Status(status).Ended() {
				return migration.Status(status), time.Unix(e.Timestamp.Seconds, e.Timestamp.Microseconds*1000)
			}
		case <-ctx.Done():
			t.Fatal(ctx.Err())
		}
	}
}

// soon runs try until what it measures is within bounds, which it says with "".
func soon(t *testing.T, try func() string) {
	t.Helper()
	var all []string
	for len(all) < tries {
		late := try()
		if late == "" {
			return
		}
		all = append(all, late)
	}
	t.Errorf("%d times in a row:\n%s", tries, strings.Join(all, "\n"))
}

// A save is gone at once when it has done or failed, because QEMU's monitor stands
// still until then; and it keeps the monitor waiting only where it must: without a
// return path from the first sync of the RAM to the end of the commit, while QEMU
// writes the device tail into a pipe that nobody may read yet.
func TestSavesDoNotHang(t *testing.T) {
	for _, returnPath := range []bool{false, true} {
		name, capabilities := "plain", []string{"events"}
		if returnPath {
			name, capabilities = "return path", append(capabilities, "return-path")
		}
		t.Run(name, func(t *testing.T) {
			ctx, l := limit(t), newLab(t)
			vm := qemutest.Start(t, q35.tiny(t, qemutest.LiveMemory, varied(3072), 10))
			vm.WaitFor(t, `tick 00000002\r`)
			set(t, vm, map[string]any{"max-bandwidth": int64(1) << 40, "downtime-limit": 100}, capabilities...)
			// What is written of an index beside a save is no part of it, and must not be what fails.
			flags := append(l.hot(t, vm), "--share", "none", "--report", l.report())
			w := newWatch(t, ctx, vm)
			events, err := vm.QMP.Events(ctx)
			ok(t, err)
			faults := []fault{
				{}, // none
				{op: "write", n: 2, errno: unix.ENOSPC},
				{op: "msync", n: 1, errno: unix.EIO},
				{op: "sync", n: 1, errno: unix.EIO},
				{op: "rename", n: 1, errno: unix.EIO},
			}
			if !returnPath {
				// What has come is durable before the device tail is read, too.
				faults = append(faults, fault{op: "sync", n: 2, errno: unix.EIO})
			}
			for _, f := range faults {
				uri, what := l.save(flags...), "done"
				if f.op != "" {
					f.mark = filepath.Join(l.dir, "mark")
					uri, what = f.uri(l, flags...), fmt.Sprint("failed ", f.op, f.n)
				}
				soon(t, func() string {
					w.wait(t)
					ok(t, migration.Start(ctx, vm.QMP, l.withPid(uri)))
					end := endOf(t, l.pid(t))
					status, ended := ending(t, ctx, events)
					gone := <-end
					wait := w.wait(t)
					fi, err := os.Stat(l.report())
					ok(t, err)
					b, err := os.ReadFile(l.report())
					ok(t, err)
					ok(t, os.Remove(l.report()))
					var rep saveReport
					ok(t, json.Unmarshal(b, &rep))
					if failed := f.op != ""; failed != (rep.ExitCode != 0) {
						t.Fatalf("%s: %s", what, b)
					}
					// The report is the last thing that a save has to do.
					lag := gone.Sub(fi.ModTime())
					within := promptly
					if rep.Report != nil && !returnPath {
						s := rep.Report.Seconds
						within += time.Duration((s.Sync + s.Tail + s.Commit) * float64(time.Second))
					}
					late := fmt.Sprintf("%s, %s: gone %v after its report and %v after QEMU's word; QEMU's monitor took up to %v, with %v allowed",
						what, status, lag, gone.Sub(ended), wait, within)
					t.Log(late)
					if status == migration.StatusCompleted {
						ok(t, qmp.Cont(ctx, vm.QMP))
					}
					runsOn(t, vm)
					if lag > promptly || gone.Sub(ended) > within || wait > within {
						return late
					}
					return ""
				})
			}
		})
	}
}

// So is an eager restore, and QEMU's monitor answers as it does when cat feeds it.
func TestRestoresDoNotHang(t *testing.T) {
	ctx, l := limit(t), newLab(t)
	c := q35.tiny(t, qemutest.LiveMemory, varied(6144), 10)
	vm := qemutest.Start(t, c)
	vm.WaitFor(t, `tick 00000002\r`)
	set(t, vm, fast)
	ok(t, qmp.Stop(ctx, vm.QMP))
	saved(t, ctx, vm, l.save(l.hot(t, vm)...))
	vm.Kill()
	file := filepath.Join(l.dir, "stream")
	ok(t, os.WriteFile(file, []byte(l.run(t, "restore", "vm")), 0o600))

	try := func(uri string) (lag, wait time.Duration) {
		vm := qemutest.Start(t, destination(c, "defer"))
		defer vm.Kill()
		set(t, vm, nil, "events")
		w := newWatch(t, ctx, vm)
		events, err := vm.QMP.Events(ctx)
		ok(t, err)
		w.wait(t)
		ok(t, migration.Incoming(ctx, vm.QMP, l.withPid(uri)))
		end := endOf(t, l.pid(t))
		status, ended := ending(t, ctx, events)
		if status != migration.StatusCompleted {
			t.Fatalf("%s: %s\n%s", uri, status, vm.Output())
		}
		lag = (<-end).Sub(ended)
		wait = w.wait(t)
		ok(t, qmp.Cont(ctx, vm.QMP))
		runsOn(t, vm)
		return lag, wait
	}
	soon(t, func() string {
		_, cat := try("exec:cat " + file)
		lag, wait := try(l.restore("vm"))
		late := fmt.Sprintf("gone %v after QEMU's word; QEMU's monitor took up to %v, with cat %v", lag, wait, cat)
		t.Log(late)
		if lag > promptly || wait > cat+promptly {
			return late
		}
		return ""
	})
}
