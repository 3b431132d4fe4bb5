package store

import (
	"errors"
	"testing"

	"github.com/flic-migrate/flic-migrate/tier/pagemap"
	"github.com/flic-migrate/flic-migrate/tier/source"
)

// TestUniteUnknown: an entry of each kind goes into the new page map with the slot that its
// page has there, or as it is, and one of a kind that is not known is refused.
func TestUniteUnknown(t *testing.T) {
	to, err := pagemap.New([]uint64{8})
	if err != nil {
		t.Fatal(err)
	}
	to.Set(0, 5, pagemap.Make(pagemap.Flash, 2))
	n := &uniting{to: to}
	for k := range pagemap.MaxKind + 1 {
		e, err := n.entry(pagemap.Make(k, 5))
		want := pagemap.Make(k, 5)
		if k == pagemap.Flash || k == pagemap.Delta {
			want = pagemap.Make(k, 2)
		}
		var unknown *source.UnknownError
		switch known := source.Default.Row(k).Known(); {
		case !known && !errors.As(err, &unknown):
			t.Errorf("%v: %v, %v", k, e, err)
		case known && (err != nil || e != want):
			t.Errorf("%v: %v, %v, want %v", k, e, err, want)
		}
	}
}
