// Command demo tells the whole story on a real guest, in one screen: a Linux guest runs under
// QEMU; it is saved while it runs, with its disk and its working set in NVRAM; brought back
// with the guest running at once; saved again for what has changed; and cloned twice. Beside
// each figure stands what the same takes with what else there is, lz4 behind exec: above all.
// In the end it is checked that the resumed guests are right. Any step that fails ends it with
// exit code 1, and it leaves nothing behind.
//
// What it shows are single runs on this machine, whatever else that does: "make bench" measures.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
)

func main() {
	o := options{out: os.Stdout}
	flag.IntVar(&o.memory, "memory", 512, "the guest's RAM, MiB")
	flag.IntVar(&o.fill, "fill", 200, "MiB of it that the guest fills with data")
	flag.Parse()
	root, err := qemutest.ModuleRoot()
	if err == nil {
		o.binary = filepath.Join(root, "bin", "flic-migrate")
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
		context.AfterFunc(ctx, stop) // a second one kills
		_, err = run(ctx, o)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo: FAILED:", err)
		os.Exit(1)
	}
}

type options struct {
	memory int    // MiB
	fill   int    // MiB
	binary string // the program's path
	out    io.Writer
}

// figures are what has been measured, as the screen has it.
type figures struct {
	boot                                 time.Duration
	lz4Save, stood                       time.Duration // the guest stands still for so long
	lz4Bytes, firstBytes, firstNVRAM     int64
	lz4Runs, eagerRuns, lazyRuns         time.Duration // from the command until the guest runs
	lz4AgainBytes, secondBytes           int64
	lz4AgainSave, second                 time.Duration
	clonesRun                            time.Duration // from both commands until both run
	copiedDisks, overlaidDisks, ramBytes int64
}

// run tells the story. Whatever happens, no process and no file of it is left.
func run(ctx context.Context, o options) (f figures, err error) {
	start := time.Now()
	// Their making is no part of the story: a kernel is downloaded.
	slow := time.AfterFunc(3*time.Second, func() {
		fmt.Fprintln(os.Stderr, "demo: making the guest, the first time only: Debian's kernel is downloaded, 27 MB")
	})
	_, err = qemutest.Assets(ctx, "x86")
	slow.Stop()
	if err != nil {
		return f, err
	}
	d, err := newLab(o)
	if err != nil {
		return f, err
	}
	defer func() {
		cleared := d.clear()
		if err != nil && ctx.Err() != nil {
			err = errors.New("interrupted") // what was being done is not to blame
		}
		err = errors.Join(err, cleared)
	}()
	for _, chapter := range []func(context.Context, *figures) error{d.begin, d.save, d.bringBack, d.saveAgain, d.clone, d.check} {
		if err := chapter(ctx, &f); err != nil {
			return f, err
		}
	}
	d.say("All of it took %.0f s. With your own VM: docs/first-steps.md", time.Since(start).Seconds())
	return f, nil
}

// begin boots the guest with its disk.
func (d *lab) begin(ctx context.Context, f *figures) (err error) {
	if err := d.makeDisk(ctx, "web1.qcow2"); err != nil {
		return fmt.Errorf("the guest's disk: %w", err)
	}
	start := time.Now()
	if d.web1, err = d.launch(ctx, "web1", "web1.qcow2", false); err != nil {
		return err
	}
	if _, err := expect(ctx, d.web1, `flic ready`); err != nil {
		return err
	}
	f.boot = time.Since(start)
	v := d.web1.QMP.Version().QEMU
	d.say("A Linux guest of %d MiB, %d MiB of it data, in QEMU %d.%d without KVM.", d.memory, d.fill, v.Major, v.Minor)
	d.say("Left: what flic-migrate takes. Right: what is used today. Single runs.")
	d.command("export " + d.settings())
	d.command("qemu-system-x86_64 … -drive file=web1.qcow2,… -qmp unix:web1.qmp,…")
	// The pages of a working set, some that change, and something on the disk.
	for _, line := range [][2]string{
		{"touch 0 2000", `touch 0 \d+`},
		{"dirty 5 64", `dirty 5 64`},
		{"run mount -o remount,rw /dev/vda / && echo first >/said && sync && echo has said first >/dev/console", `has said first`},
	} {
		if _, err := ask(ctx, d.web1, line[0], line[1]); err != nil {
			return err
		}
	}
	return nil
}

