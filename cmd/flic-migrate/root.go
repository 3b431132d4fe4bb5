package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/flic-migrate/flic-migrate/qmp/libvirt/saveimage"
	"github.com/flic-migrate/flic-migrate/tier/metrics"
	"github.com/flic-migrate/flic-migrate/tier/rescue"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// app is what all commands share.
type app struct {
	fs     vfs.FS
	stdin  *os.File
	head   []byte // taken from stdin already
	stdout *output
	stderr io.Writer

	store   string // --store
	config  string // --config
	started bool   // flags and arguments are right and the command's own code runs
	last    []byte // the line that ends stderr: a report in JSON

	sources map[string]string // where a flag's value is from that the command line does not give
	opened  []*store.Store    // by this command, those that it may make

	measures string       // --metrics
	metrics  *metrics.Set // nil: none are to be written
}

func newApp(fsys vfs.FS) *app {
	return &app{fs: fsys, stdin: os.Stdin, stdout: &output{File: os.Stdout}, stderr: os.Stderr}
}

// run is the program: it returns the exit code.
func run(a *app, args []string) int {
	// QEMU may be gone when we write; that is an error to report, not a
	// reason to die without giving NVRAM back.
	signal.Ignore(syscall.SIGPIPE)
	ctx, stop := withSignals(context.Background())
	defer stop()

	root := newRoot(a)
	root.SetArgs(args)
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		// The flags of a verb that is misspelt are not to blame.
		if cmd == root && !strings.HasPrefix(args[0], "-") {
			return noVerb(args[0])
		}
		return err
	})
	completionVerb(root, args)
	cmd := root
	err := rescue.Call(func() (err error) {
		cmd, err = root.ExecuteContextC(ctx)
		return err
	})
	var bug *rescue.Error
	switch {
	case errors.As(err, &bug):
		// It must not end in Go's exit code for a panic, 2, which is usage here.
		fmt.Fprintf(a.stderr, "%s\n", bug.Stack)
	case err != nil && !a.started:
		err = usageError{err}
	}
	if err != nil {
		err = a.blame(err)
		a.unmake(ctx)
		fmt.Fprintf(a.stderr, "flic-migrate: %s\n", oneLine(err))
		if cmd.Name() == "restore" && !recovers(cmd, args) {
			a.stdout.spoil()
		}
		a.failInJSON(cmd, args, err)
	}
	a.measured(exitCode(err))
	if a.last != nil {
		fmt.Fprintf(a.stderr, "%s\n", a.last)
	}
	return exitCode(err)
}

// blame names the variable or the file that a flag's value is from, if the error speaks of
// the flag: nobody has written it, and nobody remembers what was set long ago.
func (a *app) blame(err error) error {
	words := strings.FieldsFunc(err.Error(), func(r rune) bool { return r != '-' && (r < 'a' || r > 'z') && (r < '0' || r > '9') })
	var from []string
	for _, name := range slices.Sorted(maps.Keys(a.sources)) {
		if slices.Contains(words, "--"+name) {
			from = append(from, fmt.Sprintf("--%s is set by %s", name, a.sources[name]))
		}
	}
	if len(from) == 0 {
		return err
	}
	return fmt.Errorf("%w (%s)", err, strings.Join(from, ", "))
}

// unmakeTime is how long a command that has failed takes at most to take away the store
// that it has made.
const unmakeTime = 5 * time.Second

// unmake takes away the stores that a command has made that has failed: an empty one would
// make "no store" into "no checkpoints" for whoever forgets --store.
func (a *app) unmake(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), unmakeTime)
	defer cancel()
	for _, st := range a.opened {
		if err := st.Unmake(ctx); err != nil {
			a.log().Warn("the store that was made for nothing is still there", "cause", oneLine(err))
		}
	}
}

// failure is what --json prints for a command that fails before it has anything to say.
type failure struct {
	ExitCode int    `json:"exit_code"`
	Error    string `json:"error"`
}

// failInJSON tells whoever asked for JSON of a failure, if nothing else has. The standard
// output of save and restore is QEMU's, and their JSON the last line on standard error.
func (a *app) failInJSON(cmd *cobra.Command, args []string, err error) {
	if !wantsJSON(cmd, args) {
		return
	}
	doc := failure{exitCode(err), oneLine(err)}
	switch streams := cmd == cmd.Root() || cmd.Name() == "save" || cmd.Name() == "restore"; {
	case streams && a.last == nil:
		a.last, _ = json.Marshal(doc)
	case !streams && !a.stdout.used.Load():
		_ = printJSON(a.stdout, doc) // there is nobody else to tell
	}
}

