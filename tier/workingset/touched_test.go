package workingset

import (
	"reflect"
	"testing"
)

func TestTouchedBind(t *testing.T) {
	touched := &Touched{PageSize: 4096, Blocks: []string{"vga", "pc.ram", "gone"}}
	touched.Add([]PageRun{{1, 10, 5}, {0, 3, 1}, {2, 0, 1}, {7, 0, 1}, {1, 98, 9}, {1, 100, 1}, {1, 5, 0}})
	blocks := []Block{{"pc.ram", 100}, {"vga", 4}}
	want := []PageRun{{0, 10, 5}, {1, 3, 1}, {0, 98, 2}}
	if got := touched.Bind(4096, blocks); !reflect.DeepEqual(got, want) {
		t.Errorf("bound %v, want %v", got, want)
	}
	if got := touched.Bind(8192, blocks); got != nil {
		t.Errorf("bound to another page size: %v", got)
	}
}

func TestTouchedIsCapped(t *testing.T) {
	var touched Touched
	for range 3 {
		touched.Add(make([]PageRun, MaxTouched/2))
	}
	if len(touched.Runs) != MaxTouched {
		t.Errorf("%d runs are kept", len(touched.Runs))
	}
}

func TestAddTouched(t *testing.T) {
	s, err := New(4096, []Block{{"pc.ram", 100}})
	if err != nil {
		t.Fatal(err)
	}
	s.SetHeat(0, 11, 9)
	s.AddTouched([]PageRun{{0, 10, 3}}, 5)
	for page, want := range map[int64]uint8{9: 0, 10: 5, 11: 9, 12: 5, 13: 0} {
		if got := s.Heat(0, page); got != want {
			t.Errorf("heat of page %d is %d, want %d", page, got, want)
		}
	}
}
