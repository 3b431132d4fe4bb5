package qmp

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"time"
)

// Status is the state of a migration (MigrationStatus in QEMU's
// qapi/migration.json).
type Status string

// The states of a migration. A newer QEMU may have more; an unknown one is
// neither an end nor an error.
const (
	StatusNone           Status = "none"
	StatusSetup          Status = "setup"
	StatusActive         Status = "active"
	StatusPreSwitchover  Status = "pre-switchover" // guest stopped, waits for MigrateContinue
	StatusDevice         Status = "device"
	StatusPostcopyActive Status = "postcopy-active"
	StatusPostcopyPaused Status = "postcopy-paused"
	// StatusPostcopyRecover: a new server is being shaken hands with.
	StatusPostcopyRecover Status = "postcopy-recover"
	StatusCancelling      Status = "cancelling"
	StatusCancelled       Status = "cancelled"
	StatusCompleted       Status = "completed"
	StatusFailed          Status = "failed"
)

// Ended says whether a migration in this state will not change any more.
func (s Status) Ended() bool {
	return s == StatusCompleted || s == StatusFailed || s == StatusCancelled
}

// MigrationInfo is QEMU's report of a migration. What QEMU did not say is zero.
type MigrationInfo struct {
	Status           Status    `json:"status"`
	ErrorDesc        string    `json:"error-desc"`
	TotalTime        int64     `json:"total-time"`        // ms
	SetupTime        int64     `json:"setup-time"`        // ms
	Downtime         int64     `json:"downtime"`          // ms; once completed
	ExpectedDowntime int64     `json:"expected-downtime"` // ms; while active
	RAM              *RAMStats `json:"ram"`
	BlockedReasons   []string  `json:"blocked-reasons"`
}

// RAMStats is the part of the report on guest memory. Sizes are in bytes.
type RAMStats struct {
	Total          int64   `json:"total"`
	Transferred    int64   `json:"transferred"`
	Remaining      int64   `json:"remaining"`
	Duplicate      int64   `json:"duplicate"` // zero pages
	Normal         int64   `json:"normal"`    // pages sent as they are
	NormalBytes    int64   `json:"normal-bytes"`
	PageSize       int64   `json:"page-size"`
	DirtySyncCount int64   `json:"dirty-sync-count"` // passes begun
	DirtyPagesRate int64   `json:"dirty-pages-rate"` // pages a second
	Mbps           float64 `json:"mbps"`             // megabits a second
	PrecopyBytes   int64   `json:"precopy-bytes"`
	DowntimeBytes  int64   `json:"downtime-bytes"`
	PostcopyBytes  int64   `json:"postcopy-bytes"`
}

// QueryMigrate returns the state of the newest migration, on the source or the
// destination. A QEMU that never had one says StatusNone.
func QueryMigrate(ctx context.Context, x Executor) (MigrationInfo, error) {
	var info MigrationInfo
	err := x.Execute(ctx, "query-migrate", nil, &info)
	if err == nil && info.Status == "" {
		info.Status = StatusNone
	}
	return info, err
}

// SetCapabilities turns migration capabilities on and off. QEMU refuses while a
// migration runs, and names one that it does not know.
func SetCapabilities(ctx context.Context, x Executor, capabilities map[string]bool) error {
	type state struct {
		Capability string `json:"capability"`
		State      bool   `json:"state"`
	}
	list := make([]state, 0, len(capabilities))
	for name, on := range capabilities {
		list = append(list, state{name, on})
	}
	// In a fixed order, so that the one QEMU complains about is always the same.
	slices.SortFunc(list, func(a, b state) int {
		if a.Capability < b.Capability {
			return -1
		}
		return 1
	})
	return x.Execute(ctx, "migrate-set-capabilities", map[string]any{"capabilities": list}, nil)
}

// Capabilities returns every migration capability this QEMU knows and whether
// it is on.
func Capabilities(ctx context.Context, x Executor) (map[string]bool, error) {
	var list []struct {
		Capability string `json:"capability"`
		State      bool   `json:"state"`
	}
	if err := x.Execute(ctx, "query-migrate-capabilities", nil, &list); err != nil {
		return nil, err
	}
	capabilities := make(map[string]bool, len(list))
	for _, c := range list {
		capabilities[c.Capability] = c.State
	}
	return capabilities, nil
}

