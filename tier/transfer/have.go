package transfer

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/source"
)

// Have is what a store has, so that it is not sent again.
type Have struct {
	Whole  map[uuid.UUID]bool  // images of checkpoints that are listed
	First  map[uuid.UUID]bool  // first images of listed checkpoints that have others now
	Disks  map[uuid.UUID]bool  // those of them whose pages of disks it has, too
	Parts  map[uuid.UUID]Part  // images of which it has what others need
	Staged map[uuid.UUID]int64 // by Sent.Key: up to which position it has what was cut off
}

// Part is what a store has of an image.
type Part struct{ Segments, Slots source.Ranges }

// NewHave is that of an empty store.
func NewHave() *Have {
	return &Have{make(map[uuid.UUID]bool), make(map[uuid.UUID]bool), make(map[uuid.UUID]bool), make(map[uuid.UUID]Part), make(map[uuid.UUID]int64)}
}

// Checkpoint tells whether the store has the checkpoint with an image, whose first image was
// the other, in whatever form.
func (h *Have) Checkpoint(id, first uuid.UUID) bool {
	return h.Whole[id] || h.Whole[first] || h.First[first]
}

// The text of a Have: a line for each thing.
//
//	flic-migrate have 1
//	whole UUID
//	first UUID                   of a checkpoint whose image was replaced: the first one
//	disks UUID                   of a whole one: the pages that it has on disks, too
//	part UUID SEGMENTS SLOTS     ranges as 0-5,7; - for none
//	staged KEY POSITION
//	end
const haveHead = "flic-migrate have 1"

// maxLine is the longest line, maxLines how many there can be (each checkpoint has one), and
// maxText the bytes of all: who reads them takes about as much memory.
const (
	maxLine  = 4 << 20
	maxLines = 1 << 20
	maxText  = 256 << 20
)

// Write writes the text. Parts for which there is no room are left out: they are sent again.
func (h *Have) Write(w io.Writer) error {
	b := bufio.NewWriter(w)
	fmt.Fprintln(b, haveHead)
	for id := range h.Whole {
		fmt.Fprintf(b, "whole %v\n", id)
	}
	for id := range h.First {
		fmt.Fprintf(b, "first %v\n", id)
	}
	for id := range h.Disks {
		fmt.Fprintf(b, "disks %v\n", id)
	}
	room := maxText / 2 // of all parts; the rest is a small line for each of maxLines
	for id, p := range h.Parts {
		line := fmt.Sprintf("part %v %s %s", id, rangesText(p.Segments), rangesText(p.Slots))
		if len(line) > maxLine || len(line) >= room {
			continue
		}
		room -= len(line) + 1
		fmt.Fprintln(b, line)
	}
	for key, pos := range h.Staged {
		fmt.Fprintf(b, "staged %v %d\n", key, pos)
	}
	fmt.Fprintln(b, "end")
	return b.Flush()
}

// ReadHave reads the text, up to its end and no byte further.
func ReadHave(r *bufio.Reader) (*Have, error) {
	h := NewHave()
	room := maxText
	for n := 0; ; n++ {
		line, err := readLine(r)
		if err != nil {
			return nil, fmt.Errorf("what the other store has: line %d: %w", n+1, err)
		}
		room -= len(line) + 1
		switch {
		case room < 0:
			return nil, fmt.Errorf("what the other store has: line %d: more than %d bytes", n+1, maxText)
		case n == 0 && line != haveHead:
			return nil, fmt.Errorf("what the other store has: it begins with %.60q, and not with %q", line, haveHead)
		case n == 0:
			continue
		case line == "end":
			return h, nil
		case n > maxLines:
			return nil, fmt.Errorf("what the other store has: more than %d lines", maxLines)
		}
		if err := h.parse(strings.Fields(line)); err != nil {
			return nil, fmt.Errorf("what the other store has: line %d: %w", n+1, err)
		}
	}
}

func readLine(r *bufio.Reader) (string, error) {
	var line []byte
	for {
		part, more, err := r.ReadLine()
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return "", err
		}
		if line = append(line, part...); len(line) > maxLine {
			return "", errors.New("it is too long")
		}
		if !more {
			return string(line), nil
		}
	}
}

func (h *Have) parse(f []string) error {
	if len(f) < 2 {
		return errors.New("it is not known here")
	}
	id, err := uuid.Parse(f[1])
	if err != nil {
		return err
	}
	switch {
	case f[0] == "whole" && len(f) == 2:
		h.Whole[id] = true
	case f[0] == "first" && len(f) == 2:
		h.First[id] = true
	case f[0] == "disks" && len(f) == 2:
		h.Disks[id] = true
	case f[0] == "part" && len(f) == 4:
		var p Part
		if p.Segments, err = parseRanges(f[2]); err == nil {
			p.Slots, err = parseRanges(f[3])
		}
		h.Parts[id] = p
	case f[0] == "staged" && len(f) == 3:
		var pos int64
		if pos, err = strconv.ParseInt(f[2], 10, 64); err == nil && (pos < 0 || pos > maxLength) {
			err = fmt.Errorf("position %d", pos)
		}
		h.Staged[id] = pos
	default:
		err = errors.New("it is not known here")
	}
	return err
}

func rangesText(s source.Ranges) string {
	if len(s) == 0 {
		return "-"
	}
	var b strings.Builder
	for i, r := range s {
		if i > 0 {
			b.WriteByte(',')
		}
		fmt.Fprint(&b, r.First)
		if r.Count > 1 {
			fmt.Fprintf(&b, "-%d", r.End()-1)
		}
	}
	return b.String()
}

func parseRanges(text string) (s source.Ranges, err error) {
	if text == "-" {
		return nil, nil
	}
	for _, part := range strings.Split(text, ",") {
		from, to, many := strings.Cut(part, "-")
		if !many {
			to = from
		}
		first, err := strconv.ParseUint(from, 10, 32)
		if err != nil {
			return nil, err
		}
		last, err := strconv.ParseUint(to, 10, 32)
		if err != nil {
			return nil, err
		}
		if last < first || last-first >= 1<<32-1 {
			return nil, fmt.Errorf("range %s", part)
		}
		s = append(s, source.Range{First: uint32(first), Count: uint32(last - first + 1)})
	}
	if !rising(s) {
		return nil, fmt.Errorf("ranges %.60s do not rise", text)
	}
	return s, nil
}
