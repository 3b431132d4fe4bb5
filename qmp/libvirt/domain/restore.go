package domain

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/digitalocean/go-libvirt"
	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/tier/rescue"
)

// A domain is started again by being migrated here. libvirt's own restore reads a
// save file from a path, which is one way only and so never lazy; a migration's
// destination, in libvirt's protocol of version 3, listens on a socket for any
// source that comes (src/libvirt-domain.c, virDomainMigrateVersion3Full):
//
//	Prepare  libvirt starts a QEMU with -incoming on our socket's path
//	Feed     the stream, and for a lazy restore its return path
//	Finish   libvirt waits for QEMU, lets the guest run, waits for all memory
//
// Whatever goes wrong before the guest runs ends in no domain.

// RestoreOptions say how to start a domain again.
type RestoreOptions struct {
	Lazy   migration.LazyMode
	Paused bool // leave the guest paused
	// Recover goes on with a lazy restore whose Feed has failed.
	Recover bool

	// Feed connects to QEMU, once, and writes the stream. A lazy one calls opened as
	// soon as the guest could run, and reads requests. It must end, with an error,
	// after ctx has. When it recovers it connects only when nothing can keep it from
	// writing any more: a connection that ends before is the end of QEMU.
	Feed func(ctx context.Context, connect func() (*net.UnixConn, error), lazy bool, opened func()) error
	// NotPossible is why the stream can't be lazy, or nil.
	NotPossible error
	// User is asked, if not nil, why a QEMU of that user can't be lazy, before libvirt
	// starts one: a QEMU that has to say so itself is started in vain.
	User    func(uid int) error
	Running func(migration.ResumeReport) // called, if not nil, when the guest may run
}

// ErrExists: the domain's name is taken.
var ErrExists = errors.New("the domain is running already")

var errLazyPaused = errors.New("libvirt can't restore a guest lazily that is to stay paused")

// finishTime bounds the taking back of a restore that has failed.
const finishTime = 30 * time.Second

// recoverTime is how long QEMU may take to listen for a new server, and to say what
// it has, and the guest waits.
var recoverTime = migration.RecoverTime

// errStuck: QEMU has not heard libvirt's command to go on.
var errStuck = errors.New("QEMU does not hear libvirt: its main loop waits for a page of the guest that nobody serves, and libvirt's monitor " +
	"has no out-of-band commands. The domain has to be destroyed; the checkpoint is untouched")

// errDaemonEnded: seen of libvirt 11.3, which reads through a null pointer when it
// prepares a recovery (qemuProcessIncomingDefNew); 9.0 and 12.8 do not.
var errDaemonEnded = errors.New("libvirt's daemon has ended when it was told to go on with a domain whose memory is not all there, as that of " +
	"libvirt 11.3 does. The domain still waits: another libvirt (12.8 can) finds it, or it has to be destroyed; the checkpoint is untouched")

// Restore starts the domain and returns when all its memory is there.
//
// If this process ends before the guest runs there is no domain. After that the
// guest waits for its memory ("post-copy failed"), and a Restore with Recover
// goes on.
func Restore(ctx context.Context, uri string, d Description, o RestoreOptions) (rep migration.ResumeReport, err error) {
	id, err := d.identity()
	if err != nil {
		return rep, err
	}
	cpu := ""
	if d.Cookie != "" {
		if cpu, err = child(d.Cookie, "cpu"); err != nil {
			return rep, err
		}
	}
	c, err := open(ctx, uri)
	if err != nil {
		return rep, err
	}
	defer c.close()
	socket, err := c.socketPath(ctx, id)
	if err != nil {
		return rep, err
	}
	defer os.RemoveAll(filepath.Dir(socket))
	r := &restore{client: c, d: d, o: o, name: id.Name, cookie: cookie(id, cpu), socket: socket}
	start := time.Now()
	if rep.Lazy, rep.Reason, err = r.prepare(ctx); err != nil {
		return rep, err
	}
	err = r.run(ctx, start, &rep)
	return rep, err
}

type restore struct {
	*client
	d      Description
	o      RestoreOptions
	name   string
	cookie []byte
	socket string
	flags  libvirt.DomainMigrateFlags
}

// socketFolder is where the sockets of libvirt's own tunnelled migrations were. Its
// AppArmor driver lets a QEMU make files there, and in directories in there, whose names
// end as socketEnd and the domain's (src/security/virt-aa-helper.c); SELinux's policy
// has it among QEMU's. In other places a confined QEMU can't listen.
var socketFolder = "/run/libvirt/qemu" // not const for the sake of a test

