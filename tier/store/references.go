package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/source"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// A checkpoint can refer to others whose images have bytes of its pages; its IDENTITY
// names them by UUID, and its REFERENCES say which bytes those are. What is referred to
// stays when it is removed, unlisted (.gone), and what nobody needs of it is freed.

// sharing is the content of sharing.json, which is written before the first
// reference is.
type sharing struct {
	References bool `json:"references"`
	// United: images may have been replaced by such as need more of others than they did
	// (Unite).
	United bool `json:"united,omitempty"`
}

// noted is what is noted of references; whole is false if there is no note, or a damaged
// one, which counts as if it said all that it can: that costs looks, and loses nothing.
func (s *Store) noted(ctx context.Context) (doc sharing, whole bool, err error) {
	err = s.readSealed(ctx, sharingFile, "note of references", maxSealed, &doc)
	switch {
	case gone(err):
		return sharing{}, false, nil
	case integrity.IsCorrupt(err):
		return sharing{References: true, United: true}, false, nil
	}
	return doc, err == nil, err
}

// noteSharing notes, durably, that there are references.
func (s *Store) noteSharing(ctx context.Context) error {
	if doc, whole, err := s.noted(ctx); err != nil || whole && doc.References {
		return err
	}
	unlock, err := s.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	// Another process may have been first, and have noted more.
	doc, whole, err := s.noted(ctx)
	if err != nil || whole && doc.References {
		return err
	}
	return s.writeSealed(ctx, sharingFile, sharing{References: true, United: doc.United})
}

// renoteSharing replaces a note that is damaged.
func (s *Store) renoteSharing(ctx context.Context) error {
	if doc, whole, err := s.noted(ctx); err != nil || whole || !doc.References {
		return err
	}
	return s.noteSharing(ctx)
}

// noteUnited notes, durably, that there may be images that need more of others than those
// did whose places they took: united ones, and those that were received under a number that
// another had. The caller holds the store lock, and has noted that there are
// references.
func (s *Store) noteUnited(ctx context.Context) error {
	doc, whole, err := s.noted(ctx)
	if err != nil || whole && doc.United {
		return err
	}
	return s.writeSealed(ctx, sharingFile, sharing{References: true, United: true})
}

// shares tells whether there may be references, and whether an image can need more than its
// name's did at the last look. It is what is noted, or what there is all the same: a backup
// can have left the note out, and what is freed for want of it is lost.
func (l *lookup) shares(ctx context.Context) (some, more bool, err error) {
	doc, whole, err := l.s.noted(ctx)
	if more = doc.United || !whole; err != nil || doc.References {
		return doc.References, more, err
	}
	err = l.eachVMAgain(ctx, func(vm string, o vmObjects) error {
		for _, n := range o.images {
			id, err := l.whoIs(ctx, Ref{vm, n}.object(imageSuffix))
			switch {
			case gone(err) || errors.Is(err, errNotObject):
			case cannotTell(err):
				some = true // what it refers to is looked for, and then it is said
			case err != nil:
				return err
			case id != nil && len(id.References) > 0:
				some = true
			}
			if some {
				return errFound
			}
		}
		return nil
	})
	if errors.Is(err, errFound) {
		err = nil
	}
	return some, more, err
}

// errFound ends a search.
var errFound = errors.New("found")

// stored is an image that is there, listed or not.
type stored struct {
	ref  Ref
	name string
	gone bool // removed or replaced, and kept for others
	id   *checkpoint.Identity
	uuid uuid.UUID // of unlisted ones
}

// all are the images in a VM's folder that may have content, without their identity:
// the removed ones too.
func (o vmObjects) all(vm string) (list []stored) {
	for _, n := range o.images {
		r := Ref{vm, n}
		list = append(list, stored{ref: r, name: r.object(imageSuffix)})
	}
	return append(list, o.unlisted(vm)...)
}

// unlisted are those of them that are not listed.
func (o vmObjects) unlisted(vm string) (list []stored) {
	for _, n := range o.removed {
		r := Ref{vm, n}
		list = append(list, stored{ref: r, name: r.object(removedSuffix), gone: true})
	}
	for _, k := range o.kept {
		r := Ref{vm, k.n}
		list = append(list, stored{ref: r, name: r.keptObject(k.id), gone: true})
	}
	return list
}

