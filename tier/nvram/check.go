package nvram

import (
	"context"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// Check reads headers and owner tables and returns each damage found, a
// *integrity.CorruptError, in the order of the file. It does not read pages: their
// checksums are in the flash images. The error is for a check that could not be
// done.
func (f *File) Check(ctx context.Context) (damage []error, err error) {
	report := func(off int64, format string, args ...any) {
		damage = append(damage, f.corrupt(off, format, args...))
	}
	err = f.locked(ctx, vfs.Shared, func() error {
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
		return f.forEach(func(extent uint32, _ []byte, e entry, s entryState) error {
			at := f.h.entryOffset(int64(extent))
			switch {
			case int64(extent)%f.h.group == 0:
				report(at, "extent %d has an owner but holds an owner table", extent)
				return nil
			case s == torn:
				report(at, "the owner table entry of extent %d is half written (gc reclaims it)", extent)
				return nil
			case s == damaged:
				report(at, "checksum mismatch in the owner table entry of extent %d (owner by the damaged entry: %v)", extent, e.owner)
				return nil
			}
			if int64(extent) >= now {
				report(f.h.offset(extent), "the file ends before extent %d of checkpoint %v", extent, e.owner)
			}
			p := place{e.owner, e.index}
			if other, ok := seen[p]; ok {
				report(at, "extents %d and %d are both number %d of checkpoint %v", other, extent, e.index, e.owner)
			}
			seen[p] = extent
			return nil
		})
	})
	return damage, err
}
