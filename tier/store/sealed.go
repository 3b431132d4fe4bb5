package store

import (
	"context"
	"errors"

	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// Sealed objects are how small documents are stored: as integrity.Seal makes them.

// errEarlier: a document is sealed as in stores of version 1.
var errEarlier = errors.New("an earlier flic-migrate wrote it")

func unseal(b []byte, v any) error {
	if len(b) > 0 && b[0] == '{' {
		return errEarlier
	}
	return integrity.Unseal(b, v)
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
	b, err := integrity.Seal(v)
	if err != nil {
		return err
	}
	return s.dir.Write(ctx, name, spare(), b)
}
