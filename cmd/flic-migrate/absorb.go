package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/flic-migrate/flic-migrate/tier/store"
)

func newAbsorb(a *app) *cobra.Command {
	p := &flattenCmd{app: a}
	c := &cobra.Command{
		Use:   "absorb [flags] NAME[@N]",
		Short: "Store what a checkpoint has on disk images",
		Long: `Absorb makes a checkpoint independent of the disk images that have bytes of its pages
(save --disk), while these are as they were: before a backing file is committed to,
replaced or deleted. It does what flatten does: the checkpoint stays NAME@N, and has every
page on flash. One that has nothing on disks stays as it is.

Of the flags for encoding --codec and --workers count.`,
		Example: `  flic-migrate absorb --store /srv/vms web1@3`,
		Args:    cobra.ExactArgs(1),
		RunE:    func(cmd *cobra.Command, args []string) error { return p.absorb(cmd.Context(), args[0]) },
	}
	p.add(c.Flags())
	return c
}

func (p *flattenCmd) absorb(ctx context.Context, name string) error {
	st, ref, err := p.storeOf(ctx, name)
	if err != nil {
		return err
	}
	d, err := st.Describe(ctx, ref)
	if err != nil {
		return err
	}
	if d.Meta.NeedsDisks() == 0 {
		return p.show("", store.Removed{Ref: d.Ref}, d.Meta)
	}
	return p.flatten(ctx, st, d.Ref, "absorbed")
}
