// Command bench-disk saves guests whose page cache is on their disk, with and without
// looking for it there, and prints Markdown tables.
//
//	go run ./scripts/bench-disk [-only warm,sqlite,idle] [-on raw,qcow2] [-runs 5] [-memory 512M] [-lazy=false]
//	    [-keep DIR] [-places]
//
// A guest stands still and is saved through exec: in turn by cat into nothing, which is as
// fast as QEMU feeds a pipe, by what people pipe streams through today into a file that is
// synced, by flic-migrate, and by flic-migrate with --disk: of its disk, and of that and the
// kernel that QEMU was started with, of whose file much is in its memory too. All of
// ours have --parent none --share none. Between two saves the guest runs for an instant, because QEMU
// wants it so. With -on qcow2 it has a layer of its own on the image, and only what is
// beneath that is looked in.
//
// Then the newest checkpoints without and with disks are restored, in turn: eagerly into
// nothing, with their files in the host's page cache and after they were dropped from it,
// and lazily into a new QEMU.
//
// With -places nothing is saved: it is measured what it costs to read single blocks of the
// guest's disk, beside what is read in one go.
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
	"time"

	"golang.org/x/sys/unix"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
	"github.com/flic-migrate/flic-migrate/scripts/measure"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
)

// workload is what a guest does before it is saved.
type workload struct {
	name, what string
	read       int    // MiB of /usr that are in its page cache
	start      string // command of the guest's console; "": none
	warm       time.Duration
}

var workloads = []workload{
	{name: "warm", what: "has read 135 MiB of /usr", read: 135},
	{
		name: "sqlite", what: "SQLite in /tmp, 20 000 rows, random UPDATE and SELECT; has read 60 MiB of /usr", read: 60,
		start: measure.SQLite,
		warm:  5 * time.Second,
	},
	{name: "idle", what: "has read 8 MiB of /usr, and does nothing", read: 8},
}

func main() {
	b := &bench{}
	only := flag.String("only", "warm,sqlite,idle", "workloads")
	on := flag.String("on", "raw,qcow2", "what the guest has for its disk: the image, or a layer on it")
	flag.IntVar(&b.runs, "runs", 5, "of each tool, after one that warms up")
	flag.StringVar(&b.memory, "memory", "512M", "of the guests")
	flag.StringVar(&b.codec, "codec", "minlz", "of flic-migrate")
	flag.StringVar(&b.keep, "keep", "", "directory that a stream of each guest is left in")
	flag.BoolVar(&b.lazy, "lazy", true, "restore lazily as well")
	places := flag.Bool("places", false, "measure only what it costs to read a place of the guest's disk")
	flag.Parse()
	err := b.assets(context.Background())
	switch {
	case err != nil:
	case *places:
		err = b.places()
	default:
		err = b.run(context.Background(), strings.Split(*only, ","), strings.Split(*on, ","))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench-disk:", err)
		os.Exit(1)
	}
}

type bench struct {
	runs          int
	memory, codec string
	keep          string
	lazy          bool
	dir, binary   string
	image, kernel string
}

// assets finds the image of the guests' disk, and their kernel.
func (b *bench) assets(ctx context.Context) error {
	dir, err := qemutest.Assets(ctx, "debian")
	if err != nil {
		return err
	}
	b.image = filepath.Join(dir, "disk.ext4")
	if dir, err = qemutest.Assets(ctx, "x86"); err == nil {
		b.kernel = filepath.Join(dir, "vmlinuz")
	}
	return err
}

func (b *bench) run(ctx context.Context, only, on []string) (err error) {
	if b.dir, err = os.MkdirTemp("", "bench-disk"); err != nil {
		return err
	}
	defer os.RemoveAll(b.dir)
	b.binary = filepath.Join(b.dir, "flic-migrate")
	if err := qemutest.Build(ctx, b.binary); err != nil {
		return err
	}
	fmt.Printf("Guests of %s, %d runs of each, codec %s. Figures are medians.\n", b.memory, b.runs, b.codec)
	for _, w := range workloads {
		for _, disk := range on {
			if slices.Contains(only, w.name) {
				if err := b.guest(ctx, w, disk); err != nil {
					return fmt.Errorf("%s on %s: %w", w.name, disk, err)
				}
			}
		}
	}
	return nil
}

