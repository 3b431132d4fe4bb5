package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"syscall"
	"time"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/moved"
	"github.com/flic-migrate/flic-migrate/tier/progress"
	"github.com/flic-migrate/flic-migrate/tier/source"
	"github.com/flic-migrate/flic-migrate/tier/transfer"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
	"github.com/flic-migrate/flic-migrate/tier/workingset"
)

// What is received of an image lies in tmp/KEY.staged, at the positions that it has in the
// stream, until all of the checkpoint is there: the name is of what is sent, so that a
// transfer that is cut off goes on. Then
//
//	claim                          of each image: nobody else puts it together (receiveclaim.go)
//	what the store has             of it, as far as it is whole, in the place of what has come:
//	                               a copy that takes the place of another never has less
//	moved pieces ─► tmp/….new      from the pages at the end of the staged images
//	verify                         each byte, with the IDENTITY that it is to have
//	tmp/VM@N.UUID.part             its end rewritten, synced
//	store lock: pieces, referred images, checkpoint get their names, in this order
//
// Until the last step nobody takes notice of any of it, and what a power cut leaves of the
// others belongs to nobody: gc frees it.

// StagedFor is how long gc keeps what a transfer that was cut off has left, as a rule.
const StagedFor = 72 * time.Hour

var (
	// ErrTaken: another checkpoint has the name that a received one is to have.
	ErrTaken = errors.New("another checkpoint has that name")
	// ErrLacks: a received checkpoint refers to what is not there.
	ErrLacks = errors.New("it was sent to a store that has what this one lacks")
)

// Stage is an object that is written to at any place.
type Stage interface {
	Object
	io.WriterAt
	Truncate(size int64) error
}

// Received says what has become of a checkpoint, or of a group, that was sent.
type Received struct {
	Ref     Ref
	UUID    uuid.UUID
	Sent    Ref   // its name in the store that it is from
	Already bool  // it was there
	Images  int   // that have come
	Bytes   int64 // that have come
	Group   bool  // it is a group, whose members have been received before it
	Members int   // of a group
	// DiskBytes is how many of those are pages that were on disk images.
	DiskBytes int64
	// NVRAMBytes is how many bytes of hot pages went to the NVRAM file; NoNVRAM says why none
	// did that were to.
	NVRAMBytes int64
	NoNVRAM    string
}

// ReceiveOptions of Receive.
type ReceiveOptions struct {
	// As is what the checkpoint, or the group, is to be called: with a number if it has one,
	// else the VM's next. Zero: as it was. Members of groups are called as they were.
	As Ref
	// NVRAM is the NVRAM file that hot pages of a checkpoint's own go to, as far as there is
	// room: what is said of their number does not count. Without a path they go to flash.
	NVRAM Reservation
	// Done is called when a checkpoint is durable. An error of it ends Receive.
	Done     func(Received) error
	Progress func(progress.State) // may be nil
}

// Receive makes checkpoints of this store of what Send has written, one after the other, up
// to the end of the stream. Each keeps its UUID. One that is damaged, or does not come to its
// end, is no checkpoint; what was received of it stays for a stream that goes on from there.
func (s *Store) Receive(ctx context.Context, r io.Reader, o ReceiveOptions) error {
	rd, err := transfer.NewReader(r)
	if err != nil {
		return err
	}
	done := func(got Received, err error) error {
		if err == nil && o.Done != nil {
			err = o.Done(got)
		}
		return err
	}
	var group *receivedGroup // whose members come now
	for n := 0; ; {
		k, b, err := rd.Next()
		switch {
		case err == io.EOF && group == nil:
			return nil // the stream is whole
		case err == io.EOF:
			err = rd.Damaged("it ends amid group %v", group.ref)
		case err == nil && k != transfer.Begin && (k != transfer.Group || group != nil):
			err = rd.Damaged("a record of kind %d where a checkpoint begins", k)
		}
		if err != nil {
			return err
		}
		if group == nil {
			if n++; n > 1 && o.As.N > 0 {
				return fmt.Errorf("several are sent, and can't all become %v", o.As)
			}
		}
		if k == transfer.Group {
			head, err := rd.ParseGroup(b)
			if err == nil {
				group, err = s.beginGroup(ctx, head, o.As)
			}
			if err != nil {
				return err
			}
			continue
		}
		head, err := rd.ParseBegin(b)
		if err != nil {
			return err
		}
		its := o
		if group != nil {
			its.As = Ref{}
		}
		in := &receiving{s: s, rd: rd, head: head, o: &its}
		got, err := in.run(ctx)
		in.close(ctx)
		if err == nil && !got.Already {
			// It is durable, and what is left of an earlier one under another name is gc's too.
			_ = s.freeTwins(ctx, []uuid.UUID{got.UUID})
		}
		if err = done(got, err); err != nil {
			return err
		}
		if group == nil {
			continue
		}
		last, err := group.member(got)
		if err != nil {
			return rd.Damaged("%v", err)
		}
		if last {
			if err := done(s.endGroup(ctx, group, o.As)); err != nil {
				return err
			}
			group = nil
		}
	}
}

// receiving is the receiving of one checkpoint.
type receiving struct {
	s    *Store
	rd   *transfer.Reader
	head *transfer.Checkpoint
	o    *ReceiveOptions

	ref    Ref          // what it is to be called; without a number, the VM's next
	all    listedImages // when it began
	images []*received
	holds  []Object
	claims []claim // from when all has come
	got    Received
	tick   time.Time
}

