package rescue_test

import (
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sync/errgroup"

	"github.com/flic-migrate/flic-migrate/tier/rescue"
)

func TestGo(t *testing.T) {
	g := new(errgroup.Group)
	rescue.Go(g, func() error { panic(syscall.ENOSPC) })
	err := g.Wait()
	var bug *rescue.Error
	if !errors.As(err, &bug) || errors.Is(err, syscall.ENOSPC) || !strings.Contains(string(bug.Stack), "rescue_test.go") {
		t.Errorf("the error is %v", err)
	}
}

// alone are functions that start a goroutine outside of Call, and why they may: nothing in it
// is ours but a few lines, or its panic has nobody who could be told.
var alone = map[string]string{
	"tier/disk/sort.go sortRecords":         "sorts numbers in a slice of its own",
	"qmp/session/servers.go start":          "waits for a process",
	"qmp/session/servers.go hear":           "decodes lines and keeps them",
	"qmp/session/servers.go open":           "accepts connections",
	"qmp/session/later.go begin":            "selects",
	"qmp/session/control.go Attach":         "encodes what it is given",
	"qmp/session/arm.go greet":              "decodes lines and hands them on",
	"qmp/session/armed.go run":              "accepts connections",
	"qmp/session/armed.go listen":           "the armed process dies of it, and the command at the other end puts the guest right",
	"qmp/session/armed.go watchEnd":         "polls",
	"qmp/session/armed.go talk":             "decodes lines and hands them on",
	"qmp/libvirt/domain/relay.go conn":      "encodes events",
	"qmp/migration/track.go track":          "selects",
	"qmp/migration/resume.go watchIncoming": "looks at a word",
	"qmp/migration/checkpoint.go wait":      "selects",
	"cmd/flic-migrate/armed.go startArmed":  "waits for a process",
	"cmd/flic-migrate/root.go withSignals":  "selects",
}

// TestGoroutines finds the goroutines that the program starts, and that no panic of theirs
// ends it: what they run, or what that calls in its package, calls Call or Go.
func TestGoroutines(t *testing.T) {
	root := filepath.Join("..", "..")
	n, used := 0, map[string]bool{}
	for _, top := range []string{"tier", "qmp", "cmd"} {
		err := filepath.WalkDir(filepath.Join(root, top), func(dir string, e os.DirEntry, err error) error {
			if err != nil || !e.IsDir() {
				return err
			}
			rel, _ := filepath.Rel(root, dir)
			switch e.Name() {
			case "testdata", "tiertest", "qmptest", "qemutest", "rescue":
				return filepath.SkipDir
			}
			names, err := filepath.Glob(filepath.Join(dir, "*.go"))
			if err != nil {
				return err
			}
			var files []*ast.File
			bodies := map[string][]ast.Node{}
			set := token.NewFileSet()
			for _, name := range names {
				if strings.HasSuffix(name, "_test.go") {
					continue
				}
				f, err := parser.ParseFile(set, name, nil, 0)
				if err != nil {
					return err
				}
				files = append(files, f)
				for _, d := range f.Decls {
					if fn, ok := d.(*ast.FuncDecl); ok && fn.Body != nil {
						bodies[fn.Name.Name] = append(bodies[fn.Name.Name], fn.Body)
					}
				}
			}
			for _, f := range files {
				for _, d := range f.Decls {
					fn, ok := d.(*ast.FuncDecl)
					if !ok || fn.Body == nil {
						continue
					}
					ast.Inspect(fn.Body, func(node ast.Node) bool {
						var call *ast.CallExpr
						switch x := node.(type) {
						case *ast.GoStmt:
							call = x.Call
						case *ast.CallExpr:
							if s, ok := x.Fun.(*ast.SelectorExpr); !ok || s.Sel.Name != "Go" || len(x.Args) != 1 {
								return true
							}
							call = x
						default:
							return true
						}
						n++
						at := filepath.Join(rel, filepath.Base(set.Position(call.Pos()).Filename)) + " " + fn.Name.Name
						if !rescues(call, bodies, 1) {
							if _, ok := alone[at]; !ok {
								t.Errorf("%s starts a goroutine of which a panic ends the process", at)
							}
							used[at] = true
						}
						return true
					})
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, at := range slices.Sorted(maps.Keys(alone)) {
		if !used[at] {
			t.Errorf("%s starts no such goroutine any more", at)
		}
	}
	if n < 40 {
		t.Errorf("only %d goroutines were found", n)
	}
}

// rescues tells whether something under node is of this package, or is so in a function of its
// own package that is called, so many calls deep. Functions are told by name only, so the
// deeper, the more are taken for another.
func rescues(node ast.Node, bodies map[string][]ast.Node, deep int) (found bool) {
	ast.Inspect(node, func(node ast.Node) bool {
		var name string
		switch x := node.(type) {
		case *ast.SelectorExpr:
			if p, ok := x.X.(*ast.Ident); ok && p.Name == "rescue" {
				found = true
			}
		case *ast.CallExpr:
			switch fun := x.Fun.(type) {
			case *ast.Ident:
				name = fun.Name
			case *ast.SelectorExpr:
				name = fun.Sel.Name
			}
		}
		if deep > 0 && name != "" && !found {
			for _, body := range bodies[name] {
				found = found || rescues(body, bodies, deep-1)
			}
		}
		return !found
	})
	return found
}
