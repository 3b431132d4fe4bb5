package migration

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp"
)

// A checkpoint is a migration into this process of a guest that goes on to exist:
//
//	stop        stop ─► migrate ─────────────────► completed ─► cont
//	live        migrate ─► pass 1, 2 … ─► QEMU stops the guest,
//	            sends the rest ──────────────────► completed ─► cont
//	background  migrate ─► QEMU stops the guest for a moment and sends
//	            its memory as it was then, running ─► completed
//
// In the first two QEMU's completed waits on the return path for the consumer's
// word.

// Mode says when the guest runs during a checkpoint.
type Mode string

// The modes.
const (
	ModeStop       Mode = "stop"       // not at all
	ModeLive       Mode = "live"       // until little is left to save
	ModeBackground Mode = "background" // almost throughout (QEMU's background-snapshot)
)

// Then says what becomes of the guest after a checkpoint.
type Then string

// What can become of it.
const (
	ThenAsBefore Then = ""
	ThenRun      Then = "run"
	ThenPause    Then = "pause"
	ThenQuit     Then = "quit" // QEMU ends
)

// CheckpointOptions say how to make a checkpoint.
type CheckpointOptions struct {
	Mode Mode
	Then Then

	// Downtime is for how long a live checkpoint may stop the guest; QEMU
	// decides by it when to do so. 0 leaves that at what it is set to.
	Downtime time.Duration
	// Patience is how long a live checkpoint may try to keep to Downtime.
	// After that the guest is stopped for as long as it takes, or with
	// GiveUp the checkpoint fails with ErrNoConvergence. 0: for ever.
	Patience time.Duration
	GiveUp   bool

	// Save reads the stream, answers on its return path if it opens one, and
	// makes it durable. The run state is the guest's before the checkpoint,
	// which a stream of a guest that was stopped for it does not tell.
	Save func(ctx context.Context, stream *os.File, before qmp.RunState) error
	// Stopping is called, if not nil, by a CheckpointArmed just before it stops the guest: from
	// then on somebody else must be able to let that run. Its error fails the checkpoint.
	Stopping func() error
	// Stopped is called, if not nil, when the guest stands still, before what it has in
	// memory then is saved: in ModeStop only. Its error fails the checkpoint.
	Stopped func(ctx context.Context) error
	// Undo takes back what Save has made durable, because QEMU does not confirm
	// that it was its guest. nil: it stays.
	Undo func(ctx context.Context) error
	// Together is how the guest is stopped at one moment with others; nil: it is alone.
	// Not with ModeBackground.
	Together *Together
	Open     OpenFunc // nil: OpenChannel
	Redial   Redialer // may be nil
}

// Together is how checkpoints of several guests, each in a goroutine of its own, wait for
// one another. An error of another one's ends the waits.
//
//	stop:  settings ─► Ready ─► stop ─► Stopped ─► migrate, Save ─► completed ─► Agree ─► cont
//	live:  settings ─► migrate, Precopy … ─► Ready ─► stop ─► Stopped ─► … ─► completed ─► Agree ─► cont
type Together struct {
	// Ready is called when there is nothing left to do but to stop the guest, and returns
	// when that is so of all. A guest that does not run is ready as well.
	Ready func(ctx context.Context) error
	// Stopped is called when the guest stands still, and returns when all do: a stream that
	// begins before keeps the others' CPUs from stopping.
	Stopped func(ctx context.Context) error
	// Precopy is Save for ModeLive and a guest that runs: it reads most of the first pass,
	// has the guest stopped by h, and reads on.
	Precopy func(ctx context.Context, stream *os.File, before qmp.RunState, h Held) error
	// Agree is called once all has been saved, with what QEMU says of it, before the
	// guest goes on. It returns that, or an error that wraps ErrUnconfirmed if another
	// one's QEMU says so.
	Agree func(ctx context.Context, err error) error
}

