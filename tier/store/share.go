package store

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/digest"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/share"
	"github.com/flic-migrate/flic-migrate/tier/source"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// Share is the index of the pages that a trust domain's checkpoints have. Like that of disk
// images it is mapped, and in the store's directory whatever Dir keeps the checkpoints in. No
// lock of the store's is needed for it, and its own is never waited for with one of these
// held.
func (s *Store) Share(domain string) (*share.Catalog, error) {
	if err := CheckDomain(domain); err != nil {
		return nil, err
	}
	guarded, ok := s.dir.(*posixDir)
	if !ok {
		var err error
		if guarded, err = newPosixDir(s.fs, s.root); err != nil {
			return nil, err
		}
	}
	return share.NewCatalog(guarded.fs, guarded.Path(domainFolder(domain))), nil
}

// ShareOptions say how much TendShare does.
type ShareOptions struct {
	// Scan looks at all images of the store if there is no index yet. Else it is those that
	// saves have noted, and all only where the index was damaged.
	Scan bool
	// Clean removes what is of no use.
	Clean bool
	// Images is how many are added at most, Records how many records are merged at a time;
	// 0: any number.
	Images  int
	Records int64
	// Wait waits for somebody else who changes the index; else nothing is done then.
	Wait bool
}

// ShareReport says what TendShare did.
type ShareReport struct {
	Added int // images
	// Broken is what of the index could not be read, and Failed which images could not: what
	// they have is not found.
	Broken, Failed error
}

// TendShare brings the index of a trust domain up to date, of the digests that h makes. All
// of it is a cache.
func (s *Store) TendShare(ctx context.Context, domain string, h *digest.Hasher, o ShareOptions) (rep ShareReport, err error) {
	rep, err = s.tendShare(ctx, domain, h, o, false)
	if damage := err; integrity.IsCorrupt(damage) {
		// A power cut can have left it. It is gone now, and made again.
		rep, err = s.tendShare(ctx, domain, h, o, true)
		rep.Broken = errors.Join(damage, rep.Broken)
	}
	return rep, err
}

// tendShare is TendShare once; again: some of the index was damaged, and nobody else knows.
func (s *Store) tendShare(ctx context.Context, domain string, h *digest.Hasher, o ShareOptions, again bool) (rep ShareReport, err error) {
	c, err := s.Share(domain)
	if err != nil {
		return rep, err
	}
	key := share.NewKeyID(h)
	var l *share.Locked
	if o.Wait {
		l, err = c.Lock(ctx)
	} else if l, err = c.TryLock(); errors.Is(err, vfs.ErrLocked) {
		return rep, nil
	}
	if err != nil {
		return rep, err
	}
	defer l.Unlock()
	alive := s.aliveImages(ctx)
	x, err := c.Open(ctx, key)
	if err != nil {
		return rep, err
	}
	defer x.Close()
	state, err := c.State(x, key)
	if err != nil {
		return rep, err
	}
	if again {
		state = share.Broken
	}
	rep.Broken = x.Broken
	if state == share.Broken || o.Clean {
		if _, err := l.Clean(key, alive); err != nil {
			return rep, err
		}
	}
	news, err := c.News()
	if err != nil {
		return rep, err
	}
	scan := state == share.Broken || state == share.Unknown && o.Scan
	if scan {
		if news, err = s.shareable(ctx, domain, h); err != nil {
			return rep, err
		}
	}
	var add []share.Source
	for _, im := range news {
		switch {
		case x.Has(im.UUID):
		case o.Images > 0 && len(add) == o.Images:
			if !scan {
				continue
			}
			if err := c.Note(im); err != nil {
				return rep, err
			}
		default:
			add = append(add, share.Source{Image: im, Each: func(fn func(digest.Sum, uint64) error) error {
				return s.eachDigest(ctx, im, h, fn)
			}})
		}
	}
	if rep.Failed, err = l.Add(ctx, key, add); err != nil {
		return rep, err
	}
	rep.Added = len(add)
	limit := o.Records
	if limit == 0 {
		limit = math.MaxInt64
	}
	if err := l.Merge(ctx, key, limit, alive); err != nil {
		return rep, err
	}
	if o.Clean {
		if err := l.Drop(ctx, key, alive); err != nil {
			return rep, err
		}
	}
	if state == share.Unknown && !o.Scan {
		return rep, nil
	}
	return rep, l.Seal(key)
}

