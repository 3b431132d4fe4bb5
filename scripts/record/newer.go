package main

import (
	"path/filepath"
	"slices"
	"strings"

	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
)

// Recordings of QEMUs that came after the system's. They are small: what is in all
// streams is shown by those of the oldest.

// virtioMem is a machine with 128 MiB of virtio-mem, of which nothing is plugged: that
// takes a guest that asks for it.
func virtioMem(string, bool) []string {
	return []string{"-object", "memory-backend-ram,id=vm0,size=128M",
		"-device", "virtio-mem-pci,id=mem0,memdev=vm0,requested-size=64M"}
}

// sharedBlocks are two blocks of shared memory, of which one is a file that has a
// name.
func sharedBlocks(dir string, _ bool) []string {
	return []string{"-object", "memory-backend-file,id=named,size=8M,share=on,mem-path=" + filepath.Join(dir, "shared"),
		"-device", "pc-dimm,memdev=named,id=dimm1",
		"-object", "memory-backend-memfd,id=nameless,size=8M,share=on", "-device", "pc-dimm,memdev=nameless,id=dimm2"}
}

var newer10 = []recording{
	{
		name:    "q35-10-stopped",
		machine: "q35, 16 MiB",
		how:     "stopped guest",
		oddity:  "SWITCHOVER_START before the devices",
		config:  qemutest.Config{Memory: "16M"},
		content: 32,
		shows:   all(eachPageOnce, commands(switchover)),
	},
	{
		name:    "q35-10-live",
		machine: "q35, 64 MiB",
		how:     "running guest that changes pages",
		oddity:  "pages sent again, in several passes",
		config:  qemutest.Config{Memory: "64M"},
		content: 48, change: [2]uint32{16, 8},
		live: true, parameters: map[string]any{"max-bandwidth": 1 << 20, "downtime-limit": 2},
		shows: all(commands(switchover), sentAgain(8), passes(2)),
	},
	{
		name:    "q35-10-return-path",
		machine: "pc-q35-7.2, 16 MiB",
		how:     "stopped guest, capability return-path",
		oddity:  "a machine type of an older QEMU; OPEN_RETURN_PATH and PING, and no SWITCHOVER_START",
		config:  qemutest.Config{Machine: "pc-q35-7.2", Memory: "16M"},
		content: 32, capabilities: []string{"return-path"}, returnPath: true,
		shows: all(eachPageOnce, commands(1, 2)),
	},
	{
		name:    "q35-10-virtio-mem",
		machine: "q35, 16 MiB and 128 MiB of virtio-mem, none of it plugged",
		how:     "running guest",
		oddity:  "a device section between RAM's setup and its pages; a block of which no page comes",
		config:  qemutest.Config{Memory: "16M,maxmem=1G"},
		content: 32, live: true,
		args: virtioMem,
		shows: func(s *survey) error {
			return unless(slices.Equal(s.early, []string{"behind 0000:00:01.0/virtio-mem-device-early"}) && s.sent["0000:00:01.0/vm0"] == 0,
				"early sections %q, pages %v", s.early, s.sent)
		},
	},
	{
		name:    "virt-10-stopped",
		machine: "aarch64 virt, Cortex-A57, 16 MiB",
		how:     "stopped guest",
		oddity:  "configuration/target-page-bits; SWITCHOVER_START",
		config:  qemutest.Config{Arch: "arm64", Memory: "16M"},
		content: 32,
		shows:   all(eachPageOnce, arm, commands(switchover)),
	},
}

