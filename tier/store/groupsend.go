package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/transfer"
)

// A group goes to another store as its members do, one after the other, each of which is a
// checkpoint there as soon as it is whole:
//
//	GROUP ─► member ─► member ─► … ─► the last ─► groups/NAME@N.json
//
// Only the last makes it a group: what is cut off before has left checkpoints, of which the
// next transfer sends none again.

// SendGroup writes a group, r without a number the newest of its name, and all of its members
// as Send does. One that lacks members is refused (ErrNotFound) before anything is written.
func (s *Store) SendGroup(ctx context.Context, r Ref, w *transfer.Writer, have *transfer.Have, o SendOptions) ([]Sent, error) {
	g, err := s.FindGroup(ctx, r)
	if err != nil {
		return nil, err
	}
	if len(g.Missing) > 0 {
		return nil, fmt.Errorf("group %v lacks %v, which was removed: %w", g.Ref(), g.Missing[0], ErrNotFound)
	}
	head := &transfer.GroupHead{Name: g.Name, Number: g.Number, UUID: g.UUID, Created: g.Created, Mode: g.Mode}
	for _, m := range g.Members {
		// One that was flattened has another UUID than when the group was made.
		id, _, err := s.identity(ctx, m.Ref())
		if err != nil {
			return nil, fmt.Errorf("checkpoint %v of group %v: %w", m.Ref(), g.Ref(), err)
		}
		head.Members = append(head.Members, transfer.Member{VM: m.VM, Number: m.Number, UUID: id.UUID, Origin: id.Origin})
	}
	if err := w.Group(head); err != nil {
		return nil, err
	}
	var all []Sent
	for i, m := range g.Members {
		sent, err := s.Send(ctx, m.Ref(), w, have, o)
		if err == nil && sent.UUID != head.Members[i].UUID {
			err = ErrChanged
		}
		if err != nil {
			return all, fmt.Errorf("checkpoint %v of group %v: %w", m.Ref(), g.Ref(), err)
		}
		all = append(all, sent)
	}
	return all, nil
}

// receivedGroup is a group of which members are being received.
type receivedGroup struct {
	head *transfer.GroupHead
	ref  Ref // what it is to be called; without a number, the next of its name
	left map[uuid.UUID]bool
}

// beginGroup begins to receive a group, which is to be called as; zero: as it was. What would
// not be taken in the end is refused now.
func (s *Store) beginGroup(ctx context.Context, head *transfer.GroupHead, as Ref) (*receivedGroup, error) {
	rg := &receivedGroup{head: head, ref: Ref{head.Name, head.Number}, left: make(map[uuid.UUID]bool)}
	if as.VM != "" {
		rg.ref = as
	}
	if err := CheckGroup(rg.ref.VM); err != nil {
		return nil, err
	}
	if rg.ref.N < 0 || rg.ref.N > MaxNumber || rg.ref.N == 0 && as.VM == "" {
		return nil, fmt.Errorf("group number %d: %w", rg.ref.N, ErrName)
	}
	if _, err := s.groupThere(ctx, rg, as); err != nil {
		return nil, err
	}
	there, err := s.allListed(ctx)
	if err != nil {
		return nil, err
	}
	unlock, err := s.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	for _, m := range head.Members {
		rg.left[m.UUID] = true
		if _, ok := there.checkpoint(m.UUID, m.Origin); ok {
			continue
		}
		r := Ref{m.VM, m.Number}
		if err := (GroupMember{VM: m.VM, Number: m.Number}).check(); err != nil {
			return nil, err
		}
		taken, err := s.nameTaken(ctx, r)
		if err == nil && taken {
			err = fmt.Errorf("checkpoint %v of group %v: %w in store %s", r, rg.ref, ErrTaken, s.root)
		}
		if err != nil {
			return nil, err
		}
	}
	return rg, nil
}

