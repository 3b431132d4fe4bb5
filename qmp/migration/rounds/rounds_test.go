package rounds

import (
	"context"
	"encoding/json"
	"errors"
	"math"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/tier/workingset"
)

// guest writes pages at a known pace: by turns those of a small set, and fresh
// ones. It is also the QEMU that is asked how fast it writes.
type guest struct {
	pages      int64
	same       int64   // pages that are written every 100 ms
	fresh      float64 // pages a second that were never written before
	rate       string  // query-dirty-rate's answer; none: it does not know the command
	intervals  []time.Duration
	from       float64
	fail       error
	ramSilent  bool
	measurings int
}

func (g *guest) Execute(_ context.Context, name string, _, result any) error {
	switch name {
	case "calc-dirty-rate":
		if g.rate == "" {
			return &qmp.Error{Command: name, Class: "CommandNotFound", Desc: "unknown"}
		}
		g.measurings++
		return nil
	case "query-dirty-rate":
		return json.Unmarshal([]byte(`{"status": "measured", "dirty-rate": `+g.rate+`}`), result)
	case "human-monitor-command":
		if g.ramSilent {
			return &qmp.Error{Command: name, Desc: "no"}
		}
		text, err := json.Marshal("Block Name PSize Offset Used Total HVA RO\n" +
			"pc.ram    4 KiB  0x0000000000000000 0x0000000020000000 0x0000000020000000 0x0 rw\n")
		if err != nil {
			return err
		}
		return json.Unmarshal(text, result)
	}
	return &qmp.Error{Command: name, Desc: "not expected"}
}

func (g *guest) Events(context.Context) (<-chan qmp.Event, error) { return nil, errors.New("none") }

func (g *guest) look(_ context.Context, d time.Duration) (*workingset.Set, time.Duration, error) {
	if g.fail != nil && len(g.intervals) > 0 {
		return nil, 5 * time.Millisecond, g.fail
	}
	g.intervals = append(g.intervals, d)
	s, err := workingset.New(4096, []workingset.Block{{Name: "pc.ram", Pages: g.pages}})
	if err != nil {
		return nil, 0, err
	}
	for page := range g.same {
		s.SetHeat(0, page, 1)
	}
	to := g.from + g.fresh*d.Seconds()
	for page := int64(g.from); page < int64(to); page++ {
		s.SetHeat(0, (g.same+page)%g.pages, 1)
	}
	g.from = to
	return s, time.Duration(len(g.intervals)) * time.Millisecond, nil
}

func watched(t *testing.T, g *guest, o Options) *watch {
	t.Helper()
	w := newWatch(g, o)
	w.look = g.look
	if err := w.run(t.Context()); err != nil {
		t.Fatal(err)
	}
	var sum time.Duration
	for _, d := range g.intervals {
		sum += d
	}
	if w.rep.Rounds != len(g.intervals) || w.rep.Watched != sum || w.rep.Pages != g.pages ||
		w.rep.Longest != time.Duration(len(g.intervals))*time.Millisecond {
		t.Errorf("%v: %+v", g.intervals, w.rep)
	}
	return w
}

// By equation (1) a guest is watched for as long as it asks for, given what was
// seen in all that time.
func TestByEquation(t *testing.T) {
	const pages = 131072
	for name, g := range map[string]*guest{
		"fresh pages":                   {fresh: 2000},
		"the same pages":                {same: 5000},
		"both":                          {same: 5000, fresh: 200},
		"nothing":                       {},
		"measured by QEMU":              {same: 3000, fresh: 1000, rate: "15"},
		"measured too high":             {same: 3000, fresh: 100, rate: "400"},
		"not noticed by QEMU":           {same: 3000, fresh: 100, rate: "0"},
		"measured, but of what memory?": {same: 3000, rate: "15", ramSilent: true},
	} {
		g.pages = pages
		o := Options{Beta: 3, FlashRate: 100e6, Longest: time.Minute}
		w := watched(t, g, o)
		want := o.Beta * float64(pages-w.rep.Hot) / w.rep.Rate
		if got := w.rep.Watched.Seconds(); got < want*0.94 || got > want*1.01 && name != "measured too high" {
			t.Errorf("%s: watched for %v s in %v, equation (1): %v s", name, got, g.intervals, want)
		}
		if math.Abs(w.rep.Alpha*w.rep.Watched.Seconds()-float64(w.rep.Hot)) > 1 || w.rep.Rate != 100e6/4096 || w.rep.Beta != 3 ||
			w.rep.Interval < w.rep.Watched || w.rep.Rounds > 5 {
			t.Errorf("%s: %+v", name, w.rep)
		}
		if measured := g.intervals[0] != firstRound; measured != (g.measurings > 0 && g.rate != "0" && !g.ramSilent) {
			t.Errorf("%s: the first round is %v", name, g.intervals[0])
		}
	}
}

// A user's patience ends it, and several rounds share the time.
func TestLimits(t *testing.T) {
	g := &guest{pages: 131072, same: 1000}
	w := watched(t, g, Options{Beta: 3, FlashRate: 10e6, Longest: 5 * time.Second, Rounds: 4})
	// 1.2 minutes would be needed.
	if w.rep.Watched != 5*time.Second || w.rep.Rounds < 4 || w.rep.Interval < time.Minute {
		t.Errorf("%v: %+v", g.intervals, w.rep)
	}
	// Fast flash: one short look is more than enough.
	g = &guest{pages: 4096, same: 10}
	if w = watched(t, g, Options{Beta: 2, FlashRate: 1e9, Longest: time.Minute, Rounds: 4}); w.rep.Rounds != 1 {
		t.Errorf("%v: %+v", g.intervals, w.rep)
	}
	g = &guest{pages: 131072, same: 10}
	if w = watched(t, g, Options{Beta: 2, FlashRate: 1e6, Longest: 300 * time.Millisecond}); w.rep.Watched != 300*time.Millisecond {
		t.Errorf("%v: %+v", g.intervals, w.rep)
	}
}

// Pages of more rounds, and of later ones, are hotter.
func TestHeat(t *testing.T) {
	g := &guest{pages: 1000, same: 3, fresh: 10}
	w := watched(t, g, Options{Interval: time.Second, Rounds: Max})
	if len(g.intervals) != Max || w.rep.Interval != time.Second || w.rep.Alpha != 0 {
		t.Errorf("%+v", w.rep)
	}
	for page, want := range map[int64]uint8{0: 136, 2: 136, 3: 1, 12: 1, 13: 2, 23: 3, 162: 16, 163: 0} {
		if got := w.set.Heat(0, page); got != want {
			t.Errorf("page %d: heat %d, want %d", page, got, want)
		}
	}
}

func TestFailures(t *testing.T) {
	boom := errors.New("boom")
	g := &guest{pages: 1000, fail: boom}
	w := newWatch(g, Options{Interval: time.Second, Rounds: 3})
	w.look = g.look
	if err := w.run(t.Context()); !errors.Is(err, boom) || err.Error() != "round 2: boom" || w.rep.Longest != 5*time.Millisecond {
		t.Errorf("%v, %+v", err, w.rep)
	}
	w = newWatch(g, Options{Longest: time.Second})
	w.look = g.look
	if err := w.run(t.Context()); err == nil {
		t.Error("equation (1) without r was solved")
	}
}
