package compressor

import (
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/flic-migrate/flic-migrate/qmp/libvirt/saveimage"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// ImageMagic begins a flash image.
const ImageMagic = "FLICIMG\x00"

// Save is a save file of libvirt's that is not in use now.
type Save struct {
	Path   string
	Format saveimage.Format
	Ours   bool // it holds a flash image, which libvirt can't restore without this program
}

// Where libvirt's system daemon keeps managed saves, and what it knows of snapshots,
// a directory a domain.
const (
	managedDir  = "var/lib/libvirt/qemu/save"
	snapshotDir = "var/lib/libvirt/qemu/snapshot"
)

// Saves are those that libvirt knows of: managed saves, and the memory of snapshots.
// Of files that virsh save has written it knows nothing.
func (s Setup) Saves() (list []Save) {
	names, _ := filepath.Glob(filepath.Join(s.path(managedDir), "*.save"))
	snapshots, _ := filepath.Glob(filepath.Join(s.path(snapshotDir), "*", "*.xml"))
	for _, snapshot := range snapshots {
		if memory := memoryFile(snapshot); memory != "" {
			names = append(names, s.path(memory))
		}
	}
	for _, name := range names {
		if save, ok := look(name); ok {
			list = append(list, save)
		}
	}
	return list
}

// memoryFile is the save file of an external snapshot, or nothing.
func memoryFile(snapshot string) string {
	f, err := vfs.OpenPlain(snapshot)
	if err != nil {
		return ""
	}
	defer f.Close()
	var d struct {
		XMLName xml.Name `xml:"domainsnapshot"`
		Memory  struct {
			File string `xml:"file,attr"`
		} `xml:"memory"`
	}
	if xml.NewDecoder(io.LimitReader(f, saveimage.MaxData)).Decode(&d) != nil || !filepath.IsAbs(d.Memory.File) {
		return ""
	}
	return d.Memory.File
}

// look reads a save file's header.
func look(name string) (Save, bool) {
	f, err := vfs.OpenPlain(name)
	if err != nil {
		return Save{}, false
	}
	defer f.Close()
	h, err := saveimage.Read(f)
	if err != nil {
		return Save{}, false
	}
	head, _, err := Peek(f, len(ImageMagic))
	return Save{name, h.Format, err == nil && string(head) == ImageMagic}, true
}

// Daemon is a running libvirt daemon that runs compressors.
type Daemon struct {
	Name string
	PID  int
	UID  int  // its user; another than root is one of qemu:///session
	Ours bool // it finds this program first
}

// Daemons are those that run on this machine, as far as this process may see.
func (s Setup) Daemons() (list []Daemon) {
	entries, err := os.ReadDir(string(system))
	if err != nil {
		return nil
	}
	for _, e := range entries {
		var d Daemon
		if n, err := fmt.Sscanf(e.Name(), "%d", &d.PID); n != 1 || err != nil {
			continue
		}
		args := system.cmdline(d.PID)
		d.Name = filepath.Base(args0(args))
		if d.Name != "libvirtd" && d.Name != "virtqemud" {
			continue
		}
		if fi, err := e.Info(); err == nil {
			d.UID = int(fi.Sys().(*syscall.Stat_t).Uid)
		}
		env, err := os.ReadFile(filepath.Join(string(system), e.Name(), "environ"))
		if errors.Is(err, os.ErrPermission) {
			continue
		}
		for _, v := range strings.Split(string(env), "\x00") {
			if path, ok := strings.CutPrefix(v, "PATH="); ok {
				first, _, _ := strings.Cut(path, ":")
				d.Ours = filepath.Clean(first) == s.PathDir()
			}
		}
		list = append(list, d)
	}
	return list
}

func args0(args []string) string {
	if len(args) == 0 {
		return ""
	}
	return args[0]
}
