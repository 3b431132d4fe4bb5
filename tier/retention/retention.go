// Package retention says which of a VM's checkpoints to keep: the last few, and of
// older ones the newest of each hour, day, week, month or year. Words and rules are
// those of restic's forget, so that who knows one knows the other.
//
// It knows times and tags alone; package store removes, and the command puts both together.
package retention

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// All as a rule's count keeps one of each of its periods, without an end.
const All = -1

// Policy is a set of rules. A checkpoint that one of them keeps is kept. The zero value
// keeps nothing.
type Policy struct {
	Last    int // so many of the newest
	Hourly  int // the newest of each of the last so many hours that have any
	Daily   int
	Weekly  int // weeks as ISO 8601 has them: from Monday on
	Monthly int
	Yearly  int
	// Within keeps everything that is at most so much older than the newest.
	Within Span
	// Tags keeps what has all tags of one of these lists, and the newest. A list of one empty
	// tag stands for what has none.
	Tags [][]string
}

// Item is a checkpoint, as far as rules go.
type Item struct {
	Time time.Time
	Tags []string
}

// rule is one line of a policy: the newest of each period is kept, count times.
type rule struct {
	name   string
	count  int
	period func(i int, t time.Time) string
}

func (p Policy) rules() []rule {
	format := func(layout string) func(int, time.Time) string {
		return func(_ int, t time.Time) string { return t.Format(layout) }
	}
	return []rule{
		{"last", p.Last, func(i int, _ time.Time) string { return fmt.Sprint(i) }},
		{"hourly", p.Hourly, format("2006-01-02 15 -0700")}, // the hour that clocks put back has is another one
		{"daily", p.Daily, format("2006-01-02")},
		{"weekly", p.Weekly, func(_ int, t time.Time) string {
			year, week := t.ISOWeek()
			return fmt.Sprint(year, " ", week)
		}},
		{"monthly", p.Monthly, format("2006-01")},
		{"yearly", p.Yearly, format("2006")},
	}
}

// Check returns an error in a user's words for a policy that can't be meant: without
// rules, or with counts that are no counts.
func (p Policy) Check() error {
	some := p.Within != Span{} || len(p.Tags) > 0
	for _, r := range p.rules() {
		if r.count < All {
			return fmt.Errorf("keep-%s %d: must be a number, or %d for all", r.name, r.count, All)
		}
		some = some || r.count != 0
	}
	if !p.Within.positive() {
		return fmt.Errorf("keep-within %v: must be above 0", p.Within)
	}
	if !some {
		return fmt.Errorf("no rule says what to keep")
	}
	return nil
}

// Apply returns for each item, in their order, why it is kept: the names of the
// rules, such as "last" and "daily"; none means that it is not. Hours, days and weeks
// are those of the zone of now.
//
// items is in the order of the checkpoints' numbers, and the later is the newer, whatever
// the times are. By the times a clock that was put back would make the oldest of a
// checkpoint just saved, and saves that ran side by side, and copies, which have the time
// of what they copy, would remove the one that the VM's name alone stands for. Times that
// go back make a rule take its periods more than once: the newest is kept all the same,
// and no rule keeps more than its count.
//
// Where a rule has counts left when it has come to the oldest, it keeps that one as
// well: with few checkpoints the last daily one is not lost as soon as a day has two.
//
// Within is counted from the newest whose time is not behind now: one that was made while a
// clock was wrong would else have all others go. What is behind now is within, whatever it is.
//
// Tags alone keep the newest too, as "newest": no rule removes what the VM's name stands for.
func (p Policy) Apply(items []Item, now time.Time) [][]string {
	why := make([][]string, len(items))
	for _, r := range p.rules() {
		last, left := "", r.count
		for i, it := range slices.Backward(items) {
			if left == 0 {
				break
			}
			period := r.period(i, it.Time.In(now.Location()))
			if period == last && i > 0 {
				continue
			}
			why[i] = append(why[i], r.name)
			last = period
			if left > 0 {
				left--
			}
		}
	}
	if len(items) == 0 {
		return why
	}
	newest := len(items) - 1
	from := p.from(items, now)
	for i, it := range items {
		if (p.Within != Span{}) && !it.Time.Before(from) {
			why[i] = append(why[i], "within")
		}
		if slices.ContainsFunc(p.Tags, func(all []string) bool { return it.has(all) }) {
			why[i] = append(why[i], "tag")
		}
	}
	if len(p.Tags) > 0 && len(why[newest]) == 0 {
		why[newest] = append(why[newest], "newest")
	}
	return why
}

// from is the earliest time that is within.
func (p Policy) from(items []Item, now time.Time) time.Time {
	for _, it := range slices.Backward(items) {
		if !it.Time.After(now) {
			return p.Within.before(it.Time.In(now.Location()))
		}
	}
	return time.Time{} // nobody knows how old they are
}

func (it Item) has(all []string) bool {
	if len(all) == 1 && all[0] == "" {
		return len(it.Tags) == 0
	}
	for _, tag := range all {
		if !slices.Contains(it.Tags, tag) {
			return false
		}
	}
	return len(all) > 0
}

// String is the policy as a command line has it.
func (p Policy) String() string {
	var s []string
	for _, r := range p.rules() {
		if r.count != 0 {
			s = append(s, fmt.Sprintf("--keep-%s %d", r.name, r.count))
		}
	}
	if p.Within != (Span{}) {
		s = append(s, fmt.Sprintf("--keep-within %v", p.Within))
	}
	for _, all := range p.Tags {
		s = append(s, "--keep-tag "+strings.Join(all, ","))
	}
	return strings.Join(s, " ")
}
