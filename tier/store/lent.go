package store

import (
	"context"
	"errors"
	"slices"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/moved"
	"github.com/flic-migrate/flic-migrate/tier/source"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// Checkpoints of a VM that are received one after the other have most of their pages of disks in
// common. The first has them in pieces, and lends them to the later ones:
//
//	1  00000001.flic   00000001.UUID.1.moved  ■ ■ ■ ■ ■ ■        raw pages
//	                                          ▲ ▲   ▲ ▲
//	2  00000002.flic   00000002.lent ─────────┘ │   │ │
//	                   00000002.UUID.1.moved  ■ │   │ │          what is new in 2
//	                                          ▲ │   │ │
//	3  00000003.flic   00000003.lent ─────────┴─┴───┴─┘          of both
//
//   - Who lends has the page itself, and is an image that the borrower refers to anyway: it is
//     there, unlisted or not, locked by who has the borrower open, and whoever frees a part of
//     it asks the borrower's REFERENCES, and its .lent beside them (survey).
//   - What a borrower is lent it lends to nobody: who would borrow it does so where it is.
//     So an image that comes back, and of which others need slots, has these itself.
//   - .lent lies beside the image of a checkpoint that is listed, from before it is there
//     until it is not listed any more. One that is not lends what it has, and needs nothing
//     that it was lent.
//   - A page is compared with the borrower's digest of it before it is used, wherever it is.

// lent reads what others lend to checkpoint r, whose image has that UUID; nil: nothing. What
// lies there can be of another image that had the number, as before flatten.
func (s *Store) lent(ctx context.Context, r Ref, id uuid.UUID) (*moved.Lent, error) {
	name := r.object(lentSuffix)
	b, err := s.dir.Read(ctx, name, moved.MaxLent)
	switch {
	case gone(err):
		return nil, nil
	case errors.Is(err, vfs.ErrTooLarge) || errors.Is(err, vfs.ErrNotRegular) || errors.Is(err, vfs.ErrLink):
		return nil, &integrity.CorruptError{File: s.dir.Path(name), What: "lent pages", Err: err}
	case err != nil:
		return nil, err
	}
	l, err := moved.ParseLent(s.dir.Path(name), b)
	if err != nil || l.UUID != id {
		return nil, err
	}
	return l, nil
}

// lenders opens the pieces of an image that lends, which the caller has locked.
func (s *Store) lenders(ctx context.Context, r *checkpoint.Reference) ([]moved.Source, error) {
	f, at, err := s.openReferred(ctx, Ref{r.VM, r.Number}, r.UUID)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	pieces, err := s.openMoved(ctx, at, r.UUID)
	return sources(pieces), err
}

// borrow finds those of the pages of disks of the checkpoint's own image which pieces of images
// have that it refers to, and that nobody is lent by it. rest is what of want is not lent.
func (r *receiving) borrow(ctx context.Context, i *received, want source.Ranges) (rest source.Ranges, err error) {
	if i.twins == nil {
		return want, nil
	}
	// Others can be lent pages by what is left of it here. Those who begin to be are so
	// by way of one who is already: nobody else can put the image together now.
	v := r.s.lookup().survey(i.UUID)
	if err := v.update(ctx); err != nil {
		return nil, err
	}
	unlock, err := r.s.lock(ctx)
	if err != nil {
		return nil, err
	}
	err = v.update(ctx)
	unlock()
	if err != nil || v.unclear != nil {
		return want, err
	}
	first := uint32(i.id.FirstDiskSlot())
	lent := &moved.Lent{UUID: i.UUID}
	own := source.Below(first).Union(v.of[i.UUID].slots)
	err = want.Minus(own).EachUntil(ctx, func(slot uint32) error {
		if at := uint64(slot - first); i.Disk.Has(at, at) {
			return nil // it has come
		}
		twin, ok, err := i.twins.Find(uint64(slot - first))
		if err != nil || !ok {
			return err
		}
		by, there, ok := i.from.DiskPiece(twin)
		if ok && slices.Contains(i.id.References, by) {
			lent.Add(slot, by, uint32(there))
		}
		return nil
	})
	if err == nil && len(lent.Runs) > 0 {
		i.lent = lent
	}
	return want.Minus(lent.Slots()), err
}

// lend writes beside the checkpoint what others lend to it. The caller holds the store lock.
func (r *receiving) lend(ctx context.Context) error {
	l := r.images[0].lent
	if l == nil {
		return nil
	}
	return r.s.dir.Write(ctx, r.ref.object(lentSuffix), spare(), l.Append(nil))
}

// staleLent removes what was lent to an image that another has taken the place of, as flatten
// does, once nobody has that open. The caller holds the store lock. What is damaged is verify's.
func (g *gc) staleLent(ctx context.Context, r Ref) error {
	name := r.object(lentSuffix)
	id, err := g.owner(ctx, r.object(imageSuffix))
	if err != nil {
		return nil // vms says what it is
	}
	f, err := g.dir.Open(ctx, name, Unlocked)
	if err != nil {
		return nil
	}
	current := moved.IsLentTo(f, id)
	f.Close()
	if current {
		return nil // as a rule, and the rest of it need not be read
	}
	b, err := g.dir.Read(ctx, name, moved.MaxLent)
	if err != nil {
		return nil
	}
	l, err := moved.ParseLent(g.dir.Path(name), b)
	if err != nil || l.UUID == id {
		return nil
	}
	f, err = g.dir.Open(ctx, r.keptObject(l.UUID), Exclusive)
	if errors.Is(err, vfs.ErrLocked) {
		return nil
	}
	if err == nil {
		f.Close()
	}
	return g.dir.Remove(ctx, name)
}
