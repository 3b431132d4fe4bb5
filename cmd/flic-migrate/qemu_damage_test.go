package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
	"github.com/flic-migrate/flic-migrate/stream"
	"github.com/flic-migrate/flic-migrate/stream/returnpath"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/nvram"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// damage is one flipped bit of a checkpoint.
type damage struct {
	what   string
	file   string
	flip   int64 // offset of the byte
	report int64 // offset that the message must have
	found  int   // when the restore finds it
}

const (
	atFirst = iota // before the first byte of the stream
	late           // when QEMU has had some of it
	anytime        // segments are read ahead, and the first bytes are held back
)

// damages are places all over a checkpoint's files.
func damages(t *testing.T, l *lab) (list []damage) {
	t.Helper()
	name := filepath.Join(l.store, "vms/vm/00000001.flic")
	f, err := vfs.OS.Open(name)
	ok(t, err)
	defer f.Close()
	size, err := f.Size()
	ok(t, err)
	im, err := image.Open(f)
	ok(t, err)
	frames := map[image.Kind][]int64{} // offsets by kind
	count := 0
	ok(t, im.Frames(func(k image.Kind, _ uint32, off int64) error {
		frames[k] = append(frames[k], off)
		count++
		return nil
	}))
	identity := size - image.FooterLen - image.FrameHeaderLen - int64(len(im.Tail.Identity))
	index := identity - image.FrameHeaderLen - 9*int64(count)
	in := func(what string, k image.Kind, i, found int) {
		offs := frames[k]
		if i < 0 {
			i += len(offs)
		}
		list = append(list, damage{what, name, offs[i] + image.FrameHeaderLen + 5, offs[i], found})
	}
	in("page map", image.PageMap, 0, atFirst)
	in("NVRAM part", image.NVRAM, 0, atFirst)
	in("META", image.Meta, 0, atFirst)
	in("first segment", image.Pages, 0, anytime)
	in("segment in the middle", image.Pages, len(frames[image.Pages])/2, anytime)
	in("last segment", image.Pages, -1, anytime)
	in("devices", image.Skeleton, -1, late)
	list = append(list,
		damage{"header", name, 30, 0, atFirst},
		damage{"head of a frame", name, frames[image.Skeleton][0] + 8, frames[image.Skeleton][0], atFirst},
		damage{"index", name, index + image.FrameHeaderLen, index, atFirst},
		damage{"identity", name, identity + image.FrameHeaderLen + 3, identity, atFirst},
		damage{"footer", name, size - 20, size - image.FooterLen, atFirst},
		damage{"owner", l.nvram, 8192 + 64 + 20, 8192 + 64, atFirst},
		damage{"first hot page", l.nvram, nvram.ExtentSize + 17, nvram.ExtentSize, anytime},
		damage{"hot page", l.nvram, nvram.ExtentSize + 200*4096 + 4095, nvram.ExtentSize + 200*4096, late})
	return list
}

// A guest whose checkpoint is damaged never runs: QEMU exits, and what is on its
// standard error says where the damage is.
func TestDamagedCheckpoints(t *testing.T) {
	t.Parallel()
	ctx, l := limit(t), newLab(t)
	c := q35.tiny(t, qemutest.LiveMemory, varied(3072), 10)
	vm := qemutest.Start(t, c)
	vm.WaitFor(t, `tick 00000002\r`)
	set(t, vm, fast)
	// A guest that was saved while it ran goes on by itself.
	set(t, vm, map[string]any{"downtime-limit": 1000})
	saved(t, ctx, vm, l.save(l.hot(t, vm)...))
	want := ram(t, ctx, vm)
	vm.Kill()

	flip := func(d damage) {
		t.Helper()
		f, err := os.OpenFile(d.file, os.O_RDWR, 0)
		ok(t, err)
		defer f.Close()
		var b [1]byte
		_, err = f.ReadAt(b[:], d.flip)
		ok(t, err)
		b[0] ^= 0x20
		_, err = f.WriteAt(b[:], d.flip)
		ok(t, err)
	}
	for _, d := range damages(t, l) {
		flip(d)
		// QEMU exits when the restore fails, and the test has to be connected
		// by then.
		start := filepath.Join(l.dir, "start")
		uri := "exec:while [ ! -e " + start + " ]; do sleep 0.01; done; " + strings.TrimPrefix(l.restore("vm", "--report", l.report()), "exec:")
		config := destination(c, uri)
		config.Paused = false
		vm := qemutest.Start(t, config)
		ok(t, os.WriteFile(start, nil, 0o600))
		select {
		case <-vm.Exited():
		case <-ctx.Done():
			s, err := qmp.QueryStatus(t.Context(), vm.QMP)
			t.Fatalf("%s: QEMU lives on, %v, %v\n%s", d.what, s, err, vm.Output())
		}
		if err := vm.ExitError(); err == nil {
			t.Errorf("%s: QEMU exited with 0\n%s", d.what, vm.Output())
		}
		if strings.Contains(vm.Console(), "tick") {
			t.Errorf("%s: the guest has run\n%s", d.what, vm.Output())
		}
		lines := ours(vm.Output())
		if place := fmt.Sprintf("%s: offset %d: ", d.file, d.report); len(lines) != 1 || !strings.Contains(lines[0], place) {
			t.Errorf("%s: want a line with %q and have\n%s", d.what, place, vm.Output())
		}
		b, err := os.ReadFile(l.report())
		ok(t, err)
		var rep restoreReport
		ok(t, json.Unmarshal(b, &rep))
		if rep.ExitCode != exitCorrupt || d.found != anytime && (rep.BytesOut > 0) != (d.found == late) {
			t.Errorf("%s: exit code %d after %d bytes", d.what, rep.ExitCode, rep.BytesOut)
		}
		ok(t, os.Remove(start))
		vm.Kill()
		flip(d)
	}
	restored(t, ctx, c, l.restore("vm"), want)
}

