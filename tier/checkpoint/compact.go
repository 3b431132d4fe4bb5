package checkpoint

import (
	"encoding/binary"
	"errors"
	"math"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/digest"
)

// AppendCompact appends an Identity in a form that is read in a fraction of the time that
// its JSON takes, for those who keep many of them. It is no format: what was written
// by another version is not what ParseCompact expects, and both must be told apart by
// CompactVersion. Lengths and numbers are uvarints:
//
//	VM, machine, run state, trust domain, each with its length; number; UUID and origin, 16 B
//	each
//	when it was made, as time.Time's binary form, with its length
//	page size; RAM bytes; disks; disk slots
//	1 and path, UUID, slots, bytes, 1 if it is volatile; or 0: no NVRAM
//	1 and algorithm, key, root; or 0: no digests
//	number of disks that are kept, and their UUIDs
//	number of references, and their UUIDs
func (id *Identity) AppendCompact(dst []byte) ([]byte, error) {
	created, err := id.Created.MarshalBinary()
	if err != nil {
		return dst, err
	}
	for _, s := range []string{id.VM, id.Machine, id.RunState, id.TrustDomain} {
		dst = appendText(dst, s)
	}
	dst = binary.AppendUvarint(dst, uint64(id.Number))
	dst = append(append(dst, id.UUID[:]...), id.Origin[:]...)
	dst = appendText(dst, string(created))
	for _, n := range []uint64{uint64(id.PageSize), id.RAMBytes, uint64(id.Disks), uint64(id.DiskSlots)} {
		dst = binary.AppendUvarint(dst, n)
	}
	dst = appendBool(dst, id.NVRAM != nil)
	if n := id.NVRAM; n != nil {
		dst = append(appendText(dst, n.Path), n.UUID[:]...)
		dst = binary.AppendUvarint(dst, uint64(n.Slots))
		dst = binary.AppendUvarint(dst, uint64(n.Bytes))
		dst = appendBool(dst, n.Volatile)
	}
	dst = appendBool(dst, id.Digests != nil)
	if d := id.Digests; d != nil {
		dst = append(appendText(dst, string(d.Algorithm)), d.Key[:]...)
		dst = append(dst, d.Root[:]...)
	}
	dst = binary.AppendUvarint(dst, uint64(len(id.Kept)))
	for _, k := range id.Kept {
		dst = append(dst, k[:]...)
	}
	dst = binary.AppendUvarint(dst, uint64(len(id.References)))
	for _, r := range id.References {
		dst = append(dst, r[:]...)
	}
	return dst, nil
}

// CompactVersion is that of AppendCompact's form.
const CompactVersion = 4

func appendText(dst []byte, s string) []byte {
	return append(binary.AppendUvarint(dst, uint64(len(s))), s...)
}

func appendBool(dst []byte, b bool) []byte {
	if b {
		return append(dst, 1)
	}
	return append(dst, 0)
}

var errCompact = errors.New("not a compact identity")

// ParseCompact reads what AppendCompact has made. It takes no more memory than a small
// multiple of b, and the Identity keeps nothing of b.
func ParseCompact(b []byte) (*Identity, error) {
	p := compact{b: b}
	id := &Identity{VM: p.text(), Machine: p.text(), RunState: p.text(), TrustDomain: p.text(), Number: int(p.number(1 << 31))}
	p.fixed(id.UUID[:])
	p.fixed(id.Origin[:])
	if id.Created.UnmarshalBinary([]byte(p.text())) != nil {
		p.bad = true
	}
	id.PageSize, id.RAMBytes, id.Disks = int(p.number(1<<16)), p.number(math.MaxUint64), int(p.number(MaxDisks))
	id.DiskSlots = int(p.number(1 << 32))
	if p.bool() {
		n := &NVRAM{Path: p.text()}
		p.fixed(n.UUID[:])
		n.Slots, n.Bytes, n.Volatile = int(p.number(1<<40)), int64(p.number(1<<62)), p.bool()
		id.NVRAM = n
	}
	if p.bool() {
		d := &Digests{Algorithm: digest.Algorithm(p.text())}
		p.fixed(d.Key[:])
		p.fixed(d.Root[:])
		id.Digests = d
	}
	if n := p.number(maxVMDisks); n > 0 && !p.bad {
		id.Kept = make(keptList, n)
		for i := range id.Kept {
			p.fixed(id.Kept[i][:])
		}
	}
	n := p.number(maxRefs)
	p.bad = p.bad || uint64(len(p.b)) != n*uint64(len(uuid.Nil))
	if n > 0 && !p.bad {
		id.References = make(refList, n)
		for i := range id.References {
			p.fixed(id.References[i][:])
		}
	}
	if p.bad {
		return nil, errCompact
	}
	return id, id.check()
}

// compact takes values from the front of b; bad is set when there is none.
type compact struct {
	b   []byte
	bad bool
}

// number is one of at most most.
func (p *compact) number(most uint64) uint64 {
	v, n := binary.Uvarint(p.b)
	if n <= 0 || v > most {
		p.bad = true
		return 0
	}
	p.b = p.b[n:]
	return v
}

func (p *compact) bool() bool { return p.number(1) == 1 }

func (p *compact) text() string {
	n := p.number(uint64(len(p.b)))
	if n > uint64(len(p.b)) {
		p.bad = true
		return ""
	}
	s := string(p.b[:n])
	p.b = p.b[n:]
	return s
}

func (p *compact) fixed(dst []byte) {
	if len(p.b) < len(dst) {
		p.bad = true
		return
	}
	p.b = p.b[copy(dst, p.b):]
}
