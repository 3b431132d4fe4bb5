// Package metrics writes what a run has come to into a file of Prometheus's text format,
// as node_exporter's textfile collector reads it: a program that runs now and then has no
// port to be asked at.
//
// A file is of one verb and one VM, and is written whole each time. Anybody may read it:
// node_exporter is another user, and there is nothing secret in it.
package metrics

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// prefix is before the names of all metrics.
const prefix = "flic_migrate_"

// lastSuccess is kept from run to run, so that it can be told for how long runs have failed.
const lastSuccess = prefix + "last_success_timestamp_seconds"

// maxFile caps what is read of an earlier run's file.
const maxFile = 1 << 20

// Set is the metrics of a run.
type Set struct {
	path   string
	verb   string
	vm     string // empty: of no one VM
	begin  time.Time
	reg    *prometheus.Registry
	gauges map[string]*prometheus.GaugeVec
}

// New begins those of a run, which go to the file path.
func New(path, verb, vm string) *Set {
	return &Set{path: path, verb: verb, vm: vm, begin: time.Now(), reg: prometheus.NewRegistry(), gauges: make(map[string]*prometheus.GaugeVec)}
}

// Gauge sets a metric; labels are names and values by turns, and the names the same each
// time that a metric is set.
func (s *Set) Gauge(name, help string, value float64, labels ...string) {
	names := []string{"verb", "vm"}
	values := prometheus.Labels{"verb": s.verb, "vm": s.vm}
	for i := 0; i+1 < len(labels); i += 2 {
		names = append(names, labels[i])
		values[labels[i]] = labels[i+1]
	}
	g := s.gauges[name]
	if g == nil {
		g = prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: prefix + name, Help: help}, names)
		s.reg.MustRegister(g)
		s.gauges[name] = g
	}
	g.With(values).Set(value)
}

// Ended sets what each run has, and writes the file.
func (s *Set) Ended(exitCode int) error {
	now := time.Now()
	s.Gauge("exit_code", "Exit code of the last run.", float64(exitCode))
	s.Gauge("timestamp_seconds", "When the last run ended.", seconds(now))
	s.Gauge("duration_seconds", "How long the last run took.", now.Sub(s.begin).Seconds())
	at := s.lastSuccess()
	if exitCode == 0 {
		at = seconds(now)
	}
	if at > 0 {
		s.Gauge(strings.TrimPrefix(lastSuccess, prefix), "When a run last succeeded.", at)
	}
	return s.Write()
}

func seconds(t time.Time) float64 { return float64(t.UnixMilli()) / 1000 }

// lastSuccess is what the file says of an earlier run of the same verb and VM; 0 if it says
// nothing.
func (s *Set) lastSuccess() float64 {
	b, err := vfs.ReadFile(vfs.OS, s.path, maxFile)
	if err != nil {
		return 0
	}
	p := expfmt.NewTextParser(model.UTF8Validation)
	families, err := p.TextToMetricFamilies(bytes.NewReader(b))
	if err != nil {
		return 0
	}
	for _, m := range families[lastSuccess].GetMetric() {
		of := make(map[string]string)
		for _, l := range m.GetLabel() {
			of[l.GetName()] = l.GetValue()
		}
		if of["verb"] == s.verb && of["vm"] == s.vm {
			return m.GetGauge().GetValue()
		}
	}
	return 0
}

// Write writes what has been set, whole or not at all, and only if path is a regular file
// or nothing. It is not synced: the next run writes it anew.
func (s *Set) Write() error {
	families, err := s.reg.Gather()
	if err != nil {
		return err
	}
	var b bytes.Buffer
	for _, f := range families {
		if _, err := expfmt.MetricFamilyToText(&b, f); err != nil {
			return err
		}
	}
	// It has a name from the beginning, by which it is made readable for all.
	tmp := filepath.Join(filepath.Dir(s.path), ".flic-"+uuid.NewString())
	return vfs.WriteFile(vfs.OS, s.path, vfs.Writing{Temporary: tmp, NoSync: true}, func(f vfs.File) error {
		if _, err := f.Write(b.Bytes()); err != nil {
			return err
		}
		return os.Chmod(tmp, 0o644)
	})
}
