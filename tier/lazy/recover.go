package lazy

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/flic-migrate/flic-migrate/stream/postcopy"
	"github.com/flic-migrate/flic-migrate/stream/returnpath"
	"github.com/flic-migrate/flic-migrate/tier/rescue"
)

// handshake tells QEMU that the migration goes on and learns which pages it
// has (migration/savevm.c, loadvm_handle_recv_bitmap and
// loadvm_postcopy_handle_resume).
func (p *pump) handshake(ctx context.Context, rd *returnpath.Reader) error {
	for i, blk := range p.c.Meta.Blocks {
		// One by one: QEMU can't read on while its answer, which may be longer
		// than a pipe, waits to be read.
		if err := p.write(postcopy.AppendRecvBitmap(nil, blk.Name)); err != nil {
			return err
		}
		m, err := p.answer(ctx, rd, returnpath.RecvBitmap)
		if err != nil {
			return fmt.Errorf("RAM block %q: %w", blk.Name, err)
		}
		if m.Block != blk.Name {
			return fmt.Errorf("QEMU sends the bitmap of RAM block %q, expected %q", m.Block, blk.Name)
		}
		// QEMU rounds up to whole 64-bit words. Of a bitmap that is shorter
		// the missing pages would be taken for missing in the guest, too, and
		// be sent twice.
		if err := p.sent[i].Fill(m.Bitmap); err != nil {
			return fmt.Errorf("QEMU sends for RAM block %q a %w", blk.Name, err)
		}
		p.rep.Recovered += p.sent[i].Count()
	}
	if err := p.write(postcopy.AppendResume(nil)); err != nil {
		return err
	}
	_, err := p.answer(ctx, rd, returnpath.ResumeAck)
	return err
}

// answer waits for the message of the given type, for Options.LoadTime at the most:
// no page that the guest lacks keeps the thread that sends it. A read that brings
// nothing is not waited for after that: it ends when its pipe does, at the latest with
// the process.
func (p *pump) answer(ctx context.Context, rd *returnpath.Reader, want returnpath.Type) (m returnpath.Message, err error) {
	read := make(chan error, 1)
	var come returnpath.Message
	go func() {
		read <- rescue.Call(func() (err error) {
			come, err = next(rd, want)
			return err
		})
	}()
	silent := time.NewTimer(p.o.LoadTime)
	defer silent.Stop()
	select {
	case err = <-read:
		return come, err
	case <-silent.C:
		return m, fmt.Errorf("%w: no %v has come within %v", ErrNotLoaded, want, p.o.LoadTime)
	case <-ctx.Done():
		return m, context.Cause(ctx)
	}
}

// next reads the message of the given type that must come next.
func next(rd *returnpath.Reader, want returnpath.Type) (returnpath.Message, error) {
	for {
		m, err := rd.Next()
		if err == io.EOF {
			err = ErrGone
		}
		if err != nil || m.Type == want {
			return m, err
		}
		// Requests may come before QEMU has read the command; it repeats
		// those that still matter after RESUME.
		if m.Type != returnpath.ReqPages && m.Type != returnpath.ReqPagesID {
			return m, fmt.Errorf("QEMU answers %v, expected %v", m.Type, want)
		}
	}
}
