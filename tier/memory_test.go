package tier_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/dedup"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/restore"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// The memory that a save and a restore take is measured in processes of their
// own: the test binary, which does what this variable says.
const childEnv = "FLIC_TEST_TIER_CHILD"

// job is what a child does.
type job struct {
	Verb    string // "save" or "restore"
	Dir     string
	Options tiertest.Options
	Hot     uint64 // each Hot-th page is hot; 0: none
	// Then is what the guest has become, which is saved a second time, with the first
	// as its parent; nil: it is not.
	Then *tiertest.Options
	Held bool // it is held, for as long as it has something to prepare
}

// done is what a child tells.
type done struct {
	Peak    int64 // VmHWM in bytes
	Seconds float64
	Report  checkpoint.Report
}

func runChild(doc string) error {
	debug.SetGCPercent(25) // as the command does
	var j job
	if err := json.Unmarshal([]byte(doc), &j); err != nil {
		return err
	}
	st, err := store.Open(context.Background(), vfs.OS, filepath.Join(j.Dir, "store"), true)
	if err != nil {
		return err
	}
	s := tiertest.New(j.Options)
	start := time.Now()
	var d done
	switch j.Verb {
	case "save":
		o := save.Options{VM: "vm", Codec: image.LZ4, Energy: dedup.EnergyFull}
		if j.Hot > 0 {
			o.NVRAM, o.VolatileNVRAM = filepath.Join(j.Dir, "nvram.img"), true
			if o.WorkingSet, err = newHotSet(s, every(j.Hot)); err != nil {
				return err
			}
		}
		if j.Held {
			o.Hold = &save.Hold{Wait: func(context.Context) (string, error) { return "running", idle() }}
		}
		r := s.Reader()
		defer r.Close()
		_, meta, err := save.Run(context.Background(), vfs.OS, st, r, o)
		if err != nil {
			return err
		}
		d.Report = meta.Report
	case "restore":
		c, err := st.OpenCheckpoint(context.Background(), store.Ref{VM: "vm"}, checkpoint.Options{})
		if err != nil {
			return err
		}
		defer c.Close()
		r := s.Expected()
		defer r.Close()
		cmp := &tiertest.Compare{R: r}
		if _, err := restore.Run(context.Background(), c.Checkpoint, cmp, restore.Options{}); err != nil {
			return err
		}
		if err := cmp.Close(); err != nil {
			return err
		}
	}
	d.Seconds = time.Since(start).Seconds()
	if d.Peak, err = peak(); err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(d)
}

// idle waits until this process has nothing to do any more.
func idle() error {
	var u syscall.Rusage
	for last := time.Duration(-1); ; time.Sleep(300 * time.Millisecond) {
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
			return err
		}
		cpu := time.Duration(u.Utime.Nano() + u.Stime.Nano())
		if cpu-last < 10*time.Millisecond {
			return nil
		}
		last = cpu
	}
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

// child runs a job in a process of its own.
func child(t *testing.T, j job) done {
	t.Helper()
	doc, err := json.Marshal(j)
	if err != nil {
		t.Fatal(err)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), childEnv+"="+string(doc))
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v: %s", j.Verb, err, stderr.String())
	}
	var d done
	if err := json.Unmarshal(out, &d); err != nil {
		t.Fatalf("%s: %v: %s", j.Verb, err, out)
	}
	return d
}

// limit is the promised most: 64 MiB and 32 bytes a page. The race detector
// takes up to nine times what it watches for itself.
func limit(o tiertest.Options) int64 {
	var ram uint64
	for _, b := range o.Blocks {
		ram += b.Size
	}
	n := 64<<20 + int64(ram/4096)*32
	if raceDetector() {
		n *= 10
	}
	return n
}

// raceDetector tells whether this is a build for it, which is ten times slower:
// guests are smaller then.
func raceDetector() bool {
	info, ok := debug.ReadBuildInfo()
	return ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}

func withRAM(o tiertest.Options, size uint64) tiertest.Options {
	if raceDetector() {
		size /= 8
	}
	o.Blocks = []tiertest.Block{{Name: "pc.ram", Size: size - 16<<20}, {Name: "vga.vram", Size: 16 << 20}}
	return o
}

