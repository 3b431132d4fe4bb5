// Command workingset measures how good the working sets are that tracking finds,
// in real guests under load, and prints Markdown tables (docs/lab/working-set.md has
// those of one machine).
//
//	go run ./scripts/workingset [-only redis,sqlite,files,known] [-rate MB/s] [-memory KiB]
//
// For each workload and each beta:
//
//	running guest ──► rounds by equation (1): T, working set ──► stop ──► stream
//	stream ──► new QEMU, runs for T: QEMU's dirty log, and memory compared    = written
//	stream ──► lazy restore, everything held back, runs for T/beta = N_non/r  = touched
//
// N_non/r is the time for which the guest has to live on its working set while
// flash gives back the rest. The three guests are independent of each other
// after the stop; what they have in common is the workload.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
)

// workload is what a guest does.
type workload struct {
	name   string
	what   string
	start  string        // command of the guest's console
	waits  bool          // until the command has said "flic warm"
	warm   time.Duration // from then on until it does what it goes on doing
	buffer int           // MiB of known content
}

// The guests have no clock that runs at the host's pace and no CPU as fast, so
// the programs are as busy as they can be; what they touch is what matters.
var workloads = []workload{
	{
		name: "redis", what: "in-memory database: Redis, 20 000 keys of 200 bytes, random SET and GET",
		start: "run redis-server --port 0 --unixsocket /tmp/s --save '' >/dev/null & sleep 3; " +
			"redis-benchmark -s /tmp/s -q -t set -r 20000 -n 40000 -d 200 -c 2 >/dev/null; echo flic warm >/dev/console; " +
			"exec redis-benchmark -s /tmp/s -q -l -t set,get -r 20000 -n 20000 -d 200 -c 2 >/dev/null",
		waits: true, warm: 8 * time.Second, buffer: 4,
	},
	{
		name: "sqlite", what: "SQL database: SQLite, 20 000 rows, random UPDATE and SELECT by key, WAL",
		start: "run sqlite3 /tmp/d 'PRAGMA journal_mode=WAL; CREATE TABLE t(id INTEGER PRIMARY KEY, n INT, s TEXT); " +
			"WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM c WHERE x<20000) INSERT INTO t SELECT x, 0, hex(randomblob(100)) FROM c;' >/dev/null; " +
			"echo flic warm >/dev/console; " +
			"yes 'UPDATE t SET n=n+1 WHERE id=1+abs(random())%20000; SELECT s FROM t WHERE id=1+abs(random())%20000;' | sqlite3 /tmp/d >/dev/null",
		waits: true, warm: 8 * time.Second, buffer: 4,
	},
	{
		name: "files", what: "file reading: the libraries of /usr, over and over, from the page cache",
		start: "run cat /usr/lib/x86_64-linux-gnu/*.so* >/dev/null; echo flic warm >/dev/console; " +
			"while :; do cat /usr/lib/x86_64-linux-gnu/*.so* >/dev/null; done",
		waits: true, warm: 2 * time.Second, buffer: 4,
	},
	{
		name: "known", what: "known pages: 3000 of a buffer of 4096 pages, each written every 10 ms",
		start: "touch 500 3000", warm: 2 * time.Second, buffer: 16,
	},
}

func main() {
	if spec := os.Getenv(childEnv); spec != "" {
		if err := runChild(context.Background(), spec); err != nil {
			fmt.Fprintln(os.Stderr, "child:", err)
			os.Exit(1)
		}
		return
	}
	var names []string
	for _, w := range workloads {
		names = append(names, w.name)
	}
	only := flag.String("only", strings.Join(names, ","), "workloads")
	betas := flag.String("betas", "2,3,4", "safety factors")
	rate := flag.Float64("rate", 100, "how fast flash is read, MB/s")
	memory := flag.Int("memory", 196616, "of the guests, KiB; a multiple of 256 would lose dirty pages")
	flag.Parse()
	if err := run(context.Background(), strings.Split(*only, ","), strings.Split(*betas, ","), *rate*1e6, *memory); err != nil {
		fmt.Fprintln(os.Stderr, "workingset:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, only, betas []string, rate float64, memory int) error {
	dir, err := os.MkdirTemp("", "workingset")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	image, err := qemutest.Assets(ctx, "workloads")
	if err != nil {
		return err
	}
	fmt.Printf("Guests of %d MiB, r = %.0f MB/s.\n\n", memory>>10, rate/1e6)
	fmt.Println("| workload | beta | alpha, pages/s | T, s | rounds | in the set | written in T after the resume | size off by | hit rate, written | touched in T/beta | hit rate, touched | with one resume learned |")
	fmt.Println("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
	var all []result
	for _, name := range only {
		i := slices.IndexFunc(workloads, func(w workload) bool { return w.name == name })
		if i < 0 {
			return fmt.Errorf("no workload %q", name)
		}
		e := &evaluation{
			ctx: ctx, dir: dir, work: workloads[i], rate: rate,
			config: qemutest.Config{
				Guest: qemutest.Linux, Memory: fmt.Sprint(memory, "K"), Disk: image + "/disk.ext4",
				Kernel: fmt.Sprint("flic.fill=", workloads[i].buffer),
			},
		}
		if err := e.boot(); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		for _, b := range betas {
			var beta float64
			if _, err := fmt.Sscan(b, &beta); err != nil {
				return err
			}
			r, err := e.measure(beta)
			if err != nil {
				e.vm.Kill()
				return fmt.Errorf("%s, beta %v: %w\n%s", name, beta, err, e.vm.Output())
			}
			fmt.Println(r)
			all = append(all, r)
		}
		e.vm.Kill()
	}
	var off, hit float64
	for _, r := range all {
		off += abs(r.off())
		hit += r.hitWritten()
	}
	n := float64(len(all))
	fmt.Printf("\nOn average the size is off by %.1f %%, and the hit rate of written pages is %.2f %%.\n", off/n*100, hit/n*100)
	return nil
}

func abs(x float64) float64 { return max(x, -x) }
