package session

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/disks"
	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/stream/pipe"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/dedup"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
	"github.com/flic-migrate/flic-migrate/tier/workingset"
)

// A checkpoint can leave the next one armed: a process of its own has the stream of a
// migration that has begun, and holds it (package save, Hold). It has the monitor, which
// takes one client, for moments before that, if it can be had (later.go). Commands talk to it over a Unix socket in a directory that
// only its user can enter: lines of JSON, a message each.
//
//	command                         armed process
//	     ◄─ {"hello":{…}}           when the stream has begun
//	{"ask":"ready"} ─►              the rest of the first pass at full speed
//	     ◄─ {"held":true}
//	{"ask":"stop"} ─►               the guest is stopped now, and is this command's to let run
//	{"ask":"go","run_state":…} ─►   the checkpoint is made
//	     ◄─ {"report":{…}}          its last word, also after a failure
//	{"ask":"done"} ─►               QEMU is as it should be: the process may end
//
// A command that asks for beats is sent one a second as long as the process lives and runs: the
// guest is not to stand still for one that does not.
//
// {"ask":"disarm"} ends it: it cancels the migration, puts settings back, and reports.
// {"ask":"leave"} says that the command has the monitor, and does that itself. So it is
// from ready on; {"ask":"abort"} then ends it. A command that is gone before it is done leaves QEMU
// to the process: from stop on the checkpoint is then given up, and the guest let run, and before
// that the process goes on to hold what it has ready.
//
// With go the process is told what it can't ask for itself: the VM's disks, to record what
// their files are, and how libvirt describes the domain now.
type armedAsk struct {
	Ask      string       `json:"ask"`
	Beats    bool         `json:"beats,omitempty"` // from now on
	RunState string       `json:"run_state,omitempty"`
	Disks    []disks.Disk `json:"disks,omitempty"`
	Frozen   bool         `json:"frozen,omitempty"` // as of disks.Record
	// KeptDisks likewise; the process holds these copies too.
	KeptDisks map[string]uuid.UUID `json:"kept_disks,omitempty"`
	Libvirt   *checkpoint.Libvirt  `json:"libvirt,omitempty"`
}

type armedSay struct {
	Hello  *armedHello  `json:"hello,omitempty"`
	Held   bool         `json:"held,omitempty"`
	Beat   bool         `json:"beat,omitempty"`
	Report *armedReport `json:"report,omitempty"`
}

// armedHello is what the process has ready.
type armedHello struct {
	PID        int            `json:"pid"`
	Checkpoint string         `json:"checkpoint"` // to be, NAME@N
	Target     string         `json:"target"`
	Encoding   armedEncoding  `json:"encoding"`
	WorkingSet []byte         `json:"working_set,omitempty"`
	Kept       migration.Kept `json:"kept"`
	Beats      bool           `json:"beats,omitempty"` // it sends them
	// Changed says which disk image that pages were found on is not what it was, and in
	// what: what is ready can't be stored any more.
	Changed string `json:"changed,omitempty"`
}

// armedState is what the process's note says of QEMU: with it a command can put that
// right when the process is dead.
type armedState struct {
	Target Target         `json:"target"`
	Kept   migration.Kept `json:"kept"`
}

// armedReport is how it went.
type armedReport struct {
	Checkpoint string             `json:"checkpoint,omitempty"`
	Save       *checkpoint.Report `json:"save,omitempty"`
	Error      string             `json:"error,omitempty"`
	ExitCode   int                `json:"exit_code"`
	// GivenUp: it had the stream until it was asked to end, so that until then QEMU's migration
	// was this one.
	GivenUp bool `json:"given_up,omitempty"`
}

// armedEncoding is how the checkpoint will be stored, which is decided when it is
// armed: a command that wants another one can't use it.
type armedEncoding struct {
	NVRAM         string       `json:"nvram"`
	NVRAMSize     int64        `json:"nvram_size"`
	VolatileNVRAM bool         `json:"volatile_nvram"`
	SampleSize    int          `json:"sample_size"`
	Energy        dedup.Energy `json:"energy"`
	Battery       int          `json:"battery"`
	Codec         image.Codec  `json:"codec"`
	SegmentPages  int          `json:"segment_pages"`
	Workers       int          `json:"workers"`
	Parent        string       `json:"parent"` // save.Options.Parent
	TrustDomain   string       `json:"trust_domain,omitempty"`
	Share         string       `json:"share,omitempty"`
	Disks         string       `json:"disks"` // CheckpointOptions.Disks, as a search path
	NoDisks       bool         `json:"no_disks"`
	Keeps         bool         `json:"keeps,omitempty"` // copies of the disks are kept with it
}

