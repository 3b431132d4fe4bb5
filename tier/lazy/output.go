package lazy

import (
	"time"

	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/stream"
)

const (
	// askingPages and restingPages are how many pages go out in one write while the
	// guest asks for pages and when it does not. A demand waits for at most one
	// such write.
	askingPages, restingPages = 1, 8
	// askingPipe and restingPipe are the capacities of the pipe while the
	// guest asks for pages and when it does not. With the smaller one there are
	// more changes of context, and it takes half as long again until all memory is
	// there; with more than the larger one nothing is gained.
	askingPipe, restingPipe = 16 << 10, 64 << 10
	// asking is how long after a demand the guest is taken to be asking. Each time
	// that it begins again, a request waits for a full pipe.
	asking = 500 * time.Millisecond
	// drainStep is the time between two looks whether QEMU has read as much as
	// must be out of a pipe before it can be made smaller, and drainSteps how
	// many there are at the most: it reads on in less if it reads at all.
	drainStep, drainSteps = 50 * time.Microsecond, 20
	// progressEvery is the time between two calls of Options.Progress.
	progressEvery = 200 * time.Millisecond
)

// asking tells whether the guest is taken to be asking for pages.
func (p *pump) asking() bool { return time.Since(p.faulted) < asking }

// resize makes the pipe fit for what the guest does.
func (p *pump) resize() {
	if p.o.Resize == nil {
		return
	}
	want := restingPipe
	if p.asking() {
		want = askingPipe
	}
	if want == p.wanted && p.pipe <= want {
		return
	}
	steps := 1 // the writes that follow ask again, once each
	if want != p.wanted {
		p.wanted, steps = want, drainSteps
	}
	// The kernel refuses while more is in it than it is to hold. What is to be
	// written now would have to wait for that, too.
	for i := range steps {
		if i > 0 {
			time.Sleep(drainStep)
		}
		if p.pipe = p.o.Resize(want); p.pipe <= want {
			return
		}
	}
}

// append adds a page's record; no data means zero.
func (p *pump) append(block int, page uint64, data []byte) error {
	if len(p.buf) == 0 {
		p.buf = stream.AppendPart(p.buf, p.ramID)
		p.named = -1
	}
	name := ""
	if block != p.named {
		name, p.named = p.c.Meta.Blocks[block].Name, block
	}
	addr := page * uint64(p.c.Meta.PageSize)
	if data == nil {
		p.buf = ramparse.AppendZero(p.buf, name, addr, 0)
	} else {
		p.buf = ramparse.AppendPage(p.buf, name, addr, data)
		p.stored++
	}
	p.sent[block].Set(int64(page))
	p.rep.Pages++
	return nil
}

func (p *pump) full() bool {
	n := restingPages
	if p.asking() {
		n = askingPages
	}
	return len(p.buf) >= n*p.c.Meta.PageSize
}

// flush ends the open section and writes it.
func (p *pump) flush() error {
	if len(p.buf) == 0 {
		return nil
	}
	p.buf = ramparse.AppendEOS(p.buf)
	p.buf = stream.AppendFooter(p.buf, p.ramID)
	p.resize()
	err := p.write(p.buf)
	p.buf = p.buf[:0]
	p.progress()
	return err
}

func (p *pump) write(b []byte) error {
	n, err := p.out.Write(b)
	p.rep.BytesOut += int64(n)
	return err
}

func (p *pump) progress() {
	if p.o.Progress == nil {
		return
	}
	if now := time.Now(); now.Sub(p.tick) >= progressEvery {
		p.tick = now
		p.o.Progress(Progress{Running: true, Pages: p.rep.Pages + p.rep.Recovered, PagesAll: p.total, Demands: p.rep.Demands})
	}
}
