package main

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func testGuest(t *testing.T, size int) *guest {
	t.Helper()
	g, err := newGuest(size, 1)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// The checksums follow the guest's own changes and nothing else: a page that is
// damaged, or brought back to an older state, is found.
func TestCheck(t *testing.T) {
	g := testGuest(t, 1<<20)
	fresh := string(g.buf)
	g.perTick, g.bytes = 300, 64
	for range 5 {
		g.step()
	}
	if string(g.buf) == fresh {
		t.Fatal("nothing was changed")
	}
	if answer := g.answer("check", nil); answer != "check ok 256 1280" {
		t.Fatalf("after changes: %s", answer) // at most 256 in each step
	}
	older := -1
	for i := range g.sums {
		if string(g.page(i)) != fresh[i*4096:(i+1)*4096] {
			older = i
			break
		}
	}
	newer := string(g.page(older))
	copy(g.page(older), fresh[older*4096:])
	if answer, want := g.answer("check", nil), fmt.Sprintf("check bad 1 %d", older); answer != want {
		t.Errorf("an older page: %s, want %s", answer, want)
	}
	copy(g.page(older), newer)
	g.page(200)[4095] ^= 1
	g.page(255)[0] ^= 0x80
	if answer := g.answer("check", nil); answer != "check bad 2 200" {
		t.Errorf("two flipped bits: %s", answer)
	}
}

func TestAnswers(t *testing.T) {
	g := testGuest(t, 1<<20)
	sum := g.answer("sum", nil)
	for _, test := range []struct{ line, want string }{
		{"dirty 7 100", "dirty 7 100"},
		{"dirty 3", "dirty 3 100"},
		{"dirty -1 x", "dirty 0 100"},
		{"tick?", "tick? 0"},
		{"sum", sum},
		{"fill 1", "fill 1"},
		{"sum", sum},
		{"read", "error: read PATH"},
		{"block /dev/null", "error: block PATH I"},
		{"what is this", `error: unknown command "what"`},
	} {
		words := strings.Fields(test.line)
		if got := g.answer(words[0], words[1:]); got != test.want {
			t.Errorf("%s: %q, want %q", test.line, got, test.want)
		}
	}
	g.answer("fill", []string{"2"})
	if g.answer("sum", nil) == sum {
		t.Error("another seed has the same sum")
	}
	if answer := g.answer("check", nil); answer != "check ok 256 0" {
		t.Errorf("after a fill: %s", answer)
	}
}

// Touching changes nothing, and says of which pages; where finds each of them.
func TestTouch(t *testing.T) {
	g := testGuest(t, 1<<20)
	sum := g.answer("sum", nil)
	go g.toucher(time.Millisecond)
	for line, want := range map[string]string{
		"touch 10 20": "touch 10 20", "touch 250 20": "touch 250 6", "touch 300 1": "touch 300 0", "touch": "touch 0 0",
	} {
		words := strings.Fields(line)
		g.mu.Lock()
		got := g.answer(words[0], words[1:])
		g.mu.Unlock()
		if got != want {
			t.Errorf("%s: %s", line, got)
		}
		time.Sleep(5 * time.Millisecond)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.answer("sum", nil) != sum {
		t.Error("the content has changed")
	}
	// Without the right to see frame numbers they are 0, and no two adjoin.
	pages := 0
	for _, run := range strings.Fields(g.answer("where", []string{"5", "17"}))[1:] {
		var frame, count int
		if _, err := fmt.Sscanf(run, "%d+%d", &frame, &count); err != nil {
			t.Fatalf("%q: %v", run, err)
		}
		pages += count
	}
	if pages != 17 {
		t.Errorf("where 17 pages are: %d", pages)
	}
}

func TestRun(t *testing.T) {
	p := program{mounted: true}
	dir := t.TempDir()
	if err := p.run("echo $$ > " + dir + "/new; mv " + dir + "/new " + dir + "/pid; sleep 1000; :"); err != nil {
		t.Fatal(err)
	}
	defer p.run("")
	var pid int
	for end := time.Now().Add(10 * time.Second); pid == 0 && time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if b, err := os.ReadFile(dir + "/pid"); err == nil {
			fmt.Sscan(string(b), &pid)
		}
	}
	if pid != p.cmd.Process.Pid {
		t.Fatalf("process %d says it is %d", p.cmd.Process.Pid, pid)
	}
	if err := p.run(""); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(fmt.Sprintf("/proc/%d", pid)); err == nil {
		t.Error("it lives on")
	}
}

// A guest without a buffer still ticks and answers.
func TestNoBuffer(t *testing.T) {
	g := testGuest(t, 0)
	g.perTick = 10
	g.step()
	if answer := g.answer("check", nil); answer != "check ok 0 0" {
		t.Error(answer)
	}
}

func TestServe(t *testing.T) {
	ours, theirs := net.Pipe()
	defer ours.Close()
	g := testGuest(t, 4096)
	done := make(chan error, 1)
	go func() { done <- g.serve(theirs, theirs) }()
	if err := ours.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 100)
	for _, line := range []string{"\n", "  tick?  \r\n"} {
		if _, err := ours.Write([]byte(line)); err != nil {
			t.Fatal(err)
		}
	}
	if n, err := ours.Read(buf); err != nil || string(buf[:n]) != "tick? 0\n" {
		t.Errorf("got %q, %v", buf[:n], err)
	}
	if _, err := ours.Write([]byte("off\n")); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Errorf("off: %v", err)
	}
	// A console that ends must not look like an order to power off.
	if err := g.serve(strings.NewReader("tick?\n"), new(strings.Builder)); err == nil {
		t.Error("the console's end was taken for off")
	}
}

