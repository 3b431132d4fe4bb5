package main

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/flic-migrate/flic-migrate/qmp/libvirt/domain"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
)

// completeTime is how long who presses Tab waits at most.
const completeTime = 2 * time.Second

// completer names what begins like what has been typed.
type completer func(a *app, ctx context.Context, c *cobra.Command, typed string) []string

// complete has shells complete the arguments of all commands as their usage has them, and
// the values of their flags.
func (a *app) complete(root *cobra.Command) {
	for _, c := range commands(root) {
		kinds, more := argumentsOf(c.Use)
		c.ValidArgsFunction = func(c *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
			kind := ""
			if n := len(args); n < len(kinds) {
				kind = kinds[n]
			} else if more {
				kind = kinds[len(kinds)-1]
			}
			if kind == "FILE" {
				return nil, cobra.ShellCompDirectiveDefault
			}
			fn := completers[kind]
			if f := c.Flags().Lookup("group"); f != nil && f.Value.String() == "true" && (kind == "CHECKPOINT" || kind == "VM") {
				fn = groups
			}
			return a.names(fn, c, typed)
		}
		c.LocalNonPersistentFlags().VisitAll(func(f *pflag.Flag) {
			fn := completerOf(f)
			if fn == nil {
				return
			}
			err := c.RegisterFlagCompletionFunc(f.Name, func(c *cobra.Command, _ []string, typed string) ([]string, cobra.ShellCompDirective) {
				return a.names(fn, c, typed)
			})
			if err != nil {
				panic(err) // the flag is there, and nobody else does this
			}
		})
	}
}

// names asks a completer, whose settings are those that the command would have. What can't
// be found out is not worth a word here.
func (a *app) names(fn completer, c *cobra.Command, typed string) (list []string, _ cobra.ShellCompDirective) {
	if fn != nil && a.configure(c) == nil {
		ctx, cancel := context.WithTimeout(c.Context(), completeTime)
		defer cancel()
		list = fn(a, ctx, c, typed)
	}
	return slices.DeleteFunc(list, func(s string) bool { return !strings.HasPrefix(s, typed) }),
		cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveKeepOrder
}

// argumentsOf reads the kinds of a command's arguments off its usage, and whether more of
// the last kind may follow:
//
//	NAME[@N], NAME@N   CHECKPOINT
//	NAME               VM
//	FILE, STREAM       FILE
//
// A flag that stands there, and its value, are none, and what follows < or > is the shell's.
func argumentsOf(use string) (kinds []string, more bool) {
	use, _, _ = strings.Cut(use, "\n")
	skip := true // the command's own name
	for _, word := range strings.Fields(use) {
		word = strings.TrimLeft(word, "[{(")
		name := strings.TrimRight(word, "]}).")
		switch {
		case word == "<" || word == ">":
			return kinds, more
		case strings.HasPrefix(word, "-"):
			skip = name == word // else a bracket closes behind it
		case skip:
			skip = false
		case word == "|" || name == "flags":
		case more:
		default:
			kind := name
			switch {
			case strings.HasPrefix(name, "NAME[@"), strings.HasPrefix(name, "NAME@"):
				kind = "CHECKPOINT"
			case name == "NAME":
				kind = "VM"
			case strings.HasPrefix(name, "FILE"), name == "STREAM":
				kind = "FILE"
			}
			kinds, more = append(kinds, kind), strings.Contains(word, "...")
		}
	}
	return kinds, more
}

var completers = map[string]completer{"CHECKPOINT": checkpoints, "VM": vms, "TAG": tags}

// values completes one of some words; without any it keeps files from being offered.
func values(words ...string) completer {
	return func(*app, context.Context, *cobra.Command, string) []string { return slices.Clone(words) }
}

