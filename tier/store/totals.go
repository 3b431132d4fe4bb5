package store

import (
	"context"
	"errors"
	"slices"
	"strings"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/source"
)

// Total is what the checkpoints of one VM, or of one trust domain, take, and what they have
// in common with those of others. Bytes of NVRAM are pages, all others are of files.
type Total struct {
	VM          string `json:"vm,omitempty"`           // empty: of a domain
	TrustDomain string `json:"trust_domain,omitempty"` // of the VM's newest checkpoint; empty: none
	Checkpoints int    `json:"checkpoints"`
	Flash       int64  `json:"flash_bytes"`
	NVRAM       int64  `json:"nvram_bytes"`
	// Frozen is what the disk blocks hold of the disk images that are kept with checkpoints:
	// those too that are shared with other files.
	Frozen int64 `json:"frozen_bytes"`
	// Kept are images of removed checkpoints, or what is left of them.
	Kept int64 `json:"kept_bytes"`
	// Lent is what checkpoints of others need of these images, Borrowed what these
	// checkpoints need of the images of others. A domain lends to none.
	Lent     int64 `json:"lent_bytes"`
	Borrowed int64 `json:"borrowed_bytes"`
}

// totals collects them.
type totals struct {
	s  *Store
	vm map[string]*Total
	// images are all that there are, by UUID, and needs what each VM needs of them.
	images map[uuid.UUID]stored
	needs  map[uuid.UUID]map[string]source.Ranges
}

// Totals says what each VM takes, in the order of their names, and then what each trust
// domain does. It takes no lock, so what others change meanwhile may count or not. Images
// that can't say who they are count by their size alone; left is what is wrong with them.
func (s *Store) Totals(ctx context.Context) (list []Total, left, err error) {
	t := &totals{s: s, vm: make(map[string]*Total), images: make(map[uuid.UUID]stored), needs: make(map[uuid.UUID]map[string]source.Ranges)}
	err = s.eachVM(ctx, "", func(vm string, o vmObjects) error {
		of := &Total{VM: vm}
		for _, st := range o.all(vm) {
			if err := context.Cause(ctx); err != nil {
				return err
			}
			err := t.image(ctx, of, st)
			switch {
			case err == nil || gone(err):
			case cannotTell(err) || errors.Is(err, errNotObject):
				left = errors.Join(left, err)
			default:
				return err
			}
		}
		if of.Checkpoints > 0 || of.Kept > 0 {
			t.vm[vm] = of
		}
		return nil
	})
	if err != nil {
		return nil, nil, err
	}
	for id, by := range t.needs {
		err := t.share(ctx, id, by)
		switch {
		case err == nil || gone(err):
		case cannotTell(err):
			left = errors.Join(left, err)
		default:
			return nil, nil, err
		}
	}
	domains := make(map[string]*Total)
	for _, of := range t.vm {
		list = append(list, *of)
		if of.TrustDomain == "" {
			continue
		}
		d := domains[of.TrustDomain]
		if d == nil {
			d = &Total{TrustDomain: of.TrustDomain}
			domains[of.TrustDomain] = d
		}
		d.Checkpoints, d.Flash, d.NVRAM, d.Kept = d.Checkpoints+of.Checkpoints, d.Flash+of.Flash, d.NVRAM+of.NVRAM, d.Kept+of.Kept
		d.Frozen += of.Frozen
	}
	slices.SortFunc(list, func(a, b Total) int { return strings.Compare(a.VM, b.VM) })
	n := len(list)
	for _, d := range domains {
		list = append(list, *d)
	}
	slices.SortFunc(list[n:], func(a, b Total) int { return strings.Compare(a.TrustDomain, b.TrustDomain) })
	return list, left, nil
}

// image counts one image of a VM's, and what it needs of others.
func (t *totals) image(ctx context.Context, of *Total, st stored) error {
	f, err := t.s.dir.Open(ctx, st.name, Unlocked)
	if err != nil {
		return err
	}
	defer f.Close()
	bytes, err := occupied(f)
	if err != nil {
		return err
	}
	if st.gone {
		of.Kept += bytes
	} else {
		of.Flash += bytes
		of.Checkpoints++
	}
	if bytes == 0 {
		return nil
	}
	id, err := checkpoint.ReadIdentity(f)
	if err = t.s.unlessGone(ctx, st.name, err); err != nil {
		return err
	}
	st.id = id
	t.images[id.UUID] = st
	if id.NVRAM != nil && !st.gone {
		of.NVRAM += id.NVRAM.Bytes
	}
	if st.gone {
		return nil
	}
	of.TrustDomain = id.TrustDomain
	for _, k := range id.Kept {
		n, err := t.s.frozenBytes(ctx, k)
		if err != nil && !gone(err) {
			return err
		}
		of.Frozen += n
	}
	if len(id.References) == 0 {
		return nil
	}
	refs, err := checkpoint.ReadReferences(f)
	if err != nil {
		return err
	}
	for i := range refs {
		by := t.needs[refs[i].UUID]
		if by == nil {
			by = make(map[string]source.Ranges)
			t.needs[refs[i].UUID] = by
		}
		by[of.VM] = by[of.VM].Union(refs[i].NeedSegments)
	}
	return nil
}

// share counts what VMs need of an image of another's.
func (t *totals) share(ctx context.Context, id uuid.UUID, by map[string]source.Ranges) error {
	st, ok := t.images[id]
	if !ok {
		return nil // verify says so
	}
	var all source.Ranges
	for vm, need := range by {
		if vm != st.ref.VM {
			all = all.Union(need)
		}
	}
	if len(all) == 0 {
		return nil
	}
	f, err := t.s.dir.Open(ctx, st.name, Unlocked)
	if err != nil {
		return err
	}
	defer f.Close()
	im, err := image.Open(f)
	if err != nil {
		return err
	}
	t.vm[st.ref.VM].Lent += storedBytes(im, all)
	for vm, need := range by {
		if vm != st.ref.VM {
			t.vm[vm].Borrowed += storedBytes(im, need)
		}
	}
	return nil
}
