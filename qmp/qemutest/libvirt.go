package qemutest

import (
	"bytes"
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Libvirt is a system libvirtd of its own, beside which the machine's own may
// run: it has its own mounts, process ids and network, and its /etc/libvirt,
// /var/lib/libvirt, /var/log/libvirt, /var/cache/libvirt and /run are below Dir,
// under the same names. All of it, its domains included, ends with the test.
//
// Domains run as root, without a security driver and without cgroups.
type Libvirt struct {
	Dir string // also holds bin, with the programs that libvirtd finds

	cmd    *exec.Cmd
	exited chan struct{}
	output *output
}

// LibvirtConfig says how a libvirtd runs.
type LibvirtConfig struct {
	QEMU string   // lines for qemu.conf
	Path []string // directories before its own in PATH, relative to Dir
	Env  []string // added to its environment
	// Full is the size of a small file system at Dir/full, such as "2m".
	Full string
}

// libvirtPrograms are what libvirtd finds in its PATH if the host has it. It looks
// for a QEMU of each architecture and asks each it finds for what it can do, for a
// second and more: so it sees only one.
var libvirtPrograms = []string{"qemu-system-x86_64", "qemu-img", "lzop", "gzip", "bzip2", "xz", "zstd"}

// libvirtInit is the first process of the namespaces. It must wait for orphans:
// libvirtd waits for the QEMUs that it has asked and killed to disappear. A
// libvirtd that ends is started again.
const libvirtInit = `
set -e
mount --make-rprivate /
for d in etc/libvirt var/lib/libvirt var/log/libvirt var/cache/libvirt run; do
	mount --bind "$DIR/$d" "/$d"
done
mount -t proc proc /proc
mount -t sysfs sys /sys
[ -z "$FULL" ] || mount -t tmpfs -o size="$FULL" tmpfs "$DIR/full"
PATH=$LIBVIRT_PATH
export PATH
cd /
while :; do
	"$LIBVIRTD" &
	wait $! || :
	"$SLEEP" 0.1
done
`

// StartLibvirt starts a libvirtd that ends with the test. It needs root.
func StartLibvirt(t testing.TB, config LibvirtConfig) *Libvirt {
	t.Helper()
	l, err := LaunchLibvirt(config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		l.Kill()
		if t.Failed() {
			t.Logf("libvirtd's log:\n%s", tail(l.Log(), 6000))
		}
	})
	return l
}

// LaunchLibvirt starts a libvirtd that runs until Kill.
func LaunchLibvirt(config LibvirtConfig) (_ *Libvirt, err error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("qemutest: a libvirtd in namespaces of its own needs root")
	}
	libvirtd, err := exec.LookPath("libvirtd")
	if err == nil {
		_, err = exec.LookPath("virsh")
	}
	if err != nil {
		return nil, fmt.Errorf("qemutest: %w; run: scripts/deps libvirt", err)
	}
	sleep, err := exec.LookPath("sleep")
	if err != nil {
		return nil, err
	}
	// libvirt's sockets need short names, and QEMU has none of the test's rights
	// to its TempDir.
	dir, err := os.MkdirTemp("", "virt")
	if err != nil {
		return nil, err
	}
	l := &Libvirt{Dir: dir, output: new(output), exited: make(chan struct{})}
	defer func() {
		if err != nil {
			os.RemoveAll(dir)
		}
	}()
	for _, d := range []string{"etc/libvirt", "var/lib/libvirt", "var/log/libvirt", "var/cache/libvirt", "run", "bin", "full"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return nil, err
		}
	}
	for _, d := range []string{"etc/libvirt", "var/lib/libvirt", "var/log/libvirt", "var/cache/libvirt"} {
		if err := os.MkdirAll("/"+d, 0o755); err != nil { // to mount upon
			return nil, err
		}
	}
	for _, name := range libvirtPrograms {
		if path, err := exec.LookPath(name); err == nil {
			if err := os.Symlink(path, filepath.Join(dir, "bin", name)); err != nil {
				return nil, err
			}
		}
	}
	for name, text := range map[string]string{
		"libvirtd.conf": "auth_unix_rw = \"none\"\nlog_level = 3\n",
		"qemu.conf": "user = \"root\"\ngroup = \"root\"\nsecurity_driver = \"none\"\ncgroup_controllers = []\n" +
			"namespaces = []\nstdio_handler = \"file\"\n" + config.QEMU,
	} {
		if err := os.WriteFile(filepath.Join(dir, "etc/libvirt", name), []byte(text), 0o644); err != nil {
			return nil, err
		}
	}
	var path []string
	for _, p := range config.Path {
		path = append(path, filepath.Join(dir, p))
	}
	path = append(path, filepath.Join(dir, "bin"), "/usr/sbin", "/sbin")
	l.cmd = exec.Command("/bin/sh", "-c", libvirtInit)
	l.cmd.Env = append(os.Environ(), "DIR="+dir, "FULL="+config.Full, "LIBVIRTD="+libvirtd, "SLEEP="+sleep,
		"LIBVIRT_PATH="+strings.Join(path, ":"))
	l.cmd.Env = append(l.cmd.Env, config.Env...)
	l.cmd.Stdout, l.cmd.Stderr = l.output, l.output
	l.cmd.WaitDelay = time.Second
	l.cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWNET | syscall.CLONE_NEWIPC,
		Setpgid:    true,
		Pdeathsig:  syscall.SIGKILL, // and with the first process go all others
	}
	if err := l.cmd.Start(); err != nil {
		return nil, err
	}
	go func() { l.cmd.Wait(); close(l.exited) }()
	if err := l.await(time.Minute); err != nil {
		l.Kill()
		return nil, fmt.Errorf("qemutest: libvirtd does not answer: %w\n%s", err, l.Log())
	}
	return l, nil
}

