package retention

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"
)

func at(s string) time.Time {
	t, err := time.Parse("2006-01-02 15:04", s)
	if err != nil {
		panic(err)
	}
	return t
}

// later is a time behind those of the tests.
var later = at("2030-01-01 00:00")

// items are untagged checkpoints of these times.
func items(times []time.Time) (list []Item) {
	for _, t := range times {
		list = append(list, Item{Time: t})
	}
	return list
}

// What has all tags of one list is kept, and the newest in any case.
func TestTags(t *testing.T) {
	list := []Item{{Tags: []string{"a", "b"}}, {Tags: []string{"a"}}, {Tags: []string{"c"}}, {}, {}}
	for _, c := range []struct {
		p    Policy
		want string
	}{
		{Policy{Tags: [][]string{{"a"}}}, "[[tag] [tag] [] [] [newest]]"},
		{Policy{Tags: [][]string{{"a", "b"}}}, "[[tag] [] [] [] [newest]]"},
		{Policy{Tags: [][]string{{"b"}, {"c"}}}, "[[tag] [] [tag] [] [newest]]"},
		{Policy{Tags: [][]string{{"nobody"}}}, "[[] [] [] [] [newest]]"},
		{Policy{Tags: [][]string{{}}}, "[[] [] [] [] [newest]]"},
		{Policy{Tags: [][]string{{""}}}, "[[] [] [] [tag] [tag]]"},
		{Policy{Tags: [][]string{{"c"}}, Last: 2}, "[[] [] [tag] [last] [last]]"},
	} {
		if err := c.p.Check(); err != nil {
			t.Error(err)
		}
		if got := fmt.Sprint(c.p.Apply(list, later)); got != c.want {
			t.Errorf("%v: %s, want %s", c.p, got, c.want)
		}
	}
	if got := (Policy{Tags: [][]string{{"a", "b"}, {"c"}}}).String(); got != "--keep-tag a,b --keep-tag c" {
		t.Error(got)
	}
}

func TestApply(t *testing.T) {
	times := []time.Time{
		at("2024-12-30 09:00"), // Monday of the first week of 2025
		at("2025-01-01 10:00"),
		at("2025-01-05 23:59"), // Sunday
		at("2025-01-06 00:00"), // Monday
		at("2025-01-06 08:10"),
		at("2025-01-06 08:50"),
		at("2025-01-06 09:05"),
	}
	for _, c := range []struct {
		p    Policy
		want string // a letter for each that is kept, a dot for the others
	}{
		{Policy{}, "......."},
		{Policy{Last: 1}, "......k"},
		{Policy{Last: 3}, "....kkk"},
		{Policy{Last: 99}, "kkkkkkk"},
		{Policy{Last: All}, "kkkkkkk"},
		{Policy{Hourly: 2}, ".....kk"},
		{Policy{Hourly: 3}, "...k.kk"},
		{Policy{Daily: 1}, "......k"},
		{Policy{Daily: 2}, "..k...k"},
		{Policy{Daily: All}, "kkk...k"},
		{Policy{Weekly: 1}, "......k"},
		{Policy{Weekly: 2}, "..k...k"},
		{Policy{Weekly: 3}, "k.k...k"}, // the oldest, though its week has one
		{Policy{Monthly: 2}, "k.....k"},
		{Policy{Yearly: 1}, "......k"},
		{Policy{Yearly: 5}, "k.....k"},
		{Policy{Last: 2, Daily: 2}, "..k..kk"},
		{Policy{Within: Span{}}, "......."},
		{Policy{Within: Span{Days: 1}}, "..kkkkk"},
		{Policy{Within: Span{Days: 5}}, ".kkkkkk"},
		{Policy{Within: Span{Clock: 55 * time.Minute}}, "....kkk"},
		{Policy{Within: Span{Clock: 9*time.Hour + 5*time.Minute}}, "...kkkk"},
	} {
		var got strings.Builder
		for _, why := range c.p.Apply(items(times), later) {
			if len(why) > 0 {
				got.WriteByte('k')
			} else {
				got.WriteByte('.')
			}
		}
		if got.String() != c.want {
			t.Errorf("%v: %s, want %s", c.p, got.String(), c.want)
		}
	}
	if got := fmt.Sprint(Policy{Last: 1, Daily: 2, Within: Span{Clock: time.Hour}}.Apply(items(times[5:]), later)); got != "[[daily within] [last daily within]]" {
		t.Errorf("reasons: %s", got)
	}
}