// ours are the lines of QEMU's output that the command wrote: all that are not
// QEMU's own. QEMU writes a line in pieces, so one of ours may stand in its middle.
func ours(output string) (lines []string) {
	const qemu = "qemu-system-"
	rest := false // what comes is the rest of a line of QEMU's
	for line := range strings.Lines(output) {
		at := strings.Index(line, "flic-migrate: ")
		switch {
		case at >= 0:
			lines = append(lines, line[at:])
			rest = rest || at > 0 && strings.HasPrefix(line, qemu)
		case strings.HasPrefix(line, qemu):
		case rest:
			rest = false
		default:
			lines = append(lines, line)
		}
	}
	return lines
}

// refusals fails unless these bytes are what a return path may carry to a source
// whose save has failed; the last message may not be whole yet.
func refusals(t *testing.T, b []byte) {
	t.Helper()
	for r := returnpath.NewReader(bytes.NewReader(b)); ; {
		m, err := r.Next()
		if err == io.EOF || errors.Is(err, stream.ErrTruncated) {
			return
		}
		if err != nil || m.Type != returnpath.Pong && m.Type != returnpath.SwitchoverAck && (m.Type != returnpath.Shut || m.Value == 0) {
			t.Errorf("standard output has %q: %v, %v", b, m, err)
			return
		}
	}
}

// A save that can't even begin fails QEMU's migration, the guest runs on, and one
// line says why. QEMU's end of the return path gets nothing that it could take for
// an answer.
func TestSavesThatCannotBegin(t *testing.T) {
	for _, returnPath := range []bool{false, true} {
		name := "plain"
		if returnPath {
			name = "return path"
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx, l := limit(t), newLab(t)
			vm := qemutest.Start(t, q35.tiny(t, qemutest.LiveMemory, varied(768), 10))
			vm.WaitFor(t, `tick 00000002\r`)
			set(t, vm, map[string]any{"max-bandwidth": int64(1) << 40, "downtime-limit": 100})
			if returnPath {
				set(t, vm, nil, "return-path")
			}
			file := filepath.Join(l.dir, "file")
			ok(t, os.WriteFile(file, []byte("not a working set"), 0o600))
			volatile, err := os.MkdirTemp("/dev/shm", "flic-test-")
			ok(t, err)
			t.Cleanup(func() { os.RemoveAll(volatile) })
			out := filepath.Join(l.dir, "out")
			store := "--store " + l.store
			for _, test := range []struct{ command, says string }{
				{"flic-migrate save --vm vm --store " + file + "/store", "not a directory"},
				{"flic-migrate save --vm vm --store " + file, "not a directory"},
				{"flic-migrate save --vm vm --stroe " + l.store, "unknown flag: --stroe"},
				{"flic-migrate save --vm vm --nvram-size 4X " + store, "--nvram-size"},
				{"flic-migrate save --vm ../vm " + store, "../vm"},
				{"flic-migrate save " + store, "--vm"},
				{"flic-migrate sav " + store, "no verb \"sav\""},
				{"flic-migrate save --vm vm --working-set " + l.ws + " " + store, "there is no --nvram"},
				{"flic-migrate save --vm vm --nvram " + l.nvram + " --working-set " + l.dir + "/none " + store, "/none"},
				{"flic-migrate save --vm vm --nvram " + l.nvram + " --working-set " + file + " " + store, file},
				{"flic-migrate save --vm vm --nvram " + volatile + "/nvram " + strings.Join(l.hot(t, vm)[2:], " ") + " " + store, "--volatile-nvram"},
				{"flic-migrate-full save --vm vm " + store, "no space left"},
				{"flic-migrate save --vm vm --config " + file + " " + store, file},
			} {
				before := len(vm.Output())
				ok(t, migration.Start(ctx, vm.QMP, "exec:"+test.command+" | tee "+out))
				ended(t, ctx, vm, migration.StatusFailed)
				runsOn(t, vm)
				var lines []string
				until(t, "the reason", func() bool {
					lines = ours(vm.Output()[before:])
					return len(lines) > 0 && strings.HasSuffix(lines[len(lines)-1], "\n")
				})
				if len(lines) != 1 || !strings.HasPrefix(lines[0], "flic-migrate: ") || !strings.Contains(lines[0], test.says) {
					t.Errorf("%s: want %q, have\n%s", test.command, test.says, vm.Output()[before:])
				}
				b, err := os.ReadFile(out)
				ok(t, err)
				if refusals(t, b); len(b) > 0 && !returnPath {
					t.Errorf("%s: standard output has %q", test.command, b)
				}
			}
			if _, err := os.Stat(l.store + "/store.json"); err == nil {
				l.nothing(t)
			}
			saved(t, ctx, vm, l.save())
			l.holds(t, "vm@1")
		})
	}
}
