package source

import (
	"cmp"
	"context"
	"slices"
)

// Range is the numbers from First on, so many of them.
type Range struct{ First, Count uint32 }

// End is the number behind the last.
func (r Range) End() uint64 { return uint64(r.First) + uint64(r.Count) }

// Ranges is a set of numbers: ranges that rise and do not touch each other.
type Ranges []Range

// Below is the numbers below n.
func Below(n uint32) Ranges {
	if n == 0 {
		return nil
	}
	return Ranges{{0, n}}
}

// Count is how many numbers the set has.
func (s Ranges) Count() (n uint64) {
	for _, r := range s {
		n += uint64(r.Count)
	}
	return n
}

// find is the place in s of the range that n is in.
func (s Ranges) find(n uint64) (i int, ok bool) {
	return slices.BinarySearchFunc(s, n, func(r Range, n uint64) int {
		switch {
		case r.End() <= n:
			return -1
		case uint64(r.First) > n:
			return 1
		}
		return 0
	})
}

// Has tells whether all numbers from first up to last are in the set.
func (s Ranges) Has(first, last uint64) bool {
	i, ok := s.find(first)
	return ok && first <= last && last < s[i].End()
}

// Ordinals tells where a number of the set is among them, in their order, in a time that hardly
// rises with how many ranges there are.
func (s Ranges) Ordinals() func(n uint32) (at uint64, ok bool) {
	before := make([]uint64, len(s)) // how many there are before a range
	for i := 1; i < len(s); i++ {
		before[i] = before[i-1] + uint64(s[i-1].Count)
	}
	return func(n uint32) (at uint64, ok bool) {
		i, ok := s.find(uint64(n))
		if !ok {
			return 0, false
		}
		return before[i] + uint64(n-s[i].First), true
	}
}

// Cut is the first n numbers of the set, or all, and the others.
func (s Ranges) Cut(n uint64) (first, rest Ranges) {
	for k, r := range s {
		if uint64(r.Count) < n {
			n -= uint64(r.Count)
			continue
		}
		first = append(slices.Clone(s[:k]), Range{First: r.First, Count: uint32(n)})
		if rest = s[k+1:]; uint64(r.Count) > n {
			rest = append(Ranges{{First: r.First + uint32(n), Count: r.Count - uint32(n)}}, rest...)
		}
		return first, rest
	}
	return s, nil
}

// Each calls fn with each number, in rising order.
func (s Ranges) Each(fn func(n uint32) error) error {
	for _, r := range s {
		for i := range r.Count {
			if err := fn(r.First + i); err != nil {
				return err
			}
		}
	}
	return nil
}

// EachUntil is Each for what takes long: it ends with ctx, which it looks at now and then.
func (s Ranges) EachUntil(ctx context.Context, fn func(n uint32) error) error {
	called := 0
	return s.Each(func(n uint32) error {
		if called++; called%4096 == 0 {
			if err := context.Cause(ctx); err != nil {
				return err
			}
		}
		return fn(n)
	})
}

// Add adds the number n, which is as high as those in the set or higher.
func (s Ranges) Add(n uint32) Ranges {
	if len(s) > 0 {
		last := &s[len(s)-1]
		switch end := last.End(); {
		case uint64(n) < end:
			return s
		case uint64(n) == end:
			last.Count++
			return s
		}
	}
	return append(s, Range{n, 1})
}

// Union is the set of what is in s or in t.
func (s Ranges) Union(t Ranges) (u Ranges) {
	for len(s)+len(t) > 0 {
		next := &s
		if len(s) == 0 || len(t) > 0 && t[0].First < s[0].First {
			next = &t
		}
		r := (*next)[0]
		*next = (*next)[1:]
		if len(u) > 0 && u[len(u)-1].End() >= uint64(r.First) {
			last := &u[len(u)-1]
			last.Count = uint32(max(last.End(), r.End()) - uint64(last.First))
		} else {
			u = append(u, r)
		}
	}
	return u
}

// Minus is the set of what is in s and not in t.
func (s Ranges) Minus(t Ranges) (rest Ranges) {
	for _, r := range s {
		for len(t) > 0 && t[0].End() <= uint64(r.First) {
			t = t[1:]
		}
		at := uint64(r.First)
		for _, hole := range t {
			if uint64(hole.First) >= r.End() {
				break
			}
			if uint64(hole.First) > at {
				rest = append(rest, Range{uint32(at), uint32(uint64(hole.First) - at)})
			}
			at = hole.End()
		}
		if at < r.End() {
			rest = append(rest, Range{uint32(at), uint32(r.End() - at)})
		}
	}
	return rest
}

// Within is the set of those of s that are from first up to last.
func (s Ranges) Within(first, last uint64) (some Ranges) {
	i, _ := s.find(first)
	for ; i < len(s) && uint64(s[i].First) <= last; i++ {
		from, end := max(uint64(s[i].First), first), min(s[i].End(), last+1)
		some = append(some, Range{uint32(from), uint32(end - from)})
	}
	return some
}

// Meets tells whether one of the numbers from first up to last is in the set.
func (s Ranges) Meets(first, last uint64) bool {
	i, ok := s.find(first)
	return ok || i < len(s) && uint64(s[i].First) <= last
}

// Coarse is a set of at most so many ranges, 1 or more, that has all of s and as few
// other numbers as can be: the smallest gaps are closed.
func (s Ranges) Coarse(most int) Ranges {
	if len(s) <= most {
		return s
	}
	// The places behind which a gap stays are those of the widest.
	gaps := make([]int, len(s)-1)
	for i := range gaps {
		gaps[i] = i
	}
	width := func(i int) uint64 { return uint64(s[i+1].First) - s[i].End() }
	slices.SortFunc(gaps, func(a, b int) int { return cmp.Compare(width(b), width(a)) })
	gaps = gaps[:most-1]
	slices.Sort(gaps)
	out := make(Ranges, 0, most)
	first := s[0].First
	for _, i := range append(gaps, len(s)-1) {
		out = append(out, Range{first, uint32(s[i].End() - uint64(first))})
		if i+1 < len(s) {
			first = s[i+1].First
		}
	}
	return out
}
