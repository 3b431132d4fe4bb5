package main

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/tier/progress"
)

// Lines are shown of what takes long only, at changes of phase and every two
// seconds.
func TestProgressLines(t *testing.T) {
	var out bytes.Buffer
	p := newProgress(&out, false)
	show := p.callback()
	show(progress.State{Phase: "ram", Pages: 10, PagesAll: 100})
	show(progress.State{Phase: "sync", Pages: 100, PagesAll: 100})
	if out.Len() > 0 {
		t.Fatalf("a short save has progress: %q", out.String())
	}
	p.start = time.Now().Add(-10 * time.Second)
	show(progress.State{Phase: "ram", Pages: 50, PagesAll: 200, BytesIn: 3 << 20, BytesOut: 1 << 10})
	show(progress.State{Phase: "ram", Pages: 51, PagesAll: 200})
	show(progress.State{Phase: "tail", Pages: 200, PagesAll: 200})
	p.last = p.last.Add(-lineEvery)
	show(progress.State{Phase: "tail", Pages: 7})
	p.finish()
	want := []string{
		"flic-migrate: ram: 25 % of 200 pages, 3.0 MiB in, 1.0 KiB out, 10 s",
		"flic-migrate: tail: 100 % of 200 pages, 10 s",
		"flic-migrate: tail: 7 pages, 10 s",
	}
	if got := strings.Split(strings.TrimSpace(out.String()), "\n"); strings.Join(got, "|") != strings.Join(want, "|") {
		t.Errorf("got %q\nwant %q", got, want)
	}
}

func TestQuiet(t *testing.T) {
	p := newProgress(nil, true)
	if p.callback() != nil {
		t.Error("quiet has a progress function")
	}
	p.finish()
}

func TestHuman(t *testing.T) {
	for n, want := range map[int64]string{
		0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 1536: "1.5 KiB", 1<<20 - 1: "1.0 MiB", 1 << 20: "1.0 MiB",
		512 << 20: "512.0 MiB", 1 << 40: "1.0 TiB", 1 << 50: "1024.0 TiB",
	} {
		if got := human(n); got != want {
			t.Errorf("%d is %q, want %q", n, got, want)
		}
	}
}
