// Command bench-libvirt compares virsh save and restore through flic-migrate with
// libvirt's own formats, and prints a Markdown table.
//
//	go run ./scripts/bench-libvirt [-runs 5] [-only raw]
//
// A paused Debian guest of 512 MB, the one of scripts/bench, is a domain of a
// libvirtd in namespaces of its own. Each round saves and restores it in each
// format once, so that a machine whose speed drifts slows all of them; libvirtd is
// restarted for each, because it reads the format when it starts. The time is
// virsh's, from start to end, with libvirt's sync of the file.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
)

// format is a value of save_image_format, with or without flic-migrate in front
// of the program of that name.
type format struct {
	name, value string
	ours        bool
}

var formats = []format{
	{"flic-migrate", "lzop", true},
	{"raw", "raw", false},
	{"lzop", "lzop", false},
	{"gzip", "gzip", false},
}

type sample struct {
	save, restore time.Duration
	bytes         int64
}

const domain = "debian"

func main() {
	runs := flag.Int("runs", 5, "counted rounds")
	only := flag.String("only", "", "compare with these formats only, separated by commas, and with lzop")
	flag.Parse()
	if *only != "" {
		names := append(strings.Split(*only, ","), "flic-migrate", "lzop")
		formats = slices.DeleteFunc(formats, func(f format) bool { return !slices.Contains(names, f.name) })
	}
	if err := run(context.Background(), *runs); err != nil {
		fmt.Fprintln(os.Stderr, "bench-libvirt:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, runs int) error {
	const links = "wrapper"
	l, err := qemutest.LaunchLibvirt(qemutest.LibvirtConfig{Path: []string{links}, Env: []string{"FLIC_CONFIG=/dev/null"}})
	if err != nil {
		return err
	}
	defer l.Kill()
	binary := filepath.Join(l.Dir, "flic-migrate")
	if err := qemutest.Build(ctx, binary); err != nil {
		return err
	}
	if err := os.Mkdir(filepath.Join(l.Dir, links), 0o755); err != nil {
		return err
	}
	err = l.Define(ctx, qemutest.Domain{Name: domain, Guest: qemutest.Debian, Memory: "524288", Kernel: "flic.fill=4 flic.read=/usr flic.readmax=135"})
	if err != nil {
		return err
	}
	if _, err := l.Virsh("start", domain); err != nil {
		return err
	}
	if err := l.ExpectReady(ctx, domain); err != nil {
		return err
	}
	if _, err := l.Virsh("suspend", domain); err != nil {
		return err
	}
	conf := filepath.Join(l.Dir, "etc/libvirt/qemu.conf")
	base, err := os.ReadFile(conf)
	if err != nil {
		return err
	}
	samples := make(map[string][]sample)
	for i := range runs + 1 { // the first round warms up
		for _, f := range formats {
			link := filepath.Join(l.Dir, links, f.value)
			os.Remove(filepath.Join(l.Dir, links, "lzop"))
			if f.ours {
				if err := os.Symlink(binary, link); err != nil {
					return err
				}
			}
			text := string(base) + "save_image_format = \"" + f.value + "\"\n"
			if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
				return err
			}
			if err := l.RestartDaemon(); err != nil {
				return err
			}
			s, err := measure(l)
			if err != nil {
				return fmt.Errorf("%s: %w", f.name, err)
			}
			if i > 0 {
				samples[f.name] = append(samples[f.name], s)
			}
		}
	}
	print(samples, runs)
	return nil
}

// measure saves the domain and restores it.
func measure(l *qemutest.Libvirt) (s sample, err error) {
	file := filepath.Join(l.Dir, "debian.save")
	defer os.Remove(file)
	start := time.Now()
	if _, err := l.Virsh("save", domain, file); err != nil {
		return s, err
	}
	s.save = time.Since(start)
	fi, err := os.Stat(file)
	if err != nil {
		return s, err
	}
	s.bytes = fi.Size()
	start = time.Now()
	_, err = l.Virsh("restore", file)
	s.restore = time.Since(start)
	return s, err
}

func print(samples map[string][]sample, runs int) {
	median := func(name string, f func(sample) time.Duration) float64 {
		var v []time.Duration
		for _, s := range samples[name] {
			v = append(v, f(s))
		}
		slices.Sort(v)
		return v[len(v)/2].Seconds()
	}
	save := func(s sample) time.Duration { return s.save }
	restore := func(s sample) time.Duration { return s.restore }
	fmt.Printf("\n**virsh save and restore of a paused 512 MB guest** (medians of %d rounds; ratio: wall time, lzop = 1)\n\n", runs)
	fmt.Println("| format | save s | ratio | restore s | ratio | MB |")
	fmt.Println("|---|---:|---:|---:|---:|---:|")
	for _, f := range formats {
		fmt.Printf("| %s | %.2f | %.2f | %.2f | %.2f | %.1f |\n", f.name,
			median(f.name, save), median(f.name, save)/median("lzop", save),
			median(f.name, restore), median(f.name, restore)/median("lzop", restore),
			float64(samples[f.name][0].bytes)/1e6)
	}
}
