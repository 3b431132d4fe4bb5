package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/google/uuid"
	"github.com/spf13/cobra"

	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/stream"
	"github.com/flic-migrate/flic-migrate/tier/replay"
)

func newDump(a *app) *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:   "dump [flags] STREAM",
		Short: "Print what a recorded migration stream consists of",
		Long: `Dump prints the structure of a migration stream: header and configuration, commands,
sections, RAM blocks, page records by kind, passes over the memory, and the device
sections with their sizes. STREAM is a file, which may be compressed with zstd,
gzip or lz4, or - for standard input.

Of a damaged or truncated stream it prints what comes before the damage, and exits
with 5.`,
		Example: `  flic-migrate dump web1.stream
  flic-migrate restore --store /srv/vms web1 | flic-migrate dump --json -`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return a.dump(cmd.Context(), args[0], asJSON) },
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON on standard output")
	return c
}

// dumpDoc is dump's JSON document. Its lists are as long as maxListed at most.
type dumpDoc struct {
	Stream       string         `json:"stream"`
	Bytes        int64          `json:"bytes"` // decompressed
	Machine      string         `json:"machine,omitempty"`
	PageSize     int            `json:"page_size"` // 0: no page told it
	Capabilities []string       `json:"capabilities,omitempty"`
	GuestUUID    string         `json:"guest_uuid,omitempty"`
	Subsections  []string       `json:"subsections,omitempty"`
	Commands     []dumpCommand  `json:"commands,omitempty"`
	Sections     []dumpSection  `json:"sections"`
	Blocks       []dumpBlock    `json:"blocks"`
	Records      map[string]int `json:"records"` // of the RAM section, by kind
	Passes       int            `json:"passes"`
	Devices      []dumpDevice   `json:"devices"`
	TailBytes    int            `json:"tail_bytes"` // device sections, EOF, vmdescription
	Description  int            `json:"vmdescription_bytes"`
	RunState     string         `json:"run_state,omitempty"`
	OpaqueBytes  int64          `json:"opaque_bytes"` // not understood, at the end
	OpaqueCause  string         `json:"opaque_cause,omitempty"`
	Error        string         `json:"error,omitempty"`

	SubsectionsLeftOut int `json:"subsections_left_out,omitempty"` // of those lists, because they are too many
	CommandsLeftOut    int `json:"commands_left_out,omitempty"`
	DevicesLeftOut     int `json:"devices_left_out,omitempty"`
}

// maxListed is how many subsections, commands and devices each are listed. A stream of a
// hundred VCPUs has a few hundred, but a few hostile bytes are one, and thousands of them
// one when they are compressed.
const maxListed = 10000

// limited appends to a list, or counts what it has no room for.
func limited[T any](list []T, left *int, v T) []T {
	if len(list) == maxListed {
		*left++
		return list
	}
	return append(list, v)
}

type dumpCommand struct {
	Offset int64  `json:"offset"`
	Number uint16 `json:"number"`
	Name   string `json:"name"`
	Length int    `json:"length"`
}

// dumpSection is an iterable section over the whole stream.
type dumpSection struct {
	ID       uint32 `json:"id"`
	Name     string `json:"name"`
	Instance uint32 `json:"instance"`
	Version  uint32 `json:"version"`
	Parts    int    `json:"parts"`
	End      bool   `json:"end"` // an END section came
	Bytes    int64  `json:"bytes"`
}

type dumpBlock struct {
	ramparse.Block
	Pages int `json:"page_records"`
}

type dumpDevice struct {
	ID       uint32 `json:"id"`
	Name     string `json:"name"`
	Instance uint32 `json:"instance"`
	Version  uint32 `json:"version"`
	Offset   int64  `json:"offset"` // of the body in the stream
	Bytes    int    `json:"bytes"`  // of the body
	Early    bool   `json:"early"`  // stands before RAM's pages
}

