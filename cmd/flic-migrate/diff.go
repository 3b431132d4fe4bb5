package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/diff"
	"github.com/flic-migrate/flic-migrate/tier/store"
)

func newDiff(a *app) *cobra.Command {
	var disks disksFlags
	var asJSON bool
	c := &cobra.Command{
		Use:   "diff [flags] NAME[@A] NAME[@B]",
		Short: "Say how much of a guest's memory differs between two checkpoints",
		Long: `Diff compares the guest memory of two checkpoints, of one VM or of two, and prints a
line for each RAM block: how many pages have changed from the first to the second, how
many of them are zero now, and where the second has them (nvram, flash, delta ...).

Pages that both have in one place are not read; all others are, and checked.`,
		Example: `  flic-migrate diff --store /srv/vms web1@3 web1@4`,
		Args:    cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.diff(cmd.Context(), args, disks, asJSON)
		},
	}
	disks.addMoved(c.Flags())
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON on standard output")
	return c
}

// diffDoc is diff's JSON document.
type diffDoc struct {
	A string `json:"a"` // NAME@N
	B string `json:"b"`
	*diff.Report
}

func (a *app) diff(ctx context.Context, names []string, disks disksFlags, asJSON bool) error {
	st, err := a.openStore(ctx, false)
	if err != nil {
		return err
	}
	refs, err := resolve(ctx, st, names)
	if err != nil {
		return err
	}
	var both [2]*store.Checkpoint
	for i, ref := range refs {
		c, err := st.OpenCheckpoint(ctx, ref, checkpoint.Options{Disks: disks.reading()})
		if err != nil {
			return err
		}
		defer c.Close()
		both[i] = c
	}
	doc := diffDoc{A: refs[0].String(), B: refs[1].String()}
	if doc.Report, err = diff.Compare(ctx, both[0].Checkpoint, both[1].Checkpoint); err != nil {
		return fmt.Errorf("%s and %s: %w", doc.A, doc.B, err)
	}
	if asJSON {
		return printJSON(a.stdout, doc)
	}
	return doc.print(a)
}

func (d *diffDoc) print(a *app) error {
	var b strings.Builder
	for _, block := range d.Blocks {
		if block.Changed == 0 {
			fmt.Fprintf(&b, "%s: all %d pages are the same\n", printable(block.Name), block.Pages)
			continue
		}
		fmt.Fprintf(&b, "%s: %d of %d pages changed, %d of them to zero;", printable(block.Name), block.Changed, block.Pages, block.Zeroed)
		for i, name := range slices.Sorted(maps.Keys(block.Sources)) {
			fmt.Fprintf(&b, "%s %d %s", map[bool]string{true: ","}[i > 0], block.Sources[name], name)
		}
		b.WriteByte('\n')
	}
	for _, only := range []struct {
		ref    string
		blocks []string
	}{{d.A, d.OnlyA}, {d.B, d.OnlyB}} {
		if len(only.blocks) > 0 {
			fmt.Fprintf(&b, "only in %s: %s\n", only.ref, printable(strings.Join(only.blocks, ", ")))
		}
	}
	fmt.Fprintf(&b, "%s to %s: %s of %s changed, %d pages were read\n", d.A, d.B,
		human(d.Changed*int64(d.PageSize)), human(d.Pages*int64(d.PageSize)), d.Read)
	_, err := fmt.Fprint(a.stdout, b.String())
	return err
}
