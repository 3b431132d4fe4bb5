package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/flic-migrate/flic-migrate/stream/pipe"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/nvram"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
	"github.com/flic-migrate/flic-migrate/tier/workingset"
)

type saveCmd struct {
	*app
	encoding
	placement
	vm     string
	parent parentFlag
	share  sharing
	disks  diskFiles
	report string
	json   bool
	quiet  bool
}

// placement is the flags that say what goes to NVRAM.
type placement struct {
	nvram      string
	nvramSize  size
	format     bool
	volatile   bool
	workingSet string
}

func (p *placement) add(fs *pflag.FlagSet) {
	fs.StringVar(&p.nvram, "nvram", "", "NVRAM file for the pages of the working set; made if missing")
	fs.Var(&p.nvramSize, "nvram-size", "cap on the NVRAM file, such as 4G; 0: the one it has")
	fs.BoolVar(&p.format, "nvram-format", false, "overwrite what --nvram names if it is no NVRAM file and not blank")
	fs.StringVar(&p.workingSet, "working-set", "", "file that says which pages are hot")
	fs.BoolVar(&p.volatile, "volatile-nvram", false, "accept an NVRAM file that loses its content at power-off (tmpfs)")
}

// options sets those of a save into the app's store.
func (p *placement) options(a *app, o *save.Options) (err error) {
	if p.workingSet != "" && p.nvram == "" {
		return usageError{errors.New("--working-set says what goes to NVRAM, and there is no --nvram")}
	}
	if p.nvram != "" {
		// Before the store is made, too.
		if err := store.CheckNVRAM(a.fs, a.store, p.nvram); err != nil {
			return err
		}
	}
	o.NVRAM, o.NVRAMSize, o.NVRAMFormat, o.VolatileNVRAM = p.nvram, int64(p.nvramSize), p.format, p.volatile
	if p.workingSet != "" {
		o.WorkingSet, err = readWorkingSet(p.workingSet)
	}
	return err
}

func newSave(a *app) *cobra.Command {
	s := &saveCmd{app: a}
	c := &cobra.Command{
		Use:   "save --vm NAME [flags] < STREAM",
		Short: "Save a migration stream as a new checkpoint",
		Long: `Save reads a QEMU migration stream from standard input and commits it to the
store as the next checkpoint of the VM. It exits with 0 when the checkpoint is
durable, and leaves nothing behind otherwise.

QEMU does not look at the exit code of an exec: child that has read the whole
stream. save therefore leaves the last part of it in the pipe until all memory is
on disk. If QEMU has the migration capability return-path, QEMU reports
"completed" exactly if the checkpoint was committed; set it where you can:

  migrate_set_capability return-path on

With --disk pages that equal a block of one of the guest's disk images are not stored: the
guest's page cache is on the disk already. The checkpoint then needs that image (absorb
copies what it needs). Only layers that have an index (disk index) and that nobody can
write to are used, so of the image of a running guest the backing files.

Standard output belongs to that return path and carries nothing else.`,
		Example: `  # In QEMU's monitor, with the guest running or stopped:
  migrate "exec:/usr/local/bin/flic-migrate save --store /srv/vms --vm web1"

  # Pages of the working set into persistent memory:
  migrate "exec:/usr/local/bin/flic-migrate save --store /srv/vms --vm web1 --nvram /mnt/pmem0/flic --nvram-size 4G --working-set /srv/web1.ws"

  # A recorded stream:
  flic-migrate save --store /srv/vms --vm web1 < web1.stream`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return s.run(cmd.Context()) },
	}
	fs := c.Flags()
	fs.StringVar(&s.vm, "vm", "", "name of the VM (required)")
	addParent(fs, &s.parent)
	s.share.add(fs)
	s.disks.add(fs)
	s.placement.add(fs)
	s.encoding.add(fs)
	addMetrics(fs, "save")
	fs.StringVar(&s.report, "report", "", "write the JSON report to this file as well, also after a failure")
	fs.BoolVar(&s.json, "json", false, "end with the report as one line of JSON on standard error")
	fs.BoolVar(&s.quiet, "quiet", false, "no progress and no summary, only warnings and errors")
	return c
}

// addParent adds --parent.
func addParent(fs *pflag.FlagSet, p *parentFlag) {
	*p = save.ParentAuto
	fs.Var(p, "parent", "checkpoint to refer to for what has not changed; auto: the VM's newest; none: store all anew")
}

// sharing is the flags that say what a checkpoint may have in common with others.
type sharing struct {
	where  choice
	domain domainFlag
}

func (s *sharing) add(fs *pflag.FlagSet) {
	s.where = choice{choices: []string{save.ShareStore, save.ShareVM, save.ShareNone}}
	fs.Var(&s.where, "share", "where pages are looked for that the parent does not have: in all checkpoints of the trust domain, of the VM, or in none (default: store, and none with --parent none)")
	fs.Var(&s.domain, "trust-domain", "whose VMs' pages may be stored once for all of them (default: as the VM's newest checkpoint, or \"default\")")
}

func (s *sharing) options(o *save.Options) { o.Share, o.TrustDomain = s.where.value, string(s.domain) }

// addKeep adds --nvram-keep.
func addKeep(fs *pflag.FlagSet, n *count) {
	*n = count{1, 1, store.MaxNumber}
	fs.Var(n, "nvram-keep", "so many newest checkpoints of each VM stay in NVRAM; what only older ones need goes to flash")
}

