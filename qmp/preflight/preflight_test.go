package preflight

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/qmptest"
	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/stream"
)

// q35Tree is what QEMU says of a q35 machine with a NIC, a bridge and a disk behind it,
// an HBA with a disk, and a USB controller with a tablet and a hub's keyboard; shortened.
const q35Tree = `bus: main-system-bus
  type System
  dev: ps2-kbd, id ""
    gpio-out "" 1
  dev: q35-pcihost, id ""
    MCFG = -1 (0xffffffffffffffff)
    bus: pcie.0
      type PCIE
      dev: nec-usb-xhci, id "x1"
        addr = 06.0
        class USB controller, addr 00:06.0, pci id 1033:0194 (sub 1af4:1100)
        bus: x1.0
          type usb-bus
          dev: usb-kbd, id ""
            port = ""
            addr 0.0, port 1.2, speed 12, name QEMU USB Keyboard, attached
          dev: usb-hub, id ""
            addr 0.0, port 1, speed 12, name QEMU USB Hub, attached
      dev: virtio-scsi-pci, id "sc"
        addr = 05.0
        bus: virtio-bus
          type virtio-pci-bus
          dev: virtio-scsi-device, id ""
            num_queues = 1 (0x1)
            bus: sc.0
              type SCSI
              dev: scsi-hd, id ""
                channel = 0 (0x0)
                scsi-id = 3 (0x3)
                lun = 1 (0x1)
      dev: pcie-root-port, id "rp1"
        addr = 03.0
        bus: rp1
          type PCIE
          dev: virtio-blk-pci, id "d0"
            addr = 00.0
            bus: virtio-bus
              type virtio-pci-bus
              dev: virtio-blk-device, id ""
                drive = "d0"
      dev: virtio-net-pci-non-transitional, id "net0"
        addr = 02.0
      dev: ICH9-LPC, id ""
        addr = 1f.0
        bus: isa.0
          type ISA
          dev: isa-serial, id ""
            index = 0 (0x0)
      dev: mch, id ""
        addr = 00.0
`

// q35Saved are the sections of such a machine.
var q35Saved = []string{
	"timer", "cpu_common", "cpu_common", "cpu", "cpu", "serial", "0000:00:00.0/mch", "0000:00:1f.0/ICH9LPC",
	"0000:00:02.0/virtio-net", "0000:00:03.0/pcie-root-port", "0000:00:03.0:00.0/virtio-blk",
	"0000:00:05.0/virtio-scsi", "0000:00:05.0/0:3:1/scsi-disk", "0000:00:06.0/xhci", "0000:00:06.0/1/usb-hub",
	"0000:00:06.0/1.2/usb-kbd", "hda-audio", "globalstate",
}

func sections(names ...string) (list []stream.Section) {
	seen := make(map[string]uint32)
	for _, n := range names {
		list = append(list, stream.Section{Name: n, Instance: seen[n]})
		seen[n]++
	}
	return list
}

// fake is a QEMU that answers what a check asks.
type fake struct {
	machine  string
	machines string // query-machines; empty: an older QEMU, which has not got the command
	blocks   string // info ramblock
	objects  string
	memPath  string
	cpus     int // 0: no such command
	tree     string
	caps     string
}

func q35() fake {
	return fake{machine: "pc-q35-7.2", cpus: 2, tree: q35Tree, objects: `[]`, caps: `[{"capability": "xbzrle", "state": false}]`,
		machines: `[{"name": "pc-q35-7.2", "deprecated": false}, {"name": "pc-q35-9.0", "alias": "q35", "deprecated": false}, {"name": "pc-q35-5.2", "deprecated": true}]`,
		blocks: "Block Name PSize Offset Used Total HVA RO\n" +
			"pc.ram 4 KiB 0x0000000000000000 0x0000000004000000 0x0000000004000000 0x00007f0000000000 rw\n" +
			"/rom@etc/acpi/tables 4 KiB 0x0000000004000000 0x0000000000020000 0x0000000000200000 0x00007f0000000000 ro\n"}
}

