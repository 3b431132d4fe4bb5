package main

import (
	"encoding/json"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp/agent"
	"github.com/flic-migrate/flic-migrate/qmp/libvirt/domain"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
)

// agentDisk is a layer on the disk that has QEMU's guest agent.
func agentDisk(t *testing.T) (layer string) {
	t.Helper()
	dir, err := qemutest.Assets(t.Context(), "agent")
	ok(t, err)
	layer = filepath.Join(t.TempDir(), "agent.qcow2")
	img(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", filepath.Join(dir, "disk.ext4"), "-F", "raw", layer)
	return layer
}

// withAgent makes a guest with an agentDisk write a MiB to its disk, which stays in its page
// cache until somebody asks for it to be written, and run the agent.
const withAgent = "run echo 0 >/proc/sys/vm/dirty_writeback_centisecs; echo 360000 >/proc/sys/vm/dirty_expire_centisecs; " +
	"mount -o remount,rw /dev/vda /; dd if=/dev/urandom of=/some/new bs=64k count=16; " +
	"qemu-ga -m virtio-serial -p /dev/vport0p1 -t /tmp -f /tmp/pid >/tmp/log 2>&1"

// newPages is how many pages there are of what a guest withAgent has written.
const newPages = 256

// TestGuestAgent: the real agent lets the guest write what it has not yet before it stands
// still. What it wrote is on the disk that is frozen then, and so not stored; without that it
// is. The guest runs on, and the agent can be asked again.
func TestGuestAgent(t *testing.T) {
	t.Parallel()
	ctx, l, layer := limit(t), newLab(t), agentDisk(t)
	socket := filepath.Join(l.dir, "ga")
	c := q35.linux(qemutest.LiveMemory, "flic.fill=8 flic.dirty=10")
	c.Args = []string{"-drive", "if=virtio,format=qcow2,file=" + layer,
		"-device", "virtio-serial-pci", "-chardev", "socket,id=ga,server=on,wait=off,path=" + socket,
		"-device", "virtserialport,chardev=ga,name=org.qemu.guest_agent.0"}
	vm := qemutest.Start(t, c)
	vm.WaitFor(t, `flic ready`)
	if answer := vm.Ask(t, withAgent); answer != "ok" {
		t.Fatal(answer)
	}
	until(t, "the agent", func() bool {
		a, err := agent.Dial(ctx, socket)
		if err != nil {
			return false
		}
		defer a.Close()
		return a.Execute(ctx, "guest-ping", nil, nil) == nil
	})
	without := l.checkpoint(t, vm, "--parent", "none", "--disks", "snapshot", "--freeze")
	with := l.checkpoint(t, vm, "--parent", "none", "--disks", "snapshot", "--freeze", "--guest-sync", "--guest-agent", socket)
	if without.Save.Disk >= newPages || with.Save.Disk < newPages {
		t.Errorf("on disks are %d pages without the sync and %d with it, which wrote %d: %+v", without.Save.Disk, with.Save.Disk, newPages, with.Save)
	}
	checks(t, vm)
	// An agent that does not answer any more holds nobody up.
	vm.Ask(t, "run sleep 1000")
	start := time.Now()
	out, err := exec.Command("flic-migrate", "checkpoint", "--store", l.store, "--qmp", vm.Socket, "--guest-sync", "--guest-agent", socket, "vm").CombinedOutput()
	if took := time.Since(start); err != nil || !strings.Contains(string(out), "without having written to its disks") || took < guestSyncTime {
		t.Errorf("without an agent, after %v: %v: %s", took, err, out)
	}
	runsOn(t, vm)
}

// TestDomainGuestAgent is the same with a domain, whose agent libvirt asks.
func TestDomainGuestAgent(t *testing.T) {
	t.Parallel()
	layer := agentDisk(t)
	d := newDomainLab(t, "web1", qemutest.Linux, "flic.fill=8 flic.dirty=10", 0, func(c *qemutest.Domain) { c.Disk, c.Agent = layer, true })
	vm := d.attach(t)
	vm.WaitFor(t, `flic ready`)
	if answer := vm.Ask(t, withAgent); answer != "ok" {
		t.Fatal(answer)
	}
	until(t, "the agent", func() bool {
		a, err := domain.DialAgent(t.Context(), d.uri(), d.name)
		if err != nil {
			return false
		}
		defer a.Close()
		return a.Execute(t.Context(), "guest-ping", nil, nil) == nil
	})
	var without, with checkpointReport
	flags := []string{"--json", "--parent", "none", "--disks", "snapshot", "--freeze", "vm"}
	ok(t, json.Unmarshal([]byte(d.on(t, "checkpoint", flags...)), &without))
	ok(t, json.Unmarshal([]byte(d.on(t, "checkpoint", append(flags, "--guest-sync")...)), &with))
	if without.Save.Disk >= newPages || with.Save.Disk < newPages {
		t.Errorf("on disks are %d pages without the sync and %d with it, which wrote %d: %+v", without.Save.Disk, with.Save.Disk, newPages, with.Save)
	}
	runsOn(t, vm)
	checks(t, vm)
	// Started again, its clock is set and a command is run, by the agent that libvirt has.
	ok(t, json.Unmarshal([]byte(d.on(t, "checkpoint", "--json", "--then", "quit", "vm")), &with))
	time.Sleep(3 * time.Second)
	var again resumeReport
	// The first of its commands fails if the clock is late.
	command := fmt.Sprintf("[ $(date +%%s) -ge %d ] && echo cared for >/dev/ttyS0", time.Now().Unix())
	ok(t, json.Unmarshal([]byte(d.on(t, "resume", "--json", "--guest-time", "--guest-run", command, "vm")), &again))
	if again.State != "running" || again.Guest <= 0 {
		t.Errorf("%+v", again)
	}
	vm = d.attach(t)
	runsOn(t, vm)
}
