package migration

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/stream"
)

// Tracking is a migration that is never meant to complete: its consumer sees
// which pages come again. The state of QEMU's migration and guest:
//
//	setup, active       guest runs; the consumer reads, waits, reads, has enough ─┐
//	pre-switchover      nothing left to send; guest stopped ──────────────────────┤
//	cancelled           guest runs ◄───────────────────────────── migrate_cancel ─┘

// TrackOptions say how to track.
type TrackOptions struct {
	// Filter reads the stream until it has seen enough. A stream that ends
	// when nothing was left to send is for it to judge.
	Filter Consumer
	Open   OpenFunc // nil: OpenChannel
	Redial Redialer // may be nil
}

// TrackReport is what a tracking migration did to the guest.
type TrackReport struct {
	// Stopped is for how long the guest stood still, by QEMU's clock.
	Stopped time.Duration `json:"stopped_ns"`
	Total   time.Duration `json:"total_ns"` // of the migration
}

// Track runs one tracking migration and returns when it has ended. It succeeds
// if the filter does.
//
// In every case, also when ctx ends, the migration is ended, the guest runs and
// capabilities and parameters are as they were before Track returns; if that
// fails the error says so.
func Track(ctx context.Context, x qmp.Executor, o TrackOptions) (rep TrackReport, err error) {
	d := &drive{x: x, open: o.Open, redial: o.Redial}
	// A short downtime limit keeps QEMU from taking a pass for finished early;
	// 0 would keep it from beginning a second one.
	if err := d.prepare(ctx, trackNeeds, map[string]any{"downtime-limit": 1}); err != nil {
		return rep, err
	}
	if !d.was.Running {
		return rep, fmt.Errorf("%w (it is %s)", ErrNotRunning, d.was.Status)
	}
	if _, ok := d.settings.have["pause-before-switchover"]; !ok {
		return rep, errors.New("this QEMU has no capability pause-before-switchover, without which a tracking migration could complete")
	}
	listening, stop := context.WithCancel(ctx)
	defer stop()
	events, eventsErr := x.Events(listening)
	start := time.Now()
	defer func() {
		if e := d.end(ctx); e != nil {
			err = errors.Join(err, fmt.Errorf("after tracking: %w", e))
		}
		rep.Total = time.Since(start)
		if eventsErr == nil {
			rep.Stopped, _, _ = pauses(events)
		}
	}()
	if err := d.settings.set(ctx, x); err != nil {
		return rep, err
	}
	if err := d.start(ctx, OneWay, o.Filter); err != nil {
		return rep, err
	}
	return rep, d.track(ctx)
}

// trackNeeds: all others off, because return-path and postcopy-ram want answers,
// and auto-converge would slow the guest down while it is watched.
func trackNeeds(name string, _ bool) bool {
	return name == "events" || name == "pause-before-switchover"
}

// track waits for the filter's end.
func (d *drive) track(ctx context.Context) error {
	waiting, stop := context.WithCancel(ctx)
	defer stop()
	go func() {
		select {
		case <-d.done:
			stop()
		case <-waiting.Done():
		}
	}()
	info, err := Wait(waiting, d.x, StatusPreSwitchover)
	var ended *Error
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case waiting.Err() != nil:
		return d.err
	case errors.As(err, &ended):
		return d.brokenOff(ended)
	case err != nil:
		return err
	case info.Status == StatusCompleted:
		return fmt.Errorf("the tracking migration was let through to its end")
	}
	// The guest stands still: nothing comes before this.
	if err := Cancel(ctx, d.x); err != nil {
		return err
	}
	select {
	case <-d.done: // soon: what QEMU has sent is there
		return d.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// brokenOff is the result when QEMU or somebody else has ended the migration.
// The consumer may have its own reason, and be what QEMU has failed for.
func (d *drive) brokenOff(ended *Error) error {
	select {
	case <-d.done:
	case <-time.After(livesTime):
		d.stop()
		<-d.done
	}
	switch {
	case d.err == nil:
		return nil
	case errors.Is(d.err, context.Canceled):
		return ended
	}
	return d.because(ended)
}

// because is QEMU's failure and the consumer's, the cause first. A stream that ends too
// early is QEMU's doing. Otherwise it is the consumer that can't go on, as with a full disk,
// and QEMU says no more of that than that a pipe is broken.
func (d *drive) because(ended *Error) error {
	if errors.Is(d.err, stream.ErrTruncated) || errors.Is(d.err, stream.ErrDamaged) || errors.Is(d.err, stream.ErrNotStream) {
		return fmt.Errorf("%w: %w", ended, d.err)
	}
	return fmt.Errorf("%w (%w)", d.err, ended)
}
