package session

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/disks"
	"github.com/flic-migrate/flic-migrate/tier/disk"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
)

// openDisks opens, while the guest runs, the disk images that a save can look for pages
// in, and returns the disks that the VM has. No disk costs a checkpoint: what can't be
// used is left out.
func (o *CheckpointOptions) openDisks(ctx context.Context, st *store.Store, x qmp.Executor) (found []disks.Disk, closeAll func(), err error) {
	catalog, err := st.Disks()
	if err != nil {
		return nil, nil, err
	}
	files := o.Disks
	if found, err = o.find(ctx, x); err != nil {
		return nil, nil, err
	}
	for _, l := range disks.ReadOnly(found) {
		files = append(files, save.DiskFile{Path: l.Path, Format: disk.Format(l.Format)})
	}
	opened := save.OpenDisks(ctx, catalog, files)
	o.Save.Disks, o.Save.UnusedDisks = opened.Disks, opened.Unused
	return found, opened.Close, nil
}

// find asks for the VM's disks. A QEMU that does not say can be saved all the same, but
// for snapshots.
func (o *CheckpointOptions) find(ctx context.Context, x qmp.Executor) ([]disks.Disk, error) {
	if o.NoDisks {
		return nil, nil
	}
	found, err := disks.Find(ctx, x)
	if err != nil && !o.Snapshot {
		o.Log.Warn("which disks the VM has is not known, and not recorded", "cause", err)
		return nil, nil
	}
	return found, err
}

// snapshot freezes the VM's disks, once the guest stands still.
func (o *CheckpointOptions) snapshot(ctx context.Context, x qmp.Executor, found []disks.Disk, rep *CheckpointReport) error {
	suffix := time.Now().UTC().Format(".flic-20060102T150405.000Z") + ".qcow2"
	taken, err := disks.TakeSnapshots(ctx, x, found, suffix)
	rep.Snapshots = taken
	return err
}

// compareDisks tells whether the disks of the QEMU that c is to be resumed into are c's.
// x is nil if libvirt will start it, as c says.
func (o *ResumeOptions) compareDisks(ctx context.Context, x qmp.Executor, c *store.Checkpoint) (warnings []string, err error) {
	was := c.Meta.VMDisks
	if len(was) == 0 {
		return nil, nil
	}
	var differ []string
	if x == nil {
		differ, err = disks.ComparePaths(ctx, was)
	} else {
		var now []disks.Disk
		if now, err = disks.Find(ctx, x); err == nil {
			differ, err = disks.Compare(ctx, now, was)
		}
	}
	if err != nil || len(differ) == 0 {
		return nil, err
	}
	if !o.Force {
		return nil, fmt.Errorf("%w: %s (the guest would damage its file systems; --force resumes it all the same)", disks.ErrOtherDisks, strings.Join(differ, "; "))
	}
	for _, what := range differ {
		warnings = append(warnings, "resumed with other disks than were saved: "+what)
	}
	return warnings, nil
}
