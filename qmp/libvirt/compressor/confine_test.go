package compressor

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const (
	someProfile = "profile libvirtd /usr/sbin/libvirtd flags=(attach_disconnected) {\n  /usr/bin/* PUx,\n  include if exists <local/usr.sbin.libvirtd>\n}\n"
	someRules   = "# Site-specific additions.\n/srv/** rw,\n"
)

// confined is a host with AppArmor's profiles of libvirt's daemons, of which the
// kernel has those named, and an apparmor_parser that notes its arguments in the
// returned file and fails if a file "refuse" is beside it.
func confined(t *testing.T, loaded string) (s Setup, calls string) {
	t.Helper()
	s = host(t, false, someConf)
	for _, dir := range []string{apparmorLocal, filepath.Dir(apparmorLoaded)} {
		if err := os.MkdirAll(s.path(dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	write(t, s.Root, apparmorDir+"/usr.sbin.libvirtd", someProfile, 0o644)
	write(t, s.Root, apparmorDir+"/usr.sbin.virtqemud", strings.ReplaceAll(someProfile, "libvirtd", "virtqemud"), 0o644)
	write(t, s.Root, apparmorLocal+"/usr.sbin.libvirtd", someRules, 0o644)
	write(t, s.Root, apparmorLoaded, loaded, 0o444)
	dir := script(t, "apparmor_parser", `d=$(dirname "$0"); echo "$*" >>$d/calls; [ ! -e $d/refuse ] || { echo syntax error >&2; exit 1; }`)
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	return s, filepath.Join(dir, "calls")
}

// TestRules: each profile that is there gets a rule for the program, once, and is
// loaded again if the kernel has it; what else the host's file has stays; and
// afterwards all is as it was.
func TestRules(t *testing.T) {
	s, calls := confined(t, "lsb_release (enforce)\nlibvirtd (enforce)\nlibvirtd//qemu_bridge_helper (enforce)\n")
	before := tree(t, s.Root)
	local := "/" + apparmorLocal + "/usr.sbin."
	for _, program := range []string{"/opt/flic-migrate", "/opt/flic-migrate", "/srv/a dir/x[1]*"} {
		s.Program = program
		if err := s.Install(); err != nil {
			t.Fatal(err)
		}
		quoted := map[string]string{"/opt/flic-migrate": `"/opt/flic-migrate"`, "/srv/a dir/x[1]*": `"/srv/a dir/x\[1\]\*"`}[program]
		block := blockBegin + ")\n" + quoted + " PUx,\n" + blockEnd + "\n"
		if got := tree(t, s.Root)[local+"libvirtd"]; got != "-rw-r--r-- "+someRules+block {
			t.Errorf("%s: the rules are %q", program, got)
		}
		if got := tree(t, s.Root)[local+"virtqemud"]; !strings.HasPrefix(got, "-rw-r--r-- # flic") || !strings.Contains(got, quoted+" PUx,\n") {
			t.Errorf("%s: virtqemud's rules are %q", program, got)
		}
		steps, err := s.Steps()
		if err != nil {
			t.Fatal(err)
		}
		for _, step := range steps {
			if !step.Done || step.Conflict != nil {
				t.Errorf("%s: installed: %s: %v, %v", program, step.Path, step.Done, step.Conflict)
			}
		}
	}
	for range 2 {
		if err := s.Uninstall(); err != nil {
			t.Error(err)
		}
		differ(t, "uninstalled", tree(t, s.Root), before)
	}
	b, err := os.ReadFile(calls)
	if err != nil {
		t.Fatal(err)
	}
	// Two programs, and without any; not the profile that is not loaded.
	call := "--replace --skip-read-cache --write-cache " + s.path(apparmorDir) + "/usr.sbin.libvirtd\n"
	if string(b) != strings.Repeat(call, 3) {
		t.Errorf("apparmor_parser was called with %q", b)
	}
}

// TestRulesRefused: a profile that does not load with our rule is left as it was,
// and so is one in which it would have no effect.
func TestRulesRefused(t *testing.T) {
	for name, spoil := range map[string]func(s Setup, calls string){
		"does not load": func(s Setup, calls string) { write(t, filepath.Dir(calls), "refuse", "", 0o644) },
		"not included": func(s Setup, _ string) {
			write(t, s.Root, apparmorDir+"/usr.sbin.libvirtd", strings.ReplaceAll(someProfile, "local/", "other/"), 0o644)
		},
	} {
		s, calls := confined(t, "/usr/sbin/libvirtd (enforce)\n/usr/sbin/virtqemud (enforce)\n")
		spoil(s, calls)
		rules := s.path(apparmorLocal)
		before := tree(t, rules)
		err := s.Install()
		if err == nil || name == "not included" && !errors.Is(err, ErrConflict) {
			t.Errorf("%s: %v", name, err)
		}
		if name == "does not load" && !strings.Contains(err.Error(), "syntax error") {
			t.Errorf("%s: without the parser's reason: %v", name, err)
		}
		differ(t, name, tree(t, rules), before)
	}
	s, _ := confined(t, "")
	s.Program = "/opt/a\"b"
	if err := s.Install(); !errors.Is(err, ErrConflict) {
		t.Errorf("a path with a quote: %v", err)
	}
}

// TestConfinements: the kernel is asked as libapparmor asks it. A file that is
// written from its beginning and then read on plays its part.
func TestConfinements(t *testing.T) {
	question := "label\x00libvirtd\x00\x02/opt/flic-migrate"
	for name, c := range map[string]struct {
		loaded, answer string
		want           []Confinement
	}{
		"off":      {"", "", nil},
		"others":   {"cups (enforce)\n", "", nil},
		"enforced": {"libvirtd (enforce)\n", "allow 0x00000004\ndeny 0x00000000\n", []Confinement{{"libvirtd", "enforce", false, true}}},
		"allowed":  {"libvirtd (enforce)\n", "allow 0x00000015\ndeny 0x00000000\n", []Confinement{{"libvirtd", "enforce", true, true}}},
		"complain": {"libvirtd (complain)\n", "allow 0x00000004\n", []Confinement{{"libvirtd", "complain", true, true}}},
		"no word":  {"libvirtd (enforce)\n", "?", []Confinement{{"libvirtd", "enforce", false, false}}},
	} {
		s, _ := confined(t, c.loaded)
		write(t, s.Root, apparmorAccess, strings.Repeat("-", len(question))+c.answer, 0o666)
		got := s.Confinements()
		if len(got) != len(c.want) || len(got) > 0 && got[0] != c.want[0] {
			t.Errorf("%s: %+v", name, got)
		}
		if b, err := os.ReadFile(s.path(apparmorAccess)); err != nil || len(c.want) > 0 && c.want[0].Known && !strings.HasPrefix(string(b), question) {
			t.Errorf("%s: asked was %q, %v", name, b, err)
		}
	}
}

// TestSELinux: told only where it enforces.
func TestSELinux(t *testing.T) {
	s, _ := confined(t, "")
	for value, want := range map[string]bool{"": false, "0": false, "1": true, "1\n": true} {
		if err := os.MkdirAll(filepath.Dir(s.path(selinuxEnforce)), 0o755); err != nil {
			t.Fatal(err)
		}
		write(t, s.Root, selinuxEnforce, value, 0o644)
		if _, got := s.SELinux(); got != want {
			t.Errorf("%q: %v", value, got)
		}
	}
}
