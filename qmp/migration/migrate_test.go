package migration

import (
	"context"
	"encoding/json"
	"errors"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/qmptest"
)

// recorder is an Executor that answers from a script, a list for each command,
// of which the last is given again and again.
type recorder struct {
	answers map[string][]string
	events  chan qmp.Event
	sent    []string
	onSend  func(string) // called with each
}

func (r *recorder) Execute(ctx context.Context, name string, args, result any) error {
	line := name
	if args != nil {
		b, err := json.Marshal(args)
		if err != nil {
			return err
		}
		line += string(b)
	}
	r.sent = append(r.sent, line)
	if r.onSend != nil {
		r.onSend(line)
	}
	answer := `{}`
	if a := r.answers[name]; len(a) > 0 {
		answer = a[0]
		if len(a) > 1 {
			r.answers[name] = a[1:]
		}
	}
	switch answer {
	case "timeout":
		return &qmp.OpError{Op: name, Err: context.DeadlineExceeded}
	case "lost":
		return &qmp.OpError{Op: name, Err: qmp.ErrLost}
	}
	if result == nil {
		return nil
	}
	return json.Unmarshal([]byte(answer), result)
}

func (r *recorder) Events(context.Context) (<-chan qmp.Event, error) {
	if r.events == nil {
		return nil, errors.New("no events here")
	}
	return r.events, nil
}

// What each helper puts on the wire.
func TestCommands(t *testing.T) {
	ctx := t.Context()
	for _, test := range []struct {
		run  func(qmp.Executor) error
		want string
	}{
		{func(x qmp.Executor) error { return Start(ctx, x, "exec:cat > f") }, `migrate{"uri":"exec:cat \u003e f"}`},
		{func(x qmp.Executor) error { return Incoming(ctx, x, "defer") }, `migrate-incoming{"uri":"defer"}`},
		{func(x qmp.Executor) error { return Cancel(ctx, x) }, `migrate_cancel`},
		{func(x qmp.Executor) error {
			return SetCapabilities(ctx, x, map[string]bool{"xbzrle": true, "events": false})
		},
			`migrate-set-capabilities{"capabilities":[{"capability":"events","state":false},{"capability":"xbzrle","state":true}]}`},
		{func(x qmp.Executor) error {
			return SetParameters(ctx, x, map[string]any{"max-bandwidth": uint64(1) << 40})
		},
			`migrate-set-parameters{"max-bandwidth":1099511627776}`},
		{func(x qmp.Executor) error { return qmp.Stop(ctx, x) }, `stop`},
		{func(x qmp.Executor) error { return qmp.Cont(ctx, x) }, `cont`},
		{func(x qmp.Executor) error { return qmp.Quit(ctx, x) }, `quit`},
		{func(x qmp.Executor) error { return qmp.PMemSave(ctx, x, 1<<20, 4096, "/tmp/f") }, `pmemsave{"filename":"/tmp/f","size":4096,"val":1048576}`},
	} {
		r := &recorder{}
		if err := test.run(r); err != nil {
			t.Fatal(err)
		}
		if len(r.sent) != 1 || r.sent[0] != test.want {
			t.Errorf("sent %q\nwant %q", r.sent, test.want)
		}
	}
}

func TestQueries(t *testing.T) {
	r := &recorder{answers: map[string][]string{
		// As QEMU 7.2 writes it, with fields this package does not know, and one of QEMU
		// 11.1 as libvirt 12.8 hands it on.
		"query-migrate": {`{}`, `{"status": "completed", "setup-time": 2, "downtime": 32, "total-time": 501,
			"expected-downtime": 9223372036854776000,
			"ram": {"total": 554246144, "postcopy-requests": 0, "dirty-sync-count": 3, "page-size": 4096,
			"remaining": 0, "mbps": 4058.04, "transferred": 254006470, "duplicate": 73583, "dirty-pages-rate": 7,
			"normal-bytes": 252850176, "normal": 61731, "downtime-bytes": 1}, "socket-address": []}`},
		"query-status":               {`{"status": "postmigrate", "singlestep": false, "running": false}`},
		"query-migrate-capabilities": {`[{"state": true, "capability": "xbzrle"}, {"state": false, "capability": "events"}]`},
		"query-migrate-parameters":   {`{"max-bandwidth": 134217728, "tls-creds": ""}`},
		"human-monitor-command":      {`"line\r\n"`},
	}}
	ctx := t.Context()
	info, err := Query(ctx, r)
	if err != nil || info.Status != StatusNone {
		t.Errorf("never migrated: %+v, %v", info, err)
	}
	info, err = Query(ctx, r)
	want := Info{Status: StatusCompleted, Downtime: 32, RAM: &RAMStats{
		Total: 554246144, Transferred: 254006470, PageSize: 4096, DirtySyncCount: 3, Mbps: 4058.04}}
	if err != nil || !reflect.DeepEqual(info, want) {
		t.Errorf("got %+v %+v, %v", info, info.RAM, err)
	}
	if s, err := qmp.QueryStatus(ctx, r); err != nil || s != (qmp.RunState{Status: "postmigrate"}) {
		t.Errorf("QueryStatus: %+v, %v", s, err)
	}
	if c, err := Capabilities(ctx, r); err != nil || !c["xbzrle"] || c["events"] || len(c) != 2 {
		t.Errorf("Capabilities: %v, %v", c, err)
	}
	if p, err := Parameters(ctx, r); err != nil || string(p["max-bandwidth"]) != "134217728" {
		t.Errorf("Parameters: %v, %v", p, err)
	}
	text, err := qmp.HumanMonitor(ctx, r, "info ramblock")
	if err != nil || text != "line\r\n" {
		t.Errorf("HumanMonitor: %q, %v", text, err)
	}
	if last := r.sent[len(r.sent)-1]; last != `human-monitor-command{"command-line":"info ramblock"}` {
		t.Errorf("sent %s", last)
	}
}