// Held is a guest whose migration is held near the end of its first pass.
type Held struct {
	Buffer int    // how many bytes of the stream wait though nobody reads
	Absent uint64 // as Unplugged says
	// Wide is how many wait between Widen(true) and Widen(false), which is to be called once
	// before Stop; 0: it must not be.
	Wide  int
	Widen func(on bool) error
	// Stop stops the guest when all are ready for it, and returns when it stands still.
	Stop func(ctx context.Context) error
}

// CheckpointReport is what a checkpoint did to the guest.
type CheckpointReport struct {
	Mode Mode `json:"mode"` // stop for a guest that did not run
	// Saved tells, beside an error, that Save has succeeded: then the guest is
	// not as it should be, or the settings are not.
	Saved bool `json:"-"`
	// Left tells, beside an error, that QEMU is left to PutRight: the guest may stand still,
	// and settings may not be what they were.
	Left bool `json:"-"`
	Ran  bool `json:"ran"` // the guest, before
	// State is the guest's run state at the end, "ended" if QEMU has.
	State string `json:"state"`
	// Stopped is when the guest stood still, by the time of QEMU's event; zero if it did
	// not run. Where there are no events, as with libvirt, it is when it was told to.
	Stopped time.Time `json:"stopped,omitzero"`
	// Downtime is how long the guest stood still, by the times of QEMU's
	// events; 0 if it did not run before, or not again.
	Downtime time.Duration `json:"downtime_ns"`
	// QEMUDowntime is what QEMU says of that. It does not count what it is
	// not responsible for: that a stopped guest is stopped, and the time
	// until somebody lets it run again.
	QEMUDowntime time.Duration `json:"qemu_downtime_ns"`
	Total        time.Duration `json:"total_ns"`  // from migrate until the guest is as it should be
	Passes       int64         `json:"passes"`    // over the memory, by QEMU's count
	Converged    bool          `json:"converged"` // false if Patience has run out
	Warnings     []string      `json:"warnings,omitempty"`
}

var (
	// ErrBlocked: a device or something else of this VM can't be saved.
	ErrBlocked = errors.New("this VM can't be migrated, and so not be saved")
	// ErrBackground: QEMU refuses background-snapshot.
	ErrBackground = errors.New("QEMU can't make background snapshots: it may not write-protect memory with userfaultfd " +
		"(needs Linux 5.7 and sysctl vm.unprivileged_userfaultfd=1, or root), or its memory backend does not allow it; " +
		"--mode live and stop don't need that")
	// ErrNoConvergence: the guest writes faster than it is saved.
	ErrNoConvergence = errors.New("the guest writes its memory faster than it is saved")
	// ErrNotEnded: the checkpoint is there, but the guest runs, which was to stand still or
	// to end, and is not what was saved any more.
	ErrNotEnded = errors.New("all was saved, but QEMU has let the guest run on")
	// ErrUnconfirmed: a stream was saved, but QEMU does not say that it is the guest.
	ErrUnconfirmed = errors.New("a stream was saved, but QEMU does not say that it was the whole of its guest's")
	// ErrPostmigrate: QEMU migrates no guest that has not run since its last
	// migration.
	ErrPostmigrate = errors.New("the guest has not run since it was saved last, and QEMU does not save it again before it has (cont)")
)

// confirmTime is how long QEMU may take, after all has been saved, to say how its
// migration has ended. It has heard by then that it was saved, or needs not to.
var confirmTime = 30 * time.Second

// maxDowntime is the largest downtime-limit there is (MAX_MIGRATE_DOWNTIME in
// QEMU's migration/migration.c), in ms: QEMU then finds at once that it can stop
// the guest.
const maxDowntime = 2000 * 1000

// Checkpoint saves the guest of the QEMU at x and returns when that has been
// done and the guest is as it should be, or with an error.
//
// After a failure, also when ctx ends, the guest does what it did before. In
// every case capabilities and parameters are then as they were; if that fails
// the error says so.
func Checkpoint(ctx context.Context, x qmp.Executor, o CheckpointOptions) (CheckpointReport, error) {
	c := &checkpointer{drive: drive{x: x, open: o.Open, redial: o.Redial}, o: o}
	if err := c.check(ctx); err != nil {
		return c.rep, err
	}
	return c.run(ctx, c.save)
}

