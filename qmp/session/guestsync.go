package session

import (
	"context"
	"io"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp/agent"
	"github.com/flic-migrate/flic-migrate/qmp/libvirt/domain"
)

// GuestSync says how a guest is made to write to its disks what it has not yet, before
// it is saved.
type GuestSync struct {
	Socket string        // of the guest's agent; empty: libvirt has it
	Limit  time.Duration // how long the guest may take
}

// guestSync does so while the guest runs. A guest that can't, or does not in time, is
// saved all the same.
func (o *CheckpointOptions) guestSync(ctx context.Context, t Target) {
	if o.Sync == nil {
		return
	}
	limited, cancel := context.WithTimeout(ctx, o.Sync.Limit)
	defer cancel()
	var a interface {
		agent.Agent
		io.Closer
	}
	var err error
	if o.Sync.Socket != "" {
		a, err = agent.Dial(limited, o.Sync.Socket)
	} else {
		a, err = domain.DialAgent(limited, t.Connect, t.Domain)
	}
	if err == nil {
		err = agent.Sync(limited, a)
		a.Close()
	}
	if err != nil && ctx.Err() == nil {
		o.Log.Warn("the guest is saved without having written to its disks what it had to", "cause", err)
	}
}
