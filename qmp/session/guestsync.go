package session

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp/agent"
	"github.com/flic-migrate/flic-migrate/qmp/libvirt/domain"
	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/tier/rescue"
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
	a, err := guestAgent(limited, t, o.Sync.Socket)
	if err == nil {
		err = agent.Sync(limited, a)
		a.Close()
	}
	if err != nil && ctx.Err() == nil {
		o.Log.Warn("the guest is saved without having written to its disks what it had to", "cause", err)
	}
}

// closingAgent is a connection to a guest's agent.
type closingAgent interface {
	agent.Agent
	io.Closer
}

// guestAgent connects to the agent of a target's guest: at a socket, or if that is empty
// through libvirt.
func guestAgent(ctx context.Context, t Target, socket string) (closingAgent, error) {
	if socket == "" {
		return domain.DialAgent(ctx, t.Connect, t.Domain)
	}
	return agent.Dial(ctx, socket)
}

// GuestCare is what the guest's agent does when the guest runs again after a resume.
type GuestCare struct {
	Socket  string        // of the guest's agent; empty: libvirt has it
	Time    bool          // the guest's clock is set to the host's
	Command string        // a shell in the guest runs it, after that; empty: none
	Limit   time.Duration // how long all of it may take
}

var (
	// ErrGuestCare: the guest runs, and has not done what it was to do then.
	ErrGuestCare = errors.New("the guest runs, and has not done what it was asked for")
	// ErrGuestPaused: nor has a guest that was resumed as paused.
	ErrGuestPaused = errors.New("the guest is paused, and so has not done what it was asked for")
)

// take does what there is to do.
func (g *GuestCare) take(ctx context.Context, t Target) error {
	ctx, cancel := context.WithTimeoutCause(ctx, g.Limit, fmt.Errorf("not within %v", g.Limit))
	defer cancel()
	a, err := guestAgent(ctx, t, g.Socket)
	if err != nil {
		return err
	}
	defer a.Close()
	if w, ok := a.(interface{ Await(context.Context) error }); ok {
		if err := w.Await(ctx); err != nil {
			return err
		}
	}
	if g.Time {
		// Now, and not before: connecting may have taken a while.
		if err := agent.SetTime(ctx, a, time.Now()); err != nil {
			return fmt.Errorf("set the clock: %w", err)
		}
	}
	if g.Command != "" {
		if err := agent.Run(ctx, a, "/bin/sh", "-c", g.Command); err != nil {
			return fmt.Errorf("%.100q in the guest: %w", g.Command, err)
		}
	}
	return nil
}

// check finds out, before the guest is sent anything, that its agent has no socket.
func (g *GuestCare) check() error {
	if g == nil || g.Socket == "" {
		return nil
	}
	fi, err := os.Stat(g.Socket)
	if err == nil && fi.Mode().Type() != os.ModeSocket {
		err = fmt.Errorf("%s is no socket", g.Socket)
	}
	if err != nil {
		return fmt.Errorf("the guest's agent: %w", err)
	}
	return nil
}

// care has the guest cared for as soon as it runs, beside the rest of the resume. done waits
// for that after a resume that has come to this error, and returns what has failed of it.
func (o *ResumeOptions) care(ctx context.Context, t Target) (done func(rep *ResumeReport, resumed error) error) {
	g := o.Guest
	if g == nil {
		return func(*ResumeReport, error) error { return nil }
	}
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan error, 1)
	var begun atomic.Bool
	running := o.Running
	o.Running = func(rep migration.ResumeReport) {
		if rep.State == "running" && !begun.Swap(true) {
			go func() { ended <- rescue.Call(func() error { return g.take(ctx, t) }) }()
		}
		if running != nil {
			running(rep)
		}
	}
	start := time.Now()
	return func(rep *ResumeReport, resumed error) error {
		defer cancel()
		if !begun.Load() {
			if resumed != nil {
				return nil
			}
			return ErrGuestPaused
		}
		if resumed != nil {
			cancel() // a guest that is held answers nobody
		}
		err := <-ended
		rep.Guest = time.Since(start)
		if err == nil || resumed != nil {
			return nil // that is said, with its reason
		}
		return fmt.Errorf("%w: %w", ErrGuestCare, err)
	}
}
