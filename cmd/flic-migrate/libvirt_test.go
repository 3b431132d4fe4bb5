package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp/libvirt/compressor"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest/guestmem"
	"github.com/flic-migrate/flic-migrate/tier/workingset"
)

// host is a libvirtd for a test. The wrapper is this test binary.
type host struct {
	*qemutest.Libvirt
	config string // the configuration file of the wrapper
}

// links is where the wrapper is, below the libvirtd's directory.
const links = "usr/local/lib/flic-migrate/libvirt"

const ourFormats = "save_image_format = \"lzop\"\nsnapshot_image_format = \"lzop\"\n"

func newHost(t *testing.T, config qemutest.LibvirtConfig) *host {
	t.Helper()
	file := filepath.Join(t.TempDir(), "config.toml")
	ok(t, os.WriteFile(file, nil, 0o600))
	config.Env = append(config.Env, "FLIC_CONFIG="+file)
	config.Path = append(config.Path, links)
	return &host{qemutest.StartLibvirt(t, config), file}
}

// wrap puts the wrapper before the real compressor.
func (v *host) wrap(t *testing.T, names ...string) {
	t.Helper()
	self, err := os.Executable()
	ok(t, err)
	ok(t, os.MkdirAll(filepath.Join(v.Dir, links), 0o755))
	for _, name := range names {
		ok(t, os.Symlink(self, filepath.Join(v.Dir, links, name)))
	}
}

// logs tells whether libvirtd logs this, which it may do after it has answered virsh.
func (v *host) logs(what string) bool {
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if strings.Contains(v.Log(), what) {
			return true
		}
	}
	return false
}

func (v *host) path(name string) string { return filepath.Join(v.Dir, name) }

// ours tells whether a save file is whole and holds a flash image.
func (v *host) ours(t *testing.T, name string) bool {
	t.Helper()
	b, err := os.ReadFile(name)
	ok(t, err)
	if !bytes.HasPrefix(b, []byte("LibvirtQemudSave")) {
		t.Errorf("%s begins with %.16q", name, b)
	}
	return bytes.HasPrefix(b[92+binary.NativeEndian.Uint32(b[20:]):], []byte(imageMagic))
}

func (v *host) state(t *testing.T, domain string) string { return v.Do(t, "domstate", domain) }

func (v *host) ram(t *testing.T, domain string, size int) []byte {
	t.Helper()
	b, err := v.DomainRAM(domain, size)
	ok(t, err)
	return b
}

// ticks waits until the guest has counted on twice.
func ticks(t *testing.T, vm *qemutest.VM) {
	t.Helper()
	for range 2 {
		vm.WaitFor(t, `tick \w+\r`)
	}
}

