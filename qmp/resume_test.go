package qmp

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"
)

// slowQEMU answers some commands only when they come again, as one does whose main
// loop waits for memory.
type slowQEMU struct {
	RunState
	silent map[string]int // how often a command is not answered
	asked  []string
}

func (q *slowQEMU) Events(context.Context) (<-chan Event, error) { return nil, errors.New("none") }

func (q *slowQEMU) Execute(ctx context.Context, command string, _, result any) error {
	q.asked = append(q.asked, command)
	if q.silent[command] > 0 {
		q.silent[command]--
		return fmt.Errorf("no answer: %w", context.DeadlineExceeded)
	}
	switch command {
	case "cont":
		q.RunState = RunState{Status: "running", Running: true}
	case "stop":
		q.RunState = RunState{Status: "paused"}
	case "query-status":
		*result.(*RunState) = q.RunState
	}
	return nil
}

// TestRunWaits: a guest is let run by a QEMU that does not answer for a while.
func TestRunWaits(t *testing.T) {
	q := &slowQEMU{RunState: RunState{Status: "paused"}, silent: map[string]int{"cont": 1, "query-status": 3}}
	var rep ResumeReport
	if err := new(ResumeOptions).run(t.Context(), q, time.Now(), &rep); err != nil || rep.State != "running" || rep.Running <= 0 {
		t.Errorf("%v, %+v", err, rep)
	}
	q.silent["query-status"] = 1000
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := new(ResumeOptions).run(ctx, q, time.Now(), &rep); err == nil {
		t.Error("waits on although nobody wants it to")
	}
}

// TestRunLeavesAlone: who recovers does not stop a guest that was to stay paused and
// that somebody has let run since; who resumes does.
func TestRunLeavesAlone(t *testing.T) {
	for _, recovering := range []bool{false, true} {
		q := &slowQEMU{RunState: RunState{Status: "running", Running: true}}
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
