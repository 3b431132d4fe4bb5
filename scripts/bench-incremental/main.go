// Command bench-incremental makes a checkpoint of real guests every few seconds and
// prints Markdown tables of what increments cost.
//
//	go run ./scripts/bench-incremental [-only idle,files,sqlite,redis] [-n 10] [-memory 512M,1G,2G] [-every 5s] [-restores 7] [-used 0] [-keep DIR] [-armed [-round]]
//
// At each checkpoint the guest stands still and is saved four times through exec:, in
// turn: into a file; into nothing, by cat, which is as fast as QEMU feeds a pipe; by
// flic-migrate with --parent none; and with its parent. Each of the two has a store of
// its own, and --share none: full ones would have nothing of their own but for the first.
// Between two saves the guest runs for an instant, because QEMU wants it so.
//
// What page-granular increments would be comes from the streams in files: all
// pages with content that are not what they were one checkpoint before, compressed with
// LZ4, 32 to a block, and nothing beside them. Increments of ours are whole files: with
// devices, page map, digests and descriptions. Without compression, pages are compared
// with pages: what is stored of those, whole or in part, with those that have changed.
//
// In the end the last checkpoint of both stores is restored in turn, -restores times:
// eagerly, into nothing, and lazily, by resume into a QEMU, from the start of the command
// until the guest may run (lazily running). Reads are the distinct places, segments of
// whatever image, that a restore reads for each MB of pages. -keep leaves the streams in a
// directory, for go test -bench Encodings ./tier/delta.
//
// The guests use some 100 MB, whatever memory they have, and most of it is zero. -used has so
// many percent of the memory filled, beside that, with the mix of package guestmem, which does
// not change any more: of a guest that has run for long little is zero.
//
// -armed prints another table in place of these: checkpoints of running guests by
// checkpoint, full ones, increments, and those that were armed before. Guests have 8 KiB
// more than -memory says, because of QEMU 7.2, and not with -round, for QEMU from 9.0 on.
package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/pierrec/lz4/v4"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
	"github.com/flic-migrate/flic-migrate/scripts/measure"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
)

// workload is what a guest does.
type workload struct {
	name, what string
	start      string // command of the guest's console; "": none
	warm       time.Duration
	programs   bool // those of the disk of scripts/guest workloads are needed
}

var workloads = []workload{
	{name: "idle", what: "nothing but its clock", warm: 2 * time.Second},
	{
		name: "files", what: "reading the libraries of /usr, over and over",
		start: "run cat /usr/lib/x86_64-linux-gnu/*.so* >/dev/null; echo flic warm >/dev/console; " +
			"while :; do cat /usr/lib/x86_64-linux-gnu/*.so* >/dev/null; done",
		warm: 2 * time.Second,
	},
	{
		name: "sqlite", what: "SQLite, 20 000 rows, random UPDATE and SELECT by key, WAL",
		start: measure.SQLite,
		warm:  8 * time.Second,
	},
	{
		name: "redis", what: "Redis, 20 000 keys of 200 bytes, random SET and GET",
		start: "run redis-server --port 0 --unixsocket /tmp/s --save '' >/dev/null & sleep 3; " +
			"redis-benchmark -s /tmp/s -q -t set -r 20000 -n 40000 -d 200 -c 2 >/dev/null; echo flic warm >/dev/console; " +
			"exec redis-benchmark -s /tmp/s -q -l -t set,get -r 20000 -n 20000 -d 200 -c 2 >/dev/null",
		warm: 8 * time.Second, programs: true,
	},
}

func main() {
	b := &bench{}
	only := flag.String("only", "idle,files,sqlite,redis", "workloads")
	flag.IntVar(&b.n, "n", 10, "checkpoints of each guest after the first")
	sizes := flag.String("memory", "512M", "of the guests; several, separated by commas")
	flag.DurationVar(&b.every, "every", 5*time.Second, "for how long the guest runs between two checkpoints")
	flag.IntVar(&b.restores, "restores", 7, "restores of each kind, of which the medians are printed")
	flag.StringVar(&b.keep, "keep", "", "directory that the streams are left in")
	flag.StringVar(&b.codec, "codec", "minlz", "of flic-migrate")
	flag.IntVar(&b.used, "used", 0, "percent of the memory that is filled beside what the guests use")
	armed := flag.Bool("armed", false, "increments and armed checkpoints of running guests against full ones, and nothing else")
	flag.BoolVar(&b.round, "round", false, "with -armed, memory of just the size that -memory says")
	flag.Parse()
	if err := b.run(context.Background(), strings.Split(*only, ","), strings.Split(*sizes, ","), *armed); err != nil {
		fmt.Fprintln(os.Stderr, "bench-incremental:", err)
		os.Exit(1)
	}
}