// TestLibvirt saves and restores a Linux guest in all the ways that virsh has,
// again and again: its memory is what it was, and the guest goes on.
func TestLibvirt(t *testing.T) {
	v := newHost(t, qemutest.LibvirtConfig{QEMU: ourFormats})
	v.wrap(t, "lzop")
	const size = 98312 << 10 // see qemutest.LiveMemory
	ok(t, v.Define(t.Context(), qemutest.Domain{Name: "web 1", Guest: qemutest.Linux, Memory: "98312", Kernel: "flic.fill=16 flic.dirty=20"}))
	v.Do(t, "start", "web 1")
	vm := v.Attach(t, "web 1")
	vm.WaitFor(t, `flic ready`)
	file := v.path("web.save")

	for cycle := range 3 {
		v.Do(t, "suspend", "web 1")
		want := v.ram(t, "web 1", size)
		v.Do(t, "save", "web 1", file)
		if !v.ours(t, file) {
			t.Fatal("the save file is not ours")
		}
		args := []string{"restore", file}
		if cycle == 1 {
			args = append(args, "--bypass-cache") // through a pipe
		}
		v.Do(t, args...)
		if s := v.state(t, "web 1"); s != "paused" {
			t.Errorf("restored, the domain is %s", s)
		}
		if got := v.ram(t, "web 1", size); !bytes.Equal(got, want) {
			t.Errorf("cycle %d: restored memory differs at %#x", cycle, differAt(got, want))
		}
		vm = v.Attach(t, "web 1")
		v.Do(t, "resume", "web 1")
		checks(t, vm)
		ticks(t, vm)
	}

	v.Do(t, "save", "web 1", file)
	v.Do(t, "restore", file)
	vm = v.Attach(t, "web 1")
	checks(t, vm)

	v.Do(t, "save", "--paused", "web 1", file)
	v.Do(t, "restore", file)
	vm = v.Attach(t, "web 1")
	if s := v.state(t, "web 1"); s != "paused" {
		t.Errorf("saved with --paused, it is %s", s)
	}
	v.Do(t, "resume", "web 1")
	checks(t, vm)

	v.Do(t, "managedsave", "web 1")
	managed := v.path("var/lib/libvirt/qemu/save/web 1.save")
	if !v.ours(t, managed) {
		t.Error("the managed save is not ours")
	}
	v.Do(t, "start", "web 1")
	vm = v.Attach(t, "web 1")
	checks(t, vm)
	ticks(t, vm)
	if _, err := os.Stat(managed); err == nil {
		t.Error("the managed save is still there")
	}

	// A guest that runs during the snapshot has pages sent again.
	memory := v.path("snapshot.mem")
	v.Do(t, "snapshot-create-as", "web 1", "s1", "--live", "--memspec", memory+",snapshot=external")
	checks(t, vm)
	if !v.ours(t, memory) {
		t.Error("the snapshot's memory is not ours")
	}
	// Older ones have no way back to such a snapshot but restoring its memory.
	if out, err := v.Virsh("snapshot-revert", "web 1", "s1"); err == nil {
		vm = v.Attach(t, "web 1")
		ticks(t, vm)
		if answer := vm.Ask(t, "check"); !strings.HasPrefix(answer, "ok ") {
			t.Errorf("reverted to a live snapshot: check %s", answer)
		}
		v.Do(t, "snapshot-delete", "web 1", "s1", "--metadata")
	} else if !strings.Contains(out, "external snapshot not supported") {
		t.Errorf("snapshot-revert: %v", err)
	}
	v.Do(t, "destroy", "web 1")
	v.Do(t, "restore", memory)
	vm = v.Attach(t, "web 1")
	ticks(t, vm)
	if answer := vm.Ask(t, "check"); !strings.HasPrefix(answer, "ok ") {
		t.Errorf("after a live snapshot: check %s", answer)
	}
}

func differAt(a, b []byte) int {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i + 1<<20
		}
	}
	return min(len(a), len(b))
}

// tinyNoise is a domain that is up at once, with so many pages that can't be
// compressed: its save takes a while, and room.
func (h *host) tinyNoise(t *testing.T, name string, pages int) *qemutest.VM {
	t.Helper()
	file := h.path(name + ".content")
	ok(t, os.WriteFile(file, noise(pages), 0o600))
	ok(t, h.Define(t.Context(), qemutest.Domain{Name: name, Guest: qemutest.Tiny, Memory: "262152", Args: qemutest.Load(file, contentAt)}))
	h.Do(t, "start", name)
	vm := h.Attach(t, name)
	ticks(t, vm)
	return vm
}

