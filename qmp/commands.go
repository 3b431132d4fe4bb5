package qmp

import (
	"context"
	"errors"
	"time"
)

// Call is a command for Together: what Executor.Execute is given.
type Call struct {
	Command string
	Args    any
	Result  any
}

// Together runs commands in this order and returns what Execute would, an error for each.
// All of them are run, whatever becomes of one: it is for questions, and for what is to be
// done in any case. A [Monitor] sends them in one piece and then hears the answers. That
// saves the time in which QEMU and this process wait for each other, which is up to a
// millisecond for each command while a guest has the CPUs.
func Together(ctx context.Context, x Executor, calls ...Call) []error {
	if m, ok := x.(*Monitor); ok {
		return m.together(ctx, calls)
	}
	errs := make([]error, len(calls))
	for i, c := range calls {
		errs[i] = x.Execute(ctx, c.Command, c.Args, c.Result)
	}
	return errs
}

// RunState is what the guest is doing (RunState in QEMU's qapi/run-state.json):
// running, paused, inmigrate, postmigrate, prelaunch, ...
type RunState struct {
	Running bool   `json:"running"`
	Status  string `json:"status"`
}

// QueryStatus returns what the guest is doing.
func QueryStatus(ctx context.Context, x Executor) (RunState, error) {
	var s RunState
	err := x.Execute(ctx, "query-status", nil, &s)
	return s, err
}

// Stop stops the guest's processors.
func Stop(ctx context.Context, x Executor) error { return x.Execute(ctx, "stop", nil, nil) }

// Cont lets the guest run, also after a completed migration. QEMU says "completed"
// a moment before it has let go of the guest and refuses until then (qmp_cont in
// QEMU's monitor/qmp-cmds.c); Cont tries again for as long as ctx lets it, or 30 s.
func Cont(ctx context.Context, x Executor) error {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, defaultTimeout)
		defer cancel()
	}
	for {
		err := x.Execute(ctx, "cont", nil, nil)
		var refused *Error
		if !errors.As(err, &refused) || refused.Desc != notFinalized {
			return err
		}
		select {
		case <-time.After(finalizeInterval):
		case <-ctx.Done():
			return err
		}
	}
}

const (
	notFinalized = "Migration is not finalized yet"
	// finalizeInterval is short because a guest stands still: it takes QEMU some hundred µs.
	finalizeInterval = 250 * time.Microsecond
)

// Quit ends QEMU. QEMU may be gone before its answer is out, so a connection
// that is lost then is no error.
func Quit(ctx context.Context, x Executor) error {
	err := x.Execute(ctx, "quit", nil, nil)
	if errors.Is(err, ErrLost) {
		return nil
	}
	return err
}

// PMemSave makes QEMU write size bytes of guest-physical memory from addr into
// a file. On x86 the range 0xA0000–0xFFFFF is what the guest sees there, video
// memory and ROM, and not the RAM block beneath.
func PMemSave(ctx context.Context, x Executor, addr, size uint64, file string) error {
	return x.Execute(ctx, "pmemsave", map[string]any{"val": addr, "size": size, "filename": file}, nil)
}

// HumanMonitor runs a command of the human monitor and returns what it prints.
// That text changes between versions of QEMU.
func HumanMonitor(ctx context.Context, x Executor, line string) (string, error) {
	var text string
	err := x.Execute(ctx, "human-monitor-command", map[string]any{"command-line": line}, &text)
	return text, err
}
