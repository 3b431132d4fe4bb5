package retention

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// Span is a stretch of time in a user's words: years, months and days as the calendar has
// them, and hours as a clock has.
type Span struct {
	Years, Months, Days int
	Clock               time.Duration
}

// ParseSpan reads restic's form, 1y5m7d2h, or Go's, 36h or 90m. A number of months stands
// between years and days, or beside one of them: 5m alone are minutes.
func ParseSpan(s string) (Span, error) {
	if d, err := time.ParseDuration(s); err == nil {
		return Span{Clock: d}, nil
	}
	var p Span
	fields := []struct {
		unit string
		n    *int
	}{{"y", &p.Years}, {"m", &p.Months}, {"d", &p.Days}}
	rest := s
	for _, f := range fields {
		num, behind, ok := strings.Cut(rest, f.unit)
		n, err := strconv.Atoi(num)
		if !ok || err != nil {
			continue // it is not there, or another unit is before it
		}
		if n < 0 || n > 10000 {
			return Span{}, fmt.Errorf("%q: from 0 to 10000 of %s", s, f.unit)
		}
		*f.n, rest = n, behind
	}
	if rest == s {
		return Span{}, fmt.Errorf("%q is no stretch of time, such as 36h or 1y5m7d2h", s)
	}
	if rest != "" {
		d, err := time.ParseDuration(rest)
		if err != nil || d < 0 {
			return Span{}, fmt.Errorf("%q is no stretch of time, such as 36h or 1y5m7d2h", s)
		}
		p.Clock = d
	}
	return p, nil
}

// String is the form that ParseSpan reads.
func (s Span) String() string {
	var b strings.Builder
	if s.Months > 0 && s.Years == 0 && s.Days == 0 {
		b.WriteString("0y") // months and not minutes
	}
	for _, f := range []struct {
		n    int
		unit string
	}{{s.Years, "y"}, {s.Months, "m"}, {s.Days, "d"}} {
		if f.n > 0 {
			fmt.Fprintf(&b, "%d%s", f.n, f.unit)
		}
	}
	if s.Clock != 0 || b.Len() == 0 {
		b.WriteString(s.Clock.String())
	}
	return b.String()
}

// positive tells whether it can be gone back by it.
func (s Span) positive() bool { return s.Years >= 0 && s.Months >= 0 && s.Days >= 0 && s.Clock >= 0 }

// before is the time so much before t, in t's zone.
func (s Span) before(t time.Time) time.Time {
	return t.AddDate(-s.Years, -s.Months, -s.Days).Add(-s.Clock)
}
