// Package migration drives migrations through a monitor ([qmp.Executor]): the
// single commands, and what can be made of them.
//
//	Track       a migration that never completes, to see what the guest writes
//	Checkpoint  one that the guest survives, into this process
//	Resume      an incoming one, eager or lazy
//	Recover     the rest of a lazy one whose server has died
//
// It knows nothing of what is in the stream: that is for the functions that it is
// given. Package rounds, below it, adds up what several Tracks have seen.
package migration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp"
)

// Status is the state of a migration (MigrationStatus in QEMU's
// qapi/migration.json).
type Status string

// The states of a migration, of QEMU 7.2 to 11.1. A newer QEMU may have more; an
// unknown one is neither an end nor an error, and nothing goes on because of it.
const (
	StatusNone          Status = "none"
	StatusSetup         Status = "setup"
	StatusWaitUnplug    Status = "wait-unplug" // of a failover device, by the guest
	StatusActive        Status = "active"
	StatusPreSwitchover Status = "pre-switchover" // guest stopped, waits for Continue
	StatusDevice        Status = "device"         // at every switchover from 10.0 on
	StatusColo          Status = "colo"
	// StatusPostcopyDevice: the destination loads its devices, and does not run (10.2).
	StatusPostcopyDevice Status = "postcopy-device"
	StatusPostcopyActive Status = "postcopy-active"
	StatusPostcopyPaused Status = "postcopy-paused"
	// StatusPostcopyRecoverSetup: a new server is waited for (9.1).
	StatusPostcopyRecoverSetup Status = "postcopy-recover-setup"
	// StatusPostcopyRecover: a new server is being shaken hands with.
	StatusPostcopyRecover Status = "postcopy-recover"
	StatusCancelling      Status = "cancelling"
	StatusCancelled       Status = "cancelled"
	StatusCompleted       Status = "completed"
	StatusFailing         Status = "failing" // on its way to failed (11.0)
	StatusFailed          Status = "failed"
)

// Ended says whether a migration in this state will not change any more.
func (s Status) Ended() bool {
	return s == StatusCompleted || s == StatusFailed || s == StatusCancelled
}

// goesOn says whether there is a migration that has not ended.
func (s Status) goesOn() bool { return s != StatusNone && !s.Ended() }

// recovered says whether a lazy restore whose server had died goes on: with the new
// one, or to its end.
func (s Status) recovered() bool { return s == StatusPostcopyActive || s == StatusCompleted }

// Info is QEMU's report of a migration. What QEMU did not say is zero. What it only
// guesses at, and nobody here needs, is not read: the expected downtime of QEMU 11.1 can
// be 2^63-1, which comes through libvirt as a number that is larger than any int64.
type Info struct {
	Status         Status    `json:"status"`
	ErrorDesc      string    `json:"error-desc"`
	Downtime       int64     `json:"downtime"` // ms; once completed
	RAM            *RAMStats `json:"ram"`
	BlockedReasons []string  `json:"blocked-reasons"`

	// Of a lazy restore, with postcopy-blocktime, since 10.1: the average time in ns
	// that a thread waited for a page, how many waited for 2^N µs, and each vCPU's average.
	Latency     int64           `json:"postcopy-latency"`
	LatencyDist []int64         `json:"postcopy-latency-dist"`
	VCPULatency []time.Duration `json:"postcopy-vcpu-latency"`
}

// RAMStats is the part of the report on guest memory. Sizes are in bytes.
type RAMStats struct {
	Total          int64   `json:"total"`
	Transferred    int64   `json:"transferred"`
	Remaining      int64   `json:"remaining"`
	PageSize       int64   `json:"page-size"`
	DirtySyncCount int64   `json:"dirty-sync-count"` // passes begun
	Mbps           float64 `json:"mbps"`             // megabits a second
}

// Query returns the state of the newest migration, on the source or the
// destination. A QEMU that never had one says StatusNone.
func Query(ctx context.Context, x qmp.Executor) (Info, error) {
	var info Info
	err := x.Execute(ctx, "query-migrate", nil, &info)
	if err == nil {
		info.complete()
	}
	return info, err
}

// complete names the status of a QEMU that never had a migration.
func (i *Info) complete() {
	if i.Status == "" {
		i.Status = StatusNone
	}
}

// state is what a QEMU says of itself.
type state struct {
	settings asIs
	info     Info
	guest    qmp.RunState
}

// asIs are the migration settings of a QEMU.
type asIs struct {
	capabilities map[string]bool
	parameters   map[string]json.RawMessage
}

// look asks for all of it at once.
func look(ctx context.Context, x qmp.Executor) (s state, err error) {
	var list capabilityList
	for _, err := range qmp.Together(ctx, x,
		qmp.Call{Command: "query-migrate-capabilities", Result: &list},
		qmp.Call{Command: "query-migrate-parameters", Result: &s.settings.parameters},
		qmp.Call{Command: "query-migrate", Result: &s.info},
		qmp.Call{Command: "query-status", Result: &s.guest},
	) {
		if err != nil {
			return s, err
		}
	}
	s.settings.capabilities = list.byName()
	s.info.complete()
	return s, nil
}

// SetCapabilities turns migration capabilities on and off. QEMU refuses while a
// migration runs, and names one that it does not know.
func SetCapabilities(ctx context.Context, x qmp.Executor, capabilities map[string]bool) error {
	c := capabilitiesCall(capabilities)
	return x.Execute(ctx, c.Command, c.Args, nil)
}

