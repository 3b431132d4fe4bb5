// Package disks asks a QEMU for the disks of its VM: which files they are, and what
// these stand on. It takes snapshots of them, and tells whether the disks of one QEMU
// are what those of another were.
package disks

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/tier/disk"
)

// Disk is a disk of a VM, as its QEMU has it.
type Disk struct {
	// Name is what tells the disk from the VM's others, in each QEMU that is started
	// with the same machine: the path of its device in QEMU's object tree.
	Name string `json:"name"`
	// Device and Node name it in commands to QEMU: the device may have no name, then it
	// is empty, and the node always has one.
	Device   string  `json:"device,omitempty"`
	Node     string  `json:"node"`
	ReadOnly bool    `json:"read_only,omitempty"`
	Layers   []Layer `json:"layers"` // what the guest writes to first, then what that stands on
}

// Layer is a file of a disk.
type Layer struct {
	Path   string `json:"path"`   // as QEMU has it; empty if it is no file
	Format string `json:"format"` // QEMU's name of it
}

const (
	// maxDisks is how many a checkpoint can record. Of more than that some would be
	// compared with nothing, and frozen with no snapshot.
	maxDisks = 256
	// maxLayers is how many files of one disk are looked at, and recorded. Nobody writes
	// to those that lie deeper.
	maxLayers = 64
)

// ErrTooMany: a VM has more disks than a checkpoint can record.
var ErrTooMany = fmt.Errorf("there are more than %d", maxDisks)

// QEMU makes the flash of firmware itself, so that no name that a user chooses is in its
// place in the object tree: most machines have it as their child (/machine/system.flash0,
// /machine/virt.flash1), some boards as /machine/unattached/device[N], where the drive's
// name tells (-drive if=pflash). A user's devices are in /machine/peripheral and
// /machine/peripheral-anon, or have their id for a path.
var (
	flashPath  = regexp.MustCompile(`^/machine/[^/]+\.flash[0-9]+$`)
	flashDrive = regexp.MustCompile(`^pflash[0-9]+$`)
)

// firmware tells whether a drive is firmware in flash. qdev is empty for a drive of a
// machine that does not say where it is.
func firmware(drive, qdev string) bool {
	return flashPath.MatchString(qdev) ||
		flashDrive.MatchString(drive) && (qdev == "" || strings.HasPrefix(qdev, "/machine/unattached/"))
}

// image is QEMU's ImageInfo, as far as it is of use.
type image struct {
	Filename string `json:"filename"`
	Format   string `json:"format"`
	Backing  *image `json:"backing-image"`
}

// Find returns the disks that the guest has, all of them (ErrTooMany), in QEMU's order.
// Firmware in flash and empty drives are none.
func Find(ctx context.Context, x qmp.Executor) ([]Disk, error) {
	var list []struct {
		Device   string `json:"device"`
		QDev     string `json:"qdev"`
		Inserted *struct {
			Node  string `json:"node-name"`
			RO    bool   `json:"ro"`
			Image image  `json:"image"`
		} `json:"inserted"`
	}
	if err := x.Execute(ctx, "query-block", nil, &list); err != nil {
		return nil, fmt.Errorf("the VM's disks: %w", err)
	}
	var disks []Disk
	for _, b := range list {
		name := b.QDev
		if name == "" {
			name = b.Device
		}
		if b.Inserted == nil || name == "" || firmware(b.Device, b.QDev) {
			continue
		}
		if len(disks) == maxDisks {
			return nil, fmt.Errorf("the VM's disks: %w", ErrTooMany)
		}
		d := Disk{Name: name, Device: b.Device, Node: b.Inserted.Node, ReadOnly: b.Inserted.RO}
		for i := &b.Inserted.Image; i != nil && len(d.Layers) < maxLayers; i = i.Backing {
			d.Layers = append(d.Layers, Layer{path(i.Filename), i.Format})
		}
		disks = append(disks, d)
	}
	return disks, nil
}

// path is the file that QEMU calls so: "" if it is none, or named from QEMU's own
// directory.
func path(name string) string {
	if body, ok := strings.CutPrefix(name, "json:"); ok {
		// {"driver":"qcow2","file":{"driver":"file","filename":"/x"},…}, or the inner one.
		var at struct {
			Driver   string `json:"driver"`
			Filename string `json:"filename"`
			File     struct {
				Driver   string `json:"driver"`
				Filename string `json:"filename"`
			} `json:"file"`
		}
		if json.Unmarshal([]byte(body), &at) != nil {
			return ""
		}
		switch {
		case at.File.Driver == "file":
			name = at.File.Filename
		case at.Driver == "file":
			name = at.Filename
		default:
			return ""
		}
	}
	name = strings.TrimPrefix(name, "file:")
	if !filepath.IsAbs(name) {
		return ""
	}
	return name
}

// ReadOnly returns the layers of disks that the guest can't write to, each disk's from
// the uppermost on: what a save can look for pages in. A layer that is not a file here,
// or of no format that is known, hides those below it.
func ReadOnly(list []Disk) (tops []Layer) {
	for _, d := range list {
		layers := d.Layers
		if !d.ReadOnly && len(layers) > 0 {
			layers = layers[1:]
		}
		if len(layers) == 0 || layers[0].Path == "" {
			continue
		}
		if f, err := disk.ParseFormat(layers[0].Format); err == nil && f != "" {
			tops = append(tops, layers[0])
		}
	}
	return tops
}
