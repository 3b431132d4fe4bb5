package migration

import (
	"context"
	"errors"
	"os"
	"testing"
	"time"
)

// A server's first bytes are waited for, and neither for ever nor against one's will.
func TestBegun(t *testing.T) {
	defer func(was time.Duration) { beginTime = was }(beginTime)
	beginTime = 50 * time.Millisecond
	stopped := errors.New("stopped by signal")
	ended, end := context.WithCancelCause(t.Context())
	end(stopped)
	for name, test := range map[string]struct {
		ctx    context.Context
		writes string
		closes bool
		want   error
	}{
		"a stream":     {t.Context(), "QEVM", false, nil},
		"nothing":      {t.Context(), "", false, ErrServer},
		"too little":   {t.Context(), "QE", false, ErrServer},
		"another line": {t.Context(), "flic-migrate: restore failed\n", false, ErrServer},
		"its end":      {t.Context(), "", true, ErrServer},
		"a signal":     {ended, "", false, stopped},
	} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		_, _ = w.WriteString(test.writes)
		if test.closes {
			w.Close()
		}
		if err := begun(test.ctx, r); !errors.Is(err, test.want) {
			t.Errorf("%s: %v, want %v", name, err, test.want)
		}
		r.Close()
		w.Close()
	}
}
