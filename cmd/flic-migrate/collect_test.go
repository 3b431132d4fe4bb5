package main

import (
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"testing"
	"time"
)

// TestCollector: the first collection is later than usual, and all others keep the heap
// tight, whatever the verb.
func TestCollector(t *testing.T) {
	now := func() uint64 {
		s := []metrics.Sample{{Name: "/gc/gogc:percent"}}
		metrics.Read(s)
		return s[0].Value.Uint64()
	}
	defer debug.SetGCPercent(int(now()))
	collectLater()
	if n := now(); n <= 100 {
		t.Errorf("before the first collection: %d %%", n)
	}
	runtime.GC()
	for limit := time.Now().Add(10 * time.Second); now() != gcPercent; time.Sleep(time.Millisecond) {
		if time.Now().After(limit) {
			t.Fatalf("%d %% after the first collection", now())
		}
	}
}
