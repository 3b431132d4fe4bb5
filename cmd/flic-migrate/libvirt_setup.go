package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/flic-migrate/flic-migrate/qmp/libvirt/compressor"
	"github.com/flic-migrate/flic-migrate/tier/loose"
	"github.com/flic-migrate/flic-migrate/tier/store"
)

// libvirtSetup is what install, uninstall and status have in common.
type libvirtSetup struct {
	*app
	root   string
	dryRun bool
	setup  compressor.Setup
}

func (l *libvirtSetup) flags(c *cobra.Command, dryRun bool) {
	fs := c.Flags()
	fs.StringVar(&l.root, "root", "/", "directory that stands for the host's root")
	setKey(fs, "root", "libvirt-root")
	if dryRun {
		fs.BoolVar(&l.dryRun, "dry-run", false, "say what would be done, and do nothing")
		setKey(fs, "dry-run", "libvirt-dry-run")
	}
}

// open finds out where this program is.
func (l *libvirtSetup) open() error {
	program, err := os.Executable()
	if err == nil {
		program, err = filepath.EvalSymlinks(program)
	}
	if err != nil {
		return err
	}
	l.setup.Root, l.setup.Program = l.root, program
	return nil
}

func (l *libvirtSetup) printf(format string, args ...any) { fmt.Fprintf(l.stdout, format, args...) }

// next says what the user has to do for a change to be seen by libvirt.
func (l *libvirtSetup) next(installed bool) {
	if l.setup.Systemd() {
		l.printf("\nNow let libvirt's daemon see it; its domains run on meanwhile:\n\n" +
			"  systemctl daemon-reload\n  systemctl try-restart libvirtd virtqemud\n")
		return
	}
	if installed {
		l.printf("\nsystemd is not running here. Start libvirt's daemon again with this PATH; its domains\nrun on meanwhile:\n\n"+
			"  PATH=%s:$PATH libvirtd --daemon\n", l.setup.PathDir())
		return
	}
	l.printf("\nsystemd is not running here. Start libvirt's daemon again, without %s in its\nPATH; its domains run on meanwhile.\n", l.setup.PathDir())
}

func newLibvirtInstall(a *app) *cobra.Command {
	l := &libvirtSetup{app: a}
	c := &cobra.Command{
		Use:   "install [flags]",
		Short: "Make libvirt's save files go through flic-migrate",
		Long: `Install makes a directory with links to this program under the names of libvirt's
compressors; for systemd, a drop-in that puts it first in the PATH of libvirt's
daemon; and lines at the end of qemu.conf that ask for a compressor. It prints what it
has done, and how to restart the daemon, which it does not do itself. What is there
already stays; what it would have to change of somebody else's stops it before
anything is done.`,
		Example: `  flic-migrate libvirt install --dry-run
  flic-migrate libvirt install`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return l.install() },
	}
	l.flags(c, true)
	c.Flags().BoolVar(&l.setup.Replace, "replace", false, "let a line of qemu.conf that asks for raw save files become a comment")
	setKey(c.Flags(), "replace", "libvirt-replace")
	return c
}

func (l *libvirtSetup) install() error {
	if err := l.open(); err != nil {
		return err
	}
	steps, err := l.setup.Steps()
	if err != nil {
		return err
	}
	for _, step := range steps {
		if !step.Done && step.Conflict != nil {
			if !l.setup.Replace {
				return fmt.Errorf("%w (nothing was changed; --replace does that for lines of qemu.conf)", step.Conflict)
			}
			return fmt.Errorf("%w (nothing was changed)", step.Conflict)
		}
	}
	if !l.dryRun {
		if err := l.setup.Install(); err != nil {
			return err
		}
	}
	for _, step := range steps {
		what := "made"
		switch {
		case step.Done:
			what = "there already"
		case l.dryRun:
			what = "to be made"
		}
		l.printf("%-14s %s: %s\n", what, step.Path, step.What)
	}
	if !l.dryRun {
		l.next(true)
	}
	return nil
}

