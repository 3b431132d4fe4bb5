package session

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/flic-migrate/flic-migrate/qmp/disks"
	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/qmp/qmptest"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// armedMark is max-bandwidth while a guest is armed (package migration).
const armedMark = float64(1<<40 + 0xf11c + 2)

// armedMachine is a QEMU that is armed; cancelled is called when its migration is.
type armedMachine struct {
	mu         sync.Mutex
	blocks     []any // its disks
	status     string
	parameters map[string]any
	cancelled  func()
	paused     bool   // the guest
	refuses    int    // that often it does not let the guest run
	silent     bool   // it does not say whether it is armed
	stopping   func() // called, if not nil, before the guest is stopped
}

func (q *armedMachine) serve(c *qmptest.Conn) {
	qmptest.Negotiated(func(c *qmptest.Conn, cmd qmptest.Command) {
		q.mu.Lock()
		defer q.mu.Unlock()
		var answer any = map[string]any{}
		switch cmd.Execute {
		case "query-status":
			answer = map[string]any{"running": !q.paused, "status": map[bool]string{false: "running", true: "paused"}[q.paused]}
		case "stop":
			if q.stopping != nil {
				q.stopping()
			}
			q.paused = true
		case "cont":
			if q.refuses > 0 {
				q.refuses--
				c.Refuse(cmd, "GenericError", "not now")
				return
			}
			q.paused = false
		case "query-migrate":
			if q.silent {
				c.Refuse(cmd, "GenericError", "not now")
				return
			}
			answer = map[string]any{"status": q.status}
		case "query-yank", "query-migrate-capabilities":
			answer = []any{}
		case "query-migrate-parameters":
			answer = q.parameters
		case "migrate-set-parameters":
			_ = json.Unmarshal(cmd.Args, &q.parameters)
		case "query-block":
			answer = append([]any{}, q.blocks...)
		case "migrate_cancel":
			if q.status == "active" {
				q.status = "cancelled"
				q.cancelled()
			}
		}
		b, _ := json.Marshal(answer)
		c.Reply(cmd, string(b))
	})(c)
}

// A QEMU of which this store has no note, though it is armed, is put right by the process that
// armed it. If that is dead, or does nothing, its settings are QEMU's defaults.
func TestDisarmOthers(t *testing.T) {
	defer func(was time.Duration) { leftTime = was }(leftTime)
	users := map[string]any{"max-bandwidth": float64(33 << 20), "downtime-limit": float64(250)}
	defaults := map[string]any{"max-bandwidth": float64(128 << 20), "downtime-limit": float64(300)}
	for what, c := range map[string]struct {
		status string
		lives  bool
		is     map[string]any // before and after
		want   map[string]any
		err    error
	}{
		"lives":     {"active", true, map[string]any{"max-bandwidth": armedMark, "downtime-limit": 1.0}, users, nil},
		"hangs":     {"active", false, map[string]any{"max-bandwidth": armedMark, "downtime-limit": 1.0}, defaults, nil},
		"dead":      {"failed", false, map[string]any{"max-bandwidth": armedMark, "downtime-limit": 1.0}, defaults, nil},
		"not armed": {"active", false, users, users, ErrNotArmed},
	} {
		t.Run(what, func(t *testing.T) {
			leftTime = time.Minute
			if !c.lives {
				leftTime = 300 * time.Millisecond
			}
			var armed sync.WaitGroup
			defer armed.Wait()
			q := &armedMachine{status: c.status, parameters: maps.Clone(c.is), cancelled: func() {}}
			target := Target{QMP: qmptest.New(t, q.serve).Addr}
			if c.lives {
				s := &armedServer{p: ArmedProcess{Log: slog.New(slog.DiscardHandler)}, c: armedConfig{Target: target, Kept: migration.Kept{Parameters: users}}}
				q.cancelled = func() { armed.Go(func() { s.putBack(putBackTime, true) }) }
			}
			begun := time.Now()
			err := Disarm(t.Context(), nil, target, DisarmOptions{Log: slog.New(slog.DiscardHandler)})
			if !errors.Is(err, c.err) {
				t.Errorf("%v, want %v", err, c.err)
			}
			if what == "hangs" && time.Since(begun) < leftTime {
				t.Errorf("it had %v", time.Since(begun))
			}
			q.mu.Lock()
			defer q.mu.Unlock()
			if !maps.Equal(q.parameters, c.want) {
				t.Errorf("the settings are %v, want %v", q.parameters, c.want)
			}
		})
	}
}

