package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/flic-migrate/flic-migrate/tier/retention"
	"github.com/flic-migrate/flic-migrate/tier/store"
)

// addPolicy adds the flags of what is kept, under keys of the verb that has them.
func addPolicy(fs *pflag.FlagSet, p *retention.Policy, verb string) {
	fs.Var((*keepCount)(&p.Last), "keep-last", "keep the newest n of each VM; unlimited or -1: all")
	fs.Var((*keepCount)(&p.Hourly), "keep-hourly", "keep the newest of each of the last n hours that have any")
	fs.Var((*keepCount)(&p.Daily), "keep-daily", "keep the newest of each of the last n days that have any")
	fs.Var((*keepCount)(&p.Weekly), "keep-weekly", "keep the newest of each of the last n weeks that have any")
	fs.Var((*keepCount)(&p.Monthly), "keep-monthly", "keep the newest of each of the last n months that have any")
	fs.Var((*keepCount)(&p.Yearly), "keep-yearly", "keep the newest of each of the last n years that have any")
	fs.Var((*span)(&p.Within), "keep-within", "keep what is at most so much older than the VM's newest, such as 36h or 1y5m7d2h")
	fs.Var((*tagLists)(&p.Tags), "keep-tag", "keep what has this tag, or all of those with commas between them, or if it is empty what has none; may be given several times")
	for _, name := range []string{"last", "hourly", "daily", "weekly", "monthly", "yearly", "within", "tag"} {
		setKey(fs, "keep-"+name, verb+"-keep-"+name)
	}
}

// keepCount is how many a rule keeps.
type keepCount int

func (k *keepCount) Type() string   { return "n" }
func (k *keepCount) String() string { return strconv.Itoa(int(*k)) }

func (k *keepCount) Set(v string) error {
	if v == "unlimited" {
		*k = retention.All
		return nil
	}
	n, err := strconv.Atoi(v)
	if err != nil {
		return errors.New("must be a number, or unlimited")
	}
	*k = keepCount(n)
	return nil
}

// span is --keep-within.
type span retention.Span

func (s *span) Type() string   { return "duration" }
func (s *span) String() string { return retention.Span(*s).String() }

func (s *span) Set(v string) error {
	p, err := retention.ParseSpan(v)
	*s = span(p)
	return err
}

// tagLists is --keep-tag.
type tagLists [][]string

func (l *tagLists) Type() string { return "TAG,..." }

func (l *tagLists) String() string {
	var lists []string
	for _, all := range *l {
		lists = append(lists, strings.Join(all, ","))
	}
	return strings.Join(lists, " ")
}

func (l *tagLists) Set(v string) error {
	all := strings.Split(v, ",")
	for _, tag := range all {
		if v == "" {
			break // what has none
		}
		if err := store.CheckTag(tag); err != nil {
			return err
		}
	}
	*l = append(*l, all)
	return nil
}

func newPrune(a *app) *cobra.Command {
	var policy retention.Policy
	var dryRun, asJSON bool
	var rm rmOptions
	c := &cobra.Command{
		Use:   "prune [flags] [NAME...]",
		Short: "Remove checkpoints that no rule keeps",
		Long: `Prune keeps of each VM what one of the rules keeps, and removes its other
checkpoints, as rm does: of the VMs named, or of all in the store. The rules are
restic's: --keep-daily 7 keeps the newest of each of the last seven days that have
any, in the time zone of whoever runs it; a rule with counts left also keeps the
oldest. Every rule keeps a VM's newest. --keep-tag keeps what has that tag (see tag).

What can't say when it was made is kept, with a warning. --dry-run says what would be
removed, and removes nothing. What is in use is waited for, up to --wait in all, and
stays then, which the exit code says.`,
		Example: `  flic-migrate prune --store /srv/vms --keep-last 3 --keep-daily 7 --keep-weekly 5
  flic-migrate prune --store /srv/vms --keep-within 48h --dry-run web1`,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.prune(cmd.Context(), args, policy, rm, dryRun, asJSON)
		},
	}
	addPolicy(c.Flags(), &policy, "prune")
	addWait(c.Flags(), &rm.wait, "prune")
	c.Flags().BoolVar(&dryRun, "dry-run", false, "say what would be removed")
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON on standard output")
	setKey(c.Flags(), "dry-run", "prune-dry-run")
	addMetrics(c.Flags(), "prune")
	return c
}

