// Command bench compares flic-migrate with what people pipe QEMU's migration
// streams through today, and prints Markdown tables.
//
//	go run ./scripts/bench [-runs 5] [-qemu=false] [-streams GLOB] [-increments] [-disk FILE]
//
// First recorded streams: each tool reads the stream from a pipe that is
// fed from memory, as QEMU does, and writes a file that is synced; then each
// gives it back into a pipe. Then a real, paused QEMU of 512 MB with a warm page
// cache saves through exec: of each tool, and a new one restores.
//
// With -increments flic-migrate is also measured with the checkpoint before as the parent,
// of which nothing has changed, and with -disk with pages on disk images that it looks in.
//
// Tools take turns (A B C A B C …), so that a machine whose speed drifts slows
// all of them; the figures are medians, and ratios are of medians.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
)

// tool is a way to save and restore a stream. Both are shell commands; $F is
// the file or store to use.
type tool struct {
	name, save, restore string
	clean               string // removes what save has made, if it is more than a file
	prepare             string // is run before the first save; may be empty
}

// fresh removes what the last run has written. A store stays, as it does with
// its users.
func (t tool) fresh(f string) error {
	if t.clean == "" {
		return os.RemoveAll(f)
	}
	if _, err := os.Stat(f); err != nil {
		return shell(t.prepare, f)
	}
	return shell(t.clean, f)
}

// shell runs a command of a tool's.
func shell(command, f string) error {
	cmd := exec.Command("/bin/sh", "-c", command)
	cmd.Env = append(os.Environ(), "F="+f)
	cmd.Stderr = os.Stderr
	return cmd.Run()
}

// size of what a tool has written.
func (t tool) size(f string) int64 {
	var n int64
	filepath.Walk(f, func(_ string, info os.FileInfo, err error) error {
		if err == nil && info.Mode().IsRegular() {
			n += info.Size()
		}
		return nil
	})
	return n
}

// tools are ours in binary, with each of its codecs, another build of ours if there
// is one, and what else people use. Increments and disks are of both builds.
func tools(binary, other string, increments bool, disks string) []tool {
	ours := func(name, binary, flags string) tool {
		return tool{
			name: name, save: "exec " + binary + " save --quiet --store $F --vm vm" + flags,
			restore: "exec " + binary + " restore --quiet --store $F vm",
			clean:   "exec " + binary + " rm --all --store $F vm > /dev/null",
		}
	}
	list := []tool{
		ours("flic-migrate", binary, ""),
		ours("flic-migrate zstd", binary, " --codec zstd"),
		ours("flic-migrate lz4", binary, " --codec lz4"),
	}
	builds := map[string]string{"flic-migrate": binary}
	if other != "" {
		builds["other"] = other
		list = append(list, ours("other", other, ""))
	}
	for _, name := range slices.Sorted(maps.Keys(builds)) {
		if increments {
			t := ours(name+", increment", builds[name], " --share none")
			t.clean = ":"
			list = append(list, t)
		}
		if disks != "" {
			t := ours(name+", disk", builds[name], " --share none --disk "+disks)
			t.prepare = "exec " + builds[name] + " disk index --quiet --store $F " + strings.ReplaceAll(disks, ":", " ") + " > /dev/null"
			list = append(list, t)
		}
	}
	for _, c := range [][3]string{
		{"cat", "cat", "cat"},
		{"lz4", "lz4 -c", "lz4 -dc"},
		{"lzop", "lzop -c", "lzop -dc"},
		{"gzip -1", "gzip -1 -c", "gzip -dc"},
		{"zstd -1 -T2", "zstd -q -1 -T2 -c", "zstd -q -dc"},
		{"zstd -3 -T2", "zstd -q -3 -T2 -c", "zstd -q -dc"},
	} {
		list = append(list, tool{name: c[0], save: c[1] + " > $F && sync $F", restore: "exec " + c[2] + " < $F"})
	}
	return list
}

// sample is what one run took.
type sample struct {
	wall, cpu time.Duration
	rss       int64 // bytes, peak of the largest process
	bytes     int64 // written
}

type results map[string][]sample

func median[T int64 | time.Duration](s []sample, f func(sample) T) T {
	var v []T
	for _, x := range s {
		v = append(v, f(x))
	}
	slices.Sort(v)
	return v[len(v)/2]
}

func wall(s sample) time.Duration { return s.wall }