// unlessGone is err, which reading an object without a lock gave, or that the object is
// not there: a removal empties an image after it has taken its name, and the unlisted one with
// a VM's highest number under that name.
func (s *Store) unlessGone(ctx context.Context, name string, err error) error {
	if !integrity.IsCorrupt(err) {
		return err
	}
	f, openErr := s.dir.Open(ctx, name, Unlocked)
	if gone(openErr) {
		return openErr
	}
	if openErr != nil {
		return err
	}
	defer f.Close()
	if size, sizeErr := f.Size(); sizeErr == nil && size == 0 && strings.HasSuffix(name, removedSuffix) {
		return fmt.Errorf("%s was emptied: %w", f.Name(), fs.ErrNotExist)
	}
	return err
}

// whoIs reads who an image says it is: nil if it is empty.
func (s *Store) whoIs(ctx context.Context, name string) (*checkpoint.Identity, error) {
	f, err := s.dir.Open(ctx, name, Unlocked)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	size, err := f.Size()
	if err != nil || size == 0 {
		return nil, err
	}
	id, err := checkpoint.ReadIdentity(f)
	return id, s.unlessGone(ctx, name, err)
}

// unlistedIs reads which image one that is not listed is, and if it can, who it says it
// is: a power cut while it was emptied can have left a part of it. Empty is one of
// which nothing is left.
func (s *Store) unlistedIs(ctx context.Context, st *stored) (empty bool, err error) {
	f, err := s.dir.Open(ctx, st.name, Unlocked)
	if err != nil {
		return false, err
	}
	defer f.Close()
	size, err := f.Size()
	if err != nil || size == 0 {
		return true, err
	}
	h, err := image.ReadHeader(f)
	if err != nil {
		return false, err
	}
	st.uuid = h.UUID
	st.id, err = checkpoint.ReadIdentity(f)
	if cannotTell(err) {
		st.id, err = nil, nil
	}
	return false, err
}

// errMoved is what images is told of an image that has got another name since it was looked at,
// or is gone.
var errMoved = errors.New("it has another name by now")

// images calls fn for each image with one of these UUIDs that has content, until fn has said
// of each UUID that it is done, which takes it out of want. The header of one that is damaged
// can still say which it is; its id is then nil. If some are left that may be the listed one
// that can't say which it is, that is an error. As long as one is left, and something has got
// another name meanwhile, all are looked at again: it may be that one.
func (s *Store) images(ctx context.Context, want map[uuid.UUID]bool, fn func(stored) (done bool, err error)) error {
	_, err := soon(ctx, openLimit, func() (again bool, err error) {
		moved, err := s.imagesOnce(ctx, want, fn)
		return err == nil && moved && len(want) > 0, err
	})
	return err
}

// imagesOnce is images, which looks once; moved tells that something got another name.
func (s *Store) imagesOnce(ctx context.Context, want map[uuid.UUID]bool, fn func(stored) (done bool, err error)) (moved bool, err error) {
	look := s.lookup()
	var unclear error
	err = look.eachVM(ctx, "", func(vm string, o vmObjects) error {
		for _, st := range o.all(vm) {
			if err := context.Cause(ctx); err != nil {
				return err
			}
			who, err := look.whoIs(ctx, st.name)
			switch {
			case err == nil && who != nil:
				st.id, st.uuid = who, who.UUID
			case gone(err):
				moved = true
				continue
			case err == nil || st.gone && cannotTell(err):
				continue
			case cannotTell(err):
				var herr error
				if st.uuid, herr = look.owner(ctx, st.name); herr != nil && !gone(herr) {
					unclear = cmp.Or(unclear, fmt.Errorf("it can't be told what refers to what: %w", err))
				}
			default:
				return fmt.Errorf("it can't be told what refers to what: %w", err)
			}
			if !want[st.uuid] {
				continue
			}
			done, err := fn(st)
			switch {
			case errors.Is(err, errMoved):
				moved = true
			case err != nil:
				return err
			case done:
				delete(want, st.uuid)
			}
			if len(want) == 0 {
				return errFound
			}
		}
		return nil
	})
	if errors.Is(err, errFound) {
		return moved, nil
	}
	if err == nil {
		err = unclear
	}
	return moved, err
}

// uses is what listed checkpoints need of an image.
type uses struct {
	by       []Ref
	segments source.Ranges
	slots    source.Ranges // of its NVRAM part, and disk slots that it lends
	young    source.Ranges // those of the slots that the newest checkpoints need
}

