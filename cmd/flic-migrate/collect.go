package main

import (
	"runtime"
	"runtime/debug"
	"sync"
)

// collector is how often garbage is collected in this process.
var collector = collecting{percent: 100}

// collecting has two settings of the garbage collector, one until its first run and one
// from then on. It is safe for concurrent use.
type collecting struct {
	mu      sync.Mutex
	percent int  // from the first run on, as of debug.SetGCPercent
	begun   bool // that has been
}

// later has the first run wait until the heap has 16 MiB instead of 4. Most processes end
// before that; and while QEMU loads its devices in a lazy restore, every millisecond of
// its CPU counts (collections took 17 of 40 ms to running). After the first one all is
// as usual, because a large guest's tables must not take five times their size.
func (c *collecting) later() {
	debug.SetGCPercent(400)
	s := new(*byte) // has a pointer: others share their memory with what lives on
	runtime.AddCleanup(s, func(int) {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.begun = true
		debug.SetGCPercent(c.percent)
	}, 0)
}

// tight keeps the heap close to what is in use from the first run on. A save's and a
// restore's buffers are recycled, so the collector has little to do anyway, while twice
// the page map of a large guest would be memory that the guest needs.
func (c *collecting) tight() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.percent = 25; c.begun {
		debug.SetGCPercent(c.percent)
	}
}
