package session

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/workingset"
)

// ArmOptions say how the next checkpoint is armed.
type ArmOptions struct {
	// Rate bounds how fast the armed process reads the first pass over memory while
	// the guest runs, in bytes a second; 0: it does not.
	Rate int64
	// Start starts a process that gives these files to ArmedProcess.Run. It must
	// outlive this one.
	Start func(files []*os.File) (*os.Process, error)
}

// ArmedError is the failure of an armed process.
type ArmedError struct {
	Text     string
	ExitCode int
}

func (e *ArmedError) Error() string { return e.Text }

var (
	// errArmedDied: an armed process has ended without its last word.
	errArmedDied = errors.New("the process that had the checkpoint ready has died")
	// errArmedSilent: it has not begun.
	errArmedSilent = errors.New("the process that is to have the next checkpoint ready has not begun in time")
	// errArmedHangs: it has been stopped, or hangs.
	errArmedHangs = fmt.Errorf("the process that had the checkpoint ready has not run for %v", beatless)
)

// armedFor is an armed process as a command knows it.
type armedFor struct {
	note  store.Armed
	state armedState
	conn  net.Conn // nil: it is dead
	hello armedHello
	said  chan armedSay // closed at its end
	beats chan struct{} // something has come
	// reported: it has said its last word, and gaveUp is that one's GivenUp.
	reported, gaveUp bool
}

// findArmed returns the armed process of a VM, also if it has died; nil if there is
// none, or if it is another target's. A target that is not given is any.
func findArmed(ctx context.Context, st *store.Store, vm string, t Target) (*armedFor, error) {
	note, lives, err := st.ArmedFor(ctx, vm)
	if err != nil || note == nil || t.Given() && note.Target != t.String() {
		return nil, err
	}
	// It is there to say hello at once: who does not hangs.
	p := &armedFor{note: *note, hello: armedHello{PID: note.PID, Beats: true}}
	if err := json.Unmarshal(note.State, &p.state); err != nil {
		return nil, fmt.Errorf("note of the armed process %d: %w", note.PID, err)
	}
	// One whose image has ended may still wait for the monitor, to put QEMU right. It must hear
	// that a command does that, or it would find what the next one that is armed has set.
	conn, err := net.DialTimeout("unix", note.Control, 5*time.Second)
	if err == nil {
		peer, known := qmp.PeerOf(conn.(*net.UnixConn))
		if known && admits(peer.Uid, os.Getuid(), ownerOf(st)) {
			p.conn = conn
			return p, p.greet(ctx)
		}
		conn.Close()
		err = errOthersSocket
	}
	if !lives || errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, fs.ErrNotExist) {
		return p, nil
	}
	return nil, fmt.Errorf("the armed process %d: %w", note.PID, err)
}

// errOthersSocket: the kernel shows the path of a process's socket to all. When the process has
// died, and its directory is gone, anybody can make a socket there.
var errOthersSocket = errors.New("another user's process listens at its socket")

// ownerOf is the user who owns a store, and so writes the notes in it; -1: that is not known.
func ownerOf(st *store.Store) int {
	var s unix.Stat_t
	if unix.Stat(st.Dir(), &s) != nil {
		return -1
	}
	return int(s.Uid)
}

// greet waits for the process's hello. That it has died, or has failed, is told by conn
// being nil.
func (p *armedFor) greet(ctx context.Context) error {
	p.said, p.beats = make(chan armedSay, 8), make(chan struct{}, 1)
	go listenArmed(p.conn, p.said, p.beats)
	m, err := p.hear(ctx)
	switch {
	case err == nil && m.Hello != nil:
		p.hello = *m.Hello
	case err == nil && m.Report != nil:
		p.close()
		return &ArmedError{m.Report.Error, m.Report.ExitCode}
	case errors.Is(err, errArmedDied):
		p.close()
		return nil
	case err == nil:
		err = errors.New("the armed process says what is no hello")
	}
	if err != nil {
		p.close()
	}
	return err
}