const socketEnd = ".tunnelmigrate.dest."

// maxSocket is the longest path of a socket that the kernel takes.
const maxSocket = 107

// socketPath makes a directory that QEMU's user, and nobody else, can listen in, and
// returns the path for the socket. The caller removes the directory.
func (c *client) socketPath(ctx context.Context, id identity) (string, error) {
	uid, gid, confined, err := c.user(ctx, id)
	if err != nil {
		return "", err
	}
	folder, name := "", "s"
	if confined && c.uri == string(libvirt.QEMUSystem) {
		folder, name = socketFolder, "s"+socketEnd+id.Name
	}
	dir, err := os.MkdirTemp(folder, "flic-")
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, name)
	if len(path) > maxSocket {
		err = fmt.Errorf("the domain's name is too long: the socket %s would have %d bytes in its path, and %d is the limit", path, len(path), maxSocket)
	} else if uid != os.Getuid() {
		if err = os.Chown(dir, uid, gid); err != nil {
			err = fmt.Errorf("libvirt's QEMU is user %d, to whom a directory can only be given by root: %w", uid, err)
		}
	}
	if err != nil {
		os.RemoveAll(dir)
		return "", err
	}
	return path, nil
}

// cookie is what a source would say about itself
// (src/qemu/qemu_migration_cookie.c). Without one libvirt 9.0 crashes, and the
// source must be another host than the destination's.
func cookie(id identity, cpu string) []byte {
	var b strings.Builder
	element := func(name, value string) {
		b.WriteString("<" + name + ">")
		_ = xml.EscapeText(&b, []byte(value)) // a Builder takes all
		b.WriteString("</" + name + ">")
	}
	b.WriteString("<qemu-migration>")
	element("name", id.Name)
	element("uuid", id.UUID)
	element("hostname", "flic-migrate")
	element("hostuuid", uuid.NewString())
	b.WriteString(cpu)
	b.WriteString("<capabilities/></qemu-migration>\x00")
	return []byte(b.String())
}

// prepare makes libvirt start a QEMU that listens, lazily if that is wanted and
// possible.
func (r *restore) prepare(ctx context.Context) (lazy bool, reason string, err error) {
	r.flags = libvirt.MigrateLive
	if r.o.Paused {
		r.flags |= libvirt.MigratePaused
	}
	if r.d.Persistent {
		_, err := ask(ctx, r.client, "look up", func() (libvirt.Domain, error) { return r.rpc.DomainLookupByName(r.name) })
		// A definition that is there may be newer than ours.
		if errors.Is(err, ErrNotFound) {
			r.flags |= libvirt.MigratePersistDest
		} else if err != nil {
			return false, "", err
		}
	}
	postcopy := libvirt.MigratePostcopy
	if r.o.Recover {
		r.flags |= postcopy | libvirt.MigratePostcopyResume
		listening, stop := context.WithTimeoutCause(ctx, recoverTime, errStuck)
		defer stop()
		return true, "", r.listen(listening)
	}
	if r.o.NotPossible == nil && r.o.Lazy != migration.LazyNever && r.o.User != nil {
		// The socket's directory is its QEMU's.
		var st unix.Stat_t
		if err := unix.Stat(filepath.Dir(r.socket), &st); err != nil {
			return false, "", err
		}
		r.o.NotPossible = r.o.User(int(st.Uid))
	}
	if r.o.NotPossible == nil && r.o.Paused {
		r.o.NotPossible = errLazyPaused
	}
	if why := r.o.NotPossible; why != nil && r.o.Lazy == migration.LazyAlways {
		return false, "", why
	} else if why != nil && r.o.Lazy == migration.LazyAuto {
		reason = why.Error()
	}
	if r.o.Lazy != migration.LazyNever && r.o.NotPossible == nil {
		r.flags |= postcopy
		err := r.listen(ctx)
		var refused libvirt.Error
		if err == nil || r.o.Lazy == migration.LazyAlways || !errors.As(err, &refused) || errors.Is(err, ErrExists) {
			return err == nil, "", err
		}
		// If it was not for postcopy it comes again.
		reason = fmt.Sprintf("%v: %v", migration.ErrPostcopy, err)
		r.flags &^= postcopy
	}
	return false, reason, r.listen(ctx)
}

func parameter(name, value string) libvirt.TypedParam {
	return libvirt.TypedParam{Field: name, Value: *libvirt.NewTypedParamValueString(value)}
}