// await waits until libvirtd answers.
func (l *Libvirt) await(limit time.Duration) error {
	for end := time.Now().Add(limit); ; time.Sleep(20 * time.Millisecond) {
		_, err := os.Stat(filepath.Join(l.Dir, "run/libvirt/libvirt-sock"))
		if err == nil {
			if _, err = l.Virsh("version"); err == nil {
				return nil
			}
		}
		select {
		case <-l.exited:
			return errors.New("it has ended")
		default:
		}
		if time.Now().After(end) {
			return err
		}
	}
}

// Virsh runs a virsh command and returns what it prints, to either output.
func (l *Libvirt) Virsh(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "virsh", append([]string{"-q", "-c",
		"qemu+unix:///system?socket=" + filepath.Join(l.Dir, "run/libvirt/libvirt-sock")}, args...)...)
	out, err := cmd.CombinedOutput()
	text := strings.TrimSpace(string(out))
	if err != nil {
		err = fmt.Errorf("virsh %s: %w: %s", strings.Join(args, " "), err, text)
	}
	return text, err
}

// Do is Virsh for tests, for a command that must succeed.
func (l *Libvirt) Do(t testing.TB, args ...string) string {
	t.Helper()
	out, err := l.Virsh(args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// Restart is RestartDaemon for tests.
func (l *Libvirt) Restart(t testing.TB) {
	t.Helper()
	if err := l.RestartDaemon(); err != nil {
		t.Fatal(err)
	}
}

// RestartDaemon ends libvirtd, whose domains run on, and waits until the next one
// has found them.
func (l *Libvirt) RestartDaemon() error {
	pid := filepath.Join(l.Dir, "run/libvirtd.pid")
	if err := os.Remove(pid); err != nil {
		return err
	}
	for _, p := range l.Processes("libvirtd") {
		if err := syscall.Kill(p, syscall.SIGTERM); err != nil {
			return err
		}
	}
	for end := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		if _, err := os.Stat(pid); err == nil {
			break
		}
		if time.Now().After(end) {
			return errors.New("libvirtd does not come back")
		}
	}
	if err := l.await(time.Minute); err != nil {
		return err
	}
	// It ends a domain if it is ended itself before it has found that again.
	names, err := l.Virsh("list", "--name")
	if err != nil {
		return err
	}
	for _, name := range strings.Split(names, "\n") {
		if name == "" {
			continue
		}
		if _, err := l.Virsh("qemu-monitor-command", name, "--hmp", "info status"); err != nil {
			return err
		}
	}
	return nil
}

// Processes are the ids, outside, of the processes of this libvirtd whose
// program has this name.
func (l *Libvirt) Processes(name string) (pids []int) {
	ours, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid_for_children", l.cmd.Process.Pid))
	if err != nil {
		return nil
	}
	links, _ := filepath.Glob("/proc/[0-9]*/ns/pid")
	for _, link := range links {
		if ns, err := os.Readlink(link); err != nil || ns != ours {
			continue
		}
		var pid int
		fmt.Sscanf(link, "/proc/%d/", &pid)
		args, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		program, _, _ := bytes.Cut(args, []byte{0})
		if err == nil && filepath.Base(string(program)) == name {
			pids = append(pids, pid)
		}
	}
	return pids
}

// Log is what libvirtd has logged.
func (l *Libvirt) Log() string { return l.output.String() }

// Kill ends libvirtd and all its domains, and removes its files. It may be called
// again.
func (l *Libvirt) Kill() {
	l.cmd.Process.Kill()
	<-l.exited
	os.RemoveAll(l.Dir)
}

// Domain is a domain of a Libvirt.
type Domain struct {
	Name string
	// Guest is Tiny, Linux or Debian.
	Guest  Guest
	Memory string // in KiB
	Kernel string // added to the Linux kernel's command line
	// Disk is a qcow2 image that the guest has for /dev/vda, and writes to, if not empty.
	// A Debian guest has a layer of its own on its system.
	Disk string
	// Agent gives the domain the port of the guest's agent, which libvirt then asks.
	Agent bool
	Args  []string
}

// Define makes libvirt know a domain.
func (l *Libvirt) Define(ctx context.Context, d Domain) error {
	text, err := l.xml(ctx, d)
	if err != nil {
		return err
	}
	name := filepath.Join(l.Dir, d.Name+".xml")
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		return err
	}
	_, err = l.Virsh("define", name)
	return err
}

