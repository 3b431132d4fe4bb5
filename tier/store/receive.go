package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/moved"
	"github.com/flic-migrate/flic-migrate/tier/progress"
	"github.com/flic-migrate/flic-migrate/tier/transfer"
)

// A checkpoint is received in steps, each in a file of its own:
//
//	Receive            the stream's records, checkpoint after checkpoint   receive.go
//	  run              is it there? has its name another? is what it needs held?
//	  ├─ stage, data   tmp/KEY.staged: what comes, at its positions        receivestage.go
//	  └─ finish        all of it has come                                  receivejoin.go
//	      claim        nobody else puts these images together              receiveclaim.go
//	      prepare      what has come ∪ what the store has of it
//	      ├─ disks, pieces   pages that were in NVRAM or on disks          receivepieces.go
//	      ├─ hot             those that go to an NVRAM file here           receivehot.go
//	      └─ rename          another IDENTITY, and so another end          receiveend.go
//	      verify       each byte, as it is to be
//	      settle       tmp/VM@N.UUID.part, its end rewritten, synced       receivecommit.go
//	      commit       pieces, referred images, checkpoint get their names, in this order
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
	holds  []io.Closer
	lasts  []heldImage // of those, images that it refers to and are another's to keep
	claims []claim     // from when all has come
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
	lent      *moved.Lent // pages of disks that others lend it; nil: none

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
		return r.got, r.lacks("it")
	}
	unlock, err := r.s.lock(ctx)
	if err == nil {
		err = r.checkName(ctx)
		unlock()
	}
	if err != nil {
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
	if err := r.hold(ctx, h.Has); err != nil {
		return r.got, err
	}
	if err := r.stage(ctx); err != nil {
		return r.got, err
	}
	if err := r.data(ctx); err != nil {
		return r.got, err
	}
	err = r.finish(ctx)
	if integrity.IsCorrupt(err) && !r.isStaged(err) && errors.Is(err, ErrNotFound) {
		err = r.lacks("%w", err)
	} else if integrity.IsCorrupt(err) && !r.isStaged(err) {
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

// lacks is the error of what this store does not have, and was not sent.
func (r *receiving) lacks(what string, args ...any) error {
	return fmt.Errorf("checkpoint %v: %w: %w", r.got.Sent, ErrLacks, fmt.Errorf(what, args...))
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
		case k == transfer.Begin || k == transfer.Group:
			return r.got, r.amid(k)
		}
	}
}

// amid is the error of a record that begins something amid a checkpoint.
func (r *receiving) amid(k transfer.Kind) error {
	return r.rd.Damaged("a record of kind %d amid a checkpoint", k)
}

// mayBe accepts that the checkpoint is there, unless it was to have another name.
func (r *receiving) mayBe(at Ref) error {
	r.got.Ref = at
	if r.o.As.VM != "" && (at.VM != r.o.As.VM || r.o.As.N > 0 && at.N != r.o.As.N) {
		return fmt.Errorf("checkpoint %v is in this store already, as %v", r.got.Sent, at)
	}
	return nil
}

// checkName finds out that nobody has the name, if it is known: also before all is received. One
// that was removed here may come back. The caller holds the store lock.
func (r *receiving) checkName(ctx context.Context) error {
	if r.ref.N == 0 {
		return CheckVM(r.ref.VM)
	}
	taken, err := r.s.nameTaken(ctx, r.ref)
	if err == nil && taken {
		err = fmt.Errorf("checkpoint %v: %w in store %s; --as %s gives it the next number there", r.ref, ErrTaken, r.s.root, r.ref.VM)
	}
	return err
}

// nameTaken tells whether a checkpoint, or a save under way, has a name. The caller holds the
// store lock.
func (s *Store) nameTaken(ctx context.Context, r Ref) (bool, error) {
	o, err := s.objects(ctx, r.VM)
	if err != nil || slices.Contains(o.images, r.N) {
		return err == nil, err
	}
	numbers, err := s.underWay(ctx, r.VM, r.N)
	return slices.Contains(numbers, r.N), err
}
