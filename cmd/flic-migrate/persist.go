package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/store"
)

type persistCmd struct {
	*app
	encoding
	nvram string
	disks disksFlags
	json  bool
	quiet bool
}

func newPersist(a *app) *cobra.Command {
	p := &persistCmd{app: a}
	c := &cobra.Command{
		Use:   "persist [flags] NAME[@N]",
		Short: "Copy a checkpoint to a new one that is all on flash",
		Long: `Persist copies a checkpoint to a new one of the same VM which has every page on
flash and needs no NVRAM. It is for checkpoints whose NVRAM file is on a file
system that a power-off empties, and for those whose NVRAM is wanted back: remove
the old one when the new one is there. All that the old one says is the new one's too,
such as whether its guest ran. Nothing is hashed and no segment becomes longer or
shorter: of the flags for that --codec and --workers count.`,
		Example: `  flic-migrate persist --store /srv/vms web1@3
  flic-migrate rm --store /srv/vms web1@3`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return p.run(cmd.Context(), args[0]) },
	}
	fs := c.Flags()
	fs.StringVar(&p.nvram, "nvram-from", "", "the NVRAM file, if it is no longer where the checkpoint says")
	p.encoding.add(fs)
	fs.BoolVar(&p.json, "json", false, "print JSON on standard output")
	p.disks.addMoved(fs)
	fs.BoolVar(&p.quiet, "quiet", false, "no progress and no summary, only warnings and errors")
	return c
}

func (p *persistCmd) run(ctx context.Context, name string) error {
	st, ref, err := p.storeOf(ctx, name)
	if err != nil {
		return err
	}
	c, err := st.OpenCheckpoint(ctx, ref, checkpoint.Options{NVRAM: p.nvram, Disks: p.disks.reading()})
	if err != nil {
		return err
	}
	defer c.Close()
	show := newProgress(p.stderr, p.quiet)
	defer show.finish()
	o := p.encoding.options()
	newRef, meta, err := st.Copy(ctx, c, store.CopyOptions{Codec: o.Codec, Workers: o.Workers, Progress: show.callback()})
	if err != nil {
		return fmt.Errorf("copy of checkpoint %v: %w", c.Ref, err)
	}
	if p.json {
		return printJSON(p.stdout, saveReport{Checkpoint: newRef.String(), UUID: meta.UUID.String(), Report: &meta.Report})
	}
	if p.quiet {
		return nil
	}
	_, err = fmt.Fprintln(p.stdout, summary(newRef, &meta.Report))
	return err
}
