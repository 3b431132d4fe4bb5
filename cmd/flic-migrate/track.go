package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/stream/pipe"
	"github.com/flic-migrate/flic-migrate/tier/timer"
	"github.com/flic-migrate/flic-migrate/tier/track"
	"github.com/flic-migrate/flic-migrate/tier/workingset"
)

// firstRound is the round that measures alpha for --interval auto: long enough
// for periodic work to show, short beside what it is for.
const firstRound = time.Second

type trackCmd struct {
	*app
	qmp       string
	out       string
	interval  string
	rounds    count
	beta      float64
	flashRate float64
	max       time.Duration
	driver    string
	json      bool
	quiet     bool
}

func newTrack(a *app) *cobra.Command {
	t := &trackCmd{app: a, rounds: count{1, 1, 16}}
	c := &cobra.Command{
		Use:   "track --qmp SOCKET --out FILE [flags]",
		Short: "Find the working set of a running VM",
		Long: `Track watches which pages a running guest writes and writes them to a file for
save --working-set. It starts a migration that never completes, with this program
as its filter, and takes it back; nothing is stored of the guest's memory. The
guest runs on but for some milliseconds, and QEMU's migration settings are
afterwards what they were.

With --interval auto a first short round measures how fast the guest's working set
grows, and FLIC's equation (1) gives the interval from that, from how fast flash
is read and from --beta.

Without --qmp it is the filter: it reads a migration stream from standard input.`,
		Example: `  flic-migrate track --qmp /run/web1.qmp --out /srv/web1.ws --rounds 3
  # then, in QEMU's monitor:
  migrate "exec:flic-migrate save --vm web1 --nvram /mnt/pmem0/flic --nvram-size 4G --working-set /srv/web1.ws"`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return t.run(cmd.Context()) },
	}
	fs := c.Flags()
	fs.StringVar(&t.qmp, "qmp", "", "QEMU's monitor: a Unix socket's path or HOST:PORT; without it, filter standard input")
	fs.StringVar(&t.out, "out", "", "file for the working set, replaced if there (required)")
	fs.StringVar(&t.interval, "interval", "auto", "how long the guest's writes are watched in each round: auto, or a duration such as 4s")
	fs.Var(&t.rounds, "rounds", "how often; pages written in more, and in later, rounds are hotter")
	fs.Float64Var(&t.beta, "beta", 3, "auto: safety factor on the time flash takes")
	fs.Float64Var(&t.flashRate, "flash-rate", 500, "auto: how fast a restore reads from flash, MB/s")
	fs.DurationVar(&t.max, "max", time.Minute, "auto: the longest interval")
	fs.StringVar(&t.driver, "driver", "", "filter: give up when nobody holds a lock on this file any more")
	for _, name := range []string{"out", "interval", "rounds", "max", "driver"} {
		setKey(fs, name, "track-"+name)
	}
	fs.BoolVar(&t.json, "json", false, "print the report as JSON on standard output")
	fs.BoolVar(&t.quiet, "quiet", false, "no summary")
	return c
}

// trackReport is the JSON document of a tracking.
type trackReport struct {
	Pages    int64         `json:"pages"`       // of all RAM blocks
	Hot      int64         `json:"hot"`         // in the working set
	Rounds   int           `json:"rounds"`      // without the one that measures
	Interval time.Duration `json:"interval_ns"` // of each
	Alpha    float64       `json:"alpha,omitempty"`
	Longest  time.Duration `json:"longest_stop_ns"` // that the guest stood still in one round
}

func (t *trackCmd) run(ctx context.Context) error {
	if t.out == "" {
		return usageError{errors.New("track needs a file for the working set: --out, FLIC_TRACK_OUT or track-out in the configuration file")}
	}
	interval, err := time.ParseDuration(t.interval)
	auto := t.interval == "auto"
	if !auto && (err != nil || interval <= 0) || auto && t.qmp == "" {
		return usageError{fmt.Errorf("--interval %s: must be a duration such as 4s, or with --qmp auto", t.interval)}
	}
	if auto && (!(t.beta > 0) || !(t.flashRate > 0) || t.max <= 0) {
		return usageError{errors.New("--beta, --flash-rate and --max must be above 0")}
	}
	if t.qmp == "" {
		return t.filter(ctx, interval)
	}
	rep, err := t.drive(ctx, interval, auto)
	if err != nil || t.quiet && !t.json {
		return err
	}
	if t.json {
		return printJSON(t.stdout, rep)
	}
	fmt.Fprintf(t.stderr, "flic-migrate: %d of %d pages are in the working set, after %d rounds of %v; the guest stood still for %v at most\n",
		rep.Hot, rep.Pages, rep.Rounds, rep.Interval.Round(time.Millisecond), rep.Longest)
	return nil
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
	set, err := track.Filter(ctx, in, interval, func() error { return driverLives(t.driver) })
	if err != nil {
		return err
	}
	return t.write(t.out, set)
}

