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
	"github.com/flic-migrate/flic-migrate/qmp/migration/rounds"
	"github.com/flic-migrate/flic-migrate/stream/pipe"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/rescue"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/track"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// CheckpointOptions say how to make a checkpoint.
type CheckpointOptions struct {
	// Guest is what happens to the guest. Its Save, Undo, Open and Redial are set
	// here.
	Guest migration.CheckpointOptions
	// Save is how the stream is stored. Its ReturnPath, RunState, Libvirt, Disks and After are
	// set here, and its WorkingSet is joined with what was seen.
	Save save.Options
	// Disks are disk images of the guest's that pages are looked for in, beside those
	// that QEMU names: of these, what the guest can't write to. NoDisks: not in those
	// that QEMU names. Only what has an index in the store is of use.
	Disks   []save.DiskFile
	NoDisks bool
	// Snapshot makes overlays for the disks that the guest can write to while it stands
	// still, so that the files that it wrote to stay as they belong to the checkpoint. It
	// needs ModeStop.
	Snapshot bool
	// Keep has the store keep a copy of each disk that the guest can write to, as it is
	// while the guest stands still. The guest goes on to write to its own. It needs ModeStop,
	// and fails the checkpoint if it can't be done.
	Keep KeepMode
	// Freeze, with Snapshot or Keep, makes indexes of these files while the guest stands
	// still, and looks for pages in them too. The guest stands still for longer, by as long
	// as it takes to read them.
	Freeze bool

	// Sync makes the guest write to its disks first; nil: it does when it likes.
	Sync *GuestSync
	// Watch says how the guest is watched before; nil: it is not.
	Watch *TrackOptions
	// WatchAsked: the guest is to be watched, whatever is known of it already.
	WatchAsked bool
	// Watched is called, if not nil, with what the watching has shown.
	Watched func(rounds.Report)
	// Guard starts something that reads a stream to its end if this process is
	// killed, which background mode needs; see the mode.
	Guard func(stream *os.File) (release func(), err error)
	// PutRight starts a process that does what the function PutRight does if this one is
	// killed, or can't do it itself; nil: the next checkpoint does it.
	PutRight func(t Target) (*Guard, error)
	// Tidy is called, if not nil, when the checkpoint is durable and the guest runs again,
	// before anything is moved from NVRAM or armed: it removes what is not to stay.
	Tidy func(context.Context) error
	// NVRAMKeep is how many newest checkpoints of each VM stay in NVRAM; what only older
	// ones need goes to flash, when the guest runs again. 0: nothing does.
	NVRAMKeep int
	// Arm leaves the next checkpoint armed, if this one succeeds; nil: it is not.
	Arm *ArmOptions
	Log *slog.Logger // of warnings

	member *member // its place in a group; nil: it is alone
}

// CheckpointReport is what was done. It is the command's JSON document.
type CheckpointReport struct {
	Checkpoint string `json:"checkpoint"` // NAME@N
	migration.CheckpointReport
	// Tracking is missing if the guest was not watched.
	Tracking *rounds.Report     `json:"tracking,omitempty"`
	Save     *checkpoint.Report `json:"save"`
	// Durable is when all of it was, by our clock; zero if nothing was saved.
	Durable time.Time `json:"durable,omitzero"`
	// Demoted is what went from NVRAM to flash afterwards; missing if nothing did.
	Demoted *store.Demoted `json:"demoted,omitempty"`
	// Snapshots are what disks go on in; also after a failure, if they were taken. Those of an
	// armed checkpoint that came to nothing are before the others, which stand on them.
	Snapshots []disks.Snapshot `json:"snapshots,omitempty"`
	// Kept are the copies of disks that the store keeps with it, and KeptTime is how long
	// the guest stood still for them to be made.
	Kept     []Kept        `json:"kept,omitempty"`
	KeptTime time.Duration `json:"kept_ns,omitempty"`
	// Armed: it was made by a process that had it ready.
	Armed bool `json:"armed"`
	// ArmedProcess is the process that has the next one ready; 0: there is none.
	ArmedProcess int `json:"armed_process,omitempty"`
}

