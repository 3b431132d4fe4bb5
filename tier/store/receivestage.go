package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"syscall"
	"time"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/progress"
	"github.com/flic-migrate/flic-migrate/tier/transfer"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// What comes of an image lies in tmp/KEY.staged, at the positions that it has in the stream,
// until all of the checkpoint is there. The name is of what is sent, so that a transfer that
// is cut off goes on; the lock on it is the transfer's. Of an image that is listed here already
// what comes is passed over, and it is held.

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
			err = r.lacks("%d bytes of image %v, of which it has %d", i.Start, i.UUID, size)
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
		r.holds, r.lasts = append(r.holds, f), append(r.lasts, heldImage{f, at, i.UUID})
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
	open := func() error {
		_, err := soon(ctx, stageLimit, func() (again bool, err error) {
			i.f, err = r.s.openStage(ctx, i.name)
			return errors.Is(err, vfs.ErrLocked), err
		})
		return err
	}
	err := open()
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
	return open()
}

// openStage opens what is received into, and locks it. Between the two another transfer must not
// come to its end: what was staged would be an image by then, and be written to. So it has the
// store lock, under which that gets its name. What was given up meanwhile has none any more,
// and counts as locked.
func (s *Store) openStage(ctx context.Context, name string) (Stage, error) {
	unlock, err := s.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	f, err := s.dir.Stage(ctx, name)
	if err != nil {
		return nil, err
	}
	if named, err := s.isNamed(ctx, f, name); err != nil || !named {
		f.Close()
		return nil, errors.Join(err, fmt.Errorf("%s: %w", f.Name(), vfs.ErrLocked))
	}
	return f, nil
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
		case k == transfer.Begin || k == transfer.Group:
			return r.amid(k)
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
