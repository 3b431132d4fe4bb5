package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
)

// recording says how one stream of testdata is made and what it must show.
type recording struct {
	name    string // of the file, before .stream.zst
	machine string // the three columns of testdata/README.md
	how     string
	oddity  string

	qemu    string // the version of the one that made it, which is that of config.Suite
	config  qemutest.Config
	content int       // pages of varied content in the guest's memory
	change  [2]uint32 // pages of it that change, and how many of them in each tick
	// live saves a running guest; otherwise it is stopped first.
	live         bool
	capabilities []string // of the source
	parameters   map[string]any
	destination  []string // capabilities without which QEMU does not load it
	returnPath   bool     // the exec: child must answer
	slowly       bool     // the exec: child takes its time; max-bandwidth is not for every save
	blocks       bool     // migrate with disks (blk)
	toFile       bool     // to file: and not to an exec: child
	// prepare runs before the migration, check after the restore, each with the
	// VM and the recording's scratch directory.
	prepare, check func(ctx context.Context, vm *qemutest.VM, dir string) error
	// args are more arguments for QEMU, which may name files in dir.
	args func(dir string, incoming bool) []string
	// unequal are RAM blocks that need not be equal after the restore; all of
	// them if it says "*".
	unequal []string
	// shows returns an error if the stream lacks what it is recorded for.
	shows func(*survey) error

	// from makes the stream out of another one instead of recording it; such
	// streams are damaged, and QEMU must refuse them.
	from   string
	damage func(stream []byte, s *survey) []byte
}

// liveParameters make a live save take several passes: slow enough that the
// guest changes pages meanwhile, and not content until nearly none is left.
var liveParameters = map[string]any{"max-bandwidth": 8 << 20, "downtime-limit": 2}

// The content begins here in RAM, above the tiny guest.
const contentOffset = 4 << 20

var recordings = slices.Concat(of("7.2.22", "", oldest), of("10.0.13", "trixie", newer10), of("11.1.2", "forky", newer11), derived)

// of says which QEMU makes these recordings: its version, and the suite it is of.
func of(version, suite string, list []recording) []recording {
	for i := range list {
		list[i].qemu, list[i].config.Suite = version, suite
	}
	return list
}

