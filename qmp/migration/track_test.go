package migration

import (
	"context"
	"errors"
	"io"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/stream"
)

const (
	trackOn   = `migrate-set-capabilities{"capabilities":[{"capability":"events","state":true},{"capability":"pause-before-switchover","state":true},{"capability":"return-path","state":false}]}`
	trackBack = `migrate-set-capabilities{"capabilities":[{"capability":"events","state":false},{"capability":"pause-before-switchover","state":false},{"capability":"return-path","state":true}]}`
	paramOn   = `migrate-set-parameters{"downtime-limit":1,"max-bandwidth":1099511689500}`
	paramBack = `migrate-set-parameters{"downtime-limit":300,"max-bandwidth":134217728}`
)

// tracked is a QEMU with a running guest whose migration goes through these
// states.
func tracked(states ...string) *recorder {
	list := []string{`{}`}
	for _, s := range states {
		if s != "lost" {
			s = `{"status": "` + s + `"}`
		}
		list = append(list, s)
	}
	return &recorder{answers: map[string][]string{
		"query-migrate":              list,
		"query-yank":                 {`[]`},
		"query-status":               {`{"status": "running", "running": true}`},
		"query-migrate-capabilities": {`[{"capability":"events","state":false},{"capability":"pause-before-switchover","state":false},{"capability":"return-path","state":true},{"capability":"xbzrle","state":false}]`},
		"query-migrate-parameters":   {`{"max-bandwidth": 134217728, "downtime-limit": 300, "tls-creds": ""}`},
	}}
}

// opened is an OpenFunc whose stream is a pipe that has ended already, or that
// nobody writes to or closes.
func opened(t *testing.T, ended bool) OpenFunc {
	return func(context.Context, qmp.Executor, Direction) (*Channel, error) {
		r, w, err := os.Pipe()
		if err != nil {
			return nil, err
		}
		if ended {
			w.Close()
		} else {
			t.Cleanup(func() { w.Close() })
		}
		return &Channel{
			URI:     "fd:test",
			accept:  func(context.Context) (*os.File, error) { return r, nil },
			discard: func(context.Context) {},
		}, nil
	}
}