// noteShare leaves a note of a new image for the index of its trust domain, if its digests are
// of the store's key. It is a hint: without it later saves store these pages once more.
func (s *Store) noteShare(ctx context.Context, id *checkpoint.Identity) {
	d := id.Digests
	if d == nil || CheckDomain(id.TrustDomain) != nil {
		return
	}
	h, err := s.readDomain(ctx, id.TrustDomain)
	if err != nil || d.Algorithm != h.Algorithm() || d.Key != h.Key() {
		return
	}
	if c, err := s.Share(id.TrustDomain); err == nil {
		_ = c.Note(share.Image{UUID: id.UUID, VM: id.VM, Number: id.Number})
	}
}

// IndexShared brings the index of a checkpoint's trust domain up to date.
func (s *Store) IndexShared(ctx context.Context, r Ref) error {
	id, _, err := s.identity(ctx, r)
	if err != nil || id.TrustDomain == "" {
		return err
	}
	h, err := s.Trust(ctx, id.TrustDomain)
	if err != nil {
		return err
	}
	rep, err := s.TendShare(ctx, id.TrustDomain, h, ShareOptions{Scan: true})
	return errors.Join(rep.Failed, err)
}

// placed finds the image with a UUID where it was, listed or not.
func (s *Store) placed(ctx context.Context, was Ref, id uuid.UUID) (found stored, ok bool) {
	if CheckVM(was.VM) != nil || was.N < 1 || was.N > MaxNumber {
		return found, false
	}
	for i, name := range was.imageObjects(id) {
		who, err := s.whoIs(ctx, name)
		if err == nil && who != nil && who.UUID == id {
			return stored{ref: was, name: name, gone: i > 0, id: who}, true
		}
	}
	return found, false
}

// aliveImages tells which images there may be: it looks at names, once for each VM. One that
// has been replaced (Flatten) counts as its successor; whoever wants its pages sees it.
func (s *Store) aliveImages(ctx context.Context) func(share.Image) bool {
	known := make(map[string]map[int]bool)
	return func(im share.Image) bool {
		there, asked := known[im.VM]
		if !asked {
			there = make(map[int]bool)
			known[im.VM] = there
			err := CheckVM(im.VM)
			var list []Entry
			if err == nil {
				list, err = s.dir.Look(ctx, vmFolder(im.VM), func(name string) bool { return !strings.HasSuffix(name, imageSuffix) })
			}
			if gone(err) {
				list, err = nil, nil
			}
			// What only stands for a number that was used is empty.
			list = slices.DeleteFunc(list, func(e Entry) bool { return e.Stamp != vfs.Stamp{} && e.Stamp.Size == 0 })
			for _, st := range objectsOf(im.VM, list).all(im.VM) {
				there[st.ref.N] = true
			}
			there[0] = err != nil // it can't be told
		}
		return there[im.Number] || there[0]
	}
}

// shareable are the images of a trust domain with digests that h makes. What can't say who
// it is is none.
func (s *Store) shareable(ctx context.Context, domain string, h *digest.Hasher) (list []share.Image, err error) {
	l := s.lookup()
	err = l.eachVM(ctx, "", func(vm string, o vmObjects) error {
		for _, st := range o.all(vm) {
			if err := context.Cause(ctx); err != nil {
				return err
			}
			id, err := l.whoIs(ctx, st.name)
			switch {
			case gone(err) || cannotTell(err) || errors.Is(err, errNotObject) || err == nil && id == nil:
				continue
			case err != nil:
				return err
			}
			if d := id.Digests; d != nil && id.TrustDomain == domain && d.Algorithm == h.Algorithm() && d.Key == h.Key() {
				list = append(list, share.Image{UUID: id.UUID, VM: st.ref.VM, Number: st.ref.N})
			}
		}
		return nil
	})
	return list, err
}

// errOtherKey: an image's digests don't compare with the index's.
var errOtherKey = errors.New("its digests are of another key")

