package domain

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"github.com/digitalocean/go-libvirt"
)

// Description is what libvirt needs to start a domain again. Its texts are those
// of a save file of libvirt's.
type Description struct {
	// XML is the domain as a migration takes it along: what its guest sees,
	// passwords included, without what is only true of this process.
	XML string
	// Cookie has the CPU as QEMU has made it. XML has it as the user asked
	// for it, which may come out otherwise on another host.
	Cookie string
	// Persistent is set if the domain is defined and not only running.
	Persistent bool
}

// Describe asks for a domain's description.
func Describe(ctx context.Context, uri, name string) (d Description, err error) {
	c, err := open(ctx, uri)
	if err != nil {
		return d, err
	}
	defer c.close()
	dom, err := c.lookup(ctx, name)
	if err != nil {
		return d, err
	}
	text := func(flags libvirt.DomainXMLFlags) (string, error) {
		return ask(ctx, c, "describe", func() (string, error) { return c.rpc.DomainGetXMLDesc(dom, flags) })
	}
	if d.XML, err = text(libvirt.DomainXMLSecure | libvirt.DomainXMLMigratable); err != nil {
		return d, err
	}
	live, err := text(libvirt.DomainXMLSecure)
	if err != nil {
		return d, err
	}
	cpu, err := child(live, "cpu")
	if err != nil {
		return d, err
	}
	if cpu != "" {
		d.Cookie = "<cookie>\n  " + cpu + "\n</cookie>\n"
	}
	persistent, err := ask(ctx, c, "describe", func() (int32, error) { return c.rpc.DomainIsPersistent(dom) })
	d.Persistent = persistent != 0
	return d, err
}

// child returns the first element of this name in the document's root, as it
// stands there, or nothing.
func child(document, name string) (string, error) {
	in := xml.NewDecoder(strings.NewReader(document))
	depth, begin := 0, int64(-1)
	for {
		at := in.InputOffset()
		token, err := in.Token()
		if err == io.EOF {
			return "", nil
		}
		if err != nil {
			return "", fmt.Errorf("libvirt's XML: %w", err)
		}
		switch t := token.(type) {
		case xml.StartElement:
			if depth++; depth == 2 && t.Name.Local == name && begin < 0 {
				begin = at
			}
		case xml.EndElement:
			if depth--; depth == 1 && begin >= 0 {
				return document[begin:in.InputOffset()], nil
			}
		}
	}
}

// identity is what a description says that matters here.
type identity struct {
	XMLName xml.Name `xml:"domain"`
	Name    string   `xml:"name"`
	UUID    string   `xml:"uuid"`
	Labels  []struct {
		Model string `xml:"model,attr"`
		Label string `xml:"label"`
	} `xml:"seclabel"`
}

// Name is the name of the domain that is described.
func (d Description) Name() (string, error) {
	id, err := d.identity()
	return id.Name, err
}

func (d Description) identity() (id identity, err error) {
	if err := xml.Unmarshal([]byte(d.XML), &id); err != nil {
		return id, fmt.Errorf("the domain's XML: %w", err)
	}
	if id.Name == "" || id.UUID == "" {
		return id, errors.New("the domain's XML has no name or no uuid")
	}
	return id, nil
}

// owner is the user and group that the domain's QEMU runs as, if the domain has
// its own.
func (id identity) owner() (uid, gid int, ok bool) {
	for _, l := range id.Labels {
		if l.Model == "dac" && l.Label != "" {
			return parseLabel(l.Label)
		}
	}
	return 0, 0, false
}

// User is the user whom libvirt has the QEMU of a domain run as.
func User(ctx context.Context, uri string, d Description) (uid int, err error) {
	id, err := d.identity()
	if err != nil {
		return 0, err
	}
	c, err := open(ctx, uri)
	if err != nil {
		return 0, err
	}
	defer c.close()
	uid, _, _, err = c.user(ctx, id)
	return uid, err
}

// user is the user and group that a domain's QEMU runs as, and whether AppArmor or SELinux
// confines it.
func (c *client) user(ctx context.Context, id identity) (uid, gid int, confined bool, err error) {
	capabilities, err := ask(ctx, c, "capabilities", func() ([]byte, error) { return c.rpc.Capabilities() })
	if err != nil {
		return 0, 0, false, err
	}
	host, err := parseCapabilities(string(capabilities))
	if err != nil {
		return 0, 0, false, err
	}
	uid, gid, ok := id.owner()
	switch {
	case ok:
	case host.dac:
		uid, gid = host.uid, host.gid
	default:
		// libvirt has no DAC driver, as in a session, so QEMU's user is the
		// daemon's own.
		uid, gid = os.Getuid(), os.Getgid()
	}
	return uid, gid, host.confined, nil
}

// parseLabel reads a label of libvirt's DAC driver, +UID:+GID. Names it writes
// only as the user wrote them.
func parseLabel(label string) (uid, gid int, ok bool) {
	user, group, ok := strings.Cut(label, ":")
	if !ok || !strings.HasPrefix(user, "+") || !strings.HasPrefix(group, "+") {
		return 0, 0, false
	}
	u, err := strconv.ParseUint(user[1:], 10, 31)
	g, err2 := strconv.ParseUint(group[1:], 10, 31)
	return int(u), int(g), err == nil && err2 == nil
}

// hostSecurity is what libvirt's description of its host says of the security drivers
// under which it starts QEMUs.
type hostSecurity struct {
	uid, gid int  // of QEMUs, if there is a DAC driver; both 0 otherwise
	dac      bool // there is one
	confined bool // AppArmor or SELinux decides what a QEMU may do
}

func parseCapabilities(capabilities string) (s hostSecurity, err error) {
	var host struct {
		Models []struct {
			Model  string `xml:"model"`
			Labels []struct {
				Type  string `xml:"type,attr"`
				Label string `xml:",chardata"`
			} `xml:"baselabel"`
		} `xml:"host>secmodel"`
	}
	if err := xml.Unmarshal([]byte(capabilities), &host); err != nil {
		return s, fmt.Errorf("libvirt's capabilities: %w", err)
	}
	for _, m := range host.Models {
		if m.Model == "apparmor" || m.Model == "selinux" {
			s.confined = true
		}
		for _, l := range m.Labels {
			if m.Model != "dac" || s.dac {
				continue
			}
			s.uid, s.gid, s.dac = parseLabel(strings.TrimSpace(l.Label))
		}
	}
	return s, nil
}
