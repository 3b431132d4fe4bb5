package preflight

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// TestDescribe reads what checkpoints of real QEMUs say.
func TestDescribe(t *testing.T) {
	for name, want := range map[string]struct {
		machine        string
		cpus, sections int
		has            string
		block          bool
	}{
		"q35-smp-uuid":      {machine: "pc-q35-7.2", cpus: 4, sections: 20, has: "0000:00:1f.0/ICH9LPC"},
		"q35-stopped":       {machine: "pc-q35-7.2", cpus: 1, sections: 20, has: "0000:00:02.0/e1000"},
		"virt-stopped":      {machine: "virt-7.2", cpus: 2, sections: 10, has: "pl011"},
		"q35-11-virtio-mem": {machine: "pc-q35-11.1", cpus: 1, sections: 20, has: "0000:00:01.0/virtio-mem-device-early"},
		"q35-block":         {machine: "pc-q35-7.2", cpus: 1, sections: 20, has: "timer", block: true},
		"q35-no-vmdesc":     {machine: "pc-q35-7.2"},
		"q35-11-mapped-ram": {machine: "pc-q35-11.1"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f, err := os.Open(filepath.Join("../../testdata", name+".stream.zst"))
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			z, err := zstd.NewReader(f)
			if err != nil {
				t.Fatal(err)
			}
			defer z.Close()
			st, err := store.Open(t.Context(), vfs.OS, filepath.Join(t.TempDir(), "store"), true)
			if err != nil {
				t.Fatal(err)
			}
			ref, _, err := save.Run(t.Context(), vfs.OS, st, z, save.Options{VM: "vm"})
			if err != nil {
				t.Fatal(err)
			}
			c, err := st.OpenCheckpoint(t.Context(), ref, checkpoint.Options{})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			s, err := Describe(c.Checkpoint)
			if err != nil {
				t.Fatal(err)
			}
			k := check{saved: s}
			if s.Machine != want.machine || s.Block != want.block || k.instances("cpu") != want.cpus || k.instances("cpu_common") != want.cpus ||
				len(s.Sections) < want.sections || want.sections == 0 && s.Sections != nil {
				t.Errorf("%q, block %v, %d sections, %d vCPUs", s.Machine, s.Block, len(s.Sections), k.instances("cpu"))
			}
			if want.has != "" && k.instances(want.has) != 1 {
				t.Errorf("no section %s in %v", want.has, s.Sections)
			}
		})
	}
}