// received is an image that is being received.
type received struct {
	*transfer.Sent
	name string // of the object, which changes when it is whole
	f    Stage
	pos  int64 // what has come
	drop bool  // it is there already, listed, and held
	once bool  // what has come of it is of no use to another transfer
	part bool  // it has the name of an image in the making

	id     *checkpoint.Identity // as it is to be
	end    renamed
	first  int      // number of the first of its new pieces, less one
	pieces []string // names of new pieces
	files  []Object // of all pieces, for who reads it

	// from has those pages of disks that were not sent; nil: all were.
	from      *Checkpoint
	fromPages *checkpoint.DiskPages
	sums      *checkpoint.DiskSums // of its pages on disks; nil: it has none
	twins     *checkpoint.DiskTwins

	hot *hotPart // nil: nothing of it goes to NVRAM
}

func (r *receiving) close(ctx context.Context) {
	ctx = context.WithoutCancel(ctx)
	for _, i := range r.images {
		for _, f := range i.files {
			f.Close()
		}
		if i.from != nil {
			i.from.Close()
		}
		i.hot.close(ctx)
		for _, name := range i.pieces {
			r.s.dir.Remove(ctx, name) // nothing once it has its name
		}
		if i.part || i.once {
			r.s.dir.Remove(ctx, i.name) // likewise
		}
		if i.f != nil {
			i.f.Close()
		}
	}
	for _, f := range r.holds {
		f.Close()
	}
	for _, c := range r.claims {
		c.close(ctx, r.s)
	}
}

func (r *receiving) run(ctx context.Context) (Received, error) {
	h := r.head
	r.got = Received{UUID: h.UUID, Sent: Ref{h.VM, h.Number}}
	if _, err := ParseRef(r.got.Sent.String()); err != nil || h.Number < 1 {
		return r.got, r.rd.Damaged("it is called %q, which can't be", r.got.Sent)
	}
	if r.ref = r.got.Sent; r.o.As.VM != "" {
		r.ref = r.o.As
	}
	at, there, err := r.there(ctx)
	if err != nil {
		return r.got, err
	}
	if there {
		return r.already(at)
	}
	if len(h.Images) == 0 {
		return r.got, fmt.Errorf("checkpoint %v: %w", r.got.Sent, ErrLacks)
	}
	if err := r.free(ctx); err != nil {
		return r.got, err
	}
	if err := r.mayOwn(ctx); err != nil {
		return r.got, err
	}
	// Who sends takes for there what is listed, and a part of it can lie where its name says.
	var listed []uuid.UUID
	for _, id := range h.Has {
		if _, ok := r.all.image[id]; ok {
			listed = append(listed, id)
		}
	}
	for _, i := range h.Images[1:] {
		if _, ok := r.all.image[i.UUID]; ok {
			listed = append(listed, i.UUID)
		}
	}
	if err := r.s.freeTwins(ctx, listed); err != nil {
		return r.got, err
	}
	if r.holds, err = r.s.hold(ctx, h.Has); err != nil {
		if errors.Is(err, ErrNotFound) {
			err = fmt.Errorf("checkpoint %v: %w: %w", r.got.Sent, ErrLacks, err)
		}
		return r.got, err
	}
	if err := r.stage(ctx); err != nil {
		return r.got, err
	}
	if err := r.data(ctx); err != nil {
		return r.got, err
	}
	err = r.finish(ctx)
	if integrity.IsCorrupt(err) && !r.isStaged(err) {
		err = fmt.Errorf("checkpoint %v was received, and what this store has of others for it is damaged, or was freed meanwhile (what verify --all finds damaged there must be removed before it can come): %w", r.got.Sent, err)
	} else if integrity.IsCorrupt(err) {
		// With what is wrong in it none could go on.
		err = fmt.Errorf("checkpoint %v was received, and is not whole: %w", r.got.Sent, err)
		for _, i := range r.images {
			if i.f != nil {
				r.s.dir.Remove(context.WithoutCancel(ctx), i.name)
			}
		}
	}
	return r.got, err
}

// isStaged tells whether what an error says is damaged has been received: what this store had
// before can be damaged, too.
func (r *receiving) isStaged(err error) bool {
	var damage *integrity.CorruptError
	if !errors.As(err, &damage) {
		return false
	}
	return slices.ContainsFunc(r.images, func(i *received) bool {
		return i.f != nil && i.f.Name() == damage.File ||
			slices.ContainsFunc(i.files[min(i.first, len(i.files)):], func(f Object) bool { return f.Name() == damage.File })
	})
}

// there finds the checkpoint in this store, whatever image it has now.
func (r *receiving) there(ctx context.Context) (at Ref, there bool, err error) {
	r.all, err = r.s.allListed(ctx)
	at, there = r.all.checkpoint(r.head.UUID, r.head.Origin)
	return at, there, err
}

// already passes over a checkpoint that is there.
func (r *receiving) already(at Ref) (Received, error) {
	r.got.Already = true
	if err := r.mayBe(at); err != nil {
		return r.got, err
	}
	for {
		k, _, err := r.rd.Next()
		switch {
		case err == io.EOF:
			return r.got, r.rd.Damaged("the stream ends amid a checkpoint")
		case err != nil || k == transfer.End:
			return r.got, err
		case k == transfer.Begin:
			return r.got, r.rd.Damaged("a checkpoint begins amid another")
		}
	}
}

// mayBe accepts that the checkpoint is there, unless it was to have another name.
func (r *receiving) mayBe(at Ref) error {
	r.got.Ref = at
	if r.o.As.VM != "" && (at.VM != r.o.As.VM || r.o.As.N > 0 && at.N != r.o.As.N) {
		return fmt.Errorf("checkpoint %v is in this store already, as %v", r.got.Sent, at)
	}
	return nil
}

