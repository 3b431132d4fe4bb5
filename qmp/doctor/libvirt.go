package doctor

import (
	"os"
	"path/filepath"

	"github.com/flic-migrate/flic-migrate/qmp/libvirt/compressor"
	"github.com/flic-migrate/flic-migrate/qmp/libvirt/saveimage"
)

const install = "flic-migrate libvirt install"

// Libvirt looks at what `libvirt install` makes, and at the daemons that run.
func Libvirt(s compressor.Setup) []Finding {
	r := report{topic: "libvirt"}
	if !hasLibvirt(s.Root) && len(s.Daemons()) == 0 {
		r.ok("there is no libvirt here")
		return r.list
	}
	steps, err := s.Steps()
	if err != nil {
		r.failed(err, "", "its configuration can't be looked at")
		return r.list
	}
	done := 0
	for _, step := range steps {
		if step.Done {
			done++
		}
	}
	// qemu.conf may name a compressor without us: the links are what is ours alone.
	if !steps[0].Done {
		r.add(OK, "if virsh save is to go through flic-migrate: "+install, "virsh save and managedsave do not go through flic-migrate; --domain works without that")
	} else if done == len(steps) {
		r.ok("virsh save and managedsave are set up to go through flic-migrate")
	}
	for _, step := range steps {
		switch {
		case step.Conflict != nil && steps[0].Done:
			r.fault(install+" --replace, if it is a line of qemu.conf", "%v", step.Conflict)
		case step.Conflict != nil:
			r.warn("see "+install+" --dry-run", "it could not be set up: %v", step.Conflict)
		case !step.Done && steps[0].Done:
			r.fault(install, "not in place: %s: %s", step.Path, step.What)
		}
	}
	if steps[0].Done {
		r.running(s)
	}
	for _, save := range s.Saves() {
		if steps[0].Done && save.Format == saveimage.Sparse {
			r.warn("save_image_format in qemu.conf, or virsh save --image-format lzop", "%s was written past flic-migrate: its format is sparse, which QEMU writes itself", save.Path)
		}
	}
	return r.list
}

// running tells whether the daemons find the program and may execute it.
func (r *report) running(s compressor.Setup) {
	for _, c := range s.Confinements() {
		switch {
		case !c.Known:
			r.warn("ask again as root", "AppArmor's profile %s (%s): it can't be told whether it lets the daemon execute %s", c.Profile, c.Mode, s.Program)
		case !c.Allowed:
			r.fault(install, "AppArmor's profile %s (%s) does not let the daemon execute %s: virsh save is a broken pipe", c.Profile, c.Mode, s.Program)
		default:
			r.ok("AppArmor's profile %s (%s) lets the daemon execute %s", c.Profile, c.Mode, s.Program)
		}
	}
	if label, enforces := s.SELinux(); enforces {
		r.warn("libvirt's daemon may execute what is labelled bin_t", "SELinux enforces its policy, and the label of %s is %q", s.Program, label)
	}
	for _, d := range s.Daemons() {
		switch {
		case d.Ours:
			r.ok("%s (process %d) finds flic-migrate first", d.Name, d.PID)
		case d.UID == 0:
			r.fault("systemctl daemon-reload && systemctl try-restart "+d.Name, "%s (process %d) does not find flic-migrate first: it was started before, or its PATH has not %s", d.Name, d.PID, s.PathDir())
		}
	}
}

// hasLibvirt tells whether libvirt's QEMU driver is installed below root.
func hasLibvirt(root string) bool {
	for _, name := range []string{"usr/sbin/libvirtd", "usr/sbin/virtqemud", "usr/bin/virtqemud"} {
		if _, err := os.Stat(filepath.Join(root, name)); err == nil {
			return true
		}
	}
	return false
}
