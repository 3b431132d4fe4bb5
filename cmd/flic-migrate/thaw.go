package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/flic-migrate/flic-migrate/tier/disk"
	"github.com/flic-migrate/flic-migrate/tier/store"
)

func newDiskThaw(a *app) *cobra.Command {
	var to string
	var skip, asJSON bool
	c := &cobra.Command{
		Use:   "thaw [flags] NAME[@N]",
		Short: "Make files of the disks that are kept with a checkpoint",
		Long: `Thaw makes a new file of each disk that the store keeps with a checkpoint (checkpoint
--disks keep): the disk as it was when the guest was saved, to start a QEMU with and resume
the checkpoint. The file is yours, and needs neither the store nor the checkpoint. It shares
its disk blocks with the store's where the file system can do that. All of it is read and
compared with the digests that the store has of it, and there is no file if it is not what
it was.

It stands beside the image that it is a copy of, as IMAGE.NAME@N, or in the directory --to
under the image's own name. No file is overwritten, and all files are made, or none.`,
		Example: `  flic-migrate disk thaw --store /srv/vms web1@3
  flic-migrate disk thaw --store /srv/vms --to /srv/again web1@3`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.diskThaw(cmd.Context(), args[0], to, store.ThawOptions{SkipCheck: skip}, asJSON)
		},
	}
	c.Flags().StringVar(&to, "to", "", "directory for the files (default: where each image is)")
	setKey(c.Flags(), "to", "disk-thaw-to")
	c.Flags().BoolVar(&skip, "skip-check", false, "do not read the disks to compare them with their digests")
	setKey(c.Flags(), "skip-check", "disk-thaw-skip-check")
	c.Flags().BoolVar(&asJSON, "json", false, "print a JSON array")
	return c
}

// thawed is an element of disk thaw's JSON document.
type thawed struct {
	Disk   string      `json:"disk"`  // the path of its device in QEMU's object tree
	Image  string      `json:"image"` // the path of what it was
	Format disk.Format `json:"format"`
	Path   string      `json:"path"` // the new file
	// NotChecked: it was compared with no digests.
	NotChecked bool `json:"not_checked,omitempty"`
}

var errNothingKept = errors.New("the store keeps no disks with it (checkpoint --disks keep)")

func (a *app) diskThaw(ctx context.Context, name, to string, o store.ThawOptions, asJSON bool) (err error) {
	st, ref, err := a.storeOf(ctx, name)
	if err != nil {
		return err
	}
	d, err := st.Describe(ctx, ref)
	if err != nil {
		return err
	}
	kept := st.KeptDisks(ctx, d.Meta)
	if len(kept) == 0 {
		return fmt.Errorf("checkpoint %v: %w", d.Ref, errNothingKept)
	}
	// All that can be known to be wrong is before a file is made.
	files := make([]thawed, len(kept))
	for i, k := range kept {
		if files[i], err = thawTo(k, d.Ref, to); err != nil {
			return err
		}
		if j := slices.IndexFunc(files[:i], func(t thawed) bool { return t.Path == files[i].Path }); j >= 0 {
			return fmt.Errorf("disks %s and %s would both become %s: leave --to out, and each stands beside its image", kept[j].Image, k.Image, files[i].Path)
		}
		if _, err := os.Lstat(files[i].Path); !errors.Is(err, fs.ErrNotExist) {
			return cmp.Or(err, error(&fs.PathError{Op: "create", Path: files[i].Path, Err: fs.ErrExist}))
		}
	}
	made := 0
	defer func() {
		// All of them or none: what is left could be as large as a disk, and would have the
		// next try refused.
		if made < len(files) {
			for _, f := range files[:made] {
				err = errors.Join(err, os.Remove(f.Path))
			}
		}
	}()
	for i, k := range kept {
		if err := st.Thaw(ctx, k, files[i].Path, o); err != nil {
			return err
		}
		made++
	}
	for i, k := range kept {
		files[i].NotChecked = k.NotChecked || o.SkipCheck
		was := "as it was"
		switch {
		case o.SkipCheck:
			was = "of the size and time that it had; not checked: --skip-check"
		case k.NotChecked:
			was = "of the size and time that it had; not checked: it has no digests yet (gc makes them)"
		}
		if !asJSON {
			fmt.Fprintf(a.stdout, "%s: %s, %s, %s\n", files[i].Disk, files[i].Path, files[i].Format, was)
		}
	}
	if asJSON {
		return printJSON(a.stdout, files)
	}
	return nil
}

// thawTo says which file a kept disk becomes.
func thawTo(k store.KeptDisk, ref store.Ref, to string) (thawed, error) {
	t := thawed{Disk: k.Disk, Image: k.Image, Format: k.Format, Path: fmt.Sprintf("%s.%v", k.Image, ref)}
	if k.Wrong != "" {
		return t, fmt.Errorf("disk %s, which is kept with the checkpoint: %s", k.Image, k.Wrong)
	}
	if to == "" {
		return t, nil
	}
	dir, err := filepath.Abs(to)
	if err != nil {
		return t, err
	}
	t.Path = filepath.Join(dir, filepath.Base(k.Image))
	i, err := disk.OpenLayer(k.File, k.Format)
	if err != nil {
		return t, err
	}
	defer i.Close()
	// QEMU looks for it from where the new file is.
	if on := i.BackingName(); on != "" && !filepath.IsAbs(on) && !strings.Contains(on, ":") && dir != filepath.Dir(k.Image) {
		return t, fmt.Errorf("disk %s stands on %s, which it names from its own directory: leave --to out", k.Image, on)
	}
	return t, nil
}
