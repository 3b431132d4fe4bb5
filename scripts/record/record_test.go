package main

import (
	"bytes"
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
)

const testdata = "../../testdata"

// read returns a recorded stream. It does not use the zstd command, so that the
// streams are also known to be readable without.
func read(t *testing.T, name string) []byte {
	t.Helper()
	f, err := os.Open(filepath.Join(testdata, name+suffix))
	if err != nil {
		t.Fatalf("%v; record it: go run ./scripts/record %s", err, name)
	}
	defer f.Close()
	z, err := zstd.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	data, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// Every recording is there, shows what it is recorded for, and is described as
// it is; a damaged one is found to be.
func TestRecordings(t *testing.T) {
	readme, err := os.ReadFile(filepath.Join(testdata, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	want := readmeHead
	for i := range recordings {
		r := &recordings[i]
		data := read(t, r.name)
		want += r.line(data)
		s, err := surveyStream(bytes.NewReader(data))
		refused := strings.HasSuffix(r.name, ".refused")
		if refused != (r.from != "") {
			t.Errorf("%s: only what is derived is refused", r.name)
		}
		switch {
		case refused && err == nil:
			t.Errorf("%s: the damage is not found", r.name)
		case !refused && err != nil:
			t.Errorf("%s: %v", r.name, err)
		case !refused:
			if err := r.shows(s); err != nil {
				t.Errorf("%s: %v", r.name, err)
			}
		}
	}
	if string(readme) != want {
		t.Error("testdata/README.md does not describe the streams; go run ./scripts/record writes it")
	}
}

// Nothing else lies in testdata, and a clone stays small.
func TestSize(t *testing.T) {
	const most = 38 << 20
	files, err := filepath.Glob(filepath.Join(testdata, "*"))
	if err != nil {
		t.Fatal(err)
	}
	var total int64
	for _, file := range files {
		info, err := os.Stat(file)
		if err != nil {
			t.Fatal(err)
		}
		total += info.Size()
		name, stream := strings.CutSuffix(filepath.Base(file), suffix)
		if stream && find(name) == nil {
			t.Errorf("nobody makes %s", file)
		}
	}
	if total > most {
		t.Errorf("testdata has %d bytes, more than %d", total, most)
	}
}

// A damaged stream must differ from its source by what its line says and no more.
func TestDamage(t *testing.T) {
	source := read(t, "microvm-stopped")
	s, err := surveyStream(bytes.NewReader(source))
	if err != nil {
		t.Fatal(err)
	}
	if source[s.eofAt] != 0 || source[s.eofAt+1] != 6 || source[s.footerAt] != 0x7e || source[s.tailAt] != 4 {
		t.Errorf("bytes %x, %x at EOF, %x at the footer, %x at the tail",
			source[s.eofAt], source[s.eofAt+1], source[s.footerAt], source[s.tailAt])
	}
	if flags := source[s.somePage+7]; flags != 0x28 {
		t.Errorf("flags of the page are %#x, want PAGE and CONTINUE", flags)
	}
	for i := range recordings {
		r := &recordings[i]
		if r.from == "" {
			continue
		}
		data := r.damage(bytes.Clone(source), s)
		bits := 0
		for i := range data {
			for x := data[i] ^ source[i]; x != 0; x &= x - 1 {
				bits++
			}
		}
		if cut := len(data) < len(source); cut && bits != 0 || !cut && bits != 1 {
			t.Errorf("%s: %d of %d bytes, %d bits flipped", r.name, len(data), len(source), bits)
		}
		if !bytes.Equal(data, read(t, r.name)) {
			t.Errorf("%s is not made of the present %s; record both again", r.name, r.from)
		}
	}
}

// QEMU keeps the pipe open until it is answered, so the child of a migration
// with a return path must know the end of the stream when it sees it.
func TestAnswer(t *testing.T) {
	data := read(t, "q35-return-path")
	file := filepath.Join(t.TempDir(), "stream")
	in, qemu := io.Pipe()
	var out bytes.Buffer
	done := make(chan error, 1)
	go func() { done <- answer(in, &out, file) }()
	if _, err := qemu.Write(data); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-done:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("no answer while the pipe is open")
	}
	if want := []byte{0, 1, 0, 4, 0, 0, 0, 0}; !bytes.Equal(out.Bytes(), want) {
		t.Errorf("answer %x, want %x", out.Bytes(), want)
	}
	written, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(written, data) {
		t.Errorf("%d bytes written of %d", len(written), len(data))
	}

	out.Reset()
	if err := answer(bytes.NewReader(data[:len(data)-100_000]), &out, file); err == nil {
		t.Error("half a stream was taken for a whole one")
	}
	if want := []byte{0, 1, 0, 4, 0, 0, 0, 1}; !bytes.Equal(out.Bytes(), want) {
		t.Errorf("answer to half a stream %x, want %x", out.Bytes(), want)
	}
}

// A recording that fails leaves the older one alone.
func TestCompressKeepsTheOlder(t *testing.T) {
	dir := t.TempDir()
	target := filepath.Join(dir, "x"+suffix)
	if err := os.WriteFile(target, []byte("older"), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := compress(ctx, filepath.Join(dir, "none"), target); err == nil {
		t.Error("a file that is not there was compressed")
	}
	if text, err := os.ReadFile(target); err != nil || string(text) != "older" {
		t.Errorf("the older one is %q, %v", text, err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}
