package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/qmp/session"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/restore"
	"github.com/flic-migrate/flic-migrate/tier/store"
)

type resumeCmd struct {
	*app
	monitor  monitorFlags
	group    groupFlags
	lazy     choice
	paused   bool
	recover  bool
	force    bool
	overlay  bool
	print    bool
	learn    time.Duration
	stalled  time.Duration
	restarts int
	nvram    string
	disks    disksFlags
	care     careFlags
	json     bool
	quiet    bool

	portable bool // an eager server is to write what every QEMU loads
}

func newResume(a *app) *cobra.Command {
	r := &resumeCmd{app: a, lazy: choice{value: "auto", choices: []string{"auto", "always", "never"}}}
	c := &cobra.Command{
		Use:   "resume [flags] (--qmp SOCKET | --domain NAME) NAME[@N]\n  flic-migrate resume [flags] --group NAME[@N] {VM=SOCKET | VM=domain:DOMAIN}...",
		Short: "Restore a checkpoint into a QEMU through its monitor, the guest running at once",
		Long: `Resume restores a checkpoint into a QEMU that was started with
-incoming defer -S and the arguments of the one that was saved. It checks that
machine type, RAM, vCPUs, devices and the state of the disks are the same, lets the guest run on what it needs first
while the rest of its memory loads (lazily, if QEMU may use userfaultfd), or
paused if it was paused when saved, and reports when all memory is there.

If the process that serves the memory dies, the guest is held and nothing is
lost: resume --recover goes on, with whatever the first one had still to do. A
QEMU in that state must not be told to stop or quit before; it would hang. A
server that makes no progress is only reported: QEMU waits for it.

With --domain libvirt starts the domain that checkpoint --domain has saved, as it
was then; it must not be running, and need not be defined. --overlay is for one
whose disks were frozen with the checkpoint: they stay as they are.

With --group the members of a group are resumed at once, each into its QEMU, and no guest
runs before all can.

A guest that was saved knows nothing of it: its clock is late, and two that are resumed
from one checkpoint are the same. --guest-time and --guest-run have its agent do something
about that as soon as it runs.

With --print it prints the QMP commands instead, for those who drive QMP
themselves.`,
		Example: `  qemu-system-x86_64 -machine pc-q35-7.2 -m 512 ... \
      -incoming defer -S -qmp unix:/run/web1.qmp,server=on,wait=off &
  flic-migrate resume --store /srv/vms --qmp /run/web1.qmp web1

  flic-migrate resume --store /srv/vms --domain web1 web1@3
  flic-migrate resume --store /srv/vms --qmp /run/clone1.qmp --guest-agent /run/clone1.ga \
      --guest-time --guest-run "hostname clone1" template

  flic-migrate resume --store /srv/vms --group shop@2 web1=/run/web1.qmp db1=/run/db1.qmp`,
		Args: r.group.args,
		RunE: func(cmd *cobra.Command, args []string) error {
			if r.group.name != "" {
				return r.runGroup(cmd.Context(), args)
			}
			return r.run(cmd.Context(), args[0])
		},
	}
	fs := c.Flags()
	r.monitor.add(fs)
	r.group.add(fs)
	fs.Var(&r.lazy, "lazy", "let the guest run before all of its memory is there")
	fs.BoolVar(&r.paused, "paused", false, "leave the guest paused, even if it ran when saved")
	fs.BoolVar(&r.recover, "recover", false, "go on with a lazy restore whose server has died")
	fs.BoolVar(&r.force, "force", false, "resume although vCPUs, devices or disks seem to be others than those that were saved")
	fs.BoolVar(&r.overlay, "overlay", false, "with --domain: put a new overlay on each disk that was frozen with the checkpoint (checkpoint --disks snapshot), and go on in these")
	fs.BoolVar(&r.print, "print", false, "print the QMP commands and do nothing")
	fs.DurationVar(&r.learn, "learn", learnDefault, "lazy: hold back what the guest does not ask for until it asked for nothing for so long, to learn its working set")
	fs.IntVar(&r.restarts, "restarts", 5, "with --qmp: how many times the process that serves the memory is started again if it dies")
	fs.DurationVar(&r.stalled, "stalled", 10*time.Second, "say so when the process that serves the memory has made no progress for so long; 0: never")
	fs.StringVar(&r.nvram, "nvram-from", "", "the NVRAM file, if it is no longer where the checkpoint says")
	r.disks.add(fs)
	r.care.add(fs)
	fs.String("metrics", "", "the process that serves the memory writes metrics for Prometheus's textfile collector to this `FILE`; with --group one for each member, with -VM in its name")
	setKey(fs, "metrics", "resume-metrics")
	fs.BoolVar(&r.json, "json", false, "print JSON on standard output")
	fs.BoolVar(&r.quiet, "quiet", false, "no progress and no summary, only warnings and errors")
	setKey(fs, "recover", "resume-recover")
	setKey(fs, "paused", "resume-paused")
	setKey(fs, "force", "resume-force")
	setKey(fs, "overlay", "resume-overlay")
	setKey(fs, "print", "resume-print")
	return c
}

