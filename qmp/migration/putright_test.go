package migration

import (
	"context"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp"
)

// TestPutRight: what a killed checkpoint has left is put right once QEMU's migration has
// ended, and nothing of anybody else's is touched.
func TestPutRight(t *testing.T) {
	type state struct {
		mark   int64
		status Status
		run    string
	}
	for name, c := range map[string]struct {
		is state
		// later is what becomes of it after so much time.
		after time.Duration
		later *state
		right bool // it is put right
		runs  bool // afterwards, if it is
		fails bool
	}{
		"stopped":                   {is: state{stoppedBandwidth, StatusFailed, "paused"}, right: true, runs: true},
		"QEMU has yet to notice":    {is: state{stoppedBandwidth, StatusActive, "paused"}, after: 3 * time.Second, later: &state{stoppedBandwidth, StatusFailed, "paused"}, right: true, runs: true},
		"it waits for a switchover": {is: state{stoppedBandwidth, StatusPreSwitchover, "paused"}, right: true, runs: true},
		"live, saved":               {is: state{liveBandwidth, StatusCompleted, "postmigrate"}, right: true, runs: true},
		"live, in the middle":       {is: state{liveBandwidth, StatusFailed, "running"}, right: true, runs: true},
		"live, and a user's pause":  {is: state{liveBandwidth, StatusFailed, "paused"}, right: true},
		"a paused guest's":          {is: state{ourBandwidth, StatusCompleted, "postmigrate"}, right: true},
		"settings alone":            {is: state{ourBandwidth, StatusFailed, "running"}, right: true, runs: true},
		"a user's":                  {is: state{33 << 20, StatusNone, "paused"}},
		"armed":                     {is: state{armedBandwidth, StatusActive, "running"}},
		"somebody reads it":         {is: state{stoppedBandwidth, StatusActive, "paused"}},
		"QEMU takes long to end it": {is: state{stoppedBandwidth, StatusCancelling, "paused"}, fails: true},
		"somebody has begun anew":   {is: state{stoppedBandwidth, StatusFailed, "paused"}, after: livesTime / 2, later: &state{stoppedBandwidth, StatusActive, "paused"}},
		"somebody has put it right": {is: state{stoppedBandwidth, StatusFailed, "paused"}, after: livesTime / 2, later: &state{128 << 20, StatusFailed, "paused"}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				x := simulate(c.is.run)
				set := func(s state) {
					x.mu.Lock()
					defer x.mu.Unlock()
					x.parameters["max-bandwidth"], x.status, x.run = float64(s.mark), s.status, s.run
				}
				set(c.is)
				x.capabilities["return-path"] = true
				if c.later != nil {
					time.AfterFunc(c.after, func() { set(*c.later) })
				}
				ctx, stop := context.WithTimeout(t.Context(), time.Minute)
				defer stop()
				if err := PutRight(ctx, x); (err != nil) != c.fails {
					t.Fatal(err)
				}
				put := x.parameters["max-bandwidth"] == float64(defaultBandwidth) && !x.capabilities["return-path"]
				if c.right && (!put || (x.run == "running") != c.runs) || !c.right && (x.capabilities["return-path"] == false || x.run != c.is.run) {
					t.Errorf("the guest is %s, settings %s", x.run, x.settings())
				}
			})
		})
	}
}

// A guest that was saved and could not be let run again is let run by PutRight.
func TestPutRightSaved(t *testing.T) {
	for _, mode := range []Mode{ModeStop, ModeLive} {
		synctest.Test(t, func(t *testing.T) {
			x := simulate("running")
			x.onMigrate = completes
			lost := func(is bool) {
				x.mu.Lock()
				defer x.mu.Unlock()
				x.lost = is
			}
			rep, err := Checkpoint(t.Context(), x, CheckpointOptions{Mode: mode, Open: x.open,
				Save: func(ctx context.Context, f *os.File, was qmp.RunState) error {
					err := savesAll(ctx, f, was)
					time.Sleep(2 * pollInterval) // QEMU says that it has completed
					lost(true)
					return err
				}})
			if err == nil || !rep.Saved || !rep.Left || x.run == "running" {
				t.Errorf("%s: %v, %+v; the guest is %s", mode, err, rep, x.run)
			}
			lost(false)
			if err := PutRight(t.Context(), x); err != nil || x.run != "running" {
				t.Errorf("%s: %v, the guest is %s", mode, err, x.run)
			}
		})
	}
}

// Settings that could not be put back are known as ours, and are put back later; a guest that
// is to stand still goes on to do so.
func TestPutRightSettings(t *testing.T) {
	refuse := func(x *simulated, is bool) {
		x.mu.Lock()
		defer x.mu.Unlock()
		delete(x.refuse, "migrate-set-capabilities")
		if is {
			x.refuse["migrate-set-capabilities"] = "not now"
		}
	}
	for _, mode := range []Mode{ModeStop, ModeLive, ModeBackground} {
		for _, then := range []Then{ThenAsBefore, ThenPause} {
			synctest.Test(t, func(t *testing.T) {
				x := simulate("running")
				x.onMigrate = completes
				rep, err := Checkpoint(t.Context(), x, CheckpointOptions{Mode: mode, Then: then, Open: x.open,
					Save: func(ctx context.Context, f *os.File, was qmp.RunState) error {
						refuse(x, true)
						return savesAll(ctx, f, was)
					}})
				run := x.run
				if err == nil || rep.Left != (then == ThenAsBefore) || (run == "running") != (then == ThenAsBefore) {
					t.Errorf("%s, %s: %v, %+v; the guest is %s", mode, then, err, rep, run)
				}
				refuse(x, false)
				if err := PutRight(t.Context(), x); err != nil || x.run != run {
					t.Errorf("%s, %s: %v, the guest is %s, and was %s", mode, then, err, x.run, run)
				}
				if x.capabilities["return-path"] || x.capabilities["events"] || x.parameters["max-bandwidth"] != float64(defaultBandwidth) {
					t.Errorf("%s, %s: settings %s", mode, then, x.settings())
				}
			})
		}
	}
	x, kept, was := armedGuest(t)
	refuse(x, true)
	if err := Disarm(t.Context(), x, DisarmOptions{Kept: kept}); err == nil {
		t.Error("it is disarmed, it says")
	}
	refuse(x, false)
	if err := Disarm(t.Context(), x, DisarmOptions{Kept: kept}); err != nil || x.settings() != was {
		t.Errorf("%v, settings %s", err, x.settings())
	}
}
