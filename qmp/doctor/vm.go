package doctor

import (
	"context"
	"maps"
	"slices"
	"strings"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/disks"
	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/qmp/preflight"
	"github.com/flic-migrate/flic-migrate/tier/disk"
)

// VM looks at a running QEMU: m is its monitor, and indexed are the indexes of disk images
// in the store, nil if there is none. notLazy is what is known already of why a QEMU that is
// started likewise can't restore lazily; nil: nothing.
func VM(ctx context.Context, m *qmp.Monitor, indexed []disk.Entry, notLazy error) []Finding {
	r := report{topic: "vm"}
	s, err := qmp.QueryStatus(ctx, m)
	if err != nil {
		r.failed(err, "", "QEMU does not answer")
		return r.list
	}
	v := m.Version().QEMU
	r.ok("QEMU %d.%d, the guest is in the state %s", v.Major, v.Minor, s.Status)
	pid := 0
	if peer, known := m.Peer(); known {
		pid = int(peer.Pid)
		if notLazy == nil {
			notLazy = preflight.Userfaultfd(int(peer.Uid))
		}
	}
	r.migrating(ctx, m)
	r.capabilities(ctx, m)
	r.memory(ctx, m, pid, notLazy)
	r.disks(ctx, m, indexed)
	return r.list
}

// migrating tells what keeps QEMU from a migration, which a checkpoint is.
func (r *report) migrating(ctx context.Context, x qmp.Executor) {
	info, err := migration.Query(ctx, x)
	if err != nil {
		r.failed(err, "", "its migration can't be asked for")
		return
	}
	for _, why := range info.BlockedReasons {
		r.fault("start it without that device, or unplug the device before a checkpoint", "QEMU refuses to migrate, and so every checkpoint: %s", strings.TrimSpace(why))
	}
	left, err := migration.LeftBehind(ctx, x)
	switch {
	case err != nil:
		r.failed(err, "", "its migration settings can't be asked for")
	case left == migration.LeftArmed:
		r.ok("its next checkpoint is armed")
	case left == migration.LeftStopped:
		r.fault("the next checkpoint puts it right, or: cont in the monitor", "a flic-migrate that was killed has left its settings and a guest that it had stopped")
	case left == migration.LeftSettings:
		r.warn("the next checkpoint puts it right", "a flic-migrate that was killed, or one that is at work, has its migration settings here")
	case !info.Status.Ended() && info.Status != migration.StatusNone:
		r.warn("wait for its end, or: migrate_cancel", "a migration is under way (%s)", info.Status)
	}
}

// capabilities tells of those that a save by hand would fail with.
func (r *report) capabilities(ctx context.Context, x qmp.Executor) {
	on, err := migration.Harmful(ctx, x)
	if err != nil {
		r.failed(err, "", "its migration capabilities can't be asked for")
	} else if len(on) > 0 {
		r.warn("checkpoint and resume switch them off meanwhile; before a migrate \"exec:…\" of your own: migrate_set_capability NAME off", "migration capabilities are on that ask for another stream than a checkpoint is: %s", strings.Join(on, ", "))
	}
}

// memory tells whether the VM could be resumed lazily in a QEMU like this one.
func (r *report) memory(ctx context.Context, x qmp.Executor, pid int, notLazy error) {
	if notLazy != nil {
		r.warn("", "%v", notLazy)
	}
	why, err := preflight.NotLazy(ctx, x, pid)
	switch {
	case err != nil:
		r.failed(err, "", "its memory can't be asked for")
	case len(why) == 0 && notLazy == nil:
		r.ok("its memory can be restored lazily")
	}
	for _, w := range why {
		r.warn("", "a QEMU like this one can't restore lazily: %s", w)
	}
}

// disks tells which of the VM's disks a checkpoint does not cover.
func (r *report) disks(ctx context.Context, x qmp.Executor, indexed []disk.Entry) {
	list, err := disks.Find(ctx, x)
	if err != nil {
		r.failed(err, "", "its disks can't be asked for")
		return
	}
	for i, v := range disks.Record(list, false, nil) {
		switch {
		case len(v.Layers) > 0:
			r.ok("the disk %s is %s: a checkpoint records what it was", v.Name, v.Layers[0].Path)
		case len(list[i].Layers) > 0 && list[i].Layers[0].Path != "":
			r.warn("as a user who can read it, or in a format that is known", "the disk %s is %s, which can't be looked at: a checkpoint does not record what it was, and resume can't tell whether it has changed", v.Name, list[i].Layers[0].Path)
		default:
			r.warn("see to it yourself that resume finds it as it was", "the disk %s is no file that can be looked at: a checkpoint does not record what it was", v.Name)
		}
	}
	plain := make(map[string]bool)
	for _, top := range disks.ReadOnly(list) {
		if ids := disk.Find(indexed, top.Path); !slices.ContainsFunc(indexed, func(e disk.Entry) bool {
			return e.State == disk.Current && slices.Contains(ids, e.ID)
		}) {
			plain[top.Path] = true
		}
	}
	for _, path := range slices.Sorted(maps.Keys(plain)) {
		r.add(OK, "flic-migrate disk index "+path, "%s has no index that is current: pages of memory that are on it are stored all the same", path)
	}
}

// Unreachable is what is found of a VM, named as the command line does, that does not
// answer for err.
func Unreachable(target string, err error) Finding {
	r := report{topic: "vm"}
	r.failed(err, "is QEMU running, and does nobody else hold its monitor?", target+" can't be reached")
	return r.list[0]
}
