package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"time"

	"github.com/spf13/cobra"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/qmp/migration/rounds"
	"github.com/flic-migrate/flic-migrate/stream/pipe"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/track"
)

type checkpointCmd struct {
	*app
	encoding
	placement
	monitor   monitorFlags
	mode      choice
	then      choice
	timer     string
	rounds    count
	beta      float64
	flashRate float64
	timerMax  time.Duration
	downtime  time.Duration
	patience  time.Duration
	giveUp    bool
	json      bool
	quiet     bool
}

func newCheckpoint(a *app) *cobra.Command {
	c := &checkpointCmd{
		app:    a,
		mode:   choice{value: "stop", choices: []string{"stop", "live", "background"}},
		then:   choice{value: "", choices: []string{"run", "pause", "quit"}},
		rounds: count{1, 1, rounds.Max},
	}
	cmd := &cobra.Command{
		Use:   "checkpoint [flags] {--qmp SOCKET | --domain DOMAIN} NAME",
		Short: "Save a running VM through its monitor",
		Long: `Checkpoint saves the VM of a QEMU as NAME's next checkpoint: it watches which
pages the guest writes, so that they go to NVRAM, saves it, lets it run on, and
reports. The QEMU needs nothing but a monitor (-qmp unix:...), or libvirt's.

  --mode stop        the guest is paused while it is saved
  --mode live        it runs while it is saved, but for the last moment; pages that
                     it writes meanwhile are saved again
  --mode background  it runs, and what is saved is its state at the beginning
                     (QEMU's background-snapshot, which needs userfaultfd)

A guest that is paused is saved as it is, whatever the mode. Afterwards the guest
does what it did before, or what --then says.

With an NVRAM file and without --working-set, the guest is watched first, for as
long as --timer says, by default as FLIC's equation (1) does (see track). --timer
with --working-set joins the two sets.

Whatever goes wrong, or if it is interrupted, the guest does what it did before,
QEMU's migration settings are what they were, and no checkpoint is left. If it is
killed (SIGKILL) during --mode stop the guest stays paused; the next checkpoint of
it lets it run first.`,
		Example: `  qemu-system-x86_64 ... -qmp unix:/run/web1.qmp,server=on,wait=off &
  flic-migrate checkpoint --store /srv/vms --qmp /run/web1.qmp web1
  flic-migrate checkpoint --store /srv/vms --qmp /run/web1.qmp --mode live \
      --nvram /mnt/pmem0/flic --nvram-size 4G web1
  flic-migrate checkpoint --store /srv/vms --domain web1 web1`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.run(cmd.Context(), args[0], cmd.Flags().Changed("timer"))
		},
	}
	fs := cmd.Flags()
	c.monitor.add(fs)
	fs.Var(&c.mode, "mode", "when the guest runs meanwhile")
	fs.Var(&c.then, "then", "what becomes of the guest (default: what it did before)")
	c.placement.add(fs)
	fs.StringVar(&c.timer, "timer", "auto", "how long the guest's writes are watched in each round, such as 4s; auto: by equation (1), in all rounds")
	fs.Var(&c.rounds, "rounds", "how often; pages written in more, and in later, rounds are hotter")
	fs.Float64Var(&c.beta, "beta", 3, "auto: safety factor on the time flash takes")
	fs.Float64Var(&c.flashRate, "flash-rate", 0, "auto: how fast a restore reads from flash, MB/s; 0: as measured in the store")
	fs.DurationVar(&c.timerMax, "timer-max", time.Minute, "auto: the longest time that the guest is watched")
	fs.DurationVar(&c.downtime, "downtime", 300*time.Millisecond, "live: how long the guest may stand still")
	fs.DurationVar(&c.patience, "patience", time.Minute, "live: how long to try to keep to that; then the guest is stopped for as long as it takes")
	fs.BoolVar(&c.giveUp, "give-up", false, "live: fail instead of stopping the guest for longer")
	c.encoding.add(fs)
	fs.BoolVar(&c.json, "json", false, "print the report as JSON on standard output")
	fs.BoolVar(&c.quiet, "quiet", false, "no progress and no summary")
	for _, name := range []string{"mode", "then", "rounds", "give-up"} {
		setKey(fs, name, "checkpoint-"+name)
	}
	return cmd
}

// checkpointReport is the JSON document of a checkpoint.
type checkpointReport struct {
	Checkpoint string `json:"checkpoint"` // NAME@N
	migration.CheckpointReport
	// Tracking is missing if the guest was not watched.
	Tracking *rounds.Report     `json:"tracking,omitempty"`
	Save     *checkpoint.Report `json:"save"`
}