// listenArmed hears a process until its end, or until it says more than anybody waits
// for.
func listenArmed(conn net.Conn, said chan<- armedSay, beats chan<- struct{}) {
	defer close(said)
	lines := bufio.NewScanner(conn)
	lines.Buffer(nil, maxArmed)
	for lines.Scan() {
		var m armedSay
		if json.Unmarshal(lines.Bytes(), &m) != nil {
			return
		}
		select {
		case beats <- struct{}{}:
		default:
		}
		if m.Beat {
			continue
		}
		select {
		case said <- m:
		default:
			return
		}
	}
}

// hear returns the next message that is no beat. A process that sends none, though it can, is
// killed: QEMU may wait for its end of the stream before it lets the guest run.
func (p *armedFor) hear(ctx context.Context) (armedSay, error) {
	// Silence is counted in the time that this process has run itself: if it was stopped, as by
	// Ctrl-Z, a tick may be first, and what has come meanwhile is heard before the next.
	tick := time.NewTicker(beatTime)
	defer tick.Stop()
	for silent := time.Duration(0); ; {
		select {
		case m, ok := <-p.said:
			if !ok {
				return m, errArmedDied
			}
			if m.Report != nil {
				p.reported, p.gaveUp = true, m.Report.GivenUp
			}
			return m, nil
		case <-p.beats:
			silent = 0
		case <-tick.C:
			if silent += beatTime; silent >= beatless && p.hello.Beats {
				return armedSay{}, p.kill()
			}
		case <-ctx.Done():
			return armedSay{}, context.Cause(ctx)
		}
	}
}

// ArmedName begins the command line of an armed process.
const ArmedName = "flic-migrate-armed"

// kill kills a process that hangs, and returns what it is then: an errArmedDied. It has its end of
// the connection, so its number is no other's; unless it is in another container, which its name
// tells.
func (p *armedFor) kill() error {
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", p.hello.PID))
	if err == nil && !bytes.HasPrefix(line, []byte(ArmedName)) {
		err = errors.New("it runs elsewhere")
	}
	if err == nil {
		err = unix.Kill(p.hello.PID, unix.SIGKILL)
	}
	if err != nil {
		return fmt.Errorf("%w, and can't be killed: %w", errArmedHangs, err)
	}
	return fmt.Errorf("%w: %w, and was killed", errArmedDied, errArmedHangs)
}

func (p *armedFor) ask(a armedAsk) error {
	a.Beats = true
	_ = p.conn.SetWriteDeadline(time.Now().Add(5 * time.Second))
	if err := json.NewEncoder(p.conn).Encode(a); err != nil {
		return fmt.Errorf("%w: %w", errArmedDied, err)
	}
	return nil
}

func (p *armedFor) close() {
	if p.conn != nil {
		p.conn.Close()
		p.conn = nil
	}
}

// report waits for the process's last word.
func (p *armedFor) report(ctx context.Context) (*armedReport, error) {
	for {
		m, err := p.hear(ctx)
		if err != nil {
			return nil, err
		}
		if r := m.Report; r != nil {
			if r.Error != "" {
				return nil, &ArmedError{r.Error, r.ExitCode}
			}
			return r, nil
		}
	}
}

// buried is called with a process that has died, or is not wanted any more, whose QEMU, at x, this
// process has: it ends it, puts QEMU right and takes the note back; x is nil if that QEMU has
// ended. After an error all that says what QEMU was is still there: the process, if it lives, puts
// it right when it sees that this one is gone, and else who reads the note does.
func (p *armedFor) buried(ctx context.Context, st *store.Store, x qmp.Executor) (err error) {
	if p.conn != nil {
		if err := p.abort(ctx); err != nil {
			return err
		}
	}
	if x != nil {
		if err := migration.Disarm(ctx, x, migration.DisarmOptions{Kept: p.state.Kept, Ended: true, Held: p.gaveUp}); err != nil {
			return err
		}
	}
	if p.conn != nil {
		_ = p.ask(armedAsk{Ask: "done"})
	}
	if dir := filepath.Dir(p.note.Control); strings.HasPrefix(filepath.Base(dir), armedDir) {
		os.RemoveAll(dir)
	}
	return st.ForgetArmed(ctx, p.note)
}

