package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest/guestmem"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/workingset"
)

// What all tests with a real QEMU share. QEMU finds the command by its name, as
// the test scripts do: it is this test binary, so a run with -race watches the
// command as well.

// machine is a kind of guest.
type machine struct {
	name string
	qemutest.Config
	base uint64 // guest-physical address of RAM
	ram  string // name of its block
}

var (
	q35     = machine{name: "q35", ram: "pc.ram"}
	pc      = machine{name: "pc", Config: qemutest.Config{Machine: "pc"}, ram: "pc.ram"}
	virt    = machine{name: "virt", Config: qemutest.Config{Arch: "arm64"}, base: 1 << 30, ram: "mach-virt.ram"}
	microvm = machine{name: "microvm", Config: qemutest.Config{Machine: "microvm"}, ram: "microvm.ram"}
)

// linux is a machine that runs Linux, with more words for its command line.
func (m machine) linux(memory, kernel string) qemutest.Config {
	c := m.Config
	c.Guest, c.Memory, c.Kernel = qemutest.Linux, memory, kernel
	return c
}

// contentAt is where tiny's content is in RAM, above the guest itself.
const contentAt = 4 << 20

// tiny is a machine that runs the tiny guest. Its memory has the content, and of
// that the guest changes perTick pages in each tick, by turns, among the last
// quarter.
func (m machine) tiny(t *testing.T, memory string, content []byte, perTick int) qemutest.Config {
	t.Helper()
	file := filepath.Join(t.TempDir(), "content")
	ok(t, os.WriteFile(file, content, 0o600))
	pages := uint32(len(content) / guestmem.PageSize)
	first := contentAt + (pages-pages/4)*guestmem.PageSize
	c := m.Config
	c.Guest, c.Memory = qemutest.Tiny, memory
	c.Args = slices.Concat(c.Args, qemutest.Load(file, m.base+contentAt), qemutest.Change(c.Arch, first, pages/4, uint32(perTick)))
	return c
}

// varied is memory like a real guest's; about a third of it is left after
// compression.
func varied(pages int) []byte {
	b := make([]byte, pages*guestmem.PageSize)
	guestmem.Fill(b, 1)
	return b
}

// noise is memory that can't be compressed.
func noise(pages int) []byte {
	b := make([]byte, pages*guestmem.PageSize)
	rand.NewChaCha8([32]byte{1}).Read(b)
	return b
}

// destination is the machine that a guest of c is restored into. What its memory
// holds must come from the checkpoint, so it gets no content.
func destination(c qemutest.Config, incoming string) qemutest.Config {
	if c.Guest == qemutest.Tiny {
		var args []string
		for i := 0; i < len(c.Args); i += 2 {
			if !strings.HasPrefix(c.Args[i+1], "loader,") {
				args = append(args, c.Args[i:i+2]...)
			}
		}
		c.Args = args
	}
	c.Incoming, c.Paused = incoming, true
	return c
}

