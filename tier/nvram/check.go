package nvram

import (
	"bytes"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// Check reads headers and owner tables and returns each damage found, a
// *CorruptError, in the order of the file. It does not read pages: their
// checksums are in the flash images. The error is for a check that could not be
// done.
func (f *File) Check() (damage []error, err error) {
	report := func(off int64, format string, args ...any) {
		damage = append(damage, f.corrupt(off, format, args...))
	}
	err = f.locked(vfs.Shared, func() error {
		now, err := f.extents()
		if err != nil {
			return err
		}
		b := make([]byte, tableOffset)
		if err := f.readAt(b, 0); err != nil {
			return err
		}
		for i := range int64(2) {
			if _, err := decodeHeader(b[i*headerCopy:]); err != nil {
				report(i*headerCopy, "header copy %d: %v", i+1, err)
			}
		}

		type place struct {
			owner uuid.UUID
			index uint32
		}
		seen := map[place]uint32{}
		for first := int64(0); first < now; first += f.h.group {
			table, err := f.table(first / f.h.group)
			if err != nil {
				return err
			}
			if !bytes.Equal(table[:entrySize], zeroEntry[:]) {
				report(f.h.entryOffset(first), "the table has an owner for its own extent %d", first)
			}
			for i := int64(1); i < f.h.group; i++ {
				extent := uint32(first + i)
				e, s := f.h.decodeEntry(table[i*entrySize:], extent)
				at := f.h.entryOffset(int64(extent))
				switch s {
				case free:
					continue
				case torn:
					report(at, "the owner table entry of extent %d is half written (gc reclaims it)", extent)
					continue
				case damaged:
					report(at, "checksum mismatch in the owner table entry of extent %d (owner by the damaged entry: %v)", extent, e.owner)
					continue
				}
				if int64(extent) >= now {
					report(f.h.offset(extent), "the file ends before extent %d of checkpoint %v", extent, e.owner)
				}
				p := place{e.owner, e.index}
				if other, ok := seen[p]; ok {
					report(at, "extents %d and %d are both number %d of checkpoint %v", other, extent, e.index, e.owner)
				}
				seen[p] = extent
			}
		}
		return nil
	})
	return damage, err
}