func saved() Saved {
	return Saved{Machine: "pc-q35-7.2", Sections: sections(q35Saved...),
		Blocks: []ramparse.Block{{Name: "pc.ram", Used: 64 << 20}, {Name: "/rom@etc/acpi/tables", Used: 0x10000}}}
}

func (f fake) serve(c *qmptest.Conn, cmd qmptest.Command) {
	var args struct {
		Path, Property string
		Line           string `json:"command-line"`
	}
	_ = json.Unmarshal(cmd.Args, &args)
	text := func(s string) string { b, _ := json.Marshal(s); return string(b) }
	answer := ""
	switch {
	case cmd.Execute == "qom-get" && args.Path == "/machine":
		answer = text(f.machine + "-machine")
	case cmd.Execute == "qom-get" && args.Property == "mem-path":
		answer = text(f.memPath)
	case cmd.Execute == "qom-list":
		answer = f.objects
	case cmd.Execute == "query-machines":
		answer = f.machines
	case cmd.Execute == "query-cpus-fast" && f.cpus > 0:
		answer = "[" + strings.Repeat("{},", f.cpus-1) + "{}]"
	case cmd.Execute == "query-migrate-capabilities":
		answer = f.caps
	case cmd.Execute == "human-monitor-command" && args.Line == "info ramblock":
		answer = text(strings.ReplaceAll(f.blocks, "\n", "\r\n"))
	case cmd.Execute == "human-monitor-command" && args.Line == "info qtree":
		answer = text(strings.ReplaceAll(f.tree, "\n", "\r\n"))
	}
	if answer == "" {
		c.Refuse(cmd, "CommandNotFound", "The command "+cmd.Execute+" has not been found")
		return
	}
	c.Reply(cmd, answer)
}

