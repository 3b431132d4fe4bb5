package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/qmp/migration/rounds"
	"github.com/flic-migrate/flic-migrate/qmp/session"
	"github.com/flic-migrate/flic-migrate/tier/retention"
	"github.com/flic-migrate/flic-migrate/tier/store"
)

type checkpointCmd struct {
	*app
	encoding
	placement
	monitor   monitorFlags
	group     groupFlags
	parent    parentFlag
	share     sharing
	disks     diskFiles
	noDisks   bool
	snapshot  choice
	freeze    bool
	skip      bool // digests of kept disks
	sync      bool
	agent     string
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
	arm       bool
	armRate   size
	armLog    string
	keepLast  count
	nvramKeep count
	json      bool
	quiet     bool
}

func newCheckpoint(a *app) *cobra.Command {
	c := &checkpointCmd{
		app:      a,
		mode:     choice{value: "stop", choices: []string{"stop", "live", "background"}},
		snapshot: choice{value: "leave", choices: []string{"leave", "snapshot", "keep", "copy"}},
		then:     choice{value: "", choices: []string{"run", "pause", "quit"}},
		rounds:   count{1, 1, rounds.Max},
		keepLast: count{0, 0, math.MaxInt32},
	}
	cmd := &cobra.Command{
		Use:   "checkpoint [flags] {--qmp SOCKET | --domain DOMAIN} NAME\n  flic-migrate checkpoint [flags] --group NAME {VM=SOCKET | VM=domain:DOMAIN}...",
		Short: "Save a running VM through its monitor",
		Long: `Checkpoint saves the VM of a QEMU as NAME's next checkpoint: it watches which
pages the guest writes, so that they go to NVRAM, saves it, lets it run on, and
reports. The QEMU needs nothing but a monitor (-qmp unix:...), or libvirt's.

  --mode stop        the guest is paused while it is saved
  --mode live        it runs while it is saved, but for the last moment; pages that
                     it writes meanwhile are saved again
  --mode background  it runs, and what is saved is its state at the beginning
                     (QEMU's background-snapshot, which needs userfaultfd)

Pages that equal blocks of the VM's disks are not stored, where the disks stand on
images that have an index in the store (disk index): the checkpoint then needs these
images (absorb copies what it needs). QEMU says which they are; --disk names others.
With --disks snapshot --freeze also those that equal what the guest itself has written.

With --disks keep the store keeps a copy of each disk that the guest can write to, as it is
while the guest stands still; the guest goes on with its own. The copy shares disk blocks
with the image (reflink); --disks copy copies it where that can't be. It goes with the
checkpoint, disk thaw makes a file of it, to resume with, and with --freeze pages are looked
for in it. When the guest runs again and the checkpoint is durable, the copy is read from end
to end for digests of it, which verify and disk thaw compare it with; --skip-digests leaves
that to gc.

With --arm a process stays behind that has the next checkpoint ready: it reads the
guest's memory at --arm-rate while the guest runs, and then waits. The next checkpoint
of the VM (with --mode stop, stored in the same way) takes what the guest has written
since, for which alone the guest stands still. Meanwhile QEMU makes no other migration
and adds or removes no devices; disarm ends it. Give --arm each time.

A guest that is paused is saved as it is, whatever the mode. Afterwards the guest
does what it did before, or what --then says.

With an NVRAM file and without --working-set, the guest is watched first, for as
long as --timer says, by default as FLIC's equation (1) does (see track). --timer
with --working-set joins the two sets.

With --group several VMs are saved as one, stop or live: they are paused at one moment,
each becomes the next checkpoint of VM, and all of them are there in the end, or none.

NVRAM is for the newest: when the guest runs again, pages that only older checkpoints
need are moved from there to flash, for at most ten seconds; the next checkpoint, and
gc, go on with that.

Whatever goes wrong, or if it is interrupted, the guest does what it did before,
QEMU's migration settings are what they were, and no checkpoint is left. If it is
killed (SIGKILL), a second process lets the guest run.`,
		Example: `  qemu-system-x86_64 ... -qmp unix:/run/web1.qmp,server=on,wait=off &
  flic-migrate checkpoint --store /srv/vms --qmp /run/web1.qmp web1
  flic-migrate checkpoint --store /srv/vms --qmp /run/web1.qmp --mode live \
      --nvram /mnt/pmem0/flic --nvram-size 4G web1
  flic-migrate checkpoint --store /srv/vms --domain web1 web1
  flic-migrate checkpoint --store /srv/vms --group shop web1=/run/web1.qmp db1=/run/db1.qmp`,
		Args: c.group.args,
		RunE: func(cmd *cobra.Command, args []string) error {
			timed := cmd.Flags().Changed("timer")
			if c.group.name != "" {
				return c.runGroup(cmd.Context(), args, timed)
			}
			return c.run(cmd.Context(), args[0], timed)
		},
	}
	fs := cmd.Flags()
	c.monitor.add(fs)
	c.group.add(fs)
	fs.Var(&c.mode, "mode", "when the guest runs meanwhile")
	fs.Var(&c.then, "then", "what becomes of the guest (default: what it did before)")
	c.placement.add(fs)
	addParent(fs, &c.parent)
	c.share.add(fs)
	c.disks.add(fs)
	fs.BoolVar(&c.freeze, "freeze", false, "index what is frozen or kept of the disks while the guest stands still, and look for pages in it too; alone: with --disks keep")
	fs.Var(&c.snapshot, "disks", "snapshot: freeze the disks with the checkpoint, and let the guest go on in overlays on them; keep: let the store keep copies of them, which share their disk blocks (reflink); copy: likewise, as whole copies where that can't be")
	addSkipDigests(fs, &c.skip)
	fs.BoolVar(&c.sync, "guest-sync", false, "first let the guest write to its disks what it has not yet, through its agent (sync)")
	fs.StringVar(&c.agent, "guest-agent", "", "with --qmp: the socket of the guest's agent")
	fs.BoolVar(&c.noDisks, "no-disks", false, "look for no pages on the disks that QEMU names; what they are is recorded all the same")
	addKeep(fs, &c.nvramKeep)
	fs.StringVar(&c.timer, "timer", "auto", "how long the guest's writes are watched in each round, such as 4s; auto: by equation (1), in all rounds")
	fs.Var(&c.rounds, "rounds", "how often; pages written in more, and in later, rounds are hotter")
	fs.Float64Var(&c.beta, "beta", 3, "auto: safety factor on the time flash takes")
	fs.Float64Var(&c.flashRate, "flash-rate", 0, "auto: how fast a restore reads from flash, MB/s; 0: as measured in the store")
	fs.DurationVar(&c.timerMax, "timer-max", time.Minute, "auto: the longest time that the guest is watched")
	fs.DurationVar(&c.downtime, "downtime", 300*time.Millisecond, "live: how long the guest may stand still")
	fs.DurationVar(&c.patience, "patience", time.Minute, "live: how long to try to keep to that; then the guest is stopped for as long as it takes")
	fs.BoolVar(&c.giveUp, "give-up", false, "live: fail instead of stopping the guest for longer")
	c.armRate = 100 << 20
	fs.BoolVar(&c.arm, "arm", false, "leave a process behind that has the next checkpoint ready")
	fs.Var(&c.armRate, "arm-rate", "how fast that process reads the guest's memory, bytes a second; 0: as fast as it can")
	fs.StringVar(&c.armLog, "arm-log", "", "file for its messages (default: nowhere)")
	fs.Var(&c.keepLast, "keep-last", "afterwards remove the VM's checkpoints but for the newest `n`, as prune does; 0: none")
	c.encoding.add(fs)
	addMetrics(fs, "checkpoint")
	fs.BoolVar(&c.json, "json", false, "print JSON on standard output")
	fs.BoolVar(&c.quiet, "quiet", false, "no progress and no summary, only warnings and errors")
	for _, name := range []string{"mode", "then", "rounds", "give-up", "arm", "keep-last", "disks", "freeze", "guest-sync"} {
		setKey(fs, name, "checkpoint-"+name)
	}
	return cmd
}

