package save

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/digest"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/pagemap"
	"github.com/flic-migrate/flic-migrate/tier/source"
)

// Peers are saves that run beside one another in one process and become visible together. A
// page that several of them have is stored by the one that comes to it first, and the others
// refer to that one's image, which is not a checkpoint yet:
//
//	member 0: RAM ─► RAM durable ─► page map, digests ─┐           ┌─► references ─► commit
//	member 1: RAM ─► RAM durable ─► page map, digests ─┼─ barrier ─┼─► references ─► commit
//	member 2: RAM ─► RAM durable ─► page map, digests ─┘   roots   └─► references ─► commit
//
// What a member says of another's image is its root, which depends on no reference: so all
// know all roots at the barrier, and two may refer to each other. If one fails all do, and
// whoever commits them commits all or none.
//
// A place is looked for, or given out, at the moment in which a page would get one, in one
// step: saves that go through equal memories in step store each page once. It takes some 40
// bytes for each page that is stored by a member.
type Peers struct {
	hash    *digest.Hasher
	members []*Peer
	known   [peerShards]peerShard

	failed chan struct{} // closed when a member has failed, with why
	all    chan struct{} // closed when all have met

	mu  sync.Mutex
	why error
	met int
}

const (
	peerShards = 64
	// peerSlotBits are the bits of a slot in a peerShard's value.
	peerSlotBits = 40
)

// peerShard has the places of the pages whose digests it is for: member and slot.
type peerShard struct {
	mu sync.Mutex
	at map[digest.Sum]uint64
}

// Peer is one of them, for Options.Peer.
type Peer struct {
	*Peers
	number int

	// What others want to know of it.
	flushed  chan struct{} // closed when its RAM is durable
	once     sync.Once
	pageSize int           // set, as img is, before the first place is given out
	per      atomic.Uint64 // pages in a full segment; 0 before it has begun
	top      atomic.Uint64 // one more than the highest slot that others may have found
	img      *image.Writer
	ref      checkpoint.Reference // once it has met
}

// NewPeers makes so many saves peers. Digests of those that share are made by hash; one with
// another key shares with none, and is as visible as the others.
func NewPeers(members int, hash *digest.Hasher) *Peers {
	p := &Peers{hash: hash, failed: make(chan struct{}), all: make(chan struct{})}
	for i := range members {
		p.members = append(p.members, &Peer{Peers: p, number: i, flushed: make(chan struct{})})
	}
	for i := range p.known {
		p.known[i].at = make(map[digest.Sum]uint64)
	}
	return p
}

// Member is number i, from 0 on. Each is of one save.
func (p *Peers) Member(i int) *Peer { return p.members[i] }

// Fail ends the waits of all members: one has failed, or will never begin. It may be called
// more than once; the first error counts.
func (p *Peers) Fail(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.why == nil {
		p.why = err
		close(p.failed)
	}
}

// ErrPeer: a save has ended because another one of its group has.
var ErrPeer = errors.New("another member has failed")

// fail is Fail, of who may be nobody's peer.
func (p *Peer) fail(err error) {
	if p != nil {
		p.Peers.Fail(fmt.Errorf("%w: %w", ErrPeer, err))
	}
}

// begin is called when the image has begun.
func (p *Peer) begin(img *image.Writer, pageSize int) {
	p.img, p.pageSize = img, pageSize
	p.per.Store(uint64(img.SegmentPages()))
}

// flush is called when all of the member's RAM is durable.
func (p *Peer) flush() {
	if p != nil {
		p.once.Do(func() { close(p.flushed) })
	}
}

// place is where another member has the page with a digest; else slot is where this one will
// have it.
func (p *Peer) place(sum digest.Sum, slot uint64) (member int, at uint64, theirs bool) {
	s := &p.known[sum[0]%peerShards]
	s.mu.Lock()
	defer s.mu.Unlock()
	v, ok := s.at[sum]
	if member = int(v >> peerSlotBits); ok {
		return member, v & (1<<peerSlotBits - 1), member != p.number && p.members[member].pageSize == p.pageSize
	}
	s.at[sum] = uint64(p.number)<<peerSlotBits | slot
	if p.top.Load() <= slot { // it is this one's alone to raise
		p.top.Store(slot + 1)
	}
	return 0, 0, false
}

// read copies the page in a slot of a member's image into dst, checked. It waits for that
// member's RAM to be in its file.
func (p *Peer) read(ctx context.Context, dst []byte, slot uint64) error {
	t := time.NewTimer(tablesTime)
	defer t.Stop()
	select {
	case <-p.flushed:
	case <-p.failed:
		return p.why
	case <-t.C:
		return errors.New("another VM of the group has the page, and is still being saved")
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	var sr image.SegmentReader
	if err := p.img.FetchSegment(&sr.Stored, uint32(slot/p.per.Load())); err != nil {
		return err
	}
	seg, err := sr.Decode(&sr.Stored)
	if err != nil {
		return err
	}
	b, err := seg.Page(int(slot % p.per.Load()))
	if err == nil {
		copy(dst, b)
	}
	return err
}

// meet waits until all members have come to the barrier, and says who this one is: a
// Reference without a UUID if it can't be referred to.
func (p *Peer) meet(ctx context.Context, ref checkpoint.Reference) error {
	if p == nil {
		return nil
	}
	p.mu.Lock()
	p.ref = ref
	if p.met++; p.met == len(p.members) {
		close(p.all)
	}
	p.mu.Unlock()
	select {
	case <-p.all:
		return nil
	default:
	}
	select {
	case <-p.all:
		return nil
	case <-p.failed:
		return p.why
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// peerRefs are the places of a save's peers among what it may refer to.
type peerRefs struct {
	self  *Peer
	first source.Space // of member 0; each has one, this one's is not used
}

// entry is that of a page that another member has.
func (p *peerRefs) entry(member int, slot uint64) pagemap.Entry {
	return pagemap.MakeForeign(pagemap.Foreign, int(p.first)-1+member, slot)
}

// of is the member in whose image a place is; nil: it is nobody's.
func (p *peerRefs) of(space source.Space) *Peer {
	if p == nil || space < p.first || int(space-p.first) >= len(p.self.members) {
		return nil
	}
	return p.self.members[space-p.first]
}
