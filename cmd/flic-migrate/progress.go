package main

import (
	"fmt"
	"io"
	"os"
	"time"

	"github.com/flic-migrate/flic-migrate/tier/progress"
	"github.com/schollz/progressbar/v3"
)

// meter shows how far a save or restore is: as a bar on a terminal, as a
// line now and then elsewhere.
type meter struct {
	w     io.Writer
	bar   *progressbar.ProgressBar // nil: lines
	start time.Time
	last  time.Time
	phase string
}

// lineEvery is the pause between two lines, and how long something must take
// to be worth one.
const lineEvery = 2 * time.Second

// newProgress returns the function to be called with each progress; nil with
// quiet.
func newProgress(w io.Writer, quiet bool) *meter {
	if quiet {
		return nil
	}
	p := &meter{w: w, start: time.Now()}
	if f, ok := w.(*os.File); ok && isTerminal(f) {
		p.bar = progressbar.NewOptions64(-1,
			progressbar.OptionSetWriter(w),
			progressbar.OptionSetWidth(30),
			progressbar.OptionShowCount(),
			progressbar.OptionThrottle(100*time.Millisecond),
			progressbar.OptionClearOnFinish(),
		)
	}
	return p
}

// callback is p.show, or nil if there is nothing to show.
func (p *meter) callback() func(progress.State) {
	if p == nil {
		return nil
	}
	return p.show
}

func (p *meter) show(t progress.State) {
	if p.bar != nil {
		if t.PagesAll > 0 && p.bar.GetMax64() != t.PagesAll {
			p.bar.ChangeMax64(t.PagesAll)
		}
		p.bar.Describe(t.Phase)
		p.bar.Set64(t.Pages)
		return
	}
	now := time.Now()
	changed := t.Phase != p.phase
	p.phase = t.Phase
	if now.Sub(p.start) < lineEvery || !changed && now.Sub(p.last) < lineEvery {
		return
	}
	p.last = now
	line := fmt.Sprintf("flic-migrate: %s: %d pages", t.Phase, t.Pages)
	if t.PagesAll > 0 {
		line = fmt.Sprintf("flic-migrate: %s: %d %% of %d pages", t.Phase, t.Pages*100/t.PagesAll, t.PagesAll)
	}
	if t.BytesIn > 0 {
		line += ", " + human(t.BytesIn) + " in"
	}
	if t.BytesOut > 0 {
		line += ", " + human(t.BytesOut) + " out"
	}
	fmt.Fprintf(p.w, "%s, %.0f s\n", line, now.Sub(p.start).Seconds())
}

// finish takes the bar off the terminal.
func (p *meter) finish() {
	if p != nil && p.bar != nil {
		p.bar.Finish()
	}
}

// human writes a number of bytes for people, in powers of 1024.
func human(n int64) string {
	if n < 1<<10 {
		return fmt.Sprintf("%d B", n)
	}
	v, i := float64(n)/(1<<10), 0
	for v >= 1023.95 && i < len("KMGT")-1 {
		v /= 1 << 10
		i++
	}
	return fmt.Sprintf("%.1f %ciB", v, "KMGT"[i])
}
