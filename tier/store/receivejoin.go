package store

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/moved"
	"github.com/flic-migrate/flic-migrate/tier/source"
)

// What has come of an image and what the store has of it become one:
//
//	own image    what an unlisted one under its name has in pieces and in NVRAM (resume),
//	             and the segments that were not sent (had)
//	a referred   all that the store has of it, as far as it is whole, takes the place of what
//	             has come (merge): a copy that takes the place of another never has less
//
// Both are compared first: another image with the same UUID is refused. Then the checkpoint
// is opened as it is to be, and all of it is read and checked (verify).

// finish makes a checkpoint of what has come.
func (r *receiving) finish(ctx context.Context) error {
	s := r.s
	if err := r.claim(ctx); err != nil {
		return err
	}
	// Others may have come to their end meanwhile.
	at, there, err := r.there(ctx)
	if err != nil {
		return err
	}
	if there {
		for _, i := range r.images {
			i.once = true
		}
		r.got.Already = true
		return r.mayBe(at)
	}
	for n, i := range r.images {
		if n > 0 && !i.drop {
			if err := r.holdListed(ctx, i); err != nil {
				return err
			}
			i.once = i.drop
		}
		if i.drop {
			continue
		}
		if err := r.prepare(ctx, n, i); err != nil {
			return err
		}
	}
	if err := r.verify(ctx); err != nil {
		return err
	}
	for _, i := range r.images {
		if i.drop {
			continue
		}
		if err := r.settle(ctx, i); err != nil {
			return err
		}
	}
	if len(r.images) > 1 || len(r.head.Has) > 0 {
		if err := s.noteSharing(ctx); err != nil {
			return err
		}
		// As with a save (Tx.Refer): what is referred to must not go with a power cut.
		if err := s.settle(ctx); err != nil {
			return err
		}
	}
	for range replacements {
		if err = r.commit(ctx); !errors.Is(err, errReplaced) {
			return err
		}
		// What has its place is perhaps less than what was verified.
		if err := r.holdAgain(ctx); err != nil {
			return err
		}
		if err := r.verify(ctx); err != nil {
			return err
		}
	}
	return err
}

// replacements is how often images that a checkpoint refers to can be replaced before it is given
// up.
const replacements = 5

// holdAgain holds what is there now.
func (r *receiving) holdAgain(ctx context.Context) error {
	ids := slices.Clone(r.head.Has)
	for _, i := range r.images {
		if i.drop {
			ids = append(ids, i.UUID)
		}
	}
	return r.hold(ctx, ids)
}

// hold holds the images that it refers to and are another's to keep.
func (r *receiving) hold(ctx context.Context, ids []uuid.UUID) error {
	held, err := r.s.hold(ctx, ids)
	if errors.Is(err, ErrNotFound) {
		err = r.lacks("%w", err)
	}
	for _, h := range held {
		r.holds = append(r.holds, h)
	}
	r.lasts = held
	return err
}

// prepare finds out what an image says it is, gives it the IDENTITY that it is to have, and
// makes pieces of its hot pages.
func (r *receiving) prepare(ctx context.Context, n int, i *received) error {
	src := limited{i.f, i.Length}
	im, err := image.Open(src)
	if err != nil {
		return err
	}
	if i.id, err = checkpoint.ReadIdentity(src); err != nil {
		return err
	}
	if i.id.UUID != i.UUID || im.UUID != i.UUID || i.id.PageSize != i.PageSize || im.PageSize != i.PageSize {
		return im.Tail.Corrupt(image.Identity, fmt.Errorf("it is not image %v of pages of %d bytes", i.UUID, i.PageSize))
	}
	if n == 0 {
		if err := r.asSaid(i.id); err != nil {
			return err
		}
	}
	i.id.Kept = nil // they are the other store's, and stay there
	var part *checkpoint.NVRAMPart
	if i.id.NVRAM != nil {
		if part, err = checkpoint.ReadPart(im, i.id); err != nil {
			return err
		}
		// The file is the other store's.
		nv := *i.id.NVRAM
		nv.Path, nv.UUID, nv.Volatile = "", uuid.Nil, false
		i.id.NVRAM = &nv
	}
	i.end.Object = i.f
	if i.HasDisk() && i.id.Disks == 0 {
		return r.rd.Damaged("pages of disks, and the image has none there")
	}
	if i.id.Disks > 0 {
		// Of one that others need no page of a disk is, and its pieces may have some.
		slots, err := checkpoint.DiskSlotsOf(src)
		if err == nil && n == 0 {
			err = r.disks(ctx, i, src, slots)
		}
		if err != nil {
			return err
		}
		i.id.DiskSlots = int(slots)
		if i.sums, err = checkpoint.OpenDiskSums(src); err != nil {
			return err
		}
	}
	if n == 0 {
		// Without a number it gets one when nobody can take it any more.
		i.id.VM, i.id.Number = r.ref.VM, r.ref.N
		// It was removed here, and others need some of it: what is in NVRAM stays its own.
		if err := r.resume(ctx, im, i, part); err != nil {
			return err
		}
		if err := r.had(ctx, im, i, part); err != nil {
			return err
		}
	} else {
		i.id.VM, i.id.Number = i.VM, i.Number
		if err := r.merge(ctx, im, i, part); err != nil {
			return err
		}
	}
	// Pages have their places before IDENTITY says which these are.
	if err := r.pieces(ctx, im, i, part); err != nil {
		return err
	}
	return i.rename(im.Tail)
}

