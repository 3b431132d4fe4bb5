package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/agent"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
)

const (
	recipesDoc    = "../../docs/recipes.md"
	packageChecks = "../../scripts/package/checks"
)

// recipeBlocks are the blocks of docs/recipes.md, by the name in the comment before each.
func recipeBlocks(t *testing.T) map[string]string {
	t.Helper()
	doc, err := os.ReadFile(recipesDoc)
	ok(t, err)
	blocks := make(map[string]string)
	for _, m := range regexp.MustCompile("(?ms)^<!-- recipe: (\\S+) -->\n```sh\n(.*?)^```\n").FindAllStringSubmatch(string(doc), -1) {
		blocks[m[1]] = m[2]
	}
	if fences := strings.Count(string(doc), "\n```sh\n"); fences != len(blocks) {
		t.Errorf("%d blocks of commands have %d names", fences, len(blocks))
	}
	return blocks
}

// recipes are the tests of the blocks, which each of them names.
var recipes = []struct {
	name   string
	blocks []string
	test   func(*testing.T, *kitchen)
}{
	{"ci", []string{"ci-template", "ci-save", "ci-job", "new-identity", "clone-identity"}, testRecipeCI},
	{"nightly", []string{"nightly-cron"}, testRecipeNightly},
	{"lab", []string{"lab-start", "lab-save", "lab-back"}, testRecipeLab},
	{"sandbox", []string{"sandbox-before", "sandbox-after"}, testRecipeSandbox},
}

// TestRecipes does what docs/recipes.md says, by the commands that stand there. What needs
// systemd is done in scripts/package/checks.
func TestRecipes(t *testing.T) {
	blocks := recipeBlocks(t)
	checks, err := os.ReadFile(packageChecks)
	ok(t, err)
	for name := range blocks {
		used := name == "vm" || bytes.Contains(checks, []byte("pasted "+name+" "))
		for _, r := range recipes {
			used = used || slices.Contains(r.blocks, name)
		}
		if !used {
			t.Errorf("nothing tests %s", name)
		}
	}
	for _, r := range recipes {
		for _, name := range r.blocks {
			if blocks[name] == "" {
				t.Errorf("docs/recipes.md has no %s", name)
			}
		}
	}
	for _, r := range recipes {
		t.Run(r.name, func(t *testing.T) {
			t.Parallel()
			r.test(t, newKitchen(t, blocks))
		})
	}
}

// kitchen is a directory in which recipes are followed. It has debian.qcow2, a layer on the
// disk with the guest's agent, and a QEMU first in the PATH that boots the test guest from
// it, with little memory and no KVM: what a user's QEMU and disk do by themselves.
type kitchen struct {
	dir    string
	blocks map[string]string
}

func newKitchen(t *testing.T, blocks map[string]string) *kitchen {
	t.Helper()
	// Paths of sockets are short.
	dir, err := os.MkdirTemp("", "flic")
	ok(t, err)
	k := &kitchen{dir, blocks}
	t.Cleanup(func() {
		if t.Failed() {
			logs, _ := filepath.Glob(k.path("*.log"))
			for _, log := range logs {
				text, _ := os.ReadFile(log)
				t.Logf("%s: %s", filepath.Base(log), text[max(0, len(text)-1000):])
			}
		}
		pids, _ := filepath.Glob(k.path("*.pid"))
		for _, file := range pids {
			if pid, err := readPid(file); err == nil {
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
		}
		os.RemoveAll(dir)
	})
	guest, err := qemutest.Assets(t.Context(), "x86")
	ok(t, err)
	disk, err := qemutest.Assets(t.Context(), "agent")
	ok(t, err)
	img(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", filepath.Join(disk, "disk.ext4"), "-F", "raw", k.path("debian.qcow2"))
	qemu, err := exec.LookPath("qemu-system-x86_64")
	ok(t, err)
	ok(t, os.Mkdir(k.path("bin"), 0o755))
	// A QEMU that has gone to the background ends with this process all the same.
	ok(t, os.WriteFile(k.path("bin/qemu-system-x86_64"), fmt.Appendf(nil, `#!/bin/bash
for word; do
	[ "$before" != -pidfile ] || file=$word
	before=$word
done
%s "$@" -machine accel=tcg -m %s -kernel %s/vmlinuz -initrd %[3]s/initrd.gz \
	-append "console=ttyS0 quiet no_timer_check flic.fill=8 flic.run=agent" || exit
pid=$(cat "$file")
(
	while kill -0 "$pid"; do
		kill -0 %[4]d || kill -9 "$pid"
		sleep 1
	done
) >/dev/null 2>&1 </dev/null &
`, qemu, qemutest.LiveMemory, guest, os.Getpid()), 0o755))
	return k
}

func readPid(file string) (int, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(text)))
}

