package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// A command to a TPM 2.0, and its answer, is a tag (be16: with sessions or without),
// its length with this header (be32), a command code or a result (be32), and what
// belongs to it: Trusted Platform Module Library, part 3, TPM2_PCR_Extend and
// TPM2_PCR_Read; part 2 has the structures.
const (
	tpmNoSessions = 0x8001
	tpmSessions   = 0x8002
	tpmExtend     = 0x182
	tpmRead       = 0x17e
	tpmSHA256     = 0x0b
	// tpmPCR is the one for debugging, which nobody else extends.
	tpmPCR = 16
)

// pcr returns the PCR's value; with the argument "extend" it is extended before.
func pcr(args []string) ([]byte, error) {
	// os.Open would make it non-blocking, and a read that comes before the answer ends
	// with EOF then.
	fd, err := unix.Open("/dev/tpm0", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "/dev/tpm0")
	defer f.Close()
	if slices.Equal(args, []string{"extend"}) {
		be := binary.BigEndian
		body := be.AppendUint32(nil, tpmPCR)
		// One session, nine bytes: that of a password, which is empty; no nonce, no
		// attributes.
		body = be.AppendUint32(body, 9)
		body = be.AppendUint32(body, 0x40000009)
		body = append(body, 0, 0, 0, 0, 0)
		// One digest.
		body = be.AppendUint32(body, 1)
		body = be.AppendUint16(body, tpmSHA256)
		for i := range byte(32) {
			body = append(body, i+1)
		}
		if _, err := tpm(f, tpmSessions, tpmExtend, body); err != nil {
			return nil, err
		}
	}
	// One selection, three bytes of a bit for each PCR.
	answer, err := tpm(f, tpmNoSessions, tpmRead, []byte{0, 0, 0, 1, 0, tpmSHA256, 3, 0, 0, 1 << (tpmPCR - 16)})
	if err != nil {
		return nil, err
	}
	// A counter, the selection, the number of digests, the digest's length.
	const before = 4 + 10 + 4 + 2
	if len(answer) != before+32 {
		return nil, fmt.Errorf("the TPM answers %x", answer)
	}
	return answer[before:], nil
}

// tpm sends a command and returns what follows the answer's header.
func tpm(device io.ReadWriter, tag uint16, code uint32, body []byte) ([]byte, error) {
	command := binary.BigEndian.AppendUint16(nil, tag)
	command = binary.BigEndian.AppendUint32(command, uint32(10+len(body)))
	command = binary.BigEndian.AppendUint32(command, code)
	if _, err := device.Write(append(command, body...)); err != nil {
		return nil, err
	}
	answer := make([]byte, 4096)
	n, err := device.Read(answer)
	if err != nil {
		return nil, err
	}
	if n < 10 {
		return nil, errors.New("the TPM's answer is cut short")
	}
	if result := binary.BigEndian.Uint32(answer[6:]); result != 0 {
		return nil, fmt.Errorf("the TPM answers %#x to command %#x", result, code)
	}
	return answer[10:n], nil
}