// asSaid refuses a checkpoint of which BEGIN has said something else than its image. By what was
// said it is looked for here, and what it refers to is held until it has its name: of what was
// not, and is there by chance, anything could go before.
func (r *receiving) asSaid(id *checkpoint.Identity) error {
	if id.Origin != r.head.Origin {
		return r.rd.Damaged("checkpoint %v is one of %v, and was said to be one of %v", r.got.Sent, id.Origin, r.head.Origin)
	}
	for _, to := range id.References {
		if !slices.Contains(r.head.Has, to) && !slices.ContainsFunc(r.images, func(i *received) bool { return i.UUID == to }) {
			return r.rd.Damaged("checkpoint %v refers to image %v, which was neither sent nor said to be there", r.got.Sent, to)
		}
	}
	return nil
}

// resume takes over what is left of the checkpoint's own image under the number that it is to
// have, and holds it.
func (r *receiving) resume(ctx context.Context, im *image.Image, i *received, part *checkpoint.NVRAMPart) error {
	if r.ref.N == 0 {
		return nil
	}
	for _, name := range []string{r.ref.object(removedSuffix), r.ref.keptObject(i.UUID)} {
		have, err := r.s.openWith(ctx, name, i.UUID)
		if integrity.IsCorrupt(err) {
			continue // a power cut has left a part of one that was emptied
		}
		if err != nil {
			return err
		}
		if have == nil {
			continue
		}
		old, was, err := r.part(im, i, part, have)
		if err == nil {
			err = i.keepNVRAM(im, part, old, was)
		}
		if err != nil {
			return err
		}
		return r.openPieces(ctx, i, r.ref)
	}
	return r.s.dropOrphans(ctx, r.ref, i.UUID)
}

// openPieces finds the pieces that the store has of an image, which is held.
func (r *receiving) openPieces(ctx context.Context, i *received, at Ref) (err error) {
	i.files, err = r.s.openMoved(ctx, at, i.UUID)
	i.first = len(i.files)
	return err
}

// dropOrphans removes the moved pieces of an image that is not there: a receiver that was
// killed may have left them. The caller has the image's claim.
func (s *Store) dropOrphans(ctx context.Context, r Ref, id uuid.UUID) error {
	unlock, err := s.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	return s.dropOrphansLocked(ctx, r, id)
}

// dropOrphansLocked is dropOrphans for who holds the store lock.
func (s *Store) dropOrphansLocked(ctx context.Context, r Ref, id uuid.UUID) error {
	o, err := s.objects(ctx, r.VM)
	if err != nil || len(o.pieces(r.N, id)) == 0 {
		return err
	}
	for _, st := range o.all(r.VM) {
		if st.ref != r {
			continue
		}
		f, err := s.dir.Open(ctx, st.name, Unlocked)
		if err != nil {
			return err
		}
		size, err := f.Size()
		if err == nil && size > 0 {
			var h image.Header
			if h, err = image.ReadHeader(f); err == nil && h.UUID == id {
				err = errOutdated
			}
		}
		f.Close()
		if err != nil {
			return fmt.Errorf("whose the moved pieces of %v are: %w", r, err)
		}
	}
	if err := s.settle(ctx); err != nil {
		return err
	}
	_, err = s.dropMoved(ctx, r, id, o)
	return err
}