var newer11 = []recording{
	{
		name:    "q35-11-stopped",
		machine: "q35, 16 MiB",
		how:     "stopped guest, zero-page-detection none",
		oddity:  "SWITCHOVER_START before the devices; pages of zeros as PAGE",
		config:  qemutest.Config{Memory: "16M"},
		content: 32, parameters: map[string]any{"zero-page-detection": "none"},
		shows: all(eachPageOnce, commands(switchover), func(s *survey) error {
			return unless(s.kinds["ZERO"] == 0, "records %v", s.kinds)
		}),
	},
	{
		name:    "q35-11-live",
		machine: "q35, 64 MiB",
		how:     "running guest that changes pages",
		oddity:  "pages sent again, in several passes",
		config:  qemutest.Config{Memory: "64M"},
		content: 48, change: [2]uint32{16, 8},
		live: true, parameters: map[string]any{"max-bandwidth": 1 << 20, "downtime-limit": 2},
		shows: all(commands(switchover), sentAgain(8), passes(2)),
	},
	{
		name:    "q35-11-return-path",
		machine: "q35, 16 MiB",
		how:     "stopped guest, capability return-path",
		oddity:  "OPEN_RETURN_PATH and PING",
		config:  qemutest.Config{Memory: "16M"},
		content: 32, capabilities: []string{"return-path"}, returnPath: true,
		shows: all(eachPageOnce, commands(1, 2, switchover)),
	},
	{
		name:    "q35-11-postcopy-ram",
		machine: "q35, 16 MiB",
		how:     "running guest, capability postcopy-ram, never switched over",
		oddity:  "OPEN_RETURN_PATH, PING and POSTCOPY_ADVISE",
		config:  qemutest.Config{Memory: "16M"},
		content: 32, live: true,
		capabilities: []string{"postcopy-ram"}, destination: []string{"postcopy-ram"}, returnPath: true,
		shows: commands(1, 2, 3, switchover),
	},
	{
		name:    "q35-11-virtio-mem",
		machine: "q35, 16 MiB and 128 MiB of virtio-mem, none of it plugged",
		how:     "running guest",
		oddity:  "a device section before RAM's setup; a block of which no page comes",
		config:  qemutest.Config{Memory: "16M,maxmem=1G"},
		content: 32, live: true,
		args: virtioMem,
		shows: func(s *survey) error {
			return unless(slices.Equal(s.early, []string{"0000:00:01.0/virtio-mem-device-early"}) && s.sent["0000:00:01.0/vm0"] == 0,
				"early sections %q, pages %v", s.early, s.sent)
		},
	},
	{
		name:    "q35-11-ignore-shared",
		machine: "q35, 16 + 8 + 8 MiB",
		how:     "stopped guest, capability x-ignore-shared, a DIMM of a shared file and one of a shared memfd",
		oddity:  "only the file is listed and not sent",
		config:  qemutest.Config{Memory: "16M,slots=4,maxmem=1G"},
		content: 32, capabilities: []string{"x-ignore-shared"}, destination: []string{"x-ignore-shared"},
		args: sharedBlocks,
		shows: all(eachPageOnce, func(s *survey) error {
			return unless(s.gpas && strings.Join(s.subsections, " ") == "configuration/capabilities" && s.sent["named"] == 0 && s.sent["nameless"] == 8<<20/4096,
				"addresses %v, subsections %v, pages %v", s.gpas, s.subsections, s.sent)
		}),
	},
	{
		name:    "q35-11-background-snapshot",
		machine: "q35, 16 MiB",
		how:     "running guest, capability background-snapshot",
		oddity:  "no END of the RAM section",
		config:  qemutest.Config{Memory: "16M"},
		content: 32, change: [2]uint32{16, 8},
		live: true, slowly: true, capabilities: []string{"background-snapshot"},
		unequal: []string{"*"}, // the source has gone on meanwhile
		shows: all(eachPageOnce, func(s *survey) error {
			return unless(!s.ramEnd, "RAM has an END")
		}),
	},
	{
		name:    "q35-11-mapped-ram",
		machine: "q35, 16 MiB",
		how:     "stopped guest, capability mapped-ram, to a file",
		oddity:  "configuration/capabilities says that RAM is laid out in a file and not streamed",
		config:  qemutest.Config{Memory: "16M"},
		content: 32, capabilities: []string{"mapped-ram"}, destination: []string{"mapped-ram"}, toFile: true,
		shows: func(s *survey) error {
			return unless(s.unknown != nil && strings.Contains(s.unknown.Error(), "mapped-ram"), "understood, or not for that: %v", s.unknown)
		},
	},
	{
		name:    "virt-11-live",
		machine: "aarch64 virt, Cortex-A57, 32 MiB",
		how:     "running guest that changes pages",
		oddity:  "pages sent again, in several passes",
		config:  qemutest.Config{Arch: "arm64", Memory: "32M"},
		content: 48, change: [2]uint32{16, 8},
		live: true, parameters: map[string]any{"max-bandwidth": 1 << 20, "downtime-limit": 2},
		shows: all(arm, commands(switchover), sentAgain(8), passes(2)),
	},
}

// switchover is SWITCHOVER_START.
const switchover = 11
