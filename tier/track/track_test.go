package track

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/stream"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
)

// fakePipe is an input that notes its capacity.
type fakePipe struct {
	io.Reader
	capacity int
}

func (p *fakePipe) Ready(time.Duration) bool { return true }
func (p *fakePipe) Capacity() int            { return p.capacity }
func (p *fakePipe) SetCapacity(n int) int {
	if p.capacity > 0 { // else it is no pipe
		p.capacity = n
	}
	return p.capacity
}

func source(b []byte) *fakePipe { return &fakePipe{bytes.NewReader(b), 64 << 10} }

var ramPages = 3 * int(holdPages(minPipe))

const biosName = "pc.bios"

// recorded writes a stream with these pages in the passes after the first; each
// pass is a section. It ends after them.
func recorded(pages int, later ...[]uint64) []byte {
	b := stream.AppendConfiguration(stream.AppendHeader(nil), "pc-q35-7.2")
	b = stream.AppendStart(b, stream.Section{ID: 2, Name: ramparse.SectionName, Version: ramparse.SectionVersion})
	size := uint64(pages) * 4096
	b = ramparse.AppendSetup(b, &ramparse.Setup{Total: size + 64<<12, Blocks: []ramparse.Block{{Name: "pc.ram", Used: size}, {Name: biosName, Used: 64 << 12}}})
	b = stream.AppendFooter(ramparse.AppendEOS(b), 2)
	b = stream.AppendPart(b, 2)
	page := make([]byte, 4096)
	for i := range pages {
		name := ""
		if i == 0 {
			name = "pc.ram"
		}
		if i%7 == 1 {
			b = ramparse.AppendPage(b, name, uint64(i)<<12, page)
		} else {
			b = ramparse.AppendZero(b, name, uint64(i)<<12, 0)
		}
	}
	for i := range 64 {
		b = ramparse.AppendZero(b, biosName, uint64(i)<<12, 0)
	}
	b = stream.AppendFooter(ramparse.AppendEOS(b), 2)
	for _, pass := range later {
		b = stream.AppendPart(b, 2)
		for _, i := range pass {
			b = ramparse.AppendPage(b, "pc.ram", i<<12, page)
		}
		b = stream.AppendFooter(ramparse.AppendEOS(b), 2)
	}
	return b
}

// silentPipe sends what it has, and then nothing, as a QEMU that hangs does.
type silentPipe struct {
	fakePipe
	limit time.Duration
}

func (p *silentPipe) SetReadTimeout(d time.Duration) { p.limit = d }

func (p *silentPipe) Read(b []byte) (int, error) {
	n, err := p.fakePipe.Read(b)
	if err == io.EOF && p.limit > 0 {
		err = os.ErrDeadlineExceeded
	}
	return n, err
}

// A QEMU that falls silent is not waited for without end, in the first pass, after
// it, or before any of it.
func TestFilterSilent(t *testing.T) {
	b := recorded(ramPages, []uint64{5, 6})
	for _, n := range []int{0, 20, len(b) / 2, len(b)} {
		in := &silentPipe{fakePipe: *source(b[:n])}
		set, err := Filter(t.Context(), in, time.Millisecond)
		if !errors.Is(err, ErrSilent) || set != nil {
			t.Errorf("after %d of %d bytes: %v, %v", n, len(b), set, err)
		}
	}
}