// run does it: save goes up to QEMU's completed.
func (c *checkpointer) run(ctx context.Context, save func(context.Context) error) (rep CheckpointReport, err error) {
	listening, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	events, eventsErr := c.x.Events(listening)
	start := time.Now()
	err = save(ctx)
	confirmed := err == nil
	if confirmed {
		c.rep.Saved = true
		err = c.confirm(ctx)
		if c.o.Together != nil {
			err = c.o.Together.Agree(ctx, err)
		}
		if errors.Is(err, ErrUnconfirmed) {
			confirmed, err = false, errors.Join(err, c.undo(ctx))
		}
	}
	if confirmed {
		e := c.finish(ctx)
		// A guest that is to stand still, or to end, is nothing for PutRight.
		c.rep.Left = e != nil && c.o.Then != ThenPause && c.o.Then != ThenQuit
		// Of a QEMU that can't be reached both say the same.
		if err == nil {
			err = e
		}
	} else if e := c.end(ctx); e != nil {
		c.rep.Left = true
		err = errors.Join(err, fmt.Errorf("after the checkpoint: %w", e))
	}
	c.rep.Total, c.rep.Ran, c.rep.Stopped = time.Since(start), c.was.Running, c.stoppedAt
	if eventsErr == nil {
		d, first, whole := pauses(events)
		if whole {
			c.rep.Downtime = d
		}
		if !first.IsZero() {
			c.rep.Stopped = first
		}
	}
	if c.rep.Downtime == 0 && c.rep.Ran && c.rep.State == "running" {
		c.rep.Downtime = c.stood()
	}
	return c.rep, err
}

// stood is how long the guest has stood still, by our own clock, where there are no
// events of that: libvirt keeps QEMU's STOP and RESUME to itself.
func (c *checkpointer) stood() time.Duration {
	switch {
	case !c.stoppedAt.IsZero():
		return c.ranAt.Sub(c.stoppedAt)
	case c.rep.Mode == ModeBackground:
		return c.rep.QEMUDowntime
	}
	// QEMU has stopped it, and counts up to its own end.
	return c.rep.QEMUDowntime + c.ranAt.Sub(c.savedAt)
}

type checkpointer struct {
	drive
	o       CheckpointOptions
	rep     CheckpointReport
	overdue bool // all was saved, and QEMU's migration did not end
	// completed: it has ended well, and ended is what the guest did just then; the zero
	// RunState: that is not known, or some time ago.
	completed bool
	ended     qmp.RunState

	stoppedAt, savedAt, ranAt time.Time // about when we stopped the guest, QEMU was done, and it ran again
}

// check finds out whether the checkpoint can be made, before anything is
// changed.
func (c *checkpointer) check(ctx context.Context) error {
	c.rep.Mode, c.rep.Converged = c.o.Mode, true
	during := map[string]any{}
	if c.precopies() {
		// As Arm does: QEMU must not find by itself that it can stop the guest.
		during["downtime-limit"] = 1
		if c.open == nil {
			c.open = OpenWidening
		}
	} else if c.o.Mode == ModeLive {
		parameters, err := Parameters(ctx, c.x)
		if err != nil {
			return err
		}
		// Set in any case, so that it is put back in any case.
		during["downtime-limit"] = parameters["downtime-limit"]
		if c.o.Downtime > 0 {
			during["downtime-limit"] = min(c.o.Downtime.Milliseconds(), maxDowntime)
		}
	}
	if err := c.prepare(ctx, c.needs, during); err != nil {
		return err
	}
	switch {
	case c.was.Status == "postmigrate":
		return ErrPostmigrate
	case !c.was.Running && c.o.Mode != ModeStop:
		// It changes nothing, so there is nothing to be clever about; and QEMU
		// 7.2 lets a guest run that background-snapshot has found paused.
		c.rep.Mode = ModeStop
		if err := c.prepare(ctx, c.needs, map[string]any{}); err != nil {
			return err
		}
	case c.rep.Mode == ModeBackground:
		if _, ok := c.settings.have["background-snapshot"]; !ok {
			return fmt.Errorf("%w: it is too old", ErrBackground)
		}
	}
	if c.settings.left != LeftNothing {
		c.warn("an earlier run was killed: the migration settings will be QEMU's defaults")
	}
	if len(c.blocked) > 0 {
		return fmt.Errorf("%w: %s", ErrBlocked, strings.Join(c.blocked, "; "))
	}
	return nil
}

