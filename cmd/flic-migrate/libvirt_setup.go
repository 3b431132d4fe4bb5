package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/spf13/cobra"

	"github.com/flic-migrate/flic-migrate/qmp/libvirt/compressor"
	"github.com/flic-migrate/flic-migrate/qmp/libvirt/saveimage"
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
			"  PATH=%s:$PATH %s --daemon\n", l.setup.PathDir(), l.setup.DaemonName())
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
daemon; where libvirt's daemons have AppArmor profiles, a rule in /etc/apparmor.d/local
that lets them execute this program; and lines at the end of qemu.conf that ask for a
compressor. It prints what it has done, and how to restart the daemon, which it does
not do itself. What is there already stays; what it would have to change of somebody
else's stops it before anything is done.`,
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
	l.selinux()
	if !l.dryRun {
		l.next(true)
	}
	return nil
}

// selinux tells of what can only be told: whether a policy lets libvirt's daemon
// execute the program is decided by the program's label.
func (l *libvirtSetup) selinux() {
	label, enforces := l.setup.SELinux()
	if !enforces {
		return
	}
	if label == "" {
		label = "none that can be read"
	}
	l.printf("%-14s enforces; libvirt's daemon may execute what is labelled bin_t, and the label of %s is %s\n", "SELinux", l.setup.Program, label)
}

// confined says whether AppArmor lets libvirt's daemons execute the program, and
// counts those that it keeps from it.
func (l *libvirtSetup) confined() (kept int) {
	for _, c := range l.setup.Confinements() {
		what := "may execute"
		switch {
		case !c.Known:
			what = "can't be told"
		case !c.Allowed:
			what = "may not"
			kept++
		}
		l.printf("%-14s AppArmor's profile %s (%s) and %s\n", what, c.Profile, c.Mode, l.setup.Program)
	}
	return kept
}

func newLibvirtUninstall(a *app) *cobra.Command {
	l := &libvirtSetup{app: a}
	var force bool
	c := &cobra.Command{
		Use:   "uninstall [flags]",
		Short: "Undo libvirt install",
		Long: `Uninstall undoes exactly what install has done. Save files that were written
meanwhile hold flash images, which libvirt can't restore without flic-migrate: virsh
restore of one waits until virsh destroy. If there are such managed saves, memory files
of snapshots, or files with hot pages in NVRAM, it does nothing, unless with --force,
and names them. Nobody has a list of what else virsh save has written. So, before:
start those domains, or turn each file into one that needs nothing:

  flic-migrate import FILE.save && flic-migrate export NAME OTHER.save`,
		Example: `  flic-migrate libvirt uninstall`,
		Args:    cobra.NoArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return l.uninstall(cmd.Context(), force) },
	}
	l.flags(c, true)
	c.Flags().BoolVar(&force, "force", false, "even if save files need flic-migrate")
	setKey(c.Flags(), "force", "libvirt-force")
	return c
}

// needed are the save files that only this program can read, as far as libvirt or the
// store knows them.
func (l *libvirtSetup) needed(ctx context.Context) (names []string) {
	for _, save := range l.setup.Saves() {
		if save.Ours {
			names = append(names, save.Path)
		}
	}
	// A store that can't be read must not be in the way.
	st, err := l.openStore(ctx, false)
	if err != nil {
		return names
	}
	list, _ := st.Loose(ctx)
	for _, f := range list {
		if st.FindLoose(ctx, f) == loose.Present && !slices.Contains(names, f.Place.Path) {
			names = append(names, f.Place.Path)
		}
	}
	return names
}

func (l *libvirtSetup) uninstall(ctx context.Context, force bool) error {
	if err := l.open(); err != nil {
		return err
	}
	steps, err := l.setup.Steps()
	if err != nil {
		return err
	}
	needed := l.needed(ctx)
	for _, name := range needed {
		l.log().Warn("this save file can't be restored without flic-migrate", "file", name)
	}
	if len(needed) > 0 && !force {
		return errors.New("save files need flic-migrate: nothing was changed; see flic-migrate libvirt uninstall --help")
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
	l.printf("\nFiles of virsh save that flic-migrate has written need it for their restore: virsh\n" +
		"restore of one without it waits until virsh destroy. Make plain ones of them first:\n\n" +
		"  flic-migrate import FILE.save && flic-migrate export NAME OTHER.save\n")
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
that run find flic-migrate and AppArmor lets them execute it, which managed saves need
it or were written past it, and which save files have hot pages in NVRAM. The exit code
is 0 if everything is in place, and 1 otherwise.`,
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
	missing += l.confined()
	l.selinux()
	for _, d := range l.setup.Daemons() {
		what, whose := "finds it", ""
		switch {
		case d.UID != 0:
			// What is installed is for the system's daemon, and nothing of it is
			// missing.
			whose = fmt.Sprintf(", of user %d's qemu:///session", d.UID)
			if !d.Ours {
				what = "not set up"
			}
		case !d.Ours:
			what = "to be restarted"
			missing++
		}
		l.printf("%-14s %s, process %d%s\n", what, d.Name, d.PID, whose)
	}
	for _, save := range l.setup.Saves() {
		switch {
		case save.Ours:
			l.printf("%-14s %s\n", "needs it", save.Path)
		case save.Format == saveimage.Sparse:
			l.printf("%-14s %s: sparse, which QEMU writes itself\n", "past it", save.Path)
		case save.Format == saveimage.Raw:
			l.printf("%-14s %s: raw, for which libvirt runs no program\n", "past it", save.Path)
		}
	}
	if err := l.hot(ctx); err != nil {
		return err
	}
	if missing > 0 {
		return fmt.Errorf("%d things are not in place; flic-migrate libvirt install makes them", missing)
	}
	return nil
}
