package session

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/disks"
	"github.com/flic-migrate/flic-migrate/qmp/libvirt/domain"
	"github.com/flic-migrate/flic-migrate/tier/disk"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
)

// openDisks opens, while the guest runs, the disk images that a save can look for pages
// in, and returns the disks that the VM has. No disk costs a checkpoint: what can't be
// used is left out.
func (o *CheckpointOptions) openDisks(ctx context.Context, st *store.Store, x qmp.Executor) (found []disks.Disk, opened *save.OpenedDisks, err error) {
	catalog, err := st.Disks()
	if err != nil {
		return nil, nil, err
	}
	if found, err = o.find(ctx, x); err != nil {
		return nil, nil, err
	}
	opened = save.OpenDisks(ctx, catalog, o.images(found))
	o.Save.Disks, o.Save.UnusedDisks = opened.Disks, opened.Unused
	return found, opened, nil
}

// freezeTime is how long a guest may stand still for the indexes of its disks: a terabyte
// that nobody has thought of would stop it for an hour.
var freezeTime = 30 * time.Second // not const for the sake of a test

var errFreezeTime = errors.New("it was not read in the time that the guest may stand still for it (disk index can read it while the guest runs, for the next checkpoint)")

// openFrozen is openDisks when snapshots of the disks that were found have been taken: of
// what the guest wrote to until then there is an index now, and a save can look in it. The
// guest stands still, and no index is worth a checkpoint.
func (o *CheckpointOptions) openFrozen(ctx context.Context, st *store.Store, found []disks.Disk) (*save.OpenedDisks, error) {
	frozen := make([]disks.Disk, len(found))
	for i, d := range found {
		d.ReadOnly = true
		frozen[i] = d
	}
	catalog, err := st.Disks()
	if err != nil {
		return new(save.OpenedDisks), err
	}
	limited, cancel := context.WithTimeoutCause(ctx, freezeTime, errFreezeTime)
	defer cancel()
	for _, d := range found {
		if d.ReadOnly {
			continue
		}
		if err := index(limited, catalog, d.Layers[0]); err != nil {
			if ctx.Err() != nil {
				return new(save.OpenedDisks), context.Cause(ctx)
			}
			o.Log.Warn("no pages are looked for in a disk that was frozen", "path", d.Layers[0].Path, "cause", err)
		}
	}
	opened := save.OpenDisks(ctx, catalog, o.images(frozen))
	o.Save.Disks, o.Save.UnusedDisks = opened.Disks, opened.Unused
	return opened, nil
}

// index makes the index of one layer, which was frozen just now.
func index(ctx context.Context, catalog *disk.Catalog, l disks.Layer) error {
	i, err := disk.Open(ctx, l.Path, disk.Format(l.Format))
	if err != nil {
		return err
	}
	defer i.Close()
	_, err = catalog.Build(ctx, i, disk.BuildOptions{Frozen: true})
	return err
}

// images are the disk images that a save looks in: those that it is told of, and, but for
// NoDisks, of the VM's what the guest can't write to.
func (o *CheckpointOptions) images(found []disks.Disk) []save.DiskFile {
	files := slices.Clone(o.Disks)
	if o.NoDisks {
		return files
	}
	for _, l := range disks.ReadOnly(found) {
		files = append(files, save.DiskFile{Path: l.Path, Format: disk.Format(l.Format)})
	}
	return files
}

// find asks for the VM's disks. A QEMU that does not say can be saved all the same, but
// for snapshots and copies of them. Its disks are recorded whether or not pages are looked
// for in them: resume compares.
func (o *CheckpointOptions) find(ctx context.Context, x qmp.Executor) ([]disks.Disk, error) {
	found, err := disks.Find(ctx, x)
	if err != nil && !o.Snapshot && o.Keep == KeepNone {
		o.Log.Warn("which disks the VM has is not known, and not recorded", "cause", err)
		return nil, nil
	}
	return found, err
}

// snapshot freezes the VM's disks, once the guest stands still. libvirt does it for its
// domains: it has to know which files they write to.
func (o *CheckpointOptions) snapshot(ctx context.Context, t Target, x qmp.Executor, found []disks.Disk, rep *CheckpointReport) (err error) {
	overlays, err := disks.Overlays(found, time.Now())
	if err != nil || len(overlays) == 0 {
		return err
	}
	if t.Domain == "" {
		err = disks.TakeSnapshots(ctx, x, found, overlays)
	} else {
		err = domain.TakeSnapshots(ctx, t.Connect, t.Domain, overlays)
	}
	if err == nil {
		rep.Snapshots = overlays
	} else {
		err = taken(ctx, x, overlays, err, rep)
	}
	if rerr := disks.Restrict(rep.Snapshots); rerr != nil {
		o.Log.Warn("an overlay may be readable for more users than the disk that it stands on", "cause", rerr)
	}
	return err
}

