package doctor

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/libvirt/compressor"
	"github.com/flic-migrate/flic-migrate/qmp/qmptest"
	"github.com/flic-migrate/flic-migrate/tier/disk"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// want fails the test unless exactly one finding is of that level and says words.
func want(t *testing.T, list []Finding, level Level, words string) {
	t.Helper()
	n := 0
	for _, f := range list {
		if f.Level == level && strings.Contains(f.Text, words) {
			n++
		}
	}
	if n != 1 {
		t.Errorf("%d findings are %s and say %q, of %+v", n, level, words, list)
	}
}

func write(t *testing.T, path, text string, mode os.FileMode) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
}

func TestQEMUs(t *testing.T) {
	dir := t.TempDir()
	for name, says := range map[string]string{
		"qemu-system-x86_64":  "echo 'QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)'",
		"qemu-system-aarch64": "echo 'QEMU emulator version 2.11.1'",
		"qemu-system-arm":     "echo 'QEMU emulator version 99.0.0'",
		"qemu-system-i386":    "echo no; exit 1",
		"qemu-kvm":            "echo something else",
	} {
		write(t, filepath.Join(dir, name), "#!/bin/sh\n"+says+"\n", 0o755)
	}
	write(t, filepath.Join(dir, "qemu-system-docs"), "no program", 0o644)
	if err := os.Symlink("qemu-system-x86_64", filepath.Join(dir, "qemu-system-x86_64-link")); err != nil {
		t.Fatal(err)
	}
	list := qemus(t.Context(), []string{dir, dir})
	want(t, list, OK, "qemu-system-x86_64 is QEMU 7.2")
	want(t, list, Warning, "qemu-system-aarch64 is QEMU 2.11, older")
	want(t, list, Warning, "qemu-system-arm is QEMU 99.0, newer")
	want(t, list, Warning, "qemu-system-i386 does not say its version: exit status 1")
	want(t, list, Warning, `qemu-kvm does not say its version: it says "something else"`)
	if len(list) != 5 {
		t.Errorf("%+v", list)
	}
	want(t, qemus(t.Context(), []string{t.TempDir()}), Warning, "no QEMU was found")
}

func TestLibvirtUser(t *testing.T) {
	dir := t.TempDir()
	conf := filepath.Join(dir, "libvirt", "qemu.conf")
	if _, _, known := libvirtUser(conf); known {
		t.Error("a user is known without a libvirt")
	}
	for text, name := range map[string]string{"# user = \"x\"\n  user = \"root\"\n": "root", "user = \"+0\"\n": "root"} {
		write(t, conf, text, 0o600)
		if got, uid, known := libvirtUser(conf); got != name || uid != 0 || !known {
			t.Errorf("%q: %s, %d, %v", text, got, uid, known)
		}
	}
	write(t, conf, "user = \"nobody-of-that-name\"\n", 0o600)
	if got, _, known := libvirtUser(conf); known {
		t.Error(got)
	}
	if list := faults(filepath.Join(dir, "none", "qemu.conf")); len(list) != 1 {
		t.Errorf("%+v", list)
	}
}

// TestStorage: a store that is not there is not made, and what is wrong with one that is
// there is said.
func TestStorage(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "store")
	_, err := store.Open(t.Context(), vfs.OS, dir, false)
	p := Places{FS: vfs.OS, Dir: dir, Opened: err}
	list := Storage(t.Context(), p)
	want(t, list, Warning, "there is none at "+dir)
	if _, err := os.Stat(filepath.Dir(dir)); !errors.Is(err, os.ErrNotExist) || Count(list, Fault) != 0 {
		t.Errorf("%v, %+v", err, list)
	}

	if p.Store, p.Opened = store.Open(t.Context(), vfs.OS, dir, true); p.Opened != nil {
		t.Fatal(p.Opened)
	}
	p.NVRAM = filepath.Join(filepath.Dir(dir), "nvram")
	list = Storage(t.Context(), p)
	want(t, list, OK, "0 checkpoints of 0 VMs")
	want(t, list, OK, p.NVRAM+" is not there yet")
	if Count(list, Fault) != 0 || Error(list) != nil {
		t.Errorf("%+v", list)
	}

	write(t, filepath.Join(dir, "vms", "web", "00000001.flic"), "no image", 0o600)
	write(t, filepath.Join(dir, "vms", "web", "mine.flic"), "x", 0o600)
	write(t, filepath.Join(dir, "armed", "web.json"), "no note", 0o600)
	p.NVRAM = filepath.Join(dir, "nvram.img")
	list = Storage(t.Context(), p)
	want(t, list, Fault, "web@1 can't be read")
	want(t, list, Warning, "mine.flic has no name of a store's")
	want(t, list, Fault, store.ErrInside.Error())
	want(t, list, Warning, "the note of web's armed checkpoint is damaged")
	if Error(list) == nil {
		t.Error("no error is behind the faults")
	}

	p.Store, p.Opened = nil, errors.New("the reason")
	want(t, Storage(t.Context(), p), Fault, "can't be opened: the reason")
}