// driverLives fails when nobody holds the lock. Without a driver nobody would
// take the migration back, and the guest would stand still at its end.
func driverLives(lock string) error {
	if lock == "" {
		return nil
	}
	f, err := os.Open(lock)
	if err != nil {
		return fmt.Errorf("the tracking was given up: %w", err)
	}
	defer f.Close()
	if unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB) == nil {
		return errors.New("the tracking was given up")
	}
	return nil
}

// write makes the file appear whole or not at all.
func (t *trackCmd) write(name string, set *workingset.Set) error {
	dir := filepath.Dir(name)
	tmp := filepath.Join(dir, ".flic-"+uuid.NewString())
	f, err := t.fs.Create(tmp)
	if err != nil {
		return err
	}
	_, err = set.WriteTo(f)
	if err == nil {
		err = f.Sync()
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err == nil {
		err = t.fs.Replace(tmp, name)
	}
	if err != nil {
		t.fs.Remove(tmp)
		return err
	}
	return t.fs.SyncDir(dir)
}

// drive runs the rounds.
func (t *trackCmd) drive(ctx context.Context, interval time.Duration, auto bool) (rep trackReport, err error) {
	m, err := qmp.Dial(ctx, t.qmp, qmp.Options{})
	if err != nil {
		return rep, err
	}
	defer m.Close()
	var set *workingset.Set
	if auto {
		first := min(firstRound, t.max)
		if set, err = t.round(ctx, m, first, &rep); err != nil {
			return rep, err
		}
		rep.Alpha = float64(hotPages(set)) / first.Seconds()
		p := timer.Params{Pages: rep.Pages, Alpha: rep.Alpha, Beta: t.beta, Rate: t.flashRate * 1e6 / float64(set.PageSize())}
		if interval, err = p.Interval(); err != nil {
			return rep, err
		}
		interval = max(min(interval, t.max), first)
	}
	rep.Interval = interval
	for i := range t.rounds.n {
		s, err := t.round(ctx, m, interval, &rep)
		if err != nil {
			return rep, fmt.Errorf("round %d: %w", i+1, err)
		}
		rep.Rounds++
		if set == nil {
			set = s
			continue
		}
		// A later round weighs more; all 16 together are below 255.
		if err := set.Add(s, uint8(i+1)); err != nil {
			return rep, fmt.Errorf("round %d: %w", i+1, err)
		}
	}
	rep.Hot = hotPages(set)
	return rep, t.write(t.out, set)
}

func hotPages(s *workingset.Set) (n int64) {
	for heat, pages := range s.Histogram() {
		if heat > 0 {
			n += pages
		}
	}
	return n
}

// round is one tracking migration.
func (t *trackCmd) round(ctx context.Context, m *qmp.Monitor, interval time.Duration, rep *trackReport) (*workingset.Set, error) {
	base := filepath.Join(os.TempDir(), "flic-track-"+uuid.NewString())
	lock, err := os.OpenFile(base+".lock", os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	giveUp := func() { os.Remove(lock.Name()); lock.Close() }
	defer giveUp()
	defer os.Remove(base)
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, fmt.Errorf("lock %s: %w", lock.Name(), err)
	}
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	args := []string{exe, "track", "--quiet", "--interval", interval.String(), "--out", base, "--driver", lock.Name()}
	for i, a := range args {
		args[i] = shellQuote(a)
	}
	var again *qmp.Monitor
	defer func() {
		if again != nil {
			again.Close()
		}
	}()
	r, err := qmp.Track(ctx, m, qmp.TrackOptions{
		// An environment meant for the driver would make the filter drive,
		// hence the empty flag.
		URI:   "exec:exec " + strings.Join(args, " ") + " --qmp ''",
		Abort: giveUp,
		Redial: func(ctx context.Context) (qmp.Executor, error) {
			var err error
			again, err = qmp.Dial(ctx, t.qmp, qmp.Options{})
			return again, err
		},
	})
	rep.Longest = max(rep.Longest, r.Stopped)
	var ended *qmp.MigrationError
	if err != nil && !errors.As(err, &ended) {
		return nil, err
	}
	// The filter ends by itself when it has seen enough, which QEMU takes for
	// a failure: its file tells which of the two it was. After a cancelled
	// migration it comes a moment later.
	var set *workingset.Set
	for wait := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		var readErr error
		if set, readErr = readWorkingSet(base); readErr == nil {
			break
		}
		if err == nil {
			err = readErr
		}
		if ended != nil || time.Now().After(wait) || ctx.Err() != nil {
			return nil, fmt.Errorf("the filter ended without a result (QEMU's output has its reason): %w", err)
		}
	}
	rep.Pages = 0
	for _, b := range set.Blocks() {
		rep.Pages += b.Pages
	}
	return set, nil
}
