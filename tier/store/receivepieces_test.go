package store

import (
	"fmt"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/tier/source"
)

// TestPieceSlots cuts sets into pieces, and finds their numbers.
func TestPieceSlots(t *testing.T) {
	set := source.Ranges{{First: 1, Count: 3}, {First: 5, Count: 1}, {First: 8, Count: 4}}
	for n := uint64(1); n < 10; n++ {
		var all source.Ranges
		for rest := set; len(rest) > 0; {
			var now source.Ranges
			now, rest = firstOf(rest, n)
			if c := now.Count(); c > n || c < n && len(rest) > 0 {
				t.Errorf("%d of %d", c, n)
			}
			all = all.Union(now)
		}
		if fmt.Sprint(all) != fmt.Sprint(set) {
			t.Errorf("in pieces of %d: %v", n, all)
		}
	}
	at, next := ordinals(set), uint64(0)
	for n := range uint32(14) {
		got, ok := at(n)
		if has := set.Has(uint64(n), uint64(n)); ok != has || ok && got != next {
			t.Errorf("%d is number %d, %v", n, got, ok)
		}
		if ok {
			next++
		}
	}
	if _, ok := ordinals(nil)(0); ok {
		t.Error("a number is in nothing")
	}
}

// TestPieceSlotsMany: a set of as many ranges as a stream can have takes a moment.
func TestPieceSlotsMany(t *testing.T) {
	var set source.Ranges
	for n := range uint32(500_000) {
		set = append(set, source.Range{First: 2 * n, Count: 1})
	}
	begin := time.Now()
	for rest := set; len(rest) > 0; {
		_, rest = firstOf(rest, 1<<14)
	}
	at := ordinals(set)
	if err := set.Each(func(n uint32) error {
		if got, ok := at(n); !ok || got != uint64(n/2) {
			return fmt.Errorf("%d is number %d, %v", n, got, ok)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	if took := time.Since(begin); took > 20*time.Second {
		t.Errorf("it took %v", took)
	}
}