// guestSyncTime is how long the guest's sync may take: as long as it takes to write some
// GB, and the guest runs meanwhile.
const guestSyncTime = 15 * time.Second

// checkpointReport is the JSON document of a checkpoint.
type checkpointReport = session.CheckpointReport

func (c *checkpointCmd) run(ctx context.Context, vm string, timed bool) error {
	if err := store.CheckVM(vm); err != nil {
		return err
	}
	timer, err := c.checkFlags()
	if err != nil {
		return err
	}
	p := newProgress(c.stderr, c.quiet)
	o, err := c.options(vm, timer, timed)
	if err != nil {
		return err
	}
	o.Save.Progress = p.callback()
	// Before QEMU is touched.
	st, err := c.openStore(ctx, true)
	if err != nil {
		return err
	}
	var removed []string
	if c.keepLast.n > 0 {
		o.Tidy = func(ctx context.Context) (err error) {
			removed, err = c.prune(ctx, st, vm)
			return err
		}
	}
	doc, err := session.Checkpoint(ctx, c.fs, st, c.monitor.Target, o)
	p.finish()
	if err = explainNVRAM(err); !doc.Saved {
		// Its lines are for people, and its QEMU starts the command.
		return c.failed(doc, explainHuman(err, "migrate_set_capability return-path on", "migrate", "save", "--store", st.Dir(), "--vm", vm))
	}
	c.measureCheckpoint(&doc)
	c.digest(ctx, st, doc)
	err = errors.Join(err, c.show(doc))
	for _, line := range removed {
		fmt.Fprintf(c.stderr, "flic-migrate: %s\n", line)
	}
	// What is armed keeps the checkpoint open.
	if doc.ArmedProcess == 0 {
		c.unite(ctx, st, doc.Checkpoint, doc.Save, c.share.where.value, c.quiet)
	}
	return err
}

