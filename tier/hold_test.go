package tier_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/stream"
	"github.com/flic-migrate/flic-migrate/stream/returnpath"
	"github.com/flic-migrate/flic-migrate/tier/progress"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/vfs/crashfs"
)

// heldStream is a guest with enough pages to be held, most of which have the
// shortest records there are.
func heldStream(passes int) *tiertest.Stream {
	return tiertest.New(tiertest.Options{
		Passes: passes, Resend: 0.02, ReturnPath: true,
		Blocks: []tiertest.Block{{Name: "pc.ram", Size: 64 << 20}, {Name: "rom", Size: 256 << 10}},
		Mix:    tiertest.Mix{tiertest.Zero: 60, tiertest.Text: 2, tiertest.Duplicate: 1, tiertest.Random: 1},
	})
}

// counter counts what is read.
type counter struct {
	io.Reader
	n int64
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.Reader.Read(p)
	c.n += int64(n)
	return n, err
}

// TestHold holds a save: more of pass 1 is left than what nobody reads has room for,
// and what comes after is the checkpoint, with its own time and run state.
func TestHold(t *testing.T) {
	for _, buffer := range []int{0, 16 << 10} {
		s := heldStream(3)
		pass1 := heldStream(1).Layout().Tail
		l := newLab(t, crashfs.New(0), "/")
		in := &counter{Reader: bytes.NewReader(s.Bytes())}
		var begun store.Ref
		var id uuid.UUID
		var held int64
		var went time.Time
		var answers bytes.Buffer
		ref, meta, err := l.run(t.Context(), in, save.Options{VM: "vm", ReturnPath: &answers, Hold: &save.Hold{
			Buffer: buffer,
			Begun:  func(r store.Ref, u uuid.UUID) error { begun, id = r, u; return nil },
			Wait: func(context.Context) (string, error) {
				held = in.n
				if left := pass1 - in.n; left < int64(buffer+32<<10) {
					t.Errorf("only %d bytes of the first pass are left, and %d have room", left, buffer+32<<10)
				}
				if len(l.tree(t)) == 0 || bytes.Contains(answers.Bytes(), returnpath.AppendShut(nil, 0)) {
					t.Error("a save that is held has answered, or has nothing")
				}
				time.Sleep(10 * time.Millisecond)
				went = time.Now()
				return "running", nil
			},
		}})
		if err != nil {
			t.Fatal(err)
		}
		if begun != ref || id != meta.UUID || held == 0 || held == in.n {
			t.Errorf("it was held at %d of %d bytes; %v %v has begun, and %v %v was saved", held, in.n, begun, id, ref, meta.UUID)
		}
		if meta.RunState != "running" || meta.Created.Before(went) || meta.Report.Seconds.Total > time.Since(went).Seconds() || meta.Report.Resent == 0 {
			t.Errorf("%+v", meta)
		}
		if !bytes.HasSuffix(answers.Bytes(), returnpath.AppendShut(nil, 0)) {
			t.Error("the source has not heard that all is well")
		}
		l.holds(t, ref, s)
		l.noLeaks(t)
	}
}

// TestHoldPrepares holds an increment. As long as it waits it reads what it will need, and looks
// for pages that it has; what comes then is the same whether there was time for that or not.
func TestHoldPrepares(t *testing.T) {
	at := func(passes int) *tiertest.Stream {
		return tiertest.New(tiertest.Options{
			Passes: passes, Resend: 0.3, Slide: 8 * (passes / 3), XBZRLE: true, ReturnPath: true,
			Blocks: []tiertest.Block{{Name: "pc.ram", Size: 64 << 20}, {Name: "rom", Size: 256 << 10}},
			Mix:    tiertest.Mix{tiertest.Zero: 12, tiertest.Text: 2, tiertest.Duplicate: 1, tiertest.Random: 1},
		})
	}
	var reads [2]int64
	for i := range reads {
		synctest.Test(t, func(t *testing.T) {
			l := newLab(t, crashfs.New(0), "/")
			l.save(t, at(1), save.Options{})
			l.save(t, at(2), save.Options{})
			s := at(4)
			var before int64
			ref, meta, err := l.run(t.Context(), bytes.NewReader(s.Bytes()), save.Options{VM: "vm", ReturnPath: io.Discard, Hold: &save.Hold{
				Wait: func(context.Context) (string, error) {
					if i == 1 {
						synctest.Wait()
					}
					before = l.fs.reads.Load()
					return "running", nil
				},
			}})
			if err != nil {
				t.Fatal(err)
			}
			reads[i] = l.fs.reads.Load() - before
			if r := meta.Report; r.Delta == 0 || r.Similar == 0 || r.Resent == 0 {
				t.Errorf("%d deltas, %d similar, %d pages came again", r.Delta, r.Similar, r.Resent)
			}
			l.holds(t, ref, s)
			l.noLeaks(t)
		})
	}
	if reads[1] >= reads[0]*4/5 {
		t.Errorf("after the hold it has read %d times, and %d times without it", reads[1], reads[0])
	}
}

