package session

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/tier/save"
)

// Where an armed process first stops reading, most of what is left need not be: see
// package save, Hold. It goes on from there in steps, the monitor in hand:
//
//	nobody reads, QEMU waits in a write ─► query-migrate ─► some of what the pages have, by
//	            ▲                                           the parent, that QEMU has not
//	            └────────────── it is read ◄─────────────── put into its buffers
//
// While nobody reads nothing that the guest does can move QEMU. When something is read QEMU
// puts as many bytes more into its buffers, and before it waits for the socket the next time
// a buffer full. That is a quarter of the rest at most, by the content of the parent, which
// is some seconds old: it would have to be zeros by now in three of four pages for QEMU to
// come to the end of its pass. The pages under way show at each step whether the parent
// still tells what comes.
//
// Should QEMU come there all the same it has begun another pass, and may stop the guest to
// finish. Then the stream is closed at once, the migration cancelled, the guest let run, and
// nothing is armed any more. If the process dies meanwhile QEMU sees the end of the stream,
// fails the migration, and lets the guest run.

const (
	// laterTime is how long the process has the monitor, which takes one client, and waits for
	// it before. Some twenty steps of one to two milliseconds are to be taken; a busy host
	// stops somewhere on the way.
	laterTime = 3 * time.Second
	// answerTime is how long QEMU may take to answer, and to fill its buffers. One that takes
	// longer may be writing the devices, with its monitor locked.
	answerTime = 5 * time.Second
	// settling is the time between two looks whether QEMU still writes, and finally that
	// between those before the hold.
	settling, finally = 300 * time.Microsecond, 20 * time.Millisecond
	// share is which part of the rest QEMU can put into its buffers by one step, 1/share, if
	// the parent tells what comes.
	share = 4
)

// later is the way of an armed process from where it first stops to the hold. One
// goroutine, the save's, has it.
type later struct {
	s  *armedServer
	fd int // the stream

	x      *qmp.Monitor // nil: it is not ours
	limit  time.Time    // until when it is
	passes int64        // of QEMU's count, at the first stop
	ran    bool         // the guest, when the monitor was had
	over   bool         // nothing more is read before the hold
}

// further is Hold.Later.
func (l *later) further(ctx context.Context, r save.Rest) (bytes int, err error) {
	if !l.over {
		if bytes, err = l.step(ctx, r); err != nil {
			bytes, err = 0, l.failed(ctx, err)
		}
	}
	if bytes == 0 {
		l.end()
	}
	return bytes, err
}

// end gives the monitor back.
func (l *later) end() {
	l.over = true
	if l.x != nil {
		l.x.Close()
		l.x = nil
	}
}

// step is further while it is not over; 0: it is now.
func (l *later) step(ctx context.Context, r save.Rest) (int, error) {
	if l.x == nil {
		if err := l.begin(ctx); err != nil {
			return 0, err
		}
	}
	p, err := l.settled(ctx, settling)
	if err != nil {
		return 0, err
	}
	if n := stepBytes(p, r); n > 0 && !l.hurries() && time.Now().Before(l.limit) {
		return n, nil
	}
	if !l.hurries() {
		if p, err = l.settled(ctx, finally); err != nil {
			return 0, err
		}
	}
	l.s.p.Log.Info("held in the first pass", "pages to come", r.Unseen, "not in QEMU's buffers", p.Left)
	return 0, nil
}

// stepBytes is how much can be read with QEMU at p; 0: not even a page.
func stepBytes(p migration.FirstPass, r save.Rest) int {
	if p.Left > r.Unseen || p.Left < p.Spare {
		return 0
	}
	// What is under way was so much, and more content than fits there has not come.
	size := uint64(r.PageSize)
	if r.Stored(r.Unseen, p.Left) > ramparse.SourcePages+(uint64(r.Buffer)+ramparse.SourceBuffer)/size {
		return 0
	}
	pages := r.Stored(p.Left, p.Spare) / share
	if pages <= ramparse.SourcePages {
		return 0
	}
	bytes := (pages - ramparse.SourcePages) * size
	if bytes < ramparse.SourceBuffer+uint64(r.Need) {
		return 0
	}
	return int(bytes - ramparse.SourceBuffer)
}

// hurries tells whether somebody waits for the hold.
func (l *later) hurries() bool {
	select {
	case <-l.s.hurry:
		return true
	default:
		return false
	}
}

// begin gets the monitor, unless somebody waits for the hold: who has it. QEMU is where the
// stream alone says that it is.
func (l *later) begin(ctx context.Context) error {
	limit := time.Now().Add(l.s.c.LaterTime)
	ctx, cancel := context.WithDeadline(ctx, limit)
	defer cancel()
	done := make(chan struct{})
	defer close(done)
	go func() {
		select {
		case <-l.s.hurry:
			cancel()
		case <-done:
		}
	}()
	x, err := l.s.c.Target.dial(ctx, qmp.Options{})
	if err != nil {
		return err
	}
	l.x, l.limit = x, limit
	status, err := qmp.QueryStatus(ctx, x)
	if err != nil {
		return err
	}
	p, err := migration.QueryFirstPass(ctx, x)
	l.ran, l.passes = status.Running, p.Passes
	return err
}

// errNoAnswer: what QEMU does is not known.
var errNoAnswer = errors.New("QEMU does not answer, or does not come to rest, near the end of its first pass over memory")

// settled waits until QEMU waits in a write: neither what it has put into its buffers nor
// what is in the socket changes any more.
func (l *later) settled(ctx context.Context, every time.Duration) (p migration.FirstPass, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, answerTime, errNoAnswer)
	defer cancel()
	for left, waiting := uint64(0), -1; ; {
		p, err = migration.QueryFirstPass(ctx, l.x)
		switch {
		case ctx.Err() != nil:
			return p, context.Cause(ctx)
		case err != nil:
			return p, err
		case p.Passes != l.passes:
			return p, fmt.Errorf("%w (it has begun pass %d)", migration.ErrOutrun, p.Passes)
		}
		n, err := unix.IoctlGetInt(l.fd, unix.SIOCINQ)
		if err != nil {
			return p, err
		}
		if n == waiting && p.Left == left {
			return p, nil
		}
		left, waiting = p.Left, n
		select {
		case <-time.After(every):
		case <-ctx.Done():
			return p, context.Cause(ctx)
		}
	}
}

// failed is the end of the way because of err: nil where the process only has to stay where it
// is, because nothing says that QEMU has gone on.
func (l *later) failed(ctx context.Context, err error) error {
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.Is(err, migration.ErrNotArmed):
		return fmt.Errorf("%w: %w", errStreamEnded, err)
	case l.x != nil && (errors.Is(err, migration.ErrOutrun) || errors.Is(err, errNoAnswer)):
		return errors.Join(err, l.undo())
	}
	l.s.p.Log.Info("more is left of the first pass than need be", "reason", err)
	return nil
}

// undo lets the guest run, and makes QEMU what it was, while the monitor is there.
func (l *later) undo() error {
	// First of all: QEMU may wait for a reader with its monitor locked.
	_ = unix.Shutdown(l.fd, unix.SHUT_RDWR)
	return l.s.owner.putRight(func() error {
		ctx, cancel := context.WithTimeout(context.Background(), putBackTime/3)
		defer cancel()
		return migration.Disarm(ctx, l.x, migration.DisarmOptions{Kept: l.s.c.Kept, Ran: l.ran})
	})
}
