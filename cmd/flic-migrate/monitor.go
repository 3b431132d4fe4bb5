package main

import (
	"errors"

	"github.com/spf13/pflag"

	"github.com/flic-migrate/flic-migrate/qmp/session"
)

// monitorFlags say which QEMU a command is about.
type monitorFlags struct{ session.Target }

func (m *monitorFlags) add(fs *pflag.FlagSet) {
	fs.StringVar(&m.QMP, "qmp", "", "QEMU's monitor: a Unix socket's path or HOST:PORT")
	fs.StringVar(&m.Domain, "domain", "", "instead of --qmp: the name of a libvirt domain")
	fs.StringVar(&m.Connect, "connect", "", "libvirt's daemon: qemu:///system or qemu:///session, with ?socket=PATH if it listens elsewhere (default: $LIBVIRT_DEFAULT_URI, then qemu:///system)")
}

// check finds out whether more than one QEMU is named.
func (m *monitorFlags) check() error {
	if m.Check() != nil {
		return usageError{errors.New("--qmp and --domain both name a QEMU: give one of them")}
	}
	return nil
}
