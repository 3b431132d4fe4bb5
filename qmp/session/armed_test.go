package session

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// armedTest is an armed process, and a command that talks to it.
type armedTest struct {
	t      *testing.T
	st     *store.Store
	dir    string   // of its control socket
	stream *os.File // QEMU's end
	lives  *os.File // likewise, of what tells that it is gone
	conn   net.Conn
	lines  *bufio.Scanner
	ended  chan error
}

// newArmedTest makes the store of a process that is still to be run.
func newArmedTest(t *testing.T) *armedTest {
	t.Helper()
	st, err := store.Open(t.Context(), vfs.OS, filepath.Join(t.TempDir(), "store"), true)
	ok(t, err)
	return &armedTest{t: t, st: st, ended: make(chan error, 1)}
}

// run runs the process with c, which lacks what is the same for all, and connects to it. About
// send bytes of the stream wait though nobody reads.
func (a *armedTest) run(ctx context.Context, c armedConfig, send int) {
	t := a.t
	t.Helper()
	var err error
	a.dir, err = os.MkdirTemp("", armedDir)
	ok(t, err)
	c.Store, c.VM, c.Parent, c.Control = a.st.Dir(), "vm", "vm@1", filepath.Join(a.dir, "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: c.Control, Net: "unix"})
	ok(t, err)
	l.SetUnlinkOnClose(false)
	listener, err := l.File()
	ok(t, err)
	l.Close()
	c.Encoding, err = new(CheckpointOptions).encoding()
	ok(t, err)
	b, err := json.Marshal(c)
	ok(t, err)
	config := filepath.Join(t.TempDir(), "config")
	ok(t, os.WriteFile(config, b, 0o600))
	configuration, err := os.Open(config)
	ok(t, err)
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	ok(t, err)
	ok(t, unix.SetsockoptInt(fds[0], unix.SOL_SOCKET, unix.SO_SNDBUF, send))
	ok(t, unix.SetNonblock(fds[0], true)) // so that its Close ends a Write, as the end of QEMU does
	a.stream = os.NewFile(uintptr(fds[0]), "stream")
	p := ArmedProcess{FS: vfs.OS, ExitCode: func(error) int { return 7 }, Log: slog.New(slog.DiscardHandler),
		Open: func(ctx context.Context, dir string) (*store.Store, error) {
			return store.Open(ctx, vfs.OS, dir, false)
		}}
	theirs, err := unix.Dup(fds[0])
	ok(t, err)
	lives, end, err := os.Pipe()
	ok(t, err)
	a.lives = end
	t.Cleanup(func() { end.Close() })
	go func() {
		a.ended <- p.Run(ctx, []*os.File{os.NewFile(uintptr(fds[1]), "stream"), listener, configuration, os.NewFile(uintptr(theirs), "stream"), lives})
	}()
	a.conn, err = net.Dial("unix", c.Control)
	ok(t, err)
	a.lines = bufio.NewScanner(a.conn)
}

// feed has QEMU's end write a stream of two passes, and tells when that has ended.
func (a *armedTest) feed() (written chan struct{}) {
	written = make(chan struct{})
	go func() {
		defer close(written)
		s := tiertest.New(tiertest.Options{ReturnPath: true, Passes: 2, Resend: 0.1,
			Blocks: []tiertest.Block{{Name: "pc.ram", Size: 80 << 20}}, Mix: tiertest.Mix{tiertest.Zero: 30, tiertest.Text: 1}})
		_, _ = a.stream.Write(s.Bytes())
	}()
	return written
}

// held has the process begin and hold a stream of feed, for a command that is gone then.
func (a *armedTest) held() (written chan struct{}) {
	a.t.Helper()
	written = a.feed()
	if a.hear().Hello == nil {
		a.t.Fatal("no hello")
	}
	a.ask("ready")
	if !a.hear().Held {
		a.t.Error("it does not hold")
	}
	a.conn.Close()
	return written
}

func (a *armedTest) hear() (m armedSay) {
	a.t.Helper()
	if !a.lines.Scan() {
		a.t.Fatal("the process says nothing")
	}
	ok(a.t, json.Unmarshal(a.lines.Bytes(), &m))
	return m
}

func (a *armedTest) ask(what string) {
	a.t.Helper()
	ok(a.t, json.NewEncoder(a.conn).Encode(armedAsk{Ask: what, RunState: "running"}))
}

// An armed process says hello when it has the stream, holds it, goes on when it is told
// to, and ends; or it is ended, by who it has to do with, and leaves nothing. Its QEMU is
// gone here: there is nothing to put right.
func TestArmedProcess(t *testing.T) {
	for _, end := range []string{"go", "disarm", "abort", "orphaned", "orphaned before", "asked to end", "stream ended", "QEMU gone"} {
		t.Run(end, func(t *testing.T) {
			a := newArmedTest(t)
			ctx, stop := context.WithCancelCause(t.Context())
			a.run(ctx, armedConfig{Buffer: 16 << 10, Widens: true, Target: Target{QMP: filepath.Join(t.TempDir(), "no-qemu")}}, 4<<10)
			written := a.feed()
			if h := a.hear().Hello; h == nil || h.Checkpoint != "vm@1" || h.Encoding.Parent != save.ParentAuto {
				t.Errorf("hello: %+v", h)
			}
			a.ask("ready")
			if !a.hear().Held {
				t.Error("it does not hold")
			}
			if note, lives, err := a.st.ArmedFor(t.Context(), "vm"); err != nil || note == nil || !lives {
				t.Errorf("%+v, %v, %v", note, lives, err)
			}
			switch end {
			case "go":
				a.ask("go")
				<-written // at once: the process has all that is written
				if n, err := unix.GetsockoptInt(int(a.stream.Fd()), unix.SOL_SOCKET, unix.SO_SNDBUF); err != nil || n < 64<<10 {
					t.Errorf("the stream has become %d bytes wide, %v", n, err)
				}
				if r := a.hear().Report; r == nil || r.Checkpoint != "vm@1" || r.Error != "" {
					t.Errorf("report: %+v", r)
				}
				a.ask("done")
			case "disarm", "abort":
				if end == "disarm" { // another command does
					a.conn.Close()
					var err error
					a.conn, err = net.Dial("unix", filepath.Join(a.dir, "s"))
					ok(t, err)
					a.lines = bufio.NewScanner(a.conn)
					if a.hear().Hello == nil {
						t.Error("no hello")
					}
				}
				a.ask(end)
				if r := a.hear().Report; r == nil || r.Error == "" || r.ExitCode != 7 {
					t.Errorf("report: %+v", r)
				}
			case "orphaned":
				a.ask("go")
			case "orphaned before":
				a.ask("stop")
			case "asked to end":
				stop(errors.New(end))
			case "stream ended":
				ok(t, unix.Shutdown(int(a.stream.Fd()), unix.SHUT_RDWR))
			case "QEMU gone":
				// Its end is open in the process, too, which must let go of it.
				a.lives.Close()
				a.stream.Close()
			}
			a.conn.Close()
			err := <-a.ended
			a.stream.Close()
			<-written
			stop(nil)
			refs, lerr := a.st.List(t.Context(), "vm")
			ok(t, lerr)
			// One that had all when its command went away may be there.
			if saved := len(refs) == 1; saved != (err == nil) || end == "go" && err != nil || end != "go" && end != "orphaned" && err == nil {
				t.Errorf("%v, and the store has %v", err, refs)
			}
			if note, _, err := a.st.ArmedFor(t.Context(), "vm"); note != nil || err != nil {
				t.Errorf("there is a note: %+v, %v", note, err)
			}
			if left, _ := filepath.Glob(a.st.Dir() + "/tmp/*"); len(left) > 0 {
				t.Errorf("%q", left)
			}
			if _, err := os.Stat(a.dir); err == nil {
				t.Errorf("%s is there", a.dir)
			}
		})
	}
}