// capabilitiesCall is what SetCapabilities executes.
func capabilitiesCall(capabilities map[string]bool) qmp.Call {
	list := make(capabilityList, 0, len(capabilities))
	// In a fixed order, so that the one QEMU complains about is always the same.
	for _, name := range slices.Sorted(maps.Keys(capabilities)) {
		list = append(list, capability{name, capabilities[name]})
	}
	return qmp.Call{Command: "migrate-set-capabilities", Args: map[string]any{"capabilities": list}}
}

// capability is one as QEMU writes it.
type capability struct {
	Capability string `json:"capability"`
	State      bool   `json:"state"`
}

type capabilityList []capability

func (l capabilityList) byName() map[string]bool {
	on := make(map[string]bool, len(l))
	for _, c := range l {
		on[c.Capability] = c.State
	}
	return on
}

// Capabilities returns every migration capability this QEMU knows and whether
// it is on.
func Capabilities(ctx context.Context, x qmp.Executor) (map[string]bool, error) {
	var list capabilityList
	if err := x.Execute(ctx, "query-migrate-capabilities", nil, &list); err != nil {
		return nil, err
	}
	return list.byName(), nil
}

// SetParameters sets migration parameters, such as max-bandwidth (bytes a
// second) and downtime-limit (ms).
func SetParameters(ctx context.Context, x qmp.Executor, parameters map[string]any) error {
	c := parametersCall(parameters)
	return x.Execute(ctx, c.Command, c.Args, nil)
}

// parametersCall is what SetParameters executes.
func parametersCall(parameters map[string]any) qmp.Call {
	return qmp.Call{Command: "migrate-set-parameters", Args: parameters}
}

// Parameters returns the migration parameters, each as QEMU wrote it, so that
// those changed can be set back with SetParameters.
func Parameters(ctx context.Context, x qmp.Executor) (map[string]json.RawMessage, error) {
	var parameters map[string]json.RawMessage
	err := x.Execute(ctx, "query-migrate-parameters", nil, &parameters)
	return parameters, err
}

// Error is a migration that did not complete.
type Error struct {
	Status Status // failed, cancelled, ...
	Desc   string // QEMU's reason; empty when it gave none
}

func (e *Error) Error() string {
	if e.Desc == "" {
		return fmt.Sprintf("qmp: migration %s", e.Status)
	}
	return fmt.Sprintf("qmp: migration %s: %s", e.Status, e.Desc)
}

// Start begins an outgoing migration, to a uri such as "exec:cat > file". It
// returns when the migration has begun; Wait waits for its end.
func Start(ctx context.Context, x qmp.Executor, uri string) error {
	return x.Execute(ctx, "migrate", map[string]any{"uri": uri}, nil)
}

// Incoming starts the incoming migration of a QEMU that was started with
// -incoming defer.
func Incoming(ctx context.Context, x qmp.Executor, uri string) error {
	return x.Execute(ctx, "migrate-incoming", map[string]any{"uri": uri}, nil)
}

// Cancel ends an outgoing migration; without one it does nothing. It
// returns at once: the state is cancelling until an exec: child has read on or
// ended. A guest that waits in StatusPreSwitchover runs again.
func Cancel(ctx context.Context, x qmp.Executor) error {
	return x.Execute(ctx, "migrate_cancel", nil, nil)
}

// pollInterval is how often Wait asks: often enough that a save is not
// measurably longer for it, rarely enough that QEMU's main loop does not notice.
const pollInterval = 20 * time.Millisecond

// Wait waits until the migration has completed, or is in one of the
// states in until. A migration that failed or was cancelled is a
// *Error, unless until names that state; the report comes with it.
//
// It asks again and again, and is only sped up by MIGRATION events, which come
// with the capability events alone and not over every transport. It waits as
// long as ctx lets it: an exec: child that is slow to end keeps QEMU from
// answering, and that alone is no failure.
func Wait(ctx context.Context, x qmp.Executor, until ...Status) (Info, error) {
	return waitAnd(ctx, x, nil, until...)
}

// waitAnd is Wait, and also asks something each time, at no more cost.
func waitAnd(ctx context.Context, x qmp.Executor, also []qmp.Call, until ...Status) (info Info, err error) {
	listening, stop := context.WithCancel(ctx)
	defer stop()
	events, err := x.Events(listening)
	if err != nil {
		events = nil // blocks for ever: polling is enough
	}
	for {
		info = Info{}
		err := qmp.Together(ctx, x, append([]qmp.Call{{Command: "query-migrate", Result: &info}}, also...)...)[0]
		info.complete()
		unanswered := errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil
		switch {
		case unanswered: // only this question; ask again
		case err != nil:
			return info, err
		case slices.Contains(until, info.Status), info.Status == StatusCompleted:
			return info, nil
		case info.Status.Ended():
			return info, &Error{Status: info.Status, Desc: info.ErrorDesc}
		}
		if events, err = waitEvent(ctx, events, "MIGRATION"); err != nil {
			return info, err
		}
	}
}

// waitEvent waits for an event of this name or for pollInterval. It returns nil
// for a channel that has ended, which then is not looked at again.
func waitEvent(ctx context.Context, events <-chan qmp.Event, name string) (<-chan qmp.Event, error) {
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
