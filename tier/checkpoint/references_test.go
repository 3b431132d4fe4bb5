package checkpoint

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/digest"
	"github.com/flic-migrate/flic-migrate/tier/source"
)

// twoReferences is a document with little of everything.
func twoReferences() References {
	return References{
		{UUID: uuid.UUID{1}, Root: digest.Root{2, 3}, VM: "vm", Number: 7, SegmentPages: 32, Segments: 100, Slots: 50,
			NeedSegments: source.Ranges{{First: 0, Count: 1}, {First: 2, Count: 98}}, NeedSlots: source.Ranges{{First: 10, Count: 40}}},
		{UUID: uuid.UUID{9}, VM: "Übung", Number: 99999999, SegmentPages: 256, Segments: 1<<32 - 1,
			NeedSegments: source.Ranges{{First: 1, Count: 1<<32 - 2}}},
	}
}

// TestReferencesDocument reads back what was written, and refuses what can't be.
func TestReferencesDocument(t *testing.T) {
	for _, want := range []References{{}, twoReferences()} {
		stored := want.Append(nil)
		got, err := ParseReferences(stored)
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%+v, %v", got, err)
		}
		for n := range stored {
			if _, err := ParseReferences(stored[:n]); err == nil {
				t.Errorf("cut to %d bytes of %d", n, len(stored))
			}
		}
		if _, err := ParseReferences(append(bytes.Clone(stored), 0)); err == nil {
			t.Error("one byte more")
		}
	}
	for name, c := range map[string]struct {
		change func(rs References)
		says   string
	}{
		"nobody":           {func(rs References) { rs[0].UUID = uuid.Nil }, "nobody's"},
		"one twice":        {func(rs References) { rs[1].UUID = rs[0].UUID }, "twice"},
		"no pages":         {func(rs References) { rs[1].SegmentPages = 0 }, "0 pages in a segment"},
		"many pages":       {func(rs References) { rs[1].SegmentPages = 257 }, "257 pages in a segment"},
		"empty range":      {func(rs References) { rs[0].NeedSegments[0].Count = 0 }, "range 0 of 0 numbers"},
		"touching ranges":  {func(rs References) { rs[0].NeedSegments[0].Count = 2 }, "range 1"},
		"overlap":          {func(rs References) { rs[0].NeedSegments[0].Count = 50 }, "range 1"},
		"falling":          {func(rs References) { slices.Reverse(rs[0].NeedSegments) }, "range 1"},
		"behind the end":   {func(rs References) { rs[0].Segments = 99 }, "range 1 of 98 numbers from 2 on, of 99"},
		"overflow":         {func(rs References) { rs[1].NeedSegments[0].Count = 1<<32 - 1 }, "range 0"},
		"slots behind":     {func(rs References) { rs[0].Slots = 49 }, "from 10 on, of 49"},
		"slots of no part": {func(rs References) { rs[0].Slots = 0 }, "of 0"},
		"long name":        {func(rs References) { rs[0].VM = strings.Repeat("x", maxVMName+1) }, "name of 129"},
	} {
		rs := twoReferences()
		c.change(rs)
		if _, err := ParseReferences(rs.Append(nil)); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", name, err)
		}
	}
	le := binary.LittleEndian
	for at, says := range map[int]string{
		0: "version", 4: "references in", // 2^31 more of each
		referencesHeadLen + 64: "ranges in", referencesHeadLen + 68: "ranges in",
	} {
		b := twoReferences().Append(nil)
		le.PutUint32(b[at:], le.Uint32(b[at:])+1<<31)
		took := allocated(func() {
			if _, err := ParseReferences(b); err == nil || !strings.Contains(err.Error(), says) {
				t.Errorf("a huge number at %d: %v", at, err)
			}
		})
		if took > 64<<10 {
			t.Errorf("a huge number at %d: %d bytes allocated", at, took)
		}
	}
}

// TestReferencesRoom: as many references as there can be, with as many ranges as there
// can be, fit into what is read, and none of what they name is left out.
func TestReferencesRoom(t *testing.T) {
	for _, n := range []int{1, 48, maxRefs} {
		rng := rand.New(rand.NewPCG(uint64(n), 1))
		rs := make(References, n)
		for i := range rs {
			r := Reference{UUID: uuid.New(), VM: strings.Repeat("v", maxVMName), SegmentPages: 32}
			end := uint32(1)
			for range 3 * maxReferences / n / rangeLen / 4 {
				run := source.Range{First: end + rng.Uint32N(9), Count: 1 + rng.Uint32N(3)}
				r.NeedSegments = append(r.NeedSegments, run)
				end = uint32(run.End()) + 1
			}
			r.NeedSlots = r.NeedSegments
			r.Segments, r.Slots = end, end
			rs[i] = r
		}
		b := rs.Append(nil)
		if len(b) > maxReferences || len(b) < maxReferences*9/10 {
			t.Errorf("%d references: %d bytes", n, len(b))
		}
		got, err := ParseReferences(b)
		if err != nil {
			t.Fatal(err)
		}
		for i := range rs {
			for _, run := range rs[i].NeedSegments {
				if !got[i].NeedSegments.Has(uint64(run.First), run.End()-1) {
					t.Fatalf("%d references: segments %+v of reference %d are left out", n, run, i)
				}
			}
		}
	}
}

// FuzzReferences parses anything. What is accepted is written the same again.
func FuzzReferences(f *testing.F) {
	f.Add(References{}.Append(nil))
	f.Add(twoReferences().Append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		rs, err := ParseReferences(b)
		if err == nil && !bytes.Equal(rs.Append(nil), b) {
			t.Error("written again it is another")
		}
		for i := range rs {
			if r := &rs[i]; r.NeedSegments.Count() > uint64(r.Segments) || r.NeedSlots.Count() > uint64(r.Slots) {
				t.Errorf("%s needs more than there is", fmt.Sprint(r))
			}
		}
	})
}
