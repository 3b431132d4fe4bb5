package migration

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/qmptest"
)

// simulated is a QEMU as far as checkpoints are concerned. Its migrations end
// when told.
type simulated struct {
	mu           sync.Mutex
	run          string // run state
	status       Status
	desc         string // of a failure
	blocked      []string
	capabilities map[string]bool
	parameters   map[string]any
	refuse       map[string]string // what is refused, and why
	lost         bool
	sent         []string
	asked        []string // what was sent, and questions
	stream       *os.File // QEMU's end
	events       []chan qmp.Event
	clock        int64 // of the events, ms
	onMigrate    func(*simulated)
}

func simulate(run string) *simulated {
	return &simulated{
		run: run, status: StatusNone,
		capabilities: map[string]bool{"events": false, "return-path": false, "background-snapshot": false,
			"pause-before-switchover": false, "xbzrle": true, "auto-converge": true},
		parameters: map[string]any{"max-bandwidth": float64(33 << 20), "downtime-limit": float64(250), "tls-creds": "secret",
			"avail-switchover-bandwidth": float64(100 << 30)},
		refuse:    map[string]string{},
		onMigrate: func(*simulated) {},
	}
}

func (s *simulated) Execute(ctx context.Context, name string, args, result any) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return &qmp.OpError{Op: name, Err: err}
	}
	if s.lost {
		return &qmp.OpError{Op: name, Err: qmp.ErrLost}
	}
	if why, ok := s.refuse[name]; ok {
		return &qmp.Error{Command: name, Class: "GenericError", Desc: why}
	}
	s.asked = append(s.asked, name)
	if !strings.HasPrefix(name, "query-") {
		s.sent = append(s.sent, name)
	}
	// As it comes over the wire.
	var a struct {
		Capabilities []struct {
			Capability string
			State      bool
		}
	}
	b, _ := json.Marshal(args)
	_ = json.Unmarshal(b, &a)
	var answer any = map[string]any{}
	switch name {
	case "query-migrate":
		answer = map[string]any{"status": s.status, "error-desc": s.desc, "blocked-reasons": s.blocked, "downtime": 7,
			"ram": map[string]any{"dirty-sync-count": 3}}
	case "query-status":
		answer = map[string]any{"status": s.run, "running": s.run == "running"}
	case "query-migrate-capabilities":
		var list []any
		for name, is := range s.capabilities {
			list = append(list, map[string]any{"capability": name, "state": is})
		}
		answer = list
	case "query-migrate-parameters":
		answer = s.parameters
	case "query-yank":
		answer = []any{}
	case "migrate-set-capabilities":
		for _, c := range a.Capabilities {
			s.capabilities[c.Capability] = c.State
		}
	case "migrate-set-parameters":
		_ = json.Unmarshal(b, &s.parameters)
	case "stop":
		s.setRun("paused")
	case "cont":
		s.setRun("running")
	case "migrate":
		s.status = StatusActive
		go s.onMigrate(s)
	case "migrate_cancel":
		if s.status == StatusActive || s.status == StatusPreSwitchover {
			s.end(StatusCancelled, "running")
		}
	}
	b, err := json.Marshal(answer)
	if err == nil && result != nil {
		err = json.Unmarshal(b, result)
	}
	return err
}

// setRun is called with the lock held.
func (s *simulated) setRun(state string) {
	was := s.run == "running"
	s.run = state
	name := "STOP"
	if state == "running" {
		name = "RESUME"
	}
	if was == (state == "running") {
		return
	}
	s.clock += 5
	e := qmp.Event{Event: name}
	e.Timestamp.Seconds, e.Timestamp.Microseconds = 1, s.clock*1000
	for _, ch := range s.events {
		ch <- e
	}
}

// end ends the migration, with the lock held. A guest that the migration did
// not find paused is then in the given run state.
func (s *simulated) end(status Status, run string) {
	s.status = status
	if s.run != "paused" {
		s.setRun(run)
	} else if status == StatusCompleted {
		s.run = "postmigrate"
	}
	s.stream.Close()
}

func (s *simulated) ends(status Status, desc, run string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.desc = desc
	s.end(status, run)
}

func (s *simulated) Events(context.Context) (<-chan qmp.Event, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	ch := make(chan qmp.Event, 64)
	s.events = append(s.events, ch)
	return ch, nil
}

