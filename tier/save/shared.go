package save

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/bitmap"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/digest"
	"github.com/flic-migrate/flic-migrate/tier/pagemap"
	"github.com/flic-migrate/flic-migrate/tier/rescue"
	"github.com/flic-migrate/flic-migrate/tier/share"
	"github.com/flic-migrate/flic-migrate/tier/source"
	"github.com/flic-migrate/flic-migrate/tier/store"
)

// What Options.Share can be: where pages are looked for that are not in the parent.
const (
	ShareStore = "store" // in all images of the store that are in the same trust domain
	ShareVM    = "vm"    // in those of the same VM
	ShareNone  = "none"  // nowhere
)

const (
	// A page is referred to only if there are others near it; see budget.

	// openAfter is how many pages an image may have before it is opened: each one that is
	// referred to is one more that a restore must hold open.
	openAfter = 8
	// indexWait is how long pages wait for the index to be there. The images that have come
	// since the last save are added to it, 15 ms for each GB or so of their pages.
	indexWait = 300 * time.Millisecond
	// At most so many images are added to the index by a save, and so many records merged;
	// gc does the rest.
	indexImages, indexRecords = 64, 4 << 20
	// sharedChunks is how many chunks of digests are kept, 8 MiB.
	sharedChunks = 32
)

// refs are the images that a save may refer to, in the order in which its entries count
// them: the parent's first. All methods are safe for concurrent use.
type refs struct {
	mu      sync.Mutex
	list    checkpoint.References
	parents int // the first so many
	peers   int // so many after those: of each member of a group
}

// all are those that there are now.
func (r *refs) all() checkpoint.References {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.list[:len(r.list):len(r.list)]
}

// addPeers makes room for the members of a group, which have no names yet, and returns the
// space of the first.
func (r *refs) addPeers(n int) source.Space {
	r.mu.Lock()
	defer r.mu.Unlock()
	first := source.Space(len(r.list) + 1)
	r.list, r.peers = append(r.list, make(checkpoint.References, n)...), n
	return first
}

// add is the space of an image, which becomes one of them if there is room.
func (r *refs) add(ref checkpoint.Reference) (source.Space, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := range r.list {
		if r.list[i].UUID == ref.UUID {
			return source.Space(i + 1), true
		}
	}
	if len(r.list)-r.peers >= maxReferences {
		return 0, false
	}
	r.list = append(r.list, ref)
	return source.Space(len(r.list)), true
}

// shared are the other images of the store that pages of a save may be in. The index tells
// which may have a page, and an image's own digests whether it has: the index is believed
// in nothing. Looking is safe from several goroutines.
type shared struct {
	ctx  context.Context
	tx   *store.Tx
	hash *digest.Hasher
	only string // VM whose images are looked in; empty: any
	refs *refs
	log  *slog.Logger

	catalog *share.Catalog

	stop  context.CancelFunc
	ready chan struct{} // closed when the index is there, or will never be
	index *share.Index  // nil: it will not
	late  atomic.Bool   // it was waited for too long

	par      *parent // nil: there is none
	pageSize int
	keep     *digest.Cache
	images   []sharedImage // by the index's numbers

	mu      sync.Mutex // of what follows, and of tx
	opened  map[uuid.UUID]*lent
	bySpace map[source.Space]*lent
	warned  sync.Once
}

// sharedImage is an image that the index knows.
type sharedImage struct {
	wanted atomic.Int32 // pages that it may have, before it is opened
	lent   atomic.Pointer[lent]
}

// lent is an image that can be referred to; without a Lent one that can't.
type lent struct {
	*checkpoint.Lent
	space source.Space
	have  source.Ranges // segments that are there
	whole bool          // all are
	// parents: the parent refers to it too, or is it. Then dense are the segments in which
	// enough is in use.
	parents bool
	dense   bitmap.Bitmap
}

// openShared begins to open the index, which goes on beside the save; nil if there is
// nothing to look in. It is closed with close.
func openShared(ctx context.Context, st *store.Store, tx *store.Tx, domain string, hash *digest.Hasher, o *Options) (*shared, error) {
	s := &shared{tx: tx, hash: hash, log: o.Log, ready: make(chan struct{}), keep: digest.NewCache(sharedChunks),
		opened: make(map[uuid.UUID]*lent), bySpace: make(map[source.Space]*lent)}
	if o.Share == ShareVM {
		s.only = o.VM
	}
	// A store without a checkpoint to look in costs a save nothing.
	if list, err := st.List(ctx, s.only); err != nil || len(list) == 0 {
		return nil, err
	}
	c, err := st.Share(domain)
	if err != nil {
		return nil, err
	}
	s.catalog = c
	s.ctx, s.stop = context.WithCancel(ctx)
	go func() {
		defer close(s.ready)
		err := rescue.Call(func() error {
			rep, err := st.TendShare(s.ctx, domain, hash, store.ShareOptions{Scan: true, Images: indexImages, Records: indexRecords})
			if rep.Broken != nil {
				s.log.Info("the index of shared pages is made again", "cause", rep.Broken)
			}
			if err = errors.Join(rep.Failed, err); err != nil && s.ctx.Err() == nil {
				s.log.Warn("fewer pages will be found in other checkpoints", "cause", err)
			}
			x, err := c.Open(s.ctx, share.NewKeyID(hash))
			if err != nil {
				return err
			}
			if x.Records() == 0 {
				return x.Close()
			}
			s.images, s.index = make([]sharedImage, len(x.Images())), x
			return nil
		})
		if err != nil && s.ctx.Err() == nil {
			s.log.Warn("no pages will be found in other checkpoints", "cause", err)
		}
	}()
	return s, nil
}

