package main

import (
	"context"
	"fmt"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
)

// clone resumes the second checkpoint twice, at once. The clones stay paused until they have
// been compared with the guest that was saved.
func (d *lab) clone(ctx context.Context, f *figures) error {
	d.chapter("Two clones of one checkpoint, at once, each with an overlay of its own")
	d.command("qemu-img create …, qemu-system-x86_64 … as above, for clone1 and clone2")
	var group errgroup.Group
	var took [2]time.Duration
	for i := range d.clones {
		name := "clone" + strconv.Itoa(i+1)
		d.command(fmt.Sprintf("flic-migrate resume --qmp %s.qmp --paused web1@2 &", name))
		vm, err := d.waiting(ctx, name, d.frozen[1])
		if err != nil {
			return err
		}
		d.clones[i] = vm
		group.Go(func() (err error) {
			took[i], err = d.resume(ctx, vm, name, "web1@2", "--lazy", "always", "--paused")
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	f.clonesRun = max(took[0], took[1])
	d.figure(fmt.Sprintf("both can run after %s", milliseconds(f.clonesRun)), "booting one  "+seconds(f.boot))
	return nil
}

// check ends the story: are they right?
func (d *lab) check(ctx context.Context, f *figures) error {
	// Their memory, before they run: it is that of the guest that stands still.
	want, err := d.web1.RAM(ctx)
	if err != nil {
		return err
	}
	for _, b := range want {
		f.ramBytes += int64(len(b))
	}
	end, err := d.lastTick()
	if err != nil {
		return err
	}
	for i, vm := range d.clones {
		got, err := vm.RAM(ctx)
		if err != nil {
			return err
		}
		if diff := qemutest.DiffRAM(want, got); diff != "" {
			return fmt.Errorf("the RAM of clone%d is not what was saved: %s", i+1, diff)
		}
		if err := qmp.Cont(ctx, vm.QMP); err != nil {
			return err
		}
	}
	// They go on from their own moments, and their data are as their own checksums have it.
	for _, g := range []struct {
		name     string
		vm       *qemutest.VM
		from, to int
		said     string
	}{
		{"back", d.back, d.before, d.after, "first"},
		{"clone1", d.clones[0], end, end, "second"},
		{"clone2", d.clones[1], end, end, "second"},
	} {
		if err := right(ctx, g.vm, g.from, g.to); err != nil {
			return fmt.Errorf("%s: %w", g.name, err)
		}
		said, err := ask(ctx, g.vm, reread, `on disk: (\w+)\r`)
		if err != nil {
			return fmt.Errorf("%s: %w", g.name, err)
		}
		if said[1] != g.said {
			return fmt.Errorf("%s finds %q on its disk, and the memory is of the time when that said %q", g.name, said[1], g.said)
		}
		// From here on each has a disk of its own.
		said, err = ask(ctx, g.vm, "run echo "+g.name+" >/said && sync; "+reread[len("run "):], `on disk: (\w+)\r`)
		if err != nil {
			return fmt.Errorf("%s: %w", g.name, err)
		}
		if said[1] != g.name {
			return fmt.Errorf("%s has written to its disk, and finds %q", g.name, said[1])
		}
	}
	for i := range d.clones {
		n, err := occupied(filepath.Join(d.dir, "clone"+strconv.Itoa(i+1)+".qcow2"))
		if err != nil {
			return err
		}
		f.overlaidDisks += n
	}
	one, err := occupied(d.path("web1.qcow2"))
	if err != nil {
		return err
	}
	f.copiedDisks = 2 * one
	d.figure("their disks take "+megabytes(f.overlaidDisks), "two copies  "+megabytes(f.copiedDisks))
	if out, err := d.program(ctx, "verify", "--all").CombinedOutput(); err != nil {
		return fmt.Errorf("verify: %w: %s", err, out)
	}
	d.chapter("Are they right?")
	d.say("    ok  clone1, clone2: %s of RAM are web1's, byte for byte", megabytes(f.ramBytes))
	d.say("    ok  all three count on, and find their data as their checksums have it")
	d.say("    ok  each has the disk of its moment, and then writes to its own")
	d.say("    ok  flic-migrate verify --all: each stored byte")
	return nil
}

// reread has the guest read its disk, past its cache.
const reread = "run echo 3 >/proc/sys/vm/drop_caches; echo on disk: $(cat /said) >/dev/console"

// right checks a guest that has been resumed: it counts on from a number between two, or soon
// after, and all of its data are what it remembers.
func right(ctx context.Context, vm *qemutest.VM, from, to int) error {
	m, err := expect(ctx, vm, `tick (\d+)\r`)
	if err != nil {
		return err
	}
	// What the serial port had not yet handed out comes after.
	const slack = 20
	if n, _ := strconv.Atoi(m[1]); n < from || n > to+slack {
		return fmt.Errorf("it goes on at %d, and was saved between %d and %d", n, from, to)
	}
	m, err = ask(ctx, vm, "check", `check (ok|bad) [^\r]*`)
	if err == nil && m[1] != "ok" {
		err = fmt.Errorf("it finds its data damaged: %s", m[0])
	}
	return err
}
