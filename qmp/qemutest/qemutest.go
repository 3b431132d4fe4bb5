// Package qemutest runs guests under a real QEMU, for tests and for recording
// streams. Nothing else may import it.
//
// A test starts a [VM] with [Start], which ends it with the test:
//
//	vm := qemutest.Start(t, qemutest.Config{Guest: qemutest.Linux, Kernel: "flic.fill=16"})
//	vm.WaitFor(t, `flic ready`)
//	vm.Send("sum")
//	sum := vm.WaitFor(t, `sum (\w+)`)[1]
//
// What a Linux guest can do is written in scripts/guestinit/main.go, what the
// tiny one does in scripts/tinyguest/x86.s.
//
// QEMU runs with -accel tcg, so that it needs nothing of the host. Mind two
// things about that: a live migration loses dirty pages if the size of a RAM block
// is a multiple of 256 KiB (QEMU 7.2, seen on both architectures), so LiveMemory
// is the size to use for one; and everything is some ten times slower.
package qemutest

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
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
)

// LiveMemory is a memory size for guests that are migrated while they run: large
// enough for the Linux guest, and no multiple of 256 KiB.
const LiveMemory = "98312K"

// Guest is what a VM boots.
type Guest int

const (
	// Firmware boots nothing: the firmware looks for a disk in vain.
	Firmware Guest = iota
	// Tiny is up in a second and says "tick N", N in 8 hexadecimal digits; it
	// needs 4 MiB. Load gives it memory content and Change makes it change that.
	Tiny
	// Linux is a Debian kernel with a first process that keeps known memory and
	// answers on the console; it takes 5–10 s and needs 96 MiB, of which some 30
	// can be filled.
	Linux
	// Debian is Linux with the disk image of a Debian system at /dev/vda, which
	// flic.read=/usr brings into the page cache (x86 only).
	Debian
)

// Config says what to run. The zero value is a q35 machine with 128 MiB and
// nothing to boot.
type Config struct {
	// Suite is the Debian suite whose QEMU runs, such as trixie: scripts/suite makes
	// it, and it sees no files but those below /tmp. If empty, it is the one in PATH.
	Suite string
	// Arch is x86 (the default) or arm64.
	Arch string
	// Machine is the value of -machine, q35 or virt if empty. Machine types with
	// properties are allowed.
	Machine string
	// CPU is the value of -cpu; if empty, QEMU's default, or cortex-a57 on arm64.
	CPU string
	// Memory is the value of -m, 128M if empty.
	Memory string
	// CPUs is the number of virtual CPUs, 1 if zero.
	CPUs int
	// Guest is what boots.
	Guest Guest
	// Kernel is added to the Linux kernel's command line.
	Kernel string
	// Disk is a raw image that the guest sees as /dev/vda, if not empty. It is
	// never written: QEMU keeps what the guest writes in a temporary file.
	Disk string
	// Incoming is the value of -incoming, none if empty. A restore that is meant
	// to fail needs "defer" and migration.Incoming: QEMU exits when a restore
	// fails, and with "exec:..." may do so before the harness is connected.
	Incoming string
	// Paused starts the VM with -S.
	Paused bool
	// Args are added to QEMU's command line.
	Args []string
	// Env is added to QEMU's environment, and so to that of its exec: children.
	Env []string
	// Under is a program, with its arguments, that is given QEMU's path and
	// arguments and becomes it, such as setpriv; none if empty.
	Under []string
}

// VM is a running QEMU.
type VM struct {
	// QMP is a monitor that the harness holds.
	QMP *qmp.Monitor
	// Socket is the path of a second monitor, which nobody holds: the one to
	// give to what is being tested.
	Socket string

	config  Config
	console *console
	cmd     *exec.Cmd
	output  *output
	dir     string
	exited  chan struct{}
	exitErr error // once exited is closed
}

// output collects what QEMU writes to stdout and stderr.
type output struct {
	mu   sync.Mutex
	text []byte
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.text = append(o.text, p...)
	return len(p), nil
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return string(o.text)
}

// Seldom, on a busy host, QEMU's emulation of several CPUs loses what the first says
// to wake the second, and a Linux kernel waits for it for ever before it has written a
// line. Such a guest is started again.
const (
	bootAttempts = 3
	bootTimeout  = time.Minute
)