// survey finds out what listed checkpoints need of some images. It looks up the IDENTITY
// of each listed image, and reads the REFERENCES of those that refer to one of them; no
// page map.
//
// It is brought up to date twice: first without a lock, which may take a while, of what the
// lookup has seen already or looks at now, and then
// under the store lock, for what has been committed since. In between a checkpoint can
// have gone away, and its needs still count: less is freed, until the next look.
//
// For that the folders are listed and nothing else: what has a name is nothing else later, or
// a whole copy of it, which needs less. Where it is noted that it can need more (noteUnited),
// all are looked at again: such a one has another Stamp.
type survey struct {
	s    *Store
	look *lookup
	of   map[uuid.UUID]*uses
	// first has the first bytes of those in of: most that somebody refers to are none of them.
	first [256]bool
	again bool               // it was brought up to date before
	done  map[Ref]vfs.Stamp  // the listed ones that are counted in of, as they were then
	open  map[uuid.UUID]bool // and replaced ones
	leave uuid.UUID          // this image's needs don't count
	keep  int                // so many of each VM are the newest
	young bool               // the needs of no others are asked for
	there bool               // asked for is what is certain to be there: needs of listed ones alone
	// listed are those in of that were listed at the last look, and where.
	listed map[uuid.UUID]Ref
	// unclear is why it can't be told what is needed, if so: then all is.
	unclear error
}

// survey begins one of the images with these UUIDs.
func (l *lookup) survey(ids ...uuid.UUID) *survey {
	v := &survey{s: l.s, look: l, of: make(map[uuid.UUID]*uses), done: make(map[Ref]vfs.Stamp), open: make(map[uuid.UUID]bool), listed: make(map[uuid.UUID]Ref)}
	for _, id := range ids {
		v.of[id] = new(uses)
		v.first[id[0]] = true
	}
	return v
}

// asked tells whether it is of an image.
func (v *survey) asked(id uuid.UUID) bool { return v.first[id[0]] && v.of[id] != nil }

// update counts the needs of all listed checkpoints that were not there at the last
// call.
func (v *survey) update(ctx context.Context) error {
	some, more, err := v.look.shares(ctx)
	if err != nil || !some {
		return err
	}
	if v.again {
		if err := v.cutOff(ctx); err != nil {
			return err
		}
	}
	each := v.look.eachVMSeen
	switch {
	case v.again && more:
		each = func(ctx context.Context, fn func(string, vmObjects) error) error { return v.look.eachVM(ctx, "", fn) }
	case v.again:
		each = v.look.eachVMAgain
	}
	v.again = true
	return each(ctx, func(vm string, o vmObjects) error {
		for i, n := range o.images {
			r := Ref{vm, n}
			young := i >= len(o.images)-v.keep
			refers, stamp := v.look.refers(vm, numbered(n, imageSuffix), v.asked)
			was, done := v.done[r]
			if done && was == stamp || v.young && !young {
				continue
			}
			if !refers {
				v.counted(r, stamp)
				continue
			}
			if err := context.Cause(ctx); err != nil {
				return err
			}
			name := r.object(imageSuffix)
			err := v.s.unlessGone(ctx, name, v.count(ctx, r, name, young))
			switch {
			case gone(err) || errors.Is(err, errNotObject):
				continue
			case integrity.IsCorrupt(err) || isUnsupported(err):
				v.unclear = fmt.Errorf("it can't be told what refers to what: %w", err)
			case err != nil:
				return err
			}
			v.counted(r, stamp)
		}
		for _, k := range o.kept {
			if v.there {
				break
			}
			if err := v.countOpen(ctx, Ref{vm, k.n}, k.id); err != nil {
				return err
			}
		}
		return nil
	})
}

// cutOff makes it unclear what is needed if a killed process has committed a group whose
// checkpoints have perhaps no names yet: they are listed when the store is next opened. The
// caller holds the store lock.
func (v *survey) cutOff(ctx context.Context) error {
	_, committing, err := v.s.groupNames(ctx)
	if err == nil && len(committing) > 0 {
		v.unclear = fmt.Errorf("it can't be told what refers to what: the commit of group %v was cut off", committing[0])
	}
	return err
}

// counted notes that a listed image has been looked at, as it is with this stamp.
func (v *survey) counted(r Ref, stamp vfs.Stamp) {
	v.done[r] = stamp
	if id := v.look.uuid(r.VM, numbered(r.N, imageSuffix)); v.asked(id) {
		v.listed[id] = r
	}
}

