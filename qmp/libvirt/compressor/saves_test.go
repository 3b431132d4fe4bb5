package compressor

import (
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/flic-migrate/flic-migrate/qmp/libvirt/saveimage"
)

// TestSaves finds whole save files, managed ones and those of snapshots, and tells
// which of them need us.
func TestSaves(t *testing.T) {
	s := host(t, false, "")
	h, err := saveimage.New("<domain/>", "<cookie/>", true)
	if err != nil {
		t.Fatal(err)
	}
	save := string(h.Bytes())
	dir := "var/lib/libvirt/qemu/save/"
	write(t, s.Root, dir+"web 1.save", save+ImageMagic+"...", 0o600)
	write(t, s.Root, dir+"raw.save", save+"QEVM...", 0o600)
	write(t, s.Root, dir+"short.save", save+"FLIC", 0o600)
	write(t, s.Root, dir+"cut.save", save[:100], 0o600)
	write(t, s.Root, dir+"part.save", "LibvirtQemudPart"+save[16:]+ImageMagic, 0o600)
	write(t, s.Root, dir+"bare.save", ImageMagic, 0o600)
	h.SetFormat(saveimage.Sparse)
	write(t, s.Root, dir+"sparse.save", string(h.Bytes())+"QEVM...", 0o600)
	write(t, s.Root, "srv/memory & 1", save+ImageMagic, 0o600)
	snapshot := func(name, memory string) {
		write(t, s.Root, "var/lib/libvirt/qemu/snapshot/web 1/"+name+".xml", "<!--\nWARNING\n-->\n\n<domainsnapshot>\n  <name>"+name+
			"</name>\n  "+memory+"\n  <domain><memory unit='KiB'>4</memory></domain>\n</domainsnapshot>\n", 0o600)
	}
	snapshot("s1", "<memory snapshot='external' file='/srv/memory &amp; 1'/>")
	snapshot("s2", "<memory snapshot='internal'/>")
	snapshot("s3", "<memory snapshot='external' file='/srv/gone'/>")
	snapshot("s4", "<memory")
	// Nobody writes to these: to open them must not wait.
	for _, name := range []string{dir + "fifo.save", "var/lib/libvirt/qemu/snapshot/web 1/fifo.xml", "srv/fifo"} {
		if err := unix.Mkfifo(s.path(name), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	snapshot("s5", "<memory snapshot='external' file='/srv/fifo'/>")
	want := []Save{
		{s.path(dir + "raw.save"), saveimage.Raw, false}, {s.path(dir + "short.save"), saveimage.Raw, false},
		{s.path(dir + "sparse.save"), saveimage.Sparse, false}, {s.path(dir + "web 1.save"), saveimage.Raw, true},
		{s.path("srv/memory & 1"), saveimage.Raw, true},
	}
	if got := s.Saves(); !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, want %+v", got, want)
	}
	if got := (Setup{Root: t.TempDir()}).Saves(); len(got) != 0 {
		t.Errorf("%+v where there is nothing", got)
	}
}

// TestDaemons tells the daemons that find us from those that do not.
func TestDaemons(t *testing.T) {
	s := host(t, false, "")
	const name = "virtqemud"
	want := make(map[int]bool)
	for i, path := range []string{s.PathDir() + ":/usr/bin", "/usr/bin:" + s.PathDir()} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(filepath.Join(link(t, name), name))
		cmd.Env = []string{"PATH=" + path}
		cmd.Stdin = r
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		r.Close()
		t.Cleanup(func() { w.Close(); cmd.Wait() })
		want[cmd.Process.Pid] = i == 0
	}
	found := 0
	for _, d := range s.Daemons() {
		ours, ok := want[d.PID]
		if !ok {
			continue // another one's
		}
		found++
		if d.Name != name || d.Ours != ours || d.UID != os.Getuid() {
			t.Errorf("%+v, want ours %v", d, ours)
		}
	}
	if found != len(want) {
		t.Errorf("%d daemons of %d found", found, len(want))
	}
}
