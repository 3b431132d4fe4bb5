package session

import (
	"context"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/disks"
	"github.com/flic-migrate/flic-migrate/tier/disk"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
)

// openDisks opens, while the guest runs, the disk images that a save can look for pages
// in. No disk costs a checkpoint: what can't be used is left out.
func (o *CheckpointOptions) openDisks(ctx context.Context, st *store.Store, x qmp.Executor) (closeAll func(), err error) {
	catalog, err := st.Disks()
	if err != nil {
		return nil, err
	}
	files := o.Disks
	if !o.NoDisks {
		found, err := disks.Find(ctx, x)
		if err != nil {
			o.Log.Warn("no pages are looked for on the VM's disks", "cause", err)
		}
		for _, l := range disks.ReadOnly(found) {
			files = append(files, save.DiskFile{Path: l.Path, Format: disk.Format(l.Format)})
		}
	}
	opened := save.OpenDisks(ctx, catalog, files)
	o.Save.Disks, o.Save.UnusedDisks = opened.Disks, opened.Unused
	return opened.Close, nil
}
