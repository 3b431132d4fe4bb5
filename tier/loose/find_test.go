package loose_test

import (
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/loose"
)

// writeImage makes a file with an image in it, behind a header.
func writeImage(t *testing.T, path string, header []byte, id uuid.UUID) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Write(header); err != nil {
		t.Fatal(err)
	}
	w, err := image.NewWriter(loose.NewOut(f, 1<<16), image.Header{PageSize: 4096, SegmentPages: 4, UUID: id, Created: time.Now()}, image.None, 1)
	if err == nil {
		err = w.Finish([]byte("{}"), []byte("{}"))
	}
	if err != nil {
		t.Fatal(err)
	}
}

// What somebody else puts before an image.
const theirs, unfinished = "their header|", "their head"

func skip(r io.Reader) (int64, error) {
	b := make([]byte, len(theirs))
	n, _ := io.ReadFull(r, b)
	switch b := string(b[:n]); {
	case b == theirs:
		return int64(n), nil
	case strings.HasPrefix(b, unfinished):
		return 0, errors.New("not finished")
	}
	return 0, nil
}

// TestFind tells an image that is there from one that is gone, and both from
// what can't be known.
func TestFind(t *testing.T) {
	for name, header := range map[string][]byte{"alone": nil, "save file": []byte(theirs)} {
		path := filepath.Join(t.TempDir(), "dir", "f.save")
		if err := os.Mkdir(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		id := uuid.New()
		writeImage(t, path, header, id)
		p, err := loose.Locate(path)
		if err != nil {
			t.Fatal(err)
		}
		b, err := json.Marshal(p)
		if err != nil {
			t.Fatal(err)
		}
		var stored loose.Place
		if err := json.Unmarshal(b, &stored); err != nil || !reflect.DeepEqual(stored, p) {
			t.Errorf("%+v is stored as %+v, %v", p, stored, err)
		}
		find := func(what string, p loose.Place, want loose.State) {
			t.Helper()
			if got := p.Find(id, skip); got != want {
				t.Errorf("%s, %s: state %d, want %d", name, what, got, want)
			}
		}
		find("there", p, loose.Present)
		bare := p
		bare.Handle = nil
		find("there, no handle", bare, loose.Present)

		elsewhere := p
		elsewhere.FSID[0]++
		if err := os.Rename(path, path+"2"); err != nil {
			t.Fatal(err)
		}
		if os.Geteuid() == 0 && len(p.Handle) > 0 {
			find("renamed", p, loose.Present)
		}
		find("renamed, no handle", bare, loose.Gone)
		find("another file system", elsewhere, loose.Unknown)
		if err := os.Rename(path+"2", path); err != nil {
			t.Fatal(err)
		}

		whole, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		put := func(b []byte) {
			t.Helper()
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		damaged := append([]byte(nil), whole...)
		damaged[len(header)+20] ^= 1
		put(damaged)
		find("image header damaged", p, loose.Unknown)
		put(append([]byte(unfinished), whole...))
		find("being written", p, loose.Unknown)
		put(nil)
		find("empty", p, loose.Gone)
		put(append(append([]byte(nil), header...), "QEVM and more"...))
		find("another content", p, loose.Gone)
		if got := p.Find(id, nil); got != loose.Unknown {
			t.Errorf("%s: state %d without knowing what may stand before an image", name, got)
		}
		writeImage(t, path, header, uuid.New())
		find("another image", p, loose.Gone)
		if err := os.RemoveAll(filepath.Dir(path)); err != nil {
			t.Fatal(err)
		}
		find("removed with its directory", p, loose.Gone)
	}
	if _, err := loose.Locate(filepath.Join(t.TempDir(), "missing")); err == nil {
		t.Error("located what is not there")
	}
}

// TestFindOdd: what a user has put where his file was is not read if it is no file: a device
// has no end, and a FIFO waits for somebody.
func TestFindOdd(t *testing.T) {
	dir := t.TempDir()
	spool := filepath.Join(dir, "spool")
	if err := os.Mkdir(spool, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("TMPDIR", spool)
	path := filepath.Join(dir, "f.save")
	device := func() error { return os.Symlink("/dev/zero", path) }
	fifo := func() error { return unix.Mkfifo(path, 0o600) }
	look := func(what string, p loose.Place, want loose.State) {
		t.Helper()
		found := make(chan loose.State, 1)
		go func() { found <- p.Find(uuid.New(), skip) }()
		select {
		case got := <-found:
			if got != want {
				t.Errorf("%s: state %d, want %d", what, got, want)
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("%s: it is still read", what)
		}
		if list, err := os.ReadDir(spool); err != nil || len(list) != 0 {
			t.Errorf("%s: copied to %v, %v", what, list, err)
		}
	}
	for what, odd := range map[string]func() error{"a device": device, "a FIFO": fifo} {
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		p, err := loose.Locate(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		if err := odd(); err != nil {
			t.Fatal(err)
		}
		bare := p
		bare.Handle = nil
		look(what+", no handle", bare, loose.Unknown)
		if os.Geteuid() == 0 && len(p.Handle) > 0 {
			look(what, p, loose.Gone)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	// The image went into a FIFO, which has another name now.
	if err := fifo(); err != nil {
		t.Fatal(err)
	}
	p, err := loose.Locate(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path, path+"2"); err != nil {
		t.Fatal(err)
	}
	if len(p.Handle) > 0 {
		look("a FIFO under another name", p, loose.Unknown)
	}
}
