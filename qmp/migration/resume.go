package migration

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/ramparse"
)

// Resume restores a saved VM into a QEMU that was started with
// `-incoming defer -S`, eagerly or lazily.
//
//	           lazy                                        eager
//	           events, postcopy-ram on
//	           the server begins on one end of a socket    … of a pipe
//	           getfd, migrate-incoming fd:… ─► inmigrate   the same
//	           paused (running on what is there) ◄──┐      paused (all is there)
//	           cont, if it ran when saved           │      cont, if it ran when saved
//	           postcopy-active … completed          │
//	           postcopy-paused (the server died) ───┘ Recover

// LazyMode says whether a guest is to run before all of its memory is there.
type LazyMode string

// The modes.
const (
	LazyAuto   LazyMode = "auto"   // if it is possible
	LazyAlways LazyMode = "always" // or fail
	LazyNever  LazyMode = "never"
)

// ServerKind says what a server is to send.
type ServerKind int

// The kinds.
const (
	EagerServer      ServerKind = iota // all memory, and then the devices
	LazyServer                         // the devices, and then memory, as it is asked for and all of it
	RecoveringServer                   // what a LazyServer that has died did not send
)

// ResumeOptions say what to resume and how.
type ResumeOptions struct {
	// Serve starts an eager or a lazy server that writes the stream to out, a pipe if
	// it is eager, and else a socket from which it reads QEMU's requests; end kills
	// it. out is the caller's to close.
	Serve func(k ServerKind, out *os.File) (end func(), err error)
	// Command is the command line of a server that QEMU starts. It is used if the
	// monitor carries no files, without Serve, and for a RecoveringServer: QEMU may be
	// able to run only commands out of band then, of which getfd is none.
	Command func(k ServerKind) []string
	// Connect starts a RecoveringServer for a QEMU that may start no process (-sandbox
	// spawn=deny) and listens on a socket. The server connects when nothing can keep
	// it from speaking any more: a connection that ends before is the end of QEMU.
	Connect func(socket string) error
	// Gone tells that the server which was started last has ended, which QEMU notices
	// only if it has heard from it. nil: not known.
	Gone func() bool
	// recovering: the guest may have run before, and been stopped by somebody.
	recovering bool
	// loaded: the devices are, so the guest may have run.
	loaded bool
	// caps are QEMU's capabilities; nil if it was another process that changed them.
	caps *adjusted
	// Regain is asked, when a server has died, whether to start another at once. nil:
	// never. It needs a Monitor with OOB.
	Regain func() bool
	// ID tells checkpoints apart, in letters, digits and "-": a Recover refuses to
	// go on with another than was begun with. Empty: it is the caller's to know.
	ID string
	// Capabilities are those that the saved stream says its QEMU had.
	Capabilities []string
	// Lazy is "auto" if empty.
	Lazy LazyMode
	// NotPossible says why this checkpoint can't be restored lazily; nil if
	// it can.
	NotPossible error
	// RunState is the saved VM's globalstate, "running" or "paused" …
	RunState string
	// Paused leaves the guest paused, whatever it was when saved.
	Paused bool
	// Check is called, if not nil, when the QEMU is known to wait for a migration and
	// before anything is done to it. An error ends the resume; notLazy is why this QEMU
	// can't restore lazily, or nil.
	Check func(ctx context.Context) (notLazy error, warnings []string, err error)
	// Ready is called, if not nil, when the guest can run and has not: it returns when
	// those that are resumed together with it can run too. After an error it stays paused.
	Ready func(ctx context.Context) error
	// Running is called, if not nil, when the guest may run.
	Running func(ResumeReport)
}

// ResumeReport is what a resume did.
type ResumeReport struct {
	Lazy     bool          `json:"lazy"`
	Reason   string        `json:"reason,omitempty"`   // why it is eager although auto was asked for
	State    string        `json:"state"`              // QEMU's run state at the end
	Running  time.Duration `json:"running_ns"`         // from migrate-incoming until the guest may run
	Resident time.Duration `json:"resident_ns"`        // until all memory is there
	Warnings []string      `json:"warnings,omitempty"` // what was not as it should be
	// Latency is QEMU's own figure, from 10.1 on; nil without.
	Latency *Latency `json:"qemu_latency,omitempty"`
}

