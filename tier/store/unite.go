package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/bitmap"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/digest"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/pagemap"
	"github.com/flic-migrate/flic-migrate/tier/share"
	"github.com/flic-migrate/flic-migrate/tier/source"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

const (
	// uniteShare is the share of a checkpoint's stored pages, 1/uniteShare, that others must
	// have for the rest to be written again.
	uniteShare = 8
	// uniteSample is the share of the pages, 1/uniteSample, that is looked for at first, of
	// more than uniteAll of them: what is not worth it is to cost next to nothing.
	uniteSample = 64
	uniteAll    = 4096
	// uniteImages is how many images a checkpoint can come to refer to: those that have most
	// of its pages.
	uniteImages = 16
	// uniteSparse is the share of another image's segment, 1/uniteSparse, that must be found:
	// a restore reads it as a whole.
	uniteSparse = 8
	// uniteChunks is how many chunks of digests are kept, of 256 KiB each.
	uniteChunks = 32
	// uniteWait is how long another uniting is waited for. It takes seconds, as long as it
	// takes to write an image.
	uniteWait = 2 * time.Minute
)

// UniteOptions of Unite.
type UniteOptions struct {
	SameVM  bool // look in images of the checkpoint's own VM alone
	Workers int  // compressing threads; 0: one for each CPU
}

// United says what Unite has done.
type United struct {
	// Why the checkpoint is as it was; empty: a new image is in the place of the old one.
	Why  string
	UUID uuid.UUID // of the new image
	// Of it, and of those that were united with it:
	Pages int64 // stored pages that others have, each different one once
	Bytes int64 // of flash that are free now
}

// Unite gives back the space of pages that a checkpoint has stored and that other images of
// its trust domain have too. Saves look for their pages in the images that are there when
// they begin; of two that run at the same time neither finds what the other has. This looks
// once more, when the checkpoint is there:
//
//	A@1          a  b  c  d          d         + REFERENCES: b, c in B@1
//	B@1             b  c  e  f       b  c  e  f
//	                         tmp/A@1.NEW.part ─► replaces A@1, under the same number
//
// As in Flatten the new image has a UUID of its own, each step is durable before the next,
// and whenever it is cut off the checkpoint is there, as the old image or as the new one.
// What it refers to is locked from before the look until the new image is there (Borrow). An
// image that somebody has open, or needs, stays as it is, so that no page is moved away from
// under anybody; nor is one replaced that has pages in NVRAM, or disks that are kept with it, because these
// are its own.
//
// One process of a domain unites at a time, and with the checkpoint those that have pages in
// common with it, in the order in which they were made: each gives up what one before it has.
// Were it otherwise, the first would refer to all others, which then are needed and can give up
// nothing. Nothing refers to what refers on: each entry names where the bytes are. r has a
// number.
//
// The note that a save has left of it is gone when it is done, and stays if it is cut off:
// UniteLeft does it then.
func (s *Store) Unite(ctx context.Context, r Ref, o UniteOptions) (u United, err error) {
	id, _, err := s.identity(ctx, r)
	if err != nil {
		return u, err
	}
	if u, err = s.unite(ctx, r, id, o); err != nil || id.TrustDomain == "" {
		return u, err
	}
	if c, err := s.Share(id.TrustDomain); err == nil {
		_ = c.ForgetBeside(share.Image{UUID: id.UUID, VM: r.VM, Number: r.N}) // or UniteLeft finds that it is done
	}
	return u, nil
}

