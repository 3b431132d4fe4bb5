package store_test

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/loose"
	"github.com/flic-migrate/flic-migrate/tier/nvram"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// What somebody else puts before an image.
const theirs, unfinished = "their header|", "their head"

func skip(r io.Reader) (int64, error) {
	b := make([]byte, len(theirs))
	n, _ := io.ReadFull(r, b)
	switch string(b[:n]) {
	case theirs:
		return int64(n), nil
	case unfinished:
		return 0, errors.New("not finished")
	}
	return 0, nil
}

// looseLab is a store whose loose images have a file and an extent of NVRAM each.
type looseLab struct {
	st    *store.Store
	dir   string
	nvram string
}

func newLooseLab(t *testing.T) *looseLab {
	t.Helper()
	dir := t.TempDir()
	st, err := store.Open(context.Background(), vfs.OS, filepath.Join(dir, "store"), true)
	if err != nil {
		t.Fatal(err)
	}
	st.LooseHeader = skip
	return &looseLab{st, dir, filepath.Join(dir, "nvram")}
}

// begin starts the save of a file, and reserves NVRAM for it.
func (l *looseLab) begin(t *testing.T, path string) *store.Tx {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if _, err := f.WriteString(theirs); err != nil {
		t.Fatal(err)
	}
	p, err := l.st.BeginLoose(context.Background(), loose.NewOut(f, 1<<20), path)
	if err != nil {
		t.Fatal(err)
	}
	w, err := image.NewWriter(p.Image(), image.Header{PageSize: 4096, SegmentPages: 4, UUID: p.UUID(), Created: time.Now()}, image.None, 1)
	if err == nil {
		var meta, id []byte
		m := checkpoint.Meta{Identity: checkpoint.Identity{UUID: p.UUID(), PageSize: 4096}}
		if meta, id, err = m.Documents(); err == nil {
			err = w.Finish(meta, id)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := p.Reserve(context.Background(), store.Reservation{Path: l.nvram, Volatile: true, Bytes: 4096, PageSize: 4096}); err != nil {
		t.Fatal(err)
	}
	return p
}

func (l *looseLab) save(t *testing.T, path string) uuid.UUID {
	t.Helper()
	p := l.begin(t, path)
	if _, err := p.Commit(context.Background()); err != nil {
		t.Fatal(err)
	}
	return p.UUID()
}

// owns tells whether an image still has its NVRAM.
func (l *looseLab) owns(t *testing.T, id uuid.UUID) bool {
	t.Helper()
	n, err := nvram.Open(t.Context(), vfs.OS, l.nvram, nvram.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	owners, err := n.Owners(t.Context(), l.st.UUID())
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range owners {
		if o.UUID == id {
			return true
		}
	}
	return false
}

func (l *looseLab) gc(t *testing.T, grace time.Duration) store.GCReport {
	t.Helper()
	rep, err := l.st.GCAfter(context.Background(), grace, store.StagedFor)
	if err != nil {
		t.Fatal(err)
	}
	return rep
}

func (l *looseLab) restored(t *testing.T, id uuid.UUID, path string) {
	t.Helper()
	done, err := l.st.UseLoose(context.Background(), id, path)
	if err == nil {
		err = done(true)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestLoose: the hot pages of a file outside of the store are there as long as
// the file is, under whatever name, and are given away when it is gone.
func TestLoose(t *testing.T) {
	l := newLooseLab(t)
	path := filepath.Join(l.dir, "a.save")
	under := func(f func(id uuid.UUID)) {
		t.Helper()
		id := l.save(t, path)
		f(id)
		for _, name := range []string{path, path + ".moved", path + ".link"} {
			os.Remove(name)
		}
		l.gc(t, 0)
		if l.owns(t, id) {
			t.Error("after the end it has its NVRAM")
		}
		if list, err := l.st.Loose(context.Background()); err != nil || len(list) != 0 {
			t.Errorf("%v, %v", list, err)
		}
	}
	keeps := func(id uuid.UUID, what string) {
		t.Helper()
		for range 2 {
			if rep := l.gc(t, 0); !l.owns(t, id) || rep.GoneFiles != 0 || len(rep.Warnings) != 0 {
				t.Errorf("%s: it has lost its NVRAM, or %+v", what, rep)
			}
		}
	}
	under(func(id uuid.UUID) { keeps(id, "there") })
	under(func(id uuid.UUID) { l.restored(t, id, path); keeps(id, "there and restored") })
	under(func(id uuid.UUID) {
		if err := os.Rename(path, path+".moved"); err != nil {
			t.Fatal(err)
		}
		if os.Geteuid() == 0 {
			keeps(id, "renamed")
		}
		l.restored(t, id, path+".moved")
		keeps(id, "renamed and restored")
	})
	under(func(id uuid.UUID) {
		if err := os.Link(path, path+".link"); err != nil {
			t.Fatal(err)
		}
		os.Remove(path)
		if os.Geteuid() == 0 {
			keeps(id, "a link is left")
		}
	})
	// Gone, never restored: kept for the grace period from when it was noticed.
	under(func(id uuid.UUID) {
		os.Remove(path)
		for range 2 {
			if rep := l.gc(t, time.Hour); !l.owns(t, id) || rep.GoneFiles != 1 {
				t.Errorf("in the grace period: %+v", rep)
			}
		}
		// It comes back from another file system.
		other := filepath.Join(l.dir, "other.save")
		moved := l.save(t, other)
		l.restored(t, id, other)
		if rep := l.gc(t, time.Hour); rep.GoneFiles != 0 && l.owns(t, id) {
			t.Errorf("a file with another image counts: %+v", rep)
		}
		os.Remove(other)
		l.gc(t, 0)
		if l.owns(t, moved) {
			t.Error("the other one has its NVRAM")
		}
	})
	// Gone after a restore: a managed save that was started.
	under(func(id uuid.UUID) {
		l.restored(t, id, path)
		os.Remove(path)
		if rep := l.gc(t, time.Hour); l.owns(t, id) || rep.NVRAMExtents != 1 {
			t.Errorf("restored and gone: %+v", rep)
		}
	})
	// The same file with the next state in it.
	under(func(id uuid.UUID) {
		next := l.save(t, path)
		l.gc(t, 0)
		if l.owns(t, id) || !l.owns(t, next) {
			t.Error("overwritten: the wrong one has NVRAM")
		}
	})
}

// TestLooseUnfinished: a save that was killed leaves nothing, one under way
// loses nothing, and neither does a restore.
func TestLooseUnfinished(t *testing.T) {
	l := newLooseLab(t)
	path := filepath.Join(l.dir, "a.save")
	p := l.begin(t, path)
	os.Remove(path)
	l.gc(t, 0)
	if !l.owns(t, p.UUID()) {
		t.Error("a save under way has lost its NVRAM")
	}
	p.Abort()
	if list, _ := l.st.Loose(context.Background()); len(list) != 0 {
		t.Errorf("after an abort: %v", list)
	}
	if l.gc(t, time.Hour); l.owns(t, p.UUID()) {
		t.Error("an aborted save has its NVRAM")
	}

	id := l.save(t, path)
	done, err := l.st.UseLoose(context.Background(), id, path)
	if err != nil {
		t.Fatal(err)
	}
	os.Remove(path)
	if l.gc(t, 0); !l.owns(t, id) {
		t.Error("a restore has lost its NVRAM")
	}
	if err := done(false); err != nil {
		t.Error(err)
	}
	if l.gc(t, 0); l.owns(t, id) {
		t.Error("after the restore it has its NVRAM")
	}
	if done, err := l.st.UseLoose(context.Background(), uuid.New(), path); err != nil || done(true) != nil {
		t.Errorf("an image that nobody knows: %v", err)
	}
}

// TestLooseTogether: of several restores of one image each keeps its hot pages until it has
// ended, whichever ends first, and also of one that an earlier flic-migrate has saved.
func TestLooseTogether(t *testing.T) {
	l := newLooseLab(t)
	path := filepath.Join(l.dir, "a.save")
	locks := func() []string {
		t.Helper()
		list, err := filepath.Glob(filepath.Join(l.dir, "store/loose/*.lock"))
		if err != nil {
			t.Fatal(err)
		}
		return list
	}
	use := func(id uuid.UUID) func(bool) error {
		t.Helper()
		done, err := l.st.UseLoose(t.Context(), id, path)
		if err != nil {
			t.Fatal(err)
		}
		return done
	}
	for _, earlier := range []bool{false, true} {
		id := l.save(t, path)
		if earlier {
			for _, name := range locks() {
				if err := os.Remove(name); err != nil {
					t.Fatal(err)
				}
			}
		}
		a, b := use(id), use(id)
		if err := a(true); err != nil {
			t.Error(err)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		if l.gc(t, 0); !l.owns(t, id) {
			t.Errorf("earlier %v: the second restore has lost its NVRAM when the first ended", earlier)
		}
		if err := b(false); err != nil {
			t.Error(err)
		}
		if l.gc(t, time.Hour); l.owns(t, id) {
			t.Errorf("earlier %v: after both it has its NVRAM", earlier)
		}
		if list := locks(); len(list) != 0 {
			t.Errorf("earlier %v: left: %v", earlier, list)
		}
	}
	// A process was killed when it had removed an entry and not its lock.
	left := filepath.Join(l.dir, "store/loose", uuid.NewString()+".lock")
	if err := os.WriteFile(left, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if l.gc(t, 0); len(locks()) != 0 {
		t.Errorf("left: %v", locks())
	}
}

// TestLooseDoubt: where nothing can be known nothing is given away.
func TestLooseDoubt(t *testing.T) {
	l := newLooseLab(t)
	sub := filepath.Join(l.dir, "sub")
	if err := os.Mkdir(sub, 0o700); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(sub, "a.save")
	id := l.save(t, path)
	if err := os.Rename(sub, sub+"2"); err != nil {
		t.Fatal(err)
	}
	if rep := l.gc(t, 0); os.Geteuid() == 0 && (!l.owns(t, id) || len(rep.Warnings) != 0) {
		t.Errorf("its directory was renamed: %+v", rep)
	}
	if err := os.Rename(sub+"2", sub); err != nil {
		t.Fatal(err)
	}
	// libvirt has begun to write it anew.
	if err := os.WriteFile(path, []byte(unfinished), 0o600); err != nil {
		t.Fatal(err)
	}
	if rep := l.gc(t, 0); !l.owns(t, id) || len(rep.Warnings) != 1 {
		t.Errorf("an unfinished file: %+v", rep)
	}
	// A damaged entry stops gc.
	entries, err := filepath.Glob(filepath.Join(l.dir, "store/loose/*.json"))
	if err != nil || len(entries) != 1 {
		t.Fatal(entries, err)
	}
	b, err := os.ReadFile(entries[0])
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)/2] ^= 1
	if err := os.WriteFile(entries[0], b, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := l.st.GC(context.Background()); !integrity.IsCorrupt(err) {
		t.Errorf("gc with a damaged entry: %v", err)
	}
	if !l.owns(t, id) {
		t.Error("its NVRAM was given away")
	}
	if _, err := l.st.BeginLoose(context.Background(), nil, filepath.Join(l.dir, "missing")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a file that is not there: %v", err)
	}
}
