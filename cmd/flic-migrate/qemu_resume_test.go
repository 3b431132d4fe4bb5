package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
)

// cutEnv says after how many bytes the server of flic-migrate-cut dies, as by
// kill -9.
const cutEnv = "FLIC_TEST_CUT"

// stillborn is a file that makes a recovery by flic-migrate-cut end before it begins.
func stillborn(store string) string { return store + ".stillborn" }

// cut is the main function of flic-migrate-cut: flic-migrate whose restores, but not
// its recoveries, come to a sudden end, at a byte that no signal sent from outside
// would hit.
func cut() {
	limit, err := strconv.ParseInt(os.Getenv(cutEnv), 10, 64)
	recovers := slices.Contains(os.Args, "--recover")
	if i := slices.Index(os.Args, "--store"); recovers && os.Remove(stillborn(os.Args[i+1])) == nil {
		os.Args[slices.Index(os.Args, "vm@1")] = "vm@9"
	}
	if len(os.Args) < 2 || os.Args[1] != "restore" || recovers || err != nil {
		main()
		return
	}
	server := exec.Command("flic-migrate", os.Args[1:]...)
	server.Stdin, server.Stderr = os.Stdin, os.Stderr
	out, err := server.StdoutPipe()
	if err == nil {
		err = server.Start()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(99)
	}
	// A byte more than is passed on: with none of it, the server has begun.
	io.CopyN(os.Stdout, out, limit)
	io.CopyN(io.Discard, out, 1)
	server.Process.Kill()
	server.Wait()
}

// noUserfaultfd is the main function of no-userfaultfd: it becomes the program
// it is given, for which userfaultfd(2) fails, as on a host whose sysctl
// vm.unprivileged_userfaultfd is 0 for a process without CAP_SYS_PTRACE.
func noUserfaultfd() {
	const number = 0 // offset of the number in struct seccomp_data
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: number},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_USERFAULTFD, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0x00050000 | uint32(unix.EPERM)}, // SECCOMP_RET_ERRNO
		{Code: unix.BPF_RET | unix.BPF_K, K: 0x7fff0000},                      // SECCOMP_RET_ALLOW
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	err := noUserfaultfdDevice()
	if err == nil {
		err = unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
	}
	if err == nil {
		// For all threads of this process: which one calls execve is not known.
		if _, _, e := unix.Syscall(unix.SYS_SECCOMP, 1, 1, uintptr(unsafe.Pointer(&prog))); e != 0 {
			err = e
		}
	}
	if err == nil {
		err = syscall.Exec(os.Args[1], os.Args[1:], os.Environ())
	}
	fmt.Fprintln(os.Stderr, "no-userfaultfd:", err)
	os.Exit(99)
}

// noUserfaultfdDevice takes /dev/userfaultfd away, which QEMU 8.1 and later open
// instead, from this thread and what it executes.
func noUserfaultfdDevice() error {
	const device = "/dev/userfaultfd"
	if _, err := os.Stat(device); err != nil || os.Geteuid() != 0 {
		return nil // nobody else may open it
	}
	runtime.LockOSThread()
	return errors.Join(unix.Unshare(unix.CLONE_NEWNS),
		unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
		unix.Mount("/dev/null", device, "", unix.MS_BIND, ""))
}

// resuming is a resume that has been started.
type resuming struct {
	cmd    *exec.Cmd
	stdout bytes.Buffer
	stderr lockedBuffer
	ended  chan struct{}
	err    error
}

// lockedBuffer is read while a process writes to it.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// resumes starts a resume of vm's second monitor; program is the command.
func (l *lab) resumes(t *testing.T, program string, vm *qemutest.VM, args ...string) *resuming {
	t.Helper()
	return l.resumesWith(t, program, nil, append([]string{"--qmp", vm.Socket}, args...)...)
}

func (l *lab) resumesWith(t *testing.T, program string, env []string, args ...string) *resuming {
	t.Helper()
	r := &resuming{ended: make(chan struct{})}
	r.cmd = exec.Command(program, append([]string{"resume", "--store", l.store, "--json"}, args...)...)
	// What is forgotten here would be found by looking into it.
	r.cmd.Env = append(append(os.Environ(), "TMPDIR="+l.dir), env...)
	r.cmd.Stdout, r.cmd.Stderr = &r.stdout, &r.stderr
	ok(t, r.cmd.Start())
	go func() { r.err = r.cmd.Wait(); close(r.ended) }()
	t.Cleanup(func() { r.cmd.Process.Kill(); <-r.ended })
	return r
}

// outcome waits for the end.
func (r *resuming) outcome(t *testing.T) (doc resumeReport, server restoreReport) {
	t.Helper()
	select {
	case <-r.ended:
	case <-time.After(2 * time.Minute):
		t.Fatalf("the resume does not end\n%s", r.stderr.String())
	}
	if r.stdout.Len() == 0 {
		// It has failed before it had to do with QEMU.
		doc.ExitCode, doc.Error = r.cmd.ProcessState.ExitCode(), r.stderr.String()
	} else if err := json.Unmarshal(r.stdout.Bytes(), &doc); err != nil {
		t.Fatalf("%v\n%s%s", err, r.stdout.String(), r.stderr.String())
	}
	if code := r.cmd.ProcessState.ExitCode(); code != doc.ExitCode || (code == 0) != (doc.Error == "") {
		t.Errorf("exit code %d, but the report has %d, %q", code, doc.ExitCode, doc.Error)
	}
	if doc.Server != nil {
		server = *doc.Server
	}
	return doc, server
}