func (s *simulated) open(context.Context, qmp.Executor, Direction) (*Channel, error) {
	r, w, err := os.Pipe()
	s.stream = w
	return &Channel{URI: "fd:x", accept: func(context.Context) (*os.File, error) { return r, nil }, discard: func(context.Context) {}}, err
}

// settings are what must be as it was.
func (s *simulated) settings() string {
	b, _ := json.Marshal([]any{s.capabilities, s.parameters})
	return string(b)
}

// Saves for tests: one that reads all and takes it for good.
func savesAll(_ context.Context, f *os.File, _ qmp.RunState) error {
	_, err := io.Copy(io.Discard, f)
	return err
}

func completes(s *simulated) { s.ends(StatusCompleted, "", "postmigrate") }

// The guest is in the end what it was, or what is asked for, in every mode.
func TestCheckpointThen(t *testing.T) {
	for _, mode := range []Mode{ModeStop, ModeLive, ModeBackground} {
		for _, before := range []string{"running", "paused"} {
			for then, want := range map[Then]string{
				ThenAsBefore: before, ThenRun: "running", ThenPause: "stopped", ThenQuit: "ended",
			} {
				x := simulate(before)
				x.onMigrate = completes
				if mode == ModeBackground {
					x.onMigrate = func(s *simulated) {
						// A pause of its own at the beginning.
						s.mu.Lock()
						if s.run == "running" {
							s.setRun("paused")
							s.setRun("running")
						}
						s.mu.Unlock()
						s.ends(StatusCompleted, "", s.run)
					}
				}
				was := x.settings()
				var during string
				rep, err := Checkpoint(t.Context(), x, CheckpointOptions{Mode: mode, Then: then, Open: x.open,
					Save: func(ctx context.Context, f *os.File, was qmp.RunState) error {
						x.mu.Lock()
						during = x.settings()
						x.mu.Unlock()
						if was.Status != before {
							t.Errorf("Save is told that the guest was %s", was.Status)
						}
						return savesAll(ctx, f, was)
					}})
				what := strings.Join([]string{string(mode), before, string(then)}, " ")
				if err != nil || !rep.Saved {
					t.Fatalf("%s: %v", what, err)
				}
				state := rep.State
				if want == "paused" || want == "stopped" {
					if want = state; state != "paused" && state != "postmigrate" {
						t.Errorf("%s: the guest is %s", what, state)
					}
				}
				if state != want || then != ThenQuit && x.run != state {
					t.Errorf("%s: the guest is %s, and %s", what, x.run, state)
				}
				if then == ThenQuit {
					if x.sent[len(x.sent)-1] != "quit" {
						t.Errorf("%s: %v", what, x.sent)
					}
				} else if now := x.settings(); now != was {
					t.Errorf("%s: settings were\n%s\nare\n%s", what, was, now)
				}
				stop, migrate := slices.Index(x.sent, "stop"), slices.Index(x.sent, "migrate")
				if stopped := stop >= 0 && stop < migrate; stopped != (before == "running" && mode == ModeStop) {
					t.Errorf("%s: %v", what, x.sent)
				}
				wantMode := mode
				if before == "paused" {
					wantMode = ModeStop
				}
				returnPath := strings.Contains(during, `"return-path":true`)
				if rep.Mode != wantMode || returnPath == (wantMode == ModeBackground) ||
					strings.Contains(during, `"background-snapshot":true`) == returnPath ||
					!strings.Contains(during, `"events":true`) || strings.Contains(during, `"xbzrle":true`) || strings.Contains(during, "secret") {
					t.Errorf("%s: mode %s with %s", what, rep.Mode, during)
				}
				if runs := before == "running" && (rep.State == "running" || mode == ModeBackground && then == ThenQuit); runs != (rep.Downtime == 5*time.Millisecond) {
					t.Errorf("%s: downtime %v", what, rep.Downtime)
				}
			}
		}
	}
}

