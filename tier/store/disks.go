package store

import (
	"context"

	"github.com/flic-migrate/flic-migrate/tier/digest"
	"github.com/flic-migrate/flic-migrate/tier/disk"
)

// disksFolder is where the indexes of disk images are.
const disksFolder = "disks"

// Disks is the store's indexes of disk images. They are in its directory whatever Dir
// keeps the checkpoints in, because they are mapped. No lock of the store's is needed
// for them, and the catalog's own may be waited for with none of these held. A new
// catalog has the default trust domain's key, if there is one.
func (s *Store) Disks() (*disk.Catalog, error) {
	guarded, err := newPosixDir(s.fs, s.root)
	if err != nil {
		return nil, err
	}
	c := disk.NewCatalog(guarded.fs, guarded.Path(disksFolder))
	c.Key = func(ctx context.Context) (*digest.Hasher, error) { return s.readDomain(ctx, DefaultDomain) }
	return c, nil
}
