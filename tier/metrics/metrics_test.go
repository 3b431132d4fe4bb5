package metrics

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	p := expfmt.NewTextParser(model.UTF8Validation)
	if _, err := p.TextToMetricFamilies(strings.NewReader(string(b))); err != nil {
		t.Fatalf("%v in\n%s", err, b)
	}
	return string(b)
}

// A file has what was set, is read by everybody, and remembers when a run last succeeded.
func TestFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "vm.prom")
	s := New(path, "save", `a"b`)
	s.Gauge("pages", "Pages.", 3, "kind", "hot")
	s.Gauge("pages", "Pages.", 4, "kind", "cold")
	if err := s.Ended(0); err != nil {
		t.Fatal(err)
	}
	first := read(t, path)
	for _, line := range []string{
		"# TYPE flic_migrate_pages gauge\n", `flic_migrate_pages{kind="hot",verb="save",vm="a\"b"} 3` + "\n", `flic_migrate_pages{kind="cold",verb="save",vm="a\"b"} 4` + "\n",
		`flic_migrate_exit_code{verb="save",vm="a\"b"} 0` + "\n",
	} {
		if !strings.Contains(first, line) {
			t.Errorf("%q is not in\n%s", line, first)
		}
	}
	success := func(text string) string {
		for _, line := range strings.Split(text, "\n") {
			if strings.HasPrefix(line, lastSuccess+"{") {
				return line
			}
		}
		return ""
	}
	if success(first) == "" {
		t.Errorf("no success in\n%s", first)
	}
	fi, err := os.Stat(path)
	if err != nil || fi.Mode().Perm() != 0o644 {
		t.Errorf("%v, %v", fi.Mode(), err)
	}
	// A failure keeps the time of the last success, and nothing else of the last run.
	if err := New(path, "save", `a"b`).Ended(5); err != nil {
		t.Fatal(err)
	}
	second := read(t, path)
	if success(second) != success(first) || !strings.Contains(second, `flic_migrate_exit_code{verb="save",vm="a\"b"} 5`) || strings.Contains(second, "pages") {
		t.Errorf("after a failure\n%s", second)
	}
	// What another verb or VM has left, or something else, is nobody's success.
	for _, s := range []*Set{New(path, "verify", `a"b`), New(path, "save", "c")} {
		if err := s.Ended(1); err != nil {
			t.Fatal(err)
		}
		if text := read(t, path); success(text) != "" {
			t.Errorf("another's success in\n%s", text)
		}
	}
	if err := os.WriteFile(path, []byte("no metrics { at all"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := New(path, "save", "c").Ended(1); err != nil {
		t.Fatal(err)
	}
	if text := read(t, path); success(text) != "" {
		t.Errorf("success out of nothing in\n%s", text)
	}
	left, err := filepath.Glob(filepath.Dir(path) + "/.*")
	if err != nil || len(left) > 0 {
		t.Errorf("left: %q, %v", left, err)
	}
}

// What is no regular file stays what it is.
func TestNoFile(t *testing.T) {
	dir := t.TempDir()
	link := filepath.Join(dir, "link")
	if err := os.Symlink(filepath.Join(dir, "to"), link); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{link, dir, filepath.Join(dir, "none", "file")} {
		if err := New(path, "save", "a").Ended(0); err == nil {
			t.Errorf("%s was written", path)
		}
	}
	if fi, err := os.Lstat(link); err != nil || fi.Mode()&os.ModeSymlink == 0 {
		t.Errorf("%v, %v", fi, err)
	}
}
