package domain

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/flic-migrate/flic-migrate/qmp/disks"
)

const snapshotDomain = `<domain type='kvm'>
  <name>web1</name>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw' cache='none'/>
      <source file='/srv/a&amp;b.img' startupPolicy='optional'>
        <seclabel model='dac' relabel='no'/>
      </source>
      <backingStore/>
      <target dev='vda' bus='virtio'/>
    </disk>
    <disk type='file' device='cdrom'>
      <driver name='qemu' type='raw'/>
      <source file='/srv/cd.iso'/>
      <target dev='sda' bus='sata'/>
      <readonly/>
    </disk>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/>
      <source file='/srv/c.qcow2'/>
      <backingStore type='file'>
        <format type='raw'/>
        <source file='/srv/base.img'/>
        <backingStore/>
      </backingStore>
      <target dev='vdb' bus='virtio'/>
    </disk>
    <disk type='network' device='disk'>
      <source protocol='nbd' name='x'/>
      <target dev='vdc' bus='virtio'/>
    </disk>
  </devices>
</domain>
`

func TestSnapshotXML(t *testing.T) {
	got, err := snapshotXML(snapshotDomain, []disks.Snapshot{{Frozen: "/srv/a&b.img", Now: "/srv/a&b.1"}})
	want := `<domainsnapshot><disks>` +
		`<disk name="vda" snapshot="external"><driver type="qcow2"></driver><source file="/srv/a&amp;b.1"></source></disk>` +
		`<disk name="sda" snapshot="no"></disk><disk name="vdb" snapshot="no"></disk><disk name="vdc" snapshot="no"></disk></disks></domainsnapshot>`
	if err != nil || got != want {
		t.Errorf("%s, %v\nwant %s", got, err, want)
	}
	for _, s := range []string{"/srv/base.img", "/srv/cd.iso", ""} {
		if got, err := snapshotXML(snapshotDomain, []disks.Snapshot{{Frozen: s}}); err == nil {
			t.Errorf("%q, which the domain does not write to: %s", s, got)
		}
	}
	if got, err := snapshotXML("<domain>", nil); err == nil {
		t.Errorf("of half an XML: %s", got)
	}
}

// TestOnOverlays: only the disks that get an overlay change, and what lies below is not said
// any more. A file may be named by a link.
func TestOnOverlays(t *testing.T) {
	dir := t.TempDir()
	c, link := filepath.Join(dir, "c.qcow2"), filepath.Join(dir, "link")
	if err := os.WriteFile(c, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(c, link); err != nil {
		t.Fatal(err)
	}
	text := strings.ReplaceAll(snapshotDomain, "/srv/c.qcow2", link)
	d := Description{XML: text, Cookie: "x", Persistent: true}
	got, err := d.OnOverlays([]disks.Snapshot{{Frozen: c, Now: "/srv/it's"}, {Frozen: "/srv/a&b.img", Now: "/srv/a<1"}})
	if err != nil {
		t.Fatal(err)
	}
	want := strings.NewReplacer(
		"<driver name='qemu' type='raw' cache='none'/>", "<driver name='qemu' cache='none' type='qcow2'/>",
		"<source file='/srv/a&amp;b.img' startupPolicy='optional'>", "<source startupPolicy='optional' file='/srv/a&lt;1'>",
		"      <backingStore/>\n      <target dev='vda'", "      \n      <target dev='vda'",
		"<source file='"+link+"'/>", "<source file='/srv/it&#39;s'/>",
	).Replace(text)
	from := strings.Index(want, "<backingStore type")
	want = want[:from] + want[strings.Index(want, "</backingStore>\n      <target dev='vdb'")+len("</backingStore>"):]
	if got.XML != want || got.Cookie != "x" || !got.Persistent {
		t.Errorf("%s\nwant %s", got.XML, want)
	}
	if _, err := d.OnOverlays([]disks.Snapshot{{Frozen: "/srv/base.img", Now: "x"}}); err == nil {
		t.Error("an overlay on what is no disk of the domain")
	}
	for _, text := range []string{"<domain><devices><disk>", "</domain></x>", "<domain", ""} {
		if _, err := (Description{XML: text}).OnOverlays([]disks.Snapshot{{Frozen: "/x"}}); err == nil {
			t.Errorf("%q has a disk", text)
		}
	}
}
