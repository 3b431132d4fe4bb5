package main

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest/guestmem"
)

// toolDisks are the images of TestDiskTools: top stands on mid, and that on base.
//
//	        0      1 MiB   2 MiB   4 MiB     5 MiB   6 MiB   8 MiB
//	top     ┆       ┆       ┆       ┆         ┆  other ┆
//	mid     ┆       ┆       ┆ memory, 2nd MiB ┆
//	base    memory, 1st MiB ┆ other
type toolDisks struct{ dir, base, mid, top string }

func newToolDisks(t *testing.T, content []byte) (d toolDisks) {
	t.Helper()
	d.dir = filepath.Join(t.TempDir(), "images")
	ok(t, os.Mkdir(d.dir, 0o700))
	d.base, d.mid, d.top = filepath.Join(d.dir, "base"), filepath.Join(d.dir, "mid"), filepath.Join(d.dir, "top")
	other := make([]byte, 1<<20)
	rand.NewChaCha8([32]byte{7}).Read(other)
	ok(t, os.WriteFile(d.base, append(content[:1<<20:1<<20], other...), 0o600))
	ok(t, os.Truncate(d.base, 8<<20))
	second := filepath.Join(t.TempDir(), "second")
	ok(t, os.WriteFile(second, content[1<<20:2<<20], 0o600))
	img(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", d.base, "-F", "raw", d.mid)
	img(t, "qemu-io", "-f", "qcow2", "-c", "write -s "+second+" 4M 1M", d.mid)
	img(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", d.mid, "-F", "qcow2", d.top)
	img(t, "qemu-io", "-f", "qcow2", "-c", "write -P 9 6M 64k", d.top)
	return d
}

// TestDiskTools does to the images that a checkpoint has pages on what people do to images,
// with QEMU's own tools. Each time a restore gives the very stream that was saved, or it is
// refused before the first byte and names the image and what has become of it.
func TestDiskTools(t *testing.T) {
	t.Parallel()
	content := noise(768)
	c := q35.tiny(t, "32M", content, 1)
	vm := qemutest.Start(t, c)
	vm.WaitFor(t, `tick (\w+)\r`)
	ctx := limit(t)
	set(t, vm, fast)
	stop(t, ctx, vm)
	file := filepath.Join(t.TempDir(), "stream")
	saved(t, ctx, vm, "exec:cat >"+file)
	vm.Kill()
	stream, err := os.ReadFile(file)
	ok(t, err)

	tool := func(args ...string) func(t *testing.T, d toolDisks) {
		return func(t *testing.T, d toolDisks) {
			cmd := exec.Command(args[0], args[1:]...)
			cmd.Dir = d.dir
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%v: %v: %s", args, err, out)
			}
		}
	}
	both := func(steps ...func(t *testing.T, d toolDisks)) func(t *testing.T, d toolDisks) {
		return func(t *testing.T, d toolDisks) {
			for _, step := range steps {
				step(t, d)
			}
		}
	}
	write := func(format, file, what string) func(t *testing.T, d toolDisks) {
		return tool("qemu-io", "-f", format, "-c", what, file)
	}
	for name, c := range map[string]struct {
		change func(t *testing.T, d toolDisks)
		code   int
		says   []string // after a refusal
	}{
		"nothing":                      {tool("true"), exitOK, nil},
		"written to":                   {write("raw", "base", "write -P 1 512k 4k"), exitCorrupt, []string{"/base was written to", "digest mismatch"}},
		"written to elsewhere":         {write("raw", "base", "write -P 1 3M 64k"), exitOK, nil},
		"discarded":                    {write("raw", "base", "discard 512k 64k"), exitCorrupt, []string{"/base was written to", "digest mismatch"}},
		"a qcow2 written to":           {write("qcow2", "mid", "write -P 1 4160k 64k"), exitCorrupt, []string{"/mid was written to", "digest mismatch"}},
		"a qcow2 written to elsewhere": {write("qcow2", "mid", "write -P 1 512k 64k"), exitOK, nil},
		"an overlay written to":        {write("qcow2", "top", "write -P 1 512k 64k"), exitOK, nil},
		"an internal snapshot":         {tool("qemu-img", "snapshot", "-c", "then", "mid"), exitOK, nil},
		"an internal snapshot, and written to": {both(tool("qemu-img", "snapshot", "-c", "then", "mid"), write("qcow2", "mid", "write -P 1 4160k 64k")),
			exitCorrupt, []string{"/mid was written to", "digest mismatch"}},

		"committed elsewhere": {tool("qemu-img", "commit", "-q", "top"), exitOK, nil},
		"committed": {both(write("qcow2", "top", "write -P 1 4160k 64k"), tool("qemu-img", "commit", "-q", "top")),
			exitCorrupt, []string{"/mid was written to", "digest mismatch"}},
		"committed over a layer": {both(write("qcow2", "top", "write -P 1 512k 64k"), tool("qemu-img", "commit", "-q", "-b", "base", "top")),
			exitCorrupt, []string{"/base was written to", "digest mismatch"}},
		"committed, and emptied": {tool("qemu-img", "commit", "-q", "mid"), exitCorrupt, []string{"/mid was ", "digest mismatch"}},
		// What it has lies where nothing is needed of what it went to.
		"committed, and left as it was": {tool("qemu-img", "commit", "-q", "-d", "mid"), exitOK, nil},

		"the top rebased":  {tool("qemu-img", "rebase", "-F", "raw", "-b", "base", "top"), exitOK, nil},
		"rebased":          {tool("qemu-img", "rebase", "-b", "", "mid"), exitOK, nil},
		"rebased in place": {both(tool("qemu-img", "create", "-q", "-f", "raw", "other", "8M"), tool("qemu-img", "rebase", "-u", "-F", "raw", "-b", "other", "mid")), exitOK, nil},

		"replaced by a copy":       {both(tool("cp", "base", "copy"), tool("mv", "copy", "base")), exitOK, nil},
		"replaced by what is flat": {both(tool("qemu-img", "convert", "-O", "qcow2", "mid", "flat"), tool("mv", "flat", "mid")), exitOK, nil},
		"replaced by another": {both(tool("qemu-img", "create", "-q", "-f", "raw", "other", "8M"), tool("mv", "other", "base")),
			exitCorrupt, []string{"/base is another file now", "digest mismatch"}},
		"replaced by another format": {both(tool("qemu-img", "convert", "-O", "qcow2", "base", "other"), tool("mv", "other", "base")),
			exitCorrupt, []string{"/base is another file now", "digest mismatch"}},
		"a qcow2 replaced by a raw file": {both(tool("qemu-img", "convert", "-O", "raw", "mid", "other"), tool("mv", "other", "mid")),
			exitFailed, []string{"/mid"}},

		"cut":           {tool("truncate", "-s", "512K", "base"), exitCorrupt, []string{"/base was made smaller", "ends before it"}},
		"a qcow2 cut":   {tool("truncate", "-s", "512K", "mid"), exitCorrupt, []string{"/mid was cut", "digest mismatch"}},
		"shrunk":        {tool("qemu-img", "resize", "-q", "-f", "raw", "--shrink", "base", "512K"), exitCorrupt, []string{"/base was made smaller", "ends before it"}},
		"grown":         {tool("qemu-img", "resize", "-q", "-f", "raw", "base", "16M"), exitOK, nil},
		"a qcow2 grown": {tool("qemu-img", "resize", "-q", "mid", "16M"), exitOK, nil},
		"renamed":       {tool("mv", "base", "old"), exitNotFound, []string{"/base", "no such file"}},
		"the top gone":  {tool("rm", "top"), exitOK, nil},
		"names exchanged": {both(tool("mv", "base", "other"), tool("mv", "mid", "base"), tool("mv", "other", "mid")),
			exitFailed, []string{"/mid"}},
	} {
		t.Run(strings.ReplaceAll(name, " ", "-"), func(t *testing.T) {
			l, d := newLab(t), newToolDisks(t, content)
			l.saveStream(t, stream, d.top)
			c.change(t, d)
			l.judge(t, stream, c.code, c.says)
			if name == "renamed" {
				l.judge(t, stream, exitOK, nil, "--disk", d.base+"="+d.dir+"/old")
			}
		})
	}

	// A file system that is not there at the moment: nothing is lost when it comes back,
	// and a file that the directory under it has is another one.
	t.Run("unmounted", func(t *testing.T) {
		l, d := newLab(t), newToolDisks(t, content)
		under := filepath.Join(t.TempDir(), "under")
		ok(t, os.Rename(d.dir, under))
		ok(t, os.Mkdir(d.dir, 0o700))
		mount := func() {
			t.Helper()
			if err := unix.Mount(under, d.dir, "", unix.MS_BIND, ""); err != nil {
				t.Fatalf("mount, which needs root: %v", err)
			}
		}
		unmount := func() { ok(t, unix.Unmount(d.dir, unix.MNT_DETACH)) }
		mount()
		t.Cleanup(func() { _ = unix.Unmount(d.dir, unix.MNT_DETACH) })
		l.saveStream(t, stream, d.top)
		unmount()
		l.judge(t, stream, exitNotFound, []string{"/mid", "no such file"})
		img(t, "qemu-img", "create", "-q", "-f", "raw", d.base, "8M")
		img(t, "qemu-img", "create", "-q", "-f", "qcow2", d.mid, "8M")
		l.judge(t, stream, exitCorrupt, []string{"/mid is another file now", "digest mismatch"})
		mount()
		l.judge(t, stream, exitOK, nil)
		// And one that keeps nothing.
		unmount()
		ok(t, unix.Mount("tmpfs", d.dir, "tmpfs", 0, "size=1m"))
		l.judge(t, stream, exitNotFound, []string{"/mid", "no such file"})
	})
}

// saveStream saves a stream with a disk that has an index, as have the two that it stands on.
func (l *lab) saveStream(t *testing.T, stream []byte, disk string) {
	t.Helper()
	indexed(t, l, disk)
	cmd := exec.Command("flic-migrate", "save", "--quiet", "--store", l.store, "--vm", "vm", "--disk", disk)
	cmd.Stdin = bytes.NewReader(stream)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("save: %v\n%s", err, out)
	}
	m := l.show(t, "vm")
	if pages := int64(2<<20) / guestmem.PageSize; m.Report.Disk != pages || len(m.Report.Disks) != 2 {
		t.Fatalf("%d pages are on disk, want %d: %+v", m.Report.Disk, pages, m.Report.Disks)
	}
}