// free finds out that nobody has the name, if it is known: also before all is received. One
// that was removed here may come back.
func (r *receiving) free(ctx context.Context) error {
	if r.ref.N == 0 {
		return CheckVM(r.ref.VM)
	}
	taken, err := r.s.nameTaken(ctx, r.ref)
	if err == nil && taken {
		err = fmt.Errorf("checkpoint %v: %w in store %s; --as %s gives it the next number there", r.ref, ErrTaken, r.s.root, r.ref.VM)
	}
	return err
}

// nameTaken tells whether a checkpoint, or a save under way, has a name.
func (s *Store) nameTaken(ctx context.Context, r Ref) (bool, error) {
	o, err := s.objects(ctx, r.VM)
	if err != nil || slices.Contains(o.images, r.N) {
		return err == nil, err
	}
	at := Ref{r.VM, r.N - 1}
	err = s.taken(ctx, &at)
	return at.N == r.N, err
}

// stage opens what the images are received into.
func (r *receiving) stage(ctx context.Context) error {
	lacks := int64(0)
	for n := range r.head.Images {
		i := &received{Sent: &r.head.Images[n]}
		i.name = tmpFolder + "/" + i.Key().String() + stagedSuffix
		if n > 0 {
			if _, err := ParseRef(Ref{i.VM, i.Number}.String()); err != nil || i.Number < 1 {
				return r.rd.Damaged("an image is of %q, which can't be", Ref{i.VM, i.Number})
			}
			if err := r.holdListed(ctx, i); err != nil {
				return err
			}
		}
		r.images = append(r.images, i)
		if i.pos = i.Start; i.drop {
			continue
		}
		if err := r.open(ctx, i); err != nil {
			return err
		}
		size, err := i.f.Size()
		if err == nil && size < i.Start {
			err = fmt.Errorf("checkpoint %v: %w: %d bytes of image %v, of which it has %d", r.got.Sent, ErrLacks, i.Start, i.UUID, size)
		}
		if err != nil {
			return err
		}
		// Holes are not known before: at the worst it is found later that there is room.
		if i.All {
			lacks += i.End() - i.Start + int64(i.Pages())*int64(i.PageSize)
		}
	}
	info, err := r.s.fs.StatFS(r.s.root)
	if err == nil && info.Free < lacks {
		err = fmt.Errorf("checkpoint %v takes %d MB, and there are %d MB free in %s: %w", r.got.Sent, lacks>>20, info.Free>>20, r.s.root, syscall.ENOSPC)
	}
	return err
}

// holdListed finds out whether an image is there already, listed, and keeps it so.
func (r *receiving) holdListed(ctx context.Context, i *received) error {
	at, listed := r.all.image[i.UUID]
	if !listed {
		return nil
	}
	f, err := r.s.openWith(ctx, at.object(imageSuffix), i.UUID)
	if f != nil {
		r.holds = append(r.holds, f)
		i.drop = true
	}
	return err // nil without one: it has been removed since
}

// stageLimit is how long a staged image is waited for that somebody else has: who says what
// the store has looks at it for a moment.
const stageLimit = time.Second

// open opens what an image is received into. Another transfer can be receiving the same: if
// the image is the checkpoint's own that is an error, and else it comes twice.
func (r *receiving) open(ctx context.Context, i *received) error {
	_, err := soon(ctx, stageLimit, func() (again bool, err error) {
		i.f, err = r.s.dir.Stage(ctx, i.name)
		return errors.Is(err, vfs.ErrLocked), err
	})
	if !errors.Is(err, vfs.ErrLocked) {
		return err
	}
	switch {
	case i.UUID == r.head.UUID:
		return fmt.Errorf("checkpoint %v is being received already: %w", r.got.Sent, ErrInUse)
	case i.Start > 0:
		return fmt.Errorf("checkpoint %v: what a transfer has left of image %v, %v, is being gone on with by another one: %w", r.got.Sent, i.UUID, Ref{i.VM, i.Number}, ErrInUse)
	}
	i.name, i.once = tmpFolder+"/"+uuid.NewString()+stagedSuffix, true
	i.f, err = r.s.dir.Stage(ctx, i.name)
	return err
}

// data takes what comes, up to the checkpoint's end.
func (r *receiving) data(ctx context.Context) error {
	var i *received
	next := 0
	for {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		k, b, err := r.rd.Next()
		switch {
		case err == io.EOF:
			return r.rd.Damaged("the stream ends amid a checkpoint")
		case err != nil:
			return err
		case k == transfer.Begin:
			return r.rd.Damaged("a checkpoint begins amid another")
		case k == transfer.Image:
			n, err := r.rd.ParseImage(b, len(r.images))
			if err == nil && n != next {
				err = r.rd.Damaged("image %d, and not %d", n, next)
			}
			if err == nil {
				err = r.whole(i)
			}
			if err != nil {
				return err
			}
			i, next = r.images[n], n+1
		case k == transfer.Data && i == nil:
			return r.rd.Damaged("DATA of no image")
		case k == transfer.Data:
			if err := r.write(i, b); err != nil {
				return err
			}
		case k == transfer.End:
			if next != len(r.images) {
				return r.rd.Damaged("%d images of %d", next, len(r.images))
			}
			r.got.Images = next
			return r.whole(i)
		}
	}
}

// whole refuses an image of which the end has not come; nil is none.
func (r *receiving) whole(i *received) error {
	if i != nil && i.pos != i.End() {
		return r.rd.Damaged("%d bytes of %d of an image", i.pos, i.End())
	}
	return nil
}