// UniteLeft unites the checkpoints of all trust domains that were to be united, by processes
// that have not come to it, each for as long as limit lets it; n is how many those were. A
// domain whose images another process unites at the moment is left to that one.
//
// One that can't be united, as when its image is damaged, is not in the way of the others: err
// says so when they are done, and each time until it can. One that takes longer than limit
// does so the next time too, and is left as it is for good.
func (s *Store) UniteLeft(ctx context.Context, limit time.Duration, o UniteOptions) (all United, n int, err error) {
	domains, err := s.dir.List(ctx, shareFolder)
	if err != nil && !gone(err) {
		return all, 0, err
	}
	err = nil
	for _, e := range domains {
		if !e.Folder || CheckDomain(e.Name) != nil {
			continue
		}
		u, k, derr := s.uniteDomain(ctx, e.Name, limit, o)
		all.Pages, all.Bytes, n = all.Pages+u.Pages, all.Bytes+u.Bytes, n+k
		if cause := context.Cause(ctx); cause != nil {
			return all, n, cause
		}
		err = errors.Join(err, derr)
	}
	return all, n, err
}

// uniteDomain is UniteLeft for one trust domain.
func (s *Store) uniteDomain(ctx context.Context, domain string, limit time.Duration, o UniteOptions) (all United, n int, err error) {
	c, err := s.Share(domain)
	if err != nil {
		return all, 0, err
	}
	list, err := c.Beside()
	if err != nil {
		return all, 0, err
	}
	for _, im := range list {
		l, lerr := c.TryLockUniting()
		if errors.Is(lerr, vfs.ErrLocked) {
			break
		}
		if lerr != nil {
			return all, n, errors.Join(err, lerr)
		}
		l.Close() // Unite takes it itself
		st, ok := s.placed(ctx, Ref{im.VM, im.Number}, im.UUID)
		if !ok || st.gone {
			err = errors.Join(err, c.ForgetBeside(im)) // it has been removed, or replaced
			continue
		}
		n++
		u, uerr := s.uniteOne(ctx, st.ref, limit, o)
		all.Pages, all.Bytes = all.Pages+u.Pages, all.Bytes+u.Bytes
		if context.Cause(ctx) != nil {
			break
		}
		if errors.Is(uerr, context.DeadlineExceeded) {
			uerr = errors.Join(fmt.Errorf("it takes longer than %v, and is given up", limit), c.ForgetBeside(im))
		}
		if uerr != nil {
			err = errors.Join(err, fmt.Errorf("uniting of %v: %w", st.ref, uerr))
		}
	}
	return all, n, err
}

// uniteOne is Unite with a limit.
func (s *Store) uniteOne(ctx context.Context, r Ref, limit time.Duration, o UniteOptions) (United, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return s.Unite(ctx, r, o)
}

// unite is Unite of the checkpoint that says it is id.
func (s *Store) unite(ctx context.Context, r Ref, id *checkpoint.Identity, o UniteOptions) (u United, err error) {
	switch {
	case id.TrustDomain == "" || id.Digests == nil:
		u.Why = "it is in no trust domain"
	case id.NVRAM != nil:
		u.Why = "it has pages in NVRAM"
	case id.DiskSlots > 0:
		u.Why = "it has pages that were copied from disks"
	case len(id.Kept) > 0:
		u.Why = "disks are kept with it"
	}
	if u.Why != "" {
		return u, nil
	}
	hash, err := s.Trust(ctx, id.TrustDomain)
	if err != nil {
		return u, err
	}
	if d := id.Digests; d.Algorithm != hash.Algorithm() || d.Key != hash.Key() {
		u.Why = "its digests are not of this store"
		return u, nil
	}
	catalog, err := s.Share(id.TrustDomain)
	if err != nil {
		return u, err
	}
	lock, err := lockUniting(ctx, catalog)
	if err != nil {
		return u, err
	}
	defer lock.Close()
	d := &uniteDomain{s: s, name: id.TrustDomain, hash: hash, catalog: catalog, ages: make(map[uuid.UUID]age)}
	related, err := d.related(ctx, r)
	if err != nil {
		return u, err
	}
	u.Why = few
	for _, a := range related {
		one, err := d.unite(ctx, a, o)
		if a.ref == r {
			u.Why, u.UUID = one.Why, one.UUID
		} else if err != nil && (gone(err) || errors.Is(err, ErrNotFound) || errors.Is(err, ErrInUse)) {
			err = nil // another one, that goes away or is read
		}
		if err != nil {
			return u, err
		}
		if one.Why == "" {
			u.Pages, u.Bytes = u.Pages+one.Pages, u.Bytes+one.Bytes
		}
	}
	return u, nil
}

