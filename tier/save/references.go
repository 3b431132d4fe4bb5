package save

import (
	"cmp"
	"context"
	"errors"
	"slices"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/bitmap"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/pagemap"
	"github.com/flic-migrate/flic-migrate/tier/source"
)

// baseOf is what a delta that pages of this checkpoint have is against.
type baseOf struct {
	delta source.Location
	base  pagemap.Entry
}

// referred is what a checkpoint that is placed needs of others.
type referred struct {
	refs  checkpoint.References
	bases []baseOf // by space and slot, each once

	all      checkpoint.References // that could be needed
	parents  int                   // of all, the parent's
	ofParent bool                  // one of these is needed
	peers    []*Peer               // whose images they are, of all, later of refs; nil: nobody's
	segments []bitmap.Bitmap       // by reference
	slots    []bitmap.Bitmap
}

// refer finds out what a placed checkpoint needs of others, and leaves out the
// references of which it needs nothing: entries count without them after it.
func (p *placer) refer() (*referred, error) {
	par := p.to.par
	n := &referred{}
	if p.to.refs == nil {
		return n, nil
	}
	n.all, n.parents = slices.Clone(p.to.refs.all()), p.to.refs.parents
	for i := range n.all {
		m := p.to.peers.of(source.Space(i + 1))
		if n.peers = append(n.peers, m); m != nil && m.per.Load() > 0 {
			// Of what others have found; it may have more by now.
			per := m.per.Load()
			n.all[i].SegmentPages, n.all[i].Segments = int(per), uint32((m.top.Load()+per-1)/per)
		}
	}
	for i := range n.all {
		n.segments = append(n.segments, bitmap.New(int64(n.all[i].Segments)))
		n.slots = append(n.slots, bitmap.New(int64(n.all[i].Slots)))
	}
	err := p.to.pages.Runs(func(r pagemap.Run) error {
		for i := range r.Count {
			at, ok := source.Default.Locate(r.Entry(i))
			if !ok || at.Space == 0 && at.Tier != source.AsDelta {
				return nil // as all of the run
			}
			if at.Space > 0 {
				n.need(at)
			}
			switch {
			case int(at.Space) <= n.parents:
			case n.peers[at.Space-1] != nil:
				p.count.Peers++
			default:
				p.count.Shared++
			}
			if at.Tier != source.AsDelta {
				continue
			}
			b := baseOf{delta: at}
			if at.Space == 0 {
				b.base = p.base(at.Slot)
			} else {
				base, err := par.set.Bases.Find(int(par.theirs[at.Space]), at.Slot)
				if err != nil {
					return err
				}
				where, _ := par.set.Locate(base.Entry(0))
				if where.Tier == source.OnDisk {
					sum, err := par.sums.Sum(where)
					if err != nil {
						return err
					}
					on, _ := par.diskOf(where)
					p.disk.add(on, sum)
					b.base = diskEntry(on)
				} else {
					where.Space = par.spaces[where.Space]
					b.base = where.Entry()
				}
			}
			where, _ := source.Default.Locate(b.base)
			n.need(where)
			n.bases = append(n.bases, b)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	p.bases = nil
	n.drop(p.to.pages)
	slices.SortFunc(n.bases, func(a, b baseOf) int {
		return cmp.Or(cmp.Compare(a.delta.Space, b.delta.Space), cmp.Compare(a.delta.Slot, b.delta.Slot))
	})
	n.bases = slices.CompactFunc(n.bases, func(a, b baseOf) bool { return a.delta == b.delta })
	return n, nil
}

// need notes that bytes at a place are needed.
func (n *referred) need(at source.Location) {
	if at.Tier == source.OnDisk {
		return
	}
	ref := at.Space - 1
	if at.Tier == source.InNVRAM {
		n.slots[ref].Set(int64(at.Slot))
		return
	}
	n.segments[ref].Set(int64(at.Slot / uint64(n.all[ref].SegmentPages)))
}

// drop makes the list of references, without those of which nothing is needed.
func (n *referred) drop(pages *pagemap.Builder) {
	now := make([]source.Space, len(n.all)+1) // by space so far
	var peers []*Peer
	for i, r := range n.all {
		for run := range n.segments[i].Runs() {
			r.NeedSegments = append(r.NeedSegments, source.Range{First: uint32(run.First), Count: uint32(run.N)})
		}
		for run := range n.slots[i].Runs() {
			r.NeedSlots = append(r.NeedSlots, source.Range{First: uint32(run.First), Count: uint32(run.N)})
		}
		if len(r.NeedSegments)+len(r.NeedSlots) > 0 {
			n.refs = append(n.refs, r)
			now[i+1] = source.Space(len(n.refs))
			n.ofParent = n.ofParent || i < n.parents
			peers = append(peers, n.peers[i])
		}
	}
	n.peers = peers
	if len(n.refs) == len(n.all) {
		return
	}
	move := func(e pagemap.Entry) pagemap.Entry {
		at, ok := source.Default.Locate(e)
		if !ok || at.Space == 0 {
			return e
		}
		at.Space = now[at.Space]
		return at.Entry()
	}
	for b := range pages.Blocks() {
		pages.Change(b, move)
	}
	for i := range n.bases {
		n.bases[i].base = move(n.bases[i].base)
		n.bases[i].delta.Space = now[n.bases[i].delta.Space]
	}
}

// baseRuns are the runs of the map from deltas to their bases: block 0 is this image,
// with so many slots, block i+1 reference i.
func (n *referred) baseRuns(slots uint64) func(fn func(pagemap.Run) error) error {
	sizes := []uint64{slots}
	for i := range n.refs {
		sizes = append(sizes, uint64(n.refs[i].Segments)*uint64(n.refs[i].SegmentPages))
	}
	return func(fn func(pagemap.Run) error) error {
		rest := n.bases
		for block, size := range sizes {
			for page := uint64(0); page < size; {
				r := pagemap.Run{Block: block, Page: page, Count: size - page}
				if len(rest) > 0 && rest[0].delta.Space == source.Space(block) {
					if r.Count = rest[0].delta.Slot - page; r.Count == 0 {
						r = runOfBases(rest, block)
						rest = rest[r.Count:]
					}
				}
				if err := fn(r); err != nil {
					return err
				}
				page += r.Count
			}
		}
		return nil
	}
}

// runOfBases is the run that a list of bases, of one space at its beginning, begins with.
func runOfBases(list []baseOf, block int) pagemap.Run {
	first := list[0]
	r := pagemap.Run{Block: block, Page: first.delta.Slot, Count: 1, Kind: first.base.Kind(), First: first.base.Value()}
	for i := 1; i < len(list); i++ {
		b := list[i]
		if b.delta.Space != first.delta.Space || b.delta.Slot != first.delta.Slot+uint64(i) {
			break
		}
		if i == 1 && b.base == first.base+1 {
			r.Step = 1
		}
		if b.base != r.Entry(uint64(i)) {
			break
		}
		r.Count++
	}
	return r
}

// refer finds out what is needed of others, and writes DISKS.
func (s *saver) refer() (*referred, error) {
	n, err := s.placer.refer()
	if err != nil {
		return nil, err
	}
	on, err := s.placer.number(n)
	if err == nil {
		err = s.disks(on)
	}
	return n, err
}

// meet waits for the other members of a group, whose images are known then.
func (s *saver) meet(ctx context.Context, n *referred) error {
	if s.o.Peer == nil {
		return nil
	}
	var self checkpoint.Reference
	if d := s.meta.Digests; d != nil {
		self = checkpoint.Reference{UUID: s.meta.UUID, Root: d.Root, VM: s.meta.VM, Number: s.meta.Number,
			SegmentPages: s.out.img.SegmentPages(), Segments: uint32(s.out.img.Segments())}
		if s.meta.NVRAM != nil {
			self.Slots = uint32(s.meta.NVRAM.Slots)
		}
	}
	if err := s.o.Peer.meet(ctx, self); err != nil {
		return err
	}
	for i, m := range n.peers {
		if m == nil {
			continue
		}
		r := &n.refs[i]
		need := r.NeedSegments
		if *r = m.ref; r.UUID == uuid.Nil {
			return errors.New("it refers to another member of the group that has no digests of its pages")
		}
		r.NeedSegments = need
	}
	return nil
}

// references writes what says where pages are that are not whole in this image:
// REFERENCES and BASES.
func (s *saver) references(ctx context.Context, n *referred) error {
	if len(n.refs) > 0 {
		if n.ofParent {
			s.rep.Parent = s.placer.to.par.c.Ref.String()
		}
		var ids []uuid.UUID
		for i, r := range n.refs {
			if n.peers[i] == nil { // theirs are made with this one
				ids = append(ids, r.UUID)
			}
		}
		if err := s.out.tx.Refer(ctx, ids...); err != nil {
			return err
		}
		if err := s.out.chunks(image.References, n.refs.Append(nil)); err != nil {
			return err
		}
	}
	s.meta.References = nil
	for i := range n.refs {
		s.meta.References = append(s.meta.References, n.refs[i].UUID)
	}
	if len(n.bases) == 0 {
		return nil
	}
	if err := s.out.img.Drain(); err != nil {
		return err
	}
	slots := uint64(s.out.img.Segments()) * uint64(s.out.img.SegmentPages())
	return pagemap.Encode(n.baseRuns(slots), tableChunk, func(at pagemap.Start, b []byte) error {
		s.meta.Bases = append(s.meta.Bases, at)
		return s.out.chunk(image.Bases, b)
	})
}
