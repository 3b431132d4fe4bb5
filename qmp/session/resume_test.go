package session

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/qmp/preflight"
	"github.com/flic-migrate/flic-migrate/qmp/qmptest"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// saved is a checkpoint of a guest of 1 MiB.
func saved(t *testing.T) (*store.Store, *store.Checkpoint) {
	t.Helper()
	st, err := store.Open(t.Context(), vfs.OS, t.TempDir()+"/store", true)
	ok(t, err)
	s := tiertest.New(tiertest.Options{Seed: 1, Blocks: []tiertest.Block{{Name: "pc.ram", Size: 1 << 20}}})
	ref, _, err := save.Run(t.Context(), vfs.OS, st, s.Reader(), save.Options{VM: "vm"})
	ok(t, err)
	c, err := st.OpenCheckpoint(t.Context(), ref, checkpoint.Options{})
	ok(t, err)
	t.Cleanup(func() { c.Close() })
	return st, c
}

// destination serves a QEMU that waits for a migration, and has it all when the
// stream has ended.
func destination(machine string, inmigrate func() bool, took chan<- string) func(*qmptest.Conn) {
	return func(c *qmptest.Conn) {
		files := c.Files()
		var named *os.File
		runs := false
		loaded := make(chan struct{})
		qmptest.Negotiated(func(c *qmptest.Conn, cmd qmptest.Command) {
			answer := "{}"
			done := false
			select {
			case <-loaded:
				done = true
			default:
			}
			switch cmd.Execute {
			case "query-status":
				answer = `{"running": false, "status": "inmigrate"}`
				switch {
				case runs:
					answer = `{"running": true, "status": "running"}`
				case done || !inmigrate():
					answer = `{"running": false, "status": "paused"}`
				}
			case "cont":
				runs = true
			case "query-yank":
				answer = "[]"
			case "query-migrate-capabilities":
				answer = `[{"capability": "events", "state": false}, {"capability": "multifd", "state": true}]`
			case "query-migrate":
				answer = fmt.Sprintf(`{"status": %q}`, map[bool]string{true: "completed", false: "active"}[done])
			case "qom-list", "query-cpus-fast", "query-machines":
				c.Refuse(cmd, "CommandNotFound", "no such command")
				return
			case "qom-get":
				answer = fmt.Sprintf("%q", machine+"-machine")
			case "human-monitor-command":
				answer = `"pc.ram 4 KiB 0x0000000000000000 0x0000000000100000 0x0000000000100000\n"`
			case "getfd":
				named = files.Take()
			case "migrate-incoming":
				f := named
				go func() {
					b, _ := io.ReadAll(f)
					f.Close()
					took <- string(b)
					close(loaded)
				}()
			case "closefd":
				named.Close()
			}
			c.Reply(cmd, answer)
		})(c)
	}
}

// TestResume has servers of all kinds serve a QEMU: what they say on their socket is
// in the report, and why they fail in the error.
func TestResume(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	st, c := saved(t)
	for name, test := range map[string]struct {
		script string
		want   error
		report func(*ServerReport) bool
	}{
		"serves": {`printf QEVM; echo '{"hello":{"pid":1}}' >&3; echo '{"progress":{"pages":1,"pages_all":2}}' >&3; echo '{"report":{"checkpoint":"vm@1"}}' >&3`,
			nil, func(r *ServerReport) bool { return r != nil && r.Checkpoint == "vm@1" }},
		"is killed": {`printf QEVM; sleep 0.1`, nil, func(r *ServerReport) bool { return r == nil }},
		"can't begin": {`echo '{"report":{"exit_code":4,"error":"no such page"},"damaged":true}' >&3; echo junk`,
			migration.ErrServer, func(r *ServerReport) bool { return r != nil && r.ExitCode == 4 }},
		"ends at once": {`exit 3`, migration.ErrServer, func(r *ServerReport) bool { return r == nil }},
	} {
		t.Run(name, func(t *testing.T) {
			took := make(chan string, 1)
			q := qmptest.New(t, destination(c.Meta.Machine, func() bool { return true }, took))
			ran := false
			rep, err := Resume(t.Context(), Target{QMP: q.Addr}, st, c, ResumeOptions{
				Lazy: migration.LazyNever, Paused: true, Stalled: time.Minute,
				Server: func(a ServerArgs) []string {
					if a.Kind != migration.EagerServer || a.Control == "" || a.Socket != "" {
						t.Errorf("%+v", a)
					}
					return []string{"/bin/sh", "-c", test.script}
				},
				Running: func(migration.ResumeReport) { ran = true },
				Log:     slog.New(slog.DiscardHandler),
			})
			if !errors.Is(err, test.want) || !test.report(rep.Server) {
				t.Errorf("%v, %+v", err, rep.Server)
			}
			var server *ServerError
			if said := rep.Server != nil && rep.Server.Error != ""; errors.As(err, &server) != said || said && !strings.Contains(err.Error(), "the server says: no such page") {
				t.Errorf("the error is %v", err)
			}
			if ran != (err == nil) {
				t.Errorf("ran: %v", ran)
			}
			if err == nil && (rep.State != "paused" || <-took != "QEVM") {
				t.Errorf("%+v", rep)
			}
		})
	}

	// Another machine is refused before a server is started.
	q := qmptest.New(t, destination("microvm", func() bool { return true }, nil))
	_, err := Resume(t.Context(), Target{QMP: q.Addr}, st, c, ResumeOptions{Log: slog.New(slog.DiscardHandler)})
	if !errors.Is(err, preflight.ErrMismatch) {
		t.Error(err)
	}
	if left, err := os.ReadDir(os.TempDir()); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// A report goes through a socket as it is, and a domain is told from another.
func TestReports(t *testing.T) {
	b, err := json.Marshal(message{Report: &ServerReport{Checkpoint: "vm@1", Error: "x", ExitCode: 5}, Damaged: true})
	ok(t, err)
	ours, theirs := net.Pipe()
	s := &server{ended: make(chan struct{})}
	go s.listen(ours)
	_, _ = theirs.Write(append(b, '\n'))
	theirs.Close()
	if st := s.final(t.Context()); st.report == nil || *st.report != (ServerReport{Checkpoint: "vm@1", Error: "x", ExitCode: 5}) || !st.damaged {
		t.Errorf("%+v", st)
	}
	_, c := saved(t)
	if _, err := description(c, "web1"); !errors.Is(err, ErrNoDomain) {
		t.Error(err)
	}
	c.Meta.Libvirt = &checkpoint.Libvirt{XML: "<domain><name>web1</name><uuid>u</uuid></domain>"}
	if _, err := description(c, "web1"); err != nil {
		t.Error(err)
	}
	if _, err := description(c, "web2"); err == nil || !strings.Contains(err.Error(), "web1") {
		t.Error(err)
	}
}
