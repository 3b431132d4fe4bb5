package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strconv"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
	"github.com/flic-migrate/flic-migrate/scripts/measure"
)

// How far apart guests stand still, as they have it themselves. Each writes its own clock to
// its console, each millisecond. That clock stands still with the guest (QEMU's virtual
// clock), so that the pause is between two of its values, however late these come:
//
//	guest's clock     100.1  101.3  102.2 │ 103.4  104.5
//	host, received    500.4  501.8  502.6 │ 903.9  905.2
//	                                      └ the pause: no gap for the guest, one for us
//
// What the guest's clock is by the host's is seen in the second before, by the line that came
// soonest. So each guest's pause began, by the host's clock, between two of its lines, and
// the skew is between what these bounds leave for it. A guest that waits for a CPU writes
// no lines, and its bounds are wide.

// pulse has a guest write its CLOCK_MONOTONIC, in ns, each ms: clock_gettime is call 228 on
// x86-64.
const pulse = `perl -e '$|=1; while(1) { $t=pack("q2",0,0); syscall(228,1,$t); ($s,$n)=unpack("q2",$t); printf "at %d%09d\n",$s,$n; select(undef,undef,undef,0.001) }' >/dev/console`

var pulseLine = regexp.MustCompile(`^at (\d+)$`)

const (
	// clockWindow is how long before the pause the guest's clock is compared with the host's.
	clockWindow = time.Second
	// pulseLimit is how long guests may take until they write.
	pulseLimit = time.Minute
)

// span is when a guest's pause began, by the host's clock: not before, and not after.
type span struct{ first, last time.Time }

// pulses starts the clocks of all guests, beside what they do.
func (b *bench) pulses(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, pulseLimit)
	defer cancel()
	return b.each(true, func(i int, g *guest) error {
		start := "run " + pulse
		if w := workloads[i/len(images)%len(workloads)]; w.start != "" {
			start += " & " + w.start[len("run "):]
		}
		if err := g.vm.Send(start); err != nil {
			return err
		}
		_, err := g.vm.Expect(ctx, `at \d+\r`)
		return err
	})
}

// paused finds the longest pause among lines, and when it began.
func paused(lines []qemutest.Line) (s span, long time.Duration, err error) {
	type stamp struct {
		guest time.Duration
		host  time.Time
	}
	var all []stamp
	for _, l := range lines {
		// Others write to the console, too, in the middle of a line at times.
		if m := pulseLine.FindStringSubmatch(l.Text); m != nil {
			n, err := strconv.ParseInt(m[1], 10, 64)
			if err == nil && (len(all) == 0 || time.Duration(n) > all[len(all)-1].guest) {
				all = append(all, stamp{time.Duration(n), l.At})
			}
		}
	}
	at := 0
	for i := 1; i < len(all); i++ {
		if d := all[i].host.Sub(all[i-1].host) - (all[i].guest - all[i-1].guest); d > long {
			at, long = i, d
		}
	}
	// The first line behind it can have been under way before.
	if at < 2 || at+1 >= len(all) {
		return s, long, errors.New("too few lines of its clock")
	}
	var zero time.Time // the host's clock when the guest's was 0, by the line that came soonest
	for _, e := range all[:at] {
		if z := e.host.Add(-e.guest); all[at-1].guest-e.guest <= clockWindow && (zero.IsZero() || z.Before(zero)) {
			zero = z
		}
	}
	return span{zero.Add(all[at-1].guest), zero.Add(all[at+1].guest)}, long, nil
}

// skewOf is between what the skew of pauses is.
func skewOf(spans []span) (least, most time.Duration) {
	first, last := spans[0], spans[0]
	for _, s := range spans {
		// The latest that certainly began so late, the earliest that certainly began so early.
		if s.first.After(last.first) {
			last.first = s.first
		}
		if s.last.Before(first.last) {
			first.last = s.last
		}
		if s.first.Before(first.first) {
			first.first = s.first
		}
		if s.last.After(last.last) {
			last.last = s.last
		}
	}
	return max(0, last.first.Sub(first.last)), last.last.Sub(first.first)
}

// skew makes groups of guests that run.
func (b *bench) skew(ctx context.Context) error {
	if b.skews == 0 {
		return nil
	}
	if err := b.each(false, func(_ int, g *guest) error { return qmp.Cont(ctx, g.vm.QMP) }); err != nil {
		return err
	}
	if err := b.pulses(ctx); err != nil {
		return err
	}
	fmt.Printf("| %d running guests | skew by QEMU's events: median | largest | in the guests, at least: median | largest | at most: median | largest | stood still, median | in all |\n|---|---:|---:|---:|---:|---:|---:|---:|---:|\n", b.n)
	for _, mode := range []string{"stop", "live"} {
		var skews, least, most, downs, totals []time.Duration
		for range b.skews {
			from := make([]int, b.n)
			for i, g := range b.guests {
				_, from[i] = g.vm.Lines(0)
			}
			time.Sleep(clockWindow)
			doc, err := b.group("skew", "--no-disks", "--mode", mode)
			if err != nil {
				return err
			}
			time.Sleep(clockWindow / 2) // they go on
			var spans []span
			for i, g := range b.guests {
				lines, _ := g.vm.Lines(from[i])
				s, _, err := paused(lines)
				if err != nil {
					return fmt.Errorf("%s: %w", g.name, err)
				}
				spans = append(spans, s)
			}
			lo, hi := skewOf(spans)
			skews, least, most = append(skews, doc.Skew), append(least, lo), append(most, hi)
			downs, totals = append(downs, doc.Downtime), append(totals, doc.Total)
			if err := os.RemoveAll(b.path("skew")); err != nil {
				return err
			}
		}
		fmt.Printf("| %s |", mode)
		for _, list := range [][]time.Duration{skews, least, most} {
			fmt.Printf(" %.1f ms | %.1f ms |", ms(measure.Median(list)), ms(slices.Max(list)))
		}
		fmt.Printf(" %.0f ms | %.2f s |\n", ms(measure.Median(downs)), measure.Median(totals).Seconds())
	}
	fmt.Println()
	return nil
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1e3 }
