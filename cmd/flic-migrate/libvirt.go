package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/flic-migrate/flic-migrate/qmp/libvirt/compressor"
	"github.com/flic-migrate/flic-migrate/stream/pipe"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/loose"
	"github.com/flic-migrate/flic-migrate/tier/rescue"
	"github.com/flic-migrate/flic-migrate/tier/restore"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
	"github.com/flic-migrate/flic-migrate/tier/workingset"
)

func newLibvirt(a *app) *cobra.Command {
	c := &cobra.Command{
		Use:   "libvirt",
		Short: "Stand in for the compressor of libvirt's save files",
		Long: `Libvirt's save, managedsave and start go through flic-migrate once it stands, under
the name of a compressor, first in the PATH of libvirt's daemon: docs/libvirt.md.`,
		Example: `  flic-migrate libvirt install
  virsh save web1 /srv/web1.save && virsh restore /srv/web1.save`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	c.AddCommand(newLibvirtInstall(a), newLibvirtUninstall(a), newLibvirtStatus(a), newLibvirtSave(a), newLibvirtRestore(a))
	return c
}

const (
	streamMagic = "QEVM"
	imageMagic  = image.Magic
)

// standIn is the program under the name of a compressor: what it can't do, and
// what is not for it, the real one does. Nothing of ours, not even a broken
// configuration file, may come between libvirt and a save file that we have not
// written.
func standIn(fsys vfs.FS, name string, args []string) int {
	a := newApp(fsys)
	verb, magic := "", ""
	switch compressor.JobOf(args) {
	case compressor.Compress:
		verb, magic = "save", streamMagic
	case compressor.Decompress:
		verb, magic = "restore", imageMagic
	}
	var head []byte
	var err error
	if magic != "" {
		var taken bool
		head, taken, err = compressor.Peek(a.stdin, len(magic))
		ours := string(head) == magic
		if !taken {
			head = nil
		}
		if ours {
			a.head = head
			return standInRun(a, verb)
		}
	}
	code := exitFailed
	if err == nil {
		code, err = compressor.HandOver(name, args, head)
	}
	if err != nil {
		fmt.Fprintf(a.stderr, "flic-migrate: as %s: %s\n", name, oneLine(err))
		code = exitFailed
		if verb == "restore" {
			a.stdout.spoil()
		}
	}
	return code
}

// libvirt has a thread that reads what a compressor prints, and starts it after the
// compressor: what comes before that is lost (seen of 11.3 and 12.8). listens is far
// longer than it takes.
const listens = 200 * time.Millisecond

// standInRun is libvirt save or restore, with its words where libvirt finds them.
func standInRun(a *app, verb string) int {
	start := time.Now()
	late, stderr := new(bytes.Buffer), a.stderr
	a.stderr = late
	code := run(a, []string{"libvirt", verb})
	if code != exitOK {
		if verb == "save" {
			// A broken pipe would be QEMU's error, and then libvirt shows that and
			// not the reason.
			io.Copy(io.Discard, plainReader{a.stdin})
		}
		time.Sleep(listens - time.Since(start))
	}
	stderr.Write(late.Bytes())
	return code
}

type libvirtSaveCmd struct {
	*app
	encoding
	nvram       string
	nvramSize   size
	volatile    bool
	workingSets string
	report      string
}

func newLibvirtSave(a *app) *cobra.Command {
	s := &libvirtSaveCmd{app: a}
	c := &cobra.Command{
		Use:   "save [flags] < STREAM > IMAGE",
		Short: "Write a migration stream's flash image to standard output",
		Long: `Save reads a QEMU migration stream from standard input and writes its flash image
to standard output. It is what libvirt's "lzop -c" comes to. There are no
arguments: settings are the configuration file's and the environment's.

The image needs no store. Removing the file that it was written to removes it.`,
		Example: `  flic-migrate libvirt save < web1.stream > web1.flic`,
		Args:    cobra.NoArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return s.run(cmd.Context()) },
	}
	fs := c.Flags()
	fs.StringVar(&s.nvram, "nvram", "", "NVRAM file for the pages of the working set; made if missing")
	fs.Var(&s.nvramSize, "nvram-size", "cap on the NVRAM file, such as 4G; 0: the one it has")
	fs.StringVar(&s.workingSets, "working-sets", "", "directory of working sets by domain, UUID.ws or NAME.ws; without one for the domain all goes to flash")
	fs.BoolVar(&s.volatile, "volatile-nvram", false, "accept an NVRAM file that loses its content at power-off (tmpfs)")
	s.encoding.add(fs)
	fs.StringVar(&s.report, "report", "", "write the JSON report to this file, also after a failure")
	return c
}

