package source_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/tier/source"
)

// TestRanges compares sets with lists of numbers.
func TestRanges(t *testing.T) {
	for seed := range uint64(50) {
		rng := rand.New(rand.NewPCG(seed, 2))
		const end = 300
		var have [end + 1]bool
		var set source.Ranges
		var list []uint32
		for n := range uint32(end) {
			if rng.IntN(10) < int(seed%10) {
				have[n] = true
				set = set.Add(n)
				list = append(list, n)
				if rng.IntN(2) == 0 {
					set = set.Add(n)
				}
			}
		}
		var got []uint32
		if err := set.Each(func(n uint32) error { got = append(got, n); return nil }); err != nil || !slices.Equal(got, list) {
			t.Fatalf("%v is %v, want %v", set, got, list)
		}
		if set.Count() != uint64(len(list)) {
			t.Errorf("%d numbers, want %d", set.Count(), len(list))
		}
		for first := range uint64(end) {
			for last, all := first, true; last < end; last++ {
				if all = all && have[last]; set.Has(first, last) != all {
					t.Fatalf("%v has %d to %d: %v", set, first, last, !all)
				}
			}
		}
		var other source.Ranges
		for n := range uint32(end) {
			if rng.IntN(10) < int(seed/10) {
				other = other.Add(n)
			}
		}
		both := set.Union(other)
		rest := set.Minus(other)
		for n := range uint64(end) {
			if rest.Has(n, n) != (set.Has(n, n) && !other.Has(n, n)) {
				t.Fatalf("%v without %v are %v", set, other, rest)
			}
			last := min(n+n%9, end-1)
			some := set.Within(n, last)
			for m := range uint64(end) {
				if some.Has(m, m) != (set.Has(m, m) && n <= m && m <= last) {
					t.Fatalf("of %v those from %d to %d are %v", set, n, last, some)
				}
			}
		}
		for n := range uint64(end) {
			if both.Has(n, n) != (set.Has(n, n) || other.Has(n, n)) {
				t.Fatalf("%v and %v are %v", set, other, both)
			}
			if last := n + n%7; both.Meets(n, last) != slices.ContainsFunc(both, func(r source.Range) bool {
				return uint64(r.First) <= last && r.End() > n
			}) {
				t.Fatalf("%v meets %d to %d: %v", both, n, last, both.Meets(n, last))
			}
		}
		for i := 1; i < len(both); i++ {
			if both[i-1].End() >= uint64(both[i].First) {
				t.Fatalf("ranges touch: %v", both)
			}
		}
		if set.Has(5, 4) {
			t.Error("it has what is no range")
		}
		for most := 1; most <= len(set); most++ {
			coarse := set.Coarse(most)
			if len(coarse) != most {
				t.Fatalf("%d ranges of %d are %d", most, len(set), len(coarse))
			}
			for _, r := range set {
				if !coarse.Has(uint64(r.First), r.End()-1) {
					t.Fatalf("%v in %d ranges, %v, lacks %v", set, most, coarse, r)
				}
			}
			// No gap that stays is smaller than one that is closed.
			stays := uint64(end)
			for i := 1; i < len(coarse); i++ {
				stays = min(stays, uint64(coarse[i].First)-coarse[i-1].End())
			}
			for i := 1; i < len(set); i++ {
				gap := uint64(set[i].First) - set[i-1].End()
				if coarse.Has(set[i-1].End(), uint64(set[i].First)-1) && gap > stays {
					t.Fatalf("%v in %d ranges: a gap of %d is closed and one of %d is not", set, most, gap, stays)
				}
			}
		}
	}
	if len(source.Below(0)) != 0 || source.Below(7).Count() != 7 || !source.Below(7).Has(0, 6) {
		t.Error("all numbers below one")
	}
}

// TestCut cuts sets into pieces, and finds where their numbers are.
func TestCut(t *testing.T) {
	set := source.Ranges{{First: 1, Count: 3}, {First: 5, Count: 1}, {First: 8, Count: 4}}
	for n := uint64(1); n < 10; n++ {
		var all source.Ranges
		for rest := set; len(rest) > 0; {
			var now source.Ranges
			now, rest = rest.Cut(n)
			if c := now.Count(); c > n || c < n && len(rest) > 0 {
				t.Errorf("%d of %d", c, n)
			}
			all = all.Union(now)
		}
		if fmt.Sprint(all) != fmt.Sprint(set) {
			t.Errorf("in pieces of %d: %v", n, all)
		}
	}
	at, next := set.Ordinals(), uint64(0)
	for n := range uint32(14) {
		got, ok := at(n)
		if has := set.Has(uint64(n), uint64(n)); ok != has || ok && got != next {
			t.Errorf("%d is number %d, %v", n, got, ok)
		}
		if ok {
			next++
		}
	}
	if _, ok := source.Ranges(nil).Ordinals()(0); ok {
		t.Error("a number is in nothing")
	}
}

// TestCutMany: a set of as many ranges as a stream can have takes a moment.
func TestCutMany(t *testing.T) {
	var set source.Ranges
	for n := range uint32(500_000) {
		set = append(set, source.Range{First: 2 * n, Count: 1})
	}
	begin := time.Now()
	for rest := set; len(rest) > 0; {
		_, rest = rest.Cut(1 << 14)
	}
	at := set.Ordinals()
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
