package save

import (
	"strings"
	"testing"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
)

// TestTakesAck: the types of QEMU 8.1 to 11.0.
func TestTakesAck(t *testing.T) {
	for machine, want := range map[string]bool{
		"pc-q35-8.1": true, "pc-i440fx-9.0": true, "virt-10.2": true, "pc-q35-11.0": true, "s390-ccw-virtio-8.1": true,
		"pc-q35-8.0": false, "pc-q35-7.2": false, "virt-2.12": false,
		"pc-q35-11.1": false, "virt-12.0": false, "microvm": false, "none": false, "": false, "pc-q35-rhel9.6.0": false, "pc-q35-99999999999999999999.1": false, "pc-q35-8.1x": false,
	} {
		if takesAck(machine) != want {
			t.Errorf("%q: %v", machine, !want)
		}
	}
}

// TestUnacknowledged: it is said once, after a while, and only of a source that can be
// waiting.
func TestUnacknowledged(t *testing.T) {
	for _, test := range []struct {
		opened, acknowledged bool
		unseen               uint64
		want                 int
	}{{true, false, 0, 1}, {false, false, 0, 0}, {true, true, 0, 0}, {true, false, 1, 0}} {
		var said []string
		p := &parser{ans: &answers{opened: test.opened}, place: new(placer), unseen: test.unseen, acknowledges: test.acknowledged,
			meta: &checkpoint.Meta{Identity: checkpoint.Identity{Machine: "microvm"}}, warn: func(msg string, _ ...any) { said = append(said, msg) }}
		p.unacknowledged()
		p.unacknowledged()
		if said != nil {
			t.Errorf("%+v: said at once", test)
		}
		p.allSeen = p.allSeen.Add(-2 * ackTime)
		p.unacknowledged()
		p.unacknowledged()
		if len(said) != test.want || test.want > 0 && !strings.Contains(said[0], "switchover-ack") {
			t.Errorf("%+v: said %q", test, said)
		}
	}
}