// Nothing is asked twice, all that can be is done before the guest stops or when it runs
// again, and it runs as soon as the end of the migration is known.
func TestCheckpointAsksLittle(t *testing.T) {
	x := simulate("running")
	x.onMigrate = func(s *simulated) {
		for range 3 {
			time.Sleep(pollInterval)
		}
		completes(s)
	}
	opened := 0
	_, err := Checkpoint(t.Context(), x, CheckpointOptions{Mode: ModeStop, Save: savesAll,
		Open: func(ctx context.Context, q qmp.Executor, d Direction) (*Channel, error) {
			opened = len(x.asked)
			return x.open(ctx, q, d)
		}})
	if err != nil {
		t.Fatal(err)
	}
	before := []string{
		"query-migrate-capabilities", "query-migrate-parameters", "query-migrate", "query-status",
		"query-yank", "migrate-set-parameters", "migrate-set-capabilities", "stop", "migrate",
	}
	after := []string{
		"query-migrate", "query-status", "cont",
		"query-yank", "migrate-set-capabilities", "migrate-set-parameters", "query-status",
	}
	n, m := len(before), len(x.asked)-len(after)
	if m < n || !slices.Equal(x.asked[:n], before) || !slices.Equal(x.asked[m:], after) {
		t.Errorf("asked %v, want %v, some questions, and %v", x.asked, before, after)
	}
	if opened == 0 || opened > slices.Index(x.asked, "stop") {
		t.Errorf("the channel was opened after %v", x.asked[:opened])
	}
}

// Whatever fails, the guest does what it did before, settings are as they were,
// and the error says why.
func TestCheckpointFails(t *testing.T) {
	broken := errors.New("no space")
	fails := func(context.Context, *os.File, qmp.RunState) error { return broken }
	panics := func(context.Context, *os.File, qmp.RunState) error { panic("a bug") }
	waits := func(_ context.Context, f *os.File, _ qmp.RunState) error {
		_, err := io.Copy(io.Discard, f)
		return errors.Join(err, io.ErrUnexpectedEOF)
	}
	for name, test := range map[string]struct {
		mode    Mode
		prepare func(*simulated)
		save    func(context.Context, *os.File, qmp.RunState) error
		want    []string
	}{
		"save fails":          {ModeStop, func(s *simulated) { s.onMigrate = func(*simulated) {} }, fails, []string{"no space"}},
		"save panics":         {ModeStop, func(s *simulated) { s.onMigrate = func(*simulated) {} }, panics, []string{"internal error", "a bug"}},
		"QEMU hears of it":    {ModeLive, func(s *simulated) { s.onMigrate = func(s *simulated) { s.ends(StatusFailed, "Sibling", "running") } }, fails, []string{"no space"}},
		"QEMU fails":          {ModeLive, func(s *simulated) { s.onMigrate = func(s *simulated) { s.ends(StatusFailed, "device X", "running") } }, waits, []string{"failed", "device X"}},
		"QEMU fails, stopped": {ModeStop, func(s *simulated) { s.onMigrate = func(s *simulated) { s.ends(StatusFailed, "device X", "running") } }, waits, []string{"device X"}},
		"completed in vain":   {ModeBackground, func(s *simulated) { s.onMigrate = completes }, fails, []string{"no space"}},
		"cancelled":           {ModeLive, func(s *simulated) { s.onMigrate = func(s *simulated) { s.ends(StatusCancelled, "", "running") } }, waits, []string{"cancelled"}},
		"migrate is refused":  {ModeStop, func(s *simulated) { s.refuse["migrate"] = "no such device" }, fails, []string{"no such device"}},
		"stop is refused":     {ModeStop, func(s *simulated) { s.refuse["stop"] = "not now" }, fails, []string{"not now"}},
		"blocked":             {ModeStop, func(s *simulated) { s.blocked = []string{"nvme is no", "9p"} }, fails, []string{ErrBlocked.Error(), "nvme is no; 9p"}},
		"migrating":           {ModeStop, func(s *simulated) { s.status = StatusActive; s.stream, _ = os.Open(os.DevNull) }, fails, []string{ErrMigrating.Error()}},
		"postmigrate":         {ModeStop, func(s *simulated) { s.run = "postmigrate" }, fails, []string{ErrPostmigrate.Error()}},
		"no background":       {ModeBackground, func(s *simulated) { delete(s.capabilities, "background-snapshot") }, fails, []string{ErrBackground.Error(), "too old"}},
		"background refused":  {ModeBackground, func(s *simulated) { s.refuse["migrate-set-capabilities"] = "userfaultfd" }, fails, []string{ErrBackground.Error(), "userfaultfd"}},
	} {
		t.Run(name, func(t *testing.T) {
			x := simulate("running")
			test.prepare(x)
			was, run := x.settings(), x.run
			rep, err := Checkpoint(t.Context(), x, CheckpointOptions{Mode: test.mode, Save: test.save, Open: x.open})
			qmptest.Mention(t, err, test.want...)
			if rep.Saved || x.run != run {
				t.Errorf("saved %v, the guest is %s", rep.Saved, x.run)
			}
			if refused := x.refuse["migrate-set-capabilities"]; refused == "" && x.settings() != was {
				t.Errorf("settings were\n%s\nare\n%s", was, x.settings())
			}
		})
	}
}