func (a *app) dump(ctx context.Context, path string, asJSON bool) error {
	var in io.Reader
	if path == "-" {
		stdin, err := a.input(ctx, path)
		if err != nil {
			return err
		}
		defer stdin.Close()
		r, done, err := replay.Decompress(stdin)
		if err != nil {
			return err
		}
		defer done()
		in = r
	} else {
		f, err := replay.Open(ctx, path)
		if err != nil {
			return err
		}
		defer f.Close()
		in = f
	}
	d := newDumper(path, in)
	// What comes before a damage is what one wants to see of a damaged stream.
	err := d.walk()
	if err != nil {
		d.doc.Error = oneLine(err)
	}
	var perr error
	if asJSON {
		perr = printJSON(a.stdout, d.doc)
	} else {
		perr = printDump(a.stdout, &d.doc)
	}
	if perr != nil {
		return perr
	}
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

// dumper collects a dumpDoc.
type dumper struct {
	in      io.Reader
	doc     dumpDoc
	section int            // index of the one whose payload follows
	index   map[uint32]int // of sections by their ids
	passes  *ramparse.PassCounter
}

func newDumper(path string, in io.Reader) *dumper {
	return &dumper{in: in, index: make(map[uint32]int), doc: dumpDoc{
		Stream: path, Sections: []dumpSection{}, Blocks: []dumpBlock{}, Records: map[string]int{}, Devices: []dumpDevice{},
	}}
}

// Read counts the bytes that the walk has taken.
func (d *dumper) Read(b []byte) (int, error) {
	n, err := d.in.Read(b)
	d.doc.Bytes += int64(n)
	return n, err
}

func (d *dumper) walk() error {
	err := ramparse.Walk(d, 0, ramparse.Visitor{
		Frame:  d.frame,
		Record: d.record,
		Bytes: func(b []byte) error {
			if len(d.doc.Sections) > 0 {
				d.doc.Sections[d.section].Bytes += int64(len(b))
			}
			return nil
		},
		Opaque: func(b []byte, cause error) error {
			d.doc.OpaqueBytes += int64(len(b))
			d.doc.OpaqueCause = oneLine(cause)
			return nil
		},
		Tail: d.devices,
	})
	if d.passes != nil {
		d.doc.Passes = d.passes.Passes()
	}
	return err
}

func (d *dumper) frame(f *stream.Frame) error {
	switch f.Kind {
	case stream.Configuration:
		d.doc.Machine = f.MachineType
	case stream.Subsection:
		s := f.Subsection
		d.doc.Subsections = limited(d.doc.Subsections, &d.doc.SubsectionsLeftOut, s.Name)
		switch s.Name {
		case stream.SubsectionCapabilities:
			d.doc.Capabilities = s.Capabilities
		case stream.SubsectionUUID:
			d.doc.GuestUUID = uuid.UUID(s.UUID).String()
		case stream.SubsectionTargetPageBits:
			d.doc.PageSize = 1 << (s.TargetPageBits & 31)
		}
	case stream.CommandFrame:
		d.doc.Commands = limited(d.doc.Commands, &d.doc.CommandsLeftOut,
			dumpCommand{f.Offset, f.Command.Number, commandName(f.Command.Number), len(f.Command.Payload)})
	case stream.SectionEarly:
		body, offset := f.Body()
		s := f.Section
		d.doc.Devices = limited(d.doc.Devices, &d.doc.DevicesLeftOut, dumpDevice{s.ID, s.Name, s.Instance, s.Version, offset, len(body), true})
	case stream.SectionStart:
		d.doc.Sections = append(d.doc.Sections, dumpSection{
			ID: f.Section.ID, Name: f.Section.Name, Instance: f.Section.Instance, Version: f.Section.Version,
		})
		d.section = len(d.doc.Sections) - 1
		d.index[f.Section.ID] = d.section
	case stream.SectionPart, stream.SectionEnd:
		d.section = d.index[f.Section.ID]
		s := &d.doc.Sections[d.section]
		if f.Kind == stream.SectionEnd {
			s.End = true
		} else {
			s.Parts++
		}
	}
	return nil
}

func (d *dumper) record(dec *ramparse.Decoder, rec *ramparse.Record) error {
	d.doc.Records[rec.Kind.String()]++
	d.doc.Sections[d.section].Bytes += int64(len(rec.Raw))
	if rec.Kind == ramparse.MemSize {
		for _, b := range dec.Setup().Blocks {
			d.doc.Blocks = append(d.doc.Blocks, dumpBlock{Block: b})
		}
	}
	switch rec.Kind {
	case ramparse.Zero, ramparse.Page, ramparse.XBZRLE, ramparse.Compressed:
		d.doc.Blocks[rec.Block].Pages++
		if n := dec.PageSize(); n != 0 {
			d.doc.PageSize = n
			if d.passes == nil && dec.Setup().Total/uint64(n) <= maxCounted {
				d.passes = ramparse.NewPassCounter(dec.Setup(), n)
			}
			if d.passes != nil {
				d.passes.Add(rec.Block, rec.Page)
			}
		}
	}
	return nil
}

// maxCounted is how many pages a stream may announce, 4 TiB of 4 KiB, for its
// passes to be counted. The counter has its memory at once, and a few hostile
// bytes can announce any size.
const maxCounted = 1 << 30

func (d *dumper) devices(b []byte) error {
	start := d.doc.Bytes - int64(len(b))
	d.doc.TailBytes = len(b)
	early := len(d.doc.Devices) + d.doc.DevicesLeftOut
	t, err := stream.ParseTail(b)
	if err == nil && t.Description != nil && t.Early != early {
		err = stream.Damaged("vmdescription", start, "%d devices ahead of RAM, %d described", early, t.Early)
	}
	d.doc.RunState, d.doc.Description = t.RunState, len(t.Description)
	if d.doc.PageSize == 0 {
		d.doc.PageSize = t.PageSize
	}
	for _, s := range t.Sections {
		d.doc.Devices = limited(d.doc.Devices, &d.doc.DevicesLeftOut,
			dumpDevice{s.ID, s.Name, s.Instance, s.Version, start + int64(s.Offset), s.Length, false})
	}
	return err
}

// commandName is QEMU's name of a command, without MIG_CMD_.
func commandName(n uint16) string {
	names := map[uint16]string{
		stream.CommandOpenReturnPath: "OPEN_RETURN_PATH", stream.CommandPing: "PING",
		stream.CommandPostcopyAdvise: "POSTCOPY_ADVISE", stream.CommandPostcopyListen: "POSTCOPY_LISTEN",
		stream.CommandPostcopyRun: "POSTCOPY_RUN", stream.CommandPostcopyDiscard: "POSTCOPY_RAM_DISCARD",
		stream.CommandPackaged: "PACKAGED", stream.CommandEnableColo: "ENABLE_COLO",
		stream.CommandPostcopyResume: "POSTCOPY_RESUME", stream.CommandRecvBitmap: "RECV_BITMAP",
		stream.CommandSwitchoverStart: "SWITCHOVER_START",
	}
	if name, ok := names[n]; ok {
		return name
	}
	return fmt.Sprintf("command %d", n)
}

func printDump(w io.Writer, d *dumpDoc) error {
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	line := func(format string, args ...any) { fmt.Fprintf(t, format+"\n", args...) }
	line("stream\t%s", printable(d.Stream))
	line("bytes\t%d", d.Bytes)
	line("machine\t%s", dash(printable(d.Machine)))
	line("page size\t%d", d.PageSize)
	line("subsections\t%s", dash(printable(strings.Join(d.Subsections, ", "))))
	more := func(left int) {
		if left > 0 {
			line("and %d more", left)
		}
	}
	more(d.SubsectionsLeftOut)
	if len(d.Capabilities) > 0 {
		line("capabilities\t%s", printable(strings.Join(d.Capabilities, ", ")))
	}
	if d.GuestUUID != "" {
		line("guest uuid\t%s", d.GuestUUID)
	}
	line("passes\t%d", d.Passes)
	line("state\t%s", dash(printable(d.RunState)))
	if len(d.Commands) > 0 {
		line("\nCOMMAND\tOFFSET\tLENGTH")
		for _, c := range d.Commands {
			line("%s\t%d\t%d", c.Name, c.Offset, c.Length)
		}
		more(d.CommandsLeftOut)
	}
	line("\nSECTION\tID\tINSTANCE\tVERSION\tPARTS\tEND\tBYTES")
	for _, s := range d.Sections {
		line("%s\t%d\t%d\t%d\t%d\t%t\t%d", printable(s.Name), s.ID, s.Instance, s.Version, s.Parts, s.End, s.Bytes)
	}
	line("\nBLOCK\tBYTES\tPAGE RECORDS\tHOST PAGE\tGPA")
	for _, b := range d.Blocks {
		host, gpa := "-", "-"
		if b.PageSize != 0 {
			host = fmt.Sprint(b.PageSize)
		}
		if b.GPA != nil {
			gpa = fmt.Sprintf("%#x", *b.GPA)
		}
		line("%s\t%d\t%d\t%s\t%s", printable(b.Name), b.Used, b.Pages, host, gpa)
	}
	line("\nRECORD\tCOUNT")
	for k := ramparse.MemSize; k <= ramparse.EOS; k++ {
		if n := d.Records[k.String()]; n > 0 {
			line("%v\t%d", k, n)
		}
	}
	line("\nDEVICE\tID\tINSTANCE\tVERSION\tOFFSET\tBYTES")
	for _, s := range d.Devices {
		line("%s\t%d\t%d\t%d\t%d\t%d", printable(s.Name), s.ID, s.Instance, s.Version, s.Offset, s.Bytes)
	}
	more(d.DevicesLeftOut)
	line("\nwhole tail\t%d bytes, vmdescription %d", d.TailBytes, d.Description)
	if d.OpaqueBytes > 0 {
		line("not understood\t%d bytes: %s", d.OpaqueBytes, printable(d.OpaqueCause))
	}
	return t.Flush()
}
