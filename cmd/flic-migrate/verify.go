package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"regexp"
	"strings"

	"github.com/spf13/cobra"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/store"
)

type verifyCmd struct {
	*app
	all   bool
	nvram string
	disks disksFlags
	skip  bool // the disks that are kept
	json  bool
}

func newVerify(a *app) *cobra.Command {
	v := &verifyCmd{app: a}
	c := &cobra.Command{
		Use:   "verify [flags] {NAME[@N]... | --all}",
		Short: "Read and check every byte of checkpoints",
		Long: `Verify reads every byte of checkpoints, in both tiers, and checks it. It prints
each damage with file and offset, and exits with 4 if there is any. An NVRAM file
that is missing, or another one than the checkpoint was saved to, is damage too:
such a checkpoint can't be restored. So is a disk image that has pages of it (save
--disk) and is missing, or no longer has them. Disks that are kept with a checkpoint
(checkpoint --disks keep) are read from end to end, at the speed of reading a disk, unless
--skip-disks leaves that out; one without digests is not checked. With --all so is what lies among the
checkpoints and has no name of one. A checkpoint in another version of the format
is none: if there is nothing worse, the exit code is 1.`,
		Example: `  flic-migrate verify --store /srv/vms web1@3
  flic-migrate verify --store /srv/vms --all`,
		RunE: func(cmd *cobra.Command, args []string) error { return v.run(cmd.Context(), args) },
		Args: func(_ *cobra.Command, args []string) error { return nil },
	}
	fs := c.Flags()
	fs.BoolVar(&v.all, "all", false, "verify every checkpoint in the store")
	setKey(fs, "all", "verify-all")
	fs.StringVar(&v.nvram, "nvram-from", "", "the NVRAM file, if it is no longer where the checkpoint says")
	v.disks.addMoved(fs)
	fs.BoolVar(&v.skip, "skip-disks", false, "do not read the disks that are kept with checkpoints")
	setKey(fs, "skip-disks", "verify-skip-disks")
	addMetrics(fs, "verify")
	fs.BoolVar(&v.json, "json", false, "print JSON on standard output")
	return c
}

// verifyEntry is an element of verify's JSON document.
type verifyEntry struct {
	Checkpoint string   `json:"checkpoint"` // NAME@N
	OK         bool     `json:"ok"`
	Damage     []string `json:"damage"`
	// NotChecked are the files of kept disks that were not read, or have no digests.
	NotChecked []string `json:"not_checked,omitempty"`
	// Unsupported: it may be whole, and this program can't read it, for what Damage says.
	Unsupported bool `json:"unsupported,omitempty"`
}

func (v *verifyCmd) run(ctx context.Context, args []string) error {
	if v.all == (len(args) > 0) {
		return usageError{errors.New("verify needs the names of checkpoints, or else --all")}
	}
	st, err := v.openStore(ctx, false)
	if err != nil {
		return err
	}
	refs, err := resolve(ctx, st, args)
	var strays []string
	if v.all {
		if refs, err = st.List(ctx, ""); err == nil {
			strays, err = v.warnOfStrays(ctx, st, "")
		}
	}
	if err != nil {
		return err
	}
	entries := []verifyEntry{}
	damaged, unsupported := 0, 0
	for _, ref := range refs {
		e, err := v.verify(ctx, st, ref)
		if v.all && errors.Is(err, store.ErrNotFound) {
			continue // it was removed after it had been listed
		}
		if err != nil {
			return about(ref, "", err)
		}
		switch {
		case e.Unsupported:
			unsupported++
		case !e.OK:
			damaged++
		}
		entries = append(entries, e)
		if !v.json {
			result := "ok"
			for _, d := range grouped(e.Damage) {
				if result = "DAMAGED"; e.Unsupported {
					result = "UNSUPPORTED"
				}
				fmt.Fprintf(v.stdout, "%s: %s\n", e.Checkpoint, d)
			}
			why := "it has no digests yet (gc makes them)"
			if v.skip {
				why = "--skip-disks"
			}
			for _, file := range e.NotChecked {
				fmt.Fprintf(v.stdout, "%s: %s, which is a disk that is kept with it, is not checked: %s\n", e.Checkpoint, file, why)
			}
			fmt.Fprintf(v.stdout, "%s: %s\n", e.Checkpoint, result)
		}
	}
	if v.json {
		if err := printJSON(v.stdout, entries); err != nil {
			return err
		}
	}
	v.measureVerify(len(entries)-damaged-unsupported, damaged, unsupported)
	switch {
	case damaged > 0:
		return fmt.Errorf("%d of %d checkpoints: %w", damaged, len(entries), errDamaged)
	case len(strays) > 0:
		return fmt.Errorf("what may be checkpoints under other names, %d in all: %w", len(strays), errDamaged)
	case unsupported > 0:
		return fmt.Errorf("%d of %d checkpoints can't be read by this flic-migrate", unsupported, len(entries))
	}
	return nil
}