// oldest are the recordings of the system's QEMU.
var oldest = []recording{
	{
		name:    "q35-stopped",
		machine: "q35, 64 MiB",
		how:     "stopped guest; standard VGA, e1000, xHCI, AHCI, balloon",
		oddity:  "the plain case: each page once, a device tail with large sections",
		config: qemutest.Config{Memory: "64M", Args: []string{"-vga", "std", "-device", "e1000", "-device", "nec-usb-xhci",
			"-device", "usb-tablet", "-device", "virtio-balloon-pci", "-device", "virtio-rng-pci"}},
		content: 1536,
		shows:   all(eachPageOnce, tailOver(64<<10)),
	},
	{
		name:    "q35-linux-stopped",
		machine: "q35, 96 MiB",
		how:     "Debian kernel, stopped",
		oddity:  "the memory of a real kernel",
		config:  qemutest.Config{Guest: qemutest.Linux, Memory: "96M", Kernel: "init_on_free=1 flic.fill=6"},
		shows:   eachPageOnce,
	},
	{
		name:    "pc-stopped",
		machine: "i440fx (pc), 48 MiB",
		how:     "stopped guest; Cirrus VGA, virtio-net",
		oddity:  "each page once; IDE and PIIX sections",
		config:  qemutest.Config{Machine: "pc", Memory: "48M", Args: []string{"-vga", "cirrus", "-device", "virtio-net-pci"}},
		content: 512,
		shows:   eachPageOnce,
	},
	{
		name:    "pc-2.3-stopped",
		machine: "pc-i440fx-2.3, 16 MiB",
		how:     "stopped guest",
		oddity:  "no configuration section and no footers",
		config:  qemutest.Config{Machine: "pc-i440fx-2.3", Memory: "16M"},
		content: 384,
		shows: all(eachPageOnce, func(s *survey) error {
			return unless(s.machine == "" && !s.footers, "configuration %q, footers %v", s.machine, s.footers)
		}),
	},
	{
		name:    "q35-live",
		machine: "q35, 98312 KiB",
		how:     "running guest that changes pages",
		oddity:  "pages sent again, in several passes",
		config:  qemutest.Config{Memory: qemutest.LiveMemory},
		content: 768, change: [2]uint32{512, 100},
		live: true, parameters: liveParameters,
		shows: all(sentAgain(50), passes(3)),
	},
	{
		name:    "pc-live",
		machine: "i440fx (pc), 98312 KiB",
		how:     "running guest that changes pages",
		oddity:  "pages sent again, in several passes",
		config:  qemutest.Config{Machine: "pc", Memory: qemutest.LiveMemory},
		content: 512, change: [2]uint32{384, 60},
		live: true, parameters: liveParameters,
		shows: all(sentAgain(30), passes(3)),
	},
	{
		name:    "q35-live-xbzrle",
		machine: "q35, 98312 KiB",
		how:     "running guest, capability xbzrle",
		oddity:  "XBZRLE records: changed pages as a difference to what was sent before",
		config:  qemutest.Config{Memory: qemutest.LiveMemory},
		content: 768, change: [2]uint32{512, 200},
		live: true, capabilities: []string{"xbzrle"},
		// Only what is sent for the third time is sent as a difference.
		parameters: map[string]any{"max-bandwidth": 4 << 20, "downtime-limit": 2, "xbzrle-cache-size": 64 << 20},
		shows:      all(kind("XBZRLE", 30), sentAgain(30)),
	},
	{
		name:    "q35-compress",
		machine: "q35, 32 MiB",
		how:     "stopped guest, capability compress, 4 threads",
		oddity:  "COMPRESS_PAGE records, addresses not in order",
		config:  qemutest.Config{Memory: "32M"},
		content: 512, capabilities: []string{"compress"}, destination: []string{"compress"},
		parameters: map[string]any{"compress-threads": 4, "compress-level": 1},
		shows:      all(eachPageOnce, kind("COMPRESS_PAGE", 300)),
	},
	{
		name:    "q35-background-snapshot",
		machine: "q35, 32 MiB",
		how:     "running guest, capability background-snapshot",
		oddity:  "no END of the RAM section; written pages jump the queue; devices as they were at the start",
		config:  qemutest.Config{Memory: "32M"},
		content: 640, change: [2]uint32{512, 64},
		live: true, slowly: true, capabilities: []string{"background-snapshot"},
		unequal: []string{"*"}, // the source has gone on meanwhile
		shows: all(eachPageOnce, func(s *survey) error {
			return unless(!s.ramEnd && s.stepsBack > 1, "RAM END %v, %d steps back", s.ramEnd, s.stepsBack)
		}),
	},
	{
		name:    "q35-blocks",
		machine: "q35, 24 + 40 + 8 MiB",
		how:     "stopped guest; main memory from a backend, two DIMMs",
		oddity:  "main memory is neither the first block nor called pc.ram",
		config:  qemutest.Config{Machine: "q35,memory-backend=m0", Memory: "24M,slots=4,maxmem=1G"},
		content: 384,
		args: func(string, bool) []string {
			return []string{"-object", "memory-backend-ram,id=m0,size=24M",
				"-object", "memory-backend-ram,id=m1,size=40M", "-device", "pc-dimm,memdev=m1,id=dimm1",
				"-object", "memory-backend-ram,id=m2,size=8M", "-device", "pc-dimm,memdev=m2,id=dimm2",
				"-vga", "std"}
		},
		shows: all(eachPageOnce, func(s *survey) error {
			names := strings.Join(s.blocks, " ")
			return unless(strings.HasPrefix(names, "m1 m0 "), "blocks %s", names)
		}),
	},
	{
		name:    "q35-ignore-shared",
		machine: "q35, 16 + 8 MiB",
		how:     "stopped guest, capability x-ignore-shared, a DIMM of shared memory",
		oddity:  "configuration/capabilities; guest-physical address after each block; the shared block is listed and not sent",
		config:  qemutest.Config{Memory: "16M,slots=2,maxmem=1G"},
		content: 256, capabilities: []string{"x-ignore-shared"}, destination: []string{"x-ignore-shared"},
		args: func(dir string, _ bool) []string {
			return []string{"-object", "memory-backend-file,id=shared,size=8M,share=on,mem-path=" + filepath.Join(dir, "shared"),
				"-device", "pc-dimm,memdev=shared,id=dimm1"}
		},
		shows: all(eachPageOnce, func(s *survey) error {
			return unless(s.gpas && strings.Join(s.subsections, " ") == "configuration/capabilities" && s.sent["shared"] == 0 && strings.Contains(strings.Join(s.blocks, " "), "shared"),
				"addresses %v, subsections %v, %d pages of the shared block of %v", s.gpas, s.subsections, s.sent["shared"], s.blocks)
		}),
	},
	{
		name:    "q35-return-path",
		machine: "q35, 16 MiB",
		how:     "stopped guest, capability return-path",
		oddity:  "begins with OPEN_RETURN_PATH and PING",
		config:  qemutest.Config{Memory: "16M"},
		content: 256, capabilities: []string{"return-path"}, returnPath: true,
		shows: all(eachPageOnce, commands(1, 2)),
	},
	{
		name:    "q35-postcopy-ram",
		machine: "q35, 98312 KiB",
		how:     "running guest, capability postcopy-ram, never switched over",
		oddity:  "begins with OPEN_RETURN_PATH, PING and POSTCOPY_ADVISE",
		config:  qemutest.Config{Memory: qemutest.LiveMemory},
		content: 320, change: [2]uint32{256, 40}, live: true, parameters: liveParameters,
		capabilities: []string{"postcopy-ram"}, destination: []string{"postcopy-ram"}, returnPath: true,
		shows: all(commands(1, 2, 3), sentAgain(10)),
	},
	{
		name:    "q35-dirty-bitmap",
		machine: "q35, 98312 KiB",
		how:     "running guest, capability dirty-bitmaps, two bitmaps of a 32 MiB disk",
		oddity:  "dirty-bitmap sections around those of RAM",
		config:  qemutest.Config{Memory: qemutest.LiveMemory},
		content: 320, change: [2]uint32{256, 40}, live: true, parameters: liveParameters,
		capabilities: []string{"dirty-bitmaps"}, destination: []string{"dirty-bitmaps"},
		args: func(string, bool) []string {
			return []string{"-blockdev", "driver=null-co,node-name=disk0,size=33554432,read-zeroes=on",
				"-device", "virtio-blk-pci,drive=disk0,share-rw=on"}
		},
		prepare: func(ctx context.Context, vm *qemutest.VM, _ string) error {
			// Small ones: their size counts as what is left to send, and with more
			// of that than downtime-limit allows QEMU never comes to an end.
			for i, granularity := range []int{65536, 4096} {
				if err := vm.QMP.Execute(ctx, "block-dirty-bitmap-add", map[string]any{
					"node": "disk0", "name": fmt.Sprintf("bitmap%d", i), "granularity": granularity}, nil); err != nil {
					return err
				}
			}
			for _, write := range []string{"write 0 1M", "write 10M 64k", "write 20M 12k"} {
				text, err := qmp.HumanMonitor(ctx, vm.QMP, `qemu-io disk0 "`+write+`"`)
				if err := errors.Join(err, unless(!strings.Contains(text, "Error"), "%s: %s", write, text)); err != nil {
					return err
				}
			}
			return nil
		},
		check: func(ctx context.Context, vm *qemutest.VM, _ string) error {
			var nodes []struct {
				Bitmaps []struct {
					Name  string `json:"name"`
					Count int    `json:"count"` // bytes
				} `json:"dirty-bitmaps"`
			}
			if err := vm.QMP.Execute(ctx, "query-named-block-nodes", nil, &nodes); err != nil {
				return err
			}
			got := make(map[string]int)
			for _, n := range nodes {
				for _, b := range n.Bitmaps {
					got[b.Name] = b.Count
				}
			}
			want := map[string]int{"bitmap0": 1<<20 + 2*65536, "bitmap1": 1<<20 + 65536 + 12288}
			return unless(maps.Equal(got, want), "dirty bytes %v, want %v", got, want)
		},
		shows: all(foreign("dirty-bitmap", 2), sentAgain(5)),
	},
	{
		name:    "q35-block",
		machine: "q35, 98312 KiB",
		how:     "running guest, with its disk of 6 MiB",
		oddity:  "block sections between those of RAM, with data and zero blocks",
		config:  qemutest.Config{Memory: qemutest.LiveMemory},
		content: 320, change: [2]uint32{256, 40}, live: true, parameters: liveParameters, blocks: true,
		args: func(dir string, incoming bool) []string {
			file := "disk"
			if incoming {
				file = "disk-restored"
			}
			return []string{"-drive", "if=none,id=disk0,format=raw,file=" + filepath.Join(dir, file),
				"-device", "virtio-blk-pci,drive=disk0,id=virtio0"}
		},
		check: func(_ context.Context, _ *qemutest.VM, dir string) error {
			before, err := os.ReadFile(filepath.Join(dir, "disk"))
			if err != nil {
				return err
			}
			after, err := os.ReadFile(filepath.Join(dir, "disk-restored"))
			return errors.Join(err, unless(string(before) == string(after), "the disk differs"))
		},
		shows: all(foreign("block", 2), sentAgain(5)),
	},
	{
		name:    "q35-no-vmdesc",
		machine: "q35, 16 MiB",
		how:     "stopped guest, suppress-vmdesc=on",
		oddity:  "ends with EOF, without vmdescription",
		config:  qemutest.Config{Machine: "q35,suppress-vmdesc=on", Memory: "16M"},
		content: 256,
		shows: all(eachPageOnce, func(s *survey) error {
			return unless(s.tail.Description == nil, "there is a vmdescription")
		}),
	},
	{
		name:    "q35-smp-uuid",
		machine: "q35, 32 MiB, 4 virtual CPUs",
		how:     "stopped guest, capability validate-uuid",
		oddity:  "configuration/uuid; device sections of four CPUs",
		config: qemutest.Config{Memory: "32M", CPUs: 4,
			Args: []string{"-uuid", "6b1b6a3e-3a0a-4d6e-9a55-0c1d4cf3a2b7"}},
		content: 512, capabilities: []string{"validate-uuid"}, destination: []string{"validate-uuid"},
		shows: all(eachPageOnce, func(s *survey) error {
			names := strings.Join(s.subsections, " ")
			return unless(names == "configuration/uuid", "subsections %s", names)
		}),
	},
	{
		name:    "microvm-stopped",
		machine: "microvm, 16 MiB",
		how:     "stopped guest",
		oddity:  "a small device tail; the block is called microvm.ram",
		config:  qemutest.Config{Machine: "microvm", Memory: "16M"},
		content: 192,
		shows: all(eachPageOnce, func(s *survey) error {
			return unless(s.blocks[0] == "microvm.ram", "blocks %v", s.blocks)
		}),
	},
	{
		name:    "virt-stopped",
		machine: "aarch64 virt, Cortex-A57, 48 MiB",
		how:     "stopped guest",
		oddity:  "configuration/target-page-bits; two flash blocks before main memory, mach-virt.ram",
		config:  qemutest.Config{Arch: "arm64", Memory: "48M", CPUs: 2},
		content: 512,
		shows:   all(eachPageOnce, arm),
	},
	{
		name:    "virt-live",
		machine: "aarch64 virt, Cortex-A57, 98312 KiB",
		how:     "running guest that changes pages",
		oddity:  "pages sent again, in several passes",
		config:  qemutest.Config{Arch: "arm64", Memory: qemutest.LiveMemory},
		content: 512, change: [2]uint32{384, 80},
		live: true, parameters: map[string]any{"max-bandwidth": 8 << 20, "downtime-limit": 4},
		shows: all(arm, sentAgain(30), passes(3)),
	},
}

