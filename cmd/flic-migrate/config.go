package main

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/BurntSushi/toml"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// keyAnnotation gives a flag another key than its name. It is for flags that
// mean something else in different commands, or that must not be set by
// accident: what makes rm remove everything is not what makes verify read
// everything.
const keyAnnotation = "flic-migrate/key"

// flagKey is a flag's key in the configuration file. It is "" for the flags that have none:
// the one that names the file, what one process tells another, and what is done once, on
// purpose. They say so with setKey, but for help, which cobra adds.
func flagKey(f *pflag.Flag) string {
	if k := f.Annotations[keyAnnotation]; len(k) == 1 {
		return k[0]
	}
	if f.Name == "help" {
		return ""
	}
	return f.Name
}

// envName is the environment variable of a key.
func envName(key string) string {
	return "FLIC_" + strings.ToUpper(strings.ReplaceAll(key, "-", "_"))
}

// setKey gives a flag a key of its own, or none: "".
func setKey(fs *pflag.FlagSet, flag, key string) {
	if err := fs.SetAnnotation(flag, keyAnnotation, []string{key}); err != nil {
		panic(err) // the flag does not exist: a mistake in this package
	}
}

// configure sets every flag of cmd that the command line has not from the
// environment or else from the configuration file. It is the only place that
// knows the order of precedence.
func (a *app) configure(cmd *cobra.Command) error {
	fromEnv := a.config == ""
	if fromEnv {
		a.config = os.Getenv("FLIC_CONFIG")
	}
	flags := knownFlags(cmd.Root())
	only := onlyFlags(cmd.Root(), flags)
	a.warnOfVariables(flags, only)
	file, err := readConfig(a.config, flags, only)
	if err != nil {
		// Nobody remembers a variable that was set long ago.
		if unread := (*fs.PathError)(nil); fromEnv && errors.As(err, &unread) {
			err = fmt.Errorf("FLIC_CONFIG: %w", err)
		}
		return err
	}
	typed, inEnv := namesQEMU(cmd.Flags())
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		key := flagKey(f)
		other := key == "qmp" || key == "domain" // than the QEMU that is named nearer
		if key == "" || f.Changed || err != nil || other && typed {
			return
		}
		value, source := os.Getenv(envName(key)), envName(key)
		if value == "" {
			if other && inEnv {
				return
			}
			v, ok := file.values[key]
			if !ok {
				return
			}
			value, source = fmt.Sprint(v), file.path+": "+key
		}
		// Not FlagSet.Set, whose errors speak of flags.
		if serr := f.Value.Set(value); serr != nil {
			err = fmt.Errorf("%s: %q: %w", source, value, serr)
		}
		f.Changed = true
		if a.sources == nil {
			a.sources = make(map[string]string)
		}
		a.sources[f.Name] = source
		delete(flags, key)
	})
	if err != nil || cmd == cmd.Root() { // which is save, or prints help
		return err
	}
	// What is wrong in the file is said by whichever verb reads it first, and not at night
	// by the one that needs it. The flags of other verbs can be set, as none of these runs;
	// the ones that have been set are this verb's, or belong to all.
	for _, key := range slices.Sorted(maps.Keys(file.values)) {
		if f, other := flags[key]; other && !f.Changed && cmd.Flags().Lookup(f.Name) != f {
			if serr := f.Value.Set(fmt.Sprint(file.values[key])); serr != nil {
				return fmt.Errorf("%s: %s: %q: %w", file.path, key, fmt.Sprint(file.values[key]), serr)
			}
		}
	}
	return nil
}

// namesQEMU tells whether the command line, and whether the environment, names the QEMU that
// a command is about, or those of a group: then one that is named further away is not meant,
// even if it is named in the other way.
func namesQEMU(fs *pflag.FlagSet) (typed, inEnv bool) {
	for _, name := range []string{"qmp", "domain", "group"} {
		f := fs.Lookup(name)
		if f == nil {
			continue
		}
		typed = typed || f.Changed && f.Value.String() != ""
		if key := flagKey(f); key != "" {
			inEnv = inEnv || os.Getenv(envName(key)) != ""
		}
	}
	return typed, inEnv
}

// warnOfVariables names variables whose names are almost those of settings: in the
// configuration file a misspelt key is an error, but the environment is not ours alone. only
// are the flags that can't be set there.
func (a *app) warnOfVariables(known map[string]*pflag.Flag, only map[string]bool) {
	plain := make(map[string]string)
	for flag := range only {
		plain[envName(flag)] = flag
	}
	names := []string{"FLIC_CONFIG"}
	for key := range known {
		names = append(names, envName(key))
	}
	slices.Sort(names)
	for _, line := range os.Environ() {
		name, value, _ := strings.Cut(line, "=")
		if !strings.HasPrefix(name, "FLIC_") || value == "" || slices.Contains(names, name) {
			continue
		}
		if flag := plain[name]; flag != "" {
			a.log().Warn("it has no effect, because this flag is given on the command line alone", "variable", name, "flag", "--"+flag)
			continue
		}
		if near := nearest(name, names); near != "" {
			a.log().Warn("no setting has this name, so it has no effect", "variable", name, "nearest", near)
		}
	}
}