// harmless are capabilities that may be as the user has set them. All others are
// off: multifd and postcopy want another kind of stream, release-ram gives the
// guest's memory away, x-ignore-shared leaves some of it out.
var harmless = []string{"validate-uuid", "dirty-bitmaps", "auto-converge"}

func (c *checkpointer) needs(name string, is bool) bool {
	switch {
	case name == "events":
		return true
	case name == "return-path":
		return c.rep.Mode != ModeBackground
	case name == "background-snapshot":
		return c.rep.Mode == ModeBackground
	}
	// QEMU allows next to nothing beside background-snapshot.
	return is && c.rep.Mode != ModeBackground && slices.Contains(harmless, name)
}

// precopies tells whether the guest is to be stopped with others when most of its memory
// has been read.
func (c *checkpointer) precopies() bool { return c.o.Together != nil && c.rep.Mode == ModeLive }

// save does it, up to QEMU's completed.
func (c *checkpointer) save(ctx context.Context) error {
	switch {
	case !c.was.Running:
	case c.rep.Mode == ModeStop:
		c.settings.during["max-bandwidth"] = stoppedBandwidth
	case c.rep.Mode == ModeLive:
		c.settings.during["max-bandwidth"] = liveBandwidth
	}
	if err := c.settings.set(ctx, c.x); err != nil {
		var refused *qmp.Error
		if c.rep.Mode == ModeBackground && errors.As(err, &refused) {
			err = fmt.Errorf("%w: %w", ErrBackground, err)
		}
		return err
	}
	// The guest need not stand still for that.
	if err := c.openChannel(ctx, TwoWay); err != nil {
		return err
	}
	if c.rep.Mode == ModeStop && c.o.Together != nil {
		if err := c.o.Together.Ready(ctx); err != nil {
			return err
		}
	}
	if c.rep.Mode == ModeStop && c.was.Running {
		c.stoppedAt = time.Now()
		if err := qmp.Stop(ctx, c.x); err != nil {
			return err
		}
	}
	if c.rep.Mode == ModeStop && c.o.Together != nil {
		if err := c.o.Together.Stopped(ctx); err != nil {
			return err
		}
	}
	if c.rep.Mode == ModeStop && c.o.Stopped != nil {
		if err := c.o.Stopped(ctx); err != nil {
			return err
		}
	}
	c.drain = c.rep.Mode == ModeBackground
	consume := func(ctx context.Context, f *os.File) error { return c.o.Save(ctx, f, c.was) }
	if c.precopies() {
		absent, err := Unplugged(ctx, c.x)
		if err != nil {
			return err
		}
		consume = func(ctx context.Context, f *os.File) error {
			return c.o.Together.Precopy(ctx, f, c.was, Held{
				Buffer: c.channel.buffer, Absent: absent, Wide: c.channel.wide, Widen: c.channel.widen, Stop: c.stopTogether,
			})
		}
	}
	if err := c.start(ctx, TwoWay, consume); err != nil {
		return err
	}
	return c.wait(ctx)
}