// SetParameters sets migration parameters, such as max-bandwidth (bytes a
// second) and downtime-limit (ms).
func SetParameters(ctx context.Context, x Executor, parameters map[string]any) error {
	return x.Execute(ctx, "migrate-set-parameters", parameters, nil)
}

// Parameters returns the migration parameters, each as QEMU wrote it, so that
// those changed can be set back with SetParameters.
func Parameters(ctx context.Context, x Executor) (map[string]json.RawMessage, error) {
	var parameters map[string]json.RawMessage
	err := x.Execute(ctx, "query-migrate-parameters", nil, &parameters)
	return parameters, err
}

// Migrate starts an outgoing migration, to a uri such as "exec:cat > file". It
// returns when the migration has begun; WaitMigration waits for its end.
func Migrate(ctx context.Context, x Executor, uri string) error {
	return x.Execute(ctx, "migrate", map[string]any{"uri": uri}, nil)
}

// MigrateIncoming starts the incoming migration of a QEMU that was started with
// -incoming defer.
func MigrateIncoming(ctx context.Context, x Executor, uri string) error {
	return x.Execute(ctx, "migrate-incoming", map[string]any{"uri": uri}, nil)
}

// MigrateCancel ends an outgoing migration; without one it does nothing. It
// returns at once: the state is cancelling until an exec: child has read on or
// ended. A guest that waits in StatusPreSwitchover runs again.
func MigrateCancel(ctx context.Context, x Executor) error {
	return x.Execute(ctx, "migrate_cancel", nil, nil)
}

// MigrateContinue lets a migration go on that waits in the given state, which
// is StatusPreSwitchover with the capability pause-before-switchover.
func MigrateContinue(ctx context.Context, x Executor, state Status) error {
	return x.Execute(ctx, "migrate-continue", map[string]any{"state": state}, nil)
}

// pollInterval is how often WaitMigration asks: often enough that a save is not
// measurably longer for it, rarely enough that QEMU's main loop does not notice.
const pollInterval = 20 * time.Millisecond

// WaitMigration waits until the migration has completed, or is in one of the
// states in until. A migration that failed or was cancelled is a
// *MigrationError, unless until names that state; the report comes with it.
//
// It asks again and again, and is only sped up by MIGRATION events, which come
// with the capability events alone and not over every transport. It waits as
// long as ctx lets it: an exec: child that is slow to end keeps QEMU from
// answering, and that alone is no failure.
func WaitMigration(ctx context.Context, x Executor, until ...Status) (MigrationInfo, error) {
	listening, stop := context.WithCancel(ctx)
	defer stop()
	events, err := x.Events(listening)
	if err != nil {
		events = nil // blocks for ever: polling is enough
	}
	for {
		info, err := QueryMigrate(ctx, x)
		unanswered := errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil
		switch {
		case unanswered: // only this question; ask again
		case err != nil:
			return info, err
		case slices.Contains(until, info.Status), info.Status == StatusCompleted:
			return info, nil
		case info.Status.Ended():
			return info, &MigrationError{Status: info.Status, Desc: info.ErrorDesc}
		}
		if events, err = waitEvent(ctx, events, "MIGRATION"); err != nil {
			return info, err
		}
	}
}

// waitEvent waits for an event of this name or for pollInterval. It returns nil
// for a channel that has ended, which then is not looked at again.
func waitEvent(ctx context.Context, events <-chan Event, name string) (<-chan Event, error) {
	timer := time.NewTimer(pollInterval)
	defer timer.Stop()
	for {
		select {
		case e, ok := <-events:
			if !ok {
				events = nil
			} else if e.Event == name {
				return events, nil
			}
		case <-timer.C:
			return events, nil
		case <-ctx.Done():
			return events, ctx.Err()
		}
	}
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
	notFinalized     = "Migration is not finalized yet"
	finalizeInterval = 2 * time.Millisecond // it takes QEMU less than that, mostly
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

// MemSave is PMemSave by virtual address, as the given virtual CPU sees it.
func MemSave(ctx context.Context, x Executor, cpu int, addr, size uint64, file string) error {
	return x.Execute(ctx, "memsave", map[string]any{"val": addr, "size": size, "filename": file, "cpu-index": cpu}, nil)
}

// HumanMonitor runs a command of the human monitor and returns what it prints.
// That text changes between versions of QEMU.
func HumanMonitor(ctx context.Context, x Executor, line string) (string, error) {
	var text string
	err := x.Execute(ctx, "human-monitor-command", map[string]any{"command-line": line}, &text)
	return text, err
}
