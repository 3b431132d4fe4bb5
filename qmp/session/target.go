package session

import (
	"context"
	"errors"
	"io/fs"
	"path/filepath"
	"syscall"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/libvirt/domain"
	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/qmp/preflight"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
)

// Target is the QEMU that a session is with: one whose monitor is free, or one of
// libvirt's.
type Target struct {
	QMP     string `json:"qmp,omitempty"`     // a monitor's address, as of qmp.Dial
	Domain  string `json:"domain,omitempty"`  // instead of it, the name of a domain
	Connect string `json:"connect,omitempty"` // libvirt's daemon, as of domain.Dial; empty: the default
}

// String names the target as the command line does.
func (t Target) String() string {
	switch {
	case t.Domain == "":
		return "--qmp " + t.QMP
	case t.Connect == "":
		return "--domain " + t.Domain
	}
	return "--domain " + t.Domain + " --connect " + t.Connect
}

// absolute is the target for a process that may run in another directory.
func (t Target) absolute() (Target, error) {
	path, ok := qmp.SocketPath(t.QMP)
	if !ok || t.QMP == "" {
		return t, nil
	}
	path, err := filepath.Abs(path)
	t.QMP = path
	return t, err
}

// gone tells whether a dial has failed because there is no QEMU. That a domain has none only
// libvirt can say: its daemon, when it is restarted, is away for a while, and its QEMUs are not.
func (t Target) gone(err error) bool {
	if t.Domain != "" {
		return errors.Is(err, domain.ErrNotFound) || errors.Is(err, domain.ErrInactive)
	}
	return errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, fs.ErrNotExist)
}

// ErrTwoTargets: both kinds of QEMU are named.
var ErrTwoTargets = errors.New("a monitor and a domain both name a QEMU")

// Given tells whether there is a QEMU at all.
func (t Target) Given() bool { return t.QMP != "" || t.Domain != "" }

// Check fails with ErrTwoTargets.
func (t Target) Check() error {
	if t.QMP != "" && t.Domain != "" {
		return ErrTwoTargets
	}
	return nil
}

// dial connects to the target's monitor. The options are for one that is free.
func (t Target) dial(ctx context.Context, o qmp.Options) (*qmp.Monitor, error) {
	if err := t.Check(); err != nil {
		return nil, err
	}
	if t.Domain != "" {
		return domain.Dial(ctx, t.Connect, t.Domain)
	}
	return qmp.Dial(ctx, t.QMP, o)
}

// Monitor connects to the target's monitor, for questions; the caller closes it.
func (t Target) Monitor(ctx context.Context) (*qmp.Monitor, error) { return t.dial(ctx, qmp.Options{}) }

// NotLazy tells, of a domain, why a QEMU that libvirt starts for it surely can't restore
// lazily; nil if nothing is known of that.
func (t Target) NotLazy(ctx context.Context) (why, err error) {
	if t.Domain == "" {
		return nil, nil
	}
	d, err := domain.Describe(ctx, t.Connect, t.Domain)
	if err != nil {
		return nil, err
	}
	uid, err := domain.User(ctx, t.Connect, d)
	if err != nil {
		return nil, err
	}
	return preflight.Domain(d.XML, uid), nil
}

// describe returns what libvirt needs to start the domain again, nil for a QEMU
// that is not libvirt's.
func (t Target) describe(ctx context.Context) (*checkpoint.Libvirt, error) {
	if t.Domain == "" {
		return nil, nil
	}
	d, err := domain.Describe(ctx, t.Connect, t.Domain)
	if err != nil {
		return nil, err
	}
	return &checkpoint.Libvirt{XML: d.XML, Cookie: d.Cookie, Persistent: d.Persistent}, nil
}

// redialer returns what makes new connections after the first, and what closes
// them.
func (t Target) redialer() (redial migration.Redialer, hangUp func()) {
	var made []*qmp.Monitor
	redial = func(ctx context.Context) (qmp.Executor, error) {
		for {
			m, err := t.dial(ctx, qmp.Options{})
			if err == nil {
				made = append(made, m)
				return m, nil
			}
			if t.Domain == "" || t.gone(err) {
				return nil, err
			}
			select {
			case <-time.After(100 * time.Millisecond):
			case <-ctx.Done():
				return nil, err
			}
		}
	}
	return redial, func() {
		for _, m := range made {
			m.Close()
		}
	}
}
