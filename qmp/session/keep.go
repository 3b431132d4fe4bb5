package session

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/disks"
	"github.com/flic-migrate/flic-migrate/tier/disk"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
)

// KeepMode says how a store may keep copies of the VM's disks with a checkpoint.
type KeepMode string

// The modes.
const (
	KeepNone KeepMode = ""
	// KeepReflink: as files that share their disk blocks, in no time.
	KeepReflink KeepMode = "reflink"
	// KeepCopy: likewise where that can be, and elsewhere as whole copies, which are made
	// while the guest stands still.
	KeepCopy KeepMode = "copy"
)

func (k KeepMode) options() store.FreezeOptions { return store.FreezeOptions{Copy: k == KeepCopy} }

// Kept is a copy of a disk that the store keeps with a checkpoint.
type Kept struct {
	Disk   string `json:"disk"`   // its name
	Image  string `json:"image"`  // the file that it is a copy of, and that the guest goes on to write to
	File   string `json:"file"`   // where it is
	Bytes  int64  `json:"bytes"`  // that its disk blocks hold
	Shared bool   `json:"shared"` // it shares them with the image
}

// keeping are the copies of a checkpoint in the making, which nobody removes before they
// are released.
type keeping struct {
	copies []*store.Frozen
	ids    map[string]uuid.UUID // by the disks' names
	files  []save.DiskFile      // for the pages
}

// names are the copies' UUIDs, by the disks' names. There may be no keeping.
func (k *keeping) names() map[string]uuid.UUID {
	if k == nil {
		return nil
	}
	return k.ids
}

// canKeep finds out, while the guest runs, whether copies of the disks can be kept.
func (o *CheckpointOptions) canKeep(ctx context.Context, st *store.Store, x qmp.Executor, found []disks.Disk) error {
	if o.Keep == KeepNone {
		return nil
	}
	// A job may have put something of its own between the guest and the file.
	if err := disks.Idle(ctx, x); err != nil {
		return err
	}
	writable, err := disks.Writable(found)
	if err != nil {
		return fmt.Errorf("no copy is kept of %w", err)
	}
	var paths []string
	for _, d := range writable {
		paths = append(paths, d.Layers[0].Path)
	}
	return st.TryFreeze(ctx, paths, o.Keep.options())
}

var errKeepTime = fmt.Errorf("it was not done within the %v that the guest may stand still for it", freezeTime)

var errChangedDisk = errors.New("somebody else than the guest writes to it, so that no copy of it can be kept")

// keep makes the copies. The guest stands still, and QEMU has written what the guest has
// written: its stop flushes all disks. The caller releases what keep returns, after an
// error too.
func (o *CheckpointOptions) keep(ctx context.Context, st *store.Store, x qmp.Executor, found []disks.Disk, rep *CheckpointReport) (*keeping, error) {
	k := &keeping{ids: make(map[string]uuid.UUID)}
	if o.Keep == KeepNone {
		return k, nil
	}
	begin := time.Now()
	writable, err := disks.Writable(found)
	if err != nil {
		return k, err
	}
	// One can have begun since the guest was stopped.
	if err := disks.Idle(ctx, x); err != nil {
		return k, err
	}
	for _, d := range writable {
		l := d.Layers[0]
		was, err := disks.Identify(l)
		if err != nil {
			return k, err
		}
		f, err := st.Freeze(ctx, l.Path, o.Keep.options())
		if err != nil {
			return k, fmt.Errorf("disk image %s: %w", l.Path, err)
		}
		k.copies = append(k.copies, f)
		now, err := disks.Identify(l)
		if err != nil {
			return k, err
		}
		if what := was.Differs(now); what != "" {
			return k, fmt.Errorf("disk image %s %s: %w", l.Path, what, errChangedDisk)
		}
		k.ids[d.Name] = f.UUID
		k.files = append(k.files, save.DiskFile{Path: f.Path(), Format: disk.Format(l.Format), Kept: f.UUID, Of: was.Path})
		rep.Kept = append(rep.Kept, Kept{d.Name, l.Path, f.Path(), f.Bytes, f.Shared})
	}
	rep.KeptTime = time.Since(begin)
	return k, nil
}

// openKept is openDisks when the copies are there: a save can look in them too, once they
// have been read, which ends with limited. The guest stands still, and no index is worth a
// checkpoint.
func (o *CheckpointOptions) openKept(ctx, limited context.Context, st *store.Store, found []disks.Disk, k *keeping) (*save.OpenedDisks, error) {
	catalog, err := st.Disks()
	if err != nil {
		return new(save.OpenedDisks), err
	}
	for _, f := range k.files {
		if err := indexKept(limited, catalog, f); err != nil {
			if ctx.Err() != nil {
				return new(save.OpenedDisks), context.Cause(ctx)
			}
			o.Log.Warn("no pages are looked for in a disk that was frozen", "path", f.Of, "cause", err)
		}
	}
	opened := save.OpenDisks(ctx, catalog, append(o.images(found), k.files...))
	o.Save.Disks, o.Save.UnusedDisks = opened.Disks, opened.Unused
	return opened, nil
}

// indexKept makes the index of a copy. What the image stands on, which a partition table
// may be in, is found if it has an absolute name.
func indexKept(ctx context.Context, catalog *disk.Catalog, f save.DiskFile) error {
	i, err := disk.Open(ctx, f.Path, f.Format)
	if err != nil {
		i, err = disk.OpenLayer(f.Path, f.Format)
	}
	if err != nil {
		return err
	}
	defer i.Close()
	_, err = catalog.Build(ctx, i, disk.BuildOptions{Frozen: true})
	return err
}

// release lets the copies go: they stay if there is a checkpoint. Their indexes have been
// of use to its save, and are to nobody any more.
func (k *keeping) release(ctx context.Context, saved bool, o *CheckpointOptions) {
	if k == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), releaseTime)
	defer cancel()
	for _, f := range k.copies {
		end := f.Discard
		if saved {
			end = f.Unindex
		}
		if err := errors.Join(end(ctx), f.Close()); err != nil {
			o.Log.Warn("a copy of a disk, or its index, was not tidied away; gc will do that", "path", f.Path(), "cause", err)
		}
	}
}

// releaseTime is how long that may take: some files are removed.
const releaseTime = time.Minute