// Checkpoint saves the target's guest. If the report says Saved there is a
// checkpoint, even if there is an error as well: then something else is not as it
// should be.
func Checkpoint(ctx context.Context, fs vfs.FS, st *store.Store, t Target, o CheckpointOptions) (rep CheckpointReport, err error) {
	if t, err = t.absolute(); err != nil {
		return rep, err
	}
	x, err := t.dial(ctx, qmp.Options{})
	if err != nil {
		return rep, err
	}
	defer x.Close()
	redial, hangUp := t.redialer()
	defer hangUp()
	o.Guest.Redial = redial
	var tidied error
	// What is watched for up to a minute comes before.
	if o.Watch == nil {
		o.guestSync(ctx, t)
	}
	// Before a snapshot: the disks that belong to the checkpoint are those before it.
	if o.Save.Libvirt, err = t.describe(ctx); err != nil {
		return rep, err
	}
	rep, done, err := o.fromArmed(ctx, st, t, x)
	if err == nil && !done {
		before := rep.Snapshots
		o.Save.Since = checkpointOf(ctx, st, o.Save.VM, migration.Origin(ctx, x))
		rep, err = o.checkpoint(ctx, fs, st, t, x)
		rep.Snapshots = append(before, rep.Snapshots...)
	}
	err = rep.tellSnapshots(err)
	if !rep.Saved {
		rep.Kept, rep.KeptTime = nil, 0 // they went with it
	}
	for _, w := range rep.Warnings {
		o.Log.Warn(w)
	}
	if rep.Saved {
		noteOrigin(ctx, st, x, rep.Checkpoint)
	}
	// Before the next one is armed, which keeps what this one refers to open.
	if rep.Saved && ctx.Err() == nil {
		if o.Tidy != nil {
			tidied = o.Tidy(ctx)
		}
		rep.Demoted = o.demote(ctx, st)
		if o.member == nil { // else the group does
			indexShared(ctx, st, rep.Checkpoint, o.Log)
		}
	}
	if err == nil && o.Arm != nil {
		if rep.ArmedProcess, err = o.arm(ctx, st, t, x, redial, rep.Checkpoint); err != nil {
			err = fmt.Errorf("the next one is not armed: %w", err)
		}
	}
	err = errors.Join(err, tidied)
	if err != nil && rep.Saved {
		// What is there must be known, whatever else there is to say.
		err = fmt.Errorf("%s is saved, but: %w", rep.Checkpoint, err)
	}
	return rep, err
}

// Guard is a process that puts a QEMU right when this one can't. One of the two is called,
// once.
type Guard struct {
	Release func() // ends it: QEMU is as it should be
	Leave   func() // has it do its work now
}

// putRightLimit is how long it is tried to let a guest run that stands still because of us:
// QEMU may not answer for a while, or its monitor may be somebody else's.
const putRightLimit = 10 * time.Minute

// PutRight does for a target what a checkpoint that was killed can't do any more: see
// migration.PutRight.
func PutRight(t Target) error {
	return t.insist(putRightLimit, func(ctx context.Context) error {
		x, err := t.dial(ctx, qmp.Options{})
		if err != nil {
			return err
		}
		defer x.Close()
		return migration.PutRight(ctx, x)
	})
}

// tryTime bounds a try of insist.
const tryTime = time.Minute

// insist does something with a QEMU until that succeeds or limit is over. A QEMU that is not
// there needs nothing.
func (t Target) insist(limit time.Duration, do func(context.Context) error) error {
	all, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	for {
		ctx, stop := context.WithTimeout(all, tryTime)
		err := do(ctx)
		stop()
		if err == nil || t.gone(err) {
			return nil
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-all.Done():
			return err
		}
	}
}

// demoteLimit is how long a checkpoint takes to make room in NVRAM for the next: some
// 800 MB of flash, as flash is here. The next one, and gc, go on.
const demoteLimit = 10 * time.Second

// demote moves what only older checkpoints need from NVRAM to flash. What it can't do is
// no failure of a checkpoint that is durable.
func (o *CheckpointOptions) demote(ctx context.Context, st *store.Store) *store.Demoted {
	if o.NVRAMKeep == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, demoteLimit)
	defer cancel()
	d, err := st.Demote(ctx, o.NVRAMKeep)
	if err = errors.Join(d.Left, err); err != nil && ctx.Err() == nil {
		o.Log.Warn("older checkpoints keep room in NVRAM", "cause", err)
	}
	if d == (store.Demoted{Left: d.Left}) {
		return nil
	}
	return &d
}

// indexLimit is how long a checkpoint takes to have its pages found by others: as many as
// 100 GB have. The next save, and gc, go on.
const indexLimit = 10 * time.Second