// countOpen counts what an image needs that a flattening has replaced, if somebody has it
// open: who opened it before has perhaps not opened yet what it refers to. It may have been
// freed all the same, before somebody opened the image for its own bytes.
func (v *survey) countOpen(ctx context.Context, r Ref, id uuid.UUID) error {
	if v.open[id] {
		return nil
	}
	name := r.keptObject(id)
	f, err := v.s.dir.Open(ctx, name, Exclusive)
	switch {
	case err == nil:
		return f.Close()
	case !errors.Is(err, vfs.ErrLocked):
		return nil // leftovers says what is wrong with it
	}
	// What nobody needed of it can have been freed, what it refers to with it: then
	// those who have it open now have come for its bytes alone.
	err = v.count(ctx, r, name, false)
	if err == nil {
		v.open[id] = true
	}
	if gone(err) || cannotTell(err) {
		err = nil
	}
	return err
}

// count counts what one checkpoint needs; young tells whether it is among the newest.
func (v *survey) count(ctx context.Context, r Ref, name string, young bool) error {
	id, err := v.look.whoIs(ctx, name)
	if err != nil || id == nil || id.UUID == v.leave || !slices.ContainsFunc(id.References, v.asked) {
		return err
	}
	f, err := v.s.dir.Open(ctx, name, Unlocked)
	if err != nil {
		return err
	}
	defer f.Close()
	// Since it was looked at it may have been flattened.
	if id, err = checkpoint.ReadIdentity(f); err != nil {
		return err
	}
	refs, err := checkpoint.ReadReferences(f)
	if err != nil {
		return err
	}
	if len(refs) != len(id.References) {
		return &integrity.CorruptError{File: f.Name(), What: "REFERENCES", Err: fmt.Errorf("%d, and IDENTITY lists %d", len(refs), len(id.References))}
	}
	for i := range refs {
		if u := v.of[refs[i].UUID]; u != nil {
			if !slices.Contains(u.by, r) {
				u.by = append(u.by, r)
			}
			u.segments = u.segments.Union(refs[i].NeedSegments)
			u.slots = u.slots.Union(refs[i].NeedSlots)
			if young {
				u.young = u.young.Union(refs[i].NeedSlots)
			}
		}
	}
	if id.DiskSlots == 0 {
		return nil
	}
	l, err := v.s.lent(ctx, r, id.UUID)
	if err != nil || l == nil {
		return err
	}
	for _, by := range l.Images {
		if u := v.of[by]; u != nil {
			u.slots = u.slots.Union(l.Needs(by))
		}
	}
	return nil
}

// needed tells whether an image has to be kept, or a part of it.
func (v *survey) needed(id uuid.UUID) bool {
	return v.unclear != nil || v.of[id] != nil && len(v.of[id].by) > 0
}

// settle makes durable that what is not there is not there. Nothing is freed before,
// or a power cut could bring back who needs it: then the caller holds the store lock.
func (s *Store) settle(ctx context.Context) error {
	vms, err := s.folders(ctx)
	if err != nil {
		return err
	}
	for _, vm := range vms {
		if err := s.dir.Sync(ctx, vmFolder(vm)); err != nil && !gone(err) {
			return err
		}
	}
	return s.dir.Sync(ctx, vmsFolder)
}

// References tells which checkpoints the images of a checkpoint's pages are in,
// by UUID, and which checkpoints refer to it.
func (s *Store) References(ctx context.Context, r Ref) (to []uuid.UUID, by []Ref, err error) {
	if r, err = s.Resolve(ctx, r); err != nil {
		return nil, nil, err
	}
	id, _, err := s.identity(ctx, r)
	if err != nil {
		return nil, nil, err
	}
	v := s.lookup().survey(id.UUID)
	if err = v.update(ctx); err == nil {
		err = v.unclear
	}
	return id.References, v.of[id.UUID].by, err
}

// hold locks the images with these UUIDs, removed ones too, so that they stay as
// long as they are open.
func (s *Store) hold(ctx context.Context, ids []uuid.UUID) ([]heldImage, error) {
	if len(ids) == 0 {
		return nil, nil
	}
	var held []heldImage
	want := make(map[uuid.UUID]bool)
	for _, id := range ids {
		want[id] = true
	}
	done := false
	defer func() {
		if !done {
			for _, f := range held {
				f.Close()
			}
		}
	}()
	err := s.images(ctx, want, func(st stored) (bool, error) {
		f, err := s.openWith(ctx, st.name, st.uuid)
		if err != nil {
			return false, err
		}
		if f == nil {
			return false, errMoved
		}
		held = append(held, heldImage{f, st.ref, st.uuid})
		return true, nil
	})
	if err != nil {
		return nil, err
	}
	for id := range want {
		return nil, fmt.Errorf("image %v, which it refers to: %w", id, ErrNotFound)
	}
	done = true
	return held, nil
}