func (f fake) check(t *testing.T, s Saved, o Options) (Result, error) {
	t.Helper()
	q := qmptest.New(t, qmptest.Negotiated(f.serve))
	m, err := qmp.Dial(t.Context(), q.Addr, qmp.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if o.Version.QEMU.Major == 0 {
		o.Version = m.Version()
	}
	return Check(t.Context(), m, s, o)
}

func qemu(major, minor int) (v qmp.Version) {
	v.QEMU.Major, v.QEMU.Minor = major, minor
	return v
}

// TestCheck changes one thing each time, of the QEMU or of what was saved.
func TestCheck(t *testing.T) {
	// Neither tmpfs nor hugetlbfs, wherever this runs.
	const file, dir = "/proc/version", "/proc"
	without := func(s *Saved, name string) {
		for i := range s.Sections {
			if s.Sections[i].Name == name {
				s.Sections = append(s.Sections[:i:i], s.Sections[i+1:]...)
				return
			}
		}
		t.Fatal(name)
	}
	type change struct {
		name   string
		change func(*fake, *Saved, *Options)

		refused string // parts of the error, by |; empty: none
		forced  bool   // --force goes on, with the same in a warning
		notLazy string
		warns   string
	}
	backend := func(f *fake, s *Saved, path string) {
		f.objects = `[{"name": "type", "type": "string"}, {"name": "m0", "type": "child<memory-backend-file>"}, {"name": "m1", "type": "child<memory-backend-ram>"}]`
		f.memPath = path
		f.blocks = strings.Replace(f.blocks, "pc.ram", "/objects/m0", 1)
		s.Blocks[0].Name = "/objects/m0"
	}
	for _, tc := range []change{
		{name: "the same", change: func(*fake, *Saved, *Options) {}},
		{name: "a QEMU that answers little", change: func(f *fake, _ *Saved, _ *Options) {
			*f = fake{machine: f.machine, blocks: f.blocks}
		}},
		{name: "nothing is known of what was saved", change: func(_ *fake, s *Saved, _ *Options) { *s = Saved{} }},

		{name: "machine", change: func(f *fake, _ *Saved, _ *Options) { f.machine = "pc-q35-9.0" }, refused: "pc-q35-7.2 was saved, this is pc-q35-9.0|use -machine pc-q35-7.2"},
		{name: "machine, no query-machines", change: func(f *fake, _ *Saved, _ *Options) { f.machine, f.machines = "pc-q35-9.0", "" }, refused: "use -machine pc-q35-7.2"},
		{name: "machine by its alias", change: func(f *fake, s *Saved, _ *Options) { s.Machine = "q35" }, refused: "use -machine q35"},
		{name: "machine of the past", change: func(f *fake, s *Saved, o *Options) { s.Machine, o.Version = "pc-q35-4.2", qemu(11, 1) }, refused: "11.1, no longer has it|from 4.2 on and before 10.2"},
		{name: "machine of long ago", change: func(f *fake, s *Saved, o *Options) { s.Machine, o.Version = "pc-i440fx-2.6", qemu(11, 1) }, refused: "from 2.6 on and before 10.1"},
		{name: "machine of the future", change: func(f *fake, s *Saved, o *Options) { s.Machine, o.Version = "pc-q35-10.0", qemu(7, 2) }, refused: "7.2, is too old|QEMU 10.0 or later"},
		{name: "machine of another kind", change: func(f *fake, s *Saved, _ *Options) { s.Machine = "microvm" }, refused: "none of that name"},
		{name: "machine about to go", change: func(f *fake, s *Saved, o *Options) {
			f.machine, s.Machine, o.Version = "pc-q35-5.2", "pc-q35-5.2", qemu(11, 1)
		}, warns: "pc-q35-5.2 is about to be dropped: QEMU 11.2"},
		{name: "machine that is old", change: func(f *fake, s *Saved, o *Options) {
			f.machines = `[{"name": "pc-q35-7.2", "deprecated": true}]`
			o.Version = qemu(11, 1)
		}},

		{name: "less RAM", change: func(f *fake, _ *Saved, _ *Options) {
			f.blocks = strings.ReplaceAll(f.blocks, "4000000", "3000000")
		}, refused: "pc.ram has 50331648 bytes, 67108864 were saved|-m 64M"},
		{name: "odd RAM", change: func(f *fake, s *Saved, _ *Options) { s.Blocks[0].Used -= 8 << 10 }, refused: "-m 65528K"},
		{name: "no such RAM", change: func(f *fake, s *Saved, _ *Options) {
			s.Blocks = append(s.Blocks, ramparse.Block{Name: "/objects/dimm1", Used: 1 << 20}, ramparse.Block{Name: "0000:00:09.0/vga.vram", Used: 1 << 20})
		}, refused: "/objects/dimm1 of 1048576 bytes is missing|id=dimm1|PCI address 00:09.0"},
		{name: "more RAM", change: func(f *fake, s *Saved, _ *Options) {
			f.blocks += "0000:00:07.0/vga.vram 4 KiB 0x0000000005000000 0x0000000001000000 0x0000000001000000\n"
		}, notLazy: "that was not saved|vga.vram"},
		{name: "large pages", change: func(f *fake, _ *Saved, _ *Options) {
			f.blocks = strings.Replace(f.blocks, "4 KiB", "2 MiB", 1)
		}, notLazy: "pc.ram has pages of 2048 KiB"},

		{name: "memory on disk", change: func(f *fake, s *Saved, _ *Options) { backend(f, s, file) }, notLazy: "memory backend m0 is the file " + file},
		{name: "memory in a directory on disk", change: func(f *fake, s *Saved, o *Options) {
			backend(f, s, dir)
			o.PID = os.Getpid()
		}, notLazy: "memory backend m0"},
		{name: "memory on tmpfs", change: func(f *fake, s *Saved, _ *Options) { backend(f, s, "/dev/shm") }},
		{name: "memory that can't be looked at", change: func(f *fake, s *Saved, _ *Options) { backend(f, s, "/nowhere/at/all") }},
		{name: "a backend of no RAM", change: func(f *fake, s *Saved, _ *Options) {
			b := *f
			backend(&b, &Saved{Blocks: make([]ramparse.Block, 1)}, file)
			f.objects, f.memPath = b.objects, b.memPath
		}},

		{name: "fewer vCPUs", change: func(f *fake, _ *Saved, _ *Options) { f.cpus = 1 }, refused: "has 1 vCPU, and 2 when|-smp 2", forced: true},
		{name: "more vCPUs", change: func(f *fake, _ *Saved, _ *Options) { f.cpus = 4 }, refused: "has 4 vCPUs, and 2 when", forced: true},

		{name: "no NIC", change: func(f *fake, _ *Saved, _ *Options) {
			f.tree = strings.Replace(f.tree, "        addr = 02.0\n", "        addr = 07.0\n", 1)
		}, refused: "missing that were saved: virtio-net at PCI address 00:02.0", forced: true},
		{name: "no bridge", change: func(f *fake, _ *Saved, _ *Options) {
			f.tree = strings.Replace(f.tree, "        addr = 03.0\n", "        addr = 07.0\n", 1)
		}, refused: "pcie-root-port at PCI address 00:03.0, virtio-blk at PCI address 00:03.0:00.0", forced: true},
		{name: "another NIC", change: func(f *fake, _ *Saved, _ *Options) {
			f.tree = strings.Replace(f.tree, "virtio-net-pci-non-transitional", "e1000", 1)
		}, refused: "other devices were saved: virtio-net at PCI address 00:02.0, where this QEMU has e1000", forced: true},
		{name: "a NIC of which nothing is known", change: func(f *fake, _ *Saved, _ *Options) {
			f.tree = strings.Replace(f.tree, "virtio-net-pci-non-transitional", "vendor-net", 1)
		}},
		{name: "no SCSI disk", change: func(f *fake, _ *Saved, _ *Options) {
			f.tree = strings.Replace(f.tree, "lun = 1 ", "lun = 2 ", 1)
		}, refused: "scsi-disk at SCSI 0:3:1 of PCI address 00:05.0", forced: true},
		{name: "no HBA", change: func(f *fake, _ *Saved, _ *Options) {
			f.tree = strings.Replace(f.tree, "addr = 05.0", "addr = 15.0", 1)
		}, refused: "saved: virtio-scsi at PCI address 00:05.0 (", forced: true},
		{name: "no keyboard", change: func(f *fake, _ *Saved, _ *Options) {
			f.tree = strings.Replace(f.tree, "port 1.2,", "port 1.3,", 1)
		}, refused: "usb-kbd at USB port 1.2 of PCI address 00:06.0", forced: true},
		{name: "no serial port", change: func(f *fake, _ *Saved, _ *Options) {
			f.tree = strings.Replace(f.tree, "dev: isa-serial", "dev: isa-debugcon", 1)
		}, refused: "0 serial ports, and 1 when", forced: true},
		{name: "one more device", change: func(_ *fake, s *Saved, _ *Options) { without(s, "0000:00:02.0/virtio-net") },
			warns: "not saved|virtio-net-pci-non-transitional at PCI address 00:02.0"},
		{name: "another tree", change: func(f *fake, _ *Saved, _ *Options) {
			f.tree = "bus: main-system-bus\n  dev: PCIHost v2\n    slot 2: virtio-net\n"
		}},
		{name: "two PCI hosts", change: func(f *fake, _ *Saved, _ *Options) {
			f.tree = strings.Replace(f.tree, "        addr = 02.0\n", "        addr = 07.0\n", 1) +
				"  dev: other-pcihost, id \"\"\n    bus: pci\n      dev: e1000, id \"\"\n        addr = 02.0\n"
		}},
		{name: "a pxb beside it", change: func(f *fake, s *Saved, _ *Options) {
			f.tree += "  dev: pxb-host, id \"\"\n    bus: pxb\n      dev: e1000, id \"\"\n        addr = 02.0\n"
			s.Sections = append(s.Sections, sections("0000:50:12.0:00.0/virtio-net")...)
		}},
		{name: "microvm", change: func(f *fake, s *Saved, _ *Options) {
			f.tree = "bus: main-system-bus\n  type System\n  dev: virtio-mmio, id \"\"\n    mmio 00000000feb02e00/0000000000000200\n    bus: virtio-mmio-bus.23\n      type virtio-mmio-bus\n      dev: virtio-blk-device, id \"\"\n"
			s.Sections = sections("cpu", "cpu", "virtio-mmio@00000000feb02e00/virtio-blk", "virtio-mmio@00000000feb02c00/virtio-net")
		}, refused: "virtio-net at virtio-mmio@00000000feb02c00 (", forced: true},

		{name: "disks", change: func(f *fake, s *Saved, _ *Options) { s.Block = true }, refused: "content of its disks|up to 9.0"},
		{name: "disks, an old QEMU", change: func(f *fake, s *Saved, _ *Options) {
			s.Block, f.caps = true, `[{"capability": "block", "state": false}]`
		}},
		{name: "two things", change: func(f *fake, s *Saved, _ *Options) { f.cpus, f.machine = 1, "pc-q35-9.0" }, refused: "use -machine|; it has 1 vCPU"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f, s, o := q35(), saved(), Options{}
			tc.change(&f, &s, &o)
			r, err := f.check(t, s, o)
			says := func(what, text, words string) {
				t.Helper()
				if (text == "") != (words == "") {
					t.Errorf("%s: %q, want %q", what, text, words)
				}
				for _, w := range strings.Split(words, "|") {
					if !strings.Contains(text, w) {
						t.Errorf("%s: %q does not say %q", what, text, w)
					}
				}
			}
			if tc.refused == "" {
				says("error", fmt.Sprint(err), "<nil>")
				says("not lazy", strings.TrimPrefix(fmt.Sprint(r.NotLazy), "<nil>"), tc.notLazy)
				says("warnings", strings.Join(r.Warnings, "; "), tc.warns)
				return
			}
			if !errors.Is(err, ErrMismatch) {
				t.Fatalf("%v, %+v", err, r)
			}
			says("error", err.Error(), tc.refused)
			if offers := strings.Contains(err.Error(), "--force"); offers != tc.forced {
				t.Errorf("%v", err)
			}
			o.Force = true
			r, err = f.check(t, s, o)
			if (err == nil) != tc.forced {
				t.Fatalf("forced: %v", err)
			}
			if tc.forced {
				says("warnings", strings.Join(r.Warnings, "; "), tc.refused+"|--force")
			}
		})
	}
}