// TestLibvirtInstall: save files from before the installation are restored after
// it and after it has been undone, and those of ours in between.
func TestLibvirtInstall(t *testing.T) {
	v := newHost(t, qemutest.LibvirtConfig{QEMU: "save_image_format = \"gzip\"\n"})
	before, err := os.ReadFile(v.path("etc/libvirt/qemu.conf"))
	ok(t, err)
	v.tinyNoise(t, "a", 64)
	gzip, lzop, ours := v.path("gzip.save"), v.path("lzop.save"), v.path("ours.save")
	format := func(name string) {
		t.Helper()
		ok(t, os.WriteFile(v.path("etc/libvirt/qemu.conf"), bytes.Replace(before, []byte("gzip"), []byte(name), 1), 0o600))
		v.Restart(t)
	}
	cycle := func(file string, wantOurs bool) {
		t.Helper()
		v.Do(t, "save", "a", file)
		if v.ours(t, file) != wantOurs {
			t.Errorf("%s: ours is %v", file, !wantOurs)
		}
		v.Do(t, "restore", file)
		ticks(t, v.Attach(t, "a"))
	}
	again := func(file string) {
		t.Helper()
		v.Do(t, "destroy", "a")
		v.Do(t, "restore", file)
		ticks(t, v.Attach(t, "a"))
	}
	cycle(gzip, false)
	format("lzop")
	cycle(lzop, false)
	format("gzip")

	install := func(verb string) {
		t.Helper()
		out, err := exec.Command("flic-migrate", "libvirt", verb, "--root", v.Dir).CombinedOutput()
		if err != nil {
			t.Fatalf("libvirt %s: %v\n%s", verb, err, out)
		}
		v.Restart(t)
	}
	install("install")
	again(gzip)
	again(lzop)
	cycle(ours, true)
	again(ours)
	again(gzip)

	// A save file that needs no program of ours.
	raw := v.path("raw.save")
	l := newLab(t)
	l.run(t, "import", ours)
	l.run(t, "export", "a", raw)
	install("uninstall")
	after, err := os.ReadFile(v.path("etc/libvirt/qemu.conf"))
	ok(t, err)
	if !bytes.Equal(after, before) {
		t.Errorf("qemu.conf is left as\n%s\nand was\n%s", after, before)
	}
	if _, err := os.Stat(v.path("usr/local/lib/flic-migrate")); err == nil {
		t.Error("something of us is left")
	}
	again(gzip)
	again(lzop)
	again(raw)
	cycle(gzip, false)

	// Ours does not come back without us. The real program writes nothing, so virsh
	// waits until the domain is destroyed, which uninstall has said.
	v.Do(t, "destroy", "a")
	restored := make(chan error, 1)
	go func() {
		_, err := v.Virsh("restore", ours)
		restored <- err
	}()
	select {
	case err = <-restored:
	case <-time.After(5 * time.Second):
		t.Log("virsh restore waits")
		if out, err := v.Virsh("destroy", "a"); err != nil {
			t.Errorf("destroy: %v, %s", err, out)
		}
		err = <-restored
	}
	if err == nil {
		t.Error("a file of ours was restored without us")
	}
	v.Do(t, "restore", gzip)
	ticks(t, v.Attach(t, "a"))

	// A raw save file of libvirt's comes back byte for byte.
	format("raw")
	direct, back := v.path("direct.save"), v.path("back.save")
	v.Do(t, "save", "a", direct)
	l.run(t, "import", "--vm", "raw", direct)
	l.run(t, "export", "raw", back)
	want, err := os.ReadFile(direct)
	ok(t, err)
	got, err := os.ReadFile(back)
	ok(t, err)
	if !bytes.Equal(got, want) {
		t.Errorf("exported %d bytes, imported %d: they differ", len(got), len(want))
	}
	v.Do(t, "restore", back)
	ticks(t, v.Attach(t, "a"))
}

// TestLibvirtFails: whatever goes wrong, virsh save says so with our reason,
// the domain runs on, and no file is left that looks whole.
func TestLibvirtFails(t *testing.T) {
	v := newHost(t, qemutest.LibvirtConfig{QEMU: ourFormats, Full: "8m"})
	v.wrap(t, "lzop")
	vm := v.tinyNoise(t, "a", 24<<20>>12)
	file := v.path("a.save")
	fails := func(what, file, reason string) {
		t.Helper()
		out, err := v.Virsh("save", "a", file)
		if err == nil {
			t.Fatalf("%s: saved", what)
		}
		if !strings.Contains(out, reason) && !v.logs(reason) {
			t.Errorf("%s: neither virsh nor the log says %q: %s", what, reason, out)
		}
		if s := v.state(t, "a"); s != "running" {
			t.Errorf("%s: the domain is %s", what, s)
		}
		ticks(t, vm)
		// The file system is another's: seen through a process that has it.
		view := fmt.Sprintf("/proc/%d/root%s", v.Processes("libvirtd")[0], file)
		if b, err := os.ReadFile(view); err == nil && bytes.HasPrefix(b, []byte("LibvirtQemudSave")) {
			t.Errorf("%s: a file is left that looks whole", what)
		}
	}
	// Twice: what failed has left nothing that a second one stumbles over.
	for range 2 {
		fails("flash full", v.path("full/a.save"), "No space left")
	}
	ok(t, os.WriteFile(v.config, []byte("codec = \"none\"\nno-such-key = 1\n"), 0o600))
	fails("bad configuration", file, "flic-migrate: "+v.config+": unknown key")
	ok(t, os.WriteFile(v.config, []byte("codec = \"zstd\"\nsegment-pages = 256\nworkers = 1\n"), 0o600))

	killed := make(chan bool, 1)
	go func() {
		for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(time.Millisecond) {
			for _, pid := range v.Processes("lzop") {
				killed <- syscall.Kill(pid, syscall.SIGKILL) == nil
				return
			}
		}
		killed <- false
	}()
	fails("killed", file, "")
	if !<-killed {
		t.Error("nothing was killed")
	}

	// After all that a save works, a damaged file is refused for our reason, and
	// the domain does not run with wrong memory.
	v.Do(t, "save", "a", file)
	b, err := os.ReadFile(file)
	ok(t, err)
	damaged := v.path("damaged.save")
	for _, at := range []int{len(b) / 2, len(b) - 10} {
		bad := bytes.Clone(b)
		bad[at] ^= 1
		ok(t, os.WriteFile(damaged, bad, 0o600))
		if out, err := v.Virsh("restore", damaged); err == nil {
			t.Errorf("restored a damaged file: %s", out)
		} else if !v.logs("flic-migrate: ") || !v.logs("checksum mismatch") {
			t.Errorf("no reason in the log: %s", out)
		}
		if s := v.state(t, "a"); s != "shut off" {
			t.Errorf("after a failed restore the domain is %s", s)
		}
	}
	v.Do(t, "restore", file)
	ticks(t, v.Attach(t, "a"))
}

