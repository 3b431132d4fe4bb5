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

// An armed process says hello when it has the stream, holds it, goes on when it is told
// to, and ends; or it is ended, by who it has to do with, and leaves nothing. Its QEMU is
// gone here: there is nothing to put right.
func TestArmedProcess(t *testing.T) {
	for _, end := range []string{"go", "disarm", "abort", "orphaned", "asked to end", "stream ended"} {
		t.Run(end, func(t *testing.T) {
			st, err := store.Open(t.Context(), vfs.OS, filepath.Join(t.TempDir(), "store"), true)
			ok(t, err)
			dir, err := os.MkdirTemp("", armedDir)
			ok(t, err)
			l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "s"), Net: "unix"})
			ok(t, err)
			l.SetUnlinkOnClose(false)
			listener, err := l.File()
			ok(t, err)
			l.Close()
			e, err := new(CheckpointOptions).encoding()
			ok(t, err)
			b, err := json.Marshal(armedConfig{Store: st.Dir(), VM: "vm", Parent: "vm@1", Encoding: e, Buffer: 16 << 10,
				Target: Target{QMP: filepath.Join(dir, "no-qemu")}, Control: filepath.Join(dir, "s")})
			ok(t, err)
			config := filepath.Join(t.TempDir(), "config")
			ok(t, os.WriteFile(config, b, 0o600))
			configuration, err := os.Open(config)
			ok(t, err)
			fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			ok(t, err)
			ours, theirs := os.NewFile(uintptr(fds[0]), "stream"), os.NewFile(uintptr(fds[1]), "stream")
			ok(t, unix.SetsockoptInt(fds[0], unix.SOL_SOCKET, unix.SO_SNDBUF, 4<<10))
			written := make(chan struct{})
			go func() {
				defer close(written)
				s := tiertest.New(tiertest.Options{ReturnPath: true, Passes: 2, Resend: 0.1,
					Blocks: []tiertest.Block{{Name: "pc.ram", Size: 80 << 20}}, Mix: tiertest.Mix{tiertest.Zero: 30, tiertest.Text: 1}})
				_, _ = ours.Write(s.Bytes())
			}()
			ctx, stop := context.WithCancelCause(t.Context())
			ended := make(chan error, 1)
			p := ArmedProcess{FS: vfs.OS, ExitCode: func(error) int { return 7 }, Log: slog.New(slog.DiscardHandler),
				Open: func(ctx context.Context, dir string) (*store.Store, error) {
					return store.Open(ctx, vfs.OS, dir, false)
				}}
			go func() { ended <- p.Run(ctx, []*os.File{theirs, listener, configuration}) }()

			conn, err := net.Dial("unix", filepath.Join(dir, "s"))
			ok(t, err)
			lines := bufio.NewScanner(conn)
			hear := func() (m armedSay) {
				t.Helper()
				if !lines.Scan() {
					t.Fatal("the process says nothing")
				}
				ok(t, json.Unmarshal(lines.Bytes(), &m))
				return m
			}
			ask := func(a armedAsk) { ok(t, json.NewEncoder(conn).Encode(a)) }
			if h := hear().Hello; h == nil || h.Checkpoint != "vm@1" || h.Encoding.Parent != save.ParentAuto {
				t.Errorf("hello: %+v", h)
			}
			ask(armedAsk{Ask: "ready"})
			if !hear().Held {
				t.Error("it does not hold")
			}
			if note, lives, err := st.ArmedFor(t.Context(), "vm"); err != nil || note == nil || !lives {
				t.Errorf("%+v, %v, %v", note, lives, err)
			}
			switch end {
			case "go":
				ask(armedAsk{Ask: "go", RunState: "running"})
				if r := hear().Report; r == nil || r.Checkpoint != "vm@1" || r.Error != "" {
					t.Errorf("report: %+v", r)
				}
				ask(armedAsk{Ask: "done"})
			case "disarm", "abort":
				ask(armedAsk{Ask: end})
				if r := hear().Report; r == nil || r.Error == "" || r.ExitCode != 7 {
					t.Errorf("report: %+v", r)
				}
			case "orphaned":
				ask(armedAsk{Ask: "go"})
				conn.Close()
			case "asked to end":
				stop(errors.New(end))
			case "stream ended":
				ok(t, unix.Shutdown(fds[0], unix.SHUT_RDWR))
			}
			err = <-ended
			conn.Close()
			ours.Close()
			<-written
			stop(nil)
			refs, lerr := st.List(t.Context(), "vm")
			ok(t, lerr)
			// One that had all when its command went away may be there.
			if saved := len(refs) == 1; saved != (err == nil) || end == "go" && err != nil || end != "go" && end != "orphaned" && err == nil {
				t.Errorf("%v, and the store has %v", err, refs)
			}
			if note, _, err := st.ArmedFor(t.Context(), "vm"); note != nil || err != nil {
				t.Errorf("there is a note: %+v, %v", note, err)
			}
			if left, _ := filepath.Glob(st.Dir() + "/tmp/*"); len(left) > 0 {
				t.Errorf("%q", left)
			}
			if _, err := os.Stat(dir); err == nil {
				t.Errorf("%s is there", dir)
			}
		})
	}
}
