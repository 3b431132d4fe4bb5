package main

import (
	"bytes"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cpuguy83/go-md2man/v2/md2man"
	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
	"github.com/spf13/pflag"
)

// What a package has beside the program is made of the verbs themselves, so that it can't
// be about other ones: a man page of each verb, flic-migrate(7) of docs/concepts.md, and
// the configuration file with every key. It is made here and in no verb, because what
// makes man pages would be in every program that QEMU starts.

var pagesDir = flag.String("pages", "", "write the man pages and the configuration file into this directory")

// pages are the man pages, by the names of their files.
func pages(t *testing.T) map[string][]byte {
	t.Helper()
	root := newRoot(&app{stdout: &output{File: os.Stdout}, stdin: os.Stdin, stderr: os.Stderr})
	root.PersistentFlags().Lookup("store").DefValue = "/var/lib/flic-migrate"
	root.DisableAutoGenTag = true
	list := make(map[string][]byte)
	for _, c := range append(commands(root), root) {
		list[strings.ReplaceAll(c.CommandPath(), " ", "-")+".1"] = manPage(t, c)
	}
	concepts, err := os.ReadFile("../../docs/concepts.md")
	if err != nil {
		t.Fatal(err)
	}
	list["flic-migrate.7"] = conceptsPage(string(concepts))
	return list
}

// The pages' dates would be those of their making, so they have one that is the same for
// all and for good.
var noDate = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

const manual = "flic-migrate"

// manPage is a verb's page. What all verbs' help ends with becomes sections of their own,
// which cobra does not know.
func manPage(t *testing.T, c *cobra.Command) []byte {
	t.Helper()
	long, ok := strings.CutSuffix(c.Long, "\n\n"+settingsHelp+"\n\n"+exitHelp)
	if !ok {
		t.Errorf("the help of %s does not end with settings and exit codes", c.CommandPath())
	}
	c.Long = markdown(long)
	var b bytes.Buffer
	if err := doc.GenMan(c, &doc.GenManHeader{Section: "1", Date: &noDate, Source: manual, Manual: manual}, &b); err != nil {
		t.Fatal(err)
	}
	text := b.String()
	var more strings.Builder
	fmt.Fprintf(&more, ".SH SETTINGS\n.PP\n%s\n.SH EXIT STATUS\n", roff(settingsHelp))
	for _, line := range strings.Split(exitHelp, "\n")[1:] {
		code, meaning, _ := strings.Cut(strings.TrimSpace(line), "  ")
		fmt.Fprintf(&more, ".TP\n\\fB%s\\fP\n%s\n", code, roff(meaning))
	}
	const last = ".SH SEE ALSO\n"
	body, see, _ := strings.Cut(text, last)
	return []byte(body + more.String() + last + strings.TrimRight(see, "\n") + ",\n\\fBflic-migrate(7)\\fP\n")
}

// markdown makes of a help text what is one to md2man: what is indented stays as it is,
// and signs that mean something there mean themselves.
func markdown(text string) string {
	var out []string
	inside := false
	for _, line := range strings.Split(text, "\n") {
		indented := strings.HasPrefix(line, " ")
		if indented != inside && line != "" {
			out = append(out, "")
			inside = indented
		}
		if indented {
			line = "    " + line
		} else {
			line = strings.NewReplacer("*", `\*`, "_", `\_`, "<", `\<`).Replace(line)
		}
		out = append(out, line)
	}
	return strings.Join(out, "\n")
}

// roff makes text what roff takes for text.
func roff(text string) string { return strings.ReplaceAll(text, "-", `\-`) }

var link = regexp.MustCompile(`\[([^\]]+)\]\([^)]+\)`)

// conceptsPage is docs/concepts.md as a man page: its title becomes NAME, and the sections
// the page's.
func conceptsPage(text string) []byte {
	_, text, _ = strings.Cut(text, "\n")
	text = link.ReplaceAllString(text, "$1")
	text = regexp.MustCompile(`(?m)^## `).ReplaceAllString(text, "# ")
	head := fmt.Sprintf("%% \"FLIC-MIGRATE\" \"7\" \"%s\" \"\" \"%s\"\n# NAME\nflic\\-migrate \\- what the words mean, and which verb is for what\n\n# DESCRIPTION\n",
		noDate.Format("Jan 2006"), manual)
	return md2man.Render([]byte(head + text))
}

