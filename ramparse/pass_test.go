package ramparse

import (
	"fmt"
	"slices"
	"testing"
)

func TestPassCounter(t *testing.T) {
	s := &Setup{Blocks: []Block{{Name: "pc.ram", Used: 100 * 4096}, {Name: "vga", Used: 10 * 4096}, {Name: "rom", Used: 4096}}}
	type page struct {
		block int
		n     uint64
	}
	pages := func(block int, from, to uint64) (all []page) {
		for n := from; n < to; n++ {
			all = append(all, page{block, n})
		}
		return all
	}
	first := slices.Concat(pages(0, 0, 100), pages(1, 0, 10), pages(2, 0, 1))
	first = slices.Clip(first)
	tests := []struct {
		name  string
		pages []page
		want  []int // indexes at which a pass begins
	}{
		{"none", nil, nil},
		{"one", first, []int{0}},
		{"second pass", append(first, pages(0, 5, 9)...), []int{0, 111}},
		{"second pass in a later block", append(first, page{1, 3}, page{1, 5}), []int{0, 111}},
		// Pass 3 begins with a page that pass 2 did not have.
		{"three passes", slices.Concat(first, pages(0, 5, 9), pages(0, 3, 5), pages(2, 0, 1)), []int{0, 111, 115}},
		{"one page over and over", append(first, page{0, 7}, page{0, 7}, page{0, 7}), []int{0, 111, 112, 113}},
		// Out of order from the start: only a page seen before ends a pass.
		{"out of order", []page{{0, 5}, {0, 3}, {0, 4}, {0, 9}, {0, 1}, {2, 0}, {0, 2}}, []int{0}},
		{"out of order twice", []page{{0, 5}, {0, 3}, {0, 4}, {0, 3}, {0, 5}, {0, 1}, {0, 5}}, []int{0, 3, 6}},
	}
	for _, tt := range tests {
		p := NewPassCounter(s, 4096)
		var got []int
		for i, pg := range tt.pages {
			if p.Add(pg.block, pg.n) {
				got = append(got, i)
			}
		}
		if fmt.Sprint(got) != fmt.Sprint(tt.want) || p.Passes() != len(tt.want) {
			t.Errorf("%s: passes begin at %v (%d); want %v", tt.name, got, p.Passes(), tt.want)
		}
	}
}

// TestPassCounterMemory pins two bits a page, which the save's memory bound
// counts on.
func TestPassCounterMemory(t *testing.T) {
	p := NewPassCounter(&Setup{Blocks: []Block{{Used: 64 << 30}}}, 4096)
	if n := 8 * (len(p.ever) + len(p.current)); n != 64<<30>>12/4 {
		t.Errorf("%d bytes for 64 GiB; want %d", n, 64<<30>>12/4)
	}
	if !p.Add(0, 64<<30>>12-1) {
		t.Error("the last page did not begin a pass")
	}
}
