package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/tier/progress"
	"github.com/flic-migrate/flic-migrate/tier/rescue"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/transfer"
)

// asFlag is --as: what a checkpoint is to be called in the other store.
type asFlag struct{ ref store.Ref }

func (a *asFlag) Type() string { return "NAME[@N]" }

func (a *asFlag) String() string { return a.ref.String() }

func (a *asFlag) Set(v string) (err error) {
	a.ref, err = store.ParseRef(v)
	return err
}

func (a *asFlag) add(fs *pflag.FlagSet, verb string) {
	fs.Var(a, "as", "call it so there; without @N it gets the VM's next number")
	setKey(fs, "as", verb+"-as")
}

// copiedEntry is what becomes of a checkpoint that is copied, sent or received.
type copiedEntry struct {
	Checkpoint string `json:"checkpoint,omitempty"` // NAME@N, in the store that it is in now
	Group      string `json:"group,omitempty"`      // instead, of a group: likewise
	Members    int    `json:"members,omitempty"`    // of a group
	From       string `json:"from,omitempty"`       // NAME@N, in the one that it is from
	UUID       string `json:"uuid,omitempty"`
	Already    bool   `json:"already,omitempty"` // it was there
	Images     int    `json:"images"`            // that have come: its own, and those that it refers to
	Bytes      int64  `json:"bytes"`             // that have come
	DiskBytes  int64  `json:"disk_bytes"`        // of those, pages that were on disk images
	NVRAMBytes int64  `json:"nvram_bytes"`       // hot pages that went to the NVRAM file
	NoNVRAM    string `json:"no_nvram,omitempty"`
	ExitCode   int    `json:"exit_code,omitempty"`
	Lacks      bool   `json:"lacks,omitempty"` // the store lacks what it had when it was asked
	Error      string `json:"error,omitempty"`
}

func newCopiedEntry(r store.Received) copiedEntry {
	if r.Group {
		return copiedEntry{Group: r.Ref.String(), Members: r.Members, From: r.Sent.String(), UUID: r.UUID.String(), Already: r.Already}
	}
	return copiedEntry{Checkpoint: r.Ref.String(), From: r.Sent.String(), UUID: r.UUID.String(), Already: r.Already,
		Images: r.Images, Bytes: r.Bytes, DiskBytes: r.DiskBytes, NVRAMBytes: r.NVRAMBytes, NoNVRAM: r.NoNVRAM}
}

func (e copiedEntry) words() string {
	name := e.Checkpoint + e.Group
	from := ""
	if e.From != name {
		from = ", which was " + e.From
	}
	if e.Group != "" {
		name = "group " + name
	}
	switch {
	case e.Already:
		return name + ": it is there already"
	case e.Group != "":
		return fmt.Sprintf("%s%s: received, with %s", name, from, plural(e.Members, "member"))
	}
	s := fmt.Sprintf("%s%s: received, %s in %s", e.Checkpoint, from, human(e.Bytes), plural(e.Images, "image"))
	if e.DiskBytes > 0 {
		s += fmt.Sprintf(", of which %s were on disk images", human(e.DiskBytes))
	}
	if e.NVRAMBytes > 0 {
		s += fmt.Sprintf("; %s to NVRAM", human(e.NVRAMBytes))
	}
	if e.NoNVRAM != "" {
		s += "; hot pages to flash: " + e.NoNVRAM
	}
	return s
}

// hotFlags say where a receiver's hot pages go.
type hotFlags struct {
	nvram    string
	size     size
	volatile bool
}

func (h *hotFlags) add(fs *pflag.FlagSet, verb, whose string) {
	fs.StringVar(&h.nvram, "nvram", "", "NVRAM file of "+whose+" for hot pages; made if missing (default: they go to flash)")
	fs.Var(&h.size, "nvram-size", "cap on the NVRAM file, such as 4G; 0: the one it has")
	fs.BoolVar(&h.volatile, "volatile-nvram", false, "accept an NVRAM file that loses its content at power-off (tmpfs)")
	// Where saves of this host put theirs is another matter.
	setKey(fs, "nvram", verb+"-nvram")
	setKey(fs, "nvram-size", verb+"-nvram-size")
	setKey(fs, "volatile-nvram", verb+"-volatile-nvram")
}