// save is the first checkpoint.
func (d *lab) save(ctx context.Context, f *figures) (err error) {
	if f.lz4Save, f.lz4Bytes, err = d.saveLZ4(ctx); err != nil {
		return err
	}
	d.before, err = d.lastTick()
	if err != nil {
		return err
	}
	d.chapter("Save it while it runs: the pages that it writes to NVRAM, the others to flash")
	rep, err := d.checkpoint(ctx, "--disks", "snapshot")
	if err != nil {
		return err
	}
	if rep.Save.NVRAMBytes == 0 || rep.Downtime == 0 {
		return fmt.Errorf("the checkpoint has no working set, or its guest did not run: %+v", rep)
	}
	f.stood, f.firstNVRAM = time.Duration(rep.Downtime), rep.Save.NVRAMBytes
	f.firstBytes = rep.Save.NVRAMBytes + rep.Save.FlashBytes
	d.frozen = append(d.frozen, rep.Snapshots[0].Frozen)
	if d.after, err = d.lastTick(); err != nil {
		return err
	}
	d.figure(fmt.Sprintf("the guest stands still for %s", seconds(f.stood)), "exec:lz4  "+seconds(f.lz4Save))
	d.figure(fmt.Sprintf("%s, of it %s in NVRAM", megabytes(f.firstBytes), megabytes(f.firstNVRAM)), "exec:lz4  "+megabytes(f.lz4Bytes))
	return nil
}

// bringBack resumes the first checkpoint, in three ways.
func (d *lab) bringBack(ctx context.Context, f *figures) (err error) {
	if f.lz4Runs, err = d.restoreLZ4(ctx); err != nil {
		return err
	}
	eager, took, err := d.resumed(ctx, "eager", d.frozen[0], "web1@1", "--lazy", "never", "--paused")
	if err != nil {
		return err
	}
	eager.Kill()
	f.eagerRuns = took
	d.chapter("Bring it back; its disk is an overlay on the one that belongs to the memory")
	d.command("qemu-img create -q -f qcow2 -b web1.qcow2 -F qcow2 back.qcow2")
	d.command("qemu-system-x86_64 … -drive file=back.qcow2,… -qmp … -incoming defer -S")
	d.command("flic-migrate resume --qmp back.qmp web1@1")
	if d.back, f.lazyRuns, err = d.resumed(ctx, "back", d.frozen[0], "web1@1", "--lazy", "always"); err != nil {
		return err
	}
	d.figure(fmt.Sprintf("it runs after %s", milliseconds(f.lazyRuns)), "exec:lz4  "+milliseconds(f.lz4Runs))
	d.figure("", "resume --lazy never  "+milliseconds(f.eagerRuns))
	return nil
}

// saveAgain is the second checkpoint. The guest stays paused, to be compared with its clones.
func (d *lab) saveAgain(ctx context.Context, f *figures) (err error) {
	if _, err := ask(ctx, d.web1, "run echo second >/said && sync && echo has said second >/dev/console", `has said second`); err != nil {
		return err
	}
	if f.lz4AgainSave, f.lz4AgainBytes, err = d.saveLZ4(ctx); err != nil {
		return err
	}
	// The resume has left a note of the pages that it had to wait for, which are hot from now on.
	d.chapter("Save it again: what has changed, and to NVRAM what the resume waited for")
	rep, err := d.checkpoint(ctx, "--disks", "snapshot", "--then", "pause")
	if err != nil {
		return err
	}
	f.second, f.secondBytes = time.Duration(rep.Save.Seconds.Total*1e9), rep.Save.NVRAMBytes+rep.Save.FlashBytes
	d.frozen = append(d.frozen, rep.Snapshots[0].Frozen)
	d.figure(fmt.Sprintf("%s to flash, %s to NVRAM, %s", megabytes(rep.Save.FlashBytes), megabytes(rep.Save.NVRAMBytes), seconds(f.second)),
		fmt.Sprintf("exec:lz4  %s in %s", megabytes(f.lz4AgainBytes), seconds(f.lz4AgainSave)))
	return nil
}