// resumeReport is the JSON document of a resume.
type resumeReport struct {
	Checkpoint string `json:"checkpoint"` // NAME@N
	ExitCode   int    `json:"exit_code"`
	Error      string `json:"error,omitempty"`
	session.ResumeReport
}

func (r *resumeCmd) run(ctx context.Context, name string) error {
	ref, err := r.check(name)
	if err != nil {
		return err
	}
	st, err := r.openStore(ctx, false)
	if err != nil {
		return err
	}
	// The store may be given relative to this process's directory, and QEMU
	// has another one.
	dir, err := filepath.Abs(st.Dir())
	if err != nil {
		return err
	}
	// Opened here as well: what can be known to be wrong is known before QEMU
	// is touched. Open keeps the checkpoint from being removed meanwhile.
	p := newProgress(r.stderr, r.quiet)
	c, err := st.OpenCheckpoint(ctx, ref, checkpoint.Options{NVRAM: r.nvram, Disks: r.disks.options(p.callback())})
	if err != nil {
		p.finish()
		return err
	}
	defer c.Close()
	o := r.options(dir, c)
	measures := r.measureHere(c.Ref.VM)
	o.Progress = measures.with(p.callback())
	if r.print {
		return r.printCommands(session.ResumePlan(c, o), o.Server)
	}
	doc := resumeReport{Checkpoint: c.Ref.String()}
	doc.ResumeReport, err = session.Resume(ctx, r.monitor.Target, st, c, o)
	p.finish()
	r.ended(measures, doc.Server, exitCode(err))
	if doc.Reason != "" {
		r.log().Info("restored eagerly", "reason", doc.Reason)
	}
	if errors.Is(err, migration.ErrServerDied) {
		err = fmt.Errorf("%w: run %s", err, r.again(dir, c.Ref))
	}
	err = explainHuman(err, "", "migrate_incoming", "restore", "--store", dir, c.Ref.String())
	return errors.Join(err, r.show(doc, err))
}

// options are those of a checkpoint's resume; dir is its store.
func (r *resumeCmd) options(dir string, c *store.Checkpoint) session.ResumeOptions {
	// Older QEMUs load it too, and would need the capabilities that the one which was
	// saved had for what it replaces.
	r.portable = restore.Portable(c.Checkpoint) == nil
	return session.ResumeOptions{
		Lazy: migration.LazyMode(r.lazy.value), Paused: r.paused, Recover: r.recover, Force: r.force, Overlay: r.overlay,
		Learn: r.learn, Restarts: r.restarts, Stalled: r.stalled, Guest: r.care.options(),
		Server: func(a session.ServerArgs) []string { return r.server(dir, c.Ref, a) },
		Running: func(rep migration.ResumeReport) {
			if !r.quiet {
				fmt.Fprintf(r.stderr, "flic-migrate: %v: %s after %d ms\n", c.Ref, rep.State, rep.Running.Milliseconds())
			}
		},
		Log: r.log(),
	}
}

