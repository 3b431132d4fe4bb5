package qmp

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"
)

// Tracking is a migration that is never meant to complete: its exec: child sees
// which pages come again. The state of QEMU's migration and guest:
//
//	setup, active       guest runs; the child reads, waits, reads
//	failed              the child has seen enough and has ended; guest runs
//	pre-switchover      nothing left to send; guest stopped ─► migrate_cancel
//	cancelled           guest runs

// TrackOptions say how to track.
type TrackOptions struct {
	// URI is the exec: child that reads the stream.
	URI string
	// Abort makes the child end soon; it is called before a migration is
	// cancelled that the child may be holding, because QEMU can't end it and
	// settings can't be restored until the child reads on or ends.
	Abort func()
	// Redial makes a new connection if the first is lost; may be nil. Without
	// it a guest stays as it was when the connection was lost, and that can
	// mean stopped.
	Redial func(context.Context) (Executor, error)
}

// TrackReport is what a tracking migration did to the guest.
type TrackReport struct {
	// Stopped is for how long the guest stood still, by QEMU's clock.
	Stopped time.Duration `json:"stopped_ns"`
	Total   time.Duration `json:"total_ns"` // of the migration
}

var (
	// ErrMigrating: another migration is under way.
	ErrMigrating = errors.New("a migration is already running")
	// ErrNotRunning: there is nothing to track.
	ErrNotRunning = errors.New("the guest is not running, so it writes nothing that could be tracked")
)

// restoreTime bounds the way back to the former settings.
const restoreTime = 15 * time.Second

// Track runs one tracking migration and returns when it has ended. Whether the
// child has seen all it wanted is for the child to tell: that it ended early is
// a *MigrationError here in both cases, which comes with the report.
//
// In every case, also when ctx ends, the migration is ended, the guest runs and
// capabilities and parameters are as they were before Track returns; if that
// fails the error says so.
func Track(ctx context.Context, x Executor, o TrackOptions) (rep TrackReport, err error) {
	info, err := QueryMigrate(ctx, x)
	if err != nil {
		return rep, err
	}
	if info.Status != StatusNone && !info.Status.Ended() {
		return rep, fmt.Errorf("%w (it is %s)", ErrMigrating, info.Status)
	}
	s, err := QueryStatus(ctx, x)
	if err != nil {
		return rep, err
	}
	if !s.Running {
		return rep, fmt.Errorf("%w (it is %s)", ErrNotRunning, s.Status)
	}
	back, err := prepareTrack(ctx, x)
	if err != nil {
		return rep, err
	}
	listening, stop := context.WithCancel(ctx)
	defer stop()
	events, eventsErr := x.Events(listening)
	start := time.Now()
	started := false
	defer func() {
		if e := endTrack(ctx, x, o, back, started); e != nil {
			err = errors.Join(err, fmt.Errorf("after tracking: %w", e))
		}
		rep.Total = time.Since(start)
		if eventsErr == nil {
			rep.Stopped = stoppedFor(events)
		}
	}()
	if err := back.set(ctx, x); err != nil {
		return rep, err
	}
	// Also if the answer was not waited for: QEMU may have begun.
	started = true
	if err := Migrate(ctx, x, o.URI); err != nil {
		var refused *Error
		started = !errors.As(err, &refused)
		return rep, err
	}
	info, err = WaitMigration(ctx, x, StatusPreSwitchover)
	if err == nil && info.Status == StatusPreSwitchover {
		// The guest stands still: nothing comes before this.
		err = MigrateCancel(ctx, x)
	} else if err == nil {
		err = fmt.Errorf("the tracking migration ended as %s", info.Status)
	}
	return rep, err
}

// trackState is what is changed for tracking and how it was before.
type trackState struct {
	on, off          map[string]bool // capabilities while tracking and before
	during, formerly map[string]any  // parameters while tracking and before
}

// prepareTrack finds out what there is to change.
func prepareTrack(ctx context.Context, x Executor) (trackState, error) {
	t := trackState{on: map[string]bool{}, off: map[string]bool{}, formerly: map[string]any{}}
	have, err := Capabilities(ctx, x)
	if err != nil {
		return t, err
	}
	for name, was := range have {
		// All others off: return-path and postcopy-ram want answers, and
		// auto-converge would slow the guest down while it is watched.
		if want := name == "events" || name == "pause-before-switchover"; want != was {
			t.on[name], t.off[name] = want, was
		}
	}
	if _, ok := have["pause-before-switchover"]; !ok {
		return t, errors.New("this QEMU has no capability pause-before-switchover, without which a tracking migration could complete")
	}
	// A short downtime limit keeps QEMU from taking a pass for finished early;
	// 0 would keep it from beginning a second one.
	t.during = map[string]any{"max-bandwidth": int64(1) << 40, "downtime-limit": 1}
	parameters, err := Parameters(ctx, x)
	if err != nil {
		return t, err
	}
	for name := range t.during {
		was, ok := parameters[name]
		if !ok {
			return t, fmt.Errorf("this QEMU has no migration parameter %s", name)
		}
		t.formerly[name] = json.RawMessage(was)
	}
	return t, nil
}

func (t trackState) set(ctx context.Context, x Executor) error {
	if err := SetCapabilities(ctx, x, t.on); err != nil {
		return err
	}
	return SetParameters(ctx, x, t.during)
}

// endTrack leaves QEMU as it was, with a new connection if need be.
func endTrack(ctx context.Context, x Executor, o TrackOptions, t trackState, started bool) error {
	aborted := ctx.Err() != nil
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), restoreTime)
	defer cancel()
	err := restoreTrack(ctx, x, o, t, started, aborted)
	if o.Redial == nil || !(errors.Is(err, ErrLost) || errors.Is(err, ErrClosed)) {
		return err
	}
	again, dialErr := o.Redial(ctx)
	if dialErr != nil {
		return errors.Join(err, dialErr)
	}
	return restoreTrack(ctx, again, o, t, started, true)
}

func restoreTrack(ctx context.Context, x Executor, o TrackOptions, t trackState, started, aborted bool) error {
	if started {
		if aborted && o.Abort != nil {
			o.Abort()
		}
		if err := MigrateCancel(ctx, x); err != nil {
			return err
		}
		_, err := WaitMigration(ctx, x, StatusCancelled, StatusFailed, StatusNone)
		if err != nil {
			return err
		}
	}
	if err := SetParameters(ctx, x, t.formerly); err != nil {
		return err
	}
	return SetCapabilities(ctx, x, t.off)
}

// stoppedFor adds up the times between STOP and RESUME among the events so far.
func stoppedFor(events <-chan Event) (sum time.Duration) {
	var since time.Time
	for {
		select {
		case e, ok := <-events:
			if !ok {
				return sum
			}
			at := time.Unix(e.Timestamp.Seconds, e.Timestamp.Microseconds*1000)
			if e.Event == "STOP" {
				since = at
			} else if e.Event == "RESUME" && !since.IsZero() {
				sum += at.Sub(since)
				since = time.Time{}
			}
		default:
			return sum
		}
	}
}
