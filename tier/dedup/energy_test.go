package dedup

import (
	"os"
	"path/filepath"
	"testing"
)

// supply is a power supply as the kernel shows it: attributes by name.
type supply map[string]string

func sysfs(t *testing.T, supplies map[string]supply) string {
	t.Helper()
	dir := t.TempDir()
	for name, attrs := range supplies {
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
		for attr, value := range attrs {
			if err := os.WriteFile(filepath.Join(dir, name, attr), []byte(value+"\n"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	return dir
}

// TestChunkPages reads batteries in every state.
func TestChunkPages(t *testing.T) {
	battery := func(capacity, status string) supply {
		return supply{"type": "Battery", "capacity": capacity, "status": status}
	}
	mouse := battery("3", "Discharging")
	mouse["scope"] = "Device"
	for name, c := range map[string]struct {
		supplies map[string]supply
		want     int
	}{
		"none":                {nil, 1},
		"mains":               {map[string]supply{"AC": {"type": "Mains", "online": "1"}}, 1},
		"low":                 {map[string]supply{"BAT0": battery("29", "Discharging")}, 2},
		"at the threshold":    {map[string]supply{"BAT0": battery("30", "Discharging")}, 1},
		"full":                {map[string]supply{"BAT0": battery("100", "Discharging")}, 1},
		"low and charging":    {map[string]supply{"BAT0": battery("5", "Charging")}, 1},
		"empty":               {map[string]supply{"BAT0": battery("0", "Discharging")}, 2},
		"one of two is low":   {map[string]supply{"BAT0": battery("5", "Discharging"), "BAT1": battery("80", "Discharging")}, 1},
		"both are low":        {map[string]supply{"BAT0": battery("5", "Discharging"), "BAT1": battery("20", "Discharging")}, 2},
		"one is full already": {map[string]supply{"BAT0": battery("5", "Discharging"), "BAT1": battery("99", "Full")}, 2},
		"a mouse's":           {map[string]supply{"hid-1": mouse}, 1},
		"of unknown charge":   {map[string]supply{"BAT0": {"type": "Battery", "status": "Discharging"}}, 1},
		"of charge nonsense":  {map[string]supply{"BAT0": battery("plenty", "Discharging")}, 1},
		"of a UPS":            {map[string]supply{"UPS": {"type": "UPS", "capacity": "5", "status": "Discharging"}}, 1},
	} {
		dir := sysfs(t, c.supplies)
		if got := EnergyAuto.ChunkPages(dir, DefaultBatteryThreshold); got != c.want {
			t.Errorf("%s: %d pages a chunk", name, got)
		}
		if EnergyFull.ChunkPages(dir, 100) != 1 || EnergyLow.ChunkPages(dir, 0) != 2 {
			t.Errorf("%s: full and low depend on the battery", name)
		}
	}
	if EnergyAuto.ChunkPages("/nonexistent", 100) != 1 {
		t.Error("a machine without sysfs saves energy")
	}
}
