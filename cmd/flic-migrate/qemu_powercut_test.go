package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
	"github.com/flic-migrate/flic-migrate/stream/pipe"
	"github.com/flic-migrate/flic-migrate/stream/returnpath"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/restore"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/vfs/crashfs"
	"github.com/flic-migrate/flic-migrate/tier/workingset"
)

// beforeShut is a return path that calls a function before QEMU is told how the
// save has ended.
type beforeShut struct {
	io.Writer
	call func(value uint32)
}

func (b beforeShut) Write(p []byte) (int, error) {
	for value := range uint32(2) {
		if bytes.HasSuffix(p, returnpath.AppendShut(nil, value)) {
			b.call(value)
		}
	}
	return b.Writer.Write(p)
}

// whole fails unless a disk, as the next boot finds it, has the checkpoint and all
// of it; it returns the stream.
func whole(t *testing.T, disk *crashfs.FS, ref store.Ref) []byte {
	t.Helper()
	st, err := store.Open(context.Background(), disk, "/store", false)
	ok(t, err)
	c, err := st.OpenCheckpoint(context.Background(), ref, checkpoint.Options{})
	if err != nil {
		t.Fatalf("after the power cut: %v", err)
	}
	defer c.Close()
	ok(t, c.Verify(context.Background(), func(err error) { t.Errorf("after the power cut: %v", err) }))
	var b bytes.Buffer
	if _, err := restore.Run(context.Background(), c.Checkpoint, &b, restore.Options{}); err != nil {
		t.Errorf("after the power cut: %v", err)
	}
	return b.Bytes()
}

// QEMU's "completed" and what a power cut leaves never disagree: a disk that loses
// all that was not synced at that instant, in any order, has the whole checkpoint.
// QEMU does not say it before that is so. To have such a disk the save runs in the
// test, at the other end of a socket.
func TestPowerCutAtCompleted(t *testing.T) {
	t.Parallel()
	ctx, l := limit(t), newLab(t)
	c := q35.tiny(t, qemutest.LiveMemory, varied(1024), 10)
	vm := qemutest.Start(t, c)
	vm.WaitFor(t, `tick 00000002\r`)
	set(t, vm, map[string]any{"max-bandwidth": int64(1) << 40, "downtime-limit": 100}, "return-path")
	l.hot(t, vm)
	file, err := os.Open(l.ws)
	ok(t, err)
	ws, err := workingset.Read(file)
	ok(t, err)
	ok(t, file.Close())

	dir, err := os.MkdirTemp("", "flic") // a socket's path must be short
	ok(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "migration")})
	ok(t, err)
	defer listener.Close()

	disk := crashfs.New(0)
	st, err := store.Open(context.Background(), disk, "/store", true)
	ok(t, err)
	for n := 1; n <= 2; n++ {
		ref := store.Ref{VM: "vm", N: n}
		done := make(chan error, 1)
		told := 0
		save := func() error {
			conn, err := listener.AcceptUnix()
			if err != nil {
				return err
			}
			defer conn.Close()
			file, err := conn.File()
			if err != nil {
				return err
			}
			defer file.Close()
			// QEMU keeps the socket open until it is told: its end is not
			// what says that the stream has ended.
			in, err := pipe.New(ctx, int(file.Fd()))
			if err != nil {
				return err
			}
			defer in.Close()
			o := save.Options{VM: "vm", NVRAM: "/nvram", WorkingSet: ws, ReturnPath: beforeShut{conn, func(value uint32) {
				told++
				if value != 0 {
					return
				}
				info, err := migration.Query(ctx, vm.QMP)
				if err != nil || info.Status.Ended() {
					t.Errorf("before it was told, QEMU says %s, %v", info.Status, err)
				}
			}}}
			_, _, err = save.Run(ctx, disk, st, in, o)
			return err
		}
		go func() { done <- save() }()
		ok(t, migration.Start(ctx, vm.QMP, "unix:"+filepath.Join(dir, "migration")))
		// The disk of each instant, with QEMU's word from just before it.
		var cuts []*crashfs.FS
		for {
			info, err := migration.Query(ctx, vm.QMP)
			ok(t, err)
			if info.Status == migration.StatusCompleted {
				for seed := range uint64(5) {
					cuts = append(cuts, disk.CrashClone(seed))
				}
				break
			}
			if info.Status.Ended() {
				t.Fatalf("QEMU says %s: %v", info.Status, <-done)
			}
			time.Sleep(time.Millisecond)
		}
		ok(t, <-done)
		if told != 1 {
			t.Errorf("QEMU was told %d times how the save has ended", told)
		}
		stream := whole(t, disk.Fork(), ref)
		for _, cut := range cuts {
			if !bytes.Equal(whole(t, cut, ref), stream) {
				t.Error("the restored stream is another after the power cut")
			}
		}
		want := ram(t, ctx, vm)
		ok(t, qmp.Cont(ctx, vm.QMP))
		runsOn(t, vm)

		// What the power cut has left is this guest.
		destination := qemutest.Start(t, destination(c, "unix:"+filepath.Join(dir, "incoming")))
		conn, err := net.Dial("unix", filepath.Join(dir, "incoming"))
		ok(t, err)
		_, err = conn.Write(whole(t, cuts[n], ref))
		ok(t, errors.Join(err, conn.Close()))
		_, err = migration.Wait(ctx, destination.QMP)
		ok(t, err)
		if diff := qemutest.DiffRAM(want, ram(t, ctx, destination)); diff != "" {
			t.Errorf("restored RAM differs: %s", diff)
		}
		destination.Kill()
		os.Remove(filepath.Join(dir, "incoming"))
	}
}
