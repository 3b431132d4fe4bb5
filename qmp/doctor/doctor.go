// Package doctor looks at all that flic-migrate needs of a host, and of a running QEMU,
// and says of each thing whether it is well and what to do if it is not. Nothing is
// changed: a store that is not there is not made, no file gets a name, no setting of a
// QEMU is touched.
//
//	host      userfaultfd for this user and for libvirt's QEMUs; QEMUs and their versions
//	store     place, space, what the file system can, leftovers, what can't be read
//	nvram     kind, DAX, volatile or lasting, room, what nobody owns
//	libvirt   what `libvirt install` makes, and whether the daemons see it
//	vm        what keeps a running QEMU from a checkpoint or a lazy resume
//
// Each check is a function that returns findings, in the order in which they are of use.
// What can't be found out is a finding too; no check ends another.
package doctor

import (
	"fmt"
	"slices"
)

// Level is how bad a finding is.
type Level string

const (
	OK      Level = "ok"
	Warning Level = "warning" // it works, but less well or less safely than it might
	Fault   Level = "fault"   // something does not work
)

// Finding is what was found of one thing. It is an element of the command's JSON document.
type Finding struct {
	Topic string `json:"topic"` // userfaultfd, qemu, store, nvram, libvirt or vm
	Level Level  `json:"level"`
	Text  string `json:"text"`             // what is so
	Do    string `json:"advice,omitempty"` // what to do about it, or to have more
	// Err is the error behind a fault, by which the command takes its exit code; nil: it
	// is none of any program's.
	Err error `json:"-"`
}

// report collects the findings on one topic.
type report struct {
	topic string
	list  []Finding
}

func (r *report) add(level Level, do, format string, a ...any) {
	r.list = append(r.list, Finding{Topic: r.topic, Level: level, Text: fmt.Sprintf(format, a...), Do: do})
}

func (r *report) ok(format string, a ...any)        { r.add(OK, "", format, a...) }
func (r *report) warn(do, format string, a ...any)  { r.add(Warning, do, format, a...) }
func (r *report) fault(do, format string, a ...any) { r.add(Fault, do, format, a...) }
func (r *report) failed(err error, do, format string) {
	r.add(Fault, do, format+": %v", err)
	r.list[len(r.list)-1].Err = err
}

// Count is how many findings are of a level.
func Count(list []Finding, level Level) (n int) {
	for _, f := range list {
		if f.Level == level {
			n++
		}
	}
	return n
}

// Error is the first error behind a fault that has one, and nil if none has.
func Error(list []Finding) error {
	if i := slices.IndexFunc(list, func(f Finding) bool { return f.Level == Fault && f.Err != nil }); i >= 0 {
		return list[i].Err
	}
	return nil
}

// human is a size in bytes as people read it.
func human(n int64) string {
	v, i := float64(n), 0
	for v >= 1023.95 && i < len("BKMGT")-1 {
		v /= 1 << 10
		i++
	}
	if i == 0 {
		return fmt.Sprintf("%d B", n)
	}
	return fmt.Sprintf("%.1f %ciB", v, "BKMGT"[i])
}