// pruneEntry is an element of prune's JSON document.
type pruneEntry struct {
	Checkpoint string    `json:"checkpoint"` // NAME@N
	Created    time.Time `json:"created,omitzero"`
	Tags       []string  `json:"tags,omitempty"`
	// Kept are the rules that keep it, such as "last"; none: it goes.
	Kept    []string `json:"kept,omitempty"`
	Removed *rmEntry `json:"removed,omitempty"` // as rm reports it
	Error   string   `json:"error,omitempty"`   // why it was not removed, or can't be judged
	ref     store.Ref
}

func (a *app) prune(ctx context.Context, vms []string, policy retention.Policy, rm rmOptions, dryRun, asJSON bool) error {
	if err := rm.check(); err != nil {
		return err
	}
	if err := policy.Check(); err != nil {
		return usageError{fmt.Errorf("prune: %w: see --keep-last, --keep-daily, --keep-within, --keep-tag", err)}
	}
	st, err := a.openStore(ctx, false)
	if err != nil {
		return err
	}
	entries, err := a.judge(ctx, st, vms, policy)
	if err != nil {
		return err
	}
	if !dryRun {
		err = errors.Join(a.removeUnkept(ctx, a.remover(st, rm), st, entries)...)
	}
	a.measurePrune(entries)
	if asJSON {
		return errors.Join(err, printJSON(a.stdout, entries))
	}
	return errors.Join(err, a.printPruned(entries, dryRun))
}

// judge says of all checkpoints of VMs, or of all there are if vms is empty, what keeps
// them. Nothing is removed before all of it is known: a misspelt name ends it here.
func (a *app) judge(ctx context.Context, st *store.Store, vms []string, policy retention.Policy) (entries []pruneEntry, err error) {
	for _, vm := range vms {
		if err := store.CheckVM(vm); err != nil {
			return nil, err
		}
	}
	if len(vms) == 0 {
		if vms, err = st.VMs(ctx); err != nil {
			return nil, err
		}
	}
	entries = []pruneEntry{}
	for _, vm := range vms {
		list, err := st.Identities(ctx, vm)
		if err == nil && len(list) == 0 {
			err = fmt.Errorf("VM %q in store %s: %w", vm, st.Dir(), store.ErrNotFound)
		}
		if err != nil {
			return nil, err
		}
		var items []retention.Item
		for _, l := range list {
			if l.Err == nil {
				items = append(items, retention.Item{Time: l.Identity.Created, Tags: l.Label.Tags})
			} else if !cannotBeRead(l.Err) {
				return nil, l.Err
			}
		}
		why := policy.Apply(items, time.Now())
		for _, l := range list {
			e := pruneEntry{Checkpoint: l.Ref.String(), ref: l.Ref, Tags: l.Label.Tags}
			if l.Err != nil {
				e.Kept, e.Error = []string{"unreadable"}, oneLine(l.Err)
				a.log().Warn("a checkpoint can't say when it was made, and is kept", "checkpoint", e.Checkpoint, "cause", e.Error)
			} else {
				e.Created, e.Kept, why = l.Identity.Created, why[0], why[1:]
				if l.LabelErr != nil && len(policy.Tags) > 0 && len(e.Kept) == 0 {
					e.Kept, e.Error = []string{"unreadable"}, oneLine(l.LabelErr)
					a.log().Warn("the tags of a checkpoint can't be read, and it is kept", "checkpoint", e.Checkpoint, "cause", e.Error)
				}
			}
			entries = append(entries, e)
		}
	}
	return entries, nil
}

// removeUnkept removes the newest first: what others need is then never kept for them.
func (a *app) removeUnkept(ctx context.Context, remover *store.Remover, st *store.Store, entries []pruneEntry) (errs []error) {
	for i := len(entries) - 1; i >= 0; i-- {
		e := &entries[i]
		if len(e.Kept) > 0 {
			continue
		}
		removed, rerr := a.removeOne(ctx, st, remover, e.ref)
		if rerr != nil {
			e.Error = oneLine(rerr)
			errs = append(errs, rerr)
			if ctx.Err() != nil {
				return errs
			}
			continue
		}
		e.Removed = &removed
	}
	return errs
}

func (a *app) printPruned(entries []pruneEntry, dryRun bool) error {
	for _, e := range entries {
		line := "not removed: " + e.Error
		switch {
		case len(e.Kept) > 0:
			line = "kept: " + strings.Join(e.Kept, ", ")
		case dryRun:
			line = "would be removed"
		case e.Removed != nil:
			line = e.Removed.words()
		}
		if _, err := fmt.Fprintf(a.stdout, "%s: %s\n", e.Checkpoint, line); err != nil {
			return err
		}
	}
	return nil
}
