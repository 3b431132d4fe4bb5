package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"sync"

	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// mkgroup GROUP VM... saves guests that have most pages in common as a group in the store of
// $FLIC_STORE, as checkpoint --group does of QEMUs. The stream of VM n is that of "mkstream
// -seed S -passes n".
func mkgroup() {
	seed := flag.Uint64("seed", 1, "")
	flag.Parse()
	ctx := context.Background()
	check := func(err error) {
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	st, err := store.Open(ctx, vfs.OS, os.Getenv("FLIC_STORE"), true)
	check(err)
	hash, err := st.Trust(ctx, store.DefaultDomain)
	check(err)
	vms := flag.Args()[1:]
	peers := save.NewPeers(len(vms), hash)
	var mu sync.Mutex
	txs, open := make([]*store.Tx, len(vms)), len(vms)
	committed := make(chan struct{})
	var failed error
	var members sync.WaitGroup
	for i, vm := range vms {
		s := tiertest.New(tiertest.Options{
			Seed: *seed, Blocks: []tiertest.Block{{Name: "pc.ram", Size: 1 << 20}, {Name: "vga.vram", Size: 64 << 10}},
			Passes: i + 1, Resend: 0.3,
		})
		o := save.Options{VM: vm, Parent: save.ParentNone, Peer: peers.Member(i)}
		o.Commit = func(ctx context.Context, tx *store.Tx) (store.Ref, error) {
			mu.Lock()
			txs[i] = tx
			if open--; open == 0 {
				_, failed = st.CommitGroup(ctx, store.Group{Name: flag.Arg(0), Mode: "stop"}, txs)
				close(committed)
			}
			mu.Unlock()
			<-committed
			return tx.Ref(), failed
		}
		members.Go(func() {
			_, _, err := save.Run(ctx, vfs.OS, st, s.Reader(), o)
			check(err)
		})
	}
	members.Wait()
}