func (h *hotFlags) reservation() store.Reservation {
	return store.Reservation{Path: h.nvram, Capacity: int64(h.size), Volatile: h.volatile}
}

// words are the flags for a receiver on another host.
func (h *hotFlags) words() (words []string) {
	if h.nvram == "" {
		return nil
	}
	words = []string{"--nvram", h.nvram}
	if h.size > 0 {
		words = append(words, "--nvram-size", h.size.String())
	}
	if h.volatile {
		words = append(words, "--volatile-nvram")
	}
	return words
}

type copyCmd struct {
	*app
	to, ssh, program string
	as               asFlag
	group            bool
	from             string // the NVRAM file, if it is no longer where the checkpoints say
	disks            disksFlags
	hot              hotFlags
	json, quiet      bool
	silent           time.Duration // that the other host may be
}

func newCopy(a *app) *cobra.Command {
	c := &copyCmd{app: a, silent: silentLimit}
	cmd := &cobra.Command{
		Use:   "copy [flags] NAME[@N]... --to STORE",
		Short: "Copy checkpoints to another store, here or on another host",
		Long: `Copy copies checkpoints to another store: a directory, which is made if it is missing,
or HOST:DIRECTORY, to which ssh connects. What the other store has is not sent again: of
a checkpoint whose parent is there only what has changed goes over. A copy has the same
name, the same UUID, tags and note, and can be referred to like the original; with what
it needs of other checkpoints, which is not listed there. Its hot pages are on flash, or
with --nvram in an NVRAM file there.

What it has on disk images (save --disk) is read there, compared with what it was, and
goes with it: the copy needs no disk. A disk that is not as it was is refused by name,
and the original stays as it is.

Each byte is checked when it is read, and the whole checkpoint again in the other store,
before it is one. A checkpoint that somebody removes or replaces at the moment is waited
for, 30 s at most. A copy that is cut off leaves the other store as it was; the next one
goes on where it was (gc forgets that after three days, or gc --copy-grace).

With --group the names are those of groups (checkpoint --group): all of a group's members
are copied, and then it is a group there, which --as names; without @N the newest of its
name is meant.

On HOST flic-migrate must be in the PATH, or named by --remote-program.`,
		Example: `  flic-migrate copy --store /srv/vms web1@3 --to /mnt/backup/vms
  flic-migrate copy --store /srv/vms web1 db1 --to backup.example.org:/srv/vms
  flic-migrate copy --store /srv/vms --group shop@2 --to /mnt/backup/vms`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return c.run(cmd.Context(), args) },
	}
	fs := cmd.Flags()
	fs.StringVar(&c.to, "to", "", "the other store: a directory, or HOST:DIRECTORY (required)")
	fs.StringVar(&c.ssh, "ssh", "ssh -o ServerAliveInterval=30", "the command that connects to HOST")
	fs.StringVar(&c.program, "remote-program", "flic-migrate", "flic-migrate's path on HOST")
	c.as.add(fs, "copy")
	groupFlag(fs, &c.group)
	c.addSource(fs)
	c.hot.add(fs, "copy", "the other store's host")
	fs.BoolVar(&c.json, "json", false, "print JSON on standard output")
	fs.BoolVar(&c.quiet, "quiet", false, "no progress and no summary, only warnings and errors")
	setKey(fs, "to", "copy-to")
	return cmd
}

// addSource adds the flags that say where a checkpoint's bytes are now.
func (c *copyCmd) addSource(fs *pflag.FlagSet) {
	fs.StringVar(&c.from, "nvram-from", "", "the NVRAM file, if it is no longer where the checkpoint says")
	c.disks.addMoved(fs)
}