// derived are damaged ones.
var derived = []recording{
	{
		name: "microvm-truncated.refused", from: "microvm-stopped",
		how:    "microvm-stopped, cut in the middle of a page",
		oddity: "ends in RAM: QEMU gave up",
		damage: func(stream []byte, s *survey) []byte { return stream[:s.somePage+1000] },
	},
	{
		name: "microvm-truncated-tail.refused", from: "microvm-stopped",
		how:    "microvm-stopped, cut in the device tail",
		oddity: "all of RAM is there, a device section is not whole",
		damage: func(stream []byte, s *survey) []byte { return stream[:s.tailAt+1500] },
	},
	{
		name: "microvm-no-eof.refused", from: "microvm-stopped",
		how:    "microvm-stopped, cut before EOF",
		oddity: "every section is there, and a device failed after the last one",
		damage: func(stream []byte, s *survey) []byte { return stream[:s.eofAt] },
	},
	{
		name: "microvm-bad-address.refused", from: "microvm-stopped",
		how:    "microvm-stopped, one bit of a page record's header flipped",
		oddity: "an address beyond its block",
		damage: func(stream []byte, s *survey) []byte { stream[s.somePage+1] ^= 0x40; return stream },
	},
	{
		name: "microvm-bad-footer.refused", from: "microvm-stopped",
		how:    "microvm-stopped, one bit of a RAM section's footer flipped",
		oddity: "a footer with another section's id",
		damage: func(stream []byte, s *survey) []byte { stream[s.footerAt+4] ^= 0x10; return stream },
	},
}

