// Command demo shows on a real guest what flic-migrate does: it boots Linux
// under QEMU, saves it through exec:, ends that QEMU, restores into a new one,
// and proves that the guest went on and that its RAM is the same. Then it does
// the saving and restoring with cat, lz4 and zstd as well, for comparison.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
)

func main() {
	memory := flag.String("memory", "512M", "the guest's RAM")
	fill := flag.Int("fill", 200, "MiB of it that the guest fills with data")
	flag.Parse()
	if err := run(context.Background(), *memory, *fill); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

type demo struct {
	ctx    context.Context
	dir    string
	binary string
	config qemutest.Config
}

func run(ctx context.Context, memory string, fill int) error {
	root, err := qemutest.ModuleRoot()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "flic-demo")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	d := &demo{ctx: ctx, dir: dir, binary: filepath.Join(root, "bin", "flic-migrate")}
	d.config = qemutest.Config{Guest: qemutest.Linux, Memory: memory, Kernel: fmt.Sprintf("flic.fill=%d flic.bytes=64", fill)}

	step("Booting a Linux guest with %s of RAM, %d MiB of it filled with data", memory, fill)
	vm, err := d.launch(false)
	if err != nil {
		return err
	}
	defer func() { vm.Kill() }()
	if _, err := d.expect(vm, `flic ready`); err != nil {
		return err
	}
	tick, err := d.expect(vm, `tick (\d+)`)
	if err != nil {
		return err
	}
	if err := qmp.Stop(ctx, vm.QMP); err != nil {
		return err
	}
	before, err := vm.RAM(ctx)
	if err != nil {
		return err
	}

	step("Saving it, at its tick %s, with: migrate \"exec:flic-migrate save --store %s --vm demo\"", tick[1], d.path("store"))
	save := d.binary + " save --store " + d.path("store") + " --vm demo"
	restore := "exec " + d.binary + " restore --quiet --store " + d.path("store") + " demo"
	ours := result{name: "flic-migrate"}
	if ours.save, err = d.save(vm, "exec "+save); err != nil {
		return err
	}
	for line := range strings.Lines(vm.Output()) {
		fmt.Print("    ", line)
	}
	if err := d.show("list", "--store", d.path("store")); err != nil {
		return err
	}
	if err := d.show("verify", "--store", d.path("store"), "demo"); err != nil {
		return err
	}

	step("Ending that QEMU and restoring into a new one")
	if err := vm.Quit(ctx); err != nil {
		return err
	}
	if vm, ours.restore, err = d.restore(restore); err != nil {
		return err
	}
	after, err := vm.RAM(ctx)
	if err != nil {
		return err
	}
	if diff := qemutest.DiffRAM(before, after); diff != "" {
		return errors.New("RAM differs: " + diff)
	}
	var size int
	for _, b := range after {
		size += len(b)
	}
	fmt.Printf("    all %d bytes of RAM are equal\n", size)
	if err := qmp.Cont(ctx, vm.QMP); err != nil {
		return err
	}
	next, err := d.expect(vm, `tick (\d+)`)
	if err != nil {
		return err
	}
	if a, b := number(tick[1]), number(next[1]); b <= a || b > a+100 {
		return fmt.Errorf("the guest's counter was %d and is %d now", a, b)
	}
	if err := vm.Send("check"); err != nil {
		return err
	}
	check, err := d.expect(vm, `check (ok|bad) \d+.*`)
	if err != nil {
		return err
	}
	if check[1] != "ok" {
		return errors.New("the guest finds its memory damaged: " + check[0])
	}
	fmt.Printf("    the guest goes on: tick %s; it has compared its own memory with its checksums: %s\n", next[1], check[0])

	step("The same guest with what else is piped into exec: (single runs; `make bench` measures properly)")
	if err := qmp.Stop(ctx, vm.QMP); err != nil {
		return err
	}
	results, err := d.others(vm)
	if err != nil {
		return err
	}
	if ours.bytes, err = treeSize(d.path("store")); err != nil {
		return err
	}
	fmt.Printf("\n    %-14s %9s %9s %12s\n", "", "save s", "restore s", "MB on disk")
	for _, r := range append([]result{ours}, results...) {
		fmt.Printf("    %-14s %9.2f %9.2f %12.1f\n", r.name, r.save.Seconds(), r.restore.Seconds(), float64(r.bytes)/1e6)
	}
	return nil
}

func step(format string, args ...any) { fmt.Printf("\n* "+format+"\n", args...) }

func number(s string) int {
	n, _ := strconv.Atoi(s)
	return n
}

func (d *demo) path(name string) string { return filepath.Join(d.dir, name) }

type result struct {
	name          string
	save, restore time.Duration
	bytes         int64
}

// others saves and restores with the usual filters.
func (d *demo) others(vm *qemutest.VM) ([]result, error) {
	var list []result
	for _, t := range [][2]string{{"cat", "cat"}, {"lz4 -c", "lz4 -dc"}, {"zstd -qc", "zstd -qdc"}} {
		r := result{name: "exec:" + strings.Fields(t[0])[0]}
		file := d.path(strings.Fields(t[0])[0])
		var err error
		if r.save, err = d.save(vm, t[0]+" > "+file+" && sync "+file); err != nil {
			return nil, err
		}
		if err := errors.Join(qmp.Cont(d.ctx, vm.QMP), qmp.Stop(d.ctx, vm.QMP)); err != nil {
			return nil, err
		}
		second, took, err := d.restore("exec " + t[1] + " < " + file)
		if err != nil {
			return nil, err
		}
		second.Kill()
		r.restore = took
		if r.bytes, err = treeSize(file); err != nil {
			return nil, err
		}
		list = append(list, r)
	}
	return list, nil
}

func (d *demo) launch(incoming bool) (*qemutest.VM, error) {
	config := d.config
	if incoming {
		config.Incoming, config.Paused = "defer", true
	}
	return qemutest.Launch(d.ctx, config)
}

func (d *demo) expect(vm *qemutest.VM, pattern string) ([]string, error) {
	ctx, cancel := context.WithTimeout(d.ctx, 3*time.Minute)
	defer cancel()
	return vm.Expect(ctx, pattern)
}

func (d *demo) save(vm *qemutest.VM, command string) (time.Duration, error) {
	if err := migration.SetParameters(d.ctx, vm.QMP, map[string]any{"max-bandwidth": int64(100 << 30)}); err != nil {
		return 0, err
	}
	start := time.Now()
	_, err := vm.Save(d.ctx, "exec:"+command)
	return time.Since(start), err
}

func (d *demo) restore(command string) (*qemutest.VM, time.Duration, error) {
	vm, err := d.launch(true)
	if err != nil {
		return nil, 0, err
	}
	start := time.Now()
	err = migration.Incoming(d.ctx, vm.QMP, "exec:"+command)
	if err == nil {
		_, err = migration.Wait(d.ctx, vm.QMP)
	}
	if err != nil {
		vm.Kill()
		return nil, 0, fmt.Errorf("%w\n%s", err, vm.Output())
	}
	return vm, time.Since(start), nil
}

// show runs flic-migrate and prints what it says.
func (d *demo) show(args ...string) error {
	out, err := exec.CommandContext(d.ctx, d.binary, args...).CombinedOutput()
	for line := range strings.Lines(string(out)) {
		fmt.Print("    ", line)
	}
	return err
}

func treeSize(path string) (n int64, err error) {
	err = filepath.Walk(path, func(_ string, info os.FileInfo, err error) error {
		if err == nil && info.Mode().IsRegular() {
			n += info.Size()
		}
		return err
	})
	return n, err
}