func (c *copyCmd) run(ctx context.Context, names []string) error {
	if c.to == "" {
		return usageError{errors.New("copy needs the other store: --to, FLIC_COPY_TO or copy-to in the configuration file")}
	}
	if len(names) > 1 && c.as.ref.N > 0 {
		return usageError{fmt.Errorf("several can't all become %v", c.as.ref)}
	}
	st, err := c.openStore(ctx, false)
	if err != nil {
		return err
	}
	refs, err := c.resolve(ctx, st, names)
	if err != nil {
		return err
	}
	show := newProgress(c.stderr, c.quiet)
	entries := []copiedEntry{}
	done := func(e copiedEntry) error {
		entries = append(entries, e)
		if c.json || c.quiet {
			return nil
		}
		_, err := fmt.Fprintln(c.stdout, e.words())
		return err
	}
	err = asking(done, func(done func(copiedEntry) error) error {
		// As rsync has it: a colon before the first slash is behind a host.
		if host, path, remote := strings.Cut(c.to, ":"); remote && !strings.Contains(host, "/") {
			return c.remote(ctx, st, refs, host, path, show, done)
		}
		return c.local(ctx, st, refs, show, done)
	})
	show.finish()
	if c.json && (err == nil || len(entries) > 0) {
		err = errors.Join(err, printJSON(c.stdout, entries))
	}
	return err
}

// resolve finds what is named, checkpoints or groups, before anything is sent.
func (c *copyCmd) resolve(ctx context.Context, st *store.Store, names []string) (refs []store.Ref, err error) {
	if !c.group {
		return resolve(ctx, st, names)
	}
	for _, name := range names {
		ref, err := store.ParseGroup(name)
		if err != nil {
			return nil, err
		}
		g, err := st.FindGroup(ctx, ref)
		if err != nil {
			return nil, err
		}
		refs = append(refs, g.Ref())
	}
	return refs, nil
}

// send writes checkpoints, or groups, to a store that has what have says.
func (c *copyCmd) send(ctx context.Context, st *store.Store, refs []store.Ref, w io.Writer, have *transfer.Have, show func(progress.State)) error {
	b := bufio.NewWriterSize(w, 1<<20)
	tw, err := transfer.NewWriter(b)
	if err != nil {
		return err
	}
	for _, ref := range refs {
		o := store.SendOptions{NVRAM: c.from, Disks: c.disks.moved, Progress: show}
		if c.group {
			if _, err = st.SendGroup(ctx, ref, tw, have, o); err != nil {
				return fmt.Errorf("group %v was not sent: %w", ref, err)
			}
		} else if _, err = st.Send(ctx, ref, tw, have, o); err != nil {
			return about(ref, "was not sent", err)
		}
	}
	if err := tw.Close(); err != nil {
		return err
	}
	return b.Flush()
}

// askTries is how often another store is asked what it has: it can be removed there meanwhile, and
// then more must be sent.
const askTries = 3

// asking copies until all that the other store lacks was sent. done is called once for each that
// is there.
func asking(done func(copiedEntry) error, once func(done func(copiedEntry) error) error) (err error) {
	told := make(map[string]bool)
	for range askTries {
		err = once(func(e copiedEntry) error {
			if told[e.UUID] {
				return nil
			}
			told[e.UUID] = true
			return done(e)
		})
		if !errors.Is(err, store.ErrLacks) {
			break
		}
	}
	return explainLacks("copy again", err)
}

// local copies to a store of this host.
func (c *copyCmd) local(ctx context.Context, st *store.Store, refs []store.Ref, show *meter, done func(copiedEntry) error) error {
	to, err := store.Open(ctx, c.fs, c.to, true)
	if err != nil {
		return err
	}
	c.opened = append(c.opened, to)
	if to.UUID() == st.UUID() {
		return usageError{fmt.Errorf("%s is the store %s, or a copy of it", c.to, st.Dir())}
	}
	return explainNVRAM(c.across(ctx, st, to, refs, show, func(r store.Received) error { return done(newCopiedEntry(r)) }))
}

// across copies to a store that is open.
func (c *copyCmd) across(ctx context.Context, st, to *store.Store, refs []store.Ref, show *meter, done func(store.Received) error) error {
	have, err := to.Have(ctx)
	if err != nil {
		return err
	}
	r, w := io.Pipe()
	sent := make(chan error, 1)
	go func() {
		err := rescue.Call(func() error { return c.send(ctx, st, refs, w, have, show.callback()) })
		w.CloseWithError(err) // nil is the end
		sent <- err
	}()
	err = to.Receive(ctx, r, store.ReceiveOptions{As: c.as.ref, NVRAM: c.hot.reservation(), Done: done})
	r.CloseWithError(errors.Join(errNotTaken, err))
	if serr := <-sent; serr != nil && !errors.Is(serr, errNotTaken) {
		err = serr
	}
	return err
}

