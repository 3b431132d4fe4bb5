package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// An armed process says that it runs, in a file beside checkpoint's, and at its end that it
// has ended.
func TestArmedMetrics(t *testing.T) {
	for path, want := range map[string]string{"": "", "/m/vm.prom": "/m/vm-armed.prom", "/m/vm": "/m/vm-armed"} {
		if got := armedMetrics(path); got != want {
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