func (r *receiving) write(i *received, b []byte) error {
	pos, data, err := r.rd.ParseData(b, i.pos, i.End())
	if err != nil {
		return err
	}
	if !i.drop {
		_, err = i.f.WriteAt(data, pos)
	}
	i.pos = pos + int64(len(data))
	r.got.Bytes += int64(len(data))
	r.got.DiskBytes += max(0, i.pos-max(pos, i.FirstDisk()))
	if now := time.Now(); r.o.Progress != nil && now.Sub(r.tick) >= progress.Every {
		r.tick = now
		r.o.Progress(progress.State{Phase: "receive", BytesIn: r.got.Bytes})
	}
	return err
}

// renamed is an image with another end, and perhaps other NVRAM frames.
type renamed struct {
	Object
	at     int64
	end    []byte
	frames []rewritten
}

// rewritten is a frame in the place of another.
type rewritten struct {
	at int64
	b  []byte
}

func (f *renamed) Size() (int64, error) { return f.at + int64(len(f.end)), nil }

// Close leaves the object to who has opened it.
func (f *renamed) Close() error { return nil }

func (f *renamed) ReadAt(b []byte, off int64) (n int, err error) {
	if off < f.at {
		n = int(min(int64(len(b)), f.at-off))
		if n, err = f.Object.ReadAt(b[:n], off); err != nil {
			return n, err
		}
		for _, w := range f.frames {
			if from := max(w.at, off); from < min(w.at+int64(len(w.b)), off+int64(n)) {
				copy(b[from-off:n], w.b[from-w.at:])
			}
		}
		if n == len(b) {
			return n, nil
		}
	}
	if off+int64(n) >= f.at+int64(len(f.end)) && len(b) > n {
		return n, io.EOF
	}
	m := copy(b[n:], f.end[off+int64(n)-f.at:])
	if n += m; n < len(b) {
		err = io.EOF
	}
	return n, err
}

// limited is the image at the beginning of what was staged: behind it are pages.
type limited struct {
	Object
	n int64
}

func (f limited) Size() (int64, error) { return f.n, nil }

func (f limited) ReadAt(b []byte, off int64) (int, error) {
	return io.NewSectionReader(f.Object, 0, f.n).ReadAt(b, off)
}

// finish makes a checkpoint of what has come.
func (r *receiving) finish(ctx context.Context) error {
	s := r.s
	if err := r.claim(ctx); err != nil {
		return err
	}
	// Others may have come to their end meanwhile.
	at, there, err := r.there(ctx)
	if err != nil {
		return err
	}
	if there {
		for _, i := range r.images {
			i.once = true
		}
		r.got.Already = true
		return r.mayBe(at)
	}
	for n, i := range r.images {
		if n > 0 && !i.drop {
			if err := r.holdListed(ctx, i); err != nil {
				return err
			}
			i.once = i.drop
		}
		if i.drop {
			continue
		}
		if err := r.prepare(ctx, n, i); err != nil {
			return err
		}
	}
	if err := r.verify(ctx); err != nil {
		return err
	}
	for _, i := range r.images {
		if i.drop {
			continue
		}
		if err := r.settle(ctx, i); err != nil {
			return err
		}
	}
	if len(r.images) > 1 || len(r.head.Has) > 0 {
		if err := s.noteSharing(ctx); err != nil {
			return err
		}
		// As with a save (Tx.Refer): what is referred to must not go with a power cut.
		if err := s.settle(ctx); err != nil {
			return err
		}
	}
	return r.commit(ctx)
}

// prepare finds out what an image says it is, gives it the IDENTITY that it is to have, and
// makes pieces of its hot pages.
func (r *receiving) prepare(ctx context.Context, n int, i *received) error {
	src := limited{i.f, i.Length}
	im, err := image.Open(src)
	if err != nil {
		return err
	}
	if i.id, err = checkpoint.ReadIdentity(src); err != nil {
		return err
	}
	if i.id.UUID != i.UUID || im.UUID != i.UUID || i.id.PageSize != i.PageSize || im.PageSize != i.PageSize {
		return im.Tail.Corrupt(image.Identity, fmt.Errorf("it is not image %v of pages of %d bytes", i.UUID, i.PageSize))
	}
	i.id.Kept = nil // they are the other store's, and stay there
	var part *checkpoint.NVRAMPart
	if i.id.NVRAM != nil {
		if part, err = checkpoint.ReadPart(im, i.id); err != nil {
			return err
		}
		// The file is the other store's.
		nv := *i.id.NVRAM
		nv.Path, nv.UUID, nv.Volatile = "", uuid.Nil, false
		i.id.NVRAM = &nv
	}
	i.end.Object = i.f
	if i.HasDisk() && i.id.Disks == 0 {
		return r.rd.Damaged("pages of disks, and the image has none there")
	}
	if i.id.Disks > 0 {
		// Of one that others need no page of a disk is, and its pieces may have some.
		slots, err := checkpoint.DiskSlotsOf(src)
		if err == nil && n == 0 {
			err = r.disks(ctx, i, src, slots)
		}
		if err != nil {
			return err
		}
		i.id.DiskSlots = int(slots)
		if i.sums, err = checkpoint.OpenDiskSums(src); err != nil {
			return err
		}
	}
	if n == 0 {
		// Without a number it gets one when nobody can take it any more.
		i.id.VM, i.id.Number = r.ref.VM, r.ref.N
		// It was removed here, and others need some of it: what is in NVRAM stays its own.
		if err := r.resume(ctx, im, i, part); err != nil {
			return err
		}
		if err := r.had(ctx, im, i, part); err != nil {
			return err
		}
	} else {
		i.id.VM, i.id.Number = i.VM, i.Number
		if err := r.merge(ctx, im, i, part); err != nil {
			return err
		}
	}
	// Pages have their places before IDENTITY says which these are.
	if err := r.pieces(ctx, im, i, part); err != nil {
		return err
	}
	return i.rename(im.Tail)
}

