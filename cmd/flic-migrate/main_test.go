package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/flic-migrate/flic-migrate/qmp/libvirt/compressor"
	"github.com/flic-migrate/flic-migrate/qmp/libvirt/saveimage"
	"github.com/flic-migrate/flic-migrate/stream/returnpath"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
	"github.com/flic-migrate/flic-migrate/tier/workingset"
)

func TestMain(m *testing.M) {
	// A link to this binary with such a name is the command, as it is installed.
	if compressor.Known(filepath.Base(os.Args[0])) {
		main()
	}
	if signal.Ignored(os.Interrupt) {
		// As under nohup, or in the background of a script: the commands that tests
		// interrupt would ignore it, too, as they promise.
		signal.Notify(make(chan os.Signal, 1), os.Interrupt)
	}
	testscript.Main(m, map[string]func(){
		"flic-migrate": main,
		// The same on a disk that has no room for more than a few writes.
		"flic-migrate-full": func() { os.Exit(run(newApp(fullDisk{vfs.OS}), os.Args[1:])) },
		// The same with a bug that shows at the last sync of an image.
		"flic-migrate-buggy":  func() { os.Exit(run(newApp(buggyDisk{vfs.OS}), os.Args[1:])) },
		"flic-migrate-faulty": faulty,
		guardName:             guardMain,
		armedName:             armed,
		uniteName:             func() { os.Exit(uniteMain(vfs.OS, os.Args[1:])) },
		"flic-migrate-cut":    cut,
		"no-userfaultfd":      noUserfaultfd,
		"mkstream":            mkstream,
		"mkgroup":             mkgroup,
		"mksave":              mksave,
		"mkworkingset":        mkworkingset,
		"returnpath":          printReturnPath,
	})
}

// TestScripts runs the scripts of testdata/script, which are named for the verb
// or the promise they test, with the program itself: separate processes with
// pipes for stdin and stdout, as QEMU starts them.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(e *testscript.Env) error {
			root, err := filepath.Abs("../..")
			if err != nil {
				return err
			}
			e.Setenv("ROOT", root)
			e.Setenv("HOME", e.WorkDir+"/home")
			e.Setenv("XDG_CONFIG_HOME", e.WorkDir+"/config")
			e.Setenv("XDG_DATA_HOME", e.WorkDir+"/data")
			e.Setenv("TMPDIR", e.WorkDir+"/tmp")
			e.Setenv("TZ", "UTC")
			shm, err := os.MkdirTemp("/dev/shm", "flic-test-")
			if err != nil {
				return err
			}
			e.Defer(func() { os.RemoveAll(shm) })
			e.Setenv("SHM", shm)
			return os.MkdirAll(e.WorkDir+"/tmp", 0o700)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits":   exits,
			"jsonis":  jsonIs,
			"flip":    flip,
			"waitfor": waitFor,
			"same":    same,
			"perm":    perm,
		},
	})
}

// fullDisk has room for two writes a file: a header and one more.
type fullDisk struct{ vfs.FS }

type fullFile struct {
	vfs.File
	writes int
}

func (d fullDisk) NoLinks(dir string) (vfs.FS, error) {
	fsys, err := d.FS.NoLinks(dir)
	return fullDisk{fsys}, err
}

func (d fullDisk) Create(name string) (vfs.File, error) {
	f, err := d.FS.Create(name)
	return &fullFile{File: f}, err
}

func (d fullDisk) CreateUnnamed(dir string) (vfs.File, error) {
	f, err := d.FS.CreateUnnamed(dir)
	return &fullFile{File: f}, err
}

func (f *fullFile) Write(b []byte) (int, error) {
	if f.writes++; f.writes > 2 {
		return 0, &os.PathError{Op: "write", Path: f.Name(), Err: syscall.ENOSPC}
	}
	return f.File.Write(b)
}

// buggyDisk panics when an image is synced: when it is finished, with a return path.
type buggyDisk struct{ vfs.FS }

type buggyFile struct{ vfs.File }

func (d buggyDisk) NoLinks(dir string) (vfs.FS, error) {
	fsys, err := d.FS.NoLinks(dir)
	return buggyDisk{fsys}, err
}

func (d buggyDisk) Create(name string) (vfs.File, error) {
	f, err := d.FS.Create(name)
	if filepath.Ext(name) != ".part" {
		return f, err
	}
	return buggyFile{f}, err
}

