// Command bench-lazy measures lazy restores beside eager ones and prints
// Markdown tables (docs/lab/lazy.md has those of one machine).
//
//	go run ./scripts/bench-lazy [-runs 5] [-only start,guest,all,waits,flash,filter]
//
// Restores take turns (eager, lazy, eager …); figures are medians. Files are in
// the page cache unless the flash tier is limited. Everything is under TMPDIR,
// which needs 6 GB and should be on a disk.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest/guestmem"
	"github.com/flic-migrate/flic-migrate/scripts/measure"
	"github.com/flic-migrate/flic-migrate/tier/lazy"
)

func main() {
	ctx := context.Background()
	if spec := os.Getenv(childEnv); spec != "" {
		if err := runChild(ctx, spec); err != nil {
			fmt.Fprintln(os.Stderr, "child:", err)
			os.Exit(1)
		}
		return
	}
	runs := flag.Int("runs", 5, "restores of each kind")
	only := flag.String("only", "start,guest,all,waits,flash,filter", "what to measure")
	flag.Parse()
	dir, err := os.MkdirTemp("", "bench-lazy")
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench-lazy:", err)
		os.Exit(1)
	}
	defer os.RemoveAll(dir)
	b := &bench{ctx: ctx, dir: dir, runs: *runs}
	for _, name := range strings.Split(*only, ",") {
		part, ok := map[string]func() error{
			"start": b.start, "guest": b.guest, "all": b.all, "waits": b.waits, "flash": b.flash, "filter": b.filter,
		}[name]
		err := fmt.Errorf("no measurement %q", name)
		if ok {
			err = part()
		}
		if err != nil {
			os.RemoveAll(dir)
			fmt.Fprintf(os.Stderr, "bench-lazy: %s: %v\n", name, err)
			os.Exit(1)
		}
	}
}

type bench struct {
	ctx  context.Context
	dir  string
	runs int
}

// saved is a VM in a file, as its stream, and in a store.
type saved struct {
	config qemutest.Config
	stream string
	bytes  int64 // of the stream
	store  string
}

// save stops a VM and saves it twice.
func (b *bench) save(vm *qemutest.VM, config qemutest.Config, name string) (saved, error) {
	s := saved{config: config, stream: filepath.Join(b.dir, name+".stream"), store: filepath.Join(b.dir, name+".store")}
	s.config.Args = nil // not loaded again
	s.config.Incoming, s.config.Paused = "defer", true
	if err := migration.SetParameters(b.ctx, vm.QMP, map[string]any{"max-bandwidth": int64(100 << 30)}); err != nil {
		return s, err
	}
	uri, err := child{Op: "save", Store: s.store}.uri()
	if err != nil {
		return s, err
	}
	for _, u := range []string{"exec:exec cat > " + s.stream, uri} {
		if err := qmp.Stop(b.ctx, vm.QMP); err != nil {
			return s, err
		}
		if _, err := vm.Save(b.ctx, u); err != nil {
			return s, fmt.Errorf("%w\n%s", err, vm.Output())
		}
		if err := qmp.Cont(b.ctx, vm.QMP); err != nil {
			return s, err
		}
	}
	// Or the kernel writes it back while restores are measured.
	unix.Sync()
	info, err := os.Stat(s.stream)
	if err != nil {
		return s, err
	}
	s.bytes = info.Size()
	return s, nil
}

func (s saved) remove() {
	os.Remove(s.stream)
	os.RemoveAll(s.store)
}

// restored is one restore.
type restored struct {
	begun             time.Duration // from the command's start until migrate-incoming
	running, resident time.Duration // since migrate-incoming
	work              time.Duration // until the guest had done what it was asked for
	rep               lazy.Report
}

// restore restores s from an exec: URI; with ask the guest runs and is asked
// for something.
func (b *bench) restore(s saved, uri string, postcopy bool, ask, report string) (r restored, err error) {
	vm, err := qemutest.Launch(b.ctx, s.config)
	if err != nil {
		return r, err
	}
	defer vm.Kill()
	capabilities := []map[string]bool{{"events": true}, {"postcopy-ram": true}}
	if !postcopy {
		capabilities = capabilities[:1]
	}
	for _, c := range capabilities {
		if err := migration.SetCapabilities(b.ctx, vm.QMP, c); err != nil {
			return r, err
		}
	}
	// The kernel still takes back the memory of the one before.
	time.Sleep(500 * time.Millisecond)
	start := time.Now()
	if err := migration.Incoming(b.ctx, vm.QMP, uri); err != nil {
		return r, err
	}
	if err := measure.UntilRunning(b.ctx, vm); err != nil {
		return r, err
	}
	r.running = time.Since(start)
	done := make(chan error, 1)
	go func() {
		_, err := migration.Wait(b.ctx, vm.QMP)
		r.resident = time.Since(start)
		done <- err
	}()
	if ask != "" {
		if err := b.work(vm, ask); err != nil {
			return r, err
		}
		r.work = time.Since(start)
	}
	if err := <-done; err != nil || report == "" {
		return r, err
	}
	// The server has written it when it ends, and ends no later than QEMU.
	var text []byte
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if text, err = os.ReadFile(report); err == nil {
			return r, json.Unmarshal(text, &r.rep)
		}
	}
	return r, fmt.Errorf("%w\n%s", err, vm.Output())
}

