package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/flic-migrate/flic-migrate/tier/store"
)

func newGC(a *app) *cobra.Command {
	var asJSON, adopt, skip bool
	var forget string
	var keep count
	var grace, copies time.Duration
	c := &cobra.Command{
		Use:   "gc [flags]",
		Short: "Free the space that killed saves have left",
		Long: `Gc frees what saves that were killed and removals that were interrupted have left
in the store and in the NVRAM files it has used. It can run at any time, beside
saves and restores; nothing needs it to run, but that NVRAM of libvirt's save files
that are gone is free only after it. Of removed checkpoints that others refer to it
frees what nobody needs. NVRAM is for the newest: what only older checkpoints need it
moves to flash. Disks that are kept with checkpoints, and have no digests yet, are read
and get them. Of checkpoints that were made at the same time it gives back pages that are
stored twice, if the process that was to do so was killed.

What lies among the checkpoints and is none, by its name or kind, may be one that
somebody has renamed: gc names it, and frees no NVRAM as long as it is there.

A store that is a copy of another one leaves NVRAM alone, because it is that one's.`,
		Example: `  flic-migrate gc --store /srv/vms`,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.gc(cmd.Context(), gcOptions{asJSON, adopt, skip, forget, grace, copies, keep.n})
		},
	}
	c.Flags().DurationVar(&grace, "grace", store.DefaultGrace, "how long the NVRAM of a libvirt save file is kept after the file was found to be gone without having been restored")
	c.Flags().DurationVar(&copies, "copy-grace", store.StagedFor, "how long what a copy that was cut off has sent is kept, so that the next one goes on there; 0s: not at all")
	addKeep(c.Flags(), &keep)
	c.Flags().BoolVar(&adopt, "adopt", false, "first take over the NVRAM of the store that this one is a copy of, which must be gone for good")
	c.Flags().StringVar(&forget, "forget-nvram", "", "first forget an NVRAM `FILE` that is gone for good, as one on a tmpfs is after a reboot, and that no checkpoint needs any more")
	// What is dangerous a second time is done once, by hand.
	setKey(c.Flags(), "adopt", "")
	setKey(c.Flags(), "forget-nvram", "")
	addSkipDigests(c.Flags(), &skip)
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON on standard output")
	return c
}

type gcOptions struct {
	json, adopt bool
	skip        bool   // make no digests of kept disks
	forget      string // an NVRAM file; empty: none
	grace       time.Duration
	copies      time.Duration // grace for what was received in part
	keep        int
}

// gcReport is gc's JSON document.
type gcReport struct {
	store.GCReport
	Demoted store.Demoted `json:"demoted"` // what went from NVRAM to flash
	// United are checkpoints that were to be united with those that were made beside them, by
	// processes that have not come to it, and UnitedBytes what that has freed.
	United      int   `json:"united_checkpoints"`
	UnitedBytes int64 `json:"united_bytes"`
	store.Digested
}

func (a *app) gc(ctx context.Context, o gcOptions) error {
	st, err := a.openStore(ctx, false)
	if err != nil {
		return err
	}
	if o.adopt {
		if err := st.Adopt(ctx); err != nil {
			return err
		}
	}
	if o.forget != "" {
		warnings, err := st.ForgetNVRAM(ctx, o.forget)
		for _, w := range warnings {
			a.log().Warn(oneLine(w))
		}
		if err != nil {
			return err
		}
	}
	var rep gcReport
	if rep.GCReport, err = st.GCAfter(ctx, o.grace, o.copies); err != nil {
		return err
	}
	u, n, err := st.UniteLeft(ctx, uniteLimit, store.UniteOptions{Workers: 1})
	if rep.United, rep.UnitedBytes = n, u.Bytes; err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil {
		rep.Warnings = append(rep.Warnings, oneLine(err))
	}
	if rep.Demoted, err = st.Demote(ctx, o.keep); err != nil {
		return err
	}
	if left := rep.Demoted.Left; left != nil {
		rep.Warnings = append(rep.Warnings, oneLine(left))
	}
	for _, warning := range rep.Warnings {
		a.log().Warn(warning)
	}
	if !o.json {
		if err := a.printGC(&rep); err != nil {
			return err
		}
	}
	// What is freed is freed, and said: this may take as long as it takes to read disks.
	if !o.skip {
		err = a.digestAll(ctx, st, &rep, o.json)
	}
	if o.json {
		err = errors.Join(err, printJSON(a.stdout, rep))
	}
	return err
}

// digestAll makes the digests of kept disks that have none, and says so.
func (a *app) digestAll(ctx context.Context, st *store.Store, rep *gcReport, quiet bool) error {
	done, left, err := st.DigestAllKept(ctx)
	rep.Digested = done
	for _, err := range left {
		rep.Warnings = append(rep.Warnings, oneLine(err))
		a.log().Warn(oneLine(err))
	}
	if quiet || done.Disks == 0 {
		return err
	}
	which := "1 disk that is kept has"
	if done.Disks > 1 {
		which = fmt.Sprintf("%d disks that are kept have", done.Disks)
	}
	_, perr := fmt.Fprintf(a.stdout, "%s digests now, %s read\n", which, human(done.Read))
	return errors.Join(err, perr)
}

// printGC says what was freed.
func (a *app) printGC(rep *gcReport) error {
	_, err := fmt.Fprintf(a.stdout, "%d unfinished saves, %s of flash and %s of NVRAM freed\n", rep.Parts, human(rep.Bytes+rep.TrimmedBytes), human(rep.NVRAMBytes+rep.Demoted.NVRAMBytes))
	if err == nil && rep.FrozenDisks > 0 {
		_, err = fmt.Fprintf(a.stdout, "%d copies of disks that no checkpoint has removed, %s\n", rep.FrozenDisks, human(rep.FrozenBytes))
	}
	if err == nil && rep.Staged > 0 {
		_, err = fmt.Fprintf(a.stdout, "%d images that were received in part are kept, %s: what is sent again goes on there (gc --copy-grace 0s removes them)\n", rep.Staged, human(rep.StagedBytes))
	}
	if err == nil && rep.United > 0 {
		_, err = fmt.Fprintf(a.stdout, "%s looked at again that were made beside others, %s freed of pages that were stored twice\n", plural(rep.United, "checkpoint"), human(rep.UnitedBytes))
	}
	if d := rep.Demoted; err == nil && d.Images > 0 {
		_, err = fmt.Fprintf(a.stdout, "%s of %d older checkpoints moved from NVRAM to flash\n", human(d.Bytes), d.Images)
	}
	return err
}