func (r *restore) listen(ctx context.Context) error {
	_, err := await(ctx, r.client, "start "+r.name, func() (struct{}, error) {
		_, _, err := r.rpc.DomainMigratePrepare3Params([]libvirt.TypedParam{
			parameter(libvirt.MigrateParamDestXML, r.d.XML),
			parameter(libvirt.MigrateParamURI, "unix://"+r.socket),
		}, r.cookie, uint32(r.flags))
		return struct{}{}, err
	})
	var refused libvirt.Error
	if r.o.Recover && errors.Is(err, qmp.ErrLost) {
		return fmt.Errorf("%w: %w", errDaemonEnded, err)
	}
	if r.o.Recover || !errors.As(err, &refused) {
		return err
	}
	// What libvirt says of a domain that runs already, and of one that is
	// being started, it says with a code that stands for many things.
	if _, e := r.state(ctx); e == nil {
		return fmt.Errorf("%w: %w", ErrExists, err)
	}
	return err
}

// run feeds the QEMU and has libvirt finish.
func (r *restore) run(ctx context.Context, start time.Time, rep *migration.ResumeReport) error {
	f := r.feed(ctx, rep.Lazy)
	defer f.end()
	if err := r.untilOpened(ctx, f); err != nil {
		return err
	}
	if r.o.Recover {
		r.untilRecovered(ctx)
	}
	end := r.watch(ctx, start, *rep)
	err := r.finishFed(ctx, rep.Lazy)
	if err != nil {
		f.stop()
	}
	running, untold := end()
	<-f.done
	rep.Resident = time.Since(start)
	rep.Running = rep.Resident
	if running > 0 {
		rep.Running = running
	}
	err = errors.Join(r.outcome(ctx, f.err, err, rep), untold)
	if err == nil && running == 0 && r.o.Running != nil {
		// It was not seen running, since it went too fast, or stays paused. Others may
		// wait to be told.
		r.o.Running(*rep)
	}
	return err
}

// feed is Feed on its way, in a goroutine of its own.
type feed struct {
	stop   context.CancelFunc // asks it to end
	opened chan struct{}      // closed when the guest could run
	done   chan struct{}      // closed when it has ended, with what follows
	err    error
	conn   *net.UnixConn // to QEMU; nil without one
}

// end ends it, and the connection with it.
func (f *feed) end() {
	f.stop()
	<-f.done
	if f.conn != nil {
		f.conn.Close()
	}
}

// feed starts Feed.
func (r *restore) feed(ctx context.Context, lazy bool) *feed {
	ctx, stop := context.WithCancel(ctx)
	f := &feed{stop: stop, opened: make(chan struct{}), done: make(chan struct{})}
	connect := func() (*net.UnixConn, error) {
		dialing, cancel := context.WithTimeout(ctx, finishTime)
		defer cancel()
		var dialer net.Dialer
		c, err := dialer.DialContext(dialing, "unix", r.socket)
		if err != nil {
			return nil, err
		}
		f.conn = c.(*net.UnixConn)
		context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
		return f.conn, nil
	}
	go func() {
		defer close(f.done)
		// A panic is this domain's failure, and not that of all that are resumed with it.
		f.err = rescue.Call(func() error { return r.o.Feed(ctx, connect, lazy, func() { close(f.opened) }) })
		switch {
		case f.conn == nil:
		case f.err == nil:
			f.conn.CloseWrite()
		default:
			f.conn.Close() // what QEMU has is no whole stream
		}
	}()
	return f
}

// untilOpened waits until libvirt can be told to finish: when the guest could run, or
// when all has been written. A feed that fails before, or a recovery that QEMU does
// not take up in time, is the end of it, and of the domain if it is no recovery.
func (r *restore) untilOpened(ctx context.Context, f *feed) error {
	var limit <-chan time.Time
	if r.o.Recover {
		limit = time.After(recoverTime)
	}
	select {
	case <-f.done:
		if f.err != nil {
			return errors.Join(f.err, r.finish(ctx, false))
		}
	case <-f.opened:
	case <-limit:
		f.stop()
		<-f.done
		return fmt.Errorf("QEMU has not taken the new server within %v: %w", recoverTime, errors.Join(f.err, r.finish(ctx, false)))
	}
	return nil
}

// finishFed is finish for what has been fed, or is being.
func (r *restore) finishFed(ctx context.Context, lazy bool) error {
	if lazy {
		// libvirt is to see the stream break, which it does at once, and to
		// keep the guest, before it sees us go.
		var stop context.CancelFunc
		ctx, stop = afterwards(ctx, finishTime)
		defer stop()
	}
	return r.finish(ctx, true)
}

