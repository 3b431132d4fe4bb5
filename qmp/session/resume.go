package session

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/disks"
	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/tier/lazy"
	"github.com/flic-migrate/flic-migrate/tier/progress"
	"github.com/flic-migrate/flic-migrate/tier/rescue"
	"github.com/flic-migrate/flic-migrate/tier/store"
)

// ResumeOptions say how to resume.
type ResumeOptions struct {
	Lazy    migration.LazyMode
	Paused  bool // leave the guest paused, even if it ran when saved
	Recover bool // go on with a lazy restore whose server has died
	// Learn is for how long the server holds back what the guest does not ask for.
	Learn time.Duration
	// Restarts is how many times a server that has died is followed by another.
	Restarts int
	// Stalled is how long a server may say nothing before it is warned of; 0: for
	// ever.
	Stalled time.Duration

	// Force resumes although the QEMU seems to be another machine than was saved, or its
	// disks to be other ones, as far as a user may know better.
	Force bool
	// Overlay puts a new overlay on each disk that was frozen with the checkpoint, and has
	// the guest go on in these. It is for domains, which libvirt starts.
	Overlay bool

	// Guest is what the guest's agent does when the guest runs again; nil: nothing.
	Guest *GuestCare

	// Server is the command line of a server, a process of its own. The servers of a
	// domain are in this process.
	Server func(ServerArgs) []string

	Running  func(migration.ResumeReport) // called, if not nil, when the guest may run
	Progress func(progress.State)         // called, if not nil, as memory comes
	Log      *slog.Logger                 // of warnings

	// ready is migration.ResumeOptions.Ready, of a member of a group.
	ready func(ctx context.Context) error
}

// ServerArgs are what a server has to know.
type ServerArgs struct {
	Kind    migration.ServerKind
	Control string // for Attach; empty: nobody listens
	Socket  string // of a QEMU that listens on one; empty: standard input and output
	// ZeroRest is lazy.Options.ZeroRest.
	ZeroRest bool
}

// ResumeReport is what a resume did.
type ResumeReport struct {
	migration.ResumeReport
	// Server is the report of the last server; nil if it left none.
	Server *ServerReport `json:"server,omitempty"`
	// Overlays are what the disks go on in, if they were made.
	Overlays []disks.Snapshot `json:"overlays,omitempty"`
	// Guest is how long it took until the agent had done what it was asked for; 0 if that
	// was nothing.
	Guest time.Duration `json:"guest_ns,omitempty"`
}

// ServerError is a resume's failure whose reason is the server's.
type ServerError struct {
	Err    error
	Server *ServerReport
}

func (e *ServerError) Error() string {
	return fmt.Sprintf("%v (the server says: %s)", e.Err, e.Server.Error)
}

func (e *ServerError) Unwrap() error { return e.Err }

// Resume restores c into the target and returns when all memory is there. The guest
// runs, if it is to, as soon as it can. c is held open by the caller meanwhile, so
// that it is not removed.
func Resume(ctx context.Context, t Target, st *store.Store, c *store.Checkpoint, o ResumeOptions) (ResumeReport, error) {
	if err := t.Check(); err != nil {
		return ResumeReport{}, err
	}
	if err := o.Guest.check(); err != nil {
		return ResumeReport{}, err
	}
	cared := o.care(ctx, t)
	rep, err := resumeTarget(ctx, t, st, c, o)
	return rep, errors.Join(err, cared(&rep, err))
}

func resumeTarget(ctx context.Context, t Target, st *store.Store, c *store.Checkpoint, o ResumeOptions) (ResumeReport, error) {
	if t.Domain != "" {
		return resumeDomain(ctx, t, st, c, o)
	}
	m, err := t.dial(ctx, qmp.Options{OOB: true, IfOffered: !o.Recover})
	if err != nil {
		return ResumeReport{}, err
	}
	defer m.Close()
	rep, err := resume(ctx, m, c, o)
	for _, w := range rep.Warnings {
		o.Log.Warn(w)
	}
	return rep, err
}