// oneOf is from how many damages on that differ in numbers only one line stands for all but
// the first: a hole in a file is as many as it had segments.
const oneOf = 4

// numbers are those of places: offsets, pages, segments. One within a word is a name's.
var numbers = regexp.MustCompile(`\b(0x[0-9a-f]+|[0-9]+)\b`)

// grouped is a list of damages for people: of those that are alike, and of one file, the
// first is in it and behind that how many more there are.
func grouped(damage []string) (lines []string) {
	kind := func(d string) string {
		// What is before the offset names checkpoint and file, by numbers too.
		head, rest, ok := strings.Cut(d, ": offset ")
		if !ok {
			return d
		}
		return head + ": offset " + numbers.ReplaceAllString(rest, "#")
	}
	alike := make(map[string][]string)
	for _, d := range damage {
		alike[kind(d)] = append(alike[kind(d)], d)
	}
	said := make(map[string]bool)
	for _, d := range damage {
		all := alike[kind(d)]
		if len(all) < oneOf {
			lines = append(lines, d)
			continue
		}
		if said[kind(d)] {
			continue
		}
		said[kind(d)] = true
		_, where, _ := strings.Cut(all[len(all)-1], ": offset ")
		where, _, _ = strings.Cut(where, ":")
		lines = append(lines, d, fmt.Sprintf("… and %d more like that, up to offset %s (--json lists them)", len(all)-1, where))
	}
	return lines
}

// resolve parses names and finds the checkpoints.
func resolve(ctx context.Context, st *store.Store, names []string) ([]store.Ref, error) {
	var refs []store.Ref
	for _, name := range names {
		ref, err := store.ParseRef(name)
		if err != nil {
			return nil, err
		}
		if ref, err = st.Resolve(ctx, ref); err != nil {
			return nil, err
		}
		refs = append(refs, ref)
	}
	return refs, nil
}

// maxDamage is how many damages of one checkpoint are listed: a lost device
// has as many as it had pages.
const maxDamage = 1000

// verify checks one checkpoint, which exists. The error is for a check that
// could not be done.
func (v *verifyCmd) verify(ctx context.Context, st *store.Store, ref store.Ref) (verifyEntry, error) {
	e := verifyEntry{Checkpoint: ref.String(), Damage: []string{}}
	more := 0
	e.Unsupported = true // until something else is found
	found := func(err error) {
		var u *image.UnsupportedError
		e.Unsupported = e.Unsupported && errors.As(err, &u) && !integrity.IsCorrupt(err)
		if len(e.Damage) == maxDamage {
			more++
			return
		}
		e.Damage = append(e.Damage, oneLine(err))
	}
	c, err := st.OpenCheckpoint(ctx, ref, checkpoint.Options{NVRAM: v.nvram, Disks: v.disks.reading()})
	switch {
	case err == nil:
		var left []store.KeptDisk
		if err = c.Verify(ctx, found); err == nil && v.skip {
			left = c.KeptDisks(ctx)
		} else if err == nil {
			left, err = c.VerifyKept(ctx, found)
		}
		for _, k := range left {
			if k.Wrong == "" {
				e.NotChecked = append(e.NotChecked, k.File)
			}
		}
		c.Close()
		if err != nil {
			return e, err
		}
	case cannotBeRead(err), errors.Is(err, fs.ErrNotExist):
		// The checkpoint was there a moment ago, so what does not exist is
		// its NVRAM file. One of another version must not keep --all from the others.
		found(err)
	default:
		return e, err
	}
	if more > 0 {
		e.Damage = append(e.Damage, fmt.Sprintf("and %d more", more))
	}
	e.OK = len(e.Damage) == 0
	e.Unsupported = e.Unsupported && !e.OK
	return e, nil
}
