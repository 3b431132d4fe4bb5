package migration

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/tier/rescue"
)

// Consumer reads the stream of a migration into this process. When ctx ends it
// must return soon, with an error. The stream stays the caller's.
type Consumer func(ctx context.Context, stream *os.File) error

// Redialer makes a new connection to a QEMU whose first was lost. Without one
// (nil) a guest stays as it was when the connection was lost, and that can mean
// stopped.
type Redialer func(context.Context) (qmp.Executor, error)

var (
	// ErrMigrating: another migration is under way.
	ErrMigrating = errors.New("a migration is already running")
	// ErrNotRunning: there is nothing to track.
	ErrNotRunning = errors.New("the guest is not running, so it writes nothing that could be tracked")
)

const (
	// restoreTime bounds the way back to the former settings.
	restoreTime = 15 * time.Second
	// livesTime is how long something must stay as a killed process would
	// have left it before it is taken for that. A living one leaves it so for
	// some milliseconds.
	livesTime = time.Second
)

// drive is one migration into this process: from the first setting that is
// changed to the last one that is put back. One goroutine has it.
//
//	prepare ─► start ─► … ─► end
type drive struct {
	x      qmp.Executor
	open   OpenFunc
	redial Redialer

	settings settings
	was      qmp.RunState // what the guest did before
	blocked  []string     // why this VM can't be migrated
	started  bool         // QEMU may be migrating
	// drain makes hangUp read the stream to its end. QEMU 7.2 does not stop
	// write-protecting memory when a background snapshot fails or is
	// cancelled, and the guest would hang for ever at its next write.
	drain bool

	channel *Channel
	stop    context.CancelFunc // ends the consumer
	done    chan struct{}      // closed when it has ended, with what follows
	err     error              // of the consumer
	stream  *os.File
}

// prepare finds out how everything is and changes nothing, but for what a killed
// process of ours has left: a migration that waits for it, and a guest that it
// has stopped.
func (d *drive) prepare(ctx context.Context, need func(string, bool) bool, during map[string]any) (err error) {
	if d.open == nil {
		d.open = OpenChannel
	}
	now, err := look(ctx, d.x)
	if err != nil {
		return err
	}
	if d.settings, err = now.settings.plan(need, during); err != nil {
		return err
	}
	info := now.info
	d.blocked, d.was = info.BlockedReasons, now.guest
	if d.settings.left != LeftNothing && info.Status == StatusPreSwitchover {
		if info, err = d.cancelLeft(ctx); err != nil {
			return err
		}
		if d.was, err = qmp.QueryStatus(ctx, d.x); err != nil {
			return err
		}
	}
	if info.Status.goesOn() {
		if d.settings.left == LeftArmed {
			return ErrArmed
		}
		return fmt.Errorf("%w (it is %s)", ErrMigrating, info.Status)
	}
	if d.settings.left.stopped(d.was) {
		return d.runLeft(ctx)
	}
	return nil
}

// cancelLeft ends a migration that has been waiting for its switchover.
func (d *drive) cancelLeft(ctx context.Context) (Info, error) {
	info, err := d.stays(ctx, StatusPreSwitchover)
	if err != nil || info.Status != StatusPreSwitchover {
		return info, err
	}
	if err := Cancel(ctx, d.x); err != nil {
		return info, err
	}
	return Wait(ctx, d.x, StatusCancelled, StatusFailed)
}

// runLeft lets a guest run that a killed process has stopped.
func (d *drive) runLeft(ctx context.Context) error {
	info, err := d.stays(ctx, "")
	if err != nil {
		return err
	}
	if info.Status.goesOn() {
		return fmt.Errorf("%w (it is %s)", ErrMigrating, info.Status)
	}
	p, err := Parameters(ctx, d.x)
	if err != nil {
		return err
	}
	if d.was, err = qmp.QueryStatus(ctx, d.x); err != nil || !leftIn(p).stopped(d.was) {
		return err
	}
	if err := qmp.Cont(ctx, d.x); err != nil {
		return err
	}
	d.was, err = qmp.QueryStatus(ctx, d.x)
	return err
}

// stays returns the state of the migration after livesTime, or what it became
// earlier if that was not s.
func (d *drive) stays(ctx context.Context, s Status) (info Info, err error) {
	for end := time.Now().Add(livesTime); time.Now().Before(end); {
		info, err = Query(ctx, d.x)
		if err != nil || s != "" && info.Status != s {
			return info, err
		}
		select {
		case <-time.After(pollInterval):
		case <-ctx.Done():
			return info, context.Cause(ctx)
		}
	}
	return info, nil
}

// openChannel opens the channel, unless that has been done.
func (d *drive) openChannel(ctx context.Context, dir Direction) (err error) {
	if d.channel == nil {
		d.channel, err = d.open(ctx, d.x, dir)
	}
	return err
}

