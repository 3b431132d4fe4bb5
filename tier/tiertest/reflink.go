package tiertest

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// ReflinkDir makes a file system whose files can share disk blocks (XFS, on a loop device),
// and returns a directory of it, which is gone when the test has ended. Where that can't be
// done, as without root or a loop device, it logs why and returns "": tests then do with
// whole copies, and with crashfs, what they would do there.
func ReflinkDir(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	file, at := filepath.Join(dir, "xfs"), filepath.Join(dir, "mnt")
	f, err := os.Create(file)
	if err == nil {
		err = f.Truncate(512 << 20) // the least that mkfs.xfs takes is 300 MiB; few blocks are written
		f.Close()
	}
	if err == nil {
		err = os.Mkdir(at, 0o700)
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"mkfs.xfs", "-q", "-m", "reflink=1", file}, {"mount", "-o", "loop", file, at}} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Logf("no file system with reflink: %v: %v %s", args, err, out)
			return ""
		}
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", at).CombinedOutput(); err != nil {
			t.Errorf("umount: %v %s", err, out)
		}
	})
	return at
}