// speaks waits until a guest whose kernel starts several CPUs has written something.
// It is true of all others at once.
func (vm *VM) speaks(limit time.Duration) bool {
	c := vm.config
	if c.Guest != Linux && c.Guest != Debian || c.CPUs < 2 || c.Paused || c.Incoming != "" {
		return true
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	return vm.console.begun(ctx)
}

// Start launches a VM that ends with the test. A host without QEMU fails the
// test and names the script that installs it.
func Start(t testing.TB, config Config) *VM {
	t.Helper()
	// Not the test's own context: that ends before the cleanups, in which a
	// test may still want its VM.
	vm, err := Launch(context.Background(), config)
	if err != nil {
		t.Fatal(err)
	}
	for left := bootAttempts - 1; left > 0 && !vm.speaks(bootTimeout); left-- {
		registers, err := qmp.HumanMonitor(context.Background(), vm.QMP, "info registers -a")
		t.Logf("the guest's kernel has not come up in %v; once more. Its CPUs:\n%s%v", bootTimeout, registers, err)
		vm.Kill()
		if vm, err = Launch(context.Background(), config); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		vm.Kill()
		if t.Failed() {
			t.Logf("QEMU's output:\n%s\nconsole's end:\n%s", vm.Output(), tail(vm.Console(), 2000))
		}
	})
	return vm
}

// Launch starts a VM that runs until Kill. The context bounds the start only.
func Launch(ctx context.Context, config Config) (*VM, error) {
	args, err := config.args(ctx)
	if err != nil {
		return nil, err
	}
	program, err := lookPath(ctx, config.Suite, config.arch())
	if err != nil {
		return nil, err
	}
	// A Unix socket's path is short of space: not in the test's long TempDir.
	dir, err := os.MkdirTemp("", "qemu")
	if err != nil {
		return nil, err
	}
	vm := &VM{
		Socket: filepath.Join(dir, "qmp"),
		config: config,
		dir:    dir,
		output: new(output),
		exited: make(chan struct{}),
	}
	command := append(append(slices.Clone(config.Under), program), args...)
	command = append(command,
		// Connected from the start: no waiting for a socket to appear.
		"-chardev", "socket,id=harness,fd=3", "-mon", "chardev=harness,mode=control",
		"-chardev", "socket,id=console,fd=4", "-serial", "chardev:console",
		"-qmp", "unix:"+vm.Socket+",server=on,wait=off")
	vm.cmd = exec.Command(command[0], command[1:]...)
	vm.cmd.Stdout, vm.cmd.Stderr = vm.output, vm.output
	vm.cmd.Env = append(os.Environ(), config.Env...)
	vm.cmd.SysProcAttr = &syscall.SysProcAttr{
		Setpgid:   true,            // with its exec: children, for Kill
		Pdeathsig: syscall.SIGKILL, // a test that crashes leaves no QEMU
	}
	// The children of exec: hold QEMU's output open; do not wait for them.
	vm.cmd.WaitDelay = time.Second
	monitor, serial, err := vm.start()
	if err != nil {
		os.RemoveAll(dir)
		return nil, err
	}
	vm.console = newConsole(serial)
	// Busy hosts and large guests: QEMU may take long until it serves its monitor.
	vm.QMP, err = qmp.New(ctx, monitor, "harness monitor", qmp.Options{Greeting: time.Minute, Timeout: 2 * time.Minute})
	if err != nil {
		vm.Kill()
		return nil, fmt.Errorf("start %s: %w\n%s", vm.cmd, err, vm.Output())
	}
	return vm, nil
}

// start runs QEMU with its ends of two socket pairs and returns ours.
func (vm *VM) start() (monitor, serial net.Conn, err error) {
	var theirs [2]*os.File
	var ours [2]net.Conn
	defer func() {
		for i := range ours {
			if theirs[i] != nil {
				theirs[i].Close() // QEMU has its own: ours would hide its end
			}
			if err != nil && ours[i] != nil {
				ours[i].Close()
			}
		}
	}()
	for i := range ours {
		pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return nil, nil, err
		}
		theirs[i] = os.NewFile(uintptr(pair[0]), "qemu")
		f := os.NewFile(uintptr(pair[1]), "harness")
		ours[i], err = net.FileConn(f)
		f.Close()
		if err != nil {
			return nil, nil, err
		}
	}
	vm.cmd.ExtraFiles = theirs[:]
	if err := vm.cmd.Start(); err != nil {
		return nil, nil, err
	}
	go func() {
		vm.exitErr = vm.cmd.Wait()
		if errors.Is(vm.exitErr, exec.ErrWaitDelay) {
			vm.exitErr = nil // QEMU has ended well; a child holds its output open
		}
		close(vm.exited)
	}()
	return ours[0], ours[1], nil
}