func (k *kitchen) path(name string) string { return filepath.Join(k.dir, name) }

// run pastes blocks into one shell, after the one that all need, and returns what they
// print. A command that fails ends the test.
func (k *kitchen) run(t *testing.T, names ...string) string {
	t.Helper()
	script := "set -eu\n" + k.blocks["vm"]
	for _, name := range names {
		script += k.blocks[name]
	}
	return k.shell(t, script)
}

func (k *kitchen) shell(t *testing.T, script string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "bash", "-c", script)
	cmd.Dir = k.dir
	cmd.Env = append(os.Environ(), "PATH="+k.path("bin")+":"+os.Getenv("PATH"))
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s\nby\n%s", err, out, script)
	}
	return string(out)
}

// ready waits until VMs have booted, as far as their agents answer.
func (k *kitchen) ready(t *testing.T, names ...string) {
	t.Helper()
	end := time.Now().Add(qemutest.ConsoleTimeout)
	for _, name := range names {
		for answers := false; !answers; time.Sleep(100 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%s has not booted", name)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			if a, err := agent.Dial(ctx, k.path(name+".ga")); err == nil {
				a.Close()
				answers = true
			}
			cancel()
		}
	}
}

// inGuest runs a command in a VM, as its user would, and returns what it prints, in one
// line.
func (k *kitchen) inGuest(t *testing.T, name, command string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	a, err := agent.Dial(ctx, k.path(name+".ga"))
	ok(t, err)
	defer a.Close()
	mark := fmt.Sprintf("answer %d", time.Now().UnixNano())
	if err := agent.Run(ctx, a, "/bin/sh", "-c", fmt.Sprintf("x=$(%s) || exit; echo %q$x. >/dev/ttyS0", command, mark+": ")); err != nil {
		t.Fatalf("%s: %s: %v", name, command, err)
	}
	var answer string
	until(t, "the answer of "+name, func() bool {
		_, rest, found := strings.Cut(k.log(t, name), mark+": ")
		var whole bool
		answer, _, whole = strings.Cut(rest, ".\r")
		return found && whole
	})
	return answer
}

// log is what a VM has written to its serial port, since it was started.
func (k *kitchen) log(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(k.path(name + ".log"))
	ok(t, err)
	return string(text)
}

// monitor asks a VM's QEMU.
func (k *kitchen) monitor(t *testing.T, name, command string, result any) {
	t.Helper()
	m, err := qmp.Dial(t.Context(), k.path(name+".qmp"), qmp.Options{})
	ok(t, err)
	defer m.Close()
	ok(t, m.Execute(t.Context(), command, nil, result))
}

// said is what follows a word on a line of its own in a VM's log.
func (k *kitchen) said(t *testing.T, name, word string) string {
	t.Helper()
	m := regexp.MustCompile(`(?m)^` + word + ` (.*?)\r?$`).FindStringSubmatch(k.log(t, name))
	if m == nil {
		t.Fatalf("%s has not said %s: %s", name, word, k.log(t, name))
	}
	return m[1]
}

