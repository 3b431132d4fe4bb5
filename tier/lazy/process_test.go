package lazy_test

import (
	"runtime/debug"
	"runtime/metrics"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/lazy"
)

// TestTuneProcess: of two restores in one process each has its memory, and the collector
// is back when both have begun.
func TestTuneProcess(t *testing.T) {
	setting := func(name string) uint64 {
		s := []metrics.Sample{{Name: name}}
		metrics.Read(s)
		return s[0].Value.Uint64()
	}
	const percent, limit = "/gc/gogc:percent", "/gc/gomemlimit:bytes"
	defer debug.SetMemoryLimit(debug.SetMemoryLimit(-1))
	before := setting(percent)

	const gib = 1 << 30
	c := &checkpoint.Checkpoint{Meta: &checkpoint.Meta{
		Identity: checkpoint.Identity{PageSize: 4096},
		Bulk:     checkpoint.Bulk{Blocks: []ramparse.Block{{Name: "pc.ram", Used: gib}}},
	}}
	lazy.TuneProcess(c)
	one := setting(limit)
	if one < gib/4096*32 || one > gib {
		t.Errorf("one restore may have %d bytes", one)
	}
	time.Sleep(10 * time.Millisecond)
	lazy.TuneProcess(c)
	if two := setting(limit); two < 2*one {
		t.Errorf("two restores may have %d bytes, one %d", two, one)
	}
	if setting(percent) == before {
		t.Error("the collector runs while the guests begin")
	}
	for end := time.Now().Add(20 * time.Second); setting(percent) != before; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("the collector stays at %d %%, of %d before", int64(setting(percent)), before)
		}
	}
}
