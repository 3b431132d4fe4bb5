package main

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
)

// ended waits for a migration's end, which must be the wanted one.
func ended(t *testing.T, ctx context.Context, vm *qemutest.VM, want migration.Status) {
	t.Helper()
	info, err := migration.Wait(ctx, vm.QMP, migration.StatusFailed, migration.StatusCancelled)
	ok(t, err)
	if info.Status != want {
		t.Fatalf("the migration has %s, want %s\n%s", info.Status, want, vm.Output())
	}
}

// outcome is the report of a save, which --report has written.
func (l *lab) outcome(t *testing.T) (o struct {
	Checkpoint string `json:"checkpoint"`
	ExitCode   int    `json:"exit_code"`
	Error      string `json:"error"`
}) {
	t.Helper()
	// QEMU gives up a broken pipe at once, while the child still cleans up.
	waitForFile(t, l.report())
	b, err := os.ReadFile(l.report())
	ok(t, err)
	ok(t, json.Unmarshal(b, &o))
	ok(t, os.Remove(l.report()))
	return o
}

func (l *lab) report() string { return filepath.Join(l.dir, "report") }

// waitForFile waits until a file is there.
func waitForFile(t *testing.T, name string) {
	t.Helper()
	until(t, name, func() bool { _, err := os.Stat(name); return err == nil })
}

