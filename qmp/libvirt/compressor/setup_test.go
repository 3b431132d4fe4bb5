package compressor

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// tree is every file below a directory: its mode and content, or a link's target.
func tree(t *testing.T, root string) map[string]string {
	t.Helper()
	files := make(map[string]string)
	err := filepath.Walk(root, func(path string, fi os.FileInfo, err error) error {
		if err != nil || path == root {
			return err
		}
		text := fi.Mode().String()
		if fi.Mode()&os.ModeSymlink != 0 {
			target, err := os.Readlink(path)
			files[path[len(root):]] = text + " " + target
			return err
		}
		if fi.Mode().IsRegular() {
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			text += " " + string(b)
		}
		files[path[len(root):]] = text
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func differ(t *testing.T, what string, got, want map[string]string) {
	t.Helper()
	for name := range want {
		if got[name] != want[name] {
			t.Errorf("%s: %s is %q, want %q", what, name, got[name], want[name])
		}
	}
	for name := range got {
		if _, ok := want[name]; !ok {
			t.Errorf("%s: %s is there: %q", what, name, got[name])
		}
	}
}

func write(t *testing.T, root, name, text string, mode os.FileMode) {
	t.Helper()
	path := filepath.Join(root, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
}

// host makes a root directory: with or without systemd.
func host(t *testing.T, systemd bool, conf string) Setup {
	t.Helper()
	root := t.TempDir()
	for _, dir := range []string{"usr/local/lib", "etc/systemd/system"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	write(t, root, qemuConf, conf, 0o640)
	if systemd {
		write(t, root, "lib/systemd/system/libvirtd.service", "[Service]\n", 0o644)
		if err := os.MkdirAll(filepath.Join(root, systemdRun), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return Setup{Root: root, Program: "/opt/flic-migrate"}
}

const someConf = "# a comment\n#save_image_format = \"raw\"\nuser = \"root\"\n"

// TestInstall: all is there after it, again after a second time, and after
// uninstalling everything is as it was.
func TestInstall(t *testing.T) {
	for name, c := range map[string]struct {
		conf    string
		systemd bool
		replace bool
		want    string // lines that qemu.conf then has
	}{
		"plain":        {someConf, false, false, "save_image_format = \"lzop\"\nsnapshot_image_format = \"lzop\"\n"},
		"systemd":      {someConf, true, false, "save_image_format = \"lzop\"\nsnapshot_image_format = \"lzop\"\n"},
		"no newline":   {"user = \"root\"", true, false, "user = \"root\"\n# flic"},
		"empty":        {"", false, false, "snapshot_image_format = \"lzop\"\n"},
		"has one":      {someConf + "save_image_format = \"gzip\"\n", true, false, ")\nsnapshot_image_format = \"lzop\"\n"},
		"raw replaced": {"  save_image_format=\"raw\" # why\n" + someConf, true, true, replaced + "  save_image_format=\"raw\" # why\n"},
	} {
		s := host(t, c.systemd, c.conf)
		s.Replace = c.replace
		before := tree(t, s.Root)
		steps, err := s.Steps()
		if err != nil {
			t.Fatal(err)
		}
		for _, step := range steps {
			if step.Done || step.Conflict != nil {
				t.Errorf("%s: at first: %s: %s: %v, %v", name, step.Path, step.What, step.Done, step.Conflict)
			}
		}
		if err := s.Install(); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		installed := tree(t, s.Root)
		if !strings.Contains(installed["/"+qemuConf], c.want) || !strings.HasPrefix(installed["/"+qemuConf], "-rw-r----- ") {
			t.Errorf("%s: qemu.conf is %q", name, installed["/"+qemuConf])
		}
		for _, program := range Names {
			if got := installed["/"+linkDir+"/"+program]; !strings.HasSuffix(got, " /opt/flic-migrate") {
				t.Errorf("%s: %s is %q", name, program, got)
			}
		}
		drop := installed["/etc/systemd/system/libvirtd.service.d/flic-migrate.conf"]
		if strings.Contains(drop, "\nEnvironment=PATH=/usr/local/lib/flic-migrate/libvirt:/usr/local/sbin:") != c.systemd {
			t.Errorf("%s: drop-in %q", name, drop)
		}
		if _, ok := installed["/etc/systemd/system/virtqemud.service.d"]; ok {
			t.Errorf("%s: a drop-in for a service that is not there", name)
		}
		steps, err = s.Steps()
		if err != nil {
			t.Fatal(err)
		}
		for _, step := range steps {
			if !step.Done || step.Conflict != nil {
				t.Errorf("%s: installed: %s: %v, %v", name, step.Path, step.Done, step.Conflict)
			}
		}
		if err := s.Install(); err != nil {
			t.Errorf("%s: again: %v", name, err)
		}
		differ(t, name+", installed twice", tree(t, s.Root), installed)
		for range 2 {
			if err := s.Uninstall(); err != nil {
				t.Errorf("%s: uninstall: %v", name, err)
			}
			differ(t, name+", uninstalled", tree(t, s.Root), before)
		}
	}
}

// TestInstallWhole: what is made is written like what is replaced: whole, with its own mode
// whatever the umask is, and nothing is left beside it.
func TestInstallWhole(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0o077))
	s := host(t, true, someConf)
	if err := s.Install(); err != nil {
		t.Fatal(err)
	}
	list, err := os.ReadDir(s.path(systemdEtc + "/libvirtd.service.d"))
	if err != nil || len(list) != 1 {
		t.Fatalf("%v, %v", list, err)
	}
	if fi, err := list[0].Info(); err != nil || fi.Mode() != 0o644 {
		t.Errorf("%v, %v", fi.Mode(), err)
	}
}

// TestInstallSet: a file in which all is said already is not touched.
func TestInstallSet(t *testing.T) {
	conf := "save_image_format = \"gzip\"\nsnapshot_image_format = \"xz\"\n"
	s := host(t, false, conf)
	if err := s.Install(); err != nil {
		t.Fatal(err)
	}
	if got := tree(t, s.Root)["/"+qemuConf]; got != "-rw-r----- "+conf {
		t.Errorf("%q", got)
	}
	if err := s.Uninstall(); err != nil {
		t.Error(err)
	}
	if got := tree(t, s.Root)["/"+qemuConf]; got != "-rw-r----- "+conf {
		t.Errorf("%q", got)
	}
}

// TestInstallNew: a qemu.conf that was not there is not there afterwards.
func TestInstallNew(t *testing.T) {
	s := host(t, false, "")
	os.Remove(s.path(qemuConf))
	before := tree(t, s.Root)
	if err := s.Install(); err != nil {
		t.Fatal(err)
	}
	if got := tree(t, s.Root)["/"+qemuConf]; !strings.HasPrefix(got, "-rw------- ") {
		t.Errorf("%q", got)
	}
	if err := s.Uninstall(); err != nil {
		t.Error(err)
	}
	differ(t, "uninstalled", tree(t, s.Root), before)
}

// TestConflicts: what somebody else has made stops an installation before it has
// changed anything, and stays when all else is uninstalled.
func TestConflicts(t *testing.T) {
	for name, spoil := range map[string]func(s Setup){
		"raw":      func(s Setup) { write(t, s.Root, qemuConf, "save_image_format = \"raw\"\n", 0o600) },
		"snapshot": func(s Setup) { write(t, s.Root, qemuConf, someConf+"\tsnapshot_image_format=\"raw\"", 0o600) },
		"program":  func(s Setup) { write(t, s.Root, linkDir+"/gzip", "#!/bin/sh\n", 0o755) },
		"drop-in": func(s Setup) {
			write(t, s.Root, "etc/systemd/system/libvirtd.service.d/flic-migrate.conf", "[Service]\n", 0o644)
		},
	} {
		s := host(t, true, someConf)
		spoil(s)
		before := tree(t, s.Root)
		if err := s.Install(); !errors.Is(err, ErrConflict) {
			t.Errorf("%s: %v", name, err)
		}
		differ(t, name, tree(t, s.Root), before)
		err := s.Uninstall()
		if fromConf := name == "raw" || name == "snapshot"; fromConf != (err == nil) {
			t.Errorf("%s: uninstall: %v", name, err)
		}
		differ(t, name+", uninstalled", tree(t, s.Root), before)
	}
	// A block that somebody has cut is left alone, and said.
	s := host(t, false, someConf)
	if err := s.Install(); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(s.path(qemuConf))
	if err != nil {
		t.Fatal(err)
	}
	write(t, s.Root, qemuConf, strings.Replace(string(b), blockEnd, "", 1), 0o640)
	if err := s.Uninstall(); !errors.Is(err, ErrConflict) {
		t.Errorf("uninstall of a cut block: %v", err)
	}
	// A link to where the program was before is ours.
	s = host(t, false, someConf)
	if err := s.Install(); err != nil {
		t.Fatal(err)
	}
	s.Program = "/usr/bin/flic-migrate"
	if err := s.Install(); err != nil {
		t.Fatal(err)
	}
	if to, err := os.Readlink(filepath.Join(s.PathDir(), "lzop")); to != s.Program {
		t.Errorf("link to %s, %v", to, err)
	}
}

// TestConfKeepsLater: what is written behind our lines stays there.
func TestConfKeepsLater(t *testing.T) {
	for _, conf := range []string{someConf, "user = \"root\"", ""} {
		with, err := addBlock([]byte(conf), false, false)
		if err != nil {
			t.Fatal(err)
		}
		const later = "group = \"kvm\"\n"
		old, remove, err := removeBlock(append(with, later...))
		want := conf
		if conf != "" && !strings.HasSuffix(conf, "\n") {
			want += "\n"
		}
		if string(old) != want+later || remove || err != nil {
			t.Errorf("%q becomes %q, %v, %v", conf, old, remove, err)
		}
	}
}

// FuzzConf: whatever is in qemu.conf is there again afterwards.
func FuzzConf(f *testing.F) {
	f.Add([]byte(someConf), false, true)
	f.Add([]byte("save_image_format = \"raw\"\nx"), false, true)
	f.Add([]byte("save_image_format = \"gzip\"\n\tsnapshot_image_format=\"raw\"\r\n"), false, true)
	f.Add([]byte(""), true, false)
	f.Add([]byte(blockBegin+")\n"+blockEnd+"\n"), false, false)
	f.Fuzz(func(t *testing.T, conf []byte, missing, replace bool) {
		if missing {
			conf = nil
		}
		if hasBlock(conf) {
			removeBlock(conf)
			return
		}
		with, err := addBlock(conf, missing, replace)
		if err != nil {
			return
		}
		old, remove, err := removeBlock(with)
		if err != nil || !bytes.Equal(old, conf) || remove != missing {
			t.Errorf("%q becomes %q, then %q, %v, %v", conf, with, old, remove, err)
		}
	})
}
