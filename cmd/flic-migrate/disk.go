package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"github.com/spf13/cobra"

	"github.com/flic-migrate/flic-migrate/tier/disk"
)

func newDisk(a *app) *cobra.Command {
	c := &cobra.Command{
		Use:   "disk",
		Short: "Know which pages are on the guests' disks, so as not to store them",
		Long: `Much of a guest's memory is its page cache, and equals blocks of its disks. Disk index
reads a disk image once and keeps what it needs to know them again, in the store. From
then on the saves of all VMs that stand on the image leave out the pages that it has.
Only images that nobody writes to are of use, such as the backing file that VMs share.`,
		Example: `  flic-migrate disk index /srv/images/debian13.qcow2
  flic-migrate disk list`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	c.AddCommand(newDiskIndex(a), newDiskList(a), newDiskRm(a), newDiskThaw(a))
	return c
}

func newDiskIndex(a *app) *cobra.Command {
	d := &diskIndex{app: a, format: choice{choices: []string{"auto", string(disk.Qcow2), string(disk.Raw)}, value: "auto"}}
	c := &cobra.Command{
		Use:   "index [flags] FILE...",
		Short: "Read disk images, and remember what is where on them",
		Long: `Index reads each disk image FILE, raw or qcow2, and the backing files that it stands
on, and keeps for each file an index of its own in the store: 0.5 % of what the file
holds. It is made once. An image whose index fits is not read again; one that was
written to is, and is said to be.

A file that a QEMU has open for writing gets no index, but what it stands on does. It
can be indexed beside running VMs: no lock is taken, and an image is only read.`,
		Example: `  flic-migrate disk index /srv/images/debian13.qcow2
  flic-migrate disk index --json /srv/vms/web1.qcow2`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return d.run(cmd.Context(), args) },
	}
	fs := c.Flags()
	fs.Var(&d.format, "format", "format of the FILEs; auto: qcow2 if they begin as such, else raw. A backing file's is in the file above it")
	setKey(fs, "format", "disk-format")
	fs.BoolVar(&d.again, "again", false, "build indexes that fit again, too")
	setKey(fs, "again", "disk-again")
	fs.BoolVar(&d.json, "json", false, "print JSON on standard output")
	fs.BoolVar(&d.quiet, "quiet", false, "no progress and no summary, only warnings and errors")
	return c
}

// diskIndex is the command disk index.
type diskIndex struct {
	*app
	format             choice
	again, json, quiet bool
}

// diskEntry is an element of the JSON documents of disk index and disk list.
type diskEntry struct {
	Path       string    `json:"path"`
	Format     string    `json:"format,omitempty"`
	State      string    `json:"state"`         // built, kept or skipped; current, stale, missing or damaged
	Why        string    `json:"why,omitempty"` // it was skipped, or built again, or is not current
	Index      string    `json:"index,omitempty"`
	Size       int64     `json:"size"`        // of the disk
	DataBytes  int64     `json:"data_bytes"`  // that the file has of it
	Blocks     int64     `json:"blocks"`      // that the index knows
	IndexBytes int64     `json:"index_bytes"` // of the index
	Coverage   float64   `json:"coverage"`    // of the data, between 0 and 1: the rest is zero
	Seconds    float64   `json:"seconds,omitempty"`
	Built      time.Time `json:"built,omitzero"`
}

func (e *diskEntry) cover() {
	if e.DataBytes > 0 {
		e.Coverage = min(1, float64(e.Blocks*disk.BlockSize)/float64(e.DataBytes))
	}
}

func (d *diskIndex) run(ctx context.Context, files []string) error {
	format := disk.Format(d.format.value)
	if d.format.value == "auto" {
		format = ""
	}
	// A misspelt name must not be found after an hour of reading.
	var images []*disk.Image
	defer func() {
		for _, img := range images {
			img.Close()
		}
	}()
	for _, name := range files {
		img, err := disk.Open(ctx, name, format)
		if err != nil {
			return err
		}
		images = append(images, img)
	}
	st, err := d.openStore(ctx, true)
	if err != nil {
		return err
	}
	c, err := st.Disks()
	if err != nil {
		return err
	}
	entries := []diskEntry{}
	done := make(map[string]bool)
	for _, img := range images {
		var skipped error
		indexed := false
		for layer := img; layer != nil; layer = layer.Backing() {
			if done[layer.Path()] {
				indexed = true
				continue
			}
			e, err := d.layer(ctx, c, layer)
			if errors.Is(err, disk.ErrWriter) {
				skipped = errors.Join(skipped, err)
			} else if err != nil {
				return err
			} else {
				done[layer.Path()], indexed = true, true
			}
			entries = append(entries, e)
		}
		if skipped != nil && indexed {
			d.log().Warn("not indexed", "cause", oneLine(skipped))
		} else if skipped != nil {
			return skipped
		}
	}
	if d.json {
		return printJSON(d.stdout, entries)
	}
	return nil
}