// place is a file system that is as a test says.
type place struct {
	vfs.FS
	info vfs.FSInfo
}

func (p place) StatFS(string) (vfs.FSInfo, error) { return p.info, nil }

func TestPlace(t *testing.T) {
	for _, c := range []struct {
		info    vfs.FSInfo
		largest int64
		level   Level
		says    string
		err     error
	}{
		{vfs.FSInfo{Type: "ext4", Total: 100 << 30, Free: 50 << 30}, 1 << 30, OK, "50.0 GiB of 100.0 GiB are free (ext4)", nil},
		{vfs.FSInfo{Type: "ext4", Total: 100 << 30, Free: 50 << 20}, 1 << 30, Warning, "less than the largest checkpoint takes, 1.0 GiB", nil},
		{vfs.FSInfo{Type: "ext4", Total: 100 << 30, Free: 2 << 30}, 1 << 30, Warning, "less than a twentieth", nil},
		{vfs.FSInfo{Type: "xfs", Total: 100 << 30}, 0, Fault, "no space is left", syscall.ENOSPC},
		{vfs.FSInfo{Type: "tmpfs", Total: 1 << 30, Free: 1 << 30, Volatile: true}, 0, Warning, "gone after a power-off", nil},
	} {
		r := report{topic: "store"}
		r.place(place{vfs.OS, c.info}, t.TempDir(), c.largest)
		want(t, r.list, c.level, c.says)
		if !errors.Is(Error(r.list), c.err) {
			t.Errorf("%+v", r.list)
		}
	}
}

// TestFeatures: what is tried leaves nothing in the directory.
func TestFeatures(t *testing.T) {
	dir := t.TempDir()
	can, cannot, err := features(dir)
	if err == nil && len(can)+len(cannot) != 2 {
		t.Errorf("%q, %q", can, cannot)
	}
	if list, err := os.ReadDir(dir); err != nil || len(list) != 0 {
		t.Errorf("%v, %v", list, err)
	}
}

func TestUsed(t *testing.T) {
	for _, c := range []struct {
		h      store.NVRAMHealth
		needed bool
		level  Level
		says   string
	}{
		{store.NVRAMHealth{Path: "/p", Err: os.ErrNotExist}, true, Fault, "/p can't be looked at: file does not exist"},
		{store.NVRAMHealth{Path: "/p", Err: os.ErrNotExist}, false, Warning, "no checkpoint has pages there"},
		{store.NVRAMHealth{Path: "/p", Capacity: 4 << 30, Free: 1 << 30}, true, OK, "/p, of unknown kind: 1.0 GiB of 4.0 GiB are free"},
		{store.NVRAMHealth{Path: "/p", Free: 1 << 30, Damage: []error{errors.New("the damage")}}, true, Fault, "/p is damaged: the damage"},
		{store.NVRAMHealth{Path: "/p", Free: 1 << 30, Volatile: true}, true, Warning, "loses its content"},
		{store.NVRAMHealth{Path: "/p", Free: 1 << 30, Leaked: 1 << 20}, true, Warning, "1.0 MiB in /p belong to no checkpoint"},
		{store.NVRAMHealth{Path: "/p"}, true, Warning, "/p is full"},
	} {
		r := report{topic: "nvram"}
		r.used(c.h, c.needed)
		want(t, r.list, c.level, c.says)
	}
}

// TestLibvirt: what is set up in part is a fault, and what is not set up is none.
func TestLibvirt(t *testing.T) {
	root := t.TempDir()
	s := compressor.Setup{Root: root, Program: "/opt/flic-migrate"}
	write(t, filepath.Join(root, "usr/sbin/libvirtd"), "", 0o755)
	conf := filepath.Join(root, "etc/libvirt/qemu.conf")
	write(t, conf, "user = \"root\"\n", 0o600)
	list := Libvirt(s)
	want(t, list, OK, "do not go through flic-migrate")
	if len(list) != 1 {
		t.Errorf("%+v", list)
	}
	if err := s.Install(); err != nil {
		t.Fatal(err)
	}
	want(t, Libvirt(s), OK, "are set up to go through flic-migrate")
	write(t, conf, "save_image_format = \"sparse\"\n", 0o600)
	want(t, Libvirt(s), Fault, `save_image_format = "sparse"`)
	if err := os.Remove(filepath.Join(s.PathDir(), "xz")); err != nil {
		t.Fatal(err)
	}
	want(t, Libvirt(s), Fault, "not in place: "+filepath.Join(s.PathDir(), "xz"))
}

// fake is a QEMU that answers what is asked of a VM.
type fake struct {
	migrate, caps, parameters, objects, blocks, block string
}