// TestDisarmWithoutLibvirt: while libvirt's daemon is away nobody knows whether the domain has
// ended, and what its settings were is not forgotten.
func TestDisarmWithoutLibvirt(t *testing.T) {
	a := newArmedTest(t)
	away := Target{Domain: "web1", Connect: "qemu:///system?socket=" + t.TempDir() + "/away"}
	state, err := json.Marshal(armedState{Target: away})
	ok(t, err)
	ok(t, a.st.NoteArmed(t.Context(), store.Armed{VM: "vm", Part: uuid.New(), Number: 2, Control: t.TempDir() + "/dead", Target: away.String(), State: state}))
	if err := Disarm(t.Context(), a.st, Target{}, DisarmOptions{VM: "vm", Log: slog.New(slog.DiscardHandler)}); err == nil {
		t.Error("it is disarmed")
	}
	if note, _, err := a.st.ArmedFor(t.Context(), "vm"); note == nil || err != nil {
		t.Errorf("the note: %+v, %v", note, err)
	}
}

// A command waits for an armed process for as long as that gives a sign of life, and not much
// longer; for ever for one of an earlier version, which gives none.
func TestArmedHangs(t *testing.T) {
	for name, c := range map[string]struct {
		hello string
		beats int // after that many it hangs
		hangs bool
	}{
		"hangs":   {`{"hello":{"pid":0,"beats":true}}`, 30, true},
		"at once": {`{"hello":{"pid":0,"beats":true}}`, 0, true},
		"earlier": {`{"hello":{"pid":0}}`, 0, false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ours, theirs := net.Pipe()
				over := make(chan struct{})
				defer close(over)
				go func() {
					_, _ = theirs.Write([]byte(c.hello + "\n"))
					for range c.beats {
						time.Sleep(beatTime)
						_, _ = theirs.Write([]byte(`{"beat":true}` + "\n"))
					}
					select {
					case <-time.After(time.Hour):
					case <-over:
					}
					_, _ = theirs.Write([]byte(`{"report":{"checkpoint":"vm@1"}}` + "\n"))
					theirs.Close()
				}()
				p := &armedFor{conn: ours}
				ok(t, p.greet(t.Context()))
				silent, other := net.Pipe()
				found := &armedFor{conn: silent, hello: armedHello{Beats: true}}
				if err := found.greet(t.Context()); !errors.Is(err, errArmedHangs) {
					t.Errorf("one that says no hello: %v", err)
				}
				other.Close()
				start := time.Now()
				r, err := p.report(t.Context())
				took := time.Since(start)
				if c.hangs != errors.Is(err, errArmedHangs) || c.hangs == (r != nil) {
					t.Errorf("%+v, %v", r, err)
				}
				if want := time.Duration(c.beats)*beatTime + beatless; c.hangs && (took < beatless || took > want+time.Second) {
					t.Errorf("after %v, want %v", took, want)
				}
				p.close()
			})
		})
	}
}

// TestArmedLeaves: that a command has the monitor is that command's to take back, and not that
// of another one which has looked and gone.
func TestArmedLeaves(t *testing.T) {
	s := &armedServer{begun: make(chan struct{}), saved: make(chan struct{}), ended: make(chan struct{}), opened: new(save.OpenedDisks)}
	close(s.begun)
	defer close(s.ended)
	left := func() bool {
		s.owner.mu.Lock()
		defer s.owner.mu.Unlock()
		return s.owner.is == ownCommand
	}
	// connect returns a connection that has had its hello, and what is closed when it is over.
	connect := func() (net.Conn, chan struct{}) {
		ours, theirs := net.Pipe()
		over := make(chan struct{})
		go func() {
			defer close(over)
			s.talk(theirs)
		}()
		if _, err := bufio.NewReader(ours).ReadString('\n'); err != nil {
			t.Fatal(err)
		}
		return ours, over
	}
	looks, gone := connect()
	has, done := connect()
	if _, err := has.Write([]byte("{\"ask\":\"leave\"}\n")); err != nil {
		t.Fatal(err)
	}
	for !left() {
		time.Sleep(time.Millisecond)
	}
	looks.Close()
	<-gone
	if !left() {
		t.Error("the monitor was taken from who has it")
	}
	has.Close()
	<-done
	if left() {
		t.Error("nobody puts QEMU right")
	}
}