// abort has the process end, unless it has reported already, and waits for that.
func (p *armedFor) abort(ctx context.Context) error {
	if p.reported {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, disarmTime)
	defer cancel()
	err := p.ask(armedAsk{Ask: "abort"})
	if err == nil {
		err = p.ends(ctx)
	}
	if errors.Is(err, errArmedDied) {
		return nil
	}
	return err
}

// disarmTime is how long an armed process may take to end.
const disarmTime = time.Minute

// disarm ends the process and waits until all is as it was. Nobody may hold the monitor.
func (p *armedFor) disarm(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, disarmTime)
	defer cancel()
	if err := p.ask(armedAsk{Ask: "disarm"}); err != nil {
		return err
	}
	return p.ends(ctx)
}

// ends waits for the end of a process that makes no checkpoint any more.
func (p *armedFor) ends(ctx context.Context) error {
	_, err := p.report(ctx)
	var ended *ArmedError
	if errors.As(err, &ended) || errors.Is(err, errArmedDied) {
		return nil
	}
	return err
}

// errOtherwise: what is armed is not what is asked for.
var errOtherwise = errors.New("it was armed for another checkpoint than this one")

// suits tells whether what the process has ready is what o asks for.
func (p *armedFor) suits(o *CheckpointOptions) error {
	want, err := o.encoding()
	switch {
	case err != nil:
		return err
	case o.member != nil:
		return fmt.Errorf("%w: of no group", errOtherwise)
	case o.Guest.Mode != migration.ModeStop:
		return fmt.Errorf("%w: with the guest stopped", errOtherwise)
	case want != p.hello.Encoding:
		return fmt.Errorf("%w: stored in another way", errOtherwise)
	case o.Freeze:
		return fmt.Errorf("%w: without pages on disks that are frozen only then", errOtherwise)
	case p.hello.Changed != "":
		return fmt.Errorf("it can't be made any more: %s", p.hello.Changed)
	case o.Watch != nil && (o.WatchAsked || len(p.hello.WorkingSet) == 0):
		return fmt.Errorf("%w: the guest can't be watched meanwhile", errOtherwise)
	}
	set, err := encodeSet(o.Save.WorkingSet)
	if err == nil && set != nil && !bytes.Equal(set, p.hello.WorkingSet) {
		err = fmt.Errorf("%w: with another working set", errOtherwise)
	}
	return err
}

// encodeSet is a working set for another process; nil for none.
func encodeSet(ws *workingset.Set) ([]byte, error) {
	if ws == nil {
		return nil, nil
	}
	var b bytes.Buffer
	if _, err := ws.WriteTo(&b); err != nil {
		return nil, err
	}
	if b.Len() > maxArmedSet {
		return nil, fmt.Errorf("a working set of %d bytes is too large for a checkpoint that is armed", b.Len())
	}
	return b.Bytes(), nil
}

