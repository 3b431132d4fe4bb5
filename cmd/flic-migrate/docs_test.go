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
	"unicode"

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

// flagRow is a flag's row of a table in docs/cli.md, as far as it is the same wherever the
// flag means the same.
type flagRow struct{ name, text string }

// flagRows are the rows of a command's flags, by name.
func flagRows(c *cobra.Command, fs *pflag.FlagSet) (rows []flagRow) {
	fs.VisitAll(func(f *pflag.Flag) {
		if f.Name == "help" {
			return
		}
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
		case f.Name == "spool":
			def = "`$TMPDIR`, or `/var/tmp`" // likewise
		case def != "" && def != "false":
			def = "`" + def + "`"
		default:
			def = "–"
		}
		name := "--" + f.Name
		if f.Value.Type() != "bool" {
			name += " " + strings.ReplaceAll(f.Value.Type(), "|", "\\|")
		}
		rows = append(rows, flagRow{f.Name, fmt.Sprintf("| `%s` | %s | %s | %s | %s |", name, env, key, def, strings.ReplaceAll(f.Usage, "|", "\\|"))})
	})
	return rows
}

const flagHead = "| flag | environment | key | default | |\n|---|---|---|---|---|\n"

// flagTables are what docs/cli.md has to say about flags, by the names of their places: of
// each command, of all, and of what is the same in several commands, which stands once.
func flagTables(root *cobra.Command) map[string]string {
	users := make(map[string][]string) // by row: the commands that have it
	for _, c := range commands(root) {
		for _, r := range flagRows(c, c.LocalNonPersistentFlags()) {
			users[r.text] = append(users[r.text], verbName(c))
		}
	}
	table := func(rows []flagRow) string {
		var b strings.Builder
		for _, r := range rows {
			b.WriteString(r.text + "\n")
		}
		if b.Len() == 0 {
			return ""
		}
		return flagHead + b.String()
	}
	tables := map[string]string{"all": table(flagRows(root, root.PersistentFlags()))}
	for _, c := range commands(root) {
		var own []flagRow
		var shared []string
		for _, r := range flagRows(c, c.LocalNonPersistentFlags()) {
			if len(users[r.text]) > 1 {
				shared = append(shared, "`--"+r.name+"`")
			} else {
				own = append(own, r)
			}
		}
		text := table(own)
		switch {
		case len(shared) > 0 && text != "":
			text += "\n[Shared](#shared-flags): " + strings.Join(shared, ", ") + ".\n"
		case len(shared) > 0:
			text = "[Shared](#shared-flags): " + strings.Join(shared, ", ") + ".\n"
		case text == "":
			text = "It has no flags of its own.\n"
		}
		tables[verbName(c)] = text
	}
	const few = 8
	var rows []string
	for text, verbs := range users {
		whose := strings.Join(verbs, ", ")
		switch {
		case len(verbs) == 1:
			continue
		case len(verbs) > few:
			whose = fmt.Sprintf("%d verbs", len(verbs))
		}
		rows = append(rows, text+" "+whose+" |\n")
	}
	slices.Sort(rows)
	tables["shared"] = "| flag | environment | key | default | | verbs |\n|---|---|---|---|---|---|\n" + strings.Join(rows, "")
	return tables
}

// verbName is a command's name in docs/cli.md, such as "disk index".
func verbName(c *cobra.Command) string {
	return strings.TrimPrefix(c.CommandPath(), c.Root().Name()+" ")
}

// verbTable is the table of verbs that docs/cli.md begins with.
func verbTable(t *testing.T, root *cobra.Command) string {
	var b strings.Builder
	b.WriteString("| | verb | |\n|---|---|---|\n")
	grouped := make(map[string]bool)
	for _, g := range verbGroups {
		title := g.title
		for _, name := range g.verbs {
			c, _, err := root.Find([]string{name})
			if err != nil || c == root || grouped[name] {
				t.Errorf("verbGroups has %s, which is no verb or is there twice: %v", name, err)
				continue
			}
			grouped[name] = true
			fmt.Fprintf(&b, "| %s | [`%s`](#%s) | %s |\n", title, name, name, c.Short)
			title = ""
		}
	}
	for _, c := range root.Commands() {
		if !grouped[c.Name()] {
			t.Errorf("%s is in no group of verbGroups", c.Name())
		}
	}
	return b.String()
}