// An end of the context cancels, unless all was saved before it was heard of.
func TestCheckpointCancelled(t *testing.T) {
	stopped := errors.New("stopped by signal")
	for name, quick := range map[string]bool{"in the middle": false, "too late": true, "too late to quit": true} {
		then := ThenAsBefore
		if name == "too late to quit" {
			then = ThenQuit
		}
		ctx, cancel := context.WithCancelCause(t.Context())
		x := simulate("running")
		was := x.settings()
		rep, err := Checkpoint(ctx, x, CheckpointOptions{Mode: ModeStop, Then: then, Open: x.open, Save: func(ctx context.Context, _ *os.File, _ qmp.RunState) error {
			cancel(stopped)
			<-ctx.Done()
			if quick {
				return nil
			}
			return context.Cause(ctx)
		}})
		if rep.Saved != quick || errors.Is(err, stopped) == quick || x.status != StatusCancelled {
			t.Errorf("%s: saved %v, %v, %s", name, rep.Saved, err, x.status)
		}
		// Whoever takes the guest for ended must not be told that all is well.
		if errors.Is(err, ErrNotEnded) != (then == ThenQuit) || quick && then == ThenAsBefore && len(rep.Warnings) != 1 {
			t.Errorf("%s: %v, warnings %q", name, err, rep.Warnings)
		}
		if x.run != "running" || x.settings() != was {
			t.Errorf("%s: the guest is %s, settings %s", name, x.run, x.settings())
		}
		cancel(nil)
	}
}

// What was saved counts only with QEMU's word: a stream that was not the guest's would
// be as whole as any.
func TestCheckpointUnconfirmed(t *testing.T) {
	defer func(was time.Duration) { confirmTime = was }(confirmTime)
	confirmTime = 50 * time.Millisecond
	kept := errors.New("can't be removed")
	for name, onMigrate := range map[string]func(*simulated){
		"fails":     func(s *simulated) { s.ends(StatusFailed, "Broken pipe", "running") },
		"never end": func(*simulated) {},
	} {
		for _, mode := range []Mode{ModeStop, ModeLive} {
			for _, undone := range []error{nil, kept} {
				x := simulate("running")
				x.onMigrate = onMigrate
				was, undos := x.settings(), 0
				rep, err := Checkpoint(t.Context(), x, CheckpointOptions{Mode: mode, Open: x.open,
					Save: func(context.Context, *os.File, qmp.RunState) error { return nil },
					Undo: func(context.Context) error { undos++; return undone }})
				if !errors.Is(err, ErrUnconfirmed) || errors.Is(err, kept) != (undone != nil) || undos != 1 || rep.Saved != (undone != nil) {
					t.Errorf("%s, %s: undone %d times, saved %v, %v", name, mode, undos, rep.Saved, err)
				}
				if x.run != "running" || x.settings() != was {
					t.Errorf("%s, %s: the guest is %s, settings %s", name, mode, x.run, x.settings())
				}
			}
		}
	}
}

// A connection that is lost is made anew to put everything back, also after a
// success.
func TestCheckpointRedials(t *testing.T) {
	for _, saved := range []bool{false, true} {
		x, again := simulate("running"), simulate("running")
		x.onMigrate = func(s *simulated) {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.lost = true
			// The same QEMU on another connection.
			again.run, again.status, again.stream = "postmigrate", StatusCompleted, s.stream
			again.capabilities, again.parameters = maps.Clone(s.capabilities), maps.Clone(s.parameters)
			s.stream.Close()
		}
		was := x.settings()
		rep, err := Checkpoint(t.Context(), x, CheckpointOptions{Mode: ModeLive, Open: x.open,
			Redial: func(context.Context) (qmp.Executor, error) { return again, nil },
			Save: func(ctx context.Context, f *os.File, r qmp.RunState) error {
				if saved {
					return savesAll(ctx, f, r)
				}
				<-ctx.Done()
				return ctx.Err()
			}})
		if rep.Saved != saved || (err == nil) != saved || !saved && !errors.Is(err, qmp.ErrLost) {
			t.Errorf("saved %v, %v", rep.Saved, err)
		}
		if again.run != "running" || again.settings() != was {
			t.Errorf("the guest is %s, settings %s", again.run, again.settings())
		}
	}
	// Without a way back it says so.
	x := simulate("running")
	x.onMigrate = func(s *simulated) { s.mu.Lock(); s.lost = true; s.stream.Close(); s.mu.Unlock() }
	rep, err := Checkpoint(t.Context(), x, CheckpointOptions{Mode: ModeStop, Open: x.open, Save: savesAll})
	if !rep.Saved || !errors.Is(err, qmp.ErrLost) {
		t.Errorf("saved %v, %v", rep.Saved, err)
	}
}

