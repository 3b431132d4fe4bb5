package store

import (
	"context"
	"errors"
	"fmt"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/moved"
	"github.com/flic-migrate/flic-migrate/tier/source"
)

// Pages that were in NVRAM, or on disks, are raw at the end of what is staged, in the order of
// their slots, and become moved pieces:
//
//	.staged │ image │ pages of NVRAM slots │ pages of disk slots │
//	                        │                      │      ┌── pages of a checkpoint that is here
//	                        ▼                      ▼      ▼
//	                  tmp/….new: at most 64 MiB of pages each
//
// Where the store has pieces of the image, pages that were freed in them are put back, and no
// others written: others may be reading the piece.

// disks finds out where the pages of an image's n disk slots are, now that it needs no disk.
func (r *receiving) disks(ctx context.Context, i *received, src image.Source, n uint64) error {
	if !i.HasDisk() {
		return fmt.Errorf("checkpoint %v: %w", r.got.Sent, ErrOnDisks)
	}
	if len(i.Disk) > 0 && i.Disk[len(i.Disk)-1].End() > n {
		return r.rd.Damaged("pages of disk slots up to %d of %d", i.Disk[len(i.Disk)-1].End(), n)
	}
	if i.DiskFrom == uuid.Nil {
		if i.Disk.Count() != n {
			return r.rd.Damaged("pages of %d disk slots of %d", i.Disk.Count(), n)
		}
		return nil
	}
	at, there := r.all.image[i.DiskFrom]
	if !there {
		return r.lacks("pages of disks of checkpoint %v", i.DiskFrom)
	}
	c, err := r.s.OpenCheckpoint(ctx, at, checkpoint.Options{Disks: checkpoint.DiskOptions{Missing: true, Check: checkpoint.CheckRead}})
	if err != nil {
		return err
	}
	i.from, i.fromPages = c, c.DiskPages()
	if c.Meta.UUID != i.DiskFrom {
		return fmt.Errorf("checkpoint %v: %w", at, ErrChanged)
	}
	f, _, err := r.s.openReferred(ctx, at, i.DiskFrom)
	if err != nil {
		return err
	}
	r.holds = append(r.holds, f)
	i.twins, err = checkpoint.OpenDiskTwins(src, f)
	if err == nil && i.twins == nil {
		err = r.lacks("%v has nothing on the same disks", at)
	}
	return err
}

// diskPage copies the page of a disk slot that has not come. That it is the right one verify finds
// out.
func (i *received) diskPage(slot uint32, b []byte) error {
	twin, ok, err := i.twins.Find(uint64(slot))
	if err != nil {
		return err
	}
	if !ok {
		return fmt.Errorf("disk slot %d: %w", slot, ErrLacks)
	}
	page, err := i.fromPages.Page(twin)
	copy(b, page)
	return err
}

// pieces makes moved pieces of the pages that have come. Where the store has pieces of the
// image, those of their pages that nobody needed may have been freed: they are put back.
func (r *receiving) pieces(ctx context.Context, im *image.Image, i *received, part *checkpoint.NVRAMPart) error {
	if len(i.Slots) > 0 && (part == nil || i.Slots[len(i.Slots)-1].End() > uint64(len(part.Slots))) {
		return im.Corrupt(image.NVRAM, 0, errors.New("hot pages have come that it does not have"))
	}
	first := uint32(i.id.FirstDiskSlot())
	hotAt, diskAt, firstDisk := i.Slots.Ordinals(), i.Disk.Ordinals(), i.FirstDisk()
	page := func(slot uint32, b []byte) error {
		if slot >= first {
			at, ok := diskAt(slot - first)
			if !ok {
				return i.diskPage(slot-first, b)
			}
			_, err := i.f.ReadAt(b, firstDisk+int64(at)*int64(i.PageSize))
			return err
		}
		at, _ := hotAt(slot)
		if _, err := i.f.ReadAt(b, i.Base()+int64(at)*int64(i.PageSize)); err != nil {
			return err
		}
		if integrity.Checksum(b) != part.Slots[slot].CRC {
			return im.Corrupt(image.NVRAM, 0, fmt.Errorf("page of slot %d: %w", slot, integrity.ErrChecksum))
		}
		return nil
	}
	want := i.Slots
	if i.HasDisk() {
		want = want.Union(source.Ranges{{First: first, Count: uint32(i.id.DiskSlots)}})
	}
	all := want
	for k, f := range i.files {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		p, err := moved.Read(f)
		if err == nil && (p.UUID != i.UUID || p.PageSize != i.PageSize) {
			err = &integrity.CorruptError{File: f.Name(), What: "header", Err: errors.New("it is another image's")}
		}
		if err == nil {
			err = r.refill(ctx, i, movedName{i.id.Number, i.UUID, k + 1}.object(i.id.VM), p, all, part, page)
		}
		if err != nil {
			return err
		}
		want = want.Minus(p.Slots)
	}
	if i == r.images[0] {
		if err := r.hot(ctx, im, i, part, all.Minus(want), page); err != nil {
			return err
		}
		if i.hot != nil {
			want = want.Minus(source.Below(i.hot.slots))
		}
		var err error
		if want, err = r.borrow(ctx, i, want); err != nil {
			return err
		}
	}
	per := uint64(max(1, moved.MaxBytes/i.PageSize))
	for len(want) > 0 {
		var now source.Ranges
		now, want = want.Cut(per)
		if i.first+len(i.pieces) == maxPieces {
			return fmt.Errorf("hot pages of image %v come to more than %d pieces", i.UUID, maxPieces)
		}
		name := spare()
		dst, err := r.s.createTmp(ctx, name)
		if err != nil {
			return err
		}
		i.pieces, i.files = append(i.pieces, name), append(i.files, dst)
		if err := moved.Write(ctx, dst, &moved.Piece{UUID: i.UUID, PageSize: i.PageSize, Slots: now}, page); err != nil {
			return err
		}
	}
	return nil
}

// refill puts pages back into a piece that is there, of an image that is held: where the piece
// has not the page that it had once, because nobody needed it, and only that page.
func (r *receiving) refill(ctx context.Context, i *received, name string, p *moved.Piece, slots source.Ranges, part *checkpoint.NVRAMPart, page func(uint32, []byte) error) error {
	f, err := r.s.dir.Reopen(ctx, name)
	if err != nil {
		return err
	}
	defer f.Close()
	first := uint32(i.id.FirstDiskSlot())
	is := func(slot uint32, b []byte) (bool, error) {
		if slot < first {
			return integrity.Checksum(b) == part.Slots[slot].CRC, nil
		}
		return i.sums.Is(uint64(slot-first), b)
	}
	b := make([]byte, p.PageSize)
	changed := false
	err = p.Slots.EachUntil(ctx, func(slot uint32) error {
		if !slots.Has(uint64(slot), uint64(slot)) {
			return nil
		}
		_, err := f.ReadAt(b, p.Offset(slot))
		if err != nil {
			return err
		}
		if there, err := is(slot, b); err != nil || there {
			return err
		}
		if err := page(slot, b); err != nil {
			return err
		}
		right, err := is(slot, b)
		if err == nil && !right {
			err = &integrity.CorruptError{File: i.f.Name(), Offset: i.Base(), What: fmt.Sprintf("page of slot %d", slot), Err: integrity.ErrChecksum}
		}
		if err != nil {
			return err
		}
		changed = true
		_, err = f.WriteAt(b, p.Offset(slot))
		return err
	})
	if err == nil && changed {
		err = f.Sync()
	}
	return err
}
