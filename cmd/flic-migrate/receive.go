package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/flic-migrate/flic-migrate/stream/pipe"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/transfer"
)

type receiveCmd struct {
	*app
	list, answer bool
	as           asFlag
	hot          hotFlags
	json, quiet  bool

	out io.Writer // what is said of what comes
}

func newReceive(a *app) *cobra.Command {
	r := &receiveCmd{app: a}
	cmd := &cobra.Command{
		Use:   "receive [flags] < STREAM",
		Short: "Take checkpoints that send has written",
		Long: `Receive reads what "flic-migrate send" writes from standard input, and makes checkpoints
of it, each under the name that it had. Nothing of it is seen before it is whole, checked
and durable. If the stream is cut off or damaged, what has come of it is kept for three
days, and send --have goes on with it. If another checkpoint has the name, --as gives it
another one. A group comes with all of its members, and is one with the last; --as names the
group.

Hot pages go to flash, or with --nvram to an NVRAM file, the hottest first, as far as there
is room. Those of other checkpoints, which it needs and which are not listed here, are on
flash.

--list says what this store has, for send --have.`,
		Example: `  ssh prod flic-migrate send --store /srv/vms web1@3 | flic-migrate receive --store /srv/vms
  flic-migrate receive --list --store /srv/vms > have`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return r.run(cmd.Context()) },
	}
	fs := cmd.Flags()
	fs.BoolVar(&r.list, "list", false, "print what this store has, and receive nothing")
	fs.BoolVar(&r.answer, "answer", false, "for copy: first print what this store has, then a line of JSON for each checkpoint")
	r.as.add(fs, "receive")
	r.hot.add(fs, "receive", "this host")
	fs.BoolVar(&r.json, "json", false, "print JSON on standard output")
	fs.BoolVar(&r.quiet, "quiet", false, "no progress and no summary, only warnings and errors")
	setKey(fs, "list", "") // it is of one run
	setKey(fs, "answer", "")
	return cmd
}

func (r *receiveCmd) run(ctx context.Context) error {
	if r.list {
		return r.printHave(ctx)
	}
	if isTerminal(r.stdin) {
		return usageError{errors.New("receive reads a stream from its standard input, which is a terminal; see flic-migrate receive --help")}
	}
	r.out = r.stdout
	if r.answer {
		w, err := newAnswering(ctx, r.stdout)
		if err != nil {
			return err
		}
		defer w.close()
		r.out = w
	}
	entries := []copiedEntry{}
	err := r.receive(ctx, func(e copiedEntry) error {
		entries = append(entries, e)
		switch {
		case r.answer:
			return r.line(e)
		case r.json || r.quiet:
			return nil
		}
		_, err := fmt.Fprintln(r.out, e.words())
		return err
	})
	switch {
	case err != nil && r.answer:
		lerr := r.line(copiedEntry{ExitCode: exitCode(err), Error: oneLine(err), Lacks: errors.Is(err, store.ErrLacks)})
		if !errors.Is(err, lerr) { // else both are that the verb has to end
			err = errors.Join(err, lerr)
		}
	case r.json && !r.answer && (err == nil || len(entries) > 0):
		err = errors.Join(err, printJSON(r.stdout, entries))
	}
	return err
}

// explainLacks says what can be done when something was sent to a store that had more before,
// or to another one.
func explainLacks(again string, err error) error {
	if errors.Is(err, store.ErrLacks) {
		err = fmt.Errorf("%w (%s)", err, again)
	}
	return err
}

// line prints a line of JSON.
func (r *receiveCmd) line(e copiedEntry) error {
	var b bytes.Buffer
	err := json.NewEncoder(&b).Encode(e)
	if err == nil {
		_, err = r.out.Write(b.Bytes())
	}
	return err
}

// answering is standard output for a copy on another host, which may stop reading: a write
// that waits for it ends with ctx, or when silentLimit is over.
type answering struct {
	*pipe.Writer
	ctx  context.Context
	stop func() bool
}

// newAnswering takes out for itself: a pipe is in non-blocking mode then.
func newAnswering(ctx context.Context, out *output) (*answering, error) {
	w, err := pipe.NewWriter(out.File)
	if err != nil {
		return nil, err
	}
	out.used.Store(true)
	a := &answering{Writer: w, ctx: ctx}
	a.stop = context.AfterFunc(ctx, a.hurry)
	return a, nil
}

// hurry ends a write that waits.
func (a *answering) hurry() { _ = a.SetWriteDeadline(time.Unix(1, 0)) }

func (a *answering) Write(b []byte) (int, error) {
	_ = a.SetWriteDeadline(time.Now().Add(silentLimit))
	if a.ctx.Err() != nil {
		a.hurry() // that may have been before
	}
	n, err := a.Writer.Write(b)
	if errors.Is(err, os.ErrDeadlineExceeded) && a.ctx.Err() != nil {
		err = context.Cause(a.ctx)
	}
	return n, err
}

// close is called when nobody writes any more.
func (a *answering) close() {
	if a.stop() { // else hurry may be under way, and the verb ends anyway
		_ = a.Writer.Close()
	}
}

// printHave says what there is. Where there is no store there is nothing.
func (r *receiveCmd) printHave(ctx context.Context) error {
	have := transfer.NewHave()
	st, err := r.openStore(ctx, false)
	if err == nil {
		have, err = st.Have(ctx)
	} else if errors.Is(err, store.ErrNotFound) {
		err = nil
	}
	if err != nil {
		return err
	}
	return have.Write(r.stdout)
}

func (r *receiveCmd) receive(ctx context.Context, done func(copiedEntry) error) error {
	st, err := r.openStore(ctx, true)
	if err != nil {
		return err
	}
	if r.answer {
		have, err := st.Have(ctx)
		if err == nil {
			err = have.Write(r.out)
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			err = errSilent
		}
		if err != nil {
			return err
		}
	}
	in, err := pipe.New(ctx, int(r.stdin.Fd()))
	if err != nil {
		return err
	}
	defer in.Close()
	in.SetReadTimeout(silentLimit)
	show := newProgress(r.stderr, r.quiet || r.answer)
	defer show.finish()
	err = explainNVRAM(st.Receive(ctx, bufio.NewReaderSize(in, 1<<20), store.ReceiveOptions{
		As: r.as.ref, NVRAM: r.hot.reservation(), Progress: show.callback(),
		Done: func(got store.Received) error { return done(newCopiedEntry(got)) },
	}))
	if !r.answer {
		err = explainLacks(`send it again by what "flic-migrate receive --list" says here now: flic-migrate send --have`, err)
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = errSilent
	}
	return err
}
