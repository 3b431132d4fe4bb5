package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
	"github.com/flic-migrate/flic-migrate/scripts/measure"
)

// Each step ends by itself, also on a host that is busy.
const stepLimit = 3 * time.Minute

// lab is where the story happens: a directory that the commands run in, and QEMUs.
type lab struct {
	options
	dir      string
	volatile bool // dir is in memory
	vms      []*qemutest.VM
	chapters int

	web1, back    *qemutest.VM
	clones        [2]*qemutest.VM
	before, after int      // what web1 counted just before and after the first checkpoint
	frozen        []string // the disks that belong to the checkpoints
}

func newLab(o options) (*lab, error) {
	dir, err := os.MkdirTemp("", "flic-demo")
	if err != nil {
		return nil, err
	}
	d := &lab{options: o, dir: dir}
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return nil, errors.Join(err, os.Remove(dir))
	}
	d.volatile = fs.Type == unix.TMPFS_MAGIC
	return d, nil
}

// clear ends the QEMUs and removes what there is.
func (d *lab) clear() error {
	for _, vm := range d.vms {
		vm.Kill()
	}
	// A server whose QEMU has gone still puts down what it has learned.
	var err error
	for range 50 {
		if err = os.RemoveAll(d.dir); err == nil {
			return nil
		}
		time.Sleep(100 * time.Millisecond)
	}
	return err
}

func (d *lab) path(name string) string { return filepath.Join(d.dir, name) }

// The screen: 80 columns, two of them for what was measured.

func (d *lab) say(format string, args ...any) { fmt.Fprintf(d.out, format+"\n", args...) }

func (d *lab) chapter(title string) {
	d.chapters++
	d.say("%d %s", d.chapters, title)
}

func (d *lab) command(line string) { d.say("$ %s", line) }

func (d *lab) figure(ours, today string) { d.say("    %-42s│ %s", ours, today) }

func seconds(t time.Duration) string      { return fmt.Sprintf("%.2f s", t.Seconds()) }
func milliseconds(t time.Duration) string { return fmt.Sprintf("%d ms", t.Milliseconds()) }
func megabytes(n int64) string            { return fmt.Sprintf("%.1f MB", float64(n)/1e6) }

// settings are the variables of all commands here. A minute of watching the guest would be
// more than this is worth, and /tmp is in memory on some systems.
func (d *lab) settings() string {
	s := "FLIC_STORE=vms FLIC_NVRAM=nvram FLIC_NVRAM_SIZE=64M FLIC_TIMER=2s"
	if d.volatile {
		s = "FLIC_VOLATILE_NVRAM=1 " + s[:strings.LastIndex(s, " ")]
	}
	return s
}

// program is flic-migrate with these settings and no others. It is asked to end, and not
// killed, when the context ends.
func (d *lab) program(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, d.binary, args...)
	cmd.Dir = d.dir
	for _, v := range os.Environ() {
		if !strings.HasPrefix(v, "FLIC_") {
			cmd.Env = append(cmd.Env, v)
		}
	}
	cmd.Env = append(cmd.Env, "FLIC_CONFIG=/dev/null", "FLIC_TIMER=2s")
	cmd.Env = append(cmd.Env, strings.Fields(d.settings())...)
	// An interrupt from the keyboard reaches this program, which then does that.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 20 * time.Second
	return cmd
}

// makeDisk makes a disk with a shell and 48 MiB of what a system has besides.
func (d *lab) makeDisk(ctx context.Context, name string) error {
	root := d.path("root")
	for _, dir := range []string{"bin", "tmp", "proc", "dev"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			return err
		}
	}
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		return fmt.Errorf("%w; run: scripts/deps guest", err)
	}
	program, err := os.ReadFile(busybox)
	if err == nil {
		err = os.WriteFile(filepath.Join(root, "bin/busybox"), program, 0o755)
	}
	for _, name := range []string{"sh", "mount", "sync", "cat"} {
		err = errors.Join(err, os.Symlink("busybox", filepath.Join(root, "bin", name)))
	}
	if err = errors.Join(err, os.WriteFile(filepath.Join(root, "system"), noise(48<<20), 0o644)); err != nil {
		return err
	}
	raw := d.path("raw")
	defer os.Remove(raw)
	defer os.RemoveAll(root)
	// Debian has it in /sbin, where not everybody looks.
	mkfs := exec.CommandContext(ctx, "mkfs.ext4", "-q", "-d", root, raw, "96M")
	mkfs.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
	if path, err := exec.LookPath("/sbin/mkfs.ext4"); err == nil {
		mkfs.Path, mkfs.Err = path, nil
	}
	if out, err := mkfs.CombinedOutput(); err != nil {
		return fmt.Errorf("mkfs.ext4: %w: %s", err, out)
	}
	return d.img(ctx, "convert", "-f", "raw", "-O", "qcow2", raw, d.path(name))
}

