package nvram

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/vfs"
	"github.com/flic-migrate/flic-migrate/tier/vfs/crashfs"
)

// model is what the stores know: the checkpoints that are committed, with what
// their flash images say of the NVRAM file. It is kept outside the disk, and so
// plays a store whose commit is one atomic step.
type model map[uuid.UUID]committed

type committed struct {
	store   uuid.UUID
	extents []uint32
	slots   int
}

func (m model) live(id uuid.UUID) bool { _, ok := m[id]; return ok }

// save is what a store does for one checkpoint.
func (m model) save(f *File, id, store uuid.UUID, extents int64, slots int, commit bool) error {
	r, err := f.Reserve(ctx, id, store, extents*small.extentSize, page)
	if err != nil {
		return err
	}
	err = func() error {
		if r.Slots() < slots {
			return fmt.Errorf("%d slots of %d", r.Slots(), slots)
		}
		if err := fill(r, slots); err != nil {
			return err
		}
		// Once more, as a live migration does.
		if err := r.Write(0, make([]byte, page)); err != nil {
			return err
		}
		if err := r.Write(0, content(id, 0, page)); err != nil {
			return err
		}
		if err := r.Trim(ctx, slots); err != nil {
			return err
		}
		return r.Sync()
	}()
	if err != nil || !commit {
		return errors.Join(err, r.Release(ctx))
	}
	m[id] = committed{store, r.Extents(), slots}
	return r.Close()
}

// workload is the life of an NVRAM file of two stores. It goes on after an
// error, as long as its process lives, and returns all errors.
func (m model) workload(fsys vfs.FS) error {
	var errs []error
	note := func(err error) { errs = append(errs, err) }
	session := func(o Options, fn func(f *File)) {
		o.Create = true
		f, err := open(ctx, fsys, "/dir/nvram", o, small)
		note(err)
		if err == nil {
			fn(f)
			note(f.Close())
		}
	}
	session(Options{Capacity: 30 * small.extentSize}, func(f *File) {
		note(m.save(f, owner(1), storeA, 6, 18, true)) // one extent is trimmed
		note(m.save(f, owner(2), storeB, 14, 54, true))
		note(m.save(f, owner(3), storeA, 4, 16, false))
	})
	session(Options{Capacity: 60 * small.extentSize}, func(f *File) {
		delete(m, owner(1))
		_, err := f.FreeOwner(ctx, owner(1))
		note(err)
		note(m.save(f, owner(4), storeA, 22, 81, true)) // takes what was freed, and grows
		// A save that is killed later: it never ends.
		if r, err := f.Reserve(ctx, owner(5), storeA, 3*small.extentSize, page); err == nil {
			note(fill(r, 10))
		} else {
			note(err)
		}
		note(m.save(f, owner(6), storeB, 2, 8, true))
		delete(m, owner(2))
		_, err = f.Sweep(ctx, storeB, m.live)
		note(err)
		_, err = f.Sweep(ctx, storeA, m.live)
		note(err)
		note(m.save(f, owner(7), storeB, 5, 20, true))
	})
	return errors.Join(errs...)
}

// checkDisk opens what a crash has left, and says what is wrong with it.
func (m model) checkDisk(fsys vfs.FS) error {
	f, err := open(ctx, fsys, "/dir/nvram", Options{Create: true}, small)
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	defer f.Close()
	verifyAll := func(when string) error {
		taken := map[uint32]uuid.UUID{}
		for id, c := range m {
			if err := verify(f, id, c.extents, c.slots, page); err != nil {
				return fmt.Errorf("%s: %w", when, err)
			}
			for _, e := range c.extents {
				if other, ok := taken[e]; ok {
					return fmt.Errorf("%s: extent %d is both %v's and %v's", when, e, id, other)
				}
				taken[e] = id
			}
		}
		return nil
	}
	if err := verifyAll("after the crash"); err != nil {
		return err
	}
	for _, store := range []uuid.UUID{storeA, storeB} {
		if _, err := f.Sweep(ctx, store, m.live); err != nil {
			return err
		}
	}
	if damage, err := f.Check(ctx); err != nil || len(damage) > 0 {
		return fmt.Errorf("Check after Sweep: %v, %v", damage, err)
	}
	if err := m.small(f); err != nil {
		return err
	}
	// Exactly the committed are left, with exactly their extents.
	owners, err := f.Owners(ctx, uuid.Nil)
	if err != nil {
		return err
	}
	want := 0
	for _, o := range owners {
		c, ok := m[o.UUID]
		if !ok || c.store != o.Store || len(c.extents) != o.Extents {
			return fmt.Errorf("after Sweep %v has %d extents, committed %v with %d", o.UUID, o.Extents, ok, len(c.extents))
		}
	}
	for _, c := range m {
		want += len(c.extents)
	}
	if len(owners) > len(m) {
		return fmt.Errorf("%d owners, %d committed", len(owners), len(m))
	}
	// Everything else can be used, and using it hurts nobody.
	now, err := f.extents()
	if err != nil {
		return err
	}
	f.limit = now + 20 // into the next group, at least
	r, err := f.Reserve(ctx, owner(100), storeA, 1000*small.extentSize, page)
	if err != nil {
		return err
	}
	defer r.Release(ctx)
	bound := int(f.bound(0))
	if got := len(r.extents); got != bound-(bound+15)/16-want {
		return fmt.Errorf("%d extents free of a file of %d with %d taken", got, bound, want)
	}
	if err := fill(r, r.Slots()); err != nil {
		return err
	}
	if err := r.Sync(); err != nil {
		return err
	}
	return verifyAll("after all the rest was written")
}