// stopTogether stops a guest that is held when all are ready. Until then it runs.
func (c *checkpointer) stopTogether(ctx context.Context) error {
	// Before the guest stops, so that whoever comes after a killed process knows who has
	// stopped it.
	if err := SetParameters(ctx, c.x, map[string]any{"max-bandwidth": stoppedBandwidth}); err != nil {
		return err
	}
	if err := c.o.Together.Ready(ctx); err != nil {
		return err
	}
	c.stoppedAt = time.Now()
	if err := qmp.Stop(ctx, c.x); err != nil {
		return err
	}
	return c.o.Together.Stopped(ctx)
}

// wait waits for the end of the migration and of Save. What Save says counts: it
// may have been done before it could hear of a failure elsewhere.
func (c *checkpointer) wait(ctx context.Context) error {
	waiting, stop := context.WithCancel(ctx)
	defer stop()
	limit := confirmTime
	go func() {
		select {
		case <-c.done:
		case <-waiting.Done():
			return
		}
		if c.err == nil {
			select {
			case <-time.After(limit):
			case <-waiting.Done():
				return
			}
		}
		stop()
	}()
	info, guest, err := c.waitPatiently(waiting)
	c.savedAt = time.Now()
	c.rep.QEMUDowntime = time.Duration(info.Downtime) * time.Millisecond
	if info.RAM != nil {
		c.rep.Passes = info.RAM.DirtySyncCount
	}
	var ended *Error
	switch {
	case err == nil:
		<-c.done // without a return path QEMU is ready before Save is
		c.completed = true
		if c.rep.Mode != ModeBackground && c.o.Together == nil {
			c.ended = guest
		}
	case ctx.Err() != nil:
		err = context.Cause(ctx)
		_ = c.cancel(ctx)
	case waiting.Err() != nil && c.err == nil:
		c.overdue = true
		_ = c.cancel(ctx)
	case waiting.Err() != nil:
		// Save has failed. QEMU has heard of it on the return path or does so
		// when it writes on; or it is QEMU that has failed, which Save was
		// quicker to see.
		c.hangUp()
		if err = c.waitEnded(ctx); errors.As(err, &ended) {
			err = c.because(ended)
		} else {
			err = c.err
		}
	case errors.As(err, &ended):
		err = c.brokenOff(ended)
	case errors.Is(err, ErrNoConvergence):
		_ = c.cancel(ctx)
	}
	c.hangUp()
	if c.err == nil || err == nil {
		return c.err
	}
	return err
}

// cancel is for a migration that nobody wants any more. What fails here fails
// again in end.
func (c *checkpointer) cancel(ctx context.Context) error {
	if c.drain {
		return nil
	}
	ctx, stop := context.WithTimeout(context.WithoutCancel(ctx), livesTime)
	defer stop()
	return Cancel(ctx, c.x)
}

// waitEnded waits a little for QEMU's own failure.
func (c *checkpointer) waitEnded(ctx context.Context) error {
	ctx, stop := context.WithTimeout(ctx, livesTime)
	defer stop()
	_, err := Wait(ctx, c.x)
	return err
}

// waitPatiently is Wait with a bound on convergence.
func (c *checkpointer) waitPatiently(ctx context.Context) (Info, qmp.RunState, error) {
	if c.rep.Mode != ModeLive || c.o.Patience <= 0 || c.precopies() {
		return c.waitOnce(ctx)
	}
	patient, stop := context.WithTimeout(ctx, c.o.Patience)
	defer stop()
	info, guest, err := c.waitOnce(patient)
	if err == nil || ctx.Err() != nil || patient.Err() == nil {
		return info, guest, err
	}
	s, err := qmp.QueryStatus(ctx, c.x)
	if err != nil {
		return info, guest, err
	}
	if s.Running { // else QEMU has just found that it can stop it
		c.rep.Converged = false
		if c.o.GiveUp {
			return info, guest, fmt.Errorf("%w: not done within %v", ErrNoConvergence, c.o.Patience)
		}
		c.warn("%v: after %v it was stopped for the rest", ErrNoConvergence, c.o.Patience)
		if err := SetParameters(ctx, c.x, map[string]any{"downtime-limit": maxDowntime}); err != nil {
			return info, guest, err
		}
	}
	return c.waitOnce(ctx)
}

