package main

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
)

// attempt is a checkpoint that is to go wrong.
type attempt struct {
	t      *testing.T
	cmd    *exec.Cmd
	stderr strings.Builder
}

// attempts begins a checkpoint of VM "vm" through a monitor, on a file system
// with a fault if there is one, and waits until that strikes.
func (l *lab) attempts(t *testing.T, f *fault, monitor string, flags ...string) *attempt {
	t.Helper()
	return l.attemptsWith(t, f, append([]string{"--qmp", monitor, "vm"}, flags...)...)
}

// attemptsWith is attempts with other arguments.
func (l *lab) attemptsWith(t *testing.T, f *fault, args ...string) *attempt {
	t.Helper()
	a := &attempt{t: t, cmd: exec.Command("flic-migrate")}
	if f != nil {
		a.cmd = exec.Command("flic-migrate-faulty")
		f.mark = filepath.Join(l.dir, "mark")
		a.cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%s %d %d %d %s", faultEnv, f.op, f.n, f.stall, f.errno, f.mark))
	}
	a.cmd.Args = append(a.cmd.Args, append([]string{"checkpoint", "--store", l.store}, args...)...)
	a.cmd.Stderr = &a.stderr
	ok(t, a.cmd.Start())
	if f != nil {
		waitForFile(t, f.mark)
		ok(t, os.Remove(f.mark))
	}
	return a
}

// fails waits for the end, which must be a failure that says these words.
func (a *attempt) fails(code int, words ...string) {
	a.t.Helper()
	err := a.cmd.Wait()
	if a.cmd.ProcessState.ExitCode() != code {
		a.t.Errorf("%s: %v, want exit code %d\n%s", a.cmd, err, code, a.stderr.String())
	}
	for _, w := range words {
		if !strings.Contains(a.stderr.String(), w) {
			a.t.Errorf("%q does not say %q", a.stderr.String(), w)
		}
	}
}

// killGuards kills the guards that a process has started, of which there must be one.
func killGuards(t *testing.T, pid int) {
	t.Helper()
	var children []byte
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	ok(t, err)
	for _, task := range tasks {
		b, err := os.ReadFile(task)
		ok(t, err)
		children = append(append(children, ' '), b...)
	}
	killed := false
	for _, child := range strings.Fields(string(children)) {
		if b, err := os.ReadFile("/proc/" + child + "/cmdline"); err == nil && strings.HasPrefix(string(b), guardName+"\x00") {
			n, err := strconv.Atoi(child)
			ok(t, err)
			ok(t, syscall.Kill(n, syscall.SIGKILL))
			killed = true
		}
	}
	if !killed {
		t.Fatal("there is no guard")
	}
}