// config is a guest's, whose disk is the image or a layer on it, in a directory.
func (b *bench) config(ctx context.Context, w workload, disk, dir string) (c qemutest.Config, top string, err error) {
	c = qemutest.Config{Guest: qemutest.Debian, Memory: b.memory, Kernel: fmt.Sprintf("flic.fill=4 flic.read=/usr flic.readmax=%d", w.read)}
	if disk == "raw" {
		return c, b.image, nil
	}
	top = filepath.Join(dir, "top.qcow2")
	out, err := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", "-b", b.image, "-F", "raw", top).CombinedOutput()
	if err != nil {
		return c, "", fmt.Errorf("qemu-img: %w: %s", err, out)
	}
	c.Guest, c.Args = qemutest.Linux, []string{"-drive", "if=virtio,format=qcow2,file=" + top}
	return c, top, nil
}

// way is one of the ways in which a guest is saved.
type way struct {
	name, command string
	file          string // what it has written; "": nothing
	times         []time.Duration
	bytes         int64
	report        checkpoint.Report // of ours
}

func (b *bench) guest(ctx context.Context, w workload, disk string) error {
	dir := filepath.Join(b.dir, w.name+disk)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	c, top, err := b.config(ctx, w, disk, dir)
	if err != nil {
		return err
	}
	store := func(name string) string { return filepath.Join(dir, name) }
	if out, err := exec.Command(b.binary, "disk", "index", "--quiet", "--store", store("with"), top, b.kernel).CombinedOutput(); err != nil {
		return fmt.Errorf("disk index: %w: %s", err, out)
	}
	vm, err := measure.Boot(ctx, c, w.start, w.warm)
	if err != nil {
		return err
	}
	defer vm.Kill()
	ours := func(name, flags string) string {
		return fmt.Sprintf("exec %s save --quiet --parent none --share none --store %s --vm vm --codec %s --report %s.json %s", b.binary, store(name), b.codec, store(name), flags)
	}
	through := func(name, command string) *way {
		f := filepath.Join(dir, strings.Fields(command)[0])
		return &way{name: name, command: command + " > " + f + " && sync " + f, file: f}
	}
	without := &way{name: "flic-migrate", command: ours("without", "")}
	disks := &way{name: "flic-migrate, disk", command: ours("with", "--disk "+top)}
	with := &way{name: "flic-migrate, disk and kernel", command: ours("with", "--disk "+top+":"+b.kernel)}
	lz4, zstd := through("lz4", "lz4 -c"), through("zstd -3 -T2", "zstd -q -3 -T2 -c")
	ways := []*way{{name: "cat > /dev/null", command: "exec cat > /dev/null"}, through("cat", "cat"), lz4, zstd, without, disks, with}
	if err := qmp.Stop(ctx, vm.QMP); err != nil {
		return err
	}
	if b.keep != "" {
		if _, err := measure.Save(ctx, vm, "exec cat > "+filepath.Join(b.keep, w.name+"-"+disk+".stream")); err != nil {
			return err
		}
	}
	for i := range b.runs + 1 {
		for _, s := range ways {
			took, err := measure.Save(ctx, vm, s.command)
			if err != nil {
				return err
			}
			if s == without || s == disks || s == with {
				r, err := measure.Report(store(map[*way]string{without: "without", disks: "with", with: "with"}[s]) + ".json")
				if err != nil {
					return err
				}
				s.bytes, s.report = r.FlashBytes, r
			} else if s.file != "" {
				fi, err := os.Stat(s.file)
				if err != nil {
					return err
				}
				s.bytes = fi.Size()
				if err := os.Remove(s.file); err != nil {
					return err
				}
			}
			if i > 0 {
				s.times = append(s.times, took)
			}
		}
		// The last of each is restored.
		if i < b.runs {
			for _, name := range []string{"with", "without"} {
				if out, err := exec.Command(b.binary, "rm", "--store", store(name), "--all", "vm").CombinedOutput(); err != nil {
					return fmt.Errorf("rm: %w: %s", err, out)
				}
			}
		}
	}
	vm.Kill()
	is := disks.report
	nonzero := is.Pages - is.Zero
	fmt.Printf("\n**%s on %s**: %s. %d of %d pages that are not zero (%.0f %%) are on the disk, %d on disk or in the kernel's file.\n\n", w.name, disk, w.what, is.Disk, nonzero, 100*float64(is.Disk)/float64(nonzero), with.report.Disk)
	fmt.Println("| save | s | to lz4 | MB | to zstd -3 |")
	fmt.Println("|---|---:|---:|---:|---:|")
	for _, s := range ways {
		fmt.Printf("| %s | %.3f | %.2f | %.1f | %.2f |\n", s.name, measure.Median(s.times).Seconds(), ratio(s.times, lz4.times), float64(s.bytes)/1e6, float64(s.bytes)/float64(zstd.bytes))
	}
	return b.restores(ctx, c, dir, store)
}

