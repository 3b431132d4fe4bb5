package source

import (
	"testing"

	"github.com/flic-migrate/flic-migrate/tier/pagemap"
)

// Each kind of stored bytes has its place, and the place its entry.
func TestLocation(t *testing.T) {
	for e, want := range map[pagemap.Entry]Location{
		pagemap.Make(pagemap.Flash, 7):                        {0, 7, OnFlash},
		pagemap.Make(pagemap.NVRAM, 8):                        {0, 8, InNVRAM},
		pagemap.Make(pagemap.Delta, 9):                        {0, 9, AsDelta},
		pagemap.Make(pagemap.Disk, 10):                        {0, 10, OnDisk},
		pagemap.MakeForeign(pagemap.Foreign, 0, 1<<40-1):      {1, 1<<40 - 1, OnFlash},
		pagemap.MakeForeign(pagemap.ForeignNVRAM, 3, 5):       {4, 5, InNVRAM},
		pagemap.MakeForeign(pagemap.ForeignDelta, 1<<10-1, 6): {1 << 10, 6, AsDelta},
	} {
		got, ok := Default.Locate(e)
		if !ok || got != want || got.Entry() != e {
			t.Errorf("%v %d: %+v, %v, and back %v", e.Kind(), e.Value(), got, ok, got.Entry())
		}
	}
	for _, k := range []pagemap.Kind{pagemap.Absent, pagemap.Fill, pagemap.ZeroData, 40} {
		if got, ok := Default.Locate(pagemap.Make(k, 0)); ok {
			t.Errorf("%v is at %+v", k, got)
		}
	}
}
