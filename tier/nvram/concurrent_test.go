package nvram

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// busy has many goroutines save, verify and remove checkpoints of one store for
// a while. It leaves the last one of each goroutine and returns them.
func busy(f *File, store uuid.UUID, rounds int) (map[uuid.UUID][]uint32, error) {
	var mu sync.Mutex
	left := map[uuid.UUID][]uint32{}
	live := map[uuid.UUID]bool{}
	errs := make(chan error, 6)
	for g := range 6 {
		go func() {
			rnd := rand.New(rand.NewPCG(uint64(os.Getpid()), uint64(g)))
			errs <- func() error {
				for round := range rounds {
					id := uuid.New()
					mu.Lock()
					live[id] = true
					mu.Unlock()
					want := 1 + rnd.Int64N(12)
					r, err := f.Reserve(ctx, id, store, want*small.extentSize, page)
					if err != nil {
						return err
					}
					if int64(len(r.extents)) != want {
						return fmt.Errorf("%d extents of %d", len(r.extents), want)
					}
					if err := fill(r, r.Slots()); err != nil {
						return err
					}
					if rnd.IntN(3) == 0 {
						if err := r.Trim(ctx, r.Slots()/2); err != nil {
							return err
						}
					}
					slots, extents := r.Slots(), r.Extents()
					if err := errors.Join(r.Sync(), r.Close()); err != nil {
						return err
					}
					if err := verify(f, id, extents, slots, page); err != nil {
						return err
					}
					if round == rounds-1 {
						mu.Lock()
						left[id] = extents
						mu.Unlock()
						return nil
					}
					if rnd.IntN(2) == 0 {
						n, err := f.FreeOwner(ctx, id)
						if err != nil || n != len(extents) {
							return fmt.Errorf("freed %d of %d: %w", n, len(extents), err)
						}
						continue
					}
					// Leave it to a sweep, of this goroutine or another.
					mu.Lock()
					delete(live, id)
					mu.Unlock()
					if _, err := f.Sweep(ctx, store, func(id uuid.UUID) bool {
						mu.Lock()
						defer mu.Unlock()
						return live[id]
					}); err != nil {
						return err
					}
				}
				return nil
			}()
		}()
	}
	for range 6 {
		if err := <-errs; err != nil {
			return nil, err
		}
	}
	return left, nil
}

// TestTwoProcesses has two processes with six goroutines each at work in one
// file, from its creation on, each for a store of its own.
func TestTwoProcesses(t *testing.T) {
	const rounds = 12
	path := filepath.Join(t.TempDir(), "nvram")
	cmd := exec.Command(os.Args[0], "-test.run=^TestHelperProcess$")
	cmd.Env = append(os.Environ(), "NVRAM_TEST_FILE="+path)
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	f, err := open(ctx, vfs.OS, path, Options{Create: true}, small)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	left, err := busy(f, storeA, rounds)
	if err := cmd.Wait(); err != nil {
		t.Fatalf("other process: %v\n%s", err, out.String())
	}
	if err != nil {
		t.Fatal(err)
	}
	for id, extents := range left {
		if err := verify(f, id, extents, len(extents)*smallSlots, page); err != nil {
			t.Error(err)
		}
	}
	noDamage(t, f)
	if a, b := must(f.Owners(ctx, storeA)), must(f.Owners(ctx, storeB)); len(a) != 6 || len(b) != 6 {
		t.Errorf("%d and %d owners left", len(a), len(b))
	}
	// The file has never been larger than what was in use at the same time.
	if size := must(os.Stat(path)).Size(); size > 14*12*small.extentSize {
		t.Errorf("file has grown to %d extents", size/small.extentSize)
	}
}

// TestHelperProcess is the other process of TestTwoProcesses.
func TestHelperProcess(t *testing.T) {
	path := os.Getenv("NVRAM_TEST_FILE")
	if path == "" {
		return
	}
	f, err := open(ctx, vfs.OS, path, Options{Create: true}, small)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	left, err := busy(f, storeB, 12)
	if err != nil {
		t.Fatal(err)
	}
	for id, extents := range left {
		if err := verify(f, id, extents, len(extents)*smallSlots, page); err != nil {
			t.Error(err)
		}
	}
}

// slowPunch is a disk on which each Punch takes some time. It counts them.
type slowPunch struct {
	vfs.FS
	punched *atomic.Int64
}

func (s slowPunch) OpenRW(name string) (vfs.File, error) {
	f, err := s.FS.OpenRW(name)
	return slowPunchFile{f, s.punched}, err
}

type slowPunchFile struct {
	vfs.File
	punched *atomic.Int64
}

func (f slowPunchFile) Punch(off, n int64) error {
	time.Sleep(25 * time.Millisecond)
	f.punched.Add(1)
	return f.File.Punch(off, n)
}

// TestGivingBackLetsOthersIn: who removes a large checkpoint does not keep the lock
// from another process, which may have a stopped guest, until it is done. It ends,
// and touches no group but those of the checkpoint.
func TestGivingBackLetsOthersIn(t *testing.T) {
	const groups = 60
	path := filepath.Join(t.TempDir(), "nvram")
	other := must(open(ctx, vfs.OS, path, Options{Create: true}, small))
	defer other.Close()
	m := model{}
	check(m.save(other, owner(1), storeB, 2*(small.group-1), 8*15, true))
	check(must(other.Reserve(ctx, owner(3), storeA, groups*(small.group-1)*small.extentSize, page)).Close())
	check(m.save(other, owner(4), storeB, 2, 8, true)) // keeps the tail from being cut
	var punched atomic.Int64
	f := must(open(ctx, slowPunch{vfs.OS, &punched}, path, Options{}, small))
	defer f.Close()
	done := make(chan error, 1)
	go func() {
		_, err := f.FreeOwner(ctx, owner(3))
		done <- err
	}()
	for punched.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	must(other.Free(ctx))
	if n := punched.Load(); n >= groups {
		t.Errorf("the lock was free after %d groups of %d", n, groups)
	}
	check(<-done)
	if n := punched.Load(); n != groups {
		t.Errorf("%d holes punched, %d groups freed", n, groups)
	}
	for id, c := range m {
		check(verify(other, id, c.extents, c.slots, page))
	}
	noDamage(t, other)
}
