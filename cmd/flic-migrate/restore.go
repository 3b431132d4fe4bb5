package main

import (
	"context"
	"errors"
	"net"
	"os"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/qmp/session"
	"github.com/flic-migrate/flic-migrate/stream/pipe"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/lazy"
	"github.com/flic-migrate/flic-migrate/tier/progress"
	"github.com/flic-migrate/flic-migrate/tier/rescue"
	"github.com/flic-migrate/flic-migrate/tier/restore"
	"github.com/flic-migrate/flic-migrate/tier/store"
)

type restoreCmd struct {
	*app
	lazy     choice
	recover  bool
	portable bool
	socket   string
	learn    time.Duration
	zeros    bool
	nvram    string
	disks    disksFlags
	workers  count
	report   string
	status   string
	control  string
	json     bool
	quiet    bool
}

func newRestore(a *app) *cobra.Command {
	r := &restoreCmd{
		app:     a,
		lazy:    choice{value: "auto", choices: []string{"auto", "always", "never"}},
		workers: count{0, 0, 1024},
	}
	c := &cobra.Command{
		Use:   "restore [flags] NAME[@N] > STREAM",
		Short: "Write a checkpoint's migration stream to standard output",
		Long: `Restore writes the migration stream of a checkpoint to standard output, for a
QEMU that was started with -incoming. NAME@N is the VM's N-th checkpoint, NAME
alone its newest. Every page is checked before it is written: a damaged
checkpoint ends in an error and never in a guest with wrong memory.

The QEMU that reads it needs the same machine type, devices, memory size and CPU
model as the one that was saved; "flic-migrate show" says what is known of it.

A QEMU may refuse what another one has saved: pages that QEMU has compressed
itself (removed in 9.1), ZERO records that are not of zeroes, COLO. With --portable
the stream has none of that, and its pages are the same. resume asks for it.

If restore fails before the first byte, it writes a line that is no migration
stream, because QEMU would wait for ever on an empty one. That is what QEMU gets if the
PATH of its exec: shell does not have the program: name it by its whole path.`,
		Example: `  qemu-system-x86_64 -machine pc-q35-7.2 -m 512 ... \
      -incoming "exec:exec /usr/local/bin/flic-migrate restore --store /srv/vms web1"

  # The third checkpoint, into a file:
  flic-migrate restore --store /srv/vms web1@3 > web1.stream`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return r.run(cmd.Context(), args[0]) },
	}
	fs := c.Flags()
	fs.Var(&r.lazy, "lazy", "let the guest run before all of its memory is there")
	fs.BoolVar(&r.recover, "recover", false, "go on with a lazy restore whose server has died, for QEMU's migrate-recover")
	fs.BoolVar(&r.portable, "portable", false, "put what every QEMU loads in the place of what newer ones, or ones with other capabilities, refuse")
	fs.StringVar(&r.socket, "socket", "", "with --recover: the path of a socket on which QEMU listens, instead of standard input and output")
	fs.DurationVar(&r.learn, "learn", learnDefault, "lazy: hold back what the guest does not ask for until it asked for nothing for so long, to learn its working set")
	fs.BoolVar(&r.zeros, "zero-rest", true, "lazy: in the end send the pages without content as well, which QEMU 10.2 and later need; earlier ones are done sooner with --zero-rest=false")
	fs.StringVar(&r.nvram, "nvram-from", "", "the NVRAM file, if it is no longer where the checkpoint says")
	r.disks.add(fs)
	fs.Var(&r.workers, "workers", "decompressing threads; 0: one for each CPU")
	addMetrics(fs, "restore")
	fs.StringVar(&r.report, "report", "", "write the JSON report to this file as well, also after a failure")
	fs.StringVar(&r.control, "control", "", "for resume: the socket on which it is told how far the restore is and how it went")
	fs.StringVar(&r.status, "status", "", "keep in this file how far the restore is")
	fs.BoolVar(&r.json, "json", false, "end with the report as one line of JSON on standard error")
	fs.BoolVar(&r.quiet, "quiet", false, "no progress and no summary, only warnings and errors")
	setKey(fs, "recover", "restore-recover")
	setKey(fs, "control", "")
	return c
}

// restoreReport is the JSON document of a restore.
type restoreReport = session.ServerReport

func (r *restoreCmd) run(ctx context.Context, name string) error {
	// Before anything that a store can hold up.
	control, err := session.Attach(r.control)
	if err != nil {
		// A guest is worth more than the word of how it does.
		r.log().Warn(err.Error())
	}
	w := &serving{restoreCmd: r, control: control, beats: newStatusFile(r.status, r.log()), measures: serverMetrics{set: r.metrics}}
	doc, err := w.restore(ctx, name)
	w.measures.restored(&doc)
	doc.ExitCode = exitCode(err)
	if err != nil {
		doc.Error = oneLine(err)
	}
	if r.json || r.report != "" {
		line := writeReportDoc(r.report, doc, r.log())
		if r.json {
			r.last = line
		}
	}
	control.Close(doc, integrity.IsCorrupt(err))
	return err
}

