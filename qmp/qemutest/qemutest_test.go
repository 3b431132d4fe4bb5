package qemutest

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest/guestmem"
)

// timeout bounds what a test does with a guest once it is up.
func timeout(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func number(t *testing.T, s string, base int) int {
	t.Helper()
	n, err := strconv.ParseInt(s, base, 64)
	if err != nil {
		t.Fatal(err)
	}
	return int(n)
}

// The whole way with a Linux guest: boot, save while it runs, restore into a new
// QEMU, and find everything as it was.
func TestLinuxSaveAndRestore(t *testing.T) {
	t.Run("q35", func(t *testing.T) { linuxSaveAndRestore(t, Config{Memory: LiveMemory}) })
	// The arm64 kernel is twice as large.
	t.Run("virt", func(t *testing.T) { linuxSaveAndRestore(t, Config{Arch: "arm64", Memory: "131080K"}) })
}

func linuxSaveAndRestore(t *testing.T, config Config) {
	config.Guest, config.CPUs, config.Kernel = Linux, 2, "flic.fill=24 flic.dirty=50"
	vm := Start(t, config)
	vm.WaitFor(t, `flic ready`)
	vm.WaitFor(t, `tick 3\r`)
	ctx := timeout(t) // the boot is not counted: the host may be busy
	if answer := vm.Ask(t, "check"); !strings.HasPrefix(answer, "ok 6144 ") {
		t.Fatalf("check: %s", answer)
	}
	file := filepath.Join(t.TempDir(), "stream")
	info, err := vm.Save(ctx, "exec:cat > "+file)
	if err != nil {
		t.Fatal(err)
	}
	if info.RAM == nil || info.RAM.Transferred < 24<<19 {
		t.Errorf("only this was saved: %+v", info.RAM)
	}
	before, err := vm.RAM(ctx)
	if err != nil {
		t.Fatal(err)
	}
	ticks := vm.Console()
	ticks = ticks[:strings.LastIndex(ticks, "\r\n")] // the guest may be in the middle of a line
	tick := number(t, ticks[strings.LastIndex(ticks, "tick ")+5:], 10)
	vm.Kill()

	config.Incoming, config.Paused = "exec:cat "+file, true
	vm = Start(t, config)
	if _, err := migration.Wait(ctx, vm.QMP); err != nil {
		t.Fatal(err)
	}
	after, err := vm.RAM(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if diff := DiffRAM(before, after); diff != "" {
		t.Fatalf("RAM differs: %s", diff)
	}
	if err := qmp.Cont(ctx, vm.QMP); err != nil {
		t.Fatal(err)
	}
	// The tick the guest was at may be written again only in part.
	if next := number(t, vm.WaitFor(t, `tick (\d+)\r`)[1], 10); next < tick || next > tick+2 {
		t.Errorf("the counter went on at %d, from %d", next, tick)
	}
	if answer := vm.Ask(t, "dirty 0"); answer != "0 64" {
		t.Errorf("dirty: %s", answer)
	}
	if answer := vm.Ask(t, "check"); !strings.HasPrefix(answer, "ok 6144 ") {
		t.Errorf("check after the restore: %s", answer)
	}
	sum := vm.Ask(t, "sum")
	if again := vm.Ask(t, "sum"); again != sum || len(sum) != 64 {
		t.Errorf("sums of a quiet buffer: %s, %s", sum, again)
	}
	if answer := vm.Ask(t, "fill 9"); answer != "9" {
		t.Errorf("fill: %s", answer)
	}
	if vm.Ask(t, "sum") == sum {
		t.Error("another fill has the same sum")
	}
	if answer := vm.Ask(t, "nonsense"); !strings.Contains(answer, "unknown") {
		t.Errorf("nonsense: %s", answer)
	}
	if err := vm.Send("off"); err != nil {
		t.Fatal(err)
	}
	if err := vm.ExitError(); err != nil {
		t.Errorf("after power off: %v", err)
	}
}

// Every machine type and both architectures run the tiny guest, with the memory
// they were given, and change it where they were told.
func TestTiny(t *testing.T) {
	content := make([]byte, 64*guestmem.PageSize)
	guestmem.Fill(content, 1)
	file := filepath.Join(t.TempDir(), "content")
	if err := os.WriteFile(file, content, 0o600); err != nil {
		t.Fatal(err)
	}
	oldest, err := Oldest(t.Context(), "pc-i440fx")
	if err != nil {
		t.Fatal(err)
	}
	const offset = 8 << 20 // of the content in RAM
	for name, test := range map[string]struct {
		config Config
		base   uint64 // of RAM
		block  string
	}{
		"q35":     {Config{}, 0, "pc.ram"},
		"pc":      {Config{Machine: "pc", CPUs: 2}, 0, "pc.ram"},
		"oldest":  {Config{Machine: oldest}, 0, "pc.ram"},
		"microvm": {Config{Machine: "microvm"}, 0, "microvm.ram"},
		"virt":    {Config{Arch: "arm64"}, 0x40000000, "mach-virt.ram"},
	} {
		t.Run(name, func(t *testing.T) {
			ctx := timeout(t)
			c := test.config
			c.Memory, c.Guest = "16M", Tiny
			// Pages 16 to 31 of the content change, 3 in each tick.
			c.Args = append(Load(file, test.base+offset), Change(c.Arch, offset+16*guestmem.PageSize, 16, 3)...)
			vm := Start(t, c)
			first := number(t, vm.WaitFor(t, `tick ([0-9a-f]{8})\r`)[1], 16)
			if second := number(t, vm.WaitFor(t, `tick ([0-9a-f]{8})\r`)[1], 16); first != 1 || second != 2 {
				t.Errorf("ticks %d, %d", first, second)
			}
			vm.WaitFor(t, `tick 00000008\r`)
			if err := qmp.Stop(ctx, vm.QMP); err != nil {
				t.Fatal(err)
			}
			ram, err := vm.RAM(ctx)
			if err != nil {
				t.Fatal(err)
			}
			block := ram[test.block]
			if len(block) != 16<<20 {
				t.Fatalf("%s has %d bytes", test.block, len(block))
			}
			got := block[offset : offset+len(content)]
			for i := range 64 {
				at := i * guestmem.PageSize
				same := bytes.Equal(got[at:at+guestmem.PageSize], content[at:at+guestmem.PageSize])
				if changes := i >= 16 && i < 32; same == changes {
					t.Errorf("page %d: as it was is %v", i, same)
				}
			}
			// The same range as the guest sees it.
			physical, err := vm.PhysicalMemory(ctx, test.base+offset, uint64(len(content)))
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(physical, got) {
				t.Error("pmemsave and the block differ")
			}
			if err := vm.Quit(ctx); err != nil {
				t.Errorf("quit: %v", err)
			}
		})
	}
}

// What pmemsave cannot show: RAM beneath the ROM of a PC.
func TestRAMBeneathROM(t *testing.T) {
	ctx := timeout(t)
	vm := Start(t, Config{Memory: "16M", Paused: true})
	blocks, err := vm.Blocks(ctx)
	if err != nil {
		t.Fatal(err)
	}
	names := make(map[string]Block)
	for _, b := range blocks {
		names[b.Name] = b
	}
	if b := names["pc.ram"]; !b.Mapped || b.Guest != 0 || b.Used != 16<<20 {
		t.Errorf("pc.ram: %+v", b)
	}
	if b := names["pc.bios"]; !b.Mapped || b.Guest != 0xfffc0000 || b.Used != 256<<10 {
		t.Errorf("pc.bios: %+v", b)
	}
	ram, err := vm.RAM(ctx)
	if err != nil {
		t.Fatal(err)
	}
	low, err := vm.PhysicalMemory(ctx, 0xe0000, 0x20000)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Equal(low, make([]byte, len(low))) {
		t.Error("the guest sees no ROM at 0xe0000")
	}
	if !bytes.Equal(ram["pc.ram"][0xe0000:0x100000], make([]byte, 0x20000)) {
		t.Error("pc.ram holds what only the guest's view has")
	}
}

func TestDiffRAM(t *testing.T) {
	block := func(pages int, changed ...int) []byte {
		b := make([]byte, pages*4096+100) // not all blocks end with a whole page
		for _, i := range changed {
			b[i*4096+99] = 1
		}
		return b
	}
	a := map[string][]byte{"a": block(20), "b": block(1)}
	for _, test := range []struct {
		b     map[string][]byte
		words []string
	}{
		{map[string][]byte{"a": block(20), "b": block(1)}, nil},
		{map[string][]byte{"a": block(20, 3, 20), "b": block(1)}, []string{"block a: page at 0x3000", "0x14000"}},
		{map[string][]byte{"a": block(20, 1, 2, 3, 4, 5, 6, 7, 8, 9), "b": block(1)}, []string{"0x8000", "9 pages in all"}},
		{map[string][]byte{"a": block(20), "b": block(2)}, []string{"block b: 4196 bytes, in the other 8292"}},
		{map[string][]byte{"a": block(20), "c": block(1)}, []string{"block b", "block c only in the second"}},
	} {
		diff := DiffRAM(a, test.b)
		if test.words == nil && diff != "" {
			t.Errorf("equal, but %q", diff)
		}
		for _, w := range test.words {
			if !strings.Contains(diff, w) {
				t.Errorf("%q does not say %q", diff, w)
			}
		}
	}
}

// A QEMU that does not start, or dies, must say why and leave nothing behind.
func TestFailures(t *testing.T) {
	_, err := Launch(t.Context(), Config{Machine: "no-such-machine"})
	if err == nil || !strings.Contains(err.Error(), "unsupported machine type") {
		t.Errorf("unknown machine: %v", err)
	}
	if _, err := Launch(t.Context(), Config{Arch: "vax"}); err == nil {
		t.Error("a vax was launched")
	}
	vm := Start(t, Config{Memory: "16M", Incoming: "defer"})
	if err := migration.Incoming(t.Context(), vm.QMP, "exec:echo nonsense"); err != nil {
		t.Fatal(err)
	}
	if err := vm.ExitError(); err == nil || !strings.Contains(vm.Output(), "Not a migration stream") {
		t.Errorf("exit error %v, output %q", err, vm.Output())
	}
	if _, err := vm.Expect(t.Context(), "x"); err == nil || !strings.Contains(err.Error(), "has ended") {
		t.Errorf("console of a dead guest: %v", err)
	}
	<-vm.QMP.Done()
	vm.Kill()
	if _, err := os.Stat(filepath.Dir(vm.Socket)); !os.IsNotExist(err) {
		t.Errorf("the socket's directory is still there: %v", err)
	}
}

func TestMissingQEMUNamesTheCure(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	for arch, group := range map[string]string{"x86": "scripts/deps qemu", "arm64": "scripts/deps qemu-aarch64"} {
		if _, err := Launch(t.Context(), Config{Arch: arch}); err == nil || !strings.HasSuffix(err.Error(), group) {
			t.Errorf("%s: %v", arch, err)
		}
	}
}

// Kill takes the children of exec: along: one that lives on would hold files and
// memory of a test that is over.
func TestKillEndsChildren(t *testing.T) {
	ctx := timeout(t)
	vm := Start(t, Config{Memory: "16M", Paused: true})
	file := filepath.Join(t.TempDir(), "pid")
	if err := migration.Start(ctx, vm.QMP, "exec:echo $$ > "+file+"; exec sleep 10000"); err != nil {
		t.Fatal(err)
	}
	var stat string
	await(t, ctx, "the child's number", func() bool {
		pid, _ := os.ReadFile(file)
		stat = fmt.Sprintf("/proc/%s/stat", strings.TrimSpace(string(pid)))
		return strings.HasSuffix(string(pid), "\n")
	})
	vm.Kill()
	await(t, ctx, "the child's end", func() bool {
		text, err := os.ReadFile(stat)
		// Whoever inherits it may leave it a zombie.
		return err != nil || strings.Contains(string(text), ") Z ")
	})
}

func await(t *testing.T, ctx context.Context, what string, done func() bool) {
	t.Helper()
	for !done() {
		if ctx.Err() != nil {
			t.Fatalf("waited in vain for %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// The second monitor is free for what is being tested.
func TestSocket(t *testing.T) {
	ctx := timeout(t)
	vm := Start(t, Config{Memory: "16M", Paused: true})
	m, err := qmp.Dial(ctx, vm.Socket, qmp.Options{OOB: true})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if s, err := qmp.QueryStatus(ctx, m); err != nil || s.Status != "prelaunch" {
		t.Errorf("status %+v, %v", s, err)
	}
}