// TestHoldAbsent holds a save of a guest half of whose pages never come, as is known
// beforehand and not told by the stream.
func TestHoldAbsent(t *testing.T) {
	o := tiertest.Options{
		Passes: 2, Resend: 0.02, ReturnPath: true,
		Blocks: []tiertest.Block{{Name: "pc.ram", Size: 64 << 20}, {Name: "0000:00:02.0/vm0", Size: 64 << 20, Shared: true}},
		Mix:    tiertest.Mix{tiertest.Zero: 60, tiertest.Text: 2, tiertest.Random: 1},
	}
	for _, absent := range []uint64{64 << 20, 80 << 20} {
		l := newLab(t, crashfs.New(0), "/")
		held := false
		ref, meta, err := l.run(t.Context(), bytes.NewReader(tiertest.New(o).Bytes()), save.Options{VM: "vm", ReturnPath: io.Discard, Hold: &save.Hold{
			Absent: absent,
			Wait:   func(context.Context) (string, error) { held = true; return "running", nil },
		}})
		if err != nil || !held || meta.Report.Resent == 0 {
			t.Fatalf("%d bytes: held is %v, %v, %+v", absent, held, err, meta)
		}
		l.holds(t, ref, tiertest.New(o))
	}
}

// TestHoldFails ends saves that can't be held, or are not to go on: they leave
// nothing, and the source hears of it.
func TestHoldFails(t *testing.T) {
	given := errors.New("given up")
	some := tiertest.Mix{tiertest.Zero: 1, tiertest.Absent: 1}
	large := []tiertest.Block{{Name: "m", Size: 48 << 20}}
	for name, c := range map[string]struct {
		o    tiertest.Options
		wait error
		want error
	}{
		"given up":       {tiertest.Options{Blocks: large, Mix: tiertest.Mix{tiertest.Zero: 1}}, given, given},
		"too small":      {tiertest.Options{Blocks: []tiertest.Block{{Name: "m", Size: 32 << 20}}, Mix: tiertest.Mix{tiertest.Zero: 1}}, nil, save.ErrTooSmall},
		"pages left out": {tiertest.Options{Blocks: large, Mix: some}, nil, save.ErrNotHeld},
		"another pass":   {tiertest.Options{Blocks: large, Mix: some, Passes: 2, Resend: 0.01}, nil, save.ErrNotHeld},
		"not counted":    {tiertest.Options{Blocks: large, Mix: tiertest.Mix{tiertest.Zero: 1}, IgnoreShared: true}, nil, save.ErrUncounted},
		"unknown":        {tiertest.Options{Blocks: large, Mix: tiertest.Mix{tiertest.Zero: 1}, Unknown: tiertest.Record}, nil, stream.ErrUnknown},
	} {
		t.Run(name, func(t *testing.T) {
			c.o.ReturnPath = true
			l := newLab(t, crashfs.New(0), "/")
			var answers bytes.Buffer
			_, _, err := l.run(t.Context(), bytes.NewReader(tiertest.New(c.o).Bytes()), save.Options{VM: "vm", ReturnPath: &answers, Hold: &save.Hold{
				Wait: func(context.Context) (string, error) {
					if c.wait == nil {
						t.Error("it was held")
					}
					return "", c.wait
				},
			}})
			if !errors.Is(err, c.want) {
				t.Errorf("%v, want %v", err, c.want)
			}
			if !bytes.HasSuffix(answers.Bytes(), returnpath.AppendShut(nil, 1)) {
				t.Error("the source has not heard of it")
			}
			nothingLeft(t, l)
		})
	}
}