// head is the head of the table of increments by content.
const head = `%d checkpoints after the first, %v apart, codec %s. Bytes and times of one are medians; ratios are of sums and of medians.

| guest | memory | pages changed | full, MB | by pages, LZ4, MB | increment, MB | to by pages | without compression | to full | cat >/dev/null, s | full, s | increment, s | to full | restore, to full | full: lazily running, ms | increment, to full | full: reads per MB | increment |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|
`

type bench struct {
	n, restores, used   int
	memory, keep, codec string
	every               time.Duration
	dir, binary         string
	round               bool
}

func (b *bench) run(ctx context.Context, only, sizes []string, armed bool) (err error) {
	if b.dir, err = os.MkdirTemp("", "bench-incremental"); err != nil {
		return err
	}
	defer os.RemoveAll(b.dir)
	b.binary = filepath.Join(b.dir, "flic-migrate")
	if err := qemutest.Build(ctx, b.binary); err != nil {
		return err
	}
	row := b.guest
	if armed {
		row = b.armed
		fmt.Printf(armedHead, b.n, b.every)
	} else {
		fmt.Printf(head, b.n, b.every, b.codec)
	}
	for _, w := range workloads {
		if !slices.Contains(only, w.name) {
			continue
		}
		for _, b.memory = range sizes {
			line, err := row(ctx, w)
			if err != nil {
				return fmt.Errorf("%s of %s: %w", w.name, b.memory, err)
			}
			fmt.Println(line)
		}
	}
	return nil
}

// save is one of the ways in which a guest is saved.
type save struct {
	command string
	times   []time.Duration
	bytes   []int64
}

func (b *bench) guest(ctx context.Context, w workload) (string, error) {
	dir := filepath.Join(b.dir, w.name)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	vm, err := b.boot(ctx, w)
	if err != nil {
		return "", err
	}
	defer vm.Kill()
	ours := func(store, parent string) *save {
		return &save{command: fmt.Sprintf("exec %s save --quiet --store %s/%s --vm vm --codec %s --parent %s --share none --report %s/report", b.binary, dir, store, b.codec, parent, dir)}
	}
	stream, cat := &save{command: "exec cat > " + dir + "/stream"}, &save{command: "exec cat > /dev/null"}
	full, inc := ours("full", "none"), ours("inc", "auto")
	var was *tiertest.Guest
	var changed, byPages, pageBytes, plain []int64 // plain: what ours have of pages, not compressed
	for i := range b.n + 1 {
		if i > 0 {
			time.Sleep(b.every)
		}
		if err := qmp.Stop(ctx, vm.QMP); err != nil {
			return "", err
		}
		for _, s := range []*save{stream, cat, full, inc} {
			took, err := measure.Save(ctx, vm, s.command)
			if err != nil {
				return "", err
			}
			if i == 0 {
				continue // nobody has a parent yet
			}
			s.times = append(s.times, took)
			if s == full || s == inc {
				r, err := measure.Report(dir + "/report")
				if err != nil {
					return "", err
				}
				s.bytes = append(s.bytes, r.FlashBytes)
				if s == inc {
					plain = append(plain, r.Cold*4096+r.DeltaBytes)
				}
			}
		}
		if err := qmp.Cont(ctx, vm.QMP); err != nil {
			return "", err
		}
		now, err := load(dir + "/stream")
		if err != nil {
			return "", err
		}
		if was != nil {
			n, raw, size := increment(was, now)
			changed, pageBytes, byPages = append(changed, n), append(pageBytes, raw), append(byPages, size)
		}
		was = now
		if b.keep != "" {
			if err := os.Rename(dir+"/stream", filepath.Join(b.keep, fmt.Sprintf("%s-%s-%02d.stream", w.name, b.memory, i))); err != nil {
				return "", err
			}
		}
	}
	vm.Kill() // it would go on beside what is measured
	r, err := b.restore(ctx, w, dir)
	if err != nil {
		return "", err
	}
	mb := func(v []int64) float64 { return float64(measure.Median(v)) / 1e6 }
	s := func(v []time.Duration) float64 { return measure.Median(v).Seconds() }
	return fmt.Sprintf("| %s: %s | %s | %d | %.1f | %.2f | %.2f | %.2f | %.2f | %.3f | %.3f | %.3f | %.3f | %.2f | %.2f | %.0f | %.2f | %.1f | %.1f |",
		w.name, w.what, b.memory, measure.Median(changed), mb(full.bytes), mb(byPages), mb(inc.bytes),
		float64(sum(inc.bytes))/float64(sum(byPages)), float64(sum(plain))/float64(sum(pageBytes)), float64(sum(inc.bytes))/float64(sum(full.bytes)),
		s(cat.times), s(full.times), s(inc.times), s(inc.times)/s(full.times), s(r[1].eager)/s(r[0].eager), s(r[0].lazy)*1e3, s(r[1].lazy)/s(r[0].lazy), r[0].perMB, r[1].perMB), nil
}