func (o *CheckpointOptions) encoding() (e armedEncoding, err error) {
	s := &o.Save
	e = armedEncoding{s.NVRAM, s.NVRAMSize, s.VolatileNVRAM, s.SampleSize, s.Energy, s.Battery, s.Codec, s.SegmentPages, s.Workers, s.Parent, s.TrustDomain, s.Share, "", o.NoDisks, o.Keep != KeepNone}
	if e.Parent == "" {
		e.Parent = save.ParentAuto
	}
	if e.NVRAM != "" {
		if e.NVRAM, err = filepath.Abs(e.NVRAM); err != nil {
			return e, err
		}
	}
	var files []string
	for _, f := range o.Disks {
		path, err := filepath.Abs(f.Path)
		if err != nil {
			return e, err
		}
		files = append(files, path)
	}
	e.Disks = strings.Join(files, string(filepath.ListSeparator))
	return e, nil
}

func (e armedEncoding) options() save.Options {
	return save.Options{NVRAM: e.NVRAM, NVRAMSize: e.NVRAMSize, VolatileNVRAM: e.VolatileNVRAM, SampleSize: e.SampleSize,
		Energy: e.Energy, Battery: e.Battery, Codec: e.Codec, SegmentPages: e.SegmentPages, Workers: e.Workers, Parent: e.Parent, TrustDomain: e.TrustDomain, Share: e.Share, Keeps: e.Keeps}
}

// armedConfig is all that the process is told by who starts it.
type armedConfig struct {
	Store      string              `json:"store"`
	VM         string              `json:"vm"`
	Parent     string              `json:"parent"` // NAME@N, the checkpoint that was made just now
	Target     Target              `json:"target"`
	Encoding   armedEncoding       `json:"encoding"`
	WorkingSet []byte              `json:"working_set,omitempty"`
	Libvirt    *checkpoint.Libvirt `json:"libvirt,omitempty"`
	Kept       migration.Kept      `json:"kept"`
	Buffer     int                 `json:"buffer"`     // save.Hold's
	Widens     bool                `json:"widens"`     // there are migration.ArmedStream.Theirs and Lives
	Absent     uint64              `json:"absent"`     // save.Hold's
	Rate       int64               `json:"rate"`       // save.Hold's
	LaterTime  time.Duration       `json:"later_time"` // how long the process has the monitor, later.go
	Control    string              `json:"control"`
	Disks      []save.DiskFile     `json:"disks,omitempty"` // that pages are looked for in
}

const (
	// maxAsk caps what a command may say, in bytes: a domain's XML, and the names of a
	// VM's disks.
	maxAsk = 4 << 20
	// maxArmedSet caps a working set, which has some bits a page, in bytes.
	maxArmedSet = 32 << 20
	// maxArmed caps what an armed process is told and says, in bytes: a working set, in
	// base 64, and a domain's XML.
	maxArmed = 2 * maxArmedSet
	// settleTime is how long a command that has QEMU may take to put it right when the save has
	// ended.
	settleTime = 2 * time.Minute
	// putBackTime is how long the process tries to put QEMU right itself while the guest
	// runs; its monitor may be somebody's.
	putBackTime = 30 * time.Second
	// beatTime is the time between two beats, and beatless how long a command waits for one.
	beatTime, beatless = time.Second, 20 * time.Second
)

var (
	errDisarmed = errors.New("it was disarmed")
	errAborted  = errors.New("the checkpoint was given up")
	errOrphaned = errors.New("the command that made the checkpoint has ended")
	// errStreamEnded: the migration was cancelled, or QEMU has ended.
	errStreamEnded = errors.New("the migration has ended: QEMU has, or somebody has cancelled it")
)

// ArmedProcess is what the armed process needs beside its files.
type ArmedProcess struct {
	FS       vfs.FS
	Open     func(ctx context.Context, dir string) (*store.Store, error)
	ExitCode func(error) int // of the command, for a failure
	Log      *slog.Logger
}

// ArmedFiles is how many files Run takes: the stream, the control socket, the configuration,
// and migration.ArmedStream's Theirs and Lives, or any others in their place.
const ArmedFiles = 5

