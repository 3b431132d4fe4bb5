package migration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/tier/rescue"
)

// An armed checkpoint is a migration whose beginning and end are of two commands, and
// whose stream a third process reads and holds in between (package save, Hold):
//
//	Arm              settings ─► migrate ─► the other process reads ─► leave it so
//	CheckpointArmed  stop ─► the other process goes on ─► completed ─► cont ─► settings
//	Disarm           cancelled ─► settings
//
// Nobody holds the monitor while the guest is armed. What is to be put back goes from
// Arm to the others in a Kept.

// armedBandwidth is max-bandwidth while a guest is armed: a mark beside those of
// settings.go, by which our own commands know who has the migration. At the end it is
// stoppedBandwidth, as in any checkpoint that stops the guest.
const armedBandwidth = ourBandwidth + 2

var (
	// ErrArmed: the migration that is running is an armed checkpoint.
	ErrArmed = errors.New("the guest is armed for a checkpoint, and QEMU has one migration at a time; disarm it first")
	// ErrNotArmed: it is not, or not any more.
	ErrNotArmed = errors.New("QEMU is not armed for a checkpoint any more")
	// ErrOutrun: the first pass was to be held, and QEMU has come to its end. It may have
	// stopped the guest to finish.
	ErrOutrun = errors.New("QEMU has come to the end of its first pass over memory, near which it was to be held")
	// ErrPausedGuest: a guest that does not run has nothing to be armed for.
	ErrPausedGuest = errors.New("the guest does not run, so nothing changes until its next checkpoint")
)

// Kept is what Arm has changed, as it was before. It goes from process to process as
// JSON.
type Kept struct {
	Capabilities map[string]bool `json:"capabilities"`
	Parameters   map[string]any  `json:"parameters"`
}

// ArmedStream is the stream of an armed migration, for who holds it.
type ArmedStream struct {
	Stream *os.File
	Buffer int // how many bytes of it wait though nobody reads
	Kept   Kept
	// Theirs is QEMU's end of the stream, for Widen. As long as it is open the stream does
	// not end with QEMU. Lives does, and says nothing before. Both are nil where the stream
	// can't be widened.
	Theirs, Lives *os.File
}

// Widen makes the stream hold more though nobody reads, of which ArmedStream.Theirs is QEMU's end: for
// one that is held no more, see wideSend.
func Widen(theirs *os.File) error { return setSendBuffer(theirs, wideSend) }

// ArmOptions say how to arm.
type ArmOptions struct {
	// Take hands the stream to who will hold it, and returns when that has begun to
	// read, or can't. The files stay the caller's, who closes them.
	Take   func(ctx context.Context, s ArmedStream) error
	Open   OpenFunc // nil: OpenArmed
	Redial Redialer // may be nil
}

