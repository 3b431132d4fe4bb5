package vfs

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
)

// NotMounted is the mount point in /etc/fstab (fstab(5)) that a path is at or below and at which
// nothing is mounted (proc(5), mountinfo); "" if there is none, or if that can't be told. What is
// written there would be on another file system than its owner means, and hidden by the mount
// when it comes. A mount that systemd makes at the first access counts as there.
func NotMounted(path string) string {
	fstab, err := os.ReadFile("/etc/fstab")
	if err != nil {
		return ""
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return ""
	}
	return notMounted(resolved(path), fstab, mounts)
}

// resolved is a path without symbolic links, as far as it is there.
func resolved(path string) string {
	path, err := filepath.Abs(path)
	if err != nil {
		return ""
	}
	rest := ""
	for dir := path; ; dir = filepath.Dir(dir) {
		if real, err := filepath.EvalSymlinks(dir); err == nil {
			return filepath.Join(real, rest)
		}
		if dir == "/" {
			return path
		}
		rest = filepath.Join(filepath.Base(dir), rest)
	}
}

// notMounted is the longest such mount point.
func notMounted(path string, fstab, mounts []byte) (longest string) {
	mounted := make(map[string]bool)
	for line := range bytes.Lines(mounts) {
		if f := strings.Fields(string(line)); len(f) > 4 {
			mounted[unescape(f[4])] = true
		}
	}
	for line := range bytes.Lines(fstab) {
		f := strings.Fields(string(line))
		if len(f) < 2 || strings.HasPrefix(f[0], "#") {
			continue
		}
		at := filepath.Clean(unescape(f[1]))
		if !filepath.IsAbs(at) || mounted[at] || len(at) < len(longest) {
			continue // swap has no mount point
		}
		if path == at || strings.HasPrefix(path, at+"/") {
			longest = at
		}
	}
	// A mount below one that is missing is the one that counts.
	for at := range mounted {
		if len(at) > len(longest) && (path == at || strings.HasPrefix(path, at+"/")) {
			return ""
		}
	}
	return longest
}

// unescape is a name in fstab and in mountinfo, in which blanks and backslashes are octal.
var unescape = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`, `\043`, "#").Replace
