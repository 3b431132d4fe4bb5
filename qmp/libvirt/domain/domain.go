// Package domain is the way to a QEMU that libvirt runs.
//
// libvirt holds the monitors of its QEMUs and hands commands on, so this package
// asks libvirt's daemon (go-libvirt's RPC, over its Unix socket):
//
//	Dial      a qmp.Monitor whose commands and events go through libvirt
//	Describe  what is needed to start the domain again
//	Restore   starts it again, from a migration stream of ours
//
// Two things differ from a QEMU of one's own. It runs with
// -sandbox spawn=deny, where a migration to exec: is the end of it; so none is
// ever sent. And libvirt keeps its own view of the guest, so what libvirt has a
// call for (suspend, resume, destroy) is done by that call.
package domain

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"github.com/digitalocean/go-libvirt"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/tier/rescue"
)

var (
	// ErrNotFound: libvirt knows no domain of this name.
	ErrNotFound = errors.New("libvirt knows no such domain")
	// ErrInactive: the domain has no QEMU.
	ErrInactive = errors.New("the domain is not running")
	// ErrJob: libvirt is saving, migrating or dumping the domain.
	ErrJob = errors.New("libvirt has a job running on the domain")
	// ErrRemote: the QEMU is on another machine, and a migration stream and a
	// store are files here.
	ErrRemote = errors.New("this libvirt is on another machine: run flic-migrate there")
	// ErrExec: the command would end the domain's QEMU.
	ErrExec = errors.New("libvirt's QEMU may start no processes (-sandbox spawn=deny), and dies of a migration to an exec: address")
)

// parseURI returns the driver's URI, as the daemon wants it, and the sockets the
// daemon may listen on. Known are qemu:///system and qemu:///session, also as
// qemu+unix:, with an optional ?socket=PATH (https://libvirt.org/uri.html). An empty one is
// virsh's LIBVIRT_DEFAULT_URI, or the system's daemon.
func parseURI(uri string) (driver libvirt.ConnectURI, sockets []string, err error) {
	if uri == "" {
		uri = os.Getenv("LIBVIRT_DEFAULT_URI")
	}
	if uri == "" {
		uri = string(libvirt.QEMUSystem)
	}
	u, err := url.Parse(uri)
	if err != nil {
		return "", nil, fmt.Errorf("libvirt URI: %w", err)
	}
	kind, transport, _ := strings.Cut(u.Scheme, "+")
	switch {
	case kind != "qemu":
		return "", nil, fmt.Errorf("libvirt URI %s: only QEMU's drivers are known, such as qemu:///system", uri)
	case u.Host != "", transport != "" && transport != "unix":
		return "", nil, fmt.Errorf("libvirt URI %s: %w", uri, ErrRemote)
	}
	var dir string
	switch u.Path {
	case "/system":
		dir = "/run/libvirt"
	case "/session":
		if dir = os.Getenv("XDG_RUNTIME_DIR"); dir == "" {
			if dir, err = os.UserCacheDir(); err != nil {
				return "", nil, err
			}
		}
		dir = filepath.Join(dir, "libvirt")
	default:
		return "", nil, fmt.Errorf("libvirt URI %s: must be qemu:///system or qemu:///session", uri)
	}
	driver = libvirt.ConnectURI("qemu://" + u.Path)
	if s := u.Query().Get("socket"); s != "" {
		return driver, []string{s}, nil
	}
	// The daemon for QEMU alone first: where there is one, the other is its
	// proxy, which hands on no files.
	return driver, []string{filepath.Join(dir, "virtqemud-sock"), filepath.Join(dir, "libvirt-sock")}, nil
}

// client is a connection to libvirt's daemon.
type client struct {
	rpc  *libvirt.Libvirt
	conn *fileConn
	uri  string
}

