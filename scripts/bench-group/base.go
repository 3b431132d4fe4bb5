package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
	"github.com/flic-migrate/flic-migrate/scripts/measure"
)

// Guests that have gone on from one checkpoint, each for a while and with work of its own,
// are saved and resumed lazily, all at once. What they have in common is in the first one's
// image. Before each resume no image is in the page cache; what is there after it was read
// from the disk, once.

// goOn is how long each guest goes on from the base.
const goOn = 4 * time.Second

// baseVM is the checkpoint that all go on from, baseStore where it and they are.
const baseVM, baseStore = "base", "base"

// base measures it.
func (b *bench) base(ctx context.Context) error {
	dir, err := qemutest.Assets(ctx, images[0])
	if err != nil {
		return err
	}
	config := qemutest.Config{Guest: qemutest.Debian, Memory: b.memory, Disk: filepath.Join(dir, "disk.ext4"), Kernel: "flic.fill=4 flic.read=/usr flic.readmax=100"}
	vm, err := measure.Boot(ctx, config, "", time.Second)
	if err != nil {
		return err
	}
	_, err = b.flic("checkpoint", "--quiet", "--no-disks", "--store", b.path(baseStore), "--codec", b.codec, "--qmp", vm.Socket, baseVM)
	vm.Kill()
	if err != nil {
		return err
	}
	var names []string
	for i := range b.n {
		name := fmt.Sprint("vm", i)
		if err := b.goesOn(ctx, config, name, workloads[i%len(workloads)].start); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		names = append(names, name)
	}
	size, own, err := b.sizes()
	if err != nil {
		return err
	}
	fmt.Printf("%d checkpoints of %s that go on from one: its image has %.1f MB, all others %.1f MB together.\n\n", b.n, b.memory, float64(own)/1e6, float64(size-own)/1e6)
	fmt.Printf("| resumed | page cache | runs after: median | longest | all memory: median | longest | read from disk, MB | of the base | servers' memory, MB (PSS, largest sum) |\n|---|---|---:|---:|---:|---:|---:|---:|---:|\n")
	for _, way := range []struct {
		what  string
		names []string
		lazy  string
		cold  bool
	}{
		{"one, lazily", names[:1], "always", true},
		{fmt.Sprintf("all %d, lazily", b.n), names, "always", true},
		{fmt.Sprintf("all %d, lazily", b.n), names, "always", false},
		{"one, eagerly", names[:1], "never", true},
		{fmt.Sprintf("all %d, eagerly", b.n), names, "never", true},
	} {
		var r resumes
		for range b.runs {
			if err := b.resumeAtOnce(ctx, config, way.names, way.lazy, way.cold, &r); err != nil {
				return err
			}
		}
		cache := "cold"
		if !way.cold {
			cache = "warm"
		}
		fmt.Printf("| %s | %s | %.0f ms | %.0f ms | %.2f s | %.2f s | %.1f | %.1f | %.1f |\n", way.what, cache,
			ms(measure.Median(r.running)), ms(measure.Median(r.longest)), measure.Median(r.resident).Seconds(), measure.Median(r.last).Seconds(),
			float64(measure.Median(r.read))/1e6, float64(measure.Median(r.base))/1e6, float64(measure.Median(r.memory))/1e6)
	}
	fmt.Println()
	return nil
}

// goesOn resumes the base into a QEMU, lets the guest work, and saves it as a VM.
func (b *bench) goesOn(ctx context.Context, config qemutest.Config, name, work string) error {
	config.Incoming, config.Paused = "defer", true
	vm, err := qemutest.Launch(ctx, config)
	if err != nil {
		return err
	}
	defer vm.Kill()
	if _, err := b.flic("resume", "--quiet", "--lazy", "never", "--store", b.path(baseStore), "--qmp", vm.Socket, baseVM); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if _, err := vm.Expect(ctx, `tick \d+`); err != nil {
		return err
	}
	if work != "" {
		if err := vm.Send(work); err != nil {
			return err
		}
		if _, err := vm.Expect(ctx, `flic warm`); err != nil {
			return err
		}
	}
	time.Sleep(goOn)
	_, err = b.flic("checkpoint", "--quiet", "--no-disks", "--store", b.path(baseStore), "--codec", b.codec, "--qmp", vm.Socket, name)
	return err
}

// sizes is what all images of the store take, and the base's own.
func (b *bench) sizes() (all, own int64, err error) {
	err = b.images(func(name string, f *os.File, size int64) error {
		all += size
		if filepath.Base(filepath.Dir(name)) == baseVM {
			own += size
		}
		return nil
	})
	return all, own, err
}

// images calls fn with each image of the store.
func (b *bench) images(fn func(name string, f *os.File, size int64) error) error {
	return filepath.WalkDir(filepath.Join(b.path(baseStore), "vms"), func(name string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		fi, err := f.Stat()
		if err == nil && fi.Size() > 0 {
			err = fn(name, f, fi.Size())
		}
		return err
	})
}