// Run is the armed process, from beginning to end. When ctx ends, so does it: the guest
// is disarmed first.
func (p ArmedProcess) Run(ctx context.Context, files []*os.File) error {
	stream := files[0]
	defer stream.Close()
	theirs, lives := files[3], files[4]
	defer theirs.Close()
	defer lives.Close()
	listener, err := net.FileListener(files[1])
	files[1].Close()
	if err != nil {
		return err
	}
	defer listener.Close()
	var c armedConfig
	b, err := io.ReadAll(io.LimitReader(files[2], maxArmed))
	files[2].Close()
	if err == nil {
		err = json.Unmarshal(b, &c)
	}
	if err != nil {
		return err
	}
	s := &armedServer{
		p: p, c: c, goOn: make(chan armedAsk, 1), hurry: make(chan struct{}),
		begun: make(chan struct{}), held: make(chan struct{}), saved: make(chan struct{}), ended: make(chan struct{}),
	}
	defer os.RemoveAll(filepath.Dir(c.Control))
	if c.Widens {
		s.theirs = theirs
		unwatch, err := watchEnd(lives, func() { theirs.Close() })
		if err != nil {
			return err
		}
		defer unwatch()
	}
	return s.run(ctx, stream, listener.(*net.UnixListener))
}

// armedServer is an armed process at work.
type armedServer struct {
	p ArmedProcess
	c armedConfig

	stop   context.CancelCauseFunc // ends the save
	hurry  chan struct{}           // closed: Hold.Hurry, and the monitor is somebody else's
	owner  armedOwner              // of QEMU
	once   sync.Once               // of hurry
	goOn   chan armedAsk           // go, once
	begun  chan struct{}           // closed: the note is there
	held   chan struct{}           // closed: nothing is read any more
	saved  chan struct{}           // closed: report is there
	ended  chan struct{}           // closed: all is cleaned up
	report armedReport

	// theirs is QEMU's end of the stream, which is closed when QEMU is gone; nil: it is not here.
	theirs *os.File

	note store.Armed
	// opened are the disks that pages are looked for in; they are there when begun is
	// closed.
	opened *save.OpenedDisks
	went   armedAsk    // what goOn has brought; the save's
	copies []io.Closer // of disks, that nobody removes; the save's

	talking sync.WaitGroup
}

func (s *armedServer) run(ctx context.Context, stream *os.File, l *net.UnixListener) error {
	saving, stop := context.WithCancelCause(context.WithoutCancel(ctx))
	defer stop(nil)
	s.stop = stop
	asked := context.AfterFunc(ctx, func() {
		s.disarm()
		stop(context.Cause(ctx))
	})
	defer asked()
	go s.listen(l)
	ref, meta, err := s.save(saving, stream)
	if err != nil {
		cause := context.Cause(saving)
		s.report = armedReport{Error: err.Error(), ExitCode: s.p.ExitCode(err), GivenUp: cause != nil && !errors.Is(cause, errStreamEnded)}
	} else {
		s.report = armedReport{Checkpoint: ref.String(), Save: &meta.Report}
	}
	// QEMU sees the end of a stream that is not wanted any more.
	stream.Close()
	close(s.saved)
	for again := true; again; again = s.owner.lent() {
		if s.owner.wait(settleTime) {
			s.p.Log.Warn(errOrphaned.Error() + "; the guest is let run")
			s.putBack(putRightLimit, false)
		} else if s.hasBegun() {
			s.putBack(putBackTime, true)
		}
	}
	s.forget()
	l.Close()
	close(s.ended)
	s.talking.Wait()
	if s.opened != nil {
		// Who talks is told whether they have changed.
		s.opened.Close()
	}
	return err
}

// save is the checkpoint.
func (s *armedServer) save(ctx context.Context, f *os.File) (ref store.Ref, meta *checkpoint.Meta, err error) {
	st, err := s.p.Open(ctx, s.c.Store)
	if err != nil {
		return ref, nil, err
	}
	in, err := pipe.New(ctx, int(f.Fd()))
	if err != nil {
		return ref, nil, err
	}
	defer in.Close()
	out, err := pipe.NewWriter(f)
	if err != nil {
		return ref, nil, err
	}
	defer out.Close()
	catalog, err := st.Disks()
	if err != nil {
		return ref, nil, err
	}
	s.opened = save.OpenDisks(ctx, catalog, s.c.Disks)
	defer func() {
		for _, c := range s.copies {
			c.Close()
		}
	}()
	o := s.c.Encoding.options()
	o.VM, o.Libvirt, o.ReturnPath, o.Log = s.c.VM, s.c.Libvirt, out, s.p.Log
	o.Disks, o.UnusedDisks = s.opened.Disks, s.opened.Unused
	o.VMDisks = func() []checkpoint.VMDisk { return disks.Record(s.went.Disks, s.went.Frozen, s.went.KeptDisks) }
	// Nearly all of its pages are as in the one that was made just now.
	if o.Since, err = store.ParseRef(s.c.Parent); err != nil {
		return ref, nil, err
	}
	if len(s.c.WorkingSet) > 0 {
		if o.WorkingSet, err = workingset.Read(strings.NewReader(string(s.c.WorkingSet))); err != nil {
			return ref, nil, err
		}
	}
	later := &later{s: s, fd: int(f.Fd())}
	defer later.end()
	o.Hold = &save.Hold{
		Rate: s.c.Rate, Buffer: s.c.Buffer, Absent: s.c.Absent, Hurry: s.hurry, Later: later.further,
		Begun: func(r store.Ref, id uuid.UUID) error {
			state, err := json.Marshal(armedState{s.c.Target, s.c.Kept})
			if err != nil {
				return err
			}
			s.note = store.Armed{VM: s.c.VM, Part: id, Number: r.N, Parent: s.c.Parent, PID: os.Getpid(),
				Control: s.c.Control, Target: s.c.Target.String(), Created: time.Now(), State: state}
			if err := st.NoteArmed(ctx, s.note); err != nil {
				return fmt.Errorf("note of the armed checkpoint: %w", err)
			}
			close(s.begun)
			return nil
		},
		Wait: func(ctx context.Context) (string, error) { return s.wait(ctx, st, f) },
	}
	return save.Run(ctx, s.p.FS, st, in, o)
}

