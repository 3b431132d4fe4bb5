package save

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"

	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/tier/bitmap"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/delta"
	"github.com/flic-migrate/flic-migrate/tier/digest"
	"github.com/flic-migrate/flic-migrate/tier/pagemap"
	"github.com/flic-migrate/flic-migrate/tier/rescue"
	"github.com/flic-migrate/flic-migrate/tier/source"
	"github.com/flic-migrate/flic-migrate/tier/store"
)

// What Options.Parent can be besides a checkpoint's name.
const (
	ParentAuto = "auto" // Options.Since or the VM's newest checkpoint, if it can be one
	ParentNone = "none" // no other checkpoint is referred to
)

const (
	// maxReferences is how many checkpoints a new one refers to, its parent included:
	// what a restore has to hold open, and reads from places far apart. Of those that
	// the parent refers to, the ones with the fewest pages are left out.
	maxReferences = 48
	// sparse is the share of a segment, 1/sparse, that must be in use for its pages to
	// be referred to: a restore reads a segment as a whole, and all of it is kept.
	// What is left out is stored again.
	sparse = 8
	// digestChunks is how many chunks of digests are kept, 16 MiB: pages come in the
	// order of their addresses, and so do the slots of each image, nearly.
	digestChunks = 64
	// baseBytes of decoded segments of bases are kept besides those that the workers have
	// in hand. What a page of a database's log is a delta against is anywhere in the log: with
	// an eighth of this the same segments were read and checked again and again.
	baseBytes = 8 << 20
)

// parent is the checkpoint that a save is compared with, and what of it can be referred
// to. Comparing is safe from several goroutines, with a parentReader each.
type parent struct {
	c    *store.Checkpoint
	sums *checkpoint.Digester
	set  *source.Set
	// cache has the segments that bases are in.
	cache *source.Cache
	// refs are the references of the new checkpoint, the parent first; spaces are, by
	// the parent's space, one more than their place in refs, 0 for what is left out.
	refs   refs
	spaces []source.Space
	// theirs are the parent's spaces, by this checkpoint's.
	theirs []source.Space
	// dense are, by the parent's space, the segments in which enough is in use.
	dense []bitmap.Bitmap
	// carried are the disks that the parent has pages on, by its numbers, as this save
	// numbers them; -1 for those whose pages are not taken over.
	carried []int
	// blocks are the parent's, by this save's: -1 for those that it does not have.
	blocks []int
	// kept are pages that have been read ahead, whose marks are known; nil: none have.
	// Nobody compares while they are put here.
	kept map[source.Location][]byte

	log    *slog.Logger
	warned sync.Once
}

// openParent opens the checkpoint that o asks for; nil if there is none. It stays open,
// and nothing of what it needs goes away, until tx has ended.
func openParent(ctx context.Context, st *store.Store, tx *store.Tx, o Options, workers int) (*parent, error) {
	if o.Parent == ParentNone {
		return nil, nil
	}
	ref, asked := store.Ref{VM: o.VM}, o.Parent != ParentAuto && o.Parent != ""
	switch {
	case !asked && o.Since.N > 0:
		ref = o.Since
	case asked:
		var err error
		if ref, err = store.ParseRef(o.Parent); err != nil {
			return nil, err
		}
	}
	bases := baseBytes
	if o.Hold != nil {
		bases = heldBaseBytes
	}
	p, err := newParent(ctx, st, tx, ref, o.Log, workers, bases)
	if err == nil && asked && o.TrustDomain == "" {
		err = o.stays(ctx, st)
	}
	if err == nil {
		err = o.trusts(p.c.Meta.TrustDomain)
	}
	switch {
	case err == nil:
		return p, nil
	case asked:
		return nil, fmt.Errorf("parent %v: %w", ref, err)
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case errors.Is(err, store.ErrNotFound) || errors.Is(err, errNoDigests):
		return nil, nil // it is the VM's first, or an earlier version's
	}
	o.Log.Warn("the checkpoint before can't be referred to, so all is stored anew", "error", err)
	return nil, nil
}

// stays has a VM that has checkpoints stay in the trust domain of its newest, whatever parent
// was named.
func (o *Options) stays(ctx context.Context, st *store.Store) error {
	list, err := st.List(ctx, o.VM)
	if err == nil && len(list) > 0 {
		o.TrustDomain, err = st.DomainOf(ctx, o.VM)
	}
	return err
}

// trusts tells whether a checkpoint of a trust domain can be the parent. Those of earlier
// versions are in none, and one that is to be in the default domain goes on from them.
func (o *Options) trusts(domain string) error {
	switch o.TrustDomain {
	case "", domain:
		return nil
	case store.DefaultDomain:
		if domain == "" {
			return nil
		}
	}
	return fmt.Errorf("its trust domain is %q, and this one's is to be %q", domain, o.TrustDomain)
}