// resumes is what several of one kind have shown.
type resumes struct {
	running, longest []time.Duration // from the command's start until the guest may run: of each round the median, the longest
	resident, last   []time.Duration // until all memory is there
	read, base       []int64         // bytes in the page cache that were not there before
	memory           []int64         // of the servers together, at most
}

// resumeAtOnce resumes some VMs, each by a command of its own, into QEMUs that wait.
func (b *bench) resumeAtOnce(ctx context.Context, config qemutest.Config, names []string, lazy string, cold bool, r *resumes) error {
	config.Incoming, config.Paused = "defer", true
	b.guests = nil
	defer b.kill()
	for _, name := range names {
		vm, err := qemutest.Launch(ctx, config)
		if err != nil {
			return err
		}
		b.guests = append(b.guests, &guest{name: name, vm: vm})
	}
	before, err := b.cached(cold)
	if err != nil {
		return err
	}
	memory := b.watchServers()
	running, resident := make([]time.Duration, len(names)), make([]time.Duration, len(names))
	err = b.each(true, func(i int, g *guest) error {
		cmd := exec.CommandContext(ctx, b.binary, "resume", "--quiet", "--json", "--lazy", lazy, "--store", b.path(baseStore), "--qmp", g.vm.Socket, g.name)
		cmd.Env = append(os.Environ(), "FLIC_CONFIG="+os.DevNull)
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, os.Stderr
		start := time.Now()
		if err := cmd.Start(); err != nil {
			return err
		}
		err := untilRuns(ctx, g.vm)
		running[i] = time.Since(start)
		if werr := cmd.Wait(); werr != nil {
			return werr
		}
		var rep migration.ResumeReport
		if jerr := json.Unmarshal(out.Bytes(), &rep); err == nil {
			err = jerr
		}
		resident[i] = time.Since(start)
		return err
	})
	most := memory()
	if err != nil {
		return err
	}
	after, err := b.cached(false)
	if err != nil {
		return err
	}
	r.running, r.longest = append(r.running, measure.Median(running)), append(r.longest, longest(running))
	r.resident, r.last = append(r.resident, measure.Median(resident)), append(r.last, longest(resident))
	r.read, r.base = append(r.read, after.all-before.all), append(r.base, after.base-before.base)
	r.memory = append(r.memory, most)
	return nil
}

func longest(list []time.Duration) (most time.Duration) {
	for _, d := range list {
		most = max(most, d)
	}
	return most
}

// untilRuns waits until a guest runs.
func untilRuns(ctx context.Context, vm *qemutest.VM) error {
	for {
		state, err := qmp.QueryStatus(ctx, vm.QMP)
		if err != nil {
			return fmt.Errorf("%w\n%s", err, vm.Output())
		}
		if state.Running {
			return nil
		}
		time.Sleep(500 * time.Microsecond)
	}
}

// inCache is how many bytes of images are in the page cache.
type inCache struct{ all, base int64 }

// cached counts them; with drop they are taken out first.
func (b *bench) cached(drop bool) (n inCache, err error) {
	page := int64(os.Getpagesize())
	err = b.images(func(name string, f *os.File, size int64) error {
		if drop {
			if err := f.Sync(); err != nil {
				return err
			}
			if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
				return err
			}
		}
		m, err := unix.Mmap(int(f.Fd()), 0, int(size), unix.PROT_READ, unix.MAP_SHARED)
		if err != nil {
			return err
		}
		defer unix.Munmap(m)
		there := make([]byte, (size+page-1)/page)
		if err := mincore(m, there); err != nil {
			return err
		}
		for _, t := range there {
			if t&1 != 0 {
				n.all += page
				if filepath.Base(filepath.Dir(name)) == baseVM {
					n.base += page
				}
			}
		}
		return nil
	})
	return n, err
}

// watchServers adds up, again and again, what memory the servers of restores have, each
// shared page by its share (PSS). What it returns ends that and gives the largest sum.
func (b *bench) watchServers() (most func() int64) {
	stop, done := make(chan struct{}), make(chan int64)
	go func() {
		var largest int64
		for {
			select {
			case <-stop:
				done <- largest
				return
			case <-time.After(100 * time.Millisecond):
				largest = max(largest, b.servers())
			}
		}
	}()
	return func() int64 { close(stop); return <-done }
}

// servers is the PSS of all processes of ours that serve a restore, in bytes.
func (b *bench) servers() (sum int64) {
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return 0
	}
	for _, name := range lines {
		text, err := os.ReadFile(name)
		args := strings.Split(string(text), "\x00")
		if err != nil || len(args) < 2 || args[0] != b.binary || args[1] != "restore" {
			continue
		}
		rollup, err := os.ReadFile(filepath.Join(filepath.Dir(name), "smaps_rollup"))
		if err != nil {
			continue // it has ended
		}
		for line := range strings.Lines(string(rollup)) {
			if f := strings.Fields(line); len(f) == 3 && f[0] == "Pss:" {
				n, _ := strconv.ParseInt(f[1], 10, 64)
				sum += n << 10
			}
		}
	}
	return sum
}
