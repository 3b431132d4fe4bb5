package preflight

import (
	"cmp"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/flic-migrate/flic-migrate/qmp"
)

// A device's section is called by where the device is and what its state is called:
//
//	0000:00:03.0/virtio-net            PCI, on the root bus
//	0000:00:02.0:00.0/virtio-blk       PCI, behind the bridge at 00:02.0
//	0000:00:05.0/0:1:0/scsi-disk       on the SCSI bus of a PCI device: channel, id, LUN
//	0000:00:06.0/1.2/usb-ptr           on the USB bus of one: the port
//	virtio-mmio@000000000a003e00/…     virtio without PCI
//	serial, cpu, timer, …              elsewhere; instances are counted
//
// (hw/pci/pci.c, pcibus_get_dev_path; hw/scsi/scsi-bus.c, scsibus_get_dev_path;
// hw/usb/bus.c, usb_get_dev_path; hw/virtio/virtio-mmio.c,
// virtio_mmio_bus_get_dev_path.) A section that has no device to go to ends the load,
// "Unknown savevm section or instance". What a device's state is called QMP does not
// tell, so of most devices only the place is compared.

// pciRoot is how the PCI addresses begin of machines with one PCI host.
const pciRoot = "0000:00"

// address is a PCI path as users know it: 00:03.0.
func address(path string) string { return strings.TrimPrefix(path, "0000:") }

// A node is a device of QEMU's tree.
type node struct {
	kind string // QOM type
	path string // as sections have it; empty: not known
	last *node  // its parent
	addr string // on PCI, such as 03.0
	port string // on USB
	// scsi is channel, id and LUN.
	scsi [3]string
	mmio string // of a virtio-mmio transport
}

var (
	deviceLine = regexp.MustCompile(`^( *)dev: (\S+), id ".*"$`)
	pciLine    = regexp.MustCompile(`^addr = ([0-9a-f]{2}\.[0-7])$`)
	usbLine    = regexp.MustCompile(`^addr \d+\.\d+, port ([0-9.]+), speed `)
	scsiLine   = regexp.MustCompile(`^(channel|scsi-id|lun) = (\d+) \(`)
	mmioLine   = regexp.MustCompile(`^mmio ([0-9a-f]{16})/`)

	pciPath  = regexp.MustCompile(`^0000:00(:[0-9a-f]{2}\.[0-7])+`)
	mmioPath = regexp.MustCompile(`^virtio-mmio@[0-9a-f]{16}`)
	childOf  = regexp.MustCompile(`^/(\d+:\d+:\d+|\d+(\.\d+)*)/`)
)

// parseTree reads the answer to HMP's "info qtree". Devices are indented below their
// bus, and it below its device:
//
//	bus: main-system-bus
//	  type System
//	  dev: q35-pcihost, id ""
//	    bus: pcie.0
//	      type PCIE
//	      dev: virtio-net-pci, id "net0"
//	        addr = 03.0
func parseTree(text string) (nodes []*node) {
	type open struct {
		indent int
		*node
	}
	var above []open
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\r\n")
		if m := deviceLine.FindStringSubmatch(line); m != nil {
			indent := len(m[1])
			for len(above) > 0 && above[len(above)-1].indent >= indent {
				above = above[:len(above)-1]
			}
			n := &node{kind: m[2]}
			if len(above) > 0 {
				n.last = above[len(above)-1].node
			}
			nodes = append(nodes, n)
			above = append(above, open{indent, n})
			continue
		}
		if len(above) == 0 {
			continue
		}
		// A device's own lines are those before its buses.
		at := above[len(above)-1]
		own := strings.TrimLeft(line, " ")
		if len(line)-len(own) != at.indent+2 {
			continue
		}
		if m := pciLine.FindStringSubmatch(own); m != nil {
			at.addr = m[1]
		} else if m := usbLine.FindStringSubmatch(own); m != nil {
			at.port = m[1]
		} else if m := scsiLine.FindStringSubmatch(own); m != nil {
			at.scsi[slices.Index([]string{"channel", "scsi-id", "lun"}, m[1])] = m[2]
		} else if m := mmioLine.FindStringSubmatch(own); m != nil && at.kind == "virtio-mmio" {
			at.mmio = m[1]
		}
	}
	return nodes
}

// tree is where a QEMU's devices are.
type tree struct {
	nodes []*node
	at    map[string]*node // by path
	pci   bool             // the paths of PCI devices are known
}

func newTree(nodes []*node) *tree {
	t := &tree{nodes: nodes, at: make(map[string]*node)}
	// With several hosts it takes more than the tree to tell their numbers. A pxb's
	// bus has one of its own, and so have the devices on it.
	hosts := make(map[*node]bool)
	for _, n := range nodes {
		if n.addr != "" && n.last != nil && n.last.addr == "" && n.last.kind != "pxb-host" {
			hosts[n.last] = true
		}
	}
	t.pci = len(hosts) == 1
	// Parents come before their children.
	for _, n := range nodes {
		switch {
		case n.mmio != "":
			n.path = "virtio-mmio@" + n.mmio
		case n.last == nil:
		case n.addr != "" && hosts[n.last]:
			n.path = pciRoot + ":" + n.addr
		case n.last.path == "":
		case n.addr != "":
			n.path = n.last.path + ":" + n.addr
		case n.port != "":
			n.path = onBus(n.last.path) + "/" + n.port
		case n.scsi[1] != "":
			n.path = onBus(n.last.path) + "/" + strings.Join(n.scsi[:], ":")
		default:
			n.path = n.last.path // the inside of a device, virtio-net-device
			continue
		}
		if n.path != "" {
			t.at[n.path] = n
		}
	}
	return t
}

