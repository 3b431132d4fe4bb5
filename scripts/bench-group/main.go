// Command bench-group saves eight real guests of two disk images at one moment and prints
// Markdown tables of what that costs beside eight saves of one guest each.
//
//	go run ./scripts/bench-group [-only saves,atonce,skew,restores,base] [-guests 8] [-memory 256M] [-runs 3] [-skew 5] [-codec minlz]
//
// The guests have done four kinds of work on each of the images, and stand still. In turn they
// are saved: by lz4 through exec:, one after the other and all at once, into files that are
// synced; by checkpoint, one after the other, each into a store of its own; by checkpoint
// --group, without and with an index of the two images. All of ours have --parent none, and
// their times are those of the whole command. Between two saves a guest runs for an instant,
// because QEMU wants it so.
//
// Then what is stored is restored into nothing, one after the other, with files in the host's
// page cache, and resumed into new QEMUs, all at once: by one resume --group, and by a
// resume of each.
//
// atonce: they are saved by commands of their own, at the same time, into one store.
//
// -skew is how many groups are made of guests that run, stopped and live: for how far apart
// QEMU's STOP events are, and the guests' pauses as they have them themselves (skew.go).
//
// base is another scene: eight guests that have gone on from one checkpoint are resumed
// lazily at once, with no image in the page cache (base.go).
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
	"github.com/flic-migrate/flic-migrate/scripts/measure"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
)

// workload is what a guest does before it is saved.
type workload struct {
	name, start string // a command of the guest's console; "": none
	warm        time.Duration
}

var workloads = []workload{
	{"idle", "", time.Second},
	{"files", "run cat /usr/lib/x86_64-linux-gnu/*.so* >/dev/null; echo flic warm >/dev/console; sleep 9999", time.Second},
	{"sqlite", measure.SQLite, 4 * time.Second},
	{"archive", "run tar c /usr/bin 2>/dev/null | gzip -1 | head -c 20M >/tmp/a; echo flic warm >/dev/console; sleep 9999", time.Second},
}

// images are the disks that guests stand on, by the kinds of qemutest.Assets.
var images = []string{"debian", "workloads"}

func main() {
	b := &bench{}
	only := flag.String("only", "saves,atonce,skew,restores,base", "what to measure; restores need saves")
	flag.IntVar(&b.n, "guests", 8, "how many")
	flag.IntVar(&b.runs, "runs", 3, "of each way, after one that warms up")
	flag.IntVar(&b.skews, "skew", 5, "groups of running guests in each mode")
	flag.StringVar(&b.memory, "memory", "256M", "of each guest")
	flag.StringVar(&b.codec, "codec", "minlz", "of flic-migrate")
	flag.Parse()
	b.only = strings.Split(*only, ",")
	if err := b.run(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, "bench-group:", err)
		os.Exit(1)
	}
}

type bench struct {
	only           []string
	n, runs, skews int
	memory, codec  string
	dir, binary    string
	guests         []*guest
}

// guest is one of them.
type guest struct {
	name   string
	config qemutest.Config
	vm     *qemutest.VM
}

// way is one of the ways in which all are saved, or restored.
type way struct {
	name  string
	do    func(context.Context) (bytes int64, err error)
	again func() error // makes room for the next save; nil: nothing is to be done
	back  func(context.Context) (time.Duration, error)
	times []time.Duration
	bytes int64
}