// TestLibvirtNVRAM: the pages of a domain's working set go to NVRAM, which is
// given back when libvirt has started the managed save again; without the store,
// or with its own file damaged, nothing is saved or restored wrongly.
func TestLibvirtNVRAM(t *testing.T) {
	v := newHost(t, qemutest.LibvirtConfig{QEMU: ourFormats})
	v.wrap(t, "lzop")
	l := newLab(t)
	sets := t.TempDir()
	report := filepath.Join(l.dir, "report")
	config := func(more string) {
		t.Helper()
		ok(t, os.WriteFile(v.config, fmt.Appendf(nil, "store = %q\nnvram = %q\nworking-sets = %q\nreport = %q\n%s", l.store, l.nvram, sets, report, more), 0o600))
	}
	config("")
	const pages = 2048
	v.tinyNoise(t, "a", pages)
	ws, err := workingset.New(guestmem.PageSize, []workingset.Block{{Name: "pc.ram", Pages: 262152 / 4}})
	ok(t, err)
	for i := int64(0); i < pages; i += 2 {
		ws.SetHeat(0, contentAt/guestmem.PageSize+i, 1)
	}
	f, err := os.Create(filepath.Join(sets, "a.ws"))
	ok(t, err)
	_, err = ws.WriteTo(f)
	ok(t, errors.Join(err, f.Close()))

	last := func() (r saveReport) {
		t.Helper()
		b, err := os.ReadFile(report)
		ok(t, err)
		ok(t, json.Unmarshal(b, &r))
		return r
	}
	v.Do(t, "suspend", "a")
	want := v.ram(t, "a", 262152<<10)
	v.Do(t, "managedsave", "a")
	if r := last(); r.Hot != pages/2 || r.NVRAMBytes != pages/2*guestmem.PageSize {
		t.Errorf("%d hot pages, %d bytes to NVRAM", r.Hot, r.NVRAMBytes)
	}
	if freed := l.gc(t); freed.NVRAM != 0 {
		t.Errorf("gc frees %d bytes of a managed save", freed.NVRAM)
	}
	status := func(want string) {
		t.Helper()
		// Nothing is installed, so its exit code is 1.
		out, _ := exec.Command("flic-migrate", "libvirt", "status", "--root", v.Dir, "--store", l.store).Output()
		if !strings.Contains(string(out), want) {
			t.Errorf("status does not say %q:\n%s", want, out)
		}
	}
	status("hot pages      /var/lib/libvirt/qemu/save/a.save, of ")
	v.Do(t, "start", "a")
	if got := v.ram(t, "a", 262152<<10); !bytes.Equal(got, want) {
		t.Errorf("restored memory differs at %#x", differAt(got, want))
	}
	v.Do(t, "resume", "a")
	vm := v.Attach(t, "a")
	ticks(t, vm)
	status("file is gone   /var/lib/libvirt/qemu/save/a.save, of ")
	if freed := l.gc(t); freed.NVRAM < pages/2*guestmem.PageSize {
		t.Errorf("gc frees %d bytes of a managed save that was started", freed.NVRAM)
	}

	file := v.path("a.save")
	fails := func(what, reason string) {
		t.Helper()
		if out, err := v.Virsh("save", "a", file); err == nil || !strings.Contains(out, reason) {
			t.Errorf("%s: virsh does not say %q: %s", what, reason, out)
		}
		if _, err := os.Stat(file); err == nil {
			t.Errorf("%s: there is a file", what)
		}
		ticks(t, vm)
	}
	// Root may do everything, so a store is unreadable if it is no store.
	b, err := os.ReadFile(filepath.Join(l.store, "store.json"))
	ok(t, err)
	ok(t, os.WriteFile(filepath.Join(l.store, "store.json"), b[:len(b)/2], 0o600))
	fails("store unreadable", "store.json")
	ok(t, os.WriteFile(filepath.Join(l.store, "store.json"), b, 0o600))
	ok(t, os.WriteFile(filepath.Join(sets, "a.ws"), []byte("nothing"), 0o600))
	fails("working set damaged", "a.ws")
	ok(t, os.Remove(filepath.Join(sets, "a.ws")))

	// NVRAM full: what does not fit goes to flash.
	f, err = os.Create(filepath.Join(sets, "a.ws"))
	ok(t, err)
	_, err = ws.WriteTo(f)
	ok(t, errors.Join(err, f.Close()))
	config("nvram-size = \"1M\"\n")
	v.Do(t, "save", "a", file)
	if r := last(); r.Surplus == 0 || r.Hot == 0 || r.Hot+r.Surplus != pages/2 {
		t.Errorf("%d pages hot, %d without room", r.Hot, r.Surplus)
	}
	hot, err := os.ReadFile(l.nvram)
	ok(t, err)
	bad := bytes.Clone(hot)
	at := bytes.LastIndex(bad, noise(2)[:64])
	if at < 0 {
		t.Fatal("a hot page is not in the NVRAM file")
	}
	bad[at] ^= 1
	ok(t, os.WriteFile(l.nvram, bad, 0o600))
	if out, err := v.Virsh("restore", file); err == nil {
		t.Errorf("restored with a damaged NVRAM file: %s", out)
	} else if !v.logs(l.nvram + ": offset") {
		t.Errorf("no reason in the log: %s", out)
	}
	ok(t, os.WriteFile(l.nvram, hot, 0o600))
	v.Do(t, "restore", file)
	ticks(t, v.Attach(t, "a"))
}