// saveReport is the JSON document of a save.
type saveReport struct {
	Checkpoint string `json:"checkpoint,omitempty"` // NAME@N
	UUID       string `json:"uuid,omitempty"`
	ExitCode   int    `json:"exit_code"`
	Error      string `json:"error,omitempty"`
	*checkpoint.Report
}

func (s *saveCmd) run(ctx context.Context) error {
	ref, meta, err := s.save(ctx)
	doc := saveReport{ExitCode: exitCode(err)}
	if err != nil {
		doc.Error = oneLine(err)
	} else {
		doc.Checkpoint, doc.UUID, doc.Report = ref.String(), meta.UUID.String(), &meta.Report
		s.measureSave(&meta.Report)
	}
	line, jerr := json.Marshal(doc)
	if s.report != "" && jerr == nil {
		jerr = writeReport(s.report, line)
	}
	if jerr != nil {
		// The checkpoint stands, or the failure is told: a report that could
		// not be written changes neither.
		s.log().Warn("the report was not written", "error", jerr)
	}
	if err == nil && !s.quiet && !s.json {
		fmt.Fprintf(s.stderr, "flic-migrate: %s\n", summary(ref, &meta.Report))
	}
	if s.json {
		s.last = line
	}
	if err == nil && meta.Report.Beside > 0 {
		if serr := startUniting(s.store, ref.String(), s.share.where.value); serr != nil {
			s.log().Warn("pages may be stored twice that another checkpoint has, made at the same time", "cause", serr)
		}
	}
	return err
}

func (s *saveCmd) save(ctx context.Context) (ref store.Ref, meta *checkpoint.Meta, err error) {
	if s.vm == "" {
		return ref, nil, usageError{errors.New("save needs the VM's name: --vm, FLIC_VM or vm in the configuration file")}
	}
	if err := store.CheckVM(s.vm); err != nil {
		return ref, nil, err
	}
	if isTerminal(s.stdin) {
		return ref, nil, usageError{errors.New("save reads a migration stream from its standard input, which is a terminal; see flic-migrate save --help")}
	}
	o := s.encoding.options()
	out, err := pipe.NewWriter(s.stdout.File)
	if err != nil {
		return ref, nil, err
	}
	defer out.Close()
	o.VM, o.Parent, o.ReturnPath, o.Log = s.vm, string(s.parent), out, s.log()
	s.share.options(&o)
	if err := s.placement.options(s.app, &o); err != nil {
		return ref, nil, err
	}
	st, err := s.openStore(ctx, true)
	if err != nil {
		return ref, nil, err
	}
	closeDisks, err := s.disks.open(ctx, st, &o)
	if err != nil {
		return ref, nil, err
	}
	defer closeDisks()
	in, err := pipe.New(ctx, int(s.stdin.Fd()))
	if err != nil {
		return ref, nil, err
	}
	defer in.Close()
	p := newProgress(s.stderr, s.quiet)
	defer p.finish()
	o.Progress = p.callback()
	ref, meta, err = save.Run(ctx, s.fs, st, in, o)
	return ref, meta, explainNVRAM(err)
}

// explainNVRAM names the flag that accepts what a save did not accept by itself.
func explainNVRAM(err error) error {
	switch {
	case errors.Is(err, store.ErrVolatile):
		return fmt.Errorf("%w (--volatile-nvram accepts that)", err)
	case errors.Is(err, nvram.ErrNotBlank):
		return fmt.Errorf("%w (--nvram-format overwrites it)", err)
	}
	return err
}

func readWorkingSet(path string) (*workingset.Set, error) {
	f, err := vfs.OS.Open(path) // a FIFO would hold up the save, and the guest with it
	if err != nil {
		return nil, err
	}
	defer f.Close()
	n, err := f.Size()
	if err != nil {
		return nil, err
	}
	ws, err := workingset.Read(io.NewSectionReader(f, 0, n))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return ws, nil
}

// writeReport writes b to path, whole or not at all. It is not synced: QEMU's
// monitor stands still until this process is gone, and the report of a save
// that a power cut follows is worth less than that time.
func writeReport(path string, b []byte) error {
	return vfs.WriteFile(vfs.OS, path, vfs.Writing{NoSync: true}, vfs.Bytes(append(b, '\n')))
}

// summary is the line that a save ends with.
func summary(ref store.Ref, r *checkpoint.Report) string {
	since := ""
	if r.Disk > 0 {
		since = fmt.Sprintf(", %d on disk", r.Disk)
	}
	if r.Shared > 0 {
		since += fmt.Sprintf(", %d in other checkpoints", r.Shared)
	}
	if r.Parent != "" {
		since += fmt.Sprintf(", %d as in %s, %d changed in part", r.Unchanged, r.Parent, r.Delta)
	}
	// Duplicates are hot or cold as well.
	return fmt.Sprintf("saved %v: %s in, %d pages (%d zero, %d hot, %d cold%s; %d are duplicates), %s to flash, %s to NVRAM, %.2f s",
		ref, human(r.BytesIn), r.Pages, r.Zero, r.Hot, r.Cold, since, r.Duplicate, human(r.FlashBytes), human(r.NVRAMBytes), r.Seconds.Total)
}
