package tier_test

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/stream"
	"github.com/flic-migrate/flic-migrate/stream/returnpath"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/dedup"
	"github.com/flic-migrate/flic-migrate/tier/digest"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/lazy"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/source"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/vfs/crashfs"
)

// seedsEnv is how many sequences TestSequences tries.
const seedsEnv = "FLIC_TEST_SEQUENCES"

// TestSequences does random things to a store of several guests that refer to their own
// and to each other's checkpoints, with crashes in between, and compares it with a model
// that has each checkpoint's memory as a whole. Whatever is listed restores to the same
// bytes, eagerly and lazily, and nothing is missing that was not removed; and when all is
// removed, all space is back.
func TestSequences(t *testing.T) {
	seeds := fewer(8)
	if n, err := strconv.Atoi(os.Getenv(seedsEnv)); err == nil {
		seeds = n
	}
	var total struct{ refers, trimmed, flattened, crashes, kept, onDisk, demoted, served, united int }
	var mu sync.Mutex
	// UUIDs and times are not the seed's, so the numbers are another time others.
	t.Cleanup(func() {
		if testing.Short() {
			return // a seed or two do not come upon all
		}
		if total.onDisk < seeds || total.refers < 3*seeds || total.flattened < seeds || total.crashes < seeds || total.served < 20*seeds || total.trimmed+total.demoted == 0 || total.kept == 0 {
			t.Errorf("too little was tried: %+v", total)
		}
	})
	for seed := range uint64(seeds) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			q := &sequence{t: t, rng: rand.New(rand.NewPCG(seed, 8)), disk: crashfs.New(0), model: map[store.Ref]*tiertest.Stream{}, passes: map[string]int{},
				unsure: map[store.Ref]bool{}, undone: map[store.Ref]*tiertest.Stream{}}
			q.l = newLab(t, q.disk, "/")
			// Disks with pages of each of the two kinds of guest, when it was young.
			for seed := range uint64(2) {
				q.disks = append(q.disks, newRawDisk(t, filepath.Join(t.TempDir(), "disk"), digest.Fresh(), 2, aged(seed, 1), aged(seed, 3)).open(t))
			}
			for range 60 {
				q.step()
				if t.Failed() {
					t.Fatalf("after %q", q.done)
				}
			}
			q.end()
			if t.Failed() {
				t.Fatalf("after %q", q.done)
			}
			mu.Lock()
			defer mu.Unlock()
			total.refers += q.refers
			total.trimmed += q.trimmed
			total.flattened += q.flattened
			total.crashes += q.crashes
			total.kept += q.kept
			total.onDisk += q.onDisk
			total.demoted += q.demoted
			total.served += q.served
			total.united += q.united
		})
	}
}

// sequence is one of TestSequences.
type sequence struct {
	t      *testing.T
	rng    *rand.Rand
	disk   *crashfs.FS
	l      *lab
	model  map[store.Ref]*tiertest.Stream
	passes map[string]int // each guest's age
	done   []string
	// may is what a checkpoint that is not in the model holds, if what was cut off can
	// have made it, or not have removed it.
	may func(store.Ref) *tiertest.Stream
	// A killed process can leave a name, or its absence, that the next power cut takes back,
	// because nobody has made it durable: unsure are the checkpoints that may go with it, and
	// undone those that may come back.
	unsure map[store.Ref]bool
	undone map[store.Ref]*tiertest.Stream

	refers, trimmed, flattened, crashes, kept, onDisk, demoted, served, united int

	disks []save.Disk // which stay as they are
}

// aged is the guest of a seed after so many passes.
func aged(seed uint64, passes int) *tiertest.Stream {
	return tiertest.New(tiertest.Options{Seed: seed, Passes: passes, Resend: 0.25, Fill: true,
		Blocks: []tiertest.Block{{Name: "pc.ram", Size: 160 << 10}, {Name: "rom", Size: 32 << 10}}})
}

// some is a random checkpoint of the model.
func (q *sequence) some() (store.Ref, bool) {
	var refs []store.Ref
	for r := range q.model {
		refs = append(refs, r)
	}
	if len(refs) == 0 {
		return store.Ref{}, false
	}
	slices.SortFunc(refs, func(a, b store.Ref) int { return slices.Compare([]int{len(a.VM), a.N}, []int{len(b.VM), b.N}) })
	return refs[q.rng.IntN(len(refs))], true
}