// Latency is how long QEMU's threads waited for pages that they asked a lazy restore
// for, as it counts itself (postcopy-latency … in qapi/migration.json).
type Latency struct {
	Average time.Duration `json:"average_ns"`
	// Distribution has for each N from 0 on how many waited for 2^N to 2^(N+1) µs.
	Distribution []int64         `json:"distribution"`
	VCPUs        []time.Duration `json:"vcpus_ns"` // each one's average
}

var (
	// ErrNotIncoming: the QEMU does not wait for a migration.
	ErrNotIncoming = errors.New("this QEMU does not wait for a migration: start it with -incoming defer -S")
	// ErrBeforeRun: the restore has failed, the guest never ran, and QEMU is
	// of no more use.
	ErrBeforeRun = errors.New("the restore failed before the guest could run; the checkpoint is untouched")
	// ErrServer: the server had nothing to send. QEMU has not been told of it, and
	// can be used for another Resume.
	ErrServer = errors.New("the restore could not begin; this QEMU still waits for a migration")
	// ErrServerDied: the lazy restore's server has ended before its work. The
	// guest waits for memory and has lost nothing; Recover goes on.
	ErrServerDied = errors.New("the restore's server has died; the guest is held and nothing is lost")
	// ErrNotPaused: there is nothing to recover.
	ErrNotPaused = errors.New("this QEMU's restore has not been interrupted")
	// ErrPostcopy: QEMU refuses postcopy-ram.
	ErrPostcopy = errors.New("QEMU can't restore lazily: it may not use userfaultfd (needs sysctl vm.unprivileged_userfaultfd=1, " +
		"access to /dev/userfaultfd with QEMU 8.1 or later, or CAP_SYS_PTRACE), or its memory backend does not allow it")
)

// Resume restores into the QEMU at x and returns when all memory is there. The
// guest is let run, if it is to, as soon as QEMU can.
func Resume(ctx context.Context, x qmp.Executor, o ResumeOptions) (ResumeReport, error) {
	var rep ResumeReport
	s, err := qmp.QueryStatus(ctx, x)
	if err != nil {
		return rep, err
	}
	if s.Status != "inmigrate" {
		return rep, fmt.Errorf("%w (it is %s)", ErrNotIncoming, s.Status)
	}
	if o.Check != nil {
		notLazy, warnings, err := o.Check(ctx)
		rep.Warnings = append(rep.Warnings, warnings...)
		if err != nil {
			return rep, err
		}
		if o.NotPossible == nil {
			o.NotPossible = notLazy
		}
	}
	if o.caps, err = adjust(ctx, x); err != nil {
		return rep, err
	}
	if err := o.caps.checkCapabilities(o.Capabilities); err != nil {
		return rep, err
	}
	err = o.prepareLazy(ctx, x, &rep)
	if err == nil && rep.Lazy {
		o.mark(ctx, x)
	}
	var from place
	var withdraw func()
	if err == nil {
		from, withdraw, err = o.offer(ctx, x, rep.Lazy)
	}
	if err != nil {
		o.unmark(ctx, x)
		return rep, errors.Join(err, o.putBack(ctx, x))
	}
	ctx, end := patient(ctx)
	defer end()
	watched, stop := watchIncoming(ctx, x)
	defer stop()
	start := time.Now()
	stays, err := incoming(ctx, x, from, rep.Lazy)
	if err != nil {
		withdraw()
		o.unmark(ctx, x)
		return rep, errors.Join(err, o.putBack(ctx, x))
	}
	err = o.because(watched, o.load(watched, x, start, &rep))
	if stays && errors.Is(err, ErrBeforeRun) || errors.Is(err, errDevice) {
		return rep, giveUp(ctx, x, err)
	}
	return rep, o.regain(ctx, x, start, &rep, err)
}

// errGaveUp: QEMU's migration has failed.
var errGaveUp = errors.New("QEMU has given up, and its output has the reason; if it does not end by itself, kill it")