func (b *bench) run(ctx context.Context) (err error) {
	if b.dir, err = os.MkdirTemp("", "bench-group"); err != nil {
		return err
	}
	defer os.RemoveAll(b.dir)
	b.binary = filepath.Join(b.dir, "flic-migrate")
	if err := qemutest.Build(ctx, b.binary); err != nil {
		return err
	}
	defer b.kill()
	if b.wants("base") {
		if err := b.base(ctx); err != nil {
			return fmt.Errorf("base: %w", err)
		}
	}
	if !b.wants("saves") && !b.wants("skew") && !b.wants("atonce") {
		return nil
	}
	disks, err := b.boot(ctx)
	if err != nil {
		return err
	}
	if _, err := b.flic(append([]string{"disk", "index", "--quiet", "--store", b.path("disks")}, disks...)...); err != nil {
		return err
	}
	fmt.Printf("%d guests of %s on %d images, %d runs, codec %s. Times are medians.\n\n", b.n, b.memory, len(disks), b.runs, b.codec)
	if b.wants("saves") {
		if err := b.saves(ctx); err != nil {
			return err
		}
	}
	if b.wants("atonce") {
		if err := b.atOnce(ctx); err != nil {
			return fmt.Errorf("at once: %w", err)
		}
	}
	if b.wants("skew") {
		if err := b.skew(ctx); err != nil {
			return err
		}
	}
	b.kill()
	if b.wants("restores") && b.wants("saves") {
		return b.restores(ctx)
	}
	return nil
}

// wants tells whether something is to be measured.
func (b *bench) wants(what string) bool { return slices.Contains(b.only, what) }

func (b *bench) path(name string) string { return filepath.Join(b.dir, name) }

func (b *bench) kill() {
	for _, g := range b.guests {
		if g.vm != nil {
			g.vm.Kill()
			g.vm = nil
		}
	}
}

// boot starts the guests, two at a time, and stops each when it is warm.
func (b *bench) boot(ctx context.Context) (disks []string, err error) {
	for _, kind := range images {
		dir, err := qemutest.Assets(ctx, kind)
		if err != nil {
			return nil, err
		}
		disks = append(disks, filepath.Join(dir, "disk.ext4"))
	}
	slots := make(chan struct{}, 2)
	errs := make([]error, b.n)
	var all sync.WaitGroup
	for i := range b.n {
		w := workloads[i/len(disks)%len(workloads)]
		g := &guest{name: fmt.Sprintf("%s%d", w.name, i), config: qemutest.Config{Guest: qemutest.Debian, Memory: b.memory,
			Disk: disks[i%len(disks)], Kernel: "flic.fill=4 flic.read=/usr flic.readmax=100"}}
		b.guests = append(b.guests, g)
		all.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			if g.vm, errs[i] = measure.Boot(ctx, g.config, w.start, w.warm); errs[i] == nil {
				errs[i] = qmp.Stop(ctx, g.vm.QMP)
			}
		})
	}
	all.Wait()
	return disks, errors.Join(errs...)
}

// flic runs the command.
func (b *bench) flic(args ...string) ([]byte, error) {
	cmd := exec.Command(b.binary, args...)
	cmd.Env = append(os.Environ(), "FLIC_CONFIG="+os.DevNull)
	out, err := cmd.Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		err = fmt.Errorf("%v: %w: %s", args, err, exit.Stderr)
	}
	return out, err
}

// each calls fn for all guests, one after the other or at once.
func (b *bench) each(atOnce bool, fn func(i int, g *guest) error) error {
	errs := make([]error, len(b.guests))
	var all sync.WaitGroup
	for i, g := range b.guests {
		if atOnce {
			all.Go(func() { errs[i] = fn(i, g) })
		} else if err := fn(i, g); err != nil {
			return err
		}
	}
	all.Wait()
	return errors.Join(errs...)
}

// instant lets guests run for an instant, so that QEMU saves them again.
func (b *bench) instant(ctx context.Context) error {
	return b.each(false, func(_ int, g *guest) error { return errors.Join(qmp.Cont(ctx, g.vm.QMP), qmp.Stop(ctx, g.vm.QMP)) })
}

// lz4 saves through exec: into files.
func (b *bench) lz4(atOnce bool) func(context.Context) (int64, error) {
	return func(ctx context.Context) (bytes int64, err error) {
		sizes := make([]int64, b.n)
		err = b.each(atOnce, func(i int, g *guest) error {
			file := b.path(g.name + ".lz4")
			defer os.Remove(file)
			if _, err := g.vm.Save(ctx, "exec:lz4 -q -c > "+file+" && sync "+file); err != nil {
				return err
			}
			fi, err := os.Stat(file)
			if err == nil {
				sizes[i] = fi.Size()
			}
			return err
		})
		for _, n := range sizes {
			bytes += n
		}
		return bytes, err
	}
}

