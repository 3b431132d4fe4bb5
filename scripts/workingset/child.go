package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/stream/pipe"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/lazy"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// childEnv names the file that says what a child of QEMU's is to do: the program
// is its own exec: child, because it ends a restore in its middle.
const childEnv = "FLIC_WORKINGSET_CHILD"

// child restores a checkpoint lazily, nothing but what is asked for, until it is
// terminated. Then it writes the pages of main RAM that were asked for.
type child struct {
	Store, Report string
}

func (c child) pidFile() string { return c.Report + ".pid" }

// uri is the exec: URI of a child.
func (c child) uri() (string, error) {
	b, err := json.Marshal(c)
	if err != nil {
		return "", err
	}
	name := filepath.Join(filepath.Dir(c.Report), "child")
	if err := os.WriteFile(name, b, 0o600); err != nil {
		return "", err
	}
	exe, err := os.Executable()
	return fmt.Sprintf("exec:%s=%s exec %s", childEnv, name, exe), err
}

// forever is longer than anybody measures.
const forever = time.Hour

func runChild(ctx context.Context, spec string) error {
	b, err := os.ReadFile(spec)
	if err != nil {
		return err
	}
	var c child
	if err := json.Unmarshal(b, &c); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGTERM)
	defer stop()
	if err := os.WriteFile(c.pidFile(), []byte(fmt.Sprint(os.Getpid())), 0o600); err != nil {
		return err
	}
	st, err := store.Open(context.Background(), vfs.OS, c.Store, false)
	if err != nil {
		return err
	}
	in, err := pipe.New(ctx, 0)
	if err != nil {
		return err
	}
	ck, err := st.OpenCheckpoint(context.Background(), store.Ref{VM: "vm"}, checkpoint.Options{})
	if err != nil {
		return err
	}
	defer ck.Close()
	main := slices.IndexFunc(ck.Meta.Blocks, func(b ramparse.Block) bool { return b.Name == mainRAM })
	// Page tables, too, are to be asked for.
	ck.Meta.PageTables = nil
	rep, err := lazy.Serve(ctx, ck.Checkpoint, in, os.Stdout, lazy.Options{HoldBackground: forever})
	if ctx.Err() == nil {
		return errors.Join(errors.New("the restore ended too soon"), err)
	}
	list := []int64{}
	for _, r := range rep.Touched {
		for i := range r.Count {
			if r.Block == main {
				list = append(list, int64(r.Page+i))
			}
		}
	}
	if b, err = json.Marshal(list); err != nil {
		return err
	}
	if err := os.WriteFile(c.Report+".new", b, 0o600); err != nil {
		return err
	}
	return os.Rename(c.Report+".new", c.Report)
}