// TestArmedDone: the process hears that all is done only if QEMU is as it should be; else that its
// command is gone, and it puts QEMU right itself, or goes on to hold what it has ready.
func TestArmedDone(t *testing.T) {
	for name, refuses := range map[string]int{"done": 0, "left": 1000, "not begun": 0} {
		t.Run(name, func(t *testing.T) {
			q := &armedMachine{status: "active", refuses: refuses, silent: name == "not begun", parameters: map[string]any{"max-bandwidth": armedMark, "downtime-limit": 1.0}}
			target := Target{QMP: qmptest.New(t, q.serve).Addr}
			x, err := target.Monitor(t.Context())
			ok(t, err)
			defer x.Close()
			st, err := store.Open(t.Context(), vfs.OS, t.TempDir()+"/store", true)
			ok(t, err)
			ours, theirs := net.Pipe()
			asked, stops := make(chan []string), make(chan struct{})
			q.stopping = func() {
				select {
				case <-stops:
				case <-time.After(10 * time.Second):
					t.Error("the guest is stopped, and the process does not know it")
				}
			}
			go func() {
				var heard []string
				lines := bufio.NewScanner(theirs)
				for lines.Scan() {
					var a armedAsk
					_ = json.Unmarshal(lines.Bytes(), &a)
					heard = append(heard, a.Ask)
					switch a.Ask {
					case "ready":
						_, _ = theirs.Write([]byte(`{"held":true}` + "\n"))
					case "stop":
						close(stops)
					case "go":
						q.mu.Lock()
						q.status = "completed"
						q.mu.Unlock()
						_, _ = theirs.Write([]byte(`{"report":{"checkpoint":"vm@1"}}` + "\n"))
					}
				}
				asked <- heard
			}()
			p := &armedFor{conn: ours, said: make(chan armedSay, 8), beats: make(chan struct{}, 1)}
			go listenArmed(p.conn, p.said, p.beats)
			p.hello.Kept = migration.Kept{Parameters: map[string]any{"max-bandwidth": 1.0}}
			rep, err := p.checkpoint(t.Context(), st, target, x, CheckpointOptions{Log: slog.New(slog.DiscardHandler)})
			p.close()
			heard := <-asked
			if rep.Saved != (name != "not begun") || (err == nil) != (name == "done") || q.paused != (name == "left") || slices.Contains(heard, "done") != (name == "done") {
				t.Errorf("%v, paused %v, the process has heard %v", err, q.paused, heard)
			}
		})
	}
}

// TestArmedOrphaned: a command that has stopped the guest and is gone leaves a guest that is let run
// at once, also if it has not let the process go on, or if the save does not end.
func TestArmedOrphaned(t *testing.T) {
	users := map[string]any{"max-bandwidth": float64(33 << 20), "downtime-limit": 250.0}
	for _, asks := range []string{"ready stop", "ready stop go", "ready go"} {
		t.Run(asks, func(t *testing.T) {
			q := &armedMachine{status: "active", paused: true, cancelled: func() {},
				parameters: map[string]any{"max-bandwidth": armedMark - 1, "downtime-limit": 1.0}}
			stopped := make(chan error, 1)
			s := &armedServer{p: ArmedProcess{Log: slog.New(slog.DiscardHandler)},
				c:    armedConfig{Target: Target{QMP: qmptest.New(t, q.serve).Addr}, Kept: migration.Kept{Parameters: users}},
				stop: func(err error) { stopped <- err }, hurry: make(chan struct{}), goOn: make(chan armedAsk, 1),
				begun: make(chan struct{}), saved: make(chan struct{}), ended: make(chan struct{}), opened: new(save.OpenedDisks)}
			close(s.begun)
			ours, theirs := net.Pipe()
			go s.talk(theirs)
			lines := bufio.NewReader(ours)
			if _, err := lines.ReadString('\n'); err != nil {
				t.Fatal(err)
			}
			for _, a := range strings.Fields(asks) {
				ok(t, json.NewEncoder(ours).Encode(armedAsk{Ask: a}))
			}
			ours.Close()
			until(t, "that the guest runs", func() bool {
				q.mu.Lock()
				defer q.mu.Unlock()
				return !q.paused && q.status == "cancelled" && maps.Equal(q.parameters, users)
			})
			if err := <-stopped; err != errOrphaned {
				t.Error(err)
			}
		})
	}
}

