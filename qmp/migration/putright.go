package migration

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp"
)

// noticeTime is how long QEMU has to notice that nobody reads its stream any more.
const noticeTime = 10 * time.Second

// PutRight is for who knows that a process of ours has been killed in a migration: it
// lets a guest run that was stopped for it, ends a migration that waits for it, and puts
// settings back, to QEMU's defaults as far as nobody knows any more what they were. What
// another process does by now is left alone, and so is a QEMU without a mark of ours, or
// one that is armed. It must not be used for background snapshots, of which a guest hangs
// that are cancelled. After an error it may be called again.
func PutRight(ctx context.Context, x qmp.Executor) error {
	d := &drive{x: x}
	p, err := Parameters(ctx, x)
	left := leftIn(p)
	if err != nil || left == LeftNothing || left == LeftArmed {
		return err
	}
	info, err := Query(ctx, x)
	if err == nil && info.Status == StatusPreSwitchover {
		info, err = d.cancelLeft(ctx)
	}
	if err == nil && info.Status.goesOn() {
		noticing, stop := context.WithTimeout(ctx, noticeTime)
		_, err = Wait(noticing, x, StatusFailed, StatusCancelled, StatusCompleted)
		stop()
		if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
			info, err = Query(ctx, x)
			switch {
			case err != nil:
			case info.Status == StatusCancelling, info.Status == StatusFailing:
				return fmt.Errorf("QEMU takes long to end its migration (it is %s)", info.Status)
			case info.Status.goesOn():
				return nil // somebody reads it
			}
		}
	}
	if err != nil {
		return err
	}
	// Who has begun anew would not leave it so.
	if info, err = d.stays(ctx, ""); err != nil || info.Status.goesOn() {
		return err
	}
	d.settings, err = planSettings(ctx, x, func(_ string, is bool) bool { return is }, map[string]any{"downtime-limit": 1})
	if err != nil || d.settings.left != left {
		return err
	}
	s, err := qmp.QueryStatus(ctx, x)
	if err != nil {
		return err
	}
	d.was.Running = left.stopped(s)
	return d.end(ctx)
}