func (c *checkpointCmd) run(ctx context.Context, vm string, timed bool) error {
	debug.SetGCPercent(gcPercent)
	if err := store.CheckVM(vm); err != nil {
		return err
	}
	timer, err := c.checkFlags()
	if err != nil {
		return err
	}
	o := c.encoding.options()
	o.VM, o.Log = vm, c.log()
	if err := c.placement.options(&o); err != nil {
		return err
	}
	// Before QEMU is touched.
	st, err := c.openStore(ctx, true)
	if err != nil {
		return err
	}
	if o.Libvirt, err = c.monitor.describe(ctx); err != nil {
		return err
	}
	x, err := c.monitor.dial(ctx, qmp.Options{})
	if err != nil {
		return err
	}
	defer x.Close()
	redial, hangUp := c.monitor.redialer()
	defer hangUp()
	var doc checkpointReport
	if timed || o.NVRAM != "" && o.WorkingSet == nil {
		if err := c.track(ctx, x, redial, timer, &o, &doc); err != nil {
			return err
		}
	}
	var ref store.Ref
	var meta *checkpoint.Meta
	doc.CheckpointReport, err = migration.Checkpoint(ctx, x, migration.CheckpointOptions{
		Mode: migration.Mode(c.mode.value), Then: migration.Then(c.then.value),
		Downtime: c.downtime, Patience: c.patience, GiveUp: c.giveUp,
		Redial: redial,
		Save: func(ctx context.Context, f *os.File, before qmp.RunState) (err error) {
			if ref, meta, err = c.save(ctx, st, f, before, o); err == nil {
				doc.Checkpoint, doc.Save = ref.String(), &meta.Report
			}
			return err
		},
		Undo: func(ctx context.Context) error {
			_, err := st.Remove(ctx, ref)
			return err
		},
	})
	for _, w := range doc.Warnings {
		c.log().Warn(w)
	}
	if !doc.Saved {
		return err
	}
	if err != nil {
		// What is there must be known, whatever else there is to say.
		err = fmt.Errorf("%s is saved, but: %w", doc.Checkpoint, err)
	}
	return errors.Join(err, c.show(doc))
}

// checkFlags returns the timer, 0 for auto.
func (c *checkpointCmd) checkFlags() (timer time.Duration, err error) {
	if !c.monitor.given() {
		return 0, usageError{errors.New("checkpoint needs a QEMU: --qmp or --domain, FLIC_QMP or FLIC_DOMAIN, qmp or domain in the configuration file")}
	}
	if c.monitor.qmp != "" && c.monitor.domain != "" {
		return 0, errTwoMonitors
	}
	if c.timer != "auto" {
		if timer, err = time.ParseDuration(c.timer); err != nil || timer <= 0 {
			return 0, usageError{fmt.Errorf("--timer %s: must be auto or a duration such as 4s", c.timer)}
		}
	}
	if !(c.beta > 0) || !(c.flashRate >= 0) || c.timerMax <= 0 {
		return 0, usageError{errors.New("--beta and --timer-max must be above 0, --flash-rate not below")}
	}
	if c.downtime < time.Millisecond || c.patience < 0 {
		return 0, usageError{errors.New("--downtime must be at least 1ms, and --patience not negative")}
	}
	return timer, nil
}

// track adds the pages that the guest writes to the working set.
func (c *checkpointCmd) track(ctx context.Context, x qmp.Executor, redial migration.Redialer, timer time.Duration, o *save.Options, doc *checkpointReport) error {
	var rate float64
	if timer == 0 {
		var err error
		if rate, err = c.app.flashRate(ctx, c.flashRate); err != nil {
			return err
		}
	}
	set, rep, err := rounds.Run(ctx, x, rounds.Options{
		Interval: timer, Rounds: c.rounds.n,
		Beta: c.beta, FlashRate: rate, Longest: c.timerMax,
		Redial: redial,
	})
	switch {
	case errors.Is(err, migration.ErrNotRunning):
		c.log().Warn("the guest is not running, so its working set is not known")
		return nil
	case errors.Is(err, track.ErrTooSmall):
		c.log().Warn("the working set is not known", "error", err)
		return nil
	case err != nil:
		return err
	}
	doc.Tracking = &rep
	if !c.quiet {
		fmt.Fprintf(c.stderr, "flic-migrate: %d of %d pages are in the working set, after %d rounds and %v; the guest stood still for %v at most\n",
			rep.Hot, rep.Pages, rep.Rounds, rep.Watched.Round(time.Millisecond), rep.Longest)
	}
	if o.WorkingSet == nil {
		o.WorkingSet = set
		return nil
	}
	return o.WorkingSet.Merge(set)
}

// save is the consumer of the migration's stream.
func (c *checkpointCmd) save(ctx context.Context, st *store.Store, f *os.File, before qmp.RunState, o save.Options) (store.Ref, *checkpoint.Meta, error) {
	if c.mode.value == string(migration.ModeBackground) && before.Running {
		release, err := guard(f)
		if err != nil {
			return store.Ref{}, nil, err
		}
		defer release()
	}
	in, err := pipe.New(ctx, int(f.Fd()))
	if err != nil {
		return store.Ref{}, nil, err
	}
	defer in.Close()
	o.ReturnPath = f
	if before.Running {
		o.RunState = before.Status
	}
	p := newProgress(c.stderr, c.quiet)
	defer p.finish()
	o.Progress = p.callback()
	ref, meta, err := save.Run(ctx, c.fs, st, in, o)
	return ref, meta, explainNVRAM(err)
}

func (c *checkpointCmd) show(doc checkpointReport) error {
	if c.json {
		return printJSON(c.stdout, doc)
	}
	if c.quiet {
		return nil
	}
	ref, err := store.ParseRef(doc.Checkpoint)
	if err != nil {
		return err
	}
	fmt.Fprintf(c.stderr, "flic-migrate: %s\n", summary(ref, doc.Save))
	stood := "the guest did not run"
	if doc.Downtime > 0 {
		stood = fmt.Sprintf("the guest stood still for %d ms", doc.Downtime.Milliseconds())
	}
	fmt.Fprintf(c.stderr, "flic-migrate: %s: %s; %d passes, %.2f s in all; now it is %s\n",
		doc.Checkpoint, stood, doc.Passes, doc.Total.Seconds(), doc.State)
	return nil
}