// small says what is wrong with the disk space that a file takes after a sweep: it
// has the extents of the committed, the first extent, and the tables in use.
func (m model) small(f *File) error {
	want := map[uint32]bool{0: true}
	last := uint32(0)
	for _, c := range m {
		for _, e := range c.extents {
			want[e], want[e/16*16] = true, true
			last = max(last, e)
		}
	}
	for table := uint32(0); table < last; table += 16 {
		want[table] = true
	}
	blocks, size := must(f.f.Allocated()), must(f.f.Size())
	if most := int64(len(want)) * small.extentSize; blocks > most {
		return fmt.Errorf("%d bytes of disk space, want %d at most", blocks, most)
	}
	if end := int64(last+1) * small.extentSize; size > end {
		return fmt.Errorf("file of %d bytes, the last extent in use ends at %d", size, end)
	}
	return nil
}

func newDisk() *crashfs.FS {
	fsys := crashfs.New(0)
	check(fsys.MkdirAll("/dir"))
	return fsys
}

// countOps runs the workload without a fault.
func countOps(t *testing.T) []crashfs.Op {
	fsys := newDisk()
	before := len(fsys.Ops())
	m := model{}
	if err := m.workload(fsys); err != nil {
		t.Fatal(err)
	}
	if len(m) != 3 {
		t.Fatalf("%d committed", len(m))
	}
	ops := fsys.Ops()[before:]
	if err := m.checkDisk(fsys); err != nil {
		t.Fatal(err)
	}
	return ops
}

// TestKilledAtEveryOperation ends the process, or the power, at each write,
// sync and allocation.
func TestKilledAtEveryOperation(t *testing.T) {
	ops := countOps(t)
	seen := map[crashfs.Kind]int{}
	for n, op := range ops {
		seen[op.Kind]++
		fsys := newDisk()
		fsys.KillAt(n)
		m := model{}
		if err := m.workload(fsys); !errors.Is(err, crashfs.ErrKilled) {
			t.Fatalf("killed at %d, %v: %v", n, op, err)
		}
		for i := range 3 {
			seed := uint64(3*n + i)
			if err := m.checkDisk(fsys.CrashClone(seed)); err != nil {
				t.Fatalf("power cut at operation %d, %v, seed %d: %v", n, op, seed, err)
			}
		}
		if err := m.checkDisk(fsys.Fork()); err != nil {
			t.Fatalf("killed at operation %d, %v: %v", n, op, err)
		}
	}
	t.Logf("%d operations: %v", len(ops), seen)
	for _, k := range []crashfs.Kind{crashfs.Create, crashfs.Write, crashfs.Sync, crashfs.MapSync, crashfs.Allocate, crashfs.SyncDir, crashfs.Punch, crashfs.Truncate} {
		if seen[k] == 0 {
			t.Errorf("no %v in the workload", k)
		}
	}
}