// lateTime is how long QEMU is asked what has become of snapshots of which it has not said
// in time whether they were taken. The guest stands still, and could not be let run sooner:
// QEMU, and libvirt for a domain, carries out one command after the other.
const lateTime = 45 * time.Second

// taken finds out whether overlays whose making has failed are in use all the same, as the
// report then says: who waits for an answer no longer has not stopped QEMU, which may be slow
// to write what its disks have in their caches. It returns nil if all is as it was to be.
func taken(ctx context.Context, x qmp.Executor, overlays []disks.Snapshot, failed error, rep *CheckpointReport) error {
	var refused *qmp.Error
	if errors.As(failed, &refused) {
		return failed // all of them or none
	}
	asking, cancel := context.WithTimeout(context.WithoutCancel(ctx), lateTime)
	defer cancel()
	list, err := disks.Find(asking, x)
	if err != nil {
		return fmt.Errorf("%w; they may have been taken all the same (%w): the VM then writes to %s", failed, err, overlayNames(overlays))
	}
	rep.Snapshots = disks.InUse(list, overlays)
	if len(rep.Snapshots) == len(overlays) && ctx.Err() == nil {
		return nil
	}
	return failed
}

// LastSnapshots are of each disk the one that the guest writes to.
func (rep *CheckpointReport) LastSnapshots() (list []disks.Snapshot) {
	for i, s := range rep.Snapshots {
		if !slices.ContainsFunc(rep.Snapshots[i+1:], func(later disks.Snapshot) bool { return later.Disk == s.Disk }) {
			list = append(list, s)
		}
	}
	return list
}

// overlayNames are the files that a VM goes on in.
func overlayNames(overlays []disks.Snapshot) string {
	var names []string
	for _, s := range overlays {
		names = append(names, s.Now)
	}
	return strings.Join(names, ", ")
}

// keptOnes fails if the guest would write to a copy that a store keeps.
func keptOnes(list []disks.Disk, kept []store.KeptDisk) error {
	for _, d := range list {
		if d.ReadOnly || len(d.Layers) == 0 {
			continue
		}
		for _, k := range kept {
			if sameFile(d.Layers[0].Path, k.File) {
				return fmt.Errorf("%w: %s is kept with the checkpoint, and would be written to: flic-migrate disk thaw makes a file of it that is yours", disks.ErrOtherDisks, k.File)
			}
		}
	}
	return nil
}

// sameFile tells whether two paths lead to one file.
func sameFile(a, b string) bool {
	x, err := os.Stat(a)
	if err != nil {
		return false
	}
	y, err := os.Stat(b)
	return err == nil && os.SameFile(x, y)
}

// compareDisks tells whether the disks of the QEMU that c is to be resumed into are c's.
// now gives that QEMU's disks.
func (o *ResumeOptions) compareDisks(ctx context.Context, c *store.Checkpoint, now func() ([]disks.Disk, error)) (warnings []string, err error) {
	was := c.Meta.VMDisks
	if len(was) == 0 {
		return nil, nil
	}
	list, err := now()
	if err != nil {
		return nil, err
	}
	kept := c.KeptDisks(ctx)
	if err := keptOnes(list, kept); err != nil {
		return nil, err
	}
	differ, err := disks.Compare(ctx, list, was)
	if err != nil || len(differ) == 0 {
		return nil, err
	}
	if len(kept) > 0 && !o.Force {
		return nil, fmt.Errorf("%w: %s (the guest would damage its file systems; flic-migrate disk thaw %v makes files of the disks that are kept with the checkpoint; --force resumes it all the same)",
			disks.ErrOtherDisks, strings.Join(differ, "; "), c.Ref)
	}
	if !o.Force {
		return nil, fmt.Errorf("%w: %s (the guest would damage its file systems; --force resumes it all the same)", disks.ErrOtherDisks, strings.Join(differ, "; "))
	}
	for _, what := range differ {
		warnings = append(warnings, "resumed with other disks than were saved: "+what)
	}
	return warnings, nil
}