// checkpoint makes the checkpoint that the process has ready, of the QEMU at x.
func (p *armedFor) checkpoint(ctx context.Context, st *store.Store, t Target, x qmp.Executor, o CheckpointOptions) (rep CheckpointReport, err error) {
	if err := p.ask(armedAsk{Ask: "ready"}); err != nil {
		return rep, err
	}
	found, err := o.find(ctx, x) // meanwhile
	if err != nil {
		return rep, err
	}
	if err := p.isHeld(ctx); err != nil {
		return rep, err
	}
	if err := o.canKeep(ctx, st, x, found); err != nil {
		return rep, err
	}
	var copies *keeping
	defer func() { copies.release(ctx, rep.Saved, &o) }()
	switch {
	case o.Snapshot:
		o.Guest.Stopped = func(ctx context.Context) error { return o.snapshot(ctx, t, x, found, &rep) }
	case o.Keep != KeepNone:
		o.Guest.Stopped = func(ctx context.Context) (err error) {
			limited, cancel := context.WithTimeoutCause(ctx, freezeTime, errKeepTime)
			defer cancel()
			copies, err = o.keep(limited, st, x, found, &rep)
			return err
		}
	}
	o.Guest.Stopping = func() error { return p.ask(armedAsk{Ask: "stop"}) }
	var made *armedReport
	o.Guest.Save = func(ctx context.Context, _ *os.File, before qmp.RunState) error {
		state := ""
		if before.Running {
			state = before.Status
		}
		err := p.ask(armedAsk{Ask: "go", RunState: state, Disks: found, Frozen: o.Snapshot, KeptDisks: copies.names(), Libvirt: o.Save.Libvirt})
		if err == nil {
			made, err = p.report(ctx)
		}
		if err != nil && ctx.Err() != nil && p.ask(armedAsk{Ask: "abort"}) == nil {
			// All may have been saved before that is heard of, which only its report tells: a
			// checkpoint that has failed must not be there later.
			defer o.tellHang(ctx)()
			if made, _ = p.report(context.WithoutCancel(ctx)); made != nil {
				err = nil
			}
		}
		if err == nil {
			rep.Checkpoint, rep.Save, rep.Durable = made.Checkpoint, made.Save, time.Now()
		}
		return err
	}
	o.Guest.Undo = func(ctx context.Context) error {
		ref, err := store.ParseRef(made.Checkpoint)
		if err == nil {
			_, err = st.Remove(ctx, ref)
		}
		return err
	}
	rep.CheckpointReport, err = migration.CheckpointArmed(ctx, x, p.hello.Kept, o.Guest)
	rep.Armed = rep.Saved
	if !rep.Left { // else the process sees that it has QEMU to put right
		_ = p.ask(armedAsk{Ask: "done"})
	}
	return rep, err
}

// isHeld waits until the process, which was asked to be ready, holds the stream.
func (p *armedFor) isHeld(ctx context.Context) error {
	for {
		m, err := p.hear(ctx)
		if err != nil {
			return err
		}
		if r := m.Report; r != nil {
			if r.Error == "" {
				return fmt.Errorf("%w: %s is made", migration.ErrNotArmed, r.Checkpoint)
			}
			return fmt.Errorf("%w: %s", migration.ErrNotArmed, r.Error)
		}
		if m.Held {
			return nil
		}
	}
}

// again tells whether an ordinary checkpoint is to be made after err.
func again(err error) bool {
	return errors.Is(err, errArmedDied) || errors.Is(err, migration.ErrNotArmed)
}

// fromArmed makes the checkpoint by an armed process, if there is one that suits. It
// returns false if there is none, or none any more: then an ordinary checkpoint can be
// made, and the report has the snapshots that were taken.
func (o *CheckpointOptions) fromArmed(ctx context.Context, st *store.Store, t Target, x qmp.Executor) (rep CheckpointReport, done bool, err error) {
	p, err := findArmed(ctx, st, o.Save.VM, t)
	if integrity.IsCorrupt(err) {
		o.Log.Warn("it can't be told whether the guest is armed", "error", err)
		return rep, false, nil
	}
	if err != nil || p == nil {
		return rep, false, err
	}
	defer p.close()
	if p.conn == nil {
		o.Log.Warn("an ordinary checkpoint is made", "reason", errArmedDied)
		return rep, false, p.buried(ctx, st, x)
	}
	if err := p.suits(o); err != nil {
		o.Log.Warn("the guest was armed, but an ordinary checkpoint is made", "reason", err)
		return rep, false, o.supersede(ctx, st, p, x)
	}
	rep, err = p.checkpoint(ctx, st, t, x, *o)
	if rep.Saved && o.Save.WorkingSet == nil && len(p.hello.WorkingSet) > 0 {
		// For the one that may be armed after it.
		set, serr := workingset.Read(bytes.NewReader(p.hello.WorkingSet))
		o.Save.WorkingSet, err = set, errors.Join(err, serr)
	}
	if !again(err) || ctx.Err() != nil {
		return rep, true, err
	}
	o.Log.Warn("the guest was armed, but an ordinary checkpoint is made", "reason", err)
	for _, s := range rep.Snapshots {
		o.Log.Warn("a snapshot that was taken for the armed checkpoint stays", "disk", s.Disk, "frozen", s.Frozen, "now", s.Now)
	}
	berr := p.buried(ctx, st, x)
	if berr != nil && rep.Left && errors.Is(err, errArmedDied) {
		// Nobody else is there who would let the guest run.
		o.guard(t).end(true)
	}
	return CheckpointReport{Snapshots: rep.Snapshots}, false, berr
}