// resume restores s with the command.
func (b *bench) resume(s saved, command string) (r restored, err error) {
	rep, all, err := measure.Resume(b.ctx, command, s.store, s.config)
	r.running, r.resident, r.begun = rep.Running, rep.Resident, all-rep.Running
	return r, err
}

// work lets the guest run and do something.
func (b *bench) work(vm *qemutest.VM, ask string) error {
	if err := qmp.Cont(b.ctx, vm.QMP); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(b.ctx, time.Minute)
	defer cancel()
	// The serial port may lose what it gets before the guest runs.
	if _, err := vm.Expect(ctx, `tick \d+`); err != nil {
		return err
	}
	if err := vm.Send(ask); err != nil {
		return err
	}
	_, err := vm.Expect(ctx, `\n`+ask+` \w+`)
	return err
}

func (b *bench) eager(s saved, ask string) (restored, error) {
	return b.restore(s, "exec:exec cat "+s.stream, false, ask, "")
}

func (b *bench) child(s saved, c child, ask string) (restored, error) {
	c.Store, c.Report = s.store, filepath.Join(b.dir, "report")
	os.Remove(c.Report)
	uri, err := c.uri()
	if err != nil {
		return restored{}, err
	}
	if c.Op != "lazy" {
		return b.restore(s, uri, false, ask, "")
	}
	return b.restore(s, uri, true, ask, c.Report)
}

// turns runs the kinds of restores one after the other, runs times.
func (b *bench) turns(kinds ...func() (restored, error)) ([][]restored, error) {
	all := make([][]restored, len(kinds))
	for range b.runs {
		for i, kind := range kinds {
			r, err := kind()
			if err != nil {
				return nil, err
			}
			all[i] = append(all[i], r)
		}
	}
	return all, nil
}

func median(list []restored, what func(restored) time.Duration) time.Duration {
	var d []time.Duration
	for _, r := range list {
		d = append(d, what(r))
	}
	slices.Sort(d)
	return d[len(d)/2]
}

func running(r restored) time.Duration  { return r.running }
func resident(r restored) time.Duration { return r.resident }
func work(r restored) time.Duration     { return r.work }

// content makes a file of what guests have in memory.
func (b *bench) content(size int) (string, error) {
	buf := make([]byte, size)
	guestmem.Fill(buf, 7)
	name := filepath.Join(b.dir, fmt.Sprint("content", size))
	return name, os.WriteFile(name, buf, 0o600)
}

// tiny saves a tiny guest of so much RAM, of which three fifths hold content.
func (b *bench) tiny(mib int) (saved, error) {
	file, err := b.content(mib << 20 / 5 * 3 &^ 4095)
	if err != nil {
		return saved{}, err
	}
	defer os.Remove(file)
	config := qemutest.Config{Guest: qemutest.Tiny, Memory: fmt.Sprint(mib, "M"), Args: qemutest.Load(file, 16<<20)}
	vm, err := qemutest.Launch(b.ctx, config)
	if err != nil {
		return saved{}, err
	}
	defer vm.Kill()
	if _, err := vm.Expect(b.ctx, `tick 00000002`); err != nil {
		return saved{}, err
	}
	return b.save(vm, config, fmt.Sprint("tiny", mib))
}

// linux saves a guest with a buffer of so many MiB whose other memory is not
// empty.
func (b *bench) linux(memory string, buffer int) (saved, error) {
	config := qemutest.Config{Guest: qemutest.Linux, Memory: memory, Kernel: fmt.Sprint("flic.fill=", buffer)}
	vm, err := qemutest.Launch(b.ctx, config)
	if err != nil {
		return saved{}, err
	}
	defer vm.Kill()
	ctx, cancel := context.WithTimeout(b.ctx, 3*time.Minute)
	defer cancel()
	if _, err := vm.Expect(ctx, `flic ready`); err != nil {
		return saved{}, err
	}
	if _, err := vm.Expect(ctx, `tick \d+`); err != nil {
		return saved{}, err
	}
	return b.save(vm, config, "linux")
}

func ms(d time.Duration) string { return fmt.Sprintf("%.1f", d.Seconds()*1000) }

