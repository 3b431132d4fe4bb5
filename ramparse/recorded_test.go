package ramparse

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/flic-migrate/flic-migrate/stream"
)

// TestRecorded takes apart every recorded stream: ours, the module's and any in
// the directory that FLIC_TEST_STREAMS names.
func TestRecorded(t *testing.T) {
	var files []string
	for _, dir := range []string{"testdata", "../testdata", os.Getenv("FLIC_TEST_STREAMS")} {
		for _, pattern := range []string{"*.stream", "*.stream.zst"} {
			found, err := filepath.Glob(filepath.Join(dir, pattern))
			if err != nil {
				t.Fatal(err)
			}
			files = append(files, found...)
		}
	}
	for _, name := range files {
		t.Run(filepath.Base(name), func(t *testing.T) {
			f, err := os.Open(name)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			var r io.Reader = f
			if strings.HasSuffix(name, ".zst") {
				z, err := zstd.NewReader(f)
				if err != nil {
					t.Fatal(err)
				}
				defer z.Close()
				r = z
			}
			w, err := walk(r, -1)
			if strings.Contains(name, ".refused.") {
				// QEMU does not load these, and nothing may take them for whole.
				if err == nil && w.complete != stream.Incomplete {
					t.Errorf("accepted: %v", w.complete)
				} else if err != nil && !errors.Is(err, stream.ErrTruncated) && !errors.Is(err, stream.ErrDamaged) {
					t.Errorf("%v; want ErrTruncated or ErrDamaged", err)
				}
				return
			}
			if strings.Contains(name, "mapped-ram") {
				// No stream, so RAM is not understood, and known to be not.
				if !errors.Is(err, stream.ErrUnknown) || !strings.Contains(err.Error(), "mapped-ram") {
					t.Errorf("%v; want ErrUnknown that says why", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			// Machine types before 2.4 leave out globalstate if they can.
			if w.footers && (w.complete < stream.WithFooter || w.tail.RunState == "") ||
				w.complete == stream.Incomplete || w.pageSize == 0 || w.passes == 0 {
				t.Errorf("%v, run state %q, pages of %d bytes, %d passes", w.complete, w.tail.RunState, w.pageSize, w.passes)
			}
			if w.complete == stream.WithDescription && (len(w.tail.Sections) == 0 || w.tail.PageSize != w.pageSize) {
				t.Errorf("%d sections, pages of %d bytes in the vmdescription; want %d", len(w.tail.Sections), w.tail.PageSize, w.pageSize)
			}
			t.Logf("records %v, %d passes, commands %v, %d foreign bytes, %d sections", w.kinds, w.passes, w.commands, w.foreign, len(w.tail.Sections))
		})
	}
}
