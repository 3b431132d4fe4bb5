package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/google/uuid"
	"github.com/spf13/cobra"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/lazy"
	"github.com/flic-migrate/flic-migrate/tier/store"
)

type resumeCmd struct {
	*app
	monitor  monitorFlags
	lazy     choice
	paused   bool
	recover  bool
	print    bool
	learn    time.Duration
	stalled  time.Duration
	restarts int
	nvram    string
	json     bool
	quiet    bool
}

func newResume(a *app) *cobra.Command {
	r := &resumeCmd{app: a, lazy: choice{value: "auto", choices: []string{"auto", "always", "never"}}}
	c := &cobra.Command{
		Use:   "resume [flags] (--qmp SOCKET | --domain NAME) NAME[@N]",
		Short: "Restore a checkpoint into a QEMU through its monitor, the guest running at once",
		Long: `Resume restores a checkpoint into a QEMU that was started with
-incoming defer -S and the arguments of the one that was saved. It checks that
machine type and RAM are the same, lets the guest run on what it needs first
while the rest of its memory loads (lazily, if QEMU may use userfaultfd), or
paused if it was paused when saved, and reports when all memory is there.

If the process that serves the memory dies, the guest is held and nothing is
lost: resume --recover goes on, with whatever the first one had still to do. A
QEMU in that state must not be told to stop or quit before; it would hang. A
server that makes no progress is only reported: QEMU waits for it.

With --domain libvirt starts the domain that checkpoint --domain has saved, as it
was then; it must not be running, and need not be defined.

With --print it prints the QMP commands instead, for those who drive QMP
themselves.`,
		Example: `  qemu-system-x86_64 -machine pc-q35-7.2 -m 512 ... \
      -incoming defer -S -qmp unix:/run/web1.qmp,server=on,wait=off &
  flic-migrate resume --store /srv/vms --qmp /run/web1.qmp web1

  flic-migrate resume --store /srv/vms --domain web1 web1@3`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return r.run(cmd.Context(), args[0]) },
	}
	fs := c.Flags()
	r.monitor.add(fs)
	fs.Var(&r.lazy, "lazy", "let the guest run before all of its memory is there")
	fs.BoolVar(&r.paused, "paused", false, "leave the guest paused, even if it ran when saved")
	fs.BoolVar(&r.recover, "recover", false, "go on with a lazy restore whose server has died")
	fs.BoolVar(&r.print, "print", false, "print the QMP commands and do nothing")
	fs.DurationVar(&r.learn, "learn", learnDefault, "lazy: hold back what the guest does not ask for until it asked for nothing for so long, to learn its working set")
	fs.IntVar(&r.restarts, "restarts", 5, "with --qmp: how many times the process that serves the memory is started again if it dies")
	fs.DurationVar(&r.stalled, "stalled", 10*time.Second, "say so when the process that serves the memory has made no progress for so long; 0: never")
	fs.StringVar(&r.nvram, "nvram-from", "", "the NVRAM file, if it is no longer where the checkpoint says")
	fs.BoolVar(&r.json, "json", false, "print the report as JSON on standard output")
	fs.BoolVar(&r.quiet, "quiet", false, "no progress and no summary")
	setKey(fs, "recover", "resume-recover")
	setKey(fs, "paused", "resume-paused")
	setKey(fs, "print", "resume-print")
	return c
}

// resumeReport is the JSON document of a resume.
type resumeReport struct {
	Checkpoint string `json:"checkpoint"` // NAME@N
	ExitCode   int    `json:"exit_code"`
	Error      string `json:"error,omitempty"`
	migration.ResumeReport
	// Server is the report of the process that served the memory.
	Server json.RawMessage `json:"server,omitempty"`
}