func unless(ok bool, format string, args ...any) error {
	if ok {
		return nil
	}
	return fmt.Errorf(format, args...)
}

func all(checks ...func(*survey) error) func(*survey) error {
	return func(s *survey) error {
		var errs []error
		for _, check := range checks {
			errs = append(errs, check(s))
		}
		return errors.Join(errs...)
	}
}

func eachPageOnce(s *survey) error {
	return unless(s.again == 0, "%d pages were sent again", s.again)
}

func sentAgain(n int) func(*survey) error {
	return func(s *survey) error { return unless(s.again >= n, "%d pages were sent again, want %d", s.again, n) }
}

func passes(n int) func(*survey) error {
	return func(s *survey) error { return unless(s.passes >= n, "%d passes, want %d", s.passes, n) }
}

func kind(name string, n int) func(*survey) error {
	return func(s *survey) error {
		return unless(s.kinds[name] >= n, "%d records %s, want %d", s.kinds[name], name, n)
	}
}

func foreign(name string, n int) func(*survey) error {
	return func(s *survey) error {
		return unless(s.foreign[name] >= n, "%d sections %s between RAM's, want %d", s.foreign[name], name, n)
	}
}

func commands(want ...uint16) func(*survey) error {
	return func(s *survey) error {
		return unless(fmt.Sprint(s.commands) == fmt.Sprint(want), "commands %v, want %v", s.commands, want)
	}
}

func tailOver(n int) func(*survey) error {
	return func(s *survey) error { return unless(s.tailLen > n, "device tail of %d bytes, want %d", s.tailLen, n) }
}

func arm(s *survey) error {
	return unless(slices.Contains(s.blocks, "mach-virt.ram") && strings.Join(s.subsections, " ") == "configuration/target-page-bits",
		"blocks %v, subsections %v", s.blocks, s.subsections)
}
