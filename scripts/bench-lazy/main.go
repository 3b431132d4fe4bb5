// Command bench-lazy measures what a lazy restore is for: the time from
// migrate-incoming until the guest runs, and until its own work is done, beside
// an eager exec:cat of the same guest's raw stream. It prints a Markdown table.
//
//	go run ./scripts/bench-lazy [-runs 5] [-sizes 256,512,1024,2048]
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
)

func main() {
	runs := flag.Int("runs", 5, "runs of each kind, in turns")
	sizes := flag.String("sizes", "256,512,1024,2048", "MiB of guest RAM")
	percent := flag.Int("fill", 60, "percent of RAM that the guest fills, and reads as its work")
	flag.Parse()
	if err := run(*runs, *percent, strings.Split(*sizes, ",")); err != nil {
		fmt.Fprintln(os.Stderr, "bench-lazy:", err)
		os.Exit(1)
	}
}

func run(runs, percent int, sizes []string) error {
	root, err := qemutest.ModuleRoot()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "bench-lazy")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	b := &bench{dir: dir, binary: filepath.Join(dir, "flic-migrate"), percent: percent}
	build := exec.Command("go", "build", "-o", b.binary, "./cmd/flic-migrate")
	build.Dir, build.Stderr = root, os.Stderr
	if err := build.Run(); err != nil {
		return err
	}
	fmt.Print("| RAM | eager cat: runs after | lazy: runs after | ratio | eager cat: work done | lazy, first: work done | lazy, learned: work done |\n" +
		"|---:|---:|---:|---:|---:|---:|---:|\n")
	for _, s := range sizes {
		mib, err := strconv.Atoi(s)
		if err != nil {
			return err
		}
		if err := b.size(mib, runs); err != nil {
			return fmt.Errorf("%d MiB: %w", mib, err)
		}
	}
	return nil
}

type bench struct {
	dir, binary string
	percent     int // of RAM that the guest fills and reads
}

// times of one restore, from migrate-incoming on.
type times struct{ running, work time.Duration }

func median(list []times, f func(times) time.Duration) time.Duration {
	var v []time.Duration
	for _, t := range list {
		v = append(v, f(t))
	}
	slices.Sort(v)
	return v[len(v)/2]
}

func ms(d time.Duration) string { return fmt.Sprintf("%.0f ms", float64(d.Microseconds())/1000) }

func (b *bench) size(mib, runs int) error {
	ctx := context.Background()
	// The guest's own work is to read all of its buffer and check it.
	config := qemutest.Config{Guest: qemutest.Linux, Memory: fmt.Sprintf("%dM", mib), Kernel: fmt.Sprintf("flic.fill=%d", mib*b.percent/100)}
	raw, store := filepath.Join(b.dir, "raw"), filepath.Join(b.dir, fmt.Sprintf("store%d", mib))
	if err := b.save(ctx, config, raw, store); err != nil {
		return err
	}
	var cat, first, learned []times
	for range runs {
		t, err := b.restore(ctx, config, false, "exec:exec cat "+raw)
		if err != nil {
			return err
		}
		cat = append(cat, t)
		serve := "exec:exec " + b.binary + " restore --quiet --lazy always --store " + store + " vm"
		// What was learned is in a file beside the checkpoint.
		if err := os.RemoveAll(filepath.Join(store, "vms", "vm", "00000001.touched")); err != nil {
			return err
		}
		for _, list := range []*[]times{&first, &learned} {
			if t, err = b.restore(ctx, config, true, serve); err != nil {
				return err
			}
			*list = append(*list, t)
		}
	}
	running := func(t times) time.Duration { return t.running }
	work := func(t times) time.Duration { return t.work }
	c, l := median(cat, running), median(append(first, learned...), running)
	fmt.Printf("| %d MB | %s | %s | %.3f | %s | %s | %s |\n", mib, ms(c), ms(l), l.Seconds()/c.Seconds(),
		ms(median(cat, work)), ms(median(first, work)), ms(median(learned, work)))
	return nil
}

// save boots a guest and saves it, stopped, both ways.
func (b *bench) save(ctx context.Context, config qemutest.Config, raw, store string) error {
	vm, err := qemutest.Launch(ctx, config)
	if err != nil {
		return err
	}
	defer vm.Kill()
	boot, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	if _, err := vm.Expect(boot, `tick \d+`); err != nil {
		return err
	}
	if err := errors.Join(qmp.Stop(ctx, vm.QMP),
		qmp.SetParameters(ctx, vm.QMP, map[string]any{"max-bandwidth": int64(100 << 30)})); err != nil {
		return err
	}
	if _, err := vm.Save(ctx, "exec:cat > "+raw); err != nil {
		return err
	}
	if err := errors.Join(qmp.Cont(ctx, vm.QMP), qmp.Stop(ctx, vm.QMP)); err != nil {
		return err
	}
	_, err = vm.Save(ctx, "exec:exec "+b.binary+" save --quiet --store "+store+" --vm vm")
	return err
}

func (b *bench) restore(ctx context.Context, config qemutest.Config, lazily bool, uri string) (times, error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	config.Incoming, config.Paused = "defer", true
	vm, err := qemutest.Launch(ctx, config)
	if err != nil {
		return times{}, err
	}
	defer vm.Kill()
	if err := qmp.SetCapabilities(ctx, vm.QMP, map[string]bool{"events": true}); err != nil {
		return times{}, err
	}
	if lazily {
		if err := qmp.SetCapabilities(ctx, vm.QMP, map[string]bool{"postcopy-ram": true}); err != nil {
			return times{}, err
		}
	}
	start := time.Now()
	if err := qmp.MigrateIncoming(ctx, vm.QMP, uri); err != nil {
		return times{}, err
	}
	for {
		s, err := qmp.QueryStatus(ctx, vm.QMP)
		if err != nil {
			return times{}, fmt.Errorf("%w\n%s", err, vm.Output())
		}
		if s.Status != "inmigrate" {
			break
		}
		time.Sleep(time.Millisecond)
	}
	var t times
	t.running = time.Since(start)
	if err := errors.Join(qmp.Cont(ctx, vm.QMP), vm.Send("check")); err != nil {
		return t, err
	}
	answer, err := vm.Expect(ctx, `check (ok|bad) .*`)
	if err != nil {
		return t, err
	}
	if answer[1] != "ok" {
		return t, errors.New(answer[0])
	}
	t.work = time.Since(start)
	_, err = qmp.WaitMigration(ctx, vm.QMP)
	return t, err
}
