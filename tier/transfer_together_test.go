package tier_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
	"github.com/flic-migrate/flic-migrate/tier/vfs/crashfs"
)

// syncFS is a process that stops for a moment before it syncs a file.
type syncFS struct {
	vfs.FS
	before func(name string)
}

type syncFile struct {
	vfs.File
	fs *syncFS
}

func (s *syncFS) NoLinks(dir string) (_ vfs.FS, err error) {
	s.FS, err = s.FS.NoLinks(dir)
	return s, err
}

func (s *syncFS) file(f vfs.File, err error) (vfs.File, error) {
	if err != nil {
		return nil, err
	}
	return &syncFile{f, s}, nil
}

func (s *syncFS) Create(name string) (vfs.File, error) { return s.file(s.FS.Create(name)) }
func (s *syncFS) OpenRW(name string) (vfs.File, error) { return s.file(s.FS.OpenRW(name)) }

func (f *syncFile) Sync() error {
	if f.fs.before != nil {
		f.fs.before(f.Name())
	}
	return f.File.Sync()
}

// TestTransferTwo: two receivers have each a part of the same image, which is not listed. What
// the one brings is there after the other, whoever is first.
func TestTransferTwo(t *testing.T) {
	a := newLab(t, crashfs.New(0), "/")
	base := tiertest.New(tiertest.Options{Seed: 1, Blocks: []tiertest.Block{{Name: "pc.ram", Size: 1 << 20}}})
	was, _ := a.save(t, base, save.Options{SegmentPages: 4})
	model := map[store.Ref]*tiertest.Stream{}
	for g := range 2 {
		// Each has other pages than the first.
		s := tiertest.New(tiertest.Options{Seed: 1, Blocks: []tiertest.Block{{Name: "pc.ram", Size: 1 << 20}}, Passes: 2 + 3*g, Resend: 0.4})
		ref, meta := a.save(t, s, save.Options{Parent: was.String(), SegmentPages: 4})
		if meta.Report.Unchanged == 0 {
			t.Fatalf("%+v", meta.Report)
		}
		model[ref] = s
	}
	refs := slices.SortedFunc(maps.Keys(model), func(x, y store.Ref) int { return x.N - y.N })
	for range 2 {
		disk := &syncFS{FS: crashfs.New(0)}
		b := newLab(t, disk, "/")
		var streams [][]byte
		for _, ref := range refs {
			s, _, err := a.sent(nil, ref)
			if err != nil {
				t.Fatal(err)
			}
			streams = append(streams, s)
		}
		other := make(chan error, 1)
		var once sync.Once
		disk.before = func(name string) {
			if !strings.HasSuffix(name, ".staged") {
				return
			}
			once.Do(func() {
				go func() {
					_, err := b.takes(streams[1], store.Ref{})
					other <- err
				}()
				select {
				case err := <-other:
					other <- err
				case <-time.After(300 * time.Millisecond): // it waits, as it should
				}
			})
		}
		_, err := b.takes(streams[0], store.Ref{})
		if err := errors.Join(err, <-other); err != nil {
			t.Fatal(err)
		}
		for ref, s := range model {
			b.holds(t, ref, s)
		}
		if _, err := b.st.GC(t.Context()); err != nil {
			t.Error(err)
		}
		for ref, s := range model {
			b.holds(t, ref, s)
		}
		b.noLeaks(t)
		slices.Reverse(refs)
	}
}