func newLibvirtUninstall(a *app) *cobra.Command {
	l := &libvirtSetup{app: a}
	var force bool
	c := &cobra.Command{
		Use:   "uninstall [flags]",
		Short: "Undo libvirt install",
		Long: `Uninstall undoes exactly what install has done. Save files that were written
meanwhile hold flash images, which libvirt can't restore without flic-migrate: if there
are managed saves of that kind it does nothing, unless with --force, and names them.
Start those domains first, or turn each file into one that needs nothing:

  flic-migrate import FILE.save && flic-migrate export NAME OTHER.save`,
		Example: `  flic-migrate libvirt uninstall`,
		Args:    cobra.NoArgs,
		RunE:    func(*cobra.Command, []string) error { return l.uninstall(force) },
	}
	l.flags(c, true)
	c.Flags().BoolVar(&force, "force", false, "even if managed saves need flic-migrate")
	setKey(c.Flags(), "force", "libvirt-force")
	return c
}

func (l *libvirtSetup) uninstall(force bool) error {
	if err := l.open(); err != nil {
		return err
	}
	steps, err := l.setup.Steps()
	if err != nil {
		return err
	}
	saves := l.setup.ManagedSaves()
	for _, name := range saves {
		l.log().Warn("this managed save can't be restored without flic-migrate", "file", name)
	}
	if len(saves) > 0 && !force {
		return errors.New("managed saves need flic-migrate: nothing was changed; see flic-migrate libvirt uninstall --help")
	}
	if !l.dryRun {
		if err := l.setup.Uninstall(); err != nil {
			return err
		}
	}
	for _, step := range steps {
		what := "undone"
		switch {
		case !step.Done:
			what = "not there"
		case l.dryRun:
			what = "to be undone"
		}
		l.printf("%-14s %s: %s\n", what, step.Path, step.What)
	}
	if !l.dryRun {
		l.next(false)
	}
	return nil
}

func newLibvirtStatus(a *app) *cobra.Command {
	l := &libvirtSetup{app: a}
	c := &cobra.Command{
		Use:   "status [flags]",
		Short: "Say what of libvirt install is in place",
		Long: `Status says what of an installation is there and what is not, whether the daemons
that run find flic-migrate, which managed saves need it, and which save files have hot
pages in NVRAM. The exit code is 0 if
everything is in place, and 1 otherwise.`,
		Example: `  flic-migrate libvirt status`,
		Args:    cobra.NoArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return l.status(cmd.Context()) },
	}
	l.flags(c, false)
	return c
}

// hot lists the save files that have hot pages in NVRAM.
func (l *libvirtSetup) hot(ctx context.Context) error {
	st, err := l.openStore(ctx, false)
	if errors.Is(err, store.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	list, err := st.Loose(ctx)
	if err != nil {
		return err
	}
	for _, f := range list {
		what, note := "hot pages", ""
		switch st.FindLoose(ctx, f) {
		case loose.Gone:
			what, note = "file is gone", "; gc gives its NVRAM back"
		case loose.Unknown:
			what, note = "can't be told", "; its NVRAM is kept"
		}
		l.printf("%-14s %s, of %s%s\n", what, f.Place.Path, localTime(f.Created), note)
	}
	return nil
}

func (l *libvirtSetup) status(ctx context.Context) error {
	if err := l.open(); err != nil {
		return err
	}
	steps, err := l.setup.Steps()
	if err != nil {
		return err
	}
	missing := 0
	for _, step := range steps {
		what := "in place"
		if !step.Done {
			what = "not there"
			missing++
		}
		l.printf("%-14s %s: %s\n", what, step.Path, step.What)
		if step.Conflict != nil {
			l.printf("%-14s %v\n", "in the way", step.Conflict)
		}
	}
	for _, d := range l.setup.Daemons() {
		what := "finds it"
		if !d.Ours {
			what = "to be restarted"
			missing++
		}
		l.printf("%-14s %s, process %d\n", what, d.Name, d.PID)
	}
	for _, name := range l.setup.ManagedSaves() {
		l.printf("%-14s %s\n", "needs it", name)
	}
	if err := l.hot(ctx); err != nil {
		return err
	}
	if missing > 0 {
		return fmt.Errorf("%d things are not in place; flic-migrate libvirt install makes them", missing)
	}
	return nil
}
