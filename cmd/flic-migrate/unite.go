package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/rescue"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// uniteName is what this program is called while it gives back, after a save, the space of
// pages that another checkpoint has stored too, which was made at the same time.
const uniteName = "flic-migrate-unite"

// uniteLimit is how long that may take for one checkpoint, the wait for others that do so
// included. What is not done then is gc's.
const uniteLimit = 2 * time.Minute

// unite unites a checkpoint with those that came while it was saved, if there are any. The
// checkpoint is there, whatever comes of it.
func (a *app) unite(ctx context.Context, st *store.Store, name string, rep *checkpoint.Report, share string, quiet bool) {
	if rep == nil || rep.Beside == 0 || ctx.Err() != nil {
		return
	}
	var u store.United
	ref, err := store.ParseRef(name)
	if err == nil {
		err = rescue.Call(func() (err error) {
			ctx, cancel := context.WithTimeout(ctx, uniteLimit)
			defer cancel()
			u, err = st.Unite(ctx, ref, store.UniteOptions{SameVM: share == save.ShareVM, Workers: 1})
			return err
		})
	}
	switch {
	case err != nil && ctx.Err() == nil:
		a.log().Warn("pages may be stored twice that another checkpoint has, made at the same time", "checkpoint", name, "cause", oneLine(err))
	case err == nil && u.Pages > 0 && !quiet:
		fmt.Fprintf(a.stderr, "flic-migrate: %s: %d pages of it, and of checkpoints that were made at the same time, were stored twice, and are stored once now: %s freed\n", name, u.Pages, human(u.Bytes))
	}
}

// startUniting starts a process that unites a checkpoint: QEMU's monitor stands still until
// save has ended.
func startUniting(dir, name, share string) error {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	// Of what QEMU has open nothing is to stay open.
	if err := unix.CloseRange(3, math.MaxInt32, unix.CLOSE_RANGE_CLOEXEC); err != nil && !errors.Is(err, unix.ENOSYS) && !errors.Is(err, unix.EINVAL) {
		return err
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{uniteName, dir, name, share}
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	return cmd.Start() // it ends by itself, after this process
}

// uniteMain is that process's main function. Nobody hears of what it does.
func uniteMain(fsys vfs.FS, args []string) int {
	signal.Ignore(syscall.SIGPIPE, syscall.SIGHUP)
	ctx, stop := withSignals(context.Background())
	defer stop()
	if len(args) != 3 {
		return exitUsage
	}
	a := newApp(fsys)
	a.store = args[0]
	// What guests do is more urgent.
	_ = unix.Setpriority(unix.PRIO_PROCESS, 0, uniteNice)
	st, err := a.openStore(ctx, false)
	if err == nil {
		a.unite(ctx, st, args[1], &checkpoint.Report{Beside: 1}, args[2], true)
	}
	return exitCode(err)
}

// uniteNice is its niceness.
const uniteNice = 10