func TestReadTree(t *testing.T) {
	dir := t.TempDir()
	for i := range 10 {
		sub := filepath.Join(dir, fmt.Sprint(i%3))
		if err := os.MkdirAll(sub, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(sub, fmt.Sprint(i)), make([]byte, 1000), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	// What a Debian's /usr has plenty of, and what would be read twice.
	if err := os.Symlink("0/0", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		limit int64
		seed  uint64
		want  int64
	}{{1 << 20, 0, 10000}, {1 << 20, 5, 10000}, {2500, 0, 2500}, {2500, 5, 2500}, {0, 0, 0}} {
		if n, err := readTree(dir, test.limit, test.seed); err != nil || n != test.want {
			t.Errorf("%+v: %d, %v", test, n, err)
		}
	}
	if n, err := readTree(filepath.Join(dir, "0/0"), 1<<20, 0); err != nil || n != 1000 {
		t.Errorf("a file: %d, %v", n, err)
	}
	if _, err := readTree(filepath.Join(dir, "none"), 1<<20, 0); err == nil {
		t.Error("a path that is not there was read")
	}
}

func TestCommandLine(t *testing.T) {
	file := filepath.Join(t.TempDir(), "cmdline")
	line := "console=ttyS0 quiet flic.fill=16 flic.read=/usr flic.seed=x fill=3 flic.dirty=-1 flic.\n"
	if err := os.WriteFile(file, []byte(line), 0o600); err != nil {
		t.Fatal(err)
	}
	o, err := commandLine(file)
	if err != nil {
		t.Fatal(err)
	}
	if o["read"] != "/usr" || o.number("fill", 8) != 16 || o.number("seed", 1) != 1 || o.number("dirty", 2) != 2 || o.number("bytes", 64) != 64 {
		t.Errorf("got %v", o)
	}
}

// The guest waits for memory that is plugged in late, and not for ever.
func TestWaitForMemory(t *testing.T) {
	path := filepath.Join(t.TempDir(), "meminfo")
	write := func(kilobytes int) {
		text := fmt.Sprintf("MemTotal:       %d kB\nMemFree:        1 kB\n", kilobytes)
		if err := os.WriteFile(path+".new", []byte(text), 0o600); err != nil {
			t.Error(err)
		}
		os.Rename(path+".new", path)
	}
	write(1024)
	if err := waitForMemory(path, 1<<20, 0); err != nil {
		t.Error(err)
	}
	if err := waitForMemory(path, 1<<20+1, time.Millisecond); err == nil {
		t.Error("memory that never came was there")
	}
	time.AfterFunc(60*time.Millisecond, func() { write(2048) })
	if err := waitForMemory(path, 2<<20, time.Minute); err != nil {
		t.Error(err)
	}
}
