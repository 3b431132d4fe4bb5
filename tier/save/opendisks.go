package save

import (
	"context"
	"fmt"
	"slices"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/disk"
)

// DiskFile names a disk image of the guest's, the top of what stands on one another.
type DiskFile struct {
	Path   string      `json:"path"`
	Format disk.Format `json:"format,omitempty"` // "": what the file looks like
	// Kept, unless it is zero, is what the store calls the file, which it keeps with the
	// checkpoint, and Of the path of the image that it is a copy of.
	Kept uuid.UUID `json:"kept,omitzero"`
	Of   string    `json:"of,omitempty"`
}

// OpenedDisks are the layers of some disk images that a save can look in.
type OpenedDisks struct {
	Disks  []Disk                  // for Options.Disks
	Unused []checkpoint.DiskUnused // for Options.UnusedDisks

	images  []*disk.Image
	indexes []*disk.Index
}

// OpenDisks opens disk images and all that they stand on, and the indexes of those layers
// that nobody can write to now. A disk costs no save: what can't be used is left out, and
// Unused says why. Close them when the save has ended.
func OpenDisks(ctx context.Context, catalog *disk.Catalog, files []DiskFile) *OpenedDisks {
	o := new(OpenedDisks)
	seen := make(map[string]bool)
	for _, f := range files {
		if f.Kept != uuid.Nil {
			o.addKept(ctx, catalog, f)
			continue
		}
		top, err := disk.Open(ctx, f.Path, f.Format)
		if err != nil {
			o.unused(f.Path, err)
			continue
		}
		o.images = append(o.images, top)
		for layer := top; layer != nil; layer = layer.Backing() {
			if seen[layer.Path()] {
				continue
			}
			seen[layer.Path()] = true
			if err := o.add(ctx, catalog, layer); err != nil {
				o.unused(layer.Path(), err)
			}
		}
	}
	return o
}

// addKept opens a copy that the store keeps, and its index. What the image stands on is not
// looked for: from where the copy is it may have no name.
func (o *OpenedDisks) addKept(ctx context.Context, catalog *disk.Catalog, f DiskFile) {
	i, err := disk.OpenLayer(f.Path, f.Format)
	if err == nil {
		o.images = append(o.images, i)
		err = o.add(ctx, catalog, i)
	}
	if err != nil {
		o.unused(f.Of, err)
		return
	}
	d := &o.Disks[len(o.Disks)-1]
	d.Kept, d.Path = f.Kept, f.Of
}

func (o *OpenedDisks) unused(path string, why error) {
	o.Unused = append(o.Unused, checkpoint.DiskUnused{Path: path, Why: why.Error()})
}

// add opens the index of a layer.
func (o *OpenedDisks) add(ctx context.Context, catalog *disk.Catalog, layer *disk.Image) error {
	writer, err := layer.Writer()
	switch {
	case err != nil:
		return err
	case writer:
		return disk.ErrWriter
	case len(o.Disks) == checkpoint.MaxDisks:
		return errManyDisks
	}
	x, err := catalog.Open(ctx, layer)
	if err != nil {
		return err
	}
	o.indexes = append(o.indexes, x)
	o.Disks = append(o.Disks, Disk{Disk: checkpoint.Disk{Identity: layer.Identity(), Content: x.ContentID()}, File: layer, Index: x,
		Touched: x.Identity().Touched(layer.Identity())})
	return nil
}

// Changed says which of the layers that a save looks in is not what it was when they were
// opened, and in what; "" if none is. A save of them would fail.
func (o *OpenedDisks) Changed() string {
	for i := range o.Disks {
		d := &o.Disks[i]
		now, err := d.File.Now()
		if err != nil {
			return err.Error()
		}
		if what := d.Differs(now); what != "" {
			return fmt.Sprintf("disk image %s %s", d.Path, what)
		}
	}
	return ""
}

// Close gives all of them up.
func (o *OpenedDisks) Close() {
	for _, x := range o.indexes {
		x.Close()
	}
	for _, i := range slices.Backward(o.images) {
		i.Close()
	}
}