func (c Config) arch() string {
	if c.Arch == "" {
		return "x86"
	}
	return c.Arch
}

// args returns QEMU's arguments, all but the sockets'.
func (c Config) args(ctx context.Context) ([]string, error) {
	machine, cpu, tty := or(c.Machine, "q35"), c.CPU, "ttyS0"
	switch c.arch() {
	case "x86":
	case "arm64":
		machine, cpu, tty = or(c.Machine, "virt"), or(c.CPU, "cortex-a57"), "ttyAMA0"
	default:
		return nil, fmt.Errorf("qemutest: no architecture %q", c.Arch)
	}
	args := []string{
		"-accel", "tcg", "-machine", machine, "-m", or(c.Memory, "128M"), "-smp", strconv.Itoa(max(c.CPUs, 1)),
		"-nodefaults", "-no-user-config", "-display", "none", "-nic", "none",
	}
	if cpu != "" {
		args = append(args, "-cpu", cpu)
	}
	if c.Paused {
		args = append(args, "-S")
	}
	if c.Incoming != "" {
		args = append(args, "-incoming", c.Incoming)
	}
	disk := c.Disk
	switch c.Guest {
	case Firmware:
	case Tiny:
		dir, err := Assets(ctx, "tiny-"+c.arch())
		if err != nil {
			return nil, err
		}
		args = append(args, "-kernel", filepath.Join(dir, "kernel"))
	case Linux, Debian:
		dir, err := Assets(ctx, c.arch())
		if err != nil {
			return nil, err
		}
		// no_timer_check: on a busy host the kernel sees too few timer
		// interrupts while it counts them, and panics.
		args = append(args, "-kernel", filepath.Join(dir, "vmlinuz"), "-initrd", filepath.Join(dir, "initrd.gz"),
			"-append", "console="+tty+" quiet no_timer_check "+c.Kernel)
		if c.Guest == Debian && disk == "" {
			if dir, err = Assets(ctx, "debian"); err != nil {
				return nil, err
			}
			disk = filepath.Join(dir, "disk.ext4")
		}
	}
	if disk != "" {
		device := "virtio-blk-pci"
		if strings.HasPrefix(machine, "microvm") {
			device = "virtio-blk-device"
		}
		args = append(args,
			"-drive", "if=none,id=disk,format=raw,snapshot=on,file="+strings.ReplaceAll(disk, ",", ",,"),
			"-device", device+",drive=disk")
	}
	return append(args, c.Args...), nil
}

func or(value, otherwise string) string {
	if value == "" {
		return otherwise
	}
	return value
}

// lookPath returns the path of a suite's QEMU for an architecture.
func lookPath(ctx context.Context, suite, arch string) (string, error) {
	program, group := "qemu-system-x86_64", "qemu"
	if arch == "arm64" {
		program, group = "qemu-system-aarch64", "qemu-aarch64"
	}
	if suite != "" {
		dir, err := script(ctx, "suite", suite)
		return filepath.Join(dir, program), err
	}
	path, err := exec.LookPath(program)
	if err != nil {
		return "", fmt.Errorf("qemutest: %w; run: scripts/deps %s", err, group)
	}
	return path, nil
}

// machineLine is one of -machine help: name, description, and after "alias of" the
// name that it stands for.
var machineLine = regexp.MustCompile(`(?m)^(\S+)\s+\S`)

// Machines returns the machine types that the QEMU in PATH has for an architecture.
func Machines(ctx context.Context, arch string) ([]string, error) {
	program, err := lookPath(ctx, "", arch)
	if err != nil {
		return nil, err
	}
	out, err := exec.CommandContext(ctx, program, "-machine", "help").Output()
	if err != nil {
		return nil, fmt.Errorf("%s -machine help: %w", program, err)
	}
	var names []string
	for _, m := range machineLine.FindAllSubmatch(out, -1) {
		names = append(names, string(m[1]))
	}
	return names, nil
}

// Oldest returns the name of the oldest machine type of a family, such as
// pc-i440fx, that the QEMU in PATH has for x86.
func Oldest(ctx context.Context, family string) (string, error) {
	names, err := Machines(ctx, "x86")
	if err != nil {
		return "", err
	}
	oldest, least := "", [2]int{math.MaxInt, 0}
	for _, name := range names {
		var v [2]int
		if n, _ := fmt.Sscanf(name, family+"-%d.%d", &v[0], &v[1]); n == 2 && slices.Compare(v[:], least[:]) < 0 {
			oldest, least = name, v
		}
	}
	if oldest == "" {
		return "", fmt.Errorf("qemutest: no machine type %s-*", family)
	}
	return oldest, nil
}