// merge adds what this store has of an image already to what has come of it.
func (r *receiving) merge(ctx context.Context, im *image.Image, i *received, part *checkpoint.NVRAMPart) error {
	have, at, err := r.s.openReferred(ctx, Ref{i.VM, i.Number}, i.UUID)
	if integrity.IsCorrupt(err) && errors.Is(err, ErrNotFound) {
		return r.s.dropOrphans(ctx, Ref{i.VM, i.Number}, i.UUID)
	}
	if err != nil {
		return err
	}
	old, was, err := r.part(im, i, part, have)
	if err != nil {
		return err
	}
	i.id.VM, i.id.Number = at.VM, at.N
	if err := i.keepNVRAM(im, part, old, was); err != nil {
		return err
	}
	i.id.Kept = was.Kept
	// All of it, also what has come: who refers to the image now, or is about to, needs what
	// is here, and nobody has compared what has come with anything yet.
	if _, err := i.fill(ctx, old, source.Below(uint32(old.Segments()))); err != nil {
		return err
	}
	return r.openPieces(ctx, i, at)
}

// part opens what this store has of an image that is received, and refuses another image with
// its UUID. have is closed when all is done: it must not go before the other is in its place.
func (r *receiving) part(im *image.Image, i *received, part *checkpoint.NVRAMPart, have Object) (old *image.Image, was *checkpoint.Identity, err error) {
	r.holds = append(r.holds, have)
	if old, err = image.Open(have); err != nil {
		return nil, nil, err
	}
	if was, err = checkpoint.ReadIdentity(have); err != nil {
		return nil, nil, err
	}
	same, err := im.Alike(old)
	if err == nil && same && part != nil && was.NVRAM != nil {
		var here *checkpoint.NVRAMPart
		if here, err = checkpoint.ReadPart(old, was); err == nil {
			same = slices.Equal(here.Slots, part.Slots)
		}
	}
	if err == nil && !same {
		err = im.Tail.Corrupt(image.Identity, errors.New("this store has another image with its UUID"))
	}
	return old, was, err
}

// fill copies segments from what this store has of the image, those that are whole there, and
// tells how many these are.
func (i *received) fill(ctx context.Context, old *image.Image, segments source.Ranges) (there uint64, err error) {
	err = old.Remains(ctx, func(k image.Kind, n uint32) bool {
		return k.IsSegment() && segments.Has(uint64(n), uint64(n))
	}, func(_ image.Kind, _ uint32, off int64, b []byte) error {
		there++
		_, err := i.f.WriteAt(b, off)
		return err
	})
	return there, err
}

// had adds to the checkpoint's own image what was not sent of it.
func (r *receiving) had(ctx context.Context, im *image.Image, i *received, part *checkpoint.NVRAMPart) error {
	if len(i.Had) == 0 {
		return nil
	}
	have, _, err := r.s.openReferred(ctx, Ref{i.VM, i.Number}, i.UUID)
	if integrity.IsCorrupt(err) && errors.Is(err, ErrNotFound) {
		return r.lacks("a part of image %v", i.UUID)
	}
	if err != nil {
		return err
	}
	old, _, err := r.part(im, i, part, have)
	if err != nil {
		return err
	}
	there, err := i.fill(ctx, old, i.Had)
	if err != nil {
		return err
	}
	if lacks := i.Had.Count() - there; lacks > 0 {
		return r.lacks("%d segments of image %v", lacks, i.UUID)
	}
	return nil
}

// verify reads and checks all of the checkpoint, as it is to be.
func (r *receiving) verify(ctx context.Context) error {
	own := r.images[0]
	o := checkpoint.Options{Name: r.ref.String(), Moved: own.sources(), Lent: own.lent}
	o.Lenders = func(ctx context.Context, ref *checkpoint.Reference) ([]moved.Source, error) {
		for _, i := range r.images[1:] {
			if i.UUID == ref.UUID && !i.drop {
				return i.sources(), nil
			}
		}
		return r.s.lenders(ctx, ref)
	}
	o.Images = func(ctx context.Context, ref *checkpoint.Reference) (checkpoint.Source, []moved.Source, error) {
		for _, i := range r.images[1:] {
			if i.UUID == ref.UUID && !i.drop {
				return &i.end, i.sources(), nil
			}
		}
		f, at, err := r.s.openReferred(ctx, Ref{ref.VM, ref.Number}, ref.UUID)
		if err != nil || len(ref.NeedSlots) == 0 {
			return f, nil, err
		}
		pieces, err := r.s.openMoved(ctx, at, ref.UUID)
		return f, sources(pieces), err
	}
	c, err := checkpoint.Open(ctx, r.s.fs, &own.end, o)
	if err != nil {
		return err
	}
	defer c.Close()
	var first error
	err = c.Verify(ctx, func(err error) {
		if first == nil {
			first = err
		}
	})
	return errors.Join(err, first)
}

// keptOpen is a piece that its reader does not close.
type keptOpen struct{ Object }

func (keptOpen) Close() error { return nil }

func (i *received) sources() (list []moved.Source) {
	for _, f := range i.files {
		list = append(list, keptOpen{f})
	}
	return list
}