// waitOnce is Wait, and says what the guest did when it ended.
func (c *checkpointer) waitOnce(ctx context.Context) (info Info, guest qmp.RunState, err error) {
	info, err = waitAnd(ctx, c.x, []qmp.Call{{Command: "query-status", Result: &guest}})
	return info, guest, err
}

func (c *checkpointer) warn(format string, args ...any) {
	c.rep.Warnings = append(c.rep.Warnings, fmt.Sprintf(format, args...))
}

// confirm waits for QEMU's word on what was saved: it must not have failed. A
// migration that somebody has cancelled at the last moment, such as us because we
// were asked to end, was saved as a whole. If it is not known, the error is that of
// the connection.
func (c *checkpointer) confirm(ctx context.Context) error {
	if c.completed {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), confirmTime)
	defer cancel()
	return c.again(ctx, func(ctx context.Context) error {
		info, err := Wait(ctx, c.x, StatusFailed, StatusCancelled, StatusNone)
		switch {
		case errors.Is(err, context.DeadlineExceeded):
			return fmt.Errorf("%w: its migration does not end (it is %s)", ErrUnconfirmed, info.Status)
		case err != nil:
			return err
		case info.Status == StatusFailed:
			return fmt.Errorf("%w: %w", ErrUnconfirmed, &Error{Status: info.Status, Desc: info.ErrorDesc})
		case c.overdue && info.Status != StatusCompleted:
			return fmt.Errorf("%w: its migration did not end within %v", ErrUnconfirmed, confirmTime)
		case info.Status != StatusCompleted:
			// The guest has run on, so it is not what was saved that would be ended.
			then := c.o.Then
			c.o.Then = ThenAsBefore
			// A group's members are saved all or none, so that there it is none's failure.
			if (then == ThenPause || then == ThenQuit) && c.o.Together == nil {
				return fmt.Errorf("%w: its migration is %s, and the guest was left as it was", ErrNotEnded, info.Status)
			}
			c.warn("all was saved, but QEMU's migration is %s; the guest was left as it was", info.Status)
		}
		return nil
	})
}

// undo takes back what was saved.
func (c *checkpointer) undo(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), restoreTime)
	defer cancel()
	if c.o.Undo != nil {
		if err := c.o.Undo(ctx); err != nil {
			return fmt.Errorf("it is still there: %w", err)
		}
	}
	c.rep.Saved = false
	return nil
}

// finish makes the guest what it is to be after a success.
func (c *checkpointer) finish(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), restoreTime)
	defer cancel()
	defer c.channel.Discard(ctx)
	return c.again(ctx, c.then)
}

// cont lets the guest run, for which it stands still: what it does is not asked again if
// QEMU has just said it.
func (c *checkpointer) cont(ctx context.Context) error {
	ended := c.ended
	c.ended = qmp.RunState{}
	if ended.Status == "" {
		return cont(ctx, c.x)
	}
	return contFrom(ctx, c.x, ended)
}

func (c *checkpointer) then(ctx context.Context) (err error) {
	switch c.o.Then {
	case ThenAsBefore:
		if c.was.Running {
			err = c.cont(ctx)
		}
	case ThenRun:
		err = c.cont(ctx)
	case ThenPause:
		// Stop does nothing to one that does not run. Nobody who finds the mark is to let it run.
		mark := parametersCall(map[string]any{"max-bandwidth": ourBandwidth})
		err = errors.Join(qmp.Together(ctx, c.x, qmp.Call{Command: "stop"}, mark)...)
	case ThenQuit:
		c.rep.State = "ended"
		return qmp.Quit(ctx, c.x)
	}
	if err != nil {
		return err
	}
	c.ranAt = time.Now()
	var s qmp.RunState
	err = c.settings.restore(ctx, c.x, qmp.Call{Command: "query-status", Result: &s})
	c.rep.State = s.Status
	return err
}
