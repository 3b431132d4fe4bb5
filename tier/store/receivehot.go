package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/nvram"
	"github.com/flic-migrate/flic-migrate/tier/source"
)

// Hot pages of a received checkpoint go to an NVRAM file of this store's if one is named:
//
//	tmp/UUID.new    the claim on the image (receiveclaim.go) says that extents of this owner
//	                are live, as the part of a save does
//	reserve         as many extents as there are, in the name of the checkpoint
//	write, sync     the hottest pages that have room; the others become moved pieces
//	NVRAM frames    of the image: the same slots in other extents, and so of the same length
//
// The image's commit makes them its own. Whatever ends the receiver before that leaves
// extents whose owner is not live, which gc finds.
//
// An owner that comes back is nothing that others of a store expect: who frees what a removed
// checkpoint had may be about to do so. So nothing is reserved for one that still has extents.

// ErrOtherOwner: an NVRAM file has pages of the same checkpoint already, which are another
// image's or another store's.
var ErrOtherOwner = errors.New("the NVRAM file has its pages already, for another copy of it")

// hotPart is what an image that is received takes of an NVRAM file.
type hotPart struct {
	file   *nvram.File
	region *nvram.Region // nil: it has no room
	slots  uint32        // the first so many are in it
	keep   bool          // the image may have got its name: it owns them
}

// mayOwn refuses an NVRAM file in which the checkpoint can't have pages, before anything of
// it is received. A file that is not there yet is as good.
func (r *receiving) mayOwn(ctx context.Context) error {
	want := &r.o.NVRAM
	if want.Path == "" {
		return nil
	}
	if err := CheckNVRAM(r.s.fs, r.s.root, want.Path); err != nil {
		return err
	}
	if !want.Volatile {
		if err := CheckLasting(r.s.fs, want.Path); err != nil {
			return err
		}
	}
	if err := r.s.CheckHome(ctx); err != nil {
		return err
	}
	f, err := nvram.Open(ctx, r.s.fs, want.Path, nvram.Options{ReadOnly: true})
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return nil // reserve says what it is, or makes an NVRAM file of it
	}
	defer f.Close()
	_, err = r.owns(ctx, f)
	return err
}

// owns tells whether extents of the file are the checkpoint's, of this store. If they are of
// another one it is an error.
func (r *receiving) owns(ctx context.Context, f *nvram.File) (bool, error) {
	owners, err := f.Owners(ctx, uuid.Nil)
	if err != nil {
		return false, err
	}
	for _, o := range owners {
		if o.UUID == r.head.UUID && o.Store != r.s.doc.UUID {
			return false, fmt.Errorf("checkpoint %v, %s: %w", r.got.Sent, f.Path(), ErrOtherOwner)
		}
		if o.UUID == r.head.UUID {
			return true, nil
		}
	}
	return false, nil
}

// isImage tells whether there is an image with a UUID, listed or not, or outside of the
// store.
func (s *Store) isImage(ctx context.Context, id uuid.UUID) (is bool, err error) {
	err = s.images(ctx, map[uuid.UUID]bool{id: true}, func(stored) (bool, error) {
		is = true
		return true, nil
	})
	if err != nil || is {
		return is, err
	}
	f, err := s.dir.Open(ctx, looseObject(id), Unlocked)
	if gone(err) {
		return false, nil
	}
	if err == nil {
		f.Close()
	}
	return true, err
}

// hot puts hot pages of the checkpoint's own image into the NVRAM file, unless it is found
// that they have to go to flash. page fills in the
// content of a slot, checked; has are those that are in pieces already.
func (r *receiving) hot(ctx context.Context, im *image.Image, i *received, part *checkpoint.NVRAMPart, has source.Ranges, page func(uint32, []byte) error) error {
	if r.o.NVRAM.Path == "" || len(i.Slots) == 0 || i.id.InNVRAM() {
		return nil
	}
	h := new(hotPart)
	i.hot = h
	want := r.o.NVRAM
	want.Bytes, want.PageSize = int64(len(part.Slots))*int64(i.PageSize), i.PageSize
	var err error
	if h.file, err = r.s.useNVRAM(ctx, want); err != nil {
		return err
	}
	some, err := r.owns(ctx, h.file)
	if err == nil && some {
		return r.stays(ctx, h, i.UUID)
	}
	if err != nil {
		return err
	}
	per := h.file.PerExtent(i.PageSize)
	if len(part.Extents) != (len(part.Slots)+per-1)/per {
		r.got.NoNVRAM = "the NVRAM file has extents of another length"
		return nil
	}
	if h.region, err = h.file.Reserve(ctx, i.UUID, r.s.doc.UUID, want.Bytes, i.PageSize); err != nil {
		return err
	}
	h.slots = uint32(min(h.region.Slots(), len(part.Slots)))
	if h.slots == 0 {
		r.got.NoNVRAM = "the NVRAM file has no room"
		return nil
	}
	b := make([]byte, i.PageSize)
	err = source.Below(h.slots).Minus(has).Each(func(slot uint32) error {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		err := page(slot, b)
		if err == nil {
			err = h.region.Write(int(slot), b)
		}
		return err
	})
	if err == nil {
		err = h.region.Sync()
	}
	if err != nil {
		return err
	}
	r.got.NVRAMBytes = int64(source.Below(h.slots).Minus(has).Count()) * int64(i.PageSize)
	// Slots for which there was no room are in pieces, and their extents are not looked at.
	extents := make([]uint32, len(part.Extents))
	copy(extents, h.region.Extents())
	if err = i.inExtents(im, part, extents); err == nil {
		nv := *i.id.NVRAM
		nv.Path, nv.UUID, nv.Volatile = h.file.Path(), h.file.UUID(), h.file.Volatile()
		i.id.NVRAM = &nv
	}
	return err
}

// stays leaves hot pages on flash, because the checkpoint has extents already: those of an
// image of its own under another name; or those that a receiver which was killed has left, or
// a removal is about to free, which nobody needs.
func (r *receiving) stays(ctx context.Context, h *hotPart, id uuid.UUID) error {
	is, err := r.s.isImage(ctx, id)
	if err != nil {
		return err
	}
	if is {
		r.got.NoNVRAM = "the NVRAM file has some of them already, of what is left of an earlier copy"
		return nil
	}
	r.got.NoNVRAM = "pages of it that a receiver had left in the NVRAM file were freed first"
	_, err = h.file.FreeOwner(ctx, id)
	return err
}

// close gives back what no image owns. nil was never taken.
func (h *hotPart) close(ctx context.Context) {
	if h == nil {
		return
	}
	if h.region != nil {
		if h.keep {
			h.region.Close()
		} else {
			h.region.Release(ctx) // if it fails, gc will
		}
	}
	if h.file != nil {
		h.file.Close()
	}
}