// settingsFile is /etc/flic-migrate.toml: every key, commented out, with its default.
func settingsFile(root *cobra.Command) string {
	verbs := make(map[string][]string)
	all := make(map[string]bool)
	root.PersistentFlags().VisitAll(func(f *pflag.Flag) { all[flagKey(f)] = true })
	for _, c := range commands(root) {
		c.LocalNonPersistentFlags().VisitAll(func(f *pflag.Flag) {
			verbs[flagKey(f)] = append(verbs[flagKey(f)], strings.TrimPrefix(c.CommandPath(), root.Name()+" "))
		})
	}
	var b strings.Builder
	b.WriteString("# Settings of flic-migrate, for all of its verbs. Every key is here, with its default: take\n" +
		"# the # away before one to set it. A flag wins over the environment, and the environment\n" +
		"# over this file. A key that no verb has is an error.\n")
	flags := knownFlags(root)
	for _, key := range slices.Sorted(maps.Keys(flags)) {
		f := flags[key]
		whose := strings.Join(verbs[key], ", ")
		if all[key] {
			whose = "all verbs"
		}
		fmt.Fprintf(&b, "\n# %s\n# (%s)\n#%s = %s\n", f.Usage, whose, key, settingValue(f))
	}
	return b.String()
}

// settingValue is a flag's default as TOML has it.
func settingValue(f *pflag.Flag) string {
	value := f.DefValue
	if f.Name == "store" {
		value = "/var/lib/flic-migrate"
	}
	switch f.Value.Type() {
	case "bool", "int", "n":
		return value
	case "stringArray", "stringSlice":
		value = strings.Trim(value, "[]")
	}
	return fmt.Sprintf("%q", value)
}

// TestPages: every verb has a man page with an example and the exit codes, and the
// settings file is one that is read with every key of it set.
func TestPages(t *testing.T) {
	list := pages(t)
	root := newRoot(&app{stdout: &output{File: os.Stdout}, stdin: os.Stdin, stderr: os.Stderr})
	for _, c := range append(commands(root), root) {
		name := strings.ReplaceAll(c.CommandPath(), " ", "-") + ".1"
		page := string(list[name])
		for _, part := range []string{".SH NAME\n", ".SH SYNOPSIS\n", ".SH DESCRIPTION\n", ".SH SETTINGS\n", ".SH EXIT STATUS\n", "\\fB6\\fP\nno space left", ".SH SEE ALSO\n"} {
			if !strings.Contains(page, part) {
				t.Errorf("%s has no %q", name, part)
			}
		}
		if c.Name() != "version" && !strings.Contains(page, ".SH EXAMPLE\n") {
			t.Errorf("%s has no example", name)
		}
		c.LocalFlags().VisitAll(func(f *pflag.Flag) {
			if !f.Hidden && !strings.Contains(page, "\\-\\-"+strings.ReplaceAll(f.Name, "-", "\\-")) && !strings.Contains(page, "--"+f.Name) {
				t.Errorf("%s does not have --%s", name, f.Name)
			}
		})
	}
	if page := string(list["flic-migrate.7"]); !strings.Contains(page, ".SH NAME\n") || strings.Contains(page, "](") || !strings.Contains(page, "Working set") {
		t.Errorf("flic-migrate.7 is %q", page)
	}

	concepts, err := os.ReadFile("../../docs/concepts.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range root.Commands() {
		if c.Name() != "version" && !regexp.MustCompile("`"+c.Name()+"\\b").Match(concepts) {
			t.Errorf("docs/concepts.md does not say what %s is for", c.Name())
		}
	}

	settings := settingsFile(root)
	file := filepath.Join(t.TempDir(), "flic-migrate.toml")
	set := regexp.MustCompile(`(?m)^#([a-z0-9-]+ = )`).ReplaceAllString(settings, "$1")
	if err := os.WriteFile(file, []byte(set), 0o600); err != nil {
		t.Fatal(err)
	}
	read, err := readConfig(file, knownFlags(root), nil)
	if err != nil {
		t.Fatalf("%v, of\n%s", err, set)
	}
	for key, f := range knownFlags(root) {
		value, ok := read.values[key]
		if !ok {
			t.Errorf("the settings file does not have %s", key)
		} else if err := f.Value.Set(fmt.Sprint(value)); err != nil && fmt.Sprint(value) != "" {
			t.Errorf("%s = %v: %v", key, value, err)
		}
	}
	if *pagesDir == "" {
		return
	}
	for name, page := range list {
		write(t, filepath.Join(*pagesDir, name), page)
	}
	write(t, filepath.Join(*pagesDir, "flic-migrate.toml"), []byte(settings))
}

func write(t *testing.T, path string, b []byte) {
	t.Helper()
	err := os.MkdirAll(filepath.Dir(path), 0o755)
	if err == nil {
		err = os.WriteFile(path, b, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
}
