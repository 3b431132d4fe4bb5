package preflight

import (
	"regexp"
	"strconv"
	"strings"
)

// version is a machine type's or a QEMU's, two numbers. QEMU has three releases a
// year: .0, .1 and .2.
type version struct{ major, minor int }

func (v version) String() string { return strconv.Itoa(v.major) + "." + strconv.Itoa(v.minor) }

// release numbers the releases since 0.0.
func (v version) release() int { return 3*v.major + min(v.minor, 2) }

// typeVersion is at the end of the name of a machine type that has one: pc-q35-7.2,
// pc-i440fx-4.0.1.
var typeVersion = regexp.MustCompile(`-(\d{1,3})\.(\d{1,3})(?:\.\d+)?$`)

func machineVersion(machine string) (v version, ok bool) {
	m := typeVersion.FindStringSubmatch(machine)
	if m == nil {
		return v, false
	}
	v.major, _ = strconv.Atoi(m[1])
	v.minor, _ = strconv.Atoi(m[2])
	return v, true
}

// dropped is the first QEMU without a machine type: those of six years are deleted, from
// 10.1 on (MACHINE_VER_DELETION_MAJOR in QEMU's include/hw/boards.h; QEMU 11.1 has
// pc-q35-5.2 and no older one).
func (v version) dropped() version {
	d := version{v.major + 6, v.minor}
	if first := (version{10, 1}); d.release() < first.release() {
		return first
	}
	return d
}

const (
	// deprecatedYears is the age, in major versions, from which on QEMU says of a
	// machine type that it is deprecated.
	deprecatedYears = 3
	// soon is how many releases before its end a machine type is worth a word: a year.
	soon = 3
)

// machine compares machine types, which QEMU does first of all, and says when this one
// is about to be of the past: a checkpoint is bound to its machine type.
func (c *check) machine() error {
	want := c.saved.Machine
	if want == "" {
		return nil
	}
	var typ string
	if err := c.x.Execute(c.ctx, "qom-get", map[string]any{"path": "/machine", "property": "type"}, &typ); err != nil {
		return err
	}
	have := strings.TrimSuffix(typ, "-machine")
	of, versioned := machineVersion(want)
	if have == want && (!versioned || c.o.Version.QEMU.Major < of.major+deprecatedYears) {
		return nil
	}
	var types []struct {
		Name       string `json:"name"`
		Alias      string `json:"alias"`
		Deprecated bool   `json:"deprecated"`
	}
	answered, err := c.ask("query-machines", nil, &types)
	if err != nil {
		return err
	}
	known, deprecated := false, false
	for _, t := range types {
		if t.Name == want || t.Alias == want {
			known, deprecated = true, t.Deprecated
		}
	}
	qemu := version{c.o.Version.QEMU.Major, c.o.Version.QEMU.Minor}
	switch {
	case have != want && (known || !answered):
		c.refuse("machine type %s was saved, this is %s (use -machine %s)", want, have, want)
	case have != want && !versioned:
		c.refuse("machine type %s was saved, this is %s, and this QEMU, %v, has none of that name", want, have, qemu)
	case have != want && of.release() > qemu.release():
		c.refuse("machine type %s was saved, this is %s, and this QEMU, %v, is too old for that: use QEMU %v or later", want, have, qemu, of)
	case have != want:
		c.refuse("machine type %s was saved, this is %s, and this QEMU, %v, no longer has it: use one from %v on and before %v", want, have, qemu, of, of.dropped())
	case deprecated && of.dropped().release()-qemu.release() <= soon:
		c.warn("the machine type %s is about to be dropped: QEMU %v is not to have it, and this is %v. "+
			"A checkpoint can't be resumed with another machine type: keep a QEMU that has it, or let the guest shut down, and start it with a newer type", want, of.dropped(), qemu)
	}
	return nil
}
