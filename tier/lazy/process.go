package lazy

import (
	"runtime"
	"runtime/debug"
	"sync"
	"time"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
)

const (
	// threads is enough for all goroutines of a Serve.
	threads = 8
	// collectAfter is when the guest has asked for what it needs to go on.
	collectAfter = 2 * time.Second
	// heapFixed and heapPage are what Go's memory may take for each restore, so that with
	// the program itself one stays within 64 MiB and 32 bytes a page.
	heapFixed, heapPage = 40 << 20, 32
)

// tuned is what this process's runtime was told.
var tuned struct {
	mu      sync.Mutex
	limit   int64 // of memory: all that was asked for
	young   int   // restores that began less than collectAfter ago
	percent int   // of the collector, to go back to when none is
}

// TuneProcess makes Go's runtime fit for a process that is about to Serve c. Who serves
// calls it, and what measures in its place: once for each checkpoint, since a process can
// serve several at the same time (the domains of a group), whose needs add up.
func TuneProcess(c *checkpoint.Checkpoint) {
	// The server's threads mostly wait. With as many as there are CPUs, one that
	// wakes up for a request would wait for Go's scheduler, up to 10 ms, and not
	// for the kernel's.
	runtime.GOMAXPROCS(max(runtime.NumCPU(), threads))
	tuned.mu.Lock()
	defer tuned.mu.Unlock()
	tuned.limit += heapFixed
	for _, n := range c.Meta.BlockPages() {
		tuned.limit += heapPage * int64(n)
	}
	debug.SetMemoryLimit(tuned.limit)
	// The page map and the buffers would have the collector run six times in the
	// first tenth of a second, in which the guest waits for every page it touches.
	if tuned.young++; tuned.young == 1 {
		tuned.percent = debug.SetGCPercent(-1)
	}
	time.AfterFunc(collectAfter, func() {
		tuned.mu.Lock()
		defer tuned.mu.Unlock()
		if tuned.young--; tuned.young > 0 {
			return
		}
		if p := debug.SetGCPercent(tuned.percent); p >= 0 {
			debug.SetGCPercent(p) // the program has set it meanwhile
		}
	})
}