// TestArmedAborted: a command that is asked to end waits for what has become of the checkpoint,
// which may be there only after a while.
func TestArmedAborted(t *testing.T) {
	q := &armedMachine{status: "active", cancelled: func() {}, parameters: map[string]any{"max-bandwidth": armedMark, "downtime-limit": 1.0}}
	target := Target{QMP: qmptest.New(t, q.serve).Addr}
	x, err := target.Monitor(t.Context())
	ok(t, err)
	defer x.Close()
	st, err := store.Open(t.Context(), vfs.OS, t.TempDir()+"/store", true)
	ok(t, err)
	ctx, stop := context.WithCancel(t.Context())
	ours, theirs := net.Pipe()
	go func() {
		for lines := bufio.NewScanner(theirs); lines.Scan(); {
			var a armedAsk
			_ = json.Unmarshal(lines.Bytes(), &a)
			switch a.Ask {
			case "ready":
				_, _ = theirs.Write([]byte(`{"held":true}` + "\n"))
			case "go":
				stop()
			case "abort":
				time.Sleep(6 * time.Second)
				_, _ = theirs.Write([]byte(`{"report":{"checkpoint":"vm@1"}}` + "\n"))
			}
		}
	}()
	p := &armedFor{conn: ours, said: make(chan armedSay, 8), beats: make(chan struct{}, 1)}
	go listenArmed(p.conn, p.said, p.beats)
	p.hello.Kept = migration.Kept{Parameters: map[string]any{"max-bandwidth": 1.0}}
	rep, err := p.checkpoint(ctx, st, target, x, CheckpointOptions{Log: slog.New(slog.DiscardHandler)})
	p.close()
	if err != nil || !rep.Saved || rep.Checkpoint != "vm@1" {
		t.Errorf("%+v, %v: there is a checkpoint", rep, err)
	}
}

// TestArmedUnmarked: somebody has set max-bandwidth, by which QEMU is known to be armed. The process
// is ended all the same, and the settings are what they were, but for that one.
func TestArmedUnmarked(t *testing.T) {
	users := map[string]any{"max-bandwidth": float64(33 << 20), "downtime-limit": 250.0}
	want := map[string]any{"max-bandwidth": float64(50 << 20), "downtime-limit": 250.0}
	for _, how := range []string{"checkpoint", "superseded", "disarm"} {
		t.Run(how, func(t *testing.T) {
			q := &armedMachine{status: "active", cancelled: func() {}, parameters: map[string]any{"max-bandwidth": float64(50 << 20), "downtime-limit": 1.0}}
			target := Target{QMP: qmptest.New(t, q.serve).Addr}
			a := newArmedTest(t)
			q.cancelled = func() { _ = unix.Shutdown(int(a.stream.Fd()), unix.SHUT_RDWR) }
			a.run(t.Context(), armedConfig{Buffer: 16 << 10, Target: target, Kept: migration.Kept{Parameters: users}}, 4<<10)
			defer a.stream.Close()
			written := a.held()
			go func() { // QEMU sees the end of its stream
				<-written
				q.mu.Lock()
				defer q.mu.Unlock()
				if q.status == "active" {
					q.status = "failed"
				}
			}()
			if how == "disarm" {
				ok(t, Disarm(t.Context(), a.st, target, DisarmOptions{Log: slog.New(slog.DiscardHandler)}))
			} else {
				x, err := target.Monitor(t.Context())
				ok(t, err)
				defer x.Close()
				o := CheckpointOptions{Guest: migration.CheckpointOptions{Mode: migration.ModeStop}, Save: save.Options{VM: "vm"}, Log: slog.New(slog.DiscardHandler)}
				if how == "superseded" {
					o.Guest.Mode = migration.ModeLive
				}
				if _, done, err := o.fromArmed(t.Context(), a.st, target, x); done || err != nil {
					t.Errorf("%v, %v", done, err)
				}
			}
			<-a.ended
			q.mu.Lock()
			defer q.mu.Unlock()
			if !maps.Equal(q.parameters, want) || q.status == "active" {
				t.Errorf("the migration is %s, settings %v, want %v", q.status, q.parameters, want)
			}
			if note, _, err := a.st.ArmedFor(t.Context(), "vm"); note != nil || err != nil {
				t.Errorf("there is a note: %+v, %v", note, err)
			}
		})
	}
}