// judge restores the VM's checkpoint, and verifies it: both end with this code. What is
// restored is the stream or nothing.
func (l *lab) judge(t *testing.T, stream []byte, code int, says []string, flags ...string) {
	t.Helper()
	for _, verb := range []string{"restore", "verify"} {
		cmd := exec.Command("flic-migrate", append([]string{verb, "--store", l.store, "vm"}, flags...)...)
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		err := cmd.Run()
		got := 0
		if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
			got = exit.ExitCode()
		} else {
			ok(t, err)
		}
		if verb == "verify" {
			if (got == exitOK) != (code == exitOK) {
				t.Errorf("verify ends with %d, and restore with %d: %s%s", got, code, stdout.String(), stderr.String())
			}
			continue
		}
		if got != code {
			t.Errorf("restore ends with %d, want %d: %s", got, code, stderr.String())
		}
		for _, s := range says {
			if !strings.Contains(stderr.String(), s) {
				t.Errorf("restore does not say %q: %s", s, stderr.String())
			}
		}
		if code == exitOK && !bytes.Equal(stdout.Bytes(), stream) {
			t.Errorf("%d bytes were restored, other than the %d that were saved", stdout.Len(), len(stream))
		} else if code != exitOK && stdout.String() != "flic-migrate: restore failed\n" { // no stream for any QEMU
			t.Errorf("%d bytes were restored before it was refused", stdout.Len())
		}
	}
}

