package main

import (
	"bufio"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"unicode"
	"unicode/utf8"
)

// table is what people read: cells in columns. What a cell says may come from a stream or a
// file of somebody else's.
type table struct {
	buf *bufio.Writer // a tabwriter writes each cell by itself
	tab *tabwriter.Writer
}

func newTable(w io.Writer) *table {
	b := bufio.NewWriter(w)
	return &table{b, tabwriter.NewWriter(b, 0, 8, 2, ' ', 0)}
}

func (t *table) row(cells ...string) {
	for i, c := range cells {
		if i > 0 {
			io.WriteString(t.tab, "\t")
		}
		io.WriteString(t.tab, printable(c))
	}
	io.WriteString(t.tab, "\n")
}

func (t *table) flush() error {
	if err := t.tab.Flush(); err != nil {
		return err
	}
	return t.buf.Flush()
}

// printable is a text with an escape sequence for all that could play with a terminal, or look
// like another line or cell. Text without such is as it is.
func printable(s string) string {
	if utf8.ValidString(s) && strings.IndexFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) < 0 {
		return s
	}
	q := strconv.Quote(s)
	return q[1 : len(q)-1]
}