// drains is a consumer that reads to the end.
func drains(ctx context.Context, f *os.File) error {
	stop := context.AfterFunc(ctx, func() { f.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	_, err := io.Copy(io.Discard, f)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}

// restored fails the test unless the last commands put everything back.
func restored(t *testing.T, what string, sent []string, last ...string) {
	t.Helper()
	if n := len(sent) - len(last); n < 0 || !slices.Equal(sent[n:], last) {
		t.Errorf("%s: sent\n%s\nwant at its end\n%s", what, strings.Join(sent, "\n"), strings.Join(last, "\n"))
	}
}

// Whatever happens, settings are as before at the end, and a migration that was
// begun has been cancelled.
func TestTrackRestores(t *testing.T) {
	var failed *Error
	broken := errors.New("not what was expected")
	fails := func(context.Context, *os.File) error { return broken }
	waits := func(ctx context.Context, _ *os.File) error { <-ctx.Done(); return ctx.Err() }
	for name, test := range map[string]struct {
		x      *recorder
		ended  bool // the stream
		filter Consumer
		want   func(error) bool
	}{
		"nothing left":      {tracked("active", "pre-switchover", "cancelled"), true, drains, func(err error) bool { return err == nil }},
		"seen enough":       {tracked("active", "cancelled"), true, func(context.Context, *os.File) error { return nil }, func(err error) bool { return err == nil }},
		"the filter fails":  {tracked("active", "cancelled"), true, fails, func(err error) bool { return errors.Is(err, broken) }},
		"both fail":         {tracked("active", "failed"), true, fails, func(err error) bool { return errors.Is(err, broken) }},
		"QEMU fails, alone": {tracked("active", "failed"), false, waits, func(err error) bool { return errors.As(err, &failed) }},
		"it completed":      {tracked("active", "completed", "completed"), false, waits, func(err error) bool { return err != nil }},
	} {
		_, err := Track(t.Context(), test.x, TrackOptions{Open: opened(t, test.ended), Filter: test.filter})
		if !test.want(err) {
			t.Errorf("%s: %v", name, err)
		}
		if !slices.Contains(test.x.sent, trackOn) || !slices.Contains(test.x.sent, paramOn) || !slices.Contains(test.x.sent, "migrate_cancel") {
			t.Errorf("%s: sent %s", name, strings.Join(test.x.sent, "\n"))
		}
		restored(t, name, test.x.sent, trackBack, paramBack)
	}
}

func TestTrackRefuses(t *testing.T) {
	busy := tracked()
	busy.answers["query-migrate"] = []string{`{"status": "active"}`}
	paused := tracked()
	paused.answers["query-status"] = []string{`{"status": "paused", "running": false}`}
	for want, x := range map[error]*recorder{ErrMigrating: busy, ErrNotRunning: paused} {
		if _, err := Track(t.Context(), x, TrackOptions{}); !errors.Is(err, want) {
			t.Errorf("%v, want %v", err, want)
		}
		for _, s := range x.sent {
			if !strings.HasPrefix(s, "query-") {
				t.Errorf("%v: sent %s", want, s)
			}
		}
	}
}

// A context that ends makes the filter end, and settings come back.
func TestTrackCancelled(t *testing.T) {
	x := tracked("active", "active", "active", "cancelled")
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	_, err := Track(ctx, x, TrackOptions{Open: opened(t, false), Filter: drains})
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
	restored(t, "cancelled", x.sent, trackBack, paramBack)
}

func TestTrackRedials(t *testing.T) {
	x, again := tracked("active", "lost"), tracked("cancelled")
	x.answers["migrate_cancel"] = []string{"lost"}
	again.answers["query-migrate"] = []string{`{"status": "cancelled"}`}
	again.answers["query-status"] = []string{`{"status": "paused"}`}
	_, err := Track(t.Context(), x, TrackOptions{Open: opened(t, false), Filter: drains,
		Redial: func(context.Context) (qmp.Executor, error) { return again, nil }})
	if !errors.Is(err, qmp.ErrLost) {
		t.Errorf("got %v", err)
	}
	restored(t, "redialled", again.sent, "migrate_cancel", "query-migrate", "query-status", "cont", "query-yank", trackBack, paramBack)
}

// What a killed process has left is not taken for the user's settings, and what
// waits for it is ended.
func TestTrackAfterKill(t *testing.T) {
	x := tracked("pre-switchover")
	x.answers["query-migrate-capabilities"] = []string{`[{"capability":"events","state":true},{"capability":"pause-before-switchover","state":true},{"capability":"return-path","state":false}]`}
	x.answers["query-migrate-parameters"] = []string{`{"max-bandwidth": 1099511689500, "downtime-limit": 1}`}
	x.answers["query-migrate"] = []string{`{"status": "pre-switchover"}`}
	x.onSend = func(line string) {
		if line == "migrate_cancel" {
			x.answers["query-migrate"] = []string{`{"status": "cancelled"}`}
		}
	}
	if _, err := Track(t.Context(), x, TrackOptions{Open: opened(t, true), Filter: func(context.Context, *os.File) error { return nil }}); err != nil {
		t.Fatal(err)
	}
	restored(t, "after a kill", x.sent, `migrate-set-capabilities{"capabilities":[{"capability":"events","state":false},{"capability":"pause-before-switchover","state":false}]}`, paramBack)
}

func TestPauses(t *testing.T) {
	events := make(chan qmp.Event, 8)
	for _, e := range []struct {
		name string
		us   int64
	}{{"RESUME", 1}, {"STOP", 100}, {"MIGRATION", 200}, {"RESUME", 3100}, {"STOP", 4000}, {"RESUME", 5000}} {
		ev := qmp.Event{Event: e.name}
		ev.Timestamp.Microseconds = e.us
		events <- ev
	}
	if d, first, whole := pauses(events); d != 4*time.Millisecond || !whole || !first.Equal(time.UnixMicro(100)) {
		t.Errorf("stopped for %v, from %v, %v", d, first, whole)
	}
	left := qmp.Event{Event: "STOP"}
	left.Timestamp.Seconds = 1
	events <- left
	if d, _, whole := pauses(events); d != 0 || whole {
		t.Errorf("left in one: %v, %v", d, whole)
	}
}

// The cause comes first: QEMU's failure if the stream has ended too early, and the
// consumer's if it could not go on.
func TestCauseFirst(t *testing.T) {
	ended := &Error{Status: StatusFailed, Desc: "Unable to write to socket: Broken pipe"}
	for _, c := range []struct {
		err  error
		want string
	}{
		{&os.PathError{Op: "write", Path: "/s/tmp/vm.part", Err: syscall.ENOSPC},
			"write /s/tmp/vm.part: no space left on device (qmp: migration failed: Unable to write to socket: Broken pipe)"},
		{stream.Wrap("page", 9, io.EOF), "qmp: migration failed: Unable to write to socket: Broken pipe: page at offset 9: migration stream is truncated"},
	} {
		err := (&drive{err: c.err}).because(ended)
		if err.Error() != c.want {
			t.Errorf("%q, want %q", err, c.want)
		}
		if e := (*Error)(nil); !errors.As(err, &e) || !errors.Is(err, c.err) {
			t.Errorf("%v is not both failures", err)
		}
	}
}