// because says why a resume has failed, whatever call has noticed it.
func (o *ResumeOptions) because(watched context.Context, err error) error {
	cause := context.Cause(watched)
	if errors.Is(cause, ErrServerDied) {
		o.loaded = true // or it would not be paused
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(cause, errGaveUp) && !o.loaded:
		return fmt.Errorf("%w: %w", ErrBeforeRun, cause)
	case errors.Is(cause, errGaveUp):
		return fmt.Errorf("the restore failed when the guest could run, before all of its memory was there; the checkpoint is untouched: %w", cause)
	case watched.Err() != nil:
		return cause
	case errors.Is(err, qmp.ErrLost) && !errors.Is(err, ErrBeforeRun):
		return fmt.Errorf("QEMU has ended before all memory was there, and its output has the reason; the checkpoint is untouched: %w", err)
	}
	return err
}

// load follows an incoming migration that has begun.
func (o *ResumeOptions) load(ctx context.Context, x qmp.Executor, start time.Time, rep *ResumeReport) error {
	if err := leaveInmigrate(ctx, x, rep.Lazy); err != nil {
		return err
	}
	o.loaded = true
	if err := o.run(ctx, x, start, rep); err != nil {
		return err
	}
	return o.finishResume(ctx, x, start, rep)
}

// watchIncoming returns a context that ends when QEMU says that the migration
// has failed or lost its server. QEMU may answer no question any more then: its
// main thread waits for memory that nobody brings.
func watchIncoming(ctx context.Context, x qmp.Executor) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	if events, err := x.Events(ctx); err == nil {
		go func() {
			for e := range events {
				status, _ := e.Data["status"].(string)
				switch {
				case e.Event != "MIGRATION":
				case Status(status) == StatusPostcopyPaused:
					cancel(ErrServerDied)
				case Status(status) == StatusFailed:
					cancel(errGaveUp)
				}
			}
		}()
	}
	return ctx, func() { cancel(nil) }
}

// prepareLazy decides how to restore and sets the capabilities for it.
func (o *ResumeOptions) prepareLazy(ctx context.Context, x qmp.Executor, rep *ResumeReport) error {
	saved := o.Capabilities
	// What is in the way of postcopy-ram goes first, and postcopy-ram is for itself:
	// QEMU takes all of a call's capabilities or none.
	if err := o.caps.set(ctx, x, loads(saved, false)); err != nil {
		return err
	}
	why := o.NotPossible
	if o.Lazy != LazyNever && why == nil {
		err := o.caps.set(ctx, x, loads(saved, true))
		var refused *qmp.Error
		if err != nil && !errors.As(err, &refused) {
			return err
		}
		if err == nil {
			rep.Lazy = true
			o.askLatency(ctx, x)
			return nil
		}
		why = fmt.Errorf("%w: %w", ErrPostcopy, err)
		if len(saved) > 0 {
			why = fmt.Errorf("QEMU can't restore lazily with the capabilities that the saved one had (%s): %w", strings.Join(saved, ", "), err)
		}
	}
	if o.Lazy == LazyAlways {
		return why
	}
	if o.Lazy != LazyNever {
		rep.Reason = why.Error()
	}
	return nil
}

// askLatency has QEMU count how long its threads wait for pages, from 10.1 on, where it
// says more of it than a sum. What it refuses is not counted.
func (o *ResumeOptions) askLatency(ctx context.Context, x qmp.Executor) {
	if v, ok := x.(interface{ Version() qmp.Version }); ok && since(v.Version(), 10, 1) {
		want := loads(o.Capabilities, true)
		_ = o.caps.set(ctx, x, func(name string, was bool) bool { return name == "postcopy-blocktime" || want(name, was) })
	}
}

// putBack makes a QEMU that has loaded, or will not, fit for what its user wants.
func (o *ResumeOptions) putBack(ctx context.Context, x qmp.Executor) error {
	if err := letGo(ctx, x); err != nil {
		return err
	}
	if o.caps == nil {
		// It is known of no other.
		return SetCapabilities(ctx, x, map[string]bool{"postcopy-ram": false})
	}
	return o.caps.putBack(ctx, x)
}

