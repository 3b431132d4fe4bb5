package vfs

import (
	"os"
	"path/filepath"
	"testing"
)

func TestNotMounted(t *testing.T) {
	fstab := []byte(`# <file system> <mount point> <type> <options>
UUID=0a /            ext4 errors=remount-ro 0 1
UUID=0b none         swap sw 0 0
#UUID=0c /old        ext4 defaults 0 2
nas:/vms /srv/vms    nfs  _netdev 0 0
UUID=0d /srv/vms/fast/ xfs nofail 0 2
UUID=0e /mnt/a\040b  ext4 nofail 0 2
UUID=0f /home        ext4 defaults 0 2
`)
	root := "21 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw\n30 21 8:2 / /home rw - ext4 /dev/sda2 rw\n"
	vms := "31 21 0:40 / /srv/vms rw - nfs nas:/vms rw\n"
	fast := "32 31 8:3 / /srv/vms/fast rw - xfs /dev/sdb rw\n"
	blank := `33 21 8:4 / /mnt/a\040b rw - ext4 /dev/sdc rw` + "\n"
	other := "34 21 8:5 / /srv/vms/by-hand rw - ext4 /dev/sdd rw\n"
	for _, c := range []struct{ path, mounts, want string }{
		{"/srv/vms", root, "/srv/vms"},
		{"/srv/vms/store", root, "/srv/vms"},
		{"/srv/vmsx", root, ""},
		{"/srv", root, ""},
		{"/old/store", root, ""},
		{"/var/lib/flic-migrate", root, ""},
		{"/home/u/store", root, ""},
		{"/srv/vms/store", root + vms, ""},
		{"/srv/vms/fast/store", root + vms, "/srv/vms/fast"},
		{"/srv/vms/fast/store", root + fast, ""},
		{"/srv/vms/fast/store", root, "/srv/vms/fast"},
		{"/srv/vms/by-hand/store", root + other, ""},
		{"/mnt/a b/store", root, "/mnt/a b"},
		{"/mnt/a b/store", root + blank, ""},
		{"none", root, ""},
	} {
		if got := notMounted(c.path, fstab, []byte(c.mounts)); got != c.want {
			t.Errorf("%s: %q, want %q, with\n%s", c.path, got, c.want, c.mounts)
		}
	}
}

// What does not exist yet is where its directory leads to.
func TestResolved(t *testing.T) {
	dir := t.TempDir()
	real := filepath.Join(dir, "real")
	if err := os.Mkdir(real, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(real, filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	real, err := filepath.EvalSymlinks(real)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := resolved(filepath.Join(dir, "link", "a", "b")), filepath.Join(real, "a", "b"); got != want {
		t.Errorf("%s, want %s", got, want)
	}
}