// What goes wrong leaves the guest running, settings as they were, no checkpoint
// and nothing of one, and says what it was.
func TestCheckpointFailures(t *testing.T) {
	t.Parallel()
	ctx, l := limit(t), newLab(t)
	c := q35.tiny(t, qemutest.LiveMemory, noise(3072), 10)
	vm := qemutest.Start(t, c)
	vm.WaitFor(t, `tick 00000002\r`)
	before := settings(t, vm)
	unchanged := func(what string) {
		t.Helper()
		runsOn(t, vm)
		if after := settings(t, vm); after != before {
			t.Errorf("%s: settings were\n%s\nand are\n%s", what, before, after)
		}
		l.nothing(t)
		if freed := l.gc(t); freed.Saves > 0 || freed.NVRAM > 0 {
			t.Errorf("%s: this was left for gc: %+v", what, freed)
		}
	}
	slow := func() *fault { return &fault{op: "write", n: 2, stall: time.Second} }
	status := func(want ...migration.Status) {
		t.Helper()
		info, err := migration.Query(ctx, vm.QMP)
		ok(t, err)
		if !slices.Contains(want, info.Status) {
			t.Errorf("QEMU says %s, want %s", info.Status, want)
		}
	}

	// Interrupted.
	a := l.attempts(t, nil, vm.Socket, "--timer", "1m")
	until(t, "the tracking", func() bool {
		info, err := migration.Query(ctx, vm.QMP)
		ok(t, err)
		return info.Status == migration.StatusActive && info.RAM.Remaining < 32<<20
	})
	ok(t, a.cmd.Process.Signal(os.Interrupt))
	a.fails(exitFailed, "stopped by signal: interrupt")
	unchanged("interrupted in tracking")
	for _, mode := range []string{"stop", "live", "background"} {
		a = l.attempts(t, slow(), vm.Socket, "--mode", mode)
		ok(t, a.cmd.Process.Signal(syscall.SIGTERM))
		a.fails(exitFailed, "stopped by signal: terminated")
		unchanged("terminated in mode " + mode)
		if mode == "background" {
			status(migration.StatusCompleted) // QEMU survives nothing else
		} else {
			status(migration.StatusCancelled, migration.StatusFailed) // we are two who tell it
		}
	}

	// The store fails, early and late. QEMU calls it a failure, too.
	for _, f := range []fault{{op: "write", n: 2, errno: unix.ENOSPC}, {op: "rename", n: 1, errno: unix.ENOSPC}} {
		for _, mode := range []string{"stop", "live"} {
			l.attempts(t, &f, vm.Socket, "--mode", mode).fails(exitNoSpace, unix.ENOSPC.Error())
			unchanged(fmt.Sprint(f.op, " fails in mode ", mode))
			status(migration.StatusFailed)
		}
	}
	l.attempts(t, &fault{op: "syncdir", n: 1, errno: unix.EIO}, vm.Socket, "--mode", "background").fails(exitFailed, unix.EIO.Error())
	unchanged("the last sync fails in mode background")
	status(migration.StatusCompleted) // nobody can tell QEMU

	// Something else is going on.
	ok(t, migration.Start(ctx, vm.QMP, "exec:exec sleep 1"))
	l.attempts(t, nil, vm.Socket).fails(exitFailed, "already running")
	ended(t, ctx, vm, migration.StatusFailed)
	unchanged("a migration is running")
	a = l.attempts(t, slow(), vm.Socket)
	ok(t, migration.Cancel(ctx, vm.QMP))
	a.fails(exitFailed, "qmp: migration ") // cancelled, or failed if it was writing
	unchanged("somebody has cancelled it")

	// The guest writes too fast.
	a = l.attempts(t, nil, vm.Socket, "--mode", "live", "--patience", "1ns", "--give-up")
	a.fails(exitFailed, migration.ErrNoConvergence.Error())
	if strings.Contains(a.stderr.String(), "WARN") {
		t.Errorf("what was asked for is warned of: %s", a.stderr.String())
	}
	unchanged("given up")

	// Somebody else has the monitor.
	holder, err := qmp.Dial(ctx, vm.Socket, qmp.Options{})
	ok(t, err)
	l.attempts(t, nil, vm.Socket).fails(exitFailed, "held by another client")
	holder.Close()
	unchanged("busy")

	// The connection is lost, in tracking and in saving.
	p := newProxy(t, vm.Socket)
	a = l.attempts(t, nil, p.path, "--timer", "1m")
	until(t, "the tracking", func() bool {
		info, err := migration.Query(ctx, vm.QMP)
		ok(t, err)
		return info.Status == migration.StatusActive
	})
	p.cut()
	a.fails(exitFailed, "lost")
	unchanged("connection lost in tracking")
	for _, mode := range []string{"stop", "live", "background"} {
		a = l.attempts(t, slow(), p.path, "--mode", mode)
		p.cut()
		a.fails(exitFailed, "lost")
		unchanged("connection lost in mode " + mode)
	}

	// Killed: in background mode another process reads on, in live mode QEMU itself
	// lets the guest run, in stop mode another process does. If that is killed too, the
	// next checkpoint does.
	a = l.attempts(t, slow(), vm.Socket, "--mode", "background")
	ok(t, a.cmd.Process.Kill())
	_ = a.cmd.Wait()
	ended(t, ctx, vm, migration.StatusCompleted)
	runsOn(t, vm)
	a = l.attempts(t, slow(), vm.Socket, "--mode", "live")
	ok(t, a.cmd.Process.Kill())
	_ = a.cmd.Wait()
	ended(t, ctx, vm, migration.StatusFailed)
	runsOn(t, vm)
	a = l.attempts(t, slow(), vm.Socket)
	ok(t, a.cmd.Process.Kill())
	_ = a.cmd.Wait()
	ended(t, ctx, vm, migration.StatusFailed)
	runsOn(t, vm)
	until(t, "the settings", func() bool { return settings(t, vm) == before })
	l.gc(t)
	// Also if somebody who has waited for the monitor has it first, for longer than QEMU is
	// waited for at a time.
	a = l.attempts(t, slow(), vm.Socket)
	waits, err := net.Dial("unix", vm.Socket)
	ok(t, err)
	ok(t, a.cmd.Process.Kill())
	_ = a.cmd.Wait()
	holder, err = qmp.New(ctx, waits, vm.Socket, qmp.Options{})
	ok(t, err)
	time.Sleep(6 * time.Second)
	if s, err := qmp.QueryStatus(ctx, vm.QMP); err != nil || s.Running {
		t.Errorf("%+v, %v: the guest runs, so this shows nothing", s, err)
	}
	holder.Close()
	until(t, "the settings", func() bool { return settings(t, vm) == before })
	runsOn(t, vm)
	l.gc(t)
	a = l.attempts(t, slow(), vm.Socket)
	killGuards(t, a.cmd.Process.Pid)
	ok(t, a.cmd.Process.Kill())
	_ = a.cmd.Wait()
	ended(t, ctx, vm, migration.StatusFailed)
	if s, err := qmp.QueryStatus(ctx, vm.QMP); err != nil || s.Running {
		t.Fatalf("%+v, %v: the guest runs, so this shows nothing", s, err)
	}
	l.gc(t)
	rep := l.checkpoint(t, vm)
	if rep.State != "running" || len(rep.Warnings) != 1 || l.show(t, rep.Checkpoint).RunState != "running" {
		t.Errorf("after a kill: %+v", rep)
	}
	l.holds(t, "vm@1")
	l.run(t, "rm", "vm@1")
	unchanged("after a kill")

	// QEMU ends.
	a = l.attempts(t, slow(), vm.Socket)
	ok(t, vm.Quit(ctx))
	a.fails(exitFailed, "lost")
	l.nothing(t)
}

