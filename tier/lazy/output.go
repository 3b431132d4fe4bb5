package lazy

import (
	"time"

	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/stream"
)

const (
	// askingPages and restingPages are how many pages go out in one write while the
	// guest asks for pages and when it does not. A demand waits for at most one
	// such write. crowdedPages are those of a write while QEMU waits for a CPU.
	askingPages, restingPages, crowdedPages = 1, 8, 32
	// askingPipe and restingPipe are the capacities of the pipe while the
	// guest asks for pages and when it does not. With the smaller one there are
	// more changes of context, and it takes half as long again until all memory is
	// there; with more than the larger one nothing is gained if there are CPUs.
	//
	// If there are none, as for eight guests that run and are resumed on two, QEMU gets its
	// turn after some milliseconds, and reads in a fraction of it what the pipe has. Then
	// crowdedPipe is its capacity: all of the memory is there in half of the time, and guests
	// ask for a tenth of the pages, each of which waits for a turn anyway.
	askingPipe, restingPipe, crowdedPipe = 16 << 10, 64 << 10, 1 << 20
	// asking is how long after a demand the guest is taken to be asking. Each time
	// that it begins again, a request waits for a full pipe.
	asking = 500 * time.Millisecond
	// turn is from how long on a write that waits for QEMU waits for a CPU of QEMU's, and not
	// for what QEMU does with the pages, some 20 µs each; paused is from how long on it waits
	// at all.
	turn, paused = 1500 * time.Microsecond, 100 * time.Microsecond
	// crowdedTurns is how many more of the last writes that waited must have waited for a
	// CPU than not; of them, mostTurns are remembered.
	crowdedTurns, mostTurns = 4, 8
	// drainStep is the time between two looks whether QEMU has read as much as
	// must be out of a pipe before it can be made smaller, and drainSteps how
	// many there are at the most: it reads on in less if it reads at all.
	drainStep, drainSteps = 50 * time.Microsecond, 20
	// progressEvery is the time between two calls of Options.Progress.
	progressEvery = 200 * time.Millisecond
)

// asking tells whether the guest is taken to be asking for pages.
func (p *pump) asking() bool { return time.Since(p.faulted) < asking }

// crowded tells whether QEMU waits for a CPU after each pipeful.
func (p *pump) crowded() bool { return p.turns >= crowdedTurns }

// resize makes the pipe fit for what the guest does.
func (p *pump) resize() {
	if p.o.Resize == nil {
		return
	}
	want := restingPipe
	switch {
	case p.crowded():
		want = crowdedPipe
	case p.asking():
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
	switch {
	case p.crowded():
		n = crowdedPages
	case p.asking():
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
	begin := time.Now()
	n, err := p.out.Write(b)
	// Before, QEMU may be busy with its devices.
	if took := time.Since(begin); p.devicesLoaded() {
		switch {
		case took >= turn:
			p.turns = min(p.turns+1, mostTurns)
		case took >= paused:
			p.turns = max(p.turns-1, 0)
		}
	}
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
