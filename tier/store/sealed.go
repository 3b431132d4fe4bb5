package store

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// Sealed objects are how small documents are stored, so that no stored byte is
// without a checksum: eight hexadecimal digits of the body's CRC-32C, a space, the
// body, which is JSON on one line, and a newline.

// sealHead is what stands before the body, in bytes.
const sealHead = 9

func seal(v any) ([]byte, error) {
	body, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	return fmt.Appendf(nil, "%08x %s\n", integrity.Checksum(body), body), nil
}

// errEarlier: a document is sealed as in stores of version 1.
var errEarlier = errors.New("an earlier flic-migrate wrote it")

// unseal reads only what seal writes: each byte is under the checksum or can have
// one value.
func unseal(b []byte, v any) error {
	if len(b) > 0 && b[0] == '{' {
		return errEarlier
	}
	if len(b) <= sealHead || b[sealHead-1] != ' ' || b[len(b)-1] != '\n' {
		return errors.New("not as it was written")
	}
	body := b[sealHead : len(b)-1]
	want := fmt.Appendf(nil, "%08x", integrity.Checksum(body))
	if !bytes.Equal(b[:sealHead-1], want) {
		if _, err := hex.DecodeString(string(b[:sealHead-1])); err != nil {
			return errors.New("not as it was written")
		}
		return integrity.ErrChecksum
	}
	return json.Unmarshal(body, v)
}

// maxSealed caps a sealed object, but for one that says otherwise. The longest
// holds a path.
const maxSealed = 64 << 10

// readSealed reads a sealed object of at most limit bytes; what is the name of what
// is in it, for the error.
func (s *Store) readSealed(ctx context.Context, name, what string, limit int64, v any) error {
	b, err := s.dir.Read(ctx, name, limit)
	if err == nil {
		err = unseal(b, v)
	} else if !errors.Is(err, vfs.ErrTooLarge) && !errors.Is(err, vfs.ErrNotRegular) && !errors.Is(err, vfs.ErrLink) {
		return err
	}
	if err != nil {
		return &integrity.CorruptError{File: s.dir.Path(name), What: what, Err: err}
	}
	return nil
}

// writeSealed replaces a sealed object, durably. The caller holds the store lock,
// which keeps gc from the object while it has its spare name.
func (s *Store) writeSealed(ctx context.Context, name string, v any) error {
	b, err := seal(v)
	if err != nil {
		return err
	}
	return s.dir.Write(ctx, name, spare(), b)
}
