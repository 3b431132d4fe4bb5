package tier_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/dedup"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/vfs/crashfs"
)

// group is saves that commit together.
type group struct {
	l     *lab
	peers *save.Peers
	n     int

	mu   sync.Mutex
	txs  []*store.Tx
	done chan struct{}
	err  error
}

func newGroup(t *testing.T, l *lab, n int) *group {
	t.Helper()
	h, err := l.st.Trust(t.Context(), store.DefaultDomain)
	if err != nil {
		t.Fatal(err)
	}
	return &group{l: l, peers: save.NewPeers(n, h), n: n, done: make(chan struct{})}
}

// commit is save.Options.Commit.
func (g *group) commit(ctx context.Context, tx *store.Tx) (store.Ref, error) {
	g.mu.Lock()
	if g.txs = append(g.txs, tx); len(g.txs) == g.n {
		_, g.err = g.l.st.CommitGroup(ctx, store.Group{Name: "g", Mode: "stop"}, g.txs)
		close(g.done)
	}
	g.mu.Unlock()
	<-g.done
	return tx.Ref(), g.err
}

// save saves a stream for each member at once.
func (g *group) save(streams []*tiertest.Stream, o func(i int) save.Options) (refs []store.Ref, metas []*checkpoint.Meta, errs []error) {
	refs, metas, errs = make([]store.Ref, g.n), make([]*checkpoint.Meta, g.n), make([]error, g.n)
	var wg sync.WaitGroup
	for i := range g.n {
		wg.Go(func() {
			so := o(i)
			so.VM, so.Peer, so.Commit = fmt.Sprint("vm", i), g.peers.Member(i), g.commit
			refs[i], metas[i], errs[i] = g.l.trySave(streams[i], so)
		})
	}
	wg.Wait()
	return refs, metas, errs
}

// TestPeers saves VMs with pages in common at once: each page is stored by one of them, all
// are what was saved, and so they are when some of them are gone.
func TestPeers(t *testing.T) {
	blocks := []tiertest.Block{{Name: "pc.ram", Size: 2 << 20}, {Name: "rom", Size: 40 << 10}}
	for name, o := range map[string]tiertest.Options{
		"plain":      {Seed: 1, Blocks: blocks},
		"live":       {Seed: 2, Blocks: blocks, Shuffle: true},
		"compressed": {Seed: 3, Blocks: blocks, Compress: 0.4, Fill: true},
		"16 KiB":     {Seed: 5, Blocks: []tiertest.Block{{Name: "ram", Size: 8 << 20}}, PageSize: 16 << 10, Advise: true},
	} {
		for _, energy := range energies() {
			t.Run(fmt.Sprint(name, energy), func(t *testing.T) {
				t.Parallel()
				const n = 5
				l := newLab(t, crashfs.New(0), "/")
				var streams []*tiertest.Stream
				for i := range n {
					streams = append(streams, generation(o, 1+i))
				}
				for round := range 2 {
					g := newGroup(t, l, n)
					refs, metas, errs := g.save(streams, func(i int) save.Options {
						so := save.Options{Energy: energy, SegmentPages: 5 + i, Codec: image.Codec(i % 4), Parent: save.ParentNone, Share: save.ShareNone}
						if i == 3 {
							so.WorkingSet, so.NVRAMSize = hotSet(t, streams[i], every(3)), 16<<20
						}
						if round == 1 {
							so.Parent, so.Share = save.ParentAuto, save.ShareStore
						}
						return so
					})
					if err := errors.Join(errs...); err != nil {
						t.Fatal(err)
					}
					shared, cold := int64(0), int64(0)
					for i, m := range metas {
						shared, cold = shared+m.Report.Peers, cold+m.Report.Cold
						l.holds(t, refs[i], streams[i])
					}
					switch {
					case round == 0 && energy == dedup.EnergyFull && shared < cold/2:
						t.Errorf("%d pages are in other members, and %d in their own", shared, cold)
					case round == 1 && o.Compress == 0 && shared+cold > int64(40*n):
						t.Errorf("of the same guests %d pages are stored, %d in other members", cold, shared)
					}
				}
				l.noLeaks(t)
				// Members refer to each other, and go one by one.
				for i := range n {
					for k := 1; k <= 2; k++ {
						if err := l.remove(store.Ref{VM: fmt.Sprint("vm", i), N: k}); err != nil {
							t.Fatal(err)
						}
					}
					if rep, err := l.st.GC(t.Context()); err != nil || len(rep.Warnings) > 0 {
						t.Fatal(rep, err)
					}
					for j := i + 1; j < n; j++ {
						l.holds(t, store.Ref{VM: fmt.Sprint("vm", j), N: 2}, streams[j])
					}
				}
				for _, name := range l.tree(t) {
					if fi, err := l.fs.Stat(l.dir + "/" + name); err == nil && strings.HasSuffix(name, ".gone") && fi.Size() > 0 || strings.HasSuffix(name, ".flic") {
						t.Errorf("left behind: %s", name)
					}
				}
			})
		}
	}
}

// TestPeerFails has one member fail at each stage: no member is saved, and none waits.
func TestPeerFails(t *testing.T) {
	o := tiertest.Options{Seed: 1}
	why := errors.New("it was not to be")
	for name, c := range map[string]struct {
		o    func(so *save.Options, g *group)
		part bool // it has some of the stream only
	}{
		"never begins": {func(so *save.Options, g *group) { g.peers.Fail(why); so.VM = "/" }, false},
		"in RAM":       {nil, true},
		"commit": {func(so *save.Options, g *group) {
			so.Commit = func(context.Context, *store.Tx) (store.Ref, error) {
				g.mu.Lock()
				defer g.mu.Unlock()
				g.err = why
				close(g.done)
				return store.Ref{}, why
			}
		}, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			const n = 3
			l := newLab(t, crashfs.New(0), "/")
			g := newGroup(t, l, n)
			errs := make([]error, n)
			var wg sync.WaitGroup
			for i := range n {
				wg.Go(func() {
					s := generation(o, 1+i)
					so := save.Options{VM: fmt.Sprint("vm", i), Peer: g.peers.Member(i), Commit: g.commit}
					b := s.Bytes()
					if i == 1 {
						if c.o != nil {
							c.o(&so, g)
						}
						if c.part {
							b = b[:len(b)/2]
						}
					}
					ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
					defer cancel()
					_, _, errs[i] = l.run(ctx, strings.NewReader(string(b)), so)
				})
			}
			wg.Wait()
			for i, err := range errs {
				if err == nil || errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("member %d: %v", i, err)
				}
			}
			if refs, err := l.st.List(t.Context(), ""); err != nil || len(refs) > 0 {
				t.Errorf("checkpoints %v, %v", refs, err)
			}
			for _, name := range l.tree(t) {
				if strings.HasPrefix(name, "tmp/") || strings.HasPrefix(name, "vms/") || strings.HasPrefix(name, "groups/") {
					t.Errorf("left behind: %s", name)
				}
			}
			l.noLeaks(t)
		})
	}
}
