package main

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/stream"
)

// A restored stream is the saved one, byte for byte: what QEMU sends is recorded on
// its way to the save. It is also what cat records, but for the places where QEMU
// cuts the RAM into sections and starts the switchover, which it does by time: two
// QEMUs that were given one stream and have not run since send the same records and
// devices.
func TestByteIdentity(t *testing.T) {
	quiet := virt
	quiet.Machine = "virt,dtb-randomness=off" // or it has a new seed for each QEMU
	for _, test := range []struct {
		machine
		linux bool
	}{{q35, false}, {pc, false}, {quiet, false}, {microvm, false}, {q35, true}} {
		name := test.name
		if test.linux {
			name += "-linux"
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx, l := limit(t), newLab(t)
			c, tick := test.tiny(t, "16M", varied(1024), 10), `tick 00000004\r`
			if test.linux {
				c, tick = test.machine.linux("104M", "flic.fill=16 flic.dirty=20"), `tick 2\r`
			}
			// A clock that stands still with the guest.
			c.Args = append(c.Args, "-rtc", "base=2020-01-01,clock=vm")
			file := func(name string) string { return filepath.Join(l.dir, name) }
			recorded := func(name string) []byte {
				t.Helper()
				b, err := os.ReadFile(file(name))
				ok(t, err)
				if len(b) < 1<<20 {
					t.Fatalf("%s has %d bytes", name, len(b))
				}
				return b
			}
			same := func(want []byte, checkpoint string) {
				t.Helper()
				if got := []byte(l.run(t, "restore", checkpoint)); !bytes.Equal(want, got) {
					t.Errorf("the stream of %d bytes and the restored one of %d differ at %d", len(want), len(got), firstDifference(want, got))
				}
			}

			vm := qemutest.Start(t, c)
			vm.WaitFor(t, tick)
			stop(t, ctx, vm)
			set(t, vm, fast)
			saved(t, ctx, vm, "exec:tee "+file("ran")+" | "+l.saveCommand())
			same(recorded("ran"), "vm@1")
			vm.Kill()

			copyOf := func() *qemutest.VM {
				vm := qemutest.Start(t, destination(c, "exec:cat "+file("ran")))
				_, err := migration.Wait(ctx, vm.QMP)
				ok(t, err)
				set(t, vm, fast)
				return vm
			}
			vm = copyOf()
			saved(t, ctx, vm, "exec:cat > "+file("cat"))
			vm.Kill()
			vm = copyOf()
			saved(t, ctx, vm, l.save())
			vm.Kill()
			want, got := unsectioned(t, recorded("cat")), unsectioned(t, []byte(l.run(t, "restore", "vm@2")))
			if !bytes.Equal(want, got) {
				t.Errorf("what cat recorded and what was restored differ at %d of %d bytes", firstDifference(want, got), len(want))
			}

			vm = copyOf()
			set(t, vm, nil, "return-path")
			saved(t, ctx, vm, "exec:tee "+file("return-path")+" | "+l.saveCommand(l.hot(t, vm)...))
			same(recorded("return-path"), "vm@3")
			l.holds(t, "vm@1", "vm@2", "vm@3")
		})
	}
}

// unsectioned is a stream without the borders of RAM's sections: with PART and END
// heads, footers and EOS left out, the start of the switchover, and every page with the
// name of its block.
func unsectioned(t *testing.T, b []byte) []byte {
	t.Helper()
	var out []byte
	add := func(b []byte) error { out = append(out, b...); return nil }
	err := ramparse.Walk(bytes.NewReader(b), 0, ramparse.Visitor{
		Frame: func(f *stream.Frame) error {
			switch f.Kind {
			case stream.SectionPart, stream.SectionEnd, stream.Footer:
				if f.Section.Name == ramparse.SectionName {
					return nil
				}
			case stream.CommandFrame:
				if f.Command.Number == stream.CommandSwitchoverStart {
					return nil
				}
			}
			return add(f.Raw)
		},
		Record: func(d *ramparse.Decoder, rec *ramparse.Record) error {
			switch rec.Kind {
			case ramparse.Zero:
				out = ramparse.AppendZero(out, d.Setup().Blocks[rec.Block].Name, rec.Addr, rec.Fill)
			case ramparse.Page:
				out = ramparse.AppendPage(out, d.Setup().Blocks[rec.Block].Name, rec.Addr, rec.Data)
			case ramparse.EOS:
			default:
				return add(rec.Raw)
			}
			return nil
		},
		Bytes:  add,
		Opaque: func(_ []byte, cause error) error { return cause },
		Tail:   func(b []byte) error { return add(b) },
	})
	ok(t, err)
	return out
}

func firstDifference(a, b []byte) int {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	return min(len(a), len(b))
}
