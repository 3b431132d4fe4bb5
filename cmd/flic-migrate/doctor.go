package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/flic-migrate/flic-migrate/qmp/doctor"
	"github.com/flic-migrate/flic-migrate/qmp/libvirt/compressor"
	"github.com/flic-migrate/flic-migrate/tier/disk"
	"github.com/flic-migrate/flic-migrate/tier/store"
)

func newDoctor(a *app) *cobra.Command {
	d := &doctorRun{app: a}
	c := &cobra.Command{
		Use:   "doctor [flags]",
		Short: "Say what is well on this host, what is not, and what to do",
		Long: `Doctor looks at what flic-migrate needs and changes nothing: who may use userfaultfd,
which QEMUs there are, the store and its NVRAM files, and libvirt. With --qmp or
--domain it looks at a running VM as well: what keeps it from a checkpoint, from a lazy
resume, and which of its disks a checkpoint does not cover.

Each line is ok, a warning (it works, but less well or less safely than it might) or a
fault (something does not work), and the line below it says what to do. The exit code
is 0 if there is no fault, and else that of the first fault which has one.`,
		Example: `  flic-migrate doctor
  flic-migrate doctor --store /srv/vms --domain web1
  flic-migrate doctor --json --qmp /run/web1.qmp`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return d.run(cmd.Context()) },
	}
	fs := c.Flags()
	d.monitor.add(fs)
	fs.StringVar(&d.nvram, "nvram", "", "NVRAM file that saves are to use")
	fs.BoolVar(&d.volatile, "volatile-nvram", false, "accept an NVRAM file that loses its content at power-off (tmpfs)")
	fs.StringVar(&d.root, "libvirt-root", "/", "directory that stands for the host's root where libvirt is looked for")
	fs.BoolVar(&d.asJSON, "json", false, "print JSON on standard output")
	return c
}

// doctorRun is one call of doctor.
type doctorRun struct {
	*app
	monitor  monitorFlags
	nvram    string
	volatile bool
	root     string
	asJSON   bool
}

// faultsError is doctor's result when it found faults; each has been printed by then.
type faultsError struct {
	n     int
	first error // that has one
}

func (e *faultsError) Error() string {
	if e.n == 1 {
		return "1 fault was found"
	}
	return fmt.Sprintf("%d faults were found", e.n)
}

func (e *faultsError) Unwrap() error { return e.first }

func (d *doctorRun) run(ctx context.Context) error {
	if err := d.monitor.check(); err != nil {
		return err
	}
	list := doctor.Host(ctx, os.Getenv("PATH"))
	p := doctor.Places{FS: d.fs, Dir: d.store, NVRAM: d.nvram, Volatile: d.volatile}
	p.Store, p.Opened = d.openStore(ctx, false)
	if p.Opened != nil {
		p.Store = nil
	}
	list = append(list, doctor.Storage(ctx, p)...)
	program, err := os.Executable()
	if err == nil {
		program, err = filepath.EvalSymlinks(program)
	}
	if err != nil {
		return err
	}
	list = append(list, doctor.Libvirt(compressor.Setup{Root: d.root, Program: program})...)
	if d.monitor.Given() {
		list = append(list, d.vm(ctx, p.Store)...)
	}
	if err := context.Cause(ctx); err != nil {
		return err
	}
	if d.asJSON {
		err = printJSON(d.stdout, list)
	} else {
		err = printFindings(d.stdout, list)
	}
	if n := doctor.Count(list, doctor.Fault); err == nil && n > 0 {
		err = &faultsError{n, doctor.Error(list)}
	}
	return err
}

// vm looks at a running QEMU. One that can't be reached is a finding as any other.
func (d *doctorRun) vm(ctx context.Context, st *store.Store) []doctor.Finding {
	m, err := d.monitor.Monitor(ctx)
	if err != nil {
		return []doctor.Finding{doctor.Unreachable(d.monitor.Target.String(), err)}
	}
	defer m.Close()
	var indexed []disk.Entry
	if st != nil {
		if catalog, err := st.Disks(); err == nil {
			indexed, err = catalog.List(ctx)
			if err != nil && !errors.Is(err, os.ErrNotExist) {
				d.log().Warn("the indexes of disk images can't be listed", "error", err)
			}
		}
	}
	notLazy, err := d.monitor.NotLazy(ctx)
	if err != nil {
		d.log().Warn("libvirt does not say how it would start the domain for a lazy resume", "error", err)
	}
	return doctor.VM(ctx, m, indexed, notLazy)
}

func printFindings(w io.Writer, list []doctor.Finding) error {
	for _, f := range list {
		if _, err := fmt.Fprintf(w, "%-8s %-12s %s\n", f.Level, f.Topic, f.Text); err != nil {
			return err
		}
		if f.Do != "" {
			if _, err := fmt.Fprintf(w, "%-21s → %s\n", "", f.Do); err != nil {
				return err
			}
		}
	}
	_, err := fmt.Fprintf(w, "%d ok, %d warnings, %d faults\n", doctor.Count(list, doctor.OK), doctor.Count(list, doctor.Warning), doctor.Count(list, doctor.Fault))
	return err
}