// wantsJSON tells whether a command, which may have failed at its flags, was to print JSON.
func wantsJSON(cmd *cobra.Command, args []string) bool {
	f := cmd.Flags().Lookup("json")
	if f == nil {
		return false
	}
	env, _ := strconv.ParseBool(os.Getenv(envName(flagKey(f))))
	return f.Value.String() == "true" || slices.Contains(args, "--json") || slices.Contains(args, "--json=true") || env && !f.Changed
}

// completionVerb changes what cobra's verb "completion" does. "completion foo" fails: cobra
// prints help for it, and means success. And bash learns where our words end.
func completionVerb(root *cobra.Command, args []string) {
	root.InitDefaultCompletionCmd(args...)
	for _, c := range root.Commands() {
		if c.Name() != "completion" {
			continue
		}
		for _, shell := range c.Commands() {
			if shell.Name() == "bash" {
				shell.RunE = func(cmd *cobra.Command, _ []string) error {
					plain, err := cmd.Flags().GetBool("no-descriptions")
					if err != nil {
						return err
					}
					text, err := bashScript(root, !plain)
					if err == nil {
						_, err = cmd.OutOrStdout().Write(text)
					}
					return err
				}
			}
		}
		c.Args = cobra.ArbitraryArgs
		c.RunE = func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return cmd.Help()
			}
			return usageError{fmt.Errorf("there is no completion for %q: bash, zsh, fish and powershell have one", args[0])}
		}
	}
}

func noVerb(name string) error {
	return usageError{fmt.Errorf("there is no verb %q; see flic-migrate --help", name)}
}

// oneLine keeps messages to the one line that is promised: joined errors come
// with newlines, and names from hostile files may have them too.
func oneLine(err error) string {
	return printable(strings.Join(strings.FieldsFunc(err.Error(), func(r rune) bool { return r == '\n' || r == '\r' }), "; "))
}

func newRoot(a *app) *cobra.Command {
	root := &cobra.Command{
		Use:   "flic-migrate",
		Short: "Save QEMU virtual machines to NVRAM and flash, and restore them",
		Long: `flic-migrate saves the state of a QEMU virtual machine into two tiers: the pages
the guest will need first go to an NVRAM file as they are, all others go to a
compressed flash image, each different page once. QEMU starts it as the child of
a migration to exec: and pipes the migration stream through it.

Alone, with a migration stream on its standard input, it is "flic-migrate save".`,
		Example: `  # In the monitor of a QEMU of your own (one of libvirt's dies of it):
  migrate "exec:/usr/local/bin/flic-migrate save --store /srv/vms --vm web1"

  # A new QEMU with the same machine that goes on where the old one was:
  qemu-system-x86_64 ... -incoming "exec:exec /usr/local/bin/flic-migrate restore --store /srv/vms web1"

  # The same for a domain of libvirt's, and for whoever has a QMP socket (--qmp):
  flic-migrate checkpoint --store /srv/vms --domain web1 web1
  flic-migrate resume --store /srv/vms --domain web1 web1

  # What there is, and whether it is whole:
  flic-migrate list --store /srv/vms
  flic-migrate verify --store /srv/vms --all`,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return noVerb(args[0])
			}
			if isTerminal(a.stdin) {
				return cmd.Help()
			}
			// exec: strings are short and libvirt has no room for flags, so
			// alone with a stream the command is a filter.
			save, _, err := cmd.Find([]string{"save"})
			if err != nil {
				return err
			}
			if err := a.configure(save); err != nil {
				return usageError{err}
			}
			a.measure(save, nil)
			save.SetContext(cmd.Context())
			return save.RunE(save, nil)
		},
		PersistentPreRunE: func(cmd *cobra.Command, args []string) error {
			if err := a.configure(cmd); err != nil {
				return err
			}
			a.started = true
			a.measure(cmd, args)
			return nil
		},
	}
	root.SetIn(a.stdin)
	root.SetOut(a.stdout)
	root.SetErr(a.stderr)
	root.PersistentFlags().StringVar(&a.store, "store", defaultStore(), "directory that holds the checkpoints")
	root.PersistentFlags().StringVar(&a.config, "config", "", "configuration file (default: $XDG_CONFIG_HOME/flic-migrate/config.toml, then /etc/flic-migrate.toml)")
	setKey(root.PersistentFlags(), "config", "")
	root.AddCommand(newSave(a), newCheckpoint(a), newDisarm(a), newRestore(a), newResume(a), newList(a), newShow(a), newVerify(a), newRm(a), newPrune(a), newTag(a), newNote(a), newCopy(a), newSend(a), newReceive(a), newGC(a), newDoctor(a), newPersist(a), newFlatten(a), newAbsorb(a), newMemory(a), newDiff(a), newTrack(a), newReplay(a), newDump(a), newDisk(a), newImport(a), newExport(a), newLibvirt(a), newVersion())
	groupVerbs(root)
	for _, c := range append(commands(root), root) {
		describe(c)
		if c.Args != nil && c != root && !c.HasSubCommands() {
			c.Args = namingArgs(c.Args)
		}
	}
	a.complete(root)
	root.Version = versionLine()
	root.SetVersionTemplate("{{.Version}}\n")
	return root
}

