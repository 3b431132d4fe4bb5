package checkpoint

import (
	"errors"
	"fmt"

	"github.com/flic-migrate/flic-migrate/tier/digest"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/source"
)

// Hasher makes digests that compare with these.
func (d *Digests) Hasher() (*digest.Hasher, error) { return digest.New(d.Algorithm, d.Key) }

// WriteDigests writes what is left of an image's DIGESTS, which h has made, when all
// segments have been submitted; nvram are those of the NVRAM part's slots, disk those of
// the disk slots. It returns nil for an image that has too many pages to keep any; one with
// pages on disks needs them.
func WriteDigests(w *image.Writer, h *digest.Hasher, nvram, disk []digest.Sum) (*Digests, error) {
	root, err := w.Digests(nvram, disk)
	if errors.Is(err, digest.ErrTooMany) && len(disk) == 0 {
		return nil, nil
	}
	return &Digests{Algorithm: h.Algorithm(), Key: h.Key(), Root: root}, err
}

// Digester tells by its digest what a checkpoint has, without reading it. It is safe for
// concurrent use, but for one that One has made.
type Digester struct {
	Hasher *digest.Hasher
	tables []*digest.Table // by space
}

// Digester returns the checkpoint's, which keeps at most so many chunks of digests in
// memory, or nil if the checkpoint has none.
func (c *Checkpoint) Digester(chunks int) (*Digester, error) {
	d := c.Meta.Digests
	if d == nil {
		return nil, nil
	}
	h, err := d.Hasher()
	if err != nil {
		return nil, &image.UnsupportedError{File: c.Image.Name(), Why: err.Error()}
	}
	own, err := openDigests(c.Image, d.Root, digest.NewCache(chunks))
	if err != nil {
		return nil, err
	}
	tables := []*digest.Table{own}
	for _, r := range c.refs {
		tables = append(tables, r.digests.Keep(own))
	}
	return &Digester{h, tables}, nil
}

// One is the same for one goroutine: see digest.Table.One.
func (d *Digester) One() *Digester {
	n, near := &Digester{Hasher: d.Hasher}, new(digest.Near)
	for _, t := range d.tables {
		n.tables = append(n.tables, t.One(near))
	}
	return n
}

// Sum is the digest of the page that is at a location.
func (d *Digester) Sum(at source.Location) (digest.Sum, error) {
	if int(at.Space) >= len(d.tables) {
		return digest.Sum{}, fmt.Errorf("reference %d does not exist", at.Space-1)
	}
	t := d.tables[at.Space]
	switch at.Tier {
	case source.InNVRAM:
		return t.NVRAMSlot(at.Slot)
	case source.OnDisk:
		return t.DiskSlot(at.Slot)
	}
	return t.FlashSlot(at.Slot)
}

// References are the checkpoints that this one refers to, in the order in which its
// entries count them.
func (c *Checkpoint) References() References {
	refs := make(References, len(c.refs))
	for i, r := range c.refs {
		refs[i] = *r.Reference
	}
	return refs
}