// resume restores and watches the servers meanwhile.
func resume(ctx context.Context, m *qmp.Monitor, c *store.Checkpoint, o ResumeOptions) (rep ResumeReport, err error) {
	s := &servers{
		name: c.Ref.String(), recover: o.Recover, stalled: o.Stalled, restarts: o.Restarts,
		say: func(text string) { o.Log.Warn(text) }, show: o.Progress, running: make(chan struct{}),
	}
	defer s.close()
	asked := ctx // ends if the caller is asked to
	ctx, cancel := context.WithCancelCause(ctx)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		if err := rescue.Call(func() error { return s.run(ctx) }); err != nil {
			cancel(err)
		}
	}()
	mo := o.migration(ctx, m, c, s)
	if o.Recover {
		rep.ResumeReport, err = migration.Recover(ctx, m, mo)
	} else {
		rep.ResumeReport, err = migration.Resume(ctx, m, mo)
	}
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err == nil {
		migration.NoteOrigin(ctx, m, c.Meta.UUID.String())
	}
	cancel(nil)
	<-watched
	// A server ends a moment after QEMU has its last byte. One that was killed
	// leaves no report.
	last := s.newest().state()
	if err == nil || errors.Is(err, migration.ErrServer) ||
		errors.Is(err, migration.ErrServerDied) || errors.Is(err, migration.ErrBeforeRun) {
		last = s.newest().final(context.WithoutCancel(ctx))
	}
	if rep.Server = last.report; err != nil && last.report != nil && last.report.Error != "" {
		return rep, &ServerError{err, last.report}
	}
	if err != nil && asked.Err() != nil {
		err = fmt.Errorf("%w: %s", err, s.afterwards(rep.State))
	}
	return rep, err
}

// migration is what of a resume is the migration's.
func (o *ResumeOptions) migration(ctx context.Context, m *qmp.Monitor, c *store.Checkpoint, s *servers) migration.ResumeOptions {
	mo := ResumePlan(c, *o)
	server := func(k migration.ServerKind, control, socket string) []string {
		return o.Server(ServerArgs{Kind: k, Control: control, Socket: socket, ZeroRest: migration.NeedsAllPages(m.Version())})
	}
	mo.Command = func(k migration.ServerKind) []string {
		return server(k, s.expect(func() int { return qemuUser(ctx, m, k == migration.RecoveringServer) }), "")
	}
	mo.Serve = func(k migration.ServerKind, out *os.File) (func(), error) {
		return s.start(func(control string) []string { return server(k, control, "") }, out, k != migration.EagerServer)
	}
	mo.Connect = func(socket string) error {
		_, err := s.start(func(control string) []string { return server(migration.RecoveringServer, control, socket) }, nil, false)
		return err
	}
	mo.Check = func(ctx context.Context) (error, []string, error) { return o.check(ctx, m, c) }
	mo.Gone, mo.Regain, mo.Ready = s.gone, s.regain, o.ready
	mo.Running = func(rep migration.ResumeReport) {
		close(s.running)
		if o.Running != nil {
			o.Running(rep)
		}
	}
	return mo
}

// ResumePlan is what a resume of c asks of a QEMU, without the servers.
func ResumePlan(c *store.Checkpoint, o ResumeOptions) migration.ResumeOptions {
	mo := migration.ResumeOptions{
		ID:           c.Meta.UUID.String(),
		Lazy:         o.Lazy,
		NotPossible:  lazy.Possible(c.Checkpoint),
		RunState:     c.Meta.RunState,
		Paused:       o.Paused,
		Capabilities: c.Meta.Capabilities,
	}
	return mo
}

// qemuUser is the user of the QEMU at m. One that recovers can't be asked, as its main
// loop may be waiting for memory; nor can everyone answer. Then it is taken to be this
// process's.
func qemuUser(ctx context.Context, m *qmp.Monitor, recover bool) int {
	if peer, known := m.Peer(); known {
		return int(peer.Uid)
	}
	if !recover {
		ctx, cancel := context.WithTimeout(ctx, askTime)
		defer cancel()
		if uid, err := migration.Owner(ctx, m, ""); err == nil {
			return int(uid)
		}
	}
	return os.Getuid()
}

// askTime is how long a QEMU that waits for a migration may take to answer.
const askTime = 5 * time.Second