// step does one thing, which may be cut off in its midst.
func (q *sequence) step() {
	crash := q.rng.IntN(4) == 0
	if crash {
		q.disk.KillAt(q.rng.IntN(40))
	}
	name, err := q.act()
	q.done = append(q.done, fmt.Sprint(name, " ", err))
	if !q.disk.Killed() {
		if crash { // it was over before
			q.disk.Heal()
		}
		if err != nil {
			q.t.Errorf("%s: %v", name, err)
		}
		q.look(false)
		return
	}
	q.crashes++
	cut := q.rng.IntN(2) == 0
	if cut {
		q.disk = q.disk.CrashClone(q.rng.Uint64())
	} else {
		q.disk = q.disk.Fork()
	}
	q.l = q.l.on(q.t, q.disk)
	q.look(cut)
}

// act does it. After it the model has what must be there, and may knows what can be.
func (q *sequence) act() (string, error) {
	t, l := q.t, q.l
	ref, any := q.some()
	switch n := q.rng.IntN(18); {
	case n < 5 || !any:
		vm := []string{"a", "bb", "ccc"}[q.rng.IntN(3)]
		q.passes[vm]++
		s := aged(uint64(len(vm)/2), q.passes[vm])
		o := save.Options{VM: vm, Energy: dedup.EnergyFull, SegmentPages: 2 + q.rng.IntN(5), Codec: image.Codec(q.rng.IntN(4)), Workers: 1}
		if q.rng.IntN(3) > 0 {
			o.WorkingSet, o.NVRAMSize = hotSet(t, s, every(2+q.rng.Uint64N(3))), 40<<18
		}
		if q.rng.IntN(2) == 0 {
			o.Disks = q.disks[len(vm)/2:][:1]
		}
		if any && q.rng.IntN(3) == 0 {
			o.Parent = ref.String()
		}
		name := fmt.Sprintf("save of %s, generation %d, parent %s", vm, q.passes[vm], o.Parent)
		// If it is cut off it may be there, with whatever number is the next.
		refs, err := l.st.List(t.Context(), vm)
		if err != nil {
			return name, err
		}
		got, meta, err := l.trySave(s, o)
		if err == nil {
			q.model[got] = s
			if len(meta.References) > 0 {
				q.refers++
			}
			if meta.Report.Disk > 0 {
				q.onDisk++
			}
			return name, nil
		}
		q.may = func(r store.Ref) *tiertest.Stream {
			if r.VM == vm && !slices.Contains(refs, r) {
				return s
			}
			return nil
		}
		return name, err
	case n < 8:
		s := q.model[ref]
		delete(q.model, ref)
		rm, err := l.st.Remove(t.Context(), ref)
		if err == nil {
			err = rm.Left
		}
		if err != nil {
			q.may = func(r store.Ref) *tiertest.Stream {
				if r == ref {
					return s
				}
				return nil
			}
			q.undone[ref] = s
		} else {
			delete(q.undone, ref)
		}
		if len(rm.Kept) > 0 {
			q.kept++
			if rm.FlashBytes > 0 {
				q.trimmed++
			}
		}
		return fmt.Sprintf("rm %v", ref), err
	case n < 9:
		rep, err := l.st.GC(t.Context())
		if err == nil && len(rep.Warnings) > 0 {
			err = fmt.Errorf("%v", rep.Warnings)
		}
		q.trimmed += rep.Trimmed
		return "gc", err
	case n < 11:
		_, _, err := l.flatten(ref)
		if err == nil {
			q.flattened++
		}
		return fmt.Sprintf("flatten %v", ref), err
	case n < 13:
		u, err := l.st.Unite(t.Context(), ref, store.UniteOptions{Workers: 1})
		if err == nil && u.Why == "" {
			q.united++
		}
		return fmt.Sprintf("uniting of %v", ref), err
	case n < 17:
		keep := 1 + q.rng.IntN(2)
		d, err := l.st.Demote(t.Context(), keep)
		if err == nil {
			err = d.Left
		}
		q.demoted += d.Images
		return fmt.Sprintf("demotion of all but %d", keep), err
	default:
		refs, err := l.st.List(t.Context(), ref.VM)
		if err != nil {
			return "list", err
		}
		to, _, err := l.copy(ref, image.LZ4)
		if err == nil {
			q.model[to] = q.model[ref]
		} else {
			s := q.model[ref]
			q.may = func(r store.Ref) *tiertest.Stream {
				if r.VM == ref.VM && !slices.Contains(refs, r) {
					return s
				}
				return nil
			}
		}
		return fmt.Sprintf("copy of %v", ref), err
	}
}

