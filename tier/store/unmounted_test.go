package store

import (
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// TestUnmounted: no store is made in a mount point at which nothing is mounted, and who looks
// for one is told of that.
func TestUnmounted(t *testing.T) {
	dir := t.TempDir()
	defer func(was func(string) string) { notMounted = was }(notMounted)
	notMounted = func(path string) string {
		if !strings.HasPrefix(path, dir) {
			t.Error(path)
		}
		return dir
	}
	for _, create := range []bool{false, true} {
		_, err := Open(t.Context(), vfs.OS, dir+"/store", create)
		if !errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), "/etc/fstab") || !strings.Contains(err.Error(), dir) {
			t.Errorf("create %v: %v", create, err)
		}
	}
	if list, err := os.ReadDir(dir); err != nil || len(list) > 0 {
		t.Error(list, err)
	}
	// One that is there is opened whatever fstab says.
	was := notMounted
	notMounted = func(string) string { return "" }
	if _, err := Open(t.Context(), vfs.OS, dir+"/store", true); err != nil {
		t.Fatal(err)
	}
	notMounted = was
	if _, err := Open(t.Context(), vfs.OS, dir+"/store", false); err != nil {
		t.Error(err)
	}
}