// checkpointFlags are those of all checkpoints here.
func (b *bench) checkpointFlags(store string, more ...string) []string {
	return append([]string{"checkpoint", "--quiet", "--json", "--store", b.path(store), "--parent", "none", "--codec", b.codec}, more...)
}

// alone saves each guest into a store of its own, one after the other.
func (b *bench) alone(context.Context) (bytes int64, err error) {
	err = b.each(false, func(_ int, g *guest) error {
		out, err := b.flic(b.checkpointFlags("alone-"+g.name, "--no-disks", "--qmp", g.vm.Socket, g.name)...)
		if err != nil {
			return err
		}
		var doc struct{ Save *checkpoint.Report }
		if err := json.Unmarshal(out, &doc); err != nil {
			return err
		}
		bytes += doc.Save.FlashBytes
		return nil
	})
	return bytes, err
}

// groupDoc is what is used of the report of a group.
type groupDoc struct {
	Skew     time.Duration `json:"skew_ns"`
	Downtime time.Duration `json:"downtime_ns"`
	Total    time.Duration `json:"total_ns"`
	Sum      struct {
		BytesIn    int64 `json:"bytes_in"`
		FlashBytes int64 `json:"flash_bytes"`
	} `json:"sum"`
}

// group saves all as one.
func (b *bench) group(store string, flags ...string) (doc groupDoc, err error) {
	args := b.checkpointFlags(store, append(flags, "--group", "all")...)
	for _, g := range b.guests {
		args = append(args, g.name+"="+g.vm.Socket)
	}
	out, err := b.flic(args...)
	if err == nil {
		err = json.Unmarshal(out, &doc)
	}
	return doc, err
}

// saves measures the ways to save guests that stand still.
func (b *bench) saves(ctx context.Context) error {
	var raw int64
	grouped := func(store string, flags ...string) func(context.Context) (int64, error) {
		return func(context.Context) (int64, error) {
			doc, err := b.group(store, flags...)
			raw = doc.Sum.BytesIn
			return doc.Sum.FlashBytes, err
		}
	}
	forget := func(store string) func() error {
		return func() error {
			_, err := b.flic("rm", "--store", b.path(store), "--group", "--all", "all")
			return err
		}
	}
	ways := []*way{
		{name: "`exec:lz4`, one after the other", do: b.lz4(false)},
		{name: "`exec:lz4`, all at once", do: b.lz4(true)},
		{name: "`checkpoint`, one after the other, a store each", do: b.alone, again: func() error {
			return b.each(false, func(_ int, g *guest) error { return os.RemoveAll(b.path("alone-" + g.name)) })
		}},
		{name: "`checkpoint --group`", do: grouped("group", "--no-disks"), again: forget("group")},
		{name: "`checkpoint --group`, images indexed", do: grouped("disks"), again: forget("disks")},
	}
	for i := range b.runs + 1 {
		for _, w := range ways {
			start := time.Now()
			bytes, err := w.do(ctx)
			took := time.Since(start)
			if err != nil {
				return fmt.Errorf("%s: %w", w.name, err)
			}
			if w.bytes = bytes; i > 0 {
				w.times = append(w.times, took)
			}
			if err := b.instant(ctx); err != nil {
				return err
			}
			// The last of each is restored.
			if i < b.runs && w.again != nil {
				if err := w.again(); err != nil {
					return err
				}
			}
		}
	}
	fmt.Printf("The streams have %.0f MB.\n\n| save of %d guests | s | to lz4 in turn | to lz4 at once | MB | to lz4 | to separate ones |\n|---|---:|---:|---:|---:|---:|---:|\n", float64(raw)/1e6, b.n)
	for _, w := range ways {
		fmt.Printf("| %s | %.2f | %.2f | %.2f | %.1f | %.2f | %.2f |\n", w.name, measure.Median(w.times).Seconds(), ratio(w, ways[0]), ratio(w, ways[1]),
			float64(w.bytes)/1e6, float64(w.bytes)/float64(ways[0].bytes), float64(w.bytes)/float64(ways[2].bytes))
	}
	fmt.Println()
	return nil
}