// A day is the user's, and an hour that clocks put back repeat is two.
func TestZone(t *testing.T) {
	berlin, err := time.LoadLocation("Europe/Berlin")
	if err != nil {
		t.Fatal(err)
	}
	late := []time.Time{at("2025-06-01 21:30"), at("2025-06-01 22:30"), at("2025-06-01 23:30")}
	if got := fmt.Sprint(Policy{Daily: 2}.Apply(items(late), later)); got != "[[daily] [] [daily]]" {
		t.Errorf("UTC: %s", got)
	}
	if got := fmt.Sprint(Policy{Daily: 1}.Apply(items(late[1:]), later.In(berlin))); got != "[[] [daily]]" {
		t.Errorf("Berlin: %s", got)
	}
	back := []time.Time{at("2025-10-25 23:10"), at("2025-10-26 00:10"), at("2025-10-26 01:10"), at("2025-10-26 02:10")}
	if got := fmt.Sprint(Policy{Hourly: 3}.Apply(items(back), later.In(berlin))); got != "[[] [hourly] [hourly] [hourly]]" {
		t.Errorf("clocks put back: %s", got)
	}
}

// A clock that was put back, saves side by side and copies of old checkpoints do not make
// the one with the highest number the first to go.
func TestTimesGoBack(t *testing.T) {
	times := []time.Time{at("2026-03-02 10:00"), at("2026-03-03 10:00"), at("2026-03-03 10:01"), at("2026-03-01 09:00")}
	for _, c := range []struct {
		p    Policy
		want string
	}{
		{Policy{Last: 1}, "[[] [] [] [last]]"},
		{Policy{Last: 2}, "[[] [] [last] [last]]"},
		{Policy{Daily: 2}, "[[] [] [daily] [daily]]"},
		{Policy{Yearly: 1}, "[[] [] [] [yearly]]"},
		{Policy{Within: Span{Clock: time.Hour}}, "[[within] [within] [within] [within]]"}, // none is older
	} {
		if got := fmt.Sprint(c.p.Apply(items(times), later)); got != c.want {
			t.Errorf("%v: %s, want %s", c.p, got, c.want)
		}
	}
}

// Whatever the times and their order: what a smaller policy keeps a larger one keeps,
// a rule keeps no more than it says, and the newest is kept by every rule.
func TestAnyTimes(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 1))
	for range 2000 {
		times := make([]time.Time, 1+r.IntN(40))
		newest := len(times) - 1 // by its number, and not by its time
		for i := range times {
			times[i] = at("2025-01-01 00:00").Add(time.Duration(r.IntN(60*24*200)) * time.Minute)
		}
		n := 1 + r.IntN(10)
		p := []Policy{{Last: n}, {Hourly: n}, {Daily: n}, {Weekly: n}, {Monthly: n}, {Yearly: n}}[r.IntN(6)]
		more := p
		more.Daily++
		more.Within.Clock = time.Duration(r.IntN(1000)) * time.Hour
		kept := 0
		large := more.Apply(items(times), later)
		for i, why := range p.Apply(items(times), later) {
			if len(why) > 0 {
				kept++
				if len(large[i]) == 0 {
					t.Fatalf("%v keeps %v, and %v does not", p, times[i], more)
				}
			} else if i == newest {
				t.Fatalf("%v does not keep the newest", p)
			}
		}
		if kept > n {
			t.Fatalf("%v keeps %d", p, kept)
		}
	}
}

// What was made while a clock was wrong does not have the others go, and stays.
func TestFuture(t *testing.T) {
	now := at("2026-03-10 12:00")
	times := []time.Time{at("2026-03-01 10:00"), at("2026-03-09 10:00"), at("2026-03-10 10:00"), at("2036-01-01 00:00"), at("2026-03-10 11:00")}
	for _, c := range []struct {
		n    int
		p    Policy
		want string
	}{
		{5, Policy{Within: Span{Days: 2}}, "[[] [within] [within] [within] [within]]"},
		{4, Policy{Within: Span{Days: 2}}, "[[] [within] [within] [within]]"},
		{4, Policy{Within: Span{Clock: 24 * time.Hour}}, "[[] [within] [within] [within]]"},
		{4, Policy{Last: 1, Within: Span{Clock: time.Hour}}, "[[] [] [within] [last within]]"},
	} {
		if got := fmt.Sprint(c.p.Apply(items(times[:c.n]), now)); got != c.want {
			t.Errorf("%v: %s, want %s", c.p, got, c.want)
		}
	}
	// All of them: nobody knows how old they are.
	if got := fmt.Sprint(Policy{Within: Span{Clock: time.Hour}}.Apply(items(times), at("2020-01-01 00:00"))); got != "[[within] [within] [within] [within] [within]]" {
		t.Error(got)
	}
}

