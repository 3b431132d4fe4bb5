package session

import (
	"context"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/disks"
	"github.com/flic-migrate/flic-migrate/qmp/preflight"
	"github.com/flic-migrate/flic-migrate/tier/store"
)

// check is migration.ResumeOptions.Check: it compares the QEMU at m with what was saved.
func (o *ResumeOptions) check(ctx context.Context, m *qmp.Monitor, c *store.Checkpoint) (notLazy error, warnings []string, err error) {
	saved, err := preflight.Describe(c.Checkpoint)
	if err != nil {
		return nil, nil, err
	}
	po := preflight.Options{Force: o.Force, Version: m.Version()}
	if peer, known := m.Peer(); known {
		po.PID = int(peer.Pid)
	}
	r, err := preflight.Check(ctx, m, saved, po)
	if err != nil {
		return r.NotLazy, r.Warnings, err
	}
	more, err := o.compareDisks(ctx, c, func() ([]disks.Disk, error) { return disks.Find(ctx, m) })
	return r.NotLazy, append(r.Warnings, more...), err
}
