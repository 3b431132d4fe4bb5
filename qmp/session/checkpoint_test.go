package session

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/libvirt/domain"
	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/qmp/qmptest"
	"github.com/flic-migrate/flic-migrate/stream/returnpath"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// machine is a QEMU as far as a checkpoint is concerned: it writes a stream to what
// it was given and has completed when it hears that all is well.
type machine struct {
	stream []byte
	fails  bool   // it says that the migration has failed, whatever it hears
	disks  string // what it says of its disks, in JSON; empty: nothing of use
	stays  bool   // it does not let the guest run
	onCont func() // may be nil

	mu      sync.Mutex
	running bool
	status  string
	sent    []string
	writing sync.WaitGroup
}

func (q *machine) serve(t *testing.T) func(*qmptest.Conn) {
	return func(c *qmptest.Conn) {
		var files *qmptest.Files
		if _, ok := c.Conn.(*net.UnixConn); ok {
			files = c.Files()
		}
		var named *os.File
		qmptest.Negotiated(func(c *qmptest.Conn, cmd qmptest.Command) {
			q.mu.Lock()
			defer q.mu.Unlock()
			q.sent = append(q.sent, cmd.Execute)
			var args struct{ URI, Filename string }
			_ = json.Unmarshal(cmd.Args, &args)
			answer := "{}"
			switch cmd.Execute {
			case "cont":
				if q.stays {
					c.Refuse(cmd, "GenericError", "not now")
					return
				}
				q.running = true
				if q.onCont != nil {
					q.onCont()
				}
			case "stop":
				q.running = false
			case "query-status":
				answer = fmt.Sprintf(`{"running": %v, "status": %q}`, q.running, map[bool]string{true: "running", false: "paused"}[q.running])
			case "query-migrate":
				answer = fmt.Sprintf(`{"status": %q}`, q.status)
			case "query-yank", "query-block-jobs":
				answer = "[]"
			case "query-block":
				answer = cmp.Or(q.disks, answer)
			case "query-migrate-capabilities":
				answer = `[{"capability": "events", "state": false}, {"capability": "return-path", "state": false}]`
			case "query-migrate-parameters":
				answer = `{"max-bandwidth": 1, "downtime-limit": 300}`
			case "migrate_cancel":
				if q.status == "active" {
					q.status = "cancelled"
				}
			case "getfd":
				named = files.Take()
			case "pmemsave":
				if err := os.WriteFile(args.Filename, nil, 0o600); err != nil {
					t.Error(err)
				}
			case "migrate":
				var to io.ReadWriteCloser = named
				if path, ok := strings.CutPrefix(args.URI, "unix:"); ok {
					conn, err := net.Dial("unix", path)
					if err != nil {
						t.Error(err)
						return
					}
					to = conn
				}
				q.status = "active"
				q.writing.Add(1)
				go q.migrate(to)
			}
			c.Reply(cmd, answer)
		})(c)
	}
}

