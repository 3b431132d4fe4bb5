package lazy

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// TestWaits compares with the percentiles of all values, sorted.
func TestWaits(t *testing.T) {
	var none waits
	if none.percentile(50) != 0 || none.percentile(99) != 0 {
		t.Error("waits without a wait")
	}
	r := rand.New(rand.NewPCG(1, 1))
	for _, scale := range []int64{1, 300, 100_000, 1e9, 1 << 62} {
		for _, n := range []int{1, 2, 100, 5000} {
			var w waits
			var all []time.Duration
			for range n {
				d := time.Duration(r.Int64N(scale))
				w.add(d)
				all = append(all, d)
			}
			slices.Sort(all)
			if w.max != all[n-1] {
				t.Errorf("the longest is %v, want %v", w.max, all[n-1])
			}
			for _, p := range []int{50, 99} {
				got, want := w.percentile(p), all[n*p/100]
				if got > want || want-got > want/bin {
					t.Errorf("%d waits up to %d ns: the percentile %d is %d, want %d", n, scale, p, got, want)
				}
			}
		}
	}
}
