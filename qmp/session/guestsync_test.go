package session

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/qmp/qmptest"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// fakeAgent serves one client of a guest's agent and returns its socket. answer has the
// line to a command; without one the agent is silent, from the first word on if the first
// answer is empty.
func fakeAgent(t *testing.T, answer func(line string) string) (socket string) {
	t.Helper()
	l, err := net.Listen("unix", t.TempDir()+"/agent")
	ok(t, err)
	done := make(chan struct{})
	t.Cleanup(func() { l.Close(); <-done })
	go func() {
		defer close(done)
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		in := bufio.NewReader(c)
		for {
			line, err := in.ReadString('\n')
			if err != nil {
				return
			}
			var id int64
			if _, err := fmt.Sscanf(line, "\xff{\"execute\":\"guest-sync-delimited\",\"arguments\":{\"id\":%d}}", &id); err == nil {
				if answer("") != "" {
					fmt.Fprintf(c, "\xff{\"return\": %d}\n", id)
				}
			} else if text := answer(line); text != "" {
				fmt.Fprintln(c, text)
			}
		}
	}()
	return l.Addr().String()
}

// TestGuestCare: a guest that runs again is asked for what it is to do, and what it has not
// done is an error. It is not asked if it does not run.
func TestGuestCare(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	st, c := saved(t)
	c.Meta.RunState = "running"
	serves := `printf QEVM; echo '{"report":{"checkpoint":"vm@1"}}' >&3`
	for name, test := range map[string]struct {
		exit   string // what the guest's command ends with; empty: the agent is silent
		server string
		paused bool
		asked  string // commands that the agent heard
		want   error
		says   string
	}{
		"done":    {exit: `"exitcode": 0`, server: serves, asked: "guest-set-time guest-exec guest-exec-status"},
		"fails":   {exit: `"exitcode": 3`, server: serves, asked: "guest-set-time guest-exec guest-exec-status", want: ErrGuestCare, says: `"make it" in the guest: it ended with code 3`},
		"silent":  {server: serves, want: ErrGuestCare, says: "not within 300ms"},
		"paused":  {exit: `"exitcode": 0`, server: serves, paused: true, want: ErrGuestPaused},
		"no page": {exit: `"exitcode": 0`, server: "exit 3", want: migration.ErrServer},
	} {
		t.Run(name, func(t *testing.T) {
			asked := make(chan string, 9)
			socket := fakeAgent(t, func(line string) string {
				if test.exit == "" {
					return ""
				}
				if line == "" {
					return "yes"
				}
				command, _, _ := strings.Cut(strings.TrimPrefix(line, `{"execute":"`), `"`)
				asked <- command
				switch command {
				case "guest-exec":
					if !strings.Contains(line, `"arg":["-c","make it"],"path":"/bin/sh"`) {
						t.Error(line)
					}
					return `{"return": {"pid": 3}}`
				case "guest-exec-status":
					return `{"return": {"exited": true, ` + test.exit + `}}`
				}
				return `{"return": {}}`
			})
			q := qmptest.New(t, destination(c.Meta.Machine, func() bool { return true }, make(chan string, 1)))
			ran := 0
			rep, err := Resume(t.Context(), Target{QMP: q.Addr}, st, c, ResumeOptions{
				Lazy: migration.LazyNever, Paused: test.paused, Stalled: time.Minute,
				Server:  func(a ServerArgs) []string { return []string{"/bin/sh", "-c", test.server} },
				Guest:   &GuestCare{Socket: socket, Time: true, Command: "make it", Limit: 300 * time.Millisecond},
				Running: func(migration.ResumeReport) { ran++ },
				Log:     slog.New(slog.DiscardHandler),
			})
			if !errors.Is(err, test.want) || err != nil && !strings.Contains(err.Error(), test.says) {
				t.Errorf("error %v", err)
			}
			var heard []string
			for len(asked) > 0 {
				heard = append(heard, <-asked)
			}
			if heard := strings.Join(heard, " "); heard != test.asked {
				t.Errorf("the agent heard %s", heard)
			}
			resumed := test.want != migration.ErrServer
			if (ran == 1) != resumed || (rep.Guest > 0) != (resumed && !test.paused) || resumed && (rep.State == "running") == test.paused {
				t.Errorf("told %d times, %+v", ran, rep)
			}
		})
	}
}

// TestGuestSync: the guest writes what it has to before it is stopped. One that does not
// answer is saved all the same, after a while.
func TestGuestSync(t *testing.T) {
	for _, answers := range []bool{true, false} {
		t.Run(fmt.Sprint(answers), func(t *testing.T) {
			s := tiertest.New(tiertest.Options{Seed: 1, Blocks: []tiertest.Block{{Name: "pc.ram", Size: 1 << 20}}, ReturnPath: true})
			q := &machine{stream: s.Bytes(), running: true, status: "none"}
			m := qmptest.New(t, q.serve(t))
			synced := make(chan bool, 1) // whether the guest ran
			socket := fakeAgent(t, func(line string) string {
				switch {
				case !answers:
					return ""
				case strings.Contains(line, "guest-exec-status"):
					q.mu.Lock()
					synced <- q.running
					q.mu.Unlock()
					return `{"return": {"exited": true, "exitcode": 0}}`
				}
				return `{"return": {"pid": 3}}`
			})
			st, err := store.Open(t.Context(), vfs.OS, t.TempDir()+"/store", true)
			ok(t, err)
			var log bytes.Buffer
			rep, err := Checkpoint(t.Context(), vfs.OS, st, Target{QMP: m.Addr}, CheckpointOptions{
				Guest: migration.CheckpointOptions{Mode: migration.ModeStop},
				Save:  save.Options{VM: "vm"},
				Sync:  &GuestSync{Socket: socket, Limit: 200 * time.Millisecond},
				Log:   slog.New(slog.NewTextHandler(&log, nil)),
			})
			q.writing.Wait()
			if err != nil || rep.Checkpoint != "vm@1" {
				t.Fatalf("%+v, %v", rep, err)
			}
			if warned := strings.Contains(log.String(), "without having written to its disks"); warned == answers {
				t.Errorf("warnings: %s", log.String())
			}
			if answers && !<-synced {
				t.Error("it was stopped before it had written")
			}
		})
	}
}

// TestSnapshotRefused: if the disks can't be frozen the guest runs on, and nothing is
// saved.
func TestSnapshotRefused(t *testing.T) {
	q := &machine{running: true, status: "none"} // which answers what is no list of disks
	m := qmptest.New(t, q.serve(t))
	st, err := store.Open(t.Context(), vfs.OS, t.TempDir()+"/store", true)
	ok(t, err)
	rep, err := Checkpoint(t.Context(), vfs.OS, st, Target{QMP: m.Addr}, CheckpointOptions{
		Guest: migration.CheckpointOptions{Mode: migration.ModeStop}, Save: save.Options{VM: "vm"}, Snapshot: true,
		Log: slog.New(slog.DiscardHandler),
	})
	if err == nil || rep.Saved || !q.running || slices.Contains(q.sent, "migrate") {
		t.Errorf("%+v, %v, after %v", rep, err, q.sent)
	}
}
