package domain

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/digitalocean/go-libvirt"

	"github.com/flic-migrate/flic-migrate/qmp/disks"
)

// snapshotTime is how long libvirt may take to make the overlays. The guest stands still.
const snapshotTime = time.Minute

// domainDisk is a disk in a domain's XML, as far as it is of use here.
type domainDisk struct {
	Type     string    `xml:"type,attr"`
	ReadOnly *struct{} `xml:"readonly"`
	Source   struct {
		File string `xml:"file,attr"`
	} `xml:"source"`
	Target struct {
		Dev string `xml:"dev,attr"`
	} `xml:"target"`
}

// TakeSnapshots makes the overlays, which are disks.Overlays of the domain's disks: all of
// them or none. libvirt does it, makes the files so that QEMU may use them, and has the
// overlays for the domain's disks from then on, in its definition too. It keeps no snapshot
// of its own, which would have to be removed before the domain can be undefined. The guest
// stands still, and stays so.
func TakeSnapshots(ctx context.Context, uri, name string, overlays []disks.Snapshot) error {
	c, err := open(ctx, uri)
	if err != nil {
		return err
	}
	defer c.close()
	d, err := c.lookup(ctx, name)
	if err != nil {
		return err
	}
	text, err := ask(ctx, c, "describe", func() (string, error) { return c.rpc.DomainGetXMLDesc(d, 0) })
	if err != nil {
		return err
	}
	request, err := snapshotXML(text, overlays)
	if err != nil {
		return fmt.Errorf("snapshots of the disks: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, snapshotTime)
	defer cancel()
	_, err = await(ctx, c, "snapshots of the disks", func() (libvirt.DomainSnapshot, error) {
		return c.rpc.DomainSnapshotCreateXML(d, request,
			uint32(libvirt.DomainSnapshotCreateDiskOnly|libvirt.DomainSnapshotCreateNoMetadata|libvirt.DomainSnapshotCreateAtomic))
	})
	return err
}

// snapshotXML is what libvirt is asked for
// (https://libvirt.org/formatsnapshot.html), for a domain with this XML. Disks without an
// overlay are left alone.
func snapshotXML(domain string, overlays []disks.Snapshot) (string, error) {
	var doc struct {
		Disks []domainDisk `xml:"devices>disk"`
	}
	if err := xml.Unmarshal([]byte(domain), &doc); err != nil {
		return "", fmt.Errorf("the domain's XML: %w", err)
	}
	type source struct {
		File string `xml:"file,attr"`
	}
	type driver struct {
		Type string `xml:"type,attr"`
	}
	type disk struct {
		Name     string  `xml:"name,attr"`
		Snapshot string  `xml:"snapshot,attr"`
		Driver   *driver `xml:"driver"`
		Source   *source `xml:"source"`
	}
	request := struct {
		XMLName xml.Name `xml:"domainsnapshot"`
		Disks   []disk   `xml:"disks>disk"`
	}{}
	found := 0
	for _, d := range doc.Disks {
		i := slices.IndexFunc(overlays, func(s disks.Snapshot) bool {
			return d.Type == "file" && d.ReadOnly == nil && s.Frozen == d.Source.File
		})
		if i < 0 {
			request.Disks = append(request.Disks, disk{Name: d.Target.Dev, Snapshot: "no"})
			continue
		}
		found++
		request.Disks = append(request.Disks, disk{d.Target.Dev, "external", &driver{"qcow2"}, &source{overlays[i].Now}})
	}
	if found != len(overlays) {
		return "", errOtherDisks
	}
	b, err := xml.Marshal(request)
	return string(b), err
}

var errOtherDisks = errors.New("libvirt does not have all of them for files of the domain's disks, as those of a <qemu:commandline>")

// OnOverlays is the description with an overlay for each disk that one of these stands on:
// the file, its format, and no word of what lies below, which the overlay says.
func (d Description) OnOverlays(overlays []disks.Snapshot) (Description, error) {
	var edits, mine []edit // mine: of the disk that is being read
	var path []string
	on, found := -1, 0 // which overlay the disk that is being read gets
	in := xml.NewDecoder(strings.NewReader(d.XML))
	for {
		at := in.InputOffset()
		token, err := in.RawToken()
		if err == io.EOF {
			break
		}
		if err != nil {
			return d, fmt.Errorf("the domain's XML: %w", err)
		}
		end := in.InputOffset()
		switch t := token.(type) {
		case xml.StartElement:
			path = append(path, t.Name.Local)
			switch strings.Join(path, "/") {
			case "domain/devices/disk":
				mine, on = nil, -1
			case "domain/devices/disk/driver":
				mine = append(mine, edit{at, end, withAttribute(t, d.XML[at:end], "type", "qcow2")})
			case "domain/devices/disk/source":
				i := slices.IndexFunc(t.Attr, func(a xml.Attr) bool { return a.Name.Local == "file" })
				if i < 0 {
					break
				}
				on = slices.IndexFunc(overlays, func(s disks.Snapshot) bool { return sameFile(t.Attr[i].Value, s.Frozen) })
				if on >= 0 {
					mine = append(mine, edit{at, end, withAttribute(t, d.XML[at:end], "file", overlays[on].Now)})
				}
			case "domain/devices/disk/backingStore":
				mine = append(mine, edit{from: at})
			}
		case xml.EndElement:
			switch strings.Join(path, "/") {
			case "domain/devices/disk/backingStore":
				mine[len(mine)-1].to = end
			case "domain/devices/disk":
				if on >= 0 {
					found++
					edits = append(edits, mine...)
				}
			}
			path = path[:max(0, len(path)-1)]
		}
	}
	if found != len(overlays) {
		return d, errOtherDisks
	}
	var out strings.Builder
	copied := int64(0)
	for _, e := range edits {
		out.WriteString(d.XML[copied:e.from] + e.with)
		copied = e.to
	}
	d.XML = out.String() + d.XML[copied:]
	return d, nil
}

// Active tells whether a domain has a QEMU, or might: true if libvirt does not say.
func Active(ctx context.Context, uri, name string) bool {
	c, err := open(ctx, uri)
	if err != nil {
		return true
	}
	defer c.close()
	_, err = c.lookup(ctx, name)
	return !errors.Is(err, ErrNotFound) && !errors.Is(err, ErrInactive)
}

// edit is what stands in a text instead of a part of it.
type edit struct {
	from, to int64
	with     string
}

// withAttribute is a tag, which stands in the text as it is given, with another value for an
// attribute.
func withAttribute(t xml.StartElement, text, name, value string) string {
	var b strings.Builder
	b.WriteString("<" + t.Name.Local)
	put := func(name, value string) {
		b.WriteString(" " + name + "='")
		_ = xml.EscapeText(&b, []byte(value)) // a Builder takes all
		b.WriteString("'")
	}
	for _, a := range t.Attr {
		if a.Name.Local != name {
			put(a.Name.Local, a.Value)
		}
	}
	put(name, value)
	if strings.HasSuffix(text, "/>") {
		b.WriteString("/")
	}
	b.WriteString(">")
	return b.String()
}

// sameFile tells whether a file's name, as a user may write it, is this path, in which there
// are no links.
func sameFile(name, path string) bool {
	if name == path {
		return true
	}
	full, err := filepath.EvalSymlinks(name)
	return err == nil && full == path
}
