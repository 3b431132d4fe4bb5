package store

import (
	"context"
	"encoding/json"
	"errors"
	"time"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/progress"
	"github.com/flic-migrate/flic-migrate/tier/source"
	"github.com/flic-migrate/flic-migrate/tier/transfer"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// A checkpoint goes to another store as its image is, with its UUID, so that it can be
// referred to there as here; and with it what it needs of the images that it refers to, which
// lie there unlisted, as those of removed checkpoints do. Hot pages, and those that are on
// disk images, go behind it: what an NVRAM file has is one store's alone, and a disk image
// need not be there. They lie there in .moved pieces, so that the image stays as it is, and
// with it all that refer to it.

// ErrOnDisks: a checkpoint has pages on disk images, and they were not sent.
var ErrOnDisks = errors.New("it has pages on disk images")

// SendOptions of Send.
type SendOptions struct {
	NVRAM string // the NVRAM file, if it is not where the checkpoint says
	// Disks are where disk images are now, by where the checkpoint says.
	Disks    map[string]string
	Progress func(progress.State) // may be nil
}

// Sent says what a Send has sent.
type Sent struct {
	Ref     Ref
	UUID    uuid.UUID
	Images  int   // its own, and those that it refers to
	Bytes   int64 // of images and of hot pages
	Skipped int64 // of those, that the receiver had from a transfer that was cut off
	// FromDisks is how many bytes were read from disk images, of those in Bytes.
	FromDisks int64
}

// Send writes a checkpoint, r without a number the VM's newest, as far as the receiver lacks
// it, and notes in have that it has it then. Each byte is checked, and a disk image that has
// pages and is not what it was is an error before anything is written.
func (s *Store) Send(ctx context.Context, r Ref, w *transfer.Writer, have *transfer.Have, opt SendOptions) (Sent, error) {
	d, err := s.Describe(ctx, r)
	if err != nil {
		return Sent{}, err
	}
	disks := checkpoint.DiskOptions{Moved: opt.Disks, Progress: opt.Progress}
	if have.Checkpoint(d.Meta.UUID, d.Meta.First()) {
		disks.Missing, disks.Check = true, checkpoint.CheckRead // none is read
	}
	c, err := s.OpenCheckpoint(ctx, d.Ref, checkpoint.Options{NVRAM: opt.NVRAM, Disks: disks})
	if err != nil {
		return Sent{}, err
	}
	defer c.Close()
	o := &sending{s: s, c: c, w: w, have: have, nvramFrom: opt.NVRAM, show: opt.Progress}
	defer o.close()
	if err := o.plan(ctx); err != nil {
		return Sent{}, err
	}
	return o.run(ctx)
}

// sending is one Send.
type sending struct {
	s         *Store
	c         *Checkpoint
	w         *transfer.Writer
	have      *transfer.Have
	nvramFrom string
	show      func(progress.State)

	head   transfer.Checkpoint
	images []*sentImage
	sent   Sent
	tick   time.Time
}

// sentImage is an image of which something is sent.
type sentImage struct {
	what *transfer.Sent
	im   *image.Image
	id   *checkpoint.Identity
	f    Object           // nil: the checkpoint's own
	part *checkpoint.Part // nil: no hot pages are sent
}

func (o *sending) close() {
	for _, i := range o.images {
		i.part.Close()
		if i.f != nil {
			i.f.Close()
		}
	}
}

// plan finds out what is to be sent.
func (o *sending) plan(ctx context.Context) error {
	m := o.c.Meta
	o.head = transfer.Checkpoint{VM: o.c.Ref.VM, Number: o.c.Ref.N, UUID: m.UUID, Origin: m.Origin}
	o.sent = Sent{Ref: o.c.Ref, UUID: m.UUID}
	if err := o.beside(ctx); err != nil || o.have.Checkpoint(m.UUID, m.First()) {
		return err
	}
	// Another that it was sent with, or before, can need some of it.
	own := &sentImage{im: o.c.Image, id: &m.Identity, what: &transfer.Sent{All: true, Had: o.have.Parts[m.UUID].Segments}}
	if m.NVRAM != nil {
		own.what.Slots = source.Below(uint32(m.NVRAM.Slots))
	}
	if err := o.disks(ctx, own.what); err != nil {
		return err
	}
	if err := o.add(ctx, own, o.c.Ref); err != nil {
		return err
	}
	refs, err := checkpoint.ReferencesOf(o.c.Image)
	if err != nil {
		return err
	}
	for i := range refs {
		r := &refs[i]
		had := o.have.Parts[r.UUID]
		segments, slots := r.NeedSegments.Minus(had.Segments), r.NeedSlots.Minus(had.Slots)
		if o.have.Whole[r.UUID] || len(segments)+len(slots) == 0 {
			o.head.Has = append(o.head.Has, r.UUID)
			continue
		}
		f, at, err := o.s.openReferred(ctx, Ref{r.VM, r.Number}, r.UUID)
		if err != nil {
			return err
		}
		si := &sentImage{f: f, what: &transfer.Sent{Segments: segments, Slots: slots}}
		o.images = append(o.images, si) // also if it fails, to be closed
		if si.im, err = image.Open(f); err == nil {
			si.id, err = checkpoint.ReadIdentity(f)
		}
		if err == nil {
			o.images = o.images[:len(o.images)-1]
			err = o.add(ctx, si, at)
		}
		if err != nil {
			return err
		}
	}
	for _, i := range o.images {
		o.head.Images = append(o.head.Images, *i.what)
	}
	return nil
}

// disks finds out which pages of disks the receiver lacks. It has those of checkpoints that
// it has, if they are on the same disk; of these one is chosen, the one with the most.
func (o *sending) disks(ctx context.Context, what *transfer.Sent) error {
	all := o.c.DiskSlots()
	what.Disk = source.Below(uint32(all))
	if all == 0 {
		return nil
	}
	for _, id := range o.c.Meta.References {
		if !o.have.Disks[id] {
			continue
		}
		lacks, err := o.lacks(ctx, id, all)
		if err != nil {
			return err
		}
		if lacks.Count() < what.Disk.Count() {
			what.Disk, what.DiskFrom = lacks, id
		}
	}
	return nil
}

// maxDiskRanges is how many ranges a BEGIN record names of disk slots.
const maxDiskRanges = 64 << 10

// lacks are the disk slots whose pages are none of those of the checkpoint with a UUID.
func (o *sending) lacks(ctx context.Context, id uuid.UUID, all uint64) (lacks source.Ranges, err error) {
	f, _, err := o.s.openReferred(ctx, o.referred(id), id)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	twins, err := o.c.DiskTwins(f)
	if err != nil {
		return nil, err
	}
	if twins == nil {
		return source.Below(uint32(all)), nil
	}
	for slot := range all {
		if slot%4096 == 0 { // it is done for each of many checkpoints
			if err := context.Cause(ctx); err != nil {
				return nil, err
			}
		}
		_, there, err := twins.Find(slot)
		if err != nil {
			return nil, err
		}
		if !there {
			lacks = lacks.Add(uint32(slot))
		}
	}
	return lacks.Coarse(maxDiskRanges), nil
}

// referred is where the image with a UUID was when the checkpoint came to refer to it.
func (o *sending) referred(id uuid.UUID) Ref {
	for _, r := range o.c.References() {
		if r.UUID == id {
			return Ref{r.VM, r.Number}
		}
	}
	return Ref{}
}

// beside reads what lies beside the image. What is damaged is verify's, and stays here.
func (o *sending) beside(ctx context.Context) error {
	l, err := o.s.Label(ctx, o.c.Ref)
	if err != nil && !integrity.IsCorrupt(err) {
		return err
	}
	if len(l.Tags) > 0 || l.Note != "" {
		if o.head.Label, err = json.Marshal(l); err != nil {
			return err
		}
	}
	t, err := o.s.Touched(ctx, o.c.Ref)
	if err == nil && len(t.Runs) > 0 {
		o.head.Touched, err = json.Marshal(t)
	}
	if integrity.IsCorrupt(err) {
		err = nil
	}
	return err
}

// add opens what is sent of an image that lies at r.
func (o *sending) add(ctx context.Context, i *sentImage, r Ref) error {
	o.images = append(o.images, i)
	i.what.UUID, i.what.VM, i.what.Number = i.id.UUID, i.id.VM, i.id.Number
	i.what.Length, i.what.PageSize = i.im.Len(), i.im.PageSize
	if len(i.what.Slots) > 0 {
		pieces, err := o.s.openMoved(ctx, r, i.id.UUID)
		if err != nil {
			return err
		}
		path := ""
		if i.id.InNVRAM() {
			path = o.nvramFrom
		}
		if i.part, err = checkpoint.OpenPart(ctx, o.s.fs, i.im, i.id, path, i.what.Slots, sources(pieces)); err != nil {
			return err
		}
	}
	// The key is of all that is above.
	i.what.Start = min(o.have.Staged[i.what.Key()], i.what.End())
	return nil
}

// run sends what was planned.
func (o *sending) run(ctx context.Context) (Sent, error) {
	if err := o.w.Begin(&o.head); err != nil {
		return o.sent, err
	}
	for n, i := range o.images {
		if err := o.w.Image(n); err != nil {
			return o.sent, err
		}
		if err := o.image(ctx, i); err != nil {
			return o.sent, err
		}
	}
	if err := o.w.End(); err != nil {
		return o.sent, err
	}
	o.sent.Images = len(o.images)
	if len(o.images) == 0 {
		return o.sent, nil
	}
	o.have.Whole[o.sent.UUID] = true
	if origin := o.c.Meta.Origin; origin != uuid.Nil {
		o.have.First[origin] = true
	}
	if o.c.DiskSlots() > 0 {
		o.have.Disks[o.sent.UUID] = true
	}
	for _, i := range o.images[1:] {
		had := o.have.Parts[i.what.UUID]
		o.have.Parts[i.what.UUID] = transfer.Part{Segments: had.Segments.Union(i.what.Segments), Slots: had.Slots.Union(i.what.Slots)}
	}
	return o.sent, nil
}

func (o *sending) image(ctx context.Context, i *sentImage) error {
	want := func(k image.Kind, n uint32) bool {
		if i.what.All {
			return !k.IsSegment() || !i.what.Had.Has(uint64(n), uint64(n))
		}
		if k.IsSegment() {
			return i.what.Segments.Has(uint64(n), uint64(n))
		}
		// The rest of these is the other's own page map: see unused.
		return k != image.Skeleton && k != image.PageMap && k != image.Bases && k != image.References
	}
	if i.what.Start < i.what.Length {
		if err := i.im.Raw(want, func(off int64, b []byte) error { return o.data(ctx, i, off, b) }); err != nil {
			return err
		}
	} else {
		o.sent.Skipped += i.what.Length
	}
	page := make([]byte, i.what.PageSize)
	pos := i.what.Base()
	err := i.what.Slots.Each(func(slot uint32) error {
		var err error
		if pos+int64(len(page)) > i.what.Start {
			err = i.part.Copy(page, slot)
		}
		if err == nil {
			err = o.data(ctx, i, pos, page)
		}
		pos += int64(len(page))
		return err
	})
	if err != nil || len(i.what.Disk) == 0 {
		return err
	}
	disks := o.c.DiskPages()
	return i.what.Disk.Each(func(slot uint32) error {
		at := pos
		pos += int64(len(page))
		if pos <= i.what.Start {
			return o.data(ctx, i, at, page) // it has come
		}
		b, err := disks.Page(uint64(slot))
		if err == nil {
			err = o.data(ctx, i, at, b)
		}
		if err == nil && o.c.Meta.NeedsDisks() > 0 {
			o.sent.FromDisks += pos - max(at, i.what.Start)
		}
		return err
	})
}

// data sends those of some bytes that the receiver does not have.
func (o *sending) data(ctx context.Context, i *sentImage, pos int64, b []byte) error {
	if err := context.Cause(ctx); err != nil {
		return err
	}
	skip := min(max(i.what.Start-pos, 0), int64(len(b)))
	o.sent.Skipped += skip
	o.sent.Bytes += int64(len(b)) - skip
	if now := time.Now(); o.show != nil && now.Sub(o.tick) >= progress.Every {
		o.tick = now
		o.show(progress.State{Phase: "send", BytesOut: o.sent.Bytes})
	}
	return o.w.Data(pos+skip, b[skip:])
}

// Have is what this store need not be sent again.
func (s *Store) Have(ctx context.Context) (*transfer.Have, error) {
	h := transfer.NewHave()
	var ids []uuid.UUID
	look := s.lookup()
	err := look.eachVM(ctx, "", func(vm string, o vmObjects) error {
		for _, n := range o.images {
			id, _, err := look.identity(ctx, Ref{vm, n})
			switch {
			case err == nil:
				h.Whole[id.UUID] = true
				if id.Origin != uuid.Nil {
					h.First[id.Origin] = true
				}
				if id.DiskSlots > 0 {
					h.Disks[id.UUID] = true
				}
			case !gone(err) && !cannotTell(err) && !errors.Is(err, errNotObject):
				return err
			}
		}
		for _, st := range o.unlisted(vm) {
			if empty, err := look.unlistedIs(ctx, &st); err == nil && !empty {
				ids = append(ids, st.uuid)
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if len(ids) > 0 {
		v := look.survey(ids...)
		if err := v.update(ctx); err != nil {
			return nil, err
		}
		for _, id := range ids {
			if u := v.of[id]; v.unclear == nil && u != nil && len(u.by) > 0 && !h.Whole[id] {
				h.Parts[id] = transfer.Part{Segments: u.segments, Slots: u.slots}
			}
		}
	}
	return h, s.staged(ctx, h)
}

// staged adds what transfers that were cut off have left.
func (s *Store) staged(ctx context.Context, h *transfer.Have) error {
	list, err := s.dir.List(ctx, tmpFolder)
	if err != nil {
		return err
	}
	for _, e := range list {
		_, key, suffix, ok := parseTmp(e.Name)
		if !ok || suffix != stagedSuffix || e.Folder || e.Odd {
			continue
		}
		f, err := s.dir.Open(ctx, tmpFolder+"/"+e.Name, Shared)
		if errors.Is(err, vfs.ErrLocked) || gone(err) {
			continue // it is being received; who begins to meanwhile tries again
		}
		if err != nil {
			return err
		}
		size, err := f.Size()
		f.Close()
		if err != nil {
			return err
		}
		if size > 0 {
			h.Staged[key] = size
		}
	}
	return nil
}
