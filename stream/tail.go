package stream

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"slices"
)

// Completion says how surely a device tail is whole.
type Completion uint8

const (
	// Incomplete: more has to come.
	Incomplete Completion = iota
	// Weak: a stream without footers ends in a 00, which QEMU_VM_EOF is, but
	// many a device's byte too. Only the end of the input can confirm it.
	Weak
	// WithFooter: the last section's footer and QEMU_VM_EOF are there and no
	// vmdescription, as with suppress-vmdesc. A stream cut exactly before its
	// vmdescription looks the same (and loads as well).
	WithFooter
	// WithDescription: the vmdescription is there to its last byte.
	WithDescription
)

func (c Completion) String() string {
	switch c {
	case Incomplete:
		return "incomplete"
	case Weak:
		return "weak"
	case WithFooter:
		return "with footer"
	case WithDescription:
		return "with description"
	}
	return "unknown completion"
}

// MaxTail is the most a TailScanner takes, in bytes. A PC's tail has 300 KB.
const MaxTail = 256 << 20

// A TailScanner collects the device tail and tells from its content when it is
// whole. With a return path QEMU keeps the pipe open until it is answered, so
// waiting for the end of the input would wait for ever.
type TailScanner struct {
	buf     []byte
	footers bool
}

// NewTailScanner returns a scanner for a stream with or without section
// footers (see Reader.Footers).
func NewTailScanner(footers bool) *TailScanner { return &TailScanner{footers: footers} }

// Write adds bytes of the tail, cut anyhow. Beyond MaxTail it takes nothing
// and returns ErrTooLong.
func (s *TailScanner) Write(p []byte) (int, error) {
	if len(p) > MaxTail-len(s.buf) {
		return 0, ErrTooLong
	}
	s.buf = append(s.buf, p...)
	return len(p), nil
}

// Bytes returns the tail so far, valid until the next Write.
func (s *TailScanner) Bytes() []byte { return s.buf }

// Complete says whether the tail so far ends as a stream may end. It is cheap
// enough to be asked whenever a read would block: it looks at the end of the
// tail first, and at all of it only if that looks like the end of a stream.
func (s *TailScanner) Complete() Completion {
	switch {
	case description(s.buf) != nil:
		return WithDescription
	case s.footers && endsInFooter(s.buf):
		return WithFooter
	case !s.footers && len(s.buf) > 0 && s.buf[len(s.buf)-1] == typeEOF:
		return Weak
	}
	return Incomplete
}

// descriptionHead is the length of QEMU_VM_EOF and the vmdescription's head,
// 00 06 be32 n.
const descriptionHead = 6

// description returns the vmdescription that ends where tail ends, or nil.
func description(tail []byte) []byte { return descriptionIf(tail, json.Valid) }

// SectionsEnd returns where in a complete tail the sections end and QEMU_VM_EOF
// is; -1 if it is no complete tail. It is for a tail that TailScanner has taken
// for complete when it was saved: it does not look into the vmdescription, which
// would take a hundred times as long.
func SectionsEnd(tail []byte) int {
	end := len(tail) - 1
	if d := descriptionIf(tail, func([]byte) bool { return true }); d != nil {
		end = len(tail) - len(d) - descriptionHead
	}
	if end < 0 || tail[end] != typeEOF {
		return -1
	}
	return end
}

// descriptionIf returns the vmdescription that ends where tail ends and for
// which valid says so, or nil.
//
// JSON has no zero byte and the head begins with one, so the head is at the
// last zero byte of the tail or at most descriptionHead-1 before it.
func descriptionIf(tail []byte, valid func([]byte) bool) []byte {
	last := bytes.LastIndexByte(tail, 0)
	for at := last; at >= 0 && at > last-descriptionHead; at-- {
		body := at + descriptionHead
		if tail[at] != typeEOF || body >= len(tail) || tail[at+1] != typeDescription ||
			int64(binary.BigEndian.Uint32(tail[at+2:])) != int64(len(tail)-body) {
			continue
		}
		if tail[body] == '{' && valid(tail[body:]) {
			return tail[body:]
		}
	}
	return nil
}

// endsInFooter says whether tail ends in the footer of a section whose header
// is in it, and QEMU_VM_EOF.
func endsInFooter(tail []byte) bool {
	at := len(tail) - 6
	if at < 0 || tail[at] != typeFooter || tail[at+5] != typeEOF {
		return false
	}
	want := append([]byte{typeFull}, tail[at+1:at+5]...)
	for rest := tail[:at]; ; {
		i := bytes.LastIndex(rest, want)
		if i < 0 {
			return false
		}
		// In front of a header is the footer of the section before.
		if _, _, ok := parseFull(tail[:at], i); ok && (i == 0 || i >= 5 && tail[i-5] == typeFooter) {
			return true
		}
		rest = rest[:i+len(want)-1]
	}
}