// A device that can't be migrated is found before the guest is stopped.
func TestCheckpointBlocked(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	// One that no QEMU can migrate; nvme and others have learned it.
	vm := qemutest.Start(t, qemutest.Config{Args: []string{"-audiodev", "none,id=none", "-device", "nec-usb-xhci",
		"-device", "usb-audio,audiodev=none"}})
	l.attempts(t, nil, vm.Socket).fails(exitFailed, migration.ErrBlocked.Error(), "usb-audio")
	if s, err := qmp.QueryStatus(t.Context(), vm.QMP); err != nil || !s.Running {
		t.Errorf("%+v, %v", s, err)
	}
	l.nothing(t)
}

// proxy is a monitor's socket in between, which can lose its connections. It
// carries files.
type proxy struct {
	path string

	mu    sync.Mutex
	conns []*net.UnixConn
}

func newProxy(t *testing.T, to string) *proxy {
	t.Helper()
	p := &proxy{path: filepath.Join(filepath.Dir(to), "proxy")}
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: p.path, Net: "unix"})
	ok(t, err)
	t.Cleanup(func() { ln.Close(); p.cut() })
	go func() {
		for {
			client, err := ln.AcceptUnix()
			if err != nil {
				return
			}
			server, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: to, Net: "unix"})
			if err != nil {
				client.Close()
				continue
			}
			p.mu.Lock()
			p.conns = append(p.conns, client, server)
			p.mu.Unlock()
			go relay(client, server)
			go relay(server, client)
		}
	}()
	return p
}

// cut ends all connections.
func (p *proxy) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.conns {
		c.Close()
	}
	p.conns = nil
}

func relay(from, to *net.UnixConn) {
	defer from.Close()
	defer to.Close()
	b, oob := make([]byte, 64<<10), make([]byte, unix.CmsgSpace(4))
	for {
		n, oobn, _, _, err := from.ReadMsgUnix(b, oob)
		if err != nil || n == 0 {
			return
		}
		var fds []int
		if messages, err := unix.ParseSocketControlMessage(oob[:oobn]); err == nil && len(messages) == 1 {
			fds, _ = unix.ParseUnixRights(&messages[0])
		}
		_, _, err = to.WriteMsgUnix(b[:n], oob[:oobn], nil)
		for _, fd := range fds {
			unix.Close(fd) // or QEMU's end would never be the last
		}
		if err != nil {
			return
		}
	}
}
