package stream

// Kind says what a Frame is.
type Kind uint8

// The kinds of frames, in the order of a stream.
const (
	Header        Kind = iota + 1 // magic and version
	Configuration                 // machine type
	Subsection                    // of the configuration
	SectionStart                  // iterable section: setup; its payload follows
	SectionPart                   // iterable section: a piece; its payload follows
	SectionEnd                    // iterable section: the last piece; its payload follows
	SectionEarly                  // device section ahead of RAM's pages, whole
	SectionFull                   // the device tail begins; nothing consumed
	Footer                        // ends a section
	CommandFrame                  // a command and its payload
	EOF                           // QEMU_VM_EOF
)

var kindNames = [...]string{
	Header: "header", Configuration: "configuration", Subsection: "subsection",
	SectionStart: "section start", SectionPart: "section part", SectionEnd: "section end",
	SectionEarly: "section early", SectionFull: "section full", Footer: "footer", CommandFrame: "command", EOF: "eof",
}

func (k Kind) String() string {
	if int(k) < len(kindNames) && kindNames[k] != "" {
		return kindNames[k]
	}
	return "unknown frame"
}

// Section names a section. PART, END and footers carry only the ID; the Reader
// fills in the rest from the section's START.
type Section struct {
	ID       uint32
	Name     string // idstr, 1 to 255 bytes
	Instance uint32
	Version  uint32
}

// Command is one of QEMU's MIG_CMD commands.
type Command struct {
	Number  uint16
	Payload []byte // valid until the next call
}

// The commands (enum qemu_vm_cmd, migration/savevm.c).
const (
	CommandOpenReturnPath  = 1
	CommandPing            = 2 // be32 value
	CommandPostcopyAdvise  = 3 // empty, or be64 OR of page sizes, be64 target page size
	CommandPostcopyListen  = 4
	CommandPostcopyRun     = 5
	CommandPostcopyDiscard = 6 // u8 0, u8 len, name, u8 0, pairs of be64 start, be64 length
	CommandPackaged        = 7 // be32 n; n bytes follow outside of the payload
	CommandEnableColo      = 8
	CommandPostcopyResume  = 9
	CommandRecvBitmap      = 10 // u8 len, name
	CommandSwitchoverStart = 11
)

// ConfigSubsection is a subsection of the configuration. Only the field that
// belongs to Name is set.
type ConfigSubsection struct {
	Name           string
	Version        uint32
	TargetPageBits uint32   // configuration/target-page-bits: 10 to 16
	Capabilities   []string // configuration/capabilities
	UUID           [16]byte // configuration/uuid
}

// A Frame is one element of the stream. Raw holds its bytes verbatim, without
// the payload of a section or package that follows it, but with that of an early
// section, whose body is what Body returns. Raw and
// Command.Payload are valid until the next call on the Reader or its Cursor.
type Frame struct {
	Kind        Kind
	Offset      int64 // of the frame's first byte
	Raw         []byte
	Section     Section          // START, PART, END, early, footer
	Command     Command          // command
	MachineType string           // configuration
	Subsection  ConfigSubsection // subsection
}

// Body returns the body of an early section, without header and footer, and its
// offset in the stream.
func (f *Frame) Body() (body []byte, offset int64) {
	head := 1 + 4 + 1 + len(f.Section.Name) + 4 + 4
	return f.Raw[head:], f.Offset + int64(head)
}

// The names of the configuration's subsections (vmstate_configuration,
// migration/savevm.c).
const (
	SubsectionTargetPageBits = "configuration/target-page-bits"
	SubsectionCapabilities   = "configuration/capabilities"
	SubsectionUUID           = "configuration/uuid"
)