func (buggyFile) Sync() error { panic("a bug") }

// exits CODE COMMAND... runs a command, with $WORK/in as stdin if there is
// such a file, and wants its exit code. Its outputs go to the files out and err.
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE COMMAND...")
	}
	err := ts.Exec("sh", append([]string{"-c", `if [ -e "$WORK/in" ]; then exec <"$WORK/in"; fi; "$@" >"$WORK/out" 2>"$WORK/err"; echo $? >"$WORK/code"`, "sh"}, args[1:]...)...)
	ts.Check(err)
	if got := strings.TrimSpace(ts.ReadFile("code")); got != args[0] {
		ts.Fatalf("exit code %s, want %s\nstdout: %.300q\nstderr: %s", got, args[0], ts.ReadFile("out"), ts.ReadFile("err"))
	}
}

// jsonIs: "jsonis FILE PATH VALUE" looks into the JSON document that is FILE,
// or its last line; PATH is keys and indices with dots between them. VALUE can
// be a type (number, string, array, object, bool) with a % before it.
func jsonIs(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 3 {
		ts.Fatalf("usage: jsonis FILE PATH VALUE")
	}
	text := strings.TrimSpace(ts.ReadFile(args[0]))
	var v any
	if unmarshal(text, &v) != nil {
		last := text[strings.LastIndexByte(text, '\n')+1:]
		if err := unmarshal(last, &v); err != nil {
			ts.Fatalf("%s: %v in %q", args[0], err, last)
		}
	}
	for _, key := range strings.Split(args[1], ".") {
		var ok bool
		switch at := v.(type) {
		case map[string]any:
			v, ok = at[key]
		case []any:
			i, err := strconv.Atoi(key)
			if ok = err == nil && i < len(at); ok {
				v = at[i]
			}
		}
		if !ok {
			ts.Fatalf("%s has no %s in %s", args[0], args[1], text)
		}
	}
	got := fmt.Sprint(v)
	if want, isType := strings.CutPrefix(args[2], "%"); isType {
		got = map[string]string{"json.Number": "number", "string": "string", "[]interface {}": "array", "map[string]interface {}": "object", "bool": "bool"}[fmt.Sprintf("%T", v)]
		args[2] = want
	}
	if (got == args[2]) == neg {
		ts.Fatalf("%s: %s is %q, not %q", args[0], args[1], got, args[2])
	}
}

// unmarshal leaves numbers as they are written. Anything behind the document is
// an error.
func unmarshal(text string, v any) error {
	d := json.NewDecoder(strings.NewReader(text))
	d.UseNumber()
	if err := d.Decode(v); err != nil {
		return err
	}
	if d.More() {
		return errors.New("more than one document")
	}
	return nil
}

// flip FILE OFFSET changes a bit; a negative offset counts from the end.
func flip(ts *testscript.TestScript, _ bool, args []string) {
	path := ts.MkAbs(args[0])
	b, err := os.ReadFile(path)
	ts.Check(err)
	off, err := strconv.Atoi(args[1])
	ts.Check(err)
	if off < 0 {
		off += len(b)
	}
	b[off] ^= 0x10
	ts.Check(os.WriteFile(path, b, 0o600))
}

// waitFor GLOB waits until something has that name.
func waitFor(ts *testscript.TestScript, _ bool, args []string) {
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if found, err := filepath.Glob(ts.MkAbs(args[0])); err == nil && len(found) > 0 {
			return
		}
	}
	ts.Fatalf("%s did not come", args[0])
}

// same FILE FILE compares bytes, without a diff of binary files.
func same(ts *testscript.TestScript, neg bool, args []string) {
	a, err := os.ReadFile(ts.MkAbs(args[0]))
	ts.Check(err)
	b, err := os.ReadFile(ts.MkAbs(args[1]))
	ts.Check(err)
	if bytes.Equal(a, b) == neg {
		ts.Fatalf("%s (%d bytes) and %s (%d bytes): same is %v", args[0], len(a), args[1], len(b), !neg)
	}
}

// perm MODE FILE... checks permission bits.
func perm(ts *testscript.TestScript, _ bool, args []string) {
	for _, name := range args[1:] {
		fi, err := os.Stat(ts.MkAbs(name))
		ts.Check(err)
		if got := fmt.Sprintf("%04o", fi.Mode().Perm()); got != args[0] {
			ts.Fatalf("%s has mode %s, want %s", name, got, args[0])
		}
	}
}