func (r results) print(title string, tools []tool, base string, extended bool) {
	fmt.Printf("\n**%s** (medians of %d runs; ratio: wall time, %s = 1)\n\n", title, len(r[tools[0].name]), base)
	if extended {
		fmt.Print("| tool | wall s | ratio | CPU s | peak MiB | MB written |\n|---|---:|---:|---:|---:|---:|\n")
	} else {
		fmt.Print("| tool | wall s | ratio | MB written |\n|---|---:|---:|---:|\n")
	}
	b := median(r[base], wall)
	for _, t := range tools {
		s := r[t.name]
		w := median(s, wall)
		fmt.Printf("| %s | %.3f | %.2f |", t.name, w.Seconds(), w.Seconds()/b.Seconds())
		if extended {
			fmt.Printf(" %.3f | %.0f |", median(s, func(s sample) time.Duration { return s.cpu }).Seconds(),
				float64(median(s, func(s sample) int64 { return s.rss }))/(1<<20))
		}
		fmt.Printf(" %.1f |\n", float64(median(s, func(s sample) int64 { return s.bytes }))/1e6)
	}
}

func main() {
	runs := flag.Int("runs", 5, "counted runs of each tool")
	withQEMU := flag.Bool("qemu", true, "also with a real QEMU")
	streams := flag.String("streams", "", "recorded streams, as a glob (default: those in testdata and one of a 512 MB guest)")
	other := flag.String("other", "", "another build of flic-migrate, to compare with")
	only := flag.String("only", "", "compare with these tools only, separated by commas")
	increments := flag.Bool("increments", false, "also increments in which nothing has changed")
	disks := flag.String("disk", "", "also with pages looked for in these disk images, separated by colons")
	flag.Parse()
	tools := func(binary string) []tool { return tools(binary, *other, *increments, *disks) }
	if err := run(*runs, *withQEMU, *streams, *only, tools); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(runs int, withQEMU bool, glob, only string, tools func(binary string) []tool) error {
	root, err := qemutest.ModuleRoot()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "bench")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	binary := filepath.Join(dir, "flic-migrate")
	if err := qemutest.Build(context.Background(), binary); err != nil {
		return err
	}
	list := tools(binary)
	if only != "" {
		names := append(strings.Split(only, ","), "flic-migrate", "other", "lz4")
		list = slices.DeleteFunc(list, func(t tool) bool {
			name, _, _ := strings.Cut(t.name, ", ")
			return !slices.Contains(names, name)
		})
	}
	b := &bench{dir: dir, runs: runs, tools: list}
	if withQEMU {
		if err := b.qemu(); err != nil {
			return err
		}
	}
	if glob == "" {
		glob = filepath.Join(root, "testdata", "*.stream.zst")
	}
	files, err := filepath.Glob(glob)
	if err != nil {
		return err
	}
	if b.recorded != "" {
		files = append([]string{b.recorded}, files...)
	}
	for _, f := range files {
		if strings.Contains(f, ".refused.") {
			continue
		}
		if err := b.stream(f); err != nil {
			return fmt.Errorf("%s: %w", f, err)
		}
	}
	return nil
}

type bench struct {
	dir      string
	runs     int
	tools    []tool
	recorded string // the 512 MB guest's stream
}

func (b *bench) file(t tool) string {
	return filepath.Join(b.dir, strings.ReplaceAll(t.name, " ", "")+".out")
}

// stream measures one recorded stream.
func (b *bench) stream(name string) error {
	data, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	if strings.HasSuffix(name, ".zst") {
		d, err := zstd.NewReader(nil)
		if err != nil {
			return err
		}
		if data, err = d.DecodeAll(data, nil); err != nil {
			return err
		}
	}
	saves, restores := make(results), make(results)
	for i := range b.runs + 1 {
		for _, t := range b.tools {
			f := b.file(t)
			if err := t.fresh(f); err != nil {
				return err
			}
			s, err := measure(t.save, f, data)
			if err != nil {
				return fmt.Errorf("%s: %w", t.name, err)
			}
			s.bytes = t.size(f)
			r, err := measure(t.restore, f, nil)
			if err != nil {
				return fmt.Errorf("%s: %w", t.name, err)
			}
			r.bytes = int64(len(data))
			if i > 0 { // the first round warms up
				saves[t.name], restores[t.name] = append(saves[t.name], s), append(restores[t.name], r)
			}
		}
	}
	title := fmt.Sprintf("%s, %.1f MB", filepath.Base(name), float64(len(data))/1e6)
	saves.print("Save of "+title, b.tools, "lz4", true)
	restores.print("Restore of "+title, b.tools, "lz4", true)
	return nil
}