func until(t *testing.T, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !done(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

// gone waits for the end of a process.
func gone(t *testing.T, pid int) {
	t.Helper()
	until(t, "the end of the save", func() bool { return !alive(pid) })
}

func alive(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	// Until QEMU asks for its exit status it is a zombie.
	return err == nil && !strings.Contains(string(b), ") Z ")
}

// withPid makes an exec: URI write the number of its process to l.dir/pid.
func (l *lab) withPid(uri string) string {
	command := strings.TrimPrefix(strings.TrimPrefix(uri, "exec:"), "exec ")
	return "exec:echo $$ > " + filepath.Join(l.dir, "pid") + "; exec env " + command
}

// pid waits for the process of withPid.
func (l *lab) pid(t *testing.T) (pid int) {
	t.Helper()
	name := filepath.Join(l.dir, "pid")
	until(t, name, func() bool {
		b, err := os.ReadFile(name)
		if err != nil || !strings.HasSuffix(string(b), "\n") {
			return false
		}
		pid, err = strconv.Atoi(strings.TrimSpace(string(b)))
		return err == nil
	})
	ok(t, os.Remove(name))
	return pid
}

// What goes wrong before the device tail is read fails the migration, and the
// guest runs on. With the return path that holds for all that can go wrong.
// Either way no checkpoint is left, nor any of its space.
func TestFaults(t *testing.T) {
	for _, returnPath := range []bool{false, true} {
		name := "plain"
		if returnPath {
			name = "return path"
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx, l := limit(t), newLab(t)
			c := q35.tiny(t, qemutest.LiveMemory, varied(2048), 10)
			vm := qemutest.Start(t, c)
			vm.WaitFor(t, `tick 00000002\r`)
			set(t, vm, map[string]any{"max-bandwidth": int64(1) << 40, "downtime-limit": 100})
			if returnPath {
				set(t, vm, nil, "return-path")
			}
			flags := append(l.hot(t, vm), "--report", l.report())
			told := 0
			for _, test := range []struct {
				op    string
				n     int
				errno syscall.Errno
				late  bool // after the device tail has been read
				exit  int
			}{
				{"write", 3, unix.EIO, false, exitFailed},
				{"write", 3, unix.ENOSPC, false, exitNoSpace},
				{"msync", 1, unix.EIO, false, exitFailed},
				{"sync", 1, unix.EIO, false, exitFailed},
				{"sync", 2, unix.EIO, true, exitFailed},
				{"rename", 1, unix.EIO, true, exitFailed},
				{"rename", 1, unix.ENOSPC, true, exitNoSpace},
				{"syncdir", 1, unix.EIO, true, exitFailed},
			} {
				if returnPath && test.op == "sync" && test.n == 2 {
					continue // with one it has one, when it is finished
				}
				t.Logf("%s %d: %v", test.op, test.n, test.errno)
				f := fault{op: test.op, n: test.n, errno: test.errno, mark: filepath.Join(l.dir, "mark")}
				ok(t, migration.Start(ctx, vm.QMP, f.uri(l, flags...)))
				info, err := migration.Wait(ctx, vm.QMP, migration.StatusFailed)
				ok(t, err)
				switch {
				case info.Status == migration.StatusFailed:
				case returnPath || !test.late:
					t.Errorf("QEMU says %s", info.Status)
					fallthrough
				default:
					// There is no way to tell QEMU without a return path.
					ok(t, qmp.Cont(ctx, vm.QMP))
				}
				runsOn(t, vm)
				if returnPath {
					told++
					until(t, "QEMU to say why", func() bool {
						return strings.Count(vm.Output(), "Sibling indicated error 1") == told
					})
				}
				if o := l.outcome(t); o.ExitCode != test.exit || !strings.Contains(o.Error, test.errno.Error()) || o.Checkpoint != "" {
					t.Errorf("the save says %+v", o)
				}
				ok(t, os.Remove(f.mark+".end")) // it did strike
				l.nothing(t)
				if freed := l.gc(t); freed.Saves > 0 || freed.NVRAM > 0 {
					t.Errorf("this was left for gc: %+v", freed)
				}
			}
			succeeds(t, ctx, l, vm, c, flags...)
		})
	}
}

// succeeds saves the running guest, which has been through failures, and restores
// it.
func succeeds(t *testing.T, ctx context.Context, l *lab, vm *qemutest.VM, c qemutest.Config, flags ...string) {
	t.Helper()
	saved(t, ctx, vm, l.save(flags...))
	l.holds(t, "vm@1")
	tick := lastTick(t, vm.Console(), 16)
	vm = restored(t, ctx, c, l.restore("vm"), ram(t, ctx, vm))
	goesOn(t, ctx, vm, tick, 16)
}

// Without a return path QEMU reports a migration as completed once it is rid of
// the stream. So the device tail must stay with it as long as the RAM is not
// durable, however small the tail is: microvm's fits into a pipe.
// With virtio-mem, which has a section of its own ahead of RAM, most of the memory that
// is listed never comes.
func TestHoldBack(t *testing.T) {
	mem := q35
	mem.name, mem.Args = "virtio-mem", virtioMemArgs
	for _, m := range []machine{q35, pc, virt, microvm, mem} {
		for _, running := range []bool{false, true} {
			name := m.name + " stopped"
			if running {
				name = m.name + " running"
			}
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				ctx, l := limit(t), newLab(t)
				memory := qemutest.LiveMemory
				if m.Args != nil {
					memory += ",maxmem=1G"
				}
				vm := qemutest.Start(t, m.tiny(t, memory, varied(768), 10))
				vm.WaitFor(t, `tick 00000002\r`)
				set(t, vm, map[string]any{"max-bandwidth": int64(1) << 40, "downtime-limit": 100})
				if !running {
					ok(t, qmp.Stop(ctx, vm.QMP))
				}
				f := fault{op: "sync", n: 1, stall: 2 * time.Second, errno: unix.EIO, mark: filepath.Join(l.dir, "mark")}
				ok(t, migration.Start(ctx, vm.QMP, f.uri(l, "--report", l.report())))
				waitForFile(t, f.mark)
				// QEMU may be in a write of the device tail, and then its
				// monitor waits with it.
				for {
					info, err := migration.Query(ctx, vm.QMP)
					ok(t, err)
					if _, err := os.Stat(f.mark + ".end"); err == nil {
						break
					}
					// The stall had not ended when QEMU answered.
					if info.Status.Ended() {
						t.Fatalf("QEMU says %s while the RAM is being synced", info.Status)
					}
					time.Sleep(10 * time.Millisecond)
				}
				ended(t, ctx, vm, migration.StatusFailed)
				if !running {
					ok(t, qmp.Cont(ctx, vm.QMP))
				}
				runsOn(t, vm)
				if o := l.outcome(t); o.ExitCode != exitFailed {
					t.Errorf("the save says %+v", o)
				}
				l.nothing(t)
			})
		}
	}
}

