package integrity

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
)

// sealHead is what stands before the body, in bytes.
const sealHead = 9

// Seal is how small documents are stored, so that no stored byte is without a checksum:
// eight hexadecimal digits of the body's CRC-32C, a space, the body, which is v as JSON
// on one line, and a newline.
func Seal(v any) ([]byte, error) {
	body, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	return fmt.Appendf(nil, "%08x %s\n", Checksum(body), body), nil
}

// Unseal reads into v only what Seal writes: each byte is under the checksum or can have
// one value. The caller has capped b.
func Unseal(b []byte, v any) error {
	if len(b) <= sealHead || b[sealHead-1] != ' ' || b[len(b)-1] != '\n' {
		return errors.New("not as it was written")
	}
	body := b[sealHead : len(b)-1]
	want := fmt.Appendf(nil, "%08x", Checksum(body))
	if !bytes.Equal(b[:sealHead-1], want) {
		if _, err := hex.DecodeString(string(b[:sealHead-1])); err != nil {
			return errors.New("not as it was written")
		}
		return ErrChecksum
	}
	return json.Unmarshal(body, v)
}