// measure runs a shell command with data on a pipe as its input, or its output
// read from a pipe, and waits for its end.
func measure(command, file string, data []byte) (sample, error) {
	// A process that is forked from this one starts with its size as peak, so
	// the peak is taken by a small process in between.
	usage := file + ".time"
	defer os.Remove(usage)
	cmd := exec.Command("/usr/bin/time", "-o", usage, "-f", "%M", "/bin/sh", "-c", command)
	cmd.Env = append(os.Environ(), "F="+file)
	cmd.Stderr = os.Stderr
	start := time.Now()
	if data != nil {
		in, err := cmd.StdinPipe()
		if err != nil {
			return sample{}, err
		}
		if err := cmd.Start(); err != nil {
			return sample{}, err
		}
		for len(data) > 0 {
			// QEMU writes up to 64 pieces of memory with one call.
			n := min(len(data), 128<<10)
			if _, err := in.Write(data[:n]); err != nil {
				return sample{}, errors.Join(err, cmd.Wait())
			}
			data = data[n:]
		}
		in.Close()
	} else {
		out, err := cmd.StdoutPipe()
		if err != nil {
			return sample{}, err
		}
		if err := cmd.Start(); err != nil {
			return sample{}, err
		}
		// QEMU reads 32 KiB at a time. Hide the pipe from io.Copy, which
		// would splice.
		if _, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{out}, make([]byte, 32<<10)); err != nil {
			return sample{}, err
		}
	}
	if err := cmd.Wait(); err != nil {
		return sample{}, err
	}
	s := sample{wall: time.Since(start), cpu: cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()}
	b, err := os.ReadFile(usage)
	if err != nil {
		return sample{}, err
	}
	kib, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
	s.rss = kib << 10
	return s, err
}

// qemu measures a real guest, and records its stream.
func (b *bench) qemu() error {
	ctx := context.Background()
	vm, err := qemutest.Launch(ctx, debian)
	if err != nil {
		return err
	}
	defer vm.Kill()
	boot, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	if _, err := vm.Expect(boot, `flic ready`); err != nil {
		return err
	}
	if err := qmp.Stop(ctx, vm.QMP); err != nil {
		return err
	}
	// Nothing but the tool is to be the limit.
	if err := migration.SetParameters(ctx, vm.QMP, map[string]any{"max-bandwidth": int64(100 << 30)}); err != nil {
		return err
	}
	b.recorded = filepath.Join(b.dir, "debian-512M.stream")
	saves, restores := make(results), make(results)
	if _, err := b.save(ctx, vm, "cat > $F", b.recorded); err != nil {
		return err
	}
	for i := range b.runs + 1 {
		for _, t := range b.tools {
			f := b.file(t)
			if err := t.fresh(f); err != nil {
				return err
			}
			s, err := b.save(ctx, vm, t.save, f)
			if err != nil {
				return fmt.Errorf("%s: %w", t.name, err)
			}
			s.bytes = t.size(f)
			if i > 0 {
				saves[t.name] = append(saves[t.name], s)
			}
		}
	}
	for i := range b.runs + 1 {
		for _, t := range b.tools {
			s, err := b.restore(ctx, t.restore, b.file(t))
			if err != nil {
				return fmt.Errorf("%s: %w", t.name, err)
			}
			s.bytes = 0
			if i > 0 {
				restores[t.name] = append(restores[t.name], s)
			}
		}
	}
	saves.print("Save of a paused 512 MB guest: migrate exec: to completed", b.tools, "lz4", false)
	restores.print("Restore of it: migrate-incoming exec: to the end of inmigrate", b.tools, "lz4", false)
	return nil
}

// debian is a guest of 512 MB that has read a part of its /usr, so that about
// 250 MB of its RAM are not zero.
var debian = qemutest.Config{Guest: qemutest.Debian, Memory: "512M", Kernel: "flic.fill=4 flic.read=/usr flic.readmax=135"}

// save migrates the paused guest and makes it fit for the next migration.
func (b *bench) save(ctx context.Context, vm *qemutest.VM, command, file string) (sample, error) {
	start := time.Now()
	_, err := vm.Save(ctx, "exec:"+strings.ReplaceAll(command, "$F", "'"+file+"'"))
	s := sample{wall: time.Since(start)}
	if err != nil {
		return s, err
	}
	// Only a guest that has run on can be migrated again.
	return s, errors.Join(qmp.Cont(ctx, vm.QMP), qmp.Stop(ctx, vm.QMP))
}

func (b *bench) restore(ctx context.Context, command, file string) (sample, error) {
	config := debian
	config.Incoming = "defer"
	config.Paused = true
	vm, err := qemutest.Launch(ctx, config)
	if err != nil {
		return sample{}, err
	}
	defer vm.Kill()
	start := time.Now()
	if err := migration.Incoming(ctx, vm.QMP, "exec:"+strings.ReplaceAll(command, "$F", "'"+file+"'")); err != nil {
		return sample{}, err
	}
	if _, err := migration.Wait(ctx, vm.QMP); err != nil {
		return sample{}, fmt.Errorf("%w\n%s", err, vm.Output())
	}
	return sample{wall: time.Since(start)}, nil
}