// mkstream writes a synthetic migration stream to stdout.
func mkstream() {
	seed := flag.Uint64("seed", 1, "")
	size := flag.Uint64("size", 1<<20, "bytes of RAM")
	passes := flag.Int("passes", 1, "")
	zero := flag.Bool("zero", false, "nothing but zero pages")
	xbzrle := flag.Bool("xbzrle", false, "")
	compress := flag.Float64("compress", 0, "")
	returnPath := flag.Bool("return-path", false, "")
	old := flag.Bool("old", false, "a machine type before 2.4")
	bitmap := flag.Bool("bitmap", false, "")
	early := flag.Int("early", 0, "device sections before RAM")
	late := flag.Bool("late", false, "2 MiB of a disk's data before the first page")
	unknown := flag.Bool("unknown", false, "")
	emptyTail := flag.Bool("empty-tail", false, "")
	expected := flag.Bool("expected", false, "what a restore gives")
	disk := flag.Bool("disk", false, "a disk that has every other page of the guest's RAM, in its place")
	hostile := flag.Bool("hostile", false, "names that play with a terminal, and are formats")
	badMagic := flag.Bool("bad-magic", false, "")
	cut := flag.String("cut", "", "ram, tail or eof: end there")
	flag.Parse()
	o := tiertest.Options{
		Seed: *seed, Blocks: []tiertest.Block{{Name: "pc.ram", Size: *size}, {Name: "vga.vram", Size: 64 << 10}},
		Passes: *passes, Resend: 0.3, XBZRLE: *xbzrle, Compress: *compress, ReturnPath: *returnPath,
		NoConfiguration: *old, DirtyBitmap: *bitmap, EmptyTail: *emptyTail, Early: *early,
	}
	if *hostile {
		o.Machine = "pc-q35-7.2\x1b[31m\r\t\x1b]0;title\a"
		o.Blocks[1].Name = "ram%d%s\x1b[2J\n"
	}
	if *late {
		o.BlocksFirst, o.BlockMigration = 2, true
	}
	if *zero {
		o.Mix = tiertest.Mix{tiertest.Zero: 1}
	}
	if *unknown {
		o.Unknown = tiertest.Record
	}
	s := tiertest.New(o)
	b := s.Bytes()
	if *expected {
		b = s.ExpectedBytes()
	}
	if *disk {
		b = make([]byte, s.Blocks()[0].Size)
		for page := uint64(0); page < s.Pages(0); page += 2 {
			s.Page(b[page*uint64(s.PageSize()):][:s.PageSize()], 0, page)
		}
	}
	l := s.Layout()
	switch *cut {
	case "ram":
		b = b[:(l.RAM+l.Tail)/2]
	case "tail":
		b = b[:(l.Tail+l.EOF)/2]
	case "eof":
		b = b[:l.EOF]
	}
	if *badMagic {
		b[0] = 'X'
	}
	if _, err := os.Stdout.Write(b); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// mksave writes a save file of libvirt's to stdout: its stream is stdin.
func mksave() {
	name := flag.String("name", "web1", "")
	format := flag.Uint("format", 0, "")
	partial := flag.Bool("partial", false, "")
	flag.Parse()
	h, err := saveimage.New("<domain><name>"+*name+"</name></domain>", "<cookie/>", true)
	if err == nil {
		h.SetFormat(saveimage.Format(*format))
		b := h.Bytes()
		if *partial {
			copy(b, saveimage.PartialMagic())
		}
		_, err = os.Stdout.Write(b)
	}
	if err == nil {
		_, err = io.Copy(os.Stdout, os.Stdin)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// mkworkingset writes a working set to stdout: every 4th page of mkstream's
// pc.ram is hot.
func mkworkingset() {
	const pages = 256
	ws, err := workingset.New(4096, []workingset.Block{{Name: "pc.ram", Pages: pages}})
	if err == nil {
		for i := int64(0); i < pages; i += 4 {
			ws.SetHeat(0, i, 1)
		}
		_, err = ws.WriteTo(os.Stdout)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// printReturnPath prints the messages on stdin, which must be nothing but
// return path messages.
func printReturnPath() {
	r := returnpath.NewReader(bufio.NewReader(os.Stdin))
	for {
		m, err := r.Next()
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			fmt.Println("not a return path message:", err)
			os.Exit(1)
		}
		fmt.Println(m.Type, m.Value)
	}
}