// look compares what is there with the model, after a power cut if cut is set.
func (q *sequence) look(cut bool) {
	t := q.t
	t.Helper()
	refs, err := q.l.st.List(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	for _, ref := range refs {
		s := q.model[ref]
		if s == nil && cut {
			s = q.undone[ref]
		}
		if s == nil && q.may != nil {
			s = q.may(ref)
		}
		if s != nil && q.model[ref] == nil {
			q.model[ref], q.unsure[ref] = s, true
		}
		if s == nil {
			t.Errorf("%v came from nowhere", ref)
			return
		}
		q.l.holds(t, ref, s)
		q.demands(ref, s)
	}
	if len(refs) > 0 {
		ref := refs[q.rng.IntN(len(refs))]
		q.lazily(ref, q.model[ref])
	}
	for ref := range q.model {
		switch {
		case slices.Contains(refs, ref):
		case cut && q.unsure[ref]:
			delete(q.model, ref)
		default:
			t.Errorf("%v is gone", ref)
		}
	}
	if q.may = nil; cut {
		clear(q.undone)
		clear(q.unsure)
	}
	q.l.noLeaks(t)
}

// demands reads pages of a checkpoint one by one, as a lazy restore does: those that were
// hot, in their order, and some at random.
func (q *sequence) demands(ref store.Ref, s *tiertest.Stream) {
	t := q.t
	c, err := q.l.st.OpenCheckpoint(t.Context(), ref, checkpoint.Options{})
	if err != nil {
		t.Errorf("%v: %v", ref, err)
		return
	}
	defer c.Close()
	rd := c.Sources().NewReader(c.NewCache(2 * source.MaxNeeds))
	defer rd.Close()
	got, want := make([]byte, s.PageSize()), make([]byte, s.PageSize())
	page := func(block int, page uint64) error {
		if page >= s.Pages(block) {
			return nil // a hot page of another guest's
		}
		run, err := c.PageMap.Find(block, page)
		if err == nil {
			err = rd.Copy(t.Context(), got, source.Page{Block: block, Number: page}, run.Entry(page-run.Page))
		}
		s.Page(want, block, page)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%v: page %s is another: %v", ref, c.PageName(block, page), err)
		}
		rd.LetGo()
		return nil
	}
	c.HotPages(page)
	for range 10 {
		block := q.rng.IntN(len(s.Blocks()))
		page(block, q.rng.Uint64N(s.Pages(block)))
	}
}

// lazily restores a checkpoint as a QEMU has it that runs already: the server pushes pages
// and sends those that are asked for, at random moments.
func (q *sequence) lazily(ref store.Ref, s *tiertest.Stream) {
	t := q.t
	c, err := q.l.st.OpenCheckpoint(t.Context(), ref, checkpoint.Options{})
	if err != nil {
		t.Errorf("%v: %v", ref, err)
		return
	}
	defer c.Close()
	in, rp := io.Pipe()
	r, out := io.Pipe()
	served := make(chan error, 1)
	go func() {
		_, err := lazy.Serve(t.Context(), c.Checkpoint, in, out, lazy.Options{})
		out.Close() // as by the end of the process
		served <- err
	}()
	got, err := q.load(s, r, rp)
	r.CloseWithError(io.ErrClosedPipe)
	rp.Close()
	if serr := <-served; serr != nil || err != nil {
		t.Errorf("lazy restore of %v: server: %v; destination: %v", ref, serr, err)
		return
	}
	in.Close()
	want, zero := make([]byte, s.PageSize()), make([]byte, s.PageSize())
	for b := range s.Blocks() {
		for p := range s.Pages(b) {
			s.Page(want, b, p)
			// A page that has not come reads as zero.
			if !got[tiertest.PageID{Block: b, Page: p}] && !bytes.Equal(want, zero) {
				t.Errorf("lazy restore of %v: page %s has not come", ref, c.PageName(b, p))
			}
		}
	}
	q.served++
}