// The set is exactly what the second pass has, whether the stream ends after it
// or goes on; page 0 came before the page size was known.
func TestFilter(t *testing.T) {
	second := []uint64{0, 5, 6, 7, 4000, uint64(ramPages - 1)}
	for name, b := range map[string][]byte{
		"cancelled": recorded(ramPages, second),
		"goes on":   recorded(ramPages, second, []uint64{1, 2, 3}),
	} {
		in := source(b)
		start := time.Now()
		set, err := Filter(t.Context(), in, 120*time.Millisecond)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if d := time.Since(start); d < 120*time.Millisecond {
			t.Errorf("%s: the interval was held for %v", name, d)
		}
		if in.capacity != minPipe {
			t.Errorf("%s: the pipe has %d bytes", name, in.capacity)
		}
		var got []uint64
		for r := range set.Runs(0, 1, 255) {
			for i := range r.N {
				got = append(got, uint64(r.First+i))
			}
		}
		if len(got) != len(second) {
			t.Fatalf("%s: %v, want %v", name, got, second)
		}
		for i := range got {
			if got[i] != second[i] {
				t.Errorf("%s: %v, want %v", name, got, second)
			}
		}
		if h := set.Histogram(); h[0]+h[1] != int64(ramPages+64) || set.Blocks()[1].Name != biosName {
			t.Errorf("%s: %v, %v", name, h[:3], set.Blocks())
		}
	}
}

// Memory of virtio-mem that is not plugged is listed and never comes: the hold must
// not wait for it.
func TestFilterVirtioMem(t *testing.T) {
	s := tiertest.New(tiertest.Options{Early: 1, Passes: 2, Resend: 0.01, Mix: tiertest.Mix{tiertest.Zero: 1},
		Blocks: []tiertest.Block{{Name: "vm0", Size: 64 << 20, Shared: true}, {Name: "pc.ram", Size: uint64(ramPages) << 12}}})
	start := time.Now()
	set, err := Filter(t.Context(), source(s.Bytes()[:s.Layout().Tail]), 100*time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	if d := time.Since(start); d < 100*time.Millisecond {
		t.Errorf("the interval was held for %v", d)
	}
	if h := set.Histogram(); h[1] < int64(ramPages)/200 || h[1] > int64(ramPages)/50 {
		t.Errorf("%d of %d pages came again", h[1], ramPages)
	}
}

func TestFilterRefuses(t *testing.T) {
	good := recorded(ramPages, []uint64{1})
	stopped, cancel := context.WithCancel(t.Context())
	cancel()
	for name, test := range map[string]struct {
		ctx  context.Context
		in   []byte
		want error
	}{
		"cut in pass 1": {t.Context(), good[:len(good)/4], ErrEnded},
		"empty":         {t.Context(), nil, ErrEnded},
		"small":         {t.Context(), recorded(ramPages*2/3 - 65), ErrTooSmall},
		"the devices":   {t.Context(), stream.AppendFull(good, stream.Section{ID: 3, Name: "timer"}), ErrSwitchover},
		"no stream":     {t.Context(), []byte("not a stream"), stream.ErrNotStream},
		"ended":         {stopped, good, context.Canceled},
	} {
		if set, err := Filter(test.ctx, source(test.in), time.Millisecond); !errors.Is(err, test.want) || set != nil {
			t.Errorf("%s: %v, want %v", name, err, test.want)
		}
	}
}

// What is no pipe holds more, so a guest must be larger to be held.
func TestFilterSocket(t *testing.T) {
	small := source(recorded(ramPages, []uint64{1}))
	small.capacity = 0
	if _, err := Filter(t.Context(), small, 1); !errors.Is(err, ErrTooSmall) {
		t.Errorf("%d pages: %v", ramPages, err)
	}
	large := source(recorded(2*int(holdPages(stream.SocketBuffer)), []uint64{1, 7}))
	large.capacity = 0
	set, err := Filter(t.Context(), large, 1)
	if err != nil {
		t.Fatal(err)
	}
	if h := set.Histogram(); h[1] != 2 {
		t.Errorf("%d pages are hot", h[1])
	}
}

func FuzzFilter(f *testing.F) {
	good := recorded(ramPages, []uint64{1, 2, 9})
	f.Add(good)
	f.Add(good[:len(good)/2])
	f.Add(recorded(8))
	f.Fuzz(func(t *testing.T, b []byte) {
		set, err := Filter(t.Context(), source(b), 1)
		if (set == nil) == (err == nil) {
			t.Errorf("set %v, error %v", set != nil, err)
		}
	})
}