// restored is how the last checkpoint of a store was restored.
type restored struct {
	eager, lazy []time.Duration
	perMB       float64 // places read for each MB of pages
}

// restore restores the last checkpoints of both stores in turn: the full one's and the
// increment's.
func (b *bench) restore(ctx context.Context, w workload, dir string) (r [2]restored, err error) {
	config, err := b.config(ctx, w)
	if err != nil {
		return r, err
	}
	for i := range b.restores + 1 {
		for s, store := range []string{dir + "/full", dir + "/inc"} {
			took, err := measure.Restore(b.binary, store)
			if err != nil {
				return r, err
			}
			if i == 0 { // which brings it into the page cache
				reads, err := measure.Reads(b.binary, store)
				if err != nil {
					return r, err
				}
				r[s].perMB = reads.PerMB
				continue
			}
			r[s].eager = append(r[s].eager, took)
		}
	}
	for range b.restores {
		for s, store := range []string{dir + "/full", dir + "/inc"} {
			rep, took, err := measure.Resume(ctx, b.binary, store, config)
			if err == nil && !rep.Lazy {
				err = fmt.Errorf("it was resumed eagerly: %s", rep.Reason)
			}
			if err != nil {
				return r, err
			}
			r[s].lazy = append(r[s].lazy, took)
		}
	}
	return r, nil
}

func sum(v []int64) (n int64) {
	for _, x := range v {
		n += x
	}
	return n
}

// boot starts the guest and its workload.
func (b *bench) boot(ctx context.Context, w workload) (*qemutest.VM, error) {
	c, err := b.config(ctx, w)
	if err != nil {
		return nil, err
	}
	return measure.Boot(ctx, c, w.start, w.warm)
}

// config is the guest's machine.
func (b *bench) config(ctx context.Context, w workload) (qemutest.Config, error) {
	memory, err := kib(b.memory)
	if err != nil {
		return qemutest.Config{}, err
	}
	fill := max(4, memory>>10*b.used/100)
	c := qemutest.Config{Guest: qemutest.Debian, Memory: b.memory, Kernel: fmt.Sprintf("flic.fill=%d flic.read=/usr flic.readmax=100", fill)}
	if !w.programs {
		return c, nil
	}
	assets, err := qemutest.Assets(ctx, "workloads")
	c.Disk = filepath.Join(assets, "disk.ext4")
	return c, err
}

func load(name string) (*tiertest.Guest, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return tiertest.Load(f)
}

// increment is how many pages have changed, and what those with content come to, as they
// are and compressed.
func increment(was, now *tiertest.Guest) (changed, raw, size int64) {
	zero := make([]byte, now.PageSize)
	var block []byte
	var c lz4.Compressor
	flush := func() {
		out := make([]byte, lz4.CompressBlockBound(len(block)))
		if n, err := c.CompressBlock(block, out); err == nil && n > 0 && n < len(block) {
			size += int64(n)
		} else {
			size += int64(len(block))
		}
		block = block[:0]
	}
	for b := range now.Blocks {
		for p := range (now.Blocks[b].Used + uint64(now.PageSize) - 1) / uint64(now.PageSize) {
			id := tiertest.PageID{Block: b, Page: p}
			page := now.Pages[id]
			if page == nil || bytes.Equal(page, was.Pages[id]) {
				continue
			}
			if changed++; bytes.Equal(page, zero) {
				continue
			}
			raw += int64(len(page))
			if block = append(block, page...); len(block) >= 32*now.PageSize {
				flush()
			}
		}
	}
	flush()
	return changed, raw, size
}