// TestArmedSnapshots: snapshots that were taken for an armed checkpoint whose process then dies
// are known after the ordinary one, too, which fails here.
func TestArmedSnapshots(t *testing.T) {
	disk := filepath.Join(t.TempDir(), "disk")
	ok(t, os.WriteFile(disk, nil, 0o600))
	q := &armedMachine{status: "active", cancelled: func() {}, parameters: map[string]any{"max-bandwidth": armedMark, "downtime-limit": 1.0},
		blocks: []any{map[string]any{"qdev": "/m/a", "inserted": map[string]any{"image": map[string]any{"filename": disk, "format": "raw"}}}}}
	target := Target{QMP: qmptest.New(t, q.serve).Addr}
	st, err := store.Open(t.Context(), vfs.OS, t.TempDir()+"/store", true)
	ok(t, err)
	control := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", control)
	ok(t, err)
	defer l.Close()
	ok(t, st.NoteArmed(t.Context(), store.Armed{VM: "vm", Part: uuid.New(), Number: 1, Control: control, Target: target.String(),
		State: json.RawMessage(`{"kept": {"parameters": {"max-bandwidth": 1}}}`)}))
	o := CheckpointOptions{Guest: migration.CheckpointOptions{Mode: migration.ModeStop}, Save: save.Options{VM: "vm"}, Snapshot: true, Log: slog.New(slog.DiscardHandler)}
	encoding, err := o.encoding()
	ok(t, err)
	hello, err := json.Marshal(armedSay{Hello: &armedHello{Encoding: encoding}})
	ok(t, err)
	go func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		_, _ = conn.Write(append(hello, '\n'))
		for lines := bufio.NewScanner(conn); lines.Scan(); {
			var a armedAsk
			_ = json.Unmarshal(lines.Bytes(), &a)
			switch a.Ask {
			case "ready":
				_, _ = conn.Write([]byte(`{"held":true}` + "\n"))
			case "go":
				return
			}
		}
	}()
	rep, err := Checkpoint(t.Context(), vfs.OS, st, target, o)
	if err == nil || rep.Saved || len(rep.Snapshots) != 1 {
		t.Fatalf("%+v, %v", rep, err)
	}
	if s := rep.Snapshots[0]; s.Frozen != disk || !strings.Contains(err.Error(), "writes to "+s.Now) {
		t.Errorf("%+v, %v", s, err)
	}
}

// TestLastSnapshots: of a disk of which two were taken the guest writes to the second.
func TestLastSnapshots(t *testing.T) {
	a, b, again := disks.Snapshot{Disk: "a", Now: "1"}, disks.Snapshot{Disk: "b", Now: "1"}, disks.Snapshot{Disk: "a", Frozen: "1", Now: "2"}
	rep := CheckpointReport{Snapshots: []disks.Snapshot{a, b, again}}
	if list := rep.LastSnapshots(); !slices.Equal(list, []disks.Snapshot{b, again}) {
		t.Errorf("%+v", list)
	}
}

// stalling is a context that holds up who waits for it until it is let go, as a process is
// that is stopped.
type stalling struct {
	context.Context
	let chan struct{}
}