func (r *resumeCmd) run(ctx context.Context, name string) error {
	ref, err := store.ParseRef(name)
	if err != nil {
		return err
	}
	if !r.monitor.given() && !r.print {
		return usageError{errors.New("resume needs QEMU's monitor (--qmp, FLIC_QMP or qmp in the configuration file) or libvirt's domain (--domain, FLIC_DOMAIN, domain)")}
	}
	switch {
	case r.recover && r.lazy.value == "never":
		return errRecoverEager
	case r.recover && ref.N == 0:
		return errRecoverWhich
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
	c, err := st.OpenCheckpoint(ctx, ref, checkpoint.Options{NVRAM: r.nvram})
	if err != nil {
		return err
	}
	defer c.Close()
	if r.monitor.domain != "" && !r.print {
		return r.runDomain(ctx, st, c)
	}
	files := serverFiles{}
	if !r.print {
		base := filepath.Join(os.TempDir(), "flic-resume-"+uuid.NewString())
		files = serverFiles{report: base, status: base + ".status"}
		defer os.Remove(files.report)
		defer os.Remove(files.status)
	}
	server := func(k migration.ServerKind) []string { return r.server(dir, c.Ref, k, files) }
	o := migration.ResumeOptions{
		URI: func(k migration.ServerKind) string { return execURI(server(k)) },
		Serve: func(k migration.ServerKind, out *os.File) (func(), error) {
			return startServer(server(k), out, k != migration.EagerServer)
		},
		Connect: func(socket string) error {
			_, err := startServer(append(server(migration.RecoveringServer), "--socket", socket), nil, false)
			return err
		},
		Gone:        files.serverGone,
		ID:          c.Meta.UUID.String(),
		Lazy:        migration.LazyMode(r.lazy.value),
		NotPossible: lazy.Possible(c.Checkpoint),
		RunState:    c.Meta.RunState,
		Paused:      r.paused,
		Expect:      expect(c.Meta),
	}
	if r.print {
		return r.printCommands(o)
	}
	m, err := r.monitor.dial(ctx, qmp.Options{OOB: true, IfOffered: !r.recover})
	if err != nil {
		return err
	}
	defer m.Close()
	doc := resumeReport{Checkpoint: c.Ref.String()}
	err = r.drive(ctx, m, o, files, &doc)
	if errors.Is(err, migration.ErrServerDied) {
		err = fmt.Errorf("%w: run %s", err, r.again(dir, c.Ref, "--qmp", r.monitor.qmp))
	}
	return errors.Join(err, r.show(doc, err))
}

// again is the command that goes on with a resume whose server has died.
func (r *resumeCmd) again(dir string, ref store.Ref, flags ...string) string {
	words := append([]string{"flic-migrate", "resume", "--recover", "--store", dir}, flags...)
	words = append(words, ref.String())
	if r.paused {
		words = append(words, "--paused")
	}
	if r.nvram != "" {
		words = append(words, "--nvram-from", r.nvram)
	}
	return shellWords(words)
}

// drive restores and watches the server meanwhile.
func (r *resumeCmd) drive(ctx context.Context, m *qmp.Monitor, o migration.ResumeOptions, files serverFiles, doc *resumeReport) error {
	p := newProgress(r.stderr, r.quiet)
	running := make(chan struct{})
	o.Running = func(rep migration.ResumeReport) {
		close(running)
		if !r.quiet {
			fmt.Fprintf(r.stderr, "flic-migrate: %s: %s after %d ms\n", doc.Checkpoint, rep.State, rep.Running.Milliseconds())
		}
	}
	w := &serverWatch{path: files.status, report: files.report, name: doc.Checkpoint, stalled: r.stalled, show: p.callback(),
		say: func(text string) { r.log().Warn(text) }, running: running, recover: r.recover}
	restarts := r.restarts
	o.Regain = func() bool {
		var last restoreReport
		_ = json.Unmarshal(serverReport(files.report, false), &last)
		if restarts <= 0 || last.ExitCode == exitCorrupt {
			return false
		}
		restarts--
		w.regaining.Store(true)
		// Those of the next one, which may be another user's.
		_ = os.Remove(files.report)
		_ = os.Remove(files.status)
		r.log().Warn("the restore's server has died; another goes on", "checkpoint", doc.Checkpoint)
		return true
	}
	ctx, cancel := context.WithCancelCause(ctx)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		if err := w.run(ctx); err != nil {
			cancel(err)
		}
	}()
	var err error
	if r.recover {
		doc.ResumeReport, err = migration.Recover(ctx, m, o)
	} else {
		doc.ResumeReport, err = migration.Resume(ctx, m, o)
	}
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	cancel(nil)
	<-watched
	p.finish()
	for _, text := range doc.Warnings {
		r.log().Warn(text)
	}
	if doc.Reason != "" {
		r.log().Info("restored eagerly", "reason", doc.Reason)
	}
	doc.Server = serverReport(files.report, err == nil)
	if err != nil {
		err = becauseOf(err, doc.Server)
	}
	return err
}

// serverError is a resume's failure whose reason is the server's.
type serverError struct {
	error
	code int
}

func (e serverError) Unwrap() error { return e.error }