// TestMemory saves and restores guests of up to 4 GiB within the promised
// memory, whatever their pages are: many different ones fill the index of
// partial hashes, pairs of equal ones that of full hashes, hot ones the NVRAM
// part.
func TestMemory(t *testing.T) {
	later := func(o tiertest.Options) *tiertest.Options {
		o.Passes, o.Resend = o.Passes+1, 0.3
		return &o
	}
	data := withRAM(tiertest.Options{Mix: tiertest.Mix{tiertest.Zero: 1, tiertest.Sparse: 1, tiertest.Text: 1}, Passes: 1}, 512<<20)
	for name, c := range map[string]struct {
		o    tiertest.Options
		hot  uint64
		then *tiertest.Options
		held bool
	}{
		"increment":         {data, 0, later(data), false},
		"increment, held":   {data, 0, later(data), true},
		"increment, hot":    {data, 4, later(data), false},
		"zero and repeated": {withRAM(tiertest.Options{Mix: tiertest.Mix{tiertest.Zero: 90, tiertest.ZeroData: 2, tiertest.Duplicate: 8}, Pool: 1000}, 4<<30), 0, nil, false},
		"half different":    {withRAM(tiertest.Options{Mix: tiertest.Mix{tiertest.Zero: 1, tiertest.Sparse: 1}}, 512<<20), 0, nil, false},
		"live":              {withRAM(tiertest.Options{Mix: tiertest.Mix{tiertest.Zero: 6, tiertest.Sparse: 3, tiertest.Duplicate: 1}, Passes: 3, Resend: 0.1, XBZRLE: true}, 512<<20), 10, nil, false},
		"all hot":           {withRAM(tiertest.Options{Mix: tiertest.Mix{tiertest.Zero: 3, tiertest.Sparse: 1}}, 1<<30), 1, nil, false},
		"pairs":             {withRAM(tiertest.Options{Mix: tiertest.Mix{tiertest.Zero: 1, tiertest.Duplicate: 1}, Pool: 30000}, 512<<20), 0, nil, false},
	} {
		t.Run(name, func(t *testing.T) {
			j := job{Verb: "save", Dir: t.TempDir(), Options: c.o, Hot: c.hot}
			verbs := []string{"save", "restore"}
			if j.Then = c.then; j.Then != nil {
				child(t, j)
				j.Options, j.Verb = *j.Then, "save"
			}
			if j.Held = c.held; j.Held {
				// What has changed in its parent is what is kept.
				child(t, job{Verb: j.Verb, Dir: j.Dir, Options: j.Options})
				j.Options.Passes++
			}
			for _, j.Verb = range verbs {
				d := child(t, j)
				if j.Then != nil && j.Verb == "save" && (d.Report.Unchanged == 0 || d.Report.Delta == 0) {
					t.Errorf("%d pages unchanged, %d deltas", d.Report.Unchanged, d.Report.Delta)
				}
				t.Logf("%s: %.1f MiB of %.1f, %.1f s", j.Verb, mib(d.Peak), mib(limit(c.o)), d.Seconds)
				if d.Peak > limit(c.o) {
					t.Errorf("%s took %.1f MiB, promised are %.1f", j.Verb, mib(d.Peak), mib(limit(c.o)))
				}
			}
		})
	}
}

func mib(n int64) float64 { return float64(n) / (1 << 20) }

// largeEnv asks for TestLarge to be run at full size.
const largeEnv = "FLIC_TEST_LARGE"

// TestLarge compares a guest with one of four times its size: time and memory
// may grow as the pages do, and no faster. With FLIC_TEST_LARGE=1 these are of
// 16 and 64 GiB, otherwise a sixteenth of that.
func TestLarge(t *testing.T) {
	small := uint64(1 << 30)
	if os.Getenv(largeEnv) != "" {
		small = 16 << 30
	}
	o := tiertest.Options{Mix: tiertest.Mix{tiertest.Zero: 80, tiertest.ZeroData: 5, tiertest.Duplicate: 15}, Pool: 5000}
	var figures [2]map[string]done
	for i, size := range []uint64{small, 4 * small} {
		figures[i] = map[string]done{}
		j := job{Dir: t.TempDir(), Options: withRAM(o, size)}
		for _, j.Verb = range []string{"save", "restore"} {
			d := child(t, j)
			figures[i][j.Verb] = d
			t.Logf("%s of %d GiB: %.1f MiB (promised %.1f), %.2f s", j.Verb, size>>30, mib(d.Peak), mib(limit(j.Options)), d.Seconds)
			if d.Peak > limit(j.Options) {
				t.Errorf("%s of %d GiB took %.1f MiB", j.Verb, size>>30, mib(d.Peak))
			}
		}
	}
	for _, verb := range []string{"save", "restore"} {
		a, b := figures[0][verb], figures[1][verb]
		grown, pages := b.Peak-a.Peak, int64(3*small/4096)
		if grown > 32*pages {
			t.Errorf("%s: %.1f bytes for each further page", verb, float64(grown)/float64(pages))
		}
		// Time is noisy where it is short; what must not pass is a square.
		if b.Seconds > 8*a.Seconds+1 {
			t.Errorf("%s: %.2f s, of four times the size %.2f s", verb, a.Seconds, b.Seconds)
		}
	}
}

// childMain is TestMain of a child.
func childMain(doc string) int {
	if err := runChild(doc); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}
