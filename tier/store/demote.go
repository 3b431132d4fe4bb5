package store

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/moved"
	"github.com/flic-migrate/flic-migrate/tier/nvram"
	"github.com/flic-migrate/flic-migrate/tier/source"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// Demoted says what has been moved from NVRAM to flash.
type Demoted struct {
	Images     int   `json:"images"`      // whose NVRAM parts were moved, or more of them
	Bytes      int64 `json:"bytes"`       // pages moved
	NVRAMBytes int64 `json:"nvram_bytes"` // freed
	// Left is why something was not moved, if so. It is where it was, and whole.
	Left error `json:"-"`
}

const (
	// crowded is the share of an extent, 1/crowded, that the newest checkpoints must
	// need for it to stay in NVRAM.
	crowded = 8
	// worthwhile is the share of an image's extents, 1/worthwhile, that must be there to
	// go: pieces are few then, and what stays for no newest checkpoint is a third of what
	// does, at most.
	worthwhile = 4
)

// Demote moves to flash what of NVRAM only older checkpoints need, those that are not
// among the newest of their VM, of which there are so many to keep:
//
//	NVRAM part of 7   ■ ■ ■ ■ │ ■ ■ ■ ■ │ ■ ■ ■ ■     extents
//	needed by 8       ■   ■ ■ │         │       ·     8 is the newest
//	                    stays │  moves  │   moves     less than 1/8 of the slots
//
//	read, check ─► tmp/….new ─► sync ─► 00000007.UUID.1.moved ─► NVRAM freed
//
// A piece has its name, durably, before anything is freed, and until then nobody takes
// notice of it: whenever it is cut off, each page is in NVRAM, on flash, or in both. The
// image is not touched, and who refers to it finds the pages by the names that they had.
// It takes no image's lock for longer than freeing takes; NVRAM that somebody has open is
// freed by a later call, as everything is that ctx left no time for.
func (s *Store) Demote(ctx context.Context, keep int) (d Demoted, err error) {
	list, err := s.demotable(ctx, keep)
	if err != nil || len(list) == 0 {
		return d, err
	}
	var ids []uuid.UUID
	for _, c := range list {
		ids = append(ids, c.uuid)
	}
	v := s.lookup().survey(ids...)
	// Of what is listed all slots are needed: then it takes no longer the more there are.
	v.keep, v.young = keep, !slices.ContainsFunc(list, func(c stored) bool { return c.gone })
	if err := v.update(ctx); err != nil {
		return d, err
	}
	if v.unclear != nil {
		d.Left = v.unclear
		return d, nil
	}
	for _, c := range list {
		dm := demotion{s: s, stored: c, v: v, d: &d}
		err := dm.run(ctx)
		if ctx.Err() != nil {
			return d, context.Cause(ctx)
		}
		if err != nil {
			d.Left = errors.Join(d.Left, fmt.Errorf("pages of %v stay in NVRAM: %w", c.ref, err))
		}
	}
	return d, nil
}