// wait is Hold.Wait.
func (s *armedServer) wait(ctx context.Context, st *store.Store, f *os.File) (string, error) {
	close(s.held)
	debug.FreeOSMemory() // it may be for hours
	unwatch, err := watchEnd(f, func() { s.stop(errStreamEnded) })
	if err != nil {
		return "", err
	}
	defer unwatch()
	select {
	case s.went = <-s.goOn:
		s.widen()
		if s.went.Libvirt != nil && s.c.Libvirt != nil {
			// The save has the address, and writes what is there at its end.
			*s.c.Libvirt = *s.went.Libvirt
		}
		for _, id := range s.went.KeptDisks {
			// The command holds it too, but may be killed.
			c, err := st.HoldFrozen(ctx, id)
			if err != nil {
				return "", fmt.Errorf("copy of a disk: %w", err)
			}
			s.copies = append(s.copies, c)
		}
		return s.went.RunState, nil
	case <-ctx.Done():
		return "", context.Cause(ctx)
	}
}

// widen lets the stream come as fast as it can, and end with QEMU.
func (s *armedServer) widen() {
	if s.theirs == nil {
		return
	}
	if err := errors.Join(migration.Widen(s.theirs), s.theirs.Close()); err != nil {
		s.p.Log.Info("the stream is slower than it could be", "reason", err)
	}
}

// watchEnd calls fn when the other end of a socket or a pipe is closed, though there is still
// something to read. Unwatch ends the watching.
func watchEnd(f *os.File, fn func()) (unwatch func(), err error) {
	var wake [2]int
	if err := unix.Pipe2(wake[:], unix.O_CLOEXEC); err != nil {
		return nil, err
	}
	done := make(chan struct{})
	fd := int32(f.Fd())
	go func() {
		defer close(done)
		fds := []unix.PollFd{{Fd: fd, Events: unix.POLLRDHUP}, {Fd: int32(wake[0]), Events: unix.POLLIN}}
		for {
			_, err := unix.Poll(fds, -1)
			if errors.Is(err, unix.EINTR) {
				continue
			}
			if fds[1].Revents == 0 {
				fn()
			}
			return
		}
	}()
	return func() {
		unix.Close(wake[1])
		<-done
		unix.Close(wake[0])
	}, nil
}

// forget takes the note back, if there is one.
func (s *armedServer) forget() {
	if !s.hasBegun() {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), putBackTime)
	defer cancel()
	st, err := s.p.Open(ctx, s.c.Store)
	if err == nil {
		err = st.ForgetArmed(ctx, s.note)
	}
	if err != nil {
		s.p.Log.Warn("the note of the armed checkpoint stays; gc will remove it", "error", err)
	}
}

// disarm cancels the migration while it is still wanted by QEMU, so that QEMU calls it
// cancelled, and no failure; unless that is a command's to do.
func (s *armedServer) disarm() {
	s.hurried()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := s.putBackOnce(ctx, false); err != nil {
		s.p.Log.Warn("QEMU's migration could not be cancelled, and will fail", "error", err)
	}
}

// putBack makes QEMU what it was, within limit: its monitor may be somebody's.
func (s *armedServer) putBack(limit time.Duration, ended bool) {
	err := s.c.Target.insist(limit, func(ctx context.Context) error { return s.putBackOnce(ctx, ended) })
	if err != nil {
		s.p.Log.Warn("the migration settings are not as they were; the next checkpoint will put them back", "error", err)
	}
}

