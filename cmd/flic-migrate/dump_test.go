package main

import (
	"bytes"
	"testing"

	"github.com/flic-migrate/flic-migrate/stream"
)

// TestDumpLists: a stream of many small things makes no long lists, and what is left out
// of them is counted.
func TestDumpLists(t *testing.T) {
	const n = 50000
	b := stream.AppendHeader(nil)
	b = stream.AppendConfiguration(b, "pc")
	for range n {
		b = stream.AppendConfigSubsection(b, stream.ConfigSubsection{Name: stream.SubsectionTargetPageBits, Version: 1, TargetPageBits: 12})
	}
	for id := range uint32(n) {
		b = stream.AppendFull(b, stream.Section{ID: id, Name: "early"})
		b = stream.AppendFooter(b, id)
		b = stream.AppendCommand(b, stream.CommandPostcopyRun, nil)
	}
	d := newDumper("-", bytes.NewReader(stream.AppendEOF(b)))
	if err := d.walk(); err != nil {
		t.Fatal(err)
	}
	if len(d.doc.Subsections) != maxListed || d.doc.SubsectionsLeftOut != n-maxListed {
		t.Errorf("%d subsections are listed, %d are not", len(d.doc.Subsections), d.doc.SubsectionsLeftOut)
	}
	if len(d.doc.Commands) != maxListed || d.doc.CommandsLeftOut != n-maxListed {
		t.Errorf("%d commands are listed, %d are not", len(d.doc.Commands), d.doc.CommandsLeftOut)
	}
	if len(d.doc.Devices) != maxListed || d.doc.DevicesLeftOut != n-maxListed {
		t.Errorf("%d devices are listed, %d are not", len(d.doc.Devices), d.doc.DevicesLeftOut)
	}
	var out bytes.Buffer
	if err := printDump(&out, &d.doc); err != nil || bytes.Count(out.Bytes(), []byte("\nand 40000 more\n")) != 3 {
		t.Errorf("%v: %.300q", err, out.Bytes())
	}
}
