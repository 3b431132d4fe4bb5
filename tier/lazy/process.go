package lazy

import (
	"runtime"
	"runtime/debug"
	"time"
)

const (
	// threads is enough for all goroutines of a Serve.
	threads = 8
	// collectAfter is when the guest has asked for what it needs to go on, and
	// collectAbove how many bytes of memory are too many to wait for that.
	collectAfter, collectAbove = 2 * time.Second, 256 << 20
)

// TuneProcess makes Go's runtime fit for a process that is about to Serve and does
// nothing else. The command calls it, and what measures in its place.
func TuneProcess() {
	// The server's threads mostly wait. With as many as there are CPUs, one that
	// wakes up for a request would wait for Go's scheduler, up to 10 ms, and not
	// for the kernel's.
	runtime.GOMAXPROCS(max(runtime.NumCPU(), threads))
	// The page map and the buffers would have the collector run six times in the
	// first tenth of a second, in which the guest waits for every page it touches.
	percent, limit := debug.SetGCPercent(-1), debug.SetMemoryLimit(collectAbove)
	time.AfterFunc(collectAfter, func() {
		debug.SetGCPercent(percent)
		debug.SetMemoryLimit(limit)
	})
}
