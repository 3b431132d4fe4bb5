package ramparse

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
)

// TestRecorded takes apart every recorded stream, those in testdata and any in
// the directory that FLIC_TEST_STREAMS names.
func TestRecorded(t *testing.T) {
	var files []string
	for _, dir := range []string{"../testdata", os.Getenv("FLIC_TEST_STREAMS")} {
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
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%+v", w)
		})
	}
}