// parseFull parses the FULL section header at tail[at:] and returns where the
// body begins.
func parseFull(tail []byte, at int) (s Section, body int, ok bool) {
	b := tail[at:]
	if len(b) < 6 || b[0] != typeFull || len(b) < 6+int(b[5])+8 {
		return s, 0, false
	}
	n := 6 + int(b[5])
	for _, c := range b[6:n] {
		if c < ' ' || c > '~' {
			return s, 0, false
		}
	}
	s = Section{
		ID:       binary.BigEndian.Uint32(b[1:]),
		Name:     string(b[6:n]),
		Instance: binary.BigEndian.Uint32(b[n:]),
		Version:  binary.BigEndian.Uint32(b[n+4:]),
	}
	return s, at + n + 8, n > 6
}

// Tail is a device tail taken apart. RunState is empty if there is no
// globalstate section: machine types before 2.4 have one only in states other
// than running and paused, and leave the choice to who loads the stream.
type Tail struct {
	Sections    []TailSection // in stream order; nil without a vmdescription
	Early       int           // described sections that stand before RAM, not in the tail
	PageSize    int           // target page size from the vmdescription, bytes; 0 without
	RunState    string        // globalstate's text, such as running or paused; or empty
	Description []byte        // the vmdescription's JSON; nil without
}

// Described lists the device sections that a complete tail's vmdescription names, early
// ones among them, with name and instance alone. It is nil without a vmdescription, or
// with one that is nonsense.
func Described(tail []byte) []Section {
	var desc struct {
		Devices []struct {
			Name     string `json:"name"`
			Instance int64  `json:"instance_id"`
		} `json:"devices"`
	}
	b := descriptionIf(tail, func([]byte) bool { return true })
	if b == nil || unmarshal(b, &desc) != nil {
		return nil
	}
	list := make([]Section, len(desc.Devices))
	for i, d := range desc.Devices {
		list[i] = Section{Name: d.Name, Instance: uint32(d.Instance)}
	}
	return list
}

// maxDescribed is how many commas a vmdescription may have, and so how many values less one. One
// of a large machine has some tens of thousands of them. A value can take a hundred times its
// length in memory.
const maxDescribed = 1 << 20

// unmarshal parses a vmdescription.
func unmarshal(b []byte, into any) error {
	if n := bytes.Count(b, []byte{','}); n > maxDescribed {
		return fmt.Errorf("%d values are more than the %d that are read", n, maxDescribed)
	}
	return json.Unmarshal(b, into)
}

// TailSection is a FULL section. Offset and Length are those of its body
// within the tail, without header and footer.
type TailSection struct {
	Section
	Offset, Length int

	// Fields are the state's fields in order, subsections not among them. A
	// section that is not as long as its description says has nil: where
	// they begin could not be told.
	Fields []TailField
}

// TailField is a field of a device's state: Count elements of Size bytes each,
// from Offset of the tail on. A struct is one element with all it contains.
type TailField struct {
	Name                string // as in QEMU's source, such as env.cr[3]
	Offset, Size, Count int
}

// Field returns the first field with a name.
func (s *TailSection) Field(name string) (TailField, bool) {
	i := slices.IndexFunc(s.Fields, func(f TailField) bool { return f.Name == name })
	if i < 0 {
		return TailField{}, false
	}
	return s.Fields[i], true
}

// ParseTail walks a complete tail by the field sizes of its vmdescription. A
// section that is not as long as described still has its footer, after which
// the next device's header comes; it is found by these. (QEMU 7.2 describes an
// array of pointers by its first, which may be null, as in s390_css.) If there
// is no such place, ParseTail returns ErrDamaged with an offset within the
// tail, and what it has found so far. The tail may well load all the same,
// since only tools read the vmdescription.
//
// Without a vmdescription only RunState is found. The Tail refers to tail.
func ParseTail(tail []byte) (Tail, error) {
	t := Tail{RunState: runState(tail), Description: description(tail)}
	if t.Description == nil {
		return t, nil
	}
	sections := tail[:len(tail)-len(t.Description)-descriptionHead]
	var desc vmDescription
	if err := unmarshal(t.Description, &desc); err != nil {
		return t, Damaged("vmdescription", int64(len(sections)), "%v", err)
	}
	t.PageSize = desc.PageSize
	// Early sections are described first, since they are saved first. The tail
	// begins with the first that is none.
	t.Early = max(0, slices.IndexFunc(desc.Devices, func(d vmDevice) bool {
		_, _, ok := d.header(sections, 0)
		return ok
	}))
	desc.Devices = desc.Devices[t.Early:]
	at := 0
	for i := range desc.Devices {
		d := &desc.Devices[i]
		s, body, ok := d.header(sections, at)
		if !ok {
			return t, Damaged("device tail", int64(at), "no section %q instance %d where the vmdescription has it", d.Name, d.Instance)
		}
		// follows says whether at p the next device's section begins, or all
		// sections end.
		follows := func(p int) bool {
			if i == len(desc.Devices)-1 {
				return p == len(sections)
			}
			_, _, ok := desc.Devices[i+1].header(sections, p)
			return ok
		}
		end, next, ok := sectionEnd(sections, body, &d.vmState, AppendFooter(nil, s.ID), follows)
		if !ok {
			return t, Damaged("device tail", int64(body), "section %q does not end where the vmdescription has it, nor elsewhere", s.Name)
		}
		ts := TailSection{Section: s, Offset: body, Length: end - body}
		if n, ok := d.length(end - body); ok && n == end-body {
			ts.Fields = d.fields(body)
		}
		t.Sections = append(t.Sections, ts)
		at = next
	}
	if len(desc.Devices) == 0 && len(sections) > 0 {
		return t, Damaged("device tail", 0, "%d bytes of sections, none of them described", len(sections))
	}
	return t, nil
}