// TestHoldRate reads the first pass no faster than it may, what comes after the hold
// as fast as it can, and does not wait for the clock when it is to hurry or to end.
func TestHoldRate(t *testing.T) {
	s := heldStream(2)
	b := s.Bytes()
	run := func(ctx context.Context, hurry chan struct{}) (held, all time.Duration, err error) {
		l := newLab(t, crashfs.New(0), "/")
		start := time.Now()
		_, _, err = l.run(ctx, bytes.NewReader(b), save.Options{VM: "vm", Progress: func(progress.State) {}, Hold: &save.Hold{
			Rate: 100_000, Hurry: hurry,
			Wait: func(context.Context) (string, error) {
				held = time.Since(start)
				return "running", nil
			},
		}})
		return held, time.Since(start), err
	}
	synctest.Test(t, func(t *testing.T) {
		held, all, err := run(t.Context(), nil)
		if err != nil {
			t.Fatal(err)
		}
		// Some of the stream is left for after the hold.
		if whole := time.Duration(len(b)) * 10 * time.Microsecond; held < whole/4 || held > whole {
			t.Errorf("held after %v, want at most %v", held, whole)
		}
		if all-held > time.Second {
			t.Errorf("after the hold it took %v", all-held)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		hurry := make(chan struct{})
		time.AfterFunc(time.Second, func() { close(hurry) })
		if held, _, err := run(t.Context(), hurry); err != nil || held > 2*time.Second {
			t.Errorf("held after %v, %v", held, err)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		asked := errors.New("asked to end")
		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second, asked)
		defer cancel()
		if _, all, err := run(ctx, nil); !errors.Is(err, asked) || all > 2*time.Second {
			t.Errorf("%v after %v", err, all)
		}
	})
}

// TestHoldWide has the transport take more for a while: never so long that what was under
// way then reaches beyond the hold, and not at all where there is too little memory for that.
func TestHoldWide(t *testing.T) {
	for name, c := range map[string]struct {
		size  uint64
		wide  int
		calls int
	}{
		"large":  {160 << 20, 32 << 10, 2},
		"small":  {64 << 20, 128 << 10, 1},
		"always": {64 << 20, 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			s := tiertest.New(tiertest.Options{
				Passes: 2, Resend: 0.02, ReturnPath: true, Blocks: []tiertest.Block{{Name: "pc.ram", Size: c.size}},
				Mix: tiertest.Mix{tiertest.Zero: 200, tiertest.Text: 2, tiertest.Random: 1},
			})
			l := newLab(t, crashfs.New(0), "/")
			in := &counter{Reader: bytes.NewReader(s.Bytes())}
			var calls []bool
			var at []int64
			held := int64(0)
			_, _, err := l.run(t.Context(), in, save.Options{VM: "vm", ReturnPath: io.Discard, Hold: &save.Hold{
				Wide:  c.wide,
				Widen: func(on bool) error { calls, at = append(calls, on), append(at, in.n); return nil },
				Wait:  func(context.Context) (string, error) { held = in.n; return "running", nil },
			}})
			if err != nil {
				t.Fatal(err)
			}
			if len(calls) != c.calls || len(calls) > 0 && calls[len(calls)-1] || c.calls > 1 && (!calls[0] || at[1] < 2*at[0]) {
				t.Fatalf("widened %v, at %v", calls, at)
			}
			if c.calls > 1 && held-at[1] < int64(c.wide) {
				t.Errorf("held %d bytes after %d could have been under way", held-at[1], c.wide)
			}
		})
	}
	// What can't be narrowed is not held.
	why := errors.New("it was not to be")
	_, _, err := newLab(t, crashfs.New(0), "/").run(t.Context(), bytes.NewReader(heldStream(1).Bytes()), save.Options{VM: "vm", ReturnPath: io.Discard, Hold: &save.Hold{
		Wide: 1, Widen: func(bool) error { return why },
		Wait: func(context.Context) (string, error) { t.Error("held"); return "", nil },
	}})
	if !errors.Is(err, why) {
		t.Error(err)
	}
}

