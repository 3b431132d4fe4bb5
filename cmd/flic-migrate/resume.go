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

	"github.com/google/uuid"
	"github.com/spf13/cobra"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/lazy"
	"github.com/flic-migrate/flic-migrate/tier/store"
)

type resumeCmd struct {
	*app
	qmp     string
	lazy    choice
	paused  bool
	recover bool
	print   bool
	learn   time.Duration
	nvram   string
	json    bool
	quiet   bool
}

func newResume(a *app) *cobra.Command {
	r := &resumeCmd{app: a, lazy: choice{"auto", []string{"auto", "always", "never"}}}
	c := &cobra.Command{
		Use:   "resume [flags] --qmp SOCKET NAME[@N]",
		Short: "Restore a checkpoint into a QEMU through its monitor, the guest running at once",
		Long: `Resume restores a checkpoint into a QEMU that was started with
-incoming defer -S and the arguments of the one that was saved. It checks that
machine type and RAM are the same, lets the guest run on what it needs first
while the rest of its memory loads (lazily, if QEMU may use userfaultfd), or
paused if it was paused when saved, and reports when all memory is there.

If the process that serves the memory dies, the guest is held and nothing is
lost: resume --recover goes on. A QEMU in that state must not be told to stop or
quit before; it would hang.

With --print it prints the QMP commands instead, for those who drive QMP
themselves.`,
		Example: `  qemu-system-x86_64 -machine pc-q35-7.2 -m 512 ... \
      -incoming defer -S -qmp unix:/run/web1.qmp,server=on,wait=off &
  flic-migrate resume --store /srv/vms --qmp /run/web1.qmp web1`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return r.run(cmd.Context(), args[0]) },
	}
	fs := c.Flags()
	fs.StringVar(&r.qmp, "qmp", "", "QEMU's monitor: a Unix socket's path or HOST:PORT (required)")
	fs.Var(&r.lazy, "lazy", "let the guest run before all of its memory is there")
	fs.BoolVar(&r.paused, "paused", false, "leave the guest paused, even if it ran when saved")
	fs.BoolVar(&r.recover, "recover", false, "go on with a lazy restore whose server has died")
	fs.BoolVar(&r.print, "print", false, "print the QMP commands and do nothing")
	fs.DurationVar(&r.learn, "learn", learnDefault, "lazy: hold back what the guest does not ask for until it asked for nothing for so long, to learn its working set")
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
	qmp.ResumeReport
	// Server is the report of the process that served the memory.
	Server json.RawMessage `json:"server,omitempty"`
}

func (r *resumeCmd) run(ctx context.Context, name string) error {
	ref, err := store.ParseRef(name)
	if err != nil {
		return err
	}
	if r.qmp == "" && !r.print {
		return usageError{errors.New("resume needs QEMU's monitor: --qmp, FLIC_QMP or qmp in the configuration file")}
	}
	if r.recover && (r.lazy.value == "never" || r.paused) {
		return errRecoverEager
	}
	st, err := r.openStore(false)
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
	c, err := checkpoint.Open(r.fs, st, ref, checkpoint.Options{NVRAM: r.nvram})
	if err != nil {
		return err
	}
	defer c.Close()
	report := ""
	if !r.print {
		report = filepath.Join(os.TempDir(), "flic-resume-"+uuid.NewString())
		defer os.Remove(report)
	}
	o := qmp.ResumeOptions{
		URI:         func(lazy bool) string { return r.uri(dir, c.Ref, lazy, report) },
		Lazy:        qmp.LazyMode(r.lazy.value),
		NotPossible: lazy.Possible(c),
		RunState:    c.Meta.RunState,
		Paused:      r.paused,
		Expect:      expect(c.Meta),
	}
	if r.print {
		return r.printCommands(o)
	}
	if !r.quiet {
		o.Running = func(rep qmp.ResumeReport) {
			fmt.Fprintf(r.stderr, "flic-migrate: %v: %s after %d ms\n", c.Ref, rep.State, rep.Running.Milliseconds())
		}
	}
	m, err := qmp.Dial(ctx, r.qmp, qmp.Options{OOB: r.recover})
	if err != nil {
		return err
	}
	defer m.Close()
	doc := resumeReport{Checkpoint: c.Ref.String()}
	if r.recover {
		doc.ResumeReport, err = qmp.Recover(ctx, m, o)
	} else {
		doc.ResumeReport, err = qmp.Resume(ctx, m, o)
	}
	for _, w := range doc.Warnings {
		r.log().Warn(w)
	}
	if doc.Reason != "" {
		r.log().Info("restored eagerly", "reason", doc.Reason)
	}
	if errors.Is(err, qmp.ErrServerDied) {
		return fmt.Errorf("%w: run flic-migrate resume --recover --store %s --qmp %s %v", err, dir, r.qmp, c.Ref)
	}
	if err != nil {
		return err
	}
	doc.Server = serverReport(report)
	return r.show(doc)
}

// uri is the exec: URI for QEMU: this program as the restoring filter. A shell
// in between could hold the pipe open when the filter dies, hence the exec.
func (r *resumeCmd) uri(dir string, ref store.Ref, lazy bool, report string) string {
	exe, err := os.Executable()
	if err != nil {
		exe = "flic-migrate"
	}
	args := []string{exe, "restore", "--quiet", "--store", dir, "--lazy"}
	if !lazy {
		args = append(args, "never")
	} else {
		args = append(args, "always")
		if r.learn > 0 {
			args = append(args, "--learn", r.learn.String())
		}
	}
	if report != "" {
		args = append(args, "--report", report)
	}
	if r.recover {
		args = append(args, "--recover")
	}
	if r.nvram != "" {
		args = append(args, "--nvram-from", r.nvram)
	}
	args = append(args, ref.String())
	for i, a := range args {
		args[i] = shellQuote(a)
	}
	return "exec:exec " + strings.Join(args, " ")
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

func expect(m *checkpoint.Meta) qmp.Expect {
	e := qmp.Expect{Machine: m.Machine}
	for _, b := range m.Blocks {
		e.Blocks = append(e.Blocks, qmp.RAMBlock{Name: b.Name, Used: b.Used})
	}
	return e
}

// serverReport reads what the restoring filter has left; it ends a moment after
// QEMU has its last byte.
func serverReport(path string) json.RawMessage {
	for range 100 {
		if b, err := os.ReadFile(path); err == nil && json.Valid(b) {
			return b
		}
		time.Sleep(10 * time.Millisecond)
	}
	return nil
}

func (r *resumeCmd) show(doc resumeReport) error {
	if r.json {
		b, err := json.Marshal(doc)
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(r.stdout, "%s\n", b)
		return err
	}
	if r.quiet {
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
func (r *resumeCmd) printCommands(o qmp.ResumeOptions) error {
	lazily := o.NotPossible == nil && o.Lazy != qmp.LazyNever
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
			command("migrate-recover", map[string]any{"uri": o.URI(true)}))
	} else {
		lines = append(lines, "# QEMU: -incoming defer -S", capability("events", true))
		if lazily {
			lines = append(lines, capability("postcopy-ram", true))
		}
		lines = append(lines, command("migrate-incoming", map[string]any{"uri": o.URI(lazily)}),
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