// restores restores the newest checkpoint of both stores in turn.
func (b *bench) restores(ctx context.Context, c qemutest.Config, dir string, store func(string) string) error {
	stores := []string{"without", "with"}
	times := map[string][]time.Duration{}
	add := func(what, name string, took time.Duration) { times[what+name] = append(times[what+name], took) }
	whats := []string{"eager, cached", "eager, cold"}
	for i := range b.runs + 1 {
		for _, name := range stores {
			// The other one's cold restore has dropped the disk.
			if _, err := measure.Restore(b.binary, store(name)); err != nil {
				return err
			}
			warm, err := measure.Restore(b.binary, store(name))
			if err != nil {
				return err
			}
			if err := b.drop(store(name)); err != nil {
				return err
			}
			cold, err := measure.Restore(b.binary, store(name))
			if err != nil {
				return err
			}
			if i > 0 {
				add(whats[0], name, warm)
				add(whats[1], name, cold)
			}
		}
	}
	if b.lazy {
		whats = append(whats, "lazy: guest runs", "lazy: all memory there")
		for i := range b.runs + 1 {
			for _, name := range stores {
				runs, resident, err := b.resume(ctx, c, store(name))
				if err != nil {
					return err
				}
				if i > 0 {
					add(whats[2], name, runs)
					add(whats[3], name, resident)
				}
			}
		}
	}
	fmt.Println("\n| restore | without, s | with, s | ratio |")
	fmt.Println("|---|---:|---:|---:|")
	for _, what := range whats {
		fmt.Printf("| %s | %.3f | %.3f | %.2f |\n", what, measure.Median(times[what+"without"]).Seconds(), measure.Median(times[what+"with"]).Seconds(), ratio(times[what+"with"], times[what+"without"]))
	}
	return nil
}

func ratio(a, b []time.Duration) float64 {
	return measure.Median(a).Seconds() / measure.Median(b).Seconds()
}

// drop takes the files of a store and the disk out of the host's page cache.
func (b *bench) drop(store string) error {
	files := []string{b.image, b.kernel}
	err := filepath.Walk(store, func(path string, fi os.FileInfo, err error) error {
		if err == nil && fi.Mode().IsRegular() {
			files = append(files, path)
		}
		return err
	})
	for _, name := range files {
		f, oerr := os.Open(name)
		if oerr != nil {
			return errors.Join(err, oerr)
		}
		err = errors.Join(err, f.Sync(), unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED), f.Close())
	}
	return err
}

// resume restores the newest checkpoint of a store lazily, and leaves the guest paused.
func (b *bench) resume(ctx context.Context, c qemutest.Config, store string) (runs, resident time.Duration, err error) {
	c.Incoming, c.Paused = "defer", true
	vm, err := qemutest.Launch(ctx, c)
	if err != nil {
		return 0, 0, err
	}
	defer vm.Kill()
	cmd := exec.Command(b.binary, "resume", "--json", "--quiet", "--lazy", "always", "--store", store, "--qmp", vm.Socket, "vm")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return 0, 0, err
	}
	var doc struct {
		Running  time.Duration `json:"running_ns"`
		Resident time.Duration `json:"resident_ns"`
	}
	err = json.Unmarshal(out, &doc)
	return doc.Running, doc.Resident, err
}