// says waits for a message.
func (r *resuming) says(t *testing.T, pattern string) []string {
	t.Helper()
	re := regexp.MustCompile(pattern)
	var match []string
	until(t, "the message "+pattern, func() bool {
		match = re.FindStringSubmatch(r.stderr.String())
		return match != nil
	})
	return match
}

// resume resumes, which must succeed.
func (l *lab) resume(t *testing.T, vm *qemutest.VM, args ...string) (resumeReport, restoreReport) {
	t.Helper()
	r := l.resumes(t, "flic-migrate", vm, args...)
	doc, server := r.outcome(t)
	if r.err != nil {
		t.Fatalf("resume %v: %v\n%s\n%s", args, r.err, r.stderr.String(), vm.Output())
	}
	return doc, server
}

// fails resumes, which must fail with these words, and tells how.
func (l *lab) fails(t *testing.T, program string, vm *qemutest.VM, code int, words []string, args ...string) resumeReport {
	t.Helper()
	doc, _ := l.resumes(t, program, vm, args...).outcome(t)
	said(t, doc, code, words)
	return doc
}

// said checks the report of a resume that was to fail.
func said(t *testing.T, doc resumeReport, code int, words []string) {
	t.Helper()
	if doc.ExitCode != code {
		t.Errorf("exit code %d, want %d", doc.ExitCode, code)
	}
	for _, w := range words {
		if !strings.Contains(doc.Error, w) {
			t.Errorf("%q does not say %q", doc.Error, w)
		}
	}
}