func (c stalling) Done() <-chan struct{} {
	<-c.let
	return c.Context.Done()
}

// TestCommandWasStopped: that a command was stopped itself is no silence of the armed process.
func TestCommandWasStopped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for range 50 { // which of two things it sees first is chance
			p := &armedFor{hello: armedHello{Beats: true}, said: make(chan armedSay, 1), beats: make(chan struct{}, 1)}
			c := stalling{t.Context(), make(chan struct{})}
			heard := make(chan error)
			go func() {
				_, err := p.hear(c)
				heard <- err
			}()
			time.Sleep(time.Minute)
			p.beats <- struct{}{}
			close(c.let)
			time.Sleep(beatTime)
			p.said <- armedSay{Held: true}
			if err := <-heard; err != nil {
				t.Fatal(err)
			}
		}
	})
}

// TestArmedOfOthers: an armed process of another QEMU is not even connected to, which could end
// in that it is killed; whatever the VM is called.
func TestArmedOfOthers(t *testing.T) {
	a := newArmedTest(t)
	ctx, stop := context.WithCancel(t.Context())
	a.run(ctx, armedConfig{Buffer: 16 << 10, Target: Target{QMP: t.TempDir() + "/no-qemu"}}, 4<<10)
	written := a.feed()
	if a.hear().Hello == nil {
		t.Fatal("no hello")
	}
	// Whoever connects to it now connects to this.
	control := filepath.Join(a.dir, "s")
	ok(t, os.Remove(control))
	l, err := net.Listen("unix", control)
	ok(t, err)
	var connections atomic.Int32
	accepting := make(chan struct{})
	go func() {
		defer close(accepting)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			connections.Add(1)
			conn.Close()
		}
	}()
	q := &armedMachine{status: "none", parameters: map[string]any{"max-bandwidth": 1.0, "downtime-limit": 300.0}}
	other := Target{QMP: qmptest.New(t, q.serve).Addr}
	if err := Disarm(ctx, a.st, other, DisarmOptions{Log: slog.New(slog.DiscardHandler)}); !errors.Is(err, ErrNotArmed) {
		t.Errorf("disarm: %v", err)
	}
	o := CheckpointOptions{Save: save.Options{VM: "vm"}, Log: slog.New(slog.DiscardHandler)}
	if _, done, err := o.fromArmed(ctx, a.st, other, nil); done || err != nil {
		t.Errorf("checkpoint: %v, %v", done, err)
	}
	if n := connections.Load(); n > 0 {
		t.Errorf("%d connections", n)
	}
	if note, lives, err := a.st.ArmedFor(ctx, "vm"); note == nil || !lives || err != nil {
		t.Errorf("%+v, %v, %v", note, lives, err)
	}
	l.Close()
	<-accepting
	stop()
	<-a.ended
	a.conn.Close()
	a.stream.Close()
	<-written
}

// TestArmedForeign: who listens where a dead process did is not even heard if he is another user.
func TestArmedForeign(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can be another user")
	}
	st, err := store.Open(t.Context(), vfs.OS, t.TempDir()+"/store", true)
	ok(t, err)
	control := filepath.Join(t.TempDir(), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: control, Net: "unix"})
	ok(t, err)
	defer l.Close()
	ok(t, st.NoteArmed(t.Context(), store.Armed{VM: "vm", Part: uuid.New(), Number: 1, Control: control, State: json.RawMessage(`{}`)}))
	raw, err := l.SyscallConn()
	ok(t, err)
	listening := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread, which is another user's, ends with this
		var err error
		const nobody = 65534
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, nobody, nobody, nobody); errno != 0 {
			err = errno
		}
		if err == nil {
			// Who listens last is whom the other end sees.
			err = raw.Control(func(fd uintptr) { err = unix.Listen(int(fd), 1) })
		}
		listening <- err
	}()
	ok(t, <-listening)
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			defer conn.Close()
			_, _ = conn.Write([]byte(`{"hello":{"pid":1,"beats":true}}` + "\n"))
		}
	}()
	if p, err := findArmed(t.Context(), st, "vm", Target{}); err != nil || p == nil || p.conn != nil {
		t.Errorf("%+v, %v: it is believed", p, err)
	}
}

