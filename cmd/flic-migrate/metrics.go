package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/lazy"
	"github.com/flic-migrate/flic-migrate/tier/metrics"
	"github.com/flic-migrate/flic-migrate/tier/progress"
	"github.com/flic-migrate/flic-migrate/tier/rescue"
)

// addMetrics adds --metrics to a verb. Each has a key of its own: a file is of one verb.
func addMetrics(fs *pflag.FlagSet, verb string) {
	fs.String("metrics", "", "write metrics for Prometheus's textfile collector to this `FILE`, also after a failure")
	setKey(fs, "metrics", verb+"-metrics")
}

// measure begins the metrics of a command that is to write some.
func (a *app) measure(cmd *cobra.Command, args []string) {
	f := cmd.Flags().Lookup("metrics")
	if f == nil || f.Value.String() == "" {
		return
	}
	vm := ""
	if v := cmd.Flags().Lookup("vm"); v != nil {
		vm = v.Value.String()
	} else if len(args) == 1 {
		vm, _, _ = strings.Cut(args[0], "@")
	}
	// Other processes write it too, and work in other directories.
	a.measures = f.Value.String()
	if path, err := filepath.Abs(a.measures); err == nil {
		a.measures = path
	}
	if cmd.Name() != "resume" { // whoever serves the memory writes it
		a.metrics = metrics.New(a.measures, cmd.Name(), vm)
	}
}

// measured writes what a command has come to. That it can't be written changes nothing.
func (a *app) measured(code int) {
	if a.metrics == nil {
		return
	}
	if err := a.metrics.Ended(code); err != nil {
		a.log().Warn("the metrics were not written", "cause", oneLine(err))
	}
}

// measureSave sets what a save has come to.
func (a *app) measureSave(r *checkpoint.Report) {
	m := a.metrics
	if m == nil {
		return
	}
	m.Gauge("stream_bytes", "Length of the migration stream.", float64(r.BytesIn))
	for _, p := range []struct {
		kind string
		n    int64
	}{{"all", r.Pages}, {"zero", r.Zero}, {"duplicate", r.Duplicate}, {"hot", r.Hot}, {"cold", r.Cold}, {"disk", r.Disk}, {"delta", r.Delta}, {"unchanged", r.Unchanged}} {
		m.Gauge("pages", "Pages of the guest, by what became of them; duplicates are hot or cold as well.", float64(p.n), "kind", p.kind)
	}
	m.Gauge("written_bytes", "Bytes written to each tier.", float64(r.FlashBytes), "tier", "flash")
	m.Gauge("written_bytes", "Bytes written to each tier.", float64(r.NVRAMBytes), "tier", "nvram")
	s := r.Seconds
	for _, p := range []struct {
		phase string
		s     float64
	}{{"ram", s.RAM}, {"sync", s.Sync}, {"tail", s.Tail}, {"commit", s.Commit}} {
		m.Gauge("save_phase_seconds", "How long each phase of the save took.", p.s, "phase", p.phase)
	}
}

// measureCheckpoint sets what a checkpoint has come to.
func (a *app) measureCheckpoint(doc *checkpointReport) {
	if a.metrics == nil || doc.Save == nil {
		return
	}
	a.measureSave(doc.Save)
	a.metrics.Gauge("downtime_seconds", "How long the guest stood still.", doc.Downtime.Seconds())
	a.metrics.Gauge("passes", "Passes over the guest's memory.", float64(doc.Passes))
}

// measurePrune sets how many checkpoints a prune has kept and removed.
func (a *app) measurePrune(entries []pruneEntry) {
	if a.metrics == nil {
		return
	}
	count := map[string]int{"kept": 0, "removed": 0, "failed": 0}
	var flash, nvram int64
	for _, e := range entries {
		switch {
		case e.Removed != nil:
			count["removed"]++
			flash, nvram = flash+e.Removed.FlashBytes, nvram+e.Removed.NVRAMBytes
		case len(e.Kept) > 0:
			count["kept"]++
		case e.Error != "":
			count["failed"]++
		}
	}
	for what, n := range count {
		a.metrics.Gauge("checkpoints", "Checkpoints, by what became of them.", float64(n), "result", what)
	}
	a.metrics.Gauge("freed_bytes", "Bytes freed in each tier.", float64(flash), "tier", "flash")
	a.metrics.Gauge("freed_bytes", "Bytes freed in each tier.", float64(nvram), "tier", "nvram")
}

// measureVerify sets how many checkpoints a verify has found to be what.
func (a *app) measureVerify(ok, damaged, unsupported int) {
	if a.metrics == nil {
		return
	}
	for what, n := range map[string]int{"ok": ok, "damaged": damaged, "unsupported": unsupported} {
		a.metrics.Gauge("checkpoints", "Checkpoints, by what became of them.", float64(n), "result", what)
	}
}

// metricsEvery is the time between two writes of a process that runs.
const metricsEvery = time.Second