// tidy fails if resumes have left anything outside of the store.
func (l *lab) tidy(t *testing.T) {
	t.Helper()
	left, err := filepath.Glob(l.dir + "/*flic-re*")
	ok(t, err)
	if len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func state(t *testing.T, vm *qemutest.VM, want string) {
	t.Helper()
	s, err := qmp.QueryStatus(t.Context(), vm.QMP)
	ok(t, err)
	if s.Status != want {
		t.Errorf("the VM is %s, want %s", s.Status, want)
	}
}

// postcopy tells whether the capability is on, with which a save would hang.
func postcopy(t *testing.T, vm *qemutest.VM) bool {
	t.Helper()
	c, err := migration.Capabilities(t.Context(), vm.QMP)
	ok(t, err)
	return c["postcopy-ram"]
}

// saveTwice saves a tiny guest stopped, as vm@1, and running, as vm@2. It
// returns its configuration, its RAM at vm@1 and at vm@2, and where its counter
// was then.
func saveTwice(t *testing.T, ctx context.Context, l *lab, m machine) (c qemutest.Config, stopped, running map[string][]byte, tick int) {
	t.Helper()
	c = m.tiny(t, "64M", varied(8<<20/4096), 10)
	source := qemutest.Start(t, c)
	source.WaitFor(t, `tick 00000003\r`)
	set(t, source, fast)
	stopped = stop(t, ctx, source)
	saved(t, ctx, source, l.save())
	ok(t, qmp.Cont(ctx, source.QMP))
	runsOn(t, source)
	saved(t, ctx, source, l.save())
	running = ram(t, ctx, source) // QEMU has stopped it
	tick = lastTick(t, source.Console(), 16)
	source.Kill()
	return c, stopped, running, tick
}

// TestOrigin resumes an older checkpoint than the newest: what is saved of it then refers
// to that one, and the next to what was saved.
func TestOrigin(t *testing.T) {
	t.Parallel()
	ctx, l := limit(t), newLab(t)
	c, _, _, _ := saveTwice(t, ctx, l, q35)
	vm := qemutest.Start(t, destination(c, "defer"))
	l.resume(t, vm, "vm@1")
	ok(t, qmp.Cont(ctx, vm.QMP)) // it was stopped when it was saved
	runsOn(t, vm)
	for _, want := range []string{"vm@1", "vm@3"} {
		l.run(t, "checkpoint", "--qmp", vm.Socket, "vm")
		if r := l.show(t, "vm").Report; r.Parent != want || r.Unchanged == 0 {
			t.Errorf("parent %q, want %s; %d unchanged", r.Parent, want, r.Unchanged)
		}
	}
	l.holds(t, "vm@1", "vm@2", "vm@3", "vm@4")
}

// TestResume resumes guests into the state they were saved in, and into another.
func TestResume(t *testing.T) {
	t.Parallel()
	ctx, l := limit(t), newLab(t)
	c, before, _, tick := saveTwice(t, ctx, l, q35)

	// Stopped when saved: stopped, and every byte of RAM is the source's.
	vm := qemutest.Start(t, destination(c, "defer"))
	doc, server := l.resume(t, vm, "vm@1")
	if doc.Checkpoint != "vm@1" || !doc.Lazy || doc.State != "paused" || doc.Running <= 0 || doc.Resident < doc.Running || doc.Warnings != nil {
		t.Errorf("%+v", doc)
	}
	if r := server.LazyReport; r == nil || r.Pages < 1000 || r.BytesOut < (r.Pages-r.ZeroRest)*4096*9/10 || r.Opening <= 0 || r.Resident < r.Opening || r.Taken < r.Resident {
		t.Errorf("server: %+v", server.LazyReport)
	}
	// Most of this guest's RAM has no content.
	if needs := migration.NeedsAllPages(vm.QMP.Version()); (server.LazyReport.ZeroRest > 1000) != needs {
		t.Errorf("QEMU %v was sent %d pages at the end, needs them: %v", vm.QMP.Version(), server.LazyReport.ZeroRest, needs)
	}
	// From 10.1 on QEMU counts for itself how long was waited for pages.
	counted := int64(0)
	if doc.Latency != nil {
		for _, n := range doc.Latency.Distribution {
			counted += n
		}
	}
	if v := vm.QMP.Version().QEMU; (v.Major > 10 || v.Major == 10 && v.Minor >= 1) != (counted > 0) {
		t.Errorf("QEMU has counted %+v", doc.Latency)
	}
	state(t, vm, "paused")
	if diff := qemutest.DiffRAM(before, ram(t, ctx, vm)); diff != "" {
		t.Error(diff)
	}
	vm.Kill()

	// Running when saved, but --paused. It runs when it is told to.
	vm = qemutest.Start(t, destination(c, "defer"))
	if doc, _ := l.resume(t, vm, "--paused", "vm@2"); doc.State != "paused" {
		t.Errorf("%+v", doc)
	}
	state(t, vm, "paused")
	goesOn(t, ctx, vm, tick, 16)
	vm.Kill()

	// Running when saved, with a moment in which the background is held back,
	// so that there is something to wait for.
	vm = qemutest.Start(t, destination(c, "defer"))
	doc, server = l.resume(t, vm, "--learn", "300ms", "vm")
	if doc.Checkpoint != "vm@2" || !doc.Lazy || doc.State != "running" {
		t.Errorf("%+v", doc)
	}
	first := server.LazyReport
	if first.Waited < 10 || first.Demands < first.Waited || first.WaitP50 <= 0 || first.WaitP99 < first.WaitP50 || first.WaitMax < first.WaitP99 {
		t.Errorf("server: %+v", first)
	}
	vm.WaitFor(t, `tick (\w+)\r`)
	runsOn(t, vm)

	// It can be saved again, which the capability would prevent, and resumed
	// from that.
	if postcopy(t, vm) {
		t.Error("postcopy-ram is still on")
	}
	set(t, vm, fast)
	again := stop(t, ctx, vm)
	saved(t, ctx, vm, l.save())
	vm.Kill()
	vm = qemutest.Start(t, destination(c, "defer"))
	l.resume(t, vm, "vm@3")
	if diff := qemutest.DiffRAM(again, ram(t, ctx, vm)); diff != "" {
		t.Error(diff)
	}
	vm.Kill()

	// What the first resume of vm@2 waited for comes first now.
	vm = qemutest.Start(t, destination(c, "defer"))
	_, server = l.resume(t, vm, "--learn", "300ms", "vm@2")
	// (By how much is package lazy's to test: this guest asks for so few pages
	// that the odd new one is a tenth of them.)
	if second := server.LazyReport; second.Waited*2 > first.Waited || second.HotPages < first.Waited {
		t.Errorf("first resume: %+v\nsecond: %+v", first, second)
	}

	// Not a QEMU that waits for a migration.
	l.fails(t, "flic-migrate", vm, exitFailed, []string{"does not wait for a migration", "running", "-incoming defer -S"}, "vm@2")
	l.fails(t, "flic-migrate", vm, exitFailed, []string{"has not been interrupted"}, "--recover", "vm@2")
	l.tidy(t)
}

// TestResumeInterrupted: a resume that is asked to end when the guest runs says what becomes
// of it, and the guest runs on and gets all its memory.
func TestResumeInterrupted(t *testing.T) {
	t.Parallel()
	ctx, l := limit(t), newLab(t)
	c, _, _, _ := saveTwice(t, ctx, l, q35)
	vm := qemutest.Start(t, destination(c, "defer"))
	metrics := filepath.Join(l.dir, "resume.prom")
	r := l.resumes(t, "flic-migrate", vm, "--learn", "3s", "--metrics", metrics, "vm@2")
	r.says(t, `vm@2: running after \d+ ms`)
	server := r.server(t)
	ok(t, r.cmd.Process.Signal(syscall.SIGTERM))
	doc, _ := r.outcome(t)
	said(t, doc, exitFailed, []string{"stopped by signal: terminated: the guest is running", fmt.Sprintf("process %d", server), "brings the rest of its memory", "resume --recover vm@2"})
	info, err := migration.Wait(ctx, vm.QMP)
	ok(t, err)
	if info.Status != migration.StatusCompleted {
		t.Errorf("the migration is %s", info.Status)
	}
	runsOn(t, vm)
	// The server has written its metrics, without the one that has started it.
	until(t, "the server's metrics", func() bool {
		b, err := os.ReadFile(metrics)
		return err == nil && strings.Contains(string(b), `flic_migrate_running{verb="restore",vm="vm"} 0`) && strings.Contains(string(b), "flic_migrate_waited_pages")
	})
}

// TestResumeText: what people see.
func TestResumeText(t *testing.T) {
	t.Parallel()
	ctx, l := limit(t), newLab(t)
	c, _, _, _ := saveTwice(t, ctx, l, q35)
	vm := qemutest.Start(t, destination(c, "defer"))
	out, err := exec.Command("flic-migrate", "resume", "--store", l.store, "--qmp", vm.Socket, "--learn", "300ms", "vm").CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	want := `(?s)^flic-migrate: vm@2: running after \d+ ms\n` +
		`(?:flic-migrate: resume: \d+ % of \d+ pages, \d+ s\n)*` +
		`flic-migrate: vm@2: restored lazily: running after \d+ ms, all memory after \d+ ms\n` +
		`flic-migrate: vm@2: \d+ pages sent, \d+ asked for, \d+ waited for \(p50 \d+ µs, p99 \d+ µs\), \d+ MB/s\n$`
	if !regexp.MustCompile(want).Match(out) {
		t.Errorf("%s", out)
	}

	// And what those see who drive QMP themselves; it works as it stands.
	vm = qemutest.Start(t, destination(c, "defer"))
	for _, line := range strings.Split(l.run(t, "resume", "--print", "vm"), "\n") {
		switch {
		case strings.HasPrefix(line, "# when query-status"):
			until(t, "the end of inmigrate", func() bool {
				s, err := qmp.QueryStatus(ctx, vm.QMP)
				ok(t, err)
				return s.Status != "inmigrate"
			})
		case strings.HasPrefix(line, "# after the MIGRATION"):
			_, err := migration.Wait(ctx, vm.QMP)
			ok(t, err)
		case strings.HasPrefix(line, "{"):
			var command struct {
				Execute   string
				Arguments json.RawMessage
			}
			ok(t, json.Unmarshal([]byte(line), &command))
			var args any
			if command.Arguments != nil {
				args = command.Arguments
			}
			ok(t, vm.QMP.Execute(ctx, command.Execute, args, nil))
		}
	}
	vm.WaitFor(t, `tick (\w+)\r`)
	runsOn(t, vm)
	if postcopy(t, vm) {
		t.Error("postcopy-ram is still on")
	}
}

// TestResumeEagerly: without userfaultfd the guest is restored all the same, and
// it is said why.
func TestResumeEagerly(t *testing.T) {
	t.Parallel()
	ctx, l := limit(t), newLab(t)
	c, before, _, tick := saveTwice(t, ctx, l, q35)
	incoming := destination(c, "defer")
	incoming.Under = []string{"no-userfaultfd"}
	why := []string{"userfaultfd", "vm.unprivileged_userfaultfd=1", "/dev/userfaultfd", "CAP_SYS_PTRACE"}

	vm := qemutest.Start(t, incoming)
	l.fails(t, "flic-migrate", vm, exitFailed, why, "--lazy", "always", "vm@1")
	// Nothing has been done to it.
	doc, server := l.resume(t, vm, "vm@1")
	if doc.Lazy || doc.State != "paused" || server.LazyReport != nil || server.Pages == 0 {
		t.Errorf("%+v, server %+v", doc, server)
	}
	for _, w := range why {
		if !strings.Contains(doc.Reason, w) {
			t.Errorf("reason %q does not say %q", doc.Reason, w)
		}
	}
	if diff := qemutest.DiffRAM(before, ram(t, ctx, vm)); diff != "" {
		t.Error(diff)
	}
	vm.Kill()

	// Asked for: no reason is given.
	vm = qemutest.Start(t, destination(c, "defer"))
	doc, _ = l.resume(t, vm, "--lazy", "never", "vm@2")
	if doc.Lazy || doc.Reason != "" || doc.State != "running" || postcopy(t, vm) {
		t.Errorf("%+v", doc)
	}
	next, err := strconv.ParseInt(vm.WaitFor(t, `tick (\w+)\r`)[1], 16, 64)
	if err != nil || int(next) < tick {
		t.Errorf("tick %d after %d, %v", next, tick, err)
	}
	vm.Kill()

	// Without QMP. The server sees from QEMU's command line what it expects.
	for _, tc := range []struct {
		lazy   string
		global bool
		want   bool
	}{{"always", true, true}, {"auto", true, true}, {"auto", false, false}, {"never", true, false}} {
		report := filepath.Join(l.dir, "report")
		incoming := destination(c, "defer")
		if tc.global {
			incoming.Args = append(incoming.Args, "-global", "migration.x-postcopy-ram=on")
		}
		vm := qemutest.Start(t, incoming)
		ok(t, migration.Incoming(ctx, vm.QMP, l.restore("--lazy", tc.lazy, "--report", report, "vm@1")))
		if _, err := migration.Wait(ctx, vm.QMP); err != nil {
			t.Fatalf("%+v: %v\n%s", tc, err, vm.Output())
		}
		if diff := qemutest.DiffRAM(before, ram(t, ctx, vm)); diff != "" {
			t.Errorf("%+v: %s", tc, diff)
		}
		waitForFile(t, report)
		b, err := os.ReadFile(report)
		ok(t, err)
		var doc restoreReport
		ok(t, json.Unmarshal(b, &doc))
		if doc.Lazy != tc.want || doc.Reason != "" {
			t.Errorf("%+v: %s", tc, b)
		}
		ok(t, os.Remove(report))
		vm.Kill()
	}
	l.tidy(t)
}

// TestResumeRefused: another machine is told from the one that was saved before
// anything is done to it.
func TestResumeRefused(t *testing.T) {
	t.Parallel()
	ctx, l := limit(t), newLab(t)
	c, before, _, _ := saveTwice(t, ctx, l, q35)
	machineType := l.show(t, "vm@1").Machine
	for _, tc := range []struct {
		name   string
		change func(*qemutest.Config)
		words  []string
	}{
		{"machine type", func(c *qemutest.Config) { c.Machine = "pc" }, []string{"machine type", "-machine " + machineType}},
		{"less RAM", func(c *qemutest.Config) { c.Memory = "48M" }, []string{"pc.ram", fmt.Sprint(48 << 20), fmt.Sprint(64 << 20)}},
		{"more RAM", func(c *qemutest.Config) { c.Memory = "80M" }, []string{"pc.ram", fmt.Sprint(80 << 20), fmt.Sprint(64 << 20)}},
		{"other block", func(c *qemutest.Config) {
			c.Args = append(c.Args, "-object", "memory-backend-ram,id=mem0,size=64M")
			c.Machine = "q35,memory-backend=mem0"
		}, []string{"pc.ram", "missing"}},
	} {
		other := destination(c, "defer")
		tc.change(&other)
		vm := qemutest.Start(t, other)
		l.fails(t, "flic-migrate", vm, exitFailed, append(tc.words, "not the machine that was saved"), "vm@1")
		state(t, vm, "inmigrate")
		if m, err := migration.Query(ctx, vm.QMP); err != nil || m.Status != migration.StatusNone {
			t.Errorf("%s: the migration is %s, %v", tc.name, m.Status, err)
		}
		if postcopy(t, vm) {
			t.Errorf("%s: postcopy-ram is on", tc.name)
		}
		vm.Kill()
	}

	// A lazy restore would empty RAM that was not saved.
	other := destination(c, "defer")
	other.Args = append(other.Args, "-device", "secondary-vga")
	vm := qemutest.Start(t, other)
	l.fails(t, "flic-migrate", vm, exitFailed, []string{"vga.vram"}, "--lazy", "always", "vm@1")
	state(t, vm, "inmigrate")
	if doc, _ := l.resume(t, vm, "vm@1"); doc.Lazy || !strings.Contains(doc.Reason, "vga.vram") {
		t.Errorf("a QEMU with more RAM: %+v", doc)
	}
	vm.Kill()

	// No such checkpoint, a damaged one.
	vm = qemutest.Start(t, destination(c, "defer"))
	l.fails(t, "flic-migrate", vm, exitNotFound, []string{"vm@9"}, "vm@9")
	image := l.image(t, 2)
	flipBytes(t, image, -1)
	l.fails(t, "flic-migrate", vm, exitCorrupt, []string{filepath.Base(image)}, "vm@2")
	state(t, vm, "inmigrate")
	l.resume(t, vm, "vm@1")
	if diff := qemutest.DiffRAM(before, ram(t, ctx, vm)); diff != "" {
		t.Error(diff)
	}
}

// image is the path of the file of vm@n.
func (l *lab) image(t *testing.T, n int) string {
	t.Helper()
	names, err := filepath.Glob(l.store + "/vms/vm/*.flic")
	ok(t, err)
	if len(names) < n {
		t.Fatalf("there are only %v", names)
	}
	return names[n-1]
}

// flipBytes damages 64 bytes of a file at an offset, from its end if negative,
// and returns what was there.
func flipBytes(t *testing.T, name string, off int64) []byte {
	t.Helper()
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	ok(t, err)
	defer f.Close()
	info, err := f.Stat()
	ok(t, err)
	if off < 0 {
		off += info.Size() - 63
	}
	was := make([]byte, 64)
	_, err = f.ReadAt(was, off)
	ok(t, err)
	bad := bytes.Clone(was)
	for i := range bad {
		bad[i] ^= 0xff
	}
	_, err = f.WriteAt(bad, off)
	ok(t, err)
	return was
}

// TestResumeServerDies kills the server before and after RUN. resume says what
// happened; the checkpoint is untouched; after RUN the guest has lost nothing.
func TestResumeServerDies(t *testing.T) {
	t.Parallel()
	ctx, l := limit(t), newLab(t)
	c, _, before, tick := saveTwice(t, ctx, l, q35)
	opening := openingLen(t, l, "vm@2")
	for _, tc := range []struct {
		name  string
		bytes int64
		// By whom the server was started: the resume, or QEMU, if its monitor
		// carries no files.
		resume, qemu []string
		ends         bool // QEMU does, by itself
	}{
		{"before the first byte", 0, []string{"could not begin", "still waits for a migration"}, []string{"has died", "waits for ever"}, false},
		{"in the header", 5, nil, nil, true},
		{"in the setup", 150, nil, nil, true},
		{"in the package", 20000, nil, nil, true},
		// Then QEMU ends, or hangs for good.
		{"while the devices load", opening + 4096, nil, nil, false},
	} {
		limit := cutEnv + "=" + fmt.Sprint(tc.bytes)
		for _, byQEMU := range []bool{false, true} {
			incoming := destination(c, "defer")
			var env []string
			var monitor string
			words := append([]string{"failed before the guest could run", "the checkpoint is untouched"}, tc.resume...)
			switch {
			case byQEMU:
				words = append(words[:2:2], tc.qemu...)
				incoming.Env = []string{limit}
				monitor = freePort(t)
				incoming.Args = append(incoming.Args, "-qmp", "tcp:"+monitor+",server=on,wait=off")
			case tc.bytes == 0:
				words = tc.resume
				fallthrough
			default:
				env = []string{limit}
			}
			vm := qemutest.Start(t, incoming)
			if !byQEMU {
				monitor = vm.Socket
			}
			doc, _ := l.resumesWith(t, "flic-migrate-cut", env, "--qmp", monitor, "vm@2").outcome(t)
			said(t, doc, exitFailed, words)
			t.Logf("%s, server started by QEMU %v: %s", tc.name, byQEMU, doc.Error)
			if tc.ends {
				<-vm.Exited()
			}
			if tc.bytes == 0 && !byQEMU {
				// Nothing was done to it.
				state(t, vm, "inmigrate")
				if postcopy(t, vm) {
					t.Error("postcopy-ram is on")
				}
				l.resume(t, vm, "--paused", "vm@2")
				if diff := qemutest.DiffRAM(before, ram(t, ctx, vm)); diff != "" {
					t.Error(diff)
				}
			}
			vm.Kill()
		}
	}
	l.run(t, "verify", "--all")

	advice := func(vm *qemutest.VM) string {
		return fmt.Sprintf("run flic-migrate resume --recover --store %s --qmp %s vm@2", l.store, vm.Socket)
	}
	// After RUN, with the guest running: held, and then recovered, and killed
	// and recovered again.
	incoming := destination(c, "defer")
	vm := qemutest.Start(t, incoming)
	first := l.resumes(t, "flic-migrate", vm, "--restarts", "0", "--learn", "20s", "vm@2")
	first.says(t, `vm@2: running after \d+ ms`)
	ok(t, syscall.Kill(first.server(t), syscall.SIGKILL))
	doc, _ := first.outcome(t)
	if doc.ExitCode != exitFailed || !strings.Contains(doc.Error, "nothing is lost") || !strings.Contains(doc.Error, advice(vm)) {
		t.Errorf("%+v", doc)
	}
	second := l.resumes(t, "flic-migrate", vm, "--restarts", "0", "--recover", "--learn", "20s", "vm@2")
	second.says(t, `vm@2: running after \d+ ms`)
	ok(t, syscall.Kill(serverOf(t, vm.Pid()), syscall.SIGKILL))
	if doc, _ := second.outcome(t); !strings.Contains(doc.Error, advice(vm)) {
		t.Errorf("%+v", doc)
	}
	// Recoveries that fail before they begin do no harm: any byte that is not
	// right would make QEMU crash.
	l.fails(t, "flic-migrate", vm, exitUsage, nil, "--recover", "--lazy", "never", "vm@2")
	l.fails(t, "flic-migrate", vm, exitUsage, []string{"NAME@N"}, "--recover", "vm")
	l.fails(t, "flic-migrate", vm, exitFailed, []string{"another checkpoint", l.show(t, "vm@2").UUID.String()}, "--recover", "vm@1")
	image := l.image(t, 2)
	recoverWith(t, vm, l.restore("--recover", "--nosuchflag", "vm@2"))
	recoverWith(t, vm, l.restore("--recover", "vm@9"))
	was := flipBytes(t, image, -1)
	recoverWith(t, vm, l.restore("--recover", "vm@2"))
	l.fails(t, "flic-migrate", vm, exitCorrupt, []string{filepath.Base(image)}, "--recover", "vm@2")
	restoreBytes(t, image, -1, was)

	doc, report := l.resume(t, vm, "--recover", "vm@2")
	if doc.State != "running" || report.LazyReport.Recovered == 0 || report.LazyReport.Pages == 0 {
		t.Errorf("%+v, server %+v", doc, report.LazyReport)
	}
	next, err := strconv.ParseInt(vm.WaitFor(t, `tick (\w+)\r`)[1], 16, 64)
	if err != nil || int(next) < tick {
		t.Errorf("tick %d after %d, %v", next, tick, err)
	}
	runsOn(t, vm)
	if postcopy(t, vm) {
		t.Error("postcopy-ram is still on")
	}
	vm.Kill()

	// The same with a guest that stays paused, whose bytes are compared.
	vm = qemutest.Start(t, incoming)
	first = l.resumes(t, "flic-migrate", vm, "--restarts", "0", "--paused", "--learn", "20s", "vm@2")
	first.says(t, `vm@2: paused after \d+ ms`)
	ok(t, syscall.Kill(first.server(t), syscall.SIGKILL))
	if doc, _ := first.outcome(t); !strings.Contains(doc.Error, advice(vm)+" --paused") {
		t.Errorf("%+v", doc)
	}
	if doc, _ := l.resume(t, vm, "--recover", "--paused", "vm@2"); doc.State != "paused" {
		t.Errorf("%+v", doc)
	}
	if diff := qemutest.DiffRAM(before, ram(t, ctx, vm)); diff != "" {
		t.Error(diff)
	}
	l.run(t, "verify", "--all")
	l.tidy(t)
}

// TestResumeRegains has servers die while a Linux guest touches its memory for the
// first time. What interrupts need is touched with QEMU's lock held: then QEMU can't
// negotiate with a new monitor, and only the resume that is there can recover. Every
// other QEMU may start no process.
func TestResumeRegains(t *testing.T) {
	t.Parallel()
	ctx, l := limit(t), newLab(t)
	c := q35.linux("128M", "flic.fill=16 flic.dirty=10")
	source := qemutest.Start(t, c)
	source.WaitFor(t, `flic ready`)
	set(t, source, fast)
	saved(t, ctx, source, l.save())
	source.Kill()
	opening := openingLen(t, l, "vm@1")
	for i := range 6 {
		incoming := destination(c, "defer")
		if i%2 == 1 {
			incoming.Args = append(slices.Clone(incoming.Args), "-sandbox", "on,spawn=deny")
		}
		vm := qemutest.Start(t, incoming)
		// What earlier resumes have learned is not asked for again.
		touched, err := filepath.Glob(filepath.Join(l.store, "vms/vm/*.touched"))
		ok(t, err)
		for _, name := range touched {
			ok(t, os.Remove(name))
		}
		// The next server has nothing to say, and QEMU must not notice.
		ok(t, os.WriteFile(stillborn(l.store), nil, 0o600))
		// The devices ask for up to ten pages, with their neighbours, before the guest.
		dies := cutEnv + "=" + fmt.Sprint(opening+int64(8*(i+11))*4200)
		r := l.resumesWith(t, "flic-migrate-cut", []string{dies}, "--lazy", "always", "--learn", "200ms", "--qmp", vm.Socket, "vm@1")
		doc, _ := r.outcome(t)
		t.Logf("running after %v, all there after %v", doc.Running, doc.Resident)
		if doc.ExitCode != 0 || doc.State != "running" || strings.Count(r.stderr.String(), "another goes on") != 2 || doc.Resident > migration.RecoverTime/2 {
			t.Errorf("%+v\n%s", doc, r.stderr.String())
		}
		runsOn(t, vm)
		checks(t, vm)
		vm.Kill()
	}
}

// server waits for the server that a resume has started.
func (r *resuming) server(t *testing.T) (pid int) {
	t.Helper()
	return serverOf(t, r.cmd.Process.Pid)
}

// serverOf waits for a process's one child: of a resume, or of a QEMU that was told
// to recover.
func serverOf(t *testing.T, parent int) (pid int) {
	t.Helper()
	until(t, "the server", func() bool {
		pids := children(t, parent)
		if len(pids) == 1 {
			pid = pids[0]
		}
		return len(pids) == 1
	})
	return pid
}

// recoverWith tells QEMU to recover with a server that can't, and says so.
func recoverWith(t *testing.T, vm *qemutest.VM, uri string) {
	t.Helper()
	before := strings.Count(vm.Output(), "flic-migrate: ")
	m, err := qmp.Dial(t.Context(), vm.Socket, qmp.Options{OOB: true})
	ok(t, err)
	defer m.Close()
	ok(t, m.ExecuteOOB(t.Context(), "migrate-recover", map[string]any{"uri": uri}, nil))
	until(t, "the server's failure", func() bool {
		return strings.Count(vm.Output(), "flic-migrate: ") > before && len(children(t, vm.Pid())) == 0
	})
}

func restoreBytes(t *testing.T, name string, off int64, was []byte) {
	t.Helper()
	if now := flipBytes(t, name, off); bytes.Equal(now, was) {
		t.Fatal("nothing was damaged")
	}
}

// openingLen is how many bytes a lazy restore sends up to RUN.
func openingLen(t *testing.T, l *lab, name string) int64 {
	t.Helper()
	cmd := exec.Command("flic-migrate", "restore", "--store", l.store, "--lazy", "always", "--learn", "1m", name)
	in, err := cmd.StdinPipe()
	ok(t, err)
	out, err := cmd.StdoutPipe()
	ok(t, err)
	ok(t, cmd.Start())
	// The opening is all it sends unasked while it holds back the rest.
	n := int64(0)
	f := out.(*os.File)
	buf := make([]byte, 64<<10)
	for {
		if n > 0 {
			ok(t, f.SetReadDeadline(time.Now().Add(500*time.Millisecond)))
		}
		k, err := f.Read(buf)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
		ok(t, err)
		n += int64(k)
	}
	in.Close()
	cmd.Process.Kill()
	cmd.Wait()
	return n
}

// TestResumeServerHangs: a server that does nothing is reported with what to do
// about it, and the resume waits on.
func TestResumeServerHangs(t *testing.T) {
	t.Parallel()
	ctx, l := limit(t), newLab(t)
	c, before, _, tick := saveTwice(t, ctx, l, q35)
	vm := qemutest.Start(t, destination(c, "defer"))
	r := l.resumes(t, "flic-migrate", vm, "--stalled", "1s", "--learn", "500ms", "vm@2")
	r.says(t, `vm@2: running after`)
	server := r.server(t)
	ok(t, syscall.Kill(server, syscall.SIGSTOP))
	said := r.says(t, `no progress for 1s: the server, process (\d+), has sent \d+ of \d+ pages and is stopped \(SIGSTOP\).* has lost nothing.* kill -9 (\d+)`)
	if pid := fmt.Sprint(server); said[1] != pid || said[2] != pid {
		t.Errorf("%q is not about process %s", said[0], pid)
	}
	ok(t, syscall.Kill(server, syscall.SIGCONT))
	r.says(t, `vm@2: the server goes on`)
	if doc, _ := r.outcome(t); doc.ExitCode != 0 || doc.State != "running" {
		t.Errorf("%+v", doc)
	}
	next, err := strconv.ParseInt(vm.WaitFor(t, `tick (\w+)\r`)[1], 16, 64)
	if err != nil || int(next) < tick {
		t.Errorf("tick %d after %d, %v", next, tick, err)
	}
	vm.Kill()

	// One that holds the background back on purpose is no such case.
	vm = qemutest.Start(t, destination(c, "defer"))
	r = l.resumes(t, "flic-migrate", vm, "--stalled", "1s", "--learn", "2s", "vm@1")
	if doc, _ := r.outcome(t); doc.ExitCode != 0 || strings.Contains(r.stderr.String(), "progress") {
		t.Errorf("%+v\n%s", doc, r.stderr.String())
	}
	vm.Kill()

	// As the message says: kill it. Another goes on.
	vm = qemutest.Start(t, destination(c, "defer"))
	r = l.resumes(t, "flic-migrate", vm, "--stalled", "1s", "--learn", "20s", "vm@1")
	r.says(t, `vm@1: paused after`)
	ok(t, syscall.Kill(r.server(t), syscall.SIGSTOP))
	pid, err := strconv.Atoi(r.says(t, `kill -9 (\d+)`)[1])
	ok(t, err)
	ok(t, syscall.Kill(pid, syscall.SIGKILL))
	if doc, _ := r.outcome(t); doc.ExitCode != 0 || doc.State != "paused" {
		t.Errorf("%+v\n%s", doc, r.stderr.String())
	}
	if diff := qemutest.DiffRAM(before, ram(t, ctx, vm)); diff != "" {
		t.Error(diff)
	}
	l.tidy(t)
}

// TestResumeKilled: the guest gets its memory all the same.
func TestResumeKilled(t *testing.T) {
	t.Parallel()
	ctx, l := limit(t), newLab(t)
	c, _, _, _ := saveTwice(t, ctx, l, q35)
	vm := qemutest.Start(t, destination(c, "defer"))
	r := l.resumes(t, "flic-migrate", vm, "--learn", "1s", "vm@2")
	r.says(t, `vm@2: running after`)
	server := r.server(t)
	ok(t, r.cmd.Process.Kill())
	if m, err := migration.Wait(ctx, vm.QMP); err != nil || m.Status != migration.StatusCompleted {
		t.Errorf("%+v, %v", m, err)
	}
	until(t, "the server's end", func() bool { return !alive(server) })
	vm.WaitFor(t, `tick (\w+)\r`)
	runsOn(t, vm)
}

// TestResumeDamage: a guest never sees a page that is damaged in the store. It
// is held, it is said which page it is, and when the file is whole again it
// goes on.
func TestResumeDamage(t *testing.T) {
	t.Parallel()
	ctx, l := limit(t), newLab(t)
	c, before, _, _ := saveTwice(t, ctx, l, q35)
	image := l.image(t, 1)
	info, err := os.Stat(image)
	ok(t, err)
	at := info.Size() / 2 // among the segments
	was := flipBytes(t, image, at)
	vm := qemutest.Start(t, destination(c, "defer"))
	doc := l.fails(t, "flic-migrate", vm, exitCorrupt, []string{"nothing is lost", "--recover", filepath.Base(image), "page pc.ram:0x", "checksum"}, "vm@1")
	t.Log(doc.Error)
	l.fails(t, "flic-migrate", vm, exitCorrupt, []string{"page pc.ram:0x"}, "--recover", "vm@1")
	restoreBytes(t, image, at, was)
	l.resume(t, vm, "--recover", "vm@1")
	if diff := qemutest.DiffRAM(before, ram(t, ctx, vm)); diff != "" {
		t.Error(diff)
	}
	l.tidy(t)
}

// TestRemoveWhileResuming: what clones still load is neither removed nor
// collected.
func TestRemoveWhileResuming(t *testing.T) {
	t.Parallel()
	ctx, l := limit(t), newLab(t)
	c := q35.tiny(t, "64M", varied(8<<20/4096), 10)
	source := qemutest.Start(t, c)
	source.WaitFor(t, `tick 00000003\r`)
	set(t, source, fast)
	before := stop(t, ctx, source)
	saved(t, ctx, source, l.save(l.hot(t, source)...))
	source.Kill()
	var vms []*qemutest.VM
	var clones []*resuming
	for range 3 {
		vm := qemutest.Start(t, destination(c, "defer"))
		r := l.resumes(t, "flic-migrate", vm, "--learn", "2s", "vm@1")
		vms, clones = append(vms, vm), append(clones, r)
	}
	for _, r := range clones {
		r.says(t, `vm@1: paused after`)
	}
	for _, args := range [][]string{{"vm@1"}, {"--all", "vm"}} {
		cmd := exec.Command("flic-migrate", append([]string{"rm", "--wait", "0", "--store", l.store}, args...)...)
		out, err := cmd.CombinedOutput()
		if cmd.ProcessState.ExitCode() != exitFailed || !strings.Contains(string(out), "checkpoint vm@1 was not removed: ") || !strings.Contains(string(out), "in use by another process") {
			t.Errorf("rm %v: %v, %s", args, err, out)
		}
	}
	if freed := l.gc(t); freed.Saves != 0 || freed.Flash != 0 || freed.NVRAM != 0 {
		t.Errorf("gc freed %+v", freed)
	}
	for i, r := range clones {
		if doc, _ := r.outcome(t); doc.ExitCode != 0 {
			t.Errorf("clone %d: %+v\n%s", i, doc, r.stderr.String())
		}
		if diff := qemutest.DiffRAM(before, ram(t, ctx, vms[i])); diff != "" {
			t.Errorf("clone %d: %s", i, diff)
		}
		vms[i].Kill()
	}
	l.run(t, "rm", "vm@1")
	l.nothing(t)
}
