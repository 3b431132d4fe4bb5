package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/coredump"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

type memoryCmd struct {
	*app
	out    string
	nvram  string
	format choice
	json   bool
	disks  disksFlags
	quiet  bool
}

func newMemory(a *app) *cobra.Command {
	m := &memoryCmd{app: a, format: choice{value: string(coredump.Raw), choices: []string{string(coredump.Raw), string(coredump.ELF)}}}
	c := &cobra.Command{
		Use:   "memory [flags] NAME[@N] -o FILE",
		Short: "Write a checkpoint's guest memory for crash, gdb or Volatility",
		Long: `Memory writes what a guest had in its main memory, to be looked into: the checkpoint
stays as it is, and no QEMU is needed.

  --format raw   each byte at its guest-physical address, as QEMU's pmemsave has it
  --format elf   a core file as QEMU's dump-guest-memory makes it, with the registers of
                 the vCPUs (x86-64 and aarch64)

The memory of devices, such as a graphics card's, is not in it, and neither is memory
that was plugged in while the guest ran. FILE must not exist; pages of zeros are holes in
it. It comes into being whole, or not at all.`,
		Example: `  flic-migrate memory --store /srv/vms --format elf web1@2 -o web1.core
  gdb -c web1.core -ex 'info registers'
  flic-migrate memory --store /srv/vms web1 -o web1.raw && vol -f web1.raw windows.pslist`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return m.run(cmd.Context(), args[0]) },
	}
	fs := c.Flags()
	fs.StringVarP(&m.out, "output", "o", "", "the file to write")
	fs.Var(&m.format, "format", "of the file")
	fs.StringVar(&m.nvram, "nvram-from", "", "the NVRAM file, if it is no longer where the checkpoint says")
	fs.BoolVar(&m.json, "json", false, "print JSON on standard output")
	m.disks.addMoved(fs)
	fs.BoolVar(&m.quiet, "quiet", false, "no progress and no summary, only warnings and errors")
	setKey(fs, "format", "memory-format")
	setKey(fs, "output", "")
	return c
}

func (m *memoryCmd) run(ctx context.Context, name string) error {
	if m.out == "" {
		return usageError{errors.New("memory needs a file to write: -o FILE")}
	}
	st, ref, err := m.storeOf(ctx, name)
	if err != nil {
		return err
	}
	c, err := st.OpenCheckpoint(ctx, ref, checkpoint.Options{NVRAM: m.nvram, Disks: m.disks.reading()})
	if err != nil {
		return err
	}
	defer c.Close()
	show := newProgress(m.stderr, m.quiet)
	var rep *coredump.Report
	err = vfs.WriteFile(m.fs, m.out, vfs.Writing{New: true}, func(f vfs.File) (err error) {
		rep, err = coredump.Write(ctx, c.Checkpoint, f, coredump.Options{Format: coredump.Format(m.format.value), Progress: show.callback()})
		return err
	})
	show.finish()
	if err != nil {
		return fmt.Errorf("memory of %v: %w", c.Ref, err)
	}
	if m.json {
		return printJSON(m.stdout, rep)
	}
	if m.quiet {
		return nil
	}
	registers := ""
	if rep.Format == coredump.ELF {
		registers = fmt.Sprintf(" and the registers of %d vCPUs", rep.VCPUs)
	}
	_, err = fmt.Fprintf(m.stdout, "%s: %s of memory%s of %v; not in it: %s\n", m.out, human(rep.Memory), registers, c.Ref, strings.Join(rep.LeftOut, ", "))
	return err
}