// few is why most are left as they are.
const few = "others have too few of its pages"

// uniteDomain is a trust domain while its images are united.
type uniteDomain struct {
	s       *Store
	name    string
	hash    *digest.Hasher
	catalog *share.Catalog
	ages    map[uuid.UUID]age
}

// age is where an image stands among the others: those refer to it that were made later. It
// is the same for one that has taken its place.
type age struct {
	ref  Ref
	made time.Time // its save had ended
	// may: it can be replaced, and looked for in others, as far as its save was told to.
	may, sameVM bool
}

func (a age) compare(b age) int {
	return cmp.Or(a.made.Compare(b.made), cmp.Compare(a.ref.VM, b.ref.VM), cmp.Compare(a.ref.N, b.ref.N))
}

// age reads how old an image is; not ok: it is not there.
func (d *uniteDomain) age(ctx context.Context, im share.Image) (a age, ok bool, err error) {
	if a, ok = d.ages[im.UUID]; ok {
		return a, true, nil
	}
	st, ok := d.s.placed(ctx, Ref{im.VM, im.Number}, im.UUID)
	if !ok {
		return a, false, nil
	}
	f, err := d.s.dir.Open(ctx, st.name, Unlocked)
	if err != nil {
		return a, false, nil // it goes away
	}
	defer f.Close()
	m, err := checkpoint.ReadMeta(f)
	if err = d.s.unlessGone(ctx, st.name, err); err != nil {
		return a, false, nil // what can't say who it is is verify's
	}
	rep := &m.Report
	a = age{ref: st.ref, made: m.Created.Add(time.Duration(rep.Seconds.Total * float64(time.Second))),
		may: !st.gone && rep.NotShared == "" && rep.ChunkSize <= m.PageSize, sameVM: rep.ShareVM}
	d.ages[im.UUID] = a
	return a, true, nil
}

// related are a checkpoint and the listed ones that have pages in common with it, in the order
// in which they were made: each can then be united with those before it, none of which is
// needed by it yet.
func (d *uniteDomain) related(ctx context.Context, r Ref) (list []age, err error) {
	n, err := d.open(ctx, r)
	if err != nil {
		return nil, err
	}
	defer n.close()
	self, _, err := d.age(ctx, share.Image{UUID: n.c.Meta.UUID, VM: r.VM, Number: r.N})
	if err != nil {
		return nil, err
	}
	if some, err := n.sample(ctx); err != nil || !some {
		return nil, err
	}
	list = append(list, self)
	for _, l := range n.lenders {
		if a, ok, err := d.age(ctx, l.Image); err != nil {
			return nil, err
		} else if ok && a.may {
			list = append(list, a)
		}
	}
	slices.SortFunc(list, age.compare)
	return list, nil
}

// open brings the index up to date, and opens it and a checkpoint.
func (d *uniteDomain) open(ctx context.Context, r Ref) (n *uniting, err error) {
	if _, err := d.s.TendShare(ctx, d.name, d.hash, ShareOptions{Scan: true, Wait: true}); err != nil {
		return nil, err
	}
	n = &uniting{s: d.s, hash: d.hash, lenders: make(map[uuid.UUID]*lender)}
	if n.index, err = d.catalog.Open(ctx, share.NewKeyID(d.hash)); err == nil {
		n.c, err = d.s.OpenCheckpoint(ctx, r, checkpoint.Options{})
	}
	if err == nil {
		n.sums, err = n.c.Digester(uniteChunks)
	}
	if err == nil {
		err = n.use()
	}
	if err != nil {
		n.close()
		return nil, err
	}
	return n, nil
}

