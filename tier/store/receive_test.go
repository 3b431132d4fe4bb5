package store

import (
	"bytes"
	"context"
	"errors"
	"testing"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/moved"
	"github.com/flic-migrate/flic-migrate/tier/source"
	"github.com/flic-migrate/flic-migrate/tier/transfer"
)

// TestRefillEnds: a receiver that is to end does so before it has gone through all of a piece.
func TestRefillEnds(t *testing.T) {
	const slots, size = 5 * 4096, 256
	s, disk := newStore(t)
	put(t, disk, s.dir.Path("tmp/piece"), make([]byte, slots*(size+8)))
	want := bytes.Repeat([]byte{1}, size)
	part := &checkpoint.NVRAMPart{Slots: make([]checkpoint.NVRAMSlot, slots)}
	for i := range part.Slots {
		part.Slots[i].CRC = integrity.Checksum(want)
	}
	i := &received{Sent: &transfer.Sent{}, id: &checkpoint.Identity{NVRAM: &checkpoint.NVRAM{Slots: slots}}}
	p := &moved.Piece{PageSize: size, Slots: source.Below(slots)}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	filled := 0
	err := (&receiving{s: s}).refill(ctx, i, "tmp/piece", p, p.Slots, part, func(_ uint32, b []byte) error {
		filled++
		cancel()
		copy(b, want)
		return nil
	})
	if !errors.Is(err, context.Canceled) || filled > 4096 {
		t.Errorf("%v after %d pages", err, filled)
	}
}
