package stream

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

// MaxTail is the most a TailScanner takes.
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
func (s *TailScanner) Write(p []byte) (int, error) { panic("unfinished") }

// Bytes returns the tail so far, valid until the next Write.
func (s *TailScanner) Bytes() []byte { return s.buf }

// Complete says whether the tail so far ends as a stream may end. It is cheap
// enough to be asked whenever a read would block.
func (s *TailScanner) Complete() Completion { panic("unfinished") }

// Tail is a device tail taken apart.
type Tail struct {
	Sections    []TailSection // in stream order; nil without a vmdescription
	PageSize    int           // from the vmdescription; 0 without
	RunState    string        // globalstate's text, such as running or paused; empty if absent
	Description []byte        // the vmdescription's JSON; nil without
}

// TailSection is a FULL section. Offset and Length are those of its body
// within the tail, without header and footer.
type TailSection struct {
	Section
	Offset, Length int
}

// ParseTail walks a complete tail by the field sizes of its vmdescription.
// Sizes that do not meet the sections' headers and footers give ErrDamaged.
// Without a vmdescription only RunState is found.
func ParseTail(tail []byte) (Tail, error) { panic("unfinished") }
