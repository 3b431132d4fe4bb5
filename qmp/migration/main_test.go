package migration

import (
	"testing"

	"go.uber.org/goleak"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/qmptest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// dial connects and closes at the end of the test.
func dial(t *testing.T, f *qmptest.QEMU, options qmp.Options) *qmp.Monitor {
	t.Helper()
	m, err := qmp.Dial(t.Context(), f.Addr, options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}
