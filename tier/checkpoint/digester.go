package checkpoint

import (
	"fmt"

	"github.com/flic-migrate/flic-migrate/tier/digest"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/source"
)

// Digester tells by its digest what a checkpoint has, without reading it. It is safe for
// concurrent use.
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
	h, err := digest.New(d.Algorithm, d.Key)
	if err != nil {
		return nil, &image.UnsupportedError{File: c.Image.Name(), Why: err.Error()}
	}
	im := c.Image
	own, err := digest.Open(d.Root, digest.NewCache(chunks),
		func(frame int) ([]byte, error) { return im.Chunk(image.Digests, frame) },
		func(frame int, err error) error { return im.Corrupt(image.Digests, frame, err) })
	if err != nil {
		return nil, err
	}
	tables := []*digest.Table{own}
	for _, r := range c.refs {
		tables = append(tables, r.digests.Keep(own))
	}
	return &Digester{h, tables}, nil
}

// Sum is the digest of the page that is at a location.
func (d *Digester) Sum(at source.Location) (digest.Sum, error) {
	if int(at.Space) >= len(d.tables) {
		return digest.Sum{}, fmt.Errorf("reference %d does not exist", at.Space-1)
	}
	if t := d.tables[at.Space]; at.Tier == source.InNVRAM {
		return t.NVRAMSlot(at.Slot)
	} else {
		return t.FlashSlot(at.Slot)
	}
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
