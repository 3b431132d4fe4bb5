package main

import "github.com/spf13/cobra"

// verbGroups are the verbs by what one wants to do, as --help and docs/cli.md show them. Each
// verb is in one.
var verbGroups = []struct {
	title string
	verbs []string
}{
	{"Save a VM", []string{"checkpoint", "save", "track", "disarm"}},
	{"Bring it back", []string{"resume", "restore"}},
	{"See what there is", []string{"list", "show", "diff", "verify", "memory"}},
	{"Keep order", []string{"prune", "rm", "gc", "tag", "note"}},
	{"Move it, make it stand alone", []string{"copy", "send", "receive", "persist", "flatten", "absorb"}},
	{"Disks and libvirt", []string{"disk", "libvirt", "import", "export"}},
	{"This host, and streams", []string{"doctor", "dump", "replay", "version"}},
}

// groupVerbs puts the verbs below root into their groups. What cobra adds itself comes last.
func groupVerbs(root *cobra.Command) {
	for _, g := range verbGroups {
		root.AddGroup(&cobra.Group{ID: g.title, Title: g.title + ":"})
		for _, name := range g.verbs {
			for _, c := range root.Commands() {
				if c.Name() == name {
					c.GroupID = g.title
				}
			}
		}
	}
}
