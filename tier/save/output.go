package save

import (
	"context"
	"time"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/digest"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/nvram"
	"github.com/flic-migrate/flic-migrate/tier/store"
)

// output is the last stage: the image and the NVRAM part of one transaction.
type output struct {
	tx      *store.Tx // nil before it has begun
	created time.Time
	codec   image.Codec
	workers int
	segment int // pages; 0: as many as suit the codec

	// hash makes the digests of the image's pages; nil: it keeps none, and nobody can
	// refer to it.
	hash *digest.Hasher
	// onDisk are the digests of the disk slots.
	onDisk []digest.Sum
	// features are what the image may turn out to need.
	features image.Features

	img    *image.Writer // nil until open
	nvfile *nvram.File   // nil without NVRAM
	region *nvram.Region
}

// open begins the image, if it has not begun: the page size must be known by then.
func (o *output) open(pageSize int) error {
	if o.img != nil {
		return nil
	}
	segment := o.segment
	if segment == 0 {
		segment = max(2, o.codec.DefaultSegment()/pageSize)
	}
	var err error
	o.img, err = image.NewWriter(o.tx.Image(), image.Header{
		PageSize: pageSize, SegmentPages: segment, UUID: o.tx.UUID(), Created: o.created, Features: o.features,
	}, o.codec, o.workers)
	if err == nil && o.hash != nil {
		o.img.KeepDigests(o.hash)
	}
	return err
}

// chunk writes a frame that is no segment.
func (o *output) chunk(k image.Kind, b []byte) error {
	buf := o.img.NewBuffer(k)
	buf.Data = append(buf.Data, b...)
	return o.img.Submit(buf)
}

// chunks writes a document in as many frames as it takes.
func (o *output) chunks(k image.Kind, b []byte) error {
	for len(b) > 0 {
		n := min(len(b), image.MaxChunk)
		if err := o.chunk(k, b[:n]); err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

// reserve takes room in an NVRAM file.
func (o *output) reserve(ctx context.Context, r store.Reservation) (err error) {
	o.region, o.nvfile, err = o.tx.Reserve(ctx, r)
	return err
}

// len is how many bytes the image has so far.
func (o *output) len() int64 {
	if o.img == nil {
		return 0
	}
	return o.img.Len()
}

// sync makes all that was handed over so far durable.
func (o *output) sync() error {
	if err := o.syncNVRAM(); err != nil {
		return err
	}
	return o.img.Sync()
}

// start is sync for what is made durable later, with the image's end: that begins to be written
// out. NVRAM has no such end, and is durable.
func (o *output) start() error {
	if err := o.syncNVRAM(); err != nil {
		return err
	}
	return o.img.Start()
}

func (o *output) syncNVRAM() error {
	if o.region == nil {
		return nil
	}
	return o.region.Sync()
}

// digests writes what is left of the pages' digests, when all pages have been placed:
// nvram are those of the NVRAM part. It returns nil if there are none.
func (o *output) digests(nvram []digest.Sum) (*checkpoint.Digests, error) {
	if o.hash == nil {
		return nil, nil
	}
	return checkpoint.WriteDigests(o.img, o.hash, nvram, o.onDisk)
}

// finishNVRAM gives back the extents behind the slots that were used, and writes
// the chunks that describe the others. It returns nil if there are none.
func (o *output) finishNVRAM(ctx context.Context, slots []checkpoint.NVRAMSlot, pageSize int) (*checkpoint.NVRAM, error) {
	if o.region == nil {
		return nil, nil
	}
	if err := o.region.Trim(ctx, len(slots)); err != nil {
		return nil, err
	}
	if len(slots) == 0 {
		return nil, nil
	}
	part := checkpoint.NVRAMPart{Extents: o.region.Extents(), Slots: slots}
	if err := o.chunks(image.NVRAM, part.Append(nil)); err != nil {
		return nil, err
	}
	return &checkpoint.NVRAM{
		Path: o.nvfile.Path(), UUID: o.nvfile.UUID(), Slots: len(slots),
		Bytes: int64(len(slots)) * int64(pageSize), Volatile: o.nvfile.Volatile(),
	}, nil
}