// becauseOf adds the reason that a server has left.
func becauseOf(err error, report json.RawMessage) error {
	var server restoreReport
	if json.Unmarshal(report, &server) != nil || server.Error == "" {
		return err
	}
	return serverError{fmt.Errorf("%w (the server says: %s)", err, server.Error), server.ExitCode}
}

// serverFiles are what the restoring filter leaves for a resume; none if empty.
type serverFiles struct{ report, status string }

// serverGone tells whether the server that these files are of has ended before its
// work.
func (f serverFiles) serverGone() bool {
	if report := serverReport(f.report, false); report != nil {
		var last restoreReport
		return json.Unmarshal(report, &last) == nil && last.ExitCode != 0
	}
	var s status
	b, err := os.ReadFile(f.status)
	return err == nil && json.Unmarshal(b, &s) == nil && s.ended()
}

// server is the command line of the restoring filter.
func (r *resumeCmd) server(dir string, ref store.Ref, k migration.ServerKind, files serverFiles) []string {
	exe, err := os.Executable()
	if err != nil {
		exe = "flic-migrate"
	}
	args := []string{exe, "restore", "--quiet", "--store", dir, "--lazy"}
	if k == migration.EagerServer {
		args = append(args, "never")
	} else {
		args = append(args, "always")
		if r.learn > 0 {
			args = append(args, "--learn", r.learn.String())
		}
	}
	if files.report != "" {
		args = append(args, "--report", files.report, "--status", files.status)
	}
	if k == migration.RecoveringServer {
		args = append(args, "--recover")
	}
	if r.nvram != "" {
		args = append(args, "--nvram-from", r.nvram)
	}
	return append(args, ref.String())
}

// execURI has QEMU start a process. A shell in between could hold the pipe open
// when the process dies, hence the exec.
func execURI(args []string) string {
	return "exec:exec " + shellWords(args)
}

// startServer starts a process that writes a stream to out, unless that is nil, and,
// if it is both ways, reads QEMU's requests from it. It outlives this one and its terminal, because the guest
// needs it.
func startServer(args []string, out *os.File, bothWays bool) (end func(), err error) {
	cmd := exec.Command(args[0], args[1:]...)
	if bothWays {
		cmd.Stdin = out
	}
	if out != nil {
		cmd.Stdout = out
	}
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = cmd.Wait() // its report says more
	}()
	return func() {
		_ = cmd.Process.Kill()
		<-ended
	}, nil
}

func shellWords(args []string) string {
	words := make([]string, len(args))
	for i, a := range args {
		words[i] = shellQuote(a)
	}
	return strings.Join(words, " ")
}

// shellQuote makes one word of s for /bin/sh.
func shellQuote(s string) string {
	plain := func(c rune) bool {
		return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.ContainsRune("/._-@+=:,", c)
	}
	if s != "" && strings.IndexFunc(s, func(c rune) bool { return !plain(c) }) < 0 {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

func expect(m *checkpoint.Meta) migration.Expect {
	e := migration.Expect{Machine: m.Machine}
	for _, b := range m.Blocks {
		e.Blocks = append(e.Blocks, migration.RAMBlock{Name: b.Name, Used: b.Used})
	}
	return e
}

// serverReport reads what the restoring filter has left. It ends a moment after
// QEMU has its last byte; one that was killed leaves nothing.
func serverReport(path string, wait bool) json.RawMessage {
	for end := time.Now().Add(lastWord); ; time.Sleep(10 * time.Millisecond) {
		b, err := os.ReadFile(path)
		if err == nil && json.Valid(b) {
			return b
		}
		if !wait || time.Now().After(end) {
			return nil
		}
	}
}

// show prints the report of a resume, which may have failed.
func (r *resumeCmd) show(doc resumeReport, failed error) error {
	doc.ExitCode = exitCode(failed)
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
	var server restoreReport
	if json.Unmarshal(doc.Server, &server) == nil && server.LazyReport != nil {
		l := server.LazyReport
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
func (r *resumeCmd) printCommands(o migration.ResumeOptions) error {
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
			command("migrate-recover", map[string]any{"uri": o.URI(migration.RecoveringServer)}))
	} else {
		lines = append(lines, "# QEMU: -incoming defer -S", capability("events", true))
		if lazily {
			lines = append(lines, capability("postcopy-ram", true))
		}
		lines = append(lines, command("migrate-incoming", map[string]any{"uri": o.URI(kind)}),
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
