package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest/guestmem"
	"github.com/flic-migrate/flic-migrate/stream/returnpath"
)

// make records or derives the stream, proves it, and leaves it in testdata.
func (r *recording) make(ctx context.Context, testdata string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	dir, err := os.MkdirTemp("", "record")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	file := filepath.Join(dir, "stream")
	if r.from != "" {
		err = r.derive(ctx, testdata, file)
	} else {
		err = r.record(ctx, dir, file)
	}
	if err != nil {
		return err
	}
	return compress(ctx, file, filepath.Join(testdata, r.name+suffix))
}

// record runs the guest, saves it, and restores it into another QEMU.
func (r *recording) record(ctx context.Context, dir, file string) error {
	if err := r.writeFiles(dir); err != nil {
		return err
	}
	vm, err := qemutest.Launch(ctx, r.vmConfig(dir, false))
	if err != nil {
		return err
	}
	defer vm.Kill()
	if v := vm.QMP.Version().String(); v != r.qemu {
		return fmt.Errorf("this is QEMU %s, the table says %s", v, r.qemu)
	}
	ready := `tick 0000000\d\r`
	if r.config.Guest == qemutest.Linux {
		ready = `tick 5\r`
	}
	if _, err := vm.Expect(ctx, ready); err != nil {
		return err
	}
	if r.prepare != nil {
		if err := r.prepare(ctx, vm, dir); err != nil {
			return err
		}
	}
	if !r.live {
		if err := qmp.Stop(ctx, vm.QMP); err != nil {
			return err
		}
	}
	if err := r.save(ctx, vm, file); err != nil {
		return fmt.Errorf("save: %w\n%s", err, vm.Output())
	}
	before, err := vm.RAM(ctx)
	if err != nil {
		return err
	}
	vm.Kill()

	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	s, err := surveyStream(f)
	if err != nil {
		return fmt.Errorf("survey: %w", err)
	}
	if err := r.shows(s); err != nil {
		return fmt.Errorf("does not show what it is recorded for: %w", err)
	}
	if err := r.restore(ctx, dir, file, before); err != nil {
		return fmt.Errorf("restore: %w", err)
	}
	return nil
}

