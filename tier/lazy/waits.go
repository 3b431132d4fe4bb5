package lazy

import (
	"math/bits"
	"time"
)

// waits counts how long guests waited, in bins of at most 1/128 of the time, so
// that a guest that asks for each of its pages takes no more memory than another.
// The zero value is ready.
type waits struct {
	bins [(64 - 7 + 1) * bin]uint32
	n    int
	max  time.Duration
}

// bin is the number of bins for each doubling of the time.
const bin = 128

func (w *waits) add(d time.Duration) {
	d = max(d, 0)
	w.max = max(w.max, d)
	w.n++
	w.bins[binOf(uint64(d))]++
}

// binOf: times up to 255 have bins of their own; each doubling after that has as many
// bins as the one before.
func binOf(ns uint64) int {
	shift := max(bits.Len64(ns), 8) - 8
	return shift*bin + int(ns>>shift)
}

// percentile is the least time that p of 100 waits do not exceed, as its bin
// begins; 0 without waits.
func (w *waits) percentile(p int) time.Duration {
	left := w.n*p/100 + 1
	for i, n := range w.bins {
		if left -= int(n); left <= 0 {
			shift := max(i/bin-1, 0)
			return time.Duration(i-shift*bin) << shift
		}
	}
	return w.max
}