// ratio is that of two ways' times.
func ratio(a, to *way) float64 {
	return measure.Median(a.times).Seconds() / measure.Median(to.times).Seconds()
}

// restores measures the ways back.
func (b *bench) restores(ctx context.Context) error {
	nothing := func(store func(*guest) string) func(context.Context) (time.Duration, error) {
		return func(context.Context) (time.Duration, error) {
			start := time.Now()
			err := b.each(false, func(_ int, g *guest) error {
				_, err := measure.RestoreOf(b.binary, b.path(store(g)), g.name)
				return err
			})
			return time.Since(start), err
		}
	}
	alone := func(g *guest) string { return "alone-" + g.name }
	in := func(name string) func(*guest) string { return func(*guest) string { return name } }
	eager := []*way{
		{name: "separate ones", back: nothing(alone)},
		{name: "of the group", back: nothing(in("group"))},
		{name: "of the group, images indexed", back: nothing(in("disks"))},
	}
	if err := b.measure(ctx, eager); err != nil {
		return err
	}
	printRestores(fmt.Sprintf("%d restores into nothing, one after the other", b.n), eager)
	for _, lazy := range []string{"never", "always"} {
		resume := func(store string) func(context.Context) (time.Duration, error) {
			return func(ctx context.Context) (time.Duration, error) { return b.resume(ctx, store, lazy) }
		}
		ways := []*way{
			{name: "a `resume` of each separate one", back: resume("")},
			{name: "`resume --group`", back: resume("group")},
			{name: "`resume --group`, images indexed", back: resume("disks")},
		}
		if err := b.measure(ctx, ways); err != nil {
			return err
		}
		printRestores(fmt.Sprintf("%d guests resumed at once, --lazy %s, until all memory is there", b.n, lazy), ways)
	}
	return nil
}

// measure does all ways in turn.
func (b *bench) measure(ctx context.Context, ways []*way) error {
	for i := range b.runs + 1 {
		for _, w := range ways {
			took, err := w.back(ctx)
			if err != nil {
				return fmt.Errorf("%s: %w", w.name, err)
			}
			if i > 0 {
				w.times = append(w.times, took)
			}
		}
	}
	return nil
}

func printRestores(title string, ways []*way) {
	fmt.Printf("| %s | s | to separate ones |\n|---|---:|---:|\n", title)
	for _, w := range ways {
		fmt.Printf("| %s | %.2f | %.2f |\n", w.name, measure.Median(w.times).Seconds(), ratio(w, ways[0]))
	}
	fmt.Println()
}

// resume resumes all guests at once into QEMUs that it starts: from a store of each if store
// is empty. It returns how long the commands took, until all memory is there.
func (b *bench) resume(ctx context.Context, store, lazy string) (time.Duration, error) {
	defer b.kill()
	if err := b.each(true, func(_ int, g *guest) (err error) {
		c := g.config
		c.Incoming, c.Paused = "defer", true
		g.vm, err = qemutest.Launch(ctx, c)
		return err
	}); err != nil {
		return 0, err
	}
	start := time.Now()
	flags := []string{"resume", "--json", "--quiet", "--lazy", lazy}
	if store == "" {
		err := b.each(true, func(_ int, g *guest) error {
			_, err := b.flic(append(slices.Clone(flags), "--store", b.path("alone-"+g.name), "--qmp", g.vm.Socket, g.name)...)
			return err
		})
		return time.Since(start), err
	}
	args := append(flags, "--store", b.path(store), "--group", "all")
	for _, g := range b.guests {
		args = append(args, g.name+"="+g.vm.Socket)
	}
	_, err := b.flic(args...)
	return time.Since(start), err
}
