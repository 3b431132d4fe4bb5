package lazy

import (
	"context"
	"fmt"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/pagemap"
	"github.com/flic-migrate/flic-migrate/tier/source"
)

// sender takes a page. data is nil if the page reads as zero, and otherwise
// the sender's until it returns.
type sender func(block int, page uint64, data []byte) error

// pages hands the content of pages to a sender, one run at a time.
type pages struct {
	c   *checkpoint.Checkpoint
	set *source.Set
	rd  *source.Reader

	run    pagemap.Run
	send   sender
	failed error                                     // what send returned
	fill   []byte                                    // room for a page that lies nowhere as it is
	take   func(i, n uint64, c source.Content) error // content, made once
}

func newPages(c *checkpoint.Checkpoint, set *source.Set, cache *source.Cache) *pages {
	p := &pages{c: c, set: set, rd: set.NewReader(cache), fill: make([]byte, set.PageSize)}
	p.take = p.content
	return p
}

// read hands a run's pages to send, whose error it returns as it is. All others name
// the page. send must not ask for another run here.
func (p *pages) read(ctx context.Context, r pagemap.Run, send sender) error {
	if err := p.c.Readable(r); err != nil {
		return err
	}
	p.run, p.send, p.failed = r, send, nil
	err := p.rd.Read(ctx, r, p.take)
	if err == nil || p.failed != nil || ctx.Err() != nil || p.set.Row(r.Kind).Needs == nil {
		return err // what needs nothing is checked for its page, and says so
	}
	at := p.rd.Page()
	return fmt.Errorf("page %s: %w", p.c.PageName(at.Block, at.Number), err)
}

// content is given the run's pages from the i-th on, n of them, which hold the same.
func (p *pages) content(i, n uint64, c source.Content) error {
	data := c.Data
	switch {
	case c.Zero():
		data = nil
	case c.Form != source.Whole:
		if err := c.Copy(p.fill); err != nil {
			return err
		}
		data = p.fill
	}
	for page := p.run.Page + i; page < p.run.Page+i+n; page++ {
		if p.failed = p.send(p.run.Block, page, data); p.failed != nil {
			return p.failed
		}
	}
	return nil
}
