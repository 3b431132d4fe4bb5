package migration

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp"
)

// holding is a QEMU that says that its migration has completed and has it in use for
// some more questions.
type holding struct {
	looks int   // how many more it is in use for
	yank  error // instead of an answer to query-yank
	asked []string
}

func (q *holding) Events(context.Context) (<-chan qmp.Event, error) { return nil, errors.New("none") }

func (q *holding) Execute(_ context.Context, command string, _, result any) error {
	q.asked = append(q.asked, command)
	answer := "{}"
	switch command {
	case "query-yank":
		if q.yank != nil {
			return q.yank
		}
		if answer = `[{"type": "chardev", "id": "migration"}]`; q.looks != 0 {
			answer = `[{"type": "chardev", "id": "migration"}, {"type": "migration"}]`
			q.looks--
		}
	case "query-migrate":
		answer = `{"status": "completed"}`
	case "query-status":
		answer = `{"status": "running", "running": true}`
	}
	if result == nil {
		return nil
	}
	return json.Unmarshal([]byte(answer), result)
}

// before is what was asked before the capabilities were set.
func (q *holding) before() []string {
	i := slices.Index(q.asked, "migrate-set-capabilities")
	if i < 0 {
		return nil
	}
	return q.asked[:i]
}

// TestLetGo: no capability is changed after a migration, on either side, before QEMU
// has let go of it.
func TestLetGo(t *testing.T) {
	yes := map[string]bool{"multifd": true, "postcopy-ram": true}
	for name, do := range map[string]func(x qmp.Executor) error{
		"resume": func(x qmp.Executor) error {
			o := ResumeOptions{caps: &adjusted{was: yes, is: map[string]bool{"multifd": false, "postcopy-ram": true}}}
			rep := ResumeReport{Lazy: true}
			return o.finishResume(t.Context(), x, time.Now(), &rep)
		},
		"recover": func(x qmp.Executor) error {
			return new(ResumeOptions).finishResume(t.Context(), x, time.Now(), new(ResumeReport))
		},
		"before":       func(x qmp.Executor) error { return settings{on: yes}.set(t.Context(), x) },
		"after a save": func(x qmp.Executor) error { return settings{off: yes}.restore(t.Context(), x) },
	} {
		for _, q := range []*holding{{looks: 3}, {}, {looks: 3, yank: &qmp.Error{Class: "CommandNotFound"}}} {
			want := q.looks + 1
			if q.yank != nil {
				want = 1 // it is too old to be asked
			}
			err := do(q)
			looks := 0
			for _, command := range q.before() {
				if command == "query-yank" {
					looks++
				}
			}
			if err != nil || looks != want {
				t.Errorf("%s: %v, asked %v", name, err, q.asked)
			}
		}
	}
}

// TestLetGoNever: a QEMU that does not let go keeps its capabilities, and a guest that is
// whole is no failure.
func TestLetGoNever(t *testing.T) {
	defer func(was time.Duration) { letGoTime = was }(letGoTime)
	letGoTime = 20 * time.Millisecond
	q := &holding{looks: -1}
	var rep ResumeReport
	o := ResumeOptions{caps: &adjusted{was: map[string]bool{"multifd": true}, is: map[string]bool{"multifd": false}}}
	if err := o.finishResume(t.Context(), q, time.Now(), &rep); err != nil || len(rep.Warnings) != 1 || rep.State != "running" {
		t.Errorf("%v, %+v", err, rep)
	}
	if err := (settings{}).restore(t.Context(), q); !errors.Is(err, errHeld) || !slices.Contains(q.asked, "migrate-set-parameters") {
		t.Error(err)
	}
	if slices.Contains(q.asked, "migrate-set-capabilities") {
		t.Errorf("asked %v", q.asked)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errGaveUp)
	if err := letGo(ctx, q); !errors.Is(err, errGaveUp) {
		t.Error(err)
	}
	if err := letGo(t.Context(), &holding{yank: qmp.ErrLost}); !errors.Is(err, qmp.ErrLost) {
		t.Error(err)
	}
}
