package lazy_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/stream/returnpath"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/lazy"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/tiertest/chain"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
	"github.com/flic-migrate/flic-migrate/tier/workingset"
)

// A restore whose memory is measured has a process of its own, this test binary
// once more: memoryEnv says where the store is.
const memoryEnv = "FLIC_LAZY_TEST_MEMORY"

// served is what such a process tells.
type served struct {
	Peak    int64 // VmHWM in bytes
	Seconds float64
	Report  lazy.Report
}

// serveMeasured restores lazily to a QEMU that reads as fast as it can, in a process
// that is tuned as the command's is.
func serveMeasured(dir string) error {
	debug.SetGCPercent(25)
	ctx := context.Background()
	st, err := store.Open(ctx, vfs.OS, dir, false)
	if err != nil {
		return err
	}
	c, err := st.OpenCheckpoint(ctx, store.Ref{VM: "vm"}, checkpoint.Options{})
	if err != nil {
		return err
	}
	defer c.Close()
	lazy.TuneProcess(c.Checkpoint)
	in, rp := io.Pipe()
	go func() {
		rp.Write(returnpath.AppendPong(nil, 3))
		// A page of each megabyte, so that the cache of demanded segments is full.
		for b := range c.Meta.Blocks {
			for p := uint64(0); p < c.Meta.BlockPages()[b]; p += 256 {
				rp.Write(returnpath.AppendReqPages(nil, c.Meta.Blocks[b].Name, p*4096, 4096))
			}
		}
	}()
	start := time.Now()
	rep, err := lazy.Serve(ctx, c.Checkpoint, in, io.Discard, lazy.Options{})
	if err != nil {
		return err
	}
	s := served{Seconds: time.Since(start).Seconds(), Report: *rep}
	if s.Peak, err = peak(); err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(s)
}

// peak is the most memory that this process has had resident, in bytes. Pages
// of mapped files count, so this is more than what it has taken for itself.
func peak() (int64, error) {
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(b), "VmHWM:")
	kb, _, _ := strings.Cut(strings.TrimSpace(rest), " ")
	n, err := strconv.ParseInt(kb, 10, 64)
	return n << 10, err
}

// raceDetector tells whether this is a build for it, which takes up to nine times
// what it watches for itself, and ten times as long.
func raceDetector() bool {
	info, ok := debug.ReadBuildInfo()
	return ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}

// TestMemory: 64 MiB and 32 bytes a page are enough, however the pages lie.
func TestMemory(t *testing.T) {
	const mib = 1 << 20
	for _, tc := range []struct {
		name string
		size uint64
		o    tiertest.Options
		hot  bool // all pages in NVRAM
		next bool // of a checkpoint that is made of them, scattered over both
	}{
		{"few runs", 4096 * mib, tiertest.Options{Mix: tiertest.Mix{tiertest.Zero: 95, tiertest.Text: 5}}, false, false},
		{"a run a page, scattered over the image", 4096 * mib, tiertest.Options{Mix: tiertest.Mix{tiertest.Duplicate: 1}, Pool: 30000}, false, false},
		{"in any order", 512 * mib, tiertest.Options{Mix: tiertest.Mix{tiertest.Text: 1}, Shuffle: true}, false, false},
		{"all hot", 1024 * mib, tiertest.Options{Mix: tiertest.Mix{tiertest.Zero: 1, tiertest.Sparse: 1}}, true, false},
		{"deltas and references, a run a page", 2048 * mib, tiertest.Options{Mix: tiertest.Mix{tiertest.Duplicate: 1}, Pool: 30000}, false, true},
		{"references to all of a large image", 1024 * mib, tiertest.Options{Mix: tiertest.Mix{tiertest.Sparse: 1}}, false, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if raceDetector() {
				tc.size /= 16
			}
			tc.o.Blocks = []tiertest.Block{{Name: "pc.ram", Size: tc.size - 16*mib}, {Name: "vga.vram", Size: 16 * mib}}
			dir := filepath.Join(t.TempDir(), "store")
			st, err := store.Open(t.Context(), vfs.OS, dir, true)
			check(t, err)
			s := tiertest.New(tc.o)
			o := save.Options{VM: "vm"}
			if tc.hot {
				var blocks []workingset.Block
				for b, blk := range s.Blocks() {
					blocks = append(blocks, workingset.Block{Name: blk.Name, Pages: int64(s.Pages(b))})
				}
				o.NVRAM, o.VolatileNVRAM = filepath.Join(dir, "..", "nvram"), true
				o.WorkingSet, err = workingset.New(s.PageSize(), blocks)
				check(t, err)
				for b := range s.Blocks() {
					for p := range s.Pages(b) {
						o.WorkingSet.SetHeat(b, int64(p), 1)
					}
				}
			}
			r := s.Reader()
			defer r.Close()
			ref, _, err := save.Run(t.Context(), vfs.OS, st, r, o)
			check(t, err)
			if tc.next {
				c, err := st.OpenCheckpoint(t.Context(), ref, checkpoint.Options{})
				check(t, err)
				ref, _, err = st.Copy(t.Context(), c, store.CopyOptions{Codec: image.MinLZ})
				check(t, err)
				check(t, c.Close())
				chain.Scatter(t, st, ref)
			}

			exe, err := os.Executable()
			check(t, err)
			cmd := exec.Command(exe)
			cmd.Env = append(os.Environ(), memoryEnv+"="+dir)
			var stderr bytes.Buffer
			cmd.Stderr = &stderr
			out, err := cmd.Output()
			if err != nil {
				t.Fatalf("%v: %s", err, stderr.String())
			}
			var got served
			check(t, json.Unmarshal(out, &got))
			most := int64(64*mib + 32*(tc.size/4096))
			if raceDetector() {
				most *= 10
			}
			t.Logf("%.1f MiB of %.1f, %.2f s: %+v", float64(got.Peak)/mib, float64(most)/mib, got.Seconds, got.Report)
			if got.Peak > most {
				t.Errorf("the restore took %.1f MiB, promised are %.1f", float64(got.Peak)/mib, float64(most)/mib)
			}
		})
	}
}

// memoryMain is TestMain of such a process.
func memoryMain(dir string) int {
	if err := serveMeasured(dir); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}