// demotable are the images that have something in NVRAM, but for the newest so many of
// each VM. It takes no lock.
func (s *Store) demotable(ctx context.Context, keep int) (list []stored, err error) {
	names, err := s.dir.List(ctx, nvramFolder)
	if err != nil || len(names) == 0 {
		return nil, err
	}
	if err := s.CheckHome(ctx); err != nil {
		if errors.Is(err, ErrCopied) {
			err = nil // it is another store's
		}
		return nil, err
	}
	owners := make(map[uuid.UUID]bool)
	for _, e := range names {
		var nf nvramFile
		if s.readSealed(ctx, nvramFolder+"/"+e.Name, "NVRAM file's name", maxSealed, &nf) != nil {
			continue // gc says so
		}
		f, err := s.openNVRAM(ctx, nf)
		if err != nil {
			continue // likewise
		}
		own, err := f.Owners(ctx, s.doc.UUID)
		f.Close()
		if err != nil && ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		for _, o := range own {
			owners[o.UUID] = true
		}
	}
	look := s.lookup()
	err = look.eachVM(ctx, "", func(vm string, o vmObjects) error {
		for _, st := range o.unlisted(vm) {
			if empty, err := look.unlistedIs(ctx, &st); err == nil && !empty && st.id != nil && owners[st.uuid] && !s.isTwin(ctx, st) {
				list = append(list, st)
				delete(owners, st.uuid)
			}
		}
		// NVRAM has the newest as a rule: of a thousand others nothing is read.
		for i, n := range slices.Backward(o.images) {
			if len(owners) == 0 {
				break
			}
			if err := context.Cause(ctx); err != nil {
				return err
			}
			st := stored{ref: Ref{vm, n}, name: Ref{vm, n}.object(imageSuffix)}
			// What can't say who it is is gc's, and verify's.
			var err error
			if st.uuid, err = s.owner(ctx, st.name); err != nil || !owners[st.uuid] {
				continue
			}
			delete(owners, st.uuid)
			if i < len(o.images)-keep {
				list = append(list, st)
			}
		}
		return nil
	})
	return list, err
}

// demotion is that of one image.
type demotion struct {
	s *Store
	stored
	v *survey
	d *Demoted

	im     *image.Image
	nv     *nvram.File
	pieces int
	done   source.Ranges // slots that have been moved
	per    uint64        // slots in an extent
	since  time.Time     // of the reservation
}

// errOutdated: an image, or what was moved of it, is not what it was.
var errOutdated = errors.New("it has changed meanwhile")

// run moves piece after piece. It leaves an image alone that a receiver puts together, which
// goes by the pieces that there are, and one of which another process moves pages: the next
// demotion looks again. A receiver that comes meanwhile waits.
func (m *demotion) run(ctx context.Context) error {
	c, err := m.s.tryClaim(ctx, m.uuid)
	if errors.Is(err, vfs.ErrLocked) {
		return nil
	}
	if err != nil {
		return err
	}
	defer c.close(context.WithoutCancel(ctx), m.s)
	counted := false
	for more := true; more; {
		var bytes int64
		var err error
		bytes, more, err = m.step(ctx)
		if errors.Is(err, errOutdated) || (gone(err) || cannotTell(err)) && m.changed(ctx) {
			return nil // somebody has removed or emptied it, or moves the same
		}
		if err != nil {
			return err
		}
		if m.d.Bytes += bytes; bytes > 0 && !counted {
			m.d.Images++
			counted = true
		}
	}
	return nil
}

// step moves one piece, and frees what it can. more tells whether there is another.
func (m *demotion) step(ctx context.Context) (bytes int64, more bool, err error) {
	s := m.s
	f, err := s.dir.Open(ctx, m.name, Unlocked)
	if err != nil {
		return 0, false, err
	}
	defer f.Close()
	if m.im, err = image.Open(f); err != nil {
		return 0, false, err
	}
	if m.im.UUID != m.uuid {
		return 0, false, errOutdated
	}
	if m.id, err = checkpoint.ReadIdentity(f); err != nil {
		return 0, false, err
	}
	// Of a copy in another place the NVRAM is the original's, which would not look for
	// pieces here. Whoever reads the copy says what is wrong with it.
	if !m.id.InNVRAM() || checkPlace(f.Name(), m.ref, m.id) != nil {
		return 0, false, nil
	}
	if m.nv, err = s.openNVRAM(ctx, nvramFile{m.id.NVRAM.Path, m.id.NVRAM.UUID}); err != nil {
		return 0, false, err
	}
	defer m.nv.Close()
	m.per = uint64(m.nv.PerExtent(m.id.PageSize))
	if err := m.readPieces(ctx); err != nil {
		return 0, false, err
	}
	want, more, ok, err := m.plan(ctx)
	if err != nil || !ok {
		return 0, false, err
	}
	if len(want) > 0 {
		if err := m.move(ctx, want); err != nil {
			if !IsUncertain(err) && m.changed(ctx) {
				err = errOutdated // and what was read was another's
			}
			return 0, false, err
		}
		m.done = m.done.Union(want)
	}
	if err := m.free(ctx); err != nil {
		return 0, false, err
	}
	return int64(want.Count()) * int64(m.id.PageSize), more && len(want) > 0, nil
}