// known tells of images whether they were looked in from the beginning. It is good after
// close, too.
func (s *shared) known() func(uuid.UUID) bool {
	if s != nil && !s.late.Load() {
		select {
		case <-s.ready:
			if s.index != nil {
				return s.index.Has
			}
		default:
		}
	}
	return func(uuid.UUID) bool { return false }
}

// close ends the looking. The images that are referred to stay open as long as the
// transaction.
func (s *shared) close() {
	if s == nil {
		return
	}
	s.stop()
	<-s.ready
	if s.index != nil {
		if err := s.index.Err(); err != nil {
			s.log.Warn("pages may have been missed that are in other checkpoints", "cause", err)
			if err := s.catalog.Discard(s.index); err != nil {
				s.log.Warn("the damaged part of the index is not removed", "cause", err)
			}
		}
		s.index.Close()
		s.index = nil
	}
}

// wait waits for the index, once for all pages.
func (s *shared) wait() bool {
	select {
	case <-s.ready:
		return s.index != nil
	default:
	}
	if s.late.Load() {
		return false
	}
	t := time.NewTimer(indexWait)
	defer t.Stop()
	select {
	case <-s.ready:
		return s.index != nil
	case <-t.C:
		s.late.Store(true) // what comes when it is there is looked for
	case <-s.ctx.Done():
	}
	return false
}

// lookUp finds a page in another image, unless something better has been found for it. near
// is where the last one was: pages that are together in one image are read together.
func (s *shared) lookUp(it *item, near **lent) {
	if s == nil || it.hot || it.found != isNew && (it.found != isChanged || len(it.delta) <= s.pageSize/8) || !s.wait() {
		return
	}
	if it.sum == (digest.Sum{}) {
		s.hash.Put(&it.sum, it.data)
	}
	var found *lent
	var at uint64
	s.index.Each(it.sum, func(image int, slot uint64) bool {
		l := s.image(image)
		if l == nil || found != nil && l != *near || !l.has(s, slot, it.sum) {
			return true
		}
		found, at = l, slot
		return l != *near
	})
	if found == nil {
		return
	}
	*near = found
	it.found, it.cold, it.delta, it.pieces = isShared, true, nil, false
	it.entry = pagemap.MakeForeign(pagemap.Foreign, int(found.space)-1, at)
	if found.parents {
		it.found, it.moved = isEqual, true
		return
	}
	// A segment is read and unpacked as a whole, and those beside it with it.
	per := found.SegmentPages
	it.spotAt = spot{1<<63 | uint64(found.space)<<32 | at/uint64(per), max(1, per/sparse)}
}

// has tells whether a page is in a slot.
func (l *lent) has(s *shared, slot uint64, sum digest.Sum) bool {
	ok, err := l.Has(slot, sum)
	if err != nil {
		s.damaged(err)
		return false
	}
	n := slot / uint64(l.SegmentPages)
	return ok && (l.whole || l.have.Has(n, n)) && (!l.parents || int64(n) < l.dense.Pages() && l.dense.Has(int64(n)))
}

// damaged says once that an image can't be read: what it has is stored anew.
func (s *shared) damaged(err error) {
	if bug := (*rescue.Error)(nil); errors.As(err, &bug) {
		panic(bug)
	}
	s.warned.Do(func() { s.log.Warn("a checkpoint that could be referred to can't be read", "error", err) })
}

// image is an image of the index's, if it can be referred to.
func (s *shared) image(n int) *lent {
	i := &s.images[n]
	l := i.lent.Load()
	if l == nil {
		if i.wanted.Add(1) < openAfter {
			return nil
		}
		l = s.open(s.index.Images()[n])
		i.lent.Store(l)
	}
	if l.Lent == nil {
		return nil
	}
	return l
}

// open opens an image, and keeps it from going away.
func (s *shared) open(im share.Image) *lent {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l := s.opened[im.UUID]; l != nil {
		return l
	}
	l := &lent{}
	s.opened[im.UUID] = l
	if s.only != "" && im.VM != s.only || s.ctx.Err() != nil {
		return l
	}
	b, err := s.tx.Borrow(s.ctx, store.Ref{VM: im.VM, N: im.Number}, im.UUID)
	var open *checkpoint.Lent
	if err == nil {
		open, err = checkpoint.Lend(b.Object, s.hash, s.pageSize, s.keep)
	}
	if err != nil && !errors.Is(err, store.ErrNotFound) && s.ctx.Err() == nil {
		s.damaged(err)
	}
	if err != nil || open == nil {
		return l
	}
	space, ok := s.refs.add(open.Reference)
	if !ok {
		return l
	}
	if int(space) <= s.refs.parents {
		l.parents, l.dense = true, s.par.dense[s.par.theirs[space]]
	}
	l.space, l.have, l.whole, l.Lent = space, b.Segments, b.Whole, open
	s.bySpace[space] = l
	return l
}

// read copies the page at a place in another image into dst.
func (s *shared) read(dst []byte, at source.Location) error {
	s.mu.Lock()
	l := s.bySpace[at.Space]
	s.mu.Unlock()
	if l == nil {
		return errors.New("the image that it is in is not open")
	}
	return l.Page(dst, at.Slot)
}
