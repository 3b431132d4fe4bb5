package session

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp/disks"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// TestOpenFrozen: what was frozen has an index when it is opened, a disk that the guest only
// reads gets none, and one that takes too long costs a warning: the guest stands still.
func TestOpenFrozen(t *testing.T) {
	st, err := store.Open(t.Context(), vfs.OS, filepath.Join(t.TempDir(), "store"), true)
	ok(t, err)
	dir := t.TempDir()
	raw := func(name string) disks.Layer {
		b := make([]byte, 1<<20)
		rand.NewChaCha8([32]byte{byte(len(name))}).Read(b)
		ok(t, os.WriteFile(filepath.Join(dir, name), b, 0o600))
		return disks.Layer{Path: filepath.Join(dir, name), Format: "raw"}
	}
	found := []disks.Disk{
		{Name: "/m/a", Layers: []disks.Layer{raw("a")}},
		{Name: "/m/cd", ReadOnly: true, Layers: []disks.Layer{raw("cd")}},
	}
	var log bytes.Buffer
	o := &CheckpointOptions{Log: slog.New(slog.NewTextHandler(&log, nil))}

	normal := freezeTime
	freezeTime = time.Nanosecond
	opened, err := o.openFrozen(t.Context(), st, found)
	freezeTime = normal
	if err != nil || len(opened.Disks) != 0 || !strings.Contains(log.String(), "in the time that the guest may stand still") {
		t.Errorf("%+v, %v: %s", opened.Disks, err, log.String())
	}
	opened.Close()

	log.Reset()
	opened, err = o.openFrozen(t.Context(), st, found)
	if err != nil || len(opened.Disks) != 1 || opened.Disks[0].Path != found[0].Layers[0].Path || log.Len() > 0 {
		t.Errorf("%+v, %v: %s", opened.Disks, err, log.String())
	}
	if len(o.Save.Disks) != 1 || len(o.Save.UnusedDisks) != 1 || o.Save.UnusedDisks[0].Path != found[1].Layers[0].Path {
		t.Errorf("the save looks in %+v, and not in %+v", o.Save.Disks, o.Save.UnusedDisks)
	}
	opened.Close()

	stop := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(stop)
	found[0].Layers[0] = raw("other")
	opened, err = o.openFrozen(ctx, st, found)
	if !errors.Is(err, stop) || len(opened.Disks) != 0 {
		t.Errorf("%+v, %v", opened.Disks, err)
	}
	opened.Close()
}