// hurried has the save be held soon, without the monitor.
func (s *armedServer) hurried() { s.once.Do(func() { close(s.hurry) }) }

func (s *armedServer) putBackOnce(ctx context.Context, ended bool) error {
	return s.owner.putRight(func() error {
		ctx, cancel := context.WithTimeout(ctx, putBackTime/3)
		defer cancel()
		x, err := s.c.Target.dial(ctx, qmp.Options{})
		if err != nil {
			return err
		}
		defer x.Close()
		held := true
		select {
		case <-s.saved:
			held = s.report.GivenUp
		default:
		}
		return migration.Disarm(ctx, x, migration.DisarmOptions{Kept: s.c.Kept, Ended: ended, Held: held})
	})
}

// hasBegun tells whether there is a note, and whoever armed is done.
func (s *armedServer) hasBegun() bool {
	select {
	case <-s.begun:
		return true
	default:
		return false
	}
}

// listen talks with whoever connects, until the socket is closed.
func (s *armedServer) listen(l *net.UnixListener) {
	for {
		conn, err := l.AcceptUnix()
		if err != nil {
			return
		}
		// The directory lets in nobody else; but the kernel shows the path to all.
		if peer, known := qmp.PeerOf(conn); !known || int(peer.Uid) != os.Getuid() && peer.Uid != 0 {
			conn.Close()
			continue
		}
		s.talking.Go(func() { s.talk(conn) })
	}
}

// talk serves one command.
func (s *armedServer) talk(conn net.Conn) {
	defer conn.Close()
	say := func(m armedSay) {
		_ = conn.SetWriteDeadline(time.Now().Add(lastWord))
		_ = json.NewEncoder(conn).Encode(m)
	}
	asks := make(chan armedAsk)
	over := make(chan struct{})
	defer close(over)
	go func() {
		defer close(asks)
		lines := bufio.NewScanner(conn)
		lines.Buffer(nil, maxAsk)
		for lines.Scan() {
			var a armedAsk
			if json.Unmarshal(lines.Bytes(), &a) != nil {
				return
			}
			select {
			case asks <- a:
			case <-over:
				return
			}
		}
	}()
	select {
	case <-s.begun:
	case <-s.saved:
	}
	if !s.hasBegun() {
		// Only whoever arms can be here, who has the monitor, and puts QEMU right.
		say(armedSay{Report: &s.report})
		return
	}
	say(armedSay{Hello: &armedHello{os.Getpid(), store.Ref{VM: s.note.VM, N: s.note.Number}.String(), s.note.Target,
		s.c.Encoding, s.c.WorkingSet, s.c.Kept, true, s.opened.Changed()}})
	// What it waits for. Who has the monitor must not wait until QEMU is put right.
	var held, report <-chan struct{}
	driver, went := false, false // it has stopped the guest, and let the process go on
	beat := time.NewTicker(beatTime)
	defer beat.Stop()
	beats := false
	for {
		select {
		case <-beat.C:
			if beats {
				say(armedSay{Beat: true})
			}
		case a, open := <-asks:
			beats = beats || a.Beats
			switch {
			case !open:
				if s.owner.gone(conn) {
					s.stop(errOrphaned)
					// Before the save ends, which a store that does not answer may put off.
					s.putBack(putRightLimit, false)
				}
				return
			case a.Ask == "leave":
				s.owner.borrow(conn)
				report = s.saved
			case a.Ask == "ready":
				s.owner.borrow(conn)
				s.hurried()
				held, report = s.held, s.saved
			case a.Ask == "stop" || a.Ask == "go":
				if driver = driver || s.owner.drive(conn); !driver && !s.owner.has(conn) {
					return // it puts right what it has begun itself
				}
				held, report = nil, s.saved // the report, if it was too late
				if driver && a.Ask == "go" && !went {
					went = true
					s.goOn <- a
				}
			case a.Ask == "done":
				s.owner.done(conn)
				return
			case a.Ask == "abort":
				s.stop(errAborted)
			case a.Ask == "disarm":
				s.disarm()
				s.stop(errDisarmed)
				held, report = nil, s.ended
			}
		case <-held:
			held = nil
			say(armedSay{Held: true})
		case <-report:
			report = nil
			// If it has QEMU, that is its own to put right, until it is done or gone.
			say(armedSay{Report: &s.report})
		case <-s.ended:
			if report != nil { // both have come
				say(armedSay{Report: &s.report})
			}
			return
		}
	}
}
