package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

func newRm(a *app) *cobra.Command {
	var o rmOptions
	c := &cobra.Command{
		Use:   "rm [flags] {NAME@N... | --all NAME...}",
		Short: "Remove checkpoints and free their space in both tiers",
		Long: `Rm removes checkpoints and gives their NVRAM back. It wants the number of each:
NAME without @N removes nothing, unless --all says that all of the VM's
checkpoints are meant. A checkpoint that is in use, as by a restore, or by a save that
refers to it, is waited for, up to --wait in all; then it is not removed. The others are,
and the exit code says that one was not.

What other checkpoints need of a removed one is kept until they are removed too, and
what only this one needed of removed ones is freed with it.

The number of a removed checkpoint is never used again. An image that lies in the place of
another, and is missing in its own, is not removed without --force.

With --group the names are those of groups (checkpoint --group), whose members are removed.`,
		Example: `  flic-migrate rm --store /srv/vms web1@1 web1@2
  flic-migrate rm --store /srv/vms --all web1
  flic-migrate rm --store /srv/vms --group shop@2`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if o.group {
				return a.rmGroups(cmd.Context(), args, o)
			}
			return a.rm(cmd.Context(), args, o)
		},
	}
	groupFlag(c.Flags(), &o.group)
	c.Flags().BoolVar(&o.all, "all", false, "remove all checkpoints of the VMs")
	setKey(c.Flags(), "all", "rm-all")
	c.Flags().BoolVar(&o.force, "force", false, "remove also an image that is another checkpoint's only one")
	setKey(c.Flags(), "force", "")
	addWait(c.Flags(), &o.wait, "rm")
	c.Flags().BoolVar(&o.json, "json", false, "print JSON on standard output")
	return c
}

type rmOptions struct {
	all, group, force, json bool
	wait                    time.Duration
}

func (o rmOptions) check() error {
	if o.wait < 0 {
		return usageError{fmt.Errorf("--wait %v: nobody waits for less than nothing", o.wait)}
	}
	return nil
}

// remover is what removes as the flags say.
func (a *app) remover(st *store.Store, o rmOptions) *store.Remover {
	r := st.Remover()
	r.Wait, r.Force = o.wait, o.force
	r.Waiting = func(ref store.Ref, who []string) {
		if len(who) == 0 {
			who = []string{"another process"}
		}
		a.log().Info("it is in use, and waited for", "checkpoint", ref.String(), "by", strings.Join(who, ", "), "limit", o.wait)
	}
	return r
}

// addWait adds the flag of how long a removal waits, under a key of its verb.
func addWait(fs *pflag.FlagSet, wait *time.Duration, verb string) {
	fs.DurationVar(wait, "wait", vfs.LockLimit, "how long to wait for checkpoints that are in use, all told")
	setKey(fs, "wait", verb+"-wait")
}

// rmEntry is an element of rm's JSON document.
type rmEntry struct {
	Checkpoint string `json:"checkpoint"` // NAME@N
	FlashBytes int64  `json:"flash_bytes"`
	NVRAMBytes int64  `json:"nvram_bytes"`
	// FrozenBytes is what the disks took that were kept with it.
	FrozenBytes int64 `json:"frozen_bytes"`
	// KeptFor are the checkpoints that need some of it, NAME@N.
	KeptFor []string `json:"kept_for,omitempty"`
	Warning string   `json:"warning,omitempty"` // why something was not freed
}

func (a *app) rm(ctx context.Context, names []string, o rmOptions) error {
	if err := o.check(); err != nil {
		return err
	}
	st, refs, err := a.removals(ctx, names, o.all)
	if err != nil {
		return err
	}
	entries := []rmEntry{}
	remover := a.remover(st, o)
	for _, ref := range refs {
		e, rerr := a.removeOne(ctx, st, remover, ref)
		if rerr != nil {
			// One that can't be removed is no reason to keep the others.
			err = errors.Join(err, rerr)
			if ctx.Err() != nil {
				break
			}
			continue
		}
		entries = append(entries, e)
		if !o.json {
			fmt.Fprintf(a.stdout, "%s: %s\n", e.Checkpoint, e.words())
		}
	}
	if o.json {
		err = errors.Join(err, printJSON(a.stdout, entries))
	}
	return err
}

// removeOne removes a checkpoint. NVRAM that can't be freed now is a warning: the
// checkpoint is gone, and gc frees what has no owner.
func (a *app) removeOne(ctx context.Context, st *store.Store, remover *store.Remover, ref store.Ref) (rmEntry, error) {
	rm, err := remover.Remove(ctx, ref)
	if err != nil {
		if note, lives, aerr := st.ArmedFor(ctx, ref.VM); errors.Is(err, store.ErrInUse) && aerr == nil && lives {
			err = fmt.Errorf("%w (the VM's next checkpoint is armed, by process %d, and refers to others; flic-migrate disarm %s ends that)", err, note.PID, ref.VM)
		}
		return rmEntry{}, about(ref, "was not removed", err)
	}
	e := rmEntry{Checkpoint: ref.String(), FlashBytes: rm.FlashBytes, NVRAMBytes: rm.NVRAMBytes, FrozenBytes: rm.FrozenBytes}
	for _, by := range rm.Kept {
		e.KeptFor = append(e.KeptFor, by.String())
	}
	if rm.Left != nil {
		e.Warning = oneLine(rm.Left)
		a.log().Warn("not all that a removed checkpoint took was freed; gc frees what belongs to nobody", "checkpoint", e.Checkpoint, "cause", e.Warning)
	}
	return e, nil
}