// load is the destination of a lazy restore: it reads all of it, asks for pages, and
// compares what comes. It returns which pages that were.
func (q *sequence) load(s *tiertest.Stream, r io.Reader, rp io.Writer) (map[tiertest.PageID]bool, error) {
	cur := stream.NewCursor(r, 0)
	cur.SetReadAhead(0)
	rd := stream.NewReader(cur)
	dec := ramparse.NewDecoder(ramparse.Options{PageSize: s.PageSize()})
	got := make(map[tiertest.PageID]bool)
	want := make([]byte, s.PageSize())
	for running := false; ; {
		f, err := rd.Next()
		switch {
		case err != nil || f.Kind == stream.EOF:
			return got, err
		case f.Kind == stream.CommandFrame && f.Command.Number == stream.CommandPackaged:
			if err := rd.CopyPackage(func([]byte) error { return nil }); err != nil {
				return got, err
			}
			if _, err := rp.Write(returnpath.AppendPong(nil, 3)); err != nil { // the devices are loaded
				return got, err
			}
			running = true
		case f.Kind == stream.SectionStart || f.Kind == stream.SectionPart || f.Kind == stream.SectionEnd:
			for {
				var rec ramparse.Record
				if err := dec.Next(cur, &rec); err != nil {
					return got, err
				}
				if rec.Kind == ramparse.EOS {
					break
				}
				if rec.Kind == ramparse.MemSize {
					continue
				}
				id := tiertest.PageID{Block: rec.Block, Page: rec.Page}
				s.Page(want, id.Block, id.Page)
				same := rec.Kind == ramparse.Page && bytes.Equal(rec.Data, want) ||
					rec.Kind == ramparse.Zero && bytes.Equal(want, bytes.Repeat([]byte{rec.Fill}, len(want)))
				if !same || got[id] {
					return got, fmt.Errorf("page %v comes as %v, with other content or again", id, rec.Kind)
				}
				got[id] = true
			}
			if f.Kind == stream.SectionEnd {
				running = false // nobody reads what is asked for from here on
			}
		}
		if running && q.rng.IntN(2) == 0 {
			b := q.rng.IntN(len(s.Blocks()))
			at := q.rng.Uint64N(s.Pages(b)) * uint64(s.PageSize())
			if _, err := rp.Write(returnpath.AppendReqPages(nil, s.Blocks()[b].Name, at, uint32(s.PageSize()))); err != nil {
				return got, err
			}
		}
	}
}

// end removes all.
func (q *sequence) end() {
	t := q.t
	for ref, ok := q.some(); ok; ref, ok = q.some() {
		if err := q.l.remove(ref); err != nil {
			t.Fatalf("%v: %v", ref, err)
		}
		delete(q.model, ref)
		q.look(false)
	}
	if rep, err := q.l.st.GC(t.Context()); err != nil || len(rep.Warnings) > 0 {
		t.Errorf("gc: %+v, %v", rep, err)
	}
	if flash, hot := q.l.taken(t); flash != 0 || hot != 0 {
		t.Errorf("%d bytes of flash and %d of NVRAM are not free: %v", flash, hot, q.l.tree(t))
	}
}

