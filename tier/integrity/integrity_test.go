package integrity

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"testing"
)

// The check value of CRC-32C, from the catalogue of CRC algorithms: files written
// with another polynomial could not be read.
func TestChecksum(t *testing.T) {
	if got := Checksum([]byte("123456789")); got != 0xe3069283 {
		t.Errorf("%#x", got)
	}
}

func TestCorruptError(t *testing.T) {
	for _, c := range []struct {
		err  CorruptError
		want string
	}{
		{CorruptError{File: "f.flic", Offset: 64, What: "PAGES 7", Err: ErrChecksum}, "f.flic: offset 64: PAGES 7: checksum mismatch"},
		{CorruptError{File: "nvram", Offset: 8256, Err: errors.New("not an owner")}, "nvram: offset 8256: not an owner"},
	} {
		err := fmt.Errorf("checkpoint vm@1: %w", &c.err)
		if got := c.err.Error(); got != c.want {
			t.Errorf("%q, want %q", got, c.want)
		}
		if !IsCorrupt(err) || !IsCorrupt(errors.Join(fs.ErrClosed, err)) || !errors.Is(err, c.err.Err) {
			t.Errorf("%v is not known as damage", err)
		}
	}
	if IsCorrupt(nil) || IsCorrupt(context.Canceled) || IsCorrupt(ErrChecksum) {
		t.Error("any error is damage")
	}
}
