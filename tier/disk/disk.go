// Package disk finds guest pages in the images of the guest's disks, so that a page of
// the guest's page cache need not be stored: the disk has it (Park, Egger, Lee: Fast
// and Space-Efficient Virtual Machine Checkpointing, VEE 2011). They patch the
// hypervisor to learn which page is which block; here equal bytes are enough.
//
//	 writable top ─► overlay ─► base          Image: a chain of layers, one file each
//	                    │         │
//	                    ▼         ▼           Build: reads what lies in the layer's own
//	                  index     index         clusters, once
//	                    ▲         ▲
//	page ─► digest ─────┴─────────┴─► sector  Lookup
//
// A layer that nobody writes to keeps its index for ever, and all VMs that stand on it
// share it. Indexes are kept in a [Catalog], the store's folder disks; each is a cache,
// which can be lost and built again.
//
// # What is safe
//
// An index says what was on the disk when it was read. So it is used only while its
// [Identity] is that of the file, and never for a file that somebody can write to. Who
// refers to a block keeps its digest and checks what is read by it: a disk that has
// changed all the same costs a checkpoint, and never gives a wrong page.
//
// Headers and tables of images are the guest's or somebody's work and may say anything:
// what they say is capped before memory is taken for it.
package disk

import "fmt"

const (
	// SectorSize is the unit of offsets on a disk, in bytes.
	SectorSize = 512
	// BlockSize is the length of what an index knows, in bytes: a guest's page.
	BlockSize = 4096
)

// Format is a format of image files. Its names are QEMU's, and part of our formats.
type Format string

const (
	// Raw is the disk's bytes and nothing else.
	Raw Format = "raw"
	// Qcow2 is QEMU's, versions 2 and 3: docs/interop/qcow2.rst in its source.
	Qcow2 Format = "qcow2"
)

// ParseFormat takes a format's name; "" stands for that of what the file looks like.
func ParseFormat(s string) (Format, error) {
	switch f := Format(s); f {
	case "", Raw, Qcow2:
		return f, nil
	}
	return "", fmt.Errorf("disk images of format %.40q are not known here: %s and %s are", s, Raw, Qcow2)
}
