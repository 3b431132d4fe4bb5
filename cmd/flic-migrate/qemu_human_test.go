package main

import (
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
)

// TestHumanMonitor: who gives a human monitor for QMP is told so, and what can be done
// there instead. It works as it stands.
func TestHumanMonitor(t *testing.T) {
	t.Parallel()
	ctx, l := limit(t), newLab(t)
	command := regexp.MustCompile(`(migrate|migrate_incoming) (".*")`)
	// refused runs the command with the human monitor of a QEMU and returns the line that
	// it says.
	refused := func(socket string, verb string, args ...string) string {
		t.Helper()
		out, err := exec.Command("flic-migrate", append([]string{verb, "--store", l.store, "--qmp", socket}, args...)...).CombinedOutput()
		m := command.FindStringSubmatch(string(out))
		if err == nil || m == nil || !strings.Contains(string(out), "human monitor") {
			t.Fatalf("%s: %v, %s", verb, err, out)
		}
		return m[0]
	}
	c := q35.tiny(t, "64M", varied(256), 10)
	with := func(c qemutest.Config) (qemutest.Config, string) {
		socket := filepath.Join(t.TempDir(), "hmp")
		c.Args = append(c.Args[:len(c.Args):len(c.Args)], "-monitor", "unix:"+socket+",server=on,wait=off")
		return c, socket
	}

	from, socket := with(c)
	source := qemutest.Start(t, from)
	source.WaitFor(t, `tick 00000002\r`)
	before := stop(t, ctx, source)
	line := refused(socket, "checkpoint", "vm")
	_, err := qmp.HumanMonitor(ctx, source.QMP, line)
	ok(t, err)
	ended(t, ctx, source, migration.StatusCompleted)
	until(t, "the commit", func() bool { return len(children(t, source.Pid())) == 0 })
	source.Kill()
	l.holds(t, "vm@1")

	to, socket := with(destination(c, "defer"))
	vm := qemutest.Start(t, to)
	line = refused(socket, "resume", "vm")
	_, err = qmp.HumanMonitor(ctx, vm.QMP, line)
	ok(t, err)
	if _, err := migration.Wait(ctx, vm.QMP); err != nil {
		t.Fatalf("%v\n%s", err, vm.Output())
	}
	if diff := qemutest.DiffRAM(before, ram(t, ctx, vm)); diff != "" {
		t.Error(diff)
	}
}
