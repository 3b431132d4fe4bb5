package main

import (
	"strings"
	"testing"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
)

// Saves of guests that run meanwhile. QEMU sends changed pages again, as they are
// or as the difference to what it sent before, and the last version must win.
// RAM is compared with the source's, which has stopped when the save completes.
func TestLiveSaves(t *testing.T) {
	for _, test := range []struct {
		machine
		capability string
		bandwidth  int
		perTick    int
	}{
		{q35, "", 8 << 20, 100},
		{pc, "", 8 << 20, 60},
		{virt, "", 8 << 20, 80},
		// Only a page's third version is sent as a difference.
		{q35, "xbzrle", 4 << 20, 200},
		{virt, "xbzrle", 4 << 20, 200},
	} {
		t.Run(strings.TrimSpace(test.name+" "+test.capability), func(t *testing.T) {
			t.Parallel()
			ctx, l := limit(t), newLab(t)
			c := test.tiny(t, qemutest.LiveMemory, varied(768), test.perTick)
			source := qemutest.Start(t, c)
			source.WaitFor(t, `tick 00000003\r`)
			// Slow enough that the guest changes pages meanwhile, and not
			// content until nearly none is left.
			p := map[string]any{"max-bandwidth": test.bandwidth, "downtime-limit": 2}
			if test.capability == "" {
				set(t, source, p)
			} else {
				p["xbzrle-cache-size"] = 64 << 20
				set(t, source, p, test.capability)
			}
			flags := l.hot(t, source)
			saved(t, ctx, source, l.save(flags...))
			tick := lastTick(t, source.Console(), 16)
			before := ram(t, ctx, source)
			if test.capability == "xbzrle" {
				var stats struct {
					Cache struct {
						Pages int `json:"pages"`
					} `json:"xbzrle-cache"`
				}
				ok(t, source.QMP.Execute(ctx, "query-migrate", nil, &stats))
				if stats.Cache.Pages < 10 {
					t.Errorf("QEMU has sent %d pages as differences", stats.Cache.Pages)
				}
			}
			if m := l.show(t, "vm@1"); m.Report.Resent < 30 || m.OpaqueBytes > 0 {
				t.Errorf("%d pages were sent again; %d bytes are not understood", m.Report.Resent, m.OpaqueBytes)
			}
			source.Kill()
			vm := restored(t, ctx, c, l.restore("vm"), before)
			goesOn(t, ctx, vm, tick, 16)
			l.holds(t, "vm@1")
		})
	}
}

// A Linux guest that runs: saved as it was at one moment with background-snapshot,
// which lets it go on, and then as it is at the end of a live save.
func TestRunningLinux(t *testing.T) {
	t.Parallel()
	ctx, l := limit(t), newLab(t)
	c := q35.linux(qemutest.LiveMemory, "flic.fill=24 flic.dirty=30")
	source := qemutest.Start(t, c)
	source.WaitFor(t, `flic ready`)
	source.WaitFor(t, `tick 3\r`)

	// Its moment is the one at which the save begins.
	before := stop(t, ctx, source)
	tick := lastTick(t, source.Console(), 10)
	set(t, source, map[string]any{"max-bandwidth": 16 << 20}, "background-snapshot")
	ok(t, migration.Start(ctx, source.QMP, l.save()))
	// QEMU 7.2 lets the guest run by itself, later ones as it was.
	if _, err := migration.Wait(ctx, source.QMP, migration.StatusActive); err != nil {
		t.Fatal(err)
	}
	ok(t, qmp.Cont(ctx, source.QMP))
	if _, err := migration.Wait(ctx, source.QMP); err != nil {
		t.Fatalf("%v\n%s", err, source.Output())
	}
	if now := lastTick(t, source.Console(), 10); now < tick+3 {
		t.Errorf("the guest counted from %d to %d during the save, so that shows little", tick, now)
	}
	runsOn(t, source)
	checks(t, source)
	vm := restored(t, ctx, c, l.restore("vm@1"), before)
	goesOn(t, ctx, vm, tick, 10)
	checks(t, vm)
	vm.Kill()

	ok(t, migration.SetCapabilities(ctx, source.QMP, map[string]bool{"background-snapshot": false}))
	set(t, source, map[string]any{"max-bandwidth": 64 << 20, "downtime-limit": 20})
	saved(t, ctx, source, l.save(l.hot(t, source)...))
	tick = lastTick(t, source.Console(), 10)
	before = ram(t, ctx, source)
	source.Kill()
	vm = restored(t, ctx, c, l.restore("vm@2"), before)
	goesOn(t, ctx, vm, tick, 10)
	checks(t, vm)
	l.holds(t, "vm@1", "vm@2")
	if again := l.show(t, "vm@2").Report.Resent; again < 30 {
		t.Errorf("%d pages were sent again", again)
	}
}
