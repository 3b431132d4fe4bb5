package save

import (
	"testing"

	"github.com/flic-migrate/flic-migrate/ramparse"
)

// What is certain to come, after some records of a guest with a virtio-mem device of
// 100 pages, 50 of main memory, and ROM of a device and of the machine.
func TestAhead(t *testing.T) {
	blocks := []ramparse.Block{{Name: "0000:00:01.0/vm0"}, {Name: "pc.ram"}, {Name: "0000:00:02.0/vga.vram"}, {Name: "pc.bios"}, {Name: "/rom@etc/acpi/rsdp"}}
	pages := []uint64{100, 50, 20, 4, 2}
	type at struct {
		block int
		page  uint64
	}
	for name, test := range map[string]struct {
		records []at
		unseen  uint64
		want    uint64
	}{
		"at first":                  {nil, 176, 56},
		"unplugged and known to be": {nil, 40, 40},
		"in the device's memory":    {[]at{{0, 0}, {0, 1}}, 174, 56},
		"in main memory":            {[]at{{0, 0}, {1, 0}, {1, 1}}, 173, 54},
		"with pages left out":       {[]at{{1, 0}, {1, 2}}, 174, 6},
		"from its middle on":        {[]at{{1, 7}}, 175, 6},
		"the next block has all":    {[]at{{1, 0}, {1, 2}, {3, 0}}, 173, 5},
		"the last page":             {[]at{{1, 0}, {4, 0}, {4, 1}}, 173, 0},
		"once more from the start":  {[]at{{1, 0}, {4, 1}, {1, 3}}, 173, 0},
		"one that has come":         {[]at{{1, 0}, {1, 1}, {1, 0}}, 174, 0},
		"out of order":              {[]at{{1, 9}, {1, 3}}, 174, 174},
		"and then a ROM":            {[]at{{1, 9}, {1, 3}, {4, 0}, {1, 4}}, 172, 172},
	} {
		a := newAhead(blocks, pages)
		seen := make(map[at]bool)
		for _, r := range test.records {
			a.add(r.block, r.page, seen[r])
			seen[r] = true
		}
		if got := a.left(test.unseen); got != test.want {
			t.Errorf("%s: %d pages, want %d", name, got, test.want)
		}
	}
}