// A template is booted once. Jobs run in clones, at one time, and leave nothing; what fails
// is told. Clones that have taken a new identity differ in all that the page says.
func testRecipeCI(t *testing.T, k *kitchen) {
	start := time.Now()
	k.run(t, "ci-template")
	k.ready(t, "template")
	t.Logf("the template has booted in %v", time.Since(start).Round(time.Millisecond))
	// As its user sets it up.
	k.inGuest(t, "template", "mkdir -p /src /usr/local/sbin")
	for i, job := range []string{"true", "false", `[ "$(cat /src/own)" = job3 ]`} {
		k.inGuest(t, "template", fmt.Sprintf(`cat >/src/job%d <<'END'
#!/bin/sh
echo "begun $(date +%%s)"
echo "mac $(cat /sys/class/net/eth0/address)"
echo "random $(head -c 16 /dev/urandom | od -An -v -tx1)"
[ ! -e /src/own ] || echo "another's file"
echo job%[1]d >/src/own
sync
%[2]s
END
chmod 755 /src/job%[1]d`, i+1, job))
	}
	k.inGuest(t, "template", "cat >/usr/local/sbin/new-identity <<'END'\n"+k.blocks["new-identity"]+"END\nchmod 755 /usr/local/sbin/new-identity")
	k.inGuest(t, "template", "ip link set eth0 up; hostname template; cat /sys/firmware/acpi/interrupts/gpe05")
	mac := k.inGuest(t, "template", "cat /sys/class/net/eth0/address")
	var generation struct {
		GUID uuid.UUID `json:"guid"`
	}
	k.monitor(t, "template", "query-vm-generation-id", &generation)
	before := generation.GUID
	k.run(t, "ci-save")
	disk, err := os.ReadFile(k.path("template.qcow2"))
	ok(t, err)

	time.Sleep(3 * time.Second) // that the guest is away
	start = time.Now()
	out := k.shell(t, "set -eu\nnic=user,mac=52:54:00:00:00:99\n"+k.blocks["vm"]+k.blocks["ci-job"])
	if !strings.Contains(out, "1 jobs failed") || strings.Count(out, "ended with code 1") != 1 {
		t.Errorf("one of three jobs was to fail: %s", out)
	}
	t.Logf("three jobs in clones took %v", time.Since(start).Round(time.Millisecond))
	var random []string
	for _, name := range []string{"job1", "job2", "job3"} {
		if strings.Contains(k.log(t, name), "another's") {
			t.Errorf("%s has another's disk", name)
		}
		begun, err := strconv.ParseInt(k.said(t, name, "begun"), 10, 64)
		ok(t, err)
		if begun < start.Unix()-1 || begun > time.Now().Unix()+1 {
			t.Errorf("%s began at %d by its clock, %d by the host's", name, begun, start.Unix())
		}
		if is := k.said(t, name, "mac"); is != mac {
			t.Errorf("%s has the address %s, and the template %s", name, is, mac)
		}
		random = append(random, k.said(t, name, "random"))
		for _, end := range []string{".qcow2", ".pid"} {
			if _, err := os.Stat(k.path(name + end)); err == nil {
				t.Errorf("%s%s is left", name, end)
			}
		}
	}
	t.Logf("random numbers of the three clones: %q", random)
	now, err := os.ReadFile(k.path("template.qcow2"))
	ok(t, err)
	if !bytes.Equal(now, disk) {
		t.Error("the template's disk has changed")
	}

	// What a clone must change.
	k.run(t, "clone-identity")
	seen := map[string]string{mac: "the template", "template": "the template", before.String(): "the template"}
	for _, name := range []string{"alice", "bob"} {
		for what, value := range map[string]string{
			"random":  k.inGuest(t, name, "head -c 16 /dev/urandom | od -An -v -tx1"),
			"machine": k.inGuest(t, name, "cat /etc/machine-id"),
			"host":    k.inGuest(t, name, "hostname"),
			"mac":     k.inGuest(t, name, "cat /sys/class/net/eth0/address"),
		} {
			if other := seen[value]; other != "" || value == "" {
				t.Errorf("%s of %s is %q, that of %q", what, name, value, other)
			}
			seen[value] = name
		}
		// The device goes by the guest's word, and not by the command line's.
		var filters []struct {
			Main string `json:"main-mac"`
		}
		k.monitor(t, name, "query-rx-filter", &filters)
		if len(filters) != 1 || seen[filters[0].Main] != name {
			t.Errorf("the network card of %s has %+v", name, filters)
		}
		k.rightClock(t, name)
		// The generation is a new one, in the guest's memory too, and it has been told.
		k.monitor(t, name, "query-vm-generation-id", &generation)
		if seen[generation.GUID.String()] != "" {
			t.Errorf("%s has the generation of %s", name, seen[generation.GUID.String()])
		}
		seen[generation.GUID.String()] = name
		if events := k.inGuest(t, name, "cat /sys/firmware/acpi/interrupts/gpe05"); !regexp.MustCompile(`^\s*[1-9]`).MatchString(events) {
			t.Errorf("%s has not been told of its new generation: %s", name, events)
		}
	}
	k.shell(t, `export FLIC_STORE=$PWD/store
flic-migrate checkpoint --quiet --qmp alice.qmp alice
flic-migrate memory --quiet alice -o alice.raw`)
	memory, err := os.ReadFile(k.path("alice.raw"))
	ok(t, err)
	k.monitor(t, "alice", "query-vm-generation-id", &generation)
	if !bytes.Contains(memory, littleEndian(generation.GUID)) || bytes.Contains(memory, littleEndian(before)) {
		t.Errorf("the memory of alice does not have %v in place of %v", generation.GUID, before)
	}
}

// rightClock fails if a VM's clock is not the host's, to about a second. Asking may take long.
func (k *kitchen) rightClock(t *testing.T, name string) {
	t.Helper()
	before := time.Now().Unix()
	n, err := strconv.ParseInt(strings.TrimSpace(k.inGuest(t, name, "date +%s")), 10, 64)
	if after := time.Now().Unix(); err != nil || n < before-2 || n > after+2 {
		t.Errorf("the clock of %s is %d, and the host's was %d to %d: %v", name, n, before, after, err)
	}
}

