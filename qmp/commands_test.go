package qmp

import (
	"context"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp/qmptest"
)

// A QEMU that is gone before its answer is out has done what it was told; one that
// does not answer has not.
func TestQuit(t *testing.T) {
	gone := qmptest.New(t, qmptest.Negotiated(func(c *qmptest.Conn, cmd qmptest.Command) { c.Close() }))
	if err := Quit(t.Context(), dial(t, gone, Options{})); err != nil {
		t.Errorf("a QEMU that is gone: %v", err)
	}
	silent := qmptest.New(t, qmptest.Negotiated(func(*qmptest.Conn, qmptest.Command) {}))
	if err := Quit(t.Context(), dial(t, silent, Options{Timeout: 20 * time.Millisecond})); err == nil {
		t.Error("no error from a QEMU that does not answer")
	}
}

// Right after "completed" QEMU may not let the guest run yet; another refusal is
// one, and so is this one when the time is up.
func TestContAfterMigration(t *testing.T) {
	refusals := 3
	f := qmptest.New(t, qmptest.Negotiated(func(c *qmptest.Conn, cmd qmptest.Command) {
		switch {
		case refusals > 0:
			refusals--
			c.Refuse(cmd, "GenericError", "Migration is not finalized yet")
		case refusals == 0:
			refusals--
			c.Reply(cmd, `{}`)
		case refusals == -1:
			refusals--
			c.Refuse(cmd, "GenericError", "Resetting the Virtual Machine is required")
		default:
			c.Refuse(cmd, "GenericError", "Migration is not finalized yet")
		}
	}))
	m := dial(t, f, Options{})
	if err := Cont(t.Context(), m); err != nil || refusals != -1 {
		t.Errorf("%v, after %d refusals", err, 3-refusals)
	}
	qmptest.Mention(t, Cont(t.Context(), m), "Resetting")
	if refusals != -2 {
		t.Error("a final refusal was asked for again")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	qmptest.Mention(t, Cont(ctx, m), "cont")
}
