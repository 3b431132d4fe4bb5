package compressor

import (
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/flic-migrate/flic-migrate/qmp/libvirt/saveimage"
)

// TestManagedSaves finds the save files that need us, and no others.
func TestManagedSaves(t *testing.T) {
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
	if got, want := s.ManagedSaves(), []string{s.path(dir + "web 1.save")}; !reflect.DeepEqual(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	if got := (Setup{Root: t.TempDir()}).ManagedSaves(); len(got) != 0 {
		t.Errorf("%q where there is nothing", got)
	}
}

// TestDaemons tells the daemons that find us from those that do not.
func TestDaemons(t *testing.T) {
	s := host(t, false, "")
	want := make(map[int]bool)
	for i, path := range []string{s.PathDir() + ":/usr/bin", "/usr/bin:" + s.PathDir()} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(filepath.Join(link(t, "libvirtd"), "libvirtd"))
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
		if d.Name != "libvirtd" || d.Ours != ours {
			t.Errorf("%+v, want ours %v", d, ours)
		}
	}
	if found != len(want) {
		t.Errorf("%d daemons of %d found", found, len(want))
	}
}