// littleEndian is a GUID as it lies in memory: of its first three numbers the low byte first.
func littleEndian(id uuid.UUID) []byte {
	b := slices.Clone(id[:])
	slices.Reverse(b[:4])
	slices.Reverse(b[4:6])
	slices.Reverse(b[6:8])
	return b
}

// A crontab's line makes a checkpoint, and leaves one for the day. The oldest stays as long as
// there are not enough days.
func testRecipeNightly(t *testing.T, k *kitchen) {
	k.shell(t, "set -eu\n"+k.blocks["vm"]+"vm web1 debian.qcow2")
	k.ready(t, "web1")
	fields := strings.SplitN(k.blocks["nightly-cron"], " ", 7)
	if len(fields) != 7 || fields[5] != "root" {
		t.Fatalf("no line of a crontab: %q", fields)
	}
	// --store and --qmp are this test's.
	night := strings.NewReplacer("/srv/vms", k.path("store"), "/run", k.dir).Replace(fields[6])
	for range 3 {
		k.shell(t, "set -eu\n"+night)
	}
	if left := k.shell(t, "flic-migrate list --store store web1"); !strings.Contains(left, "web1@1") || strings.Contains(left, "web1@2") || !strings.Contains(left, "web1@3") {
		t.Errorf("left are %s", left)
	}
	k.rightClock(t, "web1")
}

// Five nodes on one network are taken back to one moment, their memory, disks and network.
func testRecipeLab(t *testing.T, k *kitchen) {
	start := time.Now()
	k.run(t, "lab-start")
	var nodes []string
	for n := range 5 {
		nodes = append(nodes, fmt.Sprintf("node%d", n+1))
	}
	k.ready(t, nodes...)
	t.Logf("five nodes booted in %v", time.Since(start).Round(time.Millisecond))
	for n, name := range nodes {
		k.inGuest(t, name, fmt.Sprintf("ip link set eth0 up; ip addr add 10.0.0.%d/24 dev eth0; hostname %s; echo before >/some/state", n+1, name))
	}
	k.inGuest(t, "node1", "ping -c 1 -w 20 10.0.0.5")
	// The loop of lab-start would boot them again.
	functions, _, found := strings.Cut(k.blocks["lab-start"], "\nfor n in")
	if !found {
		t.Fatal("lab-start has no loop")
	}
	script := "set -eu\n" + k.blocks["vm"] + functions + "\n"
	start = time.Now()
	out := k.shell(t, script+k.blocks["lab-save"])
	t.Logf("saved in %v: %s", time.Since(start).Round(time.Millisecond), out)
	for range 2 {
		for _, name := range nodes {
			k.inGuest(t, name, "hostname gone; echo after >/some/state; ip addr flush dev eth0")
		}
		start = time.Now()
		out := k.shell(t, script+k.blocks["lab-back"])
		t.Logf("taken back in %v: %s", time.Since(start).Round(time.Millisecond), out)
		for _, name := range nodes {
			if is := k.inGuest(t, name, "hostname; cat /some/state"); is != name+" before" {
				t.Errorf("%s is %q", name, is)
			}
		}
		k.inGuest(t, "node2", "ping -c 1 -w 20 10.0.0.4")
	}
}

// What a program has left in memory is found in the second checkpoint and not in the first.
func testRecipeSandbox(t *testing.T, k *kitchen) {
	k.shell(t, "set -eu\n"+k.blocks["vm"]+"vm sandbox debian.qcow2")
	k.ready(t, "sandbox")
	k.run(t, "sandbox-before")
	// Not in a command line, where the first part would be before.
	k.inGuest(t, "sandbox", "for n in 1 2 3; do echo left-by-the-sample-$((n * 7)); done >/tmp/sample")
	out := k.run(t, "sandbox-after")
	found, err := os.ReadFile(k.path("new.txt"))
	ok(t, err)
	if !strings.Contains(string(found), "left-by-the-sample-21") {
		t.Errorf("not found in %d bytes of what is new", len(found))
	}
	if !strings.Contains(out, "pc.ram") || !regexp.MustCompile(`(?m)^rip\s+0x[0-9a-f]+`).MatchString(out) || !strings.Contains(out, "load1") {
		t.Errorf("%s", out)
	}
	var notes []struct {
		Note string `json:"note"`
	}
	ok(t, json.Unmarshal([]byte(k.shell(t, "flic-migrate list --json --store store sandbox")), &notes))
	if len(notes) != 2 || notes[0].Note != "before the sample" || notes[1].Note != "after the sample" {
		t.Errorf("%+v", notes)
	}
}