// TestLibvirtFormats: a domain is saved in every format that this libvirt has, and
// its file imported, exported and restored: its memory is what it was. Where virsh
// chooses the format of each save, those that libvirt has a program for come to us
// all the same, and the others are told.
func TestLibvirtFormats(t *testing.T) {
	v := newHost(t, qemutest.LibvirtConfig{})
	v.wrap(t, compressor.Names...)
	v.tinyNoise(t, "a", 64)
	v.Do(t, "suspend", "a")
	want := v.ram(t, "a", 262152<<10)
	l := newLab(t)
	help, err := v.Virsh("help", "save")
	ok(t, err)
	perCall := strings.Contains(help, "--image-format")
	formats := append([]string{"raw"}, compressor.Names...)
	if perCall {
		formats = append(formats, "sparse")
	} else if i := slices.Index(formats, "zstd"); i > 0 {
		formats = slices.Delete(formats, i, i+1)
	}
	conf, err := os.ReadFile(v.path("etc/libvirt/qemu.conf"))
	ok(t, err)
	for _, format := range formats {
		file, plain := v.path("var/lib/libvirt/qemu/save/"+format+".save"), v.path(format+".plain")
		args := []string{"save", "a", file}
		if perCall {
			args = append(args, "--image-format", format)
		} else {
			ok(t, os.WriteFile(v.path("etc/libvirt/qemu.conf"), fmt.Appendf(conf[:len(conf):len(conf)], "save_image_format = %q\n", format), 0o600))
			v.Restart(t)
		}
		v.Do(t, args...)
		past := format == "raw" || format == "sparse"
		if v.ours(t, file) == past {
			t.Errorf("%s: ours is %v", format, !past)
		}
		l.run(t, "import", "--vm", format, file)
		l.run(t, "export", format, plain)
		out, _ := exec.Command("flic-migrate", "libvirt", "status", "--root", v.Dir, "--store", l.store).Output()
		if told := map[bool]string{true: "past it", false: "needs it"}[past] + strings.Repeat(" ", 7); !strings.Contains(string(out), told+file) && !strings.Contains(string(out), told+" "+file) {
			t.Errorf("%s: status does not say %q:\n%s", format, told, out)
		}
		for _, name := range []string{file, plain} {
			v.Do(t, "restore", name)
			if got := v.ram(t, "a", 262152<<10); !bytes.Equal(got, want) {
				t.Errorf("%s: memory restored from %s differs at %#x", format, name, differAt(got, want))
			}
			if name == file {
				v.Do(t, "destroy", "a")
			}
		}
		ok(t, os.Remove(file))
	}
	v.Do(t, "resume", "a")
	ticks(t, v.Attach(t, "a"))
}