// noise is what can't be compressed.
func noise(n int) []byte {
	b := make([]byte, 0, n+sha256.Size)
	for i := uint64(0); len(b) < n; i++ {
		sum := sha256.Sum256(binary.LittleEndian.AppendUint64(nil, i))
		b = append(b, sum[:]...)
	}
	return b[:n]
}

func (d *lab) img(ctx context.Context, args ...string) error {
	if out, err := exec.CommandContext(ctx, "qemu-img", args...).CombinedOutput(); err != nil {
		return fmt.Errorf("qemu-img %s: %w: %s", args[0], err, out)
	}
	return nil
}

// occupied is what a file takes on its file system, bytes.
func occupied(name string) (int64, error) {
	var st unix.Stat_t
	err := unix.Stat(name, &st)
	return st.Blocks * 512, err
}

// launch starts a QEMU whose second monitor is NAME.qmp, and which waits for a checkpoint or
// boots the guest.
func (d *lab) launch(ctx context.Context, name, disk string, waits bool) (*qemutest.VM, error) {
	// 8 KiB more: see the package qemutest on multiples of 256 KiB.
	c := qemutest.Config{Guest: qemutest.Linux, Memory: fmt.Sprintf("%dK", d.memory<<10+8), Kernel: fmt.Sprintf("flic.fill=%d", d.fill)}
	c.Args = []string{"-drive", "if=none,id=disk,format=qcow2,file=" + d.path(disk), "-device", "virtio-blk-pci,drive=disk"}
	if waits {
		c.Incoming, c.Paused = "defer", true
	}
	vm, err := qemutest.Launch(ctx, c)
	if err != nil {
		return nil, err
	}
	d.vms = append(d.vms, vm)
	return vm, os.Symlink(vm.Socket, d.path(name+".qmp"))
}

// waiting starts a QEMU that waits for a checkpoint, with an overlay on a disk.
func (d *lab) waiting(ctx context.Context, name, frozen string) (*qemutest.VM, error) {
	if err := d.img(ctx, "create", "-q", "-f", "qcow2", "-b", frozen, "-F", "qcow2", d.path(name+".qcow2")); err != nil {
		return nil, err
	}
	return d.launch(ctx, name, name+".qcow2", true)
}

// report is what is used of checkpoint's.
type report struct {
	Downtime int64 `json:"downtime_ns"`
	Save     struct {
		NVRAMBytes int64 `json:"nvram_bytes"`
		FlashBytes int64 `json:"flash_bytes"`
		Seconds    struct{ Total float64 }
	}
	Snapshots []struct{ Frozen string }
}

// checkpoint saves web1.
func (d *lab) checkpoint(ctx context.Context, flags ...string) (rep report, err error) {
	line := append(append([]string{"checkpoint", "--qmp", "web1.qmp"}, flags...), "web1")
	d.command("flic-migrate " + strings.Join(line, " "))
	ctx, cancel := context.WithTimeout(ctx, stepLimit)
	defer cancel()
	cmd := d.program(ctx, append(line, "--json", "--quiet")...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return rep, fmt.Errorf("flic-migrate checkpoint: %w: %s", err, &stderr)
	}
	if err := json.Unmarshal(out, &rep); err != nil {
		return rep, fmt.Errorf("flic-migrate checkpoint: %w", err)
	}
	if len(rep.Snapshots) != 1 {
		return rep, fmt.Errorf("flic-migrate checkpoint: the disk was not frozen: %s", out)
	}
	return rep, nil
}

