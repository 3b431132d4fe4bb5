package dedup

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Energy is the policy for the size of a chunk (FLIC §III-D): hashing 8 KiB at
// a time halves the hashing work and finds fewer duplicates, which is the
// right trade on a battery that is running out.
type Energy string

// The policies.
const (
	EnergyAuto Energy = "auto" // by the battery's state
	EnergyFull Energy = "full" // one page a chunk
	EnergyLow  Energy = "low"  // two pages a chunk
)

// DefaultBatteryThreshold is the charge in percent below which EnergyAuto
// saves energy.
const DefaultBatteryThreshold = 30

// PowerSupplyDir is where Linux describes batteries
// (Documentation/ABI/testing/sysfs-class-power).
const PowerSupplyDir = "/sys/class/power_supply"

// ChunkPages is the number of pages a chunk has under policy e. For EnergyAuto
// it reads the batteries below dir (PowerSupplyDir): two pages if the machine
// runs on batteries and the fullest of them is below threshold percent. A
// machine without a battery, or on mains, has no need to save.
func (e Energy) ChunkPages(dir string, threshold int) int {
	switch e {
	case EnergyLow:
		return 2
	case EnergyAuto:
		if charge, discharging := battery(dir); discharging && charge < threshold {
			return 2
		}
	}
	return 1
}

// battery returns the charge in percent of the fullest battery that powers the
// machine, and whether one does.
func battery(dir string) (charge int, discharging bool) {
	supplies, _ := filepath.Glob(filepath.Join(dir, "*"))
	for _, s := range supplies {
		// scope "Device" is a mouse's or a headset's battery.
		if attr(s, "type") != "Battery" || attr(s, "scope") == "Device" || attr(s, "status") != "Discharging" {
			continue
		}
		c, err := strconv.Atoi(attr(s, "capacity"))
		if err != nil {
			continue
		}
		discharging = true
		charge = max(charge, c)
	}
	return charge, discharging
}

func attr(supply, name string) string {
	b, _ := os.ReadFile(filepath.Join(supply, name))
	return strings.TrimSpace(string(b))
}