func (s *libvirtSaveCmd) run(ctx context.Context) error {
	meta, err := s.save(ctx)
	doc := saveReport{ExitCode: exitCode(err)}
	if err != nil {
		doc.Error = oneLine(err)
	} else {
		doc.UUID, doc.Report = meta.UUID.String(), &meta.Report
	}
	line, jerr := json.Marshal(doc)
	if s.report != "" && jerr == nil {
		jerr = writeReport(s.report, line)
	}
	if jerr != nil {
		s.log().Warn("the report was not written", "error", jerr)
	}
	return err
}

// plainReader hides what would make io.Copy move the bytes in another way than
// by reading them.
type plainReader struct{ f *os.File }

func (r plainReader) Read(b []byte) (int, error) {
	for {
		n, err := unix.Read(int(r.f.Fd()), b)
		switch {
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EAGAIN):
			unix.Poll([]unix.PollFd{{Fd: int32(r.f.Fd()), Events: unix.POLLIN}}, -1)
		case err != nil:
			return 0, err
		case n == 0:
			return 0, io.EOF
		default:
			return n, nil
		}
	}
}

func (s *libvirtSaveCmd) save(ctx context.Context) (*checkpoint.Meta, error) {
	if isTerminal(s.stdin) {
		return nil, usageError{errors.New("libvirt save reads a migration stream from its standard input, which is a terminal")}
	}
	if isTerminal(s.stdout.File) {
		return nil, usageError{errors.New("libvirt save writes a flash image to its standard output, which is a terminal")}
	}
	domain := compressor.Source(s.stdin)
	o := s.encoding.options()
	o.Log = s.log()
	if store.CheckVM(domain.Name) == nil {
		o.VM = domain.Name
	}
	in, err := pipe.New(ctx, int(s.stdin.Fd()))
	if err != nil {
		return nil, err
	}
	defer in.Close()
	// Fewer and larger writes; no matter if it is not a pipe.
	unix.FcntlInt(s.stdout.Fd(), unix.F_SETPIPE_SZ, 1<<20)
	out := loose.NewOut(s.stdout.File, loose.DefaultWindow)
	st, tx, err := s.begin(ctx, out, domain, &o)
	if err != nil {
		return nil, err
	}
	meta, err := save.To(ctx, s.fs, st, tx, &resumed{in, s.head}, o)
	if errors.Is(err, store.ErrVolatile) {
		err = fmt.Errorf("%w (volatile-nvram = true accepts that)", err)
	}
	return meta, err
}

// begin starts the save: with a store if the domain has a working set and there
// is NVRAM for it, so that the NVRAM can be given back when the file is gone.
func (s *libvirtSaveCmd) begin(ctx context.Context, out *loose.Out, d compressor.Domain, o *save.Options) (*store.Store, *store.Tx, error) {
	plain := store.BeginFile(out)
	if s.nvram == "" {
		return nil, plain, nil
	}
	ws, err := findWorkingSet(s.workingSets, d)
	if err != nil {
		return nil, nil, err
	}
	if ws == nil {
		return nil, plain, nil
	}
	path := compressor.Target(s.stdout.File)
	if path == "" {
		// Nobody could tell later when its hot pages may be given away.
		s.log().Warn("hot pages go to flash, because it can't be seen which file this is")
		return nil, plain, nil
	}
	st, err := s.openStore(ctx, true)
	if err != nil {
		return nil, nil, err
	}
	tx, err := st.BeginLoose(ctx, out, path)
	o.WorkingSet, o.NVRAM, o.NVRAMSize, o.VolatileNVRAM = ws, s.nvram, int64(s.nvramSize), s.volatile
	return st, tx, err
}

// findWorkingSet reads the working set of a domain from a directory: UUID.ws, or
// else NAME.ws. It is nil if there is none.
func findWorkingSet(dir string, d compressor.Domain) (*workingset.Set, error) {
	if dir == "" {
		return nil, nil
	}
	for _, name := range []string{d.UUID, d.Name} {
		if name == "" || filepath.Base(name) != name {
			continue
		}
		ws, err := readWorkingSet(filepath.Join(dir, name+".ws"))
		if !errors.Is(err, fs.ErrNotExist) {
			return ws, err
		}
	}
	return nil, nil
}