// TestCheckLost: a QEMU that is lost is no QEMU that answers nothing.
func TestCheckLost(t *testing.T) {
	for n := range 6 {
		q := qmptest.New(t, qmptest.Negotiated(func(c *qmptest.Conn, cmd qmptest.Command) {
			if n--; n < 0 {
				c.Close()
				return
			}
			q35().serve(c, cmd)
		}))
		m, err := qmp.Dial(t.Context(), q.Addr, qmp.Options{})
		if err != nil {
			t.Fatal(err)
		}
		s := saved()
		s.Block = true
		if _, err := Check(t.Context(), m, s, Options{}); !errors.Is(err, qmp.ErrLost) {
			t.Errorf("after %d answers: %v", n, err)
		}
		m.Close()
	}
}

// TestUserfaultfd: nothing is said unless it is sure.
func TestUserfaultfd(t *testing.T) {
	dir := t.TempDir()
	sysctl, device := filepath.Join(dir, "sysctl"), filepath.Join(dir, "device")
	self := os.Getuid()
	for _, tc := range []struct {
		sysctl string
		mode   os.FileMode // of the device; 0: none
		uid    int
		sure   bool
	}{
		{"0\n", 0, 64055, true},
		{"0\n", 0o600, self + 1, true},
		{"0\n", 0o644, self + 1, false}, // reading is of no use, but not for us to say
		{"0\n", 0o660, self + 1, false},
		{"0\n", 0o666, self + 1, false},
		{"1\n", 0, 64055, false},
		{"", 0, 64055, false},
		{"0\n", 0, 0, false},
	} {
		os.Remove(sysctl)
		os.Remove(device)
		if tc.sysctl != "" {
			if err := os.WriteFile(sysctl, []byte(tc.sysctl), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if tc.mode != 0 {
			if err := os.WriteFile(device, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(device, tc.mode); err != nil {
				t.Fatal(err)
			}
		}
		if err := userfaultfd(tc.uid, sysctl, device); (err != nil) != tc.sure || tc.sure && !errors.Is(err, ErrUserfaultfd) {
			t.Errorf("%+v: %v", tc, err)
		}
	}
}