// run puts the guest into its state.
func (o *ResumeOptions) run(ctx context.Context, x qmp.Executor, start time.Time, rep *ResumeReport) error {
	s, err := qmp.QueryStatus(ctx, x)
	if err != nil {
		return err
	}
	runs := !o.Paused && (o.RunState == "" || o.RunState == "running")
	if o.Ready != nil && !o.recovering {
		if err := o.Ready(ctx); ctx.Err() != nil {
			return err
		} else if err != nil {
			runs = false
			rep.Warnings = append(rep.Warnings, fmt.Sprintf("the guest stays paused: %v", err))
		}
	}
	state := s.Status
	switch {
	case runs && !s.Running:
		state, err = "running", qmp.Cont(ctx, x)
	case !runs && s.Running && !o.recovering:
		rep.Warnings = append(rep.Warnings, "the guest was to stay paused and ran for a moment: this QEMU was started without -S")
		state, err = "paused", qmp.Stop(ctx, x)
	}
	if err != nil {
		return err
	}
	rep.State, rep.Running = state, time.Since(start)
	if s, err = qmp.QueryStatus(ctx, x); err == nil {
		rep.State = s.Status
	}
	// Also if QEMU does not say so, because its main loop waits for a page of a server that
	// dies: the guest runs, and nobody lets it run again.
	if o.Running != nil {
		o.Running(*rep)
	}
	return err
}

// patient returns a context whose calls wait for an answer as long as ctx lasts:
// QEMU's main loop may be waiting for memory, or for a vCPU that does, and then for a
// server that is slow or hangs. What is given up and asked again stays in QEMU's
// queue, and with eight commands there it reads no more, out-of-band ones included
// (monitor/qmp.c, QMP_REQ_QUEUE_LEN_MAX).
func patient(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, 365*24*time.Hour)
}

// finishResume waits until all memory is there and makes the QEMU fit for
// being saved again.
func (o *ResumeOptions) finishResume(ctx context.Context, x qmp.Executor, start time.Time, rep *ResumeReport) error {
	m, err := Wait(ctx, x, StatusPostcopyPaused)
	if err != nil {
		return err
	}
	if m.Status == StatusPostcopyPaused {
		return ErrServerDied
	}
	rep.Resident = time.Since(start)
	if m.LatencyDist != nil {
		rep.Latency = &Latency{time.Duration(m.Latency), m.LatencyDist, m.VCPULatency}
	}
	if rep.Lazy {
		o.unmark(ctx, x)
	}
	var refused *qmp.Error
	if err := o.putBack(ctx, x); errors.As(err, &refused) || errors.Is(err, errHeld) {
		rep.Warnings = append(rep.Warnings, fmt.Sprintf("the guest is whole, but QEMU's migration capabilities are not as they were: %v", err))
	} else if err != nil {
		return err
	}
	s, err := qmp.QueryStatus(ctx, x)
	rep.State = s.Status
	return err
}

// ramblockLine is a line of HMP's "info ramblock": name, page size, then
// offset, used and total length in hexadecimal, and in newer versions more:
//
//	pc.ram    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000
var ramblockLine = regexp.MustCompile(`(?m)^\s*(\S+)\s+(\d+) ([KMG])iB\s+0x[0-9a-f]+ 0x([0-9a-f]+) 0x[0-9a-f]+`)

// RAMBlocks lists QEMU's RAM blocks, with the size of the host's pages in them. QMP has
// no command for that.
func RAMBlocks(ctx context.Context, x qmp.Executor) ([]ramparse.Block, error) {
	text, err := qmp.HumanMonitor(ctx, x, "info ramblock")
	if err != nil {
		return nil, err
	}
	var blocks []ramparse.Block
	for _, m := range ramblockLine.FindAllStringSubmatch(text, -1) {
		page, err := strconv.ParseUint(m[2], 10, 32)
		if err != nil {
			return nil, err
		}
		used, err := strconv.ParseUint(m[4], 16, 64)
		if err != nil {
			return nil, err
		}
		unit := 10 * (1 + strings.Index("KMG", m[3]))
		blocks = append(blocks, ramparse.Block{Name: m[1], Used: used, PageSize: page << unit})
	}
	if len(blocks) == 0 {
		return nil, fmt.Errorf("no block in QEMU's answer to info ramblock: %q", text)
	}
	return blocks, nil
}
