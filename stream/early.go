package stream

import (
	"bytes"
	"encoding/binary"
)

// Some devices must be there before RAM is: virtio-mem says which of its memory is
// plugged (vmstate's early_setup; machine types of QEMU 8.0 and later). Their FULL
// sections stand among the STARTs: before ram's up to QEMU 9 and from 11 on, behind
// it in QEMU 10. Like all FULL sections they have no length, and what has, the
// vmdescription, is at the stream's other end.
//
// So an early section is delimited by what follows it: its footer, and then a
// header that can stand there. A row of FULL sections is early if it ends so in a
// START, a PART, an END or a command. One that runs into QEMU_VM_EOF, into the end
// of the input, or over MaxPeek bytes is the device tail.
//
// The guest decides what is plugged, and so can write footers and headers into a
// virtio-mem's bitmap. That makes its own stream unreadable, and nothing worse.

// early returns the lengths of the early sections at the cursor, headers included
// and footers not; nil if the device tail begins there. It consumes nothing, and
// waits for no byte more than it takes to tell.
func (r *Reader) early() (lengths []int) {
	if !r.setup || r.footers == footersAbsent {
		return nil
	}
	for at := 0; ; {
		n, next := r.delimit(at)
		switch next {
		case typeFull:
			lengths = append(lengths, n)
			at += n + footerLen
		case typeStart, typePart, typeEnd, typeCommand:
			return append(lengths, n)
		default:
			return nil
		}
	}
}

const footerLen = 5

// delimit finds the end of the FULL section that begins `at` bytes from the cursor.
// It returns its length without the footer and the type byte of what follows that:
// typeEOF also stands for what can't be delimited.
func (r *Reader) delimit(at int) (n int, next byte) {
	var footer []byte
	from := at // where a footer is looked for
	for b := r.buffered(); ; {
		if footer == nil {
			if s, body, ok := parseFull(b, at); ok {
				footer, from = AppendFooter(nil, s.ID), body
			} else if len(b)-at > maxFullHeader {
				return 0, typeEOF
			}
		}
		for footer != nil {
			i := bytes.Index(b[from:], footer)
			if i < 0 {
				from = max(from, len(b)-footerLen+1)
				break
			}
			typ, fits, short := r.follows(b[from+i+footerLen:])
			if fits {
				return from + i - at, typ
			}
			if short {
				break
			}
			from += i + 1
		}
		if _, err := r.c.Peek(len(b) + 1); err != nil {
			return 0, typeEOF
		}
		b = r.buffered()
	}
}

// maxFullHeader is the longest header that a FULL section can have.
const maxFullHeader = 1 + 4 + 1 + 255 + 4 + 4

// buffered is all that the cursor has, not consumed.
func (r *Reader) buffered() []byte {
	b, _ := r.c.Peek(min(r.c.Buffered(), MaxPeek))
	return b
}

// follows tells whether b begins with what can follow a section's footer during the
// setup; short, if b has to be longer for that to be told.
func (r *Reader) follows(b []byte) (typ byte, fits, short bool) {
	if len(b) == 0 {
		return 0, false, true
	}
	need := 5
	switch typ = b[0]; typ {
	case typeEOF:
		return typ, true, false
	case typeStart, typeFull:
		if need = 6; len(b) >= need {
			need += int(b[5]) + 8
		}
	case typePart, typeEnd, typeCommand:
	default:
		return typ, false, false
	}
	if len(b) < need {
		return typ, false, true
	}
	switch typ {
	case typeStart, typeFull:
		// The two differ in their type byte alone.
		s, _, ok := parseFull(append([]byte{typeFull}, b[1:need]...), 0)
		_, started := r.sections[s.ID]
		fits = ok && !started
	case typePart, typeEnd:
		_, fits = r.sections[binary.BigEndian.Uint32(b[1:])]
	case typeCommand:
		number, n := int(binary.BigEndian.Uint16(b[1:])), int(binary.BigEndian.Uint16(b[3:]))
		fits = number > 0 && number < len(commandLengths) && (commandLengths[number] == n || commandLengths[number] < 0)
	}
	return typ, fits, false
}
