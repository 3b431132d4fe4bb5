package migration

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp"
)

// letGoTime is how long a QEMU whose migration has ended may go on to have it in use.
// It needs its main loop for the rest, which a busy machine or a slow disk can hold up.
var letGoTime = 10 * time.Second

// errHeld: QEMU still has its migration in use.
var errHeld = errors.New("QEMU goes on to have the migration in use that it says has ended")

// letGo waits until QEMU has nothing of its migration in use any more. A migration is
// "completed", "failed" or "cancelled" in query-migrate before QEMU cleans up after it,
// and it looks at its capabilities to know what there is to clean up
// (migration_incoming_state_destroy and migrate_fd_cleanup in migration/migration.c).
// Changed before that, they are taken for those of the migration:
//
//   - multifd on: from 8.0 on QEMU looks for channels that it never had, and crashes;
//   - postcopy-ram off: from 10.2 on userfaultfd stays registered, and whoever touches a
//     page that the guest gives back later (a balloon, free page reporting) waits for ever.
//
// So this comes before any SetCapabilities after a migration. The last thing that QEMU
// does is to take the migration out of what query-yank lists. A QEMU that has no such
// command (before 6.0), or whose user keeps it from us, is not waited for.
//
// also is asked with the first question; its errors come after letGo's own.
func letGo(ctx context.Context, x qmp.Executor, also ...qmp.Call) error {
	var list []yank
	errs := qmp.Together(ctx, x, append([]qmp.Call{{Command: "query-yank", Result: &list}}, also...)...)
	errs[0] = untilLetGo(ctx, x, list, errs[0])
	return errors.Join(errs...)
}

// untilLetGo is letGo when it has asked once.
func untilLetGo(ctx context.Context, x qmp.Executor, list []yank, err error) error {
	limit := time.NewTimer(letGoTime)
	defer limit.Stop()
	for {
		var refused *qmp.Error
		switch {
		case errors.As(err, &refused):
			return nil
		case err != nil:
			return err
		case !slices.ContainsFunc(list, func(y yank) bool { return y.Type == "migration" }):
			return nil
		}
		select {
		case <-time.After(letGoEvery):
		case <-limit.C:
			return fmt.Errorf("%w (for %v now): its capabilities are left as they are, as changing them could end it", errHeld, letGoTime)
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		list = nil
		err = x.Execute(ctx, "query-yank", nil, &list)
	}
}

// letGoEvery is the time between two looks. What is waited for takes about a millisecond
// on a machine that is not busy.
const letGoEvery = time.Millisecond

// yank is one of what query-yank lists: connections that QEMU could be made to drop.
type yank struct {
	Type string `json:"type"` // "migration", "chardev", "block-node"
}