// layer indexes one file.
func (d *diskIndex) layer(ctx context.Context, c *disk.Catalog, img *disk.Image) (diskEntry, error) {
	e := diskEntry{Path: img.Path(), Format: string(img.Format()), Size: img.Size(), Index: disk.ID(img.Identity())}
	meter := newProgress(d.stderr, d.quiet)
	b, err := c.Build(ctx, img, disk.BuildOptions{Again: d.again, Progress: meter.callback()})
	meter.finish()
	if err != nil {
		e.State, e.Why, e.Index = "skipped", oneLine(err), ""
		return e, err
	}
	e.State, e.Why = "built", oneLine(errors.New(b.Why))
	if b.Kept {
		e.State = "kept"
	}
	e.DataBytes, e.Blocks, e.IndexBytes, e.Seconds = b.Data, b.Blocks, b.Bytes, b.Took.Seconds()
	e.cover()
	if d.json || d.quiet {
		return e, nil
	}
	if b.Kept {
		fmt.Fprintf(d.stdout, "%s: has an index that fits, %s for %s of data\n", e.Path, human(e.IndexBytes), human(e.DataBytes))
		return e, nil
	}
	again := ""
	if e.Why != "" {
		again = "; again, because " + e.Why
	}
	fmt.Fprintf(d.stdout, "%s: %s indexed in %.1f s, %.0f MB/s; index of %s%s\n", e.Path, human(e.DataBytes), e.Seconds,
		float64(e.DataBytes)/1e6/max(e.Seconds, 1e-3), human(e.IndexBytes), again)
	return e, nil
}

// indexes are those of the store, and what has them.
func (a *app) indexes(ctx context.Context) (*disk.Catalog, []disk.Entry, error) {
	st, err := a.openStore(ctx, false)
	if err != nil {
		return nil, nil, err
	}
	c, err := st.Disks()
	if err != nil {
		return nil, nil, err
	}
	list, err := c.List(ctx)
	return c, list, err
}

func newDiskList(a *app) *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:   "list [flags]",
		Short: "List the indexes of disk images",
		Long: `List prints a line for each index in the store. Only one that is current is used: a
stale one is of an image that has changed since, and disk index builds it anew.`,
		Example: `  flic-migrate disk list --store /srv/vms`,
		Args:    cobra.NoArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return a.diskList(cmd.Context(), asJSON) },
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON on standard output")
	return c
}

func (a *app) diskList(ctx context.Context, asJSON bool) error {
	_, list, err := a.indexes(ctx)
	if err != nil {
		return err
	}
	entries := []diskEntry{}
	for _, l := range list {
		e := diskEntry{Path: l.Identity.Path, Format: string(l.Identity.Format), State: string(l.State), Why: oneLine(errors.New(l.Why)), Index: l.ID,
			Size: l.Identity.Size, DataBytes: l.Data, Blocks: l.Blocks, IndexBytes: l.Bytes, Built: l.Built.UTC()}
		if l.Built.IsZero() {
			e.Built = time.Time{}
		}
		e.cover()
		entries = append(entries, e)
	}
	if asJSON {
		return printJSON(a.stdout, entries)
	}
	t := newTable(a.stdout)
	t.row("DISK", "FORMAT", "DATA", "INDEX", "BUILT", "STATE")
	for _, e := range entries {
		path := e.Path
		if path == "" {
			path = e.Index
		}
		t.row(path, dash(e.Format), human(e.DataBytes), human(e.IndexBytes), localTime(e.Built), e.State)
	}
	return t.flush()
}

func newDiskRm(a *app) *cobra.Command {
	var all, asJSON bool
	c := &cobra.Command{
		Use:   "rm [flags] {FILE... | --all}",
		Short: "Remove indexes of disk images",
		Long: `Rm removes the indexes of disk images, which may be gone themselves; the ID of an index
from disk list --json stands for its FILE, too. It does no harm to any checkpoint: what
one has on a disk is read from the disk, without the index.`,
		Example: `  flic-migrate disk rm --store /srv/vms /srv/images/debian12.qcow2`,
		Args: func(cmd *cobra.Command, args []string) error {
			if all != (len(args) == 0) {
				return errors.New("name the images whose indexes to remove, or give --all alone")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error { return a.diskRm(cmd.Context(), args, all, asJSON) },
	}
	c.Flags().BoolVar(&all, "all", false, "remove all indexes of the store")
	setKey(c.Flags(), "all", "disk-rm-all")
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON on standard output")
	return c
}

// diskRemoved is an element of disk rm's JSON document.
type diskRemoved struct {
	Path       string `json:"path"`
	Index      string `json:"index"`
	IndexBytes int64  `json:"index_bytes"`
}

func (a *app) diskRm(ctx context.Context, files []string, all, asJSON bool) error {
	c, list, err := a.indexes(ctx)
	if err != nil {
		return err
	}
	remove := make(map[string]bool)
	for _, name := range files {
		ids := disk.Find(list, name)
		if len(ids) == 0 {
			return fmt.Errorf("%s: %w in store %s", name, disk.ErrNoIndex, a.store)
		}
		for _, id := range ids {
			remove[id] = true
		}
	}
	entries := []diskRemoved{}
	for _, l := range list {
		if !all && !remove[l.ID] {
			continue
		}
		if err := c.Remove(ctx, l.ID); errors.Is(err, fs.ErrNotExist) {
			continue // somebody else was faster
		} else if err != nil {
			return err
		}
		entries = append(entries, diskRemoved{l.Identity.Path, l.ID, l.Bytes})
		if !asJSON {
			fmt.Fprintf(a.stdout, "%s: index of %s removed\n", cmp.Or(l.Identity.Path, l.ID), human(l.Bytes))
		}
	}
	if asJSON {
		return printJSON(a.stdout, entries)
	}
	return nil
}