// TestTransferMany receives checkpoints of a chain at once, whose streams were made when the
// store had the same, while others are removed, flattened, saved and swept. What is listed
// restores, whatever came first; and when all is removed nothing is left.
func TestTransferMany(t *testing.T) {
	a := newLab(t, crashfs.New(0), "/")
	model := a.hotGenerations(t, "vm", 6, 256<<10, 0.5)
	all := slices.SortedFunc(maps.Keys(model), func(x, y store.Ref) int { return x.N - y.N })
	// What two at a time may be told.
	allowed := []error{store.ErrInUse, store.ErrLacks, store.ErrNotFound, store.ErrChanged, store.ErrTaken}
	for seed := range uint64(6) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			b := newLab(t, crashfs.New(0), "/")
			rnd := rand.New(rand.NewPCG(seed, 7))
			in := maps.Clone(model)
			taken := 0
			for round := range 5 {
				var together sync.WaitGroup
				var mu sync.Mutex
				may := func(what string, err error) {
					if err != nil && !slices.ContainsFunc(allowed, func(a error) bool { return errors.Is(err, a) }) {
						t.Errorf("round %d: %s: %v", round, what, err)
					}
				}
				order := rnd.Perm(len(all))
				streams := make(map[int][]byte)
				for _, n := range order[:3] {
					s, _, err := a.sent(b.has(t), all[n])
					if err != nil {
						t.Fatal(err)
					}
					streams[n] = s
				}
				for n, s := range streams {
					pause := time.Duration(rnd.IntN(4)) * time.Millisecond
					together.Go(func() {
						time.Sleep(pause)
						_, err := b.takes(s, store.Ref{})
						if !integrity.IsCorrupt(err) { // what the sender knew to be there was freed
							may(fmt.Sprint("receive ", all[n]), err)
						}
						mu.Lock()
						defer mu.Unlock()
						if err == nil {
							taken++
						}
					})
				}
				for _, n := range order[3:5] {
					what, pause := rnd.IntN(4), time.Duration(rnd.IntN(4))*time.Millisecond
					together.Go(func() {
						time.Sleep(pause)
						switch what {
						case 0, 1:
							err := b.remove(all[n])
							may(fmt.Sprint("rm ", all[n]), err)
						case 2:
							_, _, err := b.flatten(all[n])
							may(fmt.Sprint("flatten ", all[n]), err)
						default:
							ref, _, err := b.trySave(model[all[n]], save.Options{VM: "other", Parent: save.ParentNone, Share: save.ShareNone})
							may("save", err)
							mu.Lock()
							defer mu.Unlock()
							in[ref] = model[all[n]]
						}
					})
				}
				together.Go(func() {
					_, err := b.st.GC(context.Background())
					may("gc", err)
				})
				together.Wait()
				refs, err := b.st.List(t.Context(), "")
				if err != nil {
					t.Fatal(err)
				}
				for _, ref := range refs {
					b.holds(t, ref, in[ref])
				}
				if t.Failed() {
					t.Fatalf("after round %d", round)
				}
			}
			if taken < 5 {
				t.Errorf("only %d were received", taken)
			}
			refs, err := b.st.List(t.Context(), "")
			if err != nil {
				t.Fatal(err)
			}
			for _, ref := range refs {
				if err := b.remove(ref); err != nil {
					t.Error(err)
				}
			}
			b.noLeaks(t)
			for _, name := range b.tree(t) {
				if strings.HasPrefix(name, "tmp/") && strings.HasSuffix(name, ".new") {
					t.Errorf("left: %s", name)
				}
			}
		})
	}
}