// errNoDigests: a checkpoint says nothing by which its pages can be known.
var errNoDigests = errors.New("it has no digests of its pages, so nothing can refer to it")

func newParent(ctx context.Context, st *store.Store, tx *store.Tx, ref store.Ref, log *slog.Logger, workers, bases int) (*parent, error) {
	c, err := st.OpenCheckpoint(ctx, ref, checkpoint.Options{Disks: checkpoint.DiskOptions{Missing: true, Check: checkpoint.CheckRead}})
	if err != nil {
		return nil, err
	}
	tx.Hold(c)
	p := &parent{c: c, log: log}
	if p.sums, err = c.Digester(digestChunks); err != nil {
		return nil, err
	}
	if p.sums == nil {
		return nil, errNoDigests
	}
	p.set = c.Sources()
	p.cache = c.NewCache(p.set.InOrder(bases) + workers*source.MaxNeeds)
	return p, p.choose()
}

// choose looks at the parent's page map for what is worth to be referred to.
func (p *parent) choose() error {
	spaces := p.set.Images()
	// Pages in use, by space and segment. A delta's base counts too.
	use := make([][]uint16, len(spaces))
	pages := make([]int64, len(spaces))
	for i := range spaces {
		p.dense = append(p.dense, bitmap.New(int64(p.segments(i))))
		use[i] = make([]uint16, p.segments(i))
	}
	var count func(r pagemap.Run)
	count = func(r pagemap.Run) {
		at, ok := p.set.Locate(r.Entry(0))
		if !ok || at.Tier == source.OnDisk {
			return
		}
		pages[at.Space] += int64(r.Count)
		if at.Tier == source.AsDelta {
			for i := range r.Count {
				if base, ok := p.base(source.Location{Space: at.Space, Slot: at.Slot + i*r.Step}); ok {
					count(pagemap.Run{Count: 1, Kind: base.Entry().Kind(), First: base.Entry().Value()})
				}
				if r.Step == 0 {
					break
				}
			}
		}
		if at.Tier == source.InNVRAM {
			return
		}
		per := spaces[at.Space].SegmentPages
		for n := r.Count; n > 0; {
			m := n
			if r.Step != 0 {
				m = min(n, per-at.Slot%per)
			}
			// Of a page that many have, one is in use.
			u := &use[at.Space][at.Slot/per]
			*u = uint16(min(uint64(*u)+max(1, m*r.Step), per))
			n -= m
			at.Slot += m
		}
	}
	if err := p.c.PageMap.Runs(func(r pagemap.Run) error { count(r); return nil }); err != nil {
		return err
	}
	order := make([]int, len(spaces)-1)
	for i := range order {
		order[i] = i + 1
	}
	slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(pages[b], pages[a]) })
	order = append([]int{0}, order[:min(len(order), maxReferences-1)]...)
	slices.Sort(order)
	p.spaces, p.theirs = make([]source.Space, len(spaces)), []source.Space{0}
	theirs := p.c.References()
	for _, i := range order {
		ref := checkpoint.Reference{
			UUID: p.c.Meta.UUID, Root: p.c.Meta.Digests.Root, VM: p.c.Ref.VM, Number: p.c.Ref.N,
			SegmentPages: p.c.Image.SegmentPages, Segments: uint32(p.c.Image.Segments()),
		}
		if n := p.c.Meta.NVRAM; n != nil {
			ref.Slots = uint32(n.Slots)
		}
		if i > 0 {
			ref = theirs[i-1]
		}
		ref.NeedSegments, ref.NeedSlots = nil, nil
		p.refs.list = append(p.refs.list, ref)
		p.spaces[i], p.theirs = source.Space(len(p.refs.list)), append(p.theirs, source.Space(i))
		for n, u := range use[i] {
			if uint64(u)*sparse >= spaces[i].SegmentPages {
				p.dense[i].Set(int64(n))
			}
		}
	}
	p.refs.parents = len(p.refs.list)
	return nil
}

// segments is one more than the highest segment of a space that is in use.
func (p *parent) segments(space int) uint64 {
	s := p.set.Spaces[space].Segments
	if len(s) == 0 {
		return 0
	}
	return s[len(s)-1].End()
}

// bind tells which of the parent's RAM blocks is which of this save's.
func (p *parent) bind(blocks []ramparse.Block, pageSize int) error {
	if pageSize != p.set.PageSize {
		return fmt.Errorf("it has pages of %d bytes, and the guest has %d", p.set.PageSize, pageSize)
	}
	p.blocks = make([]int, len(blocks))
	for i := range blocks {
		p.blocks[i] = slices.IndexFunc(p.c.Meta.Blocks, func(b ramparse.Block) bool { return b.Name == blocks[i].Name })
	}
	return nil
}