// TestArmedSilent: a process that does not begin is not waited for without end, and is killed.
func TestArmedSilent(t *testing.T) {
	defer func(was time.Duration) { helloTime = was }(helloTime)
	helloTime = 50 * time.Millisecond
	c := armedConfig{Control: t.TempDir() + "/s"}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: c.Control, Net: "unix"})
	ok(t, err)
	defer l.Close()
	stream, err := os.Open(os.DevNull)
	ok(t, err)
	defer stream.Close()
	cmd := exec.Command("sleep", "60")
	o := CheckpointOptions{Arm: &ArmOptions{Start: func([]*os.File) (*os.Process, error) {
		err := cmd.Start()
		return cmd.Process, err
	}}}
	if _, err := o.startArmed(t.Context(), migration.ArmedStream{Stream: stream}, l, c); !errors.Is(err, errArmedSilent) {
		t.Error(err)
	}
	if err := cmd.Wait(); err == nil {
		t.Error("it has ended by itself")
	}
}

// TestArmedEndsWhenFound: a process that ends while it is found is found all the same: what it
// reports instead of a hello would be the failure of a checkpoint that can be made.
func TestArmedEndsWhenFound(t *testing.T) {
	s := &armedServer{hurry: make(chan struct{}), begun: make(chan struct{}), saved: make(chan struct{}), ended: make(chan struct{}), opened: new(save.OpenedDisks)}
	close(s.begun)
	close(s.saved)
	defer close(s.ended)
	for range 100 {
		ours, theirs := net.Pipe()
		go s.talk(theirs)
		p := &armedFor{conn: ours}
		if err := p.greet(t.Context()); err != nil || p.conn == nil {
			t.Fatal(err)
		}
		if err := cmp.Or(p.ask(armedAsk{Ask: "ready"}), p.isHeld(t.Context())); !errors.Is(err, migration.ErrNotArmed) {
			t.Fatal(err)
		}
		p.close()
	}
}

// TestArmedAtItsEnd: a process that has lost its migration, and waits for the monitor to put QEMU
// right, leaves that to the command that has it: what it would find afterwards is the next one's.
func TestArmedAtItsEnd(t *testing.T) {
	users := map[string]any{"max-bandwidth": float64(33 << 20), "downtime-limit": 250.0}
	armed := map[string]any{"max-bandwidth": armedMark, "downtime-limit": 1.0}
	q := &armedMachine{status: "active", parameters: maps.Clone(armed), cancelled: func() {}}
	target := Target{QMP: qmptest.New(t, q.serve).Addr}
	a := newArmedTest(t)
	a.run(t.Context(), armedConfig{Buffer: 16 << 10, Target: target, Kept: migration.Kept{Parameters: users}}, 4<<10)
	defer a.stream.Close()
	written := a.held()
	x, err := target.Monitor(t.Context())
	ok(t, err)
	q.mu.Lock()
	q.status = "cancelled"
	q.mu.Unlock()
	ok(t, unix.Shutdown(int(a.stream.Fd()), unix.SHUT_RDWR))
	<-written
	until(t, "the end of its image", func() bool {
		note, lives, err := a.st.ArmedFor(t.Context(), "vm")
		return err == nil && note != nil && !lives
	})
	o := CheckpointOptions{Guest: migration.CheckpointOptions{Mode: migration.ModeStop}, Save: save.Options{VM: "vm"}, Log: slog.New(slog.DiscardHandler)}
	if _, done, err := o.fromArmed(t.Context(), a.st, target, x); done || err != nil {
		t.Errorf("%v, %v", done, err)
	}
	q.mu.Lock()
	if !maps.Equal(q.parameters, users) {
		t.Errorf("settings %v, want %v", q.parameters, users)
	}
	// It is armed anew.
	q.status, q.parameters = "active", maps.Clone(armed)
	q.mu.Unlock()
	x.Close()
	<-a.ended
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.status != "active" || !maps.Equal(q.parameters, armed) {
		t.Errorf("the next one: the migration is %s, settings %v", q.status, q.parameters)
	}
}
