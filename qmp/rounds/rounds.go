// Package rounds finds the working set of a running VM: it drives tracking
// migrations ([qmp.Track]), reads their streams (package track) and adds up
// what the rounds have shown.
//
//	auto: 1 s ──► alpha ──► equation (1) ──► T
//	round 1 ─ T ─┐
//	round 2 ─ T ─┼─► set: round i adds i to the heat of a page written in it
//	…           ─┘
package rounds

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/stream/pipe"
	"github.com/flic-migrate/flic-migrate/tier/timer"
	"github.com/flic-migrate/flic-migrate/tier/track"
	"github.com/flic-migrate/flic-migrate/tier/workingset"
)

// Max is the most rounds there can be: their heats together stay below 255.
const Max = 16

// firstRound is the round that measures alpha: long enough for periodic work to
// show, short beside what it is for.
const firstRound = time.Second

// Options say how to watch a guest.
type Options struct {
	Interval time.Duration // of each round; 0: by equation (1)
	Rounds   int           // 1 to Max; 0: 1

	// For equation (1), see package timer.
	Beta      float64       // safety factor on the time flash takes
	FlashRate float64       // how fast a restore reads from flash, bytes a second
	Longest   time.Duration // the longest interval that the equation may give

	Open   qmp.OpenFunc // as in qmp.TrackOptions
	Redial qmp.Redialer
}

// Report is what was done and found. Without equation (1) its fields are zero.
type Report struct {
	Pages    int64         `json:"pages"`           // of all RAM blocks
	Hot      int64         `json:"hot"`             // in the working set
	Rounds   int           `json:"rounds"`          // without the one that measures
	Interval time.Duration `json:"interval_ns"`     // of each
	Alpha    float64       `json:"alpha,omitempty"` // pages a second that came into the set
	Rate     float64       `json:"rate,omitempty"`  // r: pages a second from flash
	Beta     float64       `json:"beta,omitempty"`
	Longest  time.Duration `json:"longest_stop_ns"` // that the guest stood still in one round
}

// Run watches the guest of the QEMU at x. The guest must be running, and goes on
// doing so.
func Run(ctx context.Context, x qmp.Executor, o Options) (*workingset.Set, Report, error) {
	var rep Report
	var set *workingset.Set
	var err error
	if o.Interval == 0 {
		if set, err = first(ctx, x, &o, &rep); err != nil {
			return nil, rep, err
		}
	}
	rep.Interval = o.Interval
	for i := range max(o.Rounds, 1) {
		s, err := round(ctx, x, o, &rep)
		if err != nil {
			return nil, rep, fmt.Errorf("round %d: %w", i+1, err)
		}
		rep.Rounds++
		if set == nil {
			set = s
			continue
		}
		if err := set.Add(s, uint8(i+1)); err != nil {
			return nil, rep, fmt.Errorf("round %d: %w", i+1, err)
		}
	}
	rep.Hot = hot(set)
	return set, rep, nil
}

// first measures alpha and solves the equation for the interval.
func first(ctx context.Context, x qmp.Executor, o *Options, rep *Report) (*workingset.Set, error) {
	o.Interval = min(firstRound, o.Longest)
	set, err := round(ctx, x, *o, rep)
	if err != nil {
		return nil, err
	}
	rep.Alpha = float64(hot(set)) / o.Interval.Seconds()
	rep.Rate, rep.Beta = o.FlashRate/float64(set.PageSize()), o.Beta
	t, err := timer.Params{Pages: rep.Pages, Alpha: rep.Alpha, Beta: rep.Beta, Rate: rep.Rate}.Interval()
	o.Interval = max(min(t, o.Longest), o.Interval)
	return set, err
}

// round is one tracking migration.
func round(ctx context.Context, x qmp.Executor, o Options, rep *Report) (set *workingset.Set, err error) {
	r, err := qmp.Track(ctx, x, qmp.TrackOptions{
		Open: o.Open, Redial: o.Redial,
		Filter: func(ctx context.Context, f *os.File) error {
			in, err := pipe.New(ctx, int(f.Fd()))
			if err != nil {
				return err
			}
			defer in.Close()
			set, err = track.Filter(ctx, in, o.Interval)
			return err
		},
	})
	rep.Longest = max(rep.Longest, r.Stopped)
	if err != nil {
		return nil, err
	}
	rep.Pages = 0
	for _, b := range set.Blocks() {
		rep.Pages += b.Pages
	}
	return set, nil
}

func hot(s *workingset.Set) (n int64) {
	for heat, pages := range s.Histogram() {
		if heat > 0 {
			n += pages
		}
	}
	return n
}