// failedCheckpoint is the JSON document of a checkpoint that has failed after the VM's disks
// have become other files.
type failedCheckpoint struct {
	checkpointReport
	ExitCode int    `json:"exit_code"`
	Error    string `json:"error"`
}

// failed tells what has become of the VM's disks, though there is no checkpoint.
func (c *checkpointCmd) failed(doc checkpointReport, err error) error {
	if c.json && len(doc.Snapshots) > 0 {
		return errors.Join(err, printJSON(c.stdout, failedCheckpoint{doc, exitCode(err), oneLine(err)}))
	}
	return err // which names the files
}

// options are those of a VM's checkpoint, as the flags say.
func (c *checkpointCmd) options(vm string, timer time.Duration, timed bool) (session.CheckpointOptions, error) {
	o := session.CheckpointOptions{
		Guest: migration.CheckpointOptions{
			Mode: migration.Mode(c.mode.value), Then: migration.Then(c.then.value),
			Downtime: c.downtime, Patience: c.patience, GiveUp: c.giveUp,
		},
		Save:      c.encoding.options(),
		NVRAMKeep: c.nvramKeep.n,
		Watched: func(rep rounds.Report) {
			if !c.quiet {
				sayTracked(c.stderr, rep)
			}
		},
		Disks: c.disks, NoDisks: c.noDisks, Snapshot: c.snapshot.value == "snapshot", Keep: c.keeps(), Freeze: c.freeze,
		Guard: guard, PutRight: guardQEMU,
		Log: c.log(),
	}
	o.Save.VM, o.Save.Parent, o.Save.Log = vm, string(c.parent), c.log()
	c.share.options(&o.Save)
	if c.arm {
		o.Arm = &session.ArmOptions{Rate: int64(c.armRate), Start: startArmed(c.armLog, metricsBeside(c.measures, "armed"), vm)}
	}
	if c.sync {
		o.Sync = &session.GuestSync{Socket: c.agent, Limit: guestSyncTime}
	}
	if err := c.placement.options(c.app, &o.Save); err != nil {
		return o, err
	}
	if o.Save.NVRAM != "" && !o.Save.VolatileNVRAM {
		// The guest would be watched, and stopped, in vain.
		if err := store.CheckLasting(c.fs, o.Save.NVRAM); err != nil {
			return o, explainNVRAM(err)
		}
	}
	o.WatchAsked = timed
	if timed || o.Save.NVRAM != "" && o.Save.WorkingSet == nil {
		o.Watch = &session.TrackOptions{
			Interval: timer, Rounds: c.rounds.n,
			Beta: c.beta, FlashRate: c.app.flashRate(c.flashRate), Longest: c.timerMax,
		}
	}
	return o, nil
}

// prune keeps what --keep-last says, and returns what is to be said of it. The checkpoint
// is made already, so that what is in use, as by a restore, is left to the next one.
func (c *checkpointCmd) prune(ctx context.Context, st *store.Store, vm string) (removed []string, err error) {
	entries, err := c.judge(ctx, st, []string{vm}, retention.Policy{Last: c.keepLast.n})
	if err != nil {
		return nil, err
	}
	for _, rerr := range c.removeUnkept(ctx, st.Remover(), st, entries) {
		if errors.Is(rerr, store.ErrInUse) {
			c.log().Warn("it is in use, and stays until the next time", "cause", oneLine(rerr))
			continue
		}
		err = errors.Join(err, rerr)
	}
	for _, e := range entries {
		if e.Removed != nil && !c.quiet {
			removed = append(removed, e.Checkpoint+": "+e.Removed.words())
		}
	}
	return removed, err
}

// checkFlags returns the timer, 0 for auto.
func (c *checkpointCmd) checkFlags() (timer time.Duration, err error) {
	if !c.monitor.Given() {
		return 0, usageError{errors.New("checkpoint needs a QEMU: --qmp or --domain, FLIC_QMP or FLIC_DOMAIN, qmp or domain in the configuration file")}
	}
	if err := c.monitor.check(); err != nil {
		return 0, err
	}
	if timer, err = c.checkValues(); err != nil {
		return 0, err
	}
	switch {
	case c.sync && c.agent == "" && c.monitor.Domain == "":
		return 0, usageError{errors.New("--guest-sync with --qmp needs the socket of the guest's agent: --guest-agent")}
	case c.agent != "" && c.monitor.Domain != "":
		return 0, usageError{errors.New("libvirt has the agent of its domain's guest: leave --guest-agent out")}
	}
	return timer, c.checkSnapshot()
}

