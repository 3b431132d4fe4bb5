package session

import (
	"context"
	"errors"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/libvirt/domain"
	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
)

// Target is the QEMU that a session is with: one whose monitor is free, or one of
// libvirt's.
type Target struct {
	QMP     string // a monitor's address, as of qmp.Dial
	Domain  string // instead of it, the name of a domain
	Connect string // libvirt's daemon, as of domain.Dial; empty: the default
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
		// libvirt's daemon, when it is restarted, is away for some seconds.
		for {
			m, err := t.dial(ctx, qmp.Options{})
			if err == nil {
				made = append(made, m)
				return m, nil
			}
			if t.Domain == "" || errors.Is(err, domain.ErrNotFound) || errors.Is(err, domain.ErrInactive) {
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
