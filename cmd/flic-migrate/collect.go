package main

import (
	"runtime"
	"runtime/debug"
)

// gcPercent keeps the heap close to what is in use. A save's and a restore's buffers are
// recycled, so the collector has little to do anyway, while twice the page map of a large
// guest would be memory that the guest needs.
const gcPercent = 25

// collectLater has the first garbage collection of this process wait until the heap has
// 16 MiB instead of 4, and sets gcPercent for all others. Most processes end before that;
// and while QEMU loads its devices in a lazy restore, every millisecond of its CPU counts
// (collections took 17 of 40 ms to running).
func collectLater() {
	debug.SetGCPercent(400)
	s := new(*byte) // has a pointer: others share their memory with what lives on
	runtime.AddCleanup(s, func(int) { debug.SetGCPercent(gcPercent) }, 0)
}