// TestHoldLater has a save ask, from where it would be held, how much more it can read, and
// never read more than that. It is told which of the pages to come had content in the parent.
func TestHoldLater(t *testing.T) {
	s := heldStream(2)
	pass1 := heldStream(1).Layout().Tail
	// stored is, by i, how many of the last i pages have content.
	stored := []uint64{0}
	for b := len(s.Blocks()) - 1; b >= 0; b-- {
		for page, content := s.Pages(b), make([]byte, s.PageSize()); page > 0; page-- {
			n := stored[len(stored)-1]
			if s.Page(content, b, page-1); len(bytes.Trim(content, "\x00")) > 0 {
				n++
			}
			stored = append(stored, n)
		}
	}
	given := errors.New("given up")
	run := func(t *testing.T, parent bool, later func(in *counter, r save.Rest) (int, error)) (held, first int64, err error) {
		l := newLab(t, crashfs.New(0), "/")
		if parent {
			l.save(t, s, save.Options{})
		}
		in := &counter{Reader: bytes.NewReader(s.Bytes())}
		most := int64(0)
		ref, meta, err := l.run(t.Context(), in, save.Options{VM: "vm", ReturnPath: io.Discard, Hold: &save.Hold{
			Rate: 100 << 20,
			Later: func(_ context.Context, r save.Rest) (int, error) {
				if first == 0 {
					first = in.n
				} else if in.n > most || most-in.n >= int64(r.Need) {
					t.Errorf("%d bytes were read, %d could be", in.n, most)
				}
				for _, part := range [][2]uint64{{r.Unseen, 0}, {r.Unseen, 70}, {r.Unseen - 100, r.Unseen - 200}, {10, 10}, {10, 20}, {0, 0}} {
					want := stored[part[0]] - stored[min(part[0], part[1])]
					if have := r.Stored(part[0], part[1]); have != want {
						t.Errorf("%d of the last %d pages without the last %d had content, want %d", have, part[0], part[1], want)
					}
				}
				n, err := later(in, r)
				most = in.n + int64(n)
				return n, err
			},
			Wait: func(context.Context) (string, error) {
				if held = in.n; first > 0 && held > most {
					t.Errorf("%d bytes were read, %d could be", held, most)
				}
				return "running", nil
			},
		}})
		if err == nil {
			if meta.Report.Resent == 0 {
				t.Errorf("%+v", meta.Report)
			}
			l.holds(t, ref, s)
		}
		return held, first, err
	}
	// The nearer to the end, the shorter the steps; up to the last page that can be read.
	steps := 0
	held, first, err := run(t, true, func(in *counter, r save.Rest) (int, error) {
		steps++
		if n := int(pass1-in.n) / 4; n >= r.Need {
			return n, nil
		}
		return 0, nil
	})
	if err != nil || steps < 3 || held < first+(pass1-first)/2 || held >= pass1 {
		t.Errorf("held after %d of %d bytes, %d at first, %d steps, %v", held, pass1, first, steps, err)
	}
	// Not for a part of a page.
	held, first, err = run(t, true, func(_ *counter, r save.Rest) (int, error) { return r.Need - 1, nil })
	if err != nil || held != first || first == 0 {
		t.Errorf("held after %d bytes, %d at first, %v", held, first, err)
	}
	_, _, err = run(t, true, func(*counter, save.Rest) (int, error) { return 0, given })
	if !errors.Is(err, given) {
		t.Error(err)
	}
	// Nobody knows what comes.
	_, first, err = run(t, false, func(*counter, save.Rest) (int, error) { return 0, given })
	if err != nil || first > 0 {
		t.Errorf("it was asked after %d bytes, %v", first, err)
	}
}