// ok ends the test on an error.
func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// limit bounds what a test waits for. It is no measure of speed: other tests and
// other work share the machine.
func limit(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// lab is a store, and what its commands are given.
type lab struct {
	dir   string
	store string
	nvram string // path of an NVRAM file; not there before the first save with hot
	ws    string // path of the working set that hot writes
}

func newLab(t *testing.T) *lab {
	dir := t.TempDir()
	return &lab{dir: dir, store: filepath.Join(dir, "store"), nvram: filepath.Join(dir, "nvram"), ws: filepath.Join(dir, "ws")}
}

// save is the URI of a save of VM "vm".
func (l *lab) save(flags ...string) string {
	return "exec:" + l.saveCommand(flags...)
}

func (l *lab) saveCommand(flags ...string) string {
	return strings.Join(append([]string{"flic-migrate save --store", l.store, "--vm vm"}, flags...), " ")
}

// restore is the URI of a restore.
func (l *lab) restore(flags ...string) string {
	return strings.Join(append([]string{"exec:exec flic-migrate restore --store", l.store}, flags...), " ")
}

// hot makes a working set of a third of the guest's pages at random, with
// various heats, and returns the flags that save them to NVRAM.
func (l *lab) hot(t *testing.T, vm *qemutest.VM) []string {
	t.Helper()
	list, err := vm.Blocks(t.Context())
	ok(t, err)
	var blocks []workingset.Block
	for _, b := range list {
		blocks = append(blocks, workingset.Block{Name: b.Name, Pages: int64(b.Used / guestmem.PageSize)})
	}
	ws, err := workingset.New(guestmem.PageSize, blocks)
	ok(t, err)
	r := rand.New(rand.NewPCG(1, 2))
	for i, b := range blocks {
		for page := range b.Pages {
			if r.IntN(3) == 0 {
				ws.SetHeat(i, page, uint8(1+r.IntN(255)))
			}
		}
	}
	f, err := os.Create(l.ws)
	ok(t, err)
	_, err = ws.WriteTo(f)
	ok(t, err)
	ok(t, f.Close())
	return []string{"--nvram", l.nvram, "--nvram-size 64M", "--working-set", l.ws}
}

// run runs the command, which must succeed, and returns what it prints.
func (l *lab) run(t testing.TB, verb string, args ...string) string {
	t.Helper()
	cmd := exec.Command("flic-migrate", append([]string{verb, "--store", l.store}, args...)...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v\n%s%s", cmd, err, out, stderr.String())
	}
	return string(out)
}

// list names the checkpoints.
func (l *lab) list(t testing.TB) (names []string) {
	t.Helper()
	var entries []struct {
		Checkpoint string `json:"checkpoint"`
	}
	if l.none() {
		return nil
	}
	ok(t, json.Unmarshal([]byte(l.run(t, "list", "--json")), &entries))
	for _, e := range entries {
		names = append(names, e.Checkpoint)
	}
	return names
}

// none tells whether there is no store, as a first save that has failed leaves it.
func (l *lab) none() bool {
	_, err := os.Stat(l.store)
	return errors.Is(err, os.ErrNotExist)
}

// show is what the store says of a checkpoint.
func (l *lab) show(t testing.TB, name string) (meta checkpoint.Meta) {
	t.Helper()
	ok(t, json.Unmarshal([]byte(l.run(t, "show", "--json", name)), &meta))
	return meta
}

// nothing fails if there is a checkpoint, or anything of one.
func (l *lab) nothing(t testing.TB) {
	t.Helper()
	l.holds(t)
}

// holds fails unless these checkpoints are in the store, whole, and nothing else.
func (l *lab) holds(t testing.TB, names ...string) {
	t.Helper()
	if have := l.list(t); fmt.Sprint(have) != fmt.Sprint(names) {
		t.Errorf("the store lists %v, want %v", have, names)
	}
	if len(names) > 0 {
		l.run(t, "verify", "--all")
	}
	images, err := filepath.Glob(l.store + "/vms/*/*.flic")
	ok(t, err)
	unfinished, err := filepath.Glob(l.store + "/tmp/*")
	ok(t, err)
	if len(images) != len(names) || len(unfinished) > 0 {
		t.Errorf("the store has %v and %v, want %d images", images, unfinished, len(names))
	}
}

// gc frees what killed saves have left.
func (l *lab) gc(t testing.TB) (freed struct {
	Saves int   `json:"unfinished_saves"`
	Flash int64 `json:"flash_bytes"`
	NVRAM int64 `json:"nvram_bytes"`
}) {
	t.Helper()
	if !l.none() {
		ok(t, json.Unmarshal([]byte(l.run(t, "gc", "--json")), &freed))
	}
	return freed
}

// set sets migration capabilities, all of them on, and parameters.
func set(t *testing.T, vm *qemutest.VM, parameters map[string]any, capabilities ...string) {
	t.Helper()
	on := make(map[string]bool)
	for _, name := range capabilities {
		on[name] = true
	}
	ok(t, migration.SetCapabilities(t.Context(), vm.QMP, on))
	if parameters != nil {
		ok(t, migration.SetParameters(t.Context(), vm.QMP, parameters))
	}
}

// fast lets QEMU send as fast as it can.
var fast = map[string]any{"max-bandwidth": int64(1) << 40}

// saved migrates to the uri, which must complete.
func saved(t *testing.T, ctx context.Context, vm *qemutest.VM, uri string) {
	t.Helper()
	if _, err := vm.Save(ctx, uri); err != nil {
		t.Fatalf("%s: %v\n%s", uri, err, vm.Output())
	}
	// For QEMU it is complete a moment before it is committed.
	until(t, "the commit", func() bool { return len(children(t, vm.Pid())) == 0 })
}

// children are those of a process that live.
func children(t *testing.T, parent int) (pids []int) {
	t.Helper()
	lists, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", parent))
	ok(t, err)
	for _, name := range lists {
		b, _ := os.ReadFile(name)
		for _, field := range strings.Fields(string(b)) {
			if pid, err := strconv.Atoi(field); err == nil && alive(pid) {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

// stop stops the guest and returns its RAM.
func stop(t *testing.T, ctx context.Context, vm *qemutest.VM) map[string][]byte {
	t.Helper()
	ok(t, qmp.Stop(ctx, vm.QMP))
	return ram(t, ctx, vm)
}

func ram(t *testing.T, ctx context.Context, vm *qemutest.VM) map[string][]byte {
	t.Helper()
	content, err := vm.RAM(ctx)
	ok(t, err)
	return content
}

// restored starts a QEMU that restores a guest of this configuration, waits for
// the end of that, and compares its RAM. The guest does not run yet.
func restored(t *testing.T, ctx context.Context, c qemutest.Config, uri string, want map[string][]byte) *qemutest.VM {
	t.Helper()
	vm := qemutest.Start(t, destination(c, uri))
	if _, err := migration.Wait(ctx, vm.QMP); err != nil {
		t.Fatalf("%s: %v\n%s", uri, err, vm.Output())
	}
	if diff := qemutest.DiffRAM(want, ram(t, ctx, vm)); diff != "" {
		t.Fatalf("restored RAM differs: %s", diff)
	}
	return vm
}

// tickLine is a whole line of a guest's counter.
var tickLine = regexp.MustCompile(`tick (\w+)\r`)

// lastTick is the number of the last whole tick line. The tiny guest's are
// hexadecimal.
func lastTick(t *testing.T, console string, base int) int {
	t.Helper()
	ticks := tickLine.FindAllStringSubmatch(console, -1)
	if ticks == nil {
		t.Fatalf("no tick in %q", console)
	}
	n, err := strconv.ParseInt(ticks[len(ticks)-1][1], base, 64)
	ok(t, err)
	return int(n)
}

// goesOn lets a restored guest run and checks that its counter goes on where the
// saved guest's was.
func goesOn(t *testing.T, ctx context.Context, vm *qemutest.VM, last, base int) {
	t.Helper()
	ok(t, qmp.Cont(ctx, vm.QMP))
	next, err := strconv.ParseInt(vm.WaitFor(t, `tick (\w+)\r`)[1], base, 64)
	ok(t, err)
	// The line that was being written may be written again in part only, and
	// the source's last ones may not have been read when it was stopped.
	if int(next) < last || int(next) > last+20 {
		t.Errorf("the counter went on at %d, from %d", next, last)
	}
	runsOn(t, vm)
}

// runsOn waits until the guest has counted twice more.
func runsOn(t *testing.T, vm *qemutest.VM) {
	t.Helper()
	seen := strings.Count(vm.Console(), "tick ")
	for end := time.Now().Add(time.Minute); strings.Count(vm.Console(), "tick ") < seen+2; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("the guest stands still\n%s", vm.Output())
		}
	}
	s, err := qmp.QueryStatus(t.Context(), vm.QMP)
	ok(t, err)
	if !s.Running {
		t.Errorf("the guest is %s", s.Status)
	}
}

// checks lets a Linux guest compare its memory with the sums it keeps.
func checks(t *testing.T, vm *qemutest.VM) {
	t.Helper()
	if answer := vm.Ask(t, "check"); !strings.HasPrefix(answer, "ok ") {
		t.Errorf("the guest's memory is not what it was: check %s", answer)
	}
}
