// Package rounds finds the working set of a running VM: it drives tracking
// migrations ([migration.Track]), reads their streams (package track) and adds up
// what the rounds have shown.
//
//	round 1 ───┐
//	round 2 ───┼─► set: round i adds i to the heat of a page written in it
//	…       ───┘    │
//	   ▲            ▼
//	   └── left ◄── alpha = pages in the set / time watched, equation (1)
//
// By equation (1) the time to watch depends on how fast the set grows, and that
// falls as time goes on. So after each round it is solved anew with what all
// rounds so far have seen, and rounds are added until the time is up. For the
// length of the first round QEMU is asked how fast the guest writes; if it does
// not know, that round is a short one.
package rounds

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/stream/pipe"
	"github.com/flic-migrate/flic-migrate/tier/timer"
	"github.com/flic-migrate/flic-migrate/tier/track"
	"github.com/flic-migrate/flic-migrate/tier/workingset"
)

// Max is the most rounds there can be: their heats together stay below 255.
const Max = 16

const (
	// firstRound is the round that measures alpha, and the time that QEMU
	// gets to measure it: long enough for periodic work to show, short beside
	// what it is for.
	firstRound = time.Second
	// shortest is a round that is worth the pass over all of memory that comes
	// before it.
	shortest = 250 * time.Millisecond
	// near is the share of the time that may be left out at the end.
	near = 20
)

// Options say how to watch a guest.
type Options struct {
	Interval time.Duration // of each round; 0: as long as equation (1) says, in all
	Rounds   int           // 1 to Max; 0: 1. By equation (1) there may be more

	// For equation (1), see package timer.
	Beta      float64       // safety factor on the time flash takes
	FlashRate float64       // how fast a restore reads from flash, bytes a second
	Longest   time.Duration // the longest time that the equation may give

	Open   migration.OpenFunc // as in migration.TrackOptions
	Redial migration.Redialer
}

// Report is what was done and found. Without equation (1) its fields are zero.
type Report struct {
	Pages    int64         `json:"pages"` // of all RAM blocks
	Hot      int64         `json:"hot"`   // in the working set
	Rounds   int           `json:"rounds"`
	Watched  time.Duration `json:"watched_ns"`      // in all rounds
	Interval time.Duration `json:"interval_ns"`     // of each round, or T of equation (1)
	Alpha    float64       `json:"alpha,omitempty"` // pages a second that came into the set
	Rate     float64       `json:"rate,omitempty"`  // r: pages a second from flash
	Beta     float64       `json:"beta,omitempty"`
	Longest  time.Duration `json:"longest_stop_ns"` // that the guest stood still in one round
}

// Run watches the guest of the QEMU at x. The guest must be running, and goes on
// doing so.
func Run(ctx context.Context, x qmp.Executor, o Options) (*workingset.Set, Report, error) {
	w := newWatch(x, o)
	w.look = w.track
	err := w.run(ctx)
	return w.set, w.rep, err
}

func newWatch(x qmp.Executor, o Options) *watch {
	w := &watch{x: x, o: o, wanted: max(o.Rounds, 1)}
	w.rep.Interval = o.Interval
	return w
}

// watch is a working set on its way.
type watch struct {
	x qmp.Executor
	// look returns what the guest wrote in an interval, and for how long it
	// stood still.
	look   func(context.Context, time.Duration) (*workingset.Set, time.Duration, error)
	o      Options
	wanted int
	set    *workingset.Set
	rep    Report
}

func (w *watch) run(ctx context.Context) error {
	if w.o.Interval > 0 {
		for range w.wanted {
			if err := w.round(ctx, w.o.Interval); err != nil {
				return err
			}
		}
		return nil
	}
	next, err := w.first(ctx)
	for err == nil && next > 0 {
		if err = w.round(ctx, next); err == nil {
			next, err = w.next()
		}
	}
	return err
}

// first is the length of the first round.
func (w *watch) first(ctx context.Context) (time.Duration, error) {
	rate, err := migration.DirtyRate(ctx, w.x, firstRound)
	if errors.Is(err, migration.ErrNoDirtyRate) && ctx.Err() == nil {
		return min(firstRound, w.o.Longest), nil
	}
	if err != nil {
		return 0, err
	}
	blocks, err := migration.RAMBlocks(ctx, w.x)
	if err != nil {
		return min(firstRound, w.o.Longest), nil
	}
	// In bytes, since the size of a page is not known yet.
	p := timer.Params{Alpha: rate, Beta: w.o.Beta, Rate: w.o.FlashRate}
	for _, b := range blocks {
		p.Pages += int64(b.Used)
	}
	t, err := p.Interval()
	return max(min(t, w.o.Longest)/time.Duration(w.wanted), shortest), err
}

// next solves the equation and returns the length of the next round, 0 for none.
func (w *watch) next() (time.Duration, error) {
	w.rep.Alpha = float64(w.rep.Hot) / w.rep.Watched.Seconds()
	w.rep.Rate, w.rep.Beta = w.o.FlashRate/float64(w.set.PageSize()), w.o.Beta
	p := timer.Params{Pages: w.rep.Pages, Beta: w.rep.Beta, Rate: w.rep.Rate}
	left, err := p.Left(w.rep.Watched, w.rep.Hot)
	w.rep.Interval = w.rep.Watched + left
	left = min(left, w.o.Longest-w.rep.Watched)
	more := max(1, w.wanted-w.rep.Rounds)
	switch {
	case err != nil:
		return 0, err
	case left <= 0, w.rep.Rounds == Max, left < w.rep.Watched/near && w.rep.Rounds >= w.wanted:
		return 0, nil
	}
	return max(left/time.Duration(more), min(shortest, w.o.Longest)), nil
}

// round watches the guest once more.
func (w *watch) round(ctx context.Context, interval time.Duration) error {
	set, stopped, err := w.look(ctx, interval)
	w.rep.Longest = max(w.rep.Longest, stopped)
	w.rep.Rounds++
	if err == nil && w.set != nil {
		// Blocks don't change under a running guest, but for firmware
		// tables, which may grow.
		if err = w.set.Add(set, uint8(w.rep.Rounds)); err == nil {
			set = w.set
		}
	}
	if err != nil {
		return fmt.Errorf("round %d: %w", w.rep.Rounds, err)
	}
	w.set = set
	w.rep.Watched += interval
	w.rep.Hot, w.rep.Pages = hot(set), 0
	for _, b := range set.Blocks() {
		w.rep.Pages += b.Pages
	}
	return nil
}

// track is one tracking migration.
func (w *watch) track(ctx context.Context, interval time.Duration) (set *workingset.Set, stopped time.Duration, err error) {
	r, err := migration.Track(ctx, w.x, migration.TrackOptions{
		Open: w.o.Open, Redial: w.o.Redial,
		Filter: func(ctx context.Context, f *os.File) error {
			in, err := pipe.New(ctx, int(f.Fd()))
			if err != nil {
				return err
			}
			defer in.Close()
			set, err = track.Filter(ctx, in, interval)
			return err
		},
	})
	return set, r.Stopped, err
}

func hot(s *workingset.Set) (n int64) {
	for heat, pages := range s.Histogram() {
		if heat > 0 {
			n += pages
		}
	}
	return n
}
