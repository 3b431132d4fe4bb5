package store

import (
	"context"
	"time"

	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// longestPause is between two looks at whether something is still in use. Until then each is
// as long as all before, so that nobody waits twice as long as he must.
const longestPause = 5 * vfs.LockPause

// soon calls try until it does not want to be called again, as it does while somebody else has
// what it is about, and returns its last error; or ctx's cause, once that is done. waited is
// how long it took in all, limit at the most but for the last try; 0 if one was enough. Every
// wait for what is in use is here; locks are waited for by vfs.WaitLock.
func soon(ctx context.Context, limit time.Duration, try func() (again bool, err error)) (waited time.Duration, err error) {
	begun := time.Now()
	for pause := time.Millisecond; ; pause = min(2*pause, longestPause) {
		again, err := try()
		if !again || waited >= limit {
			return waited, err
		}
		select {
		case <-time.After(min(pause, limit-waited)):
			waited = time.Since(begun)
		case <-ctx.Done():
			return time.Since(begun), context.Cause(ctx)
		}
	}
}
