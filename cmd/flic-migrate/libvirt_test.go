package main

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
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

// awaitState waits until a domain is in a state.
func (v *host) awaitState(t *testing.T, domain, want string) {
	t.Helper()
	for end := time.Now().Add(time.Minute); v.state(t, domain) != want; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s is %s, not %s", domain, v.state(t, domain), want)
		}
	}
}

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
