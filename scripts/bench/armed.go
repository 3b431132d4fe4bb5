package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
	"github.com/flic-migrate/flic-migrate/qmp/session"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
)

// armedEvery is the time between an armed checkpoint and the one that arms it. The armed
// process has read the guest's memory long before that is over.
const armedEvery = 8 * time.Second

// armed compares, of one running guest of 512 MB, a full checkpoint that stops it with
// one that was armed: from the command's start to its end, which is when the checkpoint
// is durable and the guest runs again, and how long the guest stood still. Both kinds
// take turns.
func (b *bench) armed(binary string) error {
	ctx := context.Background()
	config := debian
	config.Memory = "524296K" // 512 MiB and a little: see qemutest
	config.Kernel += " flic.dirty=20"
	vm, err := qemutest.Launch(ctx, config)
	if err != nil {
		return err
	}
	defer vm.Kill()
	boot, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	if _, err := vm.Expect(boot, `flic ready`); err != nil {
		return err
	}
	st := filepath.Join(b.dir, "store")
	make := func(flags ...string) (rep session.CheckpointReport, wall time.Duration, err error) {
		cmd := exec.Command(binary, append([]string{"checkpoint", "--store", st, "--qmp", vm.Socket, "--json", "--quiet", "vm"}, flags...)...)
		start := time.Now()
		out, err := cmd.Output()
		wall = time.Since(start)
		if err == nil {
			err = json.Unmarshal(out, &rep)
		}
		return rep, wall, err
	}
	type kind struct{ walls, pauses, bytes, resent []int64 }
	var full, armed kind
	var phases []checkpoint.Seconds
	add := func(k *kind, rep session.CheckpointReport, wall time.Duration) {
		k.walls, k.pauses = append(k.walls, wall.Microseconds()), append(k.pauses, rep.Downtime.Microseconds())
		k.bytes, k.resent = append(k.bytes, rep.Save.FlashBytes), append(k.resent, rep.Save.Resent)
	}
	for i := range b.runs + 1 {
		rep, wall, err := make(fullFlags...)
		if err != nil {
			return err
		}
		again, _, err := make("--arm")
		if err != nil {
			return err
		}
		time.Sleep(armedEvery)
		quick, quickWall, err := make()
		if err != nil {
			return err
		}
		if again.ArmedProcess == 0 || !quick.Armed {
			return fmt.Errorf("it was not armed: %+v", quick)
		}
		if i > 0 { // the first round warms up
			add(&full, rep, wall)
			add(&armed, quick, quickWall)
			phases = append(phases, quick.Save.Seconds)
		}
	}
	mid := func(s []int64) float64 {
		slices.Sort(s)
		return float64(s[len(s)/2])
	}
	fmt.Printf("\n### Checkpoints of a running 512 MB guest, %d of each, by turns\n\n", b.runs)
	fmt.Printf("| | command to durable, ms | guest stood still, ms | to flash, MB | pages sent again |\n|---|---|---|---|---|\n")
	for name, k := range map[string]kind{"full": full, "armed": armed} {
		fmt.Printf("| %s | %.0f (%.0f–%.0f) | %.0f | %.1f | %.0f |\n", name, mid(k.walls)/1e3,
			float64(slices.Min(k.walls))/1e3, float64(slices.Max(k.walls))/1e3, mid(k.pauses)/1e3, mid(k.bytes)/1e6, mid(k.resent))
	}
	fmt.Printf("\nThe armed ones, s: ")
	for _, p := range phases {
		fmt.Printf("%.3f RAM, %.3f sync, %.3f tail, %.3f commit; ", p.RAM, p.Sync, p.Tail, p.Commit)
	}
	fmt.Printf("\n\narmed : full is %.2f, by the guest's pause %.2f\n", mid(armed.walls)/mid(full.walls), mid(armed.pauses)/mid(full.pauses))
	return nil
}

// fullFlags make a checkpoint that has all of its pages.
var fullFlags = []string{"--parent", "none", "--share", "none"}