// check finds out what is to be resumed, and whether it can be meant so.
func (r *resumeCmd) check(name string) (store.Ref, error) {
	ref, err := store.ParseRef(name)
	switch {
	case err != nil:
		return ref, err
	case !r.monitor.Given() && !r.print:
		return ref, usageError{errors.New("resume needs QEMU's monitor (--qmp, FLIC_QMP or qmp in the configuration file) or libvirt's domain (--domain, FLIC_DOMAIN, domain)")}
	case r.recover && r.lazy.value == "never":
		return ref, errRecoverEager
	case r.recover && ref.N == 0:
		return ref, errRecoverWhich
	case r.overlay && r.monitor.Domain == "":
		return ref, usageError{errors.New("--overlay needs --domain: a QEMU of your own is started with overlays on its disks (qemu-img create -f qcow2 -b FILE -F FORMAT OVERLAY)")}
	case r.overlay && r.recover:
		return ref, usageError{errors.New("--overlay with --recover: the guest has its disks already")}
	case r.care.asked() && r.monitor.QMP != "" && r.care.agent == "":
		return ref, usageError{errors.New("--guest-time and --guest-run need the socket of the guest's agent with --qmp: --guest-agent")}
	}
	if err := r.care.check(r); err != nil {
		return ref, err
	}
	return ref, r.monitor.check()
}

// careFlags say what the guest's agent is to do when the guest runs again.
type careFlags struct {
	agent   string
	time    bool
	command string
	limit   time.Duration
}

func (f *careFlags) add(fs *pflag.FlagSet) {
	fs.StringVar(&f.agent, "guest-agent", "", "with --qmp: the socket of the guest's agent")
	fs.BoolVar(&f.time, "guest-time", false, "set the guest's clock to the host's as soon as it runs, through its agent")
	fs.StringVar(&f.command, "guest-run", "", "have a shell in the guest run this `COMMAND` as soon as the guest runs, through its agent, and wait for its end")
	fs.DurationVar(&f.limit, "guest-limit", time.Minute, "how long --guest-time and --guest-run may take")
	for _, name := range []string{"guest-time", "guest-run", "guest-limit"} {
		setKey(fs, name, "resume-"+name)
	}
}

func (f *careFlags) asked() bool { return f.time || f.command != "" }

// check refuses what can't be meant.
func (f *careFlags) check(r *resumeCmd) error {
	switch {
	case f.asked() && r.paused:
		return usageError{errors.New("--guest-time and --guest-run are for a guest that runs, and --paused leaves it paused")}
	case f.asked() && r.recover:
		return usageError{errors.New("--guest-time and --guest-run are for the moment when the guest begins to run, which is over when there is something to --recover")}
	case f.asked() && f.limit <= 0:
		return usageError{errors.New("--guest-limit must be more than nothing")}
	}
	return nil
}

// options are nil if nothing is asked for.
func (f *careFlags) options() *session.GuestCare {
	if !f.asked() {
		return nil
	}
	return &session.GuestCare{Socket: f.agent, Time: f.time, Command: f.command, Limit: f.limit}
}

// again is the command that goes on with a resume whose server has died.
func (r *resumeCmd) again(dir string, ref store.Ref) string {
	words := []string{"flic-migrate", "resume", "--recover", "--store", dir}
	for _, f := range []struct{ name, value string }{{"--qmp", r.monitor.QMP}, {"--domain", r.monitor.Domain}, {"--connect", r.monitor.Connect}} {
		if f.value != "" {
			words = append(words, f.name, f.value)
		}
	}
	words = append(words, ref.String())
	if r.paused {
		words = append(words, "--paused")
	}
	if r.nvram != "" {
		words = append(words, "--nvram-from", r.nvram)
	}
	words = append(words, r.disks.words()...)
	return migration.ShellWords(words)
}

// server is the command line of the restoring filter.
func (r *resumeCmd) server(dir string, ref store.Ref, a session.ServerArgs) []string {
	exe, err := os.Executable()
	if err != nil {
		exe = "flic-migrate"
	}
	args := []string{exe, "restore", "--quiet", "--store", dir, "--lazy"}
	if a.Kind == migration.EagerServer {
		args = append(args, "never")
		if r.portable {
			args = append(args, "--portable")
		}
	} else {
		args = append(args, "always")
		if r.learn > 0 {
			args = append(args, "--learn", r.learn.String())
		}
		if !a.ZeroRest {
			args = append(args, "--zero-rest=false")
		}
	}
	if a.Control != "" {
		args = append(args, "--control", a.Control)
	}
	if r.measures != "" {
		args = append(args, "--metrics", r.measures)
	}
	if a.Kind == migration.RecoveringServer {
		args = append(args, "--recover")
	}
	if a.Socket != "" {
		args = append(args, "--socket", a.Socket)
	}
	if r.nvram != "" {
		args = append(args, "--nvram-from", r.nvram)
	}
	args = append(args, r.disks.words()...)
	return append(args, ref.String())
}