// sectionEnd returns where the body of the section at body ends and where the
// next section begins, at a place for which follows is true.
func sectionEnd(sections []byte, body int, state *vmState, footer []byte, follows func(int) bool) (end, next int, ok bool) {
	if n, ok := state.length(len(sections) - body); ok {
		end, next = body+n, body+n
		// Machine types before 2.4 have no footers.
		if bytes.HasPrefix(sections[end:], footer) {
			next += len(footer)
		}
		if follows(next) {
			return end, next, true
		}
	}
	for end = body; ; end++ {
		k := bytes.Index(sections[end:], footer)
		if k < 0 {
			return 0, 0, false
		}
		end += k
		if next = end + len(footer); follows(next) {
			return end, next, true
		}
	}
}

// vmDescription is the part of the vmdescription that gives lengths
// (vmstate_save and vmstate_save_state, migration/savevm.c and vmstate.c).
type vmDescription struct {
	PageSize int        `json:"page_size"`
	Devices  []vmDevice `json:"devices"`
}

type vmDevice struct {
	Name     string `json:"name"`
	Instance int64  `json:"instance_id"`
	vmState
}

// header parses the header at sections[at:] if it is the device's.
func (d *vmDevice) header(sections []byte, at int) (s Section, body int, ok bool) {
	s, body, ok = parseFull(sections, at)
	return s, body, ok && s.Name == d.Name && s.Instance == uint32(d.Instance)
}

// vmState is a device's or subsection's state. The state of a struct within it
// is described too, but is counted in its field's size.
type vmState struct {
	Fields []struct {
		Name     string `json:"name"`
		Size     int    `json:"size"`      // of one element, bytes
		ArrayLen *int   `json:"array_len"` // of an array described by its first element
	} `json:"fields"`
	Subsections []struct {
		Name string `json:"vmsd_name"`
		vmState
	} `json:"subsections"`
}

// length returns the state's length in the stream: its fields, then its
// subsections, each with the head 05, u8 n, name, be32 version. It is false
// for more than limit bytes or nonsense.
func (v *vmState) length(limit int) (int, bool) {
	n := 0
	for _, f := range v.Fields {
		count := 1
		if f.ArrayLen != nil {
			count = *f.ArrayLen
		}
		if f.Size < 0 || count < 0 || f.Size > 0 && count > (limit-n)/f.Size {
			return 0, false
		}
		n += f.Size * count
	}
	for i := range v.Subsections {
		s := &v.Subsections[i]
		n += 1 + 1 + len(s.Name) + 4
		if n > limit {
			return 0, false
		}
		k, ok := s.length(limit - n)
		if !ok {
			return 0, false
		}
		n += k
	}
	return n, true
}

// fields returns the fields of a state that begins at offset, whose length is
// known to be possible. An array whose elements differ is described element by
// element, each with the array's name: such a row is one field if the elements
// have one size.
func (v *vmState) fields(offset int) []TailField {
	list := make([]TailField, 0, len(v.Fields))
	for _, f := range v.Fields {
		count := 1
		if f.ArrayLen != nil {
			count = *f.ArrayLen
		}
		if n := len(list); n > 0 && f.Size > 0 && list[n-1].Name == f.Name && list[n-1].Size == f.Size {
			list[n-1].Count += count
		} else {
			list = append(list, TailField{f.Name, offset, f.Size, count})
		}
		offset += f.Size * count
	}
	return list
}

// runState finds the text of the globalstate section by its header: be32
// length with the final zero, then 100 bytes (migration/global_state.c).
func runState(tail []byte) string {
	const name, size = "\x0bglobalstate", 100
	for rest := tail; ; {
		i := bytes.LastIndex(rest, []byte(name))
		if i < 0 {
			return ""
		}
		if i >= 5 {
			if _, body, ok := parseFull(tail, i-5); ok && len(tail)-body >= 4+size {
				text, _, ok := bytes.Cut(tail[body+4:body+4+size], []byte{0})
				if ok && int(binary.BigEndian.Uint32(tail[body:])) == len(text)+1 {
					return string(text)
				}
			}
		}
		rest = rest[:i+len(name)-1]
	}
}
