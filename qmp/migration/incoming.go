package migration

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp"
)

// place is where a QEMU finds an incoming stream: at a URI, or at a process that it
// starts.
type place struct {
	uri     string
	command []string // instead of uri
}

// arguments are those of migrate-incoming. known are those that this QEMU has. A
// process needs no shell where QEMU takes its words one by one (8.2).
func (p place) arguments(known map[string]bool) map[string]any {
	switch {
	case p.command == nil:
		return map[string]any{"uri": p.uri}
	case known["channels"]:
		return map[string]any{"channels": []any{map[string]any{
			"channel-type": "main", "addr": map[string]any{"transport": "exec", "args": p.command}}}}
	}
	return map[string]any{"uri": ExecURI(p.command)}
}

// incoming has a QEMU load. stays tells that it will not end by itself if it can't,
// so that it can be asked why.
func incoming(ctx context.Context, x qmp.Executor, p place, lazy bool) (stays bool, err error) {
	known := arguments(ctx, x, "migrate-incoming")
	args := p.arguments(known)
	// Never lazily: a QEMU that fails when its guest has run would take userfaultfd
	// away and keep the guest, and what has not come would read as zero.
	if stays = known["exit-on-error"] && !lazy; stays {
		args["exit-on-error"] = false
	}
	return stays, x.Execute(ctx, "migrate-incoming", args, nil)
}

// arguments are the names of a command's arguments, as QEMU itself describes them
// (query-qmp-schema). There are none that matter here before 8.2, and QEMU needs some
// milliseconds for the answer; nil if it is not known.
func arguments(ctx context.Context, x qmp.Executor, command string) map[string]bool {
	if v, ok := x.(interface{ Version() qmp.Version }); !ok || !since(v.Version(), 8, 2) {
		return nil
	}
	var schema []struct {
		Name    string `json:"name"`
		Type    string `json:"meta-type"`
		Args    string `json:"arg-type"`
		Members []struct {
			Name string `json:"name"`
		} `json:"members"`
	}
	if err := x.Execute(ctx, "query-qmp-schema", nil, &schema); err != nil {
		return nil
	}
	var of string
	for _, s := range schema {
		if s.Type == "command" && s.Name == command {
			of = s.Args
		}
	}
	for _, s := range schema {
		if s.Type == "object" && s.Name == of {
			names := make(map[string]bool)
			for _, m := range s.Members {
				names[m.Name] = true
			}
			return names
		}
	}
	return nil
}

// deviceTime is how long a QEMU may be seen in StatusPostcopyDevice before it is given
// up. It is there while its main loop loads the devices, and so can't be asked; asked it
// can be if a device waits for a disk, or if one has failed to load. Then QEMU waits for
// the end of the stream (10.2 and later), and says nothing.
var deviceTime = 2 * time.Second

// errDevice: a device has failed to load.
var errDevice = fmt.Errorf("%w: QEMU does not go on after a device that it could not load", ErrBeforeRun)

// leaveInmigrate waits for the end of the run state inmigrate. There is no
// event for it when QEMU was started with -S, so it asks, and QEMU has little
// else to do.
func leaveInmigrate(ctx context.Context, x qmp.Executor, lazy bool) error {
	var since time.Time // that it is seen loading devices
	for start := time.Now(); ; {
		s, err := qmp.QueryStatus(ctx, x)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, qmp.ErrLost):
			return fmt.Errorf("%w: QEMU has ended, and its output has the reason: %w", ErrBeforeRun, err)
		case err != nil || s.Status != "inmigrate":
			return err
		}
		// So that it is known a twentieth too late at the most.
		wait := min(max(time.Since(start)/20, time.Millisecond/2), maxInmigrateWait)
		if lazy && wait == maxInmigrateWait {
			// No failure: what is wrong with the connection is seen at the next question.
			switch info, err := Query(ctx, x); {
			case err != nil || info.Status != StatusPostcopyDevice:
				since = time.Time{}
			case since.IsZero():
				since = time.Now()
			case time.Since(since) > deviceTime:
				return errDevice
			}
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
		}
	}
}

// maxInmigrateWait is the longest time between two questions of leaveInmigrate.
const maxInmigrateWait = 50 * time.Millisecond

// giveUp asks a QEMU that could not load why, and ends it, as it can't be used any
// more. Others end by themselves; err is why this one does not.
func giveUp(ctx context.Context, x qmp.Executor, err error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), giveUpTime)
	defer cancel()
	if info, e := Query(ctx, x); e == nil && info.Status == StatusFailed && info.ErrorDesc != "" {
		err = fmt.Errorf("%w: QEMU says: %s (its output may say more)", ErrBeforeRun, info.ErrorDesc)
	}
	if e := qmp.Quit(ctx, x); e != nil {
		err = fmt.Errorf("%w; it does not end by itself: %w", err, e)
	}
	return err
}

// giveUpTime is how long a QEMU that has failed may take for two answers.
const giveUpTime = 2 * time.Second