// Arm begins a migration for the next checkpoint of the running guest at x. After an
// error all is as it was.
func Arm(ctx context.Context, x qmp.Executor, o ArmOptions) (err error) {
	d := &drive{x: x, open: o.Open, redial: o.Redial}
	if d.open == nil {
		d.open = OpenArmed
	}
	// With a short downtime limit QEMU does not take the first pass for finished
	// before it is; see Track.
	if err := d.prepare(ctx, armNeeds, map[string]any{"downtime-limit": 1}); err != nil {
		return err
	}
	if !d.was.Running {
		return fmt.Errorf("%w (it is %s)", ErrPausedGuest, d.was.Status)
	}
	if len(d.blocked) > 0 {
		return fmt.Errorf("%w: %s", ErrBlocked, strings.Join(d.blocked, "; "))
	}
	d.settings.during["max-bandwidth"] = armedBandwidth
	kept := Kept{d.settings.off, d.settings.formerly}
	defer func() {
		if err == nil {
			return
		}
		if e := d.end(ctx); e != nil {
			err = errors.Join(err, fmt.Errorf("after arming: %w", e))
		}
		takeBack(ctx, d.x, livesName) // d.x: the first connection may be lost
	}()
	if err := d.settings.set(ctx, x); err != nil {
		return err
	}
	err = d.start(ctx, TwoWay, func(ctx context.Context, f *os.File) error {
		return o.Take(ctx, ArmedStream{f, d.channel.buffer, kept, d.channel.theirs, d.channel.lives})
	})
	if err != nil {
		return err
	}
	defer d.stop()
	select {
	case <-d.done:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if d.err != nil {
		return d.err
	}
	// The other process has its own.
	d.channel.Discard(context.WithoutCancel(ctx))
	return d.stream.Close()
}

// Unplugged is how many bytes of memory the guest could plug in and has not: QEMU lists
// them as RAM and does not send them. The stream tells that from machine types of QEMU
// 8.0 on; of older ones only QEMU itself does. A QEMU that knows no such devices has
// none.
func Unplugged(ctx context.Context, x qmp.Executor) (n uint64, err error) {
	var devices []struct {
		Type string `json:"type"`
		Data struct {
			Size uint64 `json:"size"`
			Most uint64 `json:"max-size"` // virtio-mem's
		} `json:"data"`
	}
	err = x.Execute(ctx, "query-memory-devices", nil, &devices)
	if answer := new(qmp.Error); errors.As(err, &answer) {
		return 0, nil
	}
	for _, d := range devices {
		if d.Type == "virtio-mem" {
			n += d.Data.Most - min(d.Data.Most, d.Data.Size)
		}
	}
	return n, err
}

// FirstPass is how far QEMU is with the first pass over memory, of a migration that is held.
type FirstPass struct {
	// Passes is how many passes QEMU has begun, by its own count.
	Passes int64
	// Left is how many pages of the pass QEMU has not put into its buffers yet.
	Left uint64
	// Spare is how many must be left for QEMU not to look whether it could finish, with as
	// many again and spareLeast for what it may measure next.
	Spare uint64
}

// spareLeast is FirstPass.Spare where QEMU has sent next to nothing lately: 100 MB in the 100 ms
// that come next.
const spareLeast = 256

// QueryFirstPass asks QEMU. ErrNotArmed: the migration has ended, or is on its way to that.
// ErrOutrun: it has come further than to its passes over memory.
func QueryFirstPass(ctx context.Context, x qmp.Executor) (p FirstPass, err error) {
	info, err := Query(ctx, x)
	switch {
	case err != nil:
		return p, err
	case info.Status == StatusDevice || info.Status == StatusPreSwitchover || info.Status == StatusCompleted:
		return p, fmt.Errorf("%w (it is %s)", ErrOutrun, info.Status)
	case info.Status != StatusActive || info.RAM == nil || info.RAM.PageSize <= 0 || info.RAM.Remaining < 0:
		return p, fmt.Errorf("%w (it is %s)", ErrNotArmed, info.Status)
	}
	p.Passes, p.Left = info.RAM.DirtySyncCount, uint64(info.RAM.Remaining/info.RAM.PageSize)
	// It looks when what is left could be sent in downtime-limit, 1 ms, at the rate that it has
	// measured last, for which it waits 100 ms at least.
	perMs := max(info.RAM.Mbps, 0) * 1e6 / 8 / 1000
	p.Spare = spareLeast + 2*uint64(perMs)/uint64(info.RAM.PageSize)
	return p, nil
}

// armNeeds is what a checkpoint that stops the guest needs, but that the guest, which
// runs for a long time meanwhile, is not slowed down.
func armNeeds(name string, is bool) bool {
	switch name {
	case "events", "return-path":
		return true
	case "validate-uuid", "dirty-bitmaps":
		return is
	}
	return false
}

// CheckpointArmed is Checkpoint with a guest that is armed. The options' Save has the
// other process go on, waits for its word and gets no stream; when its ctx ends, it must
// have that process end too. Mode is not looked at, nor what goes with it. ErrNotArmed
// comes before anything is changed. Left tells that QEMU is that process's to put right, also
// because nothing was begun.
func CheckpointArmed(ctx context.Context, x qmp.Executor, kept Kept, o CheckpointOptions) (rep CheckpointReport, err error) {
	o.Mode = ModeStop
	c := &checkpointer{drive: drive{x: x, redial: o.Redial}, o: o}
	c.rep.Mode, c.rep.Converged = ModeStop, true
	c.settings = settings{off: kept.Capabilities, formerly: kept.Parameters}
	armed, _, guest, err := isArmed(ctx, x)
	if err == nil && !armed {
		err = ErrNotArmed
	}
	if err != nil {
		c.rep.Left = true
		return c.rep, err
	}
	c.was = guest
	defer takeBack(ctx, x, livesName)
	return c.run(ctx, c.saveArmed)
}

// isArmed tells whether a migration runs that an Arm has begun, whether its
// settings are there, which can be without it, and what the guest does.
func isArmed(ctx context.Context, x qmp.Executor) (running, marked bool, guest qmp.RunState, err error) {
	var parameters map[string]json.RawMessage
	var info Info
	err = errors.Join(qmp.Together(ctx, x,
		qmp.Call{Command: "query-migrate-parameters", Result: &parameters},
		qmp.Call{Command: "query-migrate", Result: &info},
		qmp.Call{Command: "query-status", Result: &guest})...)
	if err != nil || leftIn(parameters) != LeftArmed {
		return false, false, guest, err
	}
	info.complete()
	return info.Status.goesOn(), true, guest, nil
}

// saveArmed is save for a migration that is there.
func (c *checkpointer) saveArmed(ctx context.Context) error {
	err := c.attach(ctx, func(ctx context.Context) error { return c.o.Save(ctx, nil, c.was) }, func() error {
		if c.o.Stopping != nil {
			if err := c.o.Stopping(); err != nil {
				return err
			}
		}
		if c.was.Running {
			// The mark is there before the guest stops, so that whoever comes after a
			// killed process knows who has stopped it.
			c.stoppedAt = time.Now()
			mark := parametersCall(map[string]any{"max-bandwidth": stoppedBandwidth})
			if err := errors.Join(qmp.Together(ctx, c.x, mark, qmp.Call{Command: "stop"})...); err != nil {
				return err
			}
		}
		if c.o.Stopped != nil {
			return c.o.Stopped(ctx)
		}
		return nil
	})
	if err != nil {
		return err
	}
	return c.wait(ctx)
}

// attach takes over a migration that runs already. The consumer begins after first, unless
// that fails.
func (d *drive) attach(ctx context.Context, consume func(context.Context) error, first func() error) error {
	d.started = true
	d.channel = &Channel{discard: func(context.Context) {}}
	ctx, d.stop = context.WithCancel(ctx)
	d.done = make(chan struct{})
	if d.err = first(); d.err != nil {
		close(d.done)
		return d.err
	}
	go func() {
		defer close(d.done)
		d.err = rescue.Call(func() error { return consume(ctx) })
	}()
	return nil
}

// DisarmOptions say what Disarm finds.
type DisarmOptions struct {
	Kept Kept
	// Ended: the migration is known to have ended. One that runs is not ours then.
	Ended bool
	// Ran: QEMU may have stopped the guest, which ran, to finish the migration (ErrOutrun).
	Ran bool
	// Held: the stream was held until now, so that the migration is ours though it may have lost
	// its mark, by a max-bandwidth that somebody has set meanwhile. That one stays.
	Held   bool
	Redial Redialer // may be nil
}

// Disarm ends the migration that an Arm has begun, puts settings back, and lets a guest
// run that a CheckpointArmed has stopped. A QEMU without our mark is left alone, unless the
// stream was held.
func Disarm(ctx context.Context, x qmp.Executor, o DisarmOptions) error {
	p, err := Parameters(ctx, x)
	if err != nil {
		return err
	}
	d := &drive{x: x, redial: o.Redial, started: !o.Ended}
	switch leftIn(p) {
	case LeftArmed:
		d.was.Running = o.Ran
	case LeftStopped:
		d.was.Running = true // and so it is to be again
	case LeftNothing:
		if !o.Held {
			return nil
		}
	default:
		return nil
	}
	marked, formerly := leftIn(p) != LeftNothing, o.Kept.Parameters
	if !marked {
		formerly = maps.Clone(formerly)
		delete(formerly, "max-bandwidth")
	}
	if o.Ended {
		// It may be ending, and settings can't be changed before it has.
		info, err := d.untilEnded(ctx)
		if err == nil && !marked && info.Status.goesOn() {
			err = fmt.Errorf("%w (it is %s)", ErrMigrating, info.Status) // it may be another one
		}
		if err != nil {
			return err
		}
	}
	d.settings = settings{off: o.Kept.Capabilities, formerly: formerly}
	defer takeBack(ctx, x, livesName)
	return d.end(ctx)
}

// untilEnded waits a little for a migration that ends.
func (d *drive) untilEnded(ctx context.Context) (Info, error) {
	ctx, stop := context.WithTimeout(ctx, livesTime)
	defer stop()
	info, err := Wait(ctx, d.x, StatusFailed, StatusCancelled, StatusNone)
	if errors.Is(err, context.DeadlineExceeded) {
		err = nil
	}
	return info, err
}

// CancelArmed cancels the migration that an Arm has begun, and tells whether there was one. It
// leaves settings, and their mark, to the process that reads the stream and knows what they
// were: as long as that migration runs there is one.
func CancelArmed(ctx context.Context, x qmp.Executor) (ran bool, err error) {
	ran, _, _, err = isArmed(ctx, x)
	if err != nil || !ran {
		return false, err
	}
	if err := Cancel(ctx, x); err != nil {
		return true, err
	}
	_, err = Wait(ctx, x, StatusCancelled, StatusFailed, StatusNone)
	return true, err
}

// Forgotten is the Kept of an Arm whose process has died: QEMU's defaults, for what
// nobody knows any more. It is nil if QEMU is not armed.
func Forgotten(ctx context.Context, x qmp.Executor) (*Kept, error) {
	_, marked, _, err := isArmed(ctx, x)
	if err != nil || !marked {
		return nil, err
	}
	s, err := planSettings(ctx, x, func(string, bool) bool { return false }, map[string]any{"downtime-limit": 1})
	if err != nil {
		return nil, err
	}
	return &Kept{s.off, s.formerly}, nil
}

// armedSend bounds what waits in a socket whose other end nobody reads, in bytes: the
// smaller it is, the less of the first pass must be left for after the hold, but the
// slower the stream. With 16 KiB 1.8 GB/s go through (measured, with 8 KiB 1.0, with
// the usual 208 KiB 6.5).
const armedSend = 16 << 10

// wideSend is armedSend for the first part of a pass that is held in the end. What QEMU
// writes goes through in pieces of half of that, and for each its thread and ours wait for a
// CPU, which is long where guests run: with eight times as much it takes half of the time.
const wideSend = 128 << 10

// OpenWidening is OpenArmed, but the sockets can hold more for a while. Until they can't any
// more QEMU's end is open here, too, so that of a QEMU that is gone the monitor tells, and not
// the stream.
func OpenWidening(ctx context.Context, x qmp.Executor, _ Direction) (*Channel, error) {
	c, end, wide, err := openHeld(ctx, x)
	if err != nil || end == nil {
		return c, err
	}
	w := &widening{end: end}
	discard := c.discard
	c.wide, c.widen = wide, w.widen
	c.discard = func(ctx context.Context) {
		w.close()
		discard(ctx)
	}
	return c, nil
}

// openHeld opens a channel for a stream that is held: a pair of sockets that hold little, if the
// monitor can carry files, and else a socket that QEMU connects to. Of a pair end is QEMU's once
// more, which can be made to hold wide bytes.
func openHeld(ctx context.Context, x qmp.Executor) (c *Channel, end *os.File, wide int, err error) {
	if p, ok := x.(qmp.FilePasser); ok {
		c, err = passEnds(ctx, x, p, func() (ours, theirs *os.File, err error) {
			if ours, theirs, err = newEnds(TwoWay); err != nil {
				return nil, nil, err
			}
			if err = setSendBuffer(theirs, wideSend); err == nil {
				wide = waiting(theirs)
				err = setSendBuffer(theirs, armedSend)
			}
			if err == nil {
				end, err = duplicate(theirs)
			}
			return ours, theirs, err
		})
		if err == nil {
			return c, end, wide, nil
		}
		end.Close() // of nil is an error that nobody wants to know
		if !notCarried(err) {
			return nil, nil, 0, err
		}
	}
	c, err = ListenChannel(ctx, x, "")
	return c, nil, 0, err
}

// widening is QEMU's end of a channel that can be widened. It may be closed at any time.
type widening struct {
	mu  sync.Mutex
	end *os.File // nil: closed
}

// widen is Channel.widen.
func (w *widening) widen(on bool) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.end == nil:
		return os.ErrClosed // what reads the stream hears of it, too
	case on:
		return setSendBuffer(w.end, wideSend)
	}
	err := errors.Join(setSendBuffer(w.end, armedSend), w.end.Close())
	w.end = nil
	return err
}

