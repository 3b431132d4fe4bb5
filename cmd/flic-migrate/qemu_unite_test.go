package main

import (
	"bytes"
	"encoding/json"
	"io"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
)

// flash is what images take, in MB.
func (l *lab) flash(t *testing.T) (mb float64) {
	t.Helper()
	var list []struct {
		Flash int64 `json:"flash_bytes"`
	}
	ok(t, json.Unmarshal([]byte(l.run(t, "list", "--json")), &list))
	for _, e := range list {
		mb += float64(e.Flash) / 1e6
	}
	return mb
}

// Two guests of one image that separate commands save at the same moment: what they have in
// common is stored once in the end, and each is what it was.
func TestCheckpointsAtOnce(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	// 64 MB that can't be compressed, so that a save takes its time.
	c := q35.tiny(t, qemutest.LiveMemory, noise(16<<10), 0)
	names := []string{"a", "b"}
	var vms []*qemutest.VM
	for range names {
		vms = append(vms, qemutest.Start(t, c))
	}
	for _, vm := range vms {
		vm.WaitFor(t, `tick 00000002\r`)
	}
	ctx := limit(t)
	beside := int64(0)
	for round := 0; beside == 0; round++ {
		if round == 10 {
			t.Fatal("in ten rounds no save has seen the other")
		}
		if round > 0 {
			l.run(t, "rm", "--all", "a", "b")
		}
		var all sync.WaitGroup
		reps := make([]checkpointReport, len(names))
		for i, vm := range vms {
			all.Go(func() {
				cmd := exec.CommandContext(ctx, "flic-migrate", "checkpoint", "--store", l.store, "--json", "--then", "pause", "--qmp", vm.Socket, names[i])
				var stderr bytes.Buffer
				cmd.Stderr = &stderr
				out, err := cmd.Output()
				if err == nil {
					err = json.Unmarshal(out, &reps[i])
				}
				if err != nil {
					t.Errorf("%v: %s", err, stderr.String())
				}
			})
		}
		all.Wait()
		if t.Failed() {
			return
		}
		for i, rep := range reps {
			beside += rep.Save.Beside
			t.Logf("%s: %d others beside, %d shared, stood still for %v", names[i], rep.Save.Beside, rep.Save.Shared, rep.Downtime)
		}
		if beside == 0 {
			for _, vm := range vms {
				ok(t, contAndWait(t, vm))
			}
		}
	}
	if mb := l.flash(t); mb > 1.2*68 {
		t.Errorf("both take %.1f MB", mb)
	}
	l.run(t, "verify", "--all")
	for i, name := range names {
		want := ram(t, ctx, vms[i])
		restored(t, ctx, c, "exec:exec flic-migrate restore --store "+l.store+" "+name, want)
	}
	// Either is whole without the other.
	l.run(t, "rm", "a@"+number(t, l, "a"))
	l.run(t, "gc")
	restored(t, ctx, c, "exec:exec flic-migrate restore --store "+l.store+" b", ram(t, ctx, vms[1]))
}

// number is that of a VM's newest checkpoint.
func number(t *testing.T, l *lab, vm string) string {
	t.Helper()
	var doc struct {
		Checkpoint string `json:"checkpoint"`
	}
	ok(t, json.Unmarshal([]byte(l.run(t, "show", "--json", vm)), &doc))
	return doc.Checkpoint[len(vm)+1:]
}

// contAndWait lets a guest run for a tick.
func contAndWait(t *testing.T, vm *qemutest.VM) error {
	t.Helper()
	err := qmp.Cont(t.Context(), vm.QMP)
	if err == nil {
		vm.WaitFor(t, `tick `)
	}
	return err
}

// Two streams that are read at the same time by separate saves, as QEMU starts them: they end
// at once, and a process that nobody waits for unites them.
func TestSavesAtOnce(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := tiertest.New(tiertest.Options{Seed: 1, Blocks: []tiertest.Block{{Name: "pc.ram", Size: 8 << 20}}, Mix: tiertest.Mix{tiertest.Random: 1}})
	b := s.Bytes()
	half := s.Layout().RAM + (s.Layout().Tail-s.Layout().RAM)/2
	var cmds []*exec.Cmd
	var ins []io.WriteCloser
	for _, vm := range []string{"a", "b"} {
		cmd := exec.CommandContext(limit(t), "flic-migrate", "save", "--quiet", "--store", l.store, "--vm", vm)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		in, err := cmd.StdinPipe()
		ok(t, err)
		ok(t, cmd.Start())
		cmds, ins = append(cmds, cmd), append(ins, in)
	}
	for _, in := range ins {
		_, err := in.Write(b[:half])
		ok(t, err)
	}
	for _, in := range ins {
		_, err := in.Write(b[half:])
		ok(t, err)
		ok(t, in.Close())
	}
	for _, cmd := range cmds {
		if err := cmd.Wait(); err != nil {
			t.Fatalf("%v: %s", err, cmd.Stderr)
		}
	}
	for start := time.Now(); l.flash(t) > 1.2*8.4; time.Sleep(50 * time.Millisecond) {
		if time.Since(start) > time.Minute {
			t.Fatalf("both take %.1f MB", l.flash(t))
		}
	}
	l.run(t, "verify", "--all")
	for _, vm := range []string{"a", "b"} {
		out, err := exec.Command("flic-migrate", "restore", "--store", l.store, vm).Output()
		ok(t, err)
		if !bytes.Equal(out, s.ExpectedBytes()) {
			t.Errorf("%s gives another stream", vm)
		}
	}
	if left, err := filepath.Glob(l.store + "/tmp/*"); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}
