package session

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/disks"
	"github.com/flic-migrate/flic-migrate/tier/save"
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

// noJobs is a QEMU without block jobs.
type noJobs struct{ qmp.Executor }

func (noJobs) Execute(_ context.Context, command string, _, result any) error {
	if command != "query-block-jobs" {
		return errors.New(command)
	}
	return nil
}

// TestKeep: copies are of the disks that the guest can write to, each with its UUID; what
// takes longer than a guest may stand still, or can't be looked at, fails, and leaves nothing.
func TestKeep(t *testing.T) {
	dir := t.TempDir()
	st, err := store.Open(t.Context(), vfs.OS, filepath.Join(dir, "store"), true)
	ok(t, err)
	file := filepath.Join(dir, "disk")
	b := make([]byte, 1<<20)
	rand.NewChaCha8([32]byte{1}).Read(b)
	ok(t, os.WriteFile(file, b, 0o600))
	found := []disks.Disk{
		{Name: "/m/a", Layers: []disks.Layer{{Path: file, Format: "raw"}}},
		{Name: "/m/cd", ReadOnly: true, Layers: []disks.Layer{{Format: "raw"}}},
	}
	var log bytes.Buffer
	o := &CheckpointOptions{Keep: KeepCopy, Freeze: true, Log: slog.New(slog.NewTextHandler(&log, nil))}
	left := func() int {
		list, err := os.ReadDir(filepath.Join(dir, "store", "frozen"))
		ok(t, err)
		return len(list)
	}
	ok(t, o.canKeep(t.Context(), st, noJobs{}, found))
	if n := left(); n != 0 {
		t.Errorf("trying has left %d files", n)
	}
	var rep CheckpointReport
	k, err := o.keep(t.Context(), st, noJobs{}, found, &rep)
	if err != nil || len(k.copies) != 1 || k.names()["/m/a"] != k.copies[0].UUID || len(rep.Kept) != 1 || rep.Kept[0].Image != file || rep.KeptTime <= 0 || left() != 1 {
		t.Fatalf("%+v, %+v, %v", k, rep.Kept, err)
	}
	opened, err := o.openKept(t.Context(), t.Context(), st, found, k)
	if err != nil || len(opened.Disks) != 1 || opened.Disks[0].Path != file || opened.Disks[0].Kept != k.copies[0].UUID || log.Len() > 0 {
		t.Errorf("%+v, %v: %s", opened.Disks, err, log.String())
	}
	opened.Close()
	k.release(t.Context(), false, o)
	catalog, err := st.Disks()
	ok(t, err)
	if list, err := catalog.List(t.Context()); err != nil || len(list) != 0 || left() != 0 || log.Len() > 0 {
		t.Errorf("left: %d copies, %+v; %v: %s", left(), list, err, log.String())
	}

	why := errors.New("it takes too long")
	ctx, cancel := context.WithTimeoutCause(t.Context(), 0, why)
	defer cancel()
	k, err = o.keep(ctx, st, noJobs{}, found, &rep)
	if err == nil {
		t.Error("it is kept")
	}
	k.release(t.Context(), false, o)
	found[1].ReadOnly = false
	if err := o.canKeep(t.Context(), st, noJobs{}, found); err == nil || !strings.Contains(err.Error(), "/m/cd") {
		t.Errorf("a disk that is no file: %v", err)
	}
	if k, err = o.keep(t.Context(), st, noJobs{}, found, &rep); err == nil {
		t.Error("a disk that is no file is kept")
	}
	k.release(t.Context(), false, o)
	if n := left(); n != 0 {
		t.Errorf("%d copies are left", n)
	}
}