// resume takes over what is left of the checkpoint's own image under the number that it is to
// have, and holds it.
func (r *receiving) resume(ctx context.Context, im *image.Image, i *received, part *checkpoint.NVRAMPart) error {
	if r.ref.N == 0 {
		return nil
	}
	for _, name := range []string{r.ref.object(removedSuffix), r.ref.keptObject(i.UUID)} {
		have, err := r.s.openWith(ctx, name, i.UUID)
		if integrity.IsCorrupt(err) {
			continue // a power cut has left a part of one that was emptied
		}
		if err != nil {
			return err
		}
		if have == nil {
			continue
		}
		old, was, err := r.part(im, i, part, have)
		if err == nil {
			err = i.keepNVRAM(im, part, old, was)
		}
		if err != nil {
			return err
		}
		return r.moved(ctx, i, r.ref)
	}
	return r.s.dropOrphans(ctx, r.ref, i.UUID)
}

// moved finds the pieces that the store has of an image, which is held.
func (r *receiving) moved(ctx context.Context, i *received, at Ref) (err error) {
	i.files, err = r.s.openMoved(ctx, at, i.UUID)
	i.first = len(i.files)
	return err
}

// dropOrphans removes the moved pieces of an image that is not there: a receiver that was
// killed may have left them. The caller has the image's claim.
func (s *Store) dropOrphans(ctx context.Context, r Ref, id uuid.UUID) error {
	unlock, err := s.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	return s.dropOrphansLocked(ctx, r, id)
}

// dropOrphansLocked is dropOrphans for who holds the store lock.
func (s *Store) dropOrphansLocked(ctx context.Context, r Ref, id uuid.UUID) error {
	o, err := s.objects(ctx, r.VM)
	if err != nil || len(o.pieces(r.N, id)) == 0 {
		return err
	}
	for _, st := range o.all(r.VM) {
		if st.ref != r {
			continue
		}
		f, err := s.dir.Open(ctx, st.name, Unlocked)
		if err != nil {
			return err
		}
		size, err := f.Size()
		if err == nil && size > 0 {
			var h image.Header
			if h, err = image.ReadHeader(f); err == nil && h.UUID == id {
				err = errOutdated
			}
		}
		f.Close()
		if err != nil {
			return fmt.Errorf("whose the moved pieces of %v are: %w", r, err)
		}
	}
	if err := s.settle(ctx); err != nil {
		return err
	}
	_, err = s.dropMoved(ctx, r, id, o)
	return err
}

// keepNVRAM has the image own in NVRAM what it owns already as an image of this store, in
// the extents that this one names: another store's copy of it may be in others.
func (i *received) keepNVRAM(im *image.Image, part *checkpoint.NVRAMPart, old *image.Image, was *checkpoint.Identity) error {
	if i.id.NVRAM == nil || !was.InNVRAM() || was.NVRAM.Slots != i.id.NVRAM.Slots {
		return nil
	}
	here, err := checkpoint.ReadPart(old, was)
	if err != nil {
		return err
	}
	i.id.NVRAM = was.NVRAM
	return i.inExtents(im, part, here.Extents)
}

// inExtents has the image name other extents for the same slots.
func (i *received) inExtents(im *image.Image, part *checkpoint.NVRAMPart, extents []uint32) error {
	i.end.frames = nil
	now := checkpoint.NVRAMPart{Extents: extents, Slots: part.Slots}
	return im.Rewritten(image.NVRAM, now.Append(nil), func(off int64, frame []byte) error {
		i.end.frames = append(i.end.frames, rewritten{off, frame})
		return nil
	})
}

// rename gives the image its IDENTITY.
func (i *received) rename(t *image.Tail) error {
	doc, err := i.id.Document()
	if err == nil {
		i.end.at, i.end.end, err = t.Renamed(doc)
	}
	return err
}

// merge adds what this store has of an image already to what has come of it.
func (r *receiving) merge(ctx context.Context, im *image.Image, i *received, part *checkpoint.NVRAMPart) error {
	have, at, err := r.s.openReferred(ctx, Ref{i.VM, i.Number}, i.UUID)
	if integrity.IsCorrupt(err) && errors.Is(err, ErrNotFound) {
		return r.s.dropOrphans(ctx, Ref{i.VM, i.Number}, i.UUID)
	}
	if err != nil {
		return err
	}
	old, was, err := r.part(im, i, part, have)
	if err != nil {
		return err
	}
	i.id.VM, i.id.Number = at.VM, at.N
	if err := i.keepNVRAM(im, part, old, was); err != nil {
		return err
	}
	i.id.Kept = was.Kept
	// All of it, also what has come: who refers to the image now, or is about to, needs what
	// is here, and nobody has compared what has come with anything yet.
	if _, err := i.fill(old, source.Below(uint32(old.Segments()))); err != nil {
		return err
	}
	return r.moved(ctx, i, at)
}