// here is a place of the parent's as this checkpoint names it, if it is to be referred
// to.
func (p *parent) here(at source.Location) (pagemap.Entry, bool) {
	if at.Tier == source.OnDisk {
		on, ok := p.diskOf(at)
		return diskEntry(on), ok
	}
	if at.Tier == source.AsDelta && len(p.carried) > 0 {
		base, ok := p.base(at)
		if ok && base.Tier == source.OnDisk {
			_, ok = p.diskOf(base)
		}
		if !ok {
			return 0, false
		}
	}
	space := p.spaces[at.Space]
	if space == 0 || at.Tier != source.InNVRAM && !p.dense[at.Space].Has(int64(at.Slot/p.set.Spaces[at.Space].SegmentPages)) {
		return 0, false
	}
	at.Space = space
	return at.Entry(), true
}

// there is a place of the parent's by what this checkpoint calls it.
func (p *parent) there(e pagemap.Entry) (source.Location, bool) {
	at, ok := source.Default.Locate(e)
	if !ok || at.Space == 0 || int(at.Space) >= len(p.theirs) {
		return at, false
	}
	at.Space = p.theirs[at.Space]
	return at, true
}

// base is where the whole bytes are that a page at a place is, or is a delta against.
func (p *parent) base(at source.Location) (source.Location, bool) {
	r, err := p.set.Bases.Find(int(at.Space), at.Slot)
	if err != nil {
		p.damaged(err)
		return at, false
	}
	return p.set.Locate(r.Entry(0))
}

// damaged says that the parent can't be read, once: what can't be compared is stored.
// A bug is no damage, and goes on.
func (p *parent) damaged(err error) {
	if bug := (*rescue.Error)(nil); errors.As(err, &bug) {
		panic(bug)
	}
	p.warned.Do(func() {
		p.log.Warn("the parent can't be read as a whole, so more is stored anew", "error", err)
	})
}

// parentReader reads the parent's pages in one goroutine.
type parentReader struct {
	*parent
	ctx  context.Context
	sums *checkpoint.Digester // this goroutine's
	rd   *source.Reader
	run  pagemap.Run // the one that the last page was in
	page []byte

	marks  []uint64 // of the page in hand
	differ delta.Differ

	disks *disks              // nil: none is looked in
	near  checkpoint.DiskSlot // where the last one was found

	shared *shared // nil: none is looked in
	last   *lent   // that had a page

	hash *digest.Hasher // of the digests that peers want; nil: there are none
}

// reader is one goroutine's. Without a parent it finds nothing.
func (p *parent) reader(ctx context.Context) *parentReader {
	if p == nil {
		return &parentReader{ctx: ctx}
	}
	return &parentReader{parent: p, ctx: ctx, sums: p.sums.One(), rd: p.set.NewReader(p.cache), page: make([]byte, p.set.PageSize)}
}

func (r *parentReader) close() {
	if r.parent != nil {
		r.rd.Close()
	}
}

// find is where the bytes of a page of this save's are in the parent; false if they are
// nowhere.
func (r *parentReader) find(block int, page uint64) (at source.Location, ok bool) {
	if r.parent == nil {
		return at, false
	}
	b := r.blocks[block]
	if b < 0 || page >= r.c.PageMap.Pages(b) {
		return at, false
	}
	if r.run.Block != b || page-r.run.Page >= r.run.Count {
		var err error
		if r.run, err = r.c.PageMap.Find(b, page); err != nil {
			r.run = pagemap.Run{}
			r.damaged(err)
			return at, false
		}
	}
	return r.set.Locate(r.run.Entry(page - r.run.Page))
}

// content is what is at a place, checked; valid until the next call. The page, by this
// save's numbers, is the one it is wanted for.
func (r *parentReader) content(at source.Location, block int, page uint64) ([]byte, error) {
	if page := r.kept[at]; page != nil {
		return page, nil
	}
	block = max(0, r.blocks[block]) // a page of a block that it does not have may resemble one of its pages
	err := r.rd.Copy(r.ctx, r.page, source.Page{Block: block, Number: page}, at.Entry())
	if err != nil {
		return nil, err
	}
	if at.Space > 0 {
		return r.page, nil
	}
	// What is the parent's own is not checked by its digest where it is read.
	want, err := r.sums.Sum(at)
	if err == nil && r.sums.Hasher.Sum(r.page) != want {
		err = fmt.Errorf("page %s of checkpoint %v is not what its digest says", r.c.PageName(block, page), r.c.Ref)
	}
	return r.page, err
}
