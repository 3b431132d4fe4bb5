package migration

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp"
)

// ErrNoDirtyRate: this QEMU can't tell how fast its guest writes, or has not
// noticed that it does.
var ErrNoDirtyRate = errors.New("QEMU has not measured how fast the guest writes")

// DirtyRate has QEMU measure how fast the guest writes to new pages, by comparing
// samples of them some seconds apart (qapi/migration.json, calc-dirty-rate), and
// returns bytes a second. It takes whole seconds, at least one. The guest runs on
// and nothing is migrated.
//
// QEMU looks at 512 pages in each GiB and says MiB/s, so what it finds in a small
// or quiet guest is coarse, or nothing: an error that wraps ErrNoDirtyRate.
func DirtyRate(ctx context.Context, x qmp.Executor, span time.Duration) (float64, error) {
	seconds := max(1, int64(span.Round(time.Second)/time.Second))
	// No mode is named: the default is page-sampling in every version, and
	// dirty-bitmap ends a QEMU 7.2 that has no KVM.
	err := x.Execute(ctx, "calc-dirty-rate", map[string]any{"calc-time": seconds}, nil)
	var refused *qmp.Error
	if errors.As(err, &refused) {
		return 0, fmt.Errorf("%w: %w", ErrNoDirtyRate, err)
	}
	if err != nil {
		return 0, err
	}
	asked := ctx
	ctx, cancel := context.WithTimeout(ctx, time.Duration(seconds)*time.Second+10*time.Second)
	defer cancel()
	for {
		var info struct {
			Status string `json:"status"`
			Rate   *int64 `json:"dirty-rate"` // MiB/s; absent until measured
			Mode   string `json:"mode"`
		}
		if err := x.Execute(ctx, "query-dirty-rate", nil, &info); err != nil {
			return 0, err
		}
		switch {
		case info.Status != "measured":
		case info.Mode != "" && info.Mode != "page-sampling":
			return 0, fmt.Errorf("%w: somebody else has it measured as %s", ErrNoDirtyRate, info.Mode)
		case info.Rate == nil || *info.Rate <= 0:
			return 0, fmt.Errorf("%w: none of its samples has changed", ErrNoDirtyRate)
		default:
			return float64(*info.Rate) * (1 << 20), nil
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			if asked.Err() != nil {
				return 0, context.Cause(asked)
			}
			return 0, fmt.Errorf("%w: it does not end: %w", ErrNoDirtyRate, ctx.Err())
		}
	}
}