// serving is one run of restore.
type serving struct {
	*restoreCmd
	control *session.Control
	beats   *statusFile
	meter   *meter

	measures serverMetrics
}

// progress tells everybody how far it is who wants to know.
func (w *serving) progress(p progress.State) {
	w.control.Progress(p)
	w.beats.progress(p)
	w.measures.progress(p)
	if w.meter != nil {
		w.meter.show(p)
	}
}

func (w *serving) restore(ctx context.Context, name string) (doc restoreReport, err error) {
	ref, err := store.ParseRef(name)
	if err != nil {
		return doc, err
	}
	switch {
	case w.recover && ref.N == 0:
		return doc, errRecoverWhich
	case w.recover && w.lazy.value == "never":
		return doc, errRecoverEager
	case w.socket != "" && !w.recover:
		return doc, usageError{errors.New("--socket goes with --recover")}
	}
	if isTerminal(w.stdout.File) && w.socket == "" {
		return doc, usageError{errors.New("restore writes a migration stream to its standard output, which is a terminal; see flic-migrate restore --help")}
	}
	st, err := w.openStore(ctx, false)
	if err != nil {
		return doc, err
	}
	w.meter = newProgress(w.stderr, w.quiet)
	defer w.meter.finish()
	c, err := st.OpenCheckpoint(ctx, ref, checkpoint.Options{NVRAM: w.nvram, Disks: w.disks.options(w.progress)})
	if err != nil {
		return doc, err
	}
	doc.Checkpoint = c.Ref.String()
	mode := migration.LazyMode(w.lazy.value)
	if w.recover {
		mode = migration.LazyAlways
	}
	if doc.Lazy, doc.Reason, err = session.Lazily(mode, c); err != nil {
		return doc, err
	}
	if doc.Reason != "" && !w.quiet {
		w.log().Info("restoring eagerly", "reason", doc.Reason)
	}
	type outcome struct {
		doc restoreReport
		err error
	}
	done := make(chan outcome, 1)
	go func(doc restoreReport) {
		err := rescue.Call(func() (err error) {
			if doc.Lazy {
				doc.LazyReport, err = w.lazily(ctx, st, c)
			} else {
				doc.Report, err = w.eagerly(ctx, c)
			}
			return err
		})
		done <- outcome{doc, err}
	}(doc)
	select {
	case o := <-done:
		// c is not closed: QEMU's monitor stands still until this process is
		// gone, and its end closes everything.
		return o.doc, o.err
	case <-ctx.Done():
	}
	// The restore may be in a write to a pipe that nobody reads, which no
	// context ends. There is nothing to clean up, so nobody has to wait for it.
	select {
	case o := <-done:
		return o.doc, o.err
	case <-time.After(time.Second):
		return doc, context.Cause(ctx)
	}
}

func (w *serving) eagerly(ctx context.Context, c *store.Checkpoint) (restore.Report, error) {
	// Fewer and larger writes; no matter if it is not a pipe, or if the
	// kernel's limit for pipes says no.
	unix.FcntlInt(w.stdout.Fd(), unix.F_SETPIPE_SZ, 1<<20)
	return restore.Run(ctx, c.Checkpoint, w.stdout, restore.Options{Workers: w.workers.n, Progress: w.progress, Portable: w.portable})
}

// lazily serves c over stdin and stdout, or over the socket that it was given.
func (w *serving) lazily(ctx context.Context, st *store.Store, c *store.Checkpoint) (*lazy.Report, error) {
	s := session.LazyServer{
		Learn: w.learn, ZeroRest: w.zeros, Recover: w.recover, Log: w.log(),
		Progress: func(p lazy.Progress) {
			w.progress(progress.State{Phase: "restore", Pages: p.Pages, PagesAll: p.PagesAll})
		},
		Begin: func() (session.Ends, error) {
			if w.recover && time.Since(started) > session.BeginTime {
				return session.Ends{}, session.ErrTooLate
			}
			in, out, err := w.files()
			if err != nil {
				return session.Ends{}, err
			}
			// Its waiting for requests does not end each time that QEMU has read
			// pages from the same socket, as a plain read does.
			reader, err := pipe.New(ctx, int(in.Fd()))
			if err != nil {
				return session.Ends{}, err
			}
			writer, err := pipe.NewWriter(out)
			if err != nil {
				return session.Ends{}, err
			}
			fd := int(out.Fd())
			return session.Ends{In: reader, Out: writer, Resize: func(n int) int { return pipe.SetCapacity(fd, n) }}, nil
		},
	}
	return s.Serve(ctx, st, c)
}

// files are where the requests come from and the stream goes.
func (w *serving) files() (in, out *os.File, err error) {
	if w.socket == "" {
		w.stdout.used.Store(true) // nothing but stream may follow
		return w.stdin, w.stdout.File, nil
	}
	conn, err := net.DialTimeout("unix", w.socket, connectTime)
	if err != nil {
		return nil, nil, err
	}
	defer conn.Close()
	f, err := conn.(*net.UnixConn).File()
	return f, f, err
}

// connectTime is how long a QEMU may take that listens.
const connectTime = 10 * time.Second

// started is when this process has begun, nearly.
var started = time.Now()