// start: time to running by size of RAM, of the command itself.
func (b *bench) start() error {
	command := filepath.Join(b.dir, "flic-migrate")
	if err := qemutest.Build(b.ctx, command); err != nil {
		return err
	}
	fmt.Print("\n| RAM | stream | eager `cat`, ms | resume: running, ms | share | before, ms | resident, ms | exec: running, ms | resident, ms |\n|---|---|---|---|---|---|---|---|---|\n")
	for _, mib := range []int{256, 512, 1024, 2048} {
		s, err := b.tiny(mib)
		if err != nil {
			return err
		}
		t, err := b.turns(
			func() (restored, error) { return b.eager(s, "") },
			func() (restored, error) { return b.resume(s, command) },
			func() (restored, error) {
				return b.restore(s, fmt.Sprintf("exec:exec %s restore --quiet --lazy always --store %s vm", command, s.store), true, "", "")
			})
		if err != nil {
			return err
		}
		s.remove()
		e, l := median(t[0], running), median(t[1], running)
		fmt.Printf("| %d MiB | %d MiB | %s | %s | %.1f %% | %s | %s | %s | %s |\n", mib, s.bytes>>20, ms(e), ms(l), 100*l.Seconds()/e.Seconds(),
			ms(median(t[1], func(r restored) time.Duration { return r.begun })), ms(median(t[1], resident)), ms(median(t[2], running)), ms(median(t[2], resident)))
	}
	return nil
}

// guest: time until the guest has read and hashed 64 MiB.
func (b *bench) guest() error {
	s, err := b.linux("512M", 64)
	if err != nil {
		return err
	}
	defer s.remove()
	lazily := func(c child) func() (restored, error) {
		return func() (restored, error) { return b.child(s, c, "sum") }
	}
	t, err := b.turns(
		func() (restored, error) { return b.eager(s, "sum") },
		func() (restored, error) { return b.child(s, child{Op: "eager"}, "sum") },
		lazily(child{Op: "lazy"}))
	if err != nil {
		return err
	}
	// In this order: the first teaches the second.
	for _, hold := range []time.Duration{500 * time.Millisecond, 0} {
		r, err := lazily(child{Op: "lazy", Learn: true, Hold: hold})()
		if err != nil {
			return err
		}
		t = append(t, []restored{r})
	}
	fmt.Print("\n| restore | running, ms | 64 MiB hashed, ms | resident, ms | pages waited for |\n|---|---|---|---|---|\n")
	works([]string{"`cat` of the raw stream", "eager", "lazy", "lazy, first, background held back 500 ms (one run)", "lazy, second (one run)"}, t)
	return nil
}

// works prints restores whose guests had something to do.
func works(names []string, t [][]restored) {
	for i, name := range names {
		var waited []int64
		for _, r := range t[i] {
			waited = append(waited, r.rep.Waited)
		}
		slices.Sort(waited)
		fmt.Printf("| %s | %s | %s | %s | %d |\n", name, ms(median(t[i], running)), ms(median(t[i], work)), ms(median(t[i], resident)), waited[len(waited)/2])
	}
}

// all: time until the guest has read all its memory and compared it with the
// sums it keeps, which no restore can do anything about but to be in front of it.
func (b *bench) all() error {
	s, err := b.linux("2G", 1200)
	if err != nil {
		return err
	}
	defer s.remove()
	const ask = "check"
	t, err := b.turns(
		func() (restored, error) { return b.eager(s, ask) },
		func() (restored, error) { return b.child(s, child{Op: "lazy"}, ask) },
		func() (restored, error) { return b.child(s, child{Op: "lazy", Learn: true}, ask) })
	if err != nil {
		return err
	}
	fmt.Print("\n| 2 GiB, 1200 MiB of it read | running, ms | checked, ms | resident, ms | pages waited for |\n|---|---|---|---|---|\n")
	works([]string{"`cat` of the raw stream", "lazy", "lazy, with what the ones before learned"}, t)
	return nil
}

// flash: the same data from a device of 80 MB/s.
func (b *bench) flash() error {
	s, err := b.tiny(512)
	if err != nil {
		return err
	}
	defer s.remove()
	const rate = 80e6
	t, err := b.turns(
		func() (restored, error) { return b.child(s, child{Op: "eager", Rate: rate}, "") },
		func() (restored, error) { return b.child(s, child{Op: "lazy", Rate: rate}, "") })
	if err != nil {
		return err
	}
	fmt.Print("\n| 512 MiB, flash at 80 MB/s | running, ms | resident, ms |\n|---|---|---|\n")
	for i, name := range []string{"eager", "lazy"} {
		fmt.Printf("| %s | %s | %s |\n", name, ms(median(t[i], running)), ms(median(t[i], resident)))
	}
	return nil
}
