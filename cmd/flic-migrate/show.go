package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/digest"
	"github.com/flic-migrate/flic-migrate/tier/store"
)

func newShow(a *app) *cobra.Command {
	var asJSON, group bool
	c := &cobra.Command{
		Use:   "show [flags] NAME[@N]",
		Short: "Show all that a checkpoint says about itself",
		Long: `Show prints what a checkpoint says about itself: machine, memory, when and how it
was saved and what the save came to. NAME alone means the VM's newest checkpoint.
It reads the description and the page map, which says in how many places of the images
the pages are, and what other checkpoints refer to; "flic-migrate verify" reads
everything. With --group it shows a group (checkpoint --group), the newest of its name
without a number, and its members.`,
		Example: `  flic-migrate show --store /srv/vms web1
  flic-migrate show --store /srv/vms --json web1@3
  flic-migrate show --store /srv/vms --group shop`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if group {
				return a.showGroup(cmd.Context(), args[0], asJSON)
			}
			return a.show(cmd.Context(), args[0], asJSON)
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON on standard output")
	groupFlag(c.Flags(), &group)
	return c
}

// showDoc is show's JSON document.
type showDoc struct {
	Checkpoint string `json:"checkpoint"` // NAME@N
	Number     int    `json:"number"`
	FileBytes  int64  `json:"file_bytes"` // the image file
	*checkpoint.Meta
	Tags    []string          `json:"tags,omitempty"`
	Note    string            `json:"note,omitempty"`
	Armed   bool              `json:"armed,omitempty"`   // the VM's next checkpoint is armed, and this is its newest
	Group   string            `json:"group,omitempty"`   // the group that it is in, NAME@N
	Reads   *checkpoint.Reads `json:"reads,omitempty"`   // of a restore; missing if the page map can't tell
	Sharing *store.Sharing    `json:"sharing,omitempty"` // with others; missing if it can't be told
	// KeptDisks are the disks that the store keeps with it, as they are now.
	KeptDisks []store.KeptDisk `json:"kept_disks,omitempty"`
}

func (a *app) show(ctx context.Context, name string, asJSON bool) error {
	st, ref, err := a.storeOf(ctx, name)
	if err != nil {
		return err
	}
	d, err := st.Describe(ctx, ref)
	if err != nil {
		return err
	}
	// What a checkpoint says of itself is shown also if its page map is damaged.
	var reads *checkpoint.Reads
	if r, err := st.Reads(ctx, d.Ref); err == nil {
		reads = &r
	}
	// So is it if another checkpoint is damaged.
	var sharing *store.Sharing
	if sh, err := st.Sharing(ctx, d.Ref); err == nil {
		sharing = &sh
	} else {
		a.log().Warn("what it has to do with other checkpoints can't be told", "cause", oneLine(err))
	}
	label, err := st.Label(ctx, d.Ref)
	if err != nil {
		a.log().Warn("tags and note can't be read", "cause", oneLine(err))
	}
	// What can't be read is gc's.
	_, armed, _ := st.ArmedFor(ctx, d.Ref.VM)
	if newest, err := st.Resolve(ctx, store.Ref{VM: d.Ref.VM}); err != nil || newest != d.Ref {
		armed = false
	}
	group := ""
	if of, err := st.GroupOf(ctx); err == nil {
		if g, is := of[d.Ref]; is {
			group = g.String()
		}
	}
	kept := st.KeptDisks(ctx, d.Meta)
	if asJSON {
		if m := d.Meta; m.Digests != nil {
			m.Digests.Key = digest.Key{} // whoever reads this need not know it
		}
		return printJSON(a.stdout, showDoc{d.Ref.String(), d.Ref.N, d.ImageBytes, d.Meta, label.Tags, label.Note, armed, group, reads, sharing, kept})
	}
	return printShow(a.stdout, d.Ref, d.ImageBytes, d.Meta, label, armed, group, reads, sharing, kept)
}

func printShow(w io.Writer, ref store.Ref, size int64, m *checkpoint.Meta, label store.Label, armed bool, group string, reads *checkpoint.Reads, sharing *store.Sharing, kept []store.KeptDisk) error {
	t := newTable(w)
	line := func(name, format string, args ...any) { t.row(name, fmt.Sprintf(format, args...)) }
	r := &m.Report
	line("checkpoint", "%v", ref)
	line("uuid", "%s", m.UUID)
	line("created", "%s", localTime(m.Created))
	line("machine", "%s", dash(m.Machine))
	line("guest uuid", "%s", dash(m.GuestUUID))
	line("capabilities", "%s", dash(strings.Join(m.Capabilities, ", ")))
	line("trust domain", "%s", dash(m.TrustDomain))
	line("state when saved", "%s", dash(m.RunState))
	if len(label.Tags) > 0 {
		line("tags", "%s", strings.Join(label.Tags, ", "))
	}
	for i, text := range strings.Split(label.Note, "\n") {
		switch {
		case label.Note == "":
		case i == 0:
			line("note", "%s", text)
		default:
			line("", "%s", text)
		}
	}
	if armed {
		line("next", "armed")
	}
	if group != "" {
		line("group", "%s", group)
	}
	line("page size", "%d", m.PageSize)
	line("ignore-shared", "%t", m.IgnoreShared)
	line("RAM", "%s", human(int64(ramBytes(m))))
	for _, b := range m.Blocks {
		extra := ""
		if b.PageSize != 0 {
			extra += fmt.Sprintf(", host pages of %d", b.PageSize)
		}
		if b.GPA != nil {
			extra += fmt.Sprintf(", at guest address %#x", *b.GPA)
		}
		line("  "+b.Name, "%s%s", human(int64(b.Used)), extra)
	}
	line("stream", "%d bytes", r.BytesIn)
	if m.OpaqueBytes > 0 {
		line("  kept verbatim", "%d bytes that were not understood", m.OpaqueBytes)
	}
	line("pages", "%d", r.Pages)
	for _, p := range []struct {
		name string
		n    int64
	}{
		{"zero", r.Zero}, {"sent as data", r.ZeroAsData}, {"duplicate", r.Duplicate}, {"hot", r.Hot}, {"cold", r.Cold},
		{"equal to disk", r.Disk}, {"equal, but stored", r.Isolated}, {"delta", r.Delta}, {"unchanged", r.Unchanged}, {"sent again", r.Resent}, {"superseded", r.Superseded}, {"hot without room", r.Surplus},
		{"guest page tables", r.PageTables},
	} {
		line("  "+p.name, "%d", p.n)
	}
	if r.NoPageTables != "" {
		line("  of which not all", "%s", r.NoPageTables)
	}
	line("flash", "%s, %s", human(size), r.Codec)
	if n := m.NVRAM; n != nil {
		line("NVRAM", "%s in %s", human(r.NVRAMBytes), n.Path)
		line("  file uuid", "%s", n.UUID)
		line("  slots", "%d", n.Slots)
		if sharing != nil && sharing.Moved > 0 {
			line("  moved to flash", "%s", human(sharing.Moved))
		}
	} else {
		line("NVRAM", "-")
	}
	where := "on disk image"
	if m.DiskSlots > 0 {
		where = "copied from disk"
	}
	for _, d := range r.Disks {
		of := ""
		if d.Kept && m.DiskSlots == 0 {
			of = "kept copy of "
		}
		line(where, "%s%s: %d pages, %s", of, d.Path, d.Pages, human(d.Bytes))
	}
	if reads != nil {
		line("a restore reads", "%d places, %.1f for each MB", reads.Places, reads.PerMB)
		if reads.DiskPlaces > 0 {
			line("  on disk images", "%s in %d places", human(reads.DiskBytes), reads.DiskPlaces)
		}
	}
	if sharing != nil {
		for _, to := range sharing.RefersTo {
			what := ""
			switch {
			case to.Missing != "":
				what = ", missing: " + to.Missing
			case to.Removed:
				what = ", which is removed and kept for others"
			}
			line("refers to", "%s: %s of flash and %s of NVRAM%s", to.Checkpoint, human(to.Flash), human(to.Space.NVRAM), what)
		}
		if n := len(sharing.HeldFor); n > 0 {
			line("held for others", "%s of flash and %s of NVRAM, for %s", human(sharing.Held.Flash), human(sharing.Held.NVRAM), few(sharing.HeldFor))
		}
		line("rm would free", "%s of flash and %s of NVRAM", human(sharing.RmFrees.Flash), human(sharing.RmFrees.NVRAM))
	}
	for _, d := range m.VMDisks {
		if len(d.Layers) > 0 {
			how := "as it was then"
			switch i := slices.IndexFunc(kept, func(k store.KeptDisk) bool { return k.UUID == d.Kept }); {
			case d.Frozen:
				how = "frozen; needs an overlay to resume"
			case i >= 0 && kept[i].Wrong != "":
				how += "; the copy that was kept is of no use: " + kept[i].Wrong
			case i >= 0:
				how += fmt.Sprintf("; kept in %s, %s (disk thaw makes a file of it)", kept[i].File, human(kept[i].Bytes))
				if kept[i].NotChecked {
					how += "; not checked: it has no digests yet (gc makes them)"
				}
			}
			line("goes with", "%s, %s", d.Layers[0].Path, how)
		}
	}
	if m.Libvirt != nil {
		line("libvirt", "a domain, %d bytes of XML (--json shows it)", len(m.Libvirt.XML))
	}
	line("hashed", "%s of %s, %s sampled, chunks of %d, samples of %d", human(r.HashedBytes), human(r.NonZeroBytes),
		human(r.SampledBytes), r.ChunkSize, r.SampleSize)
	s := r.Seconds
	line("seconds", "%.3f: ram %.3f, sync %.3f, tail %.3f, commit %.3f", s.Total, s.RAM, s.Sync, s.Tail, s.Commit)
	if err := t.flush(); err != nil {
		return err
	}
	if m.NVRAM != nil && m.NVRAM.Volatile && (sharing == nil || sharing.Moved < m.NVRAM.Bytes) {
		_, err := fmt.Fprintf(w, "\nThe NVRAM file is on a volatile file system: a power-off loses this checkpoint.\n"+
			"To make a copy that has everything on flash:\n\n  flic-migrate persist %v\n", ref)
		return err
	}
	return nil
}

// few is a list of names that may be long.
func few(names []string) string {
	if n := len(names); n > 4 {
		return fmt.Sprintf("%s and %d others", strings.Join(names[:3], ", "), n-3)
	}
	return strings.Join(names, ", ")
}