// aboutError is an error of a checkpoint, which is named once.
type aboutError struct {
	text string
	error
}

func (e *aboutError) Error() string { return e.text }

func (e *aboutError) Unwrap() error { return e.error }

// about says of an error which checkpoint it is about, and what was not done with it. Errors
// of a store often begin with that name.
func about(ref store.Ref, what string, err error) error {
	name := fmt.Sprintf("checkpoint %v", ref)
	return &aboutError{strings.TrimSpace(name+" "+what) + ": " + strings.TrimPrefix(err.Error(), name+": "), err}
}

// words says what the removal has freed.
func (e rmEntry) words() string {
	kept := ""
	switch n := len(e.KeptFor); n {
	case 0:
	case 1:
		kept = fmt.Sprintf("; %s needs the rest", e.KeptFor[0])
	default:
		kept = fmt.Sprintf("; %d others need the rest", n)
	}
	disks := ""
	if e.FrozenBytes > 0 {
		disks = fmt.Sprintf(", disks of %s removed", human(e.FrozenBytes))
	}
	return fmt.Sprintf("removed, %s of flash and %s of NVRAM freed%s%s", human(e.FlashBytes), human(e.NVRAMBytes), disks, kept)
}

// removals finds all that is to be removed before anything is: a misspelt name
// must not leave half of the work done.
func (a *app) removals(ctx context.Context, names []string, all bool) (*store.Store, []store.Ref, error) {
	for _, name := range names {
		ref, err := store.ParseRef(name)
		switch {
		case err != nil:
			return nil, nil, err
		case all && ref.N != 0:
			return nil, nil, usageError{fmt.Errorf("%s is one checkpoint, and --all goes with names of VMs", name)}
		case !all && ref.N == 0:
			return nil, nil, usageError{fmt.Errorf("which checkpoint of %s? Give it as %s@N, or remove all of them with --all", name, name)}
		}
	}
	st, err := a.openStore(ctx, false)
	if err != nil {
		return nil, nil, err
	}
	if !all {
		refs, err := resolve(ctx, st, names)
		return st, refs, err
	}
	var refs []store.Ref
	for _, name := range names {
		more, err := st.List(ctx, name)
		if err == nil && len(more) == 0 {
			err = fmt.Errorf("VM %q in store %s: %w", name, st.Dir(), store.ErrNotFound)
		}
		if err != nil {
			return nil, nil, err
		}
		// The newest first: what others need is then never kept for them.
		slices.Reverse(more)
		refs = append(refs, more...)
	}
	return st, refs, nil
}

// rmGroups is rm --group: it removes the members, and then what names them.
func (a *app) rmGroups(ctx context.Context, names []string, o rmOptions) error {
	if err := o.check(); err != nil {
		return err
	}
	for _, name := range names {
		ref, err := store.ParseGroup(name)
		switch {
		case err != nil:
			return err
		case o.all && ref.N != 0:
			return usageError{fmt.Errorf("%s is one group, and --all goes with names", name)}
		case !o.all && ref.N == 0:
			return usageError{fmt.Errorf("which group %s? Give it as %s@N, or remove all of them with --all", name, name)}
		}
	}
	st, err := a.openStore(ctx, false)
	if err != nil {
		return err
	}
	// All are found before anything is removed.
	var groups []store.ListedGroup
	for _, name := range names {
		ref, _ := store.ParseGroup(name)
		list, err := st.Groups(ctx, ref.VM)
		if err != nil {
			return err
		}
		found := len(groups)
		for _, l := range list {
			if o.all || l.Number == ref.N {
				groups = append(groups, l)
			}
		}
		if len(groups) == found {
			return fmt.Errorf("group %v in store %s: %w", ref, st.Dir(), store.ErrNotFound)
		}
	}
	entries := []rmEntry{}
	remover := a.remover(st, o)
	for _, l := range groups {
		var failed error
		for _, m := range l.Members {
			if slices.Contains(l.Missing, m.Ref()) {
				continue // removed before; another checkpoint can have the number now
			}
			e, rerr := a.removeOne(ctx, st, remover, m.Ref())
			if errors.Is(rerr, store.ErrNotFound) {
				continue // removed before
			}
			if rerr != nil {
				failed = errors.Join(failed, rerr)
				continue
			}
			entries = append(entries, e)
			if !o.json {
				fmt.Fprintf(a.stdout, "%s: %s\n", e.Checkpoint, e.words())
			}
		}
		if failed == nil {
			failed = st.ForgetGroup(ctx, l.Ref())
		}
		if failed == nil && l.Err != nil {
			a.log().Warn("the record of the group was damaged, and is removed; its members, if any, are checkpoints of their own now", "group", l.Ref().String())
		}
		if err = errors.Join(err, failed); ctx.Err() != nil {
			break
		}
	}
	if o.json {
		err = errors.Join(err, printJSON(a.stdout, entries))
	}
	return err
}
