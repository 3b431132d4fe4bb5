package store

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/integrity"
)

// presence finds out which checkpoints refer to images that are not there. Names and headers
// say that, which a list has looked at anyway:
//
//	the listed ones ─► the unlisted ones of these VMs ─► those of other VMs ─► all of it anew
//
// and each step is for what those before have not found. The last one, twice, is because
// names change while they are looked at: one that seems to be missing is looked for again
// before it is said.
type presence struct {
	s     *Store
	look  *lookup
	vms   map[string]bool
	other []folder // of those, who has not been asked yet who all their images are
	there map[uuid.UUID]bool
}

type folder struct {
	vm string
	vmObjects
}

func (s *Store) presence() *presence {
	return &presence{s: s, look: s.lookup(), vms: make(map[string]bool), there: make(map[uuid.UUID]bool)}
}

// add takes what is in a VM's folder.
func (p *presence) add(vm string, o vmObjects) {
	if !p.vms[vm] {
		p.vms[vm] = true
		p.other = append(p.other, folder{vm, o})
	}
}

// presencePause is how long a change of names takes at most, as a rule.
const presencePause = 50 * time.Millisecond

// lacksDisks sets Lacks of the checkpoints that the store keeps disks with which are not there.
func (p *presence) lacksDisks(ctx context.Context, list []Listed) error {
	var there map[string]bool
	for i := range list {
		l := &list[i]
		if l.Identity == nil || len(l.Identity.Kept) == 0 || l.Lacks != nil {
			continue
		}
		if there == nil {
			there = make(map[string]bool)
			names, err := p.s.dir.List(ctx, frozenFolder)
			if err != nil && !gone(err) {
				return err
			}
			for _, e := range names {
				there[e.Name] = true
			}
		}
		for _, id := range l.Identity.Kept {
			if there[id.String()] {
				continue
			}
			// One that was removed meanwhile lacks nothing any more.
			if now, err := p.s.owner(ctx, l.Ref.object(imageSuffix)); err == nil && now == l.Identity.UUID {
				l.Lacks = &integrity.CorruptError{File: p.s.dir.Path(frozenObject(id)), What: "disk that is kept with it", Err: ErrNotFound}
			}
			break
		}
	}
	return nil
}

// lacks sets Lacks of the checkpoints that refer to what is not there.
func (p *presence) lacks(ctx context.Context, list []Listed) error {
	for i := range list {
		if id := list[i].Identity; id != nil {
			p.there[id.UUID] = true
		}
	}
	open := p.missing(list)
	if len(open) > 0 {
		if err := p.resolve(ctx); err != nil {
			return err
		}
		open = p.missing(list)
	}
	if len(open) > 0 {
		if err := p.others(ctx); err != nil {
			return err
		}
		open = p.missing(list)
	}
	for range 2 {
		if len(open) == 0 {
			return nil
		}
		select {
		case <-time.After(presencePause):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		anew := p.s.presence()
		if err := anew.others(ctx); err != nil {
			return err
		}
		for n := range open {
			// One that is gone itself lacks nothing any more.
			if !anew.there[list[n].Identity.UUID] {
				delete(open, n)
			}
		}
		p = anew
		again := p.missing(list)
		for n := range open {
			if open[n] = again[n]; len(open[n]) == 0 {
				delete(open, n)
			}
		}
	}
	for n, ids := range open {
		l := &list[n]
		why := fmt.Errorf("it refers to image %v, which is not there", ids[0])
		if len(ids) > 1 {
			why = fmt.Errorf("%w, and neither are %d others", why, len(ids)-1)
		}
		l.Lacks = &integrity.CorruptError{File: p.s.dir.Path(l.Ref.object(imageSuffix)), What: "REFERENCES", Err: why}
	}
	return nil
}

// missing are the images that checkpoints refer to and that were not found yet, by the place
// in the list.
func (p *presence) missing(list []Listed) map[int][]uuid.UUID {
	open := make(map[int][]uuid.UUID)
	for n := range list {
		if list[n].Identity == nil {
			continue
		}
		for _, id := range list[n].Identity.References {
			if !p.there[id] {
				open[n] = append(open[n], id)
			}
		}
	}
	return open
}

// resolve finds out which images those are that were only named.
func (p *presence) resolve(ctx context.Context) error {
	for _, f := range p.other {
		for _, st := range f.all(f.vm) {
			if err := context.Cause(ctx); err != nil {
				return err
			}
			if size, ok := p.look.size(split(st.name)); ok && size == 0 {
				continue // it stands for a number
			}
			id, err := p.look.owner(ctx, st.name)
			switch {
			case err == nil:
				p.there[id] = true
			case !gone(err) && !cannotTell(err) && !errors.Is(err, errNotObject):
				return err
			}
		}
	}
	p.other = nil
	return nil
}

// others looks at all VMs that were not looked at before.
func (p *presence) others(ctx context.Context) error {
	vms, err := p.s.folders(ctx)
	if err != nil {
		return err
	}
	for _, vm := range vms {
		if p.vms[vm] {
			continue
		}
		o, err := p.look.objects(ctx, vm)
		if err != nil {
			return err
		}
		p.add(vm, o)
	}
	return p.resolve(ctx)
}