// resumed is a pipe of which something has been read already.
type resumed struct {
	*pipe.Reader
	head []byte
}

func (r *resumed) Read(b []byte) (int, error) {
	if len(r.head) > 0 {
		n := copy(b, r.head)
		r.head = r.head[n:]
		return n, nil
	}
	return r.Reader.Read(b)
}

type libvirtRestoreCmd struct {
	*app
	nvram   string
	spool   string
	workers count
	report  string
}

func newLibvirtRestore(a *app) *cobra.Command {
	r := &libvirtRestoreCmd{app: a, workers: count{0, 0, 1024}}
	c := &cobra.Command{
		Use:   "restore [flags] < IMAGE > STREAM",
		Short: "Write the migration stream of a flash image on standard input",
		Long: `Restore reads the flash image that begins at the offset of standard input, and
writes its migration stream to standard output. It is what libvirt's "lzop -dc"
comes to. Each page is checked before it is written.

A pipe, which libvirt gives for virsh restore --bypass-cache, is first copied to
the --spool directory.`,
		Example: `  flic-migrate libvirt restore < web1.flic > web1.stream`,
		Args:    cobra.NoArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return r.run(cmd.Context()) },
	}
	spool := os.Getenv("TMPDIR")
	if spool == "" {
		spool = "/var/tmp" // /tmp can be memory
	}
	fs := c.Flags()
	fs.StringVar(&r.nvram, "nvram-from", "", "the NVRAM file, if it is no longer where the image says")
	fs.StringVar(&r.spool, "spool", spool, "directory for a copy of an image that comes through a pipe")
	fs.Var(&r.workers, "workers", "decompressing threads; 0: one for each CPU")
	fs.StringVar(&r.report, "report", "", "write the JSON report to this file, also after a failure")
	return c
}

func (r *libvirtRestoreCmd) run(ctx context.Context) error {
	if isTerminal(r.stdin) {
		return usageError{errors.New("libvirt restore reads a flash image from its standard input, which is a terminal")}
	}
	if isTerminal(r.stdout.File) {
		return usageError{errors.New("libvirt restore writes a migration stream to its standard output, which is a terminal")}
	}
	doc := new(restoreReport)
	done := make(chan error, 1)
	go func() { done <- rescue.Call(func() error { return r.restore(ctx, doc) }) }()
	var err error
	select {
	case err = <-done:
	case <-ctx.Done():
		// It may be in a write to a pipe that nobody reads. There is nothing
		// to clean up, so nobody has to wait for it.
		select {
		case err = <-done:
		case <-time.After(time.Second):
			doc, err = new(restoreReport), context.Cause(ctx) // it has the other one still
		}
	}
	if r.report != "" {
		if doc.ExitCode = exitCode(err); err != nil {
			doc.Error = oneLine(err)
		}
		writeReportDoc(r.report, doc, r.log())
	}
	return err
}

func (r *libvirtRestoreCmd) restore(ctx context.Context, doc *restoreReport) error {
	in, err := loose.NewIn(ctx, r.stdin, r.head, r.spool)
	if err != nil {
		return err
	}
	// Never closed: libvirt waits for the end of this process, which closes
	// everything.
	c, err := checkpoint.Open(ctx, r.fs, in, checkpoint.Options{NVRAM: r.nvram})
	if err != nil {
		return err
	}
	unix.FcntlInt(r.stdout.Fd(), unix.F_SETPIPE_SZ, 1<<20)
	done := r.use(ctx, c)
	doc.Report, err = restore.Run(ctx, c, r.stdout, restore.Options{Workers: r.workers.n})
	if derr := done(err == nil); derr != nil {
		r.log().Warn("the store has not noted this restore", "error", derr)
	}
	return err
}

// use tells the store, if the image has hot pages that it looks after, that they
// are in use, and where the image is now.
func (r *libvirtRestoreCmd) use(ctx context.Context, c *checkpoint.Checkpoint) (done func(restored bool) error) {
	nothing := func(bool) error { return nil }
	if c.Meta.NVRAM == nil {
		return nothing
	}
	st, err := r.openStore(ctx, false)
	if err == nil {
		done, err = st.UseLoose(ctx, c.Meta.UUID, compressor.Input(r.stdin))
	}
	if err != nil {
		r.log().Warn("the store has not noted this restore", "error", err)
		return nothing
	}
	return done
}
