package session

import (
	"bufio"
	"bytes"
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

// TestGuestSync: the guest writes what it has to before it is stopped. One that does not
// answer is saved all the same, after a while.
func TestGuestSync(t *testing.T) {
	for _, answers := range []bool{true, false} {
		t.Run(fmt.Sprint(answers), func(t *testing.T) {
			s := tiertest.New(tiertest.Options{Seed: 1, Blocks: []tiertest.Block{{Name: "pc.ram", Size: 1 << 20}}, ReturnPath: true})
			q := &machine{stream: s.Bytes(), running: true, status: "none"}
			m := qmptest.New(t, q.serve(t))
			l, err := net.Listen("unix", t.TempDir()+"/agent")
			ok(t, err)
			defer l.Close()
			synced := make(chan bool, 1) // whether the guest ran
			go func() {
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
					switch _, serr := fmt.Sscanf(line, "\xff{\"execute\":\"guest-sync-delimited\",\"arguments\":{\"id\":%d}}", &id); {
					case !answers:
					case serr == nil:
						fmt.Fprintf(c, "\xff{\"return\": %d}\n", id)
					case strings.Contains(line, "status"):
						q.mu.Lock()
						synced <- q.running
						q.mu.Unlock()
						fmt.Fprintln(c, `{"return": {"exited": true, "exitcode": 0}}`)
					default:
						fmt.Fprintln(c, `{"return": {"pid": 3}}`)
					}
				}
			}()
			st, err := store.Open(t.Context(), vfs.OS, t.TempDir()+"/store", true)
			ok(t, err)
			var log bytes.Buffer
			rep, err := Checkpoint(t.Context(), vfs.OS, st, Target{QMP: m.Addr}, CheckpointOptions{
				Guest: migration.CheckpointOptions{Mode: migration.ModeStop},
				Save:  save.Options{VM: "vm"},
				Sync:  &GuestSync{Socket: l.Addr().String(), Limit: 200 * time.Millisecond},
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