// With the return path QEMU's "completed" means committed: not before the
// sync, which is one then, and at once after it the checkpoint is whole. QEMU's monitor answers
// meanwhile.
func TestCompletedMeansCommitted(t *testing.T) {
	for _, f := range []fault{{op: "sync", n: 1}, {op: "rename", n: 1}, {op: "syncdir", n: 1}} {
		t.Run(fmt.Sprint(f.op, f.n), func(t *testing.T) {
			t.Parallel()
			ctx, l := limit(t), newLab(t)
			c := q35.tiny(t, qemutest.LiveMemory, varied(768), 10)
			vm := qemutest.Start(t, c)
			vm.WaitFor(t, `tick 00000002\r`)
			set(t, vm, map[string]any{"max-bandwidth": int64(1) << 40, "downtime-limit": 100}, "return-path")
			f.stall, f.mark = time.Second, filepath.Join(l.dir, "mark")
			ok(t, migration.Start(ctx, vm.QMP, f.uri(l)))
			waitForFile(t, f.mark)
			answers := 0
			for {
				info, err := migration.Query(ctx, vm.QMP)
				ok(t, err)
				if _, err := os.Stat(f.mark + ".end"); err == nil {
					break
				}
				if info.Status.Ended() {
					t.Fatalf("QEMU says %s before the %s is done", info.Status, f.op)
				}
				answers++
				time.Sleep(5 * time.Millisecond)
			}
			if answers < 3 {
				t.Errorf("QEMU's monitor has answered %d times in %v", answers, f.stall)
			}
			ended(t, ctx, vm, migration.StatusCompleted)
			l.holds(t, "vm@1")
			restored(t, ctx, c, l.restore("vm"), ram(t, ctx, vm))
		})
	}
}

// A save that is killed while QEMU sends RAM: the migration fails, the guest runs
// on, nothing is visible, and gc frees what the save could not.
func TestKilledSaves(t *testing.T) {
	t.Parallel()
	ctx, l := limit(t), newLab(t)
	c := q35.tiny(t, qemutest.LiveMemory, noise(6144), 10)
	vm := qemutest.Start(t, c)
	vm.WaitFor(t, `tick 00000002\r`)
	set(t, vm, map[string]any{"max-bandwidth": 16 << 20, "downtime-limit": 100}) // at least 1.5 s
	hot := l.hot(t, vm)
	r := rand.New(rand.NewPCG(3, 4))
	killed := 0
	for range 10 {
		ok(t, migration.Start(ctx, vm.QMP, l.withPid(l.save(hot...))))
		pid := l.pid(t)
		time.Sleep(time.Duration(r.IntN(1000)) * time.Millisecond)
		info, err := migration.Query(ctx, vm.QMP)
		ok(t, err)
		ok(t, syscall.Kill(pid, syscall.SIGKILL))
		if info.Status != migration.StatusActive && info.Status != migration.StatusSetup {
			t.Fatalf("the migration is %s: too late to kill the save", info.Status)
		}
		ended(t, ctx, vm, migration.StatusFailed)
		runsOn(t, vm)
		if _, err := os.Stat(l.store + "/store.json"); err == nil {
			if names := l.list(t); len(names) > 0 {
				t.Fatalf("the store lists %v", names)
			}
		}
		killed++
	}
	freed := l.gc(t)
	t.Logf("gc after %d kills: %+v", killed, freed)
	if freed.Saves == 0 || freed.Flash == 0 || freed.NVRAM == 0 {
		t.Errorf("gc freed %+v of %d killed saves", freed, killed)
	}
	l.nothing(t)
	if again := l.gc(t); again.Saves > 0 || again.NVRAM > 0 {
		t.Errorf("a second gc freed %+v", again)
	}
	set(t, vm, fast)
	succeeds(t, ctx, l, vm, c, hot...)
}

