package lazy

import (
	"fmt"
	"io"

	"github.com/flic-migrate/flic-migrate/stream/postcopy"
	"github.com/flic-migrate/flic-migrate/stream/returnpath"
)

// handshake tells QEMU that the migration goes on and learns which pages it
// has (migration/savevm.c, loadvm_handle_recv_bitmap and
// loadvm_postcopy_handle_resume).
func (p *pump) handshake(rd *returnpath.Reader) error {
	for i, blk := range p.c.Meta.Blocks {
		// One by one: QEMU can't read on while its answer, which may be longer
		// than a pipe, waits to be read.
		if err := p.write(postcopy.AppendRecvBitmap(nil, blk.Name)); err != nil {
			return err
		}
		m, err := next(rd, returnpath.RecvBitmap)
		if err != nil {
			return err
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
	_, err := next(rd, returnpath.ResumeAck)
	return err
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