// checkValues checks what stands for itself, and returns the timer, 0 for auto.
func (c *checkpointCmd) checkValues() (timer time.Duration, err error) {
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
	if c.arm && (c.then.value == string(migration.ThenPause) || c.then.value == string(migration.ThenQuit)) {
		return 0, usageError{fmt.Errorf("--arm needs a guest that runs afterwards, and --then says %s", c.then.value)}
	}
	return timer, nil
}

// checkSnapshot finds out whether snapshots of the disks can be taken.
func (c *checkpointCmd) checkSnapshot() error {
	flag := "--disks " + c.snapshot.value
	if c.snapshot.value == "leave" {
		if flag = "--freeze"; !c.freeze {
			return nil
		}
	}
	switch {
	case c.freeze && c.noDisks:
		return usageError{errors.New("--freeze looks for pages on the VM's disks, and --no-disks forbids that")}
	case c.mode.value != "stop":
		return usageError{fmt.Errorf("%s needs a guest that stands still before anything is saved, and --mode is %s", flag, c.mode.value)}
	}
	return nil
}

// keeps says how copies of the disks are kept: --freeze alone needs some to look in.
func (c *checkpointCmd) keeps() session.KeepMode {
	switch {
	case c.snapshot.value == "copy":
		return session.KeepCopy
	case c.snapshot.value == "keep", c.snapshot.value == "leave" && c.freeze:
		return session.KeepReflink
	}
	return session.KeepNone
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
	switch {
	case doc.Downtime > 0:
		stood = fmt.Sprintf("the guest stood still for %d ms", doc.Downtime.Milliseconds())
	case doc.Ran:
		stood = "the guest ran until then"
	}
	fmt.Fprintf(c.stderr, "flic-migrate: %s: %s; %d passes, %.2f s in all; now it is %s\n",
		doc.Checkpoint, stood, doc.Passes, doc.Total.Seconds(), doc.State)
	if d := doc.Demoted; d != nil {
		fmt.Fprintf(c.stderr, "flic-migrate: %s of older checkpoints moved to flash, %s of NVRAM freed\n", human(d.Bytes), human(d.NVRAMBytes))
	}
	c.saySnapshots(doc)
	if doc.Armed {
		fmt.Fprintf(c.stderr, "flic-migrate: %s had been armed\n", doc.Checkpoint)
	}
	if doc.ArmedProcess > 0 {
		fmt.Fprintf(c.stderr, "flic-migrate: the next one is armed: process %d has it ready; QEMU makes no other migration until disarm\n", doc.ArmedProcess)
	}
	return nil
}

// addSkipDigests adds the flag of who makes digests of kept disks.
func addSkipDigests(fs *pflag.FlagSet, skip *bool) {
	fs.BoolVar(skip, "skip-digests", false, "make no digests of the disks that are kept with checkpoints, for which they are read")
}

// digest has the disks that are kept with a checkpoint checked later on. The checkpoint is
// there, whatever becomes of that, and the guest does what it is to do.
func (c *checkpointCmd) digest(ctx context.Context, st *store.Store, doc checkpointReport) {
	if len(doc.Kept) == 0 || c.skip {
		return
	}
	var took int64
	for _, k := range doc.Kept {
		took += k.Bytes
	}
	if !c.quiet && took >= worthSaying {
		fmt.Fprintf(c.stderr, "flic-migrate: %s is saved; %s of disks that are kept with it are read for their digests\n", doc.Checkpoint, human(took))
	}
	ref, err := store.ParseRef(doc.Checkpoint)
	if err == nil {
		_, err = st.DigestKept(ctx, ref)
	}
	if err != nil && !errors.Is(err, store.ErrNotFound) { // removed meanwhile
		c.log().Warn("a disk that is kept has no digests, and is not checked until gc makes them", "checkpoint", doc.Checkpoint, "cause", oneLine(err))
	}
}

// worthSaying is how much is read before it is said that this takes a while: some seconds.
const worthSaying = 4 << 30

// saySnapshots says in which files the disks of a checkpoint are, and those of the guest.
func (c *checkpointCmd) saySnapshots(doc checkpointReport) {
	for _, s := range doc.LastSnapshots() {
		fmt.Fprintf(c.stderr, "flic-migrate: %s: %s has the disk as it was; the guest goes on in %s\n", doc.Checkpoint, s.Frozen, s.Now)
	}
	for _, k := range doc.Kept {
		fmt.Fprintf(c.stderr, "flic-migrate: %s: %s is kept as it was, in %s\n", doc.Checkpoint, k.Image, k.File)
	}
}
