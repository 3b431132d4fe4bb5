package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"

	"github.com/spf13/cobra"

	"github.com/flic-migrate/flic-migrate/qmp/libvirt/compressor"
	"github.com/flic-migrate/flic-migrate/qmp/libvirt/saveimage"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/loose"
	"github.com/flic-migrate/flic-migrate/tier/rescue"
	"github.com/flic-migrate/flic-migrate/tier/restore"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

type importCmd struct {
	*app
	encoding
	vm    string
	nvram string
	json  bool
	quiet bool
}

func newImport(a *app) *cobra.Command {
	m := &importCmd{app: a}
	c := &cobra.Command{
		Use:   "import [flags] FILE.save",
		Short: "Copy a save file of libvirt's into the store",
		Long: `Import reads a file of virsh save or managedsave and commits its state to the store
as the next checkpoint of the domain. The stream may be raw, sparse, compressed by one
of libvirt's compressors (the program must be installed), or a flash image of ours.
Domain XML, libvirt's cookie and whether the domain ran are kept with it, and
"export" gives them back. The file stays as it is; it is read
more than once, so a pipe will not do.`,
		Example: `  flic-migrate import --store /srv/vms /var/lib/libvirt/qemu/save/web1.save`,
		Args:    cobra.ExactArgs(1),
		RunE:    func(cmd *cobra.Command, args []string) error { return m.run(cmd.Context(), args[0]) },
	}
	fs := c.Flags()
	fs.StringVar(&m.vm, "vm", "", "name of the VM in the store (default: the domain's)")
	fs.StringVar(&m.nvram, "nvram-from", "", "the NVRAM file of a flash image, if it is no longer where the image says")
	m.encoding.add(fs)
	fs.BoolVar(&m.json, "json", false, "print JSON on standard output")
	fs.BoolVar(&m.quiet, "quiet", false, "no progress and no summary, only warnings and errors")
	// The variable of save would name every domain alike.
	setKey(fs, "vm", "import-vm")
	return c
}

func (m *importCmd) run(ctx context.Context, name string) error {
	f, err := vfs.OpenPlain(name)
	if err != nil {
		return err
	}
	defer f.Close()
	h, err := saveimage.Read(f)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	vm := m.vm
	if vm == "" {
		if vm, _, err = h.Domain(); err != nil {
			return fmt.Errorf("%s: %w; --vm can name it", name, err)
		}
	}
	if err := store.CheckVM(vm); err != nil {
		return err
	}
	st, err := m.openStore(ctx, true)
	if err != nil {
		return err
	}
	in, err := m.open(ctx, f, h)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	show := newProgress(m.stderr, m.quiet)
	defer show.finish()
	o := m.encoding.options()
	o.Parent = save.ParentNone // what comes from elsewhere depends on nothing here
	o.VM, o.Log, o.Progress, o.Libvirt = vm, m.log(), show.callback(),
		&checkpoint.Libvirt{XML: h.XML(), Cookie: h.Cookie(), SaveFile: h.Bytes()}
	if h.Running != 0 {
		o.RunState = "running" // libvirt stops every guest to save it
	}
	o.ReturnPath = io.Discard // its source is long gone
	ref, meta, err := save.Run(ctx, m.fs, st, in, o)
	if cerr := in.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if m.json {
		return printJSON(m.stdout, saveReport{Checkpoint: ref.String(), UUID: meta.UUID.String(), Report: &meta.Report})
	}
	if m.quiet {
		return nil
	}
	_, err = fmt.Fprintln(m.stdout, summary(ref, &meta.Report))
	return err
}

// open gives the stream that begins at f's offset, as QEMU wrote it.
func (m *importCmd) open(ctx context.Context, f *os.File, h *saveimage.Header) (io.ReadCloser, error) {
	head, _, err := compressor.Peek(f, len(imageMagic))
	switch {
	case err != nil:
		return nil, err
	case string(head) == imageMagic:
		return m.image(ctx, f)
	case h.Format == saveimage.Raw:
		return io.NopCloser(f), nil
	case h.Format == saveimage.Sparse:
		return m.sparse(f, h)
	}
	name := h.Format.String()
	if !compressor.Known(name) {
		return nil, fmt.Errorf("its stream is in %s, which is not known here", name)
	}
	path, err := compressor.Real(name)
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, path, "-dc")
	if h.Format == saveimage.Lzop {
		cmd.Args = append(cmd.Args, "--ignore-warn")
	}
	d := &decompressed{cmd: cmd}
	cmd.Stdin, cmd.Stderr = f, &d.stderr
	if d.ReadCloser, err = cmd.StdoutPipe(); err != nil {
		return nil, err
	}
	return d, cmd.Start()
}

// sparse gives the stream of a file that QEMU has written itself.
func (m *importCmd) sparse(f *os.File, h *saveimage.Header) (io.ReadCloser, error) {
	start, err := f.Seek(0, io.SeekCurrent)
	if err != nil {
		return nil, err
	}
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	r, w := io.Pipe()
	go func() {
		w.CloseWithError(rescue.Call(func() error { return saveimage.CopySparse(w, f, start, fi.Size(), h) }))
	}()
	return r, nil
}

// image restores a flash image into a pipe.
func (m *importCmd) image(ctx context.Context, f *os.File) (io.ReadCloser, error) {
	in, err := loose.NewIn(ctx, f, nil, "")
	if err != nil {
		return nil, err
	}
	c, err := checkpoint.Open(ctx, m.fs, in, checkpoint.Options{NVRAM: m.nvram})
	if err != nil {
		return nil, err
	}
	r, w := io.Pipe()
	go func() {
		err := rescue.Call(func() error {
			_, err := restore.Run(ctx, c, w, restore.Options{Workers: m.worker.n})
			return err
		})
		c.Close()
		w.CloseWithError(err)
	}()
	return r, nil
}

// decompressed is what a program writes. Its end is an error if the program has
// failed: what came before is then not all there was.
type decompressed struct {
	io.ReadCloser
	cmd    *exec.Cmd
	stderr strings.Builder
	ended  bool
}

func (d *decompressed) Read(b []byte) (int, error) {
	n, err := d.ReadCloser.Read(b)
	if errors.Is(err, io.EOF) && !d.ended {
		d.ended = true
		if werr := d.cmd.Wait(); werr != nil {
			err = fmt.Errorf("%s: %w: %s", d.cmd.Args[0], werr, strings.TrimSpace(d.stderr.String()))
		}
	}
	return n, err
}

func (d *decompressed) Close() error {
	if !d.ended {
		d.cmd.Process.Kill()
		d.ReadCloser.Close()
		d.cmd.Wait()
	}
	return nil
}
