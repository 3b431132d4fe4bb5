package migration

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/qmptest"
)

func TestDirtyRate(t *testing.T) {
	r := &recorder{answers: map[string][]string{"query-dirty-rate": {
		`{"status": "measuring", "start-time": 5, "calc-time": 2}`,
		`{"status": "measured", "start-time": 5, "calc-time": 2, "mode": "page-sampling", "dirty-rate": 7}`}}}
	got, err := DirtyRate(t.Context(), r, 1600*time.Millisecond)
	if err != nil || got != 7<<20 {
		t.Errorf("%v, %v", got, err)
	}
	// The mode that ends a QEMU without KVM is not asked for, nor is any.
	want := []string{`calc-dirty-rate{"calc-time":2}`, "query-dirty-rate", "query-dirty-rate"}
	if !slices.Equal(r.sent, want) {
		t.Errorf("sent %q", r.sent)
	}
	for _, span := range []time.Duration{0, time.Millisecond, time.Second} {
		r := &recorder{answers: map[string][]string{"query-dirty-rate": {`{"status": "measured", "dirty-rate": 1}`}}}
		if _, err := DirtyRate(t.Context(), r, span); err != nil || r.sent[0] != `calc-dirty-rate{"calc-time":1}` {
			t.Errorf("%v: %q, %v", span, r.sent, err)
		}
	}
}

func TestDirtyRateUnknown(t *testing.T) {
	for name, answer := range map[string]string{
		"nothing noticed": `{"status": "measured", "mode": "page-sampling", "dirty-rate": 0}`,
		"no rate":         `{"status": "measured", "mode": "page-sampling"}`,
		"another mode":    `{"status": "measured", "mode": "dirty-ring", "dirty-rate": 9}`,
	} {
		r := &recorder{answers: map[string][]string{"query-dirty-rate": {answer}}}
		if got, err := DirtyRate(t.Context(), r, 0); !errors.Is(err, ErrNoDirtyRate) || got != 0 {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
	// A QEMU before 5.2, or one that measures already.
	f := qmptest.New(t, qmptest.Negotiated(func(c *qmptest.Conn, cmd qmptest.Command) {
		c.Refuse(cmd, "CommandNotFound", "The command calc-dirty-rate has not been found")
	}))
	if _, err := DirtyRate(t.Context(), dial(t, f, qmp.Options{}), 0); !errors.Is(err, ErrNoDirtyRate) {
		t.Error(err)
	} else {
		qmptest.Mention(t, err, "CommandNotFound")
	}
	// What says nothing of the guest is no ErrNoDirtyRate.
	for _, command := range []string{"calc-dirty-rate", "query-dirty-rate"} {
		r := &recorder{answers: map[string][]string{command: {"lost"}}}
		if _, err := DirtyRate(t.Context(), r, 0); !errors.Is(err, qmp.ErrLost) || errors.Is(err, ErrNoDirtyRate) {
			t.Errorf("%s: %v", command, err)
		}
	}
	// Who ends it is to read that, and not that QEMU took too long.
	stopped := errors.New("stopped by signal")
	ctx, cancel := context.WithCancelCause(t.Context())
	r := &recorder{answers: map[string][]string{"query-dirty-rate": {`{"status": "measuring"}`}}, onSend: func(string) { cancel(stopped) }}
	if _, err := DirtyRate(ctx, r, 0); !errors.Is(err, stopped) && !errors.Is(err, context.Canceled) || errors.Is(err, ErrNoDirtyRate) {
		t.Errorf("cancelled: %v", err)
	}
}