// TestPeriods compares each rule, over random times in zones that put clocks forward and back,
// with what it says: of the last so many periods that have any, the newest of each; and the
// oldest of all, if there are fewer periods.
func TestPeriods(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 5))
	for _, zone := range []string{"Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Africa/Casablanca", "UTC"} {
		in, err := time.LoadLocation(zone)
		if err != nil {
			t.Fatal(err)
		}
		for range 400 {
			// Around a change of clocks more than elsewhere.
			begin := []time.Time{at("2025-03-29 12:00"), at("2025-10-25 12:00"), at("2025-04-05 06:00"), at("2024-12-20 00:00")}[r.IntN(4)]
			span := []int{60 * 30, 60 * 24 * 40, 60 * 24 * 900}[r.IntN(3)]
			times := make([]time.Time, 1+r.IntN(60))
			for i := range times {
				times[i] = begin.Add(time.Duration(r.IntN(span)) * time.Minute)
			}
			slices.SortFunc(times, time.Time.Compare)
			n := 1 + r.IntN(8)
			for name, c := range map[string]struct {
				p      Policy
				period func(t time.Time) [4]int
			}{
				"hourly": {Policy{Hourly: n}, func(t time.Time) [4]int {
					_, zone := t.Zone()
					return [4]int{t.Year(), t.YearDay(), t.Hour(), zone}
				}},
				"daily":   {Policy{Daily: n}, func(t time.Time) [4]int { return [4]int{t.Year(), t.YearDay()} }},
				"weekly":  {Policy{Weekly: n}, func(t time.Time) [4]int { y, w := t.ISOWeek(); return [4]int{y, w} }},
				"monthly": {Policy{Monthly: n}, func(t time.Time) [4]int { return [4]int{t.Year(), int(t.Month())} }},
				"yearly":  {Policy{Yearly: n}, func(t time.Time) [4]int { return [4]int{t.Year()} }},
			} {
				newest := make(map[[4]int]int) // of each period
				for i, at := range times {
					newest[c.period(at.In(in))] = i
				}
				want := slices.Sorted(maps.Values(newest))
				fewer := len(want) < n
				want = want[max(0, len(want)-n):]
				if fewer && want[0] != 0 {
					want = append([]int{0}, want...)
				}
				var got []int
				for i, why := range c.p.Apply(items(times), later.In(in)) {
					if len(why) > 0 {
						got = append(got, i)
					}
				}
				if !slices.Equal(got, want) {
					t.Fatalf("%s %s %d of %v: kept %v, want %v", zone, name, n, times, got, want)
				}
			}
		}
	}
}

func TestSpan(t *testing.T) {
	for in, want := range map[string]Span{
		"36h": {Clock: 36 * time.Hour}, "90m": {Clock: 90 * time.Minute}, "7d": {Days: 7}, "1y5m7d2h": {1, 5, 7, 2 * time.Hour},
		"2y": {Years: 2}, "2y3m": {Years: 2, Months: 3}, "5m3d": {Months: 5, Days: 3}, "0y5m": {Months: 5}, "1d90m": {Days: 1, Clock: 90 * time.Minute},
		"-1h": {Clock: -time.Hour}, "0": {},
	} {
		got, err := ParseSpan(in)
		if err != nil || got != want {
			t.Errorf("%s: %+v, %v", in, got, err)
		}
		if back, err := ParseSpan(got.String()); err != nil || back != got {
			t.Errorf("%s is written %s, which is %+v, %v", in, got, back, err)
		}
	}
	for _, in := range []string{"", "7", "d", "1w", "3d1y", "-3d", "1y-2m", "1d2", "99999y", "1d-1h", "7dd", "y5m"} {
		if got, err := ParseSpan(in); err == nil {
			t.Errorf("%q: %+v", in, got)
		}
	}
	// A day in which clocks change is a day.
	berlin, err := time.LoadLocation("Europe/Berlin")
	if err != nil {
		t.Fatal(err)
	}
	if got := (Span{Days: 1}).before(time.Date(2025, 10, 26, 12, 0, 0, 0, berlin)); got != time.Date(2025, 10, 25, 12, 0, 0, 0, berlin) {
		t.Error(got)
	}
}

func TestCheck(t *testing.T) {
	for says, p := range map[string]Policy{
		"no rule says what to keep":    {},
		"keep-last -2: must":           {Last: -2},
		"keep-yearly -7: must":         {Last: 1, Yearly: -7},
		"keep-within -1h0m0s: must be": {Last: 1, Within: Span{Clock: -time.Hour}},
		"":                             {Weekly: All},
	} {
		if err := p.Check(); err == nil && says != "" || err != nil && (says == "" || !strings.HasPrefix(err.Error(), says)) {
			t.Errorf("%+v: %v, want %q", p, err, says)
		}
	}
	if got := (Policy{Last: 3, Weekly: All, Within: Span{Clock: time.Hour}}).String(); got != "--keep-last 3 --keep-weekly -1 --keep-within 1h0m0s" {
		t.Error(got)
	}
}
