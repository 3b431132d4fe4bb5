package qmp

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"
)

const (
	trackOn   = `migrate-set-capabilities{"capabilities":[{"capability":"events","state":true},{"capability":"pause-before-switchover","state":true},{"capability":"return-path","state":false}]}`
	trackBack = `migrate-set-capabilities{"capabilities":[{"capability":"events","state":false},{"capability":"pause-before-switchover","state":false},{"capability":"return-path","state":true}]}`
	paramBack = `migrate-set-parameters{"downtime-limit":300,"max-bandwidth":134217728}`
)

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
		"query-status":               {`{"status": "running", "running": true}`},
		"query-migrate-capabilities": {`[{"capability":"events","state":false},{"capability":"pause-before-switchover","state":false},{"capability":"return-path","state":true},{"capability":"xbzrle","state":false}]`},
		"query-migrate-parameters":   {`{"max-bandwidth": 134217728, "downtime-limit": 300, "tls-creds": ""}`},
	}}
}

// Whatever happens, settings are as before at the end, and a migration that was
// begun has been cancelled.
func TestTrackRestores(t *testing.T) {
	var failed *MigrationError
	for name, test := range map[string]struct {
		x    *recorder
		want func(error) bool
	}{
		"nothing left":     {tracked("active", "pre-switchover", "cancelled"), func(err error) bool { return err == nil }},
		"the filter ended": {tracked("active", "failed", "failed"), func(err error) bool { return errors.As(err, &failed) }},
		"it completed":     {tracked("active", "completed", "completed"), func(err error) bool { return err != nil }},
	} {
		_, err := Track(t.Context(), test.x, TrackOptions{URI: "exec:x"})
		if !test.want(err) {
			t.Errorf("%s: %v", name, err)
		}
		sent := test.x.sent
		if !slices.Contains(sent, trackOn) || !slices.Contains(sent, "migrate_cancel") || len(sent) < 2 ||
			sent[len(sent)-2] != paramBack || sent[len(sent)-1] != trackBack {
			t.Errorf("%s: sent %s", name, strings.Join(sent, "\n"))
		}
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

// A context that ends makes the child end, and settings come back.
func TestTrackCancelled(t *testing.T) {
	x := tracked("active", "active", "active", "cancelled")
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	aborted := false
	_, err := Track(ctx, x, TrackOptions{Abort: func() { aborted = true }})
	if !errors.Is(err, context.DeadlineExceeded) || !aborted || x.sent[len(x.sent)-1] != trackBack {
		t.Errorf("%v, aborted %v, sent %v", err, aborted, x.sent)
	}
}

func TestTrackRedials(t *testing.T) {
	x, again := tracked("active", "lost"), tracked("cancelled")
	x.answers["migrate_cancel"] = []string{"lost"}
	again.answers["query-migrate"] = []string{`{"status": "cancelled"}`}
	x.answers["migrate-set-parameters"] = []string{`{}`, "lost"}
	_, err := Track(t.Context(), x, TrackOptions{Redial: func(context.Context) (Executor, error) { return again, nil }})
	if !errors.Is(err, ErrLost) {
		t.Errorf("got %v", err)
	}
	if n := len(again.sent); !slices.Contains(again.sent, "migrate_cancel") || again.sent[n-1] != trackBack || again.sent[n-2] != paramBack {
		t.Errorf("sent %v", again.sent)
	}
}

func TestStoppedFor(t *testing.T) {
	events := make(chan Event, 8)
	for _, e := range []struct {
		name string
		us   int64
	}{{"RESUME", 1}, {"STOP", 100}, {"MIGRATION", 200}, {"RESUME", 3100}, {"STOP", 4000}, {"RESUME", 5000}} {
		ev := Event{Event: e.name}
		ev.Timestamp.Microseconds = e.us
		events <- ev
	}
	if d := stoppedFor(events); d != 4*time.Millisecond {
		t.Errorf("stopped for %v", d)
	}
}
