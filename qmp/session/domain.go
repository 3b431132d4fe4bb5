package session

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp/disks"
	"github.com/flic-migrate/flic-migrate/qmp/libvirt/domain"
	"github.com/flic-migrate/flic-migrate/qmp/preflight"
	"github.com/flic-migrate/flic-migrate/stream/pipe"
	"github.com/flic-migrate/flic-migrate/tier/lazy"
	"github.com/flic-migrate/flic-migrate/tier/progress"
	"github.com/flic-migrate/flic-migrate/tier/restore"
	"github.com/flic-migrate/flic-migrate/tier/store"
)

// ErrNoDomain: a checkpoint can't be resumed as a domain.
var ErrNoDomain = errors.New("the checkpoint does not say which libvirt domain it is of: it was neither saved with checkpoint --domain nor imported. " +
	"It can be resumed into a QEMU that was started by hand (--qmp)")

// resumeDomain resumes into a QEMU that libvirt starts. The pages are served by this
// process, as that QEMU may start none.
func resumeDomain(ctx context.Context, t Target, st *store.Store, c *store.Checkpoint, o ResumeOptions) (rep ResumeReport, err error) {
	d, err := description(c, t.Domain)
	if err != nil {
		return rep, err
	}
	if !o.Recover {
		now := disks.AsSaved(c.Meta.VMDisks)
		if o.Overlay {
			// Those of a domain that runs may be in use, and are not removed.
			if domain.Active(ctx, t.Connect, t.Domain) {
				return rep, fmt.Errorf("no overlays are made: the domain %s runs already, or libvirt does not say whether it does", t.Domain)
			}
			if rep.Overlays, now, err = disks.MakeOverlays(ctx, c.Meta.VMDisks, time.Now()); err != nil {
				return rep, err
			}
			defer func() {
				if err != nil && !domain.Active(context.WithoutCancel(ctx), t.Connect, t.Domain) {
					disks.RemoveOverlays(rep.Overlays)
					rep.Overlays = nil
				}
			}()
			if d, err = d.OnOverlays(rep.Overlays); err != nil {
				return rep, err
			}
		}
		warnings, err := o.compareDisks(ctx, c, func() ([]disks.Disk, error) { return now, nil })
		if err != nil {
			return rep, err
		}
		for _, w := range warnings {
			o.Log.Warn(w)
		}
	}
	feed := &domainFeed{st: st, c: c, o: o, rep: &ServerReport{Checkpoint: c.Ref.String()}}
	rep.ResumeReport, err = domain.Restore(ctx, t.Connect, d, domain.RestoreOptions{
		Lazy:        o.Lazy,
		NotPossible: lazy.Possible(c.Checkpoint),
		User:        func(uid int) error { return preflight.Domain(d.XML, uid) },
		Paused:      o.Paused || c.Meta.RunState != "" && c.Meta.RunState != "running",
		Recover:     o.Recover,
		Feed:        feed.run,
		Running:     o.Running,
	})
	if err != nil {
		feed.rep.Error = err.Error()
	}
	rep.Server = feed.rep
	return rep, err
}

// description is the domain that c is of, which must be the one of this name.
func description(c *store.Checkpoint, name string) (d domain.Description, err error) {
	l := c.Meta.Libvirt
	if l == nil {
		return d, ErrNoDomain
	}
	d = domain.Description{XML: l.XML, Cookie: l.Cookie, Persistent: l.Persistent}
	switch is, err := d.Name(); {
	case err != nil:
		return d, err
	case is != name:
		return d, fmt.Errorf("%v is of the domain %s, not of %s", c.Ref, is, name)
	}
	return d, nil
}

// domainFeed writes a checkpoint's stream to a domain's QEMU, once.
type domainFeed struct {
	st  *store.Store
	c   *store.Checkpoint
	o   ResumeOptions
	rep *ServerReport
}

// run is domain.RestoreOptions.Feed.
func (f *domainFeed) run(ctx context.Context, connect func() (*net.UnixConn, error), lazily bool, opened func()) (err error) {
	f.rep.Lazy = lazily
	if lazily {
		f.rep.LazyReport, err = f.lazily(ctx, connect, opened)
		return err
	}
	conn, err := connect()
	if err != nil {
		return err
	}
	f.rep.Report, err = restore.Run(ctx, f.c.Checkpoint, conn, restore.Options{Progress: f.o.Progress,
		Portable: restore.Portable(f.c.Checkpoint) == nil})
	return err
}

func (f *domainFeed) lazily(ctx context.Context, connect func() (*net.UnixConn, error), opened func()) (*lazy.Report, error) {
	s := LazyServer{
		// libvirt does not say which QEMU it has started.
		Learn: f.o.Learn, ZeroRest: true, Recover: f.o.Recover, Log: f.o.Log,
		Begin: func() (Ends, error) {
			conn, err := connect()
			if err != nil {
				return Ends{}, err
			}
			socket, err := conn.SyscallConn()
			return Ends{In: conn, Out: conn, Resize: func(n int) int {
				_ = socket.Control(func(fd uintptr) { n = pipe.SetCapacity(int(fd), n) })
				return n
			}}, err
		},
		Progress: func(p lazy.Progress) {
			if p.Running && opened != nil {
				opened()
				opened = nil
			}
			if f.o.Progress != nil {
				f.o.Progress(progress.State{Phase: "resume", Pages: p.Pages, PagesAll: p.PagesAll})
			}
		},
	}
	return s.Serve(ctx, f.st, f.c)
}