// TestTogether has several processes at one store at the same time: two save, others
// restore, remove, flatten, collect, unite, and move pages to flash. Whatever is restored is
// what was saved, nothing fails but for being in use or removed, and in the end all space is
// back.
func TestTogether(t *testing.T) {
	disk := crashfs.New(0)
	l := newLab(t, disk, "/")
	var mu sync.Mutex
	model := map[store.Ref]*tiertest.Stream{}
	demoted, united := 0, 0
	some := func(rng *rand.Rand) (store.Ref, *tiertest.Stream) {
		mu.Lock()
		defer mu.Unlock()
		var refs []store.Ref
		for r := range model {
			refs = append(refs, r)
		}
		if len(refs) == 0 {
			return store.Ref{}, nil
		}
		slices.SortFunc(refs, func(a, b store.Ref) int { return cmp.Or(cmp.Compare(a.VM, b.VM), a.N-b.N) })
		r := refs[rng.IntN(len(refs))]
		return r, model[r]
	}
	// The other VM's pages are the same, as it is saved by somebody who does not look for them.
	other := func(n int) (*tiertest.Stream, save.Options) {
		s := tiertest.New(tiertest.Options{Seed: 1, Passes: 1 + n/2, Resend: 0.5, Fill: true,
			Blocks: []tiertest.Block{{Name: "pc.ram", Size: 160 << 10}, {Name: "rom", Size: 32 << 10}}})
		o := save.Options{VM: "other", Energy: dedup.EnergyFull, SegmentPages: 4, Workers: 1, Share: save.ShareNone}
		if n%2 == 0 {
			o.Parent = save.ParentNone // so that nobody needs the one before
		}
		return s, o
	}
	expected := func(err error) bool {
		return err == nil || errors.Is(err, store.ErrInUse) || errors.Is(err, store.ErrNotFound) && !integrity.IsCorrupt(err) || errors.Is(err, store.ErrChanged)
	}
	saved := make(chan struct{})
	var all sync.WaitGroup
	// Each as a process of its own.
	process := func(seed uint64, step func(rng *rand.Rand, l *lab)) {
		at := l.on(t, disk.Fork())
		rng := rand.New(rand.NewPCG(seed, 8))
		all.Go(func() {
			for {
				select {
				case <-saved:
					at.noLeaks(t)
					return
				default:
					step(rng, at)
				}
			}
		})
	}
	for i := range uint64(2) {
		process(i, func(rng *rand.Rand, l *lab) {
			ref, s := some(rng)
			if s == nil {
				return
			}
			var out bytes.Buffer
			err := l.restore(ref, &out)
			if !expected(err) {
				t.Errorf("restore of %v: %v", ref, err)
			}
			if err == nil && !bytes.Equal(out.Bytes(), s.ExpectedBytes()) {
				t.Errorf("%v gives another stream", ref)
			}
		})
	}
	process(3, func(rng *rand.Rand, l *lab) {
		ref, s := some(rng)
		if s == nil || ref.N%5 == 0 {
			return
		}
		rm, err := l.st.Remove(t.Context(), ref)
		if !expected(err) || rm.Left != nil {
			t.Errorf("removal of %v: %+v, %v", ref, rm, err)
		}
		if err == nil {
			mu.Lock()
			delete(model, ref)
			mu.Unlock()
		}
	})
	process(4, func(rng *rand.Rand, l *lab) {
		if rep, err := l.st.GC(t.Context()); err != nil || len(rep.Warnings) > 0 {
			t.Errorf("gc: %+v, %v", rep, err)
		}
	})
	process(5, func(rng *rand.Rand, l *lab) {
		if ref, s := some(rng); s != nil && ref.N%3 == 0 {
			if _, _, err := l.flatten(ref); !expected(err) {
				t.Errorf("flattening of %v: %v", ref, err)
			}
		}
	})
	process(6, func(rng *rand.Rand, l *lab) {
		d, err := l.st.Demote(t.Context(), 1+rng.IntN(2))
		if err != nil || d.Left != nil {
			t.Errorf("demotion: %+v, %v", d, err)
		}
		mu.Lock()
		demoted += d.Images
		mu.Unlock()
	})
	for i := range uint64(2) {
		process(7+i, func(rng *rand.Rand, l *lab) {
			ref, s := some(rng)
			if s == nil {
				return
			}
			u, err := l.st.Unite(t.Context(), ref, store.UniteOptions{Workers: 1})
			if !expected(err) && !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("uniting of %v: %v", ref, err)
			}
			if err == nil && u.Why == "" {
				mu.Lock()
				united++
				mu.Unlock()
			}
		})
	}
	n := 0
	process(9, func(rng *rand.Rand, l *lab) {
		if n++; n > 60 {
			time.Sleep(time.Millisecond)
			return
		}
		s, o := other(n)
		ref, _, err := l.trySave(s, o)
		if err != nil {
			t.Errorf("save: %v", err)
			return
		}
		mu.Lock()
		model[ref] = s
		mu.Unlock()
	})
	tried := func() bool {
		mu.Lock()
		defer mu.Unlock()
		return demoted > 0 && united > 0
	}
	// A busy host has the others come to do their things more seldom.
	for n := 0; n < 60 || n < 300 && !tried(); n++ {
		s := tiertest.New(tiertest.Options{Seed: 1, Passes: 1 + n/2, Resend: 0.5, Fill: true,
			Blocks: []tiertest.Block{{Name: "pc.ram", Size: 160 << 10}, {Name: "rom", Size: 32 << 10}}})
		o := save.Options{Energy: dedup.EnergyFull, SegmentPages: 3, Workers: 1}
		if n%2 == 0 {
			o.WorkingSet, o.NVRAMSize = hotSet(t, s, every(3)), 40<<18
		}
		ref, _, err := l.trySave(s, o)
		if err == nil {
			mu.Lock()
			model[ref] = s
			mu.Unlock()
		}
		if err != nil {
			t.Errorf("save: %v", err)
		}
		if t.Failed() {
			break
		}
	}
	close(saved)
	all.Wait()
	if demoted == 0 {
		t.Error("nothing was moved to flash")
	}
	if united == 0 {
		t.Error("nothing was united")
	}
	for ref, s := range model {
		l.holds(t, ref, s)
		if err := l.remove(ref); err != nil {
			t.Error(err)
		}
	}
	if rep, err := l.st.GC(t.Context()); err != nil || len(rep.Warnings) > 0 {
		t.Errorf("gc: %+v, %v", rep, err)
	}
	if flash, hot := l.taken(t); flash != 0 || hot != 0 {
		t.Errorf("%d bytes of flash and %d of NVRAM are not free: %v", flash, hot, l.tree(t))
	}
}