// A cancelled migration looks to the save like a stream that ends in the middle.
func TestCancelledSaves(t *testing.T) {
	for _, capabilities := range [][]string{nil, {"return-path"}} {
		t.Run(strings.Join(append([]string{"plain"}, capabilities...), " "), func(t *testing.T) {
			t.Parallel()
			ctx, l := limit(t), newLab(t)
			c := q35.tiny(t, qemutest.LiveMemory, noise(6144), 10)
			vm := qemutest.Start(t, c)
			vm.WaitFor(t, `tick 00000002\r`)
			set(t, vm, map[string]any{"max-bandwidth": 16 << 20, "downtime-limit": 100}, capabilities...)
			flags := append(l.hot(t, vm), "--report", l.report())
			ok(t, migration.Start(ctx, vm.QMP, l.withPid(l.save(flags...))))
			pid := l.pid(t)
			until(t, "some of the RAM", func() bool {
				info, err := migration.Query(ctx, vm.QMP)
				ok(t, err)
				return info.RAM != nil && info.RAM.Transferred > 2<<20
			})
			ok(t, migration.Cancel(ctx, vm.QMP))
			ended(t, ctx, vm, migration.StatusCancelled)
			runsOn(t, vm)
			gone(t, pid)
			// QEMU 10 and later wait for the save's last word before they end its
			// stream, so it is the save that has to end.
			silent := len(capabilities) > 0 && vm.QMP.Version().QEMU.Major >= 8
			if o := l.outcome(t); o.ExitCode != exitStream && !(silent && strings.Contains(o.Error, "has sent nothing for too long")) {
				t.Errorf("the save says %+v", o)
			}
			l.nothing(t)
			if freed := l.gc(t); freed.Saves > 0 || freed.NVRAM > 0 {
				t.Errorf("this was left for gc: %+v", freed)
			}
			set(t, vm, fast)
			succeeds(t, ctx, l, vm, c, flags...)
		})
	}
}

// A store on a file system that is too small: the disk fills up while RAM comes,
// or it can be foreseen that it will. Both fail, the guest runs on, and as much is
// free as before.
func TestFullStore(t *testing.T) {
	t.Parallel()
	ctx, l := limit(t), newLab(t)
	ok(t, os.Mkdir(l.store, 0o700))
	asRoot(t, "mount", "-t", "tmpfs", "-o", fmt.Sprintf("size=20m,mode=700,uid=%d", os.Getuid()), "tmpfs", l.store)
	t.Cleanup(func() { asRoot(t, "umount", l.store) })
	free := func() uint64 {
		var s unix.Statfs_t
		ok(t, unix.Statfs(l.store, &s))
		return s.Bfree * uint64(s.Bsize)
	}
	c := q35.tiny(t, qemutest.LiveMemory, noise(3072), 10) // 12 MiB
	vm := qemutest.Start(t, c)
	vm.WaitFor(t, `tick 00000002\r`)
	set(t, vm, map[string]any{"max-bandwidth": int64(1) << 40, "downtime-limit": 100})
	fails := func(reason string) {
		t.Helper()
		before := free()
		// What has changed would fit.
		ok(t, migration.Start(ctx, vm.QMP, l.save("--parent", "none", "--report", l.report())))
		ended(t, ctx, vm, migration.StatusFailed)
		runsOn(t, vm)
		if o := l.outcome(t); o.ExitCode != exitNoSpace || !strings.Contains(o.Error, reason) {
			t.Errorf("the save says %+v", o)
		}
		l.holds(t, "vm@1")
		if freed := l.gc(t); freed.Saves > 0 || free() < before {
			t.Errorf("%d bytes were free and %d are now; left for gc: %+v", before, free(), freed)
		}
	}
	saved(t, ctx, vm, l.save())
	l.holds(t, "vm@1")
	l.gc(t) // which adds the checkpoint to the index of shared pages
	ok(t, qmp.Cont(ctx, vm.QMP))
	fails(unix.ENOSPC.Error())

	filler := filepath.Join(l.store, "filler")
	ok(t, os.WriteFile(filler, make([]byte, 4<<20), 0o600))
	fails("this VM's last checkpoint took")

	ok(t, os.Remove(filler))
	l.run(t, "rm", "vm@1")
	saved(t, ctx, vm, l.save())
	l.holds(t, "vm@2")
	restored(t, ctx, c, l.restore("vm"), ram(t, ctx, vm))
}

// asRoot runs a command that only root may run; others use sudo, which must not
// ask.
func asRoot(t *testing.T, command ...string) {
	t.Helper()
	if os.Geteuid() != 0 {
		command = append([]string{"sudo", "-n"}, command...)
	}
	if out, err := exec.Command(command[0], command[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(command, " "), err, out)
	}
}