// completerOf is what completes a flag's value; nil: files do.
func completerOf(f *pflag.Flag) completer {
	if ch, ok := f.Value.(*choice); ok {
		return values(ch.choices...)
	}
	switch f.Name {
	case "trust-domain":
		return trustDomains
	case "keep-tag":
		return tags
	case "connect":
		return values("qemu:///system", "qemu:///session")
	case "timer", "interval":
		return values("auto")
	case "as", "guest-run", "ssh":
		return values()
	case "vm":
		return vms
	case "domain":
		return domains
	case "group":
		if f.Value.Type() == "string" {
			return groups
		}
	case "parent":
		return func(a *app, ctx context.Context, c *cobra.Command, typed string) []string {
			return append([]string{save.ParentAuto, save.ParentNone}, checkpoints(a, ctx, c, typed)...)
		}
	}
	switch f.Value.Type() {
	case "size", "n", "int", "duration", "float64":
		return values()
	}
	return nil
}

// vms names the VMs in the store.
func vms(a *app, ctx context.Context, _ *cobra.Command, _ string) []string {
	st, err := a.openStore(ctx, false)
	if err != nil {
		return nil
	}
	list, _ := st.VMs(ctx)
	return list
}

// checkpoints names the VMs, and when only one of them can be meant its checkpoints, the
// newest first: all of all would be too many to choose from.
func checkpoints(a *app, ctx context.Context, c *cobra.Command, typed string) []string {
	list := vms(a, ctx, c, typed)
	vm, _, at := strings.Cut(typed, "@")
	if !at {
		list = slices.DeleteFunc(list, func(s string) bool { return !strings.HasPrefix(s, typed) })
		if len(list) != 1 {
			return list
		}
		vm = list[0]
	} else {
		list = nil
	}
	st, err := a.openStore(ctx, false)
	if err != nil || store.CheckVM(vm) != nil {
		return list
	}
	refs, _ := st.List(ctx, vm)
	for _, r := range slices.Backward(refs) {
		list = append(list, r.String())
	}
	return list
}

// groups names the groups, each name before those with numbers, the newest first.
func groups(a *app, ctx context.Context, _ *cobra.Command, _ string) (list []string) {
	st, err := a.openStore(ctx, false)
	if err != nil {
		return nil
	}
	all, _ := st.Groups(ctx, "")
	at := 0 // behind the last name
	for i, g := range all {
		if i == 0 || g.Name != all[i-1].Name {
			list = append(list, g.Name)
			at = len(list)
		}
		list = slices.Insert(list, at, g.Ref().String())
	}
	return list
}

// listed describes what is in the store.
func listed(a *app, ctx context.Context) []store.Listed {
	st, err := a.openStore(ctx, false)
	if err != nil {
		return nil
	}
	list, _ := st.Identities(ctx, "")
	return list
}

// tags names those that checkpoints have.
func tags(a *app, ctx context.Context, _ *cobra.Command, _ string) (names []string) {
	for _, l := range listed(a, ctx) {
		names = append(names, l.Label.Tags...)
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// trustDomains names those that checkpoints are in, and the one that VMs begin in.
func trustDomains(a *app, ctx context.Context, _ *cobra.Command, _ string) []string {
	names := []string{store.DefaultDomain}
	for _, l := range listed(a, ctx) {
		if l.Identity != nil && l.Identity.TrustDomain != "" {
			names = append(names, l.Identity.TrustDomain)
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// domains names libvirt's, of the daemon that --connect names.
func domains(_ *app, ctx context.Context, c *cobra.Command, _ string) []string {
	uri := ""
	if f := c.Flags().Lookup("connect"); f != nil {
		uri = f.Value.String()
	}
	list, _ := domain.Names(ctx, uri)
	return list
}

// bashScript is cobra's script for bash, which knows that bash ends a word at : and =. It
// does at @, too, which stands in the names of checkpoints.
func bashScript(root *cobra.Command, descriptions bool) ([]byte, error) {
	var b bytes.Buffer
	if err := root.GenBashCompletionV2(&b, descriptions); err != nil {
		return nil, err
	}
	text := b.String()
	for _, change := range [][2]string{
		{"init_completion -n =:", "init_completion -n =:@"},
		{"handle_special_char \"$cur\" =\n", "handle_special_char \"$cur\" =\n    __" + root.Name() + "_handle_special_char \"$cur\" @\n"},
	} {
		if !strings.Contains(text, change[0]) {
			return nil, fmt.Errorf("cobra's script for bash has no %q any more", change[0])
		}
		text = strings.ReplaceAll(text, change[0], change[1])
	}
	return []byte(text), nil
}