// indexShared has the next saves find the pages of the VM's checkpoint, so that no guest
// stands still while that is done.
func indexShared(ctx context.Context, st *store.Store, name string, log *slog.Logger) {
	ctx, cancel := context.WithTimeout(ctx, indexLimit)
	defer cancel()
	ref, err := store.ParseRef(name)
	if err == nil {
		err = st.IndexShared(ctx, ref)
	}
	if err != nil && ctx.Err() == nil {
		log.Warn("the index of shared pages is not up to date", "cause", err)
	}
}

// noteOrigin notes a checkpoint that was made just now in a QEMU in which one was noted.
func noteOrigin(ctx context.Context, st *store.Store, x qmp.Executor, name string) {
	origin := migration.Origin(ctx, x)
	ref, err := store.ParseRef(name)
	if origin == "" || err != nil {
		return
	}
	if d, err := st.Describe(ctx, ref); err == nil {
		migration.NoteNext(ctx, x, origin, d.UUID.String())
	}
}

// checkpointOf is the VM's checkpoint with a UUID; the zero Ref if there is none.
func checkpointOf(ctx context.Context, st *store.Store, vm, id string) store.Ref {
	if id == "" {
		return store.Ref{}
	}
	list, err := st.Identities(ctx, vm)
	if err != nil {
		return store.Ref{}
	}
	for _, l := range list {
		if l.Identity != nil && l.Identity.UUID.String() == id {
			return l.Ref
		}
	}
	return store.Ref{}
}

// checkpoint is one that nobody has ready.
func (o *CheckpointOptions) checkpoint(ctx context.Context, fs vfs.FS, st *store.Store, t Target, x qmp.Executor) (rep CheckpointReport, err error) {
	if o.Watch != nil {
		if rep.Tracking, err = o.watch(ctx, x, o.Guest.Redial); err != nil {
			return rep, err
		}
		o.guestSync(ctx, t)
	}
	// What the saves that come are told waits until the guest runs, or is left to its guard.
	rest := func(context.Context) {}
	o.Save.After = func(r func(context.Context)) { rest = r }
	defer func() { rest(ctx) }()
	guarded := o.guard(t)
	left := false // QEMU may not be as it should be
	defer func() { guarded.end(left) }()
	found, opened, err := o.openDisks(ctx, st, x)
	if err != nil {
		return rep, err
	}
	defer func() { opened.Close() }()
	if err := o.canKeep(ctx, st, x, found); err != nil {
		return rep, err
	}
	if err := guarded.wait(); err != nil {
		return rep, err
	}
	var copies *keeping
	defer func() { copies.release(ctx, rep.Saved, o) }()
	var ref store.Ref
	saveHeld := func(ctx context.Context, f *os.File, before qmp.RunState, hold *save.Hold) error {
		var meta *checkpoint.Meta
		var err error
		defer o.tellHang(ctx)()
		if ref, meta, err = o.save(ctx, fs, st, f, found, copies, before, hold); err == nil {
			rep.Checkpoint, rep.Save, rep.Durable = ref.String(), &meta.Report, time.Now()
		}
		return err
	}
	o.Guest.Save = func(ctx context.Context, f *os.File, before qmp.RunState) error {
		return saveHeld(ctx, f, before, nil)
	}
	o.Guest.Undo = func(ctx context.Context) error {
		removed, err := st.Remove(ctx, ref)
		if err == nil && removed.Left != nil {
			o.Log.Warn("the NVRAM of what was saved in vain was not freed; gc will", "cause", removed.Left)
		}
		return err
	}
	if o.member != nil {
		o.Save.Commit, o.Guest.Together, o.Guest.Undo = o.member.commit, o.member.together(saveHeld), o.member.takeBack
	}
	if o.Snapshot {
		o.Guest.Stopped = func(ctx context.Context) error {
			err := o.snapshot(ctx, t, x, found, &rep)
			if err == nil && o.Freeze {
				opened.Close()
				opened, err = o.openFrozen(ctx, st, found)
			}
			return err
		}
	}
	if o.Keep != KeepNone {
		o.Save.Keeps = true
		o.Guest.Stopped = func(ctx context.Context) error {
			limited, cancel := context.WithTimeoutCause(ctx, freezeTime, errKeepTime)
			defer cancel()
			var err error
			if copies, err = o.keep(limited, st, x, found, &rep); err == nil && o.Freeze {
				opened.Close()
				opened, err = o.openKept(ctx, limited, st, found, copies)
			}
			return err
		}
	}
	left = true // should it panic
	rep.CheckpointReport, err = migration.Checkpoint(ctx, x, o.Guest)
	left = rep.Left
	return rep, err
}

// hangTime is how long a save whose context has ended may go on before that is told.
const hangTime = 10 * time.Second

