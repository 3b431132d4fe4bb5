package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/store"
)

type flattenCmd struct {
	*app
	encoding
	disks disksFlags
	json  bool
	quiet bool
}

func newFlatten(a *app) *cobra.Command {
	p := &flattenCmd{app: a}
	c := &cobra.Command{
		Use:   "flatten [flags] NAME[@N]",
		Short: "Make a checkpoint independent of all others",
		Long: `Flatten puts an image in a checkpoint's place that has every page on flash and refers
to no other checkpoint and no disk image. It stays NAME@N, and says all that it did; only its UUID is
new. Other checkpoints that refer to it are as whole as before: what they need of the
old image is kept for them. Whenever it is interrupted the checkpoint is there, as it
was or flattened. One that refers to nothing and has nothing in NVRAM or on disk images
stays as it is.

Of the flags for encoding --codec and --workers count.`,
		Example: `  flic-migrate flatten --store /srv/vms web1@3`,
		Args:    cobra.ExactArgs(1),
		RunE:    func(cmd *cobra.Command, args []string) error { return p.run(cmd.Context(), args[0]) },
	}
	p.add(c.Flags())
	return c
}

func (p *flattenCmd) add(fs *pflag.FlagSet) {
	p.disks.addMoved(fs)
	p.encoding.add(fs)
	fs.BoolVar(&p.json, "json", false, "print JSON on standard output")
	fs.BoolVar(&p.quiet, "quiet", false, "no progress and no summary, only warnings and errors")
}

// flattenReport is flatten's JSON document.
type flattenReport struct {
	saveReport
	Freed   store.Space `json:"freed"`              // of the old image, and of what only it needed
	KeptFor []string    `json:"kept_for,omitempty"` // who needs some of the old image, NAME@N
}

func (p *flattenCmd) run(ctx context.Context, name string) error {
	st, ref, err := p.storeOf(ctx, name)
	if err != nil {
		return err
	}
	return p.flatten(ctx, st, ref, "flattened")
}

// flatten does it; done is what messages call it when it is.
func (p *flattenCmd) flatten(ctx context.Context, st *store.Store, ref store.Ref, done string) error {
	show := newProgress(p.stderr, p.quiet)
	o := p.encoding.options()
	old, meta, err := st.Flatten(ctx, ref, store.CopyOptions{Codec: o.Codec, Workers: o.Workers, Disks: p.disks.reading(), Progress: show.callback()})
	show.finish()
	if err != nil {
		return fmt.Errorf("checkpoint %v was not %s: %w", ref, done, err)
	}
	if old.Left != nil {
		p.log().Warn("not all that a flattened checkpoint took was freed; gc frees what belongs to nobody", "checkpoint", old.Ref.String(), "cause", oneLine(old.Left))
	}
	if old.As == meta.UUID {
		done = ""
	}
	return p.show(done, old, meta)
}

// show says what has become of a checkpoint; done is empty if it has stayed as it was.
func (p *flattenCmd) show(done string, old store.Removed, meta *checkpoint.Meta) error {
	if p.json {
		rep := flattenReport{saveReport: saveReport{Checkpoint: old.Ref.String(), UUID: meta.UUID.String(), Report: &meta.Report}, Freed: store.Space{Flash: old.FlashBytes, NVRAM: old.NVRAMBytes}}
		for _, by := range old.Kept {
			rep.KeptFor = append(rep.KeptFor, by.String())
		}
		return printJSON(p.stdout, rep)
	}
	if p.quiet {
		return nil
	}
	if done == "" {
		_, err := fmt.Fprintf(p.stdout, "%v stays as it is: there is nothing of it elsewhere\n", old.Ref)
		return err
	}
	r := &meta.Report
	_, err := fmt.Fprintf(p.stdout, "%v %s: %s to flash; %s of flash and %s of NVRAM freed; %.2f s\n",
		old.Ref, done, human(r.FlashBytes), human(old.FlashBytes), human(old.NVRAMBytes), r.Seconds.Total)
	return err
}