// onBus is the device whose bus a path is on: a USB hub's devices are on its own
// bus's.
func onBus(path string) string {
	bus, _, _ := strings.Cut(path, "/")
	return bus
}

// called is what the state of some devices is called, in every QEMU from 7.2 to 11.1.
var called = map[string]string{
	"virtio-net": "virtio-net", "virtio-blk": "virtio-blk", "virtio-scsi": "virtio-scsi",
	"virtio-balloon": "virtio-balloon", "virtio-rng": "virtio-rng", "virtio-serial": "virtio-console",
	"e1000": "e1000", "e1000e": "e1000e", "rtl8139": "rtl8139", "VGA": "vga", "cirrus-vga": "cirrus_vga",
	"nec-usb-xhci": "xhci", "qemu-xhci": "xhci", "ich9-ahci": "ich9_ahci", "intel-hda": "intel-hda",
	"ich9-intel-hda": "intel-hda", "pcie-root-port": "pcie-root-port", "pci-bridge": "pci_bridge",
}

// state is what a device's state is called; empty: not known.
func (n *node) state() string {
	kind := n.kind
	for _, s := range []string{"-pci", "-pci-transitional", "-pci-non-transitional"} {
		if k, ok := strings.CutSuffix(kind, s); ok {
			kind = k
			break
		}
	}
	return called[kind]
}

// most is how many devices are named in a message.
const most = 4

// devices compares the devices, as far as their sections' names say where they were.
func (c *check) devices() error {
	if len(c.saved.Sections) == 0 {
		return nil
	}
	text, err := qmp.HumanMonitor(c.ctx, c.x, "info qtree")
	if refused(err) {
		return nil
	}
	if err != nil {
		return err
	}
	t := newTree(parseTree(text))
	missing, changed := t.compare(c.savedPlaces())
	if missing != nil {
		c.doubt("devices are missing that were saved: %s (start it with those of the QEMU that was saved, and each where it was: addr=)", list(missing))
	}
	if changed != nil {
		c.doubt("other devices were saved: %s", list(changed))
	}
	if serial, have := c.instances("serial"), t.count("isa-serial"); strings.HasPrefix(c.saved.Machine, "pc-") && len(t.nodes) > 0 && have < serial {
		c.doubt("it has %s, and %d when it was saved (-serial)", count(have, "serial port"), serial)
	}
	if more := t.more(c.savedPlaces()); more != nil && missing == nil && changed == nil {
		c.warn("this QEMU has devices that were not saved, of which the guest knows nothing: %s", list(more))
	}
	return nil
}

// place is where a device was and what its state was called.
type place struct{ path, state string }

func (p place) String() string {
	at, child, _ := strings.Cut(p.path, "/")
	if pciPath.MatchString(at) {
		at = "PCI address " + address(at)
	}
	switch {
	case strings.Contains(child, ":"):
		at = fmt.Sprintf("SCSI %s of %s", child, at)
	case child != "":
		at = fmt.Sprintf("USB port %s of %s", child, at)
	}
	return p.state + " at " + at
}

// savedPlaces are the sections that name a place.
func (c *check) savedPlaces() (places []place) {
	for _, s := range c.saved.Sections {
		path := pciPath.FindString(s.Name)
		if path == "" {
			path = mmioPath.FindString(s.Name)
		}
		if path == "" {
			continue
		}
		rest := s.Name[len(path):]
		if m := childOf.FindString(rest); m != "" {
			path += strings.TrimSuffix(m, "/")
			rest = rest[len(m)-1:]
		}
		// More parts than are understood: the place of what is understood is compared.
		if state, ok := strings.CutPrefix(rest, "/"); ok && state != "" {
			places = append(places, place{path, state})
		}
	}
	return places
}

// compare names the places where this QEMU has nothing, and those where it has
// something else. Nothing is said of PCI if not one device is where it was: then the
// tree is not as it is taken to be here.
func (t *tree) compare(saved []place) (missing, changed []string) {
	somewhere := slices.ContainsFunc(saved, func(p place) bool { return t.at[p.path] != nil })
	if !somewhere {
		return nil, nil
	}
	named := make(map[string]bool)
	for _, p := range saved {
		if !t.pci && strings.HasPrefix(p.path, pciRoot) || named[p.path] {
			continue
		}
		n := t.at[p.path]
		switch {
		case n == nil:
			named[p.path] = true
			// What is on its bus is missing with it.
			if bus := onBus(p.path); bus == p.path || !named[bus] {
				missing = append(missing, p.String())
			}
		case known(p.state) && n.state() != "" && n.state() != p.state:
			named[p.path] = true
			changed = append(changed, fmt.Sprintf("%v, where this QEMU has %s", p, n.kind))
		}
	}
	return missing, changed
}

// known tells whether a state is one that is in called.
func known(state string) bool {
	for _, s := range called {
		if s == state {
			return true
		}
	}
	return false
}

// more names the devices, of those whose state is known, where nothing was saved.
func (t *tree) more(saved []place) (list []string) {
	if !t.pci {
		return nil
	}
	paths := make(map[string]bool)
	for _, p := range saved {
		paths[p.path], paths[onBus(p.path)] = true, true
	}
	for path, n := range t.at {
		if n.addr != "" && n.state() != "" && !paths[path] {
			list = append(list, fmt.Sprintf("%s at PCI address %s", n.kind, address(path)))
		}
	}
	slices.SortFunc(list, func(a, b string) int { return cmp.Compare(a, b) })
	return list
}

// count is how many devices there are of a type.
func (t *tree) count(kind string) (n int) {
	for _, d := range t.nodes {
		if d.kind == kind {
			n++
		}
	}
	return n
}

// list joins the first of many.
func list(names []string) string {
	if len(names) > most {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), len(names)-most)
	}
	return strings.Join(names, ", ")
}
