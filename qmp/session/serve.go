package session

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/qmp/preflight"
	"github.com/flic-migrate/flic-migrate/tier/lazy"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/workingset"
)

// Ends are where a lazy server writes the stream and reads QEMU's requests.
type Ends struct {
	In  io.Reader
	Out DeadlineWriter
	// Resize is lazy.Options.Resize.
	Resize func(int) int
}

// DeadlineWriter is a Writer that does not have to wait for ever for who reads.
type DeadlineWriter interface {
	io.Writer
	SetWriteDeadline(time.Time) error
}

// LazyServer serves a checkpoint's pages to a QEMU, first those that earlier resumes
// learned, and keeps what is learned this time.
type LazyServer struct {
	Learn    time.Duration // lazy.Options.HoldBackground
	ZeroRest bool          // lazy.Options.ZeroRest
	Recover  bool          // go on for a server that has died
	Progress func(lazy.Progress)
	Log      *slog.Logger
	// Begin gives the ends, when all is done that can fail without them. From then
	// on nothing but stream must be written to them.
	Begin func() (Ends, error)
}

// Serve returns when QEMU says that all memory is there. The report is there in any
// case, unless nothing was done.
func (s *LazyServer) Serve(ctx context.Context, st *store.Store, c *store.Checkpoint) (*lazy.Report, error) {
	lazy.TuneProcess(c.Checkpoint)
	blocks := c.Meta.WorkingSetBlocks()
	var ends lateEnds
	lo := lazy.Options{
		HoldBackground: s.Learn, MaxHold: 10 * s.Learn, ZeroRest: s.ZeroRest, Progress: s.Progress,
		Begin: func() error {
			e, err := s.Begin()
			ends = lateEnds{e.In, e.Out, e.Resize}
			return err
		},
		Resize: func(n int) int { return ends.resize(n) },
		First: func() []workingset.PageRun {
			t, err := st.Touched(ctx, c.Ref)
			if err != nil {
				s.Log.Warn("what earlier resumes learned can't be used", "error", err)
				return nil
			}
			return t.Bind(c.Meta.PageSize, blocks)
		},
	}
	run := lazy.Serve
	if s.Recover {
		run = lazy.Recover
	}
	rep, err := run(ctx, c.Checkpoint, &ends, &ends, lo)
	if rep != nil && len(rep.Touched) > 0 {
		names := make([]string, len(blocks))
		for i, b := range blocks {
			names[i] = b.Name
		}
		keeping, stop := context.WithTimeout(context.WithoutCancel(ctx), keepTime)
		defer stop()
		if lerr := st.AddTouched(keeping, c.Ref, c.Meta.PageSize, names, rep.Touched); lerr != nil {
			s.Log.Warn("what was learned is not kept", "error", lerr)
		}
	}
	if err != nil {
		return rep, err
	}
	return rep, rep.Wait(ctx)
}

// keepTime is how long a server that is asked to end takes to keep what was learned.
const keepTime = time.Second

// lateEnds are Ends that are there when the server begins.
type lateEnds struct {
	io.Reader
	DeadlineWriter
	resize func(int) int
}

// BeginTime is how long a process that is to recover may take to be ready: one that
// was held up for longer, by its store, may have been given up and another asked for,
// and QEMU does not survive two.
const BeginTime = migration.RecoverTime - 10*time.Second

// ErrTooLate: a server was not ready within BeginTime.
var ErrTooLate = fmt.Errorf("not ready within %v: another server may have been started", BeginTime)

// Lazily decides for a server that was not started by a resume, and sees less:
// whether QEMU has the capability postcopy-ram can be known only from its command
// line. why is the reason for eager, empty if that was asked for.
func Lazily(mode migration.LazyMode, c *store.Checkpoint) (yes bool, why string, err error) {
	possible := lazy.Possible(c.Checkpoint)
	switch {
	case mode == migration.LazyNever:
		return false, "", nil
	case mode == migration.LazyAlways:
		return true, "", possible
	case possible != nil:
		return false, possible.Error(), nil
	case !parentHasPostcopy():
		// Not worth a word: a QEMU that does not ask for it gets what it
		// expects.
		return false, "", nil
	}
	if err := preflight.OwnUserfaultfd(); err != nil {
		return false, err.Error(), nil
	}
	return true, "", nil
}

// parentHasPostcopy tells whether the process that started this one is a QEMU
// with -global migration.x-postcopy-ram=on.
func parentHasPostcopy() bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", os.Getppid()))
	return err == nil && strings.Contains(string(b), "migration.x-postcopy-ram=on")
}
