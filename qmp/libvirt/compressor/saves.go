package compressor

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/flic-migrate/flic-migrate/qmp/libvirt/saveimage"
)

// ImageMagic begins a flash image.
const ImageMagic = "FLICIMG\x00"

// ManagedSaves are the managed saves that hold flash images, which libvirt can't
// restore without this program.
func (s Setup) ManagedSaves() []string {
	names, _ := filepath.Glob(filepath.Join(s.path("var/lib/libvirt/qemu/save"), "*.save"))
	var ours []string
	for _, name := range names {
		if HoldsImage(name) {
			ours = append(ours, name)
		}
	}
	return ours
}

// HoldsImage tells whether a file is a save file of libvirt's with a flash image
// in it.
func HoldsImage(name string) bool {
	f, err := os.Open(name)
	if err != nil {
		return false
	}
	defer f.Close()
	if _, err := saveimage.Read(f); err != nil {
		return false
	}
	head, _, err := Peek(f, len(ImageMagic))
	return err == nil && string(head) == ImageMagic
}

// Daemon is a running libvirt daemon that runs compressors.
type Daemon struct {
	Name string
	PID  int
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
