package source

import "github.com/flic-migrate/flic-migrate/tier/pagemap"

// Tier is how the bytes that a Location names are stored.
type Tier uint8

const (
	OnFlash Tier = iota // whole, in a segment
	InNVRAM             // whole, in an NVRAM part
	AsDelta             // as a delta, in a segment
	OnDisk              // whole, in a disk image; the slot is a disk slot
)

// Location is where stored bytes are, as a checkpoint's entry names them. It is how a
// new checkpoint takes over an entry of its parent's: it puts its own name for the space
// in place of the parent's.
type Location struct {
	Space Space
	Slot  uint64
	Tier  Tier
}

// Locate is where the bytes of a page with entry e are, unless they are nowhere.
func (t *Table) Locate(e pagemap.Entry) (l Location, ok bool) {
	row := t.Row(e.Kind())
	if row.at == nil {
		return l, false
	}
	space, slot := row.at(e.Value())
	return Location{Space(space), slot, row.tier}, true
}

// locationKinds are the kinds of what is in the own image, and of what is elsewhere.
var locationKinds = [...][2]pagemap.Kind{
	OnFlash: {pagemap.Flash, pagemap.Foreign},
	InNVRAM: {pagemap.NVRAM, pagemap.ForeignNVRAM},
	AsDelta: {pagemap.Delta, pagemap.ForeignDelta},
	// Each checkpoint has disk slots of its own.
	OnDisk: {pagemap.Disk, pagemap.Disk},
}

// Entry is the entry that names the location.
func (l Location) Entry() pagemap.Entry {
	kinds := locationKinds[l.Tier]
	if l.Space == 0 {
		return pagemap.Make(kinds[0], l.Slot)
	}
	return pagemap.MakeForeign(kinds[1], int(l.Space)-1, l.Slot)
}