// script runs one of the scripts that print a directory, having made what is in it
// if need be.
func script(ctx context.Context, name, argument string) (string, error) {
	root, err := ModuleRoot()
	if err != nil {
		return "", err
	}
	var stderr strings.Builder
	cmd := exec.CommandContext(ctx, filepath.Join(root, "scripts", name), argument)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("qemutest: scripts/%s %s: %w: %s\nWhat it needs is installed by: scripts/deps guest", name, argument, err, stderr.String())
	}
	return strings.TrimSpace(string(out)), nil
}

// Assets returns the directory of what scripts/guest makes of this kind (x86,
// arm64, tiny-x86, tiny-arm64, debian, agent), making it first if need be.
func Assets(ctx context.Context, kind string) (string, error) {
	return script(ctx, "guest", kind)
}

// Build builds flic-migrate as the Makefile does, into a file.
func Build(ctx context.Context, file string) error {
	root, err := ModuleRoot()
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "go", "build", "-o", file, "./cmd/flic-migrate")
	cmd.Dir, cmd.Env = root, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

// ModuleRoot returns the directory of this module's go.mod, from the directory
// the process runs in, which for a test is its package's.
func ModuleRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		if text, err := os.ReadFile(filepath.Join(dir, "go.mod")); err == nil &&
			strings.Contains(string(text), "module github.com/flic-migrate/flic-migrate\n") {
			return dir, nil
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			return "", errors.New("qemutest: not inside the module: scripts/guest cannot be found")
		}
		dir = parent
	}
}

// Load returns the arguments that make QEMU put a file into guest-physical memory
// before the guest starts, and again when it is reset.
func Load(file string, addr uint64) []string {
	return []string{"-device", fmt.Sprintf("loader,force-raw=on,addr=%#x,file=%s", addr, strings.ReplaceAll(file, ",", ",,"))}
}

// Change returns the arguments that make a tiny guest of this architecture change
// perTick pages in each tick, by turns, of the range of pages that begins at the
// given address, counted from the start of RAM.
func Change(arch string, first, pages, perTick uint32) []string {
	at := uint64(0x1ff000) // PARAMS in scripts/tinyguest
	if arch == "arm64" {
		at = 0x401ff000
	}
	var args []string
	for i, word := range []uint32{first, pages, perTick} {
		args = append(args, "-device", fmt.Sprintf("loader,addr=%#x,data=%#x,data-len=4", at+uint64(4*i), word))
	}
	return args
}

// Save stops nothing: it migrates to the uri and waits for the end.
func (vm *VM) Save(ctx context.Context, uri string) (migration.Info, error) {
	if err := migration.Start(ctx, vm.QMP, uri); err != nil {
		return migration.Info{}, err
	}
	return migration.Wait(ctx, vm.QMP)
}

// Pid returns QEMU's process id.
func (vm *VM) Pid() int { return vm.cmd.Process.Pid }

// Output returns what QEMU and its exec: children have written to stdout and
// stderr.
func (vm *VM) Output() string { return vm.output.String() }

// Exited is closed when QEMU has ended; ExitError then says how.
func (vm *VM) Exited() <-chan struct{} { return vm.exited }

// ExitError waits for QEMU's end and returns its exit error, an *exec.ExitError
// or nil for status 0.
func (vm *VM) ExitError() error {
	<-vm.exited
	return vm.exitErr
}

// Quit ends QEMU in an orderly way, for a test that wants its exit status.
func (vm *VM) Quit(ctx context.Context) error {
	if err := qmp.Quit(ctx, vm.QMP); err != nil {
		return err
	}
	select {
	case <-vm.exited:
		return vm.exitErr
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Kill ends QEMU and its exec: children at once, as a power failure would, and
// removes its files. It may be called again.
func (vm *VM) Kill() {
	// The group outlives QEMU while a child of exec: does.
	_ = syscall.Kill(-vm.cmd.Process.Pid, syscall.SIGKILL)
	<-vm.exited
	if vm.QMP != nil {
		vm.QMP.Close()
	}
	vm.console.close()
	os.RemoveAll(vm.dir)
}

// tail returns the last n bytes of s.
func tail(s string, n int) string { return s[max(0, len(s)-n):] }