// tellHang warns of a save that does not end with ctx: no context ends a write, or a sync, of
// a disk that does not answer, and the guest stands still meanwhile. What it returns is called
// when the save has ended.
func (o *CheckpointOptions) tellHang(ctx context.Context) (ended func()) {
	over := make(chan struct{})
	unasked := context.AfterFunc(ctx, func() {
		select {
		case <-over:
		case <-time.After(hangTime):
			if o.PutRight != nil && o.Guest.Mode != migration.ModeBackground {
				o.Log.Warn("the store does not answer, and so the guest may stand still; if this process is killed, as by a second signal, the guest is let run")
			} else {
				o.Log.Warn("the store does not answer")
			}
		}
	})
	return func() {
		unasked()
		close(over)
	}
}

// guarding is a Guard that is being started.
type guarding struct {
	started chan struct{} // closed when the rest is known; nil: there is none
	process *Guard
	err     error
}

// guard begins to start one, if there is to be one: that takes about as long as asking for
// the disks does. Its end must be called.
func (o *CheckpointOptions) guard(t Target) *guarding {
	g := new(guarding)
	if o.PutRight == nil || o.Guest.Mode == migration.ModeBackground {
		return g
	}
	g.started = make(chan struct{})
	go func() {
		defer close(g.started)
		g.err = rescue.Call(func() (err error) {
			g.process, err = o.PutRight(t)
			return err
		})
	}()
	return g
}

// wait returns when it has been started.
func (g *guarding) wait() error {
	if g.started == nil {
		return nil
	}
	<-g.started
	return g.err
}

// end ends it, or has it do its work for a QEMU that was left.
func (g *guarding) end(left bool) {
	switch {
	case g.started == nil || g.wait() != nil:
	case left:
		g.process.Leave()
	default:
		g.process.Release()
	}
}

// tellSnapshots adds to the failure of a checkpoint that the VM's disks are others now.
func (rep *CheckpointReport) tellSnapshots(err error) error {
	if err == nil || rep.Saved || len(rep.Snapshots) == 0 {
		return err
	}
	return fmt.Errorf("%w (the disks' snapshots had been taken: the VM writes to %s now)", err, overlayNames(rep.LastSnapshots()))
}

// watch adds the pages that the guest writes to the working set.
func (o *CheckpointOptions) watch(ctx context.Context, x qmp.Executor, redial migration.Redialer) (*rounds.Report, error) {
	ro, err := o.Watch.rounds(ctx)
	if err != nil {
		return nil, err
	}
	ro.Redial = redial
	set, rep, err := rounds.Run(ctx, x, ro)
	switch {
	case errors.Is(err, migration.ErrNotRunning):
		o.Log.Warn("the guest is not running, so its working set is not known")
		return nil, nil
	case errors.Is(err, track.ErrTooSmall):
		o.Log.Warn("the working set is not known", "error", err)
		return nil, nil
	case err != nil:
		return nil, err
	}
	if o.Watched != nil {
		o.Watched(rep)
	}
	if o.Save.WorkingSet == nil {
		o.Save.WorkingSet = set
	} else {
		err = o.Save.WorkingSet.Merge(set)
	}
	return &rep, err
}

// save is the consumer of the migration's stream. hold may be nil.
func (o *CheckpointOptions) save(ctx context.Context, fs vfs.FS, st *store.Store, f *os.File, found []disks.Disk, copies *keeping, before qmp.RunState, hold *save.Hold) (store.Ref, *checkpoint.Meta, error) {
	if o.Guest.Mode == migration.ModeBackground && before.Running {
		release, err := o.Guard(f)
		if err != nil {
			return store.Ref{}, nil, err
		}
		defer release()
	}
	in, err := pipe.New(ctx, int(f.Fd()))
	if err != nil {
		return store.Ref{}, nil, err
	}
	defer in.Close()
	// A plain file knows no deadlines, and a QEMU that reads no answer would be waited
	// for.
	out, err := pipe.NewWriter(f)
	if err != nil {
		return store.Ref{}, nil, err
	}
	defer out.Close()
	so := o.Save
	so.ReturnPath, so.Hold = out, hold
	// In background mode the guest goes on writing.
	if len(found) > 0 && !(o.Guest.Mode == migration.ModeBackground && before.Running) {
		so.VMDisks = func() []checkpoint.VMDisk { return disks.Record(found, o.Snapshot, copies.names()) }
	}
	if before.Running {
		so.RunState = before.Status
	}
	return save.Run(ctx, fs, st, in, so)
}