// readPieces finds out what has been moved.
func (m *demotion) readPieces(ctx context.Context) error {
	o, err := m.s.objects(ctx, m.ref.VM)
	if err != nil {
		return err
	}
	m.pieces = len(o.pieces(m.ref.N, m.uuid))
	m.done, err = m.s.movedSlots(ctx, m.ref, m.uuid)
	return err
}

// need are the slots that somebody needs: all of one that is listed.
func (m *demotion) need() source.Ranges {
	if !m.gone {
		return source.Below(uint32(m.id.NVRAM.Slots))
	}
	return m.v.of[m.uuid].slots
}

// plan chooses the slots of the next piece. more tells whether there will be another; not
// ok, that it is not worthwhile.
func (m *demotion) plan(ctx context.Context) (want source.Ranges, more, ok bool, err error) {
	owned, since, err := m.nv.Owned(ctx, m.uuid)
	if err != nil {
		return nil, false, false, err
	}
	m.since = since
	slices.Sort(owned)
	need, young := m.need(), m.v.of[m.uuid].young
	leave := 0
	for _, index := range owned {
		first := uint64(index) * m.per
		last := min(first+m.per, uint64(m.id.NVRAM.Slots)) - 1
		if first > last {
			continue
		}
		if young.Within(first, last).Count()*crowded >= last-first+1 {
			continue
		}
		leave++
		if int64(want.Count()+m.per)*int64(m.id.PageSize) > moved.MaxBytes && len(want) > 0 {
			more = true
			continue
		}
		want = want.Union(need.Within(first, last).Minus(m.done))
	}
	return want, more, leave > 0 && leave*worthwhile >= len(owned), nil
}

// move writes a piece.
func (m *demotion) move(ctx context.Context, want source.Ranges) error {
	s := m.s
	if m.pieces == maxPieces {
		return fmt.Errorf("it has been moved in %d pieces", m.pieces)
	}
	part, err := checkpoint.OpenPart(ctx, s.fs, m.im, m.id, "", want, nil)
	if err != nil {
		return err
	}
	defer part.Close()
	name := spare()
	dst, err := s.createTmp(ctx, name)
	if err != nil {
		return err
	}
	defer func() {
		dst.Close()
		s.dir.Remove(context.WithoutCancel(ctx), name) // nothing once it has its name
	}()
	piece := &moved.Piece{UUID: m.uuid, PageSize: m.id.PageSize, Slots: want}
	if err := moved.Write(ctx, dst, piece, func(slot uint32, dst []byte) error { return part.Copy(dst, slot) }); err != nil {
		return err
	}
	unlock, err := s.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	if m.changed(ctx) {
		return errOutdated
	}
	return s.dir.Commit(ctx, name, movedName{m.ref.N, m.uuid, m.pieces + 1}.object(m.ref.VM))
}

// changed tells whether the image is not there any more, or has another piece: what was
// read of it is then perhaps not what it had.
func (m *demotion) changed(ctx context.Context) bool {
	id, err := m.s.owner(ctx, m.name)
	if err != nil || id != m.uuid {
		return true
	}
	f, err := m.s.dir.Open(ctx, movedName{m.ref.N, m.uuid, m.pieces + 1}.object(m.ref.VM), Unlocked)
	if err == nil {
		f.Close()
	}
	return !gone(err)
}

// free gives back the extents of which nothing is needed that has not been moved, unless
// somebody has the image open.
func (m *demotion) free(ctx context.Context) error {
	i, err := m.idle(ctx)
	if err != nil || i == nil {
		return err
	}
	n, err := m.s.freeNVRAM(ctx, *i)
	m.d.NVRAMBytes += n
	return err
}

