// Package integrity is the one rule by which all stored bytes are checked, and the
// one error that says that some of them are not what was written. The flash image,
// the NVRAM file, working sets and the store's small files share it, so that a
// caller needs to know neither which of them it was nor which package reads it.
package integrity

import (
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
)

// Castagnoli is the polynomial of the checksums in all stored formats: CRC-32C,
// which processors have an instruction for.
var Castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Checksum returns the CRC-32C of b.
func Checksum(b []byte) uint32 { return crc32.Checksum(b, Castagnoli) }

// Hash makes a CRC-32C of what is written to it.
func Hash() hash.Hash32 { return crc32.New(Castagnoli) }

// ErrChecksum is wrapped by a CorruptError when stored bytes and their checksum
// differ.
var ErrChecksum = errors.New("checksum mismatch")

// CorruptError tells where a stored file is damaged. It is what every reader of
// stored bytes returns, as against an operation that failed.
type CorruptError struct {
	File   string // path of the file, or what kind it is where nobody knows its name
	Offset int64  // byte offset in File at which the damaged unit starts
	What   string // the unit: "header", "PAGES 7", "page pc.ram:0x1000"; may be empty
	Err    error  // what is wrong with it
}

func (e *CorruptError) Error() string {
	if e.What == "" {
		return fmt.Sprintf("%s: offset %d: %v", e.File, e.Offset, e.Err)
	}
	return fmt.Sprintf("%s: offset %d: %s: %v", e.File, e.Offset, e.What, e.Err)
}

func (e *CorruptError) Unwrap() error { return e.Err }

// IsCorrupt tells whether err says that stored data are damaged.
func IsCorrupt(err error) bool {
	var c *CorruptError
	return errors.As(err, &c)
}
