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
	"testing"

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