// idle decides under the store lock what can be freed: nil is nothing now.
func (m *demotion) idle(ctx context.Context) (_ *idle, err error) {
	s := m.s
	unlock, err := s.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	f, err := s.dir.Open(ctx, m.name, Exclusive)
	if errors.Is(err, vfs.ErrLocked) || gone(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	i := &idle{id: m.id, had: reservation{since: m.since}}
	defer func() {
		if i.image == nil {
			f.Close()
		}
	}()
	if h, err := image.ReadHeader(f); err != nil || h.UUID != m.uuid || m.gone && m.s.isTwin(ctx, m.stored) {
		return nil, errors.Join(err, errOutdated)
	}
	// What has been committed since may need more of it. Pieces, and that who needed it is
	// not there, are durable after this.
	if err := m.v.update(ctx); err != nil {
		return nil, err
	}
	if m.v.unclear != nil {
		return nil, m.v.unclear
	}
	// One that was removed can have come back meanwhile, from another store.
	there, err := s.movedSlots(ctx, m.ref, m.uuid)
	if err == nil && len(m.done.Minus(there)) > 0 {
		err = errOutdated
	}
	if err != nil {
		return nil, err
	}
	if m.gone {
		err = s.settle(ctx)
	} else {
		err = s.dir.Sync(ctx, vmFolder(m.ref.VM))
	}
	if err != nil {
		return nil, err
	}
	// Nobody has it open, and who opens one that is listed from now on finds the pieces
	// first. Of one that is not he may ask for slots that are in none.
	if i.need = m.need().Minus(m.done); m.gone {
		i.image = f
	}
	return i, nil
}

// movedSlots are the slots of an image's NVRAM part that have been moved.
func (s *Store) movedSlots(ctx context.Context, r Ref, id uuid.UUID) (slots source.Ranges, err error) {
	list, err := s.openMoved(ctx, r, id)
	for _, src := range list {
		p, rerr := moved.Read(src)
		if rerr == nil {
			slots = slots.Union(p.Slots)
		}
		err = errors.Join(err, rerr)
		src.Close()
	}
	return slots, err
}

// dropMoved removes what was moved of an image that is durably no more, or that nobody
// needs. The caller holds the store lock, and o is what is in the VM's folder, or was when
// there were more of these.
func (s *Store) dropMoved(ctx context.Context, r Ref, id uuid.UUID, o vmObjects) (bytes int64, err error) {
	// The last one first: as long as there is one, it is found.
	for _, m := range slices.Backward(o.pieces(r.N, id)) {
		name := m.object(r.VM)
		f, err := s.dir.Open(ctx, name, Unlocked)
		if gone(err) {
			continue
		}
		if err != nil {
			return bytes, err
		}
		n, err := occupied(f)
		f.Close()
		if err == nil {
			err = s.dir.Remove(ctx, name)
		}
		if err != nil {
			return bytes, err
		}
		bytes += n
	}
	return bytes, nil
}

// punchMoved frees what nobody needs of what was moved of an image.
func (s *Store) punchMoved(ctx context.Context, r Ref, id uuid.UUID, need source.Ranges) (bytes int64, err error) {
	o, err := s.objects(ctx, r.VM)
	if err != nil {
		return 0, err
	}
	for _, m := range o.pieces(r.N, id) {
		name := m.object(r.VM)
		f, err := s.dir.Open(ctx, name, Unlocked)
		if err != nil {
			return bytes, err
		}
		p, err := moved.Read(f)
		f.Close()
		if err != nil {
			return bytes, err
		}
		var ranges []byteRange
		p.Unneeded(need, func(off, end int64) { ranges = append(ranges, byteRange{off, end}) })
		n, err := s.dir.Punch(ctx, name, ranges)
		if bytes += n; err != nil {
			return bytes, err
		}
	}
	return bytes, nil
}
