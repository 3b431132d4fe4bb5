package main

import (
	"context"
	"errors"
	"runtime/debug"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/lazy"
	"github.com/flic-migrate/flic-migrate/tier/restore"
	"github.com/flic-migrate/flic-migrate/tier/store"
)

type restoreCmd struct {
	*app
	lazy    choice
	recover bool
	socket  string
	learn   time.Duration
	nvram   string
	workers count
	report  string
	status  string
	json    bool
	quiet   bool
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

If restore fails before the first byte, it writes a line that is no migration
stream, because QEMU would wait for ever on an empty one.`,
		Example: `  qemu-system-x86_64 -machine pc-q35-7.2 -m 512 ... \
      -incoming "exec:exec flic-migrate restore --store /srv/vms web1"

  # The third checkpoint, into a file:
  flic-migrate restore --store /srv/vms web1@3 > web1.stream`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return r.run(cmd.Context(), args[0]) },
	}
	fs := c.Flags()
	fs.Var(&r.lazy, "lazy", "let the guest run before all of its memory is there")
	fs.BoolVar(&r.recover, "recover", false, "go on with a lazy restore whose server has died, for QEMU's migrate-recover")
	fs.StringVar(&r.socket, "socket", "", "with --recover: the path of a socket on which QEMU listens, instead of standard input and output")
	fs.DurationVar(&r.learn, "learn", learnDefault, "lazy: hold back what the guest does not ask for until it asked for nothing for so long, to learn its working set")
	fs.StringVar(&r.nvram, "nvram-from", "", "the NVRAM file, if it is no longer where the checkpoint says")
	fs.Var(&r.workers, "workers", "decompressing threads; 0: one for each CPU")
	fs.StringVar(&r.report, "report", "", "write the JSON report to this file as well, also after a failure")
	fs.StringVar(&r.status, "status", "", "keep in this file how far the restore is")
	fs.BoolVar(&r.json, "json", false, "end with the report as one line of JSON on standard error")
	fs.BoolVar(&r.quiet, "quiet", false, "no progress, nothing but warnings and errors")
	setKey(fs, "recover", "restore-recover")
	return c
}

// restoreReport is the JSON document of a restore.
type restoreReport struct {
	Checkpoint string `json:"checkpoint,omitempty"` // NAME@N
	ExitCode   int    `json:"exit_code"`
	Error      string `json:"error,omitempty"`
	Lazy       bool   `json:"lazy"`
	Reason     string `json:"reason,omitempty"` // why it is eager although it might have been lazy
	restore.Report
	LazyReport *lazy.Report `json:"lazy_report,omitempty"`
}

func (r *restoreCmd) run(ctx context.Context, name string) error {
	debug.SetGCPercent(gcPercent)
	var doc restoreReport
	err := r.restore(ctx, name, &doc)
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
	return err
}

func (r *restoreCmd) restore(ctx context.Context, name string, doc *restoreReport) error {
	ref, err := store.ParseRef(name)
	if err != nil {
		return err
	}
	switch {
	case r.recover && ref.N == 0:
		return errRecoverWhich
	case r.recover && r.lazy.value == "never":
		return errRecoverEager
	case r.socket != "" && !r.recover:
		return usageError{errors.New("--socket goes with --recover")}
	}
	if isTerminal(r.stdout.File) && r.socket == "" {
		return usageError{errors.New("restore writes a migration stream to its standard output, which is a terminal; see flic-migrate restore --help")}
	}
	// Before anything that a store can hold up.
	beats := newStatusFile(r.status, r.log())
	st, err := r.openStore(ctx, false)
	if err != nil {
		return err
	}
	c, err := st.OpenCheckpoint(ctx, ref, checkpoint.Options{NVRAM: r.nvram})
	if err != nil {
		return err
	}
	doc.Checkpoint = c.Ref.String()
	mode := r.lazy.value
	if r.recover {
		mode = "always"
	}
	if doc.Lazy, doc.Reason, err = wantLazy(mode, c.Checkpoint); err != nil {
		return err
	}
	if doc.Reason != "" && !r.quiet {
		r.log().Info("restoring eagerly", "reason", doc.Reason)
	}
	p := newProgress(r.stderr, r.quiet)
	defer p.finish()
	o := restore.Options{Workers: r.workers.n, Progress: beats.wrap(p.callback())}
	done := make(chan error, 1)
	go func() {
		if doc.Lazy {
			done <- r.serve(ctx, st, c, o, doc)
			return
		}
		// Fewer and larger writes; no matter if it is not a pipe, or if the
		// kernel's limit for pipes says no.
		unix.FcntlInt(r.stdout.Fd(), unix.F_SETPIPE_SZ, 1<<20)
		var err error
		doc.Report, err = restore.Run(ctx, c.Checkpoint, r.stdout, o)
		done <- err
	}()
	select {
	case err := <-done:
		// c is not closed: QEMU's monitor stands still until this process is
		// gone, and its end closes everything.
		return err
	case <-ctx.Done():
	}
	// The restore may be in a write to a pipe that nobody reads, which no
	// context ends. There is nothing to clean up, so nobody has to wait for it.
	select {
	case err := <-done:
		return err
	case <-time.After(time.Second):
		*doc = restoreReport{Checkpoint: doc.Checkpoint}
		return context.Cause(ctx)
	}
}