func (w *widening) close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.end != nil {
		w.end.Close()
		w.end = nil
	}
}

// duplicate is the same open file once more.
func duplicate(f *os.File) (*os.File, error) {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

// OpenArmed is the OpenFunc for a stream that is held until Widen.
func OpenArmed(ctx context.Context, x qmp.Executor, _ Direction) (*Channel, error) {
	c, end, _, err := openHeld(ctx, x)
	if err != nil || end == nil {
		return c, err
	}
	if c.lives, err = passLife(ctx, x); err != nil {
		end.Close() // it is as slow as it is
		return c, nil
	}
	c.theirs = end
	discard := c.discard
	c.discard = func(ctx context.Context) {
		c.theirs.Close()
		c.lives.Close()
		discard(ctx)
	}
	return c, nil
}

// livesName is QEMU's name of what passLife passes it. A name used again releases what it
// meant before.
const livesName = passedName + "-lives"

// passLife passes QEMU an end of a pipe, which nothing is done with: the other end, which it
// returns, tells when QEMU is gone.
func passLife(ctx context.Context, x qmp.Executor) (*os.File, error) {
	p, ok := x.(qmp.FilePasser)
	if !ok {
		return nil, qmp.ErrNoFiles
	}
	lives, theirs, err := newEnds(OneWay)
	if err != nil {
		return nil, err
	}
	defer theirs.Close()
	if err := p.PassFile(ctx, livesName, theirs); err != nil {
		lives.Close()
		return nil, err
	}
	return lives, nil
}
