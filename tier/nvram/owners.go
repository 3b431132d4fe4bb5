package nvram

import (
	"bytes"
	"context"
	"slices"
	"time"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// Owned lists the numbers, among the owner's, of the extents that an owner has now, and tells
// since when, to the second.
func (f *File) Owned(ctx context.Context, owner uuid.UUID) (indexes []int, since time.Time, err error) {
	err = f.locked(ctx, vfs.Shared, func() error {
		return f.forEach(func(_ uint32, _ []byte, e entry, s entryState) error {
			if s == taken && e.owner == owner {
				indexes, since = append(indexes, int(e.index)), e.since
			}
			return nil
		})
	})
	return indexes, since, err
}

// Owner is a checkpoint that has extents in the file.
type Owner struct {
	UUID    uuid.UUID // of the checkpoint
	Store   uuid.UUID
	Since   time.Time // of the reservation, to the second
	Extents int
}

// Owners lists the checkpoints of a store that have extents (of all stores for
// the zero UUID), ordered by UUID. They may be committed or not.
func (f *File) Owners(ctx context.Context, store uuid.UUID) ([]Owner, error) {
	owners := map[uuid.UUID]*Owner{}
	err := f.locked(ctx, vfs.Shared, func() error {
		return f.forEach(func(_ uint32, _ []byte, e entry, s entryState) error {
			if s != taken || store != uuid.Nil && e.store != store {
				return nil
			}
			o := owners[e.owner]
			if o == nil {
				o = &Owner{UUID: e.owner, Store: e.store, Since: e.since}
				owners[e.owner] = o
			}
			o.Extents++
			return nil
		})
	})
	if err != nil {
		return nil, err
	}
	list := make([]Owner, 0, len(owners))
	for _, o := range owners {
		list = append(list, *o)
	}
	slices.SortFunc(list, func(a, b Owner) int { return bytes.Compare(a.UUID[:], b.UUID[:]) })
	return list, nil
}