func (l *Libvirt) xml(ctx context.Context, d Domain) (string, error) {
	var boot, disk, extra strings.Builder
	kind := "x86"
	if d.Guest == Tiny {
		kind = "tiny-x86"
	}
	dir, err := Assets(ctx, kind)
	if err != nil {
		return "", err
	}
	if d.Guest == Tiny {
		fmt.Fprintf(&boot, "<kernel>%s/kernel</kernel>", dir)
	} else {
		fmt.Fprintf(&boot, "<kernel>%s/vmlinuz</kernel><initrd>%s/initrd.gz</initrd><cmdline>console=ttyS0 quiet %s</cmdline>", dir, dir, d.Kernel)
	}
	if d.Guest == Debian {
		if dir, err = Assets(ctx, "debian"); err != nil {
			return "", err
		}
		// Its own layer: libvirt's transient disks can't be saved.
		layer := filepath.Join(l.Dir, d.Name+".qcow2")
		d.Disk = layer
		out, err := exec.CommandContext(ctx, "qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", filepath.Join(dir, "disk.ext4"), layer).CombinedOutput()
		if err != nil {
			return "", fmt.Errorf("qemu-img: %w: %s", err, out)
		}
	}
	if d.Disk != "" {
		fmt.Fprintf(&disk, "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='%s'/><target dev='vda' bus='virtio'/></disk>", d.Disk)
	}
	if d.Agent {
		disk.WriteString("<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>")
	}
	if len(d.Args) > 0 {
		extra.WriteString("<qemu:commandline>")
		for _, a := range d.Args {
			extra.WriteString("<qemu:arg value='")
			xml.EscapeText(&extra, []byte(a))
			extra.WriteString("'/>")
		}
		extra.WriteString("</qemu:commandline>")
	}
	if _, err := lookPath(context.Background(), "", "x86"); err != nil {
		return "", err
	}
	// The one that libvirtd has asked already.
	program := filepath.Join(l.Dir, "bin/qemu-system-x86_64")
	return fmt.Sprintf(`<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
<name>%s</name><memory unit='KiB'>%s</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='q35'>hvm</type>%s</os>
<features><acpi/></features>
<devices><emulator>%s</emulator><controller type='usb' model='none'/><memballoon model='none'/>%s
<serial type='unix'><source mode='bind' path='%s'/></serial></devices>%s
</domain>
`, d.Name, d.Memory, boot.String(), program, disk.String(), l.socket(d.Name), extra.String()), nil
}

func (l *Libvirt) socket(domain string) string { return filepath.Join(l.Dir, domain+".tty") }

// Attach connects with a running domain's serial port, which the returned VM
// stands for: its console is all it has. A domain that has been restored has a
// new one.
func (l *Libvirt) Attach(t testing.TB, domain string) *VM {
	t.Helper()
	conn, err := net.Dial("unix", l.socket(domain))
	if err != nil {
		t.Fatal(err)
	}
	vm := &VM{console: newConsole(conn), output: new(output)}
	t.Cleanup(vm.console.close)
	return vm
}

// ExpectReady waits until a Linux guest has booted.
func (l *Libvirt) ExpectReady(ctx context.Context, domain string) error {
	conn, err := net.Dial("unix", l.socket(domain))
	if err != nil {
		return err
	}
	c := newConsole(conn)
	defer c.close()
	ctx, cancel := context.WithTimeout(ctx, ConsoleTimeout)
	defer cancel()
	_, err = c.expect(ctx, "flic ready")
	return err
}

// DomainRAM returns the guest-physical memory of a paused domain, from 1 MiB on:
// below it are video memory and ROMs.
func (l *Libvirt) DomainRAM(domain string, size int) ([]byte, error) {
	name := filepath.Join(l.Dir, domain+".ram")
	defer os.Remove(name)
	_, err := l.Virsh("qemu-monitor-command", domain, "--hmp", fmt.Sprintf("pmemsave %#x %#x \"%s\"", 1<<20, size-1<<20, name))
	if err != nil {
		return nil, err
	}
	b, err := os.ReadFile(name)
	if err == nil && len(b) != size-1<<20 {
		err = fmt.Errorf("%d bytes of %s's memory", len(b), domain)
	}
	return b, err
}