// TestSnapshotIsLate: a QEMU that takes snapshots after nobody waits for it any more has
// taken them, as is said, whoever else has given up meanwhile.
func TestSnapshotIsLate(t *testing.T) {
	file := filepath.Join(t.TempDir(), "a")
	ok(t, os.WriteFile(file, make([]byte, 4096), 0o600))
	found := []disks.Disk{{Name: "/m/a", Device: "d", Layers: []disks.Layer{{Path: file, Format: "raw"}}}}
	late, refused, stopped := &qmp.OpError{Op: "transaction", Err: context.DeadlineExceeded}, &qmp.Error{Command: "transaction", Desc: "no"}, errors.New("interrupted")
	had := fmt.Sprintf(`[{"qdev":"/m/a","inserted":{"image":{"filename":%q,"format":"raw"}}}]`, file)
	for name, c := range map[string]struct {
		err     error
		disks   string // %s: the overlay
		stopped bool
		want    error // nil: the checkpoint goes on
		taken   bool
		says    string
	}{
		"taken late":             {err: late, disks: `[{"qdev":"/m/a","inserted":{"image":{"filename":"%s","format":"qcow2"}}}]`, taken: true},
		"taken, and interrupted": {err: stopped, disks: `[{"qdev":"/m/a","inserted":{"image":{"filename":"%s","format":"qcow2"}}}]`, stopped: true, want: stopped, taken: true},
		"not taken":              {err: late, disks: had, want: late},
		"refused":                {err: refused, want: refused},
		"lost":                   {err: late, want: late, says: "may have been taken"},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			overlay := ""
			q := executorFunc(func(ctx context.Context, command string, args, result any) error {
				if command == "transaction" {
					b, err := json.Marshal(args)
					ok(t, err)
					var a struct {
						Actions []struct{ Data map[string]string }
					}
					ok(t, json.Unmarshal(b, &a))
					overlay = a.Actions[0].Data["snapshot-file"]
					if c.stopped {
						cancel()
					}
					return c.err
				}
				if ctx.Err() != nil {
					return ctx.Err()
				}
				if command != "query-block" || c.disks == "" {
					return qmp.ErrLost
				}
				return json.Unmarshal([]byte(strings.ReplaceAll(c.disks, "%s", overlay)), result)
			})
			var rep CheckpointReport
			err := (&CheckpointOptions{Log: slog.New(slog.DiscardHandler)}).snapshot(ctx, Target{QMP: "x"}, q, found, &rep)
			if !errors.Is(err, c.want) || (err == nil) != (c.want == nil) || (len(rep.Snapshots) == 1) != c.taken {
				t.Errorf("%v, %+v", err, rep.Snapshots)
			}
			if c.taken && (len(rep.Snapshots) != 1 || rep.Snapshots[0].Now != overlay || rep.Snapshots[0].Frozen != file) {
				t.Errorf("%+v; the VM writes to %s", rep.Snapshots, overlay)
			}
			if err != nil && (!strings.Contains(err.Error(), c.says) || c.says != "" && !strings.Contains(err.Error(), overlay)) {
				t.Errorf("%v; want %q of %s", err, c.says, overlay)
			}
		})
	}
}

// executorFunc is a QEMU that answers commands.
type executorFunc func(ctx context.Context, command string, args, result any) error

func (f executorFunc) Execute(ctx context.Context, command string, args, result any) error {
	return f(ctx, command, args, result)
}

func (executorFunc) Events(context.Context) (<-chan qmp.Event, error) { return nil, nil }

// TestNoDisks: in whose disks nothing is looked for, they are known all the same, so that
// resume can compare.
func TestNoDisks(t *testing.T) {
	q := executorFunc(func(_ context.Context, command string, _, result any) error {
		return json.Unmarshal([]byte(`[{"qdev":"/m/a","inserted":{"ro":true,"image":{"filename":"/srv/a","format":"raw"}}}]`), result)
	})
	o := &CheckpointOptions{NoDisks: true, Disks: []save.DiskFile{{Path: "/srv/b"}}}
	found, err := o.find(t.Context(), q)
	if err != nil || len(found) != 1 || found[0].Name != "/m/a" {
		t.Errorf("%+v, %v", found, err)
	}
	if got := o.images(found); len(got) != 1 || got[0].Path != "/srv/b" {
		t.Errorf("it is looked in %+v", got)
	}
	o.NoDisks = false
	if got := o.images(found); len(got) != 2 || got[1].Path != "/srv/a" {
		t.Errorf("it is looked in %+v", got)
	}
}
