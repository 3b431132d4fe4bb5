package main

import (
	"runtime"
	"runtime/debug"
	"testing"
	"time"
)

// TestCollector asks for a tight heap before the first collection, as a verb does, and
// after it: the first is later than usual, and all others are as asked for.
func TestCollector(t *testing.T) {
	now := func() int {
		n := debug.SetGCPercent(100)
		debug.SetGCPercent(n)
		return n
	}
	defer debug.SetGCPercent(now())
	for _, early := range []bool{true, false} {
		c := &collecting{percent: 100}
		c.later()
		if early {
			c.tight()
			if n := now(); n <= 100 {
				t.Errorf("before the first collection: %d %%", n)
			}
		}
		runtime.GC()
		for limit := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
			c.mu.Lock()
			begun := c.begun
			c.mu.Unlock()
			if begun {
				break
			}
			if time.Now().After(limit) {
				t.Fatal("the first collection is not seen")
			}
		}
		if !early {
			c.tight()
		}
		if n := now(); n != 25 {
			t.Errorf("asked early %v: %d %% after the first collection", early, n)
		}
	}
}
