package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/stream/pipe"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/lazy"
	"github.com/flic-migrate/flic-migrate/tier/progress"
	"github.com/flic-migrate/flic-migrate/tier/restore"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/workingset"
)

// wantLazy decides for restore, which sees less than resume does: whether QEMU
// has the capability postcopy-ram can be known only from its command line.
// why is the reason for eager, empty if that was asked for.
func wantLazy(mode string, c *checkpoint.Checkpoint) (yes bool, why string, err error) {
	possible := lazy.Possible(c)
	switch {
	case mode == "never":
		return false, "", nil
	case mode == "always":
		return true, "", possible
	case possible != nil:
		return false, possible.Error(), nil
	case !parentHasPostcopy():
		// Not worth a word: a QEMU that does not ask for it gets what it
		// expects.
		return false, "", nil
	}
	if err := userfaultfd(); err != nil {
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

// userfaultfd tells why a process of this user may not use userfaultfd; QEMU
// is one.
func userfaultfd() error {
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|unix.O_NONBLOCK, 0, 0)
	if errno == 0 {
		return unix.Close(int(fd))
	}
	return fmt.Errorf("userfaultfd: %w: QEMU can't restore lazily (set sysctl vm.unprivileged_userfaultfd=1, or, with QEMU 8.1 or later, give it /dev/userfaultfd, or CAP_SYS_PTRACE)", errno)
}

// serve restores c lazily over stdin and stdout, or over the socket that it was given.
func (r *restoreCmd) serve(ctx context.Context, st *store.Store, c *store.Checkpoint, o restore.Options, doc *restoreReport) error {
	var ends lateEnds
	s := lazyServer{app: r.app, learn: r.learn, recover: r.recover}
	s.begin = func() error {
		if r.recover && time.Since(started) > beginTime {
			return errTooLate
		}
		in, out := r.stdin, r.stdout.File
		if r.socket == "" {
			r.stdout.used.Store(true) // nothing but stream may follow
		} else {
			conn, err := net.Dial("unix", r.socket)
			if err != nil {
				return err
			}
			defer conn.Close()
			f, err := conn.(*net.UnixConn).File()
			if err != nil {
				return err
			}
			in, out = f, f
		}
		// Its waiting for requests does not end each time that QEMU has read pages
		// from the same socket, as a plain read does.
		reader, err := pipe.New(ctx, int(in.Fd()))
		if err != nil {
			return err
		}
		writer, err := pipe.NewWriter(out)
		if err != nil {
			return err
		}
		ends = lateEnds{reader, writer}
		fd := int(out.Fd())
		s.resize = func(n int) int { return pipe.SetCapacity(fd, n) }
		return nil
	}
	if o.Progress != nil {
		s.progress = func(p lazy.Progress) {
			o.Progress(progress.State{Phase: "restore", Pages: p.Pages, PagesAll: p.PagesAll})
		}
	}
	return s.serve(ctx, st, c, &ends, doc)
}

var (
	started = time.Now()
	// beginTime is how long the process may take to be ready for a QEMU that is to
	// recover: one that was held up for longer, by its store, may have been given
	// up and another asked for, and QEMU does not survive two.
	beginTime  = migration.RecoverTime - 10*time.Second
	errTooLate = fmt.Errorf("not ready within %v: another server may have been started", beginTime)
)

// lateEnds are a stream and its return path, which are there when a server begins.
type lateEnds struct {
	io.Reader
	deadlineWriter
}

// deadlineWriter is a Writer that does not have to wait for ever for who reads.
type deadlineWriter interface {
	io.Writer
	SetWriteDeadline(time.Time) error
}

// lazyServer serves a checkpoint's pages to a QEMU, first those that earlier
// resumes learned.
type lazyServer struct {
	*app
	learn    time.Duration
	recover  bool
	progress func(lazy.Progress) // may be nil
	begin    func() error        // lazy.Options.Begin
	resize   func(int) int       // lazy.Options.Resize, from begin on
}

func (s *lazyServer) serve(ctx context.Context, st *store.Store, c *store.Checkpoint, ends io.ReadWriter, doc *restoreReport) error {
	lazy.TuneProcess(c.Checkpoint)
	blocks := c.Meta.WorkingSetBlocks()
	lo := lazy.Options{
		HoldBackground: s.learn, MaxHold: 10 * s.learn, Log: s.log(), Progress: s.progress,
		Begin: s.begin, Resize: func(n int) int { return s.resize(n) },
		First: func() []workingset.PageRun {
			t, err := st.Touched(ctx, c.Ref)
			if err != nil {
				s.log().Warn("what earlier resumes learned can't be used", "error", err)
				return nil
			}
			return t.Bind(c.Meta.PageSize, blocks)
		},
	}
	run := lazy.Serve
	if s.recover {
		run = lazy.Recover
	}
	rep, err := run(ctx, c.Checkpoint, ends, ends, lo)
	doc.LazyReport = rep
	if rep != nil && len(rep.Touched) > 0 {
		names := make([]string, len(blocks))
		for i, b := range blocks {
			names[i] = b.Name
		}
		if lerr := st.AddTouched(ctx, c.Ref, c.Meta.PageSize, names, rep.Touched); lerr != nil {
			s.log().Warn("what was learned is not kept", "error", lerr)
		}
	}
	if err != nil {
		return err
	}
	return rep.Wait(ctx)
}

// writeReportDoc writes a command's report where --report says.
func writeReportDoc(path string, doc any, log *slog.Logger) []byte {
	line, err := json.Marshal(doc)
	if err == nil && path != "" {
		err = writeReport(path, line)
	}
	if err != nil {
		log.Warn("the report was not written", "error", err)
	}
	return line
}

var errRecoverEager = usageError{errors.New("--recover goes on with a lazy restore: it does not go with --lazy never")}

var errRecoverWhich = usageError{errors.New("--recover needs the checkpoint that is being restored, NAME@N: the newest may be another, and QEMU can't tell one's pages from another's")}

// learnDefault: the background is not held back unless it is asked for.
const learnDefault = time.Duration(0)
