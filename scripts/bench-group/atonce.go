package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"time"

	"github.com/flic-migrate/flic-migrate/scripts/measure"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
)

// atOnce saves all guests, which stand still, by commands of their own at the same time into
// one store that is empty at first. Each stores all of its pages, reports, and then gives up
// what others have by then.
func (b *bench) atOnce(ctx context.Context) error {
	var reported, ended []time.Duration
	var first, last []int64
	for range b.runs {
		store := b.path("at-once")
		told, done, stored := make([]time.Duration, b.n), make([]time.Duration, b.n), make([]int64, b.n)
		err := b.each(true, func(i int, g *guest) error {
			cmd := exec.CommandContext(ctx, b.binary, "checkpoint", "--quiet", "--json", "--no-disks", "--store", store, "--codec", b.codec, "--qmp", g.vm.Socket, g.name)
			cmd.Env, cmd.Stderr = append(os.Environ(), "FLIC_CONFIG="+os.DevNull), os.Stderr
			out, err := cmd.StdoutPipe()
			if err != nil {
				return err
			}
			start := time.Now()
			if err := cmd.Start(); err != nil {
				return err
			}
			var doc struct{ Save *checkpoint.Report }
			err = json.NewDecoder(out).Decode(&doc)
			told[i] = time.Since(start)
			if werr := cmd.Wait(); werr != nil {
				return werr
			}
			done[i] = time.Since(start)
			if err == nil {
				stored[i] = doc.Save.FlashBytes
			}
			return err
		})
		if err != nil {
			return err
		}
		var list []struct {
			Flash int64 `json:"flash_bytes"`
		}
		out, err := b.flic("list", "--json", "--store", store)
		if err == nil {
			err = json.Unmarshal(out, &list)
		}
		if err == nil {
			_, err = b.flic("verify", "--store", store, "--all")
		}
		if err != nil {
			return err
		}
		var before, after int64
		for i := range stored {
			before, after = before+stored[i], after+list[i].Flash
		}
		reported, ended = append(reported, longest(told)), append(ended, longest(done))
		first, last = append(first, before), append(last, after)
		if err := os.RemoveAll(store); err != nil {
			return err
		}
		if err := b.instant(ctx); err != nil {
			return err
		}
	}
	fmt.Printf("| %d `checkpoint` commands at once, one store | the last report | the last command ends | MB stored | MB in the end |\n|---|---:|---:|---:|---:|\n", b.n)
	fmt.Printf("| | %.2f s | %.2f s | %.1f | %.1f |\n\n", measure.Median(reported).Seconds(), measure.Median(ended).Seconds(),
		float64(measure.Median(first))/1e6, float64(measure.Median(last))/1e6)
	return nil
}