// serverMetrics are those of a restore while it runs. Without a set there are none.
type serverMetrics struct {
	set  *metrics.Set
	last time.Time
}

// progress writes how far it is, now and then.
func (s *serverMetrics) progress(p progress.State) {
	m := s.set
	if now := time.Now(); m != nil && now.Sub(s.last) >= metricsEvery {
		s.last = now
		m.Gauge("running", "1 while the process runs.", 1)
		m.Gauge("beat_timestamp_seconds", "When a process that runs last wrote this.", float64(now.UnixMilli())/1000)
		m.Gauge("pages_sent", "Pages that have been sent.", float64(p.Pages))
		m.Gauge("pages_to_send", "Pages that are to be sent; 0 while not known.", float64(p.PagesAll))
		_ = m.Write() // the one at the end says why not
	}
}

// with is a callback that writes how far it is and calls show, which may be nil.
func (s *serverMetrics) with(show func(progress.State)) func(progress.State) {
	if s.set == nil {
		return show
	}
	return func(p progress.State) {
		s.progress(p)
		if show != nil {
			show(p)
		}
	}
}

// restored sets what a restore has come to; nil: it has not begun.
func (s *serverMetrics) restored(doc *restoreReport) {
	m := s.set
	if m == nil {
		return
	}
	m.Gauge("running", "1 while the process runs.", 0)
	switch {
	case doc == nil:
	case doc.LazyReport != nil:
		measureLazy(m, doc.LazyReport)
	case doc.Report.BytesOut > 0:
		m.Gauge("pages_sent", "Pages that have been sent.", float64(doc.Report.Pages))
		m.Gauge("sent_bytes", "Length of the stream.", float64(doc.Report.BytesOut))
	}
}

func measureLazy(m *metrics.Set, r *lazy.Report) {
	m.Gauge("pages_sent", "Pages that have been sent.", float64(r.Pages))
	m.Gauge("sent_bytes", "Length of the stream.", float64(r.BytesOut))
	m.Gauge("demanded_pages", "Pages that the guest asked for.", float64(r.Demands))
	m.Gauge("waited_pages", "Pages that the guest had to wait for.", float64(r.Waited))
	for _, q := range []struct {
		percentile string
		d          time.Duration
	}{{"50", r.WaitP50}, {"99", r.WaitP99}, {"100", r.WaitMax}} {
		m.Gauge("wait_seconds", "From a request for a page until it was written.", q.d.Seconds(), "percentile", q.percentile)
	}
	m.Gauge("loaded_seconds", "Until the guest could run.", r.Loaded.Seconds())
	m.Gauge("resident_seconds", "Until all of its memory had been sent.", r.Resident.Seconds())
}

// metricsBeside is the file for metrics of another process, or of one VM of several, beside
// that of a verb's; empty if that is.
func metricsBeside(path, whose string) string {
	if path == "" {
		return ""
	}
	if stem, ok := strings.CutSuffix(path, ".prom"); ok {
		return stem + "-" + whose + ".prom"
	}
	return path + "-" + whose
}

// measureHere begins the metrics of a restore whose memory this process serves itself, as it
// does for a domain of libvirt's: none if another process does.
func (r *resumeCmd) measureHere(vm string) *serverMetrics {
	if r.measures == "" || r.monitor.Domain == "" {
		return &serverMetrics{}
	}
	return &serverMetrics{set: metrics.New(r.measures, "restore", vm)}
}

// ended writes what such a restore has come to; doc is nil if it has not begun.
func (r *resumeCmd) ended(m *serverMetrics, doc *restoreReport, code int) {
	if m.set == nil {
		return
	}
	m.restored(doc)
	if err := m.set.Ended(code); err != nil {
		r.log().Warn("the metrics were not written", "cause", oneLine(err))
	}
}

// armedEvery is the time between two beats of an armed process: it may wait for days.
const armedEvery = 15 * time.Second

// measureArmed writes, until the release is called, that a VM is armed. args are those of
// startArmed.
func measureArmed(ctx context.Context, args []string) (release func(exitCode int)) {
	if len(args) != 3 {
		return func(int) {}
	}
	m := metrics.New(args[1], "armed", args[2])
	beat := func(running float64) {
		m.Gauge("running", "1 while the process runs.", running)
		m.Gauge("beat_timestamp_seconds", "When a process that runs last wrote this.", float64(time.Now().UnixMilli())/1000)
		m.Gauge("pid", "The process.", float64(os.Getpid()))
	}
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		tick := time.NewTicker(armedEvery)
		defer tick.Stop()
		for {
			err := rescue.Call(func() error {
				beat(1)
				return m.Write()
			})
			if err != nil {
				fmt.Fprintf(os.Stderr, "flic-migrate: the metrics were not written: %v\n", err)
				return
			}
			select {
			case <-tick.C:
			case <-ctx.Done():
				return
			}
		}
	}()
	return func(code int) {
		cancel()
		<-done
		beat(0)
		_ = m.Ended(code) // the first write has said why not
	}
}