// TestFailedOperations makes each operation fail once, and each and all that
// follow, with the process living on; then the power fails.
func TestFailedOperations(t *testing.T) {
	ops := countOps(t)
	for n, op := range ops {
		for name, arm := range map[string]func(*crashfs.FS){
			"EIO":          func(f *crashfs.FS) { f.FailAt(n, syscall.EIO) },
			"EIO for good": func(f *crashfs.FS) { f.FailFrom(n, syscall.EIO) },
			"full disk":    func(f *crashfs.FS) { f.FailFrom(n, syscall.ENOSPC) },
			"short write":  func(f *crashfs.FS) { f.ShortWriteAt(n) },
		} {
			fsys := newDisk()
			arm(fsys)
			m := model{}
			err := m.workload(fsys)
			// An advice or the clean-up after another error may be let go,
			// but nothing that fails first. On a full disk blocks may stay.
			if !errors.Is(err, syscall.EIO) && !errors.Is(err, syscall.ENOSPC) &&
				!((name == "full disk" || name == "short write") && op.Kind == crashfs.Punch) &&
				!(name == "full disk" && slices.Contains([]crashfs.Kind{crashfs.Map, crashfs.Lock, crashfs.SyncDir}, op.Kind)) {
				t.Fatalf("%s at operation %d, %v: %v", name, n, op, err)
			}
			fsys.Heal()
			if err := m.checkDisk(fsys.CrashClone(uint64(n))); err != nil {
				t.Fatalf("%s at operation %d, %v, power cut: %v", name, n, op, err)
			}
			if n%2 == 0 { // without a power cut there is less to go wrong
				continue
			}
			if err := m.checkDisk(fsys); err != nil {
				t.Fatalf("%s at operation %d, %v: %v", name, n, op, err)
			}
		}
	}
}

// TestCrashAfterCrash runs random workloads with a kill or a power cut in each,
// one after the other on the same file.
func TestCrashAfterCrash(t *testing.T) {
	for seed := range uint64(30) {
		rnd := rand.New(rand.NewPCG(seed, 0))
		fsys := newDisk()
		m := model{}
		next := 0
		for life := range 6 {
			fsys.KillAt(rnd.IntN(120))
			f, err := open(ctx, fsys, "/dir/nvram", Options{Create: true}, small)
			for err == nil {
				switch rnd.IntN(5) {
				case 0: // remove
					ids := slices.Collect(maps.Keys(m))
					if len(ids) == 0 {
						continue
					}
					slices.SortFunc(ids, func(a, b uuid.UUID) int { return slices.Compare(a[:], b[:]) })
					id := ids[rnd.IntN(len(ids))]
					delete(m, id)
					_, err = f.FreeOwner(ctx, id)
				case 1:
					_, err = f.Sweep(ctx, []uuid.UUID{storeA, storeB}[rnd.IntN(2)], m.live)
				default:
					next++
					n := 1 + rnd.IntN(12)
					err = m.save(f, owner(next), []uuid.UUID{storeA, storeB}[rnd.IntN(2)], int64(n), 1+rnd.IntN(n*smallSlots), rnd.IntN(3) > 0)
				}
			}
			if !errors.Is(err, crashfs.ErrKilled) {
				t.Fatalf("seed %d, life %d: %v", seed, life, err)
			}
			if rnd.IntN(2) == 0 {
				fsys = fsys.Fork()
			} else {
				fsys = fsys.CrashClone(rnd.Uint64())
			}
			// A look at a copy: the next life meets the file unswept.
			if err := m.checkDisk(fsys.CrashClone(0)); err != nil {
				t.Fatalf("seed %d, life %d: %v", seed, life, err)
			}
		}
	}
}

// TestFailedFormat fails each operation of making a file, and then uses the file
// after all. Headers of which the sync has failed are in the page cache, not on
// the disk: to believe them would lose every checkpoint at the next power cut.
func TestFailedFormat(t *testing.T) {
	for n := range 20 {
		fsys := newDisk()
		fsys.FailAt(n, syscall.EIO)
		f, err := open(ctx, fsys, "/dir/nvram", Options{Create: true}, small)
		fsys.Heal()
		if err == nil {
			if n < 8 {
				t.Errorf("operation %d of Open failed without an error", n)
			}
			check(f.Close())
		} else if _, err := fsys.Stat("/dir/nvram"); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("operation %d of Open failed, and the file is there: %v", n, err)
		}
		m := model{}
		f = must(open(ctx, fsys, "/dir/nvram", Options{Create: true}, small))
		check(m.save(f, owner(1), storeA, 3, 12, true))
		check(f.Close())
		for seed := range uint64(20) {
			if err := m.checkDisk(fsys.CrashClone(seed)); err != nil {
				t.Fatalf("operation %d of Open failed, seed %d: %v", n, seed, err)
			}
		}
	}
}

// TestUnmade has whoever has made a file, and could not format it, remove it while another
// process waits for its lock: that one must not put checkpoints into a file that is gone.
func TestUnmade(t *testing.T) {
	fsys := newDisk()
	made := must(fsys.Create("/dir/nvram"))
	check(made.Lock(ctx, vfs.Exclusive))
	opened := make(chan *File)
	go func() {
		f, err := open(ctx, fsys.Fork(), "/dir/nvram", Options{Create: true}, small)
		if err != nil {
			t.Error(err)
		}
		opened <- f
	}()
	time.Sleep(50 * time.Millisecond) // it has the file open
	check(fsys.Remove("/dir/nvram"))
	check(made.Unlock())
	check(made.Close())
	f := <-opened
	if f == nil {
		return
	}
	defer f.Close()
	there, err := open(ctx, fsys, "/dir/nvram", Options{ReadOnly: true}, small)
	if err != nil {
		t.Fatal(err)
	}
	defer there.Close()
	if there.UUID() != f.UUID() {
		t.Errorf("it has opened file %v, and there is %v", f.UUID(), there.UUID())
	}
}