// atEnd reads b, and calls fn before its last bytes.
func atEnd(b []byte, fn func()) io.Reader {
	return io.MultiReader(bytes.NewReader(b[:len(b)-20]), readerFunc(func([]byte) (int, error) {
		fn()
		return 0, io.EOF
	}), bytes.NewReader(b[len(b)-20:]))
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(b []byte) (int, error) { return f(b) }

// TestTransferRemoved: what a checkpoint refers to and was there when its stream began stays
// there until it is.
func TestTransferRemoved(t *testing.T) {
	a, b := newLab(t, crashfs.New(0), "/"), newLab(t, crashfs.New(0), "/")
	model := a.hotGenerations(t, "vm", 2, 1<<20, 0.4)
	first, second := store.Ref{VM: "vm", N: 1}, store.Ref{VM: "vm", N: 2}
	a.ships(t, b, first)
	whole, _, err := a.sent(nil, second) // with all, as into a file
	if err != nil {
		t.Fatal(err)
	}
	var rm error
	err = b.st.Receive(t.Context(), atEnd(whole, func() { rm = b.remove(first) }), store.ReceiveOptions{})
	if err != nil || !errors.Is(rm, store.ErrInUse) {
		t.Errorf("receive: %v; rm meanwhile: %v", err, rm)
	}
	for ref, s := range model {
		b.holds(t, ref, s)
	}
	b.noLeaks(t)
}

// movedFiles are the moved pieces of a store.
func (l *lab) movedFiles(t *testing.T) map[string]string {
	t.Helper()
	all := l.everything(t)
	maps.DeleteFunc(all, func(name, _ string) bool { return !strings.HasSuffix(name, ".moved") })
	return all
}

// TestTransferPieces: what has come takes the place of no page that is there, in moved pieces
// that others need, before it is known that it is the right one.
func TestTransferPieces(t *testing.T) {
	a, list, _ := onDisks(t)
	b := newLab(t, crashfs.New(0), "/")
	whole, _, err := a.sent(nil, list[0].Ref)
	if err != nil {
		t.Fatal(err)
	}
	a.ships(t, b, list[0].Ref)
	right := b.movedFiles(t)
	a.ships(t, b, list[1].Ref)
	if err := b.remove(list[0].Ref); err != nil {
		t.Fatal(err)
	}
	before := b.movedFiles(t)
	if len(before) == 0 {
		t.Fatal("there are no pieces")
	}
	for _, nth := range []int{-1, -2} {
		out, _ := forged(t, whole, nth)
		switch _, err := b.takes(out, store.Ref{}); {
		case err == nil:
			b.holds(t, list[0].Ref, list[0].Stream) // the page that is there was taken
		case !integrity.IsCorrupt(err):
			t.Error(err)
		}
		for name, was := range before {
			now := b.movedFiles(t)[name]
			if len(now) != len(was) {
				t.Fatalf("%s: %d bytes, and %d before", name, len(now), len(was))
			}
			for at := 0; at < len(now); at += 4096 {
				end := min(at+4096, len(now))
				if page := now[at:end]; page != was[at:end] && page != right[name][at:end] {
					t.Errorf("%s at %d: neither what was there nor what is right", name, at)
				}
			}
		}
	}
	b.holds(t, list[1].Ref, list[1].Stream)
	a.ships(t, b, list[0].Ref)
	b.holds(t, list[0].Ref, list[0].Stream)
	b.holds(t, list[1].Ref, list[1].Stream)
	b.noLeaks(t)
}

// TestTransferHurt: damage of what the store has is no reason to give up what has come, nor is
// that of a checkpoint which has nothing to do with it.
func TestTransferHurt(t *testing.T) {
	a, b := newLab(t, crashfs.New(0), "/"), newLab(t, crashfs.New(0), "/")
	model := a.hotGenerations(t, "vm", 2, 1<<20, 0.4)
	first, second := store.Ref{VM: "vm", N: 1}, store.Ref{VM: "vm", N: 2}
	a.ships(t, b, first)
	other, _ := b.save(t, small(9), save.Options{VM: "a"})
	flip := func(ref store.Ref, off int64) {
		t.Helper()
		f, err := b.fs.OpenRW(filepath.Join(b.dir, "vms", ref.VM, fmt.Sprintf("%08d.flic", ref.N)))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		size, err := f.Size()
		c := make([]byte, 64)
		off = (off + size) % size
		if err == nil {
			_, err = f.ReadAt(c, off)
		}
		for i := range c {
			c[i] ^= 0x55
		}
		if err == nil {
			_, err = f.WriteAt(c, off)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	// Its end, which says who it is; header and all.
	flip(other, -100)
	flip(other, 0)
	d, err := b.st.Describe(t.Context(), first)
	if err != nil {
		t.Fatal(err)
	}
	for off := int64(4096); off < d.ImageBytes*3/4; off += 4096 {
		flip(first, off)
	}
	have := b.has(t)
	whole, _, err := a.sent(have, second)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.takes(whole, store.Ref{}); !integrity.IsCorrupt(err) || !strings.Contains(err.Error(), "00000001") {
		t.Errorf("%v", err)
	}
	if have := b.has(t); len(have.Staged) == 0 {
		t.Error("what has come is given up")
	}
	for off := int64(4096); off < d.ImageBytes*3/4; off += 4096 {
		flip(first, off)
	}
	if s, _ := a.ships(t, b, second); s.Skipped == 0 {
		t.Errorf("%+v", s)
	}
	for ref, s := range model {
		b.holds(t, ref, s)
	}
	b.noLeaks(t)
}

// TestTransferLooked: that somebody looks at what was staged is no reason to refuse a transfer.
func TestTransferLooked(t *testing.T) {
	_, ref, s, whole := twoOf(t)
	b := newLab(t, crashfs.New(0), "/")
	if _, err := b.takes(whole[:len(whole)/2], store.Ref{}); err == nil {
		t.Fatal("half of a stream was taken")
	}
	for _, name := range b.tree(t) {
		if !strings.HasSuffix(name, ".staged") {
			continue
		}
		f, err := b.fs.Open(filepath.Join(b.dir, name))
		if err == nil {
			err = f.TryLock(vfs.Shared)
		}
		if err != nil {
			t.Fatal(err)
		}
		time.AfterFunc(100*time.Millisecond, func() { f.Close() })
	}
	if _, err := b.takes(whole, store.Ref{}); err != nil {
		t.Fatal(err)
	}
	b.holds(t, ref, s)
}

// TestTransferShared: two transfers that bring the same part of an image are none of each
// other's business.
func TestTransferShared(t *testing.T) {
	a := newLab(t, crashfs.New(0), "/")
	was, _ := a.save(t, small(1), save.Options{})
	s := grown(1)
	var refs []store.Ref
	var streams [][]byte
	for range 2 {
		ref, _ := a.save(t, s, save.Options{Parent: was.String(), Share: save.ShareNone})
		whole, _, err := a.sent(nil, ref)
		if err != nil {
			t.Fatal(err)
		}
		refs, streams = append(refs, ref), append(streams, whole)
	}
	b := newLab(t, crashfs.New(0), "/")
	var other error
	err := b.st.Receive(t.Context(), atEnd(streams[0], func() { _, other = b.takes(streams[1], store.Ref{}) }), store.ReceiveOptions{})
	if err := errors.Join(err, other); err != nil {
		t.Error(err)
	}
	for _, ref := range refs {
		b.holds(t, ref, s)
	}
	b.noLeaks(t)
}

// TestTransferDemoted: moving to flash what NVRAM has of an image and a receiver that puts that
// image together do not meet: the one that comes second waits, or leaves it for the next time.
func TestTransferDemoted(t *testing.T) {
	a := newLab(t, crashfs.New(0), "/")
	model := a.hotGenerations(t, "vm", 3, 2<<20, 0.3)
	first := store.Ref{VM: "vm", N: 1}
	disk := &syncFS{FS: crashfs.New(0)}
	b := newLab(t, disk, "/")
	for n := 1; n <= 3; n++ {
		whole, _, err := a.sent(b.has(t), store.Ref{VM: "vm", N: n})
		if err == nil {
			_, err = b.takesWith(whole, b.hot())
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := b.remove(first); err != nil {
		t.Fatal(err)
	}
	whole, _, err := a.sent(b.has(t), first)
	if err != nil {
		t.Fatal(err)
	}
	met := false
	var during store.Demoted
	var derr error
	disk.before = func(name string) {
		if strings.HasSuffix(name, ".staged") && !met {
			met = true
			during, derr = b.st.Demote(t.Context(), 0)
		}
	}
	if _, err := b.takesWith(whole, b.hot()); err != nil {
		t.Errorf("beside a demotion: %v", err)
	}
	if !met || derr != nil || during.Images != 2 || during.Left != nil { // the two others
		t.Errorf("demotion meanwhile, %v: %+v, %v", met, during, derr)
	}
	disk.before = nil
	for ref, s := range model {
		b.holds(t, ref, s)
	}
	if d := b.demote(t, 0); d.NVRAMBytes == 0 {
		t.Errorf("nothing was freed afterwards: %+v", d)
	}
	for ref, s := range model {
		b.holds(t, ref, s)
	}
	b.noLeaks(t)
}

// openFS is a process that stops for a moment between opening, or making, a file that it writes
// to and locking it.
type openFS struct {
	vfs.FS
	after func(name string)
}

func (o *openFS) NoLinks(dir string) (_ vfs.FS, err error) {
	o.FS, err = o.FS.NoLinks(dir)
	return o, err
}

func (o *openFS) Create(name string) (vfs.File, error) {
	f, err := o.FS.Create(name)
	if err == nil {
		o.after(name)
	}
	return f, err
}

func (o *openFS) OpenRW(name string) (vfs.File, error) {
	f, err := o.FS.OpenRW(name)
	if err == nil {
		o.after(name)
	}
	return f, err
}

// TestCollectedAtOnce: gc removes nothing that receive, a demotion or a measurement has just made
// in tmp and not locked yet.
func TestCollectedAtOnce(t *testing.T) {
	_, ref, s, whole := twoOf(t)
	disk := crashfs.New(0)
	other := newLab(t, disk, "/")
	model := other.hotGenerations(t, "here", 4, 1<<20, 0.7)
	var gcs sync.WaitGroup
	made := 0
	b := other.on(t, &openFS{disk.Fork(), func(name string) {
		if filepath.Dir(name) != "/store/tmp" {
			return
		}
		made++
		done := make(chan bool)
		gcs.Go(func() {
			defer close(done)
			if _, err := other.st.GC(t.Context()); err != nil {
				t.Error(err)
			}
		})
		select {
		case <-done:
		case <-time.After(30 * time.Millisecond): // it waits, as it should
		}
	}})
	for what, do := range map[string]func() error{
		"receive": func() error { _, err := b.takes(whole, store.Ref{}); return err },
		"measure": func() error { _, err := b.st.FlashRate(t.Context()); return err },
		"demote": func() error {
			d, err := b.st.Demote(t.Context(), 1)
			if err == nil && d.Bytes == 0 {
				err = errors.New("nothing was moved")
			}
			return errors.Join(err, d.Left)
		},
	} {
		made = 0
		if err := do(); err != nil || made == 0 {
			t.Errorf("%s: %v, %d files made", what, err, made)
		}
		gcs.Wait()
	}
	model[ref] = s
	for ref, s := range model {
		b.holds(t, ref, s)
	}
	if len(b.pieces(t)) < 2 {
		t.Errorf("moved pieces: %q", b.pieces(t))
	}
	b.noLeaks(t)
}

// TestTransferStaged: a transfer that has opened what was staged, and not locked it yet, does
// not write into the checkpoint that another one makes of it.
func TestTransferStaged(t *testing.T) {
	_, ref, s, whole := twoOf(t)
	disk := crashfs.New(0)
	b := newLab(t, disk, "/")
	opened, done, other := make(chan bool), make(chan bool), make(chan error, 1)
	var once sync.Once
	second := b.on(t, &openFS{disk.Fork(), func(name string) {
		if strings.HasSuffix(name, ".staged") {
			once.Do(func() {
				close(opened)
				select {
				case <-done:
				case <-time.After(300 * time.Millisecond): // the first waits, as it should
				}
			})
		}
	}})
	err := b.st.Receive(t.Context(), atEnd(whole, func() {
		go func() {
			_, err := second.takes(whole, store.Ref{})
			other <- err
		}()
		<-opened
	}), store.ReceiveOptions{})
	close(done)
	if oerr := <-other; err != nil || oerr != nil && !errors.Is(oerr, store.ErrInUse) {
		t.Errorf("%v; the other: %v", err, oerr)
	}
	b.holds(t, ref, s)
	b.noLeaks(t)
	second.noLeaks(t)
}

// TestTransferReplaced: what a receiver holds of an image is replaced by all of it, and that is
// removed: the checkpoint that needs it does not become one that lacks it.
func TestTransferReplaced(t *testing.T) {
	a := newLab(t, crashfs.New(0), "/")
	was, _ := a.save(t, small(1), save.Options{})
	s := grown(1)
	var refs []store.Ref
	for range 2 {
		ref, _ := a.save(t, s, save.Options{Parent: was.String(), Share: save.ShareNone})
		refs = append(refs, ref)
	}
	for _, when := range []string{"at the end", "when all is checked"} {
		disk := &syncFS{FS: crashfs.New(0)}
		b := newLab(t, disk, "/")
		a.ships(t, b, refs[0])
		whole, sent, err := a.sent(b.has(t), refs[1])
		if err != nil || sent[0].Images != 1 {
			t.Fatalf("%+v, %v", sent, err)
		}
		replaced := false
		replace := func() {
			if replaced {
				return
			}
			replaced = true
			a.ships(t, b, was)
			for _, ref := range []store.Ref{refs[0], was} {
				if err := b.remove(ref); err != nil {
					t.Error(err)
				}
			}
		}
		atEndOf := replace
		if when != "at the end" {
			atEndOf = func() {
				disk.before = func(name string) {
					if strings.HasSuffix(name, ".staged") {
						replace()
					}
				}
			}
		}
		err = b.st.Receive(t.Context(), atEnd(whole, atEndOf), store.ReceiveOptions{})
		if !errors.Is(err, store.ErrLacks) {
			t.Errorf("%s: received: %v", when, err)
		}
		list, err := b.st.List(t.Context(), "")
		if err != nil {
			t.Fatal(err)
		}
		for _, ref := range list {
			b.holds(t, ref, s)
		}
		a.ships(t, b, refs[1])
		b.holds(t, refs[1], s)
		b.noLeaks(t)
	}
}

// TestTransferTaken: a name is taken by a save under way, whatever others there are, and by a
// group whose commit was cut off.
func TestTransferTaken(t *testing.T) {
	a := newLab(t, crashfs.New(0), "/")
	s := small(1)
	ref, _ := a.save(t, s, save.Options{})
	whole, _, err := a.sent(nil, ref)
	if err != nil {
		t.Fatal(err)
	}
	b := newLab(t, crashfs.New(0), "/")
	var txs []*store.Tx
	begin := func() {
		tx, err := b.st.Begin(t.Context(), ref.VM)
		if err != nil {
			t.Fatal(err)
		}
		txs = append(txs, tx)
	}
	begin()
	begin()
	if _, err := b.takes(whole, store.Ref{}); !errors.Is(err, store.ErrTaken) {
		t.Errorf("two saves are under way: %v", err)
	}
	for _, tx := range txs {
		tx.Abort()
	}
	// A checkpoint that has another name when its stream ends.
	err = b.st.Receive(t.Context(), atEnd(whole, func() { begin(); begin() }), store.ReceiveOptions{})
	if !errors.Is(err, store.ErrTaken) {
		t.Errorf("two saves have begun meanwhile: %v", err)
	}
	for _, tx := range txs {
		tx.Abort()
	}
	b.noLeaks(t)

	for n, taken := 0, false; ; n++ {
		disk := crashfs.New(0)
		b := newLab(t, disk, "/")
		process := disk.Fork()
		saver := b.on(t, process)
		err := b.st.Receive(t.Context(), atEnd(whole, func() {
			saver.trySave(s, save.Options{VM: ref.VM, Commit: func(ctx context.Context, tx *store.Tx) (store.Ref, error) {
				process.KillAt(n)
				_, err := saver.st.CommitGroup(ctx, store.Group{Name: "g", Mode: "stop"}, []*store.Tx{tx})
				return tx.Ref(), err
			}})
		}), store.ReceiveOptions{})
		if err != nil && !errors.Is(err, store.ErrTaken) {
			t.Errorf("operation %d of a group's commit: %v", n, err)
		}
		taken = taken || err != nil
		next := b.on(t, disk.Fork())
		next.save(t, s, save.Options{VM: "other"})
		next.holds(t, ref, s)
		if t.Failed() || !process.Killed() {
			if !taken || n < 8 {
				t.Errorf("%d operations; the name was taken: %v", n, taken)
			}
			return
		}
	}
}

// TestTransferBack: a power cut right after a removed checkpoint has been received again does not
// bring back the part of it that others needed.
func TestTransferBack(t *testing.T) {
	a := newLab(t, crashfs.New(0), "/")
	was, _ := a.save(t, small(1), save.Options{})
	ref, _ := a.save(t, grown(1), save.Options{Parent: was.String(), Share: save.ShareNone})
	disk := crashfs.New(0)
	b := newLab(t, disk, "/")
	a.ships(t, b, was)
	a.ships(t, b, ref)
	if err := b.remove(was); err != nil {
		t.Fatal(err)
	}
	unlisted := func(l *lab) bool {
		return slices.ContainsFunc(l.tree(t), func(name string) bool { return strings.HasSuffix(name, ".gone") })
	}
	if !unlisted(b) {
		t.Fatal("nobody needs it")
	}
	a.ships(t, b, was)
	for seed := range uint64(8) {
		if unlisted(b.on(t, disk.CrashClone(seed))) {
			t.Errorf("seed %d: both are there", seed)
		}
	}
}
