package save

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/flic-migrate/flic-migrate/tier/pagemap"
)

// decided collects what a budget decides: the pages, and whether they are referred to.
type decided struct {
	t    *testing.T
	list []string
}

func (d *decided) take(it *item) error {
	if want := bytes.Repeat([]byte{byte(it.page)}, len(it.data)); !bytes.Equal(it.data, want) {
		d.t.Errorf("page %d has other bytes", it.page)
	}
	what := "refer"
	switch {
	case it.found == isNew && it.entry == 0 && !it.cold:
		what = "store"
	case it.found != isOnDisk || it.entry.Value() != 1000+it.page || !it.cold:
		d.t.Errorf("page %d has become %+v", it.page, it)
	}
	d.list = append(d.list, fmt.Sprint(what, " ", it.page))
	return nil
}

// found is a page that is on a disk. Its bytes are another's after the call.
func (d *decided) found(b *budget, page uint64, s spot) {
	d.t.Helper()
	it := &item{page: page, fill: -1, data: bytes.Repeat([]byte{byte(page)}, b.pageSize), found: isOnDisk, cold: true,
		entry: pagemap.Make(pagemap.Disk, 1000+page)}
	if err := b.put(it, s, d.take); err != nil {
		d.t.Fatal(err)
	}
	clear(it.data)
}

func (d *decided) want(list ...string) {
	d.t.Helper()
	if !slices.Equal(d.list, list) {
		d.t.Errorf("%q in place of %q", d.list, list)
	}
	d.list = nil
}

func TestBudget(t *testing.T) {
	d := &decided{t: t}
	b := newBudget(1<<20, 4096)
	// Two in one cell, and in two that follow each other, are worth reading, in the order
	// in which they came; one that is alone is not.
	d.found(b, 1, spot{100, 2})
	d.found(b, 2, spot{200, 2})
	d.want()
	d.found(b, 3, spot{100, 2})
	d.want("refer 1", "refer 3")
	d.found(b, 4, spot{101, 2})
	d.want("refer 4")
	d.found(b, 5, spot{300, 3})
	d.found(b, 6, spot{302, 3})
	d.want()
	d.found(b, 7, spot{301, 3})
	d.want("refer 5", "refer 6", "refer 7")
	// Of one that waits the bytes are known.
	if it := b.find(0, 2); it == nil || it.data[0] != 2 {
		t.Errorf("%+v waits", it)
	}
	if it := b.find(0, 3); it != nil {
		t.Errorf("page 3 waits, which is placed")
	}
	// One that has come again is not counted.
	d.found(b, 8, spot{400, 2})
	if it := b.take(0, 8); it == nil || it.data[0] != 8 {
		t.Errorf("%+v waits", it)
	}
	if b.take(0, 8) != nil || b.find(0, 8) != nil {
		t.Error("page 8 waits still")
	}
	d.found(b, 9, spot{401, 2})
	d.want()
	// One that has waited is worth reading by what has come beside it, not by what is
	// beside that.
	d.found(b, 10, spot{501, 3})
	d.found(b, 11, spot{500, 3})
	d.found(b, 12, spot{502, 3})
	d.want()
	if err := b.flush(d.take); err != nil {
		t.Fatal(err)
	}
	d.want("store 2", "store 9", "refer 10", "store 11", "store 12")
	if b.stored != 4 || len(b.at) > 0 || b.first != b.next {
		t.Errorf("%d stored, %d wait", b.stored, len(b.at))
	}
	// And all goes on.
	d.found(b, 13, spot{600, 2})
	d.found(b, 14, spot{600, 2})
	d.want("refer 13", "refer 14")
	// What is enough alone never waits.
	d.found(b, 15, spot{700, 1})
	d.want("refer 15")
}

// TestBudgetFull: when no more can wait, the oldest is decided.
func TestBudgetFull(t *testing.T) {
	d := &decided{t: t}
	b := newBudget(1, waitBytes/2)
	d.found(b, 1, spot{100, 2})
	d.found(b, 2, spot{200, 2})
	d.found(b, 3, spot{300, 2})
	d.want("store 1")
	// One that was stored is not beside others.
	d.found(b, 4, spot{100, 2})
	d.want("store 2")
	d.found(b, 5, spot{100, 2})
	d.want("refer 4", "refer 5")
	if err := b.flush(d.take); err != nil {
		t.Fatal(err)
	}
	d.want("store 3")
}

// TestBudgetAll: whatever comes, each page is decided once, and those that share a cell
// with enough others, in a short time, are referred to.
func TestBudgetAll(t *testing.T) {
	const pages = 20000
	d := &decided{t: t}
	b := newBudget(1<<22, 64)
	r := rand.New(rand.NewPCG(1, 2))
	cells := make(map[uint64]int)
	var order []uint64
	for p := range uint64(pages) {
		cell := r.Uint64N(pages) * 10
		order = append(order, cell)
		cells[cell]++
		d.found(b, p, spot{cell, 2})
	}
	if err := b.flush(d.take); err != nil {
		t.Fatal(err)
	}
	all := make([]bool, pages)
	for _, s := range d.list {
		var what string
		var p int
		fmt.Sscan(s, &what, &p)
		if all[p] {
			t.Fatalf("page %d is decided twice", p)
		}
		all[p] = true
		if what == "store" && cells[order[p]] > 1 {
			t.Errorf("page %d is stored, one of %d in its cell", p, cells[order[p]])
		}
	}
	if len(d.list) != pages || b.stored == 0 {
		t.Errorf("%d of %d are decided, %d stored", len(d.list), pages, b.stored)
	}
}