// start begins the migration and the consumer.
func (d *drive) start(ctx context.Context, dir Direction, consume Consumer) (err error) {
	if err := d.openChannel(ctx, dir); err != nil {
		return err
	}
	// Also if the answer is not waited for: QEMU may have begun.
	d.started = true
	if err := Start(ctx, d.x, d.channel.URI); err != nil {
		var refused *qmp.Error
		d.started = !errors.As(err, &refused)
		return err
	}
	ctx, d.stop = context.WithCancel(ctx)
	d.done = make(chan struct{})
	go func() {
		defer close(d.done)
		if d.stream, d.err = d.channel.Accept(ctx); d.err == nil {
			// Whatever happens to it, settings are put back and the guest runs.
			d.err = rescue.Call(func() error { return consume(ctx, d.stream) })
		}
	}()
	return nil
}

// hangUp ends the consumer and closes the stream, which ends what QEMU may be
// writing. It may be called again.
func (d *drive) hangUp() {
	if d.done == nil {
		return
	}
	d.stop()
	<-d.done
	if d.stream != nil {
		if d.drain {
			drain(d.stream)
		}
		d.stream.Close()
		d.stream = nil
	}
}

// drainSilence is how long a QEMU whose stream is read to its end may send nothing.
// One that lives does not write for as long as it compares pages: milliseconds.
const drainSilence = time.Minute

// drain reads what QEMU still sends.
func drain(f *os.File) {
	fd := int(f.Fd())
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	b := make([]byte, 64<<10)
	for {
		n, err := unix.Poll(fds, int(drainSilence.Milliseconds()))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n == 0 {
			return
		}
		switch n, err := unix.Read(fd, b); {
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
		case err != nil || n == 0:
			return
		}
	}
}

// end leaves QEMU as it was before prepare, over a new connection if need be. A
// migration that still runs is cancelled.
func (d *drive) end(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), restoreTime)
	defer cancel()
	defer d.hangUp()
	if d.channel != nil {
		defer d.channel.Discard(ctx)
	}
	return d.again(ctx, d.putBack)
}

// again does something, and once more over a new connection if that was lost.
func (d *drive) again(ctx context.Context, do func(context.Context) error) error {
	err := do(ctx)
	if d.redial == nil || !(errors.Is(err, qmp.ErrLost) || errors.Is(err, qmp.ErrClosed)) {
		return err
	}
	x, dialErr := d.redial(ctx)
	if dialErr != nil {
		// Not wrapped: that the socket is gone is not what went wrong.
		return fmt.Errorf("%w; connecting again: %v", err, dialErr)
	}
	d.x = x
	return do(ctx)
}

func (d *drive) putBack(ctx context.Context) error {
	if d.started {
		// Before hanging up: cancelled is what it was, and QEMU's log need not
		// speak of a broken pipe.
		var err error
		if !d.drain {
			err = Cancel(ctx, d.x)
		}
		d.hangUp()
		if err != nil {
			return err
		}
		if _, err := Wait(ctx, d.x, StatusCancelled, StatusFailed, StatusNone); err != nil {
			return err
		}
	}
	if err := d.guestAsBefore(ctx); err != nil {
		return err
	}
	return d.settings.restore(ctx, d.x)
}

// stoppedByMigration are the run states that a guest has which we or its
// migration have stopped. In others, such as io-error, it is for another reason.
var stoppedByMigration = append([]string{"paused"}, stoppedByQEMU...)

// stoppedByQEMU are those that a migration makes of a guest that ran.
var stoppedByQEMU = []string{"finish-migrate", "postmigrate"}

func (d *drive) guestAsBefore(ctx context.Context) error {
	if !d.was.Running {
		return nil
	}
	return cont(ctx, d.x)
}

// cont lets a guest run that we or its migration have stopped.
func cont(ctx context.Context, x qmp.Executor) error {
	s, err := qmp.QueryStatus(ctx, x)
	if err == nil {
		err = contFrom(ctx, x, s)
	}
	return err
}

// contFrom is cont for who knows what the guest does.
func contFrom(ctx context.Context, x qmp.Executor, s qmp.RunState) error {
	if s.Running || !slices.Contains(stoppedByMigration, s.Status) {
		return nil
	}
	return qmp.Cont(ctx, x)
}

// pauses adds up the times between STOP and RESUME among the events so far, by
// QEMU's clock. First is when the first began, and whole tells that the guest was not left
// in one.
func pauses(events <-chan qmp.Event) (sum time.Duration, first time.Time, whole bool) {
	var since time.Time
	for {
		select {
		case e, ok := <-events:
			if !ok {
				return sum, first, since.IsZero()
			}
			at := time.Unix(e.Timestamp.Seconds, e.Timestamp.Microseconds*1000)
			if e.Event == "STOP" {
				if since = at; first.IsZero() {
					first = at
				}
			} else if e.Event == "RESUME" && !since.IsZero() {
				sum += at.Sub(since)
				since = time.Time{}
			}
		default:
			return sum, first, since.IsZero()
		}
	}
}
