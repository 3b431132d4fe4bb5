package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"

	"github.com/flic-migrate/flic-migrate/qmp/libvirt/domain"
	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/stream/pipe"
	"github.com/flic-migrate/flic-migrate/tier/lazy"
	"github.com/flic-migrate/flic-migrate/tier/restore"
	"github.com/flic-migrate/flic-migrate/tier/store"
)

var errNoDomain = errors.New("the checkpoint does not say which libvirt domain it is of: it was neither saved with checkpoint --domain nor imported. " +
	"It can be resumed into a QEMU that was started by hand (--qmp)")

// runDomain resumes into a QEMU that libvirt starts. The pages are served by this
// process, as that QEMU may start none.
func (r *resumeCmd) runDomain(ctx context.Context, st *store.Store, c *store.Checkpoint) error {
	if r.monitor.qmp != "" {
		return errTwoMonitors
	}
	l := c.Meta.Libvirt
	if l == nil {
		return errNoDomain
	}
	d := domain.Description{XML: l.XML, Cookie: l.Cookie, Persistent: l.Persistent}
	switch name, err := d.Name(); {
	case err != nil:
		return err
	case name != r.monitor.domain:
		return fmt.Errorf("%v is of the domain %s, not of %s", c.Ref, name, r.monitor.domain)
	}
	server := restoreReport{Checkpoint: c.Ref.String()}
	o := domain.RestoreOptions{
		Lazy:        migration.LazyMode(r.lazy.value),
		NotPossible: lazy.Possible(c.Checkpoint),
		Paused:      r.paused || c.Meta.RunState != "" && c.Meta.RunState != "running",
		Recover:     r.recover,
		Feed: func(ctx context.Context, connect func() (*net.UnixConn, error), lazily bool, opened func()) error {
			server.Lazy = lazily
			if !lazily {
				conn, err := connect()
				if err == nil {
					server.Report, err = restore.Run(ctx, c.Checkpoint, conn, restore.Options{})
				}
				return err
			}
			var ends lateEnds
			s := lazyServer{app: r.app, learn: r.learn, recover: r.recover}
			s.begin = func() error {
				conn, err := connect()
				if err != nil {
					return err
				}
				socket, err := conn.SyscallConn()
				s.resize = func(n int) int {
					_ = socket.Control(func(fd uintptr) { n = pipe.SetCapacity(int(fd), n) })
					return n
				}
				ends = lateEnds{conn, conn}
				return err
			}
			s.progress = func(p lazy.Progress) {
				if p.Running && opened != nil {
					opened()
					opened = nil
				}
			}
			return s.serve(ctx, st, c, &ends, &server)
		},
	}
	if !r.quiet {
		o.Running = func(rep migration.ResumeReport) {
			fmt.Fprintf(r.stderr, "flic-migrate: %v: %s after %d ms\n", c.Ref, rep.State, rep.Running.Milliseconds())
		}
	}
	doc := resumeReport{Checkpoint: c.Ref.String()}
	var err error
	doc.ResumeReport, err = domain.Restore(ctx, r.monitor.connect, d, o)
	if doc.Reason != "" {
		r.log().Info("restored eagerly", "reason", doc.Reason)
	}
	server.ExitCode = exitCode(err)
	if line, e := json.Marshal(server); e == nil {
		doc.Server = line
	}
	if errors.Is(err, migration.ErrServerDied) {
		flags := []string{"--domain", r.monitor.domain}
		if r.monitor.connect != "" {
			flags = append(flags, "--connect", r.monitor.connect)
		}
		err = fmt.Errorf("%w: run %s", err, r.again(st.Dir(), c.Ref, flags...))
	}
	return errors.Join(err, r.show(doc, err))
}