// A live checkpoint that does not converge stops the guest, or fails.
func TestCheckpointPatience(t *testing.T) {
	for _, giveUp := range []bool{false, true} {
		x := simulate("running")
		was := x.settings()
		x.onMigrate = func(s *simulated) {
			for {
				s.mu.Lock()
				if s.parameters["downtime-limit"] == float64(maxDowntime) {
					s.end(StatusCompleted, "postmigrate")
				}
				ended := s.status.Ended()
				s.mu.Unlock()
				if ended {
					return
				}
				time.Sleep(time.Millisecond)
			}
		}
		start := time.Now()
		rep, err := Checkpoint(t.Context(), x, CheckpointOptions{Mode: ModeLive, Open: x.open, GiveUp: giveUp,
			Patience: 60 * time.Millisecond, Downtime: 20 * time.Millisecond,
			Save: func(ctx context.Context, f *os.File, r qmp.RunState) error {
				x.mu.Lock()
				if x.parameters["downtime-limit"] != float64(20) {
					t.Errorf("downtime-limit %v", x.parameters["downtime-limit"])
				}
				x.mu.Unlock()
				if giveUp {
					<-ctx.Done()
					return ctx.Err()
				}
				return savesAll(ctx, f, r)
			}})
		if d := time.Since(start); d < 60*time.Millisecond {
			t.Errorf("it had patience for %v", d)
		}
		if rep.Converged || rep.Saved == giveUp || errors.Is(err, ErrNoConvergence) != giveUp || (len(rep.Warnings) > 0) == giveUp {
			t.Errorf("give up %v: %+v, %v", giveUp, rep, err)
		}
		if x.run != "running" || x.settings() != was {
			t.Errorf("the guest is %s, settings %s", x.run, x.settings())
		}
	}
}

// The checkpoint after one that was killed while it had stopped the guest lets
// it run first; the user's settings are not known any more.
func TestCheckpointAfterKill(t *testing.T) {
	for run, mark := range map[string]int64{"paused": stoppedBandwidth, "postmigrate": liveBandwidth} {
		x := simulate(run)
		x.parameters = map[string]any{"max-bandwidth": float64(mark), "downtime-limit": float64(1), "tls-creds": ""}
		x.capabilities["events"], x.capabilities["return-path"] = true, true
		x.onMigrate = completes
		rep, err := Checkpoint(t.Context(), x, CheckpointOptions{Mode: ModeStop, Open: x.open, Save: savesAll})
		if err != nil || len(rep.Warnings) != 1 || x.sent[0] != "cont" || x.run != "running" {
			t.Errorf("%s: %+v, %v: %v", run, rep, err, x.sent)
		}
		if x.parameters["max-bandwidth"] != float64(defaultBandwidth) || x.parameters["downtime-limit"] != float64(defaultDowntime) ||
			x.capabilities["events"] || x.capabilities["return-path"] {
			t.Errorf("%s: settings %s", run, x.settings())
		}
	}
}

// Without events of the guest's stops, as of a domain, our own clock says for how long.
func TestStood(t *testing.T) {
	at := time.Now()
	for _, test := range []struct {
		c    checkpointer
		want time.Duration
	}{
		{checkpointer{stoppedAt: at, savedAt: at.Add(time.Second), ranAt: at.Add(2 * time.Second), rep: CheckpointReport{Mode: ModeStop, QEMUDowntime: 1}}, 2 * time.Second},
		{checkpointer{savedAt: at, ranAt: at.Add(time.Second), rep: CheckpointReport{Mode: ModeLive, QEMUDowntime: time.Minute}}, time.Minute + time.Second},
		{checkpointer{savedAt: at, ranAt: at.Add(time.Second), rep: CheckpointReport{Mode: ModeBackground, QEMUDowntime: time.Minute}}, time.Minute},
	} {
		if d := test.c.stood(); d != test.want {
			t.Errorf("%s: %v, want %v", test.c.rep.Mode, d, test.want)
		}
	}
}
