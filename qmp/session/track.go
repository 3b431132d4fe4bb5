package session

import (
	"context"
	"errors"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/migration/rounds"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/workingset"
)

// TrackOptions say how to watch a guest.
type TrackOptions struct {
	Interval time.Duration // of each round; 0: by equation (1), in all
	Rounds   int           // 1 to rounds.Max

	// The rest is for equation (1).
	Beta      float64                                // safety factor on the time flash takes
	FlashRate func(context.Context) (float64, error) // bytes a second; see MeasuredRate
	Longest   time.Duration                          // that the guest is watched
}

// Track finds the working set of the target's guest, which must be running.
func Track(ctx context.Context, t Target, o TrackOptions) (*workingset.Set, rounds.Report, error) {
	ro, err := o.rounds(ctx)
	if err != nil {
		return nil, rounds.Report{}, err
	}
	m, err := t.dial(ctx, qmp.Options{})
	if err != nil {
		return nil, rounds.Report{}, err
	}
	defer m.Close()
	var hangUp func()
	ro.Redial, hangUp = t.redialer()
	defer hangUp()
	return rounds.Run(ctx, m, ro)
}

// rounds asks for the flash's rate if it is needed.
func (o TrackOptions) rounds(ctx context.Context) (rounds.Options, error) {
	ro := rounds.Options{Interval: o.Interval, Rounds: o.Rounds, Beta: o.Beta, Longest: o.Longest}
	var err error
	if o.Interval == 0 {
		ro.FlashRate, err = o.FlashRate(ctx)
	}
	return ro, err
}

// assumedRate is what flash is taken to be read with where it can't be measured,
// bytes a second.
const assumedRate = 500e6

// MeasuredRate is r of equation (1) as it was measured in a store, bytes a second. No
// store is made for it: without one it is an assumption.
func MeasuredRate(ctx context.Context, open func() (*store.Store, error)) (float64, error) {
	st, err := open()
	if errors.Is(err, store.ErrNotFound) {
		return assumedRate, nil
	}
	if err != nil {
		return 0, err
	}
	r, err := st.FlashRate(ctx)
	return r.BytesPerSecond, err
}