func (f fake) serve(c *qmptest.Conn, cmd qmptest.Command) {
	answer := map[string]string{
		"query-status":               `{"running": true, "status": "running"}`,
		"query-migrate":              f.migrate,
		"query-migrate-capabilities": f.caps,
		"query-migrate-parameters":   f.parameters,
		"qom-list":                   f.objects,
		"query-block":                f.block,
		"human-monitor-command":      f.blocks,
	}[cmd.Execute]
	if answer == "" {
		c.Refuse(cmd, "CommandNotFound", "The command "+cmd.Execute+" has not been found")
		return
	}
	c.Reply(cmd, answer)
}

func TestVM(t *testing.T) {
	image := filepath.Join(t.TempDir(), "disk.raw")
	write(t, image, strings.Repeat("x", 4096), 0o600)
	blocks := func(size string) string {
		b, _ := json.Marshal("Block Name PSize Offset Used Total HVA RO\r\npc.ram " + size + " 0x0000000000000000 0x0000000004000000 0x0000000004000000 0x00007f0000000000 rw\r\n")
		return string(b)
	}
	drive := func(file string) string {
		return fmt.Sprintf(`[{"device": "d0", "qdev": "/machine/d0", "inserted": {"node-name": "n", "ro": false, "image": {"filename": %q, "format": "raw"}}}]`, file)
	}
	well := fake{`{"status": "none"}`, `[{"capability": "xbzrle", "state": true}]`, `{"max-bandwidth": 134217728}`, `[]`, blocks("4 KiB"), drive(image)}
	for name, c := range map[string]struct {
		change func(*fake)
		level  Level
		says   string
	}{
		"well":      {func(*fake) {}, OK, "a checkpoint records what it was"},
		"blocked":   {func(f *fake) { f.migrate = `{"status": "none", "blocked-reasons": ["nvme is no"]}` }, Fault, "refuses to migrate, and so every checkpoint: nvme is no"},
		"migrating": {func(f *fake) { f.migrate = `{"status": "active"}` }, Warning, "a migration is under way (active)"},
		"stopped":   {func(f *fake) { f.parameters = fmt.Sprintf(`{"max-bandwidth": %d}`, int64(1<<40+0xf11c+1)) }, Fault, "a guest that it had stopped"},
		"multifd":   {func(f *fake) { f.caps = `[{"capability": "multifd", "state": true}]` }, Warning, "multifd"},
		"huge":      {func(f *fake) { f.blocks = blocks("2 MiB") }, Warning, "RAM block pc.ram has pages of 2048 KiB"},
		"no file":   {func(f *fake) { f.block = drive("nbd://host/disk") }, Warning, "is no file that can be looked at"},
		"no answer": {func(f *fake) { f.block = "" }, Fault, "its disks can't be asked for"},
	} {
		t.Run(name, func(t *testing.T) {
			f := well
			c.change(&f)
			q := qmptest.New(t, qmptest.Negotiated(f.serve))
			m, err := qmp.Dial(t.Context(), q.Addr, qmp.Options{})
			if err != nil {
				t.Fatal(err)
			}
			defer m.Close()
			list := VM(t.Context(), m, nil, nil)
			want(t, list, c.level, c.says)
			if c.level != Fault && Count(list, Fault) > 0 {
				t.Errorf("%+v", list)
			}
			// As libvirt says of the QEMU that it would start.
			list = VM(t.Context(), m, nil, errors.New("user 7 may not"))
			want(t, list, Warning, "user 7 may not")
			for _, f := range list {
				if strings.Contains(f.Text, "can be restored lazily") {
					t.Errorf("%+v", f)
				}
			}
		})
	}
}

// TestVMIndex: a read-only layer without an index is named, and one with it is not.
func TestVMIndex(t *testing.T) {
	base := filepath.Join(t.TempDir(), "base.raw")
	write(t, base, strings.Repeat("x", 4096), 0o600)
	f := fake{`{"status": "none"}`, `[]`, `{}`, `[]`, `"Block Name PSize Offset Used Total HVA RO\r\npc.ram 4 KiB 0x0 0x4000000 0x4000000 0x7f00 rw\r\n"`,
		fmt.Sprintf(`[{"device": "d0", "qdev": "/machine/d0", "inserted": {"node-name": "n", "ro": true, "image": {"filename": %q, "format": "raw"}}}]`, base)}
	q := qmptest.New(t, qmptest.Negotiated(f.serve))
	m, err := qmp.Dial(t.Context(), q.Addr, qmp.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	want(t, VM(t.Context(), m, nil, nil), OK, base+" has no index")
	img, err := disk.OpenLayer(base, "raw")
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	for _, finding := range VM(t.Context(), m, []disk.Entry{{ID: disk.ID(img.Identity()), Identity: img.Identity(), State: disk.Current}}, nil) {
		if strings.Contains(finding.Text, "has no index") {
			t.Errorf("%+v", finding)
		}
	}
}
