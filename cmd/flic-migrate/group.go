package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/flic-migrate/flic-migrate/qmp/session"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// groupFlags are those of the commands that work on the QEMUs of several VMs at once.
type groupFlags struct {
	name    string
	members string // a file
}

func (g *groupFlags) add(fs *pflag.FlagSet) {
	fs.StringVar(&g.name, "group", "", "name of a group: the arguments are its members, VM=SOCKET or VM=domain:DOMAIN")
	fs.StringVar(&g.members, "members", "", "--group: file with a member on each line, beside those that are arguments")
	setKey(fs, "group", "") // it is of one run
	setKey(fs, "members", "")
}

// args are the arguments that a command takes: one name, or with --group members.
func (g *groupFlags) args(cmd *cobra.Command, args []string) error {
	if !cmd.Flags().Changed("group") {
		if g.members != "" {
			return usageError{errors.New("--members goes with --group")}
		}
		return cobra.ExactArgs(1)(cmd, args)
	}
	if g.name == "" {
		return usageError{errors.New("--group needs a name")}
	}
	if g.members == "" {
		return cobra.MinimumNArgs(1)(cmd, args)
	}
	return nil
}

// domainPrefix begins the target of a member that is libvirt's.
const domainPrefix = "domain:"

// maxMembersFile is the largest file of members, in bytes: so many with long paths.
const maxMembersFile = 1 << 20

// list are the members of the arguments and of the file. connect is where libvirt is.
func (g *groupFlags) list(fsys vfs.FS, args []string, connect string) ([]session.Member, error) {
	if g.members != "" {
		b, err := vfs.ReadFile(fsys, g.members, maxMembersFile)
		if err != nil {
			return nil, err
		}
		lines := bufio.NewScanner(bytes.NewReader(b))
		for lines.Scan() {
			if line := strings.TrimSpace(lines.Text()); line != "" && !strings.HasPrefix(line, "#") {
				args = append(args, line)
			}
		}
		if err := lines.Err(); err != nil {
			return nil, err
		}
	}
	var members []session.Member
	seen := make(map[string]bool)
	for _, arg := range args {
		vm, target, ok := strings.Cut(arg, "=")
		if !ok || target == "" {
			return nil, usageError{fmt.Errorf("member %q: give it as VM=SOCKET or VM=domain:DOMAIN", arg)}
		}
		if err := store.CheckVM(vm); err != nil {
			return nil, err
		}
		if seen[vm] {
			return nil, usageError{fmt.Errorf("%s is in the group twice", vm)}
		}
		seen[vm] = true
		m := session.Member{VM: vm, Target: session.Target{QMP: target}}
		if domain, is := strings.CutPrefix(target, domainPrefix); is {
			m.Target = session.Target{Domain: domain, Connect: connect}
		}
		members = append(members, m)
	}
	if len(members) == 0 {
		return nil, usageError{errors.New("the group has no members")}
	}
	return members, nil
}

// groupFlag has the names that a command is given be those of groups.
func groupFlag(fs *pflag.FlagSet, group *bool) {
	fs.BoolVar(group, "group", false, "the names are those of groups")
	setKey(fs, "group", "")
}
