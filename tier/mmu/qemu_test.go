package mmu_test

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/stream"
	"github.com/flic-migrate/flic-migrate/tier/mmu"
)

// mapping is a page or block of a guest.
type mapping struct{ va, pa, size uint64 }

// recordedTail is the device tail of a recorded stream.
func recordedTail(t testing.TB, name string) []byte {
	t.Helper()
	f, err := os.Open(filepath.Join("..", "..", "testdata", name+".stream.zst"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := zstd.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	var tail []byte
	err = ramparse.Walk(io.Reader(z), 0, ramparse.Visitor{Tail: func(b []byte) error {
		tail = append(tail, b...)
		return nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	return tail
}

// QEMU's own tails: firmware without paging, and a Linux guest.
func TestSpacesRecorded(t *testing.T) {
	for name, want := range map[string]int{"q35-smp-uuid": 0, "virt-stopped": 0, "microvm-stopped": 0, "q35-linux-stopped": 1} {
		tail := recordedTail(t, name)
		p, err := stream.ParseTail(tail)
		if err != nil {
			t.Fatal(err)
		}
		spaces, err := mmu.Spaces(tail, &p)
		if err != nil || len(spaces) != want {
			t.Errorf("%s: %+v, %v", name, spaces, err)
		}
	}
}

// stopped is a stopped guest: its memory by block, and what its stream says.
type stopped struct {
	vm      *qemutest.VM
	machine string
	blocks  []ramparse.Block
	content map[string][]byte
	tail    []byte
}

// stop stops a guest and saves it as it is.
func stop(t *testing.T, vm *qemutest.VM) *stopped {
	t.Helper()
	ctx := t.Context()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(qmp.Stop(ctx, vm.QMP))
	s := &stopped{vm: vm}
	var err error
	s.content, err = vm.RAM(ctx)
	must(err)
	file := filepath.Join(t.TempDir(), "stream")
	must(migration.SetParameters(ctx, vm.QMP, map[string]any{"max-bandwidth": int64(100 << 30)}))
	info, err := vm.Save(ctx, "exec:exec cat > "+file)
	must(err)
	if info.Status != migration.StatusCompleted {
		t.Fatalf("save: %+v", info)
	}
	f, err := os.Open(file)
	must(err)
	defer f.Close()
	must(ramparse.Walk(io.Reader(f), 0, ramparse.Visitor{
		Frame: func(fr *stream.Frame) error {
			if fr.Kind == stream.Configuration {
				s.machine = fr.MachineType
			}
			return nil
		},
		Record: func(d *ramparse.Decoder, rec *ramparse.Record) error {
			if rec.Kind == ramparse.MemSize {
				s.blocks = append(s.blocks, d.Setup().Blocks...)
			}
			return nil
		},
		Tail: func(b []byte) error {
			s.tail = append(s.tail, b...)
			return nil
		},
	}))
	return s
}

// walk finds the guest's tables and mappings.
func (s *stopped) walk(t *testing.T) (spaces []mmu.Space, tables []uint64, leaves []mapping) {
	t.Helper()
	p, err := stream.ParseTail(s.tail)
	if err != nil {
		t.Fatal(err)
	}
	if spaces, err = mmu.Spaces(s.tail, &p); err != nil {
		t.Fatal(err)
	}
	layout, err := mmu.NewLayout(s.machine, s.blocks, s.tail, &p)
	if err != nil {
		t.Fatal(err)
	}
	w := &mmu.Walker{
		Read: func(gpa uint64, buf []byte) (bool, error) {
			b, at, ok := layout.Find(gpa, uint64(len(buf)))
			if ok {
				copy(buf, s.content[s.blocks[b].Name][at:])
			}
			return ok, nil
		},
		Table: func(gpa uint64, _ int) error { tables = append(tables, gpa); return nil },
		Leaf:  func(va, pa, size uint64) { leaves = append(leaves, mapping{va, pa, size}) },
		Max:   1 << 14,
	}
	if err := w.Walk(t.Context(), spaces); err != nil {
		t.Fatal(err)
	}
	return spaces, tables, leaves
}

var (
	tlbLine = regexp.MustCompile(`(?m)^([0-9a-f]{16}): ([0-9a-f]{16}) `)
	gpaLine = regexp.MustCompile(`gpa: (0x[0-9a-f]+)`)
)

// asQEMU compares sampled mappings with what QEMU's own MMU makes of them.
func (s *stopped) asQEMU(ctx context.Context, t *testing.T, leaves []mapping) {
	t.Helper()
	r := rand.New(rand.NewPCG(1, 1))
	known := 0
	const samples = 200
	for range samples {
		m := leaves[r.IntN(len(leaves))]
		off := r.Uint64N(m.size)
		text, err := qmp.HumanMonitor(ctx, s.vm.QMP, fmt.Sprintf("gva2gpa %#x", m.va+off))
		if err != nil {
			t.Fatal(err)
		}
		g := gpaLine.FindStringSubmatch(text)
		if g == nil {
			continue // a mapping that the vCPU may not read in this moment
		}
		gpa, err := strconv.ParseUint(g[1], 0, 64)
		if err != nil {
			t.Fatal(err)
		}
		if known++; gpa != m.pa+off {
			t.Errorf("%#x is %#x to QEMU and %#x here (%x)", m.va+off, gpa, m.pa+off, m)
		}
	}
	if known < samples*9/10 {
		t.Errorf("QEMU knows %d of %d mappings", known, samples)
	}
}

// On x86 every mapping that QEMU lists is found, and no other.
func TestX86Guest(t *testing.T) {
	t.Parallel()
	for cpu, levels := range map[string]int{"qemu64": 4, "max": 5} {
		t.Run(cpu, func(t *testing.T) {
			t.Parallel()
			vm := qemutest.Start(t, qemutest.Config{Guest: qemutest.Linux, Memory: "98312K", CPU: cpu, Kernel: "flic.fill=8"})
			vm.WaitFor(t, `flic ready`)
			s := stop(t, vm)
			spaces, tables, leaves := s.walk(t)
			t.Logf("%d tables, %d mappings", len(tables), len(leaves))
			if len(spaces) != 1 || spaces[0].Levels != levels || len(tables) < 20 {
				t.Fatalf("%+v, %d tables", spaces, len(tables))
			}
			s.asQEMU(t.Context(), t, leaves)

			list, err := qmp.HumanMonitor(t.Context(), vm.QMP, "info tlb")
			if err != nil {
				t.Fatal(err)
			}
			theirs := map[uint64]uint64{}
			for _, m := range tlbLine.FindAllStringSubmatch(list, -1) {
				va, _ := strconv.ParseUint(m[1], 16, 64)
				pa, _ := strconv.ParseUint(m[2], 16, 64)
				theirs[va] = pa
			}
			ours := map[uint64]bool{}
			for _, m := range leaves {
				pa, ok := theirs[m.va]
				// A large page's PAT bit is within the address that is listed.
				if !ok || pa&^(m.size-1) != m.pa {
					t.Fatalf("%x is not what QEMU lists: %#x, %v", m, pa, ok)
				}
				ours[m.pa] = true
			}
			// What is mapped once more through a table that was visited before is
			// not told again, but its page was.
			for va, pa := range theirs {
				if !ours[pa] && !ours[pa&^(2<<20-1)] && !ours[pa&^(1<<30-1)] {
					t.Fatalf("mapping of %#x to %#x was not found", va, pa)
				}
			}
			if len(theirs) < len(leaves) || len(leaves) < 1000 {
				t.Errorf("%d mappings, QEMU lists %d", len(leaves), len(theirs))
			}
		})
	}
}

func TestArmGuest(t *testing.T) {
	t.Parallel()
	vm := qemutest.Start(t, qemutest.Config{Arch: "arm64", Guest: qemutest.Linux, Memory: "98312K", CPUs: 2, Kernel: "flic.fill=8"})
	vm.WaitFor(t, `flic ready`)
	// QEMU's gva2gpa goes by what vCPU 0 can reach at the moment: nothing of the
	// kernel's in user mode, and next to nothing on the way in and out of it, where
	// Linux has page tables that map that way alone.
	for end := time.Now().Add(time.Minute); ; time.Sleep(7 * time.Millisecond) {
		s := stop(t, vm)
		spaces, tables, leaves := s.walk(t)
		var upper []mapping
		for _, m := range leaves {
			if int64(m.va) < 0 {
				upper = append(upper, m)
			}
		}
		if len(spaces) != 4 || len(tables) < 20 || len(upper) < 1000 {
			t.Fatalf("%+v, %d tables, %d mappings", spaces, len(tables), len(leaves))
		}
		if reaches(t, vm, upper[len(upper)/2].va) {
			t.Logf("%d tables, %d mappings", len(tables), len(leaves))
			s.asQEMU(t.Context(), t, upper)
			return
		}
		if time.Now().After(end) {
			t.Fatal("vCPU 0 could not reach the kernel's memory whenever the guest was stopped")
		}
		if err := qmp.Cont(t.Context(), vm.QMP); err != nil {
			t.Fatal(err)
		}
	}
}

// reaches tells whether QEMU finds memory at a virtual address of vCPU 0.
func reaches(t *testing.T, vm *qemutest.VM, va uint64) bool {
	t.Helper()
	text, err := qmp.HumanMonitor(t.Context(), vm.QMP, fmt.Sprintf("gva2gpa %#x", va))
	if err != nil {
		t.Fatal(err)
	}
	return gpaLine.MatchString(text)
}