// commands are all commands below c, those below them included.
func commands(c *cobra.Command) (list []*cobra.Command) {
	for _, sub := range c.Commands() {
		list = append(append(list, sub), commands(sub)...)
	}
	return list
}

// describe completes a command's help with what all of them have in common.
func describe(c *cobra.Command) {
	if c.Long == "" {
		c.Long = c.Short + "."
	}
	c.Long += "\n\n" + settingsHelp + "\n\n" + exitHelp
}

// settingsHelp stands in every command's help.
const settingsHelp = `Every flag can also be given as an environment variable (--nvram-size as
FLIC_NVRAM_SIZE) or in the configuration file (nvram-size = "4G"); a flag wins
over the environment, and the environment over the file.`

// namingArgs lets what checks a verb's arguments say how the verb is called. Cobra's own
// words count arguments and name none.
func namingArgs(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if check(cmd, args) == nil {
			return nil
		}
		given := "without an argument"
		if len(args) > 0 {
			given = fmt.Sprintf("with %q", args)
		}
		return fmt.Errorf("%s was called %s; it is: %s", cmd.Name(), given, cmd.UseLine())
	}
}

// openStore opens the store of --store.
func (a *app) openStore(ctx context.Context, create bool) (*store.Store, error) {
	st, err := store.Open(ctx, a.fs, a.store, create)
	if err == nil {
		st.LooseHeader = saveimage.Skip
		if create {
			a.opened = append(a.opened, st)
		}
	}
	return st, err
}

// storeOf opens the store, for a checkpoint in it that has a name.
func (a *app) storeOf(ctx context.Context, name string) (*store.Store, store.Ref, error) {
	ref, err := store.ParseRef(name)
	if err != nil {
		return nil, ref, err
	}
	st, err := a.openStore(ctx, false)
	return st, ref, err
}

// log is where warnings of the library go: to stderr, a line each.
func (a *app) log() *slog.Logger {
	return slog.New(slog.NewTextHandler(prefixWriter{a.stderr}, &slog.HandlerOptions{
		ReplaceAttr: func(groups []string, at slog.Attr) slog.Attr {
			if at.Key == slog.TimeKey && len(groups) == 0 {
				return slog.Attr{}
			}
			return at
		},
	}))
}

// prefixWriter says whose line it is: stderr is QEMU's too.
type prefixWriter struct{ w io.Writer }

func (p prefixWriter) Write(b []byte) (int, error) {
	_, err := p.w.Write(append([]byte("flic-migrate: "), b...))
	return len(b), err
}

// output is the standard output. It knows whether anything may have been
// written, which decides what a failing restore owes to QEMU.
type output struct {
	*os.File
	used atomic.Bool
}

func (w *output) Write(b []byte) (int, error) {
	// Before, because one that waits for its reader has written something.
	w.used.Store(true)
	return w.File.Write(b)
}

// spoil makes sure that a QEMU that waits for a stream ends. An empty stream
// leaves it in the state inmigrate for ever, without an event; a line that is no
// stream makes it say so and exit. It does not wait: a pipe in which there is no room
// for a line is not empty.
func (w *output) spoil() {
	if w.used.Load() || isTerminal(w.File) {
		return
	}
	fds := []unix.PollFd{{Fd: int32(w.Fd()), Events: unix.POLLOUT}}
	if n, err := unix.Poll(fds, 0); err == nil && n == 1 && fds[0].Revents&unix.POLLOUT != 0 {
		w.File.WriteString("flic-migrate: restore failed\n")
	}
}

// recovers tells whether a restore, which may have failed at its flags, was to
// be a recovery. Any byte but a right one then makes QEMU crash, and the guest
// with it; with none it stays paused and another server can recover it.
func recovers(cmd *cobra.Command, args []string) bool {
	f := cmd.Flags().Lookup("recover")
	return f != nil && f.Value.String() == "true" || slices.Contains(args, "--recover") || slices.Contains(args, "--recover=true")
}

func isTerminal(f *os.File) bool { return term.IsTerminal(int(f.Fd())) }

// withSignals returns a context that ends, with a cause that says why, when
// the process is asked to. A second signal then kills as usual.
func withSignals(ctx context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	c := make(chan os.Signal, 1)
	for _, s := range []os.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP} {
		if !signal.Ignored(s) { // as under nohup
			signal.Notify(c, s)
		}
	}
	go func() {
		s, ok := <-c
		if !ok {
			return
		}
		signal.Reset(syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
		cancel(fmt.Errorf("stopped by signal: %v", s))
	}()
	return ctx, func() {
		signal.Stop(c)
		cancel(errors.New("the command has ended"))
	}
}