func (q *machine) migrate(to io.ReadWriteCloser) {
	defer q.writing.Done()
	defer to.Close()
	_, _ = to.Write(q.stream)
	answers := returnpath.NewReader(to)
	status := "failed"
	for {
		m, err := answers.Next()
		if err == nil && m.Type != returnpath.Shut {
			continue
		}
		if err == nil && m.Value == 0 && !q.fails {
			status = "completed"
		}
		break
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.status == "active" {
		q.status = status
	}
}

// TestCheckpoint saves a guest through a monitor of each kind, and believes QEMU's
// word alone that it did.
func TestCheckpoint(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	for _, network := range []string{"unix", "tcp"} {
		for _, fails := range []bool{false, true} {
			t.Run(fmt.Sprint(network, ", QEMU fails: ", fails), func(t *testing.T) {
				s := tiertest.New(tiertest.Options{Seed: 1, Blocks: []tiertest.Block{{Name: "pc.ram", Size: 1 << 20}}, ReturnPath: true})
				q := &machine{stream: s.Bytes(), fails: fails, running: true, status: "none"}
				addr := t.TempDir() + "/qmp"
				if network == "tcp" {
					addr = "127.0.0.1:0"
				}
				l, err := net.Listen(network, addr)
				ok(t, err)
				m := qmptest.Serve(t, l, q.serve(t))
				st, err := store.Open(t.Context(), vfs.OS, t.TempDir()+"/store", true)
				ok(t, err)
				rep, err := Checkpoint(t.Context(), vfs.OS, st, Target{QMP: m.Addr}, CheckpointOptions{
					Guest: migration.CheckpointOptions{Mode: migration.ModeStop},
					Save:  save.Options{VM: "vm"},
					Log:   slog.New(slog.DiscardHandler),
				})
				q.writing.Wait()
				refs, lerr := st.List(context.Background(), "vm")
				ok(t, lerr)
				if fails {
					if !errors.Is(err, migration.ErrUnconfirmed) || rep.Saved || len(refs) > 0 {
						t.Errorf("saved %v, %v, %v", rep.Saved, refs, err)
					}
				} else if err != nil || rep.Checkpoint != "vm@1" || rep.Save == nil || len(refs) != 1 {
					t.Errorf("%+v, %v, %v", rep, refs, err)
				}
				if !q.running || !slices.Contains(q.sent, "stop") {
					t.Errorf("the guest runs: %v, after %v", q.running, q.sent)
				}
			})
		}
	}
	if left, err := os.ReadDir(os.TempDir()); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// TestKeptWithoutCheckpoint: copies of disks go with a checkpoint that fails, and are not
// spoken of.
func TestKeptWithoutCheckpoint(t *testing.T) {
	for _, fails := range []bool{false, true} {
		dir := t.TempDir()
		ok(t, os.WriteFile(dir+"/disk", make([]byte, 1<<20), 0o600))
		s := tiertest.New(tiertest.Options{Seed: 1, Blocks: []tiertest.Block{{Name: "pc.ram", Size: 1 << 20}}, ReturnPath: true})
		q := &machine{stream: s.Bytes(), fails: fails, running: true, status: "none",
			disks: fmt.Sprintf(`[{"qdev": "/m/a", "inserted": {"image": {"filename": %q, "format": "raw"}}}]`, dir+"/disk")}
		m := qmptest.New(t, q.serve(t))
		st, err := store.Open(t.Context(), vfs.OS, dir+"/store", true)
		ok(t, err)
		rep, err := Checkpoint(t.Context(), vfs.OS, st, Target{QMP: m.Addr}, CheckpointOptions{
			Guest: migration.CheckpointOptions{Mode: migration.ModeStop},
			Save:  save.Options{VM: "vm"},
			Keep:  KeepCopy,
			Log:   slog.New(slog.DiscardHandler),
		})
		q.writing.Wait()
		copies, rerr := os.ReadDir(dir + "/store/frozen")
		ok(t, rerr)
		if (err != nil) != fails || (len(rep.Kept) == 0) != fails || (rep.KeptTime == 0) != fails || (len(copies) == 0) != fails {
			t.Errorf("fails %v: %v, %+v, %v; the store has %v", fails, err, rep.Kept, rep.KeptTime, copies)
		}
	}
}

// TestNoted: what a checkpoint has to say to later ones is said when the guest runs again, and
// before what comes after it.
func TestNoted(t *testing.T) {
	const domain = "all"
	st, err := store.Open(t.Context(), vfs.OS, t.TempDir()+"/store", true)
	ok(t, err)
	news := func(want int) func() {
		return func() {
			c, err := st.Share(domain)
			if err != nil {
				t.Error(err)
				return
			}
			if list, err := c.News(); err != nil || len(list) != want {
				t.Errorf("%d checkpoints are noted, want %d: %v", len(list), want, err)
			}
		}
	}
	s := tiertest.New(tiertest.Options{Seed: 1, Blocks: []tiertest.Block{{Name: "pc.ram", Size: 1 << 20}}, ReturnPath: true})
	q := &machine{stream: s.Bytes(), running: true, status: "none", onCont: news(0)}
	_, err = Checkpoint(t.Context(), vfs.OS, st, Target{QMP: qmptest.New(t, q.serve(t)).Addr}, CheckpointOptions{
		Guest: migration.CheckpointOptions{Mode: migration.ModeStop},
		Save:  save.Options{VM: "vm", TrustDomain: domain},
		Tidy: func(context.Context) error {
			news(1)()
			return nil
		},
		Log: slog.New(slog.DiscardHandler),
	})
	ok(t, err)
	q.writing.Wait()
}

// A save that goes on though it was to end is told of, once, and one that ends is not.
func TestTellHang(t *testing.T) {
	for took, want := range map[time.Duration]int{hangTime - 1: 0, hangTime + 1: 1, 10 * hangTime: 1} {
		synctest.Test(t, func(t *testing.T) {
			var told strings.Builder
			o := CheckpointOptions{PutRight: func(Target) (*Guard, error) { return nil, nil }, Log: slog.New(slog.NewTextHandler(&told, nil))}
			ctx, cancel := context.WithCancel(t.Context())
			ended := o.tellHang(ctx)
			time.Sleep(time.Hour)
			cancel()
			time.Sleep(took)
			synctest.Wait()
			ended()
			if n := strings.Count(told.String(), "second signal"); n != want {
				t.Errorf("%v: told %q", took, told.String())
			}
		})
	}
}

// Two names for a QEMU are none.
func TestTwoTargets(t *testing.T) {
	both := Target{QMP: "/run/qmp", Domain: "web1"}
	if _, _, err := Track(t.Context(), both, TrackOptions{Interval: 1}); !errors.Is(err, ErrTwoTargets) {
		t.Error(err)
	}
	if _, err := both.dial(t.Context(), qmp.Options{}); !errors.Is(err, ErrTwoTargets) {
		t.Error(err)
	}
	if !both.Given() || (Target{Connect: "x"}).Given() {
		t.Error("what is given")
	}
}

// Nothing is changed in QEMU before there is a process that puts it right. It ends with the
// checkpoint, but goes to work if QEMU is not as it should be. Without it there is no checkpoint.
func TestCheckpointIsGuarded(t *testing.T) {
	broken := errors.New("no process")
	for name, c := range map[string]struct {
		starts       error // of the guard
		fails, stays bool  // as of machine
		then         migration.Then
		ends         string // how the guard does
		saved        bool
	}{
		"saved":                     {ends: "released", saved: true},
		"not started":               {starts: broken},
		"fails":                     {fails: true, ends: "released"},
		"saved, and left":           {stays: true, ends: "left", saved: true},
		"fails, and left":           {stays: true, fails: true, ends: "left"},
		"saved, and paused as told": {stays: true, then: migration.ThenPause, ends: "released", saved: true},
	} {
		t.Run(name, func(t *testing.T) {
			s := tiertest.New(tiertest.Options{Seed: 1, Blocks: []tiertest.Block{{Name: "pc.ram", Size: 1 << 20}}, ReturnPath: true})
			q := &machine{stream: s.Bytes(), running: true, status: "none", fails: c.fails, stays: c.stays}
			l, err := net.Listen("unix", t.TempDir()+"/qmp")
			ok(t, err)
			m := qmptest.Serve(t, l, q.serve(t))
			st, err := store.Open(t.Context(), vfs.OS, t.TempDir()+"/store", true)
			ok(t, err)
			var sent []string
			ends := ""
			rep, err := Checkpoint(t.Context(), vfs.OS, st, Target{QMP: m.Addr}, CheckpointOptions{
				Guest: migration.CheckpointOptions{Mode: migration.ModeStop, Then: c.then},
				Save:  save.Options{VM: "vm"},
				PutRight: func(Target) (*Guard, error) {
					time.Sleep(100 * time.Millisecond) // until the disks are known
					q.mu.Lock()
					defer q.mu.Unlock()
					sent = slices.Clone(q.sent)
					return &Guard{Release: func() { ends += "released" }, Leave: func() { ends += "left" }}, c.starts
				},
				Log: slog.New(slog.DiscardHandler),
			})
			q.writing.Wait()
			if fine := name == "saved" || c.then != ""; (err == nil) != fine || c.starts != nil && !errors.Is(err, c.starts) || rep.Saved != c.saved || ends != c.ends {
				t.Errorf("%v, saved %v, the guard was %q", err, rep.Saved, ends)
			}
			for _, changes := range []string{"stop", "migrate", "migrate-set-parameters", "migrate-set-capabilities"} {
				if slices.Contains(sent, changes) || c.starts != nil && slices.Contains(q.sent, changes) {
					t.Errorf("%v before there was a guard, %v in all", sent, q.sent)
				}
			}
			if !slices.Contains(sent, "query-block") {
				t.Errorf("the disks were not asked for meanwhile, but %v", sent)
			}
		})
	}
}

// stoppedMark is max-bandwidth while a guest stands still for a checkpoint (package migration).
const stoppedMark = float64(1<<40 + 0xf11c + 1)

// TestPutRightInsists: what a killed checkpoint has left is put right also if QEMU does not serve
// its monitor at once, or refuses once.
func TestPutRightInsists(t *testing.T) {
	q := &armedMachine{status: "failed", paused: true, refuses: 1, parameters: map[string]any{"max-bandwidth": stoppedMark, "downtime-limit": 300.0}}
	connected := 0
	target := Target{QMP: qmptest.New(t, func(c *qmptest.Conn) {
		if connected++; connected > 1 {
			q.serve(c)
		}
	}).Addr}
	ok(t, PutRight(target))
	if q.paused || q.parameters["max-bandwidth"] == stoppedMark {
		t.Errorf("the guest stands still: %v, settings %v", q.paused, q.parameters)
	}
}

// TestInsist: a QEMU is tried for as long as there is one, and no longer than the limit.
func TestInsist(t *testing.T) {
	busy := &qmp.OpError{Op: "connect", Err: qmp.ErrBusy}
	gone := &qmp.OpError{Op: "connect", Err: syscall.ECONNREFUSED}
	inactive := &qmp.OpError{Op: "domain web1", Err: domain.ErrInactive}
	own, libvirts := Target{QMP: "web1.qmp"}, Target{Domain: "web1"}
	for name, c := range map[string]struct {
		target Target
		is     error
		takes  time.Duration // until it ends so
		end    error
		want   error
	}{
		"free after a while":               {own, busy, putRightLimit / 2, nil, nil},
		"ends after a while":               {own, busy, putRightLimit / 2, gone, nil},
		"somebody's all the time":          {own, busy, 2 * putRightLimit, nil, qmp.ErrBusy},
		"libvirt is away for a while":      {libvirts, gone, putRightLimit / 2, nil, nil},
		"and then knows that it has ended": {libvirts, gone, putRightLimit / 2, inactive, nil},
		"libvirt is away, all the time":    {libvirts, gone, 2 * putRightLimit, nil, syscall.ECONNREFUSED},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				begun := time.Now()
				err := c.target.insist(putRightLimit, func(ctx context.Context) error {
					if time.Since(begun) >= c.takes {
						return c.end
					}
					select {
					case <-time.After(5 * time.Second):
					case <-ctx.Done():
					}
					return c.is
				})
				if took := time.Since(begun); !errors.Is(err, c.want) || (err == nil) != (c.want == nil) || took > min(c.takes, putRightLimit)+6*time.Second {
					t.Errorf("%v after %v", err, took)
				}
			})
		})
	}
}
