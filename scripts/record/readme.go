package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

const readmeHead = `# Recorded streams

Migration streams that QEMU wrote to an ` + "`exec:`" + ` child, or to a file where the
table says so, each compressed with zstd. This file and the streams are made by
` + "`go run ./scripts/record`" + `, which also restores each of them into a second QEMU and
compares its memory. The guests run without an operating system, on memory of
known, varied content, so that the streams are small; only the one with "linux" in
its name has a kernel.

A save must refuse those with ` + "`.refused.`" + ` in the name, and QEMU refuses to load
them.

| file | QEMU | machine | how | what it shows | bytes | sha256 of the stream |
|---|---|---|---|---|---|---|
`

// writeReadme describes the streams that are there. Sizes and checksums are of
// the streams as QEMU wrote them.
func writeReadme(ctx context.Context, testdata string) error {
	var b strings.Builder
	b.WriteString(readmeHead)
	for _, r := range recordings {
		file := r.name + suffix
		data, err := expand(ctx, filepath.Join(testdata, file))
		if _, missing := os.Stat(filepath.Join(testdata, file)); errors.Is(missing, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		b.WriteString(r.line(data))
	}
	return os.WriteFile(filepath.Join(testdata, "README.md"), []byte(b.String()), 0o644)
}

// line is a recording's line of the table.
func (r *recording) line(data []byte) string {
	made := r
	if r.from != "" {
		made = find(r.from)
	}
	return fmt.Sprintf("| %s | %s | %s | %s | %s | %d | %x |\n",
		r.name+suffix, made.qemu, made.machine, r.how, r.oddity, len(data), sha256.Sum256(data))
}
