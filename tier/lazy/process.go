package lazy

import (
	"runtime"
	"runtime/debug"
	"time"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
)

const (
	// threads is enough for all goroutines of a Serve.
	threads = 8
	// collectAfter is when the guest has asked for what it needs to go on.
	collectAfter = 2 * time.Second
	// heapFixed and heapPage are what Go's memory may take, so that with the program
	// itself a restore stays within 64 MiB and 32 bytes a page.
	heapFixed, heapPage = 40 << 20, 32
)

// TuneProcess makes Go's runtime fit for a process that is about to Serve c and does
// nothing else. The command calls it, and what measures in its place.
func TuneProcess(c *checkpoint.Checkpoint) {
	// The server's threads mostly wait. With as many as there are CPUs, one that
	// wakes up for a request would wait for Go's scheduler, up to 10 ms, and not
	// for the kernel's.
	runtime.GOMAXPROCS(max(runtime.NumCPU(), threads))
	limit := int64(heapFixed)
	for _, n := range c.Meta.BlockPages() {
		limit += heapPage * int64(n)
	}
	debug.SetMemoryLimit(limit)
	// The page map and the buffers would have the collector run six times in the
	// first tenth of a second, in which the guest waits for every page it touches.
	percent := debug.SetGCPercent(-1)
	time.AfterFunc(collectAfter, func() { debug.SetGCPercent(percent) })
}