// part opens what this store has of an image that is received, and refuses another image with
// its UUID. have is closed when all is done: it must not go before the other is in its place.
func (r *receiving) part(im *image.Image, i *received, part *checkpoint.NVRAMPart, have Object) (old *image.Image, was *checkpoint.Identity, err error) {
	r.holds = append(r.holds, have)
	if old, err = image.Open(have); err != nil {
		return nil, nil, err
	}
	if was, err = checkpoint.ReadIdentity(have); err != nil {
		return nil, nil, err
	}
	same, err := im.Alike(old)
	if err == nil && same && part != nil && was.NVRAM != nil {
		var here *checkpoint.NVRAMPart
		if here, err = checkpoint.ReadPart(old, was); err == nil {
			same = slices.Equal(here.Slots, part.Slots)
		}
	}
	if err == nil && !same {
		err = im.Tail.Corrupt(image.Identity, errors.New("this store has another image with its UUID"))
	}
	return old, was, err
}

// fill copies segments from what this store has of the image, those that are whole there.
func (i *received) fill(old *image.Image, segments source.Ranges) (there source.Ranges, err error) {
	err = old.Remains(func(k image.Kind, n uint32) bool {
		return k.IsSegment() && segments.Has(uint64(n), uint64(n))
	}, func(k image.Kind, n uint32, off int64, b []byte) error {
		there = there.Union(source.Ranges{{First: n, Count: 1}})
		_, err := i.f.WriteAt(b, off)
		return err
	})
	return there, err
}

// had adds to the checkpoint's own image what was not sent of it.
func (r *receiving) had(ctx context.Context, im *image.Image, i *received, part *checkpoint.NVRAMPart) error {
	if len(i.Had) == 0 {
		return nil
	}
	have, _, err := r.s.openReferred(ctx, Ref{i.VM, i.Number}, i.UUID)
	if integrity.IsCorrupt(err) && errors.Is(err, ErrNotFound) {
		return fmt.Errorf("checkpoint %v: %w: a part of image %v", r.got.Sent, ErrLacks, i.UUID)
	}
	if err != nil {
		return err
	}
	old, _, err := r.part(im, i, part, have)
	if err != nil {
		return err
	}
	there, err := i.fill(old, i.Had)
	if err != nil {
		return err
	}
	if lacks := i.Had.Minus(there); len(lacks) > 0 {
		return fmt.Errorf("checkpoint %v: %w: %d segments of image %v", r.got.Sent, ErrLacks, lacks.Count(), i.UUID)
	}
	return nil
}

// disks finds out where the pages of an image's n disk slots are, now that it needs no disk.
func (r *receiving) disks(ctx context.Context, i *received, src image.Source, n uint64) error {
	if !i.HasDisk() {
		return fmt.Errorf("checkpoint %v: %w", r.got.Sent, ErrOnDisks)
	}
	if len(i.Disk) > 0 && i.Disk[len(i.Disk)-1].End() > n {
		return r.rd.Damaged("pages of disk slots up to %d of %d", i.Disk[len(i.Disk)-1].End(), n)
	}
	if i.DiskFrom == uuid.Nil {
		if i.Disk.Count() != n {
			return r.rd.Damaged("pages of %d disk slots of %d", i.Disk.Count(), n)
		}
		return nil
	}
	at, there := r.all.image[i.DiskFrom]
	if !there {
		return fmt.Errorf("checkpoint %v: %w: pages of disks of checkpoint %v", r.got.Sent, ErrLacks, i.DiskFrom)
	}
	c, err := r.s.OpenCheckpoint(ctx, at, checkpoint.Options{Disks: checkpoint.DiskOptions{Missing: true, Check: checkpoint.CheckRead}})
	if err != nil {
		return err
	}
	i.from, i.fromPages = c, c.DiskPages()
	if c.Meta.UUID != i.DiskFrom {
		return fmt.Errorf("checkpoint %v: %w", at, ErrChanged)
	}
	f, _, err := r.s.openReferred(ctx, at, i.DiskFrom)
	if err != nil {
		return err
	}
	r.holds = append(r.holds, f)
	i.twins, err = checkpoint.OpenDiskTwins(src, f)
	if err == nil && i.twins == nil {
		err = fmt.Errorf("checkpoint %v: %w: %v has nothing on the same disks", r.got.Sent, ErrLacks, at)
	}
	return err
}

// diskPage copies the page of a disk slot. That it is the right one verify finds out.
func (i *received) diskPage(slot uint32, b []byte) error {
	if at, ok := place(i.Disk, slot); ok {
		_, err := i.f.ReadAt(b, i.FirstDisk()+int64(at)*int64(i.PageSize))
		return err
	}
	twin, ok, err := i.twins.Find(uint64(slot))
	if err != nil {
		return err
	}
	if !ok {
		return fmt.Errorf("disk slot %d: %w", slot, ErrLacks)
	}
	page, err := i.fromPages.Page(twin)
	copy(b, page)
	return err
}

// place is where a number is among those of a set, in their order.
func place(set source.Ranges, n uint32) (at uint64, ok bool) {
	for _, run := range set {
		if n < run.First {
			break
		}
		if uint64(n) < run.End() {
			return at + uint64(n-run.First), true
		}
		at += uint64(run.Count)
	}
	return 0, false
}