func TestWait(t *testing.T) {
	status := func(s Status) string { return `{"status": "` + string(s) + `"}` }
	for name, test := range map[string]struct {
		answers []string
		until   []Status
		end     Status // when there is no error
		failed  *Error
	}{
		"completes":               {answers: []string{`{}`, status("setup"), status("active"), status("device"), status("completed")}, end: StatusCompleted},
		"unknown state is passed": {answers: []string{status("wait-unplug"), status("brand-new"), status("completed")}, end: StatusCompleted},
		"an unanswered question":  {answers: []string{status("active"), "timeout", status("completed")}, end: StatusCompleted},
		"stops where told":        {answers: []string{status("active"), status("pre-switchover"), status("active")}, until: []Status{StatusPreSwitchover}, end: StatusPreSwitchover},
		"a wanted failure":        {answers: []string{status("failed")}, until: []Status{StatusFailed}, end: StatusFailed},
		"fails": {answers: []string{status("active"), `{"status": "failed", "error-desc": "Unable to write to command: Broken pipe"}`},
			failed: &Error{Status: StatusFailed, Desc: "Unable to write to command: Broken pipe"}},
		"fails without a word": {answers: []string{status("failed")}, failed: &Error{Status: StatusFailed}},
		"is cancelled":         {answers: []string{status("cancelling"), status("cancelled")}, failed: &Error{Status: StatusCancelled}},
		"completes although something else was wanted": {answers: []string{status("completed")}, until: []Status{StatusPreSwitchover}, end: StatusCompleted},
	} {
		t.Run(name, func(t *testing.T) {
			r := &recorder{answers: map[string][]string{"query-migrate": test.answers}}
			info, err := Wait(t.Context(), r, test.until...)
			if test.failed != nil {
				var failed *Error
				if !errors.As(err, &failed) || *failed != *test.failed {
					t.Fatalf("got %v, want %v", err, test.failed)
				}
				qmptest.Mention(t, err, string(test.failed.Status), test.failed.Desc)
				return
			}
			if err != nil || info.Status != test.end {
				t.Fatalf("got %+v, %v, want %s", info, err, test.end)
			}
		})
	}
}

func TestWaitEnds(t *testing.T) {
	active := map[string][]string{"query-migrate": {`{"status": "active"}`}}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := Wait(ctx, &recorder{answers: active}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	lost := map[string][]string{"query-migrate": {`{"status": "active"}`, "lost"}}
	if _, err := Wait(t.Context(), &recorder{answers: lost}); !errors.Is(err, qmp.ErrLost) {
		t.Errorf("got %v", err)
	}
}

// An event makes the next question come at once; a channel that has ended must
// not make Wait spin.
func TestWaitEvent(t *testing.T) {
	events := make(chan qmp.Event, 2)
	// More than once, because a busy host may be late by itself.
	fastest := time.Hour
	for range 10 {
		events <- qmp.Event{Event: "STOP"}
		events <- qmp.Event{Event: "MIGRATION"}
		start := time.Now()
		if _, err := waitEvent(t.Context(), events, "MIGRATION"); err != nil {
			t.Fatal(err)
		}
		fastest = min(fastest, time.Since(start))
		for len(events) > 0 {
			<-events
		}
	}
	if fastest >= pollInterval {
		t.Errorf("woken after %v in spite of the event", fastest)
	}
	close(events)
	start := time.Now()
	rest, err := waitEvent(t.Context(), events, "MIGRATION")
	if err != nil || rest != nil {
		t.Errorf("got %v, %v, want a nil channel", rest, err)
	}
	if d := time.Since(start); d < pollInterval {
		t.Errorf("asked again after %v", d)
	}
}

// Over a real connection: the listener of Wait does not stay.
func TestWaitLeavesNoReader(t *testing.T) {
	f := qmptest.New(t, qmptest.Negotiated(func(c *qmptest.Conn, cmd qmptest.Command) {
		c.Event("MIGRATION")
		c.Reply(cmd, `{"status": "completed"}`)
	}))
	m := &listened{Monitor: dial(t, f, qmp.Options{})}
	for range 3 {
		if _, err := Wait(context.Background(), m); err != nil {
			t.Fatal(err)
		}
	}
	if len(m.channels) != 3 {
		t.Errorf("%d readers in 3 waits", len(m.channels))
	}
	for _, events := range m.channels {
		for open := true; open; {
			select {
			case _, open = <-events:
			case <-time.After(5 * time.Second):
				t.Fatal("a reader is left")
			}
		}
	}
}

// listened is a monitor that keeps the channels of events that it has given out.
type listened struct {
	*qmp.Monitor
	channels []<-chan qmp.Event
}

func (l *listened) Events(ctx context.Context) (<-chan qmp.Event, error) {
	events, err := l.Monitor.Events(ctx)
	l.channels = append(l.channels, events)
	return events, err
}

func TestStatusEnded(t *testing.T) {
	ended := []Status{StatusCompleted, StatusFailed, StatusCancelled}
	for _, s := range []Status{StatusNone, StatusSetup, StatusActive, StatusPreSwitchover, StatusDevice,
		StatusPostcopyActive, StatusPostcopyPaused, StatusCancelling, StatusCancelled, StatusCompleted, StatusFailed, "new"} {
		if s.Ended() != slices.Contains(ended, s) {
			t.Errorf("%s: Ended is %v", s, s.Ended())
		}
	}
}
