package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/flic-migrate/flic-migrate/qmp/migration/rounds"
	"github.com/flic-migrate/flic-migrate/qmp/session"
	"github.com/flic-migrate/flic-migrate/stream/pipe"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/track"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
	"github.com/flic-migrate/flic-migrate/tier/workingset"
)

type trackCmd struct {
	*app
	monitor   monitorFlags
	out       string
	interval  string
	rounds    count
	beta      float64
	flashRate float64
	max       time.Duration
	json      bool
	quiet     bool
}

func newTrack(a *app) *cobra.Command {
	t := &trackCmd{app: a, rounds: count{1, 1, rounds.Max}}
	c := &cobra.Command{
		Use:   "track (--qmp SOCKET | --domain NAME) --out FILE [flags]",
		Short: "Find the working set of a running VM",
		Long: `Track watches which pages a running guest writes and writes them to a file for
save --working-set. It starts a migration into this program that never completes,
and takes it back; nothing is stored of the guest's memory. The guest runs on but
for some milliseconds, and QEMU's migration settings are afterwards what they were.

With --interval auto FLIC's equation (1) says for how long to watch, from how fast
the guest's working set grows, which the rounds show, from how fast the store is
read and from --beta; there are as many rounds as it takes, and at least --rounds
if the time is enough for them.

Without either it is the filter: it reads a migration stream from standard input.`,
		Example: `  flic-migrate track --qmp /run/web1.qmp --out /srv/web1.ws --rounds 3
  flic-migrate track --domain web1 --out /srv/web1.ws
  # then, in QEMU's monitor:
  migrate "exec:/usr/local/bin/flic-migrate save --vm web1 --nvram /mnt/pmem0/flic --nvram-size 4G --working-set /srv/web1.ws"`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return t.run(cmd.Context()) },
	}
	fs := c.Flags()
	t.monitor.add(fs)
	fs.StringVar(&t.out, "out", "", "file for the working set, replaced if there (required)")
	fs.StringVar(&t.interval, "interval", "auto", "how long the guest's writes are watched in each round, such as 4s; auto: by equation (1), in all rounds")
	fs.Var(&t.rounds, "rounds", "how often; pages written in more, and in later, rounds are hotter")
	fs.Float64Var(&t.beta, "beta", 3, "auto: safety factor on the time flash takes")
	fs.Float64Var(&t.flashRate, "flash-rate", 0, "auto: how fast a restore reads from flash, MB/s; 0: as measured in the store, or 500 if there is none")
	fs.DurationVar(&t.max, "max", time.Minute, "auto: the longest time that the guest is watched")
	for _, name := range []string{"out", "interval", "rounds", "max"} {
		setKey(fs, name, "track-"+name)
	}
	fs.BoolVar(&t.json, "json", false, "print JSON on standard output")
	fs.BoolVar(&t.quiet, "quiet", false, "no progress and no summary, only warnings and errors")
	return c
}

func (t *trackCmd) run(ctx context.Context) error {
	if t.out == "" {
		return usageError{errors.New("track needs a file for the working set: --out, FLIC_TRACK_OUT or track-out in the configuration file")}
	}
	interval, err := time.ParseDuration(t.interval)
	auto := t.interval == "auto"
	if !auto && (err != nil || interval <= 0) || auto && !t.monitor.Given() {
		return usageError{fmt.Errorf("--interval %s: must be a duration such as 4s, or with --qmp or --domain auto", t.interval)}
	}
	if auto && (!(t.beta > 0) || !(t.flashRate >= 0) || t.max <= 0) {
		return usageError{errors.New("--beta and --max must be above 0, --flash-rate not below")}
	}
	if !t.monitor.Given() {
		return t.filter(ctx, interval)
	}
	if err := t.monitor.check(); err != nil {
		return err
	}
	set, rep, err := session.Track(ctx, t.monitor.Target, session.TrackOptions{
		Interval: interval, Rounds: t.rounds.n,
		Beta: t.beta, FlashRate: t.app.flashRate(t.flashRate), Longest: t.max,
	})
	if err == nil {
		err = t.write(t.out, set)
	}
	if err != nil || t.quiet && !t.json {
		return err
	}
	if t.json {
		return printJSON(t.stdout, rep)
	}
	sayTracked(t.stderr, rep)
	return nil
}

// sayTracked is the summary of watching a guest.
func sayTracked(w io.Writer, rep rounds.Report) {
	fmt.Fprintf(w, "flic-migrate: %d of %d pages are in the working set, after %s and %v; the guest stood still for %v at most\n",
		rep.Hot, rep.Pages, plural(rep.Rounds, "round"), rep.Watched.Round(time.Millisecond), rep.Longest)
}

// filter is what QEMU runs.
func (t *trackCmd) filter(ctx context.Context, interval time.Duration) error {
	if isTerminal(t.stdin) {
		return usageError{errors.New("track reads a migration stream from its standard input, which is a terminal; see flic-migrate track --help")}
	}
	in, err := pipe.New(ctx, int(t.stdin.Fd()))
	if err != nil {
		return err
	}
	defer in.Close()
	set, err := track.Filter(ctx, in, interval)
	if err != nil {
		return err
	}
	return t.write(t.out, set)
}

// write makes the file appear whole or not at all.
func (t *trackCmd) write(name string, set *workingset.Set) error {
	return vfs.WriteFile(t.fs, name, vfs.Writing{}, func(f vfs.File) error {
		_, err := set.WriteTo(f)
		return err
	})
}

// flashRate is r of equation (1), bytes a second: what the user says, MB/s, or
// what was measured in the store.
func (a *app) flashRate(given float64) func(context.Context) (float64, error) {
	return func(ctx context.Context) (float64, error) {
		if given > 0 {
			return given * 1e6, nil
		}
		return session.MeasuredRate(ctx, func() (*store.Store, error) { return a.openStore(ctx, false) })
	}
}