// TestDiskGoesWhileResuming: the guest runs, and not all that is on disk images has been
// read. One that is unmounted is read all the same, as it is open. One that is cut holds the
// guest, and when it is whole again recover goes on.
func TestDiskGoesWhileResuming(t *testing.T) {
	t.Parallel()
	ctx, l, content := limit(t), newLab(t), noise(768)
	d := newToolDisks(t, content)
	under := filepath.Join(t.TempDir(), "under")
	ok(t, os.Rename(d.dir, under))
	ok(t, os.Mkdir(d.dir, 0o700))
	mount := func() {
		t.Helper()
		if err := unix.Mount(under, d.dir, "", unix.MS_BIND, ""); err != nil {
			t.Fatalf("mount, which needs root: %v", err)
		}
	}
	mount()
	t.Cleanup(func() { _ = unix.Unmount(d.dir, unix.MNT_DETACH) })
	indexed(t, l, d.top)
	c := q35.tiny(t, "32M", content, 1)
	vm := qemutest.Start(t, c)
	vm.WaitFor(t, `tick (\w+)\r`)
	set(t, vm, fast)
	want := stop(t, ctx, vm)
	saved(t, ctx, vm, l.save("--disk", d.top))
	tick := lastTick(t, vm.Console(), 16)
	vm.Kill()
	if m := l.show(t, "vm"); m.Report.Disk != 512 {
		t.Fatalf("%+v", m.Report)
	}
	base, err := os.ReadFile(under + "/base")
	ok(t, err)
	for what, change := range map[string]func(){
		"unmounted": func() { ok(t, unix.Unmount(d.dir, unix.MNT_DETACH)) },
		"cut":       func() { ok(t, os.Truncate(d.base, 0)) },
	} {
		// Nothing that is not asked for is read in the first second, and a paused guest
		// asks for nothing.
		vm := qemutest.Start(t, destination(c, "defer"))
		r := l.resumes(t, "flic-migrate", vm, "--lazy", "always", "--learn", "1s", "vm@1")
		r.says(t, `vm@1: paused after`)
		change()
		doc, _ := r.outcome(t)
		if what == "unmounted" {
			if doc.ExitCode != exitOK {
				t.Errorf("%s: %+v", what, doc)
			}
			mount()
		} else {
			said(t, doc, exitCorrupt, []string{"nothing is lost", "--recover", d.base, "digest mismatch", "the image was made smaller"})
			l.fails(t, "flic-migrate", vm, exitCorrupt, []string{d.base + " was made smaller", "the disk ends before it"}, "--recover", "vm@1")
			f, err := os.OpenFile(d.base, os.O_WRONLY, 0)
			ok(t, err)
			_, err = f.Write(base)
			ok(t, err)
			ok(t, f.Close())
			l.resume(t, vm, "--recover", "vm@1")
		}
		if diff := qemutest.DiffRAM(want, ram(t, ctx, vm)); diff != "" {
			t.Errorf("%s: %s", what, diff)
		}
		goesOn(t, ctx, vm, tick, 16)
		vm.Kill()
	}
}
