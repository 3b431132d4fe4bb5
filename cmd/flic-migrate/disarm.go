package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/flic-migrate/flic-migrate/qmp/session"
	"github.com/flic-migrate/flic-migrate/tier/store"
)

type disarmCmd struct {
	*app
	monitor monitorFlags
	quiet   bool
}

func newDisarm(a *app) *cobra.Command {
	d := &disarmCmd{app: a}
	c := &cobra.Command{
		Use:   "disarm [flags] {NAME | --qmp SOCKET | --domain DOMAIN}",
		Short: "End what checkpoint --arm has left behind",
		Long: `Disarm ends the armed checkpoint of a VM: its migration is cancelled, QEMU's
migration settings are what they were before it was armed, nothing is left of it in
the store, and the guest runs on. The VM is named, or its QEMU.

A QEMU that was armed from another store, or whose process was killed, can be disarmed
through its monitor.`,
		Example: `  flic-migrate disarm --store /srv/vms web1
  flic-migrate disarm --qmp /run/web1.qmp`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			vm := ""
			if len(args) == 1 {
				vm = args[0]
				if (d.monitor.QMP != "" && d.sources["qmp"] == "") || (d.monitor.Domain != "" && d.sources["domain"] == "") {
					return usageError{errors.New("--qmp and --domain name a QEMU, and an argument the VM: give one of them")}
				}
			}
			return d.run(cmd.Context(), vm)
		},
	}
	d.monitor.add(c.Flags())
	c.Flags().BoolVar(&d.quiet, "quiet", false, "no progress and no summary, only warnings and errors")
	return c
}

func (d *disarmCmd) run(ctx context.Context, vm string) error {
	if vm == "" && !d.monitor.Given() {
		return usageError{errors.New("disarm needs the VM's name, or a QEMU: --qmp or --domain")}
	}
	if vm != "" {
		if err := store.CheckVM(vm); err != nil {
			return err
		}
		// A QEMU that the environment or the configuration names is not meant.
		d.monitor.Target = session.Target{}
	}
	if err := d.monitor.check(); err != nil {
		return err
	}
	st, err := d.openStore(ctx, false)
	if err != nil && (vm != "" || !errors.Is(err, store.ErrNotFound)) {
		return err
	}
	if err := session.Disarm(ctx, st, d.monitor.Target, session.DisarmOptions{VM: vm, Log: d.log()}); err != nil {
		return err
	}
	if !d.quiet {
		name := vm
		if name == "" {
			name = d.monitor.String()
		}
		fmt.Fprintf(d.stderr, "flic-migrate: %s is disarmed\n", name)
	}
	return nil
}
