package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/store"
)

func newList(a *app) *cobra.Command {
	var asJSON, group, totals bool
	c := &cobra.Command{
		Use:   "list [flags] [NAME]",
		Short: "List the checkpoints of one VM or of all",
		Long: `List prints a line for each checkpoint: of one VM, or of all in the store. RAM is
the size of the guest's memory; FLASH and NVRAM are what the checkpoint takes, pages
that have been moved from NVRAM to flash counted where they are.
STATE is the guest's when it was saved, or "damaged" if the checkpoint can't say, or
"incomplete" if an image that it refers to, or a disk that is kept with it, is not there,
or its version if it is in another one of the format; "needs 2 disks" stands with one that
has pages on disk images (save --disk; show names them) and not copied from there (copy,
receive), "next armed" with the newest
checkpoint of a VM whose next one is (checkpoint --arm), "in shop@1" with one of a group.
With --group it lists groups (checkpoint --group), of one name or all.
With --totals it prints a line for each VM, and one for each trust domain: KEPT is what is
left of removed checkpoints because others need it, LENT what other VMs' checkpoints need of
this one's, BORROWED what this one's need of other VMs'.`,
		Example: `  flic-migrate list --store /srv/vms
  flic-migrate list --store /srv/vms --group
  flic-migrate list --store /srv/vms --json web1`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			vm := ""
			if len(args) == 1 {
				vm = args[0]
			}
			if group && totals {
				return usageError{errors.New("--group and --totals are two lists")}
			}
			if totals {
				return a.listTotals(cmd.Context(), vm, asJSON)
			}
			if group {
				return a.listGroups(cmd.Context(), vm, asJSON)
			}
			return a.list(cmd.Context(), vm, asJSON)
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON on standard output")
	groupFlag(c.Flags(), &group)
	c.Flags().BoolVar(&totals, "totals", false, "what each VM and each trust domain takes, and has in common with others")
	return c
}

// listEntry is an element of list's JSON document.
type listEntry struct {
	Checkpoint string    `json:"checkpoint"` // NAME@N
	VM         string    `json:"vm"`
	Number     int       `json:"number"`
	UUID       string    `json:"uuid,omitempty"`
	Created    time.Time `json:"created,omitzero"`
	RAMBytes   uint64    `json:"ram_bytes"`
	FlashBytes int64     `json:"flash_bytes"` // the image file
	NVRAMBytes int64     `json:"nvram_bytes"` // page content in NVRAM
	MovedBytes int64     `json:"moved_bytes"` // page content beside the image file: moved from NVRAM, or copied from disk images
	Machine    string    `json:"machine,omitempty"`
	State      string    `json:"state"`                // QEMU's run state, or damaged, incomplete, "version N" or unsupported
	Disks      int       `json:"disks,omitempty"`      // disk images that have bytes of its pages
	KeptDisks  int       `json:"kept_disks,omitempty"` // that the store keeps with it
	Domain     string    `json:"trust_domain,omitempty"`
	Armed      bool      `json:"armed,omitempty"` // the VM's next one is armed; on its newest
	Group      string    `json:"group,omitempty"` // the group that it is in, NAME@N
	Tags       []string  `json:"tags,omitempty"`
	Note       string    `json:"note,omitempty"`
	Error      string    `json:"error,omitempty"`
}

func (a *app) list(ctx context.Context, vm string, asJSON bool) error {
	if vm != "" {
		if err := store.CheckVM(vm); err != nil {
			return err
		}
	}
	st, err := a.openStore(ctx, false)
	if err != nil {
		return err
	}
	list, err := st.Listing(ctx, vm)
	if err != nil {
		return err
	}
	if vm != "" && len(list) == 0 {
		return fmt.Errorf("VM %q in store %s: %w", vm, st.Dir(), store.ErrNotFound)
	}
	if _, err := a.warnOfStrays(ctx, st, vm); err != nil {
		return err
	}
	// A checkpoint that can't be read must not hide the others. Damage is worse than
	// another version.
	var damage error
	entries := []listEntry{}
	for _, l := range list {
		if l.Err != nil && !cannotBeRead(l.Err) {
			return l.Err
		}
		if wrong := errors.Join(l.Err, l.Lacks); wrong != nil && !integrity.IsCorrupt(damage) {
			damage = wrong
		}
		if l.LabelErr != nil {
			a.log().Warn("tags and note can't be read", "checkpoint", l.Ref.String(), "cause", oneLine(l.LabelErr))
		}
		entries = append(entries, newListEntry(l))
	}
	markArmed(ctx, st, entries)
	a.markGroups(ctx, st, entries)
	switch {
	case asJSON:
		err = printJSON(a.stdout, entries)
	case len(entries) == 0:
		// An empty table says nothing of a --store that was forgotten.
		_, err = fmt.Fprintf(a.stderr, "flic-migrate: store %s has no checkpoints\n", st.Dir())
	default:
		err = printList(a.stdout, entries)
	}
	if err != nil {
		return err
	}
	return damage
}

// warnOfStrays names what may be checkpoints that somebody has renamed: of one VM, or
// of all.
func (a *app) warnOfStrays(ctx context.Context, st *store.Store, vm string) (strays []string, err error) {
	strays, err = st.Strays(ctx, vm)
	for _, path := range strays {
		a.log().Warn("this has no name, or is of no kind, of a store's, and may be a checkpoint", "path", path)
	}
	return strays, err
}

// cannotBeRead tells whether err is one checkpoint's: damaged, or of another version.
func cannotBeRead(err error) bool {
	var u *image.UnsupportedError
	return integrity.IsCorrupt(err) || errors.As(err, &u)
}

func newListEntry(l store.Listed) listEntry {
	e := listEntry{Checkpoint: l.Ref.String(), VM: l.Ref.VM, Number: l.Ref.N, FlashBytes: l.ImageBytes, Tags: l.Label.Tags, Note: l.Label.Note}
	if l.Err != nil {
		e.State, e.Error = "damaged", oneLine(l.Err)
		var u *image.UnsupportedError
		switch {
		case integrity.IsCorrupt(l.Err) || !errors.As(l.Err, &u):
		case u.Version > 0:
			e.State = fmt.Sprintf("version %d", u.Version)
		default:
			e.State = "unsupported"
		}
		return e
	}
	id := l.Identity
	e.UUID, e.Created, e.Machine, e.State = id.UUID.String(), id.Created, id.Machine, id.RunState
	e.RAMBytes, e.Disks, e.KeptDisks, e.Domain = id.RAMBytes, id.NeedsDisks(), len(id.Kept), id.TrustDomain
	e.MovedBytes = l.MovedBytes + l.DiskBytes
	if id.NVRAM != nil {
		e.NVRAMBytes = max(0, id.NVRAM.Bytes-l.MovedBytes)
	}
	if l.Lacks != nil {
		e.State, e.Error = "incomplete", oneLine(l.Lacks)
	}
	return e
}

func ramBytes(m *checkpoint.Meta) (n uint64) {
	for _, b := range m.Blocks {
		n += b.Used
	}
	return n
}

// markArmed marks the newest checkpoint of each VM that is armed. The list is in order.
func markArmed(ctx context.Context, st *store.Store, entries []listEntry) {
	for i := range entries {
		e := &entries[i]
		if i+1 < len(entries) && entries[i+1].VM == e.VM {
			continue
		}
		// What can't be read is gc's, and no reason to list nothing.
		_, e.Armed, _ = st.ArmedFor(ctx, e.VM)
	}
}

// markGroups says of each checkpoint which group it is in. A record that can't be read is a
// warning: which checkpoints it is of is not known.
func (a *app) markGroups(ctx context.Context, st *store.Store, entries []listEntry) {
	list, err := st.Groups(ctx, "")
	if err != nil {
		a.log().Warn("which groups there are is not known", "cause", oneLine(err))
		return
	}
	of := make(map[store.Ref]store.Ref)
	for _, l := range list {
		if l.Err != nil {
			a.log().Warn("the record of a group can't be read; rm --group removes it", "group", l.Ref().String(), "cause", oneLine(l.Err))
		}
		for _, m := range l.Members {
			if !slices.Contains(l.Missing, m.Ref()) {
				of[m.Ref()] = l.Ref()
			}
		}
	}
	for i := range entries {
		e := &entries[i]
		if g, is := of[store.Ref{VM: e.VM, N: e.Number}]; is {
			e.Group = g.String()
		}
	}
}

func printList(w io.Writer, entries []listEntry) error {
	t := newTable(w)
	// These columns are for those who use them.
	tags := slices.ContainsFunc(entries, func(e listEntry) bool { return len(e.Tags) > 0 })
	notes := slices.ContainsFunc(entries, func(e listEntry) bool { return e.Note != "" })
	head := []string{"CHECKPOINT", "CREATED", "RAM", "FLASH", "NVRAM", "MACHINE", "STATE"}
	if tags {
		head = append(head, "TAGS")
	}
	if notes {
		head = append(head, "NOTE")
	}
	t.row(head...)
	for _, e := range entries {
		state := dash(e.State)
		if e.Disks > 0 {
			state += fmt.Sprintf(", needs %s", plural(e.Disks, "disk"))
		}
		if e.KeptDisks > 0 {
			state += fmt.Sprintf(", with %s", plural(e.KeptDisks, "disk"))
		}
		if e.Armed {
			state += ", next armed"
		}
		if e.Group != "" {
			state += ", in " + e.Group
		}
		cells := []string{e.Checkpoint, localTime(e.Created), human(int64(e.RAMBytes)),
			human(e.FlashBytes + e.MovedBytes), human(e.NVRAMBytes), dash(e.Machine), state}
		if tags {
			cells = append(cells, dash(strings.Join(e.Tags, ",")))
		}
		if notes {
			cells = append(cells, dash(firstWords(e.Note)))
		}
		t.row(cells...)
	}
	return t.flush()
}

// firstWords is the beginning of a note, in one line.
func firstWords(note string) string {
	const most = 40
	line, _, more := strings.Cut(note, "\n")
	line = strings.ReplaceAll(line, "\t", " ")
	if r := []rune(line); len(r) > most {
		line, more = string(r[:most]), true
	}
	if more {
		line += "…"
	}
	return line
}

// plural is a number of things.
func plural(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return fmt.Sprintf("%d %ss", n, thing)
}

func localTime(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return t.Local().Format("2006-01-02 15:04:05")
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// printJSON prints v as one indented document.
func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(v)
}
