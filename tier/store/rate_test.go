package store_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
	"github.com/flic-migrate/flic-migrate/tier/vfs/crashfs"
)

// A rate is measured once and kept; what is damaged or old is measured again.
func TestFlashRate(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "store")
	s, err := store.Open(context.Background(), vfs.OS, dir, true)
	if err != nil {
		t.Fatal(err)
	}
	first, err := s.FlashRate(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	// 1 MB/s is a slow card, 1 TB/s no memory.
	if first.BytesPerSecond < 1e6 || first.BytesPerSecond > 1e12 || time.Since(first.Measured) > time.Minute {
		t.Errorf("%+v", first)
	}
	t.Logf("%.0f MB/s", first.BytesPerSecond/1e6)
	if left, err := os.ReadDir(filepath.Join(dir, "tmp")); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	if again, err := s.FlashRate(t.Context()); err != nil || again != first {
		t.Errorf("%+v, then %+v, %v", first, again, err)
	}
	name := filepath.Join(dir, "flash-rate.json")
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	for i := range b {
		b[i] ^= 1
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
		b[i] ^= 1
		if i%40 != 0 {
			continue // each measures
		}
		if r, err := s.FlashRate(t.Context()); err != nil || r.BytesPerSecond == first.BytesPerSecond {
			t.Errorf("byte %d flipped: %+v, %v", i, r, err)
		}
	}
	// It is none of GC's business.
	if _, err := s.GC(context.Background()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(name); err != nil {
		t.Error(err)
	}
}

func TestFlashRateFails(t *testing.T) {
	fsys := crashfs.New(0)
	s, err := store.Open(context.Background(), fsys, "/store", true)
	if err != nil {
		t.Fatal(err)
	}
	gone := errors.New("gone")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(gone)
	if _, err := s.FlashRate(ctx); !errors.Is(err, gone) {
		t.Errorf("cancelled: %v", err)
	}
	small := crashfs.New(1 << 20)
	if s, err = store.Open(context.Background(), small, "/store", true); err != nil {
		t.Fatal(err)
	}
	if _, err := s.FlashRate(t.Context()); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("full: %v", err)
	}
	if left, err := small.ReadDir("/store/tmp"); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}