// errNotTaken is what a sender is told whose receiver has ended.
var errNotTaken = errors.New("the other store does not take it")

// remoteError is a failure on another host, which had this exit code there.
type remoteError struct {
	host string
	copiedEntry
}

func (e *remoteError) Error() string { return e.host + ": " + e.copiedEntry.Error }

// Is tells, for errors.Is, what the other end has found out.
func (e *remoteError) Is(target error) bool { return e.Lacks && target == store.ErrLacks }

// remote copies to a store on another host.
func (c *copyCmd) remote(ctx context.Context, st *store.Store, refs []store.Ref, host, path string, show *meter, done func(copiedEntry) error) error {
	if host == "" || path == "" || host[0] == '-' {
		return usageError{fmt.Errorf("--to %s: must be a directory, or HOST:DIRECTORY", c.to)}
	}
	words := []string{c.program, "receive", "--answer", "--store", path}
	if c.as.ref.VM != "" {
		words = append(words, "--as", c.as.ref.String())
	}
	words = append(words, c.hot.words()...)
	ssh := append(strings.Fields(c.ssh), host, migration.ShellWords(words))
	running, kill := context.WithCancelCause(ctx)
	defer kill(nil)
	cmd := exec.CommandContext(running, ssh[0], ssh[1:]...)
	cmd.Stderr = os.Stderr
	cmd.WaitDelay = 5 * time.Second
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	// What ssh has started may hold its ends of the pipes when it is killed.
	defer context.AfterFunc(running, func() {
		in.Close()
		out.Close()
	})()
	silent := newSilence(c.silent, func() { kill(errSilent) })
	silent.begin()
	answers := bufio.NewReader(silent.reader(out))
	have, err := transfer.ReadHave(answers)
	silent.end()
	if err == nil {
		sent := make(chan error, 1)
		go func() {
			err := rescue.Call(func() error { return c.send(running, st, refs, silent.writer(in), have, show.callback()) })
			in.Close()
			silent.begin() // for the answer, until all have come
			sent <- err
		}()
		if err = c.answers(host, answers, done); err != nil {
			// Nobody may read what is still sent.
			kill(errNotTaken)
		}
		if serr := <-sent; serr != nil && (err == nil || !isBroken(serr) && !errors.Is(serr, errNotTaken)) {
			err = serr // a broken pipe is the other's failure
		}
	}
	in.Close()
	silent.begin() // for its end
	werr := cmd.Wait()
	silent.stop()
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.Is(context.Cause(running), errSilent):
		err = fmt.Errorf("%s: %w", host, errSilent)
	case err == nil && werr != nil:
		err = fmt.Errorf("%s: %w", ssh[0], werr)
	case errors.Is(err, io.ErrUnexpectedEOF) && werr != nil:
		err = fmt.Errorf("%s on %s has not answered: %w", c.program, host, werr)
	}
	return err
}

// isBroken tells whether nobody reads any more.
func isBroken(err error) bool { return errors.Is(err, syscall.EPIPE) || errors.Is(err, os.ErrClosed) }

// maxAnswer is the longest line of an answer, and maxAnswers the bytes of all: they are kept
// until the end.
const maxAnswer, maxAnswers = 1 << 20, 64 << 20

// answers reads what the other host says of each checkpoint.
func (c *copyCmd) answers(host string, r *bufio.Reader, done func(copiedEntry) error) error {
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, maxAnswer)
	room := maxAnswers
	for lines.Scan() {
		if room -= len(lines.Bytes()); room < 0 {
			return fmt.Errorf("%s answers with more than %d bytes", host, maxAnswers)
		}
		var e copiedEntry
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			return fmt.Errorf("%s answers %.100q: %w", host, lines.Text(), err)
		}
		if e.Error != "" {
			return &remoteError{host, e}
		}
		if err := done(e); err != nil {
			return err
		}
	}
	return lines.Err()
}
