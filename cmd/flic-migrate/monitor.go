package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/pflag"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/migration"
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

// explainHuman adds to the refusal of a human monitor what can be done there: first, and
// then a command that has QEMU start this program with args, of which the third is a
// directory.
func explainHuman(err error, first, command string, args ...string) error {
	if !errors.Is(err, qmp.ErrHumanMonitor) {
		return err
	}
	exe, e := os.Executable()
	if e != nil {
		exe = "flic-migrate"
	}
	// QEMU has a working directory of its own.
	if dir, e := filepath.Abs(args[2]); e == nil {
		args[2] = dir
	}
	line := fmt.Sprintf("%s %q", command, migration.ExecURI(append([]string{exe}, args...)))
	if first != "" {
		line = first + ", then: " + line
	}
	return fmt.Errorf("%w; or, in that monitor: %s", err, line)
}
