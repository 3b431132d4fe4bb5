package main

import (
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/flic-migrate/flic-migrate/qmp/doctor"
	"github.com/flic-migrate/flic-migrate/qmp/migration/rounds"
	"github.com/flic-migrate/flic-migrate/qmp/session"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/coredump"
	"github.com/flic-migrate/flic-migrate/tier/replay"
	"github.com/flic-migrate/flic-migrate/tier/store"
)

var update = flag.Bool("update", false, "write the flag tables of docs/cli.md anew")

const cliDoc = "../../docs/cli.md"

// flagTable is what docs/cli.md has to say about a command's flags.
func flagTable(c *cobra.Command, fs *pflag.FlagSet) string {
	var b strings.Builder
	b.WriteString("| flag | environment | key | default | |\n|---|---|---|---|---|\n")
	n := 0
	fs.VisitAll(func(f *pflag.Flag) {
		if f.Name == "help" {
			return
		}
		n++
		key, env := "–", "–"
		if k := flagKey(f); k != "" {
			key, env = "`"+k+"`", "`"+envName(k)+"`"
		}
		if f.Name == "config" {
			env = "`FLIC_CONFIG`"
		}
		def := f.DefValue
		switch {
		case f.Name == "store" && c.Name() == "flic-migrate":
			def = "`/var/lib/flic-migrate` for root, else `$XDG_DATA_HOME/flic-migrate`" // differs by user
		case def != "" && def != "false":
			def = "`" + def + "`"
		default:
			def = "–"
		}
		name := "--" + f.Name
		if f.Value.Type() != "bool" {
			name += " " + strings.ReplaceAll(f.Value.Type(), "|", "\\|")
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s | %s |\n", name, env, key, def, strings.ReplaceAll(f.Usage, "|", "\\|"))
	})
	if n == 0 {
		return "It has no flags of its own.\n"
	}
	return b.String()
}

// Each command's flags stand in docs/cli.md between <!-- flags NAME --> and
// <!-- end -->, exactly as they are. go test -run Docs -update rewrites them.
func TestDocsFlags(t *testing.T) {
	raw, err := os.ReadFile(cliDoc)
	if err != nil {
		t.Fatal(err)
	}
	doc := string(raw)
	root := newRoot(&app{stdout: &output{File: os.Stdout}, stdin: os.Stdin, stderr: os.Stderr})
	check := func(name, table string) {
		start := "<!-- flags " + name + " -->\n"
		before, rest, ok := strings.Cut(doc, start)
		old, after, ok2 := strings.Cut(rest, "<!-- end -->")
		if !ok || !ok2 {
			t.Errorf("docs/cli.md has no %q", start)
			return
		}
		if old == table {
			return
		}
		if *update {
			doc = before + start + table + "<!-- end -->" + after
			return
		}
		t.Errorf("docs/cli.md says of the flags of %s\n%s\nand they are\n%s", name, old, table)
	}
	check("all", flagTable(root, root.PersistentFlags()))
	for _, c := range commands(root) {
		name := strings.TrimPrefix(c.CommandPath(), root.Name()+" ")
		check(name, flagTable(c, c.LocalNonPersistentFlags()))
		if !strings.Contains(doc, "\n### "+name+"\n") {
			t.Errorf("docs/cli.md has no section on %s", name)
		}
		if !strings.Contains(c.Long, exitHelp) || c.Short == "" || c.Name() != "version" && c.Example == "" {
			t.Errorf("the help of %s lacks its exit codes, its purpose or an example", c.Name())
		}
	}
	if *update {
		if err := os.WriteFile(cliDoc, []byte(doc), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// Every field of every JSON document stands in docs/cli.md. Checkpoints
// describe themselves: Meta's fields are in docs/format.md.
func TestDocsJSON(t *testing.T) {
	raw, err := os.ReadFile(cliDoc)
	if err != nil {
		t.Fatal(err)
	}
	_, doc, ok := strings.Cut(string(raw), "\n## JSON\n")
	if !ok {
		t.Fatal("docs/cli.md has no section on JSON")
	}
	seen := 0
	// Documents within documents, which are explained once.
	explained := []reflect.Type{reflect.TypeFor[*rounds.Report](), reflect.TypeFor[*checkpoint.Report](), reflect.TypeFor[*session.ServerReport](),
		reflect.TypeFor[[]session.GroupRow](), reflect.TypeFor[[]session.GroupResumeRow](), reflect.TypeFor[[]groupMember]()}
	var fields func(t reflect.Type, path string, missing func(string))
	fields = func(ty reflect.Type, path string, missing func(string)) {
		for ty.Kind() == reflect.Pointer || ty.Kind() == reflect.Slice {
			ty = ty.Elem()
		}
		if ty.Kind() != reflect.Struct || ty == reflect.TypeFor[checkpoint.Meta]() || ty.PkgPath() == "time" {
			return
		}
		for i := range ty.NumField() {
			f := ty.Field(i)
			name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
			if name == "-" || name == "" && !f.Anonymous {
				continue
			}
			if name != "" {
				seen++
				if !strings.Contains(doc, "`"+path+name+"`") {
					missing(path + name)
				}
			}
			if f.Anonymous {
				fields(f.Type, path, missing)
			} else if slices.Contains(explained, f.Type) {
				continue
			} else if ty := f.Type; ty.PkgPath() == "" || strings.Contains(ty.PkgPath(), "flic-migrate") {
				fields(f.Type, path+name+".", missing)
			}
		}
	}
	for name, v := range map[string]any{
		"save": saveReport{}, "restore": restoreReport{}, "list": listEntry{}, "list --totals": store.Total{}, "show": showDoc{}, "flatten": flattenReport{}, "verify": verifyEntry{},
		"rm": rmEntry{}, "prune": pruneEntry{}, "tag": labelDoc{}, "copy": copiedEntry{}, "memory": coredump.Report{}, "diff": diffDoc{}, "gc": gcReport{}, "doctor": doctor.Finding{}, "replay": replay.Result{}, "dump": dumpDoc{}, "disk index": diskEntry{}, "disk rm": diskRemoved{}, "resume": resumeReport{}, "track": rounds.Report{}, "checkpoint": checkpointReport{},
		"checkpoint --group": groupReport{}, "resume --group": groupResumeReport{}, "list --group": groupEntry{},
	} {
		fields(reflect.TypeOf(v), "", func(field string) {
			t.Errorf("docs/cli.md does not explain %s in the JSON of %s", field, name)
		})
	}
	if seen < 100 {
		t.Errorf("only %d fields were looked for", seen)
	}
}

// TestDocsExamples: no example leads into a trap. QEMU waits for ever on the empty
// stream of a program that its shell does not find, so exec: has the whole path; and
// a domain of libvirt's dies of a migration to exec:, so help offers none for it.
func TestDocsExamples(t *testing.T) {
	texts := make(map[string]string)
	names, err := filepath.Glob("../../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range append(names, "../../README.md") {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		texts[name] = string(b)
	}
	var help func(c *cobra.Command)
	help = func(c *cobra.Command) {
		text := c.Long + c.Example + c.Flags().FlagUsages()
		texts[c.CommandPath()] = text
		if strings.Contains(text, "qemu-monitor-command") {
			t.Errorf("%s --help sends commands through libvirt", c.CommandPath())
		}
		for _, sub := range c.Commands() {
			help(sub)
		}
	}
	help(newRoot(&app{stdout: &output{File: os.Stdout}, stdin: os.Stdin, stderr: os.Stderr}))
	exec := regexp.MustCompile(`exec:\s*(exec\s+)?flic-migrate`)
	for name, text := range texts {
		if found := exec.FindString(text); found != "" {
			t.Errorf("%s: %q has no absolute path", name, found)
		}
	}
}

// TestDocsMessages: a message that docs/troubleshooting.md explains is one that the program
// has.
func TestDocsMessages(t *testing.T) {
	doc, err := os.ReadFile("../../docs/troubleshooting.md")
	if err != nil {
		t.Fatal(err)
	}
	var code strings.Builder
	err = filepath.WalkDir("../..", func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && (d.Name() == ".git" || d.Name() == "bin") {
			return filepath.SkipDir
		}
		if err != nil || filepath.Ext(path) != ".go" || strings.HasSuffix(path, "_test.go") {
			return err
		}
		b, err := os.ReadFile(path)
		code.Write(regexp.MustCompile(`(?m)^\s*//.*`).ReplaceAll(b, nil)) // comments say nothing to a user
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	messages := regexp.MustCompile("(?m)^\\*\\*`(.+)`\\*\\*$").FindAllStringSubmatch(string(doc), -1)
	if len(messages) < 30 {
		t.Errorf("only %d messages are explained", len(messages))
	}
	for _, m := range messages {
		if !strings.Contains(code.String(), m[1]) {
			t.Errorf("docs/troubleshooting.md explains %q, which nothing says", m[1])
		}
	}
}