func open(ctx context.Context, uri string) (*client, error) {
	ctx, cancel := context.WithTimeout(ctx, commandTime)
	defer cancel()
	driver, sockets, err := parseURI(uri)
	if err != nil {
		return nil, err
	}
	c := &client{uri: string(driver)}
	fail := func(err error) (*client, error) { return nil, &qmp.OpError{Op: "connect", Addr: uri, Err: err} }
	var dialer net.Dialer
	var conn net.Conn
	for i := range sockets {
		var e error
		if conn, e = dialer.DialContext(ctx, "unix", sockets[i]); e == nil {
			break
		}
		err = errors.Join(err, e)
	}
	if conn == nil {
		return fail(err)
	}
	c.conn = &fileConn{UnixConn: conn.(*net.UnixConn)}
	c.rpc = libvirt.NewWithDialer(c)
	// go-libvirt waits without end, but not on a connection that is closed.
	stop := context.AfterFunc(ctx, c.close)
	err = c.rpc.ConnectToURI(driver)
	if !stop() {
		return fail(context.Cause(ctx))
	}
	if err != nil {
		c.close()
		return fail(err)
	}
	return c, nil
}

// Dial implements go-libvirt's socket.Dialer.
func (c *client) Dial() (net.Conn, error) { return c.conn, nil }

// close ends the connection and so all calls. What the daemon does for one of
// them it may yet finish.
func (c *client) close() { c.conn.Close() }

// ask makes a call that libvirt answers soon.
func ask[T any](ctx context.Context, c *client, op string, call func() (T, error)) (T, error) {
	ctx, cancel := context.WithTimeout(ctx, commandTime)
	defer cancel()
	return await(ctx, c, op, call)
}

// await makes a call that ends with ctx, which go-libvirt's do not; one that is
// given up ends with the connection.
func await[T any](ctx context.Context, c *client, op string, call func() (T, error)) (T, error) {
	type result struct {
		value T
		err   error
	}
	done := make(chan result, 1)
	go func() {
		var r result
		r.err = rescue.Call(func() (err error) {
			r.value, err = call()
			return err
		})
		done <- r
	}()
	select {
	case r := <-done:
		return r.value, c.explain(op, r.err)
	case <-ctx.Done():
		var none T
		return none, &qmp.OpError{Op: op, Addr: c.uri, Err: context.Cause(ctx)}
	}
}

// explain gives libvirt's errors their meaning here.
func (c *client) explain(op string, err error) error {
	var refused libvirt.Error
	switch {
	case err == nil:
		return nil
	case !errors.As(err, &refused):
		if errors.Is(err, libvirt.ErrUnsupported) {
			break
		}
		// No answer: the daemon is gone.
		err = fmt.Errorf("%w: %w", qmp.ErrLost, err)
	case refused.Code == uint32(libvirt.ErrNoDomain):
		err = fmt.Errorf("%w: %w", ErrNotFound, err)
	case refused.Code == uint32(libvirt.ErrOperationTimeout):
		err = fmt.Errorf("%w: %w", ErrJob, err)
	}
	return &qmp.OpError{Op: op, Addr: c.uri, Err: err}
}

// find finds a domain that has a QEMU.
func (c *client) find(ctx context.Context, name string) (libvirt.Domain, error) {
	d, err := ask(ctx, c, "look up", func() (libvirt.Domain, error) { return c.rpc.DomainLookupByName(name) })
	if err != nil {
		return d, err
	}
	active, err := ask(ctx, c, "look up", func() (int32, error) { return c.rpc.DomainIsActive(d) })
	if err != nil {
		return d, err
	}
	if active == 0 {
		return d, &qmp.OpError{Op: "domain " + name, Addr: c.uri, Err: ErrInactive}
	}
	return d, nil
}

// lookup finds a domain that has a QEMU and no job.
func (c *client) lookup(ctx context.Context, name string) (libvirt.Domain, error) {
	d, err := c.find(ctx, name)
	if err != nil {
		return d, err
	}
	job, err := ask(ctx, c, "job info", func() (int32, error) {
		kind, _, _, _, _, _, _, _, _, _, _, _, err := c.rpc.DomainGetJobInfo(d)
		return kind, err
	})
	if err != nil {
		return d, err
	}
	if kind := libvirt.DomainJobType(job); kind == libvirt.DomainJobBounded || kind == libvirt.DomainJobUnbounded {
		return d, &qmp.OpError{Op: "domain " + name, Addr: c.uri, Err: fmt.Errorf("%w (see virsh domjobinfo %s)", ErrJob, name)}
	}
	return d, nil
}
