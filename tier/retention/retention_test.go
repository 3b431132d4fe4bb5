package retention

import (
	"fmt"
	"math/rand/v2"
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
		{Policy{Tags: [][]string{{"c"}}, Last: 2}, "[[] [] [tag] [last] [last]]"},
	} {
		if err := c.p.Check(); err != nil {
			t.Error(err)
		}
		if got := fmt.Sprint(c.p.Apply(list, time.UTC)); got != c.want {
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
		{Policy{Within: 0}, "......."},
		{Policy{Within: 55 * time.Minute}, "....kkk"},
		{Policy{Within: 9*time.Hour + 5*time.Minute}, "...kkkk"},
	} {
		var got strings.Builder
		for _, why := range c.p.Apply(items(times), time.UTC) {
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
	if got := fmt.Sprint(Policy{Last: 1, Daily: 2, Within: time.Hour}.Apply(items(times[5:]), time.UTC)); got != "[[daily within] [last daily within]]" {
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
	if got := fmt.Sprint(Policy{Daily: 2}.Apply(items(late), time.UTC)); got != "[[daily] [] [daily]]" {
		t.Errorf("UTC: %s", got)
	}
	if got := fmt.Sprint(Policy{Daily: 1}.Apply(items(late[1:]), berlin)); got != "[[] [daily]]" {
		t.Errorf("Berlin: %s", got)
	}
	back := []time.Time{at("2025-10-25 23:10"), at("2025-10-26 00:10"), at("2025-10-26 01:10"), at("2025-10-26 02:10")}
	if got := fmt.Sprint(Policy{Hourly: 3}.Apply(items(back), berlin)); got != "[[] [hourly] [hourly] [hourly]]" {
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
		{Policy{Within: time.Hour}, "[[within] [within] [within] [within]]"}, // none is older
	} {
		if got := fmt.Sprint(c.p.Apply(items(times), time.UTC)); got != c.want {
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
		more.Within = time.Duration(r.IntN(1000)) * time.Hour
		kept := 0
		large := more.Apply(items(times), time.UTC)
		for i, why := range p.Apply(items(times), time.UTC) {
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

func TestCheck(t *testing.T) {
	for says, p := range map[string]Policy{
		"no rule says what to keep":    {},
		"keep-last -2: must":           {Last: -2},
		"keep-yearly -7: must":         {Last: 1, Yearly: -7},
		"keep-within -1h0m0s: must be": {Last: 1, Within: -time.Hour},
		"":                             {Weekly: All},
	} {
		if err := p.Check(); err == nil && says != "" || err != nil && (says == "" || !strings.HasPrefix(err.Error(), says)) {
			t.Errorf("%+v: %v, want %q", p, err, says)
		}
	}
	if got := (Policy{Last: 3, Weekly: All, Within: time.Hour}).String(); got != "--keep-last 3 --keep-weekly -1 --keep-within 1h0m0s" {
		t.Error(got)
	}
}