// pieces makes moved pieces of the pages that have come. Where the store has pieces of the
// image, those of their pages that nobody needed may have been freed: they are put back.
func (r *receiving) pieces(ctx context.Context, im *image.Image, i *received, part *checkpoint.NVRAMPart) error {
	if len(i.Slots) > 0 && (part == nil || i.Slots[len(i.Slots)-1].End() > uint64(len(part.Slots))) {
		return im.Corrupt(image.NVRAM, 0, errors.New("hot pages have come that it does not have"))
	}
	first := uint32(i.id.FirstDiskSlot())
	page := func(slot uint32, b []byte) error {
		if slot >= first {
			return i.diskPage(slot-first, b)
		}
		at, _ := place(i.Slots, slot)
		if _, err := i.f.ReadAt(b, i.Base()+int64(at)*int64(i.PageSize)); err != nil {
			return err
		}
		if integrity.Checksum(b) != part.Slots[slot].CRC {
			return im.Corrupt(image.NVRAM, 0, fmt.Errorf("page of slot %d: %w", slot, integrity.ErrChecksum))
		}
		return nil
	}
	want := i.Slots
	if i.HasDisk() {
		want = want.Union(source.Ranges{{First: first, Count: uint32(i.id.DiskSlots)}})
	}
	all := want
	for k, f := range i.files {
		p, err := moved.Read(f)
		if err == nil && (p.UUID != i.UUID || p.PageSize != i.PageSize) {
			err = &integrity.CorruptError{File: f.Name(), What: "header", Err: errors.New("it is another image's")}
		}
		if err == nil {
			err = r.refill(ctx, i, movedName{i.id.Number, i.UUID, k + 1}.object(i.id.VM), p, all, part, page)
		}
		if err != nil {
			return err
		}
		want = want.Minus(p.Slots)
	}
	if i == r.images[0] {
		if err := r.hot(ctx, im, i, part, all.Minus(want), page); err != nil {
			return err
		}
		if i.hot != nil {
			want = want.Minus(source.Below(i.hot.slots))
		}
	}
	per := uint64(max(1, moved.MaxBytes/i.PageSize))
	for len(want) > 0 {
		var now source.Ranges
		for len(want) > 0 && now.Count() < per {
			take := min(uint64(want[0].Count), per-now.Count())
			now = append(now, source.Range{First: want[0].First, Count: uint32(take)})
			want = want.Minus(now)
		}
		if i.first+len(i.pieces) == maxPieces {
			return fmt.Errorf("hot pages of image %v come to more than %d pieces", i.UUID, maxPieces)
		}
		name := spare()
		dst, err := r.s.dir.Create(ctx, name)
		if err != nil {
			return err
		}
		i.pieces, i.files = append(i.pieces, name), append(i.files, dst)
		if err := moved.Write(ctx, dst, &moved.Piece{UUID: i.UUID, PageSize: i.PageSize, Slots: now}, page); err != nil {
			return err
		}
	}
	return nil
}

// refill puts pages back into a piece that is there, of an image that is held: where the piece
// has not the page that it had once, because nobody needed it, and only that page.
func (r *receiving) refill(ctx context.Context, i *received, name string, p *moved.Piece, slots source.Ranges, part *checkpoint.NVRAMPart, page func(uint32, []byte) error) error {
	f, err := r.s.dir.Reopen(ctx, name)
	if err != nil {
		return err
	}
	defer f.Close()
	first := uint32(i.id.FirstDiskSlot())
	is := func(slot uint32, b []byte) (bool, error) {
		if slot < first {
			return integrity.Checksum(b) == part.Slots[slot].CRC, nil
		}
		return i.sums.Is(uint64(slot-first), b)
	}
	b := make([]byte, p.PageSize)
	changed := false
	err = p.Slots.Each(func(slot uint32) error {
		if !slots.Has(uint64(slot), uint64(slot)) {
			return nil
		}
		_, err := f.ReadAt(b, p.Offset(slot))
		if err != nil {
			return err
		}
		if there, err := is(slot, b); err != nil || there {
			return err
		}
		if err := page(slot, b); err != nil {
			return err
		}
		right, err := is(slot, b)
		if err == nil && !right {
			err = &integrity.CorruptError{File: i.f.Name(), Offset: i.Base(), What: fmt.Sprintf("page of slot %d", slot), Err: integrity.ErrChecksum}
		}
		if err != nil {
			return err
		}
		changed = true
		_, err = f.WriteAt(b, p.Offset(slot))
		return err
	})
	if err == nil && changed {
		err = f.Sync()
	}
	return err
}

// verify reads and checks all of the checkpoint, as it is to be.
func (r *receiving) verify(ctx context.Context) error {
	own := r.images[0]
	o := checkpoint.Options{Name: r.ref.String(), Moved: own.sources()}
	o.Images = func(ctx context.Context, ref *checkpoint.Reference) (checkpoint.Source, []moved.Source, error) {
		for _, i := range r.images[1:] {
			if i.UUID == ref.UUID && !i.drop {
				return &i.end, i.sources(), nil
			}
		}
		f, at, err := r.s.openReferred(ctx, Ref{ref.VM, ref.Number}, ref.UUID)
		if err != nil || len(ref.NeedSlots) == 0 {
			return f, nil, err
		}
		pieces, err := r.s.openMoved(ctx, at, ref.UUID)
		return f, sources(pieces), err
	}
	c, err := checkpoint.Open(ctx, r.s.fs, &own.end, o)
	if err != nil {
		return err
	}
	defer c.Close()
	var first error
	err = c.Verify(ctx, func(err error) {
		if first == nil {
			first = err
		}
	})
	return errors.Join(err, first)
}

// kept is a piece that its reader does not close.
type keptOpen struct{ Object }

func (keptOpen) Close() error { return nil }

func (i *received) sources() (list []moved.Source) {
	for _, f := range i.files {
		list = append(list, keptOpen{f})
	}
	return list
}