// nearest is the name that name is probably meant to be: the one that takes the fewest
// changes of a letter, of about a third of the letters behind FLIC_ at most, the verb that stands
// there in some names left out if need be, or else one that goes on where name ends, or the
// other way round. It is empty if there is none.
func nearest(name string, names []string) (near string) {
	const own = "FLIC_"
	least := (len(strings.TrimPrefix(name, own))+2)/3 + 1
	for _, n := range names {
		if d := changes(name, n); d < least {
			least, near = d, n
		}
	}
	for _, n := range names {
		if _, bare, verb := strings.Cut(strings.TrimPrefix(n, own), "_"); verb {
			if d := changes(name, own+bare); d < least {
				least, near = d, n
			}
		}
	}
	for _, n := range names {
		if near == "" && (strings.HasPrefix(n, name+"_") || strings.HasPrefix(name, n+"_")) {
			near = n
		}
	}
	return near
}

// changes is how many letters have to be put in, taken out or replaced to make a into b
// (Levenshtein's distance).
func changes(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		last := row[0] // of the row before, one to the left
		row[0] = i + 1
		for j := range len(b) {
			replaced := last
			if a[i] != b[j] {
				replaced++
			}
			last = row[j+1]
			row[j+1] = min(replaced, last+1, row[j]+1)
		}
	}
	return row[len(b)]
}

// knownFlags are the flags of all commands by their keys, one of those that share a key:
// one file serves all commands.
func knownFlags(root *cobra.Command) map[string]*pflag.Flag {
	keys := make(map[string]*pflag.Flag)
	add := func(f *pflag.Flag) { keys[flagKey(f)] = f }
	root.PersistentFlags().VisitAll(add)
	for _, c := range commands(root) {
		if c.Name() != "completion" && c.Name() != "help" {
			c.LocalFlags().VisitAll(add)
		}
	}
	delete(keys, "")
	return keys
}

// onlyFlags are the names of the flags that can be given on the command line alone, unless
// known has a setting of that name: another verb's.
func onlyFlags(root *cobra.Command, known map[string]*pflag.Flag) map[string]bool {
	only := make(map[string]bool)
	for _, c := range append(commands(root), root) {
		c.LocalFlags().VisitAll(func(f *pflag.Flag) {
			if flagKey(f) == "" && f.Name != "help" && f.Name != "config" && known[f.Name] == nil {
				only[f.Name] = true
			}
		})
	}
	return only
}

type configFile struct {
	path   string
	values map[string]any
}

// maxConfig is the largest configuration file, in bytes. All keys there are come to
// some kilobytes.
const maxConfig = 1 << 20

// readConfig reads the named file, which must exist, or else the first of
// configPaths that does. A key it does not know is an error: a misspelt one, or that of a
// flag which is none (only), would otherwise be a setting that silently has no effect.
func readConfig(path string, known map[string]*pflag.Flag, only map[string]bool) (configFile, error) {
	paths := []string{path}
	if path == "" {
		paths = configPaths()
	}
	for _, p := range paths {
		f := configFile{path: p}
		b, err := vfs.ReadFile(vfs.OS, p, maxConfig)
		if p == os.DevNull {
			b, err = nil, nil // as one says that there is to be none
		}
		if errors.Is(err, fs.ErrNotExist) && path == "" {
			continue
		}
		if err != nil {
			return f, err
		}
		if _, err := toml.Decode(string(b), &f.values); err != nil {
			return f, fmt.Errorf("%s: %w", p, err)
		}
		for k, v := range f.values {
			if only[k] {
				return f, fmt.Errorf("%s: unknown key %q: --%s is given on the command line alone", p, k, k)
			}
			if known[k] == nil {
				return f, fmt.Errorf("%s: unknown key %q", p, k)
			}
			switch v.(type) {
			case string, int64, bool, float64:
			default:
				return f, fmt.Errorf("%s: key %q is neither a string, a number nor true or false", p, k)
			}
		}
		return f, nil
	}
	return configFile{}, nil
}

// configPaths are where the configuration file is looked for.
func configPaths() []string {
	var paths []string
	if dir, err := os.UserConfigDir(); err == nil {
		paths = append(paths, filepath.Join(dir, "flic-migrate", "config.toml"))
	}
	return append(paths, "/etc/flic-migrate.toml")
}

// defaultStore is the system's store for root and the user's own for others.
func defaultStore() string {
	if os.Geteuid() == 0 {
		return "/var/lib/flic-migrate"
	}
	dir := os.Getenv("XDG_DATA_HOME")
	if dir == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return "" // QEMU can run without a HOME; then --store is needed
		}
		dir = filepath.Join(home, ".local", "share")
	}
	return filepath.Join(dir, "flic-migrate")
}