// show prints the report of a resume, which may have failed.
func (r *resumeCmd) show(doc resumeReport, failed error) error {
	doc.ExitCode = exitCode(failed)
	if doc.Server != nil && r.monitor.Domain != "" {
		doc.Server.ExitCode = doc.ExitCode // it was this process
	}
	if failed != nil {
		doc.Error = oneLine(failed)
	}
	if r.json {
		b, err := json.Marshal(doc)
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(r.stdout, "%s\n", b)
		return err
	}
	if r.quiet || failed != nil {
		return nil
	}
	how := "eagerly"
	if doc.Lazy {
		how = "lazily"
	}
	fmt.Fprintf(r.stderr, "flic-migrate: %s: restored %s: %s after %d ms, all memory after %d ms\n",
		doc.Checkpoint, how, doc.State, doc.Running.Milliseconds(), doc.Resident.Milliseconds())
	for _, s := range doc.Overlays {
		fmt.Fprintf(r.stderr, "flic-migrate: %s: the guest goes on in %s, which stands on %s\n", doc.Checkpoint, s.Now, s.Frozen)
	}
	if doc.Server != nil && doc.Server.LazyReport != nil {
		l := doc.Server.LazyReport
		rate := 0.0
		if l.Resident > 0 {
			rate = float64(l.BytesOut) / 1e6 / l.Resident.Seconds()
		}
		fmt.Fprintf(r.stderr, "flic-migrate: %s: %d pages sent, %d asked for, %d waited for (p50 %d µs, p99 %d µs), %.0f MB/s\n",
			doc.Checkpoint, l.Pages, l.Demands, l.Waited, l.WaitP50.Microseconds(), l.WaitP99.Microseconds(), rate)
	}
	return nil
}

// printCommands writes what Resume would do as QMP commands.
func (r *resumeCmd) printCommands(o migration.ResumeOptions, server func(session.ServerArgs) []string) error {
	// Which QEMU it will be is not known.
	uri := func(k migration.ServerKind) string {
		return migration.ExecURI(server(session.ServerArgs{Kind: k, ZeroRest: true}))
	}
	lazily, kind := o.NotPossible == nil && o.Lazy != migration.LazyNever, migration.EagerServer
	if lazily {
		kind = migration.LazyServer
	}
	command := func(name string, args any) string {
		doc := map[string]any{"execute": name}
		if r.recover && name == "migrate-recover" {
			doc = map[string]any{"exec-oob": name}
		}
		if args != nil {
			doc["arguments"] = args
		}
		b, _ := json.Marshal(doc)
		return string(b)
	}
	capability := func(name string, on bool) string {
		return command("migrate-set-capabilities", map[string]any{
			"capabilities": []map[string]any{{"capability": name, "state": on}}})
	}
	var lines []string
	if r.recover {
		lines = append(lines,
			`# on a connection negotiated with {"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}, in postcopy-paused:`,
			command("migrate-recover", map[string]any{"uri": uri(migration.RecoveringServer)}))
	} else {
		lines = append(lines, "# QEMU: -incoming defer -S", capability("events", true))
		for _, name := range o.Capabilities {
			lines = append(lines, capability(name, true))
		}
		if lazily {
			lines = append(lines, capability("postcopy-ram", true))
		}
		lines = append(lines, command("migrate-incoming", map[string]any{"uri": uri(kind)}),
			"# when query-status is no longer inmigrate:")
		if !o.Paused && (o.RunState == "" || o.RunState == "running") {
			lines = append(lines, command("cont", nil))
		}
	}
	if lazily {
		lines = append(lines, "# after the MIGRATION event with status completed:", capability("postcopy-ram", false))
	}
	_, err := fmt.Fprintln(r.stdout, strings.Join(lines, "\n"))
	return err
}