// resumed starts a QEMU and resumes a checkpoint into it.
func (d *lab) resumed(ctx context.Context, name, frozen, ref string, flags ...string) (*qemutest.VM, time.Duration, error) {
	vm, err := d.waiting(ctx, name, frozen)
	if err != nil {
		return nil, 0, err
	}
	took, err := d.resume(ctx, vm, name, ref, flags...)
	return vm, took, err
}

// resume resumes a checkpoint and waits until all memory is there. It returns how long it took
// from the command's start until the guest might run.
func (d *lab) resume(ctx context.Context, vm *qemutest.VM, name, ref string, flags ...string) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, stepLimit)
	defer cancel()
	cmd := d.program(ctx, append(append([]string{"resume", "--quiet", "--qmp", name + ".qmp"}, flags...), ref)...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	start := time.Now()
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	done := make(chan error, 1)
	go func() {
		err := cmd.Wait()
		if err != nil {
			cancel() // that QEMU would wait for ever
		}
		done <- err
	}()
	err := measure.UntilRunning(ctx, vm)
	took := time.Since(start)
	if err != nil {
		cancel()
	}
	if ended := <-done; ended != nil {
		return 0, fmt.Errorf("flic-migrate resume into %s: %w: %s", name, errors.Join(ended, err), &out)
	}
	return took, err
}

// saveLZ4 saves web1 as people do, into a file, and lets it run on. It returns for how long
// the guest stood still, and the file's size.
func (d *lab) saveLZ4(ctx context.Context) (time.Duration, int64, error) {
	ctx, cancel := context.WithTimeout(ctx, stepLimit)
	defer cancel()
	if err := migration.SetParameters(ctx, d.web1.QMP, map[string]any{"max-bandwidth": int64(100 << 30)}); err != nil {
		return 0, 0, err
	}
	file := d.path("web1.lz4")
	start := time.Now()
	err := qmp.Stop(ctx, d.web1.QMP)
	if err == nil {
		_, err = d.web1.Save(ctx, "exec:lz4 -c > "+file+" && sync "+file)
	}
	if err == nil {
		err = qmp.Cont(ctx, d.web1.QMP)
	}
	took := time.Since(start)
	if err != nil {
		return 0, 0, fmt.Errorf("exec:lz4: %w: %s", err, d.web1.Output())
	}
	fi, err := os.Stat(file)
	if err != nil {
		return 0, 0, err
	}
	return took, fi.Size(), nil
}

// restoreLZ4 restores that file and returns how long it took until the guest might run.
func (d *lab) restoreLZ4(ctx context.Context) (time.Duration, error) {
	vm, err := d.waiting(ctx, "lz4", d.frozen[0])
	if err != nil {
		return 0, err
	}
	defer vm.Kill()
	ctx, cancel := context.WithTimeout(ctx, stepLimit)
	defer cancel()
	start := time.Now()
	if err := migration.Incoming(ctx, vm.QMP, "exec:lz4 -dc < "+d.path("web1.lz4")); err != nil {
		return 0, fmt.Errorf("exec:lz4 -dc: %w: %s", err, vm.Output())
	}
	err = measure.UntilRunning(ctx, vm)
	return time.Since(start), err
}

// lastTick is what web1 has counted to.
func (d *lab) lastTick() (int, error) {
	all := regexp.MustCompile(`tick (\d+)\r`).FindAllStringSubmatch(d.web1.Console(), -1)
	if len(all) == 0 {
		return 0, errors.New("web1 has not begun to count")
	}
	return strconv.Atoi(all[len(all)-1][1])
}

func expect(ctx context.Context, vm *qemutest.VM, pattern string) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, stepLimit)
	defer cancel()
	return vm.Expect(ctx, pattern)
}

// ask sends a guest a line and waits for what it says to it.
func ask(ctx context.Context, vm *qemutest.VM, line, answer string) ([]string, error) {
	if err := vm.Send(line); err != nil {
		return nil, err
	}
	return expect(ctx, vm, answer)
}
