package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/flic-migrate/flic-migrate/tier/store"
)

func newTag(a *app) *cobra.Command {
	var remove, asJSON bool
	c := &cobra.Command{
		Use:   "tag [flags] NAME[@N] [TAG...]",
		Short: "Put tags on a checkpoint, or take them off",
		Long: `Tag puts tags on a checkpoint, in addition to those that it has, or with --remove takes
them off, and prints all that it then has; without a TAG it changes nothing. NAME alone
means the VM's newest checkpoint. List and show print tags, and prune --keep-tag keeps
what has them.

A tag has 1 to 64 printable characters without spaces and commas, and does not begin
with -. A checkpoint loses its tags when it is removed, and flatten and absorb leave them;
a copy that persist makes has the same.`,
		Example: `  flic-migrate tag --store /srv/vms web1@3 golden before-upgrade
  flic-migrate tag --store /srv/vms --remove web1@3 golden`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.tag(cmd.Context(), args[0], args[1:], remove, asJSON)
		},
	}
	c.Flags().BoolVar(&remove, "remove", false, "take the tags off")
	setKey(c.Flags(), "remove", "tag-remove")
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON on standard output")
	return c
}

func newNote(a *app) *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:   "note [flags] NAME[@N] [TEXT]",
		Short: "Write a note on a checkpoint, or read it",
		Long: `Note writes a note on a checkpoint, in the place of the one that it has; an empty TEXT
takes that away. Without TEXT it prints the note. NAME alone means the VM's newest
checkpoint. A note has at most 4 KiB, and its fate is that of tags.`,
		Example: `  flic-migrate note --store /srv/vms web1@3 "before the upgrade to Debian 13"
  flic-migrate note --store /srv/vms web1@3`,
		Args: cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.note(cmd.Context(), args[0], args[1:], asJSON)
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON on standard output")
	return c
}

// labelDoc is tag's and note's JSON document.
type labelDoc struct {
	Checkpoint string   `json:"checkpoint"` // NAME@N
	Tags       []string `json:"tags"`
	Note       string   `json:"note"`
}

func (a *app) tag(ctx context.Context, name string, tags []string, remove, asJSON bool) error {
	for _, t := range tags {
		if err := store.CheckTag(t); err != nil {
			return err
		}
	}
	if remove && len(tags) == 0 {
		return usageError{errors.New("tag --remove needs the tags to take off")}
	}
	var change func(*store.Label)
	switch {
	case remove:
		change = func(l *store.Label) {
			l.Tags = slices.DeleteFunc(l.Tags, func(t string) bool { return slices.Contains(tags, t) })
		}
	case len(tags) > 0:
		change = func(l *store.Label) { l.Tags = append(l.Tags, tags...) }
	}
	ref, label, err := a.label(ctx, name, change)
	if err != nil {
		return err
	}
	if asJSON {
		return printJSON(a.stdout, newLabelDoc(ref, label))
	}
	_, err = fmt.Fprintf(a.stdout, "%v: %s\n", ref, dash(strings.Join(label.Tags, ",")))
	return err
}

func (a *app) note(ctx context.Context, name string, text []string, asJSON bool) error {
	var change func(*store.Label)
	if len(text) == 1 {
		if err := store.CheckNote(text[0]); err != nil {
			return err
		}
		change = func(l *store.Label) { l.Note = text[0] }
	}
	ref, label, err := a.label(ctx, name, change)
	if err != nil {
		return err
	}
	if asJSON {
		return printJSON(a.stdout, newLabelDoc(ref, label))
	}
	_, err = fmt.Fprintf(a.stdout, "%v: %s\n", ref, dash(label.Note))
	return err
}

func newLabelDoc(ref store.Ref, l store.Label) labelDoc {
	return labelDoc{ref.String(), append([]string{}, l.Tags...), l.Note}
}

// label changes what is said of a checkpoint, or with nil reads it.
func (a *app) label(ctx context.Context, name string, change func(*store.Label)) (store.Ref, store.Label, error) {
	st, ref, err := a.storeOf(ctx, name)
	if err != nil {
		return ref, store.Label{}, err
	}
	if change == nil {
		if ref, err = st.Resolve(ctx, ref); err != nil {
			return ref, store.Label{}, err
		}
		l, err := st.Label(ctx, ref)
		return ref, l, err
	}
	ref, now, lost, err := st.ChangeLabel(ctx, ref, change)
	if err == nil && lost != nil {
		a.log().Warn("tags and note that could not be read are lost", "checkpoint", ref.String(), "cause", oneLine(lost))
	}
	return ref, now, err
}
