package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/flic-migrate/flic-migrate/tier/replay"
	"github.com/flic-migrate/flic-migrate/tier/store"
)

type replayCmd struct {
	*app
	encoding
	scratch  string // --store
	hotEvery count
	json     bool
}

func newReplay(a *app) *cobra.Command {
	r := &replayCmd{app: a, hotEvery: count{0, 0, 1 << 20}}
	c := &cobra.Command{
		Use:   "replay [flags] STREAM...",
		Short: "Save and restore recorded streams and compare",
		Long: `Replay saves each recorded migration stream into a scratch store, verifies the
checkpoint, restores it, and compares. It prints one table and exits with 1 if
anything differs. Streams may be compressed with zstd, gzip or lz4. The result of
a stream is one of

  identical  the restored stream is the recorded one, byte for byte
  equal      pages were sent more than once: the restored stream sends each once,
             makes the same memory, and is the same in everything else
  refused    the file has ".refused." in its name, and save refused it as damaged
             and left no checkpoint
  DIFFERENT  anything else

To record a stream of your own, for your own CI: migrate "exec:cat > FILE".

The scratch store is a temporary directory (in $TMPDIR) unless --store names one;
the store of the other commands is never used.`,
		Example: `  flic-migrate replay testdata/*.zst
  flic-migrate replay --json --codec zstd web1.stream`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return r.run(cmd.Context(), args) },
	}
	fs := c.Flags()
	fs.StringVar(&r.scratch, "store", "", "directory of the scratch store (default: a temporary one)")
	setKey(fs, "store", "replay-store")
	fs.Var(&r.hotEvery, "hot-every", "put each n-th page into an NVRAM file in $TMPDIR; 0: none")
	r.encoding.add(fs)
	fs.BoolVar(&r.json, "json", false, "print JSON on standard output")
	return c
}

func (r *replayCmd) run(ctx context.Context, paths []string) (err error) {
	tmp, err := os.MkdirTemp("", "flic-replay-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(tmp)) }()
	dir := r.scratch
	if dir == "" {
		dir = tmp + "/store"
	}
	st, err := store.Open(ctx, r.fs, dir, true)
	if err != nil {
		return err
	}
	p := replay.Replayer{FS: r.fs, Store: st, Scratch: tmp, HotEvery: r.hotEvery.n, Options: r.encoding.options()}
	results := []replay.Result{}
	different := 0
	for _, path := range paths {
		res, err := p.Stream(ctx, path)
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		if res.Result == replay.Different {
			different++
		}
		results = append(results, res)
	}
	if r.json {
		err = printJSON(r.stdout, results)
	} else {
		err = printReplay(r.stdout, results)
	}
	if err == nil && different > 0 {
		err = fmt.Errorf("%d of %d streams differ", different, len(results))
	}
	return err
}

func printReplay(w io.Writer, results []replay.Result) error {
	t := newTable(w)
	t.row("STREAM", "BYTES", "PAGES", "RESULT", "SAVE s", "RESTORE s", "FLASH", "RATIO")
	for _, r := range results {
		t.row(r.Stream, fmt.Sprint(r.Bytes), fmt.Sprint(r.Pages), string(r.Result), fmt.Sprintf("%.2f", r.SaveSeconds),
			fmt.Sprintf("%.2f", r.RestoreSeconds), fmt.Sprint(r.FlashBytes), fmt.Sprintf("%.3f", r.Ratio))
	}
	if err := t.flush(); err != nil {
		return err
	}
	for _, r := range results {
		if r.Result == replay.Different {
			if _, err := fmt.Fprintf(w, "%s: %s\n", printable(r.Stream), printable(r.Reason)); err != nil {
				return err
			}
		}
	}
	return nil
}