// outcome says how a restore has ended that libvirt was told to finish.
func (r *restore) outcome(ctx context.Context, fed, finished error, rep *migration.ResumeReport) error {
	asking, end := context.WithTimeout(context.WithoutCancel(ctx), finishTime)
	defer end()
	state, err := r.state(asking)
	rep.State = state
	switch {
	case fed != nil && err == nil:
		// There is a guest, so it waits for its memory.
		return fmt.Errorf("%w: %w", migration.ErrServerDied, errors.Join(fed, finished))
	case fed != nil || finished != nil:
		return errors.Join(fed, finished)
	}
	return err
}

// untilRecovered waits until libvirt has heard from QEMU that it goes on. If it is
// asked to finish earlier, it takes the failure before for one of this time, and
// gives up. QEMU's word takes it a moment; one that never comes is finish's to find
// out.
func (r *restore) untilRecovered(ctx context.Context) {
	ctx, stop := context.WithTimeout(ctx, finishTime)
	defer stop()
	for {
		failed, err := ask(ctx, r.client, "state", func() (bool, error) {
			dom, err := r.rpc.DomainLookupByName(r.name)
			if err != nil {
				return false, err
			}
			state, reason, err := r.rpc.DomainGetState(dom, 0)
			return state == int32(libvirt.DomainRunning) && reason == int32(libvirt.DomainRunningPostcopyFailed) ||
				state == int32(libvirt.DomainPaused) && reason == int32(libvirt.DomainPausedPostcopyFailed), err
		})
		if err != nil || !failed {
			return
		}
		select {
		case <-time.After(pollInterval):
		case <-ctx.Done():
			return
		}
	}
}

// afterwards returns a context that ends some time after ctx.
func afterwards(ctx context.Context, more time.Duration) (context.Context, context.CancelFunc) {
	later, end := context.WithCancelCause(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() {
		time.AfterFunc(more, func() { end(context.Cause(ctx)) })
	})
	return later, func() { stop(); end(nil) }
}

// watch finds out when the guest runs, which is before a lazy restore is finished, and tells
// it. end ends the watching; it returns when all is told, with how long it took until the
// guest ran, or 0 if it was not seen to.
func (r *restore) watch(ctx context.Context, start time.Time, rep migration.ResumeReport) (end func() (running time.Duration, err error)) {
	ctx, cancel := context.WithCancel(ctx)
	var running time.Duration
	watched := make(chan error, 1)
	look := func() error {
		for {
			state, err := r.state(ctx)
			if err == nil && state == "running" {
				running = time.Since(start)
				rep.State, rep.Running = state, running
				if r.o.Running != nil {
					r.o.Running(rep)
				}
				return nil
			}
			select {
			case <-time.After(pollInterval):
			case <-ctx.Done():
				return nil
			}
		}
	}
	go func() { watched <- rescue.Call(look) }()
	return func() (time.Duration, error) {
		cancel()
		err := <-watched
		return running, err
	}
}

// pollInterval is how often libvirt is asked for the guest's state.
const pollInterval = 20 * time.Millisecond

// finish makes libvirt wait for QEMU and let the guest run, or, if it is not ok,
// end the QEMU.
func (r *restore) finish(ctx context.Context, ok bool) error {
	cancelled := int32(0)
	if !ok {
		var stop context.CancelFunc
		ctx, stop = context.WithTimeout(context.WithoutCancel(ctx), finishTime)
		defer stop()
		cancelled = 1
	}
	_, err := await(ctx, r.client, "finish "+r.name, func() (struct{}, error) {
		_, _, err := r.rpc.DomainMigrateFinish3Params([]libvirt.TypedParam{
			parameter(libvirt.MigrateParamDestName, r.name),
		}, r.cookie, uint32(r.flags), cancelled)
		return struct{}{}, err
	})
	var refused libvirt.Error
	if !ok && (errors.As(err, &refused) || errors.Is(err, ErrNotFound)) {
		return nil // it can't say yes to that
	}
	return err
}

// state is what libvirt takes the guest for.
func (r *restore) state(ctx context.Context) (string, error) {
	return ask(ctx, r.client, "state", func() (string, error) {
		dom, err := r.rpc.DomainLookupByName(r.name)
		if err != nil {
			return "", err
		}
		state, _, err := r.rpc.DomainGetState(dom, 0)
		switch libvirt.DomainState(state) {
		case libvirt.DomainRunning:
			return "running", err
		case libvirt.DomainPaused:
			return "paused", err
		}
		return "", errors.Join(err, ErrInactive)
	})
}