// TestTornFormat: on persistent memory a header can reach the medium in any
// subset of its 8-byte words. Until all of them but the magic number are synced
// the magic number must not be written, and what there is must be blank.
func TestTornFormat(t *testing.T) {
	fsys := crashfs.New(0)
	w := &syncWatch{FS: fsys}
	f := must(open(ctx, w, "/nvram", Options{Create: true}, small))
	if len(w.synced) != 2 {
		t.Fatalf("%d syncs", len(w.synced))
	}
	for _, off := range []int{0, headerCopy} {
		first, last := w.synced[0][off:][:headerSize], w.synced[1][off:][:headerSize]
		if !bytes.Equal(first[:8], zeroEntry[:8]) || !bytes.Equal(first[8:], last[8:]) || !bytes.Equal(last[:8], magic[:]) {
			t.Errorf("header at %d is synced as %x and then as %x", off, first, last)
		}
	}
	check(f.Close())
	for mask := range 1 << 14 { // of the words behind the two magic numbers
		b := make([]byte, small.extentSize)
		for i := range 14 {
			if mask>>i&1 != 0 {
				off := 8 + i%7*8 + i/7*headerCopy
				copy(b[off:off+8], w.synced[0][off:])
			}
		}
		g := &File{path: "/nvram", f: memFile{b: b}}
		if err := g.mayFormat(ctx, errors.New("no header"), false, small); err != nil {
			t.Fatalf("words %014b: %v", mask, err)
		}
	}
}

// syncWatch keeps what a file's first bytes were at each Sync.
type syncWatch struct {
	vfs.FS
	synced [][]byte
}

func (w *syncWatch) Create(name string) (vfs.File, error) {
	f, err := w.FS.Create(name)
	return watchedFile{f, w}, err
}

type watchedFile struct {
	vfs.File
	w *syncWatch
}

func (f watchedFile) Sync() error {
	b := make([]byte, tableOffset)
	must(f.ReadAt(b, 0))
	f.w.synced = append(f.w.synced, b)
	return f.File.Sync()
}

// memFile is a file to read from.
type memFile struct {
	vfs.File
	b []byte
}

func (f memFile) Data(off int64) (int64, error) {
	if off >= int64(len(f.b)) {
		return 0, io.EOF
	}
	return off, nil
}

func (f memFile) ReadAt(b []byte, off int64) (int, error) {
	return bytes.NewReader(f.b).ReadAt(b, off)
}

// TestFailedReserve fails each operation of a reservation: nothing may be taken, neither
// extents nor disk blocks nor length, whether the file grows or has free extents with
// holes; and the same checkpoint can try again.
func TestFailedReserve(t *testing.T) {
	for n := range 12 {
		fsys := newDisk()
		f := must(open(ctx, fsys, "/dir/nvram", Options{Create: true}, small))
		if n%2 == 1 {
			first := must(f.Reserve(ctx, owner(2), storeA, 3*small.extentSize, page))
			last := must(f.Reserve(ctx, owner(3), storeA, small.extentSize, page))
			check(first.Release(ctx))
			defer last.Close()
		}
		before, length := must(f.f.Allocated()), must(f.f.Size())
		fsys.FailAt(n, syscall.EIO)
		r, err := f.Reserve(ctx, owner(1), storeA, 20*small.extentSize, page)
		fsys.Heal()
		if err == nil {
			if n < 8 {
				t.Errorf("operation %d failed without an error", n)
			}
			check(r.Release(ctx))
		}
		if owners := must(f.Owners(ctx, storeA)); len(owners) != n%2 {
			t.Errorf("operation %d failed: %+v is left", n, owners)
		}
		if now, size := must(f.f.Allocated()), must(f.f.Size()); now != before || size != length {
			t.Errorf("operation %d failed: the file has %d bytes in %d of disk blocks, and had %d in %d", n, size, now, length, before)
		}
		must(f.FreeOwner(ctx, owner(3)))
		m := model{}
		check(m.save(f, owner(1), storeA, 20, 80, true))
		check(f.Close())
		if err := m.checkDisk(fsys.CrashClone(uint64(n))); err != nil {
			t.Errorf("operation %d failed: %v", n, err)
		}
	}
}
