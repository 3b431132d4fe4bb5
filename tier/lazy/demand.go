package lazy

import (
	"context"
	"fmt"
	"io"
	"runtime"
	"time"

	"github.com/flic-migrate/flic-migrate/stream/returnpath"
	"github.com/flic-migrate/flic-migrate/tier/pagemap"
	"github.com/flic-migrate/flic-migrate/tier/source"
	"github.com/flic-migrate/flic-migrate/tier/workingset"
)

const (
	// maxDemands bounds the requests that have arrived and were not looked
	// at: each of a guest's vCPUs and of QEMU's own threads waits for one
	// page, so this many never wait. Beyond it the return path is read later.
	maxDemands = 1024
	// near is how many pages, the demanded one among them, are sent together
	// as far as they cost no more decoding, and far how many if the guest
	// reads on; powers of two.
	near, far = 8, 64
)

// demand is a page that QEMU asks for.
type demand struct {
	block int
	page  uint64
	at    time.Time
}

// receive turns the return path's requests into demands.
func (p *pump) receive(ctx context.Context, rd *returnpath.Reader) error {
	for {
		m, err := rd.Next()
		if err == io.EOF {
			return ErrGone
		}
		if err != nil {
			return err
		}
		p.heard.Store(int64(time.Since(p.start)))
		switch m.Type {
		case returnpath.Shut:
			if m.Value != 0 {
				return fmt.Errorf("%w (SHUT %d)", ErrFailed, m.Value)
			}
			if !closed(p.rep.shut) {
				close(p.rep.shut)
			}
			continue
		case returnpath.Pong:
			if m.Value == devicesLoaded && !p.devicesLoaded() {
				p.loadedAt = time.Now()
				close(p.loaded)
			}
			if n := int64(m.Value) - deviceLoaded; n >= 0 && n < int64(len(p.devices)) {
				p.loadedDevices.Store(n + 1)
			}
			continue
		case returnpath.ReqPages, returnpath.ReqPagesID:
		default:
			continue
		}
		b, ok := p.blocks[m.Block]
		size := uint64(p.c.Meta.PageSize)
		first, n := m.Start/size, max(1, uint64(m.Length)/size)
		if !ok || m.Start%size != 0 || first >= p.c.PageMap.Pages(b) || n > p.c.PageMap.Pages(b)-first {
			return fmt.Errorf("QEMU asks for %d bytes at %s:%#x, which the checkpoint does not have", m.Length, m.Block, m.Start)
		}
		at := time.Now()
		for page := first; page < first+n; page++ {
			select {
			case p.demands <- demand{b, page, at}:
			case <-p.ended: // it reads as zero, as soon as QEMU has read END
			case <-ctx.Done():
				if !closed(p.ended) {
					return context.Cause(ctx)
				}
			}
		}
		// The pump goes on in this thread. Without this it would be woken up on
		// another, late, because Go's scheduler sees late that this one waits in
		// poll(2).
		runtime.Gosched()
	}
}

// demanded answers a request.
func (p *pump) demanded(ctx context.Context, d demand) error {
	p.serving.Store(true)
	defer p.serving.Store(false)
	p.rep.Demands++
	p.faulted = time.Now()
	if p.sent[d.block].Has(int64(d.page)) {
		return nil // on its way, or another vCPU's request
	}
	if err := p.flush(); err != nil {
		return err
	}
	run, err := p.c.PageMap.Find(d.block, d.page)
	if err != nil {
		return err
	}
	run.Count = 1
	err = p.asked.read(ctx, run, func(block int, page uint64, data []byte) error {
		if data == nil {
			p.rep.Zero++
		}
		return p.append(block, page, data)
	})
	if err == nil {
		err = p.flush()
	}
	if err != nil {
		return err
	}
	p.rep.Waited++
	p.waits.add(time.Since(d.at))
	p.touch(d.block, d.page)
	return p.around(ctx, d, run)
}

// around sends what lies near a demanded page, and has the loader go on there: a
// guest that reads all its memory would be in front of the loader all the way, and
// wait for each page. Guests read in both directions: much of what Linux allocates in
// a row lies in descending order.
func (p *pump) around(ctx context.Context, d demand, run pagemap.Run) error {
	n := uint64(near)
	if !p.holding && p.devicesLoaded() {
		was, readsOn := p.readsOn(d)
		if readsOn {
			n = far
		}
		var room [source.MaxNeeds]source.Need
		if needs, _ := p.set.Stretch(run, room[:]); len(needs) > 0 {
			next := int64(needs[0].Number)
			if readsOn {
				// By the time the guest is through with this, the next is there.
				if next++; d.page < was.page {
					next -= 2
				}
			}
			if next >= 0 {
				p.follow(source.Need{Space: needs[0].Space, Number: uint32(next)})
			}
		}
		copy(p.recent[1:], p.recent[:])
		p.recent[0] = d
	}
	if err := p.neighbours(ctx, d, n); err != nil && err != errStop {
		return err
	}
	if err := p.flush(); err != nil {
		return err
	}
	// Now nobody waits.
	p.asked.rd.LetGo()
	return nil
}

// neighbours sends the other pages of the aligned n pages around a demanded one,
// those behind it first, as far as they cost no more decoding. It ends with errStop
// if others wait for theirs.
func (p *pump) neighbours(ctx context.Context, d demand, n uint64) error {
	first := d.page &^ (n - 1)
	end := min(first+n, p.c.PageMap.Pages(d.block))
	for i := uint64(1); i < end-first; i++ {
		page := first + (d.page-first+i)%(end-first)
		if p.sent[d.block].Has(int64(page)) {
			continue
		}
		run, err := p.c.PageMap.Find(d.block, page)
		if err != nil {
			return err
		}
		// One that can't be read is refused when it is its turn.
		if run.Count = 1; !p.asked.rd.Have(run) || p.c.Readable(run) != nil {
			continue
		}
		// Whether the guest touches it can't be seen any more once it is sent.
		p.touch(d.block, page)
		if err := p.asked.read(ctx, run, p.append); err != nil {
			return err
		}
		if !p.full() {
			continue
		}
		if n == far && len(p.demands) > 0 {
			return errStop
		}
		if err := p.flush(); err != nil {
			return err
		}
	}
	return nil
}

// readsOn tells whether a demand is near a recent one, and which.
func (p *pump) readsOn(d demand) (demand, bool) {
	for _, r := range p.recent {
		if r.block == d.block && r.page < d.page+2*far && d.page < r.page+2*far {
			return r, true
		}
	}
	return demand{}, false
}

func (p *pump) touch(block int, page uint64) {
	t := p.rep.Touched
	if n := len(t); n > 0 && t[n-1].Block == block && t[n-1].Page+t[n-1].Count == page {
		t[n-1].Count++
		return
	}
	if len(t) == workingset.MaxTouched {
		return
	}
	p.rep.Touched = append(t, workingset.PageRun{Block: block, Page: page, Count: 1})
}