// What docs/cli.md says of verbs and flags stands between <!-- verbs -->, or <!-- flags NAME
// -->, and <!-- end -->, exactly as they are. go test -run Docs -update rewrites it.
func TestDocsFlags(t *testing.T) {
	raw, err := os.ReadFile(cliDoc)
	if err != nil {
		t.Fatal(err)
	}
	doc := string(raw)
	// The environment of who runs the test says nothing of what others have.
	for _, name := range []string{"TMPDIR", "HOME", "XDG_DATA_HOME"} {
		t.Setenv(name, t.TempDir())
	}
	root := newRoot(&app{stdout: &output{File: os.Stdout}, stdin: os.Stdin, stderr: os.Stderr})
	check := func(name, text string) {
		start := "<!-- " + name + " -->\n"
		before, rest, ok := strings.Cut(doc, start)
		old, after, ok2 := strings.Cut(rest, "<!-- end -->")
		if !ok || !ok2 {
			t.Errorf("docs/cli.md has no %q", start)
			return
		}
		if old == text {
			return
		}
		if *update {
			doc = before + start + text + "<!-- end -->" + after
			return
		}
		t.Errorf("docs/cli.md says of the %s\n%s\nand they are\n%s", name, old, text)
	}
	check("verbs", verbTable(t, root))
	for name, text := range flagTables(root) {
		check("flags "+name, text)
	}
	for _, c := range commands(root) {
		name := verbName(c)
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

// docFiles are README and all that is in docs, by their paths from the top.
func docFiles(t *testing.T) map[string]string {
	t.Helper()
	files := make(map[string]string)
	for _, pattern := range []string{"README.md", "docs/*.md", "docs/*/*.md"} {
		names, err := filepath.Glob(filepath.Join("../..", pattern))
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range names {
			b, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			files[filepath.ToSlash(name[len("../../"):])] = string(b)
		}
	}
	return files
}

// anchors are those that a page's headings have where people read it.
func anchors(text string) map[string]bool {
	list := make(map[string]bool)
	for _, h := range regexp.MustCompile("(?m)^#+ +(.*)$").FindAllStringSubmatch(text, -1) {
		slug := strings.Map(func(r rune) rune {
			switch {
			case r == ' ':
				return '-'
			case r == '-' || r == '_' || unicode.IsLetter(r) || unicode.IsDigit(r):
				return unicode.ToLower(r)
			}
			return -1
		}, h[1])
		list[slug] = true
	}
	return list
}

// TestDocsLinks: each link leads to a file, and a heading, that is there; each page is found
// from README; and what a comment of the code says is in a page is in one that there is.
func TestDocsLinks(t *testing.T) {
	files := docFiles(t)
	to := make(map[string][]string)
	for name, text := range files {
		for _, m := range regexp.MustCompile(`\]\(([^)\s]+)\)`).FindAllStringSubmatch(text, -1) {
			target, anchor, _ := strings.Cut(m[1], "#")
			if strings.Contains(target, "://") {
				continue
			}
			path := name
			if target != "" {
				path = filepath.ToSlash(filepath.Join(filepath.Dir(name), target))
			}
			to[name] = append(to[name], path)
			page, ok := files[path]
			if !ok {
				if _, err := os.Stat(filepath.Join("../..", path)); err != nil {
					t.Errorf("%s: %s: %v", name, m[1], err)
				}
			}
			if anchor != "" && !anchors(page)[anchor] {
				t.Errorf("%s: %s: there is no such heading", name, m[1])
			}
		}
	}
	found := map[string]bool{"README.md": true}
	for next := []string{"README.md"}; len(next) > 0; next = next[1:] {
		for _, path := range to[next[0]] {
			if !found[path] {
				found[path] = true
				next = append(next, path)
			}
		}
	}
	for name := range files {
		if !found[name] {
			t.Errorf("no link leads from README to %s", name)
		}
	}
	mentioned := 0
	err := filepath.WalkDir("../..", func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && (d.Name() == ".git" || d.Name() == "bin" || d.Name() == "testdata") {
			return filepath.SkipDir
		}
		if ext := filepath.Ext(path); err != nil || d.IsDir() || ext != ".go" && ext != ".md" {
			return err
		}
		b, err := os.ReadFile(path)
		for _, name := range regexp.MustCompile(`\bdocs/[a-z/-]+\.md`).FindAllString(string(b), -1) {
			mentioned++
			if _, ok := files[name]; !ok {
				t.Errorf("%s speaks of %s, which is not there", path, name)
			}
		}
		return err
	})
	if err != nil || mentioned < 20 {
		t.Errorf("%v, %d pages are spoken of", err, mentioned)
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
		"rm": rmEntry{}, "prune": pruneEntry{}, "tag": labelDoc{}, "copy": copiedEntry{}, "memory": coredump.Report{}, "diff": diffDoc{}, "gc": gcReport{}, "doctor": doctor.Finding{}, "replay": replay.Result{}, "dump": dumpDoc{}, "disk index": diskEntry{}, "disk rm": diskRemoved{}, "disk thaw": thawed{}, "resume": resumeReport{}, "track": rounds.Report{}, "checkpoint": failedCheckpoint{},
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
	for name, text := range docFiles(t) {
		texts[name] = text
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

// TestDocsArchitecture: each package has its word in docs/architecture.md, by the last part
// of its path.
func TestDocsArchitecture(t *testing.T) {
	text, err := os.ReadFile("../../docs/architecture.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, root := range []string{"qmp", "ramparse", "stream", "tier"} {
		err := filepath.WalkDir("../../"+root, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.IsDir() {
				return err
			}
			if d.Name() == "testdata" {
				return fs.SkipDir
			}
			if files, _ := filepath.Glob(path + "/*.go"); len(files) > 0 && !regexp.MustCompile(`\b`+d.Name()+`\b`).Match(text) {
				t.Errorf("%s is not named", path)
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	}
}
