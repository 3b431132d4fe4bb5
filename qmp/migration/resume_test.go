package migration

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/qmptest"
)

// runState is a QEMU that has nothing but a run state.
type runState struct {
	qmp.RunState
	asked []string
}

func (q *runState) Events(context.Context) (<-chan qmp.Event, error) { return nil, errors.New("none") }

func (q *runState) Execute(ctx context.Context, command string, _, result any) error {
	q.asked = append(q.asked, command)
	switch command {
	case "cont":
		q.RunState = qmp.RunState{Status: "running", Running: true}
	case "stop":
		q.RunState = qmp.RunState{Status: "paused"}
	case "query-status":
		*result.(*qmp.RunState) = q.RunState
	}
	return nil
}

// TestPatient: a guest is let run by a QEMU that does not answer for longer than
// others may take, and is asked only once.
func TestPatient(t *testing.T) {
	var mu sync.Mutex
	var asked []string
	f := qmptest.New(t, qmptest.Negotiated(func(c *qmptest.Conn, cmd qmptest.Command) {
		mu.Lock()
		defer mu.Unlock()
		asked = append(asked, cmd.Execute)
		if cmd.Execute == "cont" {
			time.Sleep(200 * time.Millisecond)
		}
		c.Reply(cmd, fmt.Sprintf(`{"status": "paused", "running": %v}`, len(asked) > 1))
	}))
	m := dial(t, f, qmp.Options{Timeout: 20 * time.Millisecond})
	ctx, cancel := patient(t.Context())
	defer cancel()
	var rep ResumeReport
	if err := new(ResumeOptions).run(ctx, m, time.Now(), &rep); err != nil || rep.Running < 200*time.Millisecond {
		t.Errorf("%v, %+v", err, rep)
	}
	mu.Lock()
	defer mu.Unlock()
	if want := []string{"query-status", "cont", "query-status"}; !slices.Equal(asked, want) {
		t.Errorf("asked %v", asked)
	}
}

// TestRunLeavesAlone: who recovers does not stop a guest that was to stay paused and
// that somebody has let run since; who resumes does.
func TestRunLeavesAlone(t *testing.T) {
	for _, recovering := range []bool{false, true} {
		q := &runState{RunState: qmp.RunState{Status: "running", Running: true}}
		o := ResumeOptions{Paused: true, recovering: recovering}
		var rep ResumeReport
		if err := o.run(t.Context(), q, time.Now(), &rep); err != nil {
			t.Fatal(err)
		}
		if stopped := slices.Contains(q.asked, "stop"); stopped == recovering || (rep.Warnings != nil) == recovering {
			t.Errorf("recovering %v: %v, %+v", recovering, q.asked, rep)
		}
	}
}

// TestRunTells: that the guest may run is told although QEMU does not answer any more, as when
// its main loop waits for a page of a server that has died. Who goes on does not run it again.
func TestRunTells(t *testing.T) {
	for _, c := range []struct {
		was    qmp.RunState
		paused bool
		want   string
	}{
		{qmp.RunState{Status: "paused"}, false, "running"},
		{qmp.RunState{Status: "running", Running: true}, false, "running"},
		{qmp.RunState{Status: "prelaunch"}, true, "prelaunch"},
		{qmp.RunState{Status: "running", Running: true}, true, "paused"},
	} {
		q := &silentAfter{runState: runState{RunState: c.was}, answers: 1}
		var told []string
		o := ResumeOptions{Paused: c.paused, Running: func(rep ResumeReport) { told = append(told, rep.State) }}
		var rep ResumeReport
		err := o.run(t.Context(), q, time.Now(), &rep)
		if !errors.Is(err, ErrServerDied) || rep.Running == 0 || rep.State != c.want || !slices.Equal(told, []string{c.want}) {
			t.Errorf("%+v, to stay paused %v: %v, %+v, told %v", c.was, c.paused, err, rep, told)
		}
	}
}

// silentAfter is a runState that is asked in vain for its state after some answers.
type silentAfter struct {
	runState
	answers int
}

func (q *silentAfter) Execute(ctx context.Context, command string, arguments, result any) error {
	if command == "query-status" {
		if q.answers--; q.answers < 0 {
			return ErrServerDied
		}
	}
	return q.runState.Execute(ctx, command, arguments, result)
}

// TestNeedsAllPages: QEMU 10.2 and later, the versions on the way to it, and those that
// are not known.
func TestNeedsAllPages(t *testing.T) {
	for version, want := range map[[3]int]bool{
		{}: true, {7, 2, 22}: false, {10, 0, 13}: false, {10, 1, 3}: false, {9, 2, 50}: false,
		{10, 1, 50}: true, {10, 2, 0}: true, {11, 0, 0}: true, {11, 1, 2}: true,
	} {
		var v qmp.Version
		v.QEMU.Major, v.QEMU.Minor, v.QEMU.Micro = version[0], version[1], version[2]
		if NeedsAllPages(v) != want {
			t.Errorf("%v: %v", version, !want)
		}
	}
}