// eachDigest gives the digests of an image to an index. It takes no lock: what it reads is
// checked, and what goes away meanwhile is missed.
func (s *Store) eachDigest(ctx context.Context, im share.Image, h *digest.Hasher, fn func(digest.Sum, uint64) error) error {
	st, ok := s.placed(ctx, Ref{im.VM, im.Number}, im.UUID)
	if !ok {
		return nil // it has been removed
	}
	if d := st.id.Digests; d == nil || d.Algorithm != h.Algorithm() || d.Key != h.Key() {
		return errOtherKey
	}
	f, err := s.dir.Open(ctx, st.name, Unlocked)
	if gone(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if err := s.unlessGone(ctx, st.name, checkpoint.EachDigest(f, fn)); !gone(err) {
		return err
	}
	return nil // it was removed while it was read
}

// Borrowed is an image that a transaction may refer to, and keeps from going away.
type Borrowed struct {
	Object
	// Segments are those that are certain to be there; all are if Whole is set.
	Segments source.Ranges
	Whole    bool
}

// Borrow opens the image with a UUID that has been checkpoint was, and keeps it, and what is
// there of it, until the transaction has ended; ErrNotFound if it is not there, or is about
// to go. It must not be called beside the transaction's other methods.
//
// Of a listed image nothing is ever freed; it is locked under the store lock, so that it is
// listed when the lock is had. Of one that is not listed what listed others need is there, and
// stays as long as it is locked: their needs are looked at when it is.
func (t *Tx) Borrow(ctx context.Context, was Ref, id uuid.UUID) (*Borrowed, error) {
	st, ok := t.s.placed(ctx, was, id)
	if !ok {
		return nil, fmt.Errorf("image %v of %v: %w", id, was, ErrNotFound)
	}
	b, err := t.s.borrow(ctx, st)
	if err != nil {
		return nil, err
	}
	t.holds = append(t.holds, heldImage{b.Object, st.ref, id})
	t.lends(st.ref.VM)
	if b.Whole {
		return b, nil
	}
	v := t.s.lookup().survey(id)
	v.there = true
	if err := v.update(ctx); err != nil {
		return nil, err
	}
	if v.unclear != nil {
		return nil, v.unclear
	}
	b.Segments = v.of[id].segments
	return b, nil
}

// borrow locks an image where it was found.
func (s *Store) borrow(ctx context.Context, st stored) (*Borrowed, error) {
	if !st.gone {
		unlock, err := s.lock(ctx)
		if err != nil {
			return nil, err
		}
		defer unlock()
	}
	f, err := s.dir.Open(ctx, st.name, Shared)
	if gone(err) || errors.Is(err, vfs.ErrLocked) {
		err = fmt.Errorf("image %v of %v is going away: %w", st.id.UUID, st.ref, ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	// It may have been emptied, or replaced, before it was locked.
	h, err := image.ReadHeader(f)
	if err == nil && h.UUID != st.id.UUID {
		err = fmt.Errorf("image %v of %v: %w", st.id.UUID, st.ref, ErrNotFound)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return &Borrowed{Object: f, Whole: !st.gone}, nil
}

// tendShares brings the indexes of all trust domains up to date, and removes what is of no
// use in them.
func (s *Store) tendShares(ctx context.Context) (added int, warnings []error, err error) {
	list, err := s.dir.List(ctx, shareFolder)
	if gone(err) {
		return 0, nil, nil
	}
	if err != nil {
		return 0, nil, err
	}
	for _, e := range list {
		if !e.Folder || CheckDomain(e.Name) != nil {
			continue
		}
		h, err := s.readDomain(ctx, e.Name)
		switch {
		case gone(err):
			continue
		case integrity.IsCorrupt(err):
			warnings = append(warnings, err)
			continue
		case err != nil:
			return added, warnings, err
		}
		rep, err := s.TendShare(ctx, e.Name, h, ShareOptions{Clean: true, Wait: true})
		added += rep.Added
		if err != nil {
			return added, warnings, err
		}
		// What a power cut has left of it is replaced.
		if rep.Failed != nil {
			warnings = append(warnings, rep.Failed)
		}
	}
	return added, warnings, nil
}
