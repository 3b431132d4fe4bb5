package preflight

import (
	"encoding/xml"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
)

// Domain tells, from the XML of a libvirt domain and the user whom its QEMU will run as,
// why that QEMU surely can't restore lazily; nil if nothing is known of that. It is for
// before libvirt starts it: if QEMU has to say so, libvirt ends it, and the domain is
// started a second time. Errors of the XML are libvirt's to find.
func Domain(text string, uid int) error {
	if err := Userfaultfd(uid); err != nil {
		return err
	}
	return domainMemory(text, memoryDir(qemuConf))
}

const (
	qemuConf = "/etc/libvirt/qemu.conf"
	// defaultMemoryDir is where libvirt puts the files that are domains' memory.
	defaultMemoryDir = "/var/lib/libvirt/qemu/ram"
)

var memoryDirLine = regexp.MustCompile(`(?m)^[ \t]*memory_backing_dir[ \t]*=[ \t]*["']([^"'\n]+)["']`)

// memoryDir is the directory of memory files, as libvirt's configuration has it.
func memoryDir(conf string) string {
	if b, err := os.ReadFile(conf); err == nil {
		if m := memoryDirLine.FindSubmatch(b); m != nil {
			return string(m[1])
		}
	}
	return defaultMemoryDir
}

// domainMemory looks at the memory that libvirt will give QEMU (src/qemu/qemu_command.c,
// qemuBuildMemoryBackendProps): huge pages first of all; a memfd if that is the source; a
// file if that is, or if whether memory is shared is said at all.
func domainMemory(text, dir string) error {
	var d struct {
		Backing struct {
			Huge   *struct{} `xml:"hugepages"`
			Source struct {
				Type string `xml:"type,attr"`
			} `xml:"source"`
			Access struct {
				Mode string `xml:"mode,attr"`
			} `xml:"access"`
		} `xml:"memoryBacking"`
		Cells []struct {
			Access string `xml:"memAccess,attr"`
		} `xml:"cpu>numa>cell"`
	}
	if xml.Unmarshal([]byte(text), &d) != nil {
		return nil
	}
	if d.Backing.Huge != nil {
		return errors.New("the domain's memory is of huge pages")
	}
	file := d.Backing.Access.Mode != ""
	for _, c := range d.Cells {
		file = file || c.Access != ""
	}
	switch d.Backing.Source.Type {
	case "memfd":
		return nil
	case "file":
		file = true
	}
	if !file {
		return nil
	}
	// libvirt makes it when it is needed.
	at := dir
	for at != "/" && at != "." {
		if _, err := os.Stat(at); !os.IsNotExist(err) {
			break
		}
		at = filepath.Dir(at)
	}
	if name, ok := servable(at); !ok {
		return fmt.Errorf("the domain's memory is a file in %s on %s, and userfaultfd serves only tmpfs and hugetlbfs (<source type='memfd'/> in its memoryBacking, or memory_backing_dir in qemu.conf)", dir, name)
	}
	return nil
}
