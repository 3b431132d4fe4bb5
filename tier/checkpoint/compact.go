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
//	UUID, 16 B; number of references, and their UUIDs
//	VM, machine, run state, trust domain, each with its length; number; origin, 16 B
//	when it was made, as time.Time's binary form, with its length
//	page size; RAM bytes; disks; disk slots
//	1 and path, UUID, slots, bytes, 1 if it is volatile; or 0: no NVRAM
//	1 and algorithm, key, root; or 0: no digests
//	number of disks that are kept, and their UUIDs
func (id *Identity) AppendCompact(dst []byte) ([]byte, error) {
	created, err := id.Created.MarshalBinary()
	if err != nil {
		return dst, err
	}
	dst = append(dst, id.UUID[:]...)
	dst = binary.AppendUvarint(dst, uint64(len(id.References)))
	for _, r := range id.References {
		dst = append(dst, r[:]...)
	}
	for _, s := range []string{id.VM, id.Machine, id.RunState, id.TrustDomain} {
		dst = appendText(dst, s)
	}
	dst = binary.AppendUvarint(dst, uint64(id.Number))
	dst = append(dst, id.Origin[:]...)
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
	return dst, nil
}

// CompactVersion is that of AppendCompact's form.
const CompactVersion = 5

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
	id := new(Identity)
	p.fixed(id.UUID[:])
	if refs := p.uuids(maxRefs); len(refs) > 0 {
		id.References = make(refList, len(refs)/len(uuid.Nil))
		for i := range id.References {
			copy(id.References[i][:], refs[i*len(uuid.Nil):])
		}
	}
	id.VM, id.Machine, id.RunState, id.TrustDomain, id.Number = p.text(), p.text(), p.text(), p.text(), int(p.number(1<<31))
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
	if kept := p.uuids(maxVMDisks); len(kept) > 0 {
		id.Kept = make(keptList, len(kept)/len(uuid.Nil))
		for i := range id.Kept {
			copy(id.Kept[i][:], kept[i*len(uuid.Nil):])
		}
	}
	if p.bad || len(p.b) > 0 {
		return nil, errCompact
	}
	return id, id.check()
}

// Compact is an Identity in its compact form of which little is asked for.
type Compact []byte

// UUID is the image's; Nil if this is no compact form.
func (c Compact) UUID() (id uuid.UUID) {
	copy(id[:], c)
	return id
}

// Refers tells whether it refers to one of those that asked tells of. What is no compact form
// does.
func (c Compact) Refers(asked func(uuid.UUID) bool) bool {
	p := compact{b: c}
	p.fixed(make([]byte, len(uuid.Nil)))
	for refs := p.uuids(maxRefs); len(refs) > 0; refs = refs[len(uuid.Nil):] {
		if asked(uuid.UUID(refs[:len(uuid.Nil)])) {
			return true
		}
	}
	return p.bad
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

// uuids are as many as the number before them says, at most most: a part of b.
func (p *compact) uuids(most uint64) []byte {
	n := p.number(most) * uint64(len(uuid.Nil))
	if p.bad || n > uint64(len(p.b)) {
		p.bad = true
		return nil
	}
	list := p.b[:n]
	p.b = p.b[n:]
	return list
}

func (p *compact) fixed(dst []byte) {
	if len(p.b) < len(dst) {
		p.bad = true
		return
	}
	p.b = p.b[copy(dst, p.b):]
}