// writeFiles puts into dir what the guest is given.
func (r *recording) writeFiles(dir string) error {
	content := make([]byte, r.content*guestmem.PageSize)
	guestmem.Fill(content, 1)
	disk := make([]byte, 6<<20) // the middle third stays zero
	guestmem.Fill(disk[:1<<20], 2)
	guestmem.Fill(disk[4<<20:5<<20], 3)
	shared := make([]byte, 8<<20)
	guestmem.Fill(shared[:1<<20], 4)
	for name, data := range map[string][]byte{
		"content": content, "disk": disk, "disk-restored": make([]byte, len(disk)), "shared": shared,
	} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// vmConfig returns the machine, of the source or the destination. What the
// destination's memory holds must come from the stream: it gets no content.
func (r *recording) vmConfig(dir string, incoming bool) qemutest.Config {
	c := r.config
	if c.Guest == qemutest.Firmware {
		c.Guest = qemutest.Tiny
	}
	c.Args = append([]string(nil), c.Args...)
	if r.args != nil {
		c.Args = append(c.Args, r.args(dir, incoming)...)
	}
	if incoming {
		c.Incoming, c.Paused = "defer", true
		return c
	}
	if r.content > 0 {
		base := uint64(0)
		if c.Arch == "arm64" {
			base = 0x40000000
		}
		c.Args = append(c.Args, qemutest.Load(filepath.Join(dir, "content"), base+contentOffset)...)
		c.Args = append(c.Args, qemutest.Change(c.Arch, contentOffset, r.change[0], r.change[1])...)
	}
	return c
}

func setCapabilities(ctx context.Context, vm *qemutest.VM, names []string) error {
	on := make(map[string]bool)
	for _, name := range names {
		on[name] = true
	}
	return migration.SetCapabilities(ctx, vm.QMP, on)
}

func (r *recording) save(ctx context.Context, vm *qemutest.VM, file string) error {
	if err := setCapabilities(ctx, vm, r.capabilities); err != nil {
		return err
	}
	// As fast as it goes, unless the recording wants something else.
	parameters := map[string]any{"max-bandwidth": uint64(1) << 40}
	for name, value := range r.parameters {
		parameters[name] = value
	}
	if err := migration.SetParameters(ctx, vm.QMP, parameters); err != nil {
		return err
	}
	uri := "exec:cat > " + file
	if r.toFile {
		uri = "file:" + file
	}
	if r.slowly {
		uri = "exec:{ for i in 1 2 3 4 5 6 7 8; do head -c 128k; sleep 0.1; done; cat; } > " + file
	}
	if r.returnPath {
		// A suite's QEMU does not see this program where it is.
		self := file + ".answer"
		if err := copySelf(self); err != nil {
			return err
		}
		uri = "exec:exec " + self + " -answer " + file
	}
	arguments := map[string]any{"uri": uri}
	if r.blocks {
		arguments["blk"] = true // which later QEMUs do not know
	}
	if err := vm.QMP.Execute(ctx, "migrate", arguments, nil); err != nil {
		return err
	}
	_, err := migration.Wait(ctx, vm.QMP)
	return err
}

// copySelf makes a copy of this program.
func copySelf(to string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	program, err := os.ReadFile(self)
	if err != nil {
		return err
	}
	return os.WriteFile(to, program, 0o700)
}

// answer is the exec: child of a migration with a return path: it writes the
// stream to a file and, when it is there, tells QEMU so. Without that, QEMU
// would wait for ever.
func answer(in io.Reader, out io.Writer, file string) error {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	defer f.Close()
	value := uint32(1) // failed, until all is there
	_, err = surveyStream(io.TeeReader(in, f))
	if err = errors.Join(err, f.Close()); err == nil {
		value = 0
	}
	_, shut := out.Write(returnpath.AppendShut(nil, value))
	return errors.Join(err, shut)
}

// restore loads the stream into a second QEMU, compares its RAM with the
// source's, and lets the guest run on.
func (r *recording) restore(ctx context.Context, dir, file string, before map[string][]byte) error {
	vm, err := r.load(ctx, dir, file)
	if err != nil {
		return err
	}
	defer vm.Kill()
	if _, err := migration.Wait(ctx, vm.QMP); err != nil {
		return fmt.Errorf("%w\n%s", err, vm.Output())
	}
	after, err := vm.RAM(ctx)
	if err != nil {
		return err
	}
	for _, name := range r.unequal {
		if name == "*" {
			before, after = nil, nil
		}
		delete(before, name)
		delete(after, name)
	}
	if diff := qemutest.DiffRAM(before, after); diff != "" {
		return errors.New(diff)
	}
	if r.check != nil {
		if err := r.check(ctx, vm, dir); err != nil {
			return err
		}
	}
	if err := qmp.Cont(ctx, vm.QMP); err != nil {
		return err
	}
	_, err = vm.Expect(ctx, `tick \w+\r(?s:.*)tick \w+\r`)
	return err
}

// load starts a QEMU and lets it load the stream.
func (r *recording) load(ctx context.Context, dir, file string) (*qemutest.VM, error) {
	vm, err := qemutest.Launch(ctx, r.vmConfig(dir, true))
	if err != nil {
		return nil, err
	}
	if err := setCapabilities(ctx, vm, r.destination); err != nil {
		vm.Kill()
		return nil, err
	}
	uri := "exec:cat " + file
	if r.toFile {
		uri = "file:" + file
	}
	if err := migration.Incoming(ctx, vm.QMP, uri); err != nil {
		vm.Kill()
		return nil, err
	}
	return vm, nil
}

// derive damages another recording, and proves that QEMU refuses it.
func (r *recording) derive(ctx context.Context, testdata, file string) error {
	from := find(r.from)
	data, err := expand(ctx, filepath.Join(testdata, r.from+suffix))
	if err != nil {
		return err
	}
	s, err := surveyStream(bytes.NewReader(data))
	if err != nil {
		return err
	}
	data = r.damage(data, s)
	if err := os.WriteFile(file, data, 0o600); err != nil {
		return err
	}
	if _, err := surveyStream(bytes.NewReader(data)); err == nil {
		return errors.New("the damage is not found")
	}
	vm, err := from.load(ctx, filepath.Dir(file), file)
	if err != nil {
		return err
	}
	defer vm.Kill()
	select {
	case <-vm.Exited():
		if vm.ExitError() == nil {
			return errors.New("QEMU ends well")
		}
		return nil
	case <-time.After(10 * time.Second):
		return errors.New("QEMU loads it")
	case <-ctx.Done():
		return ctx.Err()
	}
}

// compress writes a file's zstd form. The temporary name keeps an older
// recording if this one fails.
func compress(ctx context.Context, file, target string) error {
	temporary := fmt.Sprintf("%s.%d", target, rand.Uint32())
	defer os.Remove(temporary)
	out, err := exec.CommandContext(ctx, "zstd", "-q", "-19", "-o", temporary, file).CombinedOutput()
	if err != nil {
		return fmt.Errorf("zstd: %w: %s", err, out)
	}
	if err := os.Chmod(temporary, 0o644); err != nil {
		return err
	}
	return os.Rename(temporary, target)
}

func expand(ctx context.Context, file string) ([]byte, error) {
	out, err := exec.CommandContext(ctx, "zstd", "-q", "-d", "-c", file).Output()
	if err != nil {
		return nil, fmt.Errorf("zstd -d %s: %w", file, err)
	}
	return out, nil
}
