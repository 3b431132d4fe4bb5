package main

import (
	"context"
	"errors"
	"time"

	"github.com/spf13/pflag"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/libvirt/domain"
	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
)

// monitorFlags say which QEMU a command is about.
type monitorFlags struct {
	qmp     string
	domain  string
	connect string
}

func (m *monitorFlags) add(fs *pflag.FlagSet) {
	fs.StringVar(&m.qmp, "qmp", "", "QEMU's monitor: a Unix socket's path or HOST:PORT")
	fs.StringVar(&m.domain, "domain", "", "instead of --qmp: the name of a libvirt domain")
	fs.StringVar(&m.connect, "connect", "", "libvirt's daemon: qemu:///system or qemu:///session, with ?socket=PATH if it listens elsewhere (default: $LIBVIRT_DEFAULT_URI, then qemu:///system)")
}

// given tells whether there is a QEMU at all.
func (m *monitorFlags) given() bool { return m.qmp != "" || m.domain != "" }

var errTwoMonitors = usageError{errors.New("--qmp and --domain both name a QEMU: give one of them")}

func (m *monitorFlags) dial(ctx context.Context, o qmp.Options) (*qmp.Monitor, error) {
	switch {
	case m.qmp != "" && m.domain != "":
		return nil, errTwoMonitors
	case m.domain != "":
		return domain.Dial(ctx, m.connect, m.domain)
	}
	return qmp.Dial(ctx, m.qmp, o)
}

// describe returns what libvirt needs to start the domain again, nil for a QEMU
// that is not libvirt's.
func (m *monitorFlags) describe(ctx context.Context) (*checkpoint.Libvirt, error) {
	if m.domain == "" || m.qmp != "" {
		return nil, nil
	}
	d, err := domain.Describe(ctx, m.connect, m.domain)
	if err != nil {
		return nil, err
	}
	return &checkpoint.Libvirt{XML: d.XML, Cookie: d.Cookie, Persistent: d.Persistent}, nil
}

// redialer returns what makes new connections after the first, and what closes
// them.
func (m *monitorFlags) redialer() (migration.Redialer, func()) {
	var made []*qmp.Monitor
	redial := func(ctx context.Context) (qmp.Executor, error) {
		// libvirt's daemon, when it is restarted, is away for some seconds.
		for {
			mon, err := m.dial(ctx, qmp.Options{})
			if err == nil {
				made = append(made, mon)
				return mon, nil
			}
			if m.domain == "" || errors.Is(err, domain.ErrNotFound) || errors.Is(err, domain.ErrInactive) {
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
		for _, mon := range made {
			mon.Close()
		}
	}
}