// groupThere finds a group that is here already, and refuses one whose name another has.
func (s *Store) groupThere(ctx context.Context, rg *receivedGroup, as Ref) (at Ref, err error) {
	done, committing, err := s.groupNames(ctx)
	if err != nil {
		return at, err
	}
	var again []Ref // that the same group may have again
	for _, r := range done {
		g, err := s.readGroup(ctx, r, groupSuffix)
		switch {
		case err == nil && g.Removed:
			if g.UUID == rg.head.UUID {
				again = append(again, r)
			}
		case err == nil && g.UUID == rg.head.UUID:
			if as.VM != "" && (r.VM != as.VM || as.N > 0 && r.N != as.N) {
				return at, fmt.Errorf("group %v@%d is in this store already, as %v", rg.head.Name, rg.head.Number, r)
			}
			return r, nil
		case err != nil && !gone(err) && !integrity.IsCorrupt(err):
			return at, err
		}
	}
	for _, r := range append(done, committing...) {
		if r == rg.ref && !slices.Contains(again, r) {
			return at, fmt.Errorf("group %v: %w in store %s; --as %s gives it the next number there", r, ErrTaken, s.root, r.VM)
		}
	}
	return at, nil
}

// listedImages are the listed checkpoints by the UUIDs of their images, and by those of the
// first images that they had.
type listedImages struct{ image, first map[uuid.UUID]Ref }

// allListed are all. What can't say who it is, is not among them.
func (s *Store) allListed(ctx context.Context) (listedImages, error) {
	all := listedImages{make(map[uuid.UUID]Ref), make(map[uuid.UUID]Ref)}
	look := s.lookup()
	err := look.eachVM(ctx, "", func(vm string, o vmObjects) error {
		for _, n := range o.images {
			r := Ref{vm, n}
			id, err := look.whoIs(ctx, r.object(imageSuffix))
			switch {
			case err == nil && id != nil:
				all.image[id.UUID], all.first[id.First()] = r, r
			case cannotTell(err):
				if id, err := look.owner(ctx, r.object(imageSuffix)); err == nil {
					all.image[id] = r // its header says that
				}
			case err != nil && !gone(err) && !errors.Is(err, errNotObject):
				return err
			}
		}
		return nil
	})
	return all, err
}

// checkpoint finds the checkpoint that an image is of; origin is what it is of that
// (checkpoint.Identity).
func (all listedImages) checkpoint(id, origin uuid.UUID) (at Ref, there bool) {
	for _, id := range []uuid.UUID{id, origin} {
		for _, by := range []map[uuid.UUID]Ref{all.image, all.first} {
			if at, there = by[id]; there && id != uuid.Nil {
				return at, true
			}
		}
	}
	return Ref{}, false
}

// member notes that a checkpoint of the group has come, and tells whether it was the last.
// One that is not of it is damage.
func (rg *receivedGroup) member(got Received) (last bool, err error) {
	if !rg.left[got.UUID] {
		return false, fmt.Errorf("checkpoint %v is not of group %s@%d", got.Sent, rg.head.Name, rg.head.Number)
	}
	delete(rg.left, got.UUID)
	return len(rg.left) == 0, nil
}

// endGroup makes the group, of which all members are there, durably.
func (s *Store) endGroup(ctx context.Context, rg *receivedGroup, as Ref) (got Received, err error) {
	h := rg.head
	got = Received{Group: true, UUID: h.UUID, Sent: Ref{h.Name, h.Number}, Members: len(h.Members)}
	there, err := s.allListed(ctx)
	if err != nil {
		return got, err
	}
	g := Group{UUID: h.UUID, Created: h.Created, Mode: h.Mode}
	for _, m := range h.Members {
		at, ok := there.checkpoint(m.UUID, m.Origin)
		if !ok {
			return got, fmt.Errorf("checkpoint %s@%d of group %v was removed meanwhile: %w", m.VM, m.Number, rg.ref, ErrNotFound)
		}
		g.Members = append(g.Members, GroupMember{at.VM, at.N, cmp.Or(m.Origin, m.UUID)})
	}
	unlock, err := s.lock(ctx)
	if err != nil {
		return got, err
	}
	defer unlock()
	at, err := s.groupThere(ctx, rg, as)
	if err != nil {
		return got, err
	}
	if at != (Ref{}) {
		got.Ref, got.Already = at, true
		return got, nil
	}
	g.Name, g.Number = rg.ref.VM, rg.ref.N
	if g.Number == 0 {
		if g.Number, err = s.nextGroup(ctx, g.Name); err != nil {
			return got, err
		}
	}
	if err := g.check(); err != nil {
		return got, err
	}
	if err := s.dir.Mkdir(ctx, groupsFolder); err != nil {
		return got, err
	}
	got.Ref = g.Ref()
	return got, s.writeSealed(ctx, groupObject(g.Ref(), groupSuffix), g)
}
