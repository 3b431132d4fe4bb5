package tier_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/flic-migrate/flic-migrate/stream"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/dedup"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/loose"
	"github.com/flic-migrate/flic-migrate/tier/restore"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

const before = "what somebody has written before the image"

// saveToPipe saves a stream into a pipe whose reader writes a file with
// something before the image, as libvirt's helper does.
func saveToPipe(t *testing.T, s *tiertest.Stream, window int, o save.Options) (string, *checkpoint.Meta, error) {
	t.Helper()
	name := filepath.Join(t.TempDir(), "file")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString(before); err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	copied := make(chan error)
	go func() { _, err := io.Copy(f, r); copied <- errors.Join(err, f.Close(), r.Close()) }()
	in := s.Reader()
	defer in.Close()
	meta, err := save.To(t.Context(), vfs.OS, nil, store.BeginFile(loose.NewOut(w, window)), in, o)
	w.Close()
	if err := <-copied; err != nil {
		t.Fatal(err)
	}
	return name, meta, err
}

// openLoose opens the image in such a file.
func openLoose(t *testing.T, name string) (*checkpoint.Checkpoint, error) {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if _, err := f.Seek(int64(len(before)), io.SeekStart); err != nil {
		t.Fatal(err)
	}
	in, err := loose.NewIn(t.Context(), f, nil, "")
	if err != nil {
		t.Fatal(err)
	}
	return checkpoint.Open(t.Context(), vfs.OS, in, checkpoint.Options{})
}

// TestSaveTo saves every shape of stream into a pipe and restores it from the
// file behind it, with all that was written at hand and with next to nothing.
func TestSaveTo(t *testing.T) {
	for name, so := range streams {
		for _, window := range []int{loose.DefaultWindow, 4 << 10} {
			for _, energy := range energies() {
				s := tiertest.New(so)
				file, meta, err := saveToPipe(t, s, window, save.Options{Energy: energy, SegmentPages: 4, Workers: 1, ReturnPath: &bytes.Buffer{}})
				if so.XBZRLE && errors.Is(err, loose.ErrGone) {
					if window == loose.DefaultWindow {
						t.Errorf("%s: %v", name, err)
					}
					continue // what the difference is to can't be had
				}
				if err != nil {
					t.Fatalf("%s, window %d, %s: %v", name, window, energy, err)
				}
				c, err := openLoose(t, file)
				if err != nil {
					t.Fatalf("%s: %v", name, err)
				}
				if err := c.Verify(t.Context(), func(err error) { t.Errorf("%s: %v", name, err) }); err != nil {
					t.Errorf("%s: verify: %v", name, err)
				}
				var out bytes.Buffer
				if _, err := restore.Run(t.Context(), c, &out, restore.Options{}); err != nil {
					t.Errorf("%s: restore: %v", name, err)
				}
				if !bytes.Equal(out.Bytes(), s.ExpectedBytes()) {
					t.Errorf("%s, window %d, %s: restored stream is another", name, window, energy)
				}
				if meta.NVRAM != nil || meta.Report.FlashBytes == 0 {
					t.Errorf("%s: report %+v", name, meta.Report)
				}
				c.Close()
			}
		}
	}
}

// TestSaveToWindow: duplicates are found again without their first copy at
// hand, from the second on.
func TestSaveToWindow(t *testing.T) {
	s := tiertest.New(tiertest.Options{Seed: 3, Blocks: []tiertest.Block{{Name: "pc.ram", Size: 16 << 20}},
		Mix: tiertest.Mix{tiertest.Random: 1, tiertest.Duplicate: 3}, Pool: 40})
	var found [2]int64
	for i, window := range []int{loose.DefaultWindow, 4 << 10} {
		_, meta, err := saveToPipe(t, s, window, save.Options{Energy: dedup.EnergyFull, Codec: image.None})
		if err != nil {
			t.Fatal(err)
		}
		found[i] = meta.Report.Duplicate
	}
	if found[1] > found[0] || found[1] < found[0]-40 || found[0] < 1000 {
		t.Errorf("%d duplicates with all at hand, %d without", found[0], found[1])
	}
}

// TestSaveToFails: what fails leaves no image that opens, and says what it was.
func TestSaveToFails(t *testing.T) {
	s := tiertest.New(tiertest.Options{Seed: 4})
	whole := s.Bytes()
	for _, n := range []int64{0, 3, 100, s.Layout().Tail / 2, s.Layout().Tail + 10, s.Layout().EOF - 1} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		image := make(chan []byte)
		go func() { b, _ := io.ReadAll(r); r.Close(); image <- b }()
		_, err = save.To(t.Context(), vfs.OS, nil, store.BeginFile(loose.NewOut(w, 1<<20)), bytes.NewReader(whole[:n]), save.Options{})
		w.Close()
		if !errors.Is(err, stream.ErrTruncated) && !errors.Is(err, stream.ErrNotStream) {
			t.Errorf("cut at %d: %v", n, err)
		}
		name := filepath.Join(t.TempDir(), "f")
		if err := os.WriteFile(name, append([]byte(before), <-image...), 0o600); err != nil {
			t.Fatal(err)
		}
		if c, err := openLoose(t, name); err == nil {
			c.Close()
			t.Errorf("cut at %d: the image opens", n)
		}
	}
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer full.Close()
	_, err = save.To(context.Background(), vfs.OS, nil, store.BeginFile(loose.NewOut(full, 1<<20)), bytes.NewReader(whole), save.Options{})
	if err == nil {
		t.Error("saved to a full device")
	}
}
