package main

import (
	"bufio"
	"context"
	"errors"
	"time"

	"github.com/spf13/cobra"

	"github.com/flic-migrate/flic-migrate/tier/rescue"
	"github.com/flic-migrate/flic-migrate/tier/transfer"
)

func newSend(a *app) *cobra.Command {
	c := &copyCmd{app: a}
	var have string
	cmd := &cobra.Command{
		Use:   "send [flags] NAME[@N]... > STREAM",
		Short: "Write checkpoints to standard output, for receive",
		Long: `Send writes checkpoints to standard output, for a "flic-migrate receive" at the other
end of a pipe or a file; with --group groups, each with all of its members. With --have it
leaves out what the other store has, which
"receive --list" there says, and goes on with what was cut off; without, each comes with
all that it needs. What is on disk images goes with it. copy does both in one go, and is
told how it went.`,
		Example: `  flic-migrate send --store /srv/vms web1@3 | ssh backup flic-migrate receive --store /srv/vms
  ssh backup flic-migrate receive --list --store /srv/vms |
      flic-migrate send --store /srv/vms --have - web1@4 |
      ssh backup flic-migrate receive --store /srv/vms`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return c.sendAll(cmd.Context(), args, have) },
	}
	fs := cmd.Flags()
	groupFlag(fs, &c.group)
	fs.StringVar(&have, "have", "", "`FILE` with what receive --list says; -: standard input")
	c.addSource(fs)
	fs.BoolVar(&c.quiet, "quiet", false, "no progress and no summary, only warnings and errors")
	setKey(fs, "have", "send-have")
	return cmd
}

func (c *copyCmd) sendAll(ctx context.Context, names []string, have string) error {
	if isTerminal(c.stdout.File) {
		return usageError{errors.New("send writes a stream to its standard output, which is a terminal; see flic-migrate send --help")}
	}
	st, err := c.openStore(ctx, false)
	if err != nil {
		return err
	}
	refs, err := c.resolve(ctx, st, names)
	if err != nil {
		return err
	}
	h := transfer.NewHave()
	if have != "" {
		in, err := c.input(ctx, have)
		if err != nil {
			return err
		}
		defer in.Close()
		if h, err = transfer.ReadHave(bufio.NewReader(in)); err != nil {
			return err
		}
	}
	show := newProgress(c.stderr, c.quiet)
	defer show.finish()
	sent := make(chan error, 1)
	go func() {
		sent <- rescue.Call(func() error { return c.send(ctx, st, refs, c.stdout, h, show.callback()) })
	}()
	select {
	case err = <-sent:
		return err
	case <-ctx.Done():
	}
	// It may be in a write to a pipe that nobody reads, which no context ends. There is
	// nothing to clean up, so nobody has to wait for it.
	select {
	case err = <-sent:
		return err
	case <-time.After(time.Second):
		return context.Cause(ctx)
	}
}
