package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp/session"
	"github.com/flic-migrate/flic-migrate/scripts/measure"
)

// armedHead is the head of the table of armed checkpoints.
const armedHead = `
%d rounds of checkpoints of each running guest: a full one; %v later an increment that arms the next; 8s later that, or with -used as much later as the process needs to read the memory. Medians, times from the command's start until all is durable.

| guest | memory | full, s | increment, s | to full | armed, s | to full | full: guest stood still, s | increment, to full | armed, to full | full, MB | increment, MB | armed, MB | pages sent again |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|
`

// kind is what the checkpoints of one kind took.
type kind struct {
	times, pauses []time.Duration // until durable; of the guest
	bytes, resent []int64         // bytes to flash; pages that were dirty
}

func (k *kind) add(r session.CheckpointReport, start time.Time) {
	k.times, k.pauses = append(k.times, r.Durable.Sub(start)), append(k.pauses, r.Downtime)
	k.bytes, k.resent = append(k.bytes, r.Save.FlashBytes), append(k.resent, r.Save.Resent)
}

// armed compares, of one running guest, full checkpoints with increments and armed ones. The
// armed process has read the guest's memory before armedFor is over.
func (b *bench) armed(ctx context.Context, w workload) (string, error) {
	dir := filepath.Join(b.dir, w.name)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	c, err := b.config(ctx, w)
	if err != nil {
		return "", err
	}
	if !b.round {
		if c.Memory, err = live(b.memory); err != nil {
			return "", err
		}
	}
	vm, err := measure.Boot(ctx, c, w.start, w.warm)
	if err != nil {
		return "", err
	}
	defer vm.Kill()
	checkpoint := func(flags ...string) (r session.CheckpointReport, start time.Time, err error) {
		cmd := exec.CommandContext(ctx, b.binary, append([]string{"checkpoint", "--store", filepath.Join(dir, "store"), "--qmp", vm.Socket, "--codec", b.codec, "--json", "--quiet", "vm"}, flags...)...)
		start = time.Now()
		out, err := cmd.Output()
		if err != nil {
			return r, start, fmt.Errorf("%w: %s", err, out)
		}
		return r, start, json.Unmarshal(out, &r)
	}
	var full, increment, armed kind
	for i := range b.n + 1 {
		f, fullStart, err := checkpoint("--parent", "none")
		if err != nil {
			return "", err
		}
		time.Sleep(b.every)
		inc, incStart, err := checkpoint("--arm")
		if err != nil {
			return "", err
		}
		time.Sleep(b.armedFor())
		a, armedStart, err := checkpoint()
		if err != nil {
			return "", err
		}
		if inc.ArmedProcess == 0 || !a.Armed {
			return "", fmt.Errorf("it was not armed: %+v", a)
		}
		if i > 0 { // the first round warms up
			full.add(f, fullStart)
			increment.add(inc, incStart)
			armed.add(a, armedStart)
		}
	}
	s := func(v []time.Duration) float64 { return measure.Median(v).Seconds() }
	mb := func(v []int64) float64 { return float64(measure.Median(v)) / 1e6 }
	return fmt.Sprintf("| %s | %s | %.3f | %.3f | %.2f | %.3f | %.2f | %.3f | %.2f | %.2f | %.1f | %.2f | %.2f | %d |", w.name, b.memory,
		s(full.times), s(increment.times), s(increment.times)/s(full.times), s(armed.times), s(armed.times)/s(full.times),
		s(full.pauses), s(increment.pauses)/s(full.pauses), s(armed.pauses)/s(full.pauses),
		mb(full.bytes), mb(increment.bytes), mb(armed.bytes), measure.Median(armed.resent)), nil
}

// live is a memory size, in M or G, and 8 KiB more: the dirty log of QEMU 7.2 under TCG
// misses pages of guests whose size 256 KiB divide, see qemutest.
func live(memory string) (string, error) {
	n, err := kib(memory)
	return fmt.Sprintf("%dK", n+8), err
}

// kib is a memory size, in M or G, in KiB.
func kib(memory string) (n int, err error) {
	var unit rune
	if _, err := fmt.Sscanf(memory, "%d%c", &n, &unit); err != nil || unit != 'M' && unit != 'G' {
		return 0, fmt.Errorf("-memory %s: a number and M or G", memory)
	}
	if unit == 'G' {
		n <<= 10
	}
	return n << 10, nil
}

// armedFor is for how long a checkpoint is armed before the next one: what the guests use has
// been read then, and at the default of --arm-rate, 100 MiB/s, what -used fills.
func (b *bench) armedFor() time.Duration {
	memory, _ := kib(b.memory) // config has looked at it
	return (8*time.Second + time.Duration(memory>>10*b.used/100)*time.Second/100).Round(time.Second)
}
