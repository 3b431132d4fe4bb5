package migration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/qmptest"
)

// versioned is a QEMU of some version that describes its migrate-incoming.
type versioned struct {
	version qmp.Version
	members string // its arguments, as JSON
	sent    []string
}

func (q *versioned) Version() qmp.Version { return q.version }

func (q *versioned) Events(context.Context) (<-chan qmp.Event, error) { return nil, errors.New("none") }

func (q *versioned) Execute(_ context.Context, command string, args, result any) error {
	b, err := json.Marshal(args)
	q.sent = append(q.sent, command+" "+string(b))
	if command == "query-qmp-schema" {
		err = errors.Join(err, json.Unmarshal([]byte(`[
			{"name": "0", "meta-type": "object", "members": [{"name": "channels"}, {"name": "exit-on-error"}]},
			{"name": "1", "meta-type": "object", "members": `+q.members+`},
			{"name": "migrate", "meta-type": "command", "arg-type": "0"},
			{"name": "migrate-incoming", "meta-type": "command", "arg-type": "1"}]`), result))
	}
	return err
}

// TestIncoming: a QEMU is asked for what it has. It stays after a failure only where no
// guest can have run.
func TestIncoming(t *testing.T) {
	at := map[string]place{"fd": {uri: "fd:x"}, "exec": {command: []string{"/bin/flic migrate", "a"}}}
	const (
		uri   = `"uri":"exec:exec '/bin/flic migrate' a"`
		argv  = `"channels":[{"addr":{"args":["/bin/flic migrate","a"],"transport":"exec"},"channel-type":"main"}]`
		stays = `"exit-on-error":false`
	)
	for _, test := range []struct {
		major, minor int
		members      string
		eager, exec  string
	}{
		{7, 2, `[{"name": "exit-on-error"}, {"name": "channels"}]`, `{"uri":"fd:x"}`, "{" + uri + "}"}, // is not asked
		{8, 2, `[{"name": "uri"}, {"name": "channels"}]`, `{"uri":"fd:x"}`, "{" + argv + "}"},
		{9, 1, `[{"name": "uri"}, {"name": "channels"}, {"name": "exit-on-error"}]`, `{` + stays + `,"uri":"fd:x"}`, "{" + argv + "," + stays + "}"},
		{12, 0, `[{"name": "uri"}]`, `{"uri":"fd:x"}`, "{" + uri + "}"},
	} {
		for kind, want := range map[string]string{"fd": test.eager, "exec": test.exec} {
			for _, lazy := range []bool{false, true} {
				q := &versioned{members: test.members}
				q.version.QEMU.Major, q.version.QEMU.Minor = test.major, test.minor
				stay, err := incoming(t.Context(), q, at[kind], lazy)
				if lazy {
					want = strings.Trim(strings.ReplaceAll(strings.ReplaceAll(want, ","+stays, ""), stays+",", ""), ",")
				}
				if got := q.sent[len(q.sent)-1]; err != nil || got != "migrate-incoming "+want || stay != strings.Contains(want, stays) {
					t.Errorf("%d.%d, lazy %v: %v, stays %v: %s, want %s", test.major, test.minor, lazy, err, stay, got, want)
				}
			}
		}
	}
}

// loading is a QEMU that has been told to load.
type loading struct {
	status    Status
	desc      string
	quits     int
	forgotten bool // it does not end
}

func (q *loading) Events(context.Context) (<-chan qmp.Event, error) { return nil, errors.New("none") }

func (q *loading) Execute(_ context.Context, command string, _, result any) error {
	switch command {
	case "query-status":
		*result.(*qmp.RunState) = qmp.RunState{Status: "inmigrate"}
	case "query-migrate":
		*result.(*Info) = Info{Status: q.status, ErrorDesc: q.desc}
	case "quit":
		if q.quits++; q.forgotten {
			return errors.New("not now")
		}
		return qmp.ErrLost
	}
	return nil
}

// TestDeviceFails: a QEMU that answers while it should be loading devices has failed to
// load one; one that loads something else is waited for.
func TestDeviceFails(t *testing.T) {
	defer func(was time.Duration) { deviceTime = was }(deviceTime)
	deviceTime = 100 * time.Millisecond
	q := &loading{status: StatusPostcopyDevice}
	if err := leaveInmigrate(t.Context(), q, true); !errors.Is(err, errDevice) || !errors.Is(err, ErrBeforeRun) {
		t.Error(err)
	}
	for status, lazy := range map[Status]bool{StatusPostcopyDevice: false, StatusActive: true, "postcopy-something": true} {
		ctx, cancel := context.WithTimeout(t.Context(), 1500*time.Millisecond)
		if err := leaveInmigrate(ctx, &loading{status: status}, lazy); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: %v", status, err)
		}
		cancel()
	}

	// It is asked for its reason, and ended.
	for _, q := range []*loading{{status: StatusFailed, desc: "no such device"}, {status: StatusPostcopyDevice}, {status: StatusFailed, desc: "x", forgotten: true}} {
		err := giveUp(t.Context(), q, errDevice)
		if !errors.Is(err, ErrBeforeRun) || q.quits != 1 || q.forgotten != strings.Contains(err.Error(), "not now") {
			t.Errorf("%+v: %v", q, err)
		}
		if !strings.Contains(err.Error(), q.desc) || errors.Is(err, errDevice) != (q.desc == "") {
			t.Errorf("%+v: %v", q, err)
		}
	}
}

// TestBecause: what is said of a guest depends on whether it can have run.
func TestBecause(t *testing.T) {
	watched, cancel := context.WithCancelCause(t.Context())
	cancel(errGaveUp)
	for _, loaded := range []bool{false, true} {
		o := ResumeOptions{loaded: loaded}
		if err := o.because(watched, context.Canceled); errors.Is(err, ErrBeforeRun) == loaded || !errors.Is(err, errGaveUp) {
			t.Errorf("loaded %v: %v", loaded, err)
		}
	}
}

// TestRecoverStatuses: a recovery has succeeded when QEMU says so, and in no state that
// it may only pass through, known or not.
func TestRecoverStatuses(t *testing.T) {
	for end, want := range map[Status]bool{StatusPostcopyActive: true, StatusCompleted: true, StatusFailed: false} {
		states := []Status{StatusPostcopyPaused, StatusPostcopyRecoverSetup, StatusNone, StatusPostcopyRecover, "postcopy-something", end}
		var mu sync.Mutex
		at := 0
		f := qmptest.New(t, qmptest.Negotiated(func(c *qmptest.Conn, cmd qmptest.Command) {
			mu.Lock()
			defer mu.Unlock()
			if cmd.Execute == "query-migrate" {
				c.Reply(cmd, fmt.Sprintf(`{"status": %q}`, states[at]))
				at = min(at+1, len(states)-1)
				return
			}
			c.Reply(cmd, "{}")
		}))
		m := dial(t, f, qmp.Options{OOB: true})
		o := ResumeOptions{Command: func(ServerKind) []string { return []string{"server"} }}
		err := o.recoverPaused(t.Context(), m)
		mu.Lock()
		if (err == nil) != want || at != len(states)-1 {
			t.Errorf("%s: %v after %v", end, err, states[:at+1])
		}
		mu.Unlock()
	}
	if !slices.ContainsFunc([]Status{StatusFailed, StatusCancelled}, Status.Ended) || StatusFailing.Ended() || StatusPostcopyDevice.Ended() || Status("new").Ended() {
		t.Error("what has ended?")
	}
}
