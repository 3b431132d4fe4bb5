package stream

import "encoding/binary"

// Section types (migration/savevm.h).
const (
	typeEOF           = 0x00
	typeStart         = 0x01
	typePart          = 0x02
	typeEnd           = 0x03
	typeFull          = 0x04
	typeSubsection    = 0x05
	typeDescription   = 0x06
	typeConfiguration = 0x07
	typeCommand       = 0x08
	typeFooter        = 0x7e
)

const (
	magic   = "QEVM"
	version = 3
)

// AppendHeader appends the stream header.
func AppendHeader(dst []byte) []byte {
	return binary.BigEndian.AppendUint32(append(dst, magic...), version)
}

// AppendConfiguration appends the configuration section for a machine type
// such as pc-q35-7.2.
func AppendConfiguration(dst []byte, machineType string) []byte {
	dst = binary.BigEndian.AppendUint32(append(dst, typeConfiguration), uint32(len(machineType)))
	return append(dst, machineType...)
}

// AppendSubsection appends a subsection of the configuration with any body.
func AppendSubsection(dst []byte, name string, version uint32, body []byte) []byte {
	dst = appendName(append(dst, typeSubsection), name)
	dst = binary.BigEndian.AppendUint32(dst, version)
	return append(dst, body...)
}

// AppendConfigSubsection appends one of the known subsections of the
// configuration; s.Name says which.
func AppendConfigSubsection(dst []byte, s ConfigSubsection) []byte {
	dst = AppendSubsection(dst, s.Name, s.Version, nil)
	switch s.Name {
	case SubsectionTargetPageBits:
		dst = binary.BigEndian.AppendUint32(dst, s.TargetPageBits)
	case SubsectionCapabilities:
		dst = binary.BigEndian.AppendUint32(dst, uint32(len(s.Capabilities)))
		for _, c := range s.Capabilities {
			dst = appendName(dst, c)
		}
	case SubsectionUUID:
		dst = append(dst, s.UUID[:]...)
	}
	return dst
}

// AppendStart appends the header of a START section.
func AppendStart(dst []byte, s Section) []byte { return appendSection(dst, typeStart, s) }

// AppendFull appends the header of a FULL section.
func AppendFull(dst []byte, s Section) []byte { return appendSection(dst, typeFull, s) }

// AppendPart appends the header of a PART section.
func AppendPart(dst []byte, id uint32) []byte {
	return binary.BigEndian.AppendUint32(append(dst, typePart), id)
}

// AppendEnd appends the header of an END section.
func AppendEnd(dst []byte, id uint32) []byte {
	return binary.BigEndian.AppendUint32(append(dst, typeEnd), id)
}

// AppendFooter appends the footer of section id.
func AppendFooter(dst []byte, id uint32) []byte {
	return binary.BigEndian.AppendUint32(append(dst, typeFooter), id)
}

// AppendCommand appends a command. The payload must be shorter than 64 KiB.
func AppendCommand(dst []byte, number uint16, payload []byte) []byte {
	dst = binary.BigEndian.AppendUint16(append(dst, typeCommand), number)
	dst = binary.BigEndian.AppendUint16(dst, uint16(len(payload)))
	return append(dst, payload...)
}

// AppendEOF appends QEMU_VM_EOF.
func AppendEOF(dst []byte) []byte { return append(dst, typeEOF) }

// AppendDescription appends a vmdescription, which follows QEMU_VM_EOF.
func AppendDescription(dst, json []byte) []byte {
	dst = binary.BigEndian.AppendUint32(append(dst, typeDescription), uint32(len(json)))
	return append(dst, json...)
}

func appendSection(dst []byte, typ byte, s Section) []byte {
	dst = binary.BigEndian.AppendUint32(append(dst, typ), s.ID)
	dst = appendName(dst, s.Name)
	dst = binary.BigEndian.AppendUint32(dst, s.Instance)
	return binary.BigEndian.AppendUint32(dst, s.Version)
}

// appendName appends a counted string. A name over 255 bytes has no encoding
// and is the caller's mistake.
func appendName(dst []byte, name string) []byte {
	if len(name) > 255 {
		panic("stream: name longer than 255 bytes")
	}
	return append(append(dst, byte(len(name))), name...)
}
