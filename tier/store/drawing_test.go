package store

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// TestDrawing: docs/format.md draws every name that a store has, and so does this package's
// comment. What it does not draw, it says, is never touched.
func TestDrawing(t *testing.T) {
	page, err := os.ReadFile(filepath.Join("..", "..", "docs", "format.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, page1, _ := strings.Cut(string(page), "## Store directory")
	page1, _, _ = strings.Cut(page1, "*Sealed*")
	doc, err := os.ReadFile("doc.go")
	if err != nil {
		t.Fatal(err)
	}
	comment, _, _ := strings.Cut(string(doc), "A checkpoint is visible")
	names, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	n, is := 0, regexp.MustCompile(`^([a-z]+(Folder|Suffix|File)|lockName)$`)
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(token.NewFileSet(), name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range f.Decls {
			g, ok := d.(*ast.GenDecl)
			if !ok || g.Tok != token.CONST {
				continue
			}
			for _, s := range g.Specs {
				v := s.(*ast.ValueSpec)
				if len(v.Values) != 1 || !is.MatchString(v.Names[0].Name) {
					continue
				}
				lit, ok := v.Values[0].(*ast.BasicLit)
				if !ok {
					continue
				}
				text, err := strconv.Unquote(lit.Value)
				if err != nil {
					t.Fatal(err)
				}
				if strings.HasSuffix(v.Names[0].Name, "Folder") {
					text += "/"
				}
				n++
				if !drawn(page1, text) {
					t.Errorf("docs/format.md does not draw %s, %s", text, v.Names[0].Name)
				}
				// Digests lie beside what they are of, and the comment names that.
				if !drawn(comment, text) && v.Names[0].Name != "digestsSuffix" {
					t.Errorf("doc.go does not draw %s, %s", text, v.Names[0].Name)
				}
			}
		}
	}
	if n < 20 {
		t.Errorf("only %d names were found", n)
	}
}

// drawn tells whether a line of a drawing has a name with this text.
func drawn(drawing, text string) bool {
	for line := range strings.Lines(drawing) {
		if _, name, ok := strings.Cut(line, "── "); ok {
			if name, _, _ = strings.Cut(strings.TrimSpace(name), " "); strings.Contains(name, text) {
				return true
			}
		}
	}
	return false
}
