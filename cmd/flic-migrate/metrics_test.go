package main

import (
	"bytes"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

// An armed process says that it runs, in a file beside checkpoint's, and at its end that it
// has ended.
func TestArmedMetrics(t *testing.T) {
	for path, want := range map[string]string{"": "", "/m/vm.prom": "/m/vm-armed.prom", "/m/vm": "/m/vm-armed"} {
		if got := metricsBeside(path, "armed"); got != want {
			t.Errorf("%q: %q, want %q", path, got, want)
		}
	}
	path := filepath.Join(t.TempDir(), "vm-armed.prom")
	has := func(line string) bool {
		b, err := os.ReadFile(path)
		return err == nil && strings.Contains(string(b), line+"\n")
	}
	release := measureArmed(t.Context(), []string{armedName, path, "vm"})
	for end := time.Now().Add(20 * time.Second); !has(`flic_migrate_running{verb="armed",vm="vm"} 1`) && time.Now().Before(end); {
		time.Sleep(5 * time.Millisecond)
	}
	if !has(`flic_migrate_running{verb="armed",vm="vm"} 1`) {
		t.Error("it does not say that it runs")
	}
	release(1)
	if !has(`flic_migrate_running{verb="armed",vm="vm"} 0`) || !has(`flic_migrate_exit_code{verb="armed",vm="vm"} 1`) {
		t.Error("it does not say that it has ended")
	}
	measureArmed(t.Context(), []string{armedName})(0) // without a file it does nothing
}

// lintMetrics parses a file as Prometheus does, and fails on what promtool would say of it. It
// returns the values by name and labels, as in a file.
func lintMetrics(t *testing.T, path string) map[string]float64 {
	t.Helper()
	b, err := os.ReadFile(path)
	ok(t, err)
	problems, err := promlint.New(bytes.NewReader(b)).Lint()
	if err != nil || len(problems) > 0 {
		t.Errorf("%s: %+v, %v", path, problems, err)
	}
	p := expfmt.NewTextParser(model.UTF8Validation)
	families, err := p.TextToMetricFamilies(bytes.NewReader(b))
	ok(t, err)
	values := make(map[string]float64)
	for name, f := range families {
		if f.GetHelp() == "" || f.GetType().String() != "GAUGE" {
			t.Errorf("%s: %s has the type %v and the help %q", path, name, f.GetType(), f.GetHelp())
		}
		for _, m := range f.GetMetric() {
			var labels []string
			for _, l := range m.GetLabel() {
				labels = append(labels, l.GetName()+"="+l.GetValue())
			}
			values[name+" "+strings.Join(labels, " ")] = m.GetGauge().GetValue()
		}
	}
	return values
}

// TestMetricsFiles has each verb that writes metrics write them, as far as it needs no QEMU,
// and reads them as Prometheus does.
func TestMetricsFiles(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	stream, err := exec.Command("mkstream").Output()
	ok(t, err)
	for _, c := range []struct {
		verb string
		args []string
		code int
		has  map[string]float64 // with labels; -1: any but 0
	}{
		{"save", []string{"--vm", "a", "--parent", "none"}, 0, map[string]float64{
			"exit_code verb=save vm=a": 0, "pages kind=all verb=save vm=a": -1, "written_bytes tier=flash verb=save vm=a": -1, "save_phase_seconds phase=commit verb=save vm=a": -1}},
		{"save", []string{"--vm", "a", "--parent", "a@9"}, 3, map[string]float64{"exit_code verb=save vm=a": 3, "last_success_timestamp_seconds verb=save vm=a": -1}},
		{"verify", []string{"a"}, 0, map[string]float64{"checkpoints result=ok verb=verify vm=a": 1, "checkpoints result=damaged verb=verify vm=a": 0}},
		{"restore", []string{"--quiet", "a"}, 0, map[string]float64{"running verb=restore vm=a": 0, "pages_sent verb=restore vm=a": -1, "sent_bytes verb=restore vm=a": -1}},
		{"restore", []string{"--quiet", "a@7"}, 3, map[string]float64{"running verb=restore vm=a": 0, "exit_code verb=restore vm=a": 3}},
		{"prune", []string{"--keep-last", "1"}, 0, map[string]float64{"checkpoints result=kept verb=prune vm=": 1, "freed_bytes tier=flash verb=prune vm=": 0}},
		{"checkpoint", []string{"--qmp", path("nosuch"), "a"}, 3, map[string]float64{"exit_code verb=checkpoint vm=a": 3}},
		{"resume", []string{"--domain", "a", "--connect", "unix:" + path("nosuch"), "a"}, -1, map[string]float64{"running verb=restore vm=a": 0, "exit_code verb=restore vm=a": -1}},
	} {
		file := path(c.verb + ".prom")
		cmd := exec.Command("flic-migrate", append([]string{c.verb, "--store", path("store"), "--metrics", file}, c.args...)...)
		cmd.Env, cmd.Stdin = append(os.Environ(), "FLIC_CONFIG=/dev/null"), bytes.NewReader(stream)
		var stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = io.Discard, &stderr
		if _ = cmd.Run(); cmd.ProcessState.ExitCode() != c.code && c.code >= 0 || strings.Contains(stderr.String(), "metrics were not written") {
			t.Errorf("%s %q: exit code %d: %s", c.verb, c.args, cmd.ProcessState.ExitCode(), stderr.String())
		}
		got := lintMetrics(t, file)
		for name, want := range c.has {
			value, is := got["flic_migrate_"+name]
			if !is || value != want && want >= 0 || value == 0 && want < 0 {
				t.Errorf("%s %q: %s is %v, %v, want %v: %v", c.verb, c.args, name, value, is, want, stderr.String())
			}
		}
	}
	armed := path("a-armed.prom")
	measureArmed(t.Context(), []string{armedName, armed, "a"})(0)
	if got := lintMetrics(t, armed); got["flic_migrate_pid verb=armed vm=a"] != float64(os.Getpid()) {
		t.Errorf("%v", got)
	}
}
