package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/flic-migrate/flic-migrate/qmp/libvirt/saveimage"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/restore"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

type exportCmd struct {
	*app
	nvram string
	xml   string
	disks disksFlags
	quiet bool
}

func newExport(a *app) *cobra.Command {
	e := &exportCmd{app: a}
	c := &cobra.Command{
		Use:   "export [flags] NAME[@N] FILE.save",
		Short: "Write a checkpoint as a save file of libvirt's",
		Long: `Export writes a file that virsh restore takes, with or without flic-migrate: its
stream is raw. Of an imported checkpoint it has the domain XML, the cookie and the
running state that were imported, and a file that was raw comes back byte for byte
if no page was in it twice. Any other checkpoint needs the domain's XML, which
virsh dumpxml --migratable gives.

FILE.save must not exist. It comes into being whole, or not at all.`,
		Example: `  flic-migrate export --store /srv/vms web1@2 /srv/web1.save
  virsh restore /srv/web1.save`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error { return e.run(cmd.Context(), args[0], args[1]) },
	}
	fs := c.Flags()
	fs.StringVar(&e.xml, "xml", "", "file with the domain's XML, instead of what was imported")
	fs.StringVar(&e.nvram, "nvram-from", "", "the NVRAM file, if it is no longer where the checkpoint says")
	e.disks.addMoved(fs)
	fs.BoolVar(&e.quiet, "quiet", false, "no progress and no summary, only warnings and errors")
	setKey(fs, "xml", "export-xml")
	return c
}

func (e *exportCmd) run(ctx context.Context, name, file string) (err error) {
	st, ref, err := e.storeOf(ctx, name)
	if err != nil {
		return err
	}
	c, err := st.OpenCheckpoint(ctx, ref, checkpoint.Options{NVRAM: e.nvram, Disks: e.disks.reading()})
	if err != nil {
		return err
	}
	defer c.Close()
	h, err := e.header(c.Checkpoint)
	if err != nil {
		return fmt.Errorf("checkpoint %v: %w", c.Ref, err)
	}
	show := newProgress(e.stderr, e.quiet)
	defer show.finish()
	return vfs.WriteFile(e.fs, file, vfs.Writing{New: true}, func(f vfs.File) error {
		w := bufio.NewWriterSize(f, 1<<20)
		if _, err := w.Write(append(saveimage.PartialMagic(), h.Bytes()[len(saveimage.Magic()):]...)); err != nil {
			return err
		}
		if _, err := restore.Run(ctx, c.Checkpoint, w, restore.Options{Progress: show.callback()}); err != nil {
			return err
		}
		if err := w.Flush(); err != nil {
			return err
		}
		if err := f.Sync(); err != nil {
			return err
		}
		// As libvirt does: a file is whole when its first bytes say so.
		_, err := f.WriteAt(saveimage.Magic(), 0)
		return err
	})
}

// header is what goes before the stream.
func (e *exportCmd) header(c *checkpoint.Checkpoint) (h *saveimage.Header, err error) {
	running := c.Meta.RunState == "running"
	l := c.Meta.Libvirt
	switch {
	case e.xml != "":
		xml, err := vfs.ReadFile(e.fs, e.xml, saveimage.MaxData)
		if err != nil {
			return nil, err
		}
		if h, err = saveimage.New(string(xml), "", running); err == nil {
			_, _, err = h.Domain()
		}
		return h, err
	case l == nil:
		return nil, usageError{errors.New("it is of no domain of libvirt's: --xml has to name one's XML")}
	case len(l.SaveFile) == 0:
		return saveimage.New(l.XML, l.Cookie, running)
	}
	if h, err = saveimage.Parse(l.SaveFile); err == nil {
		h.SetFormat(saveimage.Raw)
	}
	return h, err
}
