package preflight

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestDomainMemory: what a domain's XML says of its memory decides, and where libvirt
// keeps files.
func TestDomainMemory(t *testing.T) {
	const disk, tmpfs = "/proc/not/there", "/dev/shm/not/there"
	for _, tc := range []struct {
		xml, dir string
		why      string // empty: it can be lazy, as far as is known
	}{
		{"", disk, ""},
		{"<domain><memory>1</memory></domain>", disk, ""},
		{"<domain><memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking></domain>", disk, ""},
		{"<domain><memoryBacking><source type='anonymous'/></memoryBacking></domain>", disk, ""},
		{"<domain><memoryBacking><source type='file'/></memoryBacking></domain>", disk, "a file in " + disk},
		{"<domain><memoryBacking><source type='file'/></memoryBacking></domain>", tmpfs, ""},
		{"<domain><memoryBacking><access mode='shared'/></memoryBacking></domain>", disk, "a file in " + disk},
		{"<domain><cpu><numa><cell id='0'/><cell id='1' memAccess='private'/></numa></cpu></domain>", disk, "memfd"},
		{"<domain><memoryBacking><hugepages/><source type='memfd'/></memoryBacking></domain>", tmpfs, "huge pages"},
		{"<domain", disk, ""},
	} {
		err := domainMemory(tc.xml, tc.dir)
		if (err == nil) != (tc.why == "") || err != nil && !strings.Contains(err.Error(), tc.why) {
			t.Errorf("%s in %s: %v, want %q", tc.xml, tc.dir, err, tc.why)
		}
	}
	conf := filepath.Join(t.TempDir(), "qemu.conf")
	if dir := memoryDir(conf); dir != defaultMemoryDir {
		t.Error(dir)
	}
	for text, want := range map[string]string{
		"#memory_backing_dir = \"/x\"\nuser = \"y\"\n":        defaultMemoryDir,
		"user = \"y\"\n  memory_backing_dir = \"/dev/shm\"\n": "/dev/shm",
	} {
		if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if dir := memoryDir(conf); dir != want {
			t.Errorf("%q: %s", text, dir)
		}
	}
}
