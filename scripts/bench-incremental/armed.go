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
%d armed checkpoints of each running guest, by turns with full ones that stop it; armed %v before they are asked for. Medians; from the command's start to its end, when all is durable.

| guest | memory | full, s | armed, s | to full | full: guest stood still, s | armed | to full | full, MB | armed, MB | pages sent again |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|
`

// kind is what the checkpoints of one kind took.
type kind struct {
	walls, pauses []time.Duration
	bytes, resent []int64 // bytes to flash; pages that were dirty
}

func (k *kind) add(r session.CheckpointReport, wall time.Duration) {
	k.walls, k.pauses = append(k.walls, wall), append(k.pauses, r.Downtime)
	k.bytes, k.resent = append(k.bytes, r.Save.FlashBytes), append(k.resent, r.Save.Resent)
}

// armed compares, of one running guest, full checkpoints with armed ones. The armed
// process has read the guest's memory long before armedFor is over.
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
	if c.Memory, err = live(b.memory); err != nil {
		return "", err
	}
	vm, err := measure.Boot(ctx, c, w.start, w.warm)
	if err != nil {
		return "", err
	}
	defer vm.Kill()
	checkpoint := func(flags ...string) (r session.CheckpointReport, wall time.Duration, err error) {
		cmd := exec.CommandContext(ctx, b.binary, append([]string{"checkpoint", "--store", filepath.Join(dir, "store"), "--qmp", vm.Socket, "--codec", b.codec, "--json", "--quiet", "vm"}, flags...)...)
		start := time.Now()
		out, err := cmd.Output()
		wall = time.Since(start)
		if err != nil {
			return r, wall, fmt.Errorf("%w: %s", err, out)
		}
		return r, wall, json.Unmarshal(out, &r)
	}
	var full, armed kind
	for i := range b.n + 1 {
		f, fullWall, err := checkpoint("--parent", "none")
		if err != nil {
			return "", err
		}
		again, _, err := checkpoint("--arm")
		if err != nil {
			return "", err
		}
		time.Sleep(armedFor)
		a, wall, err := checkpoint()
		if err != nil {
			return "", err
		}
		if again.ArmedProcess == 0 || !a.Armed {
			return "", fmt.Errorf("it was not armed: %+v", a)
		}
		if i > 0 { // the first round warms up
			full.add(f, fullWall)
			armed.add(a, wall)
		}
	}
	s := func(v []time.Duration) float64 { return measure.Median(v).Seconds() }
	mb := func(v []int64) float64 { return float64(measure.Median(v)) / 1e6 }
	return fmt.Sprintf("| %s | %s | %.3f | %.3f | %.2f | %.3f | %.3f | %.2f | %.1f | %.2f | %d |", w.name, b.memory,
		s(full.walls), s(armed.walls), s(armed.walls)/s(full.walls), s(full.pauses), s(armed.pauses), s(armed.pauses)/s(full.pauses),
		mb(full.bytes), mb(armed.bytes), measure.Median(armed.resent)), nil
}

// live is a memory size, in M or G, and 8 KiB more: the dirty log of QEMU 7.2 under TCG
// misses pages of guests whose size 256 KiB divide, see qemutest.
func live(memory string) (string, error) {
	var n int
	var unit rune
	if _, err := fmt.Sscanf(memory, "%d%c", &n, &unit); err != nil || unit != 'M' && unit != 'G' {
		return "", fmt.Errorf("-memory %s: a number and M or G", memory)
	}
	if unit == 'G' {
		n <<= 10
	}
	return fmt.Sprintf("%dK", n<<10+8), nil
}

// armedFor is for how long a checkpoint is armed before the next one.
const armedFor = 8 * time.Second