// settle makes of what was staged the image that it is to be, durably. From here on it can't
// be gone on with: it has the name of an image in the making.
func (r *receiving) settle(ctx context.Context, i *received) error {
	if err := i.f.Sync(); err != nil {
		return err
	}
	name, err := r.reserve(ctx, i)
	if err != nil {
		return err
	}
	i.name = name
	if err = i.f.Truncate(i.end.at); err == nil {
		_, err = i.f.WriteAt(i.end.end, i.end.at)
	}
	for _, w := range i.end.frames {
		if err == nil {
			_, err = i.f.WriteAt(w.b, w.at)
		}
	}
	if err == nil {
		err = i.f.Sync()
	}
	return err
}

// reserve gives what was staged the name of an image in the making, and with it a number to
// the checkpoint's own.
func (r *receiving) reserve(ctx context.Context, i *received) (name string, err error) {
	unlock, err := r.s.lock(ctx)
	if err != nil {
		return "", err
	}
	defer unlock()
	if i == r.images[0] {
		if r.ref.N > 0 {
			err = r.free(ctx)
		} else {
			var o vmObjects
			if o, err = r.s.objects(ctx, r.ref.VM); err == nil {
				r.ref.N = o.last()
				err = r.s.taken(ctx, &r.ref)
				r.ref.N++
			}
			if err == nil {
				err = r.s.dropOrphansLocked(ctx, r.ref, i.UUID)
			}
		}
		if err == nil && r.ref.N > MaxNumber {
			err = fmt.Errorf("VM %q has used up its checkpoint numbers", r.ref.VM)
		}
		if err != nil {
			return "", err
		}
		i.id.Number = r.ref.N
		t, err := image.ReadTail(limited{i.f, i.Length})
		if err == nil {
			err = i.rename(t)
		}
		if err != nil {
			return "", err
		}
	}
	name = partName(Ref{i.id.VM, i.id.Number}, i.UUID)
	// What a receiver that was killed has left under that name is gc's, and in the way.
	if f, err := r.s.dir.Open(ctx, name, Exclusive); err == nil {
		err = r.s.dir.Remove(ctx, name)
		f.Close()
		if err != nil {
			return "", err
		}
	}
	if err := r.s.dir.Commit(ctx, i.name, name); err != nil {
		return "", err
	}
	i.part = true
	return name, nil
}

// commit gives all of it its names.
func (r *receiving) commit(ctx context.Context) error {
	s := r.s
	unlock, err := s.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	own := r.images[0]
	o, err := s.objects(ctx, r.ref.VM)
	if err != nil {
		return err
	}
	if slices.Contains(o.images, r.ref.N) {
		return fmt.Errorf("checkpoint %v: %w", r.ref, ErrTaken)
	}
	if r.ref.N <= o.last() && (len(r.images) > 1 || len(r.head.Has) > 0) {
		// What had the number before may be known by it to who is looking for references.
		if err := s.noteUnited(ctx); err != nil {
			return err
		}
	}
	for _, i := range slices.Concat(r.images[1:], r.images[:1]) {
		if i.drop {
			continue
		}
		at := Ref{i.id.VM, i.id.Number}
		if err := s.dir.Mkdir(ctx, vmFolder(at.VM)); err != nil {
			return err
		}
		if o, err := s.objects(ctx, at.VM); err != nil || len(o.pieces(at.N, i.UUID)) != i.first {
			return errors.Join(err, fmt.Errorf("what %v has in moved pieces: %w", at, errOutdated))
		}
		for k, name := range i.pieces {
			if err := s.dir.Commit(ctx, name, movedName{at.N, i.UUID, i.first + k + 1}.object(at.VM)); err != nil {
				return err
			}
		}
		if i == own {
			break
		}
		// In the place of the one that has less of it, if there is one.
		if err := s.dir.Replace(ctx, i.name, r.place(ctx, at, i.UUID)); err != nil {
			return err
		}
	}
	if err := r.beside(ctx); err != nil {
		return err
	}
	if own.hot != nil {
		own.hot.keep = true // a panic, too, leaves it open whether the image is there
	}
	err = s.dir.Commit(ctx, own.name, r.ref.object(imageSuffix))
	if own.hot != nil && err != nil {
		own.hot.keep = IsUncertain(err)
	}
	if err != nil {
		return err
	}
	// What others needed of it is here twice now. If it stays, gc removes it.
	name := r.place(ctx, r.ref, own.UUID)
	if id, err := s.owner(ctx, name); err == nil && id == own.UUID {
		_ = s.dir.Remove(ctx, name)
	}
	r.got.Ref = r.ref
	return nil
}

// place is the name of an unlisted image: the one that it has, or a new one.
func (r *receiving) place(ctx context.Context, at Ref, id uuid.UUID) string {
	if have, err := r.s.owner(ctx, at.object(removedSuffix)); err == nil && have == id {
		return at.object(removedSuffix)
	}
	return at.keptObject(id)
}

// beside writes what lies beside the image. The caller holds the store lock.
func (r *receiving) beside(ctx context.Context) error {
	var l Label
	if len(r.head.Label) > 0 && json.Unmarshal(r.head.Label, &l) == nil && l.check() == nil {
		if err := r.s.writeSealed(ctx, r.ref.object(labelSuffix), l); err != nil {
			return err
		}
	}
	// A hint, and worth no failure.
	var t workingset.Touched
	if len(r.head.Touched) > 0 && json.Unmarshal(r.head.Touched, &t) == nil {
		if b, err := integrity.Seal(&t); err == nil && len(b) <= maxTouched {
			return r.s.dir.Write(ctx, r.ref.object(touchedSuffix), spare(), b)
		}
	}
	return nil
}