// unite unites one checkpoint with those that are older.
func (d *uniteDomain) unite(ctx context.Context, a age, o UniteOptions) (u United, err error) {
	n, err := d.open(ctx, a.ref)
	if err != nil {
		return u, err
	}
	defer n.close()
	if id := &n.c.Meta.Identity; id.NVRAM != nil || id.DiskSlots > 0 || len(id.Kept) > 0 {
		u.Why = few
		return u, nil
	}
	n.o = o
	n.o.SameVM = o.SameVM || a.sameVM
	n.older = func(im share.Image) (bool, error) {
		b, ok, err := d.age(ctx, im)
		return ok && b.compare(a) < 0, err
	}
	if u.Why, err = n.run(ctx, &u); err != nil || u.Why != "" {
		return u, err
	}
	// The index finds what is left of it.
	return u, d.catalog.Note(share.Image{UUID: u.UUID, VM: a.ref.VM, Number: a.ref.N})
}

// lockUniting waits until nobody else unites images of a domain.
func lockUniting(ctx context.Context, c *share.Catalog) (l vfs.Locked, err error) {
	_, err = soon(ctx, uniteWait, func() (again bool, err error) {
		l, err = c.TryLockUniting()
		return errors.Is(err, vfs.ErrLocked), err
	})
	return l, err
}

// uniting is one Unite.
type uniting struct {
	s     *Store
	hash  *digest.Hasher
	o     UniteOptions
	index *share.Index
	// older tells which images may be referred to; nil: any.
	older func(share.Image) (bool, error)
	c     *Checkpoint // nil once it is closed
	sums  *checkpoint.Digester
	tx    *Tx // nil: it has not begun

	live    bitmap.Bitmap // slots that are in use
	lenders map[uuid.UUID]*lender
	refs    checkpoint.References // of the new image
	// to is where the page of each slot in use is in the new checkpoint, by the slots that
	// there were: in another image, or a slot of its own. Absent: that is not known yet.
	to *pagemap.Builder
}

// lender is another image that may have pages of the checkpoint.
type lender struct {
	share.Image
	pages int64 // that the index says it may have, of those that were asked about
	*checkpoint.Lent
	have  source.Ranges // segments that are there
	whole bool          // all are
	ref   int           // its number among the references
	used  bitmap.Bitmap // segments that are needed
}

func (n *uniting) close() {
	if n.index != nil {
		n.index.Close()
	}
	if n.c != nil {
		n.c.Close()
	}
	if n.tx != nil {
		n.tx.Abort() // nothing once it is there
	}
}

// run does it, or says why it is not done.
func (n *uniting) run(ctx context.Context, u *United) (why string, err error) {
	was := &n.c.Meta.Identity
	v := n.s.lookup().survey(was.UUID)
	v.leave = was.UUID
	if err := v.update(ctx); err != nil {
		return "", err
	}
	if v.needed(was.UUID) {
		return errNeeded.Error(), nil
	}
	if some, err := n.sample(ctx); err != nil || !some {
		return few, err
	}
	tx, err := n.s.beginAgain(ctx, n.c.Ref)
	if err != nil {
		return "", err
	}
	n.tx = tx
	if err := n.borrow(ctx); err != nil {
		return "", err
	}
	var enough bool
	if u.Pages, enough, err = n.find(ctx); err != nil || !enough {
		return few, err
	}
	size, err := n.write(ctx)
	if err != nil {
		return "", err
	}
	// Its lock would keep the old image in use.
	c := n.c
	n.c = nil
	if err := c.Close(); err != nil {
		return "", err
	}
	var old Removed
	switch _, err := n.tx.swap(ctx, was, v, &old, false); {
	case errors.Is(err, errNeeded) || errors.Is(err, ErrChanged) || errors.Is(err, errReplaced):
		return err.Error(), nil
	case err != nil:
		return "", err
	}
	n.tx.ended = true
	u.UUID, u.Bytes = n.tx.uuid, old.FlashBytes-size
	return "", n.tx.close()
}