// supersede ends a process whose monitor this process has, and puts QEMU right itself.
func (o *CheckpointOptions) supersede(ctx context.Context, st *store.Store, p *armedFor, x qmp.Executor) error {
	if err := p.ask(armedAsk{Ask: "leave"}); err != nil {
		return err
	}
	limited, cancel := context.WithTimeout(ctx, disarmTime)
	defer cancel()
	// Cancelled by who has the monitor, QEMU does not call it a failure.
	if err := migration.Disarm(limited, x, migration.DisarmOptions{Kept: p.hello.Kept}); err != nil {
		return err
	}
	return p.buried(ctx, st, x)
}

// armedDir begins the name of an armed process's directory in the temporary one.
const armedDir = "flic-armed-"

// arm leaves the next checkpoint armed, and returns the process.
func (o *CheckpointOptions) arm(ctx context.Context, st *store.Store, t Target, x qmp.Executor, redial migration.Redialer, parent string) (pid int, err error) {
	dir, err := os.MkdirTemp("", armedDir) // mode 0700
	if err != nil {
		return 0, err
	}
	defer func() {
		if err != nil {
			os.RemoveAll(dir)
		}
	}()
	control := filepath.Join(dir, "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: control, Net: "unix"})
	if err != nil {
		return 0, err
	}
	l.SetUnlinkOnClose(false)
	defer l.Close()
	c := armedConfig{VM: o.Save.VM, Parent: parent, Libvirt: o.Save.Libvirt, Rate: o.Arm.Rate, LaterTime: laterTime, Control: control}
	if c.Store, err = filepath.Abs(st.Dir()); err != nil {
		return 0, err
	}
	if c.Target, err = t.absolute(); err != nil {
		return 0, err
	}
	if c.Encoding, err = o.encoding(); err != nil {
		return 0, err
	}
	found, err := o.find(ctx, x)
	if err != nil {
		return 0, err
	}
	c.Disks = o.images(found)
	if c.WorkingSet, err = encodeSet(o.Save.WorkingSet); err != nil {
		return 0, err
	}
	if c.Absent, err = migration.Unplugged(ctx, x); err != nil {
		return 0, err
	}
	take := func(ctx context.Context, h migration.ArmedStream) error {
		c.Buffer, c.Kept, c.Widens = h.Buffer, h.Kept, h.Theirs != nil
		p, err := o.startArmed(ctx, h, l, c)
		if err == nil {
			pid = p
		}
		return err
	}
	err = migration.Arm(ctx, x, migration.ArmOptions{Take: take, Redial: redial})
	return pid, err
}

// helloTime is how long a process may take to open its store and to begin. It is a variable for
// tests.
var helloTime = 2 * time.Minute

// startArmed starts the process and waits until it has the stream.
func (o *CheckpointOptions) startArmed(ctx context.Context, h migration.ArmedStream, l *net.UnixListener, c armedConfig) (pid int, err error) {
	b, err := json.Marshal(c)
	if err != nil {
		return 0, err
	}
	fd, err := unix.MemfdCreate("flic-armed", unix.MFD_CLOEXEC)
	if err != nil {
		return 0, err
	}
	config := os.NewFile(uintptr(fd), "configuration")
	defer config.Close()
	if _, err := config.WriteAt(b, 0); err != nil {
		return 0, err
	}
	listener, err := l.File()
	if err != nil {
		return 0, err
	}
	defer listener.Close()
	ctx, cancel := context.WithTimeoutCause(ctx, helloTime, errArmedSilent)
	defer cancel()
	files := []*os.File{h.Stream, listener, config, h.Theirs, h.Lives}
	if !c.Widens {
		nothing, err := os.Open(os.DevNull)
		if err != nil {
			return 0, err
		}
		defer nothing.Close()
		files[3], files[4] = nothing, nothing
	}
	process, err := o.Arm.Start(files)
	if err != nil {
		return 0, err
	}
	defer func() {
		if err != nil {
			_ = process.Kill()
		}
	}()
	p := new(armedFor)
	if p.conn, err = net.DialTimeout("unix", c.Control, 5*time.Second); err != nil {
		return 0, err
	}
	defer p.close()
	if err := p.greet(ctx); err != nil {
		return 0, err
	}
	if p.conn == nil {
		return 0, errArmedDied
	}
	return process.Pid, nil
}

// DisarmOptions of Disarm.
type DisarmOptions struct {
	VM  string // whose note is looked for; "": the target's
	Log *slog.Logger
}

// ErrNotArmed: there is nothing to disarm.
var ErrNotArmed = errors.New("it is not armed")

// Disarm ends the armed checkpoint of a VM, or of a target: all is as before it was
// armed, and the guest runs on. Without a store, nil, it can only be a target. A process
// that has died has left settings behind, which are put back if the target is given, or
// known from the store.
func Disarm(ctx context.Context, st *store.Store, t Target, o DisarmOptions) error {
	vms := []string{o.VM}
	if st == nil {
		vms = nil
	} else if o.VM == "" {
		var err error
		if vms, err = st.Armed(ctx); err != nil {
			return err
		}
	}
	want, err := t.absolute()
	if err != nil {
		return err
	}
	for _, vm := range vms {
		p, err := findArmed(ctx, st, vm, want)
		if err != nil || p == nil {
			if o.VM != "" && err != nil {
				return err
			}
			continue
		}
		defer p.close()
		if p.conn != nil {
			return p.disarm(ctx)
		}
		o.Log.Warn("the process that had the checkpoint ready has died before", "process", p.note.PID)
		return p.bury(ctx, st)
	}
	if !t.Given() {
		return ErrNotArmed
	}
	// Another store's, or nobody knows whose.
	f := forgotten{t: t, log: o.Log, until: time.Now().Add(leftTime)}
	for {
		again, err := f.disarm(ctx)
		if err != nil || !again {
			return err
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// leftTime is how long an armed process whose migration was cancelled has to put QEMU right.
// It is a variable for tests.
var leftTime = 10 * time.Second

// forgotten is a target that is armed, and of which there is no note. The armed process, if it
// lives, knows what the settings were: it sees the end of its stream, and puts them back once
// the monitor is free. Only if it does not, they become QEMU's defaults.
type forgotten struct {
	t         Target
	log       *slog.Logger
	until     time.Time // from then on it is not waited for
	cancelled bool
}

// disarm does what there is to do now; again: the armed process has to do the rest.
func (f *forgotten) disarm(ctx context.Context) (again bool, err error) {
	waits := f.cancelled && time.Now().Before(f.until)
	x, err := f.t.dial(ctx, qmp.Options{})
	if err != nil {
		if waits && errors.Is(err, qmp.ErrBusy) {
			return true, nil // perhaps that is it
		}
		return false, err
	}
	defer x.Close()
	kept, err := migration.Forgotten(ctx, x)
	switch {
	case err != nil:
		return false, err
	case kept == nil && f.cancelled:
		return false, nil
	case kept == nil:
		return false, ErrNotArmed
	case waits:
		return true, nil
	case !f.cancelled:
		f.cancelled = true
		if again, err = migration.CancelArmed(ctx, x); again || err != nil {
			return again, err
		}
	}
	f.log.Warn("nobody knows any more what the migration settings were; they will be QEMU's defaults")
	return false, migration.Disarm(ctx, x, migration.DisarmOptions{Kept: *kept})
}

// bury puts the QEMU of a dead process right, if it is still there.
func (p *armedFor) bury(ctx context.Context, st *store.Store) error {
	x, err := p.state.Target.dial(ctx, qmp.Options{})
	if p.state.Target.gone(err) {
		return p.buried(ctx, st, nil)
	}
	if err != nil {
		return err
	}
	defer x.Close()
	return p.buried(ctx, st, x)
}
