package qmp

import (
	"context"
	"errors"
	"fmt"
)

var (
	// ErrBusy: QEMU serves one client at a time on a monitor, and this one has
	// no turn. Whoever holds it (libvirt, a shell with socat) must let go, or
	// QEMU must be started with a second -qmp.
	ErrBusy = errors.New("the monitor is held by another client, or QEMU does not serve it now")
	// ErrClosed: Close was called.
	ErrClosed = errors.New("the monitor connection is closed")
	// ErrLost: QEMU has ended or the network has failed.
	ErrLost = errors.New("the monitor connection is lost")
	// ErrNoFiles: the monitor is no Unix socket, and only those carry files.
	ErrNoFiles = errors.New("files can't be passed over this monitor")
	// ErrHumanMonitor: the socket is of QEMU's other monitor, whose commands are for
	// people.
	ErrHumanMonitor = errors.New("this is QEMU's human monitor (-monitor), and not QMP: start QEMU with -qmp unix:PATH,server=on,wait=off as well")
	// ErrProtocol: what came is not QMP, or more than Options.MaxMessage of it.
	ErrProtocol = errors.New("the monitor does not speak QMP")
)

// Error is QEMU's refusal of a command.
type Error struct {
	Command string
	Class   string // GenericError, CommandNotFound, DeviceNotFound, ...
	Desc    string // for humans; QEMU changes these texts between versions
}

func (e *Error) Error() string {
	if e.Class == "" || e.Class == "GenericError" {
		return fmt.Sprintf("qmp: %s: %s", e.Command, e.Desc)
	}
	return fmt.Sprintf("qmp: %s: %s (%s)", e.Command, e.Desc, e.Class)
}

// OpError is a command that could not be sent or was not answered.
type OpError struct {
	Op   string // the command, or connect, events, run
	Addr string // of the monitor
	Err  error
}

func (e *OpError) Error() string { return fmt.Sprintf("qmp: %s: %s: %v", e.Addr, e.Op, e.Err) }
func (e *OpError) Unwrap() error { return e.Err }

// unanswered says what was being waited for when a call's context ended. A
// context that was cancelled rather than overdue needs no explanation.
func unanswered(ctx context.Context, what string) error {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return fmt.Errorf("%s: %w", what, ctx.Err())
	}
	return ctx.Err()
}