// use finds out which slots of the image are in use.
func (n *uniting) use() error {
	im := n.c.Image
	slots := uint64(im.Segments()) * uint64(im.SegmentPages)
	n.live = bitmap.New(int64(slots))
	var err error
	if n.to, err = pagemap.New([]uint64{slots}); err != nil {
		return err
	}
	note := func(r pagemap.Run) error {
		if r.Kind == pagemap.Flash || r.Kind == pagemap.Delta {
			for i := range r.Count {
				n.live.Set(int64(r.Entry(i).Value()))
			}
		}
		return nil
	}
	err = n.c.PageMap.Runs(note)
	if bases := n.c.Sources().Bases; err == nil && bases != nil {
		err = bases.Runs(note)
	}
	return err
}

// each calls fn with the slots in use of PAGES segments, and the digests of their pages.
func (n *uniting) each(ctx context.Context, fn func(slot uint64, sum digest.Sum) error) error {
	im := n.c.Image
	per := uint64(im.SegmentPages)
	for number := range uint32(im.Segments()) {
		if im.SegmentKind(number) != image.Pages {
			continue
		}
		if err := context.Cause(ctx); err != nil {
			return err
		}
		for slot := uint64(number) * per; slot < uint64(number+1)*per; slot++ {
			if !n.live.Has(int64(slot)) {
				continue
			}
			sum, err := n.sum(slot)
			if err == nil {
				err = fn(slot, sum)
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// sum is the digest of the page that is, or is made of what is, in a slot of the image.
func (n *uniting) sum(slot uint64) (digest.Sum, error) {
	return n.sums.Sum(source.Location{Tier: source.OnFlash, Slot: slot})
}

// sample looks for some of the pages, chooses the images that seem to have most of them, and
// tells whether it is worth looking for all. It believes the index: nothing is opened yet.
func (n *uniting) sample(ctx context.Context) (worth bool, err error) {
	every := byte(uniteSample)
	if n.live.Count() <= uniteAll {
		every = 1
	}
	all := n.index.Images()
	asked, found := int64(0), int64(0)
	var pages [][]*lender
	err = n.each(ctx, func(_ uint64, sum digest.Sum) error {
		if sum[digest.Size-1]%every != 0 { // the index is by the first bytes
			return nil
		}
		asked++
		var by []*lender
		n.index.Each(sum, func(number int, _ uint64) bool {
			im := all[number]
			if im.UUID == n.c.Meta.UUID || n.o.SameVM && im.VM != n.c.Meta.VM {
				return true
			}
			l := n.lenders[im.UUID]
			if l == nil {
				l = &lender{Image: im}
				n.lenders[im.UUID] = l
			}
			l.pages++
			by = append(by, l)
			return true
		})
		if len(by) > 0 {
			pages = append(pages, by)
		}
		return nil
	})
	for id, l := range n.lenders {
		if err == nil && n.older != nil {
			var ok bool
			if ok, err = n.older(l.Image); !ok {
				delete(n.lenders, id)
			}
		}
	}
	for _, by := range pages {
		if slices.ContainsFunc(by, func(l *lender) bool { return n.lenders[l.UUID] != nil }) {
			found++
		}
	}
	if err != nil || found == 0 || found*uniteShare < asked {
		return false, err
	}
	most := slices.SortedFunc(maps.Values(n.lenders), func(a, b *lender) int { return cmp.Compare(b.pages, a.pages) })
	for _, l := range most[min(len(most), uniteImages):] {
		delete(n.lenders, l.UUID)
	}
	return true, nil
}

// borrow opens the images that were chosen, and keeps them from going away.
func (n *uniting) borrow(ctx context.Context) error {
	n.refs = n.c.References()
	keep := digest.NewCache(uniteChunks)
	for id, l := range n.lenders {
		b, err := n.tx.Borrow(ctx, Ref{l.VM, l.Number}, id)
		if errors.Is(err, ErrNotFound) {
			delete(n.lenders, id)
			continue
		}
		if err != nil {
			return err
		}
		if l.Lent, err = checkpoint.Lend(b.Object, n.hash, n.c.Image.PageSize, keep); err != nil {
			return err
		}
		if l.Lent == nil {
			delete(n.lenders, id)
			continue
		}
		l.have, l.whole = b.Segments, b.Whole
		l.ref = slices.IndexFunc(n.refs, func(r checkpoint.Reference) bool { return r.UUID == id })
		if l.ref < 0 {
			l.ref = len(n.refs)
			n.refs = append(n.refs, l.Reference)
		}
		l.used = bitmap.New(int64(l.Segments))
	}
	return nil
}

// has tells whether a page is in a slot of the image that is there.
func (l *lender) has(slot uint64, sum digest.Sum) (bool, error) {
	segment := slot / uint64(l.SegmentPages)
	if !l.whole && !l.have.Has(segment, segment) {
		return false, nil
	}
	return l.Has(slot, sum)
}

// find looks for all pages, by all of their digests, and tells whether others have enough.
func (n *uniting) find(ctx context.Context) (pages int64, enough bool, err error) {
	all := n.index.Images()
	type place struct {
		l       *lender
		segment uint64
	}
	near := make(map[place]int)
	var last *lender // pages that are together in one image are read together
	asked := int64(0)
	err = n.each(ctx, func(slot uint64, sum digest.Sum) error {
		asked++
		var at *lender
		var there uint64
		var failed error
		n.index.Each(sum, func(number int, slot uint64) bool {
			l := n.lenders[all[number].UUID]
			if l == nil || at != nil && l != last {
				return true
			}
			ok, err := l.has(slot, sum)
			if failed = err; ok {
				at, there = l, slot
			}
			return err == nil && (at == nil || at != last)
		})
		if failed != nil || at == nil {
			return failed
		}
		last = at
		n.to.Set(0, slot, pagemap.MakeForeign(pagemap.Foreign, at.ref, there))
		near[place{at, there / uint64(at.SegmentPages)}]++
		return nil
	})
	if err != nil {
		return 0, false, err
	}
	byRef := make(map[int]*lender)
	for _, l := range n.lenders {
		byRef[l.ref] = l
	}
	n.to.Change(0, func(e pagemap.Entry) pagemap.Entry {
		if e.Kind() != pagemap.Foreign {
			return e
		}
		ref, slot := pagemap.SplitForeign(e.Value())
		l := byRef[ref]
		segment := slot / uint64(l.SegmentPages)
		if near[place{l, segment}] < max(1, l.SegmentPages/uniteSparse) {
			return 0
		}
		l.used.Set(int64(segment))
		pages++
		return e
	})
	return pages, pages > 0 && pages*uniteShare >= asked, nil
}

// refer completes the references: those of which nothing is needed go, and entries count
// without them. Those that the checkpoint had come first and stay.
func (n *uniting) refer() {
	had := len(n.c.Meta.References)
	byRef := make(map[int]*lender)
	for _, l := range n.lenders {
		byRef[l.ref] = l
	}
	now := make([]int, len(n.refs))
	var refs checkpoint.References
	for i, r := range n.refs {
		if l := byRef[i]; l != nil {
			var need source.Ranges
			for run := range l.used.Runs() {
				need = append(need, source.Range{First: uint32(run.First), Count: uint32(run.N)})
			}
			r.NeedSegments = r.NeedSegments.Union(need)
		}
		if i >= had && len(r.NeedSegments) == 0 {
			continue
		}
		now[i] = len(refs)
		refs = append(refs, r)
	}
	n.refs = refs
	n.to.Change(0, func(e pagemap.Entry) pagemap.Entry {
		if e.Kind() != pagemap.Foreign {
			return e
		}
		ref, slot := pagemap.SplitForeign(e.Value())
		return pagemap.MakeForeign(pagemap.Foreign, now[ref], slot)
	})
}

// write writes the new image, and returns its size in bytes.
func (n *uniting) write(ctx context.Context) (int64, error) {
	n.refer()
	c := n.c
	im := c.Image
	codec, ok := image.Codecs[c.Meta.Report.Codec]
	if !ok {
		codec = image.DefaultCodec
	}
	k := &copier{c: c.Checkpoint, hash: n.hash, begin: time.Now()}
	var err error
	k.w, err = image.NewWriter(n.tx.Image(), image.Header{
		PageSize: im.PageSize, SegmentPages: im.SegmentPages, UUID: n.tx.UUID(), Created: c.Meta.Created,
		Features: image.Features{Incompat: im.Features.Incompat | image.HasReferences, Compat: image.HasDigests},
	}, codec, n.o.Workers)
	if err != nil {
		return 0, err
	}
	defer k.w.Abort() // nothing after Finish
	k.w.KeepDigests(n.hash)
	if err := n.segments(ctx, k); err != nil {
		return 0, err
	}
	if err := k.skeleton(ctx); err != nil {
		return 0, err
	}
	if err := n.finish(ctx, k); err != nil {
		return 0, err
	}
	return k.w.Len(), context.Cause(ctx)
}

// segments writes what is in use and not elsewhere: pages move together, and what is no
// whole page stays in segments as they were, under other numbers.
func (n *uniting) segments(ctx context.Context, k *copier) error {
	im := n.c.Image
	per := uint64(im.SegmentPages)
	var sr image.SegmentReader
	for number := range uint32(im.Segments()) {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		first := uint64(number) * per
		stays := func(i uint64) bool {
			return n.live.Has(int64(first+i)) && n.to.Get(0, first+i).Kind() == pagemap.Absent
		}
		wanted := false
		for i := range per {
			wanted = wanted || stays(i)
		}
		if !wanted {
			continue
		}
		seg, err := im.Segment(&sr, number)
		if err != nil {
			return err
		}
		if seg.Kind == image.Pages {
			for i := range uint64(seg.Len()) {
				if !stays(i) {
					continue
				}
				page, err := seg.Page(int(i))
				if err != nil {
					return err
				}
				sum, err := n.sum(first + i)
				if err == nil && n.hash.Sum(page) != sum {
					err = seg.Corrupt(fmt.Errorf("page %d: %w", i, digest.ErrMismatch))
				}
				var slot uint64
				if err == nil {
					slot, err = k.store(source.Content{Form: source.Whole, Data: page})
				}
				if err != nil {
					return err
				}
				n.to.Set(0, first+i, pagemap.Make(pagemap.Flash, slot))
			}
			sr.Recycle(seg)
			continue
		}
		b := k.w.NewBuffer(seg.Kind)
		b.Data = seg.Append(b.Data)
		for i := range uint64(seg.Len()) {
			sum, err := n.sum(first + i)
			if err != nil {
				k.w.Discard(b)
				return err
			}
			b.Sums = append(b.Sums, sum)
			n.to.Set(0, first+i, pagemap.Make(pagemap.Flash, uint64(b.Number)*per+i))
		}
		sr.Recycle(seg)
		if err := k.w.Submit(b); err != nil {
			return err
		}
	}
	if k.buf == nil {
		return nil
	}
	return k.w.Submit(k.buf)
}

// entry is an entry of the old page map in the new one. One of a kind that is not known may
// name a slot, which is another page's now.
func (n *uniting) entry(e pagemap.Entry) (pagemap.Entry, error) {
	switch e.Kind() {
	case pagemap.Flash:
		return n.to.Get(0, e.Value()), nil
	case pagemap.Delta:
		return pagemap.Make(pagemap.Delta, n.to.Get(0, e.Value()).Value()), nil
	}
	if !source.Default.Row(e.Kind()).Known() {
		return e, &source.UnknownError{Kind: e.Kind()}
	}
	return e, nil
}

// finish writes where all pages are, and what the checkpoint says of itself: what it said.
func (n *uniting) finish(ctx context.Context, k *copier) error {
	old := n.c.Meta
	m := *old
	m.UUID, m.Origin = n.tx.UUID(), old.First()
	m.References, m.Digests, m.MapChunks, m.Bases = nil, nil, nil, nil
	// It may fail only for what is not there, and all of it is in the old image.
	im := n.c.Image
	for i := range im.Chunks(image.Disks) {
		b, err := im.Chunk(image.Disks, i)
		if err == nil {
			err = k.chunk(image.Disks, b)
		}
		if err != nil {
			return err
		}
	}
	table, err := pagemap.New(old.BlockPages())
	if err != nil {
		return err
	}
	err = n.c.PageMap.Runs(func(r pagemap.Run) error {
		for i := range r.Count {
			if r.Kind == pagemap.Absent {
				continue
			}
			e, err := n.entry(r.Entry(i))
			if err != nil {
				return err
			}
			table.Set(r.Block, r.Page+i, e)
		}
		return context.Cause(ctx)
	})
	if err != nil {
		return err
	}
	err = table.Encode(copyChunk, func(at pagemap.Start, b []byte) error {
		m.MapChunks = append(m.MapChunks, at)
		return k.chunk(image.PageMap, b)
	})
	if err != nil {
		return err
	}
	var disk []digest.Sum
	for slot := range n.c.Sources().DiskSlots {
		sum, err := n.sums.Sum(source.Location{Tier: source.OnDisk, Slot: slot})
		if err != nil {
			return err
		}
		disk = append(disk, sum)
	}
	if m.Digests, err = checkpoint.WriteDigests(k.w, n.hash, nil, disk); err != nil {
		return err
	}
	for b := range slices.Chunk(n.refs.Append(nil), image.MaxChunk) {
		if err := k.chunk(image.References, b); err != nil {
			return err
		}
	}
	for i := range n.refs {
		m.References = append(m.References, n.refs[i].UUID)
	}
	if err := k.w.Drain(); err != nil {
		return err
	}
	if err := n.bases(k, &m); err != nil {
		return err
	}
	if err := k.w.Drain(); err != nil {
		return err
	}
	var counts source.Counts
	err = table.Runs(func(r pagemap.Run) error {
		source.Default.Count(&counts, r)
		return nil
	})
	if err != nil {
		return err
	}
	m.Report.Shared += m.Report.Cold - counts.Cold
	m.Report.Cold, m.Report.FlashBytes = counts.Cold, k.w.Len()
	// What else it refers to the old image needs, and that one is there until this one is.
	if err := n.tx.Refer(ctx, slices.Collect(maps.Keys(n.lenders))...); err != nil {
		return err
	}
	doc, id, err := m.Documents()
	if err == nil {
		err = k.w.Finish(doc, id)
	}
	return err
}

// bases writes what the deltas are against. All segments have been written.
func (n *uniting) bases(k *copier, m *checkpoint.Meta) error {
	was := n.c.Sources().Bases
	if was == nil {
		return nil
	}
	sizes := []uint64{uint64(k.w.Segments()) * uint64(k.w.SegmentPages())}
	for i := range n.refs {
		sizes = append(sizes, uint64(n.refs[i].Segments)*uint64(n.refs[i].SegmentPages))
	}
	table, err := pagemap.New(sizes)
	if err != nil {
		return err
	}
	err = was.Runs(func(r pagemap.Run) error {
		for i := range r.Count {
			page := r.Page + i
			if r.Kind == pagemap.Absent {
				continue
			}
			if r.Block == 0 {
				e := n.to.Get(0, page)
				if e.Kind() == pagemap.Absent {
					continue // a delta that no page has
				}
				page = e.Value()
			}
			e, err := n.entry(r.Entry(i))
			if err != nil {
				return err
			}
			table.Set(r.Block, page, e)
		}
		return nil
	})
	if err != nil {
		return err
	}
	return table.Encode(copyChunk, func(at pagemap.Start, b []byte) error {
		m.Bases = append(m.Bases, at)
		return k.chunk(image.Bases, b)
	})
}
